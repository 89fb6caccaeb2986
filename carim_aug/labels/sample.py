"""Where the image and the label sit in a sample or a batch: a tuple, a list, a named tuple, a dict, or where you say.

A layout reads one sample's structure once, then takes image and label out of any sample of that structure and puts
others in, into a new sample whose other entries are the same objects.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torchvision import tv_tensors

from carim_aug.labels.detection import is_target, is_targets

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "lab", "target", "targets", "y")
MIN_SIZE = 16
"""Height and width in pixels below which an image is none that could hold a nodule."""
FLAT = "the sample itself"
"""Where the label is in a dict that is its own detection target: boxes and labels lie beside the image."""

KeyPath = tuple[Any, ...]
"""Keys and indices that lead through nested containers to an entry."""
DICTS = (dict, UserDict)


class LayoutError(TypeError):
    """A sample in which image and label are not found, or are of a kind that is not supported."""


class ImageError(ValueError):
    """An image, or a batch of them, of a wrong type, rank, dtype, number of channels or size."""


def layout_of(sample: Any, spec: Any = "auto", labels_getter: Callable[[Any], Any] | str | None = None) -> Any:
    """Return the layout of an example, to `get` and `put` image and label; LayoutError says what to pass if none fits.

    Args:
        sample: what a dataset returns for one index, or a batch of that from a DataLoader.
        spec: ("image key", "label key") of a dict, (image index, label index) of a tuple or list, or "auto". Auto takes
            the first key of `IMAGE_KEYS` and of `LABEL_KEYS` that holds an image and a label, or, where boxes lie
            beside the image, the dict itself as the label; in a tuple or list the first `tv_tensors.Image`, or else the
            first tensor or array of rank 3 or 4, or list of them, and the entry after it.
        labels_getter: as torchvision's transforms take it: a function from a sample to its label, an entry at any depth
            of tuples, lists and dicts; None or "default": as `spec` says.
    """
    if labels_getter in (None, "default"):
        return Layout.of(sample, spec)
    if not callable(labels_getter):
        raise LayoutError(f"labels_getter must be a function of a sample or 'default', got {labels_getter!r}")
    return GetterLayout.of(sample, labels_getter)


@dataclass(frozen=True)
class Layout:
    """The places of image and label: keys in a dict, indices in a tuple or list."""

    image: Any
    label: Any  # `FLAT` where a dict is its own detection target
    is_dict: bool

    @classmethod
    def of(cls, sample: Any, spec: Any = "auto") -> "Layout":
        """Return the layout of an example; see `layout_of`."""
        is_dict = isinstance(sample, Mapping)
        if not is_dict and not isinstance(sample, tuple | list):
            raise LayoutError(f"samples must be a tuple, list or dict with an image and a label, got {_what(sample)}")
        if is_dict and not isinstance(sample, DICTS):
            got = _what(sample)
            raise LayoutError(f"samples must be a dict or UserDict if a mapping, got {got}: return dict(sample)")
        if isinstance(spec, str) and spec == "auto":
            image, label = _in_dict(sample) if is_dict else _in_sequence(sample)
        elif isinstance(spec, tuple | list) and len(spec) == 2:
            image, label = spec
        else:
            raise LayoutError(f"layout must be 'auto' or a pair (where the image is, where the label is), got {spec!r}")
        if image == label:
            raise LayoutError(f"layout must name two places, got {image!r} for image and label")
        layout = cls(image, label, is_dict)
        found_image, found_label = layout.get(sample)
        if not _is_image(found_image):
            raise _no_image(found_image, sample, f"at {image!r}")
        _check_label(found_label, f"at {label!r} of {_what(sample)}", _advice(is_dict))
        return layout

    def get(self, sample: Any) -> tuple[Any, Any]:
        """Return image and label of a sample, as they lie there; LayoutError if it is of another structure."""
        if not isinstance(sample, DICTS if self.is_dict else (tuple, list)):
            raise LayoutError(f"samples must be {'dicts' if self.is_dict else 'tuples or lists'}, got {_what(sample)}")
        flat = self.label == FLAT
        try:
            if self.is_dict and not (self.image in sample and (flat or self.label in sample)):
                raise KeyError  # asking a defaultdict would add the key
            return sample[self.image], self._targets(sample) if flat else sample[self.label]
        except (LookupError, TypeError):
            rule = f"have an image at {self.image!r} and a label at {self.label!r}"
            raise LayoutError(f"samples must {rule}, got {_what(sample)}: {_advice(self.is_dict)}") from None

    def put(self, sample: Any, image: Any, label: Any) -> Any:
        """Return a new sample of the same structure and types with this image and label, all else the same objects.

        The image becomes an array or a `tv_tensors.Image` where the sample's is one; its dtype and device, and the
        label, are left alone.
        """
        image = _like(image, self.get(sample)[0])
        if self.label != FLAT:
            return _replace(_replace(sample, (self.image,), image), (self.label,), label)
        copied = copy.copy(sample)
        several = isinstance(label, list)
        for key in [key for key in sample if key != self.image]:
            new = [target[key] for target in label] if several else label[key]
            copied[key] = tuple(new) if isinstance(sample[key], tuple) and several else new
        copied[self.image] = image
        return copied

    def _targets(self, sample: Any) -> Any:
        """Return the detection target that a flat sample is, or the list of them in a batch."""
        images, fields = sample[self.image], [key for key in sample if key != self.image]
        if not isinstance(images, tuple | list) and images.ndim == 3:
            return {key: sample[key] for key in fields}
        return [{key: sample[key][i] for key in fields} for i in range(len(images))]


@dataclass(frozen=True)
class GetterLayout:
    """The image is the first one in the sample, the label what a user's function returns."""

    labels_getter: Callable[[Any], Any]
    label: Any = None  # the last key or index on the way to the example's label

    @classmethod
    def of(cls, sample: Any, labels_getter: Callable[[Any], Any]) -> "GetterLayout":
        """Return the layout of an example; see `layout_of`."""
        path = cls(labels_getter)._label_path(sample)
        where = f"from labels_getter of {_what(sample)}"
        _check_label(_entry(sample, path), where, "return an entry of the sample")
        layout = cls(labels_getter, path[-1])
        layout.get(sample)
        return layout

    def get(self, sample: Any) -> tuple[Any, Any]:
        """Return image and label of a sample; see `Layout.get`."""
        image, label = (_entry(sample, path) for path in self._paths(sample))
        return image, label

    def put(self, sample: Any, image: Any, label: Any) -> Any:
        """Return a new sample with this image and label; see `Layout.put`."""
        image_path, label_path = self._paths(sample)
        image = _like(image, _entry(sample, image_path))
        return _replace(_replace(sample, image_path, image), label_path, label)

    def _paths(self, sample: Any) -> tuple[KeyPath, KeyPath]:
        """Return the keys and indices that lead to the image and to the label."""
        label = self._label_path(sample)
        outside = [(path, entry) for path, entry in _entries(sample) if path[: len(label)] != label]
        images = [(path, entry) for path, entry in outside if _is_image(entry)]
        if not images:
            raise _no_image(sample, sample, "")
        return min(images, key=lambda found: not isinstance(found[1], tv_tensors.Image))[0], label

    def _label_path(self, sample: Any) -> KeyPath:
        try:
            wanted = self.labels_getter(sample)
        except (LookupError, TypeError, AttributeError) as error:
            remedy = "it is called with a sample or a batch, and must return an entry of it"
            raise LayoutError(
                f"labels_getter must find the label of {_what(sample)}, got {error!r}: {remedy}"
            ) from error
        found = [path for path, entry in _entries(sample) if entry is wanted]
        if len(found) > 1 or isinstance(wanted, int | float | np.generic):
            # Equal numbers may be one object: the label is the one whose place the function looks at.
            found = [path for path in found if self._follows(sample, path)]
        if not found:
            raise LayoutError(f"labels_getter must return an entry of the sample, got {_what(wanted)}")
        return found[0]

    def _follows(self, sample: Any, path: KeyPath) -> bool:
        mark = object()
        try:
            return self.labels_getter(_replace(sample, path, mark)) is mark
        except Exception:  # the function works with the number that was there
            return False


