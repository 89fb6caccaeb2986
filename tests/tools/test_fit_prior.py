"""Fitting a prior from the command line: tables in three styles, patients left out, held-out density, file, picture."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from carim_aug import LocationPrior
from carim_aug.data import DataError
from carim_aug.tools.cli import main
from carim_aug.tools.fit_prior import held_out_density, read_patients_boxes


@pytest.fixture
def table(tmp_path) -> Path:
    """Two images with a box each for each of 8 patients, in the lungs of 512-pixel images."""
    rng = np.random.default_rng(0)
    rows = ["image,x1,y1,x2,y2"]
    for image in range(16):
        x, y = rng.choice([0.3, 0.7]) + rng.normal(0, 0.03), 0.4 + rng.normal(0, 0.05)
        w, h = rng.uniform(0.03, 0.06, 2)
        corners = [round(float(v) * 512, 2) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        rows.append(f"{image // 2:04d}_{image % 2}.png," + ",".join(map(str, corners)))
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def fit(table: Path, *more: str) -> tuple[int, Path]:
    out = table.parent / "new" / "prior.safetensors"
    return main(["fit-prior", str(table), "--out", str(out), "--image-size", "512", *more]), out


@pytest.mark.train
def test_it_writes_a_prior_that_can_be_used_and_a_picture_where_matplotlib_is(table, capsys, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        code, path = fit(table)
    assert code == 0 and "carim-aug[eval]" in capsys.readouterr().out
    assert path.is_file() and not path.with_suffix(".png").exists()
    pytest.importorskip("matplotlib")
    code, path = fit(table)
    out = capsys.readouterr().out
    assert code == 0 and re.search(r"Held out by patient \(5 folds\): log density -?\d+\.\d{3} \+- \d", out)
    prior = LocationPrior.load(path)
    assert (prior.n_boxes, prior.n_patients) == (16, 8) and "boxes.csv" in prior.description
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert main(["info", "--prior", str(path)]) == 0
    assert re.search(r"boxes +16\n +patients +8\n", capsys.readouterr().out)


@pytest.mark.train
def test_it_leaves_out_the_patients_of_the_splits(table, capsys):
    split = table.with_name("split.csv")
    # One image names the patient: both images of patient 0 and of patient 1 are left out.
    split.write_text("Image Index,split\n0000_0.png,val\n0001_1.png,test\n0002_0.png,train\n")
    code, path = fit(table, "--exclude-split", str(split))
    assert code == 0 and "4 of 16 images left out" in capsys.readouterr().out
    assert LocationPrior.load(path).n_patients == 6
    assert fit(table, "--exclude-split", str(split), "test")[0] == 0
    assert "2 of 16 images left out" in capsys.readouterr().out
    assert fit(table, "--exclude-split", str(split), "tset")[0] == 2
    assert "--exclude-split must name splits among train, val, test, got 'tset'" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match="--image-size must be 1024 .* got 512"):
        read_patients_boxes(path, "Nodule", 512)
    with pytest.raises(DataError, match="no box of 'Hernia'; findings there: Mass, Nodule"):
        read_patients_boxes(path, "Hernia", 1024)


def test_a_patient_column_counts_more_than_the_file_name_and_a_finding_column_chooses(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("image,x1,y1,x2,y2,patient\na_1.png,1,2,3,4,P\nb_1.png,1,2,3,4,P\nc_1.png,1,2,3,4,\nd.png,,,,,Q\n")
    boxes, patients = read_patients_boxes(path, "Nodule", 64)
    assert patients == {"a_1.png": "P", "b_1.png": "P", "c_1.png": "c"} and boxes["a_1.png"].tolist() == [[1, 2, 3, 4]]
    path.write_text("image,x1,y1,x2,y2,finding\na.png,1,2,3,4,Nodule\na.png,5,6,7,8,Mass\n")
    assert read_patients_boxes(path, "Mass", 64)[0]["a.png"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.train
def test_held_out_density_of_boxes_alike_is_higher_than_of_boxes_apart():
    rng, densities = np.random.default_rng(1), []
    for spread in (0.01, 0.1):
        centres = np.array([0.3, 0.4]) + spread * rng.uniform(-1, 1, (20, 2))
        boxes = [torch.tensor([[x - 0.02, y - 0.02, x + 0.02, y + 0.02]]).double() * 100 for x, y in centres]
        text = held_out_density(boxes, [str(i) for i in range(20)], 100)
        densities.append(float(re.search(r"log density (-?\d+\.\d+)", text)[1]))
    assert densities[0] > densities[1]
    assert held_out_density(boxes[:2], ["a", "a"], 100) == "Held out: nothing, for all boxes are of one patient."
