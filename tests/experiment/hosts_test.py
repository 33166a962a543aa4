"""Several devices and several hosts give what one gives, and end together when one is lost."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from occjax import data
from occjax.benchmark import compilers
from occjax.experiment import devices, hosts, judging, store
from occjax.methods import METHODS
from occjax.streams import Stream
from occjax.types import Split, UsageError
from tests import moves, small_launch
from tests.small_run import make_run

pytestmark = pytest.mark.usefixtures('small_plan')

HOST_TIMEOUT = 10
ATTACKED = (
    '--config.adaptive.epsilons=(0.1,)',
    "--config.adaptive.attacks=('selective',)",
    '--config.adaptive.images=8',
    '--config.adaptive.steps=10',
)


def split_of(count):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return Split(images, rng.integers(0, 10, count).astype(np.int32))


def test_a_host_reads_its_rows_of_each_batch_and_all_labels():
    split, rows = split_of(50), np.array([1, 2, 7])
    settings = dict(seed=3, epoch=1, flip=True)
    wholes = list(data.training_batches(split, 8, **settings))
    parts = list(data.training_batches(split, 8, rows=rows, **settings))
    assert len(wholes) == len(parts) == 6
    for whole, part in zip(wholes, parts, strict=True):
        np.testing.assert_array_equal(part.images, whole.images[rows])
        np.testing.assert_array_equal(part.labels, whole.labels)
        np.testing.assert_array_equal(part.index, whole.index)


def test_hosts_together_see_every_image_once():
    split, seen = split_of(50), []
    for host in range(3):
        share = data.batches(split, 8, share_fn=lambda starts, host=host: starts[host::3])
        seen += [batch.index[batch.is_real] for batch in share]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(50))


@pytest.mark.parametrize('count', [8, 7])  # Divides over four devices, and does not.
def test_a_joined_batch_is_the_batch(count):
    array = np.arange(3.0 * count).reshape(count, 3)
    joined = devices.join(array[devices.rows(count)], count)
    np.testing.assert_array_equal(joined, array)
    assert joined.sharding == devices.divide(array).sharding


def test_maps_need_no_word_between_devices_and_training_only_sums(tmp_path, four_devices):
    run, mesh = make_run(tmp_path / 'run'), devices.mesh()
    assert mesh.size == 4
    variables = compilers.variable_shapes(run)
    programs = compilers.Programs(run, variables, mesh, 2).makers()
    maps, step = (programs[name]().compiled('tpu') for name in ('maps, full', 'training step'))
    assert compilers.collectives(maps.as_text()) == {}
    found = compilers.collectives(step.as_text())
    assert set(found) == {'all-reduce'}
    size = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
    channels = sum(stats['mean'].size for stats in variables.batch_stats)
    # Gradients once; by channel, sums of the batch norm's two moments and of their gradients.
    assert 4 * size < found['all-reduce'] <= 4 * (size + 8 * channels + 2)


def test_collectives_are_counted_in_bytes():
    program = """
      %a = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}
      %b = f32[] all-reduce-start(%z), to_apply=%add
      ROOT %c = s32[4]{0} all-gather(%v), dimensions={0}
      %d = f32[9]{0} fusion(%all-reduce.3), calls=%f
    """
    assert compilers.collectives(program) == {'all-reduce': 32 + 12 + 4, 'all-gather': 16}


def test_detectors_that_devices_divide_are_those_of_one(finished, monkeypatch):
    run, _ = finished
    division = store.divide(run, 'held_out')
    method, settings = METHODS['detector'], run.config.detector
    banks = store.init_banks(run, division, 'detector')
    assert division.is_fitted.shape[0] * method.num_networks(division.maps) % 4  # Is padded.
    fit = (run.key(Stream.BANK_FIT), banks, division, method, settings, run.config.seed)
    four = judging.fit_banks(*fit)
    alone = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    monkeypatch.setattr(devices, 'mesh', lambda: alone)
    one = judging.fit_banks(*fit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), four, one)


@pytest.mark.parametrize(
    ('mistake', 'expected'),
    [
        (dict(count=2, index=0), 'need --coordinator_address, --num_processes and --process_id'),
        (dict(address='localhost:1234'), 'need --coordinator_address, --num_processes'),
        (dict(address='localhost:1234', count=2, index=2), '--process_id=2: expected 0 to 1'),
        (dict(address='localhost:1234', count=2, index=-1), '--process_id=-1: expected 0 to 1'),
        (dict(address='localhost:99999', count=2, index=0), 'port 99999 of this host'),
        (dict(address='localhost', count=2, index=1), 'expected <host>:<port>'),
    ],
)
def test_a_mistaken_flag_is_one_line(mistake, expected):
    known = dict(detected=False, address=None, count=None, index=None, timeout=1) | mistake
    with pytest.raises(UsageError, match=expected) as caught:
        hosts.start(**known)
    assert len(str(caught.value).splitlines()) == 1


def test_a_barrier_waits_for_files_that_a_disk_shows_late(tmp_path, monkeypatch):
    kept, late = {}, tmp_path / 'late'

    class Client:
        def key_value_set(self, key, value):
            kept[key] = value

        def blocking_key_value_get(self, key, _):
            return json.dumps([str(late)])

        def wait_at_barrier(self, *_):
            threading.Timer(0.3, late.touch).start()

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(hosts, '_client', Client)
    hosts.wrote(tmp_path / 'own')
    hosts.wait('x')
    assert late.exists() and json.dumps([str(tmp_path / 'own')]) in kept.values()
    hosts.wait('y')
    assert json.dumps([]) in kept.values()
    with pytest.raises(UsageError, match='nowhere, which host 1 wrote, is not to be seen'):
        hosts._see([str(tmp_path / 'nowhere')], 1, seconds=0.3)


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        address = f'localhost:{taken.getsockname()[1]}'
        known = dict(detected=False, address=address, count=2, index=0, timeout=1)
        with pytest.raises(UsageError, match=f'--coordinator_address={address}: port .*another'):
            hosts.start(**known)


# --- Whole runs in processes of their own. --------------------------------------------------------


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


def start(workdir, cache, *arguments, num_devices, **environment):
    """Starts a host."""
    settings = {
        'XDG_CACHE_HOME': str(cache),
        'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': moves.flags(num_devices),
    }
    return subprocess.Popen(
        [sys.executable, small_launch.__file__, f'--workdir={workdir}', *arguments],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_host(workdir, cache, *arguments, num_devices=1):
    """Runs the experiment, or a part of it, on one host."""
    process = start(workdir, cache, *arguments, num_devices=num_devices)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


@pytest.fixture(scope='module')
def whole(tmp_path_factory, cache):
    """The work directory of a run on one device; tests copy it."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    one_host(workdir, cache)
    return workdir


