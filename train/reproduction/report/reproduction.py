"""Every table and figure of the source from saved runs, each beside the source's own figure (METHOD 8).

Table 1 and Figures 3 to 6 of the models that `train.reproduction.baselines.command` trained, Figure 7 of the CARIM-cGAN, Table 2 of the runs
of `train.reproduction.table2.training`. Part of `train.reproduction.report.building`.
"""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from carim_aug.location.prior import BUNDLED, LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.training import LabelledFilms
from train.common.cache import Kept, digest_of
from train.metrics.generator_quality import FigurePreset
from train.reproduction.baselines.command import MODELS
from train.reproduction.figures.cam import COMPARISONS, activation_inside, histograms
from train.reproduction.figures.same_noise import difference_figures, difference_grid, same_noise_grid
from train.reproduction.figures.tsne import CONTROL, embed, embedding_figures, film_sets, scatter
from train.reproduction.report.tables import Row, number, spanned, table
from train.reproduction.sources import Patients
from train.reproduction.table1 import load_model, table1_row, table1_rows, table1_text
from train.reproduction.table2.table import table2_rows, table2_text

COLUMNS = 6
"""Samples of Figure 3; fewer where fewer patients have real ones to stand beside."""


@dataclass(frozen=True)
class ReproductionPreset:
    """How much is done; the usual numbers are the source's.

    Attributes:
        films: numbers of Table 1: `pairs` films of each class.
        pairs: matched pairs of Figure 6.
        points: films of each class of Figures 4 and 5.
        maps: nodule films of Figure 7.
        perplexity: of t-SNE.
        neighbours: of each point of Figures 4 and 5.
    """

    films: FigurePreset = field(default_factory=lambda: FigurePreset(pairs=1_000))
    pairs: int = 300
    points: int = 1_000
    maps: int = 2_000
    perplexity: float = 30.0
    neighbours: int = 10


@dataclass
class Models:
    """Trained models by name, each with the prior beside it.

    Attributes:
        generators: by name.
        priors: by name.
        prior_files: by name.
        full: which of them Figures 4 to 7 are of.
    """

    generators: dict[str, Any]
    priors: dict[str, LocationPrior]
    prior_files: dict[str, Path]
    full: str

    @classmethod
    def read(
        cls, folder: str | Path, more: Mapping[str, str | Path | None] | None = None, *, full: str = "carim"
    ) -> "Models":
        """Gives the models of `train.reproduction.baselines.command` that are there, in Table 1's order, and further ones.

        Args:
            folder: that the baselines were trained into.
            more: names and folders of weights; None: the bundled ones.
            full: name of the model that Figures 4 to 7 are of.

        Raises:
            WeightsError: damaged weights.
            ValueError: there is none, or none of the name `full`.
        """
        paths: dict[str, str | Path | None] = {
            name: Path(folder) / name / "export"
            for name in MODELS
            if (Path(folder) / name / "export" / "model.safetensors").exists()
        }
        if not paths:
            raise ValueError(
                f"--table1 must be a folder of train.reproduction.baselines.command with trained models, got {folder}"
            )
        paths |= more or {}
        files = {name: Path(path) / "prior.safetensors" if path else BUNDLED for name, path in paths.items()}
        files = {name: path if path.exists() else BUNDLED for name, path in files.items()}
        generators = {name: load_model(path) for name, path in paths.items()}
        priors = {name: LocationPrior.load(path) for name, path in files.items()}
        if full not in generators:
            raise ValueError(f"--figures-of must be one of {list(generators)}, got {full!r}")
        return cls(generators, priors, files, full)


def of_models(
    models: Models,
    films: Callable[[int, str], tuple[LabelledFilms, LabelledFilms]],
    real: Patients,
    kept: Kept,
    preset: ReproductionPreset,
    *,
    encoders: str | Path,
    classifiers: Mapping[str, str | Path],
) -> dict[str, Any]:
    """Gives the figures of Table 1 and of Figures 4 to 7.

    Args:
        models: trained.
        films: from size and class to training and held-out films.
        real: held-out normal films and boxed nodules.
        kept: where figures are kept.
        preset: how much is done.
        encoders: folder of `train.classifier.encoders`.
        classifiers: names and files: that of the CARIM loss, and others.
    """
    figures: dict[str, Any] = {"table1": {}, "figure6": {}}
    files = digest_of(sorted(Path(encoders).glob("*.safetensors")))

    def keep(name: str, model: str, compute: Callable[[], Any], **settings: Any) -> Any:
        told = {"weights": models.generators[model].weights_hash, "prior": digest_of([models.prior_files[model]])}
        return kept.figure(name, compute, code="reproduction", **told, **settings)

    for name, generator in models.generators.items():
        prior = models.priors[name]
        figures["table1"][name] = keep(
            "table1",
            name,
            lambda g=generator, p=prior: table1_row(g, p, films, real, encoders, preset.films),
            preset=asdict(preset.films),
            encoders=files,
        )
        figures["figure6"][name] = keep(
            "figure6", name, lambda g=generator, p=prior: difference_figures(g, p, n=preset.pairs), n=preset.pairs
        )
    full = models.full
    generator, prior = models.generators[full], models.priors[full]
    figures["full"] = full

    def neighbours() -> dict[str, Any]:
        sets = film_sets(generator, prior, real, n=preset.points)
        return {
            name: embedding_figures(embed(part, perplexity=preset.perplexity), k=preset.neighbours)
            for name, part in (("figure4", sets.films), ("figure5", sets.crops))
        }

    figures |= keep("figures45", full, neighbours, n=preset.points, perplexity=preset.perplexity, k=preset.neighbours)
    if classifiers:
        figures["figure7"] = keep(
            "figure7",
            full,
            lambda: activation_inside(
                generator,
                prior,
                {name: ChestClassifier.load(path) for name, path in classifiers.items()},
                n=preset.maps,
            ),
            n=preset.maps,
            classifiers={name: digest_of([Path(path)]) for name, path in classifiers.items()},
        )
    return figures


