"""All devices of this host as one: a mesh along one axis, over which batches are divided.

Dimensions: B batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Returns all devices along one axis, `data`."""
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ('data',), axis_types=axis_types)


def divide(array: np.ndarray) -> jax.Array:
    """Puts a batch on the devices, a part on each where it divides."""
    parts = jax.P('data') if len(array) % jax.device_count() == 0 else jax.P()
    return jax.device_put(array, jax.NamedSharding(mesh(), parts))


def replicate(tree: Any) -> Any:
    """Puts the whole of a pytree on every device."""
    return jax.device_put(tree, jax.NamedSharding(mesh(), jax.P()))


def in_batches(fn: Callable, *arrays: np.ndarray, batch_size: int) -> Any:
    """Returns `fn(*arrays)` on the host, computed in padded batches of one size.

    Args:
        fn: maps arrays of leading axis B to a pytree of such.
        *arrays: of one length, at least 1.
        batch_size: B.
    """
    outputs, count = [], len(arrays[0])
    for start in range(0, count, batch_size):
        # Past the end come images from the start again, which are cut off below.
        rows = np.arange(start, start + batch_size) % count
        outputs.append(jax.device_get(fn(*(divide(array[rows]) for array in arrays))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)
