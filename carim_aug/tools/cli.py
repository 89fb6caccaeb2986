"""The command `carim-aug`: demo, preview, export, info, fit-prior."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from carim_aug.data.chestxray14_tables import BOX_SIZE
from carim_aug.location.placement import PLACEMENTS
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import stream
from carim_aug.tools.demo import run_demo
from carim_aug.tools.export import COMPLETE, ExportError, export
from carim_aug.tools.export_backgrounds import Background, describe_backgrounds, find_backgrounds
from carim_aug.tools.fit_prior import fit_prior
from carim_aug.tools.info import NOTICE, collect_facts, find_device, find_version, print_facts
from carim_aug.tools.plots import contact_sheet, save_picture
from carim_aug.transforms.gate import GateError, contrast_gate
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.settings import INSERTIONS

PREVIEW_SIZE = 512  # side, in pixels, at which preview reads real images


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, the words after `carim-aug`; return 0, or 2 after an error, which is one line on stderr."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, ExportError, GateError) as error:
        print(f"carim-aug: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    about = f"Synthetic lung nodules for chest X-ray training loops. {NOTICE}"
    parser = argparse.ArgumentParser(prog="carim-aug", description=about)
    parser.add_argument("--version", action="version", version=f"carim-aug {find_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Any, text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if name != "fit-prior":
            command.add_argument("--weights", metavar="FOLDER|HUB_ID", help="weights and prior; default: the bundled")
            command.add_argument("--prior", type=Path, metavar="FILE", help="in place of the prior beside the weights")
        return command.add_argument

    def add_grafts(word: Any) -> None:
        word(
            "--data", type=Path, metavar="FOLDER", help="real backgrounds: ChestX-ray14's layout, or images in folders"
        )
        word("--normal", nargs="+", default=[], metavar="NAME", help="folders of normal images in --data; . for all")
        word("--split", default="train", help="of --data, and of all that is exported: train (default) or val")
        word("--placement", choices=PLACEMENTS, help="in each image's lungs (default), or anywhere that the prior says")
        word("--strength", nargs="+", type=float, metavar="S", help="of nodules, or least and most of it (default: 1)")
        word(
            "--gate", nargs="?", const=0.02, type=float, metavar="LEAST", help="contrast of the faintest (alone: 0.02)"
        )
        word("--seed", type=int, default=0, help="of everything random (default: 0)")

    word = add("demo", _demo, "Train a small classifier on drawn phantoms with synthetic nodules grafted in.")
    word("--out", type=Path, default=Path("demo"), help="folder of the picture (default: demo)")
    word("--seed", type=int, default=0, help="of everything random (default: 0)")
    word("--batches", type=int, default=24, help="training batches of 32 (default: 24)")

    word = add("preview", _preview, "Draw a contact sheet: backgrounds, grafts with their boxes, whole images.")
    add_grafts(word)
    word("--out", type=Path, default=Path("preview.png"), help="PNG file (default: preview.png)")
    word("--n", type=int, default=6, help="rows (default: 6)")

    word = add("export", _export, "Write a data set: PNG, COCO, ChestX-ray14, YOLO. Run again, it goes on.")
    add_grafts(word)
    word("--out", type=Path, required=True, help="folder to write, or to go on with")
    word("--n", "--nodules", type=int, dest="n", help="images with nodules (default: one per background with --data)")
    word("--negatives", type=int, default=0, help="images without: real ones with --data, else whole ones (default: 0)")
    held_out = "of --data's validation split, or of one in ten patients, written too"
    word("--val", type=Path, metavar="FOLDER", help=f"data.yaml's: real images/ and labels/ (default: real {held_out})")
    word("--insertion", choices=INSERTIONS, help="default: graft with --data, else whole")
    word("--size", type=int, help="width and height in pixels (default: the generator's, or the background's)")
    word("--bits", type=int, default=8, help="of a pixel: 8 or 16 (default: 8)")

    word = add("info", _info, "Print version, device and bfloat16, weights and prior.")
    word("--json", action="store_true", help="as JSON")

    word = add("fit-prior", _fit_prior, "Fit a location prior on your own nodule boxes.")
    tables = "CSV: ChestX-ray14's or ChestX-Det's columns, or image, x1, y1, x2, y2 [, patient] [, finding]"
    word("boxes", type=Path, help=tables)
    word("--out", type=Path, required=True, help="safetensors file to write")
    word("--image-size", type=int, default=BOX_SIZE, help="pixels the boxes refer to (default: 1024)")
    word("--finding", default="Nodule", help="which boxes, where the table names findings")
    splits = "leave out all patients of these splits (default: val test) of a CSV with columns Image Index, split"
    word("--exclude-split", nargs="+", metavar=("SPLIT.CSV", "NAME"), help=splits)
    return parser


def _load_mix(options: argparse.Namespace, **more: Any) -> SyntheticNoduleMix:
    prior = None if options.prior is None else LocationPrior.load(options.prior)
    return SyntheticNoduleMix.from_pretrained(options.weights, prior=prior, **more)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _demo(options: argparse.Namespace) -> None:
    _check_positive("--batches", options.batches)
    mix = _load_mix(options, p=0.3, seed=options.seed, device=find_device())
    run_demo(mix, options.out, batches=options.batches, device=find_device())
    print(NOTICE)


def _graft_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the mix's options of grafts that are given."""
    given: dict[str, Any] = {"placement": options.placement}
    if options.strength is not None:
        given["strength"] = options.strength[0] if len(options.strength) == 1 else tuple(options.strength)
    if options.gate is not None:
        given["gate"] = contrast_gate(options.gate)
    return {name: value for name, value in given.items() if value is not None}


