"""What the compilers of devices that are not here say of our programs; nothing is run.

    pip install -e '.[tpu-compiler]'
    python launch.py --config=configs/imagenette.py --mode=benchmark --benchmark_target=tpu:v5e:2x2

    pip install -e '.[gpu-compiler]'
    python launch.py --config=configs/imagenette.py --mode=benchmark --benchmark_target=gpu:h100

A TPU's compiler writes its own estimate of cycles beside every operation. Their sum, loops times
their trips, predicts how long a program takes: it is a model and no measurement, good enough to
tell which of two forms is faster and where the time goes. A GPU's compiler tells memory and
kernels, no time. Images are divided among all chips of the topology.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, classifier, detector, methods, occlusion, verdict, vgg
from occjax.benchmark.peer import Timing
from occjax.experiment import shard, storage
from occjax.experiment.run import Run
from occjax.progress import say
from occjax.report import benchmark as benchmark_report
from occjax.types import UsageError

NUM_CLASSES = 10  # of an untrained classifier
PGD_STEPS = 10
BANK_MAPS = 256  # that each detector of a bank is fitted on

# Products of bfloat16 numbers a second, from Google's data sheets, and a cycle, of a device's
# matrix units: their ratio is the clock.
_TPUS = {
    'TPU v4': (275e12 / 2, 4 * 2 * 128**2),  # a core, of which a chip has two
    'TPU v5 lite': (197e12, 4 * 2 * 128**2),
    'TPU v5': (459e12, 8 * 2 * 128**2),
    'TPU v6 lite': (918e12, 4 * 2 * 256**2),
}
# What XLA asks of a card, from NVIDIA's data sheet and CUDA's table of compute capabilities.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPUS = {'h100': _H100}


class Target(NamedTuple):
    """Devices that a compiler knows."""

    platform: str  # that programs are lowered for: 'tpu' or 'cuda'
    mesh: jax.sharding.Mesh
    kind: str  # as JAX calls the device
    options: dict[str, Any]  # of the compiler


def target(name: str) -> Target:
    """Returns the devices of `tpu:<topology>`, such as `tpu:v5e:2x2`, or of `gpu:h100`.

    Raises:
        UsageError: if there is no such target, or its compiler is not installed.
    """
    platform, _, topology = name.partition(':')
    if platform not in ('tpu', 'gpu') or platform == 'gpu' and topology not in _GPUS:
        raise UsageError(
            f'--benchmark_target={name}: expected tpu:<topology>, such as tpu:v5e:2x2, or one of '
            f'{", ".join(f"gpu:{card}" for card in _GPUS)}.'
        )
    # Else libtpu asks a server for the machine that it is on, for minutes; and CUDA for a driver.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    from jax.experimental import topologies

    settings, options = {'platform': 'tpu', 'topology_name': topology}, {}
    if platform == 'gpu':
        settings = {'platform': 'cuda', 'topology': '1x1x1', 'target_config': _GPUS[topology]}
        options = {'xla_gpu_autotune_level': 0}  # There is no card to try kernels on.
    try:
        devices = topologies.get_topology_desc(**settings).devices
    except Exception as error:  # Of a plugin, which raises as it likes.
        raise UsageError(
            f'--benchmark_target={name}: no compiler for it: pip install -e '
            f"'.[{platform}-compiler]', or name another one ({' '.join(str(error).split()):.200})."
        ) from None
    mesh = jax.make_mesh(
        (len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    return Target(settings['platform'], mesh, devices[0].device_kind, options)


class Program(NamedTuple):
    """A traced program, and how much it does on each device."""

    traced: Any
    count: float
    unit: str

    def compiled(self, platform: str, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """Returns the program as a platform's compiler makes it."""
        return self.traced.lower(lowering_platforms=(platform,)).compile(options)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of an experiment, on a mesh whose one axis, `data`, divides images."""

    run: Run
    variables: Any  # of the classifier, or their shapes
    mesh: jax.sharding.Mesh
    images: int  # on each device

    def makers(self) -> dict[str, Callable[[], Program]]:
        """Returns what traces each program, by its name."""
        trains = {} if self.run.trained else {'training step': self.step}
        return trains | {
            'FGSM': lambda: self.of_images(self.fgsm, self.weights, self.pixels, self.labels),
            f'PGD, {PGD_STEPS} steps': lambda: self.of_images(
                self.pgd, self.weights, self.pixels, self.labels
            ),
            'maps, full': lambda: self.maps('full'),
            'maps, incremental': lambda: self.maps('incremental'),
            'verdict': lambda: self.of_images(self.judge, (self.weights, self.bank), self.pixels),
            'fit of a bank': self.fit,
        }

    def array(self, shape, dtype=np.float32, axis: str | None = None) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array, whole on each device or divided along an axis."""
        sharding = jax.NamedSharding(self.mesh, jax.P(axis) if axis else jax.P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def like(self, tree: Any) -> Any:
        """Returns the shapes of a tree of arrays, whole on each device."""
        return jax.tree.map(lambda leaf: self.array(leaf.shape, leaf.dtype), tree)

    @property
    def weights(self) -> Any:
        """The shapes of the classifier's weights."""
        return self.like(self.variables)

    @property
    def pixels(self) -> jax.ShapeDtypeStruct:
        """The shape of the images."""
        shape = (self.mesh.size * self.images, *self.run.image_shape, 3)
        return self.array(shape, axis='data')

    @property
    def labels(self) -> jax.ShapeDtypeStruct:
        """The shape of their labels."""
        return self.array(self.pixels.shape[:1], np.int32, 'data')

    @property
    def bank(self) -> Any:
        """The shapes of a bank of the paper's detectors, one per class."""
        logits = jax.eval_shape(self.run.network.fn, self.weights, self.pixels)
        new_fn = functools.partial(
            detector.init_bank, num_classes=logits.shape[-1], grid=self.run.grid
        )
        return self.like(jax.eval_shape(new_fn, jax.random.key(0)))

    @property
    def windows(self) -> dict[str, Any]:
        """Where the windows are, and how many are computed at once."""
        chunk = occlusion.default_chunk(self.pixels.shape[1:])
        return self.run.geometry | dict(chunk_size=self.run.speed.chunk_size or chunk)

    def of_images(self, fn: Callable, tree: Any, *arguments: Any) -> Program:
        """Traces a function of each device's own images, which exchanges nothing."""
        specs = (jax.P(), *(jax.P('data') for _ in arguments))
        divide = dict(in_specs=specs, out_specs=jax.P('data'), check_vma=False)
        mapped = jax.jit(jax.shard_map(fn, mesh=self.mesh, **divide))
        return Program(mapped.trace(tree, *arguments), self.images, 'images')

    def fgsm(self, variables, images, labels):
        """Returns images after one step."""
        logits_fn, epsilon = self.run.network.classifier(variables), self.run.config.attack.epsilon
        return attack.fgsm(logits_fn, images, labels, epsilon=epsilon)

    def pgd(self, variables, images, labels):
        """Returns images after `PGD_STEPS`."""
        settings = dict(epsilon=self.run.config.attack.epsilon, steps=PGD_STEPS)
        logits_fn = self.run.network.classifier(variables)
        return attack.pgd(logits_fn, images, labels, key=jax.random.key(0), **settings)

    def judge(self, tree, images):
        """Returns the scores of the paper's detector."""
        variables, bank = tree
        logits_fn = functools.partial(self.run.network.fn, variables)
        method = methods.METHODS['detector']
        maps = verdict.observe(logits_fn, images, method=method, **self.windows)
        return detector.score(bank, method.inputs_fn(maps), method.predicted(maps))

    def maps(self, engine: str) -> Program:
        """Traces the heat maps of a batch."""
        settings = dict(mesh=self.mesh, network=self.run.network, engine=engine, **self.windows)
        traced = shard.map_batch.trace(self.weights, self.pixels, self.array((1,)), **settings)
        return Program(traced, self.images * math.prod(self.run.grid), 'windows')

    def step(self) -> Program:
        """Traces a step of training."""
        settings = self.run.config.classifier
        traced = classifier.train_step.trace(
            self.like(jax.eval_shape(classifier.init_state, self.variables)),
            self.pixels,
            self.labels,
            key=jax.random.key(0),
            learning_rate=jnp.float32(settings.learning_rate),
            dropout_rate=settings.dropout_rate,
            label_smoothing=settings.label_smoothing,
            plan=self.run.layers['plan'],
        )
        return Program(traced, self.images, 'images')

    def fit(self) -> Program:
        """Traces the fit of a bank, each detector on `BANK_MAPS` maps."""
        bank, settings = self.bank, self.run.config.detector
        lead = (len(jax.tree.leaves(bank)[0]), BANK_MAPS)
        hyperparameters = dict(steps=settings.steps, batch_size=settings.batch_size)
        fit_fn = jax.jit(functools.partial(detector.fit_bank, **hyperparameters))
        arrays = self.array((*lead, *self.run.grid)), self.array(lead, bool), self.array(lead)
        return Program(fit_fn.trace(jax.random.key(0), bank, *arrays), settings.steps, 'steps')


def benchmark(run: Run, timing: Timing) -> str:
    """Compiles every program, writes `benchmark_<target>.json`, and returns a table.

    `--engine` names the one whose maps are compiled; 'auto' means both.

    Raises:
        UsageError: see `target`.
    """
    chosen = target(timing.target)
    variables = variable_shapes(run)
    makers = Programs(run, variables, chosen.mesh, timing.images).makers()
    rows = {}
    for name, make in makers.items():
        if name.startswith('maps, ') and run.speed.engine not in ('auto', name[6:]):
            continue
        say(f'benchmark: compiling {name} for {chosen.mesh.size} x {chosen.kind}')
        began = time.monotonic()
        with occlusion.compiling_for(chosen.platform):
            program = make()
        compiled = program.compiled(chosen.platform, chosen.options)
        rows[name] = read(compiled, program, chosen) | {'seconds': time.monotonic() - began}
    versions = {name: _version(name) for name in ('jax', 'libtpu', 'jax-cuda13-plugin')}
    result = {
        'target': timing.target,
        'device': chosen.kind,
        'devices': chosen.mesh.size,
        'versions': {name: version for name, version in versions.items() if version},
        'network': run.network_name,
        'image_size': run.config.data.image_size,
        **{name: getattr(run.config.occlusion, name) for name in ('size', 'stride', 'grid')},
        'images_per_device': timing.images,
        'precision': run.config.precision,
        'programs': rows,
    }
    path = run.workdir / f'benchmark_{timing.target.replace(":", "-")}.json'
    storage.write_json(path, result)
    return benchmark_report.compiled_table(result) + f'\nWritten: {path}\n'


def variable_shapes(run: Run) -> Any:
    """Returns the shapes of the classifier's weights; an untrained one has `NUM_CLASSES`."""
    if run.trained:
        return run.trained.variables
    layers = dict(num_classes=NUM_CLASSES, **run.layers)
    return jax.eval_shape(lambda: vgg.init(jax.random.key(0), **layers))


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(compiled: jax.stages.Compiled, program: Program, chosen: Target) -> dict[str, Any]:
    """Returns what a compiled program tells of itself."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    row = {
        'count': program.count,
        'unit': program.unit,
        'temporary_bytes': memory.temp_size_in_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
        'collectives': collectives(text),
    }
    if chosen.platform != 'tpu':
        kernels = collections.Counter(re.findall(r'kernel_name|custom_call_target="([^"]*)"', text))
        return row | {
            'loops': len(re.findall(r'\bwhile\(', text)),
            'fusions': len(re.findall(r' fusion\(', text)),
            'library_calls': {name: n for name, n in kernels.items() if name},
        }
    cycles = estimated_cycles(text)
    peak, products = _TPUS.get(chosen.kind, (None, None))
    total = sum(cycles.values())
    rate = program.count * peak / products / total if peak and total else None
    shares = {kind: count / total for kind, count in cycles.most_common(8)} if total else {}
    return row | {'cycles': total, 'per_second': rate, 'share_of_cycles': shares}


_KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
_LINE = re.compile(rf'^.* = (?P<shapes>.+?) (?P<kind>{_KINDS})(-start)?\(', re.MULTILINE)
_SHAPE = re.compile(r'\b(?:pred|bf16|[sufc]\d+)\[[\d,]*\]')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{')
_CALLED = re.compile(r'(?:to_apply|calls|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)')


def estimated_cycles(text: str) -> collections.Counter:
    """Returns the cycles that a TPU's compiler expects, by the name of what is computed.

    Loops count as often as they run, of branches the longest does.

    Args:
        text: of a program, from `compiled.as_text()`.
    """
    bodies, name, entry = {}, None, None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            bodies[name].append(line)

    @functools.cache
    def cycles(name):
        totals = collections.Counter()
        for line in bodies.get(name, ()):
            called = re.search(r' (while|call|conditional)\(', line)
            if called is None:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
                label = re.search(r'op_name="([^"]*)"', line)
                kind = label[1].split('/')[-1] if label else 'unnamed'
                totals[kind] += int(estimate[1]) if estimate else 0
            elif called[1] == 'while':
                body, times = re.search(r'body=%?([\w.\-]+)', line)[1], _trips(bodies, line)
                totals.update({kind: times * n for kind, n in cycles(body).items()})
            else:
                names = _CALLED.search(line)[1].replace('%', '').split(', ')
                totals.update(max(map(cycles, names), key=lambda each: sum(each.values())))
        return totals

    return +cycles(entry)


def _trips(bodies, line):
    """Returns how often a loop runs: the bound that its condition compares with, else once."""
    condition = bodies[re.search(r'condition=%?([\w.\-]+)', line)[1]]
    called = re.findall(r'calls=%?([\w.\-]+)', ''.join(condition))
    lines = ''.join([*condition, *(each for name in called for each in bodies.get(name, ()))])
    return max(map(int, re.findall(r's32\[\]\S* constant\((\d+)\)', lines)), default=1)


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
