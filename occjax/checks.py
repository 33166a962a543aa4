"""What functions refuse, in one sentence that names the culprit and the way out.

Shapes and types are always known. Values are looked at where they are: not under `jit`, `grad` or
`vmap`, where each function's docstring says what happens to others.

`checked` applies these to a function's arguments by their names: `images`, `labels`, `key`, and
the numbers of `NUMBERS` are the same everywhere.

Dimensions: B batch, H W C image, K classes.
"""

import contextvars
import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from occjax.types import Array, LogitsFn

PIXELS = (0.0, 1.0)
ROUNDING = 1e-5  # by which pixels may leave their bounds
NEAR = 0.1  # the same where only another scale would be wrong, so that finite differences may


class Range(NamedTuple):
    """Which numbers an argument may be; finite in any case."""

    least: float
    most: float = math.inf
    is_open: bool = False  # whether `least` itself is out
    is_integer: bool = False
    by_image: bool = False  # whether each image may have its own


_SIZE = Range(0.0, by_image=True)
_REAL, _POSITIVE = Range(0.0), Range(0.0, is_open=True)
COUNT = Range(1, is_integer=True)

NUMBERS: dict[str, Range] = {
    'epsilon': _SIZE,
    'step_size': _SIZE,
    'decay': _SIZE,
    'steps': Range(0, is_integer=True, by_image=True),
    **dict.fromkeys(('weight', 'overshoot', 'confidence', 'most', 'noise'), _REAL),
    **dict.fromkeys(('sigma', 'temperature', 'learning_rate', 'initial_const'), _POSITIVE),
    'factor': Range(1.0),
    'keep': Range(0.0, 1.0, is_open=True),
    'halvings': Range(0, is_integer=True),
    **dict.fromkeys(('binary_search_steps', 'candidates', 'masks', 'chunk_size'), COUNT),
    **dict.fromkeys(('bits', 'batch_size', 'side', 'channels'), COUNT),
    'neighbours': Range(2, is_integer=True),
}


def is_known(value: Any) -> bool:
    """Returns whether a value can be looked at."""
    return not isinstance(value, jax.core.Tracer)


def _ends(array):
    """Returns the least and the greatest of known values, inside of a traced function too.

    Both are NaN if one is, and infinite in size if one is.
    """
    with jax.ensure_compile_time_eval():
        # On a CPU min and max lose NaN from 4,096 numbers on (openxla/xla issue 21461).
        if jnp.isnan(array).any():
            return math.nan, math.nan
        return array.min().item(), array.max().item()


