"""Approximate occlusion heatmaps of a VGG: less arithmetic still than the incremental ones.

Two knobs, each exact at its default of 1. `threshold` stops the growth of what a window changes:
a convolution widens the patch that is computed again to no more than this share of its layer's
side, and beyond it the unoccluded activations replace the occluded ones (the projective field
threshold τ of Krypton; unlike there, the share is never taken from the patch that a layer is
given, only from what it adds). `every` computes every n-th window a side, the last one
included, and interpolates the logits of the others: windows overlap, so maps are smooth.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows, M maps.

References:
    Nakandala et al., https://adalabucsd.github.io/papers/2019_Krypton_SIGMOD.pdf
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from occjax import checks, incremental, occlusion, vgg
from occjax.types import Array


def _knots(count: int, every: int) -> list[int]:
    """Returns every n-th of `count` cells, and the last."""
    return sorted({*range(0, count, every), count - 1})


def _weights(count: int, knots: list[int]) -> np.ndarray:
    """Returns the `[count, knots]` matrix of a cubic interpolation that keeps the knots."""
    weights = np.zeros((count, len(knots)))
    for cell in range(count):
        # Lagrange's polynomial through the four nearest: unlike a spline's, its reach is bounded.
        first = np.clip(np.searchsorted(knots, cell, 'right') - 2, 0, max(0, len(knots) - 4))
        near = range(first, min(first + 4, len(knots)))
        for i in near:
            others = [knots[j] for j in near if j != i]
            weights[cell, i] = np.prod([(cell - x) / (knots[i] - x) for x in others])
    return weights.astype(np.float32)


def _regions(image_shape, *, size, stride, grid, plan, threshold, every):
    """Returns the patches of the windows that are computed, and the knots of each side."""
    if not 0 < threshold <= 1:
        raise ValueError(f'Expected 0 < threshold <= 1, got {threshold}.')
    if every < 1:
        raise ValueError(f'Expected every >= 1, got {every}.')
    geometry = dict(size=size, stride=stride, grid=grid)
    origins = occlusion.window_origins(image_shape, **geometry)
    h, w = occlusion.grid_shape(image_shape, **geometry)
    rows, columns = _knots(h, every), _knots(w, every)
    origins = origins.reshape(h, w, 2)[np.ix_(rows, columns)].reshape(-1, 2)
    regions = incremental.patches_at(
        image_shape, origins, size=size, plan=plan, threshold=threshold
    )
    return regions, (rows, columns), (h, w)


def flop_ratio(
    image_shape: tuple[int, int],
    *,
    size: int,
    stride: int,
    grid: str = 'paper',
    plan: vgg.Plan = vgg.VGG11,
    threshold: float = 1.0,
    every: int = 1,
    num_classes: int = 10,
    hidden: int = 4096,
    levels: int = 1,
) -> float:
    """Returns how many times fewer multiplications a map's windows take than in full.

    Args:
        image_shape: `(H, W)`.
        size, stride, grid: see `occlusion.occluded_logits`.
        plan: the VGG.
        threshold, every: see `occluded_logits`.
        num_classes, hidden, levels: see `vgg.init`; all its layers count on both sides.

    >>> round(flop_ratio((224, 224), size=32, stride=14, threshold=0.4), 1)
    8.4
    """
    head = dict(num_classes=num_classes, hidden=hidden, levels=levels)
    network = dict(image_shape=image_shape, plan=plan, **head)
    regions, (rows, columns), (h, w) = _regions(
        image_shape,
        size=size,
        stride=stride,
        grid=grid,
        plan=plan,
        threshold=threshold,
        every=every,
    )
    full = incremental.multiplications(incremental.full_shapes(image_shape, plan), **network)
    window = incremental.multiplications([patch.shape for patch in regions[1:]], **network)
    return full * h * w / (window * len(rows) * len(columns))


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
    threshold: float = 1.0,
    every: int = 1,
) -> Array:
    """Returns roughly `incremental.occluded_logits`; exactly, bit for bit, by default.

    Args:
        variables: of the VGG.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        size, stride, fill, grid, chunk_size, plan: see `incremental.occluded_logits`.
        threshold: share of a layer's side, in (0, 1], to which a convolution may widen what a
            window changes.
        every: how many grid cells a side there are for one that is computed.

    Returns:
        `[B, h, w, K]`.

    Raises:
        ValueError: as `incremental.occluded_logits`, and for a knob outside its range.
    """
    images = checks.images(images, slack=checks.NEAR)
    regions, knots, (h, w) = _regions(
        images.shape[1:3],
        size=size,
        stride=stride,
        grid=grid,
        plan=plan,
        threshold=threshold,
        every=every,
    )
    logits = incremental.logits_at(
        variables, images, regions, fill=fill, chunk_size=chunk_size, plan=plan
    )
    logits = logits.reshape(len(images), *map(len, knots), -1)
    if every == 1:
        return logits
    rows, columns = map(_weights, (h, w), knots)
    return jnp.einsum('bijk,hi,wj->bhwk', logits, rows, columns, precision='highest')


def heatmaps(variables: vgg.Variables, images: Array, classes: Array, **options: Any) -> Array:
    """Returns roughly `incremental.heatmaps`, `[B, h, w]`; the options are `occluded_logits`'."""
    images = checks.images(images, slack=checks.NEAR)
    classes = checks.classes(classes, images, vgg.num_classes(variables), name='classes')
    return occlusion.probabilities(occluded_logits(variables, images, **options), classes)


def ssim(first: np.ndarray, second: np.ndarray, *, window: int = 7) -> np.ndarray:
    """Returns the mean structural similarity of each pair of maps.

    As in Krypton and scikit-image: uniform windows wholly inside the map, unbiased variances,
    values that span [0, 1], K1 = 0.01 and K2 = 0.03.

    Args:
        first, second: `[M, h, w]`.
        window: side of the windows; in a smaller map the largest odd one that fits.

    Returns:
        `[M]`, 1 for equal maps.

    Raises:
        ValueError: if the maps' shapes differ or are no maps.

    References:
        Wang et al., https://ece.uwaterloo.ca/~z70wang/publications/ssim.pdf
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f'Expected two arrays [M, h, w], got {first.shape} and {second.shape}.')
    window = min(window, (min(first.shape[1:]) - 1) // 2 * 2 + 1)

    def mean(values):
        views = np.lib.stride_tricks.sliding_window_view(values, (window, window), axis=(1, 2))
        return views.mean(axis=(-2, -1))

    unbiased = window**2 / max(1, window**2 - 1)
    a, b = mean(first), mean(second)
    var_a, var_b = unbiased * (mean(first**2) - a**2), unbiased * (mean(second**2) - b**2)
    covariance = unbiased * (mean(first * second) - a * b)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * a * b + c1) / (a**2 + b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean(axis=(1, 2))


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns `[M]`, the rank correlation of each pair of `[M, h, w]` maps; nan for a constant."""
    from scipy.stats import rankdata  # comes with scikit-learn, which not every machine has

    ranks = [
        rankdata(maps.reshape(len(maps), -1), axis=1) for maps in map(np.asarray, (first, second))
    ]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, where=norms > 0, out=np.full(len(a), np.nan))
