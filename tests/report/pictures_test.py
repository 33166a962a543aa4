"""Pictures show the arrays they were given, and files are equal where figures are."""

import io
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn import metrics as sklearn_metrics

from occjax import occlusion
from occjax.report import canvas, figures, pictures
from tests.report.page_test import NAMES, make_maps

NAME = '$\\frac{$ ' + 'very long ' * 30  # no formula
PAPERS = dict(size=15, stride=5)


def random(*shape):
    return np.random.default_rng(0).random(shape)


def seen(figure):
    """Returns the pixels of a figure as a screen shows them, `[H, W, 3]` from 0 to 1."""
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3] / 255


def at_centres(figure, axes, shape):
    """Returns the colour at the centre of every pixel of an image of that shape, `[H, W, 3]`."""
    rows, columns = np.indices(shape)
    points = np.stack([columns.ravel(), rows.ravel()], axis=-1)
    x, y = axes.transData.transform(points).T.astype(int)
    pixels = seen(figure)
    return pixels[len(pixels) - 1 - y, x].reshape(*shape, 3)


def colours(values, cmap='inferno'):
    return matplotlib.colormaps[cmap](values)[..., :3]


def walked(animation):
    """Yields the animation's figure as it is in every frame."""
    animation._draw_was_started = True  # Else it warns that nobody watched.
    for frame in animation.new_frame_seq():
        animation._func(frame)
        yield animation._fig


@pytest.mark.parametrize(
    'shape, size, stride, grid',
    [
        ((32, 32), 15, 5, 'paper'),
        ((9, 14), 4, 3, 'floor'),
        ((9, 14), 4, 3, 'cover'),
        ((9, 14), (2, 5), (4, 3), 'paper'),  # rows between windows stay bare
        ((5, 5), 5, 1, 'floor'),
    ],
)
def test_a_pixel_has_the_mean_of_the_windows_that_cover_it(shape, size, stride, grid):
    (height, width), steps = np.broadcast_to(size, 2), np.broadcast_to(stride, 2)
    rows, columns = (
        occlusion.window_origins((side, side), size=int(s), stride=int(d), grid=grid)
        for side, s, d in zip(shape, (height, width), steps, strict=True)
    )
    rows, columns = np.unique(rows[:, 0]), np.unique(columns[:, 0])
    heatmap = random(len(rows), len(columns))
    covering = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for pixel in np.ndindex(height, width):
                place = (row + pixel[0], column + pixel[1])
                covering.setdefault(place, []).append(heatmap[i, j])
    expected = np.full(shape, np.nan)
    for place, cells in covering.items():
        expected[place] = np.mean(cells)
    windows = dict(size=size, stride=stride, grid=grid)
    np.testing.assert_allclose(pictures.spread(heatmap, shape, **windows), expected)
    constant = pictures.spread(np.full_like(heatmap, 0.3), shape, **windows)
    np.testing.assert_allclose(constant, np.where(np.isnan(expected), np.nan, 0.3))


def test_without_windows_the_map_is_stretched():
    heatmap = random(3, 2)
    expected = heatmap.repeat(4, 0).repeat(7, 1)
    np.testing.assert_array_equal(pictures.spread(heatmap, (12, 14)), expected)
    np.testing.assert_array_equal(pictures.spread(heatmap, (3, 2)), heatmap)


@pytest.mark.parametrize('channels', [1, 3])
def test_an_opaque_overlay_is_the_map_and_bare_pixels_are_the_image(channels):
    image, heatmap = random(32, 32, channels).astype(np.float32), random(4, 4)
    figure = pictures.overlay(image, heatmap, **PAPERS, alpha=1)
    values = pictures.spread(heatmap, (32, 32), **PAPERS)
    assert np.isnan(values).sum() == 32**2 - 30**2
    expected = np.where(np.isnan(values)[..., None], image, colours(values))
    found = at_centres(figure, figure.axes[0], (32, 32))
    np.testing.assert_allclose(found, expected, atol=2.5 / 255)


