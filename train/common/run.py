"""One training run on disk: its folder, recipe, logs and atomic checkpoints; what goes wrong there is named.

A run that is killed at any instant goes on from its last checkpoint: everything of a snapshot is written before its
checkpoint, each file whole or not at all, and log lines from after the checkpoint are dropped, for they come again.
"""

import contextlib
import copy
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

PATIENCE = 10
"""Updates in a row that may be skipped for not being finite."""


class RunError(ValueError):
    """A training that cannot start: folder, data, preset or weights that do not fit; the message says which."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the last checkpoint is intact, and the same command goes on from it."""


class Run:
    """The folder of one run; the same folder resumes it.

    Files: recipe.json; log.jsonl, one line of scalars each report, and the same in tensorboard/; events.jsonl, starts
    and faults; checkpoint-*.pt, the newest last; best.pt, the best so far, where something chooses.

    Args:
        folder: made if missing.
        recipe: everything that fixes the run, as plain JSON types. A folder that holds another recipe is refused.
        keep: how many checkpoints to keep.
        defaults: what recipes from before an entry of `recipe["preset"]` existed are taken to mean.
        begin: write the recipe at once; else when `begin` is called: a start that fails should fix nothing.

    Raises:
        RunError: the folder cannot be written, or holds another recipe.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: dict[str, Any],
        *,
        keep: int = 2,
        defaults: dict[str, Any] | None = None,
        begin: bool = True,
    ) -> None:
        """Makes or reopens the folder."""
        self.folder, self.keep, self.recipe = Path(folder), keep, recipe
        path = self.folder / "recipe.json"
        self._waiting: dict[Path, list[str]] = {}
        self._board: SummaryWriter | None = None
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
        now = json.loads(json.dumps(recipe))
        before = json.loads(path.read_text()) if path.exists() else copy.deepcopy(now)
        if defaults and "preset" in before:
            before["preset"] = {**defaults, **before["preset"]}
        changed = differences(before, now)
        if changed:
            raise RunError(f"{path} holds another recipe (differs in {changed}): give another --out folder")
        if begin:
            self.begin()

    def begin(self) -> None:
        """Writes the recipe, if the folder has none yet."""
        path = self.folder / "recipe.json"
        if not path.exists():
            write_whole(path, json.dumps(self.recipe, indent=2).encode())

    def log(self, *, images: int, **scalars: Any) -> None:
        """Adds one line to log.jsonl, with the time, and its finite scalars to TensorBoard."""
        finite = {k: v for k, v in scalars.items() if not isinstance(v, float) or math.isfinite(v)}
        self._append("log.jsonl", {"time": round(time.time(), 1), "images": images, **finite})
        with self._tolerant("tensorboard"):
            if self._board is None:
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=images)
            for name, value in finite.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, images)

    def event(self, what: str, **facts: Any) -> None:
        """Adds one line to events.jsonl and tells it on the console."""
        self._append("events.jsonl", {"time": round(time.time(), 1), "event": what, **facts})
        told = ", ".join(f"{k} {v}" for k, v in facts.items())
        tqdm.write(f"{self.folder.name}: {what}: {told}" if told else f"{self.folder.name}: {what}", file=sys.stderr)

    def picture(self, name: str, image: Tensor, images: int) -> None:
        """Adds a picture (3, H, W), [0, 1], to TensorBoard."""
        with self._tolerant("tensorboard"):
            if self._board is not None:
                self._board.add_image(name, image, images)

    def close(self) -> None:
        """Writes what still waits."""
        for name in list(self._waiting):
            self._append(name.name, None)
        with self._tolerant("tensorboard"):
            if self._board is not None:
                self._board.close()
        self._board = None

    def checkpoints(self) -> list[Path]:
        """Gives the checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any], images: int, *, best: bool = False) -> Path:
        """Writes a checkpoint whole or not at all, and drops all but the last `keep`.

        Args:
            state: tensors and plain types.
            images: seen so far.
            best: keep it as best.pt too.

        Raises:
            TrainingError: a tensor is not finite; nothing is written.
            OSError: as the disk has it; the checkpoints from before are intact.
        """
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
        """Gives the newest checkpoint that can be read, or None."""
        for path in reversed(self.checkpoints()):
            try:
                return read_checkpoint(path)
            except RunError as error:
                self.event("unreadable checkpoint", path=path.name, error=str(error))
        return None

    def rewind(self, images: int) -> None:
        """Drops log lines from after so many images: they come again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if (_images_of(line) or images + 1) <= images]
            write_whole(path, "".join(line + "\n" for line in kept).encode())

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

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._board = None
            self._append("events.jsonl", {"time": round(time.time(), 1), "event": f"{what}: {error}"})


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all: aside, to the disk, and moved into place.

    Raises:
        OSError: as the disk has it; a file from before is intact.
    """
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
    """Gives an empty folder to fill, which replaces folder `name` of the parent at the end of the block.

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
    """Gives a checkpoint: tensors and plain types only; nothing is unpickled.

    Raises:
        RunError: it is missing, cut off or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself checks no CRC
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its CRC-32")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is no whole checkpoint ({str(error)[:200]})") from error


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Gives all floating-point tensors of nested dicts and lists, with their places."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{name}.{key}" if name else str(key))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Gives the names of entries that differ, those of inner dicts with a dot."""
    names: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{key}.{inner}" for inner in differences(a, b)]
        elif a != b:
            names.append(key)
    return names


def _images_of(line: str) -> int | None:
    try:
        return json.loads(line).get("images")
    except ValueError:
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
