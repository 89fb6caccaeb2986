import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from carim_aug.ops.boxes import boxes_to_masks, check_boxes, check_masks, clip_boxes, dilate_boxes, feather
from carim_aug.ops.images import resize, ring_contrast

NONE = torch.zeros(0, 4)
SIZE = HEIGHT, WIDTH = 19, 23


@st.composite
def box_lists(draw):
    """A batch of up to three lists of up to three boxes of 0.2 to 10.2 pixels in an image of 19 x 23."""
    parts = st.tuples(*[st.floats(0, 1, width=32)] * 4)
    corners, boxes = tensor([WIDTH, HEIGHT]).float(), []
    for rows in draw(st.lists(st.lists(parts, max_size=3), min_size=1, max_size=3)):
        place, side = tensor(rows).reshape(-1, 4).split(2, 1)
        side = 0.2 + 10 * side
        boxes.append(torch.cat([place * (corners - side), place * (corners - side) + side], 1))
    return boxes


def slow_mask(boxes, shape):
    """Pixel by pixel, in plain numbers."""
    mask = torch.zeros(SIZE)
    for x1, y1, x2, y2 in boxes.tolist():
        hits = [(max(math.ceil((y1 + y2) / 2) - 1, 0), max(math.ceil((x1 + x2) / 2) - 1, 0))]
        for i, j in itertools.product(range(HEIGHT), range(WIDTH)):
            x, y = (2 * j + 1 - x1 - x2) / (x2 - x1), (2 * i + 1 - y1 - y2) / (y2 - y1)
            if (-1 <= x < 1 and -1 <= y < 1) if shape == "box" else x**2 + y**2 <= 1:
                hits.append((i, j))
        for i, j in hits[1:] or hits:
            mask[i, j] = 1
    return mask


def test_masks_of_boxes_are_known_by_hand():
    masks = boxes_to_masks([tensor([[1.0, 2.0, 4.0, 3.0]]), NONE], (4, 5))
    assert masks.shape == (2, 1, 4, 5) and masks.dtype == torch.float32 and masks[1].sum() == 0
    assert masks[0, 0].tolist() == [[0] * 5, [0] * 5, [0, 1, 1, 1, 0], [0] * 5]
    ellipse = boxes_to_masks([tensor([[0.0, 0.0, 4.0, 4.0]])], 4, shape="ellipse")[0, 0]
    assert ellipse.tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    assert boxes_to_masks([tensor([[0.5, 0.0, 1.5, 1.0]])], 2)[0, 0].tolist() == [[1, 0], [0, 0]]
    for shape in ("box", "ellipse"):  # smaller than a pixel
        assert boxes_to_masks([tensor([[2.6, 1.7, 2.9, 1.8]])], 4, shape=shape)[0, 0].nonzero().tolist() == [[1, 2]]
    assert feather([NONE, NONE], 8).abs().sum() == 0
    assert feather([], 8).shape == (0, 1, 8, 8) and boxes_to_masks([], (2, 3)).shape == (0, 1, 2, 3)


@given(box_lists(), st.sampled_from(["box", "ellipse"]))
def test_masks_equal_the_pixel_by_pixel_ones(boxes, shape):
    masks = boxes_to_masks(boxes, SIZE, shape=shape)
    check_masks(masks, SIZE)
    slow = torch.stack([slow_mask(b, shape) for b in boxes])[:, None]
    assert (masks != slow).sum() <= 1  # a centre on the very edge may fall either way in float32


def test_feather_is_one_in_the_ellipse_half_in_mid_seam_and_zero_outside():
    row = feather([tensor([[10.5, 10.5, 30.5, 30.5]])], 41, margin=0.25)[0, 0, 20]
    assert row[20] == 1 and row[15] == 1 and row[25] == 1  # r = distance / 10 from (20.5, 20.5)
    assert row[28].item() == pytest.approx(0.5 + 0.5 * math.cos(0.3 * math.pi), abs=1e-6)
    assert row[30].item() == pytest.approx(0.5, abs=1e-6)
    assert row[35] == 0 and row[5] == 0 and (row[20:].diff() <= 0).all()


@given(box_lists(), st.sampled_from([0.0, 0.05, 0.25, 0.5]))
def test_feather_is_half_or_more_in_the_ellipse_and_stays_in_the_dilated_box(boxes, margin):
    weights = feather(boxes, SIZE, margin=margin)
    assert weights.shape == (len(boxes), 1, *SIZE) and weights.min() >= 0 and weights.max() <= 1
    assert (weights[boxes_to_masks(boxes, SIZE, shape="ellipse") == 1] > 0.5 - 1e-6).all()
    big = [b[((b[:, 2:] - b[:, :2]) >= 1.5).all(1)] for b in boxes]  # smaller ones may set one pixel of their own
    dilated = [dilate_boxes(b, margin + 1e-4, SIZE) for b in big]
    assert not feather(big, SIZE, margin=margin)[boxes_to_masks(dilated, SIZE) == 0].any()


