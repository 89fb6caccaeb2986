"""Every example runs from the command line with small settings, on phantoms and real images, and prints its promise."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_mix

pytestmark = [pytest.mark.examples, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {
    "albumentations_boxes": ["epoch 0: 16 images", "boxes came in"],
    "balancing": ["DS1: ", "DS2 + duplicates: ", "DS4: ", "real ones"],
    "classifier_loader": ["'synthetic': 100", "epoch 0: loss", "AUC on 32 images without synthetic ones"],
    "classifier_transform": ["epoch 0: loss", "AUC on 32 images without synthetic ones"],
    "ddp": ["samples were synthetic", "over 2 ranks"],
    "export_then_train": ["wrote", "not for validation: SyntheticDataError", "synthetic images"],
    "faster_rcnn": ["epoch 0: loss_classifier", "nodules in 8 real images"],
    "lightning_module": ["AUC on real images", "the checkpoint holds ['net']"],
    "multilabel_nan": ["loss", "grafted nodules", "of 224 entries annotated"],
    "torchxrayvision_multilabel": ["real nodule rows", "known labels of the last batch"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    make_mix().save_pretrained(folder)
    return str(folder)


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example_runs_on_drawn_phantoms(name, weights):
    check_runs(name, "--weights", weights)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example_runs_on_real_images_with_the_bundled_weights(name, real_data):
    check_runs(name, "--data", str(real_data))


def check_runs(name, *more):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if name == "ddp" else []
    command = [sys.executable, *launch, f"examples/{name}.py", *more, "--size", "64", "--batches", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    if launch and "terminate called without an active exception" in done.stderr:  # gloo's threads, once in a while
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for said in PROMISED[name]:
        assert said in done.stdout
    assert "nan" not in done.stdout
