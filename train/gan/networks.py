"""Generator, moving average and discriminators of one GAN run (METHOD 2, 3 and 6)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.gan.batch import at_least, draw_masks
from train.gan.discriminators import CropDiscriminator, ScaleDiscriminator
from train.gan.presets import GANPreset


class Networks(nn.Module):
    """Generator, its moving average, and all discriminators of one run."""

    def __init__(self, preset: GANPreset) -> None:
        """Makes untrained networks."""
        super().__init__()
        config = ARCHITECTURES[preset.architecture]
        self.generator = MultiScaleGenerator(config)
        self.scales = nn.ModuleList(
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

    def update_average(self) -> None:
        """Averages the parameters; copies the buffers (spectral norm's vectors, batch norm's statistics)."""
        move_average(self.average, self.generator)

    def start_from(self, trained: MultiScaleGenerator) -> None:
        """Takes over a trained generator, as it is and as its own average; the average then moves at full length."""
        self.generator.load_state_dict(trained.state_dict())
        self.average.module.load_state_dict(trained.state_dict())
        self.average.n_averaged.fill_(1_000_000)

    def compile_blocks(self) -> None:
        """Compiles the generator's and the discriminators' blocks, in place; names and tensors stay the same."""
        for blocks in (self.generator.ups, self.generator.residuals):
            for block in blocks:
                block.compile()
        for d in self.scales:
            d.trunk.compile()

    def discriminators(self) -> list[nn.Module]:
        """Gives all networks that judge."""
        return [*self.scales, self.crop, self.difference]


def moving_average(network: nn.Module, *, half_life: float) -> AveragedModel:
    """Gives an exponential moving average of a network's parameters, short at first.

    Args:
        network: copied.
        half_life: in steps.
    """

    def average(averaged: list[Tensor], current: list[Tensor], steps: Any) -> None:
        decay = min(0.5 ** (1 / half_life), (1 + int(steps)) / (10 + int(steps)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return AveragedModel(network, multi_avg_fn=average)


def move_average(average: AveragedModel, network: nn.Module) -> None:
    """Averages the parameters; copies the buffers."""
    average.update_parameters(network)
    for mean, now in zip(average.module.buffers(), network.buffers(), strict=True):
        mean.copy_(now)


@contextlib.contextmanager
def frozen(modules: list[nn.Module]) -> Iterator[None]:
    """Keeps the modules' parameters without gradient inside the block."""
    parameters = [p for m in modules for p in m.parameters()]
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


@contextlib.contextmanager
def statistics_anew(network: nn.Module) -> Iterator[None]:
    """Takes the batch norm statistics of all forward passes inside the block, in place of those of the training.

    The network is left in eval mode; spectral norm's vectors do not move.
    """
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    vectors = {k: v.clone() for k, v in network.named_buffers() if k.endswith(("_u", "_v"))}
    network.train()
    with torch.no_grad():
        yield
        for name, value in network.named_buffers():
            if name in vectors:
                value.copy_(vectors[name])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def retake_statistics(generator: MultiScaleGenerator, prior: LocationPrior, preset: GANPreset, *, seed: int) -> None:
    """Takes the batch norm statistics anew, in place: those of the training do not fit averaged weights.

    Args:
        generator: left in eval mode.
        prior: of the masks.
        preset: its batch, half matched pairs' masks, half none, as in training, and how many of them are averaged.
        seed: of the noise and masks.
    """
    size, device = generator.image_size, next(generator.parameters()).device
    stream = torch.Generator().manual_seed(fold(seed, 3))
    with statistics_anew(generator):
        for _ in range(preset.statistics_batches):
            noise = torch.randn(preset.batch // 2, generator.noise_dim, generator=stream).to(device)
            boxes = prior.sample(len(noise), generator=stream, image_size=size).boxes
            masks = draw_masks([at_least(b, 2, size) for b in boxes], size, stream).to(device)
            generator.pyramid(torch.cat([noise, noise]), torch.cat([masks, torch.zeros_like(masks)]))
