"""Rates of a scorer by class, over all maps and over classes, with intervals that come from images.

*Over all maps* the decisions of all classes' detectors count alike, so that a class of one map
weighs as much as that map. *Over classes* is the unweighted mean of those classes that have
`FEWEST` judged maps of each kind in every seed: the same classes for all seeds.

What cannot be computed is NaN in arrays and None in what `over_seeds` returns.

Dimensions: S seeds, N judged maps and noisy ones, K classes, G groups of maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from occjax import metrics
from occjax.types import HeatmapSet

FEWEST = 10  # maps of each kind without which a class is in no mean, and no rate has an interval
_SEEDS, _IMAGES = 3, 30  # the fewest seeds of an interval; below so many images Wilson's, or wider
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


class Rate(NamedTuple):
    """A rate of each group of maps, and how much each map adds to that of its own group.

    The last is the derivative by the map's weight, 0 for maps that do not count: the sum of its
    squares over independent maps is the rate's variance (the infinitesimal jackknife, the limit of
    a bootstrap of many draws; of an AUROC DeLong's).
    """

    value: np.ndarray  # f64[G]
    influence: np.ndarray  # f64[N]


class Measured(NamedTuple):
    """What one seed's maps say of a scorer; a rate of `RATES` each."""

    image_id: np.ndarray  # i[N], those of noisy images last
    predicted: np.ndarray  # i[N]
    counts: np.ndarray  # i[3, K], see `COUNTS`
    classes: dict[str, Rate]  # G = K
    whole: dict[str, Rate]  # G = 1
    decided: np.ndarray  # i[2], the correct and adversarial maps whose class has a detector
    over: dict[str, np.ndarray]  # i[2] each: of how many maps `whole` has a rate, of how many


def share(
    flags: np.ndarray, members: np.ndarray, groups: np.ndarray | int = 0, count: int = 1
) -> Rate:
    """Returns which share of each group's members is flagged.

    Args:
        flags: `bool[N]`.
        members: `bool[N]`, the maps that count.
        groups: `[N]`, the group of each map; by default all are one.
        count: G.
    """
    groups = np.broadcast_to(groups, flags.shape)
    n = np.bincount(groups, members, count)
    value = _ratio(np.bincount(groups, members & flags, count), n)
    return Rate(value, np.where(members, _ratio(flags - value[groups], n[groups]), 0))


def aurocs(
    scores: np.ndarray, is_adversarial: np.ndarray, members: np.ndarray, groups: np.ndarray, count
) -> Rate:
    """Returns each group's AUROC, ties half; the arguments are `share`'s.

    References:
        DeLong et al., https://doi.org/10.2307/2531595
    """
    rows = np.flatnonzero(members)
    kinds, group = is_adversarial[rows], groups[rows]
    places = np.unique(scores[rows], return_inverse=True)[1] + group * (len(rows) + 1)
    n = np.stack([np.bincount(group[kinds == kind], minlength=count) for kind in (False, True)])
    # How many of the other kind lie below: the rank in the group, less that in its own kind.
    below = _ranks(places, group, n.sum(0))
    for kind in (0, 1):
        below[kinds == kind] -= _ranks(places[kinds == kind], group[kinds == kind], n[kind])
    placed = _ratio(below, n[1 - kinds, group])
    placed = np.where(kinds, placed, 1 - placed)
    value = _ratio(np.bincount(group, np.where(kinds, placed, 0), count), n[1])
    value = np.where((n > 0).all(0), value, np.nan)
    influence = np.zeros(len(scores))
    influence[rows] = _ratio(placed - value[group], n[kinds * 1, group])
    return Rate(value, np.nan_to_num(influence))


def _ranks(places, group, sizes):
    """Returns the rank of each of groups' members among them, from 1, the mean where some tie."""
    return stats.rankdata(places) - (np.cumsum(sizes) - sizes)[group]


