"""Bad input raises our named errors and nothing else; good input never raises (issue, "Bad input")."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import Films, generator, make_mix, prior
from torch.utils.data import Dataset, IterableDataset
from torchvision import tv_tensors

from carim_aug import (
    ImageError,
    LabelError,
    LabelPolicy,
    LayoutError,
    NoduleGenerator,
    RangeError,
    SyntheticNoduleMix,
    ValueRange,
)
from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.errors import DataError
from carim_aug.data.folders import BoxCSV, FolderPerClass

OURS = (ImageError, LabelError, LayoutError, RangeError)


def good(n=4, channels=1, size=(32, 32)):
    return torch.full((n, channels, *size), 0.5), torch.zeros(n, dtype=torch.long)


# --- Batches ---
def spoiled(draw):
    """A bad batch: (images, labels, options, the error's class, what its message must name)."""
    n = draw(st.integers(1, 4))
    images, labels = good(n)
    side = st.integers(16, 40)
    kind = draw(st.sampled_from(sorted(SPOILERS)))
    return (kind, *SPOILERS[kind](draw, n, images, labels, side))


def _rank(draw, n, images, labels, side):
    shape = draw(st.sampled_from([(32,), (32, 32), (1, 32, 32), (n, 1, 1, 32, 32)]))
    return torch.full(shape, 0.5), labels, {}, (ImageError, LayoutError), r"image.*must be"


def _channels(draw, n, images, labels, side):
    channels = draw(st.sampled_from([0, 2, 4, 5, 17]))
    return torch.full((n, channels, 32, 32), 0.5), labels, {}, ImageError, "images must be .*1 or 3 channels"


def _small(draw, n, images, labels, side):
    shape = draw(st.tuples(st.integers(0, 15), st.integers(0, 40)))
    return torch.full((n, 1, *shape), 0.5), labels, {}, ImageError, "at least 16 pixels"


def _dtype(draw, n, images, labels, side):
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.complex64]))
    return images.to(dtype), labels, {}, (ImageError, RangeError), "images must be uint8"


def _bool(draw, n, images, labels, side):
    return images.bool(), labels, {}, (ImageError, LayoutError), "image must be|images must be"


def _empty(draw, n, images, labels, side):
    return torch.zeros(0, 1, draw(side), draw(side)), labels[:0], {}, ImageError, "at least one image"


def _nan(draw, n, images, labels, side):
    value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    images[draw(st.integers(0, n - 1)), 0, draw(st.integers(0, 31)), draw(st.integers(0, 31))] = value
    return images, labels, {}, RangeError, "images must be finite"


def _out(draw, n, images, labels, side):
    name = draw(st.sampled_from(["unit", "symmetric", "xrv", "auto"]))
    ranged = ValueRange.of(name).resolve(torch.float32)
    span = ranged.high[0] - ranged.low[0]
    far = draw(st.floats(0.2, 1000)) * span
    images[draw(st.integers(0, n - 1))] = draw(st.sampled_from([ranged.high[0] + far, ranged.low[0] - far]))
    return images, labels, {"value_range": name}, RangeError, r"images must lie in \["


def _label(draw, n, images, labels, side):
    labels[draw(st.integers(0, n - 1))] = draw(st.one_of(st.integers(2, 2**40), st.integers(-(2**40), -1)))
    return images, labels, {}, LabelError, "labels must be from 0 to 1"


def _rows(draw, n, images, labels, side):
    rows = torch.zeros(n, 14)
    rows[draw(st.integers(0, n - 1)), draw(st.integers(0, 13))] = draw(st.sampled_from([-1.0, 1.5, 3.0, torch.inf]))
    return images, rows, {}, LabelError, "labels must be from 0 to 1, or NaN"


def _columns(draw, n, images, labels, side):
    columns = draw(st.sampled_from([2, 3, 5, 13, 15, 17, 40]))
    return images, torch.zeros(n, columns), {}, LabelError, "labels must"


