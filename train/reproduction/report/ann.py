"""The report's section of Ann (2021): every table and figure there are runs of, beside the printed ones."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from train.classifier.densenet import ChestClassifier
from train.common.cache import digest_files
from train.common.run import RunError
from train.reproduction.baselines.presets import MODELS
from train.reproduction.figures.cam import activation_inside, histograms
from train.reproduction.figures.same_noise import difference_figures, difference_grid, same_noise_grid
from train.reproduction.figures.tsne import CONTROL, embed, embedding_figures, image_sets, scatter
from train.reproduction.patches import SIZE
from train.reproduction.report.context import Model, Report
from train.reproduction.table1 import table1_row, table1_rows, table1_text
from train.reproduction.table2.table import table2, table2_rows, table2_text
from train.reproduction.tables import Table, number, spanned, titled

Figures = Mapping[str, Any]

COLUMNS = 6  # samples of Figure 3; fewer where fewer patients have real ones to stand beside


def measure(report: Report) -> dict[str, Any]:
    """Return the tables and figures of Ann (2021) that there are runs of, draw Figures 3 to 7, and fill the tables."""
    found: dict[str, Any] = {}
    if report.options.table1:
        models = _read_models(report)
        found |= _measure_models(report, models)
        _draw_models(report, models, found)
        report.tables |= {**table1_rows(found["table1"]), **_figure_tables(found)}
    if report.options.table2:
        found["table2"] = table2(report.options.table2, report.options.table2_part)
        report.tables |= table2_rows(found["table2"])
    return found


def _read_models(report: Report) -> dict[str, Model]:
    """Return the models of `--table1` that are there, in Table 1's order, and those of `--weights`."""
    options = report.options
    folders = {name: Path(options.table1) / name / "export" for name in MODELS}
    models = {name: Model.load(path) for name, path in folders.items() if (path / "model.safetensors").exists()}
    if not models:
        wanted = "a folder of train.reproduction.baselines with trained models"
        raise RunError(f"--table1 must be {wanted}, got {options.table1}")
    models |= report.models
    if options.figures_of not in models:
        raise RunError(f"--figures-of must be one of {list(models)}, got {options.figures_of!r}")
    return models


def _measure_models(report: Report, models: Mapping[str, Model]) -> dict[str, Any]:
    """Return the figures of Table 1 and Figure 6 for all models, and of Figures 4, 5 and 7 for one."""
    preset, real, full = report.preset, report.images(SIZE)[1], models[report.options.figures_of]
    found: dict[str, Any] = {"table1": {}, "figure6": {}, "full": report.options.figures_of}
    numbers: dict[str, Any] = {"preset": asdict(preset.table1), "encoders": digest_files(report.encoders.values())}
    for name, model in models.items():
        pair = model.generator, model.prior
        row = partial(table1_row, *pair, report.images_of, real, report.options.encoders, preset.table1)
        found["table1"][name] = report.figure("table1", row, model, by=table1_row, **numbers)
        differences = partial(difference_figures, *pair, n=preset.pairs)
        found["figure6"][name] = report.figure("figure6", differences, model, by=difference_figures, n=preset.pairs)

    def neighbours() -> dict[str, Any]:
        sets = image_sets(full.generator, full.prior, real, n=preset.points)
        parts = {"figure4": sets.images, "figure5": sets.crops}
        points = {name: embed(part, perplexity=preset.perplexity) for name, part in parts.items()}
        return {name: embedding_figures(of, k=preset.neighbours) for name, of in points.items()}

    numbers = {"n": preset.points, "perplexity": preset.perplexity, "k": preset.neighbours}
    found |= report.figure("figures45", neighbours, full, by=embed, **numbers)

    if report.classifiers:
        classifiers = {name: ChestClassifier.load(file) for name, file in report.classifiers.items()}
        hashes = {name: digest_files([Path(file)]) for name, file in report.classifiers.items()}
        numbers = {"n": preset.maps, "classifiers": hashes}
        activations = partial(activation_inside, full.generator, full.prior, classifiers, n=preset.maps)
        found["figure7"] = report.figure("figure7", activations, full, by=activation_inside, **numbers)
    return found


