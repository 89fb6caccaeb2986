"""The location prior's recipe: readings that count half each, cross-validation, rival densities, held-out tables."""

import math

import numpy as np
import pytest
import torch

from carim_aug.location.density import Support
from carim_aug.location.prior import MAX_ASPECT, SIZE_BOUNDS, LocationPrior
from carim_aug.ops.findings import FINDINGS
from train.classifier.densenet import ChestClassifier
from train.common.images import ImageSet
from train.prior.__main__ import main
from train.prior.densities import compare, cross_validate, mean_interval, points_of, simpler_densities
from train.prior.fitting import (
    IMAGE_SIZE,
    Regions,
    fit_best,
    fit_mixture,
    held_out_table,
    image_points,
    nodule_regions,
    reading_weights,
)

FIELD = torch.zeros(64, 64, dtype=torch.bool)
FIELD[8:56, 6:58] = True


def _images(n=12, seed=0) -> ImageSet:
    """One box an image in the left lung; every third is of the official table and twice as large."""
    rng, boxes = np.random.default_rng(seed), []
    for i in range(n):
        x, y, side = 300 + 40 * rng.standard_normal(), 400 + 60 * rng.standard_normal(), 80 if i % 3 == 0 else 40
        width, height = side * math.exp(0.1 * rng.standard_normal()), side
        boxes.append(torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]]) / 1024)
    official, splits = [torch.tensor([i % 3 == 0]) for i in range(n)], ["train" if i < n // 2 else "" for i in range(n)]
    nothing, names = torch.zeros(n, 1, 0, 0, dtype=torch.uint8), [f"{i:08d}_000" for i in range(n)]
    return ImageSet(nothing, torch.zeros(n, 14), torch.arange(n), boxes, names, official, splits)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ChestClassifier(FINDINGS, size=64).eval()


def test_the_two_readings_count_half_each_and_a_patient_once():
    some = _images()
    weights = image_points(some, reading_weights(some)).weights
    official = torch.cat(some.official).numpy()
    assert weights[official].sum() == pytest.approx(0.5) and weights[~official].sum() == pytest.approx(0.5)
    assert reading_weights(some.rows(torch.arange(0, 12, 3))) == [1.0] * 4
    twice = [some.boxes[0], torch.cat([some.boxes[1], some.boxes[1] + 0.01])]
    assert points_of(twice, [0, 1]).weights.tolist() == [1.0, 0.5, 0.5]
    known = points_of(twice, [1, 1], [1.0, 3.0])
    assert known.weights.tolist() == pytest.approx([1 / 3, 1, 1])
    assert known.of(np.array([False, True, True])).weights.tolist() == [1, 1]


def test_cross_validation_looks_at_every_box_by_other_patients():
    known, seen = image_points(_images(9)), []

    class Recording:
        def __init__(self, patients):
            self.patients = patients

        def log_prob(self, points):
            seen.append((self.patients, {int(known.groups[(known.points == p).all(1)][0]) for p in points}))
            return np.full(len(points), float(len(self.patients)))

    values = cross_validate(known, {"a": Recording}, folds=3)["a"]
    assert values.tolist() == [6.0] * 9 and set.union(*(held_out for _, held_out in seen)) == set(range(9))
    assert all(not fitted & held_out for fitted, held_out in seen)


def test_interval_and_comparison_by_hand():
    assert mean_interval(np.array([1.0, 1.0, 1.0]), np.ones(3), np.array([0, 0, 1])) == "+1.000 [+1.000, +1.000]"
    assert mean_interval(np.array([1.0, 5.0]), np.array([3.0, 1.0]), np.array([4, 4])) == "+2.000 [+2.000, +2.000]"
    values = {"ours": np.array([2.0, 9.0]), "other": np.array([0.5, 0.0])}
    table = compare(values, {"first": np.array([1.0, 0.0])}, np.array([0, 1])).splitlines()
    assert table[0] == "| density | first | ours minus it |" and table[1] == "|---|---|---|"
    assert table[2] == "| ours | +2.000 [+2.000, +2.000] |  |"
    assert table[3] == "| other | +0.500 [+0.500, +0.500] | +1.500 [+1.500, +1.500] |"


def test_simpler_densities_integrate_to_one_over_the_support():
    support = Support(FIELD.numpy(), SIZE_BOUNDS, MAX_ASPECT)
    rng, n = np.random.default_rng(0), 100_000
    (low, high), aspect = np.log(SIZE_BOUNDS), math.log(MAX_ASPECT)
    points = rng.uniform([0, 0, low, -aspect], [1, 1, high, aspect], (n, 4))
    for name, density in simpler_densities(image_points(_images(30)), support).items():
        values = np.exp(density.log_prob(points)) * (high - low) * 2 * aspect
        assert values.mean() == pytest.approx(1, abs=4 * values.std() / math.sqrt(n) + 0.02), name


def test_regions_are_of_the_train_splits_nodule_images(phantom_data, classifier):
    regions = nodule_regions(phantom_data, classifier, batch=3)
    assert regions.patients == [1, 4, 7, 10, 13, 16, 19, 22]  # every third of 24
    assert len(regions.boxes) == len(regions.scores) == 8 and all(0 < score < 1 for score in regions.scores)
    boxes = torch.cat(regions.boxes)
    assert len(boxes) and boxes.min() >= 0 and boxes.max() <= IMAGE_SIZE
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / IMAGE_SIZE
    assert side.max() <= SIZE_BOUNDS[1] + 1e-9
    few = regions.of({4, 22})
    assert few.patients == [4, 22] and few.boxes[1] is regions.boxes[7] and few.scores == regions.scores[1::6]
    with pytest.raises(ValueError, match="maps that peak in the lung field, got 8"):
        regions.inside(Support(np.eye(64, dtype=bool) & (np.arange(64) < 1), SIZE_BOUNDS, MAX_ASPECT))


def test_a_mixture_puts_its_share_at_the_maps_places_with_readers_sizes():
    corner = torch.tensor([[180.0, 170.0, 200.0, 190.0]])
    mixed = fit_mixture(FIELD, 0.25, _images(), Regions([corner, corner], [0.9, 0.1], [0, 77]))
    at_corner = np.isclose(mixed.density.kernels[:, :2], [190 / 256, 180 / 256]).all(1)
    assert at_corner.sum() == 2 and mixed.density.weights[at_corner] == pytest.approx([0.225, 0.025])
    readers = {round(v, 9) for v in mixed.density.kernels[~at_corner, 2]}
    assert {round(v, 9) for v in mixed.density.kernels[at_corner, 2]} <= readers
    assert "0.25 of the places" in mixed.description and mixed.n_boxes == 12


@pytest.mark.train
def test_recipe_saves_the_prior_that_the_fitting_boxes_prefer(phantom_data, classifier, tmp_path, capsys):
    out, plot, weights = tmp_path / "prior.safetensors", tmp_path / "priors.png", tmp_path / "classifier.safetensors"
    classifier.save(weights)
    main(["--data", str(phantom_data), "--out", str(out), "--classifier", str(weights), "--plot", str(plot)])
    said = capsys.readouterr().out
    assert repr(LocationPrior.load(out)) in said and plot.stat().st_size > 10_000
    first = next(line for line in said.splitlines() if line.startswith("| ") and "density |" not in line)
    assert f"from {first.split('|')[1].strip()};" in said  # the chosen one leads the table
    for name in ("readers' boxes", "the classifier's maps", "readers' sizes, all places the maps'", "Gaussian"):
        assert f"| {name} |" in said
    priors, _ = fit_best(phantom_data)
    assert list(priors) == ["readers' boxes"] and priors["readers' boxes"].n_patients == 4  # val's two are not seen
    with pytest.raises(SystemExit, match=r"error: .*split\.csv"):  # a folder without tables
        main(["--data", str(tmp_path), "--out", str(out)])


@pytest.mark.train  # real boxes, seconds
def test_bundled_prior_beats_simpler_densities_on_held_out_patients(real_data):
    """On boxes of val and test patients, each patient once. A position density with a log-normal size is level."""
    table = held_out_table(real_data, LocationPrior.bundled(), resamples=500)
    rows = {r.split("|")[1].strip(): r.split("|")[3] for r in table.splitlines() if r.startswith("| ")}
    for name in ("uniform in the lung field", "Gaussian", "kernel density on position alone"):
        gain = next(cell for key, cell in rows.items() if key.startswith(name))
        mean, low = (float(part) for part in gain.replace("[", "").split(",")[0].split())
        assert mean > 0 and low > 0, name