def _label_rank(draw, n, images, labels, side):
    shape = draw(st.sampled_from([(n, 2, 2), (n, 1, 14, 1)]))
    return images, torch.zeros(shape), {}, (LabelError, LayoutError), "label"


def _label_count(draw, n, images, labels, side):
    other = draw(st.integers(1, 9).filter(lambda k: k != n))
    return images, torch.zeros(other, dtype=torch.long), {}, ValueError, f"as many as images .{n}., got {other}"


def _label_type(draw, n, images, labels, side):
    bad = draw(st.sampled_from([[0] * n, "0" * n, None, {"boxes": torch.zeros(0, 4)}, [{"boxes": torch.zeros(0, 4)}]]))
    return images, bad, {}, (LayoutError, LabelError), "label|detection"


def _image_type(draw, n, images, labels, side):
    bad = draw(st.sampled_from([Image.new("L", (32, 32)), [[0.0]], None, "x.png", 3.0]))
    return bad, labels, {}, LayoutError, "image"


def _range_channels(draw, n, images, labels, side):
    return images, labels, {"value_range": "imagenet"}, RangeError, "pass one mean and one std"


SPOILERS = {
    f.__name__[1:]: f
    for f in (
        *(_rank, _channels, _small, _dtype, _bool, _empty, _nan, _out, _label, _rows, _columns, _label_rank),
        *(_label_count, _label_type, _image_type, _range_channels),
    )
}


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_bad_batch_raises_our_named_error_and_nothing_else(data):
    _, images, labels, options, error, words = spoiled(data.draw)
    before = copy.deepcopy((images, labels))
    mix = make_mix(p=data.draw(st.sampled_from([0.0, 1.0])), **options)
    with pytest.raises(error, match=words) as caught:
        mix(images, labels)
    for mine, copied in zip((images, labels), before, strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine.nan_to_num(7), copied.nan_to_num(7))
    assert mix.state_dict()["step"] == 0 and mix.last_params is None
    assert type(caught.value) in OURS or type(caught.value) is ValueError


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_bad_sample_raises_our_named_error_from_a_loader_and_from_wrap(data):
    kind, images, labels, options, _, _ = spoiled(data.draw)
    assume(kind not in ("empty", "label_count", "columns", "rank"))  # of batches only, or rows that only a batch shows
    if kind == "label_type" and not isinstance(labels, str | None):
        labels = [labels]
    bad = (
        images[0] if isinstance(images, torch.Tensor) else images,
        labels[0] if isinstance(labels, torch.Tensor | list) else labels,
    )
    if kind in ("label", "rows", "nan", "out"):
        # One of the n is bad: all of them are read.
        samples = list(zip(images, labels, strict=True))
    else:
        samples = [bad, bad]
    assume(kind != "label_type" or not isinstance(bad[1], int))
    p = data.draw(st.sampled_from([0.0, 1.0]))
    with pytest.raises(OURS):
        list(make_mix(p=p, **options).loader(samples, batch_size=2))
    with pytest.raises(OURS):
        wrapped = make_mix(p=p, **options).wrap(samples)
        _ = [wrapped[i] for i in range(len(samples))]


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 3),
    size=st.tuples(st.integers(16, 40), st.integers(16, 40)),
    classes=st.sampled_from([None, ("No Finding", "Nodule"), ("nodule", "normal"), ("a", "Nodule", "healthy")]),
    kind=st.sampled_from(["integer", "onehot"]),
    data=st.data(),
)
def test_a_good_batch_never_raises(n, size, classes, kind, data):
    count = len(classes or (0, 0))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=n, max_size=n)))
    labels = torch.eye(count)[labels] if kind == "onehot" else labels
    mix = make_mix(p=data.draw(st.floats(0, 1)), labels=LabelPolicy(kind, classes=classes))
    images, marked = mix(torch.full((n, 1, *size), 0.3), labels)
    assert images.shape == (n, 1, *size) and marked.shape == labels.shape


