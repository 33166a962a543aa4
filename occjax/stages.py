"""The stages of the experiment: composition and the jit boundary.

    train -> heatmaps -> detectors -> report

Each reads what the one before left in the work directory, and picks up where it stopped.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occjax import classifier, comparators, data, evaluation, shard, storage, vgg
from occjax.run import Progress, Run, say
from occjax.types import UsageError

SPLITS = ('train', 'test')

# Purposes of random numbers: each has its own stream under the config's one seed.
_MAPPED_IMAGES, _SOURCE, _AUTOENCODER = 0, 6, 7
_ADVERSARIES = 1000  # How far the seeds of an ensemble's others are from one another.


@functools.partial(jax.jit, static_argnames='plan')
def predict(variables, images, *, plan):
    """Returns the `[B]` classes that the classifier names."""
    return jnp.argmax(vgg.logits(variables, images, plan=plan), axis=-1)


@functools.partial(jax.jit, static_argnames='side')
def shrink(images, *, side):
    """Returns `[B, side, side, C]` images, each pixel an average of those that it stands for."""
    return jax.image.resize(images, (len(images), side, side, images.shape[-1]), 'linear')


def init_variables(run: Run, seed: int | None = None) -> vgg.Variables:
    """Returns the untrained classifier, which normalises by the training images' statistics."""
    stats = {}
    if run.config.classifier.normalize:
        stats = dict(zip(('mean', 'std'), data.pixel_statistics(run.dataset.train), strict=True))
    seed = run.config.seed if seed is None else seed
    return _init(run, seed, len(run.dataset.class_names), **stats)


def _init(run, seed, num_classes, **stats):
    """Returns an untrained classifier."""
    shape = dict(image_size=run.config.data.image_size, num_classes=num_classes)
    return vgg.init(jax.random.key(seed), plan=run.plan, **shape, **run.widths, **stats)


def train(run: Run):
    """Trains the classifier, a checkpoint an epoch, and evaluates it on both splits."""
    settings, directory = run.config.classifier, run.workdir / 'classifier'
    if (directory / 'metrics.json').exists():
        return
    adversaries = []
    for i in range(settings.ensemble):
        say(f'classifier: adversary {i + 1}/{settings.ensemble}, trained on clean images')
        seed = run.config.seed + _ADVERSARIES * (i + 1)
        adversaries.append(_trained(run, run.workdir / f'adversary-{i}', seed))

    def attacked(variables, images, step):
        sources = [variables, *adversaries]
        source = sources[run.rng(_SOURCE, step).integers(len(sources))]
        return classifier.attack_half(
            source, images, epsilon=settings.adversarial_epsilon, plan=run.plan
        )

    images_fn = attacked if settings.adversarial_epsilon else None
    variables = _trained(run, directory, run.config.seed, images_fn)
    predict_fn = functools.partial(predict, variables, plan=run.plan)
    accuracies = {
        f'{name}_accuracy': classifier.evaluate(
            lambda images: predict_fn(run.divide(images)),
            data.batches(getattr(run.dataset, name), run.batch_size),
        )
        for name in SPLITS
    }
    say('classifier: ' + ', '.join(f'{name} {value:.4f}' for name, value in accuracies.items()))
    storage.write_json(directory / 'metrics.json', accuracies)


def _trained(run, directory, seed, images_fn=None):
    """Returns the variables of a classifier after all epochs; continues after the last stored."""
    settings, split = run.config.classifier, run.dataset.train
    state = classifier.init_state(init_variables(run, seed))
    done = storage.latest_step(directory) or 0
    if done:
        state = storage.restore_checkpoint(directory, state, mode='train')
        say(f'classifier: continuing after epoch {done}')
    state = run.replicate(state)
    batch_size = min(settings.batch_size, len(split))
    steps = len(split) // batch_size * settings.epochs
    # Ours: the paper names no schedule; a falling rate needs less tuning than a constant one.
    schedule = optax.cosine_decay_schedule(settings.learning_rate, steps)
    for epoch in range(done, settings.epochs):
        progress = Progress(len(split), f'epoch {epoch + 1}/{settings.epochs}, images')
        side = dict(enumerate(settings.resize)).get(epoch, run.config.data.image_size)
        batches = data.training_batches(split, batch_size, seed=seed, epoch=epoch)
        state, values = classifier.fit_epoch(
            state,
            (
                batch._replace(images=shrink(run.divide(batch.images), side=side))
                for batch in batches
            ),
            key=jax.random.key(seed + 1),
            schedule=schedule,
            dropout_rate=settings.dropout_rate,
            label_smoothing=settings.label_smoothing,
            plan=run.plan,
            images_fn=images_fn,
            on_batch=progress,
        )
        if not np.isfinite(values['loss']):
            raise UsageError(
                f'Training diverged in epoch {epoch + 1}: try a lower '
                f'--config.classifier.learning_rate than {settings.learning_rate:g}.'
            )
        say(
            f'epoch {epoch + 1}/{settings.epochs}: loss {values["loss"]:.4f}, '
            f'accuracy {values["accuracy"]:.4f}, {progress.rate:.0f} images/s'
        )
        storage.save_checkpoint(directory, epoch + 1, state)
    return state.variables


