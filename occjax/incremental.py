"""Exact occlusion heatmaps of any network, computing again only what a window changes.

A function of images is traced for one image, and each of its operations has a rule: what an index
of its result reads of its operands (`rules`). From rules alone follows, on the host, a `Region` for
every value: the box that each window changes. XLA needs boxes of one shape: a value's is the
largest of all windows, and those near an edge move inwards until it fits, which computes some
unchanged numbers again but no wrong ones. The unoccluded image is evaluated once; for each window
an operation is evaluated on its box alone, from operands cut out of unoccluded values with the
changed boxes pasted into them. What no rule confines (a global mean, attention) is a region like
others, the whole value, and so is all that follows from it.

Two knobs make less of it, each exact at its default of 1. `threshold` stops the growth of regions:
what reads its neighbours widens them to no more than this share of a side, and beyond it unoccluded
numbers stay (the projective field threshold τ of Krypton; unlike there, the share is never taken
from what is changed already). `every` computes every n-th window a side, the last one included, and
interpolates the logits of the others: windows overlap, so maps are smooth.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, P = h * w windows.

References:
    Nakandala et al., https://adalabucsd.github.io/papers/2019_Krypton_SIGMOD.pdf
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from occjax import checks, convolution, fills, occlusion, tracing
from occjax.fills import Fill
from occjax.occlusion import ProgressFn, Sides
from occjax.rules import RULES, Rule
from occjax.tracing import Operation, Program, Value
from occjax.types import Array, LogitsFn

# --- Planning, on the host: the region of every value, and how each box is put together. ----------

# A box that is this share of a value is the whole of it: nothing is cut and pasted then.
_WHOLE = 0.9


class Region(NamedTuple):
    """What each window changes of a value: nothing outside of [low, stop)."""

    low: np.ndarray  # i64[P, axes]
    stop: np.ndarray  # i64[P, axes]
    shape: tuple[int, ...]  # of every window's box
    start: np.ndarray  # i64[P, axes], where it is: moved inwards at the far edges


def _region(low, stop, sides, whole=_WHOLE):
    shape = (stop - low).max(axis=0)
    if math.prod(shape) >= whole * math.prod(sides):
        low, stop, shape = np.zeros_like(low), np.broadcast_to(sides, low.shape), np.array(sides)
    return Region(low, stop, tuple(map(int, shape)), np.minimum(low, sides - shape))


class Read(NamedTuple):
    """How a box of an operand is put together for each window."""

    source: Any  # a `Value`, or an array that is known
    first: np.ndarray  # i64[P, axes] where to cut: in the changed box, or the padded clean value
    extent: tuple[int, ...]  # what to cut
    pads: tuple[tuple[int, int], ...] | None = None  # of the clean value; None: in the changed box
    fill: Any = 0.0  # with what it is padded
    at: np.ndarray | None = None  # i64[P, axes] where to paste the changed box
    trim: tuple[tuple[int, int], ...] = ()  # margins to take off again

    @property
    def key(self) -> tuple:
        """What tells padded values apart."""
        fill = self.fill if np.any(self.pads) else None
        return id(self.source), self.pads, fill if isinstance(fill, float) else id(fill)


class Step(NamedTuple):
    """An operation on the boxes of its operands."""

    operation: Operation
    params: dict[str, Any]
    reads: tuple[Read, ...]
    shape: tuple[int, ...]  # of the box of its first result

    @property
    def share(self) -> float:
        """How much of the operation a window computes."""
        return math.prod(self.shape) / max(1, math.prod(self.operation.results[0].shape))


class Plan(NamedTuple):
    """What is computed once an image, and what for each of its windows."""

    program: Program
    origins: np.ndarray  # i32[P, 2]
    steps: list[Step]
    tail: int  # the first of the steps that are taken for all windows of all chunks at once
    logits: Read
    knots: tuple[list[int], list[int]]  # the rows and columns of the grid that are computed
    grid: tuple[int, int]

    @property
    def ratio(self) -> float:
        """How many times fewer multiplications a map's windows take than in full."""
        full = sum(map(multiplications, self.program.operations))
        window = sum(multiplications(step.operation) * step.share for step in self.steps)
        return full * math.prod(self.grid) / max(1, window * len(self.origins))

    @property
    def calls_host(self) -> bool:
        """Whether the network calls Python, which `vmap` may not know how to map."""
        return any(
            'callback' in name
            for operation in self.program.operations
            for name in tracing.primitives(operation.name, operation.params)
        )


