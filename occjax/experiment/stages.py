"""The stages of the experiment: composition and the jit boundary.

    train -> heatmaps -> detectors -> report

Each reads what the one before left in the work directory, and picks up where it stopped. A stage
is done if its record is whole, everything that the record names is there, and both were made from
what is there today; else it makes what is missing, or says what no longer fits.
"""

import functools
import itertools
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occjax import classifier, comparators, data, guard, guard_file, guarding, names, vgg
from occjax.config import Classifier
from occjax.experiment import deployment, devices, hosts, judging, shard, storage, store
from occjax.experiment import results as results_lib
from occjax.experiment.run import Run, make_parts
from occjax.progress import Progress, say
from occjax.report import tables
from occjax.streams import Stream
from occjax.types import UsageError

_NAMED = 10  # classes, where many lack maps


@functools.partial(jax.jit, static_argnames='network')
def predict(variables, images, *, network):
    """Returns the `[B]` classes that the classifier predicts."""
    return jnp.argmax(network.classifier(variables)(images), axis=-1)


@functools.partial(jax.jit, static_argnames='side')
def shrink(images, *, side):
    """Returns `[B, side, side, C]` images, each pixel an average of those that it covers."""
    return jax.image.resize(images, (len(images), side, side, images.shape[-1]), 'linear')


def init_variables(run: Run, number: int = 0) -> vgg.Variables:
    """Returns the untrained classifier, which normalises by the training images' statistics.

    Args:
        run: the experiment.
        number: 0, or above it for the others of an ensemble.
    """
    stats = {}
    if run.config.classifier.normalize:
        stats = dict(zip(('mean', 'std'), data.pixel_statistics(run.dataset.train), strict=True))
    key, classes = run.key(Stream.CLASSIFIER_INIT, number), len(run.dataset.class_names)
    return vgg.init(key, num_classes=classes, **run.layers, **stats)


def train(run: Run):
    """Trains the classifier, a checkpoint an epoch, and evaluates it on both splits."""
    directory = run.workdir / 'classifier'
    split = run.dataset.train  # Opened first: what follows is made from it.
    if (directory / 'metrics.json').exists():
        step = store.load_metrics(run)['step']
        if run.trained or (directory / str(step)).is_dir():
            return
    if run.trained:
        variables, step, digest = load_trained(run), 0, run.trained.digest
    else:
        variables, step, digest = _train(run, directory, split)
    accuracies = {f'{name}_accuracy': _accuracy(run, variables, name) for name in names.SPLITS}
    say('classifier: ' + ', '.join(f'{name} {value:.4f}' for name, value in accuracies.items()))
    found = {'step': step, 'classifier': digest, 'made_from': run.origin('train')}
    storage.write_record(directory / 'metrics.json', accuracies | found)


def _accuracy(run, variables, name):
    """Returns the share of a split's images that are classified correctly."""
    split = getattr(run.dataset, name)
    starts = hosts.share(range(0, len(split), run.batch_size))
    own = sum(min(run.batch_size, len(split) - start) for start in starts)
    return classifier.evaluate(
        lambda images: predict(variables, devices.divide(images), network=run.network),
        data.batches(split, run.batch_size, share_fn=lambda _: starts),
        total_fn=hosts.total,
        on_batch=Progress(own, f'accuracy of {name} images'),
    )


def _train(run, directory, split):
    """Returns a trained classifier, the number of its last epoch, and its digest."""
    settings, adversaries = run.config.classifier, []
    for i in range(settings.ensemble):
        say(f'classifier: adversary {i + 1}/{settings.ensemble}, trained on clean images')
        adversaries.append(_trained(run, run.workdir / f'adversary-{i}', split, i + 1))

    def attacked(variables, images, step):
        sources = [variables, *adversaries]
        source = sources[run.rng(Stream.ATTACK_SOURCE, step).integers(len(sources))]
        return classifier.attack_half(
            source, images, epsilon=settings.adversarial_epsilon, plan=run.layers['plan']
        )

    images_fn = attacked if settings.adversarial_epsilon else None
    variables = _trained(run, directory, split, 0, images_fn)
    made = storage.checkpoint_metadata(directory, mode='train', step=settings.epochs)
    return devices.replicate(jax.device_get(variables)), settings.epochs, made['digest']


