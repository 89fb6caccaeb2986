"""A truncated kernel density of one box's place and size (the density behind METHOD 5's location prior).

A box is a point (centre x, centre y, log size, log aspect): x and y in fractions of the image's width and height, size
= sqrt(w h) and aspect = w / h of the width and height in those fractions. The density of a point u is

    p(u) = [ (1 - e) k(u) + e U(x, y) N(log size) N(log aspect) ] 1[u in support] / mass
    k(u) = sum_i w_i N(x, y; m_i, H) [ t N(s; m_i, H) + (1 - t) sum_j w_j N(s; m_j, H) ],  s = (log size, log aspect)

with m_i the i-th fitting box, its log size and log aspect drawn towards the overall mean by a factor rho (West 1993),
so that H's variance 1 - rho^2 leaves the overall variance as it is: rho = 0 is a log-normal size, rho = 1 the plain
kernel density. The tie t is the chance that a box has the size of a fitting box at its place, not of any: t = 0 is size
independent of place. U is uniform over the lung field. The support: centre in the field, box in the image, size and
aspect in bounds; `mass` is what the bracket integrates to over it.

Reference: M. West, "Approximating posterior distributions by mixture", J. R. Stat. Soc. B 55 (1993).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHIFTS = (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
"""Position bandwidths to choose from, in standard deviations of the centres."""
RHOS = (0.0, 0.5, 0.7, 0.8)
"""Shrinkage factors to choose from; higher ones follow the fitting boxes' sizes too closely (cross-validation)."""
BROAD_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares e of the broad component to choose from."""
TIES = (0.0, 0.5, 1.0)
"""Ties t of size and aspect to the place to choose from."""
SMALLEST_STD = np.array([0.02, 0.02, 0.1, 0.1])
"""Floors under the spread of the fitting boxes, for those who have few or equal ones."""


@dataclass(frozen=True)
class Support:
    """Where a box may be: (64, 64) bool lung field, (smallest, largest) size, largest aspect (or its inverse)."""

    field: NDArray[np.bool_]
    size_bounds: tuple[float, float]
    max_aspect: float

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """Which of the points (m, 4) lie in the support: (m,) bool."""
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
    """The density of the module's docstring.

    Args:
        kernels: (n, 4) means m_i, already drawn towards the overall mean.
        weights: (n,) of the kernels, sum 1.
        bandwidths: (4,) standard deviations H.
        broad: (5,) share e; mean and standard deviation of log size; the same of log aspect.
        support: where it is not 0.
        mass: of the untruncated density inside the support.
        tie: t, in [0, 1].
    """

    kernels: Array
    weights: Array
    bandwidths: Array
    broad: Array
    support: Support
    mass: float
    tie: float = 1.0

    def log_prob(self, points: Array) -> Array:
        """Natural log of the density at points (m, 4): (m,), -inf outside the support."""
        out = np.full(len(points), -np.inf)
        inside = self.support.contains(points)
        rows = max(1, 4_000_000 // max(1, len(self.kernels)))
        chosen = points[inside]
        parts = [self._untruncated(chosen[start : start + rows]) for start in range(0, len(chosen), rows)]
        if parts:
            out[inside] = np.log(np.concatenate(parts)) - math.log(self.mass)
        return out

    def _untruncated(self, points: Array) -> Array:
        place, size = (
            np.exp(sum(_log_normal(points[:, d], self.kernels[:, d], self.bandwidths[d]) for d in pair))
            for pair in ((0, 1), (2, 3))
        )
        tied, loose = (place * size) @ self.weights, (place @ self.weights) * (size @ self.weights)
        share = self.broad[0]
        kernel_part = self.tie * tied + (1 - self.tie) * loose
        return (1 - share) * kernel_part + share * _broad(points, self.broad, self.support)


def boxes_to_points(boxes: Array, height: int, width: int) -> Array:
    """Boxes (k, 4) XYXY in pixels as points (k, 4): centre x, centre y, log size, log aspect, image sides = 1."""
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
    """The density of these boxes; its settings are chosen by leaving one group (patient) out at a time.

    Args:
        points: (n, 4), all in the support.
        weights: (n,) >= 0 with a positive sum.
        groups: (n,) which patient each box is of; with one patient only, Silverman's rule of thumb sets the bandwidths.
        support: of the density.
        rhos: to choose from; (0.0,) makes size and aspect log-normal.
        broad_shares: to choose from; (0.0,) leaves the broad component out.
        ties: to choose from; (0.0,) makes size and aspect independent of place.
    """
    weights = weights / weights.sum()
    mean = weights @ points
    std = np.maximum(np.sqrt(weights @ (points - mean) ** 2), SMALLEST_STD)
    if len(np.unique(groups)) > 1:
        shift_x, shift_y, rho_size, rho_aspect, share, tie = _choose(
            points, weights, groups, support, mean, std, (SHIFTS, SHIFTS, rhos, rhos, broad_shares, ties)
        )
    else:
        shift_x = shift_y = len(points) ** (-1 / 8)
        rho_size = rho_aspect = math.sqrt(1 - shift_x**2)
        share, tie = 0.1, 1.0
    rho = np.array([1.0, 1.0, rho_size, rho_aspect])
    kernels = mean + rho * (points - mean)
    bandwidths = std * np.array([shift_x, shift_y, _spread(rho_size), _spread(rho_aspect)])
    broad = np.array([share, mean[2], std[2], mean[3], std[3]])
    repeats = math.ceil(2**19 / len(points))
    tied, loose = (weights @ m for m in _kernel_masses(kernels, weights, bandwidths, support, repeats))
    mass = (1 - share) * (tie * tied + (1 - tie) * loose) + share * _broad_mass(broad, support)
    return BoxDensity(kernels, weights, bandwidths, broad, support, float(mass), float(tie))


def _choose(
    points: Array,
    weights: Array,
    groups: NDArray[np.int64],
    support: Support,
    mean: Array,
    std: Array,
    grids: tuple[Sequence[float], ...],
) -> tuple[float, ...]:
    """The settings with the highest weighted log density of boxes under the other patients' boxes, one by one."""
    judged = np.arange(0, len(points), math.ceil(len(points) ** 2 / 2_000_000))
    others = np.where(groups[judged][:, None] == groups[None], 0.0, weights[None])
    total = others.sum(1)
    broad = np.array([0, mean[2], std[2], mean[3], std[3]])
    broad_density, broad_mass = _broad(points[judged], broad, support), _broad_mass(broad, support)

    def log_kernel(d: int, value: float) -> Array:
        rho, width = (1.0, value * std[d]) if d < 2 else (value, _spread(value) * std[d])
        return _log_normal(points[judged, d], mean[d] + rho * (points[:, d] - mean[d]), width)

    def score(settings: list[float], log_kernels: list[Array]) -> float:
        shift_x, shift_y, rho_size, rho_aspect, share, tie = settings
        kernels = mean + np.array([1, 1, rho_size, rho_aspect]) * (points - mean)
        bandwidths = std * np.array([shift_x, shift_y, _spread(rho_size), _spread(rho_aspect)])
        place, size = np.exp(log_kernels[0] + log_kernels[1]), np.exp(log_kernels[2] + log_kernels[3])
        tied, loose = (
            (others * place * size).sum(1) / total,
            (others * place).sum(1) * (others * size).sum(1) / total**2,
        )
        tied_mass, loose_mass = (others @ m / total for m in _kernel_masses(kernels, weights, bandwidths, support, 64))
        bracket = (1 - share) * (tie * tied + (1 - tie) * loose) + share * broad_density
        mass = (1 - share) * (tie * tied_mass + (1 - tie) * loose_mass) + share * broad_mass
        with np.errstate(divide="ignore"):
            return float(weights[judged] @ np.log(bracket / mass))

    settings = [grid[len(grid) // 2] for grid in grids]
    log_kernels = [log_kernel(d, settings[d]) for d in range(4)]
    best = score(settings, log_kernels)
    for _ in range(3):
        before = best
        for d, grid in enumerate(grids):
            for value in grid:
                trial = [*settings[:d], value, *settings[d + 1 :]]
                trial_kernels = (
                    [*log_kernels[:d], log_kernel(d, value), *log_kernels[d + 1 :]] if d < 4 else log_kernels
                )
                if (found := score(trial, trial_kernels)) > best:
                    best, settings, log_kernels = found, trial, trial_kernels
        if best == before:
            break
    return tuple(settings)


def _spread(rho: float) -> float:
    """Standard deviation that a kernel drawn in by rho must have to leave the overall variance as it is."""
    return math.sqrt(1 - rho**2)


def _log_normal(points: Array, centres: Array, width: float) -> Array:
    """Log density (m, n) of the points (m,) under each normal kernel (n,)."""
    return -0.5 * ((points[:, None] - centres[None]) / width) ** 2 - math.log(width * math.sqrt(2 * math.pi))


def _broad(points: Array, broad: Array, support: Support) -> Array:
    """Density of the broad component at points whose centres are in the field (area in fractions of the image)."""
    _, mean_size, std_size, mean_aspect, std_aspect = broad
    size, aspect = (points[:, 2] - mean_size) / std_size, (points[:, 3] - mean_aspect) / std_aspect
    normal = np.exp(-0.5 * (size**2 + aspect**2)) / (2 * math.pi * std_size * std_aspect)
    return normal / support.field.mean()


def _kernel_masses(
    kernels: Array, weights: Array, bandwidths: Array, support: Support, repeats: int
) -> tuple[Array, Array]:
    """The share of each kernel inside the support from `repeats` fixed draws: (n,) with its own size, (n,) with any."""
    rng, shape = np.random.default_rng(0), (len(kernels), repeats)
    noise = rng.standard_normal((*shape, 4)) * bandwidths
    tied = kernels[:, None] + noise
    loose = tied.copy()
    loose[..., 2:] = kernels[rng.choice(len(kernels), shape, p=weights / weights.sum()), 2:] + noise[..., 2:]
    tied_inside, loose_inside = (support.contains(d.reshape(-1, 4)).reshape(shape).mean(1) for d in (tied, loose))
    return tied_inside, loose_inside


def _broad_mass(broad: Array, support: Support, draws: int = 2**17) -> float:
    """The share of the broad component inside the support, from fixed draws."""
    rng = np.random.default_rng(0)
    cells = np.argwhere(support.field)[rng.integers(support.field.sum(), size=draws)]
    centres = (cells[:, ::-1] + rng.random((draws, 2))) / np.array(support.field.shape)[::-1]
    sizes = broad[[1, 3]] + broad[[2, 4]] * rng.standard_normal((draws, 2))
    return float(support.contains(np.concatenate([centres, sizes], 1)).mean())
