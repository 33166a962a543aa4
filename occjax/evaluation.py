"""From stored maps to results: no classifier, no images, so that every number can be made again.

Dimensions: M maps, K classes.
"""

import dataclasses
import functools
import importlib.metadata
import platform

import jax
import numpy as np

from occjax import config, detector, judging, metrics, paper, report, storage, tables, vgg
from occjax.run import Run
from occjax.types import HeatmapSet

# The split whose maps each protocol divides.
PROTOCOLS = {'paper': 'train', 'held_out': 'test'}


def load_shards(run: Run, split_name: str) -> tuple[HeatmapSet, list[dict]]:
    """Returns all maps of a split, and the shards that they stand in."""
    directory = run.workdir / 'heatmaps'
    names = storage.read_json(directory / 'manifest.json', mode='heatmaps')
    shards = [
        storage.load_arrays(directory / name, mode='heatmaps')
        for name in names
        if name.startswith(split_name)
    ]
    stored = {
        field.name: np.concatenate([shard[field.name] for shard in shards])
        for field in dataclasses.fields(HeatmapSet)
    }
    return HeatmapSet(**stored), shards


def divide(run: Run, protocol: str) -> judging.Division:
    """Returns a protocol's maps, divided for every seed."""
    maps, _ = load_shards(run, PROTOCOLS[protocol])
    return judging.divide(maps, protocol, run.config.detector, run.rng)


def init_banks(run: Run, division: judging.Division) -> detector.Bank:
    """Returns the unfitted detectors of all seeds for a protocol's maps."""
    num_classes, key = division.maps.unoccluded.shape[-1], jax.random.key(run.config.seed + 2)
    return judging.init_banks(key, division, division.maps.maps, num_classes=num_classes)


def detection(run: Run, protocol: str) -> dict:
    """Returns how the fitted detectors and the baselines do under one protocol."""
    division, class_names = divide(run, protocol), run.description['class_names']
    maps, published = division.maps, paper.numbers(class_names)
    like = jax.eval_shape(lambda: init_banks(run, division))
    directory = run.workdir / 'detectors' / protocol
    banks = storage.restore_checkpoint(directory, like, mode='detectors')
    judge = functools.partial(judging.judge, division=division, class_names=class_names)
    result = judge(judging.score_banks(banks, maps.maps, maps.predicted), threshold=0.0)
    for name, entry in result['per_class'].items():
        entry['paper_accuracy'] = published.accuracy[name] if published else None
    result['overall']['paper_accuracy'] = published.overall if published else None
    baselines = {name: judge(score_fn(maps)) for name, score_fn in metrics.BASELINES.items()}
    result['baselines'] = {
        name: entry['overall'] | {'per_class': entry['per_class']}
        for name, entry in baselines.items()
    }
    return result


def gather(run: Run, maps: HeatmapSet, shards: list[dict]) -> dict:
    """Returns what results.json holds, from the training images' maps and all that is stored."""
    accuracies = storage.read_json(run.workdir / 'classifier' / 'metrics.json', mode='train')
    class_names = run.description['class_names']
    published = paper.numbers(class_names)
    correct, adversarial = (maps.select(maps.is_adversarial == kind) for kind in (False, True))
    counts = [np.bincount(m.predicted, minlength=len(class_names)) for m in (correct, adversarial)]
    attempted = int(sum(shard['attempted'] for shard in shards))
    return {
        'manifest': manifest(run),
        'classifier': accuracies
        | {'paper_test_accuracy': published.test_accuracy if published else None},
        'attack': {
            'epsilon': run.config.attack.epsilon,
            'attempted': attempted,
            'successful': len(adversarial),
            'success_rate': len(adversarial) / attempted if attempted else None,
            'max_perturbation': float(max(shard['max_perturbation'] for shard in shards)),
            'nan_count': int(sum(shard['nan_count'] for shard in shards)),
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
        'map_mean': {
            kind: float(m.maps.mean()) if len(m) else None
            for kind, m in (('correct', correct), ('adversarial', adversarial))
        },
        'detection': {protocol: detection(run, protocol) for protocol in PROTOCOLS},
    }


def make_report(run: Run) -> str:
    """Writes the report from what is stored, without classifier or images; returns its tables."""
    maps, shards = load_shards(run, 'train')
    results = gather(run, maps, shards)
    class_names = run.description['class_names']
    rows = vgg.summary(
        image_size=run.config.data.image_size,
        num_classes=len(class_names),
        hidden=run.config.classifier.hidden,
        plan=run.plan,
    )
    report.write(
        run.workdir / 'report',
        results,
        rows=rows,
        class_names=class_names,
        examples=examples(shards),
        maps=maps,
        config=run.config,
    )
    return tables.to_markdown(tables.build(results, rows, class_names))


def examples(shards: list[dict]) -> list[report.Example]:
    """Returns an attacked image from every shard that has one, with both its maps."""
    found = []
    for shard in shards:
        if len(shard['example_id']):
            maps = HeatmapSet(**{f.name: shard[f.name] for f in dataclasses.fields(HeatmapSet)})
            here = maps.image_id == shard['example_id'][0]
            clean, attacked = (maps.select(here & (maps.is_adversarial == a)) for a in (0, 1))
            found.append(
                report.Example(
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
