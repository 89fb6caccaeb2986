"""A data set of synthetic images on disk: PNG files, the tables that others read, and where each image comes from.

The folder, in the order in which it is written:

    synthetic.json          settings; `assert_real_only` knows an export by it
    images/NAME.png         each with its record in tEXt chunks (`carim_aug.data.provenance`)
    labels/NAME.txt         YOLO; with data.yaml
    annotations.json        COCO
    Data_Entry_2017.csv, BBox_List_2017.csv, split.csv      what `carim_aug.data.ChestXray14` reads
    provenance.csv          key, weights' hash, host and boxes (XYXY in pixels of the file) of each image
    complete.json           counts; there only if all the rest is

Every file is written under another name and then renamed, so none is ever seen half-written. An image is a function of
(weights, prior, seed, index, host) and is rendered alone, on one thread of the CPU, so its bytes do not depend on how
many processes share the work or where it was taken up again.
"""

import errno
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from carim_aug.data.provenance import MARKER, Provenance, export_over
from carim_aug.generators.base import places_nodules, shows_real_films
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold, stream
from carim_aug.tools.export_backgrounds import Film, Hosts, find_films
from carim_aug.tools.export_tables import NODULE, NOTICE, Exported, tables
from carim_aug.transforms.mix import SyntheticNoduleMix

COMPLETE = "complete.json"
FORMAT = 1
"""Of the folder; raised when the same settings give other bytes."""
SPLITS = ("train", "val")
NORMAL = "No Finding"
PRIOR_DRAWS = 256
"""By which one location prior is told from another."""
FIRST_PATIENT = 10**15
"""Patients of whole synthetic images: sixteen digits, 1, six of (weights, seed), nine of the index. Those of
ChestX-ray14 have five, in file names eight, as in MIMIC-CXR. All are below 2**53, so a table read as floats keeps them.
"""


class ExportError(RuntimeError):
    """An export that cannot go on: a full disk, a folder of other settings, a process that is gone."""


@dataclass(frozen=True)
class _Image:
    """What is known of an image before it is made."""

    name: str
    key: tuple[int, ...]
    class_name: str
    patient: int
    host: Film | None = None


def export(
    mix: SyntheticNoduleMix,
    out: str | Path,
    *,
    n: int | None = None,
    normal: int = 0,
    hosts: str | Path | None = None,
    size: int | None = None,
    bits: int = 8,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    patience: float = 600.0,
) -> dict[str, int]:
    """Writes a data set of synthetic images; the same call goes on where one was cut.

    With several processes each calls this with its rank; rank 0 writes the tables when all images are there.

    Args:
        mix: its generator, prior and seed are used, not its other options. An image's key is (seed, 0, i[, try]), with
            i its place here, or its host's among all hosts by name.
        out: folder; new, empty, or an export of the same settings.
        n: images with nodules; None: with `hosts` one for each, else 0.
        normal: images without, whole ones only.
        hosts: folder of normal films to graft into (`carim_aug.tools.export_backgrounds.find_films`), n of them drawn by the seed, each
            once; None: whole images are generated.
        size: width and height in pixels; None: the generator's, or each host's own.
        bits: of a pixel, 8 or 16.
        split: that hosts are taken from and that all images belong to: "train" or "val".
        rank: of this process, 0 to world_size - 1.
        world_size: number of processes; they must see one folder.
        patience: seconds for which rank 0 waits with no image coming from the others.

    Returns:
        "images" there are, with "nodules" (boxes) in them, and "written" by this call.

    Raises:
        ValueError: an argument that breaks its rule.
        DataError: hosts that cannot be read.
        ExportError: a full disk, another export or other files in `out`, or processes that are gone.
    """
    n = _check(n, normal, hosts, size, bits, split, rank, world_size)
    folder = Path(out)
    with _full_disk_named(folder), _one_thread():
        # What is to be made, and the settings that decide it.
        source = _Whole(mix, n or 0, normal, size) if hosts is None else _Grafts(mix, hosts, folder, split, n, size)
        settings = {
            "format": FORMAT,
            "insertion": source.insertion,
            "n": len(source.images) - normal,
            "normal": normal,
            "seed": mix.seed,
            "size": size,
            "bits": bits,
            "split": split,
            "weights_hash": mix.weights_hash,
            "prior_hash": _prior_hash(mix.prior),
            "hosts_hash": source.hosts_hash,
        }
        _claim(folder, settings)
        if rank == 0 and not all((folder / "images" / image.name).is_file() for image in source.images):
            (folder / COMPLETE).unlink(missing_ok=True)

        # Images: this process's share, without those that are there.
        written = 0
        own = range(rank, len(source.images), world_size)
        for i in tqdm(own, desc="writing images", unit="image", disable=rank > 0):
            path = folder / "images" / source.images[i].name
            if _record(path, source.images[i], settings) is None:
                pixels, boxes, key = source.draw(i)
                _put(path, _png(pixels, source.images[i], key, boxes, settings))
                written += 1

        # Tables, from the records in all images.
        if rank:
            return {"images": len(own), "nodules": 0, "written": written}
        images = _collected(folder, source.images, settings, patience)
        counts = {"images": len(images), "nodules": sum(len(image.provenance.boxes) for image in images)}
        texts = tables(images, split=split, settings=settings)
        if not all((folder / name).is_file() for name in (COMPLETE, *texts)):
            (folder / COMPLETE).unlink(missing_ok=True)
            for name, text in texts.items():
                _put(folder / name, text.encode())
            for left in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):  # by a process that was killed
                left.unlink(missing_ok=True)
            if hasattr(os, "sync"):  # all the rest first, should the power fail
                os.sync()
            _put(folder / COMPLETE, _json({**counts, "settings_sha256": _hash(settings)}))
    return counts | {"written": written}


