"""What a graft changes: `python tests/benchmarks/grafts.py [--draws 100000] [--pairs 400]`.

Over many draws: an image changes if and only if its label and boxes do, and nothing changes outside the feathered boxes
(the tests' generator, 32-pixel images as detection targets). Then, with the bundled weights, how much of |difference|
lies in the boxes, at three sizes.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import make_mix  # noqa: E402
from tqdm import tqdm  # noqa: E402

from carim_aug import LabelPolicy, SyntheticNoduleMix  # noqa: E402
from carim_aug.ops.boxes import boxes_to_masks, feather  # noqa: E402
from carim_aug.ops.value_range import ValueRange  # noqa: E402
from carim_aug.transforms.graft import graft  # noqa: E402

BATCH = 500


def consistency(draws: int) -> None:
    """Counts the samples whose image, label and boxes do not agree, of both kinds of labels."""
    stream = torch.Generator().manual_seed(0)
    detect = make_mix(p=0.5, insertion="graft", placement="prior", labels=LabelPolicy("detection"))
    classify = make_mix(p=0.5, insertion="graft", placement="prior")
    changed = wrong = outside = 0
    for _ in tqdm(range(draws // BATCH), unit="batch"):
        images = torch.rand(BATCH, 1, 32, 32, generator=stream) * 0.5 + 0.25
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in range(BATCH)]
        mixed, marked = detect(images, targets)
        _, labels = classify(images, torch.zeros(BATCH, dtype=torch.int64))
        differs = (mixed != images).flatten(1).any(1)
        counts = torch.tensor([len(t["boxes"]) for t in marked])
        numbers = torch.tensor([len(t["labels"]) for t in marked])
        wrong += int(((differs != (counts > 0)) | (counts != numbers) | (differs != (labels == 1))).sum())
        weight = feather(detect.last_params.boxes, 32)
        outside += int(((mixed != images) & (weight == 0)).flatten(1).any(1).sum())
        changed += int(differs.sum())
    print(f"{draws} draws, {changed} changed: {wrong} where image, label and boxes do not agree, {outside} outside")


def inside(pairs: int) -> None:
    """Prints the share of |difference| inside the boxes."""
    mix = SyntheticNoduleMix.from_pretrained(p=1.0, insertion="graft", placement="prior", value_range=(-1.0, 1.0))
    mix(torch.zeros(pairs, 1, 128, 128), torch.zeros(pairs, dtype=torch.int64))
    slots = mix.last_params.slots
    differences = torch.cat(
        [mix._renderer.differences(slots[i : i + 50], torch.device("cpu")) for i in range(0, pairs, 50)]
    )
    print(f"\n{'|difference| inside the boxes':32} {'mean':>7} {'5 %':>7} {'least':>7} {'pooled':>7}")
    for size in (128, 256, 512):
        hosts = torch.zeros(pairs, 1, size, size)
        added = graft(hosts, differences, slots, ValueRange.of((-1.0, 1.0))).abs()
        masks = boxes_to_masks([slot.boxes_at(size, size) for slot in slots], size)
        share = (added * masks).sum(dim=(1, 2, 3)) / added.sum(dim=(1, 2, 3))
        pooled = (added * masks).sum() / added.sum()
        row = (share.mean(), share.quantile(0.05), share.min(), pooled)
        print(f"{f'{pairs} grafts, {size} px':32} " + " ".join(f"{float(value):7.4f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=400)
    args = parser.parse_args()
    consistency(args.draws)
    inside(args.pairs)


if __name__ == "__main__":
    main()
