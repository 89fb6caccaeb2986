"""What the tests of the GAN's training share: a preset of seconds, its first stage, and a classifier's file."""

import dataclasses

import pytest
import torch

from carim_aug.ops.findings import FINDINGS
from train.classifier.densenet import ChestClassifier
from train.gan.presets import PRESETS
from train.gan.training import train_gan


@pytest.fixture(scope="session")
def tiny():
    """48 images in 6 steps; the second branch joins after two, and a snapshot is taken every two."""
    return dataclasses.replace(PRESETS["tiny"], images=48, batch=8, grow_at=(16,), snapshot_images=16)


@pytest.fixture(scope="session")
def stage1(tiny, phantom_data, templates, tmp_path_factory):
    """A finished run of stage 1."""
    out = tmp_path_factory.mktemp("gan") / "stage1"
    train_gan(tiny, data=phantom_data, ct_nodules=templates, out=out)
    return out


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    """An untrained classifier of the 14 findings."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ChestClassifier(FINDINGS, size=32).save(path)
    return path
