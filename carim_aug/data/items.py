"""What the data sets take and return: options, and for one index an image and its target, after a user's transform."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from carim_aug.data.io import read_grey
from carim_aug.ops.findings import FINDINGS


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless an argument is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_names(name: str, value: Any) -> None:
    """Raise TypeError for a string where several are meant."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of names, got the string {value!r}")


def targets_of(labels: np.ndarray, target: str) -> list[Any]:
    """Return labels (N, 14) as N targets: float32 rows for "multilabel", else 1 with a nodule and 0 without."""
    if target == "multilabel":
        return list(torch.from_numpy(labels))
    return labels[:, FINDINGS.index("Nodule")].astype(int).tolist()


def detection_target(boxes: Any, labels: Sequence[int], height: int, width: int) -> dict[str, Tensor]:
    """Return `boxes`, `tv_tensors.BoundingBoxes` (k, 4) float32 XYXY in pixels, and `labels`, (k,) int64."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


class Items(Dataset[tuple[Any, Any]]):
    """Images with a target each, after a user's transform, which takes the image alone, or (image, target) of boxes."""

    paths: list[str]
    targets: list[Any]
    transform: Callable[..., Any] | None
    channels: int

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        image = self._image(i)
        target = self._target(i, *image.shape[-2:])
        if isinstance(target, dict):
            return (image, target) if self.transform is None else self.transform(image, target)
        return (image if self.transform is None else self.transform(image)), target

    def _image(self, i: int) -> tv_tensors.Image:
        return read_grey(self.paths[i], channels=self.channels)

    def _target(self, i: int, height: int, width: int) -> Any:
        target = self.targets[i]
        return target.clone() if isinstance(target, Tensor) else target
