"""Convolutions and pools in the forms that each backend and shape runs best.

`accelerate` puts them into any function. GPUs and TPUs take XLA's own; on CPU a convolution of 1x1
is a matrix product, a depthwise one a sum of shifted products, a small pool one of slices.

The 3x3 convolution of stride 1 takes images [N, H, W, C] and kernels [3, 3, C, O]; a result [N, H',
W', O] has the wider dtype of the two. On CPU wide layers become matrix products by
Winograd's minimal filtering (Lavin & Gray, https://arxiv.org/abs/1509.09308): F(2x2), F(3x3) or
F(4x4), each within 1e-5 of the largest output in float32. Gradients take the best form of their
own, in forward and reverse mode and at any order.

Times in comments: milliseconds on 2 x86-64 cores (AVX-512, 32 MB of cache), float32. A layer is
written images x side, C -> O.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from occjax import tracing

Array = jax.Array

# What a chunk's tiles may take of the cache. 14x112, 64 -> 128: 152 at one image a time, 199 all
# at once, XLA's own 197; 14x56, 256 -> 256: 127 by two, 168, 350; 128x16, 64 -> 128: 19 by
# sixteen, 31, 46.
_TILE_BYTES = 32 * 2**20

# Narrower layers spend more on tiles than on products. 128x16, Winograd against XLA: 16 -> 32: 5.2
# to 3.4; 32 -> 32: 8.4 to 9.0; 32 -> 64: 11.7 to 15.2; 64 -> 128: 19 to 46. On 2x2 maps XLA falls
# to 2 GFLOP/s: 128x2, 512 -> 512: 12 to 1100, where one dense product would take 9 to 36.
_MIN_CHANNELS = 32


def conv3x3(images: Array, kernel: Array, *, padding: str = 'SAME', precision: Any = None) -> Array:
    """Correlates images with a 3x3 kernel, without bias.

    Args:
        images: `[N, H, W, C]`.
        kernel: `[3, 3, C, O]`.
        padding: 'SAME' (zeros) or 'VALID'.
        precision: see `jax.lax.conv_general_dilated`; on CPU it is float32's.

    Returns:
        `[N, H, W, O]`, or `[N, H - 2, W - 2, O]` for 'VALID'.

    Raises:
        ValueError: if shapes don't fit each other, the padding is unknown, or they are integers.
    """
    if images.ndim != 4 or kernel.ndim != 4 or kernel.shape[:3] != (3, 3, images.shape[-1]):
        raise ValueError(
            'Expected images [N, H, W, C] and a kernel [3, 3, C, O], '
            f'got {images.shape} and {kernel.shape}.'
        )
    if padding not in ('SAME', 'VALID'):
        raise ValueError(f"Expected padding 'SAME' or 'VALID', got {padding!r}.")
    pad = int(padding == 'SAME')
    if min(images.shape[1:3]) + 2 * pad < 3:
        raise ValueError(f"Expected images of at least 3x3 for 'VALID', got {images.shape}.")
    dtype = jnp.result_type(images, kernel)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f'Expected floats, got {images.dtype} and {kernel.dtype}.')
    return _bilinear(
        images.astype(dtype), kernel.astype(dtype), form='forward', pad=pad, precision=precision
    )


# The convolution and its two gradients are bilinear, and each one's transposes are the other two.
# As a primitive they stay so in both modes of differentiation, at any order.
_bilinear_p = Primitive('conv3x3')


def _bilinear(x, y, **settings):
    return _bilinear_p.bind(x, y, **settings)


def _evaluate(x, y, *, form, pad, forms):
    shape = _shape(x, y, form, pad)
    if not math.prod((*shape, x.size, y.size)):
        return jnp.zeros(shape, x.dtype)
    function = functools.partial(forms[form], pad=pad)
    for _ in shape[4:]:  # axes that vmap maps of both
        function = jax.vmap(function)
    return function(x, y)


def _on_cpu(x, y, *, precision, **settings):
    # Sums of bfloat16 tiles would lose digits, and no CPU path is faster for it.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _evaluate(x.astype(wide), y.astype(wide), forms=_CPU_FORMS, **settings).astype(x.dtype)


def _elsewhere(x, y, *, precision, **settings):
    # Units accumulate bfloat16 in float32 by themselves. `preferred_element_type` would make XLA's
    # GPU compiler, which has no mixed convolution, widen the operands instead.
    forms = {name: functools.partial(fn, precision=precision) for name, fn in _XLA_FORMS.items()}
    return _evaluate(x, y, forms=forms, **settings)


def _shape(x, y, form, pad):
    """Returns the result's shape; axes that both operands lead with lead it too."""
    *lead, n, h, w, c = x.shape
    if form == 'kernel_grad':
        return (*lead, 3, 3, c, y.shape[-1])
    grow = 2 * pad - 2 if form == 'forward' else 2 - 2 * pad
    return (*lead, n, h + grow, w + grow, y.shape[-1 if form == 'forward' else -2])


