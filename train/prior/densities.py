"""Simpler densities of a nodule box beside the location prior's, and the tables that compare them.

All are over (x, y, log size, log aspect) with image sides 1, fitted on the same points and cut to one support.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from carim_aug.location.density import SMALLEST_STD, Array, BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.ops.lungs import FIELD_SIZE

DRAWS = 2**19


class Density(Protocol):
    """Whatever has a density of points."""

    def log_prob(self, points: Array) -> Array:
        """Return the natural log of the density at points (m, 4): (m,)."""


class Points(NamedTuple):
    """Boxes as points."""

    points: Array  # (n, 4) centre x, centre y, log size, log aspect
    weights: Array  # (n,) >= 0
    groups: np.ndarray  # (n,) patients

    def of(self, chosen: np.ndarray) -> "Points":
        """Return the points chosen by an (n,) bool."""
        return Points(*(part[chosen] for part in self))

    def inside(self, support: Support) -> "Points":
        """Return the points in the support."""
        return self.of(support.contains(self.points))


def points_of(boxes: Sequence[Tensor], patients: Sequence[int], weights: Sequence[float] | None = None) -> Points:
    """Return boxes (k, 4), parts of the image's side, a patient's weight spread over them, times the image's, or 1."""
    counts = [len(of_image) for of_image in boxes]
    each = np.repeat(np.asarray(patients, dtype=np.int64), counts)
    _, groups = np.unique(each, return_inverse=True)
    points = boxes_to_points(torch.cat([torch.empty(0, 4), *boxes]).double().numpy(), 1, 1)
    image_weights = np.ones(len(counts)) if weights is None else np.asarray(weights, dtype=np.float64)
    return Points(points, np.repeat(image_weights, counts) / np.bincount(groups)[groups], each)


def simpler_densities(known: Points, support: Support) -> dict[str, Density]:
    """Return the densities that the location prior has to beat, fitted on points in the support."""
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
    """Fit a kernel density of the centre with log-normal size and aspect, independent of it."""
    return fit_density(*known, support, rhos=(0.0,), broad_shares=(0.0,), ties=(0.0,))


def cross_validate(
    known: Points, fits: Mapping[str, Callable[[set[int]], Density]], *, folds: int = 5
) -> dict[str, Array]:
    """Return each density's log values (n,) at points of patients that its function was not given to fit on."""
    patients, values = np.unique(known.groups), {name: np.zeros(len(known.points)) for name in fits}
    fold = np.random.default_rng(0).permutation(len(patients)) % folds
    for out in range(folds):
        held_out = np.isin(known.groups, patients[fold == out])
        for name, fit in fits.items():
            values[name][held_out] = fit(set(patients[fold != out].tolist())).log_prob(known.points[held_out])
    return values


def mean_interval(values: Array, weights: Array, groups: np.ndarray, *, resamples: int = 2000) -> str:
    """Return the weighted mean of values (n,) and its 95 % interval over patients resampled, as text."""
    _, group = np.unique(groups, return_inverse=True)
    weight, total = np.bincount(group, weights), np.bincount(group, weights * values)
    rows = np.random.default_rng(0).integers(len(weight), size=(resamples, len(weight)))
    low, high = np.quantile(total[rows].sum(1) / weight[rows].sum(1), (0.025, 0.975))
    return f"{total.sum() / weight.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def compare(
    values: Mapping[str, Array], columns: Mapping[str, Array], groups: np.ndarray, *, resamples: int = 2000
) -> str:
    """Return a Markdown table: each density's mean log value (n,), and the first one's minus it.

    A column has the boxes' weights (n,), 0 to leave one out; groups (n,) are patients, resampled for the intervals.
    """
    ours = next(iter(values.values()))
    lines = ["| density | " + " | ".join(f"{heading} | ours minus it" for heading in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for name, value in values.items():
        cells = [name]
        for weights in columns.values():
            part = weights > 0
            cells.append(mean_interval(value[part], weights[part], groups[part], resamples=resamples))
            difference = mean_interval((ours - value)[part], weights[part], groups[part], resamples=resamples)
            cells.append("" if value is ours else difference)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class _Gaussian:
    """One normal distribution of all four coordinates, cut to the support."""

    def __init__(self, known: Points, support: Support) -> None:
        weights, self.support = known.weights / known.weights.sum(), support
        mean = weights @ known.points
        covariance = (weights[:, None] * (known.points - mean)).T @ (known.points - mean)
        covariance += np.diag((SMALLEST_STD**2 - covariance.diagonal()).clip(min=0))
        self.normal = multivariate_normal(mean, covariance)
        self.log_mass = float(np.log(_mass(self.normal.rvs(DRAWS, random_state=0), support)))

    def log_prob(self, points: Array) -> Array:
        inside = self.support.contains(points)
        return np.where(inside, np.atleast_1d(self.normal.logpdf(points)) - self.log_mass, -np.inf)


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
