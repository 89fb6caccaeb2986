"""Measures of same-noise pairs, worked on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.metrics.pairs import argmax_hit, energy_inside, equivariance, half_width, roundness

BOX = torch.tensor([[8.0, 8.0, 16.0, 16.0]])


def _blank(size: int = 32) -> torch.Tensor:
    return torch.zeros(1, 1, size, size)


def _squared_distance(size: int, cx: float, cy: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return ((columns - cx) ** 2 + (rows - cy) ** 2)[None, None]


def test_energy_inside_is_the_share_worked_on_paper():
    difference = _blank()
    assert energy_inside(difference, BOX).item() == 0
    difference[0, 0, 10, 10] = -3.0  # inside, sign does not count
    difference[0, 0, 7, 7] = 1.0  # inside the box dilated by a quarter: from 6 to 18
    difference[0, 0, 30, 30] = 4.0  # outside
    assert energy_inside(difference, BOX).item() == pytest.approx(0.5)
    assert energy_inside(difference, BOX, grow=0.0).item() == pytest.approx(3 / 8)


def test_argmax_hits_only_inside_the_box_and_looks_for_bright_not_for_dark():
    difference = _blank()
    difference[0, 0, 2, 2], difference[0, 0, 8, 15] = -5.0, 1.0
    assert argmax_hit(difference, BOX).tolist() == [True]
    difference[0, 0, 8, 16] = 2.0
    assert argmax_hit(difference, BOX).tolist() == [False]


def test_roundness_tells_disc_from_square():
    square = _blank()
    square[..., 8:16, 8:16] = 1
    assert roundness((_squared_distance(32, 12, 12) <= 16).float(), BOX).item() == pytest.approx(1)
    assert roundness(square, BOX).item() == pytest.approx(0)
    assert roundness(_blank(), BOX).isnan().all()


def test_half_width_of_a_full_disc_is_one_and_of_a_gaussian_is_its_own():
    box, square = torch.tensor([[34.0, 34.0, 94.0, 94.0]]), _squared_distance(128, 64, 64)
    gaussian = torch.exp(-square / (2 * 10**2))
    assert half_width((square <= 30**2).float(), box).item() == pytest.approx(1, abs=0.01)
    # A Gaussian is above half its height up to 1.1774 sigma: 2 x 11.774 / 60.
    assert half_width(gaussian, box).item() == pytest.approx(0.3925, abs=0.01)
    assert half_width(gaussian - 5, box).isnan().all()
    difference = _blank()  # what lies beyond the dilated box does not count
    difference[..., 10:14, 10:14] = 1
    difference[..., 25, 25] = 50
    assert half_width(difference, BOX).item() == pytest.approx(2 * (16 / math.pi) ** 0.5 / 8)


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_a_difference_that_moves_with_its_mask_is_equivariant(dx, dy):
    here, there = (torch.exp(-_squared_distance(64, 32 + a, 32 + b) / 18) for a, b in ((0, 0), (dx, dy)))
    shift = torch.tensor([[dx, dy]])
    assert equivariance(here, there, shift).item() == pytest.approx(1, abs=1e-4)
    assert equivariance(here, -there, shift).item() == pytest.approx(-1, abs=1e-4)


def test_a_difference_that_stays_is_not_equivariant_and_shifts_that_leave_nothing_are_refused():
    blob = torch.exp(-_squared_distance(64, 20, 20) / 18)
    assert equivariance(blob, blob, torch.tensor([[20, 20]])).item() < 0.05
    assert equivariance(blob, torch.zeros_like(blob), torch.tensor([[20, 20]])).isnan().all()
    with pytest.raises(ValueError, match="less than the image's side 32, got 40"):
        equivariance(_blank(), _blank(), torch.tensor([[40, 0]]))
    with pytest.raises(ValueError, match=r"must fit differences \(1, 1, 32, 32\)"):
        equivariance(_blank(), _blank(16), torch.tensor([[4, 0]]))
