"""Laws of the numbers: a toy by hand, and what thresholds may not see."""

import dataclasses
import math

import numpy as np
from absl.testing import parameterized

from occjax import metrics
from occjax.types import COMPARATORS, HeatmapSet

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


class RatesTest(parameterized.TestCase):
    def test_by_hand(self):
        """Four correct maps, two adversarial; at 0 one of each is mistaken."""
        rates = metrics.rates(
            np.array([-2.0, -1.0, -0.5, 0.5, -0.7, 3.0]),
            np.array([0, 0, 0, 0, 1, 1], bool),
            threshold=0.0,
            fit_clean_scores=np.arange(100.0) / 100,  # 5 % lie above 0.94, 1 % above 0.98
        )
        self.assertEqual((rates['n_correct'], rates['n_adversarial']), (4, 2))
        self.assertAlmostEqual(rates['accuracy'], 4 / 6)
        self.assertAlmostEqual(rates['majority_baseline'], 4 / 6)
        self.assertAlmostEqual(rates['balanced_accuracy'], (3 / 4 + 1 / 2) / 2)
        # Of eight pairs the adversarial map leads in 2 + 4.
        self.assertAlmostEqual(rates['auroc'], 6 / 8)
        self.assertAlmostEqual(rates['tpr_at_5_fpr'], 1 / 2)
        self.assertAlmostEqual(rates['tpr_at_1_fpr'], 1 / 2)

    def test_auroc_of_a_constant_is_a_half_and_of_the_label_one(self):
        kinds = np.array([0, 1, 0, 1, 1], bool)
        common = dict(threshold=0.5, fit_clean_scores=np.zeros(3))
        self.assertEqual(metrics.rates(np.ones(5), kinds, **common)['auroc'], 0.5)
        self.assertEqual(metrics.rates(kinds * 1.0, kinds, **common)['auroc'], 1.0)
        self.assertEqual(metrics.rates(kinds * 1.0, kinds, **common)['balanced_accuracy'], 1.0)

    @parameterized.parameters(
        ([False, False], 'no adversarial maps'),
        ([True, True], 'no correct maps'),
        ([], 'no correct or adversarial maps'),
    )
    def test_a_missing_kind_is_said_and_never_nan(self, kinds, note):
        kinds = np.array(kinds, bool)
        rates = metrics.rates(
            np.zeros(len(kinds)), kinds, threshold=0.0, fit_clean_scores=np.zeros(3)
        )
        self.assertEqual(rates['note'], note)
        self.assertTrue(all(rates[name] is None for name in metrics.RATES))


class ThresholdTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.01, 0.05, 0.5)
    def test_at_fpr_is_the_lowest_that_keeps_its_promise(self, fpr):
        scores = np.random.default_rng(0).normal(size=237).astype(np.float32)
        threshold = metrics.threshold_at_fpr(scores, fpr)
        self.assertLessEqual(np.mean(scores > threshold), fpr)
        lower = np.float32(scores[scores < threshold].max())
        self.assertGreater(np.mean(scores > lower), fpr)

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


