"""Attacks on a classifier, and what they achieve: FGSM (paper §I, eq. 1) and others of its field.

Images are float32 in [0, 1], NHWC. Dimensions: B batch, H W C image, K classes.

Of every attack: the result is in its ball and in `bounds`; with `epsilon=0` it is `images`, bit for
bit; no image sees its batch, only draws depend on its position. `epsilon`, `step_size` and `decay`
are one number or one for each image, `steps` one integer or one for each.

Gradients are those of the logarithm of the other classes' odds, logsumexp(z_others) - z_label: the
direction of the cross-entropy's gradient, which is (1 - p_label) times this and underflows where a
network is confident. Where a gradient is NaN its pixel stays.

Images out of `bounds` and labels that are no class are refused where their values are known; under
`jit` such an image moves no further out, and such a label makes all classes the others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from occjax import checks
from occjax.types import Array, LogitsFn

Bounds = tuple[float, float] | None
Count = int | Array  # i32[] or i32[B]
Number = float | Array  # f32[], f32[B] or f32[B, 1, 1, 1]

PIXELS = (0.0, 1.0)


class Outcome(NamedTuple):
    """What an attack did to each image."""

    correct_before: Array  # bool[B], the clean image was classified correctly
    successful: Array  # bool[B], correct before and wrong after (§III-C)
    predicted_after: Array  # i32[B], the class predicted for the attacked image


def fgsm(
    logits_fn: LogitsFn, images: Array, labels: Array, *, epsilon: Number, bounds: Bounds = PIXELS
) -> Array:
    """Perturbs images by one signed gradient step (fast gradient sign method).

    The gradient is taken with respect to pixels, so `logits_fn` must do its own
    normalization; otherwise `epsilon` is not in pixel units.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically.
        images: `[B, H, W, C]` in [0, 1].
        labels: `[B]` integer classes whose loss is increased.
        epsilon: step size in pixel units, one or `[B]`.
        bounds: valid pixel range, or None to leave the step unclipped as in eq. (1).

    Returns:
        `[B, H, W, C]` adversarial images, at most `epsilon` (and float32's rounding of a sum)
        away in max norm. With `epsilon=0` they are `images`, bit for bit.

    Raises:
        ValueError: if the images are integers, NaN or out of bounds, `labels` not one class for
            each, `epsilon` negative, or what `logits_fn` returns no logits; see `checks`.

    References:
        Goodfellow et al., https://arxiv.org/abs/1412.6572
    """
    images, labels, epsilon = _checked(images, labels, epsilon, bounds)
    step = epsilon * jnp.sign(_gradient(logits_fn, images, labels))
    return _clip(images + step, images, bounds)


def targeted_fgsm(
    logits_fn: LogitsFn, images: Array, targets: Array, *, epsilon: Number, bounds: Bounds = PIXELS
) -> Array:
    """Perturbs images as `fgsm` does, but by a step that lowers the loss of classes `targets`.

    References:
        Kurakin et al., https://arxiv.org/abs/1611.01236
    """
    images, targets, epsilon = _checked(images, targets, epsilon, bounds)
    step = epsilon * jnp.sign(_gradient(logits_fn, images, targets))
    return _clip(images - step, images, bounds)


def fgsm_l2(
    logits_fn: LogitsFn, images: Array, labels: Array, *, epsilon: Number, bounds: Bounds = PIXELS
) -> Array:
    """Perturbs images as `fgsm` does, but along each gradient, by `epsilon` in L2 norm.

    Clipping comes after the step and shortens it. A zero gradient leaves its image.

    References:
        Dong et al., https://arxiv.org/abs/1710.06081, eq. (2)
    """
    images, labels, epsilon = _checked(images, labels, epsilon, bounds)
    direction = unit(_gradient(logits_fn, images, labels), order=2)
    return _clip(images + epsilon * direction, images, bounds)


def bim(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images by signed gradient steps (basic iterative method, I-FGSM).

    Arguments, result and errors are those of `fgsm`, and:

    Args:
        epsilon: radius of the max norm ball to which each step is projected.
        steps: number of steps; an image with its own stops there, others go on.
        step_size: length of a step; None takes `epsilon / steps`.

    References:
        Kurakin et al., https://arxiv.org/abs/1607.02533
    """
    return _ascend(logits_fn, images, labels, epsilon, steps, step_size, bounds)


def pgd(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    key: Array,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `bim` does, from a random start (projected gradient descent).

    Image `b` starts uniformly in its ball, by `fold_in(key, b)`. `step_size=None` takes
    `2.5 * epsilon / steps`, with which every start can reach the far side.

    References:
        Madry et al., https://arxiv.org/abs/1706.06083
    """
    images, labels, epsilon = _checked(images, labels, epsilon, bounds)
    noise = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:], images.dtype, -1, 1))
    start = _clip(images + epsilon * noise(_keys(key, images)), images, bounds)
    return _ascend(
        logits_fn, images, labels, epsilon, steps, step_size, bounds, start=start, reach=2.5
    )


def mi_fgsm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    decay: Number = 1.0,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `bim` does, by signs of accumulated gradients (momentum I-FGSM).

    Each image's gradient is divided by its L1 norm, as in the paper, and added to `decay` times
    what there was. torchattacks divides by the mean, which changes no sign; foolbox adds signs.

    References:
        Dong et al., https://arxiv.org/abs/1710.06081
    """
    return _ascend(logits_fn, images, labels, epsilon, steps, step_size, bounds, decay=decay)


def square(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    key: Array,
    epsilon: Number,
    steps: Count,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images by random squares that lower the margin, without gradients (Square Attack).

    Step 0 puts vertical stripes of ±`epsilon`, which stay; each later step tries a square of one
    sign a channel, ever smaller, and keeps it if the label's logit then leads by less. A square
    that would change nothing is negated (the authors draw again). Images that are misclassified
    before, or once they are, stay as they are.

    Arguments, result and errors are those of `bim`, and:

    Args:
        key: a JAX random key; image `b` draws by `fold_in(key, b)`.
        steps: number of forward passes after that of `images` themselves.

    References:
        Andriushchenko et al., https://arxiv.org/abs/1912.00049
    """
    images, labels, epsilon = _checked(images, labels, epsilon, bounds)
    height, width, channels = images.shape[1:]
    steps = jnp.broadcast_to(checks.count('steps', steps), len(images))
    keys = _keys(key, images)

    def attempt(t, key, image, best, epsilon, steps):
        sign_key, row_key, column_key = jax.random.split(jax.random.fold_in(key, t), 3)
        # The share of pixels in a square halves at these of 10,000 steps, or in proportion.
        halvings = jnp.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]) * steps // 10_000
        share = 0.8 * 0.5 ** jnp.sum(t - 1 > halvings).astype(image.dtype)
        side = jnp.round(jnp.sqrt(share * height * width)).astype(int)
        side = jnp.clip(side, 1, min(height, width))

        def span(key, length):
            offset = jnp.arange(length) - jax.random.randint(key, (), 0, length - side + 1)
            return (t == 0) | (offset >= 0) & (offset < side)

        inside = span(row_key, height)[:, None, None] & span(column_key, width)[None, :, None]
        signs = jax.random.rademacher(sign_key, (1, width, channels), image.dtype)
        step = epsilon * jnp.where(t == 0, signs, signs[:, :1])
        new, negated = (
            jnp.where(inside, _clip(image + delta, image, bounds), best) for delta in (step, -step)
        )
        return jnp.where((new == best).all(), negated, new)

    def step(t, state):
        new = jax.vmap(attempt, (None, 0, 0, 0, 0, 0))(t, keys, images, state[0], epsilon, steps)
        new = (new, _margin(logits_fn, new, labels))
        return _select((t == 0) | (new[1] < state[1]), new, state)

    first = images, _margin(logits_fn, images, labels)
    return _iterate(step, first, steps, lambda state: state[1] < 0)[0]


def _margin(logits_fn, images, labels):
    """Returns by how much each label's logit leads, `[B]`; negative if and only if it does not."""
    logits = checks.logits_fn(logits_fn, labels)(images)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    lead = logits.max(-1, where=is_label, initial=-jnp.inf)
    lead -= logits.max(-1, where=~is_label, initial=-jnp.inf)
    # Ties fall as in `outcome`.
    return lead - (jnp.argmax(logits, -1) != labels).astype(lead.dtype)


def sign_noise(images: Array, *, key: Array, epsilon: float, bounds: Bounds = PIXELS) -> Array:
    """Moves every pixel by epsilon, up or down at random: the size of FGSM's step, not its aim.

    Args:
        images: `[B, H, W, C]` in [0, 1].
        key: JAX random key.
        epsilon: in pixels.
        bounds: what pixels are clipped to, or None.

    Returns:
        `[B, H, W, C]`.
    """
    images = checks.images(images, bounds)
    epsilon = _per_image(checks.number('epsilon', epsilon), images)
    noise = jax.random.rademacher(key, images.shape, images.dtype)
    return _clip(images + epsilon * noise, images, bounds)


def outcome(clean_logits: Array, adversarial_logits: Array, labels: Array) -> Outcome:
    """Returns what an attack achieved, from the `[B, K]` logits before and after it.

    Logits with a NaN among them predict nothing: they are neither correct nor a success.
    """
    are_numbers, become_numbers = (
        ~jnp.isnan(logits).any(axis=-1) for logits in (clean_logits, adversarial_logits)
    )
    correct_before = are_numbers & (jnp.argmax(clean_logits, axis=-1) == labels)
    predicted_after = jnp.argmax(adversarial_logits, axis=-1)
    successful = correct_before & become_numbers & (predicted_after != labels)
    return Outcome(correct_before, successful, predicted_after)


def _checked(images, labels, epsilon, bounds):
    """Returns the three as arrays, epsilon as `[B, 1, 1, 1]`, if they are what they should be."""
    images = checks.images(images, bounds)
    epsilon = _per_image(checks.number('epsilon', epsilon), images)
    return images, checks.classes(labels, images), epsilon


def _per_image(value, images):
    """Returns one number, or one for each image, as `[B, 1, 1, 1]`."""
    value = jnp.asarray(value, images.dtype).reshape(-1, 1, 1, 1)
    return jnp.broadcast_to(value, (len(images), 1, 1, 1))


def _keys(key, images):
    """Returns a key for each position in the batch, the same in every batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))


def _gradient(logits_fn, images, labels):
    """Returns each image's gradient of its own `odds`, 0 where it is NaN."""

    def total_loss(x):
        # Summed, not averaged: each image's gradient then ignores its batch.
        return odds(checks.logits_fn(logits_fn, labels)(x), labels).sum()

    return jnp.nan_to_num(jax.grad(total_loss)(images))


def odds(logits: Array, labels: Array) -> Array:
    """Returns `[B]` logarithms of the odds of all other classes, logsumexp(z_others) - z_label.

    Its gradient has the direction of the cross-entropy's, without the factor 1 - p_label, which
    float32 rounds to 0 where the label leads by 17 and more.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return others - jnp.sum(jnp.where(is_label, logits, 0), axis=-1)


def unit(gradient: Array, *, order: int) -> Array:
    """Divides each image's `[B, H, W, C]` gradient by its norm; a zero gradient stays zero."""
    # By the largest entry first: squares of a confident model's tiny gradients underflow.
    largest = jnp.abs(gradient).max(axis=(1, 2, 3), keepdims=True)
    scaled = gradient / jnp.maximum(largest, jnp.finfo(gradient.dtype).tiny)
    norm = jnp.linalg.norm(scaled.reshape(len(scaled), -1), ord=order, axis=-1)
    return scaled / jnp.maximum(norm, 1).reshape(-1, 1, 1, 1)


def project(images: Array, centre: Array, *, epsilon: Number, bounds: Bounds) -> Array:
    """Returns `[B, H, W, C]` images clipped to the max norm ball around `centre`, and to bounds."""
    return _clip(jnp.clip(images, centre - epsilon, centre + epsilon), centre, bounds)


def _clip(moved, images, bounds):
    """Returns what was moved in bounds; pixels that were out of them before go no further out."""
    if bounds is None:
        return moved
    low, high = (jnp.asarray(bound, images.dtype) for bound in bounds)
    return jnp.clip(moved, jnp.minimum(images, low), jnp.maximum(images, high))


def _select(chosen, new, old):
    """Returns the state whose rows are new where `chosen`, `[B]`."""
    return jax.tree.map(functools.partial(jax.vmap(jnp.where), chosen), new, old)


def _iterate(step, state, steps, is_done=lambda state: jnp.bool_(False)):
    """Repeats `state = step(t, state)`, each row for its own number of steps or until done."""

    def active(t, state):
        return (t < steps) & ~is_done(state)

    def body(carry):
        t, state = carry
        return t + 1, _select(active(t, state), step(t, state), state)

    return jax.lax.while_loop(lambda carry: active(*carry).any(), body, (0, state))[1]


def _ascend(
    logits_fn, images, labels, epsilon, steps, step_size, bounds, *, start=None, reach=1, decay=None
):
    """Climbs the loss by signed steps in the ball, which by default add up to `reach` radii."""
    images, labels, epsilon = _checked(images, labels, epsilon, bounds)
    steps = jnp.broadcast_to(checks.count('steps', steps), len(images))
    if step_size is None:
        step_size = reach * epsilon / _per_image(jnp.maximum(steps, 1), images)
    step_size = _per_image(checks.number('step_size', step_size), images)

    def step(_, state):
        adversarial, before = state
        direction = _gradient(logits_fn, adversarial, labels)
        if decay is not None:
            kept = _per_image(checks.number('decay', decay), images) * before
            direction = kept + unit(direction, order=1)
        moved = adversarial + step_size * jnp.sign(direction)
        return project(moved, images, epsilon=epsilon, bounds=bounds), direction

    state = (images if start is None else start, jnp.zeros_like(images))
    return _iterate(step, state, steps)[0]
