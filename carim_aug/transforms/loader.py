"""The whole job in one loader: decide in the workers, generate in the main process, resume in mid-epoch."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from carim_aug.generators.base import check_device
from carim_aug.labels.base import LabelError
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import ImageError, LayoutError, check_images, layout_of, plain_images
from carim_aug.transforms.apply import sizes_of
from carim_aug.transforms.dataset import MixedDataset, PlannedDataset
from carim_aug.transforms.epochs import EpochSampler, world_size
from carim_aug.transforms.plan import Decision, MixParams, check_epoch, check_state

OPTIONS = frozenset(inspect.signature(DataLoader.__init__).parameters)
OPTIONS -= {"self", "dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn"}
"""What a DataLoader takes beside its data set, order and collate_fn."""


class MixLoader(DataLoader):
    """A DataLoader of mixed batches, as `mix.loader` returns it.

    Each new iteration is the next epoch. Batches have the structure, types, sizes and device of the user's own. While a
    batch is in use, `last_params` says what was decided for it. Frameworks may make it anew with a sampler of their own
    (Lightning), or read its data set with a loader of their own (Accelerate): decisions are the same.

    Args:
        dataset: what `mix.wrap` returned.
        batch_size, shuffle, sampler, batch_sampler, drop_last: as a DataLoader has them; shuffled by (seed, epoch)
            alone, unless `options` have a `generator`, which then orders as in torch. A sampler is told the epoch where
            it has `set_epoch`, and may be told it by others.
        collate_fn: by default `default_collate`, for detection `lists_of_entries`.
        options: all else that a DataLoader takes.

    Raises:
        TypeError: a data set that is not mixed.
        ValueError: options that exclude each other.
    """

    dataset: MixedDataset

    def __init__(
        self,
        dataset: MixedDataset,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(dataset, MixedDataset):
            raise TypeError(f"dataset must be what mix.wrap returns, got {type(dataset).__name__}: use mix.loader")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"batch_size must be an integer of at least 1, got {batch_size!r}: without batches use "
                "mix.wrap(dataset)"
            )
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ValueError("batch_sampler must be given without batch_size, shuffle, sampler and drop_last")
        if sampler is not None and shuffle:
            raise ValueError("shuffle must be False with a sampler, got True")
        check_sampler(sampler if sampler is not None else getattr(batch_sampler, "sampler", None), dataset)

        # The order has a generator of its own: DataLoader draws from the other one, but not at every epoch.
        order = seeds = options.pop("generator", None)
        seeded = () if order is not None else (torch.Generator(), torch.Generator())
        if seeded:
            order, seeds = seeded
        self._ranks_see_all = sampler is None and batch_sampler is None
        if self._ranks_see_all:
            data: Any = dataset
            sampler = RandomSampler(data, generator=order) if shuffle else SequentialSampler(data)
        batches = None if batch_sampler is None else getattr(batch_sampler, "batch_size", None)
        self.epochs = EpochSampler(sampler if batch_sampler is None else batch_sampler, dataset.mix.seed, seeded)
        usual = lists_of_entries if dataset.planned.policy.kind == "detection" else default_collate
        self._own_collate = collate_fn not in (None, usual)
        options |= {"generator": seeds, "collate_fn": collate_fn or usual}
        if batch_sampler is None:
            super().__init__(dataset, batch_size, sampler=self.epochs, drop_last=drop_last, **options)
        else:
            super().__init__(dataset, batch_sampler=self.epochs, **options)
            self.__dict__["batch_size"] = batches  # what scripts ask for; DataLoader forgets it
        # Where CUDA is, nodules are made there and come back to where the images are.
        self._applier = dataset.applier.on("cuda" if torch.cuda.is_available() else None)
        self._decided: DataLoader | None = None
        self.last_params: MixParams | None = None
        self._step = 0  # of the batch handed out last
        self._at_start = True  # of the next iteration; False: in the one that handed out a batch last
        self._running: object = None

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self.epochs.epoch

    @property
    def synthetic_enabled(self) -> bool:
        """Whether anything in it may be synthetic now."""
        return self.dataset.synthetic_enabled

    # --- State ---
    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration this epoch, from its start; or from the step that was loaded for this very epoch."""
        self.epochs.set_epoch(check_epoch(epoch))
        self._at_start = True

    def state_dict(self) -> dict[str, int]:
        """Return where the loader stands: seed, epoch, and step, the batches of the epoch already handed out.

        Of an order from a `generator` of the user's, that generator's state must be kept as well.
        """
        entries = 1 if self._of_batches else self.batch_size
        at_start = (self.epochs.next, self.epochs.skip // entries)  # type: ignore[operator]
        epoch, step = at_start if self._at_start else (self.epoch, self._step)
        if step >= len(self):
            epoch, step = epoch + 1, 0
        return {"seed": self.dataset.mix.seed, "epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration go on from there; the batches already seen are not loaded again."""
        epoch, step = check_state(state, self.dataset.mix.seed)
        if step > len(self):
            raise ValueError(f"step must be in [0, {len(self)}], got {step}")
        if step == len(self):
            epoch, step = epoch + 1, 0
        entries = 1 if self._of_batches else self.batch_size
        self.epochs.next, self.epochs.skip = epoch, step * entries  # type: ignore[operator]
        self._at_start, self._running = True, None

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Return real, synthetic and total samples per class of the next iteration's epoch."""
        return self.dataset.planned.class_counts(self.epochs.next)

    @property
    def _of_batches(self) -> bool:
        return self.batch_sampler is self.epochs

    # --- Batches ---
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._ranks_see_all and world_size() > 1:
            raise RuntimeError(
                "sampler must be given on several ranks, which would see the same samples: mixed = mix.wrap(dataset); "
                "mix.loader(mixed, sampler=DistributedSampler(mixed), ...)"
            )
        entries = 1 if self._of_batches else self.batch_size
        self._step = self.epochs.begin() // entries  # type: ignore[operator]
        self._at_start, self._running, run = False, object(), object()
        self._running = run
        if self._decided is None:  # late: frameworks set options of a loader after they made it
            options = {name: getattr(self, name) for name in OPTIONS if hasattr(self, name)}
            collate = _Collate(self.collate_fn, self.dataset.planned, own=self._own_collate)
            self._decided = DataLoader(
                self.dataset.planned, batch_sampler=self.batch_sampler, collate_fn=collate, **options
            )
        for batch, params in self._mix_ahead(iter(self._decided)):
            self._step += 1
            self._at_start, self.last_params = False, params
            self.dataset.mix.last_params = params
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
        planned = self.dataset.planned
        layout = layout_in(batch, planned)
        images, labels = layout.get(batch)
        check_images(images, batch=True)
        pixels = plain_images(images)
        self._applier.settings.value_range.check_each(pixels)
        if len(pixels) != len(decisions):
            raise ValueError(f"collate_fn must keep all {len(decisions)} samples of a batch, got {len(pixels)} images")
        taken = planned.policy.boxes_of(labels) if any(d.synthetic for d in decisions) else None
        placed = self._applier.place(pixels, decisions, planned.planner, taken)
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
        new, changed, params = self._applier.apply(
            pixels, labels, placed, planned.policy, self.dataset.mix.weights_hash
        )
        return (batch if new is pixels else layout.put(batch, new, changed)), params


def check_sampler(sampler: Any, mixed: MixedDataset) -> None:
    """Raise ValueError for a sampler of the real samples alone, which would never come to the added ones."""
    real, total = len(mixed.dataset), len(mixed)  # type: ignore[arg-type]
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


class _Collate:
    """The user's collate_fn on the samples, the decisions beside them; a class, so that spawn can pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any], planned: PlannedDataset, *, own: bool) -> None:
        self.collate, self.planned, self.own = collate, planned, own

    def __call__(self, items: list[tuple[Any, Decision]]) -> tuple[Any, tuple[Decision, ...]]:
        samples, decisions = zip(*items, strict=True)
        try:
            batch = self.collate(list(samples))
        except (RuntimeError, ValueError) as error:
            shapes = sorted({tuple(self.planned.layout.get(sample)[0].shape) for sample in samples})
            if len(shapes) == 1:
                raise
            raise ImageError(
                f"images must be of one shape within a batch, got {shapes[0]} and {shapes[-1]}: add v2.Resize to the "
                "data set's transform, or use mix.wrap(dataset)"
            ) from error
        return batch, self._follow(samples, batch, decisions) if self.own else decisions

    def _follow(self, samples: Sequence[Any], batch: Any, decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
        """Return the decisions in the order of the batch; LabelError if it is another and cannot be followed."""
        inside = [self.planned.layout.get(sample) for sample in samples]
        images, labels = layout_in(batch, self.planned).get(batch)
        if len(images) != len(samples):
            raise ValueError(f"collate_fn must keep all {len(samples)} samples of a batch, got {len(images)} images")
        left, order = list(range(len(samples))), []
        for i, image in enumerate(images):
            nearest = sorted(left, key=lambda j: abs(j - i))
            found = next((j for j in nearest if _same_pixels(inside[j][0], image)), None)
            if found is None:  # it changes images: then labels must be in their places
                if _differ(self.planned.policy, [label for _, label in inside], labels):
                    raise LabelError("labels must be in the order of the samples after collate_fn, got another order")
                return decisions
            left.remove(found)
            order.append(found)
        return tuple(decisions[j] for j in order)


def layout_in(batch: Any, planned: PlannedDataset) -> Any:
    """Return where image and label are in a batch: as in a sample, unless a collate_fn of the user's moves them."""
    getter = planned.settings.labels_getter
    if callable(getter):  # a batch may have more leaves than a sample: its strings are a list
        return layout_of(batch, labels_getter=getter)
    try:
        planned.layout.get(batch)
    except LayoutError:
        return layout_of(batch)
    return planned.layout


def _same_pixels(a: Any, b: Any) -> bool:
    a, b = (torch.as_tensor(image).as_subclass(Tensor) for image in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(a.equal(b))


def _differ(policy: LabelPolicy, before: Sequence[Any], after: Any) -> bool:
    """Return whether labels are of other classes than before, as far as they can be read."""
    try:
        return [policy.class_of(label) for label in before] != policy.classes_of(after)
    except LabelError:  # mixed or re-coded: refused later, if anything is synthetic
        return False
