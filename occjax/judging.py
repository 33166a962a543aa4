"""Fits detectors on some maps and judges them by others, over several seeds, all at once.

A seed has its own division of the maps, its own initial weights and its own undersampling; the
detectors of all seeds and classes are one program.

Dimensions: S seeds, M maps, K classes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from occjax import detector, metrics, streams
from occjax.config import Detector
from occjax.methods import Method
from occjax.types import HeatmapSet

# Purposes of random numbers: each has its own stream under the config's one seed.
_SPLIT = {'paper': 1, 'held_out': 2}


class Division(NamedTuple):
    """Maps, and the ones among them on which each seed's detectors are fitted."""

    maps: HeatmapSet
    is_fitted: np.ndarray  # bool[S, M]
    is_reserved: np.ndarray  # bool[S, M], for the thresholds alone; where none is, see `known`

    @property
    def is_judged(self) -> np.ndarray:
        """`bool[S, M]`, the maps that detectors are judged by."""
        return ~(self.is_fitted | self.is_reserved)

    @property
    def judged_over_fitted(self) -> float:
        """How many maps judge for one that is fitted on."""
        return float(self.is_judged.sum() / max(1, self.is_fitted.sum()))

    def known(self, seed: int, scores: np.ndarray, *, learns: bool) -> dict[str, Any]:
        """Returns what a seed's thresholds come from, as `metrics.thresholds` takes it.

        Args:
            seed: which.
            scores: `[M]`.
            learns: whether they are of networks, which know the maps they were fitted on better
                than any others: where maps are reserved, these then set the thresholds.
        """
        here = ~self.is_judged[seed]
        reserved = self.is_reserved[seed][here]
        return {
            'fit_scores': scores[here],
            'fit_maps': self.maps.select(here),
            'is_reserved': reserved if learns and reserved.any() else None,
        }


def divide(
    maps: HeatmapSet, protocol: str, settings: Detector, rng_of: Callable[..., np.random.Generator]
) -> Division:
    """Divides maps for every seed (readings A13).

    Args:
        maps: `paper` divides maps at random, as the paper seems to have done; `held_out` divides
            images, so that an image and its attacked twin stand on one side.
        protocol: which.
        settings: the shares to fit on and to set thresholds by, and the number of seeds.
        rng_of: a generator for a purpose and a seed, such as `Run.rng`.
    """
    unit = np.arange(len(maps)) if protocol == 'paper' else maps.image_id
    fraction = getattr(settings, f'{protocol}_fit_fraction')
    reserved = settings.held_out_threshold_fraction if protocol == 'held_out' else 0.0
    units = np.unique(unit)
    ends = round(fraction * len(units)), round((fraction + reserved) * len(units))
    parts = [
        np.split(rng_of(_SPLIT[protocol], seed).permutation(units), ends)[:2]
        for seed in range(settings.seeds)
    ]
    masks = [np.stack([np.isin(unit, part) for part in kind]) for kind in zip(*parts, strict=True)]
    return Division(maps, *masks)


def init_banks(key: jax.Array, division: Division, method: Method) -> detector.Bank:
    """Returns a fresh bank of a method for every seed, leaves `[S, K, ...]`."""
    maps = division.maps
    init = functools.partial(
        detector.init_bank,
        num_classes=method.num_networks(maps),
        grid=method.inputs_fn(maps.select(slice(0, 1))).shape[1:],
        features=method.features,
        convolutions=method.convolutions,
        standardize=method.standardize,
    )
    return jax.vmap(init)(jax.random.split(key, len(division.is_fitted)))


@functools.partial(jax.jit, static_argnames=('steps', 'batch_size'))
def _fit_banks(keys, banks, groups, **hyperparameters):
    fit = functools.partial(detector.fit_bank, **hyperparameters)
    return jax.vmap(fit)(keys, banks, *groups)