def pictures_of(
    models: Models, figures: Mapping[str, Any], real: Patients, preset: ReproductionPreset
) -> dict[str, Image.Image]:
    """Gives Figures 3 to 7 as pictures by title; some hold real X-rays."""
    full = models.full
    generator, prior = models.generators[full], models.priors[full]
    named = {MODELS.get(name, name): g for name, g in models.generators.items()}
    columns = min(COLUMNS, len(real.normal_patients.unique()), len(real.nodule_patients.unique()))
    sheets = {
        "Figure 3: the same noise without and with a nodule": same_noise_grid(named, prior, real=real, columns=columns),
        f"Figure 6: difference maps of the {MODELS.get(full, full)}": difference_grid(generator, prior),
    }
    sets = film_sets(generator, prior, real, n=preset.points)
    crops = {name: images for name, images in sets.crops.items() if name != CONTROL}
    for title, part in (("Figure 4: t-SNE of films", sets.films), ("Figure 5: t-SNE of crops", crops)):
        sheets[title] = scatter(embed(part, perplexity=preset.perplexity), title=title)
    if "figure7" in figures:
        title = "Figure 7: class activation inside and outside the mask"
        sheets[title] = histograms(figures["figure7"], title=title)
    return dict(sorted(sheets.items()))


def reproduction_rows(figures: Mapping[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    """Gives all tables of the reproduction by title: header, cells split at |, and rows."""
    tables: dict[str, tuple[str, list[Row]]] = {}
    if "table1" in figures:
        tables |= table1_rows(figures["table1"])
        tables |= _neighbours(figures) | _differences(figures["figure6"])
    if "figure7" in figures:
        tables |= _activations(figures["figure7"])
    if "table2" in figures:
        tables |= table2_rows(figures["table2"])
    return tables


def reproduction_text(figures: Mapping[str, Any]) -> list[str]:
    """Gives the report's blocks of the reproduction."""
    blocks = []
    if "table1" in figures:
        blocks += table1_text(figures["table1"])
        blocks += ["## Figures 3 to 7", f"Figures 4 to 7 are of: {MODELS.get(figures['full'], figures['full'])}."]
        shown = _neighbours(figures) | _differences(figures["figure6"])
        shown |= _activations(figures["figure7"]) if "figure7" in figures else {}
        for title, (header, rows) in shown.items():
            blocks += [f"### {title}", table(header, rows)]
    if "table2" in figures:
        blocks += table2_text(figures["table2"])
    return blocks


def write_csvs(tables: Mapping[str, tuple[str, list[Row]]], folder: Path) -> list[Path]:
    """Writes one CSV file a table, named after the start of its title, and gives their paths."""
    paths = []
    for title, (header, rows) in tables.items():
        name = re.sub("[^a-z0-9]+", "-", title.partition(":")[0].lower())
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split("|"), *rows])
        paths.append(path)
    return paths


def _neighbours(figures: Mapping[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    tables = {}
    for name, what in (("figure4", "Figure 4, films"), ("figure5", "Figure 5, crops")):
        rows = [
            [
                question.replace("|", "among"),
                space,
                spanned(f),
                number(f["expected"]),
                number(f["ratio"]),
                number(f["p"]),
            ]
            for question, of in figures[name]["neighbours"].items()
            for space, f in of.items()
        ]
        header = f"whose {figures[name]['k']} nearest neighbours among whom|in|share of the other set|if they were one"
        tables[f"{what}: how far the sets mix (source: a picture)"] = (f"{header}|ratio|p", rows)
    return tables


def _differences(figures: Mapping[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    rows = [
        [
            MODELS.get(name, name),
            "yes" if f["places"] else "no",
            spanned(f["energy"]),
            number(f["energy_chance"]["value"]),
            spanned(f["hit"]),
            number(f["hit_chance"]["value"]),
        ]
        for name, f in figures.items()
    ]
    header = "model|knows the mask|share of the difference in the mask + 1/4|the mask's own share|brightest pixel in it"
    return {"Figure 6: where the difference lies (source: brightest inside the mask)": (f"{header}|by chance", rows)}


def _activations(figures: Mapping[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    rows = []
    for name, f in figures["classifiers"].items():
        for comparison in COMPARISONS:
            test = f["tests"][comparison]
            cells = [name, comparison, str(test["n"]), spanned(test)]
            rows.append([*cells, *(number(test[k]) for k in ("t", "p", "cohens_d", "above"))])
        for what, dead in (("with", "dead"), ("without", "dead_without")):
            rows.append([name, f"share of dead maps, {what} a nodule", str(figures["n"]), spanned(f[dead]), *["-"] * 4])
    title = "Figure 7: class activation in the mask, paired t-test (source: inside above outside, p < 0.001)"
    return {title: ("classifier|comparison|films|mean difference, or share|t|p|Cohen's d|share above 0", rows)}
