"""Plain folders of grey images: one folder per class, or one CSV of boxes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from carim_aug.data.io import IMAGE_SUFFIXES, Box, DataError, clip_box, number, read_rows
from carim_aug.data.items import Items, check_choice, check_names, detection_target

_SLACK = 1.0  # pixels by which a box may overhang


class FolderPerClass(Items):
    """Grey images whose class is the folder they lie in, at any depth; torchvision's ImageFolder for X-rays.

    `classes` and `class_to_idx` name the labels, `targets` and `paths` (sorted within a class) are those of each image.

    Args:
        root: folder with one folder per class.
        transform: torchvision v2 transform, called with the image.
        channels: of the uint8 `tv_tensors.Image` (channels, H, W): 1, or 3 equal ones.
        classes: folders to use, in label order; None takes all, sorted.

    Raises:
        DataError: there is no class folder, or one without images.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
        classes: Sequence[str] | None = None,
    ) -> None:
        check_choice("channels", channels, (1, 3))
        check_names("classes", classes)
        self.root, self.transform, self.channels = Path(root), transform, channels
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder")
        found = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        self.classes = found if classes is None else list(classes)
        if not self.classes:
            raise DataError(f"{self.root}: no class folder in it")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must differ, got {self.classes}")
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.paths, self.targets = [], []
        for label, name in enumerate(self.classes):
            if name not in found:
                raise DataError(f"{self.root}: no class folder {name!r}; found {', '.join(found) or 'none'}")
            paths = _images_below(self.root / name)
            if not paths:
                raise DataError(f"{self.root / name}: no image ({', '.join(IMAGE_SUFFIXES)}) in this class folder")
            self.paths += paths
            self.targets += [label] * len(paths)


class BoxCSV(Items):
    """Grey images with the boxes that a CSV lists.

    The CSV has columns image, x1, y1, x2, y2 (pixels of the image in its file) and optionally label (an integer, 1
    where the column is missing). Rows of the same image belong together; a row with empty coordinates lists an image
    without a box. `paths` are in order of first mention, `targets` 1 for an image with a box and else 0.

    Args:
        root: folder that the image column is relative to.
        csv: the table; a relative path is tried as it is, then from `root`.
        transform: torchvision v2 transform, called with (image, target).
        channels: of the uint8 `tv_tensors.Image` (channels, H, W): 1, or 3 equal ones.

    Raises:
        DataError: the table is missing or breaks its rules, or a listed image has no file; of an item: the file is
            unreadable, or a box overhangs the image by more than a pixel.
    """

    def __init__(
        self, root: str | Path, csv: str | Path, *, transform: Callable[..., Any] | None = None, channels: int = 1
    ) -> None:
        check_choice("channels", channels, (1, 3))
        self.root, self.transform, self.channels = Path(root), transform, channels
        self.csv = Path(csv) if Path(csv).exists() else self.root / csv
        rows: dict[str, list[tuple[int, Box, int]]] = {}  # line, box, label
        corners = ("x1", "y1", "x2", "y2")
        for line, row in read_rows(self.csv, ("image", *corners)):
            boxes = rows.setdefault(row["image"], [])
            empty = [column for column in corners if not row[column]]
            if len(empty) == 4:
                continue
            if empty:
                raise DataError(f"{self.csv}, line {line}: {empty[0]} is empty though other coordinates are not")
            x1, y1, x2, y2 = (number(self.csv, line, column, row[column]) for column in corners)
            if not (x1 < x2 and y1 < y2):
                raise DataError(f"{self.csv}, line {line}: box must have x1 < x2 and y1 < y2, got {(x1, y1, x2, y2)}")
            label = number(self.csv, line, "label", row.get("label") or "1")
            if label != int(label):
                raise DataError(f"{self.csv}, line {line}: label must be an integer, got {row['label']!r}")
            boxes.append((line, (x1, y1, x2, y2), int(label)))
        if not rows:
            raise DataError(f"{self.csv}: no rows")
        self.paths = [str(self.root / name) for name in rows]
        if absent := [path for path in self.paths if not os.path.isfile(path)]:
            raise DataError(f"{absent[0]}: no such image file, listed in {self.csv}")
        self._boxes = list(rows.values())
        self.targets = [int(bool(boxes)) for boxes in self._boxes]

    def _target(self, i: int, height: int, width: int) -> dict[str, Tensor]:
        boxes = [clip_box(self.csv, line, box, (width, height), _SLACK) for line, box, _ in self._boxes[i]]
        return detection_target(boxes, [label for _, _, label in self._boxes[i]], height, width)


def _images_below(folder: Path) -> list[str]:
    return sorted(
        os.path.join(where, name)
        for where, _, files in os.walk(folder)
        for name in files
        if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )
