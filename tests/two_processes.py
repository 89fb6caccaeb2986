"""A training that keeps each process's networks after the last step: run by tests/train/common/test_distributed.py."""

import dataclasses
import sys
from pathlib import Path

import torch

from train.gan import training as gan
from train.gan.presets import PRESETS

torch.set_num_threads(1)


def main(data: str, templates: str, out: str, processes: str, images: str = "32") -> None:
    step = gan.train_step

    def watched(state, batch, *args, **kwargs):
        losses, finite = step(state, batch, *args, **kwargs)
        after = {"networks": state.networks.state_dict(), "losses": losses}
        torch.save(after, Path(out).with_name(f"{processes}-{state.part.rank}.pt"))
        return losses, finite

    gan.train_step = watched
    preset = dataclasses.replace(PRESETS["tiny"], images=int(images), batch=8, grow_at=(16,), snapshot_images=32)
    gan.train_gan(preset, data=data, ct_nodules=templates, out=out, devices=int(processes), minutes=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
