"""Laws of the incremental engine: it is the plain one at a fraction of the arithmetic."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from occjax import checks, convolution, engine, incremental, occlusion, rules, tracing, vgg
from tests import any_network
from tests.any_network import NETWORKS

SETTINGS = ('fn', 'size', 'stride', 'grid', 'chunk_size', 'threshold', 'every')


def random_images(count, image_shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(count, *image_shape, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=SETTINGS)
def plain_logits(weights, images, fill=0.5, *, fn, **settings):
    fn = functools.partial(fn, weights)
    return occlusion.occluded_logits(fn, images, fill=fill, **settings)


@functools.partial(jax.jit, static_argnames=SETTINGS)
def incremental_logits(weights, images, fill=0.5, *, fn, **settings):
    fn = functools.partial(fn, weights)
    return incremental.occluded_logits(fn, images, fill=fill, **settings)


def assert_equal(actual, expected, *, atol=1e-5):
    """Up to rounding: of the largest logit, and of what windows change, however little that is."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol * np.abs(expected).max())
    spread = np.ptp(expected, axis=(1, 2)).max()
    assert np.abs(actual - expected).max() <= 0.02 * spread


GEOMETRIES = [
    ((32, 32), dict(size=8, stride=5)),
    ((37, 29), dict(size=(7, 10), stride=(9, 6), grid='cover')),
    ((32, 32), dict(size=31, stride=1, grid='floor')),
]


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize(('image_shape', 'geometry'), GEOMETRIES)
def test_every_kind_of_network_is_the_plain_form(name, image_shape, geometry):
    fn, make = NETWORKS[name]
    weights, images = make(0), random_images(2, image_shape)
    fill = random_images(2, image_shape, seed=1)
    expected = plain_logits(weights, images, fill, fn=fn, **geometry)
    assert_equal(incremental_logits(weights, images, fill, fn=fn, **geometry), expected)


@pytest.mark.parametrize(
    'name',
    [
        'resnet',
        *(pytest.param(n, marks=pytest.mark.slow) for n in ('mobilenet', 'channels first')),
    ],
)
def test_gradients_are_the_plain_forms(name):
    fn, make = NETWORKS[name]
    weights, images = make(0), random_images(1, (24, 20))
    geometry = dict(size=6, stride=5, chunk_size=4)

    def loss(of, weights, images):
        logits = of(functools.partial(fn, weights), images, **geometry)
        return (jnp.sin(3 * logits) * jnp.arange(1, 6)).sum()

    found = [
        jax.jit(jax.grad(functools.partial(loss, module.occluded_logits), argnums=(0, 1)))(
            weights, images
        )
        for module in (occlusion, incremental)
    ]
    for expected, actual in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found[0][1]).max() > 0


def test_a_derivative_of_ones_own_is_kept_on_boxes():
    """A ReLU has no gradient at 0, where its parts would have half of one."""
    images = np.full((1, 12, 12, 3), 0.5, np.float32)

    def logits_fn(images):
        x = jax.nn.relu(any_network.conv(images - 0.5, np.ones((3, 3, 3, 2), np.float32)))
        return x.sum((1, 2))

    def loss(images):
        return incremental.occluded_logits(logits_fn, images, size=4, stride=4).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(images), np.zeros_like(images))


SIZES, STRIDES = st.integers(1, 14), st.integers(3, 9)


@st.composite
def random_network(draw):
    """Layers by their numbers, and a geometry that leaves the grid a cell."""
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(['conv', 'conv', 'pool', 'residual', 'norm']))
        if kind == 'conv':
            groups = draw(st.sampled_from([1, channels]))
            width = groups * draw(st.integers(1, 3)) if groups > 1 else draw(st.integers(1, 6))
            low, high = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            size = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
            strides, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            layers.append((kind, channels, width, groups, size, strides, dilation, (low, high)))
            channels = width
        elif kind == 'pool':
            padding = draw(st.integers(0, 1))
            layers.append((kind, draw(st.integers(2, 3)), draw(st.integers(1, 3)), padding))
        else:
            layers.append((kind, channels, draw(st.sampled_from([1, 3, 5]))))
    image_shape = tuple(draw(st.integers(17, 30)) for _ in range(2))
    size, stride = (tuple(draw(side) for _ in range(2)) for side in (SIZES, STRIDES))
    grid = draw(st.sampled_from(['paper', 'floor', 'cover']))
    geometry = dict(size=size, stride=stride, grid=grid)
    return layers, channels, image_shape, geometry, draw(st.sampled_from([1, 3, None]))


