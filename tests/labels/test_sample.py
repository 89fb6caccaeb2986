"""Where image and label sit in a sample: found by themselves, named, or found by a function."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import default_collate
from torchvision import tv_tensors

from carim_aug import ImageError, LayoutError
from carim_aug.labels.sample import GetterLayout, Layout, check_images, layout_of

Pair, Triple = namedtuple("Pair", ["image", "label"]), namedtuple("Triple", ["index", "x", "y"])
PIL = PILImage.new("L", (16, 16))
BOXES = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(16, 16))


Record = type("Record", (dict,), {})  # a dict of a user's own class


def image(kind="torch", batch=False):
    plain = torch.zeros((2, 1, 16, 16) if batch else (1, 16, 16), dtype=torch.uint8 if kind == "uint8" else None)
    return {"numpy": plain.numpy(), "tv": tv_tensors.Image(plain)}.get(kind, plain)


@st.composite
def samples(draw):
    """A sample or batch, its image and its label."""
    batch = draw(st.booleans())
    x, rows = image(draw(st.sampled_from(["torch", "uint8", "numpy", "tv"])), batch), torch.zeros([2, 14][1 - batch :])
    y = draw(st.sampled_from([torch.tensor([0, 1]) if batch else 1, rows, rows.numpy(), rows[..., 0]]))
    extras = [draw(st.sampled_from(["path.png", 7, None, ("a", "b"), {"view": "PA"}])) for _ in range(3)]
    form = draw(st.sampled_from([tuple, list, Pair, Triple, dict, OrderedDict, defaultdict, Record, UserDict]))
    if form in (tuple, list):
        return form([*extras[: draw(st.integers(0, 2))], x, y, *extras[2 : 2 + draw(st.integers(0, 1))]]), x, y
    if form in (Pair, Triple):
        return form(*extras[: len(form._fields) - 2], x, y), x, y
    keys = draw(st.sampled_from([("image", "label"), ("img", "lab"), ("pixel_values", "labels"), ("x", "y")]))
    fields = draw(st.permutations([(keys[0], x), (keys[1], y), ("idx", extras[0]), ("meta", extras[1])]))
    return (defaultdict(list, fields) if form is defaultdict else form(fields)), x, y


def entries(sample):
    return dict(sample if isinstance(sample, dict | UserDict) else enumerate(sample))


@given(samples(), st.sampled_from(["auto", "named", "getter"]))
def test_put_changes_image_and_label_and_nothing_else(case, how):
    sample, x, y = case
    before, new_label = entries(sample), torch.ones(2)
    at, label = (next(key for key, entry in before.items() if entry is wanted) for wanted in (x, y))
    spec = "auto" if how == "auto" else (at, label if isinstance(label, str) else label - len(sample))
    layout = layout_of(sample, spec, (lambda s: s[label]) if how == "getter" else None)
    assert isinstance(layout, GetterLayout if how == "getter" else Layout)
    assert layout.get(sample)[0] is x and layout.get(sample)[1] is y
    made = layout.put(sample, torch.ones(x.shape), new_label)
    after = entries(made)
    assert type(made) is type(sample) and list(after) == list(before) and layout.get(made)[1] is new_label
    assert all(entry is before[key] for key, entry in entries(sample).items())
    assert all(after[key] is before[key] for key in before if key not in (at, label)) and after[label] is new_label
    assert type(after[at]) is type(x) and bool((after[at] == 1).all())


def test_the_first_entries_that_fit_are_taken_and_keep_their_type_also_in_a_batch():
    sample = (torch.zeros(3, 16, 16), 5, image("tv"), 1)
    assert Layout.of(sample).get(sample) == (sample[2], 1)  # a tv_tensors.Image is preferred
    sample = {"image": "a.png", "pixel_values": image(), "label": "nodule", "target": 1}
    assert Layout.of(sample).get(sample) == (sample["pixel_values"], 1)
    assert type(Layout.of((image(), 0)).put((image(), 0), image("tv"), 0)[0]) is torch.Tensor
    assert type(Layout.of((image("tv"), 0)).put((image("tv"), 0), image("numpy"), 0)[0]) is tv_tensors.Image
    dataset = [{"idx": i, "lab": np.zeros(18, dtype=np.float32), "img": image("numpy")} for i in range(4)]
    batch, layout = default_collate(dataset), Layout.of(dataset[0])
    assert layout == Layout.of(batch) and layout.get(batch)[1].shape == (4, 18)
    check_images(layout.get(batch)[0], batch=True)


TARGET = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 16, 16)}
MIXED = {"flag": False, "a": 1, "b": 0, "x": image(), "n": 0}


@pytest.mark.parametrize(
    ("sample", "getter", "at", "label"),
    [
        ((1, image(), 1), lambda s: s[2], 1, 2),
        ((1, image(), 1), lambda s: s[0] if len(s) == 3 else None, 1, 0),
        ((TARGET, image(), image()), lambda s: s[0], 1, 0),
        ((image(), image("tv"), [TARGET, TARGET]), lambda s: s[2], 1, 2),
        (([image(), image()], (TARGET, TARGET)), lambda s: s[1], 0, 1),
        (MIXED, lambda s: s["a"] if s["flag"] else s["b"], "x", "b"),
    ],
)
def test_a_function_finds_a_label_at_any_place(sample, getter, at, label):
    layout = layout_of(sample, "ignored", getter)
    assert layout.label == label and layout.get(sample)[0] is sample[at] and layout.get(sample)[1] is sample[label]
    made = entries(layout.put(sample, sample[at], "new"))
    assert made.pop(label) == "new" and all(made[key] is sample[key] for key in made if key != at)


def test_a_number_deep_in_a_sample_is_told_from_equal_ones():
    sample = {"id": 1, "data": {"views": {"ap": image(), "lateral": image()}, "y": {"nodule": 1, "mass": 1}}}
    layout = layout_of(sample, labels_getter=lambda s: s["data"]["y"]["nodule"])
    assert layout.label == "nodule" and layout.get(sample)[1] == 1
    made = layout.put(sample, torch.ones(1, 16, 16), 0)
    assert made["data"]["y"] == {"nodule": 0, "mass": 1} and made["id"] == sample["data"]["y"]["nodule"] == 1
    assert made["data"]["views"]["ap"].all() and made["data"]["views"]["lateral"] is sample["data"]["views"]["lateral"]


@pytest.mark.parametrize(
    ("sample", "spec", "message"),
    [
        (image(), "auto", "tuple, list or dict .* got Tensor"),
        ((image(),), "auto", "an image and a label"),
        ((1, image()), "auto", "label must come after the image.* pass layout="),
        ((image(), "a.png"), "auto", r"label must be .* got str at 1 .*: make it one of these, or pass layout="),
        ((image(), tv_tensors.Mask(torch.zeros(16, 16))), "auto", "no segmentation mask.*give a detection target"),
        ((image(), BOXES), "auto", "detection target with boxes, got BoundingBoxes"),
        ((torch.zeros(16, 16), 1), "auto", r"add a channel axis"),
        (("a", "b"), "auto", "image must be"),
        ((PIL, 1), "auto", r"got Image.*ToImage\(\)"),
        ({"image": np.zeros((16, 16, 1)), "bboxes": [], "label": 1}, "auto", "bboxes.*integrations.albumentations"),
        ({"scan": image(), "label": 1}, "auto", r"an image under one of .*'scan'.* pass layout="),
        ({"image": image(), "disease": 1}, "auto", "a label under one of"),
        ({"image": image(), "label": 1}, ("img", "label"), "an image at 'img'"),
        ((image(), 1), (0, 5), "a label at 5"),
        ((image(), 1), (0, 0), "two places"),
        ((image(), 1), (1, 0), "image must be"),
        ((image(), 1), (0, 1, 2), "layout must be 'auto' or a pair"),
        (MappingProxyType({"image": image(), "label": 1}), "auto", "return dict"),
        ((image(), 1), lambda s: s["y"], "labels_getter must find the label of tuple .*got TypeError"),
        ((image(), 1), lambda s: len(s) - 1, "labels_getter must return an entry of the sample, got int"),
        ((image(), torch.tensor(0.6)), lambda s: s[1].round(), "must return an entry of the sample, got Tensor"),
        ((image(), "nodule"), lambda s: s[1], "the label must be a number.* got str from labels_getter"),
        (("a.png", 1), lambda s: s[1], "the image must be"),
    ],
)
def test_what_is_not_found_is_named(sample, spec, message):
    with pytest.raises(LayoutError, match=message):
        layout_of(sample, labels_getter=spec) if callable(spec) else layout_of(sample, spec)


def test_a_sample_of_another_structure_is_an_error():
    layout, other = Layout.of({"image": image(), "label": 1}), defaultdict(list, image=image())
    with pytest.raises(LayoutError, match="samples must be dicts"):
        layout.get((image(), 1))
    with pytest.raises(LayoutError, match="a label at 'label'"):
        layout.put(other, image(), 1)
    assert list(other) == ["image"]
    with pytest.raises(LayoutError, match="samples must be tuples or lists"):
        Layout.of((image(), 1)).get({"image": image()})
    with pytest.raises(LayoutError, match="labels_getter must be a function of a sample or 'default', got 'first'"):
        layout_of((image(), 1), labels_getter="first")


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17]), min_size=1, max_size=5),
    st.sampled_from("uint8 float16 bfloat16 float32 float64 int64 bool".split()),
    st.booleans(),
)
def test_check_images_passes_exactly_what_can_be_mixed(shape, dtype, batch):
    images = torch.zeros(shape, dtype=getattr(torch, dtype))
    fits = len(shape) == 3 + batch and shape[-3] in (1, 3) and min(shape[-2:]) >= 16 and shape[0] > 0
    if fits and dtype not in ("int64", "bool"):
        return check_images(images, batch=batch)
    with pytest.raises(ImageError, match="scans must "):
        check_images(images, batch=batch, name="scans")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(8, 256, 256), r"images must be \(B, C, H, W\), got \(8, 256, 256\): for one image, images\[None"),
        (torch.zeros(0, 1, 32, 32), "at least one image"),
        (np.zeros((2, 32, 32, 3), dtype=np.float32), "channels come first"),
        (torch.zeros(2, 1, 8, 32), "at least 16 pixels"),
        (np.zeros((2, 1, 32, 32), dtype=np.int32), "uint8, uint16 or floating point, got int32"),
        ([torch.zeros(1, 32, 32), torch.zeros(2, 32, 32)], r"images\[1\] must be \(C, H, W\) with 1 or 3 channels"),
        ([[0]], "tensor or an array, got list"),
    ],
)
def test_images_that_do_not_fit_are_named(images, message):
    with pytest.raises(ImageError, match=message):
        check_images(images, batch=True)


def test_an_image_of_a_class_that_knows_more_stays_one():
    class Known(torch.Tensor):
        """As MONAI's MetaTensor: a clone keeps what it knows."""

        def clone(self):
            copied = super().clone()
            copied.meta = self.meta
            return copied

    image = torch.zeros(1, 32, 32).as_subclass(Known)
    image.meta = {"spacing": 0.14}
    layout = layout_of((image, 0))
    new, _ = layout.put((image, 0), torch.ones(1, 32, 32), 1)
    assert type(new) is Known and new.meta == image.meta and new.sum() == 1024 and image.sum() == 0