# --- What is drawn ---
class _Whole:
    """Whole generated images: n with nodules, then normal ones."""

    insertion, hosts_hash = "whole", None

    def __init__(self, mix: SyntheticNoduleMix, n: int, normal: int, size: int | None) -> None:
        if not places_nodules(mix.generator) or shows_real_films(mix.generator):
            raise ValueError(
                "mix must have a generator that puts nodules where masks are and shows no real films, to export whole "
                f"images with their boxes, got a {type(mix.generator).__name__}"
            )
        self.mix = SyntheticNoduleMix(mix.generator, mix.prior, seed=mix.seed)
        self.size = mix.generator.image_size if size is None else size
        tag = fold(int(mix.weights_hash[:15], 16), mix.seed) % 10**6
        self.images = []
        for i in range(n + normal):
            patient = FIRST_PATIENT + tag * 10**9 + i
            class_name = NODULE if i < n else NORMAL
            self.images.append(_Image(f"{patient}_000.png", (mix.seed, 0, i), class_name, patient))

    def draw(self, i: int) -> tuple[Tensor, np.ndarray, tuple[int, ...]]:
        """Gives the pixels (H, W) float32 in [0, 1], the boxes (k, 4) XYXY as parts of the image, and the key."""
        image = self.images[i]
        pixels, _, boxes = self.mix.regenerate(image.key, image.class_name)
        parts = boxes.double().numpy() / self.mix.generator.image_size
        if pixels.shape[-1] != self.size:
            pixels = functional.resize(pixels, [self.size, self.size], antialias=True)
        return (pixels[0] + 1) / 2, parts, image.key


class _Grafts:
    """Nodules in normal films: n of them, in the order of their names."""

    insertion = "graft"

    def __init__(
        self, mix: SyntheticNoduleMix, folder: str | Path, out: Path, split: str, n: int | None, size: int | None
    ) -> None:
        if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"out must not lie in the folder of hosts {folder}, got {out}")
        films = find_films(folder, split)
        synthetic = export_over({os.path.dirname(film.path): None for film in films})
        if synthetic is not None:
            raise ValueError(f"hosts must be real films, got the synthetic ones of {synthetic}")
        if n is not None and n > len(films):
            raise ValueError(f"n must be at most the number of hosts ({len(films)}), got {n}: export another seed too")
        hosts = Hosts(films, size=size)
        self.hosts_hash = hosts.digest()
        self.mixed = SyntheticNoduleMix(mix.generator, mix.prior, p=1.0, insertion="graft", seed=mix.seed).wrap(hosts)
        self.chosen = sorted(stream(mix.seed, 0, 0, len(films)).permutation(len(films))[:n].tolist())
        self.images = [
            _Image(f"{films[i].stem}_graft_{mix.seed}.png", (mix.seed, 0, i), NODULE, films[i].patient, films[i])
            for i in self.chosen
        ]

    def draw(self, i: int) -> tuple[Tensor, np.ndarray, tuple[int, ...]]:
        """As `_Whole.draw`; the key has the number of a try that was made for the host's lungs."""
        slot = self.mixed.slot(self.chosen[i])
        pixels, _ = self.mixed[self.chosen[i]]
        return pixels[0], slot.boxes.astype(np.float64), slot.key


