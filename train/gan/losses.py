"""Losses of the GAN: least squares on two heads (METHOD 3, eq. 3 and 4), CARIM (METHOD 4, eq. 6), pairs."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.cam import enlarged, normalised

CARIM_FORMS: tuple[str, ...] = ("source", "softplus")
"""Forms of the CARIM loss; see `carim_loss`."""


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


def level_loss(
    fake: Tensor, real: Tensor, *, generator: torch.Generator, cells: int = 8, directions: int = 64
) -> Tensor:
    """Gives how far generated films stray from real ones in coarse brightness: a squared sliced Wasserstein distance.

    Our own extension: discriminators under spectral norm hardly notice a film that is too dark or too bright as a
    whole. A film's mean and mean square in each of cells x cells squares are projected on random directions; along
    each, the batch's sorted values are compared (Deshpande et al. 2018).

    Args:
        fake: (B, 1, S, S), [-1, 1].
        real: (B, 1, S, S).
        generator: random stream of the directions, on CPU.
        cells: squares along each side.
        directions: how many.

    Returns:
        Scalar, 0 for equal batches.
    """

    def features(images: Tensor) -> Tensor:
        images = images.float()
        return torch.cat([F.adaptive_avg_pool2d(x, cells).flatten(1) for x in (images, images.square())], dim=1)

    a, b = features(fake), features(real)
    axes = torch.randn(a.shape[1], directions, generator=generator).to(a)
    axes = axes / axes.norm(dim=0)
    return ((a @ axes).sort(dim=0).values - (b @ axes).sort(dim=0).values).square().mean()


def spread_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Gives how far the values of one batch are from those of another, a scalar: mean squared gap of the sorted values.

    Our own extension: a batch's squared Wasserstein-2 distance in one dimension, so that the generated nodules are not
    only as bright as real ones on average, but as unequal.

    Args:
        fake: (B,).
        real: (B,), as many.
    """
    return (fake.float().sort().values - real.float().sort().values).square().mean()


class CARIMLoss(NamedTuple):
    """The loss, a scalar with gradient, and the share of nodule samples that give it none, a scalar in [0, 1]."""

    loss: Tensor
    dead: Tensor


def carim_loss(maps: Tensor, masks: Tensor, *, form: str = "source") -> CARIMLoss:
    """Gives L_CARIM (eq. 6): the mean of (1 - M_norm)^2 over a mask's pixels, then over the samples that have a mask.

    In the source's form M = ReLU(maps), enlarged to the image and divided by its largest value. A sample whose map is
    nowhere positive counts as M_norm = 0, adds 1 and has no gradient: it is dead. With "softplus", our own form, M is
    softplus(maps / mean |maps|): positive everywhere, so that no sample is dead, and the maps' scale means nothing.

    Args:
        maps: (B, 1, h, w), signed maps of the target class, as `carim_aug.ops.cam.activation_map` gives them.
        masks: (B, 1, S, S) in {0, 1}; empty for normal samples, which do not count.
        form: of `CARIM_FORMS`.

    Returns:
        Loss, 0 if no sample has a mask, and dead share.

    Raises:
        ValueError: shapes that do not fit, or an unknown form.
    """
    if form not in CARIM_FORMS:
        raise ValueError(f"form must be one of {CARIM_FORMS}, got {form!r}")
    if maps.ndim != 4 or maps.shape[1] != 1 or masks.ndim != 4 or masks.shape[:2] != maps.shape[:2]:
        raise ValueError(f"maps and masks must be (B, 1, h, w), got {tuple(maps.shape)} and {tuple(masks.shape)}")
    maps, masks = maps.float(), masks.float()
    if form == "source":
        seen = maps.relu()
    else:
        scale = maps.detach().abs().mean(dim=(2, 3), keepdim=True)
        seen = F.softplus(maps / scale.clamp(min=torch.finfo(maps.dtype).tiny))
    seen = normalised(enlarged(seen, masks.shape[-1]))
    pixels = masks.sum(dim=(1, 2, 3))
    each = ((1 - seen).square() * masks).sum(dim=(1, 2, 3)) / pixels.clamp(min=1)
    asked = pixels > 0
    count = asked.sum().clamp(min=1)
    dead = asked & (seen.detach().amax(dim=(1, 2, 3)) <= 0)
    return CARIMLoss((each * asked).sum() / count, dead.sum() / count)
