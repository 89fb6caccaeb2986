"""The data sets that Table 2 compares: DS1 to DS4 of the source, and the controls without which a gain means nothing.

An arm is real films, and what `SyntheticNoduleMix` adds to them. Where an arm adds n nodules in real films (grafts,
duplicates, controls), n real normal films more come with them, so that classes stay balanced; whole synthetic films
come with n synthetic normal ones, as in the source. `DS4@1` is DS4 with as many synthetic nodules as real ones.

One departure: the source's synthetic films are made once; here the n places of an epoch are filled anew in each, which
is what the mix is for. So are those of the controls: DS5 draws its duplicates anew.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from carim_aug.transforms.mix import SyntheticNoduleMix
from train.common.labelled import NODULE
from train.common.run import RunError
from train.common.splits import FilmSet
from train.reproduction.controls.nodules import (
    CopiedNodules,
    DrawnNodules,
    DuplicatedFilms,
    SuperimposedNodules,
    uniform_prior,
)
from train.reproduction.table1 import load_model

SHARE = 2_000 / 5_698
"""Synthetic nodules for each real one in the source."""


@dataclass(frozen=True)
class Arm:
    """One data set.

    Attributes:
        title: in the table.
        balanced: as many normal films as nodule films, drawn by the run's seed; else all.
        source: what adds nodules: "without" or "full" (the CARIM-cGAN's weights), "duplicates", "copies", "drawn",
            "ct", or "" for nothing.
        insertion: "whole" or "graft".
        anywhere: masks at random places anywhere in the film.
    """

    title: str
    balanced: bool = True
    source: str = ""
    insertion: str = "graft"
    anywhere: bool = False

    @property
    def synthetic(self) -> bool:
        """Whether whole generated films of both classes come in."""
        return self.insertion == "whole" and self.source in ("without", "full")


ARMS: dict[str, Arm] = {
    "DS1": Arm("all real films", balanced=False),
    "DS2": Arm("real films, balanced"),
    "DS3": Arm("DS2 + films of the model without the CARIM loss", source="without", insertion="whole"),
    "DS4": Arm("DS2 + films of the full model", source="full", insertion="whole"),
    "DS3-graft": Arm("DS2 + grafts of the model without the CARIM loss", source="without"),
    "DS4-graft": Arm("DS2 + grafts of the full model", source="full"),
    "DS5": Arm("DS2 + duplicated real nodule films", source="duplicates", insertion="whole"),
    "DS6": Arm("DS2 + real nodules copied, Poisson blended", source="copies"),
    "DS7": Arm("DS2 + drawn nodules", source="drawn"),
    "DS8": Arm("DS2 + CT nodules superimposed", source="ct"),
    "DS9": Arm("DS2 + grafts of the full model at random places", source="full", anywhere=True),
}


def parsed(name: str) -> tuple[Arm, float]:
    """Gives an arm and how many synthetic nodules it has for each real one.

    Args:
        name: of `ARMS`, and perhaps "@" and a share.

    Raises:
        RunError: no such arm, or a share that is no number above 0.
    """
    known, at, share = name.partition("@")
    try:
        wanted = float(share) if at else SHARE
    except ValueError:
        wanted = -1.0
    if known not in ARMS or not 0 < wanted < math.inf or (at and not ARMS[known].source):
        raise RunError(f"arms must be of {list(ARMS)}, those that add nodules perhaps with @SHARE, got {name!r}")
    return ARMS[known], wanted if ARMS[known].source else 0.0


@dataclass(frozen=True)
class Sources:
    """What arms may add.

    Attributes:
        without: folder of the model without the CARIM loss, or None where no arm asks for it.
        full: folder of the full model.
        ct_nodules: templates.npz.
    """

    without: str | Path | None = None
    full: str | Path | None = None
    ct_nodules: str | Path | None = None

    def lacking(self, arm: Arm) -> str | None:
        """Gives the name of what an arm needs and was not given, or None."""
        name = {"without": "without", "full": "full", "ct": "ct_nodules"}.get(arm.source)
        return name if name is not None and getattr(self, name) is None else None

    def hashes(self, arm: Arm) -> dict[str, str]:
        """Gives the hash of the weights that an arm uses."""
        if arm.source not in ("without", "full"):
            return {}
        return {arm.source: self._trained(arm.source)[0].weights_hash}

    def generator(self, arm: Arm, train: FilmSet) -> tuple[Any, LocationPrior]:
        """Gives an arm's generator, and the prior of its masks.

        Args:
            arm: one that adds nodules.
            train: films of the train split, for controls that show or copy them.

        Raises:
            RunError: what the arm needs was not given.
        """
        if (missing := self.lacking(arm)) is not None:
            raise RunError(f"{missing} must be given for this arm (--{missing.replace('_', '-')}), got None")
        nodule = train.findings[:, NODULE] > 0
        normal, bundled = train.images[~nodule], LocationPrior.bundled()
        if arm.source in ("without", "full"):
            generator, prior = self._trained(arm.source)
            return generator, uniform_prior(prior) if arm.anywhere else prior
        if arm.source == "duplicates":
            return DuplicatedFilms(normal, train.images[nodule]), bundled
        if arm.source == "drawn":
            return DrawnNodules(normal), bundled
        if arm.source == "ct" and self.ct_nodules is not None:
            return SuperimposedNodules(normal, CTNodules(self.ct_nodules)), bundled
        boxed = [i for i, boxes in enumerate(train.prior.boxes) if len(boxes)]
        if not boxed:
            raise RunError("data must have nodule boxes in the train split for DS6, got none")
        rows = torch.tensor([i for i in boxed for _ in train.prior.boxes[i]])
        boxes = torch.cat([train.prior.boxes[i] for i in boxed]) * train.images.shape[-1]
        try:
            return CopiedNodules(normal, train.images[rows], boxes), bundled
        except ValueError as error:
            raise RunError(f"data must have nodule boxes that can be copied for DS6: {error}") from error

    def _trained(self, which: str) -> tuple[Any, LocationPrior]:
        folder = self.without if which == "without" else self.full
        if folder is None:
            raise RunError(f"{which} must be given for this arm (--{which}), got None")
        beside = Path(folder) / "prior.safetensors"
        return load_model(folder), LocationPrior.load(beside) if beside.exists() else LocationPrior.bundled()


def real_films(arm: Arm, train: FilmSet, normals: int, *, seed: int) -> FilmSet:
    """Gives an arm's real films: all, or the nodule films and so many normal ones, which the seed draws."""
    if not arm.balanced:
        return train
    nodule = train.findings[:, NODULE] > 0
    normal = (~nodule).nonzero()[:, 0]
    order = torch.randperm(len(normal), generator=torch.Generator().manual_seed(fold(seed, 11)))
    return train.rows(torch.cat([nodule.nonzero()[:, 0], normal[order[:normals]].sort().values]))


def arm_counts(name: str, normal: int, nodule: int) -> dict[str, int]:
    """Gives an arm's films of a train split with so many normal and nodule ones.

    Returns:
        "real normal", "real nodule", "synthetic normal", "synthetic nodule".

    Raises:
        RunError: there are not so many normal films.
    """
    arm, share = parsed(name)
    n = round(share * nodule)
    real = normal if not arm.balanced else nodule if arm.synthetic else nodule + n
    if real > normal:
        raise RunError(f"data must have at least {real} normal films to train on for {name}, got {normal}")
    return {
        "real normal": real,
        "real nodule": nodule,
        "synthetic normal": n if arm.synthetic else 0,
        "synthetic nodule": n,
    }


def arm_batches(
    name: str, train: FilmSet, sources: Sources, *, batch: int, seed: int, device: str = "cpu", bf16: bool = True
) -> tuple[Callable[[int], Iterator[tuple[Tensor, Tensor]]], Mapping[str, Any]]:
    """Gives a function from the epoch to an arm's batches, and its counts of films.

    Args:
        name: see `parsed`.
        train: films of the train split.
        sources: what arms may add.
        batch: films a step; the rest of an epoch that does not fill one is left out.
        seed: of the normal films, the order, and all that is synthetic.
        device: where to generate.
        bf16: generate in bfloat16.

    Returns:
        Batches of films (B, 1, S, S) uint8 and targets (B,) int64; and counts, as `SyntheticNoduleMix.class_counts` has
        them.

    Raises:
        RunError: something that the arm needs is missing.
    """
    arm, _ = parsed(name)
    nodule = sum(train.targets)
    counts = arm_counts(name, len(train) - nodule, nodule)
    films = real_films(arm, train, counts["real normal"], seed=seed)
    if arm.source:
        generator, prior = sources.generator(arm, train)
    else:  # nothing is generated: any generator will do
        generator, prior = DuplicatedFilms(films.images, films.images), LocationPrior.bundled()
    added = {"Nodule": counts["synthetic nodule"], "No Finding": counts["synthetic normal"]}
    mix = SyntheticNoduleMix(
        generator,
        prior,
        p=None if arm.source else 0.0,
        n_synthetic=added if arm.source else None,
        insertion=arm.insertion if arm.source else "whole",
        placement="prior" if arm.anywhere else "host",
        seed=seed,
        device=None if device == "cpu" else device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    loader = mix.loader(films, batch_size=batch, shuffle=True, drop_last=True)

    def epoch_of(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.set_epoch(epoch)
        return iter(loader)

    return epoch_of, mix.class_counts(films)
