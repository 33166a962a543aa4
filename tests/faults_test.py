"""Killed at any moment, damaged anywhere: what is printed, followed, ends in equal results.

`pytest tests/faults_test.py -m long -s -n 0` prints what became of a hundred damages and fifty
kills.
"""

import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from occjax import vgg
from occjax.experiment import stages
from occjax.probes import evasion, sweep
from occjax.types import UsageError
from tests import small_launch, small_run
from tests.small_run import make_run, run_all

pytestmark = pytest.mark.usefixtures('small_plan')

RESULTS = ('report/results.json', 'sweep.json', 'adaptive.json')
DELETE = re.compile(r'^(?P<path>.+?) (is damaged|was made from another .*?): delete ')
MODE = re.compile(r'run --mode=(\w+)')
# What a run consists of, by the files that belong to it.
KINDS = {
    'config': 'config.json',
    'dataset': 'dataset.json',
    'metrics': 'classifier/metrics.json',
    'checkpoint': 'classifier/3/**/*',
    'autoencoder': 'magnet/**/*',
    'shard': 'heatmaps/*.npz',
    'manifest': 'heatmaps/manifest.json',
    'banks': 'detectors/**/*',
    'sweep part': 'sweep/**/*.npz',
    'adaptive part': 'adaptive/*.npz',
    'adaptive result': 'adaptive.json',
}


def probe(workdir):
    """Uses every artifact of a run: all stages, the probes, and the report that shows them."""
    run = make_run(workdir)
    run_all(run)
    run.config.sweep.images, run.config.sweep.attacks = 60, ('bim',)
    run.config.sweep.epsilons, run.config.sweep.steps = (0.3,), 2
    run.config.sweep.occluders, run.config.sweep.methods = ((4, 4, 0.5),), ('detector',)
    run.config.adaptive.epsilons, run.config.adaptive.attacks = (0.1,), ('selective',)
    run.config.adaptive.steps, run.config.adaptive.images = 2, 8
    run.config.adaptive.methods = ('detector',)
    sweep.sweep(run)
    evasion.evade(run)
    run_all(run)
    return [(workdir / name).read_bytes() for name in RESULTS]


@pytest.fixture(scope='module')
def probed(finished, tmp_path_factory):
    """A whole run with its probes, and what they found."""
    workdir = tmp_path_factory.mktemp('probed') / 'run'
    shutil.copytree(finished[0].workdir, workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vgg.PLANS, 'vgg11', small_run.SMALL)
        return workdir, probe(workdir)


def damage(path, how, rng):
    """Damages one file."""
    content = bytearray(path.read_bytes())
    if how == 'missing':
        path.unlink()
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'cut':
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)


def follow(workdir):
    """Uses a run and does what it says, until it says nothing more.

    Returns:
        What was found, and the lines that were printed on the way.
    """
    said = []
    for _ in range(8):
        try:
            return probe(workdir), said
        except UsageError as error:
            said.append(str(error))
            culprit, mode = DELETE.match(said[-1]), MODE.search(said[-1])
            assert culprit or mode, f'no way out: {said[-1]}'
            if culprit:
                path = pathlib.Path(culprit['path'])
                assert path.is_relative_to(workdir)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if mode and mode[1] in stages.STAGES and not culprit:
                stages.STAGES[mode[1]](make_run(workdir))
    raise AssertionError(f'It goes in circles: {said}')


def damage_and_follow(probed, tmp_path, number):
    """Returns which kind was damaged and how, and what became of it."""
    original, expected = probed
    rng = np.random.default_rng(number)
    workdir = tmp_path / 'run'
    shutil.copytree(original, workdir)
    kind = list(KINDS)[number % len(KINDS)]
    files = sorted(path for path in workdir.glob(KINDS[kind]) if path.is_file())
    path = files[rng.integers(len(files))]
    how = ('flipped', 'cut', 'empty', 'missing')[number // len(KINDS) % 4]
    before = path.read_bytes()
    damage(path, how, rng)
    if kind == 'autoencoder':  # It is asked for only where maps are missing.
        sorted((workdir / 'heatmaps').glob('*.npz'))[0].unlink()
    found, said = follow(workdir)
    assert found == expected, f'{path} {how}: other results after {said}'
    if said:
        outcome = 'named, and the advice works'
    else:
        remade = path.exists() and path.read_bytes() == before
        outcome = 'made again' if remade else 'holds nothing that is used'
    return kind, how, outcome, path.relative_to(workdir), said


def test_a_damaged_shard_is_made_again_and_nothing_else_changes(finished, tmp_path):
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    shards = sorted((tmp_path / 'run' / 'heatmaps').glob('*.npz'))
    before = [path.read_bytes() for path in shards]
    damage(shards[0], 'flipped', np.random.default_rng(0))
    with pytest.raises(UsageError, match=f'{shards[0].name} is damaged: delete it and run --mode'):
        run_all(make_run(tmp_path / 'run'))
    shards[0].unlink()
    assert run_all(make_run(tmp_path / 'run')) == finished[1]
    assert [path.read_bytes() for path in shards] == before


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 5, 9, 14])  # Config, shard, sweep part, checkpoint.
def test_damage_is_named_or_mended_and_the_advice_leads_to_equal_results(probed, tmp_path, number):
    print(*damage_and_follow(probed, tmp_path, number))


