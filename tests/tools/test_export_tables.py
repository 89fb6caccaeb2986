"""Tables of an export: they agree on every box, join up, and read back as ChestX-ray14."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_mix

from carim_aug import SyntheticNoduleMix
from carim_aug.data import ChestXray14
from carim_aug.tools.export import export


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table_boxes(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The boxes of each table, XYXY in pixels of the images: form to image to (k, 4)."""
    sizes = {path.name: Image.open(path).size for path in sorted((folder / "images").iterdir())}
    coco = json.loads((folder / "annotations.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, dict[str, list]] = {
        form: {name: [] for name in sizes} for form in ("coco", "csv", "yolo", "provenance", "png")
    }
    for row in coco["annotations"]:
        x, y, w, h = row["bbox"]
        assert row["area"] == pytest.approx(w * h) and row["category_id"] == 1
        found["coco"][names[row["image_id"]]].append((x, y, x + w, y + h))
    for row in rows(folder / "BBox_List_2017.csv"):
        assert row["Finding Label"] == "Nodule"
        x, y, w, h = (float(row[column]) / 1024 for column in ("Bbox [x", "y", "w", "h]"))
        width, height = sizes[row["Image Index"]]
        found["csv"][row["Image Index"]].append((x * width, y * height, (x + w) * width, (y + h) * height))
    for name, (width, height) in sizes.items():
        for line in (folder / "labels" / name).with_suffix(".txt").read_text().splitlines():
            kind, x, y, w, h = map(float, line.split())
            assert kind == 0
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found["yolo"][name].append(corners)
        with Image.open(folder / "images" / name) as picture:
            boxes = json.loads(picture.text["carim_aug"])["boxes"]
        found["png"][name] = [np.array(box) * (width, height, width, height) for box in boxes]
    for row in rows(folder / "provenance.csv"):
        found["provenance"][row["Image Index"]] = json.loads(row["boxes"])
    return {
        form: {name: np.array(boxes, float).reshape(-1, 4) for name, boxes in of.items()} for form, of in found.items()
    }


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


@pytest.mark.parametrize("which", ["whole", "grafts"])
def test_all_forms_have_the_same_boxes(which, request):
    forms = table_boxes(request.getfixturevalue(which))
    boxes = forms.pop("png")
    assert sum(map(len, boxes.values())) >= 4
    for form, of in forms.items():
        for name, box in boxes.items():
            np.testing.assert_allclose(of[name], box, atol=1e-3, err_msg=f"{form} {name}")


def test_whole_images_read_back_as_chestxray14(whole):
    data = ChestXray14(whole, split="train", target="detection")
    assert len(data) == 6 and len(ChestXray14(whole, split="test")) == len(ChestXray14(whole, split="val")) == 0
    assert data.targets == [1, 1, 1, 1, 0, 0]
    image, target = data[0]
    assert image.shape == (1, 48, 48) and (target["labels"] == 6).all() and len(target["boxes"])
    np.testing.assert_allclose(target["boxes"], table_boxes(whole)["coco"][data.filenames[0]], atol=1e-3)
    assert len(data[5][1]["boxes"]) == 0
    assert len(set(data.patients)) == 6 and min(data.patients) >= 10**15 and max(data.patients) < 2**53
    assert not set(data.patients) & set(find_patients(make_mix(seed=6), whole.parent / "other"))


def find_patients(mix: SyntheticNoduleMix, folder: Path) -> list[int]:
    export(mix, folder, n=1, normal=1)
    return ChestXray14(folder).patients.tolist()


def test_grafts_read_back_with_their_hosts_patients(grafts, phantom_data):
    data = ChestXray14(grafts, target="nodule", views=("PA",))
    assert data.targets == [1] * 16
    assert set(data.patients) <= set(ChestXray14(phantom_data, split="train").patients)
    assert not {Path(path).stem for path in data.paths} & {Path(path).stem for path in ChestXray14(phantom_data).paths}


def test_a_plain_folder_hosts_too(tmp_path):
    films = tmp_path / "films"
    (films / "more").mkdir(parents=True)
    for i, name in enumerate(("00000007_000.png", "more/00000007_001.png", "more/anna_1.png")):
        Image.fromarray(np.full((50, 60), 90 + i, np.uint8)).save(films / name)
    out = tmp_path / "out"
    assert export(make_mix(), out, hosts=films)["images"] == 3
    data = ChestXray14(out)
    assert data.patients[0] == data.patients[1] == 7 and 2 * 10**15 <= data.patients[2] < 3 * 10**15
    assert data[0][0].shape == (1, 50, 60)
    forms = table_boxes(out)
    for name, boxes in forms["coco"].items():
        np.testing.assert_allclose(forms["csv"][name], boxes, atol=1e-3)
        np.testing.assert_allclose(forms["yolo"][name], boxes, atol=1e-3)


def test_coco_says_synthetic_and_joins_up(whole):
    coco = json.loads((whole / "annotations.json").read_text())
    assert coco["info"]["synthetic"] is True and "never for evaluation" in coco["info"]["description"]
    assert [category["name"] for category in coco["categories"]] == ["Nodule"]
    assert {row["image_id"] for row in coco["annotations"]} == {1, 2, 3, 4}
    assert len({row["id"] for row in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        with Image.open(whole / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])


def test_headers_are_the_official_ones(whole, phantom_data):
    for name, official in (("Data_Entry_2017", "Data_Entry_2017_v2020"), ("BBox_List_2017", "BBox_List_2017")):
        ours = (whole / f"{name}.csv").read_text().partition("\n")[0]
        assert ours == (phantom_data / f"{official}.csv").read_text().partition("\n")[0]
