"""The work directory: one experiment's files, complete or absent, and never a stranger's.

`config.json` names the experiment; a directory of another one is refused. Every file appears by a
rename once it is on the disk, so that a killed run leaves nothing half-written. Whatever a later
stage trusts carries a digest of its content, since a flipped bit in stored weights would restore
without complaint, and says by the digests of its parents what it was made from, so that maps of
one classifier never meet the weights of another.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

from occjax.config import (
    EXTENTS,
    Config,
    adopted,
    complete,
    difference,
    extends,
    flags_of,
    identity,
    to_json,
)
from occjax.experiment import hosts
from occjax.types import UsageError

Origin = dict[str, str]  # What something was made from: names of its parents and their digests.

PARTIAL = '.occjax-partial'  # Ends the names of files that are not complete.
_DIGEST_LENGTH = 64  # hex digits of SHA-256


class DamagedError(UsageError):
    """A file whose content is not what was stored."""

    def __init__(self, path: pathlib.Path, mode: str):
        what = 'that folder' if path.is_dir() else 'it'
        super().__init__(f'{path} is damaged: delete {what} and run --mode={mode}.')


def write_bytes(path: pathlib.Path, content: bytes, *, by_any: bool = False):
    """Writes a file whole and to the disk, or not at all; see `writing`."""
    with writing(path, by_any=by_any) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: pathlib.Path, *, by_any: bool = False) -> Iterator[BinaryIO]:
    """Opens a file to be written, which appears whole once all is, or not at all.

    Of several hosts the first writes, what others would write is dropped; `by_any` lets each write.
    """
    if not (by_any or hosts.is_first()):
        yield io.BytesIO()
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(prefix=f'.{path.name}.', suffix=PARTIAL)
        handle, temporary = tempfile.mkstemp(dir=path.parent, **settings)
        with os.fdopen(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        hosts.wrote(path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        is_own = isinstance(error, OSError) and error.filename in (None, temporary)
        if is_own and not isinstance(error, BrokenPipeError):  # Which is standard output's.
            error.filename, error.filename2 = str(path), None
        raise
    _sync(path.parent)


def _sync(directory):
    """Brings a directory's list of names to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: pathlib.Path, value: Any):
    """Writes JSON; NaN and infinity are errors."""
    write_bytes(path, _as_json(value))


def _as_json(value):
    return (json.dumps(value, indent=2, allow_nan=False) + '\n').encode()


def _sealed(value):
    """Returns the text of a record: JSON of a dictionary, with a digest of the rest."""
    return _as_json(value | {'digest': hashlib.sha256(_as_json(value)).hexdigest()})


def write_record(path: pathlib.Path, value: dict):
    """Writes a dictionary as JSON with a digest, for `read_record`."""
    write_bytes(path, _sealed(value))


def read_record(path: pathlib.Path, *, mode: str) -> dict:
    """Reads what `write_record` wrote, and its `digest`.

    Args:
        path: the file.
        mode: the mode of `launch.py` that makes it.

    Raises:
        UsageError: if it is absent, or a single bit is not as it was written.
    """
    content = _read(path, mode)
    try:
        value = json.loads(content)
        rest = {name: entry for name, entry in value.items() if name != 'digest'}
        if _sealed(rest) == content:
            return value
    except (ValueError, AttributeError):  # No JSON; no dictionary.
        pass
    raise DamagedError(path, mode)


