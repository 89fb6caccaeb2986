"""Films whose nodules are all known, boxed ones and normal ones, and what a detector is shown of them (METHOD 8).

Films labelled Nodule without a box are left out: as normal ones they would be wrong, and their box is not known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as VF

from carim_aug import SyntheticNoduleMix
from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.common.reading import Reading
from train.common.run import RunError
from train.prior.boxes import NO_LUNG_NODULES
from train.reproduction.sources import Source

Target = dict[str, Tensor]
"""As torchvision's detectors take it: boxes (k, 4) XYXY in pixels, labels (k,) int64, all 1."""

Put = Callable[[Tensor, torch.Generator], tuple[Tensor, list[Target]]]
"""(normal films (B, 1, S, S) in [0, 1], random stream) to films with nodules and their targets."""


@dataclass
class BoxedFilms:
    """Decoded films of a split.

    Attributes:
        images: (N, 1, S, S) uint8.
        boxes: N tensors (k, 4) of nodules, XYXY in pixels of S; empty for a normal film.
        patients: (N,) int64.
        names: N file names, without suffix.
    """

    images: Tensor
    boxes: list[Tensor]
    patients: Tensor
    names: list[str]

    @property
    def boxed(self) -> Tensor:
        """(N,) bool, whether a film has nodules."""
        return torch.tensor([len(b) > 0 for b in self.boxes])


def read_boxed(root: str | Path, split: str, size: int, *, normal: int | None = None) -> BoxedFilms:
    """Reads the films of a split with nodule boxes, of either table, and those with no finding at all.

    Args:
        root: ChestX-ray14's layout, and ChestX-Det_boxes.csv if there is one.
        split: "train", "val" or "test".
        size: side in pixels to which films are reduced (antialiased).
        normal: at most so many normal films (for trials).

    Raises:
        RunError: no film of a kind, films of several sizes, or too many that cannot be read.
    """
    extra = Path(root) / "ChestX-Det_boxes.csv"
    data = ChestXray14(root, split=split, extra_boxes=extra if extra.exists() else None)
    names = [Path(name).stem for name in data.filenames]
    boxes = [data.boxes_relative(i, "Nodule") * size for i in range(len(data))]
    boxed = [i for i in range(len(data)) if len(boxes[i]) and names[i] not in NO_LUNG_NODULES]
    empty = [i for i in range(len(data)) if not len(boxes[i]) and not data.labels[i].any()][:normal]
    if not boxed or not empty:
        raise RunError(
            f"{root}: the {split} split needs films with nodule boxes and normal ones, "
            f"got {len(boxed)} and {len(empty)}"
        )
    rows, images = [], []
    for i, image, _ in Reading(data, size, desc=f"films of {split}", rows=sorted(boxed + empty)):
        rows.append(i)
        images.append(image)
    patients = torch.from_numpy(data.patients)[rows]
    return BoxedFilms(torch.stack(images), [boxes[i] for i in rows], patients, [names[i] for i in rows])


def target_of(boxes: Tensor) -> Target:
    """Gives the target of a film with these nodules."""
    return {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}


