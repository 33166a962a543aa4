"""What was found, and the paper's Figures 1 to 3, drawn from finished arrays.

Dimensions: H W C image, h w heatmap grid, M maps.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from occjax import config as config_lib
from occjax import occlusion
from occjax.report import canvas, pictures, tables
from occjax.report.canvas import GAP, HEAD
from occjax.types import HeatmapSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = ('correct', 'adversarial')
_ADJECTIVES = {'noise': 'noisy'}


class Example(NamedTuple):
    """One image before and after the attack; `predicted` is `label` if the attack failed."""

    clean: np.ndarray  # f32[H, W, C]
    adversarial: np.ndarray  # f32[H, W, C]
    label: int  # the class of the clean image, correctly predicted
    predicted: int  # the class of the adversarial one
    clean_map: np.ndarray  # f32[h, w]
    adversarial_map: np.ndarray  # f32[h, w]


def attack_figure(
    examples: Sequence[Example], *, class_names: Sequence[str], epsilon: float
) -> 'Figure':
    """Draws Figure 1: up to four images, each above its attacked twin, with both predictions."""
    examples = examples[:4]
    if not examples:
        return canvas.message('No successful attack')
    # A single pair is side by side as in the paper, several are in columns.
    rows, columns = (1, 2) if len(examples) == 1 else (2, len(examples))
    side = 2.5
    figure = canvas.figure(columns * (side + GAP) + GAP, rows * (side + HEAD) + GAP)
    places = [
        (GAP + column * (side + GAP), HEAD + row * (side + HEAD))
        for row in range(rows)
        for column in range(columns)
    ]
    panels = [canvas.panel(figure, *place, side) for place in places]
    for i, example in enumerate(examples):
        above, below = panels[i], panels[i + len(examples)]
        canvas.draw_image(above, example.clean)
        canvas.title(above, 'Clean, classified as', class_names[example.label])
        canvas.draw_image(below, example.adversarial)
        failed = example.predicted == example.label
        head = 'no successful attack, still' if failed else 'classified as'
        colour = canvas.INK if failed else canvas.WRONG
        canvas.title(
            below,
            f'FGSM, ε = {tables.epsilon(epsilon)}, {head}',
            class_names[example.predicted],
            colour,
        )
    return figure


def occlusion_figure(
    example: Example | None, *, class_names: Sequence[str], config: config_lib.Occlusion
) -> 'Figure':
    """Draws Figure 2: the window at four places, and the map that all its places make.

    The second row is the same for the attacked image. An empty `config.fill`, the training mean,
    is drawn as the mean of the image.
    """
    if example is None:
        return canvas.message('No image to occlude')
    origins = occlusion.window_origins(
        example.clean.shape[:2], size=config.size, stride=config.stride, grid=config.grid
    )
    shown = _telling_cells(example.clean_map)
    pairs = [('Clean', example.clean, example.clean_map, example.label)]
    if example.predicted != example.label:
        pairs.append(('FGSM', example.adversarial, example.adversarial_map, example.predicted))
    side, foot = 1.8, 0.45
    width = (len(shown) + 1) * (side + GAP) + 1.6
    figure = canvas.figure(width, len(pairs) * (side + HEAD + foot))
    for row, (kind, image, heatmap, k) in enumerate(pairs):
        top = HEAD + row * (side + HEAD + foot)
        fill = np.asarray(config.fill or image.mean((0, 1)), np.float32)
        for number, cell in enumerate(shown, 1):
            panel = canvas.panel(figure, GAP + (number - 1) * (side + GAP), top, side)
            covered = occlusion.occlude(image, origins[cell], size=config.size, fill=fill)
            canvas.draw_image(panel, np.asarray(covered))
            canvas.outline(panel, origins[cell] - 0.5, (config.size, config.size))
            p = heatmap.flat[cell]
            canvas.title(panel, f'{kind}, window {number}', f'P({class_names[k]}) = {p:.2f}')
        last = canvas.panel(figure, width - side - 1.05, top, side)
        drawn = canvas.draw_map(last, heatmap)
        canvas.title(
            last, '{}, map of {}×{} cells'.format(kind, *heatmap.shape), f'P({class_names[k]})'
        )
        for number, cell in enumerate(shown, 1):
            row, column = np.unravel_index(cell, heatmap.shape)
            canvas.outline(last, (row - 0.5, column - 0.5), (1, 1))
            _number(last, row, column, number)
        canvas.tick_cells(last, heatmap)
    canvas.colour_bar(figure, drawn, width - 0.9, HEAD, top + side - HEAD)
    return figure


def maps_figure(maps: HeatmapSet, *, class_names: Sequence[str]) -> 'Figure':
    """Draws Figure 3: maps of one class, correct ones on the left, adversarial on the right.

    The class is `figure_class`'s; its maps are evenly spaced through their set: nobody chose them.
    """
    k = figure_class(maps, class_names)
    sets = [
        np.flatnonzero((maps.predicted == k) & (maps.is_adversarial == kind)) for kind in (0, 1)
    ]
    # `maps.maps` would compute the probabilities of the whole set for these few.
    few = maps.select(np.concatenate([pictures.evenly(index) for index in sets]))
    counts = tuple(map(len, sets))
    name = class_names[k]
    return pictures.gallery(few.maps, few.is_adversarial, class_name=name, counts=counts)


def roc_figure(curves: dict[str, dict | None]) -> 'Figure':
    """Draws the ROC curves of `judging.roc`, by the names of what scores."""
    curves = {tables.words(name): curve for name, curve in curves.items() if curve}
    if not curves:
        return canvas.message('No class has maps of both kinds')
    figure, axes = canvas.axes(5.2, 4.6)
    points = {name: (curve['fpr'], curve['tpr']) for name, curve in curves.items()}
    canvas.draw_curves(axes, points, {name: curve['auroc'] for name, curve in curves.items()})
    return figure


def classes_figure(detection: dict, class_names: Sequence[str]) -> 'Figure':
    """Draws each class's balanced accuracy with its 95 % interval, and the paper's accuracy.

    Bars without an interval are hollow.
    """
    overall = detection.get('overall') or {}
    entries = {name: detection['per_class'].get(name) or {} for name in class_names}
    entries |= {
        label.capitalize(): tables.averaged(overall, average)
        for average, label in tables.AVERAGES.items()
    }
    figure, axes = canvas.axes(7.4, 0.42 * len(entries) + 1)
    has_paper = any(entry.get('paper_accuracy') is not None for entry in entries.values())
    shift, height = (0.18, 0.34) if has_paper else (0, 0.6)
    for place, entry in zip(-np.arange(len(entries)), entries.values(), strict=True):
        ours, theirs = entry.get('balanced_accuracy'), entry.get('paper_accuracy')
        ends = (entry.get('interval') or {}).get('balanced_accuracy')
        if ours is not None:
            face = canvas.SERIES[0] if ends else 'white'
            axes.barh(place + shift, ours, height, color=face, edgecolor=canvas.SERIES[0])
        if ours is not None and ends:
            reach = [[max(0, ours - ends[0])], [max(0, ends[1] - ours)]]
            style = dict(color=canvas.INK, linewidth=1, capsize=2)
            axes.errorbar(ours, place + shift, xerr=reach, **style)
        if theirs is not None:
            axes.barh(place - shift, theirs, height, color=canvas.PALE)
    axes.axvline(0.5, color=canvas.MUTED, linewidth=0.8, linestyle='--')
    kinds = [[entry.get(f'n_{kind}') for kind in _KINDS] for entry in entries.values()]
    labels = [
        f'{name} ({" + ".join(map(tables.cell, n))})'
        for name, n in zip(entries, kinds, strict=True)
    ]
    axes.set_yticks(-np.arange(len(entries)), labels, parse_math=False)
    axes.set_xlim(0, 1.02)
    beside = "; grey: the paper's accuracy" if has_paper else ''
    label = f'Balanced accuracy\n(line: 95 % interval; hollow: too few maps for one{beside})'
    axes.set_xlabel(label, fontsize=8.5)
    axes.set_ylim(-len(entries) + 0.4, 0.6)
    return figure


def scores_figure(histogram: dict | None) -> 'Figure':
    """Draws how the paper's detector scores clean, attacked and noisy images."""
    if not histogram:
        return canvas.message('No scores')
    figure, axes = canvas.axes(5.2, 4.6)
    shares = {
        f'{_ADJECTIVES.get(kind, kind)} images': values
        for kind, values in histogram.items()
        if kind != 'edges'
    }
    name = "Score of the paper's detector"
    canvas.draw_shares(axes, np.array(histogram['edges']), shares, threshold=0, name=name)
    return figure


