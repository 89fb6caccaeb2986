"""Training of the class-conditional baselines of Table 1: DCGAN, PGGAN, attention cGAN (METHOD 7).

Each by its own authors' losses: logistic for DCGAN; Wasserstein with gradient penalty and an auxiliary classifier for
PGGAN, fading in one size after the other; eq. 3 and 4 of the source, on classes, for the attention cGAN. Common to all,
so that they can be compared with our CARIM-cGAN: the films, the batch, DiffAugment (a number of the preset), a moving
average of the weights, and the count of real images shown. Everything random is keyed by (seed, images seen).
Departures: PGGAN's Adam goes on when a size is added, and its class joins the noise after the norm.
"""

import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.common.labelled import scaled
from train.common.run import PATIENCE, Run, RunError, TrainingError, folder_whole, git_commit, write_whole
from train.gan.batch import Films, read_films
from train.gan.diffaugment import DiffAugment
from train.gan.losses import discriminator_loss, generator_loss
from train.gan.networks import frozen, move_average, moving_average, statistics_anew
from train.reproduction.baselines.attention import AttentionDiscriminator
from train.reproduction.baselines.dcgan import DCGANDiscriminator
from train.reproduction.baselines.pggan import ProgressiveDiscriminator
from train.reproduction.baselines.source import ClassGenerator, ClassGeneratorConfig


@dataclass(frozen=True)
class ClassGANPreset:
    """Numbers of one baseline's training.

    Attributes:
        config: of the generator; the discriminators have its widths.
        images: real images to show in all.
        batch: images a step: half nodule, half normal; of DCGAN, all of one class, by turns.
        learning_rate: Adam's, for all networks.
        betas: Adam's.
        augment: DiffAugment on real and generated images.
        grow_images: PGGAN: images of each size, the first half of them fading it in; the last size takes the rest.
        discriminator_width: attention: maps after the first convolution.
        discriminator_channels: attention: most maps of a trunk.
        discriminator_norm: attention: batch norm in the discriminators, and trunks that grow with the image.
        condition_dim: attention: length of the class embedding in the conditional head.
        ema_images: half-life of the moving average of the weights, in images.
        snapshot_images: a picture, an export and a checkpoint every so many images.
        log_images: a line of the log every so many images.
    """

    config: ClassGeneratorConfig
    images: int
    batch: int = 16
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    augment: bool = True
    grow_images: int = 1_200
    discriminator_width: int = 32
    discriminator_channels: int = 256
    discriminator_norm: bool = False
    condition_dim: int = 32
    ema_images: int = 3_000
    snapshot_images: int = 4_000
    log_images: int = 320

    def numbers(self) -> dict[str, Any]:
        """Gives those that fix a run, as plain JSON types: it may be prolonged, and told of more often."""
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in told.items() if k not in ("images", "log_images")}


class Rivals(nn.Module):
    """Generators, their moving average, and discriminators of one baseline."""

    def __init__(self, preset: ClassGANPreset) -> None:
        """Makes untrained networks."""
        super().__init__()
        config = preset.config
        self.generators = config.networks()
        self.average = moving_average(self.generators, half_life=preset.ema_images / preset.batch)
        widths = {"width": config.width, "most": config.most}
        if config.kind == "dcgan":
            self.judges = nn.ModuleList(DCGANDiscriminator(config.image_size, **widths) for _ in range(2))
        elif config.kind == "pggan":
            self.judges = nn.ModuleList([ProgressiveDiscriminator(config.image_size, **widths)])
        else:
            branches = ARCHITECTURES[config.architecture].branches
            self.judges = nn.ModuleList(
                AttentionDiscriminator(
                    config.image_size >> (branches - 1 - branch),
                    width=preset.discriminator_width,
                    max_channels=preset.discriminator_channels,
                    condition_dim=preset.condition_dim,
                    batch_norm=preset.discriminator_norm,
                    grow=preset.discriminator_norm,
                )
                for branch in range(branches)
            )


