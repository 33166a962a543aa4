"""Laws of the approximate maps and of the measures of their quality."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

from occjax import approximate, incremental, occlusion, vgg

PLAN = (4, 'M', 6, 6, 'M', 8, 8)
IMAGE_SHAPE = (24, 28)
GEOMETRY = dict(size=7, stride=3, plan=PLAN)
NETWORK = dict(num_classes=5, hidden=16)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)

# Almost all of these tests' time is compilation, so little is asked of it.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def setup():
    variables = vgg.init(jax.random.key(0), image_size=IMAGE_SHAPE, plan=PLAN, **NETWORK)
    images = np.random.default_rng(0).uniform(size=(2, *IMAGE_SHAPE, 3)).astype(np.float32)
    return variables, images


def logits(engine, **options):
    variables, images = setup()
    return jit(functools.partial(engine.occluded_logits, **GEOMETRY, **options))(variables, images)


@functools.cache
def exact_logits():
    return np.asarray(logits(incremental))


class ThresholdTest(parameterized.TestCase):
    def test_one_is_exact_bit_for_bit(self):
        np.testing.assert_array_equal(logits(approximate, threshold=1.0), exact_logits())

    @pytest.mark.slow
    def test_agreement_grows_with_the_threshold(self):
        errors = [
            np.abs(logits(approximate, threshold=threshold) - exact_logits()).mean()
            for threshold in (0.2, 0.5, 1.0)
        ]
        self.assertEqual(errors, sorted(errors, reverse=True))
        self.assertGreater(errors[0], 0)
        self.assertEqual(errors[-1], 0)

    def test_arithmetic_grows_with_the_threshold(self):
        geometry = dict(size=32, stride=14)
        ratios = [
            approximate.flop_ratio((224, 224), **geometry, threshold=threshold)
            for threshold in THRESHOLDS
        ]
        self.assertEqual(ratios, sorted(ratios, reverse=True))
        self.assertGreater(ratios[0], 2 * ratios[-1])
        self.assertEqual(ratios[-1], incremental.flop_ratio((224, 224), **geometry))

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @hypothesis.given(
        st.sampled_from([PLAN, ('M', 2, 'M', 2, 2), (2, 2, 2, 'M', 'M', 2), vgg.VGG11]),
        st.tuples(st.integers(32, 45), st.integers(32, 45)),
        st.integers(1, 32),
        st.integers(1, 9),
        st.floats(0.01, 1),
    )
    def test_patches(self, plan, image_shape, size, stride, threshold):
        """They stay inside, hold the occluder's centre and what the layer before changed."""
        origins = occlusion.window_origins(image_shape, size=size, stride=stride, grid='floor')
        regions = incremental.patches_at(
            image_shape, origins, size=size, plan=plan, threshold=threshold
        )
        sides, centre = np.array(image_shape), origins + size // 2
        for layer, before, after in zip(plan, regions, regions[1:], strict=False):
            if layer == 'M':
                sides, centre = sides // 2, centre // 2
                # A pool drops the last row of an odd side.
                centre = np.minimum(centre, sides - 1)
                continue
            first, stop = after.start, after.start + after.shape
            self.assertTrue((first >= 0).all() and (stop <= sides).all())
            self.assertTrue((first <= centre).all() and (centre < stop).all())
            # A paste that does not fit would be moved, silently.
            self.assertTrue((first - 1 <= before.start).all())
            self.assertTrue((before.start + before.shape <= stop + 1).all())
            # It grows alike on both sides, where no edge is in the way.
            inside = ((first > 0) & (stop < sides)).all(axis=-1)
            left, right = before.start - first, stop - before.start - before.shape
            self.assertTrue((abs(left - right) <= 1)[inside].all())
            limit = np.maximum(np.floor(threshold * sides), before.shape)
            self.assertTrue((after.shape <= limit).all())

    @parameterized.parameters((0.0, 1, 'threshold'), (1.1, 1, 'threshold'), (0.5, 0, 'every'))
    def test_refuses(self, threshold, every, message):
        variables, images = setup()
        with self.assertRaisesRegex(ValueError, message):
            approximate.occluded_logits(
                variables, images, **GEOMETRY, threshold=threshold, every=every
            )


