"""One classifier of Table 2: DenseNet-121 from the common start, shown the images of one arm."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier, predict
from train.classifier.finetune import FinetunePreset, finetune
from train.common.distributed import resolve_precision
from train.common.images import ImageSet
from train.common.run import Run, RunError, git_commit, write_whole
from train.common.splits import ANN_TEST, read_part
from train.reproduction.table2.arms import ARMS, Arm, Sources, arm_batches, arm_counts, find_arm
from train.reproduction.tables import table

SWEPT = tuple(f"{arm}@{share}" for share in ("0.1", "1", "4") for arm in ("DS4-graft", "DS4", "duplicated"))
"""Synthetic nodules from a tenth to four times the real ones, and duplicates at the same count; 0.35 is DS4 itself."""


@dataclass(frozen=True)
class Table2Preset:
    """Numbers of Table 2."""

    training: FinetunePreset  # of every classifier
    split: str = "file"  # the folder's own split; "ann2021": the counts of Ann (2021), by patient
    test: int = ANN_TEST  # images of each class to test on with "ann2021"
    arms: tuple[str, ...] = (*ARMS, *SWEPT)  # of `train.reproduction.table2.arms`
    seeds: int = 5  # runs of each arm


PRESETS: dict[str, Table2Preset] = {
    "thesis": Table2Preset(FinetunePreset(size=224, images=120_000, learning_rate=1e-4), split="ann2021"),
    "mini": Table2Preset(FinetunePreset(size=128, images=1_600, learning_rate=1e-3, snapshot_images=800)),
    "tiny": Table2Preset(
        FinetunePreset(size=32, images=24, batch=8, snapshot_images=8),
        arms=("DS2", "DS4-graft", "duplicated"),
        seeds=2,
    ),
}


def run_arm(
    arm: Arm,
    parts: Mapping[str, ImageSet],
    sources: Sources,
    preset: Table2Preset,
    *,
    start: str | Path | None,
    out: str | Path,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one classifier on one arm, or go on with it, and return its result, which lies in result.json too.

    Its folder is ARM-SEED in `out`; `parts` are images by "train", "test" and perhaps "val"; `start` is the file of the
    classifier that all start from, or None for an untrained one, the same for all.
    """
    training = preset.training
    trained = None if start is None else ChestClassifier.load(start)
    recipe = {
        "arm": arm.name,
        "seed": seed,
        "preset": {"training": asdict(training), "split": preset.split, "test": preset.test},
        "start": None if trained is None else trained.weights_hash,
        "weights": sources.hashes(arm),
        "split": {p: hashlib.sha256("\n".join(images.names).encode()).hexdigest() for p, images in parts.items()},
        "precision": resolve_precision("auto", device),
    }
    run = Run(Path(out) / f"{arm.name}-{seed}", recipe, keep=1)
    file = run.folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())

    # Train.
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(0, 12))
        classifier = ChestClassifier(("Nodule",), size=training.size)
    if trained is not None:
        body = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("head.")}
        classifier.load_state_dict(body, strict=False)
    options: dict[str, Any] = {"batch": training.batch, "seed": fold(seed, 13), "device": device}
    epochs, counts = arm_batches(arm, parts["train"], sources, **options)
    classifier = finetune(classifier, epochs, training, run, seed=seed, device=device)

    # Score.
    result: dict[str, Any] = {**recipe, "counts": counts, "git_commit": git_commit(), "images": {}}
    for part in {"val", "test"} & parts.keys():
        images = parts[part]
        known = {"names": images.names, "patients": images.patients.tolist(), "nodule": images.targets}
        logits = [float(f"{x:.6g}") for x in predict(classifier, images.images)[:, 0].tolist()]
        result["images"][part] = {**known, "logits": logits}
    result["minutes"] = round((time.monotonic() - began) / 60, 2)
    write_whole(file, json.dumps(result).encode())
    for checkpoint in run.checkpoints():
        checkpoint.unlink()
    return result


def read_parts(data: str | Path, preset: Table2Preset) -> dict[str, ImageSet]:
    """Return the images of train, test and, where the split has one, val."""
    names = ("train", "val", "test") if preset.split == "file" else ("train", "test")
    size, split, test = preset.training.size, preset.split, preset.test
    return {part: read_part(data, part, size, split=split, test=test) for part in names}


def choose_arms(names: Sequence[str], sources: Sources, *, asked: bool) -> list[Arm]:
    """Return the arms that have what they need, and print the others, or raise RunError where they were asked for."""
    arms = []
    for arm in map(find_arm, names):
        try:
            sources.check(arm)
        except RunError as error:
            if asked:
                raise
            print(f"{arm.name} is left out: {error}")
        else:
            arms.append(arm)
    return arms


def counts_text(parts: Mapping[str, Mapping[str, int]], arms: Sequence[Arm]) -> str:
    """Return the counts of every part (`count_images`) and arm, and what of Ann (2021) cannot be known, as Markdown."""
    kinds = ("normal", "nodule", "patients")
    rows = [[part, *(f"{counts[kind]:,}" for kind in kinds)] for part, counts in parts.items()]
    of_arms = []
    for arm in arms:
        try:
            counts = arm_counts(arm, parts["train"]["normal"], parts["train"]["nodule"])
            cells = [f"{n:,}" for n in counts.values()]
        except RunError as error:
            cells = [str(error), "", "", ""]
        of_arms.append([arm.name, arm.title, *cells])
    text = (
        "Ann (2021): 59,728 normal and 5,698 nodule images to train on, 633 + 633 to test on. Not known from it: which "
        "images were tested on, whether patients were kept apart, and the classifier's start, rate and epochs."
    )
    head = "arm||real normal|real nodule|synthetic normal|synthetic nodule"
    return "\n\n".join([table("images|normal|nodule|patients", rows), table(head, of_arms), text])
