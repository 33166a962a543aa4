"""Laws of the plain occlusion maps."""

import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

import occjax
from occjax import attribution, incremental, occlusion

WEIGHTS = np.random.default_rng(0).normal(size=(7 * 9 * 2, 5)).astype(np.float32)


def logits_fn(images):
    """A classifier in which every pixel matters, and not linearly."""
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS) * 2


def random_images(count, shape=(7, 9, 2)):
    return np.random.default_rng(count).uniform(size=(count, *shape)).astype(np.float32)


def naive_heatmaps(images, classes, *, size, stride, fill, rows, columns):
    """The paper's four steps as a loop over pixels (§III-C)."""
    maps = np.zeros((len(images), len(rows), len(columns)))
    for b, image in enumerate(images):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                covered = image.copy()
                covered[row : row + size[0], column : column + size[1]] = fill
                logits = np.asarray(logits_fn(covered[None]), np.float64)[0]
                odds = np.exp(logits - logits.max())
                maps[b, i, j] = (odds / odds.sum())[classes[b]]
    return maps


class GridTest(parameterized.TestCase):
    @parameterized.parameters(
        # side, size, stride, paper, floor, cover
        (32, 15, 5, 4, 4, 5),  # the paper's CIFAR-10 setting
        (224, 32, 14, 14, 14, 15),  # the paper's Imagenette setting
        (10, 2, 2, 4, 5, 5),  # stride divides side - size: the paper has one fewer
        (10, 2, 3, 3, 3, 4),
        (10, 9, 4, 1, 1, 2),
        (10, 10, 1, 0, 1, 1),  # as large as the image
        (10, 1, 20, 1, 1, 2),  # a stride beyond the image
    )
    def test_side(self, side, size, stride, *expected):
        for grid, count in zip(('paper', 'floor', 'cover'), expected, strict=True):
            geometry = dict(size=size, stride=stride, grid=grid)
            self.assertEqual(occjax.grid_shape((side, side), **geometry), (count, count), grid)

    def test_rectangle(self):
        self.assertEqual(occjax.grid_shape((7, 9), size=3, stride=2), (2, 3))

    @hypothesis.settings(deadline=None, derandomize=True)
    @hypothesis.given(*[st.tuples(st.integers(n, 12), st.integers(n, 12)) for n in (4, 1, 1)])
    def test_each_side_is_its_own(self, sides, size, stride):
        size = tuple(map(min, size, sides))
        for grid in ('paper', 'floor', 'cover'):
            squares = [
                occjax.grid_shape((side, side), size=n, stride=by, grid=grid)
                for side, n, by in zip(sides, size, stride, strict=True)
            ]
            expected = squares[0][0], squares[1][1]
            geometry = dict(size=size, stride=list(stride), grid=grid)
            self.assertEqual(occjax.grid_shape(sides, **geometry), expected)

    @parameterized.parameters('floor', 'cover')
    def test_windows_stay_inside_and_cover(self, grid):
        for side, size, stride in itertools.product(range(1, 13), range(1, 13), range(1, 5)):
            if size > side:
                continue
            origins = occlusion.window_origins((side, side), size=size, stride=stride, grid=grid)
            self.assertLessEqual(origins.max() + size, side)
            seen = np.zeros((side, side), bool)
            for row, column in origins:
                seen[row : row + size, column : column + size] = True
            if grid == 'cover' and stride <= size:
                self.assertTrue(seen.all(), (side, size, stride))

    @parameterized.parameters(
        (dict(size=(2, 10), stride=1), 'exceeds the image side 9'),
        (dict(size=8, stride=1), 'exceeds the image side 7'),
        (dict(size=2, stride=1, grid='full'), "'paper', 'floor' or 'cover'"),
    )
    def test_refuses(self, geometry, message):
        with self.assertRaisesRegex(ValueError, message):
            occjax.grid_shape((7, 9), **geometry)
        with self.assertRaisesRegex(ValueError, message):
            occjax.occluded_logits(logits_fn, random_images(1), **geometry)

    def test_refuses_a_grid_without_windows(self):
        with self.assertRaisesRegex(ValueError, 'no cell'):
            occjax.heatmaps(logits_fn, random_images(1), np.zeros(1, int), size=7, stride=1)