def load_variables(run: Run) -> vgg.Variables:
    """Returns the trained classifier."""
    directory = run.workdir / 'classifier'
    storage.read_json(directory / 'metrics.json', mode='train')  # Absent until training is over.
    # From the description, so that no image is read for the shapes.
    num_classes = len(run.description['class_names'])
    fresh = functools.partial(_init, run, run.config.seed, num_classes)
    like = jax.eval_shape(lambda: classifier.init_state(fresh()))
    return run.replicate(storage.restore_checkpoint(directory, like, mode='train').variables)


def mapped_ids(run: Run, name: str) -> np.ndarray:
    """Returns which images of a split are mapped, in the order of their maps."""
    count = len(getattr(run.dataset, name))
    limit = getattr(run.config.occlusion, f'{name}_images') or count
    return run.rng(_MAPPED_IMAGES, SPLITS.index(name)).permutation(count)[:limit]


def load_autoencoder(run: Run) -> Any:
    """Returns MagNet's autoencoder, fitted to training images the first time."""
    split, wanted, directory = run.dataset.train, run.config.comparators, run.workdir / 'magnet'
    init_key, key = jax.random.split(jax.random.key(run.config.seed + 6))
    variables = comparators.init_autoencoder(init_key, channels=split.images.shape[-1])
    if storage.latest_step(directory) is not None:
        return storage.restore_checkpoint(directory, variables, mode='heatmaps')
    say("comparators: fitting MagNet's autoencoder")
    chosen = np.sort(run.rng(_AUTOENCODER).permutation(len(split))[: wanted.images])
    images = np.asarray(split.images[chosen])
    variables = comparators.fit_autoencoder(key, variables, images, steps=wanted.steps)
    storage.save_checkpoint(directory, wanted.steps, variables)
    return variables


def heatmaps(run: Run):
    """Attacks both splits and stores the maps, shard by shard; what is stored stays."""
    directory = run.workdir / 'heatmaps'
    if (directory / 'manifest.json').exists():
        return
    variables, autoencoder, shards = load_variables(run), load_autoencoder(run), []
    for name in SPLITS:
        split, ids = getattr(run.dataset, name), mapped_ids(run, name)
        for start in range(0, len(ids), run.shard_size):
            path = directory / f'{name}-{start:07d}.npz'
            shards.append((path, split, ids[start : start + run.shard_size]))
    progress = Progress(sum(len(ids) for *_, ids in shards), 'heatmaps, images')
    for path, split, ids in shards:
        if path.exists():
            progress.total -= len(ids)
        else:
            controls = split is run.dataset.test
            arrays = shard.collect(run, variables, autoencoder, split, ids, controls=controls)
            storage.save_arrays(path, arrays)
            progress(len(ids))
    storage.write_json(directory / 'manifest.json', [path.name for path, *_ in shards])


def detectors(run: Run):
    """Fits the banks of every protocol, method and seed."""
    for protocol in evaluation.PROTOCOLS:
        division = evaluation.divide(run, protocol)
        for name in run.config.detector.methods:
            directory = run.workdir / 'detectors' / protocol / name
            if storage.latest_step(directory) is not None:
                continue
            began = time.monotonic()
            banks = evaluation.fit_banks(run, division, name)
            storage.save_checkpoint(directory, run.config.detector.steps, banks)
            say(f'detectors ({protocol}, {name}): fitted in {time.monotonic() - began:.0f} s')


STAGES = {
    'train': train,
    'heatmaps': heatmaps,
    'detectors': detectors,
    'report': evaluation.make_report,
}
