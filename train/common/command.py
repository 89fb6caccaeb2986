"""What the recipes' commands have in common: options, and errors that end them in one line."""

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from carim_aug.data.io import DataError
from carim_aug.generators.weights import WeightsError
from train.common.distributed import PRECISIONS
from train.common.presets import Preset, find_preset, override
from train.common.run import RunError, TrainingError

OPTIONS: dict[str, dict[str, Any]] = {
    "--preset": {},
    "--set": {"nargs": "+", "default": [], "metavar": "NAME=VALUE", "help": "numbers other than the preset's"},
    "--data": {"required": True, "help": "a folder in ChestX-ray14's layout, with split.csv"},
    "--ct-nodules": {"help": "templates.npz of CT nodules in projection"},
    "--out": {"required": True, "help": "the run's folder; the same folder resumes"},
    "--images": {"type": int, "help": "real images to show, in place of the preset's"},
    "--minutes": {"type": float, "default": math.inf, "help": "stop after so long"},
    "--any-size": {"action": "store_true", "help": "take images of several sizes, each made a square"},
    "--seed": {"type": int, "default": 0, "help": "of everything random"},
    "--device": {"default": "cuda" if torch.cuda.is_available() else "cpu", "choices": ("cpu", "cuda")},
    "--devices": {"type": int, "default": 1, "help": "GPUs (or CPU processes) on each machine"},
    "--nodes": {"type": int, "default": 1, "help": "machines"},
    "--precision": {"default": "auto", "choices": PRECISIONS},
    "--compile": {"dest": "compiled", "action": "store_true", "help": "torch.compile the networks"},
}


def recipe_parser(about: str | None, *names: str, **changes: dict[str, Any]) -> argparse.ArgumentParser:
    """Return a parser with some of `OPTIONS`; changes: further arguments of one, as `minutes={"default": 25.0}`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(name, **OPTIONS[name] | changes.get(name[2:].replace("-", "_"), {}))
    return parser


def read_options(parser: argparse.ArgumentParser, presets: Mapping[str, Preset]) -> tuple[Preset, dict[str, Any]]:
    """Return the preset that the command line asks for, with its changes (--set, --images), and the other options."""
    options = vars(parser.parse_args())
    name, settings, images = (options.pop(name, None) for name in ("preset", "set", "images"))
    preset = override(find_preset(presets, name), settings or ())
    return preset if images is None else replace(preset, images=images), options


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """End the program with one line if what it is given does not fit, or its training cannot go on."""
    try:
        yield
    except (RunError, TrainingError, DataError, WeightsError) as error:
        raise SystemExit(f"error: {error}") from error
