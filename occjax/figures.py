"""The paper's Figures 1 to 3, drawn from finished arrays; matplotlib is imported when needed.

Every heatmap in every figure has one colour scale, 0 to 1, and brighter is higher, so that
"darker" means a lower probability in all of them.

Dimensions: H W C image, h w heatmap grid, M maps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from occjax import config as config_lib
from occjax import occlusion
from occjax.types import HeatmapSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _MUTED, _WRONG, _ACCENT = '#1c2330', '#5b6675', '#b3261e', '#00a3ff'
_COLOURS = {'cmap': 'inferno', 'vmin': 0.0, 'vmax': 1.0}
_SCALE = 'P(predicted class) with the window covered'


class Example(NamedTuple):
    """One image before and after the attack; `predicted` is `label` if the attack failed."""

    clean: np.ndarray  # f32[H, W, C]
    adversarial: np.ndarray  # f32[H, W, C]
    label: int  # the class of the clean image, correctly predicted
    predicted: int  # what the adversarial one is taken for
    clean_map: np.ndarray  # f32[h, w]
    adversarial_map: np.ndarray  # f32[h, w]


def attack_figure(
    examples: Sequence[Example], *, class_names: Sequence[str], epsilon: float
) -> 'Figure':
    """Draws Figure 1: up to four images, each above its attacked twin, with both predictions."""
    examples = examples[:4]
    if not examples:
        return _message('No successful attack')
    # A single pair stands side by side as in the paper, several stand in columns.
    rows, columns = (1, 2) if len(examples) == 1 else (2, len(examples))
    figure = _figure(2.6 * columns, 3.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(2, len(examples))
    for example, (above, below) in zip(examples, axes.T, strict=True):
        _draw_image(above, example.clean)
        _title(above, 'Clean, classified as', class_names[example.label])
        _draw_image(below, example.adversarial)
        failed = example.predicted == example.label
        head = 'no successful attack, still' if failed else 'classified as'
        colour = _INK if failed else _WRONG
        _title(below, f'FGSM, ε = {epsilon:g}, {head}', class_names[example.predicted], colour)
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
    figure = _figure(2.1 * (len(shown) + 1.3), 2.55 * len(pairs))
    widths = [1] * len(shown) + [1.08]
    axes = figure.subplots(len(pairs), len(widths), squeeze=False, width_ratios=widths)
    for (kind, image, heatmap, k), (*panels, last) in zip(pairs, axes, strict=True):
        fill = np.asarray(config.fill or image.mean((0, 1)), np.float32)
        for number, (panel, cell) in enumerate(zip(panels, shown, strict=True), 1):
            covered = occlusion.occlude(image, origins[cell], size=config.size, fill=fill)
            _draw_image(panel, np.asarray(covered))
            _outline(panel, origins[cell] - 0.5, config.size)
            p = heatmap.flat[cell]
            _title(panel, f'{kind}, window {number}', f'P({class_names[k]}) = {p:.2f}')
        drawn = _draw_map(last, heatmap)
        _title(last, f'{kind}, all {heatmap.size:,} windows', f'P({class_names[k]})')
        for number, cell in enumerate(shown, 1):
            row, column = np.unravel_index(cell, heatmap.shape)
            _outline(last, (row - 0.5, column - 0.5), 1)
            last.text(column, row, number, color=_ACCENT, weight='bold', ha='center', va='center')
        last.set(xlabel='column', ylabel='row', xticks=_ends(heatmap, 1), yticks=_ends(heatmap, 0))
    _colour_bar(figure, drawn, ax=list(axes[:, -1]), shrink=0.9, pad=0.08)
    return figure


def maps_figure(
    maps: HeatmapSet, *, class_names: Sequence[str], class_index: int | None = None
) -> 'Figure':
    """Draws Figure 3: maps of one class, correct ones on the left, adversarial on the right.

    The maps stand evenly spaced through their set: nobody chose them. Where `class_index` is
    None the class is the paper's Golf Ball, or else the one with the most adversarial maps.
    """
    k = figure_class(maps, class_names) if class_index is None else class_index
    sets = [
        np.flatnonzero((maps.predicted == k) & (maps.is_adversarial == kind)) for kind in (0, 1)
    ]
    side = 4 if max(map(len, sets)) > 9 else 3
    figure = _figure(10, 4.9)
    *halves, margin = figure.subfigures(1, 3, wspace=0.02, width_ratios=(1, 1, 0.14))
    heads = ('Correctly classified as', 'Adversarial, classified as')
    drawn = None
    for half, head, kind, index in zip(
        halves, heads, ('correct', 'adversarial'), sets, strict=True
    ):
        noun = 'map' if len(index) == 1 else 'maps'
        title = f'{head} {class_names[k]} ({len(index):,} {noun})'
        half.suptitle(title, fontsize=11, color=_INK, weight='bold')
        axes = half.subplots(side, side, squeeze=False).ravel()
        for panel in axes:
            panel.set_axis_off()
        if not len(index):
            half.text(0.5, 0.47, f'no {kind} maps', color=_MUTED, fontsize=12, ha='center')
            continue
        chosen = index[np.linspace(0, len(index) - 1, min(side**2, len(index))).astype(int)]
        # The probabilities of the whole set would be computed for these few.
        for panel, heatmap in zip(axes, maps.select(chosen).maps, strict=False):
            drawn = _draw_map(panel, heatmap)
            panel.set_axis_off()
    if drawn is not None:
        _colour_bar(figure, drawn, cax=margin.add_axes((0.05, 0.12, 0.2, 0.7)))
    return figure


def captions(config: config_lib.Config, map_mean: dict) -> dict[str, str]:
    """Returns what stands below each figure, by file name."""
    window = config.occlusion
    fill = ', '.join(f'{v:g}' for v in window.fill) or "the training mean, drawn as the image's own"
    means = [map_mean.get(kind) for kind in ('correct', 'adversarial')]
    darker = ''
    if None not in means:
        darker = ' Mean cell of all maps: correct {:.3f}, adversarial {:.3f}.'.format(*means)
    return {
        'fig1.png': 'Figure 1. Correctly classified images, and what they are taken for after one '
        f'FGSM step of ε = {config.attack.epsilon:g}.',
        'fig2.png': f'Figure 2. A window of {window.size} pixels moves over the image by '
        f'{window.stride} (fill {fill}; grid {window.grid}). Each place gives one cell of the map '
        'on the right: the probability of the predicted class while the window is there.',
        'fig3.png': 'Figure 3. Maps of images that are of one class, and of attacked images taken '
        f'for it, evenly spaced through each set. One colour scale: darker is lower.{darker}',
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


def _figure(width, height):
    """Returns an empty figure of that size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    return figure


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


def _title(panel, head, verdict, colour=_INK):
    """Puts two lines above a panel: what it is, and in bold what the classifier says."""
    panel.set_title(verdict, fontsize=10, color=colour, weight='bold', pad=4)
    panel.annotate(
        head,
        (0.5, 1),
        (0, 19),
        xycoords='axes fraction',
        textcoords='offset points',
        ha='center',
        fontsize=8.5,
        color=_MUTED,
    )


def _ends(heatmap, axis):
    """Returns the first and last cell of an axis as ticks."""
    return sorted({0, heatmap.shape[axis] - 1})


def _colour_bar(figure, drawn, **place):
    """Adds the one colour bar of all maps."""
    bar = figure.colorbar(drawn, ticks=[0, 0.25, 0.5, 0.75, 1], **place)
    bar.set_label(_SCALE, fontsize=8.5, color=_MUTED)
    bar.ax.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)
