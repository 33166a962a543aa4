"""FGSM adversarial images, found by their occlusion heatmaps, in functional JAX.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, M maps.
"""

from occjax import attack, classifier, config, data, detector, metrics, occlusion, vgg
from occjax.attack import fgsm
from occjax.occlusion import grid_shape, heatmaps, occluded_logits

__all__ = [
    'attack',
    'classifier',
    'config',
    'data',
    'detector',
    'fgsm',
    'grid_shape',
    'heatmaps',
    'metrics',
    'occluded_logits',
    'occlusion',
    'vgg',
]
