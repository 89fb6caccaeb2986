import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.errors import DataError
from carim_aug.data.folders import BoxCSV, FolderPerClass


def save(path, value=0, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def classes(tmp_path):
    for i in range(3):
        save(tmp_path / "normal" / f"{i}.png", i)
    save(tmp_path / "nodule" / "deep" / "a.jpeg", 200)
    (tmp_path / "nodule" / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_names_are_the_labels(classes):
    data = FolderPerClass(classes)
    assert data.classes == ["nodule", "normal"] and data.targets == [0, 1, 1, 1]
    image, label = data[2]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert image.shape == (1, 10, 20) and int(image.max()) == 1 and label == 1


def test_given_classes_set_the_order_and_leave_others_out(classes):
    assert FolderPerClass(classes, classes=("normal", "nodule")).targets == [0, 0, 0, 1]
    assert len(FolderPerClass(classes, classes=("nodule",))) == 1


def test_transform_and_channels_are_applied(classes):
    image, _ = FolderPerClass(classes, transform=v2.Resize((4, 4)), channels=3)[0]
    assert image.shape == (3, 4, 4)


def test_unreadable_file_in_a_class_folder_is_named(classes):
    (classes / "normal" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1.png: unreadable image"):
        FolderPerClass(classes)[2]


def test_wrong_class_folders_are_refused(classes, tmp_path):
    with pytest.raises(DataError, match="no class folder 'mass'; found nodule, normal"):
        FolderPerClass(classes, classes=("mass",))
    (classes / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image"):
        FolderPerClass(classes)
    with pytest.raises(DataError, match="no such folder"):
        FolderPerClass(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folder in it"):
        FolderPerClass(classes / "empty")
    with pytest.raises(ValueError, match="classes must differ"):
        FolderPerClass(classes, classes=("normal", "normal"))
    with pytest.raises(TypeError, match="got the string"):
        FolderPerClass(classes, classes="normal")


def table(folder, text):
    for name in "abc":
        save(folder / f"{name}.png", 50)
    (folder / "boxes.csv").write_text(text)
    return folder


def test_boxes_of_one_image_belong_together_and_empty_rows_have_none(tmp_path):
    text = "image,x1,y1,x2,y2,label\na.png,1,2,3,4,1\nb.png,,,,,\na.png,5,5,20,10,7\n"
    data = BoxCSV(table(tmp_path, text), "boxes.csv")
    assert len(data) == 2 and data.targets == [1, 0]
    image, target = data[0]
    assert image.shape == (1, 10, 20) and isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[1, 2, 3, 4], [5, 5, 20, 10]] and target["boxes"].canvas_size == (10, 20)
    assert target["labels"].tolist() == [1, 7] and target["labels"].dtype == torch.int64
    assert data[1][1]["boxes"].shape == (0, 4) and data[1][1]["labels"].shape == (0,)


def test_label_column_may_be_missing_and_transform_moves_boxes(tmp_path):
    root = table(tmp_path, "image,x1,y1,x2,y2\na.png,0,0,5,5\n")
    _, target = BoxCSV(root, root / "boxes.csv", transform=v2.RandomHorizontalFlip(1.0))[0]
    assert target["labels"].tolist() == [1] and target["boxes"].tolist() == [[15, 0, 20, 5]]


def test_box_over_the_edge_by_rounding_is_clipped(tmp_path):
    data = BoxCSV(table(tmp_path, "image,x1,y1,x2,y2\na.png,-0.5,0,20.9,10\n"), "boxes.csv")
    assert data[0][1]["boxes"].tolist() == [[0, 0, 20, 10]]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("a.png,5,5,5,9,1", "line 2: box must have x1 < x2"),
        ("a.png,5,,6,9,1", "line 2: y1 is empty"),
        ("a.png,5,x,6,9,1", "line 2: y1 must be a number, got 'x'"),
        ("a.png,5,1,6,9,1.5", "line 2: label must be an integer"),
        ("a.png,5", "line 2: 2 cells"),
        ("z.png,1,1,2,2,1", "z.png: no such image file"),
    ],
)
def test_bad_row_is_named(tmp_path, row, match):
    with pytest.raises(DataError, match=match):
        BoxCSV(table(tmp_path, f"image,x1,y1,x2,y2,label\n{row}\n"), "boxes.csv")


def test_bad_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match="no column 'x2'; columns found: 'image', 'x1', 'y1', 'w', 'h'"):
        BoxCSV(table(tmp_path, "image,x1,y1,w,h\n"), "boxes.csv")
    with pytest.raises(DataError, match="no rows"):
        BoxCSV(table(tmp_path, "image,x1,y1,x2,y2\n"), "boxes.csv")
    with pytest.raises(DataError, match="no such file"):
        BoxCSV(tmp_path, "other.csv")
    outside = BoxCSV(table(tmp_path, "image,x1,y1,x2,y2\na.png,5,5,50,9\n"), "boxes.csv")
    with pytest.raises(DataError, match="line 2: box must lie in the image of 20 x 10 px"):
        outside[0]


def test_folder_images_batch_with_the_default_collate(classes):
    images, labels = next(iter(torch.utils.data.DataLoader(FolderPerClass(classes, classes=("normal",)), batch_size=3)))
    assert images.shape == (3, 1, 10, 20) and np.array_equal(labels, [0, 0, 0])
