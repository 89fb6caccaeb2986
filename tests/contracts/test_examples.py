"""Every example runs from the command line with small settings, on phantoms and real films, and prints its promise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {
    "albumentations_boxes": ["epoch 0: 16 films", "boxes came in", "different nodules, each used"],
    "balancing": ["DS1: ", "DS2 + duplicates: ", "DS4: ", "real ones"],
    "classifier_loader": ["'synthetic': 200", "epoch 0: loss", "AUC on 32 images without synthetic ones"],
    "classifier_transform": ["epoch 0: loss", "AUC on 32 images without synthetic ones"],
    "ddp": ["samples were synthetic", "over 2 ranks"],
    "export_then_train": ["wrote", "not for validation: SyntheticDataError", "synthetic images"],
    "faster_rcnn": ["epoch 0: loss_classifier", "nodules in 8 real films"],
    "lightning_module": ["AUC on real images", "the checkpoint holds ['net']"],
    "multilabel_nan": ["loss", "grafted nodules", "of 224 entries annotated"],
    "torchxrayvision_multilabel": ["real nodule rows", "known labels of the last batch"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        NoduleGenerator("tiny").save_pretrained(folder)
    LocationPrior.bundled().save(folder / "prior.safetensors")
    return folder


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PROMISED)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example_runs_on_drawn_phantoms(name, weights):
    runs(name, "--weights", str(weights))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example_runs_on_real_films_with_the_bundled_weights(name, real_data):
    runs(name, "--data", str(real_data))


def runs(name, *more):
    words = [f"examples/{name}.py", *more, "--size", "64", "--batches", "2"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if name == "ddp" else []
    command = [sys.executable, *launch, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    if launch and "terminate called without an active exception" in done.stderr:  # gloo's threads, once in a while
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for said in PROMISED[name]:
        assert said in done.stdout
    assert "nan" not in done.stdout
