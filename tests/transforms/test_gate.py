"""A gate rejects and draws again, a bounded number of times, alike for any number of workers, and counts."""

import pickle

import pytest
import torch
from tiny import Images, make_mix
from torch import nn
from torch.utils.data import DataLoader

from carim_aug import Gate, GateError, cam_gate, contrast_gate, probability_gate
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.transforms.gate import Candidates

GREY = torch.full((16, 1, 64, 64), 0.5), torch.zeros(16, dtype=torch.int64)
BLANK = Images(8, labels=[0] * 8, size=(64, 64))


def gated(**options):
    return make_mix(**{"p": 1.0, "placement": "prior", **options})


def left(candidates):
    """Accepts nodules on the image's left."""
    return torch.tensor([float(b[:, 0].mean()) for b in candidates.boxes]) < 32


class Brightness(nn.Module):
    """Two logits: minus and plus the mean of the image, through a layer with maps."""

    def __init__(self):
        super().__init__()
        self.activation, self.head = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.activation.weight.data.fill_(1.0)
        self.head.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))

    def forward(self, images):
        return self.head(self.activation(images).mean(dim=(2, 3)))


def candidates():
    """Three, in the same box: bright inside the box, bright elsewhere, dark."""
    images = -torch.ones(3, 1, 32, 32)
    images[0, :, 4:12, 4:12] = images[1, :, 20:28, 20:28] = 1.0
    return Candidates(images, [torch.tensor([[4.0, 4.0, 12.0, 12.0]])] * 3, None, torch.tensor([0.1, 0.01, torch.nan]))


@pytest.mark.parametrize("insertion", ["whole", "graft"])
def test_what_passes_is_what_the_gate_wants_and_can_be_made_from_its_key(insertion):
    mix = gated(insertion=insertion, gate=left)
    mixed, marked = mix(*GREY)
    params = mix.last_params
    assert all(float(b[:, 0].mean()) < 32 for b in params.boxes if len(b))
    again = [one for one in params.decisions if one.synthetic and len(one.key) == 4]
    assert again and int(params.synthetic.sum()) > 12
    for one in again:
        assert torch.allclose(mix.regenerate(one.key)[2], one.boxes_at(32, 32))
    assert torch.equal(marked, params.synthetic.long())
    assert torch.equal((mixed != GREY[0]).flatten(1).any(1), params.synthetic)
    assert bool((params.gate_scores[params.synthetic] == 1).all())
    assert torch.equal(make_mix(insertion=insertion)(*GREY, params=params)[0], mixed)


def test_the_same_nodules_pass_however_they_are_loaded_and_are_counted_together():
    def run(batch_size, workers, shuffle=False):
        mix, found = gated(gate=left), {}
        for _ in mix.loader(BLANK, batch_size=batch_size, num_workers=workers, shuffle=shuffle):
            found |= {one.key[2]: one for one in mix.last_params.decisions}
        return found, mix.gate_report()

    one, report = run(1, 0)
    assert run(8, 0) == (one, report) == run(7, 1, shuffle=True)
    wrapped, mix = gated(gate=left).wrap(BLANK), gated(gate=left)
    assert one == {i: wrapped.decision(i) for i in range(8)}
    assert sum(len(x) for x, _ in DataLoader(mix.wrap(BLANK), batch_size=4, num_workers=2)) == 8
    assert mix.gate_report() == report and report["candidates"] > report["accepted"] > 5
    assert report["rate"] == report["accepted"] / report["candidates"]
    assert report["candidates"] == report["accepted"] + sum(report["reasons"].values())


def test_tries_are_bounded_and_an_image_without_a_good_one_stays_real():
    rare = Gate(lambda c: torch.tensor([float(b[0, 0]) < 8 for b in c.boxes]), tries=2, name="far left")
    mix, images, labels = gated(gate=rare, insertion="whole"), torch.rand(40, 1, 64, 64), torch.zeros(40).long()
    mixed, marked = mix(images, labels)
    report, real = mix.gate_report(), ~mix.last_params.synthetic
    assert report["candidates"] <= 80 and 0 < report["exhausted"] == int(real.sum()) < 40
    assert torch.equal(mixed[real], images[real]) and bool((marked[real] == 0).all())
    assert report["reasons"] == {"far left: rejected": report["candidates"] - report["accepted"]}


def test_a_gate_that_rejects_everything_says_so(monkeypatch):
    monkeypatch.setattr("carim_aug.transforms.gate.HOPELESS", 24)
    mix = gated(gate=Gate(lambda c: c.contrasts, low=100.0, name="contrast"))
    with pytest.raises(GateError, match="accepted none of 24 candidates .*contrast: below 100 24.*widen its window"):
        list(mix.loader(BLANK, batch_size=5))


