"""Nothing wrong in silence: thousands of generated data sets, each of which comes out right or is refused by name.

What is right is known when a case is made: its labels are drawn together with what a nodule must make of them, and
carim_aug is asked for nothing but its record of boxes. An image whose label becomes a nodule's differs from its
background in these boxes and nowhere else, by a fair part of what its own values span; all else comes back as it was.
One case again: `outcome(make_case(seed))`.
"""

import copy
import re
import traceback
import warnings
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import getitem
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import prior
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from carim_aug import LabelPolicy, SyntheticNoduleMix
from carim_aug.data import phantom_chest
from carim_aug.labels import vector
from carim_aug.ops.findings import FINDINGS, TORCHXRAYVISION18
from carim_aug.transforms import apply
from carim_aug.transforms.plan import MixParams

NODULE = ("Nodule", "nodule", "NODULE", "Nodule ")
NORMAL = ("No Finding", "no_finding", "No Nodule", "healthy", "Normal", "No findings", "NoFinding", "No-Finding")
OTHERS = tuple(name for name in dict.fromkeys((*FINDINGS, *TORCHXRAYVISION18, "Pacemaker")) if name != "Nodule")
REMEDY = "pass |use |wrap |return |convert |add |leave |NaN here|more classes need"
BRIGHT = 0.2  # share of a range that the nodules here add


class Bright:
    """A generator whose nodules add the same to every pixel."""

    image_size, weights_hash = 32, "0" * 64

    def residuals(self, regions, masks, seeds):
        return torch.full_like(masks, 2 * BRIGHT)


def choice(rng, values, p=None):
    return values[int(rng.choice(len(values), p=p))]


def chance(rng, p):
    return bool(rng.random() < p)


# --- Labels, and what a nodule must make of them ---
@dataclass
class Labels:
    form: str
    before: list  # of the samples
    after: list | None = None  # what a graft must make of each; None: its boxes come into a target
    closed: Any = False  # which say nodule, or one class that a graft would wipe out
    normal: Any = False  # which say normal for sure, and get a nodule with p = 1
    names: tuple = ("No Finding", "Nodule")  # in the order of indices, columns or label numbers
    refused: str = ""  # why it cannot be right
    first: int = 1  # label number of the first name, for boxes


def place(names, words):
    return [name in words for name in names].index(True)


def class_names(rng, normal, others):
    """Return a nodule class, and as many that are normal and others, in any order."""
    names = [choice(rng, NODULE), *rng.permutation(NORMAL)[:normal], *rng.permutation(OTHERS)[:others]]
    return tuple(str(name) for name in rng.permutation(names))


def scalars(rng, n, voice, sizes):
    """Class indices; or floats, where 1.0 is a nodule, or with names in another order perhaps a class's index."""
    form = choice(rng, ("integer", "integer", "bool", "float"))
    make = {
        "integer": (int, np.int64, np.int32, torch.tensor, partial(torch.tensor, dtype=torch.int32)),
        "bool": (bool, np.bool_, partial(torch.tensor, dtype=torch.bool)),
        "float": (float, np.float32, torch.tensor, partial(torch.tensor, dtype=torch.float64)),
    }[form]
    make, labels = choice(rng, make), Labels(form, [])
    if voice != "nobody":
        labels.names = class_names(rng, 1, 0 if form == "bool" else choice(rng, (0, 0, 1, 3)))
    nodule, normal = place(labels.names, NODULE), place(labels.names, NORMAL)
    values = rng.integers(len(labels.names), size=n)
    labels.closed, labels.normal = values != normal, values == normal
    if form == "float":
        values = rng.choice([0.0, 0.0, 1.0, 0.25, 0.75, np.nan], size=n)
        labels.closed, labels.normal = values >= 0.5, values == 0
        labels.refused = "" if (nodule, len(labels.names)) == (1, 2) else "floats of classes in another order"
    if form != "bool" and chance(rng, 0.08):
        values[rng.integers(n)], labels.refused = choice(rng, (-1, len(labels.names))), "a number of no class"
    item = float if form == "float" else int
    labels.before, labels.after = [make(item(v)) for v in values], [make(item(1 if form == "float" else nodule))] * n
    return labels


