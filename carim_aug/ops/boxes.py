"""Boxes, and the masks that are drawn from them: 1 inside the box where a nodule goes, 0 elsewhere (C in Ann (2021)).

A box is XYXY in pixels of its image: x to the right, y down, `x2` and `y2` exclusive edges, 0 <= x1 < x2 <= width. The
pixel in row i and column j has its centre at (j + 0.5, i + 0.5). Sizes are one int (square) or (height, width).
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MaskShape = Literal["box", "ellipse"]
Size = int | tuple[int, int]

EDGE_TOLERANCE = 1e-3  # pixels by which a box may pass the image's edge: what float32 scaling leaves behind


def boxes_to_masks(boxes: Sequence[Tensor], size: Size, *, shape: MaskShape = "box") -> Tensor:
    """Return a batch's masks: 1 where a pixel's centre lies in any of the image's boxes.

    A box so small that no pixel's centre lies in it sets the pixel that holds the box's centre, so no box is lost.

    Args:
        boxes: one (k_i, 4) tensor per image; k_i may be 0 (a normal image: an empty mask).
        size: of the masks in pixels.
        shape: "box" for the whole box, "ellipse" for the ellipse inscribed in it (a nodule is round).

    Returns:
        (n, 1, H, W) float32 in {0, 1}, on the boxes' device.

    Raises:
        ValueError: a box is not (k, 4), not finite, turned around or outside the image; or an unknown shape.

    >>> boxes_to_masks([torch.tensor([[1.0, 0.0, 3.0, 2.0]])], (3, 4))[0, 0].int().tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    if shape not in ("box", "ellipse"):
        raise ValueError(f'shape must be "box" or "ellipse", got {shape!r}')
    height, width = as_size(size)
    packed = _pack(boxes, (height, width))
    masks = packed.new_zeros(len(packed), height, width, dtype=torch.bool)
    for box in packed.unbind(1):
        if shape == "ellipse":
            masks |= _square_radius(box, height, width) <= 1
        else:
            x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
            x, y = _centres(width, box), _centres(height, box)
            masks |= ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
        masks |= _centre_pixel(box, height, width)
    return masks[:, None].float()


def feather(boxes: Sequence[Tensor], size: Size, *, margin: float = 0.05) -> Tensor:
    """Return how much of a graft comes in at each pixel: 1 inside the nodule, falling smoothly to 0 around the box.

    With r the elliptical radius (1 on the ellipse inscribed in the box), the weight is 1 for r <= 1 - 2 margin, a
    raised cosine through 1/2 at r = 1, and 0 from r = 1 + 2 margin on, the ellipse inscribed in the box dilated by
    `margin` of its width and height on each side; so nothing outside that dilated box changes. With the default, on
    average 99.8 % of a graft's |difference| lie in the box itself (at 256 pixels; `tests/benchmarks/grafts.py`).

    Args:
        boxes: as in `boxes_to_masks`; overlapping ones take the larger weight.
        size: of the weights in pixels.
        margin: half the width of the seam in fractions of the box's width and height, in [0, 0.5] (0: a hard edge).

    Returns:
        (n, 1, H, W) float32 in [0, 1], on the boxes' device.
    """
    if not 0 <= margin <= 0.5:
        raise ValueError(f"margin must be in [0, 0.5], got {margin}")
    height, width = as_size(size)
    packed = _pack(boxes, (height, width))
    weights = packed.new_zeros(len(packed), height, width)
    for box in packed.unbind(1):
        radius = _square_radius(box, height, width).sqrt()
        if margin > 0:
            along = ((radius - 1 + 2 * margin) / (4 * margin)).clamp(0, 1)
            weight = torch.where(along < 1, 0.5 + 0.5 * torch.cos(math.pi * along), 0)
        else:
            weight = (radius <= 1).to(radius.dtype)
        weights = weights.maximum(weight).maximum(_centre_pixel(box, height, width).to(radius.dtype))
    return weights[:, None].clamp(0, 1)