def two_hosts(workdir, cache, *arguments, environments=({}, {}), of_second=()):
    """Runs it on two hosts; returns of each the exit code, what it printed, and when it ended."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    flags = [f'--coordinator_address=localhost:{port}', '--num_processes=2', *arguments]
    flags.append(f'--host_timeout={HOST_TIMEOUT}')
    processes = [
        start(workdir, cache, *flags, f'--process_id={i}', *own, num_devices=2, **environment)
        for i, (own, environment) in enumerate(zip(((), of_second), environments, strict=True))
    ]
    ended, deadline = {}, time.monotonic() + 600
    while len(ended) < 2 and time.monotonic() < deadline:
        for i, process in enumerate(processes):
            if i not in ended and process.poll() is not None:
                ended[i] = time.monotonic()
        time.sleep(0.1)
    assert len(ended) == 2, 'hosts wait for one another for ever'
    said = [process.communicate() for process in processes]
    return [(p.returncode, *said[i], ended[i]) for i, p in enumerate(processes)]


def test_a_job_that_does_not_begin_ends_in_one_line(tmp_path, cache):
    flags = ('--coordinator_address=localhost:1', '--num_processes=2', '--host_timeout=5')
    processes = [
        start(tmp_path / 'run', cache, *flags, f'--process_id={i}', num_devices=1) for i in (1, 3)
    ]
    for process, said in zip(processes, ('Not all hosts have met at', '--process_id'), strict=True):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert len(errors.splitlines()) == 1
        assert said in errors
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('index', [0, 1])
def test_a_host_that_waits_for_others_ends_in_one_line(tmp_path, cache, index):
    flags = ('--coordinator_address=localhost:1', '--num_processes=2', f'--process_id={index}')
    if index == 0:
        with socket.socket() as free:
            free.bind(('localhost', 0))
            flags = (f'--coordinator_address=localhost:{free.getsockname()[1]}', *flags[1:])
    process = start(tmp_path / 'run', cache, *flags, num_devices=1)
    time.sleep(8)  # By then it waits.
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert len(errors.splitlines()) == 1, errors


def weights(workdir):
    """Returns the trained parameters but those without effect, by name.

    Batch norm takes away what a convolution's bias adds: its gradient is rounding alone, which Adam
    makes steps of.
    """
    with ocp.CheckpointManager(workdir / 'classifier') as manager:
        args = ocp.args.Composite(tree=ocp.args.StandardRestore())
        tree = manager.restore(3, args=args).tree
    kept = {name: leaf for name, leaf in tree.items() if name.startswith('variables.params')}
    return {n: x for n, x in kept.items() if '.conv.' not in n or not n.endswith('bias')}


def same_weights(workdirs):
    first, second = map(weights, workdirs)
    assert len(first) > 8
    for name, leaf in first.items():
        np.testing.assert_allclose(leaf, second[name], atol=1e-4, err_msg=name)


def taken_along(workdir, to):
    """Makes a work directory that has another one's classifier, and nothing else."""
    to.mkdir()
    shutil.copytree(workdir / 'classifier', to / 'classifier')
    shutil.copy(workdir / 'dataset.json', to)
    return to


