"""The whole pipeline in one command, on drawn chests: what it leaves behind, and that it goes on."""

import json

import pytest
import torch
from PIL import Image

from carim_aug import LocationPrior, NoduleGenerator
from train import gpu_run as module
from train.common.run import RunError
from train.gpu_run import SHARES, GPURun, Published, share_out


@pytest.fixture(scope="module")
def finished(copy_data, templates, tmp_path_factory):
    torch.set_num_threads(1)
    data, out = copy_data(tmp_path_factory.mktemp("data") / "data"), tmp_path_factory.mktemp("gpu") / "run"
    (data / "images" / "00000002_000.png").unlink()
    Image.new("L", (64, 48)).save(data / "images" / "00000002_000.png")  # every stage takes images of several sizes
    settings = ("images=64", "snapshot_images=32", "grow_at=[16]")
    options = {"data": data, "ct_nodules": templates, "out": out, "minutes": 60, "settings": settings, "any_size": True}
    return out, GPURun("tiny", **options).run(), options


@pytest.mark.train
def test_every_stage_is_reported_and_the_best_weights_are_there(finished):
    out, weights, _ = finished
    report = json.loads((out / "report.json").read_text())
    assert list(report["stages"]) == list(SHARES)
    stages = report["stages"]
    assert stages["stage2"]["last"]["images"] == 128 and "Nodule" in stages["classifier"]["auc"]
    chosen = stages["evaluation"]["chosen"]
    assert report["published"] == {"stage": chosen, **{k: stages["evaluation"][chosen][k] for k in ("images", "kid")}}
    assert 0 <= stages["evaluation"][chosen]["hit"] <= 1
    generator = NoduleGenerator.from_pretrained(weights)
    assert generator.provenance["recipe"]["stage"] == int(chosen[-1])
    assert isinstance(LocationPrior.load(weights / "prior.safetensors"), LocationPrior)
    assert (out / "contact_sheet.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.train
def test_the_same_command_leaves_a_finished_run_alone_and_goes_on_after_a_cut(finished, monkeypatch):
    out, _, options = finished
    before = (out / "report.json").read_bytes()
    GPURun("tiny", **options).run()
    assert (out / "report.json").read_bytes() == before
    report = json.loads(before)
    del report["stages"]["evaluation"]  # cut before its end
    (out / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(module, "train_gan", None)  # no stage before it is done again
    GPURun("tiny", **options).run()
    assert list(json.loads((out / "report.json").read_text())["stages"]) == list(SHARES)
    with pytest.raises(RunError, match=r"holds another recipe \(differs in \['seed'\]\)"):
        GPURun("tiny", seed=1, **options)


def test_shares_fill_the_budget_and_what_is_left_goes_to_the_next(monkeypatch):
    assert sum(SHARES.values()) == pytest.approx(1)
    monkeypatch.setattr("train.gpu_run.time.monotonic", lambda: 90.0)
    ends = {name: (end - 90) / 60 for name, end in share_out(25, list(SHARES)).items()}
    assert ends["check"] == pytest.approx(0.5) and ends["encoders"] == pytest.approx(25 * 0.07)
    assert ends["evaluation"] == pytest.approx(25)
    assert share_out(10, ["stage2", "evaluation"])["stage2"] == pytest.approx(90 + 60 * 10 * 0.20 / 0.26)


def test_only_better_weights_are_published_but_for_the_final_choice(tmp_path):
    published = Published(tmp_path)
    for name in "abcd":
        (tmp_path / name / "best").mkdir(parents=True)
        (tmp_path / name / "best" / "model").write_text(name)
        (tmp_path / name / "samples-000000008.png").write_bytes(name.encode())

    def there():
        return (tmp_path / "weights" / "model").read_text(), (tmp_path / "contact_sheet.png").read_text()

    for name, figures, final, expected in (
        ("a", {}, False, "a"),
        ("b", {"kid": 0.3, "images": 8}, False, "b"),
        ("c", {"kid": 0.4, "images": 8}, False, "b"),
        ("d", {"kid": 0.4, "images": 8}, True, "d"),
    ):
        published.offer(tmp_path / name / "best", figures, stage="1", final=final)
        assert there() == (expected, expected)
        assert Published(tmp_path).facts["published"].get("kid") == {"a": None, "b": 0.3, "d": 0.4}[expected]


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(RunError, match="preset must be one of .* got 'small'"):
        GPURun("small", data=tmp_path, ct_nodules=None, out=tmp_path / "run")
