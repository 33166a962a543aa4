"""Fits detectors on some maps and judges them by others, over several seeds, all at once.

A seed has its own division of the maps, its own initial weights and its own undersampling; the
detectors of all seeds, and of a few classes at a time, are one program.

Dimensions: S seeds, M maps, K classes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn import metrics as sklearn_metrics

from occjax import averages, detector, metrics, names, streams
from occjax.config import Detector
from occjax.experiment import devices
from occjax.methods import METHODS, Method
from occjax.streams import Stream
from occjax.types import HeatmapSet, UsageError

# Classes whose networks are fitted, or score, at once: those of a thousand would fill any memory.
_AT_ONCE = 16


class Scorer(NamedTuple):
    """What gives maps a score, higher for more adversarial, and what to know of it."""

    score_fn: Callable[[HeatmapSet], np.ndarray]  # maps to [M], or to [S, M] by seeds of its own
    threshold: float | None = None  # a higher score is flagged; None: the best of the fitting maps
    learns: bool = False  # it knows the maps it was fitted on better than any others


class Division(NamedTuple):
    """Maps, and the ones among them on which each seed's detectors are fitted."""

    maps: HeatmapSet
    is_fitted: np.ndarray  # bool[S, M]
    is_reserved: np.ndarray  # bool[S, M], for the thresholds alone

    @property
    def is_judged(self) -> np.ndarray:
        """`bool[S, M]`, the maps that detectors are judged by."""
        return ~(self.is_fitted | self.is_reserved)

    @property
    def is_counted(self) -> np.ndarray:
        """`bool[S, M]`, those of them whose class's detector had both kinds to learn from."""
        count, predicted = self.maps.unoccluded.shape[-1], self.maps.predicted
        fitted = (metrics.has_both_kinds(self.maps.select(row), count) for row in self.is_fitted)
        return self.is_judged & np.stack([classes[predicted] for classes in fitted])

    @property
    def judged_over_fitted(self) -> float:
        """How many maps judge for one that is fitted on."""
        return float(self.is_judged.sum() / max(1, self.is_fitted.sum()))

    def known(self, seed: int, scores: np.ndarray) -> dict[str, Any]:
        """Returns what a seed's thresholds come from, as `metrics.thresholds` takes it.

        Args:
            seed: from 0, the row of the masks.
            scores: `[M]`, what this seed's detectors give all maps.
        """
        here = ~self.is_judged[seed]
        return {
            'fit_scores': scores[here],
            'fit_maps': self.maps.select(here),
            'is_reserved': self.is_reserved[seed][here],
        }


def divide(maps: HeatmapSet, protocol: str, settings: Detector, seed: int) -> Division:
    """Divides maps for every seed of the detectors (readings A13).

    Args:
        maps: of one split.
        protocol: `paper` divides maps at random, as the paper seems to have done; `held_out`
            divides images, so that an image and its attacked twin are on one side.
        settings: the shares to fit on and to set thresholds by, and the number of seeds.
        seed: the experiment's.
    """
    unit = np.arange(len(maps)) if protocol == 'paper' else maps.image_id
    fraction = getattr(settings, f'{protocol}_fit_fraction')
    reserved = settings.held_out_threshold_fraction if protocol == 'held_out' else 0.0
    units = np.unique(unit)
    ends = round(fraction * len(units)), round((fraction + reserved) * len(units))
    rngs = [
        streams.rng(seed, Stream.DIVISION, names.PROTOCOLS.index(protocol), i)
        for i in range(settings.seeds)
    ]
    parts = [np.split(rng.permutation(units), ends)[:2] for rng in rngs]
    masks = [np.stack([np.isin(unit, part) for part in kind]) for kind in zip(*parts, strict=True)]
    return Division(maps, *masks)


def lacking(division: Division) -> np.ndarray:
    """Returns `bool[K]`, of which classes some seed has too few maps.

    It has none of a kind to fit on, or too few clean ones for a threshold of its own at 5 % false
    positives; classes without one share theirs, see `metrics.class_thresholds`.
    """
    maps, sets = division.maps, division.is_fitted
    if division.is_reserved.any():
        sets = division.is_reserved
    known = maps.predicted, maps.is_adversarial, maps.unoccluded.shape[-1]
    clean = _counts(sets, *known)[..., 0]
    is_few = (_counts(division.is_fitted, *known) == 0).any(-1) | (clean < metrics.fewest(0.05))
    return is_few.any(0)


