"""A data set of synthetic images on disk: PNG files with a record in each, the tables that others read, provenance.

`synthetic.json` (settings; `assert_real_only` knows an export by it) is written first, `complete.json` (counts) last,
each file under another name and then renamed, so none is seen half-written. An image is a function of (weights, prior,
placement, strength, gate, seed, index, background), made alone on one thread of the CPU: its bytes do not depend on
where a cut run went on.
"""

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from carim_aug.data.io import images_below
from carim_aug.data.items import check_names
from carim_aug.data.provenance import MARKER, Provenance
from carim_aug.ops.images import resize
from carim_aug.ops.random import stream
from carim_aug.tools.export_backgrounds import check_split, find_labelled
from carim_aug.tools.export_plan import NODULE, Item, plan_grafts, plan_whole
from carim_aug.tools.export_tables import NOTICE, write_tables
from carim_aug.transforms.apply import Applier
from carim_aug.transforms.gate import Gates
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Planner
from carim_aug.transforms.settings import Graft, MixSettings

COMPLETE = "complete.json"
FORMAT = 3  # of the folder; raised when the same settings give other bytes
PRIOR_DRAWS = 256  # by which one location prior is told from another


class ExportError(RuntimeError):
    """An export that cannot go on: a full disk, or a folder of other settings."""


def export(
    mix: SyntheticNoduleMix,
    out: str | Path,
    *,
    n: int | None = None,
    negatives: int = 0,
    backgrounds: str | Path | None = None,
    normal: Sequence[str] = (),
    val: str | Path | None = None,
    size: int | None = None,
    bits: int = 8,
    split: str = "train",
) -> dict[str, int]:
    """Write a data set of synthetic images, in one process; the same call goes on where one was cut.

    Its `data.yaml` trains in Ultralytics as it is. Synthetic images are never its validation set: that is `val`, or
    real images which are written too, as they are: those of the backgrounds' own validation split (in ChestX-ray14's
    layout with their boxes of nodules), or of one in ten patients, whose images then are no backgrounds; a tenth as
    many normal ones as there are images to train on. For split "val", and so for synthetic images of its patients,
    there is no `data.yaml`.

    Args:
        mix: its generator, prior and seed are used, for grafts its placement, strength and gate, too; not its other
            options. An image's key is (seed, 0, i[, try]), with i its place here, or its background's among all by
            name. A background in which no nodule passes the gate stays as it is, a negative.
        out: folder; new, empty, or an export of the same settings.
        n: images with nodules; None: with `backgrounds` one for each that is not a negative, else 0.
        negatives: images without: with `backgrounds` other ones, left as they are, else whole ones.
        backgrounds: folder of normal images to graft into (`carim_aug.tools.export_backgrounds.find_backgrounds`), n of
            them drawn by the seed, each once; None: whole images are generated.
        normal: names of its folders of normal images, where they are not called so; "." for all.
        val: folder of real images with YOLO's labels (images/, labels/), which `data.yaml` validates on.
        size: width and height in pixels; None: the generator's, or each background's own.
        bits: of a pixel, 8 or 16.
        split: that backgrounds are taken from and that all images belong to: "train" or "val".

    Returns:
        "images" there are to train on, "real" ones among them, "nodules" (boxes) in them, real images to validate on
        ("val"), and images "written" by this call.

    Raises:
        ValueError: an argument that breaks its rule, or a generator without the method that is needed.
        DataError: backgrounds that cannot be read, or whose folders do not say which are normal.
        ExportError: a full disk, another export or other files in `out`, or a gate that accepts nothing.
        GateError: the same, once it is certain.
    """
    folder = Path(out)
    _check(n, negatives, backgrounds, normal, val, size, bits, split, folder)
    with _working_in(folder):
        # What is to be made, and the settings that decide it.
        insertion = "whole" if backgrounds is None else "graft"
        graft = Graft() if backgrounds is None else mix.settings.graft
        mixing = MixSettings(mix.prior, seed=mix.seed, insertion=insertion, graft=graft)
        applier, planner = Applier(mixing, mix.generator, "cpu"), mixing.planner(mixing.labels)
        labelled, hashed = None if val is None else str(find_labelled(val)), None
        if backgrounds is None:
            _check_whole(mix)
            items = plan_whole(mix.weights_hash, mix.seed, n or 0, negatives)
        else:
            given: dict[str, Any] = {"n": n, "negatives": negatives, "validate": split == "train" and val is None}
            items, hashed = plan_grafts(mix.seed, backgrounds, split, normal, **given)
        if labelled:
            _check_apart(labelled, items)
        nodules = sum(item.insertion != "none" and item.class_name == NODULE for item in items)
        settings: dict[str, Any] = {"format": FORMAT, "insertion": insertion, "n": nodules, "negatives": negatives}
        settings |= {"val": labelled, "seed": mix.seed, "size": size, "bits": bits, "split": split}
        settings |= {"weights_hash": mix.weights_hash, "prior_hash": _hash_prior(mix.prior), "backgrounds_hash": hashed}
        settings |= {part.name: _describe(getattr(graft, part.name)) for part in fields(graft) if part.compare}
        _claim(folder, settings, {item.folder for item in items})

        # Images that are not there.
        written, images = 0, []
        for item in tqdm(items, desc="writing images", unit="image"):
            path = folder / item.folder / item.name
            record = _read_record(path, item, settings)
            if record is None:
                (folder / COMPLETE).unlink(missing_ok=True)
                data, record = _make(item, applier, planner, settings)
                _put(path, data)
                written += 1
            images.append((item, record))

        # Tables, from the records in all images.
        records = [record for item, record in images if item.folder == "images"]
        made = any(record.synthetic for record in records)
        remedy = "lower the gate's least, or raise strength"
        _require(made, f"gate must accept a nodule in some image, got none in {nodules}: {remedy}", ExportError)
        counts = {"images": len(records), "real": sum(not record.synthetic for record in records)}
        counts |= {"nodules": sum(len(record.boxes) for record in records), "val": len(images) - len(records)}
        tables = write_tables(images, split=split, settings=settings)
        if not all((folder / name).is_file() for name in (COMPLETE, *tables)):
            (folder / COMPLETE).unlink(missing_ok=True)
            for name, text in tables.items():
                _put(folder / name, text.encode())
            for left in folder.rglob(".*.part"):  # by a process that was killed
                left.unlink(missing_ok=True)
            _put(folder / COMPLETE, _json({**counts, "settings_sha256": hashlib.sha256(_json(settings)).hexdigest()}))
    return counts | {"written": written}


