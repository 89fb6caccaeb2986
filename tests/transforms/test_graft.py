"""What a graft does to pixels, by hand and for any images; what else is inserted is in test_apply."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from carim_aug.ops.boxes import feather
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.graft import contrasts, graft

BOX = tensor([[8.0, 8.0, 16.0, 16.0]])  # of 32 pixels
RANGES = {
    torch.uint8: ["auto"],
    torch.float32: ["auto", "symmetric", "xrv", "imagenet", (0, 4095), {"mean": 0.5, "std": 0.25}],
    torch.float64: ["auto", "xrv"],
    torch.float16: ["auto", "symmetric"],
    torch.bfloat16: ["auto", "imagenet"],
}


@st.composite
def cases(draw):
    """Images in their range, of any size, type and number of channels; boxes; residuals."""
    dtype = draw(st.sampled_from(list(RANGES)))
    spec = draw(st.sampled_from(RANGES[dtype]))
    n, channels = draw(st.integers(1, 4)), 3 if spec == "imagenet" else draw(st.sampled_from([1, 3]))
    height, width = draw(st.integers(16, 70)), draw(st.integers(16, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    value_range = ValueRange.of(spec)
    plain = torch.rand(n, 1, height, width, generator=random) * 2 - 1
    images = value_range.from_symmetric(plain, channels=channels, dtype=dtype)
    counts = [draw(st.integers(1, 3)) for _ in range(n)]
    boxes = []
    for count in counts:
        corner = torch.rand(count, 2, generator=random) * 0.6
        parts = torch.cat([corner, corner + 0.05 + 0.3 * torch.rand(count, 2, generator=random)], dim=1)
        boxes.append(parts * tensor([width, height, width, height]))
    residuals = torch.rand(sum(counts), 1, 32, 32, generator=random) * 4 - 2
    return images, residuals, boxes, value_range


@given(cases())
def test_a_graft_differs_from_the_real_image_only_where_the_feathered_boxes_are_above_zero(case):
    images, residuals, boxes, value_range = case
    before = images.clone()
    mixed = graft(images, residuals, boxes, [1.0] * len(images), value_range)
    assert torch.equal(images, before) and mixed.shape == images.shape and mixed.dtype == images.dtype
    weight = feather(boxes, images.shape[-2:]).expand_as(images)
    assert torch.equal(mixed[weight == 0], images[weight == 0])
    value_range.check(mixed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_graft_adds_the_scaled_residual_by_hand(dtype):
    images = torch.full((1, 3, 64, 48), 100 if dtype == torch.uint8 else 0.4, dtype=dtype)
    residual = torch.zeros(1, 1, 32, 32)
    residual[:, :, 8:16, 8:16] = 0.5  # a quarter of the span of 2
    boxes = [tensor([[12.0, 16.0, 24.0, 32.0]])]
    for strength, expected in (
        (1.0, 164 if dtype == torch.uint8 else 0.65),
        (0.5, 132 if dtype == torch.uint8 else 0.525),
    ):
        mixed = graft(images, residual, boxes, [strength], ValueRange.of("auto"))
        assert mixed[0, :, 24, 18].tolist() == pytest.approx([expected] * 3)
        assert torch.equal(mixed[0, :, 60, 40], images[0, :, 60, 40])


def test_a_graft_is_clamped_to_the_range_and_only_where_it_changed():
    images = torch.full((1, 1, 32, 32), 0.9)
    images[..., 31] = 1.1  # overshoots a little, as a bicubic resize does
    mixed = graft(images, torch.full((1, 1, 32, 32), 1.0), [BOX], [1.0], ValueRange.of("unit"))
    assert mixed[..., 12, 12] == 1 and (mixed[..., 31] == 1.1).all()


def test_each_box_of_an_image_gets_its_own_residual():
    images, boxes = torch.zeros(2, 1, 32, 32), [BOX, torch.cat([BOX, BOX + 14])]
    residuals = tensor([0.2, 0.4, 0.6])[:, None, None, None].expand(-1, 1, 32, 32)
    mixed = graft(images, residuals, boxes, [1.0, 1.0], ValueRange.of("symmetric"))
    assert mixed[0, 0, 12, 12] == pytest.approx(0.2) and mixed[0, 0, 26, 26] == 0
    assert mixed[1, 0, 12, 12] == pytest.approx(0.4) and mixed[1, 0, 26, 26] == pytest.approx(0.6)


def test_the_contrast_is_ellipse_minus_ring_of_what_is_added_mean_over_the_boxes():
    residuals = tensor([0.2, 0.4, 0.6])[:, None, None, None].expand(-1, 1, 32, 32)
    one, two = contrasts(residuals, [BOX, torch.cat([BOX, BOX + 10])], [1.0, 1.0]).tolist()
    assert 0.1 < one < 0.2 and two == pytest.approx(2.5 * one)  # the mean of 0.4 and 0.6 against 0.2
    assert contrasts(residuals[:1], [BOX], [0.5]).item() == pytest.approx(one / 2)


def test_a_gradient_flows_through_the_real_pixels():
    images = torch.full((1, 1, 32, 32), 0.5, requires_grad=True)
    graft(images, torch.full((1, 1, 32, 32), 0.1), [BOX], [1.0], ValueRange.of("unit")).sum().backward()
    assert (images.grad == 1).all()
