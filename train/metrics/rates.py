"""Rates of a classifier's decisions on films with and without a nodule, each by its definition (METHOD 8, 9; Table 2).

A nodule is the positive class. The source's test set holds as many normal films as nodule films; `balanced_weights`
gives any other test set that balance. What the source's printed Table 2 must mean is `corrected_reading`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """Six shares in [0, 1] of one confusion matrix; NaN where the share is of nothing."""

    accuracy: float
    sensitivity: float
    specificity: float
    precision: float
    f1: float
    npv: float


class CorrectedReading(NamedTuple):
    """What a column of the source's Table 2 says once its confusion matrix is transposed."""

    recall: float
    specificity: float
    precision: float
    accuracy: float


def rates(scores: Tensor, labels: Tensor, *, threshold: float = 0.5, weights: Tensor | None = None) -> Rates:
    """Gives accuracy, sensitivity, specificity, precision, F1 and negative predictive value of decisions.

    Args:
        scores: (N,) float, higher is surer of a nodule; a film is called positive at `threshold` or above.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule.
        threshold: in the scores' units.
        weights: (N,) >= 0, how much each film counts; None counts each once.

    Returns:
        Six floats. Undefined ones are NaN: precision where nothing is called positive, npv where nothing is called
        negative, sensitivity without a nodule film, specificity without a normal one, f1 = 2 TP / (2 TP + FP + FN)
        where nothing is positive nor called so (where nothing is called positive but nodules are there, f1 is 0).

    Raises:
        ValueError: shapes, labels, scores or weights that do not fit.
    """
    scores, nodule = _checked(scores, labels)
    if weights is None:
        weights = torch.ones_like(scores)
    if weights.shape != scores.shape or not (weights.isfinite().all() and bool((weights >= 0).all())):
        raise ValueError(f"weights must be {tuple(scores.shape)}, finite and at least 0, got {tuple(weights.shape)}")
    weights = weights.double()
    called = scores >= threshold

    def total(cell: Tensor) -> float:
        return weights[cell].sum().item()

    tp, fp, fn, tn = total(called & nodule), total(called & ~nodule), total(~called & nodule), total(~called & ~nodule)
    return Rates(
        accuracy=_share(tp + tn, tp + fp + fn + tn),
        sensitivity=_share(tp, tp + fn),
        specificity=_share(tn, tn + fp),
        precision=_share(tp, tp + fp),
        f1=_share(2 * tp, 2 * tp + fp + fn),
        npv=_share(tn, tn + fn),
    )


def balanced_weights(labels: Tensor) -> Tensor:
    """Gives weights under which normal films count as much in all as nodule films: the source's 50/50 test set.

    Args:
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule.

    Returns:
        (N,) float64: 1 for a nodule film, nodule films / normal films for a normal one.

    Raises:
        ValueError: labels that do not fit, or of one class only.
    """
    _, nodule = _checked(torch.zeros(labels.shape, device=labels.device), labels, both=True)
    ratio = nodule.double().mean() / (~nodule).double().mean()
    return torch.where(nodule, torch.ones_like(ratio), ratio)


def sensitivity_at(scores: Tensor, labels: Tensor, *, specificity: float = 0.9) -> float:
    """Gives the largest sensitivity that any threshold reaches with at least the specificity asked.

    The empirical ROC curve's own points count, with no line between them: a threshold that exists.

    Args:
        scores: (N,) float, higher is surer of a nodule.
        labels: (N,) bool, or int in {0, 1}: 1 is a nodule.
        specificity: least share in [0, 1] of normal films that score below the threshold.

    Returns:
        A float in [0, 1]; 0 where every threshold that finds a nodule is below the specificity asked.

    Raises:
        ValueError: scores or labels that do not fit, labels of one class only, or a specificity out of range.
    """
    scores, nodule = _checked(scores, labels, both=True)
    if not 0 <= specificity <= 1:
        raise ValueError(f"specificity must be in [0, 1], got {specificity}")
    positive, normal = scores[nodule], scores[~nodule].sort().values
    # With the threshold at a nodule's own score, the normal films below that score are the true negatives.
    reached = torch.searchsorted(normal, positive).double() / len(normal)
    return (reached >= specificity).double().mean().item()


def corrected_reading(
    accuracy: float, sensitivity: float, specificity: float, precision: float, *, tolerance: float = 2e-4
) -> CorrectedReading:
    """Gives what a column of the source's Table 2 must mean: its confusion matrix read transposed (METHOD 9, 1 to 3).

    Printed precision is the recall, printed sensitivity the precision, printed specificity the negative predictive
    value. With r the recall and p the precision, the specificity on as many normal as nodule films is
    1 - r (1 - p) / p.

    Args:
        accuracy: as printed.
        sensitivity: as printed, in (0, 1].
        specificity: as printed.
        precision: as printed.
        tolerance: what rounding to four digits may move the accuracy and the negative predictive value by.

    Returns:
        Recall, specificity, precision, and the accuracy as printed, which this reading gives too.

    Raises:
        ValueError: a figure is no share, or the figures fit no test set of two equal halves, read so (DS1's do not).
    """
    printed = {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity, "precision": precision}
    for name, value in printed.items():
        if not 0 <= value <= 1 or (name == "sensitivity" and value == 0):
            raise ValueError(f"{name} must be a share in [0, 1] (sensitivity above 0), got {value}")
    recall, true = precision, 1 - precision * (1 - sensitivity) / sensitivity
    derived = {"accuracy": (recall + true) / 2, "specificity": _share(true, true + 1 - recall)}
    for name, value in derived.items():
        if not abs(value - printed[name]) <= tolerance:
            raise ValueError(
                f"{name} must be {value:.4f} on a test set of two equal halves read transposed, got {printed[name]}"
            )
    return CorrectedReading(recall, true, sensitivity, accuracy)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _checked(scores: Tensor, labels: Tensor, *, both: bool = False) -> tuple[Tensor, Tensor]:
    """Gives scores as float64 and labels as bool."""
    if scores.ndim != 1 or labels.shape != scores.shape or not len(scores):
        raise ValueError(
            f"scores and labels must be (N,) each with N >= 1, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {scores[~scores.isfinite()][0].item()}")
    nodule = labels == 1
    if not bool((nodule | (labels == 0)).all()):
        raise ValueError(f"labels must be 0 or 1, got {labels[~(nodule | (labels == 0))][0].item()}")
    if both and (bool(nodule.all()) or not bool(nodule.any())):
        raise ValueError(f"labels must hold both classes, got {int(nodule.sum())} nodules in {len(labels)} films")
    return scores.double(), nodule
