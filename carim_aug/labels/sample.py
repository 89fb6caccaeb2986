"""Where the image and the label sit in a sample or a batch: a tuple, a list, a named tuple or a dict.

DESIGN section 2 ("Layouts"). A layout reads one sample's structure once, then takes image and label out of any sample
of that structure and puts others in, into a new sample whose other entries are the same objects.
"""

import copy
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
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


class LayoutError(TypeError):
    """A sample in which image and label are not found, or are of a kind that is not supported."""


class ImageError(ValueError):
    """An image, or a batch of them, of a wrong type, rank, dtype, number of channels or size."""


@dataclass(frozen=True)
class Layout:
    """The places of image and label. Make one with ``Layout.of``.

    Attributes:
        image: key in a dict, index in a tuple or list.
        label: the same; `FLAT` where a dict is its own detection target.
        is_dict: whether samples are dicts.
    """

    image: Any
    label: Any
    is_dict: bool

    @classmethod
    def of(cls, sample: Any, spec: Any = "auto") -> "Layout":
        """The layout of an example.

        Args:
            sample: what a dataset returns for one index, or a batch of that from a DataLoader.
            spec: ("image key", "label key") of a dict, (image index, label index) of a tuple or list, or "auto". Auto
                takes the first key of ``IMAGE_KEYS`` and of ``LABEL_KEYS`` that holds an image and a label, or, where
                boxes lie beside the image, the dict itself as the label; in a tuple or list the first
                ``tv_tensors.Image``, or else the first tensor or array of rank 3 or 4, or list of them, and the entry
                after it.

        Returns:
            The layout.

        Raises:
            LayoutError: no image or label there; it says what was found and what to pass.
        """
        is_dict = isinstance(sample, Mapping)
        if not is_dict and not isinstance(sample, tuple | list):
            raise LayoutError(f"samples must be a tuple, list or dict with an image and a label, got {_what(sample)}")
        if is_dict and not isinstance(sample, dict | UserDict):
            raise LayoutError(
                f"samples must be a dict or UserDict if a mapping, got {_what(sample)}: return dict(sample)"
            )
        if isinstance(spec, str) and spec == "auto":
            image, label = _in_dict(sample) if is_dict else _in_sequence(sample)
        elif isinstance(spec, tuple | list) and len(spec) == 2:
            image, label = spec
        else:
            raise LayoutError(f"layout must be 'auto' or a pair (where the image is, where the label is), got {spec!r}")
        layout = cls(image, label, is_dict)
        if image == label:
            raise LayoutError(f"layout must name two places, got {image!r} for image and label")
        found_image, found_label = layout.get(sample)
        if not _is_image(found_image):
            raise _no_image(found_image, sample, f"at {image!r}")
        if isinstance(found_label, tv_tensors.Mask):
            raise LayoutError(
                f"the label must be no segmentation mask, got {_what(found_label)} at {label!r}: give a detection "
                "target, {'boxes': ..., 'labels': ..., 'masks': ...}; its masks gain the nodules'"
            )
        if not _is_label(found_label):
            raise LayoutError(
                "the label must be a number, a tensor or array of rank 0 to 2, or a detection target with boxes, got "
                f"{_what(found_label)} at {label!r} of {_what(sample)}: make it one of these, or {_advice(is_dict)}"
            )
        return layout

    def get(self, sample: Any) -> tuple[Any, Any]:
        """Image and label of a sample, as they lie there.

        Args:
            sample: of the structure that this layout was made for.

        Returns:
            (image, label).

        Raises:
            LayoutError: the sample is of another structure.
        """
        if isinstance(sample, dict | UserDict) != self.is_dict or not isinstance(
            sample, dict | UserDict | tuple | list
        ):
            raise LayoutError(f"samples must be {'dicts' if self.is_dict else 'tuples or lists'}, got {_what(sample)}")
        try:
            flat = self.label == FLAT
            if self.is_dict and (self.image not in sample or not (flat or self.label in sample)):
                raise KeyError  # asking a defaultdict would add the key
            if flat:
                return sample[self.image], self._targets(sample)
            return sample[self.image], sample[self.label]
        except (LookupError, TypeError):
            raise LayoutError(
                f"samples must have an image at {self.image!r} and a label at {self.label!r}, got {_what(sample)}: "
                f"{_advice(self.is_dict)}"
            ) from None

    def put(self, sample: Any, image: Any, label: Any) -> Any:
        """A new sample of the same structure and types with this image and label, all else the same objects.

        Args:
            sample: of the structure that this layout was made for. Never changed.
            image: a tensor or array; it becomes an array where the sample's image is one, and a ``tv_tensors.Image``
                where that is one. Its dtype and device are left alone.
            label: put in as it is.

        Returns:
            A tuple, list, named tuple or dict of the sample's own class.

        Raises:
            LayoutError: the sample is of another structure.
        """
        image = _like(image, self.get(sample)[0])
        if self.label == FLAT:
            copied = copy.copy(sample)
            several = isinstance(label, list)
            for key in [key for key in sample if key != self.image]:
                new = [target[key] for target in label] if several else label[key]
                copied[key] = tuple(new) if isinstance(sample[key], tuple) and several else new
            copied[self.image] = image
            return copied
        if self.is_dict or isinstance(sample, list):
            copied = copy.copy(sample)
            copied[self.image], copied[self.label] = image, label
            return copied
        entries = list(sample)
        entries[self.image], entries[self.label] = image, label
        make = getattr(type(sample), "_make", type(sample))  # a named tuple's constructor wants its fields one by one
        return make(entries)

    def _targets(self, sample: Any) -> Any:
        """The detection target that a flat sample is, or the list of them in a batch."""
        images, fields = sample[self.image], [key for key in sample if key != self.image]
        if not isinstance(images, tuple | list) and images.ndim == 3:
            return {key: sample[key] for key in fields}
        return [{key: sample[key][i] for key in fields} for i in range(len(images))]


