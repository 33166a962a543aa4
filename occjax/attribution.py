"""Which pixels a class is read from: RISE's saliency, and scores of any saliency.

A saliency is high where pixels matter, and only its order counts for a score. An occlusion heat map
is the other way round, high where the covered pixels did *not* matter: pass `1 - heatmap`.

Images are floats in [0, 1], NHWC. Dimensions: B batch, H W C image, K classes, h w heatmap grid.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import checks, convolution, fills, occlusion, programs
from occjax.fills import Fill
from occjax.occlusion import ProgressFn, Sides
from occjax.types import Array, LogitsFn


class Curve(NamedTuple):
    """A class's probability while pixels change, the most salient first."""

    score: Array  # [B], the area under the curve, whose axis goes from 0 to 1
    curve: Array  # [B, steps + 1], from no pixel changed to all of them


@checks.checked(slack=checks.NEAR)
@programs.shared
def rise(
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    *,
    key: Array,
    masks: int = 4000,
    cells: Sides = 7,
    keep: float = 0.5,
    fill: Fill = 0.0,
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
) -> Array:
    """Returns the mean probability of each image's class over random masks that show a pixel.

    A mask is a small grid of zeros and ones, magnified bilinearly by one cell more than the image
    has and cut out at a random shift of less than a cell. All images see the same masks, and the
    saliency is `mean(probability * mask) / keep`.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically, each image on
            its own.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        classes: `[B]`, the class explained in each image.
        key: JAX random key.
        masks: how many, the paper's N; a forward pass of each image each.
        cells: of the small grid, the paper's h and w: as many for both sides, or (rows, columns).
        keep: probability that a cell is shown, the paper's p, in (0, 1].
        fill: what is there where nothing is shown, see `fills.of`. The paper's is 0; its code masks
            images that are normalized already, so that it is the mean of training.
        chunk_size: masked images that are seen at once, see `occlusion.occluded_logits`.
        progress: called with how many masks of all images are done, and how many there are, see
            `occlusion.map_chunks`.

    Returns:
        `[B, H, W]` saliencies.

    Raises:
        ValueError: if images, classes, fill or logits are not what they should be, see `checks`, or
            a number is out of its range.

    References:
        Petsiuk et al., https://arxiv.org/abs/1806.07421, §3
    """
    cells = checks.sides('cells', cells)
    covers = fills.of(fill, images)
    mask_fn = functools.partial(_mask, key, images.shape[1:3], cells, keep)

    def show_fn(image, number):
        shown = jax.vmap(mask_fn)(number)[..., None].astype(images.dtype)
        return shown * images[image] + (1 - shown) * covers[image]

    settings = dict(chunk_size=chunk_size, progress=progress)
    found = _probabilities(logits_fn, images, classes, show_fn, masks, **settings)
    return _weighed(found, mask_fn) / keep


def _mask(key, image_shape, cells, keep, number):
    """Returns one `[H, W]` mask, which its number draws."""
    grid_key, *shift_keys = jax.random.split(jax.random.fold_in(key, number), 3)
    sides = [math.ceil(side / count) for side, count in zip(image_shape, cells, strict=True)]
    shifts = [jax.random.randint(k, (), 0, n) for k, n in zip(shift_keys, sides, strict=True)]
    grid = jax.random.bernoulli(grid_key, keep, cells).astype(jnp.float32)
    magnified = [(count + 1) * n for count, n in zip(cells, sides, strict=True)]
    # Between the cells' centres linear, beyond the outermost ones flat.
    return jax.lax.dynamic_slice(jax.image.resize(grid, magnified, 'linear'), shifts, image_shape)


def _weighed(weights, mask_fn):
    """Returns the `[B, H, W]` means of masks, each times its weight of `[B, masks]`."""

    # To keep all masks for a gradient, or at all, takes gigabytes.
    @jax.checkpoint
    def add(total, some):
        number, weight = some
        mask = mask_fn(number).astype(total.dtype)
        return total + weight[:, None, None] * mask[None], None

    weights = weights.astype(jnp.float32) if weights.dtype.itemsize < 4 else weights
    numbers = jnp.arange(weights.shape[1], dtype=jnp.int32)
    shape = len(weights), *jax.eval_shape(mask_fn, numbers[0]).shape
    total, _ = jax.lax.scan(add, jnp.zeros(shape, weights.dtype), (numbers, weights.T))
    return total / len(numbers)


