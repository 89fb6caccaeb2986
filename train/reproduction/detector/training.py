"""A Faster R-CNN trained on real nodule boxes, with nodules of a source in some of the normal images or without."""

import json
import os
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

from carim_aug.ops.precision import autocast
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import digest, read_sealed, write_sealed
from train.classifier.densenet import arrays_of
from train.classifier.encoders import load_encoder
from train.common.distributed import resolve_precision
from train.common.images import ImageSet
from train.common.loop import Loop
from train.common.run import Run, RunError, git_commit, write_whole
from train.reproduction.detector.data import SIZE, Target, draw_batches, make_mix, read_boxed

FORMAT = "carim-aug-detector"
LEVELS = (1, 2, 3)  # ResNet's layers that the pyramid takes, of stride 4, 8 and 16
ANCHORS = ((6.0, 9.0), (13.0, 19.0), (27.0, 38.0))  # sides at each level; nodules are 5 to 45 pixels of 256


@dataclass(frozen=True)
class DetectorPreset:
    """Numbers of a detector's training."""

    images: int = 2_400  # to show in all
    batch: int = 8  # images a step
    boxed: float = 0.25  # share of each batch that is real boxed images
    learning_rate: float = 3e-4  # AdamW's largest; see `train.common.loop.Loop.set_rate`
    weight_decay: float = 1e-2  # AdamW's
    channels: int = 64  # of the pyramid's maps
    normal: int | None = None  # at most so many normal images, of the train split and of the one that scores it


PRESETS: dict[str, DetectorPreset] = {
    "usual": DetectorPreset(),
    "start": DetectorPreset(images=6_000, boxed=0.0, learning_rate=1e-3),
    "tiny": DetectorPreset(images=8, batch=4, channels=16, normal=4),
}


# --- The network and its weights ---
def build_detector(preset: DetectorPreset, *, backbone: str | Path | None = None) -> FasterRCNN:
    """Return an untrained detector of one class for grey images (1, 256, 256) in [0, 1], the same for all runs.

    ResNet-18 without its last layer, whose stride of 32 is coarser than a nodule, and a pyramid of three levels. The
    ResNet may start from `backbone`, a file of `train.classifier.encoders` of kind "findings".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(0, 26))
        trunk = resnet18(weights=None)
        trunk.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        if backbone is not None:
            try:
                encoder = load_encoder(backbone)
            except (OSError, ValueError) as error:
                raise RunError(f"backbone must be a file of train.classifier.encoders: {error}") from error
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


def load_detector(detector: FasterRCNN, path: str | Path) -> str:
    """Load a file's weights into a detector, and return their SHA-256."""
    try:
        arrays, texts, sealed = read_sealed(path)
    except (FileNotFoundError, ValueError) as error:
        raise RunError(f"{path}: {error}") from error
    if texts.get("format") != FORMAT or not sealed:
        raise RunError(
            f"{path} must be a whole file of train.reproduction.detector, got format {texts.get('format')!r}"
        )
    try:
        detector.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()})
    except RuntimeError as error:
        raise RunError(f"{path} must be of a detector of the same preset ({str(error)[:200]})") from error
    return digest(arrays, {})


# --- Training and detection ---
def train_step(
    detector: FasterRCNN, optimizer: torch.optim.Optimizer, images: list[Tensor], targets: list[Target]
) -> tuple[dict[str, Tensor], bool]:
    """Make one update, unless a loss or a gradient is not finite; return the losses, and whether it was made."""
    device = next(detector.parameters()).device
    targets = [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]
    with autocast(device):
        losses = detector([image.to(device) for image in images], targets)
    optimizer.zero_grad(set_to_none=True)
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    norm = nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
    finite = bool(norm.isfinite())
    if finite:
        optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}, finite


@torch.inference_mode()
def detect(detector: FasterRCNN, images: ImageSet, *, batch: int = 16) -> list[dict[str, Any]]:
    """Return name, patient, true boxes, and predicted boxes with scores of each image, seen in float32."""
    detector.eval()
    device = next(detector.parameters()).device
    found: list[list[list[float]]] = []
    for part in tqdm(images.images.split(batch), desc="detection", unit="batch"):
        for one in detector(list(part.to(device).float() / 255)):
            boxes = torch.cat([one["boxes"], one["scores"][:, None]], dim=1).cpu().double().tolist()
            found.append([[round(v, 4) for v in box] for box in boxes])
    nodules = [(boxes * SIZE).tolist() for boxes in images.boxes]
    rows = zip(images.names, images.patients.tolist(), nodules, found, strict=True)
    return [dict(zip(("name", "patient", "nodules", "found"), row, strict=True)) for row in rows]


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
    """Train a detector, unless the folder holds it already, and return the file of what it finds in a split.

    The mix is the chance in [0, 1] of each normal image shown to be changed (0: the plain training), by a source of
    `make_mix`, which says what `weights` and `ct_nodules` are. The start is a detector's file, or a backbone's of
    `train.classifier.encoders`. The folder holds recipe.json, log.jsonl, detector.safetensors, found-SPLIT.json.

    Raises:
        RunError: something does not fit; nothing was trained.
        TrainingError: losses are not finite.
    """
    if not 0 <= mix <= 1:
        raise RunError(f"mix must be from 0 to 1, got {mix}")
    if start is not None and backbone is not None:
        raise RunError(f"start and backbone must not be given both, got {start} and {backbone}")
    if not 0 <= round(preset.boxed * preset.batch) <= preset.batch:
        raise RunError(f"preset.boxed must be from 0 to 1, got {preset.boxed}")
    detector = build_detector(preset, backbone=backbone)
    start_hash = digest(arrays_of(detector), {}) if start is None else load_detector(detector, start)
    mixing = make_mix(source, weights=weights, ct_nodules=ct_nodules, seed=seed) if mix else None
    recipe: dict[str, Any] = {"preset": asdict(preset), "seed": seed, "mix": mix, "start": start_hash}
    recipe |= {"source": source if mix else None, "precision": resolve_precision("auto", device)}
    if mixing is not None and source == "graft":
        recipe["generator"] = mixing.weights_hash
    run = Run(out, recipe, begin=False)
    file, where = run.folder / "detector.safetensors", torch.device(device)
    detector.to(where)
    if not file.exists():
        images = read_boxed(data, "train", normal=preset.normal)
        run.start(0)
        plan: dict[str, Any] = {"count": preset.images, "batch": preset.batch, "boxed": preset.boxed, "seed": seed}
        batches = draw_batches(images, mixing, share=mix, **plan)
        optimizer = torch.optim.AdamW(detector.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
        loop = Loop(run, images=preset.images, batch=preset.batch, name="detector", log_images=200)
        detector.train()
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(fold(seed, 27))  # the anchors that torchvision samples for its losses
            for _ in loop:
                loop.set_rate(optimizer, preset.learning_rate)
                loop.update(*train_step(detector, optimizer, *next(batches)))
        loop.close()
        write_sealed(run.folder / f"{file.name}.partial", arrays_of(detector), {"format": FORMAT})
        os.replace(run.folder / f"{file.name}.partial", file)  # whole or not at all
    facts = {"split": split, "seed": seed, "git_commit": git_commit(), "detector": load_detector(detector, file)}
    rows = detect(detector, read_boxed(data, split, normal=preset.normal))
    found = run.folder / f"found-{split}.json"
    write_whole(found, json.dumps({**facts, "recipe": recipe, "images": rows}).encode())
    return found
