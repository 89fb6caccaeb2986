"""Stage 1 on a drawn phantom in ChestX-ray14's layout: that the recipe runs, resumes and exports."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier, ClassifierError
from train.common.run import Run, RunError
from train.gan.batch import (
    DIFFERENCE_GAIN,
    at_least,
    crop_at,
    difference_maps,
    draw_batch,
    mean_inside,
    read_films,
)
from train.gan.influence import Influence
from train.gan.networks import Networks, retake_statistics
from train.gan.presets import PRESETS, changed
from train.gan.start import named_preset
from train.gan.step import train_step
from train.gan.training import drawn, main, train_gan

TINY = dataclasses.replace(PRESETS["tiny"], images=48, batch=8, grow_at=(16,), snapshot_images=16)


def test_films_are_split_by_class_and_know_their_boxes(phantom_data):
    films = read_films(phantom_data, 32)
    assert films.normal.shape == (16, 1, 32, 32) and films.nodule.shape == (8, 1, 32, 32)
    assert len(films.boxed) == 4
    place, boxes = films.boxed[0]
    assert place == 0 and boxes.tolist() == [[10, 12, 14, 16]]


def test_batches_are_a_pure_function_of_the_images_seen(phantom_data, templates):
    from carim_aug.data.ct_nodules import CTNodules
    from carim_aug.location.prior import LocationPrior

    films, prior, ct = read_films(phantom_data, 32), LocationPrior.bundled(), CTNodules(templates)
    state = torch.get_rng_state()
    one = draw_batch(films, prior, ct, TINY, seed=1, images_seen=16)
    again = draw_batch(films, prior, ct, TINY, seed=1, images_seen=16)
    other = draw_batch(films, prior, ct, TINY, seed=1, images_seen=24)
    assert all(torch.equal(getattr(one, f.name), getattr(again, f.name)) for f in dataclasses.fields(one))
    assert not torch.equal(one.images, other.images) and not torch.equal(one.noise, other.noise)
    assert torch.equal(state, torch.get_rng_state())
    assert one.classes.tolist() == [1] * 4 + [0] * 4
    assert one.differences[:, 0].min() >= 0 and one.differences[:, 0].amax(dim=(1, 2)).min() > 0


def test_crops_stay_inside_and_hold_the_box():
    maps = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    crop = crop_at(maps, torch.tensor([[30.0, 0.0, 32.0, 2.0]]), 8, torch.zeros(1, 2))
    assert crop.shape == (1, 1, 8, 8) and crop[0, 0, 0, 7] == 31


def test_maps_of_a_difference_hold_its_strength_its_shape_and_the_mask():
    difference, mask = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    difference[0, 0, 1, 1], difference[0, 0, 1, 2], difference[1, 0, 0, 0] = 0.2, 0.1, 0.002
    maps = difference_maps(difference, mask)
    assert torch.equal(maps[:, 2:], mask) and torch.equal(maps[:, :1], difference * DIFFERENCE_GAIN)
    assert maps[0, 1].max() == 1 and maps[0, 1, 1, 2] == 0.5
    assert float(maps[1, 1].max()) == pytest.approx(0.2)  # what is hardly there is not blown up
    assert mean_inside(difference, mask).tolist() == pytest.approx([0.3 / 16, 0.002 / 16])


def test_small_boxes_grow_about_their_centre_and_stay_inside():
    grown = at_least(torch.tensor([[10.0, 10.0, 11.0, 14.0], [31.5, 0.0, 32.0, 0.5]]), 2, 32)
    assert grown.tolist() == [[9.5, 10.0, 11.5, 14.0], [30.0, 0.0, 32.0, 2.0]]


def test_average_copies_buffers_and_averages_parameters():
    networks = Networks(TINY)
    with torch.no_grad():
        networks.generator(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1, 32, 32))
        for p in networks.generator.parameters():
            p.add_(1.0)
    before = [p.clone() for p in networks.average.module.parameters()]
    networks.update_average()
    networks.update_average()
    for now, old, goal in zip(
        networks.average.module.parameters(), before, networks.generator.parameters(), strict=True
    ):
        assert ((now - old) * (goal - old) >= 0).all() and (now - goal).abs().max() < 1
    for mean, now in zip(networks.average.module.buffers(), networks.generator.buffers(), strict=True):
        assert torch.equal(mean, now)


def test_stage_1_trains_exports_and_resumes_bit_equal(phantom_data, templates, tmp_path):
    whole = train_gan(TINY, data=phantom_data, ct_nodules=templates, out=tmp_path / "whole")
    cut = dataclasses.replace(TINY, images=24)
    train_gan(cut, data=phantom_data, ct_nodules=templates, out=tmp_path / "cut")
    resumed = train_gan(TINY, data=phantom_data, ct_nodules=templates, out=tmp_path / "cut")
    first, second = NoduleGenerator.from_pretrained(whole), NoduleGenerator.from_pretrained(resumed)
    assert first.weights_hash == second.weights_hash
    recipe = first.provenance["recipe"]
    assert (json.loads(recipe) if isinstance(recipe, str) else recipe)["images_seen"] == 48
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["images"] == 8
    assert len(Run(tmp_path / "whole", json.loads((tmp_path / "whole" / "recipe.json").read_text())).checkpoints()) == 2


def test_statistics_taken_anew_are_those_of_the_generator_at_hand():
    torch.manual_seed(0)
    generator = MultiScaleGenerator(ARCHITECTURES["tiny"])
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    retake_statistics(generator, LocationPrior.bundled(), dataclasses.replace(TINY, statistics_batches=40), seed=0)
    after = generator.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not generator.training and all(m.momentum == 0.1 for m in generator.modules() if hasattr(m, "momentum"))
    # The stem's norm sees z W: |w|^2 is its variance for standard normal noise, times 6 / 7 in a batch of 4 pairs.
    expected = generator.stem.linear.weight.detach().square().sum(dim=1)
    assert (after["stem.norm.running_var"] / expected).mean() == pytest.approx(6 / 7, abs=0.03)


# --- Switches: one step each ---
def _lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("numbers", "there", "not_there"),
    [
        ({}, {"d32", "d_crop", "d_difference", "g_outside", "g_level", "contrast"}, {"r1_32"}),
        ({"r1_weight": 1.0}, {"r1_16", "r1_32"}, set()),
        ({"relativistic": True}, {"d32", "g32"}, set()),
        ({"normal_first": 8}, {"d32", "g32", "g_level"}, {"contrast", "d_crop", "g_outside"}),
        ({"discriminator_norm": True, "augment": False}, {"d32", "g32"}, set()),
        ({"crop_weight": 0.0, "difference_weight": 0.0}, {"g_outside"}, {"d_crop", "d_difference"}),
    ],
)
def test_every_switch_trains_one_step(phantom_data, templates, tmp_path, numbers, there, not_there):
    preset = dataclasses.replace(TINY, images=8, grow_at=(), **numbers)
    train_gan(preset, data=phantom_data, ct_nodules=templates, out=tmp_path)
    (line,) = _lines(tmp_path)
    assert there <= line.keys() and not not_there & line.keys() and line["skipped"] == 0
    assert NoduleGenerator.from_pretrained(tmp_path / "export").provenance["recipe"]["preset"] == preset.numbers()


def test_the_first_phase_shows_normal_films_and_empty_masks_alone(phantom_data, templates):
    films, prior = read_films(phantom_data, 32), LocationPrior.bundled()
    preset = dataclasses.replace(TINY, normal_first=16)
    first = drawn(films, prior, None, preset, seed=0, images_seen=8)
    assert first.classes.tolist() == [0] * 8 and not first.masks.any() and len(first.noise) == len(first.masks) == 8
    normal = {film.numpy().tobytes() for film in films.normal}
    shown = ((first.images + 1) * 127.5).round().to(torch.uint8)
    assert all(film.numpy().tobytes() in normal for film in shown)
    assert len({row.numpy().tobytes() for row in first.noise}) == 8
    assert drawn(films, prior, None, preset, seed=0, images_seen=16).masks.any()


def test_thesis256_is_the_source_to_the_letter():
    stage1, stage2 = PRESETS["thesis256"], PRESETS["thesis256-stage2"]
    assert (stage1.batch, stage2.batch, stage1.learning_rate, stage2.learning_rate) == (24, 16, 2e-5, 2e-5)
    assert (stage1.images, stage2.images - stage1.images) == (43 * 65_426, 13 * 65_426)
    assert (stage1.carim_weight, stage1.carim_form, stage1.carim_every) == (0.001, "source", 1)
    ours = ("superimposed", "crop_weight", "difference_weight", "outside_weight", "level_weight", "r1_weight")
    ours += ("normal_first", "augment", "relativistic", "grow_at")
    assert not any(getattr(preset, name) for preset in (stage1, stage2) for name in ours)
    assert stage1.discriminator_norm and ARCHITECTURES[stage1.architecture].joint


def test_numbers_are_changed_by_name():
    preset = changed(TINY, ["crop_weight=0", "grow_at=[8]", "carim_form=source", "relativistic=true"])
    assert (preset.crop_weight, preset.grow_at, preset.carim_form, preset.relativistic) == (0.0, (8,), "source", True)
    with pytest.raises(RunError, match="set must name one of .*'crops=1'"):
        changed(TINY, ["crops=1"])
    for wrong in ("batch=many", "batch=1.5", "relativistic=1", "crop_weight"):
        with pytest.raises(RunError, match=f"set must give .* got '{wrong}'"):
            changed(TINY, [wrong])


# --- Bad input: named before training starts ---
def _changed_table(source, target, name, change):
    """A data set with one changed table; the images are the source's."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != name:
            (target / path.name).symlink_to(path)
    (target / name).write_text(change((source / name).read_text()))
    return target


