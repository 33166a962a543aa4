"""From stored maps to results: no image is classified, so that every number can be made again.

Dimensions: M maps, K classes.
"""

import collections
import functools
import importlib.metadata
import json
import math
import platform

import jax
import numpy as np

from occjax import averages, comparators, config, engine, metrics, vgg
from occjax.experiment import judging, storage, store
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.report import figures, page, paper, tables
from occjax.types import HeatmapSet

_DRAWN = ('detector', 'all_logits', 'max_probability')  # whose ROC curves the report shows


def scorers(run: Run, division: judging.Division, protocol: str) -> dict[str, judging.Scorer]:
    """Returns all that scores a protocol's maps, by name: the config's methods, then baselines."""
    load_banks = functools.partial(store.load_banks, run, division, protocol)
    chosen = (*run.config.detector.methods, *metrics.BASELINES)
    return {name: judging.scorer(name, load_banks) for name in chosen}


def detection(run: Run, protocol: str) -> dict:
    """Returns how the paper's detectors and all their rivals do under one protocol."""
    division, class_names = store.divide(run, protocol), run.description['class_names']
    published = paper.numbers(class_names)
    controls = store.load_controls(run) if protocol == 'held_out' else {}
    entries, judged, curves = {}, {}, {}
    for name, scorer in scorers(run, division, protocol).items():
        scores = scorer.score_fn(division.maps)
        noise = controls.get('noise')
        entry = judging.judge(scorer, scores, division, class_names=class_names, noise=noise)
        judged[name] = entry['seeds']
        entries[name] = entry['overall'] | {'per_class': entry['per_class']}
        entries[name]['controls'] = {
            kind: judging.control_rates(scorer, scores, division, maps)
            for kind, maps in controls.items()
            if len(maps)
        }
        if name in _DRAWN:
            curves[name] = judging.roc(scores, division)
        if name == 'detector':
            drawn = _histogram(scorer, scores, division, controls)
    overall = entries.pop('detector')
    per_class = overall.pop('per_class')
    for name, entry in per_class.items():
        entry['paper_accuracy'] = published.accuracy[name] if published else None
    overall['paper_accuracy'] = published.overall if published else None
    ratio = division.judged_over_fitted
    confidence = judged.pop('max_probability')
    for name, seeds in judged.items():
        found = overall if name == 'detector' else entries[name]
        found['over_confidence'] = averages.lead(seeds, confidence, judged_over_fitted=ratio)
    overall['rank_agreement'] = _rank_agreement(overall, per_class) if published else None
    return {
        'per_class': per_class,
        'overall': overall,
        'baselines': entries,
        'roc': curves,
        'histogram': drawn,
    }


def _rank_agreement(overall, per_class):
    """Returns how our order of the classes that count by balanced accuracy is the paper's."""
    counted = [per_class[name] for name in overall['over_classes']['classes']]
    pairs = [(entry['balanced_accuracy'], entry['paper_accuracy']) for entry in counted]
    return metrics.rank_agreement(*np.reshape(pairs, (-1, 2)).T)


def _histogram(scorer, scores, division, controls):
    """Returns `metrics.histogram` of the first seed's scores of maps that nothing was fitted on."""
    counted, attacked = division.is_counted[0], division.maps.is_adversarial
    kinds = {'clean': scores[0][counted & ~attacked], 'attacked': scores[0][counted & attacked]}
    if len(controls.get('noise', ())):
        noise, maps = controls['noise'], division.maps
        fresh = ~np.isin(noise.image_id, maps.image_id[~division.is_judged[0]])
        fresh &= np.isin(noise.predicted, maps.predicted[counted])
        kinds['noise'] = scorer.score_fn(controls['noise'])[0][fresh]
    return metrics.histogram(kinds)


def gather(run: Run, maps: HeatmapSet, shards: list[dict]) -> dict:
    """Returns what results.json holds, from the training images' maps and all that is stored."""
    metrics = store.load_metrics(run)
    accuracies = {f'{name}_accuracy': metrics[f'{name}_accuracy'] for name in ('train', 'test')}
    class_names = run.description['class_names']
    published = paper.numbers(class_names)
    correct, adversarial = (maps.select(maps.is_adversarial == kind) for kind in (False, True))
    counts = [np.bincount(m.predicted, minlength=len(class_names)) for m in (correct, adversarial)]
    attempted = int(sum(shard['attempted'] for shard in shards))
    return {
        'manifest': manifest(run) | {'heatmaps': provenance(shards)},
        'classifier': accuracies
        | {'paper_test_accuracy': published.test_accuracy if published else None},
        'attack': {
            'epsilon': run.config.attack.epsilon,
            'attempted': attempted,
            'successful': len(adversarial),
            'success_rate': len(adversarial) / attempted if attempted else None,
            'max_perturbation': float(max(shard['max_perturbation'] for shard in shards)),
            'unmoved': int(sum(shard['unmoved'] for shard in shards)),
            'min_pixel': float(min(shard['pixel_range'][0] for shard in shards)),
            'max_pixel': float(max(shard['pixel_range'][1] for shard in shards)),
        },
        'heatmaps': {
            name: {
                'correct': int(counts[0][k]),
                'adversarial': int(counts[1][k]),
                'paper_correct': published.counts[name][0] if published else None,
                'paper_adversarial': published.counts[name][1] if published else None,
            }
            for k, name in enumerate(class_names)
        },
        'map_mean': _map_mean(maps),
        'detection': {protocol: detection(run, protocol) for protocol in store.PROTOCOLS},
        'cost': cost(run, shards),
        'adaptive': store.load_adaptive(run),
    }


