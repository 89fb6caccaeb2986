"""How generated pixels come into a user's batch: the whole image, or the nodule alone grafted into the real one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carim_aug.generators.render import Renderer
from carim_aug.labels.detection import with_nodules
from carim_aug.labels.policy import LabelPolicy
from carim_aug.ops.boxes import feather
from carim_aug.ops.images import resize, ring_contrast
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.plan import Slot


def insert(
    images: Tensor, slots: Sequence[Slot], *, insertion: str, renderer: Renderer, value_range: ValueRange
) -> Tensor:
    """Gives the batch's images with the synthetic slots filled; `images` itself where there are none.

    Args:
        images: (B, C, H, W), C 1 or 3, in `value_range`. Never changed.
        slots: B decisions.
        insertion: "whole" or "graft".
        renderer: generates.
        value_range: of the images.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    chosen = [slot for slot in slots if slot.synthetic]
    if not chosen:
        return images
    pixels = render(chosen, images.device, insertion=insertion, renderer=renderer)
    return put_in(images, slots, pixels, insertion=insertion, value_range=value_range)


def put_in(images: Tensor, slots: Sequence[Slot], pixels: Tensor, *, insertion: str, value_range: ValueRange) -> Tensor:
    """Gives the batch's images with the pixels of the synthetic slots in them; see `insert`.

    Args:
        images: (B, C, H, W). Never changed.
        slots: B decisions, at least one synthetic.
        pixels: (n, 1, S, S), what `render` gave for the synthetic ones.
        insertion: "whole" or "graft".
        value_range: of the images.
    """
    places = [i for i, slot in enumerate(slots) if slot.synthetic]
    index = torch.tensor(places, device=images.device)
    if insertion == "whole":
        resized = resize(pixels, images.shape[-2:])
        new = value_range.from_symmetric(resized, channels=images.shape[1], dtype=images.dtype)
    else:
        new = graft(images[index], pixels, [slots[i] for i in places], value_range)
    mixed = images.clone()
    mixed[index] = new
    return mixed


def render(
    slots: Sequence[Slot], device: torch.device, *, insertion: str, renderer: Renderer, hosts: Tensor | None = None
) -> Tensor:
    """Gives whole images, or what grafts add: (n, 1, S, S) float32 on `device`; hosts as `Renderer.differences` has."""
    return renderer.whole(slots, device) if insertion == "whole" else renderer.differences(slots, device, hosts)


def graft(images: Tensor, differences: Tensor, slots: Sequence[Slot], value_range: ValueRange) -> Tensor:
    """Gives x + strength * feather(C) * (G(z, C) - G(z, 0)), equal to x wherever the feathered mask is 0.

    Args:
        images: (n, C, H, W) in `value_range`.
        differences: (n, 1, S, S) float, [-2, 2].
        slots: n slots; their boxes say where, their strengths how much.
        value_range: of the images; the result is clamped to it where it changed.

    Returns:
        (n, C, H, W) of the images' dtype.
    """
    height, width = images.shape[-2:]
    weight = feather([s.boxes_at(height, width) for s in slots], (height, width)).to(images.device)
    added = weight * strengths(slots, images.device) * resize(differences, (height, width))
    added = value_range.scale_difference(added, channels=images.shape[1], dtype=images.dtype)
    low, high = value_range.bounds(images.shape[1], like=images)
    changed = torch.minimum(torch.maximum(images.to(added.dtype) + added, low), high)
    if not images.dtype.is_floating_point:
        changed = changed.round()
    return torch.where(weight > 0, changed.to(images.dtype), images)


def strengths(slots: Sequence[Slot], device: torch.device) -> Tensor:
    """Gives the slots' strengths, (n, 1, 1, 1) float32."""
    return torch.tensor([slot.strength for slot in slots], dtype=torch.float32, device=device)[:, None, None, None]


def contrasts(differences: Tensor, slots: Sequence[Slot]) -> Tensor:
    """Gives how much a graft brightens its nodules: ellipse minus ring of what is added, mean over the slot's boxes.

    Args:
        differences: (n, 1, S, S) float, [-2, 2].
        slots: n slots with boxes.

    Returns:
        (n,) float32, in units of the [-1, 1] image, at the generator's size.
    """
    size = differences.shape[-1]
    boxes = [slot.boxes_at(size, size) for slot in slots]
    added = differences.cpu() * feather(boxes, size) * strengths(slots, torch.device("cpu"))
    counts = [len(of_slot) for of_slot in boxes]
    each = ring_contrast(added.repeat_interleave(torch.tensor(counts), dim=0), torch.cat(boxes)).contrast
    return torch.stack([part.mean() for part in each.split(counts)])


def relabel(
    labels: Any, slots: Sequence[Slot], *, insertion: str, policy: LabelPolicy, sizes: Sequence[tuple[int, int]] = ()
) -> Any:
    """Gives the batch's labels as its slots want them; `labels` itself where all are real.

    Args:
        labels: (B,) or (B, C) tensor or array, or B detection targets. Never changed.
        slots: B decisions.
        insertion: "whole" or "graft".
        policy: of the labels, resolved.
        sizes: B heights and widths of the images; detection targets need them.
    """
    places: dict[str, list[int]] = {}
    for i, slot in enumerate(slots):
        if slot.class_name is not None:
            places.setdefault(slot.class_name, []).append(i)
    if not places:
        return labels
    if policy.kind == "detection":
        each = zip(labels, slots, sizes, strict=True)
        return type(labels)([relabel_one(*one, insertion=insertion, policy=policy) for one in each])
    mixed = labels.clone() if isinstance(labels, Tensor) else labels.copy()
    for name, rows in places.items():
        old = labels[rows]
        mixed[rows] = policy.add_nodule(old) if insertion == "graft" else policy.synthetic(old, name)
    return mixed


def relabel_one(label: Any, slot: Slot, size: tuple[int, int], *, insertion: str, policy: LabelPolicy) -> Any:
    """Gives one label as its slot wants it; see `relabel`."""
    if slot.class_name is None:
        return label
    graft = insertion == "graft"
    if policy.kind == "detection":
        boxes = slot.boxes_at(*size)
        return with_nodules(label, boxes, policy.nodule_number, size, replace=not graft, fill=policy.fill)
    return policy.add_nodule(label) if graft else policy.synthetic(label, slot.class_name)