def _read(path, mode):
    """Returns the bytes of a file that a mode makes."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing(path, mode) from None
    except IsADirectoryError:
        raise DamagedError(path, mode) from None


def missing(path: pathlib.Path, mode: str) -> UsageError:
    """Returns the error for an input that an earlier stage should have made."""
    return UsageError(f'{path} does not exist: run --mode={mode} first (or --mode=all).')


def check_origin(path: pathlib.Path, found: Origin, wanted: Origin, *, mode: str):
    """Checks that something was made from what is there today.

    Args:
        path: the file or folder to delete if it was not.
        found: the parents that it was made from.
        wanted: the parents of today; those that are not known are left out.
        mode: the mode of `launch.py` that makes it.

    Raises:
        UsageError: names what is another one.
    """
    changed = [name for name, digest in wanted.items() if found.get(name) != digest]
    if changed:
        raise UsageError(
            f'{path} was made from another {changed[0]} than the one of today: delete it and run '
            f'--mode={mode}, or choose another --workdir.'
        )


def adopt(workdir: pathlib.Path, config: Config, overrides: Iterable[str], **how: bool) -> Config:
    """Returns the config of the run in a work directory, see `config.adopted`.

    Where there is none, or one of another version of this code, that is the command's own.
    """
    path = workdir / 'config.json'
    with contextlib.suppress(TypeError):  # It lacks a field without a default.
        return adopted(_stored_config(path), config, overrides, **how) if path.exists() else config
    return config


def open_workdir(path: str | pathlib.Path, config: Config) -> pathlib.Path:
    """Returns the directory of this very experiment, made if need be; the caller has its lock.

    The config may ask for more maps than are there, and while nothing is made be any other. Other
    files are left alone; what stages find there tells itself what it was made from.

    Raises:
        UsageError: if it holds another experiment or more maps, or can't be written.
    """
    workdir = pathlib.Path(path)
    stored, wanted = workdir / 'config.json', to_json(config)
    try:
        if stored.exists():
            found = _stored_config(stored)
            if not (workdir / 'heatmaps' / 'manifest.json').exists():  # Any number will do.
                found['occlusion'] |= {name: wanted['occlusion'][name] for name in EXTENTS}
            changes = difference(identity(found), identity(wanted))
            if changes and hosts.is_first() and _is_fresh(workdir):
                with contextlib.suppress(UsageError):  # Absent, or not ours.
                    read_record(workdir / 'dataset.json', mode='train')
                    (workdir / 'dataset.json').unlink()
                write_record(stored, wanted)
            elif changes and not extends(found, wanted):
                raise _another(workdir, changes, flags_of(identity(found), identity(wanted)))
        elif hosts.is_first():
            write_record(stored, wanted)
        else:  # The first host wrote it before.
            raise UsageError(
                f'{workdir} on host {jax.process_index()} is not that of host 0: it must be on a '
                'file system that all hosts share.'
            )
    except OSError as error:
        raise UsageError(
            f'Cannot use --workdir={workdir}: {error.strerror}: choose another.'
        ) from None
    return workdir


_FEW = 5  # fields in which two configs may differ and be the same experiment by mistake


def _another(workdir, changes, flags):
    """Returns the error for a work directory of another config: what differs, and the way out."""
    more = f'; and {len(changes) - _FEW} more fields' if len(changes) > _FEW else ''
    repeated = '' if more else f'repeat {" ".join(flags)}, or '
    return UsageError(
        f'{workdir} holds another config ({"; ".join(changes[:_FEW])}{more}): {repeated}choose '
        'another --workdir, or, to lose what is there, delete that one.'
    )


def _is_fresh(workdir):
    """Returns whether nothing was made in a work directory but its config, and what it names."""
    found = {path.name for path in workdir.iterdir()}
    return not found - {'config.json', 'dataset.json', '.lock'}


def _stored_config(path):
    """Returns a work directory's config, with the fields that came later."""
    try:
        found = read_record(path, mode='all')
    except DamagedError:
        if _is_foreign(path):
            raise UsageError(f'{path} is of another program: choose another --workdir.') from None
        raise
    del found['digest']
    return complete(found)


def _is_foreign(path):
    """Returns whether a file is JSON, but nothing like a config of ours."""
    try:
        return not {'digest', 'data', 'classifier'} & json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):  # No JSON; no dictionary.
        return False


