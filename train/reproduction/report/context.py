"""What all sections of a report share: its numbers, the models, real images, figures computed before, pictures."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from train.classifier.encoders import KINDS
from train.common.cache import Code, FigureCache, digest_files, find_sources
from train.common.images import ImageSet, read_images
from train.common.run import RunError
from train.metrics.generator_quality import FigurePreset
from train.reproduction.patches import PatchPreset
from train.reproduction.table2.arms import prior_file
from train.reproduction.tables import Table

CLASSES = ("normal", "nodule")


@dataclass(frozen=True)
class ReportPreset:
    """How much is done for every figure; of the tables and figures of Ann (2021), usually as much as there."""

    figures: FigurePreset = field(default_factory=FigurePreset)
    patches: PatchPreset = field(default_factory=lambda: PatchPreset(steps=400, patches=2500, seeds=2))
    hits: int = 300  # nodules of each source that the net of real boxes looks for
    speed: tuple[str, ...] = ("fast128", "fast256", "thesis256")  # presets of `train.gan.presets` that are timed
    times: int = 3  # calls whose median is the time
    table1: FigurePreset = field(default_factory=lambda: FigurePreset(pairs=1_000))  # pairs: images of each class
    points: int = 1_000  # images of each class of Figures 4 and 5
    perplexity: float = 30.0  # of their t-SNE
    neighbours: int = 10  # of each of their points
    pairs: int = 300  # matched pairs of Figure 6
    maps: int = 2_000  # nodule images of Figure 7


_FEW = FigurePreset(pairs=12, moved=6, splits=3, draws=20, batch=8)
_TINY = ReportPreset(_FEW, PatchPreset(steps=2, patches=20, seeds=1), hits=10, speed=("tiny",), times=1, table1=_FEW)

PRESETS: dict[str, ReportPreset] = {
    "usual": ReportPreset(),
    "tiny": replace(_TINY, points=12, perplexity=4.0, neighbours=3, pairs=8, maps=8),
}


@cache
def digest_code(module: str) -> str:
    """Return the SHA-256 of the files of a module, by its name, and of all modules of ours that it imports."""
    return digest_files(find_sources(sys.modules[module]))


@dataclass
class Model:
    """A trained generator, the prior beside it, and what its figures depend on."""

    generator: Any
    prior: LocationPrior
    key: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path | None) -> "Model":
        """Return the model of a folder of weights; None: the bundled one."""
        generator, file = NoduleGenerator.from_pretrained(folder), prior_file(folder)
        key = {"weights": generator.weights_hash, "prior": digest_files([file])}
        return cls(generator, LocationPrior.load(file), {**key, "code": digest_code(generator.__module__)})


class Report:
    """What the sections share of what a command line (`train.reproduction.report`) asks for.

    Its models are those of `--weights`, by name. Sections add pictures, by title, PIL or (1, H, W) float in [-1, 1],
    some of which hold real X-rays, and tables that are written as CSV.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.preset = options, PRESETS[options.preset]
        if options.maps is not None:
            self.preset = replace(self.preset, maps=options.maps)
        self.encoders = {kind: Path(options.encoders) / f"{kind}.safetensors" for kind in KINDS}
        for file in self.encoders.values():
            if not file.exists():
                wanted = f"{file.name} (python -m train.classifier.encoders)"
                raise RunError(f"--encoders must hold {wanted}, got {options.encoders}")
        folders = {name_of(folder): folder or None for folder in options.weights}
        if len(folders) != len(options.weights):
            raise RunError(f"--weights must be different folders, got {options.weights}")
        for pair in options.classifiers:
            if "=" not in pair:
                raise RunError(f"--classifiers must be NAME=FILE each, got {pair!r}")
        self.classifiers = dict(pair.split("=", 1) for pair in options.classifiers)
        self.models = {name: Model.load(folder) for name, folder in folders.items()}
        self.ct = CTNodules(options.ct_nodules) if options.ct_nodules else None
        data = digest_files(sorted(Path(options.data).glob("*.csv")))
        self.cache = FigureCache(Path(options.out) / "figures", {"data": data, "test": sorted(options.test)})
        self.pictures: dict[str, Image.Image | Tensor] = {}
        self.tables: dict[str, Table] = {}
        self._images: dict[int, tuple[ImageSet, ImageSet, ImageSet]] = {}

    def images(self, size: int) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Return training images, held-out ones, and both, reduced to a size; they are read once."""
        if size not in self._images:
            both = read_images(self.options.data, ["train", *self.options.test], size)
            trained = torch.tensor([split == "train" for split in both.splits])
            train, held_out = (both.rows(part.nonzero()[:, 0]) for part in (trained, ~trained))
            self._images[size] = train, held_out, both
        return self._images[size]

    def images_of(self, size: int, name: str) -> tuple[ImageSet, ImageSet]:
        """Return training and held-out images of a class of `CLASSES`, reduced to a size."""
        train, held_out, _ = self.images(size)
        for part, images in (("training", train), ("held-out", held_out)):
            images.check(f"{self.options.data}: {part} images", **{name: 4})
        return train.rows(getattr(train, name)), held_out.rows(getattr(held_out, name))

    def figure(self, name: str, compute: Callable[[], Any], model: Model, *, by: Code, **settings: Any) -> Any:
        """Return a figure of a model, computed by some code if it is not there (`FigureCache.figure`)."""
        return self.cache.figure(name, compute, by=by, **model.key, **settings)


def name_of(folder: str) -> str:
    """Return what weights are called in tables: the run's folder, or "bundled" for an empty name."""
    path = Path(folder)
    return "bundled" if not folder else path.parent.name if path.name == "export" else path.name
