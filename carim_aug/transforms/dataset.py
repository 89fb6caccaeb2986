"""A data set with synthetic samples in it: decisions keyed by index, pixels made later (loader) or per item (wrap)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from carim_aug.labels.base import LabelError
from carim_aug.labels.discover import labels_without_images, name_classes, same_label
from carim_aug.labels.sample import check_images, plain_images
from carim_aug.transforms.apply import Applier, Placed, sizes_of
from carim_aug.transforms.epochs import Passes, Visit
from carim_aug.transforms.plan import Decision, check_epoch
from carim_aug.transforms.settings import MixSettings

FORWARDED: tuple[str, ...] = (
    "classes",
    "class_to_idx",
    "class_names",
    "label_names",
    "features",
    "pathologies",
    "coco",
)
FORWARDED += ("targets", "labels", "samples", "imgs")
"""Attributes of the user's data set that a mixed one has too."""


class PlannedDataset(Dataset):
    """Real samples and what becomes of each; nothing is generated, so it needs no weights and no GPU.

    Items are (sample, decision). Indices from len(dataset) on are added samples, each with a real background. An index
    that does not know its epoch (`carim_aug.transforms.epochs.Visit`) is of the next one each time.

    Args:
        dataset: a map-style data set.
        settings: of the mix.
        epoch: shared-memory tensor, int64 (2,), so that persistent workers see it: the epoch, and how often it was set.
        enabled: shared-memory tensor, bool scalar.

    Raises:
        TypeError, ValueError: no map-style data set, an empty one, or one whose labels do not fit.
    """

    def __init__(self, dataset: Dataset, settings: MixSettings, *, epoch: Tensor, enabled: Tensor) -> None:
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not map_style:
            raise TypeError(
                f"dataset must be map-style (__getitem__ and __len__), got {type(dataset).__name__}: "
                "for a stream use mix(images, labels) on its batches"
            )
        self.dataset, self.settings, self.enabled = dataset, settings, enabled
        self._count = len(dataset)  # type: ignore[arg-type]
        if self._count == 0:
            raise ValueError("dataset must hold at least one sample, got 0")

        # Infer layout and labels from the first sample.
        with keep_random_states():  # the user's transforms may draw
            first = dataset[0]
        self.layout = settings.layout_of(first)
        image, label = self.layout.get(first)
        check_images(image, batch=False)
        named = name_classes(settings.labels, dataset, label, self.layout.label)
        self.policy = named.resolve(label, batch=False)
        self.policy.check(label, batch=False)
        settings.check_normal(self.policy)
        self.planner = settings.planner(self.policy)

        # Labels that lie beside the images, if the samples agree with them.
        self._classes: list[str] | None = None
        self._labels: Any = None
        self._anything = settings.takes_anything(self.policy)
        found = labels_without_images(dataset, self.layout.label)
        if found is not None:
            self._classes = self._trust(found, label)
            if self._classes is None and self.policy.kind == "integer" and named is not settings.labels:
                raise LabelError(
                    f"labels must be the data set's own targets for its class names {self.policy.classes} to hold, got "
                    "others from its samples: pass labels=LabelPolicy(classes=(...)) in the order of the labels"
                )

        # Samples to add, and their backgrounds.
        self._added: list[tuple[int, str]] = []  # (first index after them, class), in order
        self._backgrounds = np.zeros(0, dtype=np.int64)
        known = settings.insertion == "whole" and (self._classes is not None or settings.amount.adds)
        self._eligible_class = self._majority() if known else self.policy.normal
        if settings.amount.adds:
            counts = settings.amount.added(self.real_counts(), self.policy)
            if settings.insertion == "graft" and counts.get(self.policy.normal):
                raise ValueError(
                    f"insertion='graft' adds nodules to real images, so it cannot add {self.policy.normal!r}: "
                    "use insertion='whole'"
                )
            end = self._count
            for name, n in counts.items():
                end += n
                self._added.append((end, name))
            if self._added:
                self._backgrounds = self._find_backgrounds()

        self.passes = Passes(epoch, self._added[-1][0] if self._added else self._count)

    def __len__(self) -> int:
        return self._added[-1][0] if self._added and bool(self.enabled) else self._count

    @property
    def synthetic_enabled(self) -> bool:
        """Whether anything in it may be synthetic now."""
        return bool(self.enabled)

    @property
    def epoch(self) -> int:
        """The epoch that was set last."""
        return int(self.passes.start[0])

    def decide(self, key: tuple[int, ...], eligible: bool) -> Decision:
        """Return what becomes of the index in a key (seed, epoch, index, ...), without loading anything.

        `eligible` means nothing for added samples.
        """
        index = key[2]
        for end, name in self._added:
            if self._count <= index < end:
                decision = self.planner.add(key, name, self._backgrounds)
                if bool(self.enabled):
                    return decision
                return self.planner.decide(key, decision.background, eligible=False)
        return self.planner.decide(key, index, eligible=eligible and bool(self.enabled))

    def last_visit(self, index: int) -> Visit:
        """Return the visit of an index as it was last, or will be first."""
        index = self._check_index(index)
        return Visit.of(index, self.passes.last(index), 0)

    def __getitem__(self, index: int) -> tuple[Any, Decision]:
        visit = index
        if not isinstance(visit, Visit):
            index = self._check_index(int(index))
            visit = Visit.of(index, self.passes.enter(index), 0)
        key = visit.key(self.settings.seed)
        if self._check_index(visit) >= self._count:
            decision = self.decide(key, False)
            return self.dataset[decision.background], decision
        sample = self.dataset[int(visit)]
        label = self.layout.get(sample)[1]
        self.policy.check(label, batch=False)
        return sample, self.decide(key, self.eligible(label))

    def _check_index(self, index: int) -> int:
        """Return an index from the start, or raise IndexError."""
        number = int(index) + (len(self) if index < 0 else 0)
        end = len(self.passes.seen)  # not len: `enabled` may change in mid-epoch
        if not 0 <= number < end:
            raise IndexError(f"index must be in [0, {end}), got {index}")
        return number

    @property
    def real_count(self) -> int:
        """The number of samples of the user's data set."""
        return self._count

    @property
    def added(self) -> list[str]:
        """Classes of the samples that are added, in order."""
        ends = [(self._count, ""), *self._added]
        return [name for (start, _), (end, name) in pairwise(ends) for _ in range(end - start)]

    def eligible(self, label: Any) -> bool:
        """Return whether a real sample with this label may be replaced."""
        if self.settings.eligible is not None:
            return bool(self.settings.eligible(label))
        return self._anything or self.policy.class_of(label) == self._eligible_class

    def real_counts(self) -> dict[str, int]:
        """Return the number of real samples per class, loading all of them once if labels are nowhere else."""
        classes = self._all_classes()
        names = dict.fromkeys([self.policy.normal, self.policy.nodule, *sorted(set(classes))])
        return {name: classes.count(name) for name in names}

    def class_counts(self, epoch: int | None = None) -> dict[str, dict[str, int]]:
        """Return {"real", "synthetic", "total"} samples per class of an epoch, before anything is generated.

        A grafted image counts as synthetic. The epoch is the one that was set last by default.
        """
        epoch = self.epoch if epoch is None else epoch
        counts = {name: {"real": n, "synthetic": 0, "total": 0} for name, n in self.real_counts().items()}
        if bool(self.enabled):
            start = self._count
            for end, name in self._added:
                counts[name]["synthetic"] += end - start
                start = end
            if self.planner.active:
                for index, (name, allowed) in enumerate(zip(self._all_classes(), self._all_eligible(), strict=True)):
                    decision = self.decide((self.settings.seed, epoch, index), allowed)
                    if decision.class_name is not None:
                        counts[name]["real"] -= 1
                        counts[decision.class_name]["synthetic"] += 1
        for row in counts.values():
            row["total"] = row["real"] + row["synthetic"]
        return counts

    # --- Labels of all samples ---
    def _all_classes(self) -> list[str]:
        if self._classes is None or (self.settings.eligible is not None and self._labels is None):
            with keep_random_states():
                bar = tqdm(range(self._count), desc="reading labels", unit="image")
                self._classes = self._classes_of([self.layout.get(self.dataset[i])[1] for i in bar])
        return self._classes

    def _all_eligible(self) -> list[bool]:
        classes, eligible = self._all_classes(), self.settings.eligible
        if eligible is not None:
            return [bool(eligible(self._labels[i])) for i in range(self._count)]
        return [self._anything or name == self._eligible_class for name in classes]

    def _trust(self, found: Any, first: Any) -> list[str] | None:
        """Return classes of labels found beside the images, if the first sample of each class has its label there."""
        if not same_label(found[0], first):
            return None
        try:
            classes = self._classes_of(found)
        except LabelError:
            self._labels = None
            return None
        firsts = {name: i for i, name in reversed(list(enumerate(classes)))}.values()
        with keep_random_states():
            for i in sorted({*firsts, self._count - 1} - {0}):
                if not same_label(found[i], self.layout.get(self.dataset[i])[1]):
                    self._labels = None
                    return None
        return classes

    def _classes_of(self, labels: Any) -> list[str]:
        self._labels = labels
        if isinstance(labels, Tensor | np.ndarray) and len(labels) == self._count:
            self.policy.check(labels)
            return self.policy.classes_of(labels)
        return [self.policy.class_of(label) for label in labels]

    def _majority(self) -> str:
        counts = self.real_counts()
        return self.policy.nodule if counts[self.policy.nodule] > counts[self.policy.normal] else self.policy.normal

    def _find_backgrounds(self) -> np.ndarray:
        classes = self._all_classes()
        backgrounds = [i for i, allowed in enumerate(self._all_eligible()) if allowed]
        if self.settings.insertion == "graft" and not self._anything:
            backgrounds = [i for i in backgrounds if classes[i] != self.policy.nodule]
            backgrounds = backgrounds or [i for i, name in enumerate(classes) if name == self.policy.normal]
        if not backgrounds:
            raise ValueError(f"dataset must have samples that may be backgrounds, got classes {self.real_counts()}")
        return np.asarray(backgrounds, dtype=np.int64)


