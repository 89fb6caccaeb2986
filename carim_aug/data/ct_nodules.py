"""Real CT nodules in projection, superimposed on X-rays (the training-free insertion of Litjens et al. 2010).

A control, and a source of images whose nodule is known to the pixel. The nodules are superimposed, not seen in a
radiograph: figures are to be taken on real boxes only.
"""

import math
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from carim_aug.data.io import DataError

_VIEWS = ("frontal", "sagittal")
_FRINGE = 0.1  # share of the peak thickness that is taken off: the ragged fringe of a segmentation
_EDGE = 0.02  # share of the peak above which a pixel counts to the nodule's extent
_ANGLES = 24  # a nodule has no upright: any multiple of 15 degrees
_NEIGHBOURS = 200  # templates next in size that a box chooses from
_SUPERSAMPLE = 3  # rays per output pixel and axis, averaged: bilinear sampling alone would alias
_STRETCH = 1.25  # how unequal the two axes may be scaled so that an oblong box is filled
_BLUR = (0.25, 0.5, 0.25)  # a radiograph's own blur, about a pixel wide


class CTNodules:
    """Templates of CT nodules that can be added to X-rays.

    Templates that touch the border of their patch, are thin, or are ragged are dropped.

    Args:
        path: `templates.npz` with `frontal` and `sagittal` (N, S, S): water-equivalent thickness in mm, 1 mm pixels.
        field_mm: width of an X-ray in mm, which says how many mm a pixel of a given image size is (410 mm: 1.6 mm at
            256 pixels); templates near to the box's size are preferred.

    Raises:
        DataError: the file is missing, is no such archive, lacks an array, or holds no template that is fit for use.

    Reference:
        Litjens, Hogeweg, Schilham, de Jong, Viergever and van Ginneken, "Simulation of nodules and diffuse infiltrates
        in chest radiographs using CT templates", MICCAI 2010.
    """

    def __init__(self, path: str | Path, *, field_mm: float = 410.0) -> None:
        if not field_mm > 0:
            raise ValueError(f"field_mm must be > 0, got {field_mm}")
        self.field_mm = field_mm
        thickness = _trim(_read(Path(path)))
        thickness = thickness[_roundish(thickness)]
        if not len(thickness):
            raise DataError(f"{path}: no template is whole and roundish enough to be used")
        low, high = _extents(thickness)
        size = (high - low)[:, 0].max(1)
        order = np.argsort(size, kind="stable")
        self.templates = torch.from_numpy(thickness[order])[:, None]  # (M, 1, S, S) float32, peak 1
        self.extents_mm = torch.from_numpy(size[order])  # (M,) float32, ascending: the larger side of each nodule
        self._middle = torch.from_numpy((low + high)[order] / 2)  # (M, angles, 2), mm from the patch's centre
        self._extent = torch.from_numpy((high - low)[order])  # (M, angles, 2), mm

    def __len__(self) -> int:
        return len(self.templates)

    def __repr__(self) -> str:
        low, high = float(self.extents_mm[0]), float(self.extents_mm[-1])
        return f"CTNodules({len(self)} templates of {low:.0f} to {high:.0f} mm)"

    def superimpose(
        self,
        images: Tensor,
        boxes: Tensor,
        generator: torch.Generator,
        contrast: tuple[float, float] = (0.07, 0.27),
        *,
        fill: tuple[float, float] | None = (0.9, 1.0),
    ) -> tuple[Tensor, Tensor]:
        """Add one nodule to each image, flipped and turned to one of 24 angles at random.

        The peak contrast is log-normal. Its default, and `fill=None`, were fitted to real boxes of ChestX-ray14's
        training patients at 128 pixels: radiologists' boxes of ChestX-Det are tight, official boxes are about 1.6 times
        as wide as their nodule.

        Args:
            images: (B, 1, S, S) float, [-1, 1].
            boxes: (B, 4) XYXY in pixels, inside the image, at least one pixel wide and high.
            generator: source of every draw.
            contrast: 10th and 90th percentile of the nodule's peak contrast, in the images' units; equal values fix it.
            fill: range of the share of the box that the nodule spans; None makes it as loose as real boxes are: tight
                up to 18 mm, then ever looser.

        Returns:
            The images, at most 1, and what was added, >= 0 and zero outside the box; (B, 1, S, S) each.
        """
        _check(images, boxes, contrast, fill)
        n, size = len(images), images.shape[-1]
        if n == 0:
            return images.clone(), torch.zeros_like(images)
        box = boxes.detach().to("cpu", torch.float32)
        wide_mm = (box[:, 2:] - box[:, :2]).amax(1) * (self.field_mm / size)

        # All draws at once, in a fixed order.
        uniform = torch.rand(n, 5, generator=generator, device=generator.device).cpu()
        normal = torch.randn(n, generator=generator, device=generator.device).cpu().clamp(-2, 2)

        # How much of the box is filled, by which template, turned how.
        if fill is None:
            share = ((18.0 / wide_mm).clamp(max=1.0) ** 0.8 * (0.9 + 0.2 * uniform[:, 0])).clamp(max=1.0)
        else:
            share = fill[0] + (fill[1] - fill[0]) * uniform[:, 0]
        window = min(_NEIGHBOURS, len(self))
        first = (torch.searchsorted(self.extents_mm, wide_mm * share) - window // 2).clamp(0, len(self) - window)
        chosen = first + (uniform[:, 1] * window).long().clamp(max=window - 1)
        turned = (uniform[:, 2] * _ANGLES).long().clamp(max=_ANGLES - 1)
        flips = torch.where(uniform[:, 3:] < 0.5, -1.0, 1.0)

        shape = self._render(box, share, chosen, turned, flips, size)
        median, spread = math.sqrt(contrast[0] * contrast[1]), math.log(contrast[1] / contrast[0]) / (2 * 1.2816)
        peak = median * torch.exp(spread * normal)
        difference = (shape * peak[:, None, None, None]).to(images)
        difference = torch.minimum(difference, (1 - images).clamp_min(0))  # a radiograph saturates
        return images + difference, difference

    def _render(self, box: Tensor, share: Tensor, chosen: Tensor, turned: Tensor, flips: Tensor, size: int) -> Tensor:
        """Return nodules of peak 1 at their boxes, (B, 1, S, S), made in windows as large as the largest box."""
        n, side = len(box), box[:, 2:] - box[:, :2]
        span = min(size, int(side.max().ceil()) + 1)
        corner = box[:, :2].floor().clamp(max=size - span)

        # Pixels per mm, so that the nodule with its blur stays inside the box.
        inner = torch.maximum(side * share[:, None] - 0.5, 0.6 * side * share[:, None])
        scale = inner / self._extent[chosen, turned]
        scale = torch.minimum(scale, _STRETCH * scale.amin(1, keepdim=True))

        # From sub-pixels of the window to mm in the template.
        ticks = (torch.arange(span * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
        offset = (corner - (box[:, :2] + box[:, 2:]) / 2)[:, :, None] + ticks  # (B, 2, T)
        offset = offset * (flips / scale)[:, :, None] + self._middle[chosen, turned][:, :, None]
        angle = turned * (2 * math.pi / _ANGLES)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        x, y = offset[:, 0, None, :], offset[:, 1, :, None]
        half = self.templates.shape[-1] / 2
        grid = torch.stack((cos * x + sin * y, cos * y - sin * x), -1) / half
        patch = F.grid_sample(self.templates[chosen], grid, align_corners=False)
        patch = F.avg_pool2d(patch, _SUPERSAMPLE)

        # The blur; then nothing outside the box.
        kernel = torch.tensor(_BLUR)
        patch = F.conv2d(patch, (kernel[:, None] * kernel)[None, None], padding=1)
        pixels = torch.arange(span)
        left, right = box[:, :2, None] - corner[:, :, None], box[:, 2:, None] - corner[:, :, None]
        inside = (torch.minimum(right, pixels + 1.0) - torch.maximum(left, pixels + 0.0)).clamp(0, 1)
        patch = patch * (inside[:, 0, None, :] * inside[:, 1, :, None])[:, None]
        patch = patch / patch.amax((2, 3), keepdim=True).clamp_min(1e-6)

        # Windows into images.
        at = corner.long()
        rows, columns = at[:, 1, None, None] + pixels[:, None], at[:, 0, None, None] + pixels
        images = torch.zeros(n, 1, size, size)
        images[torch.arange(n)[:, None, None], 0, rows, columns] = patch[:, 0]
        return images


def _read(path: Path) -> np.ndarray:
    """Read both projections of all nodules, (2N, S, S) float32."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            views = {name: archive[name].astype(np.float32) for name in _VIEWS if name in names}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz archive ({error})") from error
    if len(views) < len(_VIEWS):
        raise DataError(f"{path}: must hold {' and '.join(_VIEWS)}, found {', '.join(names)}")
    for name, view in views.items():
        if view.ndim != 3 or view.shape[1] != view.shape[2]:
            raise DataError(f"{path}: {name} must be (N, S, S), got {view.shape}")
    shapes = [view.shape for view in views.values()]
    if shapes[0][1:] != shapes[1][1:]:
        raise DataError(f"{path}: frontal and sagittal must be of one size, got {shapes[0]} and {shapes[1]}")
    return np.concatenate(list(views.values()))


def _trim(thickness: np.ndarray) -> np.ndarray:
    """Return templates that keep clear of the border, smoothed (CT slices leave steps), without fringe, of peak 1."""
    border = np.maximum(thickness[:, [0, -1]].max((1, 2)), thickness[:, :, [0, -1]].max((1, 2)))
    thickness = thickness[(border <= 0) & (thickness.max((1, 2)) > 0)]
    padded = np.pad(thickness, ((0, 0), (1, 1), (0, 0)))
    thickness = _BLUR[0] * padded[:, :-2] + _BLUR[1] * padded[:, 1:-1] + _BLUR[2] * padded[:, 2:]
    padded = np.pad(thickness, ((0, 0), (0, 0), (1, 1)))
    thickness = _BLUR[0] * padded[:, :, :-2] + _BLUR[1] * padded[:, :, 1:-1] + _BLUR[2] * padded[:, :, 2:]
    thickness = thickness / thickness.max((1, 2), keepdims=True)
    return np.maximum(thickness - _FRINGE, 0) / (1 - _FRINGE)


def _roundish(thickness: np.ndarray) -> np.ndarray:
    """Return which templates are at least 4 mm wide, neither thin, ragged nor hollow, (N,) bool."""
    axis = np.arange(thickness.shape[-1], dtype=np.float32) - (thickness.shape[-1] - 1) / 2
    mask = thickness > _EDGE
    side = np.maximum(mask.any(1).sum(1), mask.any(2).sum(1))
    area = mask.sum((1, 2))

    # Axes of the ellipse with the same second moments as the thickness.
    weight = thickness / np.maximum(thickness.sum((1, 2), keepdims=True), 1e-6)
    x, y = (weight * axis).sum((1, 2)), (weight * axis[:, None]).sum((1, 2))
    xx = (weight * axis**2).sum((1, 2)) - x**2
    yy = (weight * axis[:, None] ** 2).sum((1, 2)) - y**2
    xy = (weight * axis * axis[:, None]).sum((1, 2)) - x * y
    mean, root = (xx + yy) / 2, np.sqrt((xx - yy) ** 2 / 4 + xy**2)
    ratio = np.sqrt(np.maximum(mean - root, 0) / np.maximum(mean + root, 1e-6))

    # A disc of diameter d on a grid has area pi d^2 / 4 and an outline of 4 d pixel edges.
    outline = sum(np.abs(np.diff(mask.astype(np.int8), axis=a)).sum((1, 2)) for a in (1, 2))
    ragged = outline / np.maximum(4 * np.sqrt(4 * area / np.pi), 1)

    # Hollow ones are rings, not blobs.
    distance = (axis - x[:, None, None]) ** 2 + (axis[:, None] - y[:, None, None]) ** 2
    core = distance <= np.maximum(area / np.pi / 4, 1)[:, None, None]
    solid = (thickness * core).sum((1, 2)) / np.maximum(core.sum((1, 2)), 1)
    return (side >= 4) & (ratio > 0.6) & (ragged < 1.2) & (area > 0.5 * side**2) & (solid > 0.55)


def _extents(thickness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return low and high corner of each template's nodule at each angle, (N, angles, 2), mm from the centre."""
    size = thickness.shape[-1]
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    mask = thickness > _EDGE
    low = np.empty((len(mask), _ANGLES, 2), np.float32)
    high = np.empty_like(low)
    for k in range(_ANGLES):
        cos, sin = math.cos(2 * math.pi * k / _ANGLES), math.sin(2 * math.pi * k / _ANGLES)
        # The template's point (x, y) turned by the angle; half a pixel more on either side.
        for i, along in enumerate((cos * axis - sin * axis[:, None], sin * axis + cos * axis[:, None])):
            low[:, k, i] = np.where(mask, along, np.inf).min((1, 2)) - 0.5
            high[:, k, i] = np.where(mask, along, -np.inf).max((1, 2)) + 0.5
    return low, high


def _check(images: Tensor, boxes: Tensor, contrast: tuple[float, float], fill: tuple[float, float] | None) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (B, 1, S, S), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
    if tuple(boxes.shape) != (len(images), 4):
        raise ValueError(f"boxes must be ({len(images)}, 4), got {tuple(boxes.shape)}")
    size = images.shape[-1]
    good = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1) & (boxes >= 0).all(1) & (boxes <= size).all(1)
    if not bool(good.all()):
        got = boxes[~good][0].tolist()
        raise ValueError(f"boxes must be XYXY in [0, {size}] and at least one pixel wide, got {got}")
    for name, pair, most in (("contrast", contrast, 2), ("fill", (1, 1) if fill is None else fill, 1)):
        if not 0 < pair[0] <= pair[1] <= most:
            raise ValueError(f"{name} must be 0 < low <= high <= {most}, got {pair}")