def check_images(images: Any, batch: bool, name: str = "images") -> None:
    """Nothing if these are images that can be mixed.

    Args:
        images: tensor or array, (B, C, H, W) if batch, or a list or tuple of B (C, H, W), else (C, H, W); C 1 or 3; H
            and W at least 16; uint8, float16, bfloat16, float32 or float64.
        batch: whether it is a batch.
        name: what it is called in the error.

    Raises:
        ImageError: another type, rank, size, number of channels or dtype, or an empty batch.
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
        one = (
            ": for one image, images[None] and labels[None], or mix.wrap(dataset)" if batch and len(shape) == 3 else ""
        )
        raise ImageError(f"{name} must be {wanted}, got {shape}{one}")
    if batch and shape[0] == 0:
        raise ImageError(f"{name} must hold at least one image, got {shape}")
    if shape[-3] not in (1, 3):
        last = " (channels come first: permute them)" if shape[-1] in (1, 3) else ""
        raise ImageError(f"{name} must be {wanted} with 1 or 3 channels, got {shape}{last}")
    if min(shape[-2:]) < MIN_SIZE:
        raise ImageError(f"{name} must be at least {MIN_SIZE} pixels high and wide, got {shape}")
    if dtype not in ("uint8", "float16", "bfloat16", "float32", "float64"):
        raise ImageError(f"{name} must be uint8 or floating point, got {dtype}")


def plain_images(images: Any) -> Any:
    """Gives images as a plain tensor, or, where they are a list or tuple, as a list of plain tensors."""
    if isinstance(images, tuple | list):
        return [torch.as_tensor(image).as_subclass(torch.Tensor) for image in images]
    return torch.as_tensor(images).as_subclass(torch.Tensor)


def _in_dict(sample: Any) -> tuple[Any, Any]:
    images = [key for key in IMAGE_KEYS if key in sample]
    labels = [key for key in LABEL_KEYS if key in sample]
    if "bboxes" in sample:
        raise LayoutError(
            f"samples with 'bboxes' are albumentations', got {_what(sample)}: graft in the pipeline itself with "
            "carim_aug.integrations.albumentations, or call them 'boxes', XYXY in pixels"
        )
    if images and "boxes" in sample:
        return next((key for key in images if _is_image(sample[key])), images[0]), FLAT
    for kind, keys, known in (("an image", images, IMAGE_KEYS), ("a label", labels, LABEL_KEYS)):
        if not keys:
            raise LayoutError(
                f"samples must have {kind} under one of {list(known)}, got {_what(sample)}: {_advice(is_dict=True)}"
            )
    image = next((key for key in images if _is_image(sample[key])), images[0])
    return image, next((key for key in labels if _is_label(sample[key])), labels[0])


def _in_sequence(sample: Any) -> tuple[int, int]:
    if len(sample) < 2:
        raise LayoutError(f"samples must have an image and a label, got {_what(sample)}")
    images = [i for i, entry in enumerate(sample) if _is_image(entry)]
    images.sort(key=lambda i: not isinstance(sample[i], tv_tensors.Image))
    if not images:
        raise _no_image(next((e for e in sample if isinstance(e, PILImage)), sample[0]), sample, "")
    if images[0] + 1 == len(sample):
        raise LayoutError(f"the label must come after the image, got {_what(sample)}: {_advice(is_dict=False)}")
    return images[0], images[0] + 1


def _is_image(entry: Any) -> bool:
    if isinstance(entry, tv_tensors.TVTensor):
        return isinstance(entry, tv_tensors.Image)
    if isinstance(entry, tuple | list):
        return bool(entry) and all(isinstance(one, torch.Tensor | np.ndarray) and one.ndim == 3 for one in entry)
    return isinstance(entry, torch.Tensor | np.ndarray) and entry.ndim in (3, 4) and "bool" not in str(entry.dtype)


def _is_label(entry: Any) -> bool:
    if isinstance(entry, torch.Tensor | np.ndarray):
        return entry.ndim <= 2 and not isinstance(entry, tv_tensors.TVTensor)
    if is_target(entry) or is_targets(entry):
        return True
    return isinstance(entry, int | float | np.number | np.bool_)


def _like(image: Any, old: Any) -> Any:
    """The image as the class of the old one, or the images of a list as those of the old one."""
    if isinstance(old, tuple | list):
        each = [_like(one, before) for one, before in zip(image, old, strict=True)]
        return tuple(each) if isinstance(old, tuple) else each
    if isinstance(old, np.ndarray):
        return image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if isinstance(old, tv_tensors.TVTensor):
        return tv_tensors.wrap(image, like=old)
    return image.as_subclass(torch.Tensor) if isinstance(image, tv_tensors.TVTensor) else image


def _no_image(entry: Any, sample: Any, where: str) -> LayoutError:
    advice = _advice(isinstance(sample, Mapping))
    if isinstance(entry, PILImage):
        advice = "add torchvision.transforms.v2.ToImage() to the dataset's transform to turn PIL images into tensors"
    elif isinstance(entry, torch.Tensor | np.ndarray) and entry.ndim == 2:
        advice = "add a channel axis, image[None]"
    at = f" {where}" if where else ""
    return LayoutError(
        f"the image must be a tensor or array (C, H, W), or (B, C, H, W) in a batch, got {_what(entry)}{at} of "
        f"{_what(sample)}: {advice}"
    )


def _advice(is_dict: bool) -> str:
    example = "('image key', 'label key')" if is_dict else "(image index, label index), such as (0, 1)"
    return f"pass layout={example}"


def _what(entry: Any, depth: int = 0) -> str:
    """A short description of anything: its type, and shape or contents."""
    kind = type(entry).__name__
    if isinstance(entry, torch.Tensor | np.ndarray):
        return f"{kind} {tuple(entry.shape)} {entry.dtype}"
    if depth < 1 and isinstance(entry, Mapping):
        return (
            f"{kind} {{{', '.join(f'{key!r}: {_what(value, depth + 1)}' for key, value in list(entry.items())[:12])}}}"
        )
    if depth < 1 and isinstance(entry, tuple | list):
        return f"{kind} ({', '.join(_what(value, depth + 1) for value in entry[:12])})"
    return kind
