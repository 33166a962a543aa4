"""Laws of the numbers: a toy by hand, and what thresholds may not see."""

import dataclasses
import math

import numpy as np
import pytest
from absl.testing import parameterized

from occjax import averages, metrics
from occjax.names import COMPARATORS
from occjax.types import HeatmapSet

NAMES = ('Zero', 'One', 'Two')


def maps_of(predicted, is_adversarial):
    """Returns maps that carry just the class named and the kind."""
    predicted, count = np.asarray(predicted), len(predicted)
    return HeatmapSet(
        logits=np.zeros((count, 2, 2, 3), np.float32),
        unoccluded=np.eye(3, dtype=np.float32)[predicted],
        label=predicted,
        image_id=np.arange(count),
        is_adversarial=np.asarray(is_adversarial, bool),
    )


class ThresholdTest(parameterized.TestCase):
    @parameterized.product(n=(18, 19, 20, 28, 60, 98, 99), fpr=(0.0, 0.01, 0.05, 0.5))
    def test_at_fpr_keeps_its_promise_on_a_fresh_score_and_no_lower_one_does(self, n, fpr):
        """Exactly: each of n + 1 exchangeable scores is the fresh one equally often."""
        scores = np.random.default_rng(n).normal(size=n + 1).astype(np.float32)
        k = sum(i <= fpr * (n + 1) for i in range(1, n + 1))

        def false_alarms(threshold_of):
            others = [np.delete(scores, i) for i in range(n + 1)]
            return sum(map(np.greater, scores, map(threshold_of, others)))

        self.assertEqual(false_alarms(lambda known: metrics.threshold_at_fpr(known, fpr)), k)
        self.assertGreater(false_alarms(lambda known: np.sort(known)[-k - 1]), fpr * (n + 1))

    @parameterized.parameters(20, 28, 60)
    def test_at_fpr_by_simulation(self, n):
        """A fresh uniform score exceeds a threshold with probability 1 less the threshold."""
        known = np.random.default_rng(n).uniform(size=(4000, n))
        met = np.mean([1 - metrics.threshold_at_fpr(row, 0.05) for row in known])
        self.assertAlmostEqual(met, (n + 1) // 20 / (n + 1), delta=0.002)
        self.assertLess(met, 0.05)

    @parameterized.parameters(18, 19, 20, 28, 60)
    def test_ties_and_constants_never_ring_more_often(self, n):
        for values in (1, 2, 5):
            scores = np.random.default_rng(n).integers(0, values, n + 1) / 3
            fresh = [
                scores[i] > metrics.threshold_at_fpr(np.delete(scores, i), 0.05)
                for i in range(n + 1)
            ]
            self.assertLessEqual(np.mean(fresh), 0.05)
        self.assertEqual(metrics.threshold_at_fpr(np.full(n, 0.25), 0.05), [np.inf, 0.25][n > 18])

    @parameterized.parameters(0, 1, 2)
    def test_small_classes_share_a_threshold_that_keeps_the_promise_on_them_together(self, extra):
        """Exactly, as for one class: each of n + 1 clean maps is the fresh one equally often."""
        rng, sizes = np.random.default_rng(extra), (12, 30, 14 + extra)
        classes = np.repeat(np.arange(3), sizes)
        scores = rng.normal(size=len(classes)) + 5 * classes
        levels = metrics.class_thresholds(scores, classes, 3, 0.05)
        self.assertEqual(levels[1], metrics.threshold_at_fpr(scores[classes == 1], 0.05))
        self.assertEqual(levels[0], levels[2])
        small, alarms = np.flatnonzero(classes != 1), 0
        for fresh in small:
            rest = np.arange(len(classes)) != fresh
            levels = metrics.class_thresholds(scores[rest], classes[rest], 3, 0.05)
            alarms += scores[fresh] > levels[classes[fresh]]
        self.assertEqual(alarms, len(small) // 20)

    def test_where_even_all_small_classes_are_too_few_nothing_is_called(self):
        classes = np.array([0] * 9 + [1] * 9 + [2] * 19)
        levels = metrics.class_thresholds(np.arange(37.0), classes, 3, 0.05)
        np.testing.assert_array_equal(levels, [np.inf, np.inf, 36])
        np.testing.assert_array_equal(
            metrics.class_thresholds(np.arange(37.0), classes, 3, 0.01), [np.inf] * 3
        )

    def test_rates_in_decimals_do_not_slip(self):
        """0.29 * 100 is less than 29, 0.07 * 100 more than 7."""
        for n in (99, 199, 999):
            for percent in range(1, 100):
                k = percent * (n + 1) // 100
                self.assertEqual(metrics.threshold_at_fpr(np.arange(n), percent / 100), n - k)
        self.assertEqual(metrics.threshold_at_fpr(np.arange(19), 0.05), 18)
        self.assertEqual(metrics.threshold_at_fpr(np.arange(2), 1 / 3), 1)

    def test_the_ends(self):
        self.assertEqual(metrics.threshold_at_fpr(np.zeros(0), 0.05), np.inf)
        self.assertEqual(metrics.threshold_at_fpr(np.arange(1000), 0.0), np.inf)
        self.assertEqual(metrics.threshold_at_fpr(np.arange(9), 1.0), -np.inf)
        for scores, fpr, message in (
            ([0.0, np.nan], 0.5, '^1 of 2 scores'),
            ([0.0], 5, 'fpr is 5'),
        ):
            with self.assertRaisesRegex(ValueError, message):
                metrics.threshold_at_fpr(np.array(scores), fpr)

    def test_best_is_the_best_of_all(self):
        rng = np.random.default_rng(0)
        for _ in range(30):
            scores = rng.integers(0, 12, size=25).astype(np.float32) / 7
            kinds = rng.permutation(25) < 9

            def balanced(threshold, scores=scores, kinds=kinds):
                called = np.asarray(scores, np.float64) > threshold
                return called[kinds].mean() - called[~kinds].mean()

            found = balanced(metrics.best_threshold(scores, kinds))
            best = max(balanced(threshold) for threshold in np.append(scores - 0.01, 99))
            self.assertAlmostEqual(found, best)


def judged(scores, maps, fit_scores, fit_maps, **rule):
    """Returns what one seed makes of maps, by thresholds of other maps: by class, and overall."""
    levels = metrics.thresholds(fit_scores, fit_maps, 3, **rule)
    seed = averages.measure(scores, maps, levels)
    return averages.over_seeds([seed], NAMES, judged_over_fitted=1.0).values()


class JudgedTest(parameterized.TestCase):
    def test_groups_by_the_predicted_class_and_pools(self):
        maps = maps_of([0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1, 0])
        scores = np.array([-1, 1, 1, 1, -1, 1, -1.0])
        classes, overall = judged(scores, maps, scores, maps, threshold=0.0)
        self.assertAlmostEqual(classes['Zero']['balanced_accuracy'], 0.75)
        self.assertAlmostEqual(classes['One']['balanced_accuracy'], 1.0)
        self.assertIsNone(classes['Two']['balanced_accuracy'])
        # All three adversarial maps are found, and two of three clean ones left alone.
        self.assertAlmostEqual(overall['balanced_accuracy'], (1 + 2 / 3) / 2)
        # Nothing is fitted in the third class, so its clean map is not judged, nor sets thresholds.
        self.assertEqual([overall[name] for name in averages.COUNTS], [3, 3, 3])

    def test_thresholds_never_see_the_maps_they_are_judged_by(self):
        """Whatever the judged scores, what is called adversarial depends on the fitted ones."""
        fit_maps = maps_of([0] * 40, [0] * 20 + [1] * 20)
        maps = maps_of([0, 0, 0, 0], [0, 1, 0, 1])
        fit_scores = np.repeat([0.0, 0.1, 0.9, 1.0], 10)
        for scores, expected in (([0.2, 0.8, 0.2, 0.8], 1 / 2), ([0.2, 0.95, 0.2, 0.95], 1.0)):
            classes, _ = judged(np.array(scores), maps, fit_scores, fit_maps)
            self.assertAlmostEqual(classes['Zero']['balanced_accuracy'], expected)
            self.assertEqual(classes['Zero']['auroc'], 1.0)
            self.assertEqual(classes['Zero']['tpr_at_5_fpr'], 1.0)

    @parameterized.parameters((33, 2 / 3), (32, None))
    def test_small_classes_pool_the_clean_maps_of_one_percent(self, count, mean):
        """Three classes of 33 clean maps make 99; the highest of all is the threshold."""
        fit_maps = maps_of(np.repeat([0, 1, 2], count + 1), ([0] * count + [1]) * 3)
        fit_scores = np.linspace(0, 1, len(fit_maps))
        maps = maps_of([0, 0, 1, 1, 2, 2], [0, 1] * 3)
        highest = fit_scores[-2]
        scores = np.array([0, 2.0, 0, highest, 0, np.nextafter(highest, 2)])
        classes, overall = judged(scores, maps, fit_scores, fit_maps, threshold=0.5)
        expected = [1, 0, 1] if mean else [None] * 3
        self.assertEqual([entry['tpr_at_1_fpr'] for entry in classes.values()], expected)
        self.assertEqual([entry['n_thresholds'] for entry in classes.values()], [count] * 3)
        self.assertEqual((overall['tpr_at_1_fpr'], overall['n_thresholds']), (mean, 3 * count))

    def test_a_class_without_fitted_maps_is_in_no_pool(self):
        """Its detector knows nothing, so its scores must not set the others' threshold."""
        fit_maps = maps_of([0] * 13 + [1] * 8 + [2] * 8, [0] * 12 + [1] + [0] * 7 + [1] + [0] * 8)
        fit_scores = np.where(fit_maps.predicted == 2, 99.0, 0.0)
        levels = metrics.thresholds(fit_scores, fit_maps, 3, threshold=0.0)
        np.testing.assert_array_equal(levels.threshold, [0, 0, np.nan])
        np.testing.assert_array_equal(levels.at_5, [0, 0, np.nan])
        np.testing.assert_array_equal(levels.at_1, [np.inf, np.inf, np.nan])


class BaselinesTest(parameterized.TestCase):
    def test_by_hand(self):
        maps = maps_of([0, 1], [0, 1])
        unoccluded = np.array([[np.log(3), 0, 0], [0, np.log(8), 0]], np.float32)
        logits = np.zeros((2, 2, 2, 3), np.float32)
        logits[0, 0, 0, 0] = 50  # Three cells of 1/3 and one of 1.
        compared = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
        maps = dataclasses.replace(maps, unoccluded=unoccluded, logits=logits, comparators=compared)
        twin = np.array([[0, 0, np.log(2)], [0, np.log(6), 0]], np.float32)
        maps = dataclasses.replace(maps, twin=twin)
        scores = {name: b.score_fn(maps) for name, b in metrics.SCORES.items()}
        np.testing.assert_allclose(scores['pid'], -np.log([1 / 4, 6 / 8]), rtol=1e-6)
        np.testing.assert_allclose(scores['max_probability'], [-3 / 5, -8 / 10], rtol=1e-6)
        np.testing.assert_allclose(scores['map_mean'], [-1 / 2, -1 / 3], rtol=1e-6)
        np.testing.assert_allclose(scores['map_minimum'], [-1 / 3, -1 / 3], rtol=1e-6)
        # Distances from the mean: three of 1/6 and one of 1/2.
        expected = [math.sqrt((3 / 36 + 1 / 4) / 4), 0]
        np.testing.assert_allclose(scores['map_deviation'], expected, atol=1e-6)
        # Quartiles of 1/3, 1/3, 1/3, 1: the upper is a quarter of the way from 1/3 to 1.
        np.testing.assert_allclose(scores['map_iqr'], [1 / 6, 0], atol=1e-6)
        np.testing.assert_allclose(scores['map_mad'], [0, 0], atol=1e-6)
        for name, column in zip(COMPARATORS, compared.T, strict=True):
            np.testing.assert_array_equal(scores[name], column)
        logits[0, 1, 0, 0] = 50  # Two and two: the median lies between them.
        spread = metrics.BASELINES['map_mad'].score_fn(dataclasses.replace(maps, logits=logits))
        np.testing.assert_allclose(spread, [1 / 3, 0], atol=1e-6)


def random_maps(count=3, shape=(9, 12)):
    return np.random.default_rng(count).uniform(size=(count, *shape))


class MeasureTest(parameterized.TestCase):
    @parameterized.parameters(3, 5, 7)
    def test_ssim_is_scikit_images(self, window):
        peer = pytest.importorskip('skimage.metrics')
        first = random_maps()
        second = np.clip(first + 0.3 * random_maps(3)[:, ::-1] - 0.15, 0, 1)
        expected = [
            peer.structural_similarity(a, b, win_size=window, data_range=1.0)
            for a, b in zip(first, second, strict=True)
        ]
        np.testing.assert_allclose(metrics.ssim(first, second, window=window), expected)

    def test_ssim_in_closed_form(self):
        """Of constants only the luminance differs; of a map with its negative, only the sign."""
        constants = np.full((1, 7, 7), 0.2), np.full((1, 7, 7), 0.6)
        expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
        np.testing.assert_allclose(metrics.ssim(*constants), [expected])
        board = np.where(np.indices((4, 4)).sum(axis=0) % 2, 0.75, 0.25)[None]
        # One window of 3x3 has five of one and four of the other: its mean moves, so no 1.
        self.assertLess(metrics.ssim(board, 1 - board)[0], -0.9)

    @parameterized.parameters(((4, 4),), ((2, 9),), ((1, 1),))
    def test_ssim_of_small_maps(self, shape):
        maps = random_maps(2, shape)
        np.testing.assert_allclose(metrics.ssim(maps, maps), [1, 1])

    def test_ssim_refuses(self):
        with self.assertRaisesRegex(ValueError, r'Expected two arrays \[M, h, w\]'):
            metrics.ssim(random_maps()[0], random_maps()[0])

    def test_spearman_is_scipys(self):
        stats = pytest.importorskip('scipy.stats')
        first, second = random_maps().round(1), random_maps(4)[:3]
        expected = [
            stats.spearmanr(a.ravel(), b.ravel()).statistic
            for a, b in zip(first, second, strict=True)
        ]
        np.testing.assert_allclose(metrics.spearman(first, second), expected)

    def test_spearman_sees_order_alone(self):
        maps = random_maps()
        np.testing.assert_allclose(metrics.spearman(maps, maps**3), [1, 1, 1])
        np.testing.assert_allclose(metrics.spearman(maps, -maps), [-1, -1, -1])
        self.assertTrue(np.isnan(metrics.spearman(maps, np.ones_like(maps))).all())


def test_ranks_of_equal_values_agree_with_none():
    assert metrics.rank_agreement([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert metrics.rank_agreement([1, 2, 3, 4], [2, 2, 2, 2]) is None
    assert metrics.rank_agreement([1, 2, 3], [1, 2, 3]) is None


def test_a_histogram_counts_every_score_once():
    rng = np.random.default_rng(0)
    kinds = {'clean': rng.normal(size=500), 'attacked': rng.normal(size=30) + 9, 'noise': []}
    kinds['noise'] = np.zeros(0)
    found = metrics.histogram(kinds)
    assert len(found['edges']) == 31
    assert sum(found['clean']) == pytest.approx(1) and sum(found['attacked']) == pytest.approx(1)
    assert not any(found['noise'])
    assert metrics.histogram({'clean': np.zeros(0), 'attacked': np.zeros(0)}) is None
    middle = np.searchsorted(found['edges'], 5)
    assert sum(found['clean'][:middle]) == pytest.approx(1)
    assert sum(found['attacked'][middle:]) == pytest.approx(1)
    constant = metrics.histogram({'all': np.full(5, 0.3)}, bins=3)
    assert np.diff(constant['edges']).min() > 0 and constant['all'] == [0, 1, 0]
