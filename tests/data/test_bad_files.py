"""Generated bad files: tables without a column or with bad boxes, images that are cut off or none, named by file."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_mix

from carim_aug.data.chestxray14 import ChestXray14, read_boxes
from carim_aug.data.errors import DataError
from carim_aug.data.folders import BoxCSV, FolderPerClass

EVERYDAY = settings(deadline=None)
ENTRIES = ("Image Index", "Finding Labels", "Patient ID", "View Position")
BOXES = ("Image Index", "Finding Label", "x", "y", "w", "h")
CORNERS = ("image", "x1", "y1", "x2", "y2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one image and, test by test, one table."""
    folder = tmp_path_factory.mktemp("bad")
    Image.fromarray(np.full((64, 64), 9, dtype=np.uint8)).save(folder / "00000001_000.png")
    return folder


def written(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# --- Tables ---
@settings(EVERYDAY, max_examples=100)
@given(st.data())
def test_a_table_without_a_column_is_named_with_the_column(root, data):
    columns, row, name, read = data.draw(
        st.sampled_from(
            [
                (
                    ENTRIES,
                    ("00000001_000.png", "Nodule", "1", "PA"),
                    "Data_Entry_2017.csv",
                    lambda p: ChestXray14(root),
                ),
                (BOXES, ("00000001_000.png", "Nodule", "1", "2", "3", "4"), "boxes.csv", read_boxes),
                (CORNERS, ("00000001_000.png", "1", "2", "3", "4"), "corners.csv", lambda p: BoxCSV(root, p)),
            ]
        )
    )
    order = data.draw(st.permutations(range(len(columns))))
    lost = data.draw(st.sampled_from(columns))
    kept = [i for i in order if columns[i] != lost]
    extra = data.draw(st.lists(st.sampled_from(["Follow-up #", "note"]), max_size=2, unique=True))
    header, cells = [*(columns[i] for i in kept), *extra], [*(row[i] for i in kept), *("0" for _ in extra)]
    path = written(root / name, header, [cells])
    with pytest.raises(DataError, match=rf"{name}: no column '{lost}'; columns found: "):
        read(path)
    path.unlink()


def outside(size):
    """Numbers of a box (x, y, w, h) that is inverted, empty, not finite, or beyond an image of this size by far."""
    place, side = st.floats(0, size / 2), st.floats(1, size / 4)
    bad = st.one_of(
        st.tuples(st.just(2), st.floats(-size, 0)),  # no width
        st.tuples(st.just(3), st.floats(-size, 0)),  # no height
        st.tuples(st.sampled_from([0, 1]), st.floats(-10 * size, -5)),
        st.tuples(st.sampled_from([0, 1]), st.floats(size + 5, 10 * size)),
        st.tuples(st.integers(0, 3), st.sampled_from([float("nan"), float("inf"), -float("inf")])),
        st.tuples(st.integers(0, 3), st.sampled_from(["", "x", "1,5", "--1"])),
    )
    return st.tuples(place, place, side, side, bad)


def spoiled(parts):
    *box, (index, value) = parts
    box[index] = value
    return box


@settings(EVERYDAY, max_examples=200)
@given(outside(1024))
def test_a_bad_box_in_a_table_is_named_with_file_and_line(root, parts):
    good = ("a.png", "Nodule", 10, 10, 30, 30)
    path = written(root / "boxes.csv", BOXES, [good, ("b.png", "Nodule", *spoiled(parts))])
    with pytest.raises(DataError, match=r"boxes.csv, line 3: (box must|[xywh] must be a number, got)"):
        read_boxes(path)


@settings(EVERYDAY, max_examples=150)
@given(outside(64))
def test_a_bad_box_in_a_table_of_corners_is_named_with_file_and_line(root, parts):
    x, y, w, h = spoiled(parts)
    numbers = [v for v in (x, y, w, h) if isinstance(v, float)]
    corners = (x, y, x + w, y + h) if len(numbers) == 4 else (x, y, w, h)
    path = written(root / "corners.csv", CORNERS, [("00000001_000.png", *corners)])
    with pytest.raises(DataError, match=r"corners.csv, line 2: (box must|[xy][12] (must be a number|is empty))"):
        BoxCSV(root, path)[0]


@settings(EVERYDAY, max_examples=60)
@given(st.text(max_size=12).filter(lambda t: t.strip() and not set(t) & set('",\r\n\x00|')))
def test_an_unknown_finding_is_named_with_file_and_line(root, finding):
    known = {"No Finding", "Infiltrate", "Pleural Thickening", *ChestXray14.pathologies}
    if finding.strip() in known:
        return
    path = written(root / "Data_Entry_2017.csv", ENTRIES, [("00000001_000.png", finding, "1", "PA")])
    with pytest.raises(DataError, match="Data_Entry_2017.csv, line 2: unknown finding "):
        ChestXray14(root)
    path.unlink()


# --- Images ---
def encoded(form):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


ENCODED = {"png": encoded("PNG"), "jpg": encoded("JPEG"), "bmp": encoded("BMP")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    for name in ("nodule", "normal"):
        (folder / name).mkdir()
        Image.fromarray(np.full((32, 32), 9, dtype=np.uint8)).save(folder / name / "good.png")
    return folder


@settings(EVERYDAY, max_examples=150)
@given(st.sampled_from(sorted(ENCODED)), st.floats(0, 0.6), st.binary(max_size=64), st.booleans())
def test_an_unreadable_image_is_named_with_its_file_by_loader_and_wrap(folders, suffix, share, noise, cut):
    content = ENCODED[suffix]
    path = folders / "normal" / f"bad.{suffix}"
    path.write_bytes(content[: int(share * len(content))] if cut else noise)
    mix, data = make_mix(p=1.0), FolderPerClass(folders)
    bad = data.paths.index(str(path))
    for door in (lambda: data[bad], lambda: list(mix.loader(data, batch_size=2)), lambda: list(mix.wrap(data))):
        with pytest.raises(DataError, match=rf"normal.bad\.{suffix}: (unreadable image|images must be of 8 bits)"):
            door()
    path.unlink()


@settings(EVERYDAY, max_examples=30)
@given(st.sampled_from(["png", "jpg", "bmp"]), st.integers(0, 99))
def test_an_image_that_has_gone_is_named_with_its_file(folders, suffix, number):
    path = folders / "normal" / f"{number}.{suffix}"
    path.write_bytes(ENCODED[suffix])
    data = FolderPerClass(folders)
    path.unlink()
    with pytest.raises(DataError, match=rf"normal.{number}\.{suffix}: no such image file"):
        data[data.paths.index(str(path))]


@settings(EVERYDAY, max_examples=30)
@given(st.sampled_from([np.int32, np.float32]), st.integers(16, 40))
def test_an_image_of_more_than_16_bits_is_named_with_its_file(folders, dtype, side):
    path = folders / "normal" / "deep.tif"
    Image.fromarray(np.zeros((side, side), dtype=dtype)).save(path)
    data = FolderPerClass(folders)
    with pytest.raises(DataError, match=r"deep\.tif: images must be of 8 bits, or grey of 16, got mode "):
        data[data.paths.index(str(path))]
    path.unlink()
