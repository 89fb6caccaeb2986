"""The data sets that Table 2 compares: DS1 to DS4 of Ann (2021), and the controls without which a gain means nothing.

An arm is real images, and what `SyntheticNoduleMix` adds to them. Where an arm adds n nodules to real images (grafts,
duplicates, controls), n real normal images more come with them, so that classes stay balanced; whole synthetic images
come with n synthetic normal ones, as in Ann (2021). `DS4@1` is DS4 with as many synthetic nodules as real ones.

One departure: Ann (2021) generates synthetic images once; here the n places of an epoch are filled anew in each, which
is what the mix is for. So are those of the controls: "duplicated" draws its duplicates anew.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train.reproduction.baselines.source  # noqa: F401  (knows the format of the baselines' weights)
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.weights import PRIOR
from carim_aug.location.prior import BUNDLED, LocationPrior
from carim_aug.location.restricted import uniform_prior
from carim_aug.ops.random import fold
from carim_aug.transforms.mix import SyntheticNoduleMix
from train.common.images import ImageSet
from train.common.run import RunError
from train.reproduction.controls.duplicates import DuplicatedImages
from train.reproduction.controls.nodules import CopiedNodules, DrawnNodules, SuperimposedNodules

SHARE = 2_000 / 5_698  # synthetic nodules for each real one in Ann (2021)


@dataclass(frozen=True)
class Arm:
    """One data set."""

    name: str  # of `ARMS`, perhaps with "@" and a share
    title: str  # in the table
    source: str = ""  # what adds nodules: "without" or "full" (the CARIM-cGAN's weights), a control, "" for nothing
    insertion: str = "graft"  # or "whole"
    balanced: bool = True  # as many normal images as nodule images, drawn by the run's seed; else all
    anywhere: bool = False  # nodules at random places anywhere in the image
    share: float = SHARE  # synthetic nodules for each real one

    @property
    def trained(self) -> bool:
        """Whether a trained generator makes what is added."""
        return self.source in ("without", "full")

    @property
    def whole(self) -> bool:
        """Whether whole generated images of both classes come in."""
        return self.insertion == "whole" and self.trained


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("DS1", "all real images", balanced=False, share=0.0),
        Arm("DS2", "real images, balanced", share=0.0),
        Arm("DS3", "DS2 + images of the model without the CARIM loss", "without", "whole"),
        Arm("DS4", "DS2 + images of the full model", "full", "whole"),
        Arm("DS3-graft", "DS2 + grafts of the model without the CARIM loss", "without"),
        Arm("DS4-graft", "DS2 + grafts of the full model", "full"),
        Arm("duplicated", "DS2 + duplicated real nodule images", "duplicated", "whole"),
        Arm("copied", "DS2 + real nodules copied, Poisson blended", "copied"),
        Arm("drawn-blob", "DS2 + drawn nodules", "drawn-blob"),
        Arm("ct", "DS2 + CT nodules superimposed", "ct"),
        Arm("random-places", "DS2 + grafts of the full model at random places", "full", anywhere=True),
    )
}

NUMBERS = dict(zip(("DS5", "DS6", "DS7", "DS8", "DS9"), list(ARMS)[6:], strict=True))
"""The controls by number, counted on from Ann's (2021) DS1 to DS4."""


def find_arm(name: str) -> Arm:
    """Return the arm of a name of `ARMS` or `NUMBERS`, perhaps with "@" and a share, or raise RunError."""
    stem, at, text = name.partition("@")
    arm = ARMS.get(NUMBERS.get(stem, stem))
    try:
        share = float(text) if at else SHARE
    except ValueError:
        share = math.nan
    if arm is None or not 0 < share < math.inf or (at and not arm.source):
        known = [*ARMS, *NUMBERS]
        raise RunError(f"arms must be of {known}, those that add nodules perhaps with @SHARE, got {name!r}")
    return replace(arm, name=arm.name + at + text, share=share) if at else arm


def prior_file(folder: str | Path | None) -> Path:
    """Return the file of the prior beside weights; where there is none, and for None, that of the bundled one."""
    beside = BUNDLED if folder is None else Path(folder) / PRIOR
    return beside if beside.exists() else BUNDLED


