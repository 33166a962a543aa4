"""How well scores tell adversarial maps from correct ones, on the host.

A score is a number a map, higher for more adversarial. No threshold comes from the maps that a
detector is judged by, and one at a false positive rate keeps its promise on fresh ones. What cannot
be computed (a class with maps of one kind only) is None, never NaN.

Dimensions: M heatmaps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from occjax.names import COMPARATORS
from occjax.types import HeatmapSet


class Baseline(NamedTuple):
    """A score that learns nothing, and how many forward passes an image costs it."""

    score_fn: Callable[[HeatmapSet], np.ndarray]
    passes: int | None = None  # None: one for every window, and one more


# What a detector must beat: a cell is a confidence, so "darker" may only mean "less confident". The
# spreads are ML-LOO's (https://arxiv.org/abs/1906.03499), there of feature attributions; the last
# three are those of `comparators`, stored beside the maps.
BASELINES = {
    'max_probability': Baseline(lambda maps: -maps.max_probability, passes=1),
    'map_mean': Baseline(lambda maps: -maps.maps.mean(axis=(1, 2))),
    'map_minimum': Baseline(lambda maps: -maps.maps.min(axis=(1, 2))),
    'map_deviation': Baseline(lambda maps: maps.maps.std(axis=(1, 2))),
    'map_iqr': Baseline(lambda maps: np.subtract(*np.quantile(maps.cells, (0.75, 0.25), axis=1))),
    'map_mad': Baseline(lambda maps: _mad(maps.cells)),
} | {
    name: Baseline(lambda maps, i=i: maps.comparators[:, i], passes)
    for i, (name, passes) in enumerate(zip(COMPARATORS, (3, 1, 2), strict=True))
}
# With a sweep's, of a second classifier's logits: PID (https://arxiv.org/abs/2506.03765).
SCORES = BASELINES | {'pid': Baseline(lambda maps: _surprise(maps.twin, maps.predicted), passes=2)}
COUNTS = ('n_correct', 'n_adversarial', 'n_thresholds')
RATES = (
    'accuracy',
    'majority_baseline',
    'balanced_accuracy',
    'auroc',
    'auroc_with_noise',
    'tpr_at_5_fpr',
    'tpr_at_1_fpr',
    'fpr_at_5_fpr',
)


def _mad(cells: np.ndarray) -> np.ndarray:
    """Returns the `[M]` medians of the distances of `[M, P]` cells from their median."""
    return np.median(np.abs(cells - np.median(cells, axis=1, keepdims=True)), axis=1)


def _surprise(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns `[M]`, less the logarithm of how probable `[M, K]` logits take a class each to be."""
    own = np.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
    return np.logaddexp.reduce(logits, axis=1) - own