def test_a_transparent_overlay_has_no_colour_but_the_map_s():
    image, heatmap = random(8, 8, 3).astype(np.float32), random(2, 2)
    figure = pictures.overlay(image, heatmap, alpha=0.25)
    below = image.mean(-1, keepdims=True)
    expected = 0.25 * colours(pictures.spread(heatmap, (8, 8))) + 0.75 * below
    found = at_centres(figure, figure.axes[0], (8, 8))
    np.testing.assert_allclose(found, expected, atol=2.5 / 255)


def test_one_scale_whatever_the_map():
    for heatmap in (np.full((2, 2), 0.4), random(2, 2) / 10):
        figure = pictures.overlay(random(8, 8, 3), heatmap)
        assert figure.axes[0].get_images()[1].get_clim() == (0, 1)
        assert figure.axes[1].get_ylim() == (0, 1)
    figure = pictures.overlay(random(8, 8, 3), random(2, 2) - 1, limits=(-1, 1), cmap='PuOr')
    assert figure.axes[1].get_ylim() == (-1, 1)


def test_pictures_go_into_axes_of_a_figure_of_one_s_own():
    before = pyplot.get_fignums()
    kinds = np.arange(12) % 2
    draw_fns = [
        lambda ax: pictures.overlay(random(8, 8, 3), random(2, 2), title=NAME, ax=ax),
        lambda ax: pictures.roc({NAME: random(12)}, kinds, title=NAME, ax=ax),
        lambda ax: pictures.histogram({NAME: random(12)}, title=NAME, ax=ax),
    ]
    for draw_fn in draw_fns:
        own = draw_fn(None)
        assert pyplot.get_fignums() == before
        theirs, ax = pyplot.subplots()
        assert draw_fn(ax) is theirs and theirs.axes == [ax]
        assert ax.get_title().startswith('$\\frac{$ very') and own.axes[0].get_title()
        seen(theirs), seen(own)
        pyplot.close(theirs)


def test_a_walk_moves_the_square_and_fills_the_map():
    image, heatmap = random(9, 14, 3).astype(np.float32), random(2, 4)
    windows = dict(size=(4, 5), stride=(3, 3), grid='floor')
    shown = walked(pictures.walk(image, heatmap, **windows, fill=(0.1, 0.2, 0.3)))
    for cell, figure in enumerate(shown):
        row, column = np.unravel_index(cell, heatmap.shape)
        left, right, _ = figure.axes
        expected = image.copy()
        expected[3 * row : 3 * row + 4, 3 * column : 3 * column + 5] = (0.1, 0.2, 0.3)
        np.testing.assert_allclose(left.get_images()[0].get_array(), expected)
        (square,) = left.patches
        assert square.get_bbox().bounds == (3 * column - 0.5, 3 * row - 0.5, 5, 4)
        known = np.ma.filled(right.get_images()[0].get_array(), np.nan).ravel()
        np.testing.assert_array_equal(known[: cell + 1], heatmap.ravel()[: cell + 1])
        assert np.isnan(known[cell + 1 :]).all()
        assert right.texts[0].get_text().endswith(f'= {heatmap[row, column]:.2f}')
    assert cell == heatmap.size - 1
    found = at_centres(figure, right, heatmap.shape)
    np.testing.assert_allclose(found, colours(heatmap), atol=1.5 / 255)


@pytest.mark.parametrize('every, count', [(1, 8), (3, 3), (4, 2), (99, 1)])
def test_a_walk_in_strides_ends_with_the_whole_map(every, count):
    heatmap = random(2, 4)
    shown = [
        np.ma.count(figure.axes[1].get_images()[0].get_array())
        for figure in walked(
            pictures.walk(random(9, 14, 1), heatmap, size=4, stride=3, grid='floor', every=every)
        )
    ]
    assert len(shown) == count and shown[-1] == heatmap.size and shown[0] == min(every, 8)


