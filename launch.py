"""Runs the paper, or a part of it: `python launch.py --config=configs/cifar10.py --mode=all`.

The config (`--config`, and `--config.attack.epsilon=0.05` to change one number of it) is all that
changes results; the other flags say where and how fast. README lists modes and flags.

JAX's own flags work too. --jax_compilation_cache_dir=<folder> keeps compiled programs for the next
run: those that took a second to compile, or fewer with
--jax_persistent_cache_min_compile_time_secs=0. Several hosts may share that folder.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Callable

try:
    import fcntl  # noqa: F401
except ImportError:
    print(
        'launch.py: it runs on Linux and macOS; elsewhere `import occjax` works.', file=sys.stderr
    )
    sys.exit(2)
try:
    import jax
except ValueError as unreadable:  # JAX reads its environment before anyone can ask it to.
    print(f'launch.py: {str(unreadable)!r}: mend it, or leave it out.', file=sys.stderr)
    sys.exit(2)
from absl import app, flags, logging
from ml_collections import config_flags

from occjax import names
from occjax.config import Config, to_json
from occjax.progress import printable, printable_lines, tell_end
from occjax.types import UsageError

DEFAULT_CONFIG = pathlib.Path(__file__).parent / 'configs' / 'digits.py'
# What of JAX's own changes results, with the value that every experiment is run at.
JAX_SETTINGS = {
    'jax_enable_x64': False,
    'jax_default_prng_impl': 'threefry2x32',
    'jax_threefry_partitionable': True,
    'jax_random_seed_offset': 0,
}


class ConfigFile(flags.ArgumentParser):
    """Reads `<file>` or `<file>:<argument of get_config>`, and tells what is wrong with it."""

    def parse(self, argument):
        """Returns the `Config`; raises `ValueError` if there is none, whatever the file does."""
        path, *rest = argument.split(':', 1)
        path = expanded(path)
        shipped = DEFAULT_CONFIG.parent / f'{path}.py'
        path = str(shipped) if not os.path.exists(path) and shipped.is_file() else path
        try:
            namespace = {'__name__': 'config', '__file__': path}
            exec(compile(pathlib.Path(path).read_bytes(), path, 'exec'), namespace)
            if 'get_config' not in namespace:
                raise ValueError('there is no get_config() in it')
            config = namespace['get_config'](*rest)
        except (Exception, SystemExit) as error:  # A config is a program: it can end in any way.
            raise ValueError(f'{type(error).__name__}: {error}') from None
        if not isinstance(config, Config):
            raise ValueError(f'get_config() returns {config!r:.99}, no Config of occjax.config.')
        return config

    def flag_type(self):
        """Returns what help texts call it."""
        return 'config file'


def expanded(path: str) -> str:
    """Returns a path without `~`; raises `ValueError` where nobody is at home."""
    result = os.path.expanduser(path)
    if result.startswith('~'):
        raise ValueError(f'there is no home directory for {path}: write the whole path')
    return result


class PathParser(flags.ArgumentParser):
    """Reads a path, in which `~` is the home directory, as a shell does where it stands first."""

    def parse(self, argument):
        """Returns the path, or None."""
        if argument == '':
            raise ValueError('it names no path: name one, or leave the flag out')
        return argument and expanded(argument)

    def flag_type(self):
        """Returns what help texts call it."""
        return 'path'


def define_path(name: str, text: str) -> flags.FlagHolder:
    """Defines a flag that takes a path."""
    return flags.DEFINE(PathParser(), name, None, text)


class Lenient(flags.ArgumentParser):
    """Leaves to `Config.validate` what another parser refuses; `None` is None."""

    def __init__(self, parser):
        self.parser = parser

    def parse(self, argument):
        """Returns what the other parser does, None, or the argument as it is."""
        try:
            return self.parser.parse(argument)
        except (TypeError, ValueError):
            return None if str(argument).lower() == 'none' else argument

    def flag_type(self):
        """Returns what help texts call it."""
        return self.parser.flag_type()


for kind, parser in (
    (bool, flags.BooleanParser()),
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
):
    config_flags.register_flag_parser_for_type(kind, Lenient(parser))
_MODE = flags.DEFINE_enum('mode', 'all', names.MODES, 'Which stage to run.')
_WORKDIR = define_path('workdir', 'Where results go; default runs/<config name>.')
_DATA_DIR = define_path(
    'data_dir', 'A TFDS directory, or a folder of images as <split>/<class>/<file>.'
)
_CACHE_DIR = define_path('cache_dir', 'Where decoded images are kept; default ~/.cache/occjax.')
_CHUNK_SIZE = flags.DEFINE_integer(
    'chunk_size',
    None,
    'Most windows computed at once; default: by device, size and memory.',
    1,
    2**20,
)
_EVAL_BATCH_SIZE = flags.DEFINE_integer(
    'eval_batch_size',
    None,
    'Images evaluated or attacked at once; default: by image size.',
    1,
    2**16,
)
_ENGINE = flags.DEFINE_enum(
    'engine',
    'auto',
    ('auto', *names.ENGINES),
    'How heatmaps are computed; auto takes incremental where that is less work. Benchmarking '
    'takes auto for all.',
)
_MEMORY_LIMIT = flags.DEFINE_string(
    'memory_limit',
    None,
    'What heatmaps may take: on CPU of memory in all, else on each device, such as 4GiB; default: '
    'half of the memory, or what JAX may use of a device.',
)
_PROFILE_DIR = define_path(
    'profile_dir',
    'Where a step of training and a batch of heatmaps are profiled, for https://ui.perfetto.dev.',
)
_IMAGES = define_path('images', 'What --mode=detect judges: an image file, or a folder of them.')
_FPR = flags.DEFINE_float(
    'fpr', 0.05, 'Share of clean, correctly classified images that may be flagged.', 0.0, 1.0
)
flags.register_validator('fpr', lambda share: share <= 1, 'no number')  # NaN.
_DETECTORS = flags.DEFINE_list(
    'detectors',
    None,
    "Whom --mode=detect asks, such as detector,magnet_divergence; default: the paper's, the best "
    'of the run, and those of a sweep.',
)
_OUTPUT = define_path(
    'output',
    'Where --mode=detect puts verdicts.csv and detect.html; default: in the work directory.',
)
_BENCHMARK_IMAGES = flags.DEFINE_integer('benchmark_images', 4, 'Images that are timed.', 1, 1000)
_BENCHMARK_REPEATS = flags.DEFINE_integer(
    'benchmark_repeats', 5, 'How often they are timed.', 1, 1000
)
_BENCHMARK_PEER = flags.DEFINE_enum(
    'benchmark_peer', None, names.PEERS, 'Another library to time: pip install torch captum.'
)
_BENCHMARK_TRAINING = flags.DEFINE_bool(
    'benchmark_training', False, 'Time steps of training, and not heat maps.'
)
_BENCHMARK_SCALING = flags.DEFINE_bool(
    'benchmark_scaling',
    False,
    'Time nothing: read from compiled programs what all devices would do and exchange, with '
    '--benchmark_images each. --jax_platforms=cpu --jax_num_cpu_devices=256 makes up some.',
)
_BENCHMARK_TARGET = flags.DEFINE_string(
    'benchmark_target',
    None,
    'Time nothing: ask the compiler of devices that are not here, tpu:<topology>, such as '
    'tpu:v5e:2x2, or gpu:h100.',
)
_BENCHMARK_DTYPE = flags.DEFINE_enum(
    'benchmark_dtype', 'float32', ['float32', 'bfloat16'], 'Type of the weights that are timed.'
)
_BENCHMARK_THRESHOLD = flags.DEFINE_float(
    'benchmark_threshold',
    0.4,
    "The approximate engine's: share of a side that is recomputed.",
    0.01,
    1.0,
)
flags.register_validator('benchmark_threshold', lambda share: share <= 1, 'no number')  # NaN.
_BENCHMARK_EVERY = flags.DEFINE_integer(
    'benchmark_every',
    2,
    "The approximate engine's: cells a side for one that is computed.",
    1,
    4096,
)
_FIDELITY_THRESHOLDS = flags.DEFINE_list(
    'fidelity_thresholds',
    ['0.5', '0.4', '0.3'],
    'What --mode=fidelity compares with exact maps, each with every window and with every second.',
)


_MULTIHOST = flags.DEFINE_bool(
    'multihost', False, 'Several hosts, which JAX finds: a TPU slice, Slurm, Open MPI, Kubernetes.'
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    'coordinator_address', None, 'Several hosts without a scheduler: <host>:<port> of the first.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many hosts there are.', 1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
_HOST_TIMEOUT = flags.DEFINE_integer(
    'host_timeout', 100, 'Seconds after which a host without a sign of life counts as gone.', 5
)
# Modes to which every host adds; others are the first host's.
_SHARED = ('train', 'heatmaps', 'sweep', 'adaptive', 'detect', 'fidelity')


def main(_):
    """Checks what is asked for, joins other hosts, and does it."""
    from occjax.experiment import hosts, memory, storage
    from occjax.report import canvas

    config = chosen_config()
    config.validate()
    check_size(config)
    limit = memory.parse(_MEMORY_LIMIT.value) if _MEMORY_LIMIT.value is not None else None
    shares = thresholds()
    check_settings()
    check_mode()
    if _BENCHMARK_TARGET.value and not jax.config.jax_platforms:
        jax.config.update('jax_platforms', 'cpu')  # A compiler's package would seek its device.
    hosts.start(
        detected=_MULTIHOST.value,
        address=_COORDINATOR_ADDRESS.value,
        count=_NUM_PROCESSES.value,
        index=_PROCESS_ID.value,
        timeout=_HOST_TIMEOUT.value,
    )
    check_devices()
    hosts.connect()
    jax.config.update('jax_default_matmul_precision', config.precision)
    asked = [to_json(config), _MODE.value, _IMAGES.value, _FPR.value, shares]
    hosts.check_same(zlib.crc32(json.dumps(asked).encode()) // 2, 'configs', need='flags')
    with contextlib.suppress(ImportError):  # Of Matplotlib, which only pictures need.
        canvas.own_settings()
    with storage.locked(workdir()):  # Before anything is written.
        hosts.quietly(lambda: run_modes(config, limit, shares))
    hosts.end()


def workdir() -> pathlib.Path:
    """Returns where results go."""
    path, *argument = config_flags.get_config_filename(flags.FLAGS['config']).split(':', 1)
    usual = pathlib.Path('runs', '-'.join([pathlib.Path(path).stem, *argument]))
    return pathlib.Path(_WORKDIR.value) if _WORKDIR.value else usual


def chosen_config() -> Config:
    """Returns the config that the command names, or that of the finished run it looks at."""
    from occjax.experiment import storage

    config, flag = flags.FLAGS.config, flags.FLAGS['config']
    if _MODE.value in (*names.STAGES[:-1], 'all'):
        return config
    is_chosen = config_flags.get_config_filename(flag) != str(DEFAULT_CONFIG)
    overrides = config_flags.get_override_values(flag)
    return storage.adopt(workdir(), config, overrides, is_chosen=is_chosen)


def run_modes(config, limit, shares):
    """Opens the work directory and runs the stages that the mode names."""
    from occjax.experiment import hosts, storage
    from occjax.experiment.run import Run, Speed

    with hosts.first():
        opened = storage.open_workdir(workdir(), config)
    run = Run(
        config=config,
        workdir=opened,
        data_dir=_DATA_DIR.value,
        cache_dir=_CACHE_DIR.value,
        speed=Speed(
            engine=_ENGINE.value,
            chunk_size=_CHUNK_SIZE.value,
            eval_batch_size=_EVAL_BATCH_SIZE.value,
            memory_limit=limit,
            profile_dir=_PROFILE_DIR.value,
        ),
    )
    # Seconds of import, which no mistake of the above has to wait for.
    from occjax.benchmark import fidelity
    from occjax.benchmark.peer import Timing
    from occjax.experiment import stages
    from occjax.probes import detection, evasion, sweep

    timing = Timing(
        images=_BENCHMARK_IMAGES.value,
        repeats=_BENCHMARK_REPEATS.value,
        peer=_BENCHMARK_PEER.value,
        dtype=_BENCHMARK_DTYPE.value,
        threshold=_BENCHMARK_THRESHOLD.value,
        every=_BENCHMARK_EVERY.value,
        target=_BENCHMARK_TARGET.value,
    )
    modes = stages.STAGES | {
        'detect': lambda run: detection.detect(
            run,
            _IMAGES.value,
            fpr=_FPR.value,
            output=_OUTPUT.value,
            detectors=_DETECTORS.value,
        ),
        'benchmark': lambda run: benchmark_module().benchmark(run, timing),
        'fidelity': lambda run: fidelity.fidelity(run, timing, shares),
        'sweep': sweep.sweep,
        'adaptive': evasion.evade,
    }
    wanted = names.STAGES if _MODE.value == 'all' else [_MODE.value]
    if jax.process_count() > 1 and set(wanted) & set(_SHARED) - {'detect'}:
        with hosts.first():
            _ = run.dataset  # Decoded once, and cached for all.
    for mode in wanted:
        if mode in _SHARED or hosts.is_first():
            tables = modes[mode](run)
            if tables:
                print(printable_lines(tables))
            if mode == 'report':
                print(printable(f'Report: {run.workdir / "report" / "report.html"}'))
        hosts.wait(mode)


def benchmark_module():
    """Returns what does the benchmark that flags ask for."""
    from occjax.benchmark import compilers, engines, scaling, training

    if _BENCHMARK_TARGET.value:
        return compilers
    if _BENCHMARK_SCALING.value:
        return scaling
    return training if _BENCHMARK_TRAINING.value else engines


def thresholds() -> tuple[float, ...]:
    """Returns `--fidelity_thresholds` as numbers."""
    try:
        values = tuple(map(float, _FIDELITY_THRESHOLDS.value))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < 1 for value in values):
        raise UsageError(
            f'--fidelity_thresholds={",".join(_FIDELITY_THRESHOLDS.value)}: expected shares '
            'between 0 and 1, such as 0.5,0.4.'
        )
    return values


def check_size(config):
    """Refuses images of which the pools of our VGG would leave nothing."""
    from occjax import vgg

    plan, size = vgg.PLANS[config.classifier.plan], config.data.image_size
    least = 2 ** plan.count('M')
    if config.classifier.source == 'vgg' and size < least:
        raise UsageError(
            f'config.data.image_size is {size}: expected at least {least}, as '
            f'{config.classifier.plan} halves images {plan.count("M")} times.'
        )


# Flags, by how they begin, that some modes alone read.
_READ_BY = {
    **dict.fromkeys(('images', 'fpr', 'detectors', 'output'), ('detect',)),
    'benchmark_': ('benchmark', 'fidelity'),
    'fidelity_': ('fidelity',),
}


def check_mode():
    """Refuses flags that the mode does not read."""
    for start, modes in _READ_BY.items():
        for name in flags.FLAGS:
            if name.startswith(start) and flags.FLAGS[name].present and _MODE.value not in modes:
                raise UsageError(
                    f'--{name}={flags.FLAGS[name].value}: --mode={_MODE.value} does not read it: '
                    f'leave it out, or choose --mode={modes[0]}.'
                )


def check_settings():
    """Refuses settings of JAX under which one config would name two experiments."""
    for name, usual in JAX_SETTINGS.items():
        value = getattr(jax.config, name)
        if value != usual:
            raise UsageError(
                f'{name} (a flag, or {name.upper()} in the environment) is {value}: it changes '
                f'results, which would bear the name of the same config. Leave it at {usual}.'
            )


def check_devices():
    """Refuses hosts that were not joined, and says in a line what JAX says of a missing device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        raise UsageError(
            f'No device for --jax_platforms={jax.config.jax_platforms}: '
            'install its wheels, such as pip install "jax[cuda13]" or "jax[tpu]", or use cpu.'
        ) from None
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(
            f'JAX sees {jax.process_count()} hosts, of which each would write the same files: '
            'start it with --multihost, or on one host alone.'
        )


