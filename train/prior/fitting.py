"""The bundled location prior (METHOD 5): from readers' boxes, a classifier's maps, or both, as the boxes decide.

    python -m train.prior --data FOLDER --out prior.safetensors [--classifier FILE] [--plot FILE.png]

FOLDER is in ChestX-ray14's layout with split.csv, and ChestX-Det_boxes.csv if there is one. Val and test patients stay
out of everything but the last table. With a classifier, the source's prior (Grad-CAM maps of the train split's films
labelled Nodule, weighted by its score, thresholded into regions) and mixtures with it are fitted too. Saved is that
under which the fitting patients' boxes are likeliest, each patient judged by a prior fitted without it.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.location.density import BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.location.prior import MAX_ASPECT, SIZE_BOUNDS, LocationPrior
from carim_aug.location.regions import region_boxes
from carim_aug.ops.cam import activation_map, enlarged, normalised
from carim_aug.ops.lungs import FIELD_SIZE, grow_field, lung_field
from train.classifier.densenet import ChestClassifier
from train.common.reading import Reading
from train.prior.boxes import (
    BOX_SIZE,
    ImageBoxes,
    image_points,
    points_of,
    read_nodules,
    read_normal_films,
    reading_weights,
)
from train.prior.densities import Density, Points, comparison, cross_validated, fit_position, simpler_densities

FILM_SIZE = 256
THRESHOLD = 0.5
BOXES, MAPS = "readers' boxes", "the classifier's maps"
SHARES = {"readers' boxes, a tenth of the places the maps'": 0.1, "readers' sizes, all places the maps'": 1.0}
"""Mixtures to choose from: shares of the maps' places."""
DESCRIPTION = (
    "Nodule boxes of ChestX-ray14 (NIH Clinical Center; Wang et al., CVPR 2017) and ChestX-Det (Lian et al., 2021; "
    "Apache-2.0) of patients outside the val and test splits, the two readings counting half each, and each patient "
    "once; counts from ChestX-Det. For research only."
)


@dataclass(frozen=True)
class Regions:
    """Where a classifier sees nodules: of each film (k, 4) boxes XYXY in `FILM_SIZE` pixels, its score, its patient."""

    boxes: list[Tensor]
    scores: list[float]
    patients: list[int]

    def of(self, patients: set[int]) -> "Regions":
        """Gives the films of some patients."""
        chosen = [i for i, patient in enumerate(self.patients) if patient in patients]
        return Regions(*([part[i] for i in chosen] for part in (self.boxes, self.scores, self.patients)))

    def inside(self, support: Support) -> "Regions":
        """Gives the same films with the boxes in the support only.

        Raises:
            ValueError: there is none.
        """
        size = FILM_SIZE
        boxes = [b[torch.from_numpy(support.contains(boxes_to_points(b.numpy(), size, size)))] for b in self.boxes]
        if not any(map(len, boxes)):
            raise ValueError(
                f"the classifier's maps must peak in the lung field somewhere, got {len(boxes)} that do not"
            )
        return Regions(boxes, self.scores, self.patients)


Fit = Callable[[Sequence[ImageBoxes], Regions], LocationPrior]


def nodule_regions(
    root: Path, classifier: ChestClassifier, *, threshold: float = THRESHOLD, batch: int = 16
) -> Regions:
    """The regions of a classifier's Grad-CAM maps of the train split's films labelled Nodule (METHOD 5).

    Args:
        root: a folder in ChestX-ray14's layout with a train split.
        classifier: in eval mode, on any device; knows "Nodule".
        threshold: of the map over its largest value, in (0, 1].
        batch: films in one pass.
    """
    data = ChestXray14(root, split="train", findings=("Nodule",))
    read = [(i, film) for i, film, _ in Reading(data, FILM_SIZE, any_size=True, desc="films labelled Nodule")]
    where, nodule = next(classifier.parameters()).device, classifier.target("Nodule")
    boxes: list[Tensor] = []
    scores: list[float] = []
    for start in range(0, len(read), batch):
        films = torch.stack([film for _, film in read[start : start + batch]]).to(where).float() / 127.5 - 1
        found = activation_map(classifier, films, nodule, layer=classifier.activation, method="grad-cam", relu=True)
        maps = enlarged(normalised(found.maps), FILM_SIZE).clamp(0, 1)
        boxes += region_boxes(maps, threshold, SIZE_BOUNDS[1])
        scores += found.logits[:, nodule].sigmoid().tolist()
    return Regions(boxes, scores, [int(data.patients[i]) for i, _ in read])


