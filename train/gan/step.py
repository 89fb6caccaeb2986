"""One update of the GAN: all discriminators, then the generator (METHOD 3, 4 and 6).

An update whose gradient is not finite is not made: the networks stay as they were before it, and its losses say why.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm, parametrize

from carim_aug.generators.multiscale import MultiScaleGenerator
from train.common.distributed import Part
from train.gan.adversarial import Comparison, drawing_loss, judging_loss
from train.gan.batch import Batch, crop_at, difference_maps, mean_inside
from train.gan.diffaugment import DiffAugment
from train.gan.influence import Influence, gradient_ratio
from train.gan.losses import level_loss, lsgan_fake, lsgan_real, outside_loss, spread_loss
from train.gan.networks import Networks, frozen
from train.gan.presets import GANPreset


class Drawing(nn.Module):
    """The generator's pyramid as a forward pass."""

    def __init__(self, generator: MultiScaleGenerator) -> None:
        """Wraps the generator."""
        super().__init__()
        self.generator = generator

    def forward(self, noise: Tensor, masks: Tensor, scales: int) -> list[Tensor]:
        """Gives images of the first scales; see `MultiScaleGenerator.pyramid`."""
        return self.generator.pyramid(noise, masks, scales=scales)


@dataclass
class Wrapped:
    """One run's networks and optimizers as Fabric wraps them, each by itself: what a backward goes through.

    Attributes:
        fabric: devices and precision.
        networks: the networks themselves.
        draw: of the generator.
        compare: of each scale's discriminator.
        crop: discriminator of (image, mask) crops.
        difference: discriminator of crops of differences.
        optimizers: "generator" and "discriminators".
        part: of a batch that is this process's.
        anchor: the generator as it was when the run started, or None.
    """

    fabric: Fabric
    networks: Networks
    draw: Any
    compare: list[Any]
    crop: Any
    difference: Any
    optimizers: dict[str, Any]
    part: Part
    anchor: MultiScaleGenerator | None = None

    @classmethod
    def setup(
        cls, fabric: Fabric, networks: Networks, preset: GANPreset, anchor: MultiScaleGenerator | None = None
    ) -> "Wrapped":
        """Wraps networks that hold their starting values, and makes the optimizers; moves to the device."""
        if anchor is not None:
            # In training mode, as the generator is: the same batch statistics give the same films.
            anchor = anchor.to(fabric.device, memory_format=torch.channels_last).requires_grad_(False).train()
        networks.to(fabric.device, memory_format=torch.channels_last)
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(networks)
        judges = [p for d in networks.discriminators() for p in d.parameters()]
        optimizers = {
            "generator": torch.optim.Adam(networks.generator.parameters(), preset.learning_rate, preset.betas),
            "discriminators": torch.optim.Adam(judges, preset.learning_rate, preset.betas),
        }
        together = not preset.discriminator_norm
        return cls(
            fabric,
            networks,
            fabric.setup_module(Drawing(networks.generator)),
            [fabric.setup_module(Comparison(d, together=together)) for d in networks.scales],
            fabric.setup_module(networks.crop),
            fabric.setup_module(networks.difference),
            {name: fabric.setup_optimizers(optimizer) for name, optimizer in optimizers.items()},
            Part(fabric.global_rank, fabric.world_size),
            anchor,
        )


@dataclass(frozen=True)
class Asked:
    """What one step does besides the usual.

    Attributes:
        scales: branches that train now.
        influence: the CARIM loss, where this step has it.
        measure: also give the ratio of its gradient's norm to the adversarial one's, at the last scale's images.
        penalise: R1, where the preset has it.
        warming: the discriminators alone learn.
    """

    scales: int
    influence: Influence | None = None
    measure: bool = False
    penalise: bool = False
    warming: bool = False


@dataclass(frozen=True)
class Generated:
    """Generated images of one step.

    Attributes:
        pyramid: (B, 1, s, s) each, smallest first: with the mask (the nodule half), then without.
        difference: (P, 1, S, S) of matched pairs, with minus without; None where a batch has no masks.
        crops: (2P, 2, c, c) of (image, mask), or None.
        differences: (P, 3, c, c), see `difference_maps`, or None.
        anchored: (B, 1, s, s) each, what the anchor gives for the same noise and masks, or None.
    """

    pyramid: list[Tensor]
    difference: Tensor | None
    crops: Tensor | None
    differences: Tensor | None
    anchored: list[Tensor] | None = None


