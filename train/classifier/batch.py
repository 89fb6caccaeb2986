"""Batches of labelled images for the classifier, and how images are moved a little in all trainings here."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.presets import ClassifierPreset
from train.common.images import NODULE, ImageSet


def draw_batch(
    images: ImageSet,  # of the train split
    prior: LocationPrior,  # of the places of superimposed nodules
    ct: CTNodules | None,  # nodules to superimpose
    preset: ClassifierPreset,
    *,
    seed: int,
    images_seen: int,
) -> tuple[Tensor, Tensor]:
    """Return images (B, 1, S, S) in [-1, 1] and labels (B, 14) that come after `images_seen`, a pure function."""
    generator = torch.Generator().manual_seed(fold(seed, images_seen, 4))
    size, device = images.images.shape[-1], images.images.device
    n_ct = round(preset.batch * preset.superimposed) if ct is not None else 0
    n_nodule = round(preset.batch * preset.nodules)

    def pick(rows: Tensor, n: int) -> Tensor:
        return rows.cpu()[torch.randint(len(rows), (n,), generator=generator)]

    anything = pick(torch.arange(len(images)), preset.batch - n_ct - n_nodule)
    rows = torch.cat([anything, pick(images.nodule, n_nodule), pick(images.normal, n_ct)])
    shown, labels = images.symmetric(rows), images.labels[rows.to(device)].clone()
    if ct is not None and n_ct:
        boxes = torch.stack([b[0] for b in prior.sample(n_ct, generator=generator, image_size=size).boxes])
        boxes = widen(boxes, 2, size).to(device)
        shown[-n_ct:] = ct.superimpose(shown[-n_ct:], boxes, generator=generator)[0]
        labels[-n_ct:, NODULE] = 1
    return move(shown, generator), labels


def widen(boxes: Tensor, pixels: float, size: int) -> Tensor:
    """Return boxes (k, 4) widened about their centres to at least so many pixels each way, inside the image."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(min=pixels / 2)
    centre = torch.minimum(torch.maximum(centre, half), size - half)
    return torch.cat([centre - half, centre + half], dim=1)


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 1, S, S) shifted, zoomed and rotated (5 %, 10 %, 7 degrees), with other contrast and level."""
    u = (torch.rand(6, len(images), generator=generator) * 2 - 1).to(images.device)
    angle, zoom = u[0] * math.radians(7), 1 + 0.1 * u[1]
    along, across = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([along, -across, 0.1 * u[2]], dim=1), torch.stack([across, along, 0.1 * u[3]], dim=1)
    return warp(images, torch.stack(rows, dim=1), 1 + 0.2 * u[4], 0.1 * u[5])


def warp(images: Tensor, theta: Tensor, contrast: Tensor, level: Tensor) -> Tensor:
    """Return images (B, 1, S, S) at the places of affine maps (B, 2, 3), times a contrast (B,), plus a level (B,)."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (images * contrast[:, None, None, None] + level[:, None, None, None]).clamp(-1, 1)
