"""What the discriminators are asked, and the losses of their scores, by hand."""

import math

import pytest
import torch

from train.gan.adversarial import Comparison, Scores, drawing_loss, judging_loss
from train.gan.discriminators import ScaleDiscriminator
from train.gan.losses import discriminator_loss


def _net(batch_norm=False):
    torch.manual_seed(0)
    return ScaleDiscriminator(32, width=8, max_channels=16, condition_dim=4, batch_norm=batch_norm, grow=batch_norm)


def _batch():
    stream = torch.Generator().manual_seed(1)
    real, fake = (torch.rand(4, 1, 32, 32, generator=stream) * 2 - 1 for _ in range(2))
    return real, fake, torch.tensor([1, 1, 0, 0])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_forward_gives_what_three_give(batch_norm):
    net, (real, fake, classes) = _net(batch_norm), _batch()
    net.eval()  # fixed statistics and vectors
    scores = Comparison(net, together=not batch_norm)(real, fake, classes)
    for got, wanted in zip(
        scores, [*net(real, classes), *net(fake, classes), net(real, 1 - classes)[1], torch.tensor(0.0)], strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_r1_is_half_the_squared_slope_of_both_heads_and_has_a_gradient():
    net, (real, fake, classes) = _net().eval(), _batch()
    scores = Comparison(net, together=True)(real, fake, classes, True)
    x = real.clone().requires_grad_()
    plain, fitting = net(x, classes)
    (slope,) = torch.autograd.grad(plain.sum() + fitting.sum(), x)
    assert scores.penalty.item() == pytest.approx(0.5 * slope.square().sum().item() / 4, rel=1e-4)
    scores.penalty.backward()
    assert net.trunk[0].parametrizations.weight.original.grad.abs().sum() > 0


def test_relativistic_losses_by_hand():
    zero = torch.zeros(2)
    even = Scores(zero, zero, zero, zero, zero, torch.tensor(0.0))
    assert judging_loss(even, relativistic=True).item() == pytest.approx(2 * math.log(2))
    real, fake = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])
    scores = Scores(real, zero, fake, zero, zero, torch.tensor(0.0))
    first = (math.log1p(math.exp(-2)) + math.log(2)) / 2
    assert judging_loss(scores, relativistic=True).item() == pytest.approx(first + math.log(2))
    first = (math.log1p(math.exp(2)) + math.log(2)) / 2
    assert drawing_loss((fake, zero), (real, zero)).item() == pytest.approx(first + math.log(2))


def test_without_switches_the_losses_are_the_sources():
    stream = torch.Generator().manual_seed(0)
    scores = Scores(*(torch.randn(4, generator=stream) for _ in range(5)), torch.tensor(0.0))
    wanted = discriminator_loss(scores[0:2], scores[2:4], scores[4])
    assert torch.equal(judging_loss(scores, relativistic=False), wanted)
    assert drawing_loss((torch.tensor([1.0]), torch.tensor([0.0])), None).item() == 0.5
