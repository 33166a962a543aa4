"""What approximate maps keep of the exact ones, and what that costs detection.

The exact maps of the test images and their attacks are stored already. Each setting maps the same
images anew; then the detectors are fitted and judged on those maps like on the exact ones, with
the same divisions and seeds, so that differences are paired.

Dimensions: S seeds, M maps, h w heatmap grid, K classes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sklearn_metrics

from occjax import averages, data, metrics
from occjax.benchmark import engines, peer
from occjax.benchmark.peer import Timing
from occjax.experiment import judging, shard, stages, storage, store
from occjax.experiment import results as results_lib
from occjax.experiment.run import Run, parts
from occjax.progress import counted, say
from occjax.report import canvas, tables
from occjax.types import UsageError

EVERY = (1, 2)
# The paper's, the best, and a score that nothing is fitted for.
JUDGES = ('detector', 'all_logits', 'map_mean')
_PROTOCOL = 'held_out'


def fidelity(run: Run, timing: Timing, thresholds: Sequence[float]) -> str:
    """Judges approximate maps, writes `fidelity.json` and `fidelity.png`, and returns a table.

    Args:
        run: a finished one.
        timing: how each setting is timed.
        thresholds: of the approximate engine, beside 1.

    Raises:
        UsageError: if the stored maps are approximate themselves, a stage is missing, or a peer is
            asked for that is not installed.
    """
    if run.knobs:
        raise UsageError(
            f'--mode=fidelity compares with exact maps, but config.occlusion has {run.knobs}: '
            'set both to 1 in another --workdir.'
        )
    peer.check(run, timing.peer)
    variables, division = stages.load_variables(run), store.divide(run, _PROTOCOL)
    exact, rows, images = division.maps, [], _images(run, variables, division.maps)
    judges = [name for name in JUDGES if name in (*run.config.detector.methods, *metrics.BASELINES)]
    reference = None
    for threshold in (1.0, *thresholds):
        for every in EVERY:
            knobs = dict(threshold=threshold, every=every)
            logits = _logits(run, variables, images, exact, **knobs)
            maps = dataclasses.replace(exact, logits=logits)
            aurocs = {name: _aurocs(run, division._replace(maps=maps), name) for name in judges}
            reference = reference or aurocs  # The exact maps come first.
            rows.append(
                knobs
                | {
                    'ssim': float(np.mean(metrics.ssim(maps.maps, exact.maps))),
                    'spearman': float(np.nanmean(metrics.spearman(maps.maps, exact.maps))),
                    'judges': {
                        name: _compared(division, aurocs[name], reference[name]) for name in judges
                    },
                }
            )
    result = {
        'manifest': results_lib.manifest(run),
        'protocol': _PROTOCOL,
        'maps': len(exact),
        'adversarial_maps': int(exact.is_adversarial.sum()),
        'settings': _timed(run, timing, variables, images, rows),
    }
    if timing.peer:
        say(f'benchmark: {timing.peer}')
        few = images[: timing.images]
        result['peer'] = theirs = peer.measure(run, timing, variables, few)
        for row in rows:
            row['times_peer'] = row['windows_per_second'] / theirs['windows_per_second']
    storage.write_json(run.workdir / 'fidelity.json', result)
    storage.write_bytes(run.workdir / 'fidelity.png', plot(result))
    written = f'\nWritten: {run.workdir / "fidelity.json"}, fidelity.png\n'
    return tables.to_markdown([build(result)]) + written


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
    knobs, size, wanted = dict(threshold=threshold, every=every), run.shard_size, []
    name = f'threshold-{storage.number_name(threshold)}-every-{every}'
    for start in range(0, len(images), size):
        here, plain = (a[start : start + size] for a in (images, exact.unoccluded))

        def explain(here=here, plain=plain):
            return {'logits': shard.map_images(run, variables, here, plain, knobs=knobs)}

        path = run.workdir / 'fidelity' / f'{name}-{start:07d}.npz'
        wanted.append((path, len(here), explain))
    made_from, what = store.heatmaps_origin(run), f'fidelity, {name}: maps'
    found = parts(run, what, wanted, mode='fidelity', made_from=made_from)
    return np.concatenate([arrays['logits'] for arrays in found])


def _aurocs(run, division, name):
    """Returns every seed's AUROC of one judge, over the maps of all classes at once."""
    scorer = judging.scorer(name, functools.partial(store.fit_banks, run, division))
    scores = np.broadcast_to(scorer.score_fn(division.maps), division.is_judged.shape)
    kinds = division.maps.is_adversarial
    if any(len(set(kinds[judged])) < 2 for judged in division.is_judged):
        raise UsageError('No maps of both kinds to judge by: map more test images.')
    return [
        sklearn_metrics.roc_auc_score(kinds[judged], values[judged])
        for judged, values in zip(division.is_judged, scores, strict=True)
    ]


