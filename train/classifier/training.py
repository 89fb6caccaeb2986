"""CheXNet: `python -m train.classifier --preset chexnet --data FOLDER --out runs/chexnet` (METHOD 4).

DenseNet-121 with 14 logits. What we add for the few nodules there are, each a number of the preset: more films labelled
Nodule in a batch, CT nodules of known place superimposed on normal films, and the closed-form map held to the places
that are known. What one of them brings: leave it out, as in `--set superimposed=0 --out runs/without`, and compare the
report.json. `--weights` starts from the pre-task's file (`train.classifier.pretask`). The same command resumes.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.errors import DataError
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.cam import activation_map, enlarged
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier, ClassifierError
from train.common.distributed import PRECISIONS, Part, agreed, in_first, launched
from train.common.labelled import NODULE, LabelledFilms, draw_films, read_labelled, scaled
from train.common.run import PATIENCE, Run, RunError, TrainingError, git_commit, write_whole
from train.gan.presets import CLASSIFIERS as PRESETS
from train.gan.presets import ClassifierPreset, changed
from train.gan.step import Buffers, descend
from train.metrics.patches import auc, auc_interval
from train.metrics.pointing import pointing_chance, pointing_hit


class Mapped(nn.Module):
    """A classifier's logits and its closed-form nodule map in one forward pass."""

    def __init__(self, classifier: ChestClassifier) -> None:
        """Wraps the classifier."""
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Gives logits (B, 14) and maps (B, 1, h, w), float32, of images (B, 1, S, S) in [-1, 1]."""
        net = self.classifier
        features = net.activation(net.features(net.prepared(images)))
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            weight = net.head.weight[NODULE] / features[0, 0].numel()
            return net.head(features.mean(dim=(2, 3))), torch.einsum("k,bkhw->bhw", weight, features)[:, None]


def map_loss(maps: Tensor, bias: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Gives the cross-entropy of the closed-form map's cells, as logits, with the share of each that a nodule covers.

    A cell counts as nodule if any of it is one; cells of a film without a nodule all count as none.

    Args:
        maps: (B, 1, h, w), signed.
        bias: scalar, the head's.
        masks: (B, 1, S, S).
        known: (B,) bool.
    """
    wanted = (F.adaptive_max_pool2d(masks, maps.shape[-1]) > 0.5).float()
    logits = maps * maps[0].numel() + bias  # a cell's own logit: the film's is their mean
    weight = torch.where(wanted > 0, 1.0, 0.1) * known[:, None, None, None]
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (each * weight).sum() / weight.sum().clamp(min=1)


def train_step(
    fabric: Fabric,
    mapped: Any,
    optimizer: Any,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    preset: ClassifierPreset,
) -> tuple[dict[str, Tensor], bool]:
    """Does one update; gives the losses, and False if it was not finite and nothing has changed."""
    part, before = Part(fabric.global_rank, fabric.world_size), Buffers([mapped])
    images, labels, masks, known = (part.of(x) for x in batch)
    logits, maps = mapped(images)
    losses = {"labels": F.binary_cross_entropy_with_logits(logits, labels)}
    if preset.map_weight > 0:
        losses["map"] = preset.map_weight * map_loss(maps, mapped.classifier.head.bias[NODULE], masks, known)
    done = descend(fabric, optimizer, losses, part)
    if not done:
        before.restore()
    return {k: v.detach() for k, v in losses.items()}, done


@torch.no_grad()
def predicted(classifier: ChestClassifier, films: LabelledFilms, *, batch: int = 64) -> Tensor:
    """Gives logits (N, 14) of all films, on the CPU."""
    classifier.eval()
    where = next(classifier.parameters()).device
    with torch.autocast(where.type, torch.bfloat16):
        parts = [classifier(scaled(part.to(where))).float().cpu() for part in films.images.split(batch)]
    return torch.cat(parts)


