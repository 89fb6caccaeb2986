"""One step of the GAN's training: generate, update the discriminators, update the generator and its average.

A step that is not finite leaves everything as it was before it, and its losses say why.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from train.common.distributed import Part
from train.common.loop import Buffers, descend, frozen
from train.common.run import RunError
from train.gan import losses as gan_losses
from train.gan.batch import Batch, crop_at, difference_maps, mean_inside
from train.gan.diffaugment import DiffAugment
from train.gan.losses import CARIMRegularizer, lsgan_loss
from train.gan.networks import Networks, update_average
from train.gan.presets import GANPreset

Losses = dict[str, Tensor]


@dataclass
class TrainState:
    """One run's networks and optimizers, and each network as Fabric wraps it: what a backward goes through."""

    fabric: Fabric  # devices and precision
    networks: Networks  # the networks themselves
    generator: Any
    scales: list[Any]  # each scale's discriminator
    crop: Any  # discriminator of (image, mask) crops
    difference: Any  # discriminator of crops of differences
    optimizers: dict[str, Any]  # "generator" and "discriminators"
    part: Part  # of a batch that is this process's

    @classmethod
    def setup(cls, fabric: Fabric, networks: Networks, preset: GANPreset) -> "TrainState":
        """Wrap networks that hold their starting values, move them to the device, and make the optimizers."""
        networks.to(memory_format=torch.channels_last).to(fabric.device)
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(networks)
        parameters = [p for d in networks.discriminators() for p in d.parameters()]
        optimizers = {
            "generator": torch.optim.Adam(networks.generator.parameters(), preset.learning_rate, preset.betas),
            "discriminators": torch.optim.Adam(parameters, preset.learning_rate, preset.betas),
        }
        generator, *scales = (fabric.setup_module(net) for net in (networks.generator, *networks.scales))
        generator.mark_forward_method("pyramid")
        for discriminator in scales:
            discriminator.mark_forward_method("compare")
        crop, difference = (fabric.setup_module(net) for net in (networks.crop, networks.difference))
        wrapped = {name: fabric.setup_optimizers(optimizer) for name, optimizer in optimizers.items()}
        part = Part(fabric.global_rank, fabric.world_size)
        return cls(fabric, networks, generator, scales, crop, difference, wrapped, part)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of networks and optimizers."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"networks": self.networks.state_dict(), "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's tensors, or raise RunError if it is of other networks."""
        try:
            self.networks.load_state_dict(state["networks"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(f"the checkpoint is of other networks than the preset's: {str(error)[:300]}") from error


@dataclass(frozen=True)
class Generated:
    """Generated images of one step."""

    pyramid: list[Tensor]  # (B, 1, s, s) each, smallest first: with the mask (the nodule half), then without
    difference: Tensor  # (P, 1, s, s) of matched pairs at the last of these scales, with minus without
    crops: Tensor | None = None  # (2P, 2, c, c) of (image, mask), or None
    differences: Tensor | None = None  # (P, 3, c, c), see `difference_maps`, or None


def train_step(
    state: TrainState,  # changed in place
    batch: Batch,  # real images and requests, of all processes
    preset: GANPreset,
    *,
    scales: int,  # branches that train now
    generator: torch.Generator,  # random stream of the augmentation, on CPU; the same in all processes
    regularizer: CARIMRegularizer | None = None,  # the CARIM loss, where this step has it
    measure: bool = False,  # also give the ratio of its gradient to the adversarial one's, at the last scale's images
    warm_up: bool = False,  # the discriminators alone learn
) -> tuple[Losses, bool]:
    """Make one update of discriminators, generator and average; return the losses, and whether all were finite."""
    fabric, networks, part = state.fabric, state.networks, state.part
    total, batch = len(batch.images), batch.part(part)
    before = Buffers([networks.generator, *networks.discriminators()])
    sizes = [d.image_size for d in networks.scales][:scales]
    last = networks.generator.image_size
    reals = [batch.images if s == last else F.adaptive_avg_pool2d(batch.images, s) for s in sizes]

    def augment(pyramid: list[Tensor]) -> list[Tensor]:
        if not preset.augment:
            return pyramid
        change = DiffAugment.draw(total, generator=generator).part(part).to(fabric.device)
        return [change(images) for images in pyramid]

    # Generate.
    with torch.set_grad_enabled(not warm_up):
        made = generate(state, batch, preset, scales, total=total, generator=generator)

    # Update D on real, mismatched and generated images.
    shown = augment(reals), augment([x.detach() for x in made.pyramid])
    losses = discriminator_losses(state, batch, *shown, made)
    finite = descend(losses, state.optimizers["discriminators"], fabric=fabric, part=part, before=before)
    if warm_up or not finite:
        return {k: v.detach() for k, v in losses.items()}, finite

    # Update G.
    terms = generator_losses(state, batch, preset, made, augment(made.pyramid), reals[-1], generator=generator)
    facts: Losses = {}
    if regularizer is not None and scales == networks.generator.config.branches:
        with fabric.autocast():
            terms["g_carim"], facts["dead"] = regularizer.loss(made.pyramid[-1][: len(batch.masks)], batch.masks)
        if measure:
            ratio = gan_losses.gradient_ratio(terms["g_carim"], terms[f"g{last}"], made.pyramid[-1])
            facts["carim_ratio"] = torch.tensor(ratio)
    finite = descend(terms, state.optimizers["generator"], fabric=fabric, part=part, before=before)

    # EMA.
    if finite:
        update_average(networks.average, networks.generator)
    with torch.no_grad():
        facts["contrast"] = mean_inside(made.difference, F.adaptive_avg_pool2d(batch.masks, sizes[-1])).mean()
    return {k: v.detach() for k, v in (losses | terms | facts).items()}, finite


def generate(
    state: TrainState, batch: Batch, preset: GANPreset, scales: int, *, total: int, generator: torch.Generator
) -> Generated:
    """Generate matched pairs: the same noise with the mask (nodule half) and without (normal half)."""
    noise, empty = torch.cat([batch.noise, batch.noise]), torch.zeros_like(batch.masks)
    with state.fabric.autocast(), parametrize.cached():
        pyramid = state.generator.pyramid(noise, torch.cat([batch.masks, empty]), scales=scales)
    pyramid = [x.float().view_as(x) for x in pyramid]
    with_mask, without = pyramid[-1].chunk(2)
    difference = with_mask - without
    config = state.networks.generator.config
    if scales < config.branches or not len(batch.crops) or preset.crop_weight + preset.difference_weight <= 0:
        return Generated(pyramid, difference)
    crop = config.image_size // 4
    jitter = (torch.rand(total // 2, 2, generator=generator) - 0.5) * crop / 3
    maps = torch.cat([with_mask, batch.masks, without, empty, difference_maps(difference, batch.masks)], dim=1)
    maps = crop_at(maps, batch.boxes, crop, state.part.of(jitter).to(maps.device))
    crops = torch.cat([maps[:, 0:2], maps[:, 2:4]])
    return Generated(pyramid, difference, crops, maps[:, 4:] if len(batch.differences) else None)


def discriminator_losses(
    state: TrainState, batch: Batch, reals: list[Tensor], fakes: list[Tensor], made: Generated
) -> Losses:
    """Return the discriminators' losses: eq. 3 on every scale's (B, 1, s, s) as they see them, and of the crops."""
    losses: Losses = {}
    with state.fabric.autocast(), parametrize.cached():
        for d, real, fake in zip(state.scales, reals, fakes, strict=False):
            losses[f"d{real.shape[-1]}"] = gan_losses.discriminator_loss(*d.compare(real, fake, batch.classes))
        for name, score, known, crops in (
            ("d_crop", state.crop, batch.crops, made.crops),
            ("d_difference", state.difference, batch.differences, made.differences),
        ):
            if crops is not None:
                scores = score(torch.cat([known, crops.detach()]))
                losses[name] = lsgan_loss(scores[: len(known)], 1) + lsgan_loss(scores[len(known) :], 0)
    return losses


def generator_losses(
    state: TrainState,
    batch: Batch,
    preset: GANPreset,
    made: Generated,  # generated images as they are
    fakes: list[Tensor],  # (B, 1, s, s) each, as the discriminators see them
    real: Tensor,  # (B, 1, s, s), as large as the last of these
    *,
    generator: torch.Generator,
) -> Losses:
    """Return the generator's losses: eq. 4 on every scale, the crops, outside the mask, brightness, contrast."""
    networks, part, fabric = state.networks, state.part, state.fabric
    losses: Losses = {}
    with frozen(networks.discriminators()), fabric.autocast(), parametrize.cached():
        for d, fake in zip(networks.scales, fakes, strict=False):
            losses[f"g{d.image_size}"] = gan_losses.generator_loss(d(fake, batch.classes))
        if made.crops is not None:
            losses["g_crop"] = preset.crop_weight * lsgan_loss(networks.crop(made.crops), 1)
        if made.differences is not None:
            losses["g_difference"] = preset.difference_weight * lsgan_loss(networks.difference(made.differences), 1)
    if preset.outside_weight > 0:
        allowed = F.adaptive_avg_pool2d(F.max_pool2d(batch.masks, 5, 1, 2), made.difference.shape[-1])
        losses["g_outside"] = preset.outside_weight * gan_losses.outside_loss(made.difference, allowed)
    # Of all processes' images together.
    if preset.level_weight > 0:
        both = (part.gather(x, fabric) for x in (made.pyramid[-1], real))
        losses["g_level"] = preset.level_weight * gan_losses.level_loss(*both, generator=generator)
    if preset.contrast_weight > 0 and made.differences is not None:
        both = (part.gather(x, fabric) for x in (mean_inside(made.difference, batch.masks), batch.contrasts))
        losses["g_contrast"] = preset.contrast_weight * gan_losses.spread_loss(*both)
    return losses