def apply(layers, seed, x):
    """Returns the logits of a random network, or None where images vanish in it."""
    weights = any_network.Weights(seed)
    for kind, *rest in layers:
        if kind == 'conv':
            inputs, width, groups, size, stride, dilation, pads = rest
            kernel = weights(*size, inputs // groups, width)
            settings = dict(groups=groups, dilation=dilation, padding=(pads, pads))
            x = jax.nn.relu(any_network.conv(x, kernel, stride, **settings))
        elif kind == 'pool':
            size, stride, pad = rest
            x = any_network.pool(x, size, stride, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        elif kind == 'residual':
            channels, size = rest
            x = x + jnp.tanh(any_network.conv(x, weights(size, size, channels, channels)))
        else:
            x = any_network.norm(x, weights(rest[0]) + 1, axes=(-1,))
        if not x.size:
            return None
    return x.reshape(len(x), -1) @ weights(int(np.prod(x.shape[1:])), 3)


def fits(layers, image_shape):
    """Whether images of that shape don't vanish in a network."""
    image = jax.ShapeDtypeStruct((1, *image_shape, 3), jnp.float32)
    try:
        return jax.eval_shape(functools.partial(apply, layers, 0), image) is not None
    except ValueError:  # A negative padding crops more than there is.
        return False


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(random_network(), st.integers(0, 99))
def test_random_networks_are_the_plain_form(network, seed):
    layers, _, image_shape, geometry, chunk_size = network
    images = random_images(2, image_shape, seed)
    hypothesis.assume(fits(layers, image_shape))
    fn = functools.partial(apply, layers, seed)
    fill = np.float32([0.1, 0.9, 0.4])
    expected = jax.jit(lambda x: occlusion.occluded_logits(fn, x, fill=fill, **geometry))(images)
    settings = geometry | dict(fill=fill, chunk_size=chunk_size)
    actual = jax.jit(lambda x: incremental.occluded_logits(fn, x, **settings))(images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale + 1e-7)


@pytest.mark.parametrize('chunk_size', [1, 5, 12, 13, 100])
def test_chunk_size_does_not_change_the_result(chunk_size):
    fn, make = NETWORKS['vgg']
    weights, images, geometry = make(0), random_images(2, (13, 16)), dict(size=5, stride=3)
    expected = incremental_logits(weights, images, fn=fn, **geometry)
    actual = incremental_logits(weights, images, fn=fn, **geometry, chunk_size=chunk_size)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_models_and_over_images():
    fn, make = NETWORKS['resnet']
    both, images, geometry = [make(0), make(1)], random_images(2, (20, 24)), dict(size=6, stride=5)

    def one(weights, image):
        logits_fn = functools.partial(fn, weights)
        return incremental.occluded_logits(logits_fn, image[None], **geometry)[0]

    expected = [incremental_logits(weights, images, fn=fn, **geometry) for weights in both]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *both)
    actual = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(stacked, images)
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-4, atol=1e-5)


def test_heatmaps_are_probabilities():
    fn, classes = any_network.bound('vgg'), np.array([4, 1])
    images, geometry = random_images(2, (17, 20)), dict(size=6, stride=4, fill=0.2)
    expected, actual, auto = (
        jax.jit(lambda x, module=module: module.heatmaps(fn, x, classes, **geometry))(images)
        for module in (occlusion, incremental, engine)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_allclose(auto, expected, atol=1e-6)


def test_weights_are_arguments():
    """None is baked into a compiled program, of which it would be a constant of its size."""
    fn, make = NETWORKS['wide vgg']
    images = jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32)
    shapes = jax.eval_shape(lambda: make(0))
    text = incremental_logits.lower(shapes, images, fn=fn, size=5, stride=5).as_text()
    # One kernel's 9 * 32 * 32 numbers of four bytes are twice as many hexadecimal digits.
    assert max(map(len, text.splitlines())) < 9 * 32 * 32 * 8