@checks.checked(slack=checks.NEAR, steps=checks.COUNT)
@programs.shared
def deletion(
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    saliency: Array,
    *,
    steps: int = 224,
    fill: Fill = 0.0,
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
) -> Curve:
    """Scores saliencies by how soon the class is lost as pixels are removed: lower is better.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically, each image on
            its own.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        classes: `[B]`, the class explained in each image.
        saliency: `[B, H, W]`, or `[B, h, w]` of other sides, magnified bilinearly as if its cells
            tiled the image; high where pixels matter, so of an occlusion heat map `1 - heatmap`.
            Of equal ones the first in reading order goes first.
        steps: in how many parts, equal up to a pixel, all pixels are removed: one forward pass an
            image each, and one before. The paper's is 224 at 224 pixels, rows' worth.
        fill: what is there instead, see `fills.of`; the paper's is 0.
        chunk_size: images that are seen at once, see `occlusion.occluded_logits`.
        progress: called with how many forms of all images are done, and how many there are, see
            `occlusion.map_chunks`.

    Returns:
        The score and the curve of each image; a score is the trapezoidal mean of its curve.

    Raises:
        ValueError: if images, classes, saliency, fill or logits are not what they should be, see
            `checks`, or there is no step.

    References:
        Petsiuk et al., https://arxiv.org/abs/1806.07421, §4.1
    """
    settings = dict(steps=steps, chunk_size=chunk_size, progress=progress)
    covers = fills.of(fill, images)
    return _curve(logits_fn, images, covers, classes, saliency, **settings)


@checks.checked(slack=checks.NEAR, steps=checks.COUNT)
@programs.shared
def insertion(
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    saliency: Array,
    *,
    steps: int = 224,
    fill: Fill = 'blur',
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
) -> Curve:
    """Scores saliencies by how soon the class is found as pixels are inserted: higher is better.

    Args:
        logits_fn, images, classes, saliency, steps, chunk_size, progress: see `deletion`.
        fill: what pixels are inserted into, see `fills.of`; the paper's is a blurred image.

    Returns:
        The score and the curve of each image, as `deletion` does.

    Raises:
        ValueError: as `deletion`.

    References:
        Petsiuk et al., https://arxiv.org/abs/1806.07421, §4.1
    """
    settings = dict(steps=steps, chunk_size=chunk_size, progress=progress)
    covers = fills.of(fill, images)
    return _curve(logits_fn, covers, images, classes, saliency, **settings)


def _curve(logits_fn, before, after, classes, saliency, *, steps, **settings):
    """Returns the curve from some images to others."""
    ranks = _ranks(saliency, before.shape)
    counts = jnp.asarray(np.arange(steps + 1) * math.prod(ranks.shape[1:]) // steps, jnp.int32)

    def show_fn(image, step):
        is_changed = ranks[image] < counts[step][:, None, None]
        return jnp.where(is_changed[..., None], after[image], before[image])

    curve = _probabilities(logits_fn, before, classes, show_fn, steps + 1, **settings)
    return Curve(score=(curve[:, :-1] + curve[:, 1:]).mean(axis=1) / 2, curve=curve)


def _ranks(saliency, images_shape):
    """Returns `[B, H, W]` places in the order of falling saliency, from 0."""
    saliency, shape = jnp.asarray(saliency), images_shape[:3]
    if saliency.ndim != 3 or len(saliency) != shape[0] or not saliency.size:
        raise ValueError(
            f'Expected saliency {list(shape)}, or a heat map [{shape[0]}, h, w] of it, got shape '
            f'{list(saliency.shape)}.'
        )
    if saliency.shape != shape:
        saliency = jax.image.resize(saliency, shape, 'linear')
    order = jnp.argsort(saliency.reshape(shape[0], -1), axis=-1, descending=True)
    return jnp.argsort(order, axis=-1).reshape(shape)


def _probabilities(logits_fn, images, classes, show_fn, count, *, chunk_size, progress):
    """Returns `[B, count]` probabilities of each image's class in as many forms of it."""
    is_traced = not isinstance(logits_fn, jax.stages.Compiled)
    logits_fn = convolution.accelerate(logits_fn)

    def seen(image, number):
        logits = logits_fn(show_fn(image, number))
        flags = checks.are_probabilities(logits)
        return occlusion.probabilities(logits, classes[image]), flags

    settings = dict(chunk_size=chunk_size, is_traced=is_traced, progress=progress)
    found, flags = occlusion.map_pairs(seen, images.shape, count, **settings)
    checks.warn_of_probabilities(flags)
    return found
