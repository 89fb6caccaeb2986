"""Sealed arrays: a safetensors file that carries a SHA-256 of its arrays and texts, and says so when a bit has flipped.

safetensors itself loads a damaged file without a word; here every name, type, shape, value and text is in the digest.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

Arrays = dict[str, np.ndarray[Any, Any]]


def write_sealed(path: str | Path, arrays: Mapping[str, np.ndarray[Any, Any]], texts: Mapping[str, str]) -> None:
    """Write arrays and texts (any keys but "sha256") to a safetensors file, texts and digest in its metadata."""
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    Path(path).write_bytes(save(whole, {**texts, "sha256": digest(whole, texts)}))


def read_sealed(path: str | Path) -> tuple[Arrays, dict[str, str], bool]:
    """Read a file of `write_sealed`: its arrays, its texts, and whether its digest fits them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no readable safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file, got {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            texts = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"not a readable safetensors file ({error})") from error
    sealed = texts.pop("sha256", None)
    return arrays, texts, sealed == digest(arrays, texts)


def digest(arrays: Mapping[str, np.ndarray[Any, Any]], texts: Mapping[str, str]) -> str:
    """Return the SHA-256, as hex, of all arrays (name, type, shape, bytes) and texts, whatever their order."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(f"{name!r}{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    for key, text in sorted(texts.items()):
        sha.update(f"{key!r}{text!r}".encode())
    return sha.hexdigest()
