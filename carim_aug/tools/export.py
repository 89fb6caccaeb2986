"""A data set of synthetic images on disk: PNG files with a record in each, the tables that others read, provenance.

`synthetic.json` (settings; `assert_real_only` knows an export by it) is written first, `complete.json` (counts) last,
each file under another name and then renamed, so none is seen half-written. An image is a function of (weights, prior,
seed, index, background), made alone on one thread of the CPU: its bytes do not depend on where a cut run went on.
"""

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from carim_aug.data.provenance import MARKER, Provenance
from carim_aug.ops.images import resize
from carim_aug.ops.random import fold, stream
from carim_aug.tools.export_backgrounds import Background, find_backgrounds, hash_backgrounds
from carim_aug.tools.export_tables import NODULE, NOTICE, Item, write_tables
from carim_aug.transforms.apply import Applier
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Planner
from carim_aug.transforms.settings import MixSettings

COMPLETE = "complete.json"
FORMAT = 2  # of the folder; raised when the same settings give other bytes
NORMAL = "No Finding"
PRIOR_DRAWS = 256  # by which one location prior is told from another
# Patients of whole synthetic images have sixteen digits: 1, six of (weights, seed), nine of the index. Those of
# ChestX-ray14 have five, of MIMIC-CXR eight. All are below 2**53, so a table read as floats keeps them.
FIRST_PATIENT = 10**15


class ExportError(RuntimeError):
    """An export that cannot go on: a full disk, or a folder of other settings."""


def export(
    mix: SyntheticNoduleMix,
    out: str | Path,
    *,
    n: int | None = None,
    normal: int = 0,
    backgrounds: str | Path | None = None,
    size: int | None = None,
    bits: int = 8,
    split: str = "train",
) -> dict[str, int]:
    """Write a data set of synthetic images, in one process; the same call goes on where one was cut.

    Args:
        mix: its generator, prior and seed are used, not its other options. An image's key is (seed, 0, i[, try]), with
            i its place here, or its background's among all by name.
        out: folder; new, empty, or an export of the same settings.
        n: images with nodules; None: with `backgrounds` one for each, else 0.
        normal: images without, whole ones only.
        backgrounds: folder of normal images to graft into (`carim_aug.tools.export_backgrounds.find_backgrounds`), n of
            them drawn by the seed, each once; None: whole images are generated.
        size: width and height in pixels; None: the generator's, or each background's own.
        bits: of a pixel, 8 or 16.
        split: that backgrounds are taken from and that all images belong to: "train" or "val".

    Returns:
        "images" there are, with "nodules" (boxes) in them, and "written" by this call.

    Raises:
        ValueError: an argument that breaks its rule, or a generator without the method that is needed.
        DataError: backgrounds that cannot be read.
        ExportError: a full disk, or another export or other files in `out`.
    """
    folder = Path(out)
    _check(n, normal, backgrounds, size, bits, split, folder)
    with _working_in(folder):
        # What is to be made, and the settings that decide it.
        mixing = MixSettings(mix.prior, seed=mix.seed, insertion="whole" if backgrounds is None else "graft")
        applier, planner = Applier(mixing, mix.generator, "cpu"), mixing.planner(mixing.labels)
        if backgrounds is None:
            items, hashed = _plan_whole(mix, n or 0, normal), None
        else:
            found = find_backgrounds(backgrounds, split)
            items, hashed = _plan_grafts(mix.seed, found, n), hash_backgrounds(found)
        settings: dict[str, Any] = {"format": FORMAT, "insertion": mixing.insertion, "n": len(items) - normal}
        settings |= {"normal": normal, "seed": mix.seed, "size": size, "bits": bits, "split": split}
        settings |= {"weights_hash": mix.weights_hash, "prior_hash": _hash_prior(mix.prior), "backgrounds_hash": hashed}
        _claim(folder, settings)

        # Images that are not there.
        written, images = 0, []
        for item in tqdm(items, desc="writing images", unit="image"):
            path = folder / "images" / item.name
            record = _read_record(path, item, settings)
            if record is None:
                (folder / COMPLETE).unlink(missing_ok=True)
                data, record = _make(item, applier, planner, settings)
                _put(path, data)
                written += 1
            images.append((item, record))

        # Tables, from the records in all images.
        counts = {"images": len(images), "nodules": sum(len(record.boxes) for _, record in images)}
        tables = write_tables(images, split=split, settings=settings)
        if not all((folder / name).is_file() for name in (COMPLETE, *tables)):
            (folder / COMPLETE).unlink(missing_ok=True)
            for name, text in tables.items():
                _put(folder / name, text.encode())
            for left in folder.rglob(".*.part"):  # by a process that was killed
                left.unlink(missing_ok=True)
            _put(folder / COMPLETE, _json({**counts, "settings_sha256": hashlib.sha256(_json(settings)).hexdigest()}))
    return counts | {"written": written}


# --- What is made ---
def _plan_whole(mix: SyntheticNoduleMix, n: int, normal: int) -> list[Item]:
    """Return whole images: n with nodules, then normal ones."""
    rule = "mix must have a generator with images(masks, seeds), which puts nodules where masks are, for whole images"
    _require(hasattr(mix.generator, "images"), f"{rule} with boxes, got a {type(mix.generator).__name__}")
    first = FIRST_PATIENT + fold(int(mix.weights_hash[:15], 16), mix.seed) % 10**6 * 10**9
    classes = [NODULE] * n + [NORMAL] * normal
    return [Item(f"{first + i}_000.png", (mix.seed, 0, i), name, first + i) for i, name in enumerate(classes)]


