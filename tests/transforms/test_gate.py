"""A gate rejects and redraws, a bounded number of times, alike for any number of workers; what it did is counted."""

import pickle

import pytest
import torch
from tiny import Films, make_mix
from torch import nn

from carim_aug import Gate, GateError, cam_gate, contrast_gate, probability_gate
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.transforms.gate import Candidates
from train.classifier.densenet import ChestClassifier


class Flat(torch.utils.data.Dataset):
    """Grey films without lungs, so that placement leaves draws alone."""

    targets = [0] * 48

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return torch.full((1, 64, 64), 0.5), 0


def left(candidates):
    """Accepts nodules on the image's left."""
    return torch.tensor([float(b[:, 0].mean()) for b in candidates.boxes]) < 32


class Brightness(nn.Module):
    """Two logits: minus and plus the mean of the image, through a layer with maps."""

    def __init__(self):
        super().__init__()
        self.activation = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.activation.weight.fill_(1.0)
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))

    def forward(self, images):
        return self.head(self.activation(images).mean(dim=(2, 3)))


def centres(slots):
    return [float((s.boxes[:, 0] + s.boxes[:, 2]).mean()) / 2 for s in slots if s.synthetic]


@pytest.mark.parametrize("insertion", ["whole", "graft"])
def test_what_passes_is_what_the_gate_wants_and_can_be_made_from_its_key(insertion):
    mix = make_mix(p=1.0, insertion=insertion, gate=left)
    images, labels = torch.full((32, 1, 64, 64), 0.5), torch.zeros(32, dtype=torch.int64)
    mixed, marked = mix(images, labels)
    params = mix.last_params
    assert all(float(b[:, 0].mean()) < 32 for b in params.boxes if len(b))
    again = [slot for slot in params.slots if slot.synthetic and len(slot.key) == 4]
    assert again and int(params.synthetic.sum()) > 25
    for slot in again:
        boxes = mix.regenerate(slot.key)[2]
        assert torch.allclose(boxes, slot.boxes_at(32, 32))
    assert torch.equal(marked, params.synthetic.long())
    assert torch.equal((mixed != images).flatten(1).any(1), params.synthetic)
    assert bool((params.gate_scores[params.synthetic] == 1).all())
    assert torch.equal(make_mix(p=1.0, insertion=insertion)(images, labels, params=params)[0], mixed)


def test_the_same_slots_pass_with_any_number_of_workers_and_batch_size():
    def slots(batch_size, workers, shuffle=False):
        mix = make_mix(p=0.7, insertion="graft", gate=left)
        found = {}
        for _ in mix.loader(Flat(), batch_size=batch_size, num_workers=workers, shuffle=shuffle):
            found |= {slot.key[2]: slot for slot in mix.last_params.slots}
        return found, mix.gate_report()

    one, told = slots(1, 0)
    for other in (slots(48, 2), slots(7, 1, shuffle=True)):
        assert other == (one, told)
    wrapped = make_mix(p=0.7, insertion="graft", gate=left).wrap(Flat())
    assert one == {i: wrapped.slot(i) for i in range(48)}


def test_workers_of_wrapped_data_sets_count_together():
    mix = make_mix(p=1.0, insertion="graft", gate=left)
    for _ in torch.utils.data.DataLoader(mix.wrap(Flat()), batch_size=8, num_workers=2):
        pass
    told, alone = mix.gate_report(), make_mix(p=1.0, insertion="graft", gate=left)
    for _ in alone.loader(Flat(), batch_size=8):
        pass
    assert told == alone.gate_report() and told["candidates"] > told["accepted"] > 30
    assert told["rate"] == told["accepted"] / told["candidates"]
    assert told["candidates"] == told["accepted"] + sum(told["reasons"].values())


