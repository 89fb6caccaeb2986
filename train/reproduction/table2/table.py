"""Table 2 from saved runs: metrics by their definitions, and every arm against its controls.

An area is a mean over seeds with an interval over patients and seeds. Differences are paired: the same images, the same
seeds. DeLong's test is of the seeds' mean score, and takes images for independent. p-values of one reference are a
family of their own (Holm).
"""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carim_aug.ops.random import fold
from train.common.run import RunError
from train.metrics.statistics import (
    auc,
    balanced_weights,
    delong,
    estimate,
    holm,
    paired_bootstrap,
    rates,
    sensitivity_at,
)
from train.reproduction.published import RATES, TABLE2, corrected_table2
from train.reproduction.table2.arms import find_arm
from train.reproduction.tables import Table, number, titled

REFERENCES = ("DS2", "duplicated")
"""What arms are set against: no augmentation, and duplicated real images, as many where there is such a run."""
SAME = ("preset", "start", "precision", "split")  # entries in which runs of one table do not differ
DRAWS, SPECIFICITY = 2_000, 0.9  # bootstrap samples; at which the sensitivity is given

Runs = dict[str, dict[int, dict[str, Any]]]
"""Results of `train.reproduction.table2.training.run_arm` by arm and seed."""


def read_runs(folder: str | Path) -> Runs:
    """Return results of runs that differ in nothing but arm and seed; raise RunError if they do, or there is none."""
    runs: Runs = {}
    first: dict[str, Any] = {}
    weights: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*/result.json")):
        result = json.loads(path.read_text())
        if "images" not in result:
            raise RunError(f"{path} must be of this version of train.reproduction.table2, got an older one")
        first = first or result
        for name in SAME:
            if result[name] != first[name]:
                raise RunError(f"{path}: {name} must be that of the other runs, {first[name]}, got {result[name]}")
        for source, found in result["weights"].items():
            if (wanted := weights.setdefault(source, found)) != found:
                raise RunError(f"{path}: weights {source!r} must be those of the other runs, {wanted}, got {found}")
        for part, images in result["images"].items():
            if images["names"] != first["images"].get(part, {}).get("names"):
                raise RunError(f"{path}: its {part} images must be those of the other runs")
        runs.setdefault(result["arm"], {})[result["seed"]] = result
    if not runs:
        raise RunError(f"{folder} must hold finished runs of train.reproduction.table2, got none")
    return runs


def table2(folder: str | Path, part: str = "test") -> dict[str, Any]:
    """Return all figures of Table 2 on one part of the images, "test" or "val": of each arm and between arms."""
    runs = read_runs(folder)
    every = [result for by_seed in runs.values() for result in by_seed.values()]
    if part not in every[0]["images"]:
        raise RunError(f"{folder} must hold scores of {part} images, got {sorted(every[0]['images'])}")
    images = every[0]["images"][part]
    labels, patients = torch.tensor(images["nodule"]), torch.tensor(images["patients"])
    order = sorted(runs, key=lambda name: (name.partition("@")[0], find_arm(name).share))
    scores = {
        name: {s: torch.tensor(runs[name][s]["images"][part]["logits"]).double() for s in sorted(runs[name])}
        for name in order
    }
    counts = {name: next(iter(runs[name].values()))["counts"] for name in order}
    nodules, whose = sum(images["nodule"]), len(patients.unique())
    return {
        "part": part,
        "images": {"normal": len(labels) - nodules, "nodule": nodules, "patients": whose},
        "preset": every[0]["preset"],
        "start": every[0]["start"],
        "git_commits": sorted({result["git_commit"] for result in every}),
        "weights": {k: v for result in every for k, v in result["weights"].items()},
        "arms": {name: {**metrics(scores[name], labels, patients), "counts": counts[name]} for name in order},
        "comparisons": comparisons(scores, labels, patients),
    }


def metrics(scores: Mapping[int, Tensor], labels: Tensor, patients: Tensor) -> dict[str, Any]:
    """Return one arm's metrics, means over seeds; an image is called positive at logits (N,) of 0 or above."""
    every, weights = torch.stack(list(scores.values())), balanced_weights(labels)
    areas = [float(auc(s[labels == 1], s[labels == 0])) for s in every]
    generator = torch.Generator().manual_seed(fold(0, 30))
    area = paired_bootstrap(every, every, labels, patients, generator=generator, draws=DRAWS)
    each = [rates(s, labels, threshold=0.0, weights=weights) for s in every]
    return {
        "seeds": list(scores),
        "auc": estimate(area.auc_a, area.interval_a),
        "auc_by_seed": areas,
        "auc_deviation": statistics.stdev(areas) if len(areas) > 1 else None,
        "sensitivity_at": statistics.fmean(sensitivity_at(s, labels, specificity=SPECIFICITY) for s in every),
        **{name: _mean([getattr(r, name) for r in each]) for name in RATES if name != "auc"},
    }


