"""Every path of the mix that touches CUDA; run with `pytest -m gpu` on a machine that has it."""

import pytest
import torch
from tiny import Images, batch, decisions, make_mix
from torch.utils.data import DataLoader, default_collate

from carim_aug import WorkerDeviceError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
INSERTIONS = pytest.mark.parametrize("insertion", ["whole", "graft"])


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def to_cuda(items):
    images, labels = default_collate(items)
    return images.cuda(), labels.cuda()


@INSERTIONS
def test_cuda_images_stay_on_cuda_and_are_what_the_cpu_makes(insertion):
    images, labels = batch(size=(48, 40))
    expected = make_mix(p=1.0, insertion=insertion)(images, labels)
    mixed = make_mix(p=1.0, insertion=insertion)(images.cuda(), labels.cuda())
    assert mixed[0].is_cuda and mixed[1].is_cuda and mixed[1].tolist() == expected[1].tolist()
    assert torch.allclose(mixed[0].cpu(), expected[0], atol=1e-4)


@INSERTIONS
def test_cpu_images_rendered_on_cuda_stay_on_the_cpu(insertion):
    images, labels = batch(size=(48, 40))
    expected = make_mix(p=1.0, insertion=insertion)(images, labels)
    mixed = make_mix(p=1.0, insertion=insertion, device="cuda")(images, labels)
    assert not mixed[0].is_cuda and torch.allclose(mixed[0], expected[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_cuda_images_keep_their_type(dtype):
    images, labels = batch(size=(48, 40))
    images = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    mixed = make_mix(p=1.0)(images.cuda(), labels.cuda())[0]
    assert mixed.dtype == dtype and mixed.is_cuda


def test_multilabel_rows_on_cuda_keep_their_nan():
    rows = torch.zeros(4, 14).index_fill(1, torch.tensor([13]), torch.nan).cuda()
    marked = make_mix(p=1.0)(batch(4)[0].cuda(), rows)[1]
    assert marked[:, 13].isnan().all() and (marked[:, 5] == 1).all() and marked.is_cuda


def test_a_padded_batch_is_as_a_full_one():
    images, labels = batch(5)
    full = make_mix(p=1.0, render_batch_size=4)(images.cuda(), labels.cuda())[0]
    padded = make_mix(p=1.0, render_batch_size=64)(images.cuda(), labels.cuda())[0]
    assert torch.allclose(full, padded, atol=1e-4)


@INSERTIONS
@pytest.mark.parametrize("collate", [None, to_cuda])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_on_cuda_has_what_the_cpu_has_one_batch_ahead(insertion, collate, num_workers):
    if collate and num_workers:
        pytest.skip("a collate_fn in a worker may not touch CUDA")
    options = dict(batch_size=7, shuffle=True)
    plain = make_mix(p=0.5, insertion=insertion).loader(Images(60), **options)
    loader = make_mix(p=0.5, insertion=insertion, device="cuda").loader(
        Images(60), **options, num_workers=num_workers, collate_fn=collate
    )
    for _ in range(2):
        count = 0
        for (a, y), (b, z) in zip(plain, loader, strict=True):
            if not count % 3:
                torch.randn(2048, 2048, device="cuda").matrix_power(3)  # work on the main stream
            assert torch.allclose(a, b.cpu(), atol=1e-4) and y.tolist() == z.tolist()
            assert b.is_cuda == bool(collate) and plain.last_params == loader.last_params
            count += 1
        assert count == len(loader)


def test_decisions_on_cuda_are_those_on_the_cpu_and_resume():
    def fresh(device):
        return make_mix(p=0.5, device=device).loader(Images(40), batch_size=8, shuffle=True)

    plain = fresh(None)
    rows = decisions(plain, lambda: plain.last_params)
    loader = fresh("cuda")
    part = []
    for _, labels in loader:
        part += decisions([(None, labels)], lambda: loader.last_params)
        if len(part) == 16:
            state = loader.state_dict()
            break
    other = fresh("cuda")
    other.load_state_dict(state)
    assert state["step"] == 2 and part + decisions(other, lambda: other.last_params) == rows


def test_cuda_in_a_worker_is_refused():
    wrapped = make_mix(p=1.0, device="cuda").wrap(Images(8))
    with pytest.raises(WorkerDeviceError, match="use mix.loader"):
        next(iter(DataLoader(wrapped, batch_size=4, num_workers=1)))


def test_bfloat16_and_compile_on_cuda_are_close():
    images, labels = batch(size=(48, 40))
    expected = make_mix(p=1.0, insertion="whole")(images, labels)[0]
    for options in ({"dtype": torch.bfloat16}, {"compile": True}):
        mixed = make_mix(p=1.0, insertion="whole", device="cuda", **options)(images, labels)[0]
        assert (mixed - expected).abs().mean() < 0.02
