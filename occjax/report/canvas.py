"""What all pictures share: colours, panels in inches, text that fits, and a figure's bytes.

Every heatmap has one colour scale, 0 to 1, and brighter is higher, so that "darker" means a lower
probability in all of them. Matplotlib is imported where it draws, not before.

Dimensions: H W C image, h w heatmap grid.
"""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, WRONG, ACCENT, PALE = '#1c2330', '#5b6675', '#b3261e', '#00a3ff', '#b9c0ca'
SERIES = ('#0b63b5', '#d1495b', '#6b8f2a', '#7a5195')  # told apart without red and green
COLOURS = {'cmap': 'inferno', 'vmin': 0.0, 'vmax': 1.0}
SCALE = 'P(predicted class), window covered'
BARE = '#eef1f5'  # where there is no value; no colour of the scale
GAP, HEAD = 0.14, 0.5  # inches between panels, and above one for its title
# What would make two files of one figure differ: dates, and the version of who wrote them.
FORMATS = {
    'png': {'Software': None},
    'svg': {'Date': None, 'Creator': None},
    'pdf': {'CreationDate': None, 'Creator': None, 'Producer': None},
}


# Fonts of scripts that the default one lacks, where they are installed.
_SCRIPTS = ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'WenQuanYi Zen Hei', 'Arial Unicode MS')


def own_settings():
    """Makes the figures of this process the same whatever a matplotlibrc says."""
    import matplotlib
    from matplotlib import font_manager

    matplotlib.rcdefaults()
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in _SCRIPTS if name in installed]
    matplotlib.rcParams['font.family'] = ['DejaVu Sans', *fonts]


def encode(figure: 'Figure', kind: str) -> bytes:
    """Returns a figure as a file of one of `FORMATS`; the same bytes every time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({'svg.hashsalt': 'occjax'}):  # Else identifiers in SVG are random.
        figure.savefig(buffer, format=kind, metadata=FORMATS[kind])
    return buffer.getvalue()


def figure(width, height):
    """Returns an empty figure of that size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=120, facecolor='white')
    FigureCanvasAgg(figure)
    return figure


def row(width, height, widths):
    """Returns a figure of that size in inches, and panels side by side, in these proportions."""
    drawn = figure(width, height)
    drawn.set_layout_engine('constrained')
    panels = drawn.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for panel in panels:
        panel.spines[['top', 'right']].set_visible(False)
        panel.tick_params(labelsize=9, colors=MUTED)
    return drawn, panels


def axes(width, height):
    """Returns a figure of that size in inches, and its only panel."""
    drawn, (panel,) = row(width, height, [1])
    return drawn, panel


def panel(figure, left, top, width, height=None):
    """Returns new axes whose corner is `left` and `top` inches from the figure's top left one."""
    across, down = figure.get_size_inches()
    height = width if height is None else height
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def width(panel):
    """Returns a panel's width in inches."""
    return panel.get_position().width * panel.figure.get_figwidth()


def message(text):
    """Returns a figure that says why there is nothing to see."""
    drawn = figure(5, 1.6)
    drawn.text(0.5, 0.5, text, color=MUTED, fontsize=14, ha='center', va='center')
    return drawn


def pixels(image):
    """Returns what is seen of [H, W, C] pixels; other than three channels become one grey."""
    return np.clip(image, 0, 1) if image.shape[-1] == 3 else image.mean(-1)


