"""The FROC table of saved detectors: `python -m train.reproduction.detector.table runs/detector/none-0 runs/detector/mix-0 .. --split val`.

Runs that differ in their seed alone are averaged; differences from the plain training are paired, film by film and
seed by seed. A box finds a nodule if its centre lies in the nodule's box grown to at least 10 pixels of 256; boxes
outside, on normal and on boxed films alike, are false positives, counted per film of both kinds (METHOD 8).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold, stream
from train.common.run import RunError
from train.metrics.froc import RATES, Marks, interval, marked, patient_weights, sensitivity
from train.reproduction.report.tables import spanned, table
from train.reproduction.sources import SIZE

PLAIN = "real films alone"
NAMES = {"graft": "grafts", "real": "boxed films again", "ct": "CT nodules", "blob": "drawn blobs"}
CHANCE = "chance: boxes of the prior"
CHANCE_BOXES, CHANCE_ROUNDS = 20, 20


def read_run(folder: str | Path, split: str) -> dict[str, Any]:
    """Gives what a run found in a split.

    Raises:
        RunError: the run was not judged on it.
    """
    path = Path(folder) / f"found-{split}.json"
    if not path.exists():
        raise RunError(f"{folder} was not judged on {split}: give its command again with --test {split}")
    return json.loads(path.read_text())


def arm_of(run: dict[str, Any]) -> str:
    """Gives the name of what a run differs in from the plain training."""
    recipe = run["recipe"]
    if not recipe["mix"]:
        return PLAIN
    which = f" {recipe['generator'][:8]}" if recipe["source"] == "graft" else ""
    return f"{NAMES[recipe['source']]}{which}, {recipe['mix']:g} of normal films"


def marks_of(run: dict[str, Any]) -> Marks:
    """Gives the marks of a run's films."""
    found = [torch.tensor(film["found"]).reshape(-1, 5) for film in run["films"]]
    return marked([f[:, :4] for f in found], [f[:, 4] for f in found], nodules_of(run))


def nodules_of(run: dict[str, Any]) -> list[Tensor]:
    """Gives the true boxes (k, 4) of each film."""
    return [torch.tensor(film["nodules"]).reshape(-1, 4) for film in run["films"]]


def chance(run: dict[str, Any], rates: Sequence[float]) -> list[float]:
    """Gives the sensitivities of boxes drawn from the bundled prior with scores drawn alike, the mean of 20 rounds."""
    prior, rng = LocationPrior.bundled(), stream(0, 0, 28)
    nodules, n = nodules_of(run), len(run["films"])
    values = []
    for _ in range(CHANCE_ROUNDS):
        drawn = np.stack([prior.draw(rng, SIZE)[0] for _ in range(n * CHANCE_BOXES)])
        boxes = list(torch.from_numpy(drawn).reshape(n, CHANCE_BOXES, 4))
        scores = list(torch.from_numpy(rng.random((n, CHANCE_BOXES))))
        values.append(sensitivity(marked(boxes, scores, nodules), rates))
    return torch.stack(values).mean(0).tolist()


