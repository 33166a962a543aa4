"""Which detectors a run deploys, and what its own held-out images say of them.

Its images are in three parts (`judging.divide`): detectors are fitted on one, the second sets
thresholds and chooses the best, and the third, which neither has seen, tells how good it is.

Dimensions: M maps, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from occjax import averages, detector, guarding, metrics
from occjax.experiment import judging, store
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.types import HeatmapSet

PAPERS = 'detector'  # the paper's, which is always asked


class Scored(NamedTuple):
    """The first seed's detectors of a method, or a score that learns nothing."""

    bank: detector.Bank
    calibration: metrics.Calibration
    score_fn: Callable[[HeatmapSet], np.ndarray]  # maps to [M]


def candidates(run: Run) -> tuple[str, ...]:
    """Returns all that can be deployed: the config's methods, and the scores of its maps."""
    return (*run.config.detector.methods, *metrics.BASELINES)


def scored(run: Run, name: str, division: judging.Division) -> Scored:
    """Returns what scores maps by one of `candidates`, under the protocol `held_out`.

    Raises:
        UsageError: if no maps are reserved for thresholds.
    """
    if name in METHODS:
        banks = store.load_banks(run, division, 'held_out', name)
        return of_banks(banks, name, division)
    judging.check_reserved(division)
    score_fn = metrics.BASELINES[name].score_fn
    known, count = division.known(0, score_fn(division.maps)), division.maps.unoccluded.shape[-1]
    return Scored({}, metrics.calibration(num_classes=count, **known), score_fn)


def of_banks(banks: detector.Bank, method: str, division: judging.Division) -> Scored:
    """Returns the same of banks of all seeds."""
    bank, calibration = judging.first(banks, division, METHODS[method])
    alone = jax.tree.map(lambda leaf: leaf[None], bank)

    def score_fn(maps):
        return judging.score_banks(alone, METHODS[method], maps)[0]

    return Scored(bank, calibration, score_fn)


def held_out(
    score_fn: Callable[[HeatmapSet], np.ndarray],
    division: judging.Division,
    controls: dict[str, HeatmapSet],
) -> guarding.HeldOut:
    """Returns the scores of images that neither fitted nor set thresholds for the first seed.

    Args:
        score_fn: maps to `[M]`.
        division: of clean and attacked maps.
        controls: maps of the same images, `noise` and `misclassified` where there are any.
    """
    judged = division.maps.select(division.is_judged[0])
    used = division.maps.image_id[~division.is_judged[0]]
    parts = {
        'clean': judged.select(~judged.is_adversarial),
        'attacked': judged.select(judged.is_adversarial),
    }
    for kind, name in (('noise', 'noisy'), ('misclassified', 'misclassified')):
        if len(controls.get(kind, ())):
            maps = controls[kind]
            parts[name] = maps.select(~np.isin(maps.image_id, used))
    parts = {name: maps for name, maps in parts.items() if len(maps)}
    return guarding.HeldOut(
        scores=np.concatenate([np.asarray(score_fn(maps)) for maps in parts.values()] or [[]]),
        predicted=np.concatenate([maps.predicted for maps in parts.values()] or [[]]),
        kind=np.repeat([guarding.KINDS.index(name) for name in parts], [*map(len, parts.values())]),
    )


def aurocs(run: Run, division: judging.Division, noise: HeatmapSet) -> dict[str, float]:
    """Returns each candidate's AUROC against clean and noisy images that set thresholds.

    It is the mean over predicted classes, weighted by their attacked maps. Nothing was fitted on
    these images, and none of them is among those of `held_out`.
    """
    reserved = division.is_reserved[0]
    ids = division.maps.image_id[reserved]
    maps = division.maps.select(reserved)
    if len(noise):
        maps = HeatmapSet.concatenate([maps, noise.select(np.isin(noise.image_id, ids))])
    count = maps.unoccluded.shape[-1]
    everyone, predicted = np.ones(len(maps), bool), maps.predicted
    attacked = np.bincount(predicted[maps.is_adversarial], minlength=count)
    found = {}
    for name in candidates(run):
        scores = np.asarray(scored(run, name, division).score_fn(maps))
        by_class = averages.aurocs(scores, maps.is_adversarial, everyone, predicted, count).value
        weights = np.where(np.isnan(by_class), 0, attacked)
        if weights.any():
            found[name] = float(np.average(np.nan_to_num(by_class), weights=weights))
    return found


def best(found: dict[str, float]) -> str:
    """Returns the name of the highest AUROC, of equal ones the first; the paper's if there is none.

    >>> best({'detector': 0.7, 'all_logits': 0.9, 'max_probability': 0.9}), best({})
    ('all_logits', 'detector')
    """
    return max(found, key=found.get) if found else PAPERS
