"""What a nodule does to a label: class index, one-hot row, or multi-label row with NaN for "not annotated".

DESIGN section 2 ("Labels"). A policy never changes a label in place and gives back the type, dtype and device it got.
An entry counts as positive from 0.5 up, so soft and smoothed labels have a class too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from carim_aug.labels.detection import BACKGROUND, check_target, instances, is_target, is_targets
from carim_aug.labels.names import CHESTXRAY14, OTHER, TORCHXRAYVISION18, UNKNOWN, find, plain
from carim_aug.labels.vector import LabelError, as_array, description, emptied, filled, sum_to_one, wanted, with_columns

KINDS = ("integer", "onehot", "multilabel", "detection")
POSITIVE = 0.5

Label = TypeVar("Label")


def coco_names(dataset: Any) -> tuple[str, ...] | None:
    """Names by category number of a data set that has COCO's index (torchvision's CocoDetection), "" for gaps."""
    categories = getattr(getattr(dataset, "coco", None), "cats", None)
    if not isinstance(categories, Mapping) or not categories or 0 in categories:
        return None
    numbered = {int(number): str(row["name"]) for number, row in categories.items()}
    return (BACKGROUND, *(numbered.get(number, "") for number in range(1, max(numbered) + 1)))


@dataclass(frozen=True)
class LabelPolicy:
    """How labels are read and written.

    Attributes:
        kind: "integer" (class indices), "onehot" (rows that sum to 1, one-hot or soft), "multilabel" (a column per
            finding: 0 to 1, NaN = not annotated), "detection" (targets with boxes, `carim_aug.labels.detection`) or "auto":
            targets are "detection", integers without columns "integer", rows of two that sum to 1 "onehot", all else
            "multilabel". One-hot labels of more than two classes need kind="onehot".
        classes: names in the order of the indices or columns. By default ("No Finding", "Nodule") for integer and
            one-hot, and for multi-label the 14 of ChestX-ray14, the 18 of torchxrayvision, or ("Nodule",) for a single
            column, which may also be a plain float per item. Detection counts from the background, 0: by default
            ("__background__", "Nodule").
        nodule: which class the nodules are; case and underscores do not matter.
        normal: which class images without a finding are; "normal" and "healthy" will do for "No Finding". Multi-label
            needs no column for it; in detection it is an image without boxes.
        fill: detection: field of a target to its value for nodules that come in, None to leave the field alone.
    """

    kind: str = "auto"
    classes: tuple[str, ...] | None = None
    nodule: str = "Nodule"
    normal: str = "No Finding"
    fill: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Check the names and take nodule and normal as the classes spell them."""
        if self.kind not in ("auto", *KINDS):
            raise LabelError(f"kind must be one of {('auto', *KINDS)}, got {self.kind!r}")
        for argument in ("nodule", "normal"):
            if not isinstance(getattr(self, argument), str):
                raise LabelError(f"{argument} must be a class name, got {getattr(self, argument)!r}")
        if self.classes is None:
            return
        is_names = isinstance(self.classes, Sequence) and not isinstance(self.classes, str)
        if not is_names or not all(isinstance(name, str) for name in self.classes):
            raise LabelError(f"classes must be a sequence of names, got {self.classes!r}")
        object.__setattr__(self, "classes", tuple(self.classes))
        if len({plain(name) for name in self.classes if name}) < sum(bool(name) for name in self.classes):
            raise LabelError(f"classes must be different names, got {self.classes}")
        nodule, normal = find(self.nodule, self.classes), find(self.normal, self.classes)
        if nodule is None:
            raise LabelError(
                f"nodule must be one of the classes {list(self.classes)}, got {self.nodule!r}: "
                "pass labels=LabelPolicy(nodule=...), or classes=(...) if these are not the labels' classes"
            )
        if nodule == normal:
            raise LabelError(f"nodule and normal must be two classes, got {nodule!r} for both")
        object.__setattr__(self, "nodule", nodule)
        object.__setattr__(self, "normal", normal or self.normal)

    def named_by(self, dataset: Any, label: Any = None) -> "LabelPolicy":
        """This policy with the class names that a dataset brings along, if the user gave none.

        Looks for ``pathologies`` (torchxrayvision, whose ChestX-ray14 columns are sorted by name) and ``classes``
        (torchvision, whose folders are: "nodule" comes before "normal"), also inside ``Subset``-like wrappers.

        Args:
            dataset: any dataset.
            label: one of its labels. Pathologies name columns, so a plain integer takes none from them, and a row takes
                only as many names as it has columns.

        Returns:
            A policy; this one if it has classes already or the dataset names none that fit.

        Raises:
            LabelError: none of the dataset's classes is the nodule class.
        """
        if self.classes is not None:
            return self
        targets = self.kind == "detection" or is_target(label)
        shape = None if label is None or targets else as_array(label).shape
        for _ in range(8):
            names = coco_names(dataset) if targets else None
            if names:
                return replace(self, classes=names)
            for attribute in ("classes",) if shape == () else ("pathologies", "classes"):
                names = getattr(dataset, attribute, None)
                if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
                    # Detection's label numbers count from the background: other lists of names are none of theirs.
                    if names[0] == BACKGROUND if targets else not shape or len(names) == shape[-1]:
                        return replace(self, classes=tuple(names))
            dataset = getattr(dataset, "dataset", None)
        return self

    def resolve(self, label: Any, *, batch: bool | None = None) -> "LabelPolicy":
        """The policy with kind and classes settled by an example.

        Args:
            label: one label or a batch of them.
            batch: whether it is a batch. None guesses: one axis of integers is a batch, one axis of floats is a row.

        Returns:
            A policy whose kind is none of "auto" and whose classes are known.

        Raises:
            LabelError: the label is of no known type or rank, or its columns have no known names.
        """
        if self._settled:
            return self
        if self.kind == "detection" or (self.kind == "auto" and (is_target(label) or is_targets(label))):
            return replace(self, kind="detection", classes=self.classes or (BACKGROUND, self.nodule))
        array = as_array(label)
        if array.ndim > 2 or (batch is False and array.ndim == 2):
            raise LabelError(f"labels must be {wanted(batch)}, got {description(label, array)}")
        integer = array.dtype.kind in "iub"
        if batch is None:
            batch = array.ndim == 2 or (array.ndim == 1 and integer)
        columns = array.shape[-1] if array.ndim - batch == 1 else None
        kind = self.kind
        if kind == "auto":
            if columns is None and integer:
                kind = "integer"
            elif columns == 2 and self._may_be_two_classes and sum_to_one(array).all():
                kind = "onehot"
            else:
                kind = "multilabel"
        classes = self.classes
        if classes is None:
            if kind == "integer":
                classes = (self.normal, self.nodule)
            elif kind == "onehot":
                classes = {2: (self.normal, self.nodule)}.get(columns or 0)
            else:
                classes = {1: (self.nodule,), 14: CHESTXRAY14, 18: TORCHXRAYVISION18}.get(columns or 1)
            if classes is None:
                raise LabelError(
                    f"labels must have columns whose names are known (kind={kind!r}), got {description(label, array)}: "
                    f"pass labels=LabelPolicy(kind={kind!r}, classes=(...))"
                )
        return replace(self, kind=kind, classes=classes)

    def check(self, labels: Any, *, batch: bool = True, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Nothing if the labels fit.

        Args:
            labels: (B,) or (B, C) or B detection targets if batch, else one label.
            batch: whether it is a batch.
            sizes: heights and widths of the images, in which boxes must lie.

        Raises:
            LabelError: wrong rank, type, number of columns or value.
        """
        policy = self.resolve(labels, batch=batch)
        if policy.kind == "detection":
            targets = policy._targets(labels) if batch else [labels]
            if sizes is not None and len(sizes) != len(targets):
                raise LabelError(f"labels must be as many as images ({len(sizes)}), got {len(targets)}")
            for i, target in enumerate(targets):
                check_target(target, policy._names, None if sizes is None else sizes[i])
            return
        array = as_array(labels)
        count = len(policy._names)
        described = description(labels, array)
        if batch and (array.ndim == 0 or len(array) == 0):
            raise LabelError(f"labels must be a batch with at least one item, got {described}")
        if policy.kind == "integer":
            if array.dtype.kind not in "iub":
                raise LabelError(f"labels must be integers (kind='integer'), got {described}")
            if array.ndim != batch:
                raise LabelError(
                    f"labels must be {'(B,)' if batch else 'one integer'} (kind='integer'), got {described}"
                )
            wrong = array[(array < 0) | (array >= count)]
            if wrong.size:
                raise LabelError(
                    f"labels must be from 0 to {count - 1} for the classes {list(policy._names)}, got {wrong.flat[0]}: "
                    "more classes need labels=LabelPolicy(classes=(...))"
                )
            return
        bare = policy.kind == "multilabel" and count == 1 and array.ndim == batch
        if not bare and (array.ndim != batch + 1 or array.shape[-1] != count):
            shape = f"({'B, ' if batch else ''}{count}{'' if batch else ','})"
            raise LabelError(f"labels must be {shape} (kind={policy.kind!r}), got {described}")
        wrong = array[~((array >= 0) & (array <= 1) | (np.isnan(array) & (policy.kind == "multilabel")))]
        if wrong.size:
            allowed = "from 0 to 1, or NaN for unknown" if policy.kind == "multilabel" else "from 0 to 1"
            hint = ": uncertain findings are NaN here, not -1" if wrong.flat[0] == -1 else ""
            raise LabelError(f"labels must be {allowed} (kind={policy.kind!r}), got {wrong.flat[0]}{hint}")
        if policy.kind == "onehot":
            wrong = array[~sum_to_one(array)]
            if wrong.size:
                raise LabelError(
                    f"labels must be rows that sum to 1 (kind='onehot'), got {wrong.reshape(-1, count)[0]}"
                )

    def class_of(self, label: Any) -> str:
        """The class of one label.

        Integer: the class at the index. One-hot: the class of the largest entry, the first of equal ones. Multi-label:
        the nodule class if its entry is positive; else the normal class if it has a column and that is positive; else
        "unknown" if the nodule entry is NaN; else the normal class if nothing is positive (NaN is not) and no column
        for it says otherwise; else "other".

        Args:
            label: one label.

        Returns:
            A name: one of the classes, the normal class, "other" or "unknown".

        Raises:
            LabelError: an index outside the classes, or a wrong rank.
        """
        policy = self.resolve(label, batch=False)
        if policy.kind == "detection":
            numbers = instances(label)[1]
            return policy.nodule if policy._nodule in numbers else OTHER if numbers else policy.normal
        array = as_array(label)
        if array.ndim > 1 or (array.ndim == 1 and policy.kind == "integer"):
            raise LabelError(f"label must be one label (kind={policy.kind!r}), got {description(label, array)}")
        return policy._classes(array[None])[0]

    def classes_of(self, labels: Any) -> list[str]:
        """The class of every label of a batch, as ``class_of`` has it.

        Args:
            labels: (B,) or (B, C).

        Returns:
            B names.

        Raises:
            LabelError: an index outside the classes, or a wrong rank.
        """
        policy = self.resolve(labels, batch=True)
        if policy.kind == "detection":
            return [policy.class_of(target) for target in policy._targets(labels)]
        array = as_array(labels)
        if array.ndim == 0 or (array.ndim != 1 and policy.kind == "integer"):
            raise LabelError(f"labels must be a batch (kind={policy.kind!r}), got {description(labels, array)}")
        return policy._classes(array)

    def counts(self, labels: Iterable[Any]) -> dict[str, int]:
        """How many labels there are of each class.

        Args:
            labels: labels one by one, or a batch of them in one tensor or array.

        Returns:
            Class to count: first the normal and the nodule class (for integer and one-hot labels all classes), even if
            there are none of them; then "other" and "unknown" where there are any.

        Raises:
            LabelError: a label that does not fit.
        """
        policy: LabelPolicy = self
        if isinstance(labels, torch.Tensor | np.ndarray):
            policy = self.resolve(labels, batch=True)
            found = Counter(policy.classes_of(labels))
        else:
            found = Counter()
            for label in labels:
                policy = policy.resolve(label, batch=False)
                found[policy.class_of(label)] += 1
        first = list(policy._names) if policy.kind in ("integer", "onehot") else [policy.normal, policy.nodule]
        return {name: found[name] for name in dict.fromkeys([*first, *sorted(found)])}

    def name_of(self, class_name: str) -> str:
        """A class name as this policy spells it.

        Args:
            class_name: any case, spaces or underscores; "No Finding", "normal" and "healthy" are one.

        Returns:
            One of the classes, the normal class, "other" or "unknown".

        Raises:
            LabelError: no such class.
        """
        known = tuple(dict.fromkeys((self.nodule, self.normal, *(self.classes or ()))))
        if self.kind in ("multilabel", "auto", "detection"):
            known += (OTHER, UNKNOWN)
        name = find(class_name, known) if isinstance(class_name, str) else None
        if name is None:
            raise LabelError(f"class must be one of {[k for k in known if k]}, got {class_name!r}")
        return name

    def can_make(self, class_name: str) -> bool:
        """Whether a generated image can be of this class: the nodule class, and the normal one where labels can say so.

        Args:
            class_name: a class, spelled as ``name_of`` takes it.

        Returns:
            False for the other classes that the policy knows.

        Raises:
            LabelError: no such class.
        """
        name = self.name_of(class_name)
        if name == self.normal:
            return self.kind in ("multilabel", "auto", "detection") or self.classes is None or name in self.classes
        return name == self.nodule

    def synthetic(self, label_like: Label, class_name: str) -> Label:
        """The label of a wholly generated image.

        Integer: the index of the class. One-hot: its hard row. Multi-label: the nodule column is 1 or 0, a column for
        the normal class 0 or 1, and the others are 0, for the generator draws chests with a nodule or without a
        finding; except that columns which are NaN in ``label_like`` stay so: this dataset does not annotate them.

        Args:
            label_like: a label of the dataset, or a batch; gives type, dtype, device and NaN columns. Never changed.
            class_name: the nodule or the normal class.

        Returns:
            A new label of the same type.

        Raises:
            LabelError: a class that cannot be made.
        """
        policy = self.resolve(label_like)
        name = policy.name_of(class_name)
        if policy.kind == "detection":
            raise LabelError(
                "labels of kind 'detection' change with their boxes: use carim_aug.labels.detection.with_nodules"
            )
        if not policy.can_make(name):
            raise LabelError(
                f"class must be one that can be made, {policy.nodule!r} or {policy.normal!r} if labels have it, "
                f"got {class_name!r}"
            )
        if policy.kind == "integer":
            return filled(label_like, policy._names.index(name))
        if policy.kind == "onehot":
            return with_columns(filled(label_like, 0), {policy._names.index(name): 1}, len(policy._names))
        if len(policy._names) == 1:
            return filled(label_like, int(name == policy.nodule))
        columns = {policy._nodule: int(name == policy.nodule)}
        if policy._normal is not None:
            columns[policy._normal] = int(name == policy.normal)
        return with_columns(emptied(label_like), columns, len(policy._names))

    def add_nodule(self, label: Label) -> Label:
        """The label of a real image into which a nodule was grafted.

        Integer: the index of the nodule class. One-hot: its hard row. Multi-label: the nodule column becomes 1, a
        column for the normal class 0; all others stay as they were, NaN and torchxrayvision's "Lung Lesion" included.

        Args:
            label: a label or a batch. Never changed.

        Returns:
            A new label of the same type.
        """
        policy = self.resolve(label)
        if policy.kind == "multilabel" and len(policy._names) > 1:
            columns = {policy._nodule: 1}
            if policy._normal is not None:
                columns[policy._normal] = 0
            return with_columns(label, columns, len(policy._names))
        return policy.synthetic(label, policy.nodule)

    @property
    def nodule_number(self) -> int:
        """The nodule class's place among the classes: its index, column, or number in detection."""
        return self._nodule

    @staticmethod
    def _targets(labels: Any) -> Any:
        """Detection targets of a batch, or LabelError."""
        if not isinstance(labels, tuple | list) or not labels or not is_targets(labels):
            raise LabelError(
                f"labels must be a list or tuple of detection targets, one an image, got {type(labels).__name__}: "
                "pass collate_fn=lambda batch: tuple(zip(*batch))"
            )
        return labels

    @property
    def _may_be_two_classes(self) -> bool:
        return self.classes is None or self.normal in self.classes

    @cached_property
    def _settled(self) -> bool:
        return self.kind != "auto" and self.classes is not None

    @property
    def _names(self) -> tuple[str, ...]:
        assert self.classes is not None, "resolve gives classes"
        return self.classes

    @cached_property
    def _nodule(self) -> int:
        return self._names.index(self.nodule)

    @cached_property
    def _normal(self) -> int | None:
        return self._names.index(self.normal) if self.normal in self._names else None

    def _classes(self, array: np.ndarray) -> list[str]:
        """The classes of (B,) or (B, C) labels; the policy is settled."""
        names = self._names
        if self.kind == "integer":
            if array.dtype.kind not in "iub":
                raise LabelError(f"labels must be integers (kind='integer'), got {array.dtype}")
            indices = array.astype(np.int64).tolist()
            if indices and not (0 <= min(indices) and max(indices) < len(names)):
                wrong = min(indices) if min(indices) < 0 else max(indices)
                raise LabelError(
                    f"labels must be from 0 to {len(names) - 1} for the classes {list(names)}, got {wrong}"
                )
            return [names[i] for i in indices]
        if array.ndim == 1 and len(names) == 1:
            array = array[:, None]
        if array.ndim != 2 or array.shape[1] != len(names):
            raise LabelError(f"labels must have {len(names)} columns (kind={self.kind!r}), got shape {array.shape}")
        if self.kind == "onehot":
            return [names[i] for i in array.argmax(1).tolist()]
        positive = array >= POSITIVE
        nodule, any_positive = array[:, self._nodule], positive.any(1)
        said_normal = said_not = np.zeros(len(array), dtype=bool)
        if self._normal is not None:
            said_normal, said_not = positive[:, self._normal], array[:, self._normal] < POSITIVE
        codes = np.where(any_positive | said_not, 2, 1)
        codes[np.isnan(nodule)] = 3
        codes[said_normal] = 1
        codes[positive[:, self._nodule]] = 0
        words = (self.nodule, self.normal, OTHER, UNKNOWN)
        return [words[code] for code in codes.tolist()]
