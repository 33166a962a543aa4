"""How detectors do against other attacks than they were fitted on, and with other windows.

Some test images are attacked in every way that the config's `sweep` names; what succeeds is mapped
and stored, so that a sweep goes on where it was stopped. Then detectors are fitted on FGSM at each
epsilon, on the mixture of attacks and on the mixture without each of them, and judged by every
attack, on images that they were not fitted on; and detectors of maps with other windows are fitted
and judged on FGSM at the config's epsilon.

Dimensions: M maps, h w heatmap grid, K classes.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from occjax import averages, guard, guard_file, metrics, names
from occjax.experiment import deployment, judging, stages, storage, store
from occjax.experiment import results as results_lib
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.probes import conditions, passes
from occjax.progress import Pace
from occjax.report import sweep as sweep_report
from occjax.report import tables
from occjax.types import HeatmapSet, UsageError


def attacks(run: Run) -> dict[str, tuple[str, float]]:
    """Returns the attacks by name: FGSM at every epsilon, the others at their own."""
    wanted, own = run.config.sweep, run.config.attack.epsilon
    others = wanted.attack_epsilons or (own,)
    found = [('fgsm', epsilon) for epsilon in sorted({*wanted.epsilons, *others, own})]
    for name in wanted.attacks:
        found += [(name, epsilon) for epsilon in (others[:1] if name in names.NEAREST else others)]
    shorts = collections.Counter(f'{epsilon:.4g}' for epsilon in {e for _, e in found})

    def label(epsilon):  # In full where the short one is another's too.
        short = f'{epsilon:.4g}'
        return short if shorts[short] == 1 else repr(float(epsilon))

    return {f'{name} {label(epsilon)}': (name, epsilon) for name, epsilon in found}


def mixtures(run: Run) -> dict[str, tuple[str, ...]]:
    """Returns what detectors are fitted on beside FGSM: the mixture, and it without each attack."""
    whole = tuple(dict.fromkeys(run.config.sweep.mixture))
    if not whole:
        return {}
    without = {f'mixture without {name}': tuple(n for n in whole if n != name) for name in whole}
    return {'mixture': whole} | ({} if len(whole) == 1 else without)


def occluders(run: Run) -> list[tuple[int, int, tuple[float, ...]]]:
    """Returns (size, stride, fill) of the windows to try, the config's own first.

    By default each of the three is moved once down and once up, the others left.
    """
    own, largest = run.config.occlusion, run.config.data.image_size - 1
    here = (own.size, own.stride, own.fill)
    if run.config.sweep.occluders:
        others = [(size, stride, (fill,)) for size, stride, fill in run.config.sweep.occluders]
    else:
        sizes = max(1, own.size // 2), min(largest, own.size * 3 // 2)
        strides = max(1, own.stride // 2), 2 * own.stride
        others = [
            *((size, own.stride, own.fill) for size in sizes),
            *((own.size, stride, own.fill) for stride in strides),
            *((own.size, own.stride, fill) for fill in ((0.0,), (1.0,))),
        ]
    return list(dict.fromkeys([here, *others]))


class Mapped(NamedTuple):
    """Maps of test images, clean and attacked; attacks are of images that have clean maps."""

    attacks: dict[str, tuple[str, float]]
    clean: HeatmapSet
    parts: dict[str, HeatmapSet]  # by attack
    noise: dict[float, HeatmapSet]  # by epsilon; none unless it is wanted


def mapped(run: Run, variables: Any) -> Mapped:
    """Returns all maps that a sweep needs, from the store or anew."""
    sights = conditions.sights(run, variables)
    map_fn = functools.partial(conditions.mapped, run, variables, sights)
    found, clean = attacks(run), map_fn('none')
    parts = {}
    seen = max((_passes(run, method) for method in run.config.sweep.methods), default=0)
    work_fn = functools.partial(conditions.work, run, sights, seen=seen)
    pace = Pace('sweep', {name: work_fn(*how) for name, how in found.items()})
    for name, how in found.items():
        pace(name)
        parts[name] = _of(clean, map_fn(*how))
    epsilons = {epsilon for _, epsilon in found.values()} if run.config.sweep.noise else ()
    noise = {e: _of(clean, map_fn('noise', e)) for e in epsilons}
    return Mapped(found, clean, parts, noise)


def mixed(run: Run, sets: Mapped, mixture: Sequence[str]) -> tuple[judging.Division, Any]:
    """Returns the attacks of a mixture, divided, and the noise that joins the clean ones."""
    chosen = [sets.parts[name] for name, (attack, _) in sets.attacks.items() if attack in mixture]
    noise = HeatmapSet.concatenate(list(sets.noise.values())) if sets.noise else None
    return _divided(run, sets.clean, HeatmapSet.concatenate(chosen)), noise


class Deployed(NamedTuple):
    """The first seed's detectors of a method, fitted on the mixture."""

    guard: guard.Guard
    judged: np.ndarray  # ids of clean images that neither detectors nor thresholds come from
    name: str  # that no other method or settings have


