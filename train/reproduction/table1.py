"""Table 1: how near each model's films are to real ones, as the source measures it and as it should be (METHOD 8, 9).

FID and PSNR per class as in the source; beside them what FID lacks at a few hundred films: KID with an interval, and
the same distances between real films of other patients (`train.metrics.generator_quality.realism`). The encoders are our own
(`train.classifier.encoders`): Inception's weights cannot be fetched everywhere, so FIDs compare models here and with the floor,
never with the source's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.classifier.encoders import KINDS, features_of, load_encoder
from train.classifier.training import LabelledFilms
from train.metrics.generator_quality import Features, FigurePreset, realism
from train.metrics.psnr import SOURCE_OFFSET_DB, psnr
from train.reproduction.baselines.command import MODELS
from train.reproduction.baselines.source import ClassGenerator
from train.reproduction.figures.same_noise import pairs_of
from train.reproduction.figures.tsne import crops
from train.reproduction.report.published import TABLE1, corrected_table1
from train.reproduction.report.tables import Row, spanned, table
from train.reproduction.sources import SIZE, Patients, scaled


def load_model(folder: str | Path | None) -> Any:
    """Gives a trained generator of any of the five models; None: the bundled one.

    Raises:
        WeightsError: it is none.
    """
    if folder is not None and ClassGenerator.is_at(folder):
        return ClassGenerator.from_pretrained(folder)
    return NoduleGenerator.from_pretrained(folder)


def signal_to_noise(made: Tensor, real: Tensor, *, seed: int = 0, draws: int = 400) -> dict[str, float]:
    """Gives the mean PSNR over all pairs of a made and a real image, [0, 1] scale, with a bootstrap interval.

    Args:
        made: (n, 1, H, W) in [-1, 1].
        real: (m, 1, H, W) in [-1, 1].
        seed: of the bootstrap, which draws rows of both.
        draws: bootstrap samples.
    """
    pairs = psnr((made + 1) / 2, (real + 1) / 2)
    stream = torch.Generator().manual_seed(fold(seed, 32))
    n, m = pairs.shape
    times = [torch.randint(k, (draws, k), generator=stream) for k in (n, m)]
    counts = [torch.zeros(draws, t.shape[1]).scatter_add_(1, t, torch.ones(t.shape)).to(pairs) for t in times]
    values = ((counts[0] @ pairs) * counts[1]).sum(dim=1) / (n * m)
    low, high = values.quantile(torch.tensor([0.025, 0.975]).to(values)).tolist()
    return {"value": float(pairs.mean()), "low": low, "high": high}


def table1_row(
    generator: Any,
    prior: LocationPrior,
    films: Callable[[int, str], tuple[LabelledFilms, LabelledFilms]],
    nodules: Patients,
    encoders: str | Path,
    preset: FigurePreset,
) -> dict[str, Any]:
    """Gives one model's row.

    Args:
        generator: of the protocol.
        prior: of the masks.
        films: from size and class ("normal", "nodule") to training and held-out films.
        nodules: held-out boxed nodules at 256 px, and normal films.
        encoders: folder of `train.classifier.encoders`.
        preset: pairs is the number of films of each class.

    Returns:
        "realism" by "class, encoder"; "psnr" of "normal" films and "nodule" crops, in dB on the scale of [0, 1], and
        of "real" films among themselves; "images_seen", "hash".
    """
    pairs = pairs_of(generator, prior, n=preset.pairs, batch=preset.batch)
    normal, nodule = pairs.without.clamp(-1, 1), pairs.nodule.clamp(-1, 1)
    centres = (pairs.boxes[:, :2] + pairs.boxes[:, 2:]) / 2 / generator.image_size
    told: dict[str, Any] = {"hash": generator.weights_hash, "realism": {}}
    recipe = generator.provenance.get("recipe") or {}
    told["images_seen"] = recipe.get("images_seen")
    for kind in KINDS:
        encode = partial(features_of, load_encoder(Path(encoders) / f"{kind}.safetensors"))
        for name, made in (("normal", normal), ("nodule", nodule)):
            features = Features.of(encode, made, *films(generator.image_size, name))
            told["realism"][f"{name}, {kind}"] = realism(features, preset)
    train, held_out = (scaled(f.images) for f in films(generator.image_size, "normal"))
    real_crops = crops(scaled(nodules.nodule), (nodules.boxes[:, :2] + nodules.boxes[:, 2:]) / 2 / SIZE)
    told["psnr"] = {
        "normal": signal_to_noise(normal, held_out, draws=preset.draws),
        "nodule": signal_to_noise(crops(nodule, centres), real_crops, draws=preset.draws),
        "normal, real": signal_to_noise(train, held_out, draws=preset.draws),
    }
    told["n"] = {"generated": preset.pairs, "real": len(held_out), "crops": len(real_crops)}
    return told


def table1_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, list[Row]]]:
    """Gives Table 1's tables by title: header, cells split at |, and rows.

    Args:
        rows: by model, as `table1_row` gives them.
    """
    title = lambda name: MODELS.get(name, name)  # noqa: E731
    classes = ("normal", "nodule")
    ours = []
    for name, row in rows.items():
        seen = row["images_seen"]
        cells = [title(name), "-" if seen is None else f"{seen:,}"]
        for kind in KINDS:
            cells += [spanned(row["realism"][f"{c}, {kind}"]["fid"]) for c in classes]
        ours.append([*cells, *(spanned(row["psnr"][c]) for c in classes)])
    some = next(iter(rows.values()))
    floor = ["real against real, other patients", "-"]
    for kind in KINDS:
        floor += [spanned(some["realism"][f"{c}, {kind}"]["fid_floor"]) for c in classes]
    ours.append([*floor, spanned(some["psnr"]["normal, real"]), "-"])
    kernel = [
        [title(name), *(spanned(row["realism"][f"{c}, {kind}"]["kid_all"]) for kind in KINDS for c in classes)]
        for name, row in rows.items()
    ]
    kernel.append(
        [
            "real, held-out patients",
            *(spanned(some["realism"][f"{c}, {kind}"]["kid_held_out"]) for kind in KINDS for c in classes),
        ]
    )
    fixed = corrected_table1()
    source = [
        [title(name), *(f"{v:.2f}" for v in values), *(f"{v:.2f}" for v in fixed[name])]
        for name, values in TABLE1.items()
    ]
    columns = "|".join(f"{{0}}, {c} ({kind})" for kind in KINDS for c in classes)
    return {
        "Table 1": (
            f"model|real images shown|{columns.format('FID')}|PSNR, normal films (dB)|PSNR, nodule crops (dB)",
            ours,
        ),
        "Table 1, KID": (f"model|{columns.format('KID')}", kernel),
        "Table 1 of the source": (
            "model|FID, normal|FID, nodule|PSNR, normal, as printed|PSNR, nodule, as printed|"
            "PSNR, normal, on one scale|PSNR, nodule, on one scale",
            source,
        ),
    }


def table1_text(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Gives the report's blocks of Table 1."""
    n, least = next(iter(rows.values()))["n"], next(iter(rows.values()))["realism"]
    text = (
        f"{n['generated']:,} films of each class a model; FID and its floor: "
        + ", ".join(f"{f['n']} a side ({name})" for name, f in least.items())
        + f". PSNR: mean over all pairs with {n['real']} held-out normal films, and {n['crops']} crops of 50 x 50 at "
        f"256 px about held-out boxes; the source's are {SOURCE_OFFSET_DB:.2f} dB too high, for a peak of 255 on "
        "images in [0, 1]. Between images that are no pairs it says little: a blurred film has a higher one. Of class-"
        "conditional models the crop is where a mask was, which they do not see. CARIM-cGANs of smaller presets have "
        "our extensions (crops, differences, CT nodules superimposed on normal films), the others do not; a model is "
        "the last of its run. FIDs are of our encoders, not of Inception: set them beside the floor, not beside the "
        "source's."
    )
    parts = ["## Table 1: realism of the five models", text]
    for title, (header, cells) in table1_rows(rows).items():
        parts += [f"### {title}", table(header, cells)]
    return parts
