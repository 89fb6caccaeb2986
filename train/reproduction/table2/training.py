"""Table 2: `python -m train.reproduction.table2 --preset mini --data FOLDER --start FILE --out runs/table2` (METHOD 8).

For each arm of `train.reproduction.table2.arms` (DS1 to DS4 and the controls) and each seed one DenseNet-121, from the same start, shown
the same count of films. A run leaves its scores of val and test films, which `train.reproduction.report.building` reads. Arms need what they
add: `--without` and `--full` (folders of weights), `--ct-nodules`. The same command resumes, and does what is missing.
`--counts` tells what every data set holds and trains nothing; `--preset thesis` is the full ChestX-ray14.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from carim_aug.data.errors import DataError
from carim_aug.generators.pretrained import WeightsError
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier, ClassifierError
from train.classifier.finetune import FinetunePreset, finetune, scores_of
from train.common.run import Run, RunError, TrainingError, git_commit, write_whole
from train.common.splits import SOURCE_TEST, FilmSet, counted, read_filmset
from train.gan.presets import changed
from train.reproduction.table2.arms import ARMS, Sources, arm_batches, arm_counts, parsed

SWEPT = tuple(f"{arm}@{share}" for share in ("0.1", "1", "4") for arm in ("DS4-graft", "DS4", "DS5"))
"""Synthetic nodules from a tenth to four times the real ones, and duplicates at the same count; 0.35 is DS4 itself."""


@dataclass(frozen=True)
class DownstreamPreset:
    """Numbers of Table 2.

    Attributes:
        training: of every classifier.
        split: "file": the folder's own split; "source": the source's counts, by patient.
        test: films of each class to test on with "source".
        arms: of `train.reproduction.table2.arms`.
        seeds: runs of each arm.
    """

    training: FinetunePreset
    split: str = "file"
    test: int = SOURCE_TEST
    arms: tuple[str, ...] = (*ARMS, *SWEPT)
    seeds: int = 5


PRESETS: dict[str, DownstreamPreset] = {
    "thesis": DownstreamPreset(FinetunePreset(size=224, images=120_000, learning_rate=1e-4), split="source"),
    "mini": DownstreamPreset(FinetunePreset(size=128, images=1_600, learning_rate=1e-3, snapshot_images=800)),
    "tiny": DownstreamPreset(
        FinetunePreset(size=32, images=32, batch=8, snapshot_images=16), arms=("DS2", "DS4-graft", "DS5"), seeds=2
    ),
}


def run_arm(
    name: str,
    parts: dict[str, FilmSet],
    sources: Sources,
    preset: DownstreamPreset,
    *,
    start: str | Path | None,
    out: str | Path,
    seed: int,
    device: str = "cpu",
    bf16: bool = True,
) -> dict[str, Any]:
    """Trains one classifier on one arm, or goes on with it, and gives its result, which lies in result.json too.

    Args:
        name: of the arm.
        parts: films by "train", "test" and perhaps "val".
        sources: what arms may add.
        preset: the numbers.
        start: file of the classifier that all start from; None: untrained, the same for all.
        out: folder of the runs; this one's is ARM-SEED in it.
        seed: of the run.
        device: "cpu" or "cuda".
        bf16: bfloat16 autocast.

    Raises:
        RunError: something does not fit.
        TrainingError: losses are not finite.
    """
    arm, training = parsed(name)[0], preset.training
    begun = ChestClassifier.load(start) if start is not None else None
    recipe = {
        "arm": name,
        "seed": seed,
        "preset": {**asdict(preset), "arms": None, "seeds": None},
        "start": None if begun is None else begun.weights_hash,
        "weights": sources.hashes(arm),
        "split_films": {part: names_digest(films) for part, films in parts.items()},
        "bf16": bf16,
    }
    run = Run(Path(out) / f"{name}-{seed}", json.loads(json.dumps(recipe)), keep=1)
    result = run.folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(0, 12))
        classifier = ChestClassifier(("Nodule",), size=training.size)
    if begun is not None:
        state = {k: v for k, v in begun.state_dict().items() if not k.startswith("head.")}
        classifier.load_state_dict(state, strict=False)
    epochs, counts = arm_batches(
        name, parts["train"], sources, batch=training.batch, seed=fold(seed, 13), device=device, bf16=bf16
    )
    classifier = finetune(classifier, epochs, training, run, seed=seed, device=device, bf16=bf16)
    told: dict[str, Any] = {**recipe, "counts": counts, "git_commit": git_commit(), "films": {}}
    for part in ("val", "test"):
        if part in parts:
            films = parts[part]
            logits = scores_of(classifier, films.images, bf16=bf16)[:, 0]
            told["films"][part] = {
                "names": films.names,
                "patients": films.patients.tolist(),
                "nodule": films.targets,
                "logits": [float(f"{x:.6g}") for x in logits.tolist()],
            }
    told["minutes"] = round((time.monotonic() - began) / 60, 2)
    write_whole(result, json.dumps(told).encode())
    run.close()
    for checkpoint in run.checkpoints():
        checkpoint.unlink()
    return told


def names_digest(films: FilmSet) -> str:
    """Gives the SHA-256 of films' names, as hex: the split that a run was made with."""
    return hashlib.sha256("\n".join(films.names).encode()).hexdigest()