@dataclass
class Round:
    """What one update is about.

    Attributes:
        real: (B, 1, S, S) in [-1, 1].
        classes: (B,) int64, 0 normal, 1 nodule.
        noise: (B, noise_dim).
        change: DiffAugment of the batch, or None.
        step: PGGAN: the size, 4 * 2 ** step.
        alpha: PGGAN: how far it is faded in.
        mix: PGGAN: (B, 1, 1, 1) in [0, 1], where between real and generated the slope is held to 1.
    """

    real: Tensor
    classes: Tensor
    noise: Tensor
    change: DiffAugment | None
    step: int
    alpha: float
    mix: Tensor

    def changed(self, images: Tensor) -> Tensor:
        """Gives images as the discriminators see them."""
        return images if self.change is None else self.change(images)


def draw_round(films: Films, preset: ClassGANPreset, *, seed: int, images_seen: int) -> Round:
    """Gives the round that comes after `images_seen` images, a pure function of its arguments."""
    stream, device, batch = torch.Generator().manual_seed(fold(seed, images_seen, 8)), films.normal.device, preset.batch
    if preset.config.kind == "dcgan":
        classes = torch.full((batch,), images_seen // batch % 2)
    else:
        classes = (torch.arange(batch) < batch // 2).long()
    parts = []
    for source, n in ((films.nodule, int(classes.sum())), (films.normal, batch - int(classes.sum()))):
        parts.append(source[torch.randint(len(source), (n,), generator=stream).to(device)])
    noise = torch.randn(batch, preset.config.noise_dim, generator=stream)
    change = DiffAugment.draw(batch, generator=stream).to(device) if preset.augment else None
    mix = torch.rand(batch, 1, 1, 1, generator=stream)
    step, alpha = grown(preset, images_seen)
    return Round(scaled(torch.cat(parts)), classes.to(device), noise.to(device), change, step, alpha, mix.to(device))


def grown(preset: ClassGANPreset, images_seen: int) -> tuple[int, float]:
    """Gives the size (4 * 2 ** step) that PGGAN has grown to, and how far it is faded in, in (0, 1]."""
    last = preset.config.image_size.bit_length() - 3
    step = min(images_seen // preset.grow_images, last)
    if step == 0:
        return 0, 1.0
    into = images_seen - step * preset.grow_images + preset.batch
    return step, min(1.0, 2 * into / preset.grow_images)


def judging_losses(rivals: Rivals, kind: str, now: Round, made: list[Tensor]) -> dict[str, Tensor]:
    """Gives the discriminators' losses on real images and what was made for the same classes."""
    if kind == "dcgan":
        judge = rivals.judges[int(now.classes[0])]
        real, fake = judge(now.changed(now.real)).float(), judge(now.changed(made[0])).float()
        return {"d": F.softplus(-real).mean() + F.softplus(fake).mean()}
    if kind == "pggan":
        judge = rivals.judges[0]
        real_images, fake_images = now.changed(shrunk(now)), now.changed(made[0].float())
        real, named = judge(real_images, alpha=now.alpha)
        fake, misnamed = judge(fake_images, alpha=now.alpha)
        with torch.autocast(now.real.device.type, enabled=False):
            between = (now.mix * real_images + (1 - now.mix) * fake_images).requires_grad_()
            scores = judge(between, alpha=now.alpha)[0].sum()
            (slope,) = torch.autograd.grad(scores, between, create_graph=True)
        return {
            "d": fake.mean() - real.mean() + 1e-3 * real.square().mean(),
            "slope": 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean(),
            "d_class": F.cross_entropy(named, now.classes) + F.cross_entropy(misnamed, now.classes),
        }
    losses = {}
    for judge, images in zip(rivals.judges, made, strict=True):
        side = images.shape[-1]
        features = judge.features(now.changed(F.adaptive_avg_pool2d(now.real, side)))
        real = judge.judge(features, now.classes)
        fake = judge(now.changed(images), now.classes)
        losses[f"d_{side}"] = discriminator_loss(real, fake, judge.judge(features, 1 - now.classes)[1])
    return losses


def drawing_losses(rivals: Rivals, kind: str, now: Round, made: list[Tensor]) -> dict[str, Tensor]:
    """Gives the generator's losses."""
    if kind == "dcgan":
        return {"g": F.softplus(-rivals.judges[int(now.classes[0])](now.changed(made[0])).float()).mean()}
    if kind == "pggan":
        scores, named = rivals.judges[0](now.changed(made[0]), alpha=now.alpha)
        return {"g": -scores.mean(), "g_class": F.cross_entropy(named, now.classes)}
    pairs = zip(rivals.judges, made, strict=True)
    return {f"g_{images.shape[-1]}": generator_loss(judge(now.changed(images), now.classes)) for judge, images in pairs}


def shrunk(now: Round) -> Tensor:
    """Gives the real images at the size that PGGAN has grown to, the newest detail as far as it is faded in."""
    images = F.adaptive_avg_pool2d(now.real, 4 * 2**now.step)
    if now.step and now.alpha < 1:
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
        images = coarse + now.alpha * (images - coarse)
    return images


def made_for(generators: nn.ModuleList, kind: str, now: Round) -> list[Tensor]:
    """Gives generated images for a round's noise and classes: those of all scales of the attention cGAN, else one."""
    if kind == "dcgan":
        return [generators[int(now.classes[0])](now.noise)]
    if kind == "pggan":
        return [generators[0](now.noise, now.classes, step=now.step, alpha=now.alpha)]
    return generators[0].pyramid(now.noise, now.classes)  # type: ignore[operator]


def update(
    rivals: Rivals, optimizers: dict[str, torch.optim.Optimizer], kind: str, now: Round, *, bf16: bool
) -> tuple[dict[str, Tensor], bool]:
    """Does one update, discriminators and then generator; gives the losses, and False if one was not finite."""
    losses, fine = {}, True
    for name, networks in (("judges", rivals.generators), ("generators", rivals.judges)):
        with frozen(list(networks)), torch.autocast(now.real.device.type, torch.bfloat16, enabled=bf16):
            if name == "judges":
                with torch.no_grad():
                    made = made_for(rivals.generators, kind, now)
                parts = judging_losses(rivals, kind, now, made)
            else:
                parts = drawing_losses(rivals, kind, now, made_for(rivals.generators, kind, now))
        optimizers[name].zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        slopes = [p.grad for group in optimizers[name].param_groups for p in group["params"] if p.grad is not None]
        losses |= {k: v.detach() for k, v in parts.items()}
        if not math.isfinite(float(get_total_norm(slopes))):
            fine = False
            continue
        optimizers[name].step()
    move_average(rivals.average, rivals.generators)
    return losses, fine


def exported(rivals: Rivals, preset: ClassGANPreset, *, seed: int) -> ClassGenerator:
    """Gives the averaged generators with batch norm statistics of their own."""
    config, networks = preset.config, preset.config.networks()
    networks.load_state_dict(rivals.average.module.state_dict())
    stream = torch.Generator().manual_seed(fold(seed, 3))
    with statistics_anew(networks):
        for i in range(60):
            noise = torch.randn(preset.batch, config.noise_dim, generator=stream)
            classes = torch.full((preset.batch,), i % 2) if config.kind == "dcgan" else torch.arange(preset.batch) % 2
            last = config.image_size.bit_length() - 3
            made_for(networks, config.kind, Round(noise, classes, noise, None, last, 1.0, noise))
    return ClassGenerator(config, networks)


def train_class_gan(
    preset: ClassGANPreset,
    *,
    data: str | Path,
    out: str | Path,
    seed: int = 0,
    minutes: float = math.inf,
    data_name: str = "",
    device: str = "cpu",
    precision: str = "bf16-mixed",
    prior: LocationPrior | None = None,
) -> Path:
    """Trains one baseline, or goes on with it, and writes the averaged generator; gives its folder.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with a train split.
        out: the run's folder.
        seed: of everything random.
        minutes: stop after so long (the same command goes on later).
        data_name: what the data are called in the weights; the folder's name by default.
        device: "cpu" or "cuda".
        precision: "bf16-mixed" or "32-true".
        prior: goes beside the weights; the bundled one by default.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite.
    """
    kind, size, where = preset.config.kind, preset.config.image_size, torch.device(device)
    if preset.batch < 4 or preset.batch % 2:
        raise RunError(f"preset.batch must be even and at least 4, got {preset.batch}")
    recipe = {"preset": preset.numbers(), "seed": seed, "data": data_name or Path(data).name, "precision": precision}
    run = Run(out, recipe, begin=False)
    films = read_films(data, size).to(where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed))
        rivals = Rivals(preset)
    rivals.to(where, memory_format=torch.channels_last)
    optimizers = {
        "generators": torch.optim.Adam(rivals.generators.parameters(), preset.learning_rate, preset.betas),
        "judges": torch.optim.Adam(rivals.judges.parameters(), preset.learning_rate, preset.betas),
    }
    state, seen = run.load(), 0
    if state is not None:
        seen = state["images_seen"]
        rivals.load_state_dict(state["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    run.begin()
    run.rewind(seen)
    run.event("started", images=seen, device=str(where))
    if seen >= preset.images and (run.folder / "export").exists():
        return run.folder / "export"

    def snapshot() -> None:
        generator = exported(rivals, preset, seed=seed)
        noise = torch.randn(8, generator.noise_dim, generator=torch.Generator().manual_seed(fold(seed, 1)))
        with torch.no_grad():
            sheet = torch.cat([generator.images(noise, torch.full((8,), c)) for c in (0, 1)])
        file = io.BytesIO()
        save_image(make_grid(sheet, nrow=8, normalize=True, value_range=(-1, 1)), file, format="png")
        write_whole(run.folder / f"samples-{seen:09d}.png", file.getbuffer())
        facts = {
            "training_data": f"{recipe['data']}, train split: {len(films.normal)} normal films, {len(films.nodule)} "
            "with a nodule",
            "recipe": {**recipe, "images_seen": seen},
            "git_commit": git_commit(),
        }
        with folder_whole(run.folder, "export") as folder:
            generator.save_pretrained(folder, prior=prior or LocationPrior.bundled(), **facts)
        kept = {"networks": rivals.state_dict(), "optimizers": {k: o.state_dict() for k, o in optimizers.items()}}
        run.save({**kept, "images_seen": seen}, seen)

    # Draw, update, log, snapshot.
    rivals.train()
    row, started, first = 0, time.monotonic(), seen
    bf16 = precision == "bf16-mixed"
    with tqdm(total=preset.images, initial=seen, unit="image", desc=kind) as bar:
        while seen < preset.images and time.monotonic() - started < 60 * minutes:
            now = draw_round(films, preset, seed=seed, images_seen=seen)
            losses, fine = update(rivals, optimizers, kind, now, bf16=bf16)
            row = 0 if fine else row + 1
            if row >= PATIENCE:
                raise TrainingError(f"losses not finite in {row} updates in a row, after {seen} images: {losses}")
            seen += preset.batch
            bar.update(preset.batch)
            if seen % preset.log_images < preset.batch:
                speed = (seen - first) / (time.monotonic() - started)
                told = {k: float(f"{float(v):.4g}") for k, v in losses.items()}
                run.log(images=seen, size=4 * 2**now.step if kind == "pggan" else size, images_per_s=speed, **told)
            if seen % preset.snapshot_images < preset.batch and seen < preset.images:
                snapshot()
    snapshot()
    run.close()
    return run.folder / "export"
