"""Two encoders for FID and KID: `python -m train.classifier.encoders --data FOLDER --out runs/encoders`.

Neither is the classifier that CARIM used. No weights of an Inception network are asked for, so distances in these
features compare with each other and with their own real-against-real floor, never with a published FID. "findings" is a
ResNet-18 that learns the 14 findings; "contrast" a ShuffleNet that learns, without labels, which two views are of the
same image (SimCLR, Chen et al. 2020).
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, shufflenet_v2_x1_0

from carim_aug.ops.findings import FINDINGS
from carim_aug.ops.precision import autocast
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import read_sealed, write_sealed
from train.classifier.batch import move, warp
from train.classifier.densenet import arrays_of, resize_grey
from train.common.command import named_errors, read_options, recipe_parser
from train.common.images import ImageSet, read_images, to_symmetric
from train.common.loop import Loop, descend
from train.common.run import RunError, git_commit, write_whole
from train.metrics.statistics import auc

KINDS: tuple[str, ...] = ("findings", "contrast")  # what an encoder learns from
FORMAT = "carim-aug-encoder"
TEMPERATURE = 0.2  # of the contrast's softmax


@dataclass(frozen=True)
class EncoderPreset:
    """Numbers of one encoder's training."""

    size: int = 128  # side in pixels at which the network sees images
    images: int = 10_000  # to show in all; "contrast" sees two views of each
    batch: int = 64  # images a step
    learning_rate: float = 2e-3  # AdamW's largest; see `train.common.loop.Loop.set_rate`


PRESETS: dict[str, EncoderPreset] = {"usual": EncoderPreset(), "tiny": EncoderPreset(size=32, images=32, batch=8)}


class Encoder(nn.Module):
    """Features of images, resized to a side: a torchvision network with one grey channel up to its pool, untrained."""

    def __init__(self, kind: str, *, size: int = 128) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if size < 32:
            raise ValueError(f"size must be at least 32, got {size}")
        self.kind, self.size = kind, size
        trunk: Any
        if kind == "findings":
            trunk = resnet18(weights=None)
            trunk.conv1, self.dim = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False), 512
        else:
            trunk = shufflenet_v2_x1_0(weights=None)
            trunk.conv1[0], self.dim = nn.Conv2d(1, 24, 3, stride=2, padding=1, bias=False), 1024
        trunk.fc = nn.Identity()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of images (N, 1, S, S) in [-1, 1]."""
        return self.trunk(resize_grey(images, self.size))


def save_encoder(encoder: Encoder, path: str | Path, **provenance: object) -> None:
    """Write an encoder and what else is given (plain JSON types) to a sealed safetensors file."""
    texts = {"format": FORMAT, "kind": encoder.kind, "size": str(encoder.size), "provenance": json.dumps(provenance)}
    write_sealed(path, arrays_of(encoder), texts)


def load_encoder(path: str | Path) -> Encoder:
    """Return a trained encoder in eval mode on the CPU, its parameters without gradient; ValueError if it is none."""
    arrays, texts, sealed = read_sealed(path)
    if (found := texts.get("format")) != FORMAT:
        raise ValueError(f"{path} must be a file that train.classifier.encoders wrote, got format {found!r}")
    if not sealed:
        raise ValueError(f"{path} does not match its own SHA-256, so something in it has changed: train it again")
    with torch.device("meta"):
        encoder = Encoder(texts["kind"], size=int(texts["size"]))
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def features_of(encoder: Encoder, images: Tensor, *, batch: int = 64) -> Tensor:
    """Return features (N, D) float32 on the CPU, of images (N, 1, S, S) uint8 or float in [-1, 1], `batch` at once."""
    device, features = next(encoder.parameters()).device, []
    for part in images.split(batch):
        part = part.to(device)
        features.append(encoder(part if part.is_floating_point() else to_symmetric(part)).float().cpu())
    return torch.cat(features)


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return SimCLR's loss: each view (B, D) must pick its image's other view (B, D) among all others of the batch."""
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = views @ views.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views), device=views.device).roll(len(first)))


