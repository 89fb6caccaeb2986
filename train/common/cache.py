"""Figures on disk under the hash of what they depend on, so that none is computed twice or taken from other code."""

import ast
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CODE: dict[str, tuple[str, ...]] = {
    "figures": ("train.metrics.generator_quality", "train.metrics.memorisation"),
    "patches": ("train.reproduction.patches",),
    "reproduction": (
        "train.reproduction.table1",
        "train.reproduction.figures.same_noise",
        "train.reproduction.figures.tsne",
        "train.reproduction.figures.cam",
    ),
    "speed": ("train.gan.throughput",),
}
"""The modules that compute a kind of figure; all modules of ours that they import count too."""

ROOT = Path(__file__).parents[2]


class Kept:
    """Figures on disk, by the hash of what they depend on.

    Args:
        folder: made if missing.
        settings: what every figure depends on.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens the folder."""
        self.folder, self.settings, self.computed = folder, settings, 0
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, suffix: str, code: str, **settings: Any) -> Path:
        """Gives the file of a figure of a kind of `CODE` with further settings (plain JSON types)."""
        files = sources_of(CODE[code])
        text = json.dumps([name, self.settings, digest_of(files), settings], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"

    def figure(self, name: str, compute: Callable[[], Any], *, code: str = "figures", **settings: Any) -> Any:
        """Gives a figure, computed if it is not there."""
        path = self.path(name, ".json", code, **settings)
        if not path.exists():
            started = time.monotonic()
            value = {"figures": compute(), "settings": settings, "seconds": round(time.monotonic() - started, 1)}
            path.with_suffix(".partial").write_text(json.dumps(value, indent=1))
            path.with_suffix(".partial").replace(path)
            self.computed += 1
            print(f"{name} {value['seconds']:.1f} s", flush=True)
        return json.loads(path.read_text())["figures"]


def sources_of(modules: Sequence[str]) -> list[Path]:
    """Return the files of modules and of all modules of `carim_aug` and `train` that they import, sorted."""
    found: set[Path] = set()
    waiting = [_file_of(name) for name in modules]
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [_file_of(alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [_file_of(f"{node.module}.{alias.name}") or _file_of(node.module) for alias in node.names]
    return sorted(found)


def _file_of(name: str) -> Path | None:
    """Return the file of a module of ours, or None."""
    if name.split(".")[0] not in ("carim_aug", "train"):
        return None
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def digest_of(paths: list[Path]) -> str:
    """Gives the SHA-256 of files' contents, one after the other, as hex."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()
