"""What else makes occlusion maps, timed beside ours: captum's `Occlusion` on PyTorch.

The same weights in the same process; and PyTorch's own training step. Captum's grid has windows
that hang over the far edge, more than ours, so what compares is windows a second.

Dimensions: B batch, H W C image, P windows.
"""

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from occjax import occlusion, resnet, vgg
from occjax.experiment import shard
from occjax.experiment.run import Run
from occjax.types import UsageError


class Timing(NamedTuple):
    """What is timed, how often, and beside whom."""

    images: int = 4
    repeats: int = 5
    peer: str | None = None  # one of `names.PEERS`
    dtype: str = 'float32'  # of the weights
    threshold: float = 0.4  # of the approximate engine
    every: int = 2  # of the approximate engine
    target: str | None = None  # whose compiler is asked, see `compilers.target`


# Windows that captum is tried at in one forward pass; it makes one at a time by default.
_PER_EVAL = (1, 4, 8, 16)


def check(run: Run, name: str | None):
    """Raises `UsageError` if a peer is not installed, or has no twin of the classifier."""
    if name is None:
        return
    source, levels = run.config.classifier.source, run.config.classifier.thermometer
    if run.trained and not source.startswith('torchvision:'):
        raise UsageError(
            f'{name} runs PyTorch, and has no twin of {source}: benchmark without a peer, or with '
            "config.classifier.source='torchvision:<name>:<file>'."
        )
    if levels > 1:
        raise UsageError(
            f'{name} cannot be compared on a thermometer of {levels} levels: '
            'leave config.classifier.thermometer at 1.'
        )
    for module in ('torch', 'captum.attr'):
        try:
            importlib.import_module(module)
        except ImportError:
            package = module.split('.', maxsplit=1)[0]
            raise UsageError(
                f'{name} needs {package}, which is not installed: pip install torch captum.'
            ) from None


def twin(run: Run, variables: Any):
    """Returns the PyTorch module of the classifier, of `[B, C, H, W]` pixels in [0, 1]."""
    if isinstance(variables, vgg.Variables):
        plan = run.network.fn.keywords['plan']
        return vgg_twin(variables, image_size=run.config.data.image_size, plan=plan)
    return resnet_twin(variables)


def _load(module, **arrays):
    """Returns a PyTorch module with its weights set."""
    import torch

    with torch.no_grad():
        for name, array in arrays.items():
            getattr(module, name).copy_(torch.from_numpy(np.array(array)))
    return module


def _normalize(stats):
    """Returns (x - mean) / std, which a batch normalisation without its usual epsilon is."""
    from torch import nn

    norm = nn.BatchNorm2d(len(stats['mean']), eps=0.0, affine=False)
    return _load(norm, running_mean=stats['mean'], running_var=np.square(stats['std']))


def resnet_twin(variables: resnet.Variables):
    """Returns the PyTorch module of a ResNet, see `twin`."""
    from torch import nn

    variables = jax.device_get(variables)

    def convolution(layer, stride=1):
        kernel = layer['kernel'].transpose(3, 2, 0, 1)
        outputs, inputs, side, _ = kernel.shape
        conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        norm = nn.BatchNorm2d(outputs, eps=resnet.BATCH_NORM_EPSILON)
        arrays = dict(running_mean=layer['mean'], running_var=layer['var'])
        arrays |= dict(weight=layer['scale'], bias=layer['offset'])
        return nn.Sequential(_load(conv, weight=kernel), _load(norm, **arrays))

    class Block(nn.Module):
        def __init__(self, layers, shortcut, stride):
            super().__init__()
            last = len(layers) - 1
            parts = []
            for i, layer in enumerate(layers):
                parts += [convolution(layer, stride if i == last - 1 else 1), nn.ReLU()]
            self.residual = nn.Sequential(*parts[:-1])
            self.shortcut = nn.Sequential(*(convolution(layer, stride) for layer in shortcut))
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.residual(x) + self.shortcut(x))

    blocks = [
        Block(block['layers'], block['shortcut'], 2 if number and not i else 1)
        for number, stage in enumerate(variables['stages'])
        for i, block in enumerate(stage)
    ]
    kernel = variables['linear']['kernel']
    linear = _load(nn.Linear(*kernel.shape), weight=kernel.T, bias=variables['linear']['bias'])
    stem = [_normalize(variables['pixel_stats']), convolution(variables['stem'], 2), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear]
    module = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *pooled)
    return module.eval().requires_grad_(False)


