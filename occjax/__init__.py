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
        attack,
        attribution,
        classifier,
        comparators,
        config,
        convolution,
        data,
        detector,
        engine,
        fills,
        guard,
        incremental,
        methods,
        metrics,
        networks,
        occlusion,
        resnet,
        rules,
        sources,
        tracing,
        types,
        verdict,
        vgg,
        views,
    )
    from occjax.attack import fgsm
    from occjax.convolution import accelerate
    from occjax.engine import heatmaps, occluded_logits
    from occjax.occlusion import grid_shape
    from occjax.verdict import margins

__all__ = [
    'accelerate',
    'adaptive',
    'attack',
    'attribution',
    'classifier',
    'comparators',
    'config',
    'convolution',
    'data',
    'detector',
    'engine',
    'fgsm',
    'fills',
    'grid_shape',
    'guard',
    'heatmaps',
    'incremental',
    'margins',
    'methods',
    'metrics',
    'networks',
    'occluded_logits',
    'occlusion',
    'resnet',
    'rules',
    'sources',
    'tracing',
    'types',
    'verdict',
    'vgg',
    'views',
]
_FUNCTIONS = {
    'accelerate': 'convolution',
    'fgsm': 'attack',
    'grid_shape': 'occlusion',
    'heatmaps': 'engine',
    'margins': 'verdict',
    'occluded_logits': 'engine',
}


def __getattr__(name):
    # On first use (PEP 562): all modules together take seconds to import.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_FUNCTIONS.get(name, name)}')
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__():
    return sorted([*globals(), *__all__])
