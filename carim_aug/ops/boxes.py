"""Masks C and the boxes they are drawn from (METHOD 2: C is 1 inside the box where the nodule goes, 0 elsewhere).

A box is XYXY in pixels of its image: x to the right, y down, `x2` and `y2` exclusive edges, 0 <= x1 < x2 <= width. The
pixel in row i and column j has its centre at (j + 0.5, i + 0.5). Sizes are one int (square) or (height, width).
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

MaskShape = Literal["box", "ellipse"]
Size = int | tuple[int, int]

EDGE_TOLERANCE = 1e-3
"""Pixels by which a box may pass the image's edge: what float32 scaling to another size leaves behind."""


def boxes_to_masks(boxes: Sequence[Tensor], size: Size, *, shape: MaskShape = "box") -> Tensor:
    """The masks of a batch of images: 1 where a pixel's centre lies in any of the image's boxes.

    A box so small that no pixel's centre lies in it sets the pixel that holds the box's centre, so no box is lost.

    Args:
        boxes: one (k_i, 4) tensor per image, XYXY in pixels; k_i may be 0 (a normal image: an empty mask).
        size: of the masks in pixels, int or (height, width).
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
        x, y = _offsets(box, height, width)
        x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
        if shape == "ellipse":
            masks |= x[:, None, :] ** 2 + y[:, :, None] ** 2 <= 1
        else:
            columns, rows = _centres(width, box), _centres(height, box)
            in_x, in_y = (columns >= x1) & (columns < x2), (rows >= y1) & (rows < y2)
            masks |= in_y[:, :, None] & in_x[:, None, :]
        masks |= _centre_pixel(box, height, width)
    return masks[:, None].float()


def feather(boxes: Sequence[Tensor], size: Size, *, margin: float = 0.05) -> Tensor:
    """How much of a graft comes in at each pixel: 1 inside the nodule, falling smoothly to exactly 0 around the box.

    With r the elliptical radius (1 on the ellipse inscribed in the box), the weight is 1 for r <= 1 - 2 margin, a
    raised cosine through 1/2 at r = 1, and 0 from r = 1 + 2 margin on, the ellipse inscribed in the box grown by
    `margin` of its width and height on each side; so nothing outside that grown box changes. With the default, on
    average 99.8 % of a graft's |difference| lie in the box itself (at 256 pixels; `tests/benchmarks/grafts.py`). Used
    by insertion="graft": x + feather * (G(z, C) - G(z, 0)).

    Args:
        boxes: one (k_i, 4) tensor per image, XYXY in pixels; k_i may be 0 (all weights 0).
        size: of the weights in pixels, int or (height, width).
        margin: half the width of the seam in fractions of the box's width and height, in [0, 0.5] (0: a hard edge).

    Returns:
        (n, 1, H, W) float32 in [0, 1], on the boxes' device; overlapping boxes take the larger weight.

    Raises:
        ValueError: a bad box (as in `boxes_to_masks`), or a margin outside [0, 0.5].
    """
    margin = _fraction("margin", margin)
    if margin > 0.5:
        raise ValueError(f"margin must be in [0, 0.5], got {margin}")
    height, width = as_size(size)
    packed = _pack(boxes, (height, width))
    weights = packed.new_zeros(len(packed), height, width)
    for box in packed.unbind(1):
        x, y = _offsets(box, height, width)
        radius = (x[:, None, :] ** 2 + y[:, :, None] ** 2).sqrt()
        if margin > 0:
            along = ((radius - 1 + 2 * margin) / (4 * margin)).clamp(0, 1)
            weight = torch.where(along < 1, 0.5 + 0.5 * torch.cos(math.pi * along), 0)
        else:
            weight = (radius <= 1).to(radius.dtype)
        weights = weights.maximum(weight).maximum(_centre_pixel(box, height, width).to(radius.dtype))
    return weights[:, None].clamp(0, 1)


def scale_boxes(boxes: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """The same boxes in the pixels of an image of another size.

    Args:
        boxes: (k, 4) XYXY in pixels of `from_size`.
        from_size: int or (height, width).
        to_size: int or (height, width).

    Returns:
        (k, 4) of the boxes' floating dtype (integers become float32).

    >>> scale_boxes(torch.tensor([[256.0, 128.0, 512.0, 384.0]]), 1024, 256).tolist()
    [[64.0, 32.0, 128.0, 96.0]]
    """
    _check_shape(boxes)
    (from_height, from_width), (to_height, to_width) = as_size(from_size, "from_size"), as_size(to_size, "to_size")
    x, y = to_width / from_width, to_height / from_height
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    return boxes * boxes.new_tensor([x, y, x, y])


def dilate_boxes(boxes: Tensor, fraction: float, size: Size) -> Tensor:
    """Boxes grown on each side by a fraction of their own width or height, clipped to the image.

    Args:
        boxes: (k, 4) XYXY in pixels.
        fraction: >= 0; 0.25 makes a box 1.5 times as wide and as high.
        size: of the image in pixels, int or (height, width).

    Returns:
        (k, 4) of the boxes' floating dtype.

    >>> dilate_boxes(torch.tensor([[2.0, 2.0, 6.0, 10.0]]), 0.5, 12).tolist()
    [[0.0, 0.0, 8.0, 12.0]]
    """
    fraction = _fraction("fraction", fraction)
    check_boxes(boxes, size)
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    grow = fraction * (boxes[:, 2:] - boxes[:, :2])
    return clip_boxes(torch.cat([boxes[:, :2] - grow, boxes[:, 2:] + grow], 1), size)


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Boxes cut at the image's edges; (k, 4) XYXY in pixels, `size` int or (height, width).

    >>> clip_boxes(torch.tensor([[-3.0, 2.0, 6.0, 10.0]]), (8, 4)).tolist()
    [[0.0, 2.0, 4.0, 8.0]]
    """
    _check_shape(boxes)
    height, width = as_size(size)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def check_boxes(boxes: Tensor, size: Size) -> None:
    """Nothing, where `boxes` are boxes of an image of this size; an error that names the first bad one otherwise.

    Args:
        boxes: (k, 4) XYXY in pixels; k may be 0.
        size: of the image in pixels, int or (height, width).

    Raises:
        TypeError: `boxes` is no tensor.
        ValueError: wrong shape, not finite, x1 >= x2 or y1 >= y2, or outside the image.
    """
    _check_shape(boxes)
    height, width = as_size(size)
    x1, y1, x2, y2 = boxes.unbind(1)
    _first_bad(boxes, boxes.isfinite().all(1), "finite")
    _first_bad(boxes, (x1 < x2) & (y1 < y2), "XYXY with x1 < x2 and y1 < y2")
    inside = (
        (torch.minimum(x1, y1) >= -EDGE_TOLERANCE) & (x2 <= width + EDGE_TOLERANCE) & (y2 <= height + EDGE_TOLERANCE)
    )
    _first_bad(boxes, inside, f"inside the image of height {height} and width {width}")