def test_nothing_is_computed_for_a_plan():
    fn, make = NETWORKS['resnet']
    geometry = dict(size=8, stride=8)
    shapes = jax.eval_shape(lambda: make(0))
    ratio = incremental.flop_ratio(fn, (64, 64, 3), shapes, **geometry)
    assert ratio == incremental.flop_ratio(any_network.bound('resnet'), (64, 64, 3), **geometry)
    assert ratio > 1.5


@pytest.mark.parametrize(
    ('side', 'size', 'stride', 'expected'),
    [
        (224, 32, 14, [34, 20, 13, 15, 10, 12, 9, 11]),
        (224, 16, 4, [18, 12, 8, 10, 8, 10, 8, 10]),
        (32, 15, 5, [17, 11, 8, 8, 4, 4, 2, 2]),
    ],
)
def test_widths_of_vgg11(side, size, stride, expected):
    plan = planned_vgg(side, size=size, stride=stride)
    steps = [s for s in plan.steps if s.operation.name == 'conv_general_dilated']
    assert [step.shape[1:3] for step in steps] == [(width, width) for width in expected]


def planned_vgg(side, plan=vgg.VGG11, **settings):
    init = functools.partial(vgg.init, image_size=side, plan=plan)
    shapes = jax.eval_shape(init, jax.random.key(0))
    fn = functools.partial(vgg.logits, plan=plan)
    return incremental.planned(fn, (side, side, 3), shapes, **settings)


@pytest.mark.parametrize(
    ('side', 'size', 'stride', 'expected'),
    [(224, 32, 14, 6.0), (224, 16, 4, 8.4), (32, 15, 5, 1.07)],
)
def test_flop_ratio_of_vgg11(side, size, stride, expected):
    # The paper's ten classes; at 32 pixels §III-B's shorter head.
    ratio = planned_vgg(side, size=size, stride=stride).ratio
    assert ratio == pytest.approx(expected, abs=0.01 if expected < 2 else 0.05)


def test_a_window_turned_on_its_side_saves_as_much():
    flat = planned_vgg(64, size=(8, 24), stride=(6, 10))
    tall = planned_vgg(64, size=(24, 8), stride=(10, 6))
    assert (flat.ratio, flat.grid) == (tall.ratio, tall.grid[::-1])
    assert flat.ratio < planned_vgg(64, size=8, stride=(6, 10)).ratio
    shapes = [[step.shape[1:3] for step in plan.steps] for plan in (flat, tall)]
    assert shapes[0] == [shape[::-1] for shape in shapes[1]]


def test_linear_layers_are_taken_for_all_windows_at_once():
    plan = planned_vgg(224, size=32, stride=14)
    tail = [step.operation.name for step in plan.steps[plan.tail :]]
    assert tail.count('dot_general') == 3
    assert 'conv_general_dilated' not in tail


def test_attention_leaves_nothing_to_save():
    plan = incremental.planned(any_network.bound('attention'), (32, 32, 3), size=8, stride=4)
    assert plan.ratio == pytest.approx(1, abs=0.35)
    wider = incremental.planned(any_network.bound('attention'), (32, 32, 3), size=30, stride=1)
    assert engine.choose('auto', wider, 1) == 'full'


def test_an_operation_without_a_rule_is_computed_whole(monkeypatch):
    """And with one more entry in the table it is not."""
    fn, images, geometry = (
        any_network.bound('vgg'),
        random_images(1, (24, 24)),
        dict(size=6, stride=5),
    )
    with_rule = incremental.flop_ratio(fn, (24, 24, 3), **geometry)
    expected = jax.jit(lambda x: occlusion.occluded_logits(fn, x, **geometry))(images)
    for name in ('custom_jvp_call', 'reduce_window_max'):
        rule = rules.RULES[name]
        monkeypatch.delitem(rules.RULES, name)
        assert incremental.flop_ratio(fn, (24, 24, 3), **geometry) < with_rule
        actual = jax.jit(lambda x: incremental.occluded_logits(fn, x, **geometry))(images)
        assert_equal(actual, expected)
        monkeypatch.setitem(rules.RULES, name, rule)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(random_network(), st.floats(0.05, 1))
