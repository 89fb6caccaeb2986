"""The house keeps its order (DESIGN 3): imports go strictly downwards, and nothing stands where it does not belong."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "carim_aug"

# Floor of each file of carim_aug, in half and smaller steps where a floor of DESIGN 3 has stairs of its own.
FLOORS = {
    "masks": 0,
    "keys": 0,
    "ranges": 0,
    "sealed": 0,
    "lungs": 0,
    "density": 0,
    "models/__init__": 0,
    "models/blocks": 0,
    "data/errors": 0,
    "data/images": 0.5,
    "data/tables": 0.5,
    "augment": 1,
    "prior": 1,
    "regions": 0,
    "narrowed": 1.5,
    "schedules": 0,
    "cam": 1,
    "models/generator": 1,
    "models/discriminator": 1,
    "models/classifier": 1,
    "models/dcgan": 1,
    "models/pggan": 1,
    "models/attention_cgan": 1.5,
    "data/chestxray14": 1,
    "data/ct_nodules": 1,
    "data/folders": 1,
    "data/phantom": 1.5,
    "data/__init__": 1.8,
    "losses": 2,
    "compiled": 2,
    "evaluation/*": 2,
    "evaluation/__init__": 2.2,
    "classnames": 0,
    "labelvalues": 0,
    "detection": 2.3,
    "labels": 2.5,
    "layouts": 2.5,
    "checkpoint": 2.5,
    "shards": 2.7,
    "modelcard": 0,
    "hub": 3,
    "classgenerator": 3,
    "controls": 3,
    "protocol": 0,
    "blending": 0,
    "maskboxes": 0.5,
    "chances": 2.8,
    "plan": 3,
    "placement": 3.5,
    "provenance": 0,
    "annotations": 2,
    "hosts": 2,
    "render": 4,
    "insertion": 4.5,
    "pool": 4.7,
    "gate": 4.6,
    "filler": 4.8,
    "wrapped": 5,
    "loader": 6,
    "mix": 7,
    "guard": 8,
    "integrations/__init__": 8,
    "integrations/*": 8,
    "export": 8,
    "cli_export": 8.5,
    "plots": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
}

TOP = {".ci", ".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "README.md", "carim_aug", "examples"}
TOP |= {"pyproject.toml", "tests", "train"}

FILES = sorted(PACKAGE.rglob("*.py"))


def key_of(path: Path) -> str:
    """The file's name in FLOORS."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def floor_of(key: str) -> float | None:
    """The floor of a file, by its name or else by a pattern; None if the table has neither."""
    if key in FLOORS:
        return FLOORS[key]
    return next((floor for pattern, floor in FLOORS.items() if "*" in pattern and fnmatch(key, pattern)), None)


def imports(source: str) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, inside functions too; the name is "" for `import module`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


def key_of_import(module: str, name: str) -> str | None:
    """The file of carim_aug that an import reads, as FLOORS names it; None for another package."""
    first, *inner = module.split(".")
    if first != "carim_aug":
        return None
    for parts in ([*inner, name], inner):
        base = PACKAGE.joinpath(*parts)
        if base != PACKAGE and base.with_suffix(".py").is_file():
            return key_of(base.with_suffix(".py"))
        if base != PACKAGE and (base / "__init__.py").is_file():
            return key_of(base / "__init__.py")
    return "/".join([*inner, "__init__"])


def upward(key: str, source: str) -> list[str]:
    """The imports of a file that do not go strictly down."""
    floor = floor_of(key)
    wrong = []
    for module, name in imports(source):
        target = key_of_import(module, name)
        if target is not None:
            below = floor_of(target)
            if floor is None or below is None or below >= floor:
                wrong.append(f"{key} (floor {floor}) imports {target} (floor {below})")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=key_of)
def test_imports_go_strictly_downwards(path):
    assert upward(key_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=key_of)
def test_every_file_has_a_floor(path):
    assert floor_of(key_of(path)) is not None, f"put {key_of(path)} into FLOORS"


@pytest.mark.parametrize("path", FILES, ids=key_of)
def test_the_package_imports_neither_train_nor_relatively(path):
    for module, _ in imports(path.read_text()):
        assert module.split(".")[0] not in ("train", "tests", "examples"), f"{key_of(path)} imports {module}"
        assert not module.startswith("."), f"{key_of(path)} imports {module}: write it from carim_aug down"


def test_the_walk_sees_upward_and_level_imports():
    assert upward("masks", "from carim_aug.ops.random import stream") == ["masks (floor 0) imports keys (floor 0)"]
    assert upward("plan", "def f():\n    import carim_aug.transforms.mix") == ["plan (floor 3) imports mix (floor 7)"]
    assert upward("plan", "from carim_aug import mix") == ["plan (floor 3) imports mix (floor 7)"]
    assert upward("prior", "from carim_aug.data import FINDINGS") == [
        "prior (floor 1) imports data/__init__ (floor 1.8)"
    ]
    assert upward("plan", "from carim_aug import Slot") == ["plan (floor 3) imports __init__ (floor 10)"]
    assert upward("plan", "from carim_aug.ops.random import stream\nimport torch") == []
    assert upward("unheard_of", "from carim_aug.ops.random import stream") != []


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=lambda path: path.stem)
def test_recipes_import_public_things_only(path):
    for module, name in imports(path.read_text()):
        if module.split(".")[0] in ("carim_aug", "train"):
            private = [part for part in (*module.split("."), name) if part.startswith("_")]
            assert not private, f"{path.name} imports {module}.{name}"


PUBLIC = ("carim_aug", "carim_aug.data", "carim_aug.tools.export")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_import_what_users_do(path):
    for module, name in imports(path.read_text()):
        assert module.split(".")[0] not in ("train", "tests"), f"{path.name} imports {module}"
        if module.split(".")[0] == "carim_aug":
            public = module in PUBLIC or module.startswith("carim_aug.integrations.")
            assert public and not name.startswith("_"), f"{path.name}: {module}"


def test_nothing_else_stands_at_the_top():
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]
    entries = [entry.name for entry in ROOT.iterdir() if entry.name != ".git"]
    kept = {name for name in entries if not any(fnmatch(name, pattern) for pattern in ignored)}
    assert kept <= TOP, f"not allowed at the top: {sorted(kept - TOP)}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "train").rglob("*.py"))], ids=lambda path: path.stem)
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_fit_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 60