@pytest.mark.long
def test_a_hundred_damages(probed, tmp_path):
    outcomes = collections.Counter()
    for number in range(110):
        kind, how, outcome, path, said = damage_and_follow(probed, tmp_path, number)
        outcomes[outcome] += 1
        print(f'{kind}, {how}: {outcome} ({path})', *said, sep='\n    ')
        shutil.rmtree(tmp_path / 'run')
    print(dict(outcomes))


def launch(workdir, cache, **environment):
    """Starts the experiment in a process of its own."""
    settings = {
        'XDG_CACHE_HOME': str(cache),
        'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        'XLA_FLAGS': '',
    }
    return subprocess.Popen(
        [sys.executable, small_launch.__file__, f'--workdir={workdir}'],
        env=os.environ | settings | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(workdir):
    """Returns what a run left in its directory, but for the random names inside a checkpoint."""
    found = {str(path.relative_to(workdir)) for path in workdir.rglob('*')}
    return sorted(name for name in found if '/d/' not in name)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A run in a process of its own, its cache, and how long the second one took."""
    root = tmp_path_factory.mktemp('undisturbed')
    for name in ('compiling', 'run'):
        began = time.monotonic()
        process = launch(root / name, root / 'cache')
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return root / 'run', root / 'cache', time.monotonic() - began


def kill_and_resume(undisturbed, workdir, seconds=None, write=None, number=signal.SIGKILL):
    """Kills a run after some time or at its n-th write, and says where; the rest must be equal."""
    original, cache, _ = undisturbed
    process = launch(workdir, cache, **({'KILL_AT_WRITE': str(write)} if write else {}))
    if seconds is not None:
        time.sleep(seconds)
        process.send_signal(number)
    began = time.monotonic()
    _, errors = process.communicate()
    took, code = time.monotonic() - began, process.returncode
    there = names(workdir) if workdir.exists() else []
    process = launch(workdir, cache)
    _, again = process.communicate()
    assert process.returncode == 0, again
    results = [(path / 'report' / 'results.json').read_bytes() for path in (original, workdir)]
    assert results[0] == results[1]
    assert names(workdir) == names(original)
    stage = [name for name in ('report', 'detectors', 'heatmaps', 'classifier') if name in there]
    return (stage or ['start'])[0], code, took, errors


@pytest.mark.slow
def test_a_run_killed_inside_a_write_goes_on_to_equal_results(undisturbed, tmp_path):
    _, code, *_ = kill_and_resume(undisturbed, tmp_path / 'run', write=9)
    assert code == -signal.SIGKILL


@pytest.mark.slow
def test_sigterm_ends_at_once_with_a_code_of_its_own(undisturbed, tmp_path):
    seconds = undisturbed[2] / 2
    _, code, took, errors = kill_and_resume(
        undisturbed, tmp_path / 'run', seconds, number=signal.SIGTERM
    )
    assert code == 143
    assert took < 10
    assert 'ended by SIGTERM' in errors.splitlines()[-1]
    assert 'Traceback' not in errors


@pytest.mark.long
def test_fifty_kills(undisturbed, tmp_path):
    """At random moments of the run, then at random writes."""
    rng, stages_killed = np.random.default_rng(0), collections.Counter()
    for number in range(50):
        moment = {'write': int(rng.integers(1, 60))}
        if number < 40:
            moment = {'seconds': rng.uniform(0, undisturbed[2])}
        sent = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 4]
        workdir = tmp_path / f'run{number}'
        stage, code, *_ = kill_and_resume(undisturbed, workdir, number=sent, **moment)
        stages_killed[stage] += 1
        print(number, moment, sent.name, f'exit {code}, in {stage}: equal', flush=True)
        shutil.rmtree(workdir)
    print(dict(stages_killed))
