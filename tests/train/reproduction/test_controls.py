"""Training-free controls: what a mix may count on from each, and what is theirs alone."""

import copy
import math
import pickle

import pytest
import torch

from carim_aug import LocationPrior, SyntheticNoduleMix
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.boxes import boxes_to_masks
from train.common.images import to_symmetric
from train.reproduction.controls import nodules
from train.reproduction.controls.duplicates import DuplicatedImages
from train.reproduction.controls.nodules import CopiedNodules, DrawnNodules, SuperimposedNodules
from train.reproduction.controls.poisson import poisson_blend

BOXES = torch.tensor([[14.0, 20, 22, 28], [40, 30, 49, 38], [16, 36, 22, 43], [44, 16, 50, 22]])
SEEDS = [3, 1, 4, 15, 92, 65]


def chests(n, seed=0, boxes=None):
    boxes = [None] * n if boxes is None else boxes
    return torch.stack([(phantom_chest(64, nodule_box=b, seed=seed + i) * 255).byte() for i, b in enumerate(boxes)])


NODULES, REGIONS = chests(4, 50, BOXES), to_symmetric(chests(6, 80))


def masks(n=6, shape="box"):
    return boxes_to_masks([BOXES[i % 4 : i % 4 + 1] for i in range(n)], 64, shape=shape)


def to_bytes(images):
    return ((images + 1) * 127.5).round().byte()


def flat(n=6, value=0.0, size=64):
    return torch.full((n, 1, size, size), value)


DRAWN, TWO = DrawnNodules(64), boxes_to_masks([BOXES[:2]] * 6, 64)


@pytest.fixture(scope="module")
def controls(templates):
    superimposed = SuperimposedNodules(CTNodules(templates), 64)
    return {"drawn": DRAWN, "copied": CopiedNodules(NODULES, BOXES), "superimposed": superimposed}


@pytest.fixture(params=["drawn", "copied", "superimposed"])
def control(controls, request):
    return controls[request.param]


class TestContract:
    """What `SyntheticNoduleMix` counts on."""

    def test_a_row_depends_on_its_own_seed_mask_and_region_alone(self, control):
        ground, state = REGIONS.clone(), torch.get_rng_state()
        added = control.residuals(ground, masks(), SEEDS)
        assert added.shape == (6, 1, 64, 64) and added.dtype == torch.float32
        assert torch.equal(ground, REGIONS) and torch.equal(torch.get_rng_state(), state)
        alone = [control.residuals(ground[i : i + 1], masks()[i : i + 1], SEEDS[i : i + 1]) for i in range(6)]
        assert torch.equal(torch.cat(alone), added)
        assert not torch.equal(control.residuals(ground, masks(), SEEDS[::-1]), added)
        assert torch.equal(control.residuals(ground.double(), masks(), SEEDS), added)
        assert control.residuals(ground[:0], masks()[:0], []).shape == (0, 1, 64, 64)
        assert control.residuals(ground, torch.zeros_like(masks()), SEEDS).abs().max() == 0
        for other in (copy.deepcopy(control), pickle.loads(pickle.dumps(control))):
            assert other.weights_hash == control.weights_hash and len(control.weights_hash) == 64
            assert torch.equal(other.residuals(ground, masks(), SEEDS), added)

    def test_a_nodule_is_bright_in_its_box_and_exactly_nothing_is_outside(self, control):
        ground = to_symmetric(chests(40, 90))
        ground[0, 0, :2, :2] = 1.1  # resized images may overshoot
        added = control.residuals(ground, masks(40), list(range(40)))
        assert (ground + added).max() <= 1.1 and (ground + added).min() >= -1
        inside = masks(40) if isinstance(control, SuperimposedNodules) else masks(40, "ellipse")  # templates fill boxes
        assert (added * (1 - inside)).abs().max() == 0
        means = added.sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))
        assert means.mean() > 0.01 and (means > 0).float().mean() > 0.8
        for box in ([0, 0, 9, 8], [55, 56, 64, 64], [30, 0, 31, 1], [20, 20, 22, 30]):  # at the border, and narrow
            mask = boxes_to_masks([torch.tensor([box]).float()] * 6, 64)
            added = control.residuals(flat(), mask, SEEDS)
            assert added.isfinite().all() and (added * (1 - mask)).abs().max() == 0 and added.abs().max() > 0

    def test_a_mix_grafts_it_and_refuses_to_take_it_for_whole_images(self, control):
        mix = SyntheticNoduleMix(control, LocationPrior.bundled(), p=1.0, value_range="symmetric", placement="prior")
        images, labels = mix(REGIONS, torch.zeros(6, dtype=torch.long))
        assert labels.tolist() == [1] * 6 and not torch.equal(images, REGIONS)
        with pytest.raises(ValueError, match="generator must have a method images"):
            SyntheticNoduleMix(control, LocationPrior.bundled(), insertion="whole")

    @pytest.mark.gpu
    def test_cuda_gives_what_the_cpu_gives(self, control):
        added = control.residuals(REGIONS.cuda(), masks().cuda(), SEEDS)
        assert added.is_cuda and torch.allclose(added.cpu(), control.residuals(REGIONS, masks(), SEEDS), atol=1e-5)


