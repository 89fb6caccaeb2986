"""The classifier: input, target, and every form in which such networks are published."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import densenet121

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.ops.cam import activation_map
from train.classifier.densenet import ChestClassifier, ClassifierError, public_names

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def published():
    """torchvision's DenseNet-121 with 14 logits, eval mode, statistics of no neutral value."""
    torch.manual_seed(0)
    net = densenet121(weights=None, num_classes=14).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def expected(published, images):
    with torch.no_grad():
        return published(((images + 1) / 2 - MEAN) / STD)


def chexnet_names(state):
    """The key forms of public CheXNet checkpoints: DataParallel, a wrapper, old names in dense layers, a Sequential."""
    out = {}
    for name, tensor in state.items():
        for part in ("norm", "conv"):
            for i in "12":
                name = name.replace(f".{part}{i}.", f".{part}.{i}.")
        name = name.replace("classifier.", "classifier.0.")
        out[f"module.densenet121.{name}"] = tensor
    return {k: v for k, v in out.items() if not k.endswith("num_batches_tracked")}  # torch 0.3 had none


def test_loads_every_public_form(published, images, expected, tmp_path):
    state = published.state_dict()
    torch.save(state, tmp_path / "torchvision.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "torchvision.safetensors")
    torch.save({"state_dict": chexnet_names(state), "epoch": 7, "best_loss": 0.1}, tmp_path / "model.pth.tar")
    for name in ("torchvision.pth", "torchvision.safetensors", "model.pth.tar"):
        net = ChestClassifier.load(tmp_path / name, FINDINGS, size=64)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        with torch.no_grad():
            assert torch.allclose(net(images), expected, atol=1e-5), name


def test_loads_torchxrayvisions_densenets(tmp_path, images):
    models = pytest.importorskip("torchxrayvision.models")
    torch.manual_seed(0)
    theirs = models.DenseNet(num_classes=18, in_channels=1).eval()
    state = {**theirs.state_dict(), "op_threshs": torch.full((18,), 0.5)}
    torch.save(state, tmp_path / "xrv.pt")
    net = ChestClassifier.load(tmp_path / "xrv.pt", [*FINDINGS, "", "Fracture", "", ""], size=64)
    assert net.inputs == "xrv"
    with torch.no_grad():
        assert torch.allclose(net(images), theirs(images * 1024), rtol=1e-3, atol=1e-4)


def test_own_file_carries_all_it_needs(tmp_path, images):
    torch.manual_seed(1)
    net = ChestClassifier(["Mass", "Nodule"], size=64, inputs="xrv").eval()
    net.save(tmp_path / "classifier.safetensors", auc=0.5)
    again = ChestClassifier.load(tmp_path / "classifier.safetensors")
    assert (again.findings, again.size, again.inputs) == (("Mass", "Nodule"), 64, "xrv")
    with torch.no_grad():
        assert torch.equal(again(images), net(images))


def test_images_are_resized_and_gradient_reaches_them():
    torch.manual_seed(0)
    net = ChestClassifier(["Nodule"], size=64).eval().requires_grad_(False)
    for side in (32, 128):
        images = torch.zeros(2, 1, side, side, requires_grad=True)
        net(images).sum().backward()
        assert images.grad.abs().sum() > 0
    assert net.prepared(torch.ones(1, 1, 32, 32)).amax() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)
    assert net.prepared(torch.zeros(1, 1, 100, 100)).shape == (1, 3, 64, 64)


def test_closed_form_cam_is_grad_cam_on_it():
    torch.manual_seed(0)
    net = ChestClassifier(FINDINGS, size=64).eval()
    images, c = torch.rand(2, 1, 64, 64) * 2 - 1, net.target("Nodule")
    closed = activation_map(net, images, c, layer=net.activation, method="closed-form").maps
    grad = activation_map(net, images, c, layer=net.activation, method="grad-cam").maps
    assert torch.allclose(closed, grad, atol=1e-6)


def test_target_names_what_the_classifier_knows():
    with torch.device("meta"):
        net = ChestClassifier(["Mass", ""], size=64)
    assert net.target("Mass") == 0
    for name in ("Nodule", ""):
        with pytest.raises(ValueError, match="finding must be one of the classifier's"):
            net.target(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"findings": []}, "findings must be a list of names"),
        ({"findings": "Nodule"}, "findings must be a list of names"),
        ({"findings": ["Nodule"], "size": 16}, "size must be at least 32, got 16"),
        ({"findings": ["Nodule"], "inputs": "rgb"}, "inputs must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ChestClassifier(**options)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 64, 64), torch.zeros(1, 64, 64), torch.zeros(1, 1, 8, 8).byte()])
def test_bad_images_are_named(images):
    with torch.device("meta"):
        net = ChestClassifier(["Nodule"])
    with pytest.raises(ValueError, match="images must be float"):
        net.prepared(images)


def test_files_of_something_else_are_refused(published, tmp_path):
    state = dict(published.state_dict())

    def refused(name, message, findings=FINDINGS):
        with pytest.raises(ClassifierError, match=message):
            ChestClassifier.load(tmp_path / name, findings)

    refused("none.pth", "no such file")
    (tmp_path / "text.pth").write_text("no weights")
    refused("text.pth", "weights_only=True")
    (tmp_path / "text.safetensors").write_text("no weights")
    refused("text.safetensors", "truncated or damaged")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "must hold a state dict of tensors, got list")
    torch.save(published, tmp_path / "module.pth")  # a pickle of code
    refused("module.pth", "weights_only=True")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    refused("resnet.pth", "must hold a DenseNet-121")
    torch.save(state, tmp_path / "good.pth")
    refused("good.pth", "findings must be given", None)
    refused("good.pth", "are findings as many as its logits", ["Nodule"])
    torch.save({k: v for k, v in state.items() if "denseblock4" not in k}, tmp_path / "part.pth")
    refused("part.pth", "lacks")
    torch.save({**state, "classifier.bias": torch.full((14,), torch.nan)}, tmp_path / "nan.pth")
    refused("nan.pth", "'head.bias' must be finite")


def test_a_flipped_bit_of_our_own_file_is_noticed(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "classifier.safetensors"
    ChestClassifier(["Nodule"], size=64).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ClassifierError, match="SHA-256"):
        ChestClassifier.load(path)


def test_public_names_keep_what_is_ours():
    with torch.device("meta"):
        names = set(ChestClassifier(["Nodule"]).state_dict())
    assert set(public_names(dict.fromkeys(names, torch.zeros(())))) == names
