import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.chestxray14_tables import read_boxes, split_by_patient
from carim_aug.data.io import DataError
from carim_aug.ops.findings import FINDINGS

ROWS = [
    ("00000001_000.png", "No Finding", 1, "PA"),
    ("00000001_001.png", "Nodule|Mass", 1, "AP"),
    ("00000002_000.png", "Infiltration", 2, "PA"),
    ("00000003_000.png", "Nodule", 3, "PA"),
]
NAMES = [row[0] for row in ROWS]
SPLITS = ("train", "train", "val", "test")
BOXES = (
    "Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n"
    "00000001_001.png,Nodule,512,256,128.0,64.0,,,\r\n"
    "00000001_001.png,Mass,0,0,100,100,,,\r\n"
    "00000002_000.png,Infiltrate,100,200,300,400,,,\r\n"
)


def build(root, *, rows=ROWS, folders=("images",), size=64, suffix=".png"):
    lines = [f"{name},{names},0,{patient},50,M,{view},2000,2000,0.1,0.1,\r\n" for name, names, patient, view in rows]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,a,b,c,d,\r\n"
    (root / "Data_Entry_2017.csv").write_bytes((header + "".join(lines)).encode())
    (root / "BBox_List_2017.csv").write_bytes(BOXES.encode())
    for i, (name, *_) in enumerate(rows):
        folder = root / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), 10 * i).save(folder / (Path(name).stem + suffix))
    return root


@pytest.fixture
def root(tmp_path):
    lines = [f"{name},{split}\n" for name, split in zip(NAMES, SPLITS, strict=True)]
    (tmp_path / "split.csv").write_text("Image Index,split\n" + "".join(lines))
    return build(tmp_path)


def test_labels_views_and_patients_are_the_tables_and_an_item_is_ones_own(root):
    data = ChestXray14(root)
    assert data.filenames == NAMES and data.labels.shape == (4, 14) and data.labels.dtype == np.float32
    assert data.labels[0].sum() == 0
    assert {FINDINGS[k] for k in np.flatnonzero(data.labels[1])} == {"Nodule", "Mass"}
    assert data.patients.tolist() == [1, 1, 2, 3] and data.views.tolist() == ["PA", "AP", "PA", "PA"]
    assert data.pathologies is FINDINGS and len(data.targets) == len(data) == 4
    image, label = data[2]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (1, 64, 64)
    assert int(image[0, 0, 0]) == 20
    assert label.tolist() == [float(name == "Infiltration") for name in FINDINGS]
    label.fill_(7)
    assert data[2][1].sum() == 1 and data.labels[2].sum() == 1


def test_images_are_found_in_nested_folders_and_boxes_scale_from_1024_pixels(tmp_path):
    folders = ("images_001/images", "images_012/images/images")
    data = ChestXray14(build(tmp_path, folders=folders, suffix=".JPG", size=256))
    assert len(data) == 4 and data[1][0].shape == (1, 256, 256)
    assert data.boxes(1).tolist() == [[128.0, 64.0, 160.0, 80.0]]
    assert data.boxes_relative(1).tolist() == [[0.5, 0.25, 0.625, 0.3125]]
    assert data.boxes(2, "Infiltration").shape == (1, 4)
    assert data.boxes(0).shape == (0, 4) and data.boxes(0).dtype == torch.float32


def test_extra_boxes_are_added_unless_they_repeat_an_official_one(root):
    extra = root / "more.csv"
    extra.write_text(
        "Image Index,Finding Label,x,y,w,h,source\n"
        "00000003_000.png,Nodule,0,0,512,512,s\n00000001_001.png,Nodule,520,260,60,50,s\n"
    )
    data = ChestXray14(root, extra_boxes=extra)
    assert data.boxes(3).tolist() == [[0.0, 0.0, 32.0, 32.0]]
    assert len(data.boxes(1)) == 1


def test_a_split_is_that_of_split_csv_or_the_official_lists_or_a_hash_of_the_patient(root):
    parts = ("train", "val", "test")
    assert [ChestXray14(root, split=part).filenames for part in parts] == [NAMES[:2], NAMES[2:3], NAMES[3:]]
    (root / "split.csv").unlink()
    rows = [(f"{p:08d}_{k:03d}.png", "No Finding", p, "PA") for p in range(1, 41) for k in range(2)]
    build(root, rows=rows, size=16)
    by_hash = [ChestXray14(root, split=split).patients for split in parts]
    assert sum(map(len, by_hash)) == 80 and len(by_hash[0]) > len(by_hash[2]) > 0
    (root / "test_list.txt").write_text("\n".join(row[0] for row in rows if row[2] > 30))
    (root / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[2] <= 30) + "\n")
    train, val, test = (set(ChestXray14(root, split=split).patients.tolist()) for split in parts)
    assert test == set(range(31, 41)) and train | val == set(range(1, 31)) and not train & val and val


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("001.png,train", "001.png,test", "patient 1 is in both train and test"),
        ("000.png,train", "000.png,training", "line 2: split must be one of train, val, test, got 'training'"),
        ("00000001_001.png,train\n", "", "no split for 00000001_001.png"),
    ],
)
def test_a_bad_split_file_is_refused(root, old, new, match):
    path = root / "split.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=match):
        ChestXray14(root, split="train")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"views": ("AP",)}, [1]),
        ({"findings": ("Nodule", "No Finding")}, [0, 1, 3]),
        ({"findings": lambda names: names == {"Nodule"}}, [3]),
        ({"only_normal_or_nodule": True}, [0, 1, 3]),
        ({"only_normal_or_boxed": True}, [0, 1, 2]),
        ({"only_normal_or_boxed": True, "only_normal_or_nodule": True}, [0, 1]),
    ],
)
def test_views_findings_and_boxes_filter(root, options, expected):
    assert ChestXray14(root, **options).filenames == [NAMES[i] for i in expected]


