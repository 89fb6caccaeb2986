import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carim_aug.ops.random import fold, noise, stream

integers = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1))
keys = st.lists(integers, min_size=3, max_size=5)


def draws(generator: np.random.Generator) -> tuple[int, ...]:
    return tuple(generator.integers(2**63, size=2).tolist())


@settings(deadline=None, max_examples=150)
@given(keys)
def test_same_integers_give_the_same_stream(key):
    assert draws(stream(*key)) == draws(stream(*key))


@settings(deadline=None, max_examples=150)
@given(keys, keys)
def test_other_integers_give_another_stream(key, other):
    assert (draws(stream(*key)) == draws(stream(*other))) == (key == other)


def test_retry_zero_and_carried_words_are_streams_of_their_own():
    assert draws(stream(1, 2, 3)) != draws(stream(1, 2, 3, 0))
    assert draws(stream(2**32, 2, 0)) != draws(stream(0, 1, 2))


def test_stream_is_the_same_in_another_process():
    code = "from carim_aug.ops.random import stream; print(*stream(7, 1, 2**40).integers(2**63, size=2))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTHONHASHSEED="5")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert tuple(map(int, output.stdout.split())) == draws(stream(7, 1, 2**40))


def test_neighbouring_streams_look_uniform_and_uncorrelated():
    first = np.array([[stream(s, e, i).random() for i in range(2000)] for s, e in ((0, 0), (0, 1), (1, 0))])
    assert np.abs(first.mean(1) - 0.5).max() < 0.03
    assert np.abs(first.std(1) - 12**-0.5).max() < 0.02
    assert np.abs(np.corrcoef(first) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(first[0, 1:], first[0, :-1])[0, 1]) < 0.1


def test_stream_takes_numpy_and_torch_integers():
    assert draws(stream(np.uint64(3), np.int32(4), torch.tensor(5))) == draws(stream(3, 4, 5))


def test_stream_pickles_where_it_stands():
    generator = stream(1, 2, 3)
    generator.random()
    assert draws(pickle.loads(pickle.dumps(generator))) == draws(generator)


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -5, 0), (0, 0, 2**64)])
def test_integers_out_of_range_are_named(key):
    for call in (lambda: stream(*key), lambda: fold(*key), lambda: noise(key, 4)):
        with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1, got"):
            call()


@pytest.mark.parametrize("wrong", [1.0, "1", None, [1]])
def test_what_is_no_integer_is_named(wrong):
    with pytest.raises(TypeError, match="must be integers, got"):
        stream(0, wrong, 0)
    with pytest.raises(TypeError, match="must be integers, got"):
        noise([0, wrong], 4)


@settings(deadline=None, max_examples=60)
@given(st.lists(integers, min_size=1, max_size=8), st.integers(1, 40), st.data())
def test_a_row_of_noise_depends_on_its_seed_alone(seeds, dim, data):
    rows = noise(seeds, dim)
    assert rows.shape == (len(seeds), dim) and rows.dtype == torch.float32
    order = data.draw(st.permutations(range(len(seeds))))
    assert torch.equal(noise([seeds[i] for i in order], dim), rows[list(order)])
    assert torch.equal(noise(seeds[:1], dim)[0], rows[0])


def test_noise_is_standard_normal():
    rows = noise(range(500), 100)
    assert abs(rows.mean().item()) < 0.02 and abs(rows.std().item() - 1) < 0.02
    assert abs((rows.abs() < 1).float().mean().item() - 0.6827) < 0.01
    assert torch.corrcoef(rows[:50]).fill_diagonal_(0).abs().max() < 0.6


def test_noise_of_no_seeds_is_empty_and_of_no_length_an_error():
    assert noise([], 100).shape == (0, 100)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        noise([1], 0)


def test_noise_and_streams_of_one_seed_are_unrelated():
    assert not np.allclose(noise([3], 8)[0].numpy(), stream(3, 0, 0).standard_normal(8, dtype=np.float32))


@settings(deadline=None, max_examples=100)
@given(st.lists(integers, min_size=1, max_size=5), st.lists(integers, min_size=1, max_size=5))
def test_fold_gives_a_63_bit_seed_for_these_integers_alone(some, others):
    assert 0 <= fold(*some) < 2**63
    assert (fold(*some) == fold(*others)) == (some == others)
    torch.Generator().manual_seed(fold(*some))


def test_fold_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one integer"):
        fold()


def test_no_global_generator_is_read_or_moved():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    values = draws(stream(0, 0, 0)), noise([1], 4).tolist()
    np.random.seed(3)
    torch.manual_seed(3)
    try:
        assert (draws(stream(0, 0, 0)), noise([1], 4).tolist()) == values
    finally:
        state = list(np.random.get_state())
        state[1] = before
        np.random.set_state(tuple(state))
        torch.set_rng_state(torch_before)
    stream(0, 0, 0)
    noise([1], 4)
    assert np.array_equal(np.random.get_state()[1], before) and torch.equal(torch.get_rng_state(), torch_before)
