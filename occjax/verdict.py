"""From an image to its verdict in one differentiable function: heat map, detector, threshold.

Dimensions: B batch, H W C image, K classes.
"""

from typing import Any

import jax.numpy as jnp

from occjax import detector, engine, vgg
from occjax.methods import Method
from occjax.types import Array, HeatmapSet


def margins(
    variables: vgg.Variables,
    bank: detector.Bank,
    thresholds: Array,
    images: Array,
    *,
    method: Method,
    plan: vgg.Plan,
    **settings: Any,
) -> Array:
    """Returns `[B]` scores less their thresholds: above 0 an image is called adversarial.

    Args:
        variables: of the classifier.
        bank: of detectors.
        thresholds: `[K]`, one for each class that the classifier may name.
        images: `[B, H, W, C]` in [0, 1].
        method: what the detectors see.
        plan: the plan that `variables` was made with.
        **settings: of `engine.occluded_logits`: engine, size, stride, fill, grid, chunk_size.
    """
    maps = HeatmapSet(
        logits=engine.occluded_logits(variables, images, plan=plan, **settings),
        unoccluded=vgg.logits(variables, images, plan=plan),
        # What follows is not known of an image in use, and no detector sees it.
        label=jnp.zeros(len(images), int),
        image_id=jnp.zeros(len(images), int),
        is_adversarial=jnp.zeros(len(images), bool),
    )
    scores = detector.score(bank, method.inputs_fn(maps), method.predicted(maps))
    return scores - jnp.asarray(thresholds)[maps.predicted]
