"""Laws of what detectors see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occjax import names
from occjax.methods import METHODS
from tests.detector_test import toy_maps

MAPS = toy_maps([(3, 2), (4, 5)], grid=(3, 4))
VIEWS = np.random.default_rng(1).normal(size=(len(MAPS), 5, 2)).astype(np.float32)
SPECTRUM = np.random.default_rng(2).uniform(size=(len(MAPS), 9)).astype(np.float16)
NEAR = np.random.default_rng(7).uniform(size=(len(MAPS), 4)).astype(np.float32)
TWIN = np.random.default_rng(8).normal(size=(len(MAPS), 2)).astype(np.float32)
MAPS = dataclasses.replace(MAPS, views=VIEWS, spectrum=SPECTRUM, neighbours=NEAR, twin=TWIN)
MANY = toy_maps([(2, 1)] * 7, grid=(3, 4), seed=3)
MANY = dataclasses.replace(
    MANY,
    views=np.random.default_rng(4).normal(size=(len(MANY), 5, 7)).astype(np.float32),
    spectrum=np.random.default_rng(5).uniform(size=(len(MANY), 9)).astype(np.float16),
    neighbours=np.random.default_rng(9).uniform(size=(len(MANY), 4)).astype(np.float32),
    twin=np.random.default_rng(10).normal(size=(len(MANY), 7)).astype(np.float32),
)
SETS = {'all classes': MAPS, 'two of seven': MANY.condensed(2)}
of_each_set = pytest.mark.parametrize('maps', SETS.values(), ids=SETS)


def test_every_name_is_a_method_in_its_order():
    assert tuple(METHODS) == (*names.METHODS, *names.VIEWING, *names.RIVALS)


@of_each_set
@pytest.mark.parametrize('name', METHODS)
def test_an_input_is_its_own_map_s_alone(name, maps):
    """No map changes what a network sees of another, except by the order of shuffled cells."""
    inputs = METHODS[name].inputs_fn(maps)
    assert len(inputs) == len(maps)
    assert np.isfinite(inputs).all()
    if name != 'shuffled_cells':
        alone = METHODS[name].inputs_fn(maps.select(slice(2, 3)))
        np.testing.assert_allclose(alone[0], inputs[2], rtol=1e-6)


@of_each_set
@pytest.mark.parametrize('name', METHODS)
def test_of_no_maps_there_are_no_inputs_of_the_same_shape(name, maps):
    """A class that nothing is predicted as has none."""
    some, none = (METHODS[name].inputs_fn(maps.select(slice(0, n))) for n in (2, 0))
    assert none.shape == (0, *some.shape[1:])


@pytest.mark.parametrize('name', METHODS)
def test_of_condensed_maps_methods_see_ranks_and_no_classes(name):
    """Other names for the classes change no input; and who judges are all of them still."""
    order = np.random.default_rng(6).permutation(7)
    fields = {
        field: getattr(MANY, field)[..., order]
        for field in ('logits', 'unoccluded', 'views', 'twin')
    }
    few, renamed = (m.condensed(3) for m in (MANY, dataclasses.replace(MANY, **fields)))
    method = METHODS[name]
    seen = method.inputs_fn(few)
    np.testing.assert_allclose(method.inputs_fn(renamed), seen, rtol=1e-5, atol=1e-6)
    assert method.num_networks(few) == method.num_networks(MANY)
    np.testing.assert_array_equal(method.predicted(few), method.predicted(MANY))


@pytest.mark.parametrize('name', METHODS)
def test_condensing_to_all_classes_changes_no_input(name):
    for top_classes in (0, 6, 7, 100):
        seen = METHODS[name].inputs_fn(MANY.condensed(top_classes))
        np.testing.assert_array_equal(seen, METHODS[name].inputs_fn(MANY))


@pytest.mark.parametrize('name', ['detector', 'relative_map', 'shuffled_cells', 'log_map'])
def test_what_sees_the_map_alone_sees_the_same_of_condensed_ones(name):
    seen = METHODS[name].inputs_fn(MANY.condensed(1))
    np.testing.assert_allclose(seen, METHODS[name].inputs_fn(MANY), rtol=1e-4, atol=1e-6)


def test_the_paper_s_detector_sees_the_map():
    np.testing.assert_array_equal(METHODS['detector'].inputs_fn(MAPS), MAPS.maps)
    np.testing.assert_array_equal(METHODS['detector'].predicted(MAPS), MAPS.predicted)
    assert METHODS['detector'].num_networks(MAPS) == 2
    assert METHODS['detector'].features == (256, 256, 128, 64, 32)


def test_relative_maps_are_one_where_the_window_changes_nothing():
    same = np.broadcast_to(MAPS.unoccluded[:, None, None], MAPS.logits.shape)
    unchanged = type(MAPS)(**vars(MAPS) | {'logits': same})
    np.testing.assert_allclose(METHODS['relative_map'].inputs_fn(unchanged), 1, rtol=1e-5)


def test_shuffling_keeps_the_cells_and_loses_the_layout():
    shuffled, cells = METHODS['shuffled_cells'].inputs_fn(MAPS), MAPS.maps.reshape(len(MAPS), -1)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(cells, axis=1))
    orders = [np.argsort(np.argsort(row)) for row in shuffled]
    plain = [np.argsort(np.argsort(row)) for row in cells]
    # Not one permutation for all: that would be a layout as well.
    places = {tuple(np.argsort(a)[b]) for a, b in zip(orders, plain, strict=True)}
    assert len(places) > len(MAPS) // 2


def test_all_logits_hold_the_unoccluded_ones_too():
    inputs = 4 * METHODS['all_logits'].inputs_fn(MAPS)
    assert inputs.shape == (len(MAPS), 3 * 4 * 2 + 2)
    np.testing.assert_allclose(inputs[:, -2:], MAPS.unoccluded, rtol=1e-6)
    np.testing.assert_allclose(inputs[:, :2], MAPS.logits[:, 0, 0], rtol=1e-6)
    assert not METHODS['all_logits'].predicted(MAPS).any()


def test_logit_differences_are_zero_where_the_window_changes_nothing():
    inputs = METHODS['logit_differences'].inputs_fn(MAPS)
    assert inputs.shape == (len(MAPS), 3 * 4 * 2 + 2)
    np.testing.assert_allclose(inputs[:, -2:], MAPS.unoccluded, rtol=1e-6)
    changes = inputs[:, :-2].reshape(MAPS.logits.shape)
    np.testing.assert_allclose(changes + MAPS.unoccluded[:, None, None], MAPS.logits, atol=1e-5)
    assert METHODS['logit_differences'].standardize


def test_views_are_seen_as_what_they_change_and_what_they_leave_of_the_class():
    alone = METHODS['views_alone'].inputs_fn(MAPS)
    left, logarithm, changes, own = np.split(alone, [5, 10, 10 + 5 * 2], axis=1)
    for m, k in enumerate(MAPS.predicted):
        p = np.exp(VIEWS[m]) / np.exp(VIEWS[m]).sum(-1, keepdims=True)
        np.testing.assert_allclose(left[m], p[:, k], atol=1e-6)
        np.testing.assert_allclose(logarithm[m], np.log(p[:, k]), atol=1e-5)
    np.testing.assert_allclose(changes.reshape(VIEWS.shape) + own[:, None], VIEWS, atol=1e-5)
    np.testing.assert_array_equal(own, MAPS.unoccluded)
    windows = METHODS['logit_differences'].inputs_fn(MAPS)[:, :-2]
    left = [MAPS.cells, np.log(MAPS.cells), left, logarithm]
    expected = np.concatenate([*left, windows, changes, own], axis=1)
    np.testing.assert_allclose(METHODS['all_views'].inputs_fn(MAPS), expected, atol=1e-5)
    few, many = (METHODS['views_alone'].inputs_fn(m)[:, :10] for m in (MANY.condensed(1), MANY))
    np.testing.assert_allclose(few, many, atol=1e-5)


def test_a_class_that_a_view_makes_impossible_keeps_a_gradient():
    """An attacker who follows it is not stopped by what float32 rounds to 0."""
    maps = dataclasses.replace(MAPS, views=100 * VIEWS)

    def logarithm(views):
        fields = vars(maps) | {'views': views}
        fields = {k: jnp.asarray(v) for k, v in fields.items() if v is not None}
        return METHODS['views_alone'].inputs_fn(type(maps)(**fields))[:, 5:10].sum()

    impossible = METHODS['views_alone'].inputs_fn(maps)[:, 5:10] < -104  # e^-104 is 0
    assert impossible.any()
    slopes = np.asarray(jax.grad(logarithm)(jnp.asarray(maps.views)))
    assert (np.abs(slopes).max(-1)[impossible] > 0.99).all()


def test_logit_maps_keep_the_windows_places():
    inputs = 4 * METHODS['conv_logits'].inputs_fn(MAPS)
    assert inputs.shape == (len(MAPS), 3, 4, 2 * 2)
    np.testing.assert_allclose(inputs[..., :2], MAPS.logits, rtol=1e-6)
    np.testing.assert_allclose(inputs[:, 2, 1, 2:], MAPS.unoccluded, rtol=1e-6)


@of_each_set
@pytest.mark.parametrize('name', [name for name in METHODS if name != 'shuffled_cells'])
def test_jax_and_numpy_see_the_same(name, maps):
    """The attacker's gradients go through the very functions that the tables are made with."""
    on_device = type(maps)(**{k: jnp.asarray(v) for k, v in vars(maps).items() if v is not None})
    inputs = METHODS[name].inputs_fn(on_device)
    assert isinstance(inputs, jax.Array)
    np.testing.assert_allclose(inputs, METHODS[name].inputs_fn(maps), rtol=1e-5, atol=1e-6)
