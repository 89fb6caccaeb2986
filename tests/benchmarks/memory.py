"""Resident memory over 10,000 batches of each use, in one process: it stays flat."""

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny import Images, make_mix, resident_bytes  # noqa: E402
from tqdm import tqdm  # noqa: E402

BATCHES, EVERY, SKIP = 10_000, 250, 2_000


def from_loader(insertion):
    loader = make_mix(p=0.5, insertion=insertion).loader(Images(1000), batch_size=2, shuffle=True)
    while True:
        yield from loader


def from_transform(insertion):
    mix = make_mix(p=0.5, insertion=insertion)
    images, labels = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2).long()
    while True:
        yield mix(images, labels)


def main() -> None:
    rows = []
    for name, batches in (
        ("mix.loader, whole", from_loader("whole")),
        ("mix(images, labels), graft", from_transform("graft")),
    ):
        at, memory = [], []
        for k in tqdm(range(1, BATCHES + 1), desc=name, unit="batch"):
            next(batches)
            if k % EVERY == 0 and k >= SKIP:
                gc.collect()
                at.append(k)
                memory.append(resident_bytes() / 2**20)
        slope = np.polyfit(at, memory, 1)[0] * BATCHES
        rows.append((name, memory[0], memory[-1], max(memory), slope))
    print(f"{'resident memory, MiB':30} {'at 2,000':>9} {'at 10,000':>10} {'most':>7} {'slope per 10,000':>17}")
    for name, first, last, most, slope in rows:
        print(f"{name:30} {first:9.1f} {last:10.1f} {most:7.1f} {slope:17.2f}")


if __name__ == "__main__":
    main()
