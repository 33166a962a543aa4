"""Programs that eager calls share: compiled once for a network, shapes and settings.

Called outside of `jit`, a function of a network (an attack, heat maps) would trace and compile at
each call. `run` keeps the compiled programs. It knows a network by its operations and not by its
object: a new closure over new weights, or a module whose weights have changed, runs the program
that is there, because the arrays that the network closes over are arguments of the program. The
network itself is traced at each call, which takes milliseconds.
"""

import collections
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from occjax import checks, tracing
from occjax.types import Array, LogitsFn

MOST = 64  # programs that are kept: those used last

_kept: collections.OrderedDict = collections.OrderedDict()
_lock = threading.Lock()


def shared(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function `fn(logits_fn, images, …)`, whose eager calls go through `run`.

    Its arguments by name are arrays if they are made of arrays alone, else settings.
    """

    def named_fn(logits_fn, images, named, *arrays, **settings):
        return fn(logits_fn, images, *arrays, **named, **settings)

    @functools.wraps(fn)
    def call(logits_fn, images, *arrays, **values):
        named = {name: value for name, value in values.items() if _is_of_arrays(value)}
        settings = {name: value for name, value in values.items() if name not in named}
        return run(named_fn, logits_fn, images, named, *arrays, **settings)

    return call


def _is_of_arrays(tree):
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(isinstance(x, jax.Array | np.ndarray) for x in leaves)


def run(
    fn: Callable[..., Any],
    logits_fn: LogitsFn,
    images: Array,
    *arrays: Any,
    **settings: Any,
) -> Any:
    """Returns `fn(logits_fn, images, *arrays, **settings)`, by a program that may be there already.

    Where an array is a tracer, as under `jit`, or the network cannot be traced, `fn` is called as
    it is.

    Args:
        fn: pure, the same object at each call, such as a function of a module.
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits.
        images: `[B, H, W, C]`.
        *arrays: arrays, numbers or pytrees of them, whose values make no other program.
        **settings: of which each value makes a program of its own.
    """
    operands, keeps = (images, *arrays), []
    if isinstance(logits_fn, jax.stages.Compiled) or not _are_known(operands):
        return fn(logits_fn, *operands, **settings)
    logits_fn = tracing.plain(logits_fn)
    try:
        closed, _ = tracing.jaxpr_of(logits_fn, jax.ShapeDtypeStruct(images.shape, images.dtype))
    except Exception:  # It may take batches of another size; if not, `fn` raises it again.
        return fn(logits_fn, *operands, **settings)
    weights = tuple(_constants(closed.jaxpr, closed.consts))
    if not _are_known(weights):
        return fn(logits_fn, *operands, **settings)
    places = _kinds((weights, operands)), jax.config.jax_default_matmul_precision
    key = fn, _operations(closed.jaxpr, keeps), places, _frozen(settings, keeps)
    with _lock:
        program, _ = _kept.pop(key, (None, None))
    if program is None:
        bound = functools.partial(_call, fn, logits_fn, settings)
        program = jax.jit(checks.warned_later(bound))
        program = program.lower(weights, operands).compile()
    with _lock:
        _kept[key] = program, keeps
        while len(_kept) > MOST:
            _kept.popitem(last=False)
    result, flags = program(weights, operands)
    for each in flags:
        checks.warn_of_probabilities(each)
    return result


def _call(fn, logits_fn, settings, weights, operands):
    """Returns what `fn` does of a network whose weights are given."""

    def network(images):
        closed, _ = tracing.jaxpr_of(logits_fn, images)
        return _evaluate(closed.jaxpr, closed.consts, [images], iter(weights))[0]

    return fn(network, *operands, **settings)


def _are_known(tree):
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _kinds(tree):
    """Returns what tells apart arguments that one program cannot serve."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = [
        (np.shape(x), getattr(x, 'dtype', type(x)), getattr(x, 'weak_type', False), _place(x))
        for x in leaves
    ]
    return structure, tuple(kinds)


def _place(x):
    return x.sharding if isinstance(x, jax.Array) and x.committed else None


def _constants(jaxpr, consts) -> Iterator[Any]:
    """Yields the arrays that a jaxpr, and those that it calls, close over, in one order."""
    yield from consts
    for eqn in jaxpr.eqns:
        inner = tracing.called(eqn.primitive, eqn.params)
        if inner:
            yield from _constants(*inner)


def _evaluate(jaxpr, consts, operands, given):
    """Returns a jaxpr's outputs with other arrays in the place of its `_constants`."""
    env = dict(zip(jaxpr.invars, operands, strict=True))
    env |= {var: next(given) for var in jaxpr.constvars[: len(consts)]}

    def read(atom):
        return atom.val if hasattr(atom, 'val') else env[atom]

    for eqn in jaxpr.eqns:
        operands, inner = [read(x) for x in eqn.invars], tracing.called(eqn.primitive, eqn.params)
        if inner:
            results = _evaluate(*inner, operands, given)
        else:
            results = tracing.bind(eqn.primitive, eqn.params, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


# --- What a network does, as something that can be compared. --------------------------------------


def _frozen(value: Any, keeps: list) -> Any:
    """Returns what is equal for two values exactly if they do the same, and can be hashed.

    Args:
        value: a jaxpr, or anything that a primitive has as a parameter.
        keeps: gets the objects that are known by their identity alone, which must then live on.
    """
    freeze = functools.partial(_frozen, keeps=keeps)
    if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
        consts = getattr(value, 'consts', ())
        return _operations(getattr(value, 'jaxpr', value), keeps), tuple(map(freeze, consts))
    if isinstance(value, tuple | list):
        return tuple(map(freeze, value))
    if isinstance(value, dict):
        return tuple((name, freeze(each)) for name, each in value.items())
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, functools.partial):
        return freeze((value.func, value.args, value.keywords))
    if hasattr(value, 'f') and hasattr(value, 'transforms'):  # JAX's way to write a derivative.
        return freeze((value.f, [step[:1] for step in value.transforms]))
    if hasattr(value, '__code__'):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, freeze([x for x in cells if not _is_of_trace(x)])
    try:
        hash(value)
    except TypeError:
        keeps.append(value)
        return id(value)
    if type(value).__hash__ is object.__hash__:
        keeps.append(value)
    return value


def _is_of_trace(value):
    """Whether a cell of a derivative's function belongs to the trace that it was met in."""
    kind = type(value)
    is_store = kind.__module__ == 'jax._src.linear_util' and not hasattr(value, 'transforms')
    return is_store or kind is object or kind.__module__ == 'jax._src.interpreters.partial_eval'


def _operations(jaxpr, keeps):
    """Returns the operations of a jaxpr, its variables numbered, without its `_constants`."""
    numbers, freeze = {}, functools.partial(_frozen, keeps=keeps)

    def atom(x):
        if hasattr(x, 'val'):
            return freeze(np.asarray(x.val)), str(x.aval)
        return numbers.setdefault(x, len(numbers)), str(x.aval)

    lines = [tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))]
    for eqn in jaxpr.eqns:
        inner = tracing.called(eqn.primitive, eqn.params)
        params = _operations(inner[0], keeps) if inner else freeze(eqn.params)
        reads, makes = (tuple(map(atom, variables)) for variables in (eqn.invars, eqn.outvars))
        lines.append((eqn.primitive, params, reads, makes))
    return tuple(lines), tuple(map(atom, jaxpr.outvars))