def train_step(
    wrapped: Wrapped, batch: Batch, preset: GANPreset, asked: Asked, *, generator: torch.Generator
) -> tuple[dict[str, Tensor], bool]:
    """Does one update of all discriminators and of the generator.

    Args:
        wrapped: changed in place.
        batch: real films and requests, of all processes.
        preset: weights of the terms.
        asked: what the step does.
        generator: random stream of the augmentation, on CPU; the same in all processes.

    Returns:
        The losses, scalars without gradient, and whether all updates were made: False if one was not finite.
    """
    fabric, networks = wrapped.fabric, wrapped.networks
    batch, total = wrapped.part.batch(batch), len(batch.images)
    before = Buffers([networks.generator, *networks.discriminators()])
    sizes = [d.image_size for d in networks.scales][: asked.scales]
    last = networks.generator.image_size
    reals = [batch.images if s == last else F.adaptive_avg_pool2d(batch.images, s) for s in sizes]

    def augmented(*pyramids: list[Tensor]) -> list[list[Tensor]]:
        if not preset.augment:
            return list(pyramids)
        changes = [DiffAugment.draw(total, generator=generator) for _ in pyramids]
        changes = [wrapped.part.changes(change).to(fabric.device) for change in changes]
        return [[change(x) for x in pyramid] for change, pyramid in zip(changes, pyramids, strict=True)]

    # Generate, then update D on real, mismatched and generated images.
    with torch.set_grad_enabled(not asked.warming):
        made = generate(wrapped, batch, preset, asked.scales, total=total, generator=generator)
    shown, fakes = augmented(reals, [x.detach() for x in made.pyramid])
    losses = judging_losses(wrapped, batch, preset, asked, shown=shown, fakes=fakes, made=made)
    if not descend(fabric, wrapped.optimizers["discriminators"], losses, wrapped.part):
        before.restore()
        return {k: v.detach() for k, v in losses.items()}, False
    if asked.warming:
        return {k: v.detach() for k, v in losses.items()}, True

    # Update G.
    shown, fakes = augmented(reals, made.pyramid) if preset.relativistic else (reals, *augmented(made.pyramid))
    drawn = drawing_losses(wrapped, batch, preset, asked, shown=shown, fakes=fakes, made=made)
    told = {k: v for k, v in drawn.items() if k in ("dead", "carim_ratio")}
    drawn = {k: v for k, v in drawn.items() if k not in told}
    if preset.level_weight > 0:
        both = (wrapped.part.gathered(x, fabric) for x in (made.pyramid[-1], reals[-1]))
        drawn["g_level"] = preset.level_weight * level_loss(*both, generator=generator)
    if preset.contrast_weight > 0 and made.differences is not None:
        both = (wrapped.part.gathered(x, fabric) for x in (mean_inside(made.difference, batch.masks), batch.contrasts))
        drawn["g_contrast"] = preset.contrast_weight * spread_loss(*both)
    done = descend(fabric, wrapped.optimizers["generator"], drawn, wrapped.part)
    if done:
        networks.update_average()
    else:
        before.restore()
    if made.difference is not None:
        with torch.no_grad():
            told["contrast"] = mean_inside(made.difference, F.adaptive_avg_pool2d(batch.masks, sizes[-1])).mean()
    return {k: v.detach() for k, v in (losses | drawn | told).items()}, done


