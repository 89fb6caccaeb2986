"""Images to graft into: found by file name, with their patients; bad folders are named."""

import numpy as np
import pytest
from PIL import Image
from tiny import make_mix

from carim_aug.data import ChestXray14, DataError
from carim_aug.tools.export import ExportError, export
from carim_aug.tools.export_backgrounds import find_backgrounds


def test_backgrounds_are_the_normal_images_of_the_split_in_order(phantom_data):
    found = find_backgrounds(phantom_data, "val")
    real = ChestXray14(phantom_data, split="val", findings=["No Finding"])
    assert [background.path.name for background in found] == sorted(real.filenames) and len(found) == 8
    assert [background.patient for background in found] == sorted(real.patients)
    assert (found[3].read() * 255).round().equal(real[3][0].float())
    assert found[0].read(size=20).shape == (1, 20, 20)


def test_in_a_plain_folder_file_names_tell_the_patients_and_a_changed_file_is_another_setting(tmp_path):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for name in ("00000007_000.png", "more/00000007_001.png", "more/anna_1.png"):
        Image.fromarray(np.full((50, 60), 90, np.uint8)).save(images / name)
    patients = [background.patient for background in find_backgrounds(images, "train")]
    assert patients[:2] == [7, 7] and 2 * 10**15 <= patients[2] < 3 * 10**15
    export(make_mix(), tmp_path / "out", backgrounds=images, n=1)
    Image.fromarray(np.full((60, 60), 80, np.uint8)).save(images / "more" / "anna_1.png")
    with pytest.raises(ExportError, match="backgrounds_hash"):
        export(make_mix(), tmp_path / "out", backgrounds=images, n=1)


def test_bad_backgrounds_are_named(tmp_path, phantom_data, whole):
    for folder in ("a", "b"):
        (tmp_path / "twice" / folder).mkdir(parents=True)
        Image.new("L", (40, 40)).save(tmp_path / "twice" / folder / "1.png")
    (tmp_path / "empty").mkdir()
    for backgrounds, out, error, words in (
        (tmp_path / "none", "out", DataError, "no such folder"),
        (tmp_path / "empty", "out", DataError, "no image in this folder"),
        (whole / "images", "out", ValueError, "backgrounds must be real images, got the synthetic ones of"),
        (tmp_path / "twice", "out", DataError, "files must differ in name"),
        (phantom_data, phantom_data / "out", ValueError, "out must not lie in the folder of backgrounds"),
    ):
        with pytest.raises(error, match=words):
            export(make_mix(), tmp_path / out, backgrounds=backgrounds)