# --- Files ---
def _png(pixels: Tensor, image: _Image, key: tuple[int, ...], boxes: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    bits, levels = settings["bits"], 2 ** settings["bits"] - 1
    height, width = pixels.shape
    told = Provenance(
        key=key,
        weights_hash=settings["weights_hash"],
        class_name=image.class_name,
        insertion=settings["insertion"],
        host=None if image.host is None else Path(image.host.path).name,
        boxes=tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes.clip(0, 1).tolist()),
        width=width,
        height=height,
        bits=bits,
    )
    grey = (pixels.double().clamp(0, 1) * levels).round().numpy().astype(np.uint8 if bits == 8 else np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG", pnginfo=told.png_info())
    return file.getvalue()


def _record(path: Path, image: _Image, settings: Mapping[str, Any]) -> Provenance | None:
    """The record of a finished image, or None if there is none or it is not this one."""
    told = Provenance.read(path)
    if told is None:
        return None
    same = (
        told.key[:3] == image.key
        and told.class_name == image.class_name
        and told.host == (None if image.host is None else Path(image.host.path).name)
        and all(getattr(told, name) == settings[name] for name in ("weights_hash", "insertion", "bits"))
    )
    return told if same else None


def _collected(folder: Path, images: Sequence[_Image], settings: Mapping[str, Any], patience: float) -> list[Exported]:
    """The records of all images, in order; waits for those of other processes."""
    found: dict[str, Exported] = {}
    last = time.monotonic()
    while True:
        before = len(found)
        for image in images:
            if image.name not in found:
                told = _record(folder / "images" / image.name, image, settings)
                if told is not None:
                    row = {} if image.host is None else image.host.row
                    found[image.name] = Exported(image.name, image.patient, told, row)
        if len(found) == len(images):
            return [found[image.name] for image in images]
        if len(found) > before:
            last = time.monotonic()
        elif time.monotonic() - last > patience:
            raise ExportError(
                f"{folder}: {len(images) - len(found)} of {len(images)} images have not come from the other processes "
                f"for {patience:g} s: see why they stopped and whether they write to this folder, then run the same "
                "command again"
            )
        time.sleep(0.2)


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder this export's, or raises ExportError if it is something else's."""
    marker = folder / MARKER
    there = [entry.name for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
    if not marker.is_file():
        if there:
            raise ExportError(
                f"{folder} must be new, empty or an export, got other files in it ({there[0]}): choose one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _put(marker, _json({"synthetic": True, "notice": NOTICE, "settings": settings}))
    try:
        old = json.loads(marker.read_text())["settings"]
        differing = [name for name in settings if old.get(name) != settings[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{marker}: unreadable ({error}): choose another folder") from error
    if differing:
        told = ", ".join(f"{name} {old.get(name)!r} there and {settings[name]!r} now" for name in differing)
        raise ExportError(
            f"{folder} must be an export of the same settings, got {told}: choose another folder, or give those "
            "settings to go on with this one"
        )
    (folder / "images").mkdir(exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)


def _put(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"{folder}: no space left on the disk ({error}); all finished files are whole: make room and run the same "
            "command again, which goes on from there"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: the order of its sums, and so the last bit, may depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prior_hash(prior: LocationPrior) -> str:
    """SHA-256 of some draws and of the lung field: of all that a prior does here, one that is narrowed too."""
    told = hashlib.sha256(prior.field.numpy().tobytes())
    for i in range(PRIOR_DRAWS):
        told.update(prior.draw(stream(0, 0, i)).tobytes())
    return told.hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(settings)).hexdigest()


def _check(
    n: int | None, normal: int, hosts: Any, size: int | None, bits: int, split: str, rank: int, world_size: int
) -> int | None:
    for name, value, low in (("n", n, 0), ("normal", normal, 0), ("size", size, 16)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value < 10**9):
            raise ValueError(f"{name} must be an integer of at least {low} and below 10**9, got {value!r}")
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits!r}")
    if split == "test":
        raise ValueError("split must be train or val, got 'test': the test split is for evaluation on real films alone")
    if split not in SPLITS:
        raise ValueError(f"split must be train or val, got {split!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size - 1], got rank {rank} of {world_size}")
    if hosts is not None and normal:
        raise ValueError(f"normal must be 0 with hosts, whose own films are the normal ones, got {normal}")
    if hosts is not None and n == 0 or hosts is None and not (n or 0) + normal:
        raise ValueError(f"n and normal must be at least 1 together, got n={n} and normal={normal}")
    return n