def test_tries_are_bounded_and_a_slot_without_a_good_one_stays_real():
    rare = Gate(lambda c: torch.tensor([float(b[0, 0]) < 8 for b in c.boxes]), tries=2, name="far left")
    mix = make_mix(p=1.0, gate=rare)
    images, labels = torch.rand(64, 1, 64, 64), torch.zeros(64, dtype=torch.int64)
    mixed, marked = mix(images, labels)
    told = mix.gate_report()
    real = ~mix.last_params.synthetic
    assert told["candidates"] <= 128 and 0 < told["exhausted"] == int(real.sum()) < 64
    assert torch.equal(mixed[real], images[real]) and bool((marked[real] == 0).all())
    assert told["reasons"] == {"far left: rejected": told["candidates"] - told["accepted"]}


def test_a_gate_that_rejects_everything_says_so():
    mix = make_mix(p=1.0, gate=Gate(lambda c: c.contrasts, low=100.0, name="contrast"), insertion="graft")
    with pytest.raises(GateError, match="accepted none of 256 candidates .*contrast: below 100 256.*widen its window"):
        for _ in mix.loader(Films(400, labels=[0] * 400, size=(64, 64)), batch_size=50):
            pass


def test_all_gates_of_a_list_must_accept():
    mix = make_mix(p=1.0, insertion="graft", gate=[left, contrast_gate(-1.0)])
    mix(torch.full((32, 1, 64, 64), 0.5), torch.zeros(32, dtype=torch.int64))
    kept = [s for s in mix.last_params.slots if s.synthetic]
    assert max(centres(kept)) < 0.7
    scores = mix.last_params.gate_scores[mix.last_params.synthetic]
    assert torch.allclose(scores, mix.last_params.contrasts[mix.last_params.synthetic], atol=1e-6)


def candidates(n=3, size=32):
    boxes = [torch.tensor([[4.0, 4.0, 12.0, 12.0]])] * n
    images = -torch.ones(n, 1, size, size)
    images[0, :, 4:12, 4:12] = 1.0
    images[1, :, 20:28, 20:28] = 1.0
    return Candidates(images, boxes, None, torch.tensor([0.1, 0.01, float("nan")]))


def test_windows_name_their_reasons():
    scores, reasons = contrast_gate(0.02, 0.05).judged(candidates())
    assert reasons == ["contrast: above 0.05", "contrast: below 0.02", "contrast: not finite"]
    assert scores[:2].tolist() == pytest.approx([0.1, 0.01])


def test_the_probability_gate_asks_the_classifier_in_eval_mode_and_leaves_it_as_it_was():
    net = Brightness()
    net.train()
    gate = probability_gate(net, 1, low=0.3)
    scores, reasons = gate.judged(candidates())
    expected = torch.sigmoid(candidates().images.mean(dim=(1, 2, 3)))
    assert torch.allclose(scores, expected) and net.training and all(p.grad is None for p in net.parameters())
    assert reasons == ["" if value >= 0.3 else "probability: below 0.3" for value in expected.tolist()]


@pytest.mark.parametrize("method", ["grad-cam", "closed-form"])
def test_the_cam_gate_measures_the_maps_share_inside_the_mask(method):
    gate = cam_gate(Brightness(), 1, method=method, grow=0.0, low=0.9)
    scores, reasons = gate.judged(candidates())
    assert scores[0] == pytest.approx(1.0) and scores[1] == 0 and scores[2] == 0
    assert reasons == ["", "CAM inside the mask: below 0.9", "CAM inside the mask: below 0.9"]


def test_the_cam_gate_takes_images_that_are_no_squares():
    wide = Candidates(-torch.ones(1, 1, 20, 40), [torch.tensor([[10.0, 5.0, 20.0, 15.0]])], None, torch.zeros(1))
    wide.images[:] = boxes_to_masks(wide.boxes, (20, 40)) * 2 - 1

    class Squared(Brightness):
        def forward(self, images):
            return super().forward(nn.functional.interpolate(images, size=(40, 40)))

    net = Squared()
    assert cam_gate(net, 1, grow=0.0).judged(wide)[0].item() == pytest.approx(1.0)


def test_a_chexnet_is_a_gate():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ChestClassifier(("Nodule", "Mass"), size=32)
    mix = make_mix(p=1.0, insertion="graft", gate=[cam_gate(net, 0, low=0.0), probability_gate(net, 0, high=1.0)])
    mix(torch.rand(2, 1, 64, 64), torch.zeros(2, dtype=torch.int64))
    assert mix.gate_report()["accepted"] == 2
    assert not any(isinstance(m, ChestClassifier) for m in mix.modules())
    pickle.dumps(mix)