def dilate_boxes(boxes: Tensor, fraction: float, size: Size) -> Tensor:
    """Enlarge boxes (k, 4) on each side by a fraction (>= 0) of their width or height, and clip them to the image."""
    if not 0 <= fraction < math.inf:
        raise ValueError(f"fraction must be a finite number >= 0, got {fraction}")
    check_boxes(boxes, size)
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    margin = fraction * (boxes[:, 2:] - boxes[:, :2])
    return clip_boxes(torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1), size)


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Clip boxes (k, 4) to an image of this size."""
    _check_shape(boxes)
    height, width = as_size(size)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def check_boxes(boxes: Tensor, size: Size) -> None:
    """Raise ValueError, or TypeError for no tensor, that names the first of boxes (k, 4) that is none in such an image.

    A box must be finite, have x1 < x2 and y1 < y2, and lie in the image.
    """
    _check_shape(boxes)
    height, width = as_size(size)
    x1, y1, x2, y2 = boxes.unbind(1)
    inside = (torch.minimum(x1, y1) >= -EDGE_TOLERANCE) & (x2 <= width + EDGE_TOLERANCE)
    rules = {
        "finite": boxes.isfinite().all(1),
        "XYXY with x1 < x2 and y1 < y2": (x1 < x2) & (y1 < y2),
        f"inside the image of height {height} and width {width}": inside & (y2 <= height + EDGE_TOLERANCE),
    }
    for rule, good in rules.items():
        if not good.all():
            row = int((~good).nonzero()[0])
            raise ValueError(f"boxes must be {rule}, got {boxes[row].tolist()} at row {row}")


def check_masks(masks: Tensor, size: Size | None = None) -> None:
    """Raise ValueError, or TypeError for no tensor, where masks are not (B, 1, H, W) in {0, 1}, or of another size."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor (B, 1, H, W), got {type(masks).__name__}")
    height, width = ("H", "W") if size is None else as_size(size)
    if masks.ndim != 4 or masks.shape[1] != 1 or (size is not None and tuple(masks.shape[2:]) != (height, width)):
        raise ValueError(f"masks must be (B, 1, {height}, {width}), got {tuple(masks.shape)}")
    bad = (masks != 0) & (masks != 1)
    if bad.any():
        value = masks[bad][0].item()
        rule = "0 or 1 everywhere" if math.isfinite(value) else "finite"
        raise ValueError(f"masks must be {rule}, got {value} at {tuple(bad.nonzero()[0].tolist())}")


def as_size(size: Size, name: str = "size") -> tuple[int, int]:
    """Return a size as (height, width), or raise a ValueError that names the argument."""
    pair = (size, size) if isinstance(size, Integral) else size
    if isinstance(pair, Sequence) and len(pair) == 2:
        if all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in pair):
            return int(pair[0]), int(pair[1])
    raise ValueError(f"{name} must be a positive int or (height, width), got {size!r}")


def _check_shape(boxes: Tensor) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes must be a tensor (k, 4), got {type(boxes).__name__}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (k, 4), got {tuple(boxes.shape)}")


def _pack(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return all boxes as (n, max k, 4) float32, padded with NaN, in which no pixel lies."""
    if isinstance(boxes, Tensor) and boxes.ndim != 3:
        raise ValueError(f"boxes must be one (k, 4) tensor per image, got one tensor {tuple(boxes.shape)}")
    for of_image in boxes:
        _check_shape(of_image)
    if len(boxes) == 0:
        return torch.zeros(0, 0, 4)
    check_boxes(torch.cat(list(boxes)), size)
    return pad_sequence([of_image.float() for of_image in boxes], batch_first=True, padding_value=math.nan)


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _square_radius(box: Tensor, height: int, width: int) -> Tensor:
    """Return r squared of pixel centres, (n, H, W): r is 1 on the ellipse inscribed in the box, inf for no box."""
    x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
    x = ((2 * _centres(width, box) - x1 - x2) / (x2 - x1)).nan_to_num(nan=math.inf)
    y = ((2 * _centres(height, box) - y1 - y2) / (y2 - y1)).nan_to_num(nan=math.inf)
    return x[:, None, :] ** 2 + y[:, :, None] ** 2


def _centre_pixel(box: Tensor, height: int, width: int) -> Tensor:
    """Return (n, H, W) bool: the pixel that holds each box's centre (on an edge: the one above or to the left)."""
    x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
    column = (((x1 + x2) / 2).ceil() - 1).clamp(0, width - 1)
    row = (((y1 + y2) / 2).ceil() - 1).clamp(0, height - 1)
    columns, rows = _centres(width, box) - 0.5, _centres(height, box) - 0.5
    return (rows == row)[:, :, None] & (columns == column)[:, None, :]
