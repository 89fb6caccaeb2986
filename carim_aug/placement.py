"""Where in the host's own lungs a graft comes to lie: the prior's draw is taken or drawn again (DESIGN 2, `gate`).

The prior knows where nodules lie in films at large; a host may be framed otherwise. 81 % of the real nodule boxes of
the train and val patients have their centre in their own film's lungs (`carim_aug.lungs.lung_masks`, grown by two of
64 cells), 67 % of the prior's draws in other films do. So a draw outside is kept with chance `KEPT_OUTSIDE` and is else
drawn again from the key (seed, epoch, index, ..., try): then 78 % do (`tests/benchmarks/placement.py`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.keys import stream
from carim_aug.lungs import FIELD_SIZE, lung_masks
from carim_aug.plan import Planner, Slot

KEPT_OUTSIDE = 1 / 3
"""Chance that a box outside its host's lungs is kept."""

PLACEMENTS = ("host", "prior")

TRIES = 16
"""Draws of a slot before its first one is taken as it is."""

_MARGIN = 2  # cells


def placed(images: Tensor, slots: Sequence[Slot], planner: Planner) -> tuple[Slot, ...]:
    """Gives grafts that suit their hosts' own lungs; real slots, and those of hosts without visible lungs, as they are.

    A slot depends on its key and its host alone. One that was drawn again has the number of the try at the end of its
    key, from which `SyntheticNoduleMix.regenerate` makes it.

    Args:
        images: (B, C, H, W), the hosts, in any range.
        slots: B decisions.
        planner: that made them.
    """
    places = [i for i, slot in enumerate(slots) if len(slot.boxes)]
    if not places:
        return tuple(slots)
    films = images[places].float().mean(dim=1, keepdim=True)
    # One by one on the CPU: a film's lungs must not depend on its batch, not by a rounding.
    parts = films.split(1) if films.device.type == "cpu" else (films,)
    field = planner.prior.field.to(films.device)
    lungs = torch.cat([grown(lung_masks(part, field)) for part in parts]).cpu()
    chosen = list(slots)
    for i, own in zip(places, lungs, strict=True):
        chosen[i] = _placed(slots[i], own, planner)
    return tuple(chosen)


def _placed(slot: Slot, lungs: Tensor, planner: Planner) -> Slot:
    if not bool(lungs.any()):
        return slot
    for number in range(TRIES):
        draw = slot
        if number:
            draw = replace(planner.regenerate((*slot.key, number), str(slot.class_name)), host=slot.host)
        centres = torch.from_numpy((draw.boxes[:, :2] + draw.boxes[:, 2:]) / 2 * FIELD_SIZE).long()
        column, row = centres.clamp(0, FIELD_SIZE - 1).T
        inside = lungs[row, column].float()
        # The mean over a film's boxes, so that films with several nodules are not drawn again more often.
        chance = float((inside + KEPT_OUTSIDE * (1 - inside)).mean())
        if stream(*draw.key, 0).random() < chance:
            return draw
    return slot


def grown(masks: Tensor) -> Tensor:
    """Gives lungs (B, 64, 64) bool with a margin: nodules lie behind heart and diaphragm too, and a mask is coarse."""
    side = 2 * _MARGIN + 1
    return F.max_pool2d(masks[:, None].float(), side, 1, _MARGIN)[:, 0] > 0.5
