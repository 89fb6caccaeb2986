"""A data set with synthetic samples in it: decisions keyed by index, rendered later (loader) or per item (wrap)."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from tqdm import tqdm

from carim_aug.labels.detection import instances, is_target
from carim_aug.labels.policy import LabelError, LabelPolicy
from carim_aug.labels.sample import Layout, check_images, plain_images
from carim_aug.location.prior import LocationPrior
from carim_aug.transforms.amounts import added_counts, chances_of
from carim_aug.transforms.apply import Filler, Settled, sizes_of
from carim_aug.transforms.graft import relabel_one
from carim_aug.transforms.plan import Planner, Slot, check_epoch


class PlannedDataset(Dataset):
    """Real samples and what becomes of each; nothing is generated, so it needs no weights and no GPU.

    Items are (sample, slot). Indices from len(dataset) on are added slots, each with a real host.

    Args:
        dataset: a map-style data set.
        prior: where nodules are drawn.
        seed: of all decisions.
        p: chance, or class to chance, of eligible slots, or a function of the epoch that gives such; None: none.
        policy: of the labels; takes the class names that the data set brings along.
        layout: where image and label sit, see `Layout.of`.
        insertion: "whole" or "graft".
        strength: least and most strength of a graft.
        eligible: which labels may be replaced; None: the larger of the normal and the nodule class where labels can be
            counted without loading images, else the normal class; all where boxes are grafted in.
        n_synthetic: class to number added.
        sampling_strategy: see `carim_aug.transforms.amounts.added_counts`.
        epoch: shared-memory tensor, int64 scalar, so that persistent workers see it.
        enabled: shared-memory tensor, bool scalar.
    """

    def __init__(
        self,
        dataset: Dataset,
        prior: LocationPrior,
        *,
        seed: int,
        p: Any,
        policy: LabelPolicy,
        layout: Any,
        insertion: str,
        strength: tuple[float, float],
        eligible: Callable[[Any], bool] | None,
        n_synthetic: Mapping[str, int] | None,
        sampling_strategy: Any,
        epoch: Tensor,
        enabled: Tensor,
    ) -> None:
        """Reads the labels if they are needed."""
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not map_style:
            raise TypeError(
                f"dataset must be map-style (__getitem__ and __len__), got {type(dataset).__name__}: "
                "for a stream use mix(images, labels) on its batches"
            )
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("dataset must hold at least one sample, got 0")
        self.dataset, self.insertion = dataset, insertion
        self.epoch, self.enabled = epoch, enabled
        self._count = len(dataset)  # type: ignore[arg-type]

        # Settle layout and labels on the first sample.
        with random_states_kept():  # the user's transforms may draw
            first = dataset[0]
        self.layout = Layout.of(first, layout)
        image, label = self.layout.get(first)
        check_images(image, batch=False)
        told = named(policy, dataset, label)
        check_order(told, self.layout, label)
        self.policy = told.resolve(label, batch=False)
        self.policy.check(label, batch=False)
        chances = chances_of(p, self.policy)
        self.planner = Planner(prior, seed=seed, nodule=self.policy.nodule, chances=chances, strength=strength)
        self._classes: list[str] | None = None
        self._labels: Any = None
        self._eligible = eligible
        self._anything = takes_anything(self.policy, insertion)
        found = labels_without_images(dataset)
        if found is not None:
            self._classes = self._trusted(found, label)
            if self._classes is None and self.policy.kind == "integer" and told is not policy:
                raise LabelError(
                    f"labels must be the data set's own targets for its class names {self.policy.classes} to hold, got "
                    "others from its samples: pass labels=LabelPolicy(classes=(...)) in the order of the labels"
                )
        self._eligible_class = self._majority() if self._classes is not None else self.policy.normal

        # Slots to add, and who hosts them.
        self._added: list[tuple[int, str]] = []  # (first index after them, class), in order
        self._hosts = np.zeros(0, dtype=np.int64)
        if n_synthetic is not None or sampling_strategy is not None:
            self._eligible_class = self._majority()
            counts = added_counts(
                self.real_counts(), self.policy, n_synthetic=n_synthetic, sampling_strategy=sampling_strategy
            )
            if insertion == "graft" and counts.get(self.policy.normal):
                raise ValueError(
                    f"insertion='graft' adds nodules to real images, so it cannot add {self.policy.normal!r}: "
                    "use insertion='whole'"
                )
            end = self._count
            for name, n in counts.items():
                end += n
                self._added.append((end, name))
            if self._added:
                self._hosts = self._find_hosts()

    def __len__(self) -> int:
        """Real samples, and added slots while the mix is enabled."""
        return self._added[-1][0] if self._added and bool(self.enabled) else self._count

    def with_epoch(self, epoch: Tensor) -> "PlannedDataset":
        """Gives the same decisions with an epoch of their own (see the class); nothing is read again."""
        other = copy.copy(self)
        other.epoch = epoch
        return other

    def slot(self, index: int, eligible: bool, epoch: int | None = None) -> Slot:
        """Gives the fate of an index, without loading anything.

        Args:
            index: 0 to len - 1.
            eligible: whether the real sample there may be replaced; means nothing for added slots.
            epoch: the current one by default.
        """
        key = (self.planner.seed, int(self.epoch) if epoch is None else epoch, index)
        for end, name in self._added:
            if self._count <= index < end:
                slot = self.planner.add(key, name, self._hosts)
                return slot if bool(self.enabled) else self.planner.decide(key, slot.host, eligible=False)
        return self.planner.decide(key, index, eligible=eligible and bool(self.enabled))

    def __getitem__(self, index: int) -> tuple[Any, Slot]:
        """Gives the host sample and the slot of an index."""
        index = int(index)
        if index < 0:
            index += len(self)
        end = self._added[-1][0] if self._added else self._count  # not len: `enabled` may change in mid-epoch
        if not 0 <= index < end:
            raise IndexError(f"index must be in [0, {end}), got {index}")
        if index >= self._count:
            slot = self.slot(index, False)
            return self.dataset[slot.host], slot
        sample = self.dataset[index]
        label = self.layout.get(sample)[1]
        self.policy.check(label, batch=False)
        return sample, self.slot(index, self.eligible(label))

    def __getattr__(self, name: str) -> Any:
        """Gives the names of the user's classes; of labels, says where the real ones are."""
        return passed_on(self, name)

    def eligible(self, label: Any) -> bool:
        """Says whether a real sample with this label may be replaced."""
        if self._eligible is not None:
            return bool(self._eligible(label))
        return self._anything or self.policy.class_of(label) == self._eligible_class

    def real_counts(self) -> dict[str, int]:
        """Gives the number of real samples per class, loading all of them once if labels are nowhere else."""
        classes = self._all_classes()
        names = dict.fromkeys([self.policy.normal, self.policy.nodule, *sorted(set(classes))])
        return {name: classes.count(name) for name in names}

    def class_counts(self, epoch: int | None = None) -> dict[str, dict[str, int]]:
        """Gives real, synthetic and total samples per class of an epoch, before anything is generated.

        Args:
            epoch: the current one by default.

        Returns:
            Class to {"real", "synthetic", "total"}; a grafted image counts as synthetic.
        """
        counts = {name: {"real": n, "synthetic": 0, "total": 0} for name, n in self.real_counts().items()}
        if bool(self.enabled):
            start = self._count
            for end, name in self._added:
                counts[name]["synthetic"] += end - start
                start = end
            if self.planner.active:
                for index, name in enumerate(self._all_classes()):
                    allowed = self._anything or name == self._eligible_class
                    allowed = self.eligible(self._labels[index]) if self._eligible else allowed
                    slot = self.slot(index, allowed, epoch)
                    if slot.class_name is not None:
                        counts[name]["real"] -= 1
                        counts[slot.class_name]["synthetic"] += 1
        for row in counts.values():
            row["total"] = row["real"] + row["synthetic"]
        return counts

    def _all_classes(self) -> list[str]:
        if self._classes is None or (self._eligible is not None and self._labels is None):
            with random_states_kept():
                bar = tqdm(range(self._count), desc="reading labels", unit="image")
                self._classes = self._classes_of([self.layout.get(self.dataset[i])[1] for i in bar])
        return self._classes

    def _trusted(self, found: Any, first: Any) -> list[str] | None:
        """Classes of labels found beside the images, if the first sample of each class has the label found for it."""
        if not same_label(found[0], first):
            return None
        try:
            classes = self._classes_of(found)
        except LabelError:
            self._labels = None
            return None
        firsts = {name: i for i, name in reversed(list(enumerate(classes)))}.values()
        with random_states_kept():
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

    def _find_hosts(self) -> np.ndarray:
        classes = self._all_classes()
        if self._eligible is not None:
            hosts = [i for i in range(self._count) if self._eligible(self._labels[i])]
        else:
            hosts = [i for i, name in enumerate(classes) if self._anything or name == self._eligible_class]
        if self.insertion == "graft" and not self._anything:
            hosts = [i for i in hosts if classes[i] != self.policy.nodule]
            hosts = hosts or [i for i, name in enumerate(classes) if name == self.policy.normal]
        if not hosts:
            raise ValueError(f"dataset has no sample that may host synthetic ones, got classes {self.real_counts()}")
        return np.asarray(hosts, dtype=np.int64)


