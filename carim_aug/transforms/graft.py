"""The graft: image = background + strength x feather x residual, in the user's own values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carim_aug.ops.boxes import feather
from carim_aug.ops.images import resize, ring_contrast
from carim_aug.ops.value_range import ValueRange


def graft(
    images: Tensor, residuals: Tensor, boxes: Sequence[Tensor], strengths: Sequence[float], value_range: ValueRange
) -> Tensor:
    """Return images with nodules in them, equal to what they were wherever the feathered boxes are 0.

    Args:
        images: (n, C, H, W) in `value_range`. Never changed.
        residuals: (m, 1, S, S) float, [-2, 2]: of each box in turn, m in all.
        boxes: n of (k, 4), k >= 1, XYXY in pixels of the images.
        strengths: n.
        value_range: of the images; the result is clamped to it where it changed.

    Returns:
        (n, C, H, W) of the images' dtype.
    """
    added, weights = _added(residuals, boxes, strengths, (images.shape[-2], images.shape[-1]))
    added = value_range.scale_difference(added.to(images.device), channels=images.shape[1], dtype=images.dtype)
    low, high = value_range.bounds(images.shape[1], like=images)
    changed = torch.minimum(torch.maximum(images.to(added.dtype) + added, low), high)
    if not images.dtype.is_floating_point:
        changed = changed.round()
    return torch.where(weights.to(images.device) > 0, changed.to(images.dtype), images)


def contrasts(residuals: Tensor, boxes: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Return how much a graft brightens its nodules: ellipse minus ring of what is added, mean over an image's boxes.

    Args:
        residuals: (m, 1, S, S) float, [-2, 2]: of each box in turn.
        boxes: n of (k, 4), k >= 1, XYXY in pixels of S.
        strengths: n.

    Returns:
        (n,) float32 on the CPU, in units of the [-1, 1] image, at the residuals' size.
    """
    counts = [len(own) for own in boxes]
    each = torch.cat(list(boxes))
    factors = torch.tensor(strengths).repeat_interleave(torch.tensor(counts))
    added = residuals.cpu() * feather(list(each[:, None]), residuals.shape[-1]) * factors[:, None, None, None]
    return torch.stack([part.mean() for part in ring_contrast(added, each).contrast.split(counts)])


def _added(
    residuals: Tensor, boxes: Sequence[Tensor], strengths: Sequence[float], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return what is added, in units of the [-1, 1] image, and the feather's weights, (n, 1, H, W) each."""
    counts = [len(own) for own in boxes]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    factors = torch.tensor(strengths, dtype=torch.float32, device=residuals.device)[:, None, None, None]
    added = residuals.new_zeros(len(boxes), 1, *size)
    weights = torch.zeros_like(added)
    for number in range(max(counts)):
        rows = [i for i, count in enumerate(counts) if count > number]
        weight = feather([boxes[i][number : number + 1] for i in rows], size).to(residuals.device)
        own = residuals[[starts[i] + number for i in rows]]
        added[rows] += weight * factors[rows] * resize(own, size)
        weights[rows] = weights[rows].maximum(weight)
    return added, weights
