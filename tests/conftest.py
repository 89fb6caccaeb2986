"""Fixtures for all tests: real images if they are at hand, and phantoms in the same layout; hypothesis' profiles."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from carim_aug.data.phantom import phantom_chest

ROOT = Path(__file__).resolve().parents[1]

for _name, _examples in {"local": 25, "ci": 100}.items():  # a busy machine is no error
    settings.register_profile(
        _name, max_examples=_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


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


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """ChestX-ray14's layout: 24 phantom chests to train, 12 to validate, a third with a nodule, half of those boxed."""
    root = tmp_path_factory.mktemp("phantom")
    (root / "images").mkdir()
    rows, boxes, splits = [], [], []
    for i in range(36):
        name, nodule = f"{i + 1:08d}_000.png", i % 3 == 0
        box = [20 + i % 24, 24, 28 + i % 24, 32]
        image = phantom_chest(64, nodule_box=box if nodule else None, seed=i)
        Image.fromarray((image[0].numpy() * 255).astype(np.uint8)).save(root / "images" / name)
        rows.append([name, "Nodule" if nodule else "No Finding", 0, i + 1, 50, "M", "PA", 1024, 1024, 0.14, 0.14])
        splits.append([name, "train" if i < 24 else "val"])
        if nodule and i % 2 == 0:
            boxes.append([name, "Nodule", *(16 * v for v in (box[0], box[1], 8, 8))])
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    head += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    for name, header, lines in (
        ("Data_Entry_2017_v2020.csv", head, rows),
        ("BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h]", boxes),
        ("split.csv", "Image Index,split", splits),
    ):
        with (root / name).open("w", newline="") as file:
            file.write(header + "\n")
            csv.writer(file).writerows(lines)
    return root


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Round soft templates in the layout of the CT nodules' file."""
    y, x = np.mgrid[:50, :50] - 24.5
    discs = np.stack([np.clip(r**2 - x**2 - y**2, 0, None) ** 0.5 for r in np.linspace(3, 12, 12)]).astype(np.float16)
    path = tmp_path_factory.mktemp("ct") / "templates.npz"
    diameter = np.linspace(6, 24, 12).astype(np.float32)
    np.savez(path, frontal=discs, sagittal=discs, diameter_mm=diameter, name=np.array([str(i) for i in range(12)]))
    return path


@pytest.fixture(autouse=True)
def _one_thread_is_enough():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    yield
