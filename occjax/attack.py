"""The fast gradient sign method and what it achieves (Goodfellow et al. 2015; paper §I, eq. 1).

Images are float32 in [0, 1], NHWC. Dimensions: B batch, H W C image, K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from occjax.types import Array, LogitsFn


class Outcome(NamedTuple):
    """What an attack did to each image."""

    correct_before: Array  # bool[B], the clean image was classified correctly
    successful: Array  # bool[B], correct before and wrong after (§III-C)
    predicted_after: Array  # i32[B], the class the attacked image is taken for


def fgsm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    epsilon: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Array:
    """Perturbs images by one signed gradient step (fast gradient sign method).

    The gradient is taken with respect to pixels, so `logits_fn` must do its own
    normalization; otherwise `epsilon` is not in pixel units.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically.
        images: `[B, H, W, C]` in [0, 1].
        labels: `[B]` integer classes whose loss is increased.
        epsilon: step size in pixel units.
        bounds: valid pixel range, or None to leave the step unclipped as in eq. (1).

    Returns:
        `[B, H, W, C]` adversarial images, at most `epsilon` (and float32's rounding of a sum)
        away in max norm. With `epsilon=0` they are `images`, bit for bit.

    Raises:
        ValueError: if `labels` is not one integer for each image.

    References:
        Goodfellow et al., https://arxiv.org/abs/1412.6572
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f'Expected {len(images)} integer labels, got {labels.dtype}{list(labels.shape)}.'
        )

    def total_loss(x):
        # Summed, not averaged: each image's gradient then ignores its batch.
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(x), labels).sum()

    adversarial = images + epsilon * jnp.sign(jax.grad(total_loss)(images))
    return adversarial if bounds is None else jnp.clip(adversarial, *bounds)


def outcome(clean_logits: Array, adversarial_logits: Array, labels: Array) -> Outcome:
    """Returns what an attack achieved, from the `[B, K]` logits before and after it."""
    correct_before = jnp.argmax(clean_logits, axis=-1) == labels
    predicted_after = jnp.argmax(adversarial_logits, axis=-1)
    return Outcome(correct_before, correct_before & (predicted_after != labels), predicted_after)


def sign_noise(
    images: Array,
    *,
    key: Array,
    epsilon: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Array:
    """Moves every pixel by epsilon, up or down at random: the size of FGSM's step, not its aim.

    Args:
        images: `[B, H, W, C]` in [0, 1].
        key: JAX random key.
        epsilon: in pixels.
        bounds: what pixels are clipped to, or None.

    Returns:
        `[B, H, W, C]`.
    """
    noisy = images + epsilon * jax.random.rademacher(key, images.shape, images.dtype)
    return noisy if bounds is None else jnp.clip(noisy, *bounds)