def evasion_figure(result: dict) -> 'Figure':
    """Draws the share of images that evades, from adaptive.json: by ε, and by each one's steps."""
    rows, detectors = result['rows'], list(result['false_alarms'])
    attacks, epsilons = (list(dict.fromkeys(row[k] for row in rows)) for k in ('attack', 'epsilon'))
    drawn = canvas.figure(5.2 * (1 + len(detectors)), 4.2)
    drawn.set_layout_engine('constrained')
    overview, *panels = drawn.subplots(1, 1 + len(detectors), sharey=True)
    for i, name in itertools.product(range(len(detectors)), attacks):
        found = [row for row in rows if (row['method'], row['attack']) == (detectors[i], name)]
        style = dict(color=f'C{i}', linestyle=':' if name == 'fgsm' else '-', markersize=5)
        label = f'{tables.words(name)}, {tables.rounds(detectors[i])}'
        style |= dict(marker='xos^'[attacks.index(name)], label=canvas.shortened(label))
        overview.plot([r['epsilon'] for r in found], [r['evasion'] for r in found], **style)
    overview.set(xscale='log', ylim=(-0.02, 1.02), xlabel='ε', ylabel='share that evades')
    overview.set_xticks(epsilons, map(tables.epsilon, epsilons), fontsize=8)
    overview.minorticks_off()
    for row in (row for row in rows if row['by_step']):
        dashes = {'joint': '-', 'selective': '--'}.get(row['attack'], ':')
        style = dict(color=f'C{epsilons.index(row["epsilon"])}', linestyle=dashes)
        label = f'{tables.words(row["attack"])}, ε = {tables.epsilon(row["epsilon"])}'
        panels[detectors.index(row['method'])].plot(row['by_step'], label=label, **style)
    for panel, name in zip(panels, detectors, strict=True):
        panel.set_title(canvas.shortened(tables.rounds(name), 70), fontsize=9)
        panel.set_xlabel('steps')
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in (overview, *panels):
        if panel.lines:
            panel.legend(fontsize=7, frameon=False)
        panel.spines[['top', 'right']].set_visible(False)
    return drawn


