"""A guard: all that it takes to tell attacked images of one classifier, as one pytree.

`make` fits it, `judge` applies it (under `jit`, to batches of any size), `at_fpr` makes it stricter
or milder, `save` and `load` keep it in one file. It works for any network: a function of images is
all that it asks for. A finished run has its own, `detectors/<method>.guard.npz`.

Dimensions: B batch, N images, H W C image, K classes.
"""

import collections
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, checks, detector, engine, metrics, names, verdict
from occjax import views as views_lib
from occjax.fills import Fill
from occjax.methods import METHODS
from occjax.occlusion import ProgressFn
from occjax.types import Array, HeatmapSet, LogitsFn

AttackFn = Callable[..., Array]  # called as attack_fn(logits_fn, images, labels, key=key)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('bank', 'thresholds', 'fill', 'calibration', 'autoencoder'),
    meta_fields=('method', 'views', 'windows', 'class_names'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Detectors, their thresholds, and what they see."""

    bank: detector.Bank
    thresholds: Array  # f32[K]; infinite for a class with too few images to promise anything
    fill: Array  # what covers a window, see `occlusion.occluded_logits`; `windows` may name it
    calibration: metrics.Calibration  # what thresholds come from
    method: str  # one of `methods.METHODS`
    views: tuple[str, ...]  # some of `names.VIEWS`
    windows: tuple[tuple[str, Any], ...]  # what `verdict.margins` takes of them: size, stride, …
    class_names: tuple[str, ...]
    autoencoder: Any = None  # of the view `reconstruction`, see `comparators`


class Verdict(NamedTuple):
    """What a guard says of images."""

    predicted: Array  # i32[B], the classes that the classifier predicts
    probability: Array  # f32[B], how probable it takes them to be
    score: Array  # f32[B], higher for more adversarial
    threshold: Array  # f32[B]
    is_adversarial: Array  # bool[B], whether the score is above the threshold


def fgsm(epsilon: float) -> AttackFn:
    """Returns FGSM of one epsilon, as `make` calls attacks."""

    def attack_fn(logits_fn, images, labels, *, key):
        return attack.fgsm(logits_fn, images, labels, epsilon=epsilon)

    return attack_fn


def pgd(epsilon: float, *, steps: int = 10) -> AttackFn:
    """Returns PGD of one epsilon, as `make` calls attacks."""

    def attack_fn(logits_fn, images, labels, *, key):
        return attack.pgd(logits_fn, images, labels, key=key, epsilon=epsilon, steps=steps)

    return attack_fn


ATTACKS = (*map(fgsm, (4 / 255, 8 / 255, 16 / 255, 0.1)), *map(pgd, (4 / 255, 8 / 255)))


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
    noise: Sequence[float] = (8 / 255, 0.1),
    fpr: float = 0.05,
    steps: int = 1000,
    batch_size: int = 64,
    progress: ProgressFn | None = None,
    **windows: Any,
) -> Guard:
    """Attacks images, fits detectors on what that does to the classifier, and sets thresholds.

    Two thirds of the images fit detectors, the rest set thresholds: a fresh clean image is called
    with probability at most `fpr`, see `metrics.class_thresholds`. Images that the classifier gets
    wrong do not count, nor do attacks that fail.

    Args:
        key: JAX random key.
        logits_fn: maps `[B, H, W, C]` images in [0, 1] to `[B, K]` logits, each on its own.
        images: `[N, H, W, C]` in [0, 1], or bytes; best ones that it was not trained on.
        labels, class_names: `[N]` classes, None takes the predicted ones; K names.
        method, views: what detectors see, of `methods.METHODS` and `names.VIEWS`; None is all views
            but `reconstruction`, or none if the method sees none.
        autoencoder: fitted, see `comparators.fit_autoencoder`; the view `reconstruction` needs it.
        fill, **windows: of `engine.occluded_logits`, and `top_classes` of `types.condense`.
        attacks: to fit on, each called as `attack_fn(logits_fn, images, labels, key=key)`.
        noise: sizes of random signs under which images are clean nevertheless.
        fpr: from 0 to 1.
        steps, batch_size: of fitting; images at once.
        progress: called with how many images are attacked, and how many there are.

    Raises:
        ValueError: if images, labels, names or settings do not fit, or nothing is left to fit on.
    """
    metrics.threshold_at_fpr(np.zeros(1), fpr)  # Refuses what is none, before all else.
    seen = _seen(method, views, windows, autoencoder)
    sees = dict(autoencoder=autoencoder, fill=fill)
    attack_key, order_key, init_key, fit_key = jax.random.split(key, 4)
    see_fn = functools.partial(_see, logits_fn, **seen, **sees)
    attempt_fn = jax.jit(functools.partial(_attempts, logits_fn, see_fn, attacks, noise))
    maps, kinds = _gather(attack_key, attempt_fn, images, labels, batch_size, progress)
    _check_names(maps, class_names)
    is_fitted = np.asarray(jax.random.permutation(order_key, len(images)) % 3 > 0)[maps.image_id]
    fits, sets = maps.select(is_fitted), maps.select(~is_fitted & (kinds == _CLEAN))
    bank = _fitted(init_key, fit_key, METHODS[method], fits, steps)
    known = _calibrated(bank, METHODS[method], fits, sets)
    sees |= dict(method=method, views=seen['views'])
    return of_bank(bank, known, fpr=fpr, class_names=class_names, **sees, **windows)


def of_bank(
    bank: detector.Bank,
    calibration: metrics.Calibration,
    *,
    fpr: float = 0.05,
    fill: Fill = 0.5,
    class_names: Sequence[str],
    method: str,
    views: Sequence[str] = (),
    autoencoder: Any = None,
    **windows: Any,
) -> Guard:
    """Returns a guard of detectors that are fitted already.

    Args:
        bank: K detectors, or one if the method is pooled.
        calibration: scores of clean images on which nothing was fitted; they set thresholds.
        fpr, fill, class_names, method, views, autoencoder, **windows: see `make`.

    Raises:
        ValueError: if settings do not fit.
    """
    if isinstance(fill, str):
        windows, fill = windows | dict(fill=fill), 0.0
    fixed = _seen(method, views, windows, autoencoder) | dict(class_names=tuple(class_names))
    arrays = dict(fill=jnp.asarray(fill, jnp.float32), thresholds=jnp.zeros(len(class_names)))
    arrays |= dict(bank=bank, autoencoder=autoencoder)
    return at_fpr(Guard(calibration=calibration, **arrays, **fixed), fpr)


def at_fpr(guard: Guard, fpr: float) -> Guard:
    """Returns the same guard with the thresholds of another false positive rate, from 0 to 1.

    A fresh clean image is called with probability at most `fpr`, see `metrics.class_thresholds`.
    """
    known = jax.tree.map(np.asarray, guard.calibration)
    return dataclasses.replace(guard, thresholds=jnp.asarray(known.thresholds(fpr), jnp.float32))


def judge(guard: Guard, logits_fn: LogitsFn, images: Array) -> Verdict:
    """Returns what a guard says of images; a pure function, to be jitted with weights as arguments.

    Args:
        guard: from `make` or `load`.
        logits_fn: the classifier that it was made for.
        images: `[B, H, W, C]` in [0, 1].

    Raises:
        ValueError: see `checks.images`; or if the classifier has another number of classes.
    """
    wanted = ('method', 'views', 'windows', 'fill', 'autoencoder')
    seen = {name: getattr(guard, name) for name in wanted}
    return judge_maps(guard, _see(logits_fn, checks.images(images), **seen))


def judge_maps(guard: Guard, maps: HeatmapSet) -> Verdict:
    """Returns what a guard says of images by what it sees of them."""
    _check_names(maps, guard.class_names)
    scores = _scores(guard.bank, METHODS[guard.method], maps)
    thresholds = jnp.asarray(guard.thresholds)[maps.predicted]
    return Verdict(maps.predicted, maps.max_probability, scores, thresholds, scores > thresholds)


def save(guard: Guard, path: str | os.PathLike):
    """Writes a guard to one file; it appears whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **to_arrays(guard))
    path = pathlib.Path(path)
    draft = path.with_name(f'.{path.name}.draft')
    draft.write_bytes(content.getvalue())
    draft.replace(path)


