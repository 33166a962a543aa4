"""`launch.py` on the experiment of `small_run`, in a process of its own that may be killed.

With KILL_AT_WRITE=n in the environment it kills itself at its n-th write: before a file is on the
disk, or before it takes its name.
"""

import itertools
import os
import pathlib
import runpy
import signal
import sys

ROOT = pathlib.Path(__file__).parent.parent


def kill_at_write(number):
    """Kills this process at a call of what brings files to the disk and gives them their names."""
    count = itertools.count(1)

    def killing(fn):
        def wrapped(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return wrapped

    for name in ('fsync', 'replace', 'rename'):
        setattr(os, name, killing(getattr(os, name)))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    from occjax import vgg
    from tests import small_run

    if 'KILL_AT_WRITE' in os.environ:
        kill_at_write(int(os.environ['KILL_AT_WRITE']))
    vgg.PLANS['vgg11'] = small_run.SMALL
    sys.argv.insert(1, f'--config={small_run.__file__}')
    runpy.run_path(str(ROOT / 'launch.py'), run_name='__main__')
