"""What the mix costs where nothing is generated: a decision at most 50 us, a batch at most 1.5 times `v2.CutMix`.

Decisions in CPU time, so that other work on the machine does not count; batches of 64 float images of 1 x 224 x 224.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny import Images, make_mix, prior  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from carim_aug.transforms.plan import Planner  # noqa: E402

RUNS = 15


def measure(kinds: dict[str, Callable[[], object]], calls: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the microseconds of a call in each of `RUNS` runs that take turns, the first left out."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(RUNS + 1):
        for name, kind in kinds.items():
            start = clock()
            for _ in range(calls):
                kind()
            times[name].append((clock() - start) / calls * 1e6)
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    planner, half = (Planner(prior(), seed=0, nodule="Nodule", chances={"Nodule": p}) for p in (1.0, 0.5))
    backgrounds, count = np.arange(1000), itertools.count()
    planned = make_mix(p=0.5).wrap(Images(1000)).planned
    decisions = {
        "real image, not eligible": lambda: planner.decide((0, 0, next(count)), 0, eligible=False),
        "image at p = 0.5": lambda: half.decide((0, 0, next(count)), 0, eligible=True),
        "synthetic nodule": lambda: planner.decide((0, 0, next(count)), 0, eligible=True),
        "added synthetic nodule": lambda: planner.add((0, 0, next(count)), "Nodule", backgrounds),
        "data set's image at p = 0.5": lambda: planned.decide((0, 0, next(count) % 1000), True),
    }
    print(f"{'us a decision (median of 15 x 5000)':44} {'median':>7} {'worst run':>10} {'limit':>6}")
    for name, values in measure(decisions, 5000, time.process_time).items():
        print(f"{name:44} {statistics.median(values):7.1f} {max(values):10.1f} {50:6}")

    images = torch.rand(64, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    normal, nodule = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.long)
    cutmix, never, rarely, some = v2.CutMix(num_classes=2), *(make_mix(p=p) for p in (0.0, 1e-9, 0.5))
    batches = {
        "v2.CutMix": lambda: cutmix(images, normal),
        "mix, p = 0": lambda: never(images, normal),
        "mix, p = 0.5, no image eligible": lambda: some(images, nodule),
        "mix, p = 1e-9, all eligible, none drawn": lambda: rarely(images, normal),
    }
    times = {name: statistics.median(values) for name, values in measure(batches, 2, time.perf_counter).items()}
    print(f"\n{'batch of 64, nothing selected':44} {'ms':>7} {'x CutMix':>10} {'limit':>6}")
    for name, median in times.items():
        print(f"{name:44} {median / 1e3:7.2f} {median / times['v2.CutMix']:10.2f} {1.5:6}")


if __name__ == "__main__":
    main()
