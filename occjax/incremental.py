"""Exact occlusion heatmaps of a VGG at a fraction of the arithmetic.

A window changes only what it can reach: its own pixels, one more on each side after every
convolution, half as many after every pool. So the unoccluded image is classified once, and for
each window just that patch of every layer is computed again, pasted into a slice of the
unoccluded layer before it. XLA needs patches of one shape: a layer's is the largest over all
windows, and those near an edge move inwards until it fits, which computes some unchanged values
again but no wrong ones. The linear layers see whole feature maps.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.

References:
    Nakandala et al., https://adalabucsd.github.io/papers/2019_Krypton_SIGMOD.pdf
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import occlusion, vgg
from occjax.convolution import conv3x3
from occjax.types import Array


_DEFAULT_CHUNK = 28


class Patch(NamedTuple):
    """Where a layer's output changes: `shape` is one for all windows, `start` is each one's own."""

    shape: tuple[int, int]
    start: np.ndarray  # i32[P, 2], row and column


def patches(
    image_shape: tuple[int, int], *, size: int, stride: int, grid: str = 'paper', plan=vgg.VGG11
) -> list[Patch]:
    """Returns the occluder itself and then the patch of each layer of the plan."""
    start = occlusion.window_origins(image_shape, size=size, stride=stride, grid=grid)
    stop, sides = start + size, np.array(image_shape)
    result = [Patch((size, size), start)]
    for layer in plan:
        if layer == 'M':
            sides = sides // 2
            start, stop = start // 2, np.minimum(-(-stop // 2), sides)
        else:
            start, stop = np.maximum(start - 1, 0), np.minimum(stop + 1, sides)
        shape = (stop - start).max(axis=0)
        start = np.minimum(start, sides - shape)
        stop = start + shape
        result.append(Patch(tuple(map(int, shape)), start.astype(np.int32)))
    return result


def flop_ratio(
    image_shape: tuple[int, int], *, size: int, stride: int, grid: str = 'paper', plan=vgg.VGG11,
    num_classes: int = 10, hidden: int = 4096,
) -> float:
    """Returns how many times fewer multiplications a window takes than in full, from shapes alone.

    Args:
        image_shape: `(H, W)`.
        size, stride, grid: see `occlusion.occluded_logits`.
        plan: the VGG.
        num_classes, hidden: of its linear layers, which count on both sides.

    >>> round(flop_ratio((224, 224), size=32, stride=14), 1)
    6.0
    """
    rows = vgg.summary(image_size=image_shape, num_classes=num_classes, hidden=hidden, plan=plan)
    linear = sum(row.parameters - row.output_shape[1] for row in rows if 'Linear' in row.layer)
    full, incremental, inputs, sides = linear, linear, 3, np.array(image_shape)
    regions = patches(image_shape, size=size, stride=stride, grid=grid, plan=plan)[1:]
    for layer, patch in zip(plan, regions, strict=True):
        if layer == 'M':
            sides = sides // 2
        else:
            full += math.prod(map(int, sides)) * 9 * inputs * layer
            incremental += math.prod(patch.shape) * 9 * inputs * layer
            inputs = layer
    return full / incremental


def occluded_logits(
    variables: vgg.Variables,
    images: Array,
    *,
    size: int,
    stride: int,
    fill: float | Array = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    plan: vgg.Plan = vgg.VGG11,
) -> Array:
    """Returns `occlusion.occluded_logits` of `vgg.logits`, computing only what a window changes.

    Args:
        variables: of the VGG.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        size, stride, fill, grid: see `occlusion.occluded_logits`.
        chunk_size: windows that are computed at once; None chooses for the device.
        plan: the plan that `variables` was made with.

    Returns:
        `[B, h, w, K]`, equal to the plain form's up to the rounding of sums.

    Raises:
        ValueError: as `occlusion.occluded_logits` and `vgg.logits`.
    """
    images = occlusion.check_images(images)
    origins = occlusion.window_origins(images.shape[1:3], size=size, stride=stride, grid=grid)
    regions = patches(images.shape[1:3], size=size, stride=stride, grid=grid, plan=plan)
    inputs, features = _unoccluded(variables, images, plan)
    fill = vgg.normalize(variables, jnp.broadcast_to(jnp.asarray(fill, images.dtype), images.shape))

    def features_of(pair):
        """Returns the last feature map under each of a chunk of (image, window) pairs."""
        image, window = pair // len(origins), pair % len(origins)
        layers = vgg.layers(variables, plan)
        patch = regions[0]
        start = jnp.asarray(patch.start)[window]
        x = _cut(fill, image, start, patch.shape)
        for width, before, patch in zip(plan, inputs, regions[1:], strict=True):
            scale, margin = (2, 0) if width == 'M' else (1, 1)
            # Rows and columns that this layer's patch is computed from; of an odd side the pool
            # drops the last, which the patch before may hold.
            odd = [scale - 1 and side % 2 for side in before.shape[1:3]]
            shape = [scale * side + 2 * margin + o for side, o in zip(patch.shape, odd, strict=True)]
            corner = scale * jnp.asarray(patch.start)[window]
            before = jnp.pad(before, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
            x = _paste(_cut(before, image, corner, shape), x, start - corner + margin)
            x = vgg.max_pool(x) if width == 'M' else vgg.conv_block(x, *next(layers), padding='VALID')
            start = jnp.asarray(patch.start)[window]
        return _paste(features[image], x, start)

    mapped = occlusion.map_chunks(
        features_of, len(images) * len(origins), chunk_size=chunk_size or _DEFAULT_CHUNK
    )
    logits = vgg.head(variables, mapped)
    grid_shape = occlusion.grid_shape(images.shape[1:3], size=size, stride=stride, grid=grid)
    return logits.reshape(len(images), *grid_shape, -1)


def _unoccluded(variables, images, plan):
    """Returns the input of every layer and the output of the last."""
    x, layers, inputs = vgg.normalize(variables, images), vgg.layers(variables, plan), []
    for width in plan:
        inputs.append(x)
        x = vgg.max_pool(x) if width == 'M' else vgg.conv_block(x, *next(layers))
    return inputs, x


def _cut(x, image, corner, shape):
    """Returns `[n, *shape, C]` pieces of `[B, H, W, C]`, from each one's image and corner."""

    def one(image, corner):
        return jax.lax.dynamic_slice(x, (image, *corner, 0), (1, *shape, x.shape[-1]))[0]

    return jax.vmap(one)(image, corner)


def _paste(onto, x, corner):
    """Returns `onto` with `x` at each one's corner."""
    return jax.vmap(lambda o, x, c: jax.lax.dynamic_update_slice(o, x, (*c, 0)))(onto, x, corner)


def heatmaps(
    variables: vgg.Variables,
    images: Array,
    classes: Array,
    *,
    size: int,
    stride: int,
    fill: float | Array = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    plan: vgg.Plan = vgg.VGG11,
) -> Array:
    """Returns `occlusion.heatmaps` of `vgg.logits`: `[B, h, w]`; see `occluded_logits`."""
    geometry = dict(size=size, stride=stride, fill=fill, grid=grid, chunk_size=chunk_size)
    classes = occlusion.check_classes(images, classes)
    return occlusion.probabilities(occluded_logits(variables, images, **geometry, plan=plan), classes)
