"""What the discriminators of whole images are asked in one step, and the losses of their scores (eq. 3 and 4).

Least squares as the source has it, or the relativistic pairs of R3GAN (Huang et al. 2024); R1 on real images (Mescheder
et al. 2018), lazily. Both are switches of a preset, off by default.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.gan.discriminators import ScaleDiscriminator
from train.gan.losses import discriminator_loss, generator_loss


class Scores(NamedTuple):
    """Scores of one scale in a discriminator step, (B,) each but the penalty, a scalar (0 where none was asked)."""

    real: Tensor
    real_conditional: Tensor
    fake: Tensor
    fake_conditional: Tensor
    mismatched: Tensor
    penalty: Tensor


class Comparison(nn.Module):
    """One scale's discriminator asked for a whole step in one forward pass, so that one backward serves all (DESIGN 4).

    Real, generated and mismatched images share one pass of the trunk and one of the heads; with batch norm, whose
    statistics are of one kind of images each, only real and mismatched ones share the trunk's.

    Args:
        discriminator: of one scale.
        together: real and generated images in one batch: only without batch norm.
    """

    def __init__(self, discriminator: ScaleDiscriminator, *, together: bool) -> None:
        """Wraps the discriminator."""
        super().__init__()
        self.discriminator, self.together = discriminator, together

    def forward(self, real: Tensor, fake: Tensor, classes: Tensor, penalise: bool = False) -> Scores:
        """Gives all scores.

        Args:
            real: (B, 1, S, S), [-1, 1].
            fake: (B, 1, S, S).
            classes: (B,) int64, of both.
            penalise: also give R1: half the mean squared norm of the scores' gradient by the real image.
        """
        d, n = self.discriminator, len(real)
        if penalise:
            real = real.detach().requires_grad_()
        if self.together:
            maps = d.features(torch.cat([real, fake]))
            plain, fitting = d.judge(torch.cat([maps, maps[:n]]), torch.cat([classes, classes, 1 - classes]))
            (on_real, on_fake, _), (fits, fake_fits, mismatched) = plain.split(n), fitting.split(n)
        else:
            maps = d.features(real)
            on_real, fits = d.judge(maps, classes)
            on_fake, fake_fits = d.judge(d.features(fake), classes)
            mismatched = d.judge(maps, 1 - classes)[1]
        penalty = torch.zeros((), device=real.device)
        if penalise:
            (slope,) = torch.autograd.grad((on_real + fits).float().sum(), real, create_graph=True)
            penalty = 0.5 * slope.float().square().sum() / n
        return Scores(on_real, fits, on_fake, fake_fits, mismatched, penalty)


def judging_loss(scores: Scores, *, relativistic: bool) -> Tensor:
    """Gives the discriminator's loss of one scale, a scalar, without the penalty.

    Least squares: eq. 3 with mismatched pairs. Relativistic: mean softplus(D(s) - D(x)) over pairs of a generated and a
    real image of the same class, for both heads, mismatched pairs being half the fakes of the conditional one.
    """
    if not relativistic:
        return discriminator_loss(scores[0:2], scores[2:4], scores.mismatched)
    real, fits = scores.real.float(), scores.real_conditional.float()
    fakes = (scores.fake_conditional.float(), scores.mismatched.float())
    conditional = sum((0.5 * F.softplus(fake - fits).mean() for fake in fakes), torch.zeros_like(scores.penalty))
    return F.softplus(scores.fake.float() - real).mean() + conditional


def drawing_loss(fake: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor] | None) -> Tensor:
    """Gives the generator's loss of one scale, a scalar: eq. 4, or the relativistic one where real scores are given.

    Args:
        fake: both heads' scores of generated images, (B,) each.
        real: the same of real images of the same classes, without gradient.
    """
    if real is None:
        return generator_loss(fake)
    pairs = zip(real, fake, strict=True)
    return sum((F.softplus(x.float() - s.float()).mean() for x, s in pairs), torch.zeros((), device=fake[0].device))
