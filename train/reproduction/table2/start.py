"""The start of all classifiers of Table 2: `python -m train.reproduction.table2.start --data FOLDER --out runs/start`.

DenseNet-121 trained on the train split's 13 findings other than Nodule, for nothing but the arms' own images should
teach nodules. (Ann (2021) does not say what its classifiers start from; ImageNet's weights cannot be fetched
everywhere.)
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carim_aug.ops.findings import FINDINGS
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier, predict
from train.classifier.finetune import FinetunePreset, finetune
from train.common.command import named_errors, recipe_parser
from train.common.distributed import resolve_precision
from train.common.images import NODULE, ImageSet
from train.common.presets import override
from train.common.run import Run, git_commit, write_whole
from train.common.splits import ANN_TEST, SPLITS, read_part
from train.metrics.statistics import auc

COLUMNS = [i for i in range(len(FINDINGS)) if i != NODULE]
OTHERS = tuple(FINDINGS[i] for i in COLUMNS)

PRESETS: dict[str, FinetunePreset] = {
    "thesis": FinetunePreset(images=400_000),
    "mini": FinetunePreset(size=128, images=12_000, learning_rate=5e-4, snapshot_images=4_000),
    "tiny": FinetunePreset(size=32, images=16, batch=8, snapshot_images=8),
}


def epoch_batches(images: ImageSet, batch: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch in random order: images (B, 1, S, S) uint8, and the 13 findings (B, 13)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(fold(seed, epoch, 10)))
    for rows in order.split(batch):
        if len(rows) == batch:
            yield images.images[rows], images.labels[rows][:, COLUMNS]


def train_start(
    preset: FinetunePreset,
    *,
    data: str | Path,
    out: str | Path,
    split: str = "file",
    test: int = ANN_TEST,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Train the start, or go on with it, and return its file; `split` and `test` are those of `read_part`."""
    file = Path(out) / "classifier.safetensors"
    recipe: dict[str, Any] = {"preset": asdict(preset), "seed": seed, "findings": OTHERS}
    recipe |= {"split": split if split == "file" else [split, test], "precision": resolve_precision("auto", device)}
    run = Run(out, recipe)
    if file.exists():
        return file
    images = read_part(data, "train", preset.size, split=split, everything=True, test=test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(OTHERS, size=preset.size)

    def epochs(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return epoch_batches(images, preset.batch, seed=seed, epoch=epoch)

    classifier = finetune(classifier, epochs, preset, run, seed=seed, device=device)
    if split == "file":
        val = read_part(data, "val", preset.size, everything=True)
        scores, has = predict(classifier, val.images), val.labels[:, COLUMNS] > 0
        both = [i for i in range(len(OTHERS)) if bool(has[:, i].any()) and not bool(has[:, i].all())]
        areas = {OTHERS[i]: float(auc(scores[has[:, i], i], scores[~has[:, i], i])) for i in both}
        write_whole(run.folder / "report.json", json.dumps({"val": areas}, indent=1).encode())
    classifier.save(file, recipe=recipe, git_commit=git_commit())
    return file


def main() -> None:
    """Run the recipe from the command line."""
    names = ("--preset", "--set", "--data", "--out", "--seed", "--device")
    parser = recipe_parser(__doc__, *names, preset={"default": "mini", "choices": sorted(PRESETS)})
    parser.add_argument("--split", choices=SPLITS, help="by default the preset's: thesis ann2021, else file")
    parser.add_argument("--test-images", dest="test", type=int, default=ANN_TEST, help="of each class with ann2021")
    options = vars(parser.parse_args())
    name, settings, split = (options.pop(k) for k in ("preset", "set", "split"))
    split = split or ("ann2021" if name == "thesis" else "file")
    with named_errors():
        print(train_start(override(PRESETS[name], settings), split=split, **options))


if __name__ == "__main__":
    main()