def comparisons(scores: Mapping[str, Mapping[int, Tensor]], labels: Tensor, patients: Tensor) -> list[dict[str, Any]]:
    """Return every arm against the references, on the seeds that both have."""
    rows = []
    for reference in REFERENCES:
        family: list[dict[str, Any]] = []
        for name in scores:
            share = name.partition("@")[2] if reference == "duplicated" else ""
            other = f"{reference}@{share}" if share else reference  # duplicates of the arm's own count
            seeds = sorted(scores[name].keys() & scores.get(other, {}).keys())
            if name == other or not seeds or (reference == "duplicated" and not find_arm(name).source):
                continue
            a, b = (torch.stack([scores[arm][s] for s in seeds]) for arm in (name, other))
            generator = torch.Generator().manual_seed(fold(0, 31))
            found = paired_bootstrap(a, b, labels, patients, generator=generator, draws=DRAWS)
            test = delong(a.mean(dim=0), b.mean(dim=0), labels)
            row = {"arm": name, "reference": other, "seeds": seeds, "p": found.p}
            row["difference"] = estimate(found.difference, found.interval)
            family.append({**row, "delong": {"difference": test.difference, "z": test.z, "p": test.p}})
        for name, p_values in (("p", [r["p"] for r in family]), ("delong", [r["delong"]["p"] for r in family])):
            adjusted = iter(holm([p for p in p_values if math.isfinite(p)]))
            for row, p in zip(family, p_values, strict=True):
                row[f"{name}_holm"] = next(adjusted) if math.isfinite(p) else math.nan
        rows += family
    return rows


def table2_rows(figures: Mapping[str, Any]) -> dict[str, Table]:
    """Return Table 2's tables by title."""
    arms = []
    for name, f in figures["arms"].items():
        counts = [f["counts"][c] for c in ("No Finding", "Nodule")]
        shown = [name, find_arm(name).title, " / ".join(f"{c['real']:,}+{c['synthetic']:,}" for c in counts)]
        deviation = math.nan if f["auc_deviation"] is None else f["auc_deviation"]
        shares = [deviation, *(f[k] for k in ("sensitivity_at", *RATES[:-1]))]
        arms.append([*shown, str(len(f["seeds"])), area_cell(f["auc"]), *map(_places, shares)])
    against = []
    for row in figures["comparisons"]:
        cells = [row["arm"], row["reference"], str(len(row["seeds"])), area_cell(row["difference"], sign="+")]
        cells += [number(row["p"]), number(row["p_holm"]), f"{row['delong']['difference']:+.3f}"]
        against.append([*cells, number(row["delong"]["p"]), number(row["delong_holm"])])
    corrected, printed = corrected_table2(), []
    for name, values in TABLE2.items():
        printed.append([name, "as printed", *(f"{values[k]:.4f}" for k in RATES)])
        if name in corrected:
            printed.append([name, "corrected", *(f"{corrected[name][k]:.4f}" for k in RATES[:-1]), "-"])
    head = "arm|data|normal / nodule, real+synthetic|seeds|AUC|sd over seeds|sensitivity at specificity 0.9"
    return {
        "Table 2": (f"{head}|{'|'.join(RATES[:-1])}", arms),
        "Table 2, differences of AUC": ("arm|against|seeds|difference|p|p, Holm|DeLong, mean score|p|p, Holm", against),
        "Table 2 of Ann (2021)": (f"data|reading|{'|'.join(RATES)}", printed),
    }


def table2_text(figures: Mapping[str, Any]) -> list[str]:
    """Return the report's blocks of Table 2."""
    images, training = figures["images"], figures["preset"]["training"]
    text = (
        f"DenseNet-121, {training['size']} px, {training['images']:,} images shown to each, from one start; "
        f"{images['normal']} normal and {images['nodule']} nodule {figures['part']} images of {images['patients']} "
        "patients. AUC: area under the curve, mean over seeds, 95 % interval over patients and seeds. Rates: at "
        "probability 0.5, normal images weighed so that both classes count alike, as in the 633 + 633 of Ann (2021). "
        "Differences: paired over images and seeds. DS2 has fewer normal images than arms with grafts or duplicates, "
        'whose like is "duplicated". Intervals do not cover another training of the generator or of the start. The AUC '
        "of Ann (2021) is a mean of two rates and no area; its DS1 fits no test set of two halves."
    )
    return ["## Table 2: what synthetic nodules do for a classifier", text, *titled(table2_rows(figures))]


def area_cell(figure: Mapping[str, float], *, sign: str = "") -> str:
    """Return an area or a difference of areas with its interval, to three places."""
    return "{value:{f}} [{low:{f}}, {high:{f}}]".format(**figure, f=f"{sign}.3f")


def _places(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _mean(values: list[float]) -> float:
    """Return the mean of those that are defined, NaN if none is."""
    return statistics.fmean([v for v in values if math.isfinite(v)] or [math.nan])