def captions(config: config_lib.Config, map_mean: dict) -> dict[str, str]:
    """Returns the text below each figure, by file name."""
    window = config.occlusion
    fill = ', '.join(f'{v:g}' for v in window.fill) or "the training mean, drawn as the image's own"
    means = [map_mean.get(kind) for kind in _KINDS]
    darker = ''
    if None not in means:
        darker = ' Mean cell of all maps: correct {:.3f}, adversarial {:.3f}.'.format(*means)
    return {
        'roc.png': 'ROC curves on test images that nothing was fitted on, means over seeds and '
        "classes, weighted by the classes' adversarial maps; in brackets the AUROC, which is that "
        'of the tables over all maps.',
        'classes.png': 'Each class, by what the classifier predicts, on test images that nothing '
        'was fitted on; in brackets the correct and adversarial maps that judge, as means of the '
        'seeds.',
        'scores.png': 'Scores of test images that nothing was fitted on. Noise is random signs of '
        'the same ε: where it lies with the attacked images, noise is seen and no attack.',
        'fig1.png': 'Figure 1. Correctly classified images, and what they are mistaken for after '
        f'one FGSM step of ε = {tables.epsilon(config.attack.epsilon)}.',
        'fig2.png': f'Figure 2. A window of {window.size} pixels moves over the image by '
        f'{window.stride} (fill {fill}; grid {window.grid}). Each place gives one cell of the map '
        'on the right: the probability of the predicted class while the window is there.',
        'fig3.png': 'Figure 3. Maps of images of one class, and of attacked ones mistaken for it, '
        f'evenly spaced through each set. One colour scale: darker is lower.{darker}',
    }


def figure_class(maps: HeatmapSet, class_names: Sequence[str]) -> int:
    """Returns the class of Figure 3: Golf Ball, else that with most adversarial (or any) maps."""
    if 'Golf Ball' in class_names:
        return list(class_names).index('Golf Ball')
    attacked = maps.predicted[np.asarray(maps.is_adversarial, bool)]
    counted = attacked if len(attacked) else maps.predicted
    return int(np.bincount(counted, minlength=len(class_names)).argmax())


def _telling_cells(heatmap):
    """Returns up to four cells in reading order: the first, the last, the lowest, the middle."""
    last = heatmap.size - 1
    cells = [0, last, int(heatmap.argmin()), last // 2, last // 3, 2 * last // 3]
    return sorted(list(dict.fromkeys(cells))[:4])


def _number(panel, row, column, number):
    """Writes a number into a cell, legible on every colour."""
    from matplotlib import patheffects

    text = panel.text(column, row, number, color='white', fontsize=9, weight='bold')
    text.set(ha='center', va='center_baseline')
    text.set_path_effects([patheffects.withStroke(linewidth=2.2, foreground=canvas.INK)])
