"""How generated pixels come into a user's batch: the whole image, or the nodule alone grafted into the real one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.labels import LabelPolicy
from carim_aug.masks import feather
from carim_aug.plan import Slot
from carim_aug.ranges import ValueRange
from carim_aug.render import Renderer


def insert(
    images: Tensor, slots: Sequence[Slot], *, insertion: str, renderer: Renderer, value_range: ValueRange
) -> Tensor:
    """Gives the batch's images with the synthetic slots filled; `images` itself where there are none.

    Args:
        images: (B, C, H, W), C 1 or 3, in `value_range`. Never changed.
        slots: B decisions.
        insertion: "whole" or "graft".
        renderer: generates.
        value_range: of the images.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    places = [i for i, slot in enumerate(slots) if slot.synthetic]
    if not places:
        return images
    chosen = [slots[i] for i in places]
    index = torch.tensor(places, device=images.device)
    if insertion == "whole":
        generated = resize(renderer.whole(chosen, images.device), images.shape[-2:])
        new = value_range.from_symmetric(generated, channels=images.shape[1], dtype=images.dtype)
    else:
        new = graft(images[index], renderer.differences(chosen, images.device), chosen, value_range)
    mixed = images.clone()
    mixed[index] = new
    return mixed


def graft(images: Tensor, differences: Tensor, slots: Sequence[Slot], value_range: ValueRange) -> Tensor:
    """Gives x + feather(C) * (G(z, C) - G(z, 0)), equal to x wherever the feathered mask is 0.

    Args:
        images: (n, C, H, W) in `value_range`.
        differences: (n, 1, S, S) float, [-2, 2].
        slots: n slots; their boxes say where.
        value_range: of the images; the result is clamped to it where it changed.

    Returns:
        (n, C, H, W) of the images' dtype.
    """
    height, width = images.shape[-2:]
    weight = feather([s.boxes_at(height, width) for s in slots], (height, width)).to(images.device)
    added = weight * resize(differences, (height, width))
    added = value_range.scale_difference(added, channels=images.shape[1], dtype=images.dtype)
    low, high = value_range.bounds(images.shape[1], like=images)
    changed = torch.minimum(torch.maximum(images.to(added.dtype) + added, low), high)
    if not images.dtype.is_floating_point:
        changed = changed.round()
    return torch.where(weight > 0, changed.to(images.dtype), images)


def relabel(labels: Any, slots: Sequence[Slot], *, insertion: str, policy: LabelPolicy) -> Any:
    """Gives the batch's labels as its slots want them; `labels` itself where all are real.

    Args:
        labels: (B,) or (B, C) tensor or array. Never changed.
        slots: B decisions.
        insertion: "whole" or "graft".
        policy: of the labels, resolved.
    """
    places: dict[str, list[int]] = {}
    for i, slot in enumerate(slots):
        if slot.class_name is not None:
            places.setdefault(slot.class_name, []).append(i)
    if not places:
        return labels
    mixed = labels.clone() if isinstance(labels, Tensor) else labels.copy()
    for name, rows in places.items():
        old = labels[rows]
        mixed[rows] = policy.add_nodule(old) if insertion == "graft" else policy.synthetic(old, name)
    return mixed


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Gives images (n, 1, S, S) at (height, width), bilinear and antialiased; as they are if they have it."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
