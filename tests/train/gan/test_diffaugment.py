import torch

from train.gan.diffaugment import DiffAugment


def _draw(n: int = 4, seed: int = 0, **options) -> DiffAugment:
    return DiffAugment.draw(n, generator=torch.Generator().manual_seed(seed), **options)


def test_same_seed_same_change_other_seed_another():
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_draw()(images), _draw()(images))
    assert not torch.equal(_draw()(images), _draw(seed=1)(images))


def test_mask_moves_with_the_image():
    images = torch.full((16, 1, 64, 64), -1.0)
    images[:, :, 24:40, 24:40] = 1.0
    masks = (images > 0).float()
    change = _draw(16, cutout=0.0)
    moved = change.geometry(masks)
    brighter = change(images)
    for image, mask in zip(brighter, moved, strict=True):
        assert image[mask > 0.99].min() > image[mask < 0.01].max()
    assert not torch.equal(moved, masks)


def test_one_draw_fits_all_scales():
    images = torch.zeros(8, 1, 64, 64)
    images[:, :, 16:48, 16:48] = 1.0
    change = _draw(8)
    large, small = change.geometry(images), change.geometry(torch.nn.functional.avg_pool2d(images, 2))
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.02


def test_caller_keeps_the_images_and_gradients_pass():
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = images.detach().clone()
    _draw()(images).sum().backward()
    assert torch.equal(images.detach(), before) and images.grad.abs().sum() > 0


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    _draw()
    assert torch.equal(state, torch.get_rng_state())
