import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from carim_aug.ops.value_range import FLOATS, IMAGENET, Normalization, RangeError, ValueRange

MEAN_STD = {"mean": IMAGENET.mean, "std": IMAGENET.std}


def ramp(n: int = 1) -> torch.Tensor:
    return torch.linspace(-1, 1, n * 256).view(n, 1, 16, 16)


@st.composite
def ranges(draw):
    """A spec, a dtype and a number of channels that fit together."""
    numbers = st.floats(-50, 50)
    spec = draw(
        st.one_of(
            st.sampled_from(["auto", "uint8", "unit", "symmetric", "xrv"]),
            st.tuples(numbers, st.floats(0.5, 100)).map(lambda t: (t[0], t[0] + t[1])),
            st.tuples(st.floats(0, 1), st.floats(0.05, 1)).map(lambda t: {"mean": t[0], "std": t[1]}),
            st.lists(st.floats(0.1, 1), min_size=3, max_size=3).map(lambda m: Normalization(m, m[::-1])),
        )
    )
    channels = 3 if isinstance(spec, Normalization) else draw(st.sampled_from([1, 3]))
    dtypes = [torch.float32, torch.float64]
    dtypes += [torch.uint8] if spec in ("auto", "uint8") else [torch.int16] if spec == "xrv" else []
    return ValueRange.of(spec), draw(st.sampled_from(dtypes)), channels


