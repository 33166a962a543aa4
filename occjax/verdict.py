"""From an image to its verdict in one differentiable function: heat map, detector, threshold.

Dimensions: B batch, H W C image, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from occjax import convolution, detector, engine
from occjax.methods import Method
from occjax.types import Array, HeatmapSet, LogitsFn
from occjax.views import View, viewed_logits


def observe(
    logits_fn: LogitsFn,
    images: Array,
    *,
    method: Method,
    views: Sequence[View] = (),
    top_classes: int = 0,
    compare_fn: Callable[[LogitsFn, Array], Array] | None = None,
    **settings: Any,
) -> HeatmapSet:
    """Returns what detectors of a method see of images; the arguments are those of `margins`.

    And `compare_fn`, which returns `[B, 3]` scores that need no heat map, see `comparators.scores`.
    """
    plain_fn = convolution.accelerate(logits_fn)
    unoccluded = plain_fn(images)
    windows = jnp.zeros((len(images), 0, 0, unoccluded.shape[-1]), unoccluded.dtype)
    if method.windows:
        windows = engine.occluded_logits(logits_fn, images, **settings)
    maps = HeatmapSet(
        logits=windows,
        unoccluded=unoccluded,
        views=viewed_logits(plain_fn, images, views) if views else None,
        comparators=compare_fn(plain_fn, images) if compare_fn else None,
        # What follows is not known of an image in use, and no detector sees it.
        label=jnp.zeros(len(images), int),
        image_id=jnp.zeros(len(images), int),
        is_adversarial=jnp.zeros(len(images), bool),
    )
    return maps.condensed(top_classes)


@functools.partial(jax.jit, static_argnames='method')
def effects(bank: detector.Bank, maps: HeatmapSet, *, method: Method) -> Array:
    """Returns `[M, h, w]`: by how much each window raised a score, in the score's own units.

    That is the score less what it would be had this window changed nothing, its logits being those
    of the unoccluded image.
    """
    h, w = maps.logits.shape[1:3]

    def score(logits):
        return method.score(bank, dataclasses.replace(maps, logits=logits))

    def without(window):
        here = (jnp.arange(h * w) == window).reshape(h, w, 1)
        return score(jnp.where(here, maps.columns[:, None, None], maps.logits))

    changes = score(maps.logits) - jax.lax.map(without, jnp.arange(h * w))
    return changes.T.reshape(len(maps), h, w)


def margins(
    logits_fn: LogitsFn,
    bank: detector.Bank,
    thresholds: Array,
    images: Array,
    *,
    method: Method,
    views: Sequence[View] = (),
    **settings: Any,
) -> Array:
    """Returns `[B]` scores less their thresholds: above 0 an image is called adversarial.

    Args:
        logits_fn: the classifier, see `engine.occluded_logits`.
        bank: of detectors.
        thresholds: `[K]`, one for each class that the classifier may name.
        images: `[B, H, W, C]` in [0, 1].
        method: what the detectors see.
        views: those of images that they see beside the windows.
        **settings: `top_classes`, if the detectors see condensed maps, see `types.condense`; and
            those of `engine.occluded_logits`: engine, size, stride, fill, grid, chunk_size.
    """
    maps = observe(logits_fn, images, method=method, views=views, **settings)
    return method.score(bank, maps) - jnp.asarray(thresholds)[maps.predicted]
