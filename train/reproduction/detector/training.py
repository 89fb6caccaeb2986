"""A Faster R-CNN on real nodule boxes, with and without the mix: `python -m train.reproduction.detector --data FOLDER --out FOLDER`.

What generated nodules bring a detector (METHOD 8, DS2 against DS4, for boxes). `--mix 0` is the plain training;
`--mix P` gives each normal film shown a nodule with chance P, of `--source` "graft" (`SyntheticNoduleMix`), "ct"
(CT nodules superimposed) or "blob" (drawn), or shows a real boxed film again in its place ("real": oversampling).
All see the same number of films, the same real ones in the same order, and start from the same weights. Some sixty
boxed films teach no detector from nothing: `--preset start --source ct --mix 0.5` makes the common start, once, from
CT nodules alone. A run takes minutes, so one that is cut begins anew; one that is trained is only judged again, as for
`--test test`. `python -m train.reproduction.detector.table RUN RUN ..` compares.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from tqdm import tqdm

from carim_aug import SyntheticNoduleMix
from carim_aug.data.errors import DataError
from carim_aug.generators.checkpoint import WeightsError
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import digest, read_sealed, write_sealed
from train.classifier.encoders import load_encoder
from train.common.run import PATIENCE, Run, RunError, TrainingError, git_commit, write_whole
from train.reproduction.detector.data import BoxedFilms, Draws, Put, batches, mixed, placed, read_boxed
from train.reproduction.sources import SIZE, blob_source, ct_source

FORMAT = "carim-aug-detector"
SOURCES: tuple[str, ...] = ("graft", "real", "ct", "blob")
"""What the changed slots get."""

LEVELS = (1, 2, 3)  # ResNet's layers that the pyramid takes, of stride 4, 8 and 16
ANCHORS = ((6.0, 9.0), (13.0, 19.0), (27.0, 38.0))  # sides at each level; nodules are 5 to 45 pixels of 256


@dataclass(frozen=True)
class DetectorPreset:
    """Numbers of a detector's training.

    Attributes:
        images: films to show in all.
        batch: films a step.
        boxed: share of each batch that is real boxed films.
        learning_rate: AdamW's largest, after a warm-up of a twentieth of the images, then a cosine to zero.
        weight_decay: AdamW's.
        channels: of the pyramid's maps.
        normal: at most so many normal films, of the train split and of the one that judges; all by default.
    """

    images: int = 2_400
    batch: int = 8
    boxed: float = 0.25
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    channels: int = 64
    normal: int | None = None


PRESETS: dict[str, DetectorPreset] = {
    "usual": DetectorPreset(),
    "start": DetectorPreset(images=6_000, boxed=0.0, learning_rate=1e-3),
    "tiny": DetectorPreset(images=8, batch=4, channels=16, normal=4),
}


# --- The network and its weights ---
def build_detector(preset: DetectorPreset, *, seed: int, backbone: str | Path | None = None) -> FasterRCNN:
    """Gives an untrained detector of one class for grey films (1, 256, 256) in [0, 1], in train mode on the CPU.

    ResNet-18 without its last layer, whose stride of 32 is coarser than a nodule, and a pyramid of three levels.

    Args:
        preset: the numbers.
        seed: of the weights.
        backbone: a file of `train.classifier.encoders`, kind "findings", that the ResNet starts from.

    Raises:
        RunError: the file holds another kind.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 26))
        trunk = resnet18(weights=None)
        trunk.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        if backbone is not None:
            encoder = load_encoder(backbone)
            if encoder.kind != "findings":
                raise RunError(f"backbone must be an encoder of kind 'findings', got {encoder.kind!r} in {backbone}")
            trunk.load_state_dict(encoder.trunk.state_dict(), strict=False)  # all but the head that it has not
        layers = {f"layer{level}": str(i) for i, level in enumerate(LEVELS)}
        pyramid = BackboneWithFPN(trunk, layers, [64 * 2 ** (level - 1) for level in LEVELS], preset.channels)
        pyramid.fpn.extra_blocks = None  # a level of stride 32
        width = 4 * preset.channels
        detector = FasterRCNN(
            pyramid,
            min_size=SIZE,
            max_size=SIZE,
            image_mean=[0.5],
            image_std=[0.5],
            rpn_anchor_generator=AnchorGenerator(ANCHORS, ((1.0,),) * len(ANCHORS)),
            rpn_pre_nms_top_n_train=500,
            rpn_post_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=500,
            rpn_post_nms_top_n_test=100,
            rpn_fg_iou_thresh=0.5,
            rpn_batch_size_per_image=64,
            box_roi_pool=MultiScaleRoIAlign(list(layers.values()), output_size=5, sampling_ratio=2),
            box_head=TwoMLPHead(25 * preset.channels, width),
            box_predictor=FastRCNNPredictor(width, 2),
            box_score_thresh=0.001,
            box_nms_thresh=0.2,
            box_detections_per_img=20,
            box_batch_size_per_image=64,
        )
    return detector.to(memory_format=torch.channels_last)


