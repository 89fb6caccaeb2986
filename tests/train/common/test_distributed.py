"""Two processes on the CPU train as one does; each has its part of a batch."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.common.distributed import Part, launched
from train.common.run import RunError
from train.gan.batch import Batch
from train.gan.diffaugment import DiffAugment

ROOT = Path(__file__).resolve().parents[3]


def _train(processes, phantom_data, templates, folder, images=32):
    # By its path: torch-fidelity installs a package of the name `tests`, which -m would find first.
    command = [sys.executable, ROOT / "tests" / "two_processes.py", phantom_data, templates, folder / f"run{processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), str(processes), str(images)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.timeout(1300)  # seconds on two free cores, minutes on busy ones
def test_two_processes_have_equal_weights_near_those_of_one(phantom_data, templates, tmp_path):
    (one,) = _train(1, phantom_data, templates, tmp_path)
    first, second = _train(2, phantom_data, templates, tmp_path)
    statistics = ("running_mean", "running_var")  # batch norm's, of each process's part until the next forward pass
    names = [k for k in first["networks"] if not k.endswith(statistics)]
    assert all(torch.equal(first["networks"][k], second["networks"][k]) for k in names)
    assert any(k.endswith("_u") for k in names) and any(k.startswith("average.") for k in names)
    lines = [
        [json.loads(line) for line in (tmp_path / f"run{n}" / "log.jsonl").read_text().splitlines()] for n in (1, 2)
    ]
    assert [line["images"] for line in lines[0]] == [line["images"] for line in lines[1]]
    # Four steps of Adam move a weight by 8e-4 at most; what differs is batch norm's statistics of half a batch.
    far = max(
        (one["networks"][k] - first["networks"][k]).abs().max() for k in names if "scales" in k and "original" in k
    )
    assert far <= 1.7e-3
    mean = (first["losses"]["d32"] + second["losses"]["d32"]) / 2
    assert mean.item() == pytest.approx(one["losses"]["d32"].item(), rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_two_processes_go_on_as_if_they_had_never_stopped(phantom_data, templates, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    straight.mkdir()
    cut.mkdir()
    whole, _ = _train(2, phantom_data, templates, straight)
    _train(2, phantom_data, templates, cut, images=16)
    first, second = _train(2, phantom_data, templates, cut)
    # Batch norm's statistics of each process are its own; the checkpoint holds the first one's.
    names = [k for k in whole["networks"] if not k.endswith(("running_mean", "running_var"))]
    assert all(torch.equal(whole["networks"][k], first["networks"][k]) for k in names)
    assert all(torch.equal(first["networks"][k], second["networks"][k]) for k in names)


def test_parts_of_a_batch_are_all_of_it_with_both_classes_in_each():
    rows = torch.arange(8.0)
    batch = Batch(
        **{f.name: rows[: 4 if f.name in ("noise", "masks", "boxes") else 8] for f in dataclasses.fields(Batch)}
    )
    parts = [Part(rank, 2).batch(batch) for rank in range(2)]
    assert [p.images.tolist() for p in parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [p.noise.tolist() for p in parts] == [[0, 2], [1, 3]]
    assert sorted(torch.cat([p.crops for p in parts]).tolist()) == rows.tolist()
    assert Part().batch(batch) is batch


def test_augmentation_of_a_part_is_its_rows_of_the_whole_draw():
    whole = DiffAugment.draw(8, generator=torch.Generator().manual_seed(0))
    part = Part(1, 2).changes(whole)
    assert torch.equal(part.brightness, whole.brightness[[1, 3, 5, 7]])
    assert torch.equal(part.theta, whole.theta[[1, 3, 5, 7]])


def test_devices_that_are_not_there_are_named():
    with pytest.raises(RunError, match="precision must be one of"):
        launched(precision="fp8")
    with pytest.raises(RunError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        launched("tpu")
    count = torch.cuda.device_count()
    with pytest.raises(RunError, match=f"devices must be at most the {count} CUDA devices here, got {count + 1}"):
        launched("cuda", devices=count + 1)
