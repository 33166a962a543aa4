"""Verdicts on images of one's own (`--mode=detect`), by the detectors as one would deploy them.

Those are the ones of the first seed, under the protocol `held_out`, at the thresholds that let 5 %
of the clean maps they come from pass for adversarial.

Dimensions: K classes.
"""

import collections
import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import numpy as np

from occjax import detector, metrics, sources
from occjax.experiment import devices, judging, shard, stages, store
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.types import HeatmapSet, UsageError


def deployed(run: Run, division: judging.Division, method: str) -> tuple[detector.Bank, np.ndarray]:
    """Returns the first seed's bank of a method, and its `[K]` thresholds.

    That of a class without maps to fit by, or with too few clean ones to promise 5 %, is infinite:
    its detector never calls.
    """
    return first(store.load_banks(run, division, 'held_out', method), division, method)


def first(banks: detector.Bank, division: judging.Division, method: str):
    """Returns what `deployed` does, of banks that are at hand."""
    known = division.known(0, judging.score_banks(banks, METHODS[method], division.maps)[0])
    num_classes, rule = division.maps.unoccluded.shape[-1], dict(threshold=0.0, learns=True)
    levels = metrics.thresholds(num_classes=num_classes, **rule, **known).at_5
    return jax.tree.map(lambda leaf: leaf[0], banks), np.where(np.isnan(levels), np.inf, levels)


def detect(run: Run, path: str | None) -> str:
    """Returns a line for each image: its class, how probable, and what each detector says.

    Raises:
        UsageError: if `--images` names nothing that can be read, or a stage is missing. If it is
            only some of the files that cannot be read, the lines are printed first, one of them
            for each of those.
    """
    files = _files(path)
    images, said = _read(files, run.config.data.image_size)
    if len(files) == 1 and said:
        raise UsageError(*said.values())
    if len(images):
        read = [file for file in files if file not in said]
        said |= zip(read, _judge(run, images), strict=True)
    lines = '\n'.join(f'{file}  {said[file]}' for file in files)
    if len(images) < len(files):
        print(lines)
        raise UsageError(f'{len(files) - len(images)} of {len(files)} files could not be read.')
    return lines


def _read(files, size):
    """Returns the images that can be read, and of the other files what is wrong."""
    images, wrong = [], {}
    for file in files:
        try:
            images.append(sources.read_image(file, size))
        except UsageError as error:
            wrong[file] = str(error)
    return np.array(images, np.float32) / 255, wrong


def _judge(run, images):
    """Returns what `detect` says of each image."""
    variables, division = stages.load_variables(run), store.divide(run, 'held_out')
    predict_fn = functools.partial(_logits, variables, network=run.network)
    # Few images are no reason for a whole batch; maps are made in batches of a quarter.
    speed = dataclasses.replace(run.speed, eval_batch_size=min(run.batch_size, 4 * len(images)))
    few = dataclasses.replace(run, speed=speed)
    per_device = math.ceil(len(images) / jax.device_count())
    batch_size = min(run.batch_size, per_device * jax.device_count())
    unknown = np.zeros(len(images), np.int32)
    maps = HeatmapSet(
        logits=shard.map_images(few, variables, images),
        unoccluded=devices.in_batches(predict_fn, images, batch_size=batch_size),
        label=unknown,
        image_id=unknown,
        is_adversarial=unknown.astype(bool),
    )
    verdicts = [[] for _ in images]
    for method in ('detector', 'all_logits'):
        if method in run.config.detector.methods:
            bank, levels = deployed(run, division, method)
            seen = METHODS[method].inputs_fn(maps).astype(np.float32)
            scores = detector.score(bank, seen, METHODS[method].predicted(maps))
            for said, margin in zip(verdicts, scores - levels[maps.predicted], strict=True):
                word = 'adversarial' if margin > 0 else 'clean'
                known = f'{word} ({margin:+.2f})' if np.isfinite(margin) else 'no threshold'
                said.append(f'{method}: {known}')
    names = run.description['class_names']
    return [
        f'{names[k]} ({p:.3f})  {"  ".join(said)}'
        for k, p, said in zip(maps.predicted, maps.max_probability, verdicts, strict=True)
    ]


@functools.partial(jax.jit, static_argnames='network')
def _logits(variables, images, *, network):
    return network.classifier(variables)(images)


def _files(path):
    """Returns the image files that `--images` names, one or all in a folder."""
    if path is None:
        raise UsageError('--mode=detect needs --images=<a file or a folder of images>.')
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f'Cannot read --images={path}: no such file or folder, or no permission.')
    skipped = collections.Counter()
    found = list(sources.images_in(root, skipped))
    sources.tell_skipped(root, skipped)
    if not found:
        raise UsageError(f'There is no image in --images={path}.')
    return found