@pytest.mark.parametrize('name', ['walk.gif', 'walk.webp'])
def test_a_walk_is_saved_with_a_frame_a_window_and_runs_for_ever(tmp_path, name):
    heatmap = np.full((2, 2), 0.5)
    animation = pictures.walk(random(8, 8, 3), heatmap, size=4, stride=2, class_name=NAME)
    animation.save(tmp_path / name, writer='pillow', dpi=50)
    with Image.open(tmp_path / name) as saved:
        assert (saved.n_frames, saved.info['loop']) == (4, 0)


def test_a_gallery_keeps_the_kinds_apart_and_draws_the_first_and_the_last():
    maps, kinds = random(40, 3, 2), np.arange(40) % 4 == 1
    figure = pictures.gallery(maps, kinds, class_name=NAME)
    *panels, _ = figure.axes
    assert len(panels) == 16 + 10
    sides = ([], [])
    for panel in panels:
        (drawn,) = panel.get_images()
        (number,) = np.flatnonzero((maps == drawn.get_array()).all((1, 2)))
        sides[int(panel.get_position().x0 > 0.46)].append(number)
    assert not kinds[sides[0]].any() and kinds[sides[1]].all()
    assert sides[0] == sorted(sides[0]) and (sides[0][0], sides[0][-1]) == (0, 39)
    assert sides[1] == list(np.flatnonzero(kinds))
    heads = [text.get_text() for text in figure.texts]
    assert heads[0].endswith('… (30 maps)') and heads[1].endswith('… (10 maps)')
    seen(figure)


def test_figure_3_is_a_gallery_of_one_class_with_all_its_maps_counted():
    maps = make_maps(300)
    here = maps.predicted == figures.figure_class(maps, NAMES)
    few = maps.select(here)
    name = NAMES[figures.figure_class(maps, NAMES)]
    expected = pictures.gallery(few.maps, few.is_adversarial, class_name=name)
    found = figures.maps_figure(maps, class_names=NAMES)
    assert canvas.encode(found, 'png') == canvas.encode(expected, 'png')


def test_the_area_of_a_curve_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    kinds = rng.random(200) < 0.3
    scores = {f'name {i}': np.round(rng.normal(size=200) + i * kinds, 1 + i % 2) for i in range(6)}
    figure = pictures.roc(scores, kinds)
    chance, *lines = figure.axes[0].lines
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    for line, label, (name, values) in zip(lines, labels, scores.items(), strict=True):
        expected = sklearn_metrics.roc_auc_score(kinds, values)
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(expected)
        assert label == f'{name} ({expected:.2f})'
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6
    alone = pictures.roc(scores['name 3'], kinds).axes[0].lines[1]
    np.testing.assert_array_equal(alone.get_xydata(), lines[3].get_xydata())


def test_a_histogram_has_every_kind_s_shares_and_the_threshold():
    scores = {'clean': random(50), 'attacked': random(20) + 0.5, 'constant': np.full(3, 0.7)}
    figure = pictures.histogram(scores, bins=10, threshold=0.25)
    drawn = [patch.get_data() for patch in figure.axes[0].patches[::2]]
    for (values, edges, _), kind in zip(drawn, scores.values(), strict=True):
        assert len(values) == 10 and values.sum() == pytest.approx(1)
        inner = np.clip(kind, edges[0], edges[-1])
        np.testing.assert_allclose(values * len(kind), np.histogram(inner, edges)[0])
    (line,) = figure.axes[0].lines
    assert set(line.get_xdata()) == {0.25}
    seen(pictures.histogram({'all': np.ones(5)}))


