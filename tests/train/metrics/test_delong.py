"""DeLong's test against pROC's published figures, the structural components written out, and ties on paper."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics.delong import delong, delong_interval

# Patients with a subarachnoid haemorrhage, the 41 of poor outcome first (Turck et al., Intensive Care Medicine 2010,
# doi 10.1007/s00134-009-1641-y; the set aSAH of the R package pROC): WFNS grade, S100B, NDKA.
POOR, PATIENTS = 41, 113
WFNS = """
    3 2 4 5 5 5 5 2 5 2 1 2 5 4 4 2 5 5 5 2 5 2 5 2 4 5 4 4 1 4 4 2 2 5 5 2 2 5 5 5 5 1 1 1 1 5 1 2 2 1 2 2 1 1
    1 2 1 2 1 1 3 4 1 4 1 5 5 1 1 2 4 1 1 2 2 1 2 1 2 2 1 1 1 1 2 1 2 1 1 3 2 4 2 1 4 1 1 5 4 2 2 1 1 1 3 1 2 2
    4 4 1 1 1
"""
S100B = """
    0.13 0.1 0.16 0.12 0.44 0.71 0.49 0.07 0.33 0.09 0.07 0.41 0.35 0.48 0.96 0.25 0.86 0.52 2.07 0.07 0.77 0.3
    0.03 0.09 0.23 0.7 0.27 0.71 0.08 0.26 0.13 0.1 0.11 0.22 0.56 0.14 0.58 0.32 0.82 0.74 0.44 0.13 0.14 0.1
    0.04 0.47 0.18 0.1 0.1 0.04 0.08 0.04 0.09 0.11 0.07 0.17 0.07 0.11 0.13 0.19 0.05 0.16 0.14 0.34 0.09 0.5
    0.46 0.16 0.07 0.43 0.45 0.11 0.08 0.09 0.08 0.06 0.13 0.1 0.14 0.15 0.06 0.05 0.09 0.04 0.09 0.08 0.16 0.09
    0.08 0.33 0.11 0.28 0.07 0.1 0.32 0.07 0.05 0.24 0.38 0.1 0.15 0.08 0.14 0.1 0.07 0.04 0.19 0.15 0.47 0.17
    0.15 0.5 0.48
"""
NDKA = """
    17.4 12.75 13.2 15.96 5.18 8.9 11.6 32.37 54.82 32.41 40.34 9.85 14.04 21.93 7.42 8.38 13.56 3.87 419.19
    21.22 10.4 11.09 12.22 13.67 22.63 12.9 21.57 8.23 72.57 15.54 5.19 9.63 21.48 5.37 9.57 34.06 11.72 14.26
    47.61 11.67 15.89 3.01 8.54 8.09 10.42 6 15.54 6.01 17.86 13.41 20.75 16.11 49.94 9.47 6.29 12.53 6.54 6.3
    80.3 12.8 9.8 9.81 18.21 5.03 8.02 6.59 9.63 13.12 7.96 14.34 41.43 7.63 7.06 12.59 9.44 7.66 12.98 27.19
    22.27 9.95 11.73 58.83 6.39 17.21 9.7 10.51 10.6 14.57 4.61 17.3 12.71 9.44 11.07 19.46 10.83 11.97 7.75
    9.83 10.55 28.49 8.53 12.57 12.9 46.83 11.68 12.67 9.01 24.58 10.33 13.87 22.43 6.79 13.45
