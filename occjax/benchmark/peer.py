"""What else makes occlusion maps, timed beside ours: captum's `Occlusion` on PyTorch.

The same weights in the same process; and PyTorch's own training step. Captum's grid has windows
that hang over the far edge, more than ours, so what compares is windows a second.

Dimensions: B batch, H W C image, P windows.
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from occjax import occlusion, vgg
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


# Windows that captum is tried at in one forward pass; it makes one at a time by default.
_PER_EVAL = (1, 4, 8, 16)


def check(name: str | None, *, levels: int = 1):
    """Raises `UsageError` if a peer is not installed, or has no layers for a thermometer's."""
    if name is None:
        return
    if levels > 1:
        raise UsageError(
            f'{name} cannot be compared on a thermometer of {levels} levels: '
            'leave config.classifier.thermometer at 1.'
        )
    for module in ('torch', 'captum.attr'):
        try:
            importlib.import_module(module)
        except ImportError:
            package = module.split('.')[0]
            raise UsageError(
                f'{name} needs {package}, which is not installed: pip install torch captum.'
            ) from None


def twin(
    variables: vgg.Variables, *, image_size: int, plan: vgg.Plan, dropout_rate: float | None = None
):
    """Returns the PyTorch module of the same weights, of `[B, C, H, W]` pixels in [0, 1].

    With a dropout rate it is one to train, whose layers that normalise use the batch.
    """
    import torch
    from torch import nn

    variables = jax.device_get(variables)

    def load(module, **arrays):
        with torch.no_grad():
            for name, array in arrays.items():
                getattr(module, name).copy_(torch.from_numpy(np.array(array)))
        return module

    stats = variables.pixel_stats
    channels, side = len(stats['mean']), image_size
    # (x - mean) / std, which a batch normalisation without its usual epsilon is.
    normalize = nn.BatchNorm2d(channels, eps=0.0, affine=False)
    parts = [load(normalize, running_mean=stats['mean'], running_var=stats['std'] ** 2)]
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
            load(conv, weight=kernel, bias=layer['bias']),
            load(norm, running_mean=stats['mean'], running_var=stats['var'], **arrays),
            nn.ReLU(),
        ]
        channels = width
    parts.append(nn.Flatten())
    for i, layer in enumerate(variables.params['linear']):
        kernel = layer['kernel']
        if not i:  # PyTorch flattens features channels first, we channels last.
            kernel = kernel.reshape(side**2, channels, -1).swapaxes(0, 1).reshape(kernel.shape)
        linear = nn.Linear(*kernel.shape)
        parts += [load(linear, weight=kernel.T, bias=layer['bias']), nn.ReLU()]
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
    module = twin(variables, image_size=side, plan=run.plan, dropout_rate=dropout_rate)
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


def measure(run: Run, timing: Timing, variables: vgg.Variables, images: np.ndarray) -> dict:
    """Returns captum's numbers at the best setting that was found for it."""
    import torch
    from captum.attr import Occlusion

    device, side = _settle(), run.config.data.image_size
    # Large images are few: a single one's windows fill its batches, and take half a minute.
    images = images[: max(1, 2**16 // side**2)]
    # Channels last is PyTorch's faster layout on large images, by a quarter at 224 pixels.
    layout = torch.channels_last if side >= 64 else torch.contiguous_format
    module = twin(variables, image_size=side, plan=run.plan).to(device, memory_format=layout)
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
    row = _row(images, seconds, tried, best, windows=(1 + -(-(side - window) // step)) ** 2)
    where = {'device': str(device), 'layout': str(layout).removeprefix('torch.')}
    return row | where | {'largest_difference': difference}


def _row(images, seconds, tried, best, *, windows):
    """Returns what a table needs of captum's times."""
    median = statistics.median(seconds)
    return {
        'name': 'captum',
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
    ours = jax.jit(vgg.logits, static_argnames='plan')(variables, covered, plan=run.plan)
    ours, theirs = (jax.nn.softmax(np.asarray(z), axis=-1) for z in (ours, peer_fn(covered)))
    return float(np.max(np.abs(ours - theirs)))
