"""What was found, and the paper's Figures 1 to 3, drawn from finished arrays.

Every heatmap in every figure has one colour scale, 0 to 1, and brighter is higher, so that
"darker" means a lower probability in all of them.

Dimensions: H W C image, h w heatmap grid, M maps.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from occjax import config as config_lib
from occjax import occlusion
from occjax.report import tables
from occjax.types import HeatmapSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _MUTED, _WRONG, _ACCENT = '#1c2330', '#5b6675', '#b3261e', '#00a3ff'
_SERIES = ('#0b63b5', '#d1495b', '#6b8f2a', '#7a5195')  # told apart without red and green
_KINDS = ('correct', 'adversarial')
_ADJECTIVES = {'noise': 'noisy'}
_COLOURS = {'cmap': 'inferno', 'vmin': 0.0, 'vmax': 1.0}
_SCALE = 'P(predicted class), window covered'
_GAP, _HEAD = 0.14, 0.5  # inches between panels, and above one for its title


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
        return _message('No successful attack')
    # A single pair is side by side as in the paper, several are in columns.
    rows, columns = (1, 2) if len(examples) == 1 else (2, len(examples))
    side = 2.5
    figure = _figure(columns * (side + _GAP) + _GAP, rows * (side + _HEAD) + _GAP)
    places = [
        (_GAP + column * (side + _GAP), _HEAD + row * (side + _HEAD))
        for row in range(rows)
        for column in range(columns)
    ]
    panels = [_panel(figure, *place, side) for place in places]
    for i, example in enumerate(examples):
        above, below = panels[i], panels[i + len(examples)]
        _draw_image(above, example.clean)
        _title(above, 'Clean, classified as', class_names[example.label])
        _draw_image(below, example.adversarial)
        failed = example.predicted == example.label
        head = 'no successful attack, still' if failed else 'classified as'
        colour = _INK if failed else _WRONG
        _title(
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
        return _message('No image to occlude')
    origins = occlusion.window_origins(
        example.clean.shape[:2], size=config.size, stride=config.stride, grid=config.grid
    )
    shown = _telling_cells(example.clean_map)
    pairs = [('Clean', example.clean, example.clean_map, example.label)]
    if example.predicted != example.label:
        pairs.append(('FGSM', example.adversarial, example.adversarial_map, example.predicted))
    side, foot = 1.8, 0.45
    width = (len(shown) + 1) * (side + _GAP) + 1.6
    figure = _figure(width, len(pairs) * (side + _HEAD + foot))
    for row, (kind, image, heatmap, k) in enumerate(pairs):
        top = _HEAD + row * (side + _HEAD + foot)
        fill = np.asarray(config.fill or image.mean((0, 1)), np.float32)
        for number, cell in enumerate(shown, 1):
            panel = _panel(figure, _GAP + (number - 1) * (side + _GAP), top, side)
            covered = occlusion.occlude(image, origins[cell], size=config.size, fill=fill)
            _draw_image(panel, np.asarray(covered))
            _outline(panel, origins[cell] - 0.5, config.size)
            p = heatmap.flat[cell]
            _title(panel, f'{kind}, window {number}', f'P({class_names[k]}) = {p:.2f}')
        last = _panel(figure, width - side - 1.05, top, side)
        drawn = _draw_map(last, heatmap)
        _title(last, '{}, map of {}×{} cells'.format(kind, *heatmap.shape), f'P({class_names[k]})')
        for number, cell in enumerate(shown, 1):
            row, column = np.unravel_index(cell, heatmap.shape)
            _outline(last, (row - 0.5, column - 0.5), 1)
            _number(last, row, column, number)
        last.set(xticks=_ends(heatmap, 1), yticks=_ends(heatmap, 0))
        last.set_xlabel('column', fontsize=8.5, color=_MUTED, labelpad=1)
        last.set_ylabel('row', fontsize=8.5, color=_MUTED, labelpad=1)
        last.tick_params(labelsize=8, colors=_MUTED)
    _colour_bar(figure, drawn, width - 0.9, _HEAD, top + side - _HEAD)
    return figure


def maps_figure(maps: HeatmapSet, *, class_names: Sequence[str]) -> 'Figure':
    """Draws Figure 3: maps of one class, correct ones on the left, adversarial on the right.

    The class is `figure_class`'s; its maps are evenly spaced through their set: nobody chose them.
    """
    k = figure_class(maps, class_names)
    sets = [
        np.flatnonzero((maps.predicted == k) & (maps.is_adversarial == kind)) for kind in (0, 1)
    ]
    side = 4 if max(map(len, sets)) > 9 else 3
    whole, small = 4.2, 0.08
    figure = _figure(2 * whole + 5 * _GAP + 0.8, whole + _HEAD + _GAP)
    heads = ('Correctly classified as', 'Adversarial, classified as')
    drawn = None
    for kind, (head, noun, index) in enumerate(zip(heads, _KINDS, sets, strict=True)):
        left = _GAP + kind * (whole + 2 * _GAP)
        middle = (left + whole / 2) / figure.get_figwidth()
        plural = 'map' if len(index) == 1 else 'maps'
        title = f'{head} {class_names[k]} ({len(index):,} {plural})'
        style = {'ha': 'center', 'va': 'center', 'parse_math': False}
        y = 1 - _HEAD / 2 / figure.get_figheight()
        size = _fitting(title, whole)
        figure.text(middle, y, title, fontsize=size, color=_INK, weight='bold', **style)
        if not len(index):
            figure.text(middle, 0.5, f'no {noun} maps', color=_MUTED, fontsize=12, **style)
            continue
        chosen = index[np.linspace(0, len(index) - 1, min(side**2, len(index))).astype(int)]
        pitch = (whole + small) / side
        # `maps.maps` would compute the probabilities of the whole set for these few.
        for i, heatmap in enumerate(maps.select(chosen).maps):
            row, column = divmod(i, side)
            place = (left + column * pitch, _HEAD + row * pitch)
            panel = _panel(figure, *place, pitch - small)
            drawn = _draw_map(panel, heatmap)
            panel.set_axis_off()
    if drawn is not None:
        _colour_bar(figure, drawn, 2 * whole + 4 * _GAP, _HEAD, whole)
    return figure


def roc_figure(curves: dict[str, dict | None]) -> 'Figure':
    """Draws the ROC curves of `judging.roc`, by the names of what scores."""
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return _message('No class has maps of both kinds')
    figure, axes = _axes(5.2, 4.6)
    axes.plot([0, 1], [0, 1], color='#b9c0ca', linewidth=1, linestyle='--')
    for colour, (name, curve) in zip(_SERIES, curves.items(), strict=False):
        area = np.trapezoid(curve['tpr'], curve['fpr'])
        label = f'{tables.words(name)} ({area:.2f})'
        axes.plot(curve['fpr'], curve['tpr'], color=colour, linewidth=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel='Share of clean images called adversarial')
    axes.set_ylabel('Share of attacked images called so')
    axes.legend(fontsize=9, frameon=False, loc='lower right')
    return figure


def classes_figure(detection: dict, class_names: Sequence[str]) -> 'Figure':
    """Draws each class's balanced accuracy with its 95 % interval, beside the paper's accuracy."""
    figure, axes = _axes(7.4, 0.42 * (len(class_names) + 1) + 1)
    labels = [*class_names, 'Overall']
    entries = [*(detection['per_class'].get(name) or {} for name in class_names)]
    entries.append(detection.get('overall') or {})
    places = -np.arange(len(labels))
    for place, entry in zip(places, entries, strict=True):
        ours, theirs = entry.get('balanced_accuracy'), entry.get('paper_accuracy')
        if ours is not None:
            low, high = (entry.get('interval') or {}).get('balanced_accuracy') or (ours, ours)
            reach = [[max(0, ours - low)], [max(0, high - ours)]]
            axes.barh(place + 0.18, ours, 0.34, color=_SERIES[0])
            axes.errorbar(ours, place + 0.18, xerr=reach, color=_INK, linewidth=1, capsize=2)
        if theirs is not None:
            axes.barh(place - 0.18, theirs, 0.34, color='#b9c0ca')
    axes.axvline(0.5, color=_MUTED, linewidth=0.8, linestyle='--')
    axes.set_yticks(places, labels, parse_math=False)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel('Balanced accuracy (ours, blue; bar: 95 %), accuracy (paper, grey)')
    return figure


def scores_figure(histogram: dict | None) -> 'Figure':
    """Draws how the paper's detector scores clean, attacked and noisy images."""
    if not histogram:
        return _message('No scores')
    figure, axes = _axes(5.2, 4.6)
    edges = np.array(histogram['edges'])
    for colour, (kind, shares) in zip(
        _SERIES, ((kind, v) for kind, v in histogram.items() if kind != 'edges'), strict=False
    ):
        axes.stairs(
            shares, edges, color=colour, linewidth=2, label=f'{_ADJECTIVES.get(kind, kind)} images'
        )
        axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)
    axes.axvline(0, color=_MUTED, linewidth=0.8, linestyle='--')
    axes.set(xlabel="Score of the paper's detector (above 0: called adversarial)")
    axes.set_ylabel('Share of images')
    axes.legend(fontsize=9, frameon=False)
    return figure


