"""Steps of training a second, and PyTorch's beside them.

A step is forward and backward through the VGG with batch statistics and dropout, and Adam, on one
batch that lies on the device already. Weights and images are random.
"""

import statistics
from collections.abc import Callable

import jax
import numpy as np

from occjax import classifier
from occjax.benchmark import peer
from occjax.benchmark.engines import NUM_CLASSES, random_variables, seconds_of
from occjax.benchmark.peer import Timing
from occjax.experiment import devices, storage
from occjax.experiment.run import Run
from occjax.progress import say
from occjax.streams import Stream
from occjax.types import UsageError


def benchmark(run: Run, timing: Timing) -> str:
    """Times steps, writes `benchmark_training.json`, and returns a table.

    The steps of both libraries alternate, so that what else the machine does hits both.

    Raises:
        UsageError: if a peer is asked for that is not installed.
    """
    peer.check(run, timing.peer)
    if run.trained:
        raise UsageError(f'{run.network_name} is trained already: there is no step to time.')
    settings, rng = run.config.classifier, run.rng(Stream.BENCHMARK)
    shape = (settings.batch_size, *run.image_shape, 3)
    images = rng.uniform(size=shape).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, settings.batch_size)
    variables = random_variables(run)
    steps = {}
    if timing.peer:
        hyperparameters = dict(rate=settings.learning_rate, dropout_rate=settings.dropout_rate)
        steps['PyTorch'] = peer.training_step(run, variables, images, labels, **hyperparameters)
    steps = {'occjax': _step(run, variables, images, labels)} | steps
    compile_seconds = {name: seconds_of(step) for name, step in steps.items()}  # The warm-up.
    seconds = {name: [] for name in steps}
    for repeat in range(timing.repeats):
        say(f'benchmark: step {repeat + 1} of {timing.repeats}')
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    result = {
        'device': jax.devices()[0].device_kind,
        'devices': jax.local_device_count(),
        'plan': settings.plan,
        'image_size': run.config.data.image_size,
        'batch_size': settings.batch_size,
        'steps': {
            name: {
                'seconds': values,
                'seconds_median': statistics.median(values),
                'images_per_second': settings.batch_size / statistics.median(values),
                'first_step_seconds': compile_seconds[name],
            }
            for name, values in seconds.items()
        },
    }
    path = run.workdir / 'benchmark_training.json'
    storage.write_json(path, result)
    return table(result) + f'\nWritten: {path}\n'


def table(result: dict) -> str:
    """Returns what `benchmark_training.json` holds as lines for a person."""
    lines = [
        '{plan}, batches of {batch_size} images of {image_size}x{image_size}, '
        '{devices} x {device}, float32'.format(**result),
        '',
        f'{"":10}images/s  seconds a step, median (least to most)  first step s',
    ]
    for name, row in result['steps'].items():
        spread = '{:.3f} ({:.3f} to {:.3f})'.format(
            row['seconds_median'], min(row['seconds']), max(row['seconds'])
        )
        rate, first = row['images_per_second'], row['first_step_seconds']
        lines.append(f'{name:10}{rate:<8.1f}  {spread:39} {first:.1f}')
    return '\n'.join(lines) + '\n'


def _step(run, variables, images, labels) -> Callable[[], None]:
    """Returns a function that takes one more step, and waits for it."""
    settings = run.config.classifier
    state = devices.replicate(classifier.init_state(variables))
    images, labels = devices.divide(images), devices.divide(labels)

    def step():
        nonlocal state
        state, _ = classifier.train_step(
            state,
            images,
            labels,
            key=jax.random.key(0),
            learning_rate=settings.learning_rate,
            dropout_rate=settings.dropout_rate,
            plan=run.layers['plan'],
        )
        jax.block_until_ready(state)

    return step