@pytest.mark.parametrize('kind', ['png', 'svg', 'pdf', 'PNG'])
def test_equal_figures_are_equal_files(tmp_path, monkeypatch, kind):
    written = []
    for second in range(2):
        figure = pictures.overlay(random(8, 8, 3), random(2, 2), title=NAME)
        monkeypatch.setenv('SOURCE_DATE_EPOCH', str(10**9 + second))
        pictures.save(figure, str(tmp_path / f'{second}.{kind}'))
        written.append((tmp_path / f'{second}.{kind}').read_bytes())
    assert written[0] == written[1]
    assert b'Matplotlib' not in written[0]  # which would say its version
    if kind == 'svg':
        assert xml.etree.ElementTree.fromstring(written[0]).tag.endswith('svg')
    elif kind == 'pdf':
        assert written[0].startswith(b'%PDF') and b'Date' not in written[0]
    else:
        shown = Image.open(io.BytesIO(written[0]))
        assert not shown.info.keys() - {'dpi'}
        np.testing.assert_allclose(np.asarray(shown)[..., :3] / 255, seen(figure), atol=1e-6)


def test_other_names_of_files_are_refused(tmp_path):
    for name in ('picture.jpg', 'picture', '.png'):
        with pytest.raises(ValueError, match=r'one of \.png, \.svg, \.pdf, got'):
            pictures.save(canvas.figure(1, 1), tmp_path / name)
    assert not list(tmp_path.iterdir())


IMAGE, MAP, KINDS = np.full((32, 32, 3), 0.5), np.full((4, 4), 0.5), np.arange(6) % 2


@pytest.mark.parametrize(
    'draw_fn',
    [
        lambda: pictures.overlay(IMAGE[..., :2], MAP),
        lambda: pictures.overlay(IMAGE[..., 0], MAP),
        lambda: pictures.overlay(IMAGE * 255, MAP),
        lambda: pictures.overlay(IMAGE.astype(int), MAP),
        lambda: pictures.overlay(IMAGE, MAP[None]),
        lambda: pictures.overlay(IMAGE, MAP[:0]),
        lambda: pictures.overlay(IMAGE, MAP * 3),
        lambda: pictures.overlay(IMAGE, MAP * np.nan),
        lambda: pictures.overlay(IMAGE, MAP, size=15),
        lambda: pictures.overlay(IMAGE, MAP, size=(15, 15, 15), stride=5),
        lambda: pictures.overlay(IMAGE, MAP, size=15.5, stride=5),
        lambda: pictures.overlay(IMAGE, MAP, size=15, stride=4),
        lambda: pictures.spread(MAP, (32, 32, 3)),
        lambda: pictures.walk(IMAGE, MAP, **PAPERS, every=0),
        lambda: pictures.walk(IMAGE, MAP, **PAPERS, fill=(0, 1)),
        lambda: pictures.walk(IMAGE, MAP, size=15, stride=5, grid='other'),
        lambda: pictures.gallery(np.stack([MAP] * 6), KINDS[:5]),
        lambda: pictures.gallery(np.stack([MAP] * 6), KINDS + 1),
        lambda: pictures.roc(KINDS + np.inf, KINDS),
        lambda: pictures.roc(KINDS, KINDS * 0),
        lambda: pictures.roc({'a': KINDS, 'b': KINDS[1:]}, KINDS),
        lambda: pictures.histogram({}),
        lambda: pictures.histogram({'clean': []}),
    ],
)
def test_what_makes_no_picture_is_refused(draw_fn):
    with pytest.raises(ValueError, match='^Expected .*got .*'):
        draw_fn()


def test_a_matplotlibrc_changes_none_of_our_figures():
    import matplotlib

    from occjax.report import canvas

    with matplotlib.rc_context({'text.usetex': True, 'font.size': 30, 'axes.facecolor': 'red'}):
        canvas.own_settings()
        assert not matplotlib.rcParams['text.usetex']
        figure, axes = canvas.axes(2, 1)
        axes.set_title('50 % of $x_1')
        assert axes.get_facecolor() == (1, 1, 1, 1)
        canvas.encode(figure, 'png')