# --- Arguments ---
@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
        ({"p": -1}, ValueError, r"p must be in \[0, 1\], got -1"),
        ({"p": "1"}, TypeError, "p must be a number"),
        ({"p": {"Nodul": 0.5}}, ValueError, "p has an unknown class 'Nodul'"),
        ({"p": 0.5, "n_synthetic": {"Nodule": 1}}, ValueError, "give one of p, n_synthetic and sampling_strategy"),
        ({"n_synthetic": {"Effusion": 1}}, ValueError, "n_synthetic has an unknown class 'Effusion'"),
        ({"n_synthetic": {"Nodule": -1}}, ValueError, "must be at least 0, got -1"),
        ({"n_synthetic": {"Nodule": 1.5}}, TypeError, "must be an integer, got 1.5"),
        ({"n_synthetic": 200}, TypeError, "n_synthetic must be a dict"),
        ({"sampling_strategy": {"Effusion": 1}}, ValueError, "sampling_strategy has an unknown class 'Effusion'"),
        ({"sampling_strategy": "most"}, ValueError, "sampling_strategy must be one of .*got 'most'"),
        ({"sampling_strategy": 1.01}, ValueError, r"sampling_strategy as a number must be in \(0, 1\], got 1.01"),
        ({"sampling_strategy": ["Nodule"]}, TypeError, "sampling_strategy must be a word"),
        ({"insertion": "paste"}, ValueError, "insertion must be one of .*got 'paste'"),
        ({"p": {"normal": 0.5}, "insertion": "graft"}, ValueError, "insertion='graft', which adds nodules only"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must be an integer"),
        ({"seed": 1.0}, ValueError, "seed must be an integer"),
        ({"seed": None}, ValueError, "seed must be an integer"),
        ({"labels": "classes"}, LabelError, "kind must be one of"),
        ({"labels": 3}, LabelError, "kind must be one of"),
        ({"value_range": "0-1"}, RangeError, "value_range must be one of"),
        ({"value_range": (1, 0)}, RangeError, "low < high"),
        ({"value_range": {"mean": 0.5}}, RangeError, "'mean' and 'std'"),
        ({"value_range": {"mean": 0.5, "std": 0}}, RangeError, "above 0"),
        ({"eligible": "Nodule"}, TypeError, "eligible must be callable, got str"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 or torch.bfloat16"),
        ({"device": "gpu"}, ValueError, "device must be"),
        ({"render_batch_size": 0}, ValueError, "render_batch_size must be"),
    ],
)
def test_a_bad_argument_is_named_when_the_mix_is_made(options, kind, match):
    with pytest.raises(kind, match=match):
        make_mix(**options)


def test_a_layout_that_is_none_is_named_with_the_first_batch():
    for layout in (3, "image", ("image",)):
        with pytest.raises(LayoutError, match="layout must be 'auto' or a pair"):
            make_mix(layout=layout)(*good())


def test_no_generator_or_prior_is_named():
    with pytest.raises(TypeError, match="generator must be a NoduleGenerator or have image_size.*got Linear"):
        SyntheticNoduleMix(torch.nn.Linear(1, 1), prior())
    with pytest.raises(TypeError, match="prior must be a LocationPrior, got str"):
        SyntheticNoduleMix(generator(), "prior")
    assert isinstance(generator(), NoduleGenerator)


def test_a_batch_cannot_be_added_to():
    for how in ({"n_synthetic": {"Nodule": 1}}, {"sampling_strategy": "auto"}):
        with pytest.raises(ValueError, match="use mix.loader"):
            make_mix(**how)(*good())


def test_no_input_and_params_that_are_none_or_of_another_batch_are_named():
    mix = make_mix()
    with pytest.raises(TypeError, match="inputs must be images and labels"):
        mix()
    with pytest.raises(TypeError, match="params must be MixParams such as last_params, got dict"):
        mix(*good(), params={})
    mix(*good(3))
    with pytest.raises(ValueError, match="params must be of 4 slots, got 3"):
        mix(*good(4), params=mix.last_params)


