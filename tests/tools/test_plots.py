"""Contact sheets, batch sheets and outlines: their sizes, what they say, and pixels known by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import generator, make_mix, prior

from carim_aug import WholeImageGenerator, contrast_gate
from carim_aug.ops.value_range import RangeError
from carim_aug.tools.plots import COLOUR, batch_sheet, contact_sheet, outline, save_picture, stack_pictures

GOLD = torch.tensor(COLOUR, dtype=torch.uint8)
GAP, LINE, COLUMNS = 4, 18, 10
BACKGROUND, GRAFT, ADDED, MASK = 0, 1, 5, 6


def panel(sheet: Image.Image, row: int, column: int, size: int, top: int = LINE) -> Image.Image:
    left, upper = GAP + column * (size + GAP), top + GAP + row * (size + GAP)
    return sheet.crop((left, upper, left + size, upper + size))


def test_a_sheet_has_a_row_per_sample_repeats_and_moves_no_global_random_state():
    before = torch.random.get_rng_state()
    sheet = contact_sheet(make_mix(), n=3, size=40)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sheet.mode == "RGB" and sheet.size == (COLUMNS * 44 + GAP, 3 * 44 + GAP + 2 * LINE)
    assert sheet.info["carim_aug"].startswith("All synthetic; ") and "seed 0" in sheet.info["carim_aug"]
    assert generator().weights_hash[:12] in sheet.info["carim_aug"]
    assert set(panel(sheet, 0, MASK, 40).convert("L").tobytes()) == {0, 255}
    looked = contact_sheet(make_mix(placement="lungs"), n=3, size=40)
    assert contact_sheet((generator(), prior()), n=3, size=40).tobytes() == looked.tobytes() != sheet.tobytes()
    assert contact_sheet(make_mix(), n=3, size=40, seed=6).tobytes() != sheet.tobytes()
    assert contact_sheet(make_mix(), n=3, size=40, twins=False).size[0] == 6 * 44 + GAP


def test_grafts_are_those_of_the_mix_with_its_strength_placement_and_gate():
    real = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    options = {"strength": 3.0, "placement": "prior", "value_range": "symmetric"}
    sheet = contact_sheet(make_mix(**options), real, n=1, size=32, seed=7)
    mix = make_mix(p=1.0, seed=7, **options)
    image, _ = mix(real, torch.zeros(1, dtype=torch.long))  # its key is (7, 0, 0), as that of the first row
    expected = ((image[0, 0] + 1) * 127.5).round().to(torch.uint8)
    assert panel(sheet, 0, GRAFT, 32).convert("L").tobytes() == bytes(expected.flatten().tolist())
    assert panel(sheet, 0, BACKGROUND, 32).tobytes() != panel(sheet, 0, GRAFT, 32).tobytes()
    sheet = contact_sheet(make_mix(gate=contrast_gate(9.0, tries=2)), n=2, size=32)  # passes nothing
    for row in range(2):
        assert panel(sheet, row, BACKGROUND, 32).tobytes() == panel(sheet, row, GRAFT, 32).tobytes()


def test_real_images_are_shown_as_they_are_and_in_turn():
    real = torch.stack([torch.full((64, 64), -1.0), torch.full((64, 64), 1.0)])
    copied = real.clone()
    sheet = contact_sheet(make_mix(), real, n=3, size=32)
    greys = [panel(sheet, row, BACKGROUND, 32).getextrema() for row in range(3)]
    assert greys == [((0, 0),) * 3, ((255, 255),) * 3, ((0, 0),) * 3]
    assert "All synthetic but the real backgrounds" in sheet.info["carim_aug"] and torch.equal(real, copied)
    assert contact_sheet(make_mix(), real[:, None], n=3, size=32).tobytes() == sheet.tobytes()


def test_a_generator_of_zeros_adds_nothing_and_one_of_residuals_is_shown_in_phantoms(residuals_alone):
    still = WholeImageGenerator({**generator().config.to_dict(), "spectral_norm": False})
    for parameter in still.network.parameters():
        parameter.zero_()
    assert panel(contact_sheet((still, prior()), n=1, size=32), 0, ADDED, 32).getextrema() == ((128, 128),) * 3
    sheet = contact_sheet((residuals_alone, prior()), n=1, size=32)
    assert sheet.size[0] == 6 * 36 + GAP and sheet.info["carim_aug"].startswith("Synthetic nodules in phantoms; ")
    assert panel(sheet, 0, ADDED, 32).getextrema() != ((128, 128),) * 3


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
        ({"source": "mix"}, TypeError, "source must be a SyntheticNoduleMix or .*, got str"),
        ({"source": (1, prior())}, TypeError, "generator must have .* got int"),
        ({"source": (generator(), 2)}, TypeError, "prior must be .* got int"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        contact_sheet(**{"source": make_mix(), **change})


def test_outline_draws_a_ring_around_the_box_and_leaves_the_inside():
    image = torch.full((1, 20, 20), 7, dtype=torch.uint8)
    out = outline(image, torch.tensor([[8.0, 8.0, 12.0, 12.0]]), margin=2)
    ring = torch.zeros(20, 20, dtype=torch.bool)
    ring[5:15, 5:15] = True  # the box fills 8 to 11; two pixels between; the ring at 5 and 14
    ring[6:14, 6:14] = False
    assert (out[:, ring] == GOLD[:, None]).all() and (out[:, ~ring] == 7).all() and (image == 7).all()
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(outline(image, torch.zeros(0, 4)), image.repeat(3, 1, 1))
    for bad, box, margin, words in (
        (image.repeat(2, 1, 1), [0.0, 0.0, 9.0, 9.0], 2, "image must be .* got .2, 16, 16."),
        (image.float(), [0.0, 0.0, 9.0, 9.0], 2, "uint8, got .*32"),
        (image, [5.0, 5.0, 40.0, 9.0], 2, "inside the image"),
        (image, [0.0, 0.0, 9.0, 9.0], -1, "margin must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            outline(bad, torch.tensor([box]), margin=margin)


@given(x=st.floats(0, 27), y=st.floats(0, 27), width=st.floats(1, 5), height=st.floats(1, 5), margin=st.integers(0, 4))
def test_outline_never_touches_what_is_inside(x, y, width, height, margin):
    box = torch.tensor([[x, y, x + width, y + height]])
    out = outline(torch.zeros(3, 40, 40, dtype=torch.uint8), box, margin=margin)
    x1, y1, x2, y2 = box[0].tolist()
    inside = out[:, int(y1) + (y1 < 1) : int(y2), int(x1) + (x1 < 1) : int(x2)]
    assert (inside == 0).all() or min(x1, y1) < margin + 1  # at the image's edge the ring is drawn on the edge
    assert (out == GOLD[:, None, None]).all(0).any()


def test_batch_sheet_frames_the_synthetic_images_only_in_any_range_and_channels():
    mix = make_mix(p=0.5, seed=1)
    images, _ = mix(torch.full((6, 1, 32, 32), 100, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    synthetic = mix.last_params.synthetic.tolist()
    assert 0 < sum(synthetic) < 6
    sheet = batch_sheet(images, mix.last_params, size=40, per_row=4)
    assert sheet.size == (4 * 44 + GAP, 2 * 44 + GAP + LINE)
    for i, framed in enumerate(synthetic):
        corner = panel(sheet, i // 4, i % 4, 40, top=0).getpixel((39, 39))
        assert corner == (COLOUR if framed else (100, 100, 100))
    with pytest.raises(ValueError, match="params must be of 2 images, got 6"):
        batch_sheet(images[:2], mix.last_params)
    with pytest.raises(ValueError, match="per_row must be at least 1, got 0"):
        batch_sheet(images, mix.last_params, per_row=0)
    mix = make_mix(p=1.0, value_range="imagenet")
    images, _ = mix(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    assert batch_sheet(images, mix.last_params, value_range="imagenet", size=32).size == (2 * 36 + GAP, 36 + GAP + LINE)


def test_pictures_are_stacked_and_say_in_their_file_what_they_are(tmp_path):
    both = stack_pictures(Image.new("RGB", (10, 4), "red"), Image.new("RGB", (6, 3), "blue"))
    assert both.size == (10, 7)
    assert [both.getpixel(at) for at in ((9, 3), (5, 6), (9, 6))] == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
    both.info["carim_aug"] = "synthetic"
    save_picture(both, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as again:
        assert again.text["carim_aug"] == "synthetic" and again.tobytes() == both.tobytes()
    with pytest.raises(ValueError, match="must end with .png"):
        save_picture(both, tmp_path / "sheet.jpg")
