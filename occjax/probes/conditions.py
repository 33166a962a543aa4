"""Test images, attacked in one way and mapped with one kind of window, from the store or anew.

Dimensions: B batch, K classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, comparators, data, names
from occjax import config as config_lib
from occjax import views as views_lib
from occjax.config import Occlusion
from occjax.experiment import devices, hosts, shard, stages, storage, store
from occjax.experiment.run import Run, parts
from occjax.methods import METHODS
from occjax.streams import Stream
from occjax.types import HeatmapSet, UsageError, condense


def _nearest(attack_fn, fn, x, y, *, key, epsilon, steps, bounds):
    """Calls an attack without a ball."""
    return attack_fn(fn, x, y, steps=steps, bounds=bounds or attack.PIXELS)


# Each is called with a key of its image's own; those that are deterministic leave it.
ATTACKS = {
    'none': lambda fn, x, y, *, key, epsilon, steps, **kw: x,
    'fgsm': lambda fn, x, y, *, key, epsilon, steps, **kw: attack.fgsm(
        fn, x, y, epsilon=epsilon, **kw
    ),
    'noise': lambda fn, x, y, *, key, epsilon, steps, bounds: attack.sign_noise(
        x, key=key, epsilon=epsilon, bounds=bounds
    ),
    'targeted_fgsm': lambda fn, x, y, *, key, epsilon, steps, **kw: attack.targeted_fgsm(
        fn, x, jnp.argmin(fn(x), axis=-1), epsilon=epsilon, **kw
    ),
    'bim': lambda fn, x, y, *, key, **kw: attack.bim(fn, x, y, **kw),
    'pgd': attack.pgd,
    'mi_fgsm': lambda fn, x, y, *, key, **kw: attack.mi_fgsm(fn, x, y, **kw),
    'square': attack.square,
    'pgd_l2': lambda fn, x, y, *, epsilon, **kw: attack.pgd_l2(
        fn, x, y, epsilon=epsilon * x[0].size ** 0.5, **kw
    ),
    'apgd': attack.apgd,
    'carlini_wagner': functools.partial(_nearest, attack.carlini_wagner),
    'deepfool': functools.partial(_nearest, attack.deepfool),
}


_ONE_STEP = ('none', 'noise', 'fgsm', 'targeted_fgsm')


@functools.partial(jax.jit, static_argnames=('name', 'steps', 'clip', 'network'))
def attack_batch(variables, images, labels, ids, *, name, epsilon, steps, key, clip, network):
    """Returns attacked images, and `[B, K]` logits before and after; no image sees its batch."""
    logits_fn = network.classifier(variables)
    bounds = attack.PIXELS if clip else None
    settings = dict(epsilon=epsilon, steps=steps, bounds=bounds)

    def one(image, label, image_id):
        own = jax.random.fold_in(key, image_id)
        return ATTACKS[name](logits_fn, image[None], label[None], key=own, **settings)[0]

    adversarial = jax.vmap(one)(images, labels, ids)
    return adversarial, logits_fn(images), logits_fn(adversarial)


@functools.partial(jax.jit, static_argnames=('views', 'network'))
def view_batch(variables, autoencoder, images, *, views, network):
    """Returns the `[B, V, K]` logits under some of `names.VIEWS`."""
    seen = views_lib.of_names(views, autoencoder)
    return views_lib.viewed_logits(network.classifier(variables), images, seen)


@functools.partial(jax.jit, static_argnames='network')
def logits_batch(variables, images, *, network):
    """Returns the `[B, K]` logits."""
    return network.classifier(variables)(images)


@functools.partial(jax.jit, static_argnames='network')
def feature_batch(variables, images, *, network):
    """Returns the `[B, F]` last features; of a network whose features aren't known, its logits."""
    return network.features(variables)(images).reshape(len(images), -1)


_multi_lid = jax.jit(comparators.multi_lid, static_argnames='neighbours')


class Sight(NamedTuple):
    """What is stored of attacked images."""

    see_fn: Callable[[np.ndarray, np.ndarray], dict]  # of images and their logits
    folder: str
    origin: storage.Origin  # what it is made from, beside the classifier


def sights(run: Run, variables: Any, windows: Occlusion | None = None) -> list[Sight]:
    """Returns what is to be stored of a sweep's images; the first are the maps.

    They are under the config's windows, or under others; where no method looks at windows, under
    none. But for other windows there are also the logits of the sweep's `views`, and what rivals
    see that need neither.

    Raises:
        UsageError: if the sweep's twin is a classifier of other images.
    """
    found = [_maps(run, variables, windows), None if windows else _rivals(run, variables)]
    return [sight for sight in found if sight]


