"""The FROC table of saved detectors: `python -m train.reproduction.detector.table RUN RUN .. --split val`.

Runs that differ in their seed alone are averaged; differences from the plain training are paired, image by image and
seed by seed. A box finds a nodule if its centre lies in the nodule's box enlarged to at least 10 pixels of 256; boxes
outside, on normal and on boxed images alike, are false positives, counted per image of both kinds.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold, stream
from train.common.command import named_errors, recipe_parser
from train.common.run import RunError
from train.metrics.froc import RATES, mark_images, patient_weights, sensitivity
from train.metrics.statistics import estimate, interval
from train.reproduction.detector.data import SIZE
from train.reproduction.tables import spanned, table

PLAIN = "real images alone"
NAMES = {"graft": "grafts", "real": "boxed images again", "ct": "CT nodules", "drawn-blob": "drawn blobs"}
CHANCE = "chance: boxes of the prior"
CHANCE_BOXES, CHANCE_ROUNDS = 20, 20

SAME: dict[str, Callable[[dict[str, Any]], Any]] = {
    "split": lambda run: run["split"],
    "images": lambda run: [(image["name"], image["patient"], image["nodules"]) for image in run["images"]],
    "preset": lambda run: run["recipe"]["preset"],
    "start": lambda run: run["recipe"]["start"],
}
"""In what runs of one table do not differ."""


def read_run(folder: str | Path, split: str) -> dict[str, Any]:
    """Return what a run found in a split, or raise RunError if it was not scored on it, or is an older one."""
    path = Path(folder) / f"found-{split}.json"
    if not path.exists():
        raise RunError(f"{folder} was not scored on {split}: give its command again with --test {split}")
    run = json.loads(path.read_text())
    if "images" not in run:
        raise RunError(f"{path} must be of this version of train.reproduction.detector, got an older one")
    return run


def arm_of(run: dict[str, Any]) -> str:
    """Return the name of what a run differs in from the plain training."""
    recipe = run["recipe"]
    if not recipe["mix"]:
        return PLAIN
    which = f" {recipe['generator'][:8]}" if recipe["source"] == "graft" else ""
    return f"{NAMES[recipe['source']]}{which}, {recipe['mix']:g} of normal images"


def nodules_of(run: dict[str, Any]) -> list[Tensor]:
    """Return the true boxes (k, 4) of each image."""
    return [torch.tensor(image["nodules"]).reshape(-1, 4) for image in run["images"]]


def chance(run: dict[str, Any], rates: Sequence[float]) -> list[float]:
    """Return the sensitivities of boxes of the bundled prior with scores drawn alike, the mean of 20 rounds."""
    prior, rng = LocationPrior.bundled(), stream(0, 0, 28)
    nodules, n = nodules_of(run), len(run["images"])
    values = []
    for _ in range(CHANCE_ROUNDS):
        boxes = np.stack([prior.draw(rng, SIZE)[0] for _ in range(n * CHANCE_BOXES)])
        scores = torch.from_numpy(rng.random((n, CHANCE_BOXES)))
        marks = mark_images(list(torch.from_numpy(boxes).reshape(n, CHANCE_BOXES, 4)), list(scores), nodules)
        values.append(sensitivity(marks, rates))
    return torch.stack(values).mean(0).tolist()


def compare(runs: Sequence[dict[str, Any]], *, rates: Sequence[float] = RATES, draws: int = 2000) -> dict[str, Any]:
    """Return the sensitivities of each arm with 95 % intervals over patients, and its gains over the plain one.

    The runs are of one split, and all but mix, source and seed alike; all share the bootstrap samples.
    """
    if not runs:
        raise RunError("runs must be at least one, got none")
    first = runs[0]
    for run in runs:
        for what, part in SAME.items():
            if part(run) != part(first):
                raise RunError(f"runs must be of the same {what}, got two in {arm_of(run)}, seed {run['seed']}")
    patients = torch.tensor([image["patient"] for image in first["images"]])
    boxed = torch.tensor([len(image["nodules"]) > 0 for image in first["images"]])
    weights = patient_weights(patients, boxed, generator=torch.Generator().manual_seed(fold(0, 29)), draws=draws)

    # Of each arm and seed the sensitivities (R,), and those of the bootstrap samples (draws, R).
    values: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for run in runs:
        arm, seed = arm_of(run), run["seed"]
        if seed in values.setdefault(arm, {}):
            raise RunError(f"runs must differ, got {arm}, seed {seed} twice")
        found = [torch.tensor(image["found"]).reshape(-1, 5) for image in run["images"]]
        marks = mark_images([f[:, :4] for f in found], [f[:, 4] for f in found], nodules_of(run))
        values[arm][seed] = sensitivity(marks, rates), sensitivity(marks, rates, weights=weights)
    plain, arms = values.get(PLAIN, {}), {}
    for arm, seeds in values.items():
        row: dict[str, Any] = {"seeds": {str(seed): seeds[seed][0].tolist() for seed in sorted(seeds)}}
        row["sensitivity"] = _average(list(seeds.values()))
        if arm != PLAIN and (both := sorted(seeds.keys() & plain.keys())):
            gains = [(seeds[s][0] - plain[s][0], seeds[s][1] - plain[s][1]) for s in both]
            row |= {"gain": _average(gains), "gain_seeds": both}
        arms[arm] = row
    return {
        "split": first["split"],
        "images": len(boxed),
        "boxed": int(boxed.sum()),
        "nodules": sum(map(len, nodules_of(first))),
        "rates": list(rates),
        "chance": chance(first, rates),
        "start": first["recipe"]["start"],
        "preset": first["recipe"]["preset"],
        "arms": arms,
    }


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of `compare`'s figures."""
    rates, empty = figures["rates"], ["-"] * len(figures["rates"])
    header = "|".join(["arm", "seeds", *(f"at {r:g} FP" for r in rates), *(f"gain at {r:g}" for r in rates)])
    rows = [[CHANCE, "-", *(f"{value:.3f}" for value in figures["chance"]), *empty]]
    for arm, row in figures["arms"].items():
        gains = [spanned(gain) for gain in row["gain"]] if "gain" in row else empty
        rows.append([arm, str(len(row["seeds"])), *(spanned(s) for s in row["sensitivity"]), *gains])
        rows += [
            [f"- seed {s}", "", *(f"{v:.3f}" for v in value), *[""] * len(rates)] for s, value in row["seeds"].items()
        ]
    text = (
        f"Sensitivity on {figures['nodules']} nodules in {figures['boxed']} images and {figures['images']} images in "
        f"all of {figures['split']}, at false positives an image; means over seeds, 95 % intervals over patients. All "
        f"runs start from weights {figures['start'][:8]} and see {figures['preset']['images']} images."
    )
    return f"{text}\n\n{table(header, rows)}"


def _average(seeds: list[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
    """Return the mean over seeds at each rate, with its interval over the bootstrap samples."""
    values, samples = (torch.stack(part).mean(0) for part in zip(*seeds, strict=True))
    return [estimate(v, (a, b)) for v, a, b in zip(values.tolist(), *interval(samples).tolist(), strict=True)]


def main() -> None:
    """Print the table, and write its figures as JSON."""
    parser = recipe_parser(__doc__, "--out", out={"required": False, "help": "JSON file of the figures"})
    parser.add_argument("runs", nargs="+", help="folders of train.reproduction.detector")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    args = parser.parse_args()
    with named_errors():
        figures = compare([read_run(folder, args.split) for folder in args.runs])
    print(markdown(figures))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
