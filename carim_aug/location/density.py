"""A truncated kernel density of one box's place and size, and its sampler.

A box is a point (centre x, centre y, log size, log aspect): x and y in fractions of the image's width and height, size
= sqrt(w h) and aspect = w / h of the width and height in those fractions. The density of a point u is

    p(u) = [ (1 - e) k(u) + e U(x, y) N(log size) N(log aspect) ] 1[u in support] / mass
    k(u) = sum_i w_i N(x, y; m_i, H) [ t N(s; m_i, H) + (1 - t) sum_j w_j N(s; m_j, H) ],  s = (log size, log aspect)

with m_i the i-th fitting box, its log size and log aspect shrunk towards the overall mean by a factor rho (West 1993),
so that H's variance 1 - rho^2 leaves the overall variance as it is: rho = 0 is a log-normal size, rho = 1 the plain
kernel density. The tie t is the chance that a box has the size of a fitting box at its place, not of any: t = 0 is size
independent of place. U is uniform over the lung field. The support: centre in the field, box in the image, size and
aspect in bounds; `mass` is what the bracket integrates to over it.

Reference: M. West, "Approximating posterior distributions by mixture", J. R. Stat. Soc. B 55 (1993).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# What a fit chooses from. Higher rhos follow the fitting boxes' sizes too closely (cross-validation).
SHIFTS = (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)  # bandwidths of the place, in standard deviations of the centres
RHOS = (0.0, 0.5, 0.7, 0.8)
BROAD_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
TIES = (0.0, 0.5, 1.0)

SMALLEST_STD = np.array([0.02, 0.02, 0.1, 0.1])
"""Floors under the spread of the fitting boxes, for those who have few or equal ones."""
TRIES = 10_000
"""Candidates for one box; each is in the support with the chance `mass`, which is above 0.01."""

Box = tuple[float, float, float, float]
"""XYXY in [0, 1]."""


@dataclass(frozen=True)
class Support:
    """Where a box may be."""

    field: NDArray[np.bool_]  # (64, 64), the lung field, in which centres lie
    size_bounds: tuple[float, float]  # smallest and largest size
    max_aspect: float  # and largest inverse of one

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """Return which of the points (m, 4) lie in the support, (m,) bool."""
        x, y, log_size, log_aspect = points.T
        rows, columns = self.field.shape
        row, column = np.floor(y * rows).astype(int), np.floor(x * columns).astype(int)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        inside &= self.field[row.clip(0, rows - 1), column.clip(0, columns - 1)]
        inside &= (log_size >= math.log(self.size_bounds[0])) & (log_size <= math.log(self.size_bounds[1]))
        inside &= np.abs(log_aspect) <= math.log(self.max_aspect)
        size, stretch = np.exp(log_size), np.exp(log_aspect.clip(-9, 9) / 2)
        half_width, half_height = size * stretch / 2, size / stretch / 2
        inside &= (x >= half_width) & (x + half_width <= 1) & (y >= half_height) & (y + half_height <= 1)
        return inside


@dataclass(frozen=True)
class BoxDensity:
    """The density of the module's docstring."""

    kernels: Array  # (n, 4) means m_i, already shrunk towards the overall mean
    weights: Array  # (n,) of the kernels, sum 1
    bandwidths: Array  # (4,) standard deviations H
    broad: Array  # (5,) share e; mean and standard deviation of log size; the same of log aspect
    support: Support  # where it is not 0
    mass: float  # of the untruncated density inside the support
    tie: float = 1.0  # t, in [0, 1]

    def log_prob(self, points: Array) -> Array:
        """Return the natural log of the density at points (m, 4): (m,), -inf outside the support."""
        out = np.full(len(points), -np.inf)
        inside = self.support.contains(points)
        rows = max(1, 4_000_000 // max(1, len(self.kernels)))
        chosen = points[inside]
        parts = [self._untruncated(chosen[start : start + rows]) for start in range(0, len(chosen), rows)]
        if parts:
            out[inside] = np.log(np.concatenate(parts)) - math.log(self.mass)
        return out

    def draw(self, rng: np.random.Generator) -> Box:
        """Draw one box by rejection, exactly from the density that `log_prob` gives."""
        kernels, steps, bandwidths, broad, field, cells, (rows, columns), limits = self._plain
        share, mean_size, std_size, mean_aspect, std_aspect = broad
        h_x, h_y, h_size, h_aspect = bandwidths
        smallest, largest, stretched = limits
        for _ in range(TRIES):
            pick = rng.random()
            a, b, c, d = rng.standard_normal(4).tolist()
            if pick < share:
                row, column = divmod(cells[int(pick / share * len(cells))], columns)
                x, y = (column + rng.random()) / columns, (row + rng.random()) / rows
                log_size, log_aspect = mean_size + std_size * c, mean_aspect + std_aspect * d
            else:
                m = kernels[bisect_right(steps, (pick - share) / (1 - share))]
                x, y = m[0] + h_x * a, m[1] + h_y * b
                if self.tie < 1 and rng.random() >= self.tie:
                    m = kernels[bisect_right(steps, rng.random())]
                log_size, log_aspect = m[2] + h_size * c, m[3] + h_aspect * d
            if not (smallest <= log_size <= largest and -stretched <= log_aspect <= stretched):
                continue
            size, stretch = math.exp(log_size) / 2, math.exp(log_aspect / 2)
            half_width, half_height = size * stretch, size / stretch
            if half_width <= x <= 1 - half_width and half_height <= y <= 1 - half_height:
                if field[int(y * rows) * columns + int(x * columns)]:
                    return x - half_width, y - half_height, x + half_width, y + half_height
        raise RuntimeError(f"no box in {TRIES} tries from a density with mass {self.mass}")

    @cached_property
    def _plain(self) -> tuple[Any, ...]:
        """Everything that `draw` reads, as lists and floats: with arrays numpy would take most of its time."""
        steps, field, support = np.cumsum(self.weights)[:-1], self.support.field.ravel(), self.support
        arrays = self.kernels, steps, self.bandwidths, self.broad, field, np.flatnonzero(field)
        limits = (*map(math.log, support.size_bounds), math.log(support.max_aspect))
        return *(array.tolist() for array in arrays), support.field.shape, limits

    def _untruncated(self, points: Array) -> Array:
        place, size = _kernel_parts(points, self.kernels, self.bandwidths)
        tied, loose = (place * size) @ self.weights, (place @ self.weights) * (size @ self.weights)
        return _mix(self.broad[0], self.tie, tied, loose, _broad(points, self.broad, self.support))


def boxes_to_points(boxes: Array, height: int, width: int) -> Array:
    """Convert boxes (k, 4) XYXY in pixels to points (k, 4): centre x, centre y, log size, log aspect, image sides 1."""
    x1, y1, x2, y2 = (boxes / np.array([width, height, width, height])).T
    log_width, log_height = np.log(x2 - x1), np.log(y2 - y1)
    return np.stack([(x1 + x2) / 2, (y1 + y2) / 2, (log_width + log_height) / 2, log_width - log_height], 1)


def fit_density(
    points: Array,
    weights: Array,
    groups: NDArray[np.int64],
    support: Support,
    *,
    rhos: Sequence[float] = RHOS,
    broad_shares: Sequence[float] = BROAD_SHARES,
    ties: Sequence[float] = TIES,
) -> BoxDensity:
    """Fit the density of these boxes; its settings are chosen by leaving one group (patient) out at a time.

    Points are (n, 4), all in the support, weights (n,) >= 0 with a positive sum. With one patient only, Silverman's
    rule of thumb sets the bandwidths. Of the last three, from which is chosen, (0.0,) makes size and aspect log-normal
    (rhos), leaves the broad component out (broad_shares) or makes size independent of place (ties).
    """
    weights = weights / weights.sum()
    shift = len(points) ** (-1 / 8)
    rho = math.sqrt(1 - shift**2)
    settings: tuple[float, ...] = (shift, shift, rho, rho, 0.1, 1.0)
    if len(np.unique(groups)) > 1:
        grids = (SHIFTS, SHIFTS, rhos, rhos, broad_shares, ties)
        settings = _choose(points, weights, groups, support, grids)
    share, tie = settings[4:]
    kernels, bandwidths = _shrink(points, weights, settings)
    broad = _broad_part(share, points, weights)
    repeats = math.ceil(2**19 / len(points))
    tied, loose = (weights @ m for m in _kernel_masses(kernels, weights, bandwidths, support, repeats))
    mass = _mix(share, tie, tied, loose, _broad_mass(broad, support))
    return BoxDensity(kernels, weights, bandwidths, broad, support, float(mass), float(tie))


def fit_sizes(points: Array, support: Support) -> BoxDensity:
    """Fit log-normal sizes and aspects, those of points (n, 4), that may be anywhere in the support.

    All of the density is its broad part, less a rest that no draw meets but that a density must have.
    """
    weights = np.full(len(points), 1 / len(points))
    mean, std = _moments(points, weights)
    broad = _broad_part(1 - 1e-12, points, weights)
    return BoxDensity(mean[None], np.ones(1), std, broad, support, _broad_mass(broad, support))


def _choose(
    points: Array, weights: Array, groups: NDArray[np.int64], support: Support, grids: tuple[Sequence[float], ...]
) -> tuple[float, ...]:
    """Choose the settings with the highest weighted log density of boxes under the other patients', one by one.

    Settings are the bandwidths of x and y, the factors rho of log size and log aspect, the share e and the tie t.
    """
    scored = np.arange(0, len(points), math.ceil(len(points) ** 2 / 2_000_000))
    others = np.where(groups[scored][:, None] == groups[None], 0.0, weights[None])
    total = others.sum(1)
    broad = _broad_part(0, points, weights)
    broad_density, broad_mass = _broad(points[scored], broad, support), _broad_mass(broad, support)

    @cache
    def score(settings: tuple[float, ...]) -> float:
        share, tie = settings[4:]
        kernels, bandwidths = _shrink(points, weights, settings)
        place, size = _kernel_parts(points[scored], kernels, bandwidths)
        tied = (others * place * size).sum(1) / total
        loose = (others * place).sum(1) * (others * size).sum(1) / total**2
        tied_mass, loose_mass = (others @ m / total for m in _kernel_masses(kernels, weights, bandwidths, support, 64))
        bracket = _mix(share, tie, tied, loose, broad_density)
        mass = _mix(share, tie, tied_mass, loose_mass, broad_mass)
        with np.errstate(divide="ignore"):
            return float(weights[scored] @ np.log(bracket / mass))

    settings = tuple(grid[len(grid) // 2] for grid in grids)
    for d, grid in [*enumerate(grids)] * 3:
        trials = [(*settings[:d], value, *settings[d + 1 :]) for value in grid]
        settings = max([settings, *trials], key=score)
    return settings


def _mix(share: float, tie: float, tied: Any, loose: Any, broad: Any) -> Any:
    """Return the bracket of the module's docstring, of densities or of masses."""
    return (1 - share) * (tie * tied + (1 - tie) * loose) + share * broad


def _shrink(points: Array, weights: Array, settings: Sequence[float]) -> tuple[Array, Array]:
    """Return the kernels' means (n, 4) and bandwidths (4,) of these settings."""
    mean, std = _moments(points, weights)
    shift_x, shift_y, rho_size, rho_aspect = settings[:4]
    kernels = mean + np.array([1.0, 1.0, rho_size, rho_aspect]) * (points - mean)
    return kernels, std * np.array([shift_x, shift_y, math.sqrt(1 - rho_size**2), math.sqrt(1 - rho_aspect**2)])


def _moments(points: Array, weights: Array) -> tuple[Array, Array]:
    mean = weights @ points
    return mean, np.maximum(np.sqrt(weights @ (points - mean) ** 2), SMALLEST_STD)


def _broad_part(share: float, points: Array, weights: Array) -> Array:
    mean, std = _moments(points, weights)
    return np.array([share, mean[2], std[2], mean[3], std[3]])


def _kernel_parts(points: Array, kernels: Array, bandwidths: Array) -> tuple[Array, Array]:
    """Return the densities (m, n) of the points' places, and of their sizes and aspects, under each kernel."""

    def log_normal(d: int) -> Array:
        distance = (points[:, d, None] - kernels[None, :, d]) / bandwidths[d]
        return -0.5 * distance**2 - math.log(bandwidths[d] * math.sqrt(2 * math.pi))

    return np.exp(log_normal(0) + log_normal(1)), np.exp(log_normal(2) + log_normal(3))


def _broad(points: Array, broad: Array, support: Support) -> Array:
    """Return the broad component at points whose centres are in the field (area in fractions of the image)."""
    _, mean_size, std_size, mean_aspect, std_aspect = broad
    size, aspect = (points[:, 2] - mean_size) / std_size, (points[:, 3] - mean_aspect) / std_aspect
    normal = np.exp(-0.5 * (size**2 + aspect**2)) / (2 * math.pi * std_size * std_aspect)
    return normal / support.field.mean()


def _kernel_masses(
    kernels: Array, weights: Array, bandwidths: Array, support: Support, repeats: int
) -> tuple[Array, Array]:
    """Return each kernel's share in the support from `repeats` fixed draws: (n,) with its own size, (n,) with any."""
    rng, shape = np.random.default_rng(0), (len(kernels), repeats)
    noise = rng.standard_normal((*shape, 4)) * bandwidths
    tied = kernels[:, None] + noise
    loose = tied.copy()
    loose[..., 2:] = kernels[rng.choice(len(kernels), shape, p=weights / weights.sum()), 2:] + noise[..., 2:]
    tied_inside, loose_inside = (support.contains(d.reshape(-1, 4)).reshape(shape).mean(1) for d in (tied, loose))
    return tied_inside, loose_inside


def _broad_mass(broad: Array, support: Support, draws: int = 2**17) -> float:
    """Return the broad component's share in the support, from fixed draws."""
    rng = np.random.default_rng(0)
    cells = np.argwhere(support.field)[rng.integers(support.field.sum(), size=draws)]
    centres = (cells[:, ::-1] + rng.random((draws, 2))) / np.array(support.field.shape)[::-1]
    sizes = broad[[1, 3]] + broad[[2, 4]] * rng.standard_normal((draws, 2))
    return float(support.contains(np.concatenate([centres, sizes], 1)).mean())
