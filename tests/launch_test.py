"""The command line: one clear line and exit code 2 for every mistake, and nothing lost."""

import os
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

import launch as launch_lib
from configs import digits
from occjax.benchmark import engines, fidelity, peer
from occjax.experiment import hosts, stages, storage
from occjax.probes import detection, evasion, sweep
from occjax.types import UsageError
from tests.conftest import ROOT
from tests.small_run import make_run


def launch(*arguments, cwd, code=None, **environment):
    """Runs `launch.py` as a user does, from any directory; or other code in a fresh process."""
    program = [str(ROOT / 'launch.py')] if code is None else ['-c', code]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Returns a function that does what `launch.py` does with arguments, within this process."""
    monkeypatch.chdir(tmp_path)
    precision = jax.config.jax_default_matmul_precision

    def run(*arguments):
        with flagsaver.flagsaver():
            launch_lib.main(launch_lib.parse(['launch.py', *arguments]))

    yield run
    jax.config.update('jax_default_matmul_precision', precision)


def refused(command, *arguments):
    """Returns the line with which arguments are refused."""
    with pytest.raises(UsageError) as caught:
        command(*arguments)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--config.attack.epsilom=0.1'], 'did you mean attack.epsilon?'),
        (['--config.attack.eps=0.1'], 'did you mean attack.epsilon?'),
        (['--config.epsilon=0.1'], 'did you mean attack.epsilon?'),
        (['--config.atack.epsilon=0.1'], 'did you mean attack.epsilon?'),
        (['--noconfig.clip'], 'did you mean attack.clip?'),
        (['--config.qqqq=1'], 'no such field: All are in occjax/config.py'),
        (['--config.attack.epsilon=large'], "config.attack.epsilon is 'large': expected a number"),
        (['--config.attack.epsilon=8'], 'config.attack.epsilon is 8.0'),
        (['--config.attack.epsilon=nan'], 'config.attack.epsilon is nan'),
        (['--config.attack.epsilon=None'], 'config.attack.epsilon is None'),
        (['--config.attack=none'], 'attack'),
        (['--config.attack.clip=perhaps'], "config.attack.clip is 'perhaps': expected True"),
        (['--config.seed=1.5'], "config.seed is '1.5'"),
        (['--config.seed=' + '9' * 5000], 'config.seed'),
        (['--config.data.name='], "config.data.name is ''"),
        (['--config.classifier.hidden=1000000000000'], 'config.classifier.hidden is 10000000000'),
        (['--config.classifier.learning_rate=inf'], 'config.classifier.learning_rate is inf'),
        (['--config.occlusion.fill=nan'], "config.occlusion.fill is ('nan',)"),
        (['--config.occlusion.fill=(.5,1e999)'], 'config.occlusion.fill is (0.5, inf)'),
        (['--config.occlusion.fill=(1, 2'], 'config.occlusion.fill'),
        (['--config.occlusion.size=40'], 'config.occlusion.size is 40'),
        (['--config.data.image_size=28'], 'config.data.image_size is 28: expected at least 32'),
        (['--config=nowhere.py'], '--config=nowhere.py: FileNotFoundError'),
        (['--config=nowhere.py', '--config.seed=1'], '--config=nowhere.py: FileNotFoundError'),
        (['--config='], '--config='),
        (['--config'], 'Missing value for flag --config'),
        (['--flagfile=nowhere'], 'Unable to open flagfile'),
        (['--mode=everything'], 'train|heatmaps|detectors|report|all'),
        (['--chunk_size=0'], 'chunk_size'),
        (['--chunk_size=1000000000000'], 'chunk_size'),
        (['--eval_batch_size=1000000000000'], 'eval_batch_size'),
        (['--chunksize=1'], "Unknown command line flag 'chunksize'"),
        (['train'], "Unknown argument 'train'"),
        (['--mode=report'], 'run --mode=heatmaps first'),
        (['--config.data.name=folder', '--data_dir=nowhere'], 'nowhere'),
        (['--engine=fast'], 'auto|full|incremental'),
        (['--memory_limit=much'], '--memory_limit=much: expected bytes'),
        (['--memory_limit=' + '9' * 400], 'expected bytes'),
        (['--memory_limit=' + '9' * 400 + 'GiB'], 'expected bytes'),
        (['--fidelity_thresholds=0.5,1'], '--fidelity_thresholds=0.5,1: expected shares'),
        (['--fidelity_thresholds=nan'], '--fidelity_thresholds=nan: expected shares'),
        (['--mode=heatmaps', '--engine=approximate'], 'does not exist: run --mode=train'),
        (['--mode=benchmark', '--memory_limit=1MiB'], 'is too small for one window'),
        (['--mode=detect'], '--mode=detect needs --images='),
        (['--benchmark_images=0'], 'benchmark_images'),
        (['--benchmark_images=1000000000000'], 'benchmark_images'),
        (['--benchmark_repeats=1000000000000'], 'benchmark_repeats'),
        (['--benchmark_threshold=0'], 'benchmark_threshold'),
        (['--benchmark_threshold=nan'], 'benchmark_threshold'),
        (['--benchmark_peer=keras'], 'captum'),
        (
            ['--mode=benchmark', '--benchmark_peer=captum', '--config.classifier.thermometer=4'],
            'captum cannot be compared on a thermometer of 4 levels',
        ),
        (
            ['--config=digits', '--config.attack.epsilon=nan'],
            'config.attack.epsilon is nan: expected a number from 0 to 1',
        ),
        (['--fpr=2'], '--fpr=2: 2.0 is not a number in the range [0.0, 1.0]'),
        (['--mode=detect', '--images='], '--images=: it names no path: name one, or leave'),
        (['--images='], '--images=: it names no path: name one, or leave'),
        (['--engine=fast', '--mode=train'], '--engine=fast: value should be one of <auto|full'),
        (
            ['--mode=benchmark', '--benchmark_target=tpu:moon'],
            '--benchmark_target=tpu:moon: no compiler for it:',
        ),
        (
            ['--benchmark_target=tpu:moon'],
            '--benchmark_target=tpu:moon: --mode=all does not read it',
        ),
        (
            ['--workdir=/dev/null/x'],
            'Cannot use --workdir=/dev/null/x: Not a directory: choose another',
        ),
        (['--config.seed=-1'], 'config.seed is -1: expected a whole number from 0'),
        (
            ["--config.sweep.attacks=('pgd','pgd')"],
            "config.sweep.attacks is ('pgd', 'pgd'): expected each of them once",
        ),
        (
            ['--mode=heatmaps', '--chunk_size=0'],
            '--chunk_size=0: 0 is not an integer in the range [1, ',
        ),
        (
            ['--data_dir=nowhere'],
            'The digits come with scikit-learn and read no --data_dir=nowhere',
        ),
    ],
)
def test_a_mistake_is_one_line(command, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(os, '_exit', sys.exit)
    monkeypatch.setitem(
        stages.STAGES, 'train', lambda run: run.dataset and pytest.fail('it computes')
    )
    with pytest.raises(SystemExit) as ended:
        launch_lib.reported(lambda: command(*arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert expected in line


@pytest.mark.parametrize(
    ('program', 'expected'),
    [
        ('raise SystemExit(0)', 'SystemExit: 0'),
        ('import sys\nsys.exit("gone")', 'SystemExit: gone'),
        ('def get_config():\n    exit()', 'SystemExit'),
        ('def get_config():\n    return', 'get_config() returns None, no Config'),
        (
            'def get_config():\n    return {"seed": 1}',
            "get_config() returns {'seed': 1}, no Config",
        ),
        ('def get_config(which):\n    return which', 'missing 1 required positional argument'),
        ('def get_config():\n    return Config(foo=1)', "unexpected keyword argument 'foo'"),
        ('def get_config():\n    raise KeyError("x")', "KeyError: 'x'"),
        ('def get_config():\n    open("nowhere.txt")', 'nowhere.txt'),
        ('def get_config():\n    raise RuntimeError("two\\nlines")', 'RuntimeError: two lines'),
        ('get_config', "NameError: name 'get_config' is not defined"),
        ('config = Config', 'there is no get_config() in it'),
        ('get_config = 1', 'TypeError'),
        ('def get_config(:', 'SyntaxError: invalid syntax'),
        ('import nothing_of_this_name', "No module named 'nothing_of_this_name'"),
        ('\0', 'null bytes'),
    ],
)
@pytest.mark.parametrize('override', [(), ('--config.seed=1',)])
def test_a_config_file_that_gives_no_config_is_named(
    command, tmp_path, program, expected, override
):
    (tmp_path / 'wrong.py').write_text(f'from occjax.config import Config\n{program}\n')
    line = refused(command, '--config=wrong.py', *override)
    assert '--config=wrong.py: ' in line
    assert expected in line


def test_a_config_file_that_is_a_directory_or_no_text_is_named(command, tmp_path):
    (tmp_path / 'folder.py').mkdir()
    assert '--config=folder.py: IsADirectoryError' in refused(command, '--config=folder.py')
    (tmp_path / 'image.py').write_bytes(b'\x89PNG\xff')
    assert '--config=image.py: SyntaxError' in refused(command, '--config=image.py')


def ran(command, monkeypatch, *arguments, result=lambda run: run.config):
    """Returns what a function of the run says where the report would be made."""
    found = []
    monkeypatch.setitem(stages.STAGES, 'report', lambda run: found.append(result(run)))
    command('--mode=report', *arguments)
    return found[0]


def test_none_can_be_given_by_a_flag(command, monkeypatch):
    """The digits' config pools and divides anew; another's own split is kept."""
    assert ran(command, monkeypatch, '--workdir=a').data.resplit_per_class == 100
    for name, value, expected in [('b', 'None', None), ('c', 'none', None), ('d', '7', 7)]:
        flag = f'--config.data.resplit_per_class={value}'
        config = ran(command, monkeypatch, f'--workdir={name}', flag)
        assert config.data.resplit_per_class == expected


def test_a_config_file_may_take_an_argument_and_import_its_neighbours(command, monkeypatch):
    text = (
        'from configs import digits\n\n\n'
        'def get_config(seed):\n    config = digits.get_config()\n    config.seed = int(seed)\n'
        '    return config\n'
    )
    with open('own.py', 'w') as file:
        file.write(text)
    assert ran(command, monkeypatch, '--config=own.py:17').seed == 17
    assert os.listdir('runs') == ['own-17']


def test_flags_may_stand_in_a_file(command, monkeypatch):
    with open('flags', 'w') as file:
        file.write(f'--config={ROOT / "configs" / "cifar10.py"}\n--config.seed=3\n')
    config = ran(command, monkeypatch, '--flagfile=flags', '--noconfig.attack.clip')
    assert (config.data.name, config.seed, config.attack.clip) == ('cifar10', 3, False)


@pytest.mark.parametrize(
    ('precision', 'expected'),
    [('float32', 'HIGHEST'), ('tensorfloat32', 'HIGH'), ('bfloat16', 'DEFAULT')],
)
def test_products_have_the_precision_of_the_config(command, monkeypatch, precision, expected):
    def lowered(run):
        x = jax.numpy.ones((3, 3))
        return jax.jit(lambda x: x @ x).lower(x).as_text()

    flags = ('--config.precision=' + precision,) if precision != 'float32' else ()
    text = ran(command, monkeypatch, *flags, result=lowered)
    assert f'precision = [{expected}, {expected}]' in text


@pytest.mark.parametrize(
    ('name', 'value'), [('JAX_NUM_CPU_DEVICES', 'x'), ('JAX_ENABLE_X64', 'maybe')]
)
def test_a_variable_that_jax_cannot_read_is_named(tmp_path, name, value):
    done = launch('--mode=report', cwd=tmp_path, **{name: value})
    assert (done.returncode, done.stdout) == (2, '')
    (line,) = done.stderr.splitlines()
    assert name in line.upper() and value in line
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('jax_enable_x64', True),
        ('jax_default_prng_impl', 'rbg'),
        ('jax_threefry_partitionable', False),
        ('jax_random_seed_offset', 1),
    ],
)
def test_settings_of_jax_that_change_results_are_refused(command, name, value):
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        line = refused(command)
    finally:
        jax.config.update(name, before)
    assert f'{name} (a flag, or {name.upper()} in the environment) is {value}' in line
    assert not os.path.exists('runs')


def test_several_hosts_that_nobody_joined_are_refused(command, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    assert 'JAX sees 3 hosts' in refused(command)
    assert not os.path.exists('runs')


def test_a_refused_config_leaves_no_work_directory(command):
    refused(command, '--config.data.image_size=28')
    assert not os.path.exists('runs')


def test_an_error_shows_no_signs_that_steer_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr(os, '_exit', sys.exit)
    monkeypatch.setattr(hosts, '_words', None)

    def die(line):
        hosts._last_words(line)
        hosts._words.stdin.close()
        sys.exit(hosts._words.wait(10))

    for end_fn in (
        launch_lib.fail,
        lambda line: launch_lib.crash(RuntimeError(line)),
        lambda line: hosts._give_up(line, 5),
        die,
    ):
        with pytest.raises(SystemExit):
            end_fn('a\x1b[2Jb.png')
        assert 'a\\x1b[2Jb.png' in capfd.readouterr().err
        hosts._words = None
    launch_lib.fail('a\nb', exit_fn=int)
    assert capfd.readouterr().err == 'launch.py: a\\nb\n'


def test_another_config_is_refused_and_nothing_is_lost(command, tmp_path):
    refused(command, '--mode=report', '--workdir=run')
    (tmp_path / 'run' / 'metrics.jsonl').touch()  # Something was made.
    before = (tmp_path / 'run' / 'config.json').read_bytes()
    line = refused(command, '--mode=report', '--workdir=run', '--config.seed=5')
    assert 'seed: 0 -> 5' in line
    assert (tmp_path / 'run' / 'config.json').read_bytes() == before


def test_the_way_out_of_a_mistake_in_the_config_leads_out(command, tmp_path):
    refused(command, '--workdir=run', '--config.data.resplit_per_class=174')
    storage.write_record(tmp_path / 'run' / 'dataset.json', {'name': 'of these images'})
    line = refused(command, '--mode=report', '--workdir=run', '--config.data.resplit_per_class=100')
    assert 'another config' not in line
    kept = storage.read_record(tmp_path / 'run' / 'config.json', mode='all')
    assert kept['data']['resplit_per_class'] == 100
    assert not (tmp_path / 'run' / 'dataset.json').exists()


def test_a_second_start_is_refused_before_it_writes_anything(command, tmp_path):
    """Also where both begin at once, and the first has not come to its config yet."""
    with storage.locked(tmp_path / 'run'):
        before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
        line = refused(command, '--workdir=run', '--config.attack.epsilon=0.25')
        assert f'in use by process {os.getpid()}' in line
        assert {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()} == before


@pytest.mark.parametrize('mode', ['report', 'detect', 'sweep', 'adaptive', 'fidelity', 'benchmark'])
def test_a_finished_run_is_looked_at_by_its_own_config(command, monkeypatch, tmp_path, mode):
    """What the command sets itself must be what the run has, but for what only probes read."""
    found, made = [], get_own()
    for module, name in (
        (detection, 'detect'),
        (sweep, 'sweep'),
        (evasion, 'evade'),
        (fidelity, 'fidelity'),
        (engines, 'benchmark'),
    ):
        monkeypatch.setattr(module, name, lambda run, *_, **__: found.append(run.config))
    monkeypatch.setitem(stages.STAGES, 'report', lambda run: found.append(run.config))
    workdir = storage.open_workdir('runs/digits', made)
    (workdir / 'classifier').mkdir()
    config = f'--config={ROOT}/configs/digits.py'
    command(f'--mode={mode}', config)
    command(f'--mode={mode}', config, '--config.classifier.hidden=7', '--config.sweep.steps=3')
    command(f'--mode={mode}', '--workdir=runs/digits', '--config.adaptive.weight=2')
    for asked in found:
        asked.sweep.steps, asked.adaptive.weight = made.sweep.steps, made.adaptive.weight
        assert asked == made
    assert len(found) == 3
    line = refused(command, f'--mode={mode}', config, '--config.classifier.hidden=8')
    assert 'repeat --config.classifier.hidden=7, or choose another --workdir' in line
    other = f'--config={ROOT}/configs/folder.py'
    assert "'digits' -> 'folder'" in refused(
        command, f'--mode={mode}', other, '--workdir=runs/digits'
    )
    assert 'repeat --config.' in refused(command, '--mode=train', '--workdir=runs/digits')


def get_own():
    """Returns a config that a command has changed."""
    made = digits.get_config()
    made.classifier.hidden, made.occlusion.fill, made.precision = 7, (0.0,), 'bfloat16'
    made.detector.methods = ('detector',)
    return made


@pytest.mark.parametrize('flag', ['workdir', 'data_dir', 'cache_dir', 'output', 'images'])
def test_every_path_may_begin_at_home_where_there_is_one(command, monkeypatch, tmp_path, flag):
    monkeypatch.setenv('HOME', str(tmp_path))
    with flagsaver.flagsaver():
        launch_lib.parse(['launch.py', f'--{flag}=~/x'])
        assert launch_lib.flags.FLAGS[flag].value == f'{tmp_path}/x'
    monkeypatch.setattr(os.path, 'expanduser', str)  # Nobody is at home.
    line = refused(command, f'--{flag}=~/x')
    assert f'--{flag}=~/x' in line and 'no home directory for ~/x' in line


def test_a_config_is_found_by_its_name_unless_a_file_has_it(command, monkeypatch, tmp_path):
    assert ran(command, monkeypatch, '--config=cifar10:quick').data.name == 'cifar10'
    assert os.listdir('runs') == ['cifar10-quick']
    assert '--config=cifar11: FileNotFoundError' in refused(command, '--config=cifar11')
    (tmp_path / 'cifar10').write_text('from configs.digits import get_config')
    assert ran(command, monkeypatch, '--config=cifar10').data.name == 'digits'


@pytest.mark.parametrize('missing', ['torch', 'captum'])
def test_a_peer_that_is_not_installed_is_said(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, 'captum.attr', None)
    with pytest.raises(UsageError, match='which is not installed: pip install torch captum'):
        peer.check(make_run(tmp_path / 'run'), 'captum')


# From here on in processes of their own: exit codes, imports, environments.

HEAVY = {'flax', 'optax', 'orbax', 'sklearn', 'matplotlib', 'tensorflow_datasets', 'torch'}
PROGRAM = (
    'import runpy, sys\n'
    'sys.argv[0] = "launch.py"\n'
    'try:\n'
    f'    runpy.run_path({str(ROOT / "launch.py")!r}, run_name="__main__")\n'
    'finally:\n'
    '    open("modules", "w").write(" ".join(sys.modules))\n'
)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--config.attack.epsilon=8'], 'config.attack.epsilon is 8.0: expected a number'),
        (['--config=exits.py'], '--config=exits.py: SystemExit: 0'),
    ],
)
def test_a_mistake_is_exit_code_2_before_anything_heavy(tmp_path, arguments, expected):
    (tmp_path / 'exits.py').write_text('raise SystemExit(0)')
    done = launch(*arguments, cwd=tmp_path, code=PROGRAM)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith('launch.py: ')
    assert expected in line
    assert done.stdout == ''
    loaded = (tmp_path / 'modules').read_text().split()
    assert 'jax' in loaded
    assert not HEAVY & set(loaded)


def test_help_lists_modes_and_flags_and_imports_nothing_heavy(tmp_path):
    """Seconds of import are for those who compute."""
    done = launch('--help', cwd=tmp_path, code=PROGRAM)
    for word in ('--mode', '--config', '--data_dir', '--workdir', '--chunk_size', 'heatmaps'):
        assert word in done.stdout
    assert not HEAVY & set((tmp_path / 'modules').read_text().split())


def test_a_device_that_is_not_there_is_said(tmp_path):
    done = launch('--mode=train', '--jax_platforms=tpu', cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert '--jax_platforms=tpu' in line
    done = launch('--mode=train', cwd=tmp_path, JAX_PLATFORMS='cuda')
    if done.returncode == 0:
        pytest.skip('this machine has a GPU')
    assert done.returncode == 2
    assert 'pip install "jax[cuda13]"' in done.stderr.splitlines()[-1]


def test_double_precision_from_the_environment_is_refused(tmp_path):
    done = launch(cwd=tmp_path, JAX_ENABLE_X64='1')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'JAX_ENABLE_X64 in the environment) is True' in line


def test_another_system_is_said_in_one_line(tmp_path):
    done = launch(cwd=tmp_path, code='import sys\nsys.modules["fcntl"] = None\n' + PROGRAM)
    assert (done.returncode, done.stdout) == (2, '')
    (line,) = done.stderr.splitlines()
    assert 'Linux and macOS' in line


@pytest.mark.parametrize(
    'error',
    [
        pytest.param('MemoryError("9 TiB")', marks=pytest.mark.slow),
        'jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TiB\\n")',
    ],
)
def test_a_console_without_our_signs_shows_others_and_memory_ends_in_a_line(tmp_path, error):
    code = (
        'import jax\nfrom occjax.experiment import stages\n'
        'def stage(run):\n    print("\\u03b5 \\u2264 \\u00b1")\n'
        f'    raise {error}\n'
        'stages.STAGES["report"] = stage\n' + PROGRAM
    )
    done = launch('--mode=report', cwd=tmp_path, code=code, PYTHONIOENCODING='ascii')
    assert done.stdout == '? ? ?\n', done.stderr
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'Out of memory (' in line
    assert '9 TiB' in line


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
