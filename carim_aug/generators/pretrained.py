"""`NoduleGenerator`: a network with weights that know where they came from, saved and loaded by their format.

A new kind of generator is a subclass with a `format` of its own: it holds its network (`network`), builds one from its
`architecture`, and has `images`, `residuals` or both (`carim_aug.generators.base`). Defining the class registers it.
"""

import contextlib
import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from carim_aug.generators import weights
from carim_aug.generators.card import model_card
from carim_aug.generators.weights import ADVICE, CARD, CONFIG, FILE, INDEX, PRIOR, WeightsError
from carim_aug.ops.sealed import digest, write_sealed

REGISTRY: dict[str, "type[NoduleGenerator]"] = {}  # format of a file of weights to the class that reads it
TAGS = ["chest-x-ray", "data-augmentation", "gan", "lung-nodule"]


class NoduleGenerator(ModelHubMixin, library_name="carim_aug", license="mit", tags=TAGS):
    """A network for inference, and what is known of its weights. Make one with `from_pretrained`, or with a subclass.

    Args:
        network: held, not copied: it is put into eval mode, and its parameters want no gradients from here on.
    """

    format: ClassVar[str] = ""
    format_version: ClassVar[int] = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.format:
            REGISTRY[cls.format] = cls

    def __init__(self, network: nn.Module) -> None:
        if not self.format:
            raise TypeError(
                f"generator must be of a class with a format, got {type(self).__name__}: use from_pretrained, or "
                "WholeImageGenerator"
            )
        self.network = network.eval().requires_grad_(False)
        self.provenance: dict[str, Any] = {}  # training data, recipe, git commit and version, as saved with the weights
        self._fused: dict[torch.device, Any] = {}  # the network made ready for a device: neither copied nor pickled
        self._prior: bytes | None = None  # the prior's file, kept from loading or saving
        self._card: tuple[Any, str] | None = None  # what the README.md beside the weights is about, and its text

    @property
    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """The numbers that fix the network, as plain JSON types."""

    @staticmethod
    @abstractmethod
    def build(architecture: Mapping[str, Any]) -> nn.Module:
        """Return an untrained network of these numbers, or raise a ValueError or TypeError."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of all tensors: names, types, shapes and values, as hex."""
        return digest(self._arrays(), {})

    # --- Out ---
    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        training_data: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        git_commit: str | None = None,
        prior: Any = None,
        **options: Any,
    ) -> str | None:
        """Write model.safetensors, config.json, prior.safetensors if there is a prior, and README.md if there is none.

        Args:
            training_data: what the weights were trained on; this and the next three are kept from before if None.
            recipe: plain JSON types.
            git_commit: of the training code.
            prior: of the masks, for `SyntheticNoduleMix.from_pretrained`.
            options: what `ModelHubMixin.save_pretrained` takes; `model_card_kwargs` are entries of the card's head.

        Raises:
            WeightsError: a tensor is not finite, or not float32.
            TypeError: recipe is not of plain JSON types, or prior cannot be saved.
        """
        self._keep(prior)
        given = {"training_data": training_data, "recipe": recipe, "git_commit": git_commit}
        facts = json.loads(json.dumps({k: v for k, v in given.items() if v is not None}))
        self.provenance = {**self.provenance, **facts}
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, *, prior: Any = None, **options: Any) -> str:  # type: ignore[override]
        """Upload what `save_pretrained` writes, in one commit, and return the commit's address.

        Args:
            repo_id: such as "user/name"; made if missing, as `branch` is.
            prior: as in `save_pretrained`, whose errors this raises too.
            options: what `ModelHubMixin.push_to_hub` takes: commit_message, private, token, branch, create_pr, ...
        """
        self._keep(prior)
        if options.get("branch") is not None:
            api = HfApi(token=options.get("token"))
            repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
            api.create_branch(repo_id, branch=options["branch"], exist_ok=True)
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *args: Any, **entries: Any) -> ModelCard:
        """Return the card beside the weights; a new one if they, prior or provenance changed. `entries`: its head's."""
        head = self._hub_mixin_info.model_card_data.to_dict()
        if self._card is not None and self._card[0] == self._described():
            card = ModelCard(self._card[1])
            card.data = ModelCardData(**{**head, **card.data.to_dict(), **entries})
            return card
        return model_card(ModelCardData(**{**head, **entries}), self, has_prior=self._prior is not None)

    def _keep(self, prior: Any) -> None:
        if prior is None:
            return
        if isinstance(prior, type) or not all(hasattr(prior, name) for name in ("draw", "save")):
            raise TypeError(f"prior must be a LocationPrior, got {type(prior).__name__}")
        with tempfile.TemporaryDirectory() as folder:
            prior.save(Path(folder) / PRIOR)
            self._prior = (Path(folder) / PRIOR).read_bytes()

    def _described(self) -> tuple[Any, ...]:  # what a card is about
        facts = {name: value for name, value in self.provenance.items() if name != "carim_aug"}
        return self.weights_hash, json.dumps(facts, sort_keys=True), self._prior

    def _save_pretrained(self, save_directory: Path) -> None:
        kinds = {tensor.dtype for tensor in self.network.state_dict().values() if tensor.is_floating_point()}
        if kinds != {torch.float32}:
            raise WeightsError(
                f"weights must be float32 to be saved, got {sorted(map(str, kinds))}: call .float() first"
            )
        arrays = self._arrays()
        weights.check_finite(arrays, "these weights", "train again from the last good checkpoint")
        self.provenance = {**self.provenance, "carim_aug": _version()}
        texts = {
            "format": self.format,
            "format_version": str(self.format_version),
            "architecture": json.dumps(self.architecture),
            "value_range": json.dumps([-1.0, 1.0]),
            "provenance": json.dumps(self.provenance),
            "tensors_sha256": digest(arrays, {}),
        }
        # Written aside and moved into place: a save that is cut off leaves the former file whole.
        part = save_directory / f".{FILE}.{os.getpid()}.part"
        try:
            write_sealed(part, arrays, texts)
            part.replace(save_directory / FILE)
        finally:
            part.unlink(missing_ok=True)
        (save_directory / INDEX).unlink(missing_ok=True)
        (save_directory / CONFIG).write_text(json.dumps(self.architecture, indent=2) + "\n")
        if self._prior is not None:
            (save_directory / PRIOR).write_bytes(self._prior)

    def _arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {k: tensor.detach().cpu().contiguous().numpy() for k, tensor in self.network.state_dict().items()}

    # --- In ---
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
        """Return a trained generator on the CPU, of the class that its file's format names.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id; None: the bundled weights.
            revision: branch, tag or commit of the hub repository; the rest is as of `huggingface_hub.hf_hub_download`.

        Raises:
            WeightsError: missing, damaged, of another architecture or format, or not finite.
        """
        where: dict[str, Any] = dict(revision=revision, local_files_only=local_files_only, cache_dir=cache_dir)
        where |= dict(token=token, force_download=force_download)
        path = weights.fetch(pretrained_model_name_or_path, FILE, **where)
        arrays, texts = weights.read_weights(path)
        kind = cls._kind_of(path, texts)
        try:
            provenance, value_range = json.loads(texts["provenance"]), json.loads(texts["value_range"])
            network = _build_empty(kind, json.loads(texts["architecture"]))
        except (TypeError, ValueError, LookupError) as error:
            raise WeightsError(f"{path} does not say what it holds ({error!r}): {ADVICE}") from error
        if not isinstance(provenance, dict):
            raise WeightsError(f"{path} must have a JSON object as its provenance, got {provenance!r}: {ADVICE}")
        if value_range != [-1.0, 1.0]:
            raise WeightsError(f"{path} must have the value range (-1, 1), got {value_range}")
        weights.check_names(path, arrays, network.state_dict())
        weights.check_finite(arrays, str(path), ADVICE)
        network.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()}, strict=True, assign=True)
        generator = kind(network)

        config, card = path.with_name(CONFIG), path.with_name(CARD)
        try:
            described = json.loads(config.read_text()) if config.exists() else generator.architecture
        except ValueError as error:
            raise WeightsError(f"{config} is no JSON ({error}): {ADVICE}") from error
        if described != generator.architecture:
            raise WeightsError(f"{config} describes another architecture than the weights beside it: {ADVICE}")
        generator.provenance = provenance
        with contextlib.suppress(weights.MissingError):
            generator._prior = weights.fetch(pretrained_model_name_or_path, PRIOR, **where).read_bytes()
        generator._card = (generator._described(), card.read_text(encoding="utf-8")) if card.is_file() else None
        return generator

    @classmethod
    def _kind_of(cls, path: Path, texts: Mapping[str, str]) -> "type[NoduleGenerator]":
        known = {name: kind for name, kind in REGISTRY.items() if issubclass(kind, cls)}
        kind, number = known.get(texts.get("format", "")), texts.get("format_version", "")
        if kind is None:
            raise WeightsError(
                f"{path} must be of a format among {sorted(known)}, got {texts.get('format')!r}: it holds something "
                "else, is damaged, or its class was not imported"
            )
        if not number.isdecimal() or int(number) > kind.format_version:
            raise WeightsError(
                f"{path} is of format version {number!r}, newer than {kind.format_version}: upgrade carim-aug"
            )
        return kind

    def __reduce__(self) -> tuple[Any, ...]:
        # A module under spectral norm cannot be pickled whole, and its copy would share a class with the original.
        more = {k: v for k, v in self.__dict__.items() if k not in ("network", "_fused")}
        return _rebuild, (type(self), self.architecture, dict(self.network.state_dict()), more)


class _NoInitialValues(TorchFunctionMode):
    """Skips the power iterations of spectral norm: they take 4.3 of the 4.6 s in which thesis256 is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mv:
            return args[0].new_empty(args[0].shape[0])
        if func is torch.nn.functional.normalize:
            return args[0]
        return func(*args, **(kwargs or {}))


def _build_empty(kind: type[NoduleGenerator], architecture: Mapping[str, Any]) -> nn.Module:
    """Return a network without values, to be loaded with assign=True: no random number is drawn."""
    with torch.device("meta"), _NoInitialValues():
        return kind.build(architecture)


def _rebuild(
    kind: type[NoduleGenerator], architecture: Mapping[str, Any], state: dict[str, Tensor], more: dict[str, Any]
) -> NoduleGenerator:
    network = _build_empty(kind, architecture)
    network.load_state_dict(state, strict=True, assign=True)
    generator = kind(network)
    generator.__dict__.update(more)
    return generator


def _version() -> str:
    try:
        return version("carim-aug")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
