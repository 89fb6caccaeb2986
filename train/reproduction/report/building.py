"""All figures: `python -m train.reproduction.report --data FOLDER --weights A [B ...] --encoders FOLDER --out runs/report`.

With `--table1` (folder of `train.reproduction.baselines.command`) and `--table2` (of `train.reproduction.table2.training`) also every table and figure of the
source, beside its own figures, and their tables as CSV; `--sections reproduction` gives these alone. Writes
figures.json, report.md (the tables that README quotes) and report.html (with pictures: they hold real X-rays, so keep
them where the data are). A figure that was computed once is kept in OUT/kept under the hash of its weights,
settings and code, and read back the next time. Weights given first and second are stage 1 and stage 2, if they are.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import BUNDLED, LocationPrior
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import read_sealed, write_sealed
from carim_aug.tools.plots import contact_sheet
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import KINDS, features_of, load_encoder
from train.classifier.training import NODULE, LabelledFilms, read_labelled
from train.common.cache import Kept, digest_of
from train.common.run import git_commit
from train.metrics.generator_quality import (
    Features,
    FigurePreset,
    Pairs,
    contrasts,
    map_figures,
    matched_pairs,
    pair_figures,
    pixels,
    realism,
    repeats,
)
from train.metrics.generator_quality import share as share_of
from train.metrics.patches import PatchNet
from train.reproduction.patches import (
    HeldOut,
    PatchPreset,
    held_out_patches,
    hits,
    learnt,
    placed_patches,
    prior_places,
    worth,
)
from train.reproduction.report.reproduction import (
    Models,
    ReproductionPreset,
    of_models,
    pictures_of,
    reproduction_rows,
    reproduction_text,
    write_csvs,
)
from train.reproduction.report.tables import markdown, page
from train.reproduction.sources import (
    Patients,
    Source,
    blob_source,
    ct_source,
    graft_source,
    read_patients,
    scaled,
    whole_source,
)
from train.reproduction.table2.table import table2

SECTIONS = ("weights", "patches", "speed", "reproduction")

CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda labels: ~labels.any(dim=1),
    "nodule": lambda labels: labels[:, NODULE] > 0,
}


@dataclass(frozen=True)
class ReportPreset:
    """How much is done for every figure.

    Attributes:
        figures: numbers of `train.metrics.generator_quality`.
        patches: numbers of the patch classifiers.
        hits: nodules of each source that the net of real boxes looks for.
        speed: presets of `train.gan.presets` that are timed.
        times: calls whose median is the time.
        reproduction: numbers of the source's tables and figures.
    """

    figures: FigurePreset = field(default_factory=FigurePreset)
    patches: PatchPreset = field(default_factory=lambda: PatchPreset(steps=400, patches=2500, seeds=2))
    hits: int = 300
    speed: tuple[str, ...] = ("fast128", "fast256", "thesis256")
    times: int = 3
    reproduction: ReproductionPreset = field(default_factory=ReproductionPreset)


PRESETS: dict[str, ReportPreset] = {
    "usual": ReportPreset(),
    "tiny": ReportPreset(
        FigurePreset(pairs=16, moved=8, splits=3, draws=20, batch=8),
        PatchPreset(steps=2, patches=20, seeds=1),
        hits=10,
        speed=("tiny",),
        times=1,
        reproduction=ReproductionPreset(
            FigurePreset(pairs=12, splits=3, draws=20, batch=8),
            pairs=8,
            points=12,
            maps=8,
            perplexity=4.0,
            neighbours=3,
        ),
    ),
}


class Real:
    """Real films, read when they are asked for.

    Args:
        root: ChestX-ray14's layout.
        test: splits of the held-out films.
    """

    def __init__(self, root: str | Path, test: list[str]) -> None:
        """Reads nothing yet."""
        self.root, self.test = Path(root), test
        self._films: dict[int, tuple[LabelledFilms, LabelledFilms]] = {}

    def films(self, size: int, name: str) -> tuple[LabelledFilms, LabelledFilms]:
        """Gives training and held-out films of a class, reduced to a size."""
        if size not in self._films:
            parts = [read_labelled(self.root, split, size) for split in ["train", *self.test]]
            self._films[size] = parts[0], _joined(parts[1:])
        both = []
        for films in self._films[size]:
            rows = CLASSES[name](films.labels).nonzero()[:, 0]
            if len(rows) < 4:
                raise ValueError(f"{self.root}: at least 4 {name} films are needed on each side, got {len(rows)}")
            boxes = [films.boxes[i] for i in rows.tolist()]
            both.append(LabelledFilms(films.images[rows], films.labels[rows], boxes, films.patients[rows]))
        return both[0], both[1]

    @cached_property
    def train(self) -> Patients:
        """Training films at 256 pixels."""
        return read_patients(self.root, ["train"])

    @cached_property
    def held_out(self) -> Patients:
        """Held-out films at 256 pixels."""
        return read_patients(self.root, self.test)

    @cached_property
    def all_boxes(self) -> Patients:
        """Boxes of training and held-out films."""
        return read_patients(self.root, ["train", *self.test])


def _joined(parts: list[LabelledFilms]) -> LabelledFilms:
    boxes = [b for part in parts for b in part.boxes]
    images, labels, patients = (torch.cat([getattr(p, n) for p in parts]) for n in ("images", "labels", "patients"))
    return LabelledFilms(images, labels, boxes, patients)


def of_weights(
    folder: str | None, real: Real, kept: Kept, preset: ReportPreset, options: argparse.Namespace
) -> dict[str, Any]:
    """Gives all figures of one generator but those of the patch classifiers."""
    generator, prior = NoduleGenerator.from_pretrained(folder), prior_of(folder)
    size, key = generator.image_size, {"weights": generator.weights_hash, "prior": digest_of([prior_path(folder)])}
    numbers = asdict(preset.figures)
    made: list[Pairs] = []
    seen: dict[tuple[str, str], Features] = {}

    def pairs() -> Pairs:
        if not made:
            made.append(matched_pairs(generator, prior, preset.figures))
        return made[0]

    figures: dict[str, Any] = {"hash": generator.weights_hash, "size": size, "realism": {}, "repeats": {}}
    recipe = generator.provenance.get("recipe") or {}
    figures["recipe"] = {name: recipe.get(name) for name in ("stage", "images_seen", "architecture")}
    files = {kind: Path(options.encoders) / f"{kind}.safetensors" for kind in KINDS}

    def features(name: str, space: str) -> Features:
        if (name, space) not in seen:
            images = pairs().nodule if name == "nodule" else pairs().without
            encode = pixels if space == "pixels" else partial(features_of, load_encoder(files[space]))
            seen[name, space] = Features.of(encode, images, *real.films(size, name))
        return seen[name, space]

    for name in CLASSES:
        for space in [*KINDS, "pixels"]:
            told = {**key, "preset": numbers, "encoder": digest_of([files[space]]) if space in files else ""}
            judged = {"repeats": repeats} if space == "pixels" else {"realism": realism, "repeats": repeats}
            for part, judge in judged.items():
                row = kept.figure(
                    f"{part}-{name}-{space}",
                    lambda j=judge, n=name, s=space: j(features(n, s), preset.figures),
                    **told,
                )
                figures[part][f"{name}, {space}"] = row
    figures["pairs"] = kept.figure("pairs", lambda: pair_figures(pairs(), preset.figures), **key, preset=numbers)
    ct = CTNodules(options.ct_nodules) if options.ct_nodules else None
    figures["contrasts"] = kept.figure(
        "contrasts", lambda: contrasts(pairs(), real.all_boxes, ct), **key, preset=numbers, ct=ct is not None
    )
    if options.classifier:
        classifier = ChestClassifier.load(options.classifier)
        figures["maps"] = kept.figure(
            "maps",
            lambda: map_figures(pairs(), classifier, preset.figures, finding="Nodule"),
            **key,
            preset=numbers,
            classifier=digest_of([Path(options.classifier)]),
        )
    return figures


def of_patches(
    weights: dict[str, str | None], real: Real, kept: Kept, preset: ReportPreset, options: argparse.Namespace
) -> dict[str, Any]:
    """Gives what each source teaches a patch classifier, and how many of each the one of real boxes finds."""
    places = prior_places(LocationPrior.bundled())
    numbers, held_out, nets = asdict(preset.patches), [], []

    def test() -> HeldOut:
        if not held_out:
            held_out.append(held_out_patches(real.held_out, places))
        return held_out[0]

    def of_real_boxes() -> list[PatchNet]:
        path = kept.path("nets", ".safetensors", "patches", preset=numbers)
        if not nets and path.exists():
            arrays = read_sealed(path)[0]
            for seed in range(preset.patches.seeds):
                net = PatchNet()
                net.load_state_dict({k: torch.from_numpy(arrays[f"{seed}.{k}"].copy()) for k in net.state_dict()})
                nets.append(net.eval())
        elif not nets:
            nets.extend(learnt(real.train, places, None, preset.patches, "real boxes"))
            state = {f"{i}.{k}": np.asarray(v) for i, net in enumerate(nets) for k, v in net.state_dict().items()}
            write_sealed(path, state, {})
        return nets

    # What is learnt from each source, on real boxes.
    hashes = {name: {"weights": NoduleGenerator.from_pretrained(f).weights_hash} for name, f in weights.items()}
    sources: dict[str, tuple[Source | None, dict[str, str]]] = {"real boxes": (None, {})}
    sources["drawn blob"] = blob_source, {}
    if options.ct_nodules:
        sources["CT nodules superimposed"] = ct_source(options.ct_nodules), {}
    for name, folder in weights.items():
        sources[f"grafts of {name}"] = graft_source(folder), hashes[name]
    rows = {}
    for name, (source, key) in sources.items():

        def value(name: str = name, source: Source | None = source) -> dict[str, Any]:
            taught = of_real_boxes() if source is None else learnt(real.train, places, source, preset.patches, name)
            return worth(taught, test())

        rows[name] = kept.figure("worth", value, code="patches", source=name.split(" of ")[0], preset=numbers, **key)

    # What the net that learnt real boxes finds.
    for name, folder in weights.items():
        sources[f"films of {name}"] = whole_source(folder), hashes[name]
        sources[f"films without a mask of {name}"] = whole_source(folder, nodule=False), hashes[name]
    found = {}
    for name, (source, key) in sources.items():

        def value(source: Source | None = source) -> dict[str, Any]:
            stream = torch.Generator().manual_seed(fold(0, 25))
            patches = test().real
            if source is not None:
                patches = placed_patches(real.held_out, places, source, preset.hits, stream)
            return {"n": len(patches), **share_of(hits(of_real_boxes(), patches, test().normal))}

        settings = {"source": name.split(" of ")[0], "preset": numbers, "hits": preset.hits, **key}
        found[name] = kept.figure("hits", value, code="patches", **settings)
    boxes = {"train": len(real.train.boxes), "held-out": len(real.held_out.boxes)}
    return {"worth": rows, "hits": found, "boxes": boxes, "places": 4 * len(real.held_out.normal)}


def of_speed(kept: Kept, preset: ReportPreset, options: argparse.Namespace) -> dict[str, Any]:
    """Gives throughput and memory by preset, each in a process of its own."""

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "train.gan.throughput", "--preset", name, "--times", str(preset.times)]
        command += ["--device", options.device, *(["--classifier", options.classifier] if options.classifier else [])]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"train.gan.throughput --preset {name} failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    settings = {"device": options.device, "classifier": bool(options.classifier), "times": preset.times}
    return {
        name: kept.figure(f"speed-{name}", lambda n=name: run(n), code="speed", **settings) for name in preset.speed
    }


def pictures(folder: str | None, figures: dict[str, Any], real: Real, preset: ReportPreset) -> dict[str, Any]:
    """Gives PIL pictures: a contact sheet, and the films nearest to training ones beside these."""
    generator, prior = NoduleGenerator.from_pretrained(folder), prior_of(folder)
    hosts = scaled(real.held_out.normal[:6])
    sheets = {"Pairs and grafts": contact_sheet((generator, prior), hosts, n=min(6, len(hosts)))}
    made = matched_pairs(generator, prior, preset.figures)
    for name, images in (("normal", made.without), ("nodule", made.nodule)):
        train, _ = real.films(generator.image_size, name)
        closest = figures["repeats"][f"{name}, pixels"]["closest"]
        rows = [torch.stack([images[g], scaled(train.images[t])]) for g, t in closest]
        sheets[f"Generated {name} films (above) and their nearest training films (below), in pixels"] = torch.cat(
            [torch.cat(list(F.pad(pair, (2, 2, 2, 2))), dim=1) for pair in rows], dim=2
        )
    return sheets


def of_source(
    weights: dict[str, str | None],
    real: Real,
    kept: Kept,
    preset: ReproductionPreset,
    options: argparse.Namespace,
    sheets: dict[str, Any],
) -> dict[str, Any]:
    """Gives the source's tables and figures from the runs there are; adds its pictures to `sheets`."""
    figures: dict[str, Any] = {}
    if options.table1:
        models = Models.read(options.table1, weights, full=options.figures_of)
        for pair in options.classifiers:
            if "=" not in pair:
                raise ValueError(f"--classifiers must be NAME=FILE each, got {pair!r}")
        classifiers = dict(pair.split("=", 1) for pair in options.classifiers)
        figures |= of_models(
            models, real.films, real.held_out, kept, preset, encoders=options.encoders, classifiers=classifiers
        )
        sheets |= pictures_of(models, figures, real.held_out, preset)
    if options.table2:
        figures["table2"] = table2(options.table2, options.table2_part)
    return figures


