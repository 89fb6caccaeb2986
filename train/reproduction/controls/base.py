"""What the training-free controls share: one nodule in the box of each region, its chance from its seed alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from carim_aug.ops.boxes import check_masks
from carim_aug.ops.random import stream
from carim_aug.ops.sealed import digest


class Control(ABC):
    """Nodules that no network made, as a source of residuals (`carim_aug.generators.base.ResidualSource`).

    Its hash is of what fixes the nodules: tensors by name, settings in words, the regions' side in pixels.
    """

    def __init__(self, image_size: int, arrays: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.image_size = image_size
        self.weights_hash = hash_of(self, arrays, {"image_size": image_size, **settings})

    @torch.no_grad()
    def residuals(self, regions: Tensor, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return what one nodule adds to each region, (n, 1, S, S): 0 outside its box, and all over for an empty mask.

        Regions are (n, 1, S, S) float, [-1, 1], never changed; masks are 0 or 1, one box each.
        """
        shape = (len(seeds), 1, self.image_size, self.image_size)
        if tuple(regions.shape) != shape or not regions.is_floating_point():
            raise ValueError(f"regions must be {shape} float, got {tuple(regions.shape)} {regions.dtype}")
        check_masks(masks, self.image_size)
        if len(masks) != len(regions):
            raise ValueError(f"masks must be as many as regions ({len(regions)}), got {len(masks)}")
        added = torch.zeros(shape, device=regions.device)
        # One by one: no row depends on its batch, not by a rounding.
        for row, region, mask, seed in zip(added, regions, masks[:, 0].detach().cpu(), seeds, strict=True):
            rng, box = stream(seed, 0, 0), _box_of(mask)
            if box is not None:
                row.copy_(self._residual(region[None].float(), box, rng)[0])
        return added

    @abstractmethod
    def _residual(self, region: Tensor, box: Tensor, rng: np.random.Generator) -> Tensor:
        """Return what one nodule adds to a region (1, 1, S, S); the box is (4,) XYXY in whole pixels, on the CPU."""


def hash_of(control: object, arrays: Mapping[str, Tensor], settings: Mapping[str, object]) -> str:
    """Return the SHA-256, as hex, of what fixes a control's pixels, its class's name included."""
    texts = {"control": type(control).__name__} | {name: repr(value) for name, value in settings.items()}
    return digest({name: array.numpy() for name, array in arrays.items()}, texts)


def check_images(images: Tensor, name: str) -> Tensor:
    """Return images (N, 1, S, S) uint8 on the CPU, or raise ValueError, which names the argument."""
    square = images.ndim == 4 and images.shape[1] == 1 and images.shape[2] == images.shape[3]
    if not square or not len(images) or images.dtype != torch.uint8:
        raise ValueError(f"{name} must be (N, 1, S, S) uint8 with N >= 1, got {tuple(images.shape)} {images.dtype}")
    return images.detach().cpu().contiguous()


def _box_of(mask: Tensor) -> Tensor | None:
    """Return the box (4,) XYXY of a mask (H, W), None if it is empty; raise ValueError if it is no filled box."""
    places = mask.nonzero()
    if not len(places):
        return None
    (y1, x1), (y2, x2) = places.amin(dim=0).tolist(), (places.amax(dim=0) + 1).tolist()
    if len(places) != (y2 - y1) * (x2 - x1):
        raise ValueError(f"masks must hold one filled box each, got something else within {(x1, y1, x2, y2)}")
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float32)