# --- Each one's own ---
def test_drawn_peaks_lie_in_their_range_and_saturate_at_white():
    mask, (least, largest) = boxes_to_masks([torch.tensor([[20.0, 20, 41, 41]])] * 60, 64), nodules.PEAKS
    added = DRAWN.residuals(flat(60), mask, list(range(60)))[:, 0]
    peaks, rim, half_way = added[:, 30, 30], math.exp(-1.5), math.exp(-1.5 * (5 / 10.5) ** 2)
    assert torch.equal(peaks, added.amax(dim=(1, 2)))
    assert least <= peaks.min() < least + 0.02 and largest - 0.02 < peaks.max() <= largest
    assert torch.allclose(added[:, 30, 35], peaks * (half_way - rim) / (1 - rim), rtol=1e-4)
    white = DRAWN.residuals(flat(60, 0.95), mask, list(range(60)))
    assert white.max().item() == pytest.approx(0.05, abs=1e-6)


def test_copies_come_from_the_nodules_nearest_in_size(monkeypatch):
    monkeypatch.setattr(nodules, "NEIGHBOURS", 1)
    real, boxes = flat(3, size=96), torch.tensor([[40.0, 40, 46, 46], [40, 40, 50, 50], [40, 40, 55, 55]])
    for image, (low, _, high, _), bright in zip(real, boxes.int().tolist(), (0.2, 0.4, 0.6), strict=True):
        image[:, low + 2 : high - 2, low + 2 : high - 2] = bright
    for side, bright in ((5, 0.2), (10, 0.4), (15, 0.6)):
        mask = boxes_to_masks([torch.tensor([[20.0, 30, 20 + side, 30 + side]])] * 6, 96)
        added = CopiedNodules(to_bytes(real), boxes).residuals(flat(size=96), mask, SEEDS)
        assert torch.allclose(added.amax(dim=(1, 2, 3)), torch.full((6,), bright), atol=0.1)
    # A copy in its own place and size is the real image.
    control = CopiedNodules(NODULES, BOXES)
    own = to_symmetric(control.nodules)
    added = control.residuals(own, boxes_to_masks(list(control.boxes[:, None]), 64), list(range(len(own))))
    assert added.abs().max() < 0.02


def test_real_nodules_that_do_not_survive_the_blend_are_left_out(monkeypatch):
    dark, edge = NODULES[:1].clone(), to_bytes(torch.where(torch.arange(64) < 18, -0.9, 0.9).expand(1, 1, 64, 64))
    dark[:, :, 22:26, 16:20] = 0
    usable = CopiedNodules(NODULES, BOXES).boxes
    for other, box in ((dark, BOXES[:1]), (edge, BOXES[:1]), (NODULES[:1], torch.tensor([[10.0, 10, 30, 20]]))):
        assert torch.equal(CopiedNodules(torch.cat([NODULES, other]), torch.cat([BOXES, box])).boxes, usable)
    monkeypatch.setattr(nodules, "ROUGHEST", 9)
    assert len(usable) == 3 and torch.equal(CopiedNodules(NODULES, BOXES).boxes, BOXES)  # one at the heart


def test_superimposed_nodules_are_the_templates_own(templates, monkeypatch):
    control, largest = SuperimposedNodules(CTNodules(templates), 64), []
    monkeypatch.setattr(nodules, "CONTRAST", (0.25, 0.25))
    for fill in ((0.9, 1.0), (0.4, 0.5)):
        monkeypatch.setattr(nodules, "FILL", fill)
        added = control.residuals(flat(), masks(), SEEDS)
        assert torch.allclose(added.amax(dim=(1, 2, 3)), torch.full((6,), 0.25), atol=1e-6)
        largest.append((added > 0.05).sum())
    assert largest[1] < 0.6 * largest[0]


def test_duplicated_images_are_the_given_ones_and_all_are_shown():
    normal, both, seeds = chests(5), torch.tensor([True, False] * 30), list(range(60))
    control = DuplicatedImages(normal, NODULES)
    made = control.class_images(both, seeds)
    for given, wanted in ((normal, False), (NODULES, True)):
        shown = {[torch.equal(one, image) for image in to_symmetric(given)].index(True) for one in made[both == wanted]}
        assert shown == set(range(len(given)))
    assert torch.equal(control.class_images(both[7:8], seeds[7:8]), made[7:8])
    for wrong in (both.long(), both[:1]):
        with pytest.raises(ValueError, match=r"nodule must be \(60,\) bool, got"):
            control.class_images(wrong, seeds)
    mix = SyntheticNoduleMix(control, LocationPrior.bundled(), p=1.0, insertion="whole", value_range="symmetric")
    assert mix(flat(3), torch.zeros(3, dtype=torch.long))[1].tolist() == [1] * 3
    with pytest.raises(ValueError, match="generator must have a method residuals"):
        SyntheticNoduleMix(control, LocationPrior.bundled())


