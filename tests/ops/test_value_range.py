import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from carim_aug.ops.value_range import Normalization, RangeError, ValueRange

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def ramp(n: int = 1) -> torch.Tensor:
    return torch.linspace(-1, 1, n * 256).view(n, 1, 16, 16)


@st.composite
def ranges(draw):
    """A spec, a dtype and a number of channels that fit together."""
    channels = draw(st.sampled_from([1, 3]))
    numbers = st.floats(-50, 50)
    spec = draw(
        st.one_of(
            st.sampled_from(["auto", "uint8", "unit", "symmetric", "xrv"]),
            st.tuples(numbers, st.floats(0.5, 100)).map(lambda t: (t[0], t[0] + t[1])),
            st.tuples(st.floats(0, 1), st.floats(0.05, 1)).map(lambda t: {"mean": t[0], "std": t[1]}),
            st.lists(st.floats(0.1, 1), min_size=3, max_size=3).map(lambda m: Normalization(m, m[::-1])),
        )
    )
    channels = 3 if isinstance(spec, Normalization) else channels
    dtypes = [torch.float32, torch.float64]
    dtypes += [torch.uint8] if spec in ("auto", "uint8") else [torch.int16] if spec == "xrv" else []
    return spec, draw(st.sampled_from(dtypes)), channels


