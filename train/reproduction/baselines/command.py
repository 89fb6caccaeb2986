"""All five models of Table 1: `python -m train.reproduction.baselines --preset mini --data FOLDER --out runs/table1` (METHOD 7).

Each is trained on the same train split with the same count of real images, into a folder of its own. The CARIM-cGAN
with the loss (it needs `--classifier FILE`) and the one without share their first stage, carim-stage1, and then see
equally many images more. `--ct-nodules FILE` is for these two. The same command resumes, and trains what is missing;
`--models dcgan pggan` trains some of them.
"""

import argparse
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from carim_aug.data.errors import DataError
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.generators.pretrained import WeightsError
from train.classifier.densenet import ClassifierError
from train.common.distributed import PRECISIONS
from train.common.run import RunError, TrainingError
from train.gan.presets import PRESETS as GANS
from train.gan.presets import GANPreset
from train.gan.start import first_stage
from train.gan.training import train_gan
from train.reproduction.baselines.source import ClassGeneratorConfig
from train.reproduction.baselines.training import ClassGANPreset, train_class_gan

MODELS: dict[str, str] = {
    "dcgan": "DCGAN, one per class",
    "pggan": "Class-conditional PGGAN",
    "attention": "Multi-scale class cGAN with self-attention",
    "carim-without": "CARIM-cGAN without the loss",
    "carim": "CARIM-cGAN",
}
"""Folder of each model, and its row in Table 1."""

STAGE1 = "carim-stage1"


@dataclass(frozen=True)
class Table1Preset:
    """Numbers of the five trainings.

    Attributes:
        images: real images that each model is shown.
        rivals: the class-conditional ones, by folder.
        stage1: of the CARIM-cGAN; its images are those before the two ways part.
        stage2: with the loss.
    """

    images: int
    rivals: dict[str, ClassGANPreset]
    stage1: GANPreset
    stage2: GANPreset