def threshold_at_fpr(clean_scores: np.ndarray, fpr: float) -> float:
    """Returns the lowest threshold that a fresh clean score exceeds with probability at most `fpr`.

    It is the k-th largest of n clean scores, k = floor(fpr (n + 1)): a fresh one, exchangeable with
    them, lies strictly above it with probability k / (n + 1), or less where scores tie. With fewer
    than 1 / fpr - 1 scores no finite threshold keeps the promise (19 for 5 %, 99 for 1 %).

    Args:
        clean_scores: `[M]`, of maps on which nothing was fitted.
        fpr: from 0 to 1.

    Returns:
        The threshold; infinite where M is too small, so that nothing is called adversarial.

    Raises:
        ValueError: if a score is NaN, which is neither above nor below a threshold, or `fpr` is no
            rate.

    References:
        Vovk et al., Algorithmic Learning in a Random World, 2.2 (conformal prediction)

    >>> threshold_at_fpr(np.arange(19), 0.05), threshold_at_fpr(np.arange(18), 0.05)
    (18.0, inf)
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f'fpr is {fpr}: a false positive rate lies between 0 and 1.')
    ordered = np.sort(_numbers(clean_scores))[::-1]
    # The product may end a last bit below a whole number: 0.29 * 100 does.
    k = math.floor(fpr * (len(ordered) + 1) + 1e-9)
    return float(np.concatenate([[np.inf], ordered, [-np.inf]])[k])


def fewest(fpr: float) -> float:
    """Returns how many clean scores it takes until `threshold_at_fpr` is finite.

    >>> fewest(0.05), fewest(0.01), fewest(0)
    (19, 99, inf)
    """
    return math.ceil(1 / fpr - 1 - 1e-9) if fpr else math.inf


def class_thresholds(
    clean_scores: np.ndarray, predicted: np.ndarray, num_classes: int, fpr: float
) -> np.ndarray:
    """Returns every class's `threshold_at_fpr`; classes too small for one of their own share one.

    What they share comes from the scores of all such classes together, and keeps its promise on
    fresh maps of them together, though not of each. It is infinite where even they are too few.

    Args:
        clean_scores: `[M]`, of maps on which nothing was fitted.
        predicted: `[M]` integer classes that the classifier predicts.
        num_classes: K.
        fpr: from 0 to 1.

    Returns:
        `[K]` thresholds.
    """
    own = [threshold_at_fpr(clean_scores[predicted == k], fpr) for k in range(num_classes)]
    is_small = np.array(own) == np.inf
    shared = threshold_at_fpr(clean_scores[is_small[predicted]], fpr)
    return np.where(is_small, shared, own)


def _numbers(scores):
    """Returns `[M]` scores in the precision of thresholds, none of them NaN."""
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise ValueError(
            f'{np.isnan(scores).sum()} of {scores.size} scores are NaN, which no threshold can '
            'tell from clean: score finite maps with finite weights.'
        )
    return scores


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
    at_5: float,
    at_1: float,
    noise_scores: np.ndarray = (),
) -> dict:
    """Returns the detection rates of one class on the maps it is judged by.

    Args:
        scores: `[M]`, higher for more adversarial.
        is_adversarial: `bool[M]`.
        threshold: a higher score is called adversarial; NaN where there were no maps to fit by.
        at_5, at_1: the same at a false positive rate of 5 % and 1 %, see `class_thresholds`.
        noise_scores: of noisy images, which are no attacks either: `auroc_with_noise` is against
            these and the clean ones together, None without any.

    Returns:
        `n_correct`, `n_adversarial` and each of `RATES`. All rates are None (with a `note`) where a
        kind is missing; those at a false positive rate also where their threshold is infinite.

    Raises:
        ValueError: if a score is NaN.
    """
    scores, is_adversarial = _numbers(scores), np.asarray(is_adversarial, bool)
    n_adversarial = int(is_adversarial.sum())
    n_correct = len(scores) - n_adversarial
    counts = {'n_correct': n_correct, 'n_adversarial': n_adversarial}
    missing = [
        name for name, n in (('correct', n_correct), ('adversarial', n_adversarial)) if not n
    ]
    if missing or np.isnan(threshold):
        note = f'no {" or ".join(missing or ["fitting"])} maps'
        return counts | dict.fromkeys(RATES) | {'note': note}
    called, attacked, clean = scores > threshold, scores[is_adversarial], scores[~is_adversarial]
    tpr, fpr = called[is_adversarial].mean(), called[~is_adversarial].mean()
    return counts | {
        'accuracy': float(np.mean(called == is_adversarial)),
        'majority_baseline': max(n_correct, n_adversarial) / len(scores),
        'balanced_accuracy': float(tpr + 1 - fpr) / 2,
        'auroc': float(sklearn_metrics.roc_auc_score(is_adversarial, scores)),
        'auroc_with_noise': _with_noise(scores, is_adversarial, noise_scores),
        'tpr_at_5_fpr': share_above(attacked, at_5),
        'tpr_at_1_fpr': share_above(attacked, at_1),
        # What share that threshold calls adversarial here: more where the fitting maps were learnt.
        'fpr_at_5_fpr': share_above(clean, at_5),
    }


def _with_noise(scores, is_adversarial, noise_scores):
    """Returns the AUROC with noisy images among those that are not attacked."""
    if not len(noise_scores):
        return None
    together = np.concatenate([scores, _numbers(noise_scores)])
    kinds = np.concatenate([is_adversarial, np.zeros(len(noise_scores), bool)])
    return float(sklearn_metrics.roc_auc_score(kinds, together))


def share_above(scores: np.ndarray, threshold: float | np.ndarray) -> float | None:
    """Returns the share of scores above thresholds; None where all are infinite, or none is there.

    A threshold that never calls measures nothing, so its scores do not count.

    Raises:
        ValueError: if a score is NaN.
    """
    scores = _numbers(scores)
    finite = np.isfinite(np.broadcast_to(threshold, scores.shape))
    return float(np.mean((scores > threshold)[finite])) if finite.any() else None


def per_class(
    scores: np.ndarray,
    maps: HeatmapSet,
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    *,
    class_names: Sequence[str],
    threshold: float | None = None,
    learns: bool = False,
    is_reserved: np.ndarray | None = None,
    noise: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[dict[str, dict], dict]:
    """Returns `rates` for every class, by the class that the classifier predicts, and over all.

    Args:
        scores: `[M]` scores of `maps`, the ones to judge by.
        maps: maps of both kinds.
        fit_scores: scores of `fit_maps`.
        fit_maps: the maps that detector and thresholds come from.
        class_names: K names.
        threshold: for all classes; None takes each class's `best_threshold` on `fit_maps`.
        learns: whether scores of maps that were fitted on differ from those of fresh ones.
        is_reserved: `bool` for each of `fit_maps`: nothing was fitted on these; None: no map is.
            They alone set the thresholds of a score that learns, if any map is reserved.
        noise: scores and predicted classes of noisy images to judge by, see `rates`.

    Returns:
        `{name: rates}` with `n_thresholds`, how many clean maps of the class set thresholds; and
        of all classes together the `COUNTS` summed, the unweighted mean of every rate (readings
        differ; Table VI is this one) and `over`, see `over_seeds`.
    """
    known = dict(threshold=threshold, learns=learns, is_reserved=is_reserved)
    chosen = thresholds(fit_scores, fit_maps, len(class_names), **known)
    sets = fit_maps.predicted[_sets_thresholds(fit_maps, learns, is_reserved)]
    counts, predicted = np.bincount(sets, minlength=len(class_names)), maps.predicted
    classes = {}
    for k, name in enumerate(class_names):
        here = predicted == k
        levels = {field: values[k] for field, values in chosen._asdict().items()}
        noisy = () if noise is None else noise[0][noise[1] == k]
        classes[name] = rates(scores[here], maps.is_adversarial[here], **levels, noise_scores=noisy)
        classes[name]['n_thresholds'] = 0 if np.isnan(chosen.threshold[k]) else int(counts[k])
    return classes, _overall(classes)


class Thresholds(NamedTuple):
    """Above which a score is called adversarial, `[K]` each, by the predicted class."""

    threshold: np.ndarray  # given, or the best; NaN where there were no maps to fit by
    at_5: np.ndarray  # of 5 % false positives, see `class_thresholds`
    at_1: np.ndarray  # of 1 %


def thresholds(
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    num_classes: int,
    *,
    threshold: float | None = None,
    learns: bool = False,
    is_reserved: np.ndarray | None = None,
) -> Thresholds:
    """Returns each class's thresholds; the arguments are `per_class`'s.

    A class without maps of both kinds to fit by has NaN, whatever scores: so all are judged by the
    same classes.
    """
    known = calibration(fit_scores, fit_maps, num_classes, learns=learns, is_reserved=is_reserved)
    scores, chosen = _numbers(fit_scores), np.full(num_classes, np.nan)
    predicted = fit_maps.predicted
    for k in np.flatnonzero(known.is_fitted):
        chosen[k] = threshold
        if threshold is None:
            here = predicted == k
            chosen[k] = best_threshold(scores[here], fit_maps.is_adversarial[here])
    at_5, at_1 = (np.where(known.is_fitted, known.thresholds(f), np.nan) for f in (0.05, 0.01))
    return Thresholds(chosen, at_5, at_1)


class Calibration(NamedTuple):
    """Clean maps of which thresholds at any false positive rate come."""

    scores: np.ndarray  # f32[N]
    predicted: np.ndarray  # i32[N]
    is_fitted: np.ndarray  # bool[K]: there were maps of both kinds to fit by

    def thresholds(self, fpr: float) -> np.ndarray:
        """Returns `[K]`, see `class_thresholds`; infinite for a class that is not fitted."""
        found = class_thresholds(self.scores, self.predicted, len(self.is_fitted), fpr)
        return np.where(self.is_fitted, found, np.inf)


def calibration(
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    num_classes: int,
    *,
    learns: bool = False,
    is_reserved: np.ndarray | None = None,
) -> Calibration:
    """Returns what thresholds come from; the arguments are `per_class`'s."""
    fits = np.ones(len(fit_maps), bool) if is_reserved is None else ~is_reserved
    is_fitted = has_both_kinds(fit_maps.select(fits), num_classes)
    sets = _sets_thresholds(fit_maps, learns, is_reserved) & is_fitted[fit_maps.predicted]
    return Calibration(_numbers(fit_scores)[sets], fit_maps.predicted[sets], is_fitted)


