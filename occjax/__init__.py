"""FGSM adversarial images, found by their occlusion heatmaps, in functional JAX.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, M maps.
"""

import importlib

_MODULES = (
    'approximate',
    'attack',
    'benchmark',
    'classifier',
    'config',
    'data',
    'detector',
    'incremental',
    'metrics',
    'occlusion',
    'vgg',
)
_FUNCTIONS = {
    'fgsm': 'attack',
    'grid_shape': 'occlusion',
    'heatmaps': 'occlusion',
    'occluded_logits': 'occlusion',
}

__all__ = sorted([*_MODULES, *_FUNCTIONS])


def __getattr__(name):
    # On first use (PEP 562): all modules together take seconds to import.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_FUNCTIONS.get(name, name)}')
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__():
    return sorted([*globals(), *__all__])
