"""The report on drawn chests: figures, what is kept, tables, page."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import generator

from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import PRESETS as ENCODERS
from train.classifier.encoders import train_encoders
from train.common.cache import CODE, Kept
from train.gan.discriminators import ScaleDiscriminator
from train.gan.throughput import generator_size, plain_loss, shared_loss
from train.metrics.generator_quality import (
    Features,
    FigurePreset,
    matched_pairs,
    one_each,
    pair_figures,
    random_places,
    realism,
    repeats,
    share,
    spread,
)
from train.reproduction.report.building import parser, report
from train.reproduction.report.tables import number, page, table


@pytest.fixture(scope="module")
def options(phantom_data, templates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    train_encoders(ENCODERS["tiny"], data=phantom_data, out=folder / "encoders")
    generator("tiny").save_pretrained(folder / "stage1" / "export", recipe={"stage": 1, "images_seen": 256})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ChestClassifier(("Nodule",), size=32).save(folder / "classifier.safetensors")
    arguments = ["--preset", "tiny", "--data", phantom_data, "--ct-nodules", templates, "--device", "cpu"]
    arguments += ["--weights", folder / "stage1" / "export", "--classifier", folder / "classifier.safetensors"]
    arguments += ["--encoders", folder / "encoders", "--out", folder / "out"]
    return parser().parse_args([str(a) for a in arguments])


@pytest.fixture(scope="module")
def figures(options):
    return report(options)


def test_report_has_every_figure_with_its_interval(figures):
    weights = figures["weights"]["stage1"]
    assert set(weights["realism"]) == {"normal, findings", "normal, contrast", "nodule, findings", "nodule, contrast"}
    for row in weights["realism"].values():
        assert row["fid"]["value"] > 0 and row["fid_floor"]["value"] > 0
        assert row["kid_all"]["low"] <= row["kid_all"]["high"]
    assert weights["realism"]["normal, findings"]["n"] == 8  # half of 16 patients
    assert set(weights["repeats"]) == set(weights["realism"]) | {"normal, pixels", "nodule, pixels"}
    assert weights["pairs"]["prior"]["n"] == 16 and weights["pairs"]["random"]["n"] == 8
    assert weights["contrasts"]["real"]["official boxes"]["n"] == 6
    assert 0 <= weights["maps"]["inside"]["value"] <= 1
    names = {"real boxes", "drawn blob", "CT nodules superimposed", "grafts of stage1"}
    assert set(figures["patches"]["worth"]) == names
    films = {"films of stage1", "films without a mask of stage1"}
    assert set(figures["patches"]["hits"]) == names | films
    assert figures["speed"]["tiny"]["d_step_gain"] > 0 and figures["speed"]["tiny"]["carim_share"] > 0


def test_second_run_computes_nothing_and_says_the_same(figures, options, capsys):
    before = {path.name: path.read_bytes() for path in sorted((_out(options) / "kept").iterdir())}
    again = report(options)
    assert again["weights"] == figures["weights"] and again["patches"] == figures["patches"]
    assert {path.name: path.read_bytes() for path in sorted((_out(options) / "kept").iterdir())} == before
    assert "0 figures computed" in capsys.readouterr().out


def test_other_settings_or_other_code_are_another_figure(tmp_path, monkeypatch):
    kept, calls = Kept(tmp_path, {"data": 1}), []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    assert kept.figure("a", compute, size=1) == kept.figure("a", compute, size=1) == {"value": 1}
    assert kept.figure("a", compute, size=2) == {"value": 2}
    assert Kept(tmp_path, {"data": 2}).figure("a", compute, size=1) == {"value": 3}
    monkeypatch.setitem(CODE, "figures", ("run.py",))
    assert kept.figure("a", compute, size=1) == {"value": 4} and kept.computed == 3
    monkeypatch.undo()
    assert kept.figure("a", compute, size=1) == {"value": 1}


def test_files_hold_tables_and_pictures(figures, options):
    text = (_out(options) / "report.md").read_text()
    assert "stage1" in text and "stage 1, 256 images" in text and "## Memorisation" in text
    widths = [[line.count(" | ") for line in b.split("\n")] for b in text.strip().split("\n\n") if b.startswith("|")]
    assert len(widths) >= 8 and all(len(set(block)) == 1 for block in widths)
    html = (_out(options) / "report.html").read_text()
    assert html.count("<img") == 3 and "src='data:image/png;base64," in html and html.count("<table>") == len(widths)
    assert json.loads((_out(options) / "figures.json").read_text())["test"] == ["val"]


def test_missing_encoders_and_twice_the_same_weights_are_refused(options, tmp_path):
    values = vars(options)
    with pytest.raises(ValueError, match="must hold findings.safetensors"):
        report(type(options)(**{**values, "encoders": str(tmp_path)}))
    with pytest.raises(ValueError, match="--weights must be different folders"):
        report(type(options)(**{**values, "weights": options.weights * 2}))


def test_one_each_gives_every_patient_once_and_any_of_its_films():
    patients = torch.tensor([5, 5, 7, 9, 9, 9])
    stream = torch.Generator().manual_seed(0)
    draws = [one_each(patients, stream) for _ in range(60)]
    assert all(sorted(patients[rows].tolist()) == [5, 7, 9] for rows in draws)
    assert set(torch.cat(draws).tolist()) == set(range(6))
    assert len({tuple(patients[rows].tolist()) for rows in draws}) == 6  # the order is drawn too


def test_films_of_the_training_distribution_are_at_the_floor():
    generated, train, held_out = (
        torch.rand(n, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (100, 200, 50)
    )
    patients, preset = (torch.arange(200), torch.arange(1000, 1050)), FigurePreset(splits=10, draws=100)
    row = realism(Features(generated, train, held_out, patients), preset)
    assert row["n"] == 100 and row["fid_ratio"]["value"] == pytest.approx(1, abs=0.3)
    assert row["kid_all"]["low"] < 0 < row["kid_all"]["high"]
    assert row["kid_floor"]["low"] < 0 < row["kid_floor"]["high"]
    far = realism(Features(generated * 0.5, train, held_out, patients), preset)
    assert far["fid_ratio"]["low"] > 2 and far["kid_all"]["low"] > 0
    copies = repeats(Features(train[:50] + 0.01, train, held_out, patients), preset)
    assert copies["memorises"] and [g for g, t in copies["closest"] if g != t] == []
    assert copies["generated_to_train"]["value"] == pytest.approx(0.04, abs=1e-3)
    assert copies["held_out_to_train"]["low"] > 0.5
    assert not repeats(Features(generated, train, held_out, patients), preset)["memorises"]


def test_pairs_of_a_generator_that_does_what_it_is_told():
    preset = FigurePreset(pairs=12, moved=12, batch=5)
    pairs = matched_pairs(generator("tiny"), LocationPrior.bundled(), preset)

    def render(noise, boxes, shape="box"):
        x, y = (torch.arange(32) + 0.5)[None, None], (torch.arange(32) + 0.5)[None, :, None]
        cx, cy = ((boxes[:, i] + boxes[:, i + 2]) / 2 for i in (0, 1))
        return 0.3 * torch.exp(-((x - cx[:, None, None]) ** 2 + (y - cy[:, None, None]) ** 2))[:, None]

    pairs.render, pairs.without = render, torch.zeros_like(pairs.without)
    pairs.nodule = render(pairs.noise, pairs.boxes)
    row = pair_figures(pairs, preset)
    assert row["prior"]["hit"]["value"] == row["random"]["hit"]["value"] == 1
    assert row["equivariance"]["low"] > 0.99


def test_random_places_keep_sizes_and_stay_inside():
    boxes = torch.tensor([[4.0, 4, 10, 12], [20, 20, 31, 32]]).repeat(50, 1)
    moved = random_places(boxes, 32, torch.Generator().manual_seed(0))
    assert torch.allclose(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2], atol=1e-5)
    assert moved.min() >= 0 and moved.max() <= 32 and moved[:, 0].std() > 3


def test_shares_and_spreads_on_paper():
    # Wilson's interval of 8 in 10 is .490 to .943.
    row = share(torch.tensor([True] * 8 + [False] * 2))
    assert row["value"] == pytest.approx(0.8) and (row["low"], row["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert spread(torch.arange(5.0))["value"] == 2 and math.isnan(spread(torch.empty(0))["value"])


def test_shared_pass_asks_the_discriminator_the_same_as_three_passes():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        d = ScaleDiscriminator(32, width=8, batch_norm=False).eval()  # spectral norm's vectors stay as they are
    real, fake = torch.rand(2, 6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    plain = plain_loss(d, real, fake, classes)
    for together in (True, False):
        assert shared_loss(d, real, fake, classes, together=together).item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_generator_on_paper_has_its_size():
    figures = generator_size("tiny")
    assert figures["parameters_m"] == sum(p.numel() for p in generator("tiny").parameters()) / 1e6
    assert 0 < figures["gflop"] < generator_size("fast128")["gflop"] < 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.93749, "0.937"), (12.345, "12.3"), (1234.5, "1234"), (0, "0"), (2.5e-7, "2.5e-07"), (math.nan, "-")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_page_escapes_and_keeps_cells():
    text = "# A\n\n" + table("a|b", [["<x>", "1"]])
    assert "<h1>A</h1>" in page(text, {}) and "<tr><td>&lt;x&gt;</td><td>1</td></tr>" in page(text, {})


def _out(options):
    return Path(options.out)
