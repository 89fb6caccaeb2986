"""The command line: what each command prints and writes, and one line in place of a traceback when it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carim_aug.data.errors import DataError
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.tools.cli import held_out, main, read_patients_boxes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A folder with an untrained tiny generator and the bundled prior."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = NoduleGenerator("tiny")
    generator.save_pretrained(folder, training_data="nothing", recipe={"images": 0}, git_commit="abc")
    LocationPrior.bundled().save(folder / "prior.safetensors")
    return str(folder)


def write_boxes(path: Path, patients: int = 8, *, size: int = 512, extra: str = "") -> Path:
    """Two images with a box each per patient, in the lungs."""
    rng = np.random.default_rng(0)
    rows = ["image,x1,y1,x2,y2" + (",patient" if extra else "")]
    for patient in range(patients):
        for visit in range(2):
            x, y = rng.choice([0.3, 0.7]) + rng.normal(0, 0.03), 0.4 + rng.normal(0, 0.05)
            w, h = rng.uniform(0.03, 0.06, 2)
            corners = [round(float(v) * size, 2) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
            rows.append(f"{patient:04d}_{visit}.png," + ",".join(map(str, corners)) + extra.format(patient=patient))
    path.write_text("\n".join(rows) + "\n")
    return path


# --- demo, preview ---
def test_demo_trains_and_writes_a_picture(weights, tmp_path, capsys):
    assert main(["demo", "--weights", weights, "--out", str(tmp_path / "d"), "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "drawn phantoms of a chest, not X-rays" in out
    assert re.search(r"No Finding +216 +72 +288\n", out) and re.search(r"Nodule +24 +72 +96\n", out)
    assert "Trained 2 batches of 32" in out and "images/s of 32 px" in out and "not a medical device" in out
    with Image.open(tmp_path / "d" / "demo.png") as picture:
        assert "synthetic" in picture.text["carim_aug"].lower()


def test_demo_moves_no_global_random_state_and_repeats(weights, tmp_path, capsys):
    before = torch.random.get_rng_state()
    pictures, losses = [], []
    for name in "ab":
        main(["demo", "--weights", weights, "--out", str(tmp_path / name), "--batches", "1", "--seed", "3"])
        pictures.append((tmp_path / name / "demo.png").read_bytes())
        losses.append(re.search(r"Loss.*", capsys.readouterr().out)[0])
    assert pictures[0] == pictures[1] and losses[0] == losses[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_preview_without_real_images(weights, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert main(["preview", "--weights", weights, "--out", str(path), "--n", "2"]) == 0
    assert "2 rows, no real images" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.text["carim_aug"].startswith("All synthetic; ")


def test_preview_with_a_folder_of_images(weights, tmp_path, capsys):
    (tmp_path / "films" / "more").mkdir(parents=True)
    Image.new("L", (60, 50), 90).save(tmp_path / "films" / "a.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "films" / "more" / "b.jpg")
    (tmp_path / "films" / "notes.txt").write_text("no image")
    out = tmp_path / "sheet.png"
    assert main(["preview", "--weights", weights, "--images", str(tmp_path / "films"), "--out", str(out)]) == 0
    assert "6 rows, 2 real images" in capsys.readouterr().out


def test_preview_with_chestxray14(weights, tmp_path, capsys, real_data):
    out = tmp_path / "sheet.png"
    assert main(["preview", "--weights", weights, "--data", str(real_data), "--out", str(out), "--n", "2"]) == 0
    assert "2 rows, 2 real images" in capsys.readouterr().out


# --- info ---
def test_info_as_json_tells_what_the_weights_are(weights, capsys):
    assert main(["info", "--weights", weights, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    generator = NoduleGenerator.from_pretrained(weights)
    assert facts["weights"]["architecture"] == "tiny"
    assert facts["weights"]["sha256"] == generator.weights_hash
    assert facts["weights"]["parameters"] == sum(p.numel() for p in generator.parameters())
    assert facts["weights"]["value range"] == [-1, 1]
    assert facts["weights"]["training data"] == "nothing"
    assert facts["weights"]["recipe"] == {"images": 0} and facts["weights"]["git commit"] == "abc"
    prior = LocationPrior.bundled()
    assert facts["prior"]["boxes"] == prior.n_boxes and facts["prior"]["patients"] == prior.n_patients
    assert prior.size_bounds[0] < facts["prior"]["median size"] < prior.size_bounds[1]
    assert facts["terms"]["notice"] == "Research use; not a medical device."


def test_info_in_words_has_the_same_facts(weights, capsys):
    main(["info", "--weights", weights])
    out = capsys.readouterr().out
    assert "architecture  tiny" in out and "training data nothing" in out and "not a medical device" in out


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and re.fullmatch(r"carim-aug \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# --- fit-prior ---
def test_fit_prior_writes_a_prior_that_can_be_used(weights, tmp_path, capsys):
    boxes = write_boxes(tmp_path / "boxes.csv")
    path = tmp_path / "new" / "prior.safetensors"
    assert main(["fit-prior", str(boxes), "--out", str(path), "--image-size", "512"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Held out by patient \(5 folds\): log density -?\d+\.\d{3} \+- \d", out)
    prior = LocationPrior.load(path)
    assert (prior.n_boxes, prior.n_patients) == (16, 8) and "boxes.csv" in prior.description
    assert main(["info", "--weights", weights, "--prior", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prior"]["boxes"] == 16


def test_fit_prior_draws_a_picture_where_matplotlib_is(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    boxes = write_boxes(tmp_path / "boxes.csv", 3)
    main(["fit-prior", str(boxes), "--out", str(tmp_path / "p.safetensors"), "--image-size", "512"])
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_fit_prior_names_the_extra_where_matplotlib_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    boxes = write_boxes(tmp_path / "boxes.csv", 2)
    assert main(["fit-prior", str(boxes), "--out", str(tmp_path / "p.safetensors"), "--image-size", "512"]) == 0
    assert "carim-aug[eval]" in capsys.readouterr().out and not (tmp_path / "p.png").exists()


def test_fit_prior_leaves_out_the_patients_of_the_splits(tmp_path, capsys):
    boxes = write_boxes(tmp_path / "boxes.csv", 8)
    split = tmp_path / "split.csv"
    # One image names the patient: both images of patient 0 and of patient 1 are left out.
    split.write_text("Image Index,split\n0000_0.png,val\n0001_1.png,test\n0002_0.png,train\n")
    path = tmp_path / "p.safetensors"
    words = ["fit-prior", str(boxes), "--out", str(path), "--image-size", "512", "--exclude-split", str(split)]
    assert main(words) == 0
    assert "4 of 16 images left out" in capsys.readouterr().out
    assert LocationPrior.load(path).n_patients == 6
    assert main([*words, "test"]) == 0
    assert "2 of 16 images left out" in capsys.readouterr().out
    assert main([*words, "tset"]) == 2
    assert "got 'tset'" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["Bbox [x,y,w,h]", "x,y,w,h"])
def test_published_tables_are_read_in_both_styles(tmp_path, header):
    path = tmp_path / "BBox.csv"
    path.write_text(
        f"Image Index,Finding Label,{header}\n00000007_000.png,Nodule,300,400,50,60\n"
        "00000007_001.png,Nodule,100,200,30,30\n00000007_001.png,Mass,1,2,300,300\n00000008_000.png,Mass,1,2,300,300\n"
    )
    boxes, patients = read_patients_boxes(path, "Nodule", 1024)
    assert boxes["00000007_000.png"].tolist() == [[300, 400, 350, 460]]
    assert patients == {"00000007_000.png": "00000007", "00000007_001.png": "00000007"}
    assert list(read_patients_boxes(path, "Mass", 1024)[0]) == ["00000007_001.png", "00000008_000.png"]
    with pytest.raises(ValueError, match="--image-size must be 1024"):
        read_patients_boxes(path, "Nodule", 512)
    with pytest.raises(DataError, match="no box of 'Hernia'; findings there: Mass, Nodule"):
        read_patients_boxes(path, "Hernia", 1024)


def test_a_patient_column_counts_more_than_the_file_name(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("image,x1,y1,x2,y2,patient\na_1.png,1,2,3,4,P\nb_1.png,1,2,3,4,P\nc_1.png,1,2,3,4,\nd.png,,,,,Q\n")
    boxes, patients = read_patients_boxes(path, "Nodule", 64)
    assert patients == {"a_1.png": "P", "b_1.png": "P", "c_1.png": "c"}
    assert boxes["a_1.png"].tolist() == [[1, 2, 3, 4]]


def test_a_finding_column_chooses_the_boxes(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("image,x1,y1,x2,y2,finding\na.png,1,2,3,4,Nodule\na.png,5,6,7,8,Mass\n")
    assert read_patients_boxes(path, "Mass", 64)[0]["a.png"].tolist() == [[5, 6, 7, 8]]


def test_held_out_density_of_boxes_alike_is_higher_than_of_boxes_apart():
    rng = np.random.default_rng(1)

    def boxes(spread: float) -> list[torch.Tensor]:
        centres = np.array([0.3, 0.4]) + spread * rng.uniform(-1, 1, (20, 2))
        return [torch.tensor([[x - 0.02, y - 0.02, x + 0.02, y + 0.02]]).double() * 100 for x, y in centres]

    def density(images: list[torch.Tensor]) -> float:
        return float(re.search(r"log density (-?\d+\.\d+)", held_out(images, [str(i) for i in range(20)], 100))[1])

    assert density(boxes(0.01)) > density(boxes(0.1))


def test_one_patient_alone_cannot_be_held_out():
    box = torch.tensor([[28.0, 38.0, 32.0, 42.0]]).double()
    assert held_out([box, box], ["a", "a"], 100) == "Held out: nothing, for all boxes are of one patient."


# --- errors ---
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "--weights", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["preview", "--n", "0"], "--n must be at least 1, got 0"),
        (["demo", "--batches", "0"], "--batches must be at least 1, got 0"),
        (["fit-prior", "/no/such.csv", "--out", "p.safetensors"], "/no/such.csv: no such file"),
        (["fit-prior", "/no/such.csv", "--out", "p.npz"], "--out must end with .safetensors, got 'p.npz'"),
        (["fit-prior", "x.csv", "--out", "p.safetensors", "--image-size", "0"], "--image-size must be at least 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, said, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("carim-aug: error: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "{tmp}/none"], "no such folder"),
        (["--images", "{tmp}"], "no image in this folder"),
        (["--data", "{tmp}"], "Data_Entry_2017"),
        (["--out", "sheet.jpg"], "path must end with .png"),
        (["--prior", "{tmp}/none.safetensors"], "none.safetensors"),
    ],
)
def test_preview_says_what_is_wrong(weights, tmp_path, words, said, capsys):
    assert main(["preview", "--weights", weights, "--n", "1", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["dance"], ["preview", "--data", "a", "--images", "b"]])
def test_words_that_make_no_sense_stop_with_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: carim-aug" in capsys.readouterr().err


def test_module_runs_and_imports_nothing_optional():
    code = (
        "import sys, carim_aug.tools.cli\n"
        "print(sorted({'matplotlib', 'scipy', 'sklearn', 'train'} & set(sys.modules)))\n"
        "sys.argv = ['carim-aug', '--version']\n"
        "import runpy; runpy.run_module('carim_aug', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[]" and done.stdout.splitlines()[1].startswith("carim-aug ")