def captions(config: config_lib.Config, map_mean: dict) -> dict[str, str]:
    """Returns the text below each figure, by file name."""
    window = config.occlusion
    fill = ', '.join(f'{v:g}' for v in window.fill) or "the training mean, drawn as the image's own"
    means = [map_mean.get(kind) for kind in _KINDS]
    darker = ''
    if None not in means:
        darker = ' Mean cell of all maps: correct {:.3f}, adversarial {:.3f}.'.format(*means)
    return {
        'roc.png': 'ROC curves on test images that nothing was fitted on: means over classes and '
        'seeds; in brackets the area below.',
        'classes.png': 'Each class, by what the classifier predicts: ours on test images that '
        "nothing was fitted on, and the paper's accuracy on its own sets, where it gives one.",
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


def png(figure: 'Figure') -> bytes:
    """Returns a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def _figure(width, height):
    """Returns an empty figure of that size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=120, facecolor='white')
    FigureCanvasAgg(figure)
    return figure


def _axes(width, height):
    """Returns a figure of that size in inches, and its only panel."""
    figure = _figure(width, height)
    figure.set_layout_engine('constrained')
    axes = figure.add_subplot()
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=9, colors=_MUTED)
    return figure, axes


def _panel(figure, left, top, width, height=None):
    """Returns new axes whose corner is `left` and `top` inches from the figure's top left one."""
    across, down = figure.get_size_inches()
    height = width if height is None else height
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def _message(text):
    """Returns a figure that says why there is nothing to see."""
    figure = _figure(5, 1.6)
    figure.text(0.5, 0.5, text, color=_MUTED, fontsize=14, ha='center', va='center')
    return figure


