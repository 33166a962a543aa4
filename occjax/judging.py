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

from occjax import detector, metrics
from occjax.config import Detector
from occjax.types import HeatmapSet

# Purposes of random numbers: each has its own stream under the config's one seed.
_SPLIT = {'paper': 1, 'held_out': 2}
_UNDERSAMPLING = 3


class Division(NamedTuple):
    """Maps, and the ones among them on which each seed's detectors are fitted."""

    maps: HeatmapSet
    is_fitted: np.ndarray  # bool[S, M]; the others judge

    @property
    def judged_over_fitted(self) -> float:
        """How many maps judge for one that is fitted on."""
        return float((~self.is_fitted).sum() / max(1, self.is_fitted.sum()))


def divide(
    maps: HeatmapSet, protocol: str, settings: Detector, rng_of: Callable[..., np.random.Generator]
) -> Division:
    """Divides maps for every seed (readings A13).

    Args:
        maps: `paper` divides maps at random, as the paper seems to have done; `held_out` divides
            images, so that an image and its attacked twin stand on one side.
        protocol: which.
        settings: the shares to fit on, and the number of seeds.
        rng_of: a generator for a purpose and a seed, such as `Run.rng`.
    """
    unit = np.arange(len(maps)) if protocol == 'paper' else maps.image_id
    fraction = getattr(settings, f'{protocol}_fit_fraction')
    units = np.unique(unit)
    count = round(fraction * len(units))
    chosen = [
        rng_of(_SPLIT[protocol], seed).permutation(units)[:count] for seed in range(settings.seeds)
    ]
    return Division(maps, np.stack([np.isin(unit, units) for units in chosen]))


def init_banks(
    key: jax.Array, division: Division, inputs: np.ndarray, *, num_classes: int, **shape: Any
) -> detector.Bank:
    """Returns a fresh bank for every seed, leaves `[S, K, ...]`, that sees `[M, ...]` inputs."""
    init = functools.partial(
        detector.init_bank, num_classes=num_classes, grid=inputs.shape[1:], **shape
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
    inputs: np.ndarray,
    predicted: np.ndarray,
    settings: Detector,
    rng_of: Callable[..., np.random.Generator],
) -> detector.Bank:
    """Fits every seed's bank on its own maps.

    Args:
        key: JAX random key.
        banks: from `init_banks`.
        division: which maps each seed has.
        inputs: `[M, ...]`, what the detectors see of the maps.
        predicted: `[M]`, whose detector is fitted on a map.
        settings: steps, batches, rate and balance.
        rng_of: a generator for a purpose and a seed; undersamples.
    """
    num_seeds, num_classes = jax.tree.leaves(banks)[0].shape[:2]
    groups = [
        detector.group_by_class(
            inputs[fitted],
            predicted[fitted],
            division.maps.is_adversarial[fitted],
            num_classes=num_classes,
            balance=settings.balance,
            rng=rng_of(_UNDERSAMPLING, seed),
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


score_banks = jax.jit(jax.vmap(detector.score, in_axes=(0, None, None)))  # [S, M]


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
            values[~fitted],
            maps.select(~fitted),
            values[fitted],
            maps.select(fitted),
            class_names=class_names,
            threshold=threshold,
        )
        for fitted, values in zip(division.is_fitted, scores, strict=True)
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
