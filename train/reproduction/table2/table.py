"""Table 2 from saved runs of `train.reproduction.table2.training`: metrics by their definitions, and every arm against its controls.

An area is a mean over seeds with an interval over patients and seeds. Differences are paired: the same films, the same
seeds. DeLong's test is of the seeds' mean score, and takes films for independent. p-values of one reference are a
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
from train.metrics.comparison import holm, paired_bootstrap
from train.metrics.delong import delong
from train.metrics.patches import auc
from train.metrics.rates import balanced_weights, rates, sensitivity_at
from train.reproduction.report.published import RATES, TABLE2, corrected_table2
from train.reproduction.report.tables import Row, number, table
from train.reproduction.table2.arms import parsed

REFERENCES = ("DS2", "DS5")
"""What arms are set against: no augmentation, and duplicated real films, as many where there is such a run."""

SPECIFICITY = 0.9
"""At which the sensitivity is told."""

DRAWS = 2_000


def read_runs(folder: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Gives results by arm and seed, of runs that differ in nothing else.

    Raises:
        RunError: there is no finished run, or they are of different settings or films.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    first: dict[str, Any] | None = None
    used: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*/result.json")):
        told = json.loads(path.read_text())
        first = first or told
        for name in ("preset", "start", "bf16", "split_films"):
            if told.get(name) != first.get(name):
                raise RunError(
                    f"{path}: {name} must be that of the other runs, {first.get(name)}, got {told.get(name)}"
                )
        for source, weights in told["weights"].items():
            if used.setdefault(source, weights) != weights:
                raise RunError(
                    f"{path}: weights {source!r} must be those of the other runs, {used[source]}, got {weights}"
                )
        for part, films in told["films"].items():
            if films["names"] != first["films"].get(part, {}).get("names"):
                raise RunError(f"{path}: its {part} films must be those of the other runs")
        runs.setdefault(told["arm"], {})[told["seed"]] = told
    if not runs:
        raise RunError(f"{folder} must hold finished runs of train.reproduction.table2.training, got none")
    return runs


def table2(folder: str | Path, part: str = "test") -> dict[str, Any]:
    """Gives all figures of Table 2 on one part of the films.

    Args:
        folder: runs of `train.reproduction.table2.training`.
        part: "test" or "val".

    Returns:
        "arms": by name, metrics; "comparisons": arm against reference; "films": normal, nodule and patients; the
        runs' "preset", "start", "git_commits", "weights".
    """
    runs = read_runs(folder)
    some = next(iter(next(iter(runs.values())).values()))
    if part not in some["films"]:
        raise RunError(f"{folder} must hold scores of {part} films, got {sorted(some['films'])}")
    films = some["films"][part]
    labels, patients = torch.tensor(films["nodule"]), torch.tensor(films["patients"])
    scores = {
        name: {s: torch.tensor(r["films"][part]["logits"], dtype=torch.float64) for s, r in sorted(of.items())}
        for name, of in runs.items()
    }
    order = sorted(scores, key=lambda name: (name.partition("@")[0], parsed(name)[1]))
    everything = [r for of in runs.values() for r in of.values()]
    return {
        "part": part,
        "films": {
            "normal": int((labels == 0).sum()),
            "nodule": int(labels.sum()),
            "patients": len(patients.unique()),
        },
        "preset": some["preset"],
        "start": some["start"],
        "git_commits": sorted({r["git_commit"] for r in everything}),
        "weights": {k: v for r in everything for k, v in r["weights"].items()},
        "arms": {
            name: {**metrics(scores[name], labels, patients), "counts": next(iter(runs[name].values()))["counts"]}
            for name in order
        },
        "comparisons": comparisons({name: scores[name] for name in order}, labels, patients),
    }


def metrics(scores: Mapping[int, Tensor], labels: Tensor, patients: Tensor) -> dict[str, Any]:
    """Gives one arm's metrics, means over seeds.

    Args:
        scores: by seed, (N,) logits; a film is called positive at 0 or above.
        labels: (N,).
        patients: (N,).
    """
    weights, together = balanced_weights(labels), torch.stack(list(scores.values()))
    stream = torch.Generator().manual_seed(fold(0, 30))
    areas = [float(auc(s[labels == 1], s[labels == 0])) for s in scores.values()]
    area = paired_bootstrap(together, together, labels, patients, generator=stream, draws=DRAWS)
    each = [rates(s, labels, threshold=0.0, weights=weights) for s in scores.values()]
    told = {name: mean_of([getattr(r, name) for r in each]) for name in RATES if name != "auc"}
    return {
        "seeds": list(scores),
        "auc": {"value": area.auc_a, "low": area.interval_a[0], "high": area.interval_a[1]},
        "auc_by_seed": areas,
        "auc_deviation": statistics.stdev(areas) if len(areas) > 1 else None,
        "sensitivity_at": statistics.fmean(sensitivity_at(s, labels, specificity=SPECIFICITY) for s in scores.values()),
        **told,
    }


def mean_of(values: list[float]) -> float:
    """Gives the mean of those that are defined, NaN if none is."""
    defined = [value for value in values if math.isfinite(value)]
    return statistics.fmean(defined) if defined else math.nan


def comparisons(scores: Mapping[str, Mapping[int, Tensor]], labels: Tensor, patients: Tensor) -> list[dict[str, Any]]:
    """Gives every arm against the references, on the seeds that both have."""
    told = []
    for reference in REFERENCES:
        family = []
        for name in scores:
            other = control_of(name, reference)
            seeds = sorted(set(scores[name]) & set(scores.get(other, {})))
            if name == other or not seeds or (reference == "DS5" and not parsed(name)[0].source):
                continue
            a, b = (torch.stack([scores[arm][s] for s in seeds]) for arm in (name, other))
            stream = torch.Generator().manual_seed(fold(0, 31))
            found = paired_bootstrap(a, b, labels, patients, generator=stream, draws=DRAWS)
            test = delong(a.mean(dim=0), b.mean(dim=0), labels)
            family.append(
                {
                    "arm": name,
                    "reference": other,
                    "seeds": seeds,
                    "difference": {"value": found.difference, "low": found.interval[0], "high": found.interval[1]},
                    "p": found.p,
                    "delong": {"difference": test.difference, "z": test.z, "p": test.p},
                }
            )
        for name in ("p", "delong"):
            found = [row[name] if name == "p" else row[name]["p"] for row in family]
            adjusted = iter(holm([p for p in found if math.isfinite(p)]))
            for row, p in zip(family, found, strict=True):
                row[f"{name}_holm"] = next(adjusted) if math.isfinite(p) else math.nan
        told += family
    return told


def control_of(name: str, reference: str) -> str:
    """Gives the run that an arm is set against: of duplicates, those of the arm's own count."""
    share = name.partition("@")[2]
    return f"{reference}@{share}" if reference == "DS5" and share else reference


