"""What covers a part of an image: numbers, an image, or by name one that is made of it.

Images are floats in [0, 1], `[..., H, W, C]`. Dimensions: H W C image.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from occjax import checks
from occjax.types import Array, promoting

# One number, `[C]` of them, an image, as many as there are, or one of `FILLS`.
Fill = float | str | Array


@promoting
def blur(images: Array, *, sigma: float) -> Array:
    """Returns images under a Gaussian of `sigma` pixels, cut at three of them; edges repeat."""
    images = checks.floats(images)
    checks.number('sigma', sigma, range=checks.NUMBERS['sigma'])
    reach = max(1, round(3 * sigma))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = images.shape[-3:-1]
    margins = [(0, 0)] * (images.ndim - 3) + [(reach, reach)] * 2 + [(0, 0)]
    padded = jnp.pad(images, margins, mode='edge')
    rows = sum(weight * padded[..., i : i + height, :, :] for i, weight in enumerate(weights))
    blurred = sum(weight * rows[..., i : i + width, :] for i, weight in enumerate(weights))
    return blurred.astype(images.dtype)


def _blurred(images):
    return blur(images, sigma=10 / 224 * min(images.shape[-3:-1]))


def _mean(images):
    return jnp.broadcast_to(images.mean(axis=(-3, -2), keepdims=True), images.shape)


FILLS: dict[str, Callable[[Array], Array]] = {'blur': _blurred, 'mean': _mean}


def of(fill: Fill, images: Array) -> Array:
    """Returns what covers a part of each image, as `[..., H, W, C]` images.

    Args:
        fill: numbers or images, see `checks.fill`; 'blur', each image under a Gaussian whose sigma
            is 10 pixels where the shorter side has 224, and in proportion to other sides; 'mean',
            each image's own mean, one a channel. Gradients go through the last two.
        images: `[..., H, W, C]`.

    Raises:
        ValueError: for another name, or numbers that do not fit the images.

    References:
        Fong & Vedaldi, https://arxiv.org/abs/1704.03296, for the blur.
    """
    images = checks.floats(images)
    if not isinstance(fill, str):
        return checks.fill(fill, images)
    if fill not in FILLS:
        choices = ', '.join(map(repr, FILLS))
        raise ValueError(f'Expected fill to be {choices}, numbers or images, got {fill!r}.')
    return FILLS[fill](images)