def _trained(run, directory, split, number, images_fn=None):
    """Returns the variables of a classifier after all epochs; continues after the last stored.

    They lie on the devices of all hosts.
    """
    settings, origin = run.config.classifier, run.origin('train')
    state = classifier.init_state(init_variables(run, number))
    done = storage.latest_step(directory) or 0
    hosts.check_same(done, 'epochs in the work directory')
    if done:
        state = storage.restore_checkpoint(directory, state, mode='train', made_from=origin)
        say(f'classifier: continuing after epoch {done}')
    state = devices.replicate(state, all_hosts=True)
    batch_size = min(settings.batch_size, len(split))
    rows = devices.rows(batch_size)
    steps = len(split) // batch_size
    rounds = max(1, math.ceil(settings.epoch_steps / steps))  # over the images, an epoch
    sides = [run.config.data.image_size] * settings.epochs
    sides[: len(settings.resize)] = settings.resize
    schedule = learning_rates(settings, sides, steps * rounds)
    for epoch in range(done, settings.epochs):
        progress = Progress(rounds * len(split), f'epoch {epoch + 1}/{settings.epochs}, images')
        began, side = time.monotonic(), sides[epoch]
        batches_fn = functools.partial(
            data.training_batches,
            split,
            batch_size,
            seed=run.config.seed,
            classifier=number,
            flip=settings.flip,
            rows=rows,
        )
        numbers = range(rounds * epoch, rounds * (epoch + 1))
        batches = itertools.chain.from_iterable(batches_fn(epoch=n) for n in numbers)
        state, values = classifier.fit_epoch(
            state,
            _sent(batches, batch_size, side),
            key=run.key(Stream.DROPOUT, number),
            schedule=schedule,
            dropout_rate=settings.dropout_rate,
            label_smoothing=settings.label_smoothing,
            plan=run.layers['plan'],
            images_fn=images_fn,
            step_fn=run.profiled('train', classifier.train_step),
            on_batch=progress,
        )
        if not np.isfinite(values['loss']):
            raise UsageError(
                f'Training diverged in epoch {epoch + 1}: try, in another --workdir, a lower '
                f'--config.classifier.learning_rate than {settings.learning_rate:g}.'
            )
        storage.save_checkpoint(directory, epoch + 1, state, made_from=origin)
        found = values | {'images_per_second': progress.rate, 'seconds': time.monotonic() - began}
        left = found['seconds'] * sum((later / side) ** 2 for later in sides[epoch + 1 :])
        _tell(run, number, epoch, found, left, step=int(state.step), schedule=schedule)
    hosts.wait('trained')
    return state.variables


