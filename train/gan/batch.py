"""Batches of real images for the GAN's training, and what the generator is asked for in each."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from train.classifier.batch import widen
from train.common.distributed import Part
from train.common.images import ImageSet
from train.gan.presets import GANPreset

DIFFERENCE_GAIN = 6.0  # a nodule adds a tenth of the image's half range or two: brings difference crops to order 1
CONTRAST = (0.045, 0.27)  # 10th and 90th percentile of the peak of superimposed nodules: see `CTNodules.superimpose`


@dataclass
class Batch:
    """One batch of real images and of what the generator is asked for."""

    images: Tensor  # (B, 1, S, S) in [-1, 1]: the nodule half first, then the normal half
    classes: Tensor  # (B,) int64, 1 nodule, 0 normal
    crops: Tensor  # (K, 2, s, s) real (image, mask) crops whose mask is known
    differences: Tensor  # (P, 3, s, s) real crops of superimposed CT nodules, see `difference_maps`
    contrasts: Tensor  # (P,) mean of each superimposed nodule inside its mask
    noise: Tensor  # (P, noise_dim), one row for each matched pair
    masks: Tensor  # (P, 1, S, S) in {0, 1}
    boxes: Tensor  # (P, 4), one box of each mask, for the crops of generated images

    def part(self, part: Part) -> "Batch":
        """Return the rows of one process: the same rows of the nodule and of the normal half."""
        halves = ("images", "classes")
        return Batch(*((part.halves if f.name in halves else part.of)(getattr(self, f.name)) for f in fields(self)))


def crop_at(maps: Tensor, boxes: Tensor, size: int, jitter: Tensor) -> Tensor:
    """Return (B, C, size, size) crops of maps (B, C, S, S) about the boxes' centres plus jitter (B, 2), kept inside."""
    side = maps.shape[-1]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + jitter
    start = (centre - size / 2).round().clamp(0, side - size).long()
    return torch.stack([m[:, y : y + size, x : x + size] for m, (x, y) in zip(maps, start.tolist(), strict=True)])


def difference_maps(differences: Tensor, masks: Tensor) -> Tensor:
    """Return (B, 3, S, S), what the discriminator of differences sees: difference, its shape (peak 1), mask."""
    peak = differences.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.01)
    return torch.cat([differences * DIFFERENCE_GAIN, differences / peak, masks], dim=1)


def mean_inside(differences: Tensor, masks: Tensor) -> Tensor:
    """Return the mean of each difference (B, 1, S, S) inside its mask, (B,); 0 for an empty mask."""
    return (differences * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def draw_masks(boxes: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Draw masks (n, 1, S, S) of the boxes, half of them boxes and half ellipses, so that shape means nothing."""
    ellipse = torch.rand(len(boxes), generator=generator) < 0.5
    square, round_ = boxes_to_masks(boxes, size, shape="box"), boxes_to_masks(boxes, size, shape="ellipse")
    return torch.where(ellipse[:, None, None, None].to(square.device), round_, square)


def draw_batch(
    images: ImageSet, prior: LocationPrior, ct: CTNodules | None, preset: GANPreset, *, seed: int, images_seen: int
) -> Batch:
    """Draw the batch after `images_seen` train images at the generator's size, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(fold(seed, images_seen))
    config = ARCHITECTURES[preset.architecture]
    size, half, device = config.image_size, preset.batch // 2, images.images.device
    crop = size // 4

    def pick(n: int, count: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator)

    def pick_images(rows: Tensor) -> Tensor:
        return images.symmetric(rows[pick(len(rows), half).to(rows.device)])

    def crops_at(maps: list[Tensor], boxes: Tensor) -> Tensor:
        jitter = (torch.rand(len(boxes), 2, generator=generator) - 0.5) * crop / 3
        return crop_at(torch.cat(maps, dim=1), boxes, crop, jitter.to(device))

    def draw_boxes() -> list[Tensor]:
        return [widen(b, 2, size).to(device) for b in prior.sample(half, generator=generator, image_size=size).boxes]

    # What the generator is asked for, and where real superimposed nodules go: two draws of the prior.
    noise = torch.randn(half, config.noise_dim, generator=generator).to(device)
    wanted, known = draw_boxes(), torch.stack([boxes[0] for boxes in draw_boxes()])
    masks, known_masks = draw_masks(wanted, size, generator), draw_masks(list(known[:, None]), size, generator)
    places = torch.stack([boxes[0] for boxes in wanted])

    # The normal half; images labelled Nodule; CT nodules superimposed on other normal images.
    normal, labelled = pick_images(images.normal), pick_images(images.nodule)
    crops, differences = torch.empty(0, 2, crop, crop, device=device), torch.empty(0, 3, crop, crop, device=device)
    contrasts = torch.empty(0, device=device)
    if ct is not None:
        background = pick_images(images.normal)
        shown, difference = ct.superimpose(background, known, generator=generator, contrast=CONTRAST)
        n = round(preset.superimposed * half)
        labelled = torch.cat([shown[:n], labelled[n:]])
        differences = crops_at([difference_maps(difference, known_masks)], known)
        contrasts = mean_inside(difference, known_masks)
        # Crops whose mask is known: superimposed, boxed by radiologists, and normal images with an empty mask.
        shown_crops = crops_at([shown, known_masks], known)
        crops = torch.cat([shown_crops[: half - half // 4], crops_at([normal, torch.zeros_like(normal)], known)])
    boxed = [i for i in images.nodule.tolist() if len(images.boxes[i])]
    if boxed and preset.crop_weight > 0:
        if ct is None:  # boxed and empty crops are then all there are
            crops = crops_at([normal, torch.zeros_like(normal)], places)
        chosen = [boxed[i] for i in pick(len(boxed), half // 4).tolist()]
        every = [(images.boxes[i] * size).to(device) for i in chosen]
        one_each = torch.cat([boxes[pick(len(boxes), 1).to(device)] for boxes in every])
        maps = [images.symmetric(torch.tensor(chosen)), draw_masks(every, size, generator)]
        crops = torch.cat([crops, crops_at(maps, one_each)])

    classes = (torch.arange(2 * half, device=device) < half).long()
    return Batch(torch.cat([labelled, normal]), classes, crops, differences, contrasts, noise, masks, places)
