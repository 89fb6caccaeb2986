"""Labelled films for the classifier's training, and its batches (METHOD 4)."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.chestxray14 import FINDINGS, ChestXray14
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from train.common.reading import Reading
from train.gan.presets import ClassifierPreset

NODULE = FINDINGS.index("Nodule")


@dataclass
class LabelledFilms:
    """Decoded films of a split.

    Attributes:
        images: (N, 1, S, S) uint8.
        labels: (N, 14) float32.
        boxes: N tensors (k, 4) of nodule boxes, XYXY in [0, 1]; empty where none is known.
        patients: (N,) int64.
    """

    images: Tensor
    labels: Tensor
    boxes: list[Tensor]
    patients: Tensor


def read_labelled(
    root: str | Path, split: str, size: int, *, any_size: bool = False, unreadable: list[str] | None = None
) -> LabelledFilms:
    """Reads all films of a split, reduced to `size` (antialiased).

    Args:
        root: ChestX-ray14's layout, and ChestX-Det_boxes.csv if there is one.
        split: "train", "val" or "test".
        size: side in pixels.
        any_size: take films of several sizes, each squeezed to the square; else they are an error.
        unreadable: gains what is wrong with each film that cannot be read and is left out.

    Raises:
        RunError: no film, films of several sizes, or too many that cannot be read.
    """
    extra = Path(root) / "ChestX-Det_boxes.csv"
    data = ChestXray14(root, split=split, extra_boxes=extra if extra.exists() else None)
    reading = Reading(data, size, any_size=any_size, desc=f"films of {split}")
    rows, images = [], []
    for i, image, _ in reading:
        rows.append(i)
        images.append(image)
    if unreadable is not None:
        unreadable += reading.unreadable
    labels, patients = torch.from_numpy(data.labels)[rows], torch.from_numpy(data.patients)[rows]
    return LabelledFilms(torch.stack(images), labels, [data.boxes_relative(i) for i in rows], patients)


def scaled(films: Tensor) -> Tensor:
    """Gives uint8 films as float32 in [-1, 1]."""
    return films.float() / 127.5 - 1


def turned(images: Tensor, masks: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives films and masks shifted, zoomed and rotated alike (5 %, 10 %, 7 degrees); contrast changes."""
    n = len(images)
    u = (torch.rand(6, n, generator=stream) * 2 - 1).to(images.device)
    angle, zoom = u[0] * math.radians(7), 1 + 0.1 * u[1]
    theta = torch.stack(
        [
            torch.stack([angle.cos() * zoom, -angle.sin() * zoom, 0.1 * u[2]], dim=1),
            torch.stack([angle.sin() * zoom, angle.cos() * zoom, 0.1 * u[3]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [n, 1, *images.shape[-2:]], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(masks, grid, align_corners=False)
    contrast, level = (1 + 0.2 * u[4])[:, None, None, None], (0.1 * u[5])[:, None, None, None]
    return (images * contrast + level).clamp(-1, 1), masks


def draw_films(
    films: LabelledFilms,
    prior: LocationPrior,
    ct: CTNodules | None,
    preset: ClassifierPreset,
    *,
    seed: int,
    images_seen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives the batch that comes after `images_seen` films, a pure function of its arguments.

    Returns:
        images (B, 1, S, S) in [-1, 1]; labels (B, 14); masks (B, 1, S, S) of known nodules; known (B,) bool: whether
        the mask says all about nodules, as it does in normal films (empty), boxed films and superimposed ones.
    """
    stream = torch.Generator().manual_seed(fold(seed, images_seen, 4))
    device = films.images.device
    size, batch = films.images.shape[-1], preset.batch
    nodule, normal = films.labels[:, NODULE] > 0, ~films.labels.any(dim=1)
    n_ct = round(batch * preset.superimposed) if ct is not None else 0
    n_nodule = round(batch * preset.nodules)

    def pick(rows: Tensor, n: int) -> Tensor:
        return rows[torch.randint(len(rows), (n,), generator=stream).to(rows.device)]

    everything = torch.arange(len(films.images), device=device)
    rows = torch.cat(
        [
            pick(everything, batch - n_ct - n_nodule),
            pick(everything[nodule], n_nodule),
            pick(everything[normal], n_ct),
        ]
    )
    images, labels = scaled(films.images[rows]), films.labels[rows].clone()
    boxes = [films.boxes[i].to(device) * size for i in rows.tolist()]
    known = normal[rows] | torch.tensor([len(b) > 0 for b in boxes], device=device)
    if ct is not None and n_ct:
        asked = prior.sample(n_ct, generator=stream, image_size=size).boxes
        first = torch.stack([grown(b[0], size) for b in asked]).to(device)
        shown, _ = ct.superimpose(images[-n_ct:], first, generator=stream)
        images = torch.cat([images[:-n_ct], shown])
        labels[-n_ct:, NODULE] = 1
        boxes[-n_ct:] = list(first[:, None])
    images, masks = turned(images, boxes_to_masks(boxes, size).to(device), stream)
    return images, labels, masks, known


def grown(box: Tensor, size: int, pixels: float = 2.0) -> Tensor:
    """Gives a box (4,) of at least so many pixels each way, inside the film."""
    half = ((box[2:] - box[:2]) / 2).clamp(min=pixels / 2)
    centre = ((box[:2] + box[2:]) / 2).clamp(min=pixels / 2, max=size - pixels / 2)
    centre = torch.minimum(torch.maximum(centre, half), size - half)
    return torch.cat([centre - half, centre + half])
