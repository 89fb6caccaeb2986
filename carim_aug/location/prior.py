"""The location prior: how many nodules an image has, where they lie and how large they are.

p(k boxes) = p(k) prod_j p(box_j): a categorical count, and for each box the truncated kernel density of `density.py`,
inside the lung field by construction. Left and right stay as they are in the image (image left is the patient's right).
Fit from readers' boxes, or as in Ann (2021) from thresholded class activation maps. Every patient counts once.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.density import Array, Box, BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.location.regions import region_boxes
from carim_aug.ops.boxes import MaskShape, Size, as_size, boxes_to_masks, check_boxes
from carim_aug.ops.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_BOUNDS = (0.015, 0.13)
"""Smallest and largest nodule, sqrt(width x height) in parts of the image's side: 4 and 33 pixels at 256. A nodule
is at most 3 cm; magnified by about 1.1 and outlined with some slack it is at most 45 mm on a 350 mm wide image."""
MAX_ASPECT = 2.5
FORMAT, FORMAT_VERSION = "carim_aug.prior", "2"
BUNDLED = Path(__file__).parents[1] / "weights" / "prior.safetensors"
TENSORS = ("kernels", "kernel_weights", "bandwidths", "broad", "counts", "field", "bounds", "mass", "tie")
MORE_TRIES = 30
"""Candidates for each further box of an image."""


class PriorError(ValueError):
    """A location prior, or its file, that cannot be used so; the message says why and what to do."""


@dataclass(frozen=True)
class MaskSample:
    """Masks (n, 1, S, S) float32 in {0, 1}, and their boxes, n of (k, 4) XYXY in pixels."""

    masks: Tensor
    boxes: list[Tensor]


class Prior(Protocol):
    """What tells how many nodules an image has and where; whoever has `draw` is one."""

    counts: Array  # (max_count,) chance of 1, 2, ... boxes in an image with any
    max_count: int

    @property
    def field(self) -> Tensor:
        """Where lung can be, (64, 64) bool."""
        ...

    def draw(self, rng: np.random.Generator, image_size: int | None = None) -> np.ndarray:
        """Draw the boxes of one image with nodules, (k, 4) float32 XYXY in pixels, or in [0, 1] for None; k >= 1.

        Boxes of one image do not overlap; where no free place is found for a further one, there are fewer. All chance
        is the generator's. It takes microseconds.
        """
        ...

    def sample(self, n: int, generator: torch.Generator, image_size: int, *, shape: MaskShape = "box") -> MaskSample:
        """Draw masks of n images with nodules, and their boxes, on the CPU; all chance is the generator's."""
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        rng = np.random.default_rng(int(seed))
        boxes = [torch.from_numpy(self.draw(rng, image_size)) for _ in range(n)]
        return MaskSample(boxes_to_masks(boxes, image_size, shape=shape), boxes)

    def log_prob_count(self, k: int) -> float:
        """Return the natural log of the chance that an image with nodules has k; -inf outside 1 to `max_count`."""
        chance = float(self.counts[k - 1]) if 1 <= k <= self.max_count else 0.0
        return math.log(chance) if chance > 0 else -math.inf

    def plot(self) -> "Figure":
        """Plot place, size and count of 5,000 images' draws; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'carim-aug[eval]'") from error
        rng = np.random.default_rng(0)
        boxes = np.concatenate([self.draw(rng) for _ in range(5000)])
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2

        figure = Figure(figsize=(10, 3.2), layout="constrained")
        place, size, count = figure.subplots(1, 3)
        place.hexbin(x, y, gridsize=40, extent=(0, 1, 0, 1), mincnt=1)
        place.contour(self.field.float().numpy(), levels=[0.5], extent=(0, 1, 0, 1), colors="grey")
        place.set(title="place (image left is the patient's right)", xlabel="x / width", ylabel="y / height")
        place.set_ylim(1, 0)
        size.hist(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)), bins=40, density=True)
        size.set(title="size", xlabel="sqrt(width x height) / side")
        count.bar(range(1, self.max_count + 1), self.counts)
        count.set(title="nodules an image", xlabel="count", xticks=range(1, self.max_count + 1))
        return figure


class LocationPrior(Prior):
    """A density of nodule count, place and size that can be sampled, evaluated, saved and plotted.

    Use `LocationPrior.bundled()`, `fit`, `fit_maps` or `load`; the arguments here are a fitted prior's parts: the
    density of one box, the chance of 1, 2, ... boxes in an image with any (max_count,), and what they were fitted on.
    """

    def __init__(
        self, density: BoxDensity, counts: Array, *, n_boxes: int, n_patients: int, description: str = ""
    ) -> None:
        _check_parts(density, counts)
        self.density, self.counts = density, counts
        self.n_boxes, self.n_patients, self.description = n_boxes, n_patients, description
        self.max_count = len(counts)
        self.size_bounds = density.support.size_bounds
        self._count_steps: list[float] = np.cumsum(counts)[:-1].tolist()

    @classmethod
    def bundled(cls) -> "LocationPrior":
        """Load the prior in the package: readers' nodule boxes of ChestX-ray14, val and test patients left out."""
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
        """Fit a prior on boxes; bandwidths are chosen by leaving one patient out.

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
        image_weights = np.ones(len(tensors)) if weights is None else np.asarray(weights, dtype=np.float64)
        if image_weights.shape != (len(tensors),):
            raise ValueError(f"weights must be one number per image ({len(tensors)},), got {image_weights.shape}")
        if not (np.isfinite(image_weights) & (image_weights >= 0)).all() or (tensors and not image_weights.any()):
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got {image_weights.tolist()[:8]}")
        if patients is not None and len(patients) != len(tensors):
            raise ValueError(f"patients must have one id per image ({len(tensors)}), got {len(patients)}")
        if max_count < 1:
            raise ValueError(f"max_count must be >= 1, got {max_count}")
        if not 0 < size_bounds[0] < size_bounds[1] <= 1:
            raise ValueError(f"size_bounds must be 0 < smallest < largest <= 1, got {size_bounds}")
        cells = np.asarray(cls.bundled().field if field is None else field).copy()
        if cells.shape != (64, 64) or cells.dtype != bool or not cells.any():
            raise ValueError(f"field must be (64, 64) bool and not empty, got {cells.dtype} {cells.shape}")
        support = Support(cells, (float(size_bounds[0]), float(size_bounds[1])), MAX_ASPECT)
        n_per_image = np.array([len(t) for t in tensors], dtype=int)
        if n_per_image.sum() == 0:
            raise ValueError(f"boxes must hold at least one box, got none in {len(tensors)} images")

        # Each patient counts once, however many images and boxes it has.
        ids = range(len(tensors)) if patients is None else [str(p) for p in patients]
        of_patient = np.unique(ids, return_inverse=True)[1]
        points = boxes_to_points(torch.cat(tensors).numpy(), height, width)
        image = np.repeat(np.arange(len(tensors)), n_per_image)
        good = support.contains(points) & (image_weights[image] > 0)
        if good.sum() < 0.5 * len(points):
            rule = (
                f"in pixels of image_size {image_size}, in the lung field and within size_bounds {support.size_bounds}"
            )
            raise ValueError(f"boxes must be XYXY {rule}: only {good.sum()} of {len(points)} are")
        groups = of_patient[image][good]
        box_weights = image_weights[image][good] / np.bincount(groups)[groups]
        density = fit_density(points[good], box_weights, groups, support)

        counted = (n_per_image >= 1) & (n_per_image <= max_count)
        if not counted.any():
            raise ValueError(f"max_count must not be below every image's count of boxes, got {max_count}")
        count_weights = image_weights[counted] / np.bincount(of_patient[counted])[of_patient[counted]]
        counts = np.bincount(n_per_image[counted] - 1, count_weights, minlength=max_count)
        facts = {"n_boxes": int(good.sum()), "n_patients": len(np.unique(groups))}
        return cls(density, counts / counts.sum(), **facts, description=description)

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
        """Fit a prior on class activation maps of real nodule images, as Ann (2021) does; the rest is as in `fit`.

        Every connected region at or above the threshold, in (0, 1], becomes a box. A map is coarse (8 x 8 cells of a
        256 pixel image for DenseNet-121), so a region is often larger than a nodule: it is then cut to the largest size
        allowed, around its centre of mass. Maps are (n, 1, H, W) float in [0, 1], as `carim_aug.ops.cam` makes them,
        enlarged to the image; weights (n,) >= 0 are the classifier's nodule scores. Needs scipy.

        Raises:
            ValueError: bad maps, weights or threshold; no region reaches the threshold.
        """
        boxes = region_boxes(maps, threshold, size_bounds[1])
        if not any(len(b) for b in boxes):
            raise ValueError(f"maps must reach threshold {threshold} somewhere, got {len(maps)} maps that do not")
        weights = weights.tolist() if isinstance(weights, Tensor) else weights
        options: dict[str, Any] = {"field": field, "max_count": max_count, "size_bounds": size_bounds}
        options |= {"patients": patients, "weights": weights, "description": description}
        return cls.fit(boxes, (maps.shape[2], maps.shape[3]), **options)

    @property
    def field(self) -> Tensor:  # noqa: D102
        return torch.from_numpy(self.density.support.field.copy())

    def draw(self, rng: np.random.Generator, image_size: int | None = None) -> np.ndarray:
        """Draw the boxes of one image with nodules; see `Prior.draw`."""
        wanted = 1 + min(bisect_right(self._count_steps, rng.random()), self.max_count - 1)
        boxes = [self.density.draw(rng)]
        for _ in range(MORE_TRIES * (wanted - 1)):
            box = self.density.draw(rng)
            if is_free(box, boxes):
                boxes.append(box)
            if len(boxes) == wanted:
                break
        return to_pixels(boxes, image_size)

    def log_prob(self, boxes: Any, image_size: Size) -> Tensor:
        """Return the natural log of the density of boxes (k, 4) XYXY in pixels, (k,) float64.

        It is that of (centre x, centre y, log size, log aspect), image sides 1; -inf where the centre is outside the
        lung field, or size or aspect out of bounds.
        """
        height, width = as_size(image_size, "image_size")
        tensor = _as_boxes(boxes, (height, width), "boxes")
        return torch.from_numpy(self.density.log_prob(boxes_to_points(tensor.numpy(), height, width)))

    def save(self, path: str | Path) -> None:
        """Write the prior to a safetensors file, with a SHA-256 of all that it says."""
        density, support = self.density, self.density.support
        bounds = np.array([*support.size_bounds, support.max_aspect])
        parts: list[np.ndarray] = [density.kernels, density.weights, density.bandwidths, density.broad, self.counts]
        parts += [support.field.astype(np.uint8), bounds, np.array([density.mass]), np.array([density.tie])]
        about = {"description": self.description, "n_boxes": str(self.n_boxes), "n_patients": str(self.n_patients)}
        texts = {"format": FORMAT, "format_version": FORMAT_VERSION, **about}
        write_sealed(path, dict(zip(TENSORS, parts, strict=True)), texts)

    @classmethod
    def load(cls, path: str | Path) -> "LocationPrior":
        """Load a prior from a file, checked bit for bit.

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
            reads = f"this carim-aug reads up to {FORMAT_VERSION!r}"
            raise PriorError(f"{path} has format version {version!r}, {reads}: {hint}")
        if version == "1":  # it knew no tie: every box had the size of a fitting box at its place
            arrays["tie"] = np.ones(1)
        if missing := [name for name in TENSORS if name not in arrays]:
            raise PriorError(f"{path} lacks {', '.join(missing)}: {again}")
        if not intact:
            raise PriorError(f"{path} is damaged (its SHA-256 does not fit): {again}")
        try:
            kernels, weights, bandwidths, broad, counts, field, bounds, mass, tie = (arrays[name] for name in TENSORS)
            low, high, max_aspect = bounds.tolist()
            support = Support(field.astype(bool), (low, high), max_aspect)
            density = BoxDensity(kernels, weights, bandwidths, broad, support, float(mass[0]), float(tie[0]))
            facts = {"n_boxes": int(texts["n_boxes"]), "n_patients": int(texts["n_patients"])}
            return cls(density, counts, **facts, description=texts.get("description", ""))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise PriorError(f"{path} holds no valid prior ({error}): {again}") from error

    def __repr__(self) -> str:
        (low, high), about = self.size_bounds, f"{self.n_boxes} boxes of {self.n_patients} patients"
        return f"LocationPrior({about}, max_count={self.max_count}, size {low:g} to {high:g} of the image's side)"