"""


def _column(text):
    return torch.tensor([float(value) for value in text.split()], dtype=torch.float64)


MARKERS = {"wfns": _column(WFNS), "s100b": _column(S100B), "ndka": _column(NDKA)}
OUTCOME = torch.arange(PATIENTS) < POOR


@pytest.mark.parametrize(
    ("first", "second", "z", "p", "low", "high"),
    [
        ("wfns", "s100b", 2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
        ("wfns", "ndka", 2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
        ("ndka", "s100b", -1.39077002573558, 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
    ],
)
def test_comparison_is_procs_published_one(first, second, z, p, low, high):
    # Expected values: xrobin/pROC, tests/testthat/test-roc.test.R, "statistic and p are as expected with defaults".
    ours = delong(MARKERS[first], MARKERS[second], OUTCOME)
    assert (ours.z, ours.p) == pytest.approx((z, p), rel=1e-10)
    assert ours.interval == pytest.approx((low, high), rel=1e-10)
    assert ours.difference == pytest.approx((low + high) / 2, rel=1e-10)
    other = delong(MARKERS[second], MARKERS[first], OUTCOME)
    assert (other.z, other.p, other.difference) == pytest.approx((-ours.z, ours.p, -ours.difference), rel=1e-12)


def test_area_and_its_interval_are_procs_published_ones():
    # Expected values: xrobin/pROC, tests/testthat/test-auc.R and test-ci.auc.R.
    ours = delong(MARKERS["ndka"], MARKERS["wfns"], OUTCOME)
    assert (ours.auc_a, ours.auc_b) == pytest.approx((0.611957994579946, 0.823678861788618), rel=1e-12)
    low, high = delong_interval(MARKERS["ndka"], OUTCOME)
    assert (low, high) == pytest.approx((0.501244999271703, 0.722670989888189), rel=1e-10)


def test_ties_worked_on_paper():
    # Nodules 2, 3; normals 1, 2, 3. Components of nodules: (1 + 1/2) / 3 and (2 + 1/2) / 3; of normals: 1, 3/4, 1/4.
    labels = torch.tensor([1, 1, 0, 0, 0])
    scores = torch.tensor([2.0, 3.0, 1.0, 2.0, 3.0])
    flat = torch.zeros(5)  # every pair ties: area 1/2, no variance of its own
    ours = delong(scores, flat, labels)
    assert (ours.auc_a, ours.auc_b, ours.difference) == pytest.approx((2 / 3, 1 / 2, 1 / 6), abs=1e-15)
    variance = (1 / 18) / 2 + (7 / 48) / 3  # var(1/2, 5/6) = 1/18; var(1, 3/4, 1/4) = 7/48
    assert ours.standard_error == pytest.approx(math.sqrt(variance), abs=1e-15)
    assert ours.z == pytest.approx(1 / 6 / math.sqrt(variance), abs=1e-14)


@st.composite
def _cases(draw):
    n = draw(st.integers(4, 30))
    labels = [0, 0, 1, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 4, max_size=n - 4))]
    few = st.lists(st.integers(0, 9), min_size=n, max_size=n)
    return torch.tensor(draw(few)).double(), torch.tensor(draw(few)).double(), torch.tensor(labels)


def _covariance(scores, labels):
    """The 1988 paper's matrix S over pairs, and the areas: every nodule film against every normal one."""
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]
    wins = (positive[:, :, None] > negative[:, None]).double() + (positive[:, :, None] == negative[:, None]) / 2
    over = torch.cov(wins.mean(2)) / positive.shape[1] + torch.cov(wins.mean(1)) / negative.shape[1]
    return wins.mean((1, 2)), over


@settings(max_examples=80, deadline=None)
@given(case=_cases())
def test_mid_ranks_give_what_all_pairs_give(case):
    a, b, labels = case
    areas, over = _covariance(torch.stack([a, b]), labels)
    ours = delong(a, b, labels)
    assert (ours.auc_a, ours.auc_b) == pytest.approx(areas.tolist(), abs=1e-12)
    variance = (over[0, 0] + over[1, 1] - 2 * over[0, 1]).item()
    assert ours.standard_error**2 == pytest.approx(variance, abs=1e-12)
    low, high = delong_interval(a, labels, level=0.9)
    reach = 1.6448536269514722 * over[0, 0].clamp(min=0).sqrt().item()
    expected = (max(0.0, areas[0].item() - reach), min(1.0, areas[0].item() + reach))
    assert (low, high) == pytest.approx(expected, abs=1e-6)


def test_same_scores_differ_by_nothing_and_monotone_changes_change_nothing():
    same = delong(MARKERS["ndka"], MARKERS["ndka"].log(), OUTCOME)
    assert (same.difference, same.standard_error, same.z, same.p) == (0, 0, 0, 1) and same.interval == (0, 0)
    ours = delong(MARKERS["wfns"], MARKERS["ndka"], OUTCOME)
    assert delong(MARKERS["wfns"].exp(), MARKERS["ndka"].log(), OUTCOME.int()) == ours


def test_perfect_scores_against_none_leave_the_test_undefined():
    labels = torch.tensor([1, 1, 0, 0])
    ours = delong(labels.double(), torch.zeros(4), labels)
    assert ours.difference == 0.5 and ours.standard_error == 0 and math.isnan(ours.z) and math.isnan(ours.p)
    assert delong_interval(labels.double(), labels) == (1, 1)


def test_p_is_uniform_where_two_scores_are_equally_good():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    small = 0
    for _ in range(300):
        shared = labels + torch.randn(120, generator=rng)
        a, b = (shared + torch.randn(120, generator=rng) for _ in range(2))
        small += delong(a, b, labels).p < 0.05
    assert 5 <= small <= 27  # 15 expected, 3 standard deviations of 3.8


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"scores and labels must be \(N,\) each, got \(4, 1\) and \(4,\)"),
        (torch.tensor([0.0, 1, 2, math.inf]), torch.tensor([0, 0, 1, 1]), "scores must be finite, got inf"),
        (torch.zeros(4), torch.tensor([0, 0, 1, 3]), "labels must be 0 or 1, got 3"),
        (torch.zeros(4), torch.tensor([0, 0, 0, 1]), "at least two of each class, got 1 and 3"),
    ],
)
def test_bad_arguments_are_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        delong(scores, scores, labels)
    with pytest.raises(ValueError, match=message):
        delong_interval(scores, labels)


def test_bad_level_is_named():
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        delong_interval(torch.arange(4.0), torch.tensor([0, 1, 0, 1]), level=95)
