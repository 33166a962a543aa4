"""A guard: all that it takes to tell attacked images of one classifier, as one pytree.

`make` fits it, `judge` applies it (under `jit`, to batches of any size), `evaluate` says what it
finds, `at_fpr` makes it stricter or milder, `save` and `load` keep it in one file. It works for any
network: a function of images is all that it asks for. A finished run has its own,
`detectors/<method>.guard.npz`.

Dimensions: B batch, N images, H W C image, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, checks, convolution, detector, guarding, metrics, tracing
from occjax.fills import Fill
from occjax.guard_file import from_arrays, load, save, to_arrays
from occjax.guarding import METHODS, Guard, Verdict, at_fpr, check, judge, judge_maps, of_bank
from occjax.metrics import Share
from occjax.occlusion import ProgressFn
from occjax.progress import counted
from occjax.types import Array, HeatmapSet, LogitsFn

__all__ = [
    'ATTACKS',
    'METHODS',
    'NOISE',
    'Evaluation',
    'Guard',
    'Share',
    'Verdict',
    'at_fpr',
    'check',
    'evaluate',
    'fgsm',
    'from_arrays',
    'judge',
    'judge_maps',
    'load',
    'make',
    'of_bank',
    'pgd',
    'save',
    'to_arrays',
]

AttackFn = Callable[..., Array]  # called as attack_fn(logits_fn, images, labels, key=key)


def fgsm(epsilon: float) -> AttackFn:
    """Returns FGSM of one epsilon, as `make` calls attacks."""

    def attack_fn(logits_fn, images, labels, *, key):
        return attack.fgsm(logits_fn, images, labels, epsilon=epsilon)

    return _named(attack_fn, f'FGSM {_size(epsilon)}')


def pgd(epsilon: float, *, steps: int = 10) -> AttackFn:
    """Returns PGD of one epsilon, as `make` calls attacks."""

    def attack_fn(logits_fn, images, labels, *, key):
        return attack.pgd(logits_fn, images, labels, key=key, epsilon=epsilon, steps=steps)

    return _named(attack_fn, f'PGD {_size(epsilon)}')


def _named(fn, name):
    fn.__name__ = name
    return fn


def _size(epsilon):
    """Returns how an epsilon is written: 8/255 where that is what it is, else 0.1."""
    levels = round(255 * epsilon, 3)
    return f'{levels:g}/255' if levels == round(levels) else f'{epsilon:g}'


ATTACKS = (*map(fgsm, (4 / 255, 8 / 255, 16 / 255, 0.1)), *map(pgd, (4 / 255, 8 / 255)))
NOISE = (8 / 255, 0.1)


def make(
    key: Array,
    logits_fn: LogitsFn,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    class_names: Sequence[str],
    method: str = 'views_alone',
    views: Sequence[str] | None = None,
    autoencoder: Any = None,
    fill: Fill = 0.5,
    attacks: Sequence[AttackFn] = ATTACKS,
    noise: Sequence[float] = NOISE,
    fpr: float = 0.05,
    steps: int = 1000,
    batch_size: int = 64,
    progress: ProgressFn | None = None,
    **windows: Any,
) -> Guard:
    """Attacks images, fits detectors on what that does to the classifier, and sets thresholds.

    Two thirds of the images fit detectors, the rest set thresholds: a fresh clean image is flagged
    with probability at most `fpr`, see `metrics.class_thresholds`. Images that the classifier gets
    wrong do not count, nor do attacks that fail. Warns where images are too few for thresholds.
    Cost: for each image as it is, attacked and noisy the passes of the method (13 of `views_alone`,
    windows + 1 of `detector`), and the attacks' gradients; by default 9 * 13 passes, 24 gradients.

    Args:
        key: JAX random key.
        logits_fn: maps `[B, H, W, C]` images in [0, 1] to `[B, K]` logits, each on its own.
        images: `[N, H, W, C]` in [0, 1], or bytes; best ones that it was not trained on.
        labels, class_names: `[N]` classes, None takes the predicted ones; K names.
        method, views: of `METHODS` and `names.VIEWS`; None is all views but `reconstruction`, or
            none if the method sees none. One of `metrics.BASELINES` only gets thresholds.
        autoencoder: of `reconstruction` and MagNet, see `comparators.fit_autoencoder`.
        fill, **windows: of `engine.occluded_logits`, `types.condense` and `comparators.scores`.
        attacks: to fit on, each called as `attack_fn(logits_fn, images, labels, key=key)`, under
            `jit` and image by image; if JAX can't trace it (NumPy's, foolbox's) on batches.
        noise: sizes of random signs under which images are clean nevertheless.
        fpr: from 0 to 1.
        steps, batch_size: of fitting; images at once, of which nothing depends but rounding.
        progress: called with how many images are attacked, and how many there are.

    Raises:
        ValueError: if arguments do not fit, or nothing is left to fit on.
    """
    metrics.threshold_at_fpr(np.zeros(1), fpr)  # Refuses what is none, before all else.
    _check_counts(batch_size=batch_size, steps=steps)
    seen = guarding.sees(method, views, windows, autoencoder)
    tries = _Tries(attacks, noise, batch_size, progress)
    tried_key, *keys = jax.random.split(checks.key(key), 4)
    probe_logits = _probed(logits_fn, images, class_names)
    see_fn = functools.partial(guarding.see, **seen, autoencoder=autoencoder, fill=fill)
    observed = _observed(tried_key, logits_fn, see_fn, images, labels, tries)
    bank, calibration = _fitted(keys, METHODS[method], *observed, len(images), steps)
    sees = dict(method=method, views=seen['views'], autoencoder=autoencoder, fill=fill, **windows)
    known = dict(image_shape=np.shape(images)[1:], probe_logits=probe_logits, fpr=fpr)
    guard = of_bank(bank, calibration, class_names=class_names, **known, **sees)
    guarding.warn_of_lacking(guard)
    return guard


class Evaluation(NamedTuple):
    """How many images of each kind a guard flags; prints as a table."""

    clean: Share  # that the classifier gets right
    misclassified: Share  # clean, that it gets wrong
    noise: dict[str, Share]  # by size, of images that are classified correctly under it
    attacks: dict[str, Share]  # by name, of successful ones

    def __repr__(self):
        rows = {'clean': self.clean, 'clean, misclassified': self.misclassified}
        rows |= {f'noise {name}': share for name, share in self.noise.items()}
        rows |= {f'{name}, successful': share for name, share in self.attacks.items()}
        width = max(map(len, rows))
        lines = [f'{"":{width}}  flagged  95 % interval      of']
        for name, share in rows.items():
            numbers = f'{"–":>7}  {"–":^13}'
            if share.n:
                low, high = share.interval
                numbers = f'{share.rate:7.3f}  {f"{low:.3f} to {high:.3f}":>13}'
            lines.append(f'{name:{width}}  {numbers}  {share.n:6}')
        return '\n'.join(lines)


def evaluate(
    guard: Guard,
    logits_fn: LogitsFn,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    attacks: Sequence[AttackFn] = ATTACKS,
    noise: Sequence[float] = NOISE,
    key: Array,
    batch_size: int = 64,
    progress: ProgressFn | None = None,
) -> Evaluation:
    """Returns what a guard finds of attacks and flags falsely, on images that it never saw.

    `print(evaluate(guard, logits_fn, images, labels, key=jax.random.key(1)))` is a table.

    Args:
        guard: from `make` or `load`.
        logits_fn, images, labels, attacks, noise, key, batch_size, progress: see `make`.

    Raises:
        ValueError: see `make` and `judge`.
    """
    _check_counts(batch_size=batch_size)
    _probed(logits_fn, images, guard.class_names)
    check(guard, logits_fn)
    guarding.warn_of_lacking(guard)
    tries = _Tries(attacks, noise, batch_size, progress)
    judge_fn = functools.partial(judge, guard)
    flagged: dict[tuple, list] = {kind: [] for kind in tries.kinds}
    for kind, _, said in _tried(checks.key(key), logits_fn, judge_fn, images, labels, tries):
        flagged[kind].append(said.is_adversarial)
    every = {kind: np.concatenate(parts) for kind, parts in flagged.items()}
    found = {kind: Share(int(rows.sum()), len(rows)) for kind, rows in every.items()}
    of_kind = {k: {name: found[k, name] for kind, name in found if kind == k} for k, _ in found}
    clean, wrong = of_kind[_CLEAN][''], of_kind[_WRONG]['']
    return Evaluation(clean, wrong, of_kind.get(_NOISE, {}), of_kind.get(_ATTACK, {}))


_CLEAN, _WRONG, _NOISE, _ATTACK = 'clean', 'misclassified', 'noise', 'attack'


class _Tries(NamedTuple):
    """What images are tried with, and how."""

    attacks: Sequence[AttackFn]
    noise: Sequence[float]
    batch_size: int
    progress: ProgressFn | None

    @property
    def kinds(self) -> dict[tuple[str, str], Any]:
        """What makes each kind of images, None of those that are left as they are."""
        found = {(_CLEAN, ''): None, (_WRONG, ''): None}
        found |= {(_NOISE, _size(epsilon)): _noise(epsilon) for epsilon in self.noise}
        for fn in self.attacks:
            name = getattr(getattr(fn, 'func', fn), '__name__', type(fn).__name__)
            again = sum(other.partition(' #')[0] == name for _, other in found)
            found[_ATTACK, f'{name} #{again + 1}' if again else name] = fn
        return found


def _noise(epsilon):
    def noise_fn(logits_fn, images, labels, *, key):
        return attack.sign_noise(images, key=key, epsilon=epsilon)

    return noise_fn


def _check_counts(**counts):
    for name, value in counts.items():
        checks.number(name, value, range=checks.COUNT)


def _probed(logits_fn, images, class_names):
    """Returns the logits of `guarding.probe`, after a look at the shapes of all."""
    if np.ndim(images) != 4 or not len(images):
        raise ValueError(f'Expected images [N, H, W, C], at least one, got {np.shape(images)}.')
    logits = guarding.probe(logits_fn, np.shape(images)[1:])
    guarding.check_names(len(logits), class_names)
    return logits


def _tried(key, logits_fn, see_fn, images, labels, tries) -> Iterator[tuple]:
    """Yields kinds, batch by batch: the ids of the images that count, and what is seen of them.

    No image depends on its batch. Weights are arguments of what is compiled, and each program is
    compiled once: what sees images, and each attack.
    """
    images = np.asarray(images)
    labels = labels if labels is None else np.asarray(checks.classes(labels, images))
    batch_size = min(tries.batch_size, len(images))
    shape = jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32)
    lifted, weights = tracing.lift(checks.logits_fn(tracing.plain(logits_fn)), shape)

    @jax.jit
    def seen(weights, images):
        return see_fn(functools.partial(lifted, weights), images)

    kinds = tries.kinds
    attempt_fns = {
        kind: _attempt(fn, lifted, weights, logits_fn, shape) for kind, fn in kinds.items() if fn
    }
    for start in range(0, len(images), batch_size):
        ids = np.arange(start, min(start + batch_size, len(images)))
        rows = np.resize(ids, batch_size)  # The last batch repeats its own.
        batch = _pixels(images[rows])
        clean = seen(weights, batch)
        truth = np.asarray(clean.predicted if labels is None else labels[rows])
        is_right = np.asarray(clean.predicted) == truth
        for i, kind in enumerate(kinds):
            if kind in attempt_fns:
                keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, i)))(
                    rows
                )
                changed = seen(weights, attempt_fns[kind](batch, truth, keys))
                is_same = np.asarray(changed.predicted) == truth
                counts = is_right & (is_same if kind[0] == _NOISE else ~is_same)
            else:
                changed, counts = clean, is_right if kind[0] == _CLEAN else ~is_right
            chosen = np.flatnonzero(counts[: len(ids)])
            yield kind, ids[chosen], jax.tree.map(lambda a, c=chosen: np.asarray(a)[c], changed)
        if tries.progress is not None:
            tries.progress(int(ids[-1]) + 1, len(images))


def _pixels(images):
    """Returns a batch of images in [0, 1] on the device."""
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    return checks.images(images)


def _attempt(attack_fn, lifted, weights, logits_fn, shape):
    """Returns a function of images, labels and keys, which attacks each image on its own."""

    def one(weights, image, label, key):
        fast_fn = convolution.accelerate(functools.partial(lifted, weights))
        return attack_fn(fast_fn, image[None], label[None], key=key)[0]

    each = jax.vmap(one, in_axes=(None, 0, 0, 0))
    like = jax.ShapeDtypeStruct((1,), np.int32), jax.eval_shape(lambda: jax.random.key(0)[None])
    many = jax.jit(each) if tracing.is_traceable(each, weights, shape, *like) else None

    def attempt(images, labels, keys):
        if many is not None:
            found = many(weights, images, labels, keys)
        else:
            found = jnp.asarray(attack_fn(logits_fn, images, jnp.asarray(labels), key=keys[0]))
        if found.shape != images.shape:
            raise ValueError(
                f'Expected an attack to return {list(images.shape)} images, got '
                f'{list(found.shape)}.'
            )
        return checks.images(found, bounds=None).astype(images.dtype)

    return attempt


def _observed(key, logits_fn, see_fn, images, labels, tries):
    """Returns what is seen of right images and their attacks, and the kind of each.

    They are in the order of their kinds and images, whatever the batches.
    """
    parts: dict[tuple, list] = {kind: [] for kind in tries.kinds if kind[0] != _WRONG}
    for kind, ids, maps in _tried(key, logits_fn, see_fn, images, labels, tries):
        if kind in parts:
            is_adversarial = np.full(len(ids), kind[0] == _ATTACK)
            part = dataclasses.replace(maps, image_id=ids, is_adversarial=is_adversarial)
            parts[kind].append(part)
    every = [(kind, maps) for (kind, _), several in parts.items() for maps in several]
    kinds = np.concatenate([np.full(len(maps), kind, '<U16') for kind, maps in every])
    return HeatmapSet.concatenate([maps for _, maps in every]), kinds


def _fitted(keys, method, maps, kinds, count, steps):
    """Returns a bank fitted on two thirds of the images, and what of the rest sets thresholds."""
    order_key, *keys = keys
    is_fitted = np.asarray(jax.random.permutation(order_key, count) % 3 > 0)[maps.image_id]
    fits, sets = maps.select(is_fitted), maps.select(~is_fitted & (kinds == _CLEAN))
    counts = np.bincount(fits.is_adversarial, minlength=2)
    if not counts.all():
        raise ValueError(
            f'{counted(counts[0], "clean image")} and {counted(counts[1], "successful attack")} '
            'are left to fit on: more images, other attacks, or labels that the classifier agrees '
            'with.'
        )
    bank = _bank(*keys, method, fits, steps) if hasattr(method, 'inputs_fn') else {}
    return bank, _calibrated(bank, method, fits, sets)


def _bank(init_key, fit_key, method, maps, steps):
    """Returns a bank that is fitted on maps of both kinds."""
    inputs = method.inputs_fn(maps).astype(np.float32)
    count = method.num_networks(maps)
    groups = detector.group_by_class(
        inputs,
        method.predicted(maps),
        maps.is_adversarial,
        num_classes=count,
        balance='weights',
        rng=np.random.default_rng(0),
    )
    bank = detector.init_bank(init_key, num_classes=count, grid=inputs.shape[1:], **method.fields)
    return jax.jit(functools.partial(detector.fit_bank, steps=steps))(fit_key, bank, *groups)


def _calibrated(bank, method, fits, sets):
    """Returns what thresholds come from: clean maps of classes that had something to learn from."""
    count = fits.unoccluded.shape[-1]
    learns_by_class = not getattr(method, 'pooled', True)
    judges = metrics.has_both_kinds(fits, count) if learns_by_class else np.ones(count, bool)
    sets = sets.select(judges[sets.predicted])
    return metrics.Calibration(np.asarray(method.score(bank, sets)), sets.predicted, judges)
