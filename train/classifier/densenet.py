"""CheXNet: DenseNet-121 with a logit for each finding (Rajpurkar et al. 2017), the classifier of Ann (2021).

It takes images as the generator gives them and is loaded from our own files or from the forms in which such networks
are published. Nothing is unpickled: a .pth file is read with `weights_only=True`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import densenet121

from carim_aug.ops.images import resize
from carim_aug.ops.precision import autocast
from carim_aug.ops.sealed import digest, read_sealed, write_sealed
from train.common.images import to_symmetric
from train.common.run import RunError

# What the network was trained to see, and its channels: ImageNet-normalised RGB, or grey in [-1024, 1024].
INPUTS: dict[str, int] = {"imagenet": 3, "xrv": 1}

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FORMAT = "carim-aug-classifier"
_WRAPPERS = ("module.", "model.", "densenet121.", "backbone.", "net.")
_HEADS = ("classifier.0.", "classifier.", "fc.", "head.")


class ClassifierError(RunError):
    """A classifier's file that is missing, damaged or of another network."""


class ChestClassifier(nn.Module):
    """DenseNet-121, global average pool, one linear head; untrained, with weights from the global random state."""

    def __init__(
        self,
        findings: Sequence[str],  # what the logits stand for, in order; an empty name is a logit that means nothing
        *,
        size: int = 224,  # side in pixels to which images are resized (bilinear, antialiased, differentiable)
        inputs: str = "imagenet",  # of `INPUTS`
    ) -> None:
        super().__init__()
        if not findings or isinstance(findings, str):
            raise ValueError(f"findings must be a list of names, got {findings!r}")
        if inputs not in INPUTS:
            raise ValueError(f"inputs must be one of {tuple(INPUTS)}, got {inputs!r}")
        if size < 32:
            raise ValueError(f"size must be at least 32, got {size}")
        self.findings, self.size, self.inputs = tuple(findings), size, inputs
        self.features = densenet121(weights=None).features
        if INPUTS[inputs] == 1:
            self.features.conv0 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.activation = nn.ReLU()  # the layer whose output Grad-CAM looks at
        self.head = nn.Linear(1024, len(self.findings))

    @property
    def weights_hash(self) -> str:
        """SHA-256 of all tensors: names, types, shapes and values, as hex."""
        return digest(arrays_of(self), {})

    def target(self, finding: str) -> int:
        """Return the place of a finding among the logits; raise ValueError if the classifier does not know it."""
        if not finding or finding not in self.findings:
            raise ValueError(f"finding must be one of the classifier's {self.findings}, got {finding!r}")
        return self.findings.index(finding)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return what the network itself takes, (B, 3 or 1, size, size), of images (B, 1, S, S) float, [-1, 1]."""
        images = resize_grey(images, self.size)
        if self.inputs == "xrv":
            return images * 1024
        mean, std = (images.new_tensor(v)[:, None, None] for v in (_MEAN, _STD))
        return ((images + 1) / 2 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, len(findings)) of images (B, 1, S, S) in [-1, 1]."""
        maps = self.activation(self.features(self.preprocess(images)))
        with torch.autocast(images.device.type, enabled=False):  # logits of bfloat16 have so few digits that they tie
            return self.head(maps.to(self.head.weight.dtype).mean(dim=(2, 3)))

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Write weights, findings and what else is given (plain JSON types) to a sealed safetensors file, or none."""
        texts = {"format": _FORMAT, "findings": json.dumps(self.findings), "size": str(self.size)}
        texts |= {"inputs": self.inputs, "provenance": json.dumps(provenance)}
        partial = Path(f"{path}.partial")
        write_sealed(partial, arrays_of(self), texts)
        os.replace(partial, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        findings: Sequence[str] | None = None,  # what the logits stand for; needed for files that are not our own
        *,
        size: int | None = None,  # 224 by default for others' files
        inputs: str | None = None,  # by the number of input channels by default for others' files
    ) -> "ChestClassifier":
        """Return a trained classifier in eval mode on the CPU, its parameters without gradient.

        It understands our own files; state dicts of torchvision's `densenet121`; the key forms of public CheXNet
        checkpoints (`module.densenet121.features...norm.1.weight`, `classifier.0`); torchxrayvision's DenseNets; as
        .safetensors, or as .pth / .pt / .tar of tensors and plain types, also inside a "state_dict" entry.
        ClassifierError if a file is missing, damaged or of another network, or findings do not fit it.
        """
        path = Path(path)
        state, texts = _read(path)
        if texts.get("format") == _FORMAT:
            findings = findings or json.loads(texts["findings"])
            size, inputs = size or int(texts["size"]), inputs or texts["inputs"]
        state = public_names(state)
        channels = state["features.conv0.weight"].shape[1] if "features.conv0.weight" in state else 0
        if channels not in INPUTS.values():
            raise ClassifierError(f"{path} must hold a DenseNet-121 (features.conv0.weight with 1 or 3 channels)")
        if findings is None:
            raise ClassifierError(f"findings must be given for {path}, which does not say what its logits stand for")
        inputs = inputs or ("imagenet" if channels == 3 else "xrv")
        with torch.device("meta"):
            classifier = cls(findings, size=size or 224, inputs=inputs)
        broken = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if broken:
            raise ClassifierError(f"{path}: {broken[0]!r} must be finite, got NaN or infinity")
        wanted = {k: v.dtype for k, v in classifier.state_dict().items()}
        state = {k: torch.zeros((), dtype=v) for k, v in wanted.items() if k.endswith("num_batches_tracked")} | state
        try:
            classifier.load_state_dict({k: v.to(wanted.get(k, v.dtype)) for k, v in state.items()}, assign=True)
        except RuntimeError as error:
            found = " ".join(str(error).split())[:300]
            raise ClassifierError(f"{path} must hold a DenseNet-121 of {len(findings)} logits, got {found}") from error
        return classifier.eval().requires_grad_(False)


@torch.no_grad()
def predict(
    classifier: ChestClassifier, images: Tensor, *, dtype: torch.dtype | str | None = "auto", batch: int = 64
) -> Tensor:
    """Return logits (N, F) float32 on the CPU of images (N, 1, S, S) uint8; leaves the classifier in eval mode."""
    classifier.eval()
    device = next(classifier.parameters()).device
    with autocast(device, dtype):
        parts = [classifier(to_symmetric(part.to(device))).float().cpu() for part in images.split(batch)]
    return torch.cat(parts)


def resize_grey(images: Tensor, size: int) -> Tensor:
    """Return float images (B, 1, H, W) at (size, size), antialiased; raise ValueError if they are no such images."""
    if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
        raise ValueError(f"images must be float (B, 1, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
    return resize(images, (size, size))


def arrays_of(network: nn.Module) -> dict[str, np.ndarray]:
    """Return a network's tensors as `carim_aug.ops.sealed` takes them."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in network.state_dict().items()}


def public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published DenseNet's tensors under our names; what has nothing to do with logits is left out."""
    renamed = {}
    for name, tensor in state.items():
        while name.startswith(_WRAPPERS):
            name = name.removeprefix(next(w for w in _WRAPPERS if name.startswith(w)))
        name = re.sub(r"\.(norm|conv|relu)\.(\d)\.", r".\1\2.", name)
        for head in _HEADS:
            if name in (f"{head}weight", f"{head}bias"):
                name = "head." + name.removeprefix(head)
        if name != "op_threshs":
            renamed[name] = tensor
    return renamed


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ClassifierError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            arrays, texts, sealed = read_sealed(path)
        except ValueError as error:
            raise ClassifierError(f"{path} is truncated or damaged: {error}") from error
        if texts.get("format") == _FORMAT and not sealed:
            raise ClassifierError(f"{path} does not match its own SHA-256, so something in it has changed")
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, texts
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ClassifierError(
            f"{path} is not read as tensors and plain types (weights_only=True); save its state_dict again. {error}"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ClassifierError(f"{path} must hold a state dict of tensors, got {type(loaded).__name__}")
    return dict(loaded), {}
