import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from carim_aug.ops.cam import METHODS, activation_map, closed_form_map, enlarge, normalize_map


class SmallNet(nn.Module):
    """Three convolutions, global average pool, a linear head: closed form and Grad-CAM agree here."""

    def __init__(self, classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1)
        )
        self.activation = nn.ReLU()
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.activation(self.features(images)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def net():
    """A network with statistics of its own, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallNet().double()
        net.features(2 * torch.randn(16, 1, 16, 16).double() + 1)
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(5)).double()


THEIRS = {"grad-cam": "GradCAM", "grad-cam++": "GradCAMPlusPlus", "xgrad-cam": "XGradCAM"}
THEIRS |= {"hirescam": "HiResCAM", "layercam": "LayerCAM"}


@pytest.mark.train  # pytorch-grad-cam takes seconds to import
@pytest.mark.parametrize(("method", "name"), THEIRS.items())
def test_equals_pytorch_grad_cam(net, images, method, name):
    base = getattr(pytest.importorskip("pytorch_grad_cam"), name)
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    maps = []

    class Raw(base):  # records the map as it is before ReLU, scaling and enlarging
        def get_cam_image(self, *args, **kwargs):
            maps.append(super().get_cam_image(*args, **kwargs))
            return maps[-1]

    for target in range(3):
        with warnings.catch_warnings(action="ignore"), Raw(model=net, target_layers=[net.activation]) as cam:
            cam(input_tensor=images, targets=[targets.ClassifierOutputTarget(target)] * len(images))
        ours = activation_map(net, images, target, layer=net.activation, method=method).maps[:, 0].numpy()
        assert np.abs(maps[-1]).max() > 0 and np.allclose(ours, maps[-1], rtol=1e-5, atol=1e-9)


def test_grad_cam_equals_captum_and_is_of_the_layer_before_what_changes_it_in_place(net, images, monkeypatch):
    expected = activation_map(net, images, 1, layer=net.features).maps
    captum = pytest.importorskip("captum.attr").LayerGradCam(net, net.activation)
    for target in range(3):
        ours = activation_map(net, images, target, layer=net.activation).maps
        assert torch.allclose(ours, captum.attribute(images, target=target), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(net.activation, "inplace", True)
    assert activation_map(net, images, 1, layer=net.features).maps.equal(expected) and (expected < 0).any()


@pytest.mark.parametrize("target", [0, torch.tensor([2, 1, 0, 1])])
def test_closed_form_equals_grad_cam_before_a_global_average_pool(net, images, target):
    a = activation_map(net, images, target, layer=net.activation, method="closed-form")
    b = activation_map(net, images, target, layer=net.activation, method="grad-cam")
    assert torch.allclose(a.maps, b.maps, rtol=0, atol=1e-15)
    index = torch.as_tensor(target).expand(4)
    expected = a.logits.gather(1, index[:, None])[:, 0] - net.head.bias[index]
    assert torch.allclose(a.maps.sum(dim=(1, 2, 3)), expected.detach(), atol=1e-12)


def test_closed_form_of_features_at_hand_is_the_weighted_sum_worked_on_paper():
    features = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])  # two maps of 1 x 2
    weights = torch.tensor([3.0, -1.0], requires_grad=True)
    maps = closed_form_map(features, weights)
    assert maps.tolist() == [[[[1.5, 1.0]]]] and closed_form_map(features, weights[None]).equal(maps)
    maps[..., 1].sum().backward()
    assert weights.grad.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_respect_to_the_image_are_right(net, images, method):
    images = images[:1, :, :6, :6].requires_grad_()
    layer = net.activation if method == "closed-form" else net.features[3]
    shape = activation_map(net, images, 1, layer=layer, method=method).maps.shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()

    def loss(x):
        out = activation_map(net, x, 1, layer=layer, method=method, create_graph=True).maps
        return (out * weight).sum() * 100

    assert torch.autograd.gradcheck(loss, (images,), eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_callers_changes_and_nothing_of_theirs_is_needed(net, images, method):
    frozen, same = copy.deepcopy(net).requires_grad_(False), images.clone()
    net.zero_grad()
    out = activation_map(net, images, 1, layer=net.activation, method=method)
    assert not (out.maps.requires_grad or out.logits.requires_grad or images.requires_grad) and images.equal(same)
    assert all(torch.equal(v, frozen.state_dict()[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not net.activation._forward_hooks
    with torch.no_grad():
        again = activation_map(frozen, images, 1, layer=frozen.activation, method=method, relu=True)
    assert torch.equal(again.maps, out.maps.clamp(min=0)) and (method != "grad-cam" or (out.maps < 0).any())


def test_a_normalized_map_is_divided_by_its_largest_value_and_a_dead_one_is_zero():
    maps = torch.tensor([[[[1.0, 4.0], [-2.0, 2.0]]], [[[-1.0, -2.0], [0.0, -3.0]]]], requires_grad=True)
    out = normalize_map(maps)
    assert (
        out[0, 0].tolist() == [[0.25, 1.0], [-0.5, 0.5]] and not out[1].any() and enlarge(maps, 4).shape[2:] == (4, 4)
    )
    out.sum().backward()
    assert maps.grad.isfinite().all() and not maps.grad[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "score-cam"}, "method must be one of .*got 'score-cam'"),
        ({"target": 3}, r"target must be in \[0, 2\], got 3"),
        ({"target": torch.tensor([0, 1])}, r"target must be a class or .*got \(2,\)"),
        ({"target": 0.5}, "target must be a class or .*got .*float32"),
        ({"layer": "head"}, r"layer must give maps .*got \[\(4, 3\)\]"),
        ({"layer": "features.3", "method": "closed-form"}, "head is a linear layer of the layer's maps"),
        ({"layer": "features", "method": "closed-form"}, "logits that are head"),
    ],
)
def test_bad_arguments_are_named(net, images, options, message):
    options = {"target": 0, "layer": "activation", **options}
    options["layer"] = net.get_submodule(options["layer"])
    with pytest.raises(ValueError, match=message):
        activation_map(net, images, options.pop("target"), **options)
