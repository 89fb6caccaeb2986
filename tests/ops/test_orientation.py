"""The usual view told from others: on drawn and generated chests always, on real ones where they are at hand."""

import shutil

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from carim_aug import WholeImageGenerator
from carim_aug.data import ChestXray14
from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.orientation import REASONS, WEIGHTS, usual_view, view_chances

NOTHING = "lateral or no chest"
FOUND = [  # by eye; none of them was fitted on
    ("val", "00003490_011.png", "upside down"),
    ("train", "00017625_000.png", "inverted"),
    ("train", "00017999_000.png", "inverted"),
    ("train", "00009683_005.png", NOTHING),  # the only lateral view
]


def white_lung(images):
    """The lung on the image's right is as bright as the spine."""
    height, width = images.shape[2:]
    rows, columns = slice(height // 6, height * 9 // 10), slice(width // 2, width * 9 // 10)
    images = images.clone()
    images[:, :, rows, columns] = images[:, :, rows, columns].clamp(min=0.8)
    return images


WRONG = {
    "inverted": (lambda x: x.max() - x, {"inverted"}),
    "mirrored top to bottom": (lambda x: x.flip(2), {"upside down"}),
    "turned by 180": (lambda x: x.flip(2, 3), {"upside down"}),
    "turned by 90": (lambda x: x.rot90(1, (2, 3)), {"rotated", "transposed"}),
    "turned by 270": (lambda x: x.rot90(3, (2, 3)), {"rotated", "transposed"}),
    "rows for columns": (lambda x: x.transpose(2, 3), {"rotated", "transposed"}),
}
USUAL = {
    "as it is": lambda x: x,
    "mirrored": lambda x: x.flip(3),
    "turned by 10": lambda x: v2.functional.rotate(x, 10, v2.InterpolationMode.BILINEAR),
    "turned by -10": lambda x: v2.functional.rotate(x, -10, v2.InterpolationMode.BILINEAR),
    "0.6 of the area": lambda x: v2.functional.center_crop(x, [round(0.775 * side) for side in x.shape[2:]]),
    "gamma 0.5": lambda x: x**0.5,
    "gamma 2": lambda x: x**2,
    "black border": lambda x: F.pad(x, [x.shape[3] // 8] * 4),
    "64 pixels": lambda x: F.interpolate(x, (64, 64), mode="area"),
    "a white lung": white_lung,
}


def phantoms(size=128, n=16):
    return torch.stack([phantom_chest(size, seed=seed) for seed in range(n)])


@pytest.fixture(scope="module")
def real(real_data):
    """Every second validation image, (194, 1, 256, 256) in [0, 1], less one that is upside down in the data set."""
    data = ChestXray14(real_data, split="val")
    chosen = [i for i in range(0, len(data), 2) if data.filenames[i] != FOUND[0][1]]
    return torch.stack([torch.as_tensor(data[i][0]) for i in chosen]) / 255


@pytest.mark.parametrize("change", USUAL.values(), ids=USUAL)
def test_phantoms_in_the_usual_view_pass(change):
    assert usual_view(change(phantoms())) == [None] * 16


@pytest.mark.parametrize(("change", "reasons"), WRONG.values(), ids=WRONG)
def test_phantoms_in_another_view_are_rejected_for_the_reason(change, reasons):
    found = usual_view(change(phantoms()))
    assert None not in found and sum(reason in reasons for reason in found) >= 15


@pytest.mark.parametrize("change", USUAL.values(), ids=USUAL)
def test_real_images_in_the_usual_view_pass(real, change):
    assert sum(reason is not None for reason in usual_view(change(real))) <= 1


@pytest.mark.parametrize(("change", "reasons"), WRONG.values(), ids=WRONG)
def test_real_images_in_another_view_are_rejected_for_the_reason(real, change, reasons):
    assert sum(reason in reasons for reason in usual_view(change(real))) >= 0.97 * len(real)


@pytest.mark.parametrize(("split", "name", "reason"), FOUND)
def test_unusual_views_within_the_data_set_are_found(real_data, split, name, reason):
    data = ChestXray14(real_data, split=split)
    assert usual_view(torch.as_tensor(data[data.filenames.index(name)][0])[None]) == [reason]


def test_generated_images_pass_and_turned_ones_do_not():
    generator = WholeImageGenerator.from_pretrained()
    masks = torch.zeros(8, 1, 128, 128)
    masks[:4, :, 50:60, 30:40] = 1
    images = generator.images(masks, range(8))
    assert usual_view(images) == [None] * 8
    assert usual_view(images.flip(2)) == ["upside down"] * 8 and usual_view(-images) == ["inverted"] * 8


def test_noise_flat_images_gradients_and_small_parts_of_a_chest_are_no_chest():
    noise = torch.Generator().manual_seed(0)
    assert usual_view(torch.rand(8, 1, 224, 224, generator=noise)) == [NOTHING] * 8
    assert usual_view(torch.randn(8, 1, 64, 64, generator=noise)) == [NOTHING] * 8
    assert usual_view(torch.tensor([0.0, 0.3, 1.0, 255.0]).view(4, 1, 1, 1).expand(4, 1, 100, 90)) == [NOTHING] * 4
    ramp = torch.linspace(0, 1, 128).expand(1, 1, 128, 128)
    assert usual_view(torch.cat([ramp, ramp.mT, ramp.flip(3), ramp.mT.flip(2)])) == [NOTHING] * 4
    parts = usual_view(phantoms()[:, :, 32:64, 32:64])
    assert None not in parts and parts.count(NOTHING) >= 12


def test_values_that_are_not_finite_are_no_chest_and_change_no_other_image():
    images = phantoms(64, 4)
    images[1, 0, 5, 5], images[2, 0, 60, 60] = torch.nan, -torch.inf
    assert usual_view(images) == [None, NOTHING, NOTHING, None]
    assert view_chances(images)[1:3].tolist() == [[0, 0, 0, 0, 0, 1]] * 2


def test_chances_sum_to_one_and_depend_on_neither_range_nor_dtype_nor_size_nor_batch():
    images = torch.cat([phantoms(256, 6), phantoms(256, 6).flip(2)])
    chances = view_chances(images)
    assert chances.shape == (12, 1 + len(REASONS)) and chances.dtype == torch.float32
    torch.testing.assert_close(chances.sum(1), torch.ones(12))
    for same in (images * 2048 - 1024, images.double() / 20, images.requires_grad_()):
        torch.testing.assert_close(view_chances(same), chances, atol=1e-4, rtol=0)
        assert not view_chances(same).requires_grad
    for nearly in ((images * 255).to(torch.uint8), (images * 4095).to(torch.int16), images.half()):
        torch.testing.assert_close(view_chances(nearly), chances, atol=0.05, rtol=0)
    large = F.interpolate(images.detach(), scale_factor=4)  # of which every fourth pixel is looked at
    torch.testing.assert_close(view_chances(large), chances, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat([view_chances(image[None]) for image in images]), chances, atol=1e-5, rtol=0)
    with torch.autocast("cpu"):
        torch.testing.assert_close(view_chances(images), chances, atol=1e-5, rtol=0)
    assert usual_view(images[:0]) == [] and view_chances(images[:0]).shape == (0, 6)


def test_threshold_is_the_chance_below_which_an_image_is_rejected():
    images = torch.cat([phantoms(64, 3), phantoms(64, 3).flip(2), torch.zeros(1, 1, 64, 64)])
    usual = view_chances(images)[:, 0]
    for threshold in (0, 0.3, 0.8, 1):
        rejected = [reason is not None for reason in usual_view(images, threshold=threshold)]
        assert rejected == (usual < threshold).tolist()


@pytest.mark.parametrize(
    ("images", "threshold", "error", "words"),
    [
        (torch.zeros(1, 3, 64, 64), 0.2, ValueError, r"images must be \(B, 1, H, W\), got \(1, 3, 64, 64\)"),
        (torch.zeros(1, 64, 64), 0.2, ValueError, r"got \(1, 64, 64\)"),
        (torch.zeros(1, 1, 0, 64), 0.2, ValueError, r"got \(1, 1, 0, 64\)"),
        (torch.zeros(1, 1, 64, 64).bool(), 0.2, TypeError, "images must be a tensor of real numbers, got torch.bool"),
        (torch.zeros(1, 1, 64, 64).cfloat(), 0.2, TypeError, "got torch.complex64"),
        (torch.zeros(1, 1, 64, 64).numpy(), 0.2, TypeError, "got ndarray"),
        (torch.zeros(1, 1, 64, 64), 1.5, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        (torch.zeros(1, 1, 64, 64), float("nan"), ValueError, "got nan"),
    ],
)
def test_bad_input_is_named(images, threshold, error, words):
    with pytest.raises(error, match=words):
        usual_view(images, threshold=threshold)


def test_damaged_weights_are_named(tmp_path):
    path = tmp_path / "views.safetensors"
    shutil.copy(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="views.safetensors must be as it was written"):
        usual_view(phantoms(64, 1), weights=path)
