"""What can judge an image by its stored logits: the paper's detectors, ablations, and better ones.

A method fits a bank of small networks like the paper's, on other inputs or with other widths. The
scores of `metrics.BASELINES` need no fitting. All come from the same stored maps.

Dimensions: M maps, h w heatmap grid, P = h * w windows, K classes (or columns of condensed maps).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from occjax.detector import MLP, Bank, score
from occjax.types import Array, HeatmapSet, condense


class Method(NamedTuple):
    """A bank of networks: what they see, how wide they are, and whether classes share one."""

    inputs_fn: Callable[[HeatmapSet], np.ndarray]  # maps to f32[M, ...]
    features: tuple[int, ...] = MLP.features
    convolutions: tuple[int, ...] = ()
    standardize: bool = False
    pooled: bool = False
    passes: int | None = None  # of an image; None: one for every window, and one more
    windows: bool = True  # whether they see any

    @property
    def fields(self) -> dict:
        """What `detector.init_bank` takes of it."""
        return {name: getattr(self, name) for name in ('features', 'convolutions', 'standardize')}

    def predicted(self, maps: HeatmapSet) -> np.ndarray:
        """Returns `[M]`, whose network judges each map."""
        return np.zeros(len(maps), np.int32) if self.pooled else maps.predicted

    def score(self, bank: Bank, maps: HeatmapSet) -> Array:
        """Returns the `[M]` scores that a bank gives to maps."""
        return score(bank, self.inputs_fn(maps), self.predicted(maps))

    def num_networks(self, maps: HeatmapSet) -> int:
        """Returns how many networks a bank has."""
        return 1 if self.pooled else maps.unoccluded.shape[-1]


def _map(maps):
    return maps.maps


def _relative_map(maps):
    """The map over the unoccluded probability: what is left of it once confidence is taken out."""
    return maps.maps / maps.max_probability[:, None, None]


def _shuffled_cells(maps):
    """Every map's cells in an order of its own: what is left of it without its layout."""
    order = np.random.default_rng(0).random(maps.cells.shape).argsort(axis=1)
    return np.take_along_axis(maps.cells, order, axis=1)


def _log_map(maps):
    """The logarithm of the map, clipped at e^-10 and scaled to the unit interval."""
    xp = maps.array_module
    return 1 + xp.maximum(xp.log(xp.maximum(maps.maps, 1e-30)), -10) / 10


def _logits(maps):
    """All classes' logits, under every window and of the unoccluded image, by class."""
    # Networks learn fastest from inputs of about unit size.
    windows = maps.logits.reshape(len(maps), math.prod(maps.logits.shape[1:]))
    logits = maps.array_module.concatenate([windows, maps.columns], axis=1)
    return logits / 4


def _changes(maps, *seen):
    """What some `[M, ..., K]` logits are beyond the unoccluded ones, and these, by class."""
    columns, flat = maps.columns, []
    for logits in seen:
        own = columns.reshape(len(maps), *[1] * (logits.ndim - 2), logits.shape[-1])
        flat.append((logits - own).reshape(len(maps), math.prod(logits.shape[1:])))
    return maps.array_module.concatenate([*flat, columns], axis=1)


def _logit_differences(maps):
    """What every window changes of all classes' logits, and the unoccluded logits, by class."""
    # Networks see these small numbers only once they are standardized.
    return _changes(maps, maps.logits)


def _logit_maps(maps):
    """All logits as an image of the windows, `[M, h, w, 2K]`: the unoccluded ones in every cell."""
    xp = maps.array_module
    everywhere = xp.broadcast_to(maps.columns[:, None, None], maps.logits.shape)
    return xp.concatenate([maps.logits, everywhere], axis=-1) / 4


def _views_alone(maps):
    """What every other view changes of all logits, and what it leaves of the predicted class."""
    return _and_confidence(maps, maps.views)


def _all_views(maps):
    """What `_views_alone` has, of windows and other views."""
    return _and_confidence(maps, maps.logits, maps.views)


def _and_confidence(maps, *seen):
    """The changes, after the predicted class's probability in each `[M, ..., K]`, and its log."""
    xp, flat = maps.array_module, []
    for logits in seen:
        z = logits - logits.max(-1, keepdims=True)
        logarithm = maps.of_predicted(z) - xp.log(xp.exp(z).sum(-1))
        logarithm = logarithm.reshape(len(maps), math.prod(logits.shape[1:-1]))
        flat += [xp.exp(logarithm), logarithm]
    return xp.concatenate([*flat, _changes(maps, *seen)], axis=1)


def _log_spectrum(maps):
    """The logarithm of the image's magnitudes, which span many decades."""
    return maps.array_module.log(maps.spectrum.astype(np.float32) + 1e-3)


def _both_logits(maps):
    """What two classifiers see in the image."""
    twin = condense(maps.twin, maps.unoccluded, maps.top_classes)
    return maps.array_module.concatenate([maps.columns, twin], axis=1) / 4


def _unoccluded_logits(maps):
    """All classes' logits of the unoccluded image alone: one forward pass."""
    return maps.columns / 4


_ONE_PASS, _TWO_PASSES = dict(passes=1, windows=False), dict(passes=2, windows=False)

# Those of `names.METHODS`, of `names.VIEWING` and of `names.RIVALS`, in this order.
METHODS = {
    'detector': Method(_map),  # §III-D, the paper's
    'pooled': Method(_map, pooled=True),
    'linear_probe': Method(_map, features=()),
    'relative_map': Method(_relative_map),
    'shuffled_cells': Method(_shuffled_cells),
    'log_map': Method(_log_map),
    'unoccluded_logits': Method(_unoccluded_logits, pooled=True, **_ONE_PASS),
    'all_logits': Method(_logits, pooled=True),
    'logit_differences': Method(
        _logit_differences, features=(512, 128), standardize=True, pooled=True
    ),
    'conv_logits': Method(_logit_maps, features=(128,), convolutions=(64, 64), pooled=True),
    'all_views': Method(_all_views, features=(512, 128), standardize=True, pooled=True),
    'views_alone': Method(
        _views_alone, features=(512, 128), standardize=True, pooled=True, windows=False
    ),
    # InputMFS, https://arxiv.org/abs/2103.03000
    'input_mfs': Method(
        _log_spectrum, features=(), standardize=True, pooled=True, passes=0, windows=False
    ),
    # multiLID, https://arxiv.org/abs/2212.06776
    'multi_lid': Method(lambda maps: maps.neighbours, standardize=True, pooled=True, **_ONE_PASS),
    # SID, https://arxiv.org/abs/2103.04302
    'sid': Method(_both_logits, features=(512, 128), standardize=True, pooled=True, **_TWO_PASSES),
}
