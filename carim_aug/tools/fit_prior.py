"""A location prior from a table of boxes: read, judged by cross-validation over patients, fitted, saved, plotted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from carim_aug.data.chestxray14_tables import BOX_SIZE, SPLITS, read_boxes
from carim_aug.data.io import DataError, clip_box, number, read_rows
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import stream
from carim_aug.tools.info import find_version

FOLDS = 5  # of the cross-validation, each patient in one


def fit_prior(table: Path, out: Path, *, size: int, finding: str, exclude: Sequence[str] | None = None) -> None:
    """Fit a prior on a table's boxes, print its held-out density, and write it, with a picture if matplotlib is there.

    `exclude` is a table with columns Image Index and split, and names of splits (none: val and test), whose patients
    are left out. DataError for a bad table or where no image is left, ValueError for unknown splits.
    """
    boxes, patients = read_patients_boxes(table, finding, size)
    if exclude:
        splits, *names = exclude
        if unknown := sorted(set(names).difference(SPLITS)):
            raise ValueError(f"--exclude-split must name splits among {', '.join(SPLITS)}, got {unknown[0]!r}")
        rows = (row for _, row in read_rows(splits, ("Image Index", "split")))
        left_out = {_patient_of(row, "Image Index") for row in rows if row["split"] in (names or ("val", "test"))}
        chosen = [name for name in boxes if patients[name] not in left_out]
        print(f"{len(boxes) - len(chosen)} of {len(boxes)} images left out: their patients are in {splits}")
        boxes = {name: boxes[name] for name in chosen}
    if not boxes:
        raise DataError(f"{table}: no image left to fit on")
    images, owners = list(boxes.values()), [patients[name] for name in boxes]
    density = held_out_density(images, owners, size)
    about = f"Boxes of {table.name}, fitted with carim-aug {find_version()}, each patient counting once."
    prior = LocationPrior.fit(images, size, patients=owners, description=about)
    out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(out)
    print(f"{prior}\n{density}\nPrior: {out}")
    try:
        prior.plot().savefig(out.with_suffix(".png"))
        print(f"Picture: {out.with_suffix('.png')}")
    except ImportError as error:
        print(f"No picture: {error}")


def read_patients_boxes(path: Path, finding: str, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read boxes (k, 4) float64 XYXY in pixels of images of this side, by image, and the patient of each image.

    The CSV has columns Image Index, Finding Label and x, y, w, h (either published style; 1024 pixels), or image, x1,
    y1, x2, y2 and optionally patient and finding. Without a patient column the patient is the part of the file's name
    before the first underscore. DataError for a table that is missing, breaks its rules, or holds no such box.
    """
    corners = ("x1", "y1", "x2", "y2")
    try:
        rows, key = list(read_rows(path, ("Image Index",))), "Image Index"
    except DataError:
        rows, key = list(read_rows(path, ("image", *corners))), "image"
    found: dict[str, list[tuple[float, ...]]] = {}
    if key == "Image Index":
        if size != BOX_SIZE:
            raise ValueError(f"--image-size must be {BOX_SIZE} for a table with 'Image Index', got {size}")
        named = read_boxes(path)
        findings = {box.finding for own in named.values() for box in own}
        found = {name: [box[1:] for box in own if box.finding == finding] for name, own in named.items()}
    else:
        findings = {row.get("finding", finding) for _, row in rows}
        for line, row in rows:
            if any(row[corner] for corner in corners) and row.get("finding", finding) == finding:
                x1, y1, x2, y2 = (number(path, line, corner, row[corner]) for corner in corners)
                box = clip_box(path, line, (x1, y1, x2, y2), (size, size), slack=1.0)
                found.setdefault(row["image"], []).append(box)
    boxes = {name: torch.tensor(own, dtype=torch.float64) for name, own in found.items() if own}
    if not boxes:
        raise DataError(f"{path}: no box of {finding!r}; findings there: {', '.join(sorted(findings)) or 'none'}")
    patients = {row[key]: _patient_of(row, key) for _, row in rows}
    return boxes, {name: patients[name] for name in boxes}


def held_out_density(images: Sequence[Tensor], patients: Sequence[str], size: int) -> str:
    """Return the mean log density of each patient's boxes under priors fitted without that patient's fold, in words."""
    order = sorted(set(patients))
    if len(order) < 2:
        return "Held out: nothing, for all boxes are of one patient."
    folds = min(FOLDS, len(order))
    shuffled = stream(0, 0, 0).permutation(order).tolist()
    means: list[float] = []
    inside = total = 0
    for fold in tqdm(range(folds), desc="cross-validation", unit="fold"):
        left_out = set(shuffled[fold::folds])
        known = [i for i, patient in enumerate(patients) if patient not in left_out]
        prior = LocationPrior.fit([images[i] for i in known], size, patients=[patients[i] for i in known])
        for patient in sorted(left_out):
            own = torch.cat([image for image, p in zip(images, patients, strict=True) if p == patient])
            values = prior.log_prob(own, size)
            total += len(values)
            values = values[values.isfinite()]
            inside += len(values)
            if len(values):
                means.append(float(values.mean()))
    if not means:
        return f"Held out: none of {total} boxes lies in the lung field and the size bounds."
    error = float(np.std(means) / np.sqrt(len(means)))
    return (
        f"Held out by patient ({folds} folds): log density {np.mean(means):.3f} +- {error:.3f} (each of {len(means)} "
        f"patients once), over the {inside} of {total} boxes that lie in the lung field and the size bounds."
    )


def _patient_of(row: dict[str, str], key: str) -> str:
    return row.get("patient") or Path(row[key]).stem.partition("_")[0]
