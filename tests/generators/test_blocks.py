import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carim_aug.generators.blocks import ImageHead, Joint, Residual, Stem, Up, soften
from carim_aug.ops.boxes import boxes_to_masks


def _mask(*box: float, size: int = 128) -> torch.Tensor:
    return boxes_to_masks([torch.tensor([box])], size)


@given(st.integers(0, 98), st.integers(0, 98), st.integers(2, 30), st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_a_softened_box_peaks_at_one_and_is_zero_outside(x, y, width, height):
    mask = _mask(x, y, x + width, y + height)
    dome = soften(mask)
    away_from_the_border = min(x, y, 128 - x - width, 128 - y - height) >= 16
    assert dome.max().item() == pytest.approx(1, abs=1e-5 if away_from_the_border else 0.3)
    assert dome.min() >= 0 and dome.max() <= 1 and dome[mask == 0].abs().max() == 0


def test_a_softened_box_falls_to_its_edges_and_further_to_its_corners():
    dome = soften(_mask(50, 50, 66, 66))[0, 0]
    middle, edge, corner = dome[58, 58], dome[58, 50], dome[50, 50]
    assert middle > 0.95 and 0.1 < edge < 0.5 and corner < edge / 2


def test_every_region_gets_a_dome_of_its_own():
    boxes = torch.tensor([[20.0, 20, 24, 24], [80.0, 80, 100, 100]])
    dome = soften(boxes_to_masks([boxes], 128))[0, 0]
    assert dome[20:24, 20:24].max().item() == pytest.approx(1, abs=1e-5)
    assert dome[80:100, 80:100].max().item() == pytest.approx(1, abs=1e-5)


def test_an_empty_mask_stays_empty_and_the_callers_mask_stays_as_it_was():
    assert soften(torch.zeros(2, 1, 64, 64)).abs().max() == 0
    mask = _mask(10, 10, 20, 20)
    before = mask.clone()
    soften(mask)
    assert torch.equal(mask, before)


def test_softening_is_the_same_under_autocast():
    mask = _mask(30, 40, 47, 52)
    with torch.autocast("cpu", torch.bfloat16):
        cast = soften(mask)
    assert torch.equal(cast, soften(mask))


@pytest.mark.parametrize("spectral", [False, True])
def test_blocks_have_the_shapes_they_promise(spectral):
    hidden, mask = torch.zeros(2, 6, 8, 8), torch.zeros(2, 1, 16, 16)
    assert Stem(10, 6, spectral=spectral)(torch.zeros(2, 10)).shape == (2, 6, 4, 4)
    assert Up(6, 4, masked=True, spectral=spectral)(hidden, mask).shape == (2, 4, 16, 16)
    assert Up(6, 4, masked=False, spectral=spectral)(hidden).shape == (2, 4, 16, 16)
    assert Joint(6, spectral=spectral)(hidden, mask[:, :, ::2, ::2]).shape == (2, 6, 8, 8)
    assert Residual(6, spectral=spectral)(hidden).shape == (2, 6, 8, 8)
    image = ImageHead(6, spectral=spectral)(torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0)) * 100)
    assert image.shape == (2, 1, 8, 8) and image.abs().max() <= 1