def test_regions_stay_inside_and_hold_what_changes(network, threshold):
    layers, _, image_shape, geometry, _ = network
    hypothesis.assume(fits(layers, image_shape))
    fn = functools.partial(apply, layers, 0)
    plan = incremental.planned(fn, (*image_shape, 3), **geometry, threshold=threshold)
    exact = incremental.planned(fn, (*image_shape, 3), **geometry)
    assert plan.ratio >= exact.ratio * 0.999
    for step in plan.steps:
        for read in step.reads:
            if read.pads is not None:
                padded = [n + sum(p) for n, p in zip(np.shape(read.source), read.pads, strict=True)]
                assert (read.first >= 0).all()
                assert (read.first + read.extent <= padded).all()


# --- Approximate maps. ----------------------------------------------------------------------------

SMALL = dict(size=7, stride=3)


@functools.cache
def small_logits(**knobs):
    fn, make = NETWORKS['vgg']
    images = random_images(2, (24, 28))
    return np.asarray(incremental_logits(make(0), images, fn=fn, **SMALL, **knobs))


def test_one_is_exact_bit_for_bit():
    np.testing.assert_array_equal(small_logits(threshold=1.0, every=1), small_logits())


def test_agreement_and_arithmetic_grow_with_the_threshold():
    errors = [
        np.abs(small_logits(threshold=share) - small_logits()).mean() for share in (0.2, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0 == errors[-1]
    ratios = [planned_vgg(224, size=32, stride=14, threshold=t).ratio for t in (0.2, 0.4, 0.7, 1.0)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 2 * ratios[-1]


@pytest.mark.parametrize(
    ('threshold', 'every', 'name'),
    [(0.0, 1, 'threshold'), (1.1, 1, 'threshold'), (0.5, 0, 'every')],
)
def test_refuses_knobs_out_of_range(threshold, every, name):
    with pytest.raises(ValueError, match=name):
        incremental.occluded_logits(
            any_network.bound('vgg'),
            random_images(1, (20, 20)),
            **SMALL,
            threshold=threshold,
            every=every,
        )


def test_computed_cells_are_exact():
    actual, expected = small_logits(every=3), small_logits()
    rows, columns = [0, 3, 5], [0, 3, 6]
    assert actual.shape == expected.shape
    expected = expected[:, rows][:, :, columns]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual[:, rows][:, :, columns], expected, atol=1e-5 * scale)


@pytest.mark.parametrize(('count', 'every'), [(14, 2), (14, 3), (9, 4), (2, 5), (1, 2), (5, 1)])
def test_interpolation_keeps_cubics(count, every):
    knots = sorted({*range(0, count, every), count - 1})
    weights = incremental._weights(count, knots)
    np.testing.assert_allclose(weights[knots], np.eye(len(knots)))
    for degree in range(min(4, len(knots))):
        values = (np.arange(count) / count) ** degree
        np.testing.assert_allclose(weights @ values[knots], values, atol=1e-5)


def test_every_second_window_is_a_quarter_of_the_arithmetic():
    one, two = (planned_vgg(224, size=32, stride=14, every=n).ratio for n in (1, 2))
    # Of fourteen cells a side, eight: 0, 2, ..., 12 and 13.
    # A little less still, as the regions of fewer windows are less wide.
    assert 1 <= two / one / (14 / 8) ** 2 < 1.1


# --- Choosing, and forms. -------------------------------------------------------------------------


def test_what_calls_the_host_runs_in_full():
    images, geometry = random_images(1, (24, 24)), dict(size=4, stride=4)

    def logits_fn(images):
        x = jax.nn.relu(any_network.conv(images, np.ones((3, 3, 3, 2), np.float32)))
        shape = jax.ShapeDtypeStruct((len(images), 2), np.float32)
        return jax.pure_callback(lambda x: np.float32(x).sum((1, 2)), shape, x)

    plan = incremental.planned(logits_fn, (24, 24, 3), **geometry)
    assert engine.choose('auto', plan, 1) == 'full'
    expected = occlusion.occluded_logits(logits_fn, images, **geometry)
    np.testing.assert_array_equal(engine.occluded_logits(logits_fn, images, **geometry), expected)


def test_a_call_of_the_host_is_seen_wherever_it_is():
    shape = jax.ShapeDtypeStruct((), np.float32)

    @jax.custom_vjp
    def foreign(x):
        return jax.pure_callback(np.sum, shape, x)

    foreign.defvjp(lambda x: (foreign(x), x), lambda x, g: (g * jnp.ones_like(x),))

    def logits_fn(call_fn, x):
        return jnp.stack([x.sum((1, 2, 3)), call_fn(x) + 0 * x[:, 0, 0, 0]], axis=-1)

    def in_a_loop(x):
        return jax.lax.scan(lambda total, y: (total + foreign(y), None), 0.0, x)[0]

    for call_fn in (jnp.sum, foreign, jax.jit(foreign), in_a_loop):
        fn = functools.partial(logits_fn, call_fn)
        plan = incremental.planned(fn, (8, 8, 3), size=4, stride=4)
        assert plan.calls_host == (call_fn is not jnp.sum)


def test_what_takes_no_single_image_runs_in_full():
    def logits_fn(images):
        assert len(images) == 4
        return images.mean((1, 2))

    images, settings = random_images(1, (8, 8)), dict(size=4, stride=4, grid='floor', chunk_size=4)
    assert engine.occluded_logits(logits_fn, images, **settings).shape == (1, 2, 2, 3)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match='Expected engine'):
        engine.occluded_logits(
            any_network.bound('vgg'), random_images(1, (20, 20)), **SMALL, engine='fast'
        )


@pytest.mark.parametrize('name', NETWORKS)
def test_accelerate_changes_nothing(name):
    fn, make = NETWORKS[name]
    weights, images = make(0), random_images(3, (32, 28))

    def loss(fn, weights, images):
        logits = fn(weights, images)
        return (jnp.sin(3 * logits) * jnp.arange(1, 6)).sum(), logits

    plain, fast = (
        jax.jit(jax.grad(functools.partial(loss, f), argnums=(0, 1), has_aux=True))(weights, images)
        for f in (fn, convolution.accelerate(fn))
    )
    for expected, actual in zip(*map(jax.tree.leaves, (plain, fast)), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5 * scale + 1e-7)


@pytest.mark.parametrize(('size', 'stride'), [(2, 2), (3, 2)])
def test_where_maxima_tie_the_gradient_is_one_pixel_s(size, stride):
    """As in XLA's pool and PyTorch's; the maximum of slices would divide it among them."""
    images = np.round(2 * random_images(2, (9, 8)))
    weights = random_images(2, (9, 8), seed=1)[
        :, : (9 - size) // stride + 1, : (8 - size) // stride + 1
    ]

    def loss(pool, images):
        return (weights * pool(images)).sum()

    def pool(images):
        return any_network.pool(images, size, stride)

    plain, fast = (
        jax.jit(jax.grad(functools.partial(loss, f)))(images)
        for f in (pool, convolution.accelerate(pool))
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-6)


def test_forms_are_counted():
    shape = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    found = convolution.forms(tracing.trace(any_network.bound('mobilenet'), shape).operations)
    expected = {'1x1, a matrix product': 2, 'depthwise, shifted products': 1, "XLA's own": 1}
    assert found == expected
    found = convolution.forms(tracing.trace(any_network.bound('wide vgg'), shape).operations)
    assert found == {'3x3, Winograd where wide': 2, 'a pool of slices': 2}


@pytest.mark.parametrize('side', [1, 3, 5])
def test_sums_in_a_wider_type_stay_in_it(side):
    """A convolution of bfloat16 that is asked for float32, as Flax NNX can."""
    kernel = jnp.asarray(random_images(side, (side, 40)).reshape(side, side, 3, 40), jnp.bfloat16)

    def logits_fn(images):
        x = jax.lax.conv_general_dilated(
            images.astype(jnp.bfloat16),
            kernel,
            (1, 1),
            'SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            preferred_element_type=jnp.float32,
        )
        return jnp.tanh(x / 3.0).mean((1, 2))

    images = random_images(2, (12, 12))
    assert convolution.accelerate(logits_fn)(images).dtype == jnp.float32
    settings = dict(size=4, stride=4)
    expected = occlusion.occluded_logits(logits_fn, images, **settings)
    for name in ('full', 'incremental'):
        found = engine.occluded_logits(logits_fn, images, engine=name, **settings)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('side', [1, 3, 5])
def test_a_precision_that_is_asked_for_is_kept_where_there_are_several(side):
    kernel = jnp.ones((side, side, 3, 40))

    def loss(precision, images):
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), 'SAME', dimension_numbers=numbers, precision=precision
        ).sum()

    def asked(precision):
        fn = convolution.accelerate(functools.partial(loss, precision))
        program = jax.jit(jax.grad(fn)).trace(jnp.ones((1, 8, 8, 3)))
        text = program.lower(lowering_platforms=('tpu',)).as_text()
        return [line for line in text.splitlines() if 'stablehlo.convolution' in line]

    assert asked('highest') and all('HIGHEST' in line for line in asked('highest'))
    assert asked(None) and not any('HIGHEST' in line for line in asked(None))


