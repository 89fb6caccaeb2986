"""Statistics of scores against scikit-learn, torchmetrics, pROC's published figures, cases on paper and coverage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.metrics.statistics import (
    auc,
    auc_interval,
    balanced_weights,
    delong,
    holm,
    interval,
    paired_bootstrap,
    rates,
    sensitivity_at,
    share,
    spread,
    weighted_auc,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def _cases(draw, both=True):
    """Scores with many ties, labels and weights of 2 to 30 images."""
    n = draw(st.integers(2, 30))
    scores = [k / 16 for k in draw(st.lists(st.integers(0, 16), min_size=n, max_size=n))]
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    if both:
        labels[0], labels[1] = 0, 1
    weights = draw(st.lists(st.floats(0.1, 9), min_size=n, max_size=n))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels), torch.tensor(weights, dtype=torch.float64)


# --- Area under the ROC curve ---
@given(_cases())
def test_areas_are_scikit_learns(case):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, weights = case
    plain = metrics.roc_auc_score(labels, scores)
    assert float(auc(scores[labels == 1], scores[labels == 0])) == pytest.approx(plain, abs=1e-12)
    ours = weighted_auc(scores, labels, torch.stack([weights, torch.ones_like(weights)])).tolist()
    weighted = metrics.roc_auc_score(labels, scores, sample_weight=weights.numpy())
    assert ours == pytest.approx([weighted, plain], abs=1e-12)


def test_weighted_area_counts_an_image_as_often_as_it_comes_and_is_nan_without_a_class():
    scores, labels = torch.tensor([0.0, 1, 2, 1]), torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([[1, 3, 2, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    ours = weighted_auc(scores, labels, weights)
    # Nodule 2 (twice) beats all 4; nodule 1 beats one and ties with three: (2 * 4 + 1 + 1.5) / (3 * 4).
    assert ours[0].item() == pytest.approx(10.5 / 12, abs=1e-15) and ours[1:].isnan().all()


def test_interval_holds_the_area_and_patients_widen_it():
    rng = _generator()
    positive, negative = torch.randn(60, generator=rng) + 1, torch.randn(200, generator=rng)
    alone = auc_interval(positive, negative, torch.arange(60), torch.arange(200), generator=rng, draws=600)
    # Six patients with ten alike nodules each know less than sixty patients.
    alike, patients = positive[:6].repeat_interleave(10), torch.arange(6).repeat_interleave(10)
    few = auc_interval(alike, negative, patients, torch.arange(200), generator=rng, draws=600)
    assert alone[0] < auc(positive, negative) < alone[1] and few[1] - few[0] > 1.5 * (alone[1] - alone[0])


# --- Rates of decisions ---
def test_rates_worked_on_paper():
    # Called: 0.9 and 0.5 of nodules, 0.7 of normals. TP 2, FN 1, FP 1, TN 4.
    scores = torch.tensor([0.9, 0.5, 0.4, 0.7, 0.1, 0.2, 0.3, 0.0])
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    assert rates(scores, labels) == pytest.approx((6 / 8, 2 / 3, 4 / 5, 2 / 3, 2 / 3, 4 / 5), abs=1e-15)
    # Normal images weigh 3/5 each: TP 2, FN 1, FP 0.6, TN 2.4.
    weights = balanced_weights(labels)
    assert weights.tolist() == pytest.approx([1, 1, 1] + [0.6] * 5, abs=1e-15)
    balanced = rates(scores, labels, weights=weights)
    assert balanced == pytest.approx((4.4 / 6, 2 / 3, 4 / 5, 2 / 2.6, 4 / 5.6, 2.4 / 3.4), abs=1e-15)
    assert balanced.accuracy == pytest.approx((balanced.sensitivity + balanced.specificity) / 2, abs=1e-15)
    assert rates(scores, labels, threshold=0.95).sensitivity == 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@given(case=_cases(both=False), threshold=st.integers(0, 17), weighted=st.booleans())
def test_rates_are_scikit_learns(case, threshold, weighted):
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


def test_sensitivity_at_specificity_worked_on_paper():
    # Ten normals 0..9; at 90 % one of them may score as high as the threshold.
    scores = torch.cat([torch.arange(10.0), torch.tensor([8.5, 8.0, 9.0, 9.5])])
    labels = torch.tensor([0] * 10 + [1] * 4)
    assert sensitivity_at(scores, labels, specificity=0.9) == 0.75  # 8.5, 9.0, 9.5; a threshold of 8 leaves 8 of 10
    assert sensitivity_at(scores, labels, specificity=0.8) == 1
    assert sensitivity_at(scores, labels, specificity=1) == 0.25
    assert sensitivity_at(-scores, labels, specificity=0.9) == 0
    assert sensitivity_at(-scores, labels, specificity=0) == 1


@given(case=_cases(), step=st.integers(0, 40))
def test_sensitivity_at_specificity_is_torchmetrics(case, step):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    scores, labels, _ = case
    normals = int((labels == 0).sum())
    specificity = (step % normals + 0.5) / normals  # between two steps of the curve: no question of rounding
    theirs, _ = functional.binary_sensitivity_at_specificity(scores, labels, min_specificity=specificity)
    assert sensitivity_at(scores, labels, specificity=specificity) == pytest.approx(theirs.item(), abs=1e-6)


# --- DeLong ---
# Patients with a subarachnoid haemorrhage, the 41 of poor outcome first (Turck et al., Intensive Care Medicine 2010,
# doi 10.1007/s00134-009-1641-y; the set aSAH of the R package pROC): WFNS grade, NDKA.
WFNS = "3245555252125442555252524544144225522555511115122122111212113414155112411221212211112121132421411542"
WFNS += "2111312244111"
NDKA = """
    17.4 12.75 13.2 15.96 5.18 8.9 11.6 32.37 54.82 32.41 40.34 9.85 14.04 21.93 7.42 8.38 13.56 3.87 419.19
    21.22 10.4 11.09 12.22 13.67 22.63 12.9 21.57 8.23 72.57 15.54 5.19 9.63 21.48 5.37 9.57 34.06 11.72 14.26
    47.61 11.67 15.89 3.01 8.54 8.09 10.42 6 15.54 6.01 17.86 13.41 20.75 16.11 49.94 9.47 6.29 12.53 6.54 6.3
    80.3 12.8 9.8 9.81 18.21 5.03 8.02 6.59 9.63 13.12 7.96 14.34 41.43 7.63 7.06 12.59 9.44 7.66 12.98 27.19
    22.27 9.95 11.73 58.83 6.39 17.21 9.7 10.51 10.6 14.57 4.61 17.3 12.71 9.44 11.07 19.46 10.83 11.97 7.75
    9.83 10.55 28.49 8.53 12.57 12.9 46.83 11.68 12.67 9.01 24.58 10.33 13.87 22.43 6.79 13.45
