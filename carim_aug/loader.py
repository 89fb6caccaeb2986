"""The whole job in one loader: plan in the workers, render in the main process, resume in mid-epoch (DESIGN 1)."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, default_collate

from carim_aug.insertion import insert, relabel
from carim_aug.keys import fold
from carim_aug.layouts import check_images
from carim_aug.plan import MixParams, Slot
from carim_aug.ranges import ValueRange
from carim_aug.render import Renderer
from carim_aug.wrapped import PlannedDataset


class MixLoader:
    """A loader of mixed batches, as `mix.loader` gives it.

    Each new iteration is the next epoch. Batches have the structure, types, sizes and device of the user's own. While a
    batch is in use, `last_params` says what was decided for it.

    Args:
        planned: data set and decisions.
        renderer: generates.
        value_range: of the images.
        weights_hash: of the generator.
        on_batch: called with each batch's `MixParams` before it is handed out.
        batch_size: samples of a batch.
        shuffle: whether to shuffle, by (seed, epoch) alone.
        sampler: in place of shuffle; its `set_epoch` is called where it has one.
        batch_sampler: in place of batch_size, shuffle, sampler and drop_last.
        drop_last: leave out the last batch if it is not full.
        collate_fn: makes a batch from a list of samples; `default_collate` by default.
        options: all else that a DataLoader takes.
    """

    def __init__(
        self,
        planned: PlannedDataset,
        renderer: Renderer,
        value_range: ValueRange,
        *,
        weights_hash: str,
        on_batch: Callable[[MixParams], None],
        batch_size: int | None = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        batch_sampler: Sampler[list[int]] | None = None,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        """Makes the inner DataLoader; nothing is loaded yet."""
        if batch_sampler is None and (batch_size is None or batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: without batches use mix.wrap(dataset)")
        if "generator" in options:
            raise TypeError(
                "generator is not taken: the order of an epoch comes from the mix's seed and the epoch alone"
            )
        if sampler is not None and shuffle:
            raise ValueError("shuffle must be False with a sampler, got True")
        self._planned, self._renderer, self._range = planned, renderer, value_range
        self._weights_hash, self._on_batch = weights_hash, on_batch
        self._generator = torch.Generator()
        if batch_sampler is None:
            if sampler is None:
                sampler = (
                    RandomSampler(planned, generator=self._generator)  # type: ignore[arg-type]
                    if shuffle
                    else SequentialSampler(planned)  # type: ignore[arg-type]
                )
            batch_sampler = BatchSampler(sampler, batch_size or 1, drop_last)
        self._samplers = (sampler, batch_sampler)
        self._batches = _FromStep(batch_sampler)
        self.loader = DataLoader(
            planned,
            batch_sampler=self._batches,
            collate_fn=_Collate(collate_fn or default_collate),
            generator=self._generator,
            **options,
        )
        self.last_params: MixParams | None = None
        self._epoch, self._step = 0, 0  # of the batch handed out last
        self._next = 0  # epoch of the next iteration
        self._skip = 0

    @property
    def dataset(self) -> PlannedDataset:
        """Decisions over the user's data set, which is its `dataset`."""
        return self._planned

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self._epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._batches.batches)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration this epoch, from its start."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._next, self._skip = int(epoch), 0

    def state_dict(self) -> dict[str, int]:
        """Gives where the loader stands: seed, epoch, and step, the batches of the epoch already handed out."""
        if self._skip:  # loaded, not yet iterated
            return {"seed": self._planned.planner.seed, "epoch": self._next, "step": self._skip}
        if self._step and self._next == self._epoch + 1:
            if self._step < len(self):
                return {"seed": self._planned.planner.seed, "epoch": self._epoch, "step": self._step}
        return {"seed": self._planned.planner.seed, "epoch": self._next, "step": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on from there; the batches already seen are not loaded again.

        Raises:
            ValueError: the state is of another seed, or of no such loader.
        """
        missing = {"seed", "epoch", "step"} - set(state)
        if missing:
            raise ValueError(f"state must have seed, epoch and step, got {sorted(state)}")
        if state["seed"] != self._planned.planner.seed:
            raise ValueError(f"state is of seed {state['seed']}, this mix has seed {self._planned.planner.seed}")
        if not 0 <= state["step"] <= len(self):
            raise ValueError(f"step must be in [0, {len(self)}], got {state['step']}")
        self._next, self._skip, self._step = int(state["epoch"]), int(state["step"]), 0
        if self._skip == len(self):
            self._next, self._skip = self._next + 1, 0

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Gives real, synthetic and total samples per class of the next iteration's epoch."""
        before = int(self._planned.epoch)
        self._planned.epoch.fill_(self._next)
        try:
            return self._planned.class_counts()
        finally:
            self._planned.epoch.fill_(before)

    def __iter__(self) -> Iterator[Any]:
        """Goes through one epoch."""
        epoch, skip = self._next, self._skip
        self._epoch, self._step, self._next, self._skip = epoch, skip, epoch + 1, 0
        self._planned.epoch.fill_(epoch)
        self._generator.manual_seed(fold(self._planned.planner.seed, epoch))
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]
        self._batches.start = skip
        for batch, params in self._ahead(iter(self.loader)):
            if self._epoch != epoch:
                raise RuntimeError("this iteration ended when another one was started on the same loader")
            self._step += 1
            self.last_params = params
            self._on_batch(params)
            yield batch

    def _ahead(self, batches: Iterator[Any]) -> Iterator[tuple[Any, MixParams]]:
        """Renders each batch; on CUDA one batch ahead of its use, on a stream of its own."""
        device = self._renderer.device
        if device is None or device.type != "cuda":
            for batch, slots in batches:
                yield self._mixed(batch, slots)
            return
        side = torch.cuda.Stream(device)
        waiting: tuple[Any, MixParams, torch.cuda.Event] | None = None
        for batch, slots in batches:
            with torch.cuda.stream(side):
                mixed, params = self._mixed(batch, slots)
                done = torch.cuda.Event()
                done.record(side)
            if waiting is not None:
                yield self._hand_over(waiting)
            waiting = (mixed, params, done)
        if waiting is not None:
            yield self._hand_over(waiting)

    def _hand_over(self, waiting: tuple[Any, MixParams, torch.cuda.Event]) -> tuple[Any, MixParams]:
        batch, params, done = waiting
        done.synchronize() if not self._image_of(batch).is_cuda else torch.cuda.current_stream().wait_event(done)
        if self._image_of(batch).is_cuda:
            self._image_of(batch).record_stream(torch.cuda.current_stream())
        return batch, params

    def _image_of(self, batch: Any) -> Tensor:
        return torch.as_tensor(self._planned.layout.get(batch)[0])

    def _mixed(self, batch: Any, slots: tuple[Slot, ...]) -> tuple[Any, MixParams]:
        planned = self._planned
        images, labels = planned.layout.get(batch)
        check_images(images, batch=True)
        pixels = torch.as_tensor(images).as_subclass(Tensor)
        self._range.check(pixels)
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        params = MixParams(slots, planned.insertion, size, self._weights_hash)
        if not any(slot.synthetic for slot in slots):
            return batch, params
        new = insert(pixels, slots, insertion=planned.insertion, renderer=self._renderer, value_range=self._range)
        marked = relabel(labels, slots, insertion=planned.insertion, policy=planned.policy)
        return planned.layout.put(batch, new, marked), params


class _FromStep(Sampler[list[int]]):
    """Batches of indices from a given step on; the order before it is drawn all the same."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.start = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from islice(iter(self.batches), self.start, None)


class _Collate:
    """The user's collate_fn on the samples, the slots beside them; a class, so that spawn can pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, Slot]]) -> tuple[Any, tuple[Slot, ...]]:
        samples, slots = zip(*items, strict=True)
        return self.collate(list(samples)), slots
