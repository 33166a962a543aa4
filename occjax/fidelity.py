"""What approximate maps keep of the exact ones, and what that costs detection.

The exact maps of the test images and their attacks are stored already. Each setting maps the same
images anew; then the detectors are fitted and judged on those maps like on the exact ones, with
the same divisions and seeds, so that differences are paired.

Dimensions: S seeds, M maps, h w heatmap grid, K classes.
"""

import dataclasses
import math

import numpy as np

from occjax import (
    approximate,
    benchmark,
    data,
    evaluation,
    figures,
    judging,
    metrics,
    peer,
    shard,
    stages,
    storage,
)
from occjax.methods import METHODS
from occjax.run import Progress, Run, say
from occjax.types import UsageError

EVERY = (1, 2)
_PROTOCOL = 'held_out'


def fidelity(run: Run) -> str:
    """Judges approximate maps, writes `fidelity.json` and `fidelity.png`, and returns a table.

    Raises:
        UsageError: if the stored maps are approximate themselves, a stage is missing, or a peer is
            asked for that is not installed.
    """
    if run.knobs:
        raise UsageError(
            f'--mode=fidelity compares with exact maps, but config.occlusion has {run.knobs}: '
            'set both to 1.'
        )
    if run.benchmark_peer:
        peer.check(run.benchmark_peer)
    variables, division = stages.load_variables(run), evaluation.divide(run, _PROTOCOL)
    exact, rows, images = division.maps, [], _images(run, variables, division.maps)
    reference = None
    for threshold in (1.0, *run.fidelity_thresholds):
        for every in EVERY:
            knobs = dict(threshold=threshold, every=every)
            logits = _logits(run, variables, images, exact, **knobs)
            maps = dataclasses.replace(exact, logits=logits)
            aurocs = _aurocs(run, division._replace(maps=maps))
            reference = reference or aurocs  # The exact maps come first.
            lost = [a - b for a, b in zip(aurocs, reference, strict=True)]
            rows.append(
                knobs
                | {
                    'ssim': float(np.mean(approximate.ssim(maps.maps, exact.maps))),
                    'spearman': float(np.nanmean(approximate.spearman(maps.maps, exact.maps))),
                    'auroc': float(np.mean(aurocs)),
                    'auroc_difference': float(np.mean(lost)),
                    'auroc_difference_interval': metrics.interval(
                        lost, judged_over_fitted=division.judged_over_fitted
                    ),
                }
            )
    result = {
        'manifest': evaluation.manifest(run),
        'protocol': _PROTOCOL,
        'maps': len(exact),
        'adversarial_maps': int(exact.is_adversarial.sum()),
        'exact_auroc': float(np.mean(reference)),
        'settings': _timed(run, variables, images, rows),
    }
    if run.benchmark_peer:
        say(f'benchmark: {run.benchmark_peer}')
        few = images[: run.benchmark_images]
        result['peer'] = theirs = peer.measure(run, variables, few)
        for row in rows:
            row['times_peer'] = row['windows_per_second'] / theirs['windows_per_second']
    storage.write_json(run.workdir / 'fidelity.json', result)
    storage.write_bytes(run.workdir / 'fidelity.png', plot(result))
    return table(result) + f'\nWritten: {run.workdir / "fidelity.json"}, fidelity.png\n'


def _images(run, variables, maps):
    """Returns the `[M, H, W, C]` images that were mapped, attacked again where they had been."""
    split = run.dataset.test
    images, labels = data.take(split, maps.image_id), split.labels[maps.image_id]
    adversarial = shard.attacked_parts(run, variables, images, labels)['adversarial'].images
    return np.where(maps.is_adversarial[:, None, None, None], adversarial, images)


def _logits(run, variables, images, exact, *, threshold, every):
    """Returns `[M, h, w, K]` logits at a setting, from the store as far as they are there."""
    if threshold == every == 1:
        return exact.logits
    knobs, parts, size = dict(threshold=threshold, every=every), [], run.shard_size
    name = f'threshold-{threshold:g}-every-{every}'
    progress = Progress(len(images), f'fidelity, {name}: maps')
    for start in range(0, len(images), size):
        path = run.workdir / 'fidelity' / f'{name}-{start:07d}.npz'
        part = images[start : start + size]
        if path.exists():
            progress.total -= len(part)
        else:
            logits = shard.map_images(run, variables, part, knobs=knobs)
            storage.save_arrays(path, {'logits': logits})
            progress(len(part))
        parts.append(storage.load_arrays(path, mode='fidelity')['logits'])
    return np.concatenate(parts)


