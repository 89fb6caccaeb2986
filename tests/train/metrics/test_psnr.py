"""PSNR of unpaired sets against torchmetrics and on paper."""

import math

import pytest
import torch

from train.metrics.psnr import OFFSET_DB, psnr


def _images(n, *, seed, size=8):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_worked_on_paper():
    # Mean squares 1/4 and 1/100 from black: 10 log10(4) and 20 dB; a checkerboard of 0 and 1 is 1/4 from grey.
    black, grey, dark = (torch.full((1, 1, 4, 4), value, dtype=torch.float64) for value in (0.0, 0.5, 0.1))
    board = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).double()[None, None]
    ours = psnr(torch.cat([black, board]), torch.cat([grey, dark]))
    four = 10 * math.log10(4)
    assert ours[:, 0].tolist() == pytest.approx([four, four], abs=1e-9) and ours[0, 1].item() == pytest.approx(20)
    assert psnr(black, torch.cat([grey, dark])).mean().item() == pytest.approx((four + 20) / 2, abs=1e-9)


@pytest.mark.parametrize("count", [3, 140])  # within a block and over its edge
def test_psnr_of_every_pair_is_torchmetrics(count):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    a, b = _images(count, seed=1), _images(4, seed=2) ** 2
    theirs = torch.stack([torch.stack([metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for y in b]) for x in a])
    assert torch.allclose(psnr(a, b), theirs.double(), atol=1e-4)
    assert psnr(a, b).mean().item() == pytest.approx(theirs.double().mean().item(), abs=1e-4)
    assert torch.allclose(psnr(b, a), psnr(a, b).T, atol=1e-9)


def test_offset_is_a_peak_of_255_for_images_up_to_one():
    a, b = _images(3, seed=1), _images(5, seed=2)
    assert OFFSET_DB == pytest.approx(48.1308, abs=1e-4)
    assert (psnr(a, b, peak=255).mean() - psnr(a, b).mean()).item() == pytest.approx(OFFSET_DB, abs=1e-9)
    assert psnr(255 * a, 255 * b, peak=255).mean().item() == pytest.approx(psnr(a, b).mean().item(), abs=1e-5)
    assert 54.16 - OFFSET_DB == pytest.approx(6.03, abs=0.01)  # the least of Ann's (2021) Table 1


def test_an_image_in_both_sets_is_infinitely_near_and_one_grey_value_is_not():
    a = _images(3, seed=1, size=256)
    near = a.clone()
    near[0, 0, 0, 0] = (near[0, 0, 0, 0] - 1 / 255).abs()
    ours = psnr(a, near)
    assert torch.equal(ours.isinf(), torch.diag(torch.tensor([False, True, True])))
    assert ours[0, 0].item() == pytest.approx(10 * math.log10(256 * 256 * 255**2), abs=1e-3)
    assert psnr(a, a).mean() == math.inf


@pytest.mark.parametrize(
    ("a", "b", "peak", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 4), 1, r"got \(2, 1, 4, 4\) and \(2, 1, 5, 4\)"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(2, 1, 4, 4), 1, r"got \(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), -torch.ones(2, 1, 4, 4), 1, r"b must be in \[0, 1\], got -1 to -1"),
        (torch.full((2, 1, 4, 4), math.nan), torch.zeros(2, 1, 4, 4), 1, r"a must be in \[0, 1\], got nan"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 0, "peak must be above 0, got 0"),
    ],
)
def test_bad_images_and_peaks_are_named(a, b, peak, message):
    with pytest.raises(ValueError, match=message):
        psnr(a, b, peak=peak)
