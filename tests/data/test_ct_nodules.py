import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.io import DataError


def ball(radius, stretch=1.0):
    axis = np.arange(50) - 24.5
    return np.sqrt(np.clip(radius**2 - (axis[None] / stretch) ** 2 - axis[:, None] ** 2, 0, None))


@pytest.fixture(scope="module")
def nodules(tmp_path_factory):
    """Forty balls of 4 to 40 mm, in two views."""
    balls = np.stack([ball(r) for r in np.linspace(2.5, 20, 40)]).astype(np.float16)
    file = tmp_path_factory.mktemp("ct") / "templates.npz"
    np.savez(file, frontal=balls, sagittal=balls)
    return CTNodules(file)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, size, seed=0):
    corner = torch.rand(n, 2, generator=draw(seed)) * size * 0.7
    side = 3 + torch.rand(n, 2, generator=draw(seed + 1)) * (size * 0.3 - 3)
    return torch.cat((corner, corner + side), 1)


def test_templates_are_sorted_of_peak_one_and_neither_cut_thin_ragged_nor_empty(nodules, tmp_path):
    assert len(nodules) == 80 and nodules.templates.shape == (80, 1, 50, 50) and "80 templates" in repr(nodules)
    assert torch.allclose(nodules.templates.amax((1, 2, 3)), torch.ones(80))
    assert (nodules.extents_mm.diff() >= 0).all()
    cut, thin, empty = np.roll(ball(10), 20, 1), ball(4, stretch=4.0), np.zeros((50, 50))
    ring = ball(12) - 1.4 * ball(8)
    ragged = ball(12) * (np.random.default_rng(0).random((50, 50)) < 0.3)
    views = np.stack([ball(8), cut, thin, empty, ring.clip(0), ragged])
    np.savez(tmp_path / "t.npz", frontal=views, sagittal=np.zeros_like(views))
    assert len(CTNodules(tmp_path / "t.npz")) == 1


@given(size=st.sampled_from([32, 64, 128]), n=st.integers(1, 6), seed=st.integers(0, 10_000), loose=st.booleans())
def test_difference_is_bright_and_inside_its_box(nodules, size, n, seed, loose):
    images, boxes = torch.rand(n, 1, size, size, generator=draw(seed)) * 2 - 1, random_boxes(n, size, seed)
    result, difference = nodules.superimpose(images, boxes, draw(seed), fill=None if loose else (0.9, 1.0))
    assert result.shape == difference.shape == images.shape and result.dtype == images.dtype
    assert torch.equal(result, images + difference) and result.max() <= 1
    assert difference.min() >= 0 and (difference.amax((1, 2, 3)) > 0).all()
    for one, (x1, y1, x2, y2) in zip(difference[:, 0], boxes.tolist(), strict=True):
        rows, columns = torch.nonzero(one, as_tuple=True)
        assert columns.min() + 1 > x1 and columns.max() < x2 and rows.min() + 1 > y1 and rows.max() < y2


def test_contrast_is_the_peak_of_the_difference_with_the_stated_percentiles(nodules):
    _, difference = nodules.superimpose(torch.zeros(8, 1, 64, 64), random_boxes(8, 64), draw(), contrast=(0.2, 0.2))
    assert torch.allclose(difference.amax((1, 2, 3)), torch.full((8,), 0.2))
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0]]).repeat(2000, 1)
    _, difference = nodules.superimpose(torch.zeros(2000, 1, 32, 32), boxes, draw(), contrast=(0.1, 0.4))
    low, middle, high = np.percentile(difference.amax((1, 2, 3)).numpy(), [10, 50, 90])
    assert (low, middle, high) == pytest.approx((0.1, 0.2, 0.4), rel=0.08)


def test_ball_fills_its_box_as_tightly_as_asked_lies_in_its_middle_and_has_a_soft_edge(nodules):
    box = torch.tensor([[20.0, 30.0, 44.0, 54.0]])
    _, difference = nodules.superimpose(torch.zeros(1, 1, 80, 80), box, draw(), fill=(1.0, 1.0), contrast=(0.5, 0.5))
    added = difference[0, 0]
    assert 20 <= (added > 0.1).any(0).sum() <= 24
    axis = torch.arange(80) + 0.5
    assert float((added.sum(0) * axis).sum() / added.sum()) == pytest.approx(32, abs=0.3)
    assert float((added.sum(1) * axis).sum() / added.sum()) == pytest.approx(42, abs=0.3)
    assert max(added.diff(dim=0).abs().max(), added.diff(dim=1).abs().max()) < 0.25 * 0.5
    # A loose fill leaves room in large boxes only.
    boxes, images = torch.tensor([[40.0, 40.0, 45.0, 45.0], [40.0, 40.0, 60.0, 60.0]]), torch.zeros(2, 1, 128, 128)
    tight, loose = (nodules.superimpose(images, boxes, draw(), (0.5, 0.5), fill=fill)[1] for fill in ((1.0, 1.0), None))
    share = (loose > 0.05).sum((1, 2, 3)) / (tight > 0.05).sum((1, 2, 3))
    assert share[0] > 0.7 and share[1] < 0.5


