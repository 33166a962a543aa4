"""The nouns that the modules share, and the letters for their dimensions.

Dimensions: B batch, N images of a split, H W C image, K classes, h w heatmap grid, P = h * w
windows, V views, M heatmaps, T classes of highest rank. Images are NHWC; outside of `vgg` pixels
are float32 in [0, 1].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array

# Maps [B, H, W, C] images in [0, 1] to [B, K] logits, deterministically and image by image.
LogitsFn = Callable[[Array], Array]


def promoting(fn: Callable) -> Callable:
    """Returns the same function, in which `[C]` meets `[..., C]` and integers meet floats.

    Code bases may forbid either for their own (`jax_numpy_rank_promotion`,
    `jax_numpy_dtype_promotion`); networks of ours rely on both.
    """

    @functools.wraps(fn)
    def promoted(*args, **kwargs):
        with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
            return fn(*args, **kwargs)

    return promoted


class UsageError(ValueError):
    """A mistake of the user's: one line that names the culprit and the way out."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Decoded images on the host, possibly memory-mapped."""

    images: np.ndarray  # u8[N, H, W, C], or `data.Rows` of it: indexed by image, gathered then
    labels: np.ndarray  # i32[N]

    def __len__(self):
        return len(self.labels)


class Dataset(NamedTuple):
    """A source's two splits; `class_names[k]` is what a person calls class `k`."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split


class Batch(NamedTuple):
    """Images of equal count `B`; the last batch of a split is padded, which `is_real` tells."""

    images: np.ndarray  # f32[B, H, W, C] in [0, 1]
    labels: np.ndarray  # i32[B]
    index: np.ndarray  # i32[B], position in the split: an image's id
    is_real: np.ndarray  # bool[B]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatmapSet:
    """What the detectors, baselines and tables are made from, without the classifier.

    The arrays are NumPy's, as stored; JAX's where an attacker differentiates through them.
    """

    logits: np.ndarray  # f32[M, h, w, K] of the image under each window; [..., T + 1]: `condense`
    unoccluded: np.ndarray  # f32[M, K] of the image itself
    label: np.ndarray  # i32[M], the true class
    image_id: np.ndarray  # i32[M], position of the (clean) source image in its split
    is_adversarial: np.ndarray  # bool[M]
    comparators: np.ndarray | None = None  # f32[M, 3], `names.COMPARATORS`; None where not computed
    views: np.ndarray | None = None  # f32[M, V, K] of other views, as `logits`; or not computed
    spectrum: np.ndarray | None = None  # f32[M, F], `comparators.spectrum`; None where not computed
    neighbours: np.ndarray | None = None  # f32[M, n], `comparators.multi_lid`; or not computed
    twin: np.ndarray | None = None  # f32[M, K] logits of a second classifier; or not computed

    @property
    def array_module(self) -> Any:
        """NumPy, or `jax.numpy` if the logits are JAX's."""
        return self.logits.__array_namespace__()

    @property
    def predicted(self) -> np.ndarray:
        """`[M]`, the class that the classifier predicts for the unoccluded image."""
        return self.unoccluded.argmax(-1).astype(np.int32)

    @property
    def top_classes(self) -> int:
        """T, of how many classes `logits` are, by rank; 0 where they are of all K, by class."""
        columns, classes = self.logits.shape[-1], self.unoccluded.shape[-1]
        return 0 if columns == classes else columns - 1

    @property
    def ranked(self) -> np.ndarray:
        """`[M, T]`, the classes that the first T columns of condensed `logits` are of."""
        return _ranking(self.unoccluded)[:, : self.top_classes]

    @property
    def columns(self) -> np.ndarray:
        """`[M, K]` or `[M, T + 1]`, the unoccluded logits in the columns of `logits`."""
        return condense(self.unoccluded, self.unoccluded, self.top_classes)

    @property
    def maps(self) -> np.ndarray:
        """`[M, h, w]`, the probability of the predicted class under each window (§III-C)."""
        xp = self.array_module
        z = self.logits - self.logits.max(-1, keepdims=True)
        return self.of_predicted(xp.exp(z) / xp.exp(z).sum(-1, keepdims=True))

    @property
    def cells(self) -> np.ndarray:
        """`[M, P]`, the maps' cells in reading order."""
        return self.maps.reshape(len(self), math.prod(self.logits.shape[1:3]))

    @property
    def max_probability(self) -> np.ndarray:
        """`[M]`, the probability of the predicted class for the unoccluded image."""
        z = self.unoccluded - self.unoccluded.max(-1, keepdims=True)
        return 1 / self.array_module.exp(z).sum(-1)  # The largest exponent is 0.

    def __len__(self):
        return len(self.label)

    def of_predicted(self, values: np.ndarray) -> np.ndarray:
        """Returns `[M, ...]`, the predicted class's column of values by columns of `logits`."""
        if self.top_classes:
            return values[..., 0]
        index = self.predicted.reshape(len(self), *[1] * (values.ndim - 1))
        return self.array_module.take_along_axis(values, index, axis=-1)[..., 0]

    def condensed(self, top_classes: int) -> 'HeatmapSet':
        """Returns the maps with the logits of a few classes, see `condense`.

        Raises:
            ValueError: if they are condensed already.
        """
        logits, views = (
            each if each is None else condense(each, self.unoccluded, top_classes)
            for each in (self.logits, self.views)
        )
        return dataclasses.replace(self, logits=logits, views=views)

    def select(self, chosen) -> 'HeatmapSet':
        """Returns the maps that an index or boolean array chooses."""
        present = {name: array for name, array in vars(self).items() if array is not None}
        return HeatmapSet(**{name: array[chosen] for name, array in present.items()})

    @classmethod
    def concatenate(cls, sets: Sequence['HeatmapSet']) -> 'HeatmapSet':
        """Returns several sets as one, with those arrays that all of them have."""
        names = [f.name for f in dataclasses.fields(cls)]
        names = [name for name in names if all(getattr(s, name) is not None for s in sets)]
        return cls(**{name: np.concatenate([getattr(s, name) for s in sets]) for name in names})


