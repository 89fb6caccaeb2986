"""Class-conditional baselines as generators of `SyntheticNoduleMix` (METHOD 7, Table 1): DCGAN, PGGAN, attention cGAN.

They know a class but no place: any mask that is not empty asks for a nodule, which is then wherever it is. So they
serve for whole images of a classifier's batches, and neither for grafts nor for boxes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from carim_aug.generators.checkpoint import ADVICE, FILE, PRIOR, WeightsError, check_finite, check_names
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import check_masks
from carim_aug.ops.sealed import digest, read_sealed, write_sealed
from train.reproduction.baselines.attention import AttentionGenerator
from train.reproduction.baselines.dcgan import DCGANGenerator
from train.reproduction.baselines.pggan import ProgressiveGenerator

KINDS: tuple[str, ...] = ("dcgan", "pggan", "attention")
"""Class-conditional baselines of Table 1."""

FORMAT = "carim_aug.classgenerator"


@dataclass(frozen=True)
class ClassGeneratorConfig:
    """Numbers that fix one baseline's generator.

    Attributes:
        kind: of `KINDS`.
        image_size: side in pixels.
        noise_dim: length of z.
        width: maps at (PGGAN) or before (DCGAN) the final size.
        most: largest number of maps.
        architecture: attention: whose backbone, of `carim_aug.generators.multiscale.ARCHITECTURES`.
    """

    kind: str
    image_size: int = 256
    noise_dim: int = 100
    width: int = 32
    most: int = 1024
    architecture: str = ""

    def __post_init__(self) -> None:
        """Checks that the numbers fit together."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.kind == "attention":
            if self.architecture not in ARCHITECTURES:
                raise ValueError(f"architecture must be one of {sorted(ARCHITECTURES)}, got {self.architecture!r}")
            backbone = ARCHITECTURES[self.architecture]
            if (self.image_size, self.noise_dim) != (backbone.image_size, backbone.noise_dim):
                raise ValueError(
                    f"image_size and noise_dim must be the architecture's, {backbone.image_size} and "
                    f"{backbone.noise_dim}, got {self.image_size} and {self.noise_dim}"
                )

    def networks(self, *, spectral_norm: bool = True) -> nn.ModuleList:
        """Gives untrained networks: two, normal and nodule, of DCGAN; else one that takes the class."""
        if self.kind == "dcgan":
            numbers = {"noise_dim": self.noise_dim, "width": self.width, "most": self.most}
            return nn.ModuleList(DCGANGenerator(self.image_size, **numbers) for _ in range(2))
        if self.kind == "pggan":
            numbers = {"noise_dim": self.noise_dim, "width": self.width, "most": self.most}
            return nn.ModuleList([ProgressiveGenerator(self.image_size, **numbers)])
        backbone = replace(ARCHITECTURES[self.architecture], spectral_norm=spectral_norm)
        return nn.ModuleList([AttentionGenerator(backbone)])


