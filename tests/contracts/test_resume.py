"""A training killed at any instant goes on as if it had never stopped, bit for bit (issue 3, Resume)."""

import dataclasses
import errno
import json
import multiprocessing
import random
import time

import pytest
import torch

from carim_aug.generators.pretrained import NoduleGenerator
from train.common.run import Run, RunError, TrainingError, read_checkpoint, tensors
from train.gan import snapshots
from train.gan import training as gan
from train.gan.presets import PRESETS
from train.gan.training import train_gan

TINY = dataclasses.replace(
    PRESETS["tiny"], images=64, batch=8, grow_at=(16,), carim_every=2, snapshot_images=16, log_images=16
)
UNLIKE = ("time", "images_per_s", "memory_mb")


def _train(options):
    torch.set_num_threads(1)
    train_gan(TINY, **options)


def _left(folder):
    """What a run left behind, without times: weights, tensors of the last checkpoint, pictures, log lines."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    checkpoint = read_checkpoint(sorted(folder.glob("checkpoint-*.pt"))[-1])
    return {
        "weights": NoduleGenerator.from_pretrained(folder / "export").weights_hash,
        "checkpoint": {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors(checkpoint)},
        "pictures": {p.name: p.read_bytes() for p in sorted(folder.glob("samples-*.png"))},
        "log": [{k: v for k, v in line.items() if k not in UNLIKE} for line in lines],
    }


def test_killed_at_random_instants_a_run_ends_bit_equal_to_one_that_was_not(phantom_data, templates, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.gan.training"])
    options = {"data": phantom_data, "ct_nodules": templates}
    instants, kills = random.Random(time.time_ns()), 0

    def started(out):
        process = context.Process(target=_train, args=({**options, "out": out},))
        process.start()
        return process

    process, begun = started(tmp_path / "whole"), time.monotonic()
    process.join()
    whole = time.monotonic() - begun
    assert process.exitcode == 0
    for _ in range(4):
        process = started(tmp_path / "killed")
        process.join(instants.uniform(0.15, 0.6) * whole)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
    process = started(tmp_path / "killed")
    process.join()
    assert process.exitcode == 0 and kills >= 1
    first, second = _left(tmp_path / "whole"), _left(tmp_path / "killed")
    for kind in first:
        assert first[kind] == second[kind], kind
    assert [line["images"] for line in first["log"]] == [8, 24, 40, 56] and len(first["pictures"]) == 4
    assert not [p.name for p in (tmp_path / "killed").iterdir() if p.suffix in (".partial", ".old")]


def test_a_full_disk_is_named_and_survived_and_the_last_checkpoint_stays(
    phantom_data, templates, tmp_path, monkeypatch
):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    real, asked = snapshots.write_whole, []

    def full(path, data):
        asked.append(path)
        if 2 <= len(asked) <= until:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    # Full for one snapshot: the training goes on, and the next one is written.
    until = 2
    monkeypatch.setattr("train.gan.snapshots.write_whole", full)
    preset = dataclasses.replace(TINY, images=48, grow_at=())
    train_gan(preset, **options)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["images"], "No space left" in e["error"]) for e in events if e["event"] == "nothing saved"] == [
        (32, True)
    ]
    names = [p.name for p in sorted((tmp_path / "run").glob("checkpoint-*.pt"))]
    assert names == ["checkpoint-000000016.pt", "checkpoint-000000048.pt"]

    # Full to the end: a named error, the last checkpoint intact, and the same command goes on from it.
    asked[:], until = [None], 99
    longer = dataclasses.replace(preset, images=64)
    with pytest.raises(TrainingError, match="after 64 images nothing could be saved in .* No space left"):
        train_gan(longer, **options)
    assert read_checkpoint(tmp_path / "run" / "checkpoint-000000048.pt")["images_seen"] == 48
    monkeypatch.undo()
    train_gan(longer, **options)
    assert read_checkpoint(tmp_path / "run" / "checkpoint-000000064.pt")["images_seen"] == 64


def test_an_update_that_is_not_finite_is_skipped_counted_and_changes_nothing(
    phantom_data, templates, tmp_path, monkeypatch
):
    options = {"data": phantom_data, "ct_nodules": templates}
    preset = dataclasses.replace(TINY, images=24, snapshot_images=8, grow_at=())
    step, states = gan.train_step, []

    def poisoned(wrapped, batch, *args, **kwargs):
        if len(states) == 1:
            batch.images[0, 0, 0, 0] = torch.nan
        losses, done = step(wrapped, batch, *args, **kwargs)
        states.append({k: v.clone() for k, v in wrapped.networks.state_dict().items()})
        return losses, done

    monkeypatch.setattr("train.gan.training.train_step", poisoned)
    train_gan(preset, out=tmp_path / "run", **options)
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[2].items())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [e for e in events if e["event"] == "update skipped"]
    assert told["images"] == 8 and told["in_all"] == 1 and "d32" in told["not_finite"]
    assert read_checkpoint(tmp_path / "run" / "checkpoint-000000024.pt")["skipped"] == 1


def test_losses_that_stay_not_finite_stop_the_run_with_its_checkpoint_intact(
    phantom_data, templates, tmp_path, monkeypatch
):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    preset = dataclasses.replace(TINY, images=128, snapshot_images=16, grow_at=())
    step, calls = gan.train_step, []

    def poisoned(wrapped, batch, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            batch.noise.fill_(torch.inf)
        return step(wrapped, batch, *args, **kwargs)

    monkeypatch.setattr("train.gan.training.train_step", poisoned)
    with pytest.raises(TrainingError, match=r"not finite in 10 updates in a row, after 88 images; the last checkpoint"):
        train_gan(preset, **options)
    checkpoint = read_checkpoint(sorted((tmp_path / "run").glob("checkpoint-*.pt"))[-1])
    assert all(bool(tensor.isfinite().all()) for _, tensor in tensors(checkpoint))


def test_a_corrupt_film_is_named_counted_and_left_out(phantom_data, templates, tmp_path):
    data = _copied(phantom_data, tmp_path / "data")
    (data / "images" / "00000002_000.png").write_bytes(b"no image")
    preset = dataclasses.replace(TINY, images=8, grow_at=())
    folder = train_gan(preset, data=data, ct_nodules=templates, out=tmp_path / "run")
    assert "15 normal films, 8 with a nodule" in NoduleGenerator.from_pretrained(folder).provenance["training_data"]
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert events.count("film left out") == 1 and "00000002_000.png" in events


def test_many_corrupt_films_are_an_error(phantom_data, templates, tmp_path):
    data = _copied(phantom_data, tmp_path / "data")
    for name in ("00000002_000.png", "00000003_000.png", "00000005_000.png"):
        (data / "images" / name).write_bytes(b"no image")
    with pytest.raises(RunError, match="3 of 24 films cannot be read, more than 10%; the first: .*00000002_000"):
        train_gan(TINY, data=data, ct_nodules=templates, out=tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    preset = dataclasses.replace(TINY, images=8, grow_at=())
    folder = train_gan(preset, **options)
    times = {
        p: p.stat().st_mtime_ns for p in [*folder.iterdir(), *Run(tmp_path / "run", _recipe(folder)).checkpoints()]
    }
    assert train_gan(preset, **options) == folder
    assert times == {p: p.stat().st_mtime_ns for p in times}


def _recipe(folder):
    return json.loads((folder.parent / "recipe.json").read_text())


def _copied(source, target):
    """A data set whose images can be changed; the tables are the source's."""
    (target / "images").mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "images":
            (target / path.name).symlink_to(path)
    for path in (source / "images").iterdir():
        (target / "images" / path.name).write_bytes(path.read_bytes())
    return target
