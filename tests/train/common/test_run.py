"""A run's folder: atomic checkpoints, logs that survive, and faults that are named."""

import errno
import json
import os

import pytest
import torch

from train.common.run import Run, RunError, TrainingError, folder_whole, read_checkpoint, write_whole


def lines(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_folder_of_another_recipe_is_refused_and_an_older_one_read_in_todays_terms(tmp_path):
    Run(tmp_path, {"seed": 0, "preset": {"batch": 8}, "precision": "bf16-mixed"})
    with pytest.raises(RunError, match=r"holds another recipe \(differs in \['preset.batch', 'seed'\]\)"):
        Run(tmp_path, {"seed": 1, "preset": {"batch": 16}})

    def migrate(numbers):
        return {"r1_weight": 0.0, **numbers}

    now = {"seed": 0, "preset": {"batch": 8, "r1_weight": 0.0}, "precision": "32-true"}  # precision may differ
    Run(tmp_path, now, migrate=migrate)
    with pytest.raises(RunError, match=r"differs in \['preset.r1_weight'\]"):
        Run(tmp_path, {**now, "preset": {"batch": 8, "r1_weight": 1.0}}, migrate=migrate)


def test_a_start_is_written_down_with_the_images_left_out(tmp_path):
    run = Run(tmp_path, {"seed": 0}, begin=False)
    assert not (tmp_path / "recipe.json").exists()
    run.log(images=8, loss=1.0)
    run.log(images=16, loss=1.0)
    run.start(8, ["a.png: unreadable"], device="cpu")
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"seed": 0}
    assert [line["images"] for line in lines(tmp_path)] == [8]
    events = [(e["event"], e.get("images"), e.get("error")) for e in lines(tmp_path, "events.jsonl")]
    assert events == [("started", 8, None), ("image left out", None, "a.png: unreadable")]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir(mode=0o500)
    for folder in ["file/run"] + ["run"] * (os.geteuid() != 0):  # nothing is read-only for root
        with pytest.raises(RunError, match=f"out must be a folder that can be written, got .*{folder}"):
            Run(tmp_path / folder, {})


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    run = Run(tmp_path, {})
    for images in (8, 16, 24):
        run.save({"images_seen": images}, images, best=images == 8)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-000000016.pt", "checkpoint-000000024.pt"]
    assert run.load() == {"images_seen": 24} and read_checkpoint(tmp_path / "best.pt") == {"images_seen": 8}
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    run = Run(tmp_path, {})
    run.save({"images_seen": 8}, 8)
    newest = run.save({"images_seen": 16, "weight": torch.ones(64)}, 16)
    data = bytearray(newest.read_bytes())
    data[data.index(torch.ones(64).numpy().tobytes()) + 5] ^= 1
    newest.write_bytes(data if damage == "flipped" else data[:40])
    assert run.load() == {"images_seen": 8}
    assert "unreadable checkpoint" in (tmp_path / "events.jsonl").read_text()


def test_nothing_is_written_that_is_not_finite_or_on_a_full_disk(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    run.save({"images_seen": 8}, 8)
    state = {"networks": {"a": torch.ones(2)}, "optimizers": [{"b": torch.tensor([1.0, float("nan")])}]}
    with pytest.raises(TrainingError, match="after 16 images optimizers.0.b is not finite"):
        run.save(state, 16)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.common.run.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save({"images_seen": 16}, 16)
    monkeypatch.undo()
    with pytest.raises(TypeError):
        write_whole(tmp_path / "recipe.json", "no bytes")
    assert run.load() == {"images_seen": 8} and not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "recipe.json").read_bytes() == b"{}"


def test_log_lines_wait_while_the_disk_is_full_and_follow(tmp_path):
    run = Run(tmp_path, {})
    run.log(images=8, loss=1.0)
    run.folder = tmp_path / "gone" / "away"  # where nothing can be opened
    run.log(images=16, loss=2.0)
    run.folder.mkdir(parents=True)
    run.log(images=24, loss=3.0)
    assert [line["images"] for line in lines(run.folder)] == [16, 24]


def test_a_line_that_was_cut_off_spoils_no_other_and_later_ones_are_dropped_on_resume(tmp_path):
    run = Run(tmp_path, {})
    run.log(images=8, loss=1.0, infinite=float("inf"))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"images": 1')
    run.log(images=16, loss=2.0)
    run.log(images=24, loss=3.0)
    run.rewind(16)
    assert [(line["images"], line["loss"]) for line in lines(tmp_path)] == [(8, 1.0), (16, 2.0)]
    assert "infinite" not in lines(tmp_path)[0]


def test_a_folder_is_replaced_whole_and_a_cut_swap_is_mended(tmp_path):
    def there():
        assert {p.name for p in tmp_path.iterdir()} == {"export", "recipe.json"}
        return (tmp_path / "export" / "a").read_text()

    Run(tmp_path, {})
    for text in ("first", "second"):
        with folder_whole(tmp_path, "export") as part:
            (part / "a").write_text(text)
        assert there() == text
    with pytest.raises(KeyboardInterrupt), folder_whole(tmp_path, "export") as part:
        raise KeyboardInterrupt
    (tmp_path / "export").rename(tmp_path / "export.old")  # killed between the two renames
    Run(tmp_path, {})
    assert there() == "second"
