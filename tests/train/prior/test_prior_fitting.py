"""The prior's recipe: readings, maps, choice and tables, on drawn chests; the bundled prior on held-out patients."""

import math

import numpy as np
import pytest
import torch

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.location.density import Support
from carim_aug.location.prior import MAX_ASPECT, SIZE_BOUNDS, LocationPrior
from train.classifier.densenet import ChestClassifier
from train.prior.boxes import ImageBoxes, image_points, read_nodules, reading_weights
from train.prior.densities import Points, comparison, cross_validated, interval, simpler_densities
from train.prior.fitting import FILM_SIZE, Regions, fit_best, fit_mixture, held_out_table, main, nodule_regions

pytest.importorskip("scipy")
FIELD = torch.zeros(64, 64, dtype=torch.bool)
FIELD[8:56, 6:58] = True


def images(n=12, seed=0):
    """One box an image in the left lung; every third is of the official table and twice as large."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        x, y, side = 300 + 40 * rng.standard_normal(), 400 + 60 * rng.standard_normal(), 80 if i % 3 == 0 else 40
        width, height = side * math.exp(0.1 * rng.standard_normal()), side
        box = torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])
        found.append(ImageBoxes(f"{i:08d}_000", i, "train" if i < n // 2 else "", box, i % 3 == 0))
    return found


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ChestClassifier(FINDINGS, size=64).eval()


def test_boxes_are_read_with_split_and_reading_and_repeats_left_out(phantom_data, tmp_path):
    found = read_nodules(phantom_data)
    assert [(i.patient, i.split, len(i.boxes), i.official) for i in found[:2]] == [
        (1, "train", 1, True),
        (7, "train", 1, True),
    ]
    assert {i.split for i in found} == {"train", "val"} and len(found) == 6
    for name in ("split.csv", "BBox_List_2017.csv"):
        (tmp_path / name).write_text((phantom_data / name).read_text())
    x1, y1, x2, y2 = found[0].boxes[0].tolist()
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h]"]
    lines += [f"{found[0].name}.png,Nodule,{x},{y1},{x2 - x1},{y2 - y1}" for x in (x1 + 2, x1 + 400)]
    lines += ["00000011_000.png,Nodule,100,100,20,20", "00009999_000.png,Nodule,100,100,20,20"]
    (tmp_path / "ChestX-Det_boxes.csv").write_text("\n".join(lines) + "\n")
    both = {i.name: i for i in read_nodules(tmp_path)}
    assert len(both[found[0].name].boxes) == 2 and both[found[0].name].official
    assert both["00009999_000"].split == "" and not both["00009999_000"].official
    assert "00000011_000" not in both  # skin nodules


def test_the_two_readings_count_half_each_and_a_patient_once():
    some = images()
    weights = image_points(some, reading_weights(some)).weights
    official = np.array([i.official for i in some])
    assert weights[official].sum() == pytest.approx(0.5) and weights[~official].sum() == pytest.approx(0.5)
    assert reading_weights([i for i in some if i.official]) == [1.0] * 4
    twice = ImageBoxes("x", 1, "", torch.cat([some[1].boxes, some[1].boxes + 9]), False)
    assert image_points([some[0], twice]).weights.tolist() == [1.0, 0.5, 0.5]


def test_cross_validation_judges_every_box_by_other_patients():
    known = image_points(images(9))
    seen = []

    class Told:
        def __init__(self, patients):
            self.patients = patients

        def log_prob(self, points):
            seen.append((self.patients, {int(known.groups[(known.points == p).all(1)][0]) for p in points}))
            return np.full(len(points), float(len(self.patients)))

    values = cross_validated(known, {"a": Told}, folds=3)["a"]
    assert values.tolist() == [6.0] * 9 and set.union(*(judged for _, judged in seen)) == set(range(9))
    assert all(not kept & judged for kept, judged in seen)


def test_interval_and_comparison_by_hand():
    assert interval(np.array([1.0, 1.0, 1.0]), np.ones(3), np.array([0, 0, 1])) == "+1.000 [+1.000, +1.000]"
    assert interval(np.array([1.0, 5.0]), np.array([3.0, 1.0]), np.array([4, 4])) == "+2.000 [+2.000, +2.000]"
    table = comparison(
        {"ours": np.array([2.0, 9.0]), "other": np.array([0.5, 0.0])}, {"first": np.array([1.0, 0.0])}, np.array([0, 1])
    ).splitlines()
    assert table[0] == "| density | first | ours minus it |" and table[1] == "|---|---|---|"
    assert table[2] == "| ours | +2.000 [+2.000, +2.000] |  |"
    assert table[3] == "| other | +0.500 [+0.500, +0.500] | +1.500 [+1.500, +1.500] |"


def test_simpler_densities_integrate_to_one_over_the_support():
    some = images(30)
    support = Support(FIELD.numpy(), SIZE_BOUNDS, MAX_ASPECT)
    rng, n = np.random.default_rng(0), 200_000
    (low, high), aspect = np.log(SIZE_BOUNDS), math.log(MAX_ASPECT)
    points = rng.uniform([0, 0, low, -aspect], [1, 1, high, aspect], (n, 4))
    for name, density in simpler_densities(image_points(some), support).items():
        values = np.exp(density.log_prob(points)) * (high - low) * 2 * aspect
        assert values.mean() == pytest.approx(1, abs=4 * values.std() / math.sqrt(n) + 0.02), name


def test_regions_are_of_the_train_splits_nodule_films(phantom_data, classifier):
    regions = nodule_regions(phantom_data, classifier, batch=3)
    assert regions.patients == [1, 4, 7, 10, 13, 16, 19, 22]  # every third of 24
    assert len(regions.boxes) == len(regions.scores) == 8 and all(0 < score < 1 for score in regions.scores)
    boxes = torch.cat(regions.boxes)
    assert len(boxes) and boxes.min() >= 0 and boxes.max() <= FILM_SIZE
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / FILM_SIZE
    assert side.max() <= SIZE_BOUNDS[1] + 1e-9
    few = regions.of({4, 22})
    assert few.patients == [4, 22] and few.boxes[1] is regions.boxes[7] and few.scores == regions.scores[1::6]
    with pytest.raises(ValueError, match="must peak in the lung field somewhere, got 8"):
        regions.inside(Support(np.eye(64, dtype=bool) & (np.arange(64) < 1), SIZE_BOUNDS, MAX_ASPECT))


def test_a_mixture_puts_its_share_at_the_maps_places_with_readers_sizes():
    some = images()
    corner = torch.tensor([[180.0, 170.0, 200.0, 190.0]])
    regions = Regions([corner, corner], [0.9, 0.1], [0, 77])
    mixed = fit_mixture(FIELD, 0.25, some, regions)
    at_corner = np.isclose(mixed.density.kernels[:, :2], [190 / 256, 180 / 256]).all(1)
    assert at_corner.sum() == 2 and mixed.density.weights[at_corner] == pytest.approx([0.225, 0.025])
    readers = {round(v, 9) for v in mixed.density.kernels[~at_corner, 2]}
    assert {round(v, 9) for v in mixed.density.kernels[at_corner, 2]} <= readers
    assert "0.25 of the places" in mixed.description and mixed.n_boxes == 12


def test_recipe_saves_the_prior_that_the_fitting_boxes_prefer(phantom_data, classifier, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot, weights = tmp_path / "prior.safetensors", tmp_path / "priors.png", tmp_path / "classifier.safetensors"
    classifier.save(weights)
    words = ["--data", str(phantom_data), "--out", str(out), "--classifier", str(weights), "--plot", str(plot)]
    main(words)
    said = capsys.readouterr().out
    prior = LocationPrior.load(out)
    assert repr(prior) in said and plot.stat().st_size > 10_000
    first = next(line for line in said.splitlines() if line.startswith("| ") and "density |" not in line)
    assert f"from {first.split('|')[1].strip()};" in said  # the chosen one leads the table
    for name in ("readers' boxes", "the classifier's maps", "readers' sizes, all places the maps'", "Gaussian"):
        assert f"| {name} |" in said
    priors, _ = fit_best(phantom_data)
    assert list(priors) == ["readers' boxes"] and priors["readers' boxes"].n_patients == 4  # val's two are not seen


def test_bundled_prior_beats_uniform_gaussian_and_position_alone_on_held_out_patients(real_data):
    """On boxes of val and test patients, each patient once. A position density with a log-normal size is level."""
    table = held_out_table(real_data, LocationPrior.bundled(), resamples=500)
    rows = {r.split("|")[1].strip(): r.split("|")[3] for r in table.splitlines() if r.startswith("| ")}
    for name in ("uniform in the lung field", "Gaussian", "kernel density on position alone"):
        gain = next(cell for key, cell in rows.items() if key.startswith(name))
        mean, low = (float(part) for part in gain.replace("[", "").split(",")[0].split())
        assert mean > 0 and low > 0, name


def test_points_are_chosen_together():
    known = Points(np.arange(8.0).reshape(2, 4), np.array([1.0, 2.0]), np.array([5, 6]))
    assert known.of(np.array([False, True])).groups.tolist() == [6]
