"""The classifier's recipe on phantom chests: batches, resume, report, bad input."""

import dataclasses
import json
import sys

import pytest
import torch

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.findings import FINDINGS
from train.classifier import __main__ as command
from train.classifier import training as module
from train.classifier.batch import draw_batch, move
from train.classifier.densenet import ChestClassifier
from train.classifier.presets import PRESETS, current_numbers
from train.classifier.training import train_classifier
from train.common.images import NODULE, read_images
from train.common.run import RunError, TrainingError

TINY = dataclasses.replace(PRESETS["tiny"], images=32, batch=8, validate_images=16)


def test_batches_are_keyed_and_hold_what_the_preset_asks_for(phantom_data, templates):
    images, prior, ct = read_images(phantom_data, "train", 32), LocationPrior.bundled(), CTNodules(templates)
    preset = dataclasses.replace(TINY, batch=32, nodules=0.25, superimposed=0.5)
    batch, again, other = (draw_batch(images, prior, ct, preset, seed=1, images_seen=n) for n in (64, 64, 96))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True)) and not torch.equal(batch[0], other[0])
    shown, labels = batch
    assert shown.shape == (32, 1, 32, 32) and shown.abs().max() <= 1 and labels.shape == (32, 14)
    assert (labels[8:, NODULE] == 1).all() and labels[:8, NODULE].sum() < 8  # 8 by chance, 8 labelled, 16 superimposed
    assert images.labels[:, NODULE].sum() == 8  # the caller's labels are not changed
    plain = dataclasses.replace(preset, superimposed=0.0)
    with_ct, without = (draw_batch(images, prior, some, plain, seed=0, images_seen=0)[0] for some in (ct, None))
    assert torch.equal(with_ct, without)


def test_moved_images_keep_their_range_and_flat_ones_stay_flat():
    images = torch.full((20, 1, 16, 16), 0.5)
    moved = move(images, torch.Generator().manual_seed(0))
    assert (moved.amax((1, 2, 3)) - moved.amin((1, 2, 3))).max() < 1e-6 and moved.std() > 0.01
    assert moved.min() >= 0.5 * 0.8 - 0.1 and moved.max() <= 0.5 * 1.2 + 0.1


def test_an_older_recipe_goes_on_where_it_used_nothing_that_is_gone(capsys):
    numbers = {**dataclasses.asdict(TINY), "map_weight": 0.0}
    assert current_numbers(numbers) == current_numbers(dataclasses.asdict(TINY)) == dataclasses.asdict(TINY)
    assert not capsys.readouterr().out
    assert current_numbers({**numbers, "map_weight": 1.0}) == dataclasses.asdict(TINY)
    assert "map_weight is gone" in capsys.readouterr().out
    with pytest.raises(RunError, match="preset.map_weight must be .* got 0.5"):
        current_numbers({**numbers, "map_weight": 0.5})


def test_each_aid_can_be_left_out_by_name_and_a_deleted_one_is_refused(monkeypatch, capsys):
    presets = []
    monkeypatch.setattr(command, "train_classifier", lambda preset, **options: presets.append(preset) or 1 / 0)
    words = ["train.classifier", "--preset", "tiny", "--data", "x", "--out", "y", "--set"]
    monkeypatch.setattr(sys, "argv", [*words, "nodules=0", "superimposed=0"])
    with pytest.raises(ZeroDivisionError):
        command.main()
    assert presets == [dataclasses.replace(PRESETS["tiny"], nodules=0.0, superimposed=0.0)]
    monkeypatch.setattr(sys, "argv", [*words, "map_weight=0"])
    with pytest.raises(SystemExit, match="error: set must name one of .* got 'map_weight=0'"):
        command.main()


