"""The classifier's pre-task: `python -m train.classifier.pretask --data FOLDER --ct-nodules FILE --out runs/pretask`.

A DenseNet-121 from scratch does not find a nodule of a few pixels in a whole film: with 177 nodule films and nodules
superimposed on others it learnt other signs, and scored a film with and without one alike (AUC 0.50 on val films). So
it first tells small patches of known content apart: CT nodules superimposed on normal films and the train split's real
boxes, against the very same places without the nodule and other places. `train.classifier.training --weights` goes on from it.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.common.labelled import NODULE, LabelledFilms, grown, read_labelled, scaled
from train.common.run import Run, git_commit
from train.gan.batch import CONTRAST, crop_at
from train.metrics.patches import auc


@dataclass(frozen=True)
class PretaskPreset:
    """Numbers of the pre-task.

    Attributes:
        size: side in pixels of the films that the patches are of.
        patch: side in pixels of a patch.
        images: patches to show in all.
        batch: patches a step, half with a nodule.
        real: share of the nodule half that is real boxes.
        learning_rate: AdamW's largest, in one cycle.
        boost: how many times as bright superimposed nodules are at the start, falling to 1 after half the patches; at
            their own brightness from the start, nothing was learnt from 8,000 patches.
        log_images: a line in the log every so many patches.
    """

    size: int = 256
    patch: int = 64
    images: int = 40_000
    batch: int = 32
    real: float = 0.25
    learning_rate: float = 1e-3
    boost: float = 4.0
    log_images: int = 4_000


PRESETS: dict[str, PretaskPreset] = {
    "chexnet": PretaskPreset(),
    "tiny": PretaskPreset(size=64, patch=32, images=32, batch=8, log_images=16),
}


def draw_patches(
    films: LabelledFilms,
    prior: LocationPrior,
    ct: CTNodules,
    preset: PretaskPreset,
    *,
    stream: torch.Generator,
    n: int,
    boost: float = 1.0,
    real: bool = True,
) -> Tensor:
    """Gives n patches with a nodule, then n without, (2n, 1, patch, patch) in [-1, 1].

    Args:
        films: of one split.
        prior: of the places.
        ct: nodules to superimpose.
        preset: sizes and shares.
        stream: random stream.
        n: patches of each kind.
        boost: how many times as bright superimposed nodules are.
        real: whether real boxes are among the nodules.
    """
    size, side = preset.size, preset.patch
    normal = torch.nonzero(~films.labels.any(dim=1))[:, 0]
    boxed = [(i, b) for i, boxes in enumerate(films.boxes) for b in boxes] if real else []

    def pick(count: int) -> Tensor:
        return scaled(films.images[normal[torch.randint(len(normal), (count,), generator=stream)]])

    def places(count: int) -> Tensor:
        drawn = prior.sample(count, generator=stream, image_size=size).boxes
        return torch.stack([grown(b[0], size) for b in drawn])

    def jitter(count: int) -> Tensor:
        return (torch.rand(count, 2, generator=stream) - 0.5) * side / 3

    # Nodules superimposed on normal films, the same places without them, and other places.
    ground, boxes, shift = pick(n), places(n), jitter(n)
    contrast = (CONTRAST[0] * boost, CONTRAST[1] * boost)
    shown, _ = ct.superimpose(ground, boxes, generator=stream, contrast=contrast)
    positive = crop_at(shown, boxes, side, shift)
    k = n // 2
    negative = torch.cat(
        [crop_at(ground[:k], boxes[:k], side, shift[:k]), crop_at(pick(n - k), places(n - k), side, jitter(n - k))]
    )
    m = round(preset.real * n) if boxed else 0
    if m:
        rows = [boxed[i] for i in torch.randint(len(boxed), (m,), generator=stream).tolist()]
        images = scaled(films.images[torch.tensor([i for i, _ in rows])])
        positive[-m:] = crop_at(images, torch.stack([b for _, b in rows]) * size, side, jitter(m))

    # Flips and changes of contrast.
    patches = torch.cat([positive, negative])
    flip = torch.rand(2 * n, 1, 1, 1, generator=stream) < 0.5
    patches = torch.where(flip, patches.flip(3), patches)
    u = torch.rand(2, 2 * n, 1, 1, 1, generator=stream) - 0.5
    return (patches * (1 + 0.6 * u[0]) + 0.3 * u[1]).clamp(-1, 1)


def patch_logits(classifier: ChestClassifier, patches: Tensor) -> Tensor:
    """Gives the nodule's logits (B,) of patches at their own size."""
    with torch.autocast(patches.device.type, torch.bfloat16):
        maps = classifier.activation(classifier.features(classifier.prepared(patches)))
    return classifier.head(maps.float().mean(dim=(2, 3)))[:, NODULE]


