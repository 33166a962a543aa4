"""The devices of this host, or of all hosts, as one: a mesh along one axis that divides batches.

What needs no word between devices (maps, attacks) runs on those of one host, each host on images
of its own; training runs on those of all hosts.

Dimensions: B batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@functools.cache
def mesh(*, all_hosts: bool = False) -> jax.sharding.Mesh:
    """Returns the devices of this host, or of all, along one axis, `data`."""
    found = jax.devices() if all_hosts else jax.local_devices()
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(found),), ('data',), axis_types=axis_types, devices=found)


def _divided(count, *, all_hosts=False):
    """Returns how an array of some length lies on the devices: a part on each if it divides."""
    over = mesh(all_hosts=all_hosts)
    return jax.NamedSharding(over, jax.P('data') if count % over.size == 0 else jax.P())


def divide(array: np.ndarray) -> jax.Array:
    """Puts a batch on this host's devices, a part on each where it divides."""
    return jax.device_put(array, _divided(len(array)))


def rows(count: int) -> np.ndarray:
    """Returns which rows of a batch that all hosts divide lie on this one, in order."""
    parts = _divided(count, all_hosts=True).addressable_devices_indices_map((count,))
    return np.unique([np.arange(count)[index] for index in parts.values()])


def join(array: np.ndarray, count: int) -> jax.Array:
    """Returns the batch of length `count` of which each host has its `rows`."""
    sharding, here = _divided(count, all_hosts=True), rows(count)
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)

    def part(index):
        return array[np.searchsorted(here, np.arange(count)[index[0]])]

    return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)


def replicate(tree: Any, *, all_hosts: bool = False) -> Any:
    """Puts the whole of a pytree on every device; each host has the same one."""
    sharding = jax.NamedSharding(mesh(all_hosts=all_hosts), jax.P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf):
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: leaf[index])

    return jax.tree.map(put, jax.device_get(tree))


def spread(fn: Callable, *trees: Any) -> Any:
    """Returns `fn(*trees)` on the host, all at once, each device its part of the leading axis.

    Where it does not divide, the first ones are computed twice.
    """
    count = len(jax.tree.leaves(trees)[0])
    rows = np.arange(-(-count // mesh().size) * mesh().size) % count
    outputs = fn(*jax.tree.map(lambda leaf: divide(leaf[rows]), trees))
    return jax.tree.map(lambda leaf: leaf[:count], jax.device_get(outputs))


def in_batches(
    fn: Callable,
    *arrays: np.ndarray,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Any:
    """Returns `fn(*arrays)` on the host, computed in padded batches of one size.

    Args:
        fn: maps arrays of leading axis B to a pytree of such.
        *arrays: of one length.
        batch_size: B.
        on_batch: is told after each batch how many images it had.
    """
    outputs, count = [], len(arrays[0])
    if not count:
        batch = (jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype) for a in arrays)
        shapes = jax.eval_shape(fn, *batch)
        return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
    for start in range(0, count, batch_size):
        # Past the end come images from the start again, which are cut off below.
        rows = np.arange(start, start + batch_size) % count
        outputs.append(jax.device_get(fn(*(divide(array[rows]) for array in arrays))))
        on_batch(min(batch_size, count - start))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)
