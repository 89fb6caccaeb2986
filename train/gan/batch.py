"""Batches of real films for the GAN's training, and what the generator is asked for in each (METHOD 3, 5 and 6)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from train.common.reading import Reading
from train.common.run import RunError
from train.gan.presets import GANPreset

DIFFERENCE_GAIN = 6.0  # a nodule adds a tenth of the image's half range or two: brings difference crops to order 1
CONTRAST = (0.045, 0.27)  # 10th and 90th percentile of the peak of superimposed nodules: see `CTNodules.superimpose`


@dataclass
class Films:
    """Decoded real films on the training device, and where their nodules are known.

    Attributes:
        normal: (N0, 1, S, S) uint8, films with no finding.
        nodule: (N1, 1, S, S) uint8, films labelled Nodule.
        boxed: for each boxed film its place in `nodule` and its boxes (k, 4), XYXY in pixels of S.
    """

    normal: Tensor
    nodule: Tensor
    boxed: list[tuple[int, Tensor]]

    def to(self, device: torch.device) -> "Films":
        """Gives the same films on another device."""
        return Films(self.normal.to(device), self.nodule.to(device), [(i, b.to(device)) for i, b in self.boxed])


def read_films(
    root: str | Path,
    size: int,
    *,
    largest_box: float = 0.16,
    limit: int | None = None,
    any_size: bool = False,
    unreadable: list[str] | None = None,
) -> Films:
    """Reads the train split's normal and nodule films.

    Args:
        root: a folder in ChestX-ray14's layout with a train split, and ChestX-Det_boxes.csv if there is one.
        size: side in pixels to which films are reduced (antialiased).
        largest_box: boxes longer than this part of the side are left out (a nodule is at most 3 cm).
        limit: at most so many normal films (for trials).
        any_size: take films of several sizes, each squeezed to the square; else they are an error.
        unreadable: gains what is wrong with each film that cannot be read and is left out.

    Raises:
        RunError: no film of a class, films of several sizes, or too many that cannot be read.
    """
    extra = Path(root) / "ChestX-Det_boxes.csv"
    data = ChestXray14(
        root, split="train", target="nodule", only_normal_or_nodule=True, extra_boxes=extra if extra.exists() else None
    )
    normal, nodule, boxed = [], [], []
    rows = [i for i, target in enumerate(data.targets) if target]
    rows += [i for i, target in enumerate(data.targets) if not target][:limit]
    reading = Reading(data, size, any_size=any_size, rows=sorted(rows))
    for i, image, target in reading:
        if not target:
            normal.append(image)
            continue
        boxes = data.boxes_relative(i, "Nodule")
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amax(dim=1) <= largest_box] if len(boxes) else boxes
        if len(boxes):
            boxed.append((len(nodule), boxes * size))
        nodule.append(image)
    if unreadable is not None:
        unreadable += reading.unreadable
    if not normal or not nodule:
        raise RunError(
            f"{root}: the train split needs films of both classes, got {len(normal)} normal, {len(nodule)} nodule"
        )
    return Films(torch.stack(normal), torch.stack(nodule), boxed)


@dataclass
class Batch:
    """One batch of real films and of what the generator is asked for.

    Attributes:
        images: (B, 1, S, S) in [-1, 1]: the nodule half first, then the normal half.
        classes: (B,) int64, 1 nodule, 0 normal.
        crops: (K, 2, s, s) real (image, mask) crops whose mask is known.
        differences: (P, 3, s, s) real crops of superimposed CT nodules, see `difference_maps`.
        contrasts: (P,) mean of each superimposed nodule inside its mask.
        noise: (P, noise_dim), one row for each matched pair.
        masks: (P, 1, S, S) in {0, 1}.
        boxes: (P, 4), one box of each mask, for the crops of generated images.
    """

    images: Tensor
    classes: Tensor
    crops: Tensor
    differences: Tensor
    contrasts: Tensor
    noise: Tensor
    masks: Tensor
    boxes: Tensor


def crop_at(maps: Tensor, boxes: Tensor, size: int, jitter: Tensor) -> Tensor:
    """Gives (B, C, size, size) crops of maps (B, C, S, S) about the boxes' centres plus jitter (B, 2), kept inside."""
    side = maps.shape[-1]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + jitter
    start = (centre - size / 2).round().clamp(0, side - size).long()
    return torch.stack([m[:, y : y + size, x : x + size] for m, (x, y) in zip(maps, start.tolist(), strict=True)])


def difference_maps(differences: Tensor, masks: Tensor) -> Tensor:
    """Gives (B, 3, S, S) what the discriminator of differences sees: difference, its shape (peak 1), mask."""
    peak = differences.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.01)
    return torch.cat([differences * DIFFERENCE_GAIN, differences / peak, masks], dim=1)