def fit_boxes(images: Sequence[ImageBoxes], field: Tensor) -> LocationPrior:
    """The prior of readers' boxes, the two readings counting half each."""
    return LocationPrior.fit(
        [image.boxes for image in images],
        BOX_SIZE,
        patients=[image.patient for image in images],
        weights=reading_weights(images),
        field=field,
        description=DESCRIPTION,
    )


def fit_regions(regions: Regions, field: Tensor) -> LocationPrior:
    """The source's prior: place and size of the maps' regions, weighted by the classifier's score."""
    return LocationPrior.fit(
        regions.boxes,
        FILM_SIZE,
        patients=regions.patients,
        weights=regions.scores,
        field=field,
        description="Regions of a classifier's Grad-CAM maps, ChestX-ray14's train split. For research only.",
    )


def fit_mixture(field: Tensor, share: float, images: Sequence[ImageBoxes], regions: Regions) -> LocationPrior:
    """The prior of readers' boxes with a share of the maps' places, each with the size of some reader's box.

    A map's cell is larger than most nodules, so its regions say little of their size.
    """
    prior = fit_boxes(images, field)
    known = inside(image_points(images, reading_weights(images)), prior.density.support)
    seen = points_of(regions.boxes, regions.patients, FILM_SIZE, regions.scores)
    chance = known.weights / known.weights.sum()
    sizes = known.points[np.random.default_rng(0).choice(len(chance), len(seen.points), p=chance), 2:]
    seen = inside(seen._replace(points=np.hstack([seen.points[:, :2], sizes])), prior.density.support)
    both = Points(
        np.concatenate([known.points, seen.points]),
        np.concatenate([(1 - share) * chance, share * seen.weights / seen.weights.sum()]),
        np.concatenate([known.groups, seen.groups]),
    )
    density = fit_density(*both.of(both.weights > 0), prior.density.support)
    return _with(prior, density, description=f"{DESCRIPTION} A share of {share} of the places is a classifier's maps'.")


def _with(
    prior: LocationPrior, density: BoxDensity, *, counts: np.ndarray | None = None, description: str | None = None
) -> LocationPrior:
    return LocationPrior(
        density,
        prior.counts if counts is None else counts,
        n_boxes=prior.n_boxes,
        n_patients=prior.n_patients,
        description=prior.description if description is None else description,
    )


def inside(known: Points, support: Support) -> Points:
    """The points in the support."""
    return known.of(support.contains(known.points))


def fit_best(root: Path, classifier: ChestClassifier | None = None) -> tuple[dict[str, LocationPrior], str]:
    """All priors, the one that cross-validation on the fitting patients prefers first, and the table that shows it."""
    images = [image for image in read_nodules(root) if image.split not in ("val", "test")]
    once = image_points(images)
    small = np.exp(once.points[:, 2]) <= SIZE_BOUNDS[1]
    field = grow_field(lung_field(read_normal_films(root)), once.points[small, :2], once.weights[small])
    support = Support(field.numpy(), SIZE_BOUNDS, MAX_ASPECT)
    known = inside(image_points(images, reading_weights(images)), support)
    fits: dict[str, Fit] = {BOXES: lambda some, _: fit_boxes(some, field)}
    regions = Regions([], [], [])
    if classifier is not None:
        regions = nodule_regions(root, classifier).inside(support)
        fits[MAPS] = lambda _, seen: fit_regions(seen, field)
        fits |= {name: partial(fit_mixture, field, share) for name, share in SHARES.items()}

    def without(fit: Fit) -> Callable[[set[int]], Density]:
        return lambda kept: fit([image for image in images if image.patient in kept], regions.of(kept)).density

    trials: dict[str, Callable[[set[int]], Density]] = {name: without(fit) for name, fit in fits.items()}
    trials["kernel density on position, log-normal size and aspect"] = lambda kept: fit_position(
        known.of(np.isin(known.groups, list(kept))), support
    )
    values = cross_validated(known, trials)
    best = max(fits, key=lambda name: float(known.weights @ values[name]))
    train = np.isin(known.groups, [image.patient for image in images if image.split == "train"])
    columns = {"readings half each": known.weights, "the train split's": inside(once, support).weights * train}
    table = comparison({best: values.pop(best), **values}, columns, known.groups)
    priors = {name: fits[name](images, regions) for name in sorted(fits, key=lambda name: name != best)}
    complete = [image for image in images if not image.official]
    if complete:  # NIH's readers boxed one nodule of an image: ChestX-Det's know how many there are
        counts = fit_boxes(complete, field).counts
        priors = {name: _with(prior, prior.density, counts=counts) for name, prior in priors.items()}
    return priors, table