def keep_config(workdir: pathlib.Path, config: Config):
    """Keeps how many images are mapped and which detectors are fitted, where no more changed."""
    path, wanted = workdir / 'config.json', to_json(config)
    found, windows = _stored_config(path), wanted['occlusion']
    kept = found | {'occlusion': found['occlusion'] | {name: windows[name] for name in EXTENTS}}
    kept |= {'detector': found['detector'] | {'methods': wanted['detector']['methods']}}
    if kept != found and identity(kept) == identity(wanted):
        write_record(path, kept)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a work directory, and removes what a killed one left half-made.

    It is made if need be, and nothing else is written there before. The lock is the operating
    system's and ends with the process, however that ends; the file's content only says whose it
    is. Of several hosts the first has it for all.

    Raises:
        UsageError: if another process has it, which is named; if it cannot be made.
    """
    import fcntl

    if not hosts.is_first():
        hosts.wait('locked')
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if not workdir.is_dir() or error.errno not in (errno.EROFS, errno.EACCES):
            raise UsageError(
                f'Cannot use --workdir={workdir}: {error.strerror}: choose another.'
            ) from None
        hosts.wait('locked')
        yield  # Where nothing can be written there is nothing to protect.
        return
    with os.fdopen(handle, 'r+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or 'another process'
            raise UsageError(
                f'{workdir} is in use by {owner}: wait until it ends, or choose another --workdir.'
            ) from None
        file.truncate()
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        for leftover in _leftovers(workdir):
            leftover.unlink(missing_ok=True)
        try:
            hosts.wait('locked')
            yield
        finally:
            file.seek(0)
            file.truncate()


def _leftovers(workdir):
    """Yields what killed processes left half-made there, but not in work directories within."""
    for folder, folders, files in os.walk(workdir):
        here = pathlib.Path(folder)
        folders[:] = [name for name in folders if not (here / name / '.lock').exists()]
        yield from (here / name for name in files if name[0] == '.' and name.endswith(PARTIAL))


def discard(path: pathlib.Path):
    """Deletes a file of `save_arrays`; what is none, whatever it is called, stays."""
    with contextlib.suppress(OSError, UsageError):
        _verified(path, mode='all')
        path.unlink()


def number_name(value: float) -> str:
    """Returns a number as a part of a file's name, which no other number has.

    Six digits are enough for n / 255, and for what has no more of them unless some n / 255 has the
    same; all others are spelt bit by bit.
    """
    short, level = f'{value:.6g}', round(255 * value) / 255
    is_short = value == level or (value == float(short) and short != f'{level:.6g}')
    return short if is_short else float(value).hex()


def digest_of(leaves: dict[str, np.ndarray]) -> str:
    """Returns a digest over names, types, shapes and bytes of arrays."""
    sha = hashlib.sha256()
    for name in sorted(leaves):
        array = np.ascontiguousarray(leaves[name])
        sha.update(f'{name} {array.dtype} {array.shape};'.encode())
        sha.update(array.data)
    return sha.hexdigest()


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their path in the tree, the form in which they are stored."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in flat}


def _kinds(leaves):
    """Returns each leaf's type and shape, as JSON gives them back."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _manager(directory: pathlib.Path):
    """Returns Orbax's checkpoint manager, which keeps the last two steps and no host waiting."""
    import orbax.checkpoint as ocp  # Seconds of import that other modes need not pay.

    here = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
        ),
    )
    return ocp, ocp.CheckpointManager(directory.absolute(), options=options)


def save_checkpoint(directory: pathlib.Path, step: int, tree: Any, *, made_from: Origin):
    """Stores a pytree of arrays under its step, with its digest and what it was made from.

    Of several hosts, which have the same one, the first does.
    """
    if not hosts.is_first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(jax.device_get(tree)).items()}
    metadata = {'digest': digest_of(leaves), 'made_from': made_from, 'leaves': _kinds(leaves)}
    try:
        ocp, manager = _manager(directory)
        with manager:
            args = ocp.args.Composite(
                tree=ocp.args.StandardSave(leaves), metadata=ocp.args.JsonSave(metadata)
            )
            manager.save(step, args=args)
    except ValueError as error:  # TensorStore tells of a full disk by this kind.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from None
    _sync(directory)


def latest_step(directory: pathlib.Path) -> int | None:
    """Returns the step of the newest complete checkpoint."""
    if not directory.is_dir():
        return None
    _, manager = _manager(directory)
    with manager:
        return manager.latest_step()


@contextlib.contextmanager
def _damage_is_named(path, mode):
    """Turns what Orbax, TensorStore and JSON raise over damaged files into one line."""
    try:
        yield
    except (MemoryError, PermissionError, UsageError):
        raise
    except Exception:
        raise DamagedError(path, mode) from None


def checkpoint_metadata(directory: pathlib.Path, *, mode: str, step: int | None = None) -> dict:
    """Returns `digest`, `made_from` and `leaves` of a checkpoint, without its arrays.

    Args:
        directory: where `save_checkpoint` stored it.
        mode: the mode of `launch.py` that makes it.
        step: of the checkpoint; None for the newest.

    Returns:
        The same with its `step`.

    Raises:
        UsageError: if there is none, or it is damaged.
    """
    step = latest_step(directory) if step is None else step
    path = directory if step is None else directory / str(step)
    if not path.is_dir() or step is None:
        raise missing(path, mode)
    ocp, manager = _manager(directory)
    with manager, _damage_is_named(path, mode):
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = manager.restore(step, args=args).metadata
        return {name: metadata[name] for name in ('digest', 'made_from', 'leaves')} | {'step': step}


