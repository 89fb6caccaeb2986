"""A location prior that draws only some of its nodules: of a size, a number or a place that the user asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.prior import LocationPrior, PriorError
from carim_aug.ops.boxes import Size, as_size, check_boxes

REGIONS: tuple[str, ...] = ("image left", "image right", "upper", "middle", "lower", "heart")
"""Regions that have names: halves and thirds of the lung field, the patient's right lung being on the image's left; and
"heart": an ellipse about where the heart lies in frontal films, centre (0.60, 0.62), half axes (0.12, 0.15)."""

TRIES = 20_000


class NarrowedPrior(LocationPrior):
    """A prior whose draws all have the size, number and place asked for; between these they lie as the prior's do.

    Args:
        prior: to draw from; None: the bundled one.
        sizes: least and largest sqrt(width x height), in fractions of the image's side.
        count: nodules an image: a number, or (least, most), all equally often; None: as the prior has it.
        region: where centres may lie: a name of `REGIONS`, or a mask (H, W), nonzero inside, of the whole image.
        boxes: (k, 4) XYXY, to draw from in place of the prior's own, all equally often.
        image_size: pixels of the image that `boxes` are in, int or (height, width).

    Raises:
        ValueError: a size, count, region or box that breaks its rule.
        PriorError: nothing that the prior draws is left.

    >>> prior = NarrowedPrior(sizes=(0.02, 0.03), count=2, region="lower")
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
        """Checks the wishes, and draws once to see that they can be met."""
        prior = LocationPrior.bundled() if prior is None else prior
        super().__init__(
            prior.density,
            prior.counts,
            n_boxes=prior.n_boxes,
            n_patients=prior.n_patients,
            description=f"{prior.description} (narrowed: sizes {sizes}, count {count})",
        )
        self._sizes = _range("sizes", sizes, 0.0, 1.0) if sizes is not None else (0.0, 1.0)
        if count is not None:
            low, high = _range("count", (count, count) if isinstance(count, int) else count, 1, 64)
            self._wanted: tuple[int, int] | None = (int(low), int(high))
            self.max_count = int(high)
        else:
            self._wanted = None
        self._region = None if region is None else _region(region, prior.field)
        self._given = None if boxes is None else _relative(boxes, image_size)
        rng = np.random.default_rng(0)
        if not any(self._fits(box) for box in self._probes(rng)):
            raise PriorError(
                f"prior must draw nodules of sizes {self._sizes} in the region asked for, got none in {TRIES} draws: "
                "widen the sizes or the region"
            )

    def draw(self, rng: np.random.Generator, image_size: int | None = None) -> np.ndarray:
        """The boxes of one image with nodules, as `LocationPrior.draw`; fewer where no free place was found."""
        if self._wanted is not None:
            wanted = int(rng.integers(self._wanted[0], self._wanted[1] + 1))
        else:
            wanted = 1 + int(rng.choice(len(self.counts), p=self.counts / self.counts.sum()))
        boxes: list[tuple[float, float, float, float]] = []
        for _ in range(TRIES):
            x1, y1, x2, y2 = box = self._one(rng)
            if self._fits(box) and all(x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1 for a1, b1, a2, b2 in boxes):
                boxes.append(box)
                if len(boxes) == wanted:
                    break
        if not boxes:
            raise PriorError(f"prior found no nodule of the size and place asked for in {TRIES} draws")
        scale = 1.0 if image_size is None else float(image_size)
        return np.minimum(np.array(boxes, np.float64) * scale, scale).astype(np.float32)

    def save(self, path: Any) -> None:
        """Refuses: a narrowed prior is a wish of one run, and the file would hold the whole prior.

        Raises:
            PriorError: always.
        """
        raise PriorError("a NarrowedPrior cannot be saved: save the prior that it narrows")

    def _one(self, rng: np.random.Generator) -> tuple[float, float, float, float]:
        if self._given is None:
            return self._draw_box(rng)
        return self._given[int(rng.integers(len(self._given)))]

    def _probes(self, rng: np.random.Generator) -> Any:
        return self._given if self._given is not None else (self._draw_box(rng) for _ in range(TRIES))

    def _fits(self, box: tuple[float, float, float, float]) -> bool:
        x1, y1, x2, y2 = box
        if not self._sizes[0] <= ((x2 - x1) * (y2 - y1)) ** 0.5 <= self._sizes[1]:
            return False
        if self._region is None:
            return True
        rows, columns = self._region.shape
        row, column = int((y1 + y2) / 2 * rows), int((x1 + x2) / 2 * columns)
        return bool(self._region[min(row, rows - 1), min(column, columns - 1)])


def _range(name: str, pair: Any, least: float, most: float) -> tuple[float, float]:
    fits = isinstance(pair, Sequence) and len(pair) == 2
    if not fits or isinstance(pair, str) or not least <= pair[0] <= pair[1] <= most:
        raise ValueError(f"{name} must be (least, largest) in [{least:g}, {most:g}], got {pair!r}")
    return pair[0], pair[1]


def _region(region: Any, field: Tensor) -> np.ndarray:
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


def _relative(boxes: Any, image_size: Size | None) -> list[tuple[float, float, float, float]]:
    if image_size is None:
        raise ValueError("image_size must be given with boxes: the pixels of the image that they are in")
    height, width = as_size(image_size, "image_size")
    tensor = torch.as_tensor(boxes, dtype=torch.float64)
    check_boxes(tensor, (height, width))
    if not len(tensor):
        raise ValueError("boxes must be at least one, got none")
    parts = tensor / torch.tensor([width, height, width, height], dtype=torch.float64)
    return [(a, b, c, d) for a, b, c, d in parts.clamp(0, 1).tolist()]