def fit_banks(
    key: jax.Array,
    banks: detector.Bank,
    division: Division,
    method: Method,
    settings: Detector,
    rng_of: Callable[..., np.random.Generator],
) -> detector.Bank:
    """Fits every seed's bank on its own maps.

    Args:
        key: JAX random key.
        banks: from `init_banks`.
        division: which maps each seed has.
        method: what the networks see.
        settings: steps, batches, rate and balance.
        rng_of: a generator for a purpose and a seed; undersamples.
    """
    maps, num_seeds = division.maps, len(division.is_fitted)
    inputs, predicted = method.inputs_fn(maps).astype(np.float32), method.predicted(maps)
    groups = [
        detector.group_by_class(
            inputs[fitted],
            predicted[fitted],
            maps.is_adversarial[fitted],
            num_classes=method.num_networks(maps),
            balance=settings.balance,
            rng=rng_of(streams.Stream.UNDERSAMPLING, seed),
        )
        for seed, fitted in enumerate(division.is_fitted)
    ]
    return _fit_banks(
        jax.random.split(key, num_seeds),
        banks,
        detector.stack_groups(groups),
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )


_score_banks = jax.jit(jax.vmap(detector.score, in_axes=(0, None, None)))


def score_banks(banks: detector.Bank, method: Method, maps: HeatmapSet) -> np.ndarray:
    """Returns the `[S, M]` scores that every seed's bank gives to maps."""
    inputs = method.inputs_fn(maps).astype(np.float32)
    return np.asarray(_score_banks(banks, inputs, method.predicted(maps)))


def by_seed(
    scores: np.ndarray,
    division: Division,
    *,
    class_names: Sequence[str],
    threshold: float | None = None,
) -> list[dict[str, dict]]:
    """Returns `metrics.per_class` for every seed; the arguments are `judge`'s."""
    maps = division.maps
    scores = np.broadcast_to(np.asarray(scores), division.is_fitted.shape)
    return [
        metrics.per_class(
            values[judged],
            maps.select(judged),
            class_names=class_names,
            threshold=threshold,
            **division.known(seed, values, learns=threshold is not None),
        )
        for seed, (judged, values) in enumerate(zip(division.is_judged, scores, strict=True))
    ]


def judge(
    scores: np.ndarray,
    division: Division,
    *,
    class_names: Sequence[str],
    threshold: float | None = None,
) -> dict:
    """Returns `per_class` and `overall` rates: means over the seeds, with 95 % intervals.

    Args:
        scores: `[S, M]`, or `[M]` where every seed has the same.
        division: the maps they belong to.
        class_names: K names.
        threshold: see `metrics.per_class`.
    """
    seeds = by_seed(scores, division, class_names=class_names, threshold=threshold)
    mean = functools.partial(metrics.over_seeds, judged_over_fitted=division.judged_over_fitted)
    return {
        'per_class': {name: mean([classes[name] for classes in seeds]) for name in class_names},
        'overall': mean([metrics.overall(classes) for classes in seeds]),
    }


def control_rates(
    scores: np.ndarray,
    controls: HeatmapSet,
    fit_scores: np.ndarray,
    division: Division,
    *,
    threshold: float | None = None,
) -> dict:
    """Returns how many of some other maps are called adversarial, as means over the seeds.

    Args:
        scores: `[S, M]` or `[M]` scores of the controls.
        controls: maps of one kind, of the same split; those of images that a seed's detectors or
            thresholds come from don't count for it.
        fit_scores: `[S, M]` or `[M]` scores of `division.maps`.
        division: what detectors and thresholds were fitted on.
        threshold: see `metrics.per_class`; None means scores that learn nothing.

    Returns:
        `n` (the mean of the seeds), `called` and `called_at_5_fpr`, shares with their `interval`s.
    """
    called = {'called': [], 'called_at_5_fpr': []}
    counts = []
    scores = np.broadcast_to(scores, (len(division.is_fitted), len(controls)))
    fit_scores = np.broadcast_to(fit_scores, division.is_fitted.shape)
    for seed, values in enumerate(scores):
        known = division.known(seed, fit_scores[seed], learns=threshold is not None)
        levels = metrics.thresholds(
            num_classes=controls.unoccluded.shape[-1], threshold=threshold, **known
        )[:, controls.predicted]
        fresh = ~np.isin(controls.image_id, known['fit_maps'].image_id)
        here = fresh & ~np.isnan(levels[0])
        counts.append(here.sum())
        for kind, level in zip(called, levels, strict=True):
            if here.any():
                called[kind].append(float(np.mean(values[here] > level[here])))
    ratio = division.judged_over_fitted
    return (
        {'n': round(np.mean(counts))}
        | {kind: float(np.mean(v)) if v else None for kind, v in called.items()}
        | {
            'interval': {
                kind: metrics.interval(v, judged_over_fitted=ratio) for kind, v in called.items()
            }
        }
    )
