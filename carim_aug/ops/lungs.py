"""Lungs in chest X-rays, as 64 x 64 maps in image coordinates: of many images (the prior's support), or of one.

No trained segmentation is needed: in one image the lungs are the dark basins that brighter tissue encloses, whereas the
dark air around the body reaches the image's edge. Over many images, the field is where lung lies often enough.
Image left is the patient's right; nothing is mirrored.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FIELD_SIZE = 64
_DEPTH = 0.1  # of lung below the lowest rim around it, in standard deviations of its image
_LEVELS, _REACH = 10, 2  # of the flood in `lung_masks`: grey levels, and cells it spreads at each
_GAS = 0.6  # a basin that lies wholly below this part of the height is gas in the bowel


def lung_field(images: Tensor, *, share: float = 0.1) -> Tensor:
    """Return where lung lies in at least a share of the images: the two largest connected regions, (64, 64) bool.

    The images are (B, 1, H, W) as in `lung_masks`, best without findings; ValueError if none shows a lung. Needs scipy.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    ndimage = _ndimage()
    labels, count = ndimage.label((lung_frequency(images) >= share).numpy())
    if count == 0:
        rule = "images must show lungs darker than the tissue around them"
        raise ValueError(f"{rule}, none found in {len(images)} images")
    largest = np.argsort(np.bincount(labels.ravel())[1:])[::-1][:2] + 1
    closed = ndimage.binary_closing(np.pad(np.isin(labels, largest), 2))[2:-2, 2:-2]
    return torch.from_numpy(ndimage.binary_fill_holes(closed))


def lung_frequency(images: Tensor) -> Tensor:
    """Return the share of images (B, 1, H, W) in which each place is lung, (64, 64) float32 in [0, 1]."""
    return _dark(_small(images)).float().mean((0, 1)).cpu()


def lung_masks(images: Tensor, field: Tensor | None = None) -> Tensor:
    """Return each image's own lungs, (B, 64, 64) bool; nothing where none is found (a white lung).

    Seeds are the dark basins that lie mostly in the field. From them and from outside the field two floods rise
    together through the grey levels, up to halfway between lung and the tissue around it; where they meet is the
    lung's border, so that a lung which is open to the neck or the armpit does not leak. Then holes are filled.

    Images are (B, 1, H, W) float or uint8 frontal chest X-rays, air dark, of any value range. The field is where lung
    can be, (64, 64) bool, as `LocationPrior.field`; None: anywhere but at the image's edge.
    """
    small = _small(images)
    inside = torch.zeros(FIELD_SIZE, FIELD_SIZE, dtype=torch.bool, device=small.device)
    inside[1:-1, 1:-1] = True
    if field is not None:
        if field.shape != inside.shape or field.dtype != torch.bool:
            raise ValueError(f"field must be (64, 64) bool, got {tuple(field.shape)} {field.dtype}")
        inside &= field.to(small.device)
    near = _dilate(inside[None, None])
    seeds = _basins(_dark(small) & near, inside)

    # Halfway between the seeds and what is brighter around them.
    lung = _mean(small, seeds)
    tissue = _mean(small, near & ~_dilate(seeds, 2) & (small > lung))
    darkest, top = small.amin((2, 3), keepdim=True), (lung + tissue) / 2
    lungs, outside = seeds, ~near & ~seeds
    for level in range(1, _LEVELS + 1):
        open_ = small < darkest + (top - darkest) * level / _LEVELS
        for _ in range(_REACH):
            lungs = lungs | (_dilate(lungs) & open_ & ~outside)
            outside = outside | (_dilate(outside) & open_ & ~lungs)

    # A basin's rim, thin bridges and specks go; clefts and holes close.
    lungs = lungs & (small < top)
    opened = lungs & _dilate(~_dilate(~lungs))
    closed = ~_dilate(~_dilate(opened, 2), 2)
    return ((_fill(closed.float()) > 0.5) & ~outside)[:, 0]


def grow_field(field: Tensor, centres: np.ndarray, weights: np.ndarray, *, coverage: float = 0.975) -> Tensor:
    """Grow the field where real boxes lie densest outside it, until it holds the given share of their centres.

    Lung behind the heart and below the dome of the diaphragm is not dark, yet nodules lie there: cells are added in
    falling order of the boxes' Gaussian-smoothed density (2.5 cells). The field is (64, 64) bool, centres (n, 2) are x
    and y in [0, 1], weights (n,). Needs scipy.
    """
    ndimage = _ndimage()
    columns, rows = np.minimum((np.asarray(centres) * FIELD_SIZE).astype(int), FIELD_SIZE - 1).T
    density = np.zeros((FIELD_SIZE, FIELD_SIZE))
    np.add.at(density, (rows, columns), weights)
    density = ndimage.gaussian_filter(density, 2.5)
    lung = field.numpy().copy()
    for level in np.unique(density[rows, columns])[::-1]:
        if lung[rows, columns].mean() >= coverage:
            break
        lung |= density >= level
    closed = ndimage.binary_closing(np.pad(lung, 2), iterations=2)[2:-2, 2:-2]
    return torch.from_numpy(ndimage.binary_fill_holes(closed | lung))


