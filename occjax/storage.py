"""The work directory: one experiment's files, complete or absent, and never a stranger's.

`config.json` names the experiment; a directory of another one is refused. Every file appears by a
rename, so that a killed run leaves nothing half-written, and what a later stage trusts carries a
digest, because a flipped bit in stored weights would restore without complaint.
"""

import hashlib
import io
import json
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import jax
import numpy as np

from occjax.config import Config, complete, difference, identity, to_json
from occjax.types import UsageError


def write_bytes(path: pathlib.Path, content: bytes):
    """Writes a file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: pathlib.Path, value: Any):
    """Writes JSON; NaN and infinity are errors."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())


def read_json(path: pathlib.Path, *, mode: str) -> Any:
    """Reads JSON; if it isn't there, says which mode of `launch.py` makes it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise missing(path, mode) from None
    except ValueError:
        raise UsageError(f'{path} is damaged: delete it and run --mode={mode}.') from None


def missing(path: pathlib.Path, mode: str) -> UsageError:
    """Returns the error for an input that an earlier stage should have made."""
    return UsageError(f'{path} does not exist: run --mode={mode} first (or --mode=all).')


def open_workdir(path: str, config: Config) -> pathlib.Path:
    """Returns the directory of this very experiment, made if need be.

    Raises:
        UsageError: if it holds another experiment, something else altogether, or can't be written.
    """
    workdir = pathlib.Path(path).expanduser()
    stored, wanted = workdir / 'config.json', to_json(config)
    try:
        if stored.exists():
            found = complete(read_json(stored, mode='all'))
            changes = difference(identity(found), identity(wanted))
            if changes:
                raise UsageError(
                    f'{workdir} holds another config ({"; ".join(changes)}): choose another '
                    '--workdir, or delete that one.'
                )
        elif workdir.is_dir() and any(workdir.iterdir()):
            raise UsageError(f'{workdir} is no work directory of occjax: choose another --workdir.')
        else:
            write_json(stored, wanted)
    except OSError as error:
        raise UsageError(f'Cannot use --workdir={workdir}: {error.strerror}.') from None
    return workdir


def _tree_digest(leaves: dict[str, np.ndarray]) -> str:
    """Returns a digest over names, types, shapes and bytes."""
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


def _manager(directory: pathlib.Path):
    """Returns Orbax's checkpoint manager, which keeps the last two steps."""
    import orbax.checkpoint as ocp  # Seconds of import that other modes need not pay.

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp, ocp.CheckpointManager(directory.absolute(), options=options)


def save_checkpoint(directory: pathlib.Path, step: int, tree: Any):
    """Stores a pytree of arrays under its step, with its digest."""
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(jax.device_get(tree)).items()}
    ocp, manager = _manager(directory)
    with manager:
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(leaves),
            metadata=ocp.args.JsonSave({'digest': _tree_digest(leaves)}),
        )
        manager.save(step, args=args)


def latest_step(directory: pathlib.Path) -> int | None:
    """Returns the step of the newest complete checkpoint."""
    if not directory.is_dir():
        return None
    _, manager = _manager(directory)
    with manager:
        return manager.latest_step()


def restore_checkpoint(directory: pathlib.Path, like: Any, *, mode: str) -> Any:
    """Returns the newest checkpoint, as NumPy arrays in the structure of `like`.

    Args:
        directory: where `save_checkpoint` stored it.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`.
        mode: the mode of `launch.py` that makes it.

    Raises:
        UsageError: if there is none, or its content isn't what was stored.
    """
    step = latest_step(directory)
    if step is None:
        raise missing(directory, mode)
    # NumPy targets: sharded ones would tie the checkpoint to the number of devices.
    target = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _named_leaves(like).items()}
    ocp, manager = _manager(directory)
    with manager:
        args = ocp.args.Composite(
            tree=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore()
        )
        try:
            restored = manager.restore(step, args=args)
            intact = _tree_digest(restored.tree) == restored.metadata['digest']
        except Exception:  # Orbax, TensorStore and JSON each raise their own kinds here.
            intact = False
    if not intact:
        damaged = directory / str(step)
        raise UsageError(f'{damaged} is damaged: delete that folder and run --mode={mode}.')
    leaves = [restored.tree[name] for name in target]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """Stores named arrays as one `.npz` file, whose members carry checksums."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def load_arrays(path: pathlib.Path, *, mode: str) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` stored.

    Raises:
        UsageError: if it is absent or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except FileNotFoundError:
        raise missing(path, mode) from None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        raise UsageError(f'{path} is damaged: delete it and run --mode={mode}.') from None
