"""What a data set says of its labels without loading an image: class names, and the labels themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from carim_aug.labels.base import LabelError
from carim_aug.labels.coco import BACKGROUND, coco_names
from carim_aug.labels.detection import instances, is_target
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import LABEL_KEYS
from carim_aug.labels.vector import as_array
from carim_aug.ops.findings import plain

DEPTH, PARTS = 8, 256
"""Data sets inside data sets that are looked into, and how many there may be in one list."""

USUAL = ("classes", "class_names", "label_names", "class_to_idx", "id2label", "names", "CLASSES", "METAINFO")
NAMES = {
    "integer": (*USUAL, "labels", "features"),
    "columns": ("pathologies", *USUAL, "labels", "features"),
    "detection": USUAL,
}
"""Attributes of a data set in which its class names may be, by the form of its labels."""


def name_classes(policy: LabelPolicy, dataset: Any, label: Any = None, key: Any = None) -> LabelPolicy:
    """Return the policy with the class names that a data set brings along, if the user gave none.

    Looks for torchvision's `classes` (whose folders are sorted: "nodule" comes before "normal"), torchxrayvision's
    `pathologies`, `class_names`, `label_names`, a list of names in `labels`, the ClassLabel among Hugging Face's
    `features` and COCO's index, and in data sets inside. Pathologies name columns, so a label that is a plain integer
    takes none from them, and a row takes only as many names as it has columns. A float for each sample is of the second
    of two classes.

    Args:
        policy: of the user.
        dataset: map-style.
        label: of its first sample.
        key: of the label in a sample.

    Raises:
        LabelError: none is the nodule class, names of boxes are not counted from the background, or two data sets
            inside say different things.
    """
    if policy.classes is not None:
        return policy
    targets = policy.kind == "detection" or is_target(label)
    array = None if label is None or targets else as_array(label)
    form = "detection" if targets else "integer" if array is not None and array.shape == () else "columns"
    count = array.shape[-1] if array is not None and array.shape else None
    found = _find_names(dataset, form, count, (key, policy.nodule), DEPTH)
    if found is None:
        return policy
    return replace(policy, classes=found)


def _find_names(dataset: Any, form: str, count: int | None, key: tuple[Any, str], depth: int) -> tuple[str, ...] | None:
    """Return the class names of a data set or of one inside it, nearest first; `key` as in `_names`."""
    if form == "detection" and (found := coco_names(dataset)):
        return found
    for attribute in NAMES[form]:
        names = _names(getattr(dataset, attribute, None), key)
        if not names:
            continue
        if form == "detection" and names[0] != BACKGROUND:
            rule = f"counted from {BACKGROUND!r}, 0, where targets have boxes"
            remedy = f"pass labels=LabelPolicy('detection', classes=({BACKGROUND!r}, ...)) in the order of the numbers"
            raise LabelError(f"classes must be {rule}, got {list(names)} in .{attribute}: {remedy}")
        if count is None or len(names) == count:
            return names
    if not depth:
        return None
    inside = [_find_names(inner, form, count, key, depth - 1) for inner in inner_datasets(dataset)]
    different = list(dict.fromkeys(found for found in inside if found))
    if len(different) > 1:
        rule = "of one list of classes in all data sets inside"
        raise LabelError(f"labels must be {rule}, got {different}: pass labels=LabelPolicy(classes=(...))")
    return different[0] if different else None


def _names(value: Any, key: tuple[Any, str]) -> tuple[str, ...] | None:
    """Return names in the order of their numbers, from a sequence, an array, class_to_idx or its reverse, and others'.

    Others are OpenMMLab's METAINFO, and Hugging Face's features: of several ClassLabels it is that of the label's key
    in a sample, or the one with a nodule.
    """
    if isinstance(value, Mapping) and isinstance(value.get("classes"), Sequence):
        value = value["classes"]
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value.values()):
        value = {name: int(number) for number, name in value.items() if str(number).isdigit()}
    if isinstance(value, Mapping) and value and all(isinstance(number, int) for number in value.values()):
        numbers = sorted(value.values())
        value = sorted(value, key=value.__getitem__) if numbers == list(range(len(numbers))) else None
    elif isinstance(value, Mapping):
        place, nodule = key
        listed = {name: getattr(getattr(f, "feature", f), "names", None) for name, f in value.items()}
        named: dict[Any, list[str]] = {name: list(names) for name, names in listed.items() if names}
        fitting = [names for names in named.values() if plain(nodule) in map(plain, names)] or list(named.values())
        value = named.get(place) or (fitting[0] if len(fitting) == 1 else None)
    if hasattr(value, "tolist") and not isinstance(value, Tensor):  # numpy's arrays, pandas' columns
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def inner_datasets(dataset: Any) -> list[Any]:
    """Return the map-style data sets that a data set holds, also in lists and dicts, as a wrapper's attributes are."""
    values: list[Any] = []
    for value in getattr(dataset, "__dict__", {}).values():
        several = list(value.values()) if isinstance(value, dict) else value
        values += several if isinstance(several, list | tuple) and len(several) <= PARTS else [value]
    plain_values = (str, bytes, list, tuple, Mapping, Tensor, np.ndarray, type)
    found = [v for v in values if not isinstance(v, plain_values)]
    return [v for v in found if hasattr(v, "__getitem__") and hasattr(v, "__len__")]


def labels_without_images(dataset: Any, key: Any = None) -> Any:
    """Return all labels of a data set without loading its images, or None.

    From `targets` or `labels`, or the column of a Hugging Face data set with the label's key, through
    `torch.utils.data.Subset`, `ConcatDataset` and wrappers of the same length.
    """
    if isinstance(dataset, Subset):
        inner = labels_without_images(dataset.dataset, key)
        if isinstance(inner, Tensor | np.ndarray):
            return inner[list(dataset.indices)]
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_without_images(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(dataset):
            return labels
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and hasattr(dataset, "with_format"):
        named = [name for name in features if name == key or name in LABEL_KEYS]
        return list(dataset.with_format(None)[named[0]]) if len(named) == 1 else None
    same = [inner for inner in inner_datasets(dataset) if len(inner) == len(dataset)]
    return labels_without_images(same[0], key) if len(same) == 1 else None


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
