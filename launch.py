"""Runs the paper, or a part of it: `python launch.py --config=configs/cifar10.py --mode=all`.

The config (`--config`, and `--config.attack.epsilon=0.05` to change one number of it) is all that
changes results; the other flags say where and how fast. README lists modes and flags.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from occjax import stages, storage
from occjax.config import Config
from occjax.run import Run
from occjax.types import UsageError

DEFAULT_CONFIG = pathlib.Path(__file__).parent / 'configs' / 'digits.py'
MODES = (*stages.STAGES, 'all')

# A default of its own would be read, and fail, before any error could be caught: see `parse`.
_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; default digits.')
_MODE = flags.DEFINE_enum('mode', 'all', MODES, 'Which stage to run.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results go; default runs/<config name>.')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'A TFDS directory, or a folder of images as <split>/<class>/<file>.'
)
_CACHE_DIR = flags.DEFINE_string(
    'cache_dir', None, 'Where decoded images are kept; default ~/.cache/occjax.'
)
_CHUNK_SIZE = flags.DEFINE_integer(
    'chunk_size', None, 'Masked images a call of the classifier sees; default: by device.', 1
)
_EVAL_BATCH_SIZE = flags.DEFINE_integer(
    'eval_batch_size', None, 'Images evaluated or attacked at once; default: by image size.', 1
)


def main(_):
    """Opens the work directory and runs the stages that the mode names."""
    config, config_file = _CONFIG.value, config_flags.get_config_filename(flags.FLAGS['config'])
    if not isinstance(config, Config):
        raise UsageError(f'Cannot read --config={config_file}: no such file, or no Config in it.')
    config.validate()
    workdir = _WORKDIR.value or os.path.join('runs', pathlib.Path(config_file).stem)
    check_devices()
    run = Run(
        config=config,
        workdir=storage.open_workdir(workdir, config),
        data_dir=_DATA_DIR.value,
        cache_dir=_CACHE_DIR.value,
        chunk_size=_CHUNK_SIZE.value,
        eval_batch_size=_EVAL_BATCH_SIZE.value,
    )
    for mode in stages.STAGES if _MODE.value == 'all' else [_MODE.value]:
        tables = stages.STAGES[mode](run)
        if tables:
            print(tables)
            print(f'Report: {run.workdir / "report" / "report.html"}')


def check_devices():
    """Says in one line what JAX says in many when a device that was asked for isn't there."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        raise UsageError(
            f'No device for --jax_platforms={jax.config.jax_platforms}: '
            'install its wheels, such as pip install "jax[cuda13]" or "jax[tpu]", or use cpu.'
        ) from None


def parse(argv):
    """Parses flags; a mistake in them, or in the config that they name, is the user's."""
    try:
        rest = flags.FLAGS(argv)
    except KeyError as error:
        raise UsageError(f'{error.args[0]}; its fields stand in occjax/config.py.') from None
    except Exception as error:  # A config is a program: it can fail in any way.
        raise UsageError(str(error).strip().splitlines()[-1].strip()) from None
    if len(rest) > 1:
        raise UsageError(f'Unknown argument {rest[1]!r}: flags begin with --.')
    return rest


if __name__ == '__main__':
    jax.config.config_with_absl()
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS tell much; --verbosity=0 lets them.
    if not any(argument.split('=')[0].lstrip('-') == 'config' for argument in sys.argv[1:]):
        sys.argv.insert(1, f'--config={DEFAULT_CONFIG}')
    try:
        app.run(main, flags_parser=parse)
    except UsageError as error:
        print(f'launch.py: {error}', file=sys.stderr)
        sys.exit(2)
