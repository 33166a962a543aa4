"""Puts the repository's root on the path, and keeps the tests off the user's own files."""

import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='occjax-tests-')
# Four devices, so that the paths of several are the ones under test.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + (
    ' --xla_force_host_platform_device_count=4'
)
