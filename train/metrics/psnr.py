"""Peak signal-to-noise ratio between unpaired sets of images (METHOD 8, 9; Table 1).

The source prints it between synthetic and real images that belong together in no way, so it says little; it is here to
stand beside the source's figures on one scale.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SOURCE_OFFSET_DB = 20 * math.log10(255)
"""By how many dB the source's figures are too high: a peak of 255 for images in [0, 1] (METHOD 9, 5)."""

_BLOCK = 128  # images that are float64 at a time, of each set
_ROUNDING = 1e-13  # of peak^2: a mean square below it is that of two equal images


def psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Gives 10 log10(peak^2 / mean square difference) of every image of one set with every one of another.

    |x|^2 + |y|^2 - 2 x . y stands for |x - y|^2, block by block, so no difference image is ever held.

    Args:
        a: (N, C, H, W) float, [0, peak].
        b: (M, C, H, W) float, [0, peak]; M need not be N.
        peak: largest value that a pixel can have.

    Returns:
        (N, M) float64 in dB; inf where two images are equal.

    Raises:
        ValueError: shapes, values or peak that do not fit.
    """
    _check(a, b, peak)
    rows = []
    for x in _blocks(a, peak):
        columns = []
        for y in _blocks(b, peak):
            square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            columns.append(square / x.shape[1])
        rows.append(torch.cat(columns, dim=1))
    error = torch.cat(rows)
    error = torch.where(error < _ROUNDING, torch.zeros_like(error), error)
    return -10 * error.log10()


def mean_psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Gives the mean of `psnr` over all pairs: what drawing a random real image for each synthetic one estimates.

    Args:
        a: (N, C, H, W) float, [0, peak].
        b: (M, C, H, W) float, [0, peak].
        peak: largest value that a pixel can have; 1 is the honest scale for images in [0, 1], to which
            `SOURCE_OFFSET_DB` is to be added to stand beside the source's figure.

    Returns:
        Scalar float64 in dB; inf where an image stands in both sets.

    Raises:
        ValueError: as in `psnr`.
    """
    return psnr(a, b, peak=peak).mean()


def _check(a: Tensor, b: Tensor, peak: float) -> None:
    if not peak > 0:
        raise ValueError(f"peak must be above 0, got {peak}")
    if a.ndim != 4 or b.ndim != 4 or a.shape[1:] != b.shape[1:] or not a.numel() or not b.numel():
        raise ValueError(f"a and b must be (N, C, H, W) and (M, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, images in (("a", a), ("b", b)):
        if not (images.min() >= 0 and images.max() <= peak):  # NaN fails too
            raise ValueError(f"{name} must be in [0, {peak:g}], got {images.min():g} to {images.max():g}")


def _blocks(images: Tensor, peak: float) -> Iterator[Tensor]:
    """Yields blocks (n, C * H * W), in units of the peak about its half: small numbers, small rounding."""
    for part in images.split(_BLOCK):
        yield part.double().flatten(1) / peak - 0.5