def views_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random part of each image (B, 1, S, S), half to all of its width, with another contrast and level."""
    u = torch.rand(5, len(images), generator=generator).to(images.device)
    part = 0.5 + 0.5 * u[0]
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = part, part, (1 - part)[:, None] * (2 * u[1:3].T - 1)
    return warp(images, theta, 0.7 + 0.6 * u[3], 0.4 * u[4] - 0.2)


def train_encoder(kind: str, images: ImageSet, preset: EncoderPreset, *, seed: int = 0, device: str = "cpu") -> Encoder:
    """Train an encoder on the train split's images and return it in eval mode, without the head that it learns with."""
    if len(images) < preset.batch:
        raise RunError(f"images must be at least a batch of {preset.batch}, got {len(images)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 11))
        encoder = Encoder(kind, size=preset.size)
        head: nn.Module = nn.Linear(encoder.dim, len(FINDINGS))
        if kind == "contrast":
            head = nn.Sequential(nn.Linear(encoder.dim, 256), nn.ReLU(), nn.Linear(256, 128))
    encoder, head = encoder.to(memory_format=torch.channels_last).to(device).train(), head.to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, preset.learning_rate, weight_decay=1e-2)
    loop = Loop(None, images=preset.images, batch=preset.batch, name=kind)
    for seen in loop:
        loop.set_rate(optimizer, preset.learning_rate)
        generator = torch.Generator().manual_seed(fold(seed, seen, 12))
        rows = torch.randperm(len(images), generator=generator)[: preset.batch]
        shown, labels = images.symmetric(rows).to(device), images.labels[rows].to(device)
        with autocast(device):
            if kind == "findings":
                loss = F.binary_cross_entropy_with_logits(head(encoder(move(shown, generator))).float(), labels)
            else:
                both = torch.cat([views_of(shown, generator), views_of(shown, generator)])
                loss = contrast_loss(*head(encoder(both)).chunk(2))
        loop.update({kind: loss.detach()}, descend({kind: loss}, optimizer))
    loop.close()
    return encoder.eval().requires_grad_(False)


def patient_match(features: Tensor, patients: Tensor) -> tuple[float, float]:
    """Return how often the nearest other image, by cosine of centred features (N, D), is of its patient, and chance."""
    unit = F.normalize(features - features.mean(0), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=1)
    others = (patients[:, None] == patients).sum(dim=1) - 1
    several = others > 0
    if not bool(several.any()):
        return math.nan, math.nan
    hits = patients[nearest] == patients
    return float(hits[several].float().mean()), float(others[several].float().mean() / (len(patients) - 1))


def finding_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, ridge: float = 0.1) -> float:
    """Return the AUC of ridge regression of "any finding" on features (N, D), labels (N, 14) of train, then of test."""
    mean, spread = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, y = ((f - mean) / spread for f in (train[0], test[0]))
    wanted = train[1].any(dim=1).float()
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1])
    scores = y @ torch.linalg.solve(gram, x.T @ (wanted - wanted.mean()))
    has = test[1].any(dim=1)
    return float(auc(scores[has], scores[~has]))


def train_encoders(
    preset: EncoderPreset,
    *,
    data: str | Path,  # ChestX-ray14's layout with train and val splits
    out: str | Path,  # the folder of both encoders, where they stay once trained, and of report.json
    seed: int = 0,
    device: str = "cpu",
    any_size: bool = False,  # take images of several sizes, each squeezed to a square
) -> list[Path]:
    """Train both encoders on the train split, report on val what they know, and return their files."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train, val = (read_images(data, split, preset.size, any_size=any_size) for split in ("train", "val"))
    paths, figures = [folder / f"{kind}.safetensors" for kind in KINDS], {}
    for kind, path in zip(KINDS, paths, strict=True):
        started = time.monotonic()
        if not path.exists():
            encoder = train_encoder(kind, train, preset, seed=seed, device=device)
            facts = {"preset": asdict(preset), "seed": seed, "images": len(train), "git_commit": git_commit()}
            save_encoder(encoder, path, **facts)
        seconds = time.monotonic() - started
        encoder = load_encoder(path).to(device)
        of_train, of_val = features_of(encoder, train.images), features_of(encoder, val.images)
        hit, chance = patient_match(of_val, val.patients)
        probe = finding_probe((of_train, train.labels), (of_val, val.labels))
        row = {"features": encoder.dim, "patient_match": hit, "patient_chance": chance, "any_finding_auc": probe}
        figures[kind] = {**row, "seconds": round(seconds)}
    write_whole(folder / "report.json", json.dumps(figures, indent=2).encode())
    return paths


def main() -> None:
    """Run the recipe from the command line."""
    names = ("--preset", "--set", "--data", "--out", "--any-size", "--seed", "--device")
    parser = recipe_parser(__doc__, *names, preset={"default": "usual", "help": f"one of {', '.join(PRESETS)}"})
    with named_errors():
        preset, options = read_options(parser, PRESETS)
        paths = train_encoders(preset, **options)
    print(*paths, sep="\n")
    print((paths[0].parent / "report.json").read_text())


if __name__ == "__main__":
    main()
