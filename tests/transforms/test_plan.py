import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prior

from carim_aug.labels.policy import LabelPolicy
from carim_aug.ops.boxes import boxes_to_masks, check_boxes
from carim_aug.transforms.amounts import STRATEGIES, added_counts, check_chances
from carim_aug.transforms.plan import (
    NO_BOXES,
    MixParams,
    Planner,
    Slot,
    check_epoch,
    check_state,
)

POLICY = LabelPolicy()
NORMAL, NODULE = "No Finding", "Nodule"


def planner(chances=None, seed=0):
    return Planner(prior(), seed=seed, nodule=NODULE, chances={NODULE: 0.5} if chances is None else chances)


def test_a_slot_that_is_not_eligible_stays_real():
    slot = planner({NODULE: 1.0}).decide((0, 0, 3), 3, eligible=False)
    assert not slot.synthetic and slot.class_name is None and slot.host == 3 and slot.boxes.shape == (0, 4)


def test_a_chance_of_one_takes_every_slot_and_of_zero_none():
    for chance, expected in ((1.0, NODULE), (0.0, None)):
        slots = [planner({NODULE: chance}).decide((0, 0, i), i, eligible=True) for i in range(200)]
        assert {s.class_name for s in slots} == {expected}


def test_chances_are_met_to_within_four_standard_errors():
    names = [planner({NODULE: 0.3, NORMAL: 0.2}).decide((1, 0, i), i, eligible=True).class_name for i in range(4000)]
    for name, chance in ((NODULE, 0.3), (NORMAL, 0.2), (None, 0.5)):
        assert abs(names.count(name) / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5


def test_a_nodule_slot_has_boxes_in_the_image_and_a_normal_one_none():
    for i in range(50):
        slot = planner({NODULE: 1.0}).decide((0, 0, i), i, eligible=True)
        assert len(slot.boxes) >= 1
        check_boxes(slot.boxes_at(100, 73), (100, 73))
        assert planner({NORMAL: 1.0}).decide((0, 0, i), i, eligible=True).boxes.shape == (0, 4)


def test_boxes_scale_with_width_and_height():
    slot = Slot((0, 0, 0), NODULE, 1, np.array([[0.25, 0.5, 0.5, 0.75]], dtype=np.float32), 0)
    assert slot.boxes_at(100, 40).tolist() == [[10, 50, 20, 75]]


def test_the_same_chance_draw_takes_a_slot_at_any_higher_chance():
    for i in range(100):
        low, high = (planner({NODULE: p}).decide((0, 0, i), i, eligible=True) for p in (0.2, 0.7))
        assert high == low or not low.synthetic


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), index=st.integers(0, 2**40), n=st.integers(1, 50))
def test_a_slot_is_drawn_again_from_its_key_alone(seed, epoch, index, n):
    key = (seed, epoch, index)
    slot = planner({NODULE: 1.0}).decide(key, 7, eligible=True)
    added = planner().add(key, NODULE, np.arange(n))
    again = planner(seed=3).regenerate(key, NODULE)
    for one in (slot, added):
        assert (one.noise_seed, one.boxes.tobytes()) == (again.noise_seed, again.boxes.tobytes())
    assert 0 <= again.noise_seed < 2**63 and 0 <= added.host < n


def test_slots_are_equal_bit_by_bit_and_survive_pickling():
    slot = planner({NODULE: 1.0}).decide((0, 0, 1), 1, eligible=True)
    for other in (pickle.loads(pickle.dumps(slot)), copy.deepcopy(slot)):
        assert other == slot and hash(other) == hash(slot)
    moved = Slot(slot.key, slot.class_name, slot.noise_seed, np.nextafter(slot.boxes, np.float32(1)), slot.host)
    assert moved != slot and slot != "slot"


def test_params_speak_of_every_slot_and_masks_fit_boxes():
    slots = tuple(planner({NODULE: 0.5}).decide((0, 0, i), i, eligible=True) for i in range(12))
    params = MixParams(slots, "whole", (48, 64), "hash")
    assert params.synthetic.tolist() == [s.synthetic for s in slots] and 0 < params.synthetic.sum() < 12
    assert params.classes == [s.class_name for s in slots] and params.keys == [(0, 0, i) for i in range(12)]
    assert params.noise_seeds == [s.noise_seed for s in slots]
    assert params.masks.shape == (12, 1, 48, 64) and torch.equal(params.masks, boxes_to_masks(params.boxes, (48, 64)))
    assert torch.equal(params.masks.flatten(1).any(1), params.synthetic)
    assert pickle.loads(pickle.dumps(params)) == params


def test_no_slot_can_change_the_shared_empty_boxes():
    with pytest.raises(ValueError, match="read-only"):
        NO_BOXES.resize((1, 4)) if NO_BOXES.flags.writeable else NO_BOXES.__setitem__(slice(None), 1)


# --- counts ---
REAL = {NORMAL: 90, NODULE: 10}


@pytest.mark.parametrize(
    ("strategy", "added"),
    [
        ("auto", {NODULE: 80}),
        ("minority", {NODULE: 80}),
        ("not majority", {NODULE: 80}),
        ("all", {NODULE: 80}),
        ("not minority", {}),
        (0.5, {NODULE: 35}),
        (1, {NODULE: 80}),
        (np.float32(0.5), {NODULE: 35}),
        ({"nodule": 25}, {NODULE: 15}),
        ({"Nodule": 10, "normal": 100}, {NORMAL: 10}),
        (lambda counts: {"Nodule": counts["No Finding"]}, {NODULE: 80}),
    ],
)
def test_sampling_strategies_add_what_imbalanced_learn_would(strategy, added):
    assert added_counts(REAL, POLICY, sampling_strategy=strategy) == added


