"""What a source of nodules is worth: `python -m train.patches --data FOLDER --ct-nodules FILE [--weights FOLDER]`.

A patch classifier learns nodules of one source on real normal films of the train split, and is tested on real boxes
against places in normal films, of other patients. Sources: the real boxes of the train split, generated nodules (the
graft of `SyntheticNoduleMix`), CT nodules superimposed, real ones copied with Poisson blending, a drawn blob.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from carim_aug.compiled import compile_generator
from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.evaluation.patches import PATCH, PatchNet, auc, auc_interval, patches_at
from carim_aug.hub import NoduleGenerator
from carim_aug.insertion import resize
from carim_aug.keys import fold
from carim_aug.masks import boxes_to_masks, feather
from carim_aug.prior import LocationPrior

SIZE = 256
LARGEST_BOX = 0.16  # of the film's side: a nodule is at most 3 cm

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
    """

    normal: Tensor
    normal_patients: Tensor
    nodule: Tensor
    boxes: Tensor
    nodule_patients: Tensor


def read_patients(root: str | Path, splits: list[str], *, limit: int | None = None) -> Patients:
    """Reads normal films and boxed nodules of splits."""
    extra = Path(root) / "ChestX-Det_boxes.csv"
    normal, normal_patients, nodule, boxes, nodule_patients = [], [], [], [], []
    for split in splits:
        data = ChestXray14(root, split=split, extra_boxes=extra if extra.exists() else None)
        for i in tqdm(range(len(data)), desc=f"films of {split}", unit="image"):
            found = data.boxes_relative(i, "Nodule")
            found = found[(found[:, 2:] - found[:, :2]).amax(dim=1) <= LARGEST_BOX] if len(found) else found
            is_normal = not bool(data.labels[i].any()) and (limit is None or len(normal) < limit)
            if not len(found) and not is_normal:
                continue
            image = VF.resize(torch.as_tensor(data[i][0]), [SIZE, SIZE], antialias=True)
            patient = int(data.patients[i])
            if is_normal:
                normal.append(image)
                normal_patients.append(patient)
            for box in found:
                nodule.append(image)
                boxes.append(box * SIZE)
                nodule_patients.append(patient)
    if not normal or not nodule:
        raise ValueError(f"{root}: {splits} need normal films and nodule boxes, got {len(normal)} and {len(nodule)}")
    return Patients(
        torch.stack(normal),
        torch.tensor(normal_patients),
        torch.stack(nodule),
        torch.stack(boxes),
        torch.tensor(nodule_patients),
    )


def scaled(films: Tensor) -> Tensor:
    """Gives uint8 films as float32 in [-1, 1]."""
    return films.float() / 127.5 - 1


