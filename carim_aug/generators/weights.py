"""Files of weights: found in a folder, the package or the hub, read without unpickling, checked against their digest.

safetensors does not notice a flipped bit (150 of 150 loaded, silently wrong), so a file carries a SHA-256 of its
tensors and texts that loading checks (0.09 s for 65 MB).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from carim_aug.ops.sealed import digest, read_sealed

BUNDLED = Path(__file__).parents[1] / "weights"
FILE, CONFIG, PRIOR, CARD = "model.safetensors", "config.json", "prior.safetensors", "README.md"
INDEX = f"{FILE}.index.json"  # of weights in several files, as carim-aug 0.1 wrote large ones
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADVICE = "download or export it again"

Arrays = Mapping[str, np.ndarray[Any, Any]]

_NO_WEIGHTS = "give a folder or repository that NoduleGenerator.save_pretrained or push_to_hub wrote"
_NO_PRIOR = "pass prior=LocationPrior.bundled() or your own, or save both with SyntheticNoduleMix.save_pretrained"


class WeightsError(ValueError):
    """Weights that cannot be used; the message says what is wrong and what to do."""


class MissingError(WeightsError):
    """A folder, a repository or the cache without the file."""


def fetch(name_or_path: str | Path | None, filename: str, **where: Any) -> Path:
    """Return the path of one file of some weights, from a folder, the hub (or its cache), or the package.

    Args:
        name_or_path: a folder, or a hub id; None: the bundled weights.
        where: what `huggingface_hub.hf_hub_download` takes: revision, local_files_only, cache_dir, token, ...

    Raises:
        MissingError: no such file in it.
        WeightsError: there is no such folder or repository, or the hub cannot be reached.
    """
    folder, name = BUNDLED if name_or_path is None else Path(name_or_path), str(name_or_path)
    remedy = _NO_PRIOR if filename == PRIOR else _NO_WEIGHTS
    if folder.is_file():
        raise WeightsError(f"{folder} is a file: give the folder that holds {filename}")
    if (folder / filename).is_file():
        return folder / filename
    if folder.is_dir():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if filename == FILE and (folder / INDEX).is_file():
            raise WeightsError(f"{folder} holds weights in several files, got {INDEX}: save them again as one {FILE}")
        if filename == FILE and pickles:
            raise WeightsError(f"{folder} holds {pickles[0]}, a pickle, which is never loaded: {ADVICE} as safetensors")
        raise MissingError(f"{folder} has no {filename}: {remedy}")
    if folder.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise WeightsError(f"there is no folder {name}: give an existing folder or a hub id such as 'user/name'")
    at = f"at revision {where.get('revision')!r}"
    try:
        return Path(hf_hub_download(name, filename, **where))
    except HFValidationError as error:
        raise WeightsError(f"{name!r} is neither a folder nor a hub id such as 'user/name': {error}") from error
    except LocalEntryNotFoundError as error:  # one of the next ones, so it comes first
        raise MissingError(
            f"{name}: {filename} is not in the local cache and the hub was not asked or not reached: "
            "go online once, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise MissingError(f"{name} has no {filename} {at}: {remedy}") from error
    except Exception as error:  # the client's HTTP library differs between versions, and so do its exceptions
        raise WeightsError(f"{name}: {filename} cannot be had from the hub {at}: {error}") from error


def read_weights(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Return arrays and texts of a file of weights, or raise WeightsError: a pickle, damaged, cut off or changed."""
    # A safetensors file starts with the length of its header, whose bytes may look like a pickle's first ones: a pickle
    # is what starts like one, and cannot have a header of that length.
    with path.open("rb") as file:
        start = file.read(8)
    pickled = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if pickled and int.from_bytes(start, "little") > path.stat().st_size:
        raise WeightsError(f"{path} is a pickle under a wrong name, which is never loaded: {ADVICE} as safetensors")
    try:
        arrays, texts, sealed = read_sealed(path)
    except ValueError as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}): {ADVICE}") from error
    if "format" in texts and not (sealed and texts.get("tensors_sha256") in (None, digest(arrays, {}))):
        raise WeightsError(f"{path} does not match its own SHA-256, so something in it has changed: {ADVICE}")
    return arrays, texts


def check_names(path: Path, arrays: Arrays, wanted: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless the arrays have the names, types and shapes of the tensors."""
    missing, more = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
    if missing:
        raise WeightsError(f"{path} lacks {len(missing)} tensors, the first {missing[0]!r}: {ADVICE}")
    if more:
        raise WeightsError(f"{path} has {len(more)} unexpected tensors, the first {more[0]!r}: {ADVICE}")
    for name, tensor in wanted.items():
        rule, got = f"{tensor.dtype} of shape {tuple(tensor.shape)}".removeprefix("torch."), arrays[name]
        if f"{got.dtype} of shape {got.shape}" != rule:
            raise WeightsError(f"{path}: {name!r} must be {rule}, got {got.dtype} of {got.shape}: {ADVICE}")


def check_finite(arrays: Arrays, where: str, advice: str) -> None:
    """Raise WeightsError unless all floating-point arrays are finite."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WeightsError(f"{where}: {name!r} must be finite, got NaN or infinity: {advice}")