def test_data_without_what_is_needed_is_refused_before_training(phantom_data, tmp_path):
    options = {"data": phantom_data, "ct_nodules": None, "out": tmp_path / "a"}
    with pytest.raises(RunError, match="at least 64 images, got 24"):
        train_classifier(dataclasses.replace(TINY, batch=64), **options)
    with pytest.raises(RunError, match="batch must be a multiple of the 3 processes, got 8"):
        train_classifier(TINY, nodes=3, **options)
    entries = "Data_Entry_2017_v2020.csv"
    for path in phantom_data.iterdir():
        if path.name != entries:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / entries).write_text((phantom_data / entries).read_text().replace(",Nodule,", ",Mass,"))
    with pytest.raises(RunError, match="train split must hold images with and without a nodule, got 0 of 24"):
        train_classifier(TINY, **{**options, "data": tmp_path})
    assert not (tmp_path / "a" / "recipe.json").exists()


@pytest.fixture(scope="module")
def trained(phantom_data, templates, tmp_path_factory):
    return train_classifier(TINY, data=phantom_data, ct_nodules=templates, out=tmp_path_factory.mktemp("classifier"))


@pytest.mark.train
def test_recipe_writes_a_classifier_and_a_report(trained):
    classifier = ChestClassifier.load(trained)
    assert classifier.findings == FINDINGS and classifier.size == 32
    figures = json.loads((trained.parent / "report.json").read_text())
    assert set(figures) == {"val"} and set(figures["val"]["auc"]) == {"Nodule"}
    row, game = figures["val"]["auc"]["Nodule"], figures["val"]["pointing"]
    assert row["images"] == 4 and 0 <= row["interval"][0] <= row["auc"] <= row["interval"][1] <= 1
    assert game["images"] == 2 and 0 < game["chance"] < 1 and 0 <= game["hit"] <= 1
    assert json.loads((trained.parent / "recipe.json").read_text())["precision"] in ("bf16-mixed", "32-true")


@pytest.mark.train
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(trained, phantom_data, templates, tmp_path, monkeypatch):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path}
    with pytest.raises(TrainingError, match="before the first validation"):
        train_classifier(TINY, minutes=0, **options)

    def cut(*args, images_seen, **options):
        if images_seen == 24:
            raise KeyboardInterrupt
        return draw_batch(*args, images_seen=images_seen, **options)

    monkeypatch.setattr(module, "draw_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(TINY, **options)
    monkeypatch.undo()
    train_classifier(TINY, **options)
    a, b = (torch.load(folder / "checkpoint-000000032.pt", weights_only=True) for folder in (trained.parent, tmp_path))
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())


@pytest.mark.train
def test_training_stops_when_the_val_auc_no_longer_grows(phantom_data, tmp_path):
    preset = dataclasses.replace(TINY, images=800, validate_images=8, patience=2, learning_rate=0.0)
    train_classifier(preset, data=phantom_data, ct_nodules=None, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = [line["val_auc"] for line in lines if "val_auc" in line]
    assert len(values) == values.index(max(values)) + 3 < 100  # two validations after the best


@pytest.mark.train
def test_an_update_that_is_not_finite_is_skipped_and_named(phantom_data, tmp_path, monkeypatch):
    def poison(*args, **options):
        images, labels = draw_batch(*args, **options)
        return images.fill_(torch.nan), labels

    monkeypatch.setattr(module, "draw_batch", poison)
    preset = dataclasses.replace(TINY, images=80, validate_images=80)
    with pytest.raises(TrainingError, match="not finite in 10 updates in a row, after 72 images"):
        train_classifier(preset, data=phantom_data, ct_nodules=None, out=tmp_path)
    assert (tmp_path / "events.jsonl").read_text().count("update skipped") == 10
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.train
def test_a_run_can_start_from_given_weights(trained, phantom_data, tmp_path):
    still = dataclasses.replace(TINY, images=16, validate_images=16, learning_rate=0.0, weight_decay=0.0)
    options = {"data": phantom_data, "ct_nodules": None}
    file = train_classifier(still, out=tmp_path / "a", weights=trained, **options)
    before, after = ChestClassifier.load(trained), ChestClassifier.load(file)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["weights"]
    ChestClassifier(["Mass"], size=32).save(tmp_path / "mass.safetensors")
    with pytest.raises(RunError, match="weights must be of the findings"):
        train_classifier(still, out=tmp_path / "b", weights=tmp_path / "mass.safetensors", **options)
