"""From (seed, epoch, index) to a random stream: decisions and noise vectors as pure functions of integers.

The integers are hashed with BLAKE2b into the 256-bit start of a PCG64. ``numpy.random.SeedSequence`` would do too, but
it takes four times as long, and it takes ``(1, 2, 3)`` for ``(1, 2, 3, 0)`` and ``(2**32, 2)`` for ``(0, 1, 2)``: retry
0 would repeat the plan's draws.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from operator import index as as_index
from typing import Any

import numpy as np
import torch
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import ISeedSequence

LIMIT = 2**64
"""Seeds, epochs and indices are at least 0 and below this; others, here, are a ValueError or TypeError."""


def stream(seed: int, epoch: int, index: int, *more: int) -> Generator:
    """Return the random stream of one decision: the same integers give the same draws, in any process and order.

    Further integers may be the number of a retry; ``(s, e, i)`` and ``(s, e, i, 0)`` are two streams.

    >>> stream(0, 1, 2).random() == stream(0, 1, 2).random()
    True
    """
    return _generator((seed, epoch, index, *more), b"stream")


def noise(seeds: Sequence[int], dim: int) -> torch.Tensor:
    """Draw standard normal noise z, (n, dim) float32 on the CPU, each row from its seed alone, whatever else is there.

    Raises:
        ValueError: dim is below 1.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    rows = np.empty((len(seeds), dim), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        _generator((seed,), b"noise").standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def fold(*integers: int) -> int:
    """Hash at least one integer to a 63-bit seed for ``torch.Generator.manual_seed``; order and number count."""
    if not integers:
        raise ValueError("fold needs at least one integer, got none")
    return int.from_bytes(blake2b(_pack(integers), digest_size=8, person=b"fold").digest(), "little") >> 1


class _Start(ISeedSequence):
    """The finished 256-bit start of a PCG64, where numpy wants a seed sequence."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == self.words.size and dtype == np.uint64, "only a PCG64 starts from this"
        return self.words


def _generator(integers: Sequence[int], purpose: bytes) -> Generator:
    digest = blake2b(_pack(integers), digest_size=32, person=purpose).digest()
    start: Any = _Start(np.frombuffer(digest, dtype=np.uint64))  # numpy takes any ISeedSequence; its types say less
    return Generator(PCG64(start))


def _pack(integers: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(integers)}Q", *integers)
    except struct.error:
        for value in integers:
            try:
                number = as_index(value)
            except TypeError:
                what = f"{value!r} ({type(value).__name__})"
                raise TypeError(f"seed, epoch and index must be integers, got {what}") from None
            if not 0 <= number < LIMIT:
                raise ValueError(f"seed, epoch and index must be from 0 to 2**64 - 1, got {number}") from None
        raise
