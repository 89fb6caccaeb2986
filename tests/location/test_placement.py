"""A graft comes to lie in its image's own lungs as often as a real nodule does; all of it keyed."""

from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Samples, generator, make_mix, prior

from carim_aug.data.phantom import phantom_chest
from carim_aug.location.placement import KEPT_OUTSIDE, Area, candidates
from carim_aug.ops.random import stream
from carim_aug.transforms.apply import Applier
from carim_aug.transforms.plan import Planner
from carim_aug.transforms.settings import MixSettings

PLANNER = Planner(prior(), seed=0, nodule="Nodule", chances={"Nodule": 1.0})
APPLIER = Applier(MixSettings(prior()), generator())


def decide(n, start=0):
    return tuple(PLANNER.decide((0, 0, i), i, eligible=True) for i in range(start, start + n))


def place(images, decisions, applier=APPLIER):
    return applier.place(images, decisions, PLANNER).decisions


def lungs(monkeypatch, columns, rows=slice(None)):
    """Let every image have the same lungs."""
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, rows, columns] = True
    where = "carim_aug.location.placement.lung_masks"
    monkeypatch.setattr(where, lambda images, field=None: mask.expand(len(images), -1, -1))
    monkeypatch.setattr("carim_aug.transforms.apply.usual_view", lambda images: [None] * len(images))


def share_inside(decisions):
    centres = [(one.boxes[:, 0] + one.boxes[:, 2]) / 2 for one in decisions]
    return sum(float((c < 0.5).mean()) for c in centres) / len(centres)


def test_draws_outside_are_kept_with_the_stated_chance_and_others_say_so_in_their_key(monkeypatch):
    lungs(monkeypatch, slice(30))
    before = decide(600)
    after = place(torch.zeros(600, 1, 32, 32), before)
    share = share_inside(before)
    expected = share / (share + KEPT_OUTSIDE * (1 - share))
    assert share < 0.6 and share_inside(after) == pytest.approx(expected, abs=0.05)
    assert [(one.background, one.class_name) for one in after] == [(i, "Nodule") for i in range(600)]

    again = [(new, old) for new, old in zip(after, before, strict=True) if new != old]
    for new, old in again:
        assert new.key[:3] == old.key and len(new.key) == 4 and new.key[3] >= 1
        assert PLANNER.regenerate(new.key, "Nodule") == replace(new, background=-1)
    assert len({new.noise_seed for new, _ in again}) == len(again) > 100
    assert stream(0, 0, 5).random() != stream(0, 0, 5, 0).random()  # acceptance does not use up a decision's own draws


def test_the_same_image_and_key_have_the_same_place_in_any_batch():
    images = torch.stack([phantom_chest(64, seed=i) for i in range(6)])
    before = decide(6)
    whole = place(images, before)
    assert whole == tuple(place(images[i : i + 1], before[i : i + 1])[0] for i in range(6))
    assert whole == place(images.expand(-1, 3, -1, -1), before)


def test_images_in_another_view_or_without_lungs_stay_real_and_are_counted_and_one_draw_is_kept_elsewhere(monkeypatch):
    chest = phantom_chest(96)[None]
    views = torch.cat([chest, 1 - chest, chest.flip(2), chest.mT, chest.rot90(1, (2, 3)), torch.rand(1, 1, 96, 96)])
    applier = Applier(MixSettings(prior()), generator())
    with pytest.warns(UserWarning) as seen:
        placed = place(views, decide(6), applier)
    assert [one.synthetic for one in placed] == [True] + [False] * 5
    counted = applier.settings.graft.left_real.report()
    assert sum(counted.values()) == 5 and {"inverted", "upside down", "lateral or no chest"} <= set(counted)
    assert any("it is inverted: invert such images before the mix" in str(one.message) for one in seen)
    real = tuple(PLANNER.decide((0, 0, i), i, eligible=False) for i in range(2))
    assert place(torch.zeros(2, 1, 64, 64), real) == real
    lungs(monkeypatch, slice(0))
    place(chest, decide(1), applier)
    assert applier.settings.graft.left_real.report()["no lungs found"] == 1
    lungs(monkeypatch, slice(1), slice(1))  # a corner
    monkeypatch.setattr("carim_aug.location.placement.KEPT_OUTSIDE", 0.0)
    assert place(torch.zeros(3, 1, 32, 32), decide(3)) == decide(3)


def test_grafts_lie_alike_in_any_loader_and_in_the_data_set():
    chests = [phantom_chest(64, seed=i).roll((i % 7 - 3, i % 5 - 2), (1, 2)) for i in range(16)]
    data = Samples(lambda i: (chests[i], 0), 16)

    def rows(batch_size, **options):
        loader = make_mix(p=1.0, placement="lungs").loader(data, batch_size=batch_size, **options)
        return [one for _ in loader for one in loader.last_params.decisions]

    one = rows(1)
    assert any(len(decision.key) == 4 for decision in one)  # some were drawn again
    assert one == rows(7) == rows(16, num_workers=1)
    wrapped, unseen = (make_mix(p=1.0, placement=name).wrap(data) for name in ("host", "prior"))  # the old word
    assert one == [wrapped.decision(i) for i in range(16)]
    others = [unseen.decision(i) for i in range(16)]
    assert [decision.key[:3] for decision in one] == [other.key for other in others] and one != others


def test_placement_in_a_mask_of_the_users_is_strict_and_a_bad_one_is_named():
    right_edge = torch.zeros(1, 1, 64, 64)
    right_edge[..., 44:56] = 1
    mix = make_mix(p=1.0, placement=lambda image: right_edge)
    mix(torch.full((24, 1, 64, 64), 0.5), torch.zeros(24, dtype=torch.int64))
    middles = [(one.boxes[:, 0] + one.boxes[:, 2]) / 2 for one in mix.last_params.decisions if one.synthetic]
    assert len(middles) > 20 and all((m >= 44 / 64 - 1e-6).all() and (m <= 56 / 64).all() for m in middles)
    for placement, words in (
        ("spleen", r"placement must be one of \('lungs', 'prior'\) or a function.*, got 'spleen'"),
        (lambda image: torch.zeros(1, 1, 2, 2), r"placement must give .* one pixel set, got none of \(1, 1, 2, 2\)"),
        (lambda image: 3, r"placement must give a mask \(1, 1, H, W\).*, got int"),
        (lambda image: torch.ones(2, 1, 4, 4), r"placement must give a mask \(1, 1, H, W\).*, got \(2, 1, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make_mix(p=1.0, placement=placement)(torch.rand(2, 1, 64, 64), torch.zeros(2, dtype=torch.int64))


@given(taken=st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=6), seed=st.integers(0, 2**32))
def test_no_draw_touches_a_box_that_is_there(taken, seed):
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in taken]).reshape(-1, 4)
    first = PLANNER.regenerate((seed, 0, 0), "Nodule")
    for inside in (None, torch.ones(64, 64, dtype=torch.bool)):
        for drawn in islice(candidates(partial(PLANNER.redraw, first), Area(inside, taken=boxes)), 4):
            low, high = (
                np.maximum(drawn.boxes[:, None, :2], boxes[:, :2]),
                np.minimum(drawn.boxes[:, None, 2:], boxes[:, 2:]),
            )
            assert not (low < high).all(-1).any()
