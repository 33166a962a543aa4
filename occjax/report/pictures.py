"""Pictures of arrays: a heatmap over its image, the occluder's walk, maps, curves and scores.

Arrays in, a Matplotlib `Figure` out, which pyplot does not know; `ax=` draws into axes of yours and
returns their figure. Maps have one colour scale, 0 to 1, which those see too who see no red or no
green; brighter is higher. Names are taken as they are, `$` and all. Only `save` writes a file.

Images are floats in [0, 1] with one channel or three; arrays are NumPy's or JAX's.

Dimensions: H W C image, h w heatmap grid, M maps.
"""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from occjax import checks, fills, occlusion
from occjax.fills import Fill
from occjax.occlusion import Sides
from occjax.report import canvas
from occjax.report.canvas import GAP, HEAD
from occjax.types import Array

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spread(
    heatmap: Array,
    image_shape: tuple[int, int],
    *,
    size: Sides | None = None,
    stride: Sides | None = None,
    grid: str = 'paper',
) -> np.ndarray:
    """Returns what a heatmap says of every pixel: what `overlay` lays over the image.

    Args:
        heatmap: `[h, w]`, any finite numbers.
        image_shape: `(H, W)`.
        size, stride, grid: of the windows, see `occjax.occluded_logits`; `size` and `stride` may be
            `(down, across)`. Without them the map is stretched over the image.

    Returns:
        `f64[H, W]`, the mean of the cells whose windows cover a pixel, NaN where none does; or,
        stretched, the cell that lies there.

    Raises:
        ValueError: if the windows do not make such a map, or one of `size` and `stride` is missing.

    >>> spread([[0.25, 0.75]], (2, 5), size=2, stride=2, grid='floor')
    array([[0.25, 0.25, 0.75, 0.75,  nan],
           [0.25, 0.25, 0.75, 0.75,  nan]])
    """
    heatmap = _numbers('a heatmap [h, w]', heatmap, 2)
    if len(image_shape) != 2 or not heatmap.size:
        found = f'{tuple(image_shape)} and {heatmap.shape}'
        raise ValueError(f'Expected image_shape (H, W) and a heatmap with cells, got {found}.')
    if size is None and stride is None:
        down, across = (
            (2 * np.arange(side) + 1) * cells // (2 * side)
            for side, cells in zip(image_shape, heatmap.shape, strict=True)
        )
        return heatmap[np.ix_(down, across)]
    down, across = _covers(image_shape, heatmap.shape, size=size, stride=stride, grid=grid)
    count = np.outer(down.sum(0), across.sum(0))
    total = down.T.astype(float) @ heatmap @ across
    return np.divide(total, count, where=count > 0, out=np.full(count.shape, np.nan))


def overlay(
    image: Array,
    heatmap: Array,
    *,
    size: Sides | None = None,
    stride: Sides | None = None,
    grid: str = 'paper',
    alpha: float = 0.6,
    limits: tuple[float, float] = (0.0, 1.0),
    cmap: str = 'inferno',
    label: str = canvas.SCALE,
    title: str | None = None,
    ax: 'Axes | None' = None,
) -> 'Figure':
    """Lays a heatmap over its image, which is grey below it, so that colour is the map's alone.

    Pixels that no window covers stay as they are. A figure of its own has a colour bar; to axes of
    yours add one by `figure.colorbar(ax.images[-1])`.

    Args:
        image: `[H, W, C]`.
        heatmap: `[h, w]` in `limits`.
        size, stride, grid: of the windows, see `spread`.
        alpha: opacity of the map, from 0 to 1.
        limits: values of the colour map's ends. Of signed maps take `(-1, 1)` and `cmap='PuOr'`.
        cmap: Matplotlib's name of a colour map.
        label: beside the colour bar.
        title: above the picture.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: as `spread`, and if the image or the map is not what it should be.
    """
    image, heatmap = _image(image), _numbers('a heatmap [h, w]', heatmap, 2, limits)
    values = spread(heatmap, image.shape[:2], size=size, stride=stride, grid=grid)
    if ax is None:
        height, width = 3.4 * np.array(values.shape) / max(values.shape)
        head = GAP if title is None else HEAD - GAP
        figure = canvas.figure(GAP + width + 1, head + height + GAP)
        panel = canvas.panel(figure, GAP, head, width, height)
    else:
        figure, panel = ax.figure, ax
    grey = image.mean(-1, keepdims=True)
    canvas.draw_image(panel, np.where(np.isnan(values)[..., None], image, grey))
    low, high = limits
    drawn = canvas.draw_map(panel, values, alpha=alpha, cmap=cmap, vmin=low, vmax=high)
    if ax is None:
        canvas.colour_bar(figure, drawn, 2 * GAP + width, head, height, label)
    return _titled(figure, panel, title)


