"""The quality of a generator in plain numbers: realism, memorisation, what a mask changes, what a classifier sees.

Each function returns JSON types only, so that the report can keep them. Intervals are 95 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from scipy.stats import ks_2samp, ttest_rel
from torch import Tensor

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.base import ImageSource
from carim_aug.location.prior import Prior
from carim_aug.ops.boxes import MaskShape, boxes_to_masks
from carim_aug.ops.cam import activation_map, enlarge, normalize_map
from carim_aug.ops.images import resize, ring_contrast
from carim_aug.ops.random import fold, stream
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.graft import graft
from train.metrics.fid import frechet_distance, kernel_distance, kernel_interval
from train.metrics.memorisation import low_resolution, memorisation
from train.metrics.pairs import argmax_hit, energy_inside, equivariance, half_width, roundness
from train.metrics.statistics import average, estimate, share, spread

LOOSE = 1.6  # official boxes are so many times as wide as their nodules
LEAST_SIDE = 5  # pixels of a box below which neither roundness nor width says anything
MOST_BOXES = 8  # of an image that counts in the real contrast: one image holds 24 skin nodules


class RealImages(Protocol):
    """What is asked of real images, as `train.common.images.ImageSet` has it."""

    images: Tensor
    patients: Tensor
    boxes: list[Tensor]
    official: list[Tensor]

    @property
    def normal(self) -> Tensor:
        """Rows of the images without any finding."""


@dataclass(frozen=True)
class FigurePreset:
    """How much is generated and resampled."""

    pairs: int = 800  # matched pairs, whose two halves are also the generated normal and nodule images
    moved: int = 300  # of these, done again with the mask moved, and with masks at random places
    splits: int = 40  # of the real images in two halves of other patients
    draws: int = 400  # bootstrap samples
    batch: int = 50  # images at once


@dataclass
class Pairs:
    """Matched pairs of one generator: the same seed without and with a mask of one box."""

    seeds: list[int]
    boxes: Tensor  # (n, 4) XYXY in pixels
    without: Tensor  # (n, 1, S, S), [-1, 1]
    nodule: Tensor  # (n, 1, S, S)
    generate: Callable[..., Tensor]  # (seeds, boxes or None for no box, shape of the mask) to images

    @property
    def differences(self) -> Tensor:
        """Image with the mask minus image without, (n, 1, S, S)."""
        return self.nodule - self.without


def matched_pairs(
    source: ImageSource, prior: Prior, preset: FigurePreset, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Pairs:
    """Return pairs at the first box of each of the prior's draws, generated on a device; they lie on the CPU.

    Every pair has its own streams: pair i has the same seed, and the same place relative to the image, whatever the
    generator's size and however many pairs there are.
    """
    size = source.image_size

    def generate(seeds: list[int], boxes: Tensor | None, shape: MaskShape = "box") -> Tensor:
        of_none = [torch.empty(0, 4)] * len(seeds)
        masks = boxes_to_masks(of_none if boxes is None else list(boxes[:, None]), size, shape=shape)
        places = [slice(i, i + preset.batch) for i in range(0, len(seeds), preset.batch)]
        with torch.no_grad():
            return torch.cat([source.images(masks[some].to(device), seeds[some]).cpu() for some in places])

    seeds = [fold(seed, 30, i) for i in range(preset.pairs)]
    places = [prior.draw(stream(fold(seed, 31), 0, i), size)[0] for i in range(preset.pairs)]
    boxes = torch.stack([torch.from_numpy(box) for box in places])
    return Pairs(seeds, boxes, generate(seeds, None), generate(seeds, boxes), generate)


# --- Realism ---
def one_each(patients: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random row of each patient, in random order, (P,) int64."""
    order = torch.randperm(len(patients), generator=generator)
    names, index = patients[order].unique(return_inverse=True)
    last = torch.zeros(len(names), dtype=torch.int64).scatter_reduce_(0, index, torch.arange(len(order)), "amax")
    return order[last[torch.randperm(len(names), generator=generator)]]