def draw_image(panel, image):
    """Draws [H, W, C] pixels, without ticks."""
    drawn = panel.imshow(pixels(image), cmap='gray', vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color('#c8ced6')
    return drawn


def draw_map(panel, heatmap, **style):
    """Draws [h, w] probabilities, row 0 at the top as in the image, on the scale of all maps."""
    style = COLOURS | style
    return panel.imshow(heatmap, interpolation='nearest', origin='upper', **style)


def tick_cells(panel, heatmap):
    """Numbers the first and the last row and column of a drawn map."""
    rows, columns = (sorted({0, cells - 1}) for cells in heatmap.shape)
    panel.set(xticks=columns, yticks=rows)
    panel.set_xlabel('column', fontsize=8.5, color=MUTED, labelpad=1)
    panel.set_ylabel('row', fontsize=8.5, color=MUTED, labelpad=1)
    panel.tick_params(labelsize=8, colors=MUTED)


def outline(panel, origin, shape):
    """Frames the rectangle whose top-left corner is `origin` (row, column)."""
    from matplotlib.patches import Rectangle

    (row, column), (height, width) = origin, shape
    frame = Rectangle((column, row), width, height, fill=False, edgecolor=ACCENT, lw=1.8)
    return panel.add_patch(frame)


def title(panel, head, verdict, colour=INK):
    """Puts two lines above a panel: what it is, and in bold what the classifier says."""
    panel.set_title(head, fontsize=8.5, color=MUTED, pad=19)
    text, size = fitted(verdict, width(panel))
    style = {'ha': 'center', 'color': colour, 'weight': 'bold', 'parse_math': False}
    style |= {'xycoords': 'axes fraction', 'textcoords': 'offset points'}
    return panel.annotate(text, (0.5, 1), (0, 5), fontsize=size, **style)


def fitted(text: str, inches: float) -> tuple[str, float]:
    """Returns bold text about so wide and its font size, 5 to 10.5; what is too long is cut."""
    most = max(1, int(21 * inches))
    text = shortened(text, most)
    return text, max(5, min(10.5, 105 * inches / max(1, len(text))))


def shortened(text: str, most: int = 40) -> str:
    """Returns text of at most so many characters."""
    return text if len(text) <= most else f'{text[: most - 1]}…'


def colour_bar(figure, drawn, left, top, height, label=SCALE):
    """Adds the one colour bar of all maps."""
    place = panel(figure, left, top, 0.14, height)
    bar = figure.colorbar(drawn, cax=place, ticks=np.linspace(*drawn.get_clim(), 5))
    bar.solids.set_alpha(1)  # Drawn maps may be transparent; their scale is not.
    text, size = fitted(label, 1.1 * figure.get_figheight())  # Not bold, so a bit narrower.
    bar.set_label(text, fontsize=min(8.5, size), color=MUTED, parse_math=False)
    place.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)


def draw_curves(panel, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], areas=None):
    """Draws ROC curves `(fpr, tpr)` by the names of what scores, with the area below each.

    `areas` are those of curves of which only some points are at hand.
    """
    panel.plot([0, 1], [0, 1], color=PALE, linewidth=1, linestyle='--')
    for style, (name, (fpr, tpr)) in zip(_styles(len(curves)), curves.items(), strict=True):
        area = areas[name] if areas else np.trapezoid(tpr, fpr)
        label = f'{shortened(name)} ({area:.2f})'
        panel.plot(fpr, tpr, label=label, linewidth=2, **style)
    panel.set(xlim=(0, 1), ylim=(0, 1.01), xlabel='Share of clean images flagged')
    panel.set_ylabel('Share of attacked images flagged')
    _legend(panel, 'lower right')


def draw_shares(panel, edges, shares: Mapping[str, np.ndarray], *, threshold=None, name='Score'):
    """Draws each kind's share of scores between `edges`, and a line at `threshold`."""
    for style, (kind, values) in zip(_styles(len(shares)), shares.items(), strict=True):
        panel.stairs(values, edges, label=shortened(kind), linewidth=2, **style)
        panel.stairs(values, edges, color=style['color'], alpha=0.15, fill=True)
    if threshold is not None:
        panel.axvline(threshold, color=MUTED, linewidth=0.8, linestyle='--')
        name = f'{name} (above {threshold:.3g}: flagged)'
    panel.set(xlabel=name, ylabel='Share of images')
    _legend(panel, 'best')


def _styles(count):
    """Returns how to draw so many lines that none looks like another."""
    dashes = ('-', '--', '-.', ':')
    return [
        {'color': SERIES[i % len(SERIES)], 'linestyle': dashes[i // len(SERIES) % len(dashes)]}
        for i in range(count)
    ]


def _legend(panel, place):
    """Adds a legend that takes names as they are."""
    for text in panel.legend(fontsize=9, frameon=False, loc=place).get_texts():
        text.set_parse_math(False)
