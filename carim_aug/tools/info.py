"""What is installed, what this machine computes in, and what the weights are."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.ops.precision import precision_of
from carim_aug.ops.random import stream
from carim_aug.transforms.mix import SyntheticNoduleMix

NOTICE = "Research use; not a medical device."
LICENCE = "MIT (code); the weights' training data is named above"


def collect_facts(mix: SyntheticNoduleMix, source: str) -> dict[str, dict[str, Any]]:
    """Return what there is to know, title to rows, of a mix whose weights came from `source`."""
    generator, prior, device = mix.generator, mix.prior, find_device()
    named = (name for name, config in ARCHITECTURES.items() if config.to_dict() == generator.architecture)
    dtype, reason = precision_of(device)
    rng = stream(0, 0, 0)
    boxes = np.concatenate([prior.draw(rng) for _ in range(2000)])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    return {
        "carim-aug": {
            "version": find_version(),
            "torch": torch.__version__,
            "device": device,
            "bfloat16": "yes" if dtype == torch.bfloat16 else "no",
            "why": reason,
            "dtype='auto'": str(dtype),
        },
        "weights": {
            "source": source,
            "format": generator.format,
            "architecture": next(named, "custom"),
            "image size": generator.image_size,
            "parameters": sum(parameter.numel() for parameter in generator.network.parameters()),
            "sha256": generator.weights_hash,
            "value range": [-1, 1],
            "training data": generator.provenance.get("training_data"),
            "recipe": generator.provenance.get("recipe"),
            "git commit": generator.provenance.get("git_commit"),
        },
        "prior": {
            "boxes": prior.n_boxes,
            "patients": prior.n_patients,
            "mean count": round(float(prior.counts @ np.arange(1, prior.max_count + 1)), 2),
            "median size": round(float(np.median(sides)), 4),
            "description": prior.description,
        },
        "terms": {"licence": LICENCE, "notice": NOTICE},
    }


def print_facts(facts: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Print facts, as JSON or as a table."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for title, rows in facts.items():
        print(title)
        for key, value in rows.items():
            text = json.dumps(value) if isinstance(value, dict | list) else value
            print(f"  {key:<14}{'unknown' if text is None else text}")


def find_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_version() -> str:
    """Return the version of the installed package; 0.0.0 in a checkout that is not installed."""
    try:
        return version("carim-aug")
    except PackageNotFoundError:
        return "0.0.0"