def _draw_image(panel, image):
    """Draws [H, W, C] pixels; other than three channels become one grey."""
    if image.shape[-1] == 3:
        panel.imshow(np.clip(image, 0, 1))
    else:
        panel.imshow(image.mean(-1), cmap='gray', vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color('#c8ced6')


def _draw_map(panel, heatmap):
    """Draws [h, w] probabilities, row 0 at the top as in the image, on the scale of all maps."""
    return panel.imshow(heatmap, interpolation='nearest', origin='upper', **_COLOURS)


def _outline(panel, origin, size):
    """Frames the square whose top-left corner is `origin` (row, column)."""
    from matplotlib.patches import Rectangle

    row, column = origin
    panel.add_patch(Rectangle((column, row), size, size, fill=False, edgecolor=_ACCENT, lw=1.8))


def _number(panel, row, column, number):
    """Writes a number into a cell, legible on every colour."""
    from matplotlib import patheffects

    text = panel.text(column, row, number, color='white', fontsize=9, weight='bold')
    text.set(ha='center', va='center_baseline')
    text.set_path_effects([patheffects.withStroke(linewidth=2.2, foreground=_INK)])


def _title(panel, head, verdict, colour=_INK):
    """Puts two lines above a panel: what it is, and in bold what the classifier says."""
    panel.set_title(head, fontsize=8.5, color=_MUTED, pad=19)
    panel.annotate(
        verdict,
        (0.5, 1),
        (0, 5),
        xycoords='axes fraction',
        textcoords='offset points',
        ha='center',
        fontsize=_fitting(verdict, panel.get_position().width * panel.figure.get_figwidth()),
        color=colour,
        weight='bold',
        parse_math=False,
    )


def _fitting(text, inches):
    """Returns the font size in which bold text is about so wide, at most 10.5."""
    return max(5, min(10.5, 105 * inches / len(text)))


def _ends(heatmap, axis):
    """Returns the first and last cell of an axis as ticks."""
    return sorted({0, heatmap.shape[axis] - 1})


def _colour_bar(figure, drawn, left, top, height):
    """Adds the one colour bar of all maps."""
    panel = _panel(figure, left, top, 0.14, height)
    bar = figure.colorbar(drawn, cax=panel, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label(_SCALE, fontsize=8.5, color=_MUTED)
    panel.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)
