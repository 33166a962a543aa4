"""Attacks that know the detector: they fool the classifier and keep the detector silent.

A detector is a function `margin_fn` that maps `[B, H, W, C]` images to `[B]` margins, above 0 for
those that it calls adversarial: a score less its threshold. An image *evades* if it is classified
wrongly and not called adversarial. It then stays as it is, the others go on. All start at the
image itself, once; restarts can only help an attacker.

Images are float32 in [0, 1], NHWC. Dimensions: B batch, H W C image, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from occjax import attack, checks
from occjax.attack import PIXELS, Bounds, Number
from occjax.types import Array, LogitsFn

# One number, so that all images are looked at after their last step.
_STEPS = checks.Range(0, is_integer=True)

MarginFn = Callable[[Array], Array]  # maps [B, H, W, C] to [B], above 0 for adversarial


class Evasion(NamedTuple):
    """What an attack on classifier and detector reached."""

    images: Array  # f32[B, H, W, C]
    steps: Array  # i32[B], how many it took until the image evaded; -1 if it never did


@checks.checked(steps=_STEPS)
def joint_pgd(
    logits_fn: LogitsFn,
    margin_fn: MarginFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Number,
    steps: int,
    step_size: Number | None = None,
    weight: float = 1.0,
    bounds: Bounds = PIXELS,
) -> Evasion:
    """Climbs the classifier's loss minus `weight` times the detector's, by signed gradient steps.

    The classifier's loss is the cross-entropy with the label, the detector's the sigmoid
    cross-entropy of the margin with "clean".

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically.
        margin_fn: the detector, see above; differentiable.
        images: `[B, H, W, C]` in [0, 1].
        labels: `[B]` integer classes to get away from.
        epsilon: radius of the max norm ball, in pixels; one, or one for each image.
        steps: the most steps taken.
        step_size: length of a step; None takes `2.5 * epsilon / steps`.
        weight: λ, how much silence counts beside misclassification.
        bounds: valid pixel range, or None.

    Returns:
        The images, in the ball and in bounds, and the steps that each took.

    References:
        Carlini & Wagner, https://arxiv.org/abs/1705.07263
    """

    def direction_fn(pullback, is_wrong, odds, margins):
        # The slopes of the losses, 1 - p_label and weight * sigmoid(margin), over the larger one:
        # where classifier and detector are sure, both would underflow.
        slopes = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(margins) + jnp.log(weight)
        loss, silence = jax.nn.softmax(jnp.stack(slopes), axis=0)
        return pullback(loss, -silence)

    return _evade(
        logits_fn, margin_fn, images, labels, epsilon, steps, step_size, bounds, direction_fn
    )


@checks.checked(steps=_STEPS)
def selective_pgd(
    logits_fn: LogitsFn,
    margin_fn: MarginFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Number,
    steps: int,
    step_size: Number | None = None,
    bounds: Bounds = PIXELS,
) -> Evasion:
    """Climbs the classifier's loss until the class is wrong, else goes down the detector's margin.

    No weight between the two to choose, and neither is followed where it is already won. Unlike
    in the authors' code a class counts as wrong without a lead. Arguments and result are those of
    `joint_pgd`.

    References:
        Bryniarski et al., https://arxiv.org/abs/2106.15023, §3.1
    """

    def direction_fn(pullback, is_wrong, odds, margins):
        return pullback(jnp.where(is_wrong, 0.0, 1.0), jnp.where(is_wrong, -1.0, 0.0))

    return _evade(
        logits_fn, margin_fn, images, labels, epsilon, steps, step_size, bounds, direction_fn
    )


@checks.checked(steps=_STEPS)
def orthogonal_pgd(
    logits_fn: LogitsFn,
    margin_fn: MarginFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Number,
    steps: int,
    step_size: Number | None = None,
    bounds: Bounds = PIXELS,
) -> Evasion:
    """Moves as `selective_pgd` does, but at right angles to the gradient that it doesn't follow.

    What is won on one side is thus not given back on the other, to first order and before the
    sign is taken. Arguments and result are those of `joint_pgd`.

    References:
        Bryniarski et al., https://arxiv.org/abs/2106.15023, §3.2
    """

    def direction_fn(pullback, is_wrong, odds, margins):
        none, all_ = jnp.zeros_like(margins), jnp.ones_like(margins)
        loss, silence = pullback(all_, none), pullback(none, -all_)
        wanted = attack.select(is_wrong, silence, loss)
        return _reject(wanted, attack.select(is_wrong, loss, silence))

    return _evade(
        logits_fn, margin_fn, images, labels, epsilon, steps, step_size, bounds, direction_fn
    )


def _reject(vectors, others):
    """Returns each image's vector less its part along the other one; zero others change nothing."""
    others = attack.unit(others, order=2)
    return vectors - others * jnp.sum(vectors * others, axis=(1, 2, 3), keepdims=True)


def _evade(
    logits_fn, margin_fn, images, labels, epsilon, steps, step_size, bounds, direction_fn
) -> Evasion:
    """Takes signed steps along `direction_fn(pullback, is_wrong, odds, margins)` until all evade.

    `pullback(a, b)` is the gradient of `a * odds + b * margin`, each image's own.
    """
    dtype = images.dtype
    images = images.astype(jnp.promote_types(dtype, jnp.float32))
    logits_fn, margin_fn = (attack.widened(fn, dtype) for fn in (logits_fn, margin_fn))
    step_size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
    step_size = attack.per_image(step_size, images)

    def step(state):
        t, x, taken, _ = state

        def both(x):
            logits = logits_fn(x)
            rest = attack.is_wrong(logits, labels), checks.are_probabilities(logits)
            return (attack.log_odds(logits, labels), margin_fn(x)), rest

        (odds, margins), vjp, (is_wrong, flags) = jax.vjp(both, x, has_aux=True)
        taken = jnp.where((taken < 0) & is_wrong & (margins <= 0), t, taken)

        def pullback(a, b):
            return jnp.nan_to_num(vjp((a.astype(odds.dtype), b.astype(margins.dtype)))[0])

        direction = direction_fn(pullback, is_wrong, odds, margins)
        moved = x + step_size * jnp.sign(direction)
        moved = attack.project(moved, images, epsilon=epsilon, bounds=bounds)
        # The step after the last is there to look at what the last one reached.
        return t + 1, attack.select((taken < 0) & (t < steps), moved, x), taken, flags

    def is_going(state):
        t, _, taken, _ = state
        return (t <= steps) & (taken < 0).any()

    state = (0, images, jnp.full(len(images), -1), jnp.zeros(len(images), bool))
    _, found, taken, flags = jax.lax.while_loop(is_going, step, state)
    checks.warn_of_probabilities(flags)
    return Evasion(found.astype(dtype), taken)