def _compared(division, aurocs, reference):
    """Returns the mean AUROC, and the interval of what it differs by from the exact maps'."""
    lost = np.subtract(aurocs, reference)
    ratio = division.judged_over_fitted
    return {
        'auroc': float(np.mean(aurocs)),
        'difference': float(np.mean(lost)),
        'interval': averages.interval(lost, judged_over_fitted=ratio, lowest=-1.0),
    }


def _timed(run, timing, variables, images, rows):
    """Returns the rows with their speed: each setting maps a few images, as `benchmark` does."""
    few = images[: timing.images]
    expected = engines.plain_maps(run, variables, few)
    for row in rows:
        say(f'fidelity: timing threshold {row["threshold"]:g}, every {row["every"]}')
        exact = row['threshold'] == row['every'] == 1
        engine = 'incremental' if exact else 'approximate'
        knobs = {} if exact else {name: row[name] for name in ('threshold', 'every')}
        found = engines.measure(run, timing, engine, variables, few, expected, **knobs)
        row['windows_per_second'] = found['windows_per_second']
        row['seconds_per_map'] = 1 / found['maps_per_second']
        row['flop_ratio'] = found['flops_per_map_in_full'] / found['flops_per_map']
    return rows


def build(result: dict) -> tables.Table:
    """Returns what `fidelity.json` holds as a table."""
    theirs, judges = result.get('peer'), list(result['settings'][0]['judges'])
    header = ('Threshold', 'Every', 'Seconds a map', 'FLOPs saved', 'SSIM', 'Spearman')
    lines = []
    for row in result['settings']:
        numbers = [row[key] for key in ('seconds_per_map', 'flop_ratio', 'ssim', 'spearman')]
        line = [f'{row["threshold"]:g}', f'{row["every"]}', *map(tables.cell, numbers)]
        for name in judges:
            found = row['judges'][name]
            low, high = found['interval'] or (math.nan, math.nan)
            line.append(f'{found["auroc"]:.3f} ({low:+.3f} to {high:+.3f})')
        lines.append((*line, *([f'{row["times_peer"]:.1f}'] if theirs else [])))
    header += tuple(f'AUROC, {tables.words(name).lower()}' for name in judges)
    return tables.Table(
        'What approximation keeps, and what it costs detection',
        header + ((f'Times {theirs["name"]}',) if theirs else ()),
        lines,
        note=f'{counted(result["maps"], "map")} of test images, '
        f'{result["adversarial_maps"]} of them adversarial. AUROC over all classes, mean over the '
        'seeds, each refitted to the maps of its row; in brackets the 95 % interval of its '
        'difference to exact maps, paired by seed.',
    )


def plot(result: dict) -> bytes:
    """Returns a PNG: what each setting costs each judge, against how much faster it is."""
    rows = result['settings']
    judges, base = list(rows[0]['judges']), rows[0]['seconds_per_map']
    figure, panels = canvas.row(4.2 * len(judges), 4, [1] * len(judges))
    for axes, name in zip(panels, judges, strict=True):
        axes.axhline(0, color='#888', linewidth=0.8)
        for every, marker in zip(EVERY, 'os', strict=True):
            chosen = [row for row in rows if row['every'] == every]
            speed = [base / row['seconds_per_map'] for row in chosen]
            found = [row['judges'][name] for row in chosen]
            lost = [entry['difference'] for entry in found]
            ends = [entry['interval'] or 2 * [entry['difference']] for entry in found]
            label = 'every window' if every == 1 else f'one window in {every} a side'
            reach = np.abs(np.transpose(ends) - lost)
            axes.errorbar(speed, lost, reach, fmt=marker, elinewidth=0.8, label=label)
            for row, x, y in zip(chosen, speed, lost, strict=True):
                text = f'{row["threshold"]:g}'
                axes.annotate(text, (x, y), textcoords='offset points', xytext=(5, 4), fontsize=8)
        axes.set_title(f'{tables.words(name)}, AUROC {rows[0]["judges"][name]["auroc"]:.3f}')
        axes.set_xlabel('times faster than the exact map')
    panels[0].set_ylabel('AUROC, difference to exact maps')
    panels[0].legend(fontsize=8, frameon=False)
    return canvas.encode(figure, 'png')