def deployed(run: Run, variables: Any, method: str, sets: Mapped | None = None) -> Deployed:
    """Returns the detectors of a method as one would deploy them, from the store or anew.

    Args:
        run: the experiment.
        variables: of the classifier.
        method: one of `names.VIEWING`.
        sets: what `mapped` returns, if it is at hand.

    Raises:
        UsageError: if no mixture is named.
    """
    if not run.config.sweep.mixture:
        raise UsageError(
            f'{method} is fitted on a mixture of attacks: name some in --config.sweep.mixture.'
        )
    path = _deployed_path(run, method)

    def make():
        division, noise = mixed(run, sets or mapped(run, variables), run.config.sweep.mixture)
        banks = store.fit_banks(run, division, method, noise)
        scored = deployment.of_banks(banks, method, division)
        controls = {} if noise is None else {'noise': noise}
        mixture = ', '.join(map(tables.words, run.config.sweep.mixture))
        known = dict(attacks=f'attacks ({mixture})')
        known['held_out'] = deployment.held_out(scored.score_fn, division, controls)
        views = run.config.sweep.views
        autoencoder = stages.load_autoencoder(run) if 'reconstruction' in views else None
        sees = dict(views=views, autoencoder=autoencoder)
        made = stages.guard_of(run, *scored[:2], method=method, **sees, **known)
        clean = division.is_judged[0] & ~division.maps.is_adversarial
        return guard.to_arrays(made) | {'judged': division.maps.image_id[clean]}

    found = storage.cached(path, make, mode='sweep', made_from=store.classifier_origin(run))
    return Deployed(guard.from_arrays(found), found['judged'], path.stem)


def _deployed_path(run, method):
    """Returns where detectors of the mixture are, which no other settings share."""
    settings = [dataclasses.asdict(run.config.sweep), dataclasses.asdict(run.config.detector)]
    settings.append({'format': guard_file.FORMAT})
    images = run.config.sweep.images
    settings[0]['images'] = min(images, run.config.occlusion.test_images or images)
    for each in settings:
        for name in ('methods', 'windows', 'occluders', 'neighbours', 'twin'):
            each.pop(name, None)  # It makes no other bank.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return run.workdir / 'sweep' / 'detectors' / f'{method}-{digest}.npz'


def sweep(run: Run) -> str:
    """Attacks, maps, fits and judges; writes `sweep.json` and `sweep.png`, and returns tables.

    `sweep_summary.json` is the part of it that is worth keeping beside a config; detectors of the
    mixture that see views are deployed.
    """
    variables = stages.load_variables(run)
    sets = mapped(run, variables)
    found, clean, parts, noise = sets
    result = {
        'manifest': results_lib.manifest(run),
        'images': min(run.config.sweep.images, len(stages.mapped_ids(run, 'test'))),
        'correct': len(clean),
        'attacks': {
            name: {
                'attack': found[name][0],
                'epsilon': found[name][1],
                'successful': len(part),
                'success_rate': len(part) / max(1, len(clean)),
            }
            for name, part in parts.items()
        },
        'mixture': run.config.sweep.mixture,
        'passes': {method: _passes(run, method) for method in run.config.sweep.methods},
        'transfer': _transfer(run, sets),
        'occluders': _occluders(run, variables) if run.config.sweep.windows else [],
        'search': _search(run, sets) if run.config.sweep.views else None,
    }
    storage.write_json(run.workdir / 'sweep.json', result)
    storage.write_json(run.workdir / 'sweep_summary.json', sweep_report.condense(result))
    storage.write_bytes(run.workdir / 'sweep.png', sweep_report.plot(result))
    written = f'\nWritten: {run.workdir / "sweep.json"}, sweep_summary.json, sweep.png\n'
    if run.config.sweep.mixture:
        for method in [name for name in names.VIEWING if name in run.config.sweep.methods]:
            made, *_ = deployed(run, variables, method, sets)
            path, known = stages.guard_path(run, method), store.classifier_origin(run)
            storage.save_arrays(path, guard.to_arrays(made), made_from=known)
            written += f'{path}: --mode=detect asks it from now on, occjax.guard.load reads it.\n'
    return tables.to_markdown(sweep_report.build(result)) + written


def _passes(run, name):
    """Returns how many forward passes an image takes, of whichever classifier."""
    if name not in METHODS:
        return metrics.SCORES[name].passes
    method = METHODS[name]
    if method.passes is not None:
        return method.passes
    views = len(run.config.sweep.views) * (name in names.VIEWING)
    return 1 + math.prod(run.grid) * method.windows + views


