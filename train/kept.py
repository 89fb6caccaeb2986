"""Figures on disk under the hash of what they depend on, so that none is computed twice or taken from other code."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE: dict[str, tuple[str, ...]] = {
    "figures": (
        "figures.py",
        "encoders.py",
        "sources.py",
        "../carim_aug/evaluation/fid.py",
        "../carim_aug/evaluation/memorisation.py",
        "../carim_aug/evaluation/pairs.py",
        "../carim_aug/evaluation/patches.py",
        "../carim_aug/controls.py",
        "../carim_aug/blending.py",
        "../carim_aug/compiled.py",
        "../carim_aug/masks.py",
    ),
    "patches": (
        "patches.py",
        "sources.py",
        "../carim_aug/evaluation/patches.py",
        "../carim_aug/controls.py",
        "../carim_aug/blending.py",
        "../carim_aug/compiled.py",
        "../carim_aug/masks.py",
    ),
    "reproduction": (
        "table1.py",
        "grids.py",
        "embedding.py",
        "activation.py",
        "figures.py",
        "encoders.py",
        "sources.py",
        "../carim_aug/evaluation/fid.py",
        "../carim_aug/evaluation/pairs.py",
        "../carim_aug/evaluation/psnr.py",
        "../carim_aug/cam.py",
        "../carim_aug/classgenerator.py",
        "../carim_aug/compiled.py",
        "../carim_aug/masks.py",
        "../carim_aug/models/*.py",
    ),
    "speed": (
        "throughput.py",
        "presets.py",
        "influence.py",
        "adversarial.py",
        "networks.py",
        "../carim_aug/models/*.py",
    ),
}
"""What a kind of figure is computed by: files whose change makes it anew."""


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
        files = [path for pattern in CODE[code] for path in sorted(Path(__file__).parent.glob(pattern))]
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


def digest_of(paths: list[Path]) -> str:
    """Gives the SHA-256 of files' contents, one after the other, as hex."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()
