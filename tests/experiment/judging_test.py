"""Laws of judging: who may be fitted on, and what is counted where."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occjax import metrics, streams
from occjax.config import Detector
from occjax.experiment import judging
from occjax.experiment.judging import Scorer
from occjax.methods import METHODS
from occjax.report import figures
from occjax.types import UsageError
from tests.detector_test import toy_maps

NETWORKS = Scorer(None, threshold=0.0, learns=True)


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
    division = judging.divide(maps, 'held_out', wanted, 0)
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
    one, two = (judging.divide(maps, 'paper', wanted, 0).is_fitted for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = judging.divide(maps, 'paper', wanted, 1).is_fitted
    assert len({tuple(fitted) for fitted in (*one, *other)}) == 2 * wanted.seeds
    division = judging.divide(maps, 'paper', wanted, 0)
    assert division.judged_over_fitted == pytest.approx(24 / 96)


@pytest.mark.parametrize('protocol', ['paper', 'held_out'])
def test_every_division_has_a_stream_of_its_own(protocol):
    """The table's, so that no other purpose of any seed draws the same."""
    maps, wanted = toy_maps([(60, 0)]), Detector(seeds=3)
    divided = judging.divide(maps, protocol, wanted, 7).is_fitted
    for seed, fitted in enumerate(divided):
        index = ['paper', 'held_out'].index(protocol), seed
        drawn = streams.rng(7, streams.Stream.DIVISION, *index).permutation(60)
        assert set(np.flatnonzero(fitted)) == set(drawn[: fitted.sum()])


def test_perfect_scores_are_perfect_and_constant_ones_are_a_coin():
    maps = toy_maps([(40, 40), (20, 20)])
    division = judging.divide(maps, 'paper', Detector(), 0)
    judge = functools.partial(judging.judge, NETWORKS, division=division, class_names=('a', 'b'))
    perfect = judge(maps.is_adversarial * 2.0 - 1)['overall']
    assert (perfect['auroc'], perfect['balanced_accuracy']) == (1, 1)
    # Ten or so of each kind judge, and all of them being right leaves room for a wrong one.
    held_out = judging.divide(toy_maps([(80, 80), (40, 40)]), 'held_out', Detector(), 0)
    perfect = judging.judge(
        NETWORKS, held_out.maps.is_adversarial * 2.0 - 1, held_out, class_names=('a', 'b')
    )
    low, high = perfect['overall']['interval']['auroc']
    assert 0.8 < low < 0.98 and high == 1
    constant = judge(np.ones(len(maps)))['overall']
    assert (constant['auroc'], constant['balanced_accuracy']) == (0.5, 0.5)


def test_scores_of_a_seed_are_judged_with_that_seed_s_maps():
    """A seed whose scores are the label, beside one whose scores are its opposite."""
    maps = toy_maps([(40, 40)])
    division = judging.divide(maps, 'held_out', Detector(seeds=4), 0)
    scores = np.stack([maps.is_adversarial * 1.0, -1.0 * maps.is_adversarial] * 2)
    scorer = Scorer(None, threshold=0.5)
    entry = judging.judge(scorer, scores, division, class_names=('a',))['overall']
    assert entry['auroc'] == pytest.approx(0.5)
    assert entry['interval']['auroc'] == [0, 1]
    few = judging.judge(
        scorer, scores[:2], judging.divide(maps, 'paper', Detector(seeds=2), 0), class_names=('a',)
    )
    assert few['overall']['auroc'] == pytest.approx(0.5)
    assert few['overall']['interval']['auroc'] is None


def test_controls_count_by_hand():
    """Three classes; the second has no adversarial map, so that nobody judges its controls.

    The third has too few clean ones for a threshold of 5 %.
    """
    maps = toy_maps([(40, 20), (10, 0), (30, 20)])
    maps = dataclasses.replace(maps, image_id=np.arange(len(maps)))
    is_fitted = np.zeros((1, len(maps)), bool)
    is_fitted[0, [*range(19), 40, 60, 61, *range(70, 88), 100]] = True
    division = judging.Division(maps, is_fitted, np.zeros_like(is_fitted))
    controls = maps.select([0, 24, 25, 26, 27, 62, 63, 90, 91, 92])  # The first was fitted on.
    known = np.zeros((1, len(maps)))
    known[0, :19] = np.linspace(0, 0.3, 19)  # Clean: at 5 % of 19 the largest is the threshold.
    scores = np.array([9, 0.25, 0.35, -1, 0.9, 9, 9.0, 9, 9, 0])
    scorer = Scorer(lambda _: scores, threshold=0.5, learns=True)
    rates = judging.control_rates(scorer, known, division, controls)
    assert rates['n'] == 7
    assert rates['flagged'] == 3 / 7
    assert rates['flagged_at_5_fpr'] == 2 / 4
    assert rates['over'] == {'flagged_at_5_fpr': [4, 7]}
    assert rates['interval'] == {'flagged': None, 'flagged_at_5_fpr': None}