def table2_rows(figures: Mapping[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    """Gives Table 2's tables by title: header, cells split at |, and rows."""
    arms = []
    for name, f in figures["arms"].items():
        added = f["counts"]
        arms.append(
            [
                name,
                parsed(name)[0].title,
                " / ".join(f"{added[c]['real']:,}+{added[c]['synthetic']:,}" for c in ("No Finding", "Nodule")),
                str(len(f["seeds"])),
                span(f["auc"]),
                "-" if f["auc_deviation"] is None else f"{f['auc_deviation']:.3f}",
                *(f"{f[k]:.3f}" if math.isfinite(f[k]) else "-" for k in ("sensitivity_at", *RATES[:-1])),
            ]
        )
    against = [
        [
            row["arm"],
            row["reference"],
            str(len(row["seeds"])),
            span(row["difference"], sign=True),
            *(number(p) for p in (row["p"], row["p_holm"])),
            f"{row['delong']['difference']:+.3f}",
            *(number(p) for p in (row["delong"]["p"], row["delong_holm"])),
        ]
        for row in figures["comparisons"]
    ]
    fixed, printed = corrected_table2(), []
    for name, row in TABLE2.items():
        printed.append([name, "as printed", *(f"{row[k]:.4f}" for k in RATES)])
        if name in fixed:
            printed.append([name, "corrected", *(f"{fixed[name].get(k, float('nan')):.4f}" for k in RATES)])
    printed = [[c.replace("nan", "-") for c in row] for row in printed]
    head = "arm|data|normal / nodule, real+synthetic|seeds|AUC|sd over seeds|sensitivity at specificity 0.9"
    return {
        "Table 2": (f"{head}|{'|'.join(RATES[:-1])}", arms),
        "Table 2, differences of AUC": (
            "arm|against|seeds|difference|p|p, Holm|DeLong, mean score|p|p, Holm",
            against,
        ),
        "Table 2 of the source": (f"data|reading|{'|'.join(RATES)}", printed),
    }


def table2_text(figures: Mapping[str, Any]) -> list[str]:
    """Gives the report's blocks of Table 2."""
    films, training = figures["films"], figures["preset"]["training"]
    text = (
        f"DenseNet-121, {training['size']} px, {training['images']:,} films shown to each, from one start; "
        f"{films['normal']} normal and {films['nodule']} nodule {figures['part']} films of {films['patients']} "
        "patients. AUC: area under the curve, mean over seeds, 95 % interval over patients and seeds. Rates: at "
        "probability 0.5, normal films weighed so that both classes count alike, as in the source's 633 + 633. "
        "Differences: paired over films and seeds. DS2 has fewer normal films than arms with grafts or duplicates, "
        "whose like is DS5. Intervals do not cover another training of the generator or of the start. The source's AUC "
        "is a mean of two rates and no area; its DS1 fits no test set of two halves."
    )
    parts = ["## Table 2: what synthetic nodules do for a classifier", text]
    for title, (header, rows) in table2_rows(figures).items():
        parts += [f"### {title}", table(header, rows)]
    return parts


def span(figure: Mapping[str, float], *, sign: bool = False) -> str:
    """Gives an area or a difference of areas with its interval, to three places."""
    shape = "+.3f" if sign else ".3f"
    return f"{figure['value']:{shape}} [{figure['low']:{shape}}, {figure['high']:{shape}}]"
