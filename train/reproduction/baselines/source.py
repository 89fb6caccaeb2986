"""DCGAN, PGGAN and the attention cGAN of Table 1 of Ann (2021) as generators.

They know a class but no place: so they serve for whole images of a classifier's batches, not for grafts or boxes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from carim_aug.generators.base import check_device
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.ops.random import noise
from train.reproduction.baselines.attention import AttentionGenerator
from train.reproduction.baselines.dcgan import DCGANGenerator
from train.reproduction.baselines.pggan import ProgressiveGenerator

KINDS: tuple[str, ...] = ("dcgan", "pggan", "attention")


@dataclass(frozen=True)
class ClassGeneratorConfig:
    """Numbers that fix one baseline's generator."""

    kind: str  # of `KINDS`
    architecture: str = "fast256"  # whose image size and noise all kinds have, and whose backbone the attention cGAN
    width: int = 32  # maps at (PGGAN) or before (DCGAN) the final size
    most: int = 1024  # largest number of maps

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("architecture", self.architecture, ARCHITECTURES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r}")

    @property
    def backbone(self) -> GeneratorConfig:
        """The numbers of the architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.backbone.image_size


class ClassNetworks(nn.Module):
    """One baseline's generators: two, normal and nodule, of DCGAN; else one that takes the class."""

    def __init__(self, config: ClassGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        numbers = {"noise_dim": config.backbone.noise_dim, "width": config.width, "most": config.most}
        if config.kind == "dcgan":
            self.each = nn.ModuleList(DCGANGenerator(config.image_size, **numbers) for _ in range(2))
        elif config.kind == "pggan":
            self.each = nn.ModuleList([ProgressiveGenerator(config.image_size, **numbers)])
        else:
            self.each = nn.ModuleList([AttentionGenerator(config.backbone)])

    def forward(self, noise: Tensor, classes: Tensor, *, step: int | None = None, alpha: float = 1.0) -> list[Tensor]:
        """Return images (B, 1, s, s): of all scales of the attention cGAN, smallest first; else of one.

        Of noise (B, noise_dim) and classes (B,), 0 normal, 1 nodule; step and alpha are those of PGGAN.
        """
        if self.config.kind == "attention":
            return self.each[0](noise, classes)
        if self.config.kind == "pggan":
            return [self.each[0](noise, classes, step=step, alpha=alpha)]
        images = noise.new_empty(len(noise), 1, self.config.image_size, self.config.image_size)
        for number, network in enumerate(self.each):
            rows = classes == number
            if rows.any():
                images[rows] = network(noise[rows]).to(images.dtype)
        return [images]


class ClassGenerator(NoduleGenerator):
    """A trained baseline, as a class source (`carim_aug.generators.base.ClassSource`)."""

    format = "carim_aug.classgenerator"
    network: ClassNetworks

    @staticmethod
    def build(architecture: Mapping[str, Any]) -> ClassNetworks:
        """Return untrained networks of `ClassGeneratorConfig`'s numbers."""
        return ClassNetworks(ClassGeneratorConfig(**architecture))

    @property
    def architecture(self) -> dict[str, Any]:
        """The numbers of the networks' config."""
        return asdict(self.network.config)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.network.config.image_size

    @torch.no_grad()
    def class_images(self, nodule: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return generated images (n, 1, S, S) float32, [-1, 1], with a nodule where `nodule` (n,) bool asks for it."""
        if tuple(nodule.shape) != (len(seeds),) or nodule.dtype != torch.bool:
            raise ValueError(f"nodule must be ({len(seeds)},) bool, got {tuple(nodule.shape)} {nodule.dtype}")
        z, device = noise(seeds, self.network.config.backbone.noise_dim), nodule.device
        networks = self.network if device.type == "cpu" else _copy_to(device, self.network)
        return networks(z.to(device), nodule.long())[-1].clamp(-1, 1)


@lru_cache(maxsize=2)
def _copy_to(device: torch.device, networks: ClassNetworks) -> ClassNetworks:
    check_device(device)
    return copy.deepcopy(networks).to(device)
