"""Training of CheXNet on the 14 findings, with more nodules than the data have; see `train.classifier.presets`."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.cam import activation_map, enlarge
from carim_aug.ops.findings import FINDINGS
from carim_aug.ops.random import fold
from train.classifier.batch import draw_batch
from train.classifier.densenet import ChestClassifier, predict
from train.classifier.presets import ClassifierPreset, current_numbers
from train.common.distributed import Part, broadcast, in_first, launch, resolve_precision
from train.common.images import NODULE, ImageSet, read_images
from train.common.loop import Buffers, Loop, descend
from train.common.run import Run, RunError, TrainingError, git_commit, write_whole
from train.metrics.patches import pointing_chance, pointing_hit
from train.metrics.statistics import auc, auc_interval


def train_classifier(
    preset: ClassifierPreset,
    *,
    data: str | Path,  # ChestX-ray14's layout with train and val splits
    ct_nodules: str | Path | None,  # templates.npz, or None to train without superimposed nodules
    out: str | Path,  # the run's folder
    seed: int = 0,  # of everything random
    minutes: float = math.inf,  # stop after so long (the same command goes on later)
    device: str = "cpu",  # "cpu" or "cuda"
    devices: int = 1,  # on each node, each with its part of every batch
    nodes: int = 1,  # machines
    precision: str = "auto",  # of `train.common.distributed.PRECISIONS`
    prior: LocationPrior | None = None,  # of superimposed nodules; the bundled one by default
    test: bool = False,  # also report on the test split: for final figures
    any_size: bool = False,  # take images of several sizes, each squeezed to a square
    weights: str | Path | None = None,  # a classifier of the 14 findings to start from, in place of an untrained one
) -> Path:
    """Train a classifier, or go on with it, save the best on val, and return its file.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite, nothing can be saved, or the time was too short for one validation.
    """
    prior = prior or LocationPrior.bundled()
    if preset.batch % (devices * nodes):
        raise RunError(f"preset.batch must be a multiple of the {devices * nodes} processes, got {preset.batch}")
    precision = resolve_precision(precision, device)
    fabric = launch(device, devices=devices, nodes=nodes, precision=precision)
    recipe: dict[str, Any] = {"preset": asdict(replace(preset, images=0)), "seed": seed}
    recipe |= {"ct_nodules": ct_nodules is not None, "precision": precision}
    trained = ChestClassifier.load(weights) if weights is not None else None
    if trained is not None and trained.findings != FINDINGS:
        raise RunError(f"weights must be of the findings {FINDINGS}, got {trained.findings} in {weights}")
    recipe |= {"weights": trained.weights_hash} if trained is not None else {}
    run = in_first(fabric, lambda: Run(out, recipe, migrate=current_numbers, begin=False))

    # Data.
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    unreadable: list[str] = []
    reading: dict[str, Any] = {"largest_box": 1.0, "any_size": any_size}
    train, val = (read_images(data, split, preset.size, unreadable=unreadable, **reading) for split in ("train", "val"))
    check_images(train, val, ct, preset, data)
    train = train.to(fabric.device)

    # Network, optimizer, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(FINDINGS, size=preset.size)
    if trained is not None:
        classifier.load_state_dict(trained.state_dict())
    classifier = classifier.to(memory_format=torch.channels_last).to(fabric.device)
    network = fabric.setup_module(classifier)
    optimizer: Any = torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
    optimizer = fabric.setup_optimizers(optimizer)
    images_seen, best, waited = 0, 0.0, 0
    state = broadcast(fabric, in_first(fabric, lambda: run.load() if run else None))
    if state is not None:
        images_seen, best, waited = state["images_seen"], state["best"], state["waited"]
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    if run is not None:
        run.start(images_seen, unreadable, processes=fabric.world_size, device=str(fabric.device))
    loop = Loop(
        run,
        images=preset.images,
        batch=preset.batch,
        name="classifier",
        images_seen=images_seen,
        minutes=minutes,
        log_images=preset.validate_images,
        fabric=fabric,
    )
    if waited >= preset.patience:
        loop.stop()
    file, part = Path(out) / "classifier.safetensors", Part(fabric.global_rank, fabric.world_size)

    def save() -> None:
        assert run is not None, "only the first process saves"
        now = {"images_seen": loop.images_seen, "best": best, "waited": waited}
        if not waited:  # the best so far
            facts = {"recipe": recipe, "images_seen": loop.images_seen, "val_auc": best, "git_commit": git_commit()}
            classifier.save(file, **facts)
        run.save({"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(), **now}, loop.images_seen)

    for seen in loop:
        # Show images.
        loop.set_rate(optimizer, preset.learning_rate)
        classifier.train()
        batch = draw_batch(train, prior, ct, preset, seed=seed, images_seen=seen)
        images, labels = (part.of(rows) for rows in batch)
        before = Buffers([classifier])
        loss = F.binary_cross_entropy_with_logits(network(images), labels)
        finite = descend({"labels": loss}, optimizer, fabric=fabric, part=part, before=before)
        loop.update({"labels": loss.detach()}, finite)
        if not loop.due(preset.validate_images):
            continue

        # Validate; save the best.
        value = broadcast(fabric, nodule_auc(classifier, val))
        best, waited = (value, 0) if value > best else (best, waited + 1)
        if waited >= preset.patience:
            loop.stop()
        if run is not None:
            run.log(images=loop.images_seen, val_auc=round(value, 4))
        loop.try_save(save)
    fabric.barrier()
    loop.close()
    if run is None:
        return file

    # Report.
    if not file.exists():
        raise TrainingError(
            f"stopped after {loop.images_seen} images, before the first validation at {preset.validate_images}"
        )
    classifier = ChestClassifier.load(file).to(fabric.device)
    figures = {"val": report(classifier, val, prior)}
    if test:
        figures["test"] = report(classifier, read_images(data, "test", preset.size, **reading), prior)
    write_whole(run.folder / "report.json", json.dumps(figures, indent=2).encode())
    return file


def check_images(
    train: ImageSet, val: ImageSet, ct: CTNodules | None, preset: ClassifierPreset, where: str | Path
) -> None:
    """Raise RunError if a split lacks one of the classes, or train has fewer images than a batch or no background."""
    for split, images in (("train", train), ("val", val)):
        nodule = len(images.nodule)
        if nodule in (0, len(images)):
            raise RunError(
                f"{where}: the {split} split must hold images with and without a nodule, got {nodule} of {len(images)}"
            )
    if len(train) < preset.batch:
        raise RunError(f"{where}: the train split must hold at least {preset.batch} images, got {len(train)}")
    if ct is not None and preset.superimposed > 0:
        train.check(f"{where}: the train split", normal=1)


def nodule_auc(classifier: ChestClassifier, images: ImageSet) -> float:
    """Return the area under the ROC curve of the nodule's logit."""
    scores, has = predict(classifier, images.images)[:, NODULE], images.labels[:, NODULE] > 0
    return float(auc(scores[has], scores[~has]))


