"""DeLong's test: are two ROC curves of the same films equally good, without resampling (METHOD 8, Table 2).

Films must be independent: one a patient, or else the standard error is too small and the bootstrap over patients of
`comparison` is to be used. The test knows one run of each classifier, not how runs differ.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class DeLong(NamedTuple):
    """Two areas under the ROC curve of the same films, compared.

    Attributes:
        auc_a: of the first scores.
        auc_b: of the second scores.
        difference: auc_a - auc_b.
        standard_error: of the difference.
        z: difference over its standard error.
        p: two-sided.
        interval: of the difference, lower and upper end.
    """

    auc_a: float
    auc_b: float
    difference: float
    standard_error: float
    z: float
    p: float
    interval: tuple[float, float]


def delong(scores_a: Tensor, scores_b: Tensor, labels: Tensor, *, level: float = 0.95) -> DeLong:
    """Gives the difference of two correlated areas under the ROC curve, with its test.

    Args:
        scores_a: (N,) float, higher is surer of a nodule.
        scores_b: (N,) float, of the same films.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule; at least two films of each.
        level: of the interval, in (0, 1).

    Returns:
        The comparison. Where the standard error is 0, z and p are 0 and 1 if the curves have one area (the same
        scores, or two perfect ones), else NaN: then the films say nothing of the uncertainty.

    Raises:
        ValueError: shapes, scores, labels or level that do not fit.

    Reference:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
        characteristic curves: a nonparametric approach", Biometrics 1988. Sun and Xu, "Fast implementation of
        DeLong's algorithm for comparing the areas under correlated ROC curves", IEEE Signal Processing Letters 2014.
    """
    positive_a, negative_a = _components(scores_a, labels)
    positive_b, negative_b = _components(scores_b, labels)
    quantile = _quantile(level)
    auc_a, auc_b = positive_a.mean().item(), positive_b.mean().item()
    difference = (positive_a - positive_b).mean().item()
    error = _standard_error(positive_a - positive_b, negative_a - negative_b)
    z = difference / error if error else (0.0 if difference == 0 else math.nan)
    interval = (difference - quantile * error, difference + quantile * error)
    return DeLong(auc_a, auc_b, difference, error, z, math.erfc(abs(z) / math.sqrt(2)), interval)


def delong_interval(scores: Tensor, labels: Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """Gives an interval of one area under the ROC curve, cut to [0, 1].

    Args:
        scores: (N,) float, higher is surer of a nodule.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule; at least two films of each.
        level: of the interval, in (0, 1).

    Returns:
        Its lower and upper end; both are the area itself where the scores part the classes without an error.

    Raises:
        ValueError: as in `delong`.
    """
    positive, negative = _components(scores, labels)
    area, reach = positive.mean().item(), _quantile(level) * _standard_error(positive, negative)
    return max(area - reach, 0.0), min(area + reach, 1.0)


def _components(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the structural components: each film's share of films of the other class on its right side, ties half.

    That is Sun and Xu's difference of mid-ranks, among all films less among its own class, over the other class's
    size; sorting and searching give it in N log N.

    Returns:
        (P,) of the nodule films, (N - P,) of the others; float64, both of mean AUC.
    """
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"scores and labels must be (N,) each, got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {scores[~scores.isfinite()][0].item()}")
    nodule = labels == 1
    if not bool((nodule | (labels == 0)).all()):
        raise ValueError(f"labels must be 0 or 1, got {labels[~(nodule | (labels == 0))][0].item()}")
    positive, negative = scores[nodule].double(), scores[~nodule].double()
    if len(positive) < 2 or len(negative) < 2:
        raise ValueError(f"labels must hold at least two of each class, got {len(positive)} and {len(negative)}")
    return _rank(positive, among=negative), 1 - _rank(negative, among=positive)


def _rank(values: Tensor, *, among: Tensor) -> Tensor:
    """Gives the share of `among` that lies below each value, ties counting half."""
    ordered = among.sort().values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * len(ordered))


def _standard_error(positive: Tensor, negative: Tensor) -> float:
    return (positive.var() / len(positive) + negative.var() / len(negative)).sqrt().item()


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
