"""Losses of the GAN: least squares on an unconditional and a conditional head (METHOD 3, eq. 3 and 4)."""

from torch import Tensor


def lsgan_real(scores: Tensor) -> Tensor:
    """Gives mean (D - 1)^2, a scalar, of scores of any shape."""
    return (scores.float() - 1).square().mean()


def lsgan_fake(scores: Tensor) -> Tensor:
    """Gives mean D^2, a scalar, of scores of any shape."""
    return scores.float().square().mean()


def discriminator_loss(
    real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], mismatched: Tensor | None = None
) -> Tensor:
    """Gives L_Di, a scalar: eq. 3.

    Args:
        real: unconditional and conditional scores of real images, (B,) each.
        fake: the same of generated images.
        mismatched: conditional scores of real images with the other class, counted as fake beside the generated ones
            (METHOD 10, StackGAN-v2), or none (eq. 3 to the letter).
    """
    conditional_fake = lsgan_fake(fake[1])
    if mismatched is not None:
        conditional_fake = 0.5 * (conditional_fake + lsgan_fake(mismatched))
    return 0.5 * (lsgan_real(real[0]) + lsgan_fake(fake[0]) + lsgan_real(real[1]) + conditional_fake)


def generator_loss(fake: tuple[Tensor, Tensor]) -> Tensor:
    """Gives L_Gi, a scalar, from the two heads' scores of generated images: eq. 4."""
    return 0.5 * (lsgan_real(fake[0]) + lsgan_real(fake[1]))


def outside_loss(difference: Tensor, allowed: Tensor) -> Tensor:
    """Gives the mean |difference| where it should be none, a scalar.

    Our own extension: with the same noise, a mask must change the image at the mask only.

    Args:
        difference: (B, 1, S, S), image with mask minus image without.
        allowed: (B, 1, S, S) in [0, 1], 1 where a difference is wanted.
    """
    return (difference.float().abs() * (1 - allowed)).mean()