def report(classifier: ChestClassifier, images: ImageSet, prior: LocationPrior) -> dict[str, Any]:
    """Return each finding's AUC with its interval over patients, and the pointing game beside the prior's field."""
    logits, generator = predict(classifier, images.images), torch.Generator().manual_seed(0)
    findings: dict[str, Any] = {}
    for c, name in enumerate(FINDINGS):
        has = images.labels[:, c] > 0
        if bool(has.any()) and not bool(has.all()):
            scores, patients = (logits[has, c], logits[~has, c]), (images.patients[has], images.patients[~has])
            interval = auc_interval(*scores, *patients, generator=generator, draws=1000)
            findings[name] = {"auc": float(auc(*scores)), "interval": interval, "images": int(has.sum())}

    # The pointing game: whether the closed-form map peaks in a box.
    hits, device, size = [], next(classifier.parameters()).device, images.images.shape[-1]
    boxes = [images.boxes[i] * size for i in images.boxed.tolist()]
    for rows in torch.arange(len(boxes)).split(64):
        shown = images.symmetric(images.boxed[rows]).to(device)
        seen = activation_map(classifier, shown, NODULE, layer=classifier.activation, method="closed-form")
        hits.append(pointing_hit(enlarge(seen.maps.float().cpu(), size), [boxes[i] for i in rows.tolist()]).float())
    if not boxes:
        return {"auc": findings, "pointing": None}
    field = enlarge(prior.field[None, None].float(), size)[0, 0] > 0.5
    chance = pointing_chance(boxes, field)
    game = {"hit": float(torch.cat(hits).mean()), "chance": float(chance.mean()), "images": len(boxes)}
    return {"auc": findings, "pointing": game}
