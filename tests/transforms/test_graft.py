import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generator, prior

from carim_aug.generators.render import Renderer
from carim_aug.labels.policy import LabelPolicy
from carim_aug.ops.boxes import feather
from carim_aug.ops.images import resize
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.graft import graft, insert, relabel
from carim_aug.transforms.plan import NO_BOXES, Planner, Slot

RENDERER = Renderer(generator())
CPU = torch.device("cpu")
RANGES = {
    torch.uint8: ["auto"],
    torch.float32: ["auto", "symmetric", "xrv", "imagenet", (0, 4095), {"mean": 0.5, "std": 0.25}],
    torch.float64: ["auto", "xrv"],
    torch.float16: ["auto", "symmetric"],
    torch.bfloat16: ["auto", "imagenet"],
}


def slot(*boxes, name="Nodule", index=0):
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4) if boxes else NO_BOXES
    return Slot((0, 0, index), name, 17 + index, array, index)


def planned(n, chance, seed):
    planner = Planner(prior(), seed=seed, nodule="Nodule", chances={"Nodule": chance})
    return [planner.decide((seed, 0, i), i, eligible=True) for i in range(n)]


@st.composite
def batches(draw):
    """Images in their range, of any size, type and number of channels, and slots for them."""
    dtype = draw(st.sampled_from(list(RANGES)))
    spec = draw(st.sampled_from(RANGES[dtype]))
    n, channels = draw(st.integers(1, 4)), 3 if spec == "imagenet" else draw(st.sampled_from([1, 3]))
    height, width = draw(st.integers(16, 70)), draw(st.integers(16, 70))
    seed = draw(st.integers(0, 2**32))
    random = torch.Generator().manual_seed(seed)
    plain = torch.rand(n, 1, height, width, generator=random) * 2 - 1
    ranged = ValueRange.of(spec)
    images = ranged.from_symmetric(plain, channels=channels, dtype=dtype)
    return images, planned(n, draw(st.sampled_from([0.0, 0.5, 1.0])), seed), ranged


@settings(deadline=None, max_examples=150)
@given(batches())
def test_whole_fills_synthetic_slots_and_leaves_the_others_alone(case):
    images, slots, ranged = case
    before = images.clone()
    mixed = insert(images, slots, insertion="whole", renderer=RENDERER, value_range=ranged)
    assert torch.equal(images, before) and mixed.shape == images.shape and mixed.dtype == images.dtype
    places = [i for i, s in enumerate(slots) if s.synthetic]
    if not places:
        assert mixed is images
        return
    for i, s in enumerate(slots):
        assert torch.equal(mixed[i], images[i]) is not s.synthetic
    generated = resize(RENDERER.whole([slots[i] for i in places], CPU), images.shape[-2:])
    expected = ranged.from_symmetric(generated, channels=images.shape[1], dtype=images.dtype)
    assert torch.equal(mixed[places], expected)
    ranged.check(mixed)


