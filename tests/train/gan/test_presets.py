"""The GAN's presets: the published numbers, and what recipes of older runs mean."""

import pytest

from carim_aug.generators.multiscale import ARCHITECTURES
from train.common.run import Run, RunError
from train.gan.presets import PRESETS, current_numbers


def test_thesis256_is_ann_2021_to_the_letter():
    stage1, stage2 = PRESETS["thesis256"], PRESETS["thesis256-stage2"]
    assert (stage1.batch, stage2.batch, stage1.learning_rate, stage2.learning_rate) == (24, 16, 2e-5, 2e-5)
    assert (stage1.images, stage2.images - stage1.images) == (43 * 65_426, 13 * 65_426)
    assert (stage1.carim_weight, stage1.carim_form, stage1.carim_every) == (0.001, "relu", 1)
    ours = ("superimposed", "crop_weight", "difference_weight", "outside_weight", "contrast_weight", "level_weight")
    assert not any(getattr(preset, name) for preset in (stage1, stage2) for name in (*ours, "augment", "grow_at"))
    assert stage1.discriminator_norm and ARCHITECTURES[stage1.architecture].joint


OLD = {
    "film_weight": 1.0,
    "anchor_weight": 0.0,
    "normal_first": 0,
    "relativistic": False,
    "r1_weight": 0.0,
    "r1_every": 16,
}


def test_an_older_run_goes_on_unless_it_used_what_is_gone(tmp_path):
    now = PRESETS["thesis256"].numbers()
    before = {k: v for k, v in now.items() if k != "statistics_batches"} | OLD | {"carim_form": "source"}
    Run(tmp_path, {"preset": before, "precision": "bf16-mixed"})
    assert current_numbers(before) == now
    Run(tmp_path, {"preset": now, "precision": "32-true"}, migrate=current_numbers)
    with pytest.raises(RunError, match=r"differs in \['preset.batch'\]"):
        Run(tmp_path, {"preset": now | {"batch": 8}}, migrate=current_numbers)
    for name, value in (("film_weight", 0.0), ("relativistic", True), ("r1_weight", 1.0)):
        with pytest.raises(RunError, match=f"preset.{name} must be .* to go on with this run, got {value}"):
            current_numbers(OLD | {name: value})
