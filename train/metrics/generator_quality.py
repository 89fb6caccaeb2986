"""What a generator's weights are worth, as plain numbers: realism, memorisation, pairs, maps (METHOD 8; EVIDENCE).

Each function gives JSON types only, so that `train.reproduction.report.building` can keep them. Intervals are 95 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest, ks_2samp, ttest_rel
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.fused import compile_generator
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import MaskShape, boxes_to_masks, feather
from carim_aug.ops.cam import activation_map, enlarged, normalised
from carim_aug.ops.images import ring_contrast
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.classifier.training import LabelledFilms, scaled
from train.metrics.fid import frechet_distance, kernel_distance, kernel_interval
from train.metrics.memorisation import low_resolution, memorisation
from train.metrics.pairs import (
    argmax_hit,
    energy_inside,
    equivariance,
    half_width,
    roundness,
)
from train.reproduction.sources import Patients

LOOSE = 1.6  # official boxes are so many times as wide as their nodules
LEAST_SIDE = 5  # pixels of a box below which neither roundness nor width can be told
MOST_BOXES = 8  # of a film that counts in the real contrast: one film holds 24 skin nodules


@dataclass(frozen=True)
class FigurePreset:
    """How much is generated and drawn.

    Attributes:
        pairs: matched pairs, whose two halves are also the generated normal and nodule films.
        moved: of these, how many are done again with the mask moved, and with masks at random places.
        splits: of the real films in two halves of other patients.
        draws: bootstrap samples.
        batch: images at once.
    """

    pairs: int = 800
    moved: int = 300
    splits: int = 40
    draws: int = 400
    batch: int = 50


@dataclass
class Pairs:
    """Matched pairs of one generator: the same noise without and with a mask of one box.

    Attributes:
        noise: (n, noise_dim).
        boxes: (n, 4) XYXY in pixels.
        without: (n, 1, S, S), [-1, 1].
        nodule: (n, 1, S, S).
        render: (noise, boxes, shape of the mask) to images; None for no box.
    """

    noise: Tensor
    boxes: Tensor
    without: Tensor
    nodule: Tensor
    render: Callable[..., Tensor]

    @property
    def differences(self) -> Tensor:
        """Image with the mask minus image without, (n, 1, S, S)."""
        return self.nodule - self.without


def matched_pairs(generator: NoduleGenerator, prior: LocationPrior, preset: FigurePreset, *, seed: int = 0) -> Pairs:
    """Gives pairs at the first box of each of the prior's draws."""
    fast, size = compile_generator(generator), generator.image_size
    where = next(generator.parameters()).device

    def render(noise: Tensor, boxes: Tensor | None, shape: MaskShape = "box") -> Tensor:
        masks = torch.zeros(len(noise), 1, size, size)
        if boxes is not None:
            masks = boxes_to_masks(list(boxes[:, None]), size, shape=shape)
        parts = zip(noise.split(preset.batch), masks.split(preset.batch), strict=True)
        with torch.inference_mode():
            return torch.cat([fast(z.to(where), m.to(where)).cpu() for z, m in parts])

    stream = torch.Generator().manual_seed(fold(seed, 20))
    boxes = torch.stack([b[0] for b in prior.sample(preset.pairs, generator=stream, image_size=size).boxes])
    noise = torch.randn(preset.pairs, generator.noise_dim, generator=stream)
    return Pairs(noise, boxes, render(noise, None), render(noise, boxes), render)


# --- Realism ---
def one_each(patients: Tensor, stream: torch.Generator) -> Tensor:
    """Gives one row of each patient, drawn, in random order."""
    order = torch.randperm(len(patients), generator=stream)
    names, index = patients[order].unique(return_inverse=True)
    last = torch.zeros(len(names), dtype=torch.int64).scatter_reduce_(0, index, torch.arange(len(order)), "amax")
    return order[last[torch.randperm(len(names), generator=stream)]]