@settings(deadline=None, max_examples=150)
@given(batches())
def test_graft_differs_from_the_real_image_only_where_the_feathered_mask_is_above_zero(case):
    images, slots, ranged = case
    before, size = images.clone(), tuple(images.shape[-2:])
    mixed = insert(images, slots, insertion="graft", renderer=RENDERER, value_range=ranged)
    assert torch.equal(images, before) and mixed.shape == images.shape and mixed.dtype == images.dtype
    weight = feather([s.boxes_at(*size) for s in slots], size).expand_as(images)
    assert torch.equal(mixed[weight == 0], images[weight == 0])
    ranged.check(mixed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_graft_adds_the_scaled_difference_by_hand(dtype):
    chosen = [slot([0.25, 0.25, 0.5, 0.5])]
    ranged, size = ValueRange.of("auto"), (64, 48)
    images = (
        torch.full((1, 3, *size), 100, dtype=torch.uint8) if dtype == torch.uint8 else torch.full((1, 3, *size), 0.4)
    )
    difference = torch.zeros(1, 1, 32, 32)
    difference[:, :, 8:16, 8:16] = 0.5  # a quarter of the span of 2
    mixed = graft(images, difference, chosen, ranged)
    centre = mixed[0, :, 24, 18]
    assert (
        torch.equal(centre, torch.tensor([164] * 3, dtype=torch.uint8))
        if dtype == torch.uint8
        else (torch.allclose(centre, torch.tensor(0.65)))
    )
    assert torch.equal(mixed[0, :, 60, 40], images[0, :, 60, 40])


def test_graft_is_clamped_to_the_range_and_only_where_it_changed():
    chosen = [slot([0.25, 0.25, 0.5, 0.5])]
    images = torch.full((1, 1, 32, 32), 0.9)
    images[..., 31] = 1.1  # overshoots a little, as a bicubic resize does
    mixed = graft(images, torch.full((1, 1, 32, 32), 1.0), chosen, ValueRange.of("unit"))
    assert mixed[..., 12, 12] == 1 and (mixed[..., 31] == 1.1).all()


def test_a_slot_without_boxes_grafts_nothing():
    images = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    mixed = insert(images, [slot()], insertion="graft", renderer=RENDERER, value_range=ValueRange.of("unit"))
    assert torch.equal(mixed, images)


def test_three_channels_get_the_same_pixels():
    for insertion in ("whole", "graft"):
        images = torch.full((2, 3, 40, 30), 0.5)
        mixed = insert(
            images, planned(2, 1.0, 0), insertion=insertion, renderer=RENDERER, value_range=ValueRange.of("unit")
        )
        assert torch.equal(mixed[:, 0], mixed[:, 1]) and torch.equal(mixed[:, 0], mixed[:, 2])


def test_a_gradient_flows_through_the_real_pixels():
    images = torch.full((2, 1, 32, 32), 0.5, requires_grad=True)
    chosen = [slot([0.2, 0.2, 0.4, 0.4]), Slot((0, 0, 1), None, 0, NO_BOXES, 1)]
    insert(images, chosen, insertion="whole", renderer=RENDERER, value_range=ValueRange.of("unit")).sum().backward()
    assert images.grad is not None
    assert (images.grad[0] == 0).all() and (images.grad[1] == 1).all()


def test_resize_keeps_what_has_the_size_and_is_exact_on_constants():
    images = torch.full((2, 1, 32, 32), 0.25)
    assert resize(images, (32, 32)) is images
    for size in ((16, 16), (100, 73), (224, 224)):
        assert torch.allclose(resize(images, size), torch.full((2, 1, *size), 0.25))


def test_labels_follow_their_slots():
    slots = [slot(name=None), slot(name="Nodule"), slot(name="No Finding")]
    labels = torch.tensor([1, 0, 1])
    policy = LabelPolicy().resolve(labels)
    assert relabel(labels, slots, insertion="whole", policy=policy).tolist() == [1, 1, 0] and labels.tolist() == [
        1,
        0,
        1,
    ]
    assert relabel(labels, slots[:1] * 3, insertion="whole", policy=policy) is labels

    rows = torch.zeros(3, 14)
    rows[:, 2], rows[1, 13], rows[2, 5] = 1, torch.nan, 1
    policy = LabelPolicy().resolve(rows, batch=True)
    whole = relabel(rows, slots, insertion="whole", policy=policy)
    assert torch.equal(whole[0], rows[0]) and whole[1].nansum() == 1 and whole[1, 5] == 1 and whole[1, 13].isnan()
    assert whole[2].sum() == 0
    grafted = relabel(rows.numpy(), slots[:2] + slots[:1], insertion="graft", policy=policy)
    assert isinstance(grafted, np.ndarray) and grafted[1, 2] == 1 and grafted[1, 5] == 1 and np.isnan(grafted[1, 13])
