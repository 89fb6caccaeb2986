"""The CARIM-cGAN: `python -m train.gan --preset fast128 --data FOLDER --out runs/fast128` (METHOD 6).

Stage 2 goes on from a run of stage 1: `... --start runs/fast128 --classifier FILE --out runs/stage2`. The same command
resumes. `--weights FOLDER` fine-tunes an exported generator on other films. Everything random is keyed by (seed,
images seen). Our extensions to the source, each a number of the preset: no batch norm in the discriminators,
DiffAugment, progressive branches, matched pairs in every batch (same noise with and without mask), discriminators of
crops at the mask, CT nodules superimposed on normal films, brightness held to that of real films.
"""

import argparse
import contextlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.utils import save_image
from tqdm import tqdm

from carim_aug.augment import DiffAugment
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.hub import NoduleGenerator
from carim_aug.keys import fold
from carim_aug.losses import (
    discriminator_loss,
    generator_loss,
    level_loss,
    lsgan_fake,
    lsgan_real,
    outside_loss,
)
from carim_aug.masks import boxes_to_masks
from carim_aug.models.classifier import ChestClassifier
from carim_aug.models.generator import ARCHITECTURES
from carim_aug.prior import LocationPrior
from train.films import DIFFERENCE_GAIN, Batch, Films, crop_at, draw_batch, read_films
from train.influence import Influence, gradient_ratio
from train.networks import Networks, frozen, retake_statistics
from train.presets import PRESETS, GANPreset
from train.run import Run, git_commit