def rows(rng, n, voice, sizes):
    columns = choice(rng, (1, 2, 2, 2, 3, 5, 7, 14, 15, 18))
    words = min(columns - 1, choice(rng, (0, 1, 1, 2)))
    names = class_names(rng, words, columns - 1 - words)
    names = {14: FINDINGS, 18: TORCHXRAYVISION18}[columns] if columns in (14, 18) and chance(rng, 0.4) else names
    nodule, normal = place(names, NODULE), [i for i, name in enumerate(names) if name in NORMAL]
    rest = [i for i in range(columns) if i not in (nodule, *normal)]
    values, positive = np.zeros((n, columns)), rng.random(n) < 0.3
    healthy = ~positive & (rng.random(n) < (0.7 if rest else 1.0))
    values[:, nodule] = positive
    values[:, normal] = healthy[:, None]
    values[:, rest] = (rng.random((n, len(rest))) < 0.5) & ~healthy[:, None]
    dtype = choice(rng, ("float32", "float64", "float16", "int64", "uint8", "bool"), (0.4, 0.1, 0.1, 0.2, 0.1, 0.1))
    if "float" in dtype:  # soft rows, and findings that are not annotated
        soft = rng.random(n) < 0.2
        values[soft] = np.where(values[soft] > 0, 0.75, 0.25)
        healthy &= ~soft
        if rest and chance(rng, 0.5):
            values[:, choice(rng, rest)] = np.nan
            values[rng.random(n) < 0.2, choice(rng, rest)] = np.nan
    refused = "columns without names" if columns > 1 and voice == "nobody" else ""
    if dtype not in ("uint8", "bool") and chance(rng, 0.08):
        values[rng.integers(n), rng.integers(columns)], refused = -1, "-1"
    grafted = values.copy()
    grafted[:, normal], grafted[:, nodule] = 0, 1
    make = choice(rng, (np.array, torch.from_numpy))
    before, after = ([make(row) for row in table.astype(dtype)] for table in (values, grafted))
    form = "one-hot" if columns == 2 and normal else "multi-label"
    return Labels(form, before, after, positive, healthy, names, refused)


def targets(rng, n, voice, sizes):
    """Boxes in one of several styles; some images are full of them."""
    names = class_names(rng, 0, 0 if voice == "nobody" else choice(rng, (0, 2)))
    first = 0 if voice == "data set" and chance(rng, 0.15) else 1
    style = choice(rng, ("tensor", "array", "XYXY", "XYWH", "CXCYWH", "COCO", "COCO dict"))
    whole, masks, fields = chance(rng, 0.15), chance(rng, 0.3) and style != "array", chance(rng, 0.5)
    before = []
    for i, (height, width) in enumerate(sizes):
        corner = rng.random((choice(rng, (0, 1, 2, 3)), 2)) * 0.7
        boxes = np.concatenate([corner, corner + 0.05 + 0.2 * rng.random(corner.shape)], 1)
        if len(boxes) and chance(rng, 0.2):
            boxes[0] = 0, 0, 1, 1
        boxes *= np.array([width, height, width, height])
        boxes = boxes.round() if whole else boxes
        numbers = rng.integers(first, first + len(names), len(boxes))
        before.append(target(style, boxes, numbers, (height, width), i, masks, fields, whole))
        if not len(boxes) and "COCO" not in style and chance(rng, 0.5):
            before[-1] = choice(rng, (None, {}, {"image_id": i}))
    return Labels(f"boxes {style}", before, names=names, first=first)


