"""An export: images that their keys make again, the same bytes however often it is killed, named errors."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import generator, global_states_untouched, make_mix, prior

from carim_aug import GateError, LocationPrior, RestrictedPrior, SyntheticNoduleMix, WholeImageGenerator, contrast_gate
from carim_aug.data import ChestXray14
from carim_aug.data.provenance import MARKER
from carim_aug.tools.export import COMPLETE, ExportError, export
from carim_aug.tools.export_backgrounds import find_backgrounds

WHOLE = {"n": 4, "negatives": 2, "size": 48}  # what the fixture `whole` is made with


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too, by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


# --- What is in it ---
def test_images_are_those_that_their_keys_make(whole, rows):
    mix = make_mix(seed=5)
    for i, row in enumerate(rows(whole)):
        assert (row["seed"], row["epoch"], row["index"], row["try"]) == ("5", "0", str(i), "")
        assert (row["synthetic"], row["background"], row["weights_hash"]) == ("1", "", mix.weights_hash)
        assert row["class"] == ("Nodule" if i < 4 else "No Finding")
        image, _, boxes = mix.regenerate((5, 0, i), row["class"])
        image = torch.nn.functional.interpolate(image[None], (48, 48), mode="bilinear", antialias=True)[0, 0]
        with Image.open(whole / "images" / row["Image Index"]) as picture:
            assert picture.text["synthetic"] == "1" and picture.text["weights_hash"] == mix.weights_hash
            assert json.loads(picture.text["key"]) == [5, 0, i]
            np.testing.assert_allclose(np.array(picture), (image.numpy() + 1) / 2 * 255, atol=0.501)
        np.testing.assert_allclose(np.reshape(json.loads(row["boxes"]), (-1, 4)), boxes * 48 / 32, atol=1e-4)
    assert len({row["Image Index"] for row in rows(whole)}) == 6


def test_grafts_are_those_of_the_mix_and_differ_around_their_boxes_only(grafts, phantom_data, rows):
    real = ChestXray14(phantom_data, split="train")
    normal = {path.name: i for i, path in enumerate(map(Path, real.paths)) if not real.labels[i].any()}
    found, mix = find_backgrounds(phantom_data, "train"), make_mix(seed=5, p=1.0)
    wrapped = mix.wrap([(background.read(), 0) for background in found])
    assert len(rows(grafts)) == len(normal) == 16 and {row["background"] for row in rows(grafts)} == set(normal)
    for row, entry in zip(rows(grafts), rows(grafts, "Data_Entry_2017.csv"), strict=True):
        at, key = normal[row["background"]], [int(row[p]) for p in ("seed", "epoch", "index", "try") if row[p]]
        with Image.open(grafts / "images" / row["Image Index"]) as picture:
            pixels = np.array(picture)
        np.testing.assert_allclose(pixels, wrapped[key[2]][0][0] * 255, atol=0.501)
        changed = pixels != real[at][0][0].numpy()
        near = np.zeros((64, 64), bool)
        y, x = np.mgrid[:64, :64] + 0.5
        for x1, y1, x2, y2 in json.loads(row["boxes"]):
            w, h = x2 - x1, y2 - y1
            near |= (x > x1 - w / 4 - 1) & (x < x2 + w / 4 + 1) & (y > y1 - h / 4 - 1) & (y < y2 + h / 4 + 1)
        assert changed.any() and not (changed & ~near).any()
        assert int(entry["Patient ID"]) == real.patients[at] and entry["Finding Labels"] == "Nodule"
        assert (entry["View Position"], entry["Patient Age"], entry["OriginalImage[Width"]) == ("PA", "50", "1024")
        assert found[key[2]].path.name == row["background"] and row["insertion"] == "graft"
        np.testing.assert_allclose(mix.regenerate(tuple(key))[2] * 2, json.loads(row["boxes"]), atol=1e-4)


def test_some_backgrounds_are_drawn_by_the_seed_and_resized(tmp_path, phantom_data, rows):
    chosen = []
    for seed in (1, 2):
        export(make_mix(seed=seed), tmp_path / str(seed), backgrounds=phantom_data, n=5, size=40)
        found = rows(tmp_path / str(seed))
        assert [(row["width"], row["height"]) for row in found] == [("40", "40")] * 5
        chosen.append([row["background"] for row in found])
    assert chosen[0] != chosen[1]


def test_negatives_are_other_backgrounds_as_they_are(tmp_path, phantom_data, rows):
    real = {Path(path).name: path for path in ChestXray14(phantom_data, split="train").paths}
    counts = export(make_mix(seed=5), tmp_path / "out", backgrounds=phantom_data, n=5, negatives=4)
    assert counts["images"] == 9 and counts["real"] == 4 and counts["written"] == 9 + counts["val"]
    found = rows(tmp_path / "out")
    assert len({row["background"] for row in found}) == 9
    assert [row["synthetic"] for row in found] == ["1"] * 5 + ["0"] * 4
    coco = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [image["synthetic"] for image in coco["images"]] == [True] * 5 + [False] * 4
    assert ChestXray14(tmp_path / "out", target="nodule").targets == [1] * 5 + [0] * 4
    for row in found[5:]:
        path = tmp_path / "out" / "images" / row["Image Index"]
        assert (row["class"], row["insertion"], row["boxes"]) == ("No Finding", "none", "[]")
        assert (tmp_path / "out" / "labels" / f"{path.stem}.txt").read_text() == ""
        with Image.open(path) as picture, Image.open(real[row["background"]]) as old:
            assert picture.tobytes() == old.tobytes() and picture.text["synthetic"] == "0"
    export(make_mix(seed=5), tmp_path / "all", backgrounds=phantom_data, negatives=4)
    assert len(rows(tmp_path / "all")) == 16


def test_placement_strength_and_gate_are_those_of_the_mix(tmp_path, phantom_data, rows):
    options = {"placement": "prior", "strength": (1.0, 4.0), "gate": contrast_gate(0.16, tries=2)}
    counts = export(make_mix(seed=5, **options), tmp_path / "out", backgrounds=phantom_data)
    found = find_backgrounds(phantom_data, "train")
    wrapped = make_mix(seed=5, p=1.0, **options).wrap([(background.read(), 0) for background in found])
    assert 0 < counts["real"] < 16  # no nodule passed in these: they are negatives
    for i, row in enumerate(rows(tmp_path / "out")):
        pixels, label = wrapped[i]
        with Image.open(tmp_path / "out" / "images" / row["Image Index"]) as picture:
            np.testing.assert_allclose(np.array(picture), pixels[0] * 255, atol=0.501)
        assert (int(row["synthetic"]), row["class"]) == (label, ("No Finding", "Nodule")[label])
    before = content(tmp_path / "out")
    same = {**options, "gate": contrast_gate(0.16, tries=2)}
    assert export(make_mix(seed=5, **same), tmp_path / "out", backgrounds=phantom_data)["written"] == 0
    assert content(tmp_path / "out") == before
    for change, said in (
        ({"strength": 2.0}, "strength"),
        ({"gate": contrast_gate(0.2)}, "gates .*contrast from 0.16 to inf in 2 tries"),
        ({"placement": "lungs"}, "placement 'prior' there and 'lungs' now"),
    ):
        with pytest.raises(ExportError, match=f"same settings, got {said}"):
            export(make_mix(seed=5, **{**options, **change}), tmp_path / "out", backgrounds=phantom_data)


def test_a_gate_that_accepts_nothing_is_named_and_functions_are_settings_by_name(tmp_path, phantom_data):
    for tries, error, said in (
        (8, ExportError, "gate must accept a nodule .*, got none in 16: lower"),
        (32, GateError, "gate accepted none of 256"),
    ):
        with pytest.raises(error, match=said):
            export(make_mix(gate=contrast_gate(9.0, tries=tries)), tmp_path / str(tries), backgrounds=phantom_data)
    everywhere = partial(torch.ones_like)
    export(make_mix(placement=everywhere), tmp_path / "out", backgrounds=phantom_data, n=1)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["settings"]["placement"] == "partial"


def test_images_to_validate_on_are_not_trained_on(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(20):
        Image.fromarray(np.full((40, 40), 90 + i, np.uint8)).save(tmp_path / "data" / "images" / f"{i // 2:03}_{i}.png")
        (tmp_path / "data" / "labels" / f"{i // 2:03}_{i}.txt").write_text("")
    options, patients = {"backgrounds": tmp_path / "data" / "images"}, []
    for seed in (0, 1):  # the same patients are held out
        counts = export(make_mix(seed=seed), out := tmp_path / str(seed), **options)
        assert (counts["images"], counts["val"]) == (18, 1)
        own = [{path.name[:3] for path in (out / folder).iterdir()} for folder in ("images", "val/images")]
        assert not own[0] & own[1] and len(own[0]) == 9
        patients.append(own[1])
    assert patients[0] == patients[1]
    with pytest.raises(ValueError, match=r"backgrounds \(18 besides 2 held out for validation, unless val is given\)"):
        export(make_mix(), tmp_path / "out", n=19, **options)
    with pytest.raises(ValueError, match="val must hold images that are not trained on, got .*, which is "):
        export(make_mix(), tmp_path / "out", val=tmp_path / "data", **options)


def test_sixteen_bits_are_the_same_image_finer(tmp_path, whole, grafts, phantom_data):
    for name, coarse, options in (("whole", whole, WHOLE), ("grafts", grafts, {"backgrounds": phantom_data})):
        export(make_mix(seed=5), tmp_path / name, bits=16, **options)
        for path in sorted((coarse / "images").iterdir()):
            fine = np.array(Image.open(tmp_path / name / "images" / path.name)).astype(int)
            assert fine.max() > 255 and len(np.unique(fine % 257)) > 1
            np.testing.assert_allclose(np.array(Image.open(path)), fine / 257, atol=0.51)
        assert ChestXray14(tmp_path / name)[0][0].dtype == torch.uint8


def test_a_restricted_prior_is_used(tmp_path, rows):
    export(SyntheticNoduleMix(generator(), RestrictedPrior(count=3)), tmp_path / "out", n=2)
    assert [len(json.loads(row["boxes"])) for row in rows(tmp_path / "out")] == [3, 3]


def test_no_global_random_state_or_thread_count_moves_and_none_changes_the_bytes(tmp_path, whole):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads % 2)
        with global_states_untouched():
            export(make_mix(seed=5), tmp_path / "out", **WHOLE)
        assert torch.get_num_threads() == 3 - threads % 2
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "out") == content(whole)


# --- The same bytes ---
def export_and_die(mix, folder: Path, moment: int, options) -> bool:
    """Export in a fork that is killed before, in or after its (moment // 3)-th renaming; return whether it was."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        return os.WIFSIGNALED(status)
    replace, left = os.replace, [moment]

    def cut(source, target):
        if left[0] == 1:
            os.truncate(source, os.path.getsize(source) // 2)
        if left[0] >= 2:
            replace(source, target)
        if left[0] <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 3

    try:
        os.replace = cut
        export(mix, folder, **options)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.train
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path):
    mix, options = make_mix(seed=5), {"n": 3, "negatives": 1}
    export(mix, tmp_path / "wanted", **options)
    wanted, moment = content(tmp_path / "wanted"), 0
    while export_and_die(mix, folder := tmp_path / str(moment), moment, options):
        assert (COMPLETE in content(folder)) == (moment == 3 * len(wanted) - 1)
        export(mix, folder, **options)
        assert content(folder) == wanted, f"killed at moment {moment}"
        moment += 1
    assert moment == 3 * len(wanted)  # before, in and after the writing of every file


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, phantom_data):
    mix, options = make_mix(seed=5), {"n": 3, "backgrounds": phantom_data}
    export(mix, tmp_path / "wanted", **options)
    kills = sum(export_and_die(mix, tmp_path / "out", moment, options) for moment in range(12))
    export(mix, tmp_path / "out", **options)
    assert kills > 8 and content(tmp_path / "out") == content(tmp_path / "wanted")