@torch.no_grad()
def judged(classifier: ChestClassifier, patches: Tensor, n: int) -> float:
    """Gives the AUC of n patches with a nodule against the rest."""
    classifier.eval()
    scores = torch.cat([patch_logits(classifier, part).cpu() for part in patches.split(64)])
    return float(auc(scores[:n], scores[n:]))


def train_pretask(
    preset: PretaskPreset,
    *,
    data: str | Path,
    ct_nodules: str | Path,
    out: str | Path,
    seed: int = 0,
    device: str = "cpu",
    prior: LocationPrior | None = None,
) -> Path:
    """Trains the pre-task, or goes on with it; gives the classifier's file.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with train and val splits.
        ct_nodules: templates.npz.
        out: the run's folder.
        seed: of everything random.
        device: "cpu" or "cuda".
        prior: of the places; the bundled one by default.
    """
    where, prior, ct = torch.device(device), prior or LocationPrior.bundled(), CTNodules(ct_nodules)
    recipe: dict[str, Any] = {"preset": asdict(preset), "seed": seed}
    run = Run(out, recipe)
    films, val = (read_labelled(data, split, preset.size) for split in ("train", "val"))
    for split, found in (("train", films), ("val", val)):
        if bool(found.labels.any(dim=1).all()):
            raise ValueError(f"{data}: the {split} split needs normal films")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(FINDINGS, size=preset.patch)
    classifier = classifier.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=1e-2)
    seen = 0
    if (state := run.load()) is not None:
        seen = state["images_seen"]
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])

    # The same patches of val films at every report: superimposed nodules, and real boxes against the same grounds.
    stream = torch.Generator().manual_seed(fold(seed, 11))
    held = draw_patches(val, prior, ct, preset, stream=stream, n=min(256, 4 * preset.batch), real=False).to(where)
    grounds = held[len(held) // 2 :]
    boxes = [(i, b) for i, found in enumerate(val.boxes) for b in found]
    real = grounds[:0]
    if boxes:
        images = scaled(val.images[torch.tensor([i for i, _ in boxes])])
        centred = torch.zeros(len(boxes), 2)
        real = crop_at(images, torch.stack([b for _, b in boxes]) * preset.size, preset.patch, centred).to(where)

    half, labels = preset.batch // 2, torch.tensor([1.0, 0.0], device=where).repeat_interleave(preset.batch // 2)
    started, first = time.monotonic(), seen
    with tqdm(total=preset.images, initial=seen, unit="patch", desc="pre-task") as bar:
        while seen < preset.images:
            part = seen / preset.images
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * min(part * 10 + 1e-3, 0.5 + 0.5 * math.cos(math.pi * part))
            classifier.train()
            stream = torch.Generator().manual_seed(fold(seed, seen, 12))
            boost = 1 + (preset.boost - 1) * max(0.0, 1 - 2 * part)
            patches = draw_patches(films, prior, ct, preset, stream=stream, n=half, boost=boost).to(where)
            loss = F.binary_cross_entropy_with_logits(patch_logits(classifier, patches), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is not finite after {seen} patches: {value}")
            seen += preset.batch
            bar.update(preset.batch)
            if seen % preset.log_images < preset.batch or seen >= preset.images:
                told = {"superimposed_auc": judged(classifier, held, len(held) // 2)}
                if len(real):
                    told["real_auc"] = judged(classifier, torch.cat([real, grounds]), len(real))
                rate = (seen - first) / (time.monotonic() - started)
                run.log(images=seen, images_per_s=round(rate, 1), boost=round(boost, 2), loss=value, **told)
                state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
                run.save({**state, "images_seen": seen}, seen)
    file = run.folder / "classifier.safetensors"
    classifier.size = preset.size
    classifier.save(file, recipe=recipe, images_seen=seen, git_commit=git_commit())
    return file


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="chexnet")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", required=True, help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--images", type=int, help="patches to show, in place of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.images is not None:
        preset = replace(preset, images=args.images)
    options = {k: getattr(args, k) for k in ("data", "ct_nodules", "out", "seed", "device")}
    print(f"classifier: {train_pretask(preset, **options)}")


if __name__ == "__main__":
    main()
