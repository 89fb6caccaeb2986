"""The record in a PNG file: read back as it was written, or None."""

import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from carim_aug.data.provenance import MARKER, Provenance, export_over

BOX = (0.1, 0.2, 1 / 3, 0.4)
RECORD = Provenance((2**64 - 1, 0, 7, 3), "ab" * 32, "Nodule", "graft", "película_0.jpg", (BOX,), 8, 6, 16)


def image(path, record=None):
    info = PngInfo()
    if record is not None:
        info.add_text("carim_aug", record)
    Image.new("L", (8, 6)).save(path, pnginfo=info)
    return path


def test_a_record_is_read_back_as_it_was_written_and_a_file_without_one_has_none(tmp_path):
    Image.new("I;16", (8, 6)).save(tmp_path / "a.png", pnginfo=RECORD.png_info())
    assert Provenance.read(tmp_path / "a.png") == RECORD
    assert RECORD.boxes_in(9, 10) == [(0.9, 2.0, 3.0, 4.0)]
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.text["synthetic"], picture.text["key"]) == ("1", f"[{2**64 - 1}, 0, 7, 3]")
        old = json.loads(picture.text["carim_aug"])
    old["host"] = old.pop("background")  # as version 0.1 called it
    assert old["host"] == "película_0.jpg" and Provenance.read(image(tmp_path / "old.png", json.dumps(old))) == RECORD
    for path in (image(tmp_path / "text.png", '"text"'), image(tmp_path / "b.png"), image(tmp_path / "b.jpg")):
        assert Provenance.read(path) is None
    assert Provenance.read(tmp_path / "none.png") is None


def test_an_export_is_seen_from_its_images_but_not_from_further_down(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    assert export_over([tmp_path, tmp_path / "images"]) is None
    (tmp_path / MARKER).touch()
    assert export_over([tmp_path / "none", tmp_path / "images"]) == tmp_path
    assert export_over([tmp_path]) == tmp_path and export_over([tmp_path / "images" / "deep"]) is None
