import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.folders import FolderPerClass
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