@pytest.mark.parametrize("damage", ["half", "empty", "bit", "other", "text", "none"])
def test_a_damaged_or_missing_image_is_made_again(copied, whole, damage):
    path, other = sorted((copied / "images").iterdir())[:2]
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-40] ^= 1
    broken = {"half": data[: len(data) // 2], "empty": b"", "bit": bytes(flipped), "other": other.read_bytes()}
    path.write_bytes(broken.get(damage, b"not an image"))
    if damage == "none":
        path.unlink()
    assert export(make_mix(seed=5), copied, **WHOLE)["written"] == 1
    assert content(copied) == content(whole)


def test_a_finished_export_is_left_alone_and_a_deleted_table_written_again(copied, whole):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    nodules = sum(len(make_mix(seed=5).regenerate((5, 0, i))[2]) for i in range(4))
    assert export(make_mix(seed=5), copied, **WHOLE) == {
        "images": 6,
        "real": 0,
        "nodules": nodules,
        "val": 0,
        "written": 0,
    }
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    sorted((copied / "labels").iterdir())[1].unlink()
    assert export(make_mix(seed=5), copied, **WHOLE)["written"] == 0
    assert content(copied) == content(whole)


# --- Errors ---
@pytest.mark.parametrize("moment", [0, 1, 3, 8, 12, -1])
@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (errno.ENOSPC, ExportError, "no space left on the disk .* run the same command again"),
        (errno.EACCES, PermissionError, "Permission denied"),
    ],
)
def test_a_full_disk_is_named_and_leaves_what_is_finished(tmp_path, monkeypatch, whole, moment, code, error, words):
    folder, files, real = tmp_path / "out", len(content(whole)), Path.write_bytes
    whole_writes = iter([True] * (moment % files) + [False])

    def fill(path, data):
        if next(whole_writes):
            return real(path, data)
        real(path, b"half")
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(error, match=words):
        export(make_mix(seed=5), folder, **WHOLE)
    monkeypatch.undo()
    there = content(folder)
    assert len(there) == moment % files and there.items() <= content(whole).items() and COMPLETE not in there
    export(make_mix(seed=5), folder, **WHOLE)
    assert content(folder) == content(whole)