def has_both_kinds(maps: HeatmapSet, num_classes: int) -> np.ndarray:
    """Returns `bool[K]`: whether clean and adversarial maps are predicted to be in a class."""
    kinds = maps.predicted[maps.is_adversarial], maps.predicted[~maps.is_adversarial]
    seen = [np.isin(np.arange(num_classes), predicted) for predicted in kinds]
    return seen[0] & seen[1]


def _sets_thresholds(fit_maps, learns, is_reserved):
    """Returns which of `per_class`'s fitting maps set the thresholds at a false positive rate."""
    clean = ~fit_maps.is_adversarial
    return clean & is_reserved if learns and np.any(is_reserved) else clean


def _overall(classes):
    """Returns the sums of the counts and the means of the rates, for `per_class`."""
    found = {
        name: [entry[name] for entry in classes.values() if entry[name] is not None]
        for name in RATES
    }
    counts = {name: sum(entry[name] for entry in classes.values()) for name in COUNTS}
    mean = {name: float(np.mean(v)) if v else None for name, v in found.items()}
    return counts | mean | {'over': {name: [len(v), len(classes)] for name, v in found.items()}}


def histogram(scores: Mapping[str, np.ndarray], *, bins: int = 30) -> dict | None:
    """Returns `edges` of bins, and the share of every kind's scores that is in each.

    The first and the last hundredth of all scores are in the outermost bins. None without scores.
    """
    together = np.concatenate(list(scores.values()))
    if not len(together):
        return None
    low, high = np.quantile(together, (0.01, 0.99))
    # Equal scores are one bar in the middle.
    edges = np.linspace(*((low, high) if low < high else (low - 0.5, low + 0.5)), bins + 1)
    return {'edges': edges.tolist()} | {
        kind: (np.histogram(np.clip(values, low, high), edges)[0] / max(1, len(values))).tolist()
        for kind, values in scores.items()
    }


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


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> dict | None:
    """Returns Spearman's `rho` of two rankings and its 95 % `interval`.

    None for fewer than four values, or if all of one side are equal. The interval is Fisher's, with
    the variance that Bonett and Wright found for ranks.

    References:
        Bonett & Wright, https://doi.org/10.1007/BF02294183

    >>> found = rank_agreement([1, 2, 3, 4, 5], [1, 2, 3, 5, 4])
    >>> round(found['rho'], 3), [round(end, 2) for end in found['interval']]
    (0.9, [-0.17, 1.0])
    """
    if len(first) < 4 or min(np.ptp(first), np.ptp(second)) == 0:
        return None
    rho = float(stats.spearmanr(first, second).statistic)
    reach = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(first) - 3))
    middle = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    return {'rho': rho, 'interval': np.tanh([middle - reach, middle + reach]).tolist()}


