"""VGG with batch normalisation as a plan and pure functions that interpret it (paper Table I).

A plan is a tuple: an integer is a 3×3 convolution with that many channels, batch normalisation
and ReLU; `'M'` is a 2×2 max pool. Three linear layers follow. All weights, the running
statistics, and the mean and deviation of the pixels are one explicit pytree, `Variables`.
Images come in as float32 in [0, 1], NHWC; the normalisation is part of the model.

Dimensions: B batch, H W C image, K classes.

References:
    Simonyan & Zisserman, https://arxiv.org/abs/1409.1556
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import checks, names
from occjax.types import Array, promoting

Plan = tuple[int | str, ...]

VGG11: Plan = (64, 'M', 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512, 'M')
VGG13: Plan = (64, 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512, 'M')
VGG16: Plan = (64, 64, 'M', 128, 128, 'M') + 3 * (256,) + ('M',) + 2 * (3 * (512,) + ('M',))
VGG19: Plan = (64, 64, 'M', 128, 128, 'M') + 4 * (256,) + ('M',) + 2 * (4 * (512,) + ('M',))
PLANS = dict(zip(names.PLANS, (VGG11, VGG13, VGG16, VGG19), strict=True))

BATCH_NORM_EPSILON = 1e-5
POOLED_SIDE = 7  # to which torchvision's head pools the last feature map
BATCH_NORM_MOMENTUM = 0.9  # share of the running statistics that a training step keeps


class Variables(NamedTuple):
    """Everything the model computes with; `params` alone has gradients."""

    params: dict  # {'conv': [{kernel, bias, scale, offset}], 'linear': [{kernel, bias}]}
    batch_stats: list  # [{mean, var}], the running statistics, one entry a convolution
    pixel_stats: dict  # {mean, std}, f32[C]: normalises [0, 1] pixels


class Row(NamedTuple):
    """A row of the paper's Table I; `output_shape` is channels first, -1 for the batch."""

    layer: str
    output_shape: tuple[int, ...]
    parameters: int


