"""Weights in files of at most 16 MB: one where they fit, else several with an index, as the Hugging Face hub has them.

A tensor that is larger than a file is cut along its first axis, its rows named as in "stem.weight[0:512]". Every file
is sealed by itself, so that a damaged one is named, and all of them know the digest of the whole, so that they belong
together. The digest of the joined tensors is that of weights saved in one file.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import EntryNotFoundError

from carim_aug.generators.checkpoint import ADVICE, FILE, WeightsError, fetch, read_weights
from carim_aug.ops.sealed import digest, write_sealed

INDEX = f"{FILE}.index.json"
FILES = (FILE, INDEX, f"{Path(FILE).stem}-*-of-*.safetensors")
"""Patterns of all files that weights may be in."""

LARGEST = 16_000_000
"""Most bytes of a file."""

Array = np.ndarray[Any, Any]
_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]")


def write_weights(folder: Path, arrays: Mapping[str, Array], texts: Mapping[str, str]) -> None:
    """Writes weights as one file, or as several with an index if they are larger than `LARGEST`.

    Every file is written aside and moved into place, the index last; what the other form left there goes after that.

    Args:
        folder: must be there.
        arrays: by name.
        texts: the same in every file, among them "tensors_sha256", the digest of all arrays.
    """
    former = {path for path in folder.glob(f"{Path(FILE).stem}-*-of-*.safetensors")}
    if sum(array.nbytes for array in arrays.values()) + len(json.dumps(dict(texts))) <= LARGEST:
        _replace(folder / FILE, lambda part: write_sealed(part, arrays, texts))
        stale = {folder / INDEX, *former}
    else:
        room = LARGEST - 200 * len(arrays) - len(json.dumps(dict(texts))) * 2  # for a file's header
        pieces = _cut(arrays, room)
        split = split_state_dict_into_shards_factory(
            pieces,
            get_storage_size=lambda array: array.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=room,
        )
        for name, keys in split.filename_to_tensors.items():
            part = {key: pieces[key] for key in keys}
            told = {**texts, "tensors_sha256": digest(part, {}), "whole_sha256": texts["tensors_sha256"]}
            _replace(folder / name, lambda path, part=part, told=told: write_sealed(path, part, told))  # type: ignore[misc]
        index = {
            "metadata": {**split.metadata, "tensors_sha256": texts["tensors_sha256"]},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2) + "\n"
        _replace(folder / INDEX, lambda path: path.write_text(text))
        stale = {folder / FILE, *former} - {folder / name for name in split.filename_to_tensors}
    for path in stale:
        path.unlink(missing_ok=True)


def fetch_weights(name_or_path: str | Path | None, **where: Any) -> tuple[Path, dict[str, Array], dict[str, str]]:
    """Gives path, arrays and texts of some weights, in one file or several.

    Args:
        name_or_path: as in `carim_aug.generators.checkpoint.fetch`.
        where: revision and the rest, as there.

    Raises:
        WeightsError: missing, damaged or of another format.
    """
    try:
        path = fetch(name_or_path, FILE, **where)
    except WeightsError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, EntryNotFoundError):
            raise
        try:
            index = fetch(name_or_path, INDEX, **where)
        except WeightsError:
            raise error from error.__cause__
        return index, *read_shards(index, lambda name: fetch(name_or_path, name, **where))
    return path, *read_weights(path)


def read_shards(index: Path, fetched: Callable[[str], Path]) -> tuple[dict[str, Array], dict[str, str]]:
    """Gives arrays and texts of weights in several files, joined again.

    Args:
        index: the index's file.
        fetched: gives the path of a file by its name.

    Raises:
        WeightsError: the index or a file is missing or damaged, or they are not of one and the same weights.
    """
    try:
        told = json.loads(index.read_text())
        places, whole = dict(told["weight_map"]), str(told["metadata"]["tensors_sha256"])
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"files must be named without a folder, got {names}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is no index of weights ({error}): {ADVICE}") from error
    pieces: dict[str, Array] = {}
    texts: dict[str, str] = {}
    for name in names:
        path = fetched(name)
        part, texts = read_weights(path)
        if texts.pop("whole_sha256", None) != whole:
            raise WeightsError(f"{path} is of other weights than {index.name} beside it: {ADVICE}")
        wanted = {key for key, place in places.items() if place == name}
        if part.keys() != wanted:
            raise WeightsError(f"{path} must hold {len(wanted)} tensors, got {len(part)}: {ADVICE}")
        pieces |= part
    arrays = _joined(pieces)
    if digest(arrays, {}) != whole:
        raise WeightsError(f"the files of {index} do not match its SHA-256 together: {ADVICE}")
    return arrays, {**texts, "tensors_sha256": whole}


def _cut(arrays: Mapping[str, Array], room: int) -> dict[str, Array]:
    """The same arrays, those larger than `room` bytes as pieces of rows."""
    pieces: dict[str, Array] = {}
    for name, array in arrays.items():
        if array.nbytes <= room:
            pieces[name] = array
            continue
        rows = max(room // (array.nbytes // len(array)), 1)
        for start in range(0, len(array), rows):
            stop = min(start + rows, len(array))
            pieces[f"{name}[{start}:{stop}]"] = array[start:stop]
    return pieces


def _joined(pieces: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of which `_cut` made pieces."""
    arrays: dict[str, Array] = {}
    cut: dict[str, list[tuple[int, Array]]] = {}
    for key, piece in pieces.items():
        if (found := _ROWS.fullmatch(key)) is not None:
            cut.setdefault(found[1], []).append((int(found[2]), piece))
        else:
            arrays[key] = piece
    for name, parts in cut.items():
        arrays[name] = np.concatenate([piece for _, piece in sorted(parts, key=lambda part: part[0])])
    return arrays


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    # Written aside and moved into place: a save that is cut off leaves the former file whole.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
