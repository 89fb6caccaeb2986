"""How much of a graft's |difference| lies in the boxes, at three sizes, with the bundled weights.

python tests/benchmarks/grafts.py [--pairs 400]
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

from carim_aug import SyntheticNoduleMix  # noqa: E402

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400)
    pairs = parser.parse_args().pairs
    mix = SyntheticNoduleMix.from_pretrained(p=1.0, placement="prior", value_range="symmetric")
    print(f"{'|difference| inside the boxes':32} {'mean':>7} {'5 %':>7} {'least':>7} {'pooled':>7}")
    for size in (128, 256, 512):
        added, masks = [], []
        for start in range(0, pairs, BATCH):
            mix.load_state_dict({"seed": mix.seed, "epoch": 0, "step": start})  # the same nodules at each size
            background = torch.zeros(min(BATCH, pairs - start), 1, size, size)
            added.append(mix(background, torch.zeros(len(background), dtype=torch.int64))[0].abs())
            masks.append(mix.last_params.masks)
        difference, inside = torch.cat(added), torch.cat(added) * torch.cat(masks)
        share = inside.sum(dim=(1, 2, 3)) / difference.sum(dim=(1, 2, 3))
        row = (share.mean(), share.quantile(0.05), share.min(), inside.sum() / difference.sum())
        print(f"{f'{pairs} grafts, {size} px':32} " + " ".join(f"{float(value):7.4f}" for value in row))


if __name__ == "__main__":
    main()
