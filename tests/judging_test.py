"""Laws of judging: who may be fitted on, and what is counted where."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occjax import judging, metrics
from occjax.config import Detector
from tests.detector_test import toy_maps


def rng_of(*purpose):
    return np.random.default_rng(purpose)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
    share=st.floats(0, 0.99),
    seeds=st.integers(1, 4),
)
def test_an_image_and_its_twin_never_straddle_a_split(ids, fraction, share, seeds):
    maps = toy_maps([(len(ids), 0)])
    maps = dataclasses.replace(maps, image_id=np.array(ids))
    reserved = share * (1 - fraction)
    wanted = Detector(
        held_out_fit_fraction=fraction, held_out_threshold_fraction=reserved, seeds=seeds
    )
    division = judging.divide(maps, 'held_out', wanted, rng_of)
    parts = division.is_fitted, division.is_reserved, division.is_judged
    count = len(set(ids))
    for masks in zip(*parts, strict=True):
        assert np.sum(masks, axis=0).tolist() == [1] * len(ids)
        fitted, kept, judged = (set(maps.image_id[mask]) for mask in masks)
        assert not (fitted & kept or fitted & judged or kept & judged)
        assert len(fitted) == round(fraction * count)
        assert len(kept) == round((fraction + reserved) * count) - len(fitted)
    assert len(division.is_judged) == seeds


def test_seeds_divide_differently_and_again_the_same():
    maps, wanted = toy_maps([(40, 40), (20, 20)]), Detector()
    one, two = (judging.divide(maps, 'paper', wanted, rng_of).is_fitted for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert len({tuple(fitted) for fitted in one}) == wanted.seeds
    division = judging.divide(maps, 'paper', wanted, rng_of)
    assert division.judged_over_fitted == pytest.approx(24 / 96)


def test_perfect_scores_are_perfect_and_constant_ones_are_a_coin():
    maps = toy_maps([(40, 40), (20, 20)])
    division = judging.divide(maps, 'paper', Detector(), rng_of)
    judge = functools.partial(judging.judge, division=division, class_names=('a', 'b'))
    perfect = judge(maps.is_adversarial * 2.0 - 1, threshold=0.0)['overall']
    assert (perfect['auroc'], perfect['balanced_accuracy']) == (1, 1)
    assert perfect['interval']['auroc'] == (1, 1)
    constant = judge(np.ones(len(maps)), threshold=0.0)['overall']
    assert (constant['auroc'], constant['balanced_accuracy']) == (0.5, 0.5)


def test_scores_of_a_seed_are_judged_with_that_seed_s_maps():
    """A seed whose scores are the label, beside one whose scores are its opposite."""
    maps = toy_maps([(40, 40)])
    division = judging.divide(maps, 'paper', Detector(seeds=2), rng_of)
    scores = np.stack([maps.is_adversarial * 1.0, -1.0 * maps.is_adversarial])
    entry = judging.judge(scores, division, class_names=('a',), threshold=0.5)['overall']
    assert entry['auroc'] == pytest.approx(0.5)
    low, high = entry['interval']['auroc']
    assert low < 0 < 1 < high


def test_controls_count_by_hand():
    """Two classes; the second has no adversarial map, so that nobody judges its controls."""
    maps = toy_maps([(10, 10), (10, 0)])
    maps = dataclasses.replace(maps, image_id=np.arange(len(maps)))
    is_fitted = np.zeros((1, len(maps)), bool)
    is_fitted[0, [0, 1, 2, 3, 10, 11, 12, 13, 20, 21]] = True
    division = judging.Division(maps, is_fitted, np.zeros_like(is_fitted))
    controls = maps.select([0, 4, 5, 6, 7, 22, 23])  # The first was fitted on.
    known = np.zeros((1, len(maps)))
    known[0, :4] = [0.0, 0.1, 0.2, 0.3]  # Clean: at 5 % of four, none may lie above.
    scores = np.array([9, 0.25, 0.35, -1, 0.9, 9, 9.0])
    rates = judging.control_rates(scores, controls, known, division, threshold=0.5)
    assert rates['n'] == 4
    assert rates['called'] == 1 / 4
    assert rates['called_at_5_fpr'] == 2 / 4
    assert rates['interval'] == {'called': None, 'called_at_5_fpr': None}


def test_reserved_maps_alone_set_a_network_s_thresholds():
    """Scores that are lower where they were fitted: judged by those, everything rings."""
    maps = toy_maps([(4000, 4000)], grid=(1, 1))
    wanted = Detector(held_out_fit_fraction=0.4, held_out_threshold_fraction=0.3, seeds=3)
    division = judging.divide(maps, 'held_out', wanted, rng_of)
    scores = np.random.default_rng(0).normal(size=len(maps)) + maps.is_adversarial
    learnt = np.where(division.is_fitted, scores - 9, scores)
    judge = functools.partial(judging.judge, class_names=('a',), threshold=0.0)
    met = judge(learnt, division)['overall']['fpr_at_5_fpr']
    assert 0.03 < met < 0.07
    assert met == judge(scores, division)['overall']['fpr_at_5_fpr']
    careless = division._replace(is_reserved=np.zeros_like(division.is_reserved))
    assert judge(learnt, careless)['overall']['fpr_at_5_fpr'] == 1
    # What learns nothing may use all that is known.
    _, level = metrics.thresholds(**division.known(0, scores, learns=False), num_classes=1)
    clean = ~division.is_judged[0] & ~maps.is_adversarial
    assert level[0] == metrics.threshold_at_fpr(scores[clean], 0.05)


@pytest.mark.parametrize('lacks', ['fitted', 'reserved'])
def test_a_class_without_maps_to_fit_or_to_set_thresholds_by_is_not_judged(lacks):
    maps = toy_maps([(20, 20), (20, 20)])
    first, half = np.arange(len(maps)) % 4 == 0, np.arange(len(maps)) % 4 == 1
    gone = (maps.predicted == 1) & ~maps.is_adversarial
    fitted, reserved = (first & ~gone, half) if lacks == 'fitted' else (first, half & ~gone)
    division = judging.Division(maps, fitted[None], reserved[None])
    known = division.known(0, np.zeros(len(maps)), learns=True)
    levels = metrics.thresholds(**known, num_classes=2, threshold=0.0)
    assert np.isnan(levels).tolist() == [[False, True]] * 2
    entry = judging.judge(np.zeros(len(maps)), division, class_names=('a', 'b'), threshold=0.0)
    assert entry['per_class']['b']['auroc'] is None
    assert entry['per_class']['a']['auroc'] == 0.5