@pytest.fixture
def no_step(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("training has started")

    monkeypatch.setattr("train.gan.training.train_step", never)


def _refused(match, preset=TINY, **options):
    with pytest.raises((RunError, ClassifierError), match=match):
        train_gan(preset, **options)


@pytest.mark.usefixtures("no_step")
def test_data_that_do_not_fit_are_refused(phantom_data, templates, tmp_path):
    entries, splits, boxes = "Data_Entry_2017_v2020.csv", "split.csv", "BBox_List_2017.csv"
    options = {"ct_nodules": templates, "out": tmp_path / "run"}
    data = _changed_table(phantom_data, tmp_path / "1", entries, lambda t: t.replace(",Nodule,", ",No Finding,"))
    _refused("needs films of both classes, got 24 normal, 0 nodule", data=data, **options)
    data = _changed_table(phantom_data, tmp_path / "2", entries, lambda t: t.replace(",No Finding,", ",Nodule,"))
    _refused("needs films of both classes, got 0 normal, 24 nodule", data=data, **options)
    data = _changed_table(phantom_data, tmp_path / "3", splits, lambda t: t.replace(",train", ",test"))
    _refused("the train split holds no film", data=data, **options)
    data = _changed_table(phantom_data, tmp_path / "4", boxes, lambda t: t.splitlines()[0] + "\n")
    _refused("has no nodule box and there are no CT nodules", data=data, ct_nodules=None, out=tmp_path / "run")
    large = dataclasses.replace(TINY, batch=32)
    _refused("needs at least a batch of 32 films, got 24", large, data=phantom_data, **options)


@pytest.mark.usefixtures("no_step")
def test_films_of_several_sizes_are_refused_unless_asked_for(phantom_data, templates, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in [p for p in phantom_data.iterdir() if p.name != "images"] + list((phantom_data / "images").iterdir()):
        (data / path.relative_to(phantom_data)).symlink_to(path)
    odd = data / "images" / "00000003_000.png"
    odd.unlink()
    Image.new("L", (64, 48)).save(odd)
    match = r"films must be of one size, got 64x64 \(00000001_000.png\) and 48x64 \(00000003_000.png\)"
    _refused(match, data=data, ct_nodules=templates, out=tmp_path / "run")
    assert len(read_films(data, 32, any_size=True).normal) == 16


@pytest.mark.usefixtures("no_step")
def test_presets_that_do_not_fit_are_refused(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    with pytest.raises(RunError, match="preset must be one of .*'tiny'.*, got 'tin'"):
        named_preset("tin")
    _refused("preset.architecture must be one of", dataclasses.replace(TINY, architecture="large"), **options)
    _refused("preset.batch must be a multiple of 2", dataclasses.replace(TINY, batch=7), **options)
    _refused(
        "preset.grow_at must have fewer entries than branches", dataclasses.replace(TINY, grow_at=(8, 16)), **options
    )


def test_a_checkpoint_of_another_preset_is_refused(phantom_data, templates, tmp_path, monkeypatch):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "run"}
    small = dataclasses.replace(TINY, images=8, grow_at=())
    train_gan(small, **options)
    wide = dataclasses.replace(small, discriminator_width=16)
    _refused(r"holds another recipe \(differs in \['preset.discriminator_width'\]\)", wide, **options)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    recipe["preset"]["discriminator_width"] = 16  # a checkpoint put into another run's folder
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    _refused("the checkpoint is of other networks than the preset's", wide, **options)


def test_the_command_line_names_what_is_wrong(phantom_data, tmp_path, monkeypatch):
    for arguments, match in (
        (["--preset", "fast", "--data", phantom_data], "error: preset must be one of .* got 'fast'"),
        (["--preset", "tiny", "--data", tmp_path], "error: .*no Data_Entry_2017"),
        (["--preset", "tiny", "--data", phantom_data, "--weights", tmp_path], "error: .*has no model.safetensors"),
    ):
        monkeypatch.setattr("sys.argv", ["gan", *map(str, arguments), "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit, match=match):
            main()


# --- Fine-tuning ---
def test_given_weights_stay_while_the_discriminators_warm_up_and_train_afterwards(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates}
    first = train_gan(TINY, out=tmp_path / "1", **options)
    given = NoduleGenerator.from_pretrained(first)

    def tuned(images, **numbers):
        preset = dataclasses.replace(TINY, images=images, warm_up=24, **numbers)
        return NoduleGenerator.from_pretrained(train_gan(preset, out=tmp_path / f"{images}", weights=first, **options))

    def same(generator):
        parameters = zip(generator.parameters(), given.parameters(), strict=True)
        return [torch.equal(a, b) for a, b in parameters]

    assert all(same(tuned(24)))
    after = tuned(32)
    assert not any(same(after))
    far = max((a - b).abs().max().item() for a, b in zip(after.parameters(), given.parameters(), strict=True))
    assert far < 1e-4  # one step of 2e-4, of which the average takes a small part
    assert after.provenance["recipe"]["weights"] == given.weights_hash
    lines = [json.loads(line) for line in (tmp_path / "32" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["scales"] == 2  # all branches from the start


def test_weights_that_do_not_fit_are_refused(phantom_data, tmp_path):
    options = {"data": phantom_data, "ct_nodules": None, "out": tmp_path / "run"}
    NoduleGenerator(dataclasses.replace(ARCHITECTURES["tiny"], noise_dim=8)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="weights must be of the preset's architecture"):
        train_gan(TINY, weights=tmp_path / "other", **options)
    with pytest.raises(ValueError, match="give one of them"):
        train_gan(TINY, weights=tmp_path, start=tmp_path, classifier=tmp_path, **options)
    assert not (tmp_path / "run").exists()


# --- Stage 2 ---
@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    ChestClassifier(FINDINGS, size=32).save(path)
    return path


def test_stage_2_starts_from_stage_1_and_leaves_the_classifier_alone(
    phantom_data, templates, classifier_file, tmp_path, monkeypatch
):
    options = {"data": phantom_data, "ct_nodules": templates}
    train_gan(TINY, out=tmp_path / "1", **options)
    seen, ratios = [], []

    def watched(wrapped, batch, preset, asked, **kwargs):
        losses, done = train_step(wrapped, batch, preset, asked, **kwargs)
        if asked.influence is not None:
            seen.append({k: v.clone() for k, v in asked.influence.classifier.state_dict().items()})
            ratios.append(losses.get("carim_ratio"))
        assert ("g_carim" in losses) == (asked.influence is not None)
        return losses, done

    monkeypatch.setattr("train.gan.training.train_step", watched)
    preset = dataclasses.replace(TINY, images=112, carim_weight=1.0, carim_every=2, log_images=16)
    folder = train_gan(preset, out=tmp_path / "2", start=tmp_path / "1", classifier=classifier_file, **options)
    assert len(seen) == 4  # of 8 steps each second
    before = ChestClassifier.load(classifier_file).state_dict()
    assert all(torch.equal(v, before[k]) for state in seen for k, v in state.items())
    assert ratios[0] is not None and ratios[0] > 0
    recipe = NoduleGenerator.from_pretrained(folder).provenance["recipe"]
    assert (recipe["stage"], recipe["stage_2_from"], recipe["images_seen"]) == (2, 48, 112)
    lines = [json.loads(line) for line in (tmp_path / "2" / "log.jsonl").read_text().splitlines()]
    assert 0 <= lines[0]["dead"] <= 1 and lines[0]["carim_ratio"] > 0


def test_stage_2_refuses_what_does_not_fit(phantom_data, templates, classifier_file, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates, "out": tmp_path / "2"}
    with pytest.raises(ValueError, match="start and classifier make stage 2 together"):
        train_gan(TINY, start=tmp_path, **options)
    with pytest.raises(ValueError, match="has no recipe.json"):
        train_gan(TINY, start=tmp_path, classifier=classifier_file, **options)
    Run(tmp_path / "other", {"preset": {**TINY.to_dict(), "architecture": "fast128"}})
    with pytest.raises(ValueError, match="same networks, got {'architecture': 'fast128'}"):
        train_gan(TINY, start=tmp_path / "other", classifier=classifier_file, **options)
    Run(tmp_path / "empty", {"preset": TINY.to_dict()})
    with pytest.raises(ValueError, match="start must hold a checkpoint"):
        train_gan(TINY, start=tmp_path / "empty", classifier=classifier_file, **options)
    torch.manual_seed(0)
    ChestClassifier(["Mass"], size=32).save(tmp_path / "mass.safetensors")
    with pytest.raises(ValueError, match="finding must be one of the classifier's"):
        train_gan(TINY, start=tmp_path / "empty", classifier=tmp_path / "mass.safetensors", **options)
    assert not (tmp_path / "2").exists()


def test_a_classifier_without_the_finding_or_still_training_is_refused():
    torch.manual_seed(0)
    net = ChestClassifier(["Mass"], size=32)
    with pytest.raises(ValueError, match="finding must be one of the classifier's"):
        Influence(net.eval().requires_grad_(False), 1.0, "source")
    with pytest.raises(ValueError, match="classifier must be in eval mode"):
        Influence(ChestClassifier(["Nodule"], size=32), 1.0, "source")


def test_a_phase_for_nodules_alone_keeps_the_films_near_those_at_the_start(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates}
    folder = train_gan(TINY, out=tmp_path / "1", **options)
    preset = dataclasses.replace(TINY, film_weight=0.0, level_weight=0.0, warm_up=8, grow_at=(), log_images=8)
    started = NoduleGenerator.from_pretrained(folder)
    moved = {}
    for weight in (0.0, 100.0):
        out = tmp_path / str(weight)
        anchored = dataclasses.replace(preset, anchor_weight=weight)
        trained = NoduleGenerator.from_pretrained(train_gan(anchored, out=out, weights=folder, **options))
        noise, empty = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 1, 32, 32)
        with torch.no_grad():
            moved[weight] = float((trained(noise, empty) - started(noise, empty)).abs().mean())
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert not any("g32" in line or "d32" in line for line in lines) and "g_difference" in lines[-1]
        assert ("g_anchor" in lines[-1]) == (weight > 0)
    assert 0 < moved[100.0] < moved[0.0]


def test_a_phase_in_which_nothing_would_be_judged_is_refused(phantom_data, templates, tmp_path):
    for more in ({"crop_weight": 0.0, "difference_weight": 0.0, "grow_at": ()}, {"grow_at": (16,)}):
        preset = dataclasses.replace(TINY, film_weight=0.0, **more)
        with pytest.raises(RunError, match="preset.film_weight must be > 0 unless crops or differences are judged"):
            train_gan(preset, data=phantom_data, ct_nodules=templates, out=tmp_path / "1")


def test_an_anchor_needs_weights_to_start_from(phantom_data, templates, tmp_path):
    preset = dataclasses.replace(TINY, anchor_weight=1.0)
    with pytest.raises(RunError, match="anchor_weight must be 0 for a run that starts untrained, got 1.0"):
        train_gan(preset, data=phantom_data, ct_nodules=templates, out=tmp_path / "1")


def test_boxes_without_ct_nodules_still_train_the_discriminator_of_crops(phantom_data, tmp_path):
    films, prior = read_films(phantom_data, 32), LocationPrior.bundled()
    batch = draw_batch(films, prior, None, TINY, seed=0, images_seen=0)
    # Four normal films with an empty mask, one boxed nodule.
    assert batch.crops.shape == (5, 2, 8, 8) and not len(batch.differences)
    assert batch.crops[:4, 1].abs().max() == 0 and batch.crops[4, 1].max() == 1
    train_gan(dataclasses.replace(TINY, grow_at=()), data=phantom_data, ct_nodules=None, out=tmp_path / "1")
    line = json.loads((tmp_path / "1" / "log.jsonl").read_text().splitlines()[-1])
    assert "g_crop" in line and "d_crop" in line and "g_difference" not in line and "g_contrast" not in line
