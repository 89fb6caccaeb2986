"""Patches, their classifier, and the pointing game."""

import torch
from torch.nn import functional as F

from train.metrics.patches import PATCH, PatchNet, patches_at, pointing_chance, pointing_hit


def test_patches_of_a_flat_image_are_zero_and_of_a_point_peak_at_it():
    images = torch.full((2, 1, 256, 256), 0.3)
    images[1, 0, 100, 60] = 1.0
    patches = patches_at(images, torch.tensor([[128.0, 128.0], [60.5, 100.5]]))
    assert patches.shape == (2, 1, PATCH, PATCH) and patches[0].abs().max() < 1e-6
    assert patches[1].argmax() == (PATCH // 2) * PATCH + PATCH // 2
    assert patches[1].sum().abs() < 0.2  # the blur spreads what it takes, nearly all of it inside the patch
    ramp = torch.arange(256.0)[None, None, None].expand(1, 1, 256, 256) / 128 - 1
    patches = patches_at(ramp, torch.tensor([[0.0, 255.0]]))  # at a border they are moved inside
    assert patches.isfinite().all() and patches[..., 30:].abs().max() < 1e-5  # a ramp is its own blur off the border


def test_net_takes_the_largest_answer_of_any_place():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PatchNet(width=4).eval()
    patches = torch.rand(3, 1, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, features = net(patches), net.features(patches * 4)
    assert logits.shape == (3,) and torch.allclose(
        logits, F.linear(features.amax((2, 3)), *net.head.parameters())[:, 0]
    )


def test_pointing_game_by_hand():
    maps = torch.zeros(3, 1, 8, 8)
    maps[:, 0, 2, 5] = 1
    boxes = [torch.tensor([[4.0, 2, 6, 4]]), torch.tensor([[0.0, 0, 2, 2], [5, 1, 7, 3]]), torch.empty(0, 4)]
    assert pointing_hit(maps, boxes).tolist() == [True, True, False]
    field = torch.zeros(8, 8, dtype=torch.bool)
    field[:, 4:] = True
    assert pointing_chance(boxes, field).tolist() == [4 / 32, 4 / 32, 0]