def parse(argv):
    """Parses flags; a mistake in them, or in the config that they name, is the user's."""
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        check_fields(argv)
        if not any(argument.split('=')[0] in ('-config', '--config') for argument in argv[1:]):
            argv.insert(1, f'--config={DEFAULT_CONFIG}')
        # Not before: it reads the arguments, and may fail.
        text = 'The experiment; default digits.'
        config_flags.DEFINE_config_file('config', None, text, sys_argv=argv)
        flags.FLAGS['config'].parser = ConfigFile()
        rest = flags.FLAGS(argv)
    except UsageError:
        raise
    except Exception as error:  # Of absl, ml_collections and Python's parser.
        raise UsageError(' '.join(str(error).split())) from None
    if len(rest) > 1:
        raise UsageError(f'Unknown argument {rest[1]!r}: flags begin with --.')
    return rest


def check_fields(argv: list[str]):
    """Refuses arguments of fields that no config has, and offers those that are meant."""

    def fields(section, prefix=''):
        for field in dataclasses.fields(section):
            yield prefix + field.name
            if dataclasses.is_dataclass(field.type):
                yield from fields(field.type, f'{prefix}{field.name}.')

    known = [*fields(Config)]
    for argument in argv[1:]:
        named = re.match(r'--?(?:no)?config\.([\w.]*)', argument)
        if named and named[1] not in known:
            last = named[1].rpartition('.')[2]
            near = [name for name in known if name.rpartition('.')[2] == last]
            near = near or difflib.get_close_matches(named[1], known, n=1)
            meant = f'did you mean {" or ".join(near)}? ' if near else ''
            raise UsageError(f'{argument}: no such field: {meant}All are in occjax/config.py.')


