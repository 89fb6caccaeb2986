"""Losses of the GAN on paper: least squares, CARIM, and our own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.gan.losses import (
    CARIM_FORMS,
    carim_loss,
    discriminator_loss,
    generator_loss,
    gradient_ratio,
    level_loss,
    lsgan_loss,
    outside_loss,
    spread_loss,
)


def test_lsgan_losses_are_equations_3_and_4_on_paper():
    zeros, half, ones = torch.zeros(2), torch.full((2,), 0.5), torch.ones(2)
    scores = torch.tensor([0.0, 2.0])
    assert lsgan_loss(scores, 1).item() == 1 and lsgan_loss(scores, 0).item() == 2
    assert discriminator_loss((ones, ones), (zeros, zeros), zeros).item() == 0  # a perfect discriminator
    assert discriminator_loss((half, half), (half, half)).item() == pytest.approx(0.5)  # four terms of 0.25, halved
    # Mismatched pairs share the conditional term for fakes: (0.25 + 1) / 2 in place of 0.25.
    assert discriminator_loss((half, half), (half, half), ones).item() == pytest.approx(0.6875)
    assert generator_loss((zeros, ones)).item() == pytest.approx(0.5)


def _images(n, seed, level=0.0):
    return (torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.3 + level).clamp(-1, 1)


def test_our_own_losses_on_paper():
    difference, allowed = torch.full((1, 1, 4, 4), -0.5), torch.zeros(1, 1, 4, 4)
    assert outside_loss(difference, allowed).item() == pytest.approx(0.5)
    assert outside_loss(difference, torch.ones_like(allowed)).item() == 0
    images, rng = _images(6, 0), torch.Generator().manual_seed(0)
    assert level_loss(images, images[[3, 1, 5, 0, 2, 4]], generator=rng).item() == pytest.approx(0, abs=1e-12)
    # Features are (a, .., a, a^2, .., a^2): along a unit axis u the squared gap is (gap . u)^2, its mean |gap|^2 / 128.
    fake, real = torch.full((4, 1, 32, 32), 0.5), torch.full((4, 1, 32, 32), 0.1)
    value = level_loss(fake, real, generator=rng, directions=20_000)
    assert value.item() == pytest.approx(64 * (0.4**2 + 0.24**2) / 128, rel=0.03)


def test_level_loss_pulls_brightness_back():
    fake, real = _images(16, 1, 0.5).requires_grad_(), _images(16, 2)
    rng = torch.Generator().manual_seed(0)
    level_loss(fake, real, generator=rng).backward()
    assert (fake.grad.sum(dim=(1, 2, 3)) > 0).float().mean() > 0.8  # downhill is darker


# --- CARIM (eq. 6) ---
def _box_mask(size, x1, y1, x2, y2):
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, y1:y2, x1:x2] = 1
    return mask


def test_carim_by_hand_is_the_mean_of_nodule_samples_only():
    maps = torch.tensor([[[[4.0, 1.0], [-3.0, 2.0]]]])  # M_norm: 1, 1/4, 0, 1/2
    left, right = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    out = carim_loss(maps, left)
    assert out.loss.item() == pytest.approx((0 + 1) / 2) and out.dead == 0
    assert carim_loss(maps, right).loss.item() == pytest.approx((0.75**2 + 0.5**2) / 2)
    maps = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.cat([_box_mask(8, 0, 0, 2, 2), torch.zeros(1, 1, 8, 8), _box_mask(8, 4, 4, 8, 7)])
    for form in CARIM_FORMS:
        alone = [carim_loss(maps[i : i + 1], masks[i : i + 1], form=form).loss for i in (0, 2)]
        assert torch.allclose(carim_loss(maps, masks, form=form).loss, sum(alone) / 2)
        none = carim_loss(maps, torch.zeros(3, 1, 8, 8), form=form)
        assert none.loss == 0 and none.dead == 0


def test_a_map_that_is_nowhere_positive_is_dead_in_the_form_with_relu_alone():
    masks = _box_mask(8, 2, 2, 6, 6).expand(2, 1, 8, 8)
    maps = torch.full((2, 1, 4, 4), -1.0)
    maps[1, 0, 1, 1] = 2.0
    for form, dead, grads in (("relu", 0.5, [False, True]), ("softplus", 0.0, [True, True])):
        x = maps.clone()
        x[0] -= torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out = carim_loss(x, masks, form=form)
        out.loss.backward()
        assert out.dead.item() == dead
        assert [bool(g.abs().sum() > 0) for g in x.grad] == grads and x.grad.isfinite().all()


@pytest.mark.parametrize("form", CARIM_FORMS)
def test_a_step_down_carim_moves_the_map_into_the_mask(form):
    masks = _box_mask(16, 8, 8, 16, 16)
    maps = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = carim_loss(maps, masks, form=form).loss
    (gradient,) = torch.autograd.grad(before, maps)
    assert gradient[0, 0, 2:, 2:].sum() < 0
    assert carim_loss(maps.detach() - 0.1 * gradient / gradient.norm(), masks, form=form).loss < before


@given(scale=st.floats(1e-3, 1e3))
def test_carim_does_not_depend_on_the_maps_scale(scale):
    maps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = _box_mask(8, 1, 2, 5, 6).expand(2, 1, 8, 8)
    for form in CARIM_FORMS:
        a, b = carim_loss(maps, masks, form=form).loss, carim_loss(maps * scale, masks, form=form).loss
        assert torch.allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize(
    ("maps", "masks", "form", "match"),
    [
        ((2, 4, 4), (2, 1, 8, 8), "relu", "maps and masks must be"),
        ((2, 1, 4, 4), (3, 1, 8, 8), "relu", "maps and masks must be"),
        ((2, 1, 4, 4), (2, 1, 8, 8), "source", "form must be one of .* got 'source'"),
    ],
)
def test_carim_refuses_what_does_not_fit(maps, masks, form, match):
    with pytest.raises(ValueError, match=match):
        carim_loss(torch.rand(maps), torch.rand(masks), form=form)


def test_the_ratio_of_gradients_is_that_of_their_norms_and_spread_compares_sorted_values():
    images = torch.ones(2, 1, 2, 2, requires_grad=True)
    assert gradient_ratio((3 * images).sum(), (2 * images).sum(), images) == pytest.approx(1.5)
    assert gradient_ratio(images.sum(), torch.zeros((), requires_grad=True) * 1, images) == float("inf")
    fake, real = torch.tensor([0.3, 0.1, 0.2], requires_grad=True), torch.tensor([0.1, 0.2, 0.6])
    loss = spread_loss(fake, real)
    assert float(loss.detach()) == pytest.approx(0.3**2 / 3)  # only the largest differs
    loss.backward()
    assert fake.grad.tolist() == pytest.approx([-0.2, 0.0, 0.0])
    assert float(spread_loss(real.flip(0), real)) == 0