def rivals_of(
    stage1: GANPreset, images: int, *, dcgan: tuple[int, int], pggan: tuple[int, int]
) -> dict[str, ClassGANPreset]:
    """Gives the class-conditional models' presets: of the CARIM-cGAN's size, batch, augmentation and budget.

    Args:
        stage1: of the CARIM-cGAN.
        images: that each model is shown.
        dcgan: fewest and most maps.
        pggan: fewest and most maps.
    """
    backbone = ARCHITECTURES[stage1.architecture]
    size, noise = backbone.image_size, backbone.noise_dim
    attention = ClassGANPreset(
        ClassGeneratorConfig("attention", size, noise, architecture=stage1.architecture),
        images,
        batch=stage1.batch,
        learning_rate=stage1.learning_rate,
        betas=stage1.betas,
        augment=stage1.augment,
        discriminator_width=stage1.discriminator_width,
        discriminator_channels=stage1.discriminator_channels,
        discriminator_norm=stage1.discriminator_norm,
        condition_dim=stage1.condition_dim,
        ema_images=stage1.ema_images,
        snapshot_images=stage1.snapshot_images,
        log_images=stage1.log_images,
    )
    # The others with their authors' Adam; PGGAN spends half of the budget on the sizes below the last.
    authors = {"learning_rate": 2e-4, "betas": (0.5, 0.999)}
    growing = {"learning_rate": 1e-3, "betas": (0.0, 0.99), "grow_images": images // 2 // (size.bit_length() - 3)}
    return {
        "dcgan": replace(attention, config=ClassGeneratorConfig("dcgan", size, noise, *dcgan), **authors),
        "pggan": replace(attention, config=ClassGeneratorConfig("pggan", size, noise, *pggan), **growing),
        "attention": attention,
    }


def table1(stage1: GANPreset, stage2: GANPreset, **widths: tuple[int, int]) -> Table1Preset:
    """Gives the preset in which all models are shown the images of both stages; widths as in `rivals_of`."""
    return Table1Preset(stage2.images, rivals_of(stage1, stage2.images, **widths), stage1, stage2)


_FAST = replace(GANS["fast128"], images=9_000, grow_at=(1_500, 4_000), snapshot_images=3_000)
_TINY = replace(GANS["tiny"], images=64, grow_at=(32,), snapshot_images=32, log_images=16)

PRESETS: dict[str, Table1Preset] = {
    "thesis": table1(GANS["thesis256"], GANS["thesis256-stage2"], dcgan=(64, 1024), pggan=(16, 512)),
    "mini": table1(_FAST, replace(_FAST, images=12_000), dcgan=(32, 512), pggan=(16, 256)),
    "tiny": table1(_TINY, replace(_TINY, images=96), dcgan=(8, 32), pggan=(8, 16)),
}


def train_model(
    name: str,
    preset: Table1Preset,
    *,
    data: str | Path,
    out: str | Path,
    ct_nodules: str | Path | None,
    classifier: str | Path | None,
    seed: int = 0,
    minutes: float = math.inf,
    data_name: str = "",
    device: str = "cpu",
    precision: str = "bf16-mixed",
) -> Path:
    """Trains one model of `MODELS`, or goes on with it; gives the folder of its weights.

    Args:
        name: of the model.
        preset: the numbers.
        data: ChestX-ray14's layout with a train split.
        out: the models' folders are made in it.
        ct_nodules: templates.npz for the CARIM-cGAN, see `train.gan.training`.
        classifier: file of the frozen classifier of the CARIM loss.
        seed: of everything random.
        minutes: stop after so long.
        data_name: what the data are called in the weights.
        device: "cpu" or "cuda".
        precision: of `train.common.distributed.PRECISIONS`.

    Raises:
        RunError: something does not fit.
        TrainingError: losses are not finite, or the time was too short for the stage that another one starts from.
    """
    out, started = Path(out), time.monotonic()
    common = {"data": data, "seed": seed, "data_name": data_name, "device": device, "precision": precision}
    if name in preset.rivals:
        return train_class_gan(preset.rivals[name], out=out / name, minutes=minutes, **common)
    if name not in MODELS:
        raise RunError(f"models must be of {list(MODELS)}, got {name!r}")
    if name == "carim" and classifier is None:
        raise RunError(
            "classifier must be given for the CARIM loss (--classifier FILE of train.classifier.training), got None"
        )
    begun = out / STAGE1
    train_gan(preset.stage1, out=begun, ct_nodules=ct_nodules, minutes=minutes, **common)
    shown = first_stage(begun, preset.stage1)["images_seen"]
    if shown < preset.stage1.images:
        raise TrainingError(f"{begun} was shown {shown} of {preset.stage1.images} images: give it more --minutes")
    left = minutes - (time.monotonic() - started) / 60
    if name == "carim":
        options = {"start": begun, "classifier": classifier, "ct_nodules": ct_nodules, "minutes": left}
        return train_gan(preset.stage2, out=out / name, **options, **common)
    if not (out / name).exists():
        shutil.copytree(begun, out / f"{name}.partial", dirs_exist_ok=True)
        (out / f"{name}.partial").rename(out / name)
    longer = replace(preset.stage1, images=preset.images)
    return train_gan(longer, out=out / name, ct_nodules=ct_nodules, minutes=left, **common)


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection, for the CARIM-cGAN")
    parser.add_argument("--classifier", help="file of the frozen classifier, for the CARIM loss")
    parser.add_argument("--out", required=True, help="the runs' folder; the same folder resumes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each model")
    parser.add_argument("--data-name", default="", help="what the data are called in the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    options = vars(parser.parse_args())
    preset, names = PRESETS[options.pop("preset")], options.pop("models")
    try:
        for name in names:
            print(f"{MODELS[name]}: {train_model(name, preset, **options)}")
    except (RunError, TrainingError, DataError, WeightsError, ClassifierError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