@dataclass
class Features:
    """One encoder's features of generated, training and held-out films of one class, and whose the real ones are.

    Attributes:
        generated: (G, D).
        train: (N, D).
        held_out: (M, D), of other patients.
        patients: (N,) and (M,) int64.
    """

    generated: Tensor
    train: Tensor
    held_out: Tensor
    patients: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, encode: Callable[[Tensor], Tensor], generated: Tensor, train: LabelledFilms, held_out: LabelledFilms
    ) -> "Features":
        """Gives the features of generated images [-1, 1], rounded to 8 bits as real films are, and of real films."""
        made = ((generated + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        parts = [encode(images) for images in (made, train.images, held_out.images)]
        return cls(*parts, (train.patients, held_out.patients))


def pixels(images: Tensor) -> Tensor:
    """Gives uint8 images as rows of 32 x 32 pixels; see `low_resolution`."""
    return low_resolution(scaled(images))


def realism(features: Features, preset: FigurePreset) -> dict[str, Any]:
    """Gives FID and KID of generated films of one class, beside the real-against-real floor at the same N.

    The floor: training films, one of each patient, in two halves of other patients, many times. Generated films are set
    against the same halves, as many of them. KID, which needs no equal N, also against all patients at once with an
    interval, and so for held-out films: what the encoder's having seen the training films costs.
    """
    made, stream = features.generated, torch.Generator().manual_seed(fold(0, 21))
    values: dict[str, list[Tensor]] = {"fid": [], "kid": [], "fid_floor": [], "kid_floor": []}
    n = 0
    for _ in range(preset.splits):
        real = features.train[one_each(features.patients[0], stream)]
        n = min(len(real) // 2, len(made))
        some = made[torch.randperm(len(made), generator=stream)[:n]]
        for name, distance in (("fid", frechet_distance), ("kid", kernel_distance)):
            values[name].append(distance(some, real[:n]))
            values[f"{name}_floor"].append(distance(real[n : 2 * n], real[:n]))
    rows = {name: torch.stack(v) for name, v in values.items()}
    real = features.train[one_each(features.patients[0], stream)]
    other = features.held_out[one_each(features.patients[1], stream)]
    made_range, other_range = (kernel_interval(x, real, generator=stream, draws=preset.draws) for x in (made, other))
    return {
        "n": n,
        **{name: spread(v) for name, v in rows.items()},
        "fid_ratio": spread(rows["fid"] / rows["fid_floor"]),
        "kid_all": interval(float(kernel_distance(made, real)), made_range),
        "kid_held_out": interval(float(kernel_distance(other, real)), other_range),
        "patients": [len(real), len(other)],
    }


def repeats(features: Features, preset: FigurePreset) -> dict[str, Any]:
    """Gives the nearest-neighbour test for memorisation.

    Beside the share: distances of generated films to their nearest film of training, and of held-out ones to theirs;
    copies would be nearer than a new patient's films are.
    """
    stream = torch.Generator().manual_seed(fold(0, 22))
    sets = (features.generated, features.train, features.held_out)
    result = memorisation(*sets, *features.patients, generator=stream, draws=preset.draws)
    new = torch.cdist(features.held_out.double(), features.train.double()).min(dim=1).values
    closest = (result.to_train / result.to_held_out).argsort()[:4]
    return {
        "share": interval(result.share, result.interval),
        "expected": result.expected,
        "memorises": result.memorises,
        "generated_to_train": spread(result.to_train),
        "held_out_to_train": spread(new),
        "closest": [[int(i), int(result.nearest[i])] for i in closest],
    }


# --- Pairs ---
def random_places(boxes: Tensor, size: int, stream: torch.Generator) -> Tensor:
    """Gives boxes (n, 4) of the same sizes anywhere in the image."""
    wide = boxes[:, 2:] - boxes[:, :2]
    corner = torch.rand(len(boxes), 2, generator=stream) * (size - wide)
    return torch.cat([corner, (corner + wide).clamp(max=size)], dim=1)


def pair_figures(pairs: Pairs, preset: FigurePreset) -> dict[str, Any]:
    """Gives what a mask changes: at the prior's places, as an ellipse, at random places, and when it moves."""
    size, n = pairs.without.shape[-1], min(preset.moved, len(pairs.boxes))
    stream = torch.Generator().manual_seed(fold(0, 23))
    anywhere = random_places(pairs.boxes[:n], size, stream)
    elsewhere = pairs.render(pairs.noise[:n], anywhere) - pairs.without[:n]
    rounded = pairs.render(pairs.noise[:n], pairs.boxes[:n], "ellipse") - pairs.without[:n]

    # Whole pixels, up to a quarter of the image, never out of it.
    step = size // 4
    low, high = -pairs.boxes[:n, :2].floor().long(), (size - pairs.boxes[:n, 2:]).floor().long()
    shifts = (torch.rand(n, 2, generator=stream) * (2 * step + 1)).long() - step
    shifts = torch.minimum(torch.maximum(shifts, low), high)
    moved = pairs.render(pairs.noise[:n], pairs.boxes[:n] + shifts.repeat(1, 2)) - pairs.without[:n]
    return {
        "prior": one_mask(pairs.differences, pairs.boxes),
        "ellipse": one_mask(rounded, pairs.boxes[:n]),
        "random": one_mask(elsewhere, anywhere),
        "equivariance": spread(equivariance(pairs.differences[:n], moved, shifts)),
        "shift": float(shifts.float().norm(dim=1).median()),
    }


def one_mask(differences: Tensor, boxes: Tensor) -> dict[str, Any]:
    """Gives shares, energy, contrast and shape of differences (n, 1, S, S) at boxes (n, 4)."""
    size = differences.shape[-1]
    contrast = ring_contrast(differences, boxes).contrast
    kept = differences * feather(list(boxes[:, None]), size)
    return {
        "n": len(boxes),
        "energy": average(energy_inside(differences, boxes)),
        "energy_grafted": average(energy_inside(kept, boxes)),
        "hit": share(argmax_hit(differences, boxes)),
        "brighter": share(contrast > 0),
        "lost": share(contrast < 0.02),
        "added": spread(contrast),
        **shape_of(differences, boxes),
    }


def shape_of(differences: Tensor, boxes: Tensor) -> dict[str, Any]:
    """Gives roundness and width at half the height, of boxes that are large enough to tell."""
    large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= LEAST_SIDE
    measured = {"roundness": roundness(differences, boxes)[large], "half_width": half_width(differences, boxes)[large]}
    return {name: spread(values[values.isfinite()]) for name, values in measured.items()}


def contrasts(pairs: Pairs, real: Patients, ct: CTNodules | None) -> dict[str, Any]:
    """Gives contrast, inside against ring, of generated nodules beside real boxes, official and ChestX-Det's apart.

    Made ones: the generated films; the graft in real normal films; CT nodules superimposed on the same films at the
    same boxes; and generated films at the real boxes themselves (eight noises each), which takes differences of size
    and place away. Kolmogorov and Smirnov's D and p for each pair of made and real.

    Args:
        pairs: of a generator.
        real: real films; those with more than `MOST_BOXES` boxes are left out.
        ct: templates, or None.
    """
    size, stream = pairs.without.shape[-1], torch.Generator().manual_seed(fold(0, 24))

    def films(images: Tensor) -> Tensor:
        return F.interpolate(scaled(images), (size, size), mode="bilinear", antialias=True, align_corners=False)

    few = real.films.bincount()[real.films] <= MOST_BOXES
    boxes, official = real.boxes[few] * (size / real.nodule.shape[-1]), real.official[few]
    measured = ring_contrast(films(real.nodule[few]), boxes).contrast
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 / LOOSE
    tight = ring_contrast(films(real.nodule[few]), torch.cat([centre - half, centre + half], dim=1)).contrast
    there = {
        "official boxes": measured[official],
        f"official boxes, shrunk {LOOSE} times": tight[official],
        "ChestX-Det boxes": measured[~official],
        "all boxes": measured,
    }

    hosts = films(real.normal[torch.randint(len(real.normal), (len(pairs.boxes),), generator=stream)])
    grafted = (hosts + pairs.differences * feather(list(pairs.boxes[:, None]), size)).clamp(-1, 1)
    made = {
        "generated films": ring_contrast(pairs.nodule, pairs.boxes).contrast,
        "grafts in real films": ring_contrast(grafted, pairs.boxes).contrast,
        "real films there, bare": ring_contrast(hosts, pairs.boxes).contrast,
    }
    shapes = {"generated": shape_of(pairs.differences, pairs.boxes)}
    if ct is not None:
        fit = (pairs.boxes[:, 2:] - pairs.boxes[:, :2]).amin(dim=1) >= 1
        shown, added = ct.superimpose(hosts[fit], pairs.boxes[fit], generator=stream)
        made["CT nodules superimposed"] = ring_contrast(shown, pairs.boxes[fit]).contrast
        shapes["CT nodules"] = shape_of(added, pairs.boxes[fit])
    same = {}
    for name, chosen in (("official boxes", official), ("ChestX-Det boxes", ~official)):
        at = boxes[chosen].repeat(8, 1)
        noise = torch.randn(len(at), pairs.noise.shape[1], generator=stream)
        if len(at):
            same[name] = ring_contrast(pairs.render(noise, at), at).contrast
    against = {
        name: {other: ks(values, there[other]) for other in there if len(there[other])} for name, values in made.items()
    }
    return {
        "real": {name: {"n": len(v), **spread(v)} for name, v in there.items() if len(v)},
        "made": {name: spread(v) for name, v in made.items()},
        "ks": against,
        "same_boxes": {name: {**spread(v), "ks": ks(v, there[name])} for name, v in same.items()},
        "shape": shapes,
    }


def ks(made: Tensor, real: Tensor) -> dict[str, float]:
    """Gives Kolmogorov and Smirnov's D and its p."""
    test = ks_2samp(made.numpy(), real.numpy())
    return {"d": float(test.statistic), "p": float(test.pvalue)}


# --- Maps of a classifier ---
def map_figures(pairs: Pairs, classifier: ChestClassifier, preset: FigurePreset, *, finding: str) -> dict[str, Any]:
    """Gives a classifier's map inside and outside the mask (METHOD 8, Fig. 7), and what the mask does to its logit.

    Of the very network that CARIM maximised this is a training curve, no evidence (EVIDENCE, Quality).
    """
    n, target = min(preset.moved, len(pairs.boxes)), classifier.target(finding)
    size = pairs.without.shape[-1]
    masks = boxes_to_masks(list(pairs.boxes[:n, None]), size)
    inside, outside, rise = [], [], []
    for rows in torch.arange(n).split(preset.batch):
        nodule, without, mask = pairs.nodule[rows], pairs.without[rows], masks[rows]
        maps = activation_map(classifier, nodule, target, layer=classifier.activation, method="closed-form").maps
        seen = normalised(enlarged(maps.float().relu(), size)).detach()
        inside.append((seen * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)))
        outside.append((seen * (1 - mask)).sum(dim=(1, 2, 3)) / (1 - mask).sum(dim=(1, 2, 3)))
        with torch.inference_mode():
            rise.append((classifier(nodule) - classifier(without))[:, target])
    within, beyond, change = torch.cat(inside), torch.cat(outside), torch.cat(rise).clone()
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


# --- Numbers with intervals ---
def interval(value: float, ends: tuple[float, float]) -> dict[str, float]:
    """Gives a number and its interval."""
    return {"value": value, "low": ends[0], "high": ends[1]}


def spread(values: Tensor) -> dict[str, float]:
    """Gives median, quartiles and the middle 95 % of values (n,); NaN for none."""
    at = torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975], dtype=torch.float64)
    ends = values.double().quantile(at) if len(values) else torch.full((5,), torch.nan)
    return dict(zip(("low", "q1", "value", "q3", "high"), ends.tolist(), strict=True))


def average(values: Tensor) -> dict[str, float]:
    """Gives the mean of values (n,) and its normal interval."""
    half = 1.96 * float(values.double().std()) / len(values) ** 0.5
    mean = float(values.double().mean())
    return interval(mean, (mean - half, mean + half))


def share(hits: Tensor) -> dict[str, float]:
    """Gives the share of a bool tensor (n,) that is true, with Wilson's interval."""
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return interval(float(hits.double().mean()), (float(found.low), float(found.high)))
