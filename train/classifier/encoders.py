"""Two encoders for FID and KID, trained on real films: `python -m train.classifier.encoders --data FOLDER --out runs/encoders`.

EVIDENCE, Quality: two extractors, neither the one that CARIM used. No weights of an Inception network are asked for, so
distances in these features compare with each other and with their own real-against-real floor, never with a published
FID. "findings" is a ResNet-18 that learns the 14 findings; "contrast" a ShuffleNet that learns, without labels, which
two views are of the same film (SimCLR, Chen et al. 2020).
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, shufflenet_v2_x1_0
from tqdm import tqdm

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import read_sealed, write_sealed
from train.common.labelled import LabelledFilms, read_labelled, scaled, turned
from train.common.run import git_commit
from train.metrics.patches import auc

KINDS: tuple[str, ...] = ("findings", "contrast")
"""What an encoder learnt from."""

FORMAT = "carim-aug-encoder"
TEMPERATURE = 0.2  # of the contrast's softmax


@dataclass(frozen=True)
class EncoderPreset:
    """Numbers of one encoder's training.

    Attributes:
        size: side in pixels at which the network sees films.
        images: films to show in all; "contrast" sees two views of each.
        batch: films a step.
        learning_rate: AdamW's largest, after a warm-up of a twentieth of the images, then a cosine to zero.
    """

    size: int = 128
    images: int = 10_000
    batch: int = 64
    learning_rate: float = 2e-3


PRESETS: dict[str, EncoderPreset] = {"usual": EncoderPreset(), "tiny": EncoderPreset(size=32, images=32, batch=8)}


class Encoder(nn.Module):
    """A film's features: a torchvision network with one grey channel, up to its global average pool.

    Args:
        kind: of `KINDS`.
        size: side in pixels to which images are resized (bilinear, antialiased).
    """

    def __init__(self, kind: str, *, size: int = 128) -> None:
        """Makes an untrained encoder; the global random state gives its weights."""
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if size < 32:
            raise ValueError(f"size must be at least 32, got {size}")
        self.kind, self.size = kind, size
        trunk: nn.Module
        if kind == "findings":
            trunk = resnet18(weights=None)
            trunk.conv1, self.dim = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False), 512
        else:
            trunk = shufflenet_v2_x1_0(weights=None)
            trunk.conv1[0], self.dim = nn.Conv2d(1, 24, 3, stride=2, padding=1, bias=False), 1024
        trunk.fc = nn.Identity()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        """Gives features (N, D) of images (N, 1, S, S) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be float (N, 1, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        if images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.trunk(images)


def save_encoder(encoder: Encoder, path: str | Path, **provenance: object) -> None:
    """Writes an encoder and what else is given (plain JSON types) to a sealed safetensors file."""
    texts = {
        "format": FORMAT,
        "kind": encoder.kind,
        "size": str(encoder.size),
        "provenance": json.dumps(provenance),
    }
    write_sealed(path, {k: v.detach().cpu().contiguous().numpy() for k, v in encoder.state_dict().items()}, texts)


def load_encoder(path: str | Path) -> Encoder:
    """Gives a trained encoder in eval mode on the CPU, its parameters without gradient.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no encoder.
    """
    arrays, texts, sealed = read_sealed(path)
    if texts.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a file that train.classifier.encoders wrote, got format {texts.get('format')!r}"
        )
    if not sealed:
        raise ValueError(f"{path} does not match its own SHA-256, so something in it has changed: train it again")
    with torch.device("meta"):
        encoder = Encoder(texts["kind"], size=int(texts["size"]))
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def features_of(encoder: Encoder, images: Tensor, *, batch: int = 64) -> Tensor:
    """Gives features (N, D) float32 on the CPU.

    Args:
        encoder: in eval mode.
        images: (N, 1, S, S) uint8, or float in [-1, 1].
        batch: images at once.
    """
    where = next(encoder.parameters()).device
    parts = []
    for part in images.split(batch):
        part = part.to(where)
        parts.append(encoder(part if part.is_floating_point() else scaled(part)).float().cpu())
    return torch.cat(parts)


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """Gives SimCLR's loss, a scalar: each view must pick its film's other view among all others of the batch.

    Args:
        first: (B, D) projections of one view of each film.
        second: (B, D) of the other.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = views @ views.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views), device=views.device).roll(len(first)))


def views_of(images: Tensor, stream: torch.Generator) -> Tensor:
    """Gives a random part of each film (B, 1, S, S), half to all of its width, with another contrast and level."""
    u = torch.rand(5, len(images), generator=stream).to(images.device)
    part = 0.5 + 0.5 * u[0]
    shift = (1 - part)[:, None] * (2 * u[1:3].T - 1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = part, part, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, level = (0.7 + 0.6 * u[3])[:, None, None, None], (0.4 * u[4] - 0.2)[:, None, None, None]
    return (views * contrast + level).clamp(-1, 1)


def train_encoder(
    kind: str, films: LabelledFilms, preset: EncoderPreset, *, seed: int = 0, device: str = "cpu"
) -> Encoder:
    """Gives an encoder trained on films, in eval mode; its head is thrown away.

    Args:
        kind: of `KINDS`.
        films: of the train split, at the preset's size.
        preset: the numbers.
        seed: of everything random.
        device: "cpu" or "cuda".
    """
    if len(films.images) < preset.batch:
        raise ValueError(f"films must be at least a batch of {preset.batch}, got {len(films.images)}")
    where = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 11))
        encoder = Encoder(kind, size=preset.size)
        head: nn.Module = nn.Linear(encoder.dim, len(FINDINGS))
        if kind == "contrast":
            head = nn.Sequential(nn.Linear(encoder.dim, 256), nn.ReLU(), nn.Linear(256, 128))
    encoder, head = encoder.to(where, memory_format=torch.channels_last).train(), head.to(where)

    def findings_step(images: Tensor, labels: Tensor, stream: torch.Generator) -> Tensor:
        shown, _ = turned(images, torch.zeros_like(images), stream)
        return F.binary_cross_entropy_with_logits(head(encoder(shown)).float(), labels)

    def contrast_step(images: Tensor, labels: Tensor, stream: torch.Generator) -> Tensor:
        both = torch.cat([views_of(images, stream), views_of(images, stream)])
        return contrast_loss(*head(encoder(both)).chunk(2))

    step: Callable[..., Tensor] = findings_step if kind == "findings" else contrast_step
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, preset.learning_rate, weight_decay=1e-2)
    for seen in tqdm(range(0, preset.images, preset.batch), desc=kind, unit="batch"):
        stream = torch.Generator().manual_seed(fold(seed, seen, 12))
        part = seen / preset.images
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * min(part * 20 + 1e-2, 0.5 + 0.5 * math.cos(math.pi * part))
        rows = torch.randperm(len(films.images), generator=stream)[: preset.batch]
        with torch.autocast(where.type, torch.bfloat16):
            loss = step(scaled(films.images[rows].to(where)), films.labels[rows].to(where), stream)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss of {kind} is not finite after {seen} films")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def patient_match(features: Tensor, patients: Tensor) -> tuple[float, float]:
    """Gives how often a film's nearest other film is of the same patient, and how often one drawn by chance would be.

    Args:
        features: (N, D), compared by cosine after their mean is taken away.
        patients: (N,) int64; those with one film do not ask, but can be found.
    """
    unit = F.normalize(features - features.mean(0), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=1)
    others = (patients[:, None] == patients).sum(dim=1) - 1
    asked = others > 0
    if not bool(asked.any()):
        return math.nan, math.nan
    hits = patients[nearest] == patients
    return float(hits[asked].float().mean()), float(others[asked].float().mean() / (len(patients) - 1))


def finding_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, ridge: float = 0.1) -> float:
    """Gives the AUC of a linear probe for "any finding", by ridge regression on standardised features.

    Args:
        train: features (N, D) and labels (N, 14).
        test: the same of other patients.
        ridge: penalty, relative to the number of films.
    """
    mean, spread = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, y = ((f - mean) / spread for f in (train[0], test[0]))
    wanted = train[1].any(dim=1).float()
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1])
    scores = y @ torch.linalg.solve(gram, x.T @ (wanted - wanted.mean()))
    has = test[1].any(dim=1)
    return float(auc(scores[has], scores[~has]))


def train_encoders(
    preset: EncoderPreset, *, data: str | Path, out: str | Path, seed: int = 0, device: str = "cpu"
) -> list[Path]:
    """Trains both encoders on the train split, and says on val what they know; one that is there already is kept.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with train and val splits.
        out: the folder of `findings.safetensors`, `contrast.safetensors` and `report.json`.
        seed: of everything random.
        device: "cpu" or "cuda".

    Returns:
        The encoders' files.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train, val = (read_labelled(data, split, preset.size) for split in ("train", "val"))
    paths, figures = [], {}
    for kind in KINDS:
        path, started = folder / f"{kind}.safetensors", time.monotonic()
        if not path.exists():
            encoder = train_encoder(kind, train, preset, seed=seed, device=device)
            commit = git_commit()
            save_encoder(encoder, path, preset=asdict(preset), seed=seed, films=len(train.images), git_commit=commit)
        seconds = time.monotonic() - started
        encoder = load_encoder(path).to(device)
        known, asked = features_of(encoder, train.images), features_of(encoder, val.images)
        hit, chance = patient_match(asked, val.patients)
        any_finding = finding_probe((known, train.labels), (asked, val.labels))
        figures[kind] = {
            "features": encoder.dim,
            "patient_match": hit,
            "patient_chance": chance,
            "any_finding_auc": any_finding,
            "seconds": round(seconds),
        }
        paths.append(path)
    (folder / "report.json").write_text(json.dumps(figures, indent=2))
    return paths


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="usual")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--out", required=True, help="the folder of both encoders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    paths = train_encoders(PRESETS[args.preset], data=args.data, out=args.out, seed=args.seed, device=args.device)
    print(*paths, sep="\n")
    print((Path(args.out) / "report.json").read_text())


if __name__ == "__main__":
    main()