def is_free(box: Box, others: Sequence[Box]) -> bool:
    """Return whether a box overlaps none of the others."""
    x1, y1, x2, y2 = box
    return all(x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1 for a1, b1, a2, b2 in others)


def to_pixels(boxes: Sequence[Box], image_size: int | None) -> np.ndarray:
    """Convert boxes in [0, 1] to (k, 4) float32 in pixels of a side, or in [0, 1] for None."""
    scale = 1.0 if image_size is None else float(image_size)
    if not scale > 0:
        raise ValueError(f"image_size must be positive, got {image_size}")
    return np.minimum(np.array(boxes, np.float64) * scale, scale).astype(np.float32)


def _as_boxes(boxes: Any, size: tuple[int, int], name: str) -> Tensor:
    tensor = torch.as_tensor(boxes).detach().cpu().double()
    try:
        check_boxes(tensor, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return tensor


def _check_parts(density: BoxDensity, counts: Array) -> None:
    """Raise PriorError where the parts do not fit together or are no numbers."""
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
        if name != "kernels" and ((part < 0).any() or abs(part.sum() - 1) > 1e-6):
            raise PriorError(f"{name} must be >= 0 and sum to 1, got a sum of {part.sum()}")
    if not (density.bandwidths > 0).all() or not 0 < density.broad[0] < 1 or not (density.broad[[2, 4]] > 0).all():
        raise PriorError(f"bandwidths must be > 0, got {density.bandwidths.tolist()} and {density.broad.tolist()}")
