"""Statistics of scores: areas under the ROC curve, rates, tests between two classifiers, 95 % intervals.

A nodule is the positive class, and a higher score is surer of one. Labels are (N,) bool, or int in {0, 1}.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest, ttest_rel, wilcoxon
from torch import Tensor

_CHUNK = 250  # bootstrap samples at a time


def check_scores(scores: Tensor, labels: Tensor, *, least: int = 0) -> tuple[Tensor, Tensor]:
    """Return finite scores (N,) as float64 and labels (N,) as bool, `least` of each class; else raise ValueError."""
    if scores.ndim != 1 or labels.shape != scores.shape or not len(scores):
        raise ValueError(
            f"scores and labels must be (N,) each with N >= 1, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {scores[~scores.isfinite()][0].item()}")
    nodule, known = labels == 1, (labels == 1) | (labels == 0)
    if not bool(known.all()):
        raise ValueError(f"labels must be 0 or 1, got {labels[~known][0].item()}")
    positives = int(nodule.sum())
    if min(positives, len(labels) - positives) < least:
        raise ValueError(
            f"labels must hold at least {least} of each class, got {positives} nodules in {len(labels)} images"
        )
    return scores.double(), nodule


# --- Area under the ROC curve ---
def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the area under the ROC curve, how often a positive's score (P,) beats a negative's (M,), ties half."""
    return _share_below(positive, among=negative).mean()


def weighted_auc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return areas under the ROC curve (D,) float64 of scores (N,) under weights (D, N) >= 0, after one sorting.

    A weight is how much an image counts; ties count half; the area is NaN where a class has no weight.
    """
    scores, nodule = check_scores(scores, labels, least=1)
    if weights.ndim != 2 or weights.shape[1:] != scores.shape:
        raise ValueError(f"weights must be (D, {len(scores)}), got {tuple(weights.shape)}")
    weights = weights.double()
    ordered, order = scores[~nodule].sort()
    below, up_to = (torch.searchsorted(ordered, scores[nodule], right=right) for right in (False, True))
    # The normal images' weight up to each place, and so below and up to each nodule image's score.
    mass = torch.nn.functional.pad(weights[:, ~nodule][:, order].cumsum(dim=1), (1, 0))
    won = weights[:, nodule] * (mass[:, below] + mass[:, up_to])
    return won.sum(dim=1) / (2 * weights[:, nodule].sum(dim=1) * mass[:, -1])


def auc_interval(
    positive: Tensor,
    negative: Tensor,
    positive_patients: Tensor,
    negative_patients: Tensor,
    *,
    generator: torch.Generator,
    draws: int = 2000,
) -> tuple[float, float]:
    """Return the bootstrap interval of `auc`, nodule and normal patients resampled apart, with all their images."""
    scores = torch.cat([positive, negative])
    labels = torch.arange(len(scores), device=scores.device) < len(positive)
    areas = []
    for start in range(0, draws, _CHUNK):
        n = min(_CHUNK, draws - start)
        times = [resample_patients(p, n, generator=generator) for p in (positive_patients, negative_patients)]
        areas.append(weighted_auc(scores, labels, torch.cat(times, dim=1).to(scores.device)))
    low, high = interval(torch.cat(areas)).tolist()
    return low, high


def _share_below(values: Tensor, *, among: Tensor) -> Tensor:
    """Return the share of `among` that lies below each value, float64, ties counting half."""
    ordered = among.sort().values
    below, up_to = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(ordered))


# --- Rates of decisions ---
class Rates(NamedTuple):
    """Six shares in [0, 1] of one confusion matrix; NaN where the share is of nothing."""

    accuracy: float
    sensitivity: float
    specificity: float
    precision: float
    f1: float
    npv: float


def rates(scores: Tensor, labels: Tensor, *, threshold: float = 0.5, weights: Tensor | None = None) -> Rates:
    """Return the rates of decisions: an image is called positive at `threshold` or above; weights (N,) >= 0 count it.

    NaN for precision where nothing is called positive, for npv where nothing is called negative, for sensitivity
    without a nodule, for specificity without a normal image, and for f1 = 2 TP / (2 TP + FP + FN) where nothing is
    positive nor called so.
    """
    scores, nodule = check_scores(scores, labels)
    weights = torch.ones_like(scores) if weights is None else weights
    if weights.shape != scores.shape or not (weights.isfinite().all() and bool((weights >= 0).all())):
        raise ValueError(f"weights must be {tuple(scores.shape)}, finite and at least 0, got {tuple(weights.shape)}")
    called = scores >= threshold
    cells = (called & nodule, called & ~nodule, ~called & nodule, ~called & ~nodule)
    tp, fp, fn, tn = (weights.double()[cell].sum().item() for cell in cells)
    parts = {"accuracy": (tp + tn, fp + fn), "sensitivity": (tp, fn), "specificity": (tn, fp), "precision": (tp, fp)}
    parts |= {"f1": (2 * tp, fp + fn), "npv": (tn, fn)}
    shares = {name: right / (right + wrong) if right + wrong else math.nan for name, (right, wrong) in parts.items()}
    return Rates(**shares)


def balanced_weights(labels: Tensor) -> Tensor:
    """Return weights (N,) float64, 1 for nodule images, under which normal ones count as much: Ann's test is 50/50."""
    _, nodule = check_scores(torch.zeros(labels.shape, device=labels.device), labels, least=1)
    ratio = nodule.double().mean() / (~nodule).double().mean()
    return torch.where(nodule, torch.ones_like(ratio), ratio)


