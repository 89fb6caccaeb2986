"""A guard for validation and test sets: nothing synthetic may be in them."""

import os
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from torch.utils.data import DataLoader

from carim_aug.data.provenance import export_over

_ROOTS = ("root", "imgpath")  # of most data sets, and of torchxrayvision's
_INNER = ("dataset", "datasets", "loader", "transform", "transforms", "target_transform", "collate_fn")


class SyntheticDataError(ValueError):
    """Synthetic samples where only real ones may be."""


def assert_real_only(data: Any) -> None:
    """Do nothing if a data set or loader gives real samples only.

    Looks into Subset, ConcatDataset, DataLoader, transforms, attributes, and the variables that a function such as a
    collate_fn uses, for what has an attribute `synthetic_enabled`; and at the folder of a data set's `root` or `paths`,
    which may be a `carim-aug export`. What is hidden deeper it cannot see.

    Args:
        data: a data set, loader, transform or list of them.

    Raises:
        SyntheticDataError: somewhere in it an enabled SyntheticNoduleMix is at work, or an exported folder is read; it
            says where.
    """
    _walk(data, type(data).__name__, set())


def _walk(thing: Any, path: str, seen: set[int]) -> None:
    if thing is None or isinstance(thing, str | bytes | int | float) or id(thing) in seen:
        return
    seen.add(id(thing))
    if _mixes(thing) and thing.synthetic_enabled:
        raise SyntheticDataError(
            f"data must be real only, got synthetic nodules at {path}: evaluate on the data set itself, "
            "or set mix.enabled = False"
        )
    exported = export_over(_folders(thing))
    if exported is not None:
        raise SyntheticDataError(
            f"data must be real only, got the exported synthetic images of {exported} at {path}: evaluate on real "
            "images"
        )
    if isinstance(thing, list | tuple):
        for i, part in enumerate(thing):
            _walk(part, f"{path}[{i}]", seen)
        return
    for name, part in _variables(thing).items():
        if _mixes(part):
            _walk(part, f"{path}.{name}", seen)
    for name in ("dataset", "collate_fn") if isinstance(thing, DataLoader) else _INNER:
        inner = getattr(thing, name, None)
        if inner is not None:
            _walk(inner, f"{path}.{name}", seen)


def _mixes(thing: Any) -> bool:
    """Return whether a thing's class says that it mixes: not asked of the thing, which may answer to any name."""
    return hasattr(type(thing), "synthetic_enabled")


def _folders(thing: Any) -> list[str | Path]:
    """Return the folders that a data set says it reads."""
    paths = getattr(thing, "paths", ())
    files = [path for path in paths if isinstance(path, str | Path)] if isinstance(paths, list | tuple) else []
    roots = [root for root in (getattr(thing, name, None) for name in _ROOTS) if isinstance(root, str | Path)]
    return [*roots, *{os.path.dirname(path): None for path in files}]


def _variables(thing: Any) -> dict[str, Any]:
    """Return what an object holds by name: attributes, or the variables and bound arguments of a function."""
    if isinstance(thing, partial):
        return {**_variables(thing.func), **dict(zip(map(str, range(len(thing.args))), thing.args, strict=True))}
    if not isinstance(thing, FunctionType):
        return getattr(thing, "__dict__", {})
    code, cells = thing.__code__, thing.__closure__ or ()
    used = {name: thing.__globals__[name] for name in code.co_names if name in thing.__globals__}
    inner = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True) if _is_set(cell)}
    return used | inner


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is assigned later
        return False
