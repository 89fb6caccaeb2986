import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.chestxray14 import FINDINGS, ChestXray14, read_boxes, split_by_patient
from carim_aug.data.errors import DataError
from carim_aug.data.images import read_grey

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\r\n"
)
ROWS = [
    ("00000001_000.png", "No Finding", 1, "PA"),
    ("00000001_001.png", "Nodule|Mass", 1, "AP"),
    ("00000002_000.png", "Infiltration", 2, "PA"),
    ("00000003_000.png", "Nodule", 3, "PA"),
]
BOXES = (
    "Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n"
    "00000001_001.png,Nodule,512,256,128.0,64.0,,,\r\n"
    "00000001_001.png,Mass,0,0,100,100,,,\r\n"
    "00000002_000.png,Infiltrate,100,200,300,400,,,\r\n"
)


def build(root: Path, *, rows=ROWS, folders=("images",), size=64, suffix=".png", split=True) -> Path:
    root.mkdir(exist_ok=True)
    lines = [f"{name},{names},0,{patient},50,M,{view},2000,2000,0.1,0.1,\r\n" for name, names, patient, view in rows]
    (root / "Data_Entry_2017.csv").write_bytes((HEADER + "".join(lines)).encode())
    (root / "BBox_List_2017.csv").write_bytes(BOXES.encode())
    if split:
        of = {1: "train", 2: "val", 3: "test"}
        text = "".join(f"{name},{of[patient]}\n" for name, _, patient, _ in rows)
        (root / "split.csv").write_text("Image Index,split\n" + text)
    for i, (name, *_) in enumerate(rows):
        folder = root / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), 10 * i).save(folder / (Path(name).stem + suffix))
    return root


def test_labels_views_and_patients_are_the_tables(tmp_path):
    data = ChestXray14(build(tmp_path / "x"))
    assert data.filenames == [row[0] for row in ROWS]
    assert data.labels.shape == (4, 14) and data.labels.dtype == np.float32
    assert data.labels[0].sum() == 0
    assert {FINDINGS[k] for k in np.flatnonzero(data.labels[1])} == {"Nodule", "Mass"}
    assert data.patients.tolist() == [1, 1, 2, 3] and data.views.tolist() == ["PA", "AP", "PA", "PA"]
    assert data.pathologies is FINDINGS and len(data.targets) == len(data) == 4


def test_image_and_label_come_as_uint8_tv_tensor_and_float_vector(tmp_path):
    image, label = ChestXray14(build(tmp_path / "x"))[2]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (1, 64, 64)
    assert int(image[0, 0, 0]) == 20
    assert label.tolist() == [float(name == "Infiltration") for name in FINDINGS]


def test_label_is_a_copy_that_may_be_changed(tmp_path):
    data = ChestXray14(build(tmp_path / "x"))
    data[0][1].fill_(7)
    assert data[0][1].sum() == 0 and data.labels[0].sum() == 0


def test_images_are_found_in_numbered_and_nested_folders_with_any_suffix(tmp_path):
    folders = ("images_001/images", "images_012/images/images")
    data = ChestXray14(build(tmp_path / "x", folders=folders, suffix=".JPG"))
    assert len(data) == 4 and data[1][0].shape == (1, 64, 64)


def test_boxes_scale_from_1024_pixels_to_the_image(tmp_path):
    data = ChestXray14(build(tmp_path / "x", size=256))
    assert data.boxes(1).tolist() == [[128.0, 64.0, 160.0, 80.0]]
    assert data.boxes_relative(1).tolist() == [[0.5, 0.25, 0.625, 0.3125]]
    assert data.boxes(2, "Infiltration").shape == (1, 4)
    assert data.boxes(0).shape == (0, 4) and data.boxes(0).dtype == torch.float32