def _rivals(run: Run, variables: Any) -> Sight | None:
    """Returns what methods see that need neither windows nor views; None if none is wanted."""
    wanted, words, origin = run.config.sweep, [], {}
    methods, learnt = set(wanted.methods), run.config.comparators
    other = _twin(run) if methods & set(names.TWINNED) else None
    if other:
        origin['twin'] = store.load_metrics(other)['classifier']
        words.append(f'twin-{origin["twin"][:12]}')
    if 'multi_lid' in methods:
        words.append(f'{wanted.neighbours}-of-{learnt.images}')
    if methods & set(names.COMPARATORS):
        with hosts.first():
            autoencoder = stages.load_autoencoder(run)
        origin['autoencoder'] = stages.autoencoder_digest(run)
        words.append('comparators')

    @functools.cache  # Only where something is to be made.
    def functions():
        found = {}
        if other:
            known = dict(network=other.network)
            found['twin'] = functools.partial(logits_batch, stages.load_variables(other), **known)
        if 'multi_lid' in methods:
            features_fn = functools.partial(feature_batch, variables, network=run.network)
            clean = stages.comparator_images(run).astype(np.float32) / 255
            reference = devices.in_batches(features_fn, clean, batch_size=run.batch_size)
            count = min(wanted.neighbours, len(reference))
            nearest_fn = functools.partial(_multi_lid, reference=reference, neighbours=count)
            found['neighbours'] = lambda images: nearest_fn(features_fn(images))
        if 'comparators' in words:
            found['comparators'] = shard.comparing(run, variables, autoencoder)
        return found

    def see(images, unoccluded):
        return {
            name: devices.in_batches(fn, images, batch_size=run.batch_size)
            for name, fn in functions().items()
        }

    return Sight(see, '-'.join(words), origin) if words else None


def _twin(run):
    """Returns the run whose classifier is asked beside this one's."""
    workdir = pathlib.Path(run.config.sweep.twin).expanduser()
    stored = storage.read_record(workdir / 'config.json', mode='train')
    other = Run(config=config_lib.from_json(stored), workdir=workdir, data_dir=run.data_dir)
    if other.description != run.description:
        raise UsageError(
            f'config.sweep.twin is {str(workdir)!r}, which was made from other images: choose the '
            'work directory of a classifier with the same config.data and config.seed, and '
            'something else in config.classifier.'
        )
    return other


def _maps(run, variables, windows):
    """Returns the sight of the config's windows, or of others; the former with the views."""
    views, methods = () if windows else run.config.sweep.views, run.config.sweep.methods
    spectra = not windows and 'input_mfs' in methods
    occludes = windows or any(METHODS[name].windows for name in methods if name in METHODS)
    wanted, origin = windows or run.config.occlusion, {}
    seer = run.with_occlusion(wanted)
    if views:
        with hosts.first():
            autoencoder = stages.load_autoencoder(run)
        origin = {'views': ','.join(views), 'autoencoder': stages.autoencoder_digest(run)}
        known = dict(views=views, network=run.network)
        view_fn = functools.partial(view_batch, variables, autoencoder, **known)

    def see(images, unoccluded):
        if occludes:
            logits = shard.map_images(seer, variables, images, unoccluded)
        else:  # A map of no windows.
            logits = condense(
                np.zeros((len(images), 0, 0, unoccluded.shape[-1]), np.float32),
                unoccluded,
                run.config.occlusion.top_classes,
            )
        found = {'logits': logits}
        if views:
            logits = devices.in_batches(view_fn, images, batch_size=run.batch_size)
            found['views'] = condense(logits, unoccluded, run.config.occlusion.top_classes)
        if spectra:
            known = dict(batch_size=run.batch_size)
            spectrum = devices.in_batches(comparators.spectrum, images, **known)
            found['spectrum'] = spectrum
        return found

    fill = ','.join(map(storage.number_name, wanted.fill)) or 'mean'
    place = f'{wanted.size}-{wanted.stride}-{fill}' if occludes else 'none'
    return Sight(see, place + '-views' * bool(views) + '-spectra' * spectra, origin)


