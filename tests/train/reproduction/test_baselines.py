"""The class-conditional baselines of Table 1: networks, training, and their place in a mix (METHOD 7)."""

import json
from dataclasses import replace

import pytest
import torch

from carim_aug import LocationPrior, SyntheticNoduleMix, WeightsError
from carim_aug.generators.base import is_generator, places_nodules
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.tools.export import export
from carim_aug.transforms.pool import SyntheticPool
from train.common.run import RunError
from train.gan.batch import read_films
from train.reproduction.baselines.attention import AttentionDiscriminator, AttentionGenerator, SelfAttention
from train.reproduction.baselines.command import MODELS, PRESETS, train_model
from train.reproduction.baselines.dcgan import DCGANDiscriminator, DCGANGenerator
from train.reproduction.baselines.pggan import (
    ProgressiveDiscriminator,
    ProgressiveGenerator,
    batch_deviation,
    pixel_norm,
)
from train.reproduction.baselines.source import KINDS, ClassGenerator, ClassGeneratorConfig
from train.reproduction.baselines.training import (
    Rivals,
    Round,
    draw_round,
    grown,
    judging_losses,
    made_for,
    train_class_gan,
)
from train.reproduction.controls.nodules import DrawnNodules

TINY = PRESETS["tiny"].rivals
CLASSES = torch.tensor([1, 1, 0])


def untrained(kind: str, seed: int = 0) -> ClassGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClassGenerator(TINY[kind].config, TINY[kind].config.networks()).eval()


@pytest.mark.parametrize("size", [16, 64, 256])
def test_dcgan_makes_and_judges_images_of_its_size(size):
    images = DCGANGenerator(size, noise_dim=8, width=4, most=16)(torch.randn(2, 8))
    assert images.shape == (2, 1, size, size)
    assert images.abs().max() <= 1
    assert DCGANDiscriminator(size, width=4, most=16)(images).shape == (2,)


def test_dcgan_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"image_size must be a power of two, at least 16, got 100"):
        DCGANGenerator(100)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 32, 32\), got \(1, 1, 16, 16\)"):
        DCGANDiscriminator(32)(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("step", range(4))
def test_pggan_grows_from_4_pixels_to_its_size(step):
    generator, judge = ProgressiveGenerator(32, noise_dim=8, width=4), ProgressiveDiscriminator(32, width=4)
    images = generator(torch.randn(3, 8), CLASSES, step=step, alpha=0.5)
    assert images.shape == (3, 1, 4 * 2**step, 4 * 2**step)
    scores, named = judge(images, alpha=0.5)
    assert (scores.shape, named.shape) == ((3,), (3, 2))


def test_pggan_fades_a_new_size_in_from_the_one_before():
    generator, judge = ProgressiveGenerator(16, noise_dim=8, width=4), ProgressiveDiscriminator(16, width=4)
    noise = torch.randn(3, 8)
    coarse = generator(noise, CLASSES, step=1)
    shown = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="nearest")
    torch.testing.assert_close(generator(noise, CLASSES, step=2, alpha=0.0), shown)
    torch.testing.assert_close(judge(shown, alpha=0.0)[0], judge(coarse)[0])


def test_pggan_equalises_the_learning_rate_by_scaling_at_run_time():
    layer = ProgressiveGenerator(8, noise_dim=8, width=64).first
    assert 0.9 < layer.layer.weight.std() < 1.1
    assert layer.scale == pytest.approx((2 / (128 * 9)) ** 0.5)


def test_pixel_norm_gives_unit_mean_square_and_batch_deviation_the_spread():
    maps = torch.tensor([[3.0, 4.0], [0.5, 0.5]])[:, :, None, None]
    torch.testing.assert_close(pixel_norm(maps).square().mean(dim=1).flatten(), torch.ones(2))
    more = batch_deviation(maps)
    assert more.shape == (2, 3, 1, 1)
    assert more[0, 2].item() == pytest.approx((1.25 + 1.75) / 2)  # by hand: half the distance of each pair


def test_self_attention_starts_as_the_identity_and_mixes_all_places_later():
    layer, maps = SelfAttention(16), torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(layer(maps), maps)
    layer.factor.data.fill_(1.0)
    layer.eval()
    moved = maps.clone()
    moved[0, :, 0, 0] += 5
    assert (layer(moved) - layer(maps))[0, :, 7, 7].abs().max() > 1e-4


def test_attention_is_at_32_pixels_in_generator_and_discriminators():
    config = ARCHITECTURES["fast128"]
    generator = AttentionGenerator(config)
    (where,) = [step for step, layers in enumerate(generator.steps) if isinstance(layers[-1], SelfAttention)]
    assert 8 * 2**where == 32
    images = generator.pyramid(torch.randn(2, 100), CLASSES[:2])
    assert [i.shape[-1] for i in images] == [32, 64, 128]
    for image in images:
        judge = AttentionDiscriminator(image.shape[-1], width=8, max_channels=32, condition_dim=4, batch_norm=False)
        found = [layer for layer in judge.trunk if isinstance(layer, SelfAttention)]
        assert len(found) == (image.shape[-1] > 32)
        assert judge(image, CLASSES[:2])[0].shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
