"""A training that keeps each process's networks after the last step: run by tests/test_devices.py."""

import dataclasses
import sys
from pathlib import Path

import torch

from train.gan import training as gan
from train.gan.presets import PRESETS

torch.set_num_threads(1)


def main(data: str, templates: str, out: str, processes: str, images: str = "32") -> None:
    step = gan.train_step

    def watched(wrapped, batch, *args, **kwargs):
        losses, done = step(wrapped, batch, *args, **kwargs)
        kept = {"networks": wrapped.networks.state_dict(), "losses": losses}
        torch.save(kept, Path(out).with_name(f"{processes}-{wrapped.part.rank}.pt"))
        return losses, done

    gan.train_step = watched
    preset = dataclasses.replace(
        PRESETS["tiny"], images=int(images), batch=8, grow_at=(16,), r1_weight=1.0, r1_every=2, snapshot_images=32
    )
    gan.train_gan(preset, data=data, ct_nodules=templates, out=out, devices=int(processes), minutes=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
