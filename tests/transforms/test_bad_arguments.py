"""Generated bad arguments, networks' inputs and boxes: each raises an error that names argument, rule and value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import Films, generator, make_mix, prior
from torch import nn

from carim_aug import LabelPolicy, LocationPrior, SyntheticNoduleMix
from carim_aug.generators.fused import compile_generator
from carim_aug.labels.names import NORMAL_WORDS
from carim_aug.ops.boxes import boxes_to_masks, check_boxes, check_masks

EVERYDAY = settings(deadline=None)
KNOWN = {"nodule", "other", "unknown", *NORMAL_WORDS}
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name.replace("_", " ").strip().lower() not in KNOWN)
WEIRD = st.one_of(
    st.none(), st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=2), st.binary(max_size=2)
)


# --- Chances, counts, seeds ---
@settings(EVERYDAY, max_examples=150)
@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda p: not 0 <= p <= 1), st.booleans())
def test_a_chance_outside_0_and_1_is_named(p, in_dict):
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got "):
        make_mix(p={"Nodule": p} if in_dict else p)


@settings(EVERYDAY, max_examples=60)
@given(WEIRD.filter(lambda p: p is not None))
def test_a_chance_that_is_no_number_is_named(p):
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 1\] or a dict of them, got "):
        make_mix(p=p)


@settings(EVERYDAY, max_examples=60)
@given(st.floats(0, 1), st.floats(0, 1))
def test_chances_of_more_than_1_together_are_named(a, b):
    assume(a + b > 1 + 1e-6)
    with pytest.raises(ValueError, match="p must not exceed 1 over all classes together, got"):
        make_mix(p={"Nodule": a, "No Finding": b})


@settings(EVERYDAY, max_examples=200)
@given(
    NAMES | st.integers() | st.none(), st.sampled_from(["p", "n_synthetic", "sampling_strategy"]), st.integers(0, 999)
)
def test_an_unknown_class_is_named_with_its_argument(name, argument, n):
    value = {name: 0.5 if argument == "p" else n}
    with pytest.raises(ValueError, match=f"{argument} has an unknown class"):
        make_mix(**{argument: value})


@settings(EVERYDAY, max_examples=100)
@given(NAMES)
def test_an_unknown_class_from_a_callable_is_named_when_there_are_counts(name):
    with pytest.raises(ValueError, match="sampling_strategy has an unknown class"):
        make_mix(sampling_strategy=lambda counts: {name: 99}).class_counts(Films(8))


@settings(EVERYDAY, max_examples=100)
@given(st.sampled_from(["n_synthetic", "sampling_strategy"]), st.integers(-(2**40), -1) | st.floats() | WEIRD)
def test_a_count_that_is_none_is_named(argument, n):
    with pytest.raises((ValueError, TypeError), match=rf"{argument}\['Nodule'\] must be (an integer|at least 0), got "):
        make_mix(**{argument: {"Nodule": n}})


@settings(EVERYDAY, max_examples=100)
@given(st.floats().filter(lambda r: not 0 < r <= 1))
def test_a_ratio_outside_0_and_1_is_named(ratio):
    with pytest.raises(ValueError, match=r"sampling_strategy as a number must be in \(0, 1\], got "):
        make_mix(sampling_strategy=ratio)


@settings(EVERYDAY, max_examples=50)
@given(st.integers(max_value=-1) | st.integers(min_value=2**64) | st.floats() | WEIRD)
def test_a_seed_that_is_none_is_named(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64 - 1\], got "):
        make_mix(seed=seed)


@settings(EVERYDAY, max_examples=50)
@given(st.integers(max_value=-1) | st.integers(min_value=2**63) | st.floats() | WEIRD)
def test_an_epoch_that_is_none_is_named_at_each_door(epoch):
    mix = make_mix()
    for door in (mix, mix.wrap(Films(4)), mix.loader(Films(4))):
        with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 2\*\*63 - 1\], got "):
            door.set_epoch(epoch)


@settings(EVERYDAY, max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "No Finding", "healthy"]), max_size=4, unique=True))
def test_classes_without_a_nodule_are_named(classes):
    with pytest.raises(ValueError, match="nodule must be one of the classes"):
        LabelPolicy(classes=classes)


# --- Values outside the declared range ---
@settings(EVERYDAY, max_examples=100)
@given(st.floats(-1000, 1000), st.floats(0.1, 1000), st.floats(0.16, 100), st.booleans(), st.sampled_from([1, 3]))
def test_a_value_outside_the_declared_range_is_named(low, span, over, above, channels):
    high = low + span
    images = torch.full((2, channels, 16, 16), low + span / 2)
    images[1, channels - 1, 3, 5] = high + over * span if above else low - over * span
    before = images.clone()
    with pytest.raises(ValueError, match=r"images must lie in \[.*got values from"):
        make_mix(value_range=(low, high))(images, torch.zeros(2, dtype=torch.long))
    assert torch.equal(images, before)


# --- Inputs of the generator ---
def shapes(*exact):
    size = st.integers(1, 40)
    return st.lists(size, min_size=0, max_size=5).map(tuple).filter(lambda shape: shape not in exact)


@settings(EVERYDAY, max_examples=100)
@given(st.data())
def test_noise_and_masks_of_other_shapes_are_named(data):
    n, net = data.draw(st.integers(1, 3)), generator()
    noise, masks = (n, net.noise_dim), (n, 1, net.image_size, net.image_size)
    if data.draw(st.booleans()):
        noise = data.draw(shapes(noise))
        assume(len(noise) != 2 or noise[1] != net.noise_dim)
    else:
        masks = data.draw(shapes(masks))
    for door in (net, compile_generator(net)):
        with pytest.raises(ValueError, match=r"(noise|masks) must be \(B, .*got \("):
            door(torch.zeros(noise), torch.zeros(masks))


@settings(EVERYDAY, max_examples=100)
@given(
    st.floats(width=32).filter(lambda v: v not in (0, 1)),
    st.tuples(st.integers(0, 1), st.just(0), st.integers(0, 31), st.integers(0, 31)),
)
def test_a_mask_that_is_not_binary_is_named_by_the_generators(value, place):
    masks = torch.zeros(2, 1, 32, 32)
    masks[place] = value
    for door in (generator(), compile_generator(generator())):
        with pytest.raises(ValueError, match=r"masks must be (0 or 1 everywhere|finite), got .* at \("):
            door(torch.zeros(2, generator().noise_dim), masks)


# --- Boxes and priors of another image size ---
@settings(EVERYDAY, max_examples=150)
@given(st.integers(16, 512), st.integers(2, 8), st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.booleans())
def test_boxes_of_a_larger_image_are_named(size, times, x, y, at_right):
    large = size * times
    x1, y1 = x * large, y * large
    corner = max(x1, y1) if at_right else max(size + 1.0, max(x1, y1))
    boxes = torch.tensor([[corner, y1, corner + large / 10, y1 + large / 10]])
    assume(boxes[:, 2:].max() > size + 1 and boxes.max() <= large)
    check_boxes(boxes, large)
    for door in (lambda: LocationPrior.fit([boxes], size), lambda: prior().log_prob(boxes, size)):
        with pytest.raises(ValueError, match=rf"boxes must be inside the image of height {size} and width {size}, got"):
            door()


@settings(EVERYDAY, max_examples=60)
@given(st.sampled_from([nn.Linear(1, 1), "fast128", None, 3, np.zeros(3), prior(), generator()]), st.booleans())
def test_what_is_no_generator_or_prior_is_named(thing, as_generator):
    if as_generator:
        assume(thing is not generator())
        with pytest.raises(TypeError, match="generator must be a NoduleGenerator or have image_size"):
            SyntheticNoduleMix(thing, prior())
    else:
        assume(thing is not prior())
        with pytest.raises(TypeError, match="prior must be a LocationPrior, got "):
            SyntheticNoduleMix(generator(), thing)


def test_numbers_that_are_nan_are_out_of_every_interval():
    for options in ({"p": math.nan}, {"sampling_strategy": math.nan}):
        with pytest.raises(ValueError, match="must be in .*got nan"):
            make_mix(**options)


# --- Boxes and masks ---
@st.composite
def bad_boxes(draw):
    """One good box and one that is outside the image, inverted, empty or not finite, of a 64-pixel image."""
    kind = draw(st.sampled_from(["left", "above", "right", "below", "inverted", "empty", "nan"]))
    x, y = draw(st.floats(1, 40)), draw(st.floats(1, 40))
    far = draw(st.floats(0.01, 1000))
    box = {
        "left": [-far, y, x + 5, y + 5],
        "above": [x, -far, x + 5, y + 5],
        "right": [x, y, 64 + far, y + 5],
        "below": [x, y, x + 5, 64 + far],
        "inverted": [x + 5, y, x, y + 5],
        "empty": [x, y, x, y + 5],
        "nan": [x, draw(st.sampled_from([torch.nan, torch.inf])), x + 5, y + 5],
    }[kind]
    rows = [[4.0, 4.0, 9.0, 9.0], box]
    return torch.tensor(rows if draw(st.booleans()) else rows[::-1])


@settings(deadline=None, max_examples=200)
@given(bad_boxes())
def test_bad_boxes_are_named_at_every_door(boxes):
    for door in (
        lambda: check_boxes(boxes, 64),
        lambda: boxes_to_masks([boxes], 64),
        lambda: LocationPrior.fit([boxes], 64),
        lambda: prior().log_prob(boxes, 64),
    ):
        with pytest.raises(ValueError, match=r"boxes.* must be (finite|XYXY|inside)"):
            door()


@settings(deadline=None, max_examples=100)
@given(
    value=st.floats(allow_nan=True).filter(lambda v: v not in (0, 1)),
    place=st.tuples(st.integers(0, 1), st.just(0), st.integers(0, 7), st.integers(0, 7)),
)
def test_a_mask_that_is_not_binary_is_named(value, place):
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    masks[place] = value
    with pytest.raises(ValueError, match=r"masks must be (0 or 1 everywhere|finite), got .* at \("):
        check_masks(masks)


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=5), size=st.integers(1, 9))
def test_a_mask_of_another_shape_is_named(shape, size):
    masks = torch.zeros(shape)
    if len(shape) == 4 and shape[1] == 1 and shape[2:] == [size, size]:
        check_masks(masks, size)
        return
    with pytest.raises(ValueError, match=r"masks must be \(B, 1, "):
        check_masks(masks, size)