# --- Sources ---
def blob_source(films: Tensor, boxes: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives films with a drawn Gaussian blob in each box."""
    ticks = torch.arange(films.shape[-1]) + 0.5
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = ((ticks - centre[:, i, None]) / half[:, i, None] for i in (0, 1))
    shape = torch.exp(-1.5 * (x[:, None, :] ** 2 + y[:, :, None] ** 2))[:, None]
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


def poisson_blend(target: Tensor, source: Tensor, inside: Tensor, *, steps: int = 200) -> Tensor:
    """Gives `source` inside the mask plus the harmonic map that joins it to `target` at the mask's edge.

    Args:
        target: (B, 1, S, S).
        source: (B, 1, S, S).
        inside: (B, 1, S, S) bool, some 30 pixels wide at most.
        steps: of Jacobi's iteration, which begins with the mean difference at the edge.
    """
    span = 2 + max(int(inside.any(dim=d).sum(dim=-1).max()) for d in (2, 3))
    span, side = min(span, target.shape[-1]), target.shape[-1]
    # A window about each sample's mask: all else stays.
    first = [inside.any(dim=d)[:, 0].float().argmax(dim=1) for d in (2, 3)]
    x, y = ((f - 1).clamp(min=0, max=side - span) for f in first)
    ticks = torch.arange(span)
    rows, columns = y[:, None, None] + ticks[:, None], x[:, None, None] + ticks
    at = (torch.arange(len(target))[:, None, None], 0, rows, columns)
    gap, within = (target - source)[at][:, None], inside[at][:, None]

    edge = (F.max_pool2d(within.float(), 3, 1, 1) > 0) & ~within
    start = (gap * edge).sum(dim=(1, 2, 3), keepdim=True) / edge.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    harmonic = torch.where(within, start, gap)
    kernel = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None] / 4
    for _ in range(steps):
        harmonic = torch.where(within, F.conv2d(harmonic, kernel, padding=1), gap)
    blended = target.clone()
    blended[at] = torch.where(within, source[at][:, None] + harmonic, target[at][:, None])[:, 0]
    return blended.clamp(-1, 1)


# --- Patches ---
def places(prior: LocationPrior, n: int, stream: torch.Generator) -> Tensor:
    """Gives boxes (n, 4) of the prior, the first of each draw, in pixels."""
    return torch.stack([b[0] for b in prior.sample(n, generator=stream, image_size=SIZE).boxes])


def jitter(n: int, stream: torch.Generator) -> Tensor:
    """Gives shifts (n, 2) in pixels, up to 4 each way."""
    return (torch.rand(n, 2, generator=stream) - 0.5) * 8


def middle(boxes: Tensor) -> Tensor:
    """Gives centres (n, 2) of boxes (n, 4)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def training_patches(
    films: Patients, prior: LocationPrior, source: Source | None, n: int, *, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Gives n patches with a nodule of the source (None: the real boxes) and n of places in normal films."""
    stream = torch.Generator().manual_seed(fold(seed, 7))
    positive, negative = [], []
    for start in tqdm(range(0, n, 50), desc=name, unit="batch"):
        k = min(50, n - start)
        if source is None:
            chosen = torch.randint(len(films.boxes), (k,), generator=stream)
            shown, boxes = scaled(films.nodule[chosen]), films.boxes[chosen]
        else:
            ground = scaled(films.normal[torch.randint(len(films.normal), (k,), generator=stream)])
            shown, boxes = source(ground, places(prior, k, stream), stream)
        positive.append(patches_at(shown, middle(boxes) + jitter(k, stream)))
        normal = scaled(films.normal[torch.randint(len(films.normal), (k,), generator=stream)])
        negative.append(patches_at(normal, middle(places(prior, k, stream)) + jitter(k, stream)))
    return torch.cat(positive), torch.cat(negative)


def train_net(positive: Tensor, negative: Tensor, *, steps: int, seed: int, batch: int = 64) -> PatchNet:
    """Gives a network trained on half positives, half negatives, with flips and changes of contrast."""
    stream = torch.Generator().manual_seed(fold(seed, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 9))
        net = PatchNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    labels = torch.cat([torch.ones(batch // 2), torch.zeros(batch // 2)])
    net.train()
    for _ in range(steps):
        rows = torch.randint(len(positive), (2, batch // 2), generator=stream)
        patches = torch.cat([positive[rows[0]], negative[rows[1]]])
        flip = torch.rand(batch, 1, 1, 1, generator=stream) < 0.5
        patches = torch.where(flip, patches.flip(3), patches)
        patches = patches * (0.7 + 0.6 * torch.rand(batch, 1, 1, 1, generator=stream))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(patches)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def main() -> None:
    """Prints the table and keeps it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with splits and boxes")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--weights", nargs="*", default=[], help="folders of generators; '' is the bundled one")
    parser.add_argument("--sources", nargs="*", default=["real", "blob", "poisson", "ct"])
    parser.add_argument("--test", nargs="+", default=["val"], help="splits of the real boxes; 'test' for final figures")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--patches", type=int, default=4000, help="of each class, made once and drawn from")
    parser.add_argument("--seeds", type=int, default=3, help="networks whose scores are averaged")
    parser.add_argument("--out", help="JSON file of the figures")
    args = parser.parse_args()
    prior = LocationPrior.bundled()
    train, test = read_patients(args.data, ["train"]), read_patients(args.data, args.test)

    # Real nodules, and as many places as the prior draws in each normal film.
    stream = torch.Generator().manual_seed(fold(0, 10))
    real = patches_at(scaled(test.nodule), middle(test.boxes))
    times = 4
    normal = torch.cat(
        [patches_at(scaled(test.normal), middle(places(prior, len(test.normal), stream))) for _ in range(times)]
    )
    normal_patients = test.normal_patients.repeat(times)

    sources: dict[str, Source | None] = {}
    for name in args.sources:
        if name == "real":
            sources["real boxes"] = None
        elif name == "blob":
            sources["drawn blob"] = blob_source
        elif name == "poisson":
            sources["real boxes, Poisson copies"] = poisson_source(train)
        elif name == "ct" and args.ct_nodules:
            sources["CT nodules superimposed"] = ct_source(args.ct_nodules)
    for weights in args.weights:
        sources[f"generated, {weights or 'bundled'}"] = graft_source(weights or None)

    rows = []
    print(f"{len(real)} real boxes of {args.test}, {len(normal)} places in normal films")
    for name, source in sources.items():
        started, scores, grounds = time.monotonic(), 0.0, 0.0
        for seed in range(args.seeds):
            positive, negative = training_patches(train, prior, source, args.patches, seed=seed, name=name)
            net = train_net(positive, negative, steps=args.steps, seed=seed)
            with torch.inference_mode():
                scores, grounds = scores + net(real), grounds + net(normal)
        value = float(auc(scores, grounds))
        low, high = auc_interval(scores, grounds, test.nodule_patients, normal_patients, generator=stream)
        rows.append({"source": name, "auc": value, "low": low, "high": high})
        print(f"{name:40} AUC {value:.3f} [{low:.3f}, {high:.3f}]  {time.monotonic() - started:.0f} s", flush=True)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("data", "ct_nodules", "out")}
        Path(args.out).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
