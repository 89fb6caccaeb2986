"""The reproduction's paths that touch CUDA; run with `pytest -m gpu` on a machine that has it."""

from dataclasses import replace

import pytest
import torch

from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix
from carim_aug.generators.weights import BUNDLED
from train.common.splits import read_part
from train.reproduction.baselines.presets import PRESETS as BASELINES
from train.reproduction.baselines.source import KINDS
from train.reproduction.baselines.training import train_baseline
from train.reproduction.controls.duplicates import DuplicatedImages
from train.reproduction.controls.nodules import DrawnNodules
from train.reproduction.detector.training import PRESETS as DETECTORS
from train.reproduction.detector.training import train_detector
from train.reproduction.figures.same_noise import difference_figures
from train.reproduction.table2.arms import Sources, find_arm
from train.reproduction.table2.training import PRESETS, run_arm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def mix_on_both(source, insertion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch on the CPU and on CUDA."""
    mixed = []
    for device in ("cpu", "cuda"):
        mix = SyntheticNoduleMix(source, LocationPrior.bundled(), p=1.0, insertion=insertion)
        mixed.append(mix(torch.zeros(6, 1, 48, 48, device=device), torch.zeros(6, device=device).long())[0])
    assert mixed[1].is_cuda
    return mixed[0], mixed[1].cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_trains_on_cuda_resumes_and_serves_a_mix_there(kind, phantom_data, tmp_path):
    preset = replace(BASELINES["tiny"].baselines[kind], images=32, snapshot_images=16)
    train_baseline(replace(preset, images=16), data=phantom_data, out=tmp_path, device="cuda")
    folder = train_baseline(preset, data=phantom_data, out=tmp_path, device="cuda")
    torch.testing.assert_close(*mix_on_both(NoduleGenerator.from_pretrained(folder), "whole"), atol=1e-3, rtol=0)


def test_controls_on_cuda_make_what_the_cpu_makes():
    images = torch.randint(256, (4, 1, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    for control, insertion in ((DrawnNodules(64), "graft"), (DuplicatedImages(images, images.flip(0)), "whole")):
        torch.testing.assert_close(*mix_on_both(control, insertion), atol=1e-4, rtol=0)


def test_a_classifier_of_table_2_and_a_detector_train_on_cuda(phantom_data, tmp_path):
    parts = {part: read_part(phantom_data, part, 32) for part in ("train", "val")}
    arm, where = find_arm("DS4-graft"), {"start": None, "out": tmp_path / "table2", "device": "cuda"}
    result = run_arm(arm, parts, Sources(BUNDLED, BUNDLED), PRESETS["tiny"], seed=0, **where)
    assert all(abs(x) < 1e3 for x in result["images"]["val"]["logits"])
    out = tmp_path / "detector"
    assert train_detector(DETECTORS["tiny"], data=phantom_data, out=out, mix=1.0, device="cuda").exists()


def test_difference_figures_are_the_same_on_both_devices():
    generator, prior = NoduleGenerator.from_pretrained(), LocationPrior.bundled()
    expected, found = (difference_figures(generator, prior, n=8, device=device) for device in ("cpu", "cuda"))
    assert found["energy"]["value"] == pytest.approx(expected["energy"]["value"], abs=1e-3)