class MixedDataset(Dataset):
    """The data set that `mix.wrap` returns: each item as the user's own, some of them synthetic.

    An index that is asked for again is in the next epoch, whichever worker asks; `set_epoch` says which it is. On
    several ranks it must be called.
    """

    def __init__(self, planned: PlannedDataset, applier: Applier, mix: Any) -> None:
        self.planned, self.applier, self.mix = planned, applier, mix

    @property
    def dataset(self) -> Dataset:
        """The user's own data set."""
        return self.planned.dataset

    @property
    def synthetic_enabled(self) -> bool:
        """Whether anything in it may be synthetic now."""
        return bool(self.planned.enabled)

    def __getattr__(self, name: str) -> Any:
        if name == "planned":  # while it is being unpickled
            raise AttributeError(name)
        return inner_attribute(self.planned, name)

    def __len__(self) -> int:
        return len(self.planned)

    def __getitem__(self, index: int) -> Any:
        sample, placed, pixels = self._place(index)
        if not placed.decisions[0].synthetic:
            return sample
        layout, policy, sizes = self.planned.layout, self.planned.policy, sizes_of(pixels[None])
        label = layout.get(sample)[1]
        policy.check(label, batch=False, sizes=sizes)
        mixed = self.applier.pixels(pixels[None], placed)[0][0]
        change = self.applier.change(0, placed.decisions[0], sizes[0])
        return layout.put(sample, mixed, policy.format.change_one(label, change))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def decision(self, index: int) -> Decision:
        """Return the decision for an index as it was asked for last, or will be first (loads the background)."""
        return self._place(self.planned.last_visit(index))[1].decisions[0]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of all that this mix has wrapped; workers that are alive see it."""
        self.planned.passes.set_epoch(check_epoch(epoch))

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Return `PlannedDataset.class_counts` of the epoch that was set last."""
        return self.planned.class_counts()

    def _place(self, index: int) -> tuple[Any, Placed, Tensor]:
        sample, decision = self.planned[index]
        image, label = self.planned.layout.get(sample)
        check_images(image, batch=False)
        pixels = plain_images(image)
        self.applier.settings.value_range.check(pixels, "image")
        taken = self.planned.policy.boxes_of([label]) if decision.synthetic else None
        return sample, self.applier.place(pixels[None], [decision], self.planned.planner, taken), pixels


