"""Generators with weights: saved and loaded as sealed safetensors, from a folder or the Hugging Face hub.

Nothing is ever unpickled. What a file says of itself (architecture, value range, training data, recipe, git commit) is
checked on loading, and so is a SHA-256 of its tensors and texts: safetensors does not notice a flipped bit (EVIDENCE).
"""

import copy
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from carim_aug.models.generator import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator
from carim_aug.sealed import digest, read_sealed, write_sealed

BUNDLED = Path(__file__).parent / "weights"
FILE, CONFIG = "model.safetensors", "config.json"
FORMAT, FORMAT_VERSION = "carim_aug.generator", 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADVICE = "download or export it again"


class WeightsError(ValueError):
    """Weights that cannot be used; the message says what is wrong and what to do."""


class NoduleGenerator(
    MultiScaleGenerator,
    ModelHubMixin,
    library_name="carim_aug",
    license="mit",
    tags=["chest-x-ray", "data-augmentation", "gan", "lung-nodule"],
):
    """The mask-conditional generator with weights that know where they came from.

    Args:
        config: an architecture, its numbers as a dict, or the name of a published one (`ARCHITECTURES`).

    Attributes:
        provenance: training data, recipe, git commit and version, as saved with the weights; empty if untrained.
    """

    def __init__(self, config: GeneratorConfig | Mapping[str, Any] | str = "fast256") -> None:
        """Makes an untrained generator."""
        if isinstance(config, str):
            if config not in ARCHITECTURES:
                raise ValueError(f"config must be one of {sorted(ARCHITECTURES)}, got {config!r}")
            config = ARCHITECTURES[config]
        elif isinstance(config, Mapping):
            fields = dict(config)
            try:
                config = GeneratorConfig(**fields)
            except TypeError as error:
                raise ValueError(f"config must hold GeneratorConfig's fields, got {fields}: {error}") from error
        elif not isinstance(config, GeneratorConfig):
            raise TypeError(f"config must be a GeneratorConfig, a dict or a name, got {type(config).__name__}")
        super().__init__(config)
        self._hub_mixin_config = config
        self.provenance: dict[str, Any] = {}
        self._hashed: tuple[Any, str] = (None, "")

    @property
    def weights_hash(self) -> str:
        """SHA-256 of all tensors: names, types, shapes and values, as hex; worked out again when one has changed."""
        tensors = (*self.parameters(), *self.buffers())
        # Tensors made in inference mode count no versions: no change of theirs can be seen, so they are hashed anew.
        seen = not any(tensor.is_inference() for tensor in tensors)
        now = [(tensor.data_ptr(), tensor._version) for tensor in tensors] if seen else None
        if now is None or self._hashed[0] != now:
            self._hashed = now, digest(_arrays(self), {})
        return self._hashed[1]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        training_data: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        git_commit: str | None = None,
        **options: Any,
    ) -> str | None:
        """Writes model.safetensors, config.json and, if there is none yet, README.md.

        Args:
            save_directory: made if missing.
            training_data: what the weights were trained on; kept from before if None.
            recipe: plain JSON types; kept from before if None.
            git_commit: of the training code; kept from before if None.
            options: what `ModelHubMixin.save_pretrained` takes; `model_card_kwargs` are entries of the card's head,
                such as {"datasets": ["name"]}.

        Returns:
            The commit's address if it was pushed to the hub.

        Raises:
            WeightsError: a tensor is not finite, or not float32.
            TypeError: recipe is not of plain JSON types.
        """
        given = {"training_data": training_data, "recipe": recipe, "git_commit": git_commit}
        told = {k: v for k, v in given.items() if v is not None}
        self.provenance = {**self.provenance, **json.loads(json.dumps(told))}
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        kinds = {tensor.dtype for tensor in self.state_dict().values() if tensor.is_floating_point()}
        if kinds != {torch.float32}:
            raise WeightsError(
                f"weights must be float32 to be saved, got {sorted(map(str, kinds))}: call .float() first"
            )
        arrays = _arrays(self)
        _check_finite(arrays, "these weights", "train again from the last good checkpoint")
        self.provenance = {**self.provenance, "carim_aug": _version()}
        texts = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "architecture": json.dumps(self.config.to_dict()),
            "value_range": json.dumps(self.value_range),
            "provenance": json.dumps(self.provenance),
            "tensors_sha256": self.weights_hash,
        }
        # Written aside and moved into place: a save that is cut off leaves the former weights whole.
        part = save_directory / f".{FILE}.{os.getpid()}.part"
        try:
            write_sealed(part, arrays, texts)
            part.replace(save_directory / FILE)
        finally:
            part.unlink(missing_ok=True)
        (save_directory / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
    ) -> "NoduleGenerator":
        """Gives a trained generator in eval mode on the CPU.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id; None: the bundled weights.
            revision: branch, tag or commit of the hub repository.
            local_files_only: never ask the hub.
            cache_dir: of the hub's files.
            token: of the hub.
            force_download: ask the hub even if the file is cached.

        Raises:
            WeightsError: missing, damaged, of another architecture or format, or not finite.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "local_files_only": local_files_only,
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
        }
        path = fetch(pretrained_model_name_or_path, FILE, **where)
        arrays, texts = _read(path)
        config = _architecture(path, texts)
        described = path.with_name(CONFIG)
        if described.exists():
            _check_config(described, config)
        generator = _empty(cls, config)
        _check_names(path, arrays, generator.state_dict())
        _check_finite(arrays, str(path), ADVICE)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        generator.load_state_dict(state, strict=True, assign=True)
        generator.provenance = json.loads(texts["provenance"])
        return generator.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Gives a card with the data, the recipe and the limits; keyword arguments become entries of its head."""
        data = ModelCardData(**{**self._hub_mixin_info.model_card_data.to_dict(), **kwargs})
        facts = {
            "Architecture": json.dumps(self.config.to_dict()),
            "Training data": self.provenance.get("training_data", "none: untrained"),
            "Recipe": json.dumps(self.provenance.get("recipe", {})),
            "Git commit": self.provenance.get("git_commit", "unknown"),
            "SHA-256 of the tensors": self.weights_hash,
        }
        lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# A generator of chest X-rays with lung nodules\n\n{lines}\n\n"
            "Load with `carim_aug.NoduleGenerator.from_pretrained`. Research use; not a medical device.\n"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as architecture and tensors: a module under spectral norm cannot be pickled whole."""
        modes = [module.training for module in self.modules()]
        frozen = [not parameter.requires_grad for parameter in self.parameters()]
        return _rebuild, (type(self), self.config, dict(self.state_dict()), self.provenance, modes, frozen)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoduleGenerator":
        """Copies as architecture and tensors, so that the copy shares no class with the original (EVIDENCE)."""
        rebuild, (kind, *parts) = self.__reduce__()
        return rebuild(kind, *copy.deepcopy(parts, memo))


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
        if pickles:
            raise WeightsError(
                f"{folder} holds {pickles[0]}, a pickle, which is never loaded here: "
                f"save with NoduleGenerator.save_pretrained to get {filename}"
            )
        raise WeightsError(f"{folder} has no {filename}: give a folder that NoduleGenerator.save_pretrained wrote")
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
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{name}: {filename} is not in the local cache and the hub was not asked or not reached: "
            "go online once, or give a folder"
        ) from error
    except Exception as error:  # the client's HTTP library differs between versions, and so do its exceptions
        raise WeightsError(
            f"{name}: {filename} cannot be had from the hub at revision {revision!r}: {error}"
        ) from error


class _NoInitialValues(TorchFunctionMode):
    """Skips what takes seconds when a spectrally normalised network is made: its power iterations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mv:
            return args[0].new_empty(args[0].shape[0])
        if func is torch.nn.functional.normalize:
            return args[0]
        return func(*args, **(kwargs or {}))


