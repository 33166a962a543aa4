"""What functions refuse, in one sentence that names the culprit and the way out.

Shapes and types are always known. Values are looked at where they are: not under `jit`, `grad` or
`vmap`, where each function's docstring says what happens to others.

Dimensions: B batch, H W C image, K classes.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax.types import Array, LogitsFn

ROUNDING = 1e-5  # by which pixels may leave their bounds
NEAR = 0.1  # the same where only another scale would be wrong, so that finite differences may


def is_known(value: Any) -> bool:
    """Returns whether a value can be looked at."""
    return not isinstance(value, jax.core.Tracer)


def _ends(array):
    """Returns the least and the greatest of known values, inside of a traced function too."""
    with jax.ensure_compile_time_eval():
        return array.min().item(), array.max().item()


def images(
    images: Array, bounds: tuple[float, float] | None = (0.0, 1.0), *, slack: float = ROUNDING
) -> Array:
    """Returns images as an array.

    Raises:
        ValueError: if they are not `[B, H, W, C]`, at least one, of floats; or, where values are
            known, if one is NaN or out of `bounds` by more than `slack`.
    """
    images = floats(images)
    if images.ndim != 4 or not len(images):
        raise ValueError(f'Expected images [B, H, W, C], at least one, got shape {images.shape}.')
    if is_known(images):
        low, high = _ends(images)
        if np.isnan(low) or np.isnan(high):
            raise ValueError('Expected pixels to be numbers, got NaN.')
        least, most = (-np.inf, np.inf) if bounds is None else bounds
        if low < least - slack or high > most + slack:
            raise ValueError(
                f'Expected pixels from {least:g} to {most:g}, got {low:g} to {high:g}: divide '
                'images of 0 to 255 by 255, and normalize inside of logits_fn.'
            )
    return images


def floats(images: Array) -> Array:
    """Returns an array of pixels, or raises `ValueError` if they are integers."""
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f'Expected images of floats, got {images.dtype}: pixels are from 0 to 1, as in '
            'images.astype("float32") / 255.'
        )
    return images


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


def number(name: str, value: Any, *, least: float = 0.0) -> Any:
    """Returns a number, or one for each image, if where known it is finite and not below `least`.

    Raises:
        ValueError: otherwise.
    """
    if is_known(value):
        found = np.asarray(value)
        if found.dtype.kind not in 'iuf' and not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(f'Expected {name} to be a number, got {value!r}.')
        if not np.isfinite(found.astype(np.float64)).all() or (found < least).any():
            raise ValueError(f'Expected {name} >= {least:g} and finite, got {value}.')
    return value


def count(name: str, value: Any) -> Any:
    """Returns an integer from 0, or one for each image; `ValueError` otherwise."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f'Expected {name} to be an integer, got {value!r}.')
    return number(name, value)


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
        ValueError: if it is not one number, `[C]` of them, an image or as many as there are; or is
            NaN, where it is known.
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
    if is_known(fill) and np.isnan(_ends(fill)).any():
        raise ValueError('Expected fill to be numbers, got NaN.')
    return jnp.broadcast_to(fill, shape)


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
        if type(error).__name__ != 'TraceContextError':  # Flax NNX's, which may not be installed.
            raise
        raise ValueError(
            'logits_fn changes its own state, as a model in training does: call model.eval() first.'
        ) from error
    if not hasattr(found, 'shape'):
        raise ValueError(
            f'Expected logits_fn to return [B, K] logits, got a {type(found).__name__}: return the '
            'logits alone (a Flax module applied with `mutable` returns a pair).'
        )
    if found.ndim != 2 or len(found) != len(images) or found.shape[1] < 2:
        raise ValueError(
            f'Expected logits_fn to return [{len(images)}, K] logits with K >= 2, got shape '
            f'{list(found.shape)}: of one output z a sample make two by '
            'jnp.stack([jnp.zeros_like(z), z], axis=-1).'
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f'Expected logits of floats, got {found.dtype}.')
    return found