def inner_attribute(mixed: PlannedDataset, name: str) -> Any:
    """Return an attribute of the user's data set that holds for the mixed one too.

    `targets` and `labels` are those of the real samples, before any graft, and of the added ones.

    Raises:
        AttributeError: there is none, or it describes the real samples alone.
    """
    value = getattr(mixed.dataset, name) if name in FORWARDED else None
    if value is None:
        raise AttributeError(f"a mixed data set has no attribute {name!r}")
    if not mixed.added or name not in ("targets", "labels", "samples", "imgs") or len(value) != mixed.real_count:
        return value
    if name in ("samples", "imgs") or mixed.policy.kind != "integer":
        raise AttributeError(
            f"{name} of the real samples are those of the data set inside (.dataset); for tables of the synthetic ones "
            "too use carim_aug.integrations.torchxrayvision.MixDataset, or class_counts()"
        )
    more = [(mixed.policy.classes or ()).index(name) for name in mixed.added]
    if isinstance(value, Tensor):
        return torch.cat([value, value.new_tensor(more)])
    return np.concatenate([value, more]) if isinstance(value, np.ndarray) else [*value, *more]


@contextmanager
def keep_random_states() -> Iterator[None]:
    """Put the global random states back: reading a sample here must not move what a user's transforms draw from."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
