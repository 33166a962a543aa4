"""Laws of the detectors: one bank is K separate fits, and padding is nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from occjax import detector
from occjax.types import HeatmapSet

FIT = dict(steps=60, batch_size=16, learning_rate=3e-3)


def toy_maps(counts, *, grid=(4, 4), seed=0):
    """Returns maps of `counts[k] = (correct, adversarial)`; adversarial ones are darker."""
    rng = np.random.default_rng(seed)
    num_classes, parts = len(counts), []
    for k, kinds in enumerate(counts):
        for is_adversarial, count in enumerate(kinds):
            logits = rng.normal(size=(count, *grid, num_classes)).astype(np.float32)
            logits[..., k] += 1 if is_adversarial else 4
            unoccluded = rng.uniform(size=(count, num_classes)).astype(np.float32)
            unoccluded[:, k] = 9
            label = np.full(count, (k + is_adversarial) % num_classes, np.int32)
            kind = np.full(count, bool(is_adversarial))
            parts.append((logits, unoccluded, label, np.arange(count), kind))
    names = ('logits', 'unoccluded', 'label', 'image_id', 'is_adversarial')
    fields = map(np.concatenate, zip(*parts, strict=True))
    return HeatmapSet(**dict(zip(names, fields, strict=True)))


def toy_groups(counts, balance='undersample', **settings):
    maps = toy_maps(counts, **settings)
    return detector.group_by_class(
        maps.maps,
        maps.predicted,
        maps.is_adversarial,
        num_classes=len(counts),
        balance=balance,
        rng=np.random.default_rng(0),
    )


class BankTest(parameterized.TestCase):
    @parameterized.parameters(((4, 4), 113_409), ((14, 14), 159_489))
    def test_has_the_paper_s_size(self, grid, parameters):
        bank = detector.init_bank(jax.random.key(0), num_classes=3, grid=grid)
        self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(bank)), 3 * parameters)
        self.assertEqual({len(leaf) for leaf in jax.tree.leaves(bank)}, {3})

    @pytest.mark.slow
    def test_equals_separate_fits(self):
        """Classes of unequal size, one of them without adversarial maps."""
        groups = toy_groups([(30, 10), (8, 50), (20, 0)])
        key = jax.random.key(1)
        bank = detector.init_bank(jax.random.key(0), num_classes=3, grid=(4, 4))
        fitted = detector.fit_bank(key, bank, *groups, **FIT)
        for k in range(3):
            real = max(1, int((groups.weight[k] > 0).sum()))
            alone = detector.fit(
                jax.random.split(key, 3)[k],
                detector.detector_for(bank, k),
                *(field[k, :real] for field in groups),
                **FIT,
            )
            jax.tree.map(
                lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
                detector.detector_for(fitted, k),
                alone,
            )

    def test_a_class_with_nothing_to_learn_stays_as_it_is(self):
        bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(4, 4))
        groups = toy_groups([(30, 10), (20, 0)])
        fitted = detector.fit_bank(jax.random.key(1), bank, *groups, **FIT)
        before, after = (detector.detector_for(b, 1) for b in (bank, fitted))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        with self.assertRaises(AssertionError):
            before, after = (detector.detector_for(b, 0) for b in (bank, fitted))
            jax.tree.map(np.testing.assert_array_equal, before, after)

    def test_where_padding_stands_does_not_matter(self):
        groups, key = toy_groups([(30, 10), (8, 50)], balance='none'), jax.random.key(0)
        bank = detector.init_bank(key, num_classes=2, grid=(4, 4))
        spread = [
            np.stack([np.zeros_like(field), field], axis=2).reshape(2, -1, *field.shape[2:])
            for field in groups
        ]
        fitted = [detector.fit_bank(key, bank, *fields, **FIT) for fields in (groups, spread)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *fitted)

    @pytest.mark.slow
    def test_a_bank_may_have_more_than_ten_layers(self):
        features, key = tuple(range(3, 15)), jax.random.key(0)
        bank = detector.init_bank(key, num_classes=2, grid=(2, 2), features=features)
        maps = np.random.default_rng(0).uniform(size=(3, 2, 2)).astype(np.float32)
        expected = detector.MLP(features=features).apply(detector.detector_for(bank, 1), maps)
        actual = detector.score(bank, maps, np.ones(3, int))
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    def test_learns_to_tell_dark_maps(self):
        counts = [(60, 60), (60, 60)]
        bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(4, 4))
        bank = detector.fit_bank(jax.random.key(1), bank, *toy_groups(counts), **FIT)
        fresh = toy_maps(counts, seed=1)
        scores = detector.score(bank, fresh.maps, fresh.predicted)
        self.assertGreater(np.mean((scores > 0) == fresh.is_adversarial), 0.95)

    @pytest.mark.slow
    def test_convolutions_come_before_the_linear_layers(self):
        """A map is then an image of several channels, and the bank still K detectors."""
        widths = dict(features=(6,), convolutions=(5, 7))
        bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(3, 4, 2), **widths)
        sizes = [(9 * 2 + 1) * 5, (9 * 5 + 1) * 7, (3 * 4 * 7 + 1) * 6, 7]
        self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(bank)), 2 * sum(sizes))
        maps = np.random.default_rng(0).normal(size=(4, 3, 4, 2)).astype(np.float32)
        predicted = np.array([0, 1, 1, 0])
        expected = [
            detector.MLP(**widths).apply(detector.detector_for(bank, k), maps[m : m + 1])[0]
            for m, k in enumerate(predicted)
        ]
        np.testing.assert_allclose(detector.score(bank, maps, predicted), expected, atol=1e-6)

    @pytest.mark.slow
    def test_standardized_cells_have_no_units(self):
        """Any scale and offset of a cell, fitted and judged alike, leave every score."""
        rng, key = np.random.default_rng(0), jax.random.key(0)
        scale, offset = rng.uniform(0.01, 9, (4, 4)), rng.normal(size=(4, 4))
        maps, kinds, weight = toy_groups([(30, 10), (8, 50), (20, 0)], balance='weights')
        fresh = toy_maps([(5, 5)] * 3, seed=1)

        def scores(change, standardize):
            bank = detector.init_bank(key, num_classes=3, grid=(4, 4), standardize=standardize)
            bank = detector.fit_bank(key, bank, change(maps), kinds, weight, **FIT)
            # Without maps to fit by there is nothing to standardize by either.
            judged = fresh.select(fresh.predicted < 2)
            return bank, detector.score(bank, change(judged.maps), judged.predicted)

        bank, plain = scores(lambda x: x, True)
        _, changed = scores(lambda x: (x * scale + offset).astype(np.float32), True)
        # Adam turns a rounding of its inputs into some thousandths.
        np.testing.assert_allclose(changed, plain, rtol=0.02)
        with self.assertRaises(AssertionError):
            _, changed = scores(lambda x: (x * scale + offset).astype(np.float32), False)
            np.testing.assert_allclose(changed, plain, rtol=0.02)
        cells = bank['cells']
        for k in range(2):
            real = weight[k] > 0
            mean = np.average(maps[k, real], axis=0, weights=weight[k, real])
            np.testing.assert_allclose(cells['mean'][k], mean, atol=1e-5)
        np.testing.assert_array_equal(cells['mean'][2], 0)
        np.testing.assert_array_equal(cells['deviation'][2], 1)

    @pytest.mark.slow
    def test_a_cell_that_never_changes_does_no_harm(self):
        maps, kinds, weight = toy_groups([(20, 20), (20, 20)])
        maps[..., 0, 0] = 0
        bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(4, 4), standardize=True)
        bank = detector.fit_bank(jax.random.key(0), bank, maps, kinds, weight, **FIT)
        scores = detector.score(bank, maps[1], np.ones(40, int))
        self.assertGreater(np.mean((scores > 0) == kinds[1]), 0.9)

    def test_score_asks_the_detector_of_the_predicted_class(self):
        bank = detector.init_bank(jax.random.key(0), num_classes=3, grid=(2, 5))
        maps = np.random.default_rng(0).uniform(size=(7, 2, 5)).astype(np.float32)
        predicted = np.array([0, 2, 1, 1, 0, 2, 2])
        expected = [
            detector.MLP().apply(detector.detector_for(bank, k), maps[m : m + 1])[0]
            for m, k in enumerate(predicted)
        ]
        np.testing.assert_allclose(detector.score(bank, maps, predicted), expected, atol=1e-6)

    def test_refuses_shapes_that_do_not_belong_together(self):
        bank = detector.init_bank(jax.random.key(0), num_classes=3, grid=(4, 4))
        maps, is_adversarial, weight = toy_groups([(30, 10), (8, 50), (20, 20)])
        with self.assertRaisesRegex(ValueError, 'Expected is_adversarial of shape'):
            detector.fit_bank(jax.random.key(0), bank, maps, is_adversarial[:2], weight)
        with self.assertRaisesRegex(ValueError, 'Expected weight of shape'):
            detector.fit_bank(jax.random.key(0), bank, maps, is_adversarial, weight[:, :3])


class GroupsTest(parameterized.TestCase):
    def test_refuses_an_unknown_balance(self):
        with self.assertRaisesRegex(ValueError, "Expected balance to be one of .*'undersampled'"):
            toy_groups([(3, 3)], 'undersampled')

    @parameterized.parameters(
        (dict(predicted=[0, 0, 2, 1]), 'predicted classes from 0 to 1'),
        (dict(predicted=[0, 0, 1]), '4 integer predicted classes'),
        (dict(is_adversarial=[-1, 1, -1, 1]), 'or 0 or 1, got -1 to 1'),
    )
    def test_refuses_maps_that_no_detector_would_see(self, changed, message):
        rest = dict(predicted=[0, 0, 1, 1], is_adversarial=[0, 1, 0, 1]) | changed
        rest = {name: np.array(values) for name, values in rest.items()}
        settings = dict(num_classes=2, balance='none', rng=np.random.default_rng(0))
        with self.assertRaisesRegex(ValueError, message):
            detector.group_by_class(MAPS[0, :4], **rest, **settings)

    COUNTS = ((30, 10), (8, 50), (20, 0))

    @parameterized.parameters('undersample', 'weights', 'none')
    def test_holds_the_maps_of_each_class(self, balance):
        maps, groups = toy_maps(self.COUNTS), toy_groups(self.COUNTS, balance)
        for k in range(3):
            real = groups.weight[k] > 0
            self.assertTrue(np.all(real[: real.sum()]), 'padding stands at the end')
            own = maps.maps[maps.predicted == k]
            for heatmap in groups.maps[k, real]:
                self.assertTrue((own == heatmap).all((1, 2)).any())

    @parameterized.parameters(
        ('undersample', ((10, 10), (8, 8), (0, 0))),
        ('weights', ((30, 10), (8, 50), (0, 0))),
        ('none', ((30, 10), (8, 50), (0, 0))),
    )
    def test_counts_and_weights(self, balance, expected):
        groups = toy_groups(self.COUNTS, balance)
        for k, counts in enumerate(expected):
            real = groups.weight[k] > 0
            kinds = groups.is_adversarial[k, real]
            self.assertEqual((np.sum(~kinds), np.sum(kinds)), counts)
            sums = [groups.weight[k, real][kinds == kind].sum() for kind in (False, True)]
            self.assertAlmostEqual(sum(sums), sum(counts), places=3)
            if balance != 'none':
                self.assertAlmostEqual(sums[0], sums[1], places=3)


MAPS = np.random.default_rng(0).uniform(size=(2, 6, 2, 2)).astype(np.float32)
KINDS, WEIGHTS = np.tile([0, 1], (2, 3)).astype(bool), np.ones((2, 6), np.float32)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(is_adversarial=2 * KINDS - 1.0), 'False or True, or 0 or 1, got -1.0 to 1.0'),
        (dict(is_adversarial=KINDS + 1), 'got 1 to 2'),
        (dict(weight=-WEIGHTS), 'weights of 0 and more, got negative'),
        (dict(weight=np.where(KINDS, np.nan, WEIGHTS)), 'weights of 0 and more'),
        (dict(maps=np.where(MAPS < 0.5, np.nan, MAPS)), 'maps of numbers, got NaN'),
    ],
)
def test_what_is_no_label_weight_or_map_is_refused(changed, message):
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    arguments = dict(maps=MAPS, is_adversarial=KINDS, weight=WEIGHTS) | changed
    with pytest.raises(ValueError, match=message):
        detector.fit_bank(jax.random.key(1), bank, **arguments, steps=1)


def test_labels_of_numbers_are_those_of_booleans():
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    fits = [
        detector.fit_bank(jax.random.key(1), bank, MAPS, KINDS.astype(kind), WEIGHTS, steps=3)
        for kind in (bool, int, np.float32)
    ]
    for fit in fits[1:]:
        jax.tree.map(np.testing.assert_array_equal, fit, fits[0])


def test_maps_of_integers_keep_the_weights():
    maps = (MAPS > 0.5).astype(int)
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    fits = [
        detector.fit_bank(jax.random.key(1), bank, x, KINDS, 0.6 * WEIGHTS, steps=3)
        for x in (maps, maps.astype(np.float32))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *fits)
    assert not np.allclose(*(jax.tree.leaves(tree)[-1] for tree in (bank, fits[0])))


def test_a_class_that_is_found_out_late_to_have_no_detector_scores_nan():
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    scores = jax.jit(detector.score)(bank, MAPS[0, [0, 0, 0, 0]], np.array([-1, 0, 1, 2]))
    np.testing.assert_array_equal(np.isnan(scores), [True, False, False, True])


@pytest.mark.parametrize('predicted', [[0, 2], [-1, 0], [0.0, 1.0], [0]])
def test_a_class_without_a_detector_is_refused(predicted):
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    with pytest.raises(ValueError, match='predicted classes'):
        detector.score(bank, MAPS[0, :2], np.array(predicted))


def test_no_maps_have_no_scores():
    bank = detector.init_bank(jax.random.key(0), num_classes=2, grid=(2, 2), features=(3,))
    assert detector.score(bank, MAPS[0, :0], np.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize(('classes', 'maps'), [(300, 200), (40, 200)])
def test_memory_does_not_grow_with_classes_times_maps(classes, maps):
    def temporaries(classes):
        bank = jax.eval_shape(
            lambda: detector.init_bank(jax.random.key(0), num_classes=classes, grid=(4, 4))
        )
        shapes = bank, jnp.zeros((maps, 4, 4)), jnp.zeros(maps, int)
        planned = jax.jit(detector.score).lower(*shapes).compile().memory_analysis()
        return planned.temp_size_in_bytes

    assert temporaries(2 * classes) < 1.1 * temporaries(classes)
    # What the widest layer makes of all maps, or the weights copied for some.
    assert temporaries(classes) < 8 * max(maps * 256, 64 * 113_409) * 4
