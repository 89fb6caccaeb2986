import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from carim_aug.ops.boxes import boxes_to_masks, check_boxes, check_masks, clip_boxes, dilate_boxes, feather, scale_boxes

NONE = torch.zeros(0, 4)


@st.composite
def batches(draw, height=19, width=23):
    """A batch of box lists for an image of 19 x 23 pixels, some of them empty."""
    edge = st.floats(0, 1, width=32)
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        rows = []
        for _ in range(draw(st.integers(0, 3))):
            x, y, w, h = (draw(edge) for _ in range(4))
            w, h = 0.2 + w * 10, 0.2 + h * 10
            x, y = x * (width - w), y * (height - h)
            rows.append([x, y, x + w, y + h])
        boxes.append(tensor(rows, dtype=torch.float32).reshape(-1, 4))
    return boxes


def slow_mask(boxes, height, width, shape):
    """Pixel by pixel, in plain numbers."""
    mask = torch.zeros(height, width)
    for x1, y1, x2, y2 in boxes.tolist():
        hit = False
        for i in range(height):
            for j in range(width):
                x, y = j + 0.5, i + 0.5
                if shape == "box":
                    inside = x1 <= x < x2 and y1 <= y < y2
                else:
                    inside = ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + (
                        (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
                    ) ** 2 <= 1
                if inside:
                    mask[i, j], hit = 1, True
        if not hit:
            j, i = (min(max(math.ceil(c) - 1, 0), n - 1) for c, n in (((x1 + x2) / 2, width), ((y1 + y2) / 2, height)))
            mask[i, j] = 1
    return mask


def test_mask_of_a_box_is_known_by_hand():
    masks = boxes_to_masks([tensor([[1.0, 2.0, 4.0, 3.0]]), NONE], (4, 5))
    assert masks.shape == (2, 1, 4, 5) and masks.dtype == torch.float32
    assert masks[0, 0].tolist() == [[0] * 5, [0] * 5, [0, 1, 1, 1, 0], [0] * 5]
    assert masks[1].sum() == 0


def test_first_number_is_x_and_to_the_right():
    mask = boxes_to_masks([tensor([[6.0, 0.0, 8.0, 1.0]])], 8)[0, 0]
    assert mask[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1] and mask.sum() == 2


def test_ellipse_leaves_the_corners_out():
    mask = boxes_to_masks([tensor([[0.0, 0.0, 4.0, 4.0]])], 4, shape="ellipse")[0, 0]
    assert mask.tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(["box", "ellipse"]))
def test_masks_equal_the_pixel_by_pixel_ones(boxes, shape):
    masks = boxes_to_masks(boxes, (19, 23), shape=shape)
    check_masks(masks, (19, 23))
    slow = torch.stack([slow_mask(b, 19, 23, shape) for b in boxes])[:, None]
    assert (masks != slow).sum() <= 1  # a centre on the very edge may fall either way in float32


def test_box_smaller_than_a_pixel_sets_the_nearest_pixel():
    for shape in ("box", "ellipse"):
        mask = boxes_to_masks([tensor([[2.6, 1.7, 2.9, 1.8]])], 4, shape=shape)[0, 0]
        assert mask.nonzero().tolist() == [[1, 2]]
    assert boxes_to_masks([tensor([[0.5, 0.0, 1.5, 1.0]])], 2)[0, 0].tolist() == [[1, 0], [0, 0]]


def test_feather_is_one_in_the_ellipse_half_in_mid_seam_and_zero_outside():
    weights = feather([tensor([[10.5, 10.5, 30.5, 30.5]])], 41, margin=0.25)[0, 0]
    row = weights[20]  # through the centre (20.5, 20.5); r = distance / 10, one to r = 0.5, zero from r = 1.5
    assert row[20] == 1 and row[15] == 1 and row[25] == 1
    assert row[30].item() == pytest.approx(0.5, abs=1e-6)  # r = 1
    assert row[28].item() == pytest.approx(0.5 + 0.5 * math.cos(0.3 * math.pi), abs=1e-6)
    assert row[35] == 0 and row[5] == 0
    assert (row[20:].diff() <= 0).all()


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.05, 0.25, 0.5]))
def test_feather_is_half_on_the_ellipse_or_more_inside_and_stays_in_the_grown_box(boxes, margin):
    weights = feather(boxes, (19, 23), margin=margin)
    assert weights.shape == (len(boxes), 1, 19, 23) and weights.min() >= 0 and weights.max() <= 1
    assert (weights[boxes_to_masks(boxes, (19, 23), shape="ellipse") == 1] > 0.5 - 1e-6).all()
    big = [b[((b[:, 2:] - b[:, :2]) >= 1.5).all(1)] for b in boxes]  # smaller ones may set one pixel of their own
    grown = [dilate_boxes(b, margin + 1e-4, (19, 23)) if len(b) else b for b in big]
    outside = boxes_to_masks(grown, (19, 23)) == 0
    assert feather(big, (19, 23), margin=margin)[outside].abs().sum() == 0


def test_feather_of_no_boxes_is_zero():
    assert feather([NONE, NONE], 8).abs().sum() == 0
    assert feather([], 8).shape == (0, 1, 8, 8) and boxes_to_masks([], (2, 3)).shape == (0, 1, 2, 3)


