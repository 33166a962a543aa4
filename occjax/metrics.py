"""How well scores tell adversarial maps from correct ones, on the host.

A score is a number a map, higher for more adversarial. Every threshold comes from the maps that
the detector was fitted on, never from the ones it is judged by. What cannot be computed (a class
with maps of one kind only) is None, never NaN.

Dimensions: M heatmaps.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from occjax.types import COMPARATORS, HeatmapSet

# What a detector must beat: a cell is a confidence, so "darker" may only mean "less confident". The
# spreads are ML-LOO's (https://arxiv.org/abs/1906.03499), there of feature attributions.
BASELINES = {
    'max_probability': lambda maps: -maps.max_probability,
    'map_mean': lambda maps: -maps.maps.mean(axis=(1, 2)),
    'map_minimum': lambda maps: -maps.maps.min(axis=(1, 2)),
    'map_deviation': lambda maps: maps.maps.std(axis=(1, 2)),
    'map_iqr': lambda maps: np.subtract(*np.quantile(maps.cells, (0.75, 0.25), axis=1)),
    'map_mad': lambda maps: _mad(maps.cells),
} | {name: lambda maps, i=i: maps.comparators[:, i] for i, name in enumerate(COMPARATORS)}
RATES = (
    'accuracy',
    'majority_baseline',
    'balanced_accuracy',
    'auroc',
    'tpr_at_5_fpr',
    'tpr_at_1_fpr',
    'fpr_at_5_fpr',
)


def _mad(cells: np.ndarray) -> np.ndarray:
    """Returns the `[M]` medians of the distances of `[M, P]` cells from their median."""
    return np.median(np.abs(cells - np.median(cells, axis=1, keepdims=True)), axis=1)


def threshold_at_fpr(clean_scores: np.ndarray, fpr: float) -> float:
    """Returns the lowest threshold that at most a share `fpr` of `[M]` clean scores exceeds."""
    ordered = np.sort(np.asarray(clean_scores, np.float64))[::-1]
    return float(ordered[int(fpr * len(ordered))])


def best_threshold(scores: np.ndarray, is_adversarial: np.ndarray) -> float:
    """Returns the threshold of highest balanced accuracy on `[M]` scores of both kinds."""
    fpr, tpr, thresholds = sklearn_metrics.roc_curve(
        is_adversarial, np.asarray(scores, np.float64), drop_intermediate=False
    )
    # Scikit-learn calls scores from the threshold on positive, we those above it.
    return float(np.nextafter(thresholds[np.argmax(tpr - fpr)], -np.inf))


def rates(
    scores: np.ndarray,
    is_adversarial: np.ndarray,
    *,
    threshold: float,
    fit_clean_scores: np.ndarray,
) -> dict:
    """Returns the detection rates of one class on the maps it is judged by.

    Args:
        scores: `[M]`, higher for more adversarial.
        is_adversarial: `bool[M]`.
        threshold: a higher score is called adversarial.
        fit_clean_scores: scores of the fitting split's correct maps, which set the thresholds of
            the true positive rates at 5 % and 1 % false positives.

    Returns:
        `n_correct`, `n_adversarial`, and each of `RATES`: None (with a `note`) where a kind is
        missing.
    """
    scores = np.asarray(scores, np.float64)  # The thresholds' precision.
    n_adversarial = int(is_adversarial.sum())
    n_correct = len(scores) - n_adversarial
    counts = {'n_correct': n_correct, 'n_adversarial': n_adversarial}
    missing = [
        name for name, n in (('correct', n_correct), ('adversarial', n_adversarial)) if not n
    ]
    if missing or not len(fit_clean_scores):
        note = f'no {" or ".join(missing or ["fitting"])} maps'
        return counts | dict.fromkeys(RATES) | {'note': note}
    called = scores > threshold
    tpr, fpr = called[is_adversarial].mean(), called[~is_adversarial].mean()
    at_5, at_1 = (threshold_at_fpr(fit_clean_scores, level) for level in (0.05, 0.01))
    values = {
        'accuracy': np.mean(called == is_adversarial),
        'majority_baseline': max(n_correct, n_adversarial) / len(scores),
        'balanced_accuracy': (tpr + 1 - fpr) / 2,
        'auroc': sklearn_metrics.roc_auc_score(is_adversarial, scores),
        'tpr_at_5_fpr': np.mean(scores[is_adversarial] > at_5),
        'tpr_at_1_fpr': np.mean(scores[is_adversarial] > at_1),
        # What share that threshold calls adversarial here: more where the fitting maps were learnt.
        'fpr_at_5_fpr': np.mean(scores[~is_adversarial] > at_5),
    }
    return counts | {name: float(value) for name, value in values.items()}


def per_class(
    scores: np.ndarray,
    maps: HeatmapSet,
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    *,
    class_names: tuple[str, ...],
    threshold: float | None = None,
    is_reserved: np.ndarray | None = None,
) -> dict[str, dict]:
    """Returns `rates` for every class, by the class that the classifier names.

    Args:
        scores: `[M]` scores of `maps`, the ones to judge by.
        maps: maps of both kinds.
        fit_scores: scores of `fit_maps`.
        fit_maps: the maps that detector and thresholds come from.
        class_names: K names.
        threshold: for all classes; None takes each class's `best_threshold` on `fit_maps`.
        is_reserved: `bool` for each of `fit_maps`: the detector was not fitted on these, so that
            they alone set the thresholds at a false positive rate; None: all of them do.
    """
    known = dict(threshold=threshold, is_reserved=is_reserved)
    chosen, _ = thresholds(fit_scores, fit_maps, len(class_names), **known)
    clean = _sets_thresholds(fit_maps, is_reserved)
    result = {}
    for k, name in enumerate(class_names):
        here, known = maps.predicted == k, fit_scores[clean & (fit_maps.predicted == k)]
        result[name] = rates(
            scores[here],
            maps.is_adversarial[here],
            threshold=chosen[k],
            fit_clean_scores=known[:0] if np.isnan(chosen[k]) else known,
        )
    return result


def thresholds(
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    num_classes: int,
    *,
    threshold: float | None = None,
    is_reserved: np.ndarray | None = None,
) -> np.ndarray:
    """Returns `[2, K]`: each class's threshold, and that of 5 % false positives.

    The arguments are `per_class`'s; a class without maps of both kinds to fit by, or without clean
    ones to set thresholds by, has nan.
    """
    fits = np.ones(len(fit_maps), bool) if is_reserved is None else ~is_reserved
    sets, scores = _sets_thresholds(fit_maps, is_reserved), np.asarray(fit_scores, np.float64)
    result = np.full((2, num_classes), np.nan)
    for k in range(num_classes):
        here = fit_maps.predicted == k
        kinds = fit_maps.is_adversarial[here & fits]
        if kinds.any() and not kinds.all() and (here & sets).any():
            best = threshold
            if threshold is None:
                best = best_threshold(scores[here], fit_maps.is_adversarial[here])
            result[:, k] = best, threshold_at_fpr(scores[here & sets], 0.05)
    return result


def _sets_thresholds(fit_maps, is_reserved):
    """Returns which of `per_class`'s fitting maps set the thresholds at a false positive rate."""
    clean = ~fit_maps.is_adversarial
    return clean if is_reserved is None else clean & is_reserved