class ClassGenerator(nn.Module):
    """A trained class-conditional generator behind the protocol of masks; see `carim_aug.generators.base`.

    Args:
        config: the numbers.
        networks: trained ones, whose values are taken over, spectral norm folded; untrained by default.

    Attributes:
        places: False: the nodule is not where the mask is.
        provenance: training data, recipe and git commit, as saved with the weights; empty if untrained.
    """

    places = False
    value_range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, config: ClassGeneratorConfig, networks: nn.ModuleList | None = None) -> None:
        """Makes the networks; in eval mode if trained ones are given."""
        super().__init__()
        self.config, self.provenance = config, dict[str, Any]()
        self.networks = config.networks(spectral_norm=False)
        if networks is not None:
            wanted = self.networks.state_dict()
            self.networks.load_state_dict({name: _value(networks, name) for name in wanted})
            self.eval()

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.config.image_size

    @property
    def noise_dim(self) -> int:
        """Length of z."""
        return self.config.noise_dim

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the configuration and all tensors, as hex."""
        return digest(self._arrays(), {"config": json.dumps(asdict(self.config))})

    def images(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Gives images of classes.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            classes: (B,) int64, 0 normal, 1 nodule.

        Returns:
            (B, 1, S, S) float, [-1, 1].
        """
        if noise.ndim != 2 or noise.shape[1] != self.noise_dim or classes.shape != noise.shape[:1]:
            raise ValueError(
                f"noise must be (B, {self.noise_dim}) and classes (B,), got {tuple(noise.shape)} and "
                f"{tuple(classes.shape)}"
            )
        if self.config.kind == "dcgan":
            made = noise.new_empty(len(noise), 1, self.image_size, self.image_size)
            for number, network in enumerate(self.networks):
                rows = (classes == number).nonzero()[:, 0]
                if len(rows):
                    made[rows] = network(noise[rows]).to(made.dtype)
            return made
        return self.networks[0](noise, classes).clamp(-1, 1)

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives images: of a nodule where the mask has a pixel, else normal ones.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}.

        Returns:
            (B, 1, S, S) float, [-1, 1].

        Raises:
            ValueError: wrong shapes, or a mask that is not binary.
        """
        if tuple(masks.shape) != (len(noise), 1, self.image_size, self.image_size):
            raise ValueError(
                f"masks must be ({len(noise)}, 1, {self.image_size}, {self.image_size}), got {tuple(masks.shape)}"
            )
        check_masks(masks)
        return self.images(noise, (masks.flatten(1).amax(dim=1) > 0).long())

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        prior: LocationPrior | None = None,
        training_data: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        git_commit: str | None = None,
    ) -> None:
        """Writes model.safetensors, and prior.safetensors if there is a prior.

        Args:
            folder: made if missing.
            prior: for the masks that a mix draws; they mean a class only.
            training_data: what the weights were trained on; kept from before if None, as the next two.
            recipe: plain JSON types.
            git_commit: of the training code.

        Raises:
            WeightsError: a tensor is not finite.
        """
        arrays = self._arrays()
        check_finite(arrays, "these weights", "train again from the last good checkpoint")
        given = {"training_data": training_data, "recipe": recipe, "git_commit": git_commit}
        told = {k: v for k, v in given.items() if v is not None}
        self.provenance = {**self.provenance, **json.loads(json.dumps(told))}
        Path(folder).mkdir(parents=True, exist_ok=True)
        texts = {"format": FORMAT, "config": json.dumps(asdict(self.config)), "provenance": json.dumps(self.provenance)}
        write_sealed(Path(folder) / FILE, arrays, texts)
        if prior is not None:
            prior.save(Path(folder) / PRIOR)

    @staticmethod
    def is_at(folder: Any) -> bool:
        """Says whether a folder holds weights that `save_pretrained` wrote, by their header alone."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="numpy") as file:
                return (file.metadata() or {}).get("format") == FORMAT
        except (SafetensorError, OSError):
            return False

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClassGenerator":
        """Gives a trained generator in eval mode on the CPU.

        Args:
            folder: that `save_pretrained` wrote.

        Raises:
            WeightsError: missing, damaged, or not of a class-conditional baseline.
        """
        path = Path(folder) / FILE
        try:
            arrays, texts, sealed = read_sealed(path)
        except (FileNotFoundError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read ({error}): {ADVICE}") from error
        if texts.get("format") != FORMAT:
            raise WeightsError(f"{path} must be of format {FORMAT!r}, got {texts.get('format')!r}")
        if not sealed:
            raise WeightsError(f"{path} does not match its own SHA-256, so something in it has changed: {ADVICE}")
        generator = cls(ClassGeneratorConfig(**json.loads(texts["config"])))
        check_names(path, arrays, generator.networks.state_dict())
        generator.networks.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        generator.provenance = json.loads(texts["provenance"])
        return generator.eval()

    def _arrays(self) -> Mapping[str, Any]:
        return {k: v.detach().cpu().contiguous().numpy() for k, v in self.networks.state_dict().items()}


def _value(networks: nn.Module, name: str) -> Tensor:
    """The value of a parameter or buffer as the network uses it: spectral norm, if any, evaluated."""
    owner, _, last = name.rpartition(".")
    return getattr(networks.get_submodule(owner), last).detach()
