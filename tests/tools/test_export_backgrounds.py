"""Images to graft into: found by file name, with their patients; bad folders are named."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import make_mix

from carim_aug.data import ChestXray14, DataError
from carim_aug.tools.export import ExportError, export
from carim_aug.tools.export_backgrounds import find_backgrounds, find_labelled


def test_backgrounds_are_the_normal_images_of_the_split_in_order(phantom_data):
    found = find_backgrounds(phantom_data, "val")
    real = ChestXray14(phantom_data, split="val", findings=["No Finding"])
    assert [background.path.name for background in found] == sorted(real.filenames) and len(found) == 8
    assert [background.patient for background in found] == sorted(real.patients)
    assert (found[3].read() * 255).round().equal(real[3][0].float())
    assert found[0].read(size=20).shape == (1, 20, 20)


@pytest.fixture
def folder(tmp_path):
    """Makes images of these names in a folder, and returns it."""

    def make(names, root="data"):
        for i, name in enumerate(names.split()):
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((50, 60 + i), 90, np.uint8)).save(path)
        return tmp_path / root

    return make


@pytest.mark.parametrize(
    ("names", "options", "wanted"),
    [
        ("1.png images/2.jpg images/notes.tif .hidden/3.png", {}, "1.png 2.jpg notes.tif"),
        ("Normal/1.png No_Finding/p/2.png nodule/3.png Mass/4.png", {}, "1.png 2.png"),
        ("train/NORMAL/1.png train/NODULE/2.png val/NORMAL/3.png test/NORMAL/4.png", {}, "1.png"),
        ("train/NORMAL/1.png train/NODULE/2.png val/NORMAL/3.png test/NORMAL/4.png", {"split": "val"}, "3.png"),
        ("chest/normal/training/1.png chest/normal/testing/2.png extra/normal/3.png", {}, "1.png"),
        ("train/1.png validation/2.png", {}, "1.png"),
        ("neg/1.png pos/2.png", {"normal": ["neg"]}, "1.png"),
        ("train/neg/1.png train/none/2.png train/pos/3.png val/neg/4.png", {"normal": ["neg", "none"]}, "1.png 2.png"),
        ("a/1.png b/2.png 3.png", {"normal": ["."]}, "1.png 2.png 3.png"),
        ("mass/normal/1.png normal/2.png", {}, "2.png"),
        ("1.png", {"root": "nodule", "normal": ["."]}, "1.png"),
        ("1.png p/2.png", {"root": "normal"}, "1.png 2.png"),
        ("train/1.png val/2.png", {"root": "test"}, "1.png"),
        ("1.png", {"root": "valid", "split": "val"}, "1.png"),
    ],
)
def test_folders_names_tell_split_and_class(folder, names, options, wanted):
    root, split = folder(names, options.pop("root", "data")), options.pop("split", "train")
    assert [own.path.name for own in find_backgrounds(root, split, **options)] == wanted.split()


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (
            "a/1.png b/2.png",
            {},
            "must say which are normal, got a, b: write --data .*/data --normal NAME .*--normal . if",
        ),
        ("1.png a/2.png", {}, "must say which are normal, got a: write"),
        ("abnormal/1.png", {}, "must say which are normal, got abnormal"),
        ("1.png", {"root": "Nodule"}, "must say which are normal, got Nodule"),
        ("mass/normal/1.png", {}, "must say which are normal, got mass, normal"),
        ("a/1.png", {"normal": ["A"]}, "normal must be names of folders in it, got 'A'; there are: a"),
        ("val/normal/1.png test/normal/2.png", {}, "images must be of split 'train', got test, val: --split is"),
        ("normal/1.png", {"root": "test"}, "images must be of split 'train', got test"),
        ("train/a/1.png", {"split": "test"}, "split must be train or val, got 'test': the test split is for eval"),
        ("a/1.png b/1.png", {"normal": ["."]}, "files must differ in name"),
        ("notes.txt.d/.1.png", {}, "no image in this folder"),
    ],
)
def test_folders_that_do_not_tell_are_named(folder, names, options, said):
    root, split = folder(names, options.pop("root", "data")), options.pop("split", "train")
    with pytest.raises(ValueError, match=said):
        find_backgrounds(root, split, **options)


def test_file_names_tell_the_patients_and_a_changed_file_is_another_setting(folder, tmp_path):
    images = folder(
        "00000007_000.png 00000007_001.png anna.png anna_ap.png CXR_0001_0.png CXR_0001_1.png CXR_0002_0.png"
    )
    patients = [background.patient for background in find_backgrounds(images, "train")]
    assert patients[:2] == [7, 7] and all(2 * 10**15 <= patient < 3 * 10**15 for patient in patients[2:])
    assert [patients.index(patient) for patient in patients] == [0, 0, 2, 2, 4, 5, 5]
    export(make_mix(), tmp_path / "out", backgrounds=images, n=1)
    Image.fromarray(np.full((60, 60), 80, np.uint8)).save(images / "anna.png")
    with pytest.raises(ExportError, match="backgrounds_hash"):
        export(make_mix(), tmp_path / "out", backgrounds=images, n=1)


def test_bad_backgrounds_are_named(tmp_path, phantom_data, whole):
    shutil.copytree(whole / "images", tmp_path / "copied")
    for backgrounds, out, error, words in (
        (tmp_path / "none", "out", DataError, "no such folder"),
        (whole / "images", "out", ValueError, "backgrounds must be real images, got the synthetic ones of"),
        (tmp_path / "copied", "out", DataError, "images must be real, got a synthetic one: take it out of the folder"),
        (phantom_data, phantom_data / "out", ValueError, "out must not lie in the folder of backgrounds"),
    ):
        with pytest.raises(error, match=words):
            export(make_mix(), tmp_path / out, backgrounds=backgrounds)


def test_real_images_with_labels_are_found_and_others_named(folder, whole, tmp_path):
    root = folder("images/1.png images/2.png", "val")
    (root / "labels").mkdir()
    (root / "labels" / "1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match="2.png: val images must have YOLO's labels, got no file .*/val/labels/2.txt"):
        find_labelled(root)
    (root / "labels" / "2.txt").write_text("")
    assert find_labelled(root) == find_labelled(root / "images") == root / "images"
    for bad, error, said in (
        (folder("1.png", "flat"), DataError, "val images must have YOLO's labels"),
        (tmp_path / "none", DataError, "no image in this folder"),
        (whole, ValueError, "val must be real images, got the synthetic ones of"),
    ):
        with pytest.raises(error, match=said):
            find_labelled(bad)
