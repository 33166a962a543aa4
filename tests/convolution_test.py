import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from occjax import convolution

# Channels on both sides of the rule that chooses the form.
NARROW, WIDE = 3, convolution._MIN_CHANNELS
PADS = {'SAME': 1, 'VALID': 0}
SHAPES = tuple(
    (h, w, pad)
    for h, w in ((1, 1), (2, 2), (1, 4), (6, 9))
    for pad in (0, 1, 2)
    if min(h, w) + 2 * pad > 2
)

FORMS = {
    'direct': convolution._direct,
    'columns': convolution._columns,
    'winograd2': functools.partial(convolution._winograd, m=2),
    'winograd4': functools.partial(convolution._winograd, m=4),
}


def naive(images, kernel, pad):
    """The definition, in float64: each output from its own window."""
    images = np.pad(np.asarray(images, float), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    n, h, w, _ = images.shape
    out = np.empty((n, h - 2, w - 2, kernel.shape[-1]))
    for y in range(h - 2):
        for x in range(w - 2):
            window = images[:, y : y + 3, x : x + 3]
            out[:, y, x] = np.einsum('nijc,ijco->no', window, np.asarray(kernel, float))
    return out


def gradients(images, kernel, grads, pad):
    """The gradients of `naive` with respect to both arguments, in float64."""
    turned = np.swapaxes(np.asarray(kernel)[::-1, ::-1], 2, 3)
    images = np.pad(np.asarray(images, float), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    _, h, w, _ = grads.shape
    windows = [[images[:, i : i + h, j : j + w] for j in range(3)] for i in range(3)]
    by_kernel = [[np.einsum('nhwc,nhwo->co', x, grads) for x in row] for row in windows]
    return naive(grads, turned, 2 - pad), np.asarray(by_kernel)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(form, images, kernel):
    """Returns the output and, pulling the output itself back, both gradients."""
    out, vjp = jax.vjp(form, images, kernel)
    return out, *vjp(out)


def sample(*shapes):
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


class ConvolutionTest(parameterized.TestCase):
    def assert_close(self, actual, expected, tolerance=1e-5):
        """Differs from `expected` by at most `tolerance` of its largest entry."""
        self.assertEqual(actual.shape, expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * abs(expected).max())

    @parameterized.product(
        side=((1, 1), (2, 2), (3, 4), (9, 5)),
        channels=((NARROW, WIDE), (WIDE, NARROW), (WIDE, WIDE + 1)),
        padding=tuple(PADS),
    )
    def test_equals_definition_with_gradients(self, side, channels, padding):
        if padding == 'VALID' and min(side) < 3:
            self.skipTest('No output.')
        images, kernel = sample((3, *side, channels[0]), (3, 3, *channels))
        form = functools.partial(convolution.conv3x3, padding=padding)
        out, *actual = both_ways(form, images, kernel)
        self.assert_close(out, naive(images, kernel, PADS[padding]))
        expected = gradients(images, kernel, np.asarray(out, float), PADS[padding])
        jax.tree.map(self.assert_close, tuple(actual), expected)

    @parameterized.parameters(255, 256, 300)
    def test_many_small_maps_equal_the_definition(self, count):
        """From some number of them on, 2x2 maps are one dense product."""
        images, kernel = sample((count, 2, 2, WIDE), (3, 3, WIDE, WIDE + 1))
        out, *actual = both_ways(convolution.conv3x3, images, kernel)
        self.assert_close(out, naive(images, kernel, 1))
        expected = gradients(images, kernel, np.asarray(out, float), 1)
        jax.tree.map(self.assert_close, tuple(actual), expected)

    @parameterized.product(form=tuple(FORMS), shape=SHAPES)
    def test_form_equals_definition(self, form, shape):
        h, w, pad = shape
        images, kernel = sample((2, h, w, 5), (3, 3, 5, 4))
        actual = jax.jit(FORMS[form], static_argnums=2)(images, kernel, pad)
        self.assert_close(actual, naive(images, kernel, pad))

    @parameterized.product(form=('columns', 'winograd2', 'winograd4'), shape=SHAPES)
    def test_form_gradients(self, form, shape):
        h, w, pad = shape
        images, kernel = sample((2, h, w, 5), (3, 3, 5, 4))
        (grads,) = sample((2, h + 2 * pad - 2, w + 2 * pad - 2, 4))
        by_images, by_kernel = gradients(images, kernel, grads, pad)
        kernel_grad = convolution._columns_kernel_grad
        if form != 'columns':
            m = int(form[-1])
            image_grad = functools.partial(convolution._winograd, pad=2 - pad, m=m, transposed=True)
            self.assert_close(jax.jit(image_grad)(grads, kernel), by_images)
            kernel_grad = functools.partial(convolution._winograd_kernel_grad, m=m)
        self.assert_close(jax.jit(kernel_grad, static_argnums=2)(images, grads, pad), by_kernel)

    @parameterized.product(tile_bytes=(1, 80_000, 150_000), padding=tuple(PADS))
    def test_chunks_do_not_change_result(self, tile_bytes, padding):
        """Seven images, some at a time: the last chunk is not full."""
        images, kernel = sample((7, 6, 5, WIDE), (3, 3, WIDE, WIDE))
        pad = PADS[padding]
        with mock.patch.object(convolution, '_TILE_BYTES', tile_bytes):
            # A function of its own: jit would remember one traced with another size.
            out = jax.jit(lambda *xs: convolution._winograd(*xs, pad, m=2))(images, kernel)
            (grads,) = sample(out.shape)
            form = jax.jit(lambda *xs: convolution._winograd_kernel_grad(*xs, pad, m=2))
            by_kernel = form(images, grads)
        self.assert_close(out, naive(images, kernel, pad))
        self.assert_close(by_kernel, gradients(images, kernel, grads, pad)[1])

    @parameterized.parameters(2, 3, 4)
    def test_wide_sums_stay_accurate(self, m):
        """Rounding grows with the channels; the customary points of F(4x4) fail here."""
        images, kernel = sample((1, 28, 28, 512), (3, 3, 512, 16))
        form = jax.jit(functools.partial(convolution._winograd, pad=1, m=m))
        self.assert_close(form(images, kernel), naive(images, kernel, 1), tolerance=8e-6)

    @parameterized.product(channels=(NARROW, WIDE), padding=tuple(PADS))
    def test_derivatives_of_any_order_and_mode_equal_xla_s(self, channels, padding):
        shapes = [(2, 4, 5, channels), (3, 3, channels, WIDE)]
        images, kernel, *directions = sample(*shapes, *shapes)

        def derivatives(form):
            def value(images, kernel):
                return jnp.sum(form(images, kernel) ** 3)

            first = jax.grad(value, (0, 1))

            def penalty(images, kernel):
                return sum(jnp.sum(g**2) for g in first(images, kernel))

            at = (images, kernel)
            second = jax.grad(penalty, (0, 1))
            return (
                jax.jvp(form, at, tuple(directions)),
                second(*at),
                jax.jvp(first, at, tuple(directions))[1],
                jax.jvp(second, at, tuple(directions))[1],
                jax.vmap(second)(*(jnp.stack([x, 2 * x]) for x in at)),
            )

        ours = functools.partial(convolution.conv3x3, padding=padding)
        expected = derivatives(lambda x, y: convolution._direct(x, y, PADS[padding]))
        jax.tree.map(self.assert_close, derivatives(ours), jax.tree.map(np.asarray, expected))

    @parameterized.parameters(NARROW, WIDE)
    def test_gradients_of_gradients_keep_the_fast_forms(self, channels):
        """However often it is differentiated, what remains is the convolution and its gradients."""
        images, kernel = sample((2, 4, 4, channels), (3, 3, channels, WIDE))

        def norm(images):
            return jnp.sum(jax.grad(lambda x: jnp.sum(convolution.conv3x3(x, kernel) ** 3))(images))

        found = {e.primitive.name for e in jax.make_jaxpr(jax.grad(norm))(images).eqns}
        self.assertIn('conv3x3', found)
        self.assertFalse(found & {'conv_general_dilated', 'dot_general', 'scan'})

    @parameterized.product(
        images=((0, 4, 5), (2, 4, 5)), channels=((NARROW, WIDE), (WIDE, WIDE), (0, WIDE), (WIDE, 0))
    )
    def test_nothing_in_is_nothing_out(self, images, channels):
        """Without images, inputs or outputs: zeros of the right shape, also of the gradients."""
        if images[0] and 0 not in channels:
            self.skipTest('There is something in.')
        images, kernel = sample((*images, channels[0]), (3, 3, *channels))
        for function in (both_ways, both_ways.__wrapped__):
            out, *grads = function(convolution.conv3x3, images, kernel)
            self.assertEqual(out.shape, (*images.shape[:3], channels[1]))
            self.assertFalse(out.any())
            self.assertEqual([g.shape for g in grads], [images.shape, kernel.shape])
            self.assertFalse(grads[1].any())

    @parameterized.parameters(
        ((0, None), NARROW), ((0, None), WIDE), ((None, 0), WIDE), ((0, 0), WIDE)
    )
    def test_vmap_equals_loop(self, axes, channels):
        """Also of the gradients, and the gradients of a vmap."""
        shapes = (2, 4, 5, channels), (3, 3, channels, WIDE)
        images, kernel = sample(
            *((*(() if axis is None else (3,)), *s) for s, axis in zip(shapes, axes, strict=True))
        )

        def value(images, kernel):
            return jnp.sum(convolution.conv3x3(images, kernel) ** 3)

        one = jax.jit(jax.value_and_grad(value, (0, 1)))
        each = [
            one(images if axes[0] is None else images[i], kernel if axes[1] is None else kernel[i])
            for i in range(3)
        ]
        expected = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        actual = jax.jit(jax.vmap(one, axes))(images, kernel)
        jax.tree.map(self.assert_close, actual, expected)
        summed = jax.jit(jax.grad(lambda *xs: jnp.sum(jax.vmap(value, axes)(*xs)), (0, 1)))
        for out, grads, axis in zip(summed(images, kernel), expected[1], axes, strict=True):
            self.assert_close(out, grads.sum(0) if axis is None else grads)

    def test_vmapped_images_are_one_batch(self):
        """A product of its own for each mapped image would cost a transposition."""
        images, kernel = sample((3, 2, 4, 4, WIDE), (3, 3, WIDE, WIDE))
        mapped = jax.jit(jax.vmap(lambda x: convolution.conv3x3(x, kernel)))
        # Sixteen products of 3 * 2 * 4 tiles.
        self.assertTrue('tensor<16x24x32xf32>' in mapped.lower(images).as_text())

    @parameterized.parameters(NARROW, WIDE)
    def test_bfloat16(self, channels):
        images, kernel = sample((2, 6, 6, channels), (3, 3, channels, WIDE))
        images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        found = both_ways(convolution.conv3x3, images, kernel)
        wide = np.asarray(found[0], float)
        expected = naive(images, kernel, 1), *gradients(images, kernel, wide, 1)
        for actual, wanted in zip(found, expected, strict=True):
            self.assertEqual(actual.dtype, jnp.bfloat16)
            self.assert_close(actual, wanted, tolerance=2**-8)

    def test_the_form_is_that_of_the_platform_that_a_program_is_for(self):
        """XLA's own convolutions on GPU and TPU, also in gradients and in bfloat16; none on CPU."""
        images, kernel = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))

        def loss(x, y):
            return (convolution.conv3x3(x, y) ** 2).sum().astype(jnp.float32)

        fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        for dtype in ('float32', 'bfloat16'):
            operands = images.astype(dtype), kernel.astype(dtype)
            for platform, count in (('cuda', 3), ('tpu', 3), ('cpu', 0)):
                text = jax.export.export(fn, platforms=[platform])(*operands).mlir_module()
                self.assertEqual(text.count('stablehlo.convolution('), count, platform)

    def test_other_platforms_compute_the_same(self):
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(2, 3, 6, 5, 40)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(2, 3, 3, 40, 33)), jnp.float32)
        for form, x, y in [
            ('forward', images, kernel),
            ('image_grad', jnp.ones((2, 3, 6, 5, 33)), kernel),
            ('kernel_grad', images, jnp.ones((2, 3, 6, 5, 33))),
        ]:
            here, there = (
                fn(x, y, form=form, pad=1, precision=None)
                for fn in (convolution._on_cpu, convolution._elsewhere)
            )
            self.assert_close(here, there)

    @parameterized.parameters(
        ((2, 6, 6, 3), (3, 3, 4, 5), 'SAME', 'got .*3.* and .*4'),
        ((2, 6, 6, 3), (5, 5, 3, 4), 'SAME', 'kernel'),
        ((2, 6, 6, 3), (3, 3, 3), 'SAME', 'kernel'),
        ((6, 6, 3), (3, 3, 3, 4), 'SAME', 'images'),
        ((2, 2, 6, 3), (3, 3, 3, 4), 'VALID', 'at least 3x3'),
        ((2, 6, 6, 3), (3, 3, 3, 4), 'FULL', "'FULL'"),
    )
    def test_refuses(self, images, kernel, padding, message):
        with self.assertRaisesRegex(ValueError, message):
            convolution.conv3x3(jnp.zeros(images), jnp.zeros(kernel), padding=padding)

    def test_integers_are_left_to_xla(self):
        rng = np.random.default_rng(0)
        images, kernel = (
            jnp.asarray(rng.integers(-99, 99, shape), jnp.int32)
            for shape in ((1, 8, 8, 64), (3, 3, 64, 64))
        )
        settings = dict(padding='SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        fn = functools.partial(
            jax.lax.conv_general_dilated, rhs=kernel, window_strides=(1, 1), **settings
        )
        np.testing.assert_array_equal(convolution.accelerate(fn)(images), fn(images))
        with self.assertRaisesRegex(ValueError, 'Expected floats, got int32 and int32'):
            convolution.conv3x3(images, kernel)


