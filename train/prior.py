"""The bundled location prior: fitted on readers' nodule boxes of patients outside val and test, judged on those inside.

    python -m train.prior --data FOLDER --out carim_aug/weights/prior.safetensors

FOLDER is in ChestX-ray14's layout with split.csv and ChestX-Det_boxes.csv. Prints the held-out table (METHOD 5).
"""

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from carim_aug.data.chestxray14 import read_boxes
from carim_aug.density import Array, BoxDensity, Support, boxes_to_points, fit_density
from carim_aug.lungs import FIELD_SIZE, grow_field, lung_field
from carim_aug.prior import SIZE_BOUNDS, LocationPrior

BOX_SIZE = 1024
NO_LUNG_NODULES = {"00000011_000"}  # 24 skin nodules
DESCRIPTION = (
    "Nodule boxes of ChestX-ray14 (NIH Clinical Center; Wang et al., CVPR 2017) and ChestX-Det (Lian et al., 2021; "
    "Apache-2.0) of patients outside the val and test splits, each patient counting once. For research only."
)


@dataclass(frozen=True)
class ImageBoxes:
    """The nodule boxes of one image: its name without suffix, patient, split ("" for none), (k, 4) in 1024 pixels."""

    name: str
    patient: str
    split: str
    boxes: torch.Tensor


def read_nodules(root: Path) -> list[ImageBoxes]:
    """All nodule boxes, official ones first; ChestX-Det's that repeat an official one (IoU > 0.5) are left out."""
    split = {row["Image Index"][:8]: row["split"] for row in _rows(root / "split.csv")}
    found: dict[str, torch.Tensor] = {}
    for table in ("BBox_List_2017.csv", "ChestX-Det_boxes.csv"):
        for file_name, rows in read_boxes(root / table).items():
            new = torch.tensor([box for finding, *box in rows if finding == "Nodule"]).reshape(-1, 4)
            name = Path(file_name).stem
            known = found.get(name, torch.zeros(0, 4))
            repeated = (box_iou(new, known) > 0.5).any(1)
            if name not in NO_LUNG_NODULES and len(new):
                found[name] = torch.cat([known, new[~repeated]])
    return [ImageBoxes(name, name[:8], split.get(name[:8], ""), boxes) for name, boxes in sorted(found.items())]


def read_normal_films(root: Path) -> torch.Tensor:
    """Train images with no finding, (n, 1, 64, 64) uint8: enough to see where lungs lie."""
    split = {row["Image Index"]: row["split"] for row in _rows(root / "split.csv")}
    films = []
    for row in _rows(root / "Data_Entry_2017_v2020.csv"):
        name = row["Image Index"]
        if split.get(name) == "train" and row["Finding Labels"] == "No Finding":
            path = next((root / "images").glob(f"{Path(name).stem}.*"))
            film = Image.open(path).convert("L").resize((FIELD_SIZE, FIELD_SIZE), Image.Resampling.BOX)
            films.append(torch.from_numpy(np.array(film)))
    return torch.stack(films)[:, None]


def fit_bundled(root: Path) -> LocationPrior:
    """The prior of the patients outside val and test."""
    images = [image for image in read_nodules(root) if image.split not in ("val", "test")]
    points, weights, _ = _flat(images)
    small = np.exp(points[:, 2]) <= SIZE_BOUNDS[1]
    field = grow_field(lung_field(read_normal_films(root)), points[small, :2], weights[small])
    return LocationPrior.fit(
        [image.boxes for image in images],
        BOX_SIZE,
        patients=[image.patient for image in images],
        field=field,
        description=DESCRIPTION,
    )


def held_out_table(root: Path, prior: LocationPrior, *, resamples: int = 2000) -> str:
    """Mean log density of val and test patients' boxes under the prior and under simpler ones, as Markdown.

    All densities are over (x, y, log size, log aspect) with image sides 1, share one support, were fitted on the same
    boxes, and chose their bandwidths on those. Intervals: 95 %, bootstrap over patients.
    """
    images = read_nodules(root)
    support = prior.density.support
    points, weights, groups = _flat([image for image in images if image.split not in ("val", "test")])
    inside = support.contains(points)
    densities = {"ours": prior.density, **_baselines(points[inside], weights[inside], groups[inside], prior.density)}

    # The same boxes for every density: those in the support.
    points, _, groups = _flat([image for image in images if image.split in ("val", "test")])
    inside = support.contains(points)
    area = support.field[tuple(np.floor(points[:, 1::-1] * FIELD_SIZE).astype(int).T)]
    lines = [
        f"Held out: {inside.sum()} of {len(points)} boxes, {len(np.unique(groups[inside]))} of "
        f"{len(np.unique(groups))} val and test patients, lie in the support; outside: {(~area).sum()} by the centre, "
        f"{(area & ~inside).sum()} by size, aspect or the image's edge.",
        "",
        "| density | each patient once | ours minus it | each box once | ours minus it |",
        "|---|---|---|---|---|",
    ]
    values = {name: density.log_prob(points[inside]) for name, density in densities.items()}
    for name, value in values.items():
        cells = [name]
        for per_patient in (True, False):
            cells.append(_interval(value, groups[inside], per_patient, resamples))
            cells.append(_interval(values["ours"] - value, groups[inside], per_patient, resamples))
        lines.append("| " + " | ".join(cells).replace("+0.000 [+0.000, +0.000]", "") + " |")
    return "\n".join(lines)


