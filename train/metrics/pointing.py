"""The pointing game: does a map peak in a box that a reader drew (Zhang et al. 2016)?"""

from torch import Tensor

from carim_aug.ops.boxes import boxes_to_masks


def pointing_hit(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """Gives whether each map's largest value lies in one of the image's boxes.

    Args:
        maps: (B, 1, S, S), enlarged to the images' size.
        boxes: B tensors (k, 4), XYXY in pixels of S; an image without boxes is never hit.

    Returns:
        (B,) bool.
    """
    inside = boxes_to_masks(boxes, maps.shape[-1]).to(maps.device)
    return inside.flatten(1).gather(1, maps.flatten(1).argmax(dim=1, keepdim=True))[:, 0] > 0


def pointing_chance(boxes: list[Tensor], field: Tensor) -> Tensor:
    """Gives each image's chance that a place drawn uniformly from the lung field lies in one of its boxes.

    Args:
        boxes: B tensors (k, 4), XYXY in pixels of S.
        field: (S, S) bool.

    Returns:
        (B,) float in [0, 1].
    """
    inside = boxes_to_masks(boxes, field.shape[-1])[:, 0] > 0
    return (inside & field.to(inside.device)).sum(dim=(1, 2)) / field.sum()
