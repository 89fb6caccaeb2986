"""The lung field: where in a chest X-ray lung can be, a 64 x 64 map in image coordinates (support of METHOD 5's prior).

No segmentation is needed: in one image the lungs are the dark basins that brighter tissue encloses, whereas the dark
air around the body reaches the image's edge. Over many images, the field is where lung lies often enough.
Image left is the patient's right; nothing is mirrored.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FIELD_SIZE = 64


def lung_field(images: Tensor, *, share: float = 0.1, depth: float = 0.1) -> Tensor:
    """Where lung lies in at least `share` of the images: the two largest connected regions of `lung_frequency`.

    Args:
        images: (B, 1, H, W) float or uint8 frontal chest X-rays, air dark, any value range; best without findings.
        share: of the images, in (0, 1).
        depth: see `lung_frequency`.

    Returns:
        (64, 64) bool.

    Raises:
        ValueError: wrong shape, a share outside (0, 1), or no lung found.
        ImportError: scipy is not there.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    ndimage = _ndimage()
    labels, count = ndimage.label((lung_frequency(images, depth=depth) >= share).numpy())
    if count == 0:
        raise ValueError(
            f"images must show lungs darker than the tissue around them, none found in {len(images)} images"
        )
    largest = np.argsort(np.bincount(labels.ravel())[1:])[::-1][:2] + 1
    closed = ndimage.binary_closing(np.pad(np.isin(labels, largest), 2))[2:-2, 2:-2]
    return torch.from_numpy(ndimage.binary_fill_holes(closed))


def lung_frequency(images: Tensor, *, depth: float = 0.1) -> Tensor:
    """The share of images in which each place is lung, (64, 64) float32 in [0, 1].

    Args:
        images: (B, 1, H, W) float or uint8, air dark, any value range.
        depth: how far below the lowest rim around it a place must be, in standard deviations of its image.

    Raises:
        ValueError: wrong shape.
    """
    if images.ndim != 4 or images.shape[1] != 1 or 0 in images.shape:
        raise ValueError(f"images must be (B, 1, H, W), got {tuple(images.shape)}")
    small = torch.cat([F.interpolate(part.float(), (FIELD_SIZE, FIELD_SIZE), mode="area") for part in images.split(64)])
    small = small - small.mean((1, 2, 3), keepdim=True)
    small = small / small.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    small = F.avg_pool2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (_filled(small) - small > depth).float().mean((0, 1)).cpu()


def grow_field(field: Tensor, centres: np.ndarray, weights: np.ndarray, *, coverage: float = 0.975) -> Tensor:
    """The field, grown where real boxes lie densest outside it, until it holds the given share of their centres.

    Lung behind the heart and below the dome of the diaphragm is not dark, yet nodules lie there: cells are added in
    falling order of the boxes' Gaussian-smoothed density (2.5 cells).

    Args:
        field: (64, 64) bool.
        centres: (n, 2) of the boxes, x and y in [0, 1].
        weights: (n,) of the boxes.
        coverage: share of the centres to be held, in (0, 1].

    Returns:
        (64, 64) bool.

    Raises:
        ImportError: scipy is not there.
    """
    ndimage = _ndimage()
    columns, rows = np.minimum((np.asarray(centres) * FIELD_SIZE).astype(int), FIELD_SIZE - 1).T
    density = np.zeros((FIELD_SIZE, FIELD_SIZE))
    np.add.at(density, (rows, columns), weights)
    density = ndimage.gaussian_filter(density, 2.5)
    grown = field.numpy().copy()
    for level in np.unique(density[rows, columns])[::-1]:
        if grown[rows, columns].mean() >= coverage:
            break
        grown |= density >= level
    closed = ndimage.binary_closing(np.pad(grown, 2), iterations=2)[2:-2, 2:-2]
    return torch.from_numpy(ndimage.binary_fill_holes(closed | grown))


def _filled(images: Tensor) -> Tensor:
    """Images with every dark basin filled up to its rim (grey-scale reconstruction by erosion from the edge)."""
    level = images.amax((2, 3), keepdim=True).expand_as(images).clone()
    for edge in (level[..., 0, :], level[..., -1, :], level[..., :, 0], level[..., :, -1]):
        edge.fill_(-torch.inf)
    level = torch.maximum(level, images)
    while True:
        lower = torch.maximum(images, -F.max_pool2d(-level, 3, 1, 1))
        if torch.equal(lower, level):
            return level
        level = lower


def _ndimage():  # type: ignore[no-untyped-def]
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("finding lungs needs scipy: pip install 'carim-aug[eval]'") from error
    return ndimage
