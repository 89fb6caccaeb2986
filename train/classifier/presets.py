"""Presets of the classifier's training."""

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from train.common.run import RunError


@dataclass(frozen=True)
class ClassifierPreset:
    """Numbers of one classifier's training."""

    size: int = 224  # side in pixels at which the network sees images
    images: int = 400_000  # to show in all
    batch: int = 32  # images a step
    learning_rate: float = 5e-4  # AdamW's largest; see `train.common.loop.Loop.set_rate`
    weight_decay: float = 1e-2  # AdamW's
    nodules: float = 0.125  # share of a batch taken from images labelled Nodule, beside those that come by chance
    superimposed: float = 0.25  # share of a batch that is normal images with CT nodules superimposed
    validate_images: int = 8_000  # validation every so many images; the best nodule AUC on val is saved
    patience: int = 10  # validations without a better one after which training stops


PRESETS: dict[str, ClassifierPreset] = {
    "plain": ClassifierPreset(nodules=0.0, superimposed=0.0),
    "chexnet": ClassifierPreset(),
    "chexnet128": ClassifierPreset(size=128, images=100_000, validate_images=4_000),
    "tiny": ClassifierPreset(size=32, images=96, batch=8, validate_images=48),
}


def current_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the preset's numbers of a run's recipe, which may be older, in today's terms; RunError if it cannot be."""
    rest = {k: v for k, v in numbers.items() if k != "map_weight"}
    gone = numbers.get("map_weight", 0.0)
    if gone not in (0.0, 1.0):
        raise RunError(f"preset.map_weight must be 0.0 or 1.0 to go on with this run, got {gone!r}: it is gone")
    if gone:  # what every preset but "plain" had
        tqdm.write("preset.map_weight is gone: the run goes on without the map's loss")
    return rest
