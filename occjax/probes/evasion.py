"""How well the detectors stand up to an attacker who knows them (`--mode=adaptive`).

The attacked images are correctly classified test images that the detectors were not fitted on.

Dimensions: B batch, N images, K classes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from occjax import adaptive, attack, data, detector, engine, guard, names, verdict
from occjax import views as views_lib
from occjax.experiment import devices, judging, shard, stages, storage, store
from occjax.experiment import results as results_lib
from occjax.experiment.run import Run, parts
from occjax.methods import METHODS
from occjax.probes import sweep
from occjax.progress import Pace, Progress, say
from occjax.report import canvas, figures, tables
from occjax.types import HeatmapSet, UsageError

ATTACKS = dict(
    zip(
        names.JOINT_ATTACKS,
        (adaptive.joint_pgd, adaptive.selective_pgd, adaptive.orthogonal_pgd),
        strict=True,
    )
)
_SEEN = ('method', 'views', 'top_classes', 'network', *engine.SETTINGS)
_STATIC = ('name', 'steps', 'weight', 'clip', 'mesh', *_SEEN)


@functools.partial(jax.jit, static_argnames=_STATIC)
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
    """Returns whether each `[B]` image is classified wrongly, evades, in how many steps, and how.

    The last are the attacked images. Attack `fgsm` doesn't know of the detector, `none` leaves the
    images. Each device attacks its own images.
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
    margin_fn = functools.partial(verdict.margins, logits_fn, bank, thresholds, **settings)
    ball = dict(epsilon=epsilon, bounds=attack.PIXELS if clip else None)
    if name in ATTACKS:
        ball |= {'weight': weight} if name == 'joint' else {}
        images, taken = ATTACKS[name](logits_fn, margin_fn, images, labels, steps=steps, **ball)
        return jnp.argmax(logits_fn(images), -1) != labels, taken >= 0, taken, images
    if name == 'fgsm':
        images = attack.fgsm(logits_fn, images, labels, **ball)
    is_wrong = jnp.argmax(logits_fn(images), -1) != labels
    is_silent = margin_fn(images) <= 0
    # An untouched image can't evade: what is asked of it is whether it rings.
    evades = is_silent & (is_wrong | (name == 'none'))
    return is_wrong, evades, jnp.zeros(len(images), int), images


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
    made_from, rows, alarms, kept = store.heatmaps_origin(run), [], {}, {}
    targets = [_target(run, variables, method) for method in dict.fromkeys(wanted.methods)]
    for target in _on_the_same(targets, wanted.images):
        _tell_unthresholded(run, target)
        found, alarms[target.method] = _resisted(run, variables, target)
        rows += found
        if wanted.rounds and target.method in names.VIEWING:
            for later, auroc in _hardened(run, variables, target):
                kept[f'{target.method}, round {later.round}'] = auroc
                if later.round:
                    found, alarms[later.label] = _resisted(run, variables, later)
                    rows += found
    result = {
        'manifest': results_lib.manifest(run),
        'made_from': made_from,
        'images': len(target.ids),
        'settings': dataclasses.asdict(wanted),
        'false_alarms': alarms,
        'auroc_of_the_mixture': kept,
        'rows': rows,
    }
    storage.write_record(run.workdir / 'adaptive.json', result)
    picture = canvas.encode(figures.evasion_figure(result), 'png')
    storage.write_bytes(run.workdir / 'adaptive.png', picture)
    written = f'\nWritten: {run.workdir / "adaptive.json"}, adaptive.png; --mode=report shows it.\n'
    return tables.to_markdown([tables.adaptive_table(result)]) + written


def _on_the_same(targets, count):
    """Returns detectors with the same clean images, on which none of them was fitted.

    Raises:
        UsageError: if there are none.
    """
    shared = [np.isin(targets[0].ids, target.ids) for target in targets]
    ids = targets[0].ids[np.all(shared, axis=0)][:count]
    if not len(ids):
        raise UsageError(
            'No test image is left that no detector of config.adaptive.methods was fitted on: map '
            'more of them, or attack one detector at a time.'
        )
    known = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:8]
    return [target._replace(ids=ids, name=f'{target.name}-{known}') for target in targets]


def _tell_unthresholded(run, target):
    """Says where a detector never flags, so that every attack evades it."""
    never = np.flatnonzero(np.isinf(target.thresholds))
    if len(never):
        class_names = run.description['class_names']
        say(
            f'adaptive, {target.label}: no threshold for {", ".join(class_names[k] for k in never)}'
            ', so an attack evades it there by ending in one of them; more maps set one.'
        )