def plan(
    logits_fn: LogitsFn,
    image_shape: tuple[int, int, int],
    *,
    size: Sides,
    stride: Sides,
    grid: str = 'paper',
    threshold: float = 1.0,
    every: int = 1,
    dtype: Any = jnp.float32,
) -> Plan:
    """Returns what windows change of each value between images and logits.

    Args:
        logits_fn: see `occluded_logits`.
        image_shape: `(H, W, C)`.
        size, stride, grid: see `occlusion.occluded_logits`.
        threshold, every: see `occluded_logits`.
        dtype: of the images.
    """
    program = tracing.program(*traced(logits_fn, image_shape, dtype))
    settings = dict(size=size, stride=stride, grid=grid, threshold=threshold, every=every)
    return plan_of(program, **settings)


def traced(logits_fn: LogitsFn, image_shape: tuple[int, int, int], dtype: Any) -> tuple:
    """Returns the jaxpr of a function of one image, and the shape of its logits."""
    image = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    checked = checks.logits_fn(tracing.plain(logits_fn))
    return tracing.jaxpr_of(checked, image)


def plan_of(
    program: Program,
    *,
    size: Sides,
    stride: Sides,
    grid: str = 'paper',
    threshold: float = 1.0,
    every: int = 1,
) -> Plan:
    """Returns `plan` of the program of a function of one image."""
    if not 0 < threshold <= 1:
        raise ValueError(f'Expected 0 < threshold <= 1, got {threshold}.')
    if every < 1:
        raise ValueError(f'Expected every >= 1, got {every}.')
    geometry, (image,) = dict(size=size, stride=stride, grid=grid), program.arguments
    origins = occlusion.window_origins(image.shape[1:3], **geometry)
    shape = occlusion.grid_shape(image.shape[1:3], **geometry)
    knots = tuple(sorted({*range(0, count, every), count - 1}) for count in shape)
    origins = origins.reshape(*shape, 2)[np.ix_(*knots)].reshape(-1, 2)
    low = np.pad(origins.astype(np.int64), ((0, 0), (1, 1)))
    stop = low + [1, *checks.sides('size', size), image.shape[-1]]
    # Of the image itself: a window's box is its own size, whatever share that is.
    regions, steps = {image: _region(low, stop, image.shape, whole=math.inf)}, []
    for operation in program.operations:
        step = _step(operation, regions, threshold)
        steps += [step] if step else []
    (logits,) = program.outputs
    everything = np.zeros((len(origins), 2), int), np.shape(logits)
    changed = regions.get(logits) if isinstance(logits, Value) else None
    logits = _read(logits, changed, *everything, 0.0)
    return Plan(program, origins, steps, _tail(steps), logits, knots, shape)


def _step(operation, regions, threshold):
    """Returns how an operation is computed again, and adds its results' regions; None if not."""
    changed = [regions.get(x) if isinstance(x, Value) else None for x in operation.operands]
    if not any(changed):
        return None
    rule = RULES.get(operation.name, lambda operation: None)(operation)
    if rule is None or isinstance(rule.fill, Value):
        rule = Rule(({},) * len(changed))
    found = [_changes(rule, changed, result.shape, threshold) for result in operation.results]
    if not found[0]:
        return None
    regions.update(zip(operation.results, found, strict=True))
    region, sides = found[0], operation.results[0].shape
    boxed = [i for i, n in enumerate(sides) if region.shape[i] < n]
    reads = []
    for x, before, links in zip(operation.operands, changed, rule.links, strict=True):
        extent = list(np.shape(x))
        first = np.zeros((len(region.start), len(extent)), int)
        for i, link in links.items():
            if link.axis in boxed:
                first[:, i] = region.start[:, link.axis] * link.stride - link.pad
                extent[i] = (region.shape[link.axis] - 1) * link.stride + link.reach
        reads.append(_read(x, before, first, tuple(extent), rule.fill))
    params = operation.params | rule.params(boxed, region.shape)
    return Step(operation, params, tuple(reads), region.shape)


