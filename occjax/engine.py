"""The engines that make heat maps of a classifier, and what a map costs in each.

`full` runs every masked image through the network, `incremental` computes only what a window
changes. Their numbers differ in the last float bits, so the choice between them is a flag and no
config. `approximate` is incremental with knobs, and not exact: they are in the config.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.
"""

import math

import jax
import jax.numpy as jnp

from occjax import checks, convolution, incremental, names, occlusion, programs, tracing
from occjax.fills import Fill
from occjax.incremental import Plan
from occjax.occlusion import ProgressFn, Sides
from occjax.types import Array, LogitsFn

# Times fewer multiplications from which `incremental` pays. Cutting out and pasting is not among
# them, nor that it reads the weights of the last layers once for all windows: at 1.07 (VGG11 at 32
# pixels, windows of 15) it took 1.1 times less time.
_PAYS = 1.05
# On a TPU, by its compiler's estimate: 4.0 times faster where there is 6.0 times less to do (224
# pixels, windows of 32 at stride 14, 32 images), .8 to 1.1 times at 1.07; and slower than in full
# where windows are what is computed at once.
_PAYS_ON_TPU = 1.5

# What `occluded_logits` takes that is no array and no function.
SETTINGS = ('size', 'stride', 'grid', 'chunk_size', 'engine', 'threshold', 'every')


def choose(wanted: str, plan: Plan, count: int) -> str:
    """Returns the engine that `wanted` names; 'auto' takes the one with less to do.

    Args:
        wanted: 'auto', or the engine itself.
        plan: of the network, see `incremental.planned`.
        count: of images on a device.
    """
    if wanted != 'auto':
        return wanted
    least = _PAYS
    if occlusion.platform() == 'tpu':
        least = _PAYS_ON_TPU if incremental.loop_of(count) == 'images' else math.inf
    return 'incremental' if plan.ratio >= least and not plan.calls_host else 'full'


def occluded_logits(
    logits_fn: LogitsFn,
    images: Array,
    *,
    size: Sides,
    stride: Sides,
    fill: Fill = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
    engine: str = 'auto',
    threshold: float = 1.0,
    every: int = 1,
) -> Array:
    """Returns the classifier's logits under every window of every image.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically, each image on
            its own.
        images, size, stride, fill, grid, chunk_size, progress: see `occlusion.occluded_logits`.
        engine: 'full', 'incremental', 'approximate', or 'auto' for the one with less to do: what
            cannot be looked into, or calls the host, runs in full.
        threshold, every: of the approximate engine alone, see `incremental.occluded_logits`.

    Returns:
        `[B, h, w, K]`.

    Raises:
        ValueError: as `occlusion.occluded_logits`, for an unknown engine, and for a threshold or
            `every` that an exact one lacks.
    """
    images = checks.images(images, slack=checks.NEAR)
    if engine != 'approximate' and (threshold, every) != (1, 1):
        raise ValueError(
            f'threshold {threshold} and every {every} make approximate maps: expected '
            f"engine 'approximate', got {engine!r}."
        )
    if engine not in ('auto', *names.ENGINES):
        raise ValueError(f"Expected engine 'auto' or one of {names.ENGINES}, got {engine!r}.")
    settings = dict(size=size, stride=stride, grid=grid, chunk_size=chunk_size, progress=progress)
    settings |= dict(engine=engine, threshold=threshold, every=every)
    arrays = [images]
    if isinstance(fill, str):
        settings['fill'] = fill
    else:
        checks.fill(fill, images)
        arrays.append(jnp.asarray(fill, images.dtype))
    return programs.run(_occluded_logits, checks.logits_fn(logits_fn), *arrays, **settings)


def _occluded_logits(logits_fn, images, fill, *, engine, threshold, every, **settings):
    """Returns `occluded_logits`, of arguments that are checked."""
    if engine == 'auto':
        geometry = {name: settings[name] for name in ('size', 'stride', 'grid')}
        if plan := _plan_that_pays(logits_fn, images, geometry):
            few = {name: settings[name] for name in ('size', 'chunk_size', 'progress')}
            return incremental.evaluate(plan, images, fill=fill, **few)
        engine = 'full'
    settings |= dict(fill=fill)
    if engine != 'full':
        return incremental.occluded_logits(
            logits_fn, images, threshold=threshold, every=every, **settings
        )
    return occlusion.occluded_logits(convolution.accelerate(logits_fn), images, **settings)


def _plan_that_pays(logits_fn, images, geometry):
    """Returns the plan of any function; None where it runs in full."""
    if isinstance(logits_fn, jax.stages.Compiled):
        return None
    occlusion.window_origins(images.shape[1:3], **geometry)  # Mistakes of these are told first.
    try:
        traced = incremental.traced(logits_fn, images.shape[1:], images.dtype)
    except Exception:  # Whatever a function raises of a single image, if not in full.
        return None
    plan = incremental.plan_of(tracing.program(*traced), **geometry)
    return plan if choose('auto', plan, len(images)) == 'incremental' else None


def heatmaps(
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    *,
    size: Sides,
    stride: Sides,
    fill: Fill = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
    engine: str = 'auto',
    threshold: float = 1.0,
    every: int = 1,
) -> Array:
    """Returns the probability of each image's class while each window is covered.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically, each image on
            its own.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        classes: `[B]`, the class explained in each image, in the paper the predicted one.
        size, stride, fill, grid, chunk_size, progress: see `occlusion.occluded_logits`.
        engine, threshold, every: see `occluded_logits`; `choose` tells what 'auto' takes.

    Returns:
        `[B, h, w]` heatmaps in [0, 1].

    Raises:
        ValueError: as `occluded_logits`, and if `classes` is not one class for each image.
    """
    settings = dict(size=size, stride=stride, fill=fill, grid=grid, chunk_size=chunk_size)
    settings |= dict(progress=progress, engine=engine, threshold=threshold, every=every)
    return occlusion.heatmaps_by(occluded_logits, logits_fn, images, classes, **settings)


def flops_per_map(engine: str, plan: Plan) -> int:
    """Returns the additions and multiplications of a map's convolutions and matrix products.

    They follow from shapes alone: whatever form a convolution takes on a device, it counts as
    2 · sides of the kernel · inputs · outputs a pixel.

    Args:
        engine: 'full', 'incremental' or 'approximate'.
        plan: of the network, see `incremental.planned`.
    """
    once = 2 * sum(map(incremental.multiplications, plan.program.operations))
    windows = math.prod(plan.grid)
    if engine == 'full':
        return windows * once
    return round(windows * once / plan.ratio) + once  # And the unoccluded image once.