class _Target(NamedTuple):
    """A detector, and the clean test images that it is attacked by."""

    method: str
    bank: detector.Bank
    thresholds: np.ndarray  # [K]
    autoencoder: Any  # of the views; None without any
    ids: np.ndarray
    name: str
    made_from: storage.Origin
    round: int = 0  # how often it was fitted against its own attackers

    @property
    def label(self) -> str:
        """What the detector is called in results."""
        return f'{self.method}, round {self.round}' if self.round else self.method


def _target(run, variables, method):
    """Returns the first seed's detector."""
    if method in names.VIEWING:
        found, ids, name = sweep.deployed(run, variables, method)
        made_from = store.classifier_origin(run)
    else:
        division, name = store.divide(run, 'held_out'), method
        maps, made_from = division.maps, store.heatmaps_origin(run)
        ids = maps.image_id[division.is_judged[0] & ~maps.is_adversarial]
        found = guard.at_fpr(stages.load_guard(run, method, division), 0.05)
    sees = found.bank, found.thresholds, found.autoencoder
    name = f'{name}-{storage.digest_of(guard.to_arrays(found))[:8]}'  # Fitted anew it is another.
    return _Target(method, *sees, ids, name, made_from)


def _settings(run, variables, target):
    """Returns what attacks and maps of a detector's images are made with."""
    mapping, is_viewing = run.mapping(variables), target.method in names.VIEWING
    return dict(
        method=target.method,
        views=run.config.sweep.views if is_viewing else (),
        network=run.network,
        engine=mapping.engine,
        chunk_size=mapping.chunk_size,
        top_classes=run.config.occlusion.top_classes,
        **run.geometry,
        **run.knobs,
    )


def _attack(run, variables, target, name, epsilon, ids):
    """Returns what `attack_batch` does to clean test images."""
    wanted = run.config.adaptive
    attack_fn = functools.partial(
        attack_batch,
        variables,
        target.bank,
        target.thresholds,
        target.autoencoder,
        shard.fill_of(run, variables),
        name=name,
        epsilon=epsilon,
        steps=wanted.steps,
        weight=wanted.weight,
        clip=run.config.attack.clip,
        mesh=devices.mesh(),
        **_settings(run, variables, target),
    )
    # Not more images at once: those that evade wait for the slowest of their batch.
    batch_size = min(run.mapping(variables).batch_size, 32 * jax.local_device_count())
    images, labels = data.take(run.dataset.test, ids), run.dataset.test.labels[ids]
    what = f'adaptive, {name} at {epsilon:.3g} on {target.label}: images'
    progress = Progress(len(ids), what)
    found = devices.in_batches(attack_fn, images, labels, batch_size=batch_size, on_batch=progress)
    return dict(zip(('wrong', 'evades', 'steps', 'images'), found, strict=True))


def _path(run, target, name, epsilon, count):
    """Returns where what an attack does to a detector is kept."""
    wanted = run.config.adaptive
    numbers = f'{storage.number_name(wanted.weight)}-{storage.number_name(epsilon)}'
    settings = f'{count}x{wanted.steps}-{numbers}'
    return run.workdir / 'adaptive' / f'{target.name}-{name}-{settings}.npz'


def _kept(run, target, attacks, count, attack_fn, stem=''):
    """Yields what each `(name, epsilon)` makes of `count` images, from its file or made anew."""
    wanted = [
        (_path(run, target, stem + at[0], at[1], count), count, functools.partial(attack_fn, *at))
        for at in attacks
    ]
    what = f'adaptive, {target.label}: images'
    return parts(run, what, wanted, mode='adaptive', made_from=target.made_from)


def _resisted(run, variables, target):
    """Returns what every attack does to a detector, and how often it flags untouched images."""
    wanted = run.config.adaptive
    attacks = [*itertools.product(('fgsm', *wanted.attacks), wanted.epsilons), ('none', 0.0)]
    attacks = list(dict.fromkeys(attacks))
    count = len(target.ids)
    stored = {at: _path(run, target, *at, count).exists() for at in attacks}
    pace = Pace(
        f'adaptive, {target.label}',
        {
            f'{name} {epsilon:.4g}': (not stored[name, epsilon])
            * (wanted.steps if name in ATTACKS else 1)
            for name, epsilon in attacks
        },
    )

    def attack_fn(name, epsilon):
        pace(f'{name} {epsilon:.4g}')
        found = _attack(run, variables, target, name, epsilon, target.ids)
        return {key: found[key] for key in ('wrong', 'evades', 'steps')}

    found = _kept(run, target, attacks, len(target.ids), attack_fn)
    *rows, untouched = (
        _row(run, target, *at, arrays) for at, arrays in zip(attacks, found, strict=True)
    )
    return rows, 1 - untouched['evasion']


