"""The command `carim-aug`: demo, preview, export, info, fit-prior (DESIGN 3)."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from carim_aug.data.chestxray14 import BOX_SIZE, SPLITS, ChestXray14, read_boxes
from carim_aug.data.errors import DataError
from carim_aug.data.images import IMAGE_SUFFIXES, read_grey
from carim_aug.data.phantom import PhantomChest
from carim_aug.data.tables import clip_box, number, read_rows
from carim_aug.generators.base import Generator
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.generators.render import Renderer
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold, stream
from carim_aug.tools import cli_export
from carim_aug.tools.export import ExportError
from carim_aug.tools.plots import batch_sheet, contact_sheet, save_picture, stacked
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import MixParams

NOTICE = "Research use; not a medical device."
LICENCE = "MIT (code); the weights' training data is named above"
FOLDS = 5
"""Of fit-prior's cross-validation, each patient in one."""
HOST_SIZE = 512
"""Side, in pixels, at which preview reads real images."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit code: 0, or 2 after an error, of which one line on stderr tells.

    Args:
        argv: the words after `carim-aug`; those of this process by default.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, TypeError, OSError, ImportError, ExportError) as error:
        print(f"carim-aug: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carim-aug", description=f"Synthetic lung nodules for chest X-ray training loops. {NOTICE}"
    )
    parser.add_argument("--version", action="version", version=f"carim-aug {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=run)
        if run is not fit_prior:
            added.add_argument("--weights", metavar="FOLDER|HUB_ID", help="weights and prior; default: the bundled")
            added.add_argument("--prior", type=Path, metavar="FILE", help="in place of the prior beside the weights")
        return added

    demo_ = command("demo", demo, "Train a small classifier on drawn phantoms with synthetic nodules mixed in.")
    demo_.add_argument("--out", type=Path, default=Path("demo"), help="folder of the picture (default: demo)")
    demo_.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    demo_.add_argument("--batches", type=int, default=24, help="training batches of 32 (default: 24)")

    preview_ = command("preview", preview, "Draw a contact sheet: masks, synthetic images, differences, grafts.")
    hosts = preview_.add_mutually_exclusive_group()
    hosts.add_argument("--data", type=Path, help="real hosts: a folder in ChestX-ray14's layout (its normal images)")
    hosts.add_argument("--images", type=Path, help="real hosts: a folder of images")
    preview_.add_argument("--out", type=Path, default=Path("preview.png"), help="PNG file (default: preview.png)")
    preview_.add_argument("--n", type=int, default=6, help="rows (default: 6)")
    preview_.add_argument("--seed", type=int, default=0, help="of noise, boxes and choice of hosts (default: 0)")

    about = "Write a data set: PNG, COCO, ChestX-ray14, YOLO. Run again, it goes on; torchrun shares the work."
    cli_export.add_words(command("export", export, about))

    info_ = command("info", info, "Tell version, device, weights and prior.")
    info_.add_argument("--json", action="store_true", help="as JSON")

    fit_ = command("fit-prior", fit_prior, "Fit a location prior on your own nodule boxes.")
    fit_.add_argument(
        "boxes",
        type=Path,
        help="CSV: ChestX-ray14's or ChestX-Det's columns, or image, x1, y1, x2, y2 [, patient] [, finding]",
    )
    fit_.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    fit_.add_argument("--image-size", type=int, default=BOX_SIZE, help="pixels the boxes refer to (default: 1024)")
    fit_.add_argument("--finding", default="Nodule", help="which boxes, where the table names findings")
    fit_.add_argument(
        "--exclude-split",
        nargs="+",
        metavar=("SPLIT.CSV", "NAME"),
        help="leave out all patients of these splits (default: val test) of a CSV with columns Image Index, split",
    )
    return parser


def _mix(arguments: argparse.Namespace, **options: Any) -> SyntheticNoduleMix:
    prior = None if arguments.prior is None else LocationPrior.load(arguments.prior)
    return SyntheticNoduleMix.from_pretrained(arguments.weights, prior=prior, **options)


# --- demo ---
def demo(arguments: argparse.Namespace) -> None:
    """Does the main job on phantoms: counts, mixed loader, a few training steps, a picture."""
    started = time.perf_counter()
    if arguments.batches < 1:
        raise ValueError(f"--batches must be at least 1, got {arguments.batches}")
    device = torch.device(_device())
    dataset = PhantomChest(240, size=128, nodule_fraction=0.1, seed=arguments.seed)
    # Both classes are added: with synthetic nodules alone the classifier would learn 'generated texture = nodule'.
    added = {"Nodule": 72, "No Finding": 72}
    mix = _mix(arguments, n_synthetic=added, seed=arguments.seed, device=device)
    print("Data: 240 drawn phantoms of a chest, not X-rays: this shows how it works, not how well.")
    print(f"\n{'class':<12}{'real':>8}{'synthetic':>12}{'after':>8}   (real: here drawn)")
    for name, row in mix.class_counts(dataset).items():
        print(f"{name:<12}{row['real']:>8}{row['synthetic']:>12}{row['total']:>8}")

    loader = mix.loader(dataset, batch_size=32, shuffle=True, drop_last=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(arguments.seed))
        classifier = _classifier().to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    losses: list[float] = []
    seen: list[MixParams] = []
    with tqdm(total=arguments.batches, unit="batch", desc="training") as bar:
        while len(losses) < arguments.batches:
            for images, labels in loader:
                logits = classifier(images.to(device).float() / 255)
                loss = F.cross_entropy(logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                assert loader.last_params is not None, "set with each batch"
                seen.append(loader.last_params)
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
                if len(losses) == arguments.batches:
                    break

    path = arguments.out / "demo.png"
    sheet = contact_sheet(mix, seed=arguments.seed, n=4)
    save_picture(stacked(sheet, batch_sheet(images, seen[-1], size=sheet.width // 11 - 4, per_row=11)), path)
    made = sum(int(params.synthetic.sum()) for params in seen)
    rate = _images_per_second(mix.generator, device)
    first, last = np.mean(losses[:4]), np.mean(losses[-4:])
    print(f"\nTrained {len(losses)} batches of 32; {made} of the images in them synthetic.")
    print(f"Loss, mean of four batches: first {first:.3f}, last {last:.3f}.")
    print(f"Generation alone: {rate:.0f} images/s of {mix.generator.image_size} px on {device}.")
    print(f"Picture: {path}")
    print(f"Done in {time.perf_counter() - started:.0f} s. {NOTICE}")


def _classifier() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def _images_per_second(generator: Generator, device: torch.device, *, seconds: float = 1.0) -> float:
    """Generated images a second in batches of 32, after one to warm up."""
    ready = Renderer(generator).on(device)
    noise = torch.zeros(32, generator.noise_dim, device=device)
    masks = torch.zeros(32, 1, generator.image_size, generator.image_size, device=device)
    done, started = -32, 0.0
    with torch.no_grad():
        while done <= 0 or time.perf_counter() - started < seconds:
            ready(noise, masks)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 32
            if done == 0:
                started = time.perf_counter()
    return done / (time.perf_counter() - started)


# --- preview ---
def preview(arguments: argparse.Namespace) -> None:
    """Draws the contact sheet."""
    if arguments.n < 1:
        raise ValueError(f"--n must be at least 1, got {arguments.n}")
    mix = _mix(arguments, seed=arguments.seed)
    real = _real_images(arguments)
    save_picture(contact_sheet(mix, real, n=arguments.n, seed=arguments.seed), arguments.out)
    print(f"{arguments.out}: {arguments.n} rows, {'no' if real is None else len(real)} real images. {NOTICE}")


def _real_images(arguments: argparse.Namespace) -> Tensor | None:
    """Up to n real images, (m, 1, HOST_SIZE, HOST_SIZE) float in [-1, 1]."""
    if arguments.data is not None:
        paths = ChestXray14(arguments.data, findings=["No Finding"], missing="skip").paths
        folder = arguments.data
    elif arguments.images is not None:
        folder = arguments.images
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    else:
        return None
    if not paths:
        raise DataError(f"{folder}: no image in this folder")
    rng = stream(arguments.seed, 0, 0)
    chosen = [paths[i] for i in rng.permutation(len(paths))[: arguments.n]]
    shape = v2.Compose(
        [v2.Resize((HOST_SIZE, HOST_SIZE), antialias=True), v2.ToPureTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = [shape(read_grey(path)) for path in tqdm(chosen, desc="reading", unit="image")]
    return torch.stack(images) * 2 - 1


# --- export ---
def export(arguments: argparse.Namespace) -> None:
    """Writes synthetic images to disk."""
    cli_export.run(arguments, _mix(arguments, seed=arguments.seed))


# --- info ---
def info(arguments: argparse.Namespace) -> None:
    """Tells what is installed and what the weights are."""
    mix = _mix(arguments)
    generator, prior = mix.generator, mix.prior
    said = generator.provenance
    named = [name for name, config in ARCHITECTURES.items() if config == generator.config]
    facts: dict[str, dict[str, Any]] = {
        "carim-aug": {"version": _version(), "torch": torch.__version__, "device": _device()},
        "weights": {
            "source": arguments.weights or "bundled",
            "architecture": named[0] if named else "custom",
            "image size": generator.image_size,
            "parameters": sum(p.numel() for p in generator.parameters()),
            "sha256": generator.weights_hash,
            "value range": list(generator.value_range),
            **{key.replace("_", " "): said.get(key) for key in ("training_data", "recipe", "git_commit")},
        },
        "prior": {
            "boxes": prior.n_boxes,
            "patients": prior.n_patients,
            "mean count": round(float(prior.counts @ np.arange(1, prior.max_count + 1)), 2),
            "median size": _median_size(prior),
            "description": prior.description,
        },
        "terms": {"licence": LICENCE, "notice": NOTICE},
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for title, rows in facts.items():
        print(title)
        for key, value in rows.items():
            shown = json.dumps(value) if isinstance(value, dict | list) else value
            print(f"  {key:<14}{'unknown' if shown is None else shown}")


def _median_size(prior: LocationPrior) -> float:
    """Median sqrt(width x height) of the boxes that the prior draws, in fractions of the image's side."""
    rng = stream(0, 0, 0)
    boxes = np.concatenate([prior.draw(rng) for _ in range(2000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    return round(float(np.median(np.sqrt(sides.prod(1)))), 4)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _version() -> str:
    try:
        return version("carim-aug")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"


# --- fit-prior ---
def fit_prior(arguments: argparse.Namespace) -> None:
    """Fits, judges and writes a prior."""
    size = arguments.image_size
    if size < 1:
        raise ValueError(f"--image-size must be at least 1, got {size}")
    if arguments.out.suffix != ".safetensors":
        raise ValueError(f"--out must end with .safetensors, got {str(arguments.out)!r}")
    boxes, patients = read_patients_boxes(arguments.boxes, arguments.finding, size)
    if arguments.exclude_split:
        table, *names = arguments.exclude_split
        left_out = _patients_of(Path(table), names or ["val", "test"])
        kept = [name for name in boxes if patients[name] not in left_out]
        print(f"{len(boxes) - len(kept)} of {len(boxes)} images left out: their patients are in {table}")
        boxes = {name: boxes[name] for name in kept}
    if not boxes:
        raise DataError(f"{arguments.boxes}: no image left to fit on")
    images, owners = list(boxes.values()), [patients[name] for name in boxes]
    told = held_out(images, owners, size)
    about = f"Boxes of {arguments.boxes.name}, fitted with carim-aug {_version()}, each patient counting once."
    prior = LocationPrior.fit(images, size, patients=owners, description=about)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(arguments.out)
    print(f"{prior}\n{told}\nPrior: {arguments.out}")
    picture = arguments.out.with_suffix(".png")
    try:
        prior.plot().savefig(picture)
        print(f"Picture: {picture}")
    except ImportError as error:
        print(f"No picture: {error}")


def read_patients_boxes(path: Path, finding: str, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Boxes (k, 4) float64 XYXY in pixels by image, and the patient of each image.

    Args:
        path: CSV with columns Image Index, Finding Label and x, y, w, h (either published style), or image, x1, y1, x2,
            y2 and optionally patient and finding. Without a patient column the patient is the part of the file's name
            before the first underscore.
        finding: which boxes, where the table names findings.
        size: side of the images in pixels; the published tables have 1024.

    Raises:
        DataError: a table that is missing, breaks its rules, or holds no such box.
        ValueError: another size than 1024 with a published table.
    """
    corners = ("x1", "y1", "x2", "y2")
    try:
        rows, key = list(read_rows(path, ("Image Index",))), "Image Index"
    except DataError:
        rows, key = list(read_rows(path, ("image", *corners))), "image"
    published = key == "Image Index"
    if published and size != BOX_SIZE:
        raise ValueError(f"--image-size must be {BOX_SIZE} for a table with 'Image Index', got {size}")
    found: dict[str, list[tuple[float, ...]]] = {}
    findings: set[str] = set()
    if published:
        for name, named in read_boxes(path).items():
            findings.update(box[0] for box in named)
            found[name] = [box[1:] for box in named if box[0] == finding]
    else:
        for line, row in rows:
            findings.add(row.get("finding", finding))
            if any(row[corner] for corner in corners) and row.get("finding", finding) == finding:
                x1, y1, x2, y2 = (number(path, line, corner, row[corner]) for corner in corners)
                box = clip_box(path, line, (x1, y1, x2, y2), (size, size), slack=1.0)
                found.setdefault(row["image"], []).append(box)
    boxes = {name: torch.tensor(of, dtype=torch.float64) for name, of in found.items() if of}
    if not boxes:
        raise DataError(f"{path}: no box of {finding!r}; findings there: {', '.join(sorted(findings)) or 'none'}")
    patients = {row[key]: row.get("patient") or _patient_in(row[key]) for _, row in rows}
    return boxes, {name: patients[name] for name in boxes}


def held_out(images: Sequence[Tensor], patients: Sequence[str], size: int) -> str:
    """Mean log density of each patient's boxes under priors fitted without that patient's fold, in words."""
    order = sorted(set(patients))
    if len(order) < 2:
        return "Held out: nothing, for all boxes are of one patient."
    rng = stream(0, 0, 0)
    folds = min(FOLDS, len(order))
    fold_of = {patient: i % folds for i, patient in enumerate(rng.permutation(order).tolist())}
    means: list[float] = []
    inside = total = 0
    for fold_ in tqdm(range(folds), desc="cross-validation", unit="fold"):
        known = [i for i, patient in enumerate(patients) if fold_of[patient] != fold_]
        prior = LocationPrior.fit([images[i] for i in known], size, patients=[patients[i] for i in known])
        for patient in (p for p in order if fold_of[p] == fold_):
            own = torch.cat([image for image, p in zip(images, patients, strict=True) if p == patient])
            values = prior.log_prob(own, size)
            total += len(values)
            values = values[values.isfinite()]
            inside += len(values)
            if len(values):
                means.append(float(values.mean()))
    if not means:
        return f"Held out: none of {total} boxes lies in the lung field and the size bounds."
    error = float(np.std(means) / np.sqrt(len(means)))
    return (
        f"Held out by patient ({folds} folds): log density {np.mean(means):.3f} +- {error:.3f} (each of {len(means)} "
        f"patients once), over the {inside} of {total} boxes that lie in the lung field and the size bounds."
    )


def _patients_of(table: Path, names: Sequence[str]) -> set[str]:
    unknown = set(names).difference(SPLITS)
    if unknown:
        raise ValueError(f"--exclude-split takes names among {', '.join(SPLITS)}, got {sorted(unknown)[0]!r}")
    rows = read_rows(table, ("Image Index", "split"))
    return {row.get("patient") or _patient_in(row["Image Index"]) for _, row in rows if row["split"] in names}


def _patient_in(name: str) -> str:
    return Path(name).stem.partition("_")[0]
