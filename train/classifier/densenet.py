"""CheXNet: DenseNet-121 with a logit for each finding (Rajpurkar et al. 2017), the classifier of METHOD 4.

Takes images as the generator gives them and is loaded from our own files or from the forms in which such networks are
published. Nothing is unpickled: a .pth file is read with `weights_only=True`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import densenet121

from carim_aug.ops.sealed import digest, read_sealed, write_sealed

INPUTS: dict[str, int] = {"imagenet": 3, "xrv": 1}
"""What the network was trained to see, and its channels: ImageNet-normalised RGB, or grey in [-1024, 1024]."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FORMAT = "carim-aug-classifier"
_WRAPPERS = ("module.", "model.", "densenet121.", "backbone.", "net.")
_HEADS = ("classifier.0.", "classifier.", "fc.", "head.")


class ClassifierError(ValueError):
    """A classifier's file that is missing, damaged or of another network."""


class ChestClassifier(nn.Module):
    """DenseNet-121, global average pool, one linear head.

    Args:
        findings: what the logits stand for, in order; an empty name is a logit that means nothing.
        size: side in pixels to which images are resized (bilinear, antialiased, differentiable).
        inputs: of `INPUTS`.
    """

    def __init__(self, findings: Sequence[str], *, size: int = 224, inputs: str = "imagenet") -> None:
        """Makes an untrained classifier; the global random state gives its weights."""
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
        return digest({name: tensor.detach().cpu().numpy() for name, tensor in self.state_dict().items()}, {})

    def target(self, finding: str) -> int:
        """Gives the place of a finding among the logits.

        Raises:
            ValueError: the classifier does not know it.
        """
        if not finding or finding not in self.findings:
            raise ValueError(f"finding must be one of the classifier's {self.findings}, got {finding!r}")
        return self.findings.index(finding)

    def prepared(self, images: Tensor) -> Tensor:
        """Gives what the network itself takes, (B, 3 or 1, size, size).

        Args:
            images: (B, 1, S, S) float, [-1, 1].
        """
        if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be float (B, 1, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(
                images, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            )
        if self.inputs == "xrv":
            return images * 1024
        mean, std = (images.new_tensor(v)[:, None, None] for v in (_MEAN, _STD))
        return ((images + 1) / 2 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Gives logits (B, len(findings)) of images (B, 1, S, S) in [-1, 1]."""
        maps = self.activation(self.features(self.prepared(images)))
        return self.head(maps.mean(dim=(2, 3)))

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Writes weights, findings and what else is given (plain JSON types) to a sealed safetensors file."""
        texts = {
            "format": _FORMAT,
            "findings": json.dumps(self.findings),
            "size": str(self.size),
            "inputs": self.inputs,
            "provenance": json.dumps(provenance),
        }
        write_sealed(path, {k: v.detach().cpu().contiguous().numpy() for k, v in self.state_dict().items()}, texts)

    @classmethod
    def load(
        cls,
        path: str | Path,
        findings: Sequence[str] | None = None,
        *,
        size: int | None = None,
        inputs: str | None = None,
    ) -> "ChestClassifier":
        """Gives a trained classifier in eval mode on the CPU, its parameters without gradient.

        Understands our own files; state dicts of torchvision's `densenet121`; the key forms of public CheXNet
        checkpoints (`module.densenet121.features...norm.1.weight`, `classifier.0`); torchxrayvision's DenseNets; as
        .safetensors, or as .pth / .pt / .tar of tensors and plain types, also inside a "state_dict" entry.

        Args:
            path: the file.
            findings: what the logits stand for; needed for files that are not our own.
            size: see `ChestClassifier`; 224 for others' files.
            inputs: see `ChestClassifier`; by the number of input channels for others' files.

        Raises:
            ClassifierError: a file that is missing, damaged, or of another network, or findings that do not fit it.
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
        wanted = classifier.state_dict()
        for name, tensor in wanted.items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.zeros((), dtype=torch.int64))
            elif name in state and state[name].shape != tensor.shape:
                hint = "; are findings as many as its logits?" if name.startswith("head") else ""
                shapes = f"{tuple(tensor.shape)}, got {tuple(state[name].shape)}"
                raise ClassifierError(f"{path}: {name!r} must be of shape {shapes}{hint}")
        missing, more = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        if missing or more:
            raise ClassifierError(f"{path} is no DenseNet-121: lacks {missing[:3]}, has besides {more[:3]}")
        broken = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if broken:
            raise ClassifierError(f"{path}: {broken[0]!r} must be finite, got NaN or infinity")
        classifier.load_state_dict({k: v.to(wanted[k].dtype) for k, v in state.items()}, assign=True)
        return classifier.eval().requires_grad_(False)


def public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives a published DenseNet's tensors under our names; what has nothing to do with logits is left out.

    Args:
        state: names to tensors.
    """
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