def _row(run, target, name, epsilon, found):
    """Returns what one attack at one epsilon does to one detector."""
    evades, taken = found['evades'], found['steps']
    ends = stats.binomtest(int(evades.sum()), len(evades)).proportion_ci(method='wilson')
    steps = range(run.config.adaptive.steps + 1)
    return {
        'method': target.label,
        'attack': name,
        'epsilon': epsilon,
        'wrong': float(found['wrong'].mean()),
        'evasion': float(evades.mean()),
        'interval': [float(ends.low), float(ends.high)],
        'by_step': [float(np.mean(evades & (taken <= t))) for t in steps]
        if name in ATTACKS
        else None,
    }


def _hardened(run, variables, target):
    """Yields the detector, fitted ever again with what its attackers made of fitting images.

    Beside it the AUROC of the mixture that it was fitted on first: what that costs. The first is
    the detector as it was.

    References:
        Lapid et al. (RADAR), https://arxiv.org/abs/2404.12120
    """
    wanted, sets = run.config.adaptive, sweep.mapped(run, variables)
    division, noise = sweep.mixed(run, sets, run.config.sweep.mixture)
    maps, is_fitted, is_reserved = division
    if not METHODS[target.method].windows:  # Nor are they made of what attacks it.
        maps, noise = (_without_windows(each) for each in (maps, noise))
    division = judging.Division(maps, is_fitted[:1], is_reserved[:1])
    clean = division.is_fitted[0] & ~division.maps.is_adversarial
    ids, extra = division.maps.image_id[clean][: wanted.images], []
    fitted = [wanted.attacks, wanted.epsilons, len(ids), wanted.steps, wanted.weight]
    stem = f'{target.name}-{hashlib.sha256(json.dumps(fitted).encode()).hexdigest()[:8]}'
    yield target, _auroc(division, target)
    attacks = list(dict.fromkeys(itertools.product(wanted.attacks, wanted.epsilons)))
    for number in range(1, wanted.rounds + 1):
        attack_fn = functools.partial(_attacked_maps, run, variables, target, ids)
        made = _kept(run, target, attacks, len(ids), attack_fn, stem='fit-')
        extra += [HeatmapSet(**arrays) for arrays in made]
        grown = _grown(division, extra)
        banks = store.fit_banks(run, grown, target.method, noise)
        bank, known = judging.first(banks, grown, METHODS[target.method])
        name = f'{stem}-round{number}'
        levels = known.thresholds(0.05)
        target = target._replace(bank=bank, thresholds=levels, name=name, round=number)
        yield target, _auroc(division, target)


def _auroc(division, target):
    """Returns the AUROC of a detector on maps that it is not fitted on."""
    maps, method = division.maps.select(division.is_judged[0]), METHODS[target.method]
    scores = detector.score(target.bank, method.inputs_fn(maps), method.predicted(maps))
    return float(sklearn_metrics.roc_auc_score(maps.is_adversarial, scores))


def _without_windows(maps):
    """Returns maps, if there are any, without what is seen under windows."""
    return maps if maps is None else dataclasses.replace(maps, logits=maps.logits[:, :0, :0])


def _grown(division, extra):
    """Returns a division with more maps to fit on."""
    maps = HeatmapSet.concatenate([division.maps, *extra])
    more = len(maps) - len(division.maps)
    is_fitted = np.pad(division.is_fitted, ((0, 0), (0, more)), constant_values=True)
    return judging.Division(maps, is_fitted, np.pad(division.is_reserved, ((0, 0), (0, more))))


def _attacked_maps(run, variables, target, ids, name, epsilon):
    """Returns what a detector sees of fitting images that an attack on it made wrong, as arrays."""
    settings = _settings(run, variables, target)
    see_fn = functools.partial(
        see_batch, variables, target.autoencoder, shard.fill_of(run, variables), **settings
    )
    found = _attack(run, variables, target, name, epsilon, ids)
    batch_size = run.mapping(variables).batch_size
    seen = devices.in_batches(see_fn, found['images'], batch_size=batch_size)
    labels = run.dataset.test.labels[ids]
    known = {'label': labels, 'image_id': ids, 'is_adversarial': np.ones(len(ids), bool)}
    return {key: array[found['wrong']] for key, array in (seen | known).items()}


@functools.partial(jax.jit, static_argnames=_SEEN)
def see_batch(variables, autoencoder, fill, images, *, method, views, network, **settings):
    """Returns the arrays of `verdict.observe`'s maps that a detector sees."""
    seen = views_lib.of_names(views, autoencoder)
    settings = dict(method=METHODS[method], views=seen, fill=fill, **settings)
    maps = verdict.observe(network.classifier(variables), images, **settings)
    return {name: getattr(maps, name) for name in ('logits', 'unoccluded', 'views')}
