"""The whole job in one loader: decide in the workers, generate in the main process, resume in mid-epoch."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, default_collate

from carim_aug.generators.base import check_device
from carim_aug.labels.base import LabelError
from carim_aug.labels.sample import ImageError, LayoutError, check_images, layout_of, plain_images
from carim_aug.ops.random import fold
from carim_aug.transforms.apply import Applier, sizes_of
from carim_aug.transforms.dataset import PlannedDataset
from carim_aug.transforms.plan import Decision, MixParams, check_epoch, check_state


class MixLoader:
    """A loader of mixed batches, as `mix.loader` returns it.

    Each new iteration is the next epoch. Batches have the structure, types, sizes and device of the user's own. While a
    batch is in use, `last_params` says what was decided for it. `batch_size`, `sampler`, `batch_sampler`, `collate_fn`,
    `num_workers`, `pin_memory` and `drop_last` are the user's, as training scripts ask for them.

    Args:
        planned, applier, weights_hash, on_batch: of the mix; `on_batch` is called before a batch is handed out.
        shuffle: by (seed, epoch) alone.
        sampler: in place of shuffle; its `set_epoch` is called where it has one.
        collate_fn: by default `default_collate`, for detection `lists_of_entries`.
        options: all else that a DataLoader takes, but for `generator`.
    """

    def __init__(
        self,
        planned: PlannedDataset,
        applier: Applier,
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
        self.dataset, self._applier, self._weights_hash, self._on_batch = planned, applier, weights_hash, on_batch
        # The order has a generator of its own: DataLoader draws from the other one, but not at every epoch.
        self._order, self._seeds = torch.Generator(), torch.Generator()
        check_sampler(sampler if sampler is not None else getattr(batch_sampler, "sampler", None), planned)
        if batch_sampler is None:
            if sampler is None:
                data: Any = planned
                sampler = RandomSampler(data, generator=self._order) if shuffle else SequentialSampler(data)
            batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        self.batch_sampler, self.sampler = batch_sampler, getattr(batch_sampler, "sampler", None)
        self.batch_size = getattr(batch_sampler, "batch_size", None)
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))
        self._own_collate = collate_fn is not None
        usual = lists_of_entries if planned.policy.kind == "detection" else default_collate
        self.collate_fn = collate_fn or usual
        self._batches = _FromStep(batch_sampler)
        self.loader = DataLoader(
            planned,
            batch_sampler=self._batches,
            collate_fn=_Collate(self.collate_fn, planned.layout),
            generator=self._seeds,
            **options,
        )
        self.num_workers, self.pin_memory = self.loader.num_workers, bool(self.loader.pin_memory)
        self.last_params: MixParams | None = None
        self._epoch, self._step = 0, 0  # of the batch handed out last
        self._next, self._skip = 0, 0  # where the next iteration starts
        self._at_start = True  # of the next iteration; False: in the one that handed out a batch last
        self._running: object = None

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self._epoch

    @property
    def synthetic_enabled(self) -> bool:
        """Whether anything in it may be synthetic now."""
        return bool(self.dataset.enabled)

    def __len__(self) -> int:
        return len(self._batches.batches)

    # --- State ---
    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration this epoch, from its start; or from the step that was loaded for this very epoch."""
        epoch = check_epoch(epoch)
        if epoch != self._next:
            self._skip = 0
        self._next, self._at_start = epoch, True

    def state_dict(self) -> dict[str, int]:
        """Return where the loader stands: seed, epoch, and step, the batches of the epoch already handed out."""
        epoch, step = (self._next, self._skip) if self._at_start else (self._epoch, self._step)
        if step >= len(self):
            epoch, step = epoch + 1, 0
        return {"seed": self.dataset.settings.seed, "epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration go on from there; the batches already seen are not loaded again."""
        epoch, step = check_state(state, self.dataset.settings.seed)
        if step > len(self):
            raise ValueError(f"step must be in [0, {len(self)}], got {step}")
        self._next, self._skip, self._at_start, self._running = epoch, step, True, None
        if step == len(self):
            self._next, self._skip = epoch + 1, 0

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Return real, synthetic and total samples per class of the next iteration's epoch."""
        return self.dataset.class_counts(self._next)

    # --- Batches ---
    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self._next, self._skip
        self._epoch, self._step, self._next, self._skip = epoch, skip, epoch + 1, 0
        self.dataset.epoch.fill_(epoch)
        for generator in (self._order, self._seeds):
            generator.manual_seed(fold(self.dataset.settings.seed, epoch))
        for sampler in (self.sampler, self.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]
        self._batches.start = skip
        self._at_start, self._running = False, object()
        return self._run(self._running, iter(self.loader))

    def _run(self, run: object, batches: Iterator[Any]) -> Iterator[Any]:
        for batch, params in self._mix_ahead(batches):
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

    def _mix_ahead(self, batches: Iterator[Any]) -> Iterator[tuple[Any, MixParams]]:
        """Yield mixed batches; on CUDA each is made one batch ahead of its use, on a stream of its own."""
        device = self._applier.device
        if device is None or device.type != "cuda":
            for batch, decisions in batches:
                yield self._mix(batch, decisions)
            return
        check_device(device)
        side = torch.cuda.Stream(device)
        waiting: tuple[Any, MixParams, torch.cuda.Event] | None = None
        for batch, decisions in batches:
            # Wait only for batches that a collate_fn put on the device; else training and generating overlap.
            for tensor in _on_cuda(batch):
                side.wait_stream(torch.cuda.current_stream(device))
                tensor.record_stream(side)
            with torch.cuda.stream(side):
                mixed, params = self._mix(batch, decisions)
                done = torch.cuda.Event()
                done.record(side)
            if waiting is not None:
                yield self._hand_over(*waiting)
            waiting = (mixed, params, done)
        if waiting is not None:
            yield self._hand_over(*waiting)

    def _hand_over(self, batch: Any, params: MixParams, done: torch.cuda.Event) -> tuple[Any, MixParams]:
        current = torch.cuda.current_stream(self._applier.device)
        current.wait_event(done)
        for tensor in _on_cuda(batch):
            tensor.record_stream(current)
        return batch, params

    def _mix(self, batch: Any, decisions: tuple[Decision, ...]) -> tuple[Any, MixParams]:
        planned, layout = self.dataset, self._layout_of(batch)
        images, labels = layout.get(batch)
        check_images(images, batch=True)
        pixels = plain_images(images)
        self._applier.settings.value_range.check_each(pixels)
        if len(pixels) != len(decisions):
            raise ValueError(f"collate_fn must keep all {len(decisions)} samples of a batch, got {len(pixels)} images")
        placed = self._applier.place(pixels, decisions, planned.planner)
        if any(decision.synthetic for decision in placed.decisions):
            try:
                planned.policy.check(labels, sizes=sizes_of(pixels))
            except LabelError as error:
                if not self._own_collate:
                    raise
                raise LabelError(
                    f"{error}: the collate_fn must leave labels and their fields as they are; for one that mixes them, "
                    "such as MixUp, use DataLoader(mix.wrap(dataset), ...)"
                ) from error
        new, changed, params = self._applier.apply(pixels, labels, placed, planned.policy, self._weights_hash)
        return (batch if new is pixels else layout.put(batch, new, changed)), params

    def _layout_of(self, batch: Any) -> Any:
        """Return where image and label are in a batch: as in a sample, unless a collate_fn of the user's moves them."""
        getter = self.dataset.settings.labels_getter
        if callable(getter):  # a batch may have more leaves than a sample: its strings are a list
            return layout_of(batch, labels_getter=getter)
        try:
            self.dataset.layout.get(batch)
        except LayoutError:
            return layout_of(batch)
        return self.dataset.layout


def check_sampler(sampler: Any, planned: PlannedDataset) -> None:
    """Raise ValueError for a sampler of the real samples alone, which would never come to the added ones."""
    real, total = len(planned.dataset), len(planned)  # type: ignore[arg-type]
    for name in ("data_source", "dataset", "weights", "indices"):
        source = getattr(sampler, name, None)
        if total > real and source is not None and hasattr(source, "__len__") and len(source) == real:
            raise ValueError(
                f"sampler must be over all {total} samples, the {total - real} synthetic ones too, got one over the "
                f"{real} real ones: build it over mix.wrap(dataset), and give that to mix.loader"
            )


def lists_of_entries(samples: list[Any]) -> Any:
    """Return a batch of tuples or dicts with a list in each place, as detectors want it: sizes may differ."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: [sample[key] for sample in samples] for key in first}
    return tuple(list(entries) for entries in zip(*samples, strict=True))


def _on_cuda(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_cuda]


class _FromStep(Sampler[list[int]]):
    """Batches of indices from a given step on; the order before it is drawn all the same."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.start = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from islice(iter(self.batches), self.start, None)


class _Collate:
    """The user's collate_fn on the samples, the decisions beside them; a class, so that spawn can pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any], layout: Any) -> None:
        self.collate, self.layout = collate, layout

    def __call__(self, items: list[tuple[Any, Decision]]) -> tuple[Any, tuple[Decision, ...]]:
        samples, decisions = zip(*items, strict=True)
        try:
            return self.collate(list(samples)), decisions
        except (RuntimeError, ValueError) as error:
            shapes = sorted({tuple(self.layout.get(sample)[0].shape) for sample in samples})
            if len(shapes) == 1:
                raise
            raise ImageError(
                f"images must be of one shape within a batch, got {shapes[0]} and {shapes[-1]}: add v2.Resize to the "
                "data set's transform, or use mix.wrap(dataset)"
            ) from error
