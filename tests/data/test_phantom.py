import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug.data.phantom import PhantomChest, phantom_chest
from carim_aug.ops.findings import FINDINGS


def test_phantom_is_a_float_image_in_range_with_dark_lungs():
    images = torch.stack([phantom_chest(128, seed=s) for s in range(8)])
    assert images.shape == (8, 1, 128, 128) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    mean = images.mean(0)[0]
    lung, spine, abdomen = mean[55:65, 33:39].mean(), mean[60, 62:66].mean(), mean[118:, 60:68].mean()
    assert lung < spine - 0.2 and lung < abdomen - 0.2 and mean[0, 0] < 0.1
    nodule = phantom_chest(128, nodule_box=torch.tensor([40.0, 60.0, 49.0, 69.0])) - images[0]
    assert divmod(int(nodule.argmax()), 128) == (64, 44)  # brightest in its middle


@given(x=st.floats(12, 40), y=st.floats(15, 40), w=st.floats(3, 10), h=st.floats(3, 10), seed=st.integers(0, 2**40))
def test_nodule_changes_only_its_box_and_brightens_it(x, y, w, h, seed):
    difference = (phantom_chest(64, nodule_box=(x, y, x + w, y + h), seed=seed) - phantom_chest(64, seed=seed))[0]
    assert difference.min() >= 0 and difference.max() > 0.02
    rows, columns = torch.nonzero(difference, as_tuple=True)
    assert columns.min() + 1 > x and columns.max() < x + w and rows.min() + 1 > y and rows.max() < y + h


def test_data_set_has_the_promised_number_of_nodules_which_lie_in_dark_lung():
    data = PhantomChest(50, size=32, nodule_fraction=0.3, seed=1)
    assert len(data) == 50 and sum(data.targets) == 15 and data.labels[:, FINDINGS.index("Nodule")].sum() == 15
    assert [len(data.boxes(i)) for i in range(50)] == data.targets
    image, label = data[4]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (1, 32, 32)
    assert label == data.targets[4] and isinstance(label, int)
    data = PhantomChest(20, size=128, nodule_fraction=1.0)
    for i in range(20):
        x1, y1, x2, y2 = data.boxes(i)[0].tolist()
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
        plain = phantom_chest(128, seed=data._seed(i))[0]
        assert plain[int(y1) : int(y2), int(x1) : int(x2)].mean() < plain[120:, 50:78].mean() - 0.05


def test_multilabel_and_detection_targets_and_transforms():
    options = {"size": 32, "nodule_fraction": 0.5}
    many = PhantomChest(4, target="multilabel", transform=v2.Resize(16), **options)
    assert torch.stack(many.targets).sum() == 2 and many[0][1].shape == (14,) and many[0][1].dtype == torch.float32
    assert many[0][0].shape == (1, 16, 16)
    data = PhantomChest(4, target="detection", transform=v2.Resize(64), **options)
    for i in range(4):
        target = data[i][1]
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert torch.allclose(target["boxes"].as_subclass(torch.Tensor), 2 * data.boxes(i))
        assert target["labels"].tolist() == [1] * data.targets[i]


def test_items_do_not_depend_on_order_and_move_no_global_generator():
    data = PhantomChest(6, size=32, nodule_fraction=0.5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    forward = [data[i][0] for i in range(6)]
    backward = [data[i][0] for i in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(data[-1][0], forward[5]) and len(list(data)) == 6
    assert not torch.equal(phantom_chest(32, seed=3), phantom_chest(32, seed=4))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PhantomChest(-1), ValueError, "n must be .*got -1"),
        (lambda: PhantomChest(1, size=8), ValueError, "size must be .*got 8"),
        (lambda: phantom_chest(8), ValueError, "size must be .*got 8"),
        (lambda: PhantomChest(1, nodule_fraction=1.5), ValueError, "nodule_fraction must be .*got 1.5"),
        (lambda: PhantomChest(1, target="class"), ValueError, "target must be .*got 'class'"),
        (lambda: PhantomChest(3, size=16)[3], IndexError, "index 3 is out of range for 3 images"),
        *[
            (lambda box=box: phantom_chest(64, nodule_box=box), ValueError, "nodule_box must be XYXY")
            for box in ((5, 5, 5, 9), (-1, 5, 5, 9), (5, 5, 65, 9), (5, float("nan"), 9, 9))
        ],
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