def test_strength_scales_the_difference_and_the_contrast_is_told():
    images, labels = torch.full((16, 1, 64, 64), 0.5), torch.zeros(16, dtype=torch.int64)

    def mixed(strength):
        mix = make_mix(p=1.0, insertion="graft", strength=strength)
        return mix(images, labels)[0] - images, mix.last_params

    (full, told), (half, faint) = mixed(1.0), mixed(0.5)
    assert torch.allclose(full * 0.5, half, atol=1e-6) and torch.allclose(told.contrasts * 0.5, faint.contrasts)
    assert told.strengths.tolist() == [1.0] * 16 and [s.boxes.tolist() for s in told.slots] == [
        s.boxes.tolist() for s in faint.slots
    ]
    drawn = mixed((0.25, 0.75))[1].strengths
    assert drawn.min() >= 0.25 and drawn.max() <= 0.75 and drawn.unique().numel() == 16


def test_contrasts_of_real_slots_and_of_whole_images_are_nan():
    mix = make_mix(p=0.5, insertion="graft")
    mix(torch.rand(32, 1, 64, 64), torch.zeros(32, dtype=torch.int64))
    params = mix.last_params
    assert torch.equal(params.contrasts.isnan(), ~params.synthetic) and 0 < int(params.synthetic.sum()) < 32
    whole = make_mix(p=1.0)
    whole(torch.rand(4, 1, 64, 64), torch.zeros(4, dtype=torch.int64))
    assert bool(whole.last_params.contrasts.isnan().all())


def test_placement_in_a_mask_of_the_users_is_strict():
    def right_edge(image):
        mask = torch.zeros(1, 1, *image.shape[-2:])
        mask[..., 44:56] = 1
        return mask

    mix = make_mix(p=1.0, insertion="graft", placement=right_edge)
    mix(torch.full((48, 1, 64, 64), 0.5), torch.zeros(48, dtype=torch.int64))
    middles = [(s.boxes[:, 0] + s.boxes[:, 2]) / 2 for s in mix.last_params.slots if s.synthetic]
    assert len(middles) > 40 and all((m >= 44 / 64 - 1e-6).all() and (m <= 56 / 64).all() for m in middles)
    nowhere = make_mix(p=1.0, insertion="graft", placement=lambda image: torch.ones(1, 1, 2, 2) * 0)
    with pytest.raises(ValueError, match="placement must give a mask with at least one pixel set"):
        nowhere(torch.rand(2, 1, 64, 64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"placement must give a mask \(1, 1, H, W\)"):
        make_mix(p=1.0, insertion="graft", placement=lambda image: 3)(
            torch.rand(2, 1, 64, 64), torch.zeros(2, dtype=torch.int64)
        )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gate": 3}, "gate must be a function of Candidates"),
        ({"gate": []}, "empty list"),
        ({"strength": 0}, r"strength must be .*got 0"),
        ({"strength": (0.5, 0.2)}, r"strength must be .*got \(0.5, 0.2\)"),
        ({"strength": True}, "strength must be"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make_mix(**options)


def test_bad_gates_are_named():
    for make, words in (
        (lambda: Gate(left, low=1.0, high=0.0), "low <= high"),
        (lambda: Gate(left, tries=0), r"tries must be an integer in \[1, 256\], got 0"),
        (lambda: probability_gate(Brightness(), 1, low=0.9, high=0.1), "probabilities"),
        (lambda: cam_gate(Brightness(), 1, low=2.0), "share"),
        (lambda: cam_gate(nn.Linear(2, 2), 1), "layer must be a module"),
        (lambda: Gate(lambda c: torch.zeros(5)).judged(candidates()), "must give 3 scores or verdicts"),
        (lambda: make_mix().gate_report(), "gate must be given"),
    ):
        with pytest.raises((ValueError, TypeError, GateError), match=words):
            make()
