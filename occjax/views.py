"""Views of an image: copies of it that a network should see alike, and an attack does not survive.

An occluded image is a view, and so are its blurred, shifted or noisy copies: each is one forward
pass, and a detector sees the logits of several. A view is a pure function of images.

Images are float32 in [0, 1], NHWC. Dimensions: B batch, H W C image, V views, K classes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from occjax import checks, comparators
from occjax.fills import blur
from occjax.types import Array, LogitsFn

View = Callable[[Array], Array]  # maps [B, H, W, C] images in [0, 1] to such


@checks.checked
def viewed_logits(logits_fn: LogitsFn, images: Array, views: Sequence[View]) -> Array:
    """Returns the logits of each image under each view, `[B, V, K]`; a forward pass each.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically, each image on
            its own.
        images: `[B, H, W, C]` in [0, 1].
        views: V functions of images.

    Raises:
        ValueError: if there is no view, or see `checks.images`.
    """
    if not views:
        raise ValueError('Expected at least one view, got none.')
    return jnp.stack([logits_fn(view(images)) for view in views], axis=1)


@checks.checked(slack=checks.NEAR)
def sharpen(images: Array, *, sigma: float) -> Array:
    """Returns images with what `blur` takes from them added once more."""
    return jnp.clip(2 * images - blur(images, sigma=sigma), 0, 1)


@checks.checked(slack=checks.NEAR)
def flip(images: Array) -> Array:
    """Returns images mirrored left to right."""
    return images[:, :, ::-1]


@checks.checked(slack=checks.NEAR)
def shift(images: Array, *, rows: int, columns: int) -> Array:
    """Returns images moved down and to the right; the edges that come in repeat the last pixel."""
    down, right = (
        jnp.clip(jnp.arange(side) - by, 0, side - 1)
        for side, by in zip(images.shape[1:3], (rows, columns), strict=True)
    )
    return images[:, down][:, :, right]


@checks.checked(slack=checks.NEAR)
def shrink(images: Array, *, factor: float) -> Array:
    """Returns images made smaller by a factor, each pixel an average, and large again."""
    sides = tuple(max(1, round(side / factor)) for side in images.shape[1:3])
    small = (len(images), *sides, images.shape[-1])
    return jax.image.resize(jax.image.resize(images, small, 'linear'), images.shape, 'linear')


@checks.checked(slack=checks.NEAR)
def round_bits(images: Array, *, bits: int) -> Array:
    """Returns pixels of a few bits, whose gradient is that of the images, not of steps: none.

    So an attacker who climbs gradients sees past the rounding, as one who knows of it would
    (BPDA, https://arxiv.org/abs/1802.00420).
    """
    return images + jax.lax.stop_gradient(comparators.squeeze_bits(images, bits=bits) - images)


@checks.checked(slack=checks.NEAR)
def grey(images: Array) -> Array:
    """Returns images of which every pixel has the mean of its channels in all of them."""
    return jnp.broadcast_to(images.mean(axis=-1, keepdims=True), images.shape)


@checks.checked(slack=checks.NEAR)
def noise(images: Array, *, seed: int, epsilon: float) -> Array:
    """Returns images of which every pixel is moved by `epsilon`, all by the same random signs."""
    signs = jax.random.rademacher(jax.random.key(seed), images.shape[1:], images.dtype)
    return jnp.clip(images + epsilon * signs, 0, 1)


# Those of `names.VIEWS` but for the first, MagNet's, which has weights: see `reconstruction`. Each
# costs a pass.
VIEWS: dict[str, View] = {
    'shift': functools.partial(shift, rows=1, columns=1),
    'shift_back': functools.partial(shift, rows=-1, columns=-1),
    'flip': flip,
    'blur': functools.partial(blur, sigma=0.5),
    'blur_more': functools.partial(blur, sigma=1.0),
    'sharpen': functools.partial(sharpen, sigma=0.8),
    'shrink': functools.partial(shrink, factor=2),
    'median': functools.partial(comparators.squeeze_median, size=2),
    'bits': functools.partial(round_bits, bits=2),
    'grey': grey,
    'noise': functools.partial(noise, seed=0, epsilon=8 / 255),
    'noise_more': functools.partial(noise, seed=1, epsilon=0.1),
}


def of_names(wanted: Sequence[str], autoencoder: Any = None) -> list[View]:
    """Returns the views of some of `names.VIEWS`; `reconstruction` needs a fitted autoencoder."""
    known = VIEWS | {'reconstruction': reconstruction(autoencoder)}
    return [known[name] for name in wanted]


def reconstruction(autoencoder: Any) -> View:
    """Returns the view that MagNet's autoencoder has of images, see `comparators`."""
    return functools.partial(comparators.Autoencoder().apply, autoencoder)
