from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torchvision import tv_tensors

from carim_aug.labels.sample import ImageError, Layout, LayoutError, check_images

Pair = namedtuple("Pair", ["image", "label"])
Triple = namedtuple("Triple", ["index", "x", "y"])


class Record(dict):
    """A dict of a user's own class."""


def image(kind: str = "torch", batch: bool = False, value: float = 0.0):
    shape = (2, 1, 16, 16) if batch else (1, 16, 16)
    return {
        "torch": lambda: torch.full(shape, value),
        "uint8": lambda: torch.full(shape, int(value), dtype=torch.uint8),
        "numpy": lambda: np.full(shape, value, dtype=np.float32),
        "tv": lambda: tv_tensors.Image(torch.full(shape, value)),
    }[kind]()


def label(kind: str, batch: bool):
    return {
        "int": lambda: torch.tensor([0, 1]) if batch else 1,
        "row": lambda: torch.zeros(*([2] if batch else []), 14),
        "numpy": lambda: np.zeros((2, 14) if batch else 14),
        "scalar": lambda: torch.zeros(2) if batch else np.int64(1),
    }[kind]()


@st.composite
def samples(draw):
    """A sample or batch, its image and its label."""
    batch = draw(st.booleans())
    x = image(draw(st.sampled_from(["torch", "uint8", "numpy", "tv"])), batch)
    y = label(draw(st.sampled_from(["int", "row", "numpy", "scalar"])), batch)
    extras = [draw(st.sampled_from(["path.png", 7, None, ("a", "b"), {"view": "PA"}])) for _ in range(3)]
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    form = draw(st.sampled_from(["tuple", "list", "pair", "triple", "dict", "ordered", "default", "record", "user"]))
    if form in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[form]([*extras[:before], x, y, *extras[2 : 2 + after]]), x, y
    if form == "pair":
        return Pair(x, y), x, y
    if form == "triple":
        return Triple(extras[0], x, y), x, y
    keys = draw(st.sampled_from([("image", "label"), ("img", "lab"), ("pixel_values", "labels"), ("x", "y")]))
    fields = draw(st.permutations([(keys[0], x), (keys[1], y), ("idx", extras[0]), ("meta", extras[1])]))
    make = {"dict": dict, "ordered": OrderedDict, "record": Record, "user": UserDict}
    return (defaultdict(list, fields) if form == "default" else make[form](fields)), x, y


def entries(sample):
    return list(sample.items()) if isinstance(sample, dict | UserDict) else list(enumerate(sample))


@settings(deadline=None, max_examples=250)
@given(samples())
def test_put_changes_image_and_label_and_nothing_else(case):
    sample, x, y = case
    layout = Layout.of(sample)
    found = layout.get(sample)
    assert found[0] is x and found[1] is y
    before = entries(sample)
    new_image, new_label = torch.ones(x.shape), object()
    made = layout.put(sample, new_image, new_label)
    assert type(made) is type(sample) and made is not sample
    assert [(k, id(v)) for k, v in entries(sample)] == [(k, id(v)) for k, v in before]
    assert [k for k, _ in entries(made)] == [k for k, _ in before]
    for (_, old), (_, new) in zip(before, entries(made), strict=True):
        if old is x:
            assert type(new) is type(x) and new.shape == x.shape and bool((new == 1).all())
        elif old is y:
            assert new is new_label
        else:
            assert new is old
    assert layout.get(made)[1] is new_label


@settings(deadline=None, max_examples=60)
@given(st.permutations(["image", "label", "path", "age"]), st.booleans())
def test_places_can_be_named(order, as_dict):
    things = {"image": image(), "label": 1, "path": "a.png", "age": 60}
    sample = {f"my_{name}": things[name] for name in order} if as_dict else tuple(things[name] for name in order)
    spec = ("my_image", "my_label") if as_dict else (order.index("image"), order.index("label") - 4)
    layout = Layout.of(sample, spec)
    assert layout.get(sample) == (things["image"], 1)
    assert layout.put(sample, things["image"], 0) == (
        {**sample, "my_label": 0} if as_dict else tuple(0 if n == "label" else things[n] for n in order)
    )


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17]), min_size=1, max_size=5),
    st.sampled_from(
        [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
    ),
    st.booleans(),
)
def test_check_images_passes_exactly_what_can_be_mixed(shape, dtype, batch):
    images = torch.zeros(shape, dtype=dtype)
    fits = len(shape) == 3 + batch and shape[-3] in (1, 3) and min(shape[-2:]) >= 16 and shape[0] > 0
    if fits and dtype not in (torch.int64, torch.bool):
        check_images(images, batch=batch)
        return
    with pytest.raises(ImageError, match="scans must "):
        check_images(images, batch=batch, name="scans")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(8, 256, 256), r"images must be \(B, C, H, W\), got \(8, 256, 256\)"),
        (torch.zeros(0, 1, 32, 32), "at least one image"),
        (np.zeros((2, 32, 32, 3), dtype=np.float32), "channels come first"),
        (torch.zeros(2, 4, 32, 32), "1 or 3 channels"),
        (torch.zeros(2, 1, 8, 32), "at least 16 pixels"),
        (np.zeros((2, 1, 32, 32), dtype=np.int32), "uint8 or floating point, got int32"),
        ([[0]], "tensor or an array, got list"),
    ],
)
def test_images_that_do_not_fit_are_named(images, message):
    with pytest.raises(ImageError, match=message):
        check_images(images, batch=True)


