"""What a source of nodules teaches: `python -m train.reproduction.patches --data FOLDER --ct-nodules FILE`.

A patch classifier learns nodules of one source on real normal images of the train split, and is tested on real boxes
against places in normal images, of other patients. Sources: the real boxes of the train split, generated nodules
(`--weights FOLDER ..`), and the controls of `train.reproduction.controls`. And the other way round: the one that
learnt the real boxes says how many nodules of each source it finds.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert
from tqdm import tqdm

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.precision import autocast
from carim_aug.ops.random import fold
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.apply import Applier, Placed
from carim_aug.transforms.plan import NO_BOXES, Decision
from carim_aug.transforms.settings import MixSettings
from train.common.command import named_errors, recipe_parser
from train.common.images import ImageSet, read_images
from train.common.loop import Loop, descend
from train.metrics.patches import PatchNet, patches_at
from train.metrics.statistics import auc, auc_interval
from train.reproduction.controls.nodules import CopiedNodules, DrawnNodules, SuperimposedNodules

SIZE = 256  # side in pixels of the images that patches are cut from
BATCH = 64
SOURCES = ("real", "blob", "poisson", "ct")  # that need no weights

Places = Callable[[int, torch.Generator], Tensor]
"""(n, random stream) to boxes (n, 4), XYXY in pixels: where nodules go and where normal images are looked at."""


@dataclass(frozen=True)
class PatchPreset:
    """Numbers of a patch classifier's training."""

    steps: int = 600  # of 64 patches
    patches: int = 4000  # of each class, made once and drawn from
    seeds: int = 3  # networks whose scores are averaged


# --- Images, places, nodules ---
def prior_places(prior: LocationPrior) -> Places:
    """Return places of the prior: the first box of each draw."""
    return lambda n, stream: torch.stack([b[0] for b in prior.sample(n, generator=stream, image_size=SIZE).boxes])


def field_places(prior: LocationPrior) -> Places:
    """Return places all over the prior's lung field, with the prior's sizes: their position means nothing."""
    cells = prior.field.nonzero()

    def draw(n: int, stream: torch.Generator) -> Tensor:
        boxes = prior_places(prior)(n, stream)
        chosen = cells[torch.randint(len(cells), (n,), generator=stream)].flip(1)  # x, y
        centres = (chosen + torch.rand(n, 2, generator=stream)) * (SIZE / len(prior.field))
        half = (boxes[:, 2:] - boxes[:, :2]) / 2
        centres = torch.minimum(torch.maximum(centres, half), SIZE - half)
        return torch.cat([centres - half, centres + half], dim=1)

    return draw


PLACES: dict[str, Callable[[LocationPrior], Places]] = {"prior": prior_places, "field": field_places}


def put_nodules(
    source: Any, images: Tensor, boxes: Tensor, seeds: list[int], *, insertion: str = "graft", nodule: bool = True
) -> Tensor:
    """Return images (n, 1, H, W) in [-1, 1] with a nodule at each of the boxes (n, 4), by `SyntheticNoduleMix`'s code.

    With insertion "whole" they are generated images in place of the real ones, with `nodule=False` without a nodule.
    """
    height, width = images.shape[-2:]
    parts = (boxes / torch.tensor([width, height, width, height])).float().numpy()
    name = "Nodule" if nodule else "No Finding"
    decisions = tuple(
        Decision((0, 0, i), name, seed, box[None] if nodule else NO_BOXES, -1)
        for i, (seed, box) in enumerate(zip(seeds, parts, strict=True))
    )
    settings = MixSettings(LocationPrior.bundled(), insertion=insertion, value_range=ValueRange.of("symmetric"))
    changed: Any = Applier(settings, source).pixels(images, Placed(decisions, {}))[0]
    return changed


def named_sources(names: Sequence[str], train: ImageSet, ct: CTNodules | None) -> dict[str, Any]:
    """Return those of `SOURCES` by their names in tables; None stands for the real boxes, which others copy."""
    sources: dict[str, Any] = {}
    if "real" in names:
        sources["real boxes"] = None
    if "blob" in names:
        sources["drawn blob"] = DrawnNodules(SIZE)
    if "poisson" in names:
        rows, boxes = train.each_box()
        sources["real boxes, Poisson copies"] = CopiedNodules(train.images[rows], boxes * SIZE)
    if "ct" in names and ct is not None:
        sources["CT nodules superimposed"] = SuperimposedNodules(ct, SIZE)
    return sources


