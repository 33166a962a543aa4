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
        ValueError: if the dictionary isn't that of such a ResNet.
    """
    arrays = {name: np.asarray(array, np.float32) for name, array in state_dict.items()}

    def layer(conv, norm):
        names = {'scale': 'weight', 'offset': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
        found = {key: arrays[f'{norm}.{name}'] for key, name in names.items()}
        return {'kernel': arrays[f'{conv}.weight'].transpose(2, 3, 1, 0)} | found

    def count(prefix):
        parts = (name.removeprefix(prefix) for name in arrays if name.startswith(prefix))
        return len({part.split('.')[0] for part in parts})

    def block(prefix):
        convs = [i for i in range(1, 4) if f'{prefix}.conv{i}.weight' in arrays]
        down = f'{prefix}.downsample'
        return {
            'layers': [layer(f'{prefix}.conv{i}', f'{prefix}.bn{i}') for i in convs],
            'shortcut': [layer(f'{down}.0', f'{down}.1')] if f'{down}.0.weight' in arrays else [],
        }

    try:
        variables = {
            'stem': layer('conv1', 'bn1'),
            'stages': [
                [block(f'layer{n}.{i}') for i in range(count(f'layer{n}.'))] for n in range(1, 5)
            ],
            'linear': {'kernel': arrays['fc.weight'].T, 'bias': arrays['fc.bias']},
            'pixel_stats': {'mean': np.float32(mean), 'std': np.float32(std)},
        }
    except KeyError as error:
        raise ValueError(
            f'Expected the state dict of a torchvision ResNet, which has {error}; got the names '
            f'{sorted(arrays)[:4]} ….'
        ) from None
    return jax.tree.map(jnp.asarray, variables)
