"""Generators whose answers are known, and drawn chests as real images."""

import pytest
import torch

from carim_aug.data.phantom import phantom_chest
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import noise
from train.common.images import NODULE, ImageSet


class Bright:
    """Grey images that brighten by 0.5 in the mask, nearly the same for all seeds."""

    weights_hash = "bright" * 8
    level, spread = 0.0, 0.01

    def __init__(self, image_size=48):
        self.image_size, self.calls = image_size, []

    def images(self, masks, seeds):
        self.calls.append(len(seeds))
        return self.level + self.spread * noise(seeds, 7)[:, :1, None, None] + 0.5 * masks


class ByClassOnly:
    """Grey images that brighten by 0.5 in the upper left quarter: a class, but no place."""

    weights_hash = "class!" * 8

    def __init__(self, image_size=48):
        self.image_size = image_size

    def class_images(self, nodule, seeds):
        images = 0.01 * noise(seeds, 7)[:, :1, None, None].repeat(1, 1, self.image_size, self.image_size)
        half = self.image_size // 2
        images[nodule, :, :half, :half] += 0.5
        return images


def draw_real_images(n=6):
    """Drawn chests of n patients, each with a normal image and one with a nodule."""
    images = torch.stack([(phantom_chest(256, seed=i) * 255).to(torch.uint8) for i in range(n)]).repeat(2, 1, 1, 1)
    labels = torch.zeros(2 * n, 14)
    labels[n:, NODULE] = 1
    box = torch.tensor([[100.0, 90.0, 120.0, 115.0]]) / 256
    boxes = [torch.empty(0, 4)] * n + [box.clone() for _ in range(n)]
    return ImageSet(images, labels, torch.arange(n).repeat(2), boxes, [str(i) for i in range(2 * n)])


@pytest.fixture(scope="session")
def bright():
    return Bright


@pytest.fixture(scope="session")
def by_class_only():
    return ByClassOnly


@pytest.fixture(scope="session")
def real_images():
    return draw_real_images


@pytest.fixture(scope="session")
def bundled_prior():
    return LocationPrior.bundled()