def _changes(rule, changed, sides, threshold):
    """Returns the region of a result; None if no window reaches it."""
    lows, stops = [], []
    for region, links in zip(changed, rule.links, strict=True):
        if region is None:
            continue
        low = np.zeros((len(region.low), len(sides)), int)
        stop = low + np.array(sides, int)
        for i, (axis, stride, pad, reach) in links.items():
            first = -((region.low[:, i] + pad - reach + 1) // -stride)
            low[:, axis] = np.clip(first, 0, sides[axis])
            last = (region.stop[:, i] - 1 + pad) // stride + 1
            stop[:, axis] = np.clip(last, low[:, axis], sides[axis])
            if reach > stride and threshold < 1:
                least = math.ceil(region.shape[i] / stride)
                width = np.minimum(
                    stop[:, axis] - low[:, axis], max(least, int(threshold * sides[axis]))
                )
                low[:, axis] += (stop[:, axis] - low[:, axis] - width) // 2
                stop[:, axis] = low[:, axis] + width
        lows.append(low)
        stops.append(stop)
    low, stop = np.minimum.reduce(lows), np.maximum.reduce(stops)
    return _region(low, stop, sides) if (stop > low).all(axis=1).any() else None


def _read(x, region, first, extent, fill):
    """Returns how the box of that extent is read of a value of which a region has changed."""
    at, trim = None, ()
    if region is not None:
        offset, width = region.start - first, np.array(region.shape)
        if (offset <= 0).all() and (offset + width >= extent).all():
            return Read(x, -offset, extent)
        left = np.maximum(0, -offset.min(axis=0))
        right = np.maximum(0, (offset + width - extent).max(axis=0))
        first, extent = first - left, tuple(map(int, extent + left + right))
        at, trim = offset + left, tuple(zip(left.tolist(), right.tolist(), strict=True))
    low = np.maximum(0, -first.min(axis=0, initial=0))
    high = np.maximum(0, (first + extent).max(axis=0, initial=0) - np.array(np.shape(x), int))
    pads = tuple(zip(low.tolist(), high.tolist(), strict=True))
    return Read(x, first + low, extent, pads, fill, at, trim)


def _tail(steps):
    """Returns from where on steps are linear layers of one row a window, and what is between.

    Taken for all windows at once, they read their weights, hundreds of megabytes, once.
    """
    start = len(steps)
    for i, step in reversed(list(enumerate(steps))):
        name, shapes = step.operation.name, step.operation.shapes
        if name.startswith(('conv', 'reduce_window')):
            break
        if name == 'dot_general' and math.prod(shapes[0]) == max(shapes[0]) < math.prod(shapes[1]):
            start = i
    return start


def multiplications(operation: Operation) -> int:
    """Returns those of convolutions and matrix products, from shapes."""
    return _multiplications(
        operation.name, operation.params, operation.shapes, operation.results[0].shape
    )


def _multiplications(name, params, shapes, out):
    if name == 'conv_general_dilated':
        numbers = params['dimension_numbers']
        return math.prod(out) * math.prod(shapes[1]) // shapes[1][numbers.rhs_spec[0]]
    if name == 'dot_general':
        return math.prod(out) * math.prod(shapes[0][i] for i in params['dimension_numbers'][0][0])
    inner = (
        _multiplications(
            eqn.primitive.name,
            eqn.params,
            [x.aval.shape for x in eqn.invars],
            eqn.outvars[0].aval.shape,
        )
        for jaxpr in tracing.jaxprs(params)
        for eqn in jaxpr.eqns
        if eqn.outvars
    )
    return sum(inner) * params.get('length', 1)


def flop_ratio(
    fn: Callable[..., Array], image_shape: tuple[int, int, int], *weights: Any, **settings: Any
) -> float:
    """Returns how many times fewer multiplications a map's windows take than in full.

    Args:
        fn, image_shape, *weights, **settings: see `planned`.
    """
    return planned(fn, image_shape, *weights, **settings).ratio


def planned(
    fn: Callable[..., Array], image_shape: tuple[int, int, int], *weights: Any, **settings: Any
) -> Plan:
    """Returns a plan of which shapes alone are meant: nothing is computed.

    Args:
        fn: maps weights, if any are given, and images to logits.
        image_shape: `(H, W, C)`.
        *weights: arrays or shapes.
        **settings: size, stride, grid, threshold and every, see `occluded_logits`.

    >>> from occjax import vgg
    >>> weights = jax.eval_shape(lambda: vgg.init(jax.random.key(0), image_size=224))
    >>> round(planned(vgg.logits, (224, 224, 3), weights, size=32, stride=14).ratio, 1)
    6.0
    """
    found = []

    def look(*weights):
        found.append(plan(functools.partial(tracing.plain(fn), *weights), image_shape, **settings))

    jax.eval_shape(look, *weights)
    return found[0]


class Row(NamedTuple):
    """Operations of one kind in a row: what a window computes of them."""

    name: str
    shape: tuple[int, ...]  # of the result, for one image
    count: int
    share: float  # of the result's values that a window computes
    multiplications: int  # of all of them together, in full


class Explanation(NamedTuple):
    """What a window computes of a network, operation by operation; its `str` is a table."""

    rows: tuple[Row, ...]
    whole: int | None  # the first row that is computed whole, if one is

    def __str__(self):
        lines = [f'{"operation":34}{"result":>28}{"share":>8}{"multiplications":>18}']
        for name, shape, count, share, products in self.rows:
            name = f'{name[:26]} x {count}' if count > 1 else name[:32]
            shape = 'x'.join(map(str, shape))[:26]
            lines.append(f'{name:34}{shape:>28}{share:>8.1%}{products:>18,}')
        if self.whole is None:
            return '\n'.join([*lines, 'Nothing is computed whole.'])
        after = sum(row.multiplications for row in self.rows[self.whole :])
        share = after / max(1, sum(row.multiplications for row in self.rows))
        name = self.rows[self.whole].name[:26]
        last = f'{name} is the first that is computed whole, and from it on {share:.1%} of all.'
        return '\n'.join([*lines, last])


def explain(
    logits_fn: Callable[..., Array],
    image_shape: tuple[int, int, int],
    *weights: Any,
    size: Sides,
    stride: Sides,
    grid: str = 'paper',
) -> Explanation:
    """Returns a row per operation: which share of its values a window changes.

    A share grows with each convolution, and at once where an operation reads far pixels, along one
    side or both; where it jumps, look there first.

    Args:
        logits_fn, image_shape, *weights: see `planned`.
        size, stride, grid: pixels, see `occlusion.occluded_logits`.
    """
    found = planned(logits_fn, image_shape, *weights, size=size, stride=stride, grid=grid)
    shares = {step.operation.results[0]: step.share for step in found.steps}
    rows = []
    for operation in found.program.operations:
        result = operation.results[0]
        kind, share = (operation.name, result.shape), shares.get(result, 0.0)
        row = Row(*kind, 1, share, multiplications(operation))
        if rows and rows[-1][:2] == kind and rows[-1].share == share:
            before = rows.pop()
            both = before.multiplications + row.multiplications
            row = row._replace(count=before.count + 1, multiplications=both)
        rows.append(row)
    whole = (i for i, row in enumerate(rows) if row.share == 1)
    return Explanation(tuple(rows), next(whole, None))


# --- Evaluation. ----------------------------------------------------------------------------------


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
    threshold: float = 1.0,
    every: int = 1,
) -> Array:
    """Returns `occlusion.occluded_logits`, computing only what a window changes.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits, deterministically and each image
            on its own. It is traced for one image, and mapped over by `vmap`.
        images: `[B, H, W, C]` in [0, 1]; H and W may differ.
        size, stride, fill, grid: see `occlusion.occluded_logits`.
        chunk_size: windows that are computed at once; None chooses for the device. Unoccluded
            values are made and kept for the images of a chunk alone, so that memory does not grow
            with images; a gradient keeps those of all.
        progress: called with how many windows of all images are done, and how many are computed,
            see `occlusion.map_chunks`.
        threshold: share of a side, in (0, 1], to which what a window changes may grow.
        every: how many grid cells a side there are for one that is computed.

    Returns:
        `[B, h, w, K]`, by default equal to the plain form's up to the rounding of sums.

    Raises:
        ValueError: as `occlusion.occluded_logits`, and for a knob out of its range.
    """
    images = checks.images(images, slack=checks.NEAR)
    settings = dict(size=size, stride=stride, grid=grid, threshold=threshold, every=every)
    found = plan(logits_fn, images.shape[1:], **settings, dtype=images.dtype)
    return evaluate(found, images, size=size, fill=fill, chunk_size=chunk_size, progress=progress)


