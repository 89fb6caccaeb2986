"""The reproduction's paths that touch CUDA; run with `pytest -m gpu` on a machine that has it."""

from dataclasses import replace

import pytest
import torch

from carim_aug import LocationPrior, SyntheticNoduleMix
from carim_aug.generators.checkpoint import BUNDLED
from train.common.splits import read_filmset
from train.reproduction.baselines.command import PRESETS
from train.reproduction.baselines.source import KINDS, ClassGenerator
from train.reproduction.baselines.training import train_class_gan
from train.reproduction.controls.nodules import DrawnNodules, DuplicatedFilms
from train.reproduction.figures.same_noise import difference_figures
from train.reproduction.table2.arms import Sources
from train.reproduction.table2.training import PRESETS as DOWNSTREAM
from train.reproduction.table2.training import run_arm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_trains_on_cuda_resumes_and_serves_a_mix_there(kind, phantom_data, tmp_path):
    preset = replace(PRESETS["tiny"].rivals[kind], images=32, snapshot_images=16)
    train_class_gan(replace(preset, images=16), data=phantom_data, out=tmp_path, device="cuda")
    folder = train_class_gan(preset, data=phantom_data, out=tmp_path, device="cuda")
    generator, images = ClassGenerator.from_pretrained(folder), torch.zeros(6, 1, 48, 48)
    expected = SyntheticNoduleMix(generator, LocationPrior.bundled(), p=1.0)(images, torch.zeros(6).long())[0]
    mix = SyntheticNoduleMix(generator, LocationPrior.bundled(), p=1.0)
    mixed = mix(images.cuda(), torch.zeros(6).long().cuda())[0]
    assert mixed.is_cuda
    torch.testing.assert_close(mixed.cpu(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("insertion", ["whole", "graft"])
def test_controls_on_cuda_give_what_the_cpu_gives(insertion):
    films = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    control = DrawnNodules(films) if insertion == "graft" else DuplicatedFilms(films, films.flip(0))
    made = []
    for device in ("cpu", "cuda"):
        mix = SyntheticNoduleMix(control, LocationPrior.bundled(), p=1.0, insertion=insertion)
        made.append(mix(torch.zeros(6, 1, 48, 48).to(device), torch.zeros(6).long().to(device))[0])
    assert made[1].is_cuda
    torch.testing.assert_close(made[1].cpu(), made[0], atol=1e-4, rtol=0)


def test_a_classifier_of_table_2_trains_on_cuda(phantom_data, tmp_path):
    parts = {part: read_filmset(phantom_data, part, 32) for part in ("train", "val")}
    sources = Sources(BUNDLED, BUNDLED)
    told = run_arm("DS4-graft", parts, sources, DOWNSTREAM["tiny"], start=None, out=tmp_path, seed=0, device="cuda")
    assert all(abs(x) < 1e3 for x in told["films"]["val"]["logits"])


def test_difference_figures_are_taken_where_the_weights_are(tmp_path):
    generator = SyntheticNoduleMix.from_pretrained().generator
    expected = difference_figures(generator, LocationPrior.bundled(), n=8)
    found = difference_figures(generator.cuda(), LocationPrior.bundled(), n=8)
    assert found["energy"]["value"] == pytest.approx(expected["energy"]["value"], abs=1e-3)
