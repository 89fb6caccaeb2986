"""Training of one classifier from a given start, the same way for every data set that is compared (METHOD 8, Table 2).

A count of films shown, AdamW with one cycle, films moved a little; no early stopping: nothing is chosen on any split.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.common.labelled import scaled, turned
from train.common.run import PATIENCE, Run, RunError, TrainingError

Batches = Iterator[tuple[Tensor, Tensor]]
"""Films (B, 1, S, S) uint8 and targets (B,) or (B, F), one epoch of them."""


@dataclass(frozen=True)
class FinetunePreset:
    """Numbers of one training.

    Attributes:
        size: side in pixels at which the network sees films.
        images: films to show in all.
        batch: films a step.
        learning_rate: AdamW's largest, after a warm-up of a tenth of the images, then a cosine to zero.
        weight_decay: AdamW's.
        snapshot_images: a checkpoint every so many films.
    """

    size: int = 224
    images: int = 400_000
    batch: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    snapshot_images: int = 50_000


def finetune(
    classifier: ChestClassifier,
    epochs: Callable[[int], Batches],
    preset: FinetunePreset,
    run: Run,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    bf16: bool = True,
) -> ChestClassifier:
    """Trains a classifier, or goes on with it, and gives it in eval mode.

    Args:
        classifier: at its start; one logit for each column of the targets.
        epochs: from an epoch's number to its batches, the same at each call.
        preset: the numbers.
        run: its folder.
        seed: of how films are moved.
        device: where to train.
        bf16: bfloat16 where autocast finds it safe.

    Raises:
        RunError: fewer films than a batch.
        TrainingError: losses are not finite.
    """
    where = torch.device(device)
    classifier = classifier.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
    seen, epoch, done, row, shown = 0, 0, 0, 0, 0
    state = run.load()
    if state is not None:
        seen, epoch, done = state["images_seen"], state["epoch"], state["done"]
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    run.rewind(seen)
    total = torch.zeros((), device=where)
    classifier.train()
    with tqdm(total=preset.images, initial=seen, unit="image", desc=run.folder.name) as bar:
        while seen < preset.images:
            for number, (films, targets) in enumerate(epochs(epoch)):
                if number < done:  # shown before the run was cut
                    continue
                if seen >= preset.images:
                    break
                part = seen / preset.images
                rate = preset.learning_rate * min(part * 10 + 1e-3, 0.5 + 0.5 * math.cos(math.pi * part))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                stream = torch.Generator().manual_seed(fold(seed, seen, 9))
                images = scaled(films.to(where))
                images, _ = turned(images, torch.zeros_like(images[:, :, :1, :1]), stream)
                with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
                    logits = classifier(images)
                wanted = targets.to(where).float().reshape(logits.shape)
                loss = F.binary_cross_entropy_with_logits(logits.float(), wanted)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                slopes = [p.grad for p in classifier.parameters() if p.grad is not None]
                row = 0 if math.isfinite(float(get_total_norm(slopes))) else row + 1
                if row >= PATIENCE:
                    raise TrainingError(f"{run.folder}: loss not finite in {row} updates in a row, after {seen} films")
                if row == 0:
                    optimizer.step()
                total += loss.detach() * len(films)
                shown += len(films)
                before, seen, done = seen, seen + len(films), number + 1
                bar.update(len(films))
                if seen // preset.snapshot_images > before // preset.snapshot_images and seen < preset.images:
                    kept = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
                    run.save({**kept, "images_seen": seen, "epoch": epoch, "done": done}, seen)
            else:
                if not done:
                    raise RunError(f"data must hold at least a batch of {preset.batch} films, got fewer")
                run.log(images=seen, epoch=epoch, loss=float(total) / max(shown, 1))
                total.zero_()
                epoch, done, shown = epoch + 1, 0, 0
    return classifier.eval()


def write_classifier(classifier: ChestClassifier, path: str | Path, **facts: Any) -> None:
    """Writes a classifier's file whole or not at all."""
    aside = Path(f"{path}.partial")
    classifier.save(aside, **facts)
    os.replace(aside, path)


@torch.no_grad()
def scores_of(classifier: ChestClassifier, films: Tensor, *, bf16: bool = True, batch: int = 64) -> Tensor:
    """Gives logits (N, F) float32 on the CPU, of films (N, 1, S, S) uint8."""
    where = next(classifier.parameters()).device
    with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
        return torch.cat([classifier(scaled(part.to(where))).float().cpu() for part in films.split(batch)])
