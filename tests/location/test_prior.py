import dataclasses
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from carim_aug.location.prior import LocationPrior, PriorError
from carim_aug.ops.boxes import boxes_to_masks, check_boxes, check_masks
from carim_aug.ops.lungs import grow_field, lung_field
from carim_aug.ops.sealed import digest, read_sealed

S = 200


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def two_lungs():
    field = torch.zeros(64, 64, dtype=torch.bool)
    field[10:50, 8:28] = field[10:50, 36:56] = True
    return field


def drawn_boxes(n=60, seed=0, left_share=0.9, size=S):
    """One box an image: nine in ten small, in the image's left and upper part; the rest large, right and low."""
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(n):
        left = rng.random() < left_share
        x, y, side = (0.28, 0.35, 0.04) if left else (0.72, 0.65, 0.08)
        x, y, side = x + 0.04 * rng.standard_normal(), y + 0.04 * rng.standard_normal(), side * rng.uniform(0.8, 1.2)
        boxes.append(np.array([[x - side / 2, y - side / 2, x + side / 2, y + side / 2]]) * size)
    return boxes


@pytest.fixture(scope="module")
def prior():
    return LocationPrior.fit(drawn_boxes(), S, field=two_lungs())


@pytest.fixture(scope="module")
def bundled():
    return LocationPrior.bundled()


def test_bundled_prior_says_what_it_was_fitted_on(bundled):
    assert bundled.n_boxes > 500 and bundled.n_patients > 200 and bundled.max_count == 4
    assert "ChestX-ray14" in bundled.description and str(bundled.n_boxes) in repr(bundled)
    assert bundled.field.shape == (64, 64) and bundled.field.dtype == torch.bool


def test_sampled_boxes_lie_in_the_field_and_the_image_within_the_size_bounds(bundled):
    sample = bundled.sample(300, seeded(), 256)
    check_masks(sample.masks, 256)
    assert len(sample.masks) == len(sample.boxes) == 300
    boxes = torch.cat(sample.boxes).double()
    check_boxes(boxes, 256)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    cell = (centre / 256 * 64 + 1e-5).floor().long()
    assert bundled.field[cell[:, 1], cell[:, 0]].float().mean() > 0.995  # the rest: float32 at a cell's edge
    side = ((boxes[:, 2:] - boxes[:, :2]).prod(1)).sqrt() / 256
    assert side.min() > bundled.size_bounds[0] - 1e-5 and side.max() < bundled.size_bounds[1] + 1e-5
    assert {len(b) for b in sample.boxes} == {1, 2, 3, 4}


def test_masks_are_the_boxes_masks_in_both_shapes(bundled):
    for shape in ("box", "ellipse"):
        sample = bundled.sample(5, seeded(1), 64, shape=shape)
        assert sample.masks.equal(boxes_to_masks(sample.boxes, 64, shape=shape))
    assert bundled.sample(0, seeded(), 64).masks.shape == (0, 1, 64, 64)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_boxes_of_one_image_do_not_overlap(bundled, seed):
    boxes = bundled.draw(np.random.default_rng(seed))
    assert boxes.dtype == np.float32 and boxes.ndim == 2 and 1 <= len(boxes) <= 4
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    for i, a in enumerate(boxes.tolist()):
        for b in boxes[:i].tolist():
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert min(width, height) <= 1e-6


def test_same_seed_gives_the_same_boxes_and_another_seed_others(prior):
    first, again, other = (prior.sample(8, seeded(s), 96) for s in (3, 3, 4))
    assert first.masks.equal(again.masks) and all(a.equal(b) for a, b in zip(first.boxes, again.boxes, strict=True))
    assert not torch.cat(first.boxes)[:8].equal(torch.cat(other.boxes)[:8])