def check_masks(masks: Tensor, size: Size | None = None) -> None:
    """Nothing, where `masks` are (B, 1, H, W) in {0, 1}; an error that says what is wrong otherwise.

    Args:
        masks: the tensor to check, of any dtype.
        size: that the masks must have, int or (height, width); None for any.

    Raises:
        TypeError: `masks` is no tensor.
        ValueError: wrong rank, channels or size, NaN or infinity, or a value other than 0 and 1.
    """
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor (B, 1, H, W), got {type(masks).__name__}")
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"masks must be (B, 1, H, W), got {tuple(masks.shape)}")
    if size is not None and tuple(masks.shape[2:]) != as_size(size):
        height, width = as_size(size)
        raise ValueError(f"masks must be (B, 1, {height}, {width}), got {tuple(masks.shape)}")
    bad = (masks != 0) & (masks != 1)
    if bad.any():
        value = masks[bad][0].item()
        rule = "0 or 1 everywhere" if math.isfinite(value) else "finite"
        raise ValueError(f"masks must be {rule}, got {value} at {tuple(bad.nonzero()[0].tolist())}")


def as_size(size: Size, name: str = "size") -> tuple[int, int]:
    """`size` as (height, width); an error that names the argument where it is no size."""
    pair = (size, size) if isinstance(size, Integral) else size
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(_is_count(side) for side in pair):
        raise ValueError(f"{name} must be a positive int or (height, width), got {size!r}")
    return int(pair[0]), int(pair[1])


def _is_count(side: object) -> bool:
    return isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0


def _fraction(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return float(value)


def _check_shape(boxes: Tensor) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes must be a tensor (k, 4), got {type(boxes).__name__}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (k, 4), got {tuple(boxes.shape)}")


def _first_bad(boxes: Tensor, good: Tensor, rule: str) -> None:
    if not good.all():
        index = int((~good).nonzero()[0])
        raise ValueError(f"boxes must be {rule}, got {boxes[index].tolist()} at row {index}")


def _pack(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """All boxes as (n, max k, 4) float32, filled up with NaN, which lies in no box."""
    if isinstance(boxes, Tensor) and boxes.ndim != 3:
        raise ValueError(f"boxes must be one (k, 4) tensor per image, got one tensor {tuple(boxes.shape)}")
    for of_image in boxes:
        _check_shape(of_image)
    if len(boxes) == 0:
        return torch.zeros(0, 0, 4)
    check_boxes(torch.cat(list(boxes)), size)
    packed = boxes[0].new_full((len(boxes), max(len(b) for b in boxes), 4), math.nan, dtype=torch.float32)
    for row, of_image in zip(packed, boxes, strict=True):
        row[: len(of_image)] = of_image
    return packed


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _offsets(box: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel centres' distances from the box's centre in half widths (n, W) and half heights (n, H); inf for no box."""
    x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
    x = (2 * _centres(width, box) - x1 - x2) / (x2 - x1)
    y = (2 * _centres(height, box) - y1 - y2) / (y2 - y1)
    return x.nan_to_num(nan=math.inf), y.nan_to_num(nan=math.inf)


def _centre_pixel(box: Tensor, height: int, width: int) -> Tensor:
    """(n, H, W) bool: the one pixel that holds each box's centre (on an edge: the pixel above or to the left)."""
    x1, y1, x2, y2 = (edge[:, None] for edge in box.unbind(1))
    column = (((x1 + x2) / 2).ceil() - 1).clamp(0, width - 1)
    row = (((y1 + y2) / 2).ceil() - 1).clamp(0, height - 1)
    columns, rows = _centres(width, box) - 0.5, _centres(height, box) - 0.5
    return (rows == row)[:, :, None] & (columns == column)[:, None, :]
