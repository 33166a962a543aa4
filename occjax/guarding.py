"""What a guard is and what it says: the record, its thresholds, and judging by it; see `guard`.

Dimensions: B batch, M held-out images, H W C image, K classes.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import checks, comparators, detector, engine, metrics, names, verdict
from occjax import views as views_lib
from occjax.fills import Fill
from occjax.methods import METHODS
from occjax.progress import counted
from occjax.types import Array, HeatmapSet, LogitsFn

METHODS = {name: METHODS[name] for name in METHODS if name not in names.RIVALS} | metrics.BASELINES
KINDS = ('clean', 'misclassified', 'noisy', 'attacked')  # of held-out images
_NAMED = 5  # classes, where many lack a threshold
_NEAR = 0.01  # of the largest logit, by which devices and precisions may differ


class HeldOut(NamedTuple):
    """Scores of images that neither detectors nor thresholds come from."""

    scores: np.ndarray  # f32[M]
    predicted: np.ndarray  # i32[M]
    kind: np.ndarray  # i32[M], places in `KINDS`


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *('bank', 'thresholds', 'fill', 'calibration', 'autoencoder'),
        *('probe_logits', 'held_out'),
    ),
    meta_fields=('method', 'views', 'windows', 'class_names', 'image_shape', 'fpr', 'attacks'),
)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Guard:
    """Detectors, their thresholds, and what they see."""

    bank: detector.Bank  # empty for a score that learns nothing
    thresholds: Array  # f32[K]; infinite for a class with too few images to promise anything
    fill: Array  # what covers a window, see `occlusion.occluded_logits`; `windows` may name it
    calibration: metrics.Calibration  # what thresholds come from
    probe_logits: Array  # f32[K], by which the classifier is recognised, see `check`
    method: str  # of `METHODS`
    views: tuple[str, ...]  # some of `names.VIEWS`
    windows: tuple[tuple[str, Any], ...]  # settings of what is seen: size, stride, …
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (H, W, C)
    fpr: float  # that thresholds are for
    autoencoder: Any = None  # of the view `reconstruction` and of MagNet, see `comparators`
    held_out: HeldOut | None = None  # what it is known to find; that of a run has it
    attacks: str = ''  # what attacked the attacked images of `held_out`

    def __repr__(self):
        """Returns what fits on a screen."""
        shown = {name: getattr(self, name) for name in ('method', 'views', 'image_shape', 'fpr')}
        shown['windows'] = dict(self.windows)
        few = ', '.join(map(str, self.class_names[:_NAMED]))
        few += ', …' * (len(self.class_names) > _NAMED)
        shown['classes'] = f'{len(self.class_names)} ({few})'
        if checks.is_known(self.thresholds):
            finite = np.asarray(self.thresholds)[np.isfinite(self.thresholds)]
            ends = f'{finite.min():.3g} to {finite.max():.3g}, ' if len(finite) else ''
            shown['thresholds'] = f'{ends}of {len(finite)} classes'
        return f'Guard({", ".join(f"{name}={value!r}" for name, value in shown.items())})'


class Verdict(NamedTuple):
    """What a guard says of images."""

    predicted: Array  # i32[B], the classes that the classifier predicts
    probability: Array  # f32[B], how probable it takes them to be
    score: Array  # f32[B], higher for more adversarial
    threshold: Array  # f32[B]
    is_adversarial: Array  # bool[B], whether the score is above the threshold


def of_bank(
    bank: detector.Bank,
    calibration: metrics.Calibration,
    *,
    fpr: float = 0.05,
    fill: Fill = 0.5,
    class_names: Sequence[str],
    method: str,
    views: Sequence[str] = (),
    image_shape: tuple[int, int, int],
    probe_logits: Array,
    autoencoder: Any = None,
    held_out: HeldOut | None = None,
    attacks: str = '',
    **windows: Any,
) -> Guard:
    """Returns a guard of detectors that are fitted already.

    Args:
        bank: K detectors, or one if the method is pooled; empty for one of `metrics.BASELINES`.
        calibration: scores of clean images on which nothing was fitted; they set thresholds.
        image_shape, probe_logits, held_out, attacks: see `Guard` and `probe`.
        fpr, fill, class_names, method, views, autoencoder, **windows: see `guard.make`.

    Raises:
        ValueError: if settings do not fit.
    """
    if isinstance(fill, str):
        windows, fill = windows | dict(fill=fill), 0.0
    fixed = sees(method, views, windows, autoencoder) | dict(class_names=tuple(class_names))
    fixed |= dict(image_shape=tuple(map(int, image_shape)), fpr=fpr, attacks=attacks)
    arrays = dict(fill=jnp.asarray(fill, jnp.float32), thresholds=jnp.zeros(len(class_names)))
    arrays |= dict(bank=bank, autoencoder=autoencoder, held_out=held_out)
    arrays |= dict(probe_logits=jnp.asarray(probe_logits, jnp.float32), calibration=calibration)
    return at_fpr(Guard(**arrays, **fixed), fpr)


def at_fpr(guard: Guard, fpr: float) -> Guard:
    """Returns the same guard with the thresholds of another false positive rate, from 0 to 1.

    A fresh clean image is flagged with probability at most `fpr`, see `metrics.class_thresholds`.
    """
    calibration = jax.tree.map(np.asarray, guard.calibration)
    thresholds = jnp.asarray(calibration.thresholds(fpr), jnp.float32)
    return dataclasses.replace(guard, thresholds=thresholds, fpr=float(fpr))


def shares(guard: Guard) -> dict[str, metrics.Share] | None:
    """Returns how many held-out images of each of `KINDS` a guard flags; None if it has none.

    It flags nothing in a class without a threshold, and such images count.
    """
    if guard.held_out is None:
        return None
    scores, predicted, kind = map(np.asarray, guard.held_out)
    flagged = scores > np.asarray(guard.thresholds)[predicted]
    return {
        name: metrics.Share(int(flagged[kind == i].sum()), int((kind == i).sum()))
        for i, name in enumerate(KINDS)
    }


def judge(guard: Guard, logits_fn: LogitsFn, images: Array) -> Verdict:
    """Returns what a guard says of images; a pure function, to be jitted with weights as arguments.

    Where weights are known, `check` is made too: at each call, or under `jit` of a function that
    closes over them once, at trace time. Where weights are arguments of `jit`, call `check` once.

    Args:
        guard: from `make` or `load`.
        logits_fn: the classifier that it was made for.
        images: `[B, H, W, C]` in [0, 1].

    Raises:
        ValueError: see `checks.images`; or if the classifier has another number of classes, if
            images have another shape, or see `check`.

    Warns:
        UserWarning: if it flags nothing, or nothing in some classes, for want of a threshold.
    """
    images = checks.images(images)
    if images.shape[1:] != guard.image_shape:
        raise ValueError(
            f'This guard was made for images {list(guard.image_shape)}, got '
            f'{list(images.shape[1:])}: resize them, or make a guard for these.'
        )
    check(guard, logits_fn)
    warn_of_lacking(guard)
    return judge_maps(guard, observed(guard, logits_fn, images))


def observed(guard: Guard, logits_fn: LogitsFn, images: Array) -> HeatmapSet:
    """Returns what a guard sees of images."""
    settings = ('method', 'views', 'windows', 'fill', 'autoencoder')
    return see(logits_fn, images, **{name: getattr(guard, name) for name in settings})


def judge_maps(guard: Guard, maps: HeatmapSet) -> Verdict:
    """Returns what a guard says of images by what it sees of them."""
    check_names(maps.unoccluded.shape[-1], guard.class_names)
    scores = METHODS[guard.method].score(guard.bank, maps)
    thresholds = jnp.asarray(guard.thresholds)[maps.predicted]
    return Verdict(maps.predicted, maps.max_probability, scores, thresholds, scores > thresholds)


def check(guard: Guard, logits_fn: LogitsFn):
    """Refuses another classifier than the guard's: one that answers a fixed image otherwise.

    Where weights or guard are not known, as arguments of a traced function, nothing is compared.

    Raises:
        ValueError: if the number of classes is another, or if a logit differs by more than a
            hundredth of the largest, which rounding and half precision leave.
    """
    with jax.ensure_compile_time_eval():
        logits = probe(logits_fn, guard.image_shape)
    check_names(len(logits), guard.class_names)
    if not (checks.is_known(logits) and checks.is_known(guard.probe_logits)):
        return
    expected, logits = (np.asarray(x, np.float32) for x in (guard.probe_logits, logits))
    if not np.allclose(logits, expected, rtol=0, atol=_NEAR * np.abs(expected).max() + 1e-6):
        raise ValueError(
            f'This guard was made for another classifier: on a fixed image it has logits up to '
            f'{np.abs(logits - expected).max():.2g} away from those of then. Judge with the '
            'weights and the normalisation of then, or make a guard for these.'
        )


def probe(logits_fn: LogitsFn, image_shape: tuple[int, int, int]) -> Array:
    """Returns the `[K]` logits of one fixed image of noise, `[H, W, C]`."""
    image = np.random.default_rng(0).random((1, *image_shape), np.float32)
    return checks.logits_fn(logits_fn)(jnp.asarray(image))[0]


def warn_of_lacking(guard: Guard):
    """Warns where thresholds are infinite and so nothing is flagged, if they are known."""
    if guard.fpr == 0 or not checks.is_known(guard.thresholds):
        return
    lacking = np.flatnonzero(np.asarray(guard.thresholds) == np.inf)
    if not len(lacking):
        return
    fitted, count = np.asarray(guard.calibration.is_fitted), len(guard.class_names)
    counts = np.bincount(np.asarray(guard.calibration.predicted), minlength=count)
    needed = f'({metrics.fewest(guard.fpr)} are needed)'
    reasons = [
        f'{guard.class_names[k]} ({counted(counts[k], "clean image")})'
        if fitted[k]
        else f'{guard.class_names[k]} (no attacks, or no clean images, to learn from)'
        for k in lacking[:_NAMED]
    ]
    reasons += [f'{len(lacking) - _NAMED} more'] * (len(lacking) > _NAMED)
    if len(lacking) < count or not fitted.any():
        text = f'No threshold at fpr {guard.fpr:g} {needed} for {", ".join(reasons)}: '
        text += 'this guard flags nothing' + ' there' * (len(lacking) < count)
    else:
        text = (
            f'{counted(counts.sum(), "clean image")}: too few for a threshold at fpr {guard.fpr:g} '
        )
        text += f'{needed}: this guard flags nothing'
    warnings.warn(f'{text}. Give it more images, or a larger fpr.', stacklevel=3)


def sees(
    method: str, views: Sequence[str] | None, windows: dict[str, Any], autoencoder: Any
) -> dict[str, Any]:
    """Returns what detectors see, as a guard has it; `ValueError` if it does not fit together."""
    if views is None:
        views = views_lib.VIEWS if method in names.VIEWING else ()
    unknown = sorted({*views} - {*names.VIEWS} or {method} - {*METHODS})
    if unknown:
        choices = METHODS if method in unknown else names.VIEWS
        raise ValueError(f'Unknown method or view {unknown}: choose from {", ".join(choices)}.')
    needing = {*views, method} & {'reconstruction', 'magnet_error', 'magnet_divergence'}
    if autoencoder is None and needing:
        raise ValueError(f'{needing.pop()} needs a fitted autoencoder.')
    beside = {'fill', 'top_classes', *(comparators.SETTINGS if method in names.COMPARATORS else ())}
    unknown = {*windows} - beside - {*engine.SETTINGS}
    if unknown:
        raise ValueError(f'{sorted(unknown)} is no argument of a guard, nor of its windows.')
    geometry = {*windows} - beside
    if geometry and not METHODS[method].windows:
        raise ValueError(f'{method} sees no windows: leave out {", ".join(sorted(geometry))}.')
    if views and method not in names.VIEWING:
        raise ValueError(f'{method} sees no views of an image: leave them out.')
    windows = tuple((name, hashable(value)) for name, value in windows.items())
    return dict(method=method, views=tuple(views), windows=windows)


def hashable(value: Any) -> Any:
    """Returns NumPy's numbers as Python's, and a list, as JSON makes one of a tuple, as that."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def check_names(num_classes: int, class_names: Sequence[str]):
    """Raises `ValueError` if there are not as many names as classes."""
    if num_classes != len(class_names):
        raise ValueError(
            f'Expected as many classes as names, {len(class_names)}, got logits of {num_classes}.'
        )


def see(
    logits_fn: LogitsFn,
    images: Array,
    *,
    method: str,
    views: Sequence[str],
    windows: Sequence[tuple[str, Any]],
    fill: Fill,
    autoencoder: Any,
) -> HeatmapSet:
    """Returns what detectors see of images; the settings are a guard's."""
    settings, compare_fn = dict(fill=fill) | dict(windows), None
    if method in names.COMPARATORS:
        comparing = {name: settings.pop(name) for name in {*settings} & {*comparators.SETTINGS}}
        compare_fn = functools.partial(comparators.scores, autoencoder=autoencoder, **comparing)
    seen = views_lib.of_names(views, autoencoder)
    settings |= dict(method=METHODS[method], views=seen, compare_fn=compare_fn)
    return verdict.observe(logits_fn, images, **settings)