def test_the_generator_decides_bright_images_saturate_and_inputs_stay(nodules):
    images, boxes, state = torch.full((3, 1, 48, 48), 0.95), random_boxes(3, 48), torch.get_rng_state()
    same = boxes.clone()
    first, again, other = (nodules.superimpose(images, boxes, draw(s), (0.5, 0.5)) for s in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[0].max() <= 1 and first[1].max() == pytest.approx(0.05, abs=1e-6)
    assert (images == 0.95).all() and torch.equal(boxes, same) and torch.equal(state, torch.get_rng_state())
    empty, difference = nodules.superimpose(images[:0], boxes[:0], draw())
    assert empty.shape == difference.shape == (0, 1, 48, 48)


def test_templates_are_turned_and_flipped(tmp_path):
    heavy_above = ball(10) * np.where(np.arange(50)[:, None] < 25, 1.0, 0.6)
    np.savez(tmp_path / "t.npz", frontal=heavy_above[None], sagittal=np.zeros((1, 50, 50)))
    images, boxes = torch.zeros(12, 1, 50, 50), torch.tensor([[10.0, 10.0, 40.0, 40.0]]).repeat(12, 1)
    _, difference = CTNodules(tmp_path / "t.npz").superimpose(images, boxes, draw(), (0.5, 0.5), fill=(1, 1))
    above = difference[:, 0, :25].sum((1, 2)) / difference[:, 0].sum((1, 2))
    assert above.min() < 0.45 < 0.55 < above.max()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images": torch.zeros(2, 3, 32, 32)}, ValueError, r"images must be \(B, 1, S, S\), got \(2, 3, 32, 32\)"),
        ({"images": torch.zeros(2, 1, 32, 32, dtype=torch.uint8)}, TypeError, "floating point .*got torch.uint8"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must be \(2, 4\), got \(3, 4\)"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 33, 9]])}, ValueError, "boxes must be XYXY"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 1.5, 9]])}, ValueError, "at least one pixel"),
        ({"contrast": (0.0, 0.1)}, ValueError, r"contrast must be .*got \(0.0, 0.1\)"),
        ({"fill": (0.5, 1.2)}, ValueError, r"fill must be .*got \(0.5, 1.2\)"),
    ],
)
def test_bad_input_is_named(nodules, change, error, match):
    good = {"images": torch.zeros(2, 1, 32, 32), "boxes": torch.tensor([[1.0, 1, 9, 9]] * 2), "generator": draw()}
    with pytest.raises(error, match=match):
        nodules.superimpose(**(good | change))


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({}, "must hold frontal and sagittal, found "),
        ({"frontal": (1, 50, 50)}, "must hold frontal and sagittal, found frontal"),
        ({"frontal": (1, 50, 40), "sagittal": (1, 50, 40)}, r"frontal must be \(N, S, S\), got \(1, 50, 40\)"),
        ({"frontal": (1, 50, 50), "sagittal": (1, 40, 40)}, "must be of one size"),
        ({"frontal": (1, 50, 50), "sagittal": (1, 50, 50)}, "no template"),
    ],
)
def test_bad_archives_are_refused(tmp_path, shapes, match):
    file = tmp_path / "t.npz"
    np.savez(file, **{name: np.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(DataError, match=match):
        CTNodules(file)
    with pytest.raises(ValueError, match="field_mm must be > 0, got 0"):
        CTNodules(file, field_mm=0)
    file.write_bytes(b"nothing")
    for path, words in ((file, "not a readable"), (tmp_path / "none.npz", "no such file")):
        with pytest.raises(DataError, match=words):
            CTNodules(path)


def test_real_templates_keep_most_and_add_roundish_blobs(ct_nodules):
    real = CTNodules(ct_nodules)
    assert 1500 < len(real) < 2358 and real.extents_mm.max() < 48
    boxes = torch.tensor([[20.0, 20.0, 36.0, 36.0]]).repeat(200, 1)
    _, difference = real.superimpose(torch.zeros(200, 1, 56, 56), boxes, draw(), contrast=(0.5, 0.5))
    middle, rim = difference[:, 0, 26:30, 26:30].mean(), difference[:, 0, 20:22, 20:22].mean()
    assert middle > 0.25 and rim < 0.02
