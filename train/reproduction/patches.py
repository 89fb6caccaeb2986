"""What a source of nodules is worth: `python -m train.reproduction.patches --data FOLDER --ct-nodules FILE [--weights FOLDER]`.

A patch classifier learns nodules of one source on real normal films of the train split, and is tested on real boxes
against places in normal films, of other patients. Sources: the real boxes of the train split, generated nodules (the
graft of `SyntheticNoduleMix`), CT nodules superimposed, real ones copied with Poisson blending, a drawn blob. And the
other way round: the one that learnt the real boxes says how many nodules of each source it finds (METHOD 8).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.metrics.patches import PatchNet, auc, auc_interval, patches_at
from train.reproduction.sources import SIZE, Patients, Source, named_sources, read_patients, scaled

SPECIFICITY = 0.9  # on normal places, at which hits are counted

Places = Callable[[int, torch.Generator], Tensor]
"""(n, random stream) to boxes (n, 4), XYXY in pixels: where nodules go and where normal films are looked at."""


@dataclass(frozen=True)
class PatchPreset:
    """Numbers of a patch classifier's training.

    Attributes:
        steps: of 64 patches.
        patches: of each class, made once and drawn from.
        seeds: networks whose scores are averaged.
    """

    steps: int = 600
    patches: int = 4000
    seeds: int = 3


# --- Places and patches ---
def prior_places(prior: LocationPrior) -> Places:
    """Gives places of the prior: the first box of each draw."""
    return lambda n, stream: torch.stack([b[0] for b in prior.sample(n, generator=stream, image_size=SIZE).boxes])


def field_places(prior: LocationPrior) -> Places:
    """Gives places all over the prior's lung field, with the prior's sizes: its position means nothing."""
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


def jitter(n: int, stream: torch.Generator) -> Tensor:
    """Gives shifts (n, 2) in pixels, up to 4 each way."""
    return (torch.rand(n, 2, generator=stream) - 0.5) * 8


def middle(boxes: Tensor) -> Tensor:
    """Gives centres (n, 2) of boxes (n, 4)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def placed_patches(films: Patients, places: Places, source: Source, n: int, stream: torch.Generator) -> Tensor:
    """Gives n patches about nodules of the source in normal films."""
    ground = scaled(films.normal[torch.randint(len(films.normal), (n,), generator=stream)])
    shown, boxes = source(ground, places(n, stream), stream)
    return patches_at(shown, middle(boxes) + jitter(n, stream))


