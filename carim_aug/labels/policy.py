"""`LabelPolicy`: how a user's labels are read, and what a nodule does to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from carim_aug.labels.base import KINDS, OTHER, UNKNOWN, Change, LabelError
from carim_aug.labels.coco import BACKGROUND
from carim_aug.labels.detection import DetectionTargets, instances, is_target, is_targets
from carim_aug.labels.vector import IntegerLabels, MultiLabels, OneHotLabels, as_array, describe, sums_to_one
from carim_aug.ops.findings import NORMAL_WORDS, plain

FORMATS = dict(zip(KINDS, (IntegerLabels, OneHotLabels, MultiLabels, DetectionTargets), strict=True))
"""The class of each kind: a new kind of labels is one class more (`carim_aug.labels.base.LabelFormat`)."""


@dataclass(frozen=True)
class LabelPolicy:
    """How labels are read and written. A label is never changed in place, and comes back in its type, dtype and device.

    Attributes:
        kind: "integer" (class indices), "onehot" (rows that sum to 1, one-hot or soft), "multilabel" (a column per
            finding: 0 to 1, NaN = not annotated), "detection" (targets with boxes) or "auto": targets are "detection",
            integers without columns "integer", rows of two that sum to 1 "onehot", all else "multilabel". One-hot
            labels of more than two classes need kind="onehot".
        classes: names in the order of the indices or columns. By default ("No Finding", "Nodule") for integers and for
            kind="onehot", and ("Nodule",) for a single column, which may also be a plain float per item; other columns
            must be named, here or by the data set. Detection counts from the background, 0: by default
            ("__background__", "Nodule").
        nodule: which class the nodules are; case and underscores do not matter.
        normal: which class images without a finding are; "normal" and "healthy" will do for "No Finding". Multi-label
            needs no column for it; in detection it is an image without boxes.
        fill: detection: field of a target to its value for nodules that come in, None to leave the field alone.

    Raises:
        LabelError: names that break these rules.
    """

    kind: str = "auto"
    classes: tuple[str, ...] | None = None
    nodule: str = "Nodule"
    normal: str = "No Finding"
    fill: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
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
            raise LabelError(
                f"classes must be different names, got {self.classes}: pass labels=LabelPolicy(classes=...)"
            )
        nodule, normal = _find(self.nodule, self.classes), _find(self.normal, self.classes)
        if nodule is None:
            remedy = "pass labels=LabelPolicy(nodule=...), or classes=(...) if these are not the labels' classes"
            raise LabelError(f"nodule must be one of the classes {list(self.classes)}, got {self.nodule!r}: {remedy}")
        if nodule == normal:
            raise LabelError(f"nodule and normal must be two classes, got {nodule!r} for both")
        # As the classes spell them.
        object.__setattr__(self, "nodule", nodule)
        object.__setattr__(self, "normal", normal or self.normal)

    # --- Kind and classes ---
    def resolve(self, label: Any, *, batch: bool | None = None) -> "LabelPolicy":
        """Return the policy with kind and classes inferred from an example.

        Args:
            label: one label or a batch of them.
            batch: whether it is a batch. None guesses: one axis of integers is a batch, one axis of floats is a row.

        Raises:
            LabelError: the label is of no known type or rank, or its columns have no known names.
        """
        if self.kind != "auto" and self.classes is not None:
            return self
        if self.kind == "detection" or (self.kind == "auto" and (is_target(label) or is_targets(label))):
            return replace(self, kind="detection", classes=self.classes or (BACKGROUND, self.nodule))
        if label is None or (isinstance(label, tuple | list) and label and not any(x is not None for x in label)):
            rule = "numbers, arrays or tensors, or targets with boxes"
            raise LabelError(
                f"labels must be {rule}, got None: if it has no boxes, pass labels=LabelPolicy('detection')"
            )
        array = as_array(label)
        if array.ndim > 2 or (batch is False and array.ndim == 2):
            wanted = {True: "(B,) or (B, C)", False: "a number or (C,)", None: "a number, (B,), (C,) or (B, C)"}[batch]
            raise LabelError(f"labels must be {wanted}, got {describe(label)}")
        integer = array.dtype.kind in "iub"
        if batch is None:
            batch = array.ndim == 2 or (array.ndim == 1 and integer)
        columns = array.shape[-1] if array.ndim - batch == 1 else None
        kind, classes = self.kind, self.classes
        if kind == "auto":
            two_classes = columns == 2 and classes and self.normal in classes and sums_to_one(array).all()
            kind = "integer" if columns is None and integer else "onehot" if two_classes else "multilabel"
        if classes and len(classes) > 1 and kind == "multilabel" and columns is None:
            # One float a sample: the chance of the second of two classes.
            if len(classes) > 2 or classes[1] != self.nodule:
                rule = f"be integers, or 1.0 for a nodule, where the classes are {list(classes)}"
                remedy = f"return int(label), or pass labels=LabelPolicy(classes=({self.nodule!r},)) if 1.0 is a nodule"
                raise LabelError(f"labels must {rule}, got {describe(label)}: {remedy}")
            classes = (self.nodule,)
        if classes is None:
            by_kind: dict[str, dict[int | None, tuple[str, ...]]] = {
                "integer": {columns: (self.normal, self.nodule)},
                "onehot": {2: (self.normal, self.nodule)},
                "multilabel": {None: (self.nodule,), 1: (self.nodule,)},
            }
            usual = by_kind[kind]
            if columns not in usual:
                rule = f"have columns whose names are known (kind={kind!r})"
                remedy = f"pass labels=LabelPolicy({kind!r}, classes=(...))"
                if columns in (14, 18):
                    remedy += (
                        ", carim_aug.data.FINDINGS in ChestX-ray14's order, dataset.pathologies in torchxrayvision's"
                    )
                raise LabelError(f"labels must {rule}, got {describe(label)}: {remedy}")
            classes = usual[columns]
        return replace(self, kind=kind, classes=classes)

    @cached_property
    def format(self) -> Any:
        """The `carim_aug.labels.base.LabelFormat` of a resolved policy."""
        options = {"fill": self.fill} if self.kind == "detection" else {}
        return FORMATS[self.kind](self.classes, self.nodule, self.normal, **options)

    # --- Class names ---
    def name_of(self, class_name: str) -> str:
        """Return a class name, of any case, spaces or underscores, as this policy spells it.

        "No Finding", "normal" and "healthy" are one. LabelError for what is no class, nor normal, "other" or "unknown".
        """
        known = tuple(dict.fromkeys((self.nodule, self.normal, *(self.classes or ()))))
        if self.kind not in ("integer", "onehot"):
            known += (OTHER, UNKNOWN)
        name = _find(class_name, known) if isinstance(class_name, str) else None
        if name is None:
            raise LabelError(f"class must be one of {[k for k in known if k]}, got {class_name!r}")
        return name

    def can_make(self, class_name: str) -> bool:
        """Return whether generated images can be of a class: the nodule's, and the normal one if labels can say so."""
        name = self.name_of(class_name)
        if name == self.normal:
            return self.kind not in ("integer", "onehot") or self.classes is None or name in self.classes
        return name == self.nodule

    # --- Labels ---
    def check(self, labels: Any, *, batch: bool = True, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless the labels fit; see `LabelFormat.check`."""
        self.resolve(labels, batch=batch).format.check(labels, batch=batch, sizes=sizes)

    def class_of(self, label: Any) -> str:
        """Return the class of one label; see `LabelFormat`."""
        policy = self.resolve(label, batch=False)
        if policy.kind == "detection":
            return policy.format.class_of(label)
        array = as_array(label)
        if array.ndim > 1 or (array.ndim == 1 and policy.kind == "integer"):
            raise LabelError(f"label must be one label (kind={policy.kind!r}), got {describe(label)}")
        return policy.format.classes_of(np.asarray(array)[None])[0]

    def classes_of(self, labels: Any) -> list[str]:
        """Return the class of every label of a batch."""
        return self.resolve(labels, batch=True).format.classes_of(labels)

    def boxes_of(self, labels: Any) -> list[Any] | None:
        """Return the boxes of a batch's targets, each (k, 4) float32 XYXY in pixels; None for labels without boxes."""
        return [instances(target)[0] for target in labels] if self.kind == "detection" else None

    def synthetic(self, label: Any, class_name: str) -> Any:
        """Return the label, or batch of labels, of wholly generated images of the nodule or the normal class.

        The old label gives type, dtype, device and NaN columns. LabelError for a class that cannot be made, and for a
        detection target, which changes with its boxes.
        """
        policy = self._resolve_numbers(label)
        name = policy.name_of(class_name)
        if not policy.can_make(name):
            rule = f"one that can be made, {policy.nodule!r} or {policy.normal!r} if labels have it"
            raise LabelError(f"class must be {rule}, got {class_name!r}")
        return policy.format.synthetic(label, name)

    def add_nodule(self, label: Any) -> Any:
        """Return the label, or batch of labels, of real images into which nodules were grafted; see `synthetic`."""
        return self._resolve_numbers(label).format.add_nodule(label)

    def change(self, labels: Any, changes: Sequence[Change]) -> Any:
        """Return the labels of a batch after changes; the policy is resolved."""
        return self.format.change(labels, changes)

    def _resolve_numbers(self, label: Any) -> "LabelPolicy":
        policy = self.resolve(label)
        if policy.kind == "detection":
            remedy = "use labels.detection.add_nodules"
            raise LabelError(f"labels of kind 'detection' change with their boxes, got no boxes: {remedy}")
        return policy


def _find(name: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that is meant by `name`, or None."""
    if name in names:
        return name
    wanted = NORMAL_WORDS if plain(name) in NORMAL_WORDS else (plain(name),)
    return next((known for known in names if plain(known) in wanted), None)
