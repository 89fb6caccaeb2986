"""What makes nodules: protocols. Having the method is the capability; nothing else is asked of a generator.

A source of residuals can be grafted into real images, a source of images can replace them. All chance comes from the
seeds (n integers, 0 to 2**63 - 1), and a row depends on its own seed, mask and region alone, not on its batch.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class WorkerDeviceError(RuntimeError):
    """CUDA was asked for inside a DataLoader worker."""


class Source(Protocol):
    """What all sources have."""

    image_size: int  # side S of images, regions and masks in pixels
    weights_hash: str  # SHA-256, as hex, of all that fixes what is made


class ImageSource(Source, Protocol):
    """Whole chest X-rays."""

    def images(self, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return chest X-rays (n, 1, S, S) float32, [-1, 1], with a nodule in each box of the masks, on their device.

        Args:
            masks: (n, 1, S, S) in {0, 1}: unions of boxes; all zeros asks for a normal image.
            seeds: n integers, 0 to 2**63 - 1.
        """


class ResidualSource(Source, Protocol):
    """Nodules, as what they add to a background."""

    def residuals(self, regions: Tensor, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return what one nodule adds to each region: (n, 1, S, S) float32, [-2, 2], 0 where nothing changes.

        Args:
            regions: (n, 1, S, S) float, [-1, 1]: the backgrounds that the nodules come into. Never changed.
            masks: (n, 1, S, S) in {0, 1}, one box each.
            seeds: n integers, 0 to 2**63 - 1.
        """


class ClassSource(Source, Protocol):
    """Whole chest X-rays with or without a nodule, wherever it is: baselines, for classifiers alone."""

    def class_images(self, nodule: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return chest X-rays (n, 1, S, S) float32, [-1, 1], on the device of `nodule`, (n,) bool."""


def check_source(source: Any, insertion: str) -> Any:
    """Return a generator that can do an insertion: `residuals` for "graft", `images` or `class_images` for "whole".

    Raises:
        TypeError: it lacks a property of the protocols, or is a class.
        ValueError: it lacks the method.
    """
    name = type(source).__name__
    lacking = [a for a in ("image_size", "weights_hash") if inspect.getattr_static(source, a, None) is None]
    if isinstance(source, type) or lacking:
        raise TypeError(
            "generator must have image_size, weights_hash and a method images(masks, seeds) or residuals(regions, "
            f"masks, seeds) (carim_aug.generators.base), got {name}"
        )
    methods = {"graft": ("residuals",), "whole": ("images", "class_images")}[insertion]
    if not any(callable(getattr(source, method, None)) for method in methods):
        raise ValueError(f"generator must have a method {methods[0]} for insertion={insertion!r}, got a {name}")
    return source


def check_device(device: torch.device) -> None:
    """Raise unless tensors can be made on a device in this process.

    Raises:
        WorkerDeviceError: another device than the CPU inside a DataLoader worker.
        ValueError: a device that this machine does not have.
    """
    if device.type != "cpu" and get_worker_info() is not None:
        raise WorkerDeviceError(
            f"device must be 'cpu' inside a DataLoader worker, got '{device}': use mix.loader(dataset, ...) or "
            "mix(images, labels) after the loader, which generate in the main process, or "
            "SyntheticNoduleMix(device='cpu')"
        )
    try:
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device must be one that this machine has, got '{device}': {reason}") from error