def test_folders_of_other_settings_and_other_things_are_refused_and_left_alone(whole, tmp_path):
    before = content(whole)
    other_prior = LocationPrior.fit([torch.tensor([[28.0, 38.0, 34.0, 44.0]])] * 3, 100)
    for mix, options, difference in (
        (SyntheticNoduleMix(WholeImageGenerator("tiny"), prior(), seed=5), {}, "weights_hash '.*' there and '.*' now"),
        (SyntheticNoduleMix(generator(), other_prior, seed=5), {}, "prior_hash"),
        (SyntheticNoduleMix(generator(), RestrictedPrior(count=2), seed=5), {}, "prior_hash"),
        (make_mix(seed=6), {}, "seed 5 there and 6 now: choose another folder, or give those settings"),
        (make_mix(seed=5), {"n": 5}, "n 4 there and 5 now"),
        (make_mix(seed=5), {"bits": 16}, "bits 8 there and 16 now"),
    ):
        with pytest.raises(ExportError, match=f"must be an export of the same settings, got {difference}"):
            export(mix, whole, **{**WHOLE, **options})
    assert content(whole) == before
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ExportError, match=r"must be new, empty or an export, got thesis.tex"):
        export(make_mix(), tmp_path, n=1)
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(ExportError, match="unreadable"):
        export(make_mix(), tmp_path, n=1)
    assert sorted(content(tmp_path)) == [MARKER, "thesis.tex"]


