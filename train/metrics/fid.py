"""Distances between two sets of features: Fréchet's and the kernel's (METHOD 8, Table 1; EVIDENCE, Quality).

Both are functions of features that any encoder gave. Fréchet's is biased upwards at small N, so it is only to be set
beside another one at the same N; the kernel's is unbiased, so that two samples of the same films give 0 on average.
"""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """Gives |mean(a) - mean(b)|^2 + trace(A + B - 2 sqrt(A B)), with A and B the unbiased covariances.

    With x the centred features over sqrt(N - 1), A = x^T x, and the square root's trace is the nuclear norm of
    x y^T: no square root of a matrix without full rank is taken, so N may be less than D.

    Args:
        a: (N, D) features, N >= 2.
        b: (M, D) features, M >= 2.

    Returns:
        Scalar float64, >= 0.

    Raises:
        ValueError: the shapes do not fit, a set is smaller than 2, or a value is not finite.

    Reference:
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
    """
    a, b = _checked(a, b)
    x, y = _root(a), _root(b)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return distance.clamp(min=0)


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Gives the unbiased estimate of the squared maximum mean discrepancy, with kernel (x . y / D + 1)^3.

    Args:
        a: (N, D) features, N >= 2.
        b: (M, D) features, M >= 2; M need not be N.

    Returns:
        Scalar float64; below 0 by chance where both sets come from one distribution.

    Raises:
        ValueError: as in `frechet_distance`.

    Reference:
        Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", 2018.
    """
    a, b = _checked(a, b)
    n, m = len(a), len(b)
    within = _off_diagonal(_kernel(a, a)).sum() / (n * (n - 1)) + _off_diagonal(_kernel(b, b)).sum() / (m * (m - 1))
    return within - 2 * _kernel(a, b).mean()


def kernel_interval(
    a: Tensor, b: Tensor, *, generator: torch.Generator, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Gives a bootstrap interval of `kernel_distance`, both sets resampled row by row.

    A row drawn twice makes no pair with itself: such pairs would shift every resample upwards.

    Args:
        a: (N, D) features, N >= 3; rows must be independent (one film a patient).
        b: (M, D) features, M >= 3.
        generator: random stream on the CPU.
        draws: bootstrap samples.
        level: of the interval, in (0, 1).

    Returns:
        Its lower and upper end.

    Raises:
        ValueError: as in `frechet_distance`, or draws or level out of range.
    """
    a, b = _checked(a, b, least=3)
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 2 and level in (0, 1), got {draws} and {level}")
    aa, bb, ab = _off_diagonal(_kernel(a, a)), _off_diagonal(_kernel(b, b)), _kernel(a, b)
    u, v = (_resampled(len(rows), draws, generator).to(rows) for rows in (a, b))

    def within(kernel: Tensor, times: Tensor) -> Tensor:
        pairs = times.sum(1).square() - times.square().sum(1)
        return ((times @ kernel) * times).sum(1) / pairs.clamp(min=1)

    values = within(aa, u) + within(bb, v) - 2 * ((u @ ab) * v).sum(1) / (len(a) * len(b))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype, device=values.device)
    low, high = values.quantile(ends).tolist()
    return low, high


def _checked(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < least:
            raise ValueError(f"{name} must be (N, D) with N >= {least}, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} must be finite, got {features[~features.isfinite()][0].item()}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return a.double(), b.double()


def _root(features: Tensor) -> Tensor:
    """Gives a matrix r of at most D rows with r^T r the covariance."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred).R if len(centred) > centred.shape[1] else centred


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel - torch.diag(kernel.diagonal())


def _resampled(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """Gives how often each of n rows is drawn, (draws, n)."""
    rows = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n, dtype=torch.int64).scatter_add_(1, rows, torch.ones_like(rows))
