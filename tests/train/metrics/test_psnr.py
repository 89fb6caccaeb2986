"""PSNR of unpaired sets against torchmetrics and on paper."""

import math

import pytest
import torch

from train.metrics.psnr import SOURCE_OFFSET_DB, mean_psnr, psnr

# Table 1 as printed: PSNR of normal images and of nodule crops, five models.
PRINTED = (58.33, 54.16, 64.52, 65.23, 61.24, 58.14, 62.96, 60.51, 67.52, 66.45)


def _images(n, *, seed, size=8):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_worked_on_paper():
    # Mean squares 1/4 and 1/100 from black: 10 log10(4) and 20 dB; a checkerboard of 0 and 1 is 1/4 from grey.
    black, grey, dark = (torch.full((1, 1, 4, 4), value, dtype=torch.float64) for value in (0.0, 0.5, 0.1))
    board = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).double()[None, None]
    ours = psnr(torch.cat([black, board]), torch.cat([grey, dark]))
    four = 10 * math.log10(4)
    assert ours[:, 0].tolist() == pytest.approx([four, four], abs=1e-9) and ours[0, 1].item() == pytest.approx(20)
    assert mean_psnr(black, torch.cat([grey, dark])).item() == pytest.approx((four + 20) / 2, abs=1e-9)


@pytest.mark.parametrize("count", [3, 140])  # within a block and over its edge
def test_psnr_of_every_pair_is_torchmetrics(count):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    a, b = _images(count, seed=1), _images(4, seed=2) ** 2
    theirs = torch.stack([torch.stack([metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for y in b]) for x in a])
    assert torch.allclose(psnr(a, b), theirs.double(), atol=1e-4)
    assert mean_psnr(a, b).item() == pytest.approx(theirs.double().mean().item(), abs=1e-4)
    assert torch.allclose(psnr(b, a), psnr(a, b).T, atol=1e-9)


def test_source_offset_is_a_peak_of_255_for_images_up_to_one():
    a, b = _images(3, seed=1), _images(5, seed=2)
    assert SOURCE_OFFSET_DB == pytest.approx(48.1308, abs=1e-4)
    assert (mean_psnr(a, b, peak=255) - mean_psnr(a, b)).item() == pytest.approx(SOURCE_OFFSET_DB, abs=1e-9)
    assert mean_psnr(255 * a, 255 * b, peak=255).item() == pytest.approx(mean_psnr(a, b).item(), abs=1e-5)
    honest = [value - SOURCE_OFFSET_DB for value in PRINTED]
    assert 6 < min(honest) and max(honest) < 19.5


def test_an_image_in_both_sets_is_infinitely_near_and_one_grey_value_is_not():
    a = _images(3, seed=1, size=256)
    near = a.clone()
    near[0, 0, 0, 0] = (near[0, 0, 0, 0] - 1 / 255).abs()
    ours = psnr(a, near)
    assert torch.equal(ours.isinf(), torch.diag(torch.tensor([False, True, True])))
    assert ours[0, 0].item() == pytest.approx(10 * math.log10(256 * 256 * 255**2), abs=1e-3)
    assert mean_psnr(a, a) == math.inf


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 4), r"got \(2, 1, 4, 4\) and \(2, 1, 5, 4\)"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(2, 1, 4, 4), r"got \(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), -torch.ones(2, 1, 4, 4), r"b must be in \[0, 1\], got -1 to -1"),
        (torch.full((2, 1, 4, 4), math.nan), torch.zeros(2, 1, 4, 4), r"a must be in \[0, 1\], got nan"),
    ],
)
def test_bad_images_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        mean_psnr(a, b)


def test_bad_peak_is_named():
    with pytest.raises(ValueError, match="peak must be above 0, got 0"):
        psnr(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), peak=0)
