"""Two processes on the CPU train as one does; each has its part of a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.common.distributed import Part, launch, resolve_precision
from train.common.run import RunError

ROOT = Path(__file__).resolve().parents[3]


def _train(processes, phantom_data, templates, folder, images=32):
    # By its path: torch-fidelity installs a package of the name `tests`, which -m would find first.
    command = [sys.executable, ROOT / "tests" / "two_processes.py", phantom_data, templates, folder / f"run{processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([*map(str, command), str(processes), str(images)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]


def _equal(first, second):
    # Batch norm's statistics are of each process's part until the next forward pass; a checkpoint holds the first's.
    names = [k for k in first["networks"] if not k.endswith(("running_mean", "running_var"))]
    assert any(k.endswith("_u") for k in names) and any(k.startswith("average.") for k in names)
    return all(torch.equal(first["networks"][k], second["networks"][k]) for k in names)


@pytest.mark.train
@pytest.mark.timeout(1300)  # seconds on two free cores, minutes on busy ones
def test_two_processes_have_equal_weights_near_those_of_one(phantom_data, templates, tmp_path):
    (one,) = _train(1, phantom_data, templates, tmp_path)
    first, second = _train(2, phantom_data, templates, tmp_path)
    assert _equal(first, second)
    logs = [(tmp_path / f"run{n}" / "log.jsonl").read_text().splitlines() for n in (1, 2)]
    seen = [[json.loads(line)["images"] for line in log] for log in logs]
    assert seen[0] == seen[1]
    # Four steps of Adam move a weight by 8e-4 at most; what differs is batch norm's statistics of half a batch.
    names = [k for k in one["networks"] if "scales" in k and "original" in k]
    assert max((one["networks"][k] - first["networks"][k]).abs().max() for k in names) <= 1.7e-3
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
    assert _equal(whole, first) and _equal(first, second)


def test_a_part_has_every_so_manieth_row_and_the_same_of_both_halves():
    rows = torch.arange(8.0)
    assert [Part(rank, 2).of(rows).tolist() for rank in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert Part(1, 2).halves(rows).tolist() == [1, 3, 5, 7] and Part(1, 4).halves(rows).tolist() == [1, 5]
    assert torch.equal(Part().of(rows), rows) and Part().halves(rows) is rows


def test_precision_is_what_the_hardware_has_or_what_is_asked_and_what_is_not_there_is_named(monkeypatch):
    for dtype, precision in ((torch.bfloat16, "bf16-mixed"), (torch.float32, "32-true")):
        monkeypatch.setattr("train.common.distributed.compute_dtype", lambda *_, d=dtype: d)
        assert resolve_precision("auto", "cpu") == precision and resolve_precision(precision, "cpu") == precision
    count = torch.cuda.device_count()
    for options, message in (
        ({"precision": "fp8"}, "precision must be one of .* got 'fp8'"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "cuda", "devices": count + 1}, f"at most the {count} CUDA devices here, got {count + 1}"),
    ):
        with pytest.raises(RunError, match=message):
            launch(**options)
