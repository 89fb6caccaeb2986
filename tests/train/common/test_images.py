"""Real images in memory: rows by kind, filters, sizes, damaged files, and boxes from the tables alone."""

import csv

import pytest
import torch
from PIL import Image

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.io import DataError
from train.common.images import EXTRA_BOXES, NODULE, ImageSet, read_images, read_nodule_boxes
from train.common.run import RunError


@pytest.fixture
def copied(copy_data, tmp_path):
    return copy_data(tmp_path / "data")


def replace(folder, name, content):
    (folder / "images" / name).unlink()
    (folder / "images" / name).write_bytes(content)


def add_boxes(folder, *rows):
    with (folder / EXTRA_BOXES).open("w", newline="") as file:
        csv.writer(file).writerows([["Image Index", "Finding Label", "x", "y", "w", "h"], *rows])


def test_a_split_is_read_with_labels_patients_boxes_and_names(phantom_data):
    found = read_images(phantom_data, "train", 32)
    assert found.images.shape == (24, 1, 32, 32) and found.images.dtype == torch.uint8 and len(found) == 24
    assert found.nodule.tolist() == list(range(0, 24, 3)) and len(found.normal) == 16
    assert found.boxed.tolist() == [0, 6, 12, 18] and found.boxes[6].tolist() == [[26 / 64, 24 / 64, 34 / 64, 0.5]]
    assert found.patients.tolist() == list(range(1, 25)) and found.names[0] == "00000001_000.png"
    assert found.targets[:4] == [1, 0, 0, 1] and found[3][1] == 1 and torch.equal(found[3][0], found.images[3])
    assert set(found.splits) == {"train"} and [len(f) for f in found.official[:7]] == [1, 0, 0, 0, 0, 0, 1]
    rows, boxes = found.each_box()
    assert rows.tolist() == [0, 6, 12, 18] and torch.equal(boxes, torch.cat(found.boxes))
    assert found.symmetric(found.nodule[:2]).shape == (2, 1, 32, 32)
    assert torch.equal(found.symmetric(torch.tensor([5])), found.images[5:6].float() / 127.5 - 1)


def test_rows_may_be_chosen_several_times_and_counts_are_checked_by_kind(phantom_data):
    found = read_images(phantom_data, "train", 32)
    some = found.rows(torch.tensor([6, 0, 6]))
    assert some.names == [found.names[i] for i in (6, 0, 6)] and some.patients.tolist() == [7, 1, 7]
    assert torch.equal(some.images[1], found.images[0]) and torch.equal(some.boxes[2], found.boxes[6])
    assert len(some.official) == len(some.splits) == 3
    bare = ImageSet(found.images, found.labels, found.patients, found.boxes, found.names).rows(torch.tensor([0]))
    assert bare.official == [] and bare.splits == []
    found.check("here", normal=16, nodule=8, boxed=4)
    with pytest.raises(RunError, match="must hold at least 1 normal and 5 boxed images, got 16 normal and 4 boxed"):
        found.check("here", normal=1, boxed=5)


def test_several_splits_follow_one_another_and_none_means_all(phantom_data, tmp_path):
    both = read_images(phantom_data, ["val", "train"], 32)
    assert both.splits == ["val"] * 12 + ["train"] * 24 and both.names[0] == "00000025_000.png"
    assert len(read_images(phantom_data, None, 32)) == 36
    with pytest.raises(RunError, match="the test split holds no image"):
        read_images(phantom_data, "test", 32)
    with pytest.raises(ValueError, match="split must be one of .* got 'all'"):
        read_images(phantom_data, "all", 32)
    with pytest.raises(DataError, match="no Data_Entry_2017"):
        read_images(tmp_path, "train", 32)


