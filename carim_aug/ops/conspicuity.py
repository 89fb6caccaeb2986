"""Conspicuity: how well a nodule can be seen where it is, as the signal-to-noise ratio of a filter that looks for it.

With t the zero-mean shape of a nodule in its window, and b its surroundings, a nodule of amplitude a has

    conspicuity = a ||t|| / std(<b, t / ||t||>)

where the standard deviation is over all shifts of t in b: its contrast over the complexity of its surround (Revesz,
Kundel and Graber 1974). Below about 2 nothing can be seen, 3 is subtle, 5 evident, 8 obvious.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from carim_aug.ops.regions import BOX, FRAME, cut_regions

_COARSE = 2  # pixels of the frame that are averaged: half the resolution tells the same, sixteen times as fast
_WINDOW = (BOX + 8) // _COARSE  # of the shape, a little wider than its box
_RADII = (0.35, 0.5, 0.7)  # of discs that look for a real nodule, in box sides


def unit_conspicuity(regions: Tensor, shapes: Tensor) -> Tensor:
    """Return the conspicuity of shapes as they are, (m,) float32; infinite in a flat region, NaN of a flat shape there.

    Args:
        regions: (m, 1, 128, 128) float, what the nodules come into; see `carim_aug.ops.regions`.
        shapes: (m, 1, 128, 128) float in the same units, what they add; 0 but in their boxes.
    """
    kernels = _centre(shapes)
    kernels = kernels - kernels.mean((2, 3), keepdim=True)
    responses = _correlate(F.avg_pool2d(regions.float(), _COARSE), kernels)
    return kernels.square().sum((1, 2, 3)) / responses.flatten(1).std(1)


def box_conspicuity(images: Sequence[Tensor] | Tensor, boxes: Tensor) -> Tensor:
    """Estimate the conspicuity of nodules that are there already, (m,) float32, as readers' boxes show them.

    The response of a disc at the box's middle, less the median of those outside the box, over their spread (1.48 times
    the median absolute deviation): the largest of three radii.

    Args:
        images: m of (1, H, W), of each box its image.
        boxes: (m, 4) XYXY in pixels.
    """
    coarse = F.avg_pool2d(cut_regions(images, boxes), _COARSE)
    axis = torch.arange(_WINDOW, device=coarse.device) - (_WINDOW - 1) / 2
    distance = (axis[:, None].square() + axis.square()).sqrt() / (BOX / _COARSE)
    best = torch.full((len(boxes),), -torch.inf, device=coarse.device)
    for radius in _RADII:
        disc = (distance <= radius).float()
        ring = ((distance > radius) & (distance <= radius * 1.4)).float()
        kernel = (disc / disc.sum() - ring / ring.sum().clamp(min=1)).expand(len(boxes), 1, -1, -1)
        responses = _correlate(coarse, kernel)
        middle, reach = responses.shape[-1] // 2, BOX // _COARSE // 2
        here = responses[:, middle - 2 : middle + 3, middle - 2 : middle + 3].flatten(1).amax(1)
        outside = torch.ones_like(responses[0], dtype=torch.bool)
        outside[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1] = False
        others = responses[:, outside]
        median = others.median(1, keepdim=True).values
        spread = 1.4826 * (others - median).abs().median(1).values
        best = best.maximum((here - median[:, 0]) / spread)
    return best


def _centre(shapes: Tensor) -> Tensor:
    """Return the window around the box, (m, 1, w, w), at the coarse resolution."""
    start = (FRAME // _COARSE - _WINDOW) // 2
    coarse = F.avg_pool2d(shapes.float(), _COARSE)
    return coarse[:, :, start : start + _WINDOW, start : start + _WINDOW]


def _correlate(regions: Tensor, kernels: Tensor) -> Tensor:
    """Return each kernel's responses at all shifts in its own region, (m, s, s)."""
    if not len(regions):
        return regions[:, 0]
    return F.conv2d(regions.transpose(0, 1), kernels.to(regions.dtype), groups=len(regions))[0]