def _map_mean(maps):
    """Returns the mean cell of both kinds of maps, and their difference with its interval."""
    cells, kinds = maps.maps.mean(axis=(1, 2)), maps.is_adversarial
    named = (('correct', ~kinds), ('adversarial', kinds))
    means = {name: float(cells[here].mean()) if here.any() else None for name, here in named}
    difference, ends = averages.contrast(cells, kinds, maps.image_id)
    return means | {'difference': difference, 'interval': {'difference': ends}}


def provenance(shards: list[dict]) -> dict:
    """Returns how most of the shards' maps were computed, see `Run.provenance`."""
    counted = collections.Counter(str(shard['how']) for shard in shards)
    return json.loads(counted.most_common(1)[0][0])


def cost(run: Run, shards: list[dict]) -> dict:
    """Returns forward passes, FLOPs and milliseconds a verdict of every method (P9).

    They are those of the engine, knobs, device and precision that made the stored maps, the
    milliseconds from a benchmark of just these, if one is there.
    """
    how = provenance(shards)
    name, plan = how['engine'], run.planned(run.variable_shapes, **run.knobs)
    windows, flops = math.prod(run.grid), engine.flops_per_map(name, plan)
    once = engine.flops_per_map('full', plan) / windows
    path, milliseconds = run.workdir / 'benchmark.json', None
    if path.exists():
        timed = storage.read_record(path, mode='benchmark')['engines'].get(name)
        if timed and timed['how'] == how:
            milliseconds = 1000 / timed['maps_per_second']
    again = comparators.autoencoder_flops(run.image_shape)
    beside = {'magnet_error': again, 'magnet_divergence': again}
    mapped = flops + (once if name == 'full' else 0)

    def entry(scored):
        passes = METHODS[scored].passes if scored in METHODS else metrics.BASELINES[scored].passes
        work = mapped if passes is None else passes * once + beside.get(scored, 0)
        return {
            'forward_passes': 1 + windows if passes is None else passes,
            'gflop': work / 1e9,
            'milliseconds': milliseconds if passes is None else None,
        }

    return {scored: entry(scored) for scored in (*run.config.detector.methods, *metrics.BASELINES)}


def make_report(run: Run) -> str:
    """Writes the report from what is stored, and classifies no image; returns its tables.

    They are what fits on a screen: of many classes some, the others are in `tables.md`.
    """
    maps, shards = store.load_shards(run, 'train')
    results = gather(run, maps, shards)
    class_names = run.description['class_names']
    rows = [] if run.trained else vgg.summary(num_classes=len(class_names), **run.layers)
    files = page.build(
        results,
        rows=rows,
        class_names=class_names,
        examples=examples(shards),
        maps=maps,
        config=run.config,
    )
    for name, content in files.items():
        storage.write_bytes(run.workdir / 'report' / name, content)
    listed = tables.build(results, rows, class_names)
    return tables.to_markdown([tables.shorten(table) for table in listed])


def examples(shards: list[dict]) -> list[figures.Example]:
    """Returns an attacked image from every shard that has one, with both its maps."""
    found = []
    for shard in shards:
        if len(shard['example_id']):
            maps = store.as_maps([shard])
            here = maps.image_id == shard['example_id'][0]
            clean, attacked = (maps.select(here & (maps.is_adversarial == a)) for a in (0, 1))
            found.append(
                figures.Example(
                    clean=shard['example_clean'][0],
                    adversarial=shard['example_adversarial'][0],
                    label=int(attacked.label[0]),
                    predicted=int(attacked.predicted[0]),
                    clean_map=clean.maps[0],
                    adversarial_map=attacked.maps[0],
                )
            )
    return found


def manifest(run: Run) -> dict:
    """Returns what a reader needs to make the same numbers again."""
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scikit-learn')
    return {
        'config': config.to_json(run.config),
        'config_hash': config.digest(run.config),
        'seeds': {'config': run.config.seed, 'detectors': list(range(run.config.detector.seeds))},
        'versions': {'python': platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'dataset': run.description,
    }