class MixedDataset(Dataset):
    """The data set that `mix.wrap` gives: each item as the user's own, some of them synthetic.

    Args:
        planned: decisions.
        filler: of the slots, one at a time.
    """

    def __init__(self, planned: PlannedDataset, filler: Filler) -> None:
        """Keeps the parts."""
        self.planned, self.filler = planned, filler

    @property
    def dataset(self) -> Dataset:
        """The user's own data set."""
        return self.planned.dataset

    def __getattr__(self, name: str) -> Any:
        """As `PlannedDataset`."""
        return passed_on(self, name)

    def __len__(self) -> int:
        """As `PlannedDataset`."""
        return len(self.planned)

    def __getitem__(self, index: int) -> Any:
        """Gives the sample of an index, of the structure and types of the user's own."""
        sample, settled, pixels = self._settled(index)
        slot = settled.slots[0]
        if not slot.synthetic:
            return sample
        layout, policy = self.planned.layout, self.planned.policy
        label = layout.get(sample)[1]
        policy.check(label, batch=False, sizes=sizes_of(pixels[None]))
        mixed = self.filler.pixels(pixels[None], settled)[0][0]
        new = relabel_one(label, slot, sizes_of(pixels[None])[0], insertion=self.filler.insertion, policy=policy)
        return layout.put(sample, mixed, new)

    def __iter__(self) -> Iterator[Any]:
        """Gives the items in order."""
        return (self[i] for i in range(len(self)))

    def slot(self, index: int) -> Slot:
        """Gives the decision for an index in the current epoch (loads the host)."""
        return self._settled(index)[1].slots[0]

    def _settled(self, index: int) -> tuple[Any, Settled, Tensor]:
        sample, slot = self.planned[index]
        image = self.planned.layout.get(sample)[0]
        check_images(image, batch=False)
        pixels = plain_images(image)
        self.filler.value_range.check(pixels, "image")
        return sample, self.filler.settle(pixels[None], [slot], self.planned.planner), pixels

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of all that this mix has wrapped; workers that are alive see it."""
        self.planned.epoch.fill_(check_epoch(epoch))

    def class_counts(self) -> dict[str, dict[str, int]]:
        """As `PlannedDataset.class_counts`."""
        return self.planned.class_counts()


def takes_anything(policy: LabelPolicy, insertion: str) -> bool:
    """Says whether any sample may host: a graft adds a box to whatever boxes there are."""
    return policy.kind == "detection" and insertion == "graft"


def passed_on(mixed: Any, name: str) -> Any:
    """Gives an attribute of the user's data set that holds for the mixed one too.

    Raises:
        AttributeError: there is none, or it tells of the real samples alone.
    """
    if name in ("classes", "class_to_idx", "pathologies", "coco"):
        return getattr(mixed.dataset, name)
    if name in ("targets", "labels", "samples", "imgs"):
        raise AttributeError(
            f"{name} of the real samples are those of the data set inside (.dataset); for tables that tell of the "
            "synthetic ones too use carim_aug.integrations.torchxrayvision.MixDataset, or class_counts()"
        )
    raise AttributeError(f"{type(mixed).__name__!r} object has no attribute {name!r}")


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Puts the global random states back: reading a sample here must not move what a user's transforms draw from."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def named(policy: LabelPolicy, dataset: Any, label: Any) -> LabelPolicy:
    """Gives the policy with the class names of a data set, also of the parts of a `ConcatDataset`.

    Args:
        policy: the user's.
        dataset: may bring names along.
        label: one of its labels.

    Raises:
        LabelError: parts with different names.
    """
    if policy.classes is not None:
        return policy
    if isinstance(dataset, Subset):
        return named(policy, dataset.dataset, label)
    if not isinstance(dataset, ConcatDataset):
        return policy.named_by(dataset, label)
    policies = [named(policy, part, label) for part in dataset.datasets]
    names = dict.fromkeys(part.classes for part in policies)
    if len(names) > 1:
        raise LabelError(
            f"labels must be of one list of classes in all parts of a ConcatDataset, got {list(names)}: "
            "pass labels=LabelPolicy(classes=(...))"
        )
    return policies[0]


def check_order(policy: LabelPolicy, layout: Layout, label: Any) -> None:
    """Nothing, if the order of a label's columns is known or has one usual form.

    torchxrayvision's own data sets sort their columns by name, so 14 of them under its key "lab" are hardly in the
    official order of ChestX-ray14.

    Args:
        policy: of the labels, not yet resolved.
        layout: of the samples.
        label: one label or a batch.

    Raises:
        LabelError: 14 columns under "lab", and no class names given.
    """
    shape = getattr(label, "shape", ())
    if policy.classes is None and layout.is_dict and layout.label == "lab" and shape and shape[-1] == 14:
        raise LabelError(
            "labels must have named columns where they are torchxrayvision's 14 under 'lab', which it sorts, "
            f"got shape {tuple(shape)} and no names: pass labels=LabelPolicy('multilabel', classes=dataset.pathologies)"
        )


def labels_without_images(dataset: Any) -> Any:
    """Gives all labels of a data set without loading its images, from `targets` or `labels`; None if it has neither.

    Sees through `torch.utils.data.Subset` and `ConcatDataset`.
    """
    if isinstance(dataset, Subset):
        inner = labels_without_images(dataset.dataset)
        if inner is None:
            return None
        if isinstance(inner, Tensor | np.ndarray):
            return inner[list(dataset.indices)]
        return [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_without_images(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(dataset):
            return labels
    return None


def same_label(a: Any, b: Any) -> bool:
    """Says whether two labels of one sample are equal, NaN and all."""
    if is_target(a) and is_target(b):
        (boxes, numbers), (others, more) = instances(a), instances(b)
        return numbers == more and torch.equal(boxes, others)
    try:
        x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return x.shape == y.shape and bool(np.array_equal(x, y, equal_nan=True))
