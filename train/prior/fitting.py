"""Fit the location prior from readers' boxes, a classifier's maps, or both, as the boxes decide.

Val and test patients stay out of everything but `held_out_table`. Readers are NIH's, who drew one large box for a
finding, and ChestX-Det's, who boxed every nodule tightly; the two readings count half each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.density import BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.location.prior import MAX_ASPECT, SIZE_BOUNDS, LocationPrior
from carim_aug.location.regions import region_boxes
from carim_aug.ops.cam import activation_map, enlarge, normalize_map
from carim_aug.ops.lungs import FIELD_SIZE, grow_field, lung_field
from train.classifier.densenet import ChestClassifier
from train.common.images import ImageSet, read_images, read_nodule_boxes
from train.common.run import RunError
from train.prior.densities import Density, Points, compare, cross_validate, fit_position, points_of, simpler_densities

BOX_SIZE, IMAGE_SIZE = 1024, 256  # side in pixels of the images that readers saw, and that the classifier sees
BOXES, MAPS = "readers' boxes", "the classifier's maps"
# Mixtures to choose from: shares of the maps' places.
SHARES = {"readers' boxes, a tenth of the places the maps'": 0.1, "readers' sizes, all places the maps'": 1.0}
POSITION = "kernel density on position, log-normal size and aspect"
DESCRIPTION = (
    "Nodule boxes of ChestX-ray14 (NIH Clinical Center; Wang et al., CVPR 2017) and ChestX-Det (Lian et al., 2021; "
    "Apache-2.0) of patients outside the val and test splits, the two readings counting half each, and each patient "
    "once; counts from ChestX-Det. For research only."
)


@dataclass(frozen=True)
class Regions:
    """Where a classifier sees nodules: of each image (k, 4) boxes XYXY in `IMAGE_SIZE` pixels, score and patient."""

    boxes: list[Tensor]
    scores: list[float]
    patients: list[int]

    def of(self, patients: set[int]) -> "Regions":
        """Return the images of some patients."""
        chosen = [row for row in zip(self.boxes, self.scores, self.patients, strict=True) if row[2] in patients]
        return Regions(*map(list, zip(*chosen, strict=True))) if chosen else Regions([], [], [])

    def inside(self, support: Support) -> "Regions":
        """Return the same images with the boxes in the support only; RunError if there is none."""
        points = (boxes_to_points(boxes.numpy(), IMAGE_SIZE, IMAGE_SIZE) for boxes in self.boxes)
        boxes = [b[torch.from_numpy(support.contains(p))] for b, p in zip(self.boxes, points, strict=True)]
        if not any(map(len, boxes)):
            raise RunError(f"classifier must have maps that peak in the lung field, got {len(boxes)} that do not")
        return Regions(boxes, self.scores, self.patients)


def nodule_regions(root: Path, classifier: ChestClassifier, *, threshold: float = 0.5, batch: int = 16) -> Regions:
    """Return the regions of a classifier's Grad-CAM maps of train's Nodule images, above a share of the peak."""
    images = read_images(root, "train", IMAGE_SIZE, only_normal_or_nodule=True, limit_normal=0, any_size=True)
    device, nodule = next(classifier.parameters()).device, classifier.target("Nodule")
    boxes, scores = list[Tensor](), list[float]()
    for rows in images.nodule.split(batch):
        seen = images.symmetric(rows).to(device)
        found = activation_map(classifier, seen, nodule, layer=classifier.activation, relu=True)
        maps = enlarge(normalize_map(found.maps), IMAGE_SIZE).clamp(0, 1)
        boxes += region_boxes(maps, threshold, SIZE_BOUNDS[1])
        scores += found.logits[:, nodule].sigmoid().tolist()
    return Regions(boxes, scores, images.patients[images.nodule].tolist())


def image_points(images: ImageSet, weights: list[float] | None = None) -> Points:
    """Return readers' boxes as points; weights: one an image, 1 by default."""
    return points_of(images.boxes, images.patients.tolist(), weights)