def overall(classes: dict[str, dict]) -> dict:
    """Returns the unweighted class mean of every rate (readings differ; Table VI is this one)."""
    values = {
        name: [entry[name] for entry in classes.values() if entry[name] is not None]
        for name in RATES
    }
    counts = {
        name: sum(entry[name] for entry in classes.values())
        for name in ('n_correct', 'n_adversarial')
    }
    return counts | {name: float(np.mean(v)) if v else None for name, v in values.items()}


def interval(values: Sequence[float], *, judged_over_fitted: float) -> tuple[float, float] | None:
    """Returns the 95 % interval of a rate that several random divisions of one set measured.

    The divisions share maps, so their spread alone says too little: Nadeau and Bengio's corrected
    t interval adds what the set itself might have been otherwise.

    Args:
        values: one a division.
        judged_over_fitted: how many maps judge for one that is fitted on.

    Returns:
        Its ends, None for fewer than two values.

    References:
        Nadeau & Bengio, https://doi.org/10.1023/A:1024068626366
    """
    if len(values) < 2:
        return None
    variance = (1 / len(values) + judged_over_fitted) * np.var(values, ddof=1)
    reach = stats.t.ppf(0.975, len(values) - 1) * np.sqrt(variance)
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def over_seeds(entries: Sequence[dict], *, judged_over_fitted: float) -> dict:
    """Returns the mean over seeds of each of their `rates` or `overall`s, and its interval.

    The counts are means as well, to the nearest whole; a rate that a seed lacks is the mean over
    those that have it, and None if none does.
    """
    result = {
        name: round(np.mean([entry[name] for entry in entries]))
        for name in ('n_correct', 'n_adversarial')
    }
    intervals = {}
    for name in RATES:
        values = [entry[name] for entry in entries if entry[name] is not None]
        result[name] = float(np.mean(values)) if values else None
        intervals[name] = interval(values, judged_over_fitted=judged_over_fitted)
    notes = [entry['note'] for entry in entries if 'note' in entry]
    if notes and result['auroc'] is None:
        result['note'] = notes[0]
    return result | {'interval': intervals}
