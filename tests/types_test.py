"""Laws of sets of maps, above all of those that keep the logits of a few classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occjax.types import HeatmapSet, condense


def make_maps(count, classes, *, views=0, seed=0):
    """Returns maps of any logits, some of them equal."""
    rng = np.random.default_rng(seed)
    shapes = {'logits': (count, 2, 3, classes), 'unoccluded': (count, classes)}
    shapes |= {'views': (count, views, classes)} if views else {}
    return HeatmapSet(
        **{n: np.round(rng.normal(0, 5, s), 1).astype(np.float32) for n, s in shapes.items()},
        label=rng.integers(0, classes, count),
        image_id=np.arange(count),
        is_adversarial=rng.random(count) < 0.5,
    )


def equal(ours, theirs):
    """Holds two sets to be the same in every field."""
    for field in dataclasses.fields(HeatmapSet):
        pair = [getattr(maps, field.name) for maps in (ours, theirs)]
        assert (pair[0] is None) == (pair[1] is None), field.name
        if pair[0] is not None:
            np.testing.assert_array_equal(*pair)


def softmax(logits):
    p = np.exp(logits.astype(np.float64))
    return p / p.sum(-1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
def test_condensing_keeps_the_probabilities_of_the_highest_classes(count, classes, top, seed):
    maps = make_maps(count, classes, views=2, seed=seed)
    few = maps.condensed(top)
    saves = 0 < top < classes - 1
    assert few.top_classes == saves * top
    assert few.logits.shape == (count, 2, 3, top + 1 if saves else classes)
    assert few.views.shape == (count, 2, few.logits.shape[-1])
    assert few.logits.dtype == maps.logits.dtype
    np.testing.assert_array_equal(few.predicted, maps.predicted)
    np.testing.assert_array_equal(few.max_probability, maps.max_probability)
    np.testing.assert_allclose(few.maps, maps.maps, rtol=1e-5, atol=1e-7)
    if not saves:
        equal(few, maps)
        return
    for condensed, whole in ((few.logits, maps.logits), (few.views, maps.views)):
        for m, ranked in enumerate(few.ranked):
            expected = softmax(whole[m])[..., ranked]
            np.testing.assert_allclose(softmax(condensed[m])[..., :top], expected, rtol=1e-4)
    # The highest logit first, of equal ones the class that comes first.
    for row, ranked in zip(maps.unoccluded, few.ranked, strict=True):
        assert sorted(range(classes), key=lambda k: (-row[k], k))[:top] == ranked.tolist()
    np.testing.assert_allclose(softmax(few.columns)[:, 0], maps.max_probability, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 6))
def test_condensing_commutes_with_choosing_and_joining(counts, top):
    sets = [make_maps(count, 6, views=1, seed=i) for i, count in enumerate(counts)]
    together = HeatmapSet.concatenate(sets)
    equal(HeatmapSet.concatenate([s.condensed(top) for s in sets]), together.condensed(top))
    chosen = np.random.default_rng(0).random(len(together)) < 0.5
    equal(together.select(chosen).condensed(top), together.condensed(top).select(chosen))


def test_condensed_maps_are_not_condensed_again():
    maps = make_maps(3, 6).condensed(2)
    with pytest.raises(ValueError, match='logits of 6 classes, got 3 columns'):
        maps.condensed(1)


def test_far_logits_neither_overflow_nor_vanish():
    logits = np.array([[[500.0, -500, -501, -502]]], np.float32)
    (found,) = condense(logits, logits[:, 0], 1)[0]
    np.testing.assert_allclose(found, [500, -500 + np.log(1 + np.exp(-1) + np.exp(-2))], rtol=1e-6)


def test_gradients_go_through_condensed_maps():
    """An attacker's: of the map, through all classes, as without."""
    maps = make_maps(4, 7)

    def cells(logits, top):
        here = dataclasses.replace(maps, logits=logits, unoccluded=jnp.asarray(maps.unoccluded))
        return (here.condensed(top).maps ** 2).sum()

    whole, few = (jax.jit(jax.grad(cells), static_argnums=1)(maps.logits, top) for top in (0, 2))
    assert np.abs(whole).max() > 0
    np.testing.assert_allclose(few, whole, rtol=1e-3, atol=1e-6)