# --- Images ---
def _make(item: Item, applier: Applier, planner: Planner, settings: Mapping[str, Any]) -> tuple[bytes, Provenance]:
    """Return an image as a PNG file's bytes, and the record in it; the key of a graft has the number of its try."""
    size, bits, key = settings["size"], settings["bits"], item.key
    if item.background is None:
        decision = planner.regenerate(key, item.class_name)
        image = applier.whole_images([decision], torch.device("cpu"))
        side = size or image.shape[-1]
        pixels = (resize(image, (side, side))[0, 0] + 1) / 2
        parts = decision.boxes.tolist()
    elif item.insertion == "none":
        pixels, parts = item.background.read(size)[0], item.background.boxes
    else:
        real = item.background.read(size)[None]
        placed = applier.place(real, [planner.regenerate(key, item.class_name)], planner)
        if not placed.decisions[0].synthetic:  # no nodule passed the gate
            return _make(item.stay_real(), applier, planner, settings)
        key, parts = placed.decisions[0].key, placed.decisions[0].boxes.tolist()
        pixels = applier.pixels(real, placed)[0][0][0]
    height, width = pixels.shape
    boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in np.clip(parts, 0, 1).reshape(-1, 4).tolist())
    record = Provenance(key, boxes=boxes, width=width, height=height, **_facts(item, settings))
    levels = (pixels.double().clamp(0, 1) * (2**bits - 1)).round().numpy()
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8 if bits == 8 else np.uint16)).save(file, "PNG", pnginfo=record.png_info())
    return file.getvalue(), record


