"""FROC: marks and sensitivities by hand, and against a slow count of random cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.metrics.froc import Marks, mark, mark_images, patient_weights, sensitivity


def square(x, y, side):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def test_marks_of_one_image_by_hand():
    nodules = torch.tensor([square(50, 50, 20), square(100, 100, 4)])
    boxes = torch.tensor([square(59, 50, 8), square(61, 50, 40), square(104, 96, 6), square(106, 100, 6)])
    boxes = torch.cat([boxes, torch.tensor([square(50, 45, 30)])])
    found, false = mark(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3]), nodules)
    # The second is one pixel off the first nodule; the third is in the small one enlarged to 10 pixels, the fourth not;
    # the last finds the first nodule again, less surely.
    assert found.tolist() == pytest.approx([0.9, 0.7]) and false.tolist() == pytest.approx([0.8, 0.6])
    found, false = mark(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3]), nodules, least=0.0)
    assert found.tolist() == pytest.approx([0.9, -math.inf]) and len(false) == 3
    # A box in two nodules counts for the nearer one.
    nodules = torch.tensor([square(50, 50, 20), square(58, 50, 20)])
    found, false = mark(torch.tensor([square(55, 50, 10)]), torch.tensor([0.5]), nodules)
    assert found.tolist() == [-math.inf, 0.5] and not len(false)


def test_images_without_boxes_or_nodules_have_their_place():
    none, one = torch.empty(0, 4), torch.tensor([square(20, 20, 12)])
    marks = mark_images([one, none, one], [torch.tensor([0.4]), torch.empty(0), torch.tensor([0.6])], [none, one, one])
    assert marks.found.tolist() == pytest.approx([-math.inf, 0.6]) and marks.found_images.tolist() == [1, 2]
    assert marks.false.tolist() == pytest.approx([0.4]) and marks.false_images.tolist() == [0] and marks.images == 3


def test_sensitivity_worked_on_paper():
    # Four images, five nodules. In order: hit .95, false .9, hit .8, false .7, false .7, hit .7, hit .4, one missed.
    found = torch.tensor([0.95, 0.8, 0.7, 0.4, -math.inf])
    marks = Marks(found, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.7, 0.9, 0.7]), torch.tensor([2, 3, 3]), 4)
    # 0 allowed: above .9. 1 allowed (.25 each): above .7, where the tie counts against. 3 allowed: all that was given.
    assert sensitivity(marks, (0, 0.2, 0.25, 0.5, 0.75, 4)).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.8, 0.8])
    # The first image twice, the last not at all: six nodules (of the first image two each), no false .9 and one .7.
    weights = torch.tensor([[2.0, 1, 1, 0], [1, 1, 1, 1]])
    both = sensitivity(marks, (0, 0.25), weights=weights)
    assert both[0].tolist() == pytest.approx([4 / 7, 6 / 7]) and both[1].tolist() == pytest.approx([0.2, 0.4])


scores = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=12)


def make(rows, copies=((0,), (1,), (2,), (3,))):
    rows = [(s, i) for s, image in rows for i in copies[image]]
    return torch.tensor([float(s) for s, _ in rows]), torch.tensor([i for _, i in rows], dtype=torch.int64)


@given(scores.filter(len), scores, st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0]), st.lists(st.integers(0, 3), min_size=4))
def test_weights_count_as_copies_of_the_images(found, false, rate, times):
    def slow(found, false, n):
        limits = [t for t in (-math.inf, *false) if sum(s > t for s in false) <= rate * n]
        return sum(s > min(limits) for s in found) / len(found)

    marks, ends = Marks(*make(found), *make(false), 4), [sum(times[:i]) for i in range(5)]
    copies, n = [range(ends[i], ends[i + 1]) for i in range(4)], ends[4]
    value = sensitivity(marks, (rate,), weights=torch.tensor([times[:4]]).double())[0, 0].item()
    repeated = Marks(*make(found, copies), *make(false, copies), n)
    if not len(repeated.found):
        assert math.isnan(value)
        return
    assert value == pytest.approx(sensitivity(repeated, (rate,))[0].item())
    assert value == pytest.approx(slow(repeated.found.tolist(), repeated.false.tolist(), n))


@given(scores.filter(len), scores)
def test_more_false_positives_never_find_fewer_nodules(found, false):
    values = sensitivity(Marks(*make(found), *make(false), 4), (0, 0.25, 1, 4)).tolist()
    assert values == sorted(values) and values[-1] == 1.0  # twelve false positives are fewer than 4 an image


def test_patients_are_drawn_whole_and_by_group():
    patients = torch.tensor([7, 7, 3, 5, 5, 9])
    boxed = torch.tensor([True, False, True, False, False, False])
    weights = patient_weights(patients, boxed, generator=torch.Generator().manual_seed(0), draws=500)
    assert weights.shape == (500, 6) and torch.equal(weights[:, 0], weights[:, 1])
    assert torch.equal(weights[:, 3], weights[:, 4])
    assert (weights[:, 0] + weights[:, 2] == 2).all() and (weights[:, 3] + weights[:, 5] == 2).all()
    assert weights.mean(0).sub(1).abs().max() < 0.15 and weights[:, 0].unique().tolist() == [0, 1, 2]


NONE, ONE = torch.zeros(0).long(), Marks(torch.ones(1), torch.zeros(1).long(), torch.zeros(0), torch.zeros(0).long(), 1)
RNG = torch.Generator()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mark(torch.zeros(2, 4), torch.zeros(1), torch.zeros(0, 4)), r"\(n, 4\), \(n,\) and \(k, 4\)"),
        (lambda: mark_images([], [], []), "at least one, got 0"),
        (lambda: sensitivity(Marks(torch.zeros(0), NONE, NONE, NONE, 3)), "nodule"),
        (lambda: sensitivity(ONE, (-1.0,)), "rates must be at least 0, got -1"),
        (lambda: sensitivity(ONE, weights=torch.ones(2, 3)), r"weights must be \(draws, 1\), got \(2, 3\)"),
        (lambda: patient_weights(torch.zeros(3), torch.zeros(2).bool(), generator=RNG), r"each, got \(3,\) and \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