def _draw_models(report: Report, models: Mapping[str, Model], found: Figures) -> None:
    full, real, pictures = found["full"], report.images(SIZE)[1], report.pictures
    generator, prior = models[full].generator, models[full].prior
    named = {MODELS.get(name, name): model.generator for name, model in models.items()}
    columns = min(COLUMNS, *(len(real.patients[rows].unique()) for rows in (real.normal, real.boxed)))
    picture = same_noise_grid(named, prior, real=real, columns=columns)
    pictures["Figure 3: the same noise without and with a nodule"] = picture
    sets = image_sets(generator, prior, real, n=report.preset.points)
    crops = {name: images for name, images in sets.crops.items() if name != CONTROL}
    for title, part in (("Figure 4: t-SNE of images", sets.images), ("Figure 5: t-SNE of crops", crops)):
        pictures[title] = scatter(embed(part, perplexity=report.preset.perplexity), title=title)
    pictures[f"Figure 6: difference maps of the {MODELS.get(full, full)}"] = difference_grid(generator, prior)
    if "figure7" in found:
        title = "Figure 7: class activation inside and outside the mask"
        pictures[title] = histograms(found["figure7"], title=title)


def text(figures: Figures) -> list[str]:
    """Return the section's blocks, from all figures of a report."""
    found, blocks = figures["reproduction"], []
    if "table1" in found:
        about = f"Figures 4 to 7 are of: {MODELS.get(found['full'], found['full'])}."
        blocks += [*table1_text(found["table1"]), "## Figures 3 to 7", about, *titled(_figure_tables(found))]
    return blocks + (table2_text(found["table2"]) if "table2" in found else [])


def _figure_tables(found: Figures) -> dict[str, Table]:
    """Return the tables of Figures 4 to 7, by title."""
    tables = _neighbour_tables(found) | _difference_table(found["figure6"])
    return tables | (_activation_table(found["figure7"]) if "figure7" in found else {})


def _neighbour_tables(figures: Figures) -> dict[str, Table]:
    tables = {}
    for name, what in (("figure4", "Figure 4, images"), ("figure5", "Figure 5, crops")):
        rows = []
        for question, spaces in figures[name]["neighbours"].items():
            for space, f in spaces.items():
                chance = [number(f[k]) for k in ("expected", "ratio", "p")]
                rows.append([question.replace("|", "among"), space, spanned(f), *chance])
        header = f"whose {figures[name]['k']} nearest neighbours among whom|in|share of the other set|if they were one"
        tables[f"{what}: how far the sets mix (Ann 2021: a picture)"] = (f"{header}|ratio|p", rows)
    return tables


def _difference_table(figures: Figures) -> dict[str, Table]:
    rows = []
    for model, f in figures.items():
        cells = [MODELS.get(model, model), "yes" if f["places"] else "no"]
        for what in ("energy", "hit"):
            cells += [spanned(f[what]), number(f[f"{what}_chance"]["value"])]
        rows.append(cells)
    header = "model|knows the mask|share of the difference in the mask + 1/4|the mask's own share|brightest pixel in it"
    title = "Figure 6: where the difference lies (Ann 2021: brightest inside the mask)"
    return {title: (f"{header}|by chance", rows)}


def _activation_table(figures: Figures) -> dict[str, Table]:
    rows = []
    for name, f in figures["classifiers"].items():
        for comparison, test in f["tests"].items():
            cells = [name, comparison, str(test["n"]), spanned(test)]
            rows.append([*cells, *(number(test[k]) for k in ("t", "p", "cohens_d", "above"))])
        for what, dead in (("with", "dead"), ("without", "dead_without")):
            rows.append([name, f"share of dead maps, {what} a nodule", str(figures["n"]), spanned(f[dead]), *["-"] * 4])
    title = "Figure 7: class activation in the mask, paired t-test (Ann 2021: inside above outside, p < 0.001)"
    return {title: ("classifier|comparison|images|mean difference, or share|t|p|Cohen's d|share above 0", rows)}
