"""`mix` on a batch with nothing selected against `v2.CutMix` on it: at most 1.5x. 64 float images of 1 x 224 x 224."""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import make_mix  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

RUNS, LIMIT = 31, 1.5


def main() -> None:
    images = torch.rand(64, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    normal, nodule = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.long)
    cutmix = v2.CutMix(num_classes=2)
    never, rarely = make_mix(p=0.0), make_mix(p=1e-9)
    half = make_mix(p=0.5)
    calls = {
        "v2.CutMix": lambda: cutmix(images, normal),
        "mix, p = 0": lambda: never(images, normal),
        "mix, p = 0.5, no image eligible": lambda: half(images, nodule),
        "mix, p = 1e-9, all eligible, none drawn": lambda: rarely(images, normal),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(RUNS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run >= 2:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["v2.CutMix"])
    print(f"{'batch of 64, nothing selected':42} {'ms':>7} {'x CutMix':>9} {'limit':>6}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:42} {median * 1e3:7.2f} {median / base:9.2f} {LIMIT:6}")


if __name__ == "__main__":
    main()