def test_filters_read_what_is_asked_for_only(copied):
    table = copied / "Data_Entry_2017_v2020.csv"
    # The second image gains another finding, the first (boxed) too.
    text = table.read_text().replace("00000002_000.png,No Finding", "00000002_000.png,Mass")
    table.write_text(text.replace("00000001_000.png,Nodule", "00000001_000.png,Mass"))
    shown = read_images(copied, "train", 32, only_normal_or_nodule=True)
    assert len(shown) == 22 and len(shown.normal) == 15 and len(shown.nodule) == 7
    shown = read_images(copied, "train", 32, only_normal_or_boxed=True, limit_normal=3)
    assert len(shown.normal) == 3 and shown.boxed.tolist() == [0, 4, 5, 6] and shown.labels[0, NODULE] == 0
    assert len(read_images(copied, "train", 32, limit_normal=3)) == 12
    names = {"00000003_000.png", "00000004_000.png"}
    assert set(read_images(copied, "train", 32, only=names).names) == names
    assert read_images(copied, "train", 32, largest_box=0.1).boxed.tolist() == []


def test_extra_boxes_are_told_from_official_ones_and_skin_nodules_left_out(copied):
    rows = ["00000001_000.png", "Nodule", 600, 600, 60, 60], ["00000002_000.png", "Nodule", 100, 100, 20, 20]
    add_boxes(copied, *rows)
    found = read_images(copied, "train", 32)
    assert [f.tolist() for f in found.official[:2]] == [[True, False], [False]]
    assert found.boxed.tolist()[:2] == [0, 1] and 1 in found.normal.tolist()


def test_images_of_several_sizes_are_refused_unless_asked_for(copied):
    (copied / "images" / "00000003_000.png").unlink()
    Image.new("L", (64, 48)).save(copied / "images" / "00000003_000.png")
    with pytest.raises(RunError, match=r"of one size, got 64x64 \(00000001.*\) and 48x64 \(00000003.*--any-size"):
        read_images(copied, "train", 32)
    assert len(read_images(copied, "train", 32, any_size=True)) == 24


def test_a_damaged_image_is_named_and_left_out_and_many_are_an_error(copied, capsys):
    replace(copied, "00000002_000.png", b"no image")
    problems, whole = [], read_images(copied, "train", 32, only={"00000003_000.png"})
    found = read_images(copied, "train", 32, unreadable=problems)
    assert len(found) == len(found.images) == 23 and found.names[1] == "00000003_000.png"
    assert torch.equal(found.images[1], whole.images[0])
    assert len(problems) == 1 and "00000002_000.png" in problems[0]
    read_images(copied, "train", 32)
    assert "left out: " in capsys.readouterr().out
    for name in ("00000005_000.png", "00000008_000.png"):
        replace(copied, name, b"")
    with pytest.raises(RunError, match="3 of 24 images cannot be read, more than 10%; the first: .*00000002_000"):
        read_images(copied, "train", 32)


def test_boxes_are_read_from_the_tables_alone_and_repeats_left_out(phantom_data, tmp_path):
    found = read_nodule_boxes(phantom_data)
    assert found.names[:2] == ["00000001_000", "00000007_000"] and found.patients.tolist()[:2] == [1, 7]
    assert set(found.splits) == {"train", "val"} and len(found) == 6 and found.images.shape == (6, 1, 0, 0)
    assert all(flags.all() for flags in found.official) and torch.equal(found.nodule, found.boxed)
    data = ChestXray14(phantom_data)
    assert torch.equal(found.boxes[1], data.boxes_relative(6))
    for name in ("split.csv", "BBox_List_2017.csv"):
        (tmp_path / name).write_text((phantom_data / name).read_text())
    x1, y1, x2, y2 = (found.boxes[0][0] * 1024).tolist()
    again = [["00000001_000.png", "Nodule", x, y1, x2 - x1, y2 - y1] for x in (x1 + 2, x1 + 400)]
    skin = ["00000011_000.png", "Nodule", 100, 100, 20, 20]
    add_boxes(tmp_path, *again, skin, ["00009999_000.png", "Nodule", 100, 100, 20, 20])
    both = read_nodule_boxes(tmp_path)
    first, last = both.names.index("00000001_000"), both.names.index("00009999_000")
    assert both.official[first].tolist() == [True, False] and both.splits[last] == ""
    assert both.official[last].tolist() == [False] and "00000011_000" not in both.names