# --- Files ---
def _facts(item: Item, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in the record of an image before it is made."""
    background = None if item.background is None else item.background.path.name
    same = {name: settings[name] for name in ("weights_hash", "bits")}
    return {"class_name": item.class_name, "insertion": item.insertion, "background": background, **same}


def _read_record(path: Path, item: Item, settings: Mapping[str, Any]) -> Provenance | None:
    """Return the record of a finished image, or None if there is none or it is not this one."""
    record = Provenance.read(path)
    if record is None or record.key[:3] != item.key:
        return None
    possible = [_facts(one, settings).items() for one in (item, item.stay_real())]
    return record if any(facts <= vars(record).items() for facts in possible) else None


def _claim(folder: Path, settings: Mapping[str, Any], inner: set[str]) -> None:
    """Make the folder, and those in it, this export's, or raise ExportError if it is something else's."""
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
    for name in inner | {name.replace("images", "labels") for name in inner}:
        (folder / name).mkdir(parents=True, exist_ok=True)


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


def _describe(value: Any) -> Any:
    """Return a setting of grafts as JSON has it: functions by name, so that others of the same name pass for them."""
    if isinstance(value, Gates):
        return [f"{gate.name} from {gate.low:g} to {gate.high:g} in {gate.tries} tries" for gate in value.gates]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return list(value) if isinstance(value, tuple) else value


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _check(
    n: int | None,
    negatives: int,
    backgrounds: Any,
    normal: Any,
    val: Any,
    size: int | None,
    bits: int,
    split: str,
    out: Path,
) -> None:
    for name, value, low in (("n", n, 0), ("negatives", negatives, 0), ("size", size, 16)):
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value < 10**9
        if value is not None or name == "negatives":
            _require(fits, f"{name} must be an integer of at least {low} and below 10**9, got {value!r}")
    _require(bits in (8, 16), f"bits must be 8 or 16, got {bits!r}")
    check_split(split)
    _require(val is None or split == "train", f"val must be left out with split 'val', got {val}")
    remedy = "the number of images without nodules is negatives"
    _require(isinstance(normal, Sequence), f"normal must be names of folders, got {normal!r}: {remedy}")
    check_names("normal", normal)
    if backgrounds is None:
        _require(
            bool(n or negatives), f"n and negatives must be at least 1 together, got n={n} and negatives={negatives}"
        )
        _require(not normal, f"normal must be left out without backgrounds, got {normal}: {remedy}")
    else:
        inside = Path(backgrounds).resolve() in (out.resolve(), *out.resolve().parents)
        _require(not inside, f"out must not lie in the folder of backgrounds {backgrounds}, got {out}")
    processes = os.environ.get("WORLD_SIZE", "1")
    remedy = "run it without torchrun, in one process, which goes on where it was cut"
    _require(processes == "1", f"WORLD_SIZE must be 1 for an export, got {processes}: {remedy}")


def _check_whole(mix: SyntheticNoduleMix) -> None:
    rule = "mix must have a generator with images(masks, seeds), which puts nodules where masks are, for whole images"
    _require(hasattr(mix.generator, "images"), f"{rule} with boxes, got a {type(mix.generator).__name__}")
    gated = mix.settings.graft.gates is not None
    _require(not gated, "mix must have no gate for whole images, got one: make one without, or give backgrounds")


def _check_apart(labelled: str, items: Sequence[Item]) -> None:
    """Raise ValueError if an image to validate on is trained on: one of the same name and size in bytes."""
    trained = {(own.path.stem, own.path.stat().st_size): own.path for own in (item.background for item in items) if own}
    for path in map(Path, images_below(labelled)):
        same = trained.get((path.stem, path.stat().st_size))
        _require(same is None, f"val must hold images that are not trained on, got {path}, which is {same}")


def _require(fits: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not fits:
        raise error(message)
