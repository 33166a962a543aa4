"""A shard: some images, attacked and mapped.

Dimensions: B batch, H W C image, K classes, h w heatmap grid, M maps.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from occjax import attack, comparators, data
from occjax import engine as engine_lib
from occjax.experiment import devices
from occjax.experiment.run import Run
from occjax.streams import Stream
from occjax.types import Array, Split, condense


class Part(NamedTuple):
    """Images of one kind, of which some are mapped."""

    images: np.ndarray  # f32[B, H, W, C]
    unoccluded: np.ndarray  # f32[B, K], their logits
    is_mapped: np.ndarray  # bool[B]
    is_adversarial: bool


@functools.partial(jax.jit, static_argnames=('network', 'clip'))
def attack_batch(variables, images, labels, *, epsilon, clip, network):
    """Returns FGSM images, and the `[B, K]` logits before and after."""
    logits_fn = network.classifier(variables)
    bounds = (0.0, 1.0) if clip else None
    adversarial = attack.fgsm(logits_fn, images, labels, epsilon=epsilon, bounds=bounds)
    return adversarial, logits_fn(images), logits_fn(adversarial)


@functools.partial(jax.jit, static_argnames=('network', 'clip'))
def noise_batch(variables, images, ids, *, key, epsilon, clip, network):
    """Returns images under noise of the attack's size, each image's own, and their logits."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(ids)
    bounds = (0.0, 1.0) if clip else None
    noise_fn = functools.partial(attack.sign_noise, epsilon=epsilon, bounds=bounds)
    noisy = jax.vmap(lambda key, image: noise_fn(image[None], key=key)[0])(keys, images)
    return noisy, network.classifier(variables)(noisy)


@functools.partial(jax.jit, static_argnames=('mesh', 'network', *engine_lib.SETTINGS))
def map_batch(variables, images, fill, *, mesh, network, engine='full', **geometry):
    """Returns the `[B, h, w, K]` logits under every window; each device maps its own images."""

    def occluded_logits(variables, images, fill):
        logits_fn = functools.partial(network.fn, variables)
        return engine_lib.occluded_logits(logits_fn, images, engine=engine, fill=fill, **geometry)

    by_image = jax.P('data')
    return jax.shard_map(
        occluded_logits,
        mesh=mesh,
        in_specs=(jax.P(), by_image, jax.P()),
        out_specs=by_image,
        check_vma=False,
    )(variables, images, fill)


_condense = jax.jit(condense, static_argnums=2)


def fill_of(run: Run, variables: Any) -> np.ndarray:
    """Returns what covers a window, one value or one a channel; by default the training mean."""
    fill = run.config.occlusion.fill
    if not fill:
        stats = getattr(variables, 'pixel_stats', None)
        fill = stats['mean'] if stats else data.pixel_statistics(run.dataset.train)[0]
    return np.asarray(fill, np.float32)


def attacked_parts(
    run: Run, variables: Any, images: np.ndarray, labels: np.ndarray
) -> dict[str, Part]:
    """Returns what the paper maps: correctly classified images, successful attacks (§III-C)."""
    settings = run.config.attack
    attack_fn = functools.partial(
        attack_batch, variables, epsilon=settings.epsilon, clip=settings.clip, network=run.network
    )
    adversarial, before, after = devices.in_batches(
        attack_fn, images, labels, batch_size=run.batch_size
    )
    correct, successful, _ = jax.device_get(attack.outcome(before, after, labels))
    return {
        'correct': Part(images, before, correct, False),
        'adversarial': Part(adversarial, after, successful, True),
    }


def control_parts(
    run: Run,
    variables: Any,
    parts: dict[str, Part],
    labels: np.ndarray,
    ids: np.ndarray,
) -> dict[str, Part]:
    """Returns `CONTROLS` of the same images."""
    settings, (clean, adversarial) = run.config.attack, parts.values()
    noise_fn = functools.partial(
        noise_batch,
        variables,
        key=run.key(Stream.NOISE),
        epsilon=settings.epsilon,
        clip=settings.clip,
        network=run.network,
    )
    noisy, under_noise = devices.in_batches(noise_fn, clean.images, ids, batch_size=run.batch_size)
    correct, failed = clean.is_mapped, clean.is_mapped & ~adversarial.is_mapped
    return {
        'noise': Part(noisy, under_noise, correct & (under_noise.argmax(-1) == labels), False),
        'misclassified': clean._replace(is_mapped=~correct),
        'failed': adversarial._replace(is_mapped=failed),
    }


