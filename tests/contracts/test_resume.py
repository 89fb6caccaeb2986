"""A training killed at any instant goes on as if it had never stopped, bit for bit; faults are named and survived."""

import dataclasses
import errno
import json
import multiprocessing
import shutil
import signal

import killed_training
import pytest
import torch

from carim_aug.generators.pretrained import NoduleGenerator
from train.common.run import TrainingError, read_checkpoint, tensors
from train.gan import snapshots
from train.gan import training as gan
from train.gan.presets import PRESETS
from train.gan.training import train_gan

pytestmark = pytest.mark.train

TINY = dataclasses.replace(
    PRESETS["tiny"], images=64, batch=8, grow_at=(16,), carim_every=2, snapshot_images=16, log_images=16
)
SHORT = dataclasses.replace(TINY, grow_at=())
UNLIKE = ("time", "images_per_s", "memory_mb")

KILLS = (
    ("train.gan.training.train_step", 4),  # after 24 images: the last checkpoint is at 16
    ("train.gan.snapshots.Snapshots._export", 2),  # at 48: the picture is there, the weights and checkpoint are not
    ("pathlib.Path.rename", 2),  # at 48: the old weights are moved away, the new ones not yet in their place
    ("train.common.run.write_whole", 3),  # at 48, after the probe and the log: all is there but the checkpoint
)
"""What kills a process as it is called for the so-manieth time, one start after the other."""


def _lines(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def _left(folder):
    """What a run left behind, without times: weights, tensors of the last checkpoint, pictures, log lines."""
    checkpoint = read_checkpoint(sorted(folder.glob("checkpoint-*.pt"))[-1])
    return {
        "weights": NoduleGenerator.from_pretrained(folder / "export").weights_hash,
        "checkpoint": {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors(checkpoint)},
        "pictures": {p.name: p.read_bytes() for p in sorted(folder.glob("samples-*.png"))},
        "log": [{k: v for k, v in line.items() if k not in UNLIKE} for line in _lines(folder)],
    }


def test_a_run_that_was_killed_ends_bit_equal_to_one_that_was_not(phantom_data, templates, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.gan.training"])

    def run(name, kill=None):
        options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / name}
        process = context.Process(target=killed_training.train, args=(TINY, options, kill))
        process.start()
        process.join()
        return process.exitcode

    assert run("whole") == 0
    assert [run("killed", kill) for kill in KILLS] == [-signal.SIGKILL] * len(KILLS)
    assert run("killed") == 0
    starts = [e["images"] for e in _lines(tmp_path / "killed", "events.jsonl") if e["event"] == "started"]
    assert starts == [0, 16, 32, 32, 32]
    first, second = _left(tmp_path / "whole"), _left(tmp_path / "killed")
    for kind in first:
        assert first[kind] == second[kind], kind
    assert [line["images"] for line in first["log"]] == [8, 24, 40, 56] and len(first["pictures"]) == 4
    assert not [p.name for p in (tmp_path / "killed").iterdir() if p.suffix in (".partial", ".old")]


def test_a_full_disk_is_named_and_survived_and_the_last_checkpoint_stays(
    phantom_data, templates, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    options = {"data": phantom_data, "ct_nodules": templates, "out": out}
    real, asked = snapshots.write_whole, []

    def full(path, data):
        asked.append(path)
        if 2 <= len(asked) <= until:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    # Full for one snapshot: the training goes on, and the next one is written.
    until = 2
    monkeypatch.setattr("train.gan.snapshots.write_whole", full)
    train_gan(dataclasses.replace(SHORT, images=48), **options)
    unsaved = [e for e in _lines(out, "events.jsonl") if e["event"] == "nothing saved"]
    assert [(e["images"], "No space left" in e["error"]) for e in unsaved] == [(32, True)]
    assert [p.stem[-2:] for p in sorted(out.glob("checkpoint-*.pt"))] == ["16", "48"]

    # Full to the end: a named error, the last checkpoint intact, and the same command goes on from it.
    asked[:], until = [None], 99
    with pytest.raises(TrainingError, match="after 64 images nothing could be saved in .* No space left"):
        train_gan(SHORT, **options)
    assert read_checkpoint(out / "checkpoint-000000048.pt")["images_seen"] == 48
    monkeypatch.undo()
    train_gan(SHORT, **options)
    assert read_checkpoint(out / "checkpoint-000000064.pt")["images_seen"] == 64


def test_an_update_that_is_not_finite_is_skipped_and_changes_nothing_and_ten_in_a_row_stop_the_run(
    phantom_data, templates, tmp_path, monkeypatch
):
    step, states = gan.train_step, []

    def poisoned(state, batch, *args, **kwargs):
        if len(states) == 1 or len(states) > 2:
            batch.images[0, 0, 0, 0] = torch.nan
        losses, finite = step(state, batch, *args, **kwargs)
        states.append({k: v.clone() for k, v in state.networks.state_dict().items()})
        return losses, finite

    monkeypatch.setattr("train.gan.training.train_step", poisoned)
    preset = dataclasses.replace(SHORT, images=128, snapshot_images=8)
    with pytest.raises(TrainingError, match="not finite in 10 updates in a row, after 96 images; the last checkpoint"):
        train_gan(preset, data=phantom_data, ct_nodules=templates, out=tmp_path)
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[2].items())
    skipped = [e for e in _lines(tmp_path, "events.jsonl") if e["event"] == "update skipped"]
    assert [(e["images"], e["in_all"]) for e in skipped[:2]] == [(8, 1), (24, 2)] and "d32" in skipped[0]["not_finite"]
    checkpoint = read_checkpoint(sorted(tmp_path.glob("checkpoint-*.pt"))[-1])
    assert all(bool(tensor.isfinite().all()) for _, tensor in tensors(checkpoint)) and checkpoint["skipped"] == 10


def test_an_image_that_cannot_be_read_is_named_and_left_out(phantom_data, templates, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    (data / "images" / "00000002_000.png").write_bytes(b"no image")
    options = {"data": data, "ct_nodules": templates, "out": tmp_path / "run"}
    folder = train_gan(dataclasses.replace(SHORT, images=8), **options)
    assert "15 normal images, 8 with a nodule" in NoduleGenerator.from_pretrained(folder).provenance["training_data"]
    (event,) = [e for e in _lines(tmp_path / "run", "events.jsonl") if e["event"] == "image left out"]
    assert "00000002_000.png" in event["error"]


def test_a_finished_run_is_left_as_it_is(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    preset = dataclasses.replace(SHORT, images=8)
    folder = train_gan(preset, **options)
    times = {p: p.stat().st_mtime_ns for p in [*folder.iterdir(), *(tmp_path / "run").glob("checkpoint-*.pt")]}
    assert train_gan(preset, **options) == folder
    assert times == {p: p.stat().st_mtime_ns for p in times}
