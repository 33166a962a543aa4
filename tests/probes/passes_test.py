"""Laws of the search for views."""

import dataclasses
import types

import numpy as np

from occjax import streams
from occjax.config import Detector
from occjax.probes import passes
from tests.detector_test import toy_maps


def make_run(views):
    """Returns what the search reads of a run."""
    detector = Detector(steps=60, batch_size=64, seeds=1, held_out_fit_fraction=0.9)
    config = types.SimpleNamespace(
        sweep=types.SimpleNamespace(views=views), detector=detector, seed=0
    )
    return types.SimpleNamespace(
        config=config,
        rng=lambda stream: streams.rng(0, stream),
        key=lambda stream: streams.key(0, stream),
    )


def test_the_view_that_tells_is_chosen_first_and_missed_most():
    """Of three views one moves with the attack, one with noise too, one says nothing."""
    rng = np.random.default_rng(0)
    clean = toy_maps([(150, 0), (150, 0)])
    clean = dataclasses.replace(clean, image_id=np.arange(300))

    def seen(attack, noise):
        """Returns maps of which the first view shows attacks, the second noise as well."""
        views = rng.normal(size=(300, 3, 2)) + clean.unoccluded[:, None]
        views[:, 1] += 2 * attack
        views[:, 0] += 1.5 * (attack or noise)
        return dataclasses.replace(
            clean, views=views.astype(np.float32), is_adversarial=np.full(300, attack)
        )

    sets = seen(False, False), {0.1: seen(True, False)}, {0.1: seen(False, True)}
    found = passes.search(make_run(('both', 'attack', 'nothing')), *sets)
    order = found['order']
    assert [row['view'] for row in order][:2] == [None, 'attack']
    assert [row['passes'] for row in order] == [1, 2, 3, 4]
    assert abs(order[0]['auroc'] - 0.5) < 0.15
    assert order[1]['auroc'] > 0.9
    assert min(found['without'], key=found['without'].get) == 'attack'
    assert found['without']['attack'] < 0.8 < found['without']['nothing']


def test_images_that_nothing_may_be_chosen_by_are_never_read():
    clean = toy_maps([(60, 0), (60, 0)])
    views = np.zeros((120, 2, 2), np.float32)
    clean = dataclasses.replace(clean, image_id=np.arange(120), views=views)
    attacked = dataclasses.replace(clean, is_adversarial=np.ones(120, bool))
    maps, epsilons, chooses = passes._fitting(make_run(('a', 'b')), clean, {0.1: attacked}, {})
    ids = set(maps.image_id)
    assert len(ids) == 108
    assert len(set(maps.image_id[chooses])) == 36
    assert not set(maps.image_id[chooses]) & set(maps.image_id[~chooses])
    assert set(epsilons[maps.is_adversarial]) == {0.1} and set(epsilons) == {0.0, 0.1}