def read_parts(data: str | Path, preset: DownstreamPreset) -> dict[str, FilmSet]:
    """Gives the films of train, test and, where the split has one, val."""
    names = ("train", "test") if preset.split == "source" else ("train", "val", "test")
    return {
        part: read_filmset(data, part, preset.training.size, split=preset.split, test=preset.test) for part in names
    }


def possible(names: Sequence[str], sources: Sources, *, asked: bool) -> list[str]:
    """Gives the arms that have what they need; tells of the others.

    Args:
        names: of arms.
        sources: what was given.
        asked: whether the arms were named one by one, and none may be left out.

    Raises:
        RunError: an arm that was asked for lacks something.
    """
    kept = []
    for name in names:
        missing = sources.lacking(parsed(name)[0])
        if missing is None:
            kept.append(name)
        elif asked:
            raise RunError(f"{missing} must be given for {name} (--{missing.replace('_', '-')}), got None")
        else:
            print(f"{name} is left out, for --{missing.replace('_', '-')} was not given")
    return kept


def told_counts(parts: dict[str, dict[str, int]], names: Sequence[str]) -> str:
    """Gives the counts of every data set, and what of the source's cannot be known.

    Args:
        parts: of `train.common.splits.counted`.
        names: of arms.
    """
    lines = ["| films | normal | nodule | patients |", "|---|---|---|---|"]
    for part, films in parts.items():
        lines.append(f"| {part} | {films['normal']:,} | {films['nodule']:,} | {films['patients']:,} |")
    head = ["real normal", "real nodule", "synthetic normal", "synthetic nodule"]
    lines += ["", f"| arm | | {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    train = parts["train"]
    for name in names:
        try:
            counts = arm_counts(name, train["normal"], train["nodule"])
            cells = " | ".join(f"{counts[k]:,}" for k in head)
        except RunError as error:
            cells = f"{error} | | | "
        lines.append(f"| {name} | {parsed(name)[0].title} | {cells} |")
    lines += [
        "",
        "The source: 59,728 normal and 5,698 nodule films to train on, 633 + 633 to test on. Not known from it: which "
        "films were tested on, whether patients were kept apart, and the classifier's start, rate and epochs.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers of the training")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout")
    parser.add_argument(
        "--start", help="file of the classifier that all start from (train.reproduction.table2.start); else untrained"
    )
    parser.add_argument("--without", help="folder of the weights trained without the CARIM loss: DS3")
    parser.add_argument("--full", help="folder of the full model's weights: DS4 and DS9")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection: DS8")
    parser.add_argument("--arms", nargs="+", help="some of the preset's, or others; see train.reproduction.table2.arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's first")
    parser.add_argument("--test-films", type=int, help="of each class with the source's split, in place of 633")
    parser.add_argument("--counts", action="store_true", help="tell what each data set holds, and train nothing")
    parser.add_argument("--out", default="runs/table2", help="the runs' folder; the same folder resumes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    try:
        preset = PRESETS[options.preset]
        preset = replace(preset, training=changed(preset.training, options.set))
        preset = preset if options.test_films is None else replace(preset, test=options.test_films)
        names, seeds = options.arms or preset.arms, options.seeds or range(preset.seeds)
        sources = Sources(options.without, options.full, options.ct_nodules)
        if not options.counts:
            names = possible(names, sources, asked=options.arms is not None)
        counts = counted(options.data, split=preset.split, test=preset.test)
        if options.counts:
            print(told_counts(counts, names))
            return
        for name in names:  # before anything is trained
            arm_counts(name, counts["train"]["normal"], counts["train"]["nodule"])
        parts = read_parts(options.data, preset)
        where = {"start": options.start, "out": options.out, "device": options.device}
        for seed in seeds:
            for name in names:
                told = run_arm(name, parts, sources, preset, seed=seed, **where)
                print(f"{name}, seed {seed}: done in {told['minutes']} min", flush=True)
    except (RunError, TrainingError, DataError, WeightsError, ClassifierError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