def _aurocs(run, division):
    """Returns every seed's class mean of the AUROC."""
    banks = evaluation.fit_banks(run, division, 'detector')
    scores = judging.score_banks(banks, METHODS['detector'], division.maps)
    class_names = run.description['class_names']
    seeds = judging.by_seed(scores, division, class_names=class_names, threshold=0.0)
    aurocs = [metrics.overall(classes)['auroc'] for classes in seeds]
    if None in aurocs:
        raise UsageError('No class has maps of both kinds on both sides: map more test images.')
    return aurocs


def _timed(run, variables, images, rows):
    """Returns the rows with their speed: each setting maps a few images, as `benchmark` does."""
    few = images[: run.benchmark_images]
    expected = benchmark.plain_maps(run, variables, few)
    for row in rows:
        say(f'fidelity: timing threshold {row["threshold"]:g}, every {row["every"]}')
        exact = row['threshold'] == row['every'] == 1
        engine = 'incremental' if exact else 'approximate'
        knobs = {} if exact else {name: row[name] for name in ('threshold', 'every')}
        found = benchmark.measure(run, engine, variables, few, expected, **knobs)
        row['windows_per_second'] = found['windows_per_second']
        row['seconds_per_map'] = 1 / found['maps_per_second']
        row['flop_ratio'] = found['flops_per_map_in_full'] / found['flops_per_map']
    return rows


def table(result: dict) -> str:
    """Returns what `fidelity.json` holds as lines for a person."""
    peer_name = result.get('peer', {}).get('name')
    lines = [
        f'{result["maps"]} maps of test images, {result["adversarial_maps"]} of them adversarial; '
        f'AUROC of the detectors on exact maps {result["exact_auroc"]:.3f}',
        '',
        'threshold  every  s/map   FLOPs saved  SSIM   Spearman  AUROC  difference (95 %)'
        + (f'        x {peer_name}' if peer_name else ''),
    ]
    for row in result['settings']:
        low, high = row['auroc_difference_interval'] or (math.nan, math.nan)
        difference = f'{row["auroc_difference"]:+.3f} ({low:+.3f} to {high:+.3f})'
        lines.append(
            f'{row["threshold"]:<9g}  {row["every"]:<5}  {row["seconds_per_map"]:<6.3f}  '
            f'{row["flop_ratio"]:<11.1f}  {row["ssim"]:.3f}  {row["spearman"]:<8.3f}  '
            f'{row["auroc"]:.3f}  {difference}'
            + (f'  {row["times_peer"]:.1f}' if peer_name else '')
        )
    return '\n'.join(lines) + '\n'


def plot(result: dict) -> bytes:
    """Returns a PNG: what each setting costs detection, against how much faster it is."""
    from matplotlib.figure import Figure  # Half a second of import that other modes need not pay.

    rows = result['settings']
    base = rows[0]['seconds_per_map']
    figure = Figure(figsize=(6.4, 4.2), layout='constrained', dpi=150)
    axes = figure.add_subplot()
    axes.axhline(0, color='#888', linewidth=0.8)
    for every, marker in zip(EVERY, 'os', strict=True):
        chosen = [row for row in rows if row['every'] == every]
        speed = [base / row['seconds_per_map'] for row in chosen]
        lost = [row['auroc_difference'] for row in chosen]
        ends = [row['auroc_difference_interval'] or 2 * [row['auroc_difference']] for row in chosen]
        reach = np.abs(np.transpose(ends) - lost)
        axes.errorbar(speed, lost, reach, fmt='none', color='#bbb', linewidth=0.8)
        drawn = axes.scatter(
            speed,
            lost,
            c=[row['ssim'] for row in chosen],
            vmin=0.5,
            vmax=1,
            cmap='viridis',
            marker=marker,
            s=50,
            zorder=3,
            label='every window' if every == 1 else f'one window in {every} a side',
        )
        for row, x, y in zip(chosen, speed, lost, strict=True):
            axes.annotate(
                f'{row["threshold"]:g}',
                (x, y),
                textcoords='offset points',
                xytext=(6, 4),
                fontsize=8,
            )
    figure.colorbar(drawn, label='SSIM to the exact map')
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel('times faster than the exact map (incremental)')
    axes.set_ylabel('AUROC, difference to exact maps')
    axes.set_title('What approximation costs detection; numbers are thresholds', fontsize=10)
    axes.spines[['top', 'right']].set_visible(False)
    return figures.png(figure)