def test_extra_boxes_are_added_unless_they_repeat_an_official_one(tmp_path):
    root = build(tmp_path / "x")
    extra = tmp_path / "more.csv"
    extra.write_text(
        "Image Index,Finding Label,x,y,w,h,source\n"
        "00000003_000.png,Nodule,0,0,512,512,s\n00000001_001.png,Nodule,520,260,60,50,s\n"
    )
    data = ChestXray14(root, extra_boxes=extra)
    assert data.boxes(3).tolist() == [[0.0, 0.0, 32.0, 32.0]]
    assert len(data.boxes(1)) == 1


@pytest.mark.parametrize(("split", "expected"), [("train", [0, 1]), ("val", [2]), ("test", [3])])
def test_split_csv_decides_what_is_kept(tmp_path, split, expected):
    data = ChestXray14(build(tmp_path / "x"), split=split)
    assert data.filenames == [ROWS[i][0] for i in expected]


def test_official_lists_give_the_test_split_and_share_no_patient(tmp_path):
    rows = [(f"{p:08d}_{k:03d}.png", "No Finding", p, "PA") for p in range(1, 41) for k in range(2)]
    root = build(tmp_path / "x", rows=rows, size=16, split=False)
    (root / "test_list.txt").write_text("\n".join(row[0] for row in rows if row[2] > 30))
    (root / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[2] <= 30) + "\n")
    of = {split: set(ChestXray14(root, split=split).patients.tolist()) for split in ("train", "val", "test")}
    assert of["test"] == set(range(31, 41))
    assert of["train"] | of["val"] == set(range(1, 31)) and not of["train"] & of["val"] and of["val"]


def test_without_any_split_file_patients_are_split_by_hash(tmp_path):
    rows = [(f"{p:08d}_000.png", "No Finding", p, "PA") for p in range(60)]
    root = build(tmp_path / "x", rows=rows, size=16, split=False)
    counts = [len(ChestXray14(root, split=split)) for split in ("train", "val", "test")]
    assert sum(counts) == 60 and counts[0] > counts[2] > 0


def test_split_that_crosses_patients_is_refused(tmp_path):
    root = build(tmp_path / "x")
    text = (root / "split.csv").read_text().replace("00000001_001.png,train", "00000001_001.png,test")
    (root / "split.csv").write_text(text)
    with pytest.raises(DataError, match="patient 1 is in both train and test"):
        ChestXray14(root, split="train")


def test_unknown_or_missing_split_in_the_file_is_refused(tmp_path):
    root = build(tmp_path / "x")
    (root / "split.csv").write_text("Image Index,split\n00000001_000.png,training\n")
    with pytest.raises(DataError, match=r"line 2: split must be one of train, val, test, got 'training'"):
        ChestXray14(root, split="train")
    (root / "split.csv").write_text("Image Index,split\n00000001_000.png,train\n")
    with pytest.raises(DataError, match="no split for 00000001_001.png"):
        ChestXray14(root, split="train")


def test_views_and_findings_filter(tmp_path):
    root = build(tmp_path / "x")
    assert ChestXray14(root, views=("AP",)).filenames == ["00000001_001.png"]
    assert len(ChestXray14(root, findings=("Nodule", "No Finding"))) == 3
    assert ChestXray14(root, findings=lambda names: names == {"Nodule"}).filenames == ["00000003_000.png"]


def test_nodule_target_is_an_integer_and_can_drop_other_findings(tmp_path):
    data = ChestXray14(build(tmp_path / "x"), target="nodule", only_normal_or_nodule=True)
    assert data.targets == [0, 1, 1] and [data[i][1] for i in range(3)] == [0, 1, 1]


def test_detection_target_holds_all_boxes_with_labels_from_one(tmp_path):
    image, target = ChestXray14(build(tmp_path / "x"), target="detection")[1]
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[32.0, 16.0, 40.0, 20.0], [0.0, 0.0, 6.25, 6.25]]
    assert target["labels"].tolist() == [1 + FINDINGS.index("Nodule"), 1 + FINDINGS.index("Mass")]
    empty = ChestXray14(tmp_path / "x", target="detection")[0][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)


