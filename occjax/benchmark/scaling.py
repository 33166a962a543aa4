"""What more devices would do, read from compiled programs; nothing is run.

    python launch.py --config=configs/imagenette.py --mode=benchmark --benchmark_scaling
        --jax_platforms=cpu --jax_num_cpu_devices=256

A step of training and a batch of heatmaps are compiled for 1, 8, 64 … of the devices there are,
with as many images for each, in the forms that accelerators take: whatever compiles them divides
them as XLA does everywhere. If a device's work and what it exchanges stay the same, throughput
grows as the number of devices does, as long as links and disks keep up.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from occjax import classifier, vgg
from occjax.benchmark.engines import NUM_CLASSES
from occjax.benchmark.peer import Timing
from occjax.experiment import shard, storage
from occjax.experiment.run import Run
from occjax.progress import say
from occjax.types import UsageError

_RATE = 1000  # images a second that a device takes, for the table: a step's own needs a device.
# Not the CPU's forms of wide convolutions, which loop over images, so that XLA gathers them first.
_FORMS = ('tpu',)
_KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
_LINE = re.compile(rf'^.* = (?P<shapes>.+?) (?P<kind>{_KINDS})(-start)?\(', re.MULTILINE)
_SHAPE = re.compile(r'\b(?:pred|bf16|[sufc]\d+)\[[\d,]*\]')


def collectives(program: str) -> dict[str, int]:
    """Returns how many bytes a device hands to each kind of collective of a compiled program.

    >>> collectives('%a = f32[2,3]{1,0} all-reduce(%b), replica_groups={}')
    {'all-reduce': 24}

    Args:
        program: from `compiled.as_text()`.
    """
    found = {}
    for line in _LINE.finditer(program):
        size = sum(map(_bytes, _SHAPE.findall(line['shapes'])))
        found[line['kind']] = found.get(line['kind'], 0) + size
    return found


def _bytes(shape):
    """Returns the bytes of an array such as `f32[2,3]`."""
    kind, sides = shape.rstrip(']').split('[')
    bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind)[0])
    return math.prod(int(side) for side in sides.split(',') if side) * bits // 8


def benchmark(run: Run, timing: Timing) -> str:
    """Compiles for ever more devices, writes `scaling.json`, and returns a table.

    Raises:
        UsageError: if the classifier is trained already.
    """
    if run.trained:
        raise UsageError(f'{run.network_name} is trained already: there is no step to compile.')
    layers = dict(num_classes=NUM_CLASSES, **run.layers)
    variables = jax.eval_shape(lambda: vgg.init(jax.random.key(0), **layers))
    every = jax.devices()
    counts = sorted({len(every)} | {8**n for n in range(9) if 8**n < len(every)})
    rows = []
    for count in counts:
        say(f'scaling: compiling for {count} of {len(every)} devices')
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((count,), ('data',), axis_types=axis_types, devices=every[:count])
        programs = {
            'step': compiled_step(run, variables, mesh, timing.images),
            'maps': compiled_maps(run, variables, mesh, timing.images),
        }
        row = {'devices': count, 'images': count * timing.images}
        for name, program in programs.items():
            row[name] = {
                'flops': program.cost_analysis()['flops'],
                'collectives': collectives(program.as_text()),
            }
        rows.append(row)
    result = {
        'plan': run.config.classifier.plan,
        'image_size': run.config.data.image_size,
        'images_per_device': timing.images,
        'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.params)),
        'rows': rows,
    }
    path = run.workdir / 'scaling.json'
    storage.write_json(path, result)
    return table(result) + f'\nWritten: {path}\n'


def compiled_step(run: Run, variables, mesh: jax.sharding.Mesh, images: int):
    """Returns the step of training on a mesh, with some images a device."""
    whole, divided = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P('data')))
    settings, batch = run.config.classifier, mesh.size * images
    shape = (batch, *run.image_shape, 3)
    state = jax.eval_shape(classifier.init_state, variables)
    traced = classifier.train_step.trace(
        jax.tree.map(lambda leaf: _like(leaf, whole), state),
        jax.ShapeDtypeStruct(shape, np.float32, sharding=divided),
        jax.ShapeDtypeStruct((batch,), np.int32),
        key=jax.random.key(0),
        learning_rate=jnp.float32(settings.learning_rate),
        dropout_rate=settings.dropout_rate,
        label_smoothing=settings.label_smoothing,
        plan=run.layers['plan'],
    )
    return traced.lower(lowering_platforms=_FORMS).compile()


def compiled_maps(run: Run, variables, mesh: jax.sharding.Mesh, images: int):
    """Returns the program that makes a batch of maps on a mesh, with some images a device."""
    whole, divided = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P('data')))
    shape = (mesh.size * images, *run.image_shape, 3)
    traced = shard.map_batch.trace(
        jax.tree.map(lambda leaf: _like(leaf, whole), variables),
        jax.ShapeDtypeStruct(shape, np.float32, sharding=divided),
        jax.ShapeDtypeStruct((1,), np.float32, sharding=whole),
        mesh=mesh,
        network=run.network,
        engine='full',  # Compiles in seconds.
        **run.geometry,
    )
    return traced.lower(lowering_platforms=_FORMS).compile()


def _like(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def table(result: dict) -> str:
    """Returns what `scaling.json` holds as lines for a person."""
    pixels = 3 * result['image_size'] ** 2
    cells = [
        (
            'devices',
            'images a step',
            'GFLOP a device',
            'MB reduced',
            'other MB',
            'MB over each link',
            f'GB/s of images at {_RATE}/s a device',
            'GFLOP a device, maps',
            'MB, maps',
        )
    ]
    for row in result['rows']:
        step, maps, count = row['step'], row['maps'], row['devices']
        reduced = step['collectives'].get('all-reduce', 0)
        others = sum(step['collectives'].values()) - reduced
        numbers = (
            step['flops'] / 1e9,
            reduced / 1e6,
            others / 1e6,
            2 * reduced * (count - 1) / count / 1e6,
            _RATE * count * pixels / 1e9,
            maps['flops'] / 1e9,
            sum(maps['collectives'].values()) / 1e6,
        )
        cells.append((str(count), str(row['images']), *(f'{number:.4g}' for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '{plan}, {image_size}x{image_size}, {parameters:,} parameters, {images_per_device} images '
        'a device and step'.format(**result),
        '',
        *('  '.join(map(str.rjust, row, widths)) for row in cells),
        '',
        'Read from compiled programs, none was run. GFLOP are those that XLA counts, a loop once; '
        'a ring sends twice what is reduced over each link; images are read as bytes.',
    ]
    return '\n'.join(lines) + '\n'
