"""How detectors fitted on one attack meet another: success, transfer, and what epsilon does.

Some test images are attacked in every way that the config's `sweep` names; what succeeds is mapped
and stored, so that a sweep goes on where it was stopped. Then detectors are fitted on FGSM at each
epsilon and judged by every attack, on images that they were not fitted on.

Dimensions: B batch, H W C image, K classes, S seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from occjax import attack, data, evaluation, figures, judging, metrics, shard, stages, storage, vgg
from occjax.methods import METHODS
from occjax.run import Progress, Run, say
from occjax.types import HeatmapSet

# Each is called with a key of its image's own; those that are deterministic leave it.
ATTACKS = {
    'none': lambda fn, x, y, *, key, epsilon, steps, **kw: x,
    'fgsm': lambda fn, x, y, *, key, epsilon, steps, **kw: attack.fgsm(
        fn, x, y, epsilon=epsilon, **kw
    ),
    'targeted_fgsm': lambda fn, x, y, *, key, epsilon, steps, **kw: attack.targeted_fgsm(
        fn, x, jnp.argmin(fn(x), axis=-1), epsilon=epsilon, **kw
    ),
    'bim': lambda fn, x, y, *, key, **kw: attack.bim(fn, x, y, **kw),
    'pgd': attack.pgd,
    'mi_fgsm': lambda fn, x, y, *, key, **kw: attack.mi_fgsm(fn, x, y, **kw),
    'square': attack.square,
}
_SHOWN = ('detector', 'all_logits')  # the methods whose transfer is measured


@functools.partial(jax.jit, static_argnames=('name', 'steps', 'clip', 'plan'))
def attack_batch(variables, images, labels, ids, *, name, epsilon, steps, seed, clip, plan):
    """Returns attacked images, and `[B, K]` logits before and after; no image sees its batch."""
    logits_fn = functools.partial(vgg.logits, variables, plan=plan)
    bounds = (0.0, 1.0) if clip else None
    settings = dict(epsilon=epsilon, steps=steps, bounds=bounds)

    def one(image, label, image_id):
        key = jax.random.fold_in(jax.random.key(seed), image_id)
        return ATTACKS[name](logits_fn, image[None], label[None], key=key, **settings)[0]

    adversarial = jax.vmap(one)(images, labels, ids)
    return adversarial, logits_fn(images), logits_fn(adversarial)


def conditions(run: Run) -> dict[str, tuple[str, float]]:
    """Returns the attacks by name: FGSM at every epsilon, the others at the config's own."""
    wanted = run.config.sweep
    epsilons = sorted({*wanted.epsilons, run.config.attack.epsilon})
    found = {f'fgsm {epsilon:.3g}': ('fgsm', epsilon) for epsilon in epsilons}
    own = run.config.attack.epsilon
    return found | {f'{name} {own:.3g}': (name, own) for name in wanted.attacks}


def sweep(run: Run) -> str:
    """Attacks, maps, fits and judges; writes `sweep.json` and `sweep.png`, and returns a table."""
    variables, found = stages.load_variables(run), conditions(run)
    parts = {name: _mapped(run, variables, name, *how) for name, how in found.items()}
    clean = _mapped(run, variables, 'clean', 'none', 0.0)
    result = {
        'manifest': evaluation.manifest(run),
        'images': run.config.sweep.images,
        'correct': len(clean['label']),
        'conditions': {
            name: {
                'attack': found[name][0],
                'epsilon': found[name][1],
                'successful': len(part['label']),
                'success_rate': len(part['label']) / max(1, len(clean['label'])),
            }
            for name, part in parts.items()
        },
        'auroc': {},
    }
    divisions = {
        name: judging.divide(_together(clean, part), 'held_out', run.config.detector, run.rng)
        for name, part in parts.items()
    }
    for method in _SHOWN:
        result['auroc'][method] = {
            fitted: _transfer(run, method, fitted, divisions)
            for fitted, (name, _) in found.items()
            if name == 'fgsm'
        }
    storage.write_json(run.workdir / 'sweep.json', result)
    storage.write_bytes(run.workdir / 'sweep.png', plot(result))
    return table(result) + f'\nWritten: {run.workdir / "sweep.json"}, sweep.png\n'


def _mapped(run, variables, name, attack_name, epsilon):
    """Returns the maps of the attacks that succeed, or of all correct images if there is none."""
    split, wanted, arrays = run.dataset.test, run.config.sweep, []
    ids = stages.mapped_ids(run, 'test')[: wanted.images]
    attack_fn = functools.partial(
        attack_batch,
        variables,
        name=attack_name,
        epsilon=epsilon,
        steps=wanted.steps,
        seed=run.config.seed + 5,
        clip=run.config.attack.clip,
        plan=run.plan,
    )
    progress = Progress(len(ids), f'sweep, {name}: images')
    for start in range(0, len(ids), run.shard_size):
        path = run.workdir / 'sweep' / f'{name.replace(" ", "-")}-{start:07d}.npz'
        here = ids[start : start + run.shard_size]
        if path.exists():
            progress.total -= len(here)
        else:
            labels = split.labels[here]
            adversarial, before, after = run.in_batches(
                attack_fn, data.take(split, here), labels, here, batch_size=run.batch_size
            )
            correct, successful, _ = jax.device_get(attack.outcome(before, after, labels))
            chosen = correct if attack_name == 'none' else successful
            maps = {
                'logits': shard.map_images(run, variables, adversarial[chosen]),
                'unoccluded': after[chosen],
                'label': labels[chosen],
                'image_id': here[chosen],
                'is_adversarial': np.full(chosen.sum(), attack_name != 'none'),
            }
            storage.save_arrays(path, maps)
            progress(len(here))
        arrays.append(storage.load_arrays(path, mode='sweep'))
    return {key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]}


