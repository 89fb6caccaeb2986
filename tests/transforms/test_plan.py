"""A decision is a pure function of its key; what a state, an epoch and a batch's params must be."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import prior

from carim_aug.ops.boxes import boxes_to_masks, check_boxes
from carim_aug.transforms.plan import NO_BOXES, Decision, MixParams, Planner, check_epoch, check_state

NORMAL, NODULE = "No Finding", "Nodule"


def planner(chances=None, seed=0, **options):
    return Planner(prior(), seed=seed, nodule=NODULE, chances={NODULE: 0.5} if chances is None else chances, **options)


def decide(chances, i, eligible=True):
    return planner(chances).decide((0, 0, i), i, eligible=eligible)


def test_an_image_that_is_not_eligible_stays_real():
    one = decide({NODULE: 1.0}, 3, eligible=False)
    assert not one.synthetic and one.class_name is None and one.background == 3 and one.boxes.shape == (0, 4)


def test_chances_are_met_to_within_four_standard_errors():
    names = [decide({NODULE: 0.3, NORMAL: 0.2}, i).class_name for i in range(4000)]
    for name, chance in ((NODULE, 0.3), (NORMAL, 0.2), (None, 0.5)):
        assert abs(names.count(name) / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5
    for chance, expected in ((1.0, NODULE), (0.0, None)):
        assert {decide({NODULE: chance}, i).class_name for i in range(200)} == {expected}


def test_a_nodule_has_boxes_in_the_image_and_a_normal_image_none():
    for i in range(50):
        one = decide({NODULE: 1.0}, i)
        assert len(one.boxes) >= 1
        check_boxes(one.boxes_at(100, 73), (100, 73))
        assert decide({NORMAL: 1.0}, i).boxes.shape == (0, 4)
    one = Decision((0, 0, 0), NODULE, 1, np.array([[0.25, 0.5, 0.5, 0.75]], dtype=np.float32), 0)
    assert one.boxes_at(100, 40).tolist() == [[10, 50, 20, 75]]


def test_a_higher_chance_takes_the_same_images_and_more():
    for i in range(100):
        low, high = (decide({NODULE: p}, i) for p in (0.2, 0.7))
        assert high == low or not low.synthetic


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), index=st.integers(0, 2**40), n=st.integers(1, 50))
def test_a_decision_is_drawn_again_from_its_key_alone(seed, epoch, index, n):
    key = (seed, epoch, index)
    replaced = planner({NODULE: 1.0}).decide(key, 7, eligible=True)
    added = planner().add(key, NODULE, np.arange(n))
    again = planner(seed=3).regenerate(key, NODULE)
    for one in (replaced, added):
        assert (one.noise_seed, one.boxes.tobytes()) == (again.noise_seed, again.boxes.tobytes())
    assert 0 <= again.noise_seed < 2**63 and 0 <= added.background < n


def test_decisions_are_equal_bit_by_bit_and_survive_pickling():
    one = decide({NODULE: 1.0}, 1)
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one and hash(other) == hash(one)
    moved = Decision(one.key, one.class_name, one.noise_seed, np.nextafter(one.boxes, np.float32(1)), one.background)
    assert moved != one and one != "decision"
    assert not NO_BOXES.flags.writeable  # shared by all decisions without boxes


def test_params_speak_of_every_image_and_masks_fit_boxes():
    each = tuple(decide({NODULE: 0.5}, i) for i in range(12))
    params = MixParams(each, "whole", ((48, 64),) * 12, "hash")
    assert params.synthetic.tolist() == [d.synthetic for d in each] and 0 < params.synthetic.sum() < 12
    assert params.classes == [d.class_name for d in each] and params.keys == [(0, 0, i) for i in range(12)]
    assert params.noise_seeds == [d.noise_seed for d in each]
    assert params.masks.shape == (12, 1, 48, 64) and torch.equal(params.masks, boxes_to_masks(params.boxes, (48, 64)))
    assert torch.equal(params.masks.flatten(1).any(1), params.synthetic)
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(ValueError, match="images must be of one size to have masks in one tensor, got .*48, 64"):
        _ = MixParams(each[:2], "whole", ((48, 64), (64, 48)), "hash").masks


@pytest.mark.parametrize("epoch", [-1, 1.5, "1", True, None, 2**63])
def test_a_bad_epoch_is_named(epoch):
    with pytest.raises(ValueError, match="epoch must be an integer in"):
        check_epoch(epoch)


def test_a_bad_state_is_named():
    for state, kind, match in (
        ([1], TypeError, "state must be a dict.* got list"),
        ({"seed": 0, "epoch": 0}, ValueError, "state must have seed, epoch and step, got"),
        ({"seed": 1, "epoch": 0, "step": 0}, ValueError, "state must be of this mix's seed 0, got 1"),
        ({"seed": 0, "epoch": -1, "step": 0}, ValueError, "epoch must be .* got -1"),
        ({"seed": 0, "epoch": 0, "step": -2}, ValueError, "step must be .* got -2"),
        ({"seed": 0, "epoch": 0, "step": 1.0}, ValueError, "step must be .* got 1.0"),
    ):
        with pytest.raises(kind, match=match):
            check_state(state, 0)