_FIXED = ('method', 'views', 'windows', 'class_names')


def to_arrays(guard: Guard) -> dict[str, np.ndarray]:
    """Returns all of a guard as named arrays, for `from_arrays`."""
    arrays = {'thresholds': guard.thresholds, 'fill': guard.fill}
    arrays |= {f'calibration/{name}': a for name, a in guard.calibration._asdict().items()}
    for tree in ('bank', 'autoencoder'):
        for where, leaf in jax.tree_util.tree_flatten_with_path(getattr(guard, tree))[0]:
            arrays['/'.join([tree, *(str(part.key) for part in where)])] = leaf
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return arrays | {
        'meta': np.asarray(json.dumps({name: getattr(guard, name) for name in _FIXED}))
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Guard:
    """Returns the guard of `to_arrays`; other arrays are left alone."""
    meta, parts = json.loads(str(arrays['meta'])), collections.defaultdict(dict)
    for name, array in arrays.items():
        first, *where = name.split('/')
        if where:
            tree = functools.reduce(
                lambda tree, part: tree.setdefault(part, {}), where[:-1], parts[first]
            )
            tree[where[-1]] = np.asarray(array) if first == 'calibration' else jnp.asarray(array)
    return Guard(
        bank=parts['bank'],
        autoencoder=parts.get('autoencoder'),
        calibration=metrics.Calibration(**parts['calibration']),
        method=meta['method'],
        windows=tuple((name, _hashable(value)) for name, value in meta['windows']),
        **{name: jnp.asarray(arrays[name]) for name in ('thresholds', 'fill')},
        **{name: tuple(meta[name]) for name in ('views', 'class_names')},
    )


def _hashable(value):
    """Returns NumPy's numbers as Python's, and a list, as JSON makes one of a tuple, as that."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def load(path: str | os.PathLike) -> Guard:
    """Returns a guard from its file; nothing in it is executed.

    Raises:
        ValueError: if the file holds no guard.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return from_arrays(dict(file))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f'{path} holds no guard: {error}') from None