def test_hash_changes_with_images_size_settings_and_class(templates, monkeypatch):
    ct = CTNodules(templates)

    def make():
        return [
            *(DrawnNodules(side) for side in (64, 32)),
            *(CopiedNodules(NODULES, boxes) for boxes in (BOXES, BOXES + 1)),
            *(SuperimposedNodules(ct, side) for side in (64, 32)),
            *(DuplicatedImages(*pair) for pair in ((chests(4), NODULES), (NODULES, chests(4)))),
        ]

    hashes = [control.weights_hash for control in make()]
    assert len(set(hashes)) == 8 and hashes == [control.weights_hash for control in make()]
    for name, value in {"PEAKS": (0.1, 0.2), "NEIGHBOURS": 2, "FILL": None}.items():
        monkeypatch.setattr(nodules, name, value)
    others = [control.weights_hash for control in make()]
    assert not set(hashes[:6]) & set(others) and others[6:] == hashes[6:]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DRAWN.residuals(REGIONS[:5], masks(), SEEDS), r"regions must be \(6, 1, 64, 64\) float, got \(5, 1"),
        (lambda: DRAWN.residuals(REGIONS.byte(), masks(), SEEDS), r"regions must be .* got .* torch.uint8"),
        (lambda: DRAWN.residuals(REGIONS, masks()[..., :32], SEEDS), r"masks must be \(B, 1, 64, 64\), got .*64, 32\)"),
        (lambda: DRAWN.residuals(REGIONS, masks() * 0.5, SEEDS), "masks must be 0 or 1 everywhere, got 0.5"),
        (lambda: DRAWN.residuals(REGIONS, masks(5), SEEDS), r"masks must be as many as regions \(6\), got 5"),
        (lambda: DRAWN.residuals(REGIONS, TWO, SEEDS), "masks must hold one filled box each"),
        (lambda: DRAWN.residuals(REGIONS, masks(), [-1] * 6), r"from 0 to 2\*\*64 - 1, got -1"),
        (lambda: DrawnNodules(0), "image_size must be at least 1, got 0"),
        (lambda: CopiedNodules(NODULES, BOXES[:2]), r"boxes must be as many as nodules \(4\), got 2"),
        (lambda: CopiedNodules(NODULES, BOXES * 2), "boxes must be inside the image"),
        (lambda: CopiedNodules(NODULES[:1], torch.tensor([[0.0, 0, 40, 40]])), "boxes must hold .* got none in 1"),
        (lambda: CopiedNodules(NODULES[:, 0], BOXES), r"nodules must be \(N, 1, S, S\) .* got \(4, 64, 64\)"),
        (lambda: SuperimposedNodules("ct"), "templates must be CTNodules, got str"),
        (lambda: DuplicatedImages(NODULES[:0], NODULES), r"normal must be .* N >= 1, got \(0, 1, 64, 64\)"),
        (lambda: DuplicatedImages(NODULES, NODULES[..., :32, :32]), r"nodule must be as large as .*64\), got 32"),
        (lambda: DuplicatedImages(flat(2), NODULES), r"normal must be .* uint8 .* got .* torch.float32"),
    ],
)
def test_what_breaks_a_rule_is_refused(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


# --- Blending ---
def test_blend_changes_nothing_but_what_is_no_slope_and_no_level():
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    inside = boxes_to_masks([torch.tensor([[24.0, 20, 40, 32]])] * 2, 64) > 0
    assert torch.allclose(poisson_blend(image, image, inside, steps=200), image, atol=1e-5)
    assert torch.allclose(poisson_blend(image, image - 0.3, inside, steps=200), image, atol=1e-4)
    slope = torch.linspace(-0.4, 0.4, 48).expand(1, 1, 48, 48)
    inside = boxes_to_masks([torch.tensor([[16.0, 16, 30, 30]])], 48, shape="ellipse") > 0
    blended = poisson_blend(flat(1, size=48), slope, inside, steps=14 * 14)
    assert blended.abs().max() < 0.01  # a slope is harmonic: nothing of it is left
    corner = boxes_to_masks([torch.tensor([[24.0, 0, 32, 8]])], 32) > 0  # there the slope across the border is 0
    blended = poisson_blend(flat(1, 0.3, 32), flat(1, -0.8, 32), corner, steps=10)
    assert torch.allclose(blended, flat(1, 0.3, 32), atol=1e-5)
