"""Figures on disk under the hash of what they depend on, so that none is computed twice or taken from other code."""

import ast
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from train.common.run import write_whole

ROOT = Path(__file__).parents[2]
PACKAGES = ("carim_aug", "train")
Code = ModuleType | Callable[..., Any] | Path  # what computes a figure: a module, a function (its module), or a file


class FigureCache:
    """Figures in a folder, by the hash of `settings` (plain JSON types) and of the modules that compute them."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.computed = 0  # figures that were not there
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, suffix: str, *, by: Code, **settings: Any) -> Path:
        """Return a figure's file; `by` counts with all modules of ours that it imports, and they import."""
        text = json.dumps([name, self.settings, digest_files(find_sources(by)), settings], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"

    def figure(self, name: str, compute: Callable[[], Any], *, by: Code, **settings: Any) -> Any:
        """Return a figure of plain JSON types, computed if it is not there; `by` and settings as in `path`."""
        path = self.path(name, ".json", by=by, **settings)
        if not path.exists():
            started = time.monotonic()
            value = {"figures": compute(), "settings": settings, "seconds": round(time.monotonic() - started, 1)}
            write_whole(path, json.dumps(value, indent=1).encode())
            self.computed += 1
            print(f"{name} {value['seconds']:.1f} s", flush=True)
        return json.loads(path.read_text())["figures"]


def find_sources(by: Code) -> list[Path]:
    """Return the file of some code and those of all modules of `PACKAGES` that it imports, and they import; sorted."""
    code = by if isinstance(by, Path | ModuleType) else inspect.unwrap(by)
    try:
        start = code if isinstance(code, Path) else Path(inspect.getsourcefile(code) or "")
    except TypeError:  # built in
        start = Path()
    if not start.is_file():
        raise ValueError(f"by must be a module, a function or a file of code, got {by!r}")
    found, waiting = set[Path](), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports_of(path)
    return sorted(found)


def digest_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' contents, one after the other, as hex."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _imports_of(path: Path) -> list[Path]:
    """Return the files of the modules of ours that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if _file_of(name) else node.module for name in inner]
    return [file for name in names if (file := _file_of(name)) is not None]


def _file_of(name: str) -> Path | None:
    if name.split(".")[0] not in PACKAGES:
        return None
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
