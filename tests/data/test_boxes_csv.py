"""A plain table of boxes as a detection data set: spellings, forms, images without boxes, and what is refused."""

import re

import pytest
import torch
from PIL import Image
from tiny import make_mix
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import LabelPolicy
from carim_aug.data import BoxCSV, DataError
from carim_aug.ops.findings import NORMAL_WORDS

HEADER = "file,x1,y1,x2,y2,class\n"


@pytest.fixture
def table(tmp_path):
    """Writes boxes.csv beside the images a, b, c (20 x 16) and deep/d, and returns their folder."""

    def write(text):
        (tmp_path / "deep").mkdir(exist_ok=True)
        for name in ("a.png", "b.png", "c.jpg", "deep/d.png"):
            Image.new("L", (20, 16), 50).save(tmp_path / name)
        (tmp_path / "boxes.csv").write_text(text)
        return tmp_path

    return write


def test_rows_of_an_image_belong_together_and_images_without_boxes_have_none(table):
    text = HEADER + "deep/d.png,1,2,3,4,Nodule\nb.png,,,,,No finding\ndeep/d.png,5,5,20,10,Mass\n"
    data = BoxCSV(table(text), "boxes.csv")
    assert [path[-5:] for path in data.paths] == ["d.png", "b.png", "a.png", "c.jpg"]
    assert data.targets == [1, 0, 0, 0] and data.classes == ("__background__", "Mass", "Nodule")
    image, target = data[0]
    assert isinstance(image, tv_tensors.Image) and image.shape == (1, 16, 20)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (16, 20)
    assert target["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY
    assert target["boxes"].tolist() == [[1, 2, 3, 4], [5, 5, 20, 10]]
    assert target["labels"].tolist() == [2, 1] and target["labels"].dtype == torch.int64
    for i in (1, 3):
        assert data[i][1]["boxes"].shape == (0, 4) and data[i][1]["labels"].shape == (0,)
    assert len(BoxCSV(data.root, "boxes.csv", only_listed=True)) == 2


def test_boxes_that_overhang_by_a_pixel_are_clipped_and_move_with_the_image(table):
    root = table(HEADER + "a.png,-0.5,0,5,5,Nodule\na.png,1,0,20.9,10,Nodule\n")
    image, target = BoxCSV(root, root / "boxes.csv", transform=v2.RandomHorizontalFlip(1.0), channels=3)[0]
    assert image.shape == (3, 16, 20) and target["boxes"].tolist() == [[15, 0, 20, 5], [0, 0, 19, 10]]


@pytest.mark.parametrize(
    ("header", "row", "options"),
    [
        ("Image_ID,class_name,class_id,x_min,y_min,x_max,y_max", "a,Nodule,8,2,3,6,8", {}),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,20,10,Nodule,2,3,6,8", {}),
        ("image,x,y,w,h,label", "./a.png,2,3,4,5,Nodule", {}),
        ("finding,left,top,width,height,path", "Nodule,2,3,4,5,a.png", {}),
        ("patientId,x,y,width,height,Target", "a,2,3,4,5,1", {"columns": {"file": "patientId", "class": "Target"}}),
        ("file,x1,y1,x2,y2,x,y,w,h", "a.png,2,3,6,8,1,1,1,1", {"columns": {"x1": "x1"}, "classes": ["Nodule"]}),
        ("file,x1,y1,x2,y2", "a.png,2,3,4,5", {"columns": {"w": "x2", "h": "y2"}, "classes": ["Nodule"]}),
    ],
)
def test_usual_columns_are_found_and_others_are_named(table, header, row, options):
    options = {"classes": ("__background__", "Nodule"), **options}
    data = BoxCSV(table(f"{header}\n{row}\n"), "boxes.csv", **options)
    target = data[0][1]
    assert data.paths[0].endswith("a.png") and data.classes == ("__background__", "Nodule")
    assert target["boxes"].tolist() == [[2, 3, 6, 8]] and target["labels"].tolist() == [1]


@pytest.mark.parametrize("labels", ["auto", LabelPolicy("detection", classes=("__background__", "Mass", "Nodule"))])
def test_the_mix_adds_boxes_of_the_nodule_class(table, labels):
    data = BoxCSV(table(HEADER + "a.png,1,2,9,8,Mass\nb.png,1,2,9,8,Nodule\n"), "boxes.csv")
    mixed = make_mix(p=1.0, labels=labels, placement="prior").wrap(data)
    for i in range(4):
        (before, old), (after, new) = data[i], mixed[i]
        added = len(new["boxes"]) - len(old["boxes"])
        assert new["labels"].tolist() == old["labels"].tolist() + [2] * added
        assert bool(added) == (not torch.equal(before, after))
    assert any(len(mixed[i][1]["boxes"]) for i in (2, 3))


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "no rows"),
        ("a.png,5,1,50,9,Nodule", {}, "line 2: box must lie in .* 20 x 16 px, .*: boxes are in pixels of the file"),
        ("a.png,5,5,4,9,Nodule", {}, "line 2: box must have x1 < x2 .* pass columns={'w': 'x2', 'h': 'y2'}"),
        ("a.png,.1,.2,.3,.4,Nodule", {}, r"boxes must be in pixels of the files, got parts of 1: \(0.1"),
        ("a.png,5,five,6,9,Nodule", {}, "line 2: y1 must be a number, got 'five'"),
        ("a.png,5,,6,9,Nodule", {}, "line 2: y1 is empty though other"),
        ("a.png,5", {}, "line 2: 2 cells"),
        ("z.png,1,1,2,2,Nodule", {}, "z.png: no such image file, listed in .*line 2"),
        (",1,1,2,2,Nodule", {}, "no such image file, listed in .*line 2"),
        ("a.png,1,1,2,2,Nodule\na,1,1.0,2,2,Nodule", {}, "line 3: row must not repeat line 2"),
        ("a.png,1,1,2,2,Nodule", {"classes": ["Mass"]}, r"line 2: class must be one of \['Mass'\], got 'Nodule'"),
        ("a.png,1,1,2,2,", {}, r"line 2: class must be one of \[\], got ''"),
        ("a.png,1,1,2,2,1", {}, "line 2: class must be a name .* pass classes=.'__background__', 'Nodule', ...."),
        ("a.png,1,1,2,2,0", {"classes": ("__background__", "Nodule")}, "class must be one of .'Nodule', '1'., got '0'"),
        *((f"a.png,0,0,9,9,{word}", {}, "class must be a finding's, .* leave the") for word in NORMAL_WORDS),
    ],
)  # fmt: skip
def test_bad_rows_are_named(table, text, options, said):
    with pytest.raises(DataError, match=said):
        BoxCSV(table(HEADER + text + "\n"), "boxes.csv", **options)[0]


