"""Simpler densities of a box beside the location prior's, and the tables that compare them (METHOD 5's prior).

All are over (x, y, log size, log aspect) with image sides 1, fitted on the same points and cut to one support.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from carim_aug.location.density import SMALLEST_STD, Array, BoxDensity, Support, fit_density
from carim_aug.ops.lungs import FIELD_SIZE

DRAWS = 2**19


class Density(Protocol):
    """Whatever gives points a density."""

    def log_prob(self, points: Array) -> Array:
        """Natural log of the density at points (m, 4): (m,)."""
        ...


class Points(NamedTuple):
    """Boxes as points.

    Attributes:
        points: (n, 4) centre x, centre y, log size, log aspect.
        weights: (n,) >= 0.
        groups: (n,) patients.
    """

    points: Array
    weights: Array
    groups: np.ndarray

    def of(self, chosen: np.ndarray) -> "Points":
        """Gives the points chosen by an (n,) bool."""
        return Points(*(part[chosen] for part in self))


def simpler_densities(known: Points, support: Support) -> dict[str, Density]:
    """Gives the densities that the location prior has to beat, fitted on points in the support."""
    position = fit_position(known, support)
    uniform = replace(position, broad=np.array([1.0, *position.broad[1:]]), mass=1.0)
    uniform = replace(uniform, mass=_mass(_uniform_draws(uniform), support))
    return {
        "uniform in the lung field, log-normal size and aspect": uniform,
        "Gaussian": _Gaussian(known, support),
        "kernel density on position alone, any size and aspect alike": _PlaceAlone(position),
        "kernel density on position, log-normal size and aspect": position,
    }


def fit_position(known: Points, support: Support) -> BoxDensity:
    """Gives a kernel density of the centre with log-normal size and aspect, independent of it."""
    return fit_density(*known, support, rhos=(0.0,), broad_shares=(0.0,), ties=(0.0,))


def cross_validated(
    known: Points, fits: Mapping[str, Callable[[set[int]], Density]], *, folds: int = 5
) -> dict[str, Array]:
    """Gives each density's log values at the points of patients that it was not fitted on.

    Args:
        known: boxes in the support.
        fits: from a name to a function that fits on these patients only.
        folds: of the patients, at least 2.

    Returns:
        From the names to (n,) values.
    """
    patients, values = np.unique(known.groups), {name: np.zeros(len(known.points)) for name in fits}
    fold = np.random.default_rng(0).permutation(len(patients)) % folds
    for out in range(folds):
        judged = np.isin(known.groups, patients[fold == out])
        for name, fit in fits.items():
            values[name][judged] = fit(set(patients[fold != out].tolist())).log_prob(known.points[judged])
    return values


def interval(values: Array, weights: Array, groups: np.ndarray, *, resamples: int = 2000) -> str:
    """Gives the weighted mean of values (n,) and its 95 % interval over patients drawn with replacement."""
    _, group = np.unique(groups, return_inverse=True)
    weight, total = np.bincount(group, weights), np.bincount(group, weights * values)
    drawn = np.random.default_rng(0).integers(len(weight), size=(resamples, len(weight)))
    means = total[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{total.sum() / weight.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def comparison(
    values: Mapping[str, Array], columns: Mapping[str, Array], groups: np.ndarray, *, resamples: int = 2000
) -> str:
    """Gives a Markdown table: each density's mean, and the first one's minus it.

    Args:
        values: from a density's name to its log values (n,); the first is ours.
        columns: from a heading to the boxes' weights (n,); 0 leaves a box out.
        groups: (n,) patients.
        resamples: of the patients.
    """
    ours = next(iter(values.values()))
    lines = ["| density | " + " | ".join(f"{heading} | ours minus it" for heading in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for name, value in values.items():
        cells = [name]
        for weights in columns.values():
            part = weights > 0
            cells.append(interval(value[part], weights[part], groups[part], resamples=resamples))
            difference = interval((ours - value)[part], weights[part], groups[part], resamples=resamples)
            cells.append("" if value is ours else difference)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class _Gaussian:
    """One normal distribution of all four coordinates, cut to the support."""

    def __init__(self, known: Points, support: Support) -> None:
        weights = known.weights / known.weights.sum()
        self.mean, self.support = weights @ known.points, support
        covariance = (weights[:, None] * (known.points - self.mean)).T @ (known.points - self.mean)
        self.covariance = covariance + np.diag((SMALLEST_STD**2 - covariance.diagonal()).clip(min=0))
        draws = np.random.default_rng(0).multivariate_normal(self.mean, self.covariance, DRAWS)
        self.log_mass = float(np.log(_mass(draws, support)))

    def log_prob(self, points: Array) -> Array:
        off = points - self.mean
        distance = np.einsum("ij,jk,ik->i", off, np.linalg.inv(self.covariance), off)
        log_norm = np.linalg.slogdet(2 * np.pi * self.covariance)[1] / 2
        return np.where(self.support.contains(points), -distance / 2 - log_norm - self.log_mass, -np.inf)


class _PlaceAlone:
    """A kernel density of the centre; log size and log aspect uniform in their bounds; cut to the support."""

    def __init__(self, position: BoxDensity) -> None:
        self.position, self.support = position, position.support
        (low, high), aspect = np.log(self.support.size_bounds), np.log(self.support.max_aspect)
        rng = np.random.default_rng(0)
        kernels = position.kernels[rng.choice(len(position.kernels), DRAWS, p=position.weights), :2]
        places = kernels + position.bandwidths[:2] * rng.standard_normal((DRAWS, 2))
        sizes = rng.uniform([low, -aspect], [high, aspect], (DRAWS, 2))
        self.log_volume = float(np.log((high - low) * 2 * aspect))
        self.log_mass = float(np.log(_mass(np.concatenate([places, sizes], 1), self.support)))

    def log_prob(self, points: Array) -> Array:
        off = (points[:, None, :2] - self.position.kernels[None, :, :2]) / self.position.bandwidths[:2]
        norm = 2 * np.pi * self.position.bandwidths[:2].prod()
        place = np.exp(-0.5 * (off**2).sum(2)) @ self.position.weights / norm
        with np.errstate(divide="ignore"):
            density = np.log(place) - self.log_volume - self.log_mass
        return np.where(self.support.contains(points), density, -np.inf)


def _uniform_draws(density: BoxDensity) -> Array:
    rng, field = np.random.default_rng(0), density.support.field
    cells = np.argwhere(field)[rng.integers(field.sum(), size=DRAWS), ::-1]
    sizes = density.broad[[1, 3]] + density.broad[[2, 4]] * rng.standard_normal((DRAWS, 2))
    return np.concatenate([(cells + rng.random((DRAWS, 2))) / FIELD_SIZE, sizes], 1)


def _mass(draws: Array, support: Support) -> float:
    return float(support.contains(draws).mean())
