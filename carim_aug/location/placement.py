"""Where in the host's own lungs a graft comes to lie: the prior's draw is taken or drawn again (DESIGN 2, `gate`).

The prior knows where nodules lie in films at large; a host may be framed otherwise. 81 % of the real nodule boxes of
the train and val patients have their centre in their own film's lungs (`carim_aug.ops.lungs.lung_masks`, grown by two of
64 cells), 67 % of the prior's draws in other films do. So a draw outside is kept with chance `KEPT_OUTSIDE` and is else
drawn again from the key (seed, epoch, index, ..., try): then 78 % do (`tests/benchmarks/placement.py`). In masks of the
user's own, a draw outside is never kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.lungs import FIELD_SIZE, lung_masks
from carim_aug.ops.random import stream
from carim_aug.transforms.plan import Planner, Slot

KEPT_OUTSIDE = 1 / 3
"""Chance that a box outside its host's lungs is kept."""

PLACEMENTS = ("host", "prior")

Placement = str | Callable[[Tensor], Tensor]
"""One of `PLACEMENTS`, or a function from a host (1, C, H, W), as the user's images are, to a mask (1, 1, h, w) of
where nodules may lie."""

TRIES = 16
"""Draws of a slot before its first one is taken as it is."""

TRIES_INSIDE = 256
"""Draws of a slot in a user's own mask before the slot stays real."""

_MARGIN = 2  # cells


@dataclass(frozen=True)
class Ground:
    """Where a host's nodules may lie.

    Attributes:
        inside: (64, 64) bool.
        strict: whether no centre may lie elsewhere; else it is kept there with the chance `KEPT_OUTSIDE`.
    """

    inside: Tensor
    strict: bool = False


def check_placement(placement: Placement) -> Placement:
    """Gives the placement, or raises ValueError: it must be one of `PLACEMENTS`, or a function."""
    if callable(placement) or placement in PLACEMENTS:
        return placement
    raise ValueError(f"placement must be one of {PLACEMENTS} or a function from a host to a mask, got {placement!r}")


def grounds(images: Sequence[Tensor] | Tensor, placement: Placement, planner: Planner) -> list[Ground | None]:
    """Gives where nodules may lie in each host; None where anywhere that the prior says.

    Args:
        images: B hosts (C, H, W), in any range.
        placement: how to tell.
        planner: whose prior's field bounds the search for lungs.

    Raises:
        ValueError: a function of the user's that gives no mask.
    """
    if placement == "prior":
        return [None] * len(images)
    if callable(placement):
        return [Ground(_given(placement, image), strict=True) for image in images]
    films = [image.float().mean(dim=0, keepdim=True)[None] for image in images]
    if films and films[0].device.type != "cpu" and len({film.shape for film in films}) == 1:
        films = [torch.cat(films)]
    # On the CPU one by one: a film's lungs must not depend on its batch, not by a rounding.
    field = planner.prior.field
    lungs = [own for film in films for own in grown(lung_masks(film, field.to(film.device))).cpu()]
    return [Ground(own) if bool(own.any()) else None for own in lungs]


def again(slot: Slot, planner: Planner) -> Callable[[int], Slot]:
    """Gives what draws a slot for its n-th try: the slot itself first, then from the key (..., n)."""

    def draw(number: int) -> Slot:
        if not number:
            return slot
        return replace(planner.regenerate((*slot.key, number), str(slot.class_name)), host=slot.host)

    return draw


def candidates(draw: Callable[[int], Slot], ground: Ground | None) -> Iterator[Slot]:
    """Gives the draws of a slot, one after the other, that suit their host: first its own, then those of its tries.

    One that was drawn again has the number of the try at the end of its key, from which
    `SyntheticNoduleMix.regenerate` makes it.

    Args:
        draw: from the number of a try, from 0, to a synthetic slot.
        ground: where its host's nodules may lie.
    """
    first = draw(0)
    for number in range(TRIES_INSIDE):
        drawn = draw(number) if number else first
        if ground is None or not len(drawn.boxes):
            yield drawn
            continue
        centres = torch.from_numpy((drawn.boxes[:, :2] + drawn.boxes[:, 2:]) / 2 * FIELD_SIZE).long()
        column, row = centres.clamp(0, FIELD_SIZE - 1).T
        inside = ground.inside[row, column].float()
        # The mean over a film's boxes, so that films with several nodules are not drawn again more often.
        chance = float(inside.min() if ground.strict else (inside + KEPT_OUTSIDE * (1 - inside)).mean())
        key = drawn.key if drawn.entry is None else (*drawn.key, number)
        if stream(*key, 0).random() < chance:
            yield drawn
        elif number == TRIES - 1 and not ground.strict:
            yield first


def placed(
    images: Sequence[Tensor] | Tensor, slots: Sequence[Slot], planner: Planner, placement: Placement = "host"
) -> tuple[Slot, ...]:
    """Gives grafts that suit their hosts; real slots, and those of hosts without visible lungs, as they are.

    A slot depends on its key and its host alone. In a user's own mask, one for which no draw fits becomes real.

    Args:
        images: B hosts (C, H, W), or (B, C, H, W), in any range.
        slots: B decisions.
        planner: that made them.
        placement: how to tell where nodules may lie.
    """
    places = [i for i, slot in enumerate(slots) if len(slot.boxes)]
    chosen = list(slots)
    for i, ground in zip(places, grounds([images[i] for i in places], placement, planner), strict=True):
        chosen[i] = next(candidates(again(slots[i], planner), ground), slots[i].real())
    return tuple(chosen)


def grown(masks: Tensor) -> Tensor:
    """Gives lungs (B, 64, 64) bool with a margin: nodules lie behind heart and diaphragm too, and a mask is coarse."""
    side = 2 * _MARGIN + 1
    return F.max_pool2d(masks[:, None].float(), side, 1, _MARGIN)[:, 0] > 0.5


def _given(placement: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    mask = placement(image[None])
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask[..., 0, 0].numel() != 1:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"placement must give a mask (1, 1, H, W) for an image (1, C, H, W), got {got}")
    mask = (mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:]) > 0).float()
    if not bool(mask.any()):
        raise ValueError(f"placement must give a mask with at least one pixel set, got none of {tuple(mask.shape)}")
    # A cell counts if its middle is inside: the mask at 64 x 64.
    return F.interpolate(mask, size=(FIELD_SIZE, FIELD_SIZE), mode="nearest-exact")[0, 0] > 0.5
