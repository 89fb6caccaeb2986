"""A run's folder: atomic checkpoints, logs that survive, and faults that are named."""

import errno
import json
import os

import pytest
import torch

from train.common.run import Run, RunError, TrainingError, folder_whole, read_checkpoint, write_whole


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    Run(tmp_path, {"seed": 0, "preset": {"batch": 8}})
    with pytest.raises(RunError, match=r"holds another recipe \(differs in \['preset.batch', 'seed'\]\)"):
        Run(tmp_path, {"seed": 1, "preset": {"batch": 16}})


def test_a_recipe_from_before_a_number_existed_means_its_default(tmp_path):
    Run(tmp_path, {"preset": {"batch": 8}})
    Run(tmp_path, {"preset": {"batch": 8, "r1_weight": 0.0}}, defaults={"r1_weight": 0.0})
    with pytest.raises(RunError, match=r"differs in \['preset.r1_weight'\]"):
        Run(tmp_path, {"preset": {"batch": 8, "r1_weight": 1.0}}, defaults={"r1_weight": 0.0})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="out must be a folder that can be written, got .*file"):
        Run(tmp_path / "file" / "run", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(RunError, match="out must be a folder that can be written"):
        Run(tmp_path / "run", {})


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    run = Run(tmp_path, {})
    for images in (8, 16, 24):
        run.save({"images_seen": images}, images, best=images == 8)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-000000016.pt", "checkpoint-000000024.pt"]
    assert run.load() == {"images_seen": 24}
    assert read_checkpoint(tmp_path / "best.pt") == {"images_seen": 8}
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    run = Run(tmp_path, {})
    run.save({"images_seen": 8}, 8)
    newest = run.save({"images_seen": 16, "weight": torch.ones(64)}, 16)
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        data[data.index(torch.ones(64).numpy().tobytes()) + 5] ^= 1
    newest.write_bytes(data if damage == "flipped" else data[:40])
    assert run.load() == {"images_seen": 8}
    assert "unreadable checkpoint" in (tmp_path / "events.jsonl").read_text()


def test_nothing_that_is_not_finite_is_written(tmp_path):
    run = Run(tmp_path, {})
    state = {"networks": {"a": torch.ones(2)}, "optimizers": [{"b": torch.tensor([1.0, float("nan")])}]}
    with pytest.raises(TrainingError, match="after 8 images optimizers.0.b is not finite"):
        run.save(state, 8)
    assert run.checkpoints() == []


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rest(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    run.save({"images_seen": 8}, 8)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.common.run.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save({"images_seen": 16}, 16)
    monkeypatch.undo()
    assert run.load() == {"images_seen": 8} and not list(tmp_path.glob("*.partial"))


def test_log_lines_wait_while_the_disk_is_full_and_follow(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    run.log(images=8, loss=1.0)
    run.folder = tmp_path / "gone" / "away"  # where nothing can be opened
    run.log(images=16, loss=2.0)
    (tmp_path / "gone" / "away").mkdir(parents=True)
    run.log(images=24, loss=3.0)
    lines = [json.loads(line) for line in (tmp_path / "gone" / "away" / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 24]


def test_a_line_that_was_cut_off_spoils_no_other_and_later_ones_are_dropped_on_resume(tmp_path):
    run = Run(tmp_path, {})
    run.log(images=8, loss=1.0, infinite=float("inf"))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"images": 1')
    run.log(images=16, loss=2.0)
    run.log(images=24, loss=3.0)
    run.rewind(16)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["images"], line["loss"]) for line in lines] == [(8, 1.0), (16, 2.0)]
    assert "infinite" not in lines[0]
    run.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_folder_is_replaced_whole_and_a_cut_swap_is_mended(tmp_path):
    Run(tmp_path, {})
    for text in ("first", "second"):
        with folder_whole(tmp_path, "export") as part:
            (part / "a").write_text(text)
    assert (tmp_path / "export" / "a").read_text() == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"export", "recipe.json"}
    with pytest.raises(KeyboardInterrupt), folder_whole(tmp_path, "export") as part:
        raise KeyboardInterrupt
    assert (tmp_path / "export" / "a").read_text() == "second"
    (tmp_path / "export").rename(tmp_path / "export.old")  # killed between the two renames
    Run(tmp_path, {})
    assert (tmp_path / "export" / "a").read_text() == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"export", "recipe.json"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "a", b"before")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", "no bytes")
    assert (tmp_path / "a").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
