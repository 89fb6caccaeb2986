"""Contact sheets, batch sheets and outlines: their sizes, what they say, and pixels known by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.value_range import RangeError
from carim_aug.tools.plots import COLOUR, batch_sheet, contact_sheet, outline, save_picture, stacked
from carim_aug.transforms.mix import SyntheticNoduleMix

GOLD = torch.tensor(COLOUR, dtype=torch.uint8)
GAP, LINE, COLUMNS = 4, 18, 9


@pytest.fixture(scope="module")
def pair():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoduleGenerator("tiny").eval(), LocationPrior.bundled()


def panel(sheet: Image.Image, row: int, column: int, size: int, top: int = LINE) -> Image.Image:
    left, upper = GAP + column * (size + GAP), top + GAP + row * (size + GAP)
    return sheet.crop((left, upper, left + size, upper + size))


def test_sheet_without_real_images_has_a_row_per_sample(pair):
    sheet = contact_sheet(pair, n=3, size=40)
    assert sheet.mode == "RGB"
    assert sheet.size == (COLUMNS * 44 + GAP, 3 * 44 + GAP + 2 * LINE)
    assert sheet.info["carim_aug"].startswith("All synthetic; ")
    assert pair[0].weights_hash[:12] in sheet.info["carim_aug"] and "seed 0" in sheet.info["carim_aug"]


def test_a_mix_and_its_parts_give_the_same_sheet(pair):
    mix = SyntheticNoduleMix(*pair, p=0.5)
    assert contact_sheet(mix, n=2, size=32).tobytes() == contact_sheet(pair, n=2, size=32).tobytes()


def test_same_seed_same_sheet_and_another_seed_another(pair):
    first = contact_sheet(pair, n=2, size=32, seed=5).tobytes()
    assert contact_sheet(pair, n=2, size=32, seed=5).tobytes() == first
    assert contact_sheet(pair, n=2, size=32, seed=6).tobytes() != first


def test_real_images_are_shown_as_they_are_and_in_turn(pair):
    real = torch.stack([torch.full((64, 64), -1.0), torch.full((64, 64), 1.0)])
    kept = real.clone()
    sheet = contact_sheet(pair, real, n=3, size=32)
    assert [panel(sheet, row, 0, 32).getextrema() for row in range(3)] == [
        ((0, 0),) * 3,
        ((255, 255),) * 3,
        ((0, 0),) * 3,
    ]
    assert "All synthetic but the column 'real'" in sheet.info["carim_aug"]
    assert torch.equal(real, kept)
    assert contact_sheet(pair, real[:, None], n=3, size=32).tobytes() == sheet.tobytes()


def test_mask_panel_is_black_and_white_with_the_box_in_white(pair):
    masks = panel(contact_sheet(pair, n=1, size=32), 0, 1, 32)
    values = set(masks.convert("L").tobytes())
    assert values == {0, 255}


def test_difference_is_grey_where_nothing_changed(pair):
    # A generator of zeros ignores its mask.
    generator = NoduleGenerator({**pair[0].config.to_dict(), "spectral_norm": False}).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
    sheet = contact_sheet((generator, pair[1]), n=1, size=32)
    assert panel(sheet, 0, 5, 32).getextrema() == ((128, 128),) * 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"size": 8}, ValueError, "size must be at least 32, got 8"),
        ({"real": torch.zeros(0, 1, 64, 64)}, ValueError, "real must be"),
        ({"real": torch.zeros(2, 3, 64, 64)}, ValueError, r"got \(2, 3, 64, 64\)"),
        ({"real": torch.zeros(2, 64, 64, dtype=torch.uint8)}, ValueError, "floating point"),
        ({"real": torch.full((1, 64, 64), 200.0)}, RangeError, "real must lie in"),
        ({"real": [[0.0]]}, TypeError, "real must be a tensor"),
    ],
)
def test_bad_arguments_are_named(pair, change, error, words):
    with pytest.raises(error, match=words):
        contact_sheet(pair, **change)


@pytest.mark.parametrize("source", ["mix", (1, 2), None])
def test_another_source_is_refused(source):
    with pytest.raises(TypeError, match="source must be a SyntheticNoduleMix or a pair"):
        contact_sheet(source)


def test_outline_draws_a_ring_around_the_box_and_leaves_the_inside():
    image = torch.full((1, 20, 20), 7, dtype=torch.uint8)
    out = outline(image, torch.tensor([[8.0, 8.0, 12.0, 12.0]]), margin=2)
    ring = torch.zeros(20, 20, dtype=torch.bool)
    ring[5:15, 5:15] = True  # the box fills 8 to 11; two pixels between; the ring at 5 and 14
    ring[6:14, 6:14] = False
    assert (out[:, ring] == GOLD[:, None]).all()
    assert (out[:, ~ring] == 7).all()
    assert (image == 7).all()


def test_outline_of_no_box_is_the_image_in_three_channels():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(outline(image, torch.zeros(0, 4)), image.repeat(3, 1, 1))


@given(x=st.floats(0, 27), y=st.floats(0, 27), width=st.floats(1, 5), height=st.floats(1, 5), margin=st.integers(0, 4))
@settings(deadline=None, max_examples=50)
def test_outline_never_touches_what_is_inside(x, y, width, height, margin):
    box = torch.tensor([[x, y, x + width, y + height]])
    out = outline(torch.zeros(3, 40, 40, dtype=torch.uint8), box, margin=margin)
    x1, y1, x2, y2 = box[0].tolist()
    inside = out[:, int(y1) + (y1 < 1) : int(y2), int(x1) + (x1 < 1) : int(x2)]
    assert (inside == 0).all() or min(x1, y1) < margin + 1  # at the image's edge the ring is drawn on the edge
    assert (out == GOLD[:, None, None]).all(0).any()


@pytest.mark.parametrize(
    ("image", "boxes", "words"),
    [
        (torch.zeros(2, 20, 20, dtype=torch.uint8), torch.zeros(0, 4), "image must be"),
        (torch.zeros(1, 20, 20), torch.zeros(0, 4), "uint8"),
        (torch.zeros(1, 20, 20, dtype=torch.uint8), torch.tensor([[5.0, 5.0, 4.0, 9.0]]), "x1 < x2"),
        (torch.zeros(1, 20, 20, dtype=torch.uint8), torch.tensor([[5.0, 5.0, 40.0, 9.0]]), "inside the image"),
    ],
)
def test_outline_refuses_bad_images_and_boxes(image, boxes, words):
    with pytest.raises(ValueError, match=words):
        outline(image, boxes)


def test_batch_sheet_frames_the_synthetic_slots_only(pair):
    mix = SyntheticNoduleMix(*pair, p=0.5, seed=1)
    images, _ = mix(torch.full((6, 1, 32, 32), 100, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    synthetic = mix.last_params.synthetic.tolist()
    assert 0 < sum(synthetic) < 6
    sheet = batch_sheet(images, mix.last_params, size=40, per_row=4)
    assert sheet.size == (4 * 44 + GAP, 2 * 44 + GAP + LINE)
    for i, framed in enumerate(synthetic):
        corner = panel(sheet, i // 4, i % 4, 40, top=0).getpixel((39, 39))
        assert corner == (COLOUR if framed else (100, 100, 100))


def test_batch_sheet_of_three_channels_and_another_range(pair):
    mix = SyntheticNoduleMix(*pair, p=1.0, value_range="imagenet")
    images, _ = mix(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    assert batch_sheet(images, mix.last_params, value_range="imagenet", size=32).size == (2 * 36 + GAP, 36 + GAP + LINE)


def test_batch_sheet_refuses_params_of_another_batch(pair):
    mix = SyntheticNoduleMix(*pair)
    images, _ = mix(torch.zeros(3, 1, 32, 32), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="params must be of 2 slots"):
        batch_sheet(images[:2], mix.last_params)
    with pytest.raises(ValueError, match="size must be at least 32"):
        batch_sheet(images, mix.last_params, size=4)


def test_stacked_puts_one_below_the_other():
    both = stacked(Image.new("RGB", (10, 4), "red"), Image.new("RGB", (6, 3), "blue"))
    assert both.size == (10, 7)
    assert both.getpixel((9, 3)) == (255, 0, 0) and both.getpixel((5, 6)) == (0, 0, 255)
    assert both.getpixel((9, 6)) == (255, 255, 255)


def test_saved_picture_says_in_its_file_what_it_is(pair, tmp_path):
    sheet = contact_sheet(pair, n=1, size=32)
    save_picture(sheet, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as again:
        assert again.text["carim_aug"] == sheet.info["carim_aug"]
        assert again.tobytes() == sheet.tobytes()
    with pytest.raises(ValueError, match="must end with .png"):
        save_picture(sheet, tmp_path / "sheet.jpg")


def test_sheets_move_no_global_random_state(pair):
    before = torch.random.get_rng_state()
    contact_sheet(pair, n=1, size=32)
    assert torch.equal(torch.random.get_rng_state(), before)
