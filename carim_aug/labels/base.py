"""What every label format can do, and the error of labels that do not fit."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

KINDS = ("integer", "onehot", "multilabel", "detection")
"""The label formats, by name."""

OTHER, UNKNOWN = "other", "unknown"
"""Classes of multi-label rows and targets that are neither nodule nor normal, or whose nodule entry is NaN."""


class LabelError(ValueError):
    """A label, or a class name, that does not fit the policy."""


class Change(NamedTuple):
    """What becomes of one image."""

    row: int  # its place in its batch
    class_name: str  # of the synthetic image, or of what was grafted into the real one
    boxes: Tensor  # (k, 4) float32 XYXY in pixels of the image: the new nodules
    size: tuple[int, int]  # height and width of the image
    whole: bool  # whether the image is replaced, and with it all that its label said


@dataclass(frozen=True)
class LabelFormat(ABC):
    """How labels of one kind are read and written. None is ever changed in place."""

    classes: tuple[str, ...]  # names in the order of the indices or columns, or of the label numbers from background on
    nodule: str  # the nodule class, one of them
    normal: str  # the class of images without a finding; multi-label and detection need no column or number for it

    @property
    def nodule_number(self) -> int:
        """The nodule class's index, column or label number."""
        return self.classes.index(self.nodule)

    @abstractmethod
    def check(self, labels: Any, *, batch: bool, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless labels, of B images if batch, else of one, fit, and boxes images of these sizes."""

    @abstractmethod
    def classes_of(self, labels: Any) -> list[str]:
        """Return the class of every label of a batch."""

    @abstractmethod
    def change(self, labels: Any, changes: Sequence[Change]) -> Any:
        """Return the labels of a batch after these changes, of the same type, dtype and device."""

    @abstractmethod
    def change_one(self, label: Any, change: Change) -> Any:
        """Return one label after a change; `change.row` means nothing."""