def save_detector(detector: FasterRCNN, path: Path) -> str:
    """Writes a detector's weights to a sealed file, whole or not at all; gives their SHA-256."""
    arrays = arrays_of(detector)
    aside = path.with_name(path.name + ".partial")
    write_sealed(aside, arrays, {"format": FORMAT})
    os.replace(aside, path)
    return digest(arrays, {})


def load_weights(detector: FasterRCNN, path: str | Path) -> str:
    """Gives a detector the weights of a file; gives their SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: it is damaged, or of another detector.
    """
    try:
        arrays, texts, sealed = read_sealed(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    if texts.get("format") != FORMAT or not sealed:
        raise RunError(
            f"{path} must be a whole file that train.reproduction.detector.training wrote, got format {texts.get('format')!r}"
        )
    try:
        detector.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()})
    except RuntimeError as error:
        raise RunError(f"{path} must be of a detector of the same preset ({str(error)[:200]})") from error
    return digest(arrays, {})


def arrays_of(detector: FasterRCNN) -> dict[str, np.ndarray[Any, Any]]:
    """Gives the weights by name."""
    return {k: v.detach().cpu().contiguous().numpy() for k, v in detector.state_dict().items()}


# --- Training and judging ---
def train_step(detector: FasterRCNN, optimizer: Any, images: list[Tensor], targets: list[Any]) -> dict[str, Tensor]:
    """Does one update, unless a loss or a gradient is not finite; gives the losses."""
    where = next(detector.parameters()).device
    targets = [{k: v.to(where) for k, v in target.items()} for target in targets]
    with torch.autocast(where.type, torch.bfloat16):
        losses = detector([image.to(where) for image in images], targets)
    optimizer.zero_grad(set_to_none=True)
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    norm = nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
    if bool(norm.isfinite()):
        optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()} | {"norm": norm}


@torch.inference_mode()
def predicted(detector: FasterRCNN, films: BoxedFilms, *, batch: int = 16) -> list[dict[str, Any]]:
    """Gives what is found in each film: name, patient, true boxes, and predicted boxes with scores, as plain types.

    The detector sees films as they are, in float32, and is left in eval mode.
    """
    detector.eval()
    where = next(detector.parameters()).device
    rows: list[dict[str, Any]] = []
    for part in tqdm(films.images.split(batch), desc="films judged", unit="batch"):
        for found in detector(list(part.to(where).float() / 255)):
            i = len(rows)
            boxes = torch.cat([found["boxes"], found["scores"][:, None]], dim=1).cpu().double()
            row = {"film": films.names[i], "patient": int(films.patients[i]), "nodules": films.boxes[i].tolist()}
            rows.append({**row, "found": [[round(v, 4) for v in box] for box in boxes.tolist()]})
    return rows


def put_of(name: str, *, weights: str | Path | None, ct_nodules: str | Path | None, seed: int) -> Put | None:
    """Gives what puts nodules of a source into films; None for "real".

    Args:
        name: of `SOURCES`.
        weights: the generator of "graft"; None is the bundled one.
        ct_nodules: templates.npz of "ct".
        seed: of the mix.

    Raises:
        RunError: there is none of this name, or CT nodules were asked for and not given.
        WeightsError: the generator cannot be had.
        DataError: the CT nodules cannot be read.
    """
    prior = LocationPrior.bundled()
    if name == "graft":
        return mixed(SyntheticNoduleMix.from_pretrained(weights, prior=prior, p=1.0, insertion="graft", seed=seed))
    if name == "ct":
        if ct_nodules is None:
            raise RunError("source 'ct' needs ct_nodules, the file templates.npz, got None")
        return placed(ct_source(ct_nodules), prior)
    if name not in SOURCES:
        raise RunError(f"source must be one of {SOURCES}, got {name!r}")
    return placed(blob_source, prior) if name == "blob" else None