def test_tv_image_is_preferred_to_a_plain_tensor():
    sample = (torch.zeros(3, 16, 16), 5, image("tv"), 1)
    assert Layout.of(sample).get(sample) == (sample[2], 1)


def test_torchxrayvision_sample_stays_as_it_is():
    sample = {"idx": 3, "lab": np.zeros(18), "img": image("numpy")}
    made = Layout.of(sample).put(sample, torch.ones(1, 16, 16), sample["lab"])
    assert list(made) == ["idx", "lab", "img"]
    assert isinstance(made["img"], np.ndarray) and made["img"].dtype == np.float32


def test_a_key_that_holds_a_path_is_passed_over():
    sample = {"image": "a.png", "pixel_values": image(), "label": "nodule", "target": 1}
    assert Layout.of(sample).get(sample) == (sample["pixel_values"], 1)


def test_tv_image_put_into_a_plain_sample_becomes_plain():
    made = Layout.of((image(), 0)).put((image(), 0), image("tv"), 0)
    assert type(made[0]) is torch.Tensor
    made = Layout.of((image("tv"), 0)).put((image("tv"), 0), np.ones((1, 16, 16), dtype=np.float32), 0)
    assert type(made[0]) is tv_tensors.Image


def test_pil_images_are_told_the_way():
    pil = PILImage.new("L", (16, 16))
    for sample in ((pil, 1), [pil, 1], {"image": pil, "label": 1}):
        with pytest.raises(LayoutError, match=r"got Image.*ToImage\(\)"):
            Layout.of(sample)


def test_albumentations_boxes_are_told_the_way():
    with pytest.raises(LayoutError, match="bboxes.*integrations.albumentations"):
        Layout.of({"image": np.zeros((16, 16, 1)), "bboxes": [], "label": 1})
    boxes = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(16, 16))
    with pytest.raises(LayoutError, match="detection target with boxes, got BoundingBoxes"):
        Layout.of((image(), boxes))


@pytest.mark.parametrize(
    ("sample", "spec", "message"),
    [
        (image(), "auto", "tuple, list or dict .* got Tensor"),
        ((image(),), "auto", "an image and a label"),
        ((1, image()), "auto", "label must come after the image.* pass layout="),
        ((image(), "a.png"), "auto", r"label must be .* got str at 1 .* pass layout="),
        ((image(), torch.zeros(1, 16, 16)), "auto", "label must be"),
        ((image(), tv_tensors.Mask(torch.zeros(16, 16))), "auto", "label must be"),
        ((torch.zeros(16, 16), 1), "auto", r"add a channel axis"),
        (("a", "b"), "auto", "image must be"),
        ({"scan": image(), "label": 1}, "auto", r"an image under one of .*'scan'.* pass layout="),
        ({"image": image(), "disease": 1}, "auto", "a label under one of"),
        ({"image": image(), "label": 1}, ("img", "label"), "an image at 'img'"),
        ((image(), 1), (0, 5), "a label at 5"),
        ((image(), 1), ("image", "label"), "an image at 'image'"),
        ((image(), 1), (0, 0), "two places"),
        ((image(), 1), (1, 0), "image must be"),
        ((image(), 1), "tuple", "layout must be 'auto' or a pair"),
        ((image(), 1), (0, 1, 2), "layout must be 'auto' or a pair"),
        (MappingProxyType({"image": image(), "label": 1}), "auto", "return dict"),
    ],
)
def test_what_is_not_found_is_named(sample, spec, message):
    with pytest.raises(LayoutError, match=message):
        Layout.of(sample, spec)


def test_a_sample_of_another_structure_is_an_error():
    layout = Layout.of({"image": image(), "label": 1})
    with pytest.raises(LayoutError, match="samples must be dicts"):
        layout.get((image(), 1))
    other = defaultdict(list, image=image())
    with pytest.raises(LayoutError, match="a label at 'label'"):
        layout.put(other, image(), 1)
    assert list(other) == ["image"]
    with pytest.raises(LayoutError, match="samples must be tuples or lists"):
        Layout.of((image(), 1)).get({"image": image()})


def test_layout_of_a_batch_fits_what_the_default_collate_makes():
    dataset = [{"idx": i, "lab": np.zeros(18, dtype=np.float32), "img": image("numpy")} for i in range(4)]
    layout = Layout.of(dataset[0])
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, generator=torch.Generator())))
    assert layout == Layout.of(batch)
    images, labels = layout.get(batch)
    check_images(images, batch=True)
    assert labels.shape == (4, 18)


def test_one_image_where_a_batch_belongs_is_told_the_way():
    with pytest.raises(
        ImageError, match=r"images must be \(B, C, H, W\), got \(1, 32, 32\): for one image, images\[None\]"
    ):
        check_images(torch.zeros(1, 32, 32), batch=True)


def test_a_label_of_words_is_told_the_way():
    with pytest.raises(LayoutError, match="got str at 1 of .*: make it one of these, or pass layout="):
        Layout.of((torch.zeros(1, 32, 32), "nodule"))