def test_dilated_boxes_grow_on_each_side_stay_in_the_image_and_are_new():
    boxes = tensor([[4.0, 4.0, 8.0, 6.0], [0.0, 0.0, 10.0, 10.0]])
    before = boxes.clone()
    assert dilate_boxes(boxes, 0.5, 16).tolist() == [[2.0, 3.0, 10.0, 7.0], [0.0, 0.0, 15.0, 15.0]]
    assert dilate_boxes(boxes, 0, 16).equal(boxes)
    assert clip_boxes(boxes, 5)[0].tolist() == [4, 4, 5, 5] and boxes.equal(before)
    assert clip_boxes(tensor([[-3.0, 2.0, 6.0, 10.0]]), (8, 4)).tolist() == [[0, 2, 4, 8]]


def test_ring_contrast_of_a_disc_on_a_flat_ground():
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    image = torch.where((rows - 12) ** 2 + (columns - 12) ** 2 <= 16, 0.5, 0.2)[None, None]
    measured = [value.item() for value in ring_contrast(image, tensor([[8.0, 8.0, 16.0, 16.0]]))]
    assert measured == pytest.approx([0.5, 0.2, 0.3])


def test_resize_keeps_a_fitting_image_as_it_is_and_the_mean_of_others():
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert resize(images, (16, 16)) is images
    small = resize(images, [8, 4])
    assert small.shape == (2, 1, 8, 4) and small.mean().item() == pytest.approx(images.mean().item(), abs=0.02)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([[4.0, 4.0, 4.0, 6.0]], r"x1 < x2.*\[4.0, 4.0, 4.0, 6.0\]"),
        ([[0.0, 0.0, 5.0, 6.0], [0.0, 0.0, 17.0, 6.0]], "inside the image.*17.0.*row 1"),
        ([[0.0, 0.0, math.nan, 6.0]], "finite.*nan"),
        ([0.0, 0.0, 5.0, 6.0], r"\(k, 4\), got \(4,\)"),
    ],
)
def test_bad_boxes_are_named_with_their_value(boxes, words):
    check_boxes(tensor([[0.0, 0.0, 16.00001, 16.0]]), 16)  # what rounding pushed over the edge passes
    boxes, doors = tensor(boxes), (lambda b: boxes_to_masks([NONE, b], 16), lambda b: feather([b], 16))
    for door in (*doors, lambda b: check_boxes(b, 16), lambda b: dilate_boxes(b, 0.1, 16)):
        with pytest.raises(ValueError, match=words):
            door(boxes)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: boxes_to_masks(tensor([[0.0, 0.0, 1.0, 1.0]]), 8), ValueError, r"one \(k, 4\) tensor per image"),
        (lambda: boxes_to_masks([[0, 0, 1, 1]], 8), TypeError, "got list"),
        (lambda: boxes_to_masks([NONE], 8, shape="star"), ValueError, "'star'"),
        (lambda: boxes_to_masks([NONE], 0), ValueError, "size must be .* got 0"),
        (lambda: boxes_to_masks([NONE], (1, 2, 3)), ValueError, r"got \(1, 2, 3\)"),
        (lambda: feather([NONE], 8, margin=0.6), ValueError, "margin .* got 0.6"),
        (lambda: dilate_boxes(NONE, math.nan, 8), ValueError, "fraction .* got nan"),
        (lambda: check_masks(torch.zeros(1, 1, 2, 2).numpy()), TypeError, "got ndarray"),
        (lambda: check_masks(torch.zeros(2, 3, 4, 4)), ValueError, r"\(B, 1, H, W\), got \(2, 3, 4, 4\)"),
        (lambda: check_masks(torch.full((1, 1, 2, 2), 0.5)), ValueError, "0 or 1 everywhere, got 0.5"),
        (lambda: check_masks(torch.full((1, 1, 2, 2), math.nan)), ValueError, "finite, got nan"),
        (lambda: check_masks(torch.zeros(1, 1, 4, 5), 4), ValueError, r"\(B, 1, 4, 4\), got \(1, 1, 4, 5\)"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    check_masks(torch.ones(0, 1, 4, 4, dtype=torch.bool), 4)
    with pytest.raises(error, match=words):
        call()