def vgg_twin(
    variables: vgg.Variables, *, image_size: int, plan: vgg.Plan, dropout_rate: float | None = None
):
    """Returns the PyTorch module of a VGG, see `twin`.

    With a dropout rate it is one to train, whose layers that normalise use the batch.
    """
    from torch import nn

    variables = jax.device_get(variables)
    stats = variables.pixel_stats
    channels, side = len(stats['mean']), image_size
    normalize = _normalize(stats)
    parts = [normalize]
    layers = vgg.layers(variables, plan)
    for width in plan:
        if width == 'M':
            parts.append(nn.MaxPool2d(2))
            side //= 2
            continue
        layer, stats = next(layers)
        kernel = layer['kernel'].transpose(3, 2, 0, 1)
        conv = nn.Conv2d(channels, width, 3, padding=1)
        norm = nn.BatchNorm2d(width, eps=vgg.BATCH_NORM_EPSILON)
        arrays = dict(weight=layer['scale'], bias=layer['offset'])
        parts += [
            _load(conv, weight=kernel, bias=layer['bias']),
            _load(norm, running_mean=stats['mean'], running_var=stats['var'], **arrays),
            nn.ReLU(),
        ]
        channels = width
    pooled = math.isqrt(len(variables.params['linear'][0]['kernel']) // channels)
    parts += [nn.AdaptiveAvgPool2d(pooled)] if side != pooled else []
    side = pooled
    parts.append(nn.Flatten())
    for i, layer in enumerate(variables.params['linear']):
        kernel = layer['kernel']
        if not i:  # PyTorch flattens features channels first, we channels last.
            kernel = kernel.reshape(side**2, channels, -1).swapaxes(0, 1).reshape(kernel.shape)
        linear = nn.Linear(*kernel.shape)
        parts += [_load(linear, weight=kernel.T, bias=layer['bias']), nn.ReLU()]
        parts += [nn.Dropout(dropout_rate or 0.0)]
    module = nn.Sequential(*parts[:-2]).eval().requires_grad_(False)
    if dropout_rate is not None:
        module.train().requires_grad_(True)
        normalize.eval()
    return module


def _settle():
    """Returns PyTorch's counterpart of JAX's device, with all the processor's threads."""
    import torch

    torch.set_num_threads(os.cpu_count())
    on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
    return torch.device('cuda' if on_gpu else 'cpu')


def training_step(
    run: Run,
    variables: vgg.Variables,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    rate: float,
    dropout_rate: float,
) -> Callable[[], None]:
    """Returns a function that takes one more of PyTorch's steps of Adam, and waits for it."""
    import torch

    device, layout = _settle(), torch.channels_last  # The faster layout in training at any size.
    side = run.config.data.image_size
    plan = run.layers['plan']
    module = vgg_twin(variables, image_size=side, plan=plan, dropout_rate=dropout_rate)
    module = module.to(device, memory_format=layout)
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    inputs, targets = inputs.contiguous(memory_format=layout), torch.from_numpy(labels).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
        if device.type == 'cuda':
            torch.cuda.synchronize()

    return step


def measure(run: Run, timing: Timing, variables: Any, images: np.ndarray) -> dict:
    """Returns captum's numbers at the best setting that was found for it."""
    import torch
    from captum.attr import Occlusion

    device, side = _settle(), run.config.data.image_size
    # Large images are few: a single one's windows fill its batches, and take half a minute.
    images = images[: max(1, 2**16 // side**2)]
    # Channels last is PyTorch's faster layout on large images, by a quarter at 224 pixels.
    layout = torch.channels_last if side >= 64 else torch.contiguous_format
    module = twin(run, variables).to(device, memory_format=layout)
    if timing.peer == 'captum-compiled':
        module = torch.compile(module)
    fill = np.broadcast_to(shard.fill_of(run, variables), images.shape[1:])

    def to_torch(array):
        array = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)
        return array.to(device).contiguous(memory_format=layout)

    inputs, baseline = to_torch(images), to_torch(fill[None])
    window, step = run.config.occlusion.size, run.config.occlusion.stride
    explainer = Occlusion(module)

    def explain(batch_size, per_eval):
        """Returns the seconds for all images."""
        began = time.perf_counter()
        for batch in inputs.split(batch_size):
            explainer.attribute(
                batch,
                sliding_window_shapes=(3, window, window),
                strides=(3, step, step),
                target=module(batch).argmax(-1),
                baselines=baseline,
                perturbations_per_eval=per_eval,
            ).cpu()  # Waits for the device.
        return time.perf_counter() - began

    batch_sizes = dict.fromkeys((1, min(len(images), run.batch_size)))
    settings = [(size, per_eval) for size in batch_sizes for per_eval in _PER_EVAL]
    with torch.inference_mode():
        difference = _difference(
            run, variables, images, lambda x: module(to_torch(x)).cpu().numpy()
        )
        explain(*settings[0])  # The warm-up.
        tried = {setting: explain(*setting) for setting in settings}
        best = min(tried, key=tried.get)
        seconds = [explain(*best) for _ in range(timing.repeats)]
    row = _row(
        timing.peer, images, seconds, tried, best, windows=(1 + -(-(side - window) // step)) ** 2
    )
    where = {'device': str(device), 'layout': str(layout).removeprefix('torch.')}
    return row | where | {'largest_difference': difference}


def _row(name, images, seconds, tried, best, *, windows):
    """Returns what a table needs of captum's times."""
    median = statistics.median(seconds)
    return {
        'name': name,
        'images': len(images),
        'windows_per_map': windows,
        'windows_per_second': windows * len(images) / median,
        'seconds': seconds,
        'seconds_median': median,
        'seconds_spread': [min(seconds), max(seconds)],
        'batch_size': best[0],
        'perturbations_per_eval': best[1],
        'tried': [
            {'batch_size': size, 'perturbations_per_eval': per_eval, 'seconds': value}
            for (size, per_eval), value in tried.items()
        ],
    }


def _difference(run, variables, images, peer_fn):
    """Returns by how much the twin's probabilities differ from ours under some windows."""
    origins = occlusion.window_origins(images.shape[1:3], **run.geometry)
    chosen = origins[:: max(1, len(origins) // 8)]
    fill, size = shard.fill_of(run, variables), run.config.occlusion.size
    covered = np.stack([occlusion.occlude(images[0], o, size=size, fill=fill) for o in chosen])
    ours = jax.jit(run.network.fn)(variables, covered)
    ours, theirs = (jax.nn.softmax(np.asarray(z), axis=-1) for z in (ours, peer_fn(covered)))
    return float(np.max(np.abs(ours - theirs)))
