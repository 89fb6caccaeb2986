"""What a GAN run starts from, and whether it can: everything that does not fit is named before training starts."""

import json
from pathlib import Path
from typing import Any

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.generators.pretrained import NoduleGenerator
from train.common.run import RunError, read_checkpoint
from train.gan.batch import Films
from train.gan.presets import PRESETS, GANPreset
from train.gan.step import Wrapped

SAME = ("architecture", "discriminator_width", "discriminator_channels", "condition_dim", "discriminator_norm")
"""Numbers of a preset that fix the networks."""


def named_preset(name: str) -> GANPreset:
    """Gives a preset.

    Raises:
        RunError: there is none of this name.
    """
    if name not in PRESETS:
        raise RunError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def check_preset(preset: GANPreset, ranks: int) -> None:
    """Nothing, or RunError: an unknown architecture, or a batch that cannot be shared out."""
    if preset.architecture not in ARCHITECTURES:
        raise RunError(f"preset.architecture must be one of {sorted(ARCHITECTURES)}, got {preset.architecture!r}")
    if preset.batch < 2 * ranks or preset.batch % (2 * ranks):
        raise RunError(f"preset.batch must be a multiple of {2 * ranks} for {ranks} processes, got {preset.batch}")
    if len(preset.grow_at) >= ARCHITECTURES[preset.architecture].branches:
        branches = ARCHITECTURES[preset.architecture].branches
        raise RunError(f"preset.grow_at must have fewer entries than branches ({branches}), got {preset.grow_at}")
    if _unjudged(preset):
        raise RunError(
            "preset.film_weight must be > 0 unless crops or differences are judged from the first image on, got 0 with "
            f"crop_weight {preset.crop_weight}, difference_weight {preset.difference_weight}, grow_at {preset.grow_at}"
        )


def _unjudged(preset: GANPreset) -> bool:
    return preset.film_weight == 0 and (bool(preset.grow_at) or preset.crop_weight + preset.difference_weight == 0)


def check_films(films: Films, ct: CTNodules | None, preset: GANPreset, where: str | Path) -> None:
    """Nothing, or RunError: fewer films than a batch, or no nodule of known place for the crops."""
    count = len(films.normal) + len(films.nodule)
    if count < preset.batch:
        raise RunError(f"{where}: the train split needs at least a batch of {preset.batch} films, got {count}")
    if preset.crop_weight + preset.difference_weight > 0 and ct is None and not films.boxed:
        raise RunError(
            f"{where}: crop_weight and difference_weight need nodules of known place, but the train split has no "
            "nodule box and there are no CT nodules: give --ct-nodules, or --set crop_weight=0 difference_weight=0"
        )


def trained_generator(weights: str | Path, preset: GANPreset) -> NoduleGenerator:
    """Gives an exported generator to go on with.

    Raises:
        WeightsError: it cannot be loaded.
        RunError: it is of another architecture than the preset's.
    """
    trained, config = NoduleGenerator.from_pretrained(weights), ARCHITECTURES[preset.architecture]
    if trained.config != config:
        raise RunError(f"weights must be of the preset's architecture {config}, got {trained.config} in {weights}")
    return trained


def first_stage(start: str | Path, preset: GANPreset) -> dict[str, Any]:
    """Gives the checkpoint of a run of stage 1 that stage 2 starts from: the best, where one was chosen, or the newest.

    Args:
        start: the run's folder.
        preset: that is to go on; its networks must be those of the run.

    Raises:
        RunError: no run, no readable checkpoint, or one of other networks.
    """
    path, numbers = Path(start) / "recipe.json", preset.to_dict()
    if not path.is_file():
        raise RunError(f"start must be the folder of a run, got {start}, which has no recipe.json")
    before = json.loads(path.read_text()).get("preset", {})
    other = {k: before.get(k) for k in SAME if before.get(k) != numbers[k]}
    if other:
        raise RunError(f"start must be a run of the same networks, got {other} in {path}")
    for checkpoint in (Path(start) / "best.pt", *sorted(Path(start).glob("checkpoint-*.pt"), reverse=True)):
        try:
            return read_checkpoint(checkpoint)
        except RunError:  # missing or damaged: the next will do
            continue
    raise RunError(f"start must hold a checkpoint, got none that can be read in {start}")


def starting_generator(
    preset: GANPreset, trained: NoduleGenerator | None, begun: dict[str, Any] | None
) -> MultiScaleGenerator:
    """Gives a copy of the generator that a run starts from.

    Args:
        preset: its anchor_weight asks for it.
        trained: what stage 1 starts from, if anything.
        begun: the checkpoint that stage 2 starts from, if any.

    Raises:
        RunError: the run starts untrained.
    """
    anchor = MultiScaleGenerator(ARCHITECTURES[preset.architecture])
    if trained is not None:
        anchor.load_state_dict(trained.state_dict())
    elif begun is not None:
        prefix = "average.module."
        state = {k.removeprefix(prefix): v for k, v in begun["networks"].items() if k.startswith(prefix)}
        anchor.load_state_dict(state)
    else:
        raise RunError(
            f"anchor_weight must be 0 for a run that starts untrained, got {preset.anchor_weight}: give --weights"
        )
    return anchor


def restore(wrapped: Wrapped, state: dict[str, Any]) -> None:
    """Puts a checkpoint's tensors into networks and optimizers.

    Raises:
        RunError: it is of other networks.
    """
    try:
        wrapped.networks.load_state_dict(state["networks"])
        for name, optimizer in wrapped.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(f"the checkpoint is of other networks than the preset's: {str(error)[:300]}") from error
