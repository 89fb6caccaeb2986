import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generator, global_states_untouched, make_mix, prior
from torch.utils.data import DataLoader, Dataset

from carim_aug import WorkerDeviceError
from carim_aug.generators.render import Renderer
from carim_aug.ops.random import noise
from carim_aug.transforms.plan import Planner

CPU = torch.device("cpu")


def slots(n, chances=None, start=0):
    planner = Planner(prior(), seed=0, nodule="Nodule", chances=chances or {"Nodule": 0.6, "No Finding": 0.4})
    return [planner.decide((0, 0, start + i), i, eligible=True) for i in range(n)]


def test_an_image_is_the_generators_for_the_slots_noise_and_mask():
    chosen = slots(5)
    images = Renderer(generator()).whole(chosen, CPU)
    masks = torch.zeros(5, 1, 32, 32)
    for mask, slot in zip(masks, chosen, strict=True):
        for x1, y1, x2, y2 in slot.boxes_at(32, 32).tolist():
            centres = torch.arange(32) + 0.5
            inside = ((centres >= y1) & (centres < y2))[:, None] & ((centres >= x1) & (centres < x2))[None]
            inside[int(-(-(y1 + y2) // 2)) - 1, int(-(-(x1 + x2) // 2)) - 1] = True
            mask[0][inside] = 1
    with torch.no_grad():
        expected = generator()(noise([s.noise_seed for s in chosen], 16), masks)
    assert images.shape == (5, 1, 32, 32) and images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=1e-5)


def test_a_difference_is_nodule_less_normal_of_the_same_noise_and_nothing_without_boxes():
    renderer, chosen = Renderer(generator()), slots(4, {"Nodule": 1.0})
    bare = [type(s)(s.key, "No Finding", s.noise_seed, s.boxes[:0], s.host) for s in chosen]
    expected = renderer.whole(chosen, CPU) - renderer.whole(bare, CPU)
    assert torch.allclose(renderer.differences(chosen, CPU), expected, atol=1e-5) and expected.abs().max() > 1e-3
    assert renderer.differences(bare, CPU).abs().max() == 0


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 9), batch_size=st.integers(1, 9), start=st.integers(0, 1000))
def test_any_render_batch_size_gives_the_same_images(n, batch_size, start):
    chosen = slots(n, start=start)
    whole = Renderer(generator()).whole(chosen, CPU)
    parts = Renderer(generator(), batch_size=batch_size).whole(chosen, CPU)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_rendering_neither_moves_a_random_state_nor_touches_the_generator():
    trained = copy.deepcopy(generator()).train()
    before, digest = copy.deepcopy(trained.state_dict()), trained.weights_hash
    with global_states_untouched():
        Renderer(trained).whole(slots(3), CPU)
    assert trained.training and trained.weights_hash == digest
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_images_carry_no_graph_and_grad_mode_and_autocast_of_the_user_do_not_matter():
    renderer, chosen = Renderer(generator()), slots(3)
    plain = renderer.whole(chosen, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = renderer.whole(chosen, CPU)
    with torch.inference_mode():
        inferred = renderer.whole(chosen, CPU).clone()
    assert torch.is_grad_enabled() and not plain.requires_grad
    assert torch.equal(plain, cast) and torch.equal(plain, inferred)


def test_bfloat16_gives_float32_images_that_are_close():
    chosen = slots(4)
    images = Renderer(generator(), dtype=torch.bfloat16).whole(chosen, CPU)
    assert images.dtype == torch.float32
    assert (images - Renderer(generator()).whole(chosen, CPU)).abs().mean() < 0.02


def test_pickles_and_copies_are_built_anew():
    renderer = Renderer(generator())
    images = renderer.whole(slots(2), CPU)
    for other in (pickle.loads(pickle.dumps(renderer)), copy.deepcopy(renderer)):
        assert not other._ready and torch.equal(other.whole(slots(2), CPU), images)


@pytest.mark.parametrize("batch_size", [0, -3, 2.0, "32", True, None])
def test_a_bad_render_batch_size_is_named(batch_size):
    with pytest.raises(ValueError, match="render_batch_size must be an integer of at least 1, got"):
        Renderer(generator(), batch_size=batch_size)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", 3.5, object()])
def test_a_bad_device_is_named(device):
    with pytest.raises(ValueError, match="device must be a torch.device or its name, got"):
        Renderer(generator(), device=device)


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_that_this_machine_lacks_is_named_at_its_first_use(device):
    renderer = Renderer(generator(), device=device)
    with pytest.raises(ValueError, match=f"device must be one that this machine has, got '{device}': "):
        renderer.whole(slots(1), CPU)
    assert not renderer._ready


class Renders(Dataset):
    """Renders in a worker, on the given device."""

    def __init__(self, renderer, device):
        self.renderer, self.device = renderer, device

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return self.renderer.whole(slots(1), torch.device(self.device))[0]


def test_cuda_in_a_worker_is_refused_before_cuda_is_touched():
    for renderer, device in ((Renderer(generator()), "cuda"), (Renderer(generator(), device="cuda:0"), "cpu")):
        loader = DataLoader(Renders(renderer, device), num_workers=1, multiprocessing_context="fork")
        with pytest.raises(WorkerDeviceError, match="device must be 'cpu' inside a DataLoader worker, got 'cuda"):
            next(iter(loader))


def test_a_worker_renders_on_the_cpu_as_the_main_process_does():
    data = Renders(Renderer(generator()), "cpu")
    (batch,) = DataLoader(data, num_workers=1, multiprocessing_context="fork")
    assert torch.allclose(batch[0], data[0], atol=1e-6)


def test_a_mix_on_cuda_says_in_a_worker_what_to_do_instead():
    class Real(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.zeros(1, 32, 32), 0

    wrapped = make_mix(p=1.0, device="cuda").wrap(Real())
    with pytest.raises(WorkerDeviceError, match="use mix.loader"):
        next(iter(DataLoader(wrapped, num_workers=1, multiprocessing_context="fork")))