def held_out_table(
    root: Path, prior: LocationPrior, *, others: Mapping[str, LocationPrior] | None = None, resamples: int = 2000
) -> str:
    """Mean log density of val and test patients' boxes under the prior and under simpler ones, as Markdown.

    All densities are over (x, y, log size, log aspect) with image sides 1, share one support, were fitted on the same
    boxes with the same weights, but for the last, and chose their bandwidths on those. Intervals: 95 %, over patients.

    Args:
        root: ChestX-ray14's layout with split.csv.
        prior: ours.
        others: further priors of the same support, by name.
        resamples: of the patients, for the intervals.
    """
    images, support = read_nodules(root), prior.density.support
    fitting = [image for image in images if image.split not in ("val", "test")]
    densities: dict[str, Density] = {"ours": prior.density}
    densities |= {name: other.density for name, other in (others or {}).items()}
    densities |= simpler_densities(inside(image_points(fitting, reading_weights(fitting)), support), support)
    once = "kernel density on position, log-normal size and aspect; every fitting patient alike, whoever read it"
    densities[once] = fit_position(inside(image_points(fitting), support), support)

    # The same boxes for every density: those in the support.
    every = image_points([image for image in images if image.split in ("val", "test")])
    judged = inside(every, support)
    columns, rows = np.floor(every.points[:, :2] * FIELD_SIZE).astype(int).T
    in_field = support.field[rows, columns]
    note = (
        f"Held out: {len(judged.points)} of {len(every.points)} boxes, {len(np.unique(judged.groups))} of "
        f"{len(np.unique(every.groups))} val and test patients, lie in the support; outside: {(~in_field).sum()} by "
        f"the centre, {in_field.sum() - len(judged.points)} by size, aspect or the image's edge."
    )
    values = {name: density.log_prob(judged.points) for name, density in densities.items()}
    per_patient = 1 / np.unique(judged.groups, return_counts=True)[1][np.unique(judged.groups, return_inverse=True)[1]]
    weights = {"each patient once": per_patient, "each box once": np.ones(len(per_patient))}
    return f"{note}\n\n{comparison(values, weights, judged.groups, resamples=resamples)}"


def plot_priors(priors: Mapping[str, LocationPrior], held_out: np.ndarray, path: Path) -> None:
    """Draws where 20,000 boxes of each prior lie and how large they are, and the same of held-out boxes.

    Args:
        priors: by name.
        held_out: (n, 4) points.
        path: picture to write.
    """
    figure = Figure(figsize=(4 * (len(priors) + 1), 4), layout="constrained")
    *places, sizes = figure.subplots(1, len(priors) + 1)
    bins = np.linspace(*SIZE_BOUNDS, 25)
    for axes, (name, prior) in zip(places, priors.items(), strict=True):
        rng = np.random.default_rng(0)
        drawn = boxes_to_points(np.concatenate([prior.draw(rng) for _ in range(20_000)]).astype(float), 1, 1)
        axes.hist2d(*drawn[:, :2].T, bins=FIELD_SIZE, range=((0, 1), (0, 1)))
        axes.plot(*held_out[:, :2].T, "r.", markersize=3)
        axes.set(title=name, xlabel="x / width (left is the patient's right)", ylabel="y / height", ylim=(1, 0))
        sizes.hist(np.exp(drawn[:, 2]), bins=bins, density=True, histtype="step", label=name)
    sizes.hist(np.exp(held_out[:, 2]), bins=bins, density=True, alpha=0.3, color="r", label="held-out boxes")
    sizes.set(title="size", xlabel="sqrt(width x height) / side")
    sizes.legend(fontsize="xx-small", loc="upper left")
    figure.savefig(path, dpi=120)


def main(words: Sequence[str] | None = None) -> None:
    """Fit, choose, save and judge; words: of the command line, by default the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in ChestX-ray14's layout")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--classifier", type=Path, help="a classifier's file: fit the source's prior from its maps too")
    parser.add_argument("--plot", type=Path, help="picture of the priors and the held-out boxes to write")
    arguments = parser.parse_args(words)
    classifier = ChestClassifier.load(arguments.classifier) if arguments.classifier else None
    priors, table = fit_best(arguments.data, classifier)
    (best, prior), *others = priors.items()
    prior.save(arguments.out)
    print(f"{prior}\nfrom {best}; lung field: {prior.field.float().mean():.1%} of the image; to {arguments.out}\n")
    print(f"Fitting patients' boxes, each under densities fitted without its patient:\n\n{table}\n")
    print(held_out_table(arguments.data, prior, others=dict(others)))
    if arguments.plot:
        held = [image for image in read_nodules(arguments.data) if image.split in ("val", "test")]
        plot_priors(priors, inside(image_points(held), prior.density.support).points, arguments.plot)


if __name__ == "__main__":
    main()