def test_noise_is_no_attack_either():
    """Of one class, by hand: noise of images that a seed knows does not count."""
    maps = toy_maps([(40, 40)])
    division = judging.divide(maps, 'held_out', Detector(seeds=1), 0)
    noise = dataclasses.replace(maps.select(~maps.is_adversarial))
    known = np.isin(noise.image_id, maps.image_id[~division.is_judged[0]])
    assert 0 < known.sum() < 40
    # Attacks above the clean; the noise of fresh images above both, that of known ones below.
    scorer = Scorer(lambda here: np.where(known, -9.0, 9.0), threshold=0.5)
    scores = maps.is_adversarial * 1.0
    entry = judging.judge(scorer, scores, division, class_names=('a',), noise=noise)
    assert entry['overall']['auroc'] == 1
    assert entry['overall']['auroc_with_noise'] == 0.5  # As many noisy as clean ones.
    assert entry['per_class']['a']['auroc_with_noise'] == 0.5
    assert (
        judging.judge(scorer, scores, division, class_names=('a',))['overall']['auroc_with_noise']
        is None
    )


def test_detectors_fitted_with_noise_call_it_clean():
    """Here the noise looks like the attacks, and there is thrice as much of it."""
    maps = toy_maps([(60, 60), (60, 60)])
    division = judging.divide(maps, 'held_out', Detector(seeds=2), 0)
    looks = maps.select(maps.is_adversarial)
    noise = dataclasses.replace(looks, is_adversarial=np.zeros(120, bool))
    settings = dict(steps=300, learning_rate=0.3, balance='none')
    method, wanted = METHODS['linear_probe'], Detector(seeds=2, **settings)
    key = jax.random.key(0)
    scores = {}
    for name, joined in (('without', None), ('with', noise.select(np.arange(120).repeat(3)))):
        banks = judging.init_banks(key, division, method)
        banks = judging.fit_banks(key, banks, division, method, wanted, 0, joined)
        scores[name] = judging.score_banks(banks, method, noise)
    judged = np.isin(noise.image_id, maps.image_id[division.is_judged[0]])
    assert np.mean(scores['without'][0][judged] > 0) > 0.6
    assert np.mean(scores['with'][0][judged] > 0) < 0.1


def test_networks_of_many_classes_are_those_of_few_at_once(monkeypatch):
    """Fitted and scored three classes at a time or all; one that learns nothing stays as it was."""
    maps = toy_maps([(9, 7), (30, 20), (5, 0), (12, 12), (8, 9), (0, 3), (6, 6)])
    division = judging.divide(maps, 'paper', Detector(seeds=2), 0)
    found = []
    for at_once in (16, 3):
        monkeypatch.setattr(judging, '_AT_ONCE', at_once)
        for name in ('linear_probe', 'all_logits'):
            method, key = METHODS[name], jax.random.key(0)
            fresh = judging.init_banks(key, division, method)
            wanted = Detector(seeds=2, steps=20)
            banks = judging.fit_banks(key, fresh, division, method, wanted, 0)
            found.append((banks, judging.score_banks(banks, method, maps)))
            none = judging.score_banks(banks, method, maps.select(slice(0, 0)))
            assert none.shape == (2, 0)
            if name == 'linear_probe':
                for before, after in zip(*map(jax.tree.leaves, (fresh, banks)), strict=True):
                    same = np.isclose(before, after).reshape(2, 7, -1).all(axis=(0, 2))
                    assert same.tolist() == [k in (2, 5) for k in range(7)]
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        for pair in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-5)


