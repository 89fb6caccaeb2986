"""Stage 1 on a drawn phantom in ChestX-ray14's layout: that the recipe runs, resumes and exports."""

import dataclasses
import json

import pytest
import torch

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.hub import NoduleGenerator
from carim_aug.models.classifier import ChestClassifier
from carim_aug.models.generator import ARCHITECTURES, MultiScaleGenerator
from carim_aug.prior import LocationPrior
from train.films import at_least, crop_at, draw_batch, read_films
from train.gan import train_gan
from train.influence import Influence
from train.networks import Networks, retake_statistics
from train.presets import PRESETS
from train.run import Run
from train.steps import train_step

TINY = dataclasses.replace(PRESETS["tiny"], images=48, batch=8, grow_at=(16,), snapshot_images=16)


def test_films_are_split_by_class_and_know_their_boxes(phantom_data):
    films = read_films(phantom_data, 32)
    assert films.normal.shape == (16, 1, 32, 32) and films.nodule.shape == (8, 1, 32, 32)
    assert len(films.boxed) == 4
    place, boxes = films.boxed[0]
    assert place == 0 and boxes.tolist() == [[10, 12, 14, 16]]


def test_a_train_split_without_nodules_is_refused(phantom_data, tmp_path):
    for name in ("images", "BBox_List_2017.csv", "split.csv"):
        (tmp_path / name).symlink_to(phantom_data / name)
    text = (phantom_data / "Data_Entry_2017_v2020.csv").read_text().replace(",Nodule,", ",No Finding,")
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(text)
    with pytest.raises(ValueError, match="needs films of both classes, got 24 normal, 0 nodule"):
        read_films(tmp_path, 32)


def test_batches_are_a_pure_function_of_the_images_seen(phantom_data, templates):
    from carim_aug.data.ct_nodules import CTNodules
    from carim_aug.prior import LocationPrior

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
    retake_statistics(generator, LocationPrior.bundled(), TINY, seed=0, batches=40)
    after = generator.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not generator.training and all(m.momentum == 0.1 for m in generator.modules() if hasattr(m, "momentum"))
    # The stem's norm sees z W: |w|^2 is its variance for standard normal noise, times 6 / 7 in a batch of 4 pairs.
    expected = generator.stem.linear.weight.detach().square().sum(dim=1)
    assert (after["stem.norm.running_var"] / expected).mean() == pytest.approx(6 / 7, abs=0.03)


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

    monkeypatch.setattr("train.gan.train_step", watched)
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


def test_a_classifier_without_the_finding_or_still_training_is_refused():
    torch.manual_seed(0)
    net = ChestClassifier(["Mass"], size=32)
    with pytest.raises(ValueError, match="finding must be one of the classifier's"):
        Influence(net.eval().requires_grad_(False), 1.0, "source")
    with pytest.raises(ValueError, match="classifier must be in eval mode"):
        Influence(ChestClassifier(["Nodule"], size=32), 1.0, "source")
