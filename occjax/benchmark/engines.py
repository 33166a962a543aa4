"""Heat maps a second, and how far that is from what the device can do.

Every engine maps the same images with the same weights: the trained classifier and test images
of the work directory where there are any, else random ones. Compiling is timed apart, and a
warm-up is not timed. What an engine is compared with is `occlusion.occluded_logits` of
the classifier, the definition, on the first batch of images.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.
"""

import functools
import importlib.metadata
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import convolution, data, metrics, names, occlusion, vgg
from occjax import engine as engine_lib
from occjax.benchmark import peer
from occjax.benchmark.peer import Timing
from occjax.experiment import devices, shard, stages, storage
from occjax.experiment.run import Run
from occjax.progress import say
from occjax.report import benchmark as benchmark_report
from occjax.streams import Stream

NUM_CLASSES = 10  # of an untrained classifier


def benchmark(run: Run, timing: Timing) -> str:
    """Times the engines, writes `benchmark.json` and `benchmark.png`, and returns a table.

    `--engine` names the one to be timed; 'auto' means all of them.

    Raises:
        UsageError: if a peer is asked for that is not installed, or memory is too small.
    """
    wanted = run.speed.engine
    chosen = names.ENGINES if wanted == 'auto' else (wanted,)
    peer.check(run, timing.peer)
    _check_memory(run, chosen)
    variables, images, weights = _subject(run, timing.images)
    dtype = jnp.dtype(timing.dtype)
    types = ('float32', dtype.name) if jax.default_backend() == 'cpu' else ('float32', 'bfloat16')
    rates = {name: matrix_rate(name) for name in dict.fromkeys(types)}
    expected = plain_maps(run, variables, images)
    result = {
        'device': jax.devices()[0].device_kind,
        'backend': jax.default_backend(),
        'devices': jax.local_device_count(),
        'versions': {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')},
        'weights': weights,
        'network': run.network_name,
        'image_size': run.config.data.image_size,
        **{name: getattr(run.config.occlusion, name) for name in ('size', 'stride', 'grid')},
        'windows_per_map': math.prod(run.grid),
        'images': len(images),
        'repeats': timing.repeats,
        'dtype': dtype.name,
        'matrix_product_flops_per_second': rates,
        'forms': convolution.forms(run.planned(variables).program.operations),
        'engines': {},
    }
    for name in chosen:
        say(f'benchmark: {name}')
        knobs = {}
        if name == 'approximate':
            given = dict(threshold=timing.threshold, every=timing.every)
            knobs = run.knobs or given
        result['engines'][name] = measure(run, timing, name, variables, images, expected, **knobs)
        share = result['engines'][name]['flops_per_second'] / rates[dtype.name]
        # CPU devices are parts of one machine, which `matrix_rate` had to itself.
        share /= 1 if jax.default_backend() == 'cpu' else jax.local_device_count()
        result['engines'][name]['share_of_matrix_product_rate'] = share
    result['peak_memory_bytes'] = peak_memory()
    if timing.peer:
        say(f'benchmark: {timing.peer}')
        theirs = peer.measure(run, timing, variables, images)
        result['peer'] = theirs
        for ours in result['engines'].values():
            ours['times_peer'] = ours['windows_per_second'] / theirs['windows_per_second']
    storage.write_record(run.workdir / 'benchmark.json', result)
    storage.write_bytes(run.workdir / 'benchmark.png', benchmark_report.plot(result))
    return (
        benchmark_report.table(result)
        + f'\nWritten: {run.workdir / "benchmark.json"}, benchmark.png\n'
    )


def _check_memory(run, chosen):
    """Raises `UsageError` if there is too little for an engine, before anything is computed."""
    if run.trained:
        shapes = run.trained.variables
    else:
        shapes = jax.eval_shape(functools.partial(random_variables, run))
    for name in chosen:
        run.mapping(shapes, name)


def matrix_rate(dtype: str) -> float:
    """Returns the operations a second of one device's product of two square matrices."""
    # Large enough to keep the device busy for milliseconds at least.
    side = 2048 if jax.default_backend() == 'cpu' else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    while len(seconds) < 3 or sum(seconds) < 1:
        seconds.append(seconds_of(lambda: product(x, x).block_until_ready()))
    return 2 * side**3 / min(seconds)


def peak_memory() -> int:
    """Returns the most bytes so far: of the device where it tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use']
    status = pathlib.Path('/proc/self/status')
    if status.exists():  # The next best would count what the parent took when it started us.
        return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0])
    import resource  # Not on Windows.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def seconds_of(fn: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def _subject(run, count):
    """Returns variables, `[B, H, W, C]` images, and where they are from."""
    rng = run.rng(Stream.BENCHMARK)
    if (run.workdir / 'classifier' / 'metrics.json').exists():
        split = run.dataset.test
        return (
            stages.load_variables(run),
            data.take(split, np.arange(count) % len(split)),
            'trained',
        )
    images = rng.uniform(size=(count, *run.image_shape, 3)).astype(np.float32)
    if run.trained:
        return stages.load_trained(run), images, 'given'
    return devices.replicate(random_variables(run)), images, 'random'


def random_variables(run: Run) -> vgg.Variables:
    """Returns an untrained VGG, of `NUM_CLASSES`."""
    # Compiled as one, or each random number's way to its value would be kept in memory.
    init = functools.partial(
        vgg.init,
        num_classes=NUM_CLASSES,
        **run.layers,
    )
    return jax.jit(init)(run.key(Stream.CLASSIFIER_INIT))


def _maps(logits, unoccluded):
    """Returns the `[B, h, w]` probabilities of the classes predicted for the unoccluded images."""
    return np.asarray(occlusion.probabilities(logits, jnp.argmax(unoccluded, axis=-1)))


def plain_maps(run: Run, variables: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first images' `[B, K]` logits, and their `[B, h, w]` maps by definition."""
    mapping = run.mapping(variables, 'full')
    images = images[: mapping.batch_size // jax.local_device_count()]

    @jax.jit
    def plain(variables, images, fill):
        logits_fn = run.network.classifier(variables)
        settings = dict(fill=fill, chunk_size=mapping.chunk_size, **run.geometry)
        return logits_fn(images), occlusion.occluded_logits(logits_fn, images, **settings)

    unoccluded, logits = jax.device_get(plain(variables, images, shard.fill_of(run, variables)))
    return unoccluded, _maps(logits, unoccluded)


def measure(
    run: Run,
    timing: Timing,
    name: str,
    variables: Any,
    images: np.ndarray,
    expected: tuple[np.ndarray, np.ndarray],
    **knobs: float,
) -> dict:
    """Returns one engine's numbers.

    Args:
        run: the experiment.
        timing: how many repeats, in which number type.
        name: of the engine.
        variables: of the classifier.
        images: `[B, H, W, C]` in [0, 1].
        expected: `plain_maps` of them.
        **knobs: of the approximate engine.
    """
    mapping = run.mapping(variables, name)
    per_device = math.ceil(len(images) / jax.local_device_count())
    batch_size = min(mapping.batch_size, per_device * jax.local_device_count())
    cast, dtype = _cast(variables, timing.dtype), jnp.dtype(timing.dtype)
    fill = shard.fill_of(run, variables)
    settings = dict(mesh=devices.mesh(), network=run.network, engine=name)
    began = time.perf_counter()
    batch = devices.divide(images[np.arange(batch_size) % len(images)])
    settings |= dict(chunk_size=mapping.chunk_size, **run.geometry, **knobs)
    program = shard.map_batch.lower(cast, batch, fill, **settings)
    program = program.compile()
    compile_seconds = time.perf_counter() - began

    def compute(images):
        def map_fn(images):
            return program(cast, images, fill)

        return devices.in_batches(map_fn, images, batch_size=batch_size)

    unoccluded, maps = expected
    logits = compute(images[: len(maps)]).astype(np.float32)  # The warm-up.
    seconds = [seconds_of(lambda: compute(images)) for _ in range(timing.repeats)]
    windows = maps[0].size
    plan = run.planned(variables, **knobs)
    flops = engine_lib.flops_per_map(name, plan)
    ours, rates = _maps(logits, unoccluded), _rates(seconds, len(images), windows)
    return rates | {
        'compile_seconds': compile_seconds,
        'flops_per_map': flops,
        'flops_per_map_in_full': engine_lib.flops_per_map('full', plan),
        'flops_per_second': flops * rates['maps_per_second'],
        'chunk_size': mapping.chunk_size,
        'batch_size': batch_size,
        'estimated_bytes': mapping.estimated_bytes,
        'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
        'largest_difference': float(np.max(np.abs(ours - maps))),
        'ssim': float(np.mean(metrics.ssim(ours, maps))),
        'how': run.provenance(name, **knobs) | {'dtype': dtype.name},
        **knobs,
    }


def _rates(seconds, maps, windows):
    """Returns maps and windows a second, of several times that some maps took."""
    median = statistics.median(seconds)
    return {
        'maps_per_second': maps / median,
        'windows_per_second': maps * windows / median,
        'seconds': seconds,
        'seconds_median': median,
        'seconds_spread': [min(seconds), max(seconds)],
    }


def _cast(variables, dtype):
    """Returns variables in another type; pixels and their normalisation stay float32, for free."""
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    if isinstance(cast, vgg.Variables):
        cast = cast._replace(pixel_stats=variables.pixel_stats)
    return cast
