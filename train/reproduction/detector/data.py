"""What a detector is shown: boxed and normal images, and nodules that `SyntheticNoduleMix` puts into the normal ones.

Images labelled Nodule without a box are left out: as normal ones they would be wrong, and their box is not known. All
sources of nodules, the generator and the controls, come in by the same mix.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as VF

from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.ops.random import fold
from train.common.images import ImageSet, read_images
from train.common.run import RunError
from train.reproduction.controls.nodules import DrawnNodules, SuperimposedNodules

SIZE = 256  # side in pixels at which a detector sees images

SOURCES: tuple[str, ...] = ("graft", "real", "ct", "drawn-blob")
"""What changed images get: a generator's grafts, a real boxed image in their place, CT nodules, drawn blobs."""

Target = dict[str, Tensor]
"""As torchvision's detectors take it: boxes (k, 4) XYXY in pixels, labels (k,) int64, all 1."""


def read_boxed(root: str | Path, split: str, *, normal: int | None = None) -> ImageSet:
    """Read a split's images with nodule boxes, of either table and any size, and (at most `normal`) normal ones."""
    images = read_images(root, split, SIZE, only_normal_or_boxed=True, largest_box=1.0, limit_normal=normal)
    images.check(f"{root}: the {split} split", normal=1, boxed=1)
    return images


def make_mix(
    source: str, *, weights: str | Path | None = None, ct_nodules: str | Path | None = None, seed: int = 0
) -> SyntheticNoduleMix | None:
    """Return the mix that puts a nodule of a source (`SOURCES`) into every image; None for "real".

    `weights` is the folder of the generator of "graft" (None: the bundled one), `ct_nodules` the templates.npz of "ct".
    """
    if source not in SOURCES:
        raise RunError(f"source must be one of {SOURCES}, got {source!r}")
    if source == "real":
        return None
    generator: Any = DrawnNodules(SIZE)
    if source == "graft":
        generator = NoduleGenerator.from_pretrained(weights)
    elif source == "ct":
        if ct_nodules is None:
            raise RunError("ct_nodules must be given for source 'ct' (--ct-nodules), got None")
        generator = SuperimposedNodules(CTNodules(ct_nodules), SIZE)
    return SyntheticNoduleMix(generator, LocationPrior.bundled(), p=1.0, insertion="graft", seed=seed)


def move(image: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return an image (1, S, S), [0, 1], and its boxes (k, 4) mirrored, shifted (5 %), zoomed (15 %), or brightened.

    Boxes of which less than half is left are dropped.
    """
    side = image.shape[-1]
    u = torch.rand(6, generator=generator).tolist()
    shown = tv_tensors.Image(image)
    found = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(side, side))  # type: ignore[call-overload]
    if u[0] < 0.5:
        shown, found = VF.horizontal_flip(shown), VF.horizontal_flip(found)
    shift, zoom = [0.1 * side * (v - 0.5) for v in u[1:3]], 0.85 + 0.3 * u[3]
    shown = VF.affine(shown, 0.0, shift, zoom, [0.0, 0.0], interpolation=VF.InterpolationMode.BILINEAR)
    found = VF.affine(found, 0.0, shift, zoom, [0.0, 0.0])
    left = VF.clamp_bounding_boxes(found).as_subclass(Tensor)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) * zoom**2
    seen = (left[:, 2:] - left[:, :2]).prod(dim=1) >= whole / 2
    contrast, level = 0.8 + 0.4 * u[4], 0.1 * (u[5] - 0.5)
    return ((shown.as_subclass(Tensor) - 0.5) * contrast + 0.5 + level).clamp(0, 1), left[seen]


def plan_rows(images: ImageSet, *, count: int, batch: int, boxed: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the row of the image that is shown at each place, (count,), and whether it is a boxed one.

    Every batch begins with its share of boxed images; images of a kind come again only when all have been shown.
    """
    every, is_boxed = torch.arange(len(images)), torch.arange(count) % batch < round(boxed * batch)
    rows = torch.empty(count, dtype=torch.int64)
    for kind, own in ((True, images.boxed), (False, every[~torch.isin(every, images.boxed)])):
        rows[is_boxed == kind] = _shuffle(own, int((is_boxed == kind).sum()), fold(seed, 21, int(kind)))
    return rows, is_boxed


def draw_batches(
    images: ImageSet, mix: SyntheticNoduleMix | None, *, share: float, batch: int, seed: int, **plan: Any
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Yield batches of images (1, S, S) float, [0, 1], moved by chance, and their targets; `plan` is `plan_rows`'.

    A share of the normal images gains nodules by a mix of p = 1, or gives way to boxed images again where that is None
    (oversampling). Which places change is the same whatever comes there: a pure function of seed and place.
    """
    rows, is_boxed = plan_rows(images, batch=batch, seed=seed, **plan)
    chance = torch.rand(len(rows), generator=torch.Generator().manual_seed(fold(seed, 23)))
    changed = ~is_boxed & (chance < share)
    if mix is None:
        rows[changed] = _shuffle(images.boxed, int(changed.sum()), fold(seed, 24))
    for start in range(0, len(rows), batch):
        shown, targets = list[Tensor](), list[Target]()
        for place, row in enumerate(rows[start : start + batch].tolist(), start):
            generator = torch.Generator().manual_seed(fold(seed, place, 22))
            image, boxes = move(images.images[row].float() / 255, images.boxes[row] * SIZE, generator)
            shown.append(image)
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
        chosen = changed[start : start + batch].nonzero()[:, 0].tolist()
        if mix is not None and chosen:
            mix.load_state_dict({"seed": mix.seed, "epoch": 0, "step": start})
            mixed = mix(torch.stack([shown[k] for k in chosen]), [targets[k] for k in chosen])
            for k, image, target in zip(chosen, *mixed, strict=True):
                shown[k], targets[k] = image, target
        yield shown, targets


def _shuffle(rows: Tensor, n: int, seed: int) -> Tensor:
    """Return n of the rows in random order, each as often as another but for one."""
    generator = torch.Generator().manual_seed(seed)
    shuffles = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-n // len(rows)))]
    return torch.cat([*shuffles, rows[:0]])[:n]
