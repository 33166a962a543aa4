"""Laws of `occjax.streams`: no two random choices share their numbers."""

import itertools

import jax
import numpy as np

from occjax import streams
from occjax.streams import Stream

# What a run asks for: every purpose without an index, and with one and two small ones.
INDICES = ((), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0))


def test_no_two_purposes_of_any_two_seeds_below_100_give_equal_draws():
    seen = {}
    for seed, stream, index in itertools.product(range(100), Stream, INDICES):
        draw = streams.rng(seed, stream, *index).integers(2**63, size=2).tobytes()
        assert draw not in seen, f'{(seed, stream, index)} draws as {seen[draw]} does'
        seen[draw] = seed, stream, index


def test_no_two_keys_of_any_two_seeds_below_100_are_equal():
    def keys(seed):
        found = [
            streams.key(seed, stream, *index)
            for stream, index in itertools.product(Stream, INDICES)
        ]
        return jax.numpy.stack([jax.random.key_data(key) for key in found])

    rows = np.asarray(jax.vmap(keys)(np.arange(100))).reshape(100 * len(Stream) * len(INDICES), -1)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_a_stream_is_a_pure_function():
    a, b = (streams.rng(3, Stream.DIVISION, 1, 2).permutation(50) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert streams.key(3, Stream.NOISE, 4) == streams.key(3, Stream.NOISE, 4)


def test_numbers_of_purposes_differ():
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)
