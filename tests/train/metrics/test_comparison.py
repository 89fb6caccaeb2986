"""The paired bootstrap over patients and seeds: known cases, scikit-learn's weighted area, coverage; Holm's steps."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics.comparison import holm, paired_bootstrap, weighted_auc
from train.metrics.delong import delong, delong_interval


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _arms(rng, *, films=120, runs=3, gain=0.0, spread=0.0):
    """Two arms of runs whose nodules stand out by 1 + gain and 1 on the whole, and by `spread` more or less each."""
    labels = torch.arange(films) % 2
    shared = torch.randn(films, generator=rng)
    lift = torch.tensor([1 + gain, 1.0])[:, None, None] + spread * torch.randn(2, runs, 1, generator=rng)
    return *(shared + 0.5 * torch.randn(2, runs, films, generator=rng) + lift * labels), labels, torch.arange(films)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.floats(0.01, 5)), min_size=2, max_size=30),
    st.integers(0, 99),
)
def test_weighted_area_is_scikit_learns(films, seed):
    metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.tensor([film[0] for film in films], dtype=torch.float64)
    labels = torch.tensor([0, 1, *(film[1] for film in films[2:])])
    weights = torch.tensor([film[2] for film in films], dtype=torch.float64)
    weights = torch.stack([weights, torch.ones_like(weights), torch.rand(len(films), generator=_generator(seed)) + 0.1])
    expected = [metrics.roc_auc_score(labels, scores, sample_weight=row.numpy()) for row in weights]
    assert weighted_auc(scores, labels, weights).tolist() == pytest.approx(expected, abs=1e-12)


def test_weighted_area_counts_a_film_as_often_as_it_was_drawn_and_is_nan_without_a_class():
    scores, labels = torch.tensor([0.0, 1, 2, 1]), torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([[1, 3, 2, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    ours = weighted_auc(scores, labels, weights)
    # Nodule 2 (twice) beats all 4; nodule 1 beats one and ties with three: (2 * 4 + 1 + 1.5) / (3 * 4).
    assert ours[0].item() == pytest.approx(10.5 / 12, abs=1e-15) and ours[1:].isnan().all()


def test_same_arms_differ_by_nothing():
    a, _, labels, patients = _arms(_generator())
    ours = paired_bootstrap(a, a.clone(), labels, patients, generator=_generator(), draws=200)
    assert (ours.difference, ours.interval, ours.p) == (0, (0, 0), 1) and ours.interval_a == ours.interval_b
    assert ours.interval_a[0] < ours.auc_a < ours.interval_a[1]


def test_arms_that_part_the_classes_or_turn_them_round_have_a_sure_difference():
    labels = torch.tensor([0, 0, 0, 1, 1, 1]).bool()
    scores = torch.arange(6.0).expand(2, 6)
    ours = paired_bootstrap(scores, -scores, labels, torch.arange(6), generator=_generator(), draws=400)
    assert (ours.auc_a, ours.auc_b, ours.difference) == (1, 0, 1)
    assert ours.interval == (1, 1) and ours.p == pytest.approx(2 / 401)


def test_areas_are_means_over_seeds_and_swapping_arms_turns_the_signs():
    a, b, labels, patients = _arms(_generator(), gain=0.5, spread=0.3)
    ours = paired_bootstrap(a, b, labels, patients, generator=_generator(3), draws=300)
    singles = [delong(x, y, labels) for x, y in zip(a, b, strict=True)]
    assert ours.auc_a == pytest.approx(sum(one.auc_a for one in singles) / 3, abs=1e-12)
    assert ours.difference == pytest.approx(sum(one.difference for one in singles) / 3, abs=1e-12)
    other = paired_bootstrap(b, a, labels, patients, generator=_generator(3), draws=300)
    assert other.interval == pytest.approx((-ours.interval[1], -ours.interval[0]), abs=1e-12)
    assert other.p == ours.p and other.interval_a == ours.interval_b
    again = paired_bootstrap(a, b, labels, patients, generator=_generator(3), draws=300)
    assert again == ours and paired_bootstrap(a, b, labels, patients, generator=_generator(4), draws=300) != ours


def test_with_one_run_and_one_film_a_patient_it_agrees_with_delong():
    a, b, labels, patients = _arms(_generator(1), films=600, runs=1, gain=0.2)
    ours = paired_bootstrap(a, b, labels, patients, generator=_generator(), draws=2000)
    theirs = delong(a[0], b[0], labels)
    assert ours.interval == pytest.approx(theirs.interval, abs=0.15 * (theirs.interval[1] - theirs.interval[0]))
    assert ours.interval_a == pytest.approx(delong_interval(a[0], labels), abs=0.01)


def _width(a, b, labels, patients):
    low, high = paired_bootstrap(a, b, labels, patients, generator=_generator(), draws=1000).interval
    return high - low


def test_three_copies_of_a_patients_film_tell_no_more_than_one():
    a, b, labels, patients = _arms(_generator(2), films=200, runs=1, gain=0.2)
    alone = _width(a, b, labels, patients)
    films = torch.randperm(600, generator=_generator()) % 200
    assert _width(a[:, films], b[:, films], labels[films], patients[films]) == pytest.approx(alone, rel=1e-9)
    split = _width(a[:, films], b[:, films], labels[films], torch.arange(600))  # as if each were another's: 1 / sqrt(3)
    assert split == pytest.approx(alone / 3**0.5, rel=0.15)


def test_runs_that_differ_widen_the_interval():
    a, b, labels, patients = _arms(_generator(2), films=200, runs=4, gain=0.2)
    alike = _width(a, b, labels, patients)
    a[0], a[1] = a[0] + 2 * labels, a[1] - 2 * labels
    assert _width(a, b, labels, patients) > 2 * alike
    assert _width(a, a.clone(), labels, patients) == 0  # runs are drawn in pairs


def test_samples_without_a_class_are_drawn_anew():
    labels = torch.tensor([1, 0, 0, 0, 0])  # a third of the samples lack the one nodule patient
    scores = torch.tensor([[2.0, 0, 1, 3, 4]])
    ours = paired_bootstrap(scores, scores.flip(1), labels, torch.arange(5), generator=_generator(), draws=500)
    assert all(math.isfinite(value) for value in (*ours.interval, *ours.interval_a, ours.p))


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


def test_two_thousand_samples_of_five_seeds_take_seconds():
    a, b, labels, patients = _arms(_generator(), films=400, runs=5)
    start = time.process_time()
    paired_bootstrap(a, b, labels, patients, generator=_generator())
    assert time.process_time() - start < 3  # 0.3 s alone on one core


def test_drawing_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    paired_bootstrap(*_arms(_generator()), generator=_generator(), draws=20)
    assert torch.equal(torch.get_rng_state(), state)


def test_holm_worked_on_paper():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 but not below the one before.
    pytest.importorskip("statsmodels")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


@settings(max_examples=8, deadline=None)  # statsmodels collects garbage at each call: 0.4 s
@given(st.lists(st.integers(0, 20).map(lambda k: k / 200), min_size=2, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p_values):
    pytest.importorskip("statsmodels")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = set()
    for step, place in enumerate(order):
        if p_values[place] * (len(p_values) - step) > 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_b": torch.zeros(2, 4)}, r"must be \(R, N\) both, got \(1, 4\) and \(2, 4\)"),
        ({"patients": torch.arange(3)}, r"labels and patients must be \(4,\) each, got \(4,\) and \(3,\)"),
        ({"labels": torch.ones(4)}, "labels must hold both classes, got 4 nodules in 4 films"),
        ({"labels": torch.tensor([0, 1, 2, 1])}, "labels must be 0 or 1, got 2"),
        ({"scores_a": torch.tensor([[0.0, 1, 2, math.nan]])}, "scores must be finite, got nan"),
        ({"draws": 1}, "draws must be at least 2 and level in .*, got 1 and 0.95"),
        ({"level": 95}, "got 2000 and 95"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {"scores_a": torch.zeros(1, 4), "scores_b": torch.zeros(1, 4), "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{**given, "patients": torch.arange(4), **change}, generator=_generator())


def test_bad_weights_and_probabilities_are_named():
    with pytest.raises(ValueError, match=r"must be \(N,\), \(N,\) and \(D, N\), got \(2,\), \(2,\) and \(2,\)"):
        weighted_auc(torch.zeros(2), torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(ValueError, match=r"p_values must be in \[0, 1\], got nan"):
        holm([0.1, math.nan])
