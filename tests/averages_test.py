"""Laws of means and their intervals: by hand, by loops, by a bootstrap, and over random counts."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from occjax import averages, metrics
from occjax.report import tables
from tests.metrics_test import maps_of

NAMES = ('Zero', 'One', 'Two')
KINDS = np.array([0, 0, 0, 0, 1, 1], bool)
SCORES = np.array([-2.0, -1.0, -0.5, 0.5, -0.7, 3.0])


def levels_of(threshold, at_5, at_1, count=1):
    """Returns the same thresholds for every class."""
    return metrics.Thresholds(*np.broadcast_to([[threshold], [at_5], [at_1], [19]], (4, count)))


def measured(scores, maps, levels, **noise):
    """Returns what one seed finds, as `over_seeds` says it of a few names."""
    seed = averages.measure(scores, maps, levels, **noise)
    names = tuple(map(str, range(len(levels.threshold))))
    return averages.over_seeds([seed], names, judged_over_fitted=1.0)


def alone(scores, kinds, threshold=0.0, at_5=0.4, at_1=3.0, **noise):
    """Returns the rates of a single class; its map of both kinds is one image each."""
    maps = maps_of(np.zeros(len(scores), int), kinds)
    found = measured(np.asarray(scores, float), maps, levels_of(threshold, at_5, at_1), **noise)
    return found['per_class']['0'], found['overall']


def test_by_hand():
    """Four correct maps, two adversarial; at 0 one of each is mistaken."""
    for rates in alone(SCORES, KINDS):
        assert (rates['n_correct'], rates['n_adversarial']) == (4, 2)
        assert rates['accuracy'] == rates['majority_baseline'] == pytest.approx(4 / 6)
        assert rates['balanced_accuracy'] == pytest.approx((3 / 4 + 1 / 2) / 2)
        # Of eight pairs the adversarial map leads in 2 + 4.
        assert rates['auroc'] == pytest.approx(6 / 8)
        assert rates['tpr_at_5_fpr'] == pytest.approx(1 / 2)
        assert rates['fpr_at_5_fpr'] == pytest.approx(1 / 4)
        assert rates['tpr_at_1_fpr'] == 0, 'a score of a threshold is not above it'


def test_noise_joins_the_clean_in_one_auroc():
    """Of the pairs of an attack and another the attack leads in 2 + 4, and in 1 + 2."""
    noise = np.array([-9.0, 0.1]), np.zeros(2, int), np.arange(2)
    for rates in alone(SCORES, KINDS, noise=noise):
        assert rates['auroc'] == pytest.approx(6 / 8)
        assert rates['auroc_with_noise'] == pytest.approx((2 + 4 + 1 + 2) / 12)
    assert alone(SCORES, KINDS)[0]['auroc_with_noise'] is None


def test_auroc_of_a_constant_is_a_half_and_of_the_label_one():
    kinds = np.array([0, 1, 0, 1, 1], bool)
    for scores, expected in ((np.ones(5), 0.5), (kinds * 1.0, 1.0)):
        for rates in alone(scores, kinds, 0.5, 0.5, 0.5):
            assert rates['auroc'] == rates['balanced_accuracy'] == expected


@pytest.mark.parametrize(
    'kinds, note',
    [
        ([False, False], 'no adversarial maps'),
        ([True, True], 'no correct maps'),
        ([], 'no correct or adversarial maps'),
    ],
)
def test_a_missing_kind_is_said_and_never_nan(kinds, note):
    rates, _ = alone(np.zeros(len(kinds)), kinds)
    assert rates['note'] == note
    assert all(rates[name] is None for name in averages.RATES)


def test_an_infinite_threshold_takes_only_the_rates_that_need_it():
    """A threshold that is never exceeded is no measurement of 0."""
    for rates in alone([0.0, 0.2, 2.0, 3.0], [0, 1, 0, 1], 1.0, 2.5, np.inf):
        assert (rates['balanced_accuracy'], rates['auroc']) == (0.5, 0.75)
        assert (rates['tpr_at_5_fpr'], rates['fpr_at_5_fpr']) == (0.5, 0)
        assert rates['tpr_at_1_fpr'] is None and 'note' not in rates


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match='^1 of .* scores are NaN'):
        alone([np.nan, 1.0], [0, 1])


def random_seeds(rng, counts, *, seeds=3, shift=1.0, noisy=False):
    """Returns maps of `[K, 2]` counts that judge in every seed, scores, thresholds, and noise.

    Every adversarial image is the twin of a clean one, if there are so many.
    """
    counts = np.asarray(counts)
    predicted = np.repeat(np.arange(len(counts)), counts.sum(1))
    kinds = np.concatenate([np.repeat([False, True], pair) for pair in counts])
    maps = maps_of(np.zeros(len(kinds), int), kinds)
    maps.unoccluded.resize((len(kinds), max(3, len(counts))), refcheck=False)
    maps.unoccluded[:] = np.eye(maps.unoccluded.shape[1])[predicted]
    maps.image_id[kinds] = np.arange(kinds.sum())
    found = []
    for _ in range(seeds):
        scores = np.round(rng.normal(size=len(kinds)) + shift * kinds, 1)
        levels = levels_of(0.4, 1.5, 2.5, len(counts))
        noise = np.round(rng.normal(size=20), 1), rng.integers(0, len(counts), 20), np.arange(20)
        found.append((scores, levels, noise if noisy else None))
    return maps, found


def over(maps, seeds, count, ratio=0.5):
    """Returns `over_seeds` of them."""
    each = [averages.measure(scores, maps, levels, noise=n) for scores, levels, n in seeds]
    names = tuple(f'class {k}' for k in range(count))
    return averages.over_seeds(each, names, judged_over_fitted=ratio)


@pytest.mark.parametrize('number', range(4))
def test_both_averages_beside_loops(number):
    """Pooled decisions, AUROC weighted by adversarial maps, and means of classes of ten or more."""
    rng = np.random.default_rng(number)
    counts = np.array([[30, 12], [11, 40], [25, 1], [9, 30], [14, 10]])
    maps, seeds = random_seeds(rng, counts, noisy=True)
    # One class has no threshold of 1 %, one seed no detector for another.
    for _, levels, _ in seeds:
        levels.at_1.setflags(write=True)
    seeds = [
        (s, levels._replace(at_1=np.where([0, 1, 0, 0, 0], np.inf, 2.5)), n)
        for s, levels, n in seeds
    ]
    missing = np.where([0, 0, 0, 0, number == 3], np.nan, 0.4)
    seeds[1] = seeds[1][0], seeds[1][1]._replace(threshold=missing), seeds[1][2]
    found = over(maps, seeds, 5)['overall']
    k, bad = maps.predicted, maps.is_adversarial
    expected, by_class = {}, {}
    for scores, levels, (noise, noise_k, _) in seeds:
        ok = ~np.isnan(levels.threshold)[k]
        flagged = scores > 0.4
        once = {
            'accuracy': np.mean((flagged == bad)[ok]),
            'balanced_accuracy': (flagged[ok & bad].mean() + 1 - flagged[ok & ~bad].mean()) / 2,
            'tpr_at_5_fpr': (scores > 1.5)[ok & bad].mean(),
            'fpr_at_5_fpr': (scores > 1.5)[ok & ~bad].mean(),
            'tpr_at_1_fpr': (scores > 2.5)[ok & bad & (k != 1)].mean(),
        }
        areas, noisy, weights, noise_weights = [], [], [], []
        for c in range(5):
            here = ok & (k == c)
            if not here.any():
                continue
            areas.append(roc_auc_score(bad[here], scores[here]))
            also = noise[noise_k == c]
            both = np.append(scores[here], also), np.append(bad[here], np.zeros(len(also)))
            noisy.append(roc_auc_score(*both[::-1]) if len(also) else 0)
            weights.append((bad & here).sum())
            noise_weights.append(weights[-1] * bool(len(also)))
            if c in (0, 1, 4):
                by_class.setdefault(c, []).append(areas[-1])
        once['auroc'] = np.average(areas, weights=weights)
        once['auroc_with_noise'] = np.average(noisy, weights=noise_weights)
        for name, value in once.items():
            expected.setdefault(name, []).append(value)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-12), name
    members = (0, 1) if number == 3 else (0, 1, 4)
    assert found['over_classes']['classes'] == [f'class {c}' for c in members]
    mean = np.mean([np.mean(by_class[c]) for c in members])
    assert found['over_classes']['auroc'] == pytest.approx(mean)
    assert found['over_classes']['over']['auroc'] == [len(members), 5]
    assert found['over_classes']['n_adversarial'] == counts[list(members), 1].sum()
    if number < 3:
        assert (found['n_correct'], found['n_adversarial']) == tuple(counts.sum(0))
        assert found['over']['tpr_at_1_fpr'] == [53, 93]


def test_a_class_of_one_map_weighs_as_much_as_the_map():
    """Whatever is made of it: one of 101 adversarial maps moves what is over all by 1 / 101."""
    counts, found = [[50, 50], [50, 50], [50, 1]], []
    for flip in (-9.0, 9.0):
        maps, seeds = random_seeds(np.random.default_rng(0), counts)
        last = np.flatnonzero((maps.predicted == 2) & maps.is_adversarial)
        for scores, *_ in seeds:
            scores[last] = flip
        found.append(over(maps, seeds, 3)['overall'])
    assert found[1]['auroc'] - found[0]['auroc'] == pytest.approx(1 / 101)
    assert found[1]['balanced_accuracy'] - found[0]['balanced_accuracy'] == pytest.approx(0.5 / 101)
    assert found[0]['over_classes'] == found[1]['over_classes']


def test_fewer_than_two_classes_have_no_mean_over_classes():
    maps, seeds = random_seeds(np.random.default_rng(0), [[20, 20], [20, 9], [9, 20]])
    classes = over(maps, seeds, 3)['overall']['over_classes']
    assert classes['classes'] == ['class 0']
    assert all(classes[name] is None for name in averages.RATES)
    assert not any(classes['interval'].values())


def shares(entry):
    """Yields the name, value and interval of every rate of an entry."""
    for name in averages.RATES:
        yield name, entry[name], entry['interval'][name]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    number=st.integers(0, 10**6),
    shift=st.sampled_from([0.0, 1.0, 3.0, 99.0]),
    seeds=st.integers(1, 4),
    classes=st.integers(1, 6),
)
def test_no_interval_says_more_than_its_images(number, shift, seeds, classes):
    """Inside of 0 and 1, of some width, absent of few maps or seeds: of random counts."""
    rng = np.random.default_rng(number)
    counts = rng.integers(0, 60, (classes, 2))
    maps, drawn = random_seeds(rng, counts, seeds=seeds, shift=shift, noisy=True)
    found = over(maps, drawn, classes)
    entries = {**found['per_class'], 'all': found['overall']}
    entries['classes'] = found['overall']['over_classes']
    smallest = dict(zip(found['per_class'], counts.min(1), strict=True))
    for label, entry in entries.items():
        n = smallest.get(label, min(entry['n_correct'], entry['n_adversarial']))
        for name, value, ends in shares(entry):
            if value is None:
                assert ends is None
                continue
            assert 0 <= value <= 1
            is_wide_enough = seeds >= 3 and n >= 10
            # A seed may have no noise in a class.
            assert (ends is not None) == is_wide_enough or name == 'auroc_with_noise', (label, name)
            assert is_wide_enough or ends is None
            text = tables.with_interval(entry, name)
            if ends:
                assert 0 <= ends[0] <= value + 1e-12 and value - 1e-12 <= ends[1] <= 1
                assert ends[1] > ends[0] or (n >= 30 and 0 < value < 1)
                assert '± 0.000' not in text or n >= 30
            printed = [float(part) for part in text.split(' (')[0].split(' ± ')]
            assert printed[0] - sum(printed[1:]) >= -1e-3
            assert sum(printed) <= 1 + 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(number=st.integers(0, 10**6), classes=st.integers(3, 8), spread=st.floats(0, 3))
def test_a_mean_over_classes_moves_within_its_interval_when_a_class_is_lost(
    number, classes, spread
):
    """However far the classes lie apart."""
    rng = np.random.default_rng(number)
    counts = rng.integers(10, 60, (classes, 2))
    maps, drawn = random_seeds(rng, counts)
    easy = rng.normal(size=classes)[maps.predicted] * spread * maps.is_adversarial
    drawn = [(scores + easy, *rest) for scores, *rest in drawn]
    before = over(maps, drawn, classes)['overall']['over_classes']
    lost = np.flatnonzero((maps.predicted == rng.integers(classes)) & maps.is_adversarial)[1:]
    kept = np.delete(np.arange(len(maps)), lost)
    fewer = [(scores[kept], *rest) for scores, *rest in drawn]
    after = over(maps.select(kept), fewer, classes)['overall']['over_classes']
    assert len(after['classes']) == len(before['classes']) - 1
    for name, value, ends in shares(before):
        if value is not None:
            assert ends[0] - 1e-12 <= after[name] <= ends[1] + 1e-12, name


def test_an_interval_by_image_is_that_of_a_bootstrap():
    """Images are drawn again, each with its twin, its noise and in all seeds at once."""
    rng = np.random.default_rng(1)
    counts = [[60, 40], [50, 60], [40, 30]]
    maps, seeds = random_seeds(rng, counts, noisy=True)
    easy = rng.normal(size=400)[maps.image_id] * np.where(maps.is_adversarial, -1, 1)
    seeds = [(scores + easy, *rest) for scores, *rest in seeds]
    each = [averages.measure(s, maps, levels, noise=n) for s, levels, n in seeds]
    drawn = {name: [] for name in ('balanced_accuracy', 'auroc', 'auroc_with_noise')}
    ids = np.arange(maps.image_id.max() + 1)
    for _ in range(600):
        times = np.bincount(rng.choice(ids, len(ids)), minlength=len(ids))
        rows, again = np.repeat(np.arange(len(maps)), times[maps.image_id]), []
        for scores, levels, noise in seeds:
            more = np.repeat(np.arange(20), times[:20])
            noise = tuple(column[more] for column in noise)
            again.append(averages.measure(scores[rows], maps.select(rows), levels, noise=noise))
        for name, values in drawn.items():
            values.append(np.mean([seed.whole[name].value for seed in again]))
    for name, values in drawn.items():
        # Without the spread of the seeds, which here is the wider.
        rates = [seed.whole[name]._replace(value=np.array([0.5])) for seed in each]
        images = [seed.image_id for seed in each]
        ((_, ends),) = averages.averaged(rates, images, n=[130], judged_over_fitted=0.0)
        by_image = np.std(values) * 1.9785
        assert (ends[1] - ends[0]) / 2 == pytest.approx(by_image, rel=0.12), name


def test_seeds_that_share_images_promise_no_more_than_one():
    """Five copies of a seed have no spread; their interval is that of their images."""
    maps, (seed, *_) = random_seeds(np.random.default_rng(0), [[40, 40], [40, 40]])
    found = [over(maps, [seed] * copies, 2, ratio=1.0)['overall'] for copies in (3, 5)]
    for name, _, ends in shares(found[0]):
        if ends:
            assert ends[1] - ends[0] > 0.01
            np.testing.assert_allclose(ends, found[1]['interval'][name])


def test_the_spread_of_seeds_counts_where_it_is_the_wider():
    """t(0.975, 2) = 4.3027; the variance of 0.3, 0.5 and 0.7 is 0.04, (1/3 + 1/2) of it counts."""
    rates = [averages.Rate(np.array([value]), np.zeros(100)) for value in (0.3, 0.5, 0.7)]
    images = [np.arange(100)] * 3
    ((value, ends),) = averages.averaged(rates, images, n=[100], judged_over_fitted=0.5)
    reach = 4.3027 * math.sqrt(0.04 * (1 / 3 + 1 / 2))
    assert value == pytest.approx(0.5)
    np.testing.assert_allclose(ends, [max(0, 0.5 - reach), min(1, 0.5 + reach)], rtol=1e-4)
    rates = [averages.Rate(np.array([value]), np.zeros(100)) for value in (0.5, 0.52, 0.54)]
    ((_, ends),) = averages.averaged(rates, images, n=[100], judged_over_fitted=0.5)
    np.testing.assert_allclose(ends, [0.52 - reach / 10, 0.52 + reach / 10], rtol=1e-4)
    assert ends == pytest.approx(averages.interval([0.5, 0.52, 0.54], judged_over_fitted=0.5))
    assert averages.interval([0.5, 0.52], judged_over_fitted=0.5) is None
    assert averages.interval([0, 0.5, 1], judged_over_fitted=1) == (0, 1)


@pytest.mark.parametrize('n, low', [(10, 0.7225), (29, 0.883), (100, 0.963)])
def test_of_all_that_are_right_wilson_s_interval_is_left(n, low):
    """With k of k right it ends at n / (n + z²)."""
    maps, seeds = random_seeds(np.random.default_rng(0), [[n, n]], shift=99.0)
    entry = over(maps, seeds, 1)['per_class']['class 0']
    assert entry['auroc'] == 1
    np.testing.assert_allclose(entry['interval']['auroc'], [low, 1], atol=1e-3)
    assert tables.with_interval(entry, 'auroc') == f'1.000 ({low:.2f} to 1.00)'


def test_a_lead_is_measured_on_the_same_images():
    """Two scorers that err together: either varies widely, their difference does not."""
    maps, seeds = random_seeds(np.random.default_rng(0), [[60, 60], [60, 60]])
    ours = [averages.measure(s, maps, levels) for s, levels, _ in seeds]
    better = [
        averages.measure(s + 0.3 * maps.is_adversarial, maps, levels) for s, levels, _ in seeds
    ]
    lead = functools.partial(averages.lead, judged_over_fitted=0.5)
    found, back = lead(better, ours), lead(ours, better)
    for name in ('auroc', 'balanced_accuracy'):
        pairs = zip(better, ours, strict=True)
        value = np.mean([a.whole[name].value - b.whole[name].value for a, b in pairs])
        assert found[name] == pytest.approx(value) and back[name] == pytest.approx(-value)
        ends, own = found['interval'][name], over(maps, seeds, 2)['overall']['interval'][name]
        assert ends[1] - ends[0] < 0.8 * (own[1] - own[0])
        np.testing.assert_allclose(back['interval'][name], [-ends[1], -ends[0]])
    equal = lead(ours, ours)
    assert equal['auroc'] == 0 and equal['interval']['auroc'] == [0, 0]
    maps, seeds = random_seeds(np.random.default_rng(0), [[12, 12]])
    few = [averages.measure(s, maps, levels) for s, levels, _ in seeds]
    assert lead(few, few)['interval']['auroc'] == pytest.approx([-1 / 12, 1 / 12])
    assert lead(few[:2], few[:2])['interval']['auroc'] is None


@pytest.mark.parametrize('seeds, fraction', [(5, 0.5), (5, 0.8)])
def test_covers_the_truth_at_about_its_level(seeds, fraction):
    """Scores of a known AUROC, 0.5 + erf(1/2)/2, in a set divided anew for every seed."""
    truth, rng = 0.5 + 0.5 * math.erf(0.5), np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(600):
        kinds = np.arange(120) % 2
        scores, values = rng.normal(size=120) + kinds, []
        for _ in range(seeds):
            judged = rng.permutation(120)[round(fraction * 120) :]
            clean, attacked = (scores[judged[kinds[judged] == kind]] for kind in (0, 1))
            values.append(np.mean(attacked[:, None] > clean))  # AUROC.
        ratio = (1 - fraction) / fraction
        low, high = averages.interval(values, judged_over_fitted=ratio)
        covered += low <= truth <= high
        low, high = averages.interval(values, judged_over_fitted=0.0)
        naive += low <= truth <= high
    assert 0.92 < covered / 600 < 0.99
    assert naive < covered, 'the spread alone promises too much'