class EveryTest(parameterized.TestCase):
    def test_computed_cells_are_exact(self):
        actual = logits(approximate, every=3)
        self.assertEqual(actual.shape, exact_logits().shape)
        rows, columns = [0, 3, 5], [0, 3, 6]
        self.assertEqual(actual.shape[1:3], (6, 7))
        expected = exact_logits()[:, rows][:, :, columns]
        np.testing.assert_allclose(
            actual[:, rows][:, :, columns], expected, atol=1e-5 * np.abs(expected).max()
        )

    @parameterized.parameters((14, 2), (14, 3), (9, 4), (2, 5), (1, 2), (5, 1))
    def test_interpolation_keeps_cubics(self, count, every):
        knots = approximate._knots(count, every)
        weights = approximate._weights(count, knots)
        np.testing.assert_allclose(weights[knots], np.eye(len(knots)))
        for degree in range(min(4, len(knots))):
            values = (np.arange(count) / count) ** degree
            np.testing.assert_allclose(weights @ values[knots], values, atol=1e-5)

    def test_arithmetic(self):
        geometry = dict(size=32, stride=14)
        one, two = (approximate.flop_ratio((224, 224), **geometry, every=n) for n in (1, 2))
        # Of fourteen cells a side, eight: 0, 2, ..., 12 and 13.
        self.assertAlmostEqual(two / one, (14 / 8) ** 2, places=5)


class MapTest(parameterized.TestCase):
    def test_heatmaps_are_probabilities_of_the_logits(self):
        variables, images = setup()
        options = dict(**GEOMETRY, threshold=0.5, every=2)
        classes = np.array([1, 3])
        actual = jit(functools.partial(approximate.heatmaps, **options))(variables, images, classes)
        expected = jax.nn.softmax(logits(approximate, threshold=0.5, every=2))
        expected = np.stack([expected[0, ..., 1], expected[1, ..., 3]])
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    def test_gradients_are_finite(self):
        variables, images = setup()

        def mean_of_maps(images):
            options = dict(**GEOMETRY, threshold=0.5, every=2)
            return approximate.heatmaps(variables, images, np.array([1, 3]), **options).mean()

        gradient = jit(jax.grad(mean_of_maps))(images)
        self.assertTrue(np.isfinite(gradient).all())
        self.assertGreater(np.abs(gradient).max(), 0)


def random_maps(count=3, shape=(9, 12)):
    return np.random.default_rng(count).uniform(size=(count, *shape))


class MeasureTest(parameterized.TestCase):
    @parameterized.parameters(3, 5, 7)
    def test_ssim_is_scikit_images(self, window):
        metrics = pytest.importorskip('skimage.metrics')
        first = random_maps()
        second = np.clip(first + 0.3 * random_maps(3)[:, ::-1] - 0.15, 0, 1)
        expected = [
            metrics.structural_similarity(a, b, win_size=window, data_range=1.0)
            for a, b in zip(first, second, strict=True)
        ]
        np.testing.assert_allclose(approximate.ssim(first, second, window=window), expected)

    def test_ssim_in_closed_form(self):
        """Of constants only the luminance differs; of a map with its negative, only the sign."""
        constants = np.full((1, 7, 7), 0.2), np.full((1, 7, 7), 0.6)
        expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
        np.testing.assert_allclose(approximate.ssim(*constants), [expected])
        board = np.where(np.indices((4, 4)).sum(axis=0) % 2, 0.75, 0.25)[None]
        # One window of 3x3 has five of one and four of the other: its mean moves, so no 1.
        self.assertLess(approximate.ssim(board, 1 - board)[0], -0.9)

    @parameterized.parameters(((4, 4),), ((2, 9),), ((1, 1),))
    def test_ssim_of_small_maps(self, shape):
        maps = random_maps(2, shape)
        np.testing.assert_allclose(approximate.ssim(maps, maps), [1, 1])

    def test_ssim_refuses(self):
        with self.assertRaisesRegex(ValueError, r'Expected two arrays \[M, h, w\]'):
            approximate.ssim(random_maps()[0], random_maps()[0])

    def test_spearman_is_scipys(self):
        stats = pytest.importorskip('scipy.stats')
        first, second = random_maps().round(1), random_maps(4)[:3]
        expected = [
            stats.spearmanr(a.ravel(), b.ravel()).statistic
            for a, b in zip(first, second, strict=True)
        ]
        np.testing.assert_allclose(approximate.spearman(first, second), expected)

    def test_spearman_sees_order_alone(self):
        maps = random_maps()
        np.testing.assert_allclose(approximate.spearman(maps, maps**3), [1, 1, 1])
        np.testing.assert_allclose(approximate.spearman(maps, -maps), [-1, -1, -1])
        self.assertTrue(np.isnan(approximate.spearman(maps, np.ones_like(maps))).all())
