"""Fixtures of exports and the command line: tiny weights in a folder, and an export of each kind."""

import csv
from pathlib import Path

import pytest
from tiny import make_mix

from carim_aug.tools.export import export


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """A folder with an untrained tiny generator and the bundled prior."""
    folder = tmp_path_factory.mktemp("weights")
    make_mix().save_pretrained(folder, training_data="nothing", recipe={"images": 0}, git_commit="abc")
    return str(folder)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Four images with nodules and two without, 48 pixels."""
    folder = tmp_path_factory.mktemp("export") / "whole"
    assert export(make_mix(seed=5), folder, n=4, negatives=2, size=48)["written"] == 6
    return folder


@pytest.fixture(scope="session")
def grafts(tmp_path_factory, phantom_data) -> Path:
    """A graft in each of the 16 normal phantoms of the train split."""
    folder = tmp_path_factory.mktemp("export") / "grafts"
    export(make_mix(seed=5), folder, backgrounds=phantom_data)
    return folder


@pytest.fixture(scope="session")
def rows():
    """Reads a table of an export, a dict a row."""

    def read(folder: Path, table: str = "provenance.csv") -> list[dict[str, str]]:
        with (folder / table).open(newline="") as file:
            return list(csv.DictReader(file))

    return read


class ResidualsAlone:
    """A source that can be grafted and makes no whole images."""

    image_size, weights_hash = 32, "0" * 64

    def residuals(self, regions, masks, seeds):
        return masks * 0.5


@pytest.fixture
def residuals_alone():
    return ResidualsAlone()
