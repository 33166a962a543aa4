"""The 3x3 convolution of stride 1, in the form that each backend and shape runs best."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def conv3x3(images: Array, kernel: Array, *, padding: str = 'SAME') -> Array:
    """Returns `images` [N, H, W, C] correlated with `kernel` [3, 3, C, O]: [N, H', W', O]."""
    if images.ndim != 4 or kernel.shape[:3] != (3, 3, images.shape[-1]) or kernel.ndim != 4:
        raise ValueError(
            f'Expected images [N, H, W, C] and a kernel [3, 3, C, O], '
            f'got {images.shape} and {kernel.shape}.'
        )
    if padding not in ('SAME', 'VALID'):
        raise ValueError(f"Expected padding 'SAME' or 'VALID', got {padding!r}.")
    return _conv(images, kernel, int(padding == 'SAME'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(images, kernel, pad):
    return _best(images, kernel, pad)


def _best(images, kernel, pad):
    _, h, w, c = images.shape
    if jax.default_backend() != 'cpu' or min(h, w) + 2 * pad < 3:
        return _direct(images, kernel, pad)
    if h * w <= 4:
        return _dense(images, kernel, pad)
    if c >= 128 and min(h, w) >= 4:
        return _winograd(images, kernel, pad)
    return _direct(images, kernel, pad)


def _forward(images, kernel, pad):
    return _best(images, kernel, pad), (images, kernel)


def _backward(pad, residuals, grads):
    images, kernel = residuals
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    _, kernel_vjp = jax.vjp(lambda k: _best(images, k, pad), kernel)
    return _best(grads, flipped, 2 - pad), *kernel_vjp(grads)


_conv.defvjp(_forward, _backward)


def _direct(images, kernel, pad):
    return lax.conv_general_dilated(
        images,
        kernel,
        (1, 1),
        [(pad, pad)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def _dense(images, kernel, pad):
    n, h, w, c = images.shape
    out_h, out_w, o = h + 2 * pad - 2, w + 2 * pad - 2, kernel.shape[-1]
    zero = jnp.zeros((c, o), kernel.dtype)

    def tap(i, j):
        return kernel[i, j] if 0 <= i < 3 and 0 <= j < 3 else zero

    rows = [
        [tap(a - p + pad, b - q + pad) for p in range(out_h) for q in range(out_w)]
        for a in range(h)
        for b in range(w)
    ]
    matrix = jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows])
    return (images.reshape(n, h * w * c) @ matrix).reshape(n, out_h, out_w, o)


def _transforms():
    root = 2**0.5
    points = (0, root, -root, root / 2, -root / 2)
    n = len(points) + 1
    a, b, g = np.zeros((n - 2, n)), np.zeros((n, n)), np.zeros((n, 3))
    for j, p in enumerate(points):
        rest = [q for q in points if q != p]
        a[:, j] = [p**i for i in range(n - 2)]
        b[j, :-1] = np.poly(rest)[::-1]
        g[j] = np.power(p, range(3)) / np.prod(np.subtract(p, rest))
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.poly(points)[::-1]
    return a, b, g


def _combine(matrix, parts):
    return [
        sum(float(c) * part for c, part in zip(row, parts, strict=True) if abs(c) > 1e-9)
        for row in matrix
    ]


def _winograd(images, kernel, pad):
    a, b, g = _transforms()
    m, size = a.shape
    n, h, w, c = images.shape
    out_h, out_w, o = h + 2 * pad - 2, w + 2 * pad - 2, kernel.shape[-1]
    th, tw = -(-out_h // m), -(-out_w // m)
    images = jnp.pad(
        images, ((0, 0), (pad, th * m + 2 - h - pad), (pad, tw * m + 2 - w - pad), (0, 0))
    )
    rows = _combine(b, [images[:, i : i + m * (th - 1) + 1 : m] for i in range(size)])
    tiles = [
        part
        for row in rows
        for part in _combine(b, [row[:, :, j : j + m * (tw - 1) + 1 : m] for j in range(size)])
    ]
    tiles = jnp.stack(tiles).reshape(size * size, n * th * tw, c)
    taps = jnp.stack([part for row in _combine(g, kernel) for part in _combine(g, row)])
    products = lax.dot_general(tiles, taps, (((2,), (1,)), ((0,), (0,))))
    products = products.reshape(size, size, n, th, tw, o)
    rows = [jnp.stack(_combine(a, row), axis=3) for row in _combine(a, products)]
    return jnp.stack(rows, axis=2).reshape(n, th * m, tw * m, o)[:, :out_h, :out_w]
