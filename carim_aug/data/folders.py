"""Plain folders of grey images, one folder per class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from carim_aug.data.io import IMAGE_SUFFIXES, DataError, images_below
from carim_aug.data.items import Items, check_choice, check_names


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
            paths = images_below(self.root / name)
            if not paths:
                raise DataError(f"{self.root / name}: no image ({', '.join(IMAGE_SUFFIXES)}) in this class folder")
            self.paths += paths
            self.targets += [label] * len(paths)