def test_an_accelerated_function_is_looked_into_too():
    fn, shape = any_network.bound('wide vgg'), (32, 32, 3)
    ratios = [
        incremental.flop_ratio(each, shape, size=8, stride=8)
        for each in (fn, convolution.accelerate(fn), convolution.accelerate(jax.jit(fn)))
    ]
    assert ratios[0] > 1.2
    assert ratios[1:] == ratios[:1] * 2
    checked = checks.logits_fn(convolution.accelerate(fn), np.array([0]))
    assert incremental.flop_ratio(checked, shape, size=8, stride=8) == ratios[0]


@pytest.mark.parametrize('name', ['auto', 'full', 'incremental'])
def test_exact_engines_refuse_what_makes_maps_approximate(name):
    fn, images = any_network.bound('vgg'), random_images(1, (20, 20))
    for knob in (dict(threshold=0.5), dict(every=2)):
        with pytest.raises(ValueError, match=f"expected engine 'approximate', got '{name}'"):
            engine.occluded_logits(fn, images, **SMALL, engine=name, **knob)


def test_accelerate_keeps_the_tree():
    found = convolution.accelerate(lambda a, b: {'x': (a + 1, 2.0), 'y': b['z']})(
        jnp.ones(2), {'z': jnp.zeros(3)}
    )
    assert jax.tree.map(np.shape, found) == {'x': ((2,), ()), 'y': (3,)}