def compare(runs: Sequence[dict[str, Any]], *, rates: Sequence[float] = RATES, draws: int = 2000) -> dict[str, Any]:
    """Gives the sensitivities of each arm with 95 % intervals over patients, and its differences from the plain one.

    Args:
        runs: as `read_run` gives them, of one split, all but mix, source and seed alike.
        rates: false positives a film.
        draws: bootstrap samples; the same ones for all runs.

    Returns:
        split, nodules, films, boxed films, rates, chance, and for each arm: seeds, each seed's sensitivities, and for
        each rate value, low and high of "sensitivity" and, if there is a plain arm, of "gain" over its same seeds.

    Raises:
        RunError: runs that cannot be compared.
    """
    if not runs:
        raise RunError("runs must be at least one, got none")
    first = runs[0]
    for run in runs:
        for what, of in (("split", _split), ("films", _films), ("preset", _preset), ("start", _start)):
            if of(run) != of(first):
                raise RunError(f"runs must be of the same {what}, got two in {arm_of(run)}, seed {run['seed']}")
    patients = torch.tensor([film["patient"] for film in first["films"]])
    boxed = torch.tensor([len(film["nodules"]) > 0 for film in first["films"]])
    weights = patient_weights(patients, boxed, generator=torch.Generator().manual_seed(fold(0, 29)), draws=draws)
    values: dict[str, dict[int, Tensor]] = {}
    sampled: dict[str, dict[int, Tensor]] = {}
    for run in runs:
        arm, seed, marks = arm_of(run), run["seed"], marks_of(run)
        if seed in values.setdefault(arm, {}):
            raise RunError(f"runs must differ, got {arm}, seed {seed} twice")
        values[arm][seed] = sensitivity(marks, rates)
        sampled.setdefault(arm, {})[seed] = sensitivity(marks, rates, weights=weights)
    arms = {}
    for arm, of_seed in values.items():
        row: dict[str, Any] = {"seeds": {str(seed): value.tolist() for seed, value in sorted(of_seed.items())}}
        row["sensitivity"] = _with_interval(of_seed, sampled[arm])
        both = sorted(of_seed.keys() & values.get(PLAIN, {}).keys())
        if arm != PLAIN and both:
            gain = {seed: of_seed[seed] - values[PLAIN][seed] for seed in both}
            row["gain"] = _with_interval(gain, {seed: sampled[arm][seed] - sampled[PLAIN][seed] for seed in both})
            row["gain_seeds"] = both
        arms[arm] = row
    facts = {"split": first["split"], "films": len(boxed), "boxed": int(boxed.sum())}
    facts |= {"nodules": sum(map(len, nodules_of(first))), "rates": list(rates), "chance": chance(first, rates)}
    return {**facts, "start": _start(first), "preset": _preset(first), "arms": arms}


def markdown(figures: dict[str, Any]) -> str:
    """Gives the table of `compare`'s figures."""
    header = "|".join(["arm", "seeds"] + [f"at {rate:g} FP" for rate in figures["rates"]])
    header += "".join(f"|gain at {rate:g}" for rate in figures["rates"])
    rows = [[CHANCE, "-", *(f"{value:.3f}" for value in figures["chance"]), *["-"] * len(figures["rates"])]]
    for arm, row in figures["arms"].items():
        gains = [spanned(g) for g in row["gain"]] if "gain" in row else ["-"] * len(figures["rates"])
        rows.append([arm, str(len(row["seeds"])), *(spanned(s) for s in row["sensitivity"]), *gains])
        for seed, value in row["seeds"].items():
            rows.append([f"- seed {seed}", "", *(f"{v:.3f}" for v in value), *[""] * len(figures["rates"])])
    text = (
        f"Sensitivity on {figures['nodules']} nodules in {figures['boxed']} films and {figures['films']} films in all "
        f"of {figures['split']}, at false positives a film; means over seeds, 95 % intervals over patients. All runs "
        f"start from weights {figures['start'][:8]} and see {figures['preset']['images']} films."
    )
    return f"{text}\n\n{table(header, rows)}"


def _with_interval(values: dict[int, Tensor], sampled: dict[int, Tensor]) -> list[dict[str, float]]:
    mean = torch.stack(list(values.values())).mean(0).tolist()
    low, high = interval(torch.stack(list(sampled.values())).mean(0)).tolist()
    return [{"value": v, "low": a, "high": b} for v, a, b in zip(mean, low, high, strict=True)]


def _split(run: dict[str, Any]) -> Any:
    return run["split"]


def _films(run: dict[str, Any]) -> Any:
    return [(film["film"], film["patient"], film["nodules"]) for film in run["films"]]


def _preset(run: dict[str, Any]) -> Any:
    return run["recipe"]["preset"]


def _start(run: dict[str, Any]) -> Any:
    return run["recipe"]["start"]


def main() -> None:
    """Prints the table and keeps its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of train.reproduction.detector.training")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--out", help="JSON file of the figures")
    args = parser.parse_args()
    try:
        figures = compare([read_run(folder, args.split) for folder in args.runs])
    except RunError as error:
        raise SystemExit(f"error: {error}") from None
    print(markdown(figures))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
