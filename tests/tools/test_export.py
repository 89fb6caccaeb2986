"""An export: tables that agree, files that read back, the same bytes whoever is killed, named errors."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import generator, global_states_untouched, make_mix, prior

import carim_aug.tools.export
from carim_aug import LocationPrior, SyntheticNoduleMix
from carim_aug.data import ChestXray14
from carim_aug.data.provenance import MARKER
from carim_aug.location.restricted import NarrowedPrior
from carim_aug.tools.cli import main
from carim_aug.tools.export import COMPLETE, ExportError, export
from carim_aug.tools.export_backgrounds import find_films

ROOT = Path(__file__).resolve().parents[2]


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too, by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    make_mix().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Four images with nodules and two without, 48 pixels."""
    folder = tmp_path_factory.mktemp("export") / "whole"
    assert export(make_mix(seed=5), folder, n=4, normal=2, size=48)["written"] == 6
    return folder


@pytest.fixture(scope="module")
def grafts(tmp_path_factory, phantom_data) -> Path:
    folder = tmp_path_factory.mktemp("export") / "grafts"
    export(make_mix(seed=5), folder, hosts=phantom_data)
    return folder


# --- What is in it ---
def test_images_are_those_that_their_keys_make(whole):
    mix = make_mix(seed=5)
    names = []
    for i, row in enumerate(rows(whole / "provenance.csv")):
        assert (row["seed"], row["epoch"], row["index"], row["try"]) == ("5", "0", str(i), "")
        assert row["class"] == ("Nodule" if i < 4 else "No Finding") and row["synthetic"] == "1" and row["host"] == ""
        assert row["weights_hash"] == mix.weights_hash
        image, _, boxes = mix.regenerate((5, 0, i), row["class"])
        image = torch.nn.functional.interpolate(image[None], (48, 48), mode="bilinear", antialias=True)[0, 0]
        with Image.open(whole / "images" / row["Image Index"]) as picture:
            assert picture.text["synthetic"] == "1" and picture.text["weights_hash"] == mix.weights_hash
            assert json.loads(picture.text["key"]) == [5, 0, i]
            np.testing.assert_allclose(np.array(picture), (image.numpy() + 1) / 2 * 255, atol=0.501)
        np.testing.assert_allclose(np.reshape(json.loads(row["boxes"]), (-1, 4)), boxes * 48 / 32, atol=1e-4)
        names.append(row["Image Index"])
    assert len(set(names)) == 6


def test_grafts_differ_from_their_hosts_around_their_boxes_only(grafts, phantom_data):
    real = ChestXray14(phantom_data, split="train")
    normal = {path.name: i for i, path in enumerate(map(Path, real.paths)) if not real.labels[i].any()}
    told = rows(grafts / "provenance.csv")
    assert len(told) == len(normal) == 16 and {row["host"] for row in told} == set(normal)
    films = find_films(phantom_data, "train")
    mix = make_mix(seed=5)
    for row, entry in zip(told, rows(grafts / "Data_Entry_2017.csv"), strict=True):
        host = normal[row["host"]]
        with Image.open(grafts / "images" / row["Image Index"]) as picture:
            changed = np.abs(np.array(picture).astype(int) - real[host][0][0].numpy()) > 0
        boxes = np.array(json.loads(row["boxes"]))
        y, x = np.mgrid[:64, :64] + 0.5
        near = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in boxes:
            w, h = x2 - x1, y2 - y1
            near |= (x > x1 - w / 4 - 1) & (x < x2 + w / 4 + 1) & (y > y1 - h / 4 - 1) & (y < y2 + h / 4 + 1)
        assert changed.any() and not (changed & ~near).any()
        assert int(entry["Patient ID"]) == real.patients[host] and entry["Finding Labels"] == "Nodule"
        assert (entry["View Position"], entry["Patient Age"], entry["OriginalImage[Width"]) == ("PA", "50", "1024")
        # The key makes the nodule again.
        key = [int(row[part]) for part in ("seed", "epoch", "index", "try") if row[part]]
        assert films[key[2]].stem == Path(row["host"]).stem and row["insertion"] == "graft"
        np.testing.assert_allclose(mix.regenerate(tuple(key))[2] * 2, boxes, atol=1e-4)


def test_some_hosts_are_drawn_by_the_seed_and_resized(tmp_path, phantom_data):
    chosen = []
    for seed in (1, 2):
        export(make_mix(seed=seed), tmp_path / str(seed), hosts=phantom_data, n=5, size=40)
        told = rows(tmp_path / str(seed) / "provenance.csv")
        assert len(told) == 5 and all((row["width"], row["height"]) == ("40", "40") for row in told)
        chosen.append([row["host"] for row in told])
    assert chosen[0] != chosen[1]


