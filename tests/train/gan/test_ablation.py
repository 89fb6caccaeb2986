"""The ablation on drawn chests: every arm trained and judged alike, once."""

import json
from dataclasses import replace

import pytest

from train.common.run import RunError
from train.gan import ablation as module
from train.gan.ablation import BASE, ablation, ablation_table, folder_of, parser
from train.gan.presets import PRESETS
from train.reproduction.patches import PatchPreset

TINY = replace(PRESETS["tiny"], images=32, snapshot_images=32, grow_at=())


def options(phantom_data, out, arms):
    words = ["--data", str(phantom_data), "--out", str(out), "--patches", "50", "--seeds", "1", "--arms", *arms]
    return parser().parse_args(words)


def test_every_arm_is_judged_by_the_same_figures_and_trained_once(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PatchPreset", lambda **numbers: PatchPreset(steps=2, **numbers))
    asked = options(phantom_data, tmp_path, ["crop_weight=0 r1_weight=1"])
    figures = ablation(TINY, asked)
    assert list(figures) == [BASE, "crop_weight=0 r1_weight=1"]
    assert json.loads((tmp_path / "ablation.json").read_text()) == figures
    recipe = json.loads((tmp_path / "crop_weight-0_r1_weight-1" / "recipe.json").read_text())
    assert recipe["preset"]["crop_weight"] == 0 and recipe["preset"]["r1_weight"] == 1
    lines = ablation_table(figures).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1

    logs = [(tmp_path / arm / "log.jsonl").read_bytes() for arm in ("base", "crop_weight-0_r1_weight-1")]
    monkeypatch.setattr(module, "learnt", None)  # the figures are kept, so no patch classifier is trained again
    assert ablation(TINY, asked) == figures
    assert logs == [(tmp_path / arm / "log.jsonl").read_bytes() for arm in ("base", "crop_weight-0_r1_weight-1")]


def test_an_arm_that_changes_nothing_known_or_is_there_twice_stops_before_training(phantom_data, tmp_path):
    with pytest.raises(RunError, match="set must name one of"):
        ablation(TINY, options(phantom_data, tmp_path / "a", ["colour=1"]))
    with pytest.raises(RunError, match="arms must be different"):
        ablation(TINY, options(phantom_data, tmp_path / "b", ["r1_weight=1", "r1_weight=1"]))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_an_arm_has_a_folder_of_its_own():
    assert folder_of(BASE) == "base"
    assert folder_of("grow_at=[1,2] r1_weight=0.5") == "grow_at--1-2-_r1_weight-0.5"