def training_patches(
    films: Patients, places: Places, source: Source | None, n: int, *, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Gives n patches with a nodule of the source (None: the real boxes) and n of places in normal films."""
    stream = torch.Generator().manual_seed(fold(seed, 7))
    positive, negative = [], []
    for start in tqdm(range(0, n, 50), desc=name, unit="batch"):
        k = min(50, n - start)
        if source is None:
            chosen = torch.randint(len(films.boxes), (k,), generator=stream)
            centres = middle(films.boxes[chosen]) + jitter(k, stream)
            positive.append(patches_at(scaled(films.nodule[chosen]), centres))
        else:
            positive.append(placed_patches(films, places, source, k, stream))
        normal = scaled(films.normal[torch.randint(len(films.normal), (k,), generator=stream)])
        negative.append(patches_at(normal, middle(places(k, stream)) + jitter(k, stream)))
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


@dataclass
class HeldOut:
    """Patches of patients that no network saw: real boxes, and places in normal films.

    Attributes:
        real: (K, 1, PATCH, PATCH), one a box.
        real_patients: (K,) int64.
        normal: (N, 1, PATCH, PATCH).
        normal_patients: (N,) int64.
    """

    real: Tensor
    real_patients: Tensor
    normal: Tensor
    normal_patients: Tensor


def held_out_patches(test: Patients, places: Places, *, times: int = 4) -> HeldOut:
    """Gives the patches of held-out films, with so many places in each normal one."""
    stream = torch.Generator().manual_seed(fold(0, 10))
    films, normal = scaled(test.normal), []
    for _ in range(times):
        normal.append(patches_at(films, middle(places(len(films), stream))))
    real = patches_at(scaled(test.nodule), middle(test.boxes))
    return HeldOut(real, test.nodule_patients, torch.cat(normal), test.normal_patients.repeat(times))


def learnt(train: Patients, places: Places, source: Source | None, preset: PatchPreset, name: str) -> list[PatchNet]:
    """Gives one network a seed, trained on a source's nodules (None: the real boxes)."""
    nets = []
    for seed in range(preset.seeds):
        patches = training_patches(train, places, source, preset.patches, seed=seed, name=name)
        nets.append(train_net(*patches, steps=preset.steps, seed=seed))
    return nets


@torch.inference_mode()
def scores_of(nets: list[PatchNet], patches: Tensor) -> Tensor:
    """Gives each network's logits, (networks, N)."""
    return torch.stack([torch.cat([net(part) for part in patches.split(256)]) for net in nets])


def worth(nets: list[PatchNet], test: HeldOut) -> dict[str, Any]:
    """Gives the AUC on real boxes of the mean score, its interval over patients, and each network's own AUC."""
    real, normal = scores_of(nets, test.real), scores_of(nets, test.normal)
    stream = torch.Generator().manual_seed(fold(0, 13))
    whose = (test.real_patients, test.normal_patients)
    low, high = auc_interval(real.mean(0), normal.mean(0), *whose, generator=stream)
    seeds = [float(auc(a, b)) for a, b in zip(real, normal, strict=True)]
    return {"auc": float(auc(real.mean(0), normal.mean(0))), "low": low, "high": high, "seeds": seeds}


def hits(nets: list[PatchNet], patches: Tensor, normal: Tensor, *, specificity: float = SPECIFICITY) -> Tensor:
    """Gives which patches score above the threshold that so many of the normal ones stay below, (N,) bool."""
    threshold = scores_of(nets, normal).mean(0).quantile(specificity)
    return scores_of(nets, patches).mean(0) > threshold


def main() -> None:
    """Prints the table and keeps it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with splits and boxes")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--weights", nargs="*", default=[], help="folders of generators; '' is the bundled one")
    parser.add_argument("--sources", nargs="*", default=["real", "blob", "poisson", "ct"])
    parser.add_argument("--places", choices=sorted(PLACES), default="prior", help="of nodules and of normal patches")
    parser.add_argument("--test", nargs="+", default=["val"], help="splits of the real boxes; 'test' for final figures")
    parser.add_argument("--steps", type=int, default=PatchPreset.steps)
    parser.add_argument("--patches", type=int, default=PatchPreset.patches, help="of each class, drawn from")
    parser.add_argument("--seeds", type=int, default=PatchPreset.seeds, help="networks whose scores are averaged")
    parser.add_argument("--out", help="JSON file of the figures")
    args = parser.parse_args()
    places = PLACES[args.places](LocationPrior.bundled())
    train, test = read_patients(args.data, ["train"]), read_patients(args.data, args.test)
    preset = PatchPreset(args.steps, args.patches, args.seeds)
    held_out = held_out_patches(test, places)
    weights = {folder or "bundled": folder or None for folder in args.weights}
    sources = named_sources(args.sources, train=train, ct_nodules=args.ct_nodules, weights=weights)

    rows = []
    print(f"{len(held_out.real)} real boxes of {args.test}, {len(held_out.normal)} places in normal films")
    for name, source in sources.items():
        started = time.monotonic()
        row = {"source": name, **worth(learnt(train, places, source, preset, name), held_out)}
        rows.append(row)
        interval = f"AUC {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        each = " ".join(f"{value:.3f}" for value in row["seeds"])
        print(f"{name:40} {interval}  seeds {each}  {time.monotonic() - started:.0f} s", flush=True)
    if args.out:
        settings = {**asdict(preset), "places": args.places, "test": args.test, "prior": "bundled"}
        Path(args.out).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
