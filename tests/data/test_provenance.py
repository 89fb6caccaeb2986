"""The record in a PNG file: read back as it was written, or None."""

from PIL import Image

from carim_aug.data.provenance import MARKER, Provenance, export_over


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    box = (0.1, 0.2, 1 / 3, 0.4)
    told = Provenance((2**64 - 1, 0, 7, 3), "ab" * 32, "Nodule", "graft", "película_0.jpg", (box,), 8, 6, 16)
    Image.new("I;16", (8, 6)).save(tmp_path / "a.png", pnginfo=told.png_info())
    assert Provenance.read(tmp_path / "a.png") == told
    assert told.boxes_in(9, 10) == [(0.9, 2.0, 3.0, 4.0)]
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.text["synthetic"], picture.text["key"]) == ("1", f"[{2**64 - 1}, 0, 7, 3]")


def test_a_file_without_a_record_has_none(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    assert Provenance.read(tmp_path / "a.png") is None
    assert Provenance.read(tmp_path / "a.jpg") is None
    assert Provenance.read(tmp_path / "none.png") is None


def test_an_export_is_seen_from_its_images_but_not_from_further_down(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    assert export_over([tmp_path, tmp_path / "images"]) is None
    (tmp_path / MARKER).touch()
    assert export_over([tmp_path / "none", tmp_path / "images"]) == tmp_path
    assert export_over([tmp_path]) == tmp_path and export_over([tmp_path / "images" / "deep"]) is None
