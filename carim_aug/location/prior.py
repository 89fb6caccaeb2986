"""The location prior: how many nodules an image has, where they lie and how large they are (METHOD 5).

p(k boxes) = p(k) prod_j p(box_j): a categorical count, and for each box the truncated kernel density of `density.py`,
inside the lung field by construction. Left and right stay as they are in the image (image left is the patient's right).
Fit from readers' boxes, or as in the source from thresholded class activation maps. Every patient counts once.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.density import Array, BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.location.regions import region_boxes
from carim_aug.ops.boxes import MaskShape, Size, as_size, boxes_to_masks, check_boxes
from carim_aug.ops.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_BOUNDS = (0.015, 0.13)
"""Smallest and largest nodule, sqrt(width x height) in fractions of the image's side: 4 and 33 pixels at 256. A nodule
is at most 3 cm; magnified by about 1.1 and drawn with some slack it is at most 45 mm on a 350 mm wide film: 0.13."""
MAX_ASPECT = 2.5
FORMAT, FORMAT_VERSION = "carim_aug.prior", "2"
BUNDLED = Path(__file__).parents[1] / "weights" / "prior.safetensors"
TENSORS = ("kernels", "kernel_weights", "bandwidths", "broad", "counts", "field", "bounds", "mass")
FIRST_TRIES, MORE_TRIES = 10_000, 30


class PriorError(ValueError):
    """A location prior's file that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class MaskSample:
    """What `LocationPrior.sample` gives: masks (n, 1, S, S) float32 in {0, 1}; boxes, n of (k, 4) XYXY in pixels."""

    masks: Tensor
    boxes: list[Tensor]


