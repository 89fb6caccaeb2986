"""The weights of `carim_aug.ops.orientation`, as they are bundled: a network that tells usual chest X-rays from others.

    OMP_NUM_THREADS=1 python -m train.views --data FOLDER --out views.safetensors

FOLDER is in ChestX-ray14's layout with split.csv. Images of the train split, and drawn chests, are varied, inverted and
turned, or replaced by what is no chest. That takes 10 minutes on a core; the same seed on one thread gives the same
digest. Then the shares that `usual_view` rejects of images it was not fitted on are printed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.orientation import REASONS, usual_view
from carim_aug.ops.random import LIMIT, fold
from carim_aug.ops.sealed import write_sealed
from train.common.command import named_errors, recipe_parser
from train.common.images import read_images
from train.common.loop import Loop, descend
from train.common.run import RunError

SIDE, CELLS = 64, 32  # of images while they are varied, and of what the network sees
BATCH, RATE, WEIGHT_DECAY, SMOOTHING = 128, 4e-3, 1e-3, 0.02  # of AdamW, and of the labels
LEFT_OUT = ("00017625_000.png", "00017999_000.png", "00009683_005.png")  # by eye: two are inverted, one is lateral
INVERTED, UPSIDE_DOWN, ROTATED, TRANSPOSED, NO_CHEST = range(1, 1 + len(REASONS))
SHARES = torch.tensor([0.40, 0.12, 0.12, 0.12, 0.06, 0.18])  # of each class in a batch; the first is the usual view
AXIS = (torch.arange(SIDE) + 0.5) / (SIDE / 2) - 1

TEXTS = {
    "description": f"Six views of a chest X-ray from 32 x 32 cells: usual, {', '.join(REASONS)}. Research use only.",
    "training_data": "NIH ChestX-ray14 (Wang et al., CVPR 2017), {images:,} images of a train split, two inverted and "
    'one lateral left out; {drawn} drawn phantoms; for "no chest" noise, ellipses, tiles in another order, parts.',
    "recipe": "python -m train.views --steps {steps} --seed {seed}; 128 images a step, AdamW 4e-3 (cosine); rotation "
    "15 degrees, crops 0.5 to 1, mirror, borders to 0.3, white-out, gamma e^-1 to e, contrast, noise",
}


def read_chests(data: str | Path, split: str) -> Tensor:
    """Return a split's images in the usual view, (n, 1, SIDE, SIDE) float in [0, 1]."""
    images = read_images(data, split, 4 * SIDE, any_size=True)
    kept = [i for i, name in enumerate(images.names) if name not in LEFT_OUT]
    return F.interpolate(images.images[kept].float() / 255, (SIDE, SIDE), mode="area")


def draw_chests(n: int, first: int) -> Tensor:
    """Draw phantoms, (n, 1, SIDE, SIDE) float in [0, 1]; first: seed of the first one."""
    return torch.stack([phantom_chest(SIDE, seed=first + i) for i in range(n)])


def uniform(rng: torch.Generator, n: int, low: float = 0, high: float = 1) -> Tensor:
    """Draw a number for each of n images, (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=rng)


def sometimes(rng: torch.Generator, n: int, share: float, low: float, high: float, *, otherwise: float = 0) -> Tensor:
    """Draw a number for a share of n images, (n, 1, 1, 1); the others have a constant."""
    return torch.where(uniform(rng, n) < share, uniform(rng, n, low, high), otherwise)


def ellipse(rng: torch.Generator, n: int, away: float, smallest: float) -> Tensor:
    """Draw an ellipse, 1 inside and 0 outside, soft or sharp; away: of its centre from the middle, at most."""
    x, y = (uniform(rng, n, -away, away) for _ in "xy")
    width, height = (uniform(rng, n, smallest, 1) for _ in "xy")
    inside = 1 - ((AXIS - x) / width) ** 2 - ((AXIS[:, None] - y) / height) ** 2
    return torch.sigmoid(uniform(rng, n, 1, 20) * inside)


def window(
    images: Tensor, sides: list[Tensor], centre: list[Tensor], angle: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return what a window shows of each image, and where it reaches beyond.

    Width and height are parts of the image's, the centre's x and y are in [-1, 1], (n, 1, 1, 1) each; degrees.
    """
    (width, height), (x, y) = sides, centre
    radians = torch.deg2rad(angle + torch.zeros_like(x))
    cos, sin = radians.cos(), radians.sin()
    affine = torch.cat([width * cos, -width * sin, x, height * sin, height * cos, y], dim=3).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    shown = F.grid_sample(images, grid, align_corners=False, padding_mode="border")
    return shown, (grid.abs().amax(dim=3) > 1)[:, None]