class TestClassGenerators:
    def test_a_mask_means_a_class_and_its_place_means_nothing(self, kind):
        generator = untrained(kind)
        assert is_generator(generator)
        assert not places_nodules(generator)
        noise = torch.randn(2, generator.noise_dim)
        here, there = torch.zeros(2, 2, 1, 32, 32)
        here[:, :, 2:6, 2:6], there[:, :, 20:26, 20:26] = 1, 1
        with torch.no_grad():
            nodule = generator(noise, here)
            torch.testing.assert_close(nodule, generator(noise, there))
            torch.testing.assert_close(nodule, generator.images(noise, torch.ones(2, dtype=torch.long)))
            assert (nodule - generator(noise, torch.zeros_like(here))).abs().max() > 0

    def test_saves_and_loads_the_same_images(self, kind, tmp_path):
        generator = untrained(kind)
        generator.save_pretrained(tmp_path, prior=LocationPrior.bundled(), recipe={"images_seen": 3})
        again = ClassGenerator.from_pretrained(tmp_path)
        noise = torch.randn(3, generator.noise_dim)
        with torch.no_grad():
            torch.testing.assert_close(again.images(noise, CLASSES), generator.images(noise, CLASSES), atol=0, rtol=0)
        assert again.weights_hash == generator.weights_hash != untrained(kind, seed=1).weights_hash
        assert again.provenance["recipe"] == {"images_seen": 3}

    def test_takes_the_generators_place_for_whole_images_of_a_classifier(self, kind):
        mix = SyntheticNoduleMix(untrained(kind), LocationPrior.bundled(), p={"Nodule": 0.5, "No Finding": 0.5})
        images, labels = mix(torch.zeros(8, 1, 48, 48), torch.zeros(8, dtype=torch.long))
        synthetic = torch.tensor([slot.synthetic for slot in mix.last_params.slots])
        assert 0 < synthetic.sum()
        assert bool((images[synthetic].flatten(1).std(dim=1) > 0).all())
        assert labels[synthetic].sum() > 0

    def test_a_mix_is_made_of_its_folder(self, kind, tmp_path):
        untrained(kind).save_pretrained(tmp_path, prior=LocationPrior.bundled())
        mix = SyntheticNoduleMix.from_pretrained(tmp_path, p=1.0)
        assert mix.weights_hash == untrained(kind).weights_hash
        image, _, _ = mix.regenerate((0, 0, 0))
        assert image.shape == (1, 32, 32)
        mix.save_pretrained(tmp_path / "again")
        assert SyntheticNoduleMix.from_pretrained(tmp_path / "again").weights_hash == mix.weights_hash

    def test_refuses_grafts_and_boxes(self, kind):
        generator, prior = untrained(kind), LocationPrior.bundled()
        with pytest.raises(ValueError, match="insertion must be 'whole' with a ClassGenerator"):
            SyntheticNoduleMix(generator, prior, insertion="graft")
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
        mix = SyntheticNoduleMix(generator, prior, p=1.0)
        with pytest.raises(ValueError, match="labels must have no boxes with a ClassGenerator"):
            mix([torch.zeros(1, 48, 48)], [target])
        with pytest.raises(ValueError, match="labels must have no boxes with a ClassGenerator"):
            mix.wrap([(torch.zeros(1, 48, 48), target)])

    def test_trains_resumes_and_repeats_itself(self, kind, phantom_data, tmp_path):
        preset = replace(TINY[kind], images=32, snapshot_images=16)
        options = {"data": phantom_data, "precision": "32-true"}
        whole = train_class_gan(preset, out=tmp_path / "whole", **options)
        train_class_gan(replace(preset, images=16), out=tmp_path / "parts", **options)
        parts = train_class_gan(preset, out=tmp_path / "parts", **options)
        assert ClassGenerator.from_pretrained(whole).weights_hash == ClassGenerator.from_pretrained(parts).weights_hash
        other = train_class_gan(preset, out=tmp_path / "other", seed=1, **options)
        assert ClassGenerator.from_pretrained(whole).weights_hash != ClassGenerator.from_pretrained(other).weights_hash
        with pytest.raises(RunError, match="holds another recipe"):
            train_class_gan(preset, out=tmp_path / "parts", seed=1, **options)

    def test_both_players_get_gradients(self, kind, phantom_data):
        preset = TINY[kind]
        rivals, films = Rivals(preset), read_films(phantom_data, 32)
        now = draw_round(films, preset, seed=0, images_seen=preset.images)
        losses = judging_losses(rivals, kind, now, made_for(rivals.generators, kind, now))
        sum(losses.values()).backward()
        judge = rivals.judges[int(now.classes[0]) if kind == "dcgan" else 0]
        assert all(p.grad is not None for n, p in judge.named_parameters() if "entries" not in n)