def _sides(image_size: int | tuple[int, int], plan: Plan) -> tuple[int, int]:
    """Returns the height and width of the last feature map."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    factor = 2 ** plan.count('M')
    if min(height, width) < factor:
        raise ValueError(f'Images of {height}x{width} vanish in {plan.count("M")} pools of 2x2.')
    return height // factor, width // factor


def init(
    key: Array,
    *,
    image_size: int | tuple[int, int],
    num_classes: int = 10,
    hidden: int = 4096,
    plan: Plan = VGG11,
    channels: int = 3,
    levels: int = 1,
    mean: float | np.ndarray = 0.0,
    std: float | np.ndarray = 1.0,
) -> Variables:
    """Returns fresh variables: He-normal kernels, zero biases (ours: the paper doesn't say).

    Args:
        key: JAX random key.
        image_size: side of the images in pixels, or `(H, W)`. The first linear layer has
            512 · ⌊H/32⌋ · ⌊W/32⌋ inputs, so Table I at 224 and §III-B's shorter head at 32.
        num_classes: K.
        hidden: width of the two hidden linear layers.
        plan: the feature layers.
        channels: C.
        levels: of the thermometer encoding that the first convolution sees, 1 for none.
        mean, std: what `logits` normalises [0, 1] pixels with: a number, or `[C]`.

    Raises:
        ValueError: if the images are too small for the plan's pools.

    References:
        He et al., https://arxiv.org/abs/1502.01852
    """
    last = [width for width in plan if width != 'M'][-1]
    features = math.prod(_sides(image_size, plan)) * last
    he_normal = jax.nn.initializers.he_normal()

    def affine(shape):
        nonlocal key
        key, subkey = jax.random.split(key)
        return {'kernel': he_normal(subkey, shape), 'bias': jnp.zeros(shape[-1])}

    conv, batch_stats, inputs = [], [], channels * levels
    for width in plan:
        if width != 'M':
            norm = {'scale': jnp.ones(width), 'offset': jnp.zeros(width)}
            conv.append(affine((3, 3, inputs, width)) | norm)
            batch_stats.append({'mean': jnp.zeros(width), 'var': jnp.ones(width)})
            inputs = width
    widths = (features, hidden, hidden, num_classes)
    linear = [affine(shape) for shape in zip(widths, widths[1:], strict=False)]
    pixel_stats = {
        name: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (channels,))
        for name, value in (('mean', mean), ('std', std))
    }
    return Variables({'conv': conv, 'linear': linear}, batch_stats, pixel_stats)


@promoting
def normalize(variables: Variables, images: Array) -> Array:
    """Returns `[B, H, W, C]` pixels as the first convolution wants them, in its weights' type."""
    kernel = variables.params['conv'][0]['kernel']
    levels = kernel.shape[2] // len(variables.pixel_stats['mean'])
    if levels > 1:  # Zeros and ones have no need of mean and deviation.
        return thermometer(images, levels).astype(kernel.dtype)
    x = (images - variables.pixel_stats['mean']) / variables.pixel_stats['std']
    return x.astype(kernel.dtype)


def thermometer(images: Array, levels: int) -> Array:
    """Encodes pixels by which of `levels` thresholds in (0, 1] they exceed.

    The encoding has no gradient; that of the distances above the thresholds replaces it, as
    Athalye et al. attack it.

    Args:
        images: `[B, H, W, C]` in [0, 1].
        levels: L, the thresholds being 1/L, 2/L, …, 1.

    Returns:
        `[B, H, W, C * L]` zeros and ones, the levels of a channel side by side.

    References:
        Buckman et al., https://openreview.net/forum?id=S18Su--CW; Athalye et al.,
        https://arxiv.org/abs/1802.00420, §5.1
    """
    above = images[..., None] - jnp.arange(1, levels + 1) / levels
    soft = jnp.clip(above, 0, 1)
    hard = (above > 0).astype(images.dtype)
    encoded = soft + jax.lax.stop_gradient(hard - soft)
    return encoded.reshape(*images.shape[:-1], -1)


@promoting
def batch_norm(x: Array, layer: dict, mean: Array, var: Array) -> Array:
    """Returns `x` normalised by the given statistics, scaled and offset."""
    scale = layer['scale'] * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
    return x * scale + (layer['offset'] - mean * scale)


def max_pool(x: Array) -> Array:
    """Returns the maxima of the 2×2 blocks of `[B, H, W, C]`; an odd last row or column drops."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    windows = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, windows, windows, 'VALID')


def _pool_to(x: Array, side: int) -> Array:
    """Averages `[B, H, W, C]` into `side` bins an axis, as torchvision's head does at any size."""
    for axis in (1, 2):
        length = x.shape[axis]
        weights = np.zeros((side, length), x.dtype)
        for i in range(side):
            start, stop = i * length // side, -(-(i + 1) * length // side)
            weights[i, start:stop] = 1 / (stop - start)
        x = jnp.moveaxis(jnp.tensordot(x, weights, axes=(axis, 1)), -1, axis)
    return x


def _linear_input(variables: Variables, features: Array, *, pools: bool) -> Array:
    """Returns `[B, h, w, C]` features as the rows that the first linear layer wants.

    Those of another map than it was made for are averaged to that where `pools` says so.
    """
    wanted, channels = len(variables.params['linear'][0]['kernel']), features.shape[-1]
    if math.prod(features.shape[1:]) != wanted:
        side = math.isqrt(wanted // channels)
        if side**2 * channels != wanted or not (pools or side == POOLED_SIDE):
            raise ValueError(
                f'Features {features.shape[1:]} do not fit a linear layer of {wanted} inputs; '
                'were the variables made for another image_size or plan?'
            )
        features = _pool_to(features, side)
    return features.reshape(len(features), wanted)


def _check_images(variables: Variables, images: Array, plan: Plan) -> None:
    """Raises ValueError unless images are `[B, H, W, C]` floats, large enough for the pools."""
    channels = len(variables.pixel_stats['mean'])
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f'Expected images [B, H, W, {channels}], got {images.shape}.')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f'Expected floats in [0, 1], got images of {images.dtype}; of 0 to 255 make '
            'images.astype(np.float32) / 255.'
        )
    _sides(images.shape[1:3], plan)


def num_classes(variables: Variables) -> int:
    """Returns K."""
    return len(variables.params['linear'][-1]['bias'])


def layers(variables: Variables, plan: Plan) -> Iterator[tuple[dict, dict]]:
    """Returns each convolution's parameters and statistics; raises if the plan is another."""
    widths = [width for width in plan if width != 'M']
    found = [len(layer['bias']) for layer in variables.params['conv']]
    if widths != found:
        raise ValueError(f'The plan has convolutions of {widths}, the variables {found}.')
    return zip(variables.params['conv'], variables.batch_stats, strict=True)


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


@promoting
def _conv_block(x, layer, stats):
    """Returns convolution, batch normalisation by running statistics, and ReLU."""
    # Fixed statistics fold into kernel and bias, once instead of at every pixel.
    scale = layer['scale'] * jax.lax.rsqrt(stats['var'] + BATCH_NORM_EPSILON)
    bias = layer['offset'] + (layer['bias'] - stats['mean']) * scale
    return jax.nn.relu(_convolve(x, layer['kernel'] * scale) + bias)


