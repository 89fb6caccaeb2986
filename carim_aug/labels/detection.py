"""Detection targets: what boxes, labels, masks and other fields of an image become when nodules come in.

Three forms are known. A dict as torchvision's references have it: `boxes` (k, 4), a tensor or array XYXY in pixels, or
`tv_tensors.BoundingBoxes` of any format; `labels` (k,); optionally `masks` (k, H, W), `area`, `iscrowd`, and fields of
the user's own. A list of COCO's annotations, and a dict with such a list under `annotations` (`carim_aug.labels.coco`).

A new instance has its box in the target's own format, the nodule's label, the `area` of its box, `iscrowd` 0, and as
mask the ellipse inscribed in the box. Of the other fields, those of `PER_IMAGE` stay; one with as many entries as there
were boxes is one of instances and gets a 0 (False, an empty text) more; all else stays. `fill` overrules:
`{"score": 1.0}` gives the value of new instances, `{"patient": None}` leaves a field alone.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as VF

from carim_aug.labels.base import OTHER, Change, LabelError, LabelFormat
from carim_aug.labels.coco import BACKGROUND, add_annotations, annotations_of, is_annotation, zero_like
from carim_aug.ops.boxes import boxes_to_masks

PER_IMAGE = frozenset({"image_id", "size", "orig_size", "idx", "index", "path", "file_name", "height", "width"})
"""Fields of a target that describe the image, not its instances."""

SLACK = 1.0
"""Pixels by which a box may overhang its image."""

FORMATS = ("XYXY", "XYWH", "CXCYWH")
"""Box formats that are read and written; nodules have no angle."""

CORNERS = tv_tensors.BoundingBoxFormat.XYXY
Fill = Mapping[str, Any]


@dataclass(frozen=True)
class DetectionTargets(LabelFormat):
    """Targets with boxes, one an image."""

    fill: Fill | None = None  # field to the value of new instances; None leaves the field alone

    def check(self, labels: Any, *, batch: bool, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Raise LabelError unless the targets fit their classes and, where given, their images."""
        targets = _targets(labels) if batch else [labels]
        if sizes is not None and len(sizes) != len(targets):
            raise LabelError(f"labels must be as many as images ({len(sizes)}), got {len(targets)}")
        for i, target in enumerate(targets):
            check_target(target, self.classes, None if sizes is None else sizes[i])

    def classes_of(self, labels: Any) -> list[str]:
        """Return the class of each target."""
        return [self.class_of(target) for target in _targets(labels)]

    def class_of(self, target: Any) -> str:
        """Return the nodule class if a target has one, the normal class if it has no box, else "other"."""
        numbers = instances(target)[1]
        return self.nodule if self.nodule_number in numbers else OTHER if numbers else self.normal

    def change(self, labels: Any, changes: Sequence[Change]) -> Any:
        """Return targets after these changes."""
        by_row = {change.row: change for change in changes}
        model = next((target for target in labels if isinstance(target, Mapping) and "boxes" in target), None)
        if model is not None:
            empty = (i for i in by_row if has_no_boxes(labels[i]))
            filled = {i: _like_empty(model, labels[i]) for i in empty}
            labels = type(labels)([filled.get(i, old) for i, old in enumerate(labels)]) if filled else labels
        each = [self.change_one(old, by_row[i]) if i in by_row else old for i, old in enumerate(labels)]
        return type(labels)(each) if by_row else labels

    def change_one(self, label: Any, change: Change) -> Any:
        """Return one target after a change."""
        replace = change.whole
        return add_nodules(label, change.boxes, self.nodule_number, change.size, replace=replace, fill=self.fill)


def is_target(label: Any) -> bool:
    """Return whether this is one image's detection target; one without boxes may have image fields alone, or none."""
    if isinstance(label, Mapping):
        return any(name in label for name in ("boxes", "annotations", "labels")) or set(label) <= PER_IMAGE
    return annotations_of(label) is not None


def is_targets(labels: Any) -> bool:
    """Return whether this is a batch of detection targets, one an image; all None could be anything."""
    if not isinstance(labels, tuple | list) or not any(label is not None for label in labels):
        return False
    known = [label for label in labels if label is not None]
    return all(is_target(label) for label in known) and not any(is_annotation(label) for label in known)