def _batched(operands, axes, *, form, **settings):
    """Maps one operand by merging the mapped axis with another, both by axes that lead."""
    lead = operands[0].ndim - 4 - (axes[0] is not None)
    if None not in axes:
        x, y = (jnp.moveaxis(z, axis, 0) for z, axis in zip(operands, axes, strict=True))
        return _bilinear(x, y, form=form, **settings), 0
    mapped = int(axes[0] is None)
    into, out_of = (lead + axis for axis in _MERGED[form][mapped])
    operands = list(operands)
    operand = jnp.moveaxis(operands[mapped], axes[mapped], into)
    size, last = operand.shape[into : into + 2]
    shape = (*operand.shape[:into], size * last, *operand.shape[into + 2 :])
    operands[mapped] = operand.reshape(shape)
    out = _bilinear(*operands, form=form, **settings)
    return out.reshape(*out.shape[:out_of], size, last, *out.shape[out_of + 1 :]), out_of


def _transposed(ct, x, y, *, form, of, **settings):
    other, order = _TRANSPOSES[form][of]
    known = {'ct': ct, 'x': x, 'y': y}
    return _bilinear(*(known[name] for name in order), form=other, **settings)


# Which axis of an operand takes what vmap maps of it alone, and where that is in the result.
_MERGED = {
    'forward': ((0, 0), (3, 3)),
    'image_grad': ((0, 0), (2, 3)),
    'kernel_grad': ((3, 2), (3, 3)),
}
# What multiplies the cotangent for each operand.
_TRANSPOSES = {
    'forward': (('image_grad', ('ct', 'y')), ('kernel_grad', ('x', 'ct'))),
    'image_grad': (('forward', ('ct', 'y')), ('kernel_grad', ('ct', 'x'))),
    'kernel_grad': (('image_grad', ('y', 'ct')), ('forward', ('x', 'ct'))),
}
_bilinear_p.def_impl(jax.jit(_bilinear, static_argnames=('form', 'pad', 'precision')))
_bilinear_p.def_abstract_eval(
    lambda x, y, *, form, pad, precision: jax.core.ShapedArray(_shape(x, y, form, pad), x.dtype)
)
ad.defbilinear(
    _bilinear_p, functools.partial(_transposed, of=0), functools.partial(_transposed, of=1)
)
batching.primitive_batchers[_bilinear_p] = _batched
# By the platform that a program is for, which need not be the one that it is traced on.
mlir.register_lowering(_bilinear_p, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(_bilinear_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform='cpu')


def _forward(images, kernel, pad):
    # The first layer, 128x32, 3 -> 64: 29, by columns 31, by nine shifted products 107.
    if min(kernel.shape[2:]) < _MIN_CHANNELS:
        return _direct(images, kernel, pad)
    # On 2x2 maps every input meets every output, in no more products than tiles have. 1024x2,
    # 512 -> 512: 54 to Winograd's 69; 683x2: 38 to 55; 128x2: 25 to 12, for laying out the matrix.
    if pad and images.shape[1:3] == (2, 2) and len(images) >= 256:
        return _dense_2x2(images, kernel)
    return _winograd(images, kernel, pad)


def _image_grad(grads, kernel, pad):
    # The first layer: 11, by XLA 35 to 100. Wide ones: 128x16, 64 -> 128: 23 to 60.
    if min(kernel.shape[2:]) < _MIN_CHANNELS:
        n, h, w, _ = grads.shape
        images = jnp.zeros((n, h + 2 - 2 * pad, w + 2 - 2 * pad, kernel.shape[2]), grads.dtype)
        return jax.vjp(lambda x: _columns(x, kernel, pad), images)[1](grads)[0]
    return _winograd(grads, kernel, 2 - pad, transposed=True)


def _kernel_grad(images, grads, pad):
    # The first layer: 9, by XLA 29. Wide ones: 128x16, 64 -> 128: 24 to 199.
    if min(images.shape[-1], grads.shape[-1]) < _MIN_CHANNELS:
        return _columns_kernel_grad(images, grads, pad)
    return _winograd_kernel_grad(images, grads, pad)


_CPU_FORMS = {'forward': _forward, 'image_grad': _image_grad, 'kernel_grad': _kernel_grad}


def _direct(images, kernel, pad, precision=None):
    pads, numbers = [(pad, pad)] * 2, ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
        images, kernel, (1, 1), pads, dimension_numbers=numbers, precision=precision
    )