def sensitivity_at(scores: Tensor, labels: Tensor, *, specificity: float = 0.9) -> float:
    """Return the largest sensitivity of any threshold with at least this specificity, at the ROC curve's own points."""
    scores, nodule = check_scores(scores, labels, least=1)
    if not 0 <= specificity <= 1:
        raise ValueError(f"specificity must be in [0, 1], got {specificity}")
    positive, normal = scores[nodule], scores[~nodule].sort().values
    # With the threshold at a nodule's own score, the normal images below that score are the true negatives.
    reached = torch.searchsorted(normal, positive).double() / len(normal)
    return (reached >= specificity).double().mean().item()


# --- Two classifiers on the same images ---
class DeLong(NamedTuple):
    """Two areas under the ROC curve of the same images: auc_a - auc_b, z = difference / standard error, two-sided p."""

    auc_a: float
    auc_b: float
    difference: float
    standard_error: float
    z: float
    p: float
    interval: tuple[float, float]


def delong(scores_a: Tensor, scores_b: Tensor, labels: Tensor) -> DeLong:
    """Return the difference of two correlated areas under the ROC curve, with its test, without resampling.

    Images must be independent: one a patient, or else the standard error is too small and `paired_bootstrap` is to be
    used; each class needs two. The test knows one run of each classifier, not how runs differ. Where the standard error
    is 0, z and p are 0 and 1 if the curves have one area (the same scores, or two perfect ones), else NaN: then the
    images say nothing of the uncertainty.

    Reference:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
        characteristic curves: a nonparametric approach", Biometrics 1988. Sun and Xu, "Fast implementation of
        DeLong's algorithm for comparing the areas under correlated ROC curves", IEEE Signal Processing Letters 2014.
    """
    positive_a, negative_a = _components(scores_a, labels)
    positive_b, negative_b = _components(scores_b, labels)
    difference = (positive_a - positive_b).mean().item()
    variances = [gaps.var() / len(gaps) for gaps in (positive_a - positive_b, negative_a - negative_b)]
    error = sum(variances, torch.zeros(())).sqrt().item()
    reach = NormalDist().inv_cdf(0.975) * error
    z = difference / error if error else (0.0 if difference == 0 else math.nan)
    p = math.erfc(abs(z) / math.sqrt(2))
    areas = positive_a.mean().item(), positive_b.mean().item()
    return DeLong(*areas, difference, error, z, p, (difference - reach, difference + reach))