@pytest.mark.parametrize("key", [(0, 0), (0, -1, 0), (0, 0, "a"), (0.5, 0, 0), ()])
def test_a_key_that_is_none_is_named(key):
    with pytest.raises((ValueError, TypeError), match="seed, epoch and index|key must be"):
        make_mix().regenerate(key)


def test_a_class_that_cannot_be_made_is_named():
    for name in ("Effusion", "other", 3):
        with pytest.raises(ValueError, match="class"):
            make_mix().regenerate((0, 0, 0), name)


# --- Data sets ---
class Stream(IterableDataset):
    def __iter__(self):
        yield from [good(1)] * 3


class Unsized(Dataset):
    def __getitem__(self, i):
        return good(1)


@pytest.mark.parametrize(
    ("dataset", "kind", "match"),
    [
        (Stream(), TypeError, r"dataset must be map-style .*got Stream: .*mix\(images, labels\)"),
        (Unsized(), TypeError, "dataset must be map-style .*got Unsized"),
        (None, TypeError, "dataset must be map-style .*got NoneType"),
        (3, TypeError, "dataset must be map-style .*got int"),
        ([], ValueError, "dataset must hold at least one sample, got 0"),
        (Films(0), ValueError, "dataset must hold at least one sample, got 0"),
        ([torch.zeros(1, 32, 32)], LayoutError, "samples must be a tuple, list or dict"),
        ([(Image.new("L", (32, 32)), 0)], LayoutError, "v2.ToImage"),
        ([{"image": torch.zeros(1, 32, 32)}], LayoutError, "samples must have a label"),
        ([(torch.zeros(1, 32, 32), "nodule")], LayoutError, "the label must be a number"),
        ([(torch.zeros(32, 32), 0)], LayoutError, "channel axis"),
        ([(torch.zeros(32, 32, 1), 0)], ImageError, "channels come first"),
        (Films(4, classes=["cat", "dog"]), LabelError, "nodule must be one of the classes"),
        (
            [
                (
                    torch.zeros(1, 32, 32),
                    {"boxes": tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(8, 8))},
                )
            ],
            LabelError,
            "targets must have boxes and labels",
        ),
    ],
)
def test_a_bad_data_set_is_named(dataset, kind, match):
    for call in (make_mix().wrap, make_mix().loader, make_mix().class_counts):
        with pytest.raises(kind, match=match):
            call(dataset)


def test_grafts_cannot_add_normal_images():
    for how in ({"n_synthetic": {"normal": 3}}, {"sampling_strategy": {"No Finding": 99}}):
        with pytest.raises(ValueError, match="cannot add 'No Finding'"):
            make_mix(insertion="graft", **how).wrap(Films(8))


def test_a_missing_or_unreadable_image_is_named_from_a_loader(tmp_path):
    for name in ("nodule", "normal"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((32, 32), 9, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    data = FolderPerClass(tmp_path)
    (tmp_path / "normal" / "1.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"normal.1\.png"):
            list(make_mix().loader(data, batch_size=2, num_workers=workers))
    (tmp_path / "normal" / "1.png").unlink()
    with pytest.raises(DataError, match=r"normal.1\.png"):
        list(make_mix().loader(data, batch_size=2))


def test_a_table_without_a_column_or_with_a_bad_box_is_named(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels,Patient ID\na.png,Nodule,1\n")
    with pytest.raises(DataError, match="Data_Entry_2017.csv.*View Position"):
        ChestXray14(tmp_path)
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2\na.png,1,2,3\n")
    with pytest.raises(DataError, match="boxes.csv.*y2"):
        BoxCSV(tmp_path, "boxes.csv")
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\na.png,9,2,3,4\n")
    with pytest.raises(DataError, match="boxes.csv.*x1 < x2"):
        BoxCSV(tmp_path, "boxes.csv")
