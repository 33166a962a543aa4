"""Occlusion heatmaps of any classifier (Zeiler & Fergus 2014; paper §III-C).

Images are float32 in [0, 1], NHWC. A heatmap pixel is the *probability* of the explained
class while one window is covered: high means the covered pixels did not matter.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import checks, fills
from occjax.fills import Fill
from occjax.types import Array, LogitsFn, promoting

Sides = int | tuple[int, int]  # of rows and columns alike, or (rows, columns)
ProgressFn = Callable[[int, int], None]  # called with how many are done, and how many there are


def _starts(
    image_shape: tuple[int, int], *, size: Sides, stride: Sides, grid: str
) -> tuple[list[int], list[int]]:
    """Returns the first pixels of the windows along the rows and the columns of an image."""
    sizes, strides = checks.sides('size', size), checks.sides('stride', stride)
    rows, columns = (
        _along(*side, grid=grid) for side in zip(image_shape, sizes, strides, strict=True)
    )
    return rows, columns


def _along(side: int, size: int, stride: int, *, grid: str) -> list[int]:
    """Returns the first pixel of every window along one side of an image."""
    if size > side:
        raise ValueError(f'Window size {size} exceeds the image side {side}.')
    room = side - size
    if grid == 'paper':
        return [stride * i for i in range(math.ceil(room / stride))]
    if grid not in ('floor', 'cover'):
        raise ValueError(f"Expected grid 'paper', 'floor' or 'cover', got {grid!r}.")
    starts = list(range(0, room + 1, stride))
    return starts + [room] if grid == 'cover' and starts[-1] < room else starts


def grid_shape(
    image_shape: tuple[int, int], *, size: Sides, stride: Sides, grid: str = 'paper'
) -> tuple[int, int]:
    """Returns the heatmap shape `(h, w)` of images of `image_shape = (H, W)`.

    Size and stride are one number for both sides, or (rows, columns). Rules, a side: `paper`
    ⌈(side − size) / stride⌉ (§III-C; one fewer than usual where stride divides side − size, and
    none where the window is as large as the image), `floor` ⌊(side − size) / stride⌋ + 1, `cover`
    the same and, where pixels would remain at the far edge, one more window that ends there.

    Raises:
        ValueError: for a window larger than the image, sizes or strides that are not integers from
            1, another rule.

    >>> grid_shape((32, 32), size=15, stride=5)
    (4, 4)
    >>> grid_shape((224, 224), size=32, stride=14)
    (14, 14)
    >>> grid_shape((32, 32), size=(15, 8), stride=(5, 4))
    (4, 6)
    """
    rows, columns = _starts(image_shape, size=size, stride=stride, grid=grid)
    return len(rows), len(columns)


def window_origins(
    image_shape: tuple[int, int], *, size: Sides, stride: Sides, grid: str = 'paper'
) -> np.ndarray:
    """Returns the `[P, 2]` top-left pixels (row, column) of the windows, row by row.

    Raises:
        ValueError: as `grid_shape`, and if the grid has no window at all.
    """
    rows, columns = _starts(image_shape, size=size, stride=stride, grid=grid)
    if not rows or not columns:
        raise ValueError(
            f'A window of size {size} in an image of {tuple(image_shape)} leaves no cell under '
            f"grid={grid!r}; use a smaller one, or grid='floor'."
        )
    # Row-major, so that a reshape to (h, w) gives the grid.
    return np.array([(row, column) for row in rows for column in columns], np.int32)


@promoting
def occlude(images: Array, origin: Array, *, size: Sides, fill: Fill = 0.5) -> Array:
    """Covers one window of every image.

    Args:
        images: `[..., H, W, C]`.
        origin: `[2]`, row and column of the window's top-left pixel; may be traced.
        size: of the window in pixels, one side of a square or (rows, columns).
        fill: what covers it: one value, `[C]` values, whole images, 'blur' or 'mean', see
            `fills.of`.

    Returns:
        The images with `fill` inside the window, untouched outside.

    Raises:
        ValueError: if the images are integers, of which `fill` would be one, `size` is none, or
            `fill` does not fit them.
    """
    images = checks.floats(images)
    fill, (rows, columns) = fills.of(fill, images), checks.sides('size', size)
    height, width = images.shape[-3:-1]
    row, column = jnp.arange(height)[:, None] - origin[0], jnp.arange(width) - origin[1]
    covered = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    # A select, not a scatter: with traced origins under vmap a scatter copies whole images.
    return jnp.where(covered[..., None], fill, images)


_compiled_for: contextvars.ContextVar[str | None] = contextvars.ContextVar('target', default=None)


def platform() -> str:
    """Returns what programs are compiled for: 'cpu', 'gpu', 'cuda' or 'tpu'."""
    return _compiled_for.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Makes `platform` another one than this process runs on, whose compiler is asked."""
    token = _compiled_for.set(name)
    try:
        yield
    finally:
        _compiled_for.reset(token)


