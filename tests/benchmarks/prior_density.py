"""Held-out log density of the bundled prior against simpler ones, and what a draw costs.

Needs ChestX-ray14 boxes: CARIM_DATA, or ../shared/data beside the checkout.
"""

import os
import sys
import time
import timeit
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from carim_aug.location.prior import LocationPrior  # noqa: E402
from train.prior.fitting import held_out_table  # noqa: E402


def main() -> None:
    prior, rng = LocationPrior.bundled(), np.random.default_rng(0)
    print(prior)
    runs = [timeit.timeit(lambda: prior.draw(rng), number=5000, timer=time.process_time) / 5000 * 1e6 for _ in range(5)]
    print(f"draw: {sorted(runs)[2]:.1f} us of CPU time a call, median of 5 x 5000\n")
    root = Path(os.environ.get("CARIM_DATA", ROOT.parent / "shared" / "data")) / "nih-cxr14-mini"
    if not root.is_dir():
        print("no held-out table: set CARIM_DATA to a folder that holds nih-cxr14-mini")
        return
    print(held_out_table(root, prior))


if __name__ == "__main__":
    main()
