"""Epochs: indices that know theirs, for loaders; and passes, counted for data sets whose indices do not."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, SupportsIndex

import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from carim_aug.ops.random import fold

_PASSES = 2**32  # more than anyone makes


class Visit(int):
    """An index of a data set with the epoch that asks for it, and how often this epoch asked before."""

    epoch: int
    repeat: int

    @classmethod
    def of(cls, index: int, epoch: int, repeat: int) -> "Visit":
        """Return the visit of an index."""
        visit = cls(index)
        visit.epoch, visit.repeat = epoch, repeat
        return visit

    def key(self, seed: int) -> tuple[int, ...]:
        """Return (seed, epoch, index), and for a repeated one (seed, epoch, index, 0, repeat)."""
        return (seed, self.epoch, int(self), *((0, self.repeat) if self.repeat else ()))


class EpochSampler(Sampler[Any]):
    """A sampler, or batch sampler, whose indices carry their epoch: to workers, shards, and frameworks' own loaders.

    Each pass is the next epoch, unless `set_epoch` says which, of this or of the sampler inside (a DistributedSampler,
    or what a framework puts there). The epoch begins with the first index, not with `iter`.

    Args:
        inner: yields indices, or lists of them.
        seed: of the order.
        order: generators to seed by (seed, epoch) when an epoch begins.
    """

    def __init__(self, inner: Iterable[Any], seed: int = 0, order: tuple[torch.Generator, ...] = ()) -> None:
        self.inner, self.seed, self.order = inner, seed, order
        self.epoch = 0  # of the pass that runs, or ran last
        self.next, self.skip = 0, 0  # of the next pass: its epoch, and entries that are not handed out again
        self._begun, self._skip = False, 0
        self._known = 0  # epoch of the samplers inside, as it was set here

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    @property
    def sampler(self) -> Any:
        """What frameworks call `set_epoch` of: the sampler inside a batch sampler if it has one, else this."""
        return next((s for s in self._samplers() if hasattr(s, "set_epoch")), self)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, from its start; or from where `skip` says for this very epoch."""
        if epoch != self.next:
            self.next, self.skip = epoch, 0

    def begin(self) -> int:
        """Begin the next epoch, and return the entries to skip in it."""
        for sampler in self._samplers():
            epoch = getattr(sampler, "epoch", self._known)
            if isinstance(epoch, int) and epoch != self._known:  # somebody else set it
                self.set_epoch(epoch)
        self.epoch, self._skip = self.next, self.skip
        self.next, self.skip, self._begun = self.epoch + 1, 0, True
        for generator in self.order:
            generator.manual_seed(fold(self.seed, self.epoch))
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._known = self.epoch
        return self._skip

    def __iter__(self) -> Iterator[Any]:
        if not self._begun:
            self.begin()
        self._begun = False
        epoch, seen = self.epoch, Counter[int]()

        def visit(index: Any) -> Visit:
            if isinstance(index, Visit):  # of a sampler of this class inside
                return index
            seen[int(index)] += 1
            return Visit.of(int(index), epoch, seen[int(index)] - 1)

        entries = (visit(e) if _is_index(e) else [visit(i) for i in e] for e in self.inner)
        yield from islice(entries, self._skip, None)

    def _samplers(self) -> list[Any]:
        return [s for s in (self.inner, getattr(self.inner, "sampler", None)) if s is not None]


class Passes:
    """How often each index of a data set was asked for, shared between workers: a loader of torch's does not say.

    An index that is asked for again is in the next epoch.

    Args:
        start: int64 (2,) in shared memory: the epoch that was set, and how often one was.
        count: of indices.
    """

    def __init__(self, start: Tensor, count: int) -> None:
        self.start = start
        self.seen = torch.zeros(count, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.__dict__.update(state)
        self.start.share_memory_()
        self.seen.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Let this be the epoch of the next visit of every index."""
        self.start[0] = epoch
        self.start[1] += 1

    def enter(self, index: int) -> int:
        """Return the epoch of an index that is asked for, and count it.

        Raises:
            RuntimeError: a second pass on one of several ranks, whose counts say little, without `set_epoch`.
        """
        epoch, times = self.start.tolist()
        count = self._count(index, times)
        if count and not times and world_size() > 1:
            raise RuntimeError(
                "epoch must be set on several ranks, got a second pass without: call set_epoch(epoch) of what mix.wrap "
                "returned before each epoch (Hugging Face's Trainer: in a callback's on_epoch_begin), or use mix.loader"
            )
        self.seen[index] = times * _PASSES + count + 1
        return epoch + count

    def last(self, index: int) -> int:
        """Return the epoch in which an index was asked for last, or will be first."""
        epoch, times = self.start.tolist()
        return epoch + max(self._count(index, times) - 1, 0)

    def _count(self, index: int, times: int) -> int:
        then, count = divmod(int(self.seen[index]), _PASSES)
        return count if then == times else 0


def _is_index(entry: Any) -> bool:
    return isinstance(entry, SupportsIndex) and not getattr(entry, "ndim", 0)


def world_size() -> int:
    """Return the number of ranks that train together, in worker processes too."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
