"""The start that all classifiers of Table 2 share: `python -m train.reproduction.table2.start --data FOLDER --out runs/start`.

DenseNet-121 trained on the train split's 13 findings other than Nodule, for nothing but the arms' own films should
teach nodules. (The source does not tell its start; ImageNet's weights cannot be fetched everywhere.)
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.errors import DataError
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.classifier.finetune import FinetunePreset, finetune, scores_of, write_classifier
from train.common.labelled import NODULE
from train.common.run import Run, RunError, TrainingError, git_commit, write_whole
from train.common.splits import SOURCE_TEST, FilmSet, read_filmset
from train.gan.presets import changed
from train.metrics.patches import auc

OTHERS = tuple(name for name in FINDINGS if name != "Nodule")

PRESETS: dict[str, FinetunePreset] = {
    "thesis": FinetunePreset(images=400_000),
    "mini": FinetunePreset(size=128, images=12_000, learning_rate=5e-4, snapshot_images=4_000),
    "tiny": FinetunePreset(size=32, images=48, batch=8, snapshot_images=24),
}


def epochs_of(films: FilmSet, batch: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives the batches of an epoch in random order: films, and the 13 findings (B, 13)."""
    columns = [i for i in range(len(FINDINGS)) if i != NODULE]
    order = torch.randperm(len(films), generator=torch.Generator().manual_seed(fold(seed, epoch, 10)))
    for rows in order.split(batch):
        if len(rows) == batch:
            yield films.images[rows], films.findings[rows][:, columns]


def train_neutral(
    preset: FinetunePreset,
    *,
    data: str | Path,
    out: str | Path,
    split: str = "file",
    test: int = SOURCE_TEST,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = True,
) -> Path:
    """Trains the start, or goes on with it, and gives its file.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout.
        out: the run's folder.
        split: "file" or "source", as in `train.common.splits`.
        test: films of each class that "source" keeps to test on.
        seed: of everything random.
        device: "cpu" or "cuda".
        bf16: bfloat16 autocast.

    Raises:
        RunError: something does not fit.
        TrainingError: losses are not finite.
    """
    file = Path(out) / "classifier.safetensors"
    recipe = {
        "preset": asdict(preset),
        "split": [split, test] if split == "source" else split,
        "seed": seed,
        "bf16": bf16,
        "findings": OTHERS,
    }
    run = Run(out, json.loads(json.dumps(recipe)))
    if file.exists():
        return file
    films = read_filmset(data, "train", preset.size, split=split, everything=True, test=test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(OTHERS, size=preset.size)
    shuffled = lambda epoch: epochs_of(films, preset.batch, seed=seed, epoch=epoch)  # noqa: E731
    classifier = finetune(classifier, shuffled, preset, run, seed=seed, device=device, bf16=bf16)
    if split == "file":
        val = read_filmset(data, "val", preset.size, everything=True)
        columns = [i for i in range(len(FINDINGS)) if i != NODULE]
        scores, has = scores_of(classifier, val.images, bf16=bf16), val.findings[:, columns] > 0
        both = [i for i in range(len(OTHERS)) if bool(has[:, i].any()) and not bool(has[:, i].all())]
        told = {OTHERS[i]: float(auc(scores[has[:, i], i], scores[~has[:, i], i])) for i in both}
        write_whole(run.folder / "report.json", json.dumps({"val": told}, indent=1).encode())
    write_classifier(classifier, file, recipe=recipe, git_commit=git_commit())
    return file


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers other than the preset's")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout")
    parser.add_argument("--split", choices=("file", "source"), help="by default the preset's: thesis source, else file")
    parser.add_argument(
        "--test-films", dest="test", type=int, default=SOURCE_TEST, help="as in train.reproduction.table2.training"
    )
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = vars(parser.parse_args())
    name, settings, split = (options.pop(k) for k in ("preset", "set", "split"))
    try:
        preset = changed(PRESETS[name], settings)
        print(train_neutral(preset, split=split or ("source" if name == "thesis" else "file"), **options))
    except (RunError, TrainingError, DataError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
