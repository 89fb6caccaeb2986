"""The frame of a nodule, there and back; conspicuity in it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.conspicuity import box_conspicuity, unit_conspicuity
from carim_aug.ops.regions import BOX, FRAME, boxes_in_frame, cut_regions, paste_back

AXIS = torch.arange(FRAME) - (FRAME - 1) / 2
DOME = (1 - (AXIS[:, None].square() + AXIS.square()) / (BOX / 2) ** 2).clamp(min=0)


@given(
    height=st.integers(64, 700),
    width=st.integers(64, 700),
    side=st.floats(4, 40),
    aspect=st.floats(0.5, 2),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_what_is_pasted_is_in_the_frame_again_and_nothing_outside_the_box_changes(height, width, side, aspect, place):
    w, h = (side, side * aspect) if aspect < 1 else (side / aspect, side)
    x, y = place[0] * (width - w), place[1] * (height - h)
    box, image = torch.tensor([x, y, x + w, y + h]), torch.zeros(1, height, width)
    added, weight, where = paste_back(DOME, box, (height, width))
    assert added.shape == weight.shape == image[0][where].shape
    image[0][where] += added
    assert float(image.sum()) == pytest.approx(float(added.sum()), rel=1e-4) and float(added.max()) <= 1 + 1e-5
    rows, columns = torch.where(image[0] != 0)
    if len(rows):
        slack = 0.05 * max(w, h) + 1
        assert rows.min() >= y - slack and rows.max() <= y + h + slack
        assert columns.min() >= x - slack and columns.max() <= x + w + slack
    region = cut_regions([image], box[None])
    assert region.shape == (1, 1, FRAME, FRAME)
    if min(w, h) >= 16:
        assert float(region[0, 0, 62:66, 62:66].mean()) == pytest.approx(1, abs=0.05)


def test_boxes_in_the_frame_keep_their_aspect_and_edges_repeat():
    boxes = torch.tensor([[100.0, 60, 130, 80], [0, 0, 10, 20]])
    expected = torch.tensor([[48, 53.3333, 80, 74.6667], [56, 48, 72, 80]])
    assert torch.allclose(boxes_in_frame(boxes), expected, atol=1e-3)
    ramp = torch.arange(200.0).expand(1, 150, 200)
    left = cut_regions([ramp, ramp], boxes)[1, 0]
    assert (left[:, :40] == left[:1, :1]).all() and left[0, -1] > left[0, 0]
    assert cut_regions([], torch.zeros(0, 4)).shape == (0, 1, FRAME, FRAME)


def test_regions_do_not_depend_on_their_batch():
    images = [torch.rand(1, 90, 120), torch.rand(1, 500, 400), torch.rand(1, 64, 64)]
    boxes = torch.tensor([[10.0, 10, 20, 22], [200, 300, 280, 360], [30, 30, 60, 60]])
    together = cut_regions(images, boxes)
    for i in range(3):
        assert together[i].equal(cut_regions(images[i : i + 1], boxes[i : i + 1])[0])


def test_conspicuity_grows_with_amplitude_and_falls_with_what_lies_under_the_nodule():
    noise = torch.randn(1, 1, FRAME, FRAME, generator=torch.Generator().manual_seed(0))
    noise = noise * torch.tensor([0.1, 0.2, 0])[:, None, None, None]
    shapes = DOME.expand(3, 1, -1, -1)
    quiet, busy, flat = unit_conspicuity(noise, shapes).tolist()
    assert quiet == pytest.approx(2 * busy, rel=1e-4) and flat == float("inf")
    assert unit_conspicuity(noise[:1], 3 * shapes[:1]).item() == pytest.approx(3 * quiet, rel=1e-4)
    chest = phantom_chest(256)
    box = torch.tensor([[70.0, 100, 86, 116]])
    seen = []
    for amplitude in (0.0, 0.1, 0.3):
        image = chest.clone()
        added, _, where = paste_back(DOME * amplitude, box[0], (256, 256))
        image[0][where] += added
        seen.append(float(box_conspicuity([image], box)))
    assert seen[0] < seen[1] < seen[2] and seen[2] > 3
