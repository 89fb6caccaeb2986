"""Images at another size, and the contrast of what is in them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images (n, C, H, W) to (height, width), bilinear and antialiased; as they are if they have it."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


class Contrast(NamedTuple):
    """Mean brightness inside a box's ellipse and in the ring about it, and inside minus ring; (B,) each."""

    inside: Tensor
    ring: Tensor
    contrast: Tensor


def ring_contrast(images: Tensor, boxes: Tensor, *, grow: float = 0.3) -> Contrast:
    """Return the signed contrast of boxes (B, 4) in pixels, one an image (B, 1, S, S), in the images' units.

    The ring reaches from the box's ellipse to that of the box dilated by the share `grow` of its sides.
    """
    size = images.shape[-1]
    inside = boxes_to_masks(list(boxes[:, None]), size, shape="ellipse").to(images.device)
    outer = boxes_to_masks(list(dilate_boxes(boxes, grow, size)[:, None]), size, shape="ellipse").to(images.device)
    within, around = (
        (images * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1)
        for weight in (inside, outer * (1 - inside))
    )
    return Contrast(within, around, within - around)
