"""The source's tables and figures in the report, on drawn chests (METHOD 8)."""

import csv
import json
from pathlib import Path

import pytest
import torch
from test_table2 import TINY
from tiny import generator

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.generators.checkpoint import BUNDLED
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import PRESETS as ENCODERS
from train.classifier.encoders import train_encoders
from train.common.splits import read_filmset
from train.metrics.psnr import psnr
from train.reproduction.baselines.command import MODELS, PRESETS, train_model
from train.reproduction.report.building import parser, report
from train.reproduction.table1 import load_model, signal_to_noise
from train.reproduction.table2.arms import Sources
from train.reproduction.table2.training import run_arm


@pytest.fixture(scope="module")
def options(phantom_data, templates, tmp_path_factory):
    """Saved runs of everything the report reads: three models, two arms, two classifiers, encoders."""
    folder = tmp_path_factory.mktemp("reproduction")
    train_encoders(ENCODERS["tiny"], data=phantom_data, out=folder / "encoders")
    for number, name in enumerate(("used", "unseen")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            ChestClassifier(FINDINGS, size=32).save(folder / f"{name}.safetensors")
    common = {"data": phantom_data, "out": folder / "table1", "ct_nodules": templates, "precision": "32-true"}
    for name in ("dcgan", "carim-without", "carim"):
        train_model(name, PRESETS["tiny"], classifier=folder / "used.safetensors", **common)
    generator("tiny").save_pretrained(folder / "stage1" / "export", recipe={"stage": 1, "images_seen": 256})
    parts = {part: read_filmset(phantom_data, part, 32) for part in ("train", "val")}
    for seed in range(2):
        for name in TINY.arms:
            sources = Sources(BUNDLED, BUNDLED, templates)
            run_arm(name, parts, sources, TINY, start=None, out=folder / "table2", seed=seed)
    arguments = ["--preset", "tiny", "--data", phantom_data, "--device", "cpu", "--sections", "reproduction"]
    arguments += ["--weights", folder / "stage1" / "export", "--encoders", folder / "encoders"]
    arguments += ["--table1", folder / "table1", "--table2", folder / "table2", "--table2-part", "val"]
    arguments += ["--classifiers", *(f"{name}={folder / name}.safetensors" for name in ("used", "unseen"))]
    return parser().parse_args([str(a) for a in [*arguments, "--out", folder / "out"]])


@pytest.fixture(scope="module")
def figures(options):
    return report(options)["reproduction"]


def test_every_table_and_figure_stands_beside_the_sources(figures, options):
    assert list(figures["table1"]) == ["dcgan", "carim-without", "carim", "stage1"]
    assert figures["table1"]["carim"]["images_seen"] == 96
    assert set(figures["figure7"]["classifiers"]) == {"used", "unseen"}
    text = (Path(options.out) / "report.md").read_text()
    for title in ("Table 1", "Table 1, KID", "Table 1 of the source", "Table 2", "Table 2 of the source"):
        assert f"### {title}\n" in text
    for row in (
        "| CARIM-cGAN | 55.29 | 53.13 | 67.52 | 66.45 | 19.39 | 18.32 |",
        "| DS4 | as printed | 0.6208 | 0.5898 | 0.6843 | 0.7930 | 0.6765 | 0.6371 |",
        "real against real, other patients",
    ):
        assert row in text
    html = (Path(options.out) / "report.html").read_text()
    assert all(f"<h3>Figure {n}: " in html for n in range(3, 8))
    assert html.count("<img") == 5


def test_figure_6_tells_who_knows_the_mask(figures):
    assert figures["figure6"]["carim"]["places"] and not figures["figure6"]["dcgan"]["places"]
    assert 0 < figures["figure6"]["carim"]["energy_chance"]["value"] < 0.2


def test_tables_are_csv_files_with_the_same_cells(figures, options):
    out = Path(options.out)
    with (out / "table-2.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["arm", "data"]
    assert [row[0] for row in rows[1:]] == sorted(TINY.arms)
    assert all(len(row) == len(rows[0]) for row in rows)
    assert len(list(out.glob("*.csv"))) == 10


def test_a_second_report_computes_nothing_and_says_the_same(figures, options, capsys):
    before = (Path(options.out) / "report.md").read_text()
    again = report(options)["reproduction"]
    assert json.dumps(again, sort_keys=True) == json.dumps(figures, sort_keys=True)
    assert (Path(options.out) / "report.md").read_text() == before
    assert "0 figures computed" in capsys.readouterr().out


def test_what_is_not_there_is_named(options, tmp_path):
    values = vars(options)
    with pytest.raises(
        ValueError, match="--table1 must be a folder of train.reproduction.baselines.command with trained models"
    ):
        report(type(options)(**{**values, "table1": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"--figures-of must be one of \['dcgan'"):
        report(type(options)(**{**values, "figures_of": "best"}))


def test_models_of_both_kinds_are_loaded_by_what_their_files_say(options):
    kinds = {name: type(load_model(Path(options.table1) / name / "export")).__name__ for name in ("dcgan", "carim")}
    assert kinds == {"dcgan": "ClassGenerator", "carim": "NoduleGenerator"}
    assert set(kinds) < set(MODELS)


def test_psnr_is_the_mean_over_all_pairs_with_an_interval_about_it():
    stream = torch.Generator().manual_seed(0)
    made, real = (torch.rand(n, 1, 8, 8, generator=stream) * 2 - 1 for n in (5, 7))
    told = signal_to_noise(made, real, draws=50)
    pairs = torch.stack([psnr((m[None] + 1) / 2, (r[None] + 1) / 2)[0, 0] for m in made for r in real])
    assert told["value"] == pytest.approx(float(pairs.mean()), abs=1e-9)
    assert told["low"] < told["value"] < told["high"]
