"""Class activation maps: equal to other people's on a trained network, right gradients, bad input."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from carim_aug.ops.cam import LOOKING, METHODS, activation_map, enlarged, normalised


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


def blobs(n, rng):
    """Images of noise and, by class, nothing, a bright disc or a dark one."""
    classes = torch.arange(n) % 3
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centre = torch.rand(n, 2, generator=rng) * 10 + 3
    disc = ((x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2 < 6).float()
    images = disc * torch.tensor([0.0, 2.0, -2.0])[classes][:, None, None]
    return (images + 0.3 * torch.randn(n, 16, 16, generator=rng))[:, None], classes


@pytest.fixture(scope="module")
def trained():
    """A network that tells the three classes apart, in float64 and eval mode."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    net = SmallNet().train()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(120):
        images, classes = blobs(48, rng)
        loss = F.cross_entropy(net(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net = net.eval()
    images, classes = blobs(300, rng)
    assert (net(images).argmax(1) == classes).float().mean() > 0.9
    return net.double()


@pytest.fixture
def images():
    return blobs(4, torch.Generator().manual_seed(5))[0].double()


@pytest.mark.parametrize("name", ["grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", *LOOKING])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_equals_pytorch_grad_cam(trained, images, name, target):
    theirs = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    names = ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM", "ScoreCAM", "AblationCAM", "EigenCAM")
    kind = getattr(theirs, dict(zip([m for m in METHODS + LOOKING if m != "closed-form"], names, strict=True))[name])
    seen = []

    class Kept(kind):
        """Keeps the map as it is before ReLU, scaling and enlarging."""

        def get_cam_image(self, *args, **kwargs):
            seen.append(super().get_cam_image(*args, **kwargs))
            return seen[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Kept(model=trained, target_layers=[trained.activation]) as cam:
            cam(input_tensor=images, targets=[targets.ClassifierOutputTarget(target)] * len(images))
    ours = activation_map(trained, images, target, layer=trained.activation, method=name).maps[:, 0].numpy()
    expected = np.asarray(seen[0])
    if name == "eigen-cam":  # theirs may be of either sign
        same = np.sign((ours * expected).sum(axis=(1, 2), keepdims=True))
        expected = expected * same
    scale = np.abs(expected).max()
    assert scale > 0 and np.abs(ours - expected).max() <= 1e-6 * max(1, scale)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_grad_cam_equals_captum(trained, images, target):
    attr = pytest.importorskip("captum.attr")
    theirs = attr.LayerGradCam(trained, trained.activation).attribute(images, target=target)
    ours = activation_map(trained, images, target, layer=trained.activation).maps
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [0, torch.tensor([2, 1, 0, 1])])
def test_closed_form_equals_grad_cam_before_a_global_average_pool(trained, images, target):
    a = activation_map(trained, images, target, layer=trained.activation, method="closed-form")
    b = activation_map(trained, images, target, layer=trained.activation, method="grad-cam")
    assert torch.allclose(a.maps, b.maps, rtol=0, atol=1e-15)
    # sum_ij CAM = y_c - b_c at the pool's input (EVIDENCE, Quality).
    index = torch.as_tensor(target).expand(4)
    expected = a.logits.gather(1, index[:, None])[:, 0] - trained.head.bias[index]
    assert torch.allclose(a.maps.sum(dim=(1, 2, 3)), expected.detach(), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_respect_to_the_image_are_right(trained, method):
    images = blobs(2, torch.Generator().manual_seed(2))[0][:, :, 4:12, 4:12].double().requires_grad_()
    layer = trained.activation if method == "closed-form" else trained.features[3]
    weight = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    maps = activation_map(trained, images, 1, layer=layer, method=method, create_graph=True).maps
    if method != "closed-form":
        weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(3)).double()

    def loss(x):
        out = activation_map(trained, x, 1, layer=layer, method=method, create_graph=True).maps
        return (out * weight).sum() * 100

    assert torch.autograd.gradcheck(loss, (images,), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_a_map_is_of_the_layer_before_what_changes_it_in_place(images):
    class InPlace(SmallNet):
        def forward(self, x):
            return self.head(F.relu(self.features(x), inplace=True).mean(dim=(2, 3)))

    torch.manual_seed(0)
    net = InPlace().double().eval()
    maps = activation_map(net, images, 1, layer=net.features).maps
    features = net.features(images)
    (gradient,) = torch.autograd.grad(net.head(features.relu().mean(dim=(2, 3)))[:, 1].sum(), features)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(1, keepdim=True)
    assert torch.allclose(maps, expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS + LOOKING)
def test_nothing_of_the_callers_changes(trained, images, method):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    copy = images.clone()
    for parameter in trained.parameters():
        parameter.grad = None
    out = activation_map(trained, images, 1, layer=trained.activation, method=method)
    assert not out.maps.requires_grad and not out.logits.requires_grad
    assert torch.equal(images, copy) and not images.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())
    assert not trained.activation._forward_hooks


def test_maps_exist_for_a_frozen_classifier_and_under_no_grad(trained, images):
    expected = activation_map(trained, images, 1, layer=trained.activation).maps
    flags = [p.requires_grad for p in trained.parameters()]
    trained.requires_grad_(False)
    try:
        with torch.no_grad():
            assert torch.equal(activation_map(trained, images, 1, layer=trained.activation).maps, expected)
    finally:
        for parameter, flag in zip(trained.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def test_relu_cuts_what_is_negative(trained, images):
    signed = activation_map(trained, images, 2, layer=trained.activation).maps
    cut = activation_map(trained, images, 2, layer=trained.activation, relu=True).maps
    assert (signed < 0).any() and torch.equal(cut, signed.clamp(min=0))


def test_normalised_divides_by_the_largest_and_guards_dead_maps():
    maps = torch.tensor([[[[1.0, 4.0], [-2.0, 2.0]]], [[[-1.0, -2.0], [0.0, -3.0]]]], requires_grad=True)
    out = normalised(maps)
    assert out[0, 0].tolist() == [[0.25, 1.0], [-0.5, 0.5]] and not out[1].any()
    out.sum().backward()
    assert maps.grad.isfinite().all() and not maps.grad[1].any()


def test_enlarged_is_of_the_masks_size():
    assert enlarged(torch.rand(2, 1, 4, 4), 16).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method must be one of"),
        ({"method": "eigen-cam", "create_graph": True}, "with create_graph=True, got 'eigen-cam'"),
        ({"target": 3}, r"target must be in \[0, 2\], got 3"),
        ({"target": -1}, r"target must be in \[0, 2\], got -1"),
        ({"target": torch.tensor([0, 1])}, "target must be a class or"),
        ({"target": 0.5}, "target must be a class or"),
    ],
)
def test_bad_arguments_are_named(trained, images, options, message):
    options = {"target": 0, "layer": trained.activation, **options}
    with pytest.raises(ValueError, match=message):
        activation_map(trained, images, options.pop("target"), **options)


def test_a_layer_without_maps_is_refused(trained, images):
    for layer in (trained.head, nn.ReLU()):
        with pytest.raises(ValueError, match="layer must give maps"):
            activation_map(trained, images, 0, layer=layer)


def test_closed_form_is_refused_where_it_does_not_hold(trained, images):
    with pytest.raises(ValueError, match="head is a linear layer of the layer's maps"):
        activation_map(trained, images, 0, layer=trained.features[3], method="closed-form")
    with pytest.raises(ValueError, match="logits that are head"):
        activation_map(trained, images, 0, layer=trained.features, method="closed-form")