def _components(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each nodule's (P,) and other image's (N - P,) share of the other class on its right side, ties half."""
    scores, nodule = check_scores(scores, labels, least=2)
    positive, negative = scores[nodule], scores[~nodule]
    return _share_below(positive, among=negative), 1 - _share_below(negative, among=positive)


class Comparison(NamedTuple):
    """Two arms' mean areas under the ROC curve, percentile intervals, auc_a - auc_b, and its two-sided p."""

    auc_a: float
    auc_b: float
    difference: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    interval: tuple[float, float]
    p: float


def paired_bootstrap(
    scores_a: Tensor,  # (R, N) float, run by image
    scores_b: Tensor,  # (R, N) float, of the same images; run r shares its seed with run r of `scores_a`
    labels: Tensor,  # (N,), of both classes
    patients: Tensor,  # (N,) int64
    *,
    generator: torch.Generator,
    draws: int = 2000,  # bootstrap samples, at least 2
) -> Comparison:
    """Return the difference of two arms' mean areas under the ROC curve, resampling patients and seeds.

    An arm is several runs, one a seed, that score the same images. Both patients and seeds are samples of what could
    have been: a bootstrap sample draws patients with all their images, and apart from that pairs of runs; a sample
    without both classes is repeated. Of few seeds a bootstrap sees (R - 1) / R of the variance between seeds: where
    runs differ much, 95 % intervals of 3 runs cover some 90 %, those of 5 runs come out right. p is twice the smaller
    share of samples on either side of 0, the measured one counted in: at least 2 / (draws + 1).

    Reference:
        Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007: two crossed factors resampled apart.
    """
    if scores_a.ndim != 2 or scores_a.shape != scores_b.shape or not scores_a.numel():
        raise ValueError(
            f"scores_a and scores_b must be (R, N) both, got {tuple(scores_a.shape)} and {tuple(scores_b.shape)}"
        )
    runs, images = scores_a.shape
    if labels.shape != (images,) or patients.shape != (images,):
        raise ValueError(
            f"labels and patients must be ({images},) each, got {tuple(labels.shape)} and {tuple(patients.shape)}"
        )
    check_draws(draws)
    arms, nodule = torch.stack([scores_a, scores_b]), labels == 1

    def areas(weights: Tensor) -> Tensor:  # (2, R, D)
        return torch.stack([torch.stack([weighted_auc(run, labels, weights) for run in arm]) for arm in arms])

    measured = areas(torch.ones(1, images, device=arms.device))[..., 0].mean(dim=1)

    # Areas (2, draws) of samples that hold both classes.
    parts: list[Tensor] = []
    while sum(part.shape[1] for part in parts) < draws:
        weights = resample_patients(patients, _CHUNK, generator=generator).to(arms.device)
        seeds = resample(runs, _CHUNK, generator=generator).to(arms.device) / runs
        both = weights[:, nodule].any(dim=1) & weights[:, ~nodule].any(dim=1)
        parts.append((areas(weights[both]) * seeds[both].T).sum(dim=1))
    samples = torch.cat(parts, dim=1)[:, :draws]

    differences = samples[0] - samples[1]
    lows, highs = interval(torch.stack([*samples, differences], dim=1)).tolist()
    interval_a, interval_b, between = zip(lows, highs, strict=True)
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    auc_a, auc_b = measured.tolist()
    p = min(1.0, 2 * (fewer + 1) / (draws + 1))
    return Comparison(auc_a, auc_b, auc_a - auc_b, interval_a, interval_b, between, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many comparisons were made: below 0.05 stays an error rate of 0.05.

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


# --- Two samples ---
def paired_test(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return the paired t-test of two samples (n,), with what it leaves out.

    "n"; "value", the mean of first - second, with "low" and "high", its interval by Student's t; "t" and "p", two-sided
    (0 where p is below the least float); "cohens_d", the mean over the standard deviation of the differences; "above",
    the share of differences above 0; "rank_p" of Wilcoxon's signed-rank test, two-sided. NaN where there are fewer than
    two pairs or no difference varies.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"first and second must be (n,) both, got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = first.double().numpy(), second.double().numpy()
    change = a - b
    names = ("value", "low", "high", "t", "p", "cohens_d", "above", "rank_p")
    if len(change) < 2 or change.std() == 0:
        return {"n": len(change), **dict.fromkeys(names, math.nan)}
    test = ttest_rel(a, b)
    mean, ends = change.mean(), test.confidence_interval(0.95)
    effect, above = mean / change.std(ddof=1), (change > 0).mean()
    values = (mean, ends.low, ends.high, test.statistic, test.pvalue, effect, above, wilcoxon(change).pvalue)
    return {"n": len(change), **{name: float(value) for name, value in zip(names, values, strict=True)}}


def neighbour_mixing(first: Tensor, second: Tensor, *, k: int = 10, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return the share of the first set's (n, d) k nearest neighbours, among both sets, that are of the second (m, d).

    "value" with "low" and "high", its interval over the first set's points, taken to be independent; "expected",
    m / (n + m - 1), the share if the sets were one; "ratio", value / expected; "mixed", the middle 95 % of the shares
    of `draws` permutations of which point is of which set; "p", how often these are as small: 1 / (draws + 1) at least.

    Reference:
        Schilling, "Multivariate two-sample tests based on nearest neighbors", JASA 1986; Henze, "A multivariate
        two-sample test based on the number of nearest neighbor type coincidences", Annals of Statistics 1988.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ValueError(f"first and second must be (n, d) and (m, d), got {tuple(first.shape)}, {tuple(second.shape)}")
    n, total = len(first), len(first) + len(second)
    if not 1 <= k < total:
        raise ValueError(f"k must be at least 1 and less than the {total} points, got {k}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    points = torch.cat([first, second]).double()
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = distances.topk(k, largest=False).indices  # (n + m, k)

    def shares(is_second: Tensor) -> Tensor:
        return is_second[nearest[~is_second]].double().mean(dim=1)

    is_second, generator = torch.arange(total) >= n, torch.Generator().manual_seed(seed)
    orders = (torch.randperm(total, generator=generator) for _ in range(draws))
    mixed = torch.stack([shares(is_second[order]).mean() for order in orders])
    found, (low, high) = average(shares(is_second)), interval(mixed).tolist()
    value, expected = found["value"], len(second) / (total - 1)
    p = (1 + int((mixed <= value).sum())) / (draws + 1)
    return {**found, "expected": expected, "ratio": value / expected, "mixed": {"low": low, "high": high}, "p": p}


# --- Resampling and intervals ---
def resample(n: int, draws: int, *, generator: torch.Generator) -> Tensor:
    """Return how often each of n things comes in n draws with replacement, (draws, n) float64."""
    rows = torch.randint(n, (draws, n), generator=generator, device=generator.device)
    times = torch.zeros(draws, n, dtype=torch.float64, device=generator.device)
    return times.scatter_add_(1, rows, torch.ones_like(times))


def resample_patients(patients: Tensor, draws: int, *, generator: torch.Generator) -> Tensor:
    """Return how often each image comes where patients (N,) are resampled with all their images, (draws, N) float64."""
    names, index = patients.unique(return_inverse=True)
    return resample(len(names), draws, generator=generator)[:, index.to(generator.device)]


def check_draws(draws: int) -> None:
    """Raise ValueError unless there are at least 2 bootstrap samples."""
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")


def interval(values: Tensor) -> Tensor:
    """Return the middle 95 % of bootstrap values (D, ...) as (2, ...), low and high; NaN draws are left out."""
    ends = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=torch.float64, device=values.device)
    return values.double().nanquantile(ends, dim=0)


def estimate(value: float, ends: tuple[float, float]) -> dict[str, float]:
    """Return a number and its interval, as JSON has it."""
    return {"value": value, "low": ends[0], "high": ends[1]}


def spread(values: Tensor) -> dict[str, float]:
    """Return median, quartiles and the middle 95 % of values (n,); NaN for none."""
    at = torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975], dtype=torch.float64)
    ends = values.double().quantile(at) if len(values) else torch.full((5,), torch.nan)
    return dict(zip(("low", "q1", "value", "q3", "high"), ends.tolist(), strict=True))


def average(values: Tensor) -> dict[str, float]:
    """Return the mean of values (n,) and its normal interval."""
    mean, half = float(values.double().mean()), 1.96 * float(values.double().std()) / len(values) ** 0.5
    return estimate(mean, (mean - half, mean + half))


def share(hits: Tensor) -> dict[str, float]:
    """Return the share of a bool tensor (n,) that is true, with Wilson's interval."""
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return estimate(float(hits.double().mean()), (float(found.low), float(found.high)))