def crash(error: Exception):
    """Shows where an error comes from that is nobody's mistake, and ends, with all hosts."""
    print(printable_lines(''.join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        line = f'{type(error).__name__}: {" ".join(str(error).split()):.300}'
        tell_end(
            f'{line}: if another host is gone, the same command goes on from what is finished.'
        )
        leave(line, 1)
    sys.exit(1)


def end_on(*signals: signal.Signals):
    """Ends the process within a moment of a signal, with exit code 128 + its number.

    Python's own handlers wait for the compiled program in flight, which may take minutes. Nothing
    is lost by not waiting: files appear whole or not at all, as if the process had been killed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)

    def watch():
        number = os.read(reader, 1)[0]
        name = signal.Signals(number).name
        line = f'ended by {name}; the same command goes on from what is finished.'
        os.write(2, f'launch.py: {line}\n'.encode())
        leave(line, 128 + number)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def fail(line: str, exit_fn: Callable[[int], None] = sys.exit):
    """Prints the one line that a person needs, and ends with exit code 2, with all hosts."""
    tell_end(line)
    leave(line, 2)
    exit_fn(2)


def leave(line: str, code: int):
    """Ends this process at once if it is one of several hosts, and tells the others why."""
    if jax.distributed.is_initialized():
        from occjax.experiment import hosts

        hosts.fail(line, code)


def reported(run_fn: Callable[[], None]):
    """Runs the program, and ends by exit code 2 and a line where the user can mend what failed."""
    try:
        run_fn()
    except UsageError as error:
        fail(str(error))
    except OSError as error:  # A full disk, one that is read-only, a folder that is gone.
        fail(
            f'{error.strerror or error}: {error.filename or "output"}. What is finished is kept: '
            'mend that and run the same command again.',
            exit_fn=os._exit,  # What Orbax says of its own failure on the way out is for nobody.
        )
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
            crash(error)
        fail(
            f'Out of memory ({" ".join(str(error).split())}): a lower --eval_batch_size or '
            '--memory_limit takes less, and so do, in another --workdir, smaller images or a lower '
            'config.classifier.batch_size or hidden.'
        )
    except Exception as error:
        crash(error)


if __name__ == '__main__':
    end_on(signal.SIGINT, signal.SIGTERM)
    jax.config.config_with_absl()
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS tell much; --verbosity=0 lets them.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='replace')  # A console may lack our signs.
    reported(lambda: app.run(main, flags_parser=parse))
