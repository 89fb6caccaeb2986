"""Tables of an export: they agree on every box, join up, and read back as ChestX-ray14."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_mix

from carim_aug.data import ChestXray14
from carim_aug.data.provenance import is_synthetic
from carim_aug.tools.export import export


def read_boxes(folder: Path, rows) -> dict[str, dict[str, np.ndarray]]:
    """The boxes of each table, XYXY as parts of the images: image to form to (k, 4)."""
    coco, found = json.loads((folder / "annotations.json").read_text()), {}
    for image in coco["images"]:
        name, size = image["file_name"], np.array([image["width"], image["height"]] * 2)
        own = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
        assert all(row["category_id"] == 1 and row["area"] == pytest.approx(np.prod(row["bbox"][2:])) for row in own)
        listed = [row for row in rows(folder, "BBox_List_2017.csv") if row["Image Index"] == name]
        assert {row["Finding Label"] for row in listed} <= {"Nodule"}
        lines = (folder / "labels" / name).with_suffix(".txt").read_text().splitlines()
        yolo = np.array([line.split() for line in lines], dtype=float).reshape(-1, 5)
        assert (yolo[:, 0] == 0).all()
        with Image.open(folder / "images" / name) as picture:
            assert picture.size == (image["width"], image["height"])
            png = json.loads(picture.text["carim_aug"])["boxes"]
        found[name] = {
            "png": np.reshape(png, (-1, 4)),
            "coco": corners([row["bbox"] for row in own]) / size,
            "csv": corners([[float(row[c]) for c in ("Bbox [x", "y", "w", "h]")] for row in listed]) / 1024,
            "yolo": corners(np.hstack([yolo[:, 1:3] - yolo[:, 3:] / 2, yolo[:, 3:]])),
        }
    for row in rows(folder):
        size = [int(row["width"]), int(row["height"])] * 2
        found[row["Image Index"]]["provenance"] = np.reshape(json.loads(row["boxes"]), (-1, 4)) / size
    return found


def corners(boxes) -> np.ndarray:
    """XYWH to XYXY."""
    boxes = np.reshape(boxes, (-1, 4))
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


@pytest.mark.parametrize("which", ["whole", "grafts", "images of several sizes"])
def test_all_forms_have_the_same_boxes(which, request, tmp_path, rows):
    if which in ("whole", "grafts"):
        folder = request.getfixturevalue(which)
    else:
        images, folder = tmp_path / "images", tmp_path / "out"
        images.mkdir()
        for i in range(4):
            Image.fromarray(np.full((50, 60 + i), 90, np.uint8)).save(images / f"{i}.png")
        export(make_mix(), folder, backgrounds=images)
    forms = list(read_boxes(folder, rows).values())
    assert sum(len(of["png"]) for of in forms) >= 3
    for of in forms:
        for form in ("coco", "csv", "yolo", "provenance"):
            np.testing.assert_allclose(of[form], of["png"], atol=2e-5, err_msg=form)


def test_whole_images_read_back_as_chestxray14(whole, tmp_path, rows):
    data = ChestXray14(whole, split="train", target="detection")
    assert len(data) == 6 and len(ChestXray14(whole, split="test")) == len(ChestXray14(whole, split="val")) == 0
    assert data.targets == [1, 1, 1, 1, 0, 0]
    image, target = data[0]
    assert image.shape == (1, 48, 48) and (target["labels"] == 6).all() and len(target["boxes"])
    np.testing.assert_allclose(target["boxes"], read_boxes(whole, rows)[data.filenames[0]]["coco"] * 48, atol=1e-3)
    assert len(data[5][1]["boxes"]) == 0
    assert len(set(data.patients)) == 6 and min(data.patients) >= 10**15 and max(data.patients) < 2**53
    export(make_mix(seed=6), tmp_path / "other", n=1, negatives=1)
    assert not set(data.patients) & set(ChestXray14(tmp_path / "other").patients)


def test_grafts_read_back_with_their_backgrounds_patients(grafts, phantom_data):
    data = ChestXray14(grafts, target="nodule", views=("PA",))
    assert data.targets == [1] * 16
    assert set(data.patients) <= set(ChestXray14(phantom_data, split="train").patients)
    assert not {Path(path).stem for path in data.paths} & {Path(path).stem for path in ChestXray14(phantom_data).paths}


def test_coco_says_synthetic_and_joins_up_and_headers_are_the_official_ones(whole, phantom_data):
    coco = json.loads((whole / "annotations.json").read_text())
    assert coco["info"]["synthetic"] is True and "never for evaluation" in coco["info"]["description"]
    assert [category["name"] for category in coco["categories"]] == ["Nodule"]
    assert {row["image_id"] for row in coco["annotations"]} == {1, 2, 3, 4}
    assert len({row["id"] for row in coco["annotations"]}) == len(coco["annotations"])
    for name, official in (("Data_Entry_2017", "Data_Entry_2017_v2020"), ("BBox_List_2017", "BBox_List_2017")):
        ours = (whole / f"{name}.csv").read_text().partition("\n")[0]
        assert ours == (phantom_data / f"{official}.csv").read_text().partition("\n")[0]


@pytest.mark.parametrize("case", ["table", "plain", "val", "whole", "split val"])
def test_data_yaml_validates_on_real_images_or_says_what_is_missing(case, phantom_data, tmp_path):
    real, options = tmp_path / "real", {"backgrounds": phantom_data, "n": 3}
    for name in ("images", "labels"):
        (real / name).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((40, 40), 90 + i, np.uint8)).save(real / "images" / f"{i}_0.png")
        (real / "labels" / f"{i}_0.txt").write_text("")
    options = {"plain": {"backgrounds": real / "images"}, "whole": {"n": 1}}.get(case, options)
    options |= {"val": {"val": real}, "split val": {"split": "val"}}.get(case, {})
    counts, folder = export(make_mix(), tmp_path / "out", **options), tmp_path / "out"
    if case == "split val":
        assert not (folder / "data.yaml").exists() and counts["val"] == 0
        return
    text = (folder / "data.yaml").read_text()
    assert "\npath:  # empty" in text and "\ntrain: images\n" in text and text.endswith("\nnames:\n  0: Nodule\n")
    if case in ("val", "whole"):
        place = f'"{real / "images"}"  # your real' if case == "val" else "val/images  # MISSING: put real images there"
        assert f"\nval: {place}" in text and counts["val"] == 0 and not (folder / "val").exists()
        return
    # Real images that are in no table, with labels: two with boxes and a normal one, or one of six patients.
    real_images, boxed = (3, 2) if case == "table" else (1, 0)
    assert f"\nval: val/images  # real images as they are: {real_images}, with nodules: {boxed}" in text
    assert ("no mAP" in text) == (not boxed) and counts["val"] == real_images
    assert counts["images"] == {"table": 3, "plain": 5}[case] and counts["real"] == 0
    truth = ChestXray14(phantom_data, split="val")
    for path in (folder / "val" / "images").iterdir():
        source = path.name.replace("_real", "")
        lines = (folder / "val" / "labels" / f"{path.stem}.txt").read_text().splitlines()
        assert path.name not in (folder / "provenance.csv").read_text() and not is_synthetic(path)
        if case == "table":
            i = truth.filenames.index(source)
            boxes = truth.boxes_relative(i).numpy()
            yolo = np.array([line.split()[1:] for line in lines], dtype=float).reshape(-1, 4)
            np.testing.assert_allclose(yolo[:, 2:], boxes[:, 2:] - boxes[:, :2], atol=1e-6)
            np.testing.assert_allclose(yolo[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2, atol=1e-6)
            assert bool(len(boxes)) == bool(truth.labels[i].any())
        with (
            Image.open(path) as ours,
            Image.open(truth.paths[i] if case == "table" else real / "images" / source) as old,
        ):
            assert ours.tobytes() == old.tobytes()


@pytest.mark.train
def test_ultralytics_trains_on_it_as_it_is(phantom_data, tmp_path, monkeypatch):
    ultralytics = pytest.importorskip("ultralytics")
    from ultralytics.data.utils import check_det_dataset

    export(make_mix(), tmp_path / "out", backgrounds=phantom_data, n=6, negatives=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    data = check_det_dataset(str(tmp_path / "moved" / "data.yaml"), autodownload=False)
    assert data["val"] == str(tmp_path / "moved" / "val" / "images") and data["names"] == {0: "Nodule"}
    options = dict(epochs=1, imgsz=64, batch=4, workers=0, device="cpu", plots=False, project=str(tmp_path / "runs"))
    model = ultralytics.YOLO("yolo11n.yaml")
    model.train(data=str(tmp_path / "moved" / "data.yaml"), amp=False, **options)
    assert len(model.trainer.train_loader.dataset) == 8 and len(model.trainer.test_loader.dataset) == 3
    assert sum(len(label["cls"]) for label in model.trainer.test_loader.dataset.labels) == 2