def train_detector(
    preset: DetectorPreset,
    *,
    data: str | Path,
    out: str | Path,
    mix: float = 0.0,
    source: str = "graft",
    weights: str | Path | None = None,
    ct_nodules: str | Path | None = None,
    backbone: str | Path | None = None,
    start: str | Path | None = None,
    seed: int = 0,
    split: str = "val",
    device: str = "cpu",
) -> Path:
    """Trains a detector, unless the folder holds it already, and judges it on a split.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with a train split and the one that judges.
        out: the run's folder: recipe.json, log.jsonl, detector.safetensors, found-SPLIT.json.
        mix: chance in [0, 1] of each normal film shown to be changed; 0 is the plain training.
        source: of `SOURCES`, what changed films get.
        weights: the generator of "graft"; None is the bundled one.
        ct_nodules: templates.npz of "ct".
        backbone: a file of `train.classifier.encoders` to start from.
        start: a detector's file to start from, in place of a backbone.
        seed: of everything random, with a start or a backbone too.
        split: "val", or "test" for final figures.
        device: "cpu" or "cuda".

    Returns:
        The file of what was found, for `train.reproduction.detector.table`.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite.
    """
    if not 0 <= mix <= 1:
        raise RunError(f"mix must be from 0 to 1, got {mix}")
    if start is not None and backbone is not None:
        raise RunError(f"give a start or a backbone, not both, got {start} and {backbone}")
    if not 0 <= round(preset.boxed * preset.batch) <= preset.batch:
        raise RunError(f"preset.boxed must be from 0 to 1, got {preset.boxed}")
    # The start's seed is the same for all runs: what differs is what they are shown.
    detector = build_detector(preset, seed=0, backbone=backbone)
    begun = load_weights(detector, start) if start is not None else digest(arrays_of(detector), {})
    put = put_of(source, weights=weights, ct_nodules=ct_nodules, seed=seed) if mix else None
    recipe: dict[str, Any] = {"preset": asdict(preset), "seed": seed, "mix": mix, "start": begun}
    recipe["source"] = source if mix else None
    if mix and source == "graft":
        recipe["generator"] = NoduleGenerator.from_pretrained(weights).weights_hash
    run, where = Run(out, recipe, begin=False), torch.device(device)
    file = run.folder / "detector.safetensors"
    detector.to(where)
    if not file.exists():
        films = read_boxed(data, "train", SIZE, normal=preset.normal)
        run.begin()
        run.rewind(0)
        draws = Draws(films, images=preset.images, batch=preset.batch, boxed=preset.boxed, seed=seed)
        shown = batches(draws, batch=preset.batch, share=mix, put=put)
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(fold(seed, 27))  # the anchors that torchvision samples for its losses
            show(detector, shown, preset, run)
        save_detector(detector, file)
        run.close()
    hashed = load_weights(detector, file)
    rows = predicted(detector, read_boxed(data, split, SIZE, normal=preset.normal))
    facts = {"split": split, "seed": seed, "git_commit": git_commit(), "detector": hashed, "recipe": recipe}
    found = run.folder / f"found-{split}.json"
    write_whole(found, json.dumps({**facts, "films": rows}).encode())
    return found


def show(detector: FasterRCNN, shown: Any, preset: DetectorPreset, run: Run) -> None:
    """Trains on batches, one update each; the global random state chooses anchors.

    Raises:
        TrainingError: losses or gradients are not finite in several updates in a row.
    """
    parameters = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, preset.learning_rate, weight_decay=preset.weight_decay)
    detector.train()
    seen, row, started = 0, 0, time.monotonic()
    told: dict[str, list[float]] = {}
    with tqdm(total=preset.images, unit="image", desc="detector") as bar:
        for images, targets in shown:
            part = seen / preset.images
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * min(part * 20 + 1e-2, 0.5 + 0.5 * math.cos(math.pi * part))
            losses = train_step(detector, optimizer, images, targets)
            row = 0 if bool(losses["norm"].isfinite()) else row + 1
            if row >= PATIENCE:
                raise TrainingError(f"losses not finite in {row} updates in a row, after {seen} images: {losses}")
            seen += len(images)
            bar.update(len(images))
            for name, value in losses.items():
                told.setdefault(name, []).append(float(value))
            if seen % 200 < preset.batch or seen >= preset.images:
                means = {k: float(f"{sum(v) / len(v):.4g}") for k, v in told.items()}
                run.log(images=seen, images_per_s=round(seen / (time.monotonic() - started), 2), **means)
                told.clear()


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="usual")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with splits and boxes")
    parser.add_argument("--out", required=True, help="the run's folder")
    parser.add_argument("--mix", type=float, default=0.0, help="chance of a normal film to be changed")
    parser.add_argument("--source", choices=SOURCES, default="graft", help="what a changed film gets")
    parser.add_argument("--weights", help="folder of the generator; the bundled one by default")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--backbone", help="findings.safetensors of train.classifier.encoders to start from")
    parser.add_argument("--start", help="detector.safetensors of another run to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", choices=("val", "test"), default="val", help="split that judges; test at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    preset, split = PRESETS[options.pop("preset")], options.pop("test")
    try:
        print(train_detector(preset, split=split, **options))
    except (RunError, TrainingError, DataError, WeightsError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
