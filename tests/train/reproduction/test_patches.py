"""What a patch classifier learns from a source of nodules, and finds of it."""

import pytest
import torch
from tiny import generator

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from train.common.images import read_images
from train.common.run import RunError
from train.metrics.patches import PATCH, PatchNet, patches_at
from train.metrics.statistics import auc
from train.reproduction.controls.nodules import DrawnNodules
from train.reproduction.patches import (
    PLACES,
    SIZE,
    SOURCES,
    PatchPreset,
    auc_on_real,
    held_out_patches,
    hits,
    named_sources,
    put_nodules,
    train_net,
    train_nets,
)

pytestmark = pytest.mark.train
BOXES = torch.tensor([[100.0, 100, 132, 132], [60, 40, 80, 70]])


def read(root, split):
    return read_images(root, split, SIZE, only_normal_or_boxed=True)


def test_nodules_come_into_images_as_the_mix_puts_them():
    images = torch.full((2, 1, SIZE, SIZE), 0.25)
    shown = put_nodules(DrawnNodules(64), images, BOXES, [3, 4])
    changed = (shown != images).nonzero()
    assert set(changed[:, 0].tolist()) == {0, 1} and shown.shape == images.shape and bool((images == 0.25).all())
    for row, (x1, y1, x2, y2) in enumerate(BOXES.tolist()):
        y, x = changed[changed[:, 0] == row][:, 2:].unbind(1)
        assert x1 - 2 <= x.min() and x.max() <= x2 + 1 and y1 - 2 <= y.min() and y.max() <= y2 + 1
    assert torch.equal(shown[1:], put_nodules(DrawnNodules(64), images[1:], BOXES[1:], [4]))


def test_whole_images_are_the_same_chest_with_and_without_a_nodule():
    images = torch.zeros(2, 1, SIZE, SIZE)
    shown, without, other = (
        put_nodules(generator(), images, BOXES, seeds, insertion="whole", nodule=nodule)
        for seeds, nodule in (([0, 1], True), ([0, 1], False), ([2, 3], False))
    )
    assert shown.shape == images.shape and not torch.equal(shown, without)
    assert (shown - without).abs().mean() < (without - other).abs().mean()


def test_sources_have_names_and_stand_at_256_pixels(phantom_data, templates):
    train = read(phantom_data, "train")
    sources = named_sources(SOURCES, train, CTNodules(templates))
    names = ["real boxes", "drawn blob", "real boxes, Poisson copies", "CT nodules superimposed"]
    assert list(sources) == names and sources.pop("real boxes") is None
    assert all(hasattr(source, "residuals") and source.image_size == SIZE for source in sources.values())
    assert not named_sources(["ct"], train, None)


@pytest.mark.parametrize("name", sorted(PLACES))
def test_places_have_the_priors_sizes_and_lie_in_the_lung_field(name):
    prior = LocationPrior.bundled()
    boxes, again, usual = (PLACES[n](prior)(400, torch.Generator().manual_seed(0)) for n in (name, name, "prior"))
    assert torch.equal(boxes, again) and boxes.shape == (400, 4) and boxes.min() >= 0 and boxes.max() <= SIZE
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], usual[:, 2:] - usual[:, :2], atol=1e-4)
    cells = ((boxes[:, :2] + boxes[:, 2:]) / 8).long().clamp(max=63)
    assert prior.field[cells[:, 1], cells[:, 0]].float().mean() > 0.98  # boxes at the border are moved inside


def test_net_learns_blobs():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(120, 1, SIZE, SIZE, generator=rng) * 0.25 - 0.125
    boxes = (torch.rand(120, 2, generator=rng) * 180 + 30).repeat(1, 2) + torch.tensor([0.0, 0, 16, 16])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    with_blob = patches_at(put_nodules(DrawnNodules(), images, boxes, list(range(120))), centres)
    without, before = patches_at(images, centres), torch.get_rng_state()
    net = train_net(with_blob[:80], without[:80], steps=30, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and isinstance(net, PatchNet) and not net.training
    with torch.no_grad():
        assert auc(net(with_blob[80:]), net(without[80:])) > 0.9


def test_same_seeds_learn_the_same_and_other_seeds_differ(phantom_data):
    real, places = read(phantom_data, "train"), PLACES["field"](LocationPrior.bundled())
    preset = PatchPreset(steps=2, patches=50, seeds=2)
    nets, again = (train_nets(real, places, DrawnNodules(), preset, "blob") for _ in range(2))
    first = [net.head.weight for net in nets]
    assert all(torch.equal(a, b.head.weight) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert len(train_nets(real, places, None, preset, "real boxes")) == 2
    for use in (lambda images: train_nets(images, places, None, preset, "none"), lambda i: held_out_patches(i, places)):
        with pytest.raises(RunError, match="must hold at least 1 normal and 1 boxed images, got 16 normal and 0 boxed"):
            use(real.rows(real.normal))


def test_auc_and_hits_of_a_net_that_sees_bright_middles(phantom_data):
    class Middle(torch.nn.Module):
        def forward(self, patches):
            return patches[:, 0, 20:28, 20:28].mean(dim=(1, 2))

    test = read(phantom_data, "val")
    held_out = held_out_patches(test, PLACES["prior"](LocationPrior.bundled()), times=3)
    assert held_out.real.shape == (2, 1, PATCH, PATCH) and len(held_out.normal) == len(held_out.normal_patients) == 24
    held_out.normal[:], held_out.real[:] = 0, 1
    held_out.normal[:12] = torch.arange(12.0)[:, None, None, None] / 10
    row = auc_on_real([Middle(), Middle()], held_out)
    # 12 zeros and 0 .. 0.9 lie below 1, 1.0 ties, 1.1 is above.
    assert row["auc"] == pytest.approx(22.5 / 24) and row["seeds"] == pytest.approx([22.5 / 24] * 2)
    patches = torch.tensor([0.5, 0.95, 1.05]).view(3, 1, 1, 1).expand(3, 1, PATCH, PATCH)
    assert hits([Middle()], patches, held_out.normal).tolist() == [False, True, True]  # 0.9 of 24 places are below 0.9