def generate(
    wrapped: Wrapped, batch: Batch, preset: GANPreset, scales: int, *, total: int, generator: torch.Generator
) -> Generated:
    """Generates matched pairs: the same noise with the mask (nodule half) and without (normal half)."""
    paired = len(batch.noise) < len(batch.images)  # else a batch of normal images alone
    noise = torch.cat([batch.noise, batch.noise]) if paired else batch.noise
    masks = torch.cat([batch.masks, torch.zeros_like(batch.masks)]) if paired else batch.masks
    with wrapped.fabric.autocast(), parametrize.cached():
        pyramid = [x.float().view_as(x) for x in wrapped.draw(noise, masks, scales)]
    anchored = None
    if wrapped.anchor is not None and preset.anchor_weight > 0:
        with torch.no_grad(), wrapped.fabric.autocast(), parametrize.cached():
            anchored = [x.float() for x in wrapped.anchor.pyramid(noise, masks, scales=scales)]
    if not paired:
        return Generated(pyramid, None, None, None, anchored)
    with_mask, without = pyramid[-1].chunk(2)
    difference = with_mask - without
    config = wrapped.networks.generator.config
    if scales < config.branches or not len(batch.crops) or preset.crop_weight + preset.difference_weight <= 0:
        return Generated(pyramid, difference, None, None, anchored)
    crop, empty = config.image_size // 4, torch.zeros_like(batch.masks)
    jitter = (torch.rand(total // 2, 2, generator=generator) - 0.5) * crop / 3
    pairs = torch.cat([with_mask, batch.masks, without, empty, difference_maps(difference, batch.masks)], 1)
    pairs = crop_at(pairs, batch.boxes, crop, wrapped.part.of(jitter).to(pairs.device))
    crops = torch.cat([pairs[:, 0:2], pairs[:, 2:4]])
    return Generated(pyramid, difference, crops, pairs[:, 4:] if len(batch.differences) else None, anchored)


def judging_losses(
    wrapped: Wrapped,
    batch: Batch,
    preset: GANPreset,
    asked: Asked,
    *,
    shown: list[Tensor],
    fakes: list[Tensor],
    made: Generated,
) -> dict[str, Tensor]:
    """Gives the discriminators' losses, one forward pass each."""
    losses: dict[str, Tensor] = {}
    penalise = asked.penalise and preset.r1_weight > 0
    with wrapped.fabric.autocast(), parametrize.cached():
        for compare, real, fake in zip(wrapped.compare if preset.film_weight > 0 else (), shown, fakes, strict=False):
            scores, size = compare(real, fake, batch.classes, penalise), real.shape[-1]
            losses[f"d{size}"] = judging_loss(scores, relativistic=preset.relativistic)
            if penalise:
                losses[f"r1_{size}"] = preset.r1_weight * preset.r1_every * scores.penalty
        for name, judge, real, fake in (
            ("d_crop", wrapped.crop, batch.crops, made.crops),
            ("d_difference", wrapped.difference, batch.differences, made.differences),
        ):
            if fake is not None:
                scores = judge(torch.cat([real, fake.detach()]))
                losses[name] = lsgan_real(scores[: len(real)]) + lsgan_fake(scores[len(real) :])
    return losses


def drawing_losses(
    wrapped: Wrapped,
    batch: Batch,
    preset: GANPreset,
    asked: Asked,
    *,
    shown: list[Tensor],
    fakes: list[Tensor],
    made: Generated,
) -> dict[str, Tensor]:
    """Gives the generator's losses: eq. 4 on every scale, the crops, nothing outside the mask, CARIM (eq. 6)."""
    networks, losses = wrapped.networks, dict[str, Tensor]()
    with frozen(networks.discriminators()), wrapped.fabric.autocast(), parametrize.cached():
        for d, real, fake in zip(networks.scales if preset.film_weight > 0 else (), shown, fakes, strict=False):
            with torch.no_grad():
                others = d(real, batch.classes) if preset.relativistic else None
            losses[f"g{d.image_size}"] = preset.film_weight * drawing_loss(d(fake, batch.classes), others)
        if made.crops is not None:
            losses["g_crop"] = preset.crop_weight * lsgan_real(networks.crop(made.crops))
        if made.differences is not None:
            losses["g_difference"] = preset.difference_weight * lsgan_real(networks.difference(made.differences))
    last = made.pyramid[-1]
    adversarial = losses.get(f"g{last.shape[-1]}", sum(losses.values()))
    if made.anchored is not None:
        # Films without a nodule: the second half of matched pairs, or all of a batch of normal films.
        halves = [(x.chunk(2)[-1], y.chunk(2)[-1]) for x, y in zip(made.pyramid, made.anchored, strict=True)]
        losses["g_anchor"] = preset.anchor_weight * sum((x - y).abs().mean() for x, y in halves)
    if preset.outside_weight > 0 and made.difference is not None:
        allowed = F.adaptive_avg_pool2d(F.max_pool2d(batch.masks, 5, 1, 2), last.shape[-1])
        losses["g_outside"] = preset.outside_weight * outside_loss(made.difference, allowed)
    if asked.influence is not None and made.difference is not None and last.shape[-1] == batch.masks.shape[-1]:
        with wrapped.fabric.autocast():
            losses["g_carim"], losses["dead"] = asked.influence.loss(last[: len(batch.masks)], batch.masks)
        if asked.measure:
            ratio = gradient_ratio(losses["g_carim"], adversarial, last)
            losses["carim_ratio"] = torch.tensor(ratio)
    return losses


def descend(fabric: Fabric, optimizer: Any, losses: dict[str, Tensor], part: Part) -> bool:
    """Does one update by the sum of the losses, in one backward; none, and False, if it is not finite anywhere."""
    optimizer.zero_grad(set_to_none=True)
    total = sum(losses.values(), torch.zeros((), device=fabric.device))
    fabric.backward(total)
    slopes = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    size = get_total_norm(slopes) + part.summed(total.detach(), fabric)
    if not math.isfinite(float(size)):
        return False
    optimizer.step()
    return True


class Buffers:
    """A copy of what forward passes move: batch norm's statistics and spectral norm's vectors."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Copies."""
        everything = [b for net in networks for b in net.buffers()]
        self.kinds = [[b for b in everything if b.is_floating_point() is kind] for kind in (True, False)]
        self.copies = [list(torch._foreach_add(kind, 0)) if kind else [] for kind in self.kinds]  # few kernels

    def restore(self) -> None:
        """Puts the copies back."""
        with torch.no_grad():
            for kind, copies in zip(self.kinds, self.copies, strict=True):
                for buffer, copy in zip(kind, copies, strict=True):
                    buffer.copy_(copy)