def test_detection_target_holds_all_boxes_and_the_transform_sees_them_or_the_image_alone(root):
    data = ChestXray14(root, target="detection")
    target = data[1][1]
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[32.0, 16.0, 40.0, 20.0], [0.0, 0.0, 6.25, 6.25]]
    assert [data.classes[k] for k in target["labels"]] == ["Nodule", "Mass"]
    assert data[0][1]["boxes"].shape == (0, 4) and data[0][1]["labels"].shape == (0,)
    image, label = ChestXray14(root, transform=v2.Resize(32), channels=3)[1]
    assert image.shape == (3, 32, 32) and label.shape == (14,)
    _, target = ChestXray14(root, transform=v2.RandomHorizontalFlip(1.0), target="detection")[1]
    assert target["boxes"][0].tolist() == [24.0, 16.0, 32.0, 20.0]


def test_dataset_pickles_and_has_integer_targets_in_a_loader(root):
    data = pickle.loads(pickle.dumps(ChestXray14(root, target="nodule")))
    assert data.classes == ("No Finding", "Nodule") and data.targets == [0, 1, 0, 1]
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)))
    assert images.shape == (4, 1, 64, 64) and labels.tolist() == data.targets


def test_missing_and_damaged_images_and_tables_are_named_or_skipped(root, tmp_path_factory, phantom_data):
    (root / "images" / "00000003_000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="00000003_000.png: unreadable image"):
        ChestXray14(root)[3]
    (root / "images" / "00000002_000.png").unlink()
    with pytest.raises(DataError, match="no image file for 00000002_000.png; missing='skip'"):
        ChestXray14(root)
    assert len(ChestXray14(root, missing="skip")) == 3
    with pytest.raises(DataError, match=r"no Data_Entry_2017\*.csv"):
        ChestXray14(tmp_path_factory.mktemp("empty"))
    assert len(ChestXray14(phantom_data, views=("AP",))) == 0


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"split": "training"}, ValueError, "split must be .*got 'training'"),
        ({"target": "box"}, ValueError, "target must be .*got 'box'"),
        ({"missing": "ignore"}, ValueError, "missing must be .*got 'ignore'"),
        ({"channels": 2}, ValueError, "channels must be .*got 2"),
        ({"findings": ["Nodul"]}, ValueError, "findings must be .*got 'Nodul'"),
        ({"views": ("PA", "LATERAL")}, ValueError, "views must be among AP, PA, got 'LATERAL'"),
        ({"views": "PA"}, TypeError, "got the string 'PA'"),
        ({"findings": "Nodule"}, TypeError, "got the string 'Nodule'"),
    ],
)
def test_bad_arguments_are_refused_by_name(root, option, error, match):
    with pytest.raises(error, match=match):
        ChestXray14(root, **option)


def test_both_box_styles_are_read_alike(tmp_path):
    official, plain = tmp_path / "a.csv", tmp_path / "b.csv"
    official.write_bytes(b"Image Index,Finding Label,Bbox [x,y,w,h]\r\n1.png,Infiltrate,1,2,3,4\r\n")
    plain.write_text("Image Index,Finding Label,x,y,w,h,source\n1.png,Infiltration,1,2,3,4,me\n")
    assert read_boxes(official) == read_boxes(plain) == {"1.png": [("Infiltration", 1.0, 2.0, 4.0, 6.0)]}
    plain.write_text("Image Index,Finding Label,x,y,w,h\n1.png,Nodule,-1,1000,100,25\n")  # clipped: by rounding
    assert read_boxes(plain) == {"1.png": [("Nodule", 0.0, 1000.0, 99.0, 1024.0)]}
    plain.write_text("Image Index,Finding Label,x,y,w,h\n1.png,Nodule,1024,5,1,1\n")
    with pytest.raises(DataError, match="line 2: box must lie in the image of 1024 x 1024 px"):
        read_boxes(plain)


@given(ids=st.lists(st.integers(0, 40_000), max_size=60), seed=st.integers(0, 99))
def test_a_split_keeps_patients_together_and_does_not_depend_on_the_others(ids, seed):
    of = dict(zip(ids, split_by_patient(ids, seed=seed), strict=True))
    assert [of[i] for i in ids] == split_by_patient(ids, seed=seed)
    assert all(split_by_patient([i], seed=seed) == [name] for i, name in of.items())


def test_a_split_meets_its_fractions():
    splits = split_by_patient(range(5000), (0.7, 0.1, 0.2))
    shares = [splits.count(name) / 5000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert split_by_patient(range(50), seed=1) != split_by_patient(range(50), seed=0)
    with pytest.raises(ValueError, match=r"fractions must be .*got \(0.5, 0.1, 0.2\)"):
        split_by_patient([1], (0.5, 0.1, 0.2))


def test_real_mini_data_has_the_counts_of_its_readme(real_data):
    counts = {}
    for split in ("train", "val", "test"):
        data = ChestXray14(real_data, split=split)
        nodules = int(data.labels[:, FINDINGS.index("Nodule")].sum())
        boxes = sum(len(data.boxes_relative(i)) for i in range(len(data)))
        counts[split] = (len(data), nodules, boxes, int((data.labels.sum(1) == 0).sum()))
    assert counts == {"train": (2420, 177, 47, 1109), "val": (387, 34, 10, 190), "test": (671, 56, 22, 317)}
    extra = read_boxes(real_data / "ChestX-Det_boxes.csv")
    assert sum(box.finding == "Nodule" for boxes in extra.values() for box in boxes) == 955
    assert sum(map(len, read_boxes(real_data / "BBox_List_2017.csv").values())) == 984
