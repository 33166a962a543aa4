"""The stages of the experiment: composition and the jit boundary.

    train -> heatmaps -> detectors -> report

Each reads what the one before left in the work directory, and picks up where it stopped.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occjax import attack, classifier, data, evaluation, storage, vgg
from occjax import engine as engine_lib
from occjax.run import Progress, Run, say
from occjax.types import Split, UsageError

SPLITS = ('train', 'test')

# A purpose of random numbers: each has its own stream under the config's one seed.
_MAPPED_IMAGES = 0


@functools.partial(jax.jit, static_argnames='plan')
def predict(variables, images, *, plan):
    """Returns the `[B]` classes that the classifier names."""
    return jnp.argmax(vgg.logits(variables, images, plan=plan), axis=-1)


@functools.partial(jax.jit, static_argnames=('plan', 'clip'))
def attack_batch(variables, images, labels, *, epsilon, clip, plan):
    """Returns FGSM images, and the `[B, K]` logits before and after."""
    logits_fn = functools.partial(vgg.logits, variables, plan=plan)
    bounds = (0.0, 1.0) if clip else None
    adversarial = attack.fgsm(logits_fn, images, labels, epsilon=epsilon, bounds=bounds)
    return adversarial, logits_fn(images), logits_fn(adversarial)


@functools.partial(jax.jit, static_argnames=('plan', 'clip'))
def noise_batch(variables, images, ids, *, seed, epsilon, clip, plan):
    """Returns images under noise of the attack's size, each image's own, and their logits."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(ids)
    bounds = (0.0, 1.0) if clip else None
    noise_fn = functools.partial(attack.sign_noise, epsilon=epsilon, bounds=bounds)
    noisy = jax.vmap(lambda key, image: noise_fn(image[None], key=key)[0])(keys, images)
    return noisy, vgg.logits(variables, noisy, plan=plan)


_KNOBS = ('size', 'stride', 'grid', 'chunk_size', 'plan', 'engine', 'threshold', 'every')


@functools.partial(jax.jit, static_argnames=('mesh', *_KNOBS))
def map_batch(variables, images, fill, *, mesh, plan, engine='full', **geometry):
    """Returns the `[B, h, w, K]` logits under every window; each device maps its own images."""

    def occluded_logits(variables, images, fill):
        settings = dict(plan=plan, engine=engine, fill=fill, **geometry)
        return engine_lib.occluded_logits(variables, images, **settings)

    by_image = jax.P('data')
    return jax.shard_map(
        occluded_logits,
        mesh=mesh,
        in_specs=(jax.P(), by_image, jax.P()),
        out_specs=by_image,
        check_vma=False,
    )(variables, images, fill)


@functools.partial(jax.jit, static_argnames='side')
def shrink(images, *, side):
    """Returns `[B, side, side, C]` images, each pixel an average of those that it stands for."""
    return jax.image.resize(images, (len(images), side, side, images.shape[-1]), 'linear')


def init_variables(run: Run) -> vgg.Variables:
    """Returns the untrained classifier, which normalises by the training images' statistics."""
    settings, stats = run.config.classifier, {}
    if settings.normalize:
        stats = dict(zip(('mean', 'std'), data.pixel_statistics(run.dataset.train), strict=True))
    return vgg.init(
        jax.random.key(run.config.seed),
        image_size=run.config.data.image_size,
        num_classes=len(run.dataset.class_names),
        hidden=settings.hidden,
        plan=run.plan,
        **stats,
    )