def test_classes_that_lack_maps_are_named_by_hand():
    """Two seeds; of four classes the last has enough in both, the first in one alone."""
    maps = toy_maps([(60, 20), (60, 0), (30, 30), (60, 20)])
    is_fitted, is_reserved = np.zeros((2, 2, len(maps)), bool)
    place = maps.predicted * 2 + maps.is_adversarial
    for kind in range(8):
        here = np.flatnonzero(place == kind)
        is_fitted[:, here[:10]] = True
        is_reserved[:, here[10 : 10 + 19]] = True
    one_less = np.flatnonzero(is_reserved[1] & (place == 0))[0]
    is_reserved[1, one_less] = False
    division = judging.Division(maps, is_fitted, is_reserved)
    assert judging.lacking(division).tolist() == [True, True, False, False]
    # With none reserved those that were fitted on set thresholds, and ten are too few.
    alone = division._replace(is_reserved=np.zeros_like(is_reserved))
    assert judging.lacking(alone).all()
    whole = alone._replace(is_fitted=is_fitted | is_reserved)
    assert judging.lacking(whole).tolist() == [False, True, False, False]
    empty = judging.Division(maps.select(slice(0, 0)), is_fitted[:, :0], is_reserved[:, :0])
    assert judging.lacking(empty).all()


def test_detectors_in_use_need_maps_that_none_was_fitted_on():
    maps, wanted = toy_maps([(40, 40), (20, 20)]), Detector(seeds=2)
    division = judging.divide(maps, 'held_out', wanted, 0)
    with pytest.raises(UsageError, match='held_out_threshold_fraction'):
        judging.first({}, division, METHODS['detector'])


def learnt_scores(maps, division):
    """Returns fresh normal scores for every seed, far lower where they were fitted."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=division.is_fitted.shape) + maps.is_adversarial
    return np.where(division.is_fitted, scores - 9, scores)


def few_reserved(classes, seeds):
    """Returns a division with 28 clean maps to set thresholds by in each class, as our tables'."""
    maps = toy_maps([(100, 30)] * classes, grid=(1, 1))
    parts = np.concatenate([np.arange(100), 40 + np.arange(30)] * classes)
    is_fitted = np.broadcast_to(parts >= 68, (seeds, len(maps)))
    return judging.Division(maps, is_fitted, np.broadcast_to(parts < 28, is_fitted.shape))


def test_reserved_maps_alone_set_a_network_s_thresholds():
    """Of 28 the largest: a fresh one exceeds it once in 29; the fitted ones' would always ring."""
    division = few_reserved(classes=25, seeds=8)
    scores = learnt_scores(division.maps, division)
    names = tuple(map(str, range(25)))
    judge = functools.partial(judging.judge, class_names=names)
    overall = judge(NETWORKS, scores, division)['overall']
    assert overall['n_thresholds'] == 25 * 28
    assert overall['fpr_at_5_fpr'] == pytest.approx(1 / 29, abs=0.01)
    assert overall['tpr_at_1_fpr'] < overall['tpr_at_5_fpr']
    careless = division._replace(is_reserved=np.zeros_like(division.is_reserved))
    assert judge(NETWORKS, scores, careless)['overall']['fpr_at_5_fpr'] == 1


def test_who_sets_thresholds_is_said_by_the_scorer():
    """Not by its having one: what learns nothing may use all that is known, with 0 as without."""
    division = few_reserved(classes=1, seeds=1)
    scores = np.random.default_rng(0).normal(size=len(division.maps))
    clean = ~division.maps.is_adversarial
    all_known, reserved = clean & ~division.is_judged[0], clean & division.is_reserved[0]
    known, found = division.known(0, scores), {}
    for learns, sets in ((False, all_known), (True, reserved)):
        level = metrics.threshold_at_fpr(scores[sets], 0.05)
        for threshold in (0.0, None):
            rule = dict(threshold=threshold, learns=learns)
            assert metrics.thresholds(**known, num_classes=1, **rule).at_5 == level
            scorer = Scorer(None, **rule)
            found[learns] = judging.judge(scorer, scores, division, class_names=('a',))
            assert found[learns]['overall']['n_thresholds'] == sets.sum()
    assert found[True] != found[False]
    scorer = judging.scorer('detector', lambda name: None)
    assert (scorer.threshold, scorer.learns) == (0.0, True)


