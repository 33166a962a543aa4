"""How well the detectors stand up to an attacker who knows them (`--mode=adaptive`).

The detectors are those that `detection` deploys, the attacked images are correctly classified test
images that they were not fitted on.

Dimensions: B batch, N images, K classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from occjax import (
    adaptive,
    attack,
    data,
    detection,
    evaluation,
    figures,
    shard,
    stages,
    storage,
    tables,
    verdict,
    vgg,
)
from occjax.methods import METHODS
from occjax.run import Run, say

ATTACKS = {
    'joint': adaptive.joint_pgd,
    'selective': adaptive.selective_pgd,
    'orthogonal': adaptive.orthogonal_pgd,
}
_STATIC = ('name', 'method', 'steps', 'clip', 'plan', *shard.WINDOWS)


@functools.partial(jax.jit, static_argnames=_STATIC)
def attack_batch(
    variables,
    bank,
    thresholds,
    fill,
    images,
    labels,
    *,
    name,
    method,
    epsilon,
    steps,
    weight,
    clip,
    plan,
    **settings,
):
    """Returns whether each `[B]` image is classified wrongly, evades, and after how many steps.

    Attack `fgsm` doesn't know of the detector, `none` leaves the images.
    """
    logits_fn = functools.partial(vgg.logits, variables, plan=plan)
    margin_fn = functools.partial(
        verdict.margins,
        variables,
        bank,
        thresholds,
        method=METHODS[method],
        plan=plan,
        fill=fill,
        **settings,
    )
    bounds = attack.PIXELS if clip else None
    if name in ATTACKS:
        own = {'weight': weight} if name == 'joint' else {}
        attacked, taken = ATTACKS[name](
            logits_fn, margin_fn, images, labels, epsilon=epsilon, steps=steps, bounds=bounds, **own
        )
        return jnp.argmax(logits_fn(attacked), -1) != labels, taken >= 0, taken
    attacked = images
    if name == 'fgsm':
        attacked = attack.fgsm(logits_fn, images, labels, epsilon=epsilon, bounds=bounds)
    is_wrong = jnp.argmax(logits_fn(attacked), -1) != labels
    is_silent = margin_fn(attacked) <= 0
    # An untouched image can't evade: what is asked of it is whether it rings.
    return is_wrong, is_silent & (is_wrong | (name == 'none')), jnp.zeros(len(images), int)


def evade(run: Run) -> str:
    """Attacks every detector in every way; writes adaptive.json and .png, returns a table."""
    wanted, variables = run.config.adaptive, stages.load_variables(run)
    division = evaluation.divide(run, 'held_out')
    maps, fitted = division.maps, division.is_fitted[0]
    ids = maps.image_id[~fitted & ~maps.is_adversarial][: wanted.images]
    images = data.take(run.dataset.test, ids)
    rows, alarms = [], {}
    for method in wanted.methods:
        if method not in run.config.detector.methods:
            say(f'adaptive: {method} is left out, as config.detector.methods does not name it')
            continue
        detector = detection.deployed(run, division, method)
        measure = functools.partial(
            _measured, run, variables, detector, images, run.dataset.test.labels[ids], method
        )
        alarms[method] = 1 - measure('none', 0.0)['evasion']
        for name in ('fgsm', *wanted.attacks):
            rows += [measure(name, epsilon) for epsilon in wanted.epsilons]
    result = {
        'manifest': evaluation.manifest(run),
        'images': len(ids),
        'steps': wanted.steps,
        'false_alarms': alarms,
        'rows': rows,
    }
    storage.write_json(run.workdir / 'adaptive.json', result)
    storage.write_bytes(run.workdir / 'adaptive.png', plot(result))
    written = f'\nWritten: {run.workdir / "adaptive.json"}, adaptive.png; --mode=report shows it.\n'
    return tables.to_markdown([tables.adaptive_table(result)]) + written


def _measured(run, variables, detector, images, labels, method, name, epsilon):
    """Returns what one attack at one epsilon does to one detector, from the store if it's there."""
    wanted = run.config.adaptive
    settings = f'{len(images)}x{wanted.steps}-{wanted.weight:g}-{epsilon:.6g}'
    path = run.workdir / 'adaptive' / f'{method}-{name}-{settings}.npz'
    if not path.exists():
        say(f'adaptive: {name} at {epsilon:.3g} on {method}')
        mapping = run.mapping(vgg.num_classes(variables))
        attack_fn = functools.partial(
            attack_batch,
            variables,
            *detector,
            shard.fill_of(run, variables),
            name=name,
            method=method,
            epsilon=epsilon,
            steps=wanted.steps,
            weight=wanted.weight,
            clip=run.config.attack.clip,
            plan=run.plan,
            engine=mapping.engine,
            chunk_size=mapping.chunk_size,
            **run.geometry,
            **run.knobs,
        )
        # Few images at once: those that evade wait for the slowest of their batch.
        batch_size = min(run.map_batch_size, 8 * jax.device_count())
        found = run.in_batches(attack_fn, images, labels, batch_size=batch_size)
        storage.save_arrays(path, dict(zip(('wrong', 'evades', 'steps'), found, strict=True)))
    found = storage.load_arrays(path, mode='adaptive')
    evades, taken = found['evades'], found['steps']
    ends = stats.binomtest(int(evades.sum()), len(evades)).proportion_ci(method='wilson')
    by_step = [float(np.mean(evades & (taken <= t))) for t in range(wanted.steps + 1)]
    return {
        'method': method,
        'attack': name,
        'epsilon': epsilon,
        'wrong': float(found['wrong'].mean()),
        'evasion': float(evades.mean()),
        'interval': {'evasion': [float(ends.low), float(ends.high)]},
        'by_step': by_step if name in ATTACKS else None,
    }


def plot(result: dict) -> bytes:
    """Returns a PNG: evasion against epsilon, and against the number of steps."""
    from matplotlib.figure import Figure  # Half a second of import that other modes need not pay.

    rows, methods = result['rows'], list(result['false_alarms'])
    figure = Figure(figsize=(5.2 * (1 + len(methods)), 4.2), layout='constrained', dpi=150)
    axes, *panels = figure.subplots(1, 1 + len(methods), sharey=True)
    names = dict.fromkeys(row['attack'] for row in rows)
    colours = {method: f'C{i}' for i, method in enumerate(methods)}
    markers = dict(zip(names, 'xos^', strict=False))
    for method in methods:
        for name in names:
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
