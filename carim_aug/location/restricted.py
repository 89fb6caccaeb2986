"""A location prior that draws only some of its nodules: of a size, a number or a place that the user asks for."""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.density import Box, Support, boxes_to_points, fit_sizes
from carim_aug.location.prior import LocationPrior, Prior, PriorError, is_free, to_pixels
from carim_aug.ops.boxes import Size, as_size, check_boxes

REGIONS: tuple[str, ...] = ("image left", "image right", "upper", "middle", "lower", "heart")
"""Regions that have names: halves and thirds of the lung field, the patient's right lung being on the image's left; and
"heart": an ellipse about where the heart lies in frontal images, centre (0.60, 0.62), half axes (0.12, 0.15)."""

TRIES = 20_000
"""Boxes drawn before a restriction counts as one that cannot be met."""
MASS_DRAWS = 50_000
"""Boxes from which the share that a restriction leaves is estimated: one of 5 % to 2 % of itself."""


class RestrictedPrior(Prior):
    """A prior whose draws all have the size, number and place asked for; between these they lie as the prior's do.

    Args:
        prior: to draw from; None: the bundled one.
        sizes: least and largest sqrt(width x height), in fractions of the image's side.
        count: nodules an image: a number, or (least, most), all equally often; None: as the prior has it.
        region: where centres may lie: a name of `REGIONS`, or a mask (H, W), nonzero inside, of the whole image.
        boxes: (k, 4) XYXY, to draw from in place of the prior's own, all equally often.
        image_size: pixels of the image that `boxes` are in, int or (height, width).

    Raises:
        PriorError: nothing that the prior draws is left.

    >>> prior = RestrictedPrior(sizes=(0.02, 0.03), count=2, region="lower")
    >>> prior.draw(np.random.default_rng(0)).shape
    (2, 4)
    """

    def __init__(
        self,
        prior: LocationPrior | None = None,
        *,
        sizes: tuple[float, float] | None = None,
        count: int | tuple[int, int] | None = None,
        region: str | Any = None,
        boxes: Tensor | np.ndarray | None = None,
        image_size: Size | None = None,
    ) -> None:
        self.prior = LocationPrior.bundled() if prior is None else prior
        if not hasattr(self.prior, "density"):
            raise TypeError(f"prior must be a LocationPrior, got {type(prior).__name__}: give all restrictions at once")
        self._sizes = (0.0, 1.0) if sizes is None else _check_range("sizes", sizes, 0.0, 1.0)
        self._count: tuple[int, int] | None = None
        self.counts = self.prior.counts
        if count is not None:
            low, high = _check_range("count", (count, count) if isinstance(count, int) else count, 1, 64)
            self._count = int(low), int(high)
            self.counts = np.where(np.arange(1, self._count[1] + 1) < self._count[0], 0, 1 / (high - low + 1))
        self.max_count = len(self.counts)
        self._region = None if region is None else _region_mask(region, self.prior.field)
        self._boxes: list[Box] | None = None
        if boxes is not None:
            if image_size is None:
                raise ValueError("image_size must be given with boxes: the pixels of the image that they are in")
            self._boxes = _to_parts(boxes, image_size)
            if not self._boxes:
                raise ValueError("boxes must be at least one, got none")
        if not any(self._fits(box) for box in self._candidates(np.random.default_rng(0), TRIES)):
            rule = f"draw nodules of sizes {self._sizes} in the region asked for"
            raise PriorError(f"prior must {rule}, got none in {TRIES} draws: widen the sizes or the region")

    @property
    def field(self) -> Tensor:  # noqa: D102
        return self.prior.field

    def draw(self, rng: np.random.Generator, image_size: int | None = None) -> np.ndarray:
        """Draw the boxes of one image with nodules; see `Prior.draw`."""
        if self._count is None:
            wanted = 1 + int(rng.choice(len(self.counts), p=self.counts / self.counts.sum()))
        else:
            wanted = int(rng.integers(self._count[0], self._count[1] + 1))
        boxes: list[Box] = []
        for _ in range(TRIES):
            given = self._boxes
            box = self.prior.density.draw(rng) if given is None else given[int(rng.integers(len(given)))]
            if self._fits(box) and is_free(box, boxes):
                boxes.append(box)
                if len(boxes) == wanted:
                    break
        if not boxes:
            raise PriorError(f"prior found no nodule of the size and place asked for in {TRIES} draws")
        return to_pixels(boxes, image_size)

    def log_prob(self, boxes: Any, image_size: Size) -> Tensor:
        """Return the natural log of each box's density; see `LocationPrior.log_prob`.

        It is the prior's over the share of it that the restriction leaves, and -inf for boxes that are not left.
        """
        if self._boxes is not None:
            raise PriorError("log_prob must have a density, got a RestrictedPrior with boxes to draw from")
        values = self.prior.log_prob(boxes, image_size)
        fits = torch.tensor([self._fits(box) for box in _to_parts(boxes, image_size)], dtype=torch.bool)
        return torch.where(fits, values - math.log(self._mass), -math.inf)

    def save(self, path: Any) -> NoReturn:
        """Raise PriorError: a restriction is a wish of one run, and the file would hold the whole prior."""
        raise PriorError("a RestrictedPrior cannot be saved: save the prior that it restricts")

    def __repr__(self) -> str:
        return f"RestrictedPrior of {self.prior}: sizes {self._sizes}, count {self._count}"

    @cached_property
    def _mass(self) -> float:
        """The share of the prior's boxes that the restriction leaves, from fixed draws."""
        return sum(map(self._fits, self._candidates(np.random.default_rng(0), MASS_DRAWS))) / MASS_DRAWS

    def _candidates(self, rng: np.random.Generator, n: int) -> Iterable[Box]:
        return self._boxes or (self.prior.density.draw(rng) for _ in range(n))

    def _fits(self, box: Box) -> bool:
        x1, y1, x2, y2 = box
        if not self._sizes[0] <= ((x2 - x1) * (y2 - y1)) ** 0.5 <= self._sizes[1]:
            return False
        if self._region is None:
            return True
        rows, columns = self._region.shape
        row, column = int((y1 + y2) / 2 * rows), int((x1 + x2) / 2 * columns)
        return bool(self._region[min(row, rows - 1), min(column, columns - 1)])


