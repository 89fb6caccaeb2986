"""The report on drawn chests: every section from small runs, what is cached, tables, pages."""

import argparse
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks.throughput import generator_size, plain_loss, shared_loss

from carim_aug.generators.whole import WholeImageGenerator
from carim_aug.ops.findings import FINDINGS
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import PRESETS as ENCODERS
from train.classifier.encoders import train_encoders
from train.common import cache
from train.common.run import RunError
from train.gan.discriminators import ScaleDiscriminator
from train.metrics.psnr import psnr
from train.reproduction.baselines.presets import PRESETS as BASELINES
from train.reproduction.baselines.source import ClassGenerator, ClassNetworks
from train.reproduction.report.__main__ import SECTIONS, build_parser, report
from train.reproduction.report.context import name_of
from train.reproduction.report.html import page
from train.reproduction.table1 import signal_to_noise
from train.reproduction.tables import number, table

ARMS = ("DS2", "DS4-graft", "duplicated")


def save_table2(folder: Path) -> None:
    """What `train.reproduction.table2` leaves of three arms and two seeds: scores by chance."""
    generator = torch.Generator().manual_seed(0)
    nodule = [i % 2 for i in range(12)]
    same = {"preset": {"training": {"size": 32, "images": 24}}, "start": None, "precision": "32-true", "split": {}}
    counts = {name: {"real": 8, "synthetic": 0, "total": 8} for name in ("No Finding", "Nodule")}
    for arm in ARMS:
        for seed in range(2):
            logits = torch.randn(12, generator=generator).tolist()
            images = {"names": [f"{i}.png" for i in range(12)], "patients": list(range(12)), "nodule": nodule}
            facts = {"arm": arm, "seed": seed, "weights": {}, "counts": counts, "git_commit": "0" * 40}
            path = folder / f"{arm}-{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({**same, **facts, "images": {"val": {**images, "logits": logits}}}))