def _plan_grafts(seed: int, found: list[Background], n: int | None) -> list[Item]:
    """Return nodules in n of the backgrounds, in the order of their names."""
    fits = n is None or n <= len(found)
    _require(fits, f"n must be at most the number of backgrounds ({len(found)}), got {n}: export another seed too")
    chosen = sorted(stream(seed, 0, 0, len(found)).permutation(len(found))[:n].tolist())
    pairs = [(i, found[i]) for i in chosen]
    return [Item(f"{own.path.stem}_graft_{seed}.png", (seed, 0, i), NODULE, own.patient, own) for i, own in pairs]


def _make(item: Item, applier: Applier, planner: Planner, settings: Mapping[str, Any]) -> tuple[bytes, Provenance]:
    """Return an image as a PNG file's bytes, and the record in it; the key of a graft has the number of its try."""
    decision, size, bits = planner.regenerate(item.key, item.class_name), settings["size"], settings["bits"]
    if item.background is None:
        image = applier.whole_images([decision], torch.device("cpu"))
        side = size or image.shape[-1]
        pixels = (resize(image, (side, side))[0, 0] + 1) / 2
    else:
        real = item.background.read(size)[None]
        placed = applier.place(real, [decision], planner)
        decision, pixels = placed.decisions[0], applier.pixels(real, placed)[0][0][0]
    height, width = pixels.shape
    boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in decision.boxes.astype(np.float64).clip(0, 1).tolist())
    record = Provenance(decision.key, boxes=boxes, width=width, height=height, **_facts(item, settings))
    levels = (pixels.double().clamp(0, 1) * (2**bits - 1)).round().numpy()
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8 if bits == 8 else np.uint16)).save(file, "PNG", pnginfo=record.png_info())
    return file.getvalue(), record


# --- Files ---
def _facts(item: Item, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in the record of an image before it is made."""
    background = None if item.background is None else item.background.path.name
    same = {name: settings[name] for name in ("weights_hash", "insertion", "bits")}
    return {"class_name": item.class_name, "background": background, **same}


def _read_record(path: Path, item: Item, settings: Mapping[str, Any]) -> Provenance | None:
    """Return the record of a finished image, or None if there is none or it is not this one."""
    record = Provenance.read(path)
    if record is None or record.key[:3] != item.key:
        return None
    return record if _facts(item, settings).items() <= vars(record).items() else None


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this export's, or raise ExportError if it is something else's."""
    marker, other = folder / MARKER, next((path.name for path in folder.glob("[!.]*")), None)
    if not marker.is_file():
        _require(other is None, f"{folder} must be new, empty or an export, got {other} in it: choose one", ExportError)
        folder.mkdir(parents=True, exist_ok=True)
        _put(marker, _json({"synthetic": True, "notice": NOTICE, "settings": settings}))
    try:
        old = json.loads(marker.read_text())["settings"]
        differing = [name for name in settings if old.get(name) != settings[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{marker}: unreadable ({error}): choose another folder") from error
    got = ", ".join(f"{name} {old.get(name)!r} there and {settings[name]!r} now" for name in differing)
    remedy = "choose another folder, or give those settings to go on with this one"
    _require(not differing, f"{folder} must be an export of the same settings, got {got}: {remedy}", ExportError)
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)


def _put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Name a full disk, and use one thread: the order of torch's sums, and so the last bit, may depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"{folder}: no space left on the disk ({error}); all finished files are whole: make room and run the same "
            "command again, which goes on from there"
        ) from error
    finally:
        torch.set_num_threads(threads)


def _hash_prior(prior: Any) -> str:
    """Return SHA-256 of some draws and of the lung field: of all that a prior does here, a restricted one too."""
    draws = [prior.draw(stream(0, 0, i)).tobytes() for i in range(PRIOR_DRAWS)]
    return hashlib.sha256(b"".join([prior.field.numpy().tobytes(), *draws])).hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _check(n: int | None, normal: int, backgrounds: Any, size: int | None, bits: int, split: str, out: Path) -> None:
    for name, value, low in (("n", n, 0), ("normal", normal, 0), ("size", size, 16)):
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value < 10**9
        if value is not None or name == "normal":
            _require(fits, f"{name} must be an integer of at least {low} and below 10**9, got {value!r}")
    _require(bits in (8, 16), f"bits must be 8 or 16, got {bits!r}")
    reason = "the test split is for evaluation on real images alone"
    _require(split in ("train", "val"), f"split must be train or val, got {split!r}: {reason}")
    together = f"n and normal must be at least 1 together, got n={n} and normal={normal}"
    if backgrounds is None:
        _require(bool(n or normal), together)
    else:
        _require(not normal, f"normal must be 0 with backgrounds, which are normal images themselves, got {normal}")
        _require(n != 0, together)
        inside = Path(backgrounds).resolve() in (out.resolve(), *out.resolve().parents)
        _require(not inside, f"out must not lie in the folder of backgrounds {backgrounds}, got {out}")
    processes = os.environ.get("WORLD_SIZE", "1")
    remedy = "run it without torchrun, in one process, which goes on where it was cut"
    _require(processes == "1", f"WORLD_SIZE must be 1 for an export, got {processes}: {remedy}")


def _require(fits: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not fits:
        raise error(message)
