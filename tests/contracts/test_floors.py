"""The house keeps its order: imports of folders go down, modules make no circle, the wheel holds the package alone."""

import ast
import graphlib
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[2]
CARIM = dict(ops=0, data=1, labels=2, location=2, generators=3, transforms=4, integrations=5, tools=6)
FLOORS = {"carim_aug": CARIM, "train": dict(common=0, metrics=0, classifier=1, gan=2, prior=2, reproduction=3)}
ROOF = 9  # what stands beside the folders
MAY_IMPORT = {"carim_aug": ["carim_aug"], "train": ["carim_aug", "train"], "examples": ["carim_aug"]}
TOP = {".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"}
TOP |= {"Makefile", "README.md", "carim_aug", "docs", "examples", "pyproject.toml", "tests", "train"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for top in MAY_IMPORT for path in sorted((ROOT / top).rglob("*.py"))}


def imports(source):
    """Yield the modules of ours that a file imports, inside functions too, and the names that it takes from them."""
    for node in ast.walk(ast.parse(source)):
        names = [(alias.name, "") for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
        for module, name in names:
            if module.split(".")[0] in ("", "tests", *MAY_IMPORT):
                yield (f"{module}.{name}", "") if f"{module}.{name}" in FILES else (module, name)


def wrong(module, source):
    """Yield the imports of a file that the order forbids."""
    top, room = [*module.split("."), ""][:2]
    for target, name in imports(source):
        other, below = [*target.split("."), ""][:2]
        floor, level = (FLOORS.get(a, {}).get(b, ROOF) for a, b in ((top, room), (other, below)))
        upward = top == other and room != below and floor != ROOF and level >= floor
        private = top != "carim_aug" and any(part.startswith("_") for part in (*target.split("."), name))
        if upward or private or other not in MAY_IMPORT[top]:
            yield f"{module} imports {target} {name}"


def test_imports_go_down_to_public_names_and_wrong_ones_are_seen():
    assert [line for module, path in FILES.items() for line in wrong(module, path.read_text())] == []
    for module, source in {
        "carim_aug.ops.boxes": "from carim_aug.data import io",
        "carim_aug.labels.policy": "def f():\n    import carim_aug.location.prior",
        "carim_aug.transforms.plan": "from carim_aug import Decision",
        "carim_aug.transforms.mix": "from .plan import Planner",
        "carim_aug.tools.cli": "from train.common.run import Run",
        "train.classifier.training": "from train.gan import losses",
        "train.gan.step": "from carim_aug.transforms.mix import _rank",
        "examples.ddp": "from train.gan import losses",
    }.items():
        assert list(wrong(module, source)), source


def test_modules_make_no_circle():
    graph = {module: {m for m, _ in imports(path.read_text())} - {module} for module, path in FILES.items()}
    assert FILES.keys() <= set(graphlib.TopologicalSorter(graph).static_order())
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**graph, "carim_aug.ops.random": {"carim_aug.tools.cli"}}).prepare()


def test_the_wheel_holds_the_package_alone_and_nothing_else_stands_at_the_top():
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_packages(str(ROOT), include=include)
    assert {name.split(".")[0] for name in packages} == {"carim_aug"} and "carim_aug.transforms" in packages
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]
    entries = {entry.name for entry in ROOT.iterdir() if entry.name != ".git"}
    assert {name for name in entries if not any(fnmatch(name, pattern) for pattern in ignored)} <= TOP
