"""Labels that are numbers: class indices, one-hot rows, and multi-label rows with NaN for "not annotated".

An entry counts as positive from 0.5 up, so soft and smoothed labels have a class too.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from carim_aug.labels.base import OTHER, UNKNOWN, Change, LabelError, LabelFormat
from carim_aug.ops.findings import NORMAL_WORDS, plain

POSITIVE = 0.5
ROW_SUM = 1e-2
"""How far from 1 a one-hot or soft row may sum up: float16 rows of many classes."""


class VectorLabels(LabelFormat):
    """Labels as numbers, arrays or tensors, (B,) or (B, C) in a batch."""

    def change(self, labels: Any, changes: Sequence[Change]) -> Any:
        """Return labels after these changes; see `LabelFormat`."""
        rows: dict[tuple[bool, str], list[int]] = {}
        for change in changes:
            rows.setdefault((change.whole, change.class_name), []).append(change.row)
        if not rows:
            return labels
        changed = labels.clone() if isinstance(labels, torch.Tensor) else labels.copy()
        for (whole, class_name), places in rows.items():
            old = labels[places]
            changed[places] = self.synthetic(old, class_name) if whole else self.add_nodule(old)
        return changed

    def change_one(self, label: Any, change: Change) -> Any:
        """Return one label after a change."""
        return self.synthetic(label, change.class_name) if change.whole else self.add_nodule(label)

    def add_nodule(self, labels: Any) -> Any:
        """Return the label, or batch of labels, of real images into which nodules were grafted."""
        return self.synthetic(labels, self.nodule)

    @abstractmethod
    def synthetic(self, labels: Any, class_name: str) -> Any:
        """Return the label, or batch of labels, of whole generated images; the old ones give type, dtype and device."""


class IntegerLabels(VectorLabels):
    """Class indices: numbers, or (B,) integers."""

    def check(self, labels: Any, *, batch: bool, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless these are indices of the classes."""
        self._indices(batch_of(labels, batch), labels, rank=int(batch))

    def classes_of(self, labels: Any) -> list[str]:
        """Return the classes at the indices."""
        return [self.classes[i] for i in self._indices(as_array(labels), labels, rank=1).astype(np.int64).tolist()]

    def synthetic(self, labels: Any, class_name: str) -> Any:
        """Return the index of the class."""
        return fill(labels, self.classes.index(class_name))

    def _indices(self, array: np.ndarray, labels: Any, *, rank: int) -> np.ndarray:
        if array.dtype.kind not in "iub":
            raise LabelError(f"labels must be integers (kind='integer'), got {describe(labels)}")
        if array.ndim != rank:
            wanted = "(B,)" if rank else "one integer"
            raise LabelError(f"labels must be {wanted} (kind='integer'), got {describe(labels)}")
        if (wrong := array[(array < 0) | (array >= len(self.classes))]).size:
            rule = f"from 0 to {len(self.classes) - 1} for the classes {list(self.classes)}"
            remedy = "more classes need labels=LabelPolicy(classes=(...))"
            raise LabelError(f"labels must be {rule}, got {wrong.flat[0]}: {remedy}")
        return array