def report(classifier: ChestClassifier, films: LabelledFilms, prior: LocationPrior) -> dict[str, Any]:
    """Gives AUC per finding with intervals over patients, and the pointing game on boxed nodules against chance."""
    logits, stream = predicted(classifier, films), torch.Generator().manual_seed(0)
    findings: dict[str, Any] = {}
    for c, name in enumerate(FINDINGS):
        has = films.labels[:, c] > 0
        if bool(has.any()) and not bool(has.all()):
            scores = (logits[has, c], logits[~has, c])
            whose = (films.patients[has], films.patients[~has])
            interval = auc_interval(*scores, *whose, generator=stream, draws=1000)
            findings[name] = {"auc": float(auc(*scores)), "interval": interval, "films": int(has.sum())}
    boxed = [i for i, boxes in enumerate(films.boxes) if len(boxes)]
    game = None
    if boxed:
        where, size = next(classifier.parameters()).device, films.images.shape[-1]
        boxes = [films.boxes[i] * size for i in boxed]
        maps = activation_map(
            classifier, scaled(films.images[boxed]).to(where), NODULE, layer=classifier.activation, method="closed-form"
        ).maps.float()
        hits = pointing_hit(enlarged(maps.cpu(), size), boxes).float()
        chance = pointing_chance(boxes, enlarged(prior.field[None, None].float(), size)[0, 0] > 0.5)
        game = {"hit": float(hits.mean()), "chance": float(chance.mean()), "films": len(boxed)}
    return {"auc": findings, "pointing": game}


