"""What may differ on another machine, moved on purpose: no test may hang on it.

In the environment of `pytest`, one or several:

    OCCJAX_TEST_WEIGHTS=1.000001   every trained weight is multiplied or divided by it, by chance
    OCCJAX_TEST_SEED=1             all random numbers are other ones, also those of the tests
    OCCJAX_TEST_LEVEL=default      XLA optimizes as much as it does for users, not level 0
    OCCJAX_TEST_DEVICES=1          devices of this host, not 4
    XLA_FLAGS=--xla_cpu_max_isa=AVX2   (XLA's own) instructions of another CPU
    OCCJAX_TEST_MARGINS=<file>     gets a line for every comparison of numbers: the largest error
                                   as a share of what is allowed, and the test
"""

import dataclasses
import functools
import os

import numpy as np

_KNOWN = dict(WEIGHTS='1', SEED='0', LEVEL='0', DEVICES='4', MARGINS='')
WEIGHTS, SEED, LEVEL, DEVICES, MARGINS = (
    os.environ.get(f'OCCJAX_TEST_{name}', default) for name, default in _KNOWN.items()
)


def flags(devices: int = int(DEVICES)) -> str:
    """Returns what XLA is told: programs of milliseconds are not worth optimizing for seconds."""
    level = '' if LEVEL == 'default' else f' --xla_backend_optimization_level={LEVEL}'
    return f' --xla_force_host_platform_device_count={devices}{level}'


def decided(logits, *, margin, least) -> np.ndarray:
    """Returns which rows prefer a class to all others by a margin, and sees that enough do.

    Only there a decision is compared: elsewhere rounding, or whatever else may move a number by
    less than the margin, decides.
    """
    second, first = np.sort(np.asarray(logits), axis=-1)[:, -2:].T
    found = first - second > margin
    assert found.sum() >= least, f'{found.sum()} of {len(found)} rows have a class by {margin}'
    return found


def apply():
    """Moves what is asked for, in this process; before tests are imported."""
    if float(WEIGHTS) != 1:
        _move_weights(float(WEIGHTS))
    if int(SEED):
        _move_seeds(int(SEED))
    if MARGINS:
        _note_margins()


def _replaced(module, name, around):
    """Puts `around(original, ...)` in place of a function."""
    original = getattr(module, name)
    setattr(module, name, functools.wraps(original)(lambda *a, **k: around(original, *a, **k)))


def _move_weights(factor):
    import jax

    from occjax import classifier, comparators, detector

    def moved(leaf):
        signs = np.random.default_rng(leaf.size).choice([-1, 1], leaf.shape)
        return leaf * (factor**signs).astype(leaf.dtype)

    def fit_epoch(fit, *args, **kwargs):
        state, values = fit(*args, **kwargs)
        if not isinstance(state, classifier.ClassifierState):
            return state, values
        params = jax.tree.map(moved, state.variables.params)
        variables = state.variables._replace(params=params)
        return dataclasses.replace(state, variables=variables), values

    def fit_autoencoder(fit, *args, **kwargs):
        return jax.tree.map(moved, fit(*args, **kwargs))

    def fit_detector(fit, key, variables, maps, is_adversarial, weight, **kwargs):
        fitted = fit(key, variables, maps, is_adversarial, weight, **kwargs)
        # One without maps stays as it is.
        return jax.tree.map(
            lambda leaf: jax.numpy.where((weight > 0).any(), moved(leaf), leaf), fitted
        )

    _replaced(classifier, 'fit_epoch', fit_epoch)
    _replaced(comparators, 'fit_autoencoder', fit_autoencoder)
    _replaced(detector, 'fit', fit_detector)


def _move_seeds(by):
    import jax

    def key(make, seed, **kwargs):
        return make(seed + 1000 * by, **kwargs)

    def rng(make, seed=None):
        if isinstance(seed, int):
            seed += 1000 * by
        elif isinstance(seed, np.random.SeedSequence):
            seed = np.random.SeedSequence(seed.entropy + 1000 * by, spawn_key=seed.spawn_key)
        return make(seed)

    _replaced(jax.random, 'key', key)
    _replaced(np.random, 'default_rng', rng)


def _note_margins():
    import pytest

    def note(actual, expected, rtol, atol):
        actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
        with np.errstate(all='ignore'):
            share = np.abs(actual - expected) / (atol + rtol * np.abs(expected))
        share = np.nanmax(share, initial=0)
        with open(MARGINS, 'a') as file:
            file.write(f'{share:.3g} {os.environ["PYTEST_CURRENT_TEST"]}\n')

    def assert_allclose(check, actual, desired, rtol=1e-7, atol=0, *args, **kwargs):
        check(actual, desired, rtol, atol, *args, **kwargs)
        if rtol or atol:
            note(actual, desired, rtol, atol)

    def equals(check, approx, actual):
        if isinstance(actual, (int, float, np.number)) and np.isfinite(approx.expected):
            note(actual, approx.expected, 0, approx.tolerance)
        return check(approx, actual)

    _replaced(np.testing, 'assert_allclose', assert_allclose)
    scalar = type(pytest.approx(1.0))
    _replaced(scalar, '__eq__', equals)