def _counts(chosen, predicted, is_adversarial, num_classes):
    """Returns `[S, K, 2]`, how many clean and adversarial maps of each class `[S, M]` choose."""
    place = 2 * predicted + is_adversarial
    counts = [np.bincount(place[row], minlength=2 * num_classes) for row in chosen]
    return np.reshape(counts, (len(chosen), num_classes, 2))


@functools.partial(
    jax.jit, static_argnames=('num_classes', 'grid', 'features', 'convolutions', 'standardize')
)
def _init_banks(keys, **settings):
    return jax.lax.map(functools.partial(detector.init_bank, **settings), keys)


def init_banks(key: jax.Array, division: Division, method: Method) -> detector.Bank:
    """Returns a fresh bank of a method for every seed, leaves `[S, K, ...]`."""
    maps = division.maps
    return _init_banks(
        jax.random.split(key, len(division.is_fitted)),
        num_classes=method.num_networks(maps),
        grid=method.inputs_fn(maps.select(slice(0, 1))).shape[1:],
        **method.fields,
    )


@functools.partial(jax.jit, static_argnames=('steps', 'batch_size'))
def _fit_banks(keys, banks, groups, **hyperparameters):
    fit = functools.partial(detector.fit, **hyperparameters)
    return jax.vmap(jax.vmap(fit))(keys, banks, *groups)


def _few_at_once(classes: np.ndarray, predicted: np.ndarray) -> Iterator[tuple]:
    """Yields some of the classes, which of the `[M]` maps are theirs, and these maps' places."""
    for start in range(0, len(classes), _AT_ONCE):
        few = classes[start : start + _AT_ONCE]
        yield few, np.isin(predicted, few), np.searchsorted(few, predicted)


def fit_banks(
    key: jax.Array,
    banks: detector.Bank,
    division: Division,
    method: Method,
    settings: Detector,
    seed: int,
    noise: HeatmapSet | None = None,
) -> detector.Bank:
    """Returns every seed's bank, fitted on its own maps; on the host, as it may be large.

    Networks without maps of both kinds stay as they are.

    Args:
        key: JAX random key.
        banks: from `init_banks`.
        division: which maps each seed has.
        method: what the networks see.
        settings: steps, batches, rate and balance.
        seed: the experiment's, for what undersampling keeps.
        noise: maps of noisy images of the same split; those of images that are fitted on join the
            clean ones.
    """
    maps, is_fitted = division.maps, division.is_fitted
    if noise is not None:
        joins = [np.isin(noise.image_id, maps.image_id[fitted]) for fitted in is_fitted]
        is_fitted = np.concatenate([is_fitted, joins], axis=1)
        maps = HeatmapSet.concatenate([maps, noise])
    inputs, predicted = method.inputs_fn(maps).astype(np.float32), method.predicted(maps)
    kinds, count = maps.is_adversarial, method.num_networks(maps)
    keys = jax.random.split(key, len(is_fitted))
    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    rngs = [streams.rng(seed, Stream.UNDERSAMPLING, i) for i in range(len(is_fitted))]
    learns = (_counts(is_fitted, predicted, kinds, count) > 0).all(-1).any(0)
    banks = jax.tree.map(np.array, banks)
    for few, are_theirs, places in _few_at_once(np.flatnonzero(learns), predicted):
        groups = [
            detector.group_by_class(
                inputs[here],
                places[here],
                kinds[here],
                num_classes=len(few),
                balance=settings.balance,
                rng=rng,
            )
            for here, rng in zip(is_fitted & are_theirs, rngs, strict=True)
        ]
        theirs = jax.tree.map(lambda leaf, few=few: leaf[:, few], banks)
        fitted = _fitted(keys[:, few], theirs, detector.stack_groups(groups), settings)
        for leaf, part in zip(jax.tree.leaves(banks), jax.tree.leaves(fitted), strict=True):
            leaf[:, few] = part
    return banks


def _fitted(keys, banks, groups, settings):
    """Returns `[S, K]` fitted detectors; several devices divide them all."""
    known = dict(steps=settings.steps, batch_size=settings.batch_size)
    if devices.mesh().size == 1:
        return _fit_banks(keys, banks, groups, learning_rate=settings.learning_rate, **known)
    fit_fn = functools.partial(
        _fit_divided, learning_rate=settings.learning_rate, mesh=devices.mesh(), **known
    )
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (keys, banks, groups))
    fitted = devices.spread(fit_fn, *flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*keys.shape, *leaf.shape[1:]), fitted)