def train_classifier(
    preset: ClassifierPreset,
    *,
    data: str | Path,
    ct_nodules: str | Path | None,
    out: str | Path,
    seed: int = 0,
    minutes: float = math.inf,
    device: str = "cpu",
    devices: int = 1,
    nodes: int = 1,
    precision: str = "bf16-mixed",
    prior: LocationPrior | None = None,
    test: bool = False,
    any_size: bool = False,
    weights: str | Path | None = None,
) -> Path:
    """Trains a classifier, or goes on with it, and keeps the best on val; gives its file.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with train and val splits.
        ct_nodules: templates.npz, or None to train without superimposed nodules.
        out: the run's folder.
        seed: of everything random.
        minutes: stop after so long (the same command goes on later).
        device: "cpu" or "cuda".
        devices: on each node, each with its part of every batch.
        nodes: machines.
        precision: of `train.common.distributed.PRECISIONS`.
        prior: of superimposed nodules; the bundled one by default.
        test: also report on the test split: for final figures.
        any_size: take films of several sizes, each squeezed to a square.
        weights: a classifier of the 14 findings to start from, such as the pre-task's, in place of an untrained one.

    Raises:
        ClassifierError: weights that are missing, damaged or of another network.
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite, nothing can be saved, or the time was too short for one validation.
    """
    prior = prior or LocationPrior.bundled()
    if preset.batch % (devices * nodes):
        raise RunError(f"preset.batch must be a multiple of the {devices * nodes} processes, got {preset.batch}")
    fabric = launched(device, devices=devices, nodes=nodes, precision=precision)
    where = fabric.device
    recipe = {"preset": asdict(replace(preset, images=0)), "seed": seed, "ct_nodules": ct_nodules is not None}
    recipe |= {"precision": precision} if precision != "bf16-mixed" else {}
    begun = ChestClassifier.load(weights) if weights is not None else None
    if begun is not None and begun.findings != FINDINGS:
        raise RunError(f"weights must be of the findings {FINDINGS}, got {begun.findings} in {weights}")
    if begun is not None:
        recipe["weights"] = begun.weights_hash
    run = in_first(fabric, lambda: Run(out, recipe, begin=False))
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    unreadable: list[str] = []
    options: dict[str, Any] = {"any_size": any_size, "unreadable": unreadable}
    films, val = (read_labelled(data, split, preset.size, **options) for split in ("train", "val"))
    check_films(films, val, ct, preset, data)
    films.images, films.labels = films.images.to(where), films.labels.to(where)

    # Network, optimizer, where the last run stopped.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(FINDINGS, size=preset.size)
    if begun is not None:
        classifier.load_state_dict(begun.state_dict())
    classifier = classifier.to(where, memory_format=torch.channels_last)
    mapped = fabric.setup_module(Mapped(classifier))
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
    )
    seen, best, waited, row = 0, 0.0, 0, 0
    state = agreed(fabric, in_first(fabric, lambda: run.load() if run else None))
    if state is not None:
        seen, best, waited = state["images_seen"], state["best"], state["waited"]
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    if run is not None:
        run.begin()
        run.rewind(seen)
        run.event("started", images=seen, processes=fabric.world_size, device=str(where))
        for what in unreadable:
            run.event("film left out", error=what)

    # Show films; validate; keep the best.
    file, started, first = Path(out) / "classifier.safetensors", time.monotonic(), seen
    unsaved: OSError | None = None
    bar = tqdm(total=preset.images, initial=seen, unit="image", desc="classifier", disable=not fabric.is_global_zero)
    with bar:
        while seen < preset.images and waited < preset.patience:
            if agreed(fabric, time.monotonic() - started >= 60 * minutes):
                break
            part = seen / preset.images
            rate = preset.learning_rate * min(part * 20 + 1e-3, 0.5 + 0.5 * math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate
            classifier.train()
            batch = draw_films(films, prior, ct, preset, seed=seed, images_seen=seen)
            losses, done = train_step(fabric, mapped, optimizer, batch, preset)
            row = 0 if done else row + 1
            if not done and run is not None:
                run.event("update skipped", images=seen, losses={k: str(float(v)) for k, v in losses.items()})
            if row >= PATIENCE:
                raise TrainingError(f"losses not finite in {row} updates in a row, after {seen} images: {losses}")
            seen += preset.batch
            bar.update(preset.batch)
            if seen % preset.validate_images < preset.batch:
                value, waited = validated(classifier, val), waited + 1
                value = agreed(fabric, value)
                better = value > best
                if better:
                    best, waited = value, 0
                if run is None:
                    continue
                told = {k: float(f"{float(v):.4g}") for k, v in losses.items()}
                speed = (seen - first) / (time.monotonic() - started)
                run.log(images=seen, images_per_s=round(speed, 2), val_auc=round(value, 4), **told)
                state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
                try:
                    if better:
                        aside = file.with_name(file.name + ".partial")
                        facts = {"recipe": recipe, "images_seen": seen, "git_commit": git_commit(), "val_auc": value}
                        classifier.save(aside, **facts)
                        os.replace(aside, file)
                    run.save({**state, "images_seen": seen, "best": best, "waited": waited}, seen)
                    unsaved = None
                except OSError as error:  # a full disk, say: the training goes on, and the next time is another try
                    unsaved = error
                    run.event("nothing saved", images=seen, error=str(error))
    fabric.barrier()
    if unsaved is not None:
        raise TrainingError(
            f"after {seen} images nothing could be saved in {out} ({unsaved}); the last checkpoint is intact: make "
            "room and give the same command again"
        )
    if run is None:
        return file
    run.close()
    if not file.exists():
        raise TrainingError(f"stopped after {seen} images, before the first validation at {preset.validate_images}")
    trained = ChestClassifier.load(file).to(where)
    figures = {"val": report(trained, val, prior)}
    if test:
        figures["test"] = report(trained, read_labelled(data, "test", preset.size, any_size=any_size), prior)
    write_whole(run.folder / "report.json", json.dumps(figures, indent=2).encode())
    return file


def validated(classifier: ChestClassifier, val: LabelledFilms) -> float:
    """Gives the nodule AUC on val."""
    logits, has = predicted(classifier, val)[:, NODULE], val.labels[:, NODULE] > 0
    return float(auc(logits[has], logits[~has]))


def check_films(
    films: LabelledFilms, val: LabelledFilms, ct: CTNodules | None, preset: ClassifierPreset, where: str | Path
) -> None:
    """Nothing, or RunError: a split without one of the classes, fewer films than a batch, nothing to superimpose on."""
    for split, labels in (("train", films.labels), ("val", val.labels)):
        nodule = labels[:, NODULE] > 0
        if not bool(nodule.any()) or bool(nodule.all()):
            raise RunError(f"{where}: the {split} split needs films with and without a nodule")
    normal = ~films.labels.any(dim=1)
    if len(normal) < preset.batch or (ct is not None and preset.superimposed > 0 and not bool(normal.any())):
        raise RunError(
            f"{where}: the train split needs at least {preset.batch} films, some normal, got {len(normal)}, "
            f"{int(normal.sum())} normal"
        )


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="chexnet")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers other than the preset's")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--weights", help="start from this classifier's file, such as that of train.classifier.pretask")
    parser.add_argument("--images", type=int, help="films to show, in place of the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="report on the test split too: for final figures")
    parser.add_argument("--any-size", action="store_true", help="take films of several sizes, each made a square")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--devices", type=int, default=1, help="GPUs (or CPU processes) on each machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    options = vars(parser.parse_args())
    name, settings, images = (options.pop(k) for k in ("preset", "set", "images"))
    try:
        preset = changed(PRESETS[name], settings)
        file = train_classifier(preset if images is None else replace(preset, images=images), **options)
    except (RunError, TrainingError, DataError, ClassifierError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"classifier: {file}")
    print((file.parent / "report.json").read_text())


if __name__ == "__main__":
    main()