def reading_weights(images: ImageSet) -> list[float]:
    """Return weights of the images with which the two readings count half each, where there are both.

    Neither has more right: patients in the splits have about half of each, those outside only ChestX-Det's.
    """
    official = _read_by_nih(images)
    of_boxes, once = np.repeat(official, [len(boxes) for boxes in images.boxes]), image_points(images).weights
    halves = [float(once[of_boxes == reading].sum()) for reading in (False, True)]
    return [0.5 / halves[int(reading)] for reading in official] if all(halves) else [1.0] * len(images)


def fit_boxes(images: ImageSet, field: Tensor) -> LocationPrior:
    """Fit the prior of readers' boxes, the two readings counting half each."""
    boxes, weights = [boxes * BOX_SIZE for boxes in images.boxes], reading_weights(images)
    facts: dict[str, Any] = {"patients": images.patients.tolist(), "weights": weights, "description": DESCRIPTION}
    return LocationPrior.fit(boxes, BOX_SIZE, field=field, **facts)


def fit_regions(regions: Regions, field: Tensor) -> LocationPrior:
    """Fit the prior of Ann (2021): place and size of the maps' regions, weighted by the classifier's score."""
    what = "Regions of a classifier's Grad-CAM maps, ChestX-ray14's train split. For research only."
    facts: dict[str, Any] = {"patients": regions.patients, "weights": regions.scores, "description": what}
    return LocationPrior.fit(regions.boxes, IMAGE_SIZE, field=field, **facts)


def fit_mixture(field: Tensor, share: float, images: ImageSet, regions: Regions) -> LocationPrior:
    """Fit the prior of readers' boxes with a share of the maps' places, each with the size of some reader's box.

    A map's cell is larger than most nodules, so its regions say little of their size.
    """
    prior = fit_boxes(images, field)
    known = image_points(images, reading_weights(images)).inside(prior.density.support)
    seen = points_of([boxes / IMAGE_SIZE for boxes in regions.boxes], regions.patients, regions.scores)
    chance = known.weights / known.weights.sum()
    sizes = known.points[np.random.default_rng(0).choice(len(chance), len(seen.points), p=chance), 2:]
    seen = seen._replace(points=np.hstack([seen.points[:, :2], sizes])).inside(prior.density.support)
    both = Points(
        np.concatenate([known.points, seen.points]),
        np.concatenate([(1 - share) * chance, share * seen.weights / seen.weights.sum()]),
        np.concatenate([known.groups, seen.groups]),
    )
    density = fit_density(*both.of(both.weights > 0), prior.density.support)
    description = f"{DESCRIPTION} A share of {share} of the places is a classifier's maps'."
    return _replace(prior, density, prior.counts, description)


def fit_best(root: Path, classifier: ChestClassifier | None = None) -> tuple[dict[str, LocationPrior], str]:
    """Fit all priors; return them, first the one that the fitting patients' boxes prefer, and the table that shows it.

    With a classifier, the prior of Ann (2021) and mixtures with it are fitted too. A patient's boxes are looked at
    under priors that were fitted without the patient.
    """
    images = _of_splits(read_nodule_boxes(root), held_out=False)
    once = image_points(images)
    small = np.exp(once.points[:, 2]) <= SIZE_BOUNDS[1]
    normal = read_images(root, "train", FIELD_SIZE, only_normal_or_nodule=True, any_size=True)
    field = grow_field(lung_field(normal.images[normal.normal]), once.points[small, :2], once.weights[small])
    support = Support(field.numpy(), SIZE_BOUNDS, MAX_ASPECT)
    known = image_points(images, reading_weights(images)).inside(support)
    fits: dict[str, Callable[[ImageSet, Regions], LocationPrior]] = {BOXES: lambda some, _: fit_boxes(some, field)}
    regions = Regions([], [], [])
    if classifier is not None:
        regions = nodule_regions(root, classifier).inside(support)
        fits[MAPS] = lambda _, seen: fit_regions(seen, field)
        fits |= {name: partial(fit_mixture, field, share) for name, share in SHARES.items()}

    # Each patient's boxes under densities fitted without the patient.
    def density(fit: Callable[[ImageSet, Regions], LocationPrior], patients: set[int]) -> Density:
        rows = torch.isin(images.patients, torch.tensor(sorted(patients))).nonzero()[:, 0]
        return fit(images.rows(rows), regions.of(patients)).density

    trials: dict[str, Callable[[set[int]], Density]] = {name: partial(density, fit) for name, fit in fits.items()}
    trials[POSITION] = lambda patients: fit_position(known.of(np.isin(known.groups, list(patients))), support)
    values = cross_validate(known, trials)
    best = max(fits, key=lambda name: float(known.weights @ values[name]))
    of_train = [int(images.patients[i]) for i, split in enumerate(images.splits) if split == "train"]
    train = once.inside(support).weights * np.isin(known.groups, of_train)
    columns = {"readings half each": known.weights, "the train split's": train}
    table = compare({best: values.pop(best), **values}, columns, known.groups)

    priors = {name: fits[name](images, regions) for name in sorted(fits, key=lambda name: name != best)}
    complete = images.rows(torch.from_numpy(~_read_by_nih(images)).nonzero()[:, 0])
    if len(complete):  # NIH's readers boxed one nodule of an image: ChestX-Det's know how many there are
        counts = fit_boxes(complete, field).counts
        priors = {name: _replace(prior, prior.density, counts, prior.description) for name, prior in priors.items()}
    return priors, table


