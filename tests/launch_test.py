"""The command line: one clear line and exit code 2 for every mistake, and nothing lost."""

import os
import subprocess
import sys

import pytest

import launch as launch_lib
from occjax import engine, peer, stages
from tests.conftest import ROOT


def launch(*arguments, cwd, **environment):
    """Runs `launch.py` as a user does, from any directory."""
    return subprocess.run(
        [sys.executable, str(ROOT / 'launch.py'), *arguments],
        cwd=cwd,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--config.attack.epsilom=0.1'], 'Field epsilom not found'),
        (['--config.attack.epsilon=large'], 'could not convert string to float'),
        (['--config.attack.epsilon=8'], 'config.attack.epsilon is 8.0'),
        (['--config.occlusion.size=40'], 'config.occlusion.size is 40'),
        (['--config=nowhere.py'], 'nowhere.py'),
        (['--config=nowhere.py', '--config.seed=1'], 'nowhere.py'),
        (['--config=wrong.py'], "unexpected keyword argument 'foo'"),
        (['--mode=everything'], 'train|heatmaps|detectors|report|all'),
        (['--chunk_size=0'], 'chunk_size'),
        (['--chunksize=1'], "Unknown command line flag 'chunksize'"),
        (['train'], "Unknown argument 'train'"),
        (['--mode=report'], 'run --mode=heatmaps first'),
        (['--workdir=stranger'], 'stranger is no work directory'),
        (['--config.data.name=folder', '--data_dir=nowhere'], 'nowhere'),
        (['--jax_platforms=tpu'], '--jax_platforms=tpu'),
        (['--engine=fast'], 'auto|full|incremental'),
        (['--memory_limit=much'], '--memory_limit=much: expected bytes'),
        (['--fidelity_thresholds=0.5,1'], '--fidelity_thresholds=0.5,1: expected shares'),
        (['--mode=heatmaps', '--engine=approximate'], 'does not exist: run --mode=train'),
        (['--mode=benchmark', '--memory_limit=1MiB'], 'is too small for one window'),
        (['--mode=detect'], '--mode=detect needs --images='),
        (['--benchmark_images=0'], 'benchmark_images'),
        (['--benchmark_threshold=0'], 'benchmark_threshold'),
        (['--benchmark_peer=keras'], 'captum'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, expected):
    (tmp_path / 'stranger').mkdir()
    (tmp_path / 'stranger' / 'file').touch()
    (tmp_path / 'wrong.py').write_text(
        'from occjax.config import Config\n\n\ndef get_config():\n    return Config(foo=1)\n'
    )
    done = launch(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith('launch.py: ')
    assert done.stdout == ''


def test_a_gpu_that_is_not_there_is_said(tmp_path):
    done = launch('--mode=train', cwd=tmp_path, JAX_PLATFORMS='cuda')
    if done.returncode == 0:
        pytest.skip('this machine has a GPU')
    assert done.returncode == 2
    assert 'pip install "jax[cuda13]"' in done.stderr.splitlines()[-1]


def test_another_config_is_refused_and_nothing_is_lost(tmp_path):
    (tmp_path / 'run').mkdir()
    launch('--mode=report', '--workdir=run', cwd=tmp_path)
    before = (tmp_path / 'run' / 'config.json').read_bytes()
    done = launch('--mode=report', '--workdir=run', '--config.seed=5', cwd=tmp_path)
    assert done.returncode == 2
    assert 'seed: 0 -> 5' in done.stderr
    assert (tmp_path / 'run' / 'config.json').read_bytes() == before


def test_help_lists_modes_and_flags(tmp_path):
    done = launch('--help', cwd=tmp_path)
    for word in ('--mode', '--config', '--data_dir', '--workdir', '--chunk_size', 'heatmaps'):
        assert word in done.stdout


def test_a_peer_that_is_not_installed_is_said(tmp_path):
    (tmp_path / 'captum.py').write_text('raise ImportError')
    (tmp_path / 'torch.py').write_text('raise ImportError')
    arguments = ['--mode=benchmark', '--benchmark_peer=captum']
    done = launch(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'pip install torch captum' in line


def test_modes_are_the_stages():
    """`launch.py` spells them out, so as not to import the stages for a help text."""
    assert tuple(stages.STAGES) == launch_lib.STAGES
    assert ('auto', *engine.ENGINES, 'approximate') == launch_lib.ENGINES
    assert list(peer.PEERS) == launch_lib.PEERS


def test_help_imports_nothing_heavy(tmp_path):
    """Seconds of import are for those who compute."""
    program = (
        'import runpy, sys\n'
        f'sys.argv = ["launch.py", "--help"]\n'
        'try:\n'
        f'    runpy.run_path({str(ROOT / "launch.py")!r}, run_name="__main__")\n'
        'finally:\n'
        '    print(*sys.modules, file=sys.stderr)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert '--mode' in done.stdout
    loaded = done.stderr.splitlines()[-1].split()
    assert 'jax' in loaded
    heavy = {'flax', 'optax', 'orbax', 'sklearn', 'matplotlib', 'tensorflow_datasets', 'torch'}
    assert not heavy & set(loaded)


@pytest.mark.slow
def test_a_compilation_cache_is_filled_by_its_flag(tmp_path):
    arguments = (
        '--mode=benchmark',
        '--config.classifier.hidden=8',
        '--config.data.image_size=32',
        '--engine=full',
        '--benchmark_images=1',
        '--benchmark_repeats=1',
        '--jax_compilation_cache_dir=cache',
        '--jax_persistent_cache_min_compile_time_secs=0',
    )
    assert launch(*arguments, cwd=tmp_path).returncode == 0
    kept = {path.name for path in (tmp_path / 'cache').iterdir()}
    assert any('map_batch' in name for name in kept)
