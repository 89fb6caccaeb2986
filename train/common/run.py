"""One training run on disk: its folder, recipe, logs and atomic checkpoints; what goes wrong there is named.

A run that is killed at any instant goes on from its last checkpoint: everything of a snapshot is written before its
checkpoint, each file whole or not at all, and log lines from after the checkpoint are dropped, for they come again.
"""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

FREE = ("precision",)  # entries of a recipe that may differ: a run goes on where another machine computes otherwise


class RunError(ValueError):
    """A training that cannot start: folder, data, preset or weights that do not fit; the message says which."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the last checkpoint is intact, and the same command goes on from it."""


class Run:
    """The folder of one run; the same folder resumes it, and one of another recipe is refused with RunError.

    Files: recipe.json; log.jsonl, one line of scalars each report; events.jsonl, starts and faults;
    checkpoint-*.pt, the newest last; best.pt, the best so far, where something chooses.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: dict[str, Any],  # everything that fixes the run, as plain JSON types
        *,
        keep: int = 2,  # checkpoints
        migrate: Callable[[dict[str, Any]], dict[str, Any]] | None = None,  # of an older "preset", to today's terms
        begin: bool = True,  # write the recipe at once; else in `start`: a start that fails should fix nothing
    ) -> None:
        self.folder, self.keep, self.recipe = Path(folder), keep, recipe
        self._waiting: dict[Path, list[str]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.partial"):
                (shutil.rmtree if part.is_dir() else os.unlink)(part)
            for old in self.folder.glob("*.old"):  # a swap of folders that was cut between its two renames
                shutil.rmtree(old) if old.with_suffix("").exists() else old.rename(old.with_suffix(""))
            write_whole(self.folder / "probe", b"")
            (self.folder / "probe").unlink()
        except OSError as error:
            raise RunError(f"out must be a folder that can be written, got {folder} ({error})") from error
        path, now = self.folder / "recipe.json", json.loads(json.dumps(recipe))
        before = json.loads(path.read_text()) if path.exists() else now
        if migrate is not None and "preset" in before:
            before = {**before, "preset": migrate(before["preset"])}
        changed = differences(*({k: v for k, v in r.items() if k not in FREE} for r in (before, now)))
        if changed:
            raise RunError(f"{path} holds another recipe (differs in {changed}): give another --out folder")
        if begin:
            self._write_recipe()

    def start(self, images: int, unreadable: Sequence[str] = (), **facts: Any) -> None:
        """Begin or go on after so many images, and write down that it was, and which images were left out."""
        self._write_recipe()
        self.rewind(images)
        self.event("started", images=images, **facts)
        for problem in unreadable:
            self.event("image left out", error=problem)

    def log(self, *, images: int, **scalars: Any) -> None:
        """Add one line to log.jsonl, with the time; scalars that are not finite are left out."""
        finite = {k: v for k, v in scalars.items() if not isinstance(v, float) or math.isfinite(v)}
        self._append("log.jsonl", {"time": round(time.time(), 1), "images": images, **finite})

    def event(self, what: str, **facts: Any) -> None:
        """Add one line to events.jsonl and print it to the console."""
        self._append("events.jsonl", {"time": round(time.time(), 1), "event": what, **facts})
        details = ", ".join(f"{k} {v}" for k, v in facts.items())
        tqdm.write(f"{self.folder.name}: {what}{': ' if details else ''}{details}", file=sys.stderr)

    def close(self) -> None:
        """Write what still waits."""
        for path in list(self._waiting):
            self._append(path.name, None)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any], images: int, *, best: bool = False) -> Path:
        """Write a checkpoint of finite tensors and plain types (and best.pt) whole or not at all; keep the last."""
        broken = [name for name, tensor in tensors(state) if not bool(tensor.isfinite().all())]
        if broken:
            raise TrainingError(f"{self.folder}: after {images} images {broken[0]} is not finite, so nothing is saved")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"checkpoint-{images:09d}.pt"
        if best:
            write_whole(self.folder / "best.pt", buffer.getbuffer())
        write_whole(path, buffer.getbuffer())
        for old in self.checkpoints()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Return the newest checkpoint that can be read, or None."""
        for path in reversed(self.checkpoints()):
            try:
                return read_checkpoint(path)
            except RunError as error:
                self.event("unreadable checkpoint", path=path.name, error=str(error))
        return None

    def rewind(self, images: int) -> None:
        """Drop log lines from after so many images: they come again."""

        def images_of(line: str) -> int:
            with contextlib.suppress(ValueError):  # a line that was cut off
                return json.loads(line).get("images") or images + 1
            return images + 1

        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if images_of(line) <= images]
            write_whole(path, "".join(line + "\n" for line in lines).encode())

    def _write_recipe(self) -> None:
        path = self.folder / "recipe.json"
        if not path.exists():
            write_whole(path, json.dumps(self.recipe, indent=2).encode())

    def _append(self, name: str, line: dict[str, Any] | None) -> None:
        # A full disk must not stop the training: lines wait until they can be written.
        path = self.folder / name
        lines = self._waiting.pop(path, []) + ([json.dumps(line)] if line is not None else [])
        try:
            with path.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 1, 0))
                cut = b"\n" if size and file.read(1) != b"\n" else b""  # the last write was cut off
                file.write(cut + "".join(f"{x}\n" for x in lines).encode())
        except OSError:
            self._waiting[path] = lines


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, to the disk, and moved into place; OSError as the disk has it."""
    part = path.with_name(path.name + ".partial")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_whole(parent: Path, name: str) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces folder `name` of the parent at the end of the block.

    A process killed between the two renames leaves `name`.old, which opening a `Run` there puts back.
    """
    part, old = parent / f"{name}.partial", parent / f"{name}.old"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    if (parent / name).exists():
        (parent / name).rename(old)
    part.rename(parent / name)
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint, without unpickling anything; RunError if it is missing, cut off or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself checks no CRC
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its CRC-32")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is no whole checkpoint ({str(error)[:200]})") from error


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all floating-point tensors of nested dicts and lists, with their places."""
    if isinstance(state, Tensor) and state.is_floating_point():
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{name}.{key}" if name else str(key))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of entries that differ, those of inner dicts with a dot."""
    names: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{key}.{inner}" for inner in differences(a, b)]
        elif a != b:
            names.append(key)
    return names


def git_commit() -> str:
    """Return the checkout's commit, with '+' if files differ from it, or 'unknown'."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
