import pytest
import torch

from carim_aug.losses import discriminator_loss, generator_loss, lsgan_fake, lsgan_real, outside_loss


def test_perfect_discriminator_has_no_loss():
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert discriminator_loss((ones, ones), (zeros, zeros), zeros).item() == 0


def test_discriminator_loss_is_equation_3_on_paper():
    half = torch.full((2,), 0.5)
    # Four terms of 0.25, halved.
    assert discriminator_loss((half, half), (half, half)).item() == pytest.approx(0.5)
    # Mismatched pairs share the conditional term for fakes: (0.25 + 1) / 2 in place of 0.25.
    assert discriminator_loss((half, half), (half, half), torch.ones(2)).item() == pytest.approx(0.6875)


def test_generator_loss_is_equation_4_on_paper():
    assert generator_loss((torch.zeros(4), torch.ones(4))).item() == pytest.approx(0.5)


def test_heads_want_one_for_real_and_zero_for_fake():
    scores = torch.tensor([0.0, 2.0])
    assert lsgan_real(scores).item() == 1 and lsgan_fake(scores).item() == 2


def test_outside_loss_counts_only_where_no_difference_is_allowed():
    difference = torch.full((1, 1, 4, 4), -0.5)
    allowed = torch.zeros(1, 1, 4, 4)
    assert outside_loss(difference, allowed).item() == pytest.approx(0.5)
    assert outside_loss(difference, torch.ones_like(allowed)).item() == 0
