"""The engines that make heat maps of a VGG, and what a map costs in each.

`full` runs every masked image through the network, `incremental` computes only what a window
changes. Their numbers differ in the last float bits, so the choice between them is a flag and no
config. `approximate` is not exact: what it leaves out is in the config.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.
"""

import math
from typing import Any

import jax

from occjax import approximate, incremental, occlusion, vgg
from occjax.types import Array

# Times fewer multiplications from which `incremental` pays. Cutting out and pasting is not among
# them: on CPU 1.1 times fewer took 0.9 to 1.1 times less time, 1.2 took 1.15, 1.4 took 1.35; and
# compiling takes twice as long.
_PAYS = 1.2


def choose(wanted: str, image_shape: tuple[int, int], *, plan: vgg.Plan, **geometry: Any) -> str:
    """Returns the engine that `wanted` names; 'auto' takes the one with less to do.

    Args:
        wanted: 'auto', or the engine itself.
        image_shape: `(H, W)`.
        plan: the VGG.
        **geometry: size, stride and grid, see `occlusion.grid_shape`.
    """
    if wanted != 'auto':
        return wanted
    ratio = incremental.flop_ratio(image_shape, plan=plan, **geometry)
    return 'incremental' if ratio >= _PAYS else 'full'


def occluded_logits(
    variables: vgg.Variables, images: Array, *, engine: str, plan: vgg.Plan, **settings: Any
) -> Array:
    """Returns `[B, h, w, K]` logits under every window, as `occlusion.occluded_logits` does.

    Args:
        variables: of the VGG.
        images: `[B, H, W, C]` in [0, 1].
        engine: 'full', 'incremental' or 'approximate'.
        plan: the plan that `variables` was made with.
        **settings: size, stride, fill, grid and chunk_size, see `occlusion.occluded_logits`, and
            of the approximate engine its knobs.
    """
    if engine != 'full':
        module = approximate if engine == 'approximate' else incremental
        return module.occluded_logits(variables, images, plan=plan, **settings)

    def features_fn(images):
        return vgg.features(variables, images, plan=plan)

    # The first linear layer's weights may be hundreds of megabytes: they are read once for all
    # windows of all images, not once a chunk.
    features = occlusion.occluded_outputs(features_fn, images, **settings)
    shape = jax.eval_shape(features_fn, images[:1]).shape[1:]
    logits = vgg.head(variables, features.reshape(-1, *shape))
    return logits.reshape(*features.shape[:3], -1)


def flops_per_map(
    engine: str,
    image_shape: tuple[int, int],
    *,
    plan: vgg.Plan,
    num_classes: int = 10,
    hidden: int = 4096,
    levels: int = 1,
    **geometry: Any,
) -> int:
    """Returns the additions and multiplications of a map's convolutions and linear layers.

    They follow from shapes alone: whatever form a convolution takes on a device, it counts as
    2 · 9 · inputs · outputs a pixel.

    Args:
        engine: 'full', 'incremental' or 'approximate'.
        image_shape: `(H, W)`.
        plan: the VGG.
        num_classes, hidden, levels: see `vgg.init`.
        **geometry: size, stride and grid, see `occlusion.grid_shape`, and of the approximate
            engine its knobs.

    >>> flops_per_map('full', (224, 224), plan=vgg.VGG11, size=32, stride=14) // 196 // 2
    7605035008
    """
    head = dict(num_classes=num_classes, hidden=hidden, levels=levels, plan=plan)
    shapes = incremental.full_shapes(image_shape, plan)
    once = 2 * incremental.multiplications(shapes, image_shape=image_shape, **head)
    where = {name: value for name, value in geometry.items() if name not in ('threshold', 'every')}
    windows = math.prod(occlusion.grid_shape(image_shape, **where))
    if engine == 'full':
        return windows * once
    module = approximate if engine == 'approximate' else incremental
    # And the unoccluded image once.
    return round(windows * once / module.flop_ratio(image_shape, **geometry, **head)) + once