@pytest.mark.parametrize('lacks', ['fitted', 'reserved'])
def test_a_class_loses_what_needs_the_maps_it_lacks(lacks):
    """Without maps to fit by it is not judged; without reserved ones only its thresholds go."""
    division = few_reserved(classes=2, seeds=1)
    maps, fitted, reserved = (*division[:1], *(mask[0].copy() for mask in division[1:]))
    gone = (maps.predicted == 1) & ~maps.is_adversarial
    (fitted if lacks == 'fitted' else reserved)[gone] = False
    division = judging.Division(maps, fitted[None], reserved[None])
    known = division.known(0, np.zeros(len(maps)))
    levels = metrics.thresholds(**known, num_classes=2, threshold=0.0, learns=True)
    nan = lacks == 'fitted'
    np.testing.assert_array_equal(levels.threshold, [0, np.nan if nan else 0])
    np.testing.assert_array_equal(levels.at_5, [0, np.nan if nan else np.inf])
    entry = judging.judge(NETWORKS, np.zeros(len(maps)), division, class_names=('a', 'b'))
    found = {name: entry['per_class'][name] for name in ('a', 'b')}
    expected = [None, None] if nan else [0.5, 0.5]
    assert [found['a'][rate] for rate in ('auroc', 'balanced_accuracy')] == [0.5, 0.5]
    assert [found['b'][rate] for rate in ('auroc', 'balanced_accuracy')] == expected
    assert (found['a']['fpr_at_5_fpr'], found['b']['fpr_at_5_fpr']) == (0, None)
    assert found['b']['n_thresholds'] == 0
    n = [found[name]['n_correct'] for name in ('a', 'b')]
    assert entry['overall']['n_correct'] == (n[0] if nan else sum(n))
    assert entry['overall']['over'].get('fpr_at_5_fpr') == (None if nan else [n[0], sum(n)])
    assert entry['overall']['over_classes']['classes'] == (['a'] if nan else ['a', 'b'])


def test_all_scorers_are_judged_by_the_same_classes():
    """Class means compare: a class that networks cannot learn counts for no baseline either."""
    division = few_reserved(classes=3, seeds=1)
    unfitted = (division.maps.predicted == 1) & division.maps.is_adversarial
    division = division._replace(is_fitted=division.is_fitted & ~unfitted)
    for scorer in (NETWORKS, Scorer(None), Scorer(None, threshold=0.0)):
        entry = judging.judge(
            scorer, np.zeros(len(division.maps)), division, class_names=('a', 'b', 'c')
        )
        assert [e['auroc'] for e in entry['per_class'].values()] == [0.5, None, 0.5]


def test_a_roc_curve_is_the_mean_of_the_classes_and_its_area_the_table_s_auroc():
    """Beside a loop over thresholds, of a division with ties and two classes of unequal sizes."""
    rng = np.random.default_rng(0)
    maps = toy_maps([(100, 60), (140, 100)])
    scores = np.round(rng.normal(size=400) + maps.is_adversarial, 1)
    fitted = rng.random((3, 400)) < 0.3
    division = judging.Division(maps, fitted, np.zeros_like(fitted))
    found, expected = judging.roc(scores, division), []
    for judged in division.is_judged:
        curves, weights = [], []
        for k in set(maps.predicted):
            here = judged & (maps.predicted == k)
            clean, attacked = (scores[here & (maps.is_adversarial == a)] for a in (False, True))
            levels = np.sort(np.append(scores, np.inf))[::-1]
            corners = [[np.mean(kind >= level) for level in levels] for kind in (clean, attacked)]
            curves.append(np.interp(found['fpr'], *corners))
            weights.append(len(attacked))
        expected.append(np.average(curves, axis=0, weights=weights))
    np.testing.assert_allclose(found['tpr'], np.mean(expected, axis=0), atol=1e-9)
    rates = judging.judge(Scorer(None), scores, division, class_names=('a', 'b'))['overall']
    assert found['auroc'] == pytest.approx(rates['auroc'])
    assert np.trapezoid(found['tpr'], found['fpr']) == pytest.approx(rates['auroc'], abs=0.003)
    label = figures.roc_figure({'detector': found}).axes[0].get_legend().get_texts()[0]
    assert label.get_text() == f"Paper's detector ({rates['auroc']:.2f})"
    assert judging.roc(scores, division._replace(is_fitted=np.ones_like(fitted))) is None
    unlearnt = fitted & ~((maps.predicted == 1) & maps.is_adversarial)
    both, alone = (division._replace(is_fitted=each) for each in (unlearnt, unlearnt.copy()))
    alone = judging.Division(
        maps.select(first := maps.predicted == 0), *(x[:, first] for x in alone[1:])
    )
    assert judging.roc(scores, both) == judging.roc(scores[first], alone)
    perfect = judging.roc(maps.is_adversarial.astype(float), division)
    assert set(perfect['tpr']) == {1.0} and perfect['auroc'] == 1
    constant = judging.roc(np.zeros(400), division)
    np.testing.assert_allclose(constant['tpr'], constant['fpr'])
    assert constant['auroc'] == 0.5