def _together(clean, attacked):
    """Returns clean and attacked maps as one set."""
    return HeatmapSet(**{key: np.concatenate([clean[key], attacked[key]]) for key in clean})


def _transfer(run, method, fitted, divisions):
    """Returns the AUROC against every attack of detectors that were fitted on one."""
    say(f'sweep: {method}, fitted on {fitted}')
    banks = evaluation.fit_banks(run, divisions[fitted], method)
    class_names, rates = run.description['class_names'], {}
    for name, division in divisions.items():
        scores = judging.score_banks(banks, METHODS[method], division.maps)
        seeds = judging.by_seed(scores, division, class_names=class_names, threshold=0.0)
        values = [metrics.overall(classes)['auroc'] for classes in seeds]
        values = [value for value in values if value is not None]
        ratio = division.judged_over_fitted
        rates[name] = {
            'auroc': float(np.mean(values)) if values else None,
            'interval': metrics.interval(values, judged_over_fitted=ratio),
        }
    return rates


def table(result: dict) -> str:
    """Returns what `sweep.json` holds as lines for a person: a matrix for each method."""
    found = result['conditions']
    lines = [
        f'{result["correct"]} of {result["images"]} test images are classified correctly.',
        '',
        'attack, epsilon      successful  rate',
    ]
    lines += [
        f'{name:20} {row["successful"]:<10}  {row["success_rate"]:.3f}'
        for name, row in found.items()
    ]
    for method, rows in result['auroc'].items():
        lines += ['', f'AUROC of {method}, fitted on the row, judged by the column']
        width = max(map(len, found)) + 2
        lines.append(' ' * width + ''.join(f'{name:>{width}}' for name in found))
        for fitted, row in rows.items():
            values = [row[name]['auroc'] for name in found]
            cells = ['–' if value is None else f'{value:.3f}' for value in values]
            lines.append(f'{fitted:{width}}' + ''.join(f'{cell:>{width}}' for cell in cells))
    return '\n'.join(lines) + '\n'


def plot(result: dict) -> bytes:
    """Returns a PNG: success and AUROC against epsilon, and what was fitted against what judges."""
    from matplotlib.figure import Figure  # Half a second of import that other modes need not pay.

    found, methods = result['conditions'], result['auroc']
    figure = Figure(figsize=(5 + 5.5 * len(methods), 4.8), layout='constrained', dpi=150)
    axes, *matrices = figure.subplots(
        1, 1 + len(methods), gridspec_kw={'width_ratios': [1] + [1.3] * len(methods)}
    )
    fgsm = {name: row for name, row in found.items() if row['attack'] == 'fgsm'}
    epsilons = [row['epsilon'] for row in fgsm.values()]
    rates = [row['success_rate'] for row in fgsm.values()]
    axes.plot(epsilons, rates, 'k--o', markersize=4, label='attacks that succeed')
    for method, rows in methods.items():
        own = [rows[name][name] for name in fgsm]
        values = [np.nan if row['auroc'] is None else row['auroc'] for row in own]
        (line,) = axes.plot(epsilons, values, '-o', markersize=4, label=f'AUROC, {method}')
        ends = [row['interval'] or (np.nan, np.nan) for row in own]
        axes.fill_between(epsilons, *np.transpose(ends), color=line.get_color(), alpha=0.15)
    axes.axhline(0.5, color='#888', linewidth=0.8)
    axes.set_xscale('log')
    axes.set_ylim(0, 1.02)
    axes.set_xlabel('ε of FGSM, fitted and judged')
    axes.legend(fontsize=8, frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    for panel, (method, rows) in zip(matrices, methods.items(), strict=True):
        values = np.array(
            [[row[name]['auroc'] for name in found] for row in rows.values()], dtype=float
        )
        panel.imshow(values, vmin=0.5, vmax=1, cmap='viridis', aspect='auto')
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = 'black' if value > 0.8 else 'white'
                text = f'{value:.2f}'.lstrip('0')
                panel.text(j, i, text, ha='center', va='center', fontsize=7, color=colour)
        panel.set_xticks(range(len(found)), found, rotation=90, fontsize=7)
        panel.set_yticks(range(len(rows)), rows, fontsize=7)
        panel.set_xlabel('judged by')
        panel.set_ylabel('fitted on')
        panel.set_title(f'AUROC, {method}', fontsize=10)
    return figures.png(figure)