@settings(deadline=None, max_examples=150)
@given(ranges(), st.integers(0, 2**31))
def test_there_and_back_is_the_same_image(case, seed):
    spec, dtype, channels = case
    ranged = ValueRange.of(spec)
    images = torch.rand(2, 1, 8, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    before = images.clone()
    users = ranged.from_symmetric(images, channels=channels, dtype=dtype)
    assert users.shape == (2, channels, 8, 9) and users.dtype == dtype
    ranged.check(users)
    assert torch.equal(images, before)
    back = ranged.to_symmetric(users)
    low, high = ranged.bounds(channels, like=users)
    step = 1.01 / (high - low).min().item() if not dtype.is_floating_point else 2e-5
    assert back.shape == images.shape
    assert (back - images).abs().max() <= step


@settings(deadline=None, max_examples=100)
@given(ranges(), st.integers(0, 2**31))
def test_a_scaled_difference_is_the_difference_of_scaled_images(case, seed):
    spec, _, channels = case
    ranged = ValueRange.of(spec)
    pair = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    users = ranged.from_symmetric(pair, channels=channels, dtype=torch.float64)
    scaled = ranged.scale_difference(pair[1:] - pair[:1], channels=channels)
    assert scaled.shape == (1, channels, 8, 8)
    assert torch.allclose(scaled, users[1:] - users[:1], atol=1e-9, rtol=1e-9)
    assert not ranged.scale_difference(torch.zeros(1, 1, 4, 4), channels=channels).any()


@settings(deadline=None, max_examples=150)
@given(ranges(), st.floats(0.2, 50), st.booleans())
def test_images_out_of_their_range_are_refused(case, excess, below):
    spec, dtype, channels = case
    dtype = dtype if dtype.is_floating_point else torch.float32
    ranged = ValueRange.of(spec)
    users = ranged.from_symmetric(ramp(), channels=channels, dtype=dtype)
    low, high = ranged.bounds(channels, like=users)
    span = high.max() - low.min()
    users[0, 0, 3, 3] = low.min() - excess * span if below else high.max() + excess * span
    before = users.clone()
    with pytest.raises(RangeError, match="images must lie in"):
        ranged.check(users)
    assert torch.equal(users, before)


def test_names_mean_their_ranges():
    ends = {name: ValueRange.of(name).resolve(torch.float32) for name in ("auto", "uint8", "unit", "symmetric", "xrv")}
    assert {name: (r.low, r.high) for name, r in ends.items()} == {
        "auto": ((0.0,), (1.0,)),
        "uint8": ((0.0,), (255.0,)),
        "unit": ((0.0,), (1.0,)),
        "symmetric": ((-1.0,), (1.0,)),
        "xrv": ((-1024.0,), (1024.0,)),
    }
    assert ValueRange.of("auto").resolve(torch.uint8).high == (255.0,)


def test_imagenet_is_what_v2_normalize_makes():
    unit = ((ramp() + 1) / 2).expand(1, 3, 16, 16)
    normalize = v2.Normalize(**IMAGENET)
    for spec in ("imagenet", IMAGENET, Normalization(**IMAGENET), normalize):
        users = ValueRange.of(spec).from_symmetric(ramp(), channels=3, dtype=torch.float32)
        assert torch.allclose(users, normalize(unit), atol=1e-6)
        ValueRange.of(spec).check(normalize(unit))


def test_one_mean_serves_any_number_of_channels():
    ranged = ValueRange.of({"mean": [0.5], "std": 0.25})
    assert (ranged.low, ranged.high) == ((-2.0,), (2.0,))
    for channels in (1, 3):
        assert ranged.from_symmetric(ramp(), channels=channels, dtype=torch.float32).amax() == 2


def test_integers_are_rounded_half_to_even_and_clamped():
    symmetric = torch.tensor([0.5, 1.5, 2.5, -0.5, -3.5, -40, 40]).view(1, 1, 1, 7) / 16
    users = ValueRange.of((-16, 16)).from_symmetric(symmetric, channels=1, dtype=torch.int16)
    assert users.flatten().tolist() == [0, 2, 2, 0, -4, -16, 16]


def test_three_channels_become_their_mean():
    users = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.equal(ValueRange.of("unit").to_symmetric(users), torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spec", ["unit", "imagenet", "xrv"])
def test_float_dtypes_are_kept(dtype, spec):
    users = ValueRange.of(spec).from_symmetric(ramp(), channels=3, dtype=dtype)
    assert users.dtype == dtype
    ValueRange.of(spec).check(users)


def test_results_are_new_memory():
    for spec in ("symmetric", "unit"):
        images = ramp()
        users = ValueRange.of(spec).from_symmetric(images, channels=1, dtype=torch.float32)
        users.zero_()
        ValueRange.of(spec).to_symmetric(images).zero_()
        assert torch.equal(images, ramp())


def test_channels_of_a_batch_do_not_share_memory():
    users = ValueRange.of("unit").from_symmetric(ramp(), channels=3, dtype=torch.float32)
    users[:, 0] = 7
    assert users[:, 1:].max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_refused(value, dtype):
    images = torch.zeros(2, 1, 16, 16, dtype=dtype)
    images[1, 0, 5, 5] = value
    with pytest.raises(RangeError, match="photos must be finite, got"):
        ValueRange.of("auto").check(images, name="photos")


@pytest.mark.parametrize(
    ("made_as", "declared", "remedy"),
    [
        ("imagenet", "auto", "look ImageNet-normalised: pass value_range='imagenet'"),
        ("symmetric", "auto", r"look like \[-1, 1\]: pass value_range='symmetric'"),
        ("uint8", "auto", r"look like \[0, 255\]: pass value_range='uint8'"),
        ("uint8", "imagenet", r"look like \[0, 255\]: pass value_range='uint8'"),
        ("xrv", "unit", r"look like \[-1024, 1024\]: pass value_range='xrv'"),
        ((0, 4000), "unit", r"pass value_range=\(0, 4095\)"),
        ((-5000, 4000), "unit", r"pass value_range=\(low, high\)"),
    ],
)
def test_error_names_the_likely_range(made_as, declared, remedy):
    images = ValueRange.of(made_as).from_symmetric(ramp(), channels=3, dtype=torch.float32)
    with pytest.raises(RangeError, match=remedy):
        ValueRange.of(declared).check(images)


def test_overshoot_of_a_bicubic_resize_passes():
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 20:40, 20:40] = 1
    resized = v2.functional.resize(edge, [90, 90], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    assert resized.min() < -0.05 and resized.max() > 1.1
    ValueRange.of("auto").check(resized)


@pytest.mark.parametrize(
    "spec",
    ["grey", None, 3, (1,), (1, 0), (0, 0), (0, float("inf")), ("a", "b"), {"mean": 0.5}, {"mean": 0.5, "std": 0}]
    + [{"mean": (0.5, 0.5), "std": (1, 1)}, {"mean": float("nan"), "std": 1}, Normalization((0.1, 0.2, 0.3), (1, 1))],
)
def test_what_is_no_range_is_named(spec):
    with pytest.raises(RangeError, match="must"):
        ValueRange.of(spec)


def test_numpy_numbers_make_a_range():
    assert ValueRange.of((np.float32(0), np.int64(4095))).high == (4095.0,)
    assert ValueRange.of({"mean": np.array([0.5]), "std": torch.tensor(0.5)}).low == (-1.0,)


@pytest.mark.parametrize(("spec", "dtype"), [("unit", torch.uint8), ("symmetric", torch.int16), ("xrv", torch.uint8)])
def test_a_range_that_an_integer_dtype_cannot_hold_is_refused(spec, dtype):
    with pytest.raises(RangeError, match="whole ends"):
        ValueRange.of(spec).check(torch.zeros(1, 1, 16, 16, dtype=dtype))


def test_integers_other_than_uint8_need_a_range():
    images = torch.full((1, 1, 16, 16), 900, dtype=torch.int16)
    with pytest.raises(RangeError, match="pass value_range="):
        ValueRange.of("auto").check(images)
    ValueRange.of((0, 4095)).check(images)
    ValueRange.of((0, 4095)).check(images.to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_no_image_are_named(dtype):
    with pytest.raises(RangeError, match="images must be uint8"):
        ValueRange.of((0, 4095)).check(torch.zeros(1, 1, 16, 16).to(dtype))


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(RangeError, match="has 3 channels, images have 1"):
        ValueRange.of("imagenet").check(torch.zeros(2, 1, 16, 16))
    with pytest.raises(RangeError, match="1 or 3 channels, got 2"):
        ValueRange.of("unit").from_symmetric(ramp(), channels=2, dtype=torch.float32)


def test_ranges_are_values():
    ranged = ValueRange.of("imagenet")
    assert ranged == ValueRange.of("imagenet") == copy.deepcopy(ranged)
    assert ValueRange.of(ranged) is ranged
    with pytest.raises(AttributeError):
        ranged.low = (0.0,)


@pytest.mark.gpu
def test_cuda_images_stay_on_cuda_and_equal_the_cpu():
    for spec, dtype in (("imagenet", torch.float32), ("auto", torch.uint8), ("xrv", torch.float16)):
        ranged = ValueRange.of(spec)
        users = ranged.from_symmetric(ramp(2).cuda(), channels=3, dtype=dtype)
        assert users.is_cuda
        ranged.check(users)
        plain = ranged.from_symmetric(ramp(2), channels=3, dtype=dtype)
        assert torch.allclose(users.cpu().double(), plain.double(), atol=1e-5 if dtype == torch.float32 else 1)
        assert ranged.to_symmetric(users).is_cuda


def test_values_of_another_normalisation_are_not_taken_for_torchxrayvisions():
    with pytest.raises(RangeError, match="got values from -4.5 to 3.5") as caught:
        ValueRange.of("auto").check(torch.tensor([[[-4.5, 3.5]]]))
    assert "xrv" not in str(caught.value) and "mean" in str(caught.value)
