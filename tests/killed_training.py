"""A training that kills its own process with SIGKILL at a given call: a child process must find it outside of tests."""

import os
import pkgutil
import signal
from typing import Any

import torch

from train.gan.presets import GANPreset
from train.gan.training import train_gan


def train(preset: GANPreset, options: dict[str, Any], kill: tuple[str, int] | None = None) -> None:
    """Train; kill: a function's dotted name, and the number of the call that is not made any more."""
    torch.set_num_threads(1)
    if kill is not None:
        where, _, name = kill[0].rpartition(".")
        owner, calls = pkgutil.resolve_name(where), []
        original = getattr(owner, name)

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, deadly)
    train_gan(preset, **options)