def _direct_image_grad(grads, kernel, pad, precision):
    n, h, w, _ = grads.shape
    images = jnp.zeros((n, h + 2 - 2 * pad, w + 2 - 2 * pad, kernel.shape[2]), grads.dtype)
    return jax.vjp(lambda x: _direct(x, kernel, pad, precision), images)[1](grads)[0]


def _direct_kernel_grad(images, grads, pad, precision):
    kernel = jnp.zeros((3, 3, images.shape[-1], grads.shape[-1]), images.dtype)
    return jax.vjp(lambda y: _direct(images, y, pad, precision), kernel)[1](grads)[0]


_XLA_FORMS = {
    'forward': _direct,
    'image_grad': _direct_image_grad,
    'kernel_grad': _direct_kernel_grad,
}


def _dense_2x2(images, kernel):
    """One matrix product of all four pixels' channels, padding included."""
    places = [(i, j) for i in range(2) for j in range(2)]
    matrix = jnp.block([[kernel[1 + i - p, 1 + j - q] for p, q in places] for i, j in places])
    return (images.reshape(len(images), -1) @ matrix).reshape(*images.shape[:3], -1)


def _columns(images, kernel, pad):
    """One matrix product of every output's 3x3xC inputs."""
    _, h, w, _ = images.shape
    h, w = h + 2 * pad - 2, w + 2 * pad - 2
    images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    columns = [images[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _columns_kernel_grad(images, grads, pad):
    """The kernel's gradient of `_columns`, with pixels last so that no operand is transposed."""
    _, h, w, o = grads.shape
    images = jnp.pad(jnp.moveaxis(images, 3, 0), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    columns = [images[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    product = jnp.stack(columns).reshape(9 * len(images), -1) @ grads.reshape(-1, o)
    return product.reshape(3, 3, -1, o)


def _winograd(images, kernel, pad, *, m=None, transposed=False):
    """F(m x m, 3x3); `transposed` turns the kernel by half a turn and swaps its channels."""
    n, h, w, c = images.shape
    o = kernel.shape[2 if transposed else 3]
    h, w = h + 2 * pad - 2, w + 2 * pad - 2
    m = m or _tile_size(n, h, w)
    a, b, g = _transforms(m)
    th, tw = math.ceil(h / m), math.ceil(w / m)
    taps = np.kron(g, g)[:, :: -1 if transposed else 1].astype(kernel.dtype)
    taps = (taps @ kernel.reshape(9, -1)).reshape(-1, *kernel.shape[2:])

    def some(images):
        tiles = _to_tiles(_fit(images, pad, th * m + 2, tw * m + 2), b, th, tw, m)
        contract = ((2,), (2 if transposed else 1,))
        products = lax.dot_general(tiles, taps, (contract, ((0,), (0,))))
        # One product with both sides' matrix at once, where sums of slices would read each product
        # m times. 128x16, 64 -> 128: 14 to 19; 14x112: 136 to 161; 14x56, 256 -> 256: 124 to 140.
        out = np.kron(a, a).astype(products.dtype) @ products.reshape(len(products), -1)
        out = out.reshape(m, m, -1, th, tw, o).transpose(2, 3, 0, 4, 1, 5)
        return out.reshape(-1, th * m, tw * m, o)[:, :h, :w]

    per_image = (m + 2) ** 2 * th * tw * (c + o) * images.dtype.itemsize
    out = lax.map(some, _chunks(images, _TILE_BYTES // per_image))
    return out.reshape(-1, h, w, o)[:n]


def _winograd_kernel_grad(images, grads, pad, *, m=None):
    """The kernel's gradient of `_winograd`: both sides are brought to tiles, then multiplied."""
    n, h, w, o = grads.shape
    c = images.shape[-1]
    m = m or _tile_size(n, h, w)
    a, b, g = _transforms(m)
    th, tw = math.ceil(h / m), math.ceil(w / m)

    def some(images, grads):
        images = _to_tiles(_fit(images, pad, th * m + 2, tw * m + 2), b, th, tw, m)
        grads = _to_tiles(_fit(grads, 0, th * m, tw * m), a.T, th, tw, m)
        return lax.dot_general(images, grads, (((1,), (1,)), ((0,), (0,))))

    # The sum's own size bounds the chunk from below: it is read and written once for each.
    itemsize = images.dtype.itemsize
    per_image = (m + 2) ** 2 * th * tw * (c + o) * itemsize
    size = max(_TILE_BYTES, (m + 2) ** 2 * c * o * itemsize) // per_image
    chunks = _chunks(images, size), _chunks(grads, size)
    zeros = jnp.zeros(((m + 2) ** 2, c, o), images.dtype)
    taps, _ = lax.scan(lambda taps, chunk: (taps + some(*chunk), None), zeros, chunks)
    return (np.kron(g, g).T.astype(taps.dtype) @ taps.reshape(len(taps), -1)).reshape(3, 3, c, o)


def _tile_size(n, h, w):
    """Output pixels per tile's side that cost fewest products, those of the kernel included."""
    # Writing and reading the transformed kernel takes as long as some 64 tiles' products.
    return min(
        (2, 3, 4), key=lambda m: (m + 2) ** 2 * (n * math.ceil(h / m) * math.ceil(w / m) + 64)
    )


@functools.cache
def _transforms(m):
    """The matrices A [m, m+2], B [m+2, m+2], G [m+2, 3] of F(m, 3), by Toom and Cook."""
    # For m = 4 the customary 0, ±1, ±2 err by 1.3e-5 of the largest output (2x28, 256 -> 512),
    # these by 3e-6; m = 2 by 6e-7, XLA's convolution by 4e-7.
    root = 2**0.5
    points = {2: (0, 1, -1), 3: (0, 1, -1, 2), 4: (0, root, -root, root / 2, -root / 2)}[m]
    a, b, g = np.zeros((m, m + 2)), np.zeros((m + 2, m + 2)), np.zeros((m + 2, 3))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        a[:, i] = np.power(float(point), range(m))
        b[i, :-1] = np.poly(others)[::-1]
        g[i] = np.power(float(point), range(3)) / np.prod(np.subtract(point, others))
    a[-1, -1] = g[-1, -1] = 1  # the point at infinity
    b[-1] = np.poly(points)[::-1]
    # What rounding left of whole numbers would cost products of its own.
    return a.round(12), b.round(12), g


def _combine(matrix, parts):
    """The product of a small matrix with a list of arrays, as additions that XLA fuses."""

    def scaled(x, part):
        return part if x == 1 else -part if x == -1 else float(x) * part

    terms = [[scaled(x, part) for x, part in zip(row, parts, strict=True) if x] for row in matrix]
    return [functools.reduce(jnp.add, row) for row in terms]


def _to_tiles(images, matrix, th, tw, m):
    """Cuts windows at stride m, multiplies both sides by `matrix`: [positions, tiles, C]."""
    width = matrix.shape[1]
    rows = _combine(matrix, [images[:, i : i + m * (th - 1) + 1 : m] for i in range(width)])
    # Without the barrier XLA computes each row anew for every column: 2 to 3 times slower.
    rows = lax.optimization_barrier(jnp.stack(rows))
    columns = [rows[:, :, :, j : j + m * (tw - 1) + 1 : m] for j in range(width)]
    tiles = jnp.stack(_combine(matrix, columns), axis=1)
    return tiles.reshape(len(matrix) ** 2, -1, images.shape[-1])


def _fit(images, pad, height, width):
    """Pads by zeros: `pad` before, and after up to the given size."""
    _, h, w, _ = images.shape
    return jnp.pad(images, ((0, 0), (pad, height - h - pad), (pad, width - w - pad), (0, 0)))


def _chunks(images, size):
    """Splits into [chunks, n, ...] of at most `size` images each; zeros fill the last."""
    # XLA makes no loop of a single chunk.
    count = math.ceil(len(images) / max(1, size))
    size = math.ceil(len(images) / count)
    fill = [(0, count * size - len(images))] + [(0, 0)] * (images.ndim - 1)
    return jnp.pad(images, fill).reshape(count, size, *images.shape[1:])


# --- Other forms of operations, for any function. -------------------------------------------------


def accelerate(fn: Callable) -> Callable:
    """Returns the same function with convolutions and pools in the forms that run best.

    What has no part in the results, such as a `jax.debug.print`, is left out. Heat maps of the
    function cost as little as those of `fn`, but for one that wraps it again.

    Args:
        fn: maps arrays, or pytrees of them, to such. It is traced, as by `jax.jit`, and arrays that
            it closes over may be tracers.
    """
    if isinstance(fn, jax.stages.Compiled):
        return fn  # It cannot be looked into.
    fn = tracing.plain(fn)

    @functools.wraps(fn)
    def accelerated(*args):
        program = tracing.trace(fn, *args)
        outputs = tracing.evaluate(program, *jax.tree.leaves(args), bind_fn=bind)
        return jax.tree.unflatten(program.tree, outputs)

    accelerated.plain_fn = fn
    return accelerated


def bind(primitive: Any, params: dict, operands: Sequence[Array]) -> tuple[Array, ...]:
    """Returns a primitive's results, by the form of it that runs best; see `tracing.Bind`."""
    found = _form(primitive.name, params, operands)
    if found is None:
        return tracing.bind(primitive, params, operands)
    name, form = found
    if name == _WINOGRAD:
        return (form(*operands),)  # It knows of platforms itself.

    def plain(*operands):
        return tracing.bind(primitive, params, operands)[0]

    return (lax.platform_dependent(*operands, cpu=form, default=plain),)


def forms(operations: Sequence[tracing.Operation]) -> dict[str, int]:
    """Returns how many convolutions and pools are taken in which form on CPU."""
    found = collections.Counter()
    for operation in operations:
        if operation.name in _FORMS:
            taken = _form(operation.name, operation.params, operation.operands)
            found[taken[0] if taken else "XLA's own"] += 1
    return dict(found)


def scratch(operation: tracing.Operation) -> tuple[int, int]:
    """Returns how many numbers the form of an operation on CPU lays out, however many images.

    First those of a chunk's windows, then those of the kernel, which outlive the operation.
    """
    taken = _form(operation.name, operation.params, operation.operands)
    if taken is None or taken[0] not in (_WINOGRAD, _DEPTHWISE, _COLUMNS):
        return 0, 0
    (images, kernel), out = operation.shapes, operation.results[0].shape
    numbers = operation.params['dimension_numbers']
    chunk = _TILE_BYTES // operation.results[0].dtype.itemsize
    if taken[0] == _WINOGRAD:  # Tiles of at most 4 times the pixels, and kernels of 6x6.
        return max(chunk, 4 * (math.prod(out) + math.prod(images))), 4 * math.prod(kernel)
    taps = math.prod(kernel[i] for i in numbers.rhs_spec[2:]) * images[numbers.lhs_spec[1]]
    return max(chunk, taps * math.prod(out[i] for i in numbers.out_spec[2:])), math.prod(kernel)


def _form(name, params, operands):
    """Returns the name of a form and the function that it is, None for XLA's own."""
    find = _FORMS.get(name)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands] if find else ()
    return find(params, *shapes) if find else None


_WINOGRAD, _DEPTHWISE, _COLUMNS = (
    '3x3, Winograd where wide',
    'depthwise, shifted products',
    'a matrix product of columns',
)


def _convolution(params, images, kernel):
    """Returns a form for a convolution of [N, H, W, C]; None for what XLA does as well."""
    numbers, strides, pads = (
        params[name] for name in ('dimension_numbers', 'window_strides', 'padding')
    )
    groups, sides = params['feature_group_count'], [kernel.shape[i] for i in numbers.rhs_spec[2:]]
    dilations = {*params['lhs_dilation'], *params['rhs_dilation'], params['batch_group_count']}
    out = params['preferred_element_type']
    if images.ndim != 4 or dilations != {1} or out not in (None, images.dtype):
        return None
    if not jnp.issubdtype(images.dtype, jnp.inexact):
        return None  # Winograd's points are no integers.
    c, o = kernel.shape[numbers.rhs_spec[1]], kernel.shape[numbers.rhs_spec[0]]
    if groups == 1 and sides == [3, 3] and strides == (1, 1):
        products = functools.partial(_products_3x3, precision=params['precision'])
        name = _WINOGRAD
    elif groups == 1 and sides == [1, 1]:
        name, products = '1x1, a matrix product', _products_1x1
    elif c == 1 and groups == o:
        name, products = _DEPTHWISE, functools.partial(_chunked, form=_shifted_products)
    elif groups == 1 and o >= _MIN_CHANNELS:
        name, products = _COLUMNS, functools.partial(_chunked, form=_column_products)
    else:
        return None

    settings = dict(products=products, numbers=numbers, strides=strides, pads=pads)
    return name, functools.partial(_laid_out, **settings)


def _laid_out(images, kernel, *, products, numbers, strides, pads):
    """Returns products of [N, H, W, C] and [H, W, C, O], from and in the layouts that are asked."""
    to = numbers.lhs_spec
    images = images.transpose(to[0], *to[2:], to[1])
    to = numbers.rhs_spec
    out = products(images, kernel.transpose(*to[2:], to[1], to[0]), strides, pads)
    to = numbers.out_spec
    return out.transpose(np.argsort([to[0], *to[2:], to[1]]))


def _products_3x3(images, kernel, strides, pads, *, precision):
    if tuple(pads) == ((1, 1), (1, 1)):
        return conv3x3(images, kernel, precision=precision)
    return conv3x3(_padded(images, pads), kernel, padding='VALID', precision=precision)


def _products_1x1(images, kernel, strides, pads):
    return _padded(images, pads)[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def _shifted_products(images, kernel, strides, pads):
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum(
        tap * part
        for tap, part in zip(
            taps, _shifted(_padded(images, pads), kernel.shape[:2], strides), strict=True
        )
    )


def _column_products(images, kernel, strides, pads):
    columns = _shifted(_padded(images, pads), kernel.shape[:2], strides)
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


# What lays out every tap of a window does so for a chunk of images. As a primitive it sees all
# those that `vmap` maps, of one image each.
_chunked_p = Primitive('convolution_in_chunks')


def _chunked(images, kernel, strides, pads, *, form):
    return _chunked_p.bind(images, kernel, strides=strides, pads=tuple(pads), form=form)


def _in_chunks(images, kernel, *, strides, pads, form):
    function = functools.partial(form, kernel=kernel, strides=strides, pads=pads)
    return _mapped(function, images, _laid_out_per_image(images, kernel, strides, pads))


def _mapped(fn, images, per_image):
    out = lax.map(fn, _chunks(images, _TILE_BYTES // max(1, per_image * images.dtype.itemsize)))
    return out.reshape(-1, *out.shape[2:])[: len(images)]


def _laid_out_per_image(images, kernel, strides, pads):
    """Returns how many numbers the taps of all windows of an image are."""
    sides = zip(images.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    windows = [(n + sum(pad) - k) // stride + 1 for n, k, stride, pad in sides]
    return math.prod(windows) * math.prod(kernel.shape[:2]) * images.shape[-1]


def _chunked_batched(operands, axes, *, form, **settings):
    if axes[1] is not None:
        return jax.vmap(functools.partial(form, **settings), in_axes=axes)(*operands), 0
    images = jnp.moveaxis(operands[0], axes[0], 0)
    out = _chunked_p.bind(images.reshape(-1, *images.shape[2:]), operands[1], form=form, **settings)
    return out.reshape(*images.shape[:2], *out.shape[1:]), 0


def _chunked_image_grad(ct, images, kernel, *, form, **settings):
    def some(ct):
        image = jax.ShapeDtypeStruct((len(ct), *images.aval.shape[1:]), images.aval.dtype)
        return jax.linear_transpose(lambda x: form(x, kernel, **settings), image)(ct)[0]

    return _mapped(some, ct, _laid_out_per_image(images.aval, kernel, **settings))


def _chunked_kernel_grad(ct, images, kernel, *, form, **settings):
    return jax.linear_transpose(lambda x: form(images, x, **settings), kernel.aval)(ct)[0]


_chunked_p.def_impl(jax.jit(_in_chunks, static_argnames=('strides', 'pads', 'form')))
_chunked_p.def_abstract_eval(
    lambda images, kernel, *, form, **settings: jax.core.ShapedArray(
        jax.eval_shape(functools.partial(form, **settings), images, kernel).shape, images.dtype
    )
)
ad.defbilinear(_chunked_p, _chunked_image_grad, _chunked_kernel_grad)
batching.primitive_batchers[_chunked_p] = _chunked_batched
mlir.register_lowering(_chunked_p, mlir.lower_fun(_in_chunks, multiple_results=False))


def _padded(images, pads, value=0.0):
    """Returns `[N, H, W, C]` images with pads of rows and columns, which may be negative."""
    if not np.any(pads):
        return images
    config = [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)]
    return lax.pad(images, jnp.asarray(value, images.dtype), config)


def _shifted(images, sides, strides):
    """Returns what each tap of a window sees of `[N, H, W, C]`."""
    h, w = ((n - k) // s + 1 for n, k, s in zip(images.shape[1:3], sides, strides, strict=True))
    return [
        images[:, i : i + (h - 1) * strides[0] + 1 : strides[0]][
            :, :, j : j + (w - 1) * strides[1] + 1 : strides[1]
        ]
        for i in range(sides[0])
        for j in range(sides[1])
    ]


def _pool(params, images, *, combine, fill):
    """Returns a form for a small pool of [N, H, W, C] maps."""
    sides, strides = params['window_dimensions'], params['window_strides']
    ones = {*params['base_dilation'], *params['window_dilation']} | {
        x for each in (sides, strides) for x in (each[0], each[-1])
    }
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    ends = params['padding'][0] + params['padding'][-1]
    if images.ndim != 4 or not is_float or ones != {1} or math.prod(sides) > 9 or any(ends):
        return None

    return 'a pool of slices', functools.partial(_sliced, params, combine=combine, fill=fill)


def _sliced(params, images, *, combine, fill):
    padded = _padded(images, params['padding'][1:3], fill)
    sides, strides = params['window_dimensions'][1:3], params['window_strides'][1:3]
    return functools.reduce(combine, _shifted(padded, sides, strides))


def _first_largest(a, b):
    """The larger of two; of equals the first has the gradient, as in a pool of XLA or PyTorch."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


_FORMS = {
    'conv_general_dilated': _convolution,
    'reduce_window_max': functools.partial(_pool, combine=_first_largest, fill=-math.inf),
    'reduce_window_sum': functools.partial(_pool, combine=jnp.add, fill=0.0),
}
