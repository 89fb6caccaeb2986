"""What a mask changes: measures of the difference between images of the same noise with and without it.

All take differences (B, 1, S, S), image with mask minus image without, and boxes (B, 4), XYXY in pixels: one nodule an
image.
"""

import math

import torch
from torch import Tensor

from carim_aug.ops.boxes import MaskShape, boxes_to_masks, dilate_boxes
from train.metrics.patches import pointing_hit

_OVER = (1, 2, 3)


def energy_inside(differences: Tensor, boxes: Tensor, *, grow: float = 0.25) -> Tensor:
    """Return the share (B,) of |difference| inside the box dilated by `grow` on every side; 0 where there is none."""
    size = differences.abs()
    inside = (size * _masks(differences, boxes, grow=grow)).sum(_OVER)
    return inside / size.sum(_OVER).clamp(min=1e-12)


def argmax_hit(differences: Tensor, boxes: Tensor) -> Tensor:
    """Return whether the pixel that brightens most lies inside the box, (B,) bool."""
    return pointing_hit(differences, list(boxes[:, None]))


def roundness(differences: Tensor, boxes: Tensor) -> Tensor:
    """Return how much of the box's corners the difference leaves dark: 1 for an ellipse, 0 for a full square.

    One minus the mean difference between the box and its ellipse over the mean inside the ellipse, cut to [0, 1]: (B,),
    NaN where the box has no corner pixel (less than some 5 pixels wide) or nothing is brighter inside.
    """
    ellipse = _masks(differences, boxes, shape="ellipse")
    corner = _masks(differences, boxes) * (1 - ellipse)
    count = corner.sum(_OVER)
    middle = (differences * ellipse).sum(_OVER) / ellipse.sum(_OVER).clamp(min=1)
    edge = (differences * corner).sum(_OVER) / count.clamp(min=1)
    ratio = (1 - edge / middle).clamp(0, 1)
    return torch.where((count > 0) & (middle > 0), ratio, torch.full_like(ratio, torch.nan))


def half_width(differences: Tensor, boxes: Tensor, *, grow: float = 0.25) -> Tensor:
    """Return how much of its box a nodule fills: its diameter at half its height, over the box's side.

    The diameter is that of a disc with as many pixels as reach half of the largest difference; the side is
    sqrt(width x height). A uniform disc that touches the box gives 1, a Gaussian of sigma = side / 6 gives 0.39. Only
    what lies in the box dilated by a part of its size on every side counts: (B,) > 0, NaN where nothing brightens.
    """
    inside = differences * _masks(differences, boxes, grow=grow)
    peak = inside.amax(_OVER, keepdim=True)
    area = (inside >= peak / 2).sum(_OVER)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt().to(differences.device)
    width = 2 * (area / math.pi).sqrt() / side
    return torch.where(peak[:, 0, 0, 0] > 0, width, torch.full_like(width, torch.nan))


def equivariance(differences: Tensor, moved: Tensor, shifts: Tensor) -> Tensor:
    """Return how well the difference moves with its mask: Pearson's correlation of the moved one with the shifted one.

    `moved` is of the same noise with the mask moved by `shifts`, (B, 2) int64, pixels to the right and down, less than
    S: (B,) float64 in [-1, 1], over the pixels that the shift leaves in the image; NaN where one is constant.
    """
    size = differences.shape[-1]
    if moved.shape != differences.shape or tuple(shifts.shape) != (len(differences), 2):
        raise ValueError(
            f"moved and shifts must fit differences {tuple(differences.shape)}, "
            f"got {tuple(moved.shape)} and {tuple(shifts.shape)}"
        )
    if bool((shifts.abs() >= size).any()):
        raise ValueError(f"shifts must be less than the image's side {size}, got {int(shifts.abs().max())}")
    values = differences.new_empty(len(shifts), dtype=torch.float64)
    for i, (dx, dy) in enumerate(shifts.tolist()):
        a = differences[i, 0, max(0, -dy) : size - max(0, dy), max(0, -dx) : size - max(0, dx)]
        b = moved[i, 0, max(0, dy) : size - max(0, -dy), max(0, dx) : size - max(0, -dx)]
        a, b = (part.flatten().double() - part.double().mean() for part in (a, b))
        values[i] = (a @ b) / (a.norm() * b.norm())
    return values


def _masks(differences: Tensor, boxes: Tensor, *, grow: float = 0.0, shape: MaskShape = "box") -> Tensor:
    size = differences.shape[-1]
    boxes = dilate_boxes(boxes, grow, size) if grow else boxes
    return boxes_to_masks(list(boxes[:, None]), size, shape=shape).to(differences.device)