def evaluate(
    plan: Plan,
    images: Array,
    *,
    size: Sides,
    fill: Fill,
    chunk_size: int | None,
    progress: ProgressFn | None,
    form: str | None = None,
) -> Array:
    """Returns `occluded_logits` of a plan; `form` is `loop_of`'s unless it is given."""
    form = form or loop_of(len(images))
    if chunk_size is None:
        chunk_size = occlusion.default_chunk(images.shape[1:])
        # Of images at once each has its unoccluded values beside the window's.
        chunk_size = max(1, chunk_size // 8) if form == 'images' else chunk_size
    logits = _evaluate(plan, images, fill, checks.sides('size', size), chunk_size, progress, form)
    logits = logits.reshape(len(images), *map(len, plan.knots), -1)
    if math.prod(plan.grid) == len(plan.origins):
        return logits
    rows, columns = map(_weights, plan.grid, plan.knots)
    return jnp.einsum('bijk,hi,wj->bhwk', logits, rows, columns, precision='highest')


def loop_of(count: int) -> str:
    """Returns what is computed at once of that many images: their 'windows', or 'images'.

    Windows at once have corners of their own, which a TPU cuts out one after another; a window of
    several images at once has the same, but fills a TPU only from some images on. On CPU and GPU
    windows at once are as fast or faster.
    """
    return 'images' if occlusion.platform() == 'tpu' and count >= 8 else 'windows'


def images_at_once(count: int, windows: int, chunk_size: int, form: str) -> int:
    """Returns of how many images unoccluded values are kept at once."""
    most = chunk_size if form == 'images' else math.ceil(chunk_size / windows)
    return math.ceil(count / math.ceil(count / most)) if count else 1


def _weights(count, knots):
    """Returns the `[count, knots]` matrix of a cubic interpolation that keeps the knots."""
    weights = np.zeros((count, len(knots)))
    for cell in range(count):
        # Lagrange's polynomial through the four nearest: unlike a spline's, its reach is bounded.
        first = np.clip(np.searchsorted(knots, cell, 'right') - 2, 0, max(0, len(knots) - 4))
        near = range(first, min(first + 4, len(knots)))
        for i in near:
            others = [knots[j] for j in near if j != i]
            weights[cell, i] = np.prod([(cell - x) / (knots[i] - x) for x in others])
    return weights.astype(np.float32)


def _evaluate(plan, images, fill, size, chunk_size, progress, form):
    """Returns the `[B * P, K]` logits under all windows, of some images after others."""
    count, windows, (argument,) = len(images), len(plan.origins), plan.program.arguments
    at_once = images_at_once(count, windows, chunk_size, form)
    groups, pairs = math.ceil(count / at_once), at_once * windows
    values = [argument, *(x for operation in plan.program.operations for x in operation.results)]
    reads = [read for step in plan.steps for read in step.reads] + [plan.logits]
    reads = {read.key: read for read in reads if read.pads is not None}
    of_image = {key: 0 if isinstance(read.source, Value) else None for key, read in reads.items()}
    corners, live = np.pad(plan.origins, ((0, 0), (0, 1))), _live(plan)
    head, tail = plan.steps[: plan.tail], plan.steps[plan.tail :]

    def unoccluded(image):
        env = {argument: image[None]}
        for operation in plan.program.operations:
            tracing.run(operation, env, convolution.bind)
        return [env[x] for x in values]

    def one(cover, padded, window, image=None):
        env = {argument: _cut(cover, corners, (*size, cover.shape[-1]), window, image)[None]}
        _take(head, env, padded, image, window)
        return [env[x] for x in live]

    def of_group(numbers):
        some, first = images[numbers % count], numbers[0]
        cover = fills.of(fill, some) if isinstance(fill, str) else covers[numbers % count]
        # Whatever no window reads, XLA leaves out.
        clean = dict(zip(values, jax.vmap(unoccluded)(some), strict=True))
        padded = {key: _padded(read, clean) for key, read in reads.items()}
        settings = dict(progress=progress, before=first * windows, total=count * windows)

        def of_pairs(pairs):
            by_pair = jax.vmap(one, in_axes=(None, None, 0, 0))
            return by_pair(cover, padded, pairs % windows, pairs // windows)

        def of_window(window):  # [1]
            by_image = jax.vmap(one, in_axes=(0, of_image, None))
            return [x[None] for x in by_image(cover, padded, window[0])]

        def finish(pair, here):
            env, image, window = dict(zip(live, here, strict=True)), pair // windows, pair % windows
            _take(tail, env, padded, image, window)
            return _boxed(plan.logits, env, padded, image, window)[0]

        if form == 'images':
            here = occlusion.map_chunks(of_window, windows, chunk_size=1, each=at_once, **settings)
            here = [x.swapaxes(0, 1).reshape(pairs, *x.shape[2:]) for x in here]
        else:
            here = occlusion.map_chunks(of_pairs, pairs, chunk_size=chunk_size, **settings)
        return jax.vmap(finish)(jnp.arange(pairs, dtype=jnp.int32), here)

    covers = None if isinstance(fill, str) else fills.of(fill, images)
    numbers = jnp.arange(groups * at_once, dtype=jnp.int32).reshape(groups, at_once)
    logits = lax.map(of_group, numbers)
    return logits.reshape(-1, logits.shape[-1])[: count * windows]


def _live(plan):
    """Returns the changed values that the tail of a plan reads of what is before it."""
    before = {x for step in plan.steps[: plan.tail] for x in step.operation.results}
    before |= set(plan.program.arguments)
    reads = [read for step in plan.steps[plan.tail :] for read in step.reads] + [plan.logits]
    sources = (read.source for read in reads if isinstance(read.source, Value))
    return [x for x in dict.fromkeys(sources) if x in before]


def _take(steps, env, padded, image, window):
    """Adds the boxes that steps make of one window."""
    for step in steps:
        operands = [_boxed(read, env, padded, image, window) for read in step.reads]
        primitive, results = step.operation.primitive, step.operation.results
        is_own = step.shape != results[0].shape and primitive.name == 'custom_jvp_call'
        bind_fn = tracing.bind_pointwise if is_own else convolution.bind
        env.update(zip(results, bind_fn(primitive, step.params, operands), strict=True))


def _padded(read, clean):
    """Returns the unoccluded value that a box is cut out of, `[B, ...]` if it is an image's."""
    is_known = not isinstance(read.source, Value)
    x = jnp.asarray(read.source) if is_known else clean[read.source]
    if not np.any(read.pads):
        return x
    fill = read.fill
    if isinstance(fill, float) and jnp.issubdtype(x.dtype, jnp.integer):
        fill = int(np.clip(fill, jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max))
    lead = [] if is_known else [(0, 0, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), lead + [(*pad, 0) for pad in read.pads])


def _boxed(read, env, padded, image, window):
    """Returns one window's box of an operand."""
    if read.pads is None:
        return _cut(env[read.source], read.first, read.extent, window)
    lead = image if isinstance(read.source, Value) else None
    x = _cut(padded[read.key], read.first, read.extent, window, lead)
    if read.at is None:
        return x
    x = lax.dynamic_update_slice(x, env[read.source], _corner(read.at, window))
    return lax.slice(
        x,
        [left for left, _ in read.trim],
        [n - right for n, (_, right) in zip(x.shape, read.trim, strict=True)],
    )


def _cut(x, first, extent, window, image=None):
    """Returns one window's box of `x`, and of one image if `x` has them in front."""
    corner = _corner(first, window)
    if image is None:
        return x if x.shape == extent else lax.dynamic_slice(x, corner, extent)
    if x.shape[1:] == extent:
        return lax.dynamic_index_in_dim(x, image, keepdims=False)
    return lax.dynamic_slice(x, [image, *corner], [1, *extent])[0]


def _corner(first, window):
    """Returns one window's corner; what is the same for all windows is no index."""
    is_same = (first == first[0]).all(axis=0)
    moving = jnp.asarray(first, jnp.int32)[window]
    return [np.int32(first[0, i]) if same else moving[i] for i, same in enumerate(is_same)]


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
    threshold: float = 1.0,
    every: int = 1,
) -> Array:
    """Returns `occlusion.heatmaps`, `[B, h, w]`; see `occluded_logits`."""
    settings = dict(size=size, stride=stride, fill=fill, grid=grid, chunk_size=chunk_size)
    settings |= dict(progress=progress, threshold=threshold, every=every)
    return occlusion.heatmaps_by(occluded_logits, logits_fn, images, classes, **settings)