def uniform_prior(prior: LocationPrior | RestrictedPrior | None = None) -> LocationPrior:
    """Return a prior with another's (None: the bundled one's) counts and sizes, but centres wherever the box fits.

    Sizes and aspects are log-normal, with the mean and the spread of 1,000 draws of `prior`; so a gain that is owed to
    the places shows as the difference between the two.
    """
    prior = LocationPrior.bundled() if prior is None else prior
    base = prior.prior if isinstance(prior, RestrictedPrior) else prior
    rng = np.random.default_rng(0)
    boxes = np.concatenate([prior.draw(rng)[:1] for _ in range(1000)]).astype(np.float64)
    own = base.density.support
    anywhere = Support(np.ones_like(own.field), own.size_bounds, own.max_aspect)
    density = fit_sizes(boxes_to_points(boxes, 1, 1), anywhere)
    about = f"anywhere in the image, with the sizes of: {base.description}"
    return LocationPrior(density, prior.counts, n_boxes=base.n_boxes, n_patients=base.n_patients, description=about)


def _check_range(name: str, pair: Any, least: float, most: float) -> tuple[float, float]:
    fits = isinstance(pair, Sequence) and len(pair) == 2
    if not fits or isinstance(pair, str) or not least <= pair[0] <= pair[1] <= most:
        raise ValueError(f"{name} must be (least, largest) in [{least:g}, {most:g}], got {pair!r}")
    return pair[0], pair[1]


def _region_mask(region: Any, field: Tensor) -> np.ndarray:
    """Return where centres may lie, (H, W) bool."""
    if not isinstance(region, str):
        mask = np.asarray(region)
        if mask.ndim != 2 or not (mask != 0).any():
            raise ValueError(f"region must be a mask (H, W) with a pixel set, got shape {mask.shape}")
        return mask != 0
    if region not in REGIONS:
        raise ValueError(f"region must be one of {REGIONS} or a mask (H, W), got {region!r}")
    rows, columns = field.shape
    y = (np.arange(rows)[:, None] + 0.5) / rows
    x = (np.arange(columns)[None] + 0.5) / columns
    if region == "heart":
        return ((x - 0.60) / 0.12) ** 2 + ((y - 0.62) / 0.15) ** 2 < 1
    if region.startswith("image"):
        return np.broadcast_to((x < 0.5) if region == "image left" else (x >= 0.5), (rows, columns))
    inside = torch.nonzero(field.any(dim=1)).flatten()
    top, bottom = int(inside[0]) / rows, (int(inside[-1]) + 1) / rows
    third = np.floor((y - top) / (bottom - top) * 3).clip(0, 2)
    return np.broadcast_to(third == ("upper", "middle", "lower").index(region), (rows, columns))


def _to_parts(boxes: Any, image_size: Size) -> list[Box]:
    """Convert boxes (k, 4) in pixels to parts of the image's sides."""
    height, width = as_size(image_size, "image_size")
    tensor = torch.as_tensor(boxes, dtype=torch.float64)
    check_boxes(tensor, (height, width))
    parts = tensor / torch.tensor([width, height, width, height], dtype=torch.float64)
    return [(a, b, c, d) for a, b, c, d in parts.clamp(0, 1).tolist()]
