"""Class activation maps of a classifier, as losses or to look at: eq. 5 of Ann (2021) and its relatives.

Every method can be differentiated with respect to the images. Maps are signed, before eq. 5's ReLU, unless `relu` asks
for it, and of the layer's own size. pytorch-grad-cam gives NumPy arrays, torchcam detaches and captum's layer Grad-CAM
has a wrong gradient by default, so none of them can serve as a loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS: tuple[str, ...] = ("grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "closed-form")


class ActivationMap(NamedTuple):
    """Maps of a batch, and the classifier's output for the same images."""

    maps: Tensor  # (B, 1, h, w), the size of the layer
    logits: Tensor  # (B, C)


def activation_map(
    classifier: nn.Module,
    images: Tensor,
    target: int | Tensor,
    *,
    layer: nn.Module,
    method: str = "grad-cam",
    relu: bool = False,
    create_graph: bool = False,
) -> ActivationMap:
    """Return where in the images the classifier sees the target class.

    With A the layer's output (K maps), y the target's logit and g = dy/dA::

        grad-cam     sum_k mean_ij(g_k) A_k                        eq. 5; Selvaraju et al. 2017
        grad-cam++   sum_k [sum_ij a_k relu(g_k)] A_k,
                     a = g^2 / (2 g^2 + g^3 sum_ij(A))             Chattopadhyay et al. 2018
        xgrad-cam    sum_k [sum_ij(g_k A_k) / sum_ij(A_k)] A_k     Fu et al. 2020
        hirescam     sum_k g_k A_k                                 Draelos and Carin 2020
        layercam     sum_k relu(g_k) A_k                           Jiang et al. 2021
        closed-form  sum_k W_k A_k / (h w), W the head's weights   Zhou et al. 2016; `closed_form_map`

    Args:
        classifier: images to logits (B, C), in eval mode. Its parameters and statistics are left as they are.
        images: what it takes, (B, ...).
        target: class, or one for each image (B,) int64.
        layer: a module of the classifier that gives (B, K, h, w) once a pass; for `closed-form` the last one before a
            global average pool and the classifier's linear `head`.
        method: of `METHODS`.
        relu: cut negative values, as eq. 5 does.
        create_graph: keep the graph, so that a loss of the maps has a gradient with respect to the images.

    Raises:
        ValueError: a method, target, layer or head that is none of these.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not images.requires_grad and images.is_floating_point() and method != "closed-form":
        images = images.detach().requires_grad_()  # activations have gradients even where parameters are frozen

    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs.append(output)  # out of reach of in-place operations that follow (torchvision's DenseNet has one)
        return output.clone() if isinstance(output, Tensor) else output

    with torch.enable_grad():
        with layer.register_forward_hook(record):
            logits = classifier(images)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim != 4:
            got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in outputs]
            raise ValueError(f"layer must give maps (B, K, h, w) once in a pass of the classifier, got {got}")
        activations, index = outputs[0], _class_of_each(target, logits)
        if method == "closed-form":
            maps = closed_form_map(activations, _head_of(classifier, activations, logits).weight[index].detach())
        else:
            chosen = logits.gather(1, index[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, activations, create_graph=create_graph)
            maps = _map_from_gradient(method, activations, gradient)
    if relu:
        maps = maps.relu()
    return ActivationMap(maps, logits) if create_graph else ActivationMap(maps.detach(), logits.detach())


def closed_form_map(activations: Tensor, weights: Tensor) -> Tensor:
    """Return Grad-CAM of a logit that is linear in the means of maps A: sum_k W_k A_k / (h w), without a backward pass.

    Activations (B, K, h, w) are what the global average pool takes, weights the head's for the target class, (K,), or
    (B, K) for a class of each image's own. The map (B, 1, h, w), signed, sums up to the logit less the head's bias.
    """
    weights = weights.expand(len(activations), -1) / activations.shape[2:].numel()
    return torch.einsum("bk,bkhw->bhw", weights.to(activations.dtype), activations)[:, None]


def normalize_map(maps: Tensor) -> Tensor:
    """Return M / max(M) of each map (B, 1, h, w); one that is nowhere positive becomes zeros."""
    largest = maps.amax(dim=(2, 3), keepdim=True)
    alive = largest > 0
    return torch.where(alive, maps / torch.where(alive, largest, 1.0), 0.0)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Resize maps to (B, 1, size, size), bilinear, as eq. 6 of Ann (2021) compares them with masks."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def _class_of_each(target: int | Tensor, logits: Tensor) -> Tensor:
    index = torch.as_tensor(target, device=logits.device)
    if logits.ndim != 2 or index.is_floating_point() or index.ndim > 1 or (index.ndim and len(index) != len(logits)):
        got = f"{tuple(index.shape)} {index.dtype} for {tuple(logits.shape)}"
        raise ValueError(f"target must be a class or (B,) int64 for logits (B, C), got {got}")
    if bool((index < 0).any()) or bool((index >= logits.shape[1]).any()):
        raise ValueError(f"target must be in [0, {logits.shape[1] - 1}], got {index.tolist()}")
    return index.long().expand(len(logits))


def _head_of(classifier: nn.Module, activations: Tensor, logits: Tensor) -> nn.Linear:
    head = getattr(classifier, "head", None)
    if not isinstance(head, nn.Linear) or head.in_features != activations.shape[1]:
        raise ValueError("method='closed-form' needs a classifier whose head is a linear layer of the layer's maps")
    with torch.no_grad():
        expected = head(activations.mean(dim=(2, 3)))
    if not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2 * float(logits.detach().abs().max())):
        raise ValueError("method='closed-form' needs logits that are head(mean of the layer's maps), got others")
    return head


def _map_from_gradient(method: str, activations: Tensor, gradient: Tensor) -> Tensor:
    if method == "grad-cam":
        weights = gradient.mean((2, 3), keepdim=True)
    elif method == "grad-cam++":
        square, total = gradient.square(), activations.sum((2, 3), keepdim=True)
        share = square / (2 * square + gradient * square * total + 1e-6)
        weights = (gradient.relu() * torch.where(gradient == 0, 0.0, share)).sum((2, 3), keepdim=True)
    elif method == "xgrad-cam":
        weights = (gradient * activations).sum((2, 3), keepdim=True) / (activations.sum((2, 3), keepdim=True) + 1e-7)
    else:
        weights = gradient if method == "hirescam" else gradient.relu()
    return (weights * activations).sum(dim=1, keepdim=True)
