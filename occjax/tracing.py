"""A function as a flat list of operations, to look at and to evaluate in other ways.

What `jax.make_jaxpr` shows has calls in calls, and reads weights as it reads images. Here every
call is opened, and what does not depend on the arguments is evaluated at once, so that a program
is the operations on the arguments alone.

References:
    https://docs.jax.dev/en/latest/jaxpr.html
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'checkpoint', 'remat2')


class Value:
    """An argument or a result of an operation: known by its identity, its shape and its type."""

    def __init__(self, aval: Any):
        self.shape, self.dtype = tuple(aval.shape), aval.dtype


class Operation(NamedTuple):
    """One primitive, what it reads (each a `Value`, or an array that is known) and makes."""

    primitive: Any
    params: dict[str, Any]
    operands: tuple[Any, ...]
    results: tuple[Value, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The operands' shapes."""
        return list(map(np.shape, self.operands))

    @property
    def values(self) -> list[Value]:
        """The operands that are not known."""
        return [x for x in self.operands if isinstance(x, Value)]


class Program(NamedTuple):
    """The operations that lead from arguments to outputs, in order; no other ones."""

    arguments: tuple[Value, ...]
    operations: list[Operation]
    outputs: tuple[Any, ...]  # each a `Value`, or an array that is known
    tree: Any  # of the outputs


Bind = Callable[[Any, dict, Sequence], tuple]  # primitive, parameters, operands -> results


def bind(primitive: Any, params: dict, operands: Sequence) -> tuple:
    """Returns a primitive's results."""
    found = primitive.bind(*operands, **primitive.get_bind_params(params))
    return tuple(found) if primitive.multiple_results else (found,)


def plain(fn: Callable) -> Callable:
    """Returns what `convolution.accelerate` was given to make a function; others as they are."""
    return getattr(fn, 'plain_fn', fn)


def trace(fn: Callable, *args: Any) -> Program:
    """Returns the program of `fn` at arguments like the given arrays or shapes.

    Arrays that `fn` closes over may be tracers: under `jit` weights stay its arguments. What has no
    part in the outputs, such as a print, is left out.
    """
    return program(*jaxpr_of(fn, *args))


def jaxpr_of(fn: Callable, *args: Any) -> tuple[Any, Any]:
    """Returns the jaxpr of a function, and the shapes of its outputs: what `trace` looks into."""
    # A function of its own, or JAX takes the trace before, though what `fn` closes over may differ.
    return jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(*args)


def program(closed: Any, shape: Any) -> Program:
    """Returns the program of what `jaxpr_of` returns."""
    operations = []
    arguments = tuple(Value(var.aval) for var in closed.jaxpr.invars)

    def record(primitive, params, operands, results):
        if not any(isinstance(x, Value) for x in operands):
            return bind(primitive, params, operands)
        values = tuple(Value(var.aval) for var in results)
        operations.append(Operation(primitive, params, tuple(operands), values))
        return values

    outputs = _walk(closed.jaxpr, closed.consts, arguments, record)
    needed, kept = {id(x) for x in outputs}, []
    for operation in reversed(operations):
        if needed.intersection(map(id, operation.results)):
            needed.update(map(id, operation.values))
            kept.append(operation)
    return Program(arguments, kept[::-1], tuple(outputs), jax.tree.structure(shape))


def lift(fn: Callable, *args: Any) -> tuple[Callable, list[jax.Array]]:
    """Returns `lifted` and the arrays that `fn` closes over: `lifted(arrays, *args) == fn(*args)`.

    Under `jit` such arrays are then arguments, instead of constants in the program's text. Those
    that `fn` makes anew at every call stay constants.

    Args:
        fn: maps arrays to one array.
        args: arrays or shapes at which it is traced once.
    """
    arrays: list[Any] = []

    def find(closed):
        arrays.extend(x for x in closed.consts if all(x is not array for array in arrays))
        for eqn in closed.jaxpr.eqns:
            inner = called(eqn.primitive, eqn.params)
            if inner:
                find(ClosedJaxpr(*inner))

    find(jax.make_jaxpr(fn)(*args))
    places = {id(array): i for i, array in enumerate(arrays)}

    def lifted(values, *args):
        def place(x):
            return values[places[id(x)]] if id(x) in places else x

        def record(primitive, params, operands, results):
            return bind(primitive, params, operands)

        closed = jax.make_jaxpr(fn)(*args)
        return _walk(closed.jaxpr, closed.consts, args, record, place)[0]

    return lifted, arrays


def is_traceable(fn: Callable, *args: Any) -> bool:
    """Returns whether JAX can trace a function: one that leaves JAX, for NumPy say, it can't."""
    try:
        jax.eval_shape(fn, *args)
    except Exception:  # Whatever is wrong with it shows where it is called.
        return False
    return True


