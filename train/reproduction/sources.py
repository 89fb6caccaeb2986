"""Sources of nodules for the patch classifier: real boxed films, and ways to put a nodule into a normal one.

METHOD 8 and EVIDENCE, Quality: the generated nodules, and the controls without which their figures mean nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.fused import compile_generator
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.ops.boxes import boxes_to_masks, feather
from carim_aug.ops.images import resize
from train.metrics.patches import PATCH
from train.reproduction.controls.nodules import LARGEST_BOX, gaussian_blobs
from train.reproduction.controls.poisson import poisson_blend

SIZE = 256

Source = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(films (B, 1, S, S), boxes (B, 4), random stream) to films with a nodule and the nodules' boxes."""


@dataclass
class Patients:
    """Real films of some splits, and whose they are.

    Attributes:
        normal: (N, 1, S, S) uint8.
        normal_patients: (N,) int64.
        nodule: (K, 1, S, S) uint8, one row a box.
        boxes: (K, 4) XYXY in pixels.
        nodule_patients: (K,) int64.
        official: (K,) bool, whether the box is ChestX-ray14's own (some 1.6 times as wide as its nodule) or of the
            extra table (ChestX-Det's are tight).
        films: (K,) int64, the same number for boxes of one film.
    """

    normal: Tensor
    normal_patients: Tensor
    nodule: Tensor
    boxes: Tensor
    nodule_patients: Tensor
    official: Tensor
    films: Tensor


def read_patients(root: str | Path, splits: list[str], *, limit: int | None = None) -> Patients:
    """Reads normal films and boxed nodules of splits."""
    extra = Path(root) / "ChestX-Det_boxes.csv"
    normal, normal_patients, nodule, boxes, nodule_patients, official, films = [], [], [], [], [], [], []
    for split in splits:
        data = ChestXray14(root, split=split, extra_boxes=extra if extra.exists() else None)
        own = ChestXray14(root, split=split)
        for i in tqdm(range(len(data)), desc=f"films of {split}", unit="image"):
            found = data.boxes_relative(i, "Nodule")  # the official ones first
            is_own = torch.arange(len(found)) < len(own.boxes_relative(i, "Nodule"))
            small = (found[:, 2:] - found[:, :2] <= LARGEST_BOX).all(dim=1)
            found, is_own = found[small], is_own[small]
            is_normal = not bool(data.labels[i].any()) and (limit is None or len(normal) < limit)
            if not len(found) and not is_normal:
                continue
            image = VF.resize(torch.as_tensor(data[i][0]), [SIZE, SIZE], antialias=True)
            patient = int(data.patients[i])
            if is_normal:
                normal.append(image)
                normal_patients.append(patient)
            nodule += [image] * len(found)
            boxes.append(found * SIZE)
            nodule_patients += [patient] * len(found)
            official.append(is_own)
            films += [len(official)] * len(found)
    if not normal or not nodule:
        raise ValueError(f"{root}: {splits} need normal films and nodule boxes, got {len(normal)} and {len(nodule)}")
    return Patients(
        torch.stack(normal),
        torch.tensor(normal_patients),
        torch.stack(nodule),
        torch.cat(boxes),
        torch.tensor(nodule_patients),
        torch.cat(official),
        torch.tensor(films),
    )


def scaled(films: Tensor) -> Tensor:
    """Gives uint8 films as float32 in [-1, 1]."""
    return films.float() / 127.5 - 1


def blob_source(films: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives films with a drawn Gaussian blob in each box."""
    shape = gaussian_blobs(boxes, films.shape[-1])
    peak = 0.05 + 0.15 * torch.rand(len(films), 1, 1, 1, generator=stream)
    return (films + peak * shape).clamp(-1, 1), boxes


def ct_source(path: str | Path) -> Source:
    """Gives the source that superimposes CT nodules."""
    nodules = CTNodules(path)
    return lambda films, boxes, stream: (nodules.superimpose(films, boxes, generator=stream)[0], boxes)


def graft_source(weights: str | Path | None) -> Source:
    """Gives the source that grafts same-noise differences of a generator, as `SyntheticNoduleMix` does."""
    generator = NoduleGenerator.from_pretrained(weights)
    fast, size = compile_generator(generator), generator.image_size

    def source(films: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(films), generator.noise_dim, generator=stream)
        masks = boxes_to_masks(list(boxes[:, None] * (size / SIZE)), size)
        with torch.inference_mode():
            difference = fast(noise, masks) - fast(noise, torch.zeros_like(masks))
        added = feather(list(boxes[:, None]), SIZE) * resize(difference, (SIZE, SIZE))
        return (films + added).clamp(-1, 1), boxes

    return source


def whole_source(weights: str | Path | None, *, nodule: bool = True) -> Source:
    """Gives the source that replaces the film by a generated one; without `nodule`, by the same with an empty mask."""
    generator = NoduleGenerator.from_pretrained(weights)
    fast, size = compile_generator(generator), generator.image_size

    def source(films: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(films), generator.noise_dim, generator=stream)
        masks = boxes_to_masks(list(boxes[:, None] * (size / SIZE)), size) * float(nodule)
        with torch.inference_mode():
            return resize(fast(noise, masks), (SIZE, SIZE)), boxes

    return source


def poisson_source(real: Patients) -> Source:
    """Gives the source that copies real boxed nodules to other films, blending their gradients (Perez et al. 2003)."""

    def source(films: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(real.boxes), (len(films),), generator=stream)
        centres, box = (boxes[:, :2] + boxes[:, 2:]) / 2, real.boxes[chosen]
        half = ((box[:, 2:] - box[:, :2]) / 2 * 1.25).clamp(max=PATCH / 2)
        centres = torch.minimum(torch.maximum(centres, half + 2), SIZE - half - 2)
        # The real film, moved by whole pixels so that its nodule lies at the place asked for.
        moved = []
        shifts = (centres - (box[:, :2] + box[:, 2:]) / 2).round().long()
        for film, (dx, dy) in zip(scaled(real.nodule[chosen]), shifts.tolist(), strict=True):
            moved.append(film.roll((dy, dx), dims=(1, 2)))
        ticks = torch.arange(SIZE) + 0.5
        x, y = ((ticks - centres[:, i, None]) / half[:, i, None] for i in (0, 1))
        inside = (x[:, None, :] ** 2 + y[:, :, None] ** 2 < 1)[:, None]
        return poisson_blend(films, torch.stack(moved), inside), torch.cat([centres - half, centres + half], dim=1)

    return source


def named_sources(
    names: list[str], *, train: Patients, ct_nodules: str | Path | None, weights: dict[str, str | Path | None]
) -> dict[str, Source | None]:
    """Gives sources by the name that they have in tables.

    Args:
        names: of "real", "blob", "poisson" and "ct".
        train: whose real boxes are copied.
        ct_nodules: templates.npz; without it there are no CT nodules.
        weights: names and folders of generators; None is the bundled one.
    """
    sources: dict[str, Source | None] = {}
    for name in names:
        if name == "real":
            sources["real boxes"] = None
        elif name == "blob":
            sources["drawn blob"] = blob_source
        elif name == "poisson":
            sources["real boxes, Poisson copies"] = poisson_source(train)
        elif name == "ct" and ct_nodules:
            sources["CT nodules superimposed"] = ct_source(ct_nodules)
    return sources | {f"generated, {name}": graft_source(folder) for name, folder in weights.items()}
