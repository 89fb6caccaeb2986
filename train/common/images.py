"""Real images in memory, and what is known of them: the one holder and the one reader of all recipes."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.chestxray14_tables import BOX_SIZE, read_boxes
from carim_aug.data.io import DataError, read_rows
from carim_aug.ops.findings import FINDINGS
from train.common.run import RunError

NODULE = FINDINGS.index("Nodule")
OFFICIAL_BOXES, EXTRA_BOXES = "BBox_List_2017.csv", "ChestX-Det_boxes.csv"

NO_LUNG_NODULES = {"00000011_000"}  # has 24 nodules of the skin in ChestX-Det: its boxes are left out
LARGEST_BOX = 0.16  # of the side: a nodule is at most 3 cm, of some 36 cm (MacMahon et al., Radiology 2017)
TOLERATED = 0.1  # largest share of unreadable images: above it something else is wrong than a few damaged files


@dataclass(eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Decoded real images, and what is known of them; as a data set, (image (1, S, S) uint8, 1 if labelled Nodule)."""

    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N, 14) float32, columns as `FINDINGS`
    patients: Tensor  # (N,) int64, always on the CPU
    boxes: list[Tensor]  # N of (k, 4) float32, nodule boxes, XYXY as parts of the image's side; k may be 0
    names: list[str]  # N, Image Index; of `read_nodule_boxes`, without suffix
    # N of (k,) bool, whether a box is ChestX-ray14's own (some 1.6 times as wide as its nodule), not ChestX-Det's
    official: list[Tensor] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # N of "train", "val", "test", or "" where the split is not known
    classes = ("No Finding", "Nodule")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i, NODULE])

    @property
    def targets(self) -> list[int]:
        """1 where labelled Nodule, else 0."""
        return self.labels[:, NODULE].int().tolist()

    @cached_property
    def normal(self) -> Tensor:
        """Rows of the images without any finding, (n,) int64."""
        return (~self.labels.any(dim=1)).nonzero()[:, 0]

    @cached_property
    def nodule(self) -> Tensor:
        """Rows of the images that are labelled Nodule, (n,) int64."""
        return (self.labels[:, NODULE] > 0).nonzero()[:, 0]

    @cached_property
    def boxed(self) -> Tensor:
        """Rows of the images with a nodule box, whatever their label, (n,) int64."""
        return torch.tensor([i for i, boxes in enumerate(self.boxes) if len(boxes)], dtype=torch.int64)

    def each_box(self) -> tuple[Tensor, Tensor]:
        """Return the row of every box's image, (K,) int64, and the boxes, (K, 4)."""
        counts = torch.tensor([len(boxes) for boxes in self.boxes], dtype=torch.int64)
        return torch.repeat_interleave(counts), torch.cat([*self.boxes, torch.empty(0, 4)])

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the same set with images and labels on a device; boxes and patients stay where they are."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def rows(self, index: Tensor) -> "ImageSet":
        """Return some images, by their rows (n,) int64; one may come several times."""
        at = index.to(self.images.device)
        parts: tuple[list[Any], ...] = (self.boxes, self.names, self.official, self.splits)
        lists = ([items[i] for i in index.tolist()] if items else [] for items in parts)
        return ImageSet(self.images[at], self.labels[at], self.patients[index.cpu()], *lists)

    def symmetric(self, rows: Tensor) -> Tensor:
        """Return some images, by their rows (n,) int64, as (n, 1, S, S) float32 in [-1, 1]."""
        return to_symmetric(self.images[rows.to(self.images.device)])

    def check(self, where: str | Path, **least: int) -> None:
        """Raise RunError unless there are so many rows of each kind: `check("data, val split", normal=1, nodule=1)`."""
        got = {kind: len(getattr(self, kind)) for kind in least}
        if any(got[kind] < count for kind, count in least.items()):
            texts = [" and ".join(f"{count} {kind}" for kind, count in counts.items()) for counts in (least, got)]
            raise RunError(f"{where} must hold at least {texts[0]} images, got {texts[1]}")


