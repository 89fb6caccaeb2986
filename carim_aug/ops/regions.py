"""The frame of a nodule: its surroundings, four boxes wide, at 128 pixels whatever the image's size, and the way back.

In the frame the longer side of the box is 32 pixels and its middle is the frame's. What lies outside the image repeats
its edge.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from carim_aug.ops.boxes import feather

FRAME = 128
"""Height and width of a region."""

BOX = 32
"""Longer side of the box in it."""


def cut_regions(images: Sequence[Tensor] | Tensor, boxes: Tensor) -> Tensor:
    """Return the region of each box, (m, 1, 128, 128) float32, averaged where the image is finer.

    On the CPU one by one: none depends on the others, not by a rounding.

    Args:
        images: m of (1, H, W), of any sizes: of each box its image.
        boxes: (m, 4) XYXY in pixels of the images, of some width and height.
    """
    if not len(boxes):
        return torch.zeros(0, 1, FRAME, FRAME)
    if images[0].device.type == "cpu":
        return torch.cat([_cut([image], box[None]) for image, box in zip(images, boxes, strict=True)])
    return _cut(images, boxes)


def _cut(images: Sequence[Tensor] | Tensor, boxes: Tensor) -> Tensor:
    """Return regions in one call, all sampled as finely as the largest needs."""
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1) * (FRAME / BOX)
    window = math.ceil(float(sides.max())) + 2
    # A window of each image holds its region: one call of grid_sample does not copy whole images.
    starts, windows = [], []
    for image, (x, y) in zip(images, centres.tolist(), strict=True):
        image = image.float()
        below, right = max(window - image.shape[-2], 0), max(window - image.shape[-1], 0)
        image = F.pad(image[None], (0, right, 0, below), mode="replicate")[0] if below or right else image
        top = min(max(math.floor(y - window / 2), 0), image.shape[-2] - window)
        left = min(max(math.floor(x - window / 2), 0), image.shape[-1] - window)
        windows.append(image[:, top : top + window, left : left + window])
        starts.append((left, top))
    finer = max(1, math.ceil(float(sides.max()) / FRAME))
    steps = (torch.arange(FRAME * finer) + 0.5) / (FRAME * finer) - 0.5
    inside = centres.cpu() - torch.tensor(starts)
    x = (inside[:, :1] + sides.cpu()[:, None] * steps) * 2 / window - 1
    y = (inside[:, 1:] + sides.cpu()[:, None] * steps) * 2 / window - 1
    n = len(steps)
    grid = torch.stack([x[:, None].expand(-1, n, -1), y[:, :, None].expand(-1, -1, n)], dim=-1)
    stacked = torch.stack(windows)
    sampled = F.grid_sample(stacked, grid.to(stacked.device), padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, finer) if finer > 1 else sampled


def boxes_in_frame(boxes: Tensor) -> Tensor:
    """Return where boxes (m, 4) of any images lie in their regions, XYXY in pixels of the frame."""
    sides = boxes[:, 2:] - boxes[:, :2]
    half = sides / sides.amax(1, keepdim=True) * BOX / 2
    return torch.cat([FRAME / 2 - half, FRAME / 2 + half], dim=1)


def paste_back(residual: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[slice, slice]]:
    """Return what a residual adds to its image, feathered, the feather, and the pixels that they are of.

    Args:
        residual: (128, 128) float32 in the frame.
        box: (4,) XYXY in pixels of the image.
        size: height and width of the image.

    Returns:
        (h, w) float32 each, and the rows and columns of the image; all of the feather's support is inside.
    """
    x1, y1, x2, y2 = box.tolist()
    margin_x, margin_y = 0.06 * (x2 - x1), 0.06 * (y2 - y1)  # the feather reaches 0.05 beyond the box
    left, right = max(math.floor(x1 - margin_x), 0), min(math.ceil(x2 + margin_x), size[1])
    top, bottom = max(math.floor(y1 - margin_y), 0), min(math.ceil(y2 + margin_y), size[0])
    side = max(x2 - x1, y2 - y1) * FRAME / BOX
    finer = max(1, math.ceil(FRAME / side))  # samples a pixel and axis where the frame is finer
    steps_x = left + (torch.arange((right - left) * finer) + 0.5) / finer
    steps_y = top + (torch.arange((bottom - top) * finer) + 0.5) / finer
    x, y = (steps_x - (x1 + x2) / 2) * 2 / side, (steps_y - (y1 + y2) / 2) * 2 / side
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)[None].to(residual.device)
    sampled = F.grid_sample(residual[None, None], grid, padding_mode="zeros", align_corners=False)
    added = F.avg_pool2d(sampled, finer)[0, 0] if finer > 1 else sampled[0, 0]
    shift = torch.tensor([left, top, left, top])
    weight = feather([box.cpu()[None] - shift], (bottom - top, right - left))[0, 0].to(residual.device)
    return added * weight, weight, (slice(top, bottom), slice(left, right))