def _basins(dark: Tensor, field: Tensor) -> Tensor:
    """Return the connected parts of dark that can be a lung: most in the field, some not too low, none much smaller."""
    places = torch.arange(1.0, FIELD_SIZE**2 + 1, device=dark.device).view(1, 1, FIELD_SIZE, FIELD_SIZE)
    names = _spread(places * dark, torch.where(dark, torch.inf, 0.0))
    flat = names.flatten(1).long()

    def cells(of: Tensor) -> Tensor:
        counts = torch.zeros(len(dark), FIELD_SIZE**2 + 1, device=dark.device)
        return counts.scatter_add_(1, flat, of.expand_as(names).flatten(1).float())

    low = torch.arange(FIELD_SIZE, device=dark.device)[:, None] >= _GAS * FIELD_SIZE
    size, in_field, too_low = cells(dark), cells(dark & field), cells(dark & low)
    lung = (in_field >= 8) & (in_field >= 0.6 * size) & (in_field >= 0.25 * in_field.amax(1, keepdim=True))
    return (lung & (too_low < size)).gather(1, flat).view_as(dark)


def _mean(maps: Tensor, part: Tensor) -> Tensor:
    """Return each map's mean over a part of it, (B, 1, 1, 1); 0 where that is empty."""
    return (maps * part).sum((2, 3), keepdim=True) / part.sum((2, 3), keepdim=True).clamp(min=1)


def _small(images: Tensor) -> Tensor:
    """Return images at 64 x 64, mean 0 and standard deviation 1 each, smoothed over 3 x 3 cells."""
    if images.ndim != 4 or images.shape[1] != 1 or 0 in images.shape:
        raise ValueError(f"images must be (B, 1, H, W), got {tuple(images.shape)}")
    small = torch.cat([F.interpolate(part.float(), (FIELD_SIZE, FIELD_SIZE), mode="area") for part in images.split(64)])
    small = small - small.mean((1, 2, 3), keepdim=True)
    small = small / small.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return F.avg_pool2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _dark(small: Tensor) -> Tensor:
    """Return which cells of `_small` images lie in a dark basin, (B, 1, 64, 64) bool."""
    return _fill(small) - small > _DEPTH


def _fill(images: Tensor) -> Tensor:
    """Fill every dark basin of images up to its rim (grey-scale reconstruction by erosion from the edge)."""
    level = images.amax((2, 3), keepdim=True).expand_as(images).clone()
    for edge in (level[..., 0, :], level[..., -1, :], level[..., :, 0], level[..., :, -1]):
        edge.fill_(-torch.inf)
    return -_spread(-torch.maximum(level, images), -images)


def _spread(level: Tensor, ceiling: Tensor) -> Tensor:
    """Return the largest level that reaches each cell from its neighbours under a ceiling (by dilation)."""
    while True:
        before = level
        for _ in range(8):  # comparing costs as much as a step
            level = torch.minimum(ceiling, _largest(level))
        if torch.equal(level, before):
            return level


def _dilate(mask: Tensor, cells: int = 1) -> Tensor:
    """Return a mask (B, 1, 64, 64) and its neighbours, so many times; beyond the edge there is nothing."""
    for _ in range(cells):
        mask = _largest(mask.float()) > 0.5
    return mask


def _largest(maps: Tensor) -> Tensor:
    """Return the largest value in each 3 x 3 neighbourhood, as max_pool2d does, ten times as fast on a CPU."""
    rows = F.pad(maps, (0, 0, 1, 1), value=-torch.inf)
    rows = torch.maximum(torch.maximum(rows[..., :-2, :], rows[..., 1:-1, :]), rows[..., 2:, :])
    columns = F.pad(rows, (1, 1, 0, 0), value=-torch.inf)
    return torch.maximum(torch.maximum(columns[..., :-2], columns[..., 1:-1]), columns[..., 2:])


def _ndimage():  # type: ignore[no-untyped-def]
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("finding lungs needs scipy: pip install 'carim-aug[eval]'") from error
    return ndimage
