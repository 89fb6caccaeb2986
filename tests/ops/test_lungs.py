"""Lungs of one film, and of many, on drawn chests."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.lungs import _filled, _largest, lung_frequency, lung_masks


def ellipse(x, y, radius_x, radius_y, size=64):
    row, column = torch.meshgrid((torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="ij")
    return ((column - x) / radius_x) ** 2 + ((row - y) / radius_y) ** 2 < 1


LUNGS = ellipse(0.32, 0.5, 0.1, 0.28) | ellipse(0.68, 0.45, 0.1, 0.22)


def chest(*dark, size=64):
    """A bright body with two dark lungs, and more dark places."""
    film = ellipse(0.5, 0.5, 0.42, 0.6, size).float() * 0.8
    for place in (LUNGS, *dark):
        film[place] = 0.2
    return film[None, None]


def overlap(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def test_masks_are_the_drawn_lungs_at_any_size_and_value_range():
    film = chest()
    masks = lung_masks(film)
    assert masks.shape == (1, 64, 64) and masks.dtype == torch.bool and overlap(masks[0], LUNGS) > 0.85
    large = F.interpolate(film, size=(256, 256))
    assert lung_masks((large * 255).to(torch.uint8)).equal(lung_masks(large * 2 - 1))
    assert overlap(lung_masks(large)[0], LUNGS) > 0.85


def test_each_film_of_a_batch_is_judged_by_itself():
    films = torch.cat([chest(), chest().flip(3), phantom_chest(64, seed=1)[None]])
    assert lung_masks(films).equal(torch.cat([lung_masks(film[None]) for film in films]))
    assert lung_masks(films)[1].equal(lung_masks(films)[0].flip(1))


def test_air_and_gas_and_specks_are_no_lung():
    gas, speck, corner = ellipse(0.62, 0.85, 0.09, 0.06), ellipse(0.5, 0.2, 0.03, 0.03), ellipse(0.02, 0.02, 0.2, 0.2)
    masks = lung_masks(chest(gas, speck, corner))[0]
    assert not masks[gas].any() and not masks[speck].any() and not masks[corner].any()
    assert overlap(masks, LUNGS) > 0.85


def test_dark_places_outside_the_field_are_no_lung():
    field = torch.zeros(64, 64, dtype=torch.bool)
    field[:, :32] = True
    masks = lung_masks(chest(), field)[0]
    assert overlap(masks, LUNGS & field) > 0.85 and not masks[:, 36:].any()


def test_a_lung_that_is_open_to_the_air_by_a_cleft_does_not_leak():
    cleft = torch.zeros(64, 64, dtype=torch.bool)
    cleft[31:33, 8:16] = True  # half as dark, from the image's left into the lung
    film = chest()
    film[0, 0][cleft & ~LUNGS] = 0.5
    masks = lung_masks(film)[0]
    assert overlap(masks, LUNGS) > 0.85 and not masks[:, :12].any()


def test_vessels_and_nodules_inside_a_lung_belong_to_it():
    film = chest()
    film[0, 0][ellipse(0.32, 0.5, 0.04, 0.04)] = 0.7
    assert lung_masks(film)[0][32, 20] and overlap(lung_masks(film)[0], LUNGS) > 0.85


def test_a_film_without_lungs_has_an_empty_mask():
    assert not lung_masks(torch.zeros(2, 1, 64, 64)).any()
    assert not lung_masks(ellipse(0.5, 0.5, 0.42, 0.6).float()[None, None]).any()


def test_phantoms_lungs_hold_the_middle_of_each_and_no_spine():
    masks = lung_masks(torch.stack([phantom_chest(128, seed=seed) for seed in range(8)]))
    share = masks.float().mean((1, 2))
    assert (share > 0.05).all() and (share < 0.45).all()
    assert masks[:, 24:32, 16:26].any((1, 2)).all() and masks[:, 24:32, 38:48].any((1, 2)).all()
    assert not masks[:, :, 31:33].all(1).any() and not masks[:, 0].any() and not masks[:, -1].any()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\), got \(1, 3, 64, 64\)"):
        lung_masks(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"field must be \(64, 64\) bool, got \(32, 32\)"):
        lung_masks(chest(), torch.ones(32, 32, dtype=torch.bool))


def test_largest_is_max_pooling():
    maps = torch.randn(3, 1, 17, 9, generator=torch.Generator().manual_seed(0))
    assert _largest(maps).equal(F.max_pool2d(maps, 3, 1, 1))


def test_filling_is_the_reconstruction_of_the_reference_library():
    """Grey-scale reconstruction by erosion, against scipy's one step of it repeated."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(0).random((24, 31)).astype(np.float32)
    level = np.full_like(image, image.max())
    level[[0, -1]], level[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    for _ in range(24 * 31):
        level = np.maximum(image, ndimage.grey_erosion(level, size=(3, 3)))
    assert torch.from_numpy(level).equal(_filled(torch.from_numpy(image)[None, None])[0, 0])


def test_frequency_is_the_share_of_films():
    films = torch.cat([chest(), chest(), chest(), torch.zeros(1, 1, 64, 64)])
    frequency = lung_frequency(films)
    assert frequency[32, 20] == 0.75 and frequency[2, 2] == 0
