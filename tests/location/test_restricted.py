"""A narrowed prior draws what was asked for, and says so where nothing is left."""

import pickle

import numpy as np
import pytest
import torch
from tiny import Films, generator, make_mix, prior

from carim_aug import LocationPrior, NarrowedPrior, PriorError, SyntheticNoduleMix

RNG = np.random.default_rng


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def sizes(boxes):
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def drawn(narrowed, n=200, seed=0):
    rng = RNG(seed)
    return [narrowed.draw(rng) for _ in range(n)]


def test_sizes_count_and_region_hold_for_every_draw():
    draws = drawn(NarrowedPrior(sizes=(0.02, 0.04), count=(2, 3), region="image right"))
    together = np.concatenate(draws)
    assert {len(d) for d in draws} == {2, 3}
    assert sizes(together).min() >= 0.02 - 1e-6 and sizes(together).max() <= 0.04 + 1e-6
    assert centres(together)[:, 0].min() >= 0.5
    for a in draws:
        for i in range(len(a)):
            for j in range(i):
                assert a[i, 2] <= a[j, 0] or a[j, 2] <= a[i, 0] or a[i, 3] <= a[j, 1] or a[j, 3] <= a[i, 1]


def test_the_named_regions_are_where_their_names_say():
    upper, lower = (np.concatenate(drawn(NarrowedPrior(region=r)))[:, 1] for r in ("upper", "lower"))
    assert upper.mean() < 0.35 < 0.6 < lower.mean()
    x, y = centres(np.concatenate(drawn(NarrowedPrior(region="heart")))).T
    assert (((x - 0.60) / 0.12) ** 2 + ((y - 0.62) / 0.15) ** 2).max() < 1.2  # half a cell more


def test_a_mask_of_the_users_is_a_region():
    mask = torch.zeros(100, 50)
    mask[30:40, 10:15] = 1
    x, y = centres(np.concatenate(drawn(NarrowedPrior(region=mask), 50))).T
    assert x.min() >= 0.2 and x.max() <= 0.3 and y.min() >= 0.3 and y.max() <= 0.4


def test_boxes_of_the_users_are_all_that_is_drawn():
    given = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 90.0]])
    rows = {tuple(np.round(d[0] * 100, 3)) for d in drawn(NarrowedPrior(boxes=given, image_size=100, count=1), 40)}
    assert rows == {(10.0, 20.0, 30.0, 40.0), (50.0, 60.0, 70.0, 90.0)}
    assert {len(d) for d in drawn(NarrowedPrior(boxes=given, image_size=100, count=2), 10)} == {2}


def test_without_wishes_it_draws_as_the_prior_does():
    ours, bundled = np.concatenate(drawn(NarrowedPrior(), 3000)), np.concatenate(drawn(LocationPrior.bundled(), 3000))
    assert abs(centres(ours).mean(0) - centres(bundled).mean(0)).max() < 0.02
    assert abs(np.log(sizes(ours)).mean() - np.log(sizes(bundled)).mean()) < 0.05
    assert abs(len(ours) - len(bundled)) < 300


def test_a_mix_takes_it_and_its_slots_are_keyed():
    mix = SyntheticNoduleMix(generator(), NarrowedPrior(count=3), p=1.0, insertion="graft")
    wrapped = mix.wrap(Films(8))
    assert [len(wrapped.slot(i).boxes) for i in range(3)] == [3, 3, 3]
    assert wrapped.slot(1) == pickle.loads(pickle.dumps(wrapped)).slot(1)


def test_what_cannot_be_met_is_named_before_training(tmp_path):
    with pytest.raises(PriorError, match="widen the sizes or the region"):
        NarrowedPrior(sizes=(0.5, 0.6))
    with pytest.raises(PriorError, match="cannot be saved"):
        NarrowedPrior().save(tmp_path / "prior.safetensors")
    for options, words in (
        ({"sizes": (0.1, 0.05)}, r"sizes must be .*got \(0.1, 0.05\)"),
        ({"count": 0}, r"count must be"),
        ({"region": "spleen"}, "region must be one of .*got 'spleen'"),
        ({"region": np.zeros((4, 4))}, "region must be a mask"),
        ({"boxes": [[0.0, 0.0, 5.0, 5.0]]}, "image_size must be given"),
        ({"boxes": [[5.0, 0.0, 5.0, 5.0]], "image_size": 9}, "x1 < x2"),
    ):
        with pytest.raises(ValueError, match=words):
            NarrowedPrior(**options)
    assert make_mix(p=1.0).prior is prior()
