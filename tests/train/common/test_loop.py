"""The training loop: the schedule by hand, forgiven updates, the clock, the log and snapshots that fail."""

import json

import pytest
import torch

from train.common import loop as module
from train.common.loop import PATIENCE, Buffers, Loop, descend, frozen, rate_factor
from train.common.run import Run, TrainingError

GOOD, BAD = {"loss": torch.tensor(1.23456)}, {"loss": torch.tensor(float("nan")), "other": torch.tensor(0.0)}


def lines(run, name="log.jsonl"):
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def test_images_are_counted_before_and_after_each_step():
    loop, seen = Loop(None, images=20, batch=8, name="x"), []
    for images in loop:
        before = loop.images_seen
        loop.update(GOOD, True)
        seen.append((images, before, loop.images_seen))
    assert seen == [(0, 0, 8), (8, 8, 16), (16, 16, 24)]
    assert list(Loop(None, images=20, batch=8, name="x")) == [0, 8, 16]  # without update too
    assert list(Loop(None, images=20, batch=8, name="x", images_seen=16)) == [16]
    assert list(Loop(None, images=16, batch=8, name="x", images_seen=16)) == []


@pytest.mark.parametrize(
    ("part", "warm_up", "factor"),
    [(0, 0.05, 1e-3), (0.025, 0.05, 0.501), (0.5, 0.05, 0.5), (1, 0.05, 0), (0, 0, 1), (0.05, 0.1, 0.501)],
)
def test_the_rate_rises_for_a_twentieth_and_falls_as_a_cosine(part, warm_up, factor):
    assert rate_factor(part, warm_up) == pytest.approx(factor, abs=1e-9)


def test_the_rate_of_every_group_is_set_and_snapshots_are_due_at_multiples_and_at_the_end():
    optimizer = torch.optim.SGD([{"params": torch.zeros(1, requires_grad=True)}], 1.0)
    loop, due = Loop(None, images=40, batch=8, name="x"), []
    for seen in loop:
        loop.set_rate(optimizer, 0.2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * rate_factor(seen / 40))
        loop.update(GOOD, True)
        due.append(loop.due(16))
    assert due == [False, True, False, True, True]


def test_stop_and_the_clock_end_the_loop_and_its_last_step_is_due(monkeypatch):
    loop = Loop(None, images=80, batch=8, name="x")
    for _ in loop:
        loop.update(GOOD, True)
        loop.stop()
    assert loop.images_seen == 8
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    loop = Loop(None, images=80, batch=8, name="x", minutes=1)
    for _ in loop:
        now[0] += 25
        loop.update(GOOD, True)
    assert loop.images_seen == 24 and loop.due(1000)
    assert list(Loop(None, images=80, batch=8, name="x", minutes=0)) == []


def test_the_log_has_the_first_step_and_one_line_every_so_many_images(tmp_path):
    run = Run(tmp_path, {})
    loop, logged = Loop(run, images=40, batch=8, name="x", log_images=12), []
    for _ in loop:
        logged.append(loop.logs)
        loop.update(GOOD, True, scales=2)
    assert logged == [True, False, True, False, True]
    found = [(line["images"], line["loss"], line["scales"], line["skipped"]) for line in lines(run)]
    assert found == [(images, 1.235, 2, 0) for images in (8, 24, 40)]
    assert {"images_per_s", "memory_mb"} <= lines(run)[0].keys()


def test_updates_that_are_not_finite_are_told_and_end_the_run_after_ten_in_a_row(tmp_path):
    run = Run(tmp_path, {})
    loop = Loop(run, images=800, batch=8, name="x", skipped=3)
    for losses, finite in [(BAD, False)] * (PATIENCE - 1) + [(GOOD, True), (GOOD, False)]:  # a good one counts anew
        loop.update(losses, finite)
    first, *_, last = lines(run, "events.jsonl")
    assert loop.skipped == 3 + PATIENCE and last["not_finite"] == ["a gradient"]
    assert (first["images"], first["not_finite"], first["in_all"]) == (0, ["loss"], 4)
    with pytest.raises(TrainingError, match=r"\['loss'\] not finite in 10 updates in a row, after 152 images"):
        for _ in range(PATIENCE - 1):
            loop.update(BAD, False)


def test_a_snapshot_that_fails_is_told_and_the_end_raises_unless_a_later_one_was_saved(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    run = Run(tmp_path, {})
    loop = Loop(run, images=16, batch=8, name="x")
    loop.update(GOOD, True)
    loop.try_save(full)
    (event,) = lines(run, "events.jsonl")
    assert (event["event"], event["images"]) == ("nothing saved", 8) and "No space left" in event["error"]
    with pytest.raises(TrainingError, match="after 8 images nothing could be saved in .*No space left"):
        loop.close()
    loop.try_save(lambda: None)
    loop.close()
    with pytest.raises(ZeroDivisionError):
        loop.try_save(lambda: 1 / 0)
    Loop(None, images=16, batch=8, name="x").try_save(full)  # other processes save nothing


# --- Updates ---
def test_an_update_that_is_not_finite_is_not_made():
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = net.weight.detach().clone()
    for x in (torch.tensor([[torch.nan, 0.0]]), torch.tensor([[torch.inf, 1.0]])):
        assert not descend({"a": net(x).square().mean(), "b": net.bias.sum()}, optimizer)
        assert torch.equal(net.weight, before)
    assert descend({"a": net(torch.ones(1, 2)).square().mean()}, optimizer)
    assert not torch.equal(net.weight, before)


def test_buffers_are_put_back_and_frozen_parameters_thawed():
    net = torch.nn.BatchNorm1d(3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    buffers = Buffers([net])
    net(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert net.num_batches_tracked == 1
    buffers.restore()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.bias.requires_grad_(False)
    with frozen([net]):
        assert not net.weight.requires_grad
    assert net.weight.requires_grad and not net.bias.requires_grad