def has_no_boxes(target: Any) -> bool:
    """Return whether a target is None, or has fields of its image alone, as torchvision's have it without boxes."""
    return target is None or (isinstance(target, Mapping) and set(target) <= PER_IMAGE)


def instances(target: Any) -> tuple[Tensor, list[int]]:
    """Return boxes (k, 4) float32 XYXY in pixels, on the CPU, and the k label numbers; LabelError where none fit."""
    if has_no_boxes(target):
        return torch.zeros(0, 4), []
    rows = annotations_of(target)
    if rows is not None:
        if missing := [name for row in rows for name in ("bbox", "category_id") if name not in row]:
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
    form = target["boxes"].format if isinstance(target["boxes"], tv_tensors.BoundingBoxes) else CORNERS
    if form.name not in FORMATS:
        raise LabelError(f"boxes must be of one of the formats {FORMATS}, got {form.name}: convert them first")
    boxes = _numbers(target["boxes"], "boxes").float()
    boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
    labels = _numbers(target["labels"], "labels").reshape(-1)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
        got = f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
        raise LabelError(f"targets must have boxes (k, 4) and labels (k,), got {got}")
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise LabelError(f"labels must be integers, got {labels.dtype}")
    # Converted as floats: integers would lose half pixels.
    boxes = VF.convert_bounding_box_format(boxes, old_format=form, new_format=CORNERS)
    return boxes, [int(label) for label in labels]


def check_target(target: Any, classes: Sequence[str], size: tuple[int, int] | None = None) -> None:
    """Raise LabelError unless a target fits its classes, by label number, and the height and width of its image."""
    boxes, labels = instances(target)
    if wrong := [label for label in labels if not 0 <= label < len(classes)]:
        rule = f"from 0 to {len(classes) - 1} for the classes {list(classes)}"
        policy = f"labels=LabelPolicy('detection', classes=({BACKGROUND!r}, ..., 'Nodule', ...))"
        raise LabelError(f"labels must be {rule}, got {wrong[0]}: pass {policy} in the order of the numbers")
    if not bool(boxes.isfinite().all()):
        raise LabelError(f"boxes must be finite, got {boxes[~boxes.isfinite().all(dim=1)][0].tolist()}")
    wrap = "wrap them as tv_tensors.BoundingBoxes with their own format"
    how = wrap if annotations_of(target) is None else "bbox must be XYWH in pixels of the image that is mixed"
    rules = {"be XYXY with x1 <= x2 and y1 <= y2": (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)}
    if size is not None:
        height, width = size
        in_parts = len(boxes) > 0 and float(boxes.max()) <= 1 and min(size) > 2
        limits = boxes.new_tensor([width, height, width, height]) + SLACK
        inside = ((boxes >= -SLACK) & (boxes <= limits)).all(dim=1)
        rules[f"be in pixels of the {height} x {width} image"] = torch.full((len(boxes),), not in_parts)
        rules[f"lie inside the image of height {height} and width {width}"] = inside
    for rule, fits in rules.items():
        if not fits.all():
            raise LabelError(f"boxes must {rule}, got {boxes[~fits][0].tolist()}: {how}")


def add_nodules(
    target: Any, boxes: Tensor, label: int, size: tuple[int, int], *, replace: bool = False, fill: Fill | None = None
) -> Any:
    """Return a copy of a target of any known form with nodules added or, to replace what was there, nothing but them.

    Boxes are (n, 4) float32 XYXY in pixels of an image of this height and width; n may be 0. `label` is the number of
    the nodule class, `fill` as in the module's docstring.
    """
    rules = fill or {}
    if has_no_boxes(target):
        none = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format=CORNERS, canvas_size=size)  # type: ignore[call-overload]
        target = {**(target or {}), "boxes": none, "labels": torch.zeros(0, dtype=torch.int64)}
    if annotations_of(target) is not None:
        return add_annotations(target, boxes, label, replace=replace, fill=rules)
    known = len(instances(target)[0])
    changed = copy.copy(target)
    for name, value in target.items():
        of_instances = _of_instances(name, value, known, rules)
        old = _drop_instances(value, known) if replace and of_instances else value
        if name == "boxes":
            changed[name] = _append_boxes(old, boxes)
        elif name == "masks" and name not in rules:
            changed[name] = _append_masks(old, boxes, size)
        elif name == "labels":
            numbers = old.long() if isinstance(old, Tensor) and not old.numel() else old
            changed[name] = _append(numbers, [label] * len(boxes))
        elif name == "area" and name not in rules:
            changed[name] = _append(old, ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist())
        elif of_instances:
            empty = 0 if isinstance(value, Tensor | np.ndarray) else zero_like(value)
            changed[name] = _append(old, [rules.get(name, empty)] * len(boxes))
    return changed


