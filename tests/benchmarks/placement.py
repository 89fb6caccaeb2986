"""Do grafts lie in their image's own lungs as often as real nodules do, and what does looking cost?

Needs ChestX-ray14 images: CARIM_DATA, or ../shared/data beside the checkout, holds nih-cxr14-mini. Real boxes are
those of train and val patients, on which `KEPT_OUTSIDE` was set; backgrounds are normal images of the same.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from carim_aug.location.placement import candidates, find_areas, widen  # noqa: E402
from carim_aug.location.prior import LocationPrior  # noqa: E402
from carim_aug.ops.lungs import FIELD_SIZE, lung_masks  # noqa: E402
from carim_aug.transforms.plan import Decision, Planner  # noqa: E402
from train.common.images import read_images  # noqa: E402

N = 1000


def share_inside(images: Tensor, centres: list[Tensor], field: Tensor) -> float:
    """Return the mean share of the centres (k, 2) of each image that lie in its lungs."""
    lungs = widen(lung_masks(images, field))
    shares = []
    for own, places in zip(lungs, centres, strict=True):
        x, y = (places.view(-1, 2) * FIELD_SIZE).long().clamp(0, FIELD_SIZE - 1).T
        shares.append(own[y, x].float().mean())
    return float(torch.stack(shares).mean())


def centres_of(decisions: list[Decision]) -> list[Tensor]:
    """Return the boxes' centres of each decision, in [0, 1]."""
    return [torch.from_numpy((d.boxes[:, :2] + d.boxes[:, 2:]) / 2) for d in decisions]


def main() -> None:
    root = Path(os.environ.get("CARIM_DATA", ROOT.parent / "shared" / "data")) / "nih-cxr14-mini"
    if not root.is_dir():
        print("no table: set CARIM_DATA to a folder that holds nih-cxr14-mini")
        return
    prior, images = LocationPrior.bundled(), read_images(root, ("train", "val"), 256)
    rows, boxes = images.each_box()
    stream, normal = torch.Generator().manual_seed(0), images.normal
    backgrounds = images.images[normal[torch.randint(len(normal), (N,), generator=stream)]]
    planner = Planner(prior, seed=0, nodule="Nodule", chances={"Nodule": 1.0})
    first = [planner.decide((0, 0, i), i, eligible=True) for i in range(N)]
    started = time.process_time()
    areas = find_areas(backgrounds, "lungs", prior.field)
    chosen = [next(candidates(partial(planner.redraw, d), area)) for d, area in zip(first, areas, strict=True)]
    cost = (time.process_time() - started) / N * 1e3

    real = share_inside(images.images[rows], list((boxes[:, :2] + boxes[:, 2:]) / 2), prior.field)
    print("centres in the image's own lungs, widened by two of 64 cells")
    print(f"{f'{len(rows)} real boxes':40}{real:8.3f}")
    print(f"{f'{N} draws of the prior':40}{share_inside(backgrounds, centres_of(first), prior.field):8.3f}")
    print(f"{'the same, placed in their images':40}{share_inside(backgrounds, centres_of(chosen), prior.field):8.3f}")
    print(f"{'CPU time of a graft':40}{cost:8.1f} ms")


if __name__ == "__main__":
    main()
