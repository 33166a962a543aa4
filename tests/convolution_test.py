import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from occjax import convolution

# Channels on both sides of the rule that chooses the form.
NARROW, WIDE = 3, convolution._MIN_CHANNELS
SIDES = ((1, 1), (2, 2), (1, 4), (2, 5), (3, 3), (4, 4), (7, 5), (6, 9), (14, 14))
PADS = {'SAME': 1, 'VALID': 0}
CASES = tuple(
    (*side, channels, padding)
    for side in SIDES
    for channels in ((NARROW, WIDE), (WIDE, NARROW), (WIDE, WIDE + 1))
    for padding in PADS
    if padding == 'SAME' or min(side) > 2
)
_SAME_SIDES = tuple((*side, pad) for side in SIDES for pad in (0, 1, 2) if min(side) + 2 * pad > 2)

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


def sample(*shapes):
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


class ConvolutionTest(parameterized.TestCase):
    def assert_close(self, actual, expected, tolerance=1e-5):
        """Differs from `expected` by at most `tolerance` of its largest entry."""
        self.assertEqual(actual.shape, expected.shape)
        error = np.abs(np.asarray(actual, float) - expected).max() / np.abs(expected).max()
        self.assertLess(error, tolerance)

    @parameterized.parameters(*CASES)
    def test_equals_definition_with_gradients(self, h, w, channels, padding):
        images, kernel = sample((3, h, w, channels[0]), (3, 3, *channels))
        form = functools.partial(convolution.conv3x3, padding=padding)
        out, vjp = jax.vjp(jax.jit(form), images, kernel)
        self.assert_close(out, naive(images, kernel, PADS[padding]))
        (grads,) = sample(out.shape)
        for actual, expected in zip(
            vjp(grads), gradients(images, kernel, grads, PADS[padding]), strict=True
        ):
            self.assert_close(actual, expected)

    @parameterized.product(form=tuple(FORMS), shape=_SAME_SIDES)
    def test_form_equals_definition(self, form, shape):
        h, w, pad = shape
        images, kernel = sample((2, h, w, 5), (3, 3, 5, 4))
        self.assert_close(FORMS[form](images, kernel, pad), naive(images, kernel, pad))

    @parameterized.product(m=(2, 4), shape=_SAME_SIDES)
    def test_winograd_gradients(self, m, shape):
        h, w, pad = shape
        images, kernel = sample((2, h, w, 5), (3, 3, 5, 4))
        (grads,) = sample((2, h + 2 * pad - 2, w + 2 * pad - 2, 4))
        by_images, by_kernel = gradients(images, kernel, grads, pad)
        actual = convolution._winograd(grads, kernel, 2 - pad, m=m, transposed=True)
        self.assert_close(actual, by_images)
        actual = convolution._winograd_kernel_grad(images, grads, pad, m=m)
        self.assert_close(actual, by_kernel)

    @parameterized.product(tile_bytes=(1, 70_000, 150_000), padding=tuple(PADS))
    def test_chunks_do_not_change_result(self, tile_bytes, padding):
        """Seven images in chunks of 1, 2 and 4 or so: the last one is not full."""
        images, kernel = sample((7, 6, 5, WIDE), (3, 3, WIDE, WIDE))
        pad = PADS[padding]
        with self.enter_tile_bytes(tile_bytes):
            out = convolution._winograd(images, kernel, pad, m=2)
            (grads,) = sample(out.shape)
            # The kernel itself is small enough here for the chunk to follow `tile_bytes`.
            by_kernel = convolution._winograd_kernel_grad(images, grads, pad, m=2)
        self.assert_close(out, naive(images, kernel, pad))
        self.assert_close(by_kernel, gradients(images, kernel, grads, pad)[1])