def test_scaling_there_and_back_is_the_same_box():
    boxes = tensor([[10.0, 20.0, 30.0, 50.0]])
    assert scale_boxes(boxes, (100, 200), (50, 400)).tolist() == [[20.0, 10.0, 60.0, 25.0]]
    assert torch.allclose(scale_boxes(scale_boxes(boxes, 1024, 257), 257, 1024), boxes, atol=1e-4)
    assert scale_boxes(tensor([[0, 0, 4, 4]]), 8, 4).tolist() == [[0.0, 0.0, 2.0, 2.0]]


def test_dilated_boxes_grow_on_each_side_and_stay_in_the_image():
    boxes = tensor([[4.0, 4.0, 8.0, 6.0], [0.0, 0.0, 10.0, 10.0]])
    assert dilate_boxes(boxes, 0.5, 16).tolist() == [[2.0, 3.0, 10.0, 7.0], [0.0, 0.0, 15.0, 15.0]]
    assert dilate_boxes(boxes, 0, 16).equal(boxes)


def test_boxes_given_are_not_changed():
    boxes = tensor([[4.0, 4.0, 8.0, 6.0]])
    before = boxes.clone()
    dilate_boxes(boxes, 1, 16), scale_boxes(boxes, 16, 4), clip_boxes(boxes, 5), boxes_to_masks([boxes], 16)
    feather([boxes], 16)
    assert boxes.equal(before)


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([[4.0, 4.0, 4.0, 6.0]], r"x1 < x2.*\[4.0, 4.0, 4.0, 6.0\]"),
        ([[4.0, 8.0, 5.0, 6.0]], r"y1 < y2"),
        ([[-1.0, 0.0, 5.0, 6.0]], r"inside the image.*-1.0"),
        ([[0.0, 0.0, 5.0, 6.0], [0.0, 0.0, 17.0, 6.0]], r"inside the image.*17.0.*row 1"),
        ([[0.0, 0.0, float("nan"), 6.0]], r"finite.*nan"),
        ([0.0, 0.0, 5.0, 6.0], r"\(k, 4\), got \(4,\)"),
        ([[0.0, 0.0, 5.0]], r"\(k, 4\), got \(1, 3\)"),
    ],
)
def test_bad_boxes_are_named_with_their_value(boxes, words):
    for door in (
        lambda b: check_boxes(b, 16),
        lambda b: boxes_to_masks([NONE, b], 16),
        lambda b: feather([b], 16),
        lambda b: dilate_boxes(b, 0.1, 16),
    ):
        with pytest.raises(ValueError, match=words):
            door(tensor(boxes))


def test_boxes_that_rounding_pushed_over_the_edge_pass():
    check_boxes(tensor([[0.0, 0.0, 16.00001, 16.0]]), 16)
    check_boxes(NONE, (3, 5))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: boxes_to_masks(tensor([[0.0, 0.0, 1.0, 1.0]]), 8), ValueError, r"one \(k, 4\) tensor per image"),
        (lambda: boxes_to_masks([[0, 0, 1, 1]], 8), TypeError, "got list"),
        (lambda: boxes_to_masks([NONE], 8, shape="star"), ValueError, "'star'"),
        (lambda: boxes_to_masks([NONE], 0), ValueError, "size must be .* got 0"),
        (lambda: boxes_to_masks([NONE], (1, 2, 3)), ValueError, r"got \(1, 2, 3\)"),
        (lambda: boxes_to_masks([NONE], 8.5), ValueError, "got 8.5"),
        (lambda: feather([NONE], 8, margin=-1), ValueError, "margin .* got -1"),
        (lambda: feather([NONE], 8, margin=0.6), ValueError, "margin .* got 0.6"),
        (lambda: dilate_boxes(NONE, math.nan, 8), ValueError, "fraction .* got nan"),
        (lambda: scale_boxes(NONE, 8, 0), ValueError, "to_size .* got 0"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "masks, words",
    [
        (torch.zeros(8, 256, 256), r"\(B, 1, H, W\), got \(8, 256, 256\)"),
        (torch.zeros(2, 3, 4, 4), r"got \(2, 3, 4, 4\)"),
        (torch.full((1, 1, 2, 2), 0.5), "0 or 1 everywhere, got 0.5"),
        (torch.full((1, 1, 2, 2), math.nan), "finite, got nan"),
        (torch.full((1, 1, 2, 2), math.inf), "finite, got inf"),
        (torch.zeros(1, 1, 4, 5), r"\(B, 1, 4, 4\), got \(1, 1, 4, 5\)"),
    ],
)
def test_bad_masks_are_named_with_their_value(masks, words):
    with pytest.raises(ValueError, match=words):
        check_masks(masks, 4 if masks.shape[2:] != (2, 2) else 2)


def test_good_masks_pass_and_an_array_does_not():
    check_masks(torch.ones(2, 1, 3, 5))
    check_masks(torch.zeros(0, 1, 4, 4, dtype=torch.bool), 4)
    with pytest.raises(TypeError, match="ndarray"):
        check_masks(torch.zeros(1, 1, 2, 2).numpy())