def condense(logits: np.ndarray, unoccluded: np.ndarray, top_classes: int) -> np.ndarray:
    """Returns the logits of the classes that an image ranks highest, and of all others together.

    Of a thousand classes a map keeps a few this way. The last column is the logarithm of the
    others' summed exponentials, so that a softmax over the columns gives those few classes the
    very probabilities that they have among all. The predicted class is the first column.

    Args:
        logits: `[M, ..., K]`, of images under windows or in other views.
        unoccluded: `[M, K]`, of the images themselves, which rank the classes.
        top_classes: T; 0 keeps `logits` as they are, as do K - 1 and more, which would save none.

    Returns:
        `[M, ..., T + 1]`, by rank; or `[M, ..., K]`, by class.

    Raises:
        ValueError: if `logits` are of other classes, such as condensed ones.

    >>> condense(np.log([[1.0, 2, 4, 8]]), np.array([[0.0, 3, 9, 1]]), 2).round(3)
    array([[1.386, 0.693, 2.197]])
    """
    columns, classes = logits.shape[-1], unoccluded.shape[-1]
    if columns != classes:
        raise ValueError(f'Expected logits of {classes} classes, got {columns} columns.')
    if not 0 < top_classes < classes - 1:
        return logits
    xp = logits.__array_namespace__()
    order = _ranking(unoccluded).reshape(len(logits), *[1] * (logits.ndim - 2), classes)
    ordered = xp.take_along_axis(logits, order, axis=-1)
    others = ordered[..., top_classes:]
    largest = others.max(-1, keepdims=True)
    others = largest + xp.log(xp.exp(others - largest).sum(-1, keepdims=True))
    return xp.concatenate([ordered[..., :top_classes], others], axis=-1)


def _ranking(unoccluded):
    """Returns `[M, K]` classes, the highest logit first; of equal ones the first, as `argmax`."""
    return unoccluded.__array_namespace__().argsort(-unoccluded, axis=-1, stable=True)
