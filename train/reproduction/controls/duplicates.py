"""Real images again: the control of every gain by count alone, for nothing in it is new."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carim_aug.ops.random import stream
from train.common.images import to_symmetric
from train.reproduction.controls.base import check_images, hash_of


class DuplicatedImages:
    """Real images (N, 1, S, S) uint8 without and with a nodule as a class source: a nodule lies wherever it lies."""

    def __init__(self, normal: Tensor, nodule: Tensor) -> None:
        self.normal, self.nodule = check_images(normal, "normal"), check_images(nodule, "nodule")
        if nodule.shape[-1] != normal.shape[-1]:
            raise ValueError(f"nodule must be as large as normal ({normal.shape[-1]}), got {nodule.shape[-1]}")
        self.image_size = int(normal.shape[-1])
        self.weights_hash = hash_of(self, {"normal": self.normal, "nodule": self.nodule}, {})

    def class_images(self, nodule: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return a real image by each seed, with a nodule where `nodule` (n,) bool asks for one: (n, 1, S, S)."""
        if tuple(nodule.shape) != (len(seeds),) or nodule.dtype != torch.bool:
            raise ValueError(f"nodule must be ({len(seeds)},) bool, got {tuple(nodule.shape)} {nodule.dtype}")
        images = torch.empty(len(seeds), 1, self.image_size, self.image_size)
        for image, wanted, seed in zip(images, nodule.tolist(), seeds, strict=True):
            given = self.nodule if wanted else self.normal
            image.copy_(to_symmetric(given[int(stream(seed, 0, 0).integers(len(given)))]))
        return images.to(nodule.device)
