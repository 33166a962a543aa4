"""Verdicts on images of one's own (`--mode=detect`), by the detectors as one would deploy them.

Those are the ones of the first seed, under the protocol `held_out`, at the thresholds that let 5 %
of their fitting images' clean maps pass for adversarial.

Dimensions: B batch, H W C image, K classes.
"""

import functools
import os
from pathlib import Path

import jax
import numpy as np

from occjax import detector, evaluation, judging, metrics, shard, sources, stages, verdict, vgg
from occjax.methods import METHODS
from occjax.run import Run
from occjax.types import UsageError


def deployed(run: Run, division: judging.Division, method: str) -> tuple[detector.Bank, np.ndarray]:
    """Returns the first seed's bank of a method, and its `[K]` thresholds.

    A class without maps to set one has an unfitted detector, and 0.
    """
    banks, fitted = evaluation.load_banks(run, division, 'held_out', method), division.is_fitted[0]
    maps, scores = division.maps, judging.score_banks(banks, METHODS[method], division.maps)[0]
    levels = metrics.thresholds(
        scores[fitted], maps.select(fitted), maps.unoccluded.shape[-1], threshold=0.0
    )[1]
    return jax.tree.map(lambda leaf: leaf[0], banks), np.nan_to_num(levels)


@functools.partial(jax.jit, static_argnames=('method', 'plan', *shard.WINDOWS))
def judge_batch(variables, bank, thresholds, fill, images, *, method, plan, **settings):
    """Returns `[B, K]` probabilities and the `[B]` margins above the thresholds."""
    settings = dict(method=METHODS[method], plan=plan, fill=fill, **settings)
    margins = verdict.margins(variables, bank, thresholds, images, **settings)
    return jax.nn.softmax(vgg.logits(variables, images, plan=plan)), margins


def detect(run: Run) -> str:
    """Returns a line for each image: its class, how probable, and what each detector says."""
    files = _files(run.images)
    size = run.config.data.image_size
    images = np.stack([sources.read_image(file, size) for file in files]).astype(np.float32) / 255
    variables, division = stages.load_variables(run), evaluation.divide(run, 'held_out')
    mapping = run.mapping(vgg.num_classes(variables))
    methods = [name for name in ('detector', 'all_logits') if name in run.config.detector.methods]
    margins = {}
    for method in methods:
        judge_fn = functools.partial(
            judge_batch,
            variables,
            *deployed(run, division, method),
            shard.fill_of(run, variables),
            method=method,
            plan=run.plan,
            engine=mapping.engine,
            chunk_size=mapping.chunk_size,
            **run.geometry,
            **run.knobs,
        )
        probabilities, margins[method] = run.in_batches(
            judge_fn, images, batch_size=mapping.batch_size
        )
    names = run.description['class_names']
    lines = []
    for i, file in enumerate(files):
        k = probabilities[i].argmax()
        verdicts = [
            f'{method}: {"adversarial" if values[i] > 0 else "clean"} ({values[i]:+.2f})'
            for method, values in margins.items()
        ]
        lines.append(f'{file}  {names[k]} ({probabilities[i, k]:.3f})  {"  ".join(verdicts)}')
    return '\n'.join(lines)


def _files(path):
    """Returns the image files that `--images` names, one or all in a folder."""
    if path is None:
        raise UsageError('--mode=detect needs --images=<a file or a folder of images>.')
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f'Cannot read --images={path}: no such file or folder, or no permission.')
    found = sorted(p for p in root.rglob('*') if p.suffix.lower() in sources.EXTENSIONS)
    if not found:
        raise UsageError(f'There is no image in --images={path}.')
    return found