def test_transform_sees_the_image_alone_or_with_boxes(tmp_path):
    root = build(tmp_path / "x")
    image, label = ChestXray14(root, transform=v2.Resize(32), channels=3)[1]
    assert image.shape == (3, 32, 32) and label.shape == (14,)
    _, target = ChestXray14(root, transform=v2.RandomHorizontalFlip(1.0), target="detection")[1]
    assert target["boxes"][0].tolist() == [24.0, 16.0, 32.0, 20.0]


def test_dataset_pickles_and_works_in_loader_workers(tmp_path):
    data = pickle.loads(pickle.dumps(ChestXray14(build(tmp_path / "x"), target="nodule")))
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    images, labels = next(iter(loader))
    assert images.shape == (4, 1, 64, 64) and labels.tolist() == [0, 1, 0, 1]


def test_missing_image_is_named_or_skipped(tmp_path):
    root = build(tmp_path / "x")
    (root / "images" / "00000002_000.png").unlink()
    with pytest.raises(DataError, match="no image file for 00000002_000.png"):
        ChestXray14(root)
    assert len(ChestXray14(root, missing="skip")) == 3


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_image_is_named(tmp_path, damage):
    root = build(tmp_path / "x", size=128)
    path = root / "images" / "00000002_000.png"
    noise = np.random.default_rng(0).integers(0, 255, (128, 128), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes({"truncated": path.read_bytes()[:3000], "garbage": b"no image", "empty": b""}[damage])
    with pytest.raises(DataError, match="00000002_000.png"):
        ChestXray14(root)[2]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_as_8(tmp_path, suffix):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    read = read_grey(tmp_path / f"deep.{suffix}")[0].flatten()
    assert read[0] == 0 and read[-1] == 255 and read[257 * 100] == 100 and bool((read.int().diff() >= 0).all())


def test_findings_without_a_box_can_be_left_out(tmp_path):
    root = build(tmp_path / "x")
    everything, boxed = ChestXray14(root), ChestXray14(root, only_normal_or_boxed=True)
    left = [
        name
        for i, name in enumerate(everything.filenames)
        if not everything.labels[i].any() or any(len(everything.boxes(i, f)) for f in FINDINGS)
    ]
    assert boxed.filenames == left and 0 < len(left) < len(everything)
    nodules = ChestXray14(root, only_normal_or_boxed=True, only_normal_or_nodule=True)
    assert all(len(nodules.boxes(i)) or not nodules.labels[i].any() for i in range(len(nodules)))


def test_colour_image_is_read_as_grey(tmp_path):
    root = build(tmp_path / "x")
    Image.new("RGBA", (64, 64), (90, 90, 90, 255)).save(root / "images" / "00000002_000.png")
    image, _ = ChestXray14(root)[2]
    assert image.shape == (1, 64, 64) and int(image.max()) == int(image.min()) == 90


def test_table_without_a_column_is_refused_with_the_columns_found(tmp_path):
    root = build(tmp_path / "x")
    path = root / "Data_Entry_2017.csv"
    path.write_text(path.read_text().replace("View Position", "View"))
    with pytest.raises(DataError, match=r"Data_Entry_2017.csv: no column 'View Position'; columns found: .*'View'"):
        ChestXray14(root)


def test_unknown_finding_is_refused_with_its_line(tmp_path):
    root = build(tmp_path / "x", rows=[("00000001_000.png", "Nodul", 1, "PA")])
    with pytest.raises(DataError, match="line 2: unknown finding 'Nodul'"):
        ChestXray14(root)


def test_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no Data_Entry_2017\*.csv"):
        ChestXray14(tmp_path)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"split": "training"}, "split must be"),
        ({"target": "box"}, "target must be"),
        ({"missing": "ignore"}, "missing must be"),
        ({"channels": 2}, "channels must be"),
        ({"findings": ["Nodul"]}, "findings must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, option, match):
    with pytest.raises(ValueError, match=match):
        ChestXray14(tmp_path, **option)


@pytest.mark.parametrize("option", [{"views": "PA"}, {"findings": "Nodule"}])
def test_a_string_is_no_list_of_names(tmp_path, option):
    with pytest.raises(TypeError, match="got the string"):
        ChestXray14(tmp_path, **option)


def test_both_box_styles_are_read_alike(tmp_path):
    official, plain = tmp_path / "a.csv", tmp_path / "b.csv"
    official.write_bytes(b"Image Index,Finding Label,Bbox [x,y,w,h]\r\n1.png,Infiltrate,1,2,3,4\r\n")
    plain.write_text("Image Index,Finding Label,x,y,w,h,source\n1.png,Infiltration,1,2,3,4,me\n")
    assert read_boxes(official) == read_boxes(plain) == {"1.png": [("Infiltration", 1.0, 2.0, 4.0, 6.0)]}


def test_box_overhanging_by_rounding_is_clipped_and_by_more_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Image Index,Finding Label,x,y,w,h\n1.png,Nodule,-1,1000,100,25\n")
    assert read_boxes(path) == {"1.png": [("Nodule", 0.0, 1000.0, 99.0, 1024.0)]}
    for bad in ("1000,0,100,20", "-30,0,100,20", "5,5,0,10", "5,5,10,-3", "5,5,nan,3", "5,5,x,3", "1024,5,1,1"):
        path.write_text(f"Image Index,Finding Label,x,y,w,h\n1.png,Nodule,{bad}\n")
        with pytest.raises(DataError, match=r"a.csv, line 2: "):
            read_boxes(path)


def test_box_table_without_a_column_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Image Index,x,y,w,h\n1.png,1,1,1,1\n")
    with pytest.raises(DataError, match="no column 'Finding Label'"):
        read_boxes(path)


@given(ids=st.lists(st.integers(0, 40_000), max_size=60), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_random_split_keeps_patients_together_and_does_not_depend_on_the_others(ids, seed):
    of = dict(zip(ids, split_by_patient(ids, seed=seed), strict=True))
    assert [of[i] for i in ids] == split_by_patient(ids, seed=seed)
    assert all(split_by_patient([i], seed=seed) == [name] for i, name in of.items())


def test_random_split_meets_its_fractions():
    splits = split_by_patient(range(5000), (0.7, 0.1, 0.2))
    shares = [splits.count(name) / 5000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert split_by_patient(range(50), seed=1) != split_by_patient(range(50), seed=0)
    with pytest.raises(ValueError, match="fractions must be"):
        split_by_patient([1], (0.5, 0.1, 0.2))


def test_real_mini_data_has_the_counts_of_its_readme(real_data):
    counts = {}
    for split in ("train", "val", "test"):
        data = ChestXray14(real_data, split=split)
        nodules = int(data.labels[:, FINDINGS.index("Nodule")].sum())
        boxes = sum(len(data.boxes_relative(i)) for i in range(len(data)))
        counts[split] = (len(data), nodules, boxes, int((data.labels.sum(1) == 0).sum()))
    assert counts == {"train": (2420, 177, 47, 1109), "val": (387, 34, 10, 190), "test": (671, 56, 22, 317)}


def test_real_boxes_of_chestx_det_are_955_nodules(real_data):
    boxes = read_boxes(real_data / "ChestX-Det_boxes.csv")
    assert sum(row[0] == "Nodule" for rows in boxes.values() for row in rows) == 955
    assert sum(map(len, read_boxes(real_data / "BBox_List_2017.csv").values())) == 984


def test_a_view_that_no_image_has_is_named(phantom_data):
    with pytest.raises(ValueError, match="views must be among AP, PA, got 'LATERAL'"):
        ChestXray14(phantom_data, views=("PA", "LATERAL"))
    assert len(ChestXray14(phantom_data, views=("AP",))) == 0
