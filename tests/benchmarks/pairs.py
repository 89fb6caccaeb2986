"""Same-noise pairs of some weights: is the difference at the mask, round, and as bright as a real nodule?

    python tests/benchmarks/pairs.py [--weights FOLDER] [--data FOLDER_IN_CHESTXRAY14_LAYOUT]

Contrast is the mean inside the mask's ellipse minus the mean of a ring about it, in units of the [-1, 1] image at the
generator's size. Real boxes are those of the val and test patients, which training never saw.
"""

import argparse

import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from carim_aug.compiled import compile_generator
from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.evaluation.pairs import argmax_hit, energy_inside, ring_contrast, roundness
from carim_aug.hub import NoduleGenerator
from carim_aug.masks import boxes_to_masks, feather
from carim_aug.prior import LocationPrior


def quartiles(values: Tensor) -> str:
    """Median and quartiles as text."""
    values = values[values.isfinite()]
    if not len(values):
        return "-"
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def real_boxes(root: str, size: int, split: str) -> tuple[Tensor, Tensor]:
    """Films and their nodule boxes, one row a box, at the generator's size."""
    extra = f"{root}/ChestX-Det_boxes.csv"
    data = ChestXray14(root, split=split, extra_boxes=extra)
    images, boxes = [], []
    for i in range(len(data)):
        found = data.boxes_relative(i, "Nodule")
        found = found[(found[:, 2:] - found[:, :2]).amax(dim=1) < 0.16] if len(found) else found
        if len(found):
            image = VF.resize(torch.as_tensor(data[i][0]), [size, size], antialias=True).float() / 127.5 - 1
            images += [image] * len(found)
            boxes.append(found * size)
    return torch.stack(images), torch.cat(boxes)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()
    generator = NoduleGenerator.from_pretrained(args.weights)
    fast = compile_generator(generator)
    size = generator.image_size

    # Pairs of the same noise, one nodule each.
    rng = torch.Generator().manual_seed(0)
    boxes = torch.stack([b[0] for b in LocationPrior.bundled().sample(args.n, generator=rng, image_size=size).boxes])
    noise = torch.randn(args.n, generator.noise_dim, generator=rng)
    rows: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for z, b in zip(noise.split(50), boxes.split(50), strict=True):
            for shape in ("box", "ellipse"):
                masks = boxes_to_masks(list(b[:, None]), size, shape=shape)
                without, nodule = fast(z, torch.zeros_like(masks)), fast(z, masks)
                difference = nodule - without
                row = {
                    "energy": energy_inside(difference, b),
                    "hit": argmax_hit(difference, b).float(),
                    "bright": (ring_contrast(difference, b).contrast > 0).float(),
                    "lost": (ring_contrast(difference, b).contrast < 0.02).float(),
                    "roundness": roundness(difference, b),
                    "grafted energy": energy_inside(difference * feather(list(b[:, None]), size), b),
                    "contrast": ring_contrast(nodule, b).contrast,
                    "ground": ring_contrast(without, b).contrast,
                    "added": ring_contrast(difference, b).contrast,
                }
                for name, value in row.items():
                    rows.setdefault(f"{shape} {name}", []).append(value)
    table = {name: torch.cat(values) for name, values in rows.items()}

    print(f"{args.n} pairs at {size} px, weights {generator.weights_hash[:12]}")
    print(f"{'':34}{'box mask':>26}{'ellipse mask':>26}")
    for name, text in (
        ("energy", "energy inside the mask + 1/4"),
        ("grafted energy", "the same after the graft's feather"),
        ("hit", "brightest pixel inside the mask"),
        ("bright", "brighter than its ring"),
        ("lost", "adds less than 0.02 of contrast"),
    ):
        print(f"{text:34}" + "".join(f"{table[f'{s} {name}'].mean():>26.3f}" for s in ("box", "ellipse")))
    large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= 5
    for shape in ("box", "ellipse"):
        table[f"{shape} roundness"] = table[f"{shape} roundness"][large]
    for name, text in (
        ("roundness", "roundness (1 disc, 0 square)"),
        ("contrast", "contrast of the nodule image"),
        ("ground", "contrast there without a mask"),
        ("added", "contrast added"),
    ):
        print(f"{text:34}" + "".join(f"{quartiles(table[f'{s} {name}']):>26}" for s in ("box", "ellipse")))
    if args.data:
        parts = [real_boxes(args.data, size, split) for split in ("val", "test")]
        images, real = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        contrast = ring_contrast(images, real).contrast
        test = ks_2samp(contrast.numpy(), table["box contrast"].numpy())
        print(f"{f'contrast of {len(real)} real held-out boxes':34}{quartiles(contrast):>26}")
        print(f"{'Kolmogorov-Smirnov, real and made':34}{f'D = {test.statistic:.3f}, p = {test.pvalue:.2g}':>26}")


if __name__ == "__main__":
    main()
