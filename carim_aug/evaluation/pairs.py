"""What a mask changes: measures of same-noise pairs, and the same contrast on real boxes (METHOD 8, Fig. 6; EVIDENCE).

All take boxes as one (B, 4) tensor, XYXY in pixels: one nodule an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from carim_aug.masks import boxes_to_masks, dilate_boxes


def energy_inside(differences: Tensor, boxes: Tensor, *, grow: float = 0.25) -> Tensor:
    """Gives the share of |difference| that lies inside the box grown by a part of its size on every side.

    Args:
        differences: (B, 1, S, S), image with mask minus image without, same noise.
        boxes: (B, 4).
        grow: part of the box's width and height added on each side.

    Returns:
        (B,) in [0, 1]; 0 where there is no difference at all.
    """
    size = differences.shape[-1]
    masks = boxes_to_masks(list(dilate_boxes(boxes, grow, size)[:, None]), size).to(differences.device)
    total = differences.abs().sum(dim=(1, 2, 3))
    return (differences.abs() * masks).sum(dim=(1, 2, 3)) / total.clamp(min=1e-12)


def argmax_hit(differences: Tensor, boxes: Tensor) -> Tensor:
    """Gives whether the pixel that brightens most lies inside the box.

    Args:
        differences: (B, 1, S, S).
        boxes: (B, 4).

    Returns:
        (B,) bool.
    """
    size = differences.shape[-1]
    place = differences.flatten(1).argmax(dim=1)
    masks = boxes_to_masks(list(boxes[:, None]), size).to(differences.device)
    return masks.flatten(1).gather(1, place[:, None])[:, 0] > 0


class Contrast(NamedTuple):
    """Mean brightness of a nodule's ellipse, of the ring about it, and inside minus ring; (B,) each."""

    inside: Tensor
    ring: Tensor
    contrast: Tensor


def ring_contrast(images: Tensor, boxes: Tensor, *, grow: float = 0.3) -> Contrast:
    """Gives signed contrast, inside against ring, in the images' units.

    Args:
        images: (B, 1, S, S).
        boxes: (B, 4).
        grow: the ring reaches from the box's ellipse to the ellipse of the box grown by this on every side.

    Returns:
        Means inside and in the ring, and their difference, (B,) each.
    """
    size = images.shape[-1]
    inside = boxes_to_masks(list(boxes[:, None]), size, shape="ellipse").to(images.device)
    outer = boxes_to_masks(list(dilate_boxes(boxes, grow, size)[:, None]), size, shape="ellipse").to(images.device)
    ring = outer * (1 - inside)

    def mean(weight: Tensor) -> Tensor:
        return (images * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1)

    a, b = mean(inside), mean(ring)
    return Contrast(a, b, a - b)


def roundness(differences: Tensor, boxes: Tensor) -> Tensor:
    """Gives how much of the box's corners the difference leaves dark: 1 for an ellipse, 0 for a full square.

    One minus the mean difference between the box and its ellipse over the mean inside the ellipse, cut to [0, 1].

    Args:
        differences: (B, 1, S, S).
        boxes: (B, 4), at least some 5 pixels wide, or the corners hold no pixel.

    Returns:
        (B,); NaN where the box has no corner pixel or nothing is brighter inside.
    """
    size = differences.shape[-1]
    box = boxes_to_masks(list(boxes[:, None]), size).to(differences.device)
    ellipse = boxes_to_masks(list(boxes[:, None]), size, shape="ellipse").to(differences.device)
    corner = box * (1 - ellipse)
    count = corner.sum(dim=(1, 2, 3))
    middle = (differences * ellipse).sum(dim=(1, 2, 3)) / ellipse.sum(dim=(1, 2, 3)).clamp(min=1)
    edge = (differences * corner).sum(dim=(1, 2, 3)) / count.clamp(min=1)
    ratio = (1 - edge / middle).clamp(0, 1)
    return torch.where((count > 0) & (middle > 0), ratio, torch.full_like(ratio, torch.nan))