def default_chunk(image_shape: tuple[int, ...]) -> int:
    """Returns how many masked images one call of the classifier should see."""
    # On CPU a chunk pays only as far as its activations stay in the cache. At 32 pixels 1,024
    # windows took 1.02 s by 128, 1.09 by 512, 1.26 by 32; at 224 in full by 14 no more than by 7 or
    # 28, and incrementally 1.51 s a map (size 32, stride 14) by 14 windows, 1.57 by 28, 1.78 by 7.
    values = math.prod(image_shape)
    if platform() == 'cpu':
        return max(1, min(128, 14 * 224**2 * 3 // values))
    return max(1, 2**25 // values)


def occluded_logits(
    logits_fn: LogitsFn,
    images: Array,
    *,
    size: Sides,
    stride: Sides,
    fill: Fill = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
) -> Array:
    """Returns the classifier's logits under every window of every image.

    Every (image, window) pair is one forward pass; they are laid end to end and mapped over in
    chunks, so memory is bounded by `chunk_size` however many images there are, and neither the
    chunk nor an image's neighbours change the numbers (beyond the last float bits), as long as
    `logits_fn` treats each image of its batch alone: batch statistics would see the other windows.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically. It sees a chunk
            of masked images as a batch, so it may call the host (`jax.pure_callback`) or be
            compiled for batches of `chunk_size` (`jax.jit(...).lower(...).compile()`).
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        size: of a window in pixels, the paper's O_l: one side of a square, or (rows, columns).
        stride: its step in pixels, the paper's O_s: one for both sides, or (down, to the right).
        fill: what covers a window: one value, `[C]` values, an image or `[B, H, W, C]` of them, or
            'blur' or 'mean' of each image, see `fills.of`.
        grid: where windows are, see `grid_shape`.
        chunk_size: masked images that a call of `logits_fn` sees, at most all; None chooses for the
            device. The last call is filled up with images from the start.
        progress: called with how many windows of all images are done, and how many there are, see
            `map_chunks`.

    Returns:
        `[B, h, w, K]`, cell `[row, column]` for the window at that place in the image.

    Raises:
        ValueError: if the windows do not fit the images, see `window_origins`, or images, fill or
            logits are not what they should be, see `checks`.

    References:
        Zeiler & Fergus, https://arxiv.org/abs/1311.2901
    """
    logits_fn = checks.logits_fn(logits_fn)
    images = checks.images(images, slack=checks.NEAR)
    geometry = dict(size=size, stride=stride, grid=grid)
    origins = jnp.asarray(window_origins(images.shape[1:3], **geometry))
    fill = fills.of(fill, images)
    mask = jax.vmap(functools.partial(occlude, size=size))

    def logits_of(image, window):
        return logits_fn(mask(images[image], origins[window], fill=fill[image]))

    is_traced = not isinstance(logits_fn, jax.stages.Compiled)
    settings = dict(chunk_size=chunk_size, is_traced=is_traced, progress=progress)
    logits = map_pairs(logits_of, images.shape, len(origins), **settings)
    checks.warn_of_probabilities(checks.are_probabilities(logits))
    return logits.reshape(len(images), *grid_shape(images.shape[1:3], **geometry), -1)


def map_pairs(
    fn: Callable[[Array, Array], Any],
    images_shape: tuple[int, ...],
    count: int,
    *,
    chunk_size: int | None,
    is_traced: bool,
    progress: ProgressFn | None,
) -> Any:
    """Returns `fn(image, number)`, `[B, count, ...]`, of every image with every number.

    Args:
        fn: maps `[n]` images by their index, and `[n]` numbers, to a pytree of leading axis n; of
            each pair it makes one image for the classifier.
        images_shape: `(B, H, W, C)`.
        count: how many numbers there are.
        chunk_size: n; None chooses for the device.
        is_traced, progress: see `map_chunks`.
    """
    mapped = map_chunks(
        lambda pairs: fn(pairs // count, pairs % count),
        images_shape[0] * count,
        chunk_size=default_chunk(images_shape[1:]) if chunk_size is None else chunk_size,
        is_exact=chunk_size is not None,
        is_traced=is_traced,
        progress=progress,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), mapped)


def map_chunks(
    fn: Callable[[Array], Any],
    count: int,
    *,
    chunk_size: int,
    is_exact: bool = False,
    is_traced: bool = True,
    progress: ProgressFn | None = None,
    before: int | Array = 0,
    each: int = 1,
    total: int | None = None,
) -> Any:
    """Returns `fn(arange(count))`, computed for at most `chunk_size` numbers at once.

    Progress is told on the host after each chunk. Chunks follow one another, so it never falls, and
    the last call says that all are done; it may come after the result does, and
    `jax.effects_barrier()` waits for it. Under `jax.shard_map` each device counts its own, under
    `vmap` each element its own. Under `jit` it is a part of the program: pass the same function, or
    each new one is compiled anew.

    Args:
        fn: maps `[n]` numbers to a pytree of leading axis n.
        count: how many there are.
        chunk_size: n, or where `is_exact` is not set fewer, so that all chunks are alike.
        is_exact: whether a call sees just `chunk_size` numbers, the last one some of them again.
        is_traced: whether `fn` may be traced.
        progress: called with how many numbers are done, and `count`; None leaves nothing of it in
            the program.
        before, each, total: where they are a part of something longer: how many are done before
            them, for how many each of them counts, and how many there are in all.
    """
    checks.number('chunk_size', chunk_size, range=checks.COUNT)
    chunks = math.ceil(count / chunk_size)
    size = min(chunk_size, count) if is_exact else math.ceil(count / chunks)
    # The last chunk is filled up with numbers from the start, which are cut off again.
    numbers = (jnp.arange(chunks * size, dtype=jnp.int32) % count).reshape(chunks, size)

    total = count if total is None else total

    def tell(before, first, _):
        progress(min(int(before) + each * min(int(first) + size, count), total), total)

    def telling(fn):
        def told(some):
            found = fn(some)
            # With a number of each result, so that it is there when it is told of.
            jax.debug.callback(
                tell, before, some[0], [x.ravel()[0] for x in jax.tree.leaves(found)]
            )
            return found

        return fn if progress is None else told

    if not is_traced:
        parts = [telling(fn)(some) for some in numbers]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)
    # Gradients compute a chunk's layers again: to keep those of all windows takes gigabytes.
    mapped = jax.lax.map(telling(jax.checkpoint(fn)), numbers)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], mapped)


