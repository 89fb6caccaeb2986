"""Plain folders of grey images: one folder per class, or one CSV of boxes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from carim_aug.data.errors import DataError
from carim_aug.data.images import IMAGE_SUFFIXES, check_channels, read_grey
from carim_aug.data.tables import clip_box, number, read_rows

_SLACK = 1.0  # pixels by which a box may overhang


class FolderPerClass(Dataset[tuple[Any, int]]):
    """Grey images whose class is the folder they lie in, at any depth; torchvision's ImageFolder for films.

    Args:
        root: Folder with one folder per class.
        transform: torchvision v2 transform, called with the image.
        channels: 1, or 3 equal ones.
        classes: Folders to use, in label order; None takes all, sorted.

    Attributes:
        classes: Class names; the label is the position.
        class_to_idx: From class name to label.
        paths: File of each image, sorted within its class.
        targets: Label of each image.

    Raises:
        DataError: There is no class folder, or one without images.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
        classes: Sequence[str] | None = None,
    ) -> None:
        """List the files; see the class."""
        check_channels(channels)
        if isinstance(classes, str):
            raise TypeError(f"classes must be a sequence of names, got the string {classes!r}")
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
        self.paths: list[str] = []
        self.targets: list[int] = []
        for label, name in enumerate(self.classes):
            if name not in found:
                raise DataError(f"{self.root}: no class folder {name!r}; found {', '.join(found) or 'none'}")
            paths = _images_below(self.root / name)
            if not paths:
                raise DataError(f"{self.root / name}: no image ({', '.join(IMAGE_SUFFIXES)}) in this class folder")
            self.paths += paths
            self.targets += [label] * len(paths)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        """Image, (channels, H, W) uint8 `tv_tensors.Image` or what the transform makes of it, and label.

        Raises:
            DataError: The file is unreadable.
            IndexError: There is no such position.
        """
        image = read_grey(self.paths[i], channels=self.channels)
        return (image if self.transform is None else self.transform(image)), self.targets[i]


class BoxCSV(Dataset[tuple[Any, Any]]):
    """Grey images with the boxes that a CSV lists.

    The CSV has columns image, x1, y1, x2, y2 (pixels of the image in its file) and optionally label (an integer, 1
    where the column is missing). Rows of the same image belong together; a row with empty coordinates lists an image
    without a box.

    Args:
        root: Folder that the image column is relative to.
        csv: The table; a relative path is tried as it is, then from `root`.
        transform: torchvision v2 transform, called with (image, target).
        channels: 1, or 3 equal ones.

    Attributes:
        paths: File of each image, in order of first mention.
        targets: 1 for an image with a box, else 0.

    Raises:
        DataError: The table is missing or breaks its rules, or a listed image has no file.
    """

    def __init__(
        self,
        root: str | Path,
        csv: str | Path,
        *,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
    ) -> None:
        """Read the table, no images; see the class."""
        check_channels(channels)
        self.root, self.transform, self.channels = Path(root), transform, channels
        self.csv = Path(csv) if Path(csv).exists() else self.root / csv
        rows: dict[str, list[tuple[int, tuple[float, float, float, float], int]]] = {}
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
        absent = [path for path in self.paths if not os.path.isfile(path)]
        if absent:
            raise DataError(f"{absent[0]}: no such image file, listed in {self.csv}")
        self._boxes = list(rows.values())
        self.targets = [int(bool(boxes)) for boxes in self._boxes]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, dict[str, Tensor]]:
        """Image and target.

        Args:
            i: Position, negative from the end.

        Returns:
            image: (channels, H, W) uint8 `tv_tensors.Image`.
            target: `boxes`, `tv_tensors.BoundingBoxes` (k, 4) float32 XYXY in pixels, and `labels`, (k,) int64.

        Raises:
            DataError: The file is unreadable, or a box overhangs the image by more than a pixel.
            IndexError: There is no such position.
        """
        image = read_grey(self.paths[i], channels=self.channels)
        height, width = image.shape[-2:]
        boxes = [clip_box(self.csv, line, box, (width, height), _SLACK) for line, box, _ in self._boxes[i]]
        target: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.tensor([label for _, _, label in self._boxes[i]], dtype=torch.int64),
        }
        return (image, target) if self.transform is None else self.transform(image, target)


def _images_below(folder: Path) -> list[str]:
    return sorted(
        os.path.join(where, name)
        for where, _, files in os.walk(folder)
        for name in files
        if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )
