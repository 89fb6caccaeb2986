"""The CARIM-cGAN's training, one stage: data, generate, update D, update G, EMA, log, snapshot.

Everything random is keyed by (seed, images seen), so that a run that was cut goes on bit for bit.
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.common.distributed import broadcast, in_first, launch, resolve_precision
from train.common.images import ImageSet, read_images
from train.common.loop import Loop
from train.common.run import Run, RunError, read_checkpoint
from train.gan.batch import draw_batch
from train.gan.losses import CARIMRegularizer
from train.gan.networks import Networks
from train.gan.presets import GANPreset, current_numbers
from train.gan.snapshots import BestByKID, Snapshots
from train.gan.step import TrainState, train_step

# Numbers of a preset that fix the networks.
SAME = ("architecture", "discriminator_width", "discriminator_channels", "condition_dim", "discriminator_norm")


def train_gan(
    preset: GANPreset,
    *,
    data: str | Path,  # ChestX-ray14's layout with a train split
    ct_nodules: str | Path | None,  # templates.npz, or None to train without superimposed nodules
    out: str | Path,  # the run's folder
    seed: int = 0,  # of everything random
    minutes: float = math.inf,  # stop after so long (the same command goes on later)
    data_name: str = "",  # what the data are called in the weights; the folder's name by default
    note: str = "",  # kept in the recipe: what its numbers do not say
    device: str = "cpu",  # "cpu" or "cuda"
    devices: int = 1,  # on each node, each with its part of every batch
    nodes: int = 1,  # machines
    precision: str = "auto",  # of `train.common.distributed.PRECISIONS`
    compiled: bool = False,  # torch.compile the networks' blocks: minutes at first, faster afterwards on a GPU
    prior: LocationPrior | None = None,  # of the masks; the bundled one by default
    limit: int | None = None,  # at most so many normal images (for trials)
    any_size: bool = False,  # take images of several sizes, each squeezed to a square
    start: str | Path | None = None,  # a run of stage 1 whose best or newest checkpoint stage 2 starts from
    classifier: str | Path | None = None,  # file of the frozen classifier of stage 2; see `ChestClassifier.load`
    weights: str | Path | None = None,  # an exported generator (folder or hub id) that stage 1 starts from
    encoder: str | Path | None = None,  # file of `train.classifier.encoders`: KID on val, the lowest kept in best/
    on_snapshot: Callable[[Path, dict[str, Any]], None] | None = None,  # see `train.gan.snapshots.Snapshots`
) -> Path:
    """Train one stage, or go on with it, write the averaged generator, and return its folder.

    Given weights start with all branches; their discriminators start untrained and learn alone for `preset.warm_up`
    images.

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
    config = ARCHITECTURES[preset.architecture]
    precision = resolve_precision(precision, device)

    # What the run starts from, and its folder.
    trained = load_trained(weights, config) if weights is not None else None
    fabric = launch(device, devices=devices, nodes=nodes, precision=precision, unused=bool(preset.grow_at))
    recipe: dict[str, Any] = {"preset": preset.numbers(), "architecture": config.to_dict(), "seed": seed}
    recipe |= {"ct_nodules": ct_nodules is not None, "data": data_name or Path(data).name, "precision": precision}
    recipe |= {"note": note} if note else {}
    recipe |= {"weights": trained.weights_hash} if trained is not None else {}
    regularizer, first_stage = None, None
    if start is not None and classifier is not None:
        frozen = ChestClassifier.load(classifier).to(fabric.device)
        regularizer = CARIMRegularizer(frozen, preset.carim_weight, preset.carim_form, preset.carim_every)
        first_stage = broadcast(fabric, in_first(fabric, lambda: read_first_stage(start, preset)))
        recipe["stage_2_from"] = first_stage["images_seen"] if first_stage else None
    run = in_first(fabric, lambda: Run(out, recipe, migrate=current_numbers, begin=False))

    # Data.
    prior = prior or LocationPrior.bundled()
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    unreadable: list[str] = []
    reading: dict[str, Any] = {"limit_normal": limit, "any_size": any_size, "unreadable": unreadable}
    images = read_images(data, "train", config.image_size, only_normal_or_nodule=True, **reading).to(fabric.device)
    check_images(images, ct, preset, data)

    # Networks, optimizers, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed))
        networks = Networks(preset)
    if trained is not None:
        networks.start_from(trained.network)
    if compiled:
        networks.compile_blocks()
    state = TrainState.setup(fabric, networks, preset)
    checkpoint = broadcast(fabric, in_first(fabric, lambda: run.load() if run else None)) or first_stage or {}
    if checkpoint:
        state.load_state_dict(checkpoint)
    images_seen, best = checkpoint.get("images_seen", 0), checkpoint.get("best", {})
    snapshots = None
    if run is not None:
        carim = {"classifier": regularizer.classifier.weights_hash[:16]} if regularizer is not None else {}
        run.start(images_seen, unreadable, processes=fabric.world_size, device=str(fabric.device), **carim)
        by_kid = None
        if encoder is not None:
            choosing: dict[str, Any] = {"images": preset.kid_images, "device": fabric.device, "any_size": any_size}
            by_kid = BestByKID(encoder, data, prior, seed=seed, **choosing)
        snapshots = Snapshots(run, preset, images, prior, device=fabric.device, best=by_kid, on_snapshot=on_snapshot)
    saved = images_seen if run and run.checkpoints() and (run.folder / "export").exists() else -1
    together = preset.batch * preset.carim_every  # a line of the log falls on a step with the CARIM loss
    loop = Loop(
        run,
        images=preset.images,
        batch=preset.batch,
        name=preset.architecture,
        images_seen=images_seen,
        skipped=checkpoint.get("skipped", 0),
        minutes=minutes,
        log_images=math.ceil(preset.log_images / together) * together,
        fabric=fabric,
    )

    def snapshot() -> None:
        nonlocal best, saved
        now = {"images_seen": loop.images_seen, "skipped": loop.skipped, "best": best, **state.state_dict()}
        scales = count_scales(preset, max(loop.images_seen - preset.batch, 0))
        assert snapshots is not None, "only the first process takes snapshots"
        snapshots.take(networks, now, scales=scales)
        best, saved = now["best"], loop.images_seen

    networks.train()
    for seen in loop:
        # Data: real images, and the noise and masks of what is generated.
        batch = draw_batch(images, prior, ct, preset, seed=seed, images_seen=seen)

        # Generate, update D, update G, EMA.
        scales = count_scales(preset, seen)
        losses, finite = train_step(
            state,
            batch,
            preset,
            scales=scales,
            generator=torch.Generator().manual_seed(fold(seed, seen, 2)),
            regularizer=regularizer if loop.step % preset.carim_every == 0 else None,
            measure=loop.logs,
            warm_up=trained is not None and seen < preset.warm_up,
        )

        # Log, snapshot.
        loop.update(losses, finite, scales=scales)
        if loop.due(preset.snapshot_images):
            loop.try_save(snapshot)
    if broadcast(fabric, saved != loop.images_seen):  # no step was left, or the last snapshot failed
        loop.try_save(snapshot)
    loop.close()
    return Path(out) / "export"


