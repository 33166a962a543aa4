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

from occjax import convolution, incremental, occlusion, vgg
from occjax.types import UsageError

# Python, JAX, and what compiling takes: on CPU they share the memory with the maps.
_PROCESS = 2**29

_UNITS = {'': 0, 'k': 1, 'm': 2, 'g': 3, 't': 4}
_FLOAT = 4


class Needs(NamedTuple):
    """Bytes that mapping takes on one device: in any case, for each image, for each window."""

    fixed: int
    image: int
    window: int
    grid: int  # windows of an image

    def total(self, images: int, windows: int) -> int:
        """Returns the bytes for some images and windows at once."""
        return self.fixed + images * self.image + windows * self.window

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


def needs(
    name: str,
    image_shape: tuple[int, int],
    *,
    plan: vgg.Plan,
    num_classes: int = 10,
    hidden: int = 4096,
    levels: int = 1,
    **geometry: Any,
) -> Needs:
    """Returns an upper bound of what `engine.occluded_logits` takes, its arguments included.

    Args:
        name: of the engine; the approximate one takes no more than the incremental.
        image_shape: `(H, W)`.
        plan: the VGG.
        num_classes, hidden, levels: see `vgg.init`.
        **geometry: size, stride and grid, see `occlusion.grid_shape`.
    """
    head = dict(num_classes=num_classes, hidden=hidden, levels=levels)
    rows = vgg.summary(image_size=image_shape, plan=plan, **head)
    grid = math.prod(occlusion.grid_shape(image_shape, **geometry))
    regions = incremental.patches(image_shape, plan=plan, **geometry)[1:]
    on_cpu = jax.default_backend() == 'cpu'
    # Weights twice: they are read from disk or made at random before they lie on the device.
    fixed = 2 * sum(row.parameters for row in rows)
    sides, channels, clean, whole, patch, tiles = image_shape, 3 * levels, 0, 0, 0, 0
    for layer, region in zip(plan, regions, strict=True):
        inputs = math.prod(sides) * channels
        scale, margin = (2, 1) if layer == 'M' else (1, 2)
        cut = math.prod(scale * side + margin for side in region.shape) * channels
        if layer == 'M':
            sides = [side // 2 for side in sides]
        else:
            if on_cpu:  # Winograd, of 6x6 kernels and with tiles of at most 4 times the pixels.
                fixed += 36 * channels * layer
                tiles = max(tiles, 4 * math.prod(sides) * (channels + layer))
            channels = layer
        outputs = math.prod(sides) * channels
        clean += 2 * inputs  # As it is, and padded.
        whole = max(whole, 2 * inputs + 4 * outputs)
        patch = max(patch, 2 * cut + 4 * math.prod(region.shape) * channels)
    fixed += 3 * max(tiles, convolution._TILE_BYTES // _FLOAT)
    # All windows' last features wait for the linear layers, twice where they are laid out anew.
    image = 2 * math.prod(image_shape) * 3 + grid * (3 * outputs + 3 * hidden + 2 * num_classes)
    window = whole
    if name != 'full':
        image, window = image + clean + whole, patch + 2 * outputs
    process = _PROCESS // sharers() if on_cpu else 0
    return Needs(_FLOAT * fixed + process, _FLOAT * image, _FLOAT * window, grid)