def walk(
    image: Array,
    heatmap: Array,
    *,
    size: Sides,
    stride: Sides,
    grid: str = 'paper',
    fill: Fill = 0.5,
    every: int = 1,
    class_name: str = 'predicted class',
) -> 'FuncAnimation':
    """Shows how a map is made: the square goes over the image, and cell after cell appears.

    A frame takes a tenth of a second; of many windows show one in `every`. The last frame shows the
    whole map. Save it with Pillow, as GIF or WebP by the file's name, and it runs in a loop:
    `walk(...).save('walk.webp', writer='pillow')`; in a notebook `HTML(walk(...).to_jshtml())`.

    Args:
        image: `[H, W, C]`.
        heatmap: `[h, w]` probabilities.
        size, stride, grid, fill: of the windows, see `spread` and `occjax.occluded_logits`.
        every: windows from one frame to the next.
        class_name: whose probability the map is.

    Raises:
        ValueError: as `overlay`, if `fill` does not fit the image, or `every` is below 1.
    """
    from matplotlib.animation import FuncAnimation

    if every < 1:
        raise ValueError(f'Expected every >= 1, got {every}.')
    image, heatmap = _image(image), _numbers('a heatmap [h, w]', heatmap, 2, (0, 1))
    covers = _covers(image.shape[:2], heatmap.shape, size=size, stride=stride, grid=grid)
    fill = np.asarray(fills.of(fill, image))
    figure, left, right = _pair(image, heatmap)
    shown, drawn = left.get_images()[0], right.get_images()[0]
    texts = [
        canvas.title(panel, head, '') for panel, head in ((left, 'The square'), (right, 'The map'))
    ]
    square, frame = (canvas.outline(panel, (0, 0), (1, 1)) for panel in (left, right))
    order, name = np.arange(heatmap.size).reshape(heatmap.shape), canvas.shortened(class_name, 30)

    def draw(cell):
        place = np.unravel_index(cell, heatmap.shape)
        down, across = (cover[i] for cover, i in zip(covers, place, strict=True))
        is_covered = np.outer(down, across)
        shown.set_data(canvas.pixels(np.where(is_covered[..., None], fill, image)))
        drawn.set_data(np.where(order <= cell, heatmap, np.nan))
        square.set_bounds(across.argmax() - 0.5, down.argmax() - 0.5, across.sum(), down.sum())
        frame.set_xy((place[1] - 0.5, place[0] - 0.5))
        said = f'Window {cell + 1} of {heatmap.size}', f'P({name}) = {heatmap[place]:.2f}'
        for text, words in zip(texts, said, strict=True):
            words, points = canvas.fitted(words, canvas.width(left))
            text.set(text=words, fontsize=points)

    last = heatmap.size - 1
    frames = [*range(every - 1, last, every), last]
    interval = max(40, min(400, 6000 // len(frames)))  # milliseconds
    return FuncAnimation(figure, draw, frames, interval=interval, cache_frame_data=False)


def gallery(
    maps: Array,
    is_adversarial: Array,
    *,
    class_name: str | None = None,
    counts: tuple[int, int] | None = None,
) -> 'Figure':
    """Draws maps side by side, of clean images on the left and of attacked ones on the right.

    Up to 16 of each kind, evenly spaced through their set: nobody chose them. Of one class give its
    maps alone, as in `gallery(maps[predicted == k], is_adversarial[predicted == k])`.

    Args:
        maps: `[M, h, w]` probabilities.
        is_adversarial: `bool[M]`.
        class_name: what all of them are classified as, for the titles.
        counts: how many there are of each kind, where `maps` are only some of them.

    Raises:
        ValueError: if the maps are no probabilities, or `is_adversarial` is not one for each.
    """
    maps = _numbers('maps [M, h, w]', maps, 3, (0, 1))
    is_adversarial = _kinds(is_adversarial, len(maps))
    sets = [np.flatnonzero(is_adversarial == kind) for kind in (False, True)]
    side = 4 if max(map(len, sets)) > 9 else 3
    whole, small = 4.2, 0.08
    figure = canvas.figure(2 * whole + 5 * GAP + 0.8, whole + HEAD + GAP)
    drawn = None
    heads = (('Correctly classified', 'correct'), ('Adversarial', 'adversarial'))
    for kind, (index, count) in enumerate(zip(sets, counts or map(len, sets), strict=True)):
        left, (head, noun) = GAP + kind * (whole + 2 * GAP), heads[kind]
        middle = (left + whole / 2) / figure.get_figwidth()
        if class_name is not None:
            head += f'{", classified" * kind} as {canvas.shortened(class_name)}'
        title, size = canvas.fitted(f'{head} ({count:,} map{"s" * (count != 1)})', whole)
        style = {'ha': 'center', 'va': 'center', 'parse_math': False}
        y = 1 - HEAD / 2 / figure.get_figheight()
        figure.text(middle, y, title, fontsize=size, color=canvas.INK, weight='bold', **style)
        if not len(index):
            figure.text(middle, 0.5, f'no {noun} maps', color=canvas.MUTED, fontsize=12, **style)
        pitch = (whole + small) / side
        for i, heatmap in enumerate(maps[evenly(index, side**2)]):
            place = (left + i % side * pitch, HEAD + i // side * pitch)
            panel = canvas.panel(figure, *place, pitch - small)
            drawn = canvas.draw_map(panel, heatmap)
            panel.set_axis_off()
    if drawn is not None:
        canvas.colour_bar(figure, drawn, 2 * whole + 4 * GAP, HEAD, whole)
    return figure


def evenly(index: np.ndarray, most: int = 16) -> np.ndarray:
    """Returns at most so many entries of an array, evenly spaced, the first and the last too.

    >>> evenly(np.arange(9), 3)
    array([0, 4, 8])
    """
    return index[np.linspace(0, len(index) - 1, min(most, len(index))).astype(int)]


def roc(
    scores: Array | Mapping[str, Array],
    is_adversarial: Array,
    *,
    title: str | None = None,
    ax: 'Axes | None' = None,
) -> 'Figure':
    """Draws the ROC curve of scores, or of several by their names, with the area below each.

    Args:
        scores: `[M]`, higher for more adversarial; or `{name: [M]}`.
        is_adversarial: `bool[M]`, the same images' for all.
        title: above the picture.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: if scores are not finite, not one for each image, or all of one kind.
    """
    from sklearn.metrics import roc_curve

    named = scores if isinstance(scores, Mapping) else {'Area': scores}
    named = {name: _numbers('scores [M]', values, 1) for name, values in named.items()}
    curves = {}
    for name, values in named.items():
        kinds = _kinds(is_adversarial, len(values))
        if kinds.all() or not kinds.any():
            found = f'{kinds.sum()} adversarial of {len(kinds)}'
            raise ValueError(f'Expected scores of both kinds, got {found}.')
        curves[str(name)] = roc_curve(kinds, values)[:2]
    figure, panel = canvas.axes(5.2, 4.6) if ax is None else (ax.figure, ax)
    canvas.draw_curves(panel, curves)
    return _titled(figure, panel, title)


def histogram(
    scores: Mapping[str, Array],
    *,
    bins: int = 30,
    threshold: float | None = None,
    title: str | None = None,
    ax: 'Axes | None' = None,
) -> 'Figure':
    """Draws how the scores of each kind of image are distributed, as shares of that kind.

    Args:
        scores: `{kind: [M]}`, as in `{'clean': ..., 'attacked': ...}`; M may differ.
        bins: how many, the same for all kinds. The outermost hold the first and the last hundredth
            of all scores, however far out, see `occjax.metrics.histogram`.
        threshold: where to draw a line.
        title: above the picture.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: if scores are not finite, or there are none.
    """
    from occjax import metrics  # Scikit-learn and SciPy, which take a second to import.

    named = {str(kind): _numbers('scores [M]', v, 1) for kind, v in scores.items()}
    found = metrics.histogram(named, bins=bins) if named else None
    if found is None:
        raise ValueError('Expected at least one score, got none.')
    figure, panel = canvas.axes(5.2, 4.6) if ax is None else (ax.figure, ax)
    shares = {kind: found[kind] for kind in named}
    canvas.draw_shares(panel, found['edges'], shares, threshold=threshold)
    return _titled(figure, panel, title)


def save(figure: 'Figure', path: str | pathlib.Path) -> None:
    """Writes a figure as PNG, SVG or PDF, by the name of the file; equal figures are equal files.

    Raises:
        ValueError: if the name ends otherwise.
    """
    path = pathlib.Path(path)
    kind = path.suffix[1:].lower()
    if kind not in canvas.FORMATS:
        names = ', '.join(f'.{name}' for name in canvas.FORMATS)
        raise ValueError(f'Expected a file name that ends in one of {names}, got {path.name!r}.')
    path.write_bytes(canvas.encode(figure, kind))


def _pair(image, heatmap):
    """Returns a figure of an image and its map, and their panels."""
    height, width = 2.6 * np.array(image.shape[:2]) / max(image.shape[:2])
    figure = canvas.figure(2 * width + 4 * GAP + 1.2, HEAD + height + 3 * GAP)
    left = canvas.panel(figure, GAP, HEAD, width, height)
    right = canvas.panel(figure, width + 4 * GAP, HEAD, width, height)
    canvas.draw_image(left, image)
    right.set_facecolor(canvas.BARE)
    drawn = canvas.draw_map(right, heatmap)
    canvas.tick_cells(right, heatmap)
    canvas.colour_bar(figure, drawn, 2 * width + 5 * GAP, HEAD, height)
    return figure, left, right


def _covers(image_shape, shape, *, size, stride, grid):
    """Returns which rows windows of each row of the map cover, `bool[h, H]`; columns alike."""
    if size is None or stride is None:
        raise ValueError(f'Expected both size and stride, got size={size}, stride={stride}.')
    origins = occlusion.window_origins(image_shape, size=size, stride=stride, grid=grid)
    covers = []
    for side, length, starts in zip(
        image_shape, checks.sides('size', size), origins.T, strict=True
    ):
        starts = np.unique(starts)[:, None]
        covers.append((starts <= np.arange(side)) & (np.arange(side) < starts + length))
    if (made := tuple(map(len, covers))) != tuple(shape):
        windows = f'size={size}, stride={stride}, grid={grid!r}'
        raise ValueError(f'Expected a heatmap {made}, as {windows} make it, got {tuple(shape)}.')
    return covers


def _image(image):
    """Returns `f32[H, W, C]` pixels."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f'Expected an image [H, W, 1 or 3], got shape {list(image.shape)}.')
    return np.asarray(checks.images(image[None])[0], np.float32)


def _numbers(what, values, ndim, limits=None):
    """Returns finite numbers of so many dimensions, within limits but for rounding."""
    values = np.asarray(values, np.float64)
    if values.ndim != ndim or not all(values.shape[1:]):
        raise ValueError(f'Expected {what}, got shape {list(values.shape)}.')
    least, most = limits or (-np.inf, np.inf)
    is_in = (values >= least - checks.ROUNDING) & (values <= most + checks.ROUNDING)
    if not np.all(is_in & np.isfinite(values)):
        span = f' from {least:g} to {most:g}' if limits else ''
        found = f'{values.min():g} to {values.max():g}'
        raise ValueError(f'Expected {what} of finite numbers{span}, got {found}.')
    return values


def _kinds(is_adversarial, count):
    """Returns `bool[M]`."""
    kinds = np.asarray(is_adversarial)
    if kinds.shape != (count,) or not np.isin(kinds, (0, 1)).all():
        raise ValueError(
            f'Expected is_adversarial to be {count} booleans, got {kinds.dtype}{list(kinds.shape)}.'
        )
    return kinds.astype(bool)


def _titled(figure, panel, title):
    """Returns the figure, with a title above its panel if there is one."""
    if title is not None:
        text, points = canvas.fitted(title, canvas.width(panel))
        style = {'color': canvas.INK, 'weight': 'bold', 'parse_math': False}
        panel.set_title(text, fontsize=points, **style)
    return figure
