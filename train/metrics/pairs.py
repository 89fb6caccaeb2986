"""What a mask changes: measures of same-noise pairs, and the same contrast on real boxes (METHOD 8, Fig. 6; EVIDENCE).

All take boxes as one (B, 4) tensor, XYXY in pixels: one nodule an image.
"""

import math

import torch
from torch import Tensor

from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes


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


def half_width(differences: Tensor, boxes: Tensor, *, grow: float = 0.25) -> Tensor:
    """Gives how much of its box a nodule fills: its diameter at half its height, over the box's side.

    The diameter is that of a disc with as many pixels as reach half of the largest difference; the side is
    sqrt(width x height). A uniform disc that touches the box gives 1, a Gaussian of sigma = side / 6 gives 0.39.

    Args:
        differences: (B, 1, S, S); only what lies in the box grown by a part of its size on every side counts.
        boxes: (B, 4).
        grow: part of the box's width and height added on each side.

    Returns:
        (B,) > 0; NaN where nothing brightens.
    """
    size = differences.shape[-1]
    masks = boxes_to_masks(list(dilate_boxes(boxes, grow, size)[:, None]), size).to(differences.device)
    inside = differences * masks
    peak = inside.amax(dim=(1, 2, 3), keepdim=True)
    area = (inside >= peak / 2).sum(dim=(1, 2, 3))
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt().to(differences.device)
    width = 2 * (area / math.pi).sqrt() / side
    return torch.where(peak[:, 0, 0, 0] > 0, width, torch.full_like(width, torch.nan))


def equivariance(differences: Tensor, moved: Tensor, shifts: Tensor) -> Tensor:
    """Gives how well the difference moves with its mask: Pearson's correlation of the moved one with the shifted one.

    Args:
        differences: (B, 1, S, S), of a mask.
        moved: (B, 1, S, S), of the same noise with the mask moved by `shifts`.
        shifts: (B, 2) int64, pixels to the right and down, |shift| < S.

    Returns:
        (B,) in [-1, 1], over the pixels that the shift leaves in the image; NaN where one of the two is constant.

    Raises:
        ValueError: shapes or shifts that do not fit.
    """
    size = differences.shape[-1]
    if moved.shape != differences.shape or tuple(shifts.shape) != (len(differences), 2):
        raise ValueError(
            f"moved and shifts must fit differences {tuple(differences.shape)}, "
            f"got {tuple(moved.shape)} and {tuple(shifts.shape)}"
        )
    if bool((shifts.abs() >= size).any()):
        raise ValueError(f"shifts must be less than the image's side {size}, got {int(shifts.abs().max())}")
    values = []
    for before, after, (dx, dy) in zip(differences[:, 0], moved[:, 0], shifts.tolist(), strict=True):
        a = before[max(0, -dy) : size - max(0, dy), max(0, -dx) : size - max(0, dx)].flatten().double()
        b = after[max(0, dy) : size - max(0, -dy), max(0, dx) : size - max(0, -dx)].flatten().double()
        a, b = a - a.mean(), b - b.mean()
        values.append((a @ b) / (a.norm() * b.norm()))
    return torch.stack(values) if values else differences.new_empty(0, dtype=torch.float64)