@functools.partial(jax.jit, static_argnames=('mesh', 'steps', 'batch_size'))
def _fit_divided(keys, detectors, groups, learning_rate, *, mesh, **hyperparameters):
    """Fits `[N]` detectors, each device its own."""

    def fit(keys, detectors, groups, rate):
        fit_one = functools.partial(detector.fit, learning_rate=rate, **hyperparameters)
        return jax.vmap(fit_one)(keys, detectors, *groups)

    whole, by_detector = jax.P(), jax.P('data')
    return jax.shard_map(
        fit,
        mesh=mesh,
        in_specs=(by_detector, by_detector, by_detector, whole),
        out_specs=by_detector,
        check_vma=False,
    )(keys, detectors, groups, learning_rate)


_score_banks = jax.jit(jax.vmap(detector.score, in_axes=(0, None, None)))


def score_banks(banks: detector.Bank, method: Method, maps: HeatmapSet) -> np.ndarray:
    """Returns the `[S, M]` scores that every seed's bank gives to maps."""
    inputs, predicted = method.inputs_fn(maps).astype(np.float32), method.predicted(maps)
    seeds, count = jax.tree.leaves(banks)[0].shape[:2]
    scores = np.zeros((seeds, len(maps)), np.float32)
    for few, are_theirs, places in _few_at_once(np.arange(count), predicted):
        rows = np.flatnonzero(are_theirs)
        if len(rows):
            # Past the end the first again, so that about as many are scored by one program.
            padded = np.resize(rows, -(-len(rows) // 64) * 64) if count > _AT_ONCE else rows
            these = jax.tree.map(lambda leaf, few=few: leaf[:, few], banks)
            found = _score_banks(these, inputs[padded], places[padded])
            scores[:, rows] = found[:, : len(rows)]
    return scores


def check_reserved(division: Division):
    """Raises `UsageError` if no maps are reserved for thresholds."""
    if not division.is_reserved[0].any():
        raise UsageError(
            'No images are left for the thresholds of detectors in use, which must not come from '
            'those that they were fitted on: set config.detector.held_out_threshold_fraction to '
            '0.2 or so, in another --workdir.'
        )


def first(
    banks: detector.Bank, division: Division, method: Method
) -> tuple[detector.Bank, metrics.Calibration]:
    """Returns the first seed's bank, as one would deploy it, and what its thresholds come from.

    Raises:
        UsageError: if no maps are reserved for thresholds.
    """
    check_reserved(division)
    known = division.known(0, score_banks(banks, method, division.maps)[0])
    num_classes = division.maps.unoccluded.shape[-1]
    calibration = metrics.calibration(num_classes=num_classes, learns=True, **known)
    return jax.tree.map(lambda leaf: leaf[0], banks), calibration


def scorer(name: str, load_banks: Callable[[str], detector.Bank]) -> Scorer:
    """Returns what scores maps by a name: the networks of a method, or a baseline.

    Args:
        name: of `methods.METHODS` or `metrics.SCORES`.
        load_banks: returns a method's fitted banks; not asked for a baseline.
    """
    if name in METHODS:
        method = METHODS[name]
        score_fn = functools.partial(score_banks, load_banks(name), method)
        return Scorer(score_fn, threshold=0.0, learns=True)
    return Scorer(metrics.SCORES[name].score_fn)


def by_seed(
    scorer: Scorer, scores: np.ndarray, division: Division, *, noise: HeatmapSet | None = None
) -> list[averages.Measured]:
    """Returns `averages.measure` of every seed; the arguments are `judge`'s."""
    scores, seeds = np.broadcast_to(scores, division.is_fitted.shape), []
    if noise is not None:
        noisy = np.broadcast_to(scorer.score_fn(noise), (len(scores), len(noise)))
    for seed, (judged, values) in enumerate(zip(division.is_judged, scores, strict=True)):
        known, fresh_noise = division.known(seed, values), None
        if noise is not None:
            fresh = ~np.isin(noise.image_id, known['fit_maps'].image_id)
            fresh_noise = noisy[seed][fresh], noise.predicted[fresh], noise.image_id[fresh]
        levels = _thresholds(scorer, division, known)
        maps = division.maps.select(judged)
        seeds.append(averages.measure(values[judged], maps, levels, noise=fresh_noise))
    return seeds


def _thresholds(scorer, division, known):
    """Returns a seed's `metrics.thresholds`."""
    count = division.maps.unoccluded.shape[-1]
    rule = dict(threshold=scorer.threshold, learns=scorer.learns)
    return metrics.thresholds(num_classes=count, **rule, **known)


def judge(
    scorer: Scorer,
    scores: np.ndarray,
    division: Division,
    *,
    class_names: Sequence[str],
    noise: HeatmapSet | None = None,
) -> dict:
    """Returns `averages.over_seeds`, and `seeds`, what each measured.

    Args:
        scorer: what is judged.
        scores: `[S, M]`, or `[M]` where every seed has the same: what it gives the division's maps.
        division: the maps, and who is fitted on which.
        class_names: K names.
        noise: maps of noisy images of the same split; those of images that a seed's detectors or
            thresholds come from don't count for it.
    """
    seeds = by_seed(scorer, scores, division, noise=noise)
    ratio = division.judged_over_fitted
    return averages.over_seeds(seeds, class_names, judged_over_fitted=ratio) | {'seeds': seeds}


def roc(scores: np.ndarray, division: Division) -> dict | None:
    """Returns the ROC curve of the AUROC over all maps, a mean over seeds.

    It is the mean of the predicted classes' curves, weighted by their adversarial maps.

    Args:
        scores: `[S, M]` or `[M]`, of the division's maps.
        division: the maps, of which those that judge count, of classes that could be fitted.

    Returns:
        `tpr` at 101 false positive rates `fpr`, on the lines between the curves' corners, and
        `auroc`, the area below the lines themselves. None if no class has maps of both kinds.
    """
    maps, grid, curves = division.maps, np.linspace(0, 1, 101), []
    predicted, counted = maps.predicted, division.is_counted
    for judged, values in zip(counted, np.broadcast_to(scores, counted.shape), strict=True):
        weights, rates = [], []
        for k in np.unique(predicted):
            here = judged & (predicted == k)
            kinds = maps.is_adversarial[here]
            if kinds.any() and not kinds.all():
                fpr, tpr, _ = sklearn_metrics.roc_curve(kinds, values[here])
                weights.append(kinds.sum())
                rates.append([*np.interp(grid, fpr, tpr), sklearn_metrics.auc(fpr, tpr)])
        if rates:
            curves.append(np.average(rates, axis=0, weights=weights))
    if not curves:
        return None
    *tpr, auroc = np.mean(curves, axis=0).tolist()
    return {'fpr': grid.tolist(), 'tpr': tpr, 'auroc': auroc}


def control_rates(
    scorer: Scorer, scores: np.ndarray, division: Division, controls: HeatmapSet
) -> dict:
    """Returns how many of some other maps are flagged, as means over the seeds.

    Args:
        scorer: what is judged.
        scores: `[S, M]` or `[M]`, what it gives the division's maps.
        division: what detectors and thresholds were fitted on.
        controls: maps of one kind, of the same split; those of images that a seed's detectors or
            thresholds come from don't count for it.

    Returns:
        `n` (the mean of the seeds), `flagged` and `flagged_at_5_fpr`, shares with their
        `interval`s; and where classes without a threshold of 5 % false positives leave fewer to
        that share, `over` says how many, of how many.
    """
    shares, n = {'flagged': [], 'flagged_at_5_fpr': []}, []
    fit_scores = np.broadcast_to(scores, division.is_fitted.shape)
    scores = np.broadcast_to(scorer.score_fn(controls), (len(fit_scores), len(controls)))
    for seed, values in enumerate(scores):
        known = division.known(seed, fit_scores[seed])
        levels = np.stack(_thresholds(scorer, division, known)[:2])[:, controls.predicted]
        fresh = ~np.isin(controls.image_id, known['fit_maps'].image_id)
        members = fresh & ~np.isnan(levels[0]) & np.isfinite(levels)
        n.append(members.sum(axis=1))
        for rates, level, here in zip(shares.values(), levels, members, strict=True):
            rates.append(averages.share(metrics.numbers(values) > level, here))
    images, counts = [controls.image_id] * len(scores), np.transpose(n)
    found = {
        name: averages.averaged(
            rates, images, n=[count.min()], judged_over_fitted=division.judged_over_fitted
        )[0]
        for (name, rates), count in zip(shares.items(), counts, strict=True)
    }
    total, at_5 = (round(count) for count in counts.mean(axis=1))
    return {
        'n': total,
        **{name: value for name, (value, _) in found.items()},
        'interval': {name: ends for name, (_, ends) in found.items()},
        'over': {'flagged_at_5_fpr': [at_5, total]} if 0 < at_5 < total else {},
    }
