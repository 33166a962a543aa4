"""`launch.py` on the experiment of `small_run`, in a process of its own that may be killed.

With KILL_AT_WRITE=n in the environment it kills itself at its n-th write: before a file is on the
disk, or before it takes its name; with KILL_AT_CALL=<module>:<function>:n at its n-th call of that.
"""

import importlib
import itertools
import os
import pathlib
import runpy
import signal
import sys

ROOT = pathlib.Path(__file__).parent.parent


def kill_at_call(module, names, number):
    """Kills this process at the n-th call of some functions of a module."""
    count = itertools.count(1)

    def killing(fn):
        def wrapped(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return wrapped

    for name in names:
        setattr(module, name, killing(getattr(module, name)))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    from occjax import vgg
    from tests import moves, small_run

    moves.apply()
    if 'KILL_AT_WRITE' in os.environ:
        number = int(os.environ['KILL_AT_WRITE'])
        kill_at_call(os, ('fsync', 'replace', 'rename'), number)
    if 'KILL_AT_CALL' in os.environ:
        name, function, number = os.environ['KILL_AT_CALL'].split(':')
        kill_at_call(importlib.import_module(name), [function], int(number))
    vgg.PLANS['vgg11'] = small_run.SMALL
    sys.argv.insert(1, f'--config={small_run.__file__}')
    runpy.run_path(str(ROOT / 'launch.py'), run_name='__main__')
