"""The command line: what each command prints and writes, and one line in place of a traceback when it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from carim_aug import LocationPrior, WholeImageGenerator
from carim_aug.data import ChestXray14
from carim_aug.ops.precision import precision_of
from carim_aug.tools.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.train
def test_demo_trains_draws_repeats_and_moves_no_global_random_state(weights, tmp_path, capsys):
    before, pictures, losses = torch.random.get_rng_state(), [], []
    for name in "ab":
        words = ["--out", str(tmp_path / name), "--batches", "2", "--seed", "3"]
        assert main(["demo", "--weights", weights, *words]) == 0
        out = capsys.readouterr().out
        losses.append(re.search(r"Loss.*", out)[0])
        pictures.append((tmp_path / name / "demo.png").read_bytes())
    assert pictures[0] == pictures[1] and losses[0] == losses[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    made = int(re.search(r"Nodule +24 +(\d+) +(\d+)\n", out)[1])
    assert made > 0 and re.search(rf"No Finding +216 +0 +{216 - made}\n", out) and f"{24 + made}\n" in out
    for said in (
        "drawn phantoms of a chest, not X-rays",
        "Trained 2 batches of 32",
        "images/s of 32 px",
        "not a medical",
    ):
        assert said in out
    with Image.open(tmp_path / "a" / "demo.png") as picture:
        assert "synthetic" in picture.text["carim_aug"].lower()


def test_preview_and_export_take_the_same_data_and_options(weights, tmp_path, capsys, phantom_data):
    for name in ("train/neg/a.png", "train/neg/b.png", "train/neg/c.png", "train/pos/d.png", "val/neg/e.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (60, 50), 90).save(path)
    folders = ["--data", str(tmp_path / "images"), "--normal", "neg"]
    more = [
        "--weights",
        weights,
        "--placement",
        "prior",
        "--strength",
        "1",
        "3",
        "--gate",
        "0.001",
        "--seed",
        "3",
        "--n",
        "2",
    ]
    for data, where, said in (
        ([], "no", ""),
        (folders, "2", f"Backgrounds: 3 normal images in {tmp_path / 'images'}: train/neg\n"),
        ([*folders, "--split", "val"], "1", "Backgrounds: 1 normal images"),
        (["--data", str(phantom_data)], "2", f"Backgrounds: 16 normal images in {phantom_data}: images\n"),
    ):
        out = tmp_path / "sheet.png"
        assert main(["preview", *more, *data, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(said) and f"2 rows, {where} real images" in printed
        with Image.open(out) as picture:
            about = picture.text["carim_aug"]
        assert about.startswith("All synthetic but the real backgrounds; " if data else "All synthetic; ")
        assert "seed 3, strength 1 to 3" in about
    assert main(["export", *more, *folders, "--out", str(tmp_path / "out"), "--negatives", "1"]) == 0
    printed = capsys.readouterr().out
    for said in ("Backgrounds: 3 normal images", "1 of real images as they are", "real images: 1 in val/images."):
        assert said in printed
    settings = json.loads((tmp_path / "out" / "synthetic.json").read_text())["settings"]
    wanted = {"placement": "prior", "strength": [1.0, 3.0], "negatives": 1, "seed": 3, "n": 2}
    assert wanted.items() <= settings.items() and settings["gates"] == ["contrast from 0.001 to inf in 8 tries"]


def test_info_has_machine_weights_prior_and_terms_as_json_and_in_words(weights, capsys):
    assert main(["info", "--weights", weights, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, reason = precision_of(device)
    machine = {"device": device, "dtype='auto'": str(dtype), "why": reason}
    assert machine.items() <= facts["carim-aug"].items()
    generator, prior = WholeImageGenerator.from_pretrained(weights), LocationPrior.bundled()
    wanted = {"architecture": "tiny", "format": "carim_aug.generator", "image size": 32, "value range": [-1, 1]}
    wanted |= {"training data": "nothing", "recipe": {"images": 0}, "git commit": "abc"}
    wanted |= {"sha256": generator.weights_hash, "parameters": sum(p.numel() for p in generator.network.parameters())}
    assert wanted.items() <= facts["weights"].items()
    assert facts["prior"]["boxes"] == prior.n_boxes and facts["prior"]["patients"] == prior.n_patients
    assert prior.size_bounds[0] < facts["prior"]["median size"] < prior.size_bounds[1]
    assert facts["terms"]["notice"] == "Research use; not a medical device."
    main(["info", "--weights", weights])
    out = capsys.readouterr().out
    assert "architecture  tiny" in out and "training data nothing" in out and reason in out


def test_export_says_what_it_wrote_and_refuses_by_name(weights, tmp_path, phantom_data, capsys):
    out = str(tmp_path / "out")
    words = ["export", "--weights", weights, "--out", out, "--data", str(phantom_data), "--insertion", "graft"]
    assert main([*words, "--split", "val"]) == 0
    printed = capsys.readouterr().out
    for said in ("8 synthetic images", "split val", "images/s", "assert_real_only", "images/*.png"):
        assert said in printed
    assert len(ChestXray14(out, split="val")) == 8
    for more, message in (
        (["--split", "train"], "must be an export of the same settings"),
        (["--split", "test"], "the test split is for evaluation"),
        (["--insertion", "whole"], "--insertion must be graft with --data and whole without, got whole"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "--weights", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["demo", "--batches", "0"], "--batches must be at least 1, got 0"),
        (["preview", "--n", "0"], "--n must be at least 1, got 0"),
        (["preview", "--data", "{tmp}/none"], "none: no such folder"),
        (["preview", "--data", "{tmp}"], "no image in this folder"),
        (
            ["preview", "--strength", "1", "2", "3"],
            "strength must be a number in (0, 4] or (least, most), got (1.0, 2.0",
        ),
        (["preview", "--split", "test", "--data", "{tmp}"], "split must be train or val, got 'test'"),
        (["preview", "--normal", "a"], "--normal must be names of folders in --data, got a: images without nodules"),
        (["export", "--out", "{tmp}/out", "--n", "1", "--gate"], "--gate must be given with --data, for grafts"),
        (["export", "--out", "{tmp}/out", "--normal", "3"], "--data, got 3: images without nodules are --negatives N"),
        (["preview", "--n", "1", "--out", "sheet.jpg"], "path must end with .png, got 'sheet.jpg'"),
        (["preview", "--prior", "{tmp}/none.safetensors"], "none.safetensors"),
        (["fit-prior", "/no/such.csv", "--out", "p.safetensors"], "/no/such.csv: no such file"),
        (["fit-prior", "/no/such.csv", "--out", "p.npz"], "--out must end with .safetensors, got 'p.npz'"),
        (["fit-prior", "x.csv", "--out", "p.safetensors", "--image-size", "0"], "--image-size must be at least 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, said, weights, tmp_path, capsys):
    more = ["--weights", weights] if words[0] in ("preview", "export") else []
    assert main([word.format(tmp=tmp_path) for word in words] + more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("carim-aug: error: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("words", [[], ["dance"], ["export"], ["fit-prior", "boxes.csv"]])
def test_words_that_make_no_sense_stop_with_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: carim-aug" in capsys.readouterr().err


@pytest.mark.train
def test_module_runs_and_imports_nothing_optional():
    code = (
        "import sys, carim_aug.tools.cli\n"
        "print(sorted({'matplotlib', 'scipy', 'sklearn', 'train'} & set(sys.modules)))\n"
        "sys.argv = ['carim-aug', '--version']\n"
        "import runpy; runpy.run_module('carim_aug', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[\]\ncarim-aug \d+\.\d+\.\d+\S*\n", done.stdout)