def train(run: Run):
    """Trains the classifier, a checkpoint an epoch, and evaluates it on both splits."""
    settings, directory = run.config.classifier, run.workdir / 'classifier'
    if (directory / 'metrics.json').exists():
        return
    split = run.dataset.train
    state = classifier.init_state(init_variables(run))
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
        batches = data.training_batches(split, batch_size, seed=run.config.seed, epoch=epoch)
        state, values = classifier.fit_epoch(
            state,
            (
                batch._replace(images=shrink(run.divide(batch.images), side=side))
                for batch in batches
            ),
            key=jax.random.key(run.config.seed + 1),
            schedule=schedule,
            dropout_rate=settings.dropout_rate,
            plan=run.plan,
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
    predict_fn = functools.partial(predict, state.variables, plan=run.plan)
    accuracies = {
        f'{name}_accuracy': classifier.evaluate(
            lambda images: predict_fn(run.divide(images)),
            data.batches(getattr(run.dataset, name), run.batch_size),
        )
        for name in SPLITS
    }
    say('classifier: ' + ', '.join(f'{name} {value:.4f}' for name, value in accuracies.items()))
    storage.write_json(directory / 'metrics.json', accuracies)


def load_variables(run: Run) -> vgg.Variables:
    """Returns the trained classifier."""
    directory = run.workdir / 'classifier'
    storage.read_json(directory / 'metrics.json', mode='train')  # Absent until training is over.
    like = jax.eval_shape(lambda: classifier.init_state(init_variables(run)))
    return run.replicate(storage.restore_checkpoint(directory, like, mode='train').variables)


def fill_of(run: Run, variables: vgg.Variables) -> np.ndarray:
    """Returns what covers a window, one value or one a channel; by default the training mean."""
    return np.asarray(run.config.occlusion.fill or variables.pixel_stats['mean'], np.float32)


def collect(
    run: Run, variables: vgg.Variables, split: Split, ids: np.ndarray, *, controls: bool = False
) -> dict:
    """Returns a shard: the heatmaps of some images and their attacks, and what the attack did.

    Correctly classified images and successful attacks on them have maps (§III-C), stored as the
    logits of all classes, so that every detector and table follows without the classifier. The
    `controls` have them as well, under the names of `CONTROLS`.
    """
    settings = run.config.attack
    images, labels = data.take(split, ids), split.labels[ids]
    attack_fn = functools.partial(
        attack_batch, variables, epsilon=settings.epsilon, clip=settings.clip, plan=run.plan
    )
    adversarial, before, after = run.in_batches(
        attack_fn, images, labels, batch_size=run.batch_size
    )
    correct, successful, _ = jax.device_get(attack.outcome(before, after, labels))
    # By kind: the images, their logits, which of them are mapped, and whether they are attacked.
    kinds = {
        'correct': (images, before, correct, False),
        'adversarial': (adversarial, after, successful, True),
    }
    if controls:
        noise_fn = functools.partial(
            noise_batch,
            variables,
            seed=run.config.seed + 4,
            epsilon=settings.epsilon,
            clip=settings.clip,
            plan=run.plan,
        )
        noisy, under_noise = run.in_batches(noise_fn, images, ids, batch_size=run.batch_size)
        still = correct & (under_noise.argmax(-1) == labels)
        kinds |= {
            'noise': (noisy, under_noise, still, False),
            'misclassified': (images, before, ~correct, False),
            'failed': (adversarial, after, correct & ~successful, True),
        }
    chosen = np.concatenate([pixels[mapped] for pixels, _, mapped, _ in kinds.values()])
    logits = np.zeros((0, *run.grid, before.shape[-1]), np.float32)
    if len(chosen):
        mapping = run.mapping(before.shape[-1])
        map_fn = functools.partial(
            map_batch,
            variables,
            fill=fill_of(run, variables),
            mesh=run.mesh,
            plan=run.plan,
            engine=mapping.engine,
            chunk_size=mapping.chunk_size,
            **run.geometry,
            **run.knobs,
        )
        logits = run.in_batches(map_fn, chosen, batch_size=mapping.batch_size)
    parts, start = {}, 0
    for kind, (_, unoccluded, mapped, is_adversarial) in kinds.items():
        count = mapped.sum()
        parts[kind] = {
            'logits': logits[start : start + count],
            'unoccluded': unoccluded[mapped],
            'label': labels[mapped],
            'image_id': ids[mapped],
            'is_adversarial': np.full(count, is_adversarial),
        }
        start += count
    correct_part, adversarial_part = parts.pop('correct'), parts.pop('adversarial')
    maps = {
        name: np.concatenate([correct_part[name], adversarial_part[name]]) for name in correct_part
    }
    for kind, part in parts.items():
        maps |= {f'{kind}_{name}': array for name, array in part.items()}
    attacked = adversarial[correct]
    example = np.flatnonzero(successful)[:1]  # One a shard, for the figures.
    return maps | {
        'attempted': correct.sum(),
        'nan_count': np.isnan(attacked).sum(),
        'max_perturbation': np.nanmax(np.abs(attacked - images[correct]), initial=0),
        'pixel_range': [np.nanmin(attacked, initial=1), np.nanmax(attacked, initial=0)],
        'example_id': ids[example],
        'example_clean': images[example],
        'example_adversarial': adversarial[example],
    }


def heatmaps(run: Run):
    """Attacks both splits and stores the maps, shard by shard; what is stored stays."""
    directory = run.workdir / 'heatmaps'
    if (directory / 'manifest.json').exists():
        return
    variables, shards = load_variables(run), []
    for split_number, name in enumerate(SPLITS):
        split = getattr(run.dataset, name)
        limit = getattr(run.config.occlusion, f'{name}_images') or len(split)
        ids = run.rng(_MAPPED_IMAGES, split_number).permutation(len(split))[:limit]
        for start in range(0, len(ids), run.shard_size):
            path = directory / f'{name}-{start:07d}.npz'
            shards.append((path, split, ids[start : start + run.shard_size]))
    progress = Progress(sum(len(ids) for *_, ids in shards), 'heatmaps, images')
    for path, split, ids in shards:
        if path.exists():
            progress.total -= len(ids)
        else:
            controls = split is run.dataset.test
            storage.save_arrays(path, collect(run, variables, split, ids, controls=controls))
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
