"""The CARIM-cGAN: `python -m train.gan --preset fast128 --data FOLDER --out runs/fast128` (METHOD 6).

Stage 2 goes on from a run of stage 1: `... --start runs/fast128 --classifier FILE --out runs/stage2`. The same command
resumes. `--weights FOLDER` fine-tunes an exported generator on other films. `--devices 4` trains on four GPUs,
`--nodes 2` on two machines, each started by torchrun or SLURM. Everything random is keyed by (seed, images seen).

Our extensions to the source, each a number of the preset: no batch norm in the discriminators, DiffAugment, progressive
branches, matched pairs in every batch (same noise with and without mask), discriminators of crops at the mask, CT
nodules superimposed on normal films, brightness held to that of real films.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.errors import DataError
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.generators.pretrained import WeightsError
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier, ClassifierError
from train.common.distributed import PRECISIONS, agreed, in_first, launched
from train.common.run import PATIENCE, Run, RunError, TrainingError
from train.gan.batch import Batch, Films, draw_batch, read_films
from train.gan.choice import Choice
from train.gan.influence import Influence
from train.gan.networks import Networks
from train.gan.presets import DEFAULTS, PRESETS, GANPreset, changed
from train.gan.snapshots import Snapshots
from train.gan.start import (
    check_films,
    check_preset,
    first_stage,
    named_preset,
    restore,
    starting_generator,
    trained_generator,
)
from train.gan.step import Asked, Wrapped, train_step


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
    devices: int = 1,
    nodes: int = 1,
    precision: str = "bf16-mixed",
    compiled: bool = False,
    prior: LocationPrior | None = None,
    limit: int | None = None,
    any_size: bool = False,
    start: str | Path | None = None,
    classifier: str | Path | None = None,
    weights: str | Path | None = None,
    encoder: str | Path | None = None,
    told: Callable[[Path, dict[str, Any]], None] | None = None,
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
        devices: on each node, each with its part of every batch.
        nodes: machines.
        precision: of `train.common.distributed.PRECISIONS`.
        compiled: torch.compile the networks' blocks: minutes at first, faster afterwards on a GPU.
        prior: of the masks; the bundled one by default.
        limit: at most so many normal films (for trials).
        any_size: take films of several sizes, each squeezed to a square.
        start: a run of stage 1 whose best or newest checkpoint stage 2 starts from.
        classifier: file of the frozen classifier of stage 2; see `ChestClassifier.load`.
        weights: an exported generator (folder or hub id) that stage 1 starts from, with all branches, in place of an
            untrained one; the discriminators start untrained and learn alone for `preset.warm_up` images.
        encoder: file of `train.classifier.encoders`: KID and FID on val at each snapshot, the lowest KID kept in best/.
        told: is given a folder of weights and their figures after each snapshot: the best, or the newest and nothing
            where nothing chooses.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite, or nothing can be saved any more.
    """
    if weights is not None and start is not None:
        raise RunError(f"weights start stage 1 and start stage 2: give one of them, got {weights!r} and {start!r}")
    if (start is None) != (classifier is None):
        raise RunError(f"start and classifier make stage 2 together, got {start!r} and {classifier!r}")
    if weights is not None or start is not None:
        preset = replace(preset, grow_at=())  # all branches are trained already
    check_preset(preset, devices * nodes)
    trained = trained_generator(weights, preset) if weights is not None else None
    fabric = launched(device, devices=devices, nodes=nodes, precision=precision, unused=bool(preset.grow_at))
    config = ARCHITECTURES[preset.architecture]
    recipe: dict[str, Any] = {
        "preset": preset.numbers(),
        "architecture": config.to_dict(),
        "seed": seed,
        "ct_nodules": ct_nodules is not None,
        "data": data_name or Path(data).name,
    }
    recipe |= {"note": note} if note else {}
    recipe |= {"precision": precision} if precision != "bf16-mixed" else {}
    recipe |= {"weights": trained.weights_hash} if trained is not None else {}
    influence, begun, frozen_classifier = None, None, None
    if start is not None and classifier is not None:
        frozen_classifier = ChestClassifier.load(classifier).to(fabric.device)
        influence = Influence(frozen_classifier, preset.carim_weight, preset.carim_form, preset.carim_every)
        begun = in_first(fabric, lambda: first_stage(start, preset))
        recipe["stage_2_from"] = begun["images_seen"] if begun else None
    run = in_first(fabric, lambda: Run(out, recipe, defaults=DEFAULTS, begin=False))
    prior = prior or LocationPrior.bundled()
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    unreadable: list[str] = []
    films = read_films(data, config.image_size, limit=limit, any_size=any_size, unreadable=unreadable)
    check_films(films, ct, preset, data)
    films = films.to(fabric.device)

    # Networks, optimizers, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed))
        networks = Networks(preset)
    if trained is not None:
        networks.start_from(trained)
    if compiled:
        networks.compile_blocks()
    anchor = starting_generator(preset, trained, begun) if preset.anchor_weight > 0 else None
    wrapped = Wrapped.setup(fabric, networks, preset, anchor)
    state = in_first(fabric, lambda: (run.load() if run else None) or begun)
    state = agreed(fabric, state)
    if state is not None:
        restore(wrapped, state)
    images_seen = first = state["images_seen"] if state else 0
    skipped, best = (state.get("skipped", 0), state.get("best", {})) if state else (0, {})
    snapshots = None
    if run is not None:
        run.begin()
        run.rewind(images_seen)
        judged_by = {"classifier": frozen_classifier.weights_hash[:16]} if frozen_classifier is not None else {}
        run.event("started", images=images_seen, processes=fabric.world_size, device=str(fabric.device), **judged_by)
        for what in unreadable:
            run.event("film left out", error=what)
        choice = None
        if encoder is not None:
            choice = Choice(encoder, data, prior, seed=seed, device=fabric.device, any_size=any_size)
        options: dict[str, Any] = {"device": fabric.device, "choice": choice, "told": told}
        snapshots = Snapshots(run, preset, films, prior, **options)
    unsaved: OSError | None = None
    saved = images_seen if state and run and run.checkpoints() and (run.folder / "export").exists() else -1

    def snapshot() -> None:
        nonlocal unsaved, saved, best
        if snapshots is None or run is None or saved == images_seen:
            return
        now = {
            "images_seen": images_seen,
            "networks": networks.state_dict(),
            "optimizers": {k: o.state_dict() for k, o in wrapped.optimizers.items()},
            "skipped": skipped,
            "best": best,
        }
        try:
            snapshots.take(networks, now, scales=scales)
            unsaved, saved, best = None, images_seen, now["best"]
        except OSError as error:  # a full disk, say: the training goes on, and the next snapshot is another try
            unsaved = error
            run.event("nothing saved", images=images_seen, error=str(error))

    networks.train()
    scales, row = config.branches, 0
    log_steps = math.ceil(preset.log_images / preset.batch / preset.carim_every) * preset.carim_every
    started = last = time.monotonic()
    bar = tqdm(
        total=preset.images,
        initial=images_seen,
        unit="image",
        desc=preset.architecture,
        disable=not fabric.is_global_zero,
    )
    with bar:
        while images_seen < preset.images and not _out_of_time(fabric, started, minutes, images_seen // preset.batch):
            step = images_seen // preset.batch
            grown = sum(images_seen >= at for at in preset.grow_at)
            scales = config.branches - len(preset.grow_at) + grown
            batch = drawn(films, prior, ct, preset, seed=seed, images_seen=images_seen)
            stream = torch.Generator().manual_seed(fold(seed, images_seen, 2))
            logged = step % log_steps == 0
            asked = Asked(
                scales,
                influence=influence if step % preset.carim_every == 0 else None,
                measure=logged,
                penalise=step % preset.r1_every == 0,
                warming=trained is not None and images_seen < preset.warm_up,
            )
            losses, done = train_step(wrapped, batch, preset, asked, generator=stream)
            row = 0 if done else row + 1
            if not done:
                skipped += 1
                broken = sorted(k for k, v in losses.items() if not math.isfinite(v)) or ["a gradient"]
                if run is not None:
                    run.event("update skipped", images=images_seen, not_finite=broken, in_all=skipped)
                if row >= PATIENCE:
                    raise TrainingError(
                        f"{broken} not finite in {row} updates in a row, after {images_seen} images; the last "
                        f"checkpoint in {out} is intact"
                    )
            images_seen += preset.batch
            bar.update(preset.batch)
            if logged and run is not None:
                now = time.monotonic()
                run.log(
                    images=images_seen,
                    scales=scales,
                    images_per_s=round((images_seen - first) / (now - last), 2),
                    memory_mb=peak_memory(fabric.device),
                    skipped=skipped,
                    **{k: float(f"{float(v):.4g}") for k, v in losses.items()},
                )
                last, first = now, images_seen
            if images_seen % preset.snapshot_images < preset.batch:
                snapshot()
                fabric.barrier()
    snapshot()
    fabric.barrier()
    if run is not None:
        run.close()
    if unsaved is not None:
        raise TrainingError(
            f"after {images_seen} images nothing could be saved in {out} ({unsaved}); the last checkpoint is intact: "
            "make room and give the same command again"
        ) from unsaved
    return Path(out) / "export"


def drawn(
    films: Films, prior: LocationPrior, ct: CTNodules | None, preset: GANPreset, *, seed: int, images_seen: int
) -> Batch:
    """Gives the batch after `images_seen` images; in the first phase of `preset.normal_first`, one of normal films."""
    batch = draw_batch(films, prior, ct, preset, seed=seed, images_seen=images_seen)
    if images_seen >= preset.normal_first:
        return batch
    # The normal halves of two batches; noise of its own for every empty mask.
    other = draw_batch(films, prior, None, preset, seed=fold(seed, 7), images_seen=images_seen)
    normal = [x.images[len(x.images) // 2 :] for x in (other, batch)]
    return replace(
        batch,
        images=torch.cat(normal),
        classes=torch.zeros_like(batch.classes),
        noise=torch.cat([batch.noise, other.noise]),
        masks=torch.zeros_like(batch.masks).repeat(2, 1, 1, 1),
    )


def peak_memory(device: torch.device) -> int:
    """Gives the most memory used so far, in MiB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _out_of_time(fabric: Any, started: float, minutes: float, step: int) -> bool:
    # Clocks differ between processes, so the first one's counts; asking it costs time, so not at each step.
    if math.isinf(minutes) or (fabric.world_size > 1 and step % 8):
        return False
    return agreed(fabric, time.monotonic() - started >= 60 * minutes)


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fast128", help=f"one of {', '.join(sorted(PRESETS))}")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers other than the preset's")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--images", type=int, help="real images to show, in place of the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--data-name", default="", help="what the data are called in the weights")
    parser.add_argument("--note", default="", help="kept in the recipe")
    parser.add_argument("--any-size", action="store_true", help="take films of several sizes, each made a square")
    parser.add_argument("--start", help="stage 2: the run of stage 1 to start from")
    parser.add_argument("--classifier", help="stage 2: file of the frozen classifier")
    parser.add_argument("--weights", help="stage 1 from an exported generator, such as carim_aug/weights (fine-tuning)")
    parser.add_argument("--encoder", help="file of train.classifier.encoders: KID and FID on val, the best kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--devices", type=int, default=1, help="GPUs (or CPU processes) on each machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile the networks")
    options = vars(parser.parse_args())
    name, settings, images = (options.pop(k) for k in ("preset", "set", "images"))
    try:
        preset = changed(named_preset(name), settings)
        folder = train_gan(preset if images is None else replace(preset, images=images), **options)
    except (RunError, TrainingError, DataError, WeightsError, ClassifierError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"weights: {folder}")


if __name__ == "__main__":
    main()
