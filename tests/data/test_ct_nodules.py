import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.errors import DataError


def ball(radius, size=50, stretch=1.0, thick=1.0):
    axis = np.arange(size) - (size - 1) / 2
    return thick * np.sqrt(np.clip(radius**2 - (axis[None] / stretch) ** 2 - axis[:, None] ** 2, 0, None))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Forty balls of 4 to 40 mm."""
    balls = np.stack([ball(r) for r in np.linspace(2.5, 20, 40)]).astype(np.float16)
    file = tmp_path_factory.mktemp("ct") / "templates.npz"
    np.savez(file, frontal=balls, sagittal=balls)
    return file


@pytest.fixture(scope="module")
def nodules(path):
    return CTNodules(path)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, size, seed=0):
    corner = torch.rand(n, 2, generator=draw(seed)) * size * 0.7
    side = 3 + torch.rand(n, 2, generator=draw(seed + 1)) * (size * 0.3 - 3)
    return torch.cat((corner, corner + side), 1)


def test_templates_are_sorted_and_of_peak_one(nodules):
    assert len(nodules) == 80 and nodules.templates.shape == (80, 1, 50, 50)
    assert torch.allclose(nodules.templates.amax((1, 2, 3)), torch.ones(80))
    assert (nodules.extents_mm.diff() >= 0).all()
    assert "80 templates" in repr(nodules)


def test_cut_thin_ragged_and_empty_templates_are_dropped(tmp_path):
    cut, thin, empty = np.roll(ball(10), 20, 1), ball(4, stretch=4.0), np.zeros((50, 50))
    ring = ball(12) - 1.4 * ball(8)
    ragged = ball(12) * (np.random.default_rng(0).random((50, 50)) < 0.3)
    views = np.stack([ball(8), cut, thin, empty, ring.clip(0), ragged])
    np.savez(tmp_path / "t.npz", frontal=views, sagittal=np.zeros_like(views))
    assert len(CTNodules(tmp_path / "t.npz")) == 1


@given(size=st.sampled_from([32, 64, 128]), n=st.integers(1, 6), seed=st.integers(0, 10_000), loose=st.booleans())
@settings(deadline=None, max_examples=40)
def test_difference_is_bright_and_inside_its_box(nodules, size, n, seed, loose):
    images, boxes = torch.rand(n, 1, size, size, generator=draw(seed)) * 2 - 1, random_boxes(n, size, seed)
    result, difference = nodules.superimpose(images, boxes, draw(seed), fill=None if loose else (0.9, 1.0))
    assert result.shape == difference.shape == images.shape and result.dtype == images.dtype
    assert torch.equal(result, images + difference) and result.max() <= 1
    assert difference.min() >= 0 and (difference.amax((1, 2, 3)) > 0).all()
    for one, (x1, y1, x2, y2) in zip(difference[:, 0], boxes.tolist(), strict=True):
        rows, columns = torch.nonzero(one, as_tuple=True)
        assert columns.min() + 1 > x1 and columns.max() < x2 and rows.min() + 1 > y1 and rows.max() < y2


def test_fixed_contrast_is_the_peak_of_the_difference(nodules):
    _, difference = nodules.superimpose(torch.zeros(8, 1, 64, 64), random_boxes(8, 64), draw(), contrast=(0.2, 0.2))
    assert torch.allclose(difference.amax((1, 2, 3)), torch.full((8,), 0.2))


def test_drawn_contrast_has_the_stated_percentiles(nodules):
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0]]).repeat(2000, 1)
    _, difference = nodules.superimpose(torch.zeros(2000, 1, 32, 32), boxes, draw(), contrast=(0.1, 0.4))
    low, middle, high = np.percentile(difference.amax((1, 2, 3)).numpy(), [10, 50, 90])
    assert (low, middle, high) == pytest.approx((0.1, 0.2, 0.4), rel=0.08)


def test_ball_fills_its_box_and_lies_in_its_middle(nodules):
    box = torch.tensor([[20.0, 30.0, 44.0, 54.0]])
    _, difference = nodules.superimpose(torch.zeros(1, 1, 80, 80), box, draw(), fill=(1.0, 1.0), contrast=(0.5, 0.5))
    film = difference[0, 0]
    span = (film > 0.1).any(0).sum()
    assert 20 <= span <= 24
    axis = torch.arange(80) + 0.5
    assert float((film.sum(0) * axis).sum() / film.sum()) == pytest.approx(32, abs=0.3)
    assert float((film.sum(1) * axis).sum() / film.sum()) == pytest.approx(42, abs=0.3)


def test_nodule_has_a_soft_edge_and_no_hard_step(nodules):
    box = torch.tensor([[20.0, 20.0, 50.0, 50.0]])
    _, difference = nodules.superimpose(torch.zeros(1, 1, 70, 70), box, draw(), contrast=(0.5, 0.5))
    steps = torch.cat((difference.diff(dim=2).flatten(), difference.diff(dim=3).flatten())).abs()
    assert steps.max() < 0.25 * 0.5


def test_loose_fill_leaves_room_in_large_boxes_only(nodules):
    boxes = torch.tensor([[40.0, 40.0, 45.0, 45.0], [40.0, 40.0, 60.0, 60.0]])
    images = torch.zeros(2, 1, 128, 128)
    _, tight = nodules.superimpose(images, boxes, draw(), fill=(1.0, 1.0), contrast=(0.5, 0.5))
    _, loose = nodules.superimpose(images, boxes, draw(), fill=None, contrast=(0.5, 0.5))
    share = (loose > 0.05).sum((1, 2, 3)) / (tight > 0.05).sum((1, 2, 3))
    assert share[0] > 0.7 and share[1] < 0.5


def test_bright_film_saturates(nodules):
    images = torch.full((1, 1, 32, 32), 0.95)
    box = torch.tensor([[8.0, 8.0, 20.0, 20.0]])
    result, difference = nodules.superimpose(images, box, draw(), contrast=(0.5, 0.5))
    assert result.max() <= 1 and difference.max() == pytest.approx(0.05, abs=1e-6)


def test_same_generator_state_same_nodules_and_inputs_untouched(nodules):
    images, boxes = torch.zeros(3, 1, 48, 48), random_boxes(3, 48)
    before, state = boxes.clone(), torch.get_rng_state()
    first, second = nodules.superimpose(images, boxes, draw(5)), nodules.superimpose(images, boxes, draw(5))
    other = nodules.superimpose(images, boxes, draw(6))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
    assert images.abs().max() == 0 and torch.equal(boxes, before) and torch.equal(state, torch.get_rng_state())


def test_without_rotation_an_upright_template_stays_upright(tmp_path):
    heavy_above = ball(10) * np.where(np.arange(50)[:, None] < 25, 1.0, 0.6)
    views = heavy_above[None].astype(np.float32)
    np.savez(tmp_path / "t.npz", frontal=views, sagittal=np.zeros_like(views))
    nodule = CTNodules(tmp_path / "t.npz")
    images, boxes = torch.zeros(12, 1, 50, 50), torch.tensor([[10.0, 10.0, 40.0, 40.0]]).repeat(12, 1)
    _, fixed = nodule.superimpose(images, boxes, draw(), contrast=(0.5, 0.5), fill=(1, 1), rotate=False)
    _, turned = nodule.superimpose(images, boxes, draw(), contrast=(0.5, 0.5), fill=(1, 1))
    above = [(d[:, 0, :25].sum((1, 2)) / d[:, 0].sum((1, 2))) for d in (fixed, turned)]
    assert torch.allclose(fixed, fixed[:1].expand_as(fixed), atol=1e-5)
    assert above[0].min() > 0.55 and above[1].min() < 0.45 < 0.55 < above[1].max()


def test_empty_batch_stays_empty(nodules):
    result, difference = nodules.superimpose(torch.zeros(0, 1, 32, 32), torch.zeros(0, 4), draw())
    assert result.shape == difference.shape == (0, 1, 32, 32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"images": torch.zeros(2, 3, 32, 32)}, r"images must be \(B, 1, S, S\), got \(2, 3, 32, 32\)"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes must be \(2, 4\), got \(3, 4\)"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9], [9.0, 1, 1, 9]])}, "boxes must be XYXY"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 33, 9]])}, "boxes must be XYXY"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 1.5, 9]])}, "at least one pixel"),
        ({"contrast": (0.0, 0.1)}, "contrast must be"),
        ({"contrast": (0.3, 0.1)}, "contrast must be"),
        ({"fill": (0.5, 1.2)}, "fill must be"),
    ],
)
def test_bad_input_is_refused(nodules, change, match):
    given_ = {"images": torch.zeros(2, 1, 32, 32), "boxes": torch.tensor([[1.0, 1, 9, 9]] * 2), "generator": draw()}
    with pytest.raises(ValueError, match=match):
        nodules.superimpose(**(given_ | change))


def test_integer_images_are_refused(nodules):
    with pytest.raises(TypeError, match="floating point"):
        nodules.superimpose(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.tensor([[1.0, 1, 9, 9]]), draw())


def test_bad_archives_are_refused(tmp_path):
    file = tmp_path / "t.npz"
    with pytest.raises(DataError, match="no such file"):
        CTNodules(file)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable"):
        CTNodules(file)
    np.savez(file, frontal=np.zeros((1, 50, 50)))
    with pytest.raises(DataError, match="must hold frontal and sagittal, found frontal"):
        CTNodules(file)
    np.savez(file, frontal=np.zeros((1, 50, 40)), sagittal=np.zeros((1, 50, 40)))
    with pytest.raises(DataError, match=r"frontal must be \(N, S, S\)"):
        CTNodules(file)
    np.savez(file, frontal=np.zeros((1, 50, 50)), sagittal=np.zeros((1, 50, 50)))
    with pytest.raises(DataError, match="no template"):
        CTNodules(file)


def test_field_of_view_must_be_positive(path):
    with pytest.raises(ValueError, match="field_mm must be > 0"):
        CTNodules(path, field_mm=0)


def test_a_batch_of_sixteen_takes_milliseconds_of_one_core(nodules):
    images, boxes, times = torch.zeros(16, 1, 128, 128), random_boxes(16, 64), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in range(10):
            start = time.thread_time()
            nodules.superimpose(images, boxes, draw(seed))
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.010


def test_real_templates_keep_most_and_add_roundish_blobs(ct_nodules):
    real = CTNodules(ct_nodules)
    assert 1500 < len(real) < 2358 and real.extents_mm.max() < 48
    boxes = torch.tensor([[20.0, 20.0, 36.0, 36.0]]).repeat(200, 1)
    _, difference = real.superimpose(torch.zeros(200, 1, 56, 56), boxes, draw(), contrast=(0.5, 0.5))
    middle, rim = difference[:, 0, 26:30, 26:30].mean(), difference[:, 0, 20:22, 20:22].mean()
    assert middle > 0.25 and rim < 0.02
