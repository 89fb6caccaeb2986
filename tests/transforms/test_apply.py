"""From decisions to pixels and labels, with sources of any kind; what a source must be, and do."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from tiny import Images, batch, generator, make_mix, prior

from carim_aug import SyntheticNoduleMix, WorkerDeviceError
from carim_aug.ops.boxes import boxes_to_masks, feather
from carim_aug.ops.images import resize
from carim_aug.ops.random import fold
from carim_aug.transforms.apply import Applier, Placed
from carim_aug.transforms.plan import NO_BOXES, Decision
from carim_aug.transforms.settings import MixSettings


class Bright:
    """Residuals that are as bright as their seed says; notes what it is asked for."""

    image_size, weights_hash = 32, "bright"

    def __init__(self):
        self.asked = defaultdict(list)

    def residuals(self, regions, masks, seeds):
        for name, given in (("regions", regions), ("masks", masks), ("seeds", seeds)):
            self.asked[name].extend(given)
        return masks * torch.tensor([seed % 7 / 10 + 0.1 for seed in seeds])[:, None, None, None]


class Classes:
    """Whole images by class alone."""

    image_size, weights_hash = 32, "classes"

    def class_images(self, nodule, seeds):
        return (nodule.float() - 0.5)[:, None, None, None].expand(-1, 1, 32, 32)


class Broken:
    """Returns what it was made with, whatever is asked."""

    image_size, weights_hash = 32, "broken"

    def __init__(self, made):
        self.images = self.residuals = lambda *_: made


def decision(*boxes, name="Nodule", index=0):
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4) if boxes else NO_BOXES
    return Decision((0, 0, index), name, 17 + index, array, index)


def applier(source, **settings):
    return Applier(MixSettings(prior(), **settings), source)


TWO = decision([0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]), decision([0.2, 0.5, 0.4, 0.8], index=1)


def test_each_box_has_its_own_mask_region_seed_and_residual():
    source, images = Bright(), torch.rand(2, 1, 64, 48, generator=torch.Generator().manual_seed(0)) * 0.2
    mixed, _ = applier(source).pixels(images, Placed(TWO, {}))
    assert source.asked["seeds"] == [17, fold(17, 1), 18]
    boxes = torch.cat([one.boxes_at(32, 32) for one in TWO])
    assert torch.equal(torch.stack(source.asked["masks"]), boxes_to_masks(list(boxes[:, None]), 32))
    expected = resize(images * 2 - 1, (32, 32))[[0, 0, 1]]
    assert torch.allclose(torch.stack(source.asked["regions"]), expected, atol=1e-6)
    added = (mixed - images) * 2  # in units of [-1, 1]
    for (row, y, x), seed in zip(((0, 12, 9), (0, 48, 36), (1, 41, 14)), source.asked["seeds"], strict=True):
        assert added[row, 0, y, x] == pytest.approx(seed % 7 / 10 + 0.1, abs=1e-3)


@pytest.mark.parametrize("insertion", ["graft", "whole"])
def test_only_synthetic_images_change_three_channels_alike_and_whole_ones_are_the_sources(insertion):
    made, real = applier(generator(), insertion=insertion), decision(name=None)
    images = torch.rand(3, 1, 40, 30, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
    before = images.clone()
    mixed, contrast = made.pixels(images, Placed((TWO[0], real, TWO[1]), {}))
    assert torch.equal(images, before) and torch.equal(mixed[1], images[1])
    assert torch.equal(mixed[:, 0], mixed[:, 1]) and torch.equal(mixed[:, 0], mixed[:, 2])
    assert contrast.isnan().tolist() == [insertion == "whole", True, insertion == "whole"]
    if insertion == "whole":
        masks = boxes_to_masks([one.boxes_at(32, 32) for one in TWO], 32)
        whole = resize((generator().images(masks, [17, 18]) + 1) / 2, (40, 30))
        assert torch.allclose(mixed[[0, 2], :1], whole, atol=1e-5)
    else:
        weight = feather([one.boxes_at(40, 30) for one in TWO], (40, 30)).expand(-1, 3, -1, -1)
        assert torch.equal(mixed[[0, 2]][weight == 0], images[[0, 2]][weight == 0])
    assert made.pixels(images, Placed((real,) * 3, {}))[0] is images


def test_a_graft_without_boxes_leaves_the_image():
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    mixed, _ = applier(generator()).pixels(images, Placed((decision(), TWO[0]), {}))
    assert torch.equal(mixed[0], images[0]) and not torch.equal(mixed[1], images[1])


def test_images_of_several_sizes_are_what_each_is_alone():
    images = [
        torch.rand(1, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((40, 30), (64, 64), (40, 30))
    ]
    each = (TWO[0], TWO[1], decision([0.4, 0.4, 0.6, 0.6], index=2))
    for insertion in ("graft", "whole"):
        made = applier(generator(), insertion=insertion)
        for i, image in enumerate(made.pixels(images, Placed(each, {}))[0]):
            alone = made.pixels(images[i][None], Placed((each[i],), {}))[0]
            assert torch.allclose(image, alone[0], atol=1e-5)


def test_a_gradient_flows_through_the_real_images_and_none_from_the_source():
    images = torch.full((2, 1, 32, 32), 0.5, requires_grad=True)
    source = Bright()
    source.residuals = lambda regions, masks, seeds: masks * torch.full((1,), 0.1, requires_grad=True)
    for made, expected in ((applier(generator(), insertion="whole"), 0), (applier(source), 1)):
        mixed, _ = made.pixels(images, Placed((TWO[1], decision(name=None)), {}))
        (grad,) = torch.autograd.grad(mixed.sum(), images)
        assert (grad[0] == expected).all() and (grad[1] == 1).all()


# --- Sources ---
def test_a_class_source_makes_whole_images_for_classifiers_only():
    images, labels = batch(4)
    for name, value in (("Nodule", 0.75), ("No Finding", 0.25)):
        mix = SyntheticNoduleMix(Classes(), prior(), insertion="whole", p={name: 1.0}, eligible=lambda label: True)
        mixed, marked = mix(images, labels)
        assert (mixed == value).all() and marked.tolist() == [int(name == "Nodule")] * 4
    with pytest.raises(ValueError, match="generator must have a method residuals for insertion='graft', got a Classes"):
        SyntheticNoduleMix(Classes(), prior())
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in range(4)]
    data = [(image, target) for image, target in zip(images, targets, strict=True)]
    for call in (lambda: mix(list(images), targets), lambda: mix.wrap(data), lambda: mix.loader(data)):
        with pytest.raises(ValueError, match="labels must have no boxes with a Classes, .* got detection targets"):
            call()


@pytest.mark.parametrize("insertion", ["graft", "whole"])
def test_a_source_that_breaks_its_protocol_is_named(insertion):
    for made, words in (
        (torch.zeros(1, 1, 16, 16), r"Broken must give images \(1, 1, 32, 32\), got \(1, 1, 16, 16\)"),
        (None, r"Broken must give images \(1, 1, 32, 32\), got NoneType"),
        (torch.full((1, 1, 32, 32), 2.5), r"Broken must give images in \[-[12], [12]\], got 2.5 to 2.5"),
        (torch.full((1, 1, 32, 32), torch.nan), r"Broken must give images in \[-[12], [12]\], got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            applier(Broken(made), insertion=insertion).pixels(torch.zeros(1, 1, 32, 32), Placed(TWO[1:], {}))


# --- Devices ---
@pytest.mark.parametrize("device", ["gpu", "cpu:x", 3.5, object()])
def test_a_bad_device_is_named(device):
    with pytest.raises(ValueError, match="device must be a torch.device or its name, got"):
        make_mix(device=device)


@pytest.mark.parametrize("source", [generator, Bright])
@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_that_this_machine_lacks_is_named_at_its_first_use(device, source):
    mix = SyntheticNoduleMix(source(), prior(), p=1.0, placement="prior", device=device)
    for call in (lambda: mix(*batch()), lambda: mix.wrap(Images(4))[0], lambda: list(mix.loader(Images(4)))):
        with pytest.raises(ValueError, match=f"device must be one that this machine has, got '{device}': "):
            call()
    if source is generator:
        with pytest.raises(ValueError, match="device must be one that this machine has"):
            mix.regenerate((0, 0, 0))


@pytest.mark.parametrize("source", [generator, Bright])
def test_cuda_in_a_worker_is_refused_with_what_to_do_instead(source, monkeypatch):
    mix = SyntheticNoduleMix(source(), prior(), p=1.0, placement="prior", device="cuda")
    mix._applier._checked.add(torch.device("cuda"))  # as a fork of a process that has used it
    for place in ("carim_aug.generators.base", "carim_aug.transforms.apply"):
        monkeypatch.setattr(f"{place}.get_worker_info", object)
    with pytest.raises(WorkerDeviceError, match="got 'cuda': use mix.loader"):
        mix.wrap(Images(4))[0]


@pytest.mark.filterwarnings("ignore:images use")
def test_a_graft_is_as_faint_as_its_image_and_uint16_is_taken():
    images = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    labels, options = torch.zeros(4, dtype=torch.int64), {"p": 1.0, "placement": "prior"}
    mix, dark = make_mix(**options), make_mix(**options)
    usual = mix(images, labels)[0] - images
    faint = dark(images * 0.0625, labels)[0] - images * 0.0625
    inside = (images + usual > 0) & (images * 0.0625 + faint > 0)  # else clamped
    assert torch.allclose(faint[inside], usual[inside] * 0.5 * 0.0625, atol=1e-4)
    assert torch.allclose(dark.last_params.contrasts, mix.last_params.contrasts * 0.5 * 0.0625, rtol=0.01)
    deep = (images * 65535).to(torch.uint16)
    mixed = make_mix(**options)(deep, labels)[0]
    assert mixed.dtype == torch.uint16 and torch.allclose(mixed.float() / 65535 - images, usual, atol=1e-3)