def test_a_program_holds_only_what_depends_on_its_arguments():
    weights = jnp.ones((3, 2))

    def fn(x):
        unused = x**3
        del unused
        return jax.jit(lambda x: x @ jnp.exp(weights))(x)

    program = tracing.trace(fn, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert [operation.name for operation in program.operations] == ['dot_general']
    (found,) = tracing.evaluate(program, jnp.ones((4, 3)))
    np.testing.assert_allclose(found, np.full((4, 2), 3 * np.e), rtol=1e-6)


def test_refuses():
    fn, images = any_network.bound('vgg'), random_images(1, (8, 8))
    with pytest.raises(ValueError, match=r'Expected images \[B, H, W, C\]'):
        incremental.occluded_logits(fn, images[0], size=3, stride=2)
    with pytest.raises(ValueError, match='Expected 1 integer classes'):
        incremental.heatmaps(fn, images, np.array([0, 1]), size=3, stride=2)
    with pytest.raises(ValueError, match='exceeds the image side'):
        incremental.flop_ratio(fn, (8, 8, 3), size=9, stride=2)


@pytest.mark.parametrize('fill', [0.5, 'mean'])
@pytest.mark.parametrize('form', ['windows', 'images'])
def test_memory_does_not_grow_with_the_images(form, fill):
    """Beyond what they and their maps take: unoccluded values are made for a few at a time."""
    logits_fn = any_network.bound('wide vgg')

    def temporaries(count):
        images = jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.float32)

        @jax.jit
        def maps(images):
            plan = incremental.plan(logits_fn, images.shape[1:], size=8, stride=8)
            settings = dict(size=8, fill=fill, chunk_size=4, progress=None)
            return incremental.evaluate(plan, images, **settings, form=form)

        return maps.lower(images).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32) < 1.1 * temporaries(8)


@pytest.mark.parametrize('name', ['resnet', 'squeeze and excite', 'crops', 'attention'])
@pytest.mark.parametrize('count', [1, 5])
def test_images_at_once_are_windows_at_once(name, count):
    """Whichever of the two is computed at once, in groups that leave a rest."""
    images = jax.random.uniform(jax.random.key(0), (count, 24, 24, 3))
    told = []
    plan = incremental.plan(any_network.bound(name), (24, 24, 3), size=8, stride=5)
    settings = dict(size=8, fill='blur', chunk_size=2)
    found, expected = (
        incremental.evaluate(
            plan, images, **settings, form=form, progress=lambda *done: told.append(done)
        )
        for form in ('images', 'windows')
    )
    jax.effects_barrier()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    everything = count * len(plan.origins)
    assert {total for _, total in told} == {everything}
    assert [done for done, _ in told].count(everything) >= 2