# Forward passes per image, of attacks that do not take just a gradient in each step.
_GRADIENT = 3  # A backward pass takes as much as two.
_PASSES = {
    'none': lambda steps: 0,
    'noise': lambda steps: 0,
    'fgsm': lambda steps: _GRADIENT,
    'targeted_fgsm': lambda steps: 1 + _GRADIENT,
    'square': lambda steps: steps,
    'carlini_wagner': lambda steps: 9 * steps * _GRADIENT,  # Nine searches.
    'deepfool': lambda steps: steps * (1 + 2 * 10),  # Ten classes pulled back.
}


def work(run: Run, sights: Sequence[Sight], name: str, epsilon: float, seen: int) -> int:
    """Returns how many forward passes an attack takes, but for parts that are stored.

    `seen` are those that an image's maps take.
    """
    places = (place for sight in sights for place in _places(run, sight, name, epsilon))
    missing = {start: end - start for path, start, end in places if not path.exists()}
    steps = run.config.sweep.steps
    passes = _PASSES[name](steps) if name in _PASSES else _GRADIENT * steps
    return sum(missing.values()) * (2 + passes + seen)


def _ids(run):
    return stages.mapped_ids(run, 'test')[: run.config.sweep.images]


def _places(run, sight, name, epsilon):
    """Yields the file of each part, and from where to where in `_ids` its images are."""
    iterated = '' if name in _ONE_STEP else f'-{run.config.sweep.steps}'
    count = len(_ids(run))
    for start in range(0, count, run.shard_size):
        end = min(start + run.shard_size, count)
        # All that makes the part is in its name, so that other settings make other parts.
        path = f'{name}{iterated}-{storage.number_name(epsilon)}-{start:07d}-{end:07d}.npz'
        yield run.workdir / 'sweep' / sight.folder / path, start, end


def mapped(
    run: Run, variables: Any, sights: Sequence[Sight], name: str, epsilon: float = 0.0
) -> HeatmapSet:
    """Returns the maps of the attacks that succeed.

    If name is `none`, those of all correct images; if it is `noise`, those of correct images that
    random signs leave correct.
    """
    first, *others = _attacked(run, variables, name, epsilon, sights)
    maps = HeatmapSet(**first)
    for found in others:
        # A row for each map: programs of two machines may differ in what succeeds.
        _, here, there = np.intersect1d(maps.image_id, found['image_id'], return_indices=True)
        order = np.argsort(here)
        new = [name for name in found if getattr(maps, name) is None]
        rows = {name: found[name][there[order]] for name in new}
        maps = dataclasses.replace(maps.select(here[order]), **rows)
    return maps


def _attacked(run, variables, name, epsilon, sights):
    """Returns, for each sight, the arrays of the attacks that succeed."""
    split, settings = run.dataset.test, run.config.sweep
    ids = _ids(run)
    attack_fn = functools.partial(
        attack_batch,
        variables,
        name=name,
        epsilon=epsilon,
        steps=settings.steps,
        key=run.key(Stream.SWEEP_ATTACK),
        clip=run.config.attack.clip,
        network=run.network,
    )

    @functools.lru_cache(maxsize=1)  # On one host all sights are of the same images, part by part.
    def attacked(start):
        here = ids[start : start + run.shard_size]
        labels = split.labels[here]
        adversarial, before, after = devices.in_batches(
            attack_fn, data.take(split, here), labels, here, batch_size=run.batch_size
        )
        correct, successful, _ = jax.device_get(attack.outcome(before, after, labels))
        clean = name in ('none', 'noise')
        chosen = correct & ~successful if clean else successful
        return adversarial[chosen], {
            'unoccluded': after[chosen],
            'label': labels[chosen],
            'image_id': here[chosen],
            'is_adversarial': np.full(chosen.sum(), not clean),
        }

    def part(see_fn, start):
        images, known = attacked(start)
        return known | see_fn(images, known['unoccluded'])

    def of(sight):
        wanted = []
        for path, start, end in _places(run, sight, name, epsilon):
            wanted.append((path, end - start, functools.partial(part, sight.see_fn, start)))
        what = f'sweep, {name} {epsilon:.3g}, {sight.folder}: images'
        made_from = store.classifier_origin(run) | sight.origin
        return parts(run, what, wanted, mode='sweep', made_from=made_from)

    found = zip(*zip(*map(of, sights), strict=True), strict=True)  # Part by part, then by sight.
    return [
        {name: np.concatenate([part[name] for part in each]) for name in each[0]} for each in found
    ]