@given(ranges(), st.integers(0, 2**31), st.floats(0.2, 50), st.booleans())
def test_there_and_back_is_the_same_image_differences_scale_and_what_leaves_is_refused(case, seed, excess, below):
    value_range, dtype, channels = case
    images = torch.rand(2, 1, 8, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    before = images.clone()
    users = value_range.from_symmetric(images, channels=channels, dtype=dtype)
    assert users.shape == (2, channels, 8, 9) and users.dtype == dtype and torch.equal(images, before)
    low, high = value_range.bounds(channels, like=users)
    back = value_range.to_symmetric(users)
    step = 1.01 / (high - low).min().item() if not dtype.is_floating_point else 2e-5
    assert back.shape == images.shape and (back - images).abs().max() <= step
    value_range.check(users)
    pair = value_range.from_symmetric(images.double(), channels=channels, dtype=torch.float64)
    scaled = value_range.scale_difference(images[1:].double() - images[:1], channels=channels)
    assert scaled.shape == (1, channels, 8, 9)
    assert torch.allclose(scaled, pair[1:] - pair[:1], atol=1e-9, rtol=1e-9)
    assert not value_range.scale_difference(torch.zeros(1, 1, 4, 4), channels=channels).any()
    if dtype.is_floating_point:
        spoiled, span = users.clone(), high.max() - low.min()
        spoiled[0, 0, 3, 3] = low.min() - excess * span if below else high.max() + excess * span
        with pytest.raises(RangeError, match="pixels must lie in"):
            value_range.check_each([users, spoiled], "pixels")


def test_words_pairs_and_normalizations_mean_their_ranges():
    ends = {"uint8": (0, 255), "unit": (0, 1), "symmetric": (-1, 1), "xrv": (-1024, 1024)}
    for word, (low, high) in ends.items():
        assert (ValueRange.of(word).low, ValueRange.of(word).high) == ((low,), (high,))
    assert ValueRange.of("auto").resolve(torch.uint8) == ValueRange.of("uint8")
    assert all(ValueRange.of().resolve(dtype) == ValueRange.of("unit") for dtype in FLOATS)
    assert ValueRange.of((np.float32(0), np.int64(4095))).high == (4095.0,)
    assert ValueRange.of({"mean": np.array([0.5]), "std": torch.tensor(0.5)}).low == (-1.0,)
    one_mean = ValueRange.of({"mean": [0.5], "std": 0.25})
    assert all(one_mean.from_symmetric(ramp(), channels=n, dtype=torch.float32).amax() == 2 for n in (1, 3))


@pytest.mark.parametrize("spec", ["imagenet", MEAN_STD, IMAGENET, v2.Normalize(**MEAN_STD)])
def test_imagenet_is_what_v2_normalize_makes(spec):
    users = ValueRange.of(spec).from_symmetric(ramp(), channels=3, dtype=torch.float32)
    assert torch.allclose(users, v2.Normalize(**MEAN_STD)(((ramp() + 1) / 2).expand(1, 3, 16, 16)), atol=1e-6)
    ValueRange.of(spec).check(users)


def test_integers_are_rounded_half_to_even_and_clamped_and_ranges_are_values():
    value_range = ValueRange.of((0, 4095))
    assert value_range == ValueRange.of([0, 4095]) and ValueRange.of(value_range) is value_range
    for dtype in (torch.int16, torch.int32):
        value_range.check(torch.full((1, 1, 16, 16), 900, dtype=dtype))
    symmetric = torch.tensor([0.5, 1.5, 2.5, -0.5, -3.5, -40, 40]).view(1, 1, 1, 7) / 16
    users = ValueRange.of((-16, 16)).from_symmetric(symmetric, channels=1, dtype=torch.int16)
    assert users.flatten().tolist() == [0, 2, 2, 0, -4, -16, 16]


def test_three_channels_become_their_mean_and_share_no_memory():
    users = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.equal(ValueRange.of("unit").to_symmetric(users), torch.zeros(1, 1, 16, 16))
    images = ramp()
    for spec in ("symmetric", "unit"):
        users = ValueRange.of(spec).from_symmetric(images, channels=3, dtype=torch.float32)
        users[:, 0] = 7
        assert users[:, 1:].max() <= 1
        ValueRange.of(spec).to_symmetric(images).zero_()
        assert torch.equal(images, ramp())


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_dtypes_are_preserved_and_must_be_finite(dtype):
    for spec in ("unit", "imagenet", "xrv"):
        users = ValueRange.of(spec).from_symmetric(ramp(), channels=3, dtype=dtype)
        assert users.dtype == dtype
        ValueRange.of(spec).check(users)
        for value in (float("nan"), float("inf"), -float("inf")):
            users[0, 1, 5, 5] = value
            with pytest.raises(RangeError, match="photos must be finite, got"):
                ValueRange.of(spec).check(users, name="photos")


@pytest.mark.parametrize(
    ("made_as", "declared", "remedy"),
    [
        ("imagenet", "auto", "look ImageNet-normalised: pass value_range='imagenet'"),
        ("symmetric", "auto", r"look like \[-1, 1\]: pass value_range='symmetric'"),
        ("uint8", "auto", r"look like \[0, 255\]: pass value_range='uint8'"),
        ("xrv", "unit", r"look like \[-1024, 1024\]: pass value_range='xrv'"),
        ((0, 4000), "unit", r"pass value_range=\(0, 4095\)"),
        ((-5000, 4000), "unit", r"pass value_range=\(low, high\)"),
        ((-4.5, 3.5), "auto", r"from -4.5 to 3.5: pass value_range=\(low, high\) or {'mean'"),  # not "xrv"
    ],
)
def test_the_error_names_the_likely_range(made_as, declared, remedy):
    images = ValueRange.of(made_as).from_symmetric(ramp(), channels=3, dtype=torch.float32)
    with pytest.raises(RangeError, match=remedy):
        ValueRange.of(declared).check(images)


def test_overshoot_of_a_bicubic_resize_passes():
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 20:40, 20:40] = 1
    resized = v2.functional.resize(edge, [90, 90], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    assert resized.min() < -0.05 and resized.max() > 1.1
    ValueRange.of("auto").check(resized)


NONE = ["grey", None, 3, (1,), (1, 0), (0, 0), (0, float("inf")), ("a", "b"), {"mean": 0.5}, {"mean": 0.5, "std": 0}]
NONE += [{"mean": (0.5, 0.5), "std": (1, 1)}, {"mean": float("nan"), "std": 1}, Normalization((0.1, 0.2, 0.3), (1, 1))]


@pytest.mark.parametrize("spec", NONE)
def test_what_is_no_range_is_named(spec):
    with pytest.raises(RangeError, match="must"):
        ValueRange.of(spec)


@pytest.mark.parametrize(
    ("spec", "dtype", "words"),
    [
        ("unit", torch.uint8, "whole ends from 0 to 255"),
        ("symmetric", torch.int16, "whole ends"),
        ("auto", torch.int16, "got torch.int16: pass value_range="),
        *[((0, 4095), dtype, "images must be uint8") for dtype in (torch.int64, torch.bool, torch.complex64)],
        ("imagenet", torch.float32, "has 3 channels, images have 1"),
    ],
)
def test_images_that_cannot_have_the_range_are_named(spec, dtype, words):
    with pytest.raises(RangeError, match=words):
        ValueRange.of(spec).check(torch.zeros(2, 1, 16, 16).to(dtype))
    with pytest.raises(RangeError, match="1 or 3 channels, got 2"):
        ValueRange.of("unit").from_symmetric(ramp(), channels=2, dtype=torch.float32)


@pytest.mark.gpu
def test_cuda_images_stay_on_cuda_and_equal_the_cpu():
    for spec, dtype in (("imagenet", torch.float32), ("auto", torch.uint8), ("xrv", torch.float16)):
        value_range = ValueRange.of(spec)
        users = value_range.from_symmetric(ramp(2).cuda(), channels=3, dtype=dtype)
        assert users.is_cuda and value_range.to_symmetric(users).is_cuda
        value_range.check(users)
        plain = value_range.from_symmetric(ramp(2), channels=3, dtype=dtype)
        assert torch.allclose(users.cpu().double(), plain.double(), atol=1e-5 if dtype == torch.float32 else 1)


# --- A small part of the range ---
@pytest.mark.parametrize(
    ("images", "line"),
    [
        (torch.rand(2, 1, 32, 32) * 0.0625, r"images use 6 % of their range \[0, 1\].*value_range=\("),
        ((torch.rand(2, 1, 32, 32) * 4095).to(torch.uint16), r"range \[0, 65535\].*value_range=\(0, 4095\)"),
    ],
)
def test_images_that_use_little_of_their_range_are_a_warning_with_the_remedy(images, line):
    value_range = ValueRange.of("auto")
    with pytest.warns(UserWarning, match=line.replace(" %", "%")):
        value_range.check(images)
    assert all(0.05 < share < 0.07 for share in value_range.shares(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in (torch.rand(1, 1, 32, 32), torch.full((1, 1, 32, 32), 0.5), torch.rand(1, 1, 32, 32) * 0.2):
            value_range.check(plain)
            assert value_range.shares(plain) == [1.0]


def test_one_narrow_image_in_a_batch_is_a_warning():
    batch = torch.stack([torch.rand(1, 32, 32), torch.rand(1, 32, 32) * 0.05])
    with pytest.warns(UserWarning, match="images use 5% of their range"):
        ValueRange.of("auto").check(batch)