def _entries(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield all entries of nested containers and the ways to them; a list of images is one entry."""
    if path:
        yield path, node
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, DICTS):
        inside = node.items()
    elif isinstance(node, tuple | list) and not (path and _is_image(node)):
        inside = enumerate(node)
    for key, entry in inside:
        yield from _entries(entry, (*path, key))


def _entry(node: Any, path: KeyPath) -> Any:
    return reduce(getitem, path, node)


def _replace(node: Any, path: KeyPath, entry: Any) -> Any:
    """Return nested containers with another entry at the end of a path, all else the same objects."""
    if not path:
        return entry
    copied = list(node) if isinstance(node, tuple) else copy.copy(node)
    copied[path[0]] = _replace(node[path[0]], path[1:], entry)
    # A named tuple's constructor wants its fields one by one.
    return getattr(type(node), "_make", type(node))(copied) if isinstance(node, tuple) else copied


def check_images(images: Any, batch: bool, name: str = "images") -> None:
    """Raise ImageError, which calls the images by name, unless they can be mixed.

    They are a tensor or array (B, C, H, W), or a list or tuple of B (C, H, W), if batch, else (C, H, W); C is 1 or 3, H
    and W at least 16, the dtype uint8, uint16, float16, bfloat16, float32 or float64.
    """
    if batch and isinstance(images, tuple | list) and images:
        for i, image in enumerate(images):
            check_images(image, batch=False, name=f"{name}[{i}]")
        return
    if not isinstance(images, torch.Tensor | np.ndarray):
        raise ImageError(f"{name} must be a tensor or an array, got {_what(images)}")
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    wanted = "(B, C, H, W)" if batch else "(C, H, W)"
    if len(shape) != 3 + batch:
        one = ": for one image, images[None] and labels[None], or mix.wrap(dataset)"
        raise ImageError(f"{name} must be {wanted}, got {shape}{one if batch and len(shape) == 3 else ''}")
    if batch and shape[0] == 0:
        raise ImageError(f"{name} must hold at least one image, got {shape}")
    if shape[-3] not in (1, 3):
        last = " (channels come first: permute them)" if shape[-1] in (1, 3) else ""
        raise ImageError(f"{name} must be {wanted} with 1 or 3 channels, got {shape}{last}")
    if min(shape[-2:]) < MIN_SIZE:
        raise ImageError(f"{name} must be at least {MIN_SIZE} pixels high and wide, got {shape}")
    if dtype not in ("uint8", "uint16", "float16", "bfloat16", "float32", "float64"):
        raise ImageError(f"{name} must be uint8, uint16 or floating point, got {dtype}: convert them, image.float()")


def plain_images(images: Any) -> Any:
    """Return images as a plain tensor, or, where they are a list or tuple, as a list of plain tensors."""
    if isinstance(images, tuple | list):
        return [torch.as_tensor(image).as_subclass(torch.Tensor) for image in images]
    return torch.as_tensor(images).as_subclass(torch.Tensor)


def _in_dict(sample: Any) -> tuple[Any, Any]:
    images, labels = ([key for key in keys if key in sample] for keys in (IMAGE_KEYS, LABEL_KEYS))
    if "bboxes" in sample:
        raise LayoutError(
            f"samples with 'bboxes' are albumentations', got {_what(sample)}: graft in the pipeline itself with "
            "carim_aug.integrations.albumentations, or call them 'boxes', XYXY in pixels"
        )
    flat = bool(images) and "boxes" in sample
    for kind, keys, known in (("an image", images, IMAGE_KEYS), ("a label", flat or labels, LABEL_KEYS)):
        if not keys:
            rule = f"have {kind} under one of {list(known)}"
            raise LayoutError(f"samples must {rule}, got {_what(sample)}: {_advice(is_dict=True)}")
    image = next((key for key in images if _is_image(sample[key])), images[0])
    return image, FLAT if flat else next((key for key in labels if _is_label(sample[key])), labels[0])


def _in_sequence(sample: Any) -> tuple[int, int]:
    if len(sample) < 2:
        raise LayoutError(f"samples must have an image and a label, got {_what(sample)}")
    images = [i for i, entry in enumerate(sample) if _is_image(entry)]
    if not images:
        raise _no_image(next((e for e in sample if isinstance(e, PILImage)), sample[0]), sample, "")
    image = min(images, key=lambda i: not isinstance(sample[i], tv_tensors.Image))
    if image + 1 == len(sample):
        raise LayoutError(f"the label must come after the image, got {_what(sample)}: {_advice(is_dict=False)}")
    return image, image + 1


def _is_image(entry: Any) -> bool:
    if isinstance(entry, tv_tensors.TVTensor):
        return isinstance(entry, tv_tensors.Image)
    if isinstance(entry, tuple | list):
        return bool(entry) and all(isinstance(one, torch.Tensor | np.ndarray) and one.ndim == 3 for one in entry)
    return isinstance(entry, torch.Tensor | np.ndarray) and entry.ndim in (3, 4) and "bool" not in str(entry.dtype)


def _is_label(entry: Any) -> bool:
    if isinstance(entry, torch.Tensor | np.ndarray):
        return entry.ndim <= 2 and not isinstance(entry, tv_tensors.TVTensor)
    numbers = int | float | np.number | np.bool_
    return entry is None or is_target(entry) or is_targets(entry) or isinstance(entry, numbers)


def _check_label(label: Any, where: str, advice: str) -> None:
    got = f"{_what(label)} {where}"
    if isinstance(label, tv_tensors.Mask):
        remedy = "give a detection target, {'boxes': ..., 'labels': ..., 'masks': ...}; its masks gain the nodules'"
        raise LayoutError(f"the label must be no segmentation mask, got {got}: {remedy}")
    if not _is_label(label):
        rule = "be a number, a tensor or array of rank 0 to 2, or a detection target with boxes"
        raise LayoutError(f"the label must {rule}, got {got}: make it one of these, or {advice}")


def _like(image: Any, old: Any) -> Any:
    """Return the image as the class of the old one, or the images of a list as those of the old one."""
    if isinstance(old, tuple | list):
        each = [_like(one, before) for one, before in zip(image, old, strict=True)]
        return tuple(each) if isinstance(old, tuple) else each
    if isinstance(old, np.ndarray):
        return image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if isinstance(old, tv_tensors.TVTensor):
        return tv_tensors.wrap(image, like=old)
    if type(old) not in (torch.Tensor, torch.nn.Parameter):  # MONAI's MetaTensor, and what else knows of itself
        return old.clone().copy_(image)
    return image.as_subclass(torch.Tensor) if isinstance(image, tv_tensors.TVTensor) else image


def _no_image(entry: Any, sample: Any, where: str) -> LayoutError:
    advice = _advice(isinstance(sample, Mapping))
    if isinstance(entry, PILImage):
        advice = "add torchvision.transforms.v2.ToImage() to the dataset's transform to turn PIL images into tensors"
    elif isinstance(entry, torch.Tensor | np.ndarray) and entry.ndim == 2:
        advice = "add a channel axis, image[None]"
    got = " ".join(filter(None, (_what(entry), where, "of", _what(sample))))
    rule = "be a tensor or array (C, H, W), or (B, C, H, W) in a batch"
    return LayoutError(f"the image must {rule}, got {got}: {advice}")


def _advice(is_dict: bool) -> str:
    example = "('image key', 'label key')" if is_dict else "(image index, label index), such as (0, 1)"
    return f"pass layout={example}, or labels_getter=..."


def _what(entry: Any, depth: int = 0) -> str:
    """Return a short description of anything: its type, and shape or contents."""
    kind = type(entry).__name__
    if isinstance(entry, torch.Tensor | np.ndarray):
        return f"{kind} {tuple(entry.shape)} {entry.dtype}"
    if depth < 1 and isinstance(entry, Mapping):
        items = list(entry.items())[:12]
        return f"{kind} {{{', '.join(f'{key!r}: {_what(value, depth + 1)}' for key, value in items)}}}"
    if depth < 1 and isinstance(entry, tuple | list):
        return f"{kind} ({', '.join(_what(value, depth + 1) for value in entry[:12])})"
    return kind