def mean_inside(differences: Tensor, masks: Tensor) -> Tensor:
    """Gives the mean of each difference (B, 1, S, S) inside its mask, (B,); 0 for an empty mask."""
    return (differences * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def at_least(boxes: Tensor, pixels: float, size: int) -> Tensor:
    """Gives boxes (k, 4) grown about their centres to at least so many pixels each way, inside the image."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(min=pixels / 2)
    centre = torch.minimum(torch.maximum(centre, half), size - half)
    return torch.cat([centre - half, centre + half], dim=1)


def draw_masks(boxes: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Gives masks (n, 1, S, S) of the boxes, half of them boxes and half ellipses, so that shape means nothing."""
    ellipse = torch.rand(len(boxes), generator=generator) < 0.5
    square, round_ = boxes_to_masks(boxes, size, shape="box"), boxes_to_masks(boxes, size, shape="ellipse")
    return torch.where(ellipse[:, None, None, None].to(square.device), round_, square)


def draw_batch(
    films: Films, prior: LocationPrior, ct: CTNodules | None, preset: GANPreset, *, seed: int, images_seen: int
) -> Batch:
    """Gives the batch that comes after `images_seen` images, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(fold(seed, images_seen))
    config = ARCHITECTURES[preset.architecture]
    size, half = config.image_size, preset.batch // 2
    crop = size // 4
    device = films.normal.device

    def pick(n: int, count: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator).to(device)

    def scaled(images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def jitter(count: int) -> Tensor:
        return ((torch.rand(count, 2, generator=generator) - 0.5) * crop / 3).to(device)

    # What the generator is asked for, and where real superimposed nodules go: two draws of the prior.
    noise = torch.randn(half, config.noise_dim, generator=generator).to(device)
    asked = [at_least(b, 2, size).to(device) for b in prior.sample(half, generator=generator, image_size=size).boxes]
    known = [
        at_least(b[:1], 2, size).to(device) for b in prior.sample(half, generator=generator, image_size=size).boxes
    ]
    masks = draw_masks(asked, size, generator)
    known_masks = draw_masks(known, size, generator)
    known_boxes = torch.cat(known)

    # The normal half; CT nodules superimposed on other normal films; films labelled Nodule.
    normal = scaled(films.normal[pick(len(films.normal), half)])
    labelled = scaled(films.nodule[pick(len(films.nodule), half)])
    crops, differences = torch.empty(0, 2, crop, crop, device=device), torch.empty(0, 3, crop, crop, device=device)
    contrasts = torch.empty(0, device=device)
    if ct is not None:
        ground = scaled(films.normal[pick(len(films.normal), half)])
        shown, difference = ct.superimpose(ground, known_boxes, generator=generator, contrast=CONTRAST)
        n = round(preset.superimposed * half)
        labelled = torch.cat([shown[:n], labelled[n:]])
        differences = crop_at(difference_maps(difference, known_masks), known_boxes, crop, jitter(half))
        contrasts = mean_inside(difference, known_masks)
        # Crops whose mask is known: superimposed, boxed by radiologists, and normal films with an empty mask.
        shown_crops = crop_at(torch.cat([shown, known_masks], dim=1), known_boxes, crop, jitter(half))
        empty = crop_at(torch.cat([normal, torch.zeros_like(normal)], dim=1), known_boxes, crop, jitter(half))
        crops = torch.cat([shown_crops[: half - half // 4], empty])
    if films.boxed and preset.crop_weight > 0:
        if ct is None:  # boxed and empty crops are then all there are
            places = torch.stack([b[0] for b in asked])
            crops = crop_at(torch.cat([normal, torch.zeros_like(normal)], dim=1), places, crop, jitter(half))
        chosen = [films.boxed[i] for i in pick(len(films.boxed), half // 4).tolist()]
        boxes = [b[pick(len(b), 1)] for _, b in chosen]
        images = scaled(films.nodule[torch.tensor([i for i, _ in chosen], device=device)])
        maps = torch.cat([images, draw_masks([b for _, b in chosen], size, generator)], dim=1)
        crops = torch.cat([crops, crop_at(maps, torch.cat(boxes), crop, jitter(half // 4))])

    classes = torch.cat([torch.ones(half, dtype=torch.int64), torch.zeros(half, dtype=torch.int64)]).to(device)
    asked_boxes = torch.stack([b[0] for b in asked])
    return Batch(torch.cat([labelled, normal]), classes, crops, differences, contrasts, noise, masks, asked_boxes)
