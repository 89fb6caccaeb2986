"""Generator, moving average and discriminators of one GAN run, and the statistics that averaged weights need."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.batch import widen
from train.gan.batch import draw_masks
from train.gan.discriminators import CropDiscriminator, ScaleDiscriminator
from train.gan.presets import GANPreset


class Networks(nn.Module):
    """Generator, its moving average, and all discriminators of one run."""

    def __init__(self, preset: GANPreset) -> None:
        super().__init__()
        config = ARCHITECTURES[preset.architecture]
        self.generator = MultiScaleGenerator(config)
        self.scales: Any = nn.ModuleList(  # of ScaleDiscriminator
            ScaleDiscriminator(
                config.image_size >> (config.branches - 1 - i),
                width=preset.discriminator_width,
                max_channels=preset.discriminator_channels,
                condition_dim=preset.condition_dim,
                batch_norm=preset.discriminator_norm,
                grow=preset.discriminator_norm,
            )
            for i in range(config.branches)
        )
        self.crop = CropDiscriminator()
        self.difference = CropDiscriminator(3)
        self.average = moving_average(self.generator, half_life=preset.ema_images / preset.batch)

    def start_from(self, trained: nn.Module) -> None:
        """Take over a trained generator, as it is and as its own average; the average then moves at full length."""
        self.generator.load_state_dict(trained.state_dict())
        self.average.module.load_state_dict(trained.state_dict())
        self.average.n_averaged.fill_(1_000_000)

    def compile_blocks(self) -> None:
        """Compile the generator's and the discriminators' blocks, in place; names and tensors stay the same."""
        for block in (*self.generator.ups, *self.generator.residuals, *(d.trunk for d in self.scales)):
            block.compile()

    def discriminators(self) -> list[nn.Module]:
        """Return all networks that score images."""
        return [*self.scales, self.crop, self.difference]


def moving_average(network: nn.Module, *, half_life: float) -> AveragedModel:
    """Return an exponential moving average of a network's parameters, half-life in steps, short at first."""

    def average(averaged: Any, current: Any, steps: Any) -> None:
        decay = min(0.5 ** (1 / half_life), (1 + int(steps)) / (10 + int(steps)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return AveragedModel(network, multi_avg_fn=average)


def update_average(average: AveragedModel, network: nn.Module) -> None:
    """Average the parameters; copy the buffers (spectral norm's vectors, batch norm's statistics)."""
    average.update_parameters(network)
    for mean, now in zip(average.module.buffers(), network.buffers(), strict=True):
        mean.copy_(now)


@contextlib.contextmanager
def fresh_statistics(network: nn.Module) -> Iterator[None]:
    """Take the batch norm statistics of the block's forward passes alone; the network is left in eval mode."""
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    vectors = {k: v.clone() for k, v in network.named_buffers() if k.endswith(("_u", "_v"))}
    network.train()
    with torch.no_grad():
        yield
        for name, value in vectors.items():
            network.get_buffer(name).copy_(value)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def retake_statistics(generator: MultiScaleGenerator, prior: LocationPrior, preset: GANPreset, *, seed: int) -> None:
    """Take the batch norm statistics anew, in place: those of the training do not fit averaged weights.

    Of `preset.statistics_batches` batches, half matched pairs with the prior's masks, half without, as in training.
    """
    size, device = generator.image_size, next(generator.parameters()).device
    stream = torch.Generator().manual_seed(fold(seed, 3))
    with fresh_statistics(generator):
        for _ in range(preset.statistics_batches):
            noise = torch.randn(preset.batch // 2, generator.noise_dim, generator=stream).to(device)
            boxes = prior.sample(len(noise), generator=stream, image_size=size).boxes
            masks = draw_masks([widen(b, 2, size) for b in boxes], size, stream).to(device)
            generator.pyramid(torch.cat([noise, noise]), torch.cat([masks, torch.zeros_like(masks)]))
