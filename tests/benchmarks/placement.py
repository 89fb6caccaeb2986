"""Do grafts lie in their host's own lungs as often as real nodules do, and what does looking cost?

Needs ChestX-ray14 films: CARIM_DATA, or ../shared/data beside the checkout, holds nih-cxr14-mini. Real boxes are
those of train and val patients, on which `KEPT_OUTSIDE` was set; hosts are normal films of the same.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.location.placement import grown, placed
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.lungs import FIELD_SIZE, lung_masks
from carim_aug.transforms.plan import Planner, Slot

ROOT = Path(__file__).resolve().parents[2]
N = 1000


def films_of(root: Path, split: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Normal films; boxed films, one for each box; the boxes' centres in [0, 1]."""
    data = ChestXray14(root, split=split, extra_boxes=root / "ChestX-Det_boxes.csv")
    normal, boxed, centres = [], [], []
    for i in range(len(data)):
        boxes = data.boxes_relative(i, "Nodule")
        if not data.labels[i].any():
            normal.append(torch.as_tensor(data[i][0]))
        for box in boxes[(boxes[:, 2:] - boxes[:, :2]).amax(dim=1) <= 0.16] if len(boxes) else ():
            boxed.append(torch.as_tensor(data[i][0]))
            centres.append((box[:2] + box[2:]) / 2)
    return normal, boxed, centres


def share_inside(films: Tensor, centres: list[Tensor], field: Tensor) -> float:
    """The mean share of the centres (k, 2) of each film that lie in its lungs."""
    lungs = grown(lung_masks(films, field))
    shares = []
    for own, places in zip(lungs, centres, strict=True):
        x, y = (places.view(-1, 2) * FIELD_SIZE).long().clamp(0, FIELD_SIZE - 1).T
        shares.append(own[y, x].float().mean())
    return float(torch.stack(shares).mean())


def centres_of(slots: list[Slot]) -> list[Tensor]:
    """The boxes' centres of each slot, in [0, 1]."""
    return [torch.from_numpy((s.boxes[:, :2] + s.boxes[:, 2:]) / 2) for s in slots]


def main() -> None:
    """Prints the table."""
    root = Path(os.environ.get("CARIM_DATA", ROOT.parent / "shared" / "data")) / "nih-cxr14-mini"
    if not root.is_dir():
        print("no table: set CARIM_DATA to a folder that holds nih-cxr14-mini")
        return
    prior = LocationPrior.bundled()
    parts = [films_of(root, split) for split in ("train", "val")]
    normal, boxed, centres = ([x for part in parts for x in part[k]] for k in range(3))
    stream = torch.Generator().manual_seed(0)
    hosts = torch.stack([normal[i] for i in torch.randint(len(normal), (N,), generator=stream).tolist()])
    planner = Planner(prior, seed=0, nodule="Nodule", chances={"Nodule": 1.0})
    first = [planner.decide((0, 0, i), i, eligible=True) for i in range(N)]
    started = time.process_time()
    chosen = list(placed(hosts, first, planner))
    cost = (time.process_time() - started) / N * 1e3

    print("centres in the film's own lungs, grown by two of 64 cells")
    print(f"{f'{len(boxed)} real boxes':40}{share_inside(torch.stack(boxed), centres, prior.field):8.3f}")
    print(f"{f'{N} draws of the prior':40}{share_inside(hosts, centres_of(first), prior.field):8.3f}")
    print(f"{'the same, placed by their hosts':40}{share_inside(hosts, centres_of(chosen), prior.field):8.3f}")
    print(f"{'CPU time of a graft':40}{cost:8.1f} ms")


if __name__ == "__main__":
    main()
