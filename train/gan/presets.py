"""Presets of the GAN's and the classifier's training: one row per published or shipped number (METHOD 4, 6 and 10)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from train.common.run import RunError

Preset = TypeVar("Preset", bound=Any)


@dataclass(frozen=True)
class GANPreset:
    """Numbers of one training, both stages.

    Attributes:
        architecture: name in `carim_aug.generators.multiscale.ARCHITECTURES`.
        images: real images to show in all, counted as METHOD 6 does (batch * steps).
        batch: images per step, half normal and half nodule.
        learning_rate: Adam's, for generator and discriminators.
        betas: Adam's.
        discriminator_width: maps after the first convolution of every scale's discriminator.
        discriminator_channels: most maps of a discriminator's trunk (see `ScaleDiscriminator`).
        condition_dim: length of the class embedding in the conditional head.
        discriminator_norm: batch norm in the discriminators (the source) or none (EVIDENCE).
        augment: DiffAugment on image and mask together.
        superimposed: share of the nodule half of a batch that is a CT nodule superimposed on a real normal film.
        crop_weight: weight of the discriminator of (image, mask) crops in the generator's loss; 0 leaves it out.
        difference_weight: the same for (difference, mask) crops.
        outside_weight: weight of the mean |difference| outside the dilated mask.
        contrast_weight: weight of `train.gan.losses.spread_loss` on the nodules' contrast.
        film_weight: weight of the whole films' discriminators; 0 leaves them out, for a phase that trains nodules only.
        anchor_weight: weight of the mean |difference| between films without a nodule and those that the generator gave
            for the same noise when the run started.
        level_weight: weight of `train.gan.losses.level_loss` on the last scale.
        carim_weight: lambda of eq. 7, in stage 2.
        carim_form: of `train.gan.losses.CARIM_FORMS`.
        carim_every: the CARIM loss each so many steps, with so many times the weight.
        relativistic: the scales' discriminators judge pairs (R3GAN) in place of least squares.
        r1_weight: weight of R1 on real images, half the squared norm of the scores' gradient; 0 leaves it out.
        r1_every: R1 each so many steps, with so many times the weight.
        normal_first: images of a first phase, of normal films alone and empty masks.
        grow_at: images seen at which branch 2, 3, .. joins (progressive training); all from the start if empty.
        warm_up: images that train the discriminators alone when the generator starts from given weights.
        ema_images: half-life of the moving average of the weights, in images.
        statistics_batches: whose batch norm statistics the exported weights get; see `train.gan.networks`.
        snapshot_images: a picture and a checkpoint every so many images.
        log_images: a line of the log every so many images.
    """

    architecture: str
    images: int = 0
    batch: int = 16
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    discriminator_width: int = 32
    discriminator_channels: int = 256
    condition_dim: int = 32
    discriminator_norm: bool = False
    augment: bool = True
    superimposed: float = 0.5
    crop_weight: float = 1.0
    difference_weight: float = 3.0
    outside_weight: float = 20.0
    contrast_weight: float = 100.0
    film_weight: float = 1.0
    anchor_weight: float = 0.0
    level_weight: float = 20.0
    carim_weight: float = 0.001
    carim_form: str = "softplus"
    carim_every: int = 4
    relativistic: bool = False
    r1_weight: float = 0.0
    r1_every: int = 16
    normal_first: int = 0
    grow_at: tuple[int, ...] = ()
    warm_up: int = 4_000
    ema_images: int = 3_000
    statistics_batches: int = 60
    snapshot_images: int = 4_000
    log_images: int = 320

    def to_dict(self) -> dict[str, Any]:
        """Gives the numbers as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def numbers(self) -> dict[str, Any]:
        """Gives those that fix a run: it may be prolonged, and told of more often."""
        return {k: v for k, v in self.to_dict().items() if k not in ("images", "log_images")}


# METHOD 6 to the letter: 43 epochs of 59,728 + 5,698 films, batch 24, Adam 2e-5, none of our extensions.
_THESIS = GANPreset(
    "thesis256",
    images=43 * (59_728 + 5_698),
    batch=24,
    learning_rate=2e-5,
    betas=(0.9, 0.999),
    discriminator_width=64,
    discriminator_channels=512,
    condition_dim=128,
    discriminator_norm=True,
    augment=False,
    superimposed=0.0,
    crop_weight=0.0,
    difference_weight=0.0,
    outside_weight=0.0,
    contrast_weight=0.0,
    level_weight=0.0,
    carim_form="source",
    carim_every=1,
    snapshot_images=50_000,
    log_images=4_800,
)

PRESETS: dict[str, GANPreset] = {
    "thesis256": _THESIS,
    # Its stage 2: 13 epochs more, batch 16.
    "thesis256-stage2": replace(_THESIS, images=(43 + 13) * (59_728 + 5_698), batch=16),
    "fast256": GANPreset(
        "fast256", images=2_000_000, batch=32, grow_at=(100_000, 300_000), snapshot_images=25_000, log_images=3_200
    ),
    "fast128": GANPreset("fast128", images=400_000, grow_at=(16_000, 40_000)),
    "tiny": GANPreset(
        "tiny",
        images=256,
        batch=8,
        discriminator_width=8,
        grow_at=(64,),
        warm_up=32,
        statistics_batches=4,
        snapshot_images=128,
        log_images=32,
    ),
}


@dataclass(frozen=True)
class ClassifierPreset:
    """Numbers of one classifier's training.

    Attributes:
        size: side in pixels at which the network sees films.
        images: films to show in all.
        batch: films a step.
        learning_rate: AdamW's largest, after a warm-up of a twentieth of the images, then a cosine to zero.
        weight_decay: AdamW's.
        nodules: share of a batch drawn from films labelled Nodule.
        superimposed: share of a batch that is normal films with CT nodules.
        map_weight: weight of the map's loss where the place of the nodule is known.
        validate_images: validation every so many films; the network with the best nodule AUC on val is kept.
        patience: validations without a better one after which training stops.
    """

    size: int = 224
    images: int = 400_000
    batch: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    nodules: float = 0.125
    superimposed: float = 0.25
    map_weight: float = 1.0
    validate_images: int = 8_000
    patience: int = 10


CLASSIFIERS: dict[str, ClassifierPreset] = {
    "plain": ClassifierPreset(nodules=0.0, superimposed=0.0, map_weight=0.0),
    "chexnet": ClassifierPreset(),
    "chexnet128": ClassifierPreset(size=128, images=100_000, validate_images=4_000),
    "tiny": ClassifierPreset(size=32, images=96, batch=8, validate_images=48),
}

DEFAULTS: dict[str, Any] = GANPreset("").numbers()
"""What a recipe from before a number existed means by its absence."""


def changed(preset: Preset, settings: Sequence[str]) -> Preset:
    """Gives a preset with some numbers changed, as in `--set crop_weight=0 grow_at=[1000,2000]`.

    Args:
        preset: any of train's frozen dataclasses of numbers.
        settings: "name=value" each, the value as JSON; a value that is no JSON is taken as text.

    Raises:
        RunError: no such number, or a value of another type.
    """
    known = {field.name: getattr(preset, field.name) for field in fields(preset)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise RunError(f"set must name one of {sorted(known)}, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        before = known[name]
        if isinstance(before, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(before, tuple) and isinstance(value, list):
            value = tuple(value)
        if type(value) is not type(before):
            raise RunError(f"set must give {name} a value such as {before!r}, got {setting!r}")
        values[name] = value
    return replace(preset, **values)
