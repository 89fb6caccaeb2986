"""Table 1: how near each model's images are to real ones, as Ann (2021) measures it and as it should be.

FID and PSNR per class as in Ann (2021); beside them what FID lacks at a few hundred images: KID with an interval, and
the same distances between real images of other patients (`train.metrics.generator_quality.realism`). The encoders are
our own (`train.classifier.encoders`): Inception's weights cannot be fetched everywhere, so FIDs compare models here and
with the floor, never with those of Ann (2021).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from carim_aug.location.prior import Prior
from carim_aug.ops.random import fold
from train.classifier.encoders import KINDS, features_of, load_encoder
from train.common.images import ImageSet
from train.metrics.generator_quality import Features, FigurePreset, realism
from train.metrics.psnr import OFFSET_DB, psnr
from train.metrics.statistics import estimate, interval, resample
from train.reproduction.baselines.presets import MODELS
from train.reproduction.figures.samples import pairs_of
from train.reproduction.figures.tsne import crops
from train.reproduction.published import TABLE1, corrected_table1
from train.reproduction.tables import Table, spanned, titled

CLASSES = ("normal", "nodule")


def signal_to_noise(generated: Tensor, real: Tensor, *, seed: int = 0, draws: int = 400) -> dict[str, float]:
    """Return the mean PSNR over all pairs of a generated and a real image (n, 1, H, W), [-1, 1], on a scale of [0, 1].

    Its interval is a bootstrap's, which draws rows of both.
    """
    pairs = psnr((generated + 1) / 2, (real + 1) / 2)
    generator = torch.Generator().manual_seed(fold(seed, 32))
    n, m = (resample(count, draws, generator=generator).to(pairs) for count in pairs.shape)
    low, high = interval(((n @ pairs) * m).sum(dim=1) / pairs.numel()).tolist()
    return estimate(float(pairs.mean()), (low, high))


def table1_row(
    source: Any,
    prior: Prior,
    real: Callable[[int, str], tuple[ImageSet, ImageSet]],
    boxed: ImageSet,
    encoders: str | Path,
    preset: FigurePreset,
) -> dict[str, Any]:
    """Return one model's row: "realism" by "class, encoder"; "psnr" in dB; "n", how many images there were of a kind.

    `real` goes from size and class to training and held-out images; `boxed` are held-out images at 256 px, some of them
    with a nodule box; `encoders` is a folder of `train.classifier.encoders`; the preset's pairs are images of a class.
    """
    boxed.check("held-out images", boxed=1)
    pairs = pairs_of(source, prior, preset.pairs, batch=preset.batch)
    generated = {"normal": pairs.without.clamp(-1, 1), "nodule": pairs.nodule.clamp(-1, 1)}
    distances = {}
    for kind in KINDS:
        encode = partial(features_of, load_encoder(Path(encoders) / f"{kind}.safetensors"))
        for name, images in generated.items():
            features = Features.of(encode, images, *real(source.image_size, name))
            distances[f"{name}, {kind}"] = realism(features, preset)
    train, held_out = (images.symmetric(torch.arange(len(images))) for images in real(source.image_size, "normal"))
    rows, boxes = boxed.each_box()
    real_crops = crops(boxed.symmetric(rows), box_convert(boxes, "xyxy", "cxcywh")[:, :2])
    centres = box_convert(pairs.boxes, "xyxy", "cxcywh")[:, :2] / source.image_size
    nodule_crops = crops(generated["nodule"], centres)
    ratio = partial(signal_to_noise, draws=preset.draws)
    return {
        "hash": source.weights_hash,
        "images_seen": (source.provenance.get("recipe") or {}).get("images_seen"),
        "realism": distances,
        "psnr": {
            "normal": ratio(generated["normal"], held_out),
            "nodule": ratio(nodule_crops, real_crops),
            "normal, real": ratio(train, held_out),
        },
        "n": {"generated": preset.pairs, "real": len(held_out), "crops": len(real_crops)},
    }


def table1_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Table]:
    """Return Table 1's tables by title, of models' rows (`table1_row`)."""

    def distance_cells(row: Mapping[str, Any], distance: str) -> list[str]:
        return [spanned(row["realism"][f"{name}, {kind}"][distance]) for kind in KINDS for name in CLASSES]

    some = next(iter(rows.values()))
    ours, kernel = [], []
    for name, row in rows.items():
        title, seen = MODELS.get(name, name), row["images_seen"]
        ratios = [spanned(row["psnr"][c]) for c in CLASSES]
        ours.append([title, "-" if seen is None else f"{seen:,}", *distance_cells(row, "fid"), *ratios])
        kernel.append([title, *distance_cells(row, "kid_all")])
    floor = ["real against real, other patients", "-", *distance_cells(some, "fid_floor")]
    ours.append([*floor, spanned(some["psnr"]["normal, real"]), "-"])
    kernel.append(["real, held-out patients", *distance_cells(some, "kid_held_out")])
    fixed = corrected_table1()
    printed = [[MODELS[name], *(f"{v:.2f}" for v in (*values, *fixed[name]))] for name, values in TABLE1.items()]
    columns = "|".join(f"{{0}}, {name} ({kind})" for kind in KINDS for name in CLASSES)
    psnr_columns = "PSNR, normal images (dB)|PSNR, nodule crops (dB)"
    published = "|".join(f"PSNR, {name}, {how}" for how in ("as printed", "on one scale") for name in CLASSES)
    return {
        "Table 1": (f"model|real images shown|{columns.format('FID')}|{psnr_columns}", ours),
        "Table 1, KID": (f"model|{columns.format('KID')}", kernel),
        "Table 1 of Ann (2021)": (f"model|FID, normal|FID, nodule|{published}", printed),
    }


def table1_text(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the report's blocks of Table 1."""
    n, distances = next(iter(rows.values()))["n"], next(iter(rows.values()))["realism"]
    text = (
        f"{n['generated']:,} images of each class a model; FID and its floor: "
        + ", ".join(f"{figure['n']} a side ({name})" for name, figure in distances.items())
        + f". PSNR: mean over all pairs with {n['real']} held-out normal images, and {n['crops']} crops of 50 x 50 at "
        f"256 px about held-out boxes; those of Ann (2021) are {OFFSET_DB:.2f} dB too high, for a peak of 255 on "
        "images in [0, 1]. Between images that are no pairs it says little: a blurred image has a higher one. Of class-"
        "conditional models the crop is where a mask was, which they do not see. CARIM-cGANs of smaller presets have "
        "our extensions (crops, differences, CT nodules superimposed on normal images), the others do not; a model is "
        "the last of its run. FIDs are of our encoders, not of Inception: set them beside the floor, not beside those "
        "of Ann (2021)."
    )
    return ["## Table 1: realism of the five models", text, *titled(table1_rows(rows))]
