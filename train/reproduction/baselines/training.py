"""Training of the five models of Table 1 of Ann (2021): data, update, EMA, log, snapshot.

Common to all, so that they can be compared with our CARIM-cGAN: the images, the batch, DiffAugment (a number of the
preset), a moving average of the weights, and the count of real images shown. Everything random is keyed by (seed,
images seen).
"""

import io
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import make_grid, save_image

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.precision import compute_dtype
from carim_aug.ops.random import fold
from train.common.distributed import resolve_precision
from train.common.images import read_images
from train.common.loop import Loop
from train.common.run import Run, RunError, TrainingError, folder_whole, git_commit, write_whole
from train.gan.networks import fresh_statistics
from train.gan.training import read_first_stage, train_gan
from train.reproduction.baselines.presets import MODELS, BaselinePreset, Table1Preset
from train.reproduction.baselines.source import ClassGenerator, ClassNetworks
from train.reproduction.baselines.step import BaselineGAN, draw_batch, train_step

STAGE1 = "carim-stage1"


def train_baseline(
    preset: BaselinePreset,
    *,
    data: str | Path,
    out: str | Path,
    seed: int = 0,
    minutes: float = math.inf,
    data_name: str = "",
    device: str = "cpu",
    precision: str = "auto",
) -> Path:
    """Train one class-conditional baseline, or go on with it, write the averaged generator, and return its folder.

    The data are ChestX-ray14's layout with a train split; the weights call them `data_name`, by default the folder's
    name. A run that ends after so many minutes goes on when it is called again.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite, or nothing can be saved any more.
    """
    size = preset.config.image_size
    if preset.batch < 4 or preset.batch % 2:
        raise RunError(f"preset.batch must be even and at least 4, got {preset.batch}")
    precision = resolve_precision(precision, device)
    recipe = {"preset": preset.numbers(), "seed": seed, "data": data_name or Path(data).name, "precision": precision}
    run = Run(out, recipe, begin=False)

    # Data.
    unreadable: list[str] = []
    images = read_images(data, "train", size, only_normal_or_nodule=True, unreadable=unreadable).to(device)
    images.check(f"{data}: the train split", normal=1, nodule=1)

    # Networks, optimizers, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed))
        gan = BaselineGAN(preset)
    gan.to(device).to(memory_format=torch.channels_last).train()
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam(getattr(gan, name).parameters(), preset.learning_rate, preset.betas)
        for name in ("generators", "discriminators")
    }
    state = run.load() or {}
    if state:
        gan.load_state_dict(state["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    progress = {name: state.get(name, 0) for name in ("images_seen", "skipped")}
    run.start(progress["images_seen"], unreadable, device=device)
    saved = progress["images_seen"] if (run.folder / "export").exists() else -1
    numbers: dict[str, Any] = {"images": preset.images, "batch": preset.batch, "log_images": preset.log_images}
    loop = Loop(run, name=preset.kind, minutes=minutes, **numbers, **progress)

    def snapshot() -> None:
        nonlocal saved
        generator = export(gan, preset, seed=seed)
        write_samples(generator, run.folder / f"samples-{loop.images_seen:09d}.png", seed=seed)
        counts = f"{len(images.normal)} normal images, {len(images.nodule)} with a nodule"
        facts = {"training_data": f"{recipe['data']}, train split: {counts}", "git_commit": git_commit()}
        with folder_whole(run.folder, "export") as folder:
            now: dict[str, Any] = {**recipe, "images_seen": loop.images_seen}
            generator.save_pretrained(folder, prior=LocationPrior.bundled(), recipe=now, **facts)
        states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        done = {"images_seen": loop.images_seen, "skipped": loop.skipped}
        run.save({"networks": gan.state_dict(), "optimizers": states, **done}, loop.images_seen)
        saved = loop.images_seen

    dtype = compute_dtype("bfloat16" if precision == "bf16-mixed" else "float32", device)
    for seen in loop:
        batch = draw_batch(images, preset, seed=seed, images_seen=seen)
        losses, finite = train_step(gan, optimizers, batch, dtype=dtype)
        loop.update(losses, finite, size=4 * 2**batch.step if preset.kind == "pggan" else size)
        if loop.due(preset.snapshot_images):
            loop.try_save(snapshot)
    if saved != loop.images_seen:  # no step was left, or the last snapshot failed
        loop.try_save(snapshot)
    loop.close()
    return run.folder / "export"


def export(gan: BaselineGAN, preset: BaselinePreset, *, seed: int) -> ClassGenerator:
    """Return the averaged generators with batch norm statistics of their own, on the CPU."""
    networks, device = ClassNetworks(preset.config), next(gan.parameters()).device
    networks.load_state_dict(gan.average.module.state_dict())
    generator = torch.Generator().manual_seed(fold(seed, 3))
    with fresh_statistics(networks.to(device)):
        for i in range(preset.statistics_batches):
            noise = torch.randn(preset.batch, preset.config.backbone.noise_dim, generator=generator).to(device)
            of_one = torch.full((preset.batch,), i % 2)
            classes = of_one if preset.kind == "dcgan" else torch.arange(preset.batch) % 2
            networks(noise, classes.to(device))
    return ClassGenerator(networks.cpu())


def write_samples(generator: ClassGenerator, path: Path, *, seed: int) -> None:
    """Write a picture of 8 normal and 8 nodule images of the same noise."""
    seeds = [fold(seed, 1, i) for i in range(8)] * 2
    file, grid = io.BytesIO(), generator.class_images(torch.arange(16) >= 8, seeds)
    save_image(make_grid(grid, nrow=8, normalize=True, value_range=(-1, 1)), file, format="png")
    write_whole(path, file.getbuffer())


def train_model(
    name: str,
    preset: Table1Preset,
    *,
    out: str | Path,
    ct_nodules: str | Path | None,
    classifier: str | Path | None,
    minutes: float = math.inf,
    **common: Any,
) -> Path:
    """Train one model of `MODELS`, or go on with it, in a folder of its name, and return the folder of its weights.

    The CARIM-cGAN is `train.gan.training`'s, with these CT nodules and the file of the CARIM loss's classifier; all
    others and `common` are `train_baseline`'s. TrainingError: too few minutes for the stage that another starts from.
    """
    out, started = Path(out), time.monotonic()
    if name in preset.baselines:
        return train_baseline(preset.baselines[name], out=out / name, minutes=minutes, **common)
    if name not in MODELS:
        raise RunError(f"models must be of {list(MODELS)}, got {name!r}")
    if name == "carim" and classifier is None:
        raise RunError("classifier must be given for the CARIM loss (--classifier FILE of train.classifier), got None")
    begun = out / STAGE1
    train_gan(preset.stage1, out=begun, ct_nodules=ct_nodules, minutes=minutes, **common)
    shown = read_first_stage(begun, preset.stage1)["images_seen"]
    if shown < preset.stage1.images:
        raise TrainingError(f"{begun} was shown {shown} of {preset.stage1.images} images: give it more --minutes")
    common |= {"ct_nodules": ct_nodules, "minutes": minutes - (time.monotonic() - started) / 60}
    if name == "carim":
        return train_gan(preset.stage2, out=out / name, start=begun, classifier=classifier, **common)
    if not (out / name).exists():
        shutil.copytree(begun, out / f"{name}.partial", dirs_exist_ok=True)
        (out / f"{name}.partial").rename(out / name)
    return train_gan(replace(preset.stage1, images=preset.stage2.images), out=out / name, **common)
