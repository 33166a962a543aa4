"""What a stage runs with: the experiment, its images, the devices, and a voice.

Dimensions: B batch.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from occjax import config as config_lib
from occjax import data, incremental, networks, occlusion, streams, vgg
from occjax import engine as engine_lib
from occjax.config import Config
from occjax.experiment import hosts, memory, storage
from occjax.progress import Progress, counted
from occjax.streams import Stream
from occjax.types import Dataset, UsageError


class Mapping(NamedTuple):
    """How heatmaps are computed: by which engine, and how many windows and images at once."""

    engine: str
    chunk_size: int
    batch_size: int
    estimated_bytes: int  # of one device, an upper bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast an experiment runs, and in how much memory; None leaves the choice to the run."""

    engine: str = 'auto'
    chunk_size: int | None = None  # the most windows at once
    eval_batch_size: int | None = None  # images at once, outside of training
    memory_limit: int | None = None  # bytes, for heatmaps
    profile_dir: str | None = None  # where a step of each kind is profiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment: what (`config`), where (`workdir`), from which images, and how fast."""

    config: Config
    workdir: pathlib.Path
    data_dir: str | None = None
    cache_dir: str | None = None
    speed: Speed = Speed()

    @functools.cached_property
    def trained(self) -> networks.Trained | None:
        """The classifier that is trained already; None where we train a VGG."""
        source = self.config.classifier.source
        return None if source == 'vgg' else networks.load(source, self.config)

    @property
    def network(self) -> networks.Network:
        """The classifier's function."""
        trained = self.trained
        return trained.network if trained else networks.of_plan(self.layers['plan'])

    @property
    def network_name(self) -> str:
        """What the classifier is called."""
        wanted = self.config.classifier
        return wanted.source if self.trained else wanted.plan

    @property
    def layers(self) -> dict[str, Any]:
        """What is to be known of the layers of our VGG, beside the classes, see `vgg.init`."""
        wanted = self.config.classifier
        widths = dict(hidden=wanted.hidden, levels=wanted.thermometer)
        return dict(image_size=self.image_shape[0], plan=vgg.PLANS[wanted.plan], **widths)

    @property
    def variable_shapes(self) -> Any:
        """The classifier's weights, or their shapes; no image is read for them."""
        if self.trained:
            return self.trained.variables
        layers = self.layers | dict(num_classes=len(self.description['class_names']))
        return jax.eval_shape(lambda: vgg.init(jax.random.key(0), **layers))

    @property
    def batch_size(self) -> int:
        """How many images the classifier takes at once outside of training, 128 of 32×32 pixels."""
        wanted = self.speed.eval_batch_size or max(8, 2**17 // self.config.data.image_size**2)
        return math.ceil(wanted / jax.local_device_count()) * jax.local_device_count()

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The images, read once, and the same ones for as long as the work directory lives."""
        wanted = self.config.data
        dataset = data.load(
            wanted.name,
            image_size=wanted.image_size,
            data_dir=self.data_dir,
            cache_dir=self.cache_dir,
            resplit_per_class=wanted.resplit_per_class,
            seed=self.config.seed,
            train_images=wanted.train_images or None,
            test_images=wanted.test_images or None,
        )
        if self.trained:
            dataset = _as_known(dataset, self.trained, self.config)
        path = self.workdir / 'dataset.json'
        description = {
            'name': dataset.name,
            'fingerprint': data.fingerprint(dataset),
            'class_names': list(dataset.class_names),
            'train_images': len(dataset.train),
            'test_images': len(dataset.test),
        }
        if not path.exists():
            storage.write_record(path, description)
        elif self.description != description:
            raise UsageError(
                f'{self.workdir} was made from other images than --data_dir={self.data_dir} now '
                'holds: repeat the --data_dir it had, or choose another --workdir, or, to lose '
                'what is there, delete that one.'
            )
        return dataset

    @property
    def description(self) -> dict:
        """What `dataset` was when it was first read, for stages that need no images."""
        found = storage.read_record(self.workdir / 'dataset.json', mode='train')
        return {name: value for name, value in found.items() if name != 'digest'}

    def origin(self, stage: str) -> storage.Origin:
        """Returns what a stage is made from: the images, and what it reads of the config.

        So a classifier fits every attack, and may be copied, with `dataset.json`, to where another
        one is tried.
        """
        return {
            'config': config_lib.digest(self.config, stage),
            'dataset': self.description['fingerprint'],
        }

    def with_occlusion(self, occlusion: config_lib.Occlusion) -> 'Run':
        """Returns the same run with other windows, and what it has read."""
        return self.changed(config=dataclasses.replace(self.config, occlusion=occlusion))

    def changed(self, **fields: Any) -> 'Run':
        """Returns the same run with other fields, and what it has read."""
        other = dataclasses.replace(self, **fields)
        read = {name: vars(self)[name] for name in ('dataset', 'trained') if name in vars(self)}
        vars(other).update(read)
        return other

    @property
    def map_batch_size(self) -> int:
        """How many images are mapped at once; few, as each is many forward passes."""
        per_device = math.ceil(self.batch_size / 4 / jax.local_device_count())
        return per_device * jax.local_device_count()

    @property
    def shard_size(self) -> int:
        """Source images a stored shard, 512 of 32×32 pixels; no flag may change it in mid-run."""
        return max(32, 2**19 // self.config.data.image_size**2)

    @property
    def image_shape(self) -> tuple[int, int]:
        """The shape `(H, W)` of the images."""
        return (self.config.data.image_size,) * 2

    @property
    def geometry(self) -> dict[str, Any]:
        """Where the windows are: size, stride and grid."""
        wanted = self.config.occlusion
        return dict(size=wanted.size, stride=wanted.stride, grid=wanted.grid)

    @property
    def knobs(self) -> dict[str, Any]:
        """What makes maps approximate; empty where they are exact."""
        wanted = self.config.occlusion
        exact = not wanted.is_approximate
        return {} if exact else dict(threshold=wanted.threshold, every=wanted.every)

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of a heatmap."""
        return occlusion.grid_shape(self.image_shape, **self.geometry)

    def planned(self, variables: Any, **knobs: float) -> incremental.Plan:
        """Returns what windows change of the classifier, see `incremental.planned`.

        Args:
            variables: of the classifier, or their shapes.
            **knobs: that make maps approximate.
        """
        leaves, tree = jax.tree.flatten(variables)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        settings = tuple((self.geometry | knobs).items())
        return _planned(self.network, (*self.image_shape, 3), tree, shapes, settings)

    def mapping(self, variables: Any, engine: str | None = None) -> Mapping:
        """Returns the engine, the chosen or the given one, and how much of it memory allows.

        Args:
            variables: of the classifier, or their shapes.
            engine: None for the one that flags and config ask for.

        Raises:
            UsageError: if the memory limit is too small for one window, or the engine makes other
                maps than the config asks for.
        """
        if engine is None and self.knobs and self.speed.engine not in ('auto', 'approximate'):
            raise UsageError(
                f'--engine={self.speed.engine} makes exact maps, but config.occlusion has '
                f'{self.knobs}: leave --engine=auto, or set both to 1 in another --workdir.'
            )
        if engine is None and self.speed.engine == 'approximate' and not self.knobs:
            raise UsageError(
                '--engine=approximate changes results, so its setting belongs to the config: add '
                '--config.occlusion.threshold=0.5, or --config.occlusion.every=2, in another '
                '--workdir.'
            )
        wanted = 'approximate' if self.knobs else self.speed.engine
        plan = self.planned(variables)
        count = self.map_batch_size // jax.local_device_count()
        engine = engine or engine_lib.choose(wanted, plan, count)
        needs = memory.needs(engine, plan, variables)
        images, windows = needs.fit(
            self.speed.memory_limit or memory.available(),
            images=count,
            windows=self.speed.chunk_size or occlusion.default_chunk((*self.image_shape, 3)),
            devices=memory.sharers(),
        )
        estimate = needs.total(images, windows)
        return Mapping(engine, windows, images * jax.local_device_count(), estimate)

    def provenance(self, engine: str, **knobs: float) -> dict[str, Any]:
        """Returns how an engine computes heatmaps here and now: what may move their last bits."""
        return {
            'engine': engine,
            **knobs,
            'dtype': 'float32',
            'precision': jax.config.jax_default_matmul_precision or 'default',
            'device': jax.devices()[0].device_kind,
            'devices': jax.local_device_count(),
            'jax': jax.__version__,
        }

    def profiled(self, name: str, fn: Callable) -> Callable:
        """Returns the same function, of which the second call is profiled if that is asked for.

        The first one compiles. `<profile_dir>/<name>/**/perfetto_trace.json.gz` opens in Perfetto
        (https://ui.perfetto.dev).
        """
        folder = pathlib.Path(self.speed.profile_dir or '', name)
        if self.speed.profile_dir is None or folder.exists():
            return fn
        calls = itertools.count()

        def watched(*args, **kwargs):
            if next(calls) != 1:
                return fn(*args, **kwargs)
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                return jax.block_until_ready(fn(*args, **kwargs))

        return watched

    def log(self, **values: Any):
        """Adds a line to `metrics.jsonl`, by which a run of hours can be watched and plotted."""
        if not hosts.is_first():
            return
        with open(self.workdir / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps({'time': round(time.time(), 1)} | values) + '\n')

    def rng(self, stream: Stream, *index: int) -> np.random.Generator:
        """Returns `streams.rng` of the config's seed."""
        return streams.rng(self.config.seed, stream, *index)

    def key(self, stream: Stream, *index: int) -> jax.Array:
        """Returns `streams.key` of the config's seed."""
        return streams.key(self.config.seed, stream, *index)


@functools.lru_cache(maxsize=16)
def _planned(network, image_shape, tree, shapes, settings):
    variables = jax.tree.unflatten(tree, shapes)
    return incremental.planned(network.fn, image_shape, variables, **dict(settings))


def _as_known(dataset, trained, config):
    """Returns a dataset whose labels are the classes of a trained classifier, by their names."""
    source, size = config.classifier.source, config.data.image_size
    if trained.image_size not in (None, size):
        raise UsageError(
            f'config.data.image_size is {size}, but {source} takes images of '
            f'{trained.image_size}: add --config.data.image_size={trained.image_size}.'
        )
    names = trained.class_names or dataset.class_names
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    count = jax.eval_shape(trained.network.fn, trained.variables, image).shape[-1]
    if count != len(names):
        raise UsageError(
            f'{source} has {counted(count, "class")}, but the names of {len(names)}: '
            'its own function returns them, and beside weights of torchvision a .txt file has one '
            'a line.'
        )
    unknown = sorted(set(dataset.class_names) - set(names))
    if unknown:
        raise UsageError(
            f'The class {unknown[0]!r} of the images is none of {source}, whose first are '
            f'{", ".join(names[:3])}: give both the same names.'
        )
    to = np.array([names.index(name) for name in dataset.class_names], np.int32)
    train, test = (
        dataclasses.replace(split, labels=to[split.labels])
        for split in (dataset.train, dataset.test)
    )
    return dataset._replace(class_names=tuple(names), train=train, test=test)


def parts(
    run: Run,
    what: str,
    wanted: Sequence[tuple[pathlib.Path, int, Callable[[], dict]]],
    *,
    mode: str,
    made_from: storage.Origin,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the parts of a long computation, each from its file or made anew and stored there.

    Several hosts make their shares first, see `make_parts`.

    Args:
        run: the experiment, which keeps a line of every part that is made.
        what: is counted, in words.
        wanted: the file of each part, how much it counts, and what returns its arrays.
        mode, made_from: see `storage.cached`.
    """
    if jax.process_count() > 1:
        make_parts(run, what, wanted, mode=mode, made_from=made_from)
    yield from _parts(run, what, wanted, mode, made_from)


def make_parts(run: Run, what: str, wanted: Sequence, *, mode: str, made_from: storage.Origin):
    """Makes those parts of a long computation that are missing, each host its share of them.

    It returns when all are there; the arguments are those of `parts`.
    """
    for _ in _parts(run, what, hosts.share(wanted), mode, made_from):
        pass  # Each is on the disk; together they may be more than fits into memory.
    hosts.wait('parts')


def _parts(run, what, wanted, mode, made_from):
    """Does what `parts` says on this host."""
    missing = {path: count for path, count, _ in wanted if not path.exists()}
    progress = Progress(sum(missing.values()), what)
    for path, count, make_fn in wanted:
        began = time.monotonic()
        found = storage.cached(path, make_fn, mode=mode, made_from=made_from)
        if path in missing:
            progress(count)
            name, seconds = str(path.relative_to(run.workdir)), time.monotonic() - began
            run.log(stage=mode, part=name, count=count, seconds=seconds)
        yield found