def test_a_tpu_takes_several_images_at_once_and_others_windows():
    found = {}
    for platform in ('cpu', 'gpu', 'tpu'):
        with occlusion.compiling_for(platform):
            found[platform] = [incremental.loop_of(count) for count in (1, 8)]
    assert found == dict(cpu=['windows'] * 2, gpu=['windows'] * 2, tpu=['windows', 'images'])


def test_a_fault_of_planning_is_no_slower_map(monkeypatch):
    """What a function raises of one image makes it run in full, what we raise is raised."""

    def of_several(images):
        if len(images) == 1:
            raise IndexError('of the function')
        return images.mean((1, 2))

    images, settings = np.zeros((2, 8, 8, 3), np.float32), dict(size=4, stride=4)
    assert engine.occluded_logits(of_several, images, **settings).shape == (2, 1, 1, 3)

    def broken(operation):
        raise IndexError('of a rule')

    for owner, name in ((tracing, '_walk'), (incremental, '_region')):
        with monkeypatch.context() as patch, pytest.raises(IndexError, match='of a rule'):
            patch.setattr(owner, name, lambda *_, **__: broken(None))
            engine.occluded_logits(any_network.bound('vgg'), images, **settings)


@pytest.mark.parametrize(
    'local_fn',
    [
        lambda x: jnp.stack([x[..., i] / (i + 1) for i in range(3)], -1),
        lambda x: sum(jnp.unstack(x, axis=-1))[..., None] * x,
        lambda x: jnp.tile(x, (1, 1, 1, 2))[..., 1:4],
        lambda x: jnp.sort(x, axis=-1),
        lambda x: x[..., jnp.array([2, 0, 0])],
        lambda x: jnp.take(x, jnp.array([2, 1, 0]), axis=-1),
        lambda x: jax.lax.dynamic_slice(x, (0, 0, 0, 1), (*x.shape[:3], 1)) * x,
        lambda x: jax.lax.dynamic_update_slice(x, x[..., :1] * 2, (0, 0, 0, 1)),
        lambda x: x.at[..., 0].set(x[..., 1]),
        lambda x: x.at[..., 1].add(x[..., 2]),
        lambda x: jax.lax.top_k(x, 3)[0],
    ],
)
def test_what_moves_no_pixel_keeps_the_saving(local_fn):
    network, settings = any_network.bound('channels first'), dict(size=8, stride=8)
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    ratios = [
        incremental.flop_ratio(fn, (32, 32, 3), **settings)
        for fn in (network, lambda x: network(local_fn(x)))
    ]
    np.testing.assert_allclose(*ratios, rtol=0.01)
    found, expected = (
        module.occluded_logits(lambda x: network(local_fn(x)), images, **settings)
        for module in (incremental, occlusion)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_an_explanation_adds_up_to_the_ratio():
    init = functools.partial(vgg.init, image_size=64)
    weights, settings = jax.eval_shape(init, jax.random.key(0)), dict(size=8, stride=8)
    table = incremental.explain(vgg.logits, (64, 64, 3), weights, **settings)
    full = sum(row.multiplications for row in table.rows)
    window = sum(row.multiplications * row.share for row in table.rows)
    ratio = incremental.flop_ratio(vgg.logits, (64, 64, 3), weights, **settings)
    assert full / window == pytest.approx(ratio)
    assert max(map(len, str(table).splitlines())) <= 100


@pytest.mark.parametrize(
    ('local_fn', 'name'),
    [(lambda x: jnp.fft.fft2(x, axes=(1, 2)).real, 'fft'), (lambda x: x, 'reduce_sum')],
)
def test_an_explanation_names_what_ends_the_saving(local_fn, name):
    def logits_fn(images):
        return jnp.tanh(local_fn(jnp.sin(images))).sum((1, 2))

    table = incremental.explain(logits_fn, (32, 32, 3), size=8, stride=8)
    assert str(table).splitlines()[-1].startswith(f'{name} is the first that is computed whole')
