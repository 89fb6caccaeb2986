"""What planning a slot costs: at most 50 us. CPU time, so that other work on the machine does not count."""

import itertools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from tiny import make_mix, prior  # noqa: E402

from carim_aug.transforms.dataset import PlannedDataset  # noqa: E402
from carim_aug.transforms.plan import Planner  # noqa: E402

CALLS, RUNS, LIMIT = 5000, 15, 50


def main() -> None:
    from tiny import Films

    planner = Planner(prior(), seed=0, nodule="Nodule", chances={"Nodule": 1.0})
    half = Planner(prior(), seed=0, nodule="Nodule", chances={"Nodule": 0.5})
    hosts, counter = np.arange(1000), itertools.count()
    planned: PlannedDataset = make_mix(p=0.5).wrap(Films(1000)).planned
    kinds = {
        "real slot, not eligible": lambda i: planner.decide((0, 0, i), i, eligible=False),
        "slot at p = 0.5": lambda i: half.decide((0, 0, i), i, eligible=True),
        "synthetic nodule": lambda i: planner.decide((0, 0, i), i, eligible=True),
        "added synthetic nodule": lambda i: planner.add((0, 0, i), "Nodule", hosts),
        "data set's slot at p = 0.5": lambda i: planned.slot(i % 1000, True),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(RUNS):
        for name, kind in kinds.items():
            start = time.process_time()
            for _ in range(CALLS):
                kind(next(counter))
            times[name].append((time.process_time() - start) / CALLS * 1e6)
    print(f"{'planning, us a slot (median of 15 x 5000)':44} {'median':>7} {'worst run':>10} {'limit':>6}")
    for name, values in times.items():
        print(f"{name:44} {statistics.median(values):7.1f} {max(values):10.1f} {LIMIT:6}")


if __name__ == "__main__":
    main()