def test_draws_leave_the_global_random_state_alone(prior):
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    prior.sample(4, seeded(), 64), LocationPrior.fit(drawn_boxes(5), S, field=two_lungs())
    assert torch.get_rng_state().equal(before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_pixels_are_the_unit_coordinates_times_the_size(prior):
    unit, pixels = prior.draw(np.random.default_rng(5)), prior.draw(np.random.default_rng(5), 512)
    assert np.allclose(unit * 512, pixels, atol=1e-3)


def test_left_stays_left_and_up_stays_up(prior):
    boxes = torch.cat(prior.sample(1000, seeded(), 100).boxes)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    assert 0.8 < (x < 50).float().mean() < 0.97
    assert abs(x[x < 50].mean() - 28) < 2 and abs(y[x < 50].mean() - 35) < 2
    assert y[x > 50].mean() > 50


def test_size_goes_with_place_where_the_boxes_say_so(prior):
    boxes = torch.cat(prior.sample(2000, seeded(), 100).boxes)
    x, side = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    assert side[x > 60].mean() > 1.4 * side[x < 40].mean()


def test_density_integrates_to_one(bundled):
    rng, n = np.random.default_rng(0), 60_000
    (low, high), aspect = np.log(bundled.size_bounds), math.log(2.5)
    points = rng.uniform([0, 0, low, -aspect], [1, 1, high, aspect], (n, 4))
    values = np.exp(bundled.density.log_prob(points)) * (high - low) * 2 * aspect
    error = values.std() / math.sqrt(n)
    assert error < 0.015 and values.mean() == pytest.approx(1, abs=4 * error)


def test_draws_follow_the_density_that_log_prob_gives(prior):
    """The share of draws in a small part of the image is the density's integral over that part."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([prior.draw(rng) for _ in range(4000)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = (abs(centres - [0.28, 0.35]) < 0.05).all(1)
    (low, high), aspect = np.log(prior.size_bounds), math.log(2.5)
    points = rng.uniform([0.23, 0.30, low, -aspect], [0.33, 0.40, high, aspect], (100_000, 4))
    mass = np.exp(prior.density.log_prob(points)).mean() * 0.01 * (high - low) * 2 * aspect
    assert inside.mean() == pytest.approx(mass, abs=0.03) and mass > 0.2


def test_density_of_one_box_is_known_by_hand():
    """One fitting box: one kernel, a tenth broad; at its centre both terms are written down."""
    box = np.array([[90.0, 90.0, 100.0, 100.0]])
    prior = LocationPrior.fit([box], 200, field=torch.ones(64, 64, dtype=torch.bool))
    normal = 1 / (2 * math.pi * 0.1 * 0.1)
    bracket = 0.9 * normal / (2 * math.pi * 0.02**2) + 0.1 * normal
    expected = math.log(bracket / prior.density.mass)
    assert prior.log_prob(box, 200).item() == pytest.approx(expected, abs=1e-9)
    assert prior.density.mass == pytest.approx(0.9 + 0.1 * 0.95**2, abs=3e-3)  # broad: centre 0.025 from each edge


def test_log_prob_is_minus_infinity_outside_and_the_same_at_every_resolution(prior):
    inside = torch.tensor([[50.0, 60.0, 60.0, 70.0]])
    outside = torch.tensor([[95.0, 95.0, 105.0, 105.0], [50.0, 60.0, 100.0, 110.0], [50.0, 60.0, 52.0, 62.0]])
    values = prior.log_prob(torch.cat([inside, outside]), S)
    assert values.dtype == torch.float64 and values[0].isfinite() and (values[1:] == -math.inf).all()
    assert prior.log_prob(inside * 4, 4 * S).allclose(values[:1])
    assert prior.log_prob(torch.zeros(0, 4), S).shape == (0,)


def test_counts_are_the_patients_not_the_images():
    one, two = drawn_boxes(1)[0], np.concatenate([drawn_boxes(1)[0], drawn_boxes(1)[0] + [20, 40, 20, 40]])
    prior = LocationPrior.fit([one, one, one, two], S, patients=["a", "a", "a", "b"], field=two_lungs())
    assert [prior.log_prob_count(k) for k in (1, 2)] == pytest.approx([math.log(0.5)] * 2)
    assert prior.log_prob_count(3) == prior.log_prob_count(0) == prior.log_prob_count(9) == -math.inf
    assert prior.n_boxes == 5 and prior.n_patients == 2
    assert prior.density.weights == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)


def test_image_weights_weigh(prior):
    left, right = drawn_boxes(1, left_share=1)[0], drawn_boxes(1, left_share=0)[0]
    weighted = LocationPrior.fit([left, right], S, weights=[3.0, 1.0], field=two_lungs())
    assert weighted.density.weights == pytest.approx([0.75, 0.25])
    assert LocationPrior.fit([left, right], S, weights=[1.0, 0.0], field=two_lungs()).n_boxes == 1


def test_images_with_too_many_boxes_do_not_count():
    one = drawn_boxes(1)[0]
    many = np.concatenate([one + np.array([d, 0, d, 0]) for d in (0, 1, 2)])
    prior = LocationPrior.fit([one, many], S, field=two_lungs(), max_count=2)
    assert prior.counts.tolist() == [1.0, 0.0] and prior.n_boxes == 4


def test_fit_beats_the_uniform_density_on_boxes_it_has_not_seen(prior):
    unseen = torch.from_numpy(np.concatenate(drawn_boxes(50, seed=9)))
    (low, high), area = np.log(prior.size_bounds), two_lungs().float().mean().item()
    uniform = -math.log(area * (high - low) * 2 * math.log(2.5))
    assert prior.log_prob(unseen, S).mean() > uniform + 2


def test_fit_without_a_field_takes_the_bundled_one(bundled):
    assert LocationPrior.fit(drawn_boxes(4), S).field.equal(bundled.field)


def test_maps_become_boxes_around_their_regions():
    pytest.importorskip("scipy")
    maps = torch.zeros(3, 1, 100, 100)
    maps[0, 0, 40:50, 20:28], maps[1, 0, 60:66, 70:76] = 1.0, 0.6
    maps[1, 0, 30:36, 20:26] = 0.4  # below the threshold
    prior = LocationPrior.fit_maps(maps, torch.tensor([1.0, 1.0, 1.0]), field=two_lungs())
    expected = LocationPrior.fit(
        [np.array([[20.0, 40, 28, 50]]), np.array([[70.0, 60, 76, 66]])], 100, field=two_lungs()
    )
    assert np.allclose(prior.density.kernels, expected.density.kernels) and prior.n_boxes == 2
    assert prior.counts.tolist() == [1, 0, 0, 0]


def test_a_region_too_large_is_cut_around_its_centre():
    pytest.importorskip("scipy")
    maps = torch.zeros(1, 1, 100, 100)
    maps[0, 0, 30:60, 20:40] = 1
    points = LocationPrior.fit_maps(maps, [1.0], field=two_lungs()).density.kernels
    assert points[0, :2] == pytest.approx([0.30, 0.45]) and math.exp(points[0, 2]) == pytest.approx(0.13, rel=2e-3)
    assert math.exp(points[0, 3]) == pytest.approx(2 / 3)


def test_saving_and_loading_changes_nothing(prior, tmp_path):
    prior.save(tmp_path / "p.safetensors")
    again, pickled = LocationPrior.load(tmp_path / "p.safetensors"), pickle.loads(pickle.dumps(prior))
    for other in (again, pickled):
        assert (other.draw(np.random.default_rng(1)) == prior.draw(np.random.default_rng(1))).all()
        assert repr(other) == repr(prior) and other.field.equal(prior.field)
        box = torch.tensor([[50.0, 60.0, 60.0, 70.0]])
        assert other.log_prob(box, S).equal(prior.log_prob(box, S))


def test_a_tie_of_a_half_gives_half_of_the_boxes_a_size_of_another_place():
    """Two boxes, far apart and of unlike sizes: the density at each mix of place and size, written down."""
    boxes = [np.array([[50.0, 60.0, 60.0, 70.0]]), np.array([[140.0, 120.0, 160.0, 140.0]])]
    fitted = LocationPrior.fit(boxes, S, patients=["a", "a"], field=two_lungs())
    narrow = dataclasses.replace(fitted.density, bandwidths=np.array([0.01, 0.01, 0.05, 0.05]), mass=1.0)
    narrow = dataclasses.replace(narrow, broad=np.array([1e-9, *narrow.broad[1:]]))
    (x1, y1, s1, a1), (x2, y2, s2, _) = narrow.kernels
    mixed, own = np.array([[x1, y1, s2, a1]]), np.array([[x2, y2, s2, a1]])
    peak = 0.5 / ((2 * math.pi) ** 2 * 0.01**2 * 0.05**2)
    for tie, factors in ((1.0, (0.0, 1.0)), (0.5, (0.25, 0.75)), (0.0, (0.5, 0.5))):
        density = dataclasses.replace(narrow, tie=tie)
        for point, factor in zip((mixed, own), factors, strict=True):
            assert np.exp(density.log_prob(point))[0] / peak == pytest.approx(factor, abs=1e-3)

    prior = LocationPrior(dataclasses.replace(narrow, tie=0.5), np.ones(1), n_boxes=2, n_patients=1)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([prior.draw(rng) for _ in range(4000)])
    left, small = drawn[:, 0] < 0.5, drawn[:, 2] - drawn[:, 0] < math.exp((s1 + s2) / 2)
    assert (left == small).mean() == pytest.approx(0.75, abs=0.03) and left.mean() == pytest.approx(0.5, abs=0.03)


def test_a_file_of_the_first_version_is_read_as_it_was(prior, tmp_path):
    """Version 1 knew no tie: every box had the size of a fitting box at its place."""
    path = tmp_path / "p.safetensors"
    prior.save(path)
    arrays, texts, _ = read_sealed(path)
    del arrays["tie"]
    texts = {**texts, "format_version": "1"}
    save_file(arrays, path, {**texts, "sha256": digest(arrays, texts)})
    old, tied = LocationPrior.load(path), dataclasses.replace(prior.density, tie=1.0)
    points = prior.density.kernels[:9]
    assert old.density.tie == 1 and (old.density.log_prob(points) == tied.log_prob(points)).all()


def test_no_flipped_bit_goes_unnoticed(prior, tmp_path):
    path = tmp_path / "p.safetensors"
    prior.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *rng.integers(8, header, 150), *rng.integers(header, len(whole), 150)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = LocationPrior.load(path)
        except PriorError as error:
            assert "fit-prior" in str(error) or "upgrade" in str(error)
        else:  # only white space between the header's words may change without harm
            assert place < header and digest(*read_sealed(path)[:2]) and repr(loaded) == repr(prior)
            assert chr(whole[place]) in " "


def test_bad_files_are_refused_with_what_to_do(prior, tmp_path):
    path = tmp_path / "p.safetensors"
    prior.save(path)
    arrays, texts, intact = read_sealed(path)
    assert intact

    def refused(words, new_arrays=None, **new_texts):
        chosen, about = new_arrays or arrays, {**texts, **new_texts}
        save_file(chosen, path, {**about, "sha256": digest(chosen, about)})
        with pytest.raises(PriorError, match=words):
            LocationPrior.load(path)

    refused("upgrade carim-aug", format_version="3")
    refused("'other'.*fit-prior", format="other")
    refused("lacks kernels", {k: v for k, v in arrays.items() if k != "kernels"})
    refused("kernels must be finite, got nan", {**arrays, "kernels": arrays["kernels"] * np.nan})
    refused("counts must be >= 0 and sum to 1", {**arrays, "counts": arrays["counts"] * 2})
    refused(r"bandwidths must be \(4,\)", {**arrays, "bandwidths": np.ones(3)})
    refused("bandwidths must be > 0", {**arrays, "bandwidths": np.zeros(4)})
    refused("field must be", {**arrays, "field": arrays["field"] * 0})
    refused("lacks tie", {k: v for k, v in arrays.items() if k != "tie"})
    refused(r"tie must be in \[0, 1\]", {**arrays, "tie": np.array([2.0])})
    refused("mass", {**arrays, "mass": np.array([np.nan])})
    refused("no valid prior", n_boxes="many")
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(PriorError, match="not a readable safetensors file"):
        LocationPrior.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LocationPrior.load(tmp_path / "nowhere")


GOOD = np.array([[50.0, 60.0, 60.0, 70.0]])


@pytest.mark.parametrize(
    "boxes, options, words",
    [
        ([np.array([[60.0, 60.0, 50.0, 70.0]])], {}, r"boxes\[0\]: boxes must be XYXY"),
        ([GOOD, np.array([[150.0, 60.0, 250.0, 70.0]])], {}, r"boxes\[1\]: boxes must be inside the image"),
        ([GOOD * np.nan], {}, "finite, got .*nan"),
        ([GOOD[0]], {}, r"\(k, 4\), got \(4,\)"),
        ([], {}, "at least one box, got none in 0 images"),
        ([np.zeros((0, 4))], {}, "at least one box, got none in 1 images"),
        ([np.array([[95.0, 10.0, 105.0, 20.0]])], {}, "only 0 of 1 are"),
        ([np.array([[20.0, 20.0, 100.0, 100.0]])], {}, "only 0 of 1 are"),
        ([GOOD], {"weights": [1.0, 2.0]}, r"weights must be one number per image \(1,\), got \(2,\)"),
        ([GOOD], {"weights": [-1.0]}, r"weights must be finite, >= 0 .*-1.0"),
        ([GOOD], {"weights": [0.0]}, "not all 0"),
        ([GOOD], {"patients": ["a", "b"]}, r"patients .*\(1\), got 2"),
        ([GOOD], {"max_count": 0}, "max_count must be >= 1, got 0"),
        ([np.repeat(GOOD, 3, 0)], {"max_count": 2}, "max_count .* got 2"),
        ([GOOD], {"field": torch.zeros(64, 64, dtype=torch.bool)}, "field must be .*not empty"),
        ([GOOD], {"field": torch.ones(32, 32, dtype=torch.bool)}, r"field must be \(64, 64\) bool.*\(32, 32\)"),
        ([GOOD], {"size_bounds": (0.2, 0.1)}, r"size_bounds .*\(0.2, 0.1\)"),
    ],
)
def test_bad_input_to_fit_is_named_with_its_value(boxes, options, words):
    with pytest.raises(ValueError, match=words):
        LocationPrior.fit(boxes, S, **{"field": two_lungs(), **options})


def test_bad_sizes_and_other_arguments_are_named(prior):
    for call, error, words in (
        (lambda: LocationPrior.fit([GOOD], 0, field=two_lungs()), ValueError, "image_size .* got 0"),
        (lambda: LocationPrior.fit([GOOD], 65, field=two_lungs()), ValueError, "inside the image of height 65"),
        (lambda: prior.log_prob(GOOD, (1, 2, 3)), ValueError, r"image_size .*\(1, 2, 3\)"),
        (lambda: prior.log_prob(GOOD[0], S), ValueError, r"boxes: boxes must be \(k, 4\)"),
        (lambda: prior.draw(np.random.default_rng(0), -1), ValueError, "image_size .* got -1"),
        (lambda: prior.sample(-1, seeded(), 64), ValueError, "n must be >= 0, got -1"),
        (lambda: prior.sample(1, 7, 64), TypeError, "generator .* got int"),
        (lambda: LocationPrior.fit_maps(torch.zeros(2, 8, 8), [1.0, 1.0]), ValueError, r"maps .*\(2, 8, 8\)"),
        (lambda: LocationPrior.fit_maps(torch.full((1, 1, 8, 8), 2.0), [1.0]), ValueError, "got 2 to 2"),
        (lambda: LocationPrior.fit_maps(torch.zeros(1, 1, 8, 8), [1.0]), ValueError, "reach threshold 0.5"),
        (lambda: LocationPrior.fit_maps(torch.zeros(1, 1, 8, 8), [1.0], threshold=0), ValueError, "threshold .* got 0"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_plot_is_a_figure_with_three_parts_and_needs_matplotlib(prior, monkeypatch):
    pytest.importorskip("matplotlib")
    figure = prior.plot()
    assert len(figure.axes) == 3 and "patient's right" in figure.axes[0].get_title()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"carim-aug\[eval\]"):
        prior.plot()


def drawn_chests(n=6, size=96):
    """Bright bodies on a dark ground with two dark lungs; the image's left lung reaches lower."""
    y, x = torch.meshgrid((torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="ij")
    body = (((x - 0.5) / 0.42) ** 2 + ((y - 0.5) / 0.6) ** 2 < 1).float()
    left = ((x - 0.32) / 0.1) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1
    right = ((x - 0.68) / 0.1) ** 2 + ((y - 0.4) / 0.2) ** 2 < 1
    noise = torch.rand(n, 1, size, size, generator=seeded())
    return body * (1 - 0.7 * (left | right).float()) + 0.02 * noise


def test_lung_field_is_the_two_dark_places_inside_the_body():
    pytest.importorskip("scipy")
    field = lung_field(drawn_chests())
    assert field.shape == (64, 64) and field.dtype == torch.bool
    assert field[32, 20] and field[25, 43] and not field[32, 32] and not field[2, 2] and not field[32, 2]
    assert field[48, 20] and not field[48, 43]  # the image's left lung reaches lower
    assert 0.1 < field.float().mean() < 0.25


def test_lung_field_of_no_lungs_is_refused():
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="none found in 2 images"):
        lung_field(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\), got \(64, 64\)"):
        lung_field(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="share .* got 2"):
        lung_field(drawn_chests(1), share=2)


def test_grown_field_holds_the_share_of_centres_asked_for():
    pytest.importorskip("scipy")
    field = two_lungs()
    centres = np.concatenate([np.full((50, 2), 0.3), np.full((10, 2), [0.3, 0.85]), [[0.99, 0.01]]])
    grown = grow_field(field, centres, np.ones(61), coverage=0.95)
    assert (grown | field).equal(grown) and grown[54, 19] and not grown[0, 63]
    assert grow_field(field, centres[:50], np.ones(50)).sum() == field.sum()
