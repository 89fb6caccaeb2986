"""The whole job in one loader: plan in the workers, render in the main process, resume in mid-epoch (DESIGN 1)."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, default_collate

from carim_aug.labels.policy import LabelError
from carim_aug.labels.sample import ImageError, Layout, LayoutError, check_images, plain_images
from carim_aug.ops.random import fold
from carim_aug.transforms.apply import Filler, sizes_of
from carim_aug.transforms.dataset import PlannedDataset
from carim_aug.transforms.plan import MixParams, Slot, check_epoch, check_state


class MixLoader:
    """A loader of mixed batches, as `mix.loader` gives it.

    Each new iteration is the next epoch. Batches have the structure, types, sizes and device of the user's own. While a
    batch is in use, `last_params` says what was decided for it.

    Args:
        planned: data set and decisions.
        filler: of the slots.
        on_batch: called with each batch's `MixParams` before it is handed out.
        batch_size: samples of a batch.
        shuffle: whether to shuffle, by (seed, epoch) alone.
        sampler: in place of shuffle; its `set_epoch` is called where it has one.
        batch_sampler: in place of batch_size, shuffle, sampler and drop_last.
        drop_last: leave out the last batch if it is not full.
        collate_fn: makes a batch from a list of samples; by default `default_collate`, for detection `side_by_side`.
        options: all else that a DataLoader takes.
    """

    def __init__(
        self,
        planned: PlannedDataset,
        filler: Filler,
        *,
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
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"batch_size must be an integer of at least 1, got {batch_size!r}: without batches use "
                "mix.wrap(dataset)"
            )
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ValueError("batch_sampler must be given without batch_size, shuffle, sampler and drop_last")
        if "generator" in options:
            raise TypeError(
                "generator is not taken: the order of an epoch comes from the mix's seed and the epoch alone"
            )
        if sampler is not None and shuffle:
            raise ValueError("shuffle must be False with a sampler, got True")
        self._planned, self._filler, self._on_batch = planned, filler, on_batch
        # The order has a generator of its own: DataLoader draws from the other one, but not at every epoch.
        self._order, self._seeds = torch.Generator(), torch.Generator()
        check_sampler(sampler if sampler is not None else getattr(batch_sampler, "sampler", None), planned)
        if batch_sampler is None:
            if sampler is None:
                sampler = (
                    RandomSampler(planned, generator=self._order)  # type: ignore[arg-type]
                    if shuffle
                    else SequentialSampler(planned)  # type: ignore[arg-type]
                )
            batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        self._samplers = (getattr(batch_sampler, "sampler", None), batch_sampler)
        self._batches = _FromStep(batch_sampler)
        self._own_collate = collate_fn is not None
        detection = planned.policy.kind == "detection"
        self._collate = _Collate(collate_fn or (side_by_side if detection else default_collate), planned.layout)
        self.loader = DataLoader(
            planned,
            batch_sampler=self._batches,
            collate_fn=self._collate,
            generator=self._seeds,
            **options,
        )
        self.last_params: MixParams | None = None
        self._epoch, self._step = 0, 0  # of the batch handed out last
        self._next, self._skip = 0, 0  # where the next iteration starts
        self._at_start = True  # of the next iteration; False: in the one that handed out a batch last
        self._running: object = None

    @property
    def dataset(self) -> PlannedDataset:
        """Decisions over the user's data set, which is its `dataset`."""
        return self._planned

    @property
    def batch_size(self) -> int | None:
        """Samples of a full batch; None where a batch_sampler of the user's does not tell."""
        return getattr(self._batches.batches, "batch_size", None)

    @property
    def sampler(self) -> Any:
        """The sampler of indices, whose `set_epoch` training scripts call; None where a batch_sampler has none."""
        return self._samplers[0]

    @property
    def batch_sampler(self) -> Any:
        """The sampler of batches of indices."""
        return self._samplers[1]

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any]:
        """What makes a batch from the user's samples."""
        return self._collate.collate

    @property
    def pin_memory(self) -> bool:
        """Whether the inner DataLoader pins its batches."""
        return bool(self.loader.pin_memory)

    @property
    def num_workers(self) -> int:
        """Workers of the inner DataLoader."""
        return self.loader.num_workers

    @property
    def drop_last(self) -> bool:
        """Whether a last batch that is not full is left out."""
        return bool(getattr(self._batches.batches, "drop_last", False))

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self._epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._batches.batches)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration this epoch, from its start; or from the step that was loaded for this very epoch."""
        epoch = check_epoch(epoch)
        if epoch != self._next:
            self._skip = 0
        self._next, self._at_start = epoch, True

    def state_dict(self) -> dict[str, int]:
        """Gives where the loader stands: seed, epoch, and step, the batches of the epoch already handed out."""
        epoch, step = (self._next, self._skip) if self._at_start else (self._epoch, self._step)
        if step >= len(self):
            epoch, step = epoch + 1, 0
        return {"seed": self._planned.planner.seed, "epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on from there; the batches already seen are not loaded again.

        Raises:
            TypeError: no mapping.
            ValueError: the state is of another seed, or of no such loader.
        """
        epoch, step = check_state(state, self._planned.planner.seed)
        if step > len(self):
            raise ValueError(f"step must be in [0, {len(self)}], got {step}")
        self._next, self._skip, self._at_start, self._running = epoch, step, True, None
        if step == len(self):
            self._next, self._skip = epoch + 1, 0

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Gives real, synthetic and total samples per class of the next iteration's epoch."""
        return self._planned.class_counts(self._next)

    def __iter__(self) -> Iterator[Any]:
        """Goes through one epoch."""
        epoch, skip = self._next, self._skip
        self._epoch, self._step, self._next, self._skip = epoch, skip, epoch + 1, 0
        self._planned.epoch.fill_(epoch)
        for generator in (self._order, self._seeds):
            generator.manual_seed(fold(self._planned.planner.seed, epoch))
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]
        self._batches.start = skip
        self._at_start, self._running = False, object()
        return self._run(self._running, iter(self.loader))

    def _run(self, run: object, batches: Iterator[Any]) -> Iterator[Any]:
        for batch, params in self._ahead(batches):
            self._step += 1
            self._at_start, self.last_params = False, params
            self._on_batch(params)
            yield batch
            if self._running is not run:
                raise RuntimeError(
                    "this iteration ended when the loader was given a state or began another iteration: "
                    "make one loader for each loop that runs at the same time"
                )
        self._at_start = True

    def _ahead(self, batches: Iterator[Any]) -> Iterator[tuple[Any, MixParams]]:
        """Renders each batch; on CUDA one batch ahead of its use, on a stream of its own."""
        device = self._filler.renderer.device
        if device is None or device.type != "cuda":
            for batch, slots in batches:
                yield self._mixed(batch, slots)
            return
        self._filler.renderer.check_device(device)
        side = torch.cuda.Stream(device)
        waiting: tuple[Any, MixParams, torch.cuda.Event] | None = None
        for batch, slots in batches:
            # Wait only for batches that a collate_fn put on the device; else training and rendering overlap.
            for tensor in self._on_cuda(batch):
                side.wait_stream(torch.cuda.current_stream(device))
                tensor.record_stream(side)
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
        current = torch.cuda.current_stream(self._filler.renderer.device)
        current.wait_event(done)
        for tensor in self._on_cuda(batch):
            tensor.record_stream(current)
        return batch, params

    def _on_cuda(self, batch: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_cuda]

    def _layout_of(self, batch: Any) -> Layout:
        """Where image and label are in a batch: as in a sample, unless a collate_fn of the user's moves them."""
        try:
            self._planned.layout.get(batch)
        except LayoutError:
            return Layout.of(batch)
        return self._planned.layout

    def _mixed(self, batch: Any, slots: tuple[Slot, ...]) -> tuple[Any, MixParams]:
        planned, layout = self._planned, self._layout_of(batch)
        images, labels = layout.get(batch)
        check_images(images, batch=True)
        pixels = plain_images(images)
        self._filler.value_range.check_each(pixels)
        if len(pixels) != len(slots):
            raise ValueError(f"collate_fn must keep all {len(slots)} samples of a batch, got {len(pixels)} images")
        settled = self._filler.settle(pixels, slots, planned.planner)
        if any(slot.synthetic for slot in settled.slots):
            try:
                planned.policy.check(labels, sizes=sizes_of(pixels))
            except LabelError as error:
                if self._own_collate:
                    raise LabelError(
                        f"{error}: the collate_fn must leave labels and their fields as they are; for one that mixes "
                        "them, such as MixUp, use DataLoader(mix.wrap(dataset), ...)"
                    ) from error
                raise
        new, marked, params = self._filler.fill(pixels, labels, settled, planned.policy)
        return (batch if new is pixels else layout.put(batch, new, marked)), params