def _features(variables: Variables, images: Array, plan: Plan, block_fn: Callable) -> Array:
    """Returns the last `[B, h, w, C]` feature map; `block_fn(x, layer, stats)` convolves."""
    parts = layers(variables, plan)
    _check_images(variables, images, plan)
    x = normalize(variables, images)
    for width in plan:
        x = max_pool(x) if width == 'M' else block_fn(x, *next(parts))
    return x


def features(variables: Variables, images: Array, *, plan: Plan = VGG11) -> Array:
    """Returns the last `[B, h, w, C]` feature map, of which `head` makes the logits."""
    return _features(variables, images, plan, _conv_block)


@promoting
def head(variables: Variables, features: Array, dropout_fn: Callable | None = None) -> Array:
    """Returns the `[B, K]` logits of `[B, h, w, C]` features: the three linear layers."""
    # Training on shrunk images pools; elsewhere another size is a mistake.
    x = _linear_input(variables, features, pools=dropout_fn is not None)
    *inner, last = variables.params['linear']
    for i, layer in enumerate(inner):
        x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
        x = dropout_fn(i, x) if dropout_fn else x
    return x @ last['kernel'] + last['bias']


def logits(variables: Variables, images: Array, *, plan: Plan = VGG11) -> Array:
    """Classifies images, each on its own: running statistics, no dropout.

    Variables whose last feature map is 7×7 take images of any size, as torchvision's do: another
    map is averaged to 7×7.

    Args:
        variables: from `init`, `from_torchvision` or training.
        images: `[B, H, W, C]` in [0, 1].
        plan: the plan that `variables` was made with.

    Returns:
        `[B, K]` logits.

    Raises:
        ValueError: if images, plan and variables don't fit each other, or images are integers.
    """
    return head(variables, features(variables, images, plan=plan))


@promoting
def train_logits(
    variables: Variables,
    images: Array,
    *,
    key: Array,
    dropout_rate: float = 0.5,
    plan: Plan = VGG11,
) -> tuple[Array, list]:
    """Classifies a training batch: its own statistics, and dropout.

    Args:
        variables: from `init` or the step before.
        images: `[B, H, W, C]` in [0, 1], every one of them real.
        key: JAX random key for dropout.
        dropout_rate: share of hidden units set to zero after each of the two linear layers.
        plan: the plan that `variables` was made with.

    Returns:
        `[B, K]` logits, and the new running statistics for `Variables.batch_stats`.

    Raises:
        ValueError: if plan and variables don't fit each other, or images are integers. Images of
            another size than the variables were made for have their features averaged.
    """
    batch_stats = []

    def block_fn(x, layer, stats):
        x = _convolve(x, layer['kernel']) + layer['bias']
        mean, var = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
        count = x.size // x.shape[-1]
        # As in PyTorch, the running variance is the unbiased one.
        new = {'mean': mean, 'var': var * count / max(1, count - 1)}
        keep = BATCH_NORM_MOMENTUM
        running = jax.tree.map(lambda old, now: keep * old + (1 - keep) * now, stats, new)
        batch_stats.append(jax.lax.stop_gradient(running))
        return jax.nn.relu(batch_norm(x, layer, mean, var))

    def dropout_fn(i, x):
        kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout_rate, x.shape)
        return jnp.where(kept, x / (1 - dropout_rate), 0)

    return head(variables, _features(variables, images, plan, block_fn), dropout_fn), batch_stats


def summary(
    *,
    image_size: int | tuple[int, int],
    num_classes: int = 10,
    hidden: int = 4096,
    plan: Plan = VGG11,
    levels: int = 1,
) -> list[Row]:
    """Returns the layers with output shapes and parameter counts, as Table I lists them.

    >>> sum(row.parameters for row in summary(image_size=224))
    128812810
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, channels = [], 3

    def add(kind, *shape, parameters=0):
        rows.append(Row(f'{kind}-{len(rows) + 1}', (-1, *shape), parameters))

    for layer in plan:
        if layer == 'M':
            height, width = height // 2, width // 2
            add('MaxPool2d', channels, height, width)
        else:
            inputs = channels * (1 if rows else levels)
            add('Conv2d', layer, height, width, parameters=(9 * inputs + 1) * layer)
            add('BatchNorm2d', layer, height, width, parameters=2 * layer)
            channels = layer
    features = channels * math.prod(_sides(image_size, plan))
    for inputs in (features, hidden):
        add('Linear', hidden, parameters=(inputs + 1) * hidden)
        add('Dropout', hidden)
    add('Linear', num_classes, parameters=(hidden + 1) * num_classes)
    return rows


_TORCHVISION = "a torchvision 'vgg*_bn' model"
_NORM = ('weight', 'bias', 'running_mean', 'running_var')  # of torchvision's layers


def _number(name, part):
    """Returns what stands for a layer's number in a name of that part; '' in others."""
    head, number, *_ = *name.split('.'), ''
    return number if head == part and number.isdigit() else ''


