"""The detector's recipe on drawn chests: images, batches of each source, training, the FROC table, bad input."""

import dataclasses
import json

import pytest
import torch
from tiny import generator, global_states_untouched

from carim_aug import LocationPrior, SyntheticNoduleMix
from carim_aug.data.chestxray14 import ChestXray14
from train.classifier.encoders import Encoder, load_encoder, save_encoder
from train.common.run import RunError
from train.reproduction.detector.data import draw_batches, make_mix, move, plan_rows, read_boxed
from train.reproduction.detector.table import CHANCE, PLAIN, chance, compare, markdown, read_run
from train.reproduction.detector.training import PRESETS, build_detector, load_detector, train_detector

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def images(phantom_data):
    return read_boxed(phantom_data, "train")


# --- What is shown ---
def test_images_labelled_nodule_without_a_box_are_left_out(images, phantom_data):
    data = ChestXray14(phantom_data, split="train", target="nodule")
    unboxed = {data.filenames[i] for i in range(len(data)) if data.targets[i] and not len(data.boxes(i, "Nodule"))}
    assert len(unboxed) == 4 and not unboxed & set(images.names)
    assert len(images.boxed) == 4 and len(images) == 20
    at = images.names.index("00000007_000.png")
    assert (images.boxes[at] * 64).tolist() == [[26, 24, 34, 32]]


def test_moved_boxes_stay_on_their_nodules():
    stream, left = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        corner = torch.rand(2, generator=stream) * 200 + 20
        box = torch.cat([corner, corner + 16])[None].round()
        x1, y1, x2, y2 = box[0].long().tolist()
        image = torch.zeros(1, 256, 256)
        image[:, y1:y2, x1:x2] = 1
        moved, boxes = move(image, box, stream)
        assert moved.min() >= 0 and moved.max() <= 1 and boxes.min() >= 0 and boxes.max() <= 256
        if len(boxes):
            left += 1
            bright = (moved[0] > (moved.max() + moved.min()) / 2).nonzero().flip(1).float()
            seen = torch.cat([bright.amin(0), bright.amax(0) + 1])
            assert (seen - boxes[0]).abs().max() <= 1.5, (seen, boxes)
    assert left > 16
    # At the border a box may be moved out of the image.
    boxes = torch.tensor([[250.0, 100, 256, 106], [120, 100, 140, 120]])
    assert {len(move(image, boxes, torch.Generator().manual_seed(s))[1]) for s in range(20)} == {1, 2}


@pytest.fixture(scope="module")
def mixes(templates):
    return {
        "graft": SyntheticNoduleMix(generator(), LocationPrior.bundled(), p=1.0, seed=3),
        "ct": make_mix("ct", ct_nodules=templates, seed=3),
        "drawn-blob": make_mix("drawn-blob", seed=3),
    }


def show(images, mix, *, share, seed=3):
    return list(draw_batches(images, mix, share=share, count=24, batch=8, boxed=0.25, seed=seed))


@pytest.mark.train
@pytest.mark.parametrize("source", ["graft", "ct", "drawn-blob"])
def test_all_sources_see_the_same_real_images_and_change_the_same_places(source, images, mixes):
    with global_states_untouched():
        plain, again, other = (show(images, m, share=p) for m, p in ((None, 0.0), (None, 0.5), (mixes[source], 0.5)))
    changed = 0
    for (a, none), (b, more), (c, put) in zip(plain, again, other, strict=True):
        assert len(a) == 8 and [len(t["boxes"]) > 0 for t in none] == [True] * 2 + [False] * 6
        for x, y, z, s, t, u in zip(a, b, c, none, more, put, strict=True):
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