@functools.partial(jax.jit, static_argnames=('network', 'bits', 'median'))
def compare_batch(variables, autoencoder, images, *, network, **settings):
    """Returns `[B, 3]` scores, `names.COMPARATORS`."""
    logits_fn = network.classifier(variables)
    return comparators.scores(logits_fn, images, autoencoder=autoencoder, **settings)


def comparing(run: Run, variables: Any, autoencoder: Any) -> Callable[[Array], Array]:
    """Returns what gives `compare_batch`'s scores of images."""
    settings = compare_settings(run)
    return functools.partial(compare_batch, variables, autoencoder, network=run.network, **settings)


def compare_settings(run: Run) -> dict[str, Any]:
    """Returns what `comparators.scores` takes of the config."""
    return {name: getattr(run.config.comparators, name) for name in comparators.SETTINGS}


def collect(
    run: Run,
    variables: Any,
    autoencoder: Any,
    split: Split,
    ids: np.ndarray,
    *,
    controls: bool = False,
) -> dict:
    """Returns a shard: the heatmaps of some images and their attacks, and what the attack did.

    They are stored as the logits of all classes, or of those that the config keeps, so that every
    detector and table follows without the classifier. The arrays of the paper's maps have the names
    of `HeatmapSet`'s fields, those of the `controls` the kind before them.
    """
    images, labels = data.take(split, ids), split.labels[ids]
    paper = attacked_parts(run, variables, images, labels)
    groups = {'': list(paper.values())}
    if controls:
        parts = control_parts(run, variables, paper, labels, ids)
        groups |= {f'{kind}_': [part] for kind, part in parts.items()}
    every = [part for parts in groups.values() for part in parts]
    chosen = np.concatenate([part.images[part.is_mapped] for part in every])
    unoccluded = np.concatenate([part.unoccluded[part.is_mapped] for part in every])
    logits = map_images(run, variables, chosen, unoccluded)
    engine = run.mapping(variables).engine
    compare_fn = comparing(run, variables, autoencoder)
    compared = devices.in_batches(compare_fn, chosen, batch_size=run.batch_size)
    arrays = {}
    for prefix, parts in groups.items():
        masks = [part.is_mapped for part in parts]
        counts = [mask.sum() for mask in masks]
        (here, logits), (scores, compared), (own, unoccluded) = (
            np.split(array, [sum(counts)]) for array in (logits, compared, unoccluded)
        )
        maps = {
            'logits': here,
            'comparators': scores,
            'unoccluded': own,
            'label': np.concatenate([labels[mask] for mask in masks]),
            'image_id': np.concatenate([ids[mask] for mask in masks]),
            'is_adversarial': np.repeat([part.is_adversarial for part in parts], counts),
        }
        arrays |= {f'{prefix}{name}': array for name, array in maps.items()}
    correct, successful = (part.is_mapped for part in paper.values())
    adversarial = paper['adversarial'].images
    attacked, example = adversarial[correct], np.flatnonzero(successful)[:1]
    return arrays | {
        'attempted': correct.sum(),
        'unmoved': (attacked == images[correct]).all(axis=(1, 2, 3)).sum(),
        'max_perturbation': np.max(np.abs(attacked - images[correct]), initial=0),
        'pixel_range': [np.min(attacked, initial=1), np.max(attacked, initial=0)],
        'how': json.dumps(run.provenance(engine, **run.knobs)),
        'example_id': ids[example],  # One a shard, for the figures.
        'example_clean': images[example],
        'example_adversarial': adversarial[example],
    }


def map_images(
    run: Run,
    variables: Any,
    images: np.ndarray,
    unoccluded: np.ndarray,
    *,
    knobs: dict | None = None,
) -> np.ndarray:
    """Returns the `[M, h, w, K]` logits of `[M, H, W, C]` images under every window.

    The maps are those that the config asks for, or with `knobs` approximate ones of their own. The
    `[M, K]` unoccluded logits rank the classes that it keeps, see `types.condense`.
    """
    top_classes = run.config.occlusion.top_classes
    mapping = run.mapping(variables, 'approximate' if knobs else None)
    map_fn = functools.partial(
        map_batch,
        variables,
        fill=fill_of(run, variables),
        mesh=devices.mesh(),
        network=run.network,
        engine=mapping.engine,
        chunk_size=mapping.chunk_size,
        **run.geometry,
        **(knobs or run.knobs),
    )
    map_fn = run.profiled('heatmaps', map_fn)

    def condensed_fn(images, unoccluded):
        return _condense(map_fn(images), unoccluded, top_classes)

    return devices.in_batches(condensed_fn, images, unoccluded, batch_size=mapping.batch_size)