class HeatmapTest(parameterized.TestCase):
    @parameterized.parameters(
        ((3, 3), 2, 0.5, 'paper', [0, 2], [0, 2, 4]),
        ((3, 3), 2, 0.5, 'floor', [0, 2, 4], [0, 2, 4, 6]),
        ((4, 4), 2, [0.1, 0.9], 'cover', [0, 2, 3], [0, 2, 4, 5]),
        ((1, 1), 5, 0.0, 'paper', [0, 5], [0, 5]),
        ((3, 5), (4, 1), 0.5, 'paper', [0], [0, 1, 2, 3]),
        ((1, 6), (3, 2), 0.5, 'cover', [0, 3, 6], [0, 2, 3]),
        ((7, 2), (1, 4), [0.1, 0.9], 'floor', [0], [0, 4]),
    )
    def test_equals_a_naive_loop(self, size, stride, fill, grid, rows, columns):
        images, classes = random_images(3), np.array([4, 0, 2])
        expected = naive_heatmaps(
            images, classes, size=size, stride=stride, fill=fill, rows=rows, columns=columns
        )
        actual = occjax.heatmaps(
            logits_fn, images, classes, size=size, stride=stride, fill=np.array(fill), grid=grid
        )
        np.testing.assert_allclose(actual, expected, atol=1e-5)

    def test_transposed_images_under_transposed_windows_have_transposed_maps(self):
        images, classes, geometry = random_images(2), np.array([1, 3]), dict(size=(2, 5))
        maps = occjax.heatmaps(logits_fn, images, classes, stride=(3, 1), **geometry)
        turned = occjax.heatmaps(
            lambda x: logits_fn(x.swapaxes(1, 2)),
            images.swapaxes(1, 2),
            classes,
            size=(5, 2),
            stride=(1, 3),
        )
        self.assertEqual(maps.shape, (2, 2, 4))
        np.testing.assert_allclose(turned, maps.swapaxes(1, 2), atol=1e-6)

    def test_a_side_is_two_of_its_own(self):
        expected = occjax.heatmaps(logits_fn, random_images(1), np.zeros(1, int), size=3, stride=2)
        for sides in ((3, 3), [3, 3], np.array([3, 3])):
            geometry = dict(size=sides, stride=(2, 2))
            actual = occjax.heatmaps(logits_fn, random_images(1), np.zeros(1, int), **geometry)
            np.testing.assert_array_equal(actual, expected)

    @parameterized.parameters(1, 2, 5, 6, 17, 18, 100)
    def test_chunk_size_does_not_change_the_result(self, chunk_size):
        geometry = dict(size=3, stride=2)
        expected = occjax.occluded_logits(logits_fn, random_images(3), **geometry)
        actual = occjax.occluded_logits(
            logits_fn, random_images(3), **geometry, chunk_size=chunk_size
        )
        # Sums of 126 products of up to 2, in any order.
        np.testing.assert_allclose(actual, expected, atol=1e-5)

    def test_chunk_size_is_how_many_images_a_call_sees(self):
        jaxpr = jax.make_jaxpr(
            lambda x: occjax.occluded_logits(logits_fn, x, size=3, stride=2, chunk_size=4)
        )(random_images(3))
        scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
        self.assertLen(scans, 1)
        self.assertEqual(scans[0].params['length'], math.ceil(3 * 6 / 4))

    def test_batch_position_does_not_change_the_result(self):
        images = random_images(4)
        together = occjax.occluded_logits(logits_fn, images, size=3, stride=2)
        for b in (0, 3):
            alone = occjax.occluded_logits(logits_fn, images[b : b + 1], size=3, stride=2)
            np.testing.assert_allclose(together[b], alone[0], rtol=1e-5, atol=1e-6)

    def test_painting_what_is_there_changes_nothing(self):
        images, classes = random_images(3), np.array([1, 2, 3])
        maps = occjax.heatmaps(logits_fn, images, classes, size=3, stride=2, fill=images)
        unoccluded = jax.nn.softmax(logits_fn(images))[np.arange(3), classes]
        expected = np.broadcast_to(unoccluded[:, None, None], maps.shape)
        np.testing.assert_allclose(maps, expected, atol=1e-6)

    def test_a_window_as_large_as_the_image_gives_a_constant(self):
        images = random_images(3, (7, 7, 2))[:, :, :, :]
        weights = WEIGHTS[: 7 * 7 * 2]
        logits = occjax.occluded_logits(
            lambda x: x.reshape(len(x), -1) @ weights, images, size=7, stride=1, grid='floor'
        )
        self.assertEqual(logits.shape, (3, 1, 1, 5))
        np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-6)

    def test_rows_are_the_images_rows(self):
        """Readings A10: a classifier that looks at the top left pixel alone moves cell [0, 0]."""
        images = np.ones((1, 7, 9, 2), np.float32)

        def top_left(images):
            corner = images[:, 1, 3, 0]  # row 1 and column 3: the second window of the first row
            return jnp.stack([corner, 1 - corner], axis=-1)

        maps = occjax.heatmaps(top_left, images, np.zeros(1, int), size=2, stride=2, fill=0.0)
        darkest = np.unravel_index(np.argmin(maps[0]), maps[0].shape)
        self.assertEqual(darkest, (0, 1))

    def test_gradient_equals_finite_differences(self):
        image = random_images(1).astype(np.float32)
        direction = np.random.default_rng(1).normal(size=image.shape).astype(np.float32)

        def mean_of_map(step):
            maps = occjax.heatmaps(
                logits_fn, image + step * direction, np.array([1]), size=3, stride=2, chunk_size=4
            )
            return maps.mean()

        step = 1e-2
        numeric = (mean_of_map(step) - mean_of_map(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(mean_of_map)(0.0), numeric, rtol=0.02)

    @parameterized.parameters(([0, 1],), ([0.0],), ([[0]],))
    def test_refuses_other_classes(self, classes):
        with self.assertRaisesRegex(ValueError, 'Expected 1 integer classes'):
            occjax.heatmaps(logits_fn, random_images(1), np.array(classes), size=3, stride=2)

    @parameterized.parameters(((7, 9, 2),), ((0, 7, 9, 2),))
    def test_refuses_other_images(self, shape):
        with self.assertRaisesRegex(ValueError, r'Expected images \[B, H, W, C\]'):
            occjax.occluded_logits(logits_fn, np.zeros(shape, np.float32), size=3, stride=2)


IMAGES = random_images(4)
CLASSES = np.array([4, 0, 2, 1])
WINDOWS = dict(size=(3, 4), stride=2, grid='floor')  # three times three
KEY = jax.random.key(0)


def explain(name, images, classes=CLASSES, fn=logits_fn, **settings):
    """Returns maps of one form of them: each counts nine windows, masks or steps an image."""
    if name == 'rise':
        return attribution.rise(fn, images, classes, key=KEY, masks=9, cells=2, **settings)
    if name == 'deletion':
        return attribution.deletion(fn, images, classes, images[..., 0], steps=8, **settings).curve
    return occjax.heatmaps(fn, images, classes, engine=name, **WINDOWS, **settings)


class Told:
    """Remembers what a progress function is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, done, total):
        self.calls.append((done, total))

    def forget(self):
        jax.effects_barrier()
        calls, self.calls = self.calls, []
        return calls


class ProgressTest(parameterized.TestCase):
    @parameterized.product(
        name=['full', 'incremental', 'rise', 'deletion'], chunk_size=[1, 7, 12, 50, None]
    )
    def test_each_chunk_is_told_of_once(self, name, chunk_size):
        told, settings, size = Told(), dict(chunk_size=chunk_size), chunk_size or 36
        found = explain(name, IMAGES, progress=told, **settings)
        calls = told.forget()
        if name != 'incremental':  # Its chunks are alike where they can be.
            self.assertEqual(calls, [(min(n + size, 36), 36) for n in range(0, 36, size)])
        # It takes a few of the four images after others, each with its nine windows.
        few = incremental.images_at_once(4, 9, size, 'windows') if name == 'incremental' else 4
        self.assertLen(calls, 4 // few * math.ceil(9 * few / size))
        self.assertEqual(calls, sorted(set(calls)))
        self.assertEqual(calls[-1], (36, 36))
        np.testing.assert_allclose(found, explain(name, IMAGES, **settings), atol=1e-6)

    @parameterized.parameters('full', 'incremental', 'rise', 'deletion')
    def test_programs_without_it_are_without_it(self, name):
        told = Told()
        plain, telling = (
            str(jax.make_jaxpr(lambda x, p=p: explain(name, x, progress=p))(IMAGES))
            for p in (None, told)
        )
        self.assertNotIn('callback', plain)
        self.assertEqual(telling.count('debug_callback['), 1)
        self.assertEqual(told.forget(), [])

    @parameterized.parameters('full', 'incremental')
    @pytest.mark.usefixtures('four_devices')
    def test_compiled_differentiated_and_on_many_devices(self, name):
        told, each = Told(), (7, 14, 21, 28, 35, 36)
        if name == 'incremental':  # Of nine windows an image five and four.
            each = (5, 9, 14, 18, 23, 27, 32, 36)
        expected = [(n, 36) for n in each]

        def mapped(images, classes=CLASSES, size=7):
            return explain(name, images, classes, chunk_size=size, progress=told)

        compiled = jax.jit(mapped)
        for _ in range(2):
            compiled(IMAGES)
            self.assertEqual(told.forget(), expected)
        jax.jit(jax.grad(lambda x: mapped(x).sum()))(IMAGES)
        self.assertEqual(told.forget(), expected)
        mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
        compiled(jax.device_put(IMAGES, jax.NamedSharding(mesh, jax.P('data'))))
        self.assertEqual(told.forget(), expected)
        each_fn = jax.shard_map(
            lambda x, y: mapped(x, y, size=3),
            mesh=mesh,
            in_specs=jax.P('data'),
            out_specs=jax.P('data'),
            check_vma=False,
        )
        jax.jit(each_fn)(IMAGES, CLASSES)
        self.assertCountEqual(told.forget(), 4 * [(3, 9), (6, 9), (9, 9)])

    @parameterized.parameters('full', 'rise')
    def test_nothing_is_told_of_before_it_is_done(self, name):
        seen, early = [], []

        def host(images):
            seen.append(len(images))
            return np.asarray(images).mean((1, 2))

        def foreign(images):
            shape = jax.ShapeDtypeStruct((len(images), 2), np.float32)
            return jax.pure_callback(host, shape, images)

        def progress(done, total):
            early.append(done > sum(seen))

        classes = np.zeros(4, int)
        jax.jit(lambda x: explain(name, x, classes, fn=foreign, chunk_size=5, progress=progress))(
            IMAGES
        )
        jax.effects_barrier()
        self.assertEqual(early, 8 * [False])

    def test_of_a_compiled_classifier(self):
        told, batch = Told(), jax.ShapeDtypeStruct((7, 7, 9, 2), jnp.float32)
        compiled = jax.jit(logits_fn).lower(batch).compile()
        explain('full', IMAGES, fn=compiled, chunk_size=7, progress=told)
        self.assertEqual(told.forget(), [(n, 36) for n in (7, 14, 21, 28, 35, 36)])

    def test_a_classifier_that_sees_no_window_is_done_all_the_same(self):
        told = Told()
        blind = dict(classes=CLASSES % 3, fn=lambda x: jnp.zeros((len(x), 3)))
        found = explain('incremental', IMAGES, progress=told, **blind)
        np.testing.assert_allclose(found, np.full((4, 3, 3), 1 / 3), rtol=1e-6)
        self.assertEqual(told.forget()[-1], (36, 36))
