"""Laws of an epoch, whatever takes its steps."""

import types

import jax
import numpy as np

from occjax import classifier
from occjax.types import Batch


def batches(count, told):
    for i in range(count):
        told.append(f'read {i}')
        yield Batch(np.full((2 + i, 1, 1, 3), i), np.zeros(2 + i), np.arange(2 + i), None)


def fit(told, count=3):
    """Returns what an epoch of made-up steps gives; `told` is what happened, in order."""

    class Told(float):
        def __float__(self):
            told.append(f'waited for {int(self)}')
            return float.__float__(self)

    def step_fn(state, images, labels, **_):
        i = int(images[0, 0, 0, 0])
        told.append(f'sent {i}')
        return state, {'loss': Told(i), 'accuracy': 1.0}

    return classifier.fit_epoch(
        types.SimpleNamespace(step=0, variables=None),
        batches(count, told),
        key=jax.random.key(0),
        schedule=lambda step: 0.1,
        dropout_rate=0.0,
        plan=(),
        step_fn=step_fn,
        on_batch=lambda size: told.append(f'told {size}'),
    )


def test_the_next_batch_is_read_and_sent_before_a_step_is_waited_for():
    told = []
    fit(told)
    for i in range(2):
        assert told.index(f'sent {i + 1}') < told.index(f'waited for {i}')
        assert told.index(f'read {i + 1}') < told.index(f'waited for {i}')
    assert told.index('waited for 0') < told.index('read 2')  # One ahead, and no more.


def test_every_step_counts_once_by_its_images():
    told = []
    _, values = fit(told)
    assert values == {'loss': (0 * 2 + 1 * 3 + 2 * 4) / 9, 'accuracy': 1.0}
    assert [line for line in told if line.startswith('told')] == ['told 2', 'told 3', 'told 4']


def test_hosts_divide_an_evaluation_and_add_what_they_count():
    def batch(labels):
        labels = np.array(labels)
        return Batch(labels, labels, labels, labels >= 0)

    def ones(labels):
        return np.ones_like(labels)

    other = np.array([2, 5])  # right and all of another host
    shares = dict(total_fn=lambda counts: np.array(counts) + other)
    assert classifier.evaluate(ones, [batch([1, 0, -1])], **shares) == (1 + 2) / (2 + 5)