class LocationPrior:
    """A density of nodule count, place and size that can be sampled, evaluated, saved and plotted.

    Use `LocationPrior.bundled()`, `fit`, `fit_maps` or `load`; the arguments here are a fitted prior's parts.

    Args:
        density: of one box.
        counts: (max_count,) chance of 1, 2, ... boxes in an image with any.
        n_boxes: boxes it was fitted on.
        n_patients: patients they are of.
        description: where they came from.
    """

    def __init__(
        self, density: BoxDensity, counts: Array, *, n_boxes: int, n_patients: int, description: str = ""
    ) -> None:
        """Check the parts and prepare the fast draws."""
        _check_parts(density, counts)
        self.density, self.counts = density, counts
        self.n_boxes, self.n_patients, self.description = n_boxes, n_patients, description
        self.max_count = len(counts)
        self.size_bounds = density.support.size_bounds
        self._prepare_draws()

    @classmethod
    def bundled(cls) -> "LocationPrior":
        """The prior in the package: readers' nodule boxes of ChestX-ray14, val and test patients left out."""
        return cls.load(BUNDLED)

    @classmethod
    def fit(
        cls,
        boxes: Sequence[Any],
        image_size: Size,
        *,
        patients: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        field: Any | None = None,
        max_count: int = 4,
        size_bounds: tuple[float, float] = SIZE_BOUNDS,
        description: str = "",
    ) -> "LocationPrior":
        """A prior fitted on boxes; bandwidths are chosen by leaving one patient out.

        Boxes whose centre is outside the field, or whose size or aspect is out of bounds, are left out; so is the count
        of images with more than `max_count` boxes (their boxes are not). Images without a box say nothing.

        Args:
            boxes: one (k_i, 4) tensor or array per image, XYXY in pixels.
            image_size: pixels, int or (height, width), the same for all.
            patients: one id per image; a patient's weight is spread over all its boxes. None: each image is a patient.
            weights: one per image, >= 0 (the classifier's score, for instance); None: all 1.
            field: (64, 64) bool, where lung can be; None: the bundled prior's.
            max_count: most boxes in an image, >= 1.
            size_bounds: smallest and largest sqrt(width x height) in fractions of the image's side.
            description: where the boxes came from; saved with the prior.

        Raises:
            ValueError: bad boxes, sizes, weights or field; or more than half the boxes lie outside field and bounds.
        """
        height, width = as_size(image_size, "image_size")
        tensors = [_as_boxes(of_image, (height, width), f"boxes[{i}]") for i, of_image in enumerate(boxes)]
        image_weights = _as_weights(weights, len(tensors))
        if patients is not None and len(patients) != len(tensors):
            raise ValueError(f"patients must have one id per image ({len(tensors)}), got {len(patients)}")
        if max_count < 1:
            raise ValueError(f"max_count must be >= 1, got {max_count}")
        if not 0 < size_bounds[0] < size_bounds[1] <= 1:
            raise ValueError(f"size_bounds must be 0 < smallest < largest <= 1, got {size_bounds}")
        support = Support(_as_field(field), (float(size_bounds[0]), float(size_bounds[1])), MAX_ASPECT)
        n_per_image = np.array([len(t) for t in tensors], dtype=int)
        if n_per_image.sum() == 0:
            raise ValueError(f"boxes must hold at least one box, got none in {len(tensors)} images")

        # Each patient counts once, however many images and boxes it has.
        ids = range(len(tensors)) if patients is None else [str(p) for p in patients]
        known: dict[Any, int] = {}
        of_patient = np.array([known.setdefault(i, len(known)) for i in ids])
        points = boxes_to_points(torch.cat(tensors).numpy(), height, width)
        image = np.repeat(np.arange(len(tensors)), n_per_image)
        kept = support.contains(points) & (image_weights[image] > 0)
        if kept.sum() < 0.5 * len(points):
            raise ValueError(
                f"boxes must be XYXY in pixels of image_size {image_size}, in the lung field and within size_bounds "
                f"{support.size_bounds}: only {kept.sum()} of {len(points)} are"
            )
        groups = of_patient[image][kept]
        box_weights = image_weights[image][kept] / np.bincount(groups)[groups]
        density = fit_density(points[kept], box_weights, groups, support)

        counted = (n_per_image >= 1) & (n_per_image <= max_count)
        if not counted.any():
            raise ValueError(f"max_count must not be below every image's count of boxes, got {max_count}")
        count_weights = image_weights[counted] / np.bincount(of_patient[counted])[of_patient[counted]]
        counts = np.bincount(n_per_image[counted] - 1, count_weights, minlength=max_count)
        return cls(
            density,
            counts / counts.sum(),
            n_boxes=int(kept.sum()),
            n_patients=len(np.unique(groups)),
            description=description,
        )

    @classmethod
    def fit_maps(
        cls,
        maps: Tensor,
        weights: Tensor | Sequence[float],
        *,
        threshold: float = 0.5,
        patients: Sequence[Any] | None = None,
        field: Any | None = None,
        max_count: int = 4,
        size_bounds: tuple[float, float] = SIZE_BOUNDS,
        description: str = "",
    ) -> "LocationPrior":
        """A prior fitted on class activation maps of real nodule images, as in the source (METHOD 5).

        Every connected region at or above the threshold becomes a box. A map is coarse (8 x 8 cells of a 256 pixel
        image for DenseNet-121), so a region is often larger than a nodule: it is then cut to the largest size allowed,
        around its centre of mass.

        Args:
            maps: (n, 1, H, W) float in [0, 1], as `cam.py` gives them, up-sampled to the image.
            weights: (n,) of the maps, >= 0: the classifier's nodule score.
            threshold: in (0, 1].
            patients: as in `fit`.
            field: as in `fit`.
            max_count: as in `fit`.
            size_bounds: as in `fit`.
            description: as in `fit`.

        Raises:
            ValueError: bad maps, weights or threshold; no region reaches the threshold.
            ImportError: scipy is not there.
        """
        boxes = region_boxes(maps, threshold, size_bounds[1])
        if not any(len(b) for b in boxes):
            raise ValueError(f"maps must reach threshold {threshold} somewhere, got {len(maps)} maps that do not")
        return cls.fit(
            boxes,
            (maps.shape[2], maps.shape[3]),
            patients=patients,
            weights=weights.tolist() if isinstance(weights, Tensor) else weights,
            field=field,
            max_count=max_count,
            size_bounds=size_bounds,
            description=description,
        )

    @property
    def field(self) -> Tensor:
        """Where lung can be, (64, 64) bool."""
        return torch.from_numpy(self.density.support.field.copy())

    def sample(self, n: int, generator: torch.Generator, image_size: int, *, shape: MaskShape = "box") -> MaskSample:
        """Masks of n images with nodules, and their boxes.

        Args:
            n: images.
            generator: the only source of chance, on any device; the result is on the CPU.
            image_size: side in pixels.
            shape: "box" or "ellipse".
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        rng = np.random.default_rng(int(seed))
        boxes = [torch.from_numpy(self.draw(rng, image_size)) for _ in range(n)]
        return MaskSample(boxes_to_masks(boxes, image_size, shape=shape), boxes)

    def draw(self, rng: np.random.Generator, image_size: int | None = None) -> np.ndarray:
        """The boxes of one image with nodules: (k, 4) float32 XYXY, k >= 1; the fast way, for planning.

        Boxes of one image do not overlap; where no free place is found for a further one, there are fewer.

        Args:
            rng: the only source of chance.
            image_size: side in pixels; None for coordinates in [0, 1].
        """
        scale = 1.0 if image_size is None else float(image_size)
        if not scale > 0:
            raise ValueError(f"image_size must be positive, got {image_size}")
        wanted = 1 + min(bisect_right(self._count_steps, rng.random()), self.max_count - 1)
        boxes = [self._draw_box(rng)]
        tries = MORE_TRIES * (wanted - 1)
        while len(boxes) < wanted and tries:
            tries -= 1
            x1, y1, x2, y2 = self._draw_box(rng)
            if all(x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1 for a1, b1, a2, b2 in boxes):
                boxes.append((x1, y1, x2, y2))
        return np.minimum(np.array(boxes, np.float64) * scale, scale).astype(np.float32)

    def _prepare_draws(self) -> None:
        """Plain lists and floats: a draw costs microseconds, most of them numpy's if arrays were used."""
        density, support = self.density, self.density.support
        self._count_steps: list[float] = np.cumsum(self.counts)[:-1].tolist()
        self._steps: list[float] = np.cumsum(density.weights)[:-1].tolist()
        self._kernels: list[list[float]] = density.kernels.tolist()
        self._h: list[float] = density.bandwidths.tolist()
        self._broad: list[float] = density.broad.tolist()
        self._rows, self._columns = support.field.shape
        self._field: list[bool] = support.field.ravel().tolist()
        self._cells: list[int] = np.flatnonzero(support.field).tolist()
        self._limits = (*map(math.log, support.size_bounds), math.log(support.max_aspect))

    def _draw_box(self, rng: np.random.Generator) -> tuple[float, float, float, float]:
        """One box, each side in [0, 1], by rejection: exactly the density that `log_prob` gives."""
        share, mean_size, std_size, mean_aspect, std_aspect = self._broad
        smallest, largest, stretched = self._limits
        h_x, h_y, h_size, h_aspect = self._h
        tie = self.density.tie
        for _ in range(FIRST_TRIES):
            pick = rng.random()
            a, b, c, d = rng.standard_normal(4).tolist()
            if pick < share:
                row, column = divmod(self._cells[int(pick / share * len(self._cells))], self._columns)
                x, y = (column + rng.random()) / self._columns, (row + rng.random()) / self._rows
                log_size, log_aspect = mean_size + std_size * c, mean_aspect + std_aspect * d
            else:
                m = self._kernels[bisect_right(self._steps, (pick - share) / (1 - share))]
                x, y = m[0] + h_x * a, m[1] + h_y * b
                if tie < 1 and rng.random() >= tie:
                    m = self._kernels[bisect_right(self._steps, rng.random())]
                log_size, log_aspect = m[2] + h_size * c, m[3] + h_aspect * d
            if not (smallest <= log_size <= largest and -stretched <= log_aspect <= stretched):
                continue
            size, stretch = math.exp(log_size) / 2, math.exp(log_aspect / 2)
            half_width, half_height = size * stretch, size / stretch
            if half_width <= x <= 1 - half_width and half_height <= y <= 1 - half_height:
                if self._field[int(y * self._rows) * self._columns + int(x * self._columns)]:
                    return x - half_width, y - half_height, x + half_width, y + half_height
        raise RuntimeError(f"no box in {FIRST_TRIES} tries from a density with mass {self.density.mass}")

    def log_prob(self, boxes: Any, image_size: Size) -> Tensor:
        """Natural log of each box's density in (centre x, centre y, log size, log aspect), image sides = 1.

        Args:
            boxes: (k, 4) tensor or array, XYXY in pixels.
            image_size: pixels, int or (height, width).

        Returns:
            (k,) float64; -inf where the centre is outside the lung field, or size or aspect out of bounds.
        """
        height, width = as_size(image_size, "image_size")
        tensor = _as_boxes(boxes, (height, width), "boxes")
        return torch.from_numpy(self.density.log_prob(boxes_to_points(tensor.numpy(), height, width)))

    def log_prob_count(self, k: int) -> float:
        """Natural log of the chance that an image with nodules has k of them; -inf outside 1 to `max_count`."""
        chance = float(self.counts[k - 1]) if 1 <= k <= self.max_count else 0.0
        return math.log(chance) if chance > 0 else -math.inf

    def save(self, path: str | Path) -> None:
        """Write the prior to a safetensors file, with a SHA-256 of all that it says."""
        density, support = self.density, self.density.support
        bounds = np.array([*support.size_bounds, support.max_aspect])
        parts: list[np.ndarray] = [density.kernels, density.weights, density.bandwidths, density.broad, self.counts]
        parts += [support.field.astype(np.uint8), bounds, np.array([density.mass])]
        arrays = dict(zip(TENSORS, parts, strict=True)) | {"tie": np.array([density.tie])}
        about = {"description": self.description, "n_boxes": str(self.n_boxes), "n_patients": str(self.n_patients)}
        write_sealed(path, arrays, {"format": FORMAT, "format_version": FORMAT_VERSION, **about})

    @classmethod
    def load(cls, path: str | Path) -> "LocationPrior":
        """The prior saved in a file, checked bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            PriorError: it is no prior, a newer one, or damaged.
        """
        again = "save or download the prior again, or make one with `carim-aug fit-prior`"
        try:
            arrays, texts, intact = read_sealed(path)
        except ValueError as error:
            raise PriorError(f"{path} is {error}: {again}") from error
        if texts.get("format") != FORMAT:
            raise PriorError(f"{path} has the format {texts.get('format')!r}, not {FORMAT!r}: {again}")
        version = texts.get("format_version", "")
        if version not in ("1", FORMAT_VERSION):
            newer = version.isdecimal() and int(version) > int(FORMAT_VERSION)
            hint = "upgrade carim-aug" if newer else again
            raise PriorError(
                f"{path} has format version {version!r}, this carim-aug reads up to {FORMAT_VERSION!r}: {hint}"
            )
        if missing := [name for name in TENSORS + (() if version == "1" else ("tie",)) if name not in arrays]:
            raise PriorError(f"{path} lacks {', '.join(missing)}: {again}")
        if not intact:
            raise PriorError(f"{path} is damaged (its SHA-256 does not fit): {again}")
        try:
            kernels, weights, bandwidths, broad, counts, field, bounds, mass = (arrays[name] for name in TENSORS)
            low, high, max_aspect = bounds.tolist()
            tie = float(arrays["tie"][0]) if version != "1" else 1.0
            support = Support(field.astype(bool), (low, high), max_aspect)
            return cls(
                BoxDensity(kernels, weights, bandwidths, broad, support, float(mass[0]), tie),
                counts,
                n_boxes=int(texts["n_boxes"]),
                n_patients=int(texts["n_patients"]),
                description=texts.get("description", ""),
            )
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise PriorError(f"{path} holds no valid prior ({error}): {again}") from error

    def plot(self) -> "Figure":
        """A figure: density of the place inside the lung field, of the size, and the chances of the counts.

        Raises:
            ImportError: matplotlib is not there.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("LocationPrior.plot needs matplotlib: pip install 'carim-aug[eval]'") from error
        density, support = self.density, self.density.support
        rows, columns = support.field.shape
        gaussians = [
            np.exp(-0.5 * (((np.arange(n) + 0.5) / n - density.kernels[:, d, None]) / density.bandwidths[d]) ** 2)
            for d, n in ((0, columns), (1, rows))
        ]
        place = np.where(support.field, np.einsum("k,ky,kx->yx", density.weights, gaussians[1], gaussians[0]), np.nan)
        rng = np.random.default_rng(0)
        sizes = [math.sqrt((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in (self._draw_box(rng) for _ in range(4000))]

        figure = Figure(figsize=(10, 3.2), layout="constrained")
        where, size, count = figure.subplots(1, 3)
        where.imshow(place, extent=(0, 1, 1, 0), cmap="viridis")
        where.set(title="place (image left is the patient's right)", xlabel="x / width", ylabel="y / height")
        size.hist(sizes, bins=40, density=True)
        size.set(title="size", xlabel="sqrt(width x height) / side")
        count.bar(range(1, self.max_count + 1), self.counts)
        count.set(title="nodules an image", xlabel="count", xticks=range(1, self.max_count + 1))
        return figure

    def __repr__(self) -> str:
        """What it was fitted on and what it allows."""
        low, high = self.size_bounds
        return (
            f"LocationPrior({self.n_boxes} boxes of {self.n_patients} patients, max_count={self.max_count}, "
            f"size {low:g} to {high:g} of the image's side)"
        )


def _as_boxes(boxes: Any, size: tuple[int, int], name: str) -> Tensor:
    tensor = torch.as_tensor(boxes).detach().cpu().double()
    try:
        check_boxes(tensor, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return tensor


def _as_weights(weights: Sequence[float] | None, n: int) -> Array:
    array = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"weights must be one number per image ({n},), got {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any() or (n and array.sum() == 0):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {array.tolist()[:8]}")
    return array


def _as_field(field: Any | None) -> np.ndarray:
    if field is None:
        return LocationPrior.bundled().density.support.field
    array = np.asarray(field)
    if array.shape != (64, 64) or array.dtype != bool or not array.any():
        raise ValueError(f"field must be (64, 64) bool and not empty, got {array.dtype} {array.shape}")
    return array.copy()


def _check_parts(density: BoxDensity, counts: Array) -> None:
    """Raise a PriorError where the parts do not fit together or are no numbers."""
    n = len(density.kernels)
    low, high = density.support.size_bounds
    rules = {
        "kernels must be (n, 4), n >= 1": density.kernels.shape == (n, 4) and n >= 1,
        "kernel_weights must be (n,)": density.weights.shape == (n,),
        "bandwidths must be (4,)": density.bandwidths.shape == (4,),
        "broad must be (5,)": density.broad.shape == (5,),
        "counts must be (max_count,)": counts.ndim == 1 and len(counts) >= 1,
        "field must be (64, 64) and not empty": density.support.field.shape == (64, 64) and density.support.field.any(),
        "bounds must be 0 < smallest < largest and aspect > 1": 0 < low < high and density.support.max_aspect > 1,
        "mass must be in (0.01, 1]": 0.01 < density.mass <= 1 + 1e-9,
        "tie must be in [0, 1]": 0 <= density.tie <= 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise PriorError(rule)
    for name, part in (("kernels", density.kernels), ("kernel_weights", density.weights), ("counts", counts)):
        if not np.isfinite(part).all():
            raise PriorError(f"{name} must be finite, got {part[~np.isfinite(part)][0]}")
    for name, part in (("kernel_weights", density.weights), ("counts", counts)):
        if (part < 0).any() or abs(part.sum() - 1) > 1e-6:
            raise PriorError(f"{name} must be >= 0 and sum to 1, got a sum of {part.sum()}")
    if not (density.bandwidths > 0).all() or not 0 < density.broad[0] < 1 or not (density.broad[[2, 4]] > 0).all():
        raise PriorError(f"bandwidths must be > 0, got {density.bandwidths.tolist()} and {density.broad.tolist()}")
