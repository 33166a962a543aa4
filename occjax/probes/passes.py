"""Which views carry detection: a greedy search over what a sweep stored, on fitting images alone.

The images that the first seed's detectors are fitted on are divided once more: networks are fitted
on two thirds, and views are chosen by the other third. Networks of all candidates are one bank, of
which each sees zeros where a view is not among its own.

Dimensions: M maps, V views, K classes, S candidates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import metrics as sklearn_metrics

from occjax import detector
from occjax.experiment import judging
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.streams import Stream
from occjax.types import HeatmapSet

_FEATURES = (128,)  # Narrower than what is fitted in the end, and fast.


def search(
    run: Run, clean: HeatmapSet, attacked: dict[float, HeatmapSet], noise: dict[float, HeatmapSet]
) -> dict | None:
    """Returns which view is added to those before with most gain, and what each is worth in all.

    Args:
        run: the experiment.
        clean: maps of clean images, with views.
        attacked: maps of attacked images by epsilon.
        noise: maps of noisy images by epsilon, none or the same.

    Returns:
        `order`, a list of views with the number of forward `passes` up to each and the `auroc`
        against clean and noisy images that is reached, the mean over epsilons; it begins with none.
        And `without`, by view, the AUROC of all the others together. None if there is no attack to
        fit or choose by.
    """
    names = list(dict.fromkeys(run.config.sweep.views))
    maps, epsilons, chooses = _fitting(run, clean, attacked, noise)
    levels = sorted(set(epsilons[maps.is_adversarial & chooses]))
    if not levels or not maps.is_adversarial[~chooses].any():
        return None
    score_fn = functools.partial(_scores, run, maps, epsilons, chooses, levels)
    (none,) = score_fn([()])
    order, chosen = [{'view': None, 'passes': 1, 'auroc': none}], []
    while len(chosen) < len(names):
        left = [name for name in names if name not in chosen]
        found = score_fn([[names.index(n) for n in (*chosen, name)] for name in left])
        best = int(np.argmax(found))
        chosen.append(left[best])
        order.append({'view': left[best], 'passes': 1 + len(chosen), 'auroc': found[best]})
    others = [[i for i in range(len(names)) if i != k] for k in range(len(names))]
    return {'order': order, 'without': dict(zip(names, score_fn(others), strict=True))}


def _fitting(run, clean, attacked, noise):
    """Returns all maps of the images that are fitted on, each one's epsilon (0: all), its side."""
    sets = [(0.0, clean), *attacked.items(), *noise.items()]
    maps = HeatmapSet.concatenate([maps for _, maps in sets])
    epsilons = np.concatenate([np.full(len(maps), epsilon) for epsilon, maps in sets])
    division = judging.divide(clean, 'held_out', run.config.detector, run.config.seed)
    ids = np.unique(clean.image_id[division.is_fitted[0]])
    chooses = run.rng(Stream.SEARCH).permutation(ids)[: len(ids) // 3]
    kept = np.isin(maps.image_id, ids)
    maps = maps.select(kept)
    return maps, epsilons[kept], np.isin(maps.image_id, chooses)


def _scores(run, maps, epsilons, chooses, levels, candidates):
    """Returns each candidate's AUROC against clean and noisy images, the mean over levels."""
    count, classes = maps.views.shape[1:]
    # Of each candidate, what it sees: its views' probability, its log, changes; the own logits.
    seen = np.array([np.isin(np.arange(count), views) for views in candidates])
    always = np.ones((len(seen), classes), bool)
    seen = np.concatenate([seen, seen, seen.repeat(classes, axis=1), always], axis=1)
    inputs = METHODS['views_alone'].inputs_fn(maps).astype(np.float32)
    wanted, kinds = run.config.detector, maps.is_adversarial
    weight = np.where(kinds, 0.5 / kinds[~chooses].mean(), 0.5 / (1 - kinds[~chooses].mean()))
    outputs = _fit_and_score(
        run.key(Stream.SEARCH),
        seen,
        inputs,
        kinds,
        np.where(chooses, 0, weight).astype(np.float32),
        steps=wanted.steps,
        batch_size=wanted.batch_size,
        learning_rate=wanted.learning_rate,
    )

    def auroc(scores, epsilon):
        here = chooses & ((epsilons == epsilon) | (epsilons == 0))
        return sklearn_metrics.roc_auc_score(kinds[here], scores[here])

    return [float(np.mean([auroc(row, e) for e in levels])) for row in np.asarray(outputs)]


@functools.partial(jax.jit, static_argnames=('steps', 'batch_size'))
def _fit_and_score(key, seen, inputs, is_adversarial, weight, **settings):
    """Returns the `[S, M]` scores of networks that see parts of `[M, F]` inputs."""

    def one(key, seen):
        init_key, fit_key = jax.random.split(key)
        parts = jnp.where(seen, inputs, 0)
        fields = dict(features=_FEATURES, standardize=True)
        variables = detector.init(init_key, grid=inputs.shape[1:], **fields)
        variables = detector.fit(fit_key, variables, parts, is_adversarial, weight, **settings)
        return detector.apply(variables, parts)

    # The same draws for all, so that candidates differ by what they see.
    return jax.lax.map(functools.partial(one, key), seen, batch_size=4)
