"""One training run on disk: its folder, JSONL log, atomic checkpoints, recipe."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


class Run:
    """The folder of one run; the same folder resumes it.

    Args:
        folder: made if missing.
        recipe: everything that fixes the run, as plain JSON types. A folder that holds another recipe is refused.
        keep: how many checkpoints to keep.
    """

    def __init__(self, folder: str | Path, recipe: dict[str, Any], *, keep: int = 2) -> None:
        """Makes or reopens the folder."""
        self.folder, self.keep = Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        path = self.folder / "recipe.json"
        if path.exists():
            before = json.loads(path.read_text())
            if before != json.loads(json.dumps(recipe)):
                changed = sorted(k for k in before.keys() | recipe.keys() if before.get(k) != recipe.get(k))
                raise ValueError(f"{path} holds another recipe (differs in {changed}): give another --out folder")
        else:
            path.write_text(json.dumps(recipe, indent=2))

    def log(self, **scalars: Any) -> None:
        """Adds one line to log.jsonl, with the time."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **scalars}) + "\n")

    def checkpoints(self) -> list[Path]:
        """Gives the checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any], images: int) -> Path:
        """Writes a checkpoint whole or not at all, and drops all but the last `keep`."""
        path = self.folder / f"checkpoint-{images:09d}.pt"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        for old in self.checkpoints()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Gives the newest checkpoint that can be read, or None. Tensors and plain types only; nothing is unpickled."""
        for path in reversed(self.checkpoints()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError) as error:
                self.log(event="unreadable checkpoint", path=path.name, error=str(error)[:200])
        return None


def git_commit() -> str:
    """Gives the checkout's commit, with '+' if files differ from it, or 'unknown'."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if dirty else "")
