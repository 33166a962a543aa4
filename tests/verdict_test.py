"""Laws of the verdict as one function of images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occjax import data, detector, metrics, verdict
from occjax.experiment import judging, stages, store
from occjax.methods import METHODS
from occjax.types import HeatmapSet

pytestmark = pytest.mark.usefixtures('small_plan')

SETTINGS = dict(size=5, stride=4, fill=0.5, engine='full')
LEVELS = np.linspace(-1, 1, 10)  # Any thresholds: those of 5 % are infinite in so small a run.


def seed_0(run, method):
    """Returns the first seed's bank, its thresholds, and the maps that it was not fitted on."""
    division = store.divide(run, 'held_out')
    banks = store.load_banks(run, division, 'held_out', method)
    scores = judging.score_banks(banks, METHODS[method], division.maps)[0]
    judged, known = division.is_judged[0], division.known(0, scores)
    levels = metrics.thresholds(**known, num_classes=10, threshold=0.0, learns=True)
    bank = jax.tree.map(lambda leaf: leaf[0], banks)
    levels = np.where(np.isnan(levels[1]), np.inf, levels[1])
    return bank, levels, division.maps.select(judged), scores[judged]


@pytest.mark.parametrize('method', ['detector', 'linear_probe', 'all_logits'])
def test_a_verdict_is_what_the_stored_maps_say(finished, method):
    run, _ = finished
    variables = stages.load_variables(run)
    bank, _, maps, scores = seed_0(run, method)
    clean = np.flatnonzero(~maps.is_adversarial)[:6]
    images = data.take(run.dataset.test, maps.image_id[clean])
    for engine in ('full', 'incremental'):
        settings = SETTINGS | {'engine': engine, 'method': METHODS[method]}
        logits_fn = functools.partial(run.network.fn, variables)
        margins_fn = functools.partial(verdict.margins, logits_fn, bank, LEVELS, **settings)
        margins = jax.jit(margins_fn)(images)
        expected = scores[clean] - LEVELS[maps.predicted[clean]]
        np.testing.assert_allclose(margins, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['detector', 'all_logits'])
def test_a_window_that_changes_nothing_has_no_effect_and_others_what_they_add(name):
    """Each is the score less that of maps whose logits are the unoccluded ones at this window."""
    rng, method = np.random.default_rng(0), METHODS[name]
    unoccluded = rng.normal(size=(3, 5)).astype(np.float32)
    logits = unoccluded[:, None, None] + rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    logits[:, 1, 2] = unoccluded
    some = dict(unoccluded=unoccluded, label=np.zeros(3, int), image_id=np.zeros(3, int))
    maps = HeatmapSet(logits=logits, is_adversarial=np.zeros(3, bool), **some)
    inputs = method.inputs_fn(maps)
    grid, count = inputs.shape[1:], method.num_networks(maps)
    bank = detector.init_bank(jax.random.key(0), num_classes=count, grid=grid, **method.fields)
    found = verdict.effects(bank, jax.tree.map(jnp.asarray, maps), method=method)
    assert found.shape == (3, 2, 4)

    def score(maps):
        return np.asarray(detector.score(bank, method.inputs_fn(maps), method.predicted(maps)))

    for row, column in np.ndindex(2, 4):
        other = logits.copy()
        other[:, row, column] = unoccluded
        change = score(maps) - score(dataclasses.replace(maps, logits=other))
        np.testing.assert_allclose(found[:, row, column], change, atol=1e-5)
    assert np.abs(found[:, 1, 2]).max() < 1e-6 < np.abs(found[:, 0, 0]).min()


def test_a_verdict_of_views_sees_them():
    """A linear detector of two views, by hand."""
    weights = np.random.default_rng(0).normal(size=(8 * 8 * 3, 3)).astype(np.float32)
    images = np.random.default_rng(1).uniform(size=(4, 8, 8, 3)).astype(np.float32)

    def logits_fn(images):
        return images.reshape(len(images), -1) @ weights

    seen = [lambda x: x[:, :, ::-1], lambda x: x]
    method = METHODS['views_alone']._replace(features=(), standardize=False)
    bank = detector.init_bank(jax.random.key(0), num_classes=1, grid=(13,), features=())
    settings = dict(size=4, stride=2, fill=0.5, engine='full', method=method, views=seen)
    found = jax.jit(functools.partial(verdict.margins, logits_fn, bank, np.zeros(3), **settings))
    logits, mirrored = (logits_fn(x) for x in (images, seen[0](images)))
    rows = np.arange(4), logits.argmax(-1)
    left = [np.asarray(jax.nn.log_softmax(z))[rows][:, None] for z in (mirrored, logits)]
    inputs = np.concatenate([*np.exp(left), *left, mirrored - logits, 0 * logits, logits], axis=1)
    expected = detector.score(bank, inputs, np.zeros(4, int))
    np.testing.assert_allclose(found(images), expected, atol=1e-4)


@pytest.fixture(params=['detector', pytest.param('all_logits', marks=pytest.mark.slow)])
def in_float64(finished, request):
    """Returns, of an engine, the margins as a function of images, and three images.

    In so fine a type no kink of a ReLU or pool lies between points of a difference, or within
    rounding; but the empty ground of a digit ties the maxima of pools, which have no gradient
    there: noise tells them apart.
    """
    run, method = finished[0], METHODS[request.param]
    bank, _, maps, _ = seed_0(run, request.param)
    images = data.take(run.dataset.test, maps.image_id[:3])
    images = images + np.random.default_rng(1).uniform(0, 0.1, images.shape)
    loaded = jax.device_get((stages.load_variables(run), bank, images))
    with jax.enable_x64(True):
        variables, bank, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded)
        logits_fn = functools.partial(run.network.fn, variables)

        def of(engine):
            settings = SETTINGS | {'engine': engine, 'method': method}
            return functools.partial(verdict.margins, logits_fn, bank, LEVELS, **settings)

        yield of, images


def test_the_gradient_of_a_verdict_is_right(in_float64):
    """Against central differences along random directions, through map and detector."""
    of, images = in_float64
    margins_fn, rng, step = jax.jit(of('full')), np.random.default_rng(0), 1e-7
    gradient = jax.jit(jax.grad(lambda x: of('full')(x).sum()))(images)
    size = np.linalg.norm(gradient.reshape(len(images), -1), axis=1)
    assert gradient.dtype == np.float64 and (size > 0).all()
    for _ in range(6):
        direction = rng.choice([-1.0, 1.0], images.shape)
        ends = [margins_fn(images + sign * step * direction) for sign in (1, -1)]
        exact = (gradient * direction).sum((1, 2, 3))
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step) / size, exact / size, atol=1e-5)


def test_both_engines_have_one_gradient(in_float64):
    of, images = in_float64
    full, incremental = (
        jax.jit(jax.grad(lambda x, engine=engine: of(engine)(x).sum()))(images)
        for engine in ('full', 'incremental')
    )
    np.testing.assert_allclose(incremental, full, rtol=0, atol=1e-9 * np.abs(full).max())
