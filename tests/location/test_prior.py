import dataclasses
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carim_aug.location.prior import LocationPrior, PriorError
from carim_aug.ops.boxes import boxes_to_masks, check_boxes
from carim_aug.ops.sealed import read_sealed, write_sealed

S = 200
GOOD = np.array([[50.0, 60.0, 60.0, 70.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def two_lungs():
    field = torch.zeros(64, 64, dtype=torch.bool)
    field[10:50, 8:28] = field[10:50, 36:56] = True
    return field


def random_boxes(n=60, seed=0, left_share=0.9):
    """One box an image: nine in ten small, in the image's left and upper part; the rest large, right and low."""
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(n):
        left = rng.random() < left_share
        x, y, side = (0.28, 0.35, 0.04) if left else (0.72, 0.65, 0.08)
        x, y, side = x + 0.04 * rng.standard_normal(), y + 0.04 * rng.standard_normal(), side * rng.uniform(0.8, 1.2)
        boxes.append(np.array([[x - side / 2, y - side / 2, x + side / 2, y + side / 2]]) * S)
    return boxes


def fit(boxes, **options):
    return LocationPrior.fit(boxes, S, **{"field": two_lungs(), **options})


@pytest.fixture(scope="module")
def prior():
    return fit(random_boxes())


@pytest.fixture(scope="module")
def bundled():
    return LocationPrior.bundled()


def test_bundled_prior_says_what_it_was_fitted_on_and_draws_in_the_lungs(bundled):
    assert bundled.n_boxes > 500 and bundled.n_patients > 200 and bundled.max_count == 4
    assert "ChestX-ray14" in bundled.description and str(bundled.n_boxes) in repr(bundled)
    sample = bundled.sample(300, seeded(), 256, shape="ellipse")
    assert sample.masks.equal(boxes_to_masks(sample.boxes, 256, shape="ellipse")) and len(sample.boxes) == 300
    assert {len(b) for b in sample.boxes} == {1, 2, 3, 4}
    boxes = torch.cat(sample.boxes).double()
    check_boxes(boxes, 256)
    cell = ((boxes[:, :2] + boxes[:, 2:]) / 2 / 256 * 64 + 1e-5).floor().long()
    assert bundled.field[cell[:, 1], cell[:, 0]].float().mean() > 0.995  # the rest: float32 at a cell's edge
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 256
    assert side.min() > bundled.size_bounds[0] - 1e-5 and side.max() < bundled.size_bounds[1] + 1e-5
    assert bundled.sample(0, seeded(), 64).masks.shape == (0, 1, 64, 64)


@given(seed=st.integers(0, 2**32))
def test_boxes_of_one_image_do_not_overlap(bundled, seed):
    boxes = bundled.draw(np.random.default_rng(seed))
    assert boxes.dtype == np.float32 and boxes.ndim == 2 and 1 <= len(boxes) <= 4
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    for i, a in enumerate(boxes.tolist()):
        for b in boxes[:i].tolist():
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert min(width, height) <= 1e-6


def test_draws_are_those_of_their_seed_left_stays_left_and_size_goes_with_place(prior):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (torch.cat(prior.sample(8, seeded(s), 96).boxes) for s in (3, 3, 4))
    assert first.equal(again) and not first[:8].equal(other[:8])
    unit, pixels = prior.draw(np.random.default_rng(5)), prior.draw(np.random.default_rng(5), 512)
    assert np.allclose(unit * 512, pixels, atol=1e-3)
    fit(random_boxes(5))
    assert torch.get_rng_state().equal(before[0]) and (np.random.get_state()[1] == before[1]).all()
    boxes = torch.cat(prior.sample(2000, seeded(), 100).boxes)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    assert 0.8 < (x < 50).float().mean() < 0.97
    assert abs(x[x < 50].mean() - 28) < 2 and abs(y[x < 50].mean() - 35) < 2 and y[x > 50].mean() > 50
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    assert side[x > 60].mean() > 1.4 * side[x < 40].mean()


def densities_of(prior, low_corner, high_corner, n, seed=0):
    """The density of n points with centres in a part of the image, times the volume of all points there."""
    (low, high), aspect = np.log(prior.size_bounds), math.log(2.5)
    points = np.random.default_rng(seed).uniform([*low_corner, low, -aspect], [*high_corner, high, aspect], (n, 4))
    area = math.prod(np.subtract(high_corner, low_corner))
    return np.exp(prior.density.log_prob(points)) * area * (high - low) * 2 * aspect


def test_density_integrates_to_one_and_draws_follow_it(prior, bundled):
    """The share of draws in a small part of the image is the density's integral over that part."""
    values = densities_of(bundled, [0, 0], [1, 1], 60_000)
    assert values.mean() == pytest.approx(1, abs=4 * values.std() / math.sqrt(60_000)) and values.std() < 3.7
    rng = np.random.default_rng(0)
    boxes = np.array([prior.density.draw(rng) for _ in range(4000)])
    inside = (abs((boxes[:, :2] + boxes[:, 2:]) / 2 - [0.28, 0.35]) < 0.05).all(1)
    mass = densities_of(prior, [0.23, 0.30], [0.33, 0.40], 50_000, seed=1).mean()
    assert inside.mean() == pytest.approx(mass, abs=0.03) and mass > 0.2


def test_density_of_one_box_is_known_by_hand():
    """One fitting box: one kernel, a tenth broad; at its centre both terms are written down."""
    box = np.array([[90.0, 90.0, 100.0, 100.0]])
    prior = fit([box], field=torch.ones(64, 64, dtype=torch.bool))
    normal = 1 / (2 * math.pi * 0.1 * 0.1)
    bracket = 0.9 * normal / (2 * math.pi * 0.02**2) + 0.1 * normal
    expected = math.log(bracket / prior.density.mass)
    assert prior.log_prob(box, S).item() == pytest.approx(expected, abs=1e-9)
    assert prior.density.mass == pytest.approx(0.9 + 0.1 * 0.95**2, abs=3e-3)  # broad: centre 0.025 from each edge


def test_log_prob_is_minus_infinity_outside_and_the_same_at_every_resolution(prior):
    inside = torch.from_numpy(GOOD)
    outside = torch.tensor([[95.0, 95.0, 105.0, 105.0], [50.0, 60.0, 100.0, 110.0], [50.0, 60.0, 52.0, 62.0]])
    values = prior.log_prob(torch.cat([inside, outside]), S)
    assert values.dtype == torch.float64 and values[0].isfinite() and (values[1:] == -math.inf).all()
    assert prior.log_prob(inside * 4, 4 * S).allclose(values[:1])
    assert prior.log_prob(torch.zeros(0, 4), S).shape == (0,)


def test_a_tie_of_a_half_gives_half_of_the_boxes_a_size_of_another_place():
    """Two boxes, far apart and of unlike sizes: the density at each mix of place and size, written down."""
    boxes = [GOOD, np.array([[140.0, 120.0, 160.0, 140.0]])]
    fitted = fit(boxes, patients=["a", "a"])
    narrow = dataclasses.replace(fitted.density, bandwidths=np.array([0.01, 0.01, 0.05, 0.05]), mass=1.0)
    narrow = dataclasses.replace(narrow, broad=np.array([1e-9, *narrow.broad[1:]]))
    (x1, y1, s1, a1), (x2, y2, s2, _) = narrow.kernels
    mixed, own = np.array([[x1, y1, s2, a1]]), np.array([[x2, y2, s2, a1]])
    peak = 0.5 / ((2 * math.pi) ** 2 * 0.01**2 * 0.05**2)
    for tie, factors in ((1.0, (0.0, 1.0)), (0.5, (0.25, 0.75)), (0.0, (0.5, 0.5))):
        density = dataclasses.replace(narrow, tie=tie)
        for point, factor in zip((mixed, own), factors, strict=True):
            assert np.exp(density.log_prob(point))[0] / peak == pytest.approx(factor, abs=1e-3)

    density, rng = dataclasses.replace(narrow, tie=0.5), np.random.default_rng(0)
    boxes = np.array([density.draw(rng) for _ in range(4000)])
    left, small = boxes[:, 0] < 0.5, boxes[:, 2] - boxes[:, 0] < math.exp((s1 + s2) / 2)
    assert (left == small).mean() == pytest.approx(0.75, abs=0.03) and left.mean() == pytest.approx(0.5, abs=0.03)


def test_counts_are_the_patients_not_the_images_and_image_weights_weigh():
    one, two = GOOD, np.concatenate([GOOD, GOOD + [20, 40, 20, 40]])
    prior = fit([one, one, one, two], patients=["a", "a", "a", "b"])
    assert [prior.log_prob_count(k) for k in (1, 2)] == pytest.approx([math.log(0.5)] * 2)
    assert prior.log_prob_count(3) == prior.log_prob_count(0) == prior.log_prob_count(9) == -math.inf
    assert prior.n_boxes == 5 and prior.n_patients == 2
    assert prior.density.weights == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)
    left, right = random_boxes(1, left_share=1)[0], random_boxes(1, left_share=0)[0]
    assert fit([left, right], weights=[3.0, 1.0]).density.weights == pytest.approx([0.75, 0.25])
    assert fit([left, right], weights=[1.0, 0.0]).n_boxes == 1
    prior = fit([GOOD, np.concatenate([GOOD + np.array([d, 0, d, 0]) for d in (0, 1, 2)])], max_count=2)
    assert prior.counts.tolist() == [1.0, 0.0] and prior.n_boxes == 4  # an image with too many boxes does not count


def test_fit_beats_the_uniform_density_on_boxes_it_was_not_fitted_on(prior, bundled):
    others = torch.from_numpy(np.concatenate(random_boxes(50, seed=9)))
    (low, high), area = np.log(prior.size_bounds), two_lungs().float().mean().item()
    uniform = -math.log(area * (high - low) * 2 * math.log(2.5))
    assert prior.log_prob(others, S).mean() > uniform + 2
    assert LocationPrior.fit(random_boxes(4), S).field.equal(bundled.field)  # where none is given


def test_maps_become_boxes_around_their_regions_and_large_ones_are_cut():
    pytest.importorskip("scipy")
    maps = torch.zeros(3, 1, 100, 100)
    maps[0, 0, 40:50, 20:28], maps[1, 0, 60:66, 70:76] = 1.0, 0.6
    maps[1, 0, 30:36, 20:26] = 0.4  # below the threshold
    prior = LocationPrior.fit_maps(maps, torch.ones(3), field=two_lungs())
    boxes = [np.array([[20.0, 40, 28, 50]]), np.array([[70.0, 60, 76, 66]])]
    expected = LocationPrior.fit(boxes, 100, field=two_lungs())
    assert np.allclose(prior.density.kernels, expected.density.kernels) and prior.n_boxes == 2
    assert prior.counts.tolist() == [1, 0, 0, 0]

    large = torch.zeros(1, 1, 100, 100)
    large[0, 0, 30:60, 20:40] = 1
    points = LocationPrior.fit_maps(large, [1.0], field=two_lungs()).density.kernels
    assert points[0, :2] == pytest.approx([0.30, 0.45]) and math.exp(points[0, 2]) == pytest.approx(0.13, rel=2e-3)
    assert math.exp(points[0, 3]) == pytest.approx(2 / 3)


def test_saving_and_loading_changes_nothing_and_the_first_version_is_read_as_it_was(prior, tmp_path):
    prior.save(tmp_path / "p.safetensors")
    for other in (LocationPrior.load(tmp_path / "p.safetensors"), pickle.loads(pickle.dumps(prior))):
        assert (other.draw(np.random.default_rng(1)) == prior.draw(np.random.default_rng(1))).all()
        assert repr(other) == repr(prior) and other.field.equal(prior.field)
        assert other.log_prob(GOOD, S).equal(prior.log_prob(GOOD, S))
    # Version 1 knew no tie: every box had the size of a fitting box at its place.
    path = tmp_path / "p.safetensors"
    arrays, texts, _ = read_sealed(path)
    del arrays["tie"]
    write_sealed(path, arrays, {**texts, "format_version": "1"})
    old, tied = LocationPrior.load(path), dataclasses.replace(prior.density, tie=1.0)
    points = prior.density.kernels[:9]
    assert old.density.tie == 1 and (old.density.log_prob(points) == tied.log_prob(points)).all()


def test_no_flipped_bit_goes_unnoticed(prior, tmp_path):
    path = tmp_path / "p.safetensors"
    prior.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(8), *rng.integers(8, header, 100), *rng.integers(header, len(whole), 100)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = LocationPrior.load(path)
        except PriorError as error:
            assert "fit-prior" in str(error) or "upgrade" in str(error)
        else:  # only white space between the header's words may change without harm
            assert place < header and repr(loaded) == repr(prior) and chr(whole[place]) in " "


def test_bad_files_are_refused_with_what_to_do(prior, tmp_path):
    path = tmp_path / "p.safetensors"
    prior.save(path)
    arrays, texts, intact = read_sealed(path)
    assert intact
    for words, parts, new_texts in (
        ("upgrade carim-aug", {}, {"format_version": "3"}),
        ("'other'.*fit-prior", {}, {"format": "other"}),
        ("no valid prior", {}, {"n_boxes": "many"}),
        ("lacks kernels", {"kernels": None}, {}),
        ("lacks tie", {"tie": None}, {}),
        ("kernels must be finite, got nan", {"kernels": arrays["kernels"] * np.nan}, {}),
        ("counts must be >= 0 and sum to 1", {"counts": arrays["counts"] * 2}, {}),
        (r"bandwidths must be \(4,\)", {"bandwidths": np.ones(3)}, {}),
        ("bandwidths must be > 0", {"bandwidths": np.zeros(4)}, {}),
        ("field must be", {"field": arrays["field"] * 0}, {}),
        (r"tie must be in \[0, 1\]", {"tie": np.array([2.0])}, {}),
        ("mass must be", {"mass": np.array([np.nan])}, {}),
    ):
        chosen = {name: array for name, array in {**arrays, **parts}.items() if array is not None}
        write_sealed(path, chosen, {**texts, **new_texts})
        with pytest.raises(PriorError, match=words):
            LocationPrior.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(PriorError, match="not a readable safetensors file"):
        LocationPrior.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LocationPrior.load(tmp_path / "nowhere")


def box(*corners):
    return np.array([corners], dtype=np.float64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: fit([box(60, 60, 50, 70)]), r"boxes\[0\]: boxes must be XYXY"),
        (lambda p: fit([GOOD, box(150, 60, 250, 70)]), r"boxes\[1\]: boxes must be inside the image"),
        (lambda p: fit([np.zeros((0, 4))]), "at least one box, got none in 1 images"),
        (lambda p: fit([box(95, 10, 105, 20)]), "only 0 of 1 are"),
        (lambda p: fit([box(20, 20, 100, 100)]), "only 0 of 1 are"),
        (lambda p: fit([GOOD], weights=[1.0, 2.0]), r"weights must be one number per image \(1,\), got \(2,\)"),
        (lambda p: fit([GOOD], weights=[-1.0]), r"weights must be finite, >= 0 .*-1.0"),
        (lambda p: fit([GOOD], weights=[0.0]), "not all 0"),
        (lambda p: fit([GOOD], patients=["a", "b"]), r"patients .*\(1\), got 2"),
        (lambda p: fit([GOOD], max_count=0), "max_count must be >= 1, got 0"),
        (lambda p: fit([np.repeat(GOOD, 3, 0)], max_count=2), "max_count .* got 2"),
        (lambda p: fit([GOOD], field=two_lungs() & False), "field must be .*not empty"),
        (lambda p: fit([GOOD], field=two_lungs()[:32]), r"field must be \(64, 64\) bool.*\(32, 64\)"),
        (lambda p: fit([GOOD], size_bounds=(0.2, 0.1)), r"size_bounds .*\(0.2, 0.1\)"),
        (lambda p: p.fit([GOOD], 0, field=two_lungs()), "image_size .* got 0"),
        (lambda p: p.log_prob(GOOD, (1, 2, 3)), r"image_size .*\(1, 2, 3\)"),
        (lambda p: p.log_prob(GOOD[0], S), r"boxes: boxes must be \(k, 4\)"),
        (lambda p: p.draw(np.random.default_rng(0), -1), "image_size .* got -1"),
        (lambda p: p.sample(-1, seeded(), 64), "n must be >= 0, got -1"),
        (lambda p: p.fit_maps(torch.zeros(2, 8, 8), [1.0, 1.0]), r"maps .*\(2, 8, 8\)"),
        (lambda p: p.fit_maps(torch.full((1, 1, 8, 8), 2.0), [1.0]), "got 2 to 2"),
        (lambda p: p.fit_maps(torch.zeros(1, 1, 8, 8), [1.0]), "reach threshold 0.5"),
        (lambda p: p.fit_maps(torch.zeros(1, 1, 8, 8), [1.0], threshold=0), "threshold .* got 0"),
    ],
)
def test_bad_arguments_are_named_with_their_value(prior, call, words):
    with pytest.raises(ValueError, match=words):
        call(prior)
    with pytest.raises(TypeError, match="generator .* got int"):
        prior.sample(1, 7, 64)


def test_plot_is_a_figure_with_three_parts_and_needs_matplotlib(prior, monkeypatch):
    pytest.importorskip("matplotlib")
    figure = prior.plot()
    assert len(figure.axes) == 3 and "patient's right" in figure.axes[0].get_title()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"carim-aug\[eval\]"):
        prior.plot()
