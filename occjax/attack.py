"""Attacks on a classifier, and what they achieve: FGSM (paper §I, eq. 1) and others of its field.

Images are float32 in [0, 1], NHWC. Dimensions: B batch, H W C image, K classes.

Of every attack: the result is in its ball and in `bounds`; with `epsilon=0` it is `images`, bit for
bit; no image sees its batch, only draws depend on its position. `epsilon`, `step_size` and `decay`
are one number or one for each image, `steps` one integer or one for each. `labels=None` takes the
classes that are predicted for the images.

Those that climb a loss take it as `loss_fn`, which maps `[B, K]` logits and `[B]` labels to `[B]`.
By default it is `log_odds`, logsumexp(z_others) - z_label: its gradient has the direction of the
cross-entropy's, which is (1 - p_label) times this and underflows where a network is confident.
Where a gradient is NaN its pixel stays.

Of images in half precision the arithmetic is float32's, the network sees them in their own type,
and so is the result.

Images out of `bounds`, an `epsilon` that no two images are apart and labels that are no class are
refused where their values are known; under `jit` such an image moves no further out, and such a
label makes all classes the others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from occjax import checks, convolution, programs, tracing
from occjax.checks import PIXELS
from occjax.types import Array, LogitsFn

Bounds = tuple[float, float] | None
Count = int | Array  # i32[] or i32[B]
Number = float | Array  # f32[], f32[B] or f32[B, 1, 1, 1]
LossFn = Callable[[Array, Array], Array]  # maps [B, K] logits and [B] labels to [B]


# At these of 10,000 steps, or in proportion, the share of pixels in a square of `square` halves.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Outcome(NamedTuple):
    """What an attack did to each image."""

    correct_before: Array  # bool[B], the clean image was classified correctly
    successful: Array  # bool[B], correct before and wrong after (§III-C)
    predicted_after: Array  # i32[B], the class predicted for the attacked image


def widened(fn: Callable[[Array], Array], dtype: Any) -> Callable[[Array], Array]:
    """Returns a function that shows `fn` images of a type, and returns float32 or wider."""

    def wide(images):
        found = fn(images.astype(dtype))
        return found.astype(jnp.promote_types(found.dtype, jnp.float32))

    return wide


def _attack(fn=None, **settings):
    """Returns an attack whose arguments are checked, and whose arithmetic is float32's or wider.

    The network runs in the forms of `convolution.accelerate`, which a loop on a CPU needs most, and
    eager calls share compiled programs, see `programs`.
    """
    if fn is None:
        return functools.partial(_attack, **settings)

    @functools.partial(checks.checked, **settings)
    @programs.shared
    @functools.wraps(fn)
    def attack(logits_fn, images, labels, **numbers):
        dtype, logits_fn = images.dtype, convolution.accelerate(logits_fn)
        wide = images.astype(jnp.promote_types(dtype, jnp.float32))
        return fn(widened(logits_fn, dtype), wide, labels, **numbers).astype(dtype)

    return attack


def log_odds(logits: Array, labels: Array) -> Array:
    """Returns `[B]` logarithms of the odds of all other classes, logsumexp(z_others) - z_label.

    Its gradient has the direction of the cross-entropy's, without the factor 1 - p_label, which
    float32 rounds to 0 where the label leads by 17 and more.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return others - jnp.sum(jnp.where(is_label, logits, 0), axis=-1)


def dlr(logits: Array, labels: Array) -> Array:
    """Returns `[B]` differences of logits ratios, (max z_others - z_label) / (z_1 - z_3).

    z_1 and z_3 are the largest and the third largest logit; K >= 3. No scale of the logits changes
    it.

    References:
        Croce & Hein, https://arxiv.org/abs/2003.01690, §5
    """
    if logits.shape[-1] < 3:
        raise ValueError(
            f'Expected logits of three classes or more for dlr, got {logits.shape[-1]}: take '
            'log_odds.'
        )
    largest = jax.lax.top_k(logits, 3)[0]
    return -_lead(logits, labels) / jnp.maximum(largest[:, 0] - largest[:, 2], 1e-12)