def reframe(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turn some images by up to 15 degrees, crop some to half of the area or more, and put borders around some."""
    n = len(images)
    area, aspect = sometimes(rng, n, 0.6, 0.5, 1, otherwise=1), sometimes(rng, n, 0.4, -0.29, 0.29).exp()
    crops = [(area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)]
    sides = [crop / (1 - 2 * sometimes(rng, n, 0.22, 0, 0.3)) for crop in crops]
    centre = [uniform(rng, n, -1, 1) * (1 - crop) for crop in crops]
    shown, beyond = window(images, sides, centre, sometimes(rng, n, 0.6, -15, 15))
    bordered = (sides[0] > crops[0]) | (sides[1] > crops[1])
    filled = beyond & (bordered | (uniform(rng, n) < 0.5))  # in others the image's edge goes on
    return torch.where(filled, sometimes(rng, n, 0.2, 0, 1), shown)


def vary_greys(images: Tensor, rng: torch.Generator) -> Tensor:
    """Spread values from 0 to 1; then change gamma, contrast and brightness, and add noise."""
    n = len(images)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp(min=1e-6)) ** uniform(rng, n, -1, 1).exp()
    gain, shift = sometimes(rng, n, 0.3, 1, 1.8, otherwise=1), sometimes(rng, n, 0.3, -0.2, 0.2)
    images = ((images - 0.5) * gain + 0.5 + shift).clamp(0, 1)
    return images + sometimes(rng, n, 0.3, 0, 0.2) * torch.randn(images.shape, generator=rng)


def orient(images: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Turn images as their labels say, and mirror half of those whose label a mirror does not change."""

    def chance(share: float) -> Tensor:
        return torch.rand(len(labels), generator=rng) < share

    rotated, transposed, half, few = labels == ROTATED, labels == TRANSPOSED, chance(0.5), chance(0.2)
    any_way = ((labels == INVERTED) & chance(0.25)) | ((labels == NO_CHEST) & chance(0.4))
    swap_axes = rotated | transposed | (any_way & chance(0.5))
    flip_rows = (labels == UPSIDE_DOWN) | (rotated & half) | (transposed & few) | (any_way & chance(0.5))
    flip_columns = torch.where(rotated, ~half, torch.where(transposed, few, chance(0.5)))
    images = torch.where(swap_axes.view(-1, 1, 1, 1), images.mT, images)
    images = torch.where(flip_rows.view(-1, 1, 1, 1), images.flip(2), images)
    return torch.where(flip_columns.view(-1, 1, 1, 1), images.flip(3), images)


def parts(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return at most a quarter of each chest."""
    n = len(chests)
    area, aspect = uniform(rng, n, 0.02, 0.26), uniform(rng, n, -0.4, 0.4).exp()
    sides = [side.clamp(max=0.62) for side in ((area * aspect).sqrt(), (area / aspect).sqrt())]
    return window(chests, sides, [uniform(rng, n, -1, 1) * (1 - side) for side in sides])[0]


def halves(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return one lung over the whole image, as a lateral view looks."""
    n = len(chests)
    width, height = uniform(rng, n, 0.4, 0.56), uniform(rng, n, 0.8, 1)
    x = (1 - width) * uniform(rng, n, 0.6, 1) * (2.0 * (uniform(rng, n) < 0.5) - 1)
    return window(chests, [width, height], [x, uniform(rng, n, -1, 1) * (1 - height)])[0]


def tiles(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return tiles of each chest in another order."""
    side = SIDE >> int(torch.randint(1, 4, (), generator=rng))
    columns = F.unfold(chests, side, stride=side)
    return F.fold(columns[:, :, torch.randperm(columns.shape[2], generator=rng)], (SIDE, SIDE), side, stride=side)


def noise(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return noise, from nearly a ramp to white."""
    side = 2 ** int(torch.randint(1, 7, (), generator=rng))
    coarse = torch.randn(len(chests), 1, side, side, generator=rng)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def ellipses(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return one ellipse in the middle, or several anywhere, with a little noise."""
    n, images = len(chests), 0.05 * torch.randn(chests.shape, generator=rng)
    for _ in range(6):
        images = images + sometimes(rng, n, 0.6, -1, 1) * ellipse(rng, n, 0.9, 0.1)
    return torch.where(uniform(rng, n) < 0.3, ellipse(rng, n, 0.1, 0.3), images)


KINDS = (parts, parts, parts, halves, tiles, noise, noise, noise, ellipses, ellipses)


def no_chest(chests: Tensor, rng: torch.Generator) -> Tensor:
    """Return as many images that show no whole frontal chest, each of one of `KINDS`."""
    kinds, images = torch.randint(len(KINDS), (len(chests),), generator=rng), chests.clone()
    for kind in kinds.unique().tolist():
        images[kinds == kind] = KINDS[kind](chests[kinds == kind], rng)
    return images


def varied_batch(chests: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (BATCH, 1, SIDE, SIDE) made from chests in the usual view, and their classes, (BATCH,) int64."""
    images = chests[torch.randint(len(chests), (BATCH,), generator=rng)]
    labels = torch.multinomial(SHARES, BATCH, replacement=True, generator=rng)
    nothing, inverted = labels == NO_CHEST, (labels == INVERTED).view(-1, 1, 1, 1)
    others = no_chest(images[nothing], rng)

    white = sometimes(rng, BATCH, 0.12, 0.6, 0.95)  # an opaque lung; in other images 0, which changes nothing
    images = images + ellipse(rng, BATCH, 0.9, 0.15) * (white - images).clamp(min=0)
    before = inverted & (uniform(rng, BATCH) < 0.6)  # it has a border; the others are inverted with theirs
    images = reframe(torch.where(before, 1 - images, images), rng)
    images[nothing] = others
    negative = nothing.view(-1, 1, 1, 1) & (uniform(rng, BATCH) < 0.3)
    images = torch.where((inverted & ~before) | negative, 1 - images, images)
    return orient(vary_greys(images, rng), labels, rng), labels


def fit_network(chests: Tensor, *, steps: int, seed: int) -> nn.Sequential:
    """Fit the network on chests in the usual view, (n, 1, SIDE, SIDE)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 30))
        convolutions = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((1, 8), (8, 16), (16, 16))]
        last = nn.Linear(16 * (CELLS // 8) ** 2, len(SHARES))
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    network, rng = nn.Sequential(*layers, nn.Flatten(), last), torch.Generator().manual_seed(fold(seed, 31))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    loop = Loop(None, images=steps * BATCH, batch=BATCH, name="views")
    for _ in loop:
        loop.set_rate(optimizer, RATE, warm_up=0.02)
        images, labels = varied_batch(chests, rng)
        cells = F.layer_norm(F.avg_pool2d(images, SIDE // CELLS), (1, CELLS, CELLS))
        losses = {"cross_entropy": F.cross_entropy(network(cells), labels, label_smoothing=SMOOTHING)}
        loop.update(losses, descend(losses, optimizer))
    loop.close()
    return network


def save_network(network: nn.Sequential, out: Path, **facts: int) -> None:
    """Write weights and biases in half precision, numbered by layer, with `TEXTS`, whose numbers are the facts."""
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    tensors = {f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.named_parameters()}
    arrays = {name: value.detach().half().numpy() for name, value in tensors.items()}
    write_sealed(out, arrays, {key: text.format(**facts) for key, text in TEXTS.items()})


def rejected_shares(chests: Tensor, weights: Path) -> dict[str, float]:
    """Return the shares that `usual_view` rejects of chests (n, 1, SIDE, SIDE) as they are and changed."""
    rng, side = torch.Generator().manual_seed(0), torch.full((len(chests), 1, 1, 1), 0.5**0.5)
    places = [uniform(rng, len(chests), -1, 1) * (1 - side) for _ in "xy"]
    sets = {
        "unchanged": chests,
        "half of the area": window(chests, [side, side], places)[0],
        "inverted": 1 - chests,
        "top to bottom": chests.flip(2),
        "turned by 180": chests.flip(2, 3),
        "turned by 90": chests.rot90(1, (2, 3)),
        "turned by 270": chests.rot90(3, (2, 3)),
        "rows for columns": chests.mT,
        "white noise": torch.rand(chests.shape, generator=rng),
    }
    found = {name: usual_view(images, weights=weights) for name, images in sets.items()}
    return {name: 1 - reasons.count(None) / len(reasons) for name, reasons in found.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Fit, save and measure; words: of the command line, by default the process's own."""
    parser = recipe_parser(__doc__, "--data", "--out", "--seed", out={"help": "safetensors file to write"})
    parser.add_argument("--steps", type=int, default=9000, help=f"of {BATCH} images")
    options = parser.parse_args(words)
    out, steps, seed = Path(options.out), options.steps, options.seed
    with named_errors():
        if not out.parent.is_dir() or out.is_dir():
            raise RunError(f"out must be a file in a folder that exists, got {out}")
        if steps < 1 or not 0 <= seed < LIMIT:
            raise RunError(f"steps must be at least 1 and seed from 0 to 2**64 - 1, got {steps} and {seed}")
        chests, held_out = read_chests(options.data, "train"), read_chests(options.data, "val")
        drawn = draw_chests(max(1, len(chests) // 33), 100_000)
        network = fit_network(torch.cat([chests, drawn]), steps=steps, seed=seed)
    save_network(network, out, images=len(chests), drawn=len(drawn), steps=steps, seed=seed)
    for name, images in {"val": held_out, "phantoms": draw_chests(500, 0)}.items():
        shares = ", ".join(f"{change} {share:.2%}" for change, share in rejected_shares(images, out).items())
        print(f"rejected of {name}: {shares}")


if __name__ == "__main__":
    main()
