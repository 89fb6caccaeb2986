"""Generators with weights: saved and loaded as sealed safetensors, from a folder or the Hugging Face hub.

A location prior may lie beside the weights and is saved with them, for `SyntheticNoduleMix.from_pretrained` to find.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from carim_aug.generators.checkpoint import (
    ADVICE,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    PRIOR,
    WeightsError,
    architecture,
    check_config,
    check_finite,
    check_names,
    fetch_beside,
)
from carim_aug.generators.modelcard import completed_card, written_card
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator, check_inputs
from carim_aug.generators.shards import FILES, fetch_weights, write_weights
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import check_masks
from carim_aug.ops.sealed import digest

CARD = "README.md"


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
        self._prior: bytes | None = None  # the prior's file, kept from loading or saving
        self._card: tuple[tuple[Any, ...], str] | None = None  # what the card beside the weights is about, and its text

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives images of the last scale.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}, S = image_size; all zeros gives a normal image.

        Returns:
            (B, 1, S, S) float, [-1, 1].

        Raises:
            ValueError: wrong shapes, a mask that is not binary, or noise that is not finite floating point.
        """
        check_inputs(noise, masks, self.config)
        check_masks(masks)
        if not noise.is_floating_point():
            raise ValueError(f"noise must be floating point, got {noise.dtype}")
        if not noise.isfinite().all():
            raise ValueError(f"noise must be finite, got {noise[~noise.isfinite()][0].item()}")
        return super().forward(noise, masks)

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
        prior: LocationPrior | None = None,
        **options: Any,
    ) -> str | None:
        """Writes the weights, config.json, prior.safetensors if there is a prior, and README.md if there is none.

        The weights are model.safetensors, or several such files with an index where they are larger than 16 MB.

        Args:
            save_directory: made if missing.
            training_data: what the weights were trained on; kept from before if None.
            recipe: plain JSON types; kept from before if None.
            git_commit: of the training code; kept from before if None.
            prior: of the masks, for `SyntheticNoduleMix.from_pretrained`; kept from before if None: the one given last,
                or the one that lay beside the weights when they were loaded.
            options: what `ModelHubMixin.save_pretrained` takes; `model_card_kwargs` are entries of the card's head,
                such as {"datasets": ["name"]}.

        Returns:
            The commit's address if it was pushed to the hub.

        Raises:
            WeightsError: a tensor is not finite, or not float32.
            TypeError: recipe is not of plain JSON types, or prior is no LocationPrior.
        """
        self._keep(prior)
        given = {"training_data": training_data, "recipe": recipe, "git_commit": git_commit}
        told = {k: v for k, v in given.items() if v is not None}
        self.provenance = {**self.provenance, **json.loads(json.dumps(told))}
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, *, prior: LocationPrior | None = None, **options: Any) -> str:  # type: ignore[override]
        """Uploads what `save_pretrained` writes, in one commit; weights in other files than these are deleted there.

        Args:
            repo_id: such as "user/name"; made if missing.
            prior: as in `save_pretrained`.
            options: what `ModelHubMixin.push_to_hub` takes: commit_message, private, token, branch (made if missing),
                create_pr, ...

        Returns:
            The commit's address.

        Raises:
            WeightsError: a tensor is not finite, or not float32.
            TypeError: prior is no LocationPrior.
        """
        self._keep(prior)
        if options.get("branch") is not None:
            api = HfApi(token=options.get("token"))
            repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
            api.create_branch(repo_id, branch=options["branch"], exist_ok=True)
        # Else one file of old weights would be found before the parts of new ones.
        asked = options.pop("delete_patterns", None) or []
        options["delete_patterns"] = [*([asked] if isinstance(asked, str) else asked), *FILES]
        return super().push_to_hub(repo_id, **options)

    def _keep(self, prior: LocationPrior | None) -> None:
        if prior is None:
            return
        if not isinstance(prior, LocationPrior):
            raise TypeError(f"prior must be a LocationPrior, got {type(prior).__name__}")
        with tempfile.TemporaryDirectory() as folder:
            prior.save(Path(folder) / PRIOR)
            self._prior = (Path(folder) / PRIOR).read_bytes()

    def _save_pretrained(self, save_directory: Path) -> None:
        kinds = {tensor.dtype for tensor in self.state_dict().values() if tensor.is_floating_point()}
        if kinds != {torch.float32}:
            raise WeightsError(
                f"weights must be float32 to be saved, got {sorted(map(str, kinds))}: call .float() first"
            )
        arrays = _arrays(self)
        check_finite(arrays, "these weights", "train again from the last good checkpoint")
        self.provenance = {**self.provenance, "carim_aug": _version()}
        texts = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "architecture": json.dumps(self.config.to_dict()),
            "value_range": json.dumps(self.value_range),
            "provenance": json.dumps(self.provenance),
            "tensors_sha256": self.weights_hash,
        }
        write_weights(save_directory, arrays, texts)
        (save_directory / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        if self._prior is not None:
            (save_directory / PRIOR).write_bytes(self._prior)

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
        path, arrays, texts = fetch_weights(pretrained_model_name_or_path, **where)
        config = architecture(path, texts)
        described = path.with_name(CONFIG)
        if described.exists():
            check_config(described, config)
        generator = _empty(cls, config)
        check_names(path, arrays, generator.state_dict())
        check_finite(arrays, str(path), ADVICE)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        generator.load_state_dict(state, strict=True, assign=True)
        generator.provenance = json.loads(texts["provenance"])
        beside = fetch_beside(pretrained_model_name_or_path, PRIOR, **where)
        generator._prior = None if beside is None else beside.read_bytes()
        if (card := path.with_name(CARD)).is_file():
            generator._card = generator._described(), card.read_text(encoding="utf-8")
        return generator.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Gives a card with data, recipe, limits, licence and citation; keyword arguments become entries of its head.

        A README.md that lay beside the weights when they were loaded is kept, if they, their prior and what is told of
        them are still the same.
        """
        defaults = self._hub_mixin_info.model_card_data.to_dict()
        if self._card is not None and self._card[0] == self._described():
            card = completed_card(self._card[1], ModelCardData(**defaults))
            card.data = ModelCardData(**{**card.data.to_dict(), **kwargs})
            return card
        return written_card(
            ModelCardData(**{**defaults, **kwargs}),
            architecture=self.config.to_dict(),
            weights_hash=self.weights_hash,
            provenance=self.provenance,
            has_prior=self._prior is not None,
        )

    def _described(self) -> tuple[Any, ...]:
        """What a card is about."""
        told = {name: value for name, value in self.provenance.items() if name != "carim_aug"}
        return self.weights_hash, json.dumps(told, sort_keys=True), self._prior

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as architecture and tensors: a module under spectral norm cannot be pickled whole."""
        modes = [module.training for module in self.modules()]
        frozen = [not parameter.requires_grad for parameter in self.parameters()]
        return _rebuild, (
            type(self),
            self.config,
            dict(self.state_dict()),
            self.provenance,
            (self._prior, self._card),
            modes,
            frozen,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoduleGenerator":
        """Copies as architecture and tensors, so that the copy shares no class with the original (EVIDENCE)."""
        rebuild, (kind, *parts) = self.__reduce__()
        return rebuild(kind, *copy.deepcopy(parts, memo))


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
    kept: tuple[bytes | None, Any],
    modes: list[bool],
    frozen: list[bool],
) -> NoduleGenerator:
    generator = _empty(kind, config)
    generator.load_state_dict(state, strict=True, assign=True)
    generator.provenance, (generator._prior, generator._card) = provenance, kept
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