def target(style, boxes, numbers, size, i, masks, fields, whole):
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    if "COCO" in style:
        found = [
            {"id": j, "image_id": i, "bbox": box, "category_id": int(number), "iscrowd": 0}
            for j, (box, number) in enumerate(zip(xywh.tolist(), numbers, strict=True))
        ]
        return found if style == "COCO" else {"image_id": i, "annotations": found}
    cxcywh = np.concatenate([xywh[:, :2] + xywh[:, 2:] / 2, xywh[:, 2:]], 1)
    written = {"XYWH": xywh, "CXCYWH": cxcywh}.get(style, boxes)
    written = torch.tensor(written).to(torch.int64 if whole and style != "CXCYWH" else torch.float32)
    if "XY" in style:
        written = BoundingBoxes(written, format=style, canvas_size=size)
    made = {"boxes": written, "labels": torch.from_numpy(numbers)}
    if style == "array":
        made = {name: value.numpy() for name, value in made.items()}
    if masks:
        made["masks"] = (Mask if "XY" in style else torch.clone)(torch.ones(len(boxes), *size, dtype=torch.uint8))
    if fields:
        made |= {"image_id": torch.tensor([i]), "path": f"{i}.png", "score": torch.ones(len(boxes))}
        made |= {"area": torch.tensor(xywh[:, 2:].prod(1)), "iscrowd": torch.zeros(len(boxes)).long()}
    return made


