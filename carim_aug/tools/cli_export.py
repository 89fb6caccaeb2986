"""The words of `carim-aug export`, and what it says."""

import argparse
import os
import time
from pathlib import Path

from carim_aug.tools.export import COMPLETE, export
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import INSERTIONS


def add_words(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `carim-aug export` but --weights and --prior."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument(
        "--n",
        "--nodules",
        type=int,
        dest="n",
        help="images with nodules (default: one per host with --data); under torchrun, which has a --n: --nodules",
    )
    parser.add_argument("--normal", type=int, default=0, help="whole images without nodules (default: 0)")
    parser.add_argument(
        "--data", type=Path, help="graft into the normal films of this folder: ChestX-ray14's layout, or images"
    )
    parser.add_argument("--insertion", choices=INSERTIONS, help="default: graft with --data, else whole")
    parser.add_argument(
        "--split", default="train", help="of the hosts, and of all that is written: train or val (default: train)"
    )
    parser.add_argument("--size", type=int, help="width and height in pixels (default: the generator's, or the host's)")
    parser.add_argument("--bits", type=int, default=8, help="of a pixel: 8 or 16 (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def run(arguments: argparse.Namespace, mix: SyntheticNoduleMix) -> None:
    """Writes the data set; under torchrun, this process's share of it."""
    wanted = arguments.insertion or ("whole" if arguments.data is None else "graft")
    if (wanted == "graft") != (arguments.data is not None):
        raise ValueError(f"--insertion must be graft with --data and whole without, got {wanted}")
    started = time.perf_counter()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    counts = export(
        mix,
        arguments.out,
        n=arguments.n,
        normal=arguments.normal,
        hosts=arguments.data,
        size=arguments.size,
        bits=arguments.bits,
        split=arguments.split,
        rank=rank,
        world_size=world_size,
    )
    if rank:
        return
    taken = time.perf_counter() - started
    print(f"{arguments.out}: {counts['images']} synthetic images, {counts['nodules']} nodules, split {arguments.split}")
    print("  images/*.png          each with its key and weights' hash in it")
    print("  annotations.json      COCO;  labels/*.txt, data.yaml: YOLO;  provenance.csv: where each comes from")
    reader = "carim_aug.data.ChestXray14 reads them" if arguments.bits == 8 else "ChestX-ray14's tables"
    print(f"  Data_Entry_2017.csv, BBox_List_2017.csv, split.csv: {reader}")
    rate = counts["written"] / taken
    print(f"{counts['written']} of them written now by process 0 of {world_size}, {rate:.1f} images/s.")
    print(f"{COMPLETE} says that all is there. For training only: assert_real_only refuses this folder.")