@pytest.fixture(scope="module")
def options(phantom_data, templates, tmp_path_factory):
    """Everything that the report reads: encoders, two models and a stage, two classifiers, scores of Table 2."""
    folder = tmp_path_factory.mktemp("report")
    train_encoders(ENCODERS["tiny"], data=phantom_data, out=folder / "encoders")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dcgan = ClassGenerator(ClassNetworks(BASELINES["tiny"].baselines["dcgan"].config))
        dcgan.save_pretrained(folder / "table1" / "dcgan" / "export", recipe={"images_seen": 96})
        for name, stage in (("table1/carim", 2), ("stage1", 1)):
            generator = WholeImageGenerator("tiny")
            generator.save_pretrained(folder / name / "export", recipe={"stage": stage, "images_seen": 256})
        for name in ("used", "unseen"):
            ChestClassifier(FINDINGS, size=32).save(folder / f"{name}.safetensors")
    save_table2(folder / "table2")
    arguments = ["--preset", "tiny", "--data", phantom_data, "--ct-nodules", templates, "--device", "cpu"]
    arguments += ["--weights", folder / "stage1" / "export", "--classifier", folder / "used.safetensors"]
    arguments += ["--table1", folder / "table1", "--table2", folder / "table2", "--table2-part", "val"]
    arguments += ["--classifiers", *(f"{name}={folder / name}.safetensors" for name in ("used", "unseen"))]
    arguments += ["--encoders", folder / "encoders", "--out", folder / "out"]
    return build_parser().parse_args([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def figures(options):
    return report(options)


def report_with(options, **values):
    return report(argparse.Namespace(**{**vars(options), **values}))


@pytest.mark.train
def test_report_has_every_figure_with_its_interval(figures):
    weights = figures["weights"]["stage1"]
    assert set(weights["realism"]) == {"normal, findings", "normal, contrast", "nodule, findings", "nodule, contrast"}
    for row in weights["realism"].values():
        assert row["fid"]["value"] > 0 and row["fid_floor"]["value"] > 0
        assert row["kid_all"]["low"] <= row["kid_all"]["high"]
    assert weights["realism"]["normal, findings"]["n"] == 8  # half of 16 patients
    assert set(weights["repeats"]) == set(weights["realism"]) | {"normal, pixels", "nodule, pixels"}
    assert weights["pairs"]["prior"]["n"] == 12 and weights["pairs"]["random"]["n"] == 6
    assert weights["contrasts"]["real"]["official boxes"]["n"] == 6
    assert 0 <= weights["maps"]["inside"]["value"] <= 1
    names = {"real boxes", "drawn blob", "CT nodules superimposed", "grafts of stage1"}
    assert set(figures["patches"]["learnt"]) == names
    assert set(figures["patches"]["hits"]) == names | {"images of stage1", "images without a mask of stage1"}
    assert figures["speed"]["tiny"]["d_step_gain"] > 0 and figures["speed"]["tiny"]["carim_share"] > 0


@pytest.mark.train
def test_every_table_and_figure_stands_beside_those_of_ann(figures, options):
    found = figures["reproduction"]
    assert list(found["table1"]) == ["dcgan", "carim", "stage1"] and found["table1"]["carim"]["images_seen"] == 256
    assert set(found["figure7"]["classifiers"]) == {"used", "unseen"}
    assert found["figure6"]["carim"]["places"] and not found["figure6"]["dcgan"]["places"]
    assert 0 < found["figure6"]["carim"]["energy_chance"]["value"] < 0.2
    text = (Path(options.out) / "report.md").read_text()
    assert "stage1" in text and "stage 1, 256 images" in text and "## Memorisation" in text
    for title in ("Table 1", "Table 1, KID", "Table 1 of Ann (2021)", "Table 2", "Table 2 of Ann (2021)"):
        assert f"### {title}\n" in text
    for row in (
        "| CARIM-cGAN | 55.29 | 53.13 | 67.52 | 66.45 | 19.39 | 18.32 |",
        "| DS4 | as printed | 0.6208 | 0.5898 | 0.6843 | 0.7930 | 0.6765 | 0.6371 |",
        "real against real, other patients",
    ):
        assert row in text


@pytest.mark.train
def test_files_hold_tables_and_pictures(figures, options):
    out = Path(options.out)
    blocks = (out / "report.md").read_text().strip().split("\n\n")
    widths = [{line.count(" | ") for line in block.split("\n")} for block in blocks if block.startswith("|")]
    assert len(widths) >= 18 and all(len(width) == 1 for width in widths)
    html = (out / "report.html").read_text()
    assert html.count("<table>") == len(widths) and html.count("src='data:image/png;base64,") == 3 + 5
    assert all(f"<h3>Figure {n}: " in html for n in range(3, 8))
    assert json.loads((out / "figures.json").read_text())["test"] == ["val"]
    with (out / "table-2.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["arm", "data"] and [row[0] for row in rows[1:]] == sorted(ARMS)
    assert all(len(row) == len(rows[0]) for row in rows)
    assert len(list(out.glob("*.csv"))) == 10


@pytest.mark.train
def test_a_second_report_computes_nothing_and_says_the_same(figures, options, capsys):
    paths = [*Path(options.out).glob("figures/*"), Path(options.out) / "report.md"]
    before = [path.read_bytes() for path in paths]
    assert json.dumps(report(options), sort_keys=True) == json.dumps(figures, sort_keys=True)
    assert [path.read_bytes() for path in paths] == before
    assert "0 figures computed" in capsys.readouterr().out


@pytest.mark.train
@pytest.mark.parametrize(("module", "count"), [("fid.py", 0), ("graft.py", 10)])
def test_figures_are_computed_anew_when_a_module_that_they_import_changes(
    module, count, figures, options, monkeypatch, capsys
):
    digest = cache.digest_files

    def digest_other_code(paths):
        paths = list(paths)
        return digest(paths) + ("changed" if any(path.name == module for path in paths) else "")

    monkeypatch.setattr(cache, "digest_files", digest_other_code)
    again = report_with(options, sections=["patches"])
    assert f"{count} figures computed" in capsys.readouterr().out
    assert again["patches"] == figures["patches"]


@pytest.mark.train
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoders": "."}, "--encoders must hold findings.safetensors"),
        ({"weights": ["", ""]}, "--weights must be different folders"),
        ({"table1": "."}, "--table1 must be a folder of train.reproduction.baselines"),
        ({"figures_of": "best"}, r"--figures-of must be one of \['dcgan'.* got 'best'"),
        ({"classifiers": ["used"]}, "--classifiers must be NAME=FILE each, got 'used'"),
    ],
)
def test_what_is_not_there_is_named(values, message, figures, options):
    with pytest.raises(RunError, match=message):
        report_with(options, sections=["reproduction"], **values)


def test_all_sections_of_the_bundled_weights_are_made_by_default():
    options = build_parser().parse_args(["--data", "a", "--encoders", "b"])
    assert options.sections == list(SECTIONS) and options.weights == [""]
    assert name_of("") == "bundled" and name_of("runs/fast128/export") == "fast128"


def test_numbers_have_three_digits():
    texts = [number(value) for value in (0.93749, 12.345, 1234.5, 0, 2.5e-7, math.nan)]
    assert texts == ["0.937", "12.3", "1234", "0", "2.5e-07", "-"]


def test_psnr_of_table_1_is_the_mean_over_all_pairs_with_an_interval_about_it():
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1 for n in (5, 7))
    figure = signal_to_noise(generated, real, draws=50)
    pairs = [psnr((g[None] + 1) / 2, (r[None] + 1) / 2)[0, 0] for g in generated for r in real]
    assert figure["value"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-9)
    assert figure["low"] < figure["value"] < figure["high"]


def test_page_escapes_and_keeps_cells():
    text = "# A\n\n" + table("a|b", [["<x>", "1"]])
    assert "<h1>A</h1>" in page(text, {}) and "<tr><td>&lt;x&gt;</td><td>1</td></tr>" in page(text, {})


def test_the_speed_is_of_networks_that_do_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        d = ScaleDiscriminator(32, width=8, batch_norm=False).eval()  # spectral norm's vectors stay as they are
    real, fake = torch.rand(2, 6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    plain = plain_loss(d, real, fake, classes)
    assert shared_loss(d, real, fake, classes).item() == pytest.approx(plain.item(), rel=1e-5)
    size = generator_size("tiny")
    assert size["parameters_m"] == sum(p.numel() for p in WholeImageGenerator("tiny").network.parameters()) / 1e6
    assert 0 < size["gflop"] < generator_size("fast128")["gflop"] < 2