def called(primitive: Any, params: dict) -> tuple[Any, Sequence] | None:
    """Returns the jaxpr and constants that a primitive does nothing but call, or None."""
    if primitive.name not in _CALLS:
        return None
    inner = params.get('jaxpr') or params['call_jaxpr']
    return (inner.jaxpr, inner.consts) if hasattr(inner, 'consts') else (inner, ())


def jaxprs(params: dict) -> Iterator[Any]:
    """Yields the jaxprs among a primitive's parameters, such as a loop's body."""
    for value in params.values():
        for found in value if isinstance(value, tuple) else (value,):
            found = getattr(found, 'jaxpr', found)
            if hasattr(found, 'eqns'):
                yield found


def primitives(name: str, params: dict) -> Iterator[str]:
    """Yields the name of a primitive, and those of all that it does inside."""
    yield name
    for jaxpr in jaxprs(params):
        for eqn in jaxpr.eqns:
            yield from primitives(eqn.primitive.name, eqn.params)


def _walk(jaxpr, consts, operands, fn, const_fn=lambda x: x):
    """Returns a jaxpr's outputs, its calls opened: `fn(primitive, params, operands, results)`.

    Its constants, and those of its calls, are read through `const_fn`.
    """
    operands = [*map(const_fn, consts), *operands]
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands, inner = [read(x) for x in eqn.invars], called(eqn.primitive, eqn.params)
        if inner:
            results = _walk(*inner, operands, fn, const_fn)
        else:
            results = fn(eqn.primitive, eqn.params, operands, eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def evaluate(program: Program, *args: jax.Array, bind_fn: Bind = bind) -> list[jax.Array]:
    """Returns the outputs of a program, flat, each operation by `bind_fn`."""
    env = dict(zip(program.arguments, args, strict=True))
    for operation in program.operations:
        run(operation, env, bind_fn)
    return [read(x, env) for x in program.outputs]


def run(operation: Operation, env: dict[Value, jax.Array], bind_fn: Bind = bind):
    """Adds the results of an operation to the values that are known so far."""
    operands = [read(x, env) for x in operation.operands]
    results = bind_fn(operation.primitive, operation.params, operands)
    env.update(zip(operation.results, results, strict=True))


def read(x: Any, env: dict[Value, jax.Array]) -> jax.Array:
    """Returns the array of an operand."""
    return env[x] if isinstance(x, Value) else x


# --- Operations of one value after another, which may be evaluated at any shape. ------------------

_POINTWISE = """
abs acos acosh add and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor
ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or
population_count pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
POINTWISE = frozenset(_POINTWISE.split())


def is_pointwise(primitive: Any, params: dict) -> bool:
    """Returns whether an operation may be evaluated at another shape than it was traced for."""
    if primitive.name == 'custom_jvp_call':
        inner = params['call_jaxpr'].jaxpr
    elif found := called(primitive, params):
        inner = found[0]
    else:
        return primitive.name in POINTWISE
    return all(
        is_pointwise(eqn.primitive, eqn.params)
        or (eqn.primitive.name == 'broadcast_in_dim' and eqn.invars[0].aval.shape == ())
        for eqn in inner.eqns
    )


def bind_pointwise(primitive: Any, params: dict, operands: Sequence) -> tuple:
    """Returns the results of a pointwise operation at operands of whatever shape.

    One with a derivative of its own (a ReLU has none at 0) keeps it: that was traced for one shape,
    and is evaluated anew for this one.
    """
    if primitive.name != 'custom_jvp_call':
        return bind(primitive, params, operands)
    inner, shape = params['call_jaxpr'], jnp.broadcast_shapes(*map(jnp.shape, operands))

    def at_shape(primitive, params, operands, results):
        if primitive.name == 'broadcast_in_dim':
            return (jnp.broadcast_to(operands[0], shape),)
        return bind_pointwise(primitive, params, operands)

    @jax.custom_jvp
    def call(*operands):
        return tuple(_walk(inner.jaxpr, inner.consts, operands, at_shape))

    @call.defjvp
    def _(primals, tangents):
        known = [False] * len(primals)
        jaxpr, consts, is_zero = params['jvp_jaxpr_fun'].call_wrapped(*known)
        found = _walk(jaxpr, consts, [*primals, *tangents], at_shape)
        results, moved = found[: len(is_zero)], iter(found[len(is_zero) :])
        return tuple(results), tuple(
            jnp.zeros_like(x) if zero else next(moved)
            for x, zero in zip(results, is_zero, strict=True)
        )

    return call(*operands)