class ClassesAlone:
    image_size, weights_hash = 32, "0" * 64

    def class_images(self, nodule, seeds):
        return nodule[:, None, None, None].float().expand(-1, 1, 32, 32)


def test_sources_without_the_method_that_is_needed_are_refused(tmp_path, phantom_data, residuals_alone):
    grafts = SyntheticNoduleMix(residuals_alone, prior())
    assert export(grafts, tmp_path / "grafts", backgrounds=phantom_data, n=1, split="val")["written"] == 1
    classes = SyntheticNoduleMix(ClassesAlone(), prior(), insertion="whole")
    for mix, options, words in (
        (grafts, {"n": 1}, "generator must have a method images .* got a ResidualsAlone"),
        (classes, {"n": 1}, "puts nodules where masks are, .* got a ClassesAlone"),
        (make_mix(gate=contrast_gate()), {"n": 1}, "mix must have no gate for whole images, got one"),
        (classes, {"backgrounds": phantom_data}, "generator must have a method residuals .* got a ClassesAlone"),
    ):
        with pytest.raises(ValueError, match=words):
            export(mix, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 1, "split": "test"}, "split must be train or val, got 'test': the test split is for evaluation"),
        ({"n": 1, "split": "all"}, "split must be train or val, got 'all'"),
        ({"n": 1, "bits": 12}, "bits must be 8 or 16, got 12"),
        ({"n": 1, "size": 0}, "size must be an integer of at least 16 and below 10**9, got 0"),
        ({"n": -1}, "n must be an integer of at least 0 and below 10**9, got -1"),
        ({"n": 1, "negatives": None}, "negatives must be an integer of at least 0 and below 10**9, got None"),
        ({}, "n and negatives must be at least 1 together, got n=None and negatives=0"),
        ({"n": 1, "normal": 2}, "normal must be names of folders, got 2: the number of images without nodules is neg"),
        ({"n": 1, "normal": ["a"]}, "normal must be left out without backgrounds, got ['a']"),
        ({"n": 1, "split": "val", "val": "x"}, "val must be left out with split 'val', got x"),
        (
            {"backgrounds": "{data}", "n": 0},
            "n must be at least 1, and with negatives at most the number of backgrounds",
        ),
        ({"backgrounds": "{data}", "n": 9, "negatives": 8}, "backgrounds (16), got n=9 and negatives=8"),
        ({"backgrounds": "{data}", "negatives": 16}, "backgrounds (16), got n=0 and negatives=16"),
        ({"backgrounds": "{data}", "normal": ["a"]}, "normal must not be given where a table says what is normal"),
        ({"n": 1, "processes": "2"}, "WORLD_SIZE must be 1 for an export, got 2: run it without torchrun"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, phantom_data, monkeypatch, options, said):
    options = {name: str(phantom_data) if value == "{data}" else value for name, value in options.items()}
    monkeypatch.setenv("WORLD_SIZE", options.pop("processes", "1"))
    with pytest.raises(ValueError, match=re.escape(said)):
        export(make_mix(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