def count_scales(preset: GANPreset, images_seen: int) -> int:
    """Return how many branches train after so many images."""
    joined = sum(images_seen >= at for at in preset.grow_at)
    return ARCHITECTURES[preset.architecture].branches - len(preset.grow_at) + joined


def check_preset(preset: GANPreset, ranks: int) -> None:
    """Raise RunError if a preset has an unknown architecture, or a batch that cannot be shared out among processes."""
    if preset.architecture not in ARCHITECTURES:
        raise RunError(f"preset.architecture must be one of {sorted(ARCHITECTURES)}, got {preset.architecture!r}")
    if preset.batch < 2 * ranks or preset.batch % (2 * ranks):
        raise RunError(f"preset.batch must be a multiple of {2 * ranks} for {ranks} processes, got {preset.batch}")
    branches = ARCHITECTURES[preset.architecture].branches
    if len(preset.grow_at) >= branches:
        raise RunError(f"preset.grow_at must have fewer entries than branches ({branches}), got {preset.grow_at}")


def check_images(images: ImageSet, ct: CTNodules | None, preset: GANPreset, where: str | Path) -> None:
    """Raise RunError if there are fewer images than a batch, or no nodule of known place for the crops."""
    images.check(f"{where}: the train split", normal=1, nodule=1)
    if len(images) < preset.batch:
        raise RunError(f"{where}: the train split must hold a batch of {preset.batch} images, got {len(images)}")
    boxed = any(len(images.boxes[i]) for i in images.nodule.tolist())
    if preset.crop_weight + preset.difference_weight > 0 and ct is None and not boxed:
        raise RunError(
            f"{where}: crop_weight and difference_weight need nodules of known place, but the train split has no "
            "nodule box and there are no CT nodules: give --ct-nodules, or --set crop_weight=0 difference_weight=0"
        )


def load_trained(weights: str | Path, config: GeneratorConfig) -> NoduleGenerator:
    """Return an exported generator to go on with; RunError if it is of another architecture than the preset's."""
    trained = NoduleGenerator.from_pretrained(weights)
    found = trained.network.config if isinstance(trained.network, MultiScaleGenerator) else type(trained).__name__
    if found != config:
        raise RunError(f"weights must be of the preset's architecture {config}, got {found} in {weights}")
    return trained


def read_first_stage(start: str | Path, preset: GANPreset) -> dict[str, Any]:
    """Return the best (if one was chosen) or newest checkpoint of a stage 1 run of the same networks, or RunError."""
    path, numbers = Path(start) / "recipe.json", preset.numbers()
    if not path.is_file():
        raise RunError(f"start must be the folder of a run, got {start}, which has no recipe.json")
    before = json.loads(path.read_text()).get("preset", {})
    other = {name: before.get(name) for name in SAME if before.get(name) != numbers[name]}
    if other:
        raise RunError(f"start must be a run of the same networks, got {other} in {path}")
    for checkpoint in (Path(start) / "best.pt", *sorted(Path(start).glob("checkpoint-*.pt"), reverse=True)):
        with contextlib.suppress(RunError):  # missing or damaged: the next will do
            return read_checkpoint(checkpoint)
    raise RunError(f"start must hold a checkpoint, got none that can be read in {start}")
