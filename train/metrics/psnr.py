"""Peak signal-to-noise ratio between unpaired sets of images, which Table 1 of Ann (2021) prints.

Its images belong together in no way, so it says little; it is here to stand beside the printed figures on one scale.
"""

import math

import torch
from torch import Tensor

# By how many dB the printed figures are too high: a peak of 255 for images in [0, 1] (docs/method.md, "Errata").
OFFSET_DB = 20 * math.log10(255)
_BLOCK = 128  # images that are float64 at a time, of each set
_ROUNDING = 1e-13  # of peak^2: a mean square below it is that of two equal images


def psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Return 10 log10(peak^2 / mean square difference) of a (N, C, H, W) with b (M, C, H, W): (N, M) float64 in dB.

    Pixels are in [0, peak]; 1 is the honest peak for images in [0, 1]. It is inf where two images are equal.
    Its mean over all pairs is what drawing a random real image for each synthetic one estimates. No difference image is
    ever held: |x|^2 + |y|^2 - 2 x . y stands for |x - y|^2, block by block.
    """
    if not peak > 0:
        raise ValueError(f"peak must be above 0, got {peak}")
    if a.ndim != 4 or b.ndim != 4 or a.shape[1:] != b.shape[1:] or not a.numel() or not b.numel():
        raise ValueError(f"a and b must be (N, C, H, W) and (M, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, images in (("a", a), ("b", b)):
        if not (images.min() >= 0 and images.max() <= peak):  # NaN fails too
            raise ValueError(f"{name} must be in [0, {peak:g}], got {images.min():g} to {images.max():g}")

    def rows(part: Tensor) -> Tensor:  # in units of the peak about its half: small numbers, small rounding
        return part.double().flatten(1) / peak - 0.5

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T) / x.shape[1]

    lines = [torch.cat([error(rows(x), rows(y)) for y in b.split(_BLOCK)], dim=1) for x in a.split(_BLOCK)]
    errors = torch.cat(lines)
    return -10 * torch.where(errors < _ROUNDING, torch.zeros_like(errors), errors).log10()
