"""Small data sets and a mix with an untrained 32-pixel generator, for tests and benchmarks of the mix."""

import contextlib
import functools
import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix

torch.set_num_threads(1)  # tensors here are so small that more threads only wait for each other


@functools.cache
def generator(name: str = "tiny") -> NoduleGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoduleGenerator(name).eval()


@functools.cache
def prior() -> LocationPrior:
    return LocationPrior.bundled()


def make_mix(**options) -> SyntheticNoduleMix:
    return SyntheticNoduleMix(generator(), prior(), **options)


class Films(Dataset):
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


class Records(Films):
    """The same as torchxrayvision gives it: dicts of numpy arrays in [-1024, 1024], 18 labels, some NaN."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        row = np.zeros(18, dtype=np.float32)
        row[11], row[14:] = label, np.nan
        return {"idx": i, "lab": row, "img": image.numpy() * 2048 - 1024}


def decisions(batches, last_params):
    """Everything that was decided, by index: (index, class, noise seed, bytes of boxes, host, label), in order."""
    rows = []
    for _, labels in batches:
        slots = last_params().slots
        for slot, label in zip(slots, labels.tolist(), strict=True):
            rows.append((slot.key, slot.class_name, slot.noise_seed, slot.boxes.tobytes(), slot.host, label))
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
