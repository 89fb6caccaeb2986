"""One update of a class-conditional baseline, each by its own authors' losses.

Logistic for DCGAN; Wasserstein with gradient penalty and an auxiliary classifier for PGGAN, fading in one size after
the other; eq. 3 and 4 of Ann (2021), on classes, for the attention cGAN. Departures: PGGAN's Adam goes on when a size
is added, and its class joins the noise after the norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.ops.precision import autocast
from carim_aug.ops.random import fold
from train.common.images import ImageSet
from train.common.loop import Buffers, descend, frozen
from train.gan.diffaugment import DiffAugment
from train.gan.losses import discriminator_loss, generator_loss
from train.gan.networks import moving_average, update_average
from train.reproduction.baselines.attention import AttentionDiscriminator
from train.reproduction.baselines.dcgan import DCGANDiscriminator
from train.reproduction.baselines.pggan import ProgressiveDiscriminator
from train.reproduction.baselines.presets import BaselinePreset
from train.reproduction.baselines.source import ClassNetworks

Losses = dict[str, Tensor]


@dataclass
class Batch:
    """Real images of one update, and what the generators are asked for."""

    real: Tensor  # (B, 1, S, S) in [-1, 1]
    classes: Tensor  # (B,) int64, 0 normal, 1 nodule, of real and generated images alike
    noise: Tensor  # (B, noise_dim)
    change: DiffAugment | None  # of the batch
    step: int  # PGGAN: the size, 4 * 2 ** step
    alpha: float  # PGGAN: how far it is faded in
    mix: Tensor  # PGGAN: (B, 1, 1, 1) in [0, 1], where between real and generated the slope is held to 1

    def augment(self, images: Tensor) -> Tensor:
        """Return images as the discriminators see them."""
        return images if self.change is None else self.change(images)

    def real_at_step(self) -> Tensor:
        """Return the real images at PGGAN's size, the newest detail as far as it is faded in."""
        images = F.adaptive_avg_pool2d(self.real, 4 * 2**self.step)
        if self.step and self.alpha < 1:
            coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
            images = coarse + self.alpha * (images - coarse)
        return images


class BaselineGAN(nn.Module):
    """Generators, their moving average, and discriminators of one baseline."""

    def __init__(self, preset: BaselinePreset) -> None:
        super().__init__()
        size, self.kind = preset.config.image_size, preset.kind
        self.generators = ClassNetworks(preset.config)
        self.average = moving_average(self.generators, half_life=preset.ema_images / preset.batch)
        widths = {"width": preset.width, "most": preset.most}
        if self.kind == "dcgan":
            self.discriminators = nn.ModuleList(DCGANDiscriminator(size, **widths) for _ in range(2))
        elif self.kind == "pggan":
            self.discriminators = nn.ModuleList([ProgressiveDiscriminator(size, **widths)])
        else:
            numbers: dict[str, int | bool] = {
                "width": preset.discriminator_width,
                "max_channels": preset.discriminator_channels,
                "condition_dim": preset.condition_dim,
                "batch_norm": preset.discriminator_norm,
                "grow": preset.discriminator_norm,
            }
            sides = [size >> halvings for halvings in range(preset.config.backbone.branches)][::-1]
            self.discriminators = nn.ModuleList(AttentionDiscriminator(side, **numbers) for side in sides)

    def generate(self, batch: Batch) -> list[Tensor]:
        """Return the images that a batch asks for; see `ClassNetworks`."""
        return self.generators(batch.noise, batch.classes, step=batch.step, alpha=batch.alpha)


