"""Fixtures for all tests: where real images are, if they are at hand."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path | None:
    base = Path(os.environ.get("CARIM_DATA", ROOT.parent / "shared" / "data"))
    return base / name if (base / name).is_dir() else None


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real ChestX-ray14 images, or a skip that says how to give it."""
    folder = _folder("nih-cxr14-mini")
    if folder is None:
        pytest.skip("no real chest X-rays here: set CARIM_DATA to a folder that holds nih-cxr14-mini")
    return folder


@pytest.fixture(scope="session")
def ct_nodules() -> Path:
    """The file of CT nodule templates, or a skip that says how to give it."""
    folder = _folder("ct-nodules")
    if folder is None:
        pytest.skip("no CT nodule templates here: set CARIM_DATA to a folder that holds ct-nodules")
    return folder / "templates.npz"


@pytest.fixture(autouse=True)
def _one_thread_is_enough():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    yield
