"""Two arms of a downstream experiment compared over films and seeds (METHOD 8, 9; Table 2).

An arm is several runs, one a seed, that score the same films. Both patients and seeds are samples of what could have
been, so both are resampled; run r of one arm stands beside run r of the other (same split, same start).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 250  # bootstrap samples at a time


class Comparison(NamedTuple):
    """Two arms' areas under the ROC curve, means over seeds, with bootstrap intervals (lower and upper end).

    Attributes:
        auc_a: of the first arm.
        auc_b: of the second arm.
        difference: auc_a - auc_b.
        interval_a: of auc_a.
        interval_b: of auc_b.
        interval: of the difference, paired.
        p: two-sided, of no difference; at least 2 / (draws + 1).
    """

    auc_a: float
    auc_b: float
    difference: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    interval: tuple[float, float]
    p: float


def paired_bootstrap(
    scores_a: Tensor,
    scores_b: Tensor,
    labels: Tensor,
    patients: Tensor,
    *,
    generator: torch.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> Comparison:
    """Gives the difference of two arms' mean areas under the ROC curve, resampling patients and seeds.

    A bootstrap sample draws patients with all their films, and apart from that pairs of runs; a sample without both
    classes is drawn anew. Of few seeds a bootstrap sees (R - 1) / R of the variance between seeds: where runs differ
    much, 95 % intervals of 3 runs cover some 90 %, those of 5 runs come out right. One run tells of the films alone.

    Args:
        scores_a: (R, N) float, run by film, higher is surer of a nodule.
        scores_b: (R, N) float, of the same films; run r shares its seed with run r of `scores_a`.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule.
        patients: (N,) int64, whose each film is.
        generator: random stream.
        draws: bootstrap samples.
        level: of the percentile intervals, in (0, 1).

    Returns:
        The comparison. p is twice the smaller share of samples on either side of 0, the measured one counted in.

    Raises:
        ValueError: shapes, scores, labels, draws or level that do not fit.

    Reference:
        Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007: two crossed factors resampled apart.
    """
    if scores_a.ndim != 2 or scores_a.shape != scores_b.shape or not scores_a.numel():
        raise ValueError(
            f"scores_a and scores_b must be (R, N) both, got {tuple(scores_a.shape)} and {tuple(scores_b.shape)}"
        )
    runs, films = scores_a.shape
    if labels.shape != (films,) or patients.shape != (films,):
        raise ValueError(
            f"labels and patients must be ({films},) each, got {tuple(labels.shape)} and {tuple(patients.shape)}"
        )
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 2 and level in (0, 1), got {draws} and {level}")
    arms = torch.stack([scores_a, scores_b])
    areas = _areas(arms, labels, torch.ones(1, films, dtype=torch.float64, device=arms.device))[..., 0].mean(dim=1)

    # Areas (2, draws) of samples that hold both classes.
    names, index = patients.unique(return_inverse=True)
    index, nodule = index.to(arms.device), labels == 1
    parts: list[Tensor] = []
    while sum(part.shape[1] for part in parts) < draws:
        weights = _drawn(len(names), generator).to(arms.device)[:, index]
        seeds = _drawn(runs, generator).to(arms.device) / runs
        both = weights[:, nodule].any(dim=1) & weights[:, ~nodule].any(dim=1)
        parts.append((_areas(arms, labels, weights[both]) * seeds[both].T).sum(dim=1))
    samples = torch.cat(parts, dim=1)[:, :draws]

    # Intervals are of the samples' middle.
    differences = samples[0] - samples[1]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=arms.device)
    lows, highs = torch.stack([*samples, differences]).quantile(ends, dim=1).tolist()
    interval_a, interval_b, interval = zip(lows, highs, strict=True)
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p = min(1.0, 2 * (fewer + 1) / (draws + 1))
    auc_a, auc_b = areas.tolist()
    return Comparison(auc_a, auc_b, auc_a - auc_b, interval_a, interval_b, interval, p)


def weighted_auc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Gives areas under the ROC curve of one set of scores under many sets of weights, after one sorting.

    Args:
        scores: (N,) float, higher is surer of a nodule; ties count half.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule.
        weights: (D, N) >= 0, how much each film counts.

    Returns:
        (D,) float64 in [0, 1]; NaN where a class has no weight.

    Raises:
        ValueError: shapes, scores or labels that do not fit, or labels of one class only.
    """
    if scores.ndim != 1 or labels.shape != scores.shape or weights.ndim != 2 or weights.shape[1:] != scores.shape:
        raise ValueError(
            "scores, labels and weights must be (N,), (N,) and (D, N), "
            f"got {tuple(scores.shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {scores[~scores.isfinite()][0].item()}")
    nodule = labels == 1
    if not bool((nodule | (labels == 0)).all()):
        raise ValueError(f"labels must be 0 or 1, got {labels[~(nodule | (labels == 0))][0].item()}")
    if bool(nodule.all()) or not bool(nodule.any()):
        raise ValueError(f"labels must hold both classes, got {int(nodule.sum())} nodules in {len(labels)} films")
    weights = weights.double()
    ordered, order = scores[~nodule].sort()
    positive = scores[nodule].contiguous()
    below, up_to = torch.searchsorted(ordered, positive), torch.searchsorted(ordered, positive, right=True)
    # Weight of normal films up to each place, and so below and up to each nodule film's score.
    mass = torch.nn.functional.pad(weights[:, ~nodule][:, order].cumsum(dim=1), (1, 0))
    won = weights[:, nodule] * (mass[:, below] + mass[:, up_to])
    return won.sum(dim=1) / (2 * weights[:, nodule].sum(dim=1) * mass[:, -1])


def holm(p_values: Sequence[float]) -> list[float]:
    """Gives p-values adjusted for how many comparisons were made, after Holm: below 0.05 stays an error rate of 0.05.

    Args:
        p_values: one of each comparison of a family, in [0, 1].

    Returns:
        The adjusted ones, in the same order, none smaller than its own p.

    Raises:
        ValueError: a value is no probability.
        ImportError: statsmodels is not there.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p_values must be in [0, 1], got {p}")
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise ImportError("holm needs statsmodels: pip install 'carim-aug[eval]'") from error
    return multipletests(list(p_values), method="holm")[1].tolist() if len(p_values) else []


def _areas(arms: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Gives (2, R, D) areas of two arms' runs (2, R, N) under weights (D, N)."""
    areas = torch.stack([weighted_auc(scores, labels, weights) for scores in arms.flatten(0, 1)])
    return areas.unflatten(0, arms.shape[:2])


def _drawn(n: int, generator: torch.Generator) -> Tensor:
    """Gives how often each of n things is drawn in n draws with replacement, (_CHUNK, n) float64."""
    drawn = torch.randint(n, (_CHUNK, n), generator=generator, device=generator.device)
    times = torch.zeros(_CHUNK, n, dtype=torch.float64, device=generator.device)
    return times.scatter_add_(1, drawn, torch.ones_like(times))
