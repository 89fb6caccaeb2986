"""Differentiable augmentation: one draw for image and mask, at any scale."""

import torch
from torch.nn.functional import avg_pool2d

from train.common.distributed import Part
from train.gan.diffaugment import DiffAugment


def draw(n: int = 4, seed: int = 0, **options) -> DiffAugment:
    return DiffAugment.draw(n, generator=torch.Generator().manual_seed(seed), **options)


def test_the_seed_alone_decides_and_gradients_pass():
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before, state = images.detach().clone(), torch.get_rng_state()
    changed = draw()(images)
    assert torch.equal(changed, draw()(images)) and not torch.equal(changed, draw(seed=1)(images))
    changed.sum().backward()
    assert torch.equal(images.detach(), before) and images.grad.abs().sum() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_the_mask_moves_with_the_image_and_one_draw_fits_all_scales():
    images = torch.full((16, 1, 64, 64), -1.0)
    images[:, :, 24:40, 24:40] = 1.0
    masks, change = (images > 0).float(), draw(16, cutout=0.0)
    moved = change.geometry(masks)
    for image, mask in zip(change(images), moved, strict=True):
        assert image[mask > 0.99].min() > image[mask < 0.01].max()
    assert not torch.equal(moved, masks)
    assert (avg_pool2d(moved, 2) - change.geometry(avg_pool2d(masks, 2))).abs().mean() < 0.02


def test_the_part_of_a_process_is_its_rows_of_the_whole_draw():
    whole = draw(8)
    part = whole.part(Part(1, 2))
    assert torch.equal(part.brightness, whole.brightness[[1, 3, 5, 7]])
    assert torch.equal(part.theta, whole.theta[[1, 3, 5, 7]])
