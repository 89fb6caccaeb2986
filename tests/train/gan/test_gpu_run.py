"""The whole pipeline in one command, on drawn chests: what it leaves behind, and that it goes on."""

import json

import pytest

from carim_aug import LocationPrior, NoduleGenerator
from train import gpu_run as module
from train.common.run import RunError
from train.gpu_run import SHARES, Budget, Published, gpu_run


@pytest.fixture(scope="module")
def finished(phantom_data, templates, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "run"
    settings = ("images=64", "snapshot_images=32", "grow_at=[16]")
    weights = gpu_run("tiny", data=phantom_data, ct_nodules=templates, out=out, minutes=5, settings=settings)
    return out, weights, settings


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


def test_the_same_command_leaves_a_finished_run_alone_and_goes_on_after_a_cut(
    finished, phantom_data, templates, monkeypatch
):
    out, _, settings = finished
    options = {"data": phantom_data, "ct_nodules": templates, "out": out, "minutes": 5, "settings": settings}
    before = (out / "report.json").read_bytes()
    gpu_run("tiny", **options)
    assert (out / "report.json").read_bytes() == before
    report = json.loads(before)
    del report["stages"]["evaluation"]  # cut before its end
    (out / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(module, "train_gan", None)  # no stage before it is done again
    gpu_run("tiny", **options)
    assert list(json.loads((out / "report.json").read_text())["stages"]) == list(SHARES)
    with pytest.raises(RunError, match=r"holds another recipe \(differs in \['seed'\]\)"):
        gpu_run("tiny", seed=1, **options)


def test_shares_fill_the_budget_and_what_is_left_goes_to_the_next(monkeypatch):
    assert sum(SHARES.values()) == pytest.approx(1)
    now = [0.0]
    monkeypatch.setattr("train.gpu_run.time.monotonic", lambda: now[0])
    budget = Budget(25, list(SHARES))
    assert budget.minutes("check") == pytest.approx(0.5)
    assert budget.minutes("evaluation") == pytest.approx(25)
    now[0] = 60.0
    assert budget.minutes("check") == 0 and budget.minutes("encoders") == pytest.approx(25 * 0.07 - 1)
    rest = Budget(10, ["stage2", "evaluation"])
    assert rest.minutes("stage2") == pytest.approx(10 * 0.20 / 0.26)


def test_only_better_weights_are_published_but_for_the_final_choice(tmp_path):
    published = Published(tmp_path)
    for name in "abcd":
        (tmp_path / name / "best").mkdir(parents=True)
        (tmp_path / name / "best" / "model").write_text(name)
        (tmp_path / name / "samples-000000008.png").write_bytes(name.encode())

    def there():
        return (tmp_path / "weights" / "model").read_text(), (tmp_path / "contact_sheet.png").read_text()

    published.offer(tmp_path / "a" / "best", {}, stage="1")
    assert there() == ("a", "a")
    published.offer(tmp_path / "b" / "best", {"kid": 0.3, "images": 8}, stage="1")
    assert there() == ("b", "b")
    published.offer(tmp_path / "c" / "best", {"kid": 0.4, "images": 8}, stage="1")
    assert there() == ("b", "b") and Published(tmp_path).facts["published"]["kid"] == 0.3
    published.offer(tmp_path / "d" / "best", {"kid": 0.4, "images": 8}, stage="2", final=True)
    assert there() == ("d", "d")


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(RunError, match="preset must be one of .* got 'small'"):
        gpu_run("small", data=tmp_path, ct_nodules=None, out=tmp_path / "run")