def test_equal_classes_need_nothing_added():
    for word in STRATEGIES:
        assert added_counts({NORMAL: 5, NODULE: 5}, POLICY, sampling_strategy=word) == {}


def test_a_larger_nodule_class_raises_the_normal_one():
    assert added_counts({NORMAL: 5, NODULE: 9}, POLICY, sampling_strategy="minority") == {NORMAL: 4}


def test_n_synthetic_is_added_whatever_the_counts():
    assert added_counts(REAL, POLICY, n_synthetic={"nodule": 7, "normal": 0}) == {NODULE: 7}
    assert added_counts(REAL, POLICY) == {}


@settings(deadline=None, max_examples=100)
@given(normal=st.integers(0, 500), nodule=st.integers(0, 500), more=st.integers(0, 500), fewer=st.integers(1, 500))
def test_a_dict_of_totals_is_met_exactly_or_refused(normal, nodule, more, fewer):
    real = {NORMAL: normal, NODULE: nodule}
    added = added_counts(real, POLICY, sampling_strategy={NODULE: nodule + more})
    assert added == ({NODULE: more} if more else {})
    if nodule >= fewer:
        with pytest.raises(ValueError, match="sampling_strategy must not be below the real count of 'Nodule'"):
            added_counts(real, POLICY, sampling_strategy={NODULE: nodule - fewer})


@pytest.mark.parametrize(
    ("strategy", "kind", "match"),
    [
        ("majority", ValueError, "sampling_strategy must be one of .*got 'majority'"),
        (0.0, ValueError, r"in \(0, 1\], got 0.0"),
        (1.5, ValueError, r"in \(0, 1\], got 1.5"),
        (float("nan"), ValueError, r"in \(0, 1\], got nan"),
        (0.05, ValueError, "must not be below the real ratio"),
        (True, TypeError, "got bool"),
        ([1], TypeError, "got list"),
        (lambda counts: 3 + 4j, TypeError, "got complex"),
        ({"Effusion": 3}, ValueError, "sampling_strategy has an unknown class 'Effusion'"),
        ({3: 3}, ValueError, "sampling_strategy has an unknown class 3"),
        ({"other": 3}, ValueError, "must name classes that the generator makes .*got 'other'"),
        ({"Nodule": 5}, ValueError, r"real count of 'Nodule' \(10\), got 5"),
        ({"Nodule": 2.5}, TypeError, r"sampling_strategy\['Nodule'\] must be an integer, got 2.5"),
        ({"Nodule": 20, "nodule": 30}, ValueError, "must name each class once, got 'Nodule' twice"),
    ],
)
def test_a_bad_strategy_is_named(strategy, kind, match):
    with pytest.raises(kind, match=match):
        added_counts(REAL, POLICY, sampling_strategy=strategy)


@pytest.mark.parametrize(
    ("p", "kind", "match"),
    [
        (1.2, ValueError, r"p must be in \[0, 1\], got 1.2"),
        (-0.1, ValueError, r"p must be in \[0, 1\], got -0.1"),
        (float("nan"), ValueError, r"p must be in \[0, 1\], got nan"),
        ("half", TypeError, "p must be a number .*got 'half'"),
        (True, TypeError, "got True"),
        ({"Nodule": 0.6, "No Finding": 0.6}, ValueError, "p must not exceed 1 .*got 1.2"),
        ({"Mass": 0.1}, ValueError, "p has an unknown class 'Mass'"),
        ({"Nodule": 0.1, "NODULE": 0.2}, ValueError, "p must name each class once"),
    ],
)
def test_a_bad_chance_is_named(p, kind, match):
    with pytest.raises(kind, match=match):
        check_chances(p, POLICY)


def test_chances_are_given_as_a_number_or_per_class():
    assert check_chances(0.25, POLICY) == {NODULE: 0.25} and check_chances(np.float32(1), POLICY) == {NODULE: 1}
    assert check_chances({"normal": 0.5, "nodule": 0.5}, POLICY) == {NORMAL: 0.5, NODULE: 0.5}


@pytest.mark.parametrize("epoch", [-1, 1.5, "1", True, None, 2**63])
def test_a_bad_epoch_is_named(epoch):
    with pytest.raises(ValueError, match="epoch must be an integer in"):
        check_epoch(epoch)


@pytest.mark.parametrize(
    ("state", "kind", "match"),
    [
        ([1], TypeError, "state must be a dict"),
        ({"seed": 0, "epoch": 0}, ValueError, "state must have seed, epoch and step, got"),
        ({"seed": 1, "epoch": 0, "step": 0}, ValueError, "state must be of this mix's seed 0, got 1"),
        ({"seed": 0, "epoch": -1, "step": 0}, ValueError, "epoch must be"),
        ({"seed": 0, "epoch": 0, "step": -2}, ValueError, "step must be an integer of at least 0, got -2"),
        ({"seed": 0, "epoch": 0, "step": 1.0}, ValueError, "step must be an integer"),
    ],
)
def test_a_bad_state_is_named(state, kind, match):
    with pytest.raises(kind, match=match):
        check_state(state, 0)
