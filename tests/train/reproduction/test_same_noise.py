"""Same-noise pictures and difference figures, with generators whose answers are known."""

import json

import numpy as np
import pytest
import torch
from tiny import generator, global_states_untouched, prior

from carim_aug.data.phantom import phantom_chest
from train.reproduction.figures.same_noise import (
    difference_figures,
    difference_grid,
    draw_boxes,
    draw_noise,
    pairs_of,
    renderer,
    same_noise_grid,
)
from train.reproduction.sources import Patients


class Bright:
    """Grey films that brighten by 0.5 in the mask, or, without places, by 0.5 in the upper left quarter."""

    weights_hash = "bright" * 8
    noise_dim = 7

    def __init__(self, image_size=48, *, places=True):
        self.image_size, self.places, self.calls = image_size, places, []

    def __call__(self, noise, masks):
        self.calls.append(len(noise))
        added = masks
        if not self.places:
            added = torch.zeros_like(masks)
            added[:, :, : self.image_size // 2, : self.image_size // 2] = masks.amax(dim=(2, 3), keepdim=True)
        return 0.01 * noise[:, :1, None, None] + 0.5 * added


def patients(n: int = 6) -> Patients:
    """Drawn chests of n patients, each with a normal film and one with a nodule."""
    films = torch.stack([(phantom_chest(256, seed=i) * 255).to(torch.uint8) for i in range(n)])
    boxes = torch.tensor([[100.0, 90.0, 120.0, 115.0]]).repeat(n, 1)
    names = torch.arange(n)
    return Patients(films, names, films.clone(), boxes, names, torch.ones(n, dtype=torch.bool), names.clone())


def test_difference_of_a_model_that_obeys_lies_in_the_mask():
    row = difference_figures(Bright(), prior(), n=20, seed=3, batch=8)
    assert row["places"] is True and row["n"] == 20
    assert row["energy"]["value"] == pytest.approx(1) and row["hit"]["value"] == 1
    assert 0 < row["hit_chance"]["value"] < row["energy_chance"]["value"] < 0.05
    assert json.dumps(json.loads(json.dumps(row))) == json.dumps(row)


def test_difference_of_a_model_without_places_lies_in_the_mask_by_chance():
    row = difference_figures(Bright(places=False), prior(), n=200, seed=3)
    assert row["places"] is False
    # A quarter of the film brightens, so a mask that lies in it holds four times its share of the film.
    assert 0 < row["energy"]["value"] < 4 * row["energy_chance"]["value"] < 0.1
    assert row["hit"]["value"] < 0.05


def test_pairs_are_the_same_whatever_the_batch_and_the_number():
    few, many = (pairs_of(generator(), prior(), n=n, seed=5, batch=b) for n, b in ((3, 2), (7, 7)))
    assert torch.equal(few.noise, many.noise[:3]) and torch.equal(few.boxes, many.boxes[:3])
    assert torch.allclose(few.nodule, many.nodule[:3], atol=1e-5)
    assert not torch.equal(few.nodule, few.without)
    other = pairs_of(generator(), prior(), n=3, seed=6)
    assert not torch.equal(other.noise, few.noise) and not torch.equal(other.boxes, few.boxes)


def test_models_of_other_sizes_get_the_same_places():
    small, large = (pairs_of(Bright(size), prior(), n=4, seed=1).boxes for size in (32, 96))
    assert torch.allclose(small * 3, large, atol=1e-4)


def test_generators_run_in_batches_and_stay_as_they_were():
    bright = Bright()
    assert renderer(bright, batch=4)(torch.zeros(10, 7), None).shape == (10, 1, 48, 48)
    assert bright.calls == [4, 4, 2]
    module = generator().train()
    try:
        with global_states_untouched():
            pairs_of(module, prior(), n=2)
        assert module.training
    finally:
        module.eval()


def test_boxes_apart_touch_nothing():
    first = draw_boxes(prior(), 60, seed=1)
    apart = draw_boxes(prior(), 60, seed=2, apart=first)
    overlap = torch.minimum(first[:, 2:], apart[:, 2:]) - torch.maximum(first[:, :2], apart[:, :2])
    assert bool((overlap.min(dim=1).values < 0).all())
    assert torch.equal(apart, draw_boxes(prior(), 60, seed=2, apart=first))
    with pytest.raises(ValueError, match=r"apart from \[0.0, 0.0, 1.0, 1.0\]"):
        draw_boxes(prior(), 1, seed=0, apart=torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_rows_of_a_model_without_places_have_no_outline():
    size, gutter_free = 40, slice(-3 * 44 - 4, None)
    with_places = np.asarray(same_noise_grid({"A": Bright()}, prior(), columns=3, size=size))
    without = np.asarray(same_noise_grid({"A": Bright(places=False)}, prior(), columns=3, size=size))

    def coloured(sheet):
        return (sheet[:, gutter_free].max(axis=2).astype(int) - sheet[:, gutter_free].min(axis=2)) > 100

    assert coloured(with_places)[44:88].any() and not coloured(with_places)[:44].any()
    assert not coloured(without).any()


def test_grid_of_models_of_several_sizes_says_what_it_is():
    models = {"obeys": Bright(), "class only": Bright(32, places=False), "tiny": generator()}
    sheet = same_noise_grid(models, prior(), real=patients(), columns=4, seed=2, size=40)
    # Real: three rows; models that place: three each; the other: two.
    assert sheet.height >= 11 * 44 + 4 and sheet.mode == "RGB"
    assert all(word in sheet.info["carim_aug"] for word in ("Synthetic but the rows of real films", "obeys", "seed 2"))
    assert "real" not in same_noise_grid({"tiny": generator()}, prior(), columns=1, size=40).info["carim_aug"]


def test_same_seed_gives_the_same_pictures():
    for draw in (
        lambda seed: same_noise_grid({"tiny": generator()}, prior(), real=patients(), columns=2, seed=seed, size=40),
        lambda seed: difference_grid(generator(), prior(), columns=2, seed=seed, size=40),
    ):
        assert draw(0).tobytes() == draw(0).tobytes() != draw(1).tobytes()


def test_colours_of_the_difference_are_signed_and_their_scale_is_told():
    sheet = difference_grid(Bright(), prior(), columns=2, seed=0, size=48)
    assert "darkest red +0.5," in sheet.info["carim_aug"]
    row = np.asarray(sheet)[4 + 2 * 52 : 4 + 2 * 52 + 48, -2 * 52 :].astype(int)
    red, blue = row[..., 0] - row[..., 2] > 60, row[..., 2] - row[..., 0] > 60
    assert red.any() and not blue.any()
    about = difference_grid(Bright(places=False), prior(), columns=1, size=48).info["carim_aug"]
    assert "takes of the mask only that there is one" in about


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: same_noise_grid({}, prior()), "generators must be at least one"),
        (lambda: same_noise_grid({"A": Bright()}, prior(), columns=0), "n must be at least 1, got 0"),
        (lambda: same_noise_grid({"A": Bright()}, prior(), size=8), "size must be at least 32, got 8"),
        (lambda: same_noise_grid({"A": Bright()}, prior(), real=patients(2), columns=3), "at least 3 patients.*got 2"),
        (lambda: difference_grid(Bright(), prior(), size=8), "size must be at least 32, got 8"),
        (lambda: difference_figures(Bright(), prior(), n=0), "n must be at least 1, got 0"),
        (lambda: renderer(Bright(), batch=0), "batch must be at least 1, got 0"),
        (lambda: draw_boxes(prior(), 2, seed=0, apart=torch.zeros(1, 4) + torch.tensor([0.1, 0.1, 0.2, 0.2])), "2 box"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_of_two_lengths_begins_alike():
    short, long = Bright(), Bright()
    long.noise_dim = 11
    assert torch.equal(draw_noise(short, 3, seed=4), draw_noise(long, 3, seed=4)[:, :7])
