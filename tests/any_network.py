"""Small random networks of every kind, as functions of (weights, images)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NHWC = ('NHWC', 'HWIO', 'NHWC')
CLASSES = 5


def conv(x, kernel, stride=1, *, padding='SAME', groups=1, dilation=1, numbers=NHWC):
    settings = dict(rhs_dilation=(dilation,) * 2, feature_group_count=groups)
    strides = (stride,) * 2
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **settings
    )


def pool(x, size, stride, padding='VALID'):
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


class Weights:
    """Hands out random arrays in order, the same ones to every caller of a seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape):
        scale = np.sqrt(2 / max(1, np.prod(shape[:-1])))
        return (self.rng.normal(size=shape) * scale).astype(np.float32)


def norm(x, scale, axes=(-1,)):
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + 1e-6) * scale


def _layers(*shapes, head):
    def make(seed):
        weights = Weights(seed)
        return [weights(*shape) for shape in shapes] + [weights(head, CLASSES)]

    return make


def vgg(w, x):
    x = pool(jax.nn.relu(conv(x, w[0])), 2, 2)
    x = pool(jax.nn.relu(conv(x, w[1])), 2, 2)
    x = jnp.tanh(x.mean((1, 2)) @ w[2])
    return x @ w[3]


def resnet(w, x):
    x = pool(
        jax.nn.relu(conv(x, w[0], 2, padding=((3, 3), (3, 3)))),
        3,
        2,
        ((0, 0), *[(1, 1)] * 2, (0, 0)),
    )
    y = conv(jax.nn.relu(conv(x, w[1])), w[2])
    x = jax.nn.relu(x + y)
    y = conv(jax.nn.relu(conv(x, w[3], 2)), w[4])
    x = jax.nn.relu(conv(x, w[5], 2) + y)
    return x.mean((1, 2)) @ w[6]


def convnext(w, x):
    x = norm(conv(x, w[0], 2, padding='VALID'), 1.0)
    for i in (1, 4):
        y = norm(conv(x, w[i], groups=x.shape[-1]), 1.0)
        x = x + jax.nn.gelu(y @ w[i + 1]) @ w[i + 2]
    return norm(x.mean((1, 2)), 1.0) @ w[7]


def mobilenet(w, x, *, excites=False):
    x = jnp.clip(conv(x, w[0], 2), 0, 6)
    y = jnp.clip(conv(x, w[1]), 0, 6)
    y = jax.nn.silu(conv(y, w[2], groups=y.shape[-1]))
    if excites:
        y = y * jax.nn.sigmoid(y.mean((1, 2), keepdims=True) @ w[4])
    return (x + conv(y, w[3])).mean((1, 2)) @ w[5]


def group_norm(w, x):
    x = jax.nn.leaky_relu(conv(x, w[0]))
    grouped = x.reshape(*x.shape[:-1], 2, -1)
    x = norm(grouped, 1.0, axes=(1, 2, 4)).reshape(x.shape)
    return conv(x, w[1], dilation=2).max((1, 2)) @ w[2]


def channels_first(w, x):
    numbers = ('NCHW', 'OIHW', 'NCHW')
    x = x.transpose(0, 3, 1, 2)
    x = jax.nn.relu(conv(x, w[0].transpose(3, 2, 0, 1), numbers=numbers))
    x = lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), 'VALID') / 4
    x = jax.nn.elu(conv(x, w[1].transpose(3, 2, 0, 1), numbers=numbers))
    return x.reshape(len(x), x.shape[1], -1).mean(-1) @ w[2]


def transposed(w, x):
    """With much that is rare: a transposed convolution, joins, splits, sums along an axis."""
    x = jax.nn.softplus(conv(x, w[0], 2))
    up = lax.conv_transpose(x, w[1], (2, 2), 'SAME', dimension_numbers=NHWC)
    first, second = jnp.split(conv(x, w[2]), 2, axis=-1)
    x = jnp.concatenate(
        [first * second, jnp.cumsum(x, -1), x[:, ::-1], jnp.where(x > 0.5, x, 0)], -1
    )
    return jnp.concatenate([x.mean((1, 2)), up.mean((1, 2))], -1) @ w[3]