def restore_checkpoint(
    directory: pathlib.Path,
    like: Any,
    *,
    mode: str,
    made_from: Origin,
    step: int | None = None,
) -> Any:
    """Returns a checkpoint, as NumPy arrays in the structure of `like`.

    Args:
        directory: where `save_checkpoint` stored it.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`.
        mode: the mode of `launch.py` that makes it.
        made_from: what it must have been made from.
        step: of the checkpoint; None for the newest.

    Raises:
        UsageError: if there is none, its content isn't what was stored, or it was made from
            something else.
    """
    metadata = checkpoint_metadata(directory, mode=mode, step=step)
    check_origin(directory, metadata['made_from'], made_from, mode=mode)
    path, leaves = directory / str(metadata['step']), _named_leaves(like)
    if metadata['leaves'] != _kinds(leaves):
        raise UsageError(
            f'{path} is whole, but holds other arrays than this code and JAX take: run what made '
            f'it, or delete {directory} and run --mode={mode}.'
        )
    # NumPy targets: sharded ones would tie the checkpoint to the number of devices.
    target = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    ocp, manager = _manager(directory)
    with manager, _damage_is_named(path, mode):
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(target))
        restored = manager.restore(metadata['step'], args=args).tree
    if digest_of(restored) != metadata['digest']:
        raise DamagedError(path, mode)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in target])


def save_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray], *, made_from: Origin) -> str:
    """Stores named arrays as one `.npz` file that says what it was made from; returns its digest.

    The digest is the archive's comment. Equal arrays make equal files.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, array in (arrays | {'made_from': json.dumps(made_from, sort_keys=True)}).items():
            member = zipfile.ZipInfo(f'{name}.npy')  # Of 1980, whenever it is made.
            with archive.open(member, 'w', force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        archive.comment = b'0' * _DIGEST_LENGTH
    body = buffer.getvalue()[:-_DIGEST_LENGTH]
    digest = hashlib.sha256(body).hexdigest()
    write_bytes(path, body + digest.encode(), by_any=True)
    return digest


def file_digest(path: pathlib.Path) -> str:
    """Returns the digest that a file of `save_arrays` carries, unchecked."""
    with open(path, 'rb') as file:
        file.seek(-_DIGEST_LENGTH, os.SEEK_END)
        return file.read().decode()


def load_arrays(
    path: pathlib.Path, *, mode: str, made_from: Origin, digest: str | None = None
) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` stored.

    Args:
        path: the file.
        mode: the mode of `launch.py` that makes it.
        made_from: what it must have been made from; if it was not, its folder does not fit.
        digest: of the file that is meant; None for any that is whole.

    Raises:
        UsageError: if it is absent, damaged, another file or made from something else.
    """
    content = _verified(path, mode, digest)
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    origin = json.loads(str(arrays.pop('made_from')))
    check_origin(path.parent, origin, made_from, mode=mode)
    return arrays


def _verified(path, mode, digest=None):
    """Returns the bytes of a file of `save_arrays` if they are those that were stored."""
    content = _read(path, mode)
    body, found = content[:-_DIGEST_LENGTH], content[-_DIGEST_LENGTH:].decode(errors='replace')
    if hashlib.sha256(body).hexdigest() != found or digest not in (None, found):
        raise DamagedError(path, mode)
    return content


def cached(
    path: pathlib.Path,
    make_fn: Callable[[], dict[str, np.ndarray]],
    *,
    mode: str,
    made_from: Origin,
) -> dict[str, np.ndarray]:
    """Returns a part of a long computation: from its file, or made anew and stored there.

    Args:
        path: the file.
        make_fn: returns the arrays; called if the file is absent or damaged.
        mode: the mode of `launch.py` that makes it.
        made_from: see `load_arrays`.
    """
    with contextlib.suppress(DamagedError):
        if path.exists():
            return load_arrays(path, mode=mode, made_from=made_from)
    arrays = {name: np.asarray(array) for name, array in make_fn().items()}
    save_arrays(path, arrays, made_from=made_from)
    return arrays