def _empty(kind: type[NoduleGenerator], config: GeneratorConfig) -> NoduleGenerator:
    # Without values, to be loaded with assign=True: no time goes into initialising, and no random number is drawn.
    with torch.device("meta"), _NoInitialValues():
        return kind(config)


def _rebuild(
    kind: type[NoduleGenerator],
    config: GeneratorConfig,
    state: dict[str, Tensor],
    provenance: dict[str, Any],
    modes: list[bool],
    frozen: list[bool],
) -> NoduleGenerator:
    generator = _empty(kind, config)
    generator.load_state_dict(state, strict=True, assign=True)
    generator.provenance = provenance
    for module, mode in zip(generator.modules(), modes, strict=True):
        module.training = mode
    for parameter, still in zip(generator.parameters(), frozen, strict=True):
        parameter.requires_grad_(not still)
    return generator


def _arrays(generator: MultiScaleGenerator) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in generator.state_dict().items()}


def _version() -> str:
    try:
        return version("carim-aug")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
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


def _architecture(path: Path, texts: Mapping[str, str]) -> GeneratorConfig:
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


def _check_config(path: Path, config: GeneratorConfig) -> None:
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}): {ADVICE}") from error
    if described != config.to_dict():
        raise WeightsError(f"{path} describes another architecture than the weights beside it: {ADVICE}")


def _check_names(path: Path, arrays: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
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


def _check_finite(arrays: Mapping[str, np.ndarray[Any, Any]], where: str, advice: str) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WeightsError(f"{where}: {name!r} must be finite, got NaN or infinity: {advice}")
