"""Where in this image's own lungs a graft comes to lie: the prior's draw is taken, or drawn again.

The prior knows where nodules lie in images at large; one image may be framed otherwise. 81 % of the real nodule boxes
of train and val patients have their centre in their own image's lungs (`carim_aug.ops.lungs.lung_masks`, widened by two
of 64 cells), 67 % of the prior's draws in other images do. So a draw outside is kept with chance `KEPT_OUTSIDE` and is
else drawn again from the key (seed, epoch, index, ..., try): then 78 % do (`tests/benchmarks/placement.py`). In masks
of the user's own, a draw outside is never kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.lungs import FIELD_SIZE, lung_masks
from carim_aug.ops.random import stream

KEPT_OUTSIDE = 1 / 3
"""Chance that a box outside its image's lungs is kept."""

PLACEMENTS = ("lungs", "prior")

Placement = str | Callable[[Tensor], Tensor]
"""One of `PLACEMENTS`: "lungs" looks for them in each image, "prior" does not look; or a function from an image
(1, C, H, W), as the user's are, to a mask (1, 1, h, w) of where nodules may lie."""

TRIES = 16
"""Draws of a decision before its first one is taken as it is."""

TRIES_INSIDE = 256
"""Draws of a decision in a user's own mask before the image stays real."""

_MARGIN = 2  # cells

Drawn = TypeVar("Drawn", bound=Any)
"""A decision: it has a `key` and `boxes`, (k, 4) XYXY as parts of the image."""


@dataclass(frozen=True)
class Area:
    """Where an image's nodules may lie."""

    inside: Tensor | None = None  # (64, 64) bool; None: anywhere that the prior says
    strict: bool = False  # whether no centre may lie elsewhere; else it is kept there with the chance `KEPT_OUTSIDE`
    taken: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # (k, 4) XYXY as parts: no box touches them

    def has_room(self, boxes: np.ndarray) -> bool:
        """Return whether none of the boxes (n, 4), with the seam around it, touches one that is taken."""
        seam = np.tile(0.06 * (boxes[:, 2:] - boxes[:, :2]), 2) * [-1, -1, 1, 1]
        a, b = (boxes + seam)[:, None], self.taken[None]
        return not bool(((a[..., :2] <= b[..., 2:]) & (b[..., :2] <= a[..., 2:])).all(axis=-1).any())


def check_placement(placement: Placement) -> Placement:
    """Return the placement, or raise ValueError: it must be one of `PLACEMENTS` ("host" is "lungs"), or a function."""
    if callable(placement) or placement in PLACEMENTS:
        return placement
    if placement == "host":
        return "lungs"
    raise ValueError(f"placement must be one of {PLACEMENTS} or a function from an image to a mask, got {placement!r}")


def find_areas(images: Sequence[Tensor] | Tensor, placement: Placement, field: Tensor) -> list[Area | None]:
    """Return where nodules may lie in each background (C, H, W) of any range; None where no lungs are found.

    The search is bounded by the field, (64, 64) bool, where lung can be.
    """
    if placement == "prior":
        return [Area()] * len(images)
    if callable(placement):
        return [Area(_user_mask(placement, image), strict=True) for image in images]
    grey = [image.float().mean(dim=0, keepdim=True)[None] for image in images]
    if grey and grey[0].device.type != "cpu" and len({image.shape for image in grey}) == 1:
        grey = [torch.cat(grey)]
    # On the CPU one by one: an image's lungs must not depend on its batch, not by a rounding.
    lungs = [own for image in grey for own in widen(lung_masks(image, field.to(image.device))).cpu()]
    return [Area(own) if bool(own.any()) else None for own in lungs]


def candidates(draw: Callable[[int], Drawn], area: Area) -> Iterator[Drawn]:
    """Yield the draws of a decision that suit the area of their image: first its own, then those of its tries.

    `draw` takes the number of a try, from 0, to a decision, whose key ends with the number if it is not 0.
    """
    first = draw(0)
    for number in range(TRIES_INSIDE):
        drawn = draw(number) if number else first
        if area.inside is None or not len(drawn.boxes):
            if area.has_room(drawn.boxes):
                yield drawn
            continue
        centres = torch.from_numpy((drawn.boxes[:, :2] + drawn.boxes[:, 2:]) / 2 * FIELD_SIZE).long()
        column, row = centres.clamp(0, FIELD_SIZE - 1).T
        inside = area.inside[row, column].float()
        # The mean over an image's boxes, so that images with several nodules are not drawn again more often.
        chance = float(inside.min() if area.strict else (inside + KEPT_OUTSIDE * (1 - inside)).mean())
        if stream(*drawn.key, 0).random() < chance and area.has_room(drawn.boxes):
            yield drawn
        elif number == TRIES - 1 and not area.strict and area.has_room(first.boxes):
            yield first


def widen(masks: Tensor) -> Tensor:
    """Return lungs (B, 64, 64) bool with a margin: nodules lie behind heart and diaphragm too, and a mask is coarse."""
    side = 2 * _MARGIN + 1
    return F.max_pool2d(masks[:, None].float(), side, 1, _MARGIN)[:, 0] > 0.5


def _user_mask(placement: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    mask = placement(image[None])
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask[..., 0, 0].numel() != 1:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"placement must give a mask (1, 1, H, W) for an image (1, C, H, W), got {got}")
    mask = (mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:]) > 0).float()
    if not bool(mask.any()):
        raise ValueError(f"placement must give a mask with at least one pixel set, got none of {tuple(mask.shape)}")
    # A cell counts if its middle is inside: the mask at 64 x 64.
    return F.interpolate(mask, size=(FIELD_SIZE, FIELD_SIZE), mode="nearest-exact")[0, 0] > 0.5