"""
TEXTS = {"wfns": WFNS, "ndka": NDKA.split()}
MARKERS = {name: torch.tensor([float(x) for x in text], dtype=torch.float64) for name, text in TEXTS.items()}
OUTCOME = torch.arange(113) < 41


def test_comparison_is_procs_published_one():
    # Expected values: xrobin/pROC, tests/testthat/test-roc.test.R, "statistic and p are as expected with defaults", and
    # test-auc.R.
    ours, other = (delong(MARKERS[a], MARKERS[b], OUTCOME) for a, b in (("wfns", "ndka"), ("ndka", "wfns")))
    assert (ours.z, ours.p) == pytest.approx((2.79777591868904, 0.00514557970691098), rel=1e-10)
    low, high = 0.0634011709339876, 0.3600405634833566
    assert ours.interval == pytest.approx((low, high), rel=1e-10)
    assert ours.difference == pytest.approx((low + high) / 2, rel=1e-10)
    assert (ours.auc_a, ours.auc_b) == pytest.approx((0.823678861788618, 0.611957994579946), rel=1e-12)
    assert (other.z, other.p, other.difference) == pytest.approx((-ours.z, ours.p, -ours.difference), rel=1e-12)


def test_ties_worked_on_paper():
    # Nodules 2, 3; normals 1, 2, 3. Components of nodules: (1 + 1/2) / 3 and (2 + 1/2) / 3; of normals: 1, 3/4, 1/4.
    labels, scores = torch.tensor([1, 1, 0, 0, 0]), torch.tensor([2.0, 3.0, 1.0, 2.0, 3.0])
    ours = delong(scores, torch.zeros(5), labels)  # all zeros tie: area 1/2, no variance of their own
    assert (ours.auc_a, ours.auc_b, ours.difference) == pytest.approx((2 / 3, 1 / 2, 1 / 6), abs=1e-15)
    variance = (1 / 18) / 2 + (7 / 48) / 3  # var(1/2, 5/6) = 1/18; var(1, 3/4, 1/4) = 7/48
    assert ours.standard_error == pytest.approx(math.sqrt(variance), abs=1e-15)
    assert ours.z == pytest.approx(1 / 6 / math.sqrt(variance), abs=1e-14)


@given(first=_cases(), second=st.permutations(range(8)))
def test_components_are_those_of_all_pairs(first, second):
    a, labels = torch.cat([first[0], torch.arange(4.0)]), torch.cat([first[1], torch.tensor([0, 0, 1, 1])])
    b = torch.tensor(second).double().repeat(len(a) // 8 + 1)[: len(a)]
    # The 1988 paper's matrix S over pairs: every nodule image against every normal one.
    both = torch.stack([a, b])
    positive, negative = both[:, labels == 1], both[:, labels == 0]
    wins = (positive[:, :, None] > negative[:, None]).double() + (positive[:, :, None] == negative[:, None]) / 2
    over = torch.cov(wins.mean(2)) / positive.shape[1] + torch.cov(wins.mean(1)) / negative.shape[1]

    ours = delong(a, b, labels)
    assert (ours.auc_a, ours.auc_b) == pytest.approx(wins.mean((1, 2)).tolist(), abs=1e-12)
    variance = (over[0, 0] + over[1, 1] - 2 * over[0, 1]).item()
    assert ours.standard_error**2 == pytest.approx(variance, abs=1e-12)
    reach = 1.959963984540054 * ours.standard_error
    assert ours.interval == pytest.approx((ours.difference - reach, ours.difference + reach), abs=1e-9)


def test_same_scores_differ_by_nothing_and_perfect_ones_against_none_are_undefined():
    same = delong(MARKERS["ndka"], MARKERS["ndka"].log(), OUTCOME)
    assert (same.difference, same.standard_error, same.z, same.p) == (0, 0, 0, 1) and same.interval == (0, 0)
    ours = delong(MARKERS["wfns"], MARKERS["ndka"], OUTCOME)  # monotone changes change nothing
    assert delong(MARKERS["wfns"].exp(), MARKERS["ndka"].log(), OUTCOME.int()) == ours
    labels = torch.tensor([1, 1, 0, 0])
    ours = delong(labels.double(), torch.zeros(4), labels)
    assert ours.difference == 0.5 and ours.standard_error == 0 and math.isnan(ours.z) and math.isnan(ours.p)


# --- Paired bootstrap ---
def _arms(rng, *, images=120, runs=3, gain=0.0, spread=0.0):
    """Two arms of runs whose nodules stand out by 1 + gain and 1 on the whole, and by `spread` more or less each."""
    labels = torch.arange(images) % 2
    shared = torch.randn(images, generator=rng)
    lift = torch.tensor([1 + gain, 1.0])[:, None, None] + spread * torch.randn(2, runs, 1, generator=rng)
    return *(shared + 0.5 * torch.randn(2, runs, images, generator=rng) + lift * labels), labels, torch.arange(images)


def test_same_arms_differ_by_nothing_and_opposite_ones_for_sure():
    a, _, labels, patients = _arms(_generator())
    ours = paired_bootstrap(a, a.clone(), labels, patients, generator=_generator(), draws=200)
    assert (ours.difference, ours.interval, ours.p) == (0, (0, 0), 1) and ours.interval_a == ours.interval_b
    assert ours.interval_a[0] < ours.auc_a < ours.interval_a[1]
    scores = torch.arange(6.0).expand(2, 6)  # part the classes
    ours = paired_bootstrap(scores, -scores, scores[0] > 2, torch.arange(6), generator=_generator(), draws=400)
    assert (ours.auc_a, ours.auc_b, ours.difference) == (1, 0, 1)
    assert ours.interval == (1, 1) and ours.p == pytest.approx(2 / 401)


def test_areas_are_means_over_seeds_and_swapping_arms_turns_the_signs():
    a, b, labels, patients = _arms(_generator(), gain=0.5, spread=0.3)
    state = torch.get_rng_state()
    ours = paired_bootstrap(a, b, labels, patients, generator=_generator(3), draws=300)
    assert torch.equal(torch.get_rng_state(), state)
    singles = [delong(x, y, labels) for x, y in zip(a, b, strict=True)]
    assert ours.auc_a == pytest.approx(sum(one.auc_a for one in singles) / 3, abs=1e-12)
    assert ours.difference == pytest.approx(sum(one.difference for one in singles) / 3, abs=1e-12)
    other = paired_bootstrap(b, a, labels, patients, generator=_generator(3), draws=300)
    assert other.interval == pytest.approx((-ours.interval[1], -ours.interval[0]), abs=1e-12)
    assert other.p == ours.p and other.interval_a == ours.interval_b
    again = paired_bootstrap(a, b, labels, patients, generator=_generator(3), draws=300)
    assert again == ours and paired_bootstrap(a, b, labels, patients, generator=_generator(4), draws=300) != ours


def test_with_one_run_and_one_image_a_patient_it_agrees_with_delong():
    a, b, labels, patients = _arms(_generator(1), images=400, runs=1, gain=0.2)
    ours = paired_bootstrap(a, b, labels, patients, generator=_generator(), draws=1000)
    theirs = delong(a[0], b[0], labels)
    assert ours.interval == pytest.approx(theirs.interval, abs=0.15 * (theirs.interval[1] - theirs.interval[0]))


def _width(a, b, labels, patients):
    low, high = paired_bootstrap(a, b, labels, patients, generator=_generator(), draws=500).interval
    return high - low


def test_copies_of_an_image_tell_no_more_than_one_and_runs_that_differ_widen_the_interval():
    a, b, labels, patients = _arms(_generator(2), images=200, runs=1, gain=0.2)
    alone = _width(a, b, labels, patients)
    copies = torch.randperm(600, generator=_generator()) % 200
    assert _width(a[:, copies], b[:, copies], labels[copies], patients[copies]) == pytest.approx(alone, rel=1e-9)
    split = _width(a[:, copies], b[:, copies], labels[copies], torch.arange(600))  # as if each were another's
    assert split == pytest.approx(alone / 3**0.5, rel=0.15)

    a, b, labels, patients = _arms(_generator(2), images=100, runs=4, gain=0.2)
    alike = _width(a, b, labels, patients)
    a[0], a[1] = a[0] + 2 * labels, a[1] - 2 * labels
    assert _width(a, b, labels, patients) > 2 * alike
    assert _width(a, a.clone(), labels, patients) == 0  # runs are resampled in pairs


def test_samples_without_a_class_are_drawn_anew():
    labels = torch.tensor([1, 0, 0, 0, 0])  # a third of the samples lack the one nodule patient
    scores = torch.tensor([[2.0, 0, 1, 3, 4]])
    ours = paired_bootstrap(scores, scores.flip(1), labels, torch.arange(5), generator=_generator(), draws=500)
    assert all(math.isfinite(value) for value in (*ours.interval, *ours.interval_a, ours.p))


@pytest.mark.train  # nothing is trained, but 160 comparisons take seconds
@pytest.mark.parametrize("gain", [0.0, 0.6])
def test_interval_covers_the_true_difference(gain):
    # Scores of both classes have variance 1 + 1/4, so an area is Phi(lift / sqrt(2.5)), and on the whole of seeds whose
    # lift spreads by 0.2 it is Phi(lift / sqrt(2.54)).
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    truth = (phi(torch.tensor((1 + gain) / 2.54**0.5)) - phi(torch.tensor(1 / 2.54**0.5))).item()
    rng, covered, small = _generator(5), 0, 0
    for _ in range(80):
        ours = paired_bootstrap(*_arms(rng, runs=5, gain=gain, spread=0.2), generator=rng, draws=250)
        covered += ours.interval[0] <= truth <= ours.interval[1]
        small += ours.p < 0.05
    assert covered >= 66  # 76 expected
    assert small <= 12 if gain == 0 else small >= 60


# --- Holm, intervals ---
def test_holm_worked_on_paper():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 but not below the one before.
    pytest.importorskip("statsmodels")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


def test_intervals_shares_and_spreads_on_paper():
    low, high = interval(torch.cat([torch.arange(101.0), torch.tensor([math.nan])])).tolist()  # NaN draws are left out
    assert (low, high) == pytest.approx((2.5, 97.5))
    row = share(torch.tensor([True] * 8 + [False] * 2))  # Wilson's interval of 8 in 10 is .490 to .943
    assert row["value"] == pytest.approx(0.8) and (row["low"], row["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert spread(torch.arange(5.0))["value"] == 2 and math.isnan(spread(torch.empty(0))["value"])


# --- Bad input ---
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"must be \(N,\) each .* got \(4, 1\) and \(4,\)"),
        (torch.zeros(3), torch.zeros(2), r"got \(3,\) and \(2,\)"),
        (torch.zeros(0), torch.zeros(0), r"N >= 1, got \(0,\)"),
        (torch.tensor([0.0, 1, 2, math.inf]), torch.tensor([0, 0, 1, 1]), "scores must be finite, got inf"),
        (torch.zeros(4), torch.tensor([0, 0, 1, 3]), "labels must be 0 or 1, got 3"),
    ],
)
def test_bad_scores_and_labels_are_named(scores, labels, message):
    for door in (rates, sensitivity_at, lambda s, y: delong(s, s, y), lambda s, y: weighted_auc(s, y, s[None])):
        with pytest.raises(ValueError, match=message):
            door(scores, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_b": torch.zeros(2, 4)}, r"must be \(R, N\) both, got \(1, 4\) and \(2, 4\)"),
        ({"patients": torch.arange(3)}, r"labels and patients must be \(4,\) each, got \(4,\) and \(3,\)"),
        ({"draws": 1}, "draws must be at least 2, got 1"),
    ],
)
def test_bad_arms_are_named(change, message):
    usual = {"scores_a": torch.zeros(1, 4), "scores_b": torch.zeros(1, 4), "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{**usual, "patients": torch.arange(4), **change}, generator=_generator())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, y: rates(s, y, weights=torch.tensor([1.0, 1, 1, -1])),
            r"weights must be \(4,\), finite and at least 0",
        ),
        (lambda s, y: weighted_auc(s, y, torch.ones(4)), r"weights must be \(D, 4\), got \(4,\)"),
        (lambda s, y: sensitivity_at(s, y, specificity=90), r"specificity must be in \[0, 1\], got 90"),
        (lambda s, y: balanced_weights(torch.ones(2)), "at least 1 of each class, got 2 nodules in 2"),
        (lambda s, y: sensitivity_at(torch.zeros(2), torch.ones(2)), "at least 1 of each class, got 2 nodules in 2"),
        (lambda s, y: delong(s, s, torch.tensor([0, 0, 0, 1])), "at least 2 of each class, got 1 nodules in 4"),
        (lambda s, y: holm([0.1, math.nan]), r"p_values must be in \[0, 1\], got nan"),
    ],
)
def test_bad_numbers_and_missing_classes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(4.0), torch.tensor([0, 1, 0, 1]))
