"""FGSM adversarial images, found by their occlusion heatmaps, in functional JAX.

What lies in this folder is pure functions of arrays, to import; its folders are the program that
makes the paper.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, M maps.
"""

import importlib
import typing

if typing.TYPE_CHECKING:  # What editors and type checkers see; the rest of us get it on first use.
    from occjax import (
        adaptive,
        approximate,
        attack,
        classifier,
        comparators,
        config,
        convolution,
        data,
        detector,
        engine,
        incremental,
        methods,
        metrics,
        occlusion,
        sources,
        types,
        verdict,
        vgg,
    )
    from occjax.attack import fgsm
    from occjax.occlusion import grid_shape, heatmaps, occluded_logits
    from occjax.verdict import margins

__all__ = [
    'adaptive',
    'approximate',
    'attack',
    'classifier',
    'comparators',
    'config',
    'convolution',
    'data',
    'detector',
    'engine',
    'fgsm',
    'grid_shape',
    'heatmaps',
    'incremental',
    'margins',
    'methods',
    'metrics',
    'occluded_logits',
    'occlusion',
    'sources',
    'types',
    'verdict',
    'vgg',
]
_FUNCTIONS = {
    'fgsm': 'attack',
    'grid_shape': 'occlusion',
    'heatmaps': 'occlusion',
    'margins': 'verdict',
    'occluded_logits': 'occlusion',
}


def __getattr__(name):
    # On first use (PEP 562): all modules together take seconds to import.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_FUNCTIONS.get(name, name)}')
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__():
    return sorted([*globals(), *__all__])