def to_symmetric(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def read_images(
    root: str | Path,
    split: str | Sequence[str] | None,
    size: int,
    *,
    only_normal_or_nodule: bool = False,  # leave out images that have a finding but no nodule
    only_normal_or_boxed: bool = False,  # leave out images that have a finding but no nodule box
    only: Collection[str] | None = None,  # names (Image Index) of the images to read, by default all
    largest_box: float = LARGEST_BOX,  # boxes longer than this part of the side are left out; 1 keeps all
    limit_normal: int | None = None,  # at most so many images without a finding (for trials)
    any_size: bool = False,  # take images of several sizes, each squeezed to the square; else they are an error
    unreadable: list[str] | None = None,  # gains what is wrong with each image that cannot be read; else printed
) -> ImageSet:
    """Read the images of a split (several, or None for all), as squares of one size (antialiased), in table order.

    The folder is in ChestX-ray14's layout, with ChestX-Det_boxes.csv if there is one. DataError if a table breaks its
    rules; RunError if there is no image, too many cannot be read, or they are of several sizes.
    """
    parts = [split] if split is None or isinstance(split, str) else list(split)
    known, sources = _read_tables(Path(root), parts, largest_box)
    if not sources:
        raise RunError(f"{root}: the {split} split holds no image")
    normal, nodule = ~known.labels.any(dim=1), known.labels[:, NODULE] > 0
    boxed, wanted = torch.zeros_like(normal).index_fill(0, known.boxed, True), torch.ones_like(normal)
    if only is not None:
        wanted &= torch.tensor([name in only for name in known.names])
    if only_normal_or_nodule:
        wanted &= normal | nodule
    if only_normal_or_boxed:
        wanted &= normal | boxed
    if limit_normal is not None:
        counted = wanted & normal & ~(boxed & only_normal_or_boxed)
        wanted &= ~counted | (counted.cumsum(0) <= limit_normal)
    rows = wanted.nonzero()[:, 0]

    problems: list[str] = []
    desc = "images" if split is None else f"images of {' and '.join(map(str, parts))}"
    images, read = _decode([sources[i] for i in rows.tolist()], size, any_size=any_size, problems=problems, desc=desc)
    if len(problems) > TOLERATED * len(rows):
        raise RunError(
            f"{root}: {len(problems)} of {len(rows)} images cannot be read, more than {TOLERATED:.0%}; the first: "
            f"{problems[0]}"
        )
    if unreadable is not None:
        unreadable += problems
    else:
        for problem in problems:
            tqdm.write(f"left out: {problem}")
    return replace(known.rows(rows[read]), images=images)


def read_nodule_boxes(root: str | Path) -> ImageSet:
    """Read every image that has a nodule box in the tables, whether its file is there or not, by name; no pixels.

    ChestX-Det's boxes that repeat an official one (intersection over union above 0.5) are left out; a patient's number
    is the first eight digits of the name.
    """
    root = Path(root)
    split_rows = read_rows(root / "split.csv", ("Image Index", "split"))
    splits = {row["Image Index"][:8]: row["split"] for _, row in split_rows}
    own = _nodules_of(root / OFFICIAL_BOXES)
    more = _nodules_of(root / EXTRA_BOXES) if (root / EXTRA_BOXES).exists() else {}
    names = sorted(own.keys() | more.keys())
    boxes, official = [], []
    for name in names:
        first, extra = (table.get(name, torch.empty(0, 4)) for table in (own, more))
        extra = extra[~(box_iou(extra, first) > 0.5).any(dim=1)]
        boxes.append(torch.cat([first, extra]))
        official.append(torch.arange(len(boxes[-1])) < len(first))
    labels = torch.zeros(len(names), len(FINDINGS)).index_fill(1, torch.tensor(NODULE), 1)
    patients = torch.tensor([int(name[:8]) for name in names], dtype=torch.int64)
    of_names = [splits.get(name[:8], "") for name in names]
    return ImageSet(_no_pixels(len(names)), labels, patients, boxes, names, official, of_names)


def _no_pixels(n: int) -> Tensor:
    return torch.empty(n, 1, 0, 0, dtype=torch.uint8)


def _nodules_of(path: Path) -> dict[str, Tensor]:
    """Return the nodule boxes of a table, XYXY as parts of the side, by name without suffix."""
    found = {
        Path(name).stem: torch.tensor([box for finding, *box in rows if finding == "Nodule"]).reshape(-1, 4) / BOX_SIZE
        for name, rows in read_boxes(path).items()
    }
    return {name: boxes for name, boxes in found.items() if len(boxes) and name not in NO_LUNG_NODULES}


def _read_tables(
    root: Path, parts: Sequence[str | None], largest_box: float
) -> tuple[ImageSet, list[tuple[ChestXray14, int]]]:
    """Return all that is known of the splits' images but their pixels, and where each is read: data set and place."""
    extra, table = root / EXTRA_BOXES, root / OFFICIAL_BOXES
    sets = [ChestXray14(root, split=part, extra_boxes=extra if extra.exists() else None) for part in parts]
    sources = [(data, i) for data in sets for i in range(len(data))]
    own = _nodules_of(table) if table.exists() else {}
    boxes, official = [], []
    for data, i in sources:
        name = Path(data.filenames[i]).stem
        found = torch.empty(0, 4) if name in NO_LUNG_NODULES else data.boxes_relative(i, "Nodule")
        small = (found[:, 2:] - found[:, :2] <= largest_box).all(dim=1)
        boxes.append(found[small])
        official.append((torch.arange(len(found)) < len(own.get(name, ())))[small])  # the official ones come first
    labels, patients = (torch.cat([torch.from_numpy(getattr(s, k)) for s in sets]) for k in ("labels", "patients"))
    names, splits = [data.filenames[i] for data, i in sources], [data.split or "" for data, _ in sources]
    return ImageSet(_no_pixels(len(sources)), labels, patients, boxes, names, official, splits), sources


def _decode(
    sources: list[tuple[ChestXray14, int]], size: int, *, any_size: bool, problems: list[str], desc: str
) -> tuple[Tensor, Tensor]:
    """Return the images that can be read, (n, 1, size, size) uint8, and their places among the sources."""
    images, read = torch.empty(len(sources), 1, size, size, dtype=torch.uint8), list[int]()
    first: dict[tuple[int, int], str] = {}  # from each size to the first image that has it

    def decode(source: tuple[ChestXray14, int]) -> tuple[Tensor, tuple[int, int]] | DataError:
        data, i = source
        try:
            image = torch.as_tensor(data[i][0])
        except DataError as error:
            return error
        height, width = image.shape[-2:]
        return VF.resize(image, [size, size], antialias=True), (height, width)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding frees the interpreter's lock
        try:
            decoded = zip(sources, pool.map(decode, sources), strict=True)
            for i, ((data, row), found) in enumerate(tqdm(decoded, total=len(sources), desc=desc, unit="image")):
                if isinstance(found, DataError):
                    problems.append(str(found))
                    continue
                images[len(read)], shape = found
                first.setdefault(shape, data.filenames[row])
                if len(first) > 1 and not any_size:
                    sizes = " and ".join(f"{height}x{width} ({name})" for (height, width), name in first.items())
                    raise RunError(f"{data.root}: images must be of one size, got {sizes}; --any-size takes them all")
                read.append(i)
        finally:
            pool.shutdown(cancel_futures=True)
    return images[: len(read)].clone() if len(read) < len(sources) else images, torch.tensor(read, dtype=torch.int64)
