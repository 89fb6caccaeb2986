"""COCO's annotations: a list of dicts with `bbox` XYWH and `category_id`, bare or under `annotations`."""

import copy
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

BACKGROUND = "__background__"
"""Class 0 of detection labels, as torchvision's weights name it."""

CORNERS = 24
"""Of the polygon that stands for an ellipse in `segmentation`."""


def coco_names(dataset: Any) -> tuple[str, ...] | None:
    """Return names by category number of a data set with COCO's index (torchvision's CocoDetection), "" for gaps."""
    categories = getattr(getattr(dataset, "coco", None), "cats", None)
    if not isinstance(categories, Mapping) or not categories:
        return None
    numbered = {0: BACKGROUND} | {int(number): str(row["name"]) for number, row in categories.items()}
    return tuple(numbered.get(number, "") for number in range(max(numbered) + 1))


def is_annotation(label: Any) -> bool:
    """Return whether this is one instance's annotation."""
    return isinstance(label, Mapping) and "bbox" in label and "boxes" not in label


def annotations_of(target: Any) -> list[Mapping[str, Any]] | None:
    """Return the annotations of a COCO target, or None for other forms."""
    if isinstance(target, Mapping):
        rows = None if "boxes" in target else target.get("annotations")
        return None if rows is None else list(rows)
    return target if isinstance(target, list) and all(is_annotation(row) for row in target) else None


def add_annotations(target: Any, boxes: Tensor, label: int, *, replace: bool, fill: Mapping[str, Any]) -> Any:
    """Return a COCO target with nodules of a category added, or with nothing but them; see `detection.add_nodules`."""
    known = list(annotations_of(target) or [])
    rows = [] if replace else list(known)
    first, wrapped = known[0] if known else {}, isinstance(target, Mapping)
    image_id = (target if wrapped else first).get("image_id")
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        row: dict[str, Any] = {
            "id": -1 - i,  # negative: other images' ids are not known here
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category_id": label,
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "segmentation": [_ellipse(x1, y1, x2, y2)],
        }
        if image_id is not None:
            row["image_id"] = image_id
        row |= {name: zero_like([value]) for name, value in first.items() if name not in row}
        rows.append(row | {name: value for name, value in fill.items() if value is not None})
    if not wrapped:
        return rows
    changed: MutableMapping[str, Any] = copy.copy(target)
    changed["annotations"] = rows
    return changed


def zero_like(value: Any) -> Any:
    """Return the empty value of a field's entries: 0, False, "" or None, by its first one."""
    first = value[0] if isinstance(value, list) and value else 0
    return type(first)() if isinstance(first, str | bool | int | float) else None


def _ellipse(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """Return the ellipse inscribed in a box as a polygon, x and y in turn."""
    angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    points = [((x1 + x2 + (x2 - x1) * math.cos(a)) / 2, (y1 + y2 + (y2 - y1) * math.sin(a)) / 2) for a in angles]
    return [value for point in points for value in point]
