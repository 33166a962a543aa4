"""What more devices would do, read from compiled programs; nothing is run.

    python launch.py --config=configs/imagenette.py --mode=benchmark --benchmark_scaling
        --jax_platforms=cpu --jax_num_cpu_devices=256

A step of training and a batch of heatmaps are compiled for 1, 8, 64 … of the devices there are,
with as many images for each, in the forms that accelerators take: whatever compiles them divides
them as XLA does everywhere. If a device's work and what it exchanges stay the same, throughput
grows as the number of devices does, as long as links and disks keep up.
"""

import math

import jax

from occjax.benchmark import compilers
from occjax.benchmark.peer import Timing
from occjax.experiment import storage
from occjax.experiment.run import Run
from occjax.progress import say
from occjax.types import UsageError

_RATE = 1000  # images a second that a device takes, for the table: a step's own needs a device.
# Not the CPU's forms of wide convolutions, which loop over images, so that XLA gathers them first.
_FORMS = 'tpu'
_PROGRAMS = {'step': 'training step', 'maps': 'maps, full'}  # which compile in seconds


def benchmark(run: Run, timing: Timing) -> str:
    """Compiles for ever more devices, writes `scaling.json`, and returns a table.

    Raises:
        UsageError: if the classifier is trained already.
    """
    if run.trained:
        raise UsageError(f'{run.network_name} is trained already: there is no step to compile.')
    variables = compilers.variable_shapes(run)
    every = jax.devices()
    counts = sorted({len(every)} | {8**n for n in range(9) if 8**n < len(every)})
    rows = []
    for count in counts:
        say(f'scaling: compiling for {count} of {len(every)} devices')
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((count,), ('data',), axis_types=axis_types, devices=every[:count])
        makers = compilers.Programs(run, variables, mesh, timing.images).makers()
        programs = {short: makers[name]().compiled(_FORMS) for short, name in _PROGRAMS.items()}
        row = {'devices': count, 'images': count * timing.images}
        for name, program in programs.items():
            row[name] = {
                'flops': program.cost_analysis()['flops'],
                'collectives': compilers.collectives(program.as_text()),
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
