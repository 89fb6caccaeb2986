"""Batches of real images and requests: keyed by the images seen, with crops whose mask is known."""

import dataclasses

import pytest
import torch

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from train.classifier.batch import widen
from train.common.distributed import Part
from train.common.images import read_images
from train.gan.batch import DIFFERENCE_GAIN, Batch, crop_at, difference_maps, draw_batch, mean_inside


@pytest.fixture(scope="module")
def images(phantom_data):
    return read_images(phantom_data, "train", 32, only_normal_or_nodule=True)


def test_batches_are_a_pure_function_of_the_images_seen(images, templates, tiny):
    prior, ct = LocationPrior.bundled(), CTNodules(templates)
    state = torch.get_rng_state()
    one, again, other = (draw_batch(images, prior, ct, tiny, seed=1, images_seen=seen) for seen in (16, 16, 24))
    assert all(torch.equal(getattr(one, f.name), getattr(again, f.name)) for f in dataclasses.fields(one))
    assert not torch.equal(one.images, other.images) and not torch.equal(one.noise, other.noise)
    assert torch.equal(state, torch.get_rng_state())
    assert one.classes.tolist() == [1] * 4 + [0] * 4
    assert one.differences[:, 0].min() >= 0 and one.differences[:, 0].amax(dim=(1, 2)).min() > 0
    normal = {image.numpy().tobytes() for image in images.images[images.normal]}
    assert all(((image + 1) * 127.5).round().byte().numpy().tobytes() in normal for image in one.images[4:])


def test_boxes_without_ct_nodules_still_give_crops(images, tiny):
    batch = draw_batch(images, LocationPrior.bundled(), None, tiny, seed=0, images_seen=0)
    # Four normal images with an empty mask, one boxed nodule.
    assert batch.crops.shape == (5, 2, 8, 8) and not len(batch.differences)
    assert batch.crops[:4, 1].abs().max() == 0 and batch.crops[4, 1].max() == 1


def test_crops_stay_inside_and_small_boxes_are_widened_about_their_centre():
    maps = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    crop = crop_at(maps, torch.tensor([[30.0, 0.0, 32.0, 2.0]]), 8, torch.zeros(1, 2))
    assert crop.shape == (1, 1, 8, 8) and crop[0, 0, 0, 7] == 31
    wide = widen(torch.tensor([[10.0, 10.0, 11.0, 14.0], [31.5, 0.0, 32.0, 0.5]]), 2, 32)
    assert wide.tolist() == [[9.5, 10.0, 11.5, 14.0], [30.0, 0.0, 32.0, 2.0]]


def test_maps_of_a_difference_hold_its_strength_its_shape_and_the_mask():
    difference, mask = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    difference[0, 0, 1, 1], difference[0, 0, 1, 2], difference[1, 0, 0, 0] = 0.2, 0.1, 0.002
    maps = difference_maps(difference, mask)
    assert torch.equal(maps[:, 2:], mask) and torch.equal(maps[:, :1], difference * DIFFERENCE_GAIN)
    assert maps[0, 1].max() == 1 and maps[0, 1, 1, 2] == 0.5
    assert float(maps[1, 1].max()) == pytest.approx(0.2)  # what is hardly there is not blown up
    assert mean_inside(difference, mask).tolist() == pytest.approx([0.3 / 16, 0.002 / 16])


def test_parts_of_a_batch_are_all_of_it_with_both_classes_in_each():
    lengths = {f.name: 4 if f.name in ("noise", "masks", "boxes") else 8 for f in dataclasses.fields(Batch)}
    batch = Batch(**{name: torch.arange(float(n)) for name, n in lengths.items()})
    parts = [batch.part(Part(rank, 2)) for rank in range(2)]
    assert [p.images.tolist() for p in parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [p.noise.tolist() for p in parts] == [[0, 2], [1, 3]]
    assert sorted(torch.cat([p.crops for p in parts]).tolist()) == list(range(8))
    assert all(torch.equal(a, b) for a, b in zip(vars(batch.part(Part())).values(), vars(batch).values(), strict=True))
