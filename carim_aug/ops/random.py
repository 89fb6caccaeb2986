"""From (seed, epoch, index) to a random stream: decisions and noise vectors as pure functions of integers.

DESIGN section 1 (plan on the CPU); the noise is METHOD section 2's z ~ N(0, I). The integers are hashed with BLAKE2b
into the 256-bit start of a PCG64. ``numpy.random.SeedSequence`` would do too, but it takes four times as long, and it
takes ``(1, 2, 3)`` for ``(1, 2, 3, 0)`` and ``(2**32, 2)`` for ``(0, 1, 2)``: retry 0 would repeat the plan's draws.
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
"""Seeds, epochs and indices are at least 0 and below this."""


def stream(seed: int, epoch: int, index: int, *more: int) -> Generator:
    """A random stream of its own for one slot: the same integers give the same draws, in any process and any order.

    Args:
        seed: the user's seed, 0 to 2**64 - 1.
        epoch: 0 to 2**64 - 1.
        index: the slot's place in the data set, 0 to 2**64 - 1.
        *more: further integers, such as the number of a retry; ``(s, e, i)`` and ``(s, e, i, 0)`` are two streams.

    Returns:
        A numpy generator that shares nothing with numpy's global one.

    Raises:
        ValueError: an integer is negative or does not fit 64 bits.
        TypeError: something is no integer.

    >>> stream(0, 1, 2).random() == stream(0, 1, 2).random()
    True
    """
    return _generator((seed, epoch, index, *more), b"stream")


def noise(seeds: Sequence[int], dim: int) -> torch.Tensor:
    """Standard normal noise z (METHOD section 2), each row from its own seed alone, whatever else is in the batch.

    Args:
        seeds: n integers, 0 to 2**64 - 1.
        dim: length of a row, at least 1.

    Returns:
        (n, dim) float32 tensor on the CPU; n may be 0.

    Raises:
        ValueError: a seed is negative or does not fit 64 bits, or dim is below 1.
        TypeError: a seed is no integer.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    rows = np.empty((len(seeds), dim), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        _generator((seed,), b"noise").standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def fold(*integers: int) -> int:
    """One 63-bit seed for ``torch.Generator.manual_seed`` out of integers; their order and number count.

    Args:
        *integers: at least one, each 0 to 2**64 - 1.

    Returns:
        A hash, 0 to 2**63 - 1.

    Raises:
        ValueError: no integer, or one that is negative or does not fit 64 bits.
        TypeError: something is no integer.
    """
    if not integers:
        raise ValueError("fold needs at least one integer, got none")
    return int.from_bytes(blake2b(_packed(integers), digest_size=8, person=b"fold").digest(), "little") >> 1


class _Start(ISeedSequence):
    """The finished 256-bit start of a PCG64, in the place where numpy wants a seed sequence."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == self.words.size and dtype == np.uint64, "only a PCG64 starts from this"
        return self.words


def _generator(integers: Sequence[int], purpose: bytes) -> Generator:
    digest = blake2b(_packed(integers), digest_size=32, person=purpose).digest()
    start: Any = _Start(np.frombuffer(digest, dtype=np.uint64))  # numpy takes any ISeedSequence; its types say less
    return Generator(PCG64(start))


def _packed(integers: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(integers)}Q", *integers)
    except struct.error:
        for value in integers:
            try:
                number = as_index(value)
            except TypeError:
                raise TypeError(
                    f"seed, epoch and index must be integers, got {value!r} ({type(value).__name__})"
                ) from None
            if not 0 <= number < LIMIT:
                raise ValueError(f"seed, epoch and index must be from 0 to 2**64 - 1, got {number}") from None
        raise
