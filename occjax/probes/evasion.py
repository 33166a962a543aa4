"""How well the detectors stand up to an attacker who knows them (`--mode=adaptive`).

The detectors are those that `detection` deploys, the attacked images are correctly classified test
images that they were not fitted on.

Dimensions: B batch, N images, K classes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from occjax import adaptive, attack, data, detector, names, verdict
from occjax import views as views_lib
from occjax.experiment import devices, shard, stages, storage, store
from occjax.experiment import results as results_lib
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.probes import detection, sweep
from occjax.progress import say
from occjax.report import figures, tables
from occjax.types import UsageError

ATTACKS = dict(
    zip(
        names.JOINT_ATTACKS,
        (adaptive.joint_pgd, adaptive.selective_pgd, adaptive.orthogonal_pgd),
        strict=True,
    )
)
_STATIC = ('name', 'method', 'views', 'steps', 'weight', 'clip', 'mesh', 'network')


@functools.partial(jax.jit, static_argnames=(*_STATIC, *shard.WINDOWS))
def attack_batch(
    variables,
    bank,
    thresholds,
    autoencoder,
    fill,
    images,
    labels,
    *,
    name,
    epsilon,
    mesh,
    **settings,
):
    """Returns whether each `[B]` image is classified wrongly, evades, and after how many steps.

    Attack `fgsm` doesn't know of the detector, `none` leaves the images. Each device attacks its
    own images.
    """
    whole, by_image = jax.P(), jax.P('data')
    return jax.shard_map(
        functools.partial(_attacked, name=name, **settings),
        mesh=mesh,
        in_specs=(*[whole] * 6, by_image, by_image),
        out_specs=by_image,
        check_vma=False,
    )(variables, bank, thresholds, autoencoder, fill, epsilon, images, labels)


def _attacked(
    variables,
    bank,
    thresholds,
    autoencoder,
    fill,
    epsilon,
    images,
    labels,
    *,
    name,
    method,
    views,
    steps,
    weight,
    clip,
    network,
    **settings,
):
    """Does what `attack_batch` says on one device."""
    logits_fn = network.classifier(variables)
    views = views_lib.of_names(views, autoencoder)
    settings = dict(method=METHODS[method], views=views, fill=fill, **settings)
    plain_fn = functools.partial(network.fn, variables)  # Engines accelerate by themselves.
    margin_fn = functools.partial(verdict.margins, plain_fn, bank, thresholds, **settings)
    ball = dict(epsilon=epsilon, bounds=attack.PIXELS if clip else None)
    if name in ATTACKS:
        ball |= {'weight': weight} if name == 'joint' else {}
        images, taken = ATTACKS[name](logits_fn, margin_fn, images, labels, steps=steps, **ball)
        return jnp.argmax(logits_fn(images), -1) != labels, taken >= 0, taken
    if name == 'fgsm':
        images = attack.fgsm(logits_fn, images, labels, **ball)
    is_wrong = jnp.argmax(logits_fn(images), -1) != labels
    is_silent = margin_fn(images) <= 0
    # An untouched image can't evade: what is asked of it is whether it rings.
    return is_wrong, is_silent & (is_wrong | (name == 'none')), jnp.zeros(len(images), int)


def evade(run: Run) -> str:
    """Attacks every detector in every way; writes adaptive.json and .png, returns a table.

    Raises:
        UsageError: if a detector is attacked that isn't fitted, or no image is left to attack.
    """
    wanted, variables = run.config.adaptive, stages.load_variables(run)
    missing = set(wanted.methods) - {*run.config.detector.methods, *names.VIEWING}
    if missing:
        raise UsageError(
            f'config.adaptive.methods has {sorted(missing)}, which config.detector.methods lacks: '
            'take them out of the one, or add them to the other and run --mode=detectors.'
        )
    rows, alarms = [], {}
    for method in dict.fromkeys(wanted.methods):
        target = _target(run, variables, method)
        if not len(target.ids):
            raise UsageError(
                'No test image is left that no detector was fitted on: map more of them.'
            )
        measure = functools.partial(_measured, run, variables, target, method)
        alarms[method] = 1 - measure('none', 0.0)['evasion']
        for name in dict.fromkeys(('fgsm', *wanted.attacks)):
            rows += [measure(name, epsilon) for epsilon in dict.fromkeys(wanted.epsilons)]
    result = {
        'manifest': results_lib.manifest(run),
        'made_from': store.heatmaps_origin(run),
        'images': len(target.ids),
        'settings': dataclasses.asdict(wanted),
        'false_alarms': alarms,
        'rows': rows,
    }
    storage.write_record(run.workdir / 'adaptive.json', result)
    storage.write_bytes(run.workdir / 'adaptive.png', plot(result))
    written = f'\nWritten: {run.workdir / "adaptive.json"}, adaptive.png; --mode=report shows it.\n'
    return tables.to_markdown([tables.adaptive_table(result)]) + written


class _Target(NamedTuple):
    """A detector, and the clean test images that it is attacked by."""

    bank: detector.Bank
    thresholds: np.ndarray  # [K]
    autoencoder: Any  # of the views; None without any
    ids: np.ndarray
    name: str
    made_from: storage.Origin


def _target(run, variables, method):
    """Returns the first seed's detector."""
    count = run.config.adaptive.images
    if method in names.VIEWING:
        found = sweep.deployed(run, variables, method)
        bank, thresholds, ids, name = map(found.get, ('bank', 'thresholds', 'judged', 'name'))
        autoencoder, made_from = stages.load_autoencoder(run), store.classifier_origin(run)
        return _Target(bank, thresholds, autoencoder, ids[:count], name, made_from)
    division = store.divide(run, 'held_out')
    maps, judged = division.maps, division.is_judged[0]
    ids = maps.image_id[judged & ~maps.is_adversarial][:count]
    made_from = store.heatmaps_origin(run)
    return _Target(*detection.deployed(run, division, method), None, ids, method, made_from)


