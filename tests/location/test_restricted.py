"""A restricted prior draws what was asked for, has the density of that, and says so where nothing is left."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from tiny import Images, generator

from carim_aug import SyntheticNoduleMix
from carim_aug.location.density import boxes_to_points
from carim_aug.location.prior import LocationPrior, PriorError
from carim_aug.location.restricted import RestrictedPrior, uniform_prior

GIVEN = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 90.0]])


@pytest.fixture(scope="module")
def bundled():
    return LocationPrior.bundled()


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def sizes(boxes):
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def draws(prior, n=200, seed=0):
    rng = np.random.default_rng(seed)
    return [prior.draw(rng) for _ in range(n)]


def test_sizes_count_and_region_hold_for_every_draw_also_in_a_mix():
    some = draws(RestrictedPrior(sizes=(0.02, 0.04), count=(2, 3), region="image right"))
    together = np.concatenate(some)
    assert {len(d) for d in some} == {2, 3}
    assert sizes(together).min() >= 0.02 - 1e-6 and sizes(together).max() <= 0.04 + 1e-6
    assert centres(together)[:, 0].min() >= 0.5
    for a, b in (pair for boxes in some for pair in itertools.combinations(boxes, 2)):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    wrapped = SyntheticNoduleMix(generator(), RestrictedPrior(count=3), p=1.0, placement="prior").wrap(Images(8))
    assert [len(wrapped.decision(i).boxes) for i in range(3)] == [3, 3, 3]
    assert (wrapped.decision(1).boxes == pickle.loads(pickle.dumps(wrapped)).decision(1).boxes).all()


def test_regions_are_where_their_names_and_masks_say():
    upper, lower = (np.concatenate(draws(RestrictedPrior(region=r)))[:, 1] for r in ("upper", "lower"))
    assert upper.mean() < 0.35 < 0.6 < lower.mean()
    x, y = centres(np.concatenate(draws(RestrictedPrior(region="heart")))).T
    assert (((x - 0.60) / 0.12) ** 2 + ((y - 0.62) / 0.15) ** 2).max() < 1.2  # half a cell more
    mask = torch.zeros(100, 50)
    mask[30:40, 10:15] = 1
    x, y = centres(np.concatenate(draws(RestrictedPrior(region=mask), 50))).T
    assert x.min() >= 0.2 and x.max() <= 0.3 and y.min() >= 0.3 and y.max() <= 0.4


def test_boxes_of_the_users_are_all_that_is_drawn():
    single, pairs = (RestrictedPrior(boxes=GIVEN, image_size=100, count=k) for k in (1, 2))
    assert {tuple(np.round(d[0] * 100, 3)) for d in draws(single, 40)} == {tuple(b) for b in GIVEN.tolist()}
    assert {len(d) for d in draws(pairs, 10)} == {2}
    with pytest.raises(PriorError, match="log_prob must have a density"):
        single.log_prob(GIVEN, 100)


def test_without_restrictions_it_is_the_prior(bundled):
    plain = RestrictedPrior()
    ours, theirs = np.concatenate(draws(plain, 3000)), np.concatenate(draws(bundled, 3000))
    assert abs(centres(ours).mean(0) - centres(theirs).mean(0)).max() < 0.02
    assert abs(np.log(sizes(ours)).mean() - np.log(sizes(theirs)).mean()) < 0.05 and abs(len(ours) - len(theirs)) < 300
    assert plain.log_prob(theirs[:50] * 64, 64).equal(bundled.log_prob(theirs[:50] * 64, 64))
    assert plain.field.equal(bundled.field) and plain.log_prob_count(2) == bundled.log_prob_count(2)


def test_log_prob_is_the_density_of_its_draws():
    """Over the box sizes and places that are left it integrates to one; elsewhere it is -inf."""
    prior, rng, n = RestrictedPrior(sizes=(0.03, 0.06), region="image left"), np.random.default_rng(0), 40_000
    (low, high), aspect = np.log((0.03, 0.06)), math.log(2.5)
    x, y, log_size, log_aspect = rng.uniform([0, 0, low, -aspect], [0.5, 1, high, aspect], (n, 4)).T
    half = np.exp(log_size)[:, None] * np.exp(np.stack([log_aspect, -log_aspect], 1) / 2) / 2
    corners = np.concatenate([np.stack([x, y], 1) - half, np.stack([x, y], 1) + half], 1) * 512
    corners = corners[((corners >= 0) & (corners <= 512)).all(1)]
    values = np.exp(prior.log_prob(corners, 512).numpy()) * 0.5 * (high - low) * 2 * aspect
    assert values.sum() / n == pytest.approx(1, abs=4 * values.std() / math.sqrt(n) + 0.02)
    outside = [[300, 200, 320, 220], [100, 200, 110, 210], [100, 200, 150, 250]]  # right half, too small, too large
    assert (prior.log_prob(outside, 512) == -math.inf).all()
    boxes = np.concatenate(draws(prior, 50)).astype(np.float64)
    assert prior.log_prob(boxes * 512, 512).isfinite().float().mean() > 0.95  # the rest: float32 at an edge


def test_a_count_is_uniform_over_its_range_and_it_samples_pickles_is_plotted_and_not_saved(tmp_path):
    for count, chances in ((2, [0, 1, 0]), ((6, 7), [0] * 5 + [0.5, 0.5, 0])):
        prior = RestrictedPrior(count=count)
        assert [math.exp(prior.log_prob_count(k)) for k in range(len(chances) + 1)] == pytest.approx([0, *chances])
        assert prior.max_count == len(prior.counts) == len(chances) - 1
    prior = RestrictedPrior(count=6, sizes=(0.015, 0.03))
    one, other = (p.sample(5, torch.Generator().manual_seed(1), 64) for p in (prior, pickle.loads(pickle.dumps(prior))))
    assert one.masks.equal(other.masks) and one.masks.shape == (5, 1, 64, 64) and len(one.boxes[0]) == 6
    assert "count (6, 6)" in repr(prior)
    with pytest.raises(PriorError, match="cannot be saved: save the prior"):
        prior.save(tmp_path / "prior.safetensors")
    pytest.importorskip("matplotlib")
    assert [patch.get_height() for patch in prior.plot().axes[2].patches] == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sizes": (0.5, 0.6)}, PriorError, "widen the sizes or the region"),
        ({"sizes": (0.1, 0.05)}, ValueError, r"sizes must be .*got \(0.1, 0.05\)"),
        ({"count": 0}, ValueError, r"count must be .*got \(0, 0\)"),
        ({"region": "spleen"}, ValueError, "region must be one of .*got 'spleen'"),
        ({"region": np.zeros((4, 4))}, ValueError, r"region must be a mask .*got shape \(4, 4\)"),
        ({"boxes": [[0.0, 0.0, 5.0, 5.0]]}, ValueError, "image_size must be given"),
        ({"boxes": np.zeros((0, 4)), "image_size": 9}, ValueError, "boxes must be at least one"),
        ({"prior": 3}, TypeError, "prior must be a LocationPrior, got int"),
    ],
)
def test_what_cannot_be_met_is_named(options, error, words):
    with pytest.raises(error, match=words):
        RestrictedPrior(**options)


def test_random_places_are_uniform_have_the_priors_sizes_and_are_saved(bundled, tmp_path):
    anywhere = uniform_prior()
    own, usual = (
        boxes_to_points(np.concatenate([d[:1] for d in draws(prior, 4000)]).astype(np.float64), 1, 1)
        for prior in (anywhere, bundled)
    )
    # A box must be in the image: of the middle, where all sizes may be, each tenth holds as many.
    for axis in (0, 1):
        middle = own[(own[:, axis] > 0.1) & (own[:, axis] < 0.9), axis]
        share = torch.histc(torch.from_numpy(middle), 8, 0.1, 0.9) / len(middle)
        assert share.sub(1 / 8).abs().max() < 0.02
        assert (own[:, axis] < 0.1).mean() > 0.05 and (own[:, axis] > 0.9).mean() > 0.05
    for part in (2, 3):
        assert own[:, part].mean() == pytest.approx(usual[:, part].mean(), abs=0.06)
        assert own[:, part].std() == pytest.approx(usual[:, part].std(), rel=0.15)
    assert (anywhere.counts == bundled.counts).all() and bool(anywhere.field.all())
    assert uniform_prior(RestrictedPrior(count=3, sizes=(0.03, 0.05))).counts.tolist() == [0, 0, 1]
    anywhere.save(tmp_path / "anywhere.safetensors")
    again = LocationPrior.load(tmp_path / "anywhere.safetensors")
    one, other = (p.sample(20, torch.Generator().manual_seed(1), 64) for p in (anywhere, again))
    assert torch.equal(one.masks, other.masks)
    values = anywhere.log_prob([[10.0, 10, 20, 20], [2, 2, 12, 12]], 256)
    assert values.isfinite().all() and values[0].item() == pytest.approx(values[1].item())