@_attack
def fgsm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    epsilon: Number,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images by one signed gradient step (fast gradient sign method).

    The gradient is taken with respect to pixels, so `logits_fn` must do its own
    normalization; otherwise `epsilon` is not in pixel units.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically.
        images: `[B, H, W, C]` in [0, 1].
        labels: `[B]` integer classes whose loss is increased; None takes the predicted ones.
        epsilon: step size in pixel units, one or `[B]`.
        loss_fn: see above.
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
    epsilon = per_image(epsilon, images)
    step = epsilon * jnp.sign(_climb(logits_fn, loss_fn, images, labels).gradient)
    return _clip(images + step, images, bounds)


@_attack
def targeted_fgsm(
    logits_fn: LogitsFn,
    images: Array,
    targets: Array,
    *,
    epsilon: Number,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `fgsm` does, but by a step that lowers the loss of classes `targets`.

    References:
        Kurakin et al., https://arxiv.org/abs/1611.01236
    """
    epsilon = per_image(epsilon, images)
    step = epsilon * jnp.sign(_climb(logits_fn, loss_fn, images, targets).gradient)
    return _clip(images - step, images, bounds)


@_attack(order=2)
def fgsm_l2(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    epsilon: Number,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `fgsm` does, but along each gradient, by `epsilon` in L2 norm.

    Clipping comes after the step and shortens it. A zero gradient leaves its image.

    References:
        Dong et al., https://arxiv.org/abs/1710.06081, eq. (2)
    """
    epsilon = per_image(epsilon, images)
    direction = unit(_climb(logits_fn, loss_fn, images, labels).gradient, order=2)
    return _clip(images + epsilon * direction, images, bounds)


@_attack
def bim(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    loss_fn: LossFn = log_odds,
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
    settings = dict(epsilon=epsilon, steps=steps, step_size=step_size, bounds=bounds)
    return _ascend(logits_fn, loss_fn, images, labels, **settings)


@_attack
def pgd(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    key: Array,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `bim` does, from a random start (projected gradient descent).

    Image `b` starts uniformly in its ball, by `fold_in(key, b)`. `step_size=None` takes
    `2.5 * epsilon / steps`, with which every start can reach the far side.

    References:
        Madry et al., https://arxiv.org/abs/1706.06083
    """

    def start_fn(images, epsilon):
        return _clip(images + epsilon * _uniform(key, images), images, bounds)

    settings = dict(epsilon=epsilon, steps=steps, step_size=step_size, bounds=bounds)
    return _ascend(logits_fn, loss_fn, images, labels, **settings, start_fn=start_fn, reach=2.5)


@_attack(order=2)
def pgd_l2(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    key: Array,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `pgd` does, in a ball of L2 norm: steps go along each gradient.

    Image `b` starts uniformly in its ball, by `fold_in(key, b)`; `epsilon` is the ball's radius,
    `step_size` a length, both in L2 norm.

    References:
        Madry et al., https://arxiv.org/abs/1706.06083
    """

    def inside(key, image):
        along, out = jax.random.split(key)
        direction = jax.random.normal(along, image.shape, image.dtype)
        return direction, jax.random.uniform(out, (), image.dtype) ** (1 / image.size)

    def start_fn(images, epsilon):
        direction, radius = jax.vmap(inside)(_keys(key, images), images)
        step = epsilon * radius[:, None, None, None] * unit(direction, order=2)
        return project(images + step, images, epsilon=epsilon, bounds=bounds, order=2)

    settings = dict(epsilon=epsilon, steps=steps, step_size=step_size, bounds=bounds)
    settings |= dict(start_fn=start_fn, reach=2.5, order=2)
    return _ascend(logits_fn, loss_fn, images, labels, **settings)


@_attack
def mi_fgsm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    epsilon: Number,
    steps: Count,
    step_size: Number | None = None,
    decay: Number = 1.0,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images as `bim` does, by signs of accumulated gradients (momentum I-FGSM).

    Each image's gradient is divided by its L1 norm, as in the paper, and added to `decay` times
    what there was. torchattacks divides by the mean, which changes no sign; foolbox adds signs.

    References:
        Dong et al., https://arxiv.org/abs/1710.06081
    """
    settings = dict(epsilon=epsilon, steps=steps, step_size=step_size, bounds=bounds)
    return _ascend(logits_fn, loss_fn, images, labels, **settings, decay=decay)


class _Apgd(NamedTuple):
    """Where an image of `apgd` is; all `[B]` or `[B, H, W, C]`."""

    here: '_Climb'
    before: Array  # the image a step ago
    best: '_Climb'  # of the largest loss
    found: Array  # the last image that was misclassified, or the first
    is_found: Array
    step: Array  # its length
    rises: Array  # since the last checkpoint
    due: Array  # the step of the next checkpoint
    gap: Array  # from the last checkpoint to it
    reference: Array  # the largest loss at the last checkpoint
    was_halved: Array  # then


@_attack
def apgd(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    key: Array,
    epsilon: Number,
    steps: Count,
    loss_fn: LossFn = log_odds,
    bounds: Bounds = PIXELS,
) -> Array:
    """Perturbs images by steps with momentum that halve where the loss stalls (Auto-PGD).

    Image `b` starts at random on its ball's surface, by `fold_in(key, b)`. Steps of 2 `epsilon`
    halve at checkpoints where less than three quarters of the steps since the last one climbed, or
    nothing was won since, and then go on from the best image. `loss_fn=log_odds` takes the same
    steps as the cross-entropy, a rising function of it; `dlr` is the other of AutoAttack's.

    Arguments and errors are those of `bim`. `steps + 1` gradients.

    Returns:
        `[B, H, W, C]`, the last image that was misclassified, or where none was the one of the
        largest loss.

    References:
        Croce & Hein, https://arxiv.org/abs/2003.01690
    """
    epsilon = per_image(epsilon, images)
    steps = _counts(steps, images)
    # Of `steps`: the first gap, by how much the next are shorter, and the shortest.
    first, less, least = (jnp.maximum(share(steps, n, 100), 1) for n in (22, 3, 6))
    project_fn = functools.partial(project, centre=images, epsilon=epsilon, bounds=bounds)
    look = functools.partial(_climb, logits_fn, loss_fn, labels=labels)
    noise = _uniform(key, images)
    noise /= jnp.abs(noise).max(axis=(1, 2, 3), keepdims=True)
    start = look(_clip(images + epsilon * noise, images, bounds))
    state = _Apgd(
        here=start,
        before=start.images,
        best=start,
        found=start.images,
        is_found=start.is_wrong,
        step=2 * epsilon,
        rises=jnp.zeros_like(steps),
        due=first,
        gap=first,
        reference=start.loss,
        was_halved=jnp.ones(len(images), bool),
    )

    step = functools.partial(_apgd_step, look, project_fn, less, least)
    state = _iterate(step, state, steps)
    return select(state.is_found, state.found, state.best.images)


def _apgd_step(look, project_fn, less, least, t, at):
    """Takes a step, and at a checkpoint halves the next ones or not."""
    x = at.here.images
    share = jnp.where(t == 0, 1.0, 0.75).astype(x.dtype)
    ahead = project_fn(x + at.step * jnp.sign(at.here.gradient))
    here = look(project_fn(x + share * (ahead - x) + (1 - share) * (x - at.before)))
    best = select(here.loss > at.best.loss, here, at.best)
    rises = at.rises + (here.loss > at.here.loss)
    is_due = at.due == t + 1
    stalls = ~at.was_halved & (at.reference >= best.loss)
    halves = is_due & (stalls | (rises <= 0.75 * at.gap))
    gap = jnp.where(is_due, jnp.maximum(at.gap - less, least), at.gap)
    return _Apgd(
        here=select(halves, best, here),
        before=x,
        best=best,
        found=select(here.is_wrong, here.images, at.found),
        is_found=at.is_found | here.is_wrong,
        step=select(halves, at.step / 2, at.step),
        rises=jnp.where(is_due, 0, rises),
        due=jnp.where(is_due, at.due + gap, at.due),
        gap=gap,
        reference=jnp.where(is_due, best.loss, at.reference),
        was_halved=jnp.where(is_due, halves, at.was_halved),
    )


@_attack
def square(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
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
    epsilon = per_image(epsilon, images)
    height, width, channels = images.shape[1:]
    steps = _counts(steps, images)
    keys = _keys(key, images)

    def attempt(t, key, image, best, epsilon, steps):
        sign_key, row_key, column_key = jax.random.split(jax.random.fold_in(key, t), 3)
        halvings = share(steps, jnp.array(_HALVINGS), 10_000)
        part = 0.8 * 0.5 ** jnp.sum(t - 1 > halvings).astype(image.dtype)
        side = jnp.round(jnp.sqrt(part * height * width)).astype(int)
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
        return select((t == 0) | (new[1] < state[1]), new, state)

    first = images, _margin(logits_fn, images, labels)
    return _iterate(step, first, steps, lambda state: state[1] < 0)[0]


def _margin(logits_fn, images, labels):
    """Returns by how much each label's logit leads, `[B]`; negative if and only if it does not."""
    logits = logits_fn(images)
    checks.warn_of_probabilities(checks.are_probabilities(logits))
    # Ties fall as in `outcome`.
    lead = _lead(logits, labels)
    return lead - is_wrong(logits, labels).astype(lead.dtype)


def _lead(logits, labels):
    """Returns `[B]`, by how much the label's logit exceeds the largest of the others."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    lead = logits.max(-1, where=is_label, initial=-jnp.inf)
    return lead - logits.max(-1, where=~is_label, initial=-jnp.inf)


@_attack
def carlini_wagner(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    steps: int,
    binary_search_steps: int = 9,
    learning_rate: float = 0.01,
    initial_const: float = 1e-3,
    confidence: float = 0.0,
    bounds: tuple[float, float] = PIXELS,
) -> Array:
    """Finds a misclassified image that is near in L2 norm, by Adam (Carlini & Wagner).

    Minimises the squared distance plus a constant times the label's lead, in variables of which
    the tanh is in bounds; each image's constant grows tenfold until it succeeds, then by bisection.

    Args:
        logits_fn, images, labels: see `fgsm`.
        steps, learning_rate: of Adam for each constant.
        binary_search_steps, initial_const: how many constants are tried, and the first.
        confidence: by which another logit must lead.
        bounds: lowest and highest pixel.

    Returns:
        `[B, H, W, C]`, the nearest misclassified images that were met; the images if none was.

    References:
        Carlini & Wagner, https://arxiv.org/abs/1608.04644, §VI.A
    """
    if bounds is None:
        raise ValueError('Expected bounds (lowest, highest) of pixels, which the tanh needs.')
    low, high = bounds

    def to_pixels(w):
        return low + (high - low) * (jnp.tanh(w) + 1) / 2

    # At the bounds themselves the inverse is infinite.
    edge = 1 - max(1e-6, float(jnp.finfo(images.dtype).eps))
    centre = jnp.arctanh(edge * jnp.clip(2 * (images - low) / (high - low) - 1, -1, 1))
    anchor = to_pixels(centre)

    def loss(delta, const):
        x = to_pixels(centre + delta)
        lead = _lead(logits_fn(x), labels) + confidence
        total = jnp.sum((x - anchor) ** 2) + jnp.sum(const * jnp.maximum(lead, 0))
        return total, (x, lead < 0)

    def search(state, _):
        const, below, above, nearest = state
        nearest, is_found = _descend(loss, images, optax.adam(learning_rate), steps, const, nearest)
        below, above = jnp.where(is_found, below, const), jnp.where(is_found, const, above)
        const = jnp.where(jnp.isinf(above), const * 10, (below + above) / 2)
        return (const, below, above, nearest), None

    are_wrong = _margin(logits_fn, images, labels) <= -1 - confidence  # The lead is one higher.
    one = jnp.ones(len(images), images.dtype)
    nearest = images, jnp.where(are_wrong, 0, jnp.inf * one)
    state = initial_const * one, 0 * one, jnp.inf * one, nearest
    return jax.lax.scan(search, state, length=binary_search_steps)[0][3][0]


def _descend(loss, images, optimizer, steps, const, nearest):
    """Returns the nearest misclassified images, and whether each search met one."""

    def step(state, _):
        delta, opt_state, nearest, is_found = state
        gradient, (x, is_wrong) = jax.grad(loss, has_aux=True)(delta, const)
        updates, opt_state = optimizer.update(jnp.nan_to_num(gradient), opt_state)
        norm = jnp.linalg.norm((x - images).reshape(len(x), -1), axis=-1)
        nearest = select(is_wrong & (norm < nearest[1]), (x, norm), nearest)
        return (delta + updates, opt_state, nearest, is_found | is_wrong), None

    delta = jnp.zeros_like(images)
    state = delta, optimizer.init(delta), nearest, jnp.zeros(len(images), bool)
    return jax.lax.scan(step, state, length=steps)[0][2:]


@_attack
def deepfool(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    steps: Count,
    overshoot: float = 0.02,
    candidates: int = 10,
    bounds: Bounds = PIXELS,
) -> Array:
    """Steps over the nearest boundary of a network that is taken to be linear (DeepFool, L2).

    Args:
        logits_fn, images, labels: see `fgsm`.
        steps: the most linearisations, one or one for each image, which stops once misclassified.
        overshoot: share by which the way is lengthened.
        candidates: classes that are stepped towards, the likeliest of each image.
        bounds: valid pixel range, or None.

    Returns:
        `[B, H, W, C]`.

    References:
        Moosavi-Dezfooli et al., https://arxiv.org/abs/1511.04599
    """
    steps = _counts(steps, images)
    logits = logits_fn(images)
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    others = jax.lax.top_k(others, min(candidates, logits.shape[-1] - 1))[1]

    def behind(x):
        """Returns by how much each `[B, candidates]` logit is behind the label's."""
        logits = logits_fn(x)
        label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        gap = label - jnp.take_along_axis(logits, others, axis=-1)
        return gap, is_wrong(logits, labels)

    def step(_, state):
        total, x, _ = state
        gap, pullback, _ = jax.vjp(behind, x, has_aux=True)
        one = jnp.eye(gap.shape[1], dtype=gap.dtype)[:, None] * jnp.ones((1, len(gap), 1))
        slopes = -jax.vmap(lambda cotangent: pullback(cotangent)[0])(one)
        slopes = jnp.nan_to_num(jnp.moveaxis(slopes, 0, 1))
        norm = jnp.sqrt(jnp.sum(slopes**2, axis=(2, 3, 4)))
        distance = jnp.abs(gap) / jnp.maximum(norm, 1e-8)
        nearest = jnp.argmin(jnp.where(norm > 0, distance, jnp.inf), axis=1)
        rows = jnp.arange(len(gap)), nearest
        # The addition steps over boundaries that are met exactly.
        length = (distance[rows] + 1e-4) / jnp.maximum(norm[rows], 1e-8)
        total += length[:, None, None, None] * slopes[rows]
        moved = _clip(images + (1 + overshoot) * total, images, bounds)
        return total, moved, behind(moved)[1]

    state = jnp.zeros_like(images), images, behind(images)[1]
    return _iterate(step, state, steps, lambda state: state[2])[1]


@checks.checked(bounds=None)
def minimal_epsilon(
    attack_fn: Callable[..., Array],
    logits_fn: LogitsFn,
    images: Array,
    labels: Array | None = None,
    *,
    most: float = 1.0,
    halvings: int = 12,
) -> tuple[Array, Array]:
    """Returns the smallest `epsilon` at which an attack succeeds, by bisection for each image.

    Success is taken to begin at one `epsilon`; where it comes and goes (FGSM's may), this is one
    of the beginnings.

    Args:
        attack_fn: called as `attack_fn(images, labels, epsilon=epsilon)`, with one for each image;
            traced, unless JAX can't (NumPy's, foolbox's).
        logits_fn, images, labels: see `fgsm`.
        most: the largest that is tried.
        halvings: of the interval from 0 to `most`.

    Returns:
        `[B]`, at most `most / 2**halvings` too large: the attack succeeds at it; 0 where the image
        is misclassified already, infinite where even `most` is too little. And `[B]` booleans,
        whether it is finite.
    """

    def succeeds(epsilon):
        return _margin(logits_fn, attack_fn(images, labels, epsilon=epsilon), labels) < 0

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_enough = succeeds(middle)
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    whole = jnp.full(len(images), most, jnp.promote_types(images.dtype, jnp.float32))
    are_wrong, success = _margin(logits_fn, images, labels) < 0, succeeds(whole)
    ends = jnp.zeros_like(whole), whole
    if tracing.is_traceable(succeeds, whole):
        _, high = jax.lax.fori_loop(0, halvings, halve, ends)
    else:  # It leaves JAX.
        _, high = functools.reduce(lambda ends, i: halve(i, ends), range(halvings), ends)
    success |= are_wrong
    return jnp.where(are_wrong, 0, jnp.where(success, high, jnp.inf)), success


@checks.checked
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
    wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    noise = jax.random.rademacher(key, wide.shape, wide.dtype)
    moved = wide + per_image(epsilon, wide) * noise
    return _clip(moved, wide, bounds).astype(images.dtype)


def is_wrong(logits: Array, labels: Array) -> Array:
    """Returns `bool[B]`, whether `[B, K]` logits predict another class; with a NaN, none."""
    return (jnp.argmax(logits, axis=-1) != labels) & ~jnp.isnan(logits).any(axis=-1)


def outcome(clean_logits: Array, adversarial_logits: Array, labels: Array) -> Outcome:
    """Returns what an attack achieved, from the `[B, K]` logits before and after it.

    Logits with a NaN among them predict nothing: they are neither correct nor a success.
    """
    labels = checks.classes(labels, clean_logits)
    are_numbers = ~jnp.isnan(clean_logits).any(axis=-1)
    correct_before = are_numbers & (jnp.argmax(clean_logits, axis=-1) == labels)
    successful = correct_before & is_wrong(adversarial_logits, labels)
    predicted_after = jnp.argmax(adversarial_logits, axis=-1)
    return Outcome(correct_before, successful, predicted_after)


def per_image(value, images):
    """Returns one number, or one for each image, as `[B, 1, 1, 1]`."""
    value = jnp.asarray(value, images.dtype).reshape(-1, 1, 1, 1)
    return jnp.broadcast_to(value, (len(images), 1, 1, 1))


def _counts(steps, images):
    """Returns a number of steps for each image."""
    return jnp.broadcast_to(jnp.asarray(steps).reshape(-1), len(images))


def share(steps: Array, part: int | Array, whole: int) -> Array:
    """Returns `steps * part // whole`, whose product may leave the integers' range."""
    return steps // whole * part + steps % whole * part // whole


def _keys(key, images):
    """Returns a key for each position in the batch, the same in every batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))


def _uniform(key, images):
    """Returns noise from -1 to 1 of the images' shape."""
    draw = functools.partial(jax.random.uniform, minval=-1, maxval=1)
    keys = _keys(key, images)
    return jax.vmap(lambda key: draw(key, images.shape[1:], images.dtype))(keys)


class _Climb(NamedTuple):
    """Images, and where their losses rise."""

    images: Array  # f32[B, H, W, C]
    loss: Array  # f32[B]
    gradient: Array  # f32[B, H, W, C], 0 where it is NaN
    is_wrong: Array  # bool[B]
    are_probabilities: Array  # bool[B], what should be logits


def _climb(logits_fn, loss_fn, images, labels):
    """Returns each image's own loss and gradient."""

    def total(x):
        logits = logits_fn(x)
        losses = loss_fn(logits, labels)
        # Summed, not averaged: each image's gradient then ignores its batch.
        rest = is_wrong(logits, labels), checks.are_probabilities(logits)
        return losses.sum(), (losses, *rest)

    gradient, (losses, are_wrong, flags) = jax.grad(total, has_aux=True)(images)
    checks.warn_of_probabilities(flags)
    return _Climb(images, losses, jnp.nan_to_num(gradient), are_wrong, flags)


def unit(gradient: Array, *, order: int) -> Array:
    """Divides each image's `[B, H, W, C]` gradient by its norm; a zero gradient stays zero."""
    # By the largest entry first: squares of a confident model's tiny gradients underflow.
    largest = jnp.abs(gradient).max(axis=(1, 2, 3), keepdims=True)
    scaled = gradient / jnp.maximum(largest, jnp.finfo(gradient.dtype).tiny)
    norm = jnp.linalg.norm(scaled.reshape(len(scaled), -1), ord=order, axis=-1)
    return scaled / jnp.maximum(norm, 1).reshape(-1, 1, 1, 1)


def project(
    images: Array, centre: Array, *, epsilon: Number, bounds: Bounds, order: float = jnp.inf
) -> Array:
    """Returns `[B, H, W, C]` images moved into the ball around `centre`, and clipped to bounds.

    Args:
        images, centre: `[B, H, W, C]`.
        epsilon: the ball's radius, or one for each image.
        bounds: valid pixel range, or None.
        order: of the ball's norm, infinity or 2.
    """
    epsilon = per_image(epsilon, images)
    if order == 2:
        step = images - centre
        norm = jnp.linalg.norm(step.reshape(len(step), -1), axis=-1).reshape(-1, 1, 1, 1)
        far = norm > epsilon
        images = jnp.where(far, centre + step * (epsilon / jnp.where(far, norm, 1)), images)
    else:
        images = jnp.clip(images, centre - epsilon, centre + epsilon)
    return _clip(images, centre, bounds)


def _clip(moved, images, bounds):
    """Returns what was moved in bounds; pixels that were out of them before go no further out."""
    if bounds is None:
        return moved
    low, high = (jnp.asarray(bound, images.dtype) for bound in bounds)
    return jnp.clip(moved, jnp.minimum(images, low), jnp.maximum(images, high))


def select(chosen, new, old):
    """Returns the tree of `[B, ...]` whose rows are `new` where `bool[B]` `chosen`, else `old`."""
    return jax.tree.map(functools.partial(jax.vmap(jnp.where), chosen), new, old)


def _iterate(step, state, steps, is_done=lambda state: jnp.bool_(False)):
    """Repeats `state = step(t, state)`, each row for its own number of steps or until done."""

    def active(t, state):
        return (t < steps) & ~is_done(state)

    def body(carry):
        t, state = carry
        return t + 1, select(active(t, state), step(t, state), state)

    return jax.lax.while_loop(lambda carry: active(*carry).any(), body, (0, state))[1]


def _ascend(
    logits_fn,
    loss_fn,
    images,
    labels,
    *,
    epsilon,
    steps,
    step_size,
    bounds,
    start_fn=lambda images, epsilon: images,
    reach=1,
    decay=None,
    order=jnp.inf,
):
    """Climbs the loss by steps in the ball, signed or along the gradient, `reach` radii in all."""
    epsilon = per_image(epsilon, images)
    steps = _counts(steps, images)
    if step_size is None:
        step_size = reach * epsilon / per_image(jnp.maximum(steps, 1), images)
    step_size = per_image(step_size, images)

    def step(_, state):
        adversarial, before, _ = state
        climb = _climb(logits_fn, loss_fn, adversarial, labels)
        direction = climb.gradient
        if decay is not None:
            kept = per_image(decay, images) * before
            direction = kept + unit(direction, order=1)
        along = jnp.sign(direction) if order == jnp.inf else unit(direction, order=order)
        moved = adversarial + step_size * along
        moved = project(moved, images, epsilon=epsilon, bounds=bounds, order=order)
        return moved, direction, climb.are_probabilities

    start = start_fn(images, epsilon), jnp.zeros_like(images), jnp.zeros(len(images), bool)
    found, _, flags = _iterate(step, start, steps)
    checks.warn_of_probabilities(flags)
    return found