def checked(
    fn: Callable | None = None,
    *,
    bounds: tuple[float, float] | None = PIXELS,
    slack: float = ROUNDING,
    least: int = 1,
    order: float = math.inf,
    **ranges: Range,
) -> Callable:
    """Returns a function whose arguments are checked, and made arrays, by their names.

    Args:
        fn: takes some of `logits_fn`, `images`, `labels` (or `classes`, `targets`), `key` and
            numbers. Labels that may be None are then those predicted.
        bounds: of the pixels, where `fn` has no argument of that name.
        slack, least: see `images`.
        order: of the norm in which `epsilon` and `step_size` are; no longer than the bounds allow.
        ranges: of numbers that `NUMBERS` does not have, or that differ here.
    """
    if fn is None:
        settings = dict(bounds=bounds, slack=slack, least=least, order=order)
        return functools.partial(checked, **settings, **ranges)
    signature, numbers = inspect.signature(fn), NUMBERS | ranges

    @functools.wraps(fn)
    def checking(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return fn(*args, **kwargs)  # Python's own words, which name the function.
        bound.apply_defaults()
        values = bound.arguments
        limits = limits_of(values.get('bounds', bounds))
        batch = None
        if 'images' in values:
            batch = values['images'] = images(values['images'], limits, slack=slack, least=least)
        if 'key' in values:
            key(values['key'])
        if 'saliency' in values:
            values['saliency'] = jnp.asarray(values['saliency'])
            finite('saliency', values['saliency'])
        if batch is not None and not isinstance(values.get('fill', ''), str):
            fill(values['fill'], batch)
        for name in numbers.keys() & values.keys():
            if values[name] is not None or signature.parameters[name].default is not None:
                values[name] = number(name, values[name], batch, range=numbers[name])
                if name in ('epsilon', 'step_size') and limits is not None:
                    _reach(name, values[name], limits, batch, order)
        for name in {'labels', 'targets', 'classes'} & values.keys():
            if values[name] is None:
                values[name] = jnp.argmax(logits_fn(values['logits_fn'])(batch), axis=-1)
            what = 'classes' if name == 'classes' else 'labels'
            values[name] = classes(values[name], batch, name=what)
            if 'logits_fn' in values:
                values['logits_fn'] = logits_fn(values['logits_fn'], values[name], name=what)
        if 'logits_fn' in values and not {'labels', 'targets', 'classes'} & values.keys():
            values['logits_fn'] = logits_fn(values['logits_fn'])
        return fn(*bound.args, **bound.kwargs)

    return checking


def limits_of(bounds: Any) -> tuple[Any, Any] | None:
    """Returns the lowest and the highest pixel, or None; `ValueError` if they are no such two."""
    if bounds is None:
        return None
    if len(bounds) != 2 or (all(map(is_known, bounds)) and not bounds[0] < bounds[1]):
        raise ValueError(f'Expected bounds (lowest, highest) of pixels, or None, got {bounds}.')
    return tuple(bounds)


def _reach(name, value, limits, batch, order):
    """Raises if a known distance is longer than any between two images."""
    if not all(map(is_known, (value, *limits))):
        return
    low, high = limits
    longest = (high - low) * (1 if order == math.inf else math.sqrt(math.prod(batch.shape[1:])))
    greatest = np.max(value)
    if greatest > longest + ROUNDING:
        raise ValueError(
            f'Expected {name} <= {longest:g}, as pixels are from {low:g} to {high:g}, got '
            f'{greatest:g}: of 0 to 255 make {name} / 255, as in 8 / 255.'
        )


def images(
    images: Array,
    bounds: tuple[float, float] | None = PIXELS,
    *,
    slack: float = ROUNDING,
    least: int = 1,
) -> Array:
    """Returns images as an array.

    Raises:
        ValueError: if they are not `[B, H, W, C]`, `least` or more, of floats; or, where values are
            known, if one is NaN or infinite, or out of `bounds` by more than `slack`.
    """
    images = floats(images)
    if images.ndim != 4 or len(images) < least or 0 in images.shape[1:]:
        raise ValueError(f'Expected images [B, H, W, C], at least one, got shape {images.shape}.')
    if _is_channels_first(images.shape) and (images.shape[1] == 3 or len({*images.shape[2:]}) == 1):
        raise ValueError(_channels_first(images.shape))
    if images.size and is_known(images) and bounds is not None and all(map(is_known, bounds)):
        (low, high), (lowest, highest) = _ends(images), bounds
        if low < lowest - slack or high > highest + slack:
            raise ValueError(
                f'Expected pixels from {lowest:g} to {highest:g}, got {low:g} to {high:g}: divide '
                'images of 0 to 255 by 255, and normalize inside of logits_fn.'
            )
    return images


def _is_channels_first(shape):
    """Returns whether images of that shape may be `[B, C, H, W]`."""
    return len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) > 4


def _channels_first(shape):
    return (
        f'Expected images [B, H, W, C], channels last, got shape {tuple(shape)}: of [B, C, H, W] '
        'make images.transpose(0, 2, 3, 1).'
    )