def _ratio(numerator, denominator):
    """Returns a quotient, NaN where there is nothing to divide by."""
    numerator = np.asarray(numerator, np.float64)
    out = np.full(np.broadcast_shapes(numerator.shape, np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def measure(
    scores: np.ndarray,
    maps: HeatmapSet,
    levels: metrics.Thresholds,
    *,
    noise: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Measured:
    """Returns the rates of one seed.

    Args:
        scores: `[M]`, higher for more adversarial, of `maps`.
        maps: of both kinds, by which detectors are judged.
        levels: every class's thresholds. Maps of a class whose `threshold` is NaN do not count;
            where one at a false positive rate is infinite they do not count for that rate.
        noise: scores, predicted classes and image ids of noisy images, which are no attacks either:
            `auroc_with_noise` is against these and the clean ones together.

    Raises:
        ValueError: if a score is NaN.
    """
    others = ((), (), ()) if noise is None else noise
    columns = (scores, maps.predicted, maps.image_id)
    scores, *ids = (np.concatenate(pair) for pair in zip(columns, others, strict=True))
    scores, (predicted, image_id) = metrics.numbers(scores), (each.astype(int) for each in ids)
    count, is_noise = len(levels.threshold), np.arange(len(scores)) >= len(maps)
    attacked = np.concatenate([maps.is_adversarial, np.zeros(is_noise.sum(), bool)]).astype(bool)
    n = np.stack(
        [np.bincount(predicted[~is_noise & (attacked == a)], minlength=count) for a in (0, 1)]
    )
    decided, has_noise = ~np.isnan(levels.threshold), np.isin(range(count), predicted[is_noise])
    rated = decided & (n > 0).all(0)
    areas = {
        'auroc': aurocs(scores, attacked, ~is_noise & rated[predicted], predicted, count),
        'auroc_with_noise': aurocs(
            scores, attacked, (rated & has_noise)[predicted], predicted, count
        ),
    }
    limits = metrics.Thresholds(*(level[predicted] for level in levels))
    known = (scores, attacked, limits, (n[1] > n[0])[predicted])
    classes = _shares(*known, ~is_noise & rated[predicted], predicted, count) | areas
    whole = _shares(*known, ~is_noise & decided[predicted], 0, 1)
    whole |= {name: _weighted(area, n[1], attacked, predicted) for name, area in areas.items()}
    finite = {name: np.isfinite(getattr(levels, name)) for name in ('at_5', 'at_1')}
    counting = {'auroc': rated, 'auroc_with_noise': rated & has_noise}
    counting |= {f'tpr_{name}_fpr': have for name, have in finite.items()}
    over = {name: [n[1][have].sum(), n[1][decided].sum()] for name, have in counting.items()}
    over['fpr_at_5_fpr'] = [n[0][finite['at_5']].sum(), n[0][decided].sum()]
    counts = np.stack([*n, levels.n_thresholds])
    return Measured(image_id, predicted, counts, classes, whole, n[:, decided].sum(1), over)


def _shares(scores, attacked, limits, is_larger, members, groups, count):
    """Returns those of `RATES` that are shares of maps, of groups of the members."""
    flagged, adversarial, clean = scores > limits.threshold, members & attacked, members & ~attacked
    tpr, fpr = (share(flagged, kind, groups, count) for kind in (adversarial, clean))

    def at(level, kind):
        return share(scores > level, kind & np.isfinite(level), groups, count)

    return {
        'accuracy': share(flagged == attacked, members, groups, count),
        'majority_baseline': share(attacked == is_larger, members, groups, count),
        'balanced_accuracy': Rate(
            (tpr.value + 1 - fpr.value) / 2, (tpr.influence - fpr.influence) / 2
        ),
        'tpr_at_5_fpr': at(limits.at_5, adversarial),
        'tpr_at_1_fpr': at(limits.at_1, adversarial),
        # What share that threshold flags here: more where the fitting maps were learnt.
        'fpr_at_5_fpr': at(limits.at_5, clean),
    }


def _weighted(rate, weights, attacked, predicted):
    """Returns the mean of the classes that have a rate, weighted by their adversarial maps."""
    weights = np.where(np.isnan(rate.value), 0, weights)
    parts = _ratio(weights, weights.sum())
    value = np.sum(parts * np.nan_to_num(rate.value)) if weights.sum() else np.nan
    # An adversarial map also adds to the weight of its class.
    beside = np.nan_to_num(_ratio(rate.value - value, weights.sum()))
    parts = np.nan_to_num(parts)
    influence = rate.influence * parts[predicted] + attacked * beside[predicted]
    return Rate(np.array([value]), influence)


def over_seeds(
    seeds: Sequence[Measured], class_names: Sequence[str], *, judged_over_fitted: float
) -> dict:
    """Returns the means over seeds, with 95 % intervals, see `averaged`.

    Args:
        seeds: from `measure`.
        class_names: K names.
        judged_over_fitted: see `averaged`.

    Returns:
        `per_class`: of each class `COUNTS`, `RATES`, `interval`, and `over`: of how many seeds a
        rate is the mean, of how many, where not all have it; `note` says why it has none.
        `overall`: the same over all maps, where `over` counts maps, and in it `over_classes`: the
        mean over the `classes` that it names, and their counts; its `over` counts classes. Rates of
        fewer than two classes are None.
    """
    n = np.stack([seed.counts for seed in seeds])  # [S, 3, K]
    fewest, counted = n[:, :2].min((0, 1)), _counted(seeds)
    per_class = {name: _counts(n[..., k].mean(0)) for k, name in enumerate(class_names)}
    whole = _counts([*np.mean([seed.decided for seed in seeds], 0), n[:, 2].sum(1).mean()])
    classes = _counts(n[..., counted].sum(-1).mean(0))
    classes['classes'] = [name for name, is_in in zip(class_names, counted, strict=True) if is_in]
    entries = [*per_class.values(), whole, classes]
    for entry in entries:
        entry |= {'interval': {}, 'over': {}}
    smallest = min(seed.decided.min() for seed in seeds)
    known = dict(judged_over_fitted=judged_over_fitted)
    for name in RATES:
        rates = [seed.classes[name] for seed in seeds]
        images = [seed.image_id for seed in seeds]
        values = np.stack([rate.value for rate in rates])
        predicted = [seed.predicted for seed in seeds]
        found = averaged(rates, images, predicted, n=fewest, **known)
        found += averaged([seed.whole[name] for seed in seeds], images, n=[smallest], **known)
        have = np.isfinite(values)
        members = counted & have.all(0)
        found.append(_over_classes(rates, seeds, counted, **known))
        for entry, (value, ends) in zip(entries, found, strict=True):
            entry[name], entry['interval'][name] = value, ends
        over = [*([int(h), len(seeds)] for h in have.sum(0))]
        over.append([round(v) for v in np.mean([s.over.get(name, (0, 0)) for s in seeds], 0)])
        over.append([int(members.sum()), len(class_names)])
        for entry, (part, total) in zip(entries, over, strict=True):
            if 0 < part < total:
                entry['over'][name] = [part, total]
    for entry, kinds in zip(per_class.values(), n[:, :2].mean(0).T, strict=True):
        if entry['auroc'] is None:
            missing = [w for w, c in zip(('correct', 'adversarial'), kinds, strict=True) if not c]
            entry['note'] = f'no {" or ".join(missing or ["fitting"])} maps'
    return {'per_class': per_class, 'overall': whole | {'over_classes': classes}}


def _counted(seeds):
    """Returns `bool[K]`: every seed has a detector of the class, and enough maps to judge it."""
    fewest = np.min([seed.counts[:2].min(0) for seed in seeds], axis=0)
    rated = [np.isfinite(seed.classes['auroc'].value) for seed in seeds]
    return (fewest >= FEWEST) & np.all(rated, axis=0)


def _counts(values):
    """Returns the counts by name, to the nearest whole."""
    return {name: round(float(value)) for name, value in zip(COUNTS, values, strict=True)}


def _over_classes(rates, seeds, counted, **known):
    """Returns the mean over the classes that count and have a rate in all seeds, as `averaged`.

    Which classes count hangs on a few maps, so the interval reaches to the mean without any one.
    """
    members = counted & np.all([np.isfinite(rate.value) for rate in rates], axis=0)
    if members.sum() < 2:
        return None, None
    means = [
        Rate(
            np.mean(rate.value[members], keepdims=True),
            rate.influence * members[seed.predicted] / members.sum(),
        )
        for rate, seed in zip(rates, seeds, strict=True)
    ]
    values = np.mean([rate.value[members] for rate in rates], axis=0)
    without = (values.sum() - values) / (len(values) - 1)
    least = np.abs(without - values.mean()).max() if len(values) > 2 else 0.0
    n = min(seed.counts[:2, members].sum(1).min() for seed in seeds)
    images = [seed.image_id for seed in seeds]
    return averaged(means, images, n=[n], least=least, **known)[0]


def averaged(
    rates: Sequence[Rate],
    images: Sequence[np.ndarray],
    groups: Sequence[np.ndarray] | None = None,
    *,
    n: Sequence[int],
    judged_over_fitted: float,
    least: float = 0.0,
    lowest: float = 0.0,
) -> list[tuple[float | None, list[float] | None]]:
    """Returns each group's mean over seeds, and its 95 % interval.

    The interval is the wider of two. One takes every image as drawn at random, once for all seeds
    that it judges and for itself and its attacked twin. The other is of the seeds' spread, see
    `interval`.

    Args:
        rates: one a seed, of G groups.
        images: `[N]` image ids, one a seed.
        groups: `[N]`, the group of each map, one a seed; by default all are one.
        n: `[G]`, the fewest maps of a kind that any seed judges by; below `FEWEST` of them, or
            three seeds, there is no interval.
        judged_over_fitted: how many maps judge for one that is fitted on.
        least: how far the interval reaches at least.
        lowest: the lowest possible value: 0 of a share, -1 of a difference of two.
    """
    values = np.stack([rate.value for rate in rates])
    have = np.isfinite(values)
    count = have.sum(0)
    group = np.concatenate(groups or [np.zeros(len(ids), int) for ids in images])
    influence = np.concatenate([rate.influence for rate in rates])
    ids = np.concatenate(images)
    size = ids.max(initial=0) + 1
    unit, place = np.unique(group * size + ids, return_inverse=True)
    moved = np.bincount(place, influence / np.maximum(count, 1)[group], len(unit))
    variance = np.bincount(unit // size, moved**2, len(count))
    found = []
    for g, images_of in enumerate(n):
        seeds = values[have[:, g], g]
        if not len(seeds):
            found.append((None, None))
            continue
        ends = None
        if len(seeds) >= _SEEDS and images_of >= FEWEST:
            by_image = stats.t.ppf(0.975, images_of - 1) * np.sqrt(variance[g])
            reach = max(by_image, _reach(seeds, judged_over_fitted), least)
            ends = _ends(seeds.mean(), reach, images_of, lowest)
        found.append((float(seeds.mean()), ends))
    return found


def _reach(values, judged_over_fitted):
    """Returns half of Nadeau and Bengio's interval."""
    variance = (1 / len(values) + judged_over_fitted) * np.var(values, ddof=1)
    return stats.t.ppf(0.975, len(values) - 1) * np.sqrt(variance)


def _ends(value, reach, n, lowest):
    """Returns an interval inside of [lowest, 1], of so many images.

    Where fewer than `_IMAGES`, or not one image in n, tell a share from its end, a spread says
    little, and Wilson's interval is the least. One image of few moves a difference by 1 / n.
    """
    low, high = value - reach, value + reach
    if lowest < 0 and n < _IMAGES:
        low, high = min(low, value - 1 / n), max(high, value + 1 / n)
    elif not lowest and (n < _IMAGES or min(value, 1 - value) * n < 1):
        z = stats.norm.ppf(0.975) ** 2 / n
        middle = (value + z / 2) / (1 + z)
        wilson = np.sqrt(z * (value * (1 - value) + z / 4)) / (1 + z)
        low, high = min(low, middle - wilson), max(high, middle + wilson)
    return [float(max(low, lowest)), float(min(high, 1.0))]


def interval(
    values: Sequence[float], *, judged_over_fitted: float, lowest: float = 0.0
) -> tuple[float, float] | None:
    """Returns the 95 % interval of a rate that several random divisions of one set measured.

    The divisions share maps, so their spread alone says too little: Nadeau and Bengio's corrected
    t interval adds what the set itself might have been otherwise.

    Args:
        values: one a division.
        judged_over_fitted: how many maps judge for one that is fitted on.
        lowest: the lowest possible value: 0 of a share, -1 of a difference of two.

    Returns:
        Its ends, between `lowest` and 1; None for fewer than three values.

    References:
        Nadeau & Bengio, https://doi.org/10.1023/A:1024068626366
    """
    if len(values) < _SEEDS:
        return None
    middle, reach = np.mean(values), _reach(values, judged_over_fitted)
    return float(max(lowest, middle - reach)), float(min(1.0, middle + reach))


def lead(
    ours: Sequence[Measured], theirs: Sequence[Measured], *, judged_over_fitted: float
) -> dict:
    """Returns by how much one scorer's rates over all maps, and `over_classes`, exceed another's.

    With 95 % intervals of the differences, which are narrower than those of either: both were
    measured on the same maps.

    Args:
        ours, theirs: one a seed, from `measure`, of the same maps.
        judged_over_fitted: see `averaged`.
    """
    found = {'interval': {}, 'over_classes': {'interval': {}}}
    smallest, counted = min(seed.decided.min() for seed in ours), _counted(ours)
    images = [seed.image_id for seed in ours]
    known = dict(judged_over_fitted=judged_over_fitted, lowest=-1.0)
    for name in ('balanced_accuracy', 'auroc', 'auroc_with_noise'):
        pairs = list(zip(ours, theirs, strict=True))
        whole = [_difference(a.whole[name], b.whole[name]) for a, b in pairs]
        classes = [_difference(a.classes[name], b.classes[name]) for a, b in pairs]
        (both,) = averaged(whole, images, n=[smallest], **known)
        found[name], found['interval'][name] = both
        mean = found['over_classes']
        mean[name], mean['interval'][name] = _over_classes(classes, ours, counted, **known)
    return found


def _difference(one, other):
    return Rate(one.value - other.value, one.influence - other.influence)


def contrast(
    values: np.ndarray, is_adversarial: np.ndarray, image_id: np.ndarray
) -> tuple[float | None, list[float] | None]:
    """Returns the mean of adversarial maps' values less that of the others, and its 95 % interval.

    An image and its attacked twin count as one draw. No interval of fewer than `FEWEST` maps.
    """
    kinds = [np.where(is_adversarial == kind)[0] for kind in (False, True)]
    if not all(map(len, kinds)):
        return None, None
    means = [values[rows].mean(dtype=np.float64) for rows in kinds]
    difference, n = float(means[1] - means[0]), min(map(len, kinds))
    if n < FEWEST:
        return difference, None
    influence = np.zeros(len(values))
    for sign, rows, mean in zip((-1, 1), kinds, means, strict=True):
        influence[rows] = sign * (values[rows] - mean) / len(rows)
    moved = np.bincount(np.unique(image_id, return_inverse=True)[1], influence)
    reach = stats.t.ppf(0.975, n - 1) * np.sqrt(np.sum(moved**2))
    return difference, _ends(difference, reach, n, -1.0)
