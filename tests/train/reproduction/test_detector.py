"""The detector's recipe on drawn chests: films, batches of each source, training, the FROC table, bad input."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny import global_states_untouched, make_mix

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.location.prior import LocationPrior
from train.classifier.encoders import Encoder, save_encoder
from train.common.run import RunError
from train.reproduction.detector.data import Draws, batches, mixed, moved, placed, read_boxed
from train.reproduction.detector.table import CHANCE, PLAIN, chance, compare, markdown, read_run
from train.reproduction.detector.training import PRESETS, build_detector, load_weights, put_of, train_detector
from train.reproduction.sources import blob_source

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def films(phantom_data):
    return read_boxed(phantom_data, "train", 256)


def test_films_labelled_nodule_without_a_box_are_left_out(films, phantom_data):
    data = ChestXray14(phantom_data, split="train", target="nodule")
    unboxed = {
        name.removesuffix(".png")
        for i, name in enumerate(data.filenames)
        if data.targets[i] and not len(data.boxes(i, "Nodule"))
    }
    assert len(unboxed) == 4 and not unboxed & set(films.names)
    assert int(films.boxed.sum()) == 4 and len(films.images) == 20
    at = films.names.index("00000007_000")
    assert films.boxes[at].tolist() == [[4 * v for v in (26, 24, 34, 32)]]


def test_moved_boxes_stay_on_their_nodules():
    stream = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(40):
        corner = torch.rand(2, generator=stream) * 200 + 20
        box = torch.cat([corner, corner + 16])[None].round()
        film = torch.zeros(1, 256, 256)
        x1, y1, x2, y2 = box[0].long().tolist()
        film[:, y1:y2, x1:x2] = 1
        image, boxes = moved(film, box, stream)
        assert image.min() >= 0 and image.max() <= 1 and boxes.min() >= 0 and boxes.max() <= 256
        if len(boxes):
            kept += 1
            bright = (image[0] > (image.max() + image.min()) / 2).nonzero().flip(1).float()
            seen = torch.cat([bright.amin(0), bright.amax(0) + 1])
            assert (seen - boxes[0]).abs().max() <= 1.5, (seen, boxes)
    assert kept > 35


def test_a_box_moved_out_of_the_film_is_dropped():
    box = torch.tensor([[250.0, 100, 256, 106], [120, 100, 140, 120]])
    counts = {len(moved(torch.zeros(1, 256, 256), box, torch.Generator().manual_seed(s))[1]) for s in range(20)}
    assert counts == {1, 2}


def blobs_at_the_priors_places():
    return placed(blob_source, LocationPrior.bundled())


def grafts():
    return mixed(make_mix(p=1.0, insertion="graft", seed=3))


def drawn(films, put, *, share, seed=3, images=24):
    draws = Draws(films, images=images, batch=8, boxed=0.25, seed=seed)
    return list(batches(draws, batch=8, share=share, put=put))


@pytest.mark.parametrize("make", [blobs_at_the_priors_places, grafts])
def test_all_sources_see_the_same_real_films_and_change_the_same_slots(films, make):
    plain, again, other = (drawn(films, s, share=p) for s, p in ((None, 0.0), (None, 0.5), (make(), 0.5)))
    changed = 0
    for (a, no), (b, more), (c, put) in zip(plain, again, other, strict=True):
        assert len(a) == 8 and [len(t["boxes"]) > 0 for t in no] == [True] * 2 + [False] * 6
        for x, y, z, s, t, u in zip(a, b, c, no, more, put, strict=True):
            differs = not torch.equal(x, y)
            changed += differs
            assert differs == (not torch.equal(x, z)) and (len(t["boxes"]) > 0) == (len(u["boxes"]) > 0)
            assert len(u["boxes"]) == len(u["labels"]) and (u["labels"] == 1).all()
            if differs:
                outside = (x - z).abs()
                for x1, y1, x2, y2 in u["boxes"].long().tolist():
                    outside[:, max(y1 - 12, 0) : y2 + 12, max(x1 - 12, 0) : x2 + 12] = 0
                assert len(s["boxes"]) == 0 and len(u["boxes"]) >= 1 and outside.max() < 0.03
    assert 4 <= changed <= 14


@pytest.mark.parametrize("make", [blobs_at_the_priors_places, grafts])
def test_slots_are_a_pure_function_of_the_seed(films, make):
    with global_states_untouched():
        a, b, other = (drawn(films, make(), share=0.5, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for (p, _), (q, _) in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert not torch.equal(a[0][0][0], other[0][0][0])
    rows = Draws(films, images=80, batch=8, boxed=0.25, seed=0).rows
    assert set(torch.bincount(rows, minlength=20).tolist()) == {3, 4, 5}  # 20 of 4 boxed films, 60 of 16 normal ones


@pytest.fixture(scope="module")
def runs(phantom_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    with global_states_untouched():
        train_detector(TINY, data=phantom_data, out=folder / "plain-0")
        start = folder / "plain-0" / "detector.safetensors"
        for name, options in {"none": {}, "blob": {"mix": 0.5, "source": "blob"}, "graft": {"mix": 1.0}}.items():
            train_detector(TINY, data=phantom_data, out=folder / name, start=start, seed=1, **options)
    return folder


def test_a_run_keeps_weights_facts_and_what_it_found(runs, phantom_data):
    run = read_run(runs / "graft", "val")
    assert run["seed"] == 1 and run["split"] == "val" and run["recipe"]["source"] == "graft"
    assert run["recipe"]["start"] == read_run(runs / "plain-0", "val")["detector"] != run["detector"]
    films = read_boxed(phantom_data, "val", 256, normal=TINY.normal)
    assert [row["film"] for row in run["films"]] == films.names and len(films.names) == 6
    assert all(len(box) == 5 for row in run["films"] for box in row["found"])
    assert [json.loads(line)["images"] for line in (runs / "graft" / "log.jsonl").read_text().splitlines()][-1] == 8


def test_the_same_seed_trains_the_same_detector_and_a_trained_one_is_kept(runs, phantom_data, tmp_path):
    start = runs / "plain-0" / "detector.safetensors"
    train_detector(TINY, data=phantom_data, out=tmp_path / "again", start=start, seed=1)
    assert read_run(tmp_path / "again", "val")["detector"] == read_run(runs / "none", "val")["detector"]
    before = (tmp_path / "again" / "detector.safetensors").stat().st_mtime_ns
    train_detector(TINY, data=phantom_data, out=tmp_path / "again", start=start, seed=1)
    assert (tmp_path / "again" / "detector.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another recipe"):
        train_detector(TINY, data=phantom_data, out=tmp_path / "again", start=start, seed=2)


def perfect(run, *, seed, mix, shift=0.0):
    films = [{**f, "found": [[*(v + shift for v in box), 0.9] for box in f["nodules"]]} for f in run["films"]]
    return {**run, "seed": seed, "films": films, "recipe": {**run["recipe"], "mix": mix, "source": "blob"}}


def test_the_table_of_detectors_that_find_all_and_none(runs):
    run = read_run(runs / "none", "val")
    of = [perfect(run, seed=s, mix=m, shift=100.0 * (not m)) for s in (0, 1) for m in (0.0, 0.25)]
    figures = compare(of, draws=50)
    assert figures["nodules"] == figures["boxed"] == 2 and figures["films"] == 6
    plain, blobs = figures["arms"][PLAIN], figures["arms"]["drawn blobs, 0.25 of normal films"]
    assert plain["seeds"] == {"0": [0, 0, 0], "1": [0, 0, 0]} and blobs["seeds"]["1"] == [1, 1, 1]
    assert blobs["gain"] == blobs["sensitivity"] == [{"value": 1.0, "low": 1.0, "high": 1.0}] * 3
    assert blobs["gain_seeds"] == [0, 1] and "gain" not in plain
    text = markdown(figures)
    assert "| drawn blobs, 0.25 of normal films | 2 | 1.00 [1.00, 1.00]" in text and f"| {CHANCE} |" in text
    few, many = chance(run, (0.25, 4.0))
    assert 0 <= few < many < 1


def test_runs_that_cannot_be_compared_are_named(runs):
    plain = read_run(runs / "none", "val")
    with pytest.raises(RunError, match="same start"):
        compare([plain, read_run(runs / "plain-0", "val")])
    with pytest.raises(RunError, match="seed 1 twice"):
        compare([plain, plain])
    with pytest.raises(RunError, match="same films"):
        compare([plain, {**plain, "films": plain["films"][1:]}])
    with pytest.raises(RunError, match="at least one"):
        compare([])
    with pytest.raises(RunError, match="not judged on test"):
        read_run(runs / "none", "test")


def test_a_backbone_is_an_encoder_of_findings(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder("findings", size=32)
    save_encoder(encoder, tmp_path / "findings.safetensors")
    detector = build_detector(TINY, seed=0, backbone=tmp_path / "findings.safetensors")
    assert torch.equal(detector.backbone.body.conv1.weight, encoder.trunk.conv1.weight)
    assert torch.equal(detector.backbone.body.layer3[1].conv2.weight, encoder.trunk.layer3[1].conv2.weight)
    save_encoder(Encoder("contrast", size=32), tmp_path / "contrast.safetensors")
    with pytest.raises(RunError, match="kind 'findings', got 'contrast'"):
        build_detector(TINY, seed=0, backbone=tmp_path / "contrast.safetensors")


def test_weights_of_another_preset_or_damaged_ones_are_refused(runs, tmp_path):
    detector = build_detector(dataclasses.replace(TINY, channels=8), seed=0)
    with pytest.raises(RunError, match="same preset"):
        load_weights(detector, runs / "none" / "detector.safetensors")
    copy = tmp_path / "cut.safetensors"
    shutil.copy(runs / "none" / "detector.safetensors", copy)
    data = bytearray(copy.read_bytes())
    data[-5] ^= 1
    copy.write_bytes(data)
    with pytest.raises(RunError, match="whole file that train.reproduction.detector.training wrote"):
        load_weights(build_detector(TINY, seed=0), copy)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mix": 1.5}, "mix must be from 0 to 1, got 1.5"),
        ({"mix": 0.5, "source": "ct"}, "needs ct_nodules"),
        ({"mix": 0.5, "source": "gan"}, "source must be one of"),
        ({"start": "a", "backbone": "b"}, "a start or a backbone, not both"),
    ],
)
def test_bad_options_are_named_before_training(options, message, phantom_data, tmp_path):
    with pytest.raises(RunError, match=message):
        train_detector(TINY, data=phantom_data, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_ct_nodules_are_a_source(templates):
    films = torch.full((2, 1, 256, 256), 0.25)
    put = put_of("ct", weights=None, ct_nodules=templates, seed=0)
    shown, targets = put(films, torch.Generator().manual_seed(0))
    for film, after, target in zip(films, shown, targets, strict=True):
        changed = (after - film)[0].nonzero().flip(1)
        (x1, y1, x2, y2) = target["boxes"][0].tolist()
        assert (after - film).max() > 0.01 and target["labels"].tolist() == [1]
        assert changed.amin(0).ge(torch.tensor([x1, y1]).floor()).all()
        assert changed.amax(0).le(torch.tensor([x2, y2])).all()