def _measured(run, variables, target, method, name, epsilon):
    """Returns what one attack at one epsilon does to one detector, from the store if it's there."""
    wanted, images = run.config.adaptive, data.take(run.dataset.test, target.ids)
    settings = f'{len(images)}x{wanted.steps}-{wanted.weight:g}-{epsilon:.6g}'
    path = run.workdir / 'adaptive' / f'{target.name}-{name}-{settings}.npz'

    def part():
        say(f'adaptive: {name} at {epsilon:.3g} on {method}')
        mapping = run.mapping(variables)
        attack_fn = functools.partial(
            attack_batch,
            variables,
            target.bank,
            target.thresholds,
            target.autoencoder,
            shard.fill_of(run, variables),
            name=name,
            method=method,
            views=run.config.sweep.views if method in names.VIEWING else (),
            epsilon=epsilon,
            steps=wanted.steps,
            weight=wanted.weight,
            clip=run.config.attack.clip,
            mesh=devices.mesh(),
            network=run.network,
            engine=mapping.engine,
            chunk_size=mapping.chunk_size,
            **run.geometry,
            **run.knobs,
        )
        # Few images at once: those that evade wait for the slowest of their batch.
        batch_size = min(mapping.batch_size, 8 * jax.device_count())
        labels = run.dataset.test.labels[target.ids]
        found = devices.in_batches(attack_fn, images, labels, batch_size=batch_size)
        return dict(zip(('wrong', 'evades', 'steps'), found, strict=True))

    found = storage.cached(path, part, mode='adaptive', made_from=target.made_from)
    evades, taken = found['evades'], found['steps']
    ends = stats.binomtest(int(evades.sum()), len(evades)).proportion_ci(method='wilson')
    by_step = [float(np.mean(evades & (taken <= t))) for t in range(wanted.steps + 1)]
    return {
        'method': method,
        'attack': name,
        'epsilon': epsilon,
        'wrong': float(found['wrong'].mean()),
        'evasion': float(evades.mean()),
        'interval': [float(ends.low), float(ends.high)],
        'by_step': by_step if name in ATTACKS else None,
    }


def plot(result: dict) -> bytes:
    """Returns a PNG: evasion against epsilon, and against the number of steps."""
    from matplotlib.figure import Figure  # Half a second of import that other modes need not pay.

    rows, methods = result['rows'], list(result['false_alarms'])
    figure = Figure(figsize=(5.2 * (1 + len(methods)), 4.2), layout='constrained', dpi=150)
    axes, *panels = figure.subplots(1, 1 + len(methods), sharey=True)
    attacks = dict.fromkeys(row['attack'] for row in rows)
    colours = {method: f'C{i}' for i, method in enumerate(methods)}
    markers = dict(zip(attacks, 'xos^', strict=False))
    for method in methods:
        for name in attacks:
            found = [r for r in rows if (r['method'], r['attack']) == (method, name)]
            axes.plot(
                [row['epsilon'] for row in found],
                [row['evasion'] for row in found],
                ':' if name == 'fgsm' else '-',
                color=colours[method],
                marker=markers[name],
                markersize=5,
                label=f'{name} on {method}',
            )
    axes.set_xscale('log')
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel('ε')
    axes.set_ylabel('share of images that evade')
    for panel, method in zip(panels, methods, strict=True):
        panel.set_title(method, fontsize=10)
        panel.set_xlabel('steps')
        panel.xaxis.get_major_locator().set_params(integer=True)
        steps = [row for row in rows if row['method'] == method and row['by_step']]
        for number, epsilon in enumerate(dict.fromkeys(row['epsilon'] for row in steps)):
            for row in steps:
                if row['epsilon'] == epsilon:
                    panel.plot(
                        row['by_step'],
                        color=f'C{number}',
                        linestyle={'joint': '-', 'selective': '--'}.get(row['attack'], ':'),
                        label=f'{row["attack"]}, ε = {epsilon:.3g}',
                    )
    for panel in (axes, *panels):
        if panel.lines:
            panel.legend(fontsize=7, frameon=False)
        panel.spines[['top', 'right']].set_visible(False)
    return figures.png(figure)