@dataclass(frozen=True)
class Sources:
    """What arms may add: folders of the weights without the CARIM loss and with it, and templates.npz of CT nodules."""

    without: str | Path | None = None
    full: str | Path | None = None
    ct_nodules: str | Path | None = None

    def check(self, arm: Arm) -> None:
        """Raise RunError unless what an arm needs was given."""
        name = {"without": "without", "full": "full", "ct": "ct_nodules"}.get(arm.source)
        if name is not None and getattr(self, name) is None:
            raise RunError(f"{name} must be given for {arm.name} (--{name.replace('_', '-')}), got None")

    def hashes(self, arm: Arm) -> dict[str, str]:
        """Return the hash of the weights that an arm uses, by their name."""
        self.check(arm)
        if not arm.trained:
            return {}
        return {arm.source: NoduleGenerator.from_pretrained(getattr(self, arm.source)).weights_hash}

    def generator(self, arm: Arm, train: ImageSet) -> tuple[Any, Any]:
        """Return an arm's generator and the prior of its nodules; controls show and copy images of the train split."""
        self.check(arm)
        size, bundled = train.images.shape[-1], LocationPrior.bundled()
        if arm.trained:
            folder = getattr(self, arm.source)
            prior = LocationPrior.load(prior_file(folder))
            return NoduleGenerator.from_pretrained(folder), uniform_prior(prior) if arm.anywhere else prior
        if arm.source == "drawn-blob":
            return DrawnNodules(size), bundled
        if arm.source == "ct" and self.ct_nodules is not None:
            return SuperimposedNodules(CTNodules(self.ct_nodules), size), bundled
        if arm.source != "copied":  # an arm that adds nothing never asks its generator
            return DuplicatedImages(train.images[train.normal], train.images[train.nodule]), bundled
        rows, boxes = train.each_box()
        try:
            return CopiedNodules(train.images[rows], boxes * size), bundled
        except ValueError as error:
            raise RunError(f"data must have nodule boxes that can be copied for {arm.name}: {error}") from error


def real_images(arm: Arm, train: ImageSet, normal: int, *, seed: int) -> ImageSet:
    """Return an arm's real images: all, or the nodule images and so many normal ones, which the seed draws."""
    if not arm.balanced:
        return train
    order = torch.randperm(len(train.normal), generator=torch.Generator().manual_seed(fold(seed, 11)))
    return train.rows(torch.cat([train.nodule, train.normal[order[:normal]].sort().values]))


def arm_counts(arm: Arm, normal: int, nodule: int) -> dict[str, int]:
    """Return an arm's numbers of images by kind; raise RunError if the train split has too few normal ones."""
    n = round(arm.share * nodule)
    real = normal if not arm.balanced else nodule if arm.whole else nodule + n
    if real > normal:
        raise RunError(f"data must have at least {real} normal images to train on for {arm.name}, got {normal}")
    synthetic = n if arm.whole else 0
    return {"real normal": real, "real nodule": nodule, "synthetic normal": synthetic, "synthetic nodule": n}


def arm_batches(
    arm: Arm, train: ImageSet, sources: Sources, *, batch: int, seed: int, device: str = "cpu"
) -> tuple[Callable[[int], Iterator[tuple[Tensor, Tensor]]], Mapping[str, Any]]:
    """Return a function from the epoch to an arm's batches, and its counts (`SyntheticNoduleMix.class_counts`).

    Batches are images (B, 1, S, S) uint8 and targets (B,) int64; what does not fill one is left out of an epoch.
    """
    counts = arm_counts(arm, len(train.normal), len(train.nodule))
    images = real_images(arm, train, counts["real normal"], seed=seed)
    generator, prior = sources.generator(arm, train)
    added: dict[str, Any] = {"p": 0.0, "insertion": "whole"}
    if arm.source:
        synthetic = {"Nodule": counts["synthetic nodule"], "No Finding": counts["synthetic normal"]}
        added = {"p": None, "n_synthetic": synthetic, "insertion": arm.insertion}
    placement = "prior" if arm.anywhere else "lungs"
    added |= {"device": None if device == "cpu" else device, "dtype": "auto"}
    mix = SyntheticNoduleMix(generator, prior, placement=placement, seed=seed, **added)
    loader = mix.loader(images, batch_size=batch, shuffle=True, drop_last=True)

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.set_epoch(epoch)
        return iter(loader)

    return epoch_batches, mix.class_counts(images)