def _baselines(points: Array, weights: Array, groups: np.ndarray, prior: BoxDensity) -> "dict[str, _Density]":
    """The simpler densities, fitted on the same boxes and cut to the same support."""
    support = prior.support
    uniform = BoxDensity(
        prior.kernels[:1], np.ones(1), prior.bandwidths, np.array([1.0, *prior.broad[1:]]), support, mass=1.0
    )
    uniform = replace(uniform, mass=_mass(_uniform_draws(uniform), support))
    position = fit_density(points, weights, groups, support, rhos=(0.0,), broad_shares=(0.0,))
    return {
        "uniform in the lung field, log-normal size and aspect": uniform,
        "Gaussian": _Gaussian(points, weights, support),
        "kernel density on position alone, any size and aspect alike": _PlaceAlone(position),
        "kernel density on position, log-normal size and aspect": position,
    }


class _Gaussian:
    """One normal distribution of all four coordinates, cut to the support."""

    def __init__(self, points: Array, weights: Array, support: Support) -> None:
        weights = weights / weights.sum()
        self.mean, self.support = weights @ points, support
        self.covariance = (weights[:, None] * (points - self.mean)).T @ (points - self.mean)
        draws = np.random.default_rng(0).multivariate_normal(self.mean, self.covariance, 2**19)
        self.log_mass = float(np.log(_mass(draws, support)))

    def log_prob(self, points: Array) -> Array:
        off = points - self.mean
        distance = np.einsum("ij,jk,ik->i", off, np.linalg.inv(self.covariance), off)
        log_norm = np.linalg.slogdet(2 * np.pi * self.covariance)[1] / 2
        return np.where(self.support.contains(points), -distance / 2 - log_norm - self.log_mass, -np.inf)


class _PlaceAlone:
    """A kernel density of the centre; log size and log aspect uniform in their bounds; cut to the support."""

    def __init__(self, position: BoxDensity) -> None:
        self.position, self.support = position, position.support
        (low, high), aspect = np.log(self.support.size_bounds), np.log(self.support.max_aspect)
        rng, draws = np.random.default_rng(0), 2**19
        kernels = position.kernels[rng.choice(len(position.kernels), draws, p=position.weights), :2]
        places = kernels + position.bandwidths[:2] * rng.standard_normal((draws, 2))
        sizes = rng.uniform([low, -aspect], [high, aspect], (draws, 2))
        self.log_volume = float(np.log((high - low) * 2 * aspect))
        self.log_mass = float(np.log(_mass(np.concatenate([places, sizes], 1), self.support)))

    def log_prob(self, points: Array) -> Array:
        off = (points[:, None, :2] - self.position.kernels[None, :, :2]) / self.position.bandwidths[:2]
        norm = 2 * np.pi * self.position.bandwidths[:2].prod()
        place = np.exp(-0.5 * (off**2).sum(2)) @ self.position.weights / norm
        return np.where(self.support.contains(points), np.log(place) - self.log_volume - self.log_mass, -np.inf)


_Density = BoxDensity | _Gaussian | _PlaceAlone


def _uniform_draws(density: BoxDensity, draws: int = 2**19) -> Array:
    rng, field = np.random.default_rng(0), density.support.field
    cells = np.argwhere(field)[rng.integers(field.sum(), size=draws), ::-1]
    sizes = density.broad[[1, 3]] + density.broad[[2, 4]] * rng.standard_normal((draws, 2))
    return np.concatenate([(cells + rng.random((draws, 2))) / FIELD_SIZE, sizes], 1)


def _mass(draws: Array, support: Support) -> float:
    return float(support.contains(draws).mean())


def _interval(values: Array, groups: np.ndarray, per_patient: bool, resamples: int) -> str:
    """Mean and 95 % interval over patients drawn with replacement."""
    _, group = np.unique(groups, return_inverse=True)
    count, total = np.bincount(group), np.bincount(group, values)
    if per_patient:
        total, count = total / count, np.ones(len(count))
    drawn = np.random.default_rng(0).integers(len(count), size=(resamples, len(count)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{total.sum() / count.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def _flat(images: list[ImageBoxes]) -> tuple[Array, Array, np.ndarray]:
    """All boxes as points (n, 4), each patient's weight of 1 spread over its boxes (n,), and the patients (n,)."""
    points = boxes_to_points(torch.cat([image.boxes for image in images]).double().numpy(), BOX_SIZE, BOX_SIZE)
    patients = [image.patient for image in images for _ in image.boxes]
    _, groups = np.unique(patients, return_inverse=True)
    return points, 1 / np.bincount(groups)[groups], groups


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Fit, save and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in ChestX-ray14's layout")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    prior = fit_bundled(arguments.data)
    prior.save(arguments.out)
    print(f"{prior}\nlung field: {prior.field.float().mean():.1%} of the image; written to {arguments.out}\n")
    print(held_out_table(arguments.data, prior))


if __name__ == "__main__":
    main()
