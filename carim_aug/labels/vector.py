"""Values of labels, numbers and arrays and tensors alike: looked at, and copied with other entries."""

from typing import Any

import numpy as np
import torch

ROW_SUM = 1e-2
"""How far from 1 a one-hot or soft row may sum up: float16 rows of many classes."""


class LabelError(ValueError):
    """A label, or a class name, that does not fit the policy."""


def as_array(label: Any) -> np.ndarray:
    """A label as a numpy array of integers, booleans or floats, to look at only."""
    if isinstance(label, torch.Tensor):
        label = label.detach().cpu()
        array = (label.float() if label.dtype == torch.bfloat16 else label).numpy()
    elif isinstance(label, np.ndarray | np.generic | int | float):
        array = np.asarray(label)
    else:
        raise LabelError(f"labels must be numbers, arrays or tensors, got {label!r} ({type(label).__name__})")
    if array.dtype.kind not in "iubf":
        raise LabelError(f"labels must be integers or floating point, got {array.dtype}")
    return array


def filled(label: Any, value: int) -> Any:
    """A label like this one, ``value`` everywhere."""
    if isinstance(label, torch.Tensor):
        return torch.full_like(label, value)
    if isinstance(label, np.ndarray):
        return np.full_like(label, value)
    return type(label)(value)


def emptied(label: Any) -> Any:
    """A label like this one, 0 everywhere but where it is NaN."""
    if isinstance(label, torch.Tensor):
        zeros = torch.zeros_like(label)
        return zeros.masked_fill(label.isnan(), torch.nan) if label.is_floating_point() else zeros
    if isinstance(label, np.ndarray):
        return np.where(np.isnan(label), label, np.zeros_like(label))
    return label


def with_columns(label: Any, columns: dict[int, int], count: int) -> Any:
    """A copy of the label, which has ``count`` columns, with these set."""
    if not isinstance(label, torch.Tensor | np.ndarray) or label.ndim == 0 or label.shape[-1] != count:
        raise LabelError(f"labels must have {count} columns, got {label!r}")
    copied = label.clone() if isinstance(label, torch.Tensor) else label.copy()
    for column, value in columns.items():
        copied[..., column] = value
    return copied


def sum_to_one(array: np.ndarray) -> np.ndarray:
    """Which rows sum to 1."""
    return np.abs(array.sum(-1, dtype=np.float64) - 1) < ROW_SUM


def description(label: Any, array: np.ndarray) -> str:
    """A label in words: shape and dtype, or the number itself."""
    dtype = label.dtype if isinstance(label, torch.Tensor) else array.dtype
    return f"{tuple(array.shape)} {dtype}" if array.ndim else f"{label!r}"


def wanted(batch: bool | None) -> str:
    """The shapes that labels may have, in words."""
    return {True: "(B,) or (B, C)", False: "a number or (C,)", None: "a number, (B,), (C,) or (B, C)"}[batch]