def attention(w, x):
    x = conv(x, w[0], 4, padding='VALID')
    x = x.reshape(len(x), -1, x.shape[-1])
    q, k, v = x @ w[1], x @ w[2], x @ w[3]
    x = x + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return x.mean(1) @ w[4]


def scanned(w, x):
    """One block again and again, as deep networks are compiled in little time."""
    x = jax.nn.relu(conv(x, w[0]))
    x, _ = lax.scan(lambda x, kernel: (jax.nn.relu(conv(x, kernel)), None), x, w[1])
    return jax.checkpoint(lambda x: conv(x, w[2]))(x).mean((1, 2)) @ w[3]


def crops(w, x):
    """Dilated, padded by other numbers than 0, cropped, thinned out, turned, and joined again."""
    x = jax.nn.relu(conv(x, w[0], dilation=2))
    x = jnp.pad(x, ((0, 0), (2, 1), (1, 3), (0, 0)), constant_values=0.5)
    x = x[:, 3:, 2:-1]
    y = conv(x[:, 1::2, ::2], w[1], padding='VALID')
    z = conv(x, w[2], 2, padding=((0, 1), (1, 0))).swapaxes(1, 2)[:, :-2, 1:]
    return jnp.concatenate([y.mean((1, 2)), z.max((1, 2))], -1) @ w[3]


# Name: a function of (weights, images), and what makes weights of a seed.
NETWORKS = {
    'vgg': (vgg, _layers((3, 3, 3, 4), (3, 3, 4, 6), (6, 8), head=8)),
    'wide vgg': (vgg, _layers((3, 3, 3, 32), (3, 3, 32, 32), (32, 8), head=8)),
    'resnet': (
        resnet,
        _layers(
            (7, 7, 3, 4),
            (3, 3, 4, 4),
            (3, 3, 4, 4),
            (3, 3, 4, 6),
            (3, 3, 6, 6),
            (1, 1, 4, 6),
            head=6,
        ),
    ),
    'bottleneck': (
        resnet,
        _layers(
            (7, 7, 3, 4),
            (1, 1, 4, 2),
            (3, 3, 2, 4),
            (1, 1, 4, 8),
            (3, 3, 8, 6),
            (1, 1, 4, 6),
            head=6,
        ),
    ),
    'convnext': (
        convnext,
        _layers((2, 2, 3, 4), (7, 7, 1, 4), (4, 8), (8, 4), (5, 5, 1, 4), (4, 8), (8, 4), head=4),
    ),
    'mobilenet': (
        mobilenet,
        _layers((3, 3, 3, 4), (1, 1, 4, 8), (3, 3, 1, 8), (1, 1, 8, 4), (8, 8), head=4),
    ),
    'squeeze and excite': (
        functools.partial(mobilenet, excites=True),
        _layers((3, 3, 3, 4), (1, 1, 4, 8), (3, 3, 1, 8), (1, 1, 8, 4), (8, 8), head=4),
    ),
    'group norm': (group_norm, _layers((3, 3, 3, 4), (3, 3, 4, 4), head=4)),
    'channels first': (channels_first, _layers((3, 3, 3, 4), (5, 5, 4, 6), head=6)),
    'transposed': (
        transposed,
        _layers((3, 3, 3, 4), (3, 3, 4, 4), (1, 3, 4, 8), head=20),
    ),
    'crops': (crops, _layers((3, 3, 3, 4), (3, 3, 4, 4), (2, 3, 4, 4), head=8)),
    'attention': (attention, _layers((4, 4, 3, 8), (8, 8), (8, 8), (8, 8), head=8)),
    'scanned': (scanned, _layers((3, 3, 3, 4), (2, 3, 3, 4, 4), (3, 3, 4, 4), head=4)),
}


def bound(name, seed=0):
    """Returns a network of those with its weights."""
    fn, make = NETWORKS[name]
    return functools.partial(fn, make(seed))