def held_out_points(root: Path) -> Points:
    """Return the boxes of val and test patients."""
    return image_points(_of_splits(read_nodule_boxes(root), held_out=True))


def held_out_table(
    root: Path, prior: LocationPrior, *, others: Mapping[str, LocationPrior] | None = None, resamples: int = 2000
) -> str:
    """Return the mean log density of val and test patients' boxes under the prior and simpler ones, as Markdown.

    All densities are over (x, y, log size, log aspect) with image sides 1, share one support, were fitted on the same
    boxes with the same weights, but for the last, and chose their bandwidths on those. Intervals: 95 %, over patients.
    """
    fitting, support = _of_splits(read_nodule_boxes(root), held_out=False), prior.density.support
    densities: dict[str, Density] = {"ours": prior.density}
    densities |= {name: other.density for name, other in (others or {}).items()}
    densities |= simpler_densities(image_points(fitting, reading_weights(fitting)).inside(support), support)
    alike = f"{POSITION}; every fitting patient alike, whoever read it"
    densities[alike] = fit_position(image_points(fitting).inside(support), support)

    # The same boxes for every density: those in the support.
    every = held_out_points(root)
    known = every.inside(support)
    columns, rows = np.floor(every.points[:, :2] * FIELD_SIZE).astype(int).T
    in_field = support.field[rows, columns]
    note = (
        f"Held out: {len(known.points)} of {len(every.points)} boxes, {len(np.unique(known.groups))} of "
        f"{len(np.unique(every.groups))} val and test patients, lie in the support; outside: {(~in_field).sum()} by "
        f"the centre, {in_field.sum() - len(known.points)} by size, aspect or the image's edge."
    )
    values = {name: density.log_prob(known.points) for name, density in densities.items()}
    _, index, counts = np.unique(known.groups, return_inverse=True, return_counts=True)
    weights = {"each patient once": 1 / counts[index], "each box once": np.ones(len(index))}
    return f"{note}\n\n{compare(values, weights, known.groups, resamples=resamples)}"


def _of_splits(images: ImageSet, *, held_out: bool) -> ImageSet:
    return images.rows(torch.tensor([(s in ("val", "test")) == held_out for s in images.splits]).nonzero()[:, 0])


def _read_by_nih(images: ImageSet) -> np.ndarray:
    """Return whether ChestX-ray14's own table has a box of each image, (n,) bool."""
    return np.array([bool(flags.any()) for flags in images.official], dtype=bool)


def _replace(prior: LocationPrior, density: BoxDensity, counts: np.ndarray, description: str) -> LocationPrior:
    facts = {"n_boxes": prior.n_boxes, "n_patients": prior.n_patients}
    return LocationPrior(density, counts, **facts, description=description)
