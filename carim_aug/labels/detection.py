"""Detection targets: what boxes, labels, masks and other fields of an image become when nodules come in (DESIGN 2).

Three forms are known. A dict as torchvision's references have it: `boxes` (k, 4), a tensor or array XYXY in pixels, or
`tv_tensors.BoundingBoxes` of any format; `labels` (k,); optionally `masks` (k, H, W), `area`, `iscrowd`, and fields of
the user's own. A list of COCO's annotations (`bbox` XYWH, `category_id`, ...), and a dict with such a list under
`annotations`. None is ever changed in place.

Fields of an instance that comes in: its box in the target's own format, the nodule's label, `area` of its box,
`iscrowd` 0, as mask the ellipse inscribed in the box; COCO's `id` is negative, for the mix knows no other images' ids.
Other fields: those of `PER_IMAGE` stay; one with as many entries
as there were boxes is taken for one of instances and gets a 0 (False, an empty text) more; all else stays. `fill`
overrules: `{"score": 1.0}` gives the value of new instances, `{"patient": None}` leaves a field alone.
"""

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as VF

from carim_aug.labels.vector import LabelError
from carim_aug.ops.boxes import boxes_to_masks

BACKGROUND = "__background__"
"""Class 0 of detection labels, as torchvision's weights name it."""

PER_IMAGE = frozenset({"image_id", "size", "orig_size", "idx", "index", "path", "file_name", "height", "width"})
"""Fields of a target that tell of the image, not of its instances."""

SLACK = 1.0
"""Pixels by which a box may overhang its image."""

FORMATS = ("XYXY", "XYWH", "CXCYWH")
"""Box formats that are read and written; nodules have no angle."""

_CORNERS = 24  # of the polygon that stands for an ellipse in COCO's segmentation

Fill = Mapping[str, Any]


def is_target(label: Any) -> bool:
    """Says whether this is one image's detection target."""
    if isinstance(label, Mapping):
        return any(name in label for name in ("boxes", "annotations", "labels"))
    return _is_annotations(label)


def is_targets(labels: Any) -> bool:
    """Says whether this is a batch of detection targets, one an image."""
    if not isinstance(labels, tuple | list) or not labels:
        return False
    return all(is_target(label) for label in labels) and not any(_is_annotation(label) for label in labels)


