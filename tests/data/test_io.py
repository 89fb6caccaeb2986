"""Image files and tables as they are met on disk: read, or named with file, line and column."""

import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carim_aug.data.boxes_csv import BoxCSV
from carim_aug.data.chestxray14_tables import read_boxes, read_entries
from carim_aug.data.io import DataError, read_grey, read_rows, read_size

ENTRIES = ("Image Index", "Finding Labels", "Patient ID", "View Position")
BOXES = ("Image Index", "Finding Label", "x", "y", "w", "h")
CORNERS = ("image", "x1", "y1", "x2", "y2", "label")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one image and, test by test, one table."""
    folder = tmp_path_factory.mktemp("bad")
    Image.new("L", (64, 64), 9).save(folder / "a.png")
    return folder


def write(path, header, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def encode(form):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


ENCODED = {"png": encode("PNG"), "jpg": encode("JPEG"), "bmp": encode("BMP")}


# --- Tables ---
@pytest.mark.parametrize(
    ("columns", "name", "read"),
    [
        (ENTRIES, "Data_Entry_2017.csv", lambda path: read_entries(path.parent)),
        (BOXES, "boxes.csv", read_boxes),
    ],
)
def test_a_table_without_a_column_is_named_with_the_column(root, columns, name, read):
    for lost in columns:
        header = ["note", *(column for column in reversed(columns) if column != lost)]
        path = write(root / name, header, ["1"] * len(header))
        with pytest.raises(DataError, match=rf"{name}: no column '{lost}'; columns found: 'note'"):
            read(path)


@given(st.floats(0, 32), st.floats(1, 16), st.data())
def test_a_bad_box_in_a_table_is_named_with_file_and_line(root, place, side, data):
    numbers = st.sampled_from([math.nan, math.inf, -math.inf, "", "x", "1,5", "--1"])
    index, value = data.draw(
        st.one_of(
            st.tuples(st.sampled_from([2, 3]), st.floats(-1000, 0)),  # no width or height
            st.tuples(st.sampled_from([0, 1]), st.floats(-1e4, -5) | st.floats(1040, 1e4)),  # outside
            st.tuples(st.integers(0, 3), numbers),
        )
    )
    x, y, w, h = box = [place, place, side, side][:index] + [value] + [place, place, side, side][index + 1 :]
    path = write(root / "boxes.csv", BOXES, ("a.png", "Nodule", 10, 10, 30, 30), ("b.png", "Nodule", *box))
    with pytest.raises(DataError, match=r"boxes.csv, line 3: (box must|[xywh] must be a number, got)"):
        read_boxes(path)
    corners = box if isinstance(value, str) else (x, y, x + w, y + h)
    path = write(root / "corners.csv", CORNERS, ("a.png", *corners, "Nodule"))
    with pytest.raises(DataError, match=r"corners.csv, line 2: (box must|[xy][12] (must be a number|is empty))"):
        BoxCSV(root, path)[0]


@given(st.text(max_size=12).filter(lambda text: text.strip() and not set(text) & set('",\r\n\x00|')))
def test_an_unknown_finding_is_named_with_file_and_line(root, finding):
    write(root / "Data_Entry_2017.csv", ENTRIES, ("a.png", f"Nodule|{finding}x", "1", "PA"))
    with pytest.raises(DataError, match="Data_Entry_2017.csv, line 2: unknown finding "):
        read_entries(root)


def test_tables_that_are_no_text_or_not_there_are_named(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"a,b\n\xff\xfe\x00,1\n")
    for name, words in (("bad.csv", "bad.csv: unreadable table"), ("none.csv", "none.csv: no such file")):
        with pytest.raises(DataError, match=words):
            list(read_rows(tmp_path / name, ["a"]))


# --- Images ---
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_as_8(tmp_path, suffix):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    pixels = read_grey(tmp_path / f"deep.{suffix}")[0].flatten()
    assert pixels[0] == 0 and pixels[-1] == 255 and pixels[257 * 100] == 100
    assert bool((pixels.int().diff() >= 0).all())


def test_colour_is_read_as_grey_and_the_size_from_the_header(tmp_path):
    path = tmp_path / "colour.png"
    Image.new("RGBA", (64, 32), (90, 90, 90, 255)).save(path)
    image = read_grey(path)
    assert image.shape == (1, 32, 64) and int(image.max()) == int(image.min()) == 90
    assert read_size(path) == (32, 64)


@given(st.sampled_from(sorted(ENCODED)), st.floats(0, 0.6), st.binary(max_size=64), st.booleans())
def test_an_unreadable_image_is_named(root, suffix, share, noise, cut):
    path = root / f"bad.{suffix}"
    path.write_bytes(ENCODED[suffix][: int(share * len(ENCODED[suffix]))] if cut else noise)
    with pytest.raises(DataError, match=rf"bad\.{suffix}: (unreadable image|images must be of 8 bits)"):
        read_grey(path)


def test_images_that_are_gone_headless_or_too_deep_are_named(tmp_path):
    for read in (read_grey, read_size):
        with pytest.raises(DataError, match="none.png: no such image file"):
            read(tmp_path / "none.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="text.png: unreadable image"):
        read_size(tmp_path / "text.png")
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.zeros((20, 20), dtype=dtype)).save(tmp_path / "deep.tif")
        with pytest.raises(DataError, match=r"deep\.tif: images must be of 8 bits, or grey of 16, got mode "):
            read_grey(tmp_path / "deep.tif")