def over_seeds(entries: Sequence[dict], *, judged_over_fitted: float) -> dict:
    """Returns the mean over seeds of each of their `rates`, or of what `per_class` says overall.

    The counts are means as well, to the nearest whole. A rate is the mean over the seeds that have
    it, None if none does; where some seeds, or some of their classes, lack it, `over` says how many
    have it, of how many.
    """
    result = {name: round(np.mean([entry[name] for entry in entries])) for name in COUNTS}
    intervals, over = {}, {}
    for name in RATES:
        values = [entry[name] for entry in entries if entry[name] is not None]
        result[name] = float(np.mean(values)) if values else None
        intervals[name] = interval(values, judged_over_fitted=judged_over_fitted)
        alone = [[int(entry[name] is not None), 1] for entry in entries]
        parts = [e.get('over', {}).get(name, one) for e, one in zip(entries, alone, strict=True)]
        have, total = (sum(part) for part in zip(*parts, strict=True))
        over |= {name: [have, total]} if 0 < have < total else {}
    notes = [entry['note'] for entry in entries if 'note' in entry]
    if notes and result['auroc'] is None:
        result['note'] = notes[0]
    return result | {'interval': intervals, 'over': over}


def ssim(first: np.ndarray, second: np.ndarray, *, window: int = 7) -> np.ndarray:
    """Returns the mean structural similarity of each pair of maps.

    As in Krypton and scikit-image: uniform windows wholly inside the map, unbiased variances,
    values that span [0, 1], K1 = 0.01 and K2 = 0.03.

    Args:
        first, second: `[M, h, w]`.
        window: side of the windows; in a smaller map the largest odd one that fits.

    Returns:
        `[M]`, 1 for equal maps.

    Raises:
        ValueError: if the maps' shapes differ or are no maps.

    References:
        Wang et al., https://ece.uwaterloo.ca/~z70wang/publications/ssim.pdf
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f'Expected two arrays [M, h, w], got {first.shape} and {second.shape}.')
    window = min(window, (min(first.shape[1:]) - 1) // 2 * 2 + 1)

    def mean(values):
        views = np.lib.stride_tricks.sliding_window_view(values, (window, window), axis=(1, 2))
        return views.mean(axis=(-2, -1))

    unbiased = window**2 / max(1, window**2 - 1)
    a, b = mean(first), mean(second)
    var_a, var_b = unbiased * (mean(first**2) - a**2), unbiased * (mean(second**2) - b**2)
    covariance = unbiased * (mean(first * second) - a * b)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * a * b + c1) / (a**2 + b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean(axis=(1, 2))


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns `[M]`, the rank correlation of each pair of `[M, h, w]` maps; nan for a constant."""
    ranks = [
        stats.rankdata(maps.reshape(len(maps), -1), axis=1)
        for maps in map(np.asarray, (first, second))
    ]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, where=norms > 0, out=np.full(len(a), np.nan))
