"""Films of a data set read one by one: what cannot be read is left out, counted and named."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.errors import DataError
from train.run import RunError

TOLERATED = 0.1
"""Largest share of unreadable films: above it something else is wrong than a few damaged files."""


class Reading:
    """Reads a data set's films, reduced to squares of one size (antialiased).

    Args:
        data: without transform, one channel.
        size: side in pixels.
        any_size: take films of several sizes, each squeezed to the square; else they are an error.
        desc: of the progress bar.

    Attributes:
        unreadable: what was wrong with each film that is left out, complete once all have been read.
    """

    def __init__(self, data: ChestXray14, size: int, *, any_size: bool = False, desc: str = "films") -> None:
        """Reads nothing yet."""
        self.data, self.size, self.any_size, self.desc = data, size, any_size, desc
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Gives place, film (1, size, size) uint8 and target.

        Raises:
            RunError: there is no film, too many cannot be read, or they are of several sizes.
        """
        if not len(self.data):
            raise RunError(f"{self.data.root}: the {self.data.split} split holds no film")
        seen: tuple[torch.Size, str] | None = None
        for i in tqdm(range(len(self.data)), desc=self.desc, unit="image"):
            try:
                image, target = self.data[i]
            except DataError as error:
                self.unreadable.append(str(error))
                continue
            shape, name = image.shape[-2:], self.data.filenames[i]
            seen = seen or (shape, name)
            if shape != seen[0] and not self.any_size:
                sizes = " and ".join(f"{h}x{w} ({file})" for (h, w), file in (seen, (shape, name)))
                raise RunError(f"{self.data.root}: films must be of one size, got {sizes}; --any-size takes them all")
            yield i, VF.resize(torch.as_tensor(image), [self.size, self.size], antialias=True), target
        if len(self.unreadable) > TOLERATED * len(self.data):
            raise RunError(
                f"{self.data.root}: {len(self.unreadable)} of {len(self.data)} films cannot be read, more than "
                f"{TOLERATED:.0%}; the first: {self.unreadable[0]}"
            )
