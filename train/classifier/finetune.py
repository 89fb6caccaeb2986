"""Training of one classifier from a given start, the same way for every data set that is compared (Table 2).

A count of images shown, AdamW with one cycle, images moved a little; no early stopping: nothing is chosen on any split.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.random import fold
from train.classifier.batch import move
from train.classifier.densenet import ChestClassifier
from train.common.distributed import launch
from train.common.images import to_symmetric
from train.common.loop import Buffers, Loop, descend
from train.common.run import Run, RunError

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images (B, 1, S, S) uint8 and targets (B,) or (B, F), one epoch of them."""


@dataclass(frozen=True)
class FinetunePreset:
    """Numbers of one training."""

    size: int = 224  # side in pixels at which the network sees images
    images: int = 400_000  # to show in all
    batch: int = 32  # images a step
    learning_rate: float = 3e-4  # AdamW's largest, after a warm-up of a tenth of the images
    weight_decay: float = 1e-2  # AdamW's
    snapshot_images: int = 50_000  # a checkpoint every so many images


def finetune(
    classifier: ChestClassifier,  # at its start; one logit for each column of the targets
    epochs: Callable[[int], Batches],  # from an epoch's number to batches of `preset.batch`, the same at each call
    preset: FinetunePreset,
    run: Run,
    *,
    seed: int,  # of how images are moved
    device: str = "cpu",
    precision: str = "auto",  # of `train.common.distributed.PRECISIONS`
) -> ChestClassifier:
    """Train a classifier, or go on with it, and return it in eval mode.

    Raises:
        RunError: fewer images than a batch.
        TrainingError: losses are not finite, or nothing can be saved.
    """
    fabric = launch(device, precision=precision)
    classifier = classifier.to(memory_format=torch.channels_last).to(fabric.device)
    network = fabric.setup_module(classifier)
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
    )
    state = run.load() or {"images_seen": 0, "epoch": 0, "done": 0}
    if "classifier" in state:
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
    run.start(state["images_seen"], device=str(fabric.device))
    progress = {"images_seen": state["images_seen"], "log_images": preset.snapshot_images}
    loop = Loop(run, images=preset.images, batch=preset.batch, name=run.folder.name, **progress)
    batches = _batches(epochs, preset.batch, epoch=state["epoch"], done=state["done"])
    classifier.train()
    for seen in loop:
        loop.set_rate(optimizer, preset.learning_rate, warm_up=0.1)
        epoch, done, (images, targets) = next(batches)
        images = move(to_symmetric(images.to(fabric.device)), torch.Generator().manual_seed(fold(seed, seen, 9)))
        before = Buffers([classifier])
        logits = network(images)
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(fabric.device).float().reshape(logits.shape))
        finite = descend({"loss": loss}, optimizer, fabric=fabric, before=before)
        loop.update({"loss": loss.detach()}, finite, epoch=epoch)
        if loop.due(preset.snapshot_images):
            now = {"images_seen": loop.images_seen, "epoch": epoch, "done": done}
            state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(), **now}
            loop.try_save(partial(run.save, state, loop.images_seen))
    loop.close()
    return classifier.eval()


def _batches(
    epochs: Callable[[int], Batches], batch: int, *, epoch: int, done: int
) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
    """Yield epoch, batches of it that have been shown then, and the batch, after the `done` ones of an epoch."""
    while True:
        number = 0
        for number, found in enumerate(epochs(epoch), start=1):
            if number > done:
                yield epoch, number, found
        if not number:
            raise RunError(f"data must hold at least a batch of {batch} images, got fewer")
        epoch, done = epoch + 1, 0
