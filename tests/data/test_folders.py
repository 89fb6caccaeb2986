import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.folders import BoxCSV, FolderPerClass
from carim_aug.data.io import DataError


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 10), value).save(path)


@pytest.fixture
def classes(tmp_path):
    for i in range(3):
        save(tmp_path / "normal" / f"{i}.png", i)
    save(tmp_path / "nodule" / "deep" / "a.jpeg", 200)
    (tmp_path / "nodule" / "notes.txt").write_text("no image")
    return tmp_path


def table(folder, text):
    for name in "abc":
        save(folder / f"{name}.png", 50)
    (folder / "boxes.csv").write_text(text)
    return folder


def test_folder_names_are_the_labels_in_order_or_as_given(classes):
    data = FolderPerClass(classes)
    assert data.classes == ["nodule", "normal"] and data.targets == [0, 1, 1, 1]
    image, label = data[2]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert image.shape == (1, 10, 20) and int(image.max()) == 1 and label == 1
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 1, 10, 20) and labels.tolist() == data.targets
    assert FolderPerClass(classes, classes=("nodule",)).targets == [0]
    data = FolderPerClass(classes, classes=("normal", "nodule"), transform=v2.Resize((4, 4)), channels=3)
    assert data.targets == [0, 0, 0, 1] and data[0][0].shape == (3, 4, 4)


def test_wrong_class_folders_are_refused(classes, tmp_path):
    (classes / "empty").mkdir()
    for root, options, error, words in (
        (classes, {"classes": ("mass",)}, DataError, "no class folder 'mass'; found empty, nodule, normal"),
        (classes, {}, DataError, "empty: no image"),
        (tmp_path / "nowhere", {}, DataError, "no such folder"),
        (classes / "empty", {}, DataError, "no class folder in it"),
        (classes, {"classes": ("normal", "normal")}, ValueError, "classes must differ"),
        (classes, {"classes": "normal"}, TypeError, "got the string"),
        (classes, {"channels": 2}, ValueError, "channels must be .*got 2"),
    ):
        with pytest.raises(error, match=words):
            FolderPerClass(root, **options)


def test_boxes_of_one_image_belong_together_and_empty_rows_have_none(tmp_path):
    text = "image,x1,y1,x2,y2,label\na.png,1,2,3,4,1\nb.png,,,,,\na.png,5,5,20,10,7\n"
    data = BoxCSV(table(tmp_path, text), "boxes.csv")
    assert len(data) == 2 and data.targets == [1, 0]
    image, target = data[0]
    assert image.shape == (1, 10, 20) and isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[1, 2, 3, 4], [5, 5, 20, 10]] and target["boxes"].canvas_size == (10, 20)
    assert target["labels"].tolist() == [1, 7] and target["labels"].dtype == torch.int64
    assert data[1][1]["boxes"].shape == (0, 4) and data[1][1]["labels"].shape == (0,)

    # The label column may be missing; boxes are clipped, and move with the image.
    root = table(tmp_path, "image,x1,y1,x2,y2\na.png,-0.5,0,5,5\na.png,1,0,20.9,10\n")
    _, target = BoxCSV(root, root / "boxes.csv", transform=v2.RandomHorizontalFlip(1.0))[0]
    assert target["labels"].tolist() == [1, 1] and target["boxes"].tolist() == [[15, 0, 20, 5], [0, 0, 19, 10]]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("a.png,5,5,50,9,1", "line 2: box must lie in the image of 20 x 10 px"),
        ("a.png,5,1,6,9,1.5", "line 2: label must be an integer, got '1.5'"),
        ("a.png,5", "line 2: 2 cells"),
        ("z.png,1,1,2,2,1", "z.png: no such image file"),
        ("", "no rows"),
    ],
)
def test_bad_row_is_named(tmp_path, row, match):
    with pytest.raises(DataError, match=match):
        BoxCSV(table(tmp_path, f"image,x1,y1,x2,y2,label\n{row}\n"), "boxes.csv")[0]
