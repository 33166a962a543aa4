"""Tests that eager calls share programs, and never the results of another network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occjax
from occjax import programs

IMAGES = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3))
LABELS = jnp.array([0, 1, 0])
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
WEIGHTS = jax.random.normal(jax.random.key(2), (4, 2))


def convolved(images, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def logits(kernel, weights, images):
    kernel, weights = (x.astype(images.dtype) for x in (kernel, weights))
    return jax.nn.relu(convolved(images, kernel)).mean((1, 2)) @ weights


def network(scale=1.0):
    """A new function over new weights."""
    return functools.partial(logits, KERNEL * scale, WEIGHTS)


def maps(logits_fn, images=IMAGES, classes=LABELS):
    return occjax.heatmaps(logits_fn, images, classes, size=3, stride=2)


@pytest.fixture
def compiled():
    """The programs that are compiled while a test runs."""
    names = []

    def listen(event, *_, **__):
        if 'backend_compile' in event:
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


KEY = jax.random.key(3)
SALIENCY = IMAGES.mean(-1)
ATTACKS = {
    'fgsm': dict(epsilon=0.1),
    'targeted_fgsm': dict(epsilon=0.1),
    'fgsm_l2': dict(epsilon=0.1),
    'bim': dict(epsilon=0.1, steps=3),
    'pgd': dict(epsilon=0.1, steps=3, key=KEY),
    'pgd_l2': dict(epsilon=0.1, steps=3, key=KEY),
    'mi_fgsm': dict(epsilon=0.1, steps=3),
    'apgd': dict(epsilon=0.1, steps=3, key=KEY),
    'square': dict(epsilon=0.1, steps=3, key=KEY),
    'carlini_wagner': dict(steps=2),
    'deepfool': dict(steps=2),
}


def attacks(name, fn):
    return getattr(occjax.attack, name)(fn, IMAGES, LABELS, **ATTACKS[name])


def curve(name, fn):
    return getattr(occjax.attribution, name)(fn, IMAGES, LABELS, SALIENCY, steps=4)


CALLS = {name: functools.partial(attacks, name) for name in ATTACKS} | {
    'deletion': functools.partial(curve, 'deletion'),
    'insertion': functools.partial(curve, 'insertion'),
    'rise': lambda fn: occjax.attribution.rise(fn, IMAGES, LABELS, key=KEY, masks=8),
    'heatmaps': maps,
    'occluded_logits': lambda fn: occjax.occluded_logits(fn, IMAGES, size=3, stride=2, fill='mean'),
}


@pytest.mark.parametrize('name', CALLS)
def test_a_second_eager_call_compiles_nothing_and_reads_its_own_weights(name, compiled):
    call = CALLS[name]
    jax.block_until_ready(call(network()))
    compiled.clear()
    again = jax.block_until_ready(call(network(2.0)))
    assert compiled == []
    expected = jax.jit(lambda: call(network(2.0)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), again, expected)


@pytest.mark.parametrize('name', ['heatmaps', 'fgsm', 'pgd', 'rise'])
def test_probabilities_are_warned_of_each_time(name):
    def fn(images):
        return jax.nn.softmax(network()(images))

    for _ in range(2):
        with pytest.warns(UserWarning, match='before softmax'):
            CALLS[name](fn)


@pytest.mark.parametrize('channels_first', [False, True])
def test_no_wide_plain_convolution_is_left_in_a_loop(channels_first):
    """On a CPU it is up to sixty times slower there, with channels first most."""
    wide, kernel = jnp.ones((3, 32)), jax.random.normal(KEY, (3, 3, 32, 32))

    def fn(images):
        x = images @ wide
        if channels_first:
            turned = jnp.transpose(kernel, (3, 2, 0, 1))
            x = jax.lax.conv_general_dilated(jnp.transpose(x, (0, 3, 1, 2)), turned, (1, 1), 'SAME')
            return x.mean((2, 3))
        return convolved(x, kernel).mean((1, 2))

    def attacked(images):
        return occjax.attack.pgd(fn, images, LABELS, key=KEY, epsilon=0.1, steps=3)

    program = jax.jit(attacked).lower(IMAGES).as_text()
    assert 'stablehlo.while' in program
    assert 'stablehlo.convolution' not in program


def test_weights_that_change_in_place_are_seen():
    """A module in training is one object, whose weights change: its maps must."""
    cells, host = [WEIGHTS], np.array(WEIGHTS)

    def of_cells(images):
        return logits(KERNEL, cells[0], images)

    def of_host(images):
        return logits(KERNEL, host, images)

    for fn in (of_cells, of_host):
        accelerated = occjax.accelerate(fn)
        before = maps(fn), accelerated(IMAGES)
        cells[0] = cells[0] * 3
        host *= 3
        after = maps(fn), accelerated(IMAGES)
        np.testing.assert_allclose(after[1], fn(IMAGES), rtol=1e-4)
        np.testing.assert_allclose(after[0], jax.jit(lambda fn=fn: maps(fn))(), atol=1e-5)
        assert np.abs(after[0] - before[0]).max() > 1e-3


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x * 4) / 4


@jax.custom_jvp
def rounded(x):
    return jnp.round(x * 4) / 4


straight_through.defjvps(lambda tangent, *_: tangent)
rounded.defjvps(lambda tangent, *_: 0 * tangent)


def test_networks_that_differ_share_nothing():
    """Not even where their operations have the same names and shapes."""

    def sums(fn):
        return lambda images: jnp.stack([fn(images).sum((1, 2, 3)), images.mean((1, 2, 3))], -1)

    pairs = [
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1] * x),
        (lambda x: x - x**2, lambda x: x**2 - x),
        (lambda x: jnp.where(x > 0.5, x, 0), lambda x: jnp.where(x > 0.5, 0, x)),
        (jax.jit(lambda x: x * KERNEL[0, 0, 0, 0]), jax.jit(lambda x: x * KERNEL[0, 0, 0, 1])),
        (
            lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x * 1.5, x),
            lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x * 2.5, x),
        ),
    ]
    for pair in pairs:
        for fn in pair:
            found = programs.run(lambda fn, images: fn(images), sums(fn), IMAGES)
            np.testing.assert_allclose(found, sums(fn)(IMAGES), rtol=1e-5)

    def gradient(fn, images):
        return jax.grad(lambda images: fn(images)[:, 0].sum())(images)

    np.testing.assert_allclose(programs.run(gradient, sums(rounded), IMAGES), 0)
    np.testing.assert_allclose(programs.run(gradient, sums(straight_through), IMAGES), 1)


def test_a_derivative_of_ones_own_compiles_once(compiled):
    @jax.custom_vjp
    def through(x):
        return jnp.round(x * 4) / 4

    through.defvjp(lambda x: (through(x), None), lambda _, cotangent: (cotangent,))

    def fn(images):
        return logits(KERNEL, WEIGHTS, jax.nn.gelu(through(images)))

    def gradient(fn, images):
        return jax.grad(lambda images: fn(images).sum())(images)

    first = programs.run(gradient, fn, IMAGES)
    compiled.clear()
    np.testing.assert_array_equal(programs.run(gradient, fn, IMAGES), first)
    assert compiled == []


def test_shapes_types_and_settings_make_programs_of_their_own():
    for images, size, fill in (
        (IMAGES, 3, 0.5),
        (IMAGES, 3, 0.25),
        (IMAGES, 3, 'mean'),
        (IMAGES, (2, 4), 0.5),
        (IMAGES[:2], 3, 0.5),
        (IMAGES[:, :7], 3, 0.5),
        (IMAGES.astype(jnp.bfloat16), 3, 0.5),
    ):
        found = occjax.occluded_logits(network(), images, size=size, stride=2, fill=fill)
        settings = dict(size=size, stride=2, fill=fill, engine='full')
        expected = jax.jit(functools.partial(occjax.occluded_logits, network(), **settings))(images)
        assert found.dtype == expected.dtype
        tolerance = 1e-5 if found.dtype == jnp.float32 else 0.1
        np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=tolerance)


def test_no_more_programs_are_kept_than_it_says(monkeypatch):
    monkeypatch.setattr(programs, 'MOST', 2)
    for scale in (1.0, 2.0, 3.0):
        programs.run(lambda fn, images, scale: fn(images) * scale, network(), IMAGES, scale=scale)
    assert len(programs._kept) <= 2


def test_under_a_transformation_it_is_the_function_itself():
    by_image = jax.vmap(lambda image: maps(network(), image[None], LABELS[:1])[0])(IMAGES)
    np.testing.assert_allclose(by_image, maps(network(), classes=0 * LABELS), atol=1e-5)
    gradient = jax.grad(lambda weights: maps(functools.partial(logits, KERNEL, weights)).sum())
    assert np.isfinite(gradient(WEIGHTS)).all()