def test_all_gates_of_a_list_must_accept_and_the_last_one_scores():
    mix = gated(gate=[left, contrast_gate(-1.0)])
    mix(*GREY)
    params = mix.last_params
    assert all(float(b[:, 0].mean()) < 32 for b in params.boxes if len(b)) and 10 < int(params.synthetic.sum())
    assert torch.allclose(params.gate_scores, params.contrasts, atol=1e-6, equal_nan=True)


def test_windows_name_their_reasons():
    scores, reasons = contrast_gate(0.02, 0.05).judge(candidates())
    assert reasons == ["contrast: above 0.05", "contrast: below 0.02", "contrast: not finite"]
    assert scores[:2].tolist() == pytest.approx([0.1, 0.01])


def test_the_probability_gate_asks_the_classifier_in_eval_mode_and_leaves_it_as_it_was():
    net = Brightness().train()
    scores, reasons = probability_gate(net, 1, low=0.3).judge(candidates())
    expected = torch.sigmoid(candidates().images.mean(dim=(1, 2, 3)))
    assert torch.allclose(scores, expected) and net.training and all(p.grad is None for p in net.parameters())
    assert reasons == ["" if value >= 0.3 else "probability: below 0.3" for value in expected.tolist()]


@pytest.mark.parametrize("method", ["grad-cam", "closed-form"])
def test_the_cam_gate_measures_the_maps_share_inside_the_mask(method):
    scores, reasons = cam_gate(Brightness(), 1, method=method, grow=0.0, low=0.9).judge(candidates())
    assert scores.tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert reasons == ["", "CAM inside the mask: below 0.9", "CAM inside the mask: below 0.9"]
    boxes = [torch.tensor([[10.0, 5.0, 20.0, 15.0]])]
    wide = Candidates(boxes_to_masks(boxes, (20, 40)) * 2 - 1, boxes, None, torch.zeros(1))  # no square
    net = nn.Sequential(nn.Upsample((40, 40)), Brightness())
    assert cam_gate(net, 1, layer=net[1].activation, grow=0.0).judge(wide)[0].item() == pytest.approx(1.0)


def test_classifiers_in_gates_are_no_part_of_the_mix_and_it_pickles():
    net = Brightness()
    mix = gated(gate=[cam_gate(net, 0, low=0.0), probability_gate(net, 0, high=1.0)])
    mix(*(x[:2] for x in GREY))
    assert mix.gate_report()["accepted"] == 2 and not any(isinstance(m, Brightness) for m in mix.modules())
    assert pickle.loads(pickle.dumps(mix)).gate_report() == mix.gate_report()


def test_strength_scales_what_is_added_and_contrasts_say_how_much():
    def mixed(**options):
        mix = gated(**options)
        return mix(*GREY)[0] - GREY[0], mix.last_params

    (full, strong), (half, faint) = mixed(), mixed(strength=0.5)
    assert torch.allclose(full * 0.5, half, atol=1e-6) and torch.allclose(strong.contrasts * 0.5, faint.contrasts)
    assert strong.strengths.tolist() == [1.0] * 16
    assert all(torch.equal(a, b) for a, b in zip(strong.boxes, faint.boxes, strict=True))
    params = mixed(strength=(0.25, 0.75), p=0.5)[1]
    drawn = params.strengths[params.synthetic]
    assert 0.25 <= drawn.min() < drawn.max() <= 0.75 and len(drawn.unique()) == len(drawn) > 4
    assert torch.equal(params.contrasts.isnan(), ~params.synthetic)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_mix(gate=3), "gate must be a function of Candidates.* got 3"),
        (lambda: make_mix(gate=[]), "gate must be .* got an empty list"),
        (lambda: Gate(left, low=1.0, high=0.0), "low <= high, got low 1.0"),
        (lambda: Gate(left, tries=0), r"tries must be an integer in \[1, 256\], got 0"),
        (lambda: probability_gate(Brightness(), 1, low=0.9, high=0.1), "probabilities .* got 0.9 and 0.1"),
        (lambda: cam_gate(Brightness(), 1, low=2.0), "low must be a share .* got 2.0"),
        (lambda: cam_gate(nn.Linear(2, 2), 1), "layer must be a module.* got None"),
        (lambda: Gate(lambda c: torch.zeros(5)).judge(candidates()), r"must give 3 scores or verdicts, got .*5"),
        (lambda: make_mix().gate_report(), "gate must be given .* got None"),
    ],
)
def test_bad_gates_are_named(make, words):
    with pytest.raises((ValueError, TypeError, GateError), match=words):
        make()