def _find_backgrounds(options: argparse.Namespace) -> list[Background]:
    """Return the backgrounds in --data, and say which they are; none without it."""
    if options.data is None:
        if options.normal:
            remedy = "images without nodules are --negatives N"
            raise ValueError(f"--normal must be names of folders in --data, got {' '.join(options.normal)}: {remedy}")
        return []
    found = find_backgrounds(options.data, options.split, options.normal)
    print(f"Backgrounds: {describe_backgrounds(options.data, found)}")
    return found


def _preview(options: argparse.Namespace) -> None:
    _check_positive("--n", options.n)
    mix = _load_mix(options, seed=options.seed, **_graft_options(options))
    found, real = _find_backgrounds(options), None
    if found:
        chosen = stream(options.seed, 0, 0).permutation(len(found))[: options.n]
        bar = tqdm(chosen.tolist(), desc="reading", unit="image")
        real = torch.stack([found[i].read(PREVIEW_SIZE) for i in bar]) * 2 - 1
    save_picture(contact_sheet(mix, real, n=options.n, seed=options.seed), options.out)
    print(f"{options.out}: {options.n} rows, {'no' if real is None else len(real)} real images. {NOTICE}")


def _export(options: argparse.Namespace) -> None:
    wanted, graft = options.insertion or ("whole" if options.data is None else "graft"), _graft_options(options)
    if (wanted == "graft") != (options.data is not None):
        raise ValueError(f"--insertion must be graft with --data and whole without, got {wanted}")
    if graft and wanted == "whole":
        raise ValueError(f"--{next(iter(graft))} must be given with --data, for grafts, got no --data")
    _find_backgrounds(options)
    started = time.perf_counter()
    settings = {name: getattr(options, name) for name in ("n", "negatives", "normal", "val", "size", "bits", "split")}
    mix = _load_mix(options, seed=options.seed, insertion=wanted, **graft)
    counts = export(mix, options.out, backgrounds=options.data, **settings)
    rate = counts["written"] / (time.perf_counter() - started)
    reader = "carim_aug.data.ChestXray14 reads them" if options.bits == 8 else "ChestX-ray14's tables"
    refused = counts["real"] - options.negatives * (wanted == "graft")
    left = f" ({refused} because no nodule passed)" if refused else ""
    yolo = "labels/*.txt: YOLO" if options.split == "val" else "labels/*.txt, data.yaml: YOLO"
    print(f"""\
{options.out}: {counts["images"] - counts["real"]} synthetic images, {counts["nodules"]} nodules, split {options.split}
  images/*.png          each with its key and weights' hash in it; {counts["real"]} of real images as they are{left}
  annotations.json      COCO;  {yolo};  provenance.csv: where each comes from
  Data_Entry_2017.csv, BBox_List_2017.csv, split.csv: {reader}
{counts["written"]} written now, {rate:.1f} images/s.{_say_validation(options, counts["val"])}
{COMPLETE} says that all is there. For training only: assert_real_only refuses this folder.""")


def _say_validation(options: argparse.Namespace, real: int) -> str:
    if options.split == "val":
        return ""
    if options.val or real:
        return f"\ndata.yaml validates on real images: {options.val or f'{real} in val/images'}."
    return "\ndata.yaml has nothing to validate on: put real images into val/, or write --val FOLDER."


def _info(options: argparse.Namespace) -> None:
    print_facts(collect_facts(_load_mix(options), options.weights or "bundled"), as_json=options.json)


def _fit_prior(options: argparse.Namespace) -> None:
    _check_positive("--image-size", options.image_size)
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out must end with .safetensors, got {str(options.out)!r}")
    given = {"size": options.image_size, "finding": options.finding, "exclude": options.exclude_split}
    fit_prior(options.boxes, options.out, **given)
