"""Laws of the incremental engine: it is the plain one at a fraction of the arithmetic."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

import occjax
from occjax import incremental, vgg

# Few channels, for XLA's convolution, and enough of them for the one by matrix products on CPU.
PLANS = [(4, 'M', 5, 'M'), (3, 4, 'M', 'M', 5), ('M', 3, 3, 3)]
WIDE = (4, 'M', 32, 32, 'M')
THIN_VGG11 = tuple(layer if layer == 'M' else layer // 64 for layer in vgg.VGG11)

# Almost all of these tests' time is compilation, so little is asked of it.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
OPTIONS = ('plan', 'size', 'stride', 'grid', 'chunk_size')


def random_variables(image_shape, plan, seed=0):
    """Variables in which no bias, offset or statistic is at its neutral value."""
    options = dict(image_size=image_shape, num_classes=5, hidden=16, plan=plan)
    variables = vgg.init(jax.random.key(seed), **options, mean=0.4, std=[0.2, 0.3, 0.5])
    rng = np.random.default_rng(seed)

    def moved(leaf):
        return leaf + rng.uniform(0.1, 0.5, size=leaf.shape) * (leaf.ndim == 1)

    return jax.tree.map(lambda leaf: moved(leaf).astype(np.float32), variables)


def random_images(count, image_shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(count, *image_shape, 3)).astype(np.float32)


@functools.partial(jit, static_argnames=OPTIONS)
def plain_logits(variables, images, fill, *, plan, **geometry):
    logits_fn = functools.partial(vgg.logits, variables, plan=plan)
    return occjax.occluded_logits(logits_fn, images, fill=fill, **geometry)


@functools.partial(jit, static_argnames=OPTIONS)
def incremental_logits(variables, images, fill, **options):
    return incremental.occluded_logits(variables, images, fill=fill, **options)


@st.composite
def settings(draw):
    """A geometry that leaves the grid a cell."""
    plan = draw(st.sampled_from(PLANS))
    smallest = 2 ** plan.count('M')
    image_shape = tuple(draw(st.integers(smallest, 21)) for _ in range(2))
    size = draw(st.integers(1, min(image_shape)))
    grid = draw(st.sampled_from(['paper', 'floor', 'cover']))
    hypothesis.assume(grid != 'paper' or size < min(image_shape))
    geometry = dict(size=size, stride=draw(st.integers(2, 9)), grid=grid)
    fill = draw(st.sampled_from(['value', 'channels', 'image']))
    return plan, image_shape, geometry, fill, draw(st.sampled_from([1, 3, None]))


class EnginesTest(parameterized.TestCase):
    @pytest.mark.slow
    @hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
    @hypothesis.given(settings())
    def test_agree(self, setting):
        plan, image_shape, geometry, fill, chunk_size = setting
        variables, images = random_variables(image_shape, plan), random_images(2, image_shape)
        fill = {
            'value': np.float32(0.5),
            'channels': np.array([0.1, 0.9, 0.4], np.float32),
            'image': random_images(2, image_shape, seed=1),
        }[fill]
        expected = plain_logits(variables, images, fill, plan=plan, **geometry)
        actual = incremental_logits(
            variables, images, fill, plan=plan, **geometry, chunk_size=chunk_size
        )
        self.assertEqual(actual.shape, expected.shape)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-5)

    @parameterized.parameters(1, 5, 11, 12, 13, 24, 100)
    def test_chunk_size_does_not_change_the_result(self, chunk_size):
        plan, image_shape, geometry = PLANS[0], (13, 16), dict(size=5, stride=3)
        variables, images = random_variables(image_shape, plan), random_images(2, image_shape)
        options = dict(plan=plan, **geometry)
        expected = incremental_logits(variables, images, 0.5, **options)
        actual = incremental_logits(variables, images, 0.5, **options, chunk_size=chunk_size)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    @parameterized.parameters((WIDE, (17, 20), 6), (THIN_VGG11, (40, 72), 9))
    def test_agree_on_more_layers(self, plan, image_shape, size):
        variables, images = random_variables(image_shape, plan), random_images(2, image_shape)
        options = dict(size=size, stride=5, plan=plan)
        expected = plain_logits(variables, images, 0.5, **options)
        actual = incremental_logits(variables, images, 0.5, **options)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-5)

    def test_heatmaps_are_the_plain_ones(self):
        plan, classes, geometry = PLANS[1], np.array([4, 1]), dict(size=6, stride=4, fill=0.2)
        variables, images = random_variables((17, 20), plan), random_images(2, (17, 20))
        logits_fn = functools.partial(vgg.logits, variables, plan=plan)
        expected = jit(lambda x: occjax.heatmaps(logits_fn, x, classes, **geometry))(images)
        actual = jit(lambda x: incremental.heatmaps(variables, x, classes, **geometry, plan=plan))(
            images
        )
        np.testing.assert_allclose(actual, expected, atol=1e-5)


class TransformTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.plan, self.classes = PLANS[0], np.array([2])
        self.variables = random_variables((12, 14), self.plan)
        self.image = random_images(1, (12, 14))
        self.geometry = dict(size=5, stride=3, chunk_size=4)

    def mean_of_map(self, image):
        options = dict(**self.geometry, plan=self.plan)
        return incremental.heatmaps(self.variables, image, self.classes, **options).mean()

    def plain_mean_of_map(self, image):
        logits_fn = functools.partial(vgg.logits, self.variables, plan=self.plan)
        return occjax.heatmaps(logits_fn, image, self.classes, **self.geometry).mean()

    def test_gradient_is_the_plain_forms(self):
        expected = jit(jax.grad(self.plain_mean_of_map))(self.image)
        actual = jit(jax.grad(self.mean_of_map))(self.image)
        scale = np.abs(expected).max()
        self.assertGreater(scale, 0)
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-4)

    def test_gradient_equals_finite_differences(self):
        gradient = jit(jax.grad(self.mean_of_map))(self.image)
        # Along the gradient, so that what is compared is far above rounding.
        direction = gradient / np.linalg.norm(gradient)
        at, step = jit(lambda t: self.mean_of_map(self.image + t * direction)), 3e-3
        numeric = (at(step) - at(-step)) / (2 * step)
        np.testing.assert_allclose(np.linalg.norm(gradient), numeric, rtol=0.02)

    def test_vmap_over_models(self):
        """Two networks at once, as an ensemble is explained."""
        both = [self.variables, random_variables((12, 14), self.plan, seed=1)]
        options = dict(**self.geometry, plan=self.plan)

        def one(variables):
            return incremental.occluded_logits(variables, self.image, **options)

        expected = np.stack([jit(one)(variables) for variables in both])
        actual = jit(jax.vmap(one))(jax.tree.map(lambda *leaves: np.stack(leaves), *both))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


class ArithmeticTest(parameterized.TestCase):
    @parameterized.parameters(
        (224, 32, 14, [34, 20, 13, 15, 10, 12, 9, 11]),
        (224, 16, 4, [18, 12, 8, 10, 8, 10, 8, 10]),
        (32, 15, 5, [17, 11, 8, 8, 4, 4, 2, 2]),
    )
    def test_widths(self, side, size, stride, expected):
        regions = incremental.patches((side, side), size=size, stride=stride)[1:]
        widths = [
            patch.shape for layer, patch in zip(vgg.VGG11, regions, strict=True) if layer != 'M'
        ]
        self.assertEqual(widths, [(width, width) for width in expected])

    @parameterized.parameters((224, 32, 14, 6.0), (224, 16, 4, 8.4), (32, 15, 5, 1.07))
    def test_flop_ratio(self, side, size, stride, expected):
        # The paper's ten classes; at 32 pixels §III-B's shorter head, which `summary` knows of.
        ratio = incremental.flop_ratio((side, side), size=size, stride=stride)
        self.assertAlmostEqual(ratio, expected, delta=0.01 if expected < 2 else 0.05)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @hypothesis.given(settings())
    def test_patches_stay_inside(self, setting):
        plan, image_shape, geometry, *_ = setting
        sides = np.array(image_shape)
        first, *rest = incremental.patches(image_shape, **geometry, plan=plan)
        self.assertEqual(first.shape, (geometry['size'],) * 2)
        for layer, patch in zip(plan, rest, strict=True):
            sides = sides // 2 if layer == 'M' else sides
            self.assertTrue((patch.start >= 0).all())
            self.assertTrue((patch.start + patch.shape <= sides).all())

    def test_refuses(self):
        variables, images = random_variables((8, 8), PLANS[0]), random_images(1, (8, 8))
        options = dict(size=3, stride=2, plan=PLANS[0])
        with self.assertRaisesRegex(ValueError, 'The plan has convolutions'):
            incremental.occluded_logits(variables, images, size=3, stride=2, plan=PLANS[1])
        with self.assertRaisesRegex(ValueError, r'Expected images \[B, H, W, C\]'):
            incremental.occluded_logits(variables, images[0], **options)
        with self.assertRaisesRegex(ValueError, 'Expected 1 integer classes'):
            incremental.heatmaps(variables, images, np.array([0, 1]), **options)
        with self.assertRaisesRegex(ValueError, 'exceeds the image side'):
            incremental.flop_ratio((8, 8), size=9, stride=2, plan=PLANS[0])
