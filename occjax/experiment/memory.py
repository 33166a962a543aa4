"""How many windows and images fit into memory, from shapes alone.

What a program keeps at once is bounded layer by layer: a layer's input, output and what it needs
between them. The bounds lie above what XLA plans, by up to a few times, so that a limit is kept
on every backend without a trial.

Dimensions: B batch, H W C image, P windows.
"""

import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from occjax import convolution, incremental
from occjax.incremental import Plan
from occjax.tracing import Value
from occjax.types import UsageError

# Python, JAX, and what compiling takes: on CPU they share the memory with the maps.
_PROCESS = 2**29

_UNITS = {'': 0, 'k': 1, 'm': 2, 'g': 3, 't': 4}
_FLOAT = 4


class Needs(NamedTuple):
    """Bytes that mapping takes on one device."""

    fixed: int  # in any case
    image: int  # for each image that is there
    unoccluded: int  # for each image whose windows are computed
    window: int  # for each window at once
    grid: int  # windows of an image

    def total(self, images: int, windows: int) -> int:
        """Returns the bytes for some images and windows at once."""
        form = incremental.loop_of(images)
        mapped = incremental.images_at_once(images, self.grid, windows, form)
        variable = images * self.image + mapped * self.unoccluded + windows * self.window
        return self.fixed + variable

    def fit(self, limit: int, *, images: int, windows: int, devices: int = 1) -> tuple[int, int]:
        """Returns how many images and windows at once stay below `limit`, at most those given.

        Args:
            limit: bytes, of which each of `devices` has its part.
            images, windows: that one device should take at once, memory permitting.
            devices: that share the memory.

        Raises:
            UsageError: if not even one window of one image does.
        """
        least = self.total(1, 1)
        if limit // devices < least:
            mebibytes = math.ceil(devices * least / 2**20)
            raise UsageError(
                f'A memory limit of {limit / 2**20:.0f} MiB is too small for one window: these '
                f'images and this classifier take --memory_limit={mebibytes}MiB.'
            )
        limit //= devices
        for count in range(images, 0, -1):
            # Windows at once may be of several images, but there are no more than all of them.
            at_once = min(windows, count * self.grid)
            if self.total(count, at_once) <= limit:
                return count, at_once
        return 1, 1 + (limit - least) // self.window


def parse(text: str) -> int:
    """Returns the bytes that a text such as 4GiB, 500MB, 2G or 1000000 means.

    As in Kubernetes and elsewhere, `Gi` and `GiB` count by 1024, `G` and `GB` by 1000.

    Raises:
        UsageError: if it means none.

    >>> parse('4GiB'), parse('500 MB')
    (4294967296, 500000000)
    """
    found = re.fullmatch(r'(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?', text.strip().lower())
    fits = found and (found[2] or not found[3]) and 0 < float(found[1]) < 2**63
    if not fits:
        raise UsageError(f'--memory_limit={text}: expected bytes, such as 4GiB, 500MB or 2G.')
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2]])


def available() -> int:
    """Returns what heat maps may take if no limit is given: a device's memory, or half of a host's.

    On CPU that is of the computer or, where it has less, of the container.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    if stats and 'bytes_limit' in stats:
        return stats['bytes_limit']
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    container = pathlib.Path('/sys/fs/cgroup/memory.max')
    if container.exists() and container.read_text().strip().isdigit():
        size = min(size, int(container.read_text()))
    return size // 2


def sharers() -> int:
    """Returns how many devices share a limit: CPU devices have one memory, others their own."""
    return jax.local_device_count() if jax.default_backend() == 'cpu' else 1


def needs(name: str, plan: Plan, variables: Any) -> Needs:
    """Returns an upper bound of what `engine.occluded_logits` takes, its arguments included.

    Args:
        name: of the engine; the approximate one takes no more than the incremental.
        plan: of the network, see `incremental.planned`.
        variables: of the network, or their shapes.
    """
    operations, (image,) = plan.program.operations, plan.program.arguments
    on_cpu, grid = jax.default_backend() == 'cpu', math.prod(plan.grid)
    # Weights twice: they are read from disk or made at random before they lie on the device. Once
    # more as the network lays them out, its normalisation folded in.
    fixed = 3 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    if on_cpu:
        chunks, kernels = zip((0, 0), *map(convolution.scratch, operations), strict=True)
        fixed += 3 * max(chunks) + sum(kernels)
    whole = 2 * _peak([(operation, operation.shapes, 1) for operation in operations])
    pixels, classes = math.prod(image.shape), math.prod(plan.logits.extent)
    per_image, window = 2 * pixels + 2 * grid * classes, 2 * pixels + whole
    unoccluded = 0
    if name != 'full':
        # Unoccluded values are kept as they are and padded; what the last layers read, of every
        # window, twice where it is laid out anew, and what they make of it.
        reads = [read for step in plan.steps for read in step.reads if read.pads is not None]
        clean = {read.key: math.prod(np.shape(read.source)) for read in reads}
        last = plan.steps[plan.tail :]
        waiting = sum(math.prod(step.reads[0].extent) + math.prod(step.shape) for step in last)
        unoccluded = 2 * pixels + 2 * sum(clean.values()) + whole + 3 * grid * waiting
        first = plan.steps[: plan.tail]
        window = 2 * _peak(
            [(s.operation, [read.extent for read in s.reads], s.share) for s in first]
        )
    process = _PROCESS // sharers() if on_cpu else 0
    sizes = (_FLOAT * size for size in (per_image, unoccluded, window))
    return Needs(_FLOAT * fixed + process, *sizes, grid)


def _peak(steps):
    """Returns the most numbers that are alive at once.

    Args:
        steps: operations, their operands' shapes, and the share of the result that is computed.
    """
    last = {x: n for n, (made, *_) in enumerate(steps) for x in (*made.values, *made.results)}
    alive, most = {}, 0
    for n, (operation, shapes, share) in enumerate(steps):
        read = zip(operation.operands, shapes, strict=True)
        alive |= {x: math.prod(shape) for x, shape in read if isinstance(x, Value)}
        alive |= {x: math.ceil(share * math.prod(x.shape)) for x in operation.results}
        most = max(most, sum(alive.values()))
        alive = {x: count for x, count in alive.items() if last[x] > n}
    return most
