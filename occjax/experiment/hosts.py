"""Several hosts as one job, by JAX's own coordination service.

All of them run the same program over one work directory, on a file system that they share. What
divides into parts is made by all, each its share; what one must make is made by the first while
the others wait; the first alone writes results. No host is waited for that is gone: JAX ends the
others within `timeout` seconds of its last sign of life, and one that ends by itself tells them.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from occjax.progress import printable, tell_end
from occjax.types import UsageError

_GOES_ON = 'What is finished is kept: the same command goes on, also with fewer hosts.'
_GONE = 'is gone'
_FAILED = 'occjax/failed'  # Names, among what all hosts can read, who failed and why.
_LEAVES = 'occjax/leaves'  # Names, by host, those that end because of it.
_A_YEAR = 365 * 24 * 3600 * 1000  # in ms; the service itself tells of a host that is gone.
_waits = itertools.count()


def is_first() -> bool:
    """Returns whether this host is the one that writes, prints and prepares."""
    return jax.process_index() == 0


def share(parts: Sequence[Any]) -> Sequence[Any]:
    """Returns this host's share of what all make together."""
    return parts[jax.process_index() :: jax.process_count()]


def start(
    *, detected: bool, address: str | None, count: int | None, index: int | None, timeout: int
):
    """Joins the hosts of a job, or does nothing if none is named; before anything asks for devices.

    Args:
        detected: whether JAX finds them by itself: on a TPU, by Slurm, Open MPI or Kubernetes.
        address: `<host>:<port>` of the first.
        count: how many there are.
        index: which of them this is.
        timeout: seconds that hosts wait for one another to begin, and after which one that gives
            no sign of life counts as gone.

    Raises:
        UsageError: if what is given names no job. One that does not begin ends the process, with a
            line and exit code 2.
    """
    named = (address, count, index)
    if not detected and named == (None, None, None):
        return
    if not detected and None in named:
        raise UsageError(
            'Several hosts need --coordinator_address, --num_processes and --process_id, or '
            '--multihost alone where JAX finds them by itself.'
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise UsageError(
            f'--process_id={index}: expected 0 to {count - 1}, as --num_processes={count}.'
        )
    if address is not None:
        _check_address(address, index)
    _last_words(
        'ended without a word of its own: this host was killed, or others are gone (above is what '
        f'JAX says). {_GOES_ON}'
    )
    # Ours ends the process at SIGTERM; JAX's would have it go on.
    jax.config.update('jax_enable_preemption_service', False)
    waiting = threading.Timer(timeout, _give_up, (address, timeout))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except Exception as error:  # Of JAX, and of whatever started the hosts.
        dismiss()
        raise UsageError(
            f'JAX finds no job of several hosts ({" ".join(str(error).split()):.200}): say '
            '--coordinator_address, --num_processes and --process_id.'
        ) from None
    finally:
        waiting.cancel()
    global _listener
    _listener = threading.Thread(target=_listen, daemon=True)
    _listener.start()


def _check_address(address, index):
    """Refuses what is none, or a port on which host 0 cannot be met, before JAX waits for it."""
    if not re.fullmatch(r'.+:\d{1,5}', address):
        raise UsageError(f'--coordinator_address={address}: expected <host>:<port> of host 0.')
    if index:
        return
    port = int(address.rpartition(':')[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(('', port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise UsageError(
                f'--coordinator_address={address}: port {port} of this host cannot be used '
                f'({getattr(error, "strerror", None) or error}): choose another port, the same on '
                'all hosts.'
            ) from None


def connect():
    """Has all hosts meet once, and their devices: later they may come minutes apart."""
    if jax.process_count() > 1:
        wait('start')
        multihost_utils.sync_global_devices('start')


def _give_up(address, timeout):
    """Ends a job that does not begin, before JAX ends it by a stack trace."""
    dismiss()
    tell_end(
        f'Not all hosts have met at {address or "the first one"} within {timeout} s: is that the '
        'address of host 0, and are all started?'
    )
    os._exit(2)


def _last_words(line):
    """Starts a process that prints a line if this one ends without `dismiss`, even by a signal."""
    global _words
    script = 'read -r _ || printf "launch.py: %s\\n" "$0" >&2'
    _words = subprocess.Popen(['sh', '-c', script, printable(line)], stdin=subprocess.PIPE)


_words = _listener = None


def dismiss():
    """Says that what this process had to say of its end is said."""
    if _words is not None:
        with contextlib.suppress(OSError):
            _words.stdin.write(b'\n')
            _words.stdin.flush()


def _client():
    # JAX gives its coordination service no public name; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def _listen():
    """Ends this process when another host tells that it failed."""
    try:
        line = _client().blocking_key_value_get(_FAILED, _A_YEAR)
    except Exception:  # The service is gone: JAX ends this process itself.
        return
    index, line = line.split(' ', 1)
    if index not in ('all', str(jax.process_index())):
        tell_end(f'host {index} ended: {line} {_GOES_ON}', sys.__stderr__)
        _leave(2)


def fail(line: str, code: int):
    """Tells the other hosts, if there are any, why this one ends, and ends without them."""
    if _client() is None:
        return
    if _listener is None or _GONE in line:  # They haven't met, or find out by themselves.
        dismiss()
        os._exit(code)
    with contextlib.suppress(Exception):  # Another one may have failed before.
        _client().key_value_set(_FAILED, f'{jax.process_index()} {line}')
    _leave(code)


def _leave(code):
    """Ends this process; the first host after all others, as it takes JAX's service with it.

    It waits for less than the shortest `timeout`, after which JAX itself ends it: one may be gone.
    """
    with contextlib.suppress(Exception):
        if is_first():
            deadline = time.monotonic() + 3
            for index in range(1, jax.process_count()):
                left = max(deadline - time.monotonic(), 0.1)
                _client().blocking_key_value_get(f'{_LEAVES}/{index}', int(1000 * left))
            time.sleep(1)  # From their word to their end.
        else:
            dismiss()
            _client().key_value_set(f'{_LEAVES}/{jax.process_index()}', 'now')
    dismiss()
    os._exit(code)


def end():
    """Waits for all hosts, and has nothing more to do with them."""
    if _listener is not None:
        wait('end')
        dismiss()
        if is_first():
            _client().key_value_set(_FAILED, 'all ended well')
        _listener.join()  # Python must not end while it listens.


_written = set()  # What this host wrote since the last time that all met.


def wrote(path: pathlib.Path):
    """Has the next `wait` of all other hosts go on only once they see this file."""
    if jax.process_count() > 1:
        _written.add(str(path))


def _see(paths, index, seconds=60.0):
    """Waits for files that a network disk may show this host later than the one that wrote them."""
    deadline = time.monotonic() + seconds
    for path in map(pathlib.Path, paths):
        while not path.exists():
            if time.monotonic() > deadline:
                raise UsageError(
                    f'{path}, which host {index} wrote, is not to be seen on host '
                    f'{jax.process_index()} after {seconds:g} s: all need the same --workdir, on a '
                    'file system that they share.'
                )
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # Has a network disk ask again.


def wait(name: str):
    """Returns once all hosts have come to this call, and see what the others wrote before it.

    Raises:
        UsageError: if one of them is gone, or does not see it within a minute.
    """
    if jax.process_count() == 1:
        return
    number, own = next(_waits), sorted(_written)
    _written.clear()
    try:
        _client().key_value_set(f'occjax/written/{number}/{jax.process_index()}', json.dumps(own))
        _client().wait_at_barrier(f'occjax/{number}-{name}', _A_YEAR)
        for index in range(jax.process_count()):
            if index != jax.process_index():
                key = f'occjax/written/{number}/{index}'
                _see(json.loads(_client().blocking_key_value_get(key, _A_YEAR)), index)
    except jax.errors.JaxRuntimeError as error:
        silent = re.search(r'Task (\d+) heartbeat', str(error))
        other = 'Another host' if is_first() else 'Host 0'  # Whose service does not answer.
        name = f'Host {silent[1]}' if silent else other
        raise UsageError(f'{name} {_GONE}. {_GOES_ON}') from None


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Lets the first host go through a block before all others do: they find what it made."""
    if not is_first():
        wait('first')
    yield
    if is_first():
        wait('first')


def total(numbers: Sequence[int]) -> np.ndarray:
    """Returns sums over all hosts."""
    return multihost_utils.process_allgather(np.asarray(numbers)).sum(axis=0)


def check_same(value: int, what: str, need: str = '--workdir, on a file system that they share'):
    """Refuses a job whose hosts see different files, or were started differently.

    Args:
        value: what this host sees.
        what: it is, in words.
        need: what all hosts need to have the same, in words.
    """
    found = multihost_utils.process_allgather(np.asarray(value)).ravel()
    if len(set(found.tolist())) > 1:
        raise UsageError(
            f'Hosts see different {what} ({", ".join(map(str, found))}): all need the same {need}.'
        )


def quietly(run_fn: Callable[[], Any]) -> Any:
    """Calls a function; what it prints is the first host's to say."""
    if is_first():
        return run_fn()
    with (
        open(os.devnull, 'w') as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        return run_fn()
