import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carim_aug.ops.random import fold, noise, stream

integers = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1))
keys = st.lists(integers, min_size=3, max_size=5)


def draws(generator: np.random.Generator) -> tuple[int, ...]:
    return tuple(generator.integers(2**63, size=2).tolist())


@given(keys, keys)
def test_streams_and_folds_are_the_same_for_the_same_integers_alone(key, other):
    assert draws(stream(*key)) == draws(stream(*key))
    assert (draws(stream(*key)) == draws(stream(*other))) == (fold(*key) == fold(*other)) == (key == other)
    assert 0 <= fold(*key[:1]) < 2**63 and fold(*key[:1]) != fold(*key)
    torch.Generator().manual_seed(fold(*key))


def test_retry_zero_and_carried_words_are_streams_of_their_own():
    assert draws(stream(1, 2, 3)) != draws(stream(1, 2, 3, 0))
    assert draws(stream(2**32, 2, 0)) != draws(stream(0, 1, 2))


def test_draws_of_known_integers_are_the_same_in_every_process_and_release():
    assert draws(stream(7, 1, 2**40)) == (7976289787256607722, 6553458311528629894)
    assert fold(1, 2, 3) == 2148231356956630019
    assert noise([3], 3).tolist() == [[-0.5963457822799683, -0.33934852480888367, 0.6650282144546509]]


def test_neighbouring_streams_look_uniform_and_uncorrelated():
    first = np.array([[stream(s, e, i).random() for i in range(2000)] for s, e in ((0, 0), (0, 1), (1, 0))])
    assert np.abs(first.mean(1) - 0.5).max() < 0.03 and np.abs(first.std(1) - 12**-0.5).max() < 0.02
    assert np.abs(np.corrcoef(first) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(first[0, 1:], first[0, :-1])[0, 1]) < 0.1


def test_a_stream_takes_numpy_and_torch_integers_and_pickles_where_it_stands():
    generator = stream(np.uint64(3), np.int32(4), torch.tensor(5))
    assert draws(generator) == draws(stream(3, 4, 5))
    assert draws(pickle.loads(pickle.dumps(generator))) == draws(generator)


@given(st.lists(integers, min_size=1, max_size=8), st.integers(1, 40), st.data())
def test_a_row_of_noise_depends_on_its_seed_alone(seeds, dim, data):
    rows = noise(seeds, dim)
    assert rows.shape == (len(seeds), dim) and rows.dtype == torch.float32
    order = data.draw(st.permutations(range(len(seeds))))
    assert torch.equal(noise([seeds[i] for i in order], dim), rows[list(order)])
    assert torch.equal(noise(seeds[:1], dim)[0], rows[0])


def test_noise_is_standard_normal_and_unrelated_to_the_stream_of_its_seed():
    rows = noise(range(500), 100)
    assert abs(rows.mean().item()) < 0.02 and abs(rows.std().item() - 1) < 0.02
    assert abs((rows.abs() < 1).float().mean().item() - 0.6827) < 0.01
    assert torch.corrcoef(rows[:50]).fill_diagonal_(0).abs().max() < 0.6
    assert not np.allclose(rows[3, :8].numpy(), stream(3, 0, 0).standard_normal(8, dtype=np.float32))
    assert noise([], 100).shape == (0, 100)


@pytest.mark.parametrize("value", [-5, 2**64, 1.0, "1", None, [1]])
def test_what_is_no_seed_is_named(value):
    error, words = (ValueError, "from 0 to 2.*, got ") if isinstance(value, int) else (TypeError, "integers, got ")
    for call in (lambda: stream(0, value, 0), lambda: fold(value), lambda: noise([0, value], 4)):
        with pytest.raises(error, match=words):
            call()
    for call, words in ((fold, "at least one integer"), (lambda: noise([1], 0), "dim must be at least 1, got 0")):
        with pytest.raises(ValueError, match=words):
            call()


def test_no_global_generator_is_read_or_moved():
    before, torch_before = np.random.get_state(), torch.get_rng_state()
    values = draws(stream(0, 0, 0)), noise([1], 4).tolist()
    assert np.array_equal(np.random.get_state()[1], before[1]) and torch.equal(torch.get_rng_state(), torch_before)
    np.random.seed(3)
    torch.manual_seed(3)
    try:
        assert (draws(stream(0, 0, 0)), noise([1], 4).tolist()) == values
    finally:
        np.random.set_state(before)
        torch.set_rng_state(torch_before)
