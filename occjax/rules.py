"""What an index of an operation's result reads of each operand: one table for all operations.

A convolution, a pool, a slice and an addition differ in nothing else, so that whoever knows which
part of the operands changes knows it of the result. `incremental` plans by it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from occjax import tracing
from occjax.tracing import Operation


class Link(NamedTuple):
    """Index i of the result's `axis` reads `reach` indices from `i * stride - pad` on."""

    axis: int
    stride: int = 1
    pad: int = 0
    reach: int = 1


def _as_before(boxed, shape):
    return {}


class Rule(NamedTuple):
    """How an operation may be evaluated on a box of its result.

    An operand's axis without a link is read whole; a result's axis that none leads to changes whole
    with the operand.
    """

    links: tuple[dict[int, Link], ...]  # of each operand, by its axis
    params: Callable = _as_before  # (axes that a box is shorter in, its shape) -> new parameters
    fill: Any = 0.0  # what is read beyond an edge


def _only(values, value, places, boxed):
    """Returns `values` with `value` for those whose place is among the boxed axes."""
    return tuple(
        value if place in boxed else old for old, place in zip(values, places, strict=True)
    )


def _same_axes(operation, gone=()):
    """What reads just the same index of every axis, but for those that are gone."""
    (out, *_), links = operation.results, []
    for shape in operation.shapes:
        same = [i for i, n in enumerate(shape) if n == out.shape[i] and i not in gone]
        links.append({i: Link(i) for i in same})
    return Rule(tuple(links))


def _along(name):
    """The rule of what mixes along one axis, which the parameter of that name tells."""

    def rule(operation):
        axis = operation.params[name]
        return _same_axes(operation, axis if isinstance(axis, tuple) else (axis,))

    return rule


def _stack(operation):
    axis = operation.params['axis'] % len(operation.results[0].shape)
    return Rule(
        tuple({i: Link(i + (i >= axis)) for i in range(len(shape))} for shape in operation.shapes)
    )


def _unstack(operation):
    (shape,) = operation.shapes
    axis = operation.params['axis'] % len(shape)
    return Rule(({i: Link(i - (i > axis)) for i in range(len(shape)) if i != axis},))


def _gather(operation):
    # An axis that no index chooses from goes through as it is.
    numbers, sizes = operation.params['dimension_numbers'], operation.params['slice_sizes']
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = [i for i in range(len(sizes)) if i not in gone]
    axes = zip(left, numbers.offset_dims, strict=True)
    links = {
        i: Link(to)
        for i, to in axes
        if i not in numbers.start_index_map and sizes[i] == operation.shapes[0][i]
    }

    def boxed_params(boxed, shape):
        return {
            'slice_sizes': tuple(
                shape[links[i].axis] if i in links else n for i, n in enumerate(sizes)
            )
        }

    return Rule((links, {}), boxed_params)


def _dynamic_slice(operation):
    # An axis that is taken whole starts at 0, whatever it is told.
    links = _same_axes(operation._replace(operands=operation.operands[:1])).links
    rest = ({},) * (len(operation.operands) - 1)
    return Rule(links + rest, lambda boxed, shape: {'slice_sizes': shape})


def _update_slice(operation):
    out, update = operation.shapes[:2]
    gone = [i for i, n in enumerate(out) if update[i] != n]
    return _same_axes(operation, gone)


def _scatter(operation):
    # An axis that no index chooses from, and that an update covers, goes through as it is.
    numbers, (out, _, update) = operation.params['dimension_numbers'], operation.shapes
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    left = [i for i in range(len(out)) if i not in gone]
    places = [
        (i, at)
        for i, at in zip(left, numbers.update_window_dims, strict=True)
        if i not in numbers.scatter_dims_to_operand_dims and update[at] == out[i]
    ]
    return Rule(({i: Link(i) for i, _ in places}, {}, {at: Link(i) for i, at in places}))


def _custom_jvp(operation):
    is_pointwise = tracing.is_pointwise(operation.primitive, operation.params)
    return _same_axes(operation) if is_pointwise else None


