"""The classifier's recipe on drawn chests: batches, losses, resume, report, bad input."""

import dataclasses
import json

import pytest
import torch

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.training import NODULE, PRESETS, draw_films, map_loss, read_labelled, train_classifier, train_step
from train.common.run import RunError, TrainingError
from train.gan.presets import changed
from train.metrics.pointing import pointing_chance, pointing_hit

TINY = dataclasses.replace(PRESETS["tiny"], images=32, batch=8, validate_images=16)


def test_batches_are_keyed_and_their_masks_are_of_the_nodules(phantom_data, templates):
    films, prior, ct = read_labelled(phantom_data, "train", 32), LocationPrior.bundled(), CTNodules(templates)
    preset = dataclasses.replace(TINY, batch=32, nodules=0.25, superimposed=0.5)
    a = draw_films(films, prior, ct, preset, seed=1, images_seen=64)
    b = draw_films(films, prior, ct, preset, seed=1, images_seen=64)
    other = draw_films(films, prior, ct, preset, seed=1, images_seen=96)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], other[0])
    images, labels, masks, known = a
    assert images.shape == masks.shape == (32, 1, 32, 32) and images.abs().max() <= 1
    shown = masks.flatten(1).amax(dim=1) > 0
    assert shown[-16:].sum() >= 14 and known[-16:].all() and (labels[-16:, NODULE] == 1).all()  # superimposed
    assert not shown[labels[:, NODULE] == 0].any()
    assert films.labels[:, NODULE].sum() == 8  # the caller's labels are not changed


def test_map_loss_by_hand():
    maps = torch.zeros(1, 1, 2, 2)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0, 3] = 1
    known = torch.tensor([True])
    bias = torch.tensor(0.0)
    assert map_loss(maps, bias, masks, known).item() == pytest.approx(0.6931, abs=1e-3)
    right = torch.tensor([[[[-5.0, 5.0], [-5.0, -5.0]]]])
    assert map_loss(right, bias, masks, known) < 1e-3 < 1 < map_loss(-right, bias, masks, known)
    assert map_loss(-right, bias, masks, ~known) == 0


def test_pointing_game_by_hand():
    maps = torch.zeros(3, 1, 8, 8)
    maps[0, 0, 2, 5] = maps[1, 0, 2, 5] = maps[2, 0, 2, 5] = 1
    boxes = [torch.tensor([[4.0, 2, 6, 4]]), torch.tensor([[0.0, 0, 2, 2], [5, 1, 7, 3]]), torch.empty(0, 4)]
    assert pointing_hit(maps, boxes).tolist() == [True, True, False]
    field = torch.zeros(8, 8, dtype=torch.bool)
    field[:, 4:] = True
    assert pointing_chance(boxes, field).tolist() == [4 / 32, 4 / 32, 0]


@pytest.fixture(scope="module")
def run(phantom_data, templates, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    return train_classifier(TINY, data=phantom_data, ct_nodules=templates, out=out)


def test_recipe_writes_a_classifier_and_a_report(run):
    classifier = ChestClassifier.load(run)
    assert classifier.findings == FINDINGS and classifier.size == 32
    figures = json.loads((run.parent / "report.json").read_text())
    assert set(figures) == {"val"} and set(figures["val"]["auc"]) == {"Nodule"}
    row, game = figures["val"]["auc"]["Nodule"], figures["val"]["pointing"]
    assert row["films"] == 4 and 0 <= row["interval"][0] <= row["auc"] <= row["interval"][1] <= 1
    assert game["films"] == 2 and 0 < game["chance"] < 1 and 0 <= game["hit"] <= 1


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, phantom_data, templates, tmp_path, monkeypatch):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path}
    with pytest.raises(TrainingError, match="before the first validation"):
        train_classifier(TINY, minutes=0, **options)
    steps = []

    def killed(*args):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return train_step(*args)

    monkeypatch.setattr("train.classifier.training.train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(TINY, **options)
    monkeypatch.undo()
    train_classifier(TINY, **options)
    a, b = (torch.load(folder / "checkpoint-000000032.pt", weights_only=True) for folder in (run.parent, tmp_path))
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())


def test_training_stops_when_the_val_auc_no_longer_grows(phantom_data, tmp_path):
    preset = dataclasses.replace(TINY, images=800, validate_images=8, patience=2, learning_rate=0.0)
    train_classifier(preset, data=phantom_data, ct_nodules=None, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    best = max(range(len(lines)), key=lambda i: lines[i]["val_auc"])
    assert len(lines) == best + 3 < 100  # two validations after the best


def test_an_update_that_is_not_finite_is_skipped_and_named(phantom_data, tmp_path, monkeypatch):
    def poisoned(fabric, mapped, optimizer, batch, preset):
        batch[0].fill_(torch.nan)
        return train_step(fabric, mapped, optimizer, batch, preset)

    monkeypatch.setattr("train.classifier.training.train_step", poisoned)
    preset = dataclasses.replace(TINY, images=80, validate_images=80)
    with pytest.raises(TrainingError, match="losses not finite in 10 updates in a row, after 72 images"):
        train_classifier(preset, data=phantom_data, ct_nodules=None, out=tmp_path)
    assert (tmp_path / "events.jsonl").read_text().count("update skipped") == 10
    assert not list(tmp_path.glob("checkpoint-*"))


def test_each_aid_can_be_left_out_by_name(phantom_data, templates, tmp_path):
    preset = changed(TINY, ["nodules=0", "superimposed=0", "map_weight=0"])
    assert preset == dataclasses.replace(PRESETS["plain"], size=32, images=32, batch=8, validate_images=16)
    film = read_labelled(phantom_data, "train", 32)
    _, labels, masks, _ = draw_films(film, LocationPrior.bundled(), CTNodules(templates), preset, seed=0, images_seen=0)
    assert len(labels) == 8 and masks.flatten(1).any(dim=1).sum() <= labels[:, NODULE].sum()


def test_data_without_what_is_needed_is_refused_before_training(phantom_data, tmp_path):
    with pytest.raises(RunError, match="at least 64 films, some normal, got 24, 16 normal"):
        train_classifier(dataclasses.replace(TINY, batch=64), data=phantom_data, ct_nodules=None, out=tmp_path / "a")
    with pytest.raises(RunError, match="the test split holds no film"):
        read_labelled(phantom_data, "test", 32)
    entries = "Data_Entry_2017_v2020.csv"
    for path in phantom_data.iterdir():
        if path.name != entries:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / entries).write_text((phantom_data / entries).read_text().replace(",Nodule,", ",Mass,"))
    with pytest.raises(RunError, match="the train split needs films with and without a nodule"):
        train_classifier(TINY, data=tmp_path, ct_nodules=None, out=tmp_path / "a")
    assert not (tmp_path / "a" / "recipe.json").exists()


def test_a_run_can_start_from_the_pretasks_weights(run, phantom_data, tmp_path):
    weights = run
    still = dataclasses.replace(TINY, images=16, validate_images=16, learning_rate=0.0, weight_decay=0.0)
    file = train_classifier(still, data=phantom_data, ct_nodules=None, out=tmp_path / "a", weights=weights)
    begun, trained = ChestClassifier.load(weights), ChestClassifier.load(file)
    assert all(torch.equal(p, q) for p, q in zip(begun.parameters(), trained.parameters(), strict=True))
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["weights"]
    ChestClassifier(["Mass"], size=32).save(tmp_path / "mass.safetensors")
    with pytest.raises(RunError, match="weights must be of the findings"):
        train_classifier(
            still, data=phantom_data, ct_nodules=None, out=tmp_path / "b", weights=tmp_path / "mass.safetensors"
        )
