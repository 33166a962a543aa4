"""ResNets of torchvision's weights as pure functions: 18, 34, 50 layers and deeper.

A variables pytree tells the network: blocks of two 3×3 convolutions or bottlenecks of three, in
four stages, the last three of which halve the sides. Images come in as float32 in [0, 1], NHWC; the
normalisation is part of the model. For inference alone: batch normalisation by running statistics.

Dimensions: B batch, H W C image, K classes.

References:
    He et al., https://arxiv.org/abs/1512.03385
    https://docs.pytorch.org/vision/stable/models/resnet.html
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import checks
from occjax.types import Array, promoting

BATCH_NORM_EPSILON = 1e-5

# {'stem': layer, 'stages': [[{'layers': [layer], 'shortcut': [] or [layer]}]],
#  'linear': {kernel, bias}, 'pixel_stats': {mean, std}}; a layer is {kernel, scale, offset, mean,
#  var}.
Variables = dict[str, Any]


def _convolve(x, layer, stride=1):
    """Convolves and normalises; odd sides are padded to stay (or be halved) as in PyTorch."""
    scale = layer['scale'] * jax.lax.rsqrt(layer['var'] + BATCH_NORM_EPSILON)
    kernel, pad = layer['kernel'] * scale, layer['kernel'].shape[0] // 2
    x = jax.lax.conv_general_dilated(
        x.astype(kernel.dtype),
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return x + (layer['offset'] - layer['mean'] * scale)


def _block(x, block, stride):
    *inner, last = block['layers']
    y = x
    for i, layer in enumerate(inner):
        # The first 3x3 convolution takes the stride: of a bottleneck that is the second layer.
        y = jax.nn.relu(_convolve(y, layer, stride if i == len(inner) - 1 else 1))
    for layer in block['shortcut']:
        x = _convolve(x, layer, stride)
    return jax.nn.relu(x + _convolve(y, last))


@promoting
def logits(variables: Variables, images: Array) -> Array:
    """Classifies images, each on its own.

    Args:
        variables: from `from_torchvision`.
        images: `[B, H, W, C]` in [0, 1], of any size.

    Returns:
        `[B, K]` logits.
    """
    stats = variables['pixel_stats']
    x = (images - stats['mean']) / stats['std']
    x = jax.nn.relu(_convolve(x, variables['stem'], 2))
    x = jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, 3, 3, 1),
        (1, 2, 2, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )
    for number, stage in enumerate(variables['stages']):
        for i, block in enumerate(stage):
            x = _block(x, block, 2 if number and not i else 1)
    linear = variables['linear']
    return x.mean(axis=(1, 2)) @ linear['kernel'] + linear['bias']


def depth(variables: Variables) -> int:
    """Returns the number of layers with weights, as in a ResNet's name."""
    blocks = [block for stage in variables['stages'] for block in stage]
    return 2 + sum(len(block['layers']) for block in blocks)


_NORM = {'scale': 'weight', 'offset': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def _count(names, prefix):
    """Returns how many parts the names with a prefix have."""
    parts = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({part.split('.')[0] for part in parts})


def _shapes(state_dict, channels):
    """Returns the arrays' shapes of a ResNet with that stem's width, blocks and classes."""
    shapes, stem = {}, np.shape(state_dict.get('conv1.weight', ()))
    inputs = width = stem[0] if stem else 64

    def layer(conv, norm, outputs, inputs, side):
        shapes[f'{conv}.weight'] = (outputs, inputs, side, side)
        shapes.update({f'{norm}.{name}': (outputs,) for name in _NORM.values()})

    layer('conv1', 'bn1', width, channels, 7)
    expansion = 4 if 'layer1.0.conv3.weight' in state_dict else 1
    for n in range(4):
        inner, outputs = width * 2**n, width * 2**n * expansion
        for i in range(max(1, _count(state_dict, f'layer{n + 1}.'))):
            prefix = f'layer{n + 1}.{i}'
            if expansion > 1:
                plan = [(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)]
            else:
                plan = [(inner, inputs, 3), (inner, inner, 3)]
            for j, shape in enumerate(plan, start=1):
                layer(f'{prefix}.conv{j}', f'{prefix}.bn{j}', *shape)
            if not i and (n or inputs != outputs):
                layer(f'{prefix}.downsample.0', f'{prefix}.downsample.1', outputs, inputs, 1)
            inputs = outputs
    classes = np.shape(state_dict.get('fc.weight', ()))[:1] or (1000,)
    return shapes | {'fc.weight': (*classes, inputs), 'fc.bias': classes}


def from_torchvision(
    state_dict: dict[str, np.ndarray],
    *,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Variables:
    """Converts the weights of torchvision's `resnet18`, `34`, `50`, `101` or `152`.

    Args:
        state_dict: `{name: NumPy array}`, see `vgg.from_torchvision`.
        mean, std: the normalisation that the weights were trained with, torchvision's by default.

    Raises:
        ValueError: if the dictionary isn't that of such a ResNet: by the names and the shapes of
            all arrays, of which the first convolution's width and the classes are free.
    """
    of = 'a torchvision ResNet'
    arrays = checks.weights(state_dict, _shapes(state_dict, len(mean)), of=of)

    def layer(conv, norm):
        statistics = {key: arrays[f'{norm}.{name}'] for key, name in _NORM.items()}
        return {'kernel': arrays[f'{conv}.weight'].transpose(2, 3, 1, 0)} | statistics

    def block(prefix):
        convs = [i for i in range(1, 4) if f'{prefix}.conv{i}.weight' in arrays]
        down = f'{prefix}.downsample'
        return {
            'layers': [layer(f'{prefix}.conv{i}', f'{prefix}.bn{i}') for i in convs],
            'shortcut': [layer(f'{down}.0', f'{down}.1')] if f'{down}.0.weight' in arrays else [],
        }

    variables = {
        'stem': layer('conv1', 'bn1'),
        'stages': [
            [block(f'layer{n}.{i}') for i in range(_count(arrays, f'layer{n}.'))]
            for n in range(1, 5)
        ],
        'linear': {'kernel': arrays['fc.weight'].T, 'bias': arrays['fc.bias']},
        'pixel_stats': {'mean': np.float32(mean), 'std': np.float32(std)},
    }
    return jax.tree.map(jnp.asarray, variables)