def train_step(
    networks: Networks,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: Batch,
    preset: GANPreset,
    *,
    scales: int,
    generator: torch.Generator,
    autocast: contextlib.AbstractContextManager[Any],
    influence: Influence | None = None,
    measure: bool = False,
    warming: bool = False,
) -> dict[str, float]:
    """Does one update of all discriminators and of the generator; gives the losses.

    Args:
        networks: changed in place.
        optimizers: "generator" and "discriminators".
        batch: real films and requests.
        preset: weights of the terms.
        scales: branches that train now.
        generator: random stream of the augmentation, on CPU.
        autocast: precision of the networks.
        influence: the CARIM loss, where this step has it.
        measure: also give the ratio of its gradient's norm to the adversarial one's, at the last scale's images.
        warming: the discriminators alone learn.
    """
    config = ARCHITECTURES[preset.architecture]
    full, half = scales == config.branches, len(batch.noise)
    crop, device = config.image_size // 4, batch.images.device
    use_crops = full and len(batch.crops) > 0 and preset.crop_weight + preset.difference_weight > 0
    sizes = [d.image_size for d in networks.scales][:scales]
    reals = [batch.images if s == config.image_size else F.adaptive_avg_pool2d(batch.images, s) for s in sizes]

    def augmented(images: list[Tensor]) -> list[Tensor]:
        if not preset.augment:
            return images
        change = DiffAugment.draw(len(images[0]), generator=generator).to(device)
        return [change(x) for x in images]

    # Generate matched pairs: the same noise with the mask (nodule half) and without (normal half).
    noise = torch.cat([batch.noise, batch.noise])
    masks = torch.cat([batch.masks, torch.zeros_like(batch.masks)])
    with torch.set_grad_enabled(not warming), autocast, parametrize.cached():
        fakes = [x.float() for x in networks.generator.pyramid(noise, masks, scales=scales)]
    with_mask, without = fakes[-1].chunk(2)
    difference = with_mask - without
    if use_crops:
        jitter = ((torch.rand(half, 2, generator=generator) - 0.5) * crop / 3).to(device)
        pairs = torch.cat(
            [with_mask, batch.masks, without, torch.zeros_like(batch.masks), difference * DIFFERENCE_GAIN], 1
        )
        pairs = crop_at(pairs, batch.boxes, crop, jitter)
        fake_crops = torch.cat([pairs[:, 0:2], pairs[:, 2:4]])
        fake_differences = torch.cat([pairs[:, 4:5], pairs[:, 1:2]], dim=1)
    losses: dict[str, Tensor] = {}

    # Update D: real, mismatched and generated images through one trunk pass each scale (without batch norm in D).
    shown, made = augmented(reals), augmented([x.detach() for x in fakes])
    with autocast, parametrize.cached():
        for d, real, fake in zip(networks.scales, shown, made, strict=False):
            if preset.discriminator_norm:
                features, fake_features = d.features(real), d.features(fake)
            else:
                features, fake_features = d.features(torch.cat([real, fake])).chunk(2)
            losses[f"d{d.image_size}"] = discriminator_loss(
                d.judge(features, batch.classes),
                d.judge(fake_features, batch.classes),
                d.judge(features, 1 - batch.classes)[1],
            )
        if use_crops:
            scores = networks.crop(torch.cat([batch.crops, fake_crops.detach()]))
            n = len(batch.crops)
            losses["d_crop"] = lsgan_real(scores[:n]) + lsgan_fake(scores[n:])
            scores = networks.difference(torch.cat([batch.differences, fake_differences.detach()]))
            n = len(batch.differences)
            losses["d_difference"] = lsgan_real(scores[:n]) + lsgan_fake(scores[n:])
    optimizers["discriminators"].zero_grad(set_to_none=True)
    sum(losses.values(), torch.zeros((), device=device)).backward()
    optimizers["discriminators"].step()
    if warming:
        return {k: float(v.detach()) for k, v in losses.items()}

    # Update G: eq. 4 on every scale, then the crops, then nothing outside the mask, then the films' brightness.
    made = augmented(fakes)
    g_losses: dict[str, Tensor] = {}
    with frozen(networks.discriminators()), autocast, parametrize.cached():
        for d, fake in zip(networks.scales, made, strict=False):
            g_losses[f"g{d.image_size}"] = generator_loss(d(fake, batch.classes))
        if use_crops:
            g_losses["g_crop"] = preset.crop_weight * lsgan_real(networks.crop(fake_crops))
            g_losses["g_difference"] = preset.difference_weight * lsgan_real(networks.difference(fake_differences))
    if preset.outside_weight > 0:
        allowed = F.adaptive_avg_pool2d(F.max_pool2d(batch.masks, 5, 1, 2), sizes[-1])
        g_losses["g_outside"] = preset.outside_weight * outside_loss(difference, allowed)
    more: dict[str, float] = {}
    if influence is not None and full:
        with autocast:
            g_losses["g_carim"], dead = influence.loss(with_mask, batch.masks)
        more["dead"] = float(dead)
        if measure:
            more["carim_ratio"] = gradient_ratio(g_losses["g_carim"], g_losses[f"g{sizes[-1]}"], fakes[-1])
    if preset.level_weight > 0:
        g_losses["g_level"] = preset.level_weight * level_loss(fakes[-1], reals[-1], generator=generator)
    optimizers["generator"].zero_grad(set_to_none=True)
    sum(g_losses.values(), torch.zeros((), device=device)).backward()
    optimizers["generator"].step()
    networks.update_average()
    with torch.no_grad():
        inside = F.adaptive_avg_pool2d(batch.masks, sizes[-1])
        contrast = (difference * inside).sum() / inside.sum().clamp(min=1e-6)
    return {k: float(v.detach()) for k, v in (losses | g_losses | {"contrast": contrast}).items()} | more