@pytest.mark.train
def test_batches_are_a_pure_function_of_the_seed(images, mixes):
    a, b, other = (show(images, mixes["graft"], share=0.5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for (p, _), (q, _) in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert not torch.equal(a[0][0][0], other[0][0][0])
    rows, _ = plan_rows(images, count=80, batch=8, boxed=0.25, seed=0)
    assert set(torch.bincount(rows, minlength=20).tolist()) == {3, 4, 5}  # 20 of 4 boxed images, 60 of 16 normal ones


# --- Runs ---
@pytest.fixture(scope="module")
def runs(phantom_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    with global_states_untouched():
        train_detector(TINY, data=phantom_data, out=folder / "plain-0")
        start = folder / "plain-0" / "detector.safetensors"
        for name, options in {"none": {}, "blob": {"mix": 0.5, "source": "drawn-blob"}, "graft": {"mix": 1.0}}.items():
            train_detector(TINY, data=phantom_data, out=folder / name, start=start, seed=1, **options)
    return folder


@pytest.mark.train
def test_a_run_holds_weights_facts_and_what_it_found(runs, phantom_data):
    run = read_run(runs / "graft", "val")
    assert run["seed"] == 1 and run["split"] == "val" and run["recipe"]["source"] == "graft"
    assert run["recipe"]["start"] == read_run(runs / "plain-0", "val")["detector"] != run["detector"]
    images = read_boxed(phantom_data, "val", normal=TINY.normal)
    assert [row["name"] for row in run["images"]] == images.names and len(images) == 6
    assert all(len(box) == 5 for row in run["images"] for box in row["found"])
    lines = [json.loads(line) for line in (runs / "graft" / "log.jsonl").read_text().splitlines()]
    assert {"loss_classifier", "loss_objectness", "images_per_s"} <= lines[0].keys()


@pytest.mark.train
def test_the_same_seed_trains_the_same_detector_and_a_trained_one_stays(runs, phantom_data, tmp_path):
    start = runs / "plain-0" / "detector.safetensors"
    options = {"data": phantom_data, "out": tmp_path / "again", "start": start}
    train_detector(TINY, seed=1, **options)
    assert read_run(tmp_path / "again", "val")["detector"] == read_run(runs / "none", "val")["detector"]
    before = (tmp_path / "again" / "detector.safetensors").stat().st_mtime_ns
    train_detector(TINY, seed=1, **options)
    assert (tmp_path / "again" / "detector.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another recipe"):
        train_detector(TINY, seed=2, **options)


@pytest.mark.train
def test_a_backbone_is_an_encoder_of_findings(tmp_path):
    for kind in ("findings", "contrast"):
        save_encoder(Encoder(kind, size=32), tmp_path / f"{kind}.safetensors")
    trunk = load_encoder(tmp_path / "findings.safetensors").trunk
    body = build_detector(TINY, backbone=tmp_path / "findings.safetensors").backbone.body
    assert torch.equal(body.conv1.weight, trunk.conv1.weight)
    assert torch.equal(body.layer3[1].conv2.weight, trunk.layer3[1].conv2.weight)
    for name, match in {"contrast": "kind 'findings', got 'contrast'", "none": "backbone must be a file"}.items():
        with pytest.raises(RunError, match=match):
            build_detector(TINY, backbone=tmp_path / f"{name}.safetensors")


@pytest.mark.train
def test_weights_of_another_preset_or_damaged_ones_are_refused(runs, tmp_path):
    detector = build_detector(dataclasses.replace(TINY, channels=8))
    whole, damaged = runs / "none" / "detector.safetensors", tmp_path / "damaged.safetensors"
    data = bytearray(whole.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    for path, match in (
        (whole, "same preset"),
        (damaged, "must be a whole file"),
        (tmp_path / "none", "must be a file"),
    ):
        with pytest.raises(RunError, match=match):
            load_detector(detector, path)


def test_bad_options_are_named_before_training(phantom_data, tmp_path):
    for options, message in (
        ({"mix": 1.5}, "mix must be from 0 to 1, got 1.5"),
        ({"mix": 0.5, "source": "ct"}, "ct_nodules must be given for source 'ct'"),
        ({"mix": 0.5, "source": "gan"}, "source must be one of .* got 'gan'"),
        ({"start": "a", "backbone": "b"}, "start and backbone must not be given both"),
    ):
        with pytest.raises(RunError, match=message):
            train_detector(TINY, data=phantom_data, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "recipe.json").exists()


# --- The table ---
def saved_run(**changes) -> dict:
    """What a run leaves: two boxed and four normal images, nothing found."""
    images = [{"name": f"{i}.png", "patient": i, "nodules": [], "found": []} for i in range(6)]
    for image in images[:2]:
        image["nodules"] = [[60.0, 80.0, 76.0, 96.0]]
    recipe = {"preset": {"images": 8}, "start": "0" * 64, "mix": 0.0, "source": None}
    return {"split": "val", "seed": 0, "recipe": recipe, "images": images, **changes}


def perfect_run(*, seed: int, mix: float, shift: float = 0.0) -> dict:
    run = saved_run(seed=seed)
    for image in run["images"]:
        image["found"] = [[*(v + shift for v in box), 0.9] for box in image["nodules"]]
    return {**run, "recipe": {**run["recipe"], "mix": mix, "source": "drawn-blob"}}


def test_the_table_of_detectors_that_find_all_and_none():
    runs = [perfect_run(seed=s, mix=m, shift=100.0 * (not m)) for s in (0, 1) for m in (0.0, 0.25)]
    figures = compare(runs, draws=50)
    assert figures["nodules"] == figures["boxed"] == 2 and figures["images"] == 6
    plain, blobs = figures["arms"][PLAIN], figures["arms"]["drawn blobs, 0.25 of normal images"]
    assert plain["seeds"] == {"0": [0, 0, 0], "1": [0, 0, 0]} and blobs["seeds"]["1"] == [1, 1, 1]
    assert blobs["gain"] == blobs["sensitivity"] == [{"value": 1.0, "low": 1.0, "high": 1.0}] * 3
    assert blobs["gain_seeds"] == [0, 1] and "gain" not in plain
    text = markdown(figures)
    assert "| drawn blobs, 0.25 of normal images | 2 | 1.00 [1.00, 1.00]" in text and f"| {CHANCE} |" in text
    few, many = chance(runs[0], (0.25, 4.0))
    assert 0 <= few < many < 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "at least one, got none"),
        ([saved_run(), saved_run()], "seed 0 twice"),
        ([saved_run(), saved_run(split="test")], "same split"),
        ([saved_run(), saved_run(images=[])], "same images"),
        ([saved_run(), saved_run(recipe={"preset": {}, "start": "0" * 64, "mix": 0.0})], "same preset"),
        ([saved_run(), saved_run(recipe={**saved_run()["recipe"], "start": "1" * 64})], "same start"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(runs, message):
    with pytest.raises(RunError, match=message):
        compare(runs)


def test_runs_that_are_not_there_or_older_are_named(tmp_path):
    with pytest.raises(RunError, match="not scored on test"):
        read_run(tmp_path, "test")
    (tmp_path / "found-test.json").write_text('{"films": []}')
    with pytest.raises(RunError, match="must be of this version"):
        read_run(tmp_path, "test")
