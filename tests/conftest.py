"""Puts the repository's root on the path, and keeps the tests off the user's own files."""

import fcntl
import os
import pathlib
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import moves  # noqa: E402

os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='occjax-tests-')
# Tests compile the same programs again and again: each is compiled once a session.
os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='occjax-tests-')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# Four devices, so that the paths of several are the ones under test. What of this and of all that
# is random or trained may be moved, `tests/moves.py` says.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + moves.flags()
moves.apply()


@pytest.fixture(autouse=True, scope='module')
def forgets_compiled_programs():
    """Each is some memory maps, of which Linux gives a process 65,530; with more, JAX crashes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def four_devices():
    """For laws of several devices, of which a move may leave one."""
    import jax

    if jax.device_count() < 4:
        pytest.skip('Of four devices.')


@pytest.fixture
def small_plan(monkeypatch):
    """Makes `vgg11` a VGG of two layers."""
    from occjax import vgg
    from tests import small_run

    monkeypatch.setitem(vgg.PLANS, 'vgg11', small_run.SMALL)


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    """A whole run and its tables, made once, also for several workers; tests only read it."""
    from occjax import vgg
    from tests import small_run

    root = tmp_path_factory.getbasetemp()
    root = root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root
    with pytest.MonkeyPatch.context() as patch, open(root / 'finished.lock', 'w') as lock:
        patch.setitem(vgg.PLANS, 'vgg11', small_run.SMALL)
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = small_run.make_run(root / 'finished' / 'run')
        return run, small_run.run_all(run)