def _search(run, sets):
    """Returns `passes.search` for FGSM at the config's epsilon and those of other attacks."""
    epsilons = {*run.config.sweep.attack_epsilons, run.config.attack.epsilon}
    fgsm = {e: sets.parts[name] for name, (attack, e) in sets.attacks.items() if attack == 'fgsm'}
    chosen = ({e: maps[e] for e in epsilons if e in maps} for maps in (fgsm, sets.noise))
    return passes.search(run, sets.clean, *chosen)


def _transfer(run, sets):
    """Returns, by method, AUROC of what was fitted on each row of attacks, judged by each one."""
    found, noise = sets.attacks, sets.noise
    judged = {name: _divided(run, sets.clean, part) for name, part in sets.parts.items()}
    beside = {name: noise[epsilon] for name, (_, epsilon) in found.items() if epsilon in noise}
    rows = {
        name: (judged[name], beside.get(name))
        for name, (attack, _) in found.items()
        if attack == 'fgsm'
    }
    rows |= {name: mixed(run, sets, mixture) for name, mixture in mixtures(run).items()}
    return {
        method: {
            name: _aurocs(run, method, fitted, joins, judged, beside)
            for name, (fitted, joins) in rows.items()
        }
        for method in run.config.sweep.methods
    }


def _occluders(run, variables):
    """Returns forward passes and AUROC of every kind of window, and of all of them together.

    Methods that see more than windows are not among them.
    """
    own, epsilon = run.config.occlusion, run.config.attack.epsilon
    rows, sets = [], []
    methods = [name for name in run.config.sweep.methods if name in names.METHODS]
    for size, stride, fill in occluders(run) if methods else ():
        windows = dataclasses.replace(own, size=size, stride=stride, fill=fill)
        sights = conditions.sights(run, variables, windows)
        clean = conditions.mapped(run, variables, sights, 'none')
        attacked = conditions.mapped(run, variables, sights, 'fgsm', epsilon)
        parts = clean, _of(clean, attacked)
        sets.append(parts)
        label = f'{size} px, every {stride}, fill {",".join(map("{:g}".format, fill)) or "mean"}'
        rows.append(_occluder(run, methods, label, *parts))
    every = map(_side_by_side, zip(*sets, strict=True))
    return [*rows, _occluder(run, methods, 'all together', *every)] if methods else []


def _occluder(run, methods, label, clean, attacked):
    """Returns what `_occluders` does of one kind of window."""
    division = _divided(run, clean, attacked)
    aurocs = {
        method: _aurocs(run, method, division, None, {'own': division}, {})['own']
        for method in methods
    }
    passes = 1 + math.prod(clean.logits.shape[1:3])
    return {'windows': label, 'forward_passes': passes, 'auroc': aurocs}


def _side_by_side(sets):
    """Returns maps of the same images under several kinds of windows as one row of cells each."""
    shapes = [(len(m), 1, math.prod(m.logits.shape[1:3]), m.logits.shape[-1]) for m in sets]
    rows = [maps.logits.reshape(shape) for maps, shape in zip(sets, shapes, strict=True)]
    return dataclasses.replace(sets[0], logits=np.concatenate(rows, axis=2))


def _of(clean, attacked):
    """Returns the attacks on images that have clean maps, so that all divide the same images.

    Programs of different attacks may differ in a last bit, and so on a borderline image.
    """
    return attacked.select(np.isin(attacked.image_id, clean.image_id))


def _divided(run, clean, attacked):
    """Returns clean and attacked maps, divided by image for every seed."""
    maps = HeatmapSet.concatenate([clean, attacked])
    return judging.divide(maps, 'held_out', run.config.detector, run.config.seed)


def _aurocs(run, method, fitted, joins, judged, beside):
    """Returns the AUROC, by every attack that judges, of what was fitted on one division.

    Noise that joins the clean ones when fitting, and noise to judge by, may be None.
    """
    scorer = judging.scorer(method, functools.partial(store.fit_banks, run, fitted, noise=joins))
    class_names, rates = run.description['class_names'], {}
    for name, division in judged.items():
        scores, noise = scorer.score_fn(division.maps), beside.get(name)
        seeds = judging.by_seed(scorer, scores, division, noise=noise)
        ratio = division.judged_over_fitted
        mean = averages.over_seeds(seeds, class_names, judged_over_fitted=ratio)['overall']
        rates[name] = {kind: mean[kind] for kind in ('n_correct', 'n_adversarial')}
        rates[name] |= _cell(mean, 'auroc')
        rates[name]['with_noise'] = None if noise is None else _cell(mean, 'auroc_with_noise')
    return rates


def _cell(mean, key):
    """Returns an AUROC of both averages as `sweep.json` has it."""
    found, classes = (
        {'auroc': each[key], 'interval': each['interval'][key], 'over': each['over'].get(key)}
        for each in (mean, mean['over_classes'])
    )
    return found | {'over_classes': classes}
