"""Films to graft into: found by file name, with their patients; bad folders are named."""

import numpy as np
import pytest
from PIL import Image
from tiny import make_mix

from carim_aug.data import ChestXray14, DataError
from carim_aug.tools.export import ExportError, export
from carim_aug.tools.export_backgrounds import Hosts, find_films


def test_films_are_the_normal_ones_of_the_split_in_order(phantom_data):
    films = find_films(phantom_data, "val")
    real = ChestXray14(phantom_data, split="val", findings=["No Finding"])
    assert [film.stem + ".png" for film in films] == sorted(real.filenames) and len(films) == 8
    assert [film.patient for film in films] == sorted(real.patients)
    hosts = Hosts(films)
    assert (hosts[3][0] * 255).round().equal(real[3][0].float()) and hosts[3][1] == 0
    assert Hosts(films, size=20)[0][0].shape == (1, 20, 20)


def test_the_digest_tells_lists_of_films_apart(phantom_data):
    films = find_films(phantom_data, "train")
    assert Hosts(films).digest() == Hosts(find_films(phantom_data, "train")).digest() != Hosts(films[1:]).digest()


def test_changed_hosts_are_other_settings(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    for i in range(2):
        Image.fromarray(np.full((40, 40), 90, np.uint8)).save(films / f"{i}_0.png")
    export(make_mix(), tmp_path / "out", hosts=films, n=1)
    Image.fromarray(np.full((60, 60), 80, np.uint8)).save(films / "1_0.png")
    with pytest.raises(ExportError, match="hosts_hash"):
        export(make_mix(), tmp_path / "out", hosts=films, n=1)


def test_bad_hosts_are_named(tmp_path, phantom_data):
    with pytest.raises(DataError, match="no such folder"):
        export(make_mix(), tmp_path / "out", hosts=tmp_path / "none")
    films = tmp_path / "films"
    films.mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        export(make_mix(), tmp_path / "out", hosts=films)
    with pytest.raises(ValueError, match="out must not lie in the folder of hosts"):
        export(make_mix(), phantom_data / "out", hosts=phantom_data)
    export(make_mix(), tmp_path / "first", n=1)
    with pytest.raises(ValueError, match="hosts must be real films, got the synthetic ones of"):
        export(make_mix(), tmp_path / "out", hosts=tmp_path / "first" / "images")
    for folder in ("a", "b"):
        (films / folder).mkdir()
        Image.new("L", (40, 40)).save(films / folder / "1.png")
    with pytest.raises(DataError, match="files must differ in name"):
        export(make_mix(), tmp_path / "out", hosts=films)
