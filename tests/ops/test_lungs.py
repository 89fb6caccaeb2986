"""Lungs of one image, and of many, on drawn chests."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.lungs import _fill, _largest, grow_field, lung_field, lung_frequency, lung_masks


def ellipse(x, y, radius_x, radius_y):
    ticks = (torch.arange(64) + 0.5) / 64
    return ((ticks - x) / radius_x) ** 2 + ((ticks[:, None] - y) / radius_y) ** 2 < 1


LUNGS = ellipse(0.32, 0.5, 0.1, 0.28) | ellipse(0.68, 0.45, 0.1, 0.22)


def chest(*dark):
    """A bright body with two dark lungs, and more dark places."""
    image = ellipse(0.5, 0.5, 0.42, 0.6).float() * 0.8
    for place in (LUNGS, *dark):
        image[place] = 0.2
    return image[None, None]


def overlap(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def test_masks_are_the_drawn_lungs_at_any_size_and_value_range_and_in_any_batch():
    masks = lung_masks(chest())
    assert masks.shape == (1, 64, 64) and masks.dtype == torch.bool and overlap(masks[0], LUNGS) > 0.85
    large = F.interpolate(chest(), size=(256, 256))
    assert lung_masks((large * 255).to(torch.uint8)).equal(lung_masks(large * 2 - 1))
    assert overlap(lung_masks(large)[0], LUNGS) > 0.85
    images = torch.cat([chest(), chest().flip(3), phantom_chest(64, seed=1)[None]])
    together = lung_masks(images)
    assert together.equal(torch.cat([lung_masks(image[None]) for image in images]))
    assert together[1].equal(together[0].flip(1))


def test_air_gas_specks_and_dark_places_outside_the_field_are_no_lung():
    gas, speck, corner = ellipse(0.62, 0.85, 0.09, 0.06), ellipse(0.5, 0.2, 0.03, 0.03), ellipse(0.02, 0.02, 0.2, 0.2)
    masks = lung_masks(chest(gas, speck, corner))[0]
    assert not masks[gas | speck | corner].any() and overlap(masks, LUNGS) > 0.85
    field = torch.zeros(64, 64, dtype=torch.bool)
    field[:, :32] = True
    masks = lung_masks(chest(), field)[0]
    assert overlap(masks, LUNGS & field) > 0.85 and not masks[:, 36:].any()


def test_a_cleft_to_the_air_does_not_leak_and_a_vessel_or_nodule_leaves_no_hole():
    image, cleft = chest(), torch.zeros(64, 64, dtype=torch.bool)
    cleft[31:33, 8:16] = True  # half as dark, from the image's left into the lung
    image[0, 0][cleft & ~LUNGS] = 0.5
    image[0, 0][ellipse(0.68, 0.45, 0.04, 0.04)] = 0.7
    masks = lung_masks(image)[0]
    assert overlap(masks, LUNGS) > 0.85 and not masks[:, :12].any() and masks[28, 43]


def test_phantoms_lungs_hold_the_middle_of_each_and_no_spine_and_an_image_without_lungs_has_none():
    assert not lung_masks(torch.zeros(2, 1, 64, 64)).any()
    assert not lung_masks(ellipse(0.5, 0.5, 0.42, 0.6).float()[None, None]).any()
    masks = lung_masks(torch.stack([phantom_chest(128, seed=seed) for seed in range(8)]))
    share = masks.float().mean((1, 2))
    assert (share > 0.05).all() and (share < 0.45).all()
    assert masks[:, 24:32, 16:26].any((1, 2)).all() and masks[:, 24:32, 38:48].any((1, 2)).all()
    assert not masks[:, :, 31:33].all(1).any() and not masks[:, 0].any() and not masks[:, -1].any()


def test_filling_is_the_reconstruction_of_the_reference_library():
    """Grey-scale reconstruction by erosion, against scipy's one step of it repeated."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(0).random((24, 31)).astype(np.float32)
    level = np.full_like(image, image.max())
    level[[0, -1]], level[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    for _ in range(24 * 31):
        level = np.maximum(image, ndimage.grey_erosion(level, size=(3, 3)))
    maps = torch.from_numpy(image)[None, None]
    assert torch.from_numpy(level).equal(_fill(maps)[0, 0]) and _largest(maps).equal(F.max_pool2d(maps, 3, 1, 1))


def test_frequency_is_the_share_of_images_and_the_field_where_it_is_large_grows_to_hold_boxes():
    pytest.importorskip("scipy")
    images = torch.cat([chest(), chest(), chest(), torch.zeros(1, 1, 64, 64)])
    frequency = lung_frequency(images)
    assert frequency[32, 20] == 0.75 and frequency[2, 2] == 0
    field = lung_field(images)
    assert field.shape == (64, 64) and field.dtype == torch.bool and overlap(field, LUNGS) > 0.75
    assert not field[32, 32] and not lung_field(images, share=0.5)[2, 2]
    assert field[46, 20] and not field[46, 43]  # the image's left lung reaches lower

    centres = np.concatenate([np.full((50, 2), 0.3), np.full((10, 2), [0.3, 0.9]), [[0.99, 0.01]]])
    larger = grow_field(LUNGS, centres, np.ones(61), coverage=0.95)
    assert (larger | LUNGS).equal(larger) and larger[57, 19] and not larger[0, 63]
    assert grow_field(LUNGS, centres[:50], np.ones(50)).sum() == LUNGS.sum()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lung_masks(torch.zeros(1, 3, 64, 64)), r"images must be \(B, 1, H, W\), got \(1, 3, 64, 64\)"),
        (lambda: lung_masks(chest(), torch.ones(32, 32, dtype=torch.bool)), r"field must be .*got \(32, 32\)"),
        (lambda: lung_field(torch.zeros(64, 64)), r"\(B, 1, H, W\), got \(64, 64\)"),
        (lambda: lung_field(torch.zeros(2, 1, 64, 64)), "none found in 2 images"),
        (lambda: lung_field(chest(), share=2), "share .* got 2"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
