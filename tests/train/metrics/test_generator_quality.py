"""Figures of a generator, from sources that do by construction what they are asked for."""

from types import SimpleNamespace

import pytest
import torch

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from train.metrics.generator_quality import (
    Features,
    FigurePreset,
    contrasts,
    map_figures,
    matched_pairs,
    one_each,
    pair_figures,
    pixels,
    random_places,
    realism,
    repeats,
)

PRESET = FigurePreset(pairs=12, moved=12, splits=10, draws=50, batch=5)


class Blobs:
    """A level of the seed's own, and 0.3 of a Gaussian about the middle of the mask's box."""

    image_size, weights_hash = 32, "blobs"

    def images(self, masks, seeds):
        x, y = (torch.arange(32) + 0.5)[None, None], (torch.arange(32) + 0.5)[None, :, None]
        inside = masks[:, 0] / masks.sum(dim=(1, 2, 3)).clamp(min=1)[:, None, None]
        cx, cy = ((inside * axis).sum(dim=(1, 2))[:, None, None] for axis in (x, y))
        blob = 0.3 * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2)) * masks.amax(dim=(1, 2, 3))[:, None, None]
        return (torch.tensor([seed % 97 for seed in seeds])[:, None, None] / 200 + blob)[:, None]


@pytest.fixture(scope="module")
def pairs():
    return matched_pairs(Blobs(), LocationPrior.bundled(), PRESET)


def test_pairs_have_seeds_and_places_of_their_own(pairs):
    assert pairs.nodule.shape == pairs.without.shape == (12, 1, 32, 32) and len(set(pairs.seeds)) == 12
    few = matched_pairs(Blobs(), LocationPrior.bundled(), FigurePreset(pairs=3))
    assert few.seeds == pairs.seeds[:3] and torch.equal(few.boxes, pairs.boxes[:3])
    assert torch.equal(few.differences, pairs.differences[:3])
    other = matched_pairs(Blobs(), LocationPrior.bundled(), FigurePreset(pairs=3), seed=1)
    assert not set(other.seeds) & set(few.seeds) and not torch.equal(other.boxes, few.boxes)


def test_pairs_of_a_generator_that_does_what_it_is_asked(pairs):
    figures = pair_figures(pairs, PRESET)
    assert figures["prior"]["hit"]["value"] == figures["random"]["hit"]["value"] == 1
    assert figures["prior"]["brighter"]["value"] == 1 and figures["prior"]["n"] == figures["ellipse"]["n"] == 12
    assert figures["equivariance"]["low"] > 0.99 and figures["shift"] > 0
    # A graft leaves nothing outside its feathered box.
    assert figures["prior"]["energy_grafted"]["value"] > figures["prior"]["energy"]["value"]


def test_contrasts_stand_beside_those_of_real_boxes(pairs, templates):
    # Three normal images, two with a nodule that is 0.2 brighter, and one of nine boxes that does not count.
    images = torch.full((6, 1, 64, 64), 100, dtype=torch.uint8)
    boxes = [torch.empty(0, 4)] * 3 + [torch.tensor([[0.25, 0.25, 0.5, 0.5]])] * 2 + [torch.zeros(9, 4)]
    images[3:5, :, 16:32, 16:32] += round(0.2 * 127.5)
    real = SimpleNamespace(
        images=images,
        patients=torch.arange(6),
        boxes=boxes,
        official=[torch.ones(len(b)).bool() if i != 4 else torch.tensor([False]) for i, b in enumerate(boxes)],
        normal=torch.arange(3),
    )
    figures = contrasts(pairs, real, CTNodules(templates))
    assert figures["real"]["official boxes"]["n"] == figures["real"]["ChestX-Det boxes"]["n"] == 1
    assert 0.1 < figures["real"]["all boxes"]["value"] < 0.2  # the square's corners lie in the ring
    assert figures["made"]["real images there, bare"]["value"] == pytest.approx(0, abs=1e-6)
    assert 0 < figures["made"]["grafts in real images"]["value"] <= figures["made"]["generated images"]["high"]
    assert set(figures["ks"]) == set(figures["made"]) and set(figures["shape"]) == {"generated", "CT nodules"}
    assert set(figures["same_boxes"]) == {"official boxes", "ChestX-Det boxes"}
    assert "CT nodules superimposed" not in contrasts(pairs, real, None)["made"]


def test_map_of_a_classifier_that_sees_brightness_is_higher_inside(pairs):
    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.activation, self.head = torch.nn.ReLU(), torch.nn.Linear(1, 2)
            torch.nn.init.ones_(self.head.weight)

        def target(self, finding):
            return {"Mass": 0, "Nodule": 1}[finding]

        def forward(self, images):
            return self.head(self.activation(images).mean(dim=(2, 3)))

    figures = map_figures(pairs, Brightness(), PRESET, finding="Nodule")
    assert figures["n"] == 12 and figures["rises"]["value"] == 1 and figures["logit_rise"]["value"] > 0
    assert figures["inside"]["value"] > figures["outside"]["value"] and figures["p"] < 0.05


def test_one_each_has_every_patient_once_and_any_of_its_images():
    patients, generator = torch.tensor([5, 5, 7, 9, 9, 9]), torch.Generator().manual_seed(0)
    draws = [one_each(patients, generator) for _ in range(60)]
    assert all(sorted(patients[rows].tolist()) == [5, 7, 9] for rows in draws)
    assert set(torch.cat(draws).tolist()) == set(range(6))
    assert len({tuple(patients[rows].tolist()) for rows in draws}) == 6  # the order is random too


def test_images_of_the_training_distribution_are_at_the_floor():
    generated, train, held_out = (
        torch.rand(n, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (100, 200, 50)
    )
    patients = torch.arange(200), torch.arange(1000, 1050)
    row = realism(Features(generated, train, held_out, patients), PRESET)
    assert row["n"] == 100 and row["fid_ratio"]["value"] == pytest.approx(1, abs=0.3)
    assert row["kid_all"]["low"] < 0 < row["kid_all"]["high"]
    assert row["kid_floor"]["low"] < 0 < row["kid_floor"]["high"]
    far = realism(Features(generated * 0.5, train, held_out, patients), PRESET)
    assert far["fid_ratio"]["low"] > 2 and far["kid_all"]["low"] > 0
    copies = repeats(Features(train[:50] + 0.01, train, held_out, patients), PRESET)
    assert copies["memorises"] and [g for g, t in copies["closest"] if g != t] == []
    assert copies["generated_to_train"]["value"] == pytest.approx(0.04, abs=1e-3)
    assert copies["held_out_to_train"]["low"] > 0.5
    assert not repeats(Features(generated, train, held_out, patients), PRESET)["memorises"]


def test_features_are_of_rounded_images_and_random_places_keep_sizes_and_stay_inside():
    real = SimpleNamespace(images=torch.zeros(2, 1, 32, 32, dtype=torch.uint8), patients=torch.arange(2))
    features = Features.of(pixels, torch.full((3, 1, 32, 32), 0.3), real, real)
    assert features.generated.shape == (3, 1024) and features.patients[0] is real.patients
    assert features.generated[0, 0].item() == pytest.approx((166 / 127.5 - 1) / 32) and features.train.max() == -1 / 32
    boxes = torch.tensor([[4.0, 4, 10, 12], [20, 20, 31, 32]]).repeat(50, 1)
    moved = random_places(boxes, 32, torch.Generator().manual_seed(0))
    assert torch.allclose(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2], atol=1e-5)
    assert moved.min() >= 0 and moved.max() <= 32 and moved[:, 0].std() > 3