# --- How a data set names its classes, and what it is wrapped in ---
class Data(Dataset):
    def __init__(self, rows, **attributes):
        vars(self).update(attributes, rows=rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def say(rng, labels, key):
    """Return the attributes in which a data set has its names."""
    names, boxes, columns = list(labels.names), labels.after is None, np.ndim(labels.before[0]) > 0
    if "COCO" in labels.form and chance(rng, 0.7):
        return {"coco": SimpleNamespace(cats={i: {"name": name} for i, name in enumerate(names, labels.first)})}
    if boxes and labels.first == 1 and chance(rng, 0.85):
        names = ["__background__", *names]
    more = () if boxes else ("labels", "features", "pathologies") if columns else ("labels", "features", "class_to_idx")
    attribute = choice(rng, ("classes", "class_names", "label_names", *more))
    value = choice(rng, (list, tuple, np.array))(names)
    if attribute == "class_to_idx":
        value = {name: i for i, name in enumerate(names)}
    elif attribute == "features":
        feature = SimpleNamespace(feature=SimpleNamespace(names=names)) if columns else SimpleNamespace(names=names)
        value = {"sex": SimpleNamespace(names=["F", "M"])} if chance(rng, 0.3) else {}
        value |= {"image": object(), key if isinstance(key, str) and chance(rng, 0.7) else "label": feature}
    return {attribute: value}


def wrap(rng, data):
    """Return a data set of the same samples."""
    n = len(data)
    ways = (
        lambda: data,
        lambda: Subset(data, range(n)),
        lambda: ConcatDataset([Subset(data, [i]) for i in range(n)]),
        lambda: ConcatDataset([*[Subset(data, [])] * 9, data]),
        lambda: Data(data),
        lambda: Data(Subset(data, range(n))),
        lambda: Data(list(data.rows), parts=[data]),
        lambda: Data(list(data.rows), parts={"train": data}),
    )
    way = int(rng.choice(len(ways), p=(0.4, 0.1, 0.1, 0.05, 0.15, 0.1, 0.05, 0.05)))
    return way, ways[way]()


# --- Images and layouts ---
MEAN, STD = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
IMAGENET = -MEAN / STD, (1 - MEAN) / STD
RANGES = {  # what must come of it: ends of the values, dtype, value_range
    "right": [
        *[((0, 255), "uint8", "auto"), ((0, 65535), "uint16", "auto"), ((0, 4095), "uint16", (0, 4095))],
        *[((0, 1), "float16", "auto"), ((0, 1), "bfloat16", "auto"), ((0, 1), "float32", "auto")],
        *[((0, 1), "float64", "unit"), ((-1, 1), "float32", "symmetric"), ((-1, 1), "float16", "symmetric")],
        *[((-1024, 1024), "float32", "xrv"), (IMAGENET, "float32", "imagenet"), (IMAGENET, "float64", "imagenet")],
    ],
    "narrow": [
        *[((0, 4095), "uint16", "auto"), ((0, 0.0625), "float32", "auto"), ((0, 0.0625), "float64", "auto")],
        *[((0, 1), "float32", "uint8"), ((0, 1), "float32", "xrv")],
    ],
    "refused": [
        *[((-1, 1), "float32", "auto"), ((-1024, 1024), "float32", "auto"), ((0, 255), "float32", "auto")],
        *[((0, 4095), "float32", "auto"), ((0, 4095), "int16", "auto"), (IMAGENET, "float32", "auto")],
    ],
}


Study = namedtuple("Study", "image, label, patient")
LAYOUTS = {  # a sample of image, label and number; the ways to both; what the mix is told
    "tuple": (lambda x, y, i: (x, y), (0,), (1,), {}),
    "list": (lambda x, y, i: [x, y], (0,), (1,), {}),
    "named tuple": (lambda x, y, i: Study(x, y, f"p{i}"), (0,), (1,), {}),
    "fields": (lambda x, y, i: (f"p{i}", x, y, {"path": f"{i}.png", "age": 50.5 + i}), (1,), (2,), {}),
    "label first": (lambda x, y, i: (y, x, i), (1,), (0,), {"layout": (1, 0)}),
    "dict": (lambda x, y, i: {"image": x, "label": y, "mm": np.array([i, 0.5])}, ("image",), ("label",), {}),
    "hugging face": (lambda x, y, i: {"pixel_values": x, "labels": y}, ("pixel_values",), ("labels",), {}),
    "mask": (lambda x, y, i: {"x": x, "y": y, "mask": np.ones((1, 4, 4))}, ("x",), ("y",), {}),
    "keys": (lambda x, y, i: {"sex": i % 2, "scan": x, "dx": y}, ("scan",), ("dx",), {"layout": ("scan", "dx")}),
    "getter": (
        *(lambda x, y, i: {"scan": x, "study": {"sex": i % 2, "dx": y}}, ("scan",), ("study", "dx")),
        {"labels_getter": lambda sample: sample["study"]["dx"]},
    ),
}


@cache
def chest(side, seed):
    return phantom_chest(side, seed=seed)[0].double().numpy()


def make_images(rng, sizes, ends, dtype, lungs):
    """Return images that use a tenth to six tenths of their range, all of one type."""
    (low, high), channels = ends, 3 if ends is IMAGENET else choice(rng, (1, 1, 3))
    kinds = (torch.Tensor.numpy, Image, torch.Tensor.clone)
    make = choice(rng, kinds) if dtype != "bfloat16" else torch.Tensor.clone
    for height, width in sizes:
        grey = chest(height, int(rng.integers(4)))[:, :width] if lungs else rng.random((height, width))
        grey = 0.1 + 0.5 * (grey - grey.min()) / np.ptp(grey)
        image = low + (high - low) * np.broadcast_to(grey, (channels, height, width))
        yield make(torch.from_numpy(image.round() if "int" in dtype else image).to(getattr(torch, dtype)))


# --- Cases ---
def join_targets(samples):
    """Return a batch with a list in each place, as detectors have it."""
    if isinstance(samples[0], dict):
        return {key: [sample[key] for sample in samples] for key in samples[0]}
    return tuple(list(entries) for entries in zip(*samples, strict=True))


def make_case(seed):
    rng = np.random.default_rng(seed)
    use, n, lungs = choice(rng, ("batch", "loader", "wrap")), int(rng.integers(2, 6)), chance(rng, 0.12)
    voice = choice(rng, ("nobody", "user", "data set"), (0.3, 0.7, 0) if use == "batch" else (0.15, 0.25, 0.6))
    make = choice(rng, (scalars, rows, targets), (0.35, 0.4, 0.25))
    fate = choice(rng, ("right", "narrow", "refused"), (0.82, 0.1, 0.08))
    ends, dtype, value_range = choice(rng, RANGES[fate])

    # Images of one size, but for detectors.
    sizes = [(int(h), int(w)) for h, w in rng.integers(32, 161, (n, 2))]
    sizes = sizes if make is targets and chance(rng, 0.5) else sizes[:1] * n
    sizes = [(max(h, 64), max(h, 64) - h % 8) for h, _ in sizes] if lungs else sizes
    images = list(make_images(rng, sizes, ends, dtype, lungs))
    labels = make(rng, n, voice, sizes)
    refused = labels.refused or ("values of another range" if fate == "refused" else "")
    if voice != "nobody" and chance(rng, 0.05):
        missing = NORMAL if labels.form == "integer" and chance(rng, 0.5) else NODULE
        names = ["Rib" if name in missing else name for name in labels.names]
        labels.names, refused = tuple(names), refused or "names without a nodule or normal class"

    layout = choice(rng, list(LAYOUTS))
    pack, _, label_path, told = LAYOUTS[layout]
    samples = [pack(image, label, i) for i, (image, label) in enumerate(zip(images, labels.before, strict=True))]
    said = say(rng, labels, label_path[-1]) if voice == "data set" else {}
    said |= {"targets": labels.before} if use != "batch" and chance(rng, 0.3) else {}
    way, data = wrap(rng, Data(samples, **said)) if use != "batch" else (0, Data(samples))
    options = {"p": choice(rng, (1.0, 1.0, 0.5)), "seed": seed, "placement": "lungs" if lungs else "prior"}
    options |= {"value_range": value_range, **told}
    policy = None
    if voice == "user":
        policy = ("detection", ("__background__", *labels.names)) if make is targets else ("auto", labels.names)
    elif make is targets and chance(rng, 0.5):
        policy = ("detection", None)
    text = f"{seed}: {use} of {labels.form} {labels.names}, {dtype} in {value_range}, {layout}; {voice} names them"
    text += "".join(f" in {name}, {type(value).__name__}, wrapped {way}" for name, value in said.items())
    return SimpleNamespace(
        **dict(text=text, labels=labels, images=images, data=data, layout=LAYOUTS[layout]),
        **dict(use=use, options=options, policy=policy, step=int(rng.integers(1, n + 1))),
        **dict(join=join_targets if make is targets else default_collate, narrow=fate == "narrow", refused=refused),
    )


def passes(case):
    """Yield two epochs, each a list of (numbers of samples, what came of them, boxes on record)."""
    labels = LabelPolicy(*case.policy) if case.policy else "auto"
    mix, n = SyntheticNoduleMix(Bright(), prior(), labels=labels, **case.options), len(case.images)
    if case.use == "batch":
        batch = case.join(case.data.rows)
        for _ in range(2):
            yield [(range(n), mix(batch), mix.last_params.boxes)]
    elif case.use == "loader":
        loader = mix.loader(case.data, case.step, **({"collate_fn": case.join} if case.options["seed"] % 2 else {}))
        starts = range(0, n, case.step)
        for _ in range(2):
            found = [(batch, loader.last_params.boxes) for batch in loader]
            yield [(range(a, a + len(boxes)), batch, boxes) for a, (batch, boxes) in zip(starts, found, strict=True)]
    else:
        wrapped = mix.wrap(case.data)
        loader = DataLoader(wrapped, case.step, collate_fn=list)
        for _ in range(2):
            items = [item for batch in loader for item in batch]
            boxes = [wrapped.decision(i).boxes_at(*image.shape[-2:]) for i, image in enumerate(case.images)]
            yield [(range(i, i + 1), item, [boxes[i]]) for i, item in enumerate(items)]


# --- What must hold ---
def same(a, b):
    """Return whether type, dtype, shape, values and NaN are the same."""
    if type(a) is not type(b) or getattr(a, "dtype", 0) != getattr(b, "dtype", 0):
        return False
    if isinstance(a, torch.Tensor | np.ndarray | np.generic):
        a, b = (torch.as_tensor(v).as_subclass(torch.Tensor) for v in (a, b))
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def check_epoch(case, found):
    """Check all batches of an epoch, and return its boxes."""
    pack, image_path, label_path, _ = case.layout
    labels, recorded = case.labels, []
    closed, normal = (np.broadcast_to(v, len(case.images)) for v in (labels.closed, labels.normal))
    for numbers, batch, boxes in found:
        images, new = (reduce(getitem, path, batch) for path in (image_path, label_path))
        join = case.join
        if case.use == "wrap":
            images, new, join = [images], [new], lambda samples: samples[0]
            assert type(images[0]) is type(case.images[numbers[0]]), f"images became {type(images[0])}"
        for i, image, own in zip(numbers, images, boxes, strict=True):
            check_image(case.images[i], image, own)
            assert not len(own) or not closed[i], f"a graft into an image of {labels.before[i]}"
            sure = normal[i] and case.options["p"] == 1 and case.options["placement"] == "prior"
            assert len(own) or not sure, f"no graft into an image of {labels.before[i]}"
        if labels.after is None:
            for i, label, own in zip(numbers, new, boxes, strict=True):
                check_target(labels.before[i], label, own, labels.first + place(labels.names, NODULE))
        else:
            right = [(labels.after if len(own) else labels.before)[i] for i, own in zip(numbers, boxes, strict=True)]
            right = right if case.use == "wrap" else join(right)
            assert same(new, right), f"labels became {new}, not {right}"
        samples = [pack(images[j], new[j], i) for j, i in enumerate(numbers)]
        assert same(batch, join(samples)), "another entry of a sample changed"
        recorded += boxes
    return recorded


def check_image(old, new, boxes):
    """Check that an image is its background but in the boxes, and as bright there as its own values ask for."""
    old, new = (torch.as_tensor(image).as_subclass(torch.Tensor) for image in (old, new))
    assert (old.dtype, old.shape) == (new.dtype, new.shape), f"{old.dtype} {old.shape} became {new.dtype} {new.shape}"
    added, span = (new.double() - old.double()).abs().amax(0), np.ptp(old[0].double().numpy())
    y, x = torch.arange(len(added))[:, None] + 0.5, torch.arange(added.shape[1])[None] + 0.5
    inside = torch.zeros_like(added, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        seam = 0.05 * (x2 - x1) + 1e-3, 0.05 * (y2 - y1) + 1e-3
        inside |= (x1 - seam[0] <= x) & (x <= x2 + seam[0]) & (y1 - seam[1] <= y) & (y <= y2 + seam[1])
        row, column = (max(int(np.ceil(middle)) - 1, 0) for middle in ((y1 + y2) / 2, (x1 + x2) / 2))
        inside[row, column] = True
        part = float(added[row, column]) / span
        assert 0.05 < part < 3 * BRIGHT * len(boxes), f"a nodule adds {part:.2f} of all that the image's values span"
        if min(x2 - x1, y2 - y1) >= 3:
            for line, a, b in ((added[row] > 0, x1, x2), (added[:, column] > 0, y1, y2)):
                assert line[int(a) : int(b) + 1].sum() >= 0.8 * (b - a) - 2, "a nodule does not fill its box"
    assert not added[~inside].any(), "pixels outside the boxes changed"


def corners(label):
    """Return boxes (k, 4) XYXY and label numbers of a target."""
    found = label.get("annotations") if isinstance(label, dict) else label
    if found or not isinstance(label, dict) or not {"boxes", "labels"} <= set(label):
        rows, form = torch.tensor([row["bbox"] for row in found or []]).reshape(-1, 4), "XYWH"
        numbers = [row["category_id"] for row in found or []]
    else:
        rows, numbers = torch.as_tensor(label["boxes"]).as_subclass(torch.Tensor), [int(v) for v in label["labels"]]
        form = label["boxes"].format.name if isinstance(label["boxes"], BoundingBoxes) else "XYXY"
    start, end = rows.float().reshape(-1, 4).split(2, dim=1)
    start = start - end / 2 if form == "CXCYWH" else start
    return torch.cat([start, end if form == "XYXY" else start + end], 1), numbers


def check_target(old, new, boxes, number):
    """Check that a target is as it was, and nodules in these boxes come after what it had."""
    if not len(boxes):
        assert same(old, new), f"the target of a real image {old} became {new}"
        return
    (real, numbers), (all_boxes, all_numbers) = corners(old), corners(new)
    right = numbers + [number] * len(boxes)
    assert all_numbers == right, f"label numbers became {all_numbers}, not {right}"
    old, new = ({"": t} if isinstance(t, list) else t or {} for t in (old, new))
    slack = 1.01 if "int" in str(getattr(new.get("boxes"), "dtype", "")) else 0.01
    assert torch.allclose(all_boxes[len(real) :], boxes, atol=slack), f"{all_boxes[len(real) :]} is not {boxes}"
    for box in [*boxes, *all_boxes[len(real) :]]:
        apart = (real[:, 2:] <= box[:2]) | (box[2:] <= real[:, :2])
        assert apart.any(1).all(), f"the graft at {box.tolist()} lies on one of the real boxes {real.tolist()}"
    for name, value in old.items():
        if name in ("image_id", "path"):
            assert same(new[name], value), f"{name} {value} became {new[name]}"
            continue
        kinds = [(type(v), getattr(v, "dtype", 0), getattr(v, "format", 0)) for v in (value, new[name])]
        assert kinds[0] == kinds[1] and len(new[name]) == len(all_boxes), f"{name} {value} became {new[name]}"
        assert all(map(same, value, new[name])), f"{name} {value} became {new[name]}"  # as far as it went
    for mask, (x1, y1, x2, y2) in zip(new.get("masks", [])[len(real) :], boxes.tolist(), strict="masks" in new):
        row, column = torch.as_tensor(mask).nonzero().T
        assert x1 - 1 < column.min() and column.max() < x2 and y1 - 1 < row.min() and row.max() < y2, "a mask"


def check(case):
    """Check two epochs of a case, and return whether anything was applied."""
    before, last = copy.deepcopy(case.data.rows if case.use == "batch" else list(case.data)), None
    applied = False
    for found in passes(case):
        boxes = check_epoch(case, found)
        applied = applied or any(map(len, boxes))
        again = [len(a) and same(a, b) for a, b in zip(last or boxes, boxes, strict=True)]
        assert last is None or not any(again), "the second epoch has a nodule of the first"
        last = boxes
    assert same(before, case.data.rows if case.use == "batch" else list(case.data)), "the input changed in place"
    return "applied" if applied else "real"


def outcome(case):
    """Return "applied", "real", "refused", or "WRONG" and what is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            came = check(case)
        except AssertionError as error:
            return f"WRONG: {error}"
        except Exception as error:
            words, file = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
            ours = isinstance(error, ValueError | TypeError) and "/carim_aug/" in file
            if not ours or not re.search("(must|has).*got|more than once", words, re.DOTALL):
                return f"WRONG: no error of ours, {type(error).__name__}: {words}"
            return "refused" if not case.refused or re.search(REMEDY, words) else f"WRONG: no line to write in: {words}"
    told = [str(warning.message) for warning in caught]
    if case.refused:
        return f"WRONG: {case.refused}, without a word"
    if bool(told) != case.narrow or not all("of their range" in words for words in told):
        return f"WRONG: warned {told}"
    return came


def run(seeds):
    """Return how many cases of each form came to what, and what was wrong."""
    counts, wrong = Counter(), []
    for seed in seeds:
        case = make_case(seed)
        came = outcome(case)
        counts[case.labels.form.split()[0], came.split(":")[0]] += 1
        wrong += [f"case {case.text}\n    {came}"] if came.startswith("WRONG") else []
    return counts, wrong


BLOCKS = [range(200), *(pytest.param(range(i, i + 300), marks=pytest.mark.train) for i in range(200, 3200, 300))]


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_what_is_generated_comes_out_right_or_is_refused(seeds):
    counts, wrong = run(seeds)
    assert not wrong, f"{len(wrong)} of {len(seeds)} cases are wrong:\n" + "\n".join(wrong[:20])
    for form in ("integer", "bool", "float", "one-hot", "multi-label", "boxes"):
        assert counts[form, "applied"] >= 3, f"nothing is grafted into {form} labels: {counts}"


def shifted_columns(label, columns, count):
    return SET_COLUMNS(label, {(column + 1) % count: value for column, value in columns.items()}, count)


def bright_corner(*given):
    mixed = GRAFT(*given)
    mixed[..., :2, :2] = mixed[..., -2:, -2:]
    return mixed


SET_COLUMNS, GRAFT, BOXES = vector.set_columns, apply.graft, MixParams.boxes.fget
SABOTAGE = {
    "labels became": (vector, "set_columns", shifted_columns),
    "pixels outside the boxes changed": (apply, "graft", bright_corner),
    "does not fill its box|pixels outside|a nodule adds": (
        *(MixParams, "boxes"),
        property(lambda params: [own + 3 for own in BOXES(params)]),
    ),
}


@pytest.mark.parametrize("words", SABOTAGE)
def test_a_shifted_column_pixel_or_box_is_caught(words, monkeypatch):
    monkeypatch.setattr(*SABOTAGE[words])
    assert sum(bool(re.search(words, text)) for text in run(range(60))[1]) >= 3
