import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.phantom import PhantomChest, phantom_chest


def test_phantom_is_a_float_image_in_range():
    film = phantom_chest(64)
    assert film.shape == (1, 64, 64) and film.dtype == torch.float32
    assert film.min() >= 0 and film.max() <= 1


def test_lungs_are_darker_than_spine_and_abdomen_and_outside_is_black():
    film = torch.stack([phantom_chest(128, seed=s) for s in range(8)]).mean(0)[0]
    lung, spine, abdomen, corner = (
        film[55:65, 33:39].mean(),
        film[60, 62:66].mean(),
        film[118:, 60:68].mean(),
        film[0, 0],
    )
    assert lung < spine - 0.2 and lung < abdomen - 0.2 and corner < 0.1


def test_same_seed_same_chest_other_seed_other_chest():
    assert torch.equal(phantom_chest(48, seed=3), phantom_chest(48, seed=3))
    assert not torch.equal(phantom_chest(48, seed=3), phantom_chest(48, seed=4))


@given(x=st.floats(12, 40), y=st.floats(15, 40), w=st.floats(3, 10), h=st.floats(3, 10), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=30)
def test_nodule_changes_only_its_box_and_brightens_it(x, y, w, h, seed):
    difference = (phantom_chest(64, nodule_box=(x, y, x + w, y + h), seed=seed) - phantom_chest(64, seed=seed))[0]
    assert difference.min() >= 0 and difference.max() > 0.02
    rows, columns = torch.nonzero(difference, as_tuple=True)
    assert columns.min() + 1 > x and columns.max() < x + w and rows.min() + 1 > y and rows.max() < y + h


def test_nodule_is_brightest_in_its_middle():
    box = torch.tensor([20.0, 20.0, 29.0, 29.0])
    difference = (phantom_chest(64, nodule_box=box) - phantom_chest(64))[0]
    assert divmod(int(difference.argmax()), 64) == (24, 24)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (-1, 5, 5, 9), (5, 5, 65, 9), (5, float("nan"), 9, 9)])
def test_bad_nodule_box_is_refused(box):
    with pytest.raises(ValueError, match="nodule_box must be XYXY"):
        phantom_chest(64, nodule_box=box)


def test_data_set_has_the_promised_number_of_nodules():
    data = PhantomChest(50, size=32, nodule_fraction=0.3, seed=1)
    assert len(data) == 50 and sum(data.targets) == 15 and data.labels[:, FINDINGS.index("Nodule")].sum() == 15
    assert [len(data.boxes(i)) for i in range(50)] == data.targets
    image, label = data[4]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (1, 32, 32)
    assert label == data.targets[4] and isinstance(label, int)


def test_nodules_of_the_data_set_lie_in_dark_lung():
    data = PhantomChest(60, size=128, nodule_fraction=1.0)
    for i in range(60):
        x1, y1, x2, y2 = data.boxes(i)[0].tolist()
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
        plain = phantom_chest(128, seed=data._seed(i))[0]
        assert plain[int(y1) : int(y2), int(x1) : int(x2)].mean() < plain[120:, 50:78].mean() - 0.05


def test_multilabel_and_detection_targets():
    many = PhantomChest(4, size=32, nodule_fraction=0.5, target="multilabel")
    assert torch.stack(many.targets).sum() == 2 and many[0][1].shape == (14,) and many[0][1].dtype == torch.float32
    data = PhantomChest(4, size=32, nodule_fraction=0.5, target="detection")
    for i in range(4):
        target = data[i][1]
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), data.boxes(i))
        assert target["labels"].tolist() == [1] * data.targets[i]


def test_transform_is_applied():
    image, _ = PhantomChest(2, size=32, transform=v2.Resize(16))[0]
    assert image.shape == (1, 16, 16)
    _, target = PhantomChest(1, size=32, nodule_fraction=1, target="detection", transform=v2.Resize(64))[0]
    assert torch.allclose(target["boxes"], 2 * PhantomChest(1, size=32, nodule_fraction=1).boxes(0))


def test_items_do_not_depend_on_order_and_move_no_global_generator():
    data = PhantomChest(6, size=32, nodule_fraction=0.5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    forward = [data[i][0] for i in range(6)]
    backward = [data[i][0] for i in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(data[-1][0], forward[5])
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_iteration_ends():
    assert len(list(PhantomChest(3, size=16))) == 3
    with pytest.raises(IndexError, match="index 3 is out of range for 3 images"):
        PhantomChest(3, size=16)[3]


@pytest.mark.parametrize(
    ("n", "options", "match"),
    [
        (-1, {}, "n must be"),
        (1, {"size": 8}, "size must be"),
        (1, {"nodule_fraction": 1.5}, "nodule_fraction must be"),
        (1, {"target": "class"}, "target must be"),
    ],
)
def test_bad_arguments_are_refused(n, options, match):
    with pytest.raises(ValueError, match=match):
        PhantomChest(n, **options)
    with pytest.raises(ValueError, match="size must be at least 16, got 8"):
        phantom_chest(8)


def test_a_phantom_of_128_pixels_takes_a_few_milliseconds_of_one_core():
    data = PhantomChest(20, nodule_fraction=1)
    times = []
    for i in range(20):
        start = time.thread_time()
        data[i]
        times.append(time.thread_time() - start)
    assert min(times) < 0.005
