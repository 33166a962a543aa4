"""Training the classifier and counting what it gets right (paper §III-B).

Dimensions: B batch, H W C image, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occjax import attack, convolution, vgg
from occjax.types import Array, Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierState:
    """Everything a training step reads and replaces."""

    step: Array  # i32[]
    variables: vgg.Variables
    opt_state: optax.OptState


def init_state(variables: vgg.Variables) -> ClassifierState:
    """Returns the state before the first step."""
    # Adam's state has the same form at every learning rate.
    opt_state = optax.adam(0.0).init(variables.params)
    return ClassifierState(step=jnp.zeros((), jnp.int32), variables=variables, opt_state=opt_state)


@functools.partial(jax.jit, static_argnames=('dropout_rate', 'plan'), donate_argnames='state')
def train_step(
    state: ClassifierState,
    images: Array,
    labels: Array,
    *,
    key: Array,
    learning_rate: float,
    dropout_rate: float = 0.5,
    label_smoothing: float = 0.0,
    plan: vgg.Plan = vgg.VGG11,
) -> tuple[ClassifierState, dict[str, Array]]:
    """Takes one step of Adam on the mean cross-entropy (§III-B).

    Args:
        state: what the step before returned; its buffers are given up.
        images: `[B, H, W, C]` in [0, 1].
        labels: `[B]` integer classes.
        key: JAX random key of the whole training; the step folds its number into it.
        learning_rate: of this step.
        dropout_rate, plan: see `vgg.train_logits`.
        label_smoothing: share of the target that all classes divide evenly.

    Returns:
        The next state, and the batch's `loss` and `accuracy`.
    """

    settings = dict(key=jax.random.fold_in(key, state.step), dropout_rate=dropout_rate, plan=plan)
    train_logits = convolution.accelerate(functools.partial(vgg.train_logits, **settings))

    def mean_loss(params):
        logits, batch_stats = train_logits(state.variables._replace(params=params), images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return losses.mean(), (batch_stats, jnp.mean(jnp.argmax(logits, -1) == labels))

    params = state.variables.params
    (loss, (batch_stats, accuracy)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
    updates, opt_state = optax.adam(learning_rate).update(gradients, state.opt_state)
    variables = state.variables._replace(
        params=optax.apply_updates(params, updates), batch_stats=batch_stats
    )
    new_state = ClassifierState(step=state.step + 1, variables=variables, opt_state=opt_state)
    return new_state, {'loss': loss, 'accuracy': accuracy}


@functools.partial(jax.jit, static_argnames='plan')
def attack_half(
    source: vgg.Variables, images: Array, *, epsilon: float, plan: vgg.Plan = vgg.VGG11
) -> Array:
    """Returns a batch whose first half is FGSM images against `source`, the rest as it was.

    The loss that they raise is that of the class that `source` predicts, not of the label: else the
    step itself would tell the label.

    Args:
        source: the classifier that is attacked.
        images: `[B, H, W, C]` in [0, 1].
        epsilon: in pixels.
        plan: the plan that `source` was made with.

    References:
        Kurakin et al., https://arxiv.org/abs/1611.01236
    """
    logits_fn = convolution.accelerate(functools.partial(vgg.logits, source, plan=plan))
    half = images[: len(images) // 2]
    if not len(half):
        return images
    named = jnp.argmax(logits_fn(half), axis=-1)
    attacked = attack.fgsm(logits_fn, half, named, epsilon=epsilon)
    return jnp.concatenate([attacked, images[len(half) :]])


def fit_epoch(
    state: ClassifierState,
    batches: Iterable[Batch],
    *,
    key: Array,
    schedule: Callable[[int], float],
    dropout_rate: float,
    label_smoothing: float = 0.0,
    plan: vgg.Plan,
    images_fn: Callable[[vgg.Variables, Array, int], Array] | None = None,
    step_fn: Callable = train_step,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[ClassifierState, dict[str, float]]:
    """Takes one step a batch; the next batch is read and sent while the device takes a step.

    Args:
        state: where to start.
        batches: of one epoch, all images real.
        key: see `train_step`.
        schedule: the learning rate by step.
        dropout_rate, plan: see `vgg.train_logits`.
        label_smoothing: see `train_step`.
        images_fn: what is done to a batch's images, from the classifier so far and the step.
        step_fn: what takes a step.
        on_batch: told after every step how many images it took.

    Returns:
        The state after the epoch, and the mean `loss` and `accuracy` over its images.
    """
    totals, count, step = {'loss': 0.0, 'accuracy': 0.0}, 0, int(state.step)

    def tell(metrics, size):
        nonlocal count
        count += size
        for name in totals:
            totals[name] += float(metrics[name]) * size
        on_batch(size)

    taken = []  # The last step, which is waited for when the next one is on its way.
    for batch in batches:
        state, metrics = step_fn(
            state,
            images_fn(state.variables, batch.images, step) if images_fn else batch.images,
            batch.labels,
            key=key,
            learning_rate=schedule(step),
            dropout_rate=dropout_rate,
            label_smoothing=label_smoothing,
            plan=plan,
        )
        step += 1
        taken.append((metrics, len(batch.labels)))
        if len(taken) > 1:
            tell(*taken.pop(0))
    for found in taken:
        tell(*found)
    return state, {name: total / count for name, total in totals.items()}


def evaluate(
    predict_fn: Callable[[Array], Array],
    batches: Iterable[Batch],
    *,
    total_fn: Callable[[tuple[int, int]], tuple[int, int]] = lambda counts: counts,
    on_batch: Callable[[int], None] = lambda count: None,
) -> float:
    """Returns the exact accuracy: every real image counts once, divided once.

    Args:
        predict_fn: maps `[B, H, W, C]` images to `[B]` classes.
        batches: padded ones, from `data.batches`.
        total_fn: sums counts over hosts, if each has its own batches.
        on_batch: told after every batch how many real images it has.
    """
    correct = total = 0
    for batch in batches:
        hits = np.asarray(predict_fn(batch.images)) == batch.labels
        correct += int(np.sum(hits & batch.is_real))
        count = int(batch.is_real.sum())
        total += count
        on_batch(count)
    correct, total = map(int, total_fn((correct, total)))
    return correct / total
