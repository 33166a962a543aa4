"""Test images, attacked in one way and mapped with one kind of window, from the store or anew.

Dimensions: B batch, K classes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, comparators, data, names
from occjax import views as views_lib
from occjax.config import Occlusion
from occjax.experiment import devices, shard, stages, store
from occjax.experiment.run import Run, parts
from occjax.streams import Stream
from occjax.types import HeatmapSet, condense


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


def _seeing(run, variables, views):
    """Returns what gives images' arrays beside the windows, a word for it, and its origin."""
    if not views:
        return lambda images, unoccluded: {}, '', {}
    autoencoder, shape = stages.load_autoencoder(run), (len(views), len(run.dataset.class_names))
    seen = dict(views=views, network=run.network)
    spectra = set(run.config.sweep.methods) & set(names.SPECTRAL)

    def see(images, unoccluded):
        logits = np.zeros((0, *shape), np.float32)
        if len(images):
            batch_fn = functools.partial(view_batch, variables, autoencoder, **seen)
            logits = devices.in_batches(batch_fn, images, batch_size=run.batch_size)
        logits = condense(logits, unoccluded, run.config.occlusion.top_classes)
        if not spectra:
            return {'views': logits}
        return {'views': logits, 'spectrum': comparators.spectrum(images).astype(np.float16)}

    origin = {'views': ','.join(views), 'autoencoder': stages.autoencoder_digest(run)}
    return see, '-views' + '-spectra' * bool(spectra), origin


def mapped(
    run: Run,
    variables: Any,
    name: str,
    epsilon: float = 0.0,
    windows: Occlusion | None = None,
) -> HeatmapSet:
    """Returns the maps of the attacks that succeed.

    If name is `none`, those of all correct images; if it is `noise`, those of correct images that
    random signs leave correct. They are under the config's windows, or under others; under the
    config's own there are also the logits of the sweep's `views`.
    """
    split, settings = run.dataset.test, run.config.sweep
    ids = stages.mapped_ids(run, 'test')[: settings.images]
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
    see_fn, suffix, seen = _seeing(run, variables, () if windows else settings.views)
    made_from = store.classifier_origin(run) | seen
    windows = windows or run.config.occlusion
    run = run.with_occlusion(windows)
    fill = ','.join(f'{value:g}' for value in windows.fill) or 'mean'
    directory = run.workdir / 'sweep' / f'{windows.size}-{windows.stride}-{fill}{suffix}'
    iterated = '' if name in _ONE_STEP else f'-{settings.steps}'

    def part(here):
        labels = split.labels[here]
        adversarial, before, after = devices.in_batches(
            attack_fn, data.take(split, here), labels, here, batch_size=run.batch_size
        )
        correct, successful, _ = jax.device_get(attack.outcome(before, after, labels))
        clean = name in ('none', 'noise')
        chosen = correct & ~successful if clean else successful
        kept, unoccluded = adversarial[chosen], after[chosen]
        found = {
            'logits': shard.map_images(run, variables, kept, unoccluded),
            'unoccluded': unoccluded,
            'label': labels[chosen],
            'image_id': here[chosen],
            'is_adversarial': np.full(len(kept), not clean),
        }
        return found | see_fn(kept, unoccluded)

    wanted = []
    for start in range(0, len(ids), run.shard_size):
        here = ids[start : start + run.shard_size]
        # All that makes the part is in its name, so that other settings make other parts.
        path = directory / f'{name}{iterated}-{epsilon:.6g}-{start:07d}-{start + len(here):07d}.npz'
        wanted.append((path, len(here), functools.partial(part, here)))
    what = f'sweep, {name} {epsilon:.3g}, {directory.name}: images'
    found = parts(run, what, wanted, mode='sweep', made_from=made_from)
    return HeatmapSet.concatenate([HeatmapSet(**arrays) for arrays in found])
