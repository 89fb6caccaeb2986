"""Nodules rendered ahead, for users without a GPU and for libraries that see one sample at a time (DESIGN 3).

A pool holds the differences G(z, C) - G(z, 0) of N keyed entries in shared memory, so that all workers of a DataLoader
draw from one copy. Entries are rendered anew when they have been used often: by hand (`refresh`), or by a thread of the
main process at a stated rate (`start`).
"""

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from carim_aug.generators.checkpoint import PRIOR, fetch
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.render import Renderer
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import stream
from carim_aug.transforms.plan import Planner, Slot

ROWS = 65
"""Rows of the counts: the main process and up to 64 workers have one each, so that none overwrites another."""

SHARE_OF_MEMORY = 0.8
"""Largest part of the memory that is free which a pool may take."""

_NODULE = "Nodule"


class PoolError(ValueError):
    """A pool that does not fit the memory, or is asked for what it cannot do where it is."""


@dataclass(frozen=True, eq=False)
class PooledNodule:
    """One entry, as it was when drawn.

    Attributes:
        key: (seed, generation, index): enough to render it again (`SyntheticPool.regenerate`).
        noise_seed: of the noise vector.
        boxes: (k, 4) float32 XYXY as parts of the image's width and height.
        difference: (1, S, S) float32, [-2, 2]: what the nodules add.
    """

    key: tuple[int, ...]
    noise_seed: int
    boxes: np.ndarray
    difference: Tensor


