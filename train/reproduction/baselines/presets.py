"""Numbers of the five models of Table 1 of Ann (2021), trained with one budget of real images."""

from dataclasses import dataclass, replace
from typing import Any

from carim_aug.generators.multiscale import ARCHITECTURES
from train.gan.presets import PRESETS as GANS
from train.gan.presets import GANPreset
from train.reproduction.baselines.source import ClassGeneratorConfig

MODELS: dict[str, str] = {
    "dcgan": "DCGAN, one per class",
    "pggan": "Class-conditional PGGAN",
    "attention": "Multi-scale class cGAN with self-attention",
    "carim-without": "CARIM-cGAN without the loss",
    "carim": "CARIM-cGAN",
}
"""Folder of each model, and its row in Table 1."""


@dataclass(frozen=True)
class BaselinePreset(GANPreset):
    """Numbers of one baseline's training: the CARIM-cGAN's, but for those of its masks, crops and stages, and these."""

    kind: str = ""  # of `train.reproduction.baselines.source.KINDS`
    width: int = 32  # DCGAN and PGGAN: fewest maps, of generator and discriminators
    most: int = 1024  # DCGAN and PGGAN: most maps
    grow_images: int = 1_200  # PGGAN: of each size, the first half of them fading it in; the last size takes the rest

    @property
    def config(self) -> ClassGeneratorConfig:
        """The generator's numbers."""
        return ClassGeneratorConfig(self.kind, self.architecture, self.width, self.most)


@dataclass(frozen=True)
class Table1Preset:
    """Numbers of the five trainings."""

    stage1: GANPreset  # of the CARIM-cGAN; its images are those before the two ways part
    stage2: GANPreset  # with the loss
    dcgan: tuple[int, int]  # fewest and most maps
    pggan: tuple[int, int]

    @property
    def baselines(self) -> dict[str, BaselinePreset]:
        """The class-conditional models, of the CARIM-cGAN's size, batch and augmentation, shown as many images.

        DCGAN and PGGAN with their authors' Adam; PGGAN spends half of the budget on the sizes below the last.
        """
        images, last = self.stage2.images, ARCHITECTURES[self.stage1.architecture].image_size.bit_length() - 3
        own: dict[str, dict[str, Any]] = {
            "dcgan": {"learning_rate": 2e-4, "betas": (0.5, 0.999), "width": self.dcgan[0], "most": self.dcgan[1]},
            "pggan": {"learning_rate": 1e-3, "betas": (0.0, 0.99), "width": self.pggan[0], "most": self.pggan[1]},
            "attention": {},
        }
        own["pggan"]["grow_images"] = images // 2 // last
        shared = {**vars(self.stage1), "images": images}
        return {kind: BaselinePreset(**{**shared, "kind": kind, **numbers}) for kind, numbers in own.items()}


_FAST = replace(GANS["fast128"], images=9_000, grow_at=(1_500, 4_000), snapshot_images=3_000)
_TINY = replace(GANS["tiny"], images=64, grow_at=(32,), snapshot_images=32, log_images=16)

PRESETS: dict[str, Table1Preset] = {
    "thesis": Table1Preset(GANS["thesis256"], GANS["thesis256-stage2"], dcgan=(64, 1024), pggan=(16, 512)),
    "mini": Table1Preset(_FAST, replace(_FAST, images=12_000), dcgan=(32, 512), pggan=(16, 256)),
    "tiny": Table1Preset(_TINY, replace(_TINY, images=96), dcgan=(8, 32), pggan=(8, 16)),
}
