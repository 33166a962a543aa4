"""How well scores tell adversarial maps from correct ones, on the host.

A score is a number a map, higher for more adversarial. No threshold comes from the maps that a
detector is judged by, and one at a false positive rate keeps its promise on fresh ones. What cannot
be computed (a class with maps of one kind only) is None, never NaN.

Dimensions: M heatmaps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from occjax.names import COMPARATORS
from occjax.types import HeatmapSet


class Baseline(NamedTuple):
    """A score that learns nothing, and how many forward passes an image costs it."""

    score_fn: Callable[[HeatmapSet], np.ndarray]
    passes: int | None = None  # None: one for every window, and one more

    @property
    def windows(self) -> bool:
        """Whether it sees any."""
        return self.passes is None

    def score(self, bank: Any, maps: HeatmapSet) -> np.ndarray:
        """Returns `[M]` scores, as `methods.Method` does; there is nothing in the bank."""
        return self.score_fn(maps)


# What a detector must beat: a cell is a confidence, so "darker" may only mean "less confident". The
# spreads are ML-LOO's (https://arxiv.org/abs/1906.03499), there of feature attributions; the last
# three are those of `comparators`, stored beside the maps.
BASELINES = {
    'max_probability': Baseline(lambda maps: -maps.max_probability, passes=1),
    'map_mean': Baseline(lambda maps: -maps.maps.mean(axis=(1, 2))),
    'map_minimum': Baseline(lambda maps: -maps.maps.min(axis=(1, 2))),
    'map_deviation': Baseline(lambda maps: maps.maps.std(axis=(1, 2))),
    'map_iqr': Baseline(lambda maps: _iqr(maps.cells)),
    'map_mad': Baseline(lambda maps: _mad(maps.cells)),
} | {
    name: Baseline(lambda maps, i=i: maps.comparators[:, i], passes)
    for i, (name, passes) in enumerate(zip(COMPARATORS, (3, 1, 2), strict=True))
}
# With a sweep's, of a second classifier's logits: PID (https://arxiv.org/abs/2506.03765).
SCORES = BASELINES | {'pid': Baseline(lambda maps: _surprise(maps.twin, maps.predicted), passes=2)}


def _iqr(cells: np.ndarray) -> np.ndarray:
    """Returns the `[M]` distances of the quartiles of `[M, P]` cells."""
    quantile = cells.__array_namespace__().quantile
    return quantile(cells, 0.75, axis=1) - quantile(cells, 0.25, axis=1)


def _mad(cells: np.ndarray) -> np.ndarray:
    """Returns the `[M]` medians of the distances of `[M, P]` cells from their median."""
    xp = cells.__array_namespace__()
    return xp.median(abs(cells - xp.median(cells, axis=1, keepdims=True)), axis=1)


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
        The threshold; infinite where M is too small, so that nothing is flagged.

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
    ordered = np.sort(numbers(clean_scores))[::-1]
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


def numbers(scores: np.ndarray) -> np.ndarray:
    """Returns `[M]` scores in the precision of thresholds.

    Raises:
        ValueError: if a score is NaN, which is neither above nor below a threshold.
    """
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
    # Scikit-learn flags scores from the threshold on, we those above it.
    return float(np.nextafter(thresholds[np.argmax(tpr - fpr)], -np.inf))


class Share(NamedTuple):
    """How many of some images are flagged.

    >>> [round(end, 3) for end in Share(9, 10).interval], Share(0, 0).interval
    ([0.596, 0.982], None)
    """

    flagged: int
    n: int

    @property
    def rate(self) -> float | None:
        """The share, None of no images."""
        return self.flagged / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, Wilson's, which lies in [0, 1]; None of no images."""
        if not self.n:
            return None
        ends = stats.binomtest(int(self.flagged), int(self.n)).proportion_ci(method='wilson')
        return float(ends.low), float(ends.high)


class Thresholds(NamedTuple):
    """Above which a score is flagged, `[K]` each, by the predicted class."""

    threshold: np.ndarray  # given, or the best; NaN where there were no maps to fit by
    at_5: np.ndarray  # of 5 % false positives, see `class_thresholds`
    at_1: np.ndarray  # of 1 %
    n_thresholds: np.ndarray  # how many clean maps set these two


def thresholds(
    fit_scores: np.ndarray,
    fit_maps: HeatmapSet,
    num_classes: int,
    *,
    threshold: float | None = None,
    learns: bool = False,
    is_reserved: np.ndarray | None = None,
) -> Thresholds:
    """Returns each class's thresholds.

    A class without maps of both kinds to fit by has NaN, whatever scores: so all are judged by the
    same classes.

    Args:
        fit_scores: `[M]` scores of `fit_maps`.
        fit_maps: the maps that detector and thresholds come from.
        num_classes: K.
        threshold: for all classes; None takes each class's `best_threshold` on `fit_maps`.
        learns: whether scores of maps that were fitted on differ from those of fresh ones.
        is_reserved: `bool` for each of `fit_maps`: nothing was fitted on these; None: no map is.
            They alone set the thresholds of a score that learns, if any map is reserved.
    """
    known = calibration(fit_scores, fit_maps, num_classes, learns=learns, is_reserved=is_reserved)
    scores, chosen = numbers(fit_scores), np.full(num_classes, np.nan)
    predicted = fit_maps.predicted
    for k in np.flatnonzero(known.is_fitted):
        chosen[k] = threshold
        if threshold is None:
            here = predicted == k
            chosen[k] = best_threshold(scores[here], fit_maps.is_adversarial[here])
    at_5, at_1 = (np.where(known.is_fitted, known.thresholds(f), np.nan) for f in (0.05, 0.01))
    counts = np.bincount(known.predicted, minlength=num_classes)
    return Thresholds(chosen, at_5, at_1, counts)


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
    """Returns what thresholds come from; the arguments are `thresholds`'s."""
    fits = np.ones(len(fit_maps), bool) if is_reserved is None else ~is_reserved
    is_fitted = has_both_kinds(fit_maps.select(fits), num_classes)
    sets = _sets_thresholds(fit_maps, learns, is_reserved) & is_fitted[fit_maps.predicted]
    return Calibration(numbers(fit_scores)[sets], fit_maps.predicted[sets], is_fitted)


def has_both_kinds(maps: HeatmapSet, num_classes: int) -> np.ndarray:
    """Returns `bool[K]`: whether clean and adversarial maps are predicted to be in a class."""
    kinds = maps.predicted[maps.is_adversarial], maps.predicted[~maps.is_adversarial]
    seen = [np.isin(np.arange(num_classes), predicted) for predicted in kinds]
    return seen[0] & seen[1]


def _sets_thresholds(fit_maps, learns, is_reserved):
    """Returns which of `thresholds`'s fitting maps set the thresholds at a false positive rate."""
    clean = ~fit_maps.is_adversarial
    return clean & is_reserved if learns and np.any(is_reserved) else clean


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


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> dict | None:
    """Returns Spearman's `rho` of two rankings of `n`, and its 95 % `interval`.

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
    ends = np.tanh([middle - reach, middle + reach]).tolist()
    return {'rho': rho, 'interval': ends, 'n': len(first)}


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