def torchvision_plan(state_dict: dict[str, np.ndarray]) -> Plan:
    """Returns the plan of a state dict's convolutions, by their numbers and widths.

    A convolution, its normalisation and its ReLU are three layers, a pool is a fourth. The pool at
    the end has no weights to tell it, but all of torchvision's have one.

    Raises:
        ValueError: if the numbers are those of no VGG with batch normalisation.
    """
    numbers = sorted({int(n) for name in state_dict if (n := _number(name, 'features'))})
    plan, after = (), 0
    for number in numbers[::2]:
        if number - after not in (0, 1) or number + 1 not in numbers:
            raise ValueError(
                f'Expected the state dict of {_TORCHVISION}, which has no features.{number}.'
            )
        plan += ('M',) * (number - after)
        plan += (len(state_dict.get(f'features.{number}.bias', ())),)
        after = number + 3
    return (*plan, 'M')


def _shapes(state_dict, numbers, channels):
    """Returns the shapes of all arrays, by the widths of the layers' biases."""
    shapes, inputs = {}, channels
    widths = [width for width in torchvision_plan(state_dict) if width != 'M']
    for number, width in zip(numbers['features'][::2], widths, strict=True):
        shapes[f'features.{number}.weight'] = (width, inputs, 3, 3)
        shapes[f'features.{number}.bias'] = (width,)
        shapes.update({f'features.{number + 1}.{name}': (width,) for name in _NORM})
        inputs = width
    first = np.shape(state_dict.get(f'classifier.{numbers["classifier"][0]}.weight', ()))
    # A square of cells an image side: torchvision's is 7, others follow from other sides.
    inputs *= math.isqrt(first[1] // inputs) ** 2 if len(first) == 2 else POOLED_SIDE**2
    for number in numbers['classifier']:
        width = len(state_dict.get(f'classifier.{number}.bias', ()))
        shapes[f'classifier.{number}.weight'] = (width, inputs)
        shapes[f'classifier.{number}.bias'] = (width,)
        inputs = width
    return shapes


def from_torchvision(
    state_dict: dict[str, np.ndarray],
    *,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Variables:
    """Converts the weights of one of torchvision's `vgg*_bn` models.

    Args:
        state_dict: `{name: NumPy array}`, for example
            `{name: tensor.numpy() for name, tensor in model.state_dict().items()}`.
        mean, std: the normalisation that the weights were trained with, torchvision's by default.

    Returns:
        Variables for the plan of the same name (`VGG11` for `vgg11_bn`, ...).

    Raises:
        ValueError: if the dictionary isn't that of a VGG with batch normalisation.

    References:
        https://docs.pytorch.org/vision/stable/models/vgg.html
    """
    numbers = {
        part: sorted({int(n) for name in state_dict if (n := _number(name, part))})
        for part in ('features', 'classifier')
    }
    is_normalised = any(name.endswith('running_mean') for name in state_dict)
    heads = [f'classifier.{n}.weight' for n in numbers['classifier']]
    if not is_normalised or len(heads) != 3 or not state_dict.keys() >= {*heads}:
        raise ValueError(
            f'Expected the state dict of {_TORCHVISION}: features with batch '
            f'normalisation and three classifier layers, got the names {sorted(state_dict)[:4]} ….'
        )
    shapes = _shapes(state_dict, numbers, len(mean))
    arrays = checks.weights(state_dict, shapes, of=_TORCHVISION)
    conv, batch_stats = [], []
    for number in numbers['features'][::2]:  # A convolution at n, its batch norm at n + 1.
        weight, norm = arrays[f'features.{number}.weight'], f'features.{number + 1}.'
        conv.append(
            {
                'kernel': weight.transpose(2, 3, 1, 0),
                'bias': arrays[f'features.{number}.bias'],
                'scale': arrays[norm + 'weight'],
                'offset': arrays[norm + 'bias'],
            }
        )
        batch_stats.append(
            {'mean': arrays[norm + 'running_mean'], 'var': arrays[norm + 'running_var']}
        )
    linear = [
        {'kernel': arrays[f'classifier.{n}.weight'].T, 'bias': arrays[f'classifier.{n}.bias']}
        for n in numbers['classifier']
    ]
    # PyTorch flattens features channels first, we channels last.
    kernel, channels = linear[0]['kernel'], len(conv[-1]['bias'])
    by_channel = kernel.reshape(channels, -1, kernel.shape[-1])
    linear[0]['kernel'] = by_channel.transpose(1, 0, 2).reshape(kernel.shape)
    pixel_stats = {'mean': np.asarray(mean), 'std': np.asarray(std)}
    variables = Variables({'conv': conv, 'linear': linear}, batch_stats, pixel_stats)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