def same_results(workdirs):
    """All numbers of `results.json`, and all stored maps, are the same but for rounding."""
    found = [json.loads((path / 'report' / 'results.json').read_text()) for path in workdirs]
    for result in found:
        del result['manifest']['device'], result['manifest']['heatmaps']['devices']
    names = [sorted(path.name for path in (w / 'heatmaps').iterdir()) for w in workdirs]
    assert names[0] == names[1]
    assert_close(*found)
    for name in names[0]:
        if name.endswith('.npz'):
            first, second = (np.load(path / 'heatmaps' / name) for path in workdirs)
            for key in set(first) - {'made_from', 'how'}:
                np.testing.assert_allclose(first[key], second[key], atol=1e-5, err_msg=key)


def assert_close(first, second, path=''):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key, value in first.items():
            assert_close(value, second[key], f'{path}/{key}')
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for i, value in enumerate(first):
            assert_close(value, second[i], f'{path}/{i}')
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=1e-5), path
    else:
        assert first == second, path


@pytest.mark.slow
def test_eight_devices_give_what_one_does(tmp_path, cache, whole):
    """Weights within 1e-4; from the same weights maps and all results within 1e-5."""
    one_host(tmp_path / 'eight', cache, num_devices=8)
    same_weights([tmp_path / 'eight', whole])
    alone = taken_along(tmp_path / 'eight', tmp_path / 'alone')
    one_host(alone, cache)
    same_results([alone, tmp_path / 'eight'])


@pytest.mark.slow
def test_two_hosts_lose_one_in_each_stage_and_end_where_one_does(tmp_path, cache):
    """The tolerances are those of eight devices; the last to go on is a host alone."""
    workdir = tmp_path / 'two'
    for lost, call in (
        (1, 'occjax.classifier:train_step:12'),  # In the second epoch of three.
        (1, 'occjax.experiment.storage:save_arrays:1'),
        (0, 'occjax.experiment.store:fit_banks:2'),
        (0, 'occjax.report.page:build:1'),
    ):
        environments = [{}, {}]
        environments[lost]['KILL_AT_CALL'] = call
        found = two_hosts(workdir, cache, environments=environments)
        (code, _, _, died), (left, _, errors, ended) = found[lost], found[1 - lost]
        assert code == -signal.SIGKILL, call
        assert left not in (0, None), call
        assert 'the same command goes on' in errors.splitlines()[-1], errors
        assert ended - died < HOST_TIMEOUT + 30, call
        if 'train_step' in call:
            shutil.copytree(workdir, tmp_path / 'resumed')
            assert [path.name for path in pathlib.Path(workdir, 'classifier').iterdir()] == ['1']
    one_host(workdir, cache, num_devices=2)
    one_host(tmp_path / 'resumed', cache, '--mode=train', num_devices=4)
    same_weights([workdir, tmp_path / 'resumed'])
    alone = taken_along(workdir, tmp_path / 'alone')
    one_host(alone, cache)
    same_results([alone, workdir])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mode', 'flags'),
    [
        ('fidelity', ('--fidelity_thresholds=0.5', '--benchmark_repeats=1')),
        ('adaptive', ATTACKED),
    ],
)
def test_two_hosts_find_what_one_does(tmp_path, cache, whole, mode, flags):
    workdirs = [tmp_path / 'two', tmp_path / 'one']
    for workdir in workdirs:
        shutil.copytree(whole, workdir)
    for code, _, errors, _ in two_hosts(workdirs[0], cache, f'--mode={mode}', *flags):
        assert code == 0, errors
    one_host(workdirs[1], cache, f'--mode={mode}', *flags)
    found = [json.loads((path / f'{mode}.json').read_text()) for path in workdirs]
    if mode == 'adaptive':
        assert_close(*(result['rows'] for result in found))
    else:
        kept = [[[row[key] for key in ('ssim', 'judges')] for row in r['settings']] for r in found]
        assert_close(*kept)


@pytest.mark.slow
def test_one_host_speaks_and_a_mistake_ends_all(tmp_path, cache):
    first, second = two_hosts(tmp_path / 'run', cache, '--mode=train')
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert 'classifier: train' in first[2]
    assert 'classifier: train' not in second[2]
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['epoch'] for line in lines] == [1, 2, 3]
    # The first host finds a strange work directory, and tells the other.
    flags = ('--mode=train', '--config.seed=5')
    began = time.monotonic()
    for code, _, errors, ended in two_hosts(tmp_path / 'run', cache, *flags):
        assert code == 2, errors
        assert 'seed: 0 -> 5' in errors.splitlines()[-1]
        assert ended - began < 120
    # Nor may they differ in how much there is to do; and what only the other finds ends the first.
    for more, expected in (
        ('--config.occlusion.test_images=7', 'Hosts see different configs'),
        ('--data_dir=/nowhere', 'The digits come with scikit-learn'),
    ):
        ends = two_hosts(tmp_path / 'run', cache, '--mode=train', of_second=(more,))
        for code, _, errors, _ in ends:
            assert code == 2, errors
            assert expected in errors.splitlines()[-1]
