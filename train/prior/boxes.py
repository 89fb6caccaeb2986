"""Readers' nodule boxes by image and patient, as the location prior's recipe takes them, and films that show lungs."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from carim_aug.data.chestxray14 import read_boxes
from carim_aug.location.density import boxes_to_points
from carim_aug.ops.lungs import FIELD_SIZE
from train.prior.densities import Points

BOX_SIZE = 1024
OFFICIAL, EXTRA = "BBox_List_2017.csv", "ChestX-Det_boxes.csv"
NO_LUNG_NODULES = {"00000011_000"}  # 24 skin nodules


@dataclass(frozen=True)
class ImageBoxes:
    """The nodule boxes of one image.

    Attributes:
        name: of the image, without suffix.
        patient: its first eight digits as a number.
        split: "" for none.
        boxes: (k, 4) XYXY in 1024 pixels.
        official: whether ChestX-ray14's own table has a box of it.
    """

    name: str
    patient: int
    split: str
    boxes: Tensor
    official: bool


def read_nodules(root: Path) -> list[ImageBoxes]:
    """All nodule boxes, official ones first; ChestX-Det's that repeat an official one (IoU > 0.5) are left out."""
    split = {row["Image Index"][:8]: row["split"] for row in _rows(root / "split.csv")}
    found: dict[str, Tensor] = {}
    official: set[str] = set()
    for table in [OFFICIAL, *([EXTRA] if (root / EXTRA).exists() else [])]:
        for file_name, rows in read_boxes(root / table).items():
            new = torch.tensor([box for finding, *box in rows if finding == "Nodule"]).reshape(-1, 4)
            name = Path(file_name).stem
            known = found.get(name, torch.zeros(0, 4))
            repeated = (box_iou(new, known) > 0.5).any(1)
            if name not in NO_LUNG_NODULES and len(new):
                found[name] = torch.cat([known, new[~repeated]])
                official |= {name} if table == OFFICIAL else set()
    return [
        ImageBoxes(name, int(name[:8]), split.get(name[:8], ""), boxes, name in official)
        for name, boxes in sorted(found.items())
    ]


def read_normal_films(root: Path) -> Tensor:
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


def points_of(boxes: Sequence[Tensor], patients: Sequence[int], size: int, weights: Sequence[float]) -> Points:
    """Boxes as points, each patient's weight of 1 spread over its boxes, times the image's weight.

    Args:
        boxes: one (k, 4) XYXY an image.
        patients: one an image.
        size: the images' side in pixels.
        weights: one an image.
    """
    counts = [len(of_image) for of_image in boxes]
    _, groups = np.unique(np.repeat(patients, counts), return_inverse=True)
    points = boxes_to_points(torch.cat(list(boxes)).double().numpy(), size, size)
    weight = np.repeat(weights, counts) / np.bincount(groups)[groups]
    return Points(points, weight, np.repeat(patients, counts))


def image_points(images: Sequence[ImageBoxes], weights: Sequence[float] | None = None) -> Points:
    """Readers' boxes as points; weights: one an image, 1 by default."""
    weights = [1.0] * len(images) if weights is None else weights
    return points_of([i.boxes for i in images], [i.patient for i in images], BOX_SIZE, weights)


def reading_weights(images: Sequence[ImageBoxes]) -> list[float]:
    """Weights of the images with which the official boxes and ChestX-Det's count half each, where there are both.

    NIH's readers drew one box for a finding, larger ones than ChestX-Det's, who boxed every nodule. Neither reading has
    more right; patients in the splits have about half of each, those outside only ChestX-Det's.
    """
    official = np.array([image.official for image in images])
    of_boxes, once = np.repeat(official, [len(image.boxes) for image in images]), image_points(images).weights
    halves = [float(once[of_boxes == reading].sum()) for reading in (False, True)]
    return [0.5 / halves[int(reading)] for reading in official] if all(halves) else [1.0] * len(images)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
