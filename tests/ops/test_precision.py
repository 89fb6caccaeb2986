import pytest
import torch

from carim_aug.ops.precision import autocast, compute_dtype, precision_of


@pytest.mark.parametrize(("bf16", "amx"), [(True, False), (False, True), (True, True), (False, False)])
def test_auto_is_bfloat16_where_the_processor_has_it_and_what_is_asked_for_is_taken(monkeypatch, bf16, amx):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    expected = torch.bfloat16 if bf16 or amx else torch.float32
    dtype, reason = precision_of("cpu")
    assert dtype == compute_dtype("auto", "cpu") == expected and ("avx512_bf16" in reason) == bf16
    with autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert compute_dtype(torch.bfloat16, "cpu") == compute_dtype("bfloat16", "cpu") == torch.bfloat16
    assert compute_dtype(None, "cpu") == compute_dtype("float32", "cpu") == torch.float32


def test_processors_without_avx_are_asked_through_onednn_and_unknown_devices_get_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert precision_of("cpu").dtype in (torch.float32, torch.bfloat16)
    assert precision_of("meta").dtype == torch.float32
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision_of("cpu").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be .*, got 'half'"):
        compute_dtype("half", "cpu")


@pytest.mark.gpu
def test_cuda_is_asked_for_its_own_units():
    dtype, reason = precision_of("cuda")
    assert torch.cuda.get_device_name() in reason
    assert (dtype == torch.bfloat16) == torch.cuda.is_bf16_supported(including_emulation=False)
