"""Presets of the GAN's training: one row per published model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from train.common.run import RunError


@dataclass(frozen=True)
class GANPreset:
    """Numbers of one training, both stages."""

    architecture: str  # name in `carim_aug.generators.multiscale.ARCHITECTURES`
    images: int = 0  # real images to show in all (batch * steps)
    batch: int = 16  # images per step, half normal and half nodule
    learning_rate: float = 2e-4  # Adam's, for generator and discriminators
    betas: tuple[float, float] = (0.5, 0.999)  # Adam's
    discriminator_width: int = 32  # maps after the first convolution of every scale's discriminator
    discriminator_channels: int = 256  # most maps of a discriminator's trunk (see `ScaleDiscriminator`)
    condition_dim: int = 32  # length of the class embedding in the conditional head
    discriminator_norm: bool = False  # batch norm in the discriminators (Ann 2021) or none
    augment: bool = True  # DiffAugment on image and mask together
    superimposed: float = 0.5  # share of a batch's nodule half that is a CT nodule superimposed on a real normal image
    crop_weight: float = 1.0  # of the discriminator of (image, mask) crops in the generator's loss; 0 leaves it out
    difference_weight: float = 3.0  # the same for (difference, mask) crops
    outside_weight: float = 20.0  # of the mean |difference| outside the dilated mask
    contrast_weight: float = 100.0  # of `train.gan.losses.spread_loss` on the nodules' contrast
    level_weight: float = 20.0  # of `train.gan.losses.level_loss` on the last scale
    carim_weight: float = 0.001  # lambda of eq. 7, in stage 2
    carim_form: str = "softplus"  # of `train.gan.losses.CARIM_FORMS`
    carim_every: int = 4  # the CARIM loss each so many steps, with so many times the weight
    grow_at: tuple[int, ...] = ()  # images seen at which branch 2, 3, .. joins; all from the start if empty
    warm_up: int = 4_000  # images that train the discriminators alone when the generator starts from given weights
    ema_images: int = 3_000  # half-life of the moving average of the weights, in images
    statistics_batches: int = 60  # whose batch norm statistics the exported weights get; see `train.gan.networks`
    kid_images: int = 500  # generated images of each class, and at most so many real ones, by which the best is chosen
    snapshot_images: int = 4_000  # a picture and a checkpoint every so many images
    log_images: int = 320  # a line of the log every so many images

    def numbers(self) -> dict[str, Any]:
        """Return those that fix a run, as plain JSON types: it may be prolonged, and looked at otherwise."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in values.items() if k not in ("images", "kid_images", "log_images")}


EPOCH = 59_728 + 5_698  # images of an epoch of Ann (2021): normal and nodule
_OURS = ("superimposed", "crop_weight", "difference_weight", "outside_weight", "contrast_weight", "level_weight")

# Ann (2021), III.2, to the letter: 43 epochs, batch 24, Adam 2e-5, none of our extensions.
_THESIS = GANPreset(
    "thesis256",
    images=43 * EPOCH,
    batch=24,
    learning_rate=2e-5,
    betas=(0.9, 0.999),
    discriminator_width=64,
    discriminator_channels=512,
    condition_dim=128,
    discriminator_norm=True,
    augment=False,
    carim_form="relu",
    carim_every=1,
    snapshot_images=50_000,
    log_images=4_800,
    **dict.fromkeys(_OURS, 0.0),  # type: ignore[arg-type]
)
_TINY = GANPreset("tiny", images=256, batch=8, discriminator_width=8, grow_at=(64,), warm_up=32, snapshot_images=128)
PRESETS: dict[str, GANPreset] = {
    "thesis256": _THESIS,
    "thesis256-stage2": replace(_THESIS, images=(43 + 13) * EPOCH, batch=16),  # 13 epochs more
    "fast256": GANPreset(
        "fast256", images=2_000_000, batch=32, grow_at=(100_000, 300_000), snapshot_images=25_000, log_images=3_200
    ),
    "fast128": GANPreset("fast128", images=400_000, grow_at=(16_000, 40_000)),
    "tiny": replace(_TINY, statistics_batches=4, kid_images=32, log_images=32),
}

# Numbers that presets had until version 0.1, and the only values with which such a run can go on.
_GONE: dict[str, Any] = {"film_weight": 1.0, "anchor_weight": 0.0, "normal_first": 0}
_GONE |= {"relativistic": False, "r1_weight": 0.0, "r1_every": 16}


def current_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the preset's numbers of a run's recipe, which may be older, in today's terms; RunError if it cannot be."""
    for name, value in _GONE.items():
        if numbers.get(name, value) != value:
            raise RunError(f"preset.{name} must be {value!r} to go on with this run, got {numbers[name]!r}: it is gone")
    rest = {k: v for k, v in numbers.items() if k not in _GONE}
    if rest.get("carim_form") == "source":  # the old name
        rest["carim_form"] = "relu"
    return {**GANPreset("").numbers(), **rest}
