"""The classifier: input, target, and every form in which such networks are published."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import densenet121

from carim_aug.ops.cam import activation_map
from carim_aug.ops.findings import FINDINGS
from train.classifier.densenet import ChestClassifier, ClassifierError, predict, public_names

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


def chexnet_names(state):
    """The key forms of public CheXNet checkpoints: DataParallel, a wrapper, old names in dense layers, a Sequential."""
    out = {}
    for name, tensor in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        out[f"module.densenet121.{name.replace('classifier.', 'classifier.0.')}"] = tensor
    return {k: v for k, v in out.items() if not k.endswith("num_batches_tracked")}  # torch 0.3 had none


@torch.no_grad()
def test_loads_every_public_form(published, images, tmp_path):
    state, expected = published.state_dict(), published(((images + 1) / 2 - MEAN) / STD)
    torch.save(state, tmp_path / "torchvision.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "torchvision.safetensors")
    torch.save({"state_dict": chexnet_names(state), "epoch": 7, "best_loss": 0.1}, tmp_path / "model.pth.tar")
    for name in ("torchvision.pth", "torchvision.safetensors", "model.pth.tar"):
        net = ChestClassifier.load(tmp_path / name, FINDINGS, size=64)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert torch.allclose(net(images), expected, atol=1e-5), name
    names = dict.fromkeys(net.state_dict(), torch.zeros(()))
    assert public_names(names).keys() == names.keys()  # ours stay


@torch.no_grad()
def test_loads_torchxrayvisions_densenets(tmp_path, images):
    models = pytest.importorskip("torchxrayvision.models")
    torch.manual_seed(0)
    theirs = models.DenseNet(num_classes=18, in_channels=1).eval()
    state = {**theirs.state_dict(), "op_threshs": torch.full((18,), 0.5)}
    torch.save(state, tmp_path / "xrv.pt")
    net = ChestClassifier.load(tmp_path / "xrv.pt", [*FINDINGS, "", "Fracture", "", ""], size=64)
    assert net.inputs == "xrv" and torch.allclose(net(images), theirs(images * 1024), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_own_file_carries_all_it_needs_and_a_flipped_bit_is_noticed(tmp_path, images):
    torch.manual_seed(1)
    net, path = ChestClassifier(["Mass", "Nodule"], size=64, inputs="xrv").eval(), tmp_path / "classifier.safetensors"
    net.save(path, auc=0.5)
    again = ChestClassifier.load(path)
    assert (again.findings, again.size, again.inputs) == (("Mass", "Nodule"), 64, "xrv")
    assert torch.equal(again(images), net(images))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ClassifierError, match="SHA-256"):
        ChestClassifier.load(path)


def test_images_are_resized_and_gradient_reaches_them_and_logits_come_batch_by_batch():
    torch.manual_seed(0)
    net = ChestClassifier(["Nodule"], size=32).requires_grad_(False)
    shown = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    logits = predict(net, shown, dtype="float32", batch=2)
    assert not net.training and torch.allclose(logits, net(shown / 127.5 - 1), atol=1e-5)
    assert logits.shape == (5, 1) and logits.dtype == torch.float32
    for side in (16, 64):
        images = torch.zeros(2, 1, side, side, requires_grad=True)
        net(images).sum().backward()
        assert images.grad.abs().sum() > 0
    assert net.preprocess(torch.ones(1, 1, 32, 32)).amax() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)
    assert net.preprocess(torch.zeros(1, 1, 100, 100)).shape == (1, 3, 32, 32)


def test_closed_form_cam_is_grad_cam_on_it():
    torch.manual_seed(0)
    net = ChestClassifier(FINDINGS, size=64).eval()
    images, c = torch.rand(2, 1, 64, 64) * 2 - 1, net.target("Nodule")
    closed, grad = (activation_map(net, images, c, layer=net.activation, method=m) for m in ("closed-form", "grad-cam"))
    assert torch.allclose(closed.maps, grad.maps, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"findings": []}, None, "findings must be a list of names"),
        ({"findings": "Nodule"}, None, "findings must be a list of names"),
        ({"findings": ["Nodule"], "size": 16}, None, "size must be at least 32, got 16"),
        ({"findings": ["Nodule"], "inputs": "rgb"}, None, "inputs must be one of"),
        ({"findings": ["Mass", ""]}, lambda net: net.target("Nodule"), "finding must be one of the classifier's"),
        ({"findings": ["Mass", ""]}, lambda net: net.target(""), "finding must be one of the classifier's"),
        ({"findings": ["Nodule"]}, lambda net: net.preprocess(torch.zeros(2, 3, 64, 64)), "images must be float"),
        ({"findings": ["Nodule"]}, lambda net: net.preprocess(torch.zeros(1, 64, 64)), "images must be float"),
        ({"findings": ["Nodule"]}, lambda net: net.preprocess(torch.zeros(1, 1, 8, 8).byte()), "images must be float"),
    ],
)
def test_bad_arguments_are_named(options, call, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        call(ChestClassifier(**options))


def test_files_of_something_else_are_refused(published, tmp_path):
    state = dict(published.state_dict())
    contents = {
        "list": [1, 2],
        "module": published,  # a pickle of code
        "resnet": {"conv1.weight": torch.zeros(64, 3, 7, 7)},
        "good": state,
        "part": {k: v for k, v in state.items() if "denseblock4" not in k},
        "nan": {**state, "classifier.bias": torch.full((14,), torch.nan)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    for name, findings, message in (
        ("none.pth", FINDINGS, "no such file"),
        ("text.pth", FINDINGS, "weights_only=True"),
        ("text.safetensors", FINDINGS, "truncated or damaged"),
        ("list.pth", FINDINGS, "must hold a state dict of tensors, got list"),
        ("module.pth", FINDINGS, "weights_only=True"),
        ("resnet.pth", FINDINGS, "must hold a DenseNet-121"),
        ("good.pth", None, "findings must be given"),
        ("good.pth", ["Nodule"], "a DenseNet-121 of 1 logits, got .*size mismatch for head"),
        ("part.pth", FINDINGS, "Missing key"),
        ("nan.pth", FINDINGS, "'head.bias' must be finite"),
    ):
        with pytest.raises(ClassifierError, match=message):
            ChestClassifier.load(tmp_path / name, findings)
