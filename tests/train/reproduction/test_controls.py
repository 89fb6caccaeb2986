"""Training-free controls: what the mix may count on from each, and what is theirs alone."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.phantom import phantom_chest
from carim_aug.location.density import boxes_to_points
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import noise as keyed_noise
from train.reproduction.controls.maskboxes import boxes_of_masks
from train.reproduction.controls.nodules import (
    CopiedNodules,
    DrawnNodules,
    DuplicatedFilms,
    FilmControl,
    SuperimposedNodules,
    gaussian_blobs,
    uniform_prior,
)
from train.reproduction.controls.poisson import poisson_blend

SIZE = 64
BOXES = torch.tensor([[14.0, 20, 22, 28], [40, 30, 49, 38], [16, 36, 22, 43], [44, 16, 50, 22]])
WRONG_FILMS = [
    (torch.zeros(4, SIZE, SIZE, dtype=torch.uint8), r"must be \(N, 1, S, S\) with N >= 1, got \(4, 64, 64\)"),
    (torch.zeros(0, 1, SIZE, SIZE), r"must be \(N, 1, S, S\) with N >= 1, got \(0, 1, 64, 64\)"),
    (torch.full((2, 1, SIZE, SIZE), 1.5), r"must be in \[-1, 1\], got values in \[1.5, 1.5\]"),
]


def films(n, seed=0):
    return torch.stack([(phantom_chest(SIZE, seed=seed + i) * 255).byte() for i in range(n)])


def nodules():
    shown = [phantom_chest(SIZE, nodule_box=box, seed=50 + i) for i, box in enumerate(BOXES)]
    return torch.stack([(film * 255).byte() for film in shown])


@pytest.fixture(scope="module")
def controls(templates):
    return {
        "drawn": DrawnNodules(films(5)),
        "copied": CopiedNodules(films(5), nodules(), BOXES),
        "superimposed": SuperimposedNodules(films(5), CTNodules(templates)),
        "duplicated": DuplicatedFilms(films(5), nodules()),
    }


@pytest.fixture
def control(controls, request):
    return controls[request.param]


def noise(control, n=6):
    return keyed_noise(range(n), control.noise_dim)


def masks(n=6):
    """One box each, but the last: two."""
    boxes = [BOXES[i % 4 : i % 4 + 1] for i in range(n - 1)] + [BOXES[:2]]
    return boxes_to_masks(boxes, SIZE)


every = pytest.mark.parametrize("control", ["drawn", "copied", "superimposed", "duplicated"], indirect=True)
placing = pytest.mark.parametrize("control", ["drawn", "copied", "superimposed"], indirect=True)


class TestContract:
    """What `SyntheticNoduleMix` counts on."""

    @every
    def test_attributes_say_what_the_mix_asks(self, control):
        assert control.image_size == SIZE and control.noise_dim >= 1 and control.value_range == (-1.0, 1.0)
        assert len(control.weights_hash) == 64 and int(control.weights_hash, 16) >= 0
        assert control.places == isinstance(control, FilmControl) == hasattr(control, "differences")

    @every
    def test_empty_mask_gives_a_real_film_without_a_finding(self, control):
        made = control(noise(control), torch.zeros(6, 1, SIZE, SIZE))
        real = films(5).float() / 127.5 - 1
        assert made.shape == (6, 1, SIZE, SIZE) and made.dtype == torch.float32
        assert all(any(torch.equal(one, film) for film in real) for one in made)

    @every
    def test_same_noise_gives_the_same_pixels_and_other_noise_others(self, control):
        z = noise(control)
        assert torch.equal(control(z, masks()), control(z.clone(), masks()))
        assert not torch.equal(control(z, masks()), control(z.flip(0), masks()))

    @every
    def test_a_sample_does_not_depend_on_its_batch(self, control):
        z, c = noise(control), masks()
        together = control(z, c)
        assert all(torch.equal(together[i : i + 1], control(z[i : i + 1], c[i : i + 1])) for i in range(6))
        assert control(z[:0], c[:0]).shape == (0, 1, SIZE, SIZE)

    @every
    def test_global_stream_and_arguments_stay_as_they_are(self, control):
        z, c, state = noise(control), masks(), torch.get_rng_state()
        before = z.clone(), c.clone()
        control(z, c)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(z, before[0]) and torch.equal(c, before[1])

    @every
    def test_copies_and_pickles_do_the_same(self, control):
        z, c = noise(control), masks()
        for other in (copy.deepcopy(control), pickle.loads(pickle.dumps(control))):
            assert other.weights_hash == control.weights_hash and torch.equal(other(z, c), control(z, c))

    @every
    def test_wrong_noise_and_masks_are_refused(self, control):
        z, c = noise(control), masks()
        with pytest.raises(ValueError, match=rf"noise must be \(B, {control.noise_dim}\) float, got \(6, 99\)"):
            control(torch.zeros(6, 99), c)
        with pytest.raises(ValueError, match=r"masks must be \(B, 1, 64, 64\), got \(6, 1, 32, 32\)"):
            control(z, c[:, :, :32, :32])
        with pytest.raises(ValueError, match="masks must be 0 or 1 everywhere, got 0.5"):
            control(z, c * 0.5)
        with pytest.raises(ValueError, match=r"masks must be as many as noise \(6\), got 5"):
            control(z, c[:5])

    @placing
    def test_a_nodule_is_bright_in_its_box_and_nothing_changes_outside(self, control):
        z, c = noise(control, 40), masks(40)
        shown, plain = control(z, c), control(z, torch.zeros_like(c))
        difference = shown - plain
        assert shown.min() >= -1 and shown.max() <= 1 and (difference * (1 - c)).abs().max() == 0
        means = difference.sum(dim=(1, 2, 3)) / c.sum(dim=(1, 2, 3))
        assert means.mean() > 0.01 and (means > 0).float().mean() > 0.8
        each = [difference[39, 0, int(y1) : int(y2), int(x1) : int(x2)] for x1, y1, x2, y2 in BOXES[:2].tolist()]
        assert all(part.abs().max() > 0.02 for part in each)

    @placing
    def test_a_graft_adds_to_the_callers_films_what_a_whole_image_shows(self, control):
        z, c = noise(control), masks()
        hosts = control(z, torch.zeros_like(c))
        assert torch.allclose(hosts + control.differences(hosts, z, c), control(z, c), atol=1e-6)
        others = (films(6, seed=80).float() / 127.5 - 1).double()
        added = control.differences(others, z, c)
        assert added.dtype == torch.float64 and (added * (1 - c)).abs().max() == 0 and added.abs().max() > 0.02
        assert (others + added).max() <= 1 + 1e-6
        assert control.differences(others, z, torch.zeros_like(c)).abs().max() == 0

    @placing
    def test_wrong_hosts_are_refused(self, control):
        with pytest.raises(ValueError, match=r"hosts must be \(6, 1, 64, 64\), got \(5, 1, 64, 64\)"):
            control.differences(torch.zeros(5, 1, SIZE, SIZE), noise(control), masks())

    @placing
    def test_more_boxes_than_draws_are_filled_too(self, control):
        boxes = torch.tensor([[x, y, x + 8.0, y + 8] for x in (4, 20, 36) for y in (4, 20, 36)])
        c = boxes_to_masks([boxes], SIZE)
        difference = control(noise(control, 1), c) - control(noise(control, 1), torch.zeros_like(c))
        for x1, y1, x2, y2 in boxes.int().tolist():
            assert difference[0, 0, y1:y2, x1:x2].abs().max() > 0

    @placing
    @pytest.mark.parametrize("box", [[0, 0, 9, 8], [55, 56, 64, 64], [30, 0, 31, 1], [20, 20, 22, 30]])
    def test_boxes_at_the_border_and_narrow_ones_are_filled(self, control, box):
        c = boxes_to_masks([torch.tensor([box]).float()] * 6, SIZE)
        hosts = torch.zeros(6, 1, SIZE, SIZE)
        added = control.differences(hosts, noise(control), c)
        assert added.isfinite().all() and (added * (1 - c)).abs().max() == 0 and added.abs().max() > 0

    @pytest.mark.gpu
    @every
    def test_cuda_gives_what_the_cpu_gives(self, control):
        z, c = noise(control), masks()
        made = control(z.cuda(), c.cuda())
        assert made.is_cuda and torch.allclose(made.cpu(), control(z, c), atol=1e-5)
        if control.places:
            hosts = torch.zeros(6, 1, SIZE, SIZE)
            added = control.differences(hosts.cuda(), z.cuda(), c.cuda())
            assert added.is_cuda and torch.allclose(added.cpu(), control.differences(hosts, z, c), atol=1e-5)


# --- Each one's own ---
def test_drawn_peak_is_what_the_noise_says_and_saturates_at_white():
    control = DrawnNodules(films(2), peaks=(0.1, 0.3))
    z, c = torch.zeros(1, control.noise_dim), boxes_to_masks([torch.tensor([[20.0, 20, 41, 41]])], SIZE)
    added = control.differences(torch.zeros(1, 1, SIZE, SIZE), z, c)[0, 0]
    assert added[30, 30] == added.max() and added.max().item() == pytest.approx(0.2)  # the median of [.1, .3]
    rim = math.exp(-1.5)
    half_way = math.exp(-1.5 * (5 / 10.5) ** 2)
    assert added[30, 35].item() == pytest.approx(0.2 * (half_way - rim) / (1 - rim), rel=1e-4)
    white = control.differences(torch.full((1, 1, SIZE, SIZE), 0.95), z, c)
    assert white.max().item() == pytest.approx(0.05, abs=1e-6)


def test_blobs_are_one_in_the_middle_and_the_same_at_every_rim():
    blobs = gaussian_blobs(torch.tensor([[10.0, 20, 21, 31], [10, 20, 31, 61]]), 64)
    assert blobs.shape == (2, 1, 64, 64) and blobs[0, 0, 25, 15] == 1 and blobs[1, 0, 40, 20] == 1
    assert blobs[0, 0, 25, 10].item() == pytest.approx(math.exp(-1.5 * (5 / 5.5) ** 2))


def test_copies_come_from_the_nodules_nearest_in_size():
    real = torch.zeros(3, 1, 96, 96)
    boxes = torch.tensor([[40.0, 40, 46, 46], [40, 40, 50, 50], [40, 40, 55, 55]])
    for film, (low, _, high, _), bright in zip(real, boxes.int().tolist(), (0.2, 0.4, 0.6), strict=True):
        film[:, low + 2 : high - 2, low + 2 : high - 2] = bright
    control = CopiedNodules(torch.zeros(1, 1, 96, 96), real, boxes, neighbours=1)
    z = torch.randn(8, control.noise_dim, generator=torch.Generator().manual_seed(0))
    for side, bright in ((5, 0.2), (10, 0.4), (15, 0.6)):
        asked = torch.tensor([[20.0, 30, 20 + side, 30 + side]])
        added = control.differences(torch.zeros(8, 1, 96, 96), z, boxes_to_masks([asked] * 8, 96))
        assert torch.allclose(added.amax(dim=(1, 2, 3)), torch.full((8,), bright), atol=0.1)


def test_a_copy_in_its_own_place_and_size_is_the_real_film():
    real = nodules()
    control = CopiedNodules(films(1), real, BOXES, neighbours=1)
    for i in range(len(control.boxes)):
        film = control.nodules[i : i + 1].float() / 127.5 - 1
        c = boxes_to_masks([control.boxes[i : i + 1]], SIZE)
        added = control.differences(film, noise(control, 1), c)
        assert added.abs().max() < 0.02


def test_real_nodules_that_do_not_survive_the_blend_are_left_out():
    real, boxes = nodules().float() / 127.5 - 1, torch.cat([BOXES, BOXES[:1]])
    dark = real[:1].clone()
    dark[:, :, 22:26, 16:20] = -1.0
    edge = torch.where(torch.arange(SIZE) < 18, -0.9, 0.9).expand(1, 1, SIZE, SIZE)
    kept = CopiedNodules(films(1), real, BOXES).boxes
    crossing = CopiedNodules(films(1), real, BOXES, roughest=9).boxes  # one lies at the heart's edge
    assert len(kept) == 3 and torch.equal(crossing, BOXES)
    assert torch.equal(CopiedNodules(films(1), torch.cat([real, dark]), boxes).boxes, kept)
    assert torch.equal(CopiedNodules(films(1), torch.cat([real, edge]), boxes).boxes, kept)
    large = torch.cat([BOXES, torch.tensor([[10.0, 10, 30, 20]])])
    assert torch.equal(CopiedNodules(films(1), torch.cat([real, real[:1]]), large).boxes, kept)


def test_superimposed_nodules_are_the_templates_own(templates):
    nodule = CTNodules(templates)
    control = SuperimposedNodules(films(2), nodule, contrast=(0.25, 0.25))
    added = control.differences(torch.zeros(6, 1, SIZE, SIZE), noise(control), masks())
    assert torch.allclose(added.amax(dim=(1, 2, 3)), torch.full((6,), 0.25), atol=1e-6)
    loose = SuperimposedNodules(films(2), nodule, contrast=(0.25, 0.25), fill=(0.4, 0.5))
    smaller = loose.differences(torch.zeros(6, 1, SIZE, SIZE), noise(control), masks())
    assert (smaller > 0.05).sum() < 0.6 * (added > 0.05).sum()


def test_duplicated_films_are_the_given_ones_and_all_are_shown():
    normal, nodule = films(5), nodules()
    control = DuplicatedFilms(normal, nodule)
    z = keyed_noise(range(60), 1)
    for given_films, c in ((normal, torch.zeros(60, 1, SIZE, SIZE)), (nodule, masks(60))):
        real = given_films.float() / 127.5 - 1
        found = [[torch.equal(one, film) for film in real].index(True) for one in control(z, c)]
        assert set(found) == set(range(len(real)))


def test_hash_changes_with_films_settings_and_class(templates):
    first, second, nodule = films(5), films(5, seed=9), CTNodules(templates)
    made = [
        DrawnNodules(first),
        DrawnNodules(second),
        DrawnNodules(first, peaks=(0.1, 0.2)),
        CopiedNodules(first, nodules(), BOXES),
        CopiedNodules(first, nodules(), BOXES + 1),
        CopiedNodules(first, nodules(), BOXES, neighbours=2),
        SuperimposedNodules(first, nodule),
        SuperimposedNodules(first, nodule, fill=None),
        DuplicatedFilms(first, nodules()),
        DuplicatedFilms(nodules(), first),
    ]
    assert len({control.weights_hash for control in made}) == len(made)
    assert DrawnNodules(first.clone()).weights_hash == made[0].weights_hash


def test_float_films_are_shown_as_they_are():
    real = films(3).float() / 127.5 - 1
    made = DrawnNodules(real.double())(keyed_noise(range(4), 16), torch.zeros(4, 1, SIZE, SIZE))
    assert all(any(torch.equal(one, film) for film in real) for one in made)


@pytest.mark.parametrize(("wrong", "match"), WRONG_FILMS)
def test_wrong_films_are_refused(wrong, match, templates):
    for make, name in (
        (DrawnNodules, "films"),
        (lambda f: SuperimposedNodules(f, CTNodules(templates)), "films"),
        (lambda f: CopiedNodules(films(1), f, BOXES), "nodules"),
        (lambda f: DuplicatedFilms(f, nodules()), "normal"),
        (lambda f: DuplicatedFilms(films(1), f), "nodule"),
    ):
        with pytest.raises(ValueError, match=f"{name} {match}"):
            make(wrong)
    with pytest.raises(TypeError, match="films must be uint8 or floating point, got torch.int64"):
        DrawnNodules(torch.zeros(2, 1, SIZE, SIZE, dtype=torch.int64))


def test_wrong_settings_are_refused(templates):
    nodule, half = CTNodules(templates), nodules()[:, :, ::2, ::2]
    for make, match in (
        (
            lambda: DrawnNodules(films(1), peaks=(0.2, 0.1)),
            r"peaks must be 0 < least <= largest <= 2, got \(0.2, 0.1\)",
        ),
        (lambda: CopiedNodules(films(1), nodules(), BOXES[:2]), r"boxes must be as many as nodules \(4\), got 2"),
        (lambda: CopiedNodules(films(1), half, BOXES / 2), r"nodules must be as large as films \(64\), got 32"),
        (lambda: CopiedNodules(films(1), nodules(), BOXES * 2), "boxes must be inside the image"),
        (lambda: CopiedNodules(films(1), nodules(), BOXES, roughest=0), "roughest must be > 0, got 0"),
        (lambda: CopiedNodules(films(1), nodules(), BOXES, neighbours=0), "neighbours must be >= 1, got 0"),
        (lambda: CopiedNodules(films(1), nodules()[:1], torch.tensor([[0.0, 0, 40, 40]])), "got none in 1"),
        (lambda: SuperimposedNodules(films(1), nodule, contrast=(0, 1)), "contrast must be 0 < low <= high <= 2"),
        (lambda: SuperimposedNodules(films(1), nodule, fill=(0.5, 2)), "fill must be 0 < low <= high <= 1, or None"),
        (lambda: DuplicatedFilms(films(1), half), r"nodule must be as large as normal \(64\), got 32"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="templates must be CTNodules, got str"):
        SuperimposedNodules(films(1), str(templates))


# --- Masks taken apart ---
def test_boxes_that_do_not_touch_come_back_as_they_are():
    boxes = [BOXES, torch.zeros(0, 4), BOXES[:1], torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([[5.0, 5, 6, 6]])]
    found = boxes_of_masks(boxes_to_masks(boxes, SIZE))
    assert [len(b) for b in found] == [4, 0, 1, 1, 1]
    for one, own in zip(found, boxes, strict=True):
        assert one.dtype == torch.float32 and {tuple(b) for b in one.tolist()} == {tuple(b) for b in own.tolist()}


@given(st.lists(st.tuples(*[st.integers(0, 19)] * 2, *[st.integers(1, 12)] * 2), min_size=1, max_size=5))
@settings(deadline=None, max_examples=80)
def test_any_union_of_boxes_is_covered_exactly(corners):
    boxes = torch.tensor([[x, y, min(x + w, 24), min(y + h, 20)] for x, y, w, h in corners if y < 20]).float()
    c = boxes_to_masks([boxes.reshape(-1, 4)], (20, 24))
    assert torch.equal(boxes_to_masks(boxes_of_masks(c), (20, 24)), c)


def test_two_overlapping_boxes_are_found_as_they_are():
    boxes = torch.tensor([[5.0, 5, 20, 20], [15, 15, 30, 30]])
    assert boxes_of_masks(boxes_to_masks([boxes], SIZE))[0].tolist() == boxes.tolist()


def test_masks_that_are_no_boxes_are_refused():
    ragged = (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    with pytest.raises(ValueError, match="masks must be unions of a few boxes, with up to 64 edges each way"):
        boxes_of_masks(ragged)


# --- Blending ---
def test_blend_of_a_slope_into_a_flat_film_is_flat():
    x = torch.linspace(-0.4, 0.4, 48).expand(1, 1, 48, 48)
    inside = boxes_to_masks([torch.tensor([[16.0, 16, 30, 30]])], 48, shape="ellipse") > 0
    blended = poisson_blend(torch.zeros(1, 1, 48, 48), x, inside, steps=14 * 14)
    assert blended.abs().max() < 0.01  # a slope is harmonic: nothing of it is left


def test_blend_at_the_border_takes_the_level_of_the_film():
    target = torch.full((1, 1, 32, 32), 0.3)
    inside = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    inside[:, :, :8, 24:] = True
    blended = poisson_blend(target, torch.full((1, 1, 32, 32), -0.8), inside, steps=10)
    assert torch.allclose(blended, target, atol=1e-5)


# --- Places ---
@pytest.fixture(scope="module")
def anywhere():
    return uniform_prior()


def test_random_places_are_uniform_and_keep_the_priors_sizes(anywhere):
    bundled, stream = LocationPrior.bundled(), torch.Generator().manual_seed(0)
    own, usual = (
        boxes_to_points(torch.cat([b[:1] for b in prior.sample(4000, stream, 256).boxes]).double().numpy(), 256, 256)
        for prior in (anywhere, bundled)
    )
    # A box must be in the film: of the middle, where all sizes may be, each tenth holds as many.
    for axis in (0, 1):
        middle = own[(own[:, axis] > 0.1) & (own[:, axis] < 0.9), axis]
        share = torch.histc(torch.from_numpy(middle), 8, 0.1, 0.9) / len(middle)
        assert share.sub(1 / 8).abs().max() < 0.02
        assert (own[:, axis] < 0.1).mean() > 0.05 and (own[:, axis] > 0.9).mean() > 0.05
    for part in (2, 3):
        assert own[:, part].mean() == pytest.approx(usual[:, part].mean(), abs=0.06)
        assert own[:, part].std() == pytest.approx(usual[:, part].std(), rel=0.15)
    assert (anywhere.counts == bundled.counts).all() and bool(anywhere.field.all())


def test_random_places_save_load_and_repeat(anywhere, tmp_path):
    anywhere.save(tmp_path / "anywhere.safetensors")
    again = LocationPrior.load(tmp_path / "anywhere.safetensors")
    one, other, third = (p.sample(20, torch.Generator().manual_seed(1), 64) for p in (anywhere, again, uniform_prior()))
    assert torch.equal(one.masks, other.masks) and torch.equal(one.masks, third.masks)
    inside = torch.tensor([[10.0, 10, 20, 20], [2, 2, 12, 12]])
    values = anywhere.log_prob(inside, 256)
    assert values.isfinite().all() and values[0].item() == pytest.approx(values[1].item())