@pytest.mark.parametrize('depthwise', [False, True])
@pytest.mark.parametrize('tile_bytes', [1, 40_000])
def test_chunks_of_columns_are_xla_s_convolution(monkeypatch, depthwise, tile_bytes):
    """At any size of a chunk: values, gradients of both operands, under `vmap` of either."""
    monkeypatch.setattr(convolution, '_TILE_BYTES', tile_bytes)
    rng, groups = np.random.default_rng(0), 32 if depthwise else 1
    images = rng.normal(size=(5, 9, 8, 32)).astype(np.float32)
    kernel = rng.normal(size=(5, 3, 32 // groups, 32)).astype(np.float32) / 10

    def direct(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (2, 1),
            ((2, 1), (0, 2)),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )

    def sums(fn):
        return jax.grad(lambda x, y: jnp.sum(jnp.sin(fn(x, y))), argnums=(0, 1))

    def by_image(fn):
        return lambda x, y: jax.vmap(lambda one: fn(one[None], y)[0])(x)

    def by_kernel(fn):
        return lambda x, y: jax.vmap(lambda one: fn(x, one))(jnp.stack([y, -y]))

    for seen in (lambda fn: fn, sums, by_image, lambda fn: sums(by_image(fn)), by_kernel):
        found, expected = (
            jax.tree.leaves(jax.jit(seen(fn))(images, kernel))
            for fn in (convolution.accelerate(direct), direct)
        )
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


if __name__ == '__main__':
    absltest.main()
