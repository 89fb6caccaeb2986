"""Films of a data set read one by one: what cannot be read is left out, counted and named."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.errors import DataError
from train.common.run import RunError

TOLERATED = 0.1
"""Largest share of unreadable films: above it something else is wrong than a few damaged files."""


class Reading:
    """Reads a data set's films, reduced to squares of one size (antialiased).

    Args:
        data: without transform, one channel.
        size: side in pixels.
        any_size: take films of several sizes, each squeezed to the square; else they are an error.
        desc: of the progress bar.
        rows: places of the films to read; all by default.

    Attributes:
        unreadable: what was wrong with each film that is left out, complete once all have been read.
    """

    def __init__(
        self,
        data: ChestXray14,
        size: int,
        *,
        any_size: bool = False,
        desc: str = "films",
        rows: Sequence[int] | None = None,
    ) -> None:
        """Reads nothing yet."""
        self.data, self.size, self.any_size, self.desc = data, size, any_size, desc
        self.rows = range(len(data)) if rows is None else rows
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Gives place, film (1, size, size) uint8 and target.

        Raises:
            RunError: there is no film, too many cannot be read, or they are of several sizes.
        """
        if not len(self.data):
            raise RunError(f"{self.data.root}: the {self.data.split} split holds no film")
        seen: tuple[tuple[int, int], str] | None = None
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding frees the interpreter's lock
            try:
                films = zip(self.rows, pool.map(self._film, self.rows), strict=True)
                for i, (film, target, shape) in tqdm(films, total=len(self.rows), desc=self.desc, unit="image"):
                    if film is None:
                        self.unreadable.append(target)
                        continue
                    here = (shape, self.data.filenames[i])
                    seen = seen or here
                    if shape != seen[0] and not self.any_size:
                        sizes = " and ".join(f"{h}x{w} ({file})" for (h, w), file in (seen, here))
                        raise RunError(
                            f"{self.data.root}: films must be of one size, got {sizes}; --any-size takes them all"
                        )
                    yield i, film, target
            finally:
                pool.shutdown(cancel_futures=True)
        if len(self.unreadable) > TOLERATED * len(self.rows):
            raise RunError(
                f"{self.data.root}: {len(self.unreadable)} of {len(self.rows)} films cannot be read, more than "
                f"{TOLERATED:.0%}; the first: {self.unreadable[0]}"
            )

    def _film(self, i: int) -> tuple[Tensor | None, Any, tuple[int, int]]:
        """Film, target, height and width in the file; or None and what is wrong with it."""
        try:
            image, target = self.data[i]
        except DataError as error:
            return None, str(error), (0, 0)
        height, width = image.shape[-2:]
        return VF.resize(torch.as_tensor(image), [self.size, self.size], antialias=True), target, (height, width)