def draw_batch(images: ImageSet, preset: BaselinePreset, *, seed: int, images_seen: int) -> Batch:
    """Draw the batch that comes after `images_seen` images: half nodule, half normal; of DCGAN, one class by turns."""
    generator = torch.Generator().manual_seed(fold(seed, images_seen, 8))
    device, batch = images.images.device, preset.batch
    if preset.kind == "dcgan":
        classes = torch.full((batch,), images_seen // batch % 2)
    else:
        classes = (torch.arange(batch) < batch // 2).long()
    nodules, rows = int(classes.sum()), []
    for known, n in ((images.nodule, nodules), (images.normal, batch - nodules)):
        rows.append(known[torch.randint(len(known), (n,), generator=generator).to(known.device)])
    noise = torch.randn(batch, preset.config.backbone.noise_dim, generator=generator)
    change = DiffAugment.draw(batch, generator=generator).to(device) if preset.augment else None
    mix = torch.rand(batch, 1, 1, 1, generator=generator)
    real, (step, alpha) = images.symmetric(torch.cat(rows)), growth(preset, images_seen)
    return Batch(real, classes.to(device), noise.to(device), change, step, alpha, mix.to(device))


def growth(preset: BaselinePreset, images_seen: int) -> tuple[int, float]:
    """Return PGGAN's size (4 * 2 ** step) after so many images, and how far it is faded in, in (0, 1]."""
    last = preset.config.image_size.bit_length() - 3
    step = min(images_seen // preset.grow_images, last)
    if step == 0:
        return 0, 1.0
    into = images_seen - step * preset.grow_images + preset.batch
    return step, min(1.0, 2 * into / preset.grow_images)


def train_step(
    gan: BaselineGAN, optimizers: dict[str, torch.optim.Optimizer], batch: Batch, *, dtype: torch.dtype
) -> tuple[Losses, bool]:
    """Make one update of discriminators, generators and their average; return the losses, and whether all is finite."""
    device, before = batch.real.device, Buffers([gan.generators, *gan.discriminators])

    # Update D.
    with autocast(device, dtype):
        with torch.no_grad():
            fake = gan.generate(batch)
        losses = discriminator_losses(gan, batch, fake)
    finite = descend(losses, optimizers["discriminators"])

    # Update G.
    if finite:
        with frozen(list(gan.discriminators)), autocast(device, dtype):
            terms = generator_losses(gan, batch, gan.generate(batch))
        losses |= terms
        finite = descend(terms, optimizers["generators"])

    # EMA.
    if finite:
        update_average(gan.average, gan.generators)
    else:
        before.restore()
    return {k: v.detach() for k, v in losses.items()}, finite


def discriminator_losses(gan: BaselineGAN, batch: Batch, fake: list[Tensor]) -> Losses:
    """Return the discriminators' losses on real images and on generated ones (B, 1, s, s) of the same classes."""
    if gan.kind == "dcgan":
        discriminator = gan.discriminators[int(batch.classes[0])]
        on_real, on_fake = (discriminator(batch.augment(images)).float() for images in (batch.real, fake[0]))
        return {"d": F.softplus(-on_real).mean() + F.softplus(on_fake).mean()}
    if gan.kind == "pggan":
        discriminator = gan.discriminators[0]
        real_images, fake_images = batch.augment(batch.real_at_step()), batch.augment(fake[0].float())
        on_real, real_class = discriminator(real_images, alpha=batch.alpha)
        on_fake, fake_class = discriminator(fake_images, alpha=batch.alpha)
        with torch.autocast(batch.real.device.type, enabled=False):
            between = (batch.mix * real_images + (1 - batch.mix) * fake_images).requires_grad_()
            scores = discriminator(between, alpha=batch.alpha)[0].sum()
            (slope,) = torch.autograd.grad(scores, between, create_graph=True)
        return {
            "d": on_fake.mean() - on_real.mean() + 1e-3 * on_real.square().mean(),
            "slope": 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean(),
            "d_class": F.cross_entropy(real_class, batch.classes) + F.cross_entropy(fake_class, batch.classes),
        }
    losses = {}
    for discriminator, images in zip(gan.discriminators, fake, strict=True):
        assert isinstance(discriminator, AttentionDiscriminator)
        side = images.shape[-1]
        features = discriminator.features(batch.augment(F.adaptive_avg_pool2d(batch.real, side)))
        on_real = discriminator.heads(features, batch.classes)
        on_fake = discriminator(batch.augment(images), batch.classes)
        mismatched = discriminator.heads(features, 1 - batch.classes)[1]
        losses[f"d_{side}"] = discriminator_loss(on_real, on_fake, mismatched)
    return losses


def generator_losses(gan: BaselineGAN, batch: Batch, fake: list[Tensor]) -> Losses:
    """Return the generators' losses on generated images (B, 1, s, s)."""
    if gan.kind == "dcgan":
        return {"g": F.softplus(-gan.discriminators[int(batch.classes[0])](batch.augment(fake[0])).float()).mean()}
    if gan.kind == "pggan":
        scores, classes = gan.discriminators[0](batch.augment(fake[0]), alpha=batch.alpha)
        return {"g": -scores.mean(), "g_class": F.cross_entropy(classes, batch.classes)}
    pairs = zip(gan.discriminators, fake, strict=True)
    return {f"g_{images.shape[-1]}": generator_loss(d(batch.augment(images), batch.classes)) for d, images in pairs}