def train_gan(
    preset: GANPreset,
    *,
    data: str | Path,
    ct_nodules: str | Path | None,
    out: str | Path,
    seed: int = 0,
    minutes: float = math.inf,
    data_name: str = "",
    note: str = "",
    device: str = "cpu",
    prior: LocationPrior | None = None,
    limit: int | None = None,
    start: str | Path | None = None,
    classifier: str | Path | None = None,
    weights: str | Path | None = None,
) -> Path:
    """Trains one stage, or goes on with it, and writes the averaged generator; gives its folder.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with a train split.
        ct_nodules: templates.npz, or None to train without superimposed nodules.
        out: the run's folder.
        seed: of everything random.
        minutes: stop after so long (the same command goes on later).
        data_name: what the data are called in the weights; the folder's name by default.
        note: kept in the recipe: what its numbers do not say.
        device: "cpu" or "cuda".
        prior: of the masks; the bundled one by default.
        limit: at most so many normal films (for trials).
        start: a run of stage 1 whose newest checkpoint stage 2 starts from.
        classifier: file of the frozen classifier of stage 2; see `ChestClassifier.load`.
        weights: an exported generator (folder or hub id) that stage 1 starts from, with all branches, in place of an
            untrained one; the discriminators start untrained and learn alone for `preset.warm_up` images.
    """
    if weights is not None and start is not None:
        raise ValueError(f"weights start stage 1 and start stage 2: give one of them, got {weights!r} and {start!r}")
    if (start is None) != (classifier is None):
        raise ValueError(f"start and classifier make stage 2 together, got {start!r} and {classifier!r}")
    where = torch.device(device)
    config = ARCHITECTURES[preset.architecture]
    trained = NoduleGenerator.from_pretrained(weights) if weights is not None else None
    if trained is not None and trained.config != config:
        raise ValueError(f"weights must be of the preset's architecture {config}, got {trained.config} in {weights}")
    if trained is not None:
        preset = replace(preset, grow_at=())
    numbers = {k: v for k, v in preset.to_dict().items() if k != "images"}  # a run may be prolonged
    recipe: dict[str, Any] = {
        "preset": numbers,
        "architecture": config.to_dict(),
        "seed": seed,
        "ct_nodules": ct_nodules is not None,
        "data": data_name or Path(data).name,
    }
    if note:
        recipe["note"] = note
    if trained is not None:
        recipe["weights"] = trained.weights_hash
    influence, begun = None, None
    if start is not None and classifier is not None:
        begun = newest_checkpoint(start, numbers)
        frozen_classifier = ChestClassifier.load(classifier).to(where)
        influence = Influence(frozen_classifier, preset.carim_weight, preset.carim_form, preset.carim_every)
        recipe["stage_2_from"] = begun["images_seen"]
    run = Run(out, recipe)
    prior = prior or LocationPrior.bundled()
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    films = read_films(data, config.image_size, limit=limit).to(where)

    # Networks, optimizers, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed))
        networks = Networks(preset)
    if trained is not None:
        networks.start_from(trained)
    networks = networks.to(where, memory_format=torch.channels_last)
    judges = [p for d in networks.discriminators() for p in d.parameters()]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": torch.optim.Adam(networks.generator.parameters(), preset.learning_rate, preset.betas),
        "discriminators": torch.optim.Adam(judges, preset.learning_rate, preset.betas),
    }
    images_seen = 0
    if (state := run.load() or begun) is not None:
        images_seen = state["images_seen"]
        networks.load_state_dict(state["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    # The same 8 noises and masks in every picture.
    fixed = torch.Generator().manual_seed(fold(seed, 1))
    fixed_noise = torch.randn(8, config.noise_dim, generator=fixed).to(where)
    fixed_boxes = prior.sample(8, generator=fixed, image_size=config.image_size).boxes
    fixed_masks = boxes_to_masks(fixed_boxes, config.image_size).to(where)

    def snapshot() -> Path:
        state = {
            "images_seen": images_seen,
            "networks": networks.state_dict(),
            "optimizers": {k: o.state_dict() for k, o in optimizers.items()},
        }
        run.save(state, images_seen)
        averaged = networks.average.module.eval()
        with torch.no_grad():
            nodule = averaged.pyramid(fixed_noise, fixed_masks, scales=scales)[-1]
            normal = averaged.pyramid(fixed_noise, torch.zeros_like(fixed_masks), scales=scales)[-1]
        masks = F.adaptive_avg_pool2d(fixed_masks, nodule.shape[-1]) * 2 - 1
        sheet = torch.cat([normal, nodule, ((nodule - normal) * 4).clamp(-1, 1), masks])
        save_image(sheet, run.folder / f"samples-{images_seen:09d}.png", nrow=8, normalize=True, value_range=(-1, 1))
        return export(networks, preset, run, films, prior, images_seen)

    autocast = torch.autocast(where.type, torch.bfloat16)
    started, last_log, first = time.monotonic(), 0.0, images_seen
    measured = -math.inf
    carim: dict[str, float] = {}  # as last taken: not every step has it
    networks.train()
    scales = config.branches
    with tqdm(total=preset.images, initial=images_seen, unit="image", desc=preset.architecture) as bar:
        while images_seen < preset.images and time.monotonic() - started < 60 * minutes:
            grown = sum(images_seen >= at for at in preset.grow_at)
            scales = config.branches - len(preset.grow_at) + grown
            batch = draw_batch(films, prior, ct, preset, seed=seed, images_seen=images_seen)
            stream = torch.Generator().manual_seed(fold(seed, images_seen, 2))
            asked = influence is not None and (images_seen // preset.batch) % influence.every == 0
            losses = train_step(
                networks,
                optimizers,
                batch,
                preset,
                scales=scales,
                generator=stream,
                autocast=autocast,
                influence=influence if asked else None,
                measure=time.monotonic() - measured > 20,
                warming=trained is not None and images_seen < preset.warm_up,
            )
            if "carim_ratio" in losses:
                measured = time.monotonic()
            carim |= {k: losses[k] for k in ("g_carim", "dead", "carim_ratio") if k in losses}
            if not all(map(math.isfinite, losses.values())):
                raise FloatingPointError(f"a loss is not finite after {images_seen} images: {losses}")
            images_seen += preset.batch
            bar.update(preset.batch)
            if time.monotonic() - last_log > 20:
                last_log = time.monotonic()
                rate = (images_seen - first) / (last_log - started)
                run.log(
                    images=images_seen,
                    scales=scales,
                    images_per_s=round(rate, 2),
                    **{k: float(f"{v:.4g}") for k, v in (losses | carim).items()},
                )
            if images_seen % preset.snapshot_images < preset.batch:
                snapshot()
    return snapshot()


def newest_checkpoint(start: str | Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """Gives the newest checkpoint of a run of stage 1.

    Args:
        start: the run's folder.
        numbers: of the preset that is to go on; its networks must be those of the run.

    Raises:
        ValueError: no run, no readable checkpoint, or one of other networks.
    """
    path = Path(start) / "recipe.json"
    if not path.is_file():
        raise ValueError(f"start must be the folder of a run, got {start}, which has no recipe.json")
    recipe = json.loads(path.read_text())
    names = ("architecture", "discriminator_width", "discriminator_channels", "condition_dim", "discriminator_norm")
    other = {k: recipe["preset"].get(k) for k in names if recipe["preset"].get(k) != numbers[k]}
    if other:
        raise ValueError(f"start must be a run of the same networks, got {other} in {path}")
    state = Run(start, recipe).load()
    if state is None:
        raise ValueError(f"start must hold a checkpoint, got none that can be read in {start}")
    return state


def export(
    networks: Networks, preset: GANPreset, run: Run, films: Films, prior: LocationPrior, images_seen: int
) -> Path:
    """Writes the averaged generator as safetensors with its recipe, and the prior; gives the folder."""
    generator = NoduleGenerator(ARCHITECTURES[preset.architecture])
    generator.load_state_dict(networks.average.module.state_dict())
    retake_statistics(generator, prior, preset, seed=run.recipe["seed"])
    folder = run.folder / "export"
    data = f"{run.recipe['data']}, train split: {len(films.normal)} normal films, {len(films.nodule)} with a nodule"
    data += f" ({len(films.boxed)} boxed)"
    if run.recipe["ct_nodules"]:
        data += "; CT nodules in projection (LUNA16 / LIDC-IDRI) superimposed on normal films"
    (folder / "README.md").unlink(missing_ok=True)  # a card is never written over, and tells of older weights
    recipe = {**run.recipe, "images_seen": images_seen, "stage": 2 if "stage_2_from" in run.recipe else 1}
    generator.save_pretrained(folder, training_data=data, recipe=recipe, git_commit=git_commit())
    prior.save(folder / "prior.safetensors")
    return folder


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="fast128")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--images", type=int, help="real images to show, in place of the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--data-name", default="", help="what the data are called in the weights")
    parser.add_argument("--note", default="", help="kept in the recipe")
    parser.add_argument("--start", help="stage 2: the run of stage 1 to start from")
    parser.add_argument("--classifier", help="stage 2: file of the frozen classifier")
    parser.add_argument("--weights", help="stage 1 from an exported generator, such as carim_aug/weights (fine-tuning)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.images is not None:
        preset = replace(preset, images=args.images)
    folder = train_gan(
        preset,
        data=args.data,
        ct_nodules=args.ct_nodules,
        out=args.out,
        seed=args.seed,
        minutes=args.minutes,
        data_name=args.data_name,
        note=args.note,
        device=args.device,
        start=args.start,
        classifier=args.classifier,
        weights=args.weights,
    )
    print(f"weights: {folder}")


if __name__ == "__main__":
    main()