def test_sixteen_bits_are_the_same_image_finer(tmp_path, whole, grafts, phantom_data):
    for name, coarse, options in (
        ("whole", whole, {"n": 4, "normal": 2, "size": 48}),
        ("grafts", grafts, {"hosts": phantom_data}),
    ):
        export(make_mix(seed=5), tmp_path / name, bits=16, **options)
        for path in sorted((coarse / "images").iterdir()):
            fine = np.array(Image.open(tmp_path / name / "images" / path.name)).astype(int)
            assert fine.max() > 255 and len(np.unique(fine % 257)) > 1
            np.testing.assert_allclose(np.array(Image.open(path)), fine / 257, atol=0.51)
        assert ChestXray14(tmp_path / name)[0][0].dtype == torch.uint8


def test_no_global_random_state_or_thread_count_moves(tmp_path):
    threads = torch.get_num_threads()
    with global_states_untouched():
        export(make_mix(), tmp_path / "out", n=1)
    assert torch.get_num_threads() == threads


# --- The same bytes ---
KILLED = """
import os, signal, sys
import carim_aug.tools.export as export
from carim_aug import SyntheticNoduleMix
weights, hosts, out = sys.argv[1:]
hosts = hosts or None
replace = os.replace
for moment in range(1000):
    child = os.fork()
    if not child:
        left = [moment]
        def cut(source, target):
            # Die before the rename, with the temporary file whole or cut in half; or just after it.
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if left[0] == 1:
                os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if left[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 3
        os.replace = cut
        mix = SyntheticNoduleMix.from_pretrained(weights, seed=5)
        export.export(mix, f"{out}/{moment if hosts is None else 0}", n=3, normal=0 if hosts else 1, hosts=hosts)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not status:
        print(moment)
        break
    assert os.WIFSIGNALED(status), status
"""


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path, weights):
    mix = SyntheticNoduleMix.from_pretrained(weights, seed=5)
    export(mix, tmp_path / "whole", n=3, normal=1)
    wanted = content(tmp_path / "whole")
    words = [sys.executable, "-c", KILLED, weights, "", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments == 3 * len(wanted)  # before, in and after the writing of every file
    for moment in range(moments):
        folder = tmp_path / str(moment)
        names = content(folder)
        assert (COMPLETE in names) == (moment == moments - 1)
        export(mix, folder, n=3, normal=1)
        assert content(folder) == wanted, f"killed at moment {moment}"


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, weights, phantom_data):
    mix = SyntheticNoduleMix.from_pretrained(weights, seed=5)
    export(mix, tmp_path / "grafts", n=3, hosts=phantom_data)
    words = [sys.executable, "-c", KILLED, weights, str(phantom_data), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3
    assert content(tmp_path / "0") == content(tmp_path / "grafts")


@pytest.mark.parametrize("damage", ["half", "empty", "bit", "other", "text"])
def test_a_damaged_image_is_made_again(tmp_path, whole, damage):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / COMPLETE).unlink()
    path, other = sorted((folder / "images").iterdir())[:2]
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-40] ^= 1
    broken = {"half": data[: len(data) // 2], "empty": b"", "bit": bytes(flipped), "other": other.read_bytes()}
    path.write_bytes(broken.get(damage, b"not an image"))
    assert export(make_mix(seed=5), folder, n=4, normal=2, size=48)["written"] == 1
    assert content(folder) == content(whole)


def test_a_finished_export_is_left_alone(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert export(make_mix(seed=5), whole, n=4, normal=2, size=48) == {
        "images": 6,
        "nodules": 4 + extra(),
        "written": 0,
    }
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_table_that_was_deleted_is_written_again(tmp_path, whole):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    sorted((folder / "labels").iterdir())[1].unlink()
    assert export(make_mix(seed=5), folder, n=4, normal=2, size=48)["written"] == 0
    assert content(folder) == content(whole)


def extra() -> int:
    """Nodules beyond one an image, of the four of `whole`."""
    return sum(len(make_mix(seed=5).regenerate((5, 0, i))[2]) - 1 for i in range(4))


def test_two_processes_under_torchrun_write_the_same_bytes(tmp_path, weights, phantom_data):
    words = ["export", "--weights", weights, "--data", str(phantom_data), "--nodules", "5", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "carim_aug"]
    done = subprocess.run([*run, *words, str(tmp_path / "two")], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert "by process 0 of 2" in done.stdout


def test_shares_of_ranks_and_any_number_of_threads_give_the_same_bytes(tmp_path, whole, grafts, phantom_data):
    for name, one, options in (
        ("whole", whole, {"n": 4, "normal": 2, "size": 48}),
        ("grafts", grafts, {"hosts": phantom_data}),
    ):
        for rank in (2, 1, 0):
            torch.set_num_threads(2 - rank % 2)
            export(make_mix(seed=5), tmp_path / name, rank=rank, world_size=3, **options)
        assert content(tmp_path / name) == content(one)


def test_rank_0_says_so_when_the_others_do_not_come(tmp_path):
    with pytest.raises(ExportError, match="2 of 4 images have not come from the other processes for 0.3 s"):
        export(make_mix(), tmp_path / "out", n=4, world_size=2, patience=0.3)
    assert not (tmp_path / "out" / COMPLETE).exists()


# --- Errors ---
@pytest.mark.parametrize("moment", [0, 1, 3, 8, 12, -1])
def test_a_full_disk_is_named_and_leaves_what_is_finished(tmp_path, monkeypatch, whole, moment):
    folder = tmp_path / "out"
    files = len(content(whole))
    left = [moment % files]
    real = Path.open

    def full(path, *args, **kwargs):
        file = real(path, *args, **kwargs)
        if path.name.endswith(".part"):
            left[0] -= 1
            if left[0] < 0:
                file.write(b"half")
                file.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ExportError, match="no space left on the disk .* run the same command again"):
        export(make_mix(seed=5), folder, n=4, normal=2, size=48)
    monkeypatch.undo()
    there = content(folder)
    assert len(there) == moment % files and there.items() <= content(whole).items() and COMPLETE not in there
    export(make_mix(seed=5), folder, n=4, normal=2, size=48)
    assert content(folder) == content(whole)


def test_another_error_of_the_disk_keeps_its_name(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(carim_aug.tools.export.os, "replace", refuse)
    with pytest.raises(PermissionError):
        export(make_mix(), tmp_path / "out", n=1)
    assert content(tmp_path / "out") == {}


def test_a_folder_of_other_settings_is_refused_and_left_alone(whole):
    before = content(whole)
    other_weights = SyntheticNoduleMix(type(generator())("tiny").eval(), prior(), seed=5)
    other_prior = LocationPrior.fit([torch.tensor([[28.0, 38.0, 34.0, 44.0]])] * 3, 100)
    same = {"n": 4, "normal": 2, "size": 48}
    for mix, options, told in (
        (other_weights, same, "weights_hash '.*' there and '.*' now"),
        (SyntheticNoduleMix(generator(), other_prior, seed=5), same, "prior_hash"),
        (make_mix(seed=6), same, "seed 5 there and 6 now: choose another folder, or give those settings"),
        (make_mix(seed=5), same | {"n": 5}, "n 4 there and 5 now"),
        (make_mix(seed=5), same | {"bits": 16}, "bits 8 there and 16 now"),
    ):
        with pytest.raises(ExportError, match=f"must be an export of the same settings, got {told}"):
            export(mix, whole, **options)
    assert content(whole) == before


def test_a_narrowed_prior_is_told_from_the_whole_one(tmp_path):
    export(SyntheticNoduleMix(generator(), NarrowedPrior(count=3)), tmp_path / "out", n=2)
    assert all(len(json.loads(row["boxes"])) == 3 for row in rows(tmp_path / "out" / "provenance.csv"))
    for other in (prior(), NarrowedPrior(count=2), NarrowedPrior(count=3, sizes=(0.02, 0.04))):
        with pytest.raises(ExportError, match="prior_hash"):
            export(SyntheticNoduleMix(generator(), other), tmp_path / "out", n=2)


def test_folders_with_other_things_in_them_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ExportError, match=r"must be new, empty or an export, got other files in it \(thesis.tex\)"):
        export(make_mix(), tmp_path, n=1)
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(ExportError, match="unreadable"):
        export(make_mix(), tmp_path, n=1)
    assert sorted(content(tmp_path)) == [MARKER, "thesis.tex"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 1, "split": "test"}, "split must be train or val, got 'test': the test split is for evaluation"),
        ({"n": 1, "split": "all"}, "split must be train or val, got 'all'"),
        ({"n": 1, "bits": 12}, "bits must be 8 or 16, got 12"),
        ({"n": 1, "size": 3}, "size must be an integer of at least 16 and below 10**9, got 3"),
        ({"n": -1}, "n must be an integer of at least 0 and below 10**9, got -1"),
        ({}, "n and normal must be at least 1 together, got n=None and normal=0"),
        ({"n": 1, "rank": 2, "world_size": 2}, "rank must be in [0, world_size - 1], got rank 2 of 2"),
        ({"hosts": "{data}", "normal": 1}, "normal must be 0 with hosts"),
        ({"hosts": "{data}", "n": 17}, "n must be at most the number of hosts (16), got 17"),
        ({"hosts": "{data}", "split": "test"}, "split must be train or val"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, phantom_data, options, said):
    options = {name: str(phantom_data) if value == "{data}" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=re.escape(said)):
        export(make_mix(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --- The command ---
def test_the_command_says_what_it_wrote(tmp_path, weights, phantom_data, capsys):
    out = str(tmp_path / "out")
    words = ["export", "--weights", weights, "--out", out, "--data", str(phantom_data), "--insertion", "graft"]
    assert main([*words, "--split", "val"]) == 0
    said = capsys.readouterr().out
    assert "8 synthetic images" in said and "split val" in said and "images/s" in said and "assert_real_only" in said
    assert len(ChestXray14(out, split="val")) == 8
    assert main([*words, "--split", "train"]) == 2
    assert "must be an export of the same settings" in capsys.readouterr().err
    assert main(["export", "--weights", weights, "--out", out, "--n", "1", "--insertion", "graft"]) == 2
    assert "--insertion must be graft with --data" in capsys.readouterr().err
    assert main([*words, "--split", "test"]) == 2
    assert "the test split is for evaluation" in capsys.readouterr().err