@dataclass
class Features:
    """One encoder's features of generated, training and held-out images of one class, and the real ones' patients."""

    generated: Tensor  # (G, D)
    train: Tensor  # (N, D)
    held_out: Tensor  # (M, D), of other patients
    patients: tuple[Tensor, Tensor]  # (N,) and (M,) int64

    @classmethod
    def of(
        cls, encode: Callable[[Tensor], Tensor], generated: Tensor, train: RealImages, held_out: RealImages
    ) -> "Features":
        """Return features of generated images [-1, 1], rounded to 8 bits as real images are, and of real images."""
        rounded = ((generated + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        patients = train.patients, held_out.patients
        return cls(encode(rounded), encode(train.images), encode(held_out.images), patients)


def pixels(images: Tensor) -> Tensor:
    """Return uint8 images as rows of 32 x 32 pixels; see `low_resolution`."""
    return low_resolution(_symmetric(images))


def realism(features: Features, preset: FigurePreset) -> dict[str, Any]:
    """Return FID and KID of generated images of one class, beside the real-against-real floor at the same N.

    The floor: training images, one of each patient, in two halves of other patients, many times. Generated images are
    set against the same halves, as many of them. KID, which needs no equal N, also against all patients at once with an
    interval, and so for held-out images: what the encoder's having seen the training images costs.
    """
    generated, generator = features.generated, torch.Generator().manual_seed(fold(0, 21))
    values: dict[str, list[Tensor]] = {"fid": [], "kid": [], "fid_floor": [], "kid_floor": []}
    n = 0
    for _ in range(preset.splits):
        real = features.train[one_each(features.patients[0], generator)]
        n = min(len(real) // 2, len(generated))
        some = generated[torch.randperm(len(generated), generator=generator)[:n]]
        for name, distance in (("fid", frechet_distance), ("kid", kernel_distance)):
            values[name].append(distance(some, real[:n]))
            values[f"{name}_floor"].append(distance(real[n : 2 * n], real[:n]))
    rows = {name: torch.stack(v) for name, v in values.items()}
    real = features.train[one_each(features.patients[0], generator)]
    other = features.held_out[one_each(features.patients[1], generator)]

    def kid(some: Tensor) -> dict[str, float]:
        ends = kernel_interval(some, real, generator=generator, draws=preset.draws)
        return estimate(float(kernel_distance(some, real)), ends)

    return {
        "n": n,
        **{name: spread(v) for name, v in rows.items()},
        "fid_ratio": spread(rows["fid"] / rows["fid_floor"]),
        "kid_all": kid(generated),
        "kid_held_out": kid(other),
        "patients": [len(real), len(other)],
    }


def repeats(features: Features, preset: FigurePreset) -> dict[str, Any]:
    """Return the nearest-neighbour test for memorisation.

    Beside the share: distances of generated images to their nearest image of training, and of held-out ones to theirs;
    copies would be nearer than a new patient's images are.
    """
    generator = torch.Generator().manual_seed(fold(0, 22))
    sets = (features.generated, features.train, features.held_out)
    result = memorisation(*sets, *features.patients, generator=generator, draws=preset.draws)
    new = torch.cdist(features.held_out.double(), features.train.double()).min(dim=1).values
    closest = (result.to_train / result.to_held_out).argsort()[:4]
    return {
        "share": estimate(result.share, result.interval),
        "expected": result.expected,
        "memorises": result.memorises,
        "generated_to_train": spread(result.to_train),
        "held_out_to_train": spread(new),
        "closest": [[int(i), int(result.nearest[i])] for i in closest],
    }


# --- What a mask changes ---
def random_places(boxes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return boxes (n, 4) of the same sizes anywhere in the image."""
    wide = boxes[:, 2:] - boxes[:, :2]
    corner = torch.rand(len(boxes), 2, generator=generator) * (size - wide)
    return torch.cat([corner, (corner + wide).clamp(max=size)], dim=1)


def pair_figures(pairs: Pairs, preset: FigurePreset) -> dict[str, Any]:
    """Return what a mask changes: at the prior's places, as an ellipse, at random places, and when it moves."""
    size, n = pairs.without.shape[-1], min(preset.moved, len(pairs.boxes))
    seeds, boxes, generator = pairs.seeds[:n], pairs.boxes[:n], torch.Generator().manual_seed(fold(0, 23))
    anywhere = random_places(boxes, size, generator)

    # Whole pixels, up to a quarter of the image, never out of it.
    step = size // 4
    low, high = -boxes[:, :2].floor().long(), (size - boxes[:, 2:]).floor().long()
    shifts = (torch.rand(n, 2, generator=generator) * (2 * step + 1)).long() - step
    shifts = torch.minimum(torch.maximum(shifts, low), high)

    def differences(boxes: Tensor, shape: MaskShape = "box") -> Tensor:
        return pairs.generate(seeds, boxes, shape) - pairs.without[:n]

    return {
        "prior": one_mask(pairs.differences, pairs.boxes),
        "ellipse": one_mask(differences(boxes, "ellipse"), boxes),
        "random": one_mask(differences(anywhere), anywhere),
        "equivariance": spread(equivariance(pairs.differences[:n], differences(boxes + shifts.repeat(1, 2)), shifts)),
        "shift": float(shifts.float().norm(dim=1).median()),
    }


def one_mask(differences: Tensor, boxes: Tensor) -> dict[str, Any]:
    """Return shares, energy, contrast and shape of differences (n, 1, S, S) at boxes (n, 4)."""
    contrast = ring_contrast(differences, boxes).contrast
    return {
        "n": len(boxes),
        "energy": average(energy_inside(differences, boxes)),
        "energy_grafted": average(energy_inside(_graft(torch.zeros_like(differences), differences, boxes), boxes)),
        "hit": share(argmax_hit(differences, boxes)),
        "brighter": share(contrast > 0),
        "lost": share(contrast < 0.02),
        "added": spread(contrast),
        **shape_of(differences, boxes),
    }


def shape_of(differences: Tensor, boxes: Tensor) -> dict[str, Any]:
    """Return roundness and width at half the height, of boxes that are large enough to tell."""
    large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= LEAST_SIDE
    measured = {"roundness": roundness(differences, boxes)[large], "half_width": half_width(differences, boxes)[large]}
    return {name: spread(values[values.isfinite()]) for name, values in measured.items()}


def contrasts(pairs: Pairs, real: RealImages, ct: CTNodules | None) -> dict[str, Any]:
    """Return contrast, inside against ring, of generated nodules beside real boxes, official and ChestX-Det's apart.

    Generated ones: the generated images; the graft in real normal images; CT nodules superimposed on the same images at
    the same boxes; and generated images at the real boxes themselves (eight seeds each), which takes differences of
    size and place away. Kolmogorov and Smirnov's D and p for each pair of generated and real. Real images with more
    than `MOST_BOXES` boxes are left out.
    """
    size, generator = pairs.without.shape[-1], torch.Generator().manual_seed(fold(0, 24))

    def at_size(rows: Tensor) -> Tensor:
        return resize(_symmetric(real.images[rows]), (size, size))

    def of(images: Tensor, boxes: Tensor) -> Tensor:
        return ring_contrast(images, boxes).contrast

    # Real boxes, each in its image.
    few = [i for i, boxes in enumerate(real.boxes) if 0 < len(boxes) <= MOST_BOXES]
    shown = at_size(torch.tensor([i for i in few for _ in real.boxes[i]]))
    boxes, official = torch.cat([real.boxes[i] for i in few]) * size, torch.cat([real.official[i] for i in few])
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 / LOOSE
    measured, tight = of(shown, boxes), of(shown, torch.cat([centre - half, centre + half], dim=1))
    found = {
        "official boxes": measured[official],
        f"official boxes, shrunk {LOOSE} times": tight[official],
        "ChestX-Det boxes": measured[~official],
        "all boxes": measured,
    }

    normal = real.normal
    backgrounds = at_size(normal[torch.randint(len(normal), (len(pairs.boxes),), generator=generator)])
    generated = {
        "generated images": of(pairs.nodule, pairs.boxes),
        "grafts in real images": of(_graft(backgrounds, pairs.differences, pairs.boxes), pairs.boxes),
        "real images there, bare": of(backgrounds, pairs.boxes),
    }
    shapes = {"generated": shape_of(pairs.differences, pairs.boxes)}
    if ct is not None:
        fit = (pairs.boxes[:, 2:] - pairs.boxes[:, :2]).amin(dim=1) >= 1
        superimposed, added = ct.superimpose(backgrounds[fit], pairs.boxes[fit], generator=generator)
        generated["CT nodules superimposed"] = of(superimposed, pairs.boxes[fit])
        shapes["CT nodules"] = shape_of(added, pairs.boxes[fit])
    same = {}
    for k, (name, chosen) in enumerate((("official boxes", official), ("ChestX-Det boxes", ~official))):
        at = boxes[chosen].repeat(8, 1)
        if len(at):
            same[name] = of(pairs.generate([fold(k, 32, i) for i in range(len(at))], at), at)
    return {
        "real": {name: {"n": len(v), **spread(v)} for name, v in found.items() if len(v)},
        "made": {name: spread(v) for name, v in generated.items()},
        "ks": {name: {other: ks(v, w) for other, w in found.items() if len(w)} for name, v in generated.items()},
        "same_boxes": {name: {**spread(v), "ks": ks(v, found[name])} for name, v in same.items()},
        "shape": shapes,
    }


def ks(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return Kolmogorov and Smirnov's D and its p."""
    test = ks_2samp(generated.numpy(), real.numpy())
    return {"d": float(test.statistic), "p": float(test.pvalue)}


# --- What a classifier sees ---
def map_figures(pairs: Pairs, classifier: Any, preset: FigurePreset, *, finding: str) -> dict[str, Any]:
    """Return a classifier's map inside and outside the mask, as Fig. 7 of Ann (2021), and how the mask moves its logit.

    Of the very network that the CARIM loss maximised this is a training curve, no evidence.
    """
    n, target, size = min(preset.moved, len(pairs.boxes)), classifier.target(finding), pairs.without.shape[-1]
    masks = boxes_to_masks(list(pairs.boxes[:n, None]), size)
    inside, outside, rise = [], [], []
    for rows in torch.arange(n).split(preset.batch):
        nodule, mask = pairs.nodule[rows], masks[rows]
        seen = activation_map(classifier, nodule, target, layer=classifier.activation, method="closed-form")
        maps = normalize_map(enlarge(seen.maps.float().relu(), size))
        inside.append((maps * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)))
        outside.append((maps * (1 - mask)).sum(dim=(1, 2, 3)) / (1 - mask).sum(dim=(1, 2, 3)))
        with torch.no_grad():
            rise.append((seen.logits - classifier(pairs.without[rows]))[:, target])
    within, beyond, change = torch.cat(inside), torch.cat(outside), torch.cat(rise)
    test = ttest_rel(within.numpy(), beyond.numpy())
    return {
        "n": n,
        "inside": average(within),
        "outside": average(beyond),
        "t": float(test.statistic),
        "p": float(test.pvalue),
        "logit_rise": spread(change),
        "rises": share(change > 0),
    }


def _graft(images: Tensor, differences: Tensor, boxes: Tensor) -> Tensor:
    """Return images (n, 1, S, S) in [-1, 1] with the differences as grafts, as `SyntheticNoduleMix` does it."""
    return graft(images, differences, list(boxes[:, None]), [1.0] * len(boxes), ValueRange.of("symmetric"))


def _symmetric(images: Tensor) -> Tensor:
    return ValueRange.of("uint8").to_symmetric(images)
