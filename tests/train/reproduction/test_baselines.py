"""The class-conditional baselines of Table 1: networks, training, and their place in a mix."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix, WeightsError
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.ops.findings import FINDINGS
from train.classifier.densenet import ChestClassifier
from train.common.images import read_images
from train.common.run import RunError, TrainingError
from train.reproduction.baselines.attention import AttentionDiscriminator, AttentionGenerator, SelfAttention
from train.reproduction.baselines.dcgan import DCGANDiscriminator, DCGANGenerator
from train.reproduction.baselines.pggan import (
    ProgressiveDiscriminator,
    ProgressiveGenerator,
    batch_deviation,
    pixel_norm,
)
from train.reproduction.baselines.presets import MODELS, PRESETS
from train.reproduction.baselines.source import KINDS, ClassGenerator, ClassGeneratorConfig, ClassNetworks
from train.reproduction.baselines.step import BaselineGAN, discriminator_losses, draw_batch, generator_losses, growth
from train.reproduction.baselines.training import train_baseline, train_model

TINY = PRESETS["tiny"].baselines
CLASSES = torch.tensor([1, 1, 0])
NODULE, SEEDS = CLASSES == 1, [5, 6, 7]


def untrained(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClassGenerator(ClassNetworks(TINY[kind].config))


@pytest.fixture(scope="module")
def train_images(phantom_data):
    return read_images(phantom_data, "train", 32, only_normal_or_nodule=True)


# --- Networks ---
def test_dcgan_generates_and_scores_images_of_its_size():
    for size in (16, 64, 256):
        images = DCGANGenerator(size, noise_dim=8, width=4, most=16)(torch.randn(2, 8))
        assert images.shape == (2, 1, size, size) and images.abs().max() <= 1
        assert DCGANDiscriminator(size, width=4, most=16)(images).shape == (2,)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: DCGANGenerator(100), "image_size must be a power of two, at least 16, got 100"),
        (lambda: DCGANDiscriminator(32)(torch.zeros(1, 1, 16, 16)), r"images must be .* got \(1, 1, 16, 16\)"),
        (lambda: ProgressiveGenerator(12), "image_size must be a power of two, at least 8, got 12"),
        (lambda: ProgressiveGenerator(8)(torch.zeros(3, 100), CLASSES, step=2), r"step must be in \[0, 1\], got 2"),
        (lambda: ProgressiveDiscriminator(8)(torch.zeros(3, 1, 16, 16)), r"images must be .* got \(3, 1, 16, 16\)"),
        (lambda: SelfAttention(4), "channels must be at least 8, got 4"),
        (lambda: ClassGeneratorConfig("vae"), "kind must be one of .* got 'vae'"),
        (lambda: ClassGeneratorConfig("attention", "huge"), "architecture must be one of .* got 'huge'"),
    ],
)
def test_other_sizes_and_kinds_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_pggan_grows_from_4_pixels_to_its_size_fading_each_in():
    generator, discriminator = ProgressiveGenerator(32, noise_dim=8, width=4), ProgressiveDiscriminator(32, width=4)
    noise, before = torch.randn(3, 8), None
    for step in range(4):
        images = generator(noise, CLASSES, step=step, alpha=0.5)
        scores, classes = discriminator(images, alpha=0.5)
        assert images.shape == (3, 1, 4 * 2**step, 4 * 2**step) and (scores.shape, classes.shape) == ((3,), (3, 2))
        if before is not None:
            shown = torch.nn.functional.interpolate(before, scale_factor=2, mode="nearest")
            torch.testing.assert_close(generator(noise, CLASSES, step=step, alpha=0.0), shown)
            torch.testing.assert_close(discriminator(shown, alpha=0.0)[0], discriminator(before)[0])
        before = generator(noise, CLASSES, step=step)


def test_pggan_equalises_the_learning_rate_and_norms_by_hand():
    layer = ProgressiveGenerator(8, noise_dim=8, width=64).first
    assert 0.9 < layer.layer.weight.std() < 1.1 and layer.scale == pytest.approx((2 / (128 * 9)) ** 0.5)
    maps = torch.tensor([[3.0, 4.0], [0.5, 0.5]])[:, :, None, None]
    torch.testing.assert_close(pixel_norm(maps).square().mean(dim=1).flatten(), torch.ones(2))
    more = batch_deviation(maps)
    assert more.shape == (2, 3, 1, 1) and more[0, 2].item() == pytest.approx((1.25 + 1.75) / 2)  # half each distance


def test_self_attention_starts_as_the_identity_and_mixes_all_places_later():
    layer, maps = SelfAttention(16).eval(), torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(layer(maps), maps)
    layer.factor.data.fill_(1.0)
    moved = maps.clone()
    moved[0, :, 0, 0] += 5
    assert (layer(moved) - layer(maps))[0, :, 7, 7].abs().max() > 1e-4


@pytest.mark.train
def test_attention_is_at_32_pixels_in_generator_and_discriminators():
    generator = AttentionGenerator(ARCHITECTURES["fast128"])
    (where,) = [step for step, layers in enumerate(generator.steps) if isinstance(layers[-1], SelfAttention)]
    images = generator(torch.randn(2, 100), CLASSES[:2])
    assert 8 * 2**where == 32 and [i.shape[-1] for i in images] == [32, 64, 128]
    for image in images:
        discriminator = AttentionDiscriminator(image.shape[-1], width=8, max_channels=32, batch_norm=False)
        found = [layer for layer in discriminator.trunk if isinstance(layer, SelfAttention)]
        assert len(found) == (image.shape[-1] > 32) and discriminator(image, CLASSES[:2])[0].shape == (2,)


# --- Generators ---
@pytest.mark.train
@pytest.mark.parametrize("kind", KINDS)
class TestClassGenerators:
    def test_an_image_is_of_its_class_and_seed_alone_and_stays_so_when_saved(self, kind, tmp_path):
        generator = untrained(kind)
        images = generator.class_images(NODULE, SEEDS)
        assert images.shape == (3, 1, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
        for i in range(3):
            alone = generator.class_images(NODULE[i : i + 1], SEEDS[i : i + 1])
            torch.testing.assert_close(alone[0], images[i], atol=1e-5, rtol=0)
        assert not torch.equal(generator.class_images(~NODULE, SEEDS), images)
        with pytest.raises(ValueError, match=r"nodule must be \(3,\) bool, got \(3,\) torch.int64"):
            generator.class_images(CLASSES, SEEDS)
        generator.save_pretrained(tmp_path, prior=LocationPrior.bundled(), recipe={"images_seen": 3})
        for again in (NoduleGenerator.from_pretrained(tmp_path), pickle.loads(pickle.dumps(generator))):
            assert type(again) is ClassGenerator and again.provenance["recipe"] == {"images_seen": 3}
            assert again.weights_hash == generator.weights_hash != untrained(kind, seed=1).weights_hash
            assert torch.equal(again.class_images(NODULE, SEEDS), images)

    def test_a_mix_of_its_folder_serves_for_whole_images_of_a_classifier(self, kind, tmp_path):
        untrained(kind).save_pretrained(tmp_path, prior=LocationPrior.bundled())
        chances = {"Nodule": 0.5, "No Finding": 0.5}
        mix = SyntheticNoduleMix.from_pretrained(tmp_path, p=chances, insertion="whole")
        images, labels = mix(torch.zeros(8, 1, 48, 48), torch.zeros(8, dtype=torch.long))
        synthetic = mix.last_params.synthetic
        assert synthetic.any() and bool((images[synthetic].flatten(1).std(dim=1) > 0).all()) and labels.sum() > 0
        mix.save_pretrained(tmp_path / "again")
        assert NoduleGenerator.from_pretrained(tmp_path / "again").weights_hash == untrained(kind).weights_hash
        with pytest.raises(ValueError, match="generator must have a method residuals .* got a ClassGenerator"):
            SyntheticNoduleMix.from_pretrained(tmp_path)
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
        mix = SyntheticNoduleMix(mix.generator, mix.prior, p=1.0, insertion="whole")
        for use in (lambda x: mix([x], [target]), lambda x: mix.wrap([(x, target)])):
            with pytest.raises(ValueError, match="labels must have no boxes with a ClassGenerator"):
                use(torch.zeros(1, 48, 48))

    def test_trains_resumes_and_repeats_itself(self, kind, phantom_data, tmp_path):
        preset = replace(TINY[kind], images=32, snapshot_images=16)

        def train(out, preset=preset, **options):
            folder = train_baseline(preset, data=phantom_data, out=tmp_path / out, precision="32-true", **options)
            return NoduleGenerator.from_pretrained(folder)

        whole = train("whole")
        train("parts", replace(preset, images=16))
        parts = train("parts")
        assert whole.weights_hash == parts.weights_hash != train("other", seed=1).weights_hash
        assert whole.provenance["recipe"]["images_seen"] == 32
        with pytest.raises(RunError, match="holds another recipe"):
            train("parts", seed=1)
        with pytest.raises(RunError, match="preset.batch must be even and at least 4, got 3"):
            train("small", replace(preset, batch=3))
        assert [path.stem[-2:] for path in sorted((tmp_path / "whole").glob("samples-*"))] == ["16", "32"]

    def test_both_players_get_gradients(self, kind, train_images):
        gan = BaselineGAN(TINY[kind])
        batch = draw_batch(train_images, TINY[kind], seed=0, images_seen=TINY[kind].images)
        fake = gan.generators(batch.noise, batch.classes, step=batch.step, alpha=batch.alpha)
        for losses, networks in (
            (discriminator_losses(gan, batch, [image.detach() for image in fake]), gan.discriminators),
            (generator_losses(gan, batch, fake), gan.generators.each),
        ):
            sum(losses.values()).backward()
            one = networks[int(batch.classes[0]) if kind == "dcgan" else 0]
            apart = ("entries", "heads")  # of sizes that are not at work
            assert all(p.grad is not None for n, p in one.named_parameters() if n.split(".")[0] not in apart)


# --- Training ---
def test_pggan_spends_half_of_the_budget_below_its_last_size():
    preset = PRESETS["mini"].baselines["pggan"]
    half, grow = preset.images // 2, preset.grow_images
    assert [growth(preset, seen)[0] for seen in (0, half - 16, half)] == [0, 4, 5]
    assert growth(preset, 0)[1] == growth(preset, 2 * grow - 16)[1] == 1 and growth(preset, grow)[1] < 0.1


@pytest.mark.train
def test_batches_are_half_and_half_but_of_dcgan_of_one_class_by_turns(train_images):
    counts = {
        kind: [int(draw_batch(train_images, TINY[kind], seed=0, images_seen=8 * i).classes.sum()) for i in range(3)]
        for kind in KINDS
    }
    assert counts == {"dcgan": [0, 8, 0], "pggan": [4, 4, 4], "attention": [4, 4, 4]}
    first, again = (draw_batch(train_images, TINY["pggan"], seed=1, images_seen=8) for _ in range(2))
    assert torch.equal(first.real, again.real) and torch.equal(first.noise, again.noise)


@pytest.mark.train
def test_all_five_models_come_of_one_budget(phantom_data, templates, tmp_path):
    ChestClassifier(FINDINGS, size=32).save(tmp_path / "classifier.safetensors")
    options = {"data": phantom_data, "out": tmp_path, "ct_nodules": templates, "precision": "32-true"}
    for preset in PRESETS.values():
        budgets = {(model.images, model.batch, model.config.image_size) for model in preset.baselines.values()}
        size = ARCHITECTURES[preset.stage1.architecture].image_size
        assert budgets == {(preset.stage2.images, preset.stage1.batch, size)} and set(preset.baselines) < set(MODELS)
    for name in MODELS:
        folder = train_model(name, PRESETS["tiny"], classifier=tmp_path / "classifier.safetensors", **options)
        assert NoduleGenerator.from_pretrained(folder).provenance["recipe"]["images_seen"] == 96
    assert json.loads((tmp_path / "carim" / "recipe.json").read_text())["stage_2_from"] == 64
    with pytest.raises(RunError, match="classifier must be given for the CARIM loss .* got None"):
        train_model("carim", PRESETS["tiny"], classifier=None, **options)
    with pytest.raises(RunError, match="models must be of .* got 'vae'"):
        train_model("vae", PRESETS["tiny"], classifier=None, **options)
    with pytest.raises(TrainingError, match="was shown 0 of 64 images"):
        train_model("carim-without", PRESETS["tiny"], classifier=None, **{**options, "out": tmp_path / "b"}, minutes=0)


def test_damaged_weights_are_refused_by_name(tmp_path):
    untrained("pggan").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="does not match its own SHA-256"):
        ClassGenerator.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="must be of a format among .*classgenerator"):
        ClassGenerator.from_pretrained()
