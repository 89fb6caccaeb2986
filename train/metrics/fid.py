"""Distances between two sets of features of any encoder: Fréchet's and the kernel's.

Fréchet's is biased upwards at small N, so it is only to be set beside another one at the same N; the kernel's is
unbiased, so that two samples of the same images give 0 on average.
"""

import torch
from torch import Tensor

from train.metrics.statistics import check_draws, interval, resample


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |mean(a) - mean(b)|^2 + trace(A + B - 2 sqrt(A B)) of features a (N, D) and b (M, D), N and M >= 2.

    With x the centred features over sqrt(N - 1), the unbiased covariance A = x^T x, and the square root's trace is the
    nuclear norm of x y^T: no square root of a matrix without full rank is taken, so N may be less than D. A scalar
    float64, >= 0.

    Reference:
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
    """
    a, b = _check(a, b)
    x, y = _root(a), _root(b)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return distance.clamp(min=0)


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of features a (N, D) and b (M, D), N and M >= 2.

    The kernel is (x . y / D + 1)^3. A scalar float64, below 0 by chance where both sets come from one distribution.

    Reference:
        Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", 2018.
    """
    a, b = _check(a, b)
    n, m = len(a), len(b)
    within = _off_diagonal(_kernel(a, a)).sum() / (n * (n - 1)) + _off_diagonal(_kernel(b, b)).sum() / (m * (m - 1))
    return within - 2 * _kernel(a, b).mean()


def kernel_interval(a: Tensor, b: Tensor, *, generator: torch.Generator, draws: int = 1000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of `kernel_distance`, sets of at least 3 rows resampled row by row.

    Rows must be independent (one image a patient). A row drawn twice makes no pair with itself: such pairs would shift
    every resample upwards. The generator is on the CPU; at least 2 draws.
    """
    a, b = _check(a, b, least=3)
    check_draws(draws)
    u, v = (resample(len(rows), draws, generator=generator).to(rows) for rows in (a, b))

    def within(kernel: Tensor, times: Tensor) -> Tensor:
        pairs = times.sum(1).square() - times.square().sum(1)
        return ((times @ _off_diagonal(kernel)) * times).sum(1) / pairs.clamp(min=1)

    across = ((u @ _kernel(a, b)) * v).sum(1) / (len(a) * len(b))
    low, high = interval(within(_kernel(a, a), u) + within(_kernel(b, b), v) - 2 * across).tolist()
    return low, high


def _check(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < least:
            raise ValueError(f"{name} must be (N, D) with N >= {least}, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} must be finite, got {features[~features.isfinite()][0].item()}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return a.double(), b.double()


def _root(features: Tensor) -> Tensor:
    """Return a matrix r of at most D rows with r^T r the covariance."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred).R if len(centred) > centred.shape[1] else centred


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel - torch.diag(kernel.diagonal())