class SyntheticPool:
    """N nodules rendered ahead.

    Which entry a key draws depends on the key and on the entries of the moment alone: between two refreshes the same
    keys give the same nodules in any process. With a thread that refreshes, it depends on time.

    Args:
        generator: noise and mask to images.
        prior: where nodules are drawn.
        size: entries.
        reuse: uses after which an entry is due to be rendered anew.
        seed: of all entries, 0 to 2**64 - 1.
        device: where to render; the CPU by default.
        dtype: of the generator's arithmetic: torch.float32 (default) or torch.bfloat16.
        batch_size: entries rendered at once.
        max_bytes: most memory to take; by default 80 % of what is free.

    Raises:
        PoolError: more memory than there is.
        ValueError: a number that breaks its rule.
    """

    def __init__(
        self,
        generator: NoduleGenerator,
        prior: LocationPrior,
        *,
        size: int = 512,
        reuse: int = 4,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        max_bytes: int | None = None,
    ) -> None:
        """Renders all entries once."""
        if not isinstance(generator, NoduleGenerator):
            raise TypeError(f"generator must be a NoduleGenerator, got {type(generator).__name__}")
        for name, value in (("size", size), ("reuse", reuse)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        side, most = generator.image_size, prior.max_count
        needed = size * (4 * side * side + 16 * most + 8 * (ROWS + 4))
        check_memory(needed, size, max_bytes)
        self.generator, self.prior, self.seed, self.reuse = generator, prior, seed, reuse
        self.planner = Planner(prior, seed=seed, nodule=_NODULE, chances={})
        where = torch.device("cpu") if device is None else device
        self._renderer: Renderer | None = Renderer(generator, device=where, dtype=dtype, batch_size=batch_size)
        self._differences = torch.zeros(size, 1, side, side).share_memory_()
        self._boxes = torch.zeros(size, most, 4).share_memory_()
        # Of each entry: boxes, generation, noise seed, and a number that is odd while the entry is being written.
        self._facts = torch.zeros(size, 4, dtype=torch.int64).share_memory_()
        self._facts[:, 1] = -1
        self._uses = torch.zeros(ROWS, size, dtype=torch.int64).share_memory_()
        # Uses of each entry before it was rendered anew; then entries rendered, given at least once, and most uses.
        self._before = torch.zeros(size, dtype=torch.int64).share_memory_()
        self._history = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._render(list(range(size)))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        prior: LocationPrior | None = None,
        **options: Any,
    ) -> "SyntheticPool":
        """Gives a pool of trained weights and their prior.

        Args:
            name_or_path: a folder or a hub id; None: the bundled weights.
            revision: of the hub repository.
            local_files_only: never ask the hub.
            prior: in place of the one beside the weights.
            options: what `SyntheticPool` takes.

        Raises:
            WeightsError: weights that are missing, damaged or not ours.
        """
        where: Any = dict(revision=revision, local_files_only=local_files_only)
        generator = NoduleGenerator.from_pretrained(name_or_path, **where)
        if prior is None:
            prior = LocationPrior.load(fetch(name_or_path, PRIOR, **where))
        return cls(generator, prior, **options)

    def __len__(self) -> int:
        """Entries."""
        return len(self._differences)

    @property
    def bytes(self) -> int:
        """Shared memory taken."""
        held = (self._differences, self._boxes, self._facts, self._uses, self._before)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    # --- Drawing ---
    def draw(self, key: tuple[int, ...]) -> PooledNodule:
        """Gives the entry that a key draws, and counts the use.

        Args:
            key: (seed, epoch, index, ...).
        """
        nodule = self.look(key)
        self._count(nodule.key[2])
        return nodule

    def look(self, key: tuple[int, ...]) -> PooledNodule:
        """Gives the entry that a key draws; no use is counted."""
        index = int(stream(*key, 1).integers(len(self)))
        while True:
            number = int(self._facts[index, 3])  # before all else that is read
            if number % 2 == 0:
                count, generation, noise_seed, _ = self._facts[index].tolist()
                difference, boxes = self._differences[index].clone(), self._boxes[index, :count].numpy().copy()
                if int(self._facts[index, 3]) == number:  # not written meanwhile
                    return PooledNodule((self.seed, generation, index), noise_seed, boxes, difference)

    def slot(self, slot: Slot, key: tuple[int, ...]) -> Slot:
        """Gives a planned slot with the nodules that a key draws in place of its own; no use is counted."""
        nodule = self.look(key)
        return replace(slot, noise_seed=nodule.noise_seed, boxes=nodule.boxes, entry=nodule.key)

    def take(self, slot: Slot) -> Tensor:
        """Gives the difference (1, S, S) of a slot that came from here, and counts the use."""
        assert slot.entry is not None, "a slot of this pool"
        self._count(slot.entry[2])
        return self.difference(slot)

    def difference(self, slot: Slot) -> Tensor:
        """Gives the difference (1, S, S) of a slot that came from here, rendered anew if its entry is gone."""
        assert slot.entry is not None, "a slot of this pool"
        _, generation, index = slot.entry
        number = int(self._facts[index, 3])
        difference = self._differences[index].clone()
        same = int(self._facts[index, 1]) == generation and number % 2 == 0
        if same and int(self._facts[index, 3]) == number:
            return difference
        renderer = self._renderer or Renderer(self.generator, device="cpu")
        return renderer.differences([slot], torch.device("cpu"))[0]

    def regenerate(self, key: tuple[int, ...]) -> PooledNodule:
        """Gives the entry of a key (seed, generation, index) again, rendered anew."""
        slot = self.planner.regenerate(tuple(key), _NODULE)
        difference = self._ready().differences([slot], torch.device("cpu"))[0]
        return PooledNodule(tuple(key), slot.noise_seed, slot.boxes, difference)

    # --- Refreshing ---
    @property
    def uses(self) -> Tensor:
        """(N,) int64: how often each entry has been used since it was rendered."""
        return self._uses.sum(dim=0) - self._before

    def refresh(self, n: int | None = None) -> int:
        """Renders the most used entries anew; gives how many.

        Args:
            n: most entries; None: all that are due, having been used `reuse` times or more.

        Raises:
            PoolError: in a worker, or in a copy.
        """
        uses = self.uses
        order = uses.argsort(descending=True, stable=True)
        chosen = order[uses[order] >= self.reuse] if n is None else order[uses[order] > 0][:n]
        self._render(chosen.tolist())
        return len(chosen)

    def start(self, per_second: float) -> "SyntheticPool":
        """Begins to render used entries anew in a thread; `with pool.start(20): ...` ends it at the end.

        Args:
            per_second: most entries in a second.
        """
        if not per_second > 0:
            raise ValueError(f"per_second must be above 0, got {per_second}")
        self._ready()
        self.stop()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(per_second,), name="SyntheticPool", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "SyntheticPool":
        """Gives itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Ends the thread."""
        self.stop()

    def statistics(self) -> dict[str, float]:
        """Gives what the pool has done.

        Returns:
            entries; bytes; generation: of the entry renewed most often, from 0; rendered: entries so far, the first
            ones too; given: draws; distinct: different nodules among those given; share_distinct: distinct / given;
            mean_uses and most_uses: of a nodule that was given.
        """
        uses, given = self.uses, int(self._uses.sum())
        distinct = int(self._history[1]) + int((uses > 0).sum())
        return {
            "entries": len(self),
            "bytes": self.bytes,
            "generation": int(self._facts[:, 1].max()),
            "rendered": int(self._history[0]),
            "given": given,
            "distinct": distinct,
            "share_distinct": distinct / given if given else 1.0,
            "mean_uses": given / distinct if distinct else 0.0,
            "most_uses": max(int(self._history[2]), int(uses.max())),
        }

    def _run(self, per_second: float) -> None:
        most = max(1, min(self._ready().batch_size, round(per_second)))
        while not self._stop.wait(most / per_second):
            self.refresh(most)

    def _count(self, index: int) -> None:
        worker = get_worker_info()
        self._uses[0 if worker is None else 1 + worker.id % (ROWS - 1), index] += 1

    def _ready(self) -> Renderer:
        if self._renderer is None or get_worker_info() is not None:
            raise PoolError("a pool must be refreshed in the process that made it, got a copy or a DataLoader worker")
        return self._renderer

    def _render(self, indices: list[int]) -> None:
        """Renders entries anew; a reader sees the old one or the new one."""
        renderer = self._ready()
        with self._lock:
            for start in range(0, len(indices), renderer.batch_size):
                part = indices[start : start + renderer.batch_size]
                keys = [(self.seed, int(self._facts[i, 1]) + 1, i) for i in part]
                slots = [self.planner.regenerate(key, _NODULE) for key in keys]
                differences = renderer.differences(slots, torch.device("cpu"))
                for i, key, slot, difference in zip(part, keys, slots, differences, strict=True):
                    used = int(self.uses[i])
                    self._history += torch.tensor([1, int(used > 0), 0])
                    self._history[2] = max(int(self._history[2]), used)
                    self._facts[i, 3] += 1
                    self._differences[i] = difference
                    self._boxes[i, : len(slot.boxes)] = torch.from_numpy(slot.boxes)
                    self._facts[i, :3] = torch.tensor([len(slot.boxes), key[1], slot.noise_seed])
                    self._before[i] += used
                    self._facts[i, 3] += 1

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the thread and the renderer behind: a copy draws, and does not render."""
        return {**self.__dict__, "_renderer": None, "_lock": None, "_thread": None, "_stop": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the copy's shared memory; it has no thread and no renderer."""
        self.__dict__.update(state, _lock=threading.Lock(), _stop=threading.Event())


def free_memory() -> int:
    """Gives the bytes that can be had, with those that the system would take back from its cache of files."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, size: int, max_bytes: int | None) -> None:
    """Nothing, if so many bytes of shared memory are free; PoolError, with the size that would fit, otherwise."""
    limits = {"max_bytes": max_bytes} if max_bytes is not None else {}
    try:
        limits["the memory that is free"] = int(SHARE_OF_MEMORY * free_memory())
        shared = os.statvfs("/dev/shm")
        limits["the shared memory that is free (/dev/shm)"] = int(SHARE_OF_MEMORY * shared.f_bavail * shared.f_frsize)
    except (ValueError, OSError, AttributeError):
        pass  # a system that does not tell
    for name, limit in limits.items():
        if needed > limit:
            raise PoolError(
                f"size must be at most {max(0, limit * size // needed)} entries for {name} ({limit / 2**20:.0f} MiB), "
                f"got {size} ({needed / 2**20:.0f} MiB): make the pool smaller and refresh it more often"
            )
