"""Bad input raises our named errors and nothing else; good input never raises."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from tiny import Images, generator, make_mix, prior
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchvision import tv_tensors

from carim_aug import ImageError, LabelError, LabelPolicy, LayoutError, LocationPrior, RangeError, SyntheticNoduleMix
from carim_aug.data import DataError, FolderPerClass
from carim_aug.ops.boxes import check_boxes
from carim_aug.ops.findings import NORMAL_WORDS
from carim_aug.ops.value_range import ValueRange

OURS = (ImageError, LabelError, LayoutError, RangeError)
KNOWN = {"nodule", "other", "unknown", *NORMAL_WORDS}
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name.replace("_", " ").strip().lower() not in KNOWN)
NOTHING = st.none() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=2) | st.binary(max_size=2)


def good(n=4, channels=1, size=(32, 32)):
    return torch.full((n, channels, *size), 0.5), torch.zeros(n, dtype=torch.long)


# --- Batches and samples ---
IMAGES, LABELS = good(3)
GOOD_IMAGES, GOOD_LABELS = st.just(IMAGES), st.just(LABELS)
BOXLESS = {"boxes": torch.zeros(0, 4)}


def one_of(*values):
    return st.sampled_from(values)


def spoil(good_ones, values):
    """Batches that are good but for one value."""

    def change(place, value):
        spoiled = good_ones.clone()
        spoiled.view(-1)[place] = value
        return spoiled

    return st.builds(change, st.integers(0, good_ones.numel() - 1), values)


def outside(spec):
    ends = ValueRange.of(spec).resolve(torch.float32)
    low, high = ends.low[0], ends.high[0]
    far = st.floats(0.16, 1000).map(lambda part: part * (high - low))
    middle = torch.full((3, 1, 32, 32), (low + high) / 2)
    return spoil(middle, far.map(lambda over: high + over) | far.map(lambda over: low - over))


def bad(error, words, images=GOOD_IMAGES, labels=GOOD_LABELS, **options):
    return images, labels, options, error, words


SIZES = st.tuples(st.just(3), st.just(1), st.integers(0, 15), st.integers(0, 40))
SHAPES = one_of((32,), (32, 32), (1, 32, 32), (3, 1, 1, 32, 32))
DTYPES = one_of(torch.int64, torch.int32, torch.int16, torch.int8, torch.complex64)
ENTRIES = st.integers(2, 2**40) | st.integers(-(2**40), -1)
CASES = {
    "rank": bad((ImageError, LayoutError), "image.*must be", SHAPES.map(torch.ones)),
    "channels": bad(ImageError, "1 or 3 channels", one_of(0, 2, 4, 5, 17).map(lambda c: torch.ones(3, c, 32, 32))),
    "small": bad(ImageError, "at least 16 pixels", SIZES.map(torch.ones)),
    "dtype": bad((ImageError, RangeError), "images must be uint8", DTYPES.map(IMAGES.to)),
    "bool": bad((ImageError, LayoutError), "images? must be", st.just(IMAGES.bool())),
    "empty": bad(ImageError, "at least one image", st.just(IMAGES[:0]), st.just(LABELS[:0])),
    "type": bad(LayoutError, "image", one_of(Image.new("L", (32, 32)), [[0.0]], None, "x.png", 3.0)),
    "nan": bad(RangeError, "images must be finite", spoil(IMAGES, one_of(math.nan, math.inf, -math.inf))),
    "imagenet": bad(RangeError, "pass one mean and one std", value_range="imagenet"),
    "entry": bad(LabelError, "labels must be from 0 to 1", labels=spoil(LABELS, ENTRIES)),
    "row": bad(LabelError, "0 to 1, or NaN", labels=spoil(torch.zeros(3, 1), one_of(-1.0, 1.5, 3.0, math.inf))),
    "columns": bad(
        LabelError, "labels must", labels=one_of(2, 3, 5, 13, 14, 15, 17, 18, 40).map(lambda n: torch.zeros(3, n))
    ),
    "axes": bad((LabelError, LayoutError), "label", labels=one_of((3, 2, 2), (3, 1, 14, 1)).map(torch.zeros)),
    "count": bad(
        ValueError, "as many as images .3., got", labels=one_of(1, 2, 4, 9).map(lambda n: torch.zeros(n).long())
    ),
    "kind": bad((LayoutError, LabelError), "label|detection", labels=one_of([0] * 3, "000", None, BOXLESS, [BOXLESS])),
}
for _range in ("unit", "symmetric", "xrv", "auto", (-7, 3.5)):
    CASES[str(_range)] = bad(RangeError, r"must lie in \[.*got values", outside(_range), value_range=_range)


@pytest.mark.parametrize("kind", CASES)
@given(data=st.data(), p=one_of(0.0, 1.0))
def test_a_bad_batch_raises_our_named_error_and_nothing_else(kind, data, p):
    *inputs, options, error, words = CASES[kind]
    inputs, mix = [data.draw(values) for values in inputs], make_mix(p=p, **options)
    before = copy.deepcopy(inputs)
    with pytest.raises(error, match=words) as caught:
        mix(*inputs)
    for mine, copied in zip(inputs, before, strict=True):
        assert not isinstance(mine, torch.Tensor) or torch.equal(mine.nan_to_num(7), copied.nan_to_num(7))
    assert mix.state_dict()["step"] == 0 and mix.last_params is None
    assert type(caught.value) in OURS or type(caught.value) is ValueError


# What only a batch shows is left out.
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("empty", "count", "columns", "rank")])
@given(data=st.data(), p=one_of(0.0, 1.0))
def test_a_bad_sample_raises_our_named_error_from_a_loader_and_from_wrap(kind, data, p):
    images, labels, options, *_ = CASES[kind]
    images, labels = data.draw(images), data.draw(labels)
    samples = [(images, 0)] * 2 if kind == "type" else [(image, labels) for image in images]
    if kind not in ("type", "kind"):
        samples = list(zip(images, labels, strict=True))
    for read in (lambda mix: list(mix.loader(samples, batch_size=2)), lambda mix: list(mix.wrap(samples))):
        with pytest.raises(OURS):
            read(make_mix(p=p, **options))


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
def by_class(argument, value):
    return lambda name: {argument: {name: value}}


RANDOM = {
    "chance": (st.floats().filter(lambda p: not 0 <= p <= 1), lambda p: {"p": p}, r"p must be in \[0, 1\], got "),
    "no chance": (NOTHING.filter(lambda p: p is not None), lambda p: {"p": p}, "p must be a number .* got "),
    "sum": (
        st.tuples(st.floats(0.5, 1), st.floats(0.51, 1)),
        lambda ab: {"p": {"Nodule": ab[0], "No Finding": ab[1]}},
        "p must not exceed 1 over all classes together, got",
    ),
    "class of p": (NAMES | st.integers() | st.none(), by_class("p", 0.5), "p has an unknown class"),
    "class of counts": (NAMES | st.integers(), by_class("n_synthetic", 3), "n_synthetic has an unknown class"),
    "class of totals": (NAMES, by_class("sampling_strategy", 3), "sampling_strategy has an unknown class"),
    "count": (
        st.integers(-(2**40), -1) | st.floats() | NOTHING,
        lambda n: {"n_synthetic": {"Nodule": n}},
        r"n_synthetic\['Nodule'\] must be (an integer|at least 0), got ",
    ),
    "ratio": (
        st.floats().filter(lambda r: not 0 < r <= 1),
        lambda r: {"sampling_strategy": r},
        r"sampling_strategy as a number must be in \(0, 1\], got ",
    ),
    "seed": (
        st.integers(max_value=-1) | st.integers(min_value=2**64) | st.floats() | NOTHING,
        lambda seed: {"seed": seed},
        r"seed must be an integer in \[0, 2\*\*64 - 1\], got ",
    ),
    "batch": (
        st.integers(max_value=0) | st.floats() | NOTHING,
        lambda size: {"render_batch_size": size},
        "render_batch_size must be an integer of at least 1, got ",
    ),
}


@pytest.mark.parametrize("kind", RANDOM)
@given(data=st.data())
def test_any_bad_value_is_named_with_its_argument(kind, data):
    values, options, words = RANDOM[kind]
    with pytest.raises((ValueError, TypeError), match=words):
        make_mix(**options(data.draw(values)))


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"p": 0.5, "n_synthetic": {"Nodule": 1}}, ValueError, "give one of p, n_synthetic and sampling_strategy"),
        ({"p": {"normal": 0.5}}, ValueError, "insertion='graft', which adds nodules only"),
        ({"p": lambda epoch: 2.0}, ValueError, r"p must be in \[0, 1\], got 2"),
        ({"p": lambda epoch: "often"}, TypeError, "p must be a number .*got 'often'"),
        ({"p": {"Nodule": 0.1, "NODULE": 0.2}}, ValueError, "p must name each class once, got 'Nodule' twice"),
        ({"n_synthetic": 200}, TypeError, "n_synthetic must be a dict.* got int"),
        ({"sampling_strategy": "most"}, ValueError, "sampling_strategy must be one of .*got 'most'"),
        ({"sampling_strategy": ["Nodule"]}, TypeError, "sampling_strategy must be a word.* got list"),
        ({"sampling_strategy": True}, TypeError, "sampling_strategy must be a word.* got bool"),
        ({"sampling_strategy": {"other": 3}}, ValueError, "must name classes that the generator makes .*got 'other'"),
        ({"sampling_strategy": {"Nodule": 2, "nodule": 3}}, ValueError, "must name each class once, got 'Nodule'"),
        ({"insertion": "paste"}, ValueError, "insertion must be one of .*got 'paste'"),
        ({"strength": 0}, ValueError, "strength must be .*got 0"),
        ({"strength": (0.5, 0.2)}, ValueError, r"strength must be .*got \(0.5, 0.2\)"),
        ({"strength": True}, ValueError, "strength must be .*got True"),
        ({"labels": "classes"}, LabelError, "kind must be one of .*got 'classes'"),
        ({"labels": 3}, LabelError, "kind must be one of .*got 3"),
        ({"value_range": "0-1"}, RangeError, "value_range must be one of .*got '0-1'"),
        ({"value_range": (1, 0)}, RangeError, r"low < high, got \(1"),
        ({"value_range": {"mean": 0.5}}, RangeError, "'mean' and 'std'.*got"),
        ({"value_range": {"mean": 0.5, "std": 0}}, RangeError, "above 0, got"),
        ({"eligible": "Nodule"}, TypeError, "eligible must be callable, got str"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32.* got torch.float16"),
    ],
)
def test_a_bad_argument_is_named_when_the_mix_is_made(options, kind, match):
    with pytest.raises(kind, match=match):
        make_mix(**options)


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), "fast128", None, np.zeros(3), type(generator()), LocationPrior])
def test_what_is_no_generator_or_prior_is_named(thing):
    with pytest.raises(TypeError, match=r"generator must have image_size, weights_hash and a method .*, got \w"):
        SyntheticNoduleMix(thing, prior())
    with pytest.raises(TypeError, match=r"prior must be a LocationPrior, got \w"):
        SyntheticNoduleMix(generator(), thing)


def test_a_layout_or_labels_getter_that_is_none_is_named_with_the_first_batch():
    for layout in (3, "image", ("image",)):
        with pytest.raises(LayoutError, match="layout must be 'auto' or a pair .*got"):
            make_mix(layout=layout)(*good())
    for getter, match in ((3, "labels_getter must be a function .*got 3"), (lambda sample: sample[7], "labels_getter")):
        for call in (lambda mix: mix(*good()), lambda mix: mix.wrap([good(1)] * 2), lambda mix: mix.loader([good(1)])):
            with pytest.raises(LayoutError, match=match):
                call(make_mix(labels_getter=getter))


def test_calls_with_nothing_or_with_params_of_another_batch_are_named():
    for how in ({"n_synthetic": {"Nodule": 1}}, {"sampling_strategy": "auto"}):
        with pytest.raises(ValueError, match="use mix.loader"):
            make_mix(**how)(*good())
    mix = make_mix()
    with pytest.raises(TypeError, match="inputs must be images and labels"):
        mix()
    with pytest.raises(AttributeError, match="strength is fixed when a mix is made"):
        mix.strength = 2.0
    with pytest.raises(TypeError, match="params must be MixParams such as last_params, got dict"):
        mix(*good(), params={})
    mix(*good(3))
    for call in (lambda: mix(*good(4), params=mix.last_params), lambda: mix.transform(*good(4), mix.last_params)):
        with pytest.raises(ValueError, match="params must be of 4 images, got 3"):
            call()


@pytest.mark.parametrize("key", [(0, 0), (0, -1, 0), (0, 0, "a"), (0.5, 0, 0), ()])
def test_a_key_or_class_that_cannot_be_regenerated_is_named(key):
    with pytest.raises((ValueError, TypeError), match="seed, epoch and index|key must be"):
        make_mix().regenerate(key)
    for name in ("Effusion", "other", 3):
        with pytest.raises(ValueError, match="class"):
            make_mix().regenerate((0, 0, 0), name)


def test_an_epoch_that_is_none_is_named_at_each_door():
    mix = make_mix()
    for door in (mix, mix.wrap(Images(4)), mix.loader(Images(4))):
        with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 2\*\*63 - 1\], got -1"):
            door.set_epoch(-1)


@given(st.lists(st.sampled_from(["a", "b", "No Finding", "healthy"]), max_size=4, unique=True))
def test_classes_without_a_nodule_are_named(classes):
    with pytest.raises(ValueError, match="nodule must be one of the classes"):
        LabelPolicy(classes=classes)


@given(st.integers(16, 512), st.integers(2, 8), st.floats(0.2, 0.8), st.floats(0.2, 0.8))
def test_boxes_of_a_larger_image_are_named_by_the_prior(size, times, x, y):
    large = size * times
    corner = max(size + 1.0, x * large)
    boxes = torch.tensor([[corner, y * large, corner + large / 10, y * large + large / 10]])
    assume(boxes.max() <= large)
    check_boxes(boxes, large)
    for door in (lambda: LocationPrior.fit([boxes], size), lambda: prior().log_prob(boxes, size)):
        with pytest.raises(ValueError, match=rf"boxes must be inside the image of height {size} and width {size}, got"):
            door()


# --- Data sets ---
class Stream(IterableDataset):
    def __iter__(self):
        yield from [good(1)] * 3


class Unsized(Dataset):
    def __getitem__(self, i):
        return good(1)


BOXES = tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(8, 8))


@pytest.mark.parametrize(
    ("dataset", "kind", "match"),
    [
        (Stream(), TypeError, r"dataset must be map-style .*got Stream: .*mix\(images, labels\)"),
        (Unsized(), TypeError, "dataset must be map-style .*got Unsized"),
        (None, TypeError, "dataset must be map-style .*got NoneType"),
        ([], ValueError, "dataset must hold at least one sample, got 0"),
        (Images(0), ValueError, "dataset must hold at least one sample, got 0"),
        ([torch.zeros(1, 32, 32)], LayoutError, "samples must be a tuple, list or dict"),
        ([(Image.new("L", (32, 32)), 0)], LayoutError, "v2.ToImage"),
        ([{"image": torch.zeros(1, 32, 32)}], LayoutError, "samples must have a label"),
        ([(torch.zeros(1, 32, 32), "nodule")], LayoutError, "the label must be a number"),
        ([(torch.zeros(32, 32), 0)], LayoutError, "channel axis"),
        ([(torch.zeros(32, 32, 1), 0)], ImageError, "channels come first"),
        (Images(4, classes=["cat", "dog"]), LabelError, "nodule must be one of the classes"),
        ([(torch.zeros(1, 32, 32), {"boxes": BOXES})], LabelError, "targets must have boxes and labels"),
    ],
)
def test_a_bad_data_set_is_named(dataset, kind, match):
    for call in (make_mix().wrap, make_mix().loader, make_mix().class_counts):
        with pytest.raises(kind, match=match):
            call(dataset)


def test_grafts_cannot_add_normal_images():
    for how in ({"n_synthetic": {"normal": 3}}, {"sampling_strategy": {"No Finding": 99}}):
        with pytest.raises(ValueError, match="cannot add 'No Finding'"):
            make_mix(**how).wrap(Images(8))


def test_a_missing_or_unreadable_image_is_named_from_a_loader(tmp_path):
    for name in ("nodule", "normal"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((32, 32), 9, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    data = FolderPerClass(tmp_path)
    (tmp_path / "normal" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"normal.1\.png"):
        list(make_mix().loader(data, batch_size=2))
    (tmp_path / "normal" / "1.png").unlink()
    with pytest.raises(DataError, match=r"normal.1\.png"):
        list(make_mix().loader(data, batch_size=2))