@pytest.mark.parametrize(
    ("header", "options", "error", "said"),
    [
        (
            "a,x1,y1,x2,y2,class",
            {},
            DataError,
            "one column for 'file', got none; columns found: 'a', .*columns={'file'",
        ),
        ("file,x1,y1,x2,class", {}, DataError, "one column for 'y2', got none"),
        ("file,x,y,w,class", {}, DataError, "one column for 'x1', got none"),
        ("file,image,x,y,w,h,class", {}, DataError, "one column for 'file', got 'file' and 'image'"),
        ("file,x,y,w,h,class,class", {}, DataError, "one column for 'class', got 'class' and 'class'"),
        ("file,x1,y1,x2,y2", {}, DataError, "for 'class', got none; .* or classes=.'Nodule',. if all boxes"),
        ("file,x1,y1,x2,y2,x,y,w,h,class", {}, DataError, "boxes must be .*, got columns for both: pass columns={'x1'"),
        ("file,x,y,w,h,class", {"columns": {"x": "no"}}, DataError, "one column for 'x', got none"),
        ("file,x,y,w,h,class", {"columns": {"x": "x", "x2": "w"}}, DataError, "got columns for both"),
        ("file,x,y,w,h,class", {"columns": {"X": "x"}}, ValueError, "columns must have keys among file, class, .*'X'"),
        ("file,x,y,w,h,class", {"classes": "Nodule"}, TypeError, "classes must be a sequence of names"),
        ("file,x,y,w,h,class", {"classes": ("Mass", "__background__")}, ValueError, "classes must be different names"),
        ("file,x,y,w,h,class", {"classes": ()}, ValueError, "classes must be different names, .* got "),
        ("file,x,y,w,h,class", {"channels": 2}, ValueError, "channels must be .*got 2"),
    ],
)
def test_bad_columns_and_arguments_are_named(table, header, options, error, said):
    row = ",".join("a.png" if name in ("file", "image") else "3" for name in header.split(","))
    with pytest.raises(error, match=said):
        BoxCSV(table(f"{header}\n{row}\n"), "boxes.csv", **options)


def test_folders_and_tables_that_are_not_there_are_named(tmp_path):
    for root, said in ((tmp_path / "none", "none: no such folder"), (tmp_path, re.escape("boxes.csv: no such file"))):
        with pytest.raises(DataError, match=said):
            BoxCSV(root, "boxes.csv")