def _convolution(operation):
    numbers, params = operation.params['dimension_numbers'], operation.params
    axes = zip(numbers.lhs_spec[2:], numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
    links = {}
    for i, (axis, to, taps) in enumerate(axes):
        if params['lhs_dilation'][i] == 1:
            reach = (operation.shapes[1][taps] - 1) * params['rhs_dilation'][i] + 1
            links[axis] = Link(to, params['window_strides'][i], params['padding'][i][0], reach)

    def boxed_params(boxed, shape):
        return {'padding': _only(params['padding'], (0, 0), numbers.out_spec[2:], boxed)}

    return Rule((links, {}), boxed_params)


def _pool(operation, fill=None):
    params, axes = operation.params, range(len(operation.shapes[0]))
    if fill is None:  # A function of one's own, with the value that it starts from.
        if len(operation.operands) != 2:
            return None
        fill = operation.operands[1]
    links = {}
    for i in axes:
        if params['base_dilation'][i] == 1:
            reach = (params['window_dimensions'][i] - 1) * params['window_dilation'][i] + 1
            links[i] = Link(i, params['window_strides'][i], params['padding'][i][0], reach)

    def boxed_params(boxed, shape):
        return {'padding': _only(params['padding'], (0, 0), axes, boxed)}

    return Rule((links, {})[: len(operation.operands)], boxed_params, fill)


def _pad(operation):
    config, axes = operation.params['padding_config'], range(len(operation.shapes[0]))
    links = {i: Link(i, pad=low) for i, (low, _, inner) in enumerate(config) if not inner}

    def boxed_params(boxed, shape):
        return {'padding_config': _only(config, (0, 0, 0), axes, boxed)}

    return Rule((links, {}), boxed_params, operation.operands[1])


def _slice(operation):
    params, axes = operation.params, range(len(operation.shapes[0]))
    starts, stops = params['start_indices'], params['limit_indices']
    strides = params['strides'] or (1,) * len(starts)

    def boxed_params(boxed, shape):
        limits = [
            (shape[i] - 1) * strides[i] + 1 if i in boxed else stop for i, stop in enumerate(stops)
        ]
        return {'start_indices': _only(starts, 0, axes, boxed), 'limit_indices': tuple(limits)}

    return Rule(({i: Link(i, strides[i], -starts[i]) for i in axes},), boxed_params)


def _transpose(operation):
    return Rule(({axis: Link(i) for i, axis in enumerate(operation.params['permutation'])},))


def _broadcast(operation):
    (shape,), to = operation.shapes, operation.params['broadcast_dimensions']
    out = operation.results[0].shape
    links = {i: Link(to[i]) for i, n in enumerate(shape) if n == out[to[i]]}
    return Rule((links,), lambda boxed, shape: {'shape': shape})


def _reshape(operation):
    # An axis stays one if as many elements are before it, and it is as long.
    (shape,), out = operation.shapes, operation.results[0].shape
    to = {(math.prod(out[:j]), n): j for j, n in enumerate(out) if n > 1}
    places = [(math.prod(shape[:i]), n) for i, n in enumerate(shape)]
    links = {i: Link(to[place]) for i, place in enumerate(places) if place in to}
    key = 'new_sizes' if operation.name == 'reshape' else None
    return Rule((links,), lambda boxed, shape: {key: shape} if key else {})


def _reduction(operation):
    axes = operation.params['axes']
    left = [i for i in range(len(operation.shapes[0])) if i not in axes]
    return Rule(({i: Link(j) for j, i in enumerate(left)},))


def _product(operation):
    contracted, batched = operation.params['dimension_numbers']
    links, place = [], len(batched[0])
    for shape, gone, batch in zip(operation.shapes, contracted, batched, strict=True):
        free = [i for i in range(len(shape)) if i not in gone and i not in batch]
        places = [*range(len(batch)), *range(place, place + len(free))]
        links.append({i: Link(j) for i, j in zip([*batch, *free], places, strict=True)})
        place += len(free)
    return Rule(tuple(links))


# One entry an operation: its name, and what returns its rule. One without a rule is computed whole,
# and so is all that follows; an entry more, and it is not.
RULES: dict[str, Callable[[Operation], Rule | None]] = {
    **dict.fromkeys(tracing.POINTWISE, _same_axes),
    'custom_jvp_call': _custom_jvp,
    'conv_general_dilated': _convolution,
    'reduce_window': _pool,
    'reduce_window_max': functools.partial(_pool, fill=-math.inf),
    'reduce_window_min': functools.partial(_pool, fill=math.inf),
    'reduce_window_sum': functools.partial(_pool, fill=0.0),
    'pad': _pad,
    'slice': _slice,
    'transpose': _transpose,
    'broadcast_in_dim': _broadcast,
    **dict.fromkeys(('reshape', 'squeeze', 'expand_dims'), _reshape),
    **dict.fromkeys(('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod'), _reduction),
    **dict.fromkeys(('reduce_and', 'reduce_or', 'argmax', 'argmin'), _reduction),
    'dot_general': _product,
    'concatenate': _along('dimension'),
    'rev': _along('dimensions'),
    **dict.fromkeys(('split', 'cumsum', 'cumprod', 'cummax', 'cummin'), _along('axis')),
    'cumlogsumexp': _along('axis'),
    'sort': _along('dimension'),
    'gather': _gather,
    'dynamic_slice': _dynamic_slice,
    'dynamic_update_slice': _update_slice,
    **dict.fromkeys(('scatter', 'scatter-add', 'scatter_mul'), _scatter),
    'top_k': _along('axis'),
    'stack': _stack,
    'unstack': _unstack,
    'tile': _same_axes,  # A tiled axis is longer than it was, so that it is read whole.
}
