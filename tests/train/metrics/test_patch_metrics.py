"""Patch classifier: patches, AUC with its interval, sources of nodules."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator

from carim_aug.location.prior import LocationPrior
from train.metrics.patches import PATCH, PatchNet, auc, auc_interval, patches_at
from train.reproduction.patches import PLACES, PatchPreset, held_out_patches, hits, learnt, train_net, worth
from train.reproduction.sources import blob_source, poisson_blend, poisson_source, read_patients, whole_source


def test_patches_of_a_flat_film_are_zero_and_of_a_point_peak_at_it():
    films = torch.full((2, 1, 256, 256), 0.3)
    films[1, 0, 100, 60] = 1.0
    patches = patches_at(films, torch.tensor([[128.0, 128.0], [60.5, 100.5]]))
    assert patches.shape == (2, 1, PATCH, PATCH) and patches[0].abs().max() < 1e-6
    assert patches[1].argmax() == (PATCH // 2) * PATCH + PATCH // 2
    assert patches[1].sum().abs() < 0.2  # the blur spreads what it takes, nearly all of it inside the patch


def test_patches_at_a_border_lie_inside_the_film():
    ramp = torch.arange(256.0)[None, None, None].expand(1, 1, 256, 256) / 128 - 1
    patches = patches_at(ramp, torch.tensor([[0.0, 255.0]]))
    assert patches.isfinite().all() and patches[..., 30:].abs().max() < 1e-5  # a ramp is its own blur off the border


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_auc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    value = auc(torch.tensor(positive).float(), torch.tensor(negative).float())
    assert value.item() == pytest.approx(sum(pairs) / len(pairs))


def test_interval_holds_the_auc_and_patients_widen_it():
    rng = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(60, generator=rng) + 1, torch.randn(200, generator=rng)
    value = auc(positive, negative).item()
    alone = auc_interval(positive, negative, torch.arange(60), torch.arange(200), generator=rng)
    # Six patients with ten alike nodules each know less than sixty patients.
    alike = positive[:6].repeat_interleave(10)
    few = auc_interval(alike, negative, torch.arange(6).repeat_interleave(10), torch.arange(200), generator=rng)
    assert alone[0] < value < alone[1] and few[1] - few[0] > 1.5 * (alone[1] - alone[0])


def test_net_learns_blobs():
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(120, 1, 256, 256, generator=rng) * 0.2 - 0.1
    boxes = (torch.rand(120, 2, generator=rng) * 180 + 30).repeat(1, 2) + torch.tensor([0.0, 0, 16, 16])
    shown, boxes = blob_source(noise, boxes, rng)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    with_blob, without = patches_at(shown, centres), patches_at(noise, centres)
    before = torch.get_rng_state()
    net = train_net(with_blob[:80], without[:80], steps=30, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and isinstance(net, PatchNet) and not net.training
    with torch.no_grad():
        assert auc(net(with_blob[80:]), net(without[80:])) > 0.9


def test_poisson_blend_of_a_film_with_itself_or_a_shifted_level_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    film = torch.rand(2, 1, 64, 64, generator=rng) - 0.5
    inside = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    inside[:, :, 20:32, 24:40] = True
    assert torch.allclose(poisson_blend(film, film, inside), film, atol=1e-5)
    assert torch.allclose(poisson_blend(film, film - 0.3, inside), film, atol=1e-4)


def test_poisson_copies_carry_the_nodule_to_the_new_place(phantom_data):
    real = read_patients(phantom_data, ["train"])
    assert len(real.normal) == 16 and len(real.boxes) == 4 and real.normal.shape[-1] == 256
    films = torch.zeros(3, 1, 256, 256)
    asked = torch.tensor([[60.0, 100, 92, 132], [150, 60, 182, 92], [0, 0, 20, 20]])
    shown, boxes = poisson_source(real)(films, asked, torch.Generator().manual_seed(0))
    assert (boxes >= 0).all() and (boxes <= 256).all()
    for image, film, (x1, y1, x2, y2) in zip(shown, films, boxes.round().long().tolist(), strict=True):
        changed = (image != film)[0].nonzero()
        assert len(changed) and changed.amin(0).ge(torch.tensor([y1, x1]) - 1).all()
        assert changed.amax(0).le(torch.tensor([y2, x2])).all()


def test_official_boxes_are_told_from_the_extra_ones(phantom_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_data, folder)
    assert read_patients(folder, ["train"]).official.all()
    rows = ["Image Index,Finding Label,x,y,w,h", "00000004_000.png,Nodule,400,400,60,60"]
    rows += ["00000004_000.png,Nodule,100,100,600,60"]  # too long for a nodule
    (folder / "ChestX-Det_boxes.csv").write_text("\n".join(rows))
    real = read_patients(folder, ["train"])
    assert real.official.tolist().count(False) == 1 and len(real.boxes) == 5
    assert real.boxes[~real.official].tolist() == [[100, 100, 115, 115]]


@pytest.mark.parametrize("name", sorted(PLACES))
def test_places_have_the_priors_sizes_and_lie_in_the_lung_field(name):
    prior = LocationPrior.bundled()
    boxes = PLACES[name](prior)(400, torch.Generator().manual_seed(0))
    again = PLACES[name](prior)(400, torch.Generator().manual_seed(0))
    assert torch.equal(boxes, again) and boxes.shape == (400, 4) and boxes.min() >= 0 and boxes.max() <= 256
    usual = PLACES["prior"](prior)(400, torch.Generator().manual_seed(0))
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], usual[:, 2:] - usual[:, :2], atol=1e-4)
    cells = ((boxes[:, :2] + boxes[:, 2:]) / 8).long().clamp(max=63)
    assert prior.field[cells[:, 1], cells[:, 0]].float().mean() > 0.98  # boxes at the border are moved inside


def test_worth_and_hits_of_a_net_that_sees_bright_middles(phantom_data):
    class Middle(torch.nn.Module):
        def forward(self, patches):
            return patches[:, 0, 20:28, 20:28].mean(dim=(1, 2))

    test = read_patients(phantom_data, ["val"])
    held_out = held_out_patches(test, PLACES["prior"](LocationPrior.bundled()), times=3)
    assert held_out.real.shape == (2, 1, PATCH, PATCH) and len(held_out.normal) == len(held_out.normal_patients) == 24
    held_out.normal[:], held_out.real[:] = 0, 1
    held_out.normal[:12] = torch.arange(12.0)[:, None, None, None] / 10
    row = worth([Middle(), Middle()], held_out)
    # 12 zeros and 0 .. 0.9 lie below 1, 1.0 ties, 1.1 is above.
    assert row["auc"] == pytest.approx(22.5 / 24) and row["seeds"] == pytest.approx([22.5 / 24] * 2)
    found = hits(
        [Middle()], torch.tensor([0.5, 0.95, 1.05]).view(3, 1, 1, 1).expand(3, 1, PATCH, PATCH), held_out.normal
    )
    assert found.tolist() == [False, True, True]  # nine tenths of 24 places: below 0.9


def test_same_seeds_learn_the_same_and_other_seeds_differ(phantom_data):
    real, places = read_patients(phantom_data, ["train"]), PLACES["field"](LocationPrior.bundled())
    preset = PatchPreset(steps=2, patches=50, seeds=2)
    nets, again = (learnt(real, places, blob_source, preset, "blob") for _ in range(2))
    first = [net.head.weight for net in nets]
    assert all(torch.equal(a, b.head.weight) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_whole_source_gives_the_same_chest_with_and_without_a_nodule(tmp_path):
    generator("tiny").save_pretrained(tmp_path)
    films, boxes = torch.zeros(2, 1, 256, 256), torch.tensor([[100.0, 100, 132, 132]] * 2)
    shown, _ = whole_source(tmp_path)(films, boxes, torch.Generator().manual_seed(0))
    without, _ = whole_source(tmp_path, nodule=False)(films, boxes, torch.Generator().manual_seed(0))
    other, _ = whole_source(tmp_path, nodule=False)(films, boxes, torch.Generator().manual_seed(1))
    assert shown.shape == films.shape and not torch.equal(shown, without)
    assert (shown - without).abs().mean() < (without - other).abs().mean()


def test_splits_without_boxes_are_refused(phantom_data):
    with pytest.raises(ValueError, match="need normal films and nodule boxes, got 0 and 0"):
        read_patients(phantom_data, ["test"])