# --- Patches ---
def nodule_patches(real: ImageSet, places: Places, source: Any, n: int, stream: torch.Generator, **how: Any) -> Tensor:
    """Return n patches about nodules that a source puts into normal images; `how` is what `put_nodules` takes."""
    backgrounds = real.symmetric(_draw(real.normal, n, stream))
    boxes, seeds = places(n, stream), torch.randint(2**63 - 1, (n,), generator=stream).tolist()
    shown = put_nodules(source, backgrounds, boxes, seeds, **how)
    return patches_at(shown, _near(boxes, stream))


def training_patches(
    real: ImageSet, places: Places, source: Any, n: int, *, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return n patches with a nodule of the source (None: the real boxes) and n of places in normal images."""
    stream = torch.Generator().manual_seed(fold(seed, 7))
    boxed, boxes = real.each_box()
    positive, negative = [], []
    for start in tqdm(range(0, n, 50), desc=name, unit="batch"):
        k = min(50, n - start)
        if source is None:
            chosen = torch.randint(len(boxes), (k,), generator=stream)
            positive.append(patches_at(real.symmetric(boxed[chosen]), _near(boxes[chosen] * SIZE, stream)))
        else:
            positive.append(nodule_patches(real, places, source, k, stream))
        normal = real.symmetric(_draw(real.normal, k, stream))
        negative.append(patches_at(normal, _near(places(k, stream), stream)))
    return torch.cat(positive), torch.cat(negative)


class HeldOut(NamedTuple):
    """Patches (n, 1, PATCH, PATCH) of patients that no network saw, and whose they are: real boxes, normal places."""

    real: Tensor
    real_patients: Tensor
    normal: Tensor
    normal_patients: Tensor


def held_out_patches(test: ImageSet, places: Places, *, times: int = 4) -> HeldOut:
    """Return the patches of held-out images, with so many places in each normal one."""
    test.check("held-out images", normal=1, boxed=1)
    stream = torch.Generator().manual_seed(fold(0, 10))
    images, (boxed, boxes) = test.symmetric(test.normal), test.each_box()
    normal = [patches_at(images, _middle(places(len(images), stream))) for _ in range(times)]
    real = patches_at(test.symmetric(boxed), _middle(boxes * SIZE))
    return HeldOut(real, test.patients[boxed], torch.cat(normal), test.patients[test.normal].repeat(times))


def _draw(rows: Tensor, n: int, stream: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (n,), generator=stream)]


def _near(boxes: Tensor, stream: torch.Generator) -> Tensor:
    """Draw places (n, 2) in pixels, up to 4 each way from the boxes' centres."""
    return _middle(boxes) + (torch.rand(len(boxes), 2, generator=stream) - 0.5) * 8


def _middle(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "xyxy", "cxcywh")[:, :2]


# --- Networks ---
def train_net(positive: Tensor, negative: Tensor, *, steps: int, seed: int) -> PatchNet:
    """Return a network trained on half positives, half negatives, with flips and changes of contrast."""
    stream = torch.Generator().manual_seed(fold(seed, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 9))
        net = PatchNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-2)
    labels = torch.cat([torch.ones(BATCH // 2), torch.zeros(BATCH // 2)])
    net.train()
    loop = Loop(None, images=steps * BATCH, batch=BATCH, name="patches")
    for _ in loop:
        loop.set_rate(optimizer, 4e-3, warm_up=0.3)
        rows = torch.randint(len(positive), (2, BATCH // 2), generator=stream)
        patches = torch.cat([positive[rows[0]], negative[rows[1]]])
        flip = torch.rand(BATCH, 1, 1, 1, generator=stream) < 0.5
        patches = torch.where(flip, patches.flip(3), patches)
        patches = patches * (0.7 + 0.6 * torch.rand(BATCH, 1, 1, 1, generator=stream))
        with autocast("cpu"):
            logits = net(patches)
        losses = {"loss": F.binary_cross_entropy_with_logits(logits.float(), labels)}
        loop.update(losses, descend(losses, optimizer))
    loop.close()
    return net.eval()


def train_nets(real: ImageSet, places: Places, source: Any, preset: PatchPreset, name: str) -> list[PatchNet]:
    """Return one network a seed, trained on a source's nodules (None: the real boxes)."""
    real.check("training images", normal=1, boxed=1)
    nets = []
    for seed in range(preset.seeds):
        patches = training_patches(real, places, source, preset.patches, seed=seed, name=name)
        nets.append(train_net(*patches, steps=preset.steps, seed=seed))
    return nets


@torch.inference_mode()
def score_patches(nets: list[PatchNet], patches: Tensor) -> Tensor:
    """Return each network's logits, (networks, N)."""
    return torch.stack([torch.cat([net(part) for part in patches.split(256)]) for net in nets])


def auc_on_real(nets: list[PatchNet], test: HeldOut) -> dict[str, Any]:
    """Return the AUC on real boxes of the mean score, its interval over patients, and each network's own AUC."""
    real, normal = score_patches(nets, test.real), score_patches(nets, test.normal)
    stream = torch.Generator().manual_seed(fold(0, 13))
    patients = (test.real_patients, test.normal_patients)
    low, high = auc_interval(real.mean(0), normal.mean(0), *patients, generator=stream)
    seeds = [float(auc(a, b)) for a, b in zip(real, normal, strict=True)]
    return {"auc": float(auc(real.mean(0), normal.mean(0))), "low": low, "high": high, "seeds": seeds}


def hits(nets: list[PatchNet], patches: Tensor, normal: Tensor, *, specificity: float = 0.9) -> Tensor:
    """Return which patches score above the threshold that so many of the normal ones stay below, (N,) bool."""
    threshold = score_patches(nets, normal).mean(0).quantile(specificity)
    return score_patches(nets, patches).mean(0) > threshold


def compare_sources(args: argparse.Namespace, preset: PatchPreset) -> list[dict[str, Any]]:
    """Return the rows of the table, one a source, and print each as it comes."""
    places = PLACES[args.places](LocationPrior.bundled())
    train, test = (read_images(args.data, splits, SIZE, only_normal_or_boxed=True) for splits in (["train"], args.test))
    held_out = held_out_patches(test, places)
    sources = named_sources(args.sources, train, CTNodules(args.ct_nodules) if args.ct_nodules else None)
    for folder in args.weights:
        sources[f"generated, {folder or 'bundled'}"] = NoduleGenerator.from_pretrained(folder or None)
    print(f"{len(held_out.real)} real boxes of {args.test}, {len(held_out.normal)} places in normal images")
    rows = []
    for name, source in sources.items():
        started = time.monotonic()
        row = {"source": name, **auc_on_real(train_nets(train, places, source, preset, name), held_out)}
        rows.append(row)
        interval = f"AUC {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        each = " ".join(f"{value:.3f}" for value in row["seeds"])
        print(f"{name:40} {interval}  seeds {each}  {time.monotonic() - started:.0f} s", flush=True)
    return rows


def main() -> None:
    """Print the table and keep it as JSON."""
    out = {"required": False, "help": "JSON file of the figures"}
    parser = recipe_parser(__doc__, "--data", "--ct-nodules", "--out", out=out)
    parser.add_argument("--weights", nargs="*", default=[], help="folders of generators; '' is the bundled one")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=SOURCES)
    parser.add_argument("--places", choices=sorted(PLACES), default="prior", help="of nodules and of normal patches")
    parser.add_argument("--test", nargs="+", default=["val"], help="splits of the real boxes; 'test' for final figures")
    parser.add_argument("--steps", type=int, default=PatchPreset.steps)
    parser.add_argument("--patches", type=int, default=PatchPreset.patches, help="of each class, drawn from")
    parser.add_argument("--seeds", type=int, default=PatchPreset.seeds, help="networks whose scores are averaged")
    args = parser.parse_args()
    preset = PatchPreset(args.steps, args.patches, args.seeds)
    with named_errors():
        rows = compare_sources(args, preset)
    if args.out:
        settings = {**asdict(preset), "places": args.places, "test": args.test, "prior": "bundled"}
        Path(args.out).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