def floats(images: Array) -> Array:
    """Returns an array of pixels.

    Raises:
        ValueError: if they are integers; or, where they are known, if one is NaN or infinite.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f'Expected images of floats, got {images.dtype}: pixels are from 0 to 1, as in '
            'images.astype("float32") / 255.'
        )
    finite('pixels', images)
    return images


def finite(name: str, array: Array) -> None:
    """Raises `ValueError` if one of known values is NaN or infinite."""
    if is_known(array) and array.size:
        ends = _ends(array)
        if np.isnan(ends).any():
            raise ValueError(f'Expected {name} to be numbers, got NaN.')
        if np.isinf(ends).any():
            raise ValueError(f'Expected {name} to be finite, got infinity.')


def classes(
    labels: Array, images: Array, num_classes: int | None = None, name: str = 'labels'
) -> Array:
    """Returns labels, or classes to explain, as an array.

    Raises:
        ValueError: if they are not one integer for each image; or, where they and `num_classes`
            are known, if one is no class.
    """
    labels = jnp.asarray(labels)
    if labels.shape != (len(images),) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f'Expected {len(images)} integer {name}, got {labels.dtype}{list(labels.shape)}.'
        )
    if num_classes is not None and len(images) and is_known(labels):
        low, high = _ends(labels)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f'Expected {name} from 0 to {num_classes - 1}, as there are {num_classes} classes, '
                f'got {low} to {high}.'
            )
    return labels


def number(name: str, value: Any, images: Array | None = None, *, range: Range = _SIZE) -> Any:
    """Returns a number, or an array of one for each image where `range` allows it.

    Args:
        name: what the message calls it.
        value: one number, `[B]` or `[B, 1, 1, 1]` of them; in range, where it is known.
        images: `[B, ...]`; None leaves the shape unchecked.
        range: which it may be.

    Raises:
        ValueError: if it is another.
    """
    what = 'an integer' if range.is_integer else 'a number'
    kind = jnp.integer if range.is_integer else jnp.number
    value = np.asarray(value) if isinstance(value, list | tuple) else value
    try:
        dtype, shape = jnp.result_type(value), np.shape(value)
    except (TypeError, ValueError):  # JAX's, of what is no array.
        dtype, shape = np.dtype(object), ()
    if not jnp.issubdtype(dtype, kind) or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f'Expected {name} to be {what}, got {value!r}.')
    count = 0 if images is None else len(images)
    forms = ((), (count,), (count, 1, 1, 1)) if range.by_image else ((),)
    if (count or not range.by_image) and shape not in forms:
        more = f' or {count} of them, one for each image' if range.by_image else ''
        raise ValueError(f'Expected {name} to be {what}{more}, got shape {list(shape)}.')
    if is_known(value):
        array = np.asarray(value, np.float64)
        is_low = array <= range.least if range.is_open else array < range.least
        if not np.isfinite(array).all() or is_low.any() or (array > range.most).any():
            raise ValueError(f'Expected {_condition(name, range)}, got {value}.')
    return value


def _condition(name, range):
    """Returns what holds of a number in range, in words."""
    relation = '>' if range.is_open else '>='
    if range.most < math.inf:
        return f'{range.least:g} {relation.replace(">", "<")} {name} <= {range.most:g}'
    return f'{name} {relation} {range.least:g}' + ('' if range.is_integer else ' and finite')


def key(key: Any) -> Any:
    """Returns a JAX random key, or raises `ValueError` if it is something else."""
    dtype, shape = getattr(key, 'dtype', np.dtype(object)), np.shape(key)
    is_typed = jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not is_typed and not (dtype == np.uint32 and shape in ((2,), (4,))):
        raise ValueError(
            f'Expected key to be one JAX random key, as jax.random.key(0) is, got {key!r}.'
        )
    return key


def sides(name: str, value: Any) -> tuple[int, int]:
    """Returns rows and columns: of one number both, of two each.

    Raises:
        ValueError: if they are not integers from 1.
    """
    try:
        found = tuple(map(operator.index, value if np.ndim(value) else (value, value)))
    except TypeError:
        found = ()
    if len(found) != 2 or min(found) < 1:
        raise ValueError(
            f'Expected {name} to be an integer >= 1 or two of them, (rows, columns), got {value!r}.'
        )
    return found


def fill(fill: Any, images: Array) -> Array:
    """Returns what covers a window, broadcast to `[..., H, W, C]` images.

    Raises:
        ValueError: if it is not one number, `[C]` of them, an image or as many as there are; or
            where it is known is NaN, infinite or far out of [0, 1].
    """
    fill = jnp.asarray(fill, images.dtype)
    shape = images.shape
    one = shape[-3:]
    forms = ((), (1,), one[-1:], one, (*[1] * (len(shape) - 3), *one), shape)
    if fill.shape not in forms:
        raise ValueError(
            f'Expected fill to be a number, [{one[-1]}] of them (one a channel) or images '
            f'{list(one)} or {list(shape)}, got shape {list(fill.shape)}.'
        )
    finite('fill', fill)
    if is_known(fill):
        low, high = _ends(fill)
        if low < PIXELS[0] - NEAR or high > PIXELS[1] + NEAR:
            raise ValueError(
                f'Expected fill from 0 to 1, as pixels are, got {low:g} to {high:g}: of 0 to 255 '
                'make fill / 255.'
            )
    return jnp.broadcast_to(fill, shape)


def weights(
    state_dict: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], *, of: str
) -> dict[str, np.ndarray]:
    """Returns arrays by name, as float32, without the counters of batches that nothing reads.

    Args:
        state_dict: `{name: array}`.
        shapes: of every array that the network has.
        of: what the message calls the network.

    Raises:
        ValueError: if an array is missing, left over, of another shape, no floats, or has a NaN or
            an infinity; it names the first such.
    """
    arrays = {
        name: np.asarray(array)
        for name, array in state_dict.items()
        if not name.endswith('num_batches_tracked')
    }
    for name, shape in shapes.items():
        if name not in arrays:
            raise ValueError(
                f'Expected the state dict of {of}, which has {name!r}; got the names '
                f'{sorted(arrays)[:4]} ….'
            )
        if arrays[name].shape != shape:
            raise ValueError(
                f'Expected the state dict of {of}, whose {name} is {list(shape)}, got '
                f'{list(arrays[name].shape)}.'
            )
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise ValueError(f'Expected {name} to be floats, got {arrays[name].dtype}.')
        finite(name, jnp.asarray(arrays[name], jnp.float32))
    if left := arrays.keys() - shapes.keys():
        name = min(left)
        raise ValueError(
            f'Expected the state dict of {of}, which has no {name}, got one of '
            f'{list(arrays[name].shape)}.'
        )
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def logits_fn(
    logits_fn: LogitsFn, labels: Array | None = None, *, name: str = 'labels'
) -> LogitsFn:
    """Returns the same function, which checks what it returns, and that `labels` are its classes.

    One that is compiled already cannot be looked into, and is returned as it is.

    Raises:
        ValueError: where it is called, if it returns anything but floats `[B, K]` of two classes
            or more, or changes its own state.
    """

    def checking(fn):
        def checked(images):
            logits = _logits(fn, images)
            if labels is not None:
                classes(labels, labels, logits.shape[-1], name)
            return logits

        return checked

    if isinstance(logits_fn, jax.stages.Compiled):
        return logits_fn
    found = checking(logits_fn)
    if hasattr(logits_fn, 'plain_fn'):  # Of `convolution.accelerate`, for `tracing.plain`.
        found.plain_fn = checking(logits_fn.plain_fn)
    return found


def _logits(logits_fn, images):
    try:
        found = logits_fn(images)
    except Exception as error:
        # Flax NNX's, which may not be installed.
        if type(error).__name__ == 'TraceContextError':
            raise ValueError(
                'logits_fn changes its own state, as a model in training does: call model.eval() '
                'first.'
            ) from error
        if isinstance(error, TypeError | ValueError) and _is_channels_first(images.shape):
            raise ValueError(_channels_first(images.shape)) from error
        raise
    if not hasattr(found, 'shape'):
        raise ValueError(
            f'Expected logits_fn to return [B, K] logits, got a {type(found).__name__}: return the '
            'logits alone (a Flax module applied with `mutable` returns a pair).'
        )
    if len(images) == 1 and found.ndim == 1 and len(found) > 1:
        raise ValueError(
            f'Expected logits_fn to return [1, K] logits of one image, got shape '
            f'{list(found.shape)}: your function drops the batch axis of one image, as squeeze() '
            'without an axis does.'
        )
    if found.ndim != 2 or len(found) != len(images) or found.shape[1] < 2:
        raise ValueError(
            f'Expected logits_fn to return [{len(images)}, K] logits with K >= 2, got shape '
            f'{list(found.shape)}: of one output z a sample make two by '
            'jnp.stack([jnp.zeros_like(z), z], axis=-1).'
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f'Expected logits of floats, got {found.dtype}.')
    warn_of_probabilities(are_probabilities(found))
    return found


def are_probabilities(logits: Array) -> Array:
    """Returns for each of `[..., K]` rows whether it lies in [0, 1] and sums to 1."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    slack = 4 * float(jnp.finfo(logits.dtype).eps) * math.sqrt(logits.shape[-1]) + ROUNDING
    is_one = jnp.abs(wide.sum(-1) - 1) <= slack
    return is_one & (wide >= 0).all(-1) & (wide <= 1 + slack).all(-1)


_later: contextvars.ContextVar[list | None] = contextvars.ContextVar('later', default=None)


def _trace_state():
    """Returns what tells one trace from another, a loop's body from the function around it."""
    return jex_core.get_opaque_trace_state(convention='nnx')


def warned_later(fn: Callable) -> Callable:
    """Returns a function to be jitted: its result, and flags for `warn_of_probabilities`."""

    def collecting(*args, **kwargs):
        token = _later.set([_trace_state()])
        try:
            return fn(*args, **kwargs), _later.get()[1:]
        finally:
            _later.reset(token)

    return collecting


def warn_of_probabilities(flags: Array) -> None:
    """Warns if all of some rows of logits are known to be probabilities, or `warned_later`."""
    later = _later.get()
    if later is not None and not is_known(flags) and later[0] == _trace_state():
        later.append(flags)
    if is_known(flags) and flags.size and flags.all():
        warnings.warn(
            'rows sum to 1 and lie in [0, 1]: logits_fn must return logits, before softmax',
            stacklevel=1,  # So that it is said once.
        )
