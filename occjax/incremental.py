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

from occjax import checks, occlusion, vgg
from occjax.types import Array


class Patch(NamedTuple):
    """Where a layer's output changes: `shape` is one for all windows, `start` is each one's own."""

    shape: tuple[int, int]
    start: np.ndarray  # i32[P, 2], row and column


def patches(
    image_shape: tuple[int, int],
    *,
    size: int,
    stride: int,
    grid: str = 'paper',
    plan: vgg.Plan = vgg.VGG11,
) -> list[Patch]:
    """Returns the occluder itself and then the patch of each layer of the plan."""
    origins = occlusion.window_origins(image_shape, size=size, stride=stride, grid=grid)
    return patches_at(image_shape, origins, size=size, plan=plan)


def patches_at(
    image_shape: tuple[int, int],
    origins: np.ndarray,
    *,
    size: int,
    plan: vgg.Plan,
    threshold: float = 1.0,
) -> list[Patch]:
    """Returns the patches of windows at any `origins`; see `approximate` for the threshold."""
    start, width, sides = origins, np.array([size, size]), np.array(image_shape)
    result = [Patch((size, size), start)]
    for layer in plan:
        if layer == 'M':
            sides = sides // 2
            low, stop = start // 2, np.minimum(-(-(start + width) // 2), sides)
            width = (stop - low).max(axis=0)
            start = np.minimum(low, sides - width)
        else:
            low, stop = np.maximum(start - 1, 0), np.minimum(start + width + 1, sides)
            exact = (stop - low).max(axis=0)
            # What is there already stays: a patch never has less than its input's share of it.
            grown = np.maximum(np.minimum(exact, np.floor(threshold * sides)), width).astype(int)
            start = np.clip(start - (grown - width) // 2, 0, sides - grown)
            width = grown
        result.append(Patch(tuple(map(int, width)), start.astype(np.int32)))
    return result


def multiplications(
    shapes: list[tuple[int, int]], *, image_shape: tuple[int, int], **network
) -> int:
    """Returns those of one forward pass whose layers' outputs have the given shapes."""
    rows = vgg.summary(image_size=image_shape, **network)
    total = sum(row.parameters - row.output_shape[1] for row in rows if 'Linear' in row.layer)
    channels = 3 * network.get('levels', 1)
    for layer, shape in zip(network['plan'], shapes, strict=True):
        if layer != 'M':
            total += math.prod(shape) * 9 * channels * layer
            channels = layer
    return total


def full_shapes(image_shape: tuple[int, int], plan: vgg.Plan) -> list[tuple[int, int]]:
    """Returns the height and width of each layer's output for a whole image."""
    shapes, (height, width) = [], image_shape
    for layer in plan:
        if layer == 'M':
            height, width = height // 2, width // 2
        shapes.append((height, width))
    return shapes


def flop_ratio(
    image_shape: tuple[int, int],
    *,
    size: int,
    stride: int,
    grid: str = 'paper',
    plan: vgg.Plan = vgg.VGG11,
    num_classes: int = 10,
    hidden: int = 4096,
    levels: int = 1,
) -> float:
    """Returns how many times fewer multiplications a window takes than in full, from shapes alone.

    Args:
        image_shape: `(H, W)`.
        size, stride, grid: see `occlusion.occluded_logits`.
        plan: the VGG.
        num_classes, hidden, levels: see `vgg.init`; all its layers count on both sides.

    >>> round(flop_ratio((224, 224), size=32, stride=14), 1)
    6.0
    """
    network = dict(num_classes=num_classes, hidden=hidden, levels=levels, plan=plan)
    regions = patches(image_shape, size=size, stride=stride, grid=grid, plan=plan)[1:]
    full = multiplications(full_shapes(image_shape, plan), image_shape=image_shape, **network)
    shapes = [patch.shape for patch in regions]
    return full / multiplications(shapes, image_shape=image_shape, **network)


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
    images = checks.images(images, slack=checks.NEAR)
    geometry = dict(size=size, stride=stride, grid=grid)
    origins = occlusion.window_origins(images.shape[1:3], **geometry)
    regions = patches_at(images.shape[1:3], origins, size=size, plan=plan)
    logits = logits_at(variables, images, regions, fill=fill, chunk_size=chunk_size, plan=plan)
    return logits.reshape(len(images), *occlusion.grid_shape(images.shape[1:3], **geometry), -1)


def logits_at(
    variables: vgg.Variables,
    images: Array,
    regions: list[Patch],
    *,
    fill: float | Array,
    chunk_size: int | None,
    plan: vgg.Plan,
) -> Array:
    """Returns the `[B, P, K]` logits under the windows whose patches are given."""
    inputs, features = _unoccluded(variables, images, plan)
    fill = vgg.normalize(variables, checks.fill(fill, images))
    shapes = [patch.shape for patch in regions]
    starts = [jnp.asarray(patch.start) for patch in regions]
    windows = len(starts[0])

    def features_of(pair):
        """Returns the last feature map under each of a chunk of (image, window) pairs."""
        image, window = pair // windows, pair % windows
        layers, corners = vgg.layers(variables, plan), [start[window] for start in starts]
        x = _cut(fill, image, corners[0], shapes[0])
        steps = zip(plan, inputs, shapes[1:], corners, corners[1:], strict=False)
        for layer, before, shape, old, new in steps:
            if layer == 'M':
                # The pool drops the last of an odd side, which the patch before may hold.
                around = [
                    2 * k + side % 2 for k, side in zip(shape, before.shape[1:], strict=False)
                ]
                x = vgg.max_pool(_paste(_cut(before, image, 2 * new, around), x, old - 2 * new))
            else:
                # `before` is padded by one, so `new` there is the corner of the patch's inputs.
                around = [k + 2 for k in shape]
                x = _paste(_cut(before, image, new, around), x, old + 1 - new)
                x = vgg.conv_block(x, *next(layers), padding='VALID')
        return _paste(features[image], x, corners[-1])

    # The linear layers read hundreds of megabytes of weights: once for all chunks.
    mapped = occlusion.map_chunks(
        features_of,
        len(images) * windows,
        chunk_size=chunk_size or occlusion.default_chunk(images.shape[1:]),
    )
    return vgg.head(variables, mapped).reshape(len(images), windows, -1)


def _unoccluded(variables, images, plan):
    """Returns every layer's input, for convolutions padded by one, and the output of the last."""
    x, layers, inputs = vgg.normalize(variables, images), vgg.layers(variables, plan), []
    for layer in plan:
        if layer != 'M':
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        inputs.append(x)
        x = vgg.max_pool(x) if layer == 'M' else vgg.conv_block(x, *next(layers), padding='VALID')
    return inputs, x


def _cut(x, image, corner, shape):
    """Returns `[n, *shape, C]` pieces of `[B, H, W, C]`, from each one's image and corner."""

    def one(image, corner):
        start = (image, *corner, jnp.zeros_like(image))
        return jax.lax.dynamic_slice(x, start, (1, *shape, x.shape[-1]))[0]

    return jax.vmap(one)(image, corner)


def _paste(onto, x, corner):
    """Returns `onto` with `x` at each one's corner."""

    def one(onto, x, corner):
        return jax.lax.dynamic_update_slice(onto, x, (*corner, jnp.zeros_like(corner[0])))

    return jax.vmap(one)(onto, x, corner)


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
    images = checks.images(images, slack=checks.NEAR)
    classes = checks.classes(classes, images, vgg.num_classes(variables), name='classes')
    logits = occluded_logits(variables, images, **geometry, plan=plan)
    return occlusion.probabilities(logits, classes)
