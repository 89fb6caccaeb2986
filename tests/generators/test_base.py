"""What is asked of a source of nodules and of a device, before anything is made."""

import pytest
import torch

from carim_aug import WorkerDeviceError
from carim_aug.generators import base
from carim_aug.generators.base import check_device, check_source


def source(*methods, **properties):
    made = {"image_size": 8, "weights_hash": property(lambda self: 1 / 0), **properties}  # no hash is worked out
    return type("Made", (), {**made, **dict.fromkeys(methods, lambda self, *args: None)})()


@pytest.mark.parametrize(
    ("insertion", "method", "other"),
    [("graft", "residuals", "whole"), ("whole", "images", "graft"), ("whole", "class_images", "graft")],
)
def test_having_the_method_is_the_capability(insertion, method, other):
    one = source(method)
    assert check_source(one, insertion) is one
    with pytest.raises(ValueError, match=f"generator must have a method .* for insertion='{other}', got a Made"):
        check_source(one, other)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (None, "NoneType"),
        (torch.nn.Linear(1, 1), "Linear"),
        (source("images", weights_hash=None), "Made"),
        (source("images", image_size=None), "Made"),
        (type(source("images")), "type"),
    ],
)
def test_what_is_no_source_is_named(thing, name):
    with pytest.raises(TypeError, match=rf"generator must have image_size, weights_hash and a method .*, got {name}"):
        check_source(thing, "whole")


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_that_this_machine_lacks_is_named(device):
    with pytest.raises(ValueError, match=f"device must be one that this machine has, got '{device}': "):
        check_device(torch.device(device))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "meta"])
def test_only_the_cpu_is_left_to_a_worker_and_cuda_is_not_touched(device, monkeypatch):
    zeros = torch.zeros(1)
    monkeypatch.setattr(base, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(torch, "empty", lambda *args, device: zeros if device.type == "cpu" else 1 / 0)
    check_device(torch.device("cpu"))
    with pytest.raises(WorkerDeviceError, match=f"'cpu' inside a DataLoader worker, got '{device}': use mix.load"):
        check_device(torch.device(device))
