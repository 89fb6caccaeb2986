"""Rates of decisions against scikit-learn, torchmetrics, a case on paper and the source's printed Table 2."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics.patches import auc
from train.metrics.rates import balanced_weights, corrected_reading, rates, sensitivity_at

# As printed (METHOD 8): accuracy, sensitivity, specificity, precision.
PRINTED = {
    "DS1": (0.9100, 0.9107, 0.0000, 0.9999),
    "DS2": (0.6034, 0.5780, 0.6533, 0.7661),
    "DS3": (0.6113, 0.5807, 0.6793, 0.8009),
    "DS4": (0.6208, 0.5898, 0.6843, 0.7930),
}


@st.composite
def _cases(draw, both=True):
    """Scores with many ties, labels and weights of 2 to 40 films."""
    n = draw(st.integers(2, 40))
    scores = [k / 16 for k in draw(st.lists(st.integers(0, 16), min_size=n, max_size=n))]
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    if both:
        labels[0], labels[1] = 0, 1
    weights = draw(st.lists(st.floats(0.1, 9), min_size=n, max_size=n))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels), torch.tensor(weights, dtype=torch.float64)


def test_rates_worked_on_paper():
    # Called: 0.9 and 0.5 of nodules, 0.7 of normals. TP 2, FN 1, FP 1, TN 4.
    scores = torch.tensor([0.9, 0.5, 0.4, 0.7, 0.1, 0.2, 0.3, 0.0])
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    assert rates(scores, labels) == pytest.approx((6 / 8, 2 / 3, 4 / 5, 2 / 3, 2 / 3, 4 / 5), abs=1e-15)
    # Normal films weigh 3/5 each: TP 2, FN 1, FP 0.6, TN 2.4.
    weights = balanced_weights(labels)
    assert weights.tolist() == pytest.approx([1, 1, 1] + [0.6] * 5, abs=1e-15)
    balanced = rates(scores, labels, weights=weights)
    assert balanced == pytest.approx((4.4 / 6, 2 / 3, 4 / 5, 2 / 2.6, 4 / 5.6, 2.4 / 3.4), abs=1e-15)
    assert balanced.accuracy == pytest.approx((balanced.sensitivity + balanced.specificity) / 2, abs=1e-15)
    assert rates(scores, labels, threshold=0.95).sensitivity == 0


@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=60, deadline=None)
@given(case=_cases(both=False), threshold=st.integers(0, 17))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_rates_are_scikit_learns(weighted, case, threshold):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, weights = case
    true, called = labels.numpy(), (scores >= threshold / 16).int().numpy()
    extra = {"sample_weight": weights.numpy() if weighted else None, "zero_division": math.nan}
    expected = (
        metrics.accuracy_score(true, called, sample_weight=extra["sample_weight"]),
        metrics.recall_score(true, called, **extra),
        metrics.recall_score(true, called, pos_label=0, **extra),
        metrics.precision_score(true, called, **extra),
        metrics.f1_score(true, called, **extra),
        metrics.precision_score(true, called, pos_label=0, **extra),
    )
    ours = rates(scores, labels, threshold=threshold / 16, weights=weights if weighted else None)
    assert ours == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_shares_of_nothing_are_nan():
    labels = torch.tensor([1, 0])
    none = rates(torch.zeros(2), labels)
    assert math.isnan(none.precision) and none.npv == 0.5 and none.f1 == 0 and none.sensitivity == 0
    assert math.isnan(rates(torch.ones(2), labels).npv)
    healthy = rates(torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert math.isnan(healthy.sensitivity) and math.isnan(healthy.f1) and healthy.specificity == healthy.accuracy == 1


@settings(max_examples=40, deadline=None)
@given(case=_cases())
def test_area_under_the_curve_is_scikit_learns(case):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = case
    assert float(auc(scores[labels == 1], scores[labels == 0])) == pytest.approx(
        metrics.roc_auc_score(labels, scores), abs=1e-12
    )


def test_sensitivity_at_specificity_worked_on_paper():
    # Ten normals 0..9; at 90 % one of them may score as high as the threshold.
    normal = torch.arange(10.0)
    scores = torch.cat([normal, torch.tensor([8.5, 8.0, 9.0, 9.5])])
    labels = torch.tensor([0] * 10 + [1] * 4)
    assert sensitivity_at(scores, labels, specificity=0.9) == 0.75  # 8.5, 9.0, 9.5; a threshold of 8 leaves 8 of 10
    assert sensitivity_at(scores, labels, specificity=0.8) == 1
    assert sensitivity_at(scores, labels, specificity=1) == 0.25
    assert sensitivity_at(-scores, labels, specificity=0.9) == 0
    assert sensitivity_at(-scores, labels, specificity=0) == 1


@settings(max_examples=60, deadline=None)
@given(case=_cases(), step=st.integers(0, 40))
def test_sensitivity_at_specificity_is_torchmetrics(case, step):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    scores, labels, _ = case
    normals = int((labels == 0).sum())
    specificity = (step % normals + 0.5) / normals  # between two steps of the curve: no question of rounding
    theirs, _ = functional.binary_sensitivity_at_specificity(scores, labels, min_specificity=specificity)
    assert sensitivity_at(scores, labels, specificity=specificity) == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("DS2", (0.7661, 0.4407, 0.5780, 0.6034)),
        ("DS3", (0.8009, 0.4217, 0.5807, 0.6113)),
        ("DS4", (0.7930, 0.4485, 0.5898, 0.6208)),
    ],
)
def test_the_sources_columns_have_their_corrected_reading(column, expected):
    assert tuple(round(value, 4) for value in corrected_reading(*PRINTED[column])) == expected


def test_ds1_fits_no_balanced_test_set():
    with pytest.raises(ValueError, match=r"accuracy must be 0\.9509 on a test set of two equal halves"):
        corrected_reading(*PRINTED["DS1"])


def test_untransposed_figures_are_refused():
    labels = torch.arange(40) % 2
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5 * labels
    right = rates(scores, labels, threshold=0.7)
    with pytest.raises(ValueError, match="read transposed"):
        corrected_reading(right.accuracy, right.sensitivity, right.specificity, right.precision)


@settings(max_examples=60, deadline=None)
@given(recall=st.floats(0.5, 0.99), specificity=st.floats(0.2, 0.95))
def test_a_transposed_table_of_a_balanced_test_is_read_back(recall, specificity):
    nodule, called = 633 * recall, 633 * recall + 633 * (1 - specificity)
    precision, npv = nodule / called, 633 * specificity / (2 * 633 - called)
    accuracy = (recall + specificity) / 2
    printed = [round(value, 4) for value in (accuracy, precision, npv, recall)]
    assert corrected_reading(*printed, tolerance=5e-4) == pytest.approx(
        (recall, specificity, precision, accuracy), abs=5e-4
    )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3), r"scores and labels must be \(N,\) each with N >= 1, got \(3, 1\)"),
        (torch.zeros(3), torch.zeros(2), r"got \(3,\) and \(2,\)"),
        (torch.tensor([0.0, math.nan]), torch.tensor([0, 1]), "scores must be finite, got nan"),
        (torch.zeros(2), torch.tensor([0, 2]), "labels must be 0 or 1, got 2"),
    ],
)
def test_bad_scores_and_labels_are_named(scores, labels, message):
    for door in (rates, sensitivity_at):
        with pytest.raises(ValueError, match=message):
            door(scores, labels)


def test_bad_numbers_are_named():
    scores, labels = torch.zeros(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"weights must be \(2,\), finite and at least 0"):
        rates(scores, labels, weights=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"specificity must be in \[0, 1\], got 90"):
        sensitivity_at(scores, labels, specificity=90)
    for door in (lambda y: sensitivity_at(scores, y), balanced_weights):
        with pytest.raises(ValueError, match="labels must hold both classes, got 2 nodules in 2 films"):
            door(torch.ones(2))
    with pytest.raises(ValueError, match="accuracy must be a share"):
        corrected_reading(60.34, 0.5780, 0.6533, 0.7661)