def moved(image: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives a film and its boxes mirrored or not, shifted (5 %), zoomed (15 %) and with another contrast and level.

    Args:
        image: (1, S, S) float, [0, 1].
        boxes: (k, 4) XYXY; those of which less than half is left in the film are dropped.
        stream: random stream, of which six numbers are drawn.
    """
    side = image.shape[-1]
    u = torch.rand(6, generator=stream).tolist()
    film = tv_tensors.Image(image)
    drawn = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(side, side))  # type: ignore[call-overload]
    if u[0] < 0.5:
        film, drawn = VF.horizontal_flip(film), VF.horizontal_flip(drawn)
    shift, zoom = [0.1 * side * (v - 0.5) for v in u[1:3]], 0.85 + 0.3 * u[3]
    film = VF.affine(film, 0.0, shift, zoom, [0.0, 0.0], interpolation=VF.InterpolationMode.BILINEAR)
    drawn = VF.affine(drawn, 0.0, shift, zoom, [0.0, 0.0])
    left = VF.clamp_bounding_boxes(drawn).as_subclass(Tensor)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) * zoom**2
    kept = (left[:, 2:] - left[:, :2]).prod(dim=1) >= whole / 2
    contrast, level = 0.8 + 0.4 * u[4], 0.1 * (u[5] - 0.5)
    return ((film.as_subclass(Tensor) - 0.5) * contrast + 0.5 + level).clamp(0, 1), left[kept]


class Draws(Dataset[tuple[Tensor, Target]]):
    """What a run is shown, slot by slot: a real film moved by chance, a pure function of the seed and the slot.

    Every batch has the same number of boxed films, before its normal ones. Films of a kind come again only when all
    have been shown.

    Args:
        films: of the train split.
        images: slots in all.
        batch: slots a step.
        boxed: share of boxed films in each batch, rounded to whole films.
        seed: of everything random.
    """

    def __init__(self, films: BoxedFilms, *, images: int, batch: int, boxed: float, seed: int) -> None:
        """Draws the films of all slots; nothing is moved yet."""
        self.films, self.seed = films, seed
        self.real = torch.arange(images) % batch < round(boxed * batch)
        self._of_kind = {kind: (films.boxed == kind).nonzero()[:, 0] for kind in (True, False)}
        self.rows = torch.empty(images, dtype=torch.int64)
        for kind in (True, False):
            slots = self.real == kind
            self.rows[slots] = self.shuffled(kind, int(slots.sum()), fold(seed, 21, int(kind)))

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """Gives image (1, S, S) float, [0, 1], and target of a slot."""
        return self.shown(int(self.rows[i]), i)

    def shuffled(self, boxed: bool, n: int, key: int) -> Tensor:
        """Gives n rows of boxed or of normal films, each as often as another but for one."""
        rows, stream = self._of_kind[boxed], torch.Generator().manual_seed(key)
        times = -(-n // len(rows))
        shuffles = [rows[torch.randperm(len(rows), generator=stream)] for _ in range(times)]
        return torch.cat(shuffles)[:n] if shuffles else rows[:0]

    def shown(self, row: int, slot: int) -> tuple[Tensor, Target]:
        """Gives a film moved as a slot moves what it shows."""
        stream = torch.Generator().manual_seed(fold(self.seed, slot, 22))
        image, boxes = moved(self.films.images[row].float() / 255, self.films.boxes[row], stream)
        return image, target_of(boxes)


def mixed(mix: SyntheticNoduleMix) -> Put:
    """Gives what a mix of p=1 makes of films, each batch of them after the last: a run shows its batches in order."""
    return lambda films, stream: mix(films, [target_of(torch.empty(0, 4)) for _ in films])


def placed(source: Source, prior: LocationPrior) -> Put:
    """Gives what a source makes of films, with one nodule each at a place of the prior."""

    def put(films: Tensor, stream: torch.Generator) -> tuple[Tensor, list[Target]]:
        drawn = prior.sample(len(films), generator=stream, image_size=films.shape[-1]).boxes
        shown, boxes = source(films * 2 - 1, torch.stack([of_film[0] for of_film in drawn]), stream)
        return ((shown + 1) / 2).clamp(0, 1), [target_of(box[None]) for box in boxes]

    return put


def batches(draws: Draws, *, batch: int, share: float, put: Put | None) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Gives all slots of a run in batches; a share of the normal ones gains nodules, or becomes a boxed film.

    Which slots do is the same whatever they become: a pure function of the seed and the slot.

    Args:
        draws: the real films.
        batch: slots a step.
        share: chance of a normal slot; 0 leaves all as they are.
        put: what puts nodules into films; None shows boxed films again (oversampling).

    Yields:
        B images (1, S, S) float, [0, 1], and their targets.
    """
    chance = torch.rand(len(draws), generator=torch.Generator().manual_seed(fold(draws.seed, 23)))
    changed = ~draws.real & (chance < share)
    again = torch.zeros(len(draws), dtype=torch.int64)
    again[changed] = draws.shuffled(True, int(changed.sum()), fold(draws.seed, 24))
    for start in range(0, len(draws), batch):
        slots = range(start, min(start + batch, len(draws)))
        shown = [draws.shown(int(again[i]), i) if changed[i] and put is None else draws[i] for i in slots]
        places = [k for k, i in enumerate(slots) if changed[i]]
        if put is not None and places:
            stream = torch.Generator().manual_seed(fold(draws.seed, start, 25))
            films, targets = put(torch.stack([shown[k][0] for k in places]), stream)
            for k, film, target in zip(places, films, targets, strict=True):
                shown[k] = film, target
        yield [image for image, _ in shown], [target for _, target in shown]
