"""Small data sets, and a mix with an untrained 32-pixel generator, for tests and benchmarks of the mix."""

import contextlib
import functools
import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from carim_aug import LabelPolicy, LocationPrior, SyntheticNoduleMix, WholeImageGenerator
from carim_aug.ops.findings import FINDINGS, TORCHXRAYVISION18

torch.set_num_threads(1)  # tensors here are so small that more threads only wait for each other


@functools.cache
def generator(name: str = "tiny") -> WholeImageGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WholeImageGenerator(name)


@functools.cache
def prior() -> LocationPrior:
    return LocationPrior.bundled()


def make_mix(**options) -> SyntheticNoduleMix:
    """A mix that does not look for lungs: most images here are stand-ins without."""
    return SyntheticNoduleMix(generator(), prior(), **{"placement": "prior", **options})


def named(columns: int | None) -> LabelPolicy:
    """The names of labels of so many columns: what has several must be named."""
    return LabelPolicy(classes={2: ("No Finding", "Nodule"), 14: FINDINGS, 18: TORCHXRAYVISION18}.get(columns))


class Images(Dataset):
    """n images, each filled with its index / n, and integer labels: every fourth is a nodule. Counts its reads."""

    def __init__(self, n: int = 40, *, labels=None, size=(32, 32), channels=1, targets=True, classes=None):
        self.n, self.size, self.channels = n, size, channels
        self._labels = [int(i % 4 == 3) for i in range(n)] if labels is None else list(labels)
        if targets:
            self.targets = self._labels
        if classes is not None:
            self.classes = classes
        self.reads = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        return torch.full((self.channels, *self.size), i / self.n), self._labels[i]


class Records(Images):
    """The same as torchxrayvision has it: dicts of numpy arrays in [-1024, 1024], 18 labels, some NaN."""

    pathologies = list(TORCHXRAYVISION18)

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        row = np.zeros(18, dtype=np.float32)
        row[11], row[14:] = label, np.nan
        return {"idx": i, "lab": row, "img": image.numpy() * 2048 - 1024}


class Samples(Dataset):
    """n samples of any structure, made by a function of the index."""

    def __init__(self, make, n: int = 12):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


def batch(n: int = 8, size=(32, 32), channels: int = 1, seed: int = 0):
    """n noisy images in [0, 1] and integer labels: every fourth is a nodule."""
    images = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(n) % 4 // 3


class FirstBoxes(Dataset):
    """The first box of each of 24 albumentations samples; here, for spawned workers do not find test modules."""

    def __init__(self, pipeline, image, *, indexed):
        self.pipeline, self.image, self.indexed = pipeline, image, indexed

    def __len__(self):
        return 24

    def __getitem__(self, i):
        more = {"index": i} if self.indexed else {}
        boxes = self.pipeline(image=self.image, bboxes=[], labels=[], **more)["bboxes"]
        return torch.tensor(np.array(boxes)).reshape(-1, 4)[0]


def decisions(batches, last_params):
    """All that was decided, in order: (key, class, noise seed, bytes of boxes, background, label)."""
    rows = []
    for _, labels in batches:
        for d, label in zip(last_params().decisions, labels.tolist(), strict=True):
            rows.append((d.key, d.class_name, d.noise_seed, d.boxes.tobytes(), d.background, label))
    return rows


@contextlib.contextmanager
def global_states_untouched():
    """Fails if torch's, numpy's or Python's global random state is moved."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(before[0], torch.get_rng_state()), "torch's global random state has moved"
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True)), "numpy's has moved"
    assert before[2] == random.getstate(), "random's has moved"


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