def check_sampler(sampler: Any, planned: PlannedDataset) -> None:
    """Nothing, or ValueError: a sampler of the real samples alone would never come to the added ones."""
    real, total = len(planned.dataset), len(planned)  # type: ignore[arg-type]
    for name in ("data_source", "dataset", "weights", "indices"):
        source = getattr(sampler, name, None)
        if total > real and source is not None and hasattr(source, "__len__") and len(source) == real:
            raise ValueError(
                f"sampler must be over all {total} samples, the {total - real} synthetic ones too, got one over the "
                f"{real} real ones: build it over mix.wrap(dataset), and give that to mix.loader"
            )


def side_by_side(samples: list[Any]) -> Any:
    """Gives a batch of tuples or dicts with a list in each place, as detectors want it: sizes may differ."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: [sample[key] for sample in samples] for key in first}
    return tuple(list(entries) for entries in zip(*samples, strict=True))


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

    def __init__(self, collate: Callable[[list[Any]], Any], layout: Layout) -> None:
        self.collate, self.layout = collate, layout

    def __call__(self, items: list[tuple[Any, Slot]]) -> tuple[Any, tuple[Slot, ...]]:
        samples, slots = zip(*items, strict=True)
        try:
            return self.collate(list(samples)), slots
        except (RuntimeError, ValueError) as error:
            shapes = sorted({tuple(self.layout.get(sample)[0].shape) for sample in samples})
            if len(shapes) == 1:
                raise
            raise ImageError(
                f"images must be of one shape within a batch, got {shapes[0]} and {shapes[-1]}: add v2.Resize to the "
                "data set's transform, or use mix.wrap(dataset)"
            ) from error
