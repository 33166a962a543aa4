"""A guard as named arrays and as one file; see `guard`."""

import collections
import functools
import io
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import guarding, metrics
from occjax.guarding import Guard, HeldOut

FORMAT = 2  # Raised with what a guard consists of.
_FIXED = ('method', 'views', 'windows', 'class_names', 'image_shape', 'fpr', 'attacks')
_AGAIN = 'make it anew, with guard.make, or by --mode=detectors or --mode=sweep of its run'


def save(guard: Guard, path: str | os.PathLike):
    """Writes a guard to one file; it appears whole or not at all.

    A name without `.npz` gets it, as NumPy has it.
    """
    content = io.BytesIO()
    np.savez(content, **to_arrays(guard))
    path = pathlib.Path(path)
    path = path if path.name.endswith('.npz') else path.with_name(f'{path.name}.npz')
    draft = path.with_name(f'.{path.name}.draft')
    draft.write_bytes(content.getvalue())
    draft.replace(path)


def load(path: str | os.PathLike) -> Guard:
    """Returns a guard from its file; nothing in it is executed.

    Raises:
        ValueError: if the file holds no guard, or one that is not whole, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except OSError:
        raise
    except Exception:  # Whatever NumPy, or the archive, finds wrong.
        raise ValueError(f'{path} holds no guard: it is damaged, or another file.') from None
    try:
        return from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f'{path} holds no guard that can be used: {error}') from None


def to_arrays(guard: Guard) -> dict[str, np.ndarray]:
    """Returns all of a guard as named arrays, for `from_arrays`."""
    arrays = {name: getattr(guard, name) for name in ('thresholds', 'fill', 'probe_logits')}
    for name in ('calibration', 'held_out'):
        record = getattr(guard, name)
        arrays |= {f'{name}/{field}': a for field, a in record._asdict().items()} if record else {}
    for tree in ('bank', 'autoencoder'):
        for where, leaf in jax.tree_util.tree_flatten_with_path(getattr(guard, tree))[0]:
            arrays['/'.join([tree, *(str(part.key) for part in where)])] = leaf
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    meta = {name: getattr(guard, name) for name in _FIXED} | {'format': FORMAT}
    return arrays | {'meta': np.asarray(json.dumps(meta))}


def from_arrays(arrays: dict[str, np.ndarray]) -> Guard:
    """Returns the guard of `to_arrays`; other arrays are left alone.

    Raises:
        ValueError: if something is missing, unknown or of another version.
    """
    meta = _meta(arrays)
    try:
        guard = _assembled(arrays, meta)
    except (KeyError, TypeError) as error:
        raise ValueError(f'something is missing ({_named(error)}); {_AGAIN}.') from None
    guarding.sees(guard.method, guard.views, dict(guard.windows), guard.autoencoder)
    _check_whole(guard)
    return guard


def is_current(arrays: dict[str, np.ndarray]) -> bool:
    """Returns whether arrays are those of a guard of this version, as far as they say."""
    return json.loads(str(arrays['meta'])).get('format') == FORMAT


def _meta(arrays):
    """Returns what is no array."""
    try:
        meta = json.loads(str(arrays['meta']))
        version = meta.get('format', 1)
    except (KeyError, ValueError, AttributeError):
        raise ValueError('it is another kind of file.') from None
    if version != FORMAT:
        raise ValueError(f'it was written by another version of occjax; {_AGAIN}.')
    return meta


def _assembled(arrays, meta):
    """Returns the guard of arrays, as they are."""
    parts: dict[str, Any] = collections.defaultdict(dict)
    on_host = ('calibration', 'held_out')
    for name, array in arrays.items():
        first, *where = name.split('/')
        if where:
            tree = functools.reduce(
                lambda tree, part: tree.setdefault(part, {}), where[:-1], parts[first]
            )
            tree[where[-1]] = np.asarray(array) if first in on_host else jnp.asarray(array)
    return Guard(
        bank=parts['bank'],
        autoencoder=parts.get('autoencoder'),
        calibration=metrics.Calibration(**parts['calibration']),
        held_out=HeldOut(**parts['held_out']) if 'held_out' in parts else None,
        windows=tuple((name, guarding.hashable(value)) for name, value in meta['windows']),
        **{name: jnp.asarray(arrays[name]) for name in ('thresholds', 'fill', 'probe_logits')},
        **{name: tuple(meta[name]) for name in ('views', 'class_names', 'image_shape')},
        **{name: meta[name] for name in ('method', 'fpr', 'attacks')},
    )


def _check_whole(guard):
    """Raises `ValueError` unless the arrays fit each other, and what judges by them can be run."""
    count = len(guard.class_names)
    per_class = (guard.thresholds, guard.probe_logits, guard.calibration.is_fitted)
    records = [record for record in (guard.calibration, guard.held_out) if record is not None]
    fits = all(np.shape(array) == (count,) for array in per_class)
    fits &= all(np.shape(r.scores) == np.shape(r.predicted) for r in records)
    rows = np.eye(math.prod(guard.image_shape), count, dtype=np.float32)

    def judged(image):
        def logits_fn(images):
            return images.reshape(len(images), -1) @ rows

        return guarding.judge_maps(guard, guarding.observed(guard, logits_fn, image)).score

    try:
        fits &= jax.eval_shape(judged, jnp.zeros((1, *guard.image_shape))).shape == (1,)
    except Exception:  # Whatever Flax or JAX finds missing.
        fits = False
    if not fits:
        raise ValueError(f'its arrays do not fit together, or some are missing; {_AGAIN}.')


def _named(error):
    """Returns what a `KeyError` or `TypeError` names."""
    return str(error.args[0]) if isinstance(error, KeyError) else 'of its records'
