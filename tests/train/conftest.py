"""Data that a test may change."""

import pytest


@pytest.fixture(scope="session")
def copy_data(phantom_data):
    """Copies the phantoms' folder to another, tables as files, images as links, and returns that."""

    def copy(folder):
        (folder / "images").mkdir(parents=True)
        for path in phantom_data.glob("*.csv"):
            (folder / path.name).write_bytes(path.read_bytes())
        for path in (phantom_data / "images").iterdir():
            (folder / "images" / path.name).symlink_to(path)
        return folder

    return copy