def learning_rates(settings: Classifier, sides: list[int], steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a cosine to 0 over all epochs, or over those of each side.

    Ours: the paper names no schedule; a falling rate needs less tuning than a constant one.

    Args:
        settings: of the classifier, whose `restarts` begins anew with each side.
        sides: of the images, by epoch.
        steps: in an epoch.
    """
    runs = [len([*group]) for _, group in itertools.groupby(sides)]
    lengths = steps * np.array(runs if settings.restarts else [len(sides)])
    cosines = [optax.cosine_decay_schedule(settings.learning_rate, int(n)) for n in lengths]
    return optax.join_schedules(cosines, np.cumsum(lengths)[:-1].tolist())


def _sent(batches, batch_size, side):
    """Yields batches whose images lie, shrunk, on the devices of all hosts."""
    for batch in batches:
        yield batch._replace(images=shrink(devices.join(batch.images, batch_size), side=side))


def _tell(run, number, epoch, found, left, *, step, schedule):
    """Says how an epoch went and how many seconds are left, and keeps a line of it."""
    say(
        f'epoch {epoch + 1}/{run.config.classifier.epochs}: loss {found["loss"]:.4f}, '
        f'accuracy {found["accuracy"]:.4f}, {found["images_per_second"]:.0f} images/s, '
        f'{left / 60:.1f} min left'
    )
    rate = float(schedule(step - 1))
    run.log(
        stage='train', classifier=number, epoch=epoch + 1, step=step, learning_rate=rate, **found
    )


def load_trained(run: Run) -> Any:
    """Returns the weights of a classifier that is trained already."""
    return devices.replicate(jax.tree.map(jnp.asarray, run.trained.variables))


def load_variables(run: Run) -> Any:
    """Returns the trained classifier."""
    directory, metrics = run.workdir / 'classifier', store.load_metrics(run)
    if run.trained:
        return load_trained(run)
    like = jax.eval_shape(classifier.init_state, run.variable_shapes)
    known = dict(mode='train', step=metrics['step'])
    made = {'classifier': storage.checkpoint_metadata(directory, **known)['digest']}
    storage.check_origin(directory / 'metrics.json', metrics, made, mode='train')
    state = storage.restore_checkpoint(directory, like, made_from=run.origin('train'), **known)
    return devices.replicate(state.variables)


def mapped_ids(run: Run, name: str) -> np.ndarray:
    """Returns which images of a split are mapped, in the order of their maps."""
    rng = run.rng(Stream.EXPLAINED_IMAGES, names.SPLITS.index(name))
    return rng.permutation(len(getattr(run.dataset, name)))[: store.mapped(run, name)]


def comparator_images(run: Run) -> np.ndarray:
    """Returns the `u8[N, H, W, C]` training images that comparators learn from."""
    split = run.dataset.train
    order = run.rng(Stream.AUTOENCODER_IMAGES).permutation(len(split))
    return np.asarray(split.images[np.sort(order[: run.config.comparators.images])])


def load_autoencoder(run: Run) -> Any:
    """Returns MagNet's autoencoder, fitted to training images the first time."""
    split, wanted, directory = run.dataset.train, run.config.comparators, run.workdir / 'magnet'
    init_key, key = run.key(Stream.AUTOENCODER_INIT), run.key(Stream.AUTOENCODER_FIT)
    variables = comparators.init_autoencoder(init_key, channels=split.images.shape[-1])
    known = dict(made_from=run.origin('heatmaps'))
    if storage.latest_step(directory) is not None:
        return storage.restore_checkpoint(directory, variables, mode='heatmaps', **known)
    say("comparators: fitting MagNet's autoencoder")
    images = comparator_images(run)
    variables = comparators.fit_autoencoder(key, variables, images, steps=wanted.steps)
    storage.save_checkpoint(directory, wanted.steps, variables, **known)
    return variables


def autoencoder_digest(run: Run) -> str:
    """Returns the digest of the fitted autoencoder."""
    return storage.checkpoint_metadata(run.workdir / 'magnet', mode='heatmaps')['digest']


def heatmaps(run: Run):
    """Attacks both splits and stores the maps, shard by shard; what is stored stays.

    So does it where the config has come to ask for more, but for a last shard that was cut.

    Raises:
        UsageError: if what was made from fewer maps is there; names all of it.
    """
    directory = run.workdir / 'heatmaps'
    wanted = {name: store.shard_names(run, name) for name in names.SPLITS}
    if (directory / 'manifest.json').exists():
        found = store.read_manifest(run)['shards']
        if found.keys() != {*itertools.chain(*wanted.values())}:
            _refuse_stale(run)
        elif all((directory / name).exists() for name in found):
            return
    variables, shards = load_variables(run), []
    with hosts.first():
        autoencoder = load_autoencoder(run)
    made_from = store.classifier_origin(run) | {'autoencoder': autoencoder_digest(run)}
    for name in names.SPLITS:
        split, ids = getattr(run.dataset, name), mapped_ids(run, name)
        make_fn = functools.partial(shard.collect, run, variables, autoencoder, split)
        make_fn = functools.partial(make_fn, controls=name == 'test')
        for path, rows in wanted[name].items():
            here = ids[rows]
            shards.append((directory / path, len(here), functools.partial(make_fn, here)))
    make_parts(run, 'heatmaps, images', shards, mode='heatmaps', made_from=made_from)
    digests = {path.name: storage.file_digest(path) for path, *_ in shards}
    storage.keep_config(run.workdir, run.config)
    storage.write_record(directory / 'manifest.json', {'shards': digests, 'made_from': made_from})
    hosts.wait('manifest')
    if hosts.is_first():
        for cut in {path.name for path in directory.glob('*-*-*.npz')} - digests.keys():
            storage.discard(directory / cut)


def _refuse_stale(run):
    """Names what was made from fewer maps, before hours go into more of them."""
    made = ('detectors', 'adaptive', 'adaptive.json', 'fidelity')
    stale = [name for name in made if (run.workdir / name).exists()]
    if stale:
        raise UsageError(
            f'{run.workdir} has what was made from fewer maps than the config now asks for: delete '
            f'{", ".join(stale)} there and run the same command again.'
        )


def detectors(run: Run):
    """Fits the banks of every protocol, method and seed."""
    made_from = store.heatmaps_origin(run)
    for protocol in store.PROTOCOLS:
        division = store.divide(run, protocol)
        _tell_lacking(run, protocol, division)
        with_noise = run.config.detector.noise and protocol == 'held_out'
        noise = store.load_controls(run)['noise'] if with_noise else None
        for name in run.config.detector.methods:
            directory = run.workdir / 'detectors' / protocol / name
            if storage.latest_step(directory) is not None:
                found = storage.checkpoint_metadata(directory, mode='detectors')['made_from']
                storage.check_origin(directory, found, made_from, mode='detectors')
                continue
            began = time.monotonic()
            banks = store.fit_banks(run, division, name, noise)
            storage.save_checkpoint(
                directory, run.config.detector.steps, banks, made_from=made_from
            )
            if protocol == 'held_out':
                for path in (guard_path(run, name), _choice_path(run)):
                    storage.discard(path)  # Those of banks before these.
            say(f'detectors ({protocol}, {name}): fitted in {time.monotonic() - began:.0f} s')
        if protocol == 'held_out' and division.is_reserved[0].any():
            for name in deployed(run, division):
                load_guard(run, name, division)
    storage.keep_config(run.workdir, run.config)


def deployed(run: Run, division: judging.Division | None = None) -> tuple[str, ...]:
    """Returns the paper's detector and the best that the run has, see `choice`."""
    found = deployment.PAPERS, deployment.best(choice(run, division))
    return tuple(dict.fromkeys(found))


def choice(run: Run, division: judging.Division | None = None) -> dict[str, float]:
    """Returns what the best is chosen by, `deployment.aurocs`, from the store or anew."""
    path, candidates = _choice_path(run), [*deployment.candidates(run)]
    made_from = store.heatmaps_origin(run)
    if path.exists():
        record = storage.read_record(path, mode='detectors')
        if record['made_from'] == made_from and record['candidates'] == candidates:
            return record['aurocs']
    division = store.divide(run, 'held_out') if division is None else division
    aurocs = deployment.aurocs(run, division, store.load_controls(run)['noise'])
    if os.access(run.workdir, os.W_OK):
        record = {'aurocs': aurocs, 'candidates': candidates, 'made_from': made_from}
        storage.write_record(path, record)
    return aurocs


def _choice_path(run):
    return run.workdir / 'detectors' / 'choice.json'


def guard_path(run: Run, name: str) -> pathlib.Path:
    """Returns where a method's detectors are, as one would deploy them."""
    folder = 'sweep/detectors' if name in names.VIEWING else 'detectors'
    return run.workdir / folder / f'{name}.guard.npz'


def load_guard(run: Run, name: str, division: judging.Division | None = None) -> guard.Guard:
    """Returns one of `deployment.candidates` as one would deploy it, from its file or made anew.

    Detectors are those of the first seed under the protocol `held_out`, at thresholds of 5 % false
    positives. Those that see views a sweep has made.

    Args:
        run: the experiment.
        name: the method.
        division: of that protocol, if it is at hand.
    """
    path = guard_path(run, name)
    if name in names.VIEWING:
        made_from = store.classifier_origin(run)
        arrays = storage.load_arrays(path, mode='sweep', made_from=made_from)
        if not guard_file.is_current(arrays):
            raise UsageError(f'{path} is of another version of occjax: run --mode=sweep again.')
        return guard.from_arrays(arrays)

    def make():
        held_out = store.divide(run, 'held_out') if division is None else division
        scored = deployment.scored(run, name, held_out)
        attacks = f'FGSM attacks of ε = {tables.epsilon(run.config.attack.epsilon)}'
        unseen = deployment.held_out(scored.score_fn, held_out, store.load_controls(run))
        known = dict(held_out=unseen, attacks=attacks)
        return guard.to_arrays(guard_of(run, *scored[:2], method=name, **known))

    if not path.exists() and not os.access(run.workdir, os.W_OK):
        return guard.from_arrays(make())  # It is made each time where nothing can be stored.
    made_from = store.heatmaps_origin(run)
    arrays = storage.cached(path, make, mode='detectors', made_from=made_from)
    if not guard_file.is_current(arrays):
        arrays = make()
        storage.save_arrays(path, arrays, made_from=made_from)
    return guard.from_arrays(arrays)


def guard_of(run: Run, *found: Any, method: str, **settings: Any) -> guard.Guard:
    """Returns `guard.of_bank` with the windows of a run, for a method that sees any."""
    fill, top_classes = run.config.occlusion.fill, run.config.occlusion.top_classes
    variables = load_variables(run)
    shape = (*run.image_shape, 3)
    if method in names.COMPARATORS:
        settings |= shard.compare_settings(run) | dict(autoencoder=load_autoencoder(run))
    if guard.METHODS[method].windows:
        settings |= run.geometry | ({'engine': 'approximate'} | run.knobs if run.knobs else {})
    return guard.of_bank(
        *found,
        method=method,
        fill=np.array(fill) if fill else shard.fill_of(run, variables),
        image_shape=shape,
        probe_logits=guarding.probe(run.network.classifier(variables), shape),
        class_names=run.description['class_names'],
        **settings,
        **({'top_classes': top_classes} if top_classes else {}),
    )


def _tell_lacking(run, protocol, division):
    """Says of which classes there are too few maps, and what would help."""
    maps, classes = division.maps, np.flatnonzero(judging.lacking(division))
    if not len(classes):
        return
    class_names, split = run.description['class_names'], store.PROTOCOLS[protocol]
    clean, adversarial = (
        np.bincount(maps.predicted[maps.is_adversarial == kind], minlength=len(class_names))
        for kind in (False, True)
    )
    few = [
        f'{class_names[k]} ({clean[k]} clean, {adversarial[k]} adversarial)'
        for k in classes[:_NAMED]
    ]
    more = f' and {len(classes) - _NAMED} more' if len(classes) > _NAMED else ''
    config, there = run.config, run.description[f'{split}_images']
    mapped, help_ = store.mapped(run, split), f'more {split} images of them help'
    if mapped < there:
        help_ += f', --config.occlusion.{split}_images above {mapped} (of {there})'
    if (adversarial[classes] == 0).any():
        help_ += (
            ', or, for adversarial ones in another --workdir, --config.attack.epsilon above '
            f'{config.attack.epsilon:g}'
        )
    say(
        f'detectors ({protocol}): {len(classes)} of {len(class_names)} classes have too few maps '
        f'for detectors and thresholds of their own: {", ".join(few)}{more}; {help_}.'
    )


STAGES = dict(zip(names.STAGES, (train, heatmaps, detectors, results_lib.make_report), strict=True))