def _seen(method, views, windows, autoencoder):
    """Returns what detectors see, as a guard has it."""
    if views is None:
        views = views_lib.VIEWS if method in names.VIEWING else ()
    if autoencoder is None and 'reconstruction' in views:
        raise ValueError('The view reconstruction needs a fitted autoencoder.')
    unknown = {*views} - {*names.VIEWS} or {method} & {*names.RIVALS} or {method} - {*METHODS}
    if unknown:
        raise ValueError(f'{sorted(unknown)} is no view, or no method, that a guard can have.')
    other = {*windows} - {'fill', 'top_classes', *engine.SETTINGS}
    if other:
        raise ValueError(f'{sorted(other)} is no argument of a guard, nor of its windows.')
    geometry = {*windows} - {'fill', 'top_classes'}
    if geometry and not METHODS[method].windows:
        raise ValueError(f'{method} sees no windows: leave out {", ".join(sorted(geometry))}.')
    if views and method not in names.VIEWING:
        raise ValueError(f'{method} sees no views of an image: leave them out.')
    windows = tuple((name, _hashable(value)) for name, value in windows.items())
    return dict(method=method, views=tuple(views), windows=windows)


def _check_names(maps, class_names):
    if maps.unoccluded.shape[-1] != len(class_names):
        raise ValueError(
            f'Expected as many classes as names, {len(class_names)}, got logits of '
            f'{maps.unoccluded.shape[-1]}.'
        )


def _see(logits_fn, images, *, method, views, windows, fill, autoencoder):
    """Returns what detectors see of images."""
    seen = views_lib.of_names(views, autoencoder)
    settings = dict(fill=fill) | dict(windows)
    return verdict.observe(logits_fn, images, method=METHODS[method], views=seen, **settings)


_CLEAN, _NOISY, _ATTACKED = range(3)


def _attempts(logits_fn, see_fn, attacks, noise, key, images, labels):
    """Returns, for each kind of image, what is seen of it and which of them count."""
    clean = see_fn(images)
    labels = clean.predicted if labels is None else labels
    is_right, found = clean.predicted == labels, []

    def keep(kind, maps, chosen):
        arrays = {name: getattr(maps, name) for name in ('logits', 'unoccluded', 'views')}
        found.append((kind, (arrays | {'label': labels}, chosen)))

    keep(_CLEAN, clean, is_right)
    keys = iter(jax.random.split(key, len(attacks) + len(noise)))
    for attack_fn in attacks:
        maps = see_fn(attack_fn(logits_fn, images, labels, key=next(keys)))
        keep(_ATTACKED, maps, is_right & (maps.predicted != labels))
    for epsilon in noise:
        maps = see_fn(attack.sign_noise(images, key=next(keys), epsilon=epsilon))
        keep(_NOISY, maps, is_right & (maps.predicted == labels))
    return found


def _gather(key, attempt_fn, images, labels, batch_size, progress):
    """Returns what is seen of all images and their attacks, and the kind of each."""
    images = np.asarray(images)
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    images = checks.images(images)
    labels = labels if labels is None else checks.classes(labels, images)
    parts, kinds = [], []
    for start in range(0, len(images), batch_size):
        ids = np.arange(start, start + batch_size)
        is_real, ids = ids < len(images), ids % len(images)  # The last batch begins anew.
        here = None if labels is None else labels[ids]
        for kind, (arrays, chosen) in attempt_fn(jax.random.fold_in(key, start), images[ids], here):
            parts.append(_maps(arrays, np.asarray(chosen) & is_real, ids, kind == _ATTACKED))
            kinds.append(np.full(len(parts[-1]), kind))
        if progress is not None:
            progress(start + int(is_real.sum()), len(images))
    return HeatmapSet.concatenate(parts), np.concatenate(kinds)


def _maps(arrays, chosen, ids, is_adversarial):
    """Returns those that count, on the host."""
    arrays = {n: np.asarray(a)[chosen] for n, a in arrays.items() if a is not None}
    kinds = np.full(chosen.sum(), is_adversarial)
    return HeatmapSet(image_id=ids[chosen], is_adversarial=kinds, **arrays)


def _fitted(init_key, fit_key, method, maps, steps):
    """Returns a bank that is fitted on maps of both kinds."""
    counts = np.bincount(maps.is_adversarial, minlength=2)
    if not counts.all():
        raise ValueError(
            f'{counts[0]} clean images and {counts[1]} successful attacks are left to fit on: more '
            'images, other attacks, or labels that the classifier agrees with.'
        )
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
    judges = np.ones(count, bool) if method.pooled else metrics.has_both_kinds(fits, count)
    sets = sets.select(judges[sets.predicted])
    return metrics.Calibration(np.asarray(_scores(bank, method, sets)), sets.predicted, judges)


def _scores(bank, method, maps):
    """Returns `[M]`."""
    return detector.score(bank, method.inputs_fn(maps), method.predicted(maps))
