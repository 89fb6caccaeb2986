"""Both stages on drawn chests: that they train, resume, start from weights, and refuse what does not fit."""

import dataclasses
import json

import pytest
import torch

from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.whole import WholeImageGenerator
from train.classifier.densenet import ChestClassifier, ClassifierError
from train.common.run import Run, RunError
from train.gan import __main__ as command
from train.gan.losses import CARIMRegularizer
from train.gan.step import train_step
from train.gan.training import train_gan


@pytest.fixture
def options(phantom_data, templates, tmp_path):
    return {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.train
def test_stage_1_exports_weights_that_say_where_they_are_from(stage1):
    provenance = NoduleGenerator.from_pretrained(stage1 / "export").provenance
    recipe = provenance["recipe"]
    assert (recipe["images_seen"], recipe["stage"]) == (48, 1) and recipe["precision"] in ("bf16-mixed", "32-true")
    assert "16 normal images, 8 with a nodule (4 boxed); CT nodules" in provenance["training_data"]
    assert lines(stage1)[0]["images"] == 8 and len(list(stage1.glob("checkpoint-*.pt"))) == 2


CROPS, DIFFERENCES = {"d_crop", "g_crop"}, {"d_difference", "g_difference", "g_contrast"}
ALL = {"d32", "g32", "g_outside", "g_level", "contrast"} | CROPS | DIFFERENCES


@pytest.mark.train
@pytest.mark.parametrize(
    ("numbers", "ct", "there", "not_there"),
    [
        ({}, True, ALL, {"g_carim"}),
        ({"discriminator_norm": True, "augment": False}, True, {"d32", "g32"}, set()),
        ({"crop_weight": 0.0, "difference_weight": 0.0}, True, {"g_outside"}, CROPS | DIFFERENCES),
        ({}, False, CROPS, DIFFERENCES),  # boxes alone
    ],
)
def test_every_switch_trains_one_step(tiny, options, numbers, ct, there, not_there):
    preset = dataclasses.replace(tiny, images=8, grow_at=(), **numbers)
    folder = train_gan(preset, **{**options, "ct_nodules": options["ct_nodules"] if ct else None})
    (line,) = lines(folder.parent)
    assert there <= line.keys() and not not_there & line.keys() and line["skipped"] == 0
    assert NoduleGenerator.from_pretrained(folder).provenance["recipe"]["preset"] == preset.numbers()


# --- Bad input: named before training starts ---
ENTRIES, SPLITS, BOXES = "Data_Entry_2017_v2020.csv", "split.csv", "BBox_List_2017.csv"


@pytest.mark.parametrize(
    ("table", "edit", "numbers", "match"),
    [
        (ENTRIES, lambda t: t.replace(",Nodule,", ",No Finding,"), {}, "split must .* got 24 normal and 0 nodule"),
        (ENTRIES, lambda t: t.replace(",No Finding,", ",Nodule,"), {}, "got 0 normal and 24 nodule"),
        (SPLITS, lambda t: t.replace(",train", ",test"), {}, "the train split holds no image"),
        (BOXES, lambda t: t.splitlines()[0] + "\n", {}, "has no nodule box and there are no CT nodules"),
        (BOXES, str, {"batch": 32}, "must hold a batch of 32 images, got 24"),
        (BOXES, str, {"architecture": "large"}, "preset.architecture must be one of .* got 'large'"),
        (BOXES, str, {"batch": 7}, "preset.batch must be a multiple of 2 for 1 processes, got 7"),
        (BOXES, str, {"grow_at": (8, 16)}, r"must have fewer entries than branches \(2\), got \(8, 16\)"),
    ],
)
def test_data_and_presets_that_do_not_fit_are_refused(tiny, copy_data, tmp_path, table, edit, numbers, match):
    data = copy_data(tmp_path / "data")
    (data / table).write_text(edit((data / table).read_text()))
    with pytest.raises(RunError, match=match):
        train_gan(dataclasses.replace(tiny, **numbers), data=data, ct_nodules=None, out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.train
def test_a_folder_or_a_checkpoint_of_another_preset_is_refused(tiny, options):
    small = dataclasses.replace(tiny, images=8, grow_at=())
    train_gan(small, **options)
    wide, path = dataclasses.replace(small, discriminator_width=16), options["out"] / "recipe.json"
    with pytest.raises(RunError, match=r"holds another recipe \(differs in \['preset.discriminator_width'\]\)"):
        train_gan(wide, **options)
    recipe = json.loads(path.read_text())
    recipe["preset"]["discriminator_width"] = 16  # a checkpoint put into another run's folder
    path.write_text(json.dumps(recipe))
    with pytest.raises(RunError, match="the checkpoint is of other networks than the preset's"):
        train_gan(wide, **options)


def test_the_command_line_names_what_is_wrong(phantom_data, tmp_path, monkeypatch):
    for arguments, match in (
        (["--preset", "fast", "--data", phantom_data], "error: preset must be one of .* got 'fast'"),
        (["--preset", "tiny", "--data", tmp_path], "error: .*no Data_Entry_2017"),
        (["--preset", "tiny", "--data", phantom_data, "--weights", tmp_path], "error: .*has no model.safetensors"),
    ):
        monkeypatch.setattr("sys.argv", ["gan", *map(str, arguments), "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit, match=match):
            command.main()


# --- Fine-tuning ---
@pytest.mark.train
def test_given_weights_stay_while_the_discriminators_warm_up(tiny, stage1, options):
    given = NoduleGenerator.from_pretrained(stage1 / "export")

    def tune(images):
        preset = dataclasses.replace(tiny, images=images, warm_up=8)
        tuned = NoduleGenerator.from_pretrained(train_gan(preset, weights=stage1 / "export", **options))
        pairs = zip(tuned.network.parameters(), given.network.parameters(), strict=True)
        return tuned.provenance["recipe"]["weights"], [(a - b).abs().max().item() for a, b in pairs]

    assert set(tune(8)[1]) == {0.0}
    weights, distances = tune(16)
    assert 0 < min(distances) <= max(distances) < 1e-4  # one step of 2e-4, of which the average takes part
    assert weights == given.weights_hash and lines(options["out"])[0]["scales"] == 2  # all branches from the start


def test_weights_and_classifiers_that_do_not_fit_are_refused(tiny, options, tmp_path):
    network = MultiScaleGenerator(dataclasses.replace(ARCHITECTURES["tiny"], noise_dim=8))
    WholeImageGenerator(network).save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match="weights must be of the preset's architecture"):
        train_gan(tiny, weights=tmp_path / "other", **options)
    with pytest.raises(RunError, match="give one of them"):
        train_gan(tiny, weights=tmp_path, start=tmp_path, classifier=tmp_path, **options)
    with pytest.raises(ValueError, match="classifier must be in eval mode"):
        CARIMRegularizer(ChestClassifier(["Nodule"], size=32), 1.0, "relu")
    assert not options["out"].exists()


# --- Stage 2 ---
@pytest.mark.train
def test_stage_2_starts_from_stage_1_and_leaves_the_classifier_alone(
    tiny, stage1, options, classifier_file, monkeypatch
):
    seen, ratios = [], []

    def watched(state, batch, preset, *, regularizer, **options):
        losses, finite = train_step(state, batch, preset, regularizer=regularizer, **options)
        if regularizer is not None:
            seen.append({k: v.clone() for k, v in regularizer.classifier.state_dict().items()})
            ratios.append(losses.get("carim_ratio"))
        assert ("g_carim" in losses) == (regularizer is not None)
        return losses, finite

    monkeypatch.setattr("train.gan.training.train_step", watched)
    preset = dataclasses.replace(tiny, images=80, carim_weight=1.0, carim_every=2, log_images=16)
    folder = train_gan(preset, start=stage1, classifier=classifier_file, **options)
    assert len(seen) == 2 and ratios[0] > 0  # of 4 steps each second
    before = ChestClassifier.load(classifier_file).state_dict()
    assert all(torch.equal(v, before[k]) for state in seen for k, v in state.items())
    recipe, line = NoduleGenerator.from_pretrained(folder).provenance["recipe"], lines(options["out"])[0]
    assert (recipe["stage"], recipe["stage_2_from"], recipe["images_seen"]) == (2, 48, 80)
    assert 0 <= line["dead"] <= 1 and line["carim_ratio"] > 0


@pytest.mark.train
def test_stage_2_refuses_what_does_not_fit(tiny, options, classifier_file, tmp_path):
    Run(tmp_path / "other", {"preset": {**tiny.numbers(), "architecture": "fast128"}})
    Run(tmp_path / "empty", {"preset": tiny.numbers()})
    mass, none = tmp_path / "mass.safetensors", tmp_path / "none.safetensors"
    ChestClassifier(["Mass"], size=32).save(mass)
    for kind, match, start, classifier in (
        (RunError, "start and classifier make stage 2 together", tmp_path, None),
        (RunError, "has no recipe.json", tmp_path, classifier_file),
        (RunError, "same networks, got {'architecture': 'fast128'}", tmp_path / "other", classifier_file),
        (RunError, "start must hold a checkpoint", tmp_path / "empty", classifier_file),
        (ValueError, "finding must be one of the classifier's", tmp_path / "empty", mass),
        (ClassifierError, "no such file", tmp_path / "empty", none),
    ):
        with pytest.raises(kind, match=match):
            train_gan(tiny, start=start, classifier=classifier, **options)
    assert not options["out"].exists()
