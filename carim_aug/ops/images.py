"""Measures and changes of images that no other module owns: size, contrast against a ring."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Gives images (n, 1, S, S) at (height, width), bilinear and antialiased; as they are if they have it."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


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