def prior_path(folder: str | None) -> Path:
    """Gives the file of the prior that lies beside weights, or the bundled one's."""
    beside = Path(folder) / "prior.safetensors" if folder else None
    return beside if beside is not None and beside.exists() else BUNDLED


def prior_of(folder: str | None) -> LocationPrior:
    """Gives the prior of some weights."""
    return LocationPrior.load(prior_path(folder))


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Computes what is missing, writes all three files, and gives the figures."""
    started, out, preset = time.monotonic(), Path(options.out), PRESETS[options.preset]
    if options.maps is not None:
        preset = replace(preset, reproduction=replace(preset.reproduction, maps=options.maps))
    for kind in KINDS:
        if not (Path(options.encoders) / f"{kind}.safetensors").exists():
            raise ValueError(
                f"--encoders must hold {kind}.safetensors (python -m train.classifier.encoders), got {options.encoders}"
            )
    weights = {name_of(folder): folder or None for folder in options.weights}
    if len(weights) != len(options.weights):
        raise ValueError(f"--weights must be different folders, got {options.weights}")
    tables = sorted(Path(options.data).glob("*.csv"))
    kept = Kept(out / "kept", {"data": digest_of(tables), "test": sorted(options.test)})
    real = Real(options.data, options.test)

    figures: dict[str, Any] = {"test": options.test, "git_commit": git_commit(), "preset": asdict(preset)}
    figures["encoders"] = json.loads((Path(options.encoders) / "report.json").read_text())
    sheets: dict[str, Any] = {}
    if "weights" in options.sections:
        figures["weights"] = {name: of_weights(folder, real, kept, preset, options) for name, folder in weights.items()}
        for name, folder in weights.items():
            for title, sheet in pictures(folder, figures["weights"][name], real, preset).items():
                sheets[f"{name}: {title}"] = sheet
    if "patches" in options.sections:
        figures["patches"] = of_patches(weights, real, kept, preset, options)
    if "speed" in options.sections:
        figures["speed"] = of_speed(kept, preset, options)
    if "reproduction" in options.sections:
        figures["reproduction"] = of_source(weights, real, kept, preset.reproduction, options, sheets)
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    text = markdown(figures)
    if "reproduction" in figures:
        text += "\n" + "\n\n".join(reproduction_text(figures["reproduction"])) + "\n"
        write_csvs(reproduction_rows(figures["reproduction"]), out)
    (out / "report.md").write_text(text)
    (out / "report.html").write_text(page(text, sheets))
    print(f"{kept.computed} figures computed in {math.ceil(time.monotonic() - started)} s: {out / 'report.md'}")
    return figures


def name_of(folder: str) -> str:
    """Gives what weights are called in tables: the run's folder, or "bundled" for an empty name."""
    path = Path(folder)
    return "bundled" if not folder else path.parent.name if path.name == "export" else path.name


def parser() -> argparse.ArgumentParser:
    """Gives the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="usual")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with splits and boxes")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--weights", nargs="+", default=[""], help="folders of generators; '' is the bundled one")
    parser.add_argument("--classifier", help="file of the classifier whose maps are looked at")
    parser.add_argument("--table1", help="folder of train.reproduction.baselines.command: Table 1 and Figures 3 to 7")
    parser.add_argument("--figures-of", default="carim", help="model of Figures 4 to 7, by its name in Table 1")
    parser.add_argument("--maps", type=int, help="nodule films of Figure 7, in place of the source's 2,000")
    parser.add_argument("--table2", help="folder of train.reproduction.table2.training: Table 2")
    parser.add_argument("--table2-part", default="test", choices=("val", "test"), help="films of Table 2")
    parser.add_argument(
        "--classifiers",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="classifiers of Figure 7: that of the CARIM loss, and others that training never saw",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--encoders", required=True, help="folder that train.classifier.encoders wrote")
    parser.add_argument("--test", nargs="+", default=["val"], help="held-out splits; 'val test' for final figures")
    parser.add_argument("--out", default="runs/report")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the timings")
    return parser


if __name__ == "__main__":
    report(parser().parse_args())
