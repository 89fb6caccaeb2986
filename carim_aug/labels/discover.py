"""What a data set says of its labels without loading an image: class names, and the labels themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from carim_aug.labels.base import LabelError
from carim_aug.labels.coco import BACKGROUND, coco_names
from carim_aug.labels.detection import instances, is_target
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.vector import as_array

WRAPPERS = 8
"""Data sets inside data sets that are looked into for names."""


def name_classes(policy: LabelPolicy, dataset: Any, label: Any = None) -> LabelPolicy:
    """Return the policy with the class names that a data set brings along, if the user gave none.

    Looks for `pathologies` (torchxrayvision, whose ChestX-ray14 columns are sorted by name), `classes` (torchvision,
    whose folders are: "nodule" comes before "normal") and COCO's index, inside `Subset`-like wrappers and the parts of
    a `ConcatDataset` too. Pathologies name columns, so a label that is a plain integer takes none from them, and a row
    takes only as many names as it has columns. LabelError if none is the nodule class, or if parts differ.
    """
    if policy.classes is not None:
        return policy
    if isinstance(dataset, ConcatDataset):
        policies = [name_classes(policy, part, label) for part in dataset.datasets]
        names = dict.fromkeys(part.classes for part in policies)
        if len(names) > 1:
            rule = "of one list of classes in all parts of a ConcatDataset"
            raise LabelError(f"labels must be {rule}, got {list(names)}: pass labels=LabelPolicy(classes=(...))")
        return policies[0]
    targets = policy.kind == "detection" or is_target(label)
    shape = None if label is None or targets else as_array(label).shape
    for _ in range(WRAPPERS):
        if targets and (found := coco_names(dataset)):
            return replace(policy, classes=found)
        for attribute in ("classes",) if shape == () else ("pathologies", "classes"):
            found = getattr(dataset, attribute, None)
            if isinstance(found, Sequence) and found and all(isinstance(name, str) for name in found):
                # Detection's label numbers count from the background: other lists of names are none of theirs.
                if found[0] == BACKGROUND if targets else not shape or len(found) == shape[-1]:
                    return replace(policy, classes=tuple(found))
        dataset = getattr(dataset, "dataset", None)
        if isinstance(dataset, ConcatDataset):
            return name_classes(policy, dataset, label)
    return policy


def check_order(policy: LabelPolicy, key: Any, label: Any) -> None:
    """Raise LabelError for 14 columns without names under torchxrayvision's key "lab", in one label or a batch.

    Its own data sets sort their columns by name, so they are hardly in the official order of ChestX-ray14.
    """
    shape = getattr(label, "shape", ())
    if policy.classes is None and isinstance(key, str) and key == "lab" and shape and shape[-1] == 14:
        rule = "have named columns where they are torchxrayvision's 14 under 'lab', which it sorts"
        remedy = "pass labels=LabelPolicy('multilabel', classes=dataset.pathologies)"
        raise LabelError(f"labels must {rule}, got shape {tuple(shape)} and no names: {remedy}")


def labels_without_images(dataset: Any) -> Any:
    """Return all labels of a data set from `targets` or `labels`, without loading its images; None if it has neither.

    Sees through `torch.utils.data.Subset` and `ConcatDataset`.
    """
    if isinstance(dataset, Subset):
        inner = labels_without_images(dataset.dataset)
        if isinstance(inner, Tensor | np.ndarray):
            return inner[list(dataset.indices)]
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_without_images(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(dataset):
            return labels
    return None


def same_label(a: Any, b: Any) -> bool:
    """Return whether two labels of one sample are equal, NaN and all."""
    if is_target(a) and is_target(b):
        (boxes, numbers), (other_boxes, other_numbers) = instances(a), instances(b)
        return numbers == other_numbers and boxes.equal(other_boxes)
    try:
        x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return x.shape == y.shape and bool(np.array_equal(x, y, equal_nan=True))
