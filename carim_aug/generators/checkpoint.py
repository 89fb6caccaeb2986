"""Files of weights: found in a folder, the package or the hub, read without unpickling, checked against what they say.

What a file says of itself (architecture, value range, training data, recipe, git commit) is checked on loading, and so
is a SHA-256 of its tensors and texts: safetensors does not notice a flipped bit (EVIDENCE).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from carim_aug.generators.multiscale import GeneratorConfig, MultiScaleGenerator
from carim_aug.ops.sealed import digest, read_sealed

BUNDLED = Path(__file__).parents[1] / "weights"
FILE, CONFIG, PRIOR = "model.safetensors", "config.json", "prior.safetensors"
FORMAT, FORMAT_VERSION = "carim_aug.generator", 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADVICE = "download or export it again"


class WeightsError(ValueError):
    """Weights that cannot be used; the message says what is wrong and what to do."""


def fetch(
    name_or_path: str | Path | None,
    filename: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """Gives the path of one file of some weights, from a folder, the hub (or its cache), or the package.

    Args:
        name_or_path: a folder, or a hub id; None: the bundled weights.
        filename: of the file in it.
        revision: see `NoduleGenerator.from_pretrained`, as the rest.
        local_files_only: as there.
        cache_dir: as there.
        token: as there.
        force_download: as there.

    Raises:
        WeightsError: there is no such folder, file or repository, or the hub cannot be reached.
    """
    folder = BUNDLED if name_or_path is None else Path(name_or_path)
    if folder.is_file():
        raise WeightsError(f"{folder} is a file: give the folder that holds {filename}")
    if folder.is_dir():
        path = folder / filename
        if path.is_file():
            return path
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles and filename == FILE:
            raise WeightsError(
                f"{folder} holds {pickles[0]}, a pickle, which is never loaded here: "
                f"save with NoduleGenerator.save_pretrained to get {filename}"
            )
        raise WeightsError(f"{folder} has no {filename}: {_remedy(filename)}")
    name = str(name_or_path)
    if folder.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise WeightsError(f"there is no folder {name}: give an existing folder or a hub id such as 'user/name'")
    try:
        return Path(
            hf_hub_download(
                name,
                filename,
                revision=revision,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
            )
        )
    except HFValidationError as error:
        raise WeightsError(f"{name!r} is neither a folder nor a hub id such as 'user/name': {error}") from error
    except LocalEntryNotFoundError as error:  # one of the next ones, so it comes first
        raise WeightsError(
            f"{name}: {filename} is not in the local cache and the hub was not asked or not reached: "
            "go online once, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"{name} has no {filename} at revision {revision!r}: {_remedy(filename)}") from error
    except Exception as error:  # the client's HTTP library differs between versions, and so do its exceptions
        raise WeightsError(
            f"{name}: {filename} cannot be had from the hub at revision {revision!r}: {error}"
        ) from error


def fetch_beside(name_or_path: str | Path | None, filename: str, **where: Any) -> Path | None:
    """Gives the path of a file that may lie beside the weights, or None where there is none.

    Args:
        name_or_path: as in `fetch`.
        filename: of the file.
        where: revision and the rest, as in `fetch`.

    Raises:
        WeightsError: the hub cannot be reached.
    """
    try:
        return fetch(name_or_path, filename, **where)
    except WeightsError as error:
        if error.__cause__ is None or isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def _remedy(filename: str) -> str:
    if filename == PRIOR:
        return (
            "pass prior=LocationPrior.bundled() or a prior of your own, or save both with "
            "SyntheticNoduleMix.save_pretrained or NoduleGenerator.save_pretrained(..., prior=...)"
        )
    return "give a folder or repository that NoduleGenerator.save_pretrained or push_to_hub wrote"


def read_weights(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Gives arrays and texts of a file of weights that is whole and ours.

    Raises:
        WeightsError: a pickle, damaged, cut off, of another format or a newer version, or changed since it was sealed.
    """
    # A safetensors file starts with the length of its header, whose bytes may look like a pickle's first ones: a pickle
    # is what starts like one, and cannot have a header of that length.
    with path.open("rb") as file:
        start = file.read(8)
    like_pickle = start[:4] == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )
    if like_pickle and int.from_bytes(start, "little") > path.stat().st_size:
        raise WeightsError(
            f"{path} is a pickle under a wrong name, which is never loaded here: {ADVICE} as safetensors"
        )
    try:
        arrays, texts, sealed = read_sealed(path)
    except ValueError as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}): {ADVICE}") from error
    if texts.get("format") != FORMAT:
        raise WeightsError(
            f"{path} must be of format {FORMAT!r}, got {texts.get('format')!r}: it holds something else, or is damaged"
        )
    number = texts.get("format_version", "")
    if not number.isdecimal() or int(number) > FORMAT_VERSION:
        raise WeightsError(f"{path} is of format version {number!r}, newer than {FORMAT_VERSION}: upgrade carim-aug")
    if not sealed or texts.get("tensors_sha256") != digest(arrays, {}):
        raise WeightsError(f"{path} does not match its own SHA-256, so something in it has changed: {ADVICE}")
    return arrays, texts


def architecture(path: Path, texts: Mapping[str, str]) -> GeneratorConfig:
    """Gives the architecture that the texts of a file tell of.

    Raises:
        WeightsError: no architecture, value range or provenance in them, or another value range than ours.
    """
    try:
        config = GeneratorConfig(**json.loads(texts["architecture"]))
        value_range = tuple(json.loads(texts["value_range"]))
        known = isinstance(json.loads(texts["provenance"]), dict)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not say what it holds and where it is from ({error}): {ADVICE}") from error
    if not known:
        raise WeightsError(f"{path} must have a JSON object as its provenance, got {texts['provenance']}: {ADVICE}")
    if value_range != MultiScaleGenerator.value_range:
        raise WeightsError(f"{path} must have the value range {MultiScaleGenerator.value_range}, got {value_range}")
    return config


def check_config(path: Path, config: GeneratorConfig) -> None:
    """Nothing, if the JSON beside the weights tells of the same architecture; WeightsError otherwise."""
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}): {ADVICE}") from error
    if described != config.to_dict():
        raise WeightsError(f"{path} describes another architecture than the weights beside it: {ADVICE}")


def check_names(path: Path, arrays: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Nothing, if the arrays have the names, types and shapes of the tensors; WeightsError otherwise."""
    missing, more = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
    if missing:
        raise WeightsError(f"{path} lacks {len(missing)} tensors, the first {missing[0]!r}: {ADVICE}")
    if more:
        raise WeightsError(f"{path} has {len(more)} unexpected tensors, the first {more[0]!r}: {ADVICE}")
    for name, tensor in wanted.items():
        got, kind = arrays[name], str(tensor.dtype).removeprefix("torch.")
        if got.shape != tuple(tensor.shape) or got.dtype != kind:
            raise WeightsError(
                f"{path}: {name!r} must be {kind} of shape {tuple(tensor.shape)}, "
                f"got {got.dtype} of {got.shape}: {ADVICE}"
            )


def check_finite(arrays: Mapping[str, np.ndarray[Any, Any]], where: str, advice: str) -> None:
    """Nothing, if all floating-point arrays are finite; WeightsError otherwise."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WeightsError(f"{where}: {name!r} must be finite, got NaN or infinity: {advice}")
