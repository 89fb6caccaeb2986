"""Class activation maps of a classifier, as losses or to look at: METHOD 4, eq. 5, and the relatives it names.

`METHODS` can be differentiated with respect to the images; `LOOKING` cannot. The maps are signed, before eq. 5's ReLU,
unless `relu` asks for it, and of the layer's own size. pytorch-grad-cam gives NumPy arrays, torchcam detaches and
captum's layer Grad-CAM has a wrong gradient by default, so none of them can serve as a loss (DESIGN 4).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS: tuple[str, ...] = ("grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "closed-form")
"""Maps that can be a loss."""

LOOKING: tuple[str, ...] = ("score-cam", "ablation-cam", "eigen-cam")
"""Maps to look at only."""

_CHUNK = 32  # images in one pass of score-cam and ablation-cam


class ActivationMap(NamedTuple):
    """Maps of a batch.

    Attributes:
        maps: (B, 1, h, w), the size of the layer.
        logits: (B, C), the classifier's output for the same images.
    """

    maps: Tensor
    logits: Tensor


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
    """Gives where in the images the classifier sees the target class.

    With A the layer's output (K maps), y the target's logit and g = dy/dA::

        grad-cam     sum_k mean_ij(g_k) A_k                                  eq. 5; Selvaraju et al. 2017
        grad-cam++   sum_k [sum_ij a_k relu(g_k)] A_k,
                     a = g^2 / (2 g^2 + g^3 sum_ij(A))                       Chattopadhyay et al. 2018
        xgrad-cam    sum_k [sum_ij(g_k A_k) / sum_ij(A_k)] A_k               Fu et al. 2020
        hirescam     sum_k g_k A_k                                           Draelos and Carin 2020
        layercam     sum_k relu(g_k) A_k                                     Jiang et al. 2021
        closed-form  sum_k W_k A_k / (h w), W the head's weights: Grad-CAM
                     where y is linear in the means of A                     Zhou et al. 2016
        score-cam    softmax over k of y(image * A_k), times A_k             Wang et al. 2020
        ablation-cam (y - y without A_k) / y, times A_k                      Desai and Ramaswamy 2020
        eigen-cam    A projected on its first principal component            Muhammad and Yeasin 2020

    Args:
        classifier: images to logits (B, C), in eval mode. Its parameters and statistics are left as they are.
        images: what it takes, (B, ...).
        target: class, or one for each image (B,) int64.
        layer: a module of the classifier that gives (B, K, h, w) once a pass; for `closed-form` the last one before a
            global average pool and the classifier's linear `head`.
        method: of `METHODS` or `LOOKING`.
        relu: cut negative values, as eq. 5 does.
        create_graph: keep the graph, so that a loss of the maps has a gradient with respect to the images.

    Raises:
        ValueError: an unknown method, a target that is no class, a layer that does not run once or gives no maps, a
            looking method with create_graph, or `closed-form` for another head.
    """
    if method not in METHODS + LOOKING:
        raise ValueError(f"method must be one of {METHODS + LOOKING}, got {method!r}")
    if create_graph and method in LOOKING:
        raise ValueError(f"method must be one of {METHODS} with create_graph=True, got {method!r}")

    with torch.set_grad_enabled(method in METHODS):
        with _output_of(layer) as seen:
            logits = classifier(images if images.requires_grad or method in LOOKING else _leaf(images, method))
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim != 4:
            got = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in seen]
            raise ValueError(f"layer must give maps (B, K, h, w) once in a pass of the classifier, got {got}")
        activations = seen[0]
        index = _targets(target, logits)
        if method == "closed-form":
            maps = _closed_form(classifier, activations, logits, index)
        elif method == "eigen-cam":
            maps = _eigen(activations)
        elif method == "score-cam":
            maps = _score(classifier, images, activations, index)
        elif method == "ablation-cam":
            maps = _ablation(classifier, layer, images, activations, logits, index)
        else:
            chosen = logits.gather(1, index[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, activations, create_graph=create_graph)
            maps = _from_gradient(method, activations, gradient)
    if relu:
        maps = maps.relu()
    return ActivationMap(maps, logits) if create_graph else ActivationMap(maps.detach(), logits.detach())


def normalised(maps: Tensor) -> Tensor:
    """Gives M_norm = M / max(M) for each image; an image whose map is nowhere positive gets zeros.

    Args:
        maps: (B, 1, h, w).

    Returns:
        (B, 1, h, w), at most 1.
    """
    largest = maps.amax(dim=(2, 3), keepdim=True)
    alive = largest > 0
    return torch.where(alive, maps / torch.where(alive, largest, torch.ones_like(largest)), torch.zeros_like(maps))


def enlarged(maps: Tensor, size: int) -> Tensor:
    """Gives maps (B, 1, size, size), bilinear, as eq. 6 compares them with masks."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


@contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    # What the layer gives, out of reach of in-place operations that follow (torchvision's DenseNet has one).
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone() if isinstance(output, Tensor) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _leaf(images: Tensor, method: str) -> Tensor:
    # Gradients with respect to the activations exist even where the classifier's parameters are frozen.
    return images.detach().requires_grad_(images.is_floating_point() and method != "closed-form")


def _targets(target: int | Tensor, logits: Tensor) -> Tensor:
    index = torch.as_tensor(target, device=logits.device)
    if logits.ndim != 2 or index.is_floating_point() or index.ndim > 1 or (index.ndim and len(index) != len(logits)):
        raise ValueError(
            f"target must be a class or (B,) int64 for logits (B, C), got {tuple(index.shape)} {index.dtype} "
            f"for {tuple(logits.shape)}"
        )
    if bool((index < 0).any()) or bool((index >= logits.shape[1]).any()):
        raise ValueError(f"target must be in [0, {logits.shape[1] - 1}], got {index.tolist()}")
    return index.long().expand(len(logits))


def _from_gradient(method: str, activations: Tensor, gradient: Tensor) -> Tensor:
    over = (2, 3)
    if method == "grad-cam":
        weights = gradient.mean(over, keepdim=True)
    elif method == "grad-cam++":
        square, total = gradient.square(), activations.sum(over, keepdim=True)
        share = square / (2 * square + gradient * square * total + 1e-6)
        share = torch.where(gradient == 0, torch.zeros_like(share), share)
        weights = (gradient.relu() * share).sum(over, keepdim=True)
    elif method == "xgrad-cam":
        weights = (gradient * activations).sum(over, keepdim=True) / (activations.sum(over, keepdim=True) + 1e-7)
    elif method == "hirescam":
        weights = gradient
    else:
        weights = gradient.relu()
    return (weights * activations).sum(dim=1, keepdim=True)


def _closed_form(classifier: nn.Module, activations: Tensor, logits: Tensor, index: Tensor) -> Tensor:
    head = getattr(classifier, "head", None)
    if not isinstance(head, nn.Linear) or head.in_features != activations.shape[1]:
        raise ValueError("method='closed-form' needs a classifier whose head is a linear layer of the layer's maps")
    with torch.no_grad():
        expected = head(activations.mean(dim=(2, 3)))
        if not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise ValueError("method='closed-form' needs logits that are head(mean of the layer's maps), got others")
    weights = head.weight[index].detach() / activations.shape[2:].numel()
    return torch.einsum("bk,bkhw->bhw", weights.to(activations.dtype), activations)[:, None]


def _eigen(activations: Tensor) -> Tensor:
    flat = activations.flatten(2).mT  # (B, hw, K)
    flat = flat - flat.mean(dim=1, keepdim=True)
    first = torch.linalg.svd(flat, full_matrices=False).Vh[:, :1]  # (B, 1, K)
    maps = (flat @ first.mT).mT.unflatten(2, activations.shape[2:])
    # A component's sign is arbitrary: the strongest place is to be positive.
    turned = maps.amax(dim=(2, 3), keepdim=True) < -maps.amin(dim=(2, 3), keepdim=True)
    return torch.where(turned, -maps, maps)


def _score(classifier: nn.Module, images: Tensor, activations: Tensor, index: Tensor) -> Tensor:
    shown = F.interpolate(activations, size=images.shape[-2:], mode="bilinear", align_corners=True)
    low, high = shown.amin(dim=(2, 3), keepdim=True), shown.amax(dim=(2, 3), keepdim=True)
    shown = (shown - low) / (high - low + 1e-8)
    rows = []
    for image, parts, c in zip(images, shown, index.tolist(), strict=True):
        scores = [classifier(image[None] * p[:, None])[:, c] for p in parts.split(_CHUNK)]
        rows.append(torch.cat(scores).softmax(dim=0))
    return torch.einsum("bk,bkhw->bhw", torch.stack(rows), activations)[:, None]


def _ablation(
    classifier: nn.Module, layer: nn.Module, images: Tensor, activations: Tensor, logits: Tensor, index: Tensor
) -> Tensor:
    count = activations.shape[1]
    rows = []
    for image, row, c in zip(images, logits, index.tolist(), strict=True):
        without = []
        for some in torch.arange(count, device=images.device).split(_CHUNK):

            def drop(module: nn.Module, inputs: object, output: Tensor, some: Tensor = some) -> Tensor:
                output = output.clone()
                output[torch.arange(len(some)), some] = 0
                return output

            handle = layer.register_forward_hook(drop)
            try:
                without.append(classifier(image[None].expand(len(some), *image.shape))[:, c])
            finally:
                handle.remove()
        rows.append((row[c] - torch.cat(without)) / row[c])
    return torch.einsum("bk,bkhw->bhw", torch.stack(rows), activations)[:, None]
