"""How many images become synthetic: chances, schedules, numbers and imbalanced-learn's words."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Images, make_mix

from carim_aug import CosineSchedule, LabelPolicy, LinearSchedule
from carim_aug.transforms.amounts import STRATEGIES, Amount, check_chances

POLICY, NORMAL, NODULE = LabelPolicy(), "No Finding", "Nodule"
REAL = {NORMAL: 90, NODULE: 10}


def added(strategy, counts=REAL):
    return Amount(sampling_strategy=strategy).added(counts, POLICY)


def test_sampling_strategies_add_what_imbalanced_learn_would():
    for strategy in ("auto", "minority", "not majority", "all", 1, lambda counts: {"Nodule": counts["No Finding"]}):
        assert added(strategy) == {NODULE: 80}
    assert added("not minority") == {} and added("minority", {NORMAL: 5, NODULE: 9}) == {NORMAL: 4}
    assert added(0.5) == added(np.float32(0.5)) == {NODULE: 35}
    assert added({"nodule": 25}) == {NODULE: 15} and added({"Nodule": 10, "normal": 100}) == {NORMAL: 10}
    for word in STRATEGIES:
        assert added(word, {NORMAL: 5, NODULE: 5}) == {}


def test_n_synthetic_is_added_whatever_the_counts_and_a_chance_adds_none():
    assert Amount(n_synthetic={"nodule": 7, "normal": 0}).added(REAL, POLICY) == {NODULE: 7}
    assert Amount().added(REAL, POLICY) == {} and Amount().p == 0.5
    assert Amount(n_synthetic={"nodule": 7}).chances(POLICY) == {}


@given(normal=st.integers(0, 500), nodule=st.integers(0, 500), more=st.integers(0, 500), fewer=st.integers(1, 500))
def test_a_dict_of_totals_is_met_exactly_or_refused(normal, nodule, more, fewer):
    real = {NORMAL: normal, NODULE: nodule}
    assert added({NODULE: nodule + more}, real) == ({NODULE: more} if more else {})
    if nodule >= fewer:
        match = rf"below the real count of 'Nodule' \({nodule}\), got {nodule - fewer}"
        with pytest.raises(ValueError, match=match):
            added({NODULE: nodule - fewer}, real)


def test_a_strategy_that_the_counts_do_not_bear_is_named():
    for strategy, kind, match in (
        (0.05, ValueError, "must not be below the real ratio .* got 0.05"),
        (lambda counts: 3 + 4j, TypeError, "got complex"),
        (lambda counts: {"Effusion": 9}, ValueError, "sampling_strategy has an unknown class 'Effusion'"),
    ):
        with pytest.raises(kind, match=match):
            added(strategy)


def test_chances_are_given_as_a_number_or_per_class():
    assert check_chances(0.25, POLICY) == {NODULE: 0.25} and check_chances(np.float32(1), POLICY) == {NODULE: 1}
    assert check_chances({"normal": 0.5, "nodule": 0.5}, POLICY) == {NORMAL: 0.5, NODULE: 0.5}


def test_schedules_go_from_start_to_end_and_stay_there():
    linear, cosine = LinearSchedule(0.0, 0.8, epochs=5), CosineSchedule(0.8, 0.0, epochs=5)
    assert [linear(e) for e in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert cosine(0) == 0.8 and cosine(4) == cosine(9) == pytest.approx(0) and cosine(2) == pytest.approx(0.4)
    assert cosine(1) > 0.6


@pytest.mark.parametrize("values", [(1.5, 0.0, 3), (0.0, -0.1, 3), (0.0, 1.0, 1), (0.0, 1.0, 2.5)])
def test_bad_schedules_are_named(values):
    with pytest.raises(ValueError, match=r"(start|end|epochs) must be .* got (1.5|-0.1|1|2.5)"):
        LinearSchedule(*values)


def test_the_mix_follows_its_schedule_by_epoch_in_wrap_loader_and_class_counts():
    mix, images, counts = make_mix(p=LinearSchedule(0.0, 1.0, epochs=3)), Images(64, labels=[0] * 64), []
    loader, wrapped = mix.loader(images, batch_size=16), mix.wrap(images)
    for epoch in range(3):
        mix.set_epoch(epoch)
        counted = loader.class_counts()["Nodule"]["synthetic"]
        counts.append(sum(int(labels.sum()) for _, labels in loader))
        assert (
            counts[-1]
            == counted
            == sum(wrapped.planned.decide((mix.seed, epoch, i), True).synthetic for i in range(64))
        )
    assert counts[0] == 0 and counts[2] == 64 and 16 < counts[1] < 48


def test_any_function_of_the_epoch_will_do_and_a_dict_as_its_value():
    mix = make_mix(p=lambda epoch: {NODULE: 0.5, NORMAL: 0.5} if epoch else 0.0, insertion="whole")
    images, labels = torch.rand(32, 1, 32, 32), torch.zeros(32, dtype=torch.int64)
    assert mix(images, labels)[0] is images
    mix.set_epoch(1)
    mix(images, labels)
    assert bool(mix.last_params.synthetic.all()) and set(mix.last_params.classes) == {NODULE, NORMAL}
