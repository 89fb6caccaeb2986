import pytest
import torch

from carim_aug.evaluation.pairs import argmax_hit, energy_inside, ring_contrast, roundness

BOX = torch.tensor([[8.0, 8.0, 16.0, 16.0]])


def _blank(size: int = 32) -> torch.Tensor:
    return torch.zeros(1, 1, size, size)


def test_energy_inside_is_the_share_worked_on_paper():
    difference = _blank()
    difference[0, 0, 10, 10] = -3.0  # inside, sign does not count
    difference[0, 0, 7, 7] = 1.0  # inside the box grown by a quarter: from 6 to 18
    difference[0, 0, 30, 30] = 4.0  # outside
    assert energy_inside(difference, BOX).item() == pytest.approx(0.5)
    assert energy_inside(difference, BOX, grow=0.0).item() == pytest.approx(3 / 8)


def test_energy_of_no_difference_is_zero():
    assert energy_inside(_blank(), BOX).item() == 0


def test_argmax_hits_only_inside_the_box():
    difference = _blank()
    difference[0, 0, 8, 15] = 1.0
    assert argmax_hit(difference, BOX).tolist() == [True]
    difference[0, 0, 8, 16] = 2.0
    assert argmax_hit(difference, BOX).tolist() == [False]


def test_argmax_looks_for_bright_not_for_dark():
    difference = _blank()
    difference[0, 0, 2, 2], difference[0, 0, 10, 10] = -5.0, 1.0
    assert argmax_hit(difference, BOX).item()


def test_ring_contrast_of_a_disc_on_a_flat_ground():
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    image = torch.where((rows - 12) ** 2 + (columns - 12) ** 2 <= 16, 0.5, 0.2)[None, None]
    inside, ring, contrast = ring_contrast(image, BOX)
    assert inside.item() == pytest.approx(0.5) and ring.item() == pytest.approx(0.2)
    assert contrast.item() == pytest.approx(0.3)


def test_roundness_tells_disc_from_square():
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    disc = ((rows - 12) ** 2 + (columns - 12) ** 2 <= 16).float()[None, None]
    square = _blank()
    square[..., 8:16, 8:16] = 1
    assert roundness(disc, BOX).item() == pytest.approx(1)
    assert roundness(square, BOX).item() == pytest.approx(0)
    assert roundness(_blank(), BOX).isnan().all()
