"""Samples of any generator for the figures: of whole images at masks, or by class alone.

Sample i has the same place, relative to the image, and the same seed whatever the generator and however many samples
are asked for.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from carim_aug.generators.base import ImageSource
from carim_aug.location.prior import Prior
from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes
from carim_aug.ops.random import stream
from train.metrics.generator_quality import FigurePreset, Pairs, matched_pairs

GROW = 0.25  # by which part of its width and height a mask is dilated on each side
MOST_TRIES = 200  # draws for a place apart from another one


class ByClass:
    """A class source behind masks: any mask that is not empty asks for a nodule, which is then wherever it is."""

    def __init__(self, source: Any) -> None:
        self.source, self.image_size, self.weights_hash = source, source.image_size, source.weights_hash

    def images(self, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return images by class; see `carim_aug.generators.base.ImageSource`."""
        return self.source.class_images(masks.flatten(1).any(dim=1), seeds)


def knows_place(source: Any) -> bool:
    """Return whether a generator puts its nodules where the masks are."""
    return hasattr(source, "images")


def as_image_source(source: Any) -> ImageSource:
    """Return a generator that takes masks, whatever it does with them."""
    return source if knows_place(source) else ByClass(source)


def check_least(least: int, **numbers: int) -> None:
    """Raise ValueError unless all numbers, by their names, are at least as large."""
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def draw_boxes(prior: Prior, n: int, *, seed: int, apart: Tensor | None = None) -> Tensor:
    """Draw n places (n, 4), XYXY in [0, 1], the first box of each of the prior's draws.

    Each is drawn until it does not touch its own of the boxes `apart` (n, 4), dilated by `GROW`.
    """
    check_least(1, n=n)
    if apart is not None and len(apart) != n:
        raise ValueError(f"apart must be of {n} boxes, got {len(apart)}")
    taken = None if apart is None else dilate_boxes(apart, GROW, 1)
    boxes = []
    for i in range(n):
        rng = stream(seed, 0, i)
        for _ in range(MOST_TRIES):
            box = torch.from_numpy(prior.draw(rng)[0])
            if taken is None or bool((box[2:] <= taken[i, :2]).any() or (taken[i, 2:] <= box[:2]).any()):
                break
        else:
            raise ValueError(f"prior must have a place apart from box {i} of apart, got none in {MOST_TRIES} draws")
        boxes.append(box)
    return torch.stack(boxes)


def generate(source: Any, boxes: Tensor | None, seeds: list[int], *, batch: int = 50) -> Tensor:
    """Return images (n, 1, S, S) of a generator, at boxes (n, 4) XYXY in [0, 1], one an image, or normal ones."""
    check_least(1, batch=batch)
    size, parts = source.image_size, []
    for start in range(0, len(seeds), batch):
        own = seeds[start : start + batch]
        masks = torch.zeros(len(own), 1, size, size)
        if boxes is not None:
            masks = boxes_to_masks(list(boxes[start : start + batch, None] * size), size)
        parts.append(as_image_source(source).images(masks, own).float())
    return torch.cat(parts)


def pairs_of(
    source: Any, prior: Prior, n: int, *, seed: int = 0, batch: int = 50, device: torch.device | str = "cpu"
) -> Pairs:
    """Return n matched pairs of any generator, as `train.metrics.generator_quality` measures them."""
    check_least(1, n=n, batch=batch)
    preset = FigurePreset(pairs=n, batch=batch)
    return matched_pairs(as_image_source(source), prior, preset, seed=seed, device=device)


def as_picture(figure: Figure, about: str) -> Image.Image:
    """Return a matplotlib figure as an RGB picture whose `info["carim_aug"]` is `about`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    picture = Image.open(file).convert("RGB")
    picture.info["carim_aug"] = about
    return picture