def _like_empty(model: Any, target: Any) -> Any:
    """Return a target without boxes with the fields of instances that another has, empty."""
    known = len(instances(model)[0])
    fields = {name: value for name, value in model.items() if _of_instances(name, value, known, {})}
    return {**(target or {}), **{name: _drop_instances(value, known) for name, value in fields.items()}}


def _targets(labels: Any) -> Any:
    if not is_targets(labels) and not (isinstance(labels, tuple | list) and labels and not any(labels)):
        rule = "a list or tuple of detection targets, one an image"
        remedy = "pass collate_fn=lambda batch: tuple(zip(*batch))"
        raise LabelError(f"labels must be {rule}, got {type(labels).__name__}: {remedy}")
    return labels


def _numbers(value: Any, name: str) -> Tensor:
    """Return a plain tensor on the CPU."""
    try:
        return torch.as_tensor(value).as_subclass(Tensor).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(f"{name} must be numbers, as many for each instance, got {value!r}") from error


def _of_instances(name: Any, value: Any, known: int, rules: Fill) -> bool:
    """Return whether a field has an entry for each instance; for boxes, labels and masks it must."""
    if name in ("boxes", "labels", "masks", "area", "iscrowd"):
        return name not in rules or rules[name] is not None
    if name in rules:
        return rules[name] is not None
    if name in PER_IMAGE:
        return False
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 1 and len(value) == known
    return isinstance(value, list) and len(value) == known


def _drop_instances(value: Any, known: int) -> Any:
    if isinstance(value, tv_tensors.TVTensor):
        return tv_tensors.wrap(value.as_subclass(Tensor)[:0], like=value)
    return value[:0] if known else value


def _append(value: Any, entries: list[Any]) -> Any:
    """Return a tensor, array, list or tuple with more entries."""
    if isinstance(value, list | tuple):
        return type(value)([*value, *entries])
    shape = (len(entries), *value.shape[1:])
    if isinstance(value, np.ndarray):
        new = np.zeros(shape, dtype=value.dtype) + np.asarray(entries, value.dtype).reshape(-1, *[1] * (value.ndim - 1))
        return np.concatenate([value, new]) if entries else value.copy()
    tensor = value.as_subclass(Tensor)
    given = torch.tensor(entries, dtype=tensor.dtype, device=tensor.device).reshape(-1, *[1] * (tensor.ndim - 1))
    longer = torch.cat([tensor, given.expand(shape)]) if entries else tensor.clone()
    return tv_tensors.wrap(longer, like=value) if isinstance(value, tv_tensors.TVTensor) else longer


def _append_boxes(value: Any, boxes: Tensor) -> Any:
    if isinstance(value, tv_tensors.BoundingBoxes):
        boxes = VF.convert_bounding_box_format(boxes, old_format=CORNERS, new_format=value.format)
    return _extend(value, boxes) if isinstance(value, Tensor | np.ndarray) else [*value, *boxes.tolist()]


def _append_masks(value: Any, boxes: Tensor, size: tuple[int, int]) -> Any:
    shape = tuple(torch.as_tensor(value).shape)
    if len(shape) == 3 and shape[0] and shape[1:] != tuple(size):
        raise LabelError(f"masks must be (k, {size[0]}, {size[1]}) as their image, got {shape}")
    return _extend(value, boxes_to_masks(list(boxes[:, None]), size, shape="ellipse")[:, 0])


def _extend(value: Any, rows: Tensor) -> Any:
    """Return a tensor or array with rows more, in its own dtype and class."""
    old = torch.as_tensor(value).as_subclass(Tensor)
    rows = rows if old.is_floating_point() else rows.round()
    longer = torch.cat([old.reshape(-1, *rows.shape[1:]), rows.to(old.device, old.dtype)])
    if isinstance(value, tv_tensors.TVTensor):
        return tv_tensors.wrap(longer, like=value)
    return longer.numpy() if isinstance(value, np.ndarray) else longer
