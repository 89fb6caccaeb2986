"""A guard for validation and test sets: nothing synthetic may be in them (DESIGN 2)."""

from typing import Any

from torch.utils.data import DataLoader

from carim_aug.loader import MixLoader
from carim_aug.mix import SyntheticNoduleMix
from carim_aug.wrapped import MixedDataset, PlannedDataset

_INNER = ("dataset", "datasets", "loader", "transform", "transforms", "target_transform", "collate_fn")


class SyntheticDataError(ValueError):
    """Synthetic samples where only real ones may be."""


def assert_real_only(data: Any) -> None:
    """Does nothing if a data set or loader gives real samples only.

    Looks into Subset, ConcatDataset, DataLoader and transforms; what a custom class hides elsewhere it cannot see.

    Args:
        data: a data set, loader, transform or list of them.

    Raises:
        SyntheticDataError: somewhere in it an enabled SyntheticNoduleMix is at work; it says where.
    """
    _walk(data, type(data).__name__, set())


def _walk(thing: Any, path: str, seen: set[int]) -> None:
    if thing is None or isinstance(thing, str | bytes | int | float) or id(thing) in seen:
        return
    seen.add(id(thing))
    enabled = False
    if isinstance(thing, SyntheticNoduleMix):
        enabled = thing.enabled
    elif isinstance(thing, MixLoader):
        enabled = bool(thing.dataset.enabled)
    elif isinstance(thing, MixedDataset):
        enabled = bool(thing.planned.enabled)
    elif isinstance(thing, PlannedDataset):
        enabled = bool(thing.enabled)
    if enabled:
        raise SyntheticDataError(
            f"data must be real only, got synthetic nodules at {path}: evaluate on the data set itself, "
            "or set mix.enabled = False"
        )
    if isinstance(thing, list | tuple):
        for i, part in enumerate(thing):
            _walk(part, f"{path}[{i}]", seen)
        return
    names = ("dataset", "collate_fn") if isinstance(thing, DataLoader) else _INNER
    for name in names:
        inner = getattr(thing, name, None)
        if inner is not None:
            _walk(inner, f"{path}.{name}", seen)