def test_pggan_spends_half_of_the_budget_below_its_last_size():
    preset = PRESETS["mini"].rivals["pggan"]
    assert grown(preset, 0) == (0, 1.0)
    assert grown(preset, preset.images // 2)[0] == 5
    assert grown(preset, preset.images // 2 - 16)[0] == 4
    assert grown(preset, preset.grow_images)[1] < 0.1
    assert grown(preset, 2 * preset.grow_images - 16) == (1, 1.0)


def test_dcgan_rounds_take_the_classes_by_turns(phantom_data):
    films = read_films(phantom_data, 32)
    rounds = [draw_round(films, TINY["dcgan"], seed=0, images_seen=8 * i) for i in range(3)]
    assert [int(r.classes.sum()) for r in rounds] == [0, 8, 0]
    assert all(isinstance(r, Round) for r in rounds)


def test_all_five_models_come_of_one_budget(phantom_data, templates, tmp_path):
    from carim_aug import NoduleGenerator
    from carim_aug.data.chestxray14 import FINDINGS
    from train.classifier.densenet import ChestClassifier

    ChestClassifier(FINDINGS, size=32).save(tmp_path / "classifier.safetensors")
    options = {"data": phantom_data, "out": tmp_path, "ct_nodules": templates, "precision": "32-true"}
    for name in MODELS:
        folder = train_model(name, PRESETS["tiny"], classifier=tmp_path / "classifier.safetensors", **options)
        load = ClassGenerator if name in TINY else NoduleGenerator
        assert load.from_pretrained(folder).provenance["recipe"]["images_seen"] == 96
    with pytest.raises(RunError, match="classifier must be given for the CARIM loss"):
        train_model("carim", PRESETS["tiny"], classifier=None, **options)
    begun = json.loads((tmp_path / "carim" / "recipe.json").read_text())
    assert begun["stage_2_from"] == 64


def test_damaged_or_other_weights_are_refused_by_name(tmp_path):
    with pytest.raises(WeightsError, match="cannot be read"):
        ClassGenerator.from_pretrained(tmp_path)
    untrained("pggan").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="does not match its own SHA-256"):
        ClassGenerator.from_pretrained(tmp_path)
    from carim_aug.generators.checkpoint import BUNDLED

    with pytest.raises(WeightsError, match="must be of format"):
        ClassGenerator.from_pretrained(BUNDLED)


def test_config_names_what_does_not_fit():
    with pytest.raises(ValueError, match="kind must be one of"):
        ClassGeneratorConfig("vae")
    with pytest.raises(ValueError, match="architecture must be one of"):
        ClassGeneratorConfig("attention", architecture="huge")
    with pytest.raises(ValueError, match="image_size and noise_dim must be the architecture's, 128 and 100"):
        ClassGeneratorConfig("attention", 256, architecture="fast128")


def test_a_strangers_generator_is_held_to_the_protocol():
    class Stranger:
        image_size, noise_dim, weights_hash = 32, 4, "0" * 64

        def __init__(self, size: int, value: float) -> None:
            self.size, self.value = size, value

        def __call__(self, noise, masks):
            return torch.full((len(noise), 1, self.size, self.size), self.value)

    images, labels, prior = torch.zeros(2, 1, 40, 40), torch.zeros(2, dtype=torch.long), LocationPrior.bundled()
    mixed = SyntheticNoduleMix(Stranger(32, 1.0), prior, p=1.0)(images, labels)[0]
    assert bool((mixed == 1).all())
    with pytest.raises(ValueError, match=r"Stranger must give images \(2, 1, 32, 32\), got \(2, 1, 16, 16\)"):
        SyntheticNoduleMix(Stranger(16, 1.0), prior, p=1.0)(images, labels)
    with pytest.raises(ValueError, match=r"Stranger must give images in \[-1, 1\], got 7 to 7"):
        SyntheticNoduleMix(Stranger(32, 7.0), prior, p=1.0)(images, labels)
    for wrong in (Stranger, object(), lambda noise, masks: masks):
        with pytest.raises(TypeError, match="generator must be a NoduleGenerator or have image_size"):
            SyntheticNoduleMix(wrong, prior)
    with pytest.raises(TypeError, match="generator must be a NoduleGenerator to be pushed, got Stranger"):
        SyntheticNoduleMix(Stranger(32, 1.0), prior).push_to_hub("user/name")


def test_nodules_that_are_not_where_masks_are_go_into_no_export_and_no_pool(tmp_path):
    mix = SyntheticNoduleMix(untrained("dcgan"), LocationPrior.bundled(), p=1.0)
    with pytest.raises(ValueError, match="mix must have a generator that puts nodules where masks are"):
        export(mix, tmp_path / "out", n=2)
    films = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="shows no real films"):  # real films would go out under new patients' numbers
        export(SyntheticNoduleMix(DrawnNodules(films), LocationPrior.bundled(), p=1.0), tmp_path / "out", n=2)
    with pytest.raises(TypeError, match="generator must be a NoduleGenerator, got ClassGenerator"):
        SyntheticPool(untrained("dcgan"), LocationPrior.bundled(), size=2)