def probabilities(logits: Array, classes: Array) -> Array:
    """Returns the `[B, ...]` softmax of `[B, ..., K]` logits at each image's class of `[B]`."""
    classes = checks.classes(classes, logits, logits.shape[-1], name='classes')
    at_class = jnp.expand_dims(classes, tuple(range(1, logits.ndim)))
    return jnp.take_along_axis(jax.nn.softmax(logits), at_class, axis=-1)[..., 0]


def heatmaps(
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    *,
    size: Sides,
    stride: Sides,
    fill: Fill = 0.5,
    grid: str = 'paper',
    chunk_size: int | None = None,
    progress: ProgressFn | None = None,
) -> Array:
    """Returns the probability of each image's class while each window is covered.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        classes: `[B]`, the class explained in each image, in the paper the predicted one.
        size, stride, fill, grid, chunk_size, progress: see `occluded_logits`.

    Returns:
        `[B, h, w]` heatmaps in [0, 1].

    Raises:
        ValueError: as `occluded_logits`, and if `classes` is not one class for each image.
    """
    settings = dict(size=size, stride=stride, fill=fill, grid=grid, chunk_size=chunk_size)
    settings |= dict(progress=progress)
    return heatmaps_by(occluded_logits, logits_fn, images, classes, **settings)


def heatmaps_by(
    occluded_fn: Callable[..., Array],
    logits_fn: LogitsFn,
    images: Array,
    classes: Array,
    **settings: Any,
) -> Array:
    """Returns `heatmaps` by another form of `occluded_logits`, with its own settings."""
    images = checks.images(images, slack=checks.NEAR)
    classes = checks.classes(classes, images, name='classes')
    logits_fn = checks.logits_fn(logits_fn, classes, name='classes')
    logits = occluded_fn(logits_fn, images, **settings)
    checks.warn_of_probabilities(checks.are_probabilities(logits))
    return probabilities(logits, classes)