def instances(target: Any) -> tuple[Tensor, list[int]]:
    """Gives boxes (k, 4) float32 XYXY in pixels, on the CPU, and the k label numbers.

    Raises:
        LabelError: no boxes, no labels, or not as many of one as of the other.
    """
    if _annotations_of(target) is not None:
        rows = _annotations_of(target) or []
        missing = [name for row in rows for name in ("bbox", "category_id") if name not in row]
        if missing:
            raise LabelError(f"annotations must have bbox and category_id, got one without {missing[0]}")
        boxes = _numbers([row["bbox"] for row in rows], "bbox").float()
        if rows and boxes.shape != (len(rows), 4):
            raise LabelError(f"bbox must be four numbers XYWH, got {rows[0]['bbox']!r}")
        boxes = boxes.reshape(-1, 4)
        return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1), [int(r["category_id"]) for r in rows]
    for name in ("boxes", "labels"):
        if not isinstance(target, Mapping) or name not in target:
            got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
            raise LabelError(f"targets must have boxes and labels, got {got}: a collate_fn or transform may drop them")
    corners = tv_tensors.BoundingBoxFormat.XYXY
    form = target["boxes"].format if isinstance(target["boxes"], tv_tensors.BoundingBoxes) else corners
    if form.name not in FORMATS:
        raise LabelError(f"boxes must be of one of the formats {FORMATS}, got {form.name}: convert them first")
    boxes = _numbers(target["boxes"], "boxes").float()
    boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
    labels = _numbers(target["labels"], "labels").reshape(-1)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
        raise LabelError(
            f"targets must have boxes (k, 4) and labels (k,), got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise LabelError(f"labels must be integers, got {labels.dtype}")
    # Converted as floats: integers would lose half pixels.
    boxes = VF.convert_bounding_box_format(boxes, old_format=form, new_format=corners)
    return boxes, [int(label) for label in labels]


def check_target(target: Any, classes: Sequence[str], size: tuple[int, int] | None = None) -> None:
    """Nothing, if a target fits its classes and, where given, its image.

    Args:
        target: of one image.
        classes: names by label number, the background first.
        size: height and width of the image in pixels.

    Raises:
        LabelError: what is wrong, and what to do.
    """
    boxes, labels = instances(target)
    wrong = [label for label in labels if not 0 <= label < len(classes)]
    if wrong:
        raise LabelError(
            f"labels must be from 0 to {len(classes) - 1} for the classes {list(classes)}, got {wrong[0]}: pass "
            f"labels=LabelPolicy('detection', classes=({BACKGROUND!r}, ..., 'Nodule', ...)) in the order of the numbers"
        )
    if not len(boxes):
        return
    if not bool(boxes.isfinite().all()):
        raise LabelError(f"boxes must be finite, got {boxes[~boxes.isfinite().all(dim=1)][0].tolist()}")
    upside = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    wrap = "wrap them as tv_tensors.BoundingBoxes with their own format"
    how = wrap if _annotations_of(target) is None else "bbox must be XYWH in pixels of the image that is mixed"
    if bool(upside.any()):
        raise LabelError(f"boxes must be XYXY with x1 <= x2 and y1 <= y2, got {boxes[upside][0].tolist()}: {how}")
    if size is None:
        return
    height, width = size
    if float(boxes.max()) <= 1 and min(size) > 2:
        raise LabelError(f"boxes must be in pixels of the {height} x {width} image, got {boxes[0].tolist()}: {how}")
    low = boxes.min(dim=1).values < -SLACK
    outside = low | (boxes[:, 2] > width + SLACK) | (boxes[:, 3] > height + SLACK)
    if bool(outside.any()):
        got = boxes[outside][0].tolist()
        raise LabelError(f"boxes must lie inside the image of height {height} and width {width}, got {got}: {how}")


def with_nodules(
    target: Any,
    boxes: Tensor,
    label: int,
    size: tuple[int, int],
    *,
    replace: bool = False,
    fill: Fill | None = None,
) -> Any:
    """Gives a target with these nodules added, or with nothing but them.

    Args:
        target: of one image, of any known form. Never changed.
        boxes: (n, 4) float32 XYXY in pixels; n may be 0.
        label: number of the nodule class.
        size: height and width of the image.
        replace: whether the instances that were there go.
        fill: field to the value of new instances; None leaves the field alone.
    """
    if _annotations_of(target) is not None:
        return _with_annotations(target, boxes, label, replace, fill or {})
    known, rules = len(instances(target)[0]), fill or {}
    changed = copy.copy(target)
    for name, value in target.items():
        kept = _none_of(value, known) if replace and _of_instances(name, value, known, rules) else value
        if name == "boxes":
            changed[name] = _more_boxes(kept, boxes)
        elif name == "masks" and name not in rules:
            changed[name] = _more_masks(kept, boxes, size)
        elif name == "labels":
            plain = kept.long() if isinstance(kept, Tensor) and not kept.numel() else kept
            changed[name] = _more(plain, [label] * len(boxes))
        elif name == "area" and name not in rules:
            changed[name] = _more(kept, ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist())
        elif _of_instances(name, value, known, rules):
            changed[name] = _more(kept, [rules[name] if name in rules else _zero_of(value)] * len(boxes))
    return changed


def _numbers(value: Any, name: str) -> Tensor:
    """A plain tensor on the CPU."""
    try:
        return torch.as_tensor(value).as_subclass(Tensor).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(f"{name} must be numbers, as many for each instance, got {value!r}") from error


# --- Fields ---
def _of_instances(name: Any, value: Any, known: int, rules: Fill) -> bool:
    """Whether a field has an entry for each instance; for boxes, labels and masks it must."""
    if name in ("boxes", "labels", "masks", "area", "iscrowd"):
        return name not in rules or rules[name] is not None
    if name in rules:
        return rules[name] is not None
    if name in PER_IMAGE:
        return False
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 1 and len(value) == known
    return isinstance(value, list) and len(value) == known


def _none_of(value: Any, known: int) -> Any:
    """The field without its instances."""
    if isinstance(value, tv_tensors.TVTensor):
        return tv_tensors.wrap(value.as_subclass(Tensor)[:0], like=value)
    return value[:0] if known else value


def _more(value: Any, entries: list[Any]) -> Any:
    """A tensor, array or list with more entries."""
    if isinstance(value, list):
        return value + entries
    if isinstance(value, tuple):
        return value + tuple(entries)
    shape = (len(entries), *value.shape[1:])
    if isinstance(value, np.ndarray):
        new = np.zeros(shape, dtype=value.dtype) + np.asarray(entries, value.dtype).reshape(-1, *[1] * (value.ndim - 1))
        return np.concatenate([value, new]) if entries else value.copy()
    tensor = value.as_subclass(Tensor)
    given = torch.tensor(entries, dtype=tensor.dtype, device=tensor.device).reshape(-1, *[1] * (tensor.ndim - 1))
    grown = torch.cat([tensor, given.expand(shape)]) if entries else tensor.clone()
    return tv_tensors.wrap(grown, like=value) if isinstance(value, tv_tensors.TVTensor) else grown


def _more_boxes(value: Any, boxes: Tensor) -> Any:
    if isinstance(value, tv_tensors.BoundingBoxes):
        new = VF.convert_bounding_box_format(
            boxes, old_format=tv_tensors.BoundingBoxFormat.XYXY, new_format=value.format
        )
        old = value.as_subclass(Tensor)
        grown = torch.cat([old.reshape(-1, 4), _rounded(new, old.dtype).to(old.device, old.dtype)])
        return tv_tensors.wrap(grown, like=value)
    if isinstance(value, np.ndarray):
        new = _rounded(boxes, torch.as_tensor(value).dtype)
        return np.concatenate([value.reshape(-1, 4), new.numpy().astype(value.dtype)])
    if isinstance(value, Tensor):
        return torch.cat([value.reshape(-1, 4), _rounded(boxes, value.dtype).to(value.device, value.dtype)])
    return [*value, *boxes.tolist()]


def _rounded(boxes: Tensor, dtype: torch.dtype) -> Tensor:
    return boxes if dtype.is_floating_point else boxes.round()


def _more_masks(value: Any, boxes: Tensor, size: tuple[int, int]) -> Any:
    plain = torch.as_tensor(value).as_subclass(Tensor)
    if plain.ndim == 3 and tuple(plain.shape[-2:]) != tuple(size) and len(plain):
        raise LabelError(f"masks must be (k, {size[0]}, {size[1]}) as their image, got {tuple(plain.shape)}")
    new = boxes_to_masks(list(boxes[:, None]), size, shape="ellipse")[:, 0].to(plain.device, plain.dtype)
    grown = torch.cat([plain.reshape(-1, *size), new])
    if isinstance(value, tv_tensors.TVTensor):
        return tv_tensors.wrap(grown, like=value)
    return grown.numpy() if isinstance(value, np.ndarray) else grown


def _zero_of(value: Any) -> Any:
    first = value[0] if isinstance(value, list) and value else 0
    if isinstance(first, str | bool | int | float):
        return type(first)()
    return 0 if isinstance(value, Tensor | np.ndarray) else None


# --- COCO ---
def _is_annotation(label: Any) -> bool:
    return isinstance(label, Mapping) and "bbox" in label and "boxes" not in label


def _is_annotations(label: Any) -> bool:
    return isinstance(label, list) and all(_is_annotation(row) for row in label)


def _annotations_of(target: Any) -> list[Mapping[str, Any]] | None:
    """The annotations of a COCO target; None for other forms."""
    if isinstance(target, Mapping):
        rows = target.get("annotations") if "boxes" not in target else None
        return list(rows) if rows is not None else None
    return target if _is_annotations(target) else None


def _with_annotations(target: Any, boxes: Tensor, label: int, replace: bool, fill: Fill) -> Any:
    rows = [] if replace else list(_annotations_of(target) or [])
    known = list(_annotations_of(target) or [])
    wrapped = isinstance(target, Mapping)
    image_id = target.get("image_id") if wrapped else (known[0].get("image_id") if known else None)
    for i, box in enumerate(boxes):
        x1, y1, x2, y2 = box.tolist()
        row: dict[str, Any] = {
            "id": -1 - i,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category_id": label,
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "segmentation": [_ellipse(x1, y1, x2, y2)],
        }
        if image_id is not None:
            row["image_id"] = image_id
        row |= {name: _zero_of([value]) for name, value in (known[0].items() if known else ()) if name not in row}
        rows.append(row | {name: value for name, value in fill.items() if value is not None})
    if not wrapped:
        return rows
    changed: MutableMapping[str, Any] = copy.copy(target)
    changed["annotations"] = rows
    return changed


def _ellipse(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """The ellipse inscribed in a box as a polygon, x and y in turn."""
    angles = [2 * math.pi * i / _CORNERS for i in range(_CORNERS)]
    points = [((x1 + x2 + (x2 - x1) * math.cos(a)) / 2, (y1 + y2 + (y2 - y1) * math.sin(a)) / 2) for a in angles]
    return [value for point in points for value in point]
