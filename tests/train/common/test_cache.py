"""Figures on disk: computed once, and anew when the code that they come from changes."""

import json
import math

import pytest

from train.common import cache as module
from train.common.cache import FigureCache, find_sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Figures.py imports helper.py inside a function, and that deep/__init__.py; nobody imports other.py."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "train" / "deep").mkdir(parents=True)
    files = {
        "figures.py": "import math\ndef figure():\n    from train import helper\n    return helper\n",
        "helper.py": "from train.deep import VALUE\n",
        "deep/__init__.py": "VALUE = 1\n",
        "other.py": "import train.helper\n",
    }
    for name, text in files.items():
        (tmp_path / "train" / name).write_text(text)
    return tmp_path / "train"


def test_the_key_follows_all_imported_modules_and_no_other(package, tmp_path):
    cache, figures = FigureCache(tmp_path / "kept", {"data": "x"}), package / "figures.py"
    assert [p.name for p in find_sources(figures)] == ["__init__.py", "figures.py", "helper.py"]
    first = cache.path("auc", ".json", by=figures, seed=0)
    (package / "other.py").write_text("VALUE = 2\n")
    assert cache.path("auc", ".json", by=figures, seed=0) == first
    assert cache.path("auc", ".json", by=figures, seed=1) != first
    assert FigureCache(tmp_path / "kept", {"data": "y"}).path("auc", ".json", by=figures, seed=0) != first
    (package / "deep" / "__init__.py").write_text("VALUE = 2\n")
    assert cache.path("auc", ".json", by=figures, seed=0) != first


def test_a_figure_is_computed_once(package, tmp_path):
    cache, calls = FigureCache(tmp_path / "kept", {}), []

    def compute():
        calls.append(1)
        return {"auc": 0.5}

    for _ in range(2):
        assert cache.figure("auc", compute, by=package / "figures.py", seed=0) == {"auc": 0.5}
    assert len(calls) == cache.computed == 1
    (file,) = (tmp_path / "kept").iterdir()
    assert json.loads(file.read_text())["settings"] == {"seed": 0}


def test_modules_and_functions_count_by_their_file():
    files = find_sources(FigureCache)
    assert files == find_sources(module) and files[0].name == "cache.py"
    names = {path.as_posix().rpartition("main/")[2] for path in find_sources(test_a_figure_is_computed_once)}
    assert any(name.endswith("train/common/cache.py") for name in names)
    with pytest.raises(ValueError, match="by must be a module, a function or a file"):
        find_sources(math.sqrt)
