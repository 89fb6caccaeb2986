"""CheXNet: `python -m train.classifier --preset chexnet --data FOLDER --out runs/chexnet` (METHOD 4).

DenseNet-121 with 14 logits. What we add for the few nodules there are, each a number of the preset: CT nodules of known
place superimposed on normal films, and the closed-form map held to the places that are known. The same command resumes.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.cam import activation_map, enlarged
from carim_aug.data.chestxray14 import FINDINGS, ChestXray14
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.evaluation.patches import auc, auc_interval
from carim_aug.evaluation.pointing import pointing_chance, pointing_hit
from carim_aug.keys import fold
from carim_aug.masks import boxes_to_masks
from carim_aug.models.classifier import ChestClassifier
from carim_aug.prior import LocationPrior
from train.run import Run, git_commit

NODULE = FINDINGS.index("Nodule")


@dataclass(frozen=True)
class ClassifierPreset:
    """Numbers of one classifier's training.

    Attributes:
        size: side in pixels at which the network sees films.
        images: films to show in all.
        batch: films a step.
        learning_rate: AdamW's largest, after a warm-up of a twentieth of the images, then a cosine to zero.
        weight_decay: AdamW's.
        nodules: share of a batch drawn from films labelled Nodule.
        superimposed: share of a batch that is normal films with CT nodules.
        map_weight: weight of the map's loss where the place of the nodule is known.
        validate_images: validation every so many films; the network with the best nodule AUC on val is kept.
        patience: validations without a better one after which training stops.
    """

    size: int = 224
    images: int = 400_000
    batch: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    nodules: float = 0.125
    superimposed: float = 0.25
    map_weight: float = 1.0
    validate_images: int = 8_000
    patience: int = 10


PRESETS: dict[str, ClassifierPreset] = {
    "plain": ClassifierPreset(nodules=0.0, superimposed=0.0, map_weight=0.0),
    "chexnet": ClassifierPreset(),
    "chexnet128": ClassifierPreset(size=128, images=100_000, validate_images=4_000),
    "tiny": ClassifierPreset(size=32, images=96, batch=8, validate_images=48),
}


@dataclass
class LabelledFilms:
    """Decoded films of a split.

    Attributes:
        images: (N, 1, S, S) uint8.
        labels: (N, 14) float32.
        boxes: N tensors (k, 4) of nodule boxes, XYXY in [0, 1]; empty where none is known.
        patients: (N,) int64.
    """

    images: Tensor
    labels: Tensor
    boxes: list[Tensor]
    patients: Tensor


def read_labelled(root: str | Path, split: str, size: int) -> LabelledFilms:
    """Reads all films of a split, reduced to `size` (antialiased)."""
    extra = Path(root) / "ChestX-Det_boxes.csv"
    data = ChestXray14(root, split=split, extra_boxes=extra if extra.exists() else None)
    if not len(data):
        raise ValueError(f"{root}: the {split} split holds no film")
    images = [
        VF.resize(torch.as_tensor(data[i][0]), [size, size], antialias=True)
        for i in tqdm(range(len(data)), desc=f"films of {split}", unit="image")
    ]
    labels, patients = torch.from_numpy(data.labels), torch.from_numpy(data.patients)
    return LabelledFilms(torch.stack(images), labels, [data.boxes_relative(i) for i in range(len(data))], patients)


def scaled(films: Tensor) -> Tensor:
    """Gives uint8 films as float32 in [-1, 1]."""
    return films.float() / 127.5 - 1


def turned(images: Tensor, masks: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives films and masks shifted, zoomed and rotated alike (5 %, 10 %, 7 degrees); contrast changes."""
    n = len(images)
    u = (torch.rand(6, n, generator=stream) * 2 - 1).to(images.device)
    angle, zoom = u[0] * math.radians(7), 1 + 0.1 * u[1]
    theta = torch.stack(
        [
            torch.stack([angle.cos() * zoom, -angle.sin() * zoom, 0.1 * u[2]], dim=1),
            torch.stack([angle.sin() * zoom, angle.cos() * zoom, 0.1 * u[3]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [n, 1, *images.shape[-2:]], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(masks, grid, align_corners=False)
    contrast, level = (1 + 0.2 * u[4])[:, None, None, None], (0.1 * u[5])[:, None, None, None]
    return (images * contrast + level).clamp(-1, 1), masks


def draw_films(
    films: LabelledFilms,
    prior: LocationPrior,
    ct: CTNodules | None,
    preset: ClassifierPreset,
    *,
    seed: int,
    images_seen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives the batch that comes after `images_seen` films, a pure function of its arguments.

    Returns:
        images (B, 1, S, S) in [-1, 1]; labels (B, 14); masks (B, 1, S, S) of known nodules; known (B,) bool: whether
        the mask says all about nodules, as it does in normal films (empty), boxed films and superimposed ones.
    """
    stream = torch.Generator().manual_seed(fold(seed, images_seen, 4))
    device = films.images.device
    size, batch = films.images.shape[-1], preset.batch
    nodule, normal = films.labels[:, NODULE] > 0, ~films.labels.any(dim=1)
    n_ct = round(batch * preset.superimposed) if ct is not None else 0
    n_nodule = round(batch * preset.nodules)

    def pick(rows: Tensor, n: int) -> Tensor:
        return rows[torch.randint(len(rows), (n,), generator=stream).to(rows.device)]

    everything = torch.arange(len(films.images), device=device)
    rows = torch.cat(
        [
            pick(everything, batch - n_ct - n_nodule),
            pick(everything[nodule], n_nodule),
            pick(everything[normal], n_ct),
        ]
    )
    images, labels = scaled(films.images[rows]), films.labels[rows].clone()
    boxes = [films.boxes[i].to(device) * size for i in rows.tolist()]
    known = normal[rows] | torch.tensor([len(b) > 0 for b in boxes], device=device)
    if ct is not None and n_ct:
        asked = prior.sample(n_ct, generator=stream, image_size=size).boxes
        first = torch.stack([grown(b[0], size) for b in asked]).to(device)
        shown, _ = ct.superimpose(images[-n_ct:], first, generator=stream)
        images = torch.cat([images[:-n_ct], shown])
        labels[-n_ct:, NODULE] = 1
        boxes[-n_ct:] = list(first[:, None])
    images, masks = turned(images, boxes_to_masks(boxes, size).to(device), stream)
    return images, labels, masks, known


def grown(box: Tensor, size: int, pixels: float = 2.0) -> Tensor:
    """Gives a box (4,) of at least so many pixels each way, inside the film."""
    half = ((box[2:] - box[:2]) / 2).clamp(min=pixels / 2)
    centre = ((box[:2] + box[2:]) / 2).clamp(min=pixels / 2, max=size - pixels / 2)
    centre = torch.minimum(torch.maximum(centre, half), size - half)
    return torch.cat([centre - half, centre + half])


def map_loss(maps: Tensor, bias: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Gives the cross-entropy of the closed-form map's cells, as logits, with the share of each that a nodule covers.

    A cell counts as nodule if any of it is one; cells of a film without a nodule all count as none.

    Args:
        maps: (B, 1, h, w), signed.
        bias: scalar, the head's.
        masks: (B, 1, S, S).
        known: (B,) bool.
    """
    wanted = (F.adaptive_max_pool2d(masks, maps.shape[-1]) > 0.5).float()
    logits = maps * maps[0].numel() + bias  # a cell's own logit: the film's is their mean
    weight = torch.where(wanted > 0, 1.0, 0.1) * known[:, None, None, None]
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (each * weight).sum() / weight.sum().clamp(min=1)


def train_step(
    classifier: ChestClassifier,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    preset: ClassifierPreset,
) -> dict[str, float]:
    """Does one update; gives the losses."""
    images, labels, masks, known = batch
    with torch.autocast(images.device.type, torch.bfloat16):
        features = classifier.activation(classifier.features(classifier.prepared(images)))
    features = features.float()
    logits = classifier.head(features.mean(dim=(2, 3)))
    losses = {"labels": F.binary_cross_entropy_with_logits(logits, labels)}
    if preset.map_weight > 0:
        weight = classifier.head.weight[NODULE] / features[0, 0].numel()
        maps = torch.einsum("k,bkhw->bhw", weight, features)[:, None]
        losses["map"] = preset.map_weight * map_loss(maps, classifier.head.bias[NODULE], masks, known)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values(), torch.zeros((), device=images.device)).backward()
    optimizer.step()
    return {k: float(v.detach()) for k, v in losses.items()}


@torch.no_grad()
def predicted(classifier: ChestClassifier, films: LabelledFilms, *, batch: int = 64) -> Tensor:
    """Gives logits (N, 14) of all films, on the CPU."""
    classifier.eval()
    where = next(classifier.parameters()).device
    with torch.autocast(where.type, torch.bfloat16):
        parts = [classifier(scaled(part.to(where))).float().cpu() for part in films.images.split(batch)]
    return torch.cat(parts)


def report(classifier: ChestClassifier, films: LabelledFilms, prior: LocationPrior) -> dict[str, Any]:
    """Gives AUC per finding with intervals over patients, and the pointing game on boxed nodules against chance."""
    logits, stream = predicted(classifier, films), torch.Generator().manual_seed(0)
    findings: dict[str, Any] = {}
    for c, name in enumerate(FINDINGS):
        has = films.labels[:, c] > 0
        if bool(has.any()) and not bool(has.all()):
            scores = (logits[has, c], logits[~has, c])
            whose = (films.patients[has], films.patients[~has])
            interval = auc_interval(*scores, *whose, generator=stream, draws=1000)
            findings[name] = {"auc": float(auc(*scores)), "interval": interval, "films": int(has.sum())}
    boxed = [i for i, boxes in enumerate(films.boxes) if len(boxes)]
    game = None
    if boxed:
        where, size = next(classifier.parameters()).device, films.images.shape[-1]
        boxes = [films.boxes[i] * size for i in boxed]
        maps = activation_map(
            classifier, scaled(films.images[boxed]).to(where), NODULE, layer=classifier.activation, method="closed-form"
        ).maps.float()
        hits = pointing_hit(enlarged(maps.cpu(), size), boxes).float()
        chance = pointing_chance(boxes, enlarged(prior.field[None, None].float(), size)[0, 0] > 0.5)
        game = {"hit": float(hits.mean()), "chance": float(chance.mean()), "films": len(boxed)}
    return {"auc": findings, "pointing": game}


def train_classifier(
    preset: ClassifierPreset,
    *,
    data: str | Path,
    ct_nodules: str | Path | None,
    out: str | Path,
    seed: int = 0,
    minutes: float = math.inf,
    device: str = "cpu",
    prior: LocationPrior | None = None,
    test: bool = False,
) -> Path:
    """Trains a classifier, or goes on with it, and keeps the best on val; gives its file.

    Args:
        preset: the numbers.
        data: ChestX-ray14's layout with train and val splits.
        ct_nodules: templates.npz, or None to train without superimposed nodules.
        out: the run's folder.
        seed: of everything random.
        minutes: stop after so long (the same command goes on later).
        device: "cpu" or "cuda".
        prior: of superimposed nodules; the bundled one by default.
        test: also report on the test split: for final figures.
    """
    where, prior = torch.device(device), prior or LocationPrior.bundled()
    recipe = {"preset": asdict(replace(preset, images=0)), "seed": seed, "ct_nodules": ct_nodules is not None}
    run = Run(out, recipe)
    ct = CTNodules(ct_nodules) if ct_nodules is not None else None
    films, val = (read_labelled(data, split, preset.size) for split in ("train", "val"))
    nodule, normal = films.labels[:, NODULE] > 0, ~films.labels.any(dim=1)
    for split, labels in (("train", films.labels), ("val", val.labels)):
        if not bool((labels[:, NODULE] > 0).any()) or bool((labels[:, NODULE] > 0).all()):
            raise ValueError(f"{data}: the {split} split needs films with and without a nodule")
    if len(films.images) < preset.batch or (ct is not None and not bool(normal.any())):
        raise ValueError(f"{data}: the train split needs at least {preset.batch} films, some normal, got {len(nodule)}")
    films.images = films.images.to(where)
    films.labels = films.labels.to(where)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 5))
        classifier = ChestClassifier(FINDINGS, size=preset.size)
    classifier = classifier.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
    seen, best, waited = 0, 0.0, 0
    if (state := run.load()) is not None:
        seen, best, waited = state["images_seen"], state["best"], state["waited"]
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])

    # Show films; validate; keep the best.
    file, started, first = run.folder / "classifier.safetensors", time.monotonic(), seen
    with tqdm(total=preset.images, initial=seen, unit="image", desc="classifier") as bar:
        while seen < preset.images and waited < preset.patience and time.monotonic() - started < 60 * minutes:
            part = seen / preset.images
            rate = preset.learning_rate * min(part * 20 + 1e-3, 0.5 + 0.5 * math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate
            classifier.train()
            batch = draw_films(films, prior, ct, preset, seed=seed, images_seen=seen)
            losses = train_step(classifier, optimizer, batch, preset)
            if not all(map(math.isfinite, losses.values())):
                raise FloatingPointError(f"a loss is not finite after {seen} images: {losses}")
            seen += preset.batch
            bar.update(preset.batch)
            if seen % preset.validate_images < preset.batch:
                logits = predicted(classifier, val)[:, NODULE]
                has = val.labels[:, NODULE] > 0
                value, waited = float(auc(logits[has], logits[~has])), waited + 1
                if value > best:
                    best, waited = value, 0
                    classifier.save(file, recipe=recipe, images_seen=seen, git_commit=git_commit(), val_auc=value)
                speed = (seen - first) / (time.monotonic() - started)
                run.log(images=seen, images_per_s=round(speed, 2), val_auc=round(value, 4), **losses)
                state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
                run.save({**state, "images_seen": seen, "best": best, "waited": waited}, seen)
    if not file.exists():
        raise ValueError(f"stopped after {seen} images, before the first validation at {preset.validate_images}")
    trained = ChestClassifier.load(file).to(where)
    figures = {"val": report(trained, val, prior)}
    if test:
        figures["test"] = report(trained, read_labelled(data, "test", preset.size), prior)
    (run.folder / "report.json").write_text(json.dumps(figures, indent=2))
    return file


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="chexnet")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="the run's folder; the same folder resumes")
    parser.add_argument("--images", type=int, help="films to show, in place of the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="report on the test split too: for final figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.images is not None:
        preset = replace(preset, images=args.images)
    options = {k: getattr(args, k) for k in ("data", "ct_nodules", "out", "seed", "minutes", "test", "device")}
    file = train_classifier(preset, **options)
    print(f"classifier: {file}")
    print((file.parent / "report.json").read_text())


if __name__ == "__main__":
    main()