class PerClassTest(parameterized.TestCase):
    def test_groups_by_the_class_named_and_means_over_classes(self):
        maps = maps_of([0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1, 0])
        scores = np.array([-1, 1, 1, 1, -1, 1, -1.0])
        classes = metrics.per_class(scores, maps, scores, maps, class_names=NAMES, threshold=0.0)
        self.assertAlmostEqual(classes['Zero']['balanced_accuracy'], 0.75)
        self.assertAlmostEqual(classes['One']['balanced_accuracy'], 1.0)
        self.assertIsNone(classes['Two']['balanced_accuracy'])
        overall = metrics.overall(classes)
        self.assertAlmostEqual(overall['balanced_accuracy'], 0.875)
        self.assertEqual((overall['n_correct'], overall['n_adversarial']), (4, 3))

    def test_thresholds_never_see_the_maps_they_are_judged_by(self):
        """Whatever the judged scores, what is called adversarial depends on the fitted ones."""
        fit_maps = maps_of([0, 0, 0, 0], [0, 0, 1, 1])
        maps = maps_of([0, 0, 0, 0], [0, 1, 0, 1])
        fit_scores = np.array([0.0, 0.1, 0.9, 1.0])
        for scores, expected in (([0.2, 0.8, 0.2, 0.8], 1 / 2), ([0.2, 0.95, 0.2, 0.95], 1.0)):
            classes = metrics.per_class(
                np.array(scores), maps, fit_scores, fit_maps, class_names=NAMES
            )
            self.assertAlmostEqual(classes['Zero']['balanced_accuracy'], expected)
            self.assertEqual(classes['Zero']['auroc'], 1.0)
            self.assertEqual(classes['Zero']['tpr_at_5_fpr'], 1.0)


class BaselinesTest(parameterized.TestCase):
    def test_by_hand(self):
        maps = maps_of([0, 1], [0, 1])
        unoccluded = np.array([[np.log(3), 0, 0], [0, np.log(8), 0]], np.float32)
        logits = np.zeros((2, 2, 2, 3), np.float32)
        logits[0, 0, 0, 0] = 50  # Three cells of 1/3 and one of 1.
        compared = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
        maps = dataclasses.replace(maps, unoccluded=unoccluded, logits=logits, comparators=compared)
        scores = {name: fn(maps) for name, fn in metrics.BASELINES.items()}
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
        spread = metrics.BASELINES['map_mad'](dataclasses.replace(maps, logits=logits))
        np.testing.assert_allclose(spread, [1 / 3, 0], atol=1e-6)


class IntervalTest(parameterized.TestCase):
    @parameterized.parameters((5, 0.5), (5, 0.8))
    def test_covers_the_truth_at_about_its_level(self, seeds, fraction):
        """Scores of a known AUROC, 0.5 + erf(1/2)/2, in a set divided anew for every seed."""
        truth, rng = 0.5 + 0.5 * math.erf(0.5), np.random.default_rng(0)
        covered, naive = 0, 0
        for _ in range(300):
            kinds = np.arange(120) % 2
            scores, values = rng.normal(size=120) + kinds, []
            for _ in range(seeds):
                judged = rng.permutation(120)[round(fraction * 120) :]
                rates = metrics.rates(
                    scores[judged],
                    kinds[judged] == 1,
                    threshold=0.5,
                    fit_clean_scores=scores[:2],
                )
                values.append(rates['auroc'])
            ratio = (1 - fraction) / fraction
            low, high = metrics.interval(values, judged_over_fitted=ratio)
            covered += low <= truth <= high
            low, high = metrics.interval(values, judged_over_fitted=0.0)
            naive += low <= truth <= high
        self.assertBetween(covered / 300, 0.9, 0.995)
        self.assertLess(naive, covered, 'the spread alone promises too much')

    def test_one_seed_has_none(self):
        self.assertIsNone(metrics.interval([0.7], judged_over_fitted=1.0))

    def test_means_over_seeds_by_hand(self):
        seeds = [
            {'n_correct': 4, 'n_adversarial': 2} | dict.fromkeys(metrics.RATES, value)
            for value in (0.5, 0.7, None)
        ]
        mean = metrics.over_seeds(seeds, judged_over_fitted=0.5)
        self.assertEqual((mean['n_correct'], mean['n_adversarial']), (4, 2))
        self.assertAlmostEqual(mean['auroc'], 0.6)
        # t(0.975, 1) = 12.706; the variance of 0.5 and 0.7 is 0.02, and 1/2 + 1/2 of it counts.
        reach = 12.7062 * math.sqrt(0.02)
        np.testing.assert_allclose(mean['interval']['auroc'], [0.6 - reach, 0.6 + reach], rtol=1e-4)