class OneHotLabels(VectorLabels):
    """Rows that sum to 1, one-hot or soft; the class is that of the largest entry, the first of equal ones."""

    def check(self, labels: Any, *, batch: bool, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless these are rows from 0 to 1 that sum to 1."""
        array = batch_of(labels, batch)
        check_columns(array, len(self.classes), batch, "onehot", labels)
        if (wrong := array[~((array >= 0) & (array <= 1))]).size:
            remedy = "leave such samples out, or return rows that sum to 1"
            raise LabelError(f"labels must be from 0 to 1 (kind='onehot'), got {wrong.flat[0]}: {remedy}")
        if (wrong := array[~sums_to_one(array)]).size:
            got = wrong.reshape(-1, len(self.classes))[0]
            raise LabelError(f"labels must be rows that sum to 1 (kind='onehot'), got {got}")

    def classes_of(self, labels: Any) -> list[str]:
        """Return the class of each row's largest entry."""
        array = as_array(labels)
        check_columns(array, len(self.classes), True, "onehot", labels)
        return [self.classes[i] for i in array.argmax(1).tolist()]

    def synthetic(self, labels: Any, class_name: str) -> Any:
        """Return the class's hard row."""
        return set_columns(fill(labels, 0), {self.classes.index(class_name): 1}, len(self.classes))


class MultiLabels(VectorLabels):
    """A column per finding, 0 to 1, NaN where it is not annotated; of a single column also bare numbers.

    The class of a row: the nodule class if its entry is positive; else the normal class if it has a column and that is
    positive; else "unknown" if the nodule entry is NaN; else the normal class if nothing is positive (NaN is not) and
    no column for it says otherwise; else "other". Where several columns mean normal, such as "No Finding" and "No
    Nodule", all of them change together.
    """

    @property
    def normal_numbers(self) -> list[int]:
        """The columns that mean normal."""
        return [i for i, name in enumerate(self.classes) if name == self.normal or plain(name) in NORMAL_WORDS]

    def check(self, labels: Any, *, batch: bool, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless these are entries from 0 to 1, or NaN."""
        array = batch_of(labels, batch)
        if len(self.classes) > 1 or array.ndim != batch:
            check_columns(array, len(self.classes), batch, "multilabel", labels)
        if (wrong := array[~((array >= 0) & (array <= 1) | np.isnan(array))]).size:
            remedy = (
                "uncertain findings are NaN here, not -1" if wrong.flat[0] == -1 else "use integers for class numbers"
            )
            got = f"{wrong.flat[0]}: {remedy}"
            raise LabelError(f"labels must be from 0 to 1, or NaN for unknown (kind='multilabel'), got {got}")

    def classes_of(self, labels: Any) -> list[str]:
        """Return the class of each row, see the class."""
        array = as_array(labels)
        if array.ndim == 1 and len(self.classes) == 1:
            array = array[:, None]
        check_columns(array, len(self.classes), True, "multilabel", labels)
        nodule, known = array[:, self.nodule_number], self.normal in self.classes
        normal = array[:, self.classes.index(self.normal)] if known else np.full(len(array), np.nan)
        other = (array >= POSITIVE).any(1) | (normal < POSITIVE)
        cases = [nodule >= POSITIVE, normal >= POSITIVE, np.isnan(nodule), other]
        return np.select(cases, [self.nodule, self.normal, UNKNOWN, OTHER], self.normal).tolist()

    def synthetic(self, labels: Any, class_name: str) -> Any:
        """Return rows of 0 but for the nodule and the normal column: the generator makes chests without other findings.

        Columns that are NaN in the old labels stay so: this data set does not annotate them.
        """
        return self._set(clear(labels), class_name)

    def add_nodule(self, labels: Any) -> Any:
        """Return rows with the nodule column 1 and the normal column 0; all others stay, NaN too."""
        return self._set(labels, self.nodule)

    def _set(self, labels: Any, class_name: str) -> Any:
        if len(self.classes) == 1:
            return fill(labels, int(class_name == self.nodule))
        columns = dict.fromkeys(self.normal_numbers, int(class_name == self.normal))
        columns[self.nodule_number] = int(class_name == self.nodule)
        return set_columns(labels, columns, len(self.classes))


# --- Numbers, arrays and tensors alike ---
def as_array(label: Any) -> np.ndarray:
    """Return a label as a numpy array of integers, booleans or floats, to look at only."""
    if isinstance(label, torch.Tensor):
        label = label.detach().cpu()
        array = (label.float() if label.dtype == torch.bfloat16 else label).numpy()
    elif isinstance(label, np.ndarray | np.generic | int | float):
        array = np.asarray(label)
    else:
        raise LabelError(f"labels must be numbers, arrays or tensors, got {label!r} ({type(label).__name__})")
    if array.dtype.kind not in "iubf":
        raise LabelError(f"labels must be integers or floating point, got {array.dtype}")
    return array


def batch_of(labels: Any, batch: bool) -> np.ndarray:
    """Return labels as an array; LabelError for a batch of nothing."""
    array = as_array(labels)
    if batch and (array.ndim == 0 or len(array) == 0):
        raise LabelError(f"labels must be a batch with at least one item, got {describe(labels)}")
    return array


def check_columns(array: np.ndarray, count: int, batch: bool, kind: str, labels: Any) -> None:
    """Raise LabelError unless the labels are (B, count) if batch, else (count,)."""
    if array.ndim != batch + 1 or array.shape[-1] != count:
        shape = f"(B, {count})" if batch else f"({count},)"
        raise LabelError(f"labels must be {shape} (kind={kind!r}), got {describe(labels)}")


def sums_to_one(array: np.ndarray) -> np.ndarray:
    """Return which rows sum to 1."""
    return np.abs(array.sum(-1, dtype=np.float64) - 1) < ROW_SUM


def describe(label: Any) -> str:
    """Return a label in words: shape and dtype, or the number itself."""
    array = as_array(label)
    dtype = label.dtype if isinstance(label, torch.Tensor) else array.dtype
    return f"{tuple(array.shape)} {dtype}" if array.ndim else f"{label!r}"


def fill(label: Any, value: int) -> Any:
    """Return a label like this one, `value` everywhere."""
    if isinstance(label, torch.Tensor):
        return torch.full_like(label, value)
    if isinstance(label, np.ndarray):
        return np.full_like(label, value)
    return type(label)(value)


def clear(label: Any) -> Any:
    """Return a label like this one, 0 everywhere but where it is NaN."""
    if isinstance(label, torch.Tensor):
        zeros = torch.zeros_like(label)
        return zeros.masked_fill(label.isnan(), torch.nan) if label.is_floating_point() else zeros
    if isinstance(label, np.ndarray):
        return np.where(np.isnan(label), label, np.zeros_like(label))
    return label


def set_columns(label: Any, columns: dict[int, int], count: int) -> Any:
    """Return a copy of a label that has `count` columns, with these set."""
    if not isinstance(label, torch.Tensor | np.ndarray) or label.ndim == 0 or label.shape[-1] != count:
        raise LabelError(f"labels must have {count} columns, got {label!r}")
    copied = label.clone() if isinstance(label, torch.Tensor) else label.copy()
    for column, value in columns.items():
        copied[..., column] = value
    return copied
