"""Laws of saliencies and of their scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occjax
from occjax import attribution, fills

SHAPE = (6, 5, 2)
WEIGHTS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(size=(3, *SHAPE)).astype(np.float32)
CLASSES = np.array([2, 0, 1])
KEY = jax.random.key(0)
SALIENCY = np.random.default_rng(2).normal(size=(3, 6, 5)).astype(np.float32)


def logits_fn(images):
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)


def constant_fn(images):
    return jnp.broadcast_to(jnp.log(jnp.array([0.2, 0.5, 0.3])), (len(images), 3))


def probabilities(images, classes):
    """In NumPy."""
    odds = np.exp(np.tanh(np.asarray(images, np.float64).reshape(len(images), -1) @ WEIGHTS))
    return odds[np.arange(len(images)), classes] / odds.sum(-1)


# --- RISE. ----------------------------------------------------------------------------------------

CELLS, KEEP = (2, 3), 0.7  # of three rows and two columns of pixels


def line(cells, side, shift):
    """Returns what one shown cell of a row makes of each pixel, `[side, cells]`."""
    size = -(-side // cells)
    place = (np.arange(shift, shift + side) + 0.5) * cells / ((cells + 1) * size) - 0.5
    return np.stack([np.interp(place, range(cells), one) for one in np.eye(cells)], axis=-1)


@functools.cache
def every_mask(image_shape=SHAPE[:2], cells=CELLS):
    """Returns all masks that there are, `[M, H, W]`, and how probable each is."""
    masks, chances = [], []
    shifts = [range(-(-side // n)) for side, n in zip(image_shape, cells, strict=True)]
    for by in itertools.product(*shifts):
        rows, columns = (line(*each) for each in zip(cells, image_shape, by, strict=True))
        for grid in itertools.product([0, 1], repeat=rows.shape[1] * columns.shape[1]):
            masks.append(rows @ np.reshape(grid, cells) @ columns.T)
            chances.append(np.prod(np.where(grid, KEEP, 1 - KEEP)))
    return np.stack(masks), np.array(chances) / sum(chances)


@functools.cache
def drawn(image_shape=SHAPE[:2], cells=CELLS, count=1200):
    """Returns the masks that a classifier sees on a white image."""
    seen = []

    def host(images):
        seen.extend(np.array(images)[..., 0])
        return np.zeros((len(images), 2), np.float32)

    def foreign(images):
        shape = jax.ShapeDtypeStruct((len(images), 2), np.float32)
        return jax.pure_callback(host, shape, images)

    settings = dict(key=KEY, masks=count, cells=cells, keep=KEEP, chunk_size=200)
    white = np.ones((1, *image_shape, 1), np.float32)
    attribution.rise(foreign, white, np.zeros(1, int), **settings).block_until_ready()
    return np.stack(seen)


@pytest.mark.parametrize(('image_shape', 'cells'), [((6, 5), (2, 3)), ((4, 4), (2, 2))])
def test_masks_are_small_grids_magnified_and_shifted(image_shape, cells):
    """All of them, and as often as they should be; both shifts are drawn alone."""
    masks, chances = every_mask(image_shape, cells)
    distances = np.abs(drawn(image_shape, cells)[:, None] - masks).max(axis=(2, 3))
    assert distances.min(axis=1).max() < 1e-6
    # Some shifts make the same of two grids: those are counted as the first one.
    same = np.abs(masks[:, None] - masks).max(axis=(2, 3)).argmin(axis=1)
    found = np.bincount(distances.argmin(axis=1), minlength=len(masks))
    expected = len(distances) * np.bincount(same, chances, minlength=len(masks))
    assert not found[expected == 0].any()
    chi2 = ((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = (expected > 0).sum() - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize('fill', [0.0, [0.2, 0.9], 'mean'])
@pytest.mark.parametrize('chunk_size', [200, 7, None])
def test_rise_is_a_naive_loop(fill, chunk_size):
    covers = np.asarray(fills.of(fill if fill == 'mean' else np.array(fill), IMAGES))
    expected = np.zeros((3, 6, 5))
    for mask in drawn():
        shown = mask[..., None] * IMAGES + (1 - mask[..., None]) * covers
        expected += probabilities(shown, CLASSES)[:, None, None] * mask
    fill = fill if fill == 'mean' else np.array(fill)
    settings = dict(masks=len(drawn()), cells=CELLS, keep=KEEP, fill=fill, chunk_size=chunk_size)
    found = jax.jit(lambda x: attribution.rise(logits_fn, x, CLASSES, key=KEY, **settings))(IMAGES)
    np.testing.assert_allclose(found, expected / len(drawn()) / KEEP, rtol=1e-4)


def test_rise_converges_to_the_mean_over_all_masks():
    masks, chances = every_mask()
    of_masks = np.stack([probabilities(IMAGES * m[..., None], CLASSES) for m in masks], axis=1)
    expected = np.einsum('m,bm,mhw->bhw', chances, of_masks, masks) / KEEP
    squares = np.einsum('m,bm,mhw->bhw', chances, of_masks**2, masks**2) / KEEP**2
    count = 20000
    settings = dict(key=jax.random.key(1), masks=count, cells=CELLS, keep=KEEP)
    found = attribution.rise(logits_fn, IMAGES, CLASSES, **settings)
    errors = np.abs(found - expected) / np.sqrt((squares - expected**2) / count)
    assert errors.max() < 4.5  # deviations; and pixels are told apart by many more:
    spread = np.ptp(expected, axis=(1, 2)) / np.sqrt((squares - expected**2) / count).max((1, 2))
    assert spread.min() > 10


def test_a_probability_linear_in_pixels_in_closed_form():
    """Each pixel's is what all of them add to it while it is shown, by how masks go together."""
    parts = np.random.default_rng(3).uniform(0, 0.02, size=SHAPE).astype(np.float32)

    def linear_fn(images):
        q = 0.2 + jnp.einsum('bhwc,hwc->b', images, parts)
        return jnp.log(jnp.stack([q, 1 - q], axis=-1))

    masks, chances = every_mask()
    together = np.einsum('m,mhw,mij->hwij', chances, masks, masks)
    shown = np.einsum('m,mhw->hw', chances, masks)
    own = np.einsum('hwij,bijc,ijc->bhw', together, IMAGES, parts)
    expected = (0.2 * shown + own) / KEEP
    settings = dict(key=KEY, masks=20000, cells=CELLS, keep=KEEP)
    found = attribution.rise(linear_fn, IMAGES, np.zeros(3, int), **settings)
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_where_all_is_shown_saliency_is_the_probability():
    settings = dict(key=KEY, masks=3, keep=1.0)
    found = attribution.rise(logits_fn, IMAGES, CLASSES, **settings)
    expected = probabilities(IMAGES, CLASSES)[:, None, None] + np.zeros((6, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_class_that_no_pixel_changes_has_the_saliency_of_the_masks():
    settings = dict(key=KEY, masks=len(drawn()), cells=CELLS, keep=KEEP)
    found = attribution.rise(constant_fn, IMAGES, CLASSES, **settings)
    expected = np.array([0.3, 0.2, 0.5])[:, None, None] * drawn().mean(0) / KEEP
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    expected = np.array([0.3, 0.2, 0.5])[:, None, None] + np.zeros((6, 5))
    np.testing.assert_allclose(found, expected, rtol=0.2)


def test_an_image_s_saliency_does_not_know_its_neighbours():
    settings = dict(key=KEY, masks=50)
    together = attribution.rise(logits_fn, IMAGES, CLASSES, **settings)
    alone = attribution.rise(logits_fn, IMAGES[1:2], CLASSES[1:2], **settings)
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-5)
    other = attribution.rise(logits_fn, IMAGES, CLASSES, **settings | dict(key=jax.random.key(1)))
    assert np.abs(other - together).max() > 0.01


def test_a_gradient_of_a_saliency_is_that_of_finite_differences():
    step, settings = 1e-4, dict(key=KEY, masks=20, cells=3, chunk_size=7)
    direction = np.random.default_rng(4).normal(size=IMAGES.shape)

    def total(size):
        images = np.float64(IMAGES * 0.5 + 0.25) + size * direction
        return attribution.rise(logits_fn, images, CLASSES, **settings)[:, 2, 3].sum()

    with jax.enable_x64(True):
        numeric = (total(step) - total(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(total)(0.0), numeric, rtol=1e-3)


def test_a_gradient_does_not_keep_all_masks():
    settings = dict(key=KEY, masks=500, chunk_size=5)

    def total(images):
        return attribution.rise(mean_and_max, images, np.zeros(1, int), **settings).var()

    def mean_and_max(images):
        return jnp.stack([images.mean((1, 2, 3)), images.max((1, 2, 3))], axis=-1)

    images = jax.ShapeDtypeStruct((1, 32, 32, 1), np.float32)
    found = jax.jit(jax.grad(total)).lower(images).compile().memory_analysis()
    assert found.temp_size_in_bytes < 500 * 32 * 32 * 4 / 2


# --- Deletion and insertion. ----------------------------------------------------------------------

SCORES = {'deletion': attribution.deletion, 'insertion': attribution.insertion}
each_score = pytest.mark.parametrize('name', SCORES)


@each_score
@pytest.mark.parametrize('steps', [1, 7, 15, 30, 41])
@pytest.mark.parametrize('fill', [0.0, 'blur', [0.1, 0.8]])
def test_a_score_is_a_naive_loop(name, steps, fill):
    """Some pixels tie, and 30 of them are removed in 41 steps too."""
    saliency = np.round(SALIENCY * 2)
    fill = fill if fill == 'blur' else np.array(fill)
    covers = np.asarray(fills.of(fill, IMAGES))
    before, after = (IMAGES, covers) if name == 'deletion' else (covers, IMAGES)
    expected = np.zeros((3, steps + 1))
    for b in range(3):
        order = sorted(range(30), key=lambda i, b=b: (-saliency[b].flat[i], i))
        for step in range(steps + 1):
            image = before[b].copy().reshape(30, 2)
            for i in order[: step * 30 // steps]:
                image[i] = after[b].reshape(30, 2)[i]
            expected[b, step] = probabilities(image[None], CLASSES[b : b + 1])[0]
    found = SCORES[name](logits_fn, IMAGES, CLASSES, saliency, steps=steps, fill=fill)
    np.testing.assert_allclose(found.curve, expected, atol=1e-6)
    areas = np.trapezoid(expected, np.linspace(0, 1, steps + 1), axis=1)
    np.testing.assert_allclose(found.score, areas, atol=1e-6)


@each_score
def test_the_score_of_a_constant_classifier_is_that_constant(name):
    found = SCORES[name](constant_fn, IMAGES, CLASSES, SALIENCY, steps=4)
    np.testing.assert_allclose(found.score, [0.3, 0.2, 0.5], rtol=1e-6)


def test_deletion_from_the_other_end_is_insertion_backwards():
    settings = dict(steps=15, fill=0.3)
    deleted = attribution.deletion(logits_fn, IMAGES, CLASSES, -SALIENCY, **settings)
    inserted = attribution.insertion(logits_fn, IMAGES, CLASSES, SALIENCY, **settings)
    np.testing.assert_allclose(deleted.curve, inserted.curve[:, ::-1], rtol=1e-6)
    np.testing.assert_allclose(deleted.score, inserted.score, rtol=1e-6)
    ends = probabilities(IMAGES, CLASSES), probabilities(0 * IMAGES + 0.3, CLASSES)
    np.testing.assert_allclose(deleted.curve[:, [0, -1]].T, ends, rtol=1e-5)


@each_score
def test_only_the_order_of_a_saliency_counts(name):
    expected, found = (
        SCORES[name](logits_fn, IMAGES, CLASSES, s, steps=30)
        for s in (SALIENCY, np.exp(3 * SALIENCY) - 7)
    )
    np.testing.assert_array_equal(found.curve, expected.curve)


def test_each_pixel_s_own_part_is_the_best_saliency_of_a_sum_of_them():
    parts = np.random.default_rng(5).uniform(0, 0.02, size=SHAPE).astype(np.float32)

    def linear_fn(images):
        q = 0.2 + jnp.einsum('bhwc,hwc->b', images, parts)
        return jnp.log(jnp.stack([q, 1 - q], axis=-1))

    own = (IMAGES * parts).sum(-1)
    classes = np.zeros(3, int)
    best = attribution.deletion(linear_fn, IMAGES, classes, own, steps=30)
    falling = np.cumsum(-np.sort(-own.reshape(3, -1)), axis=1)
    expected = 0.2 + own.sum((1, 2))[:, None] - np.pad(falling, ((0, 0), (1, 0)))
    np.testing.assert_allclose(best.curve, expected, rtol=1e-4)
    random = attribution.deletion(linear_fn, IMAGES, classes, SALIENCY, steps=30)
    assert (random.score > best.score + 0.01).all()
    found, least = (
        attribution.insertion(linear_fn, IMAGES, classes, s, steps=30, fill=0.0).score
        for s in (own, SALIENCY)
    )
    assert (found > least + 0.01).all()


def test_a_heat_map_is_magnified_and_turned_round():
    """Bilinearly, as between the centres of cells that tile the image."""
    heatmap = np.random.default_rng(6).uniform(size=(3, 2, 3)).astype(np.float32)

    def along(cells, side):
        place = (np.arange(side) + 0.5) * cells / side - 0.5
        return np.stack([np.interp(place, range(cells), one) for one in np.eye(cells)], axis=-1)

    large = np.einsum('hi,bij,wj->bhw', along(2, 6), heatmap, along(3, 5)).astype(np.float32)
    large += np.linspace(0, -1e-5, 30, dtype=np.float32).reshape(6, 5)  # Where it is flat.
    found, expected = (
        attribution.deletion(logits_fn, IMAGES, CLASSES, s, steps=15) for s in (heatmap, large)
    )
    np.testing.assert_allclose(found.curve, expected.curve, atol=1e-6)


def test_what_matters_in_an_occlusion_map_is_dark():
    images = np.full((1, 12, 12, 1), 0.9, np.float32)

    def corner_fn(images):
        lit = images[:, 2:4, 8:10].mean((1, 2, 3)) * 4 - 2
        return jnp.stack([lit, -lit], axis=-1)

    classes = np.zeros(1, int)
    maps = occjax.heatmaps(corner_fn, images, classes, size=3, stride=1, grid='floor', fill=0.0)
    right, wrong = (
        attribution.deletion(corner_fn, images, classes, saliency, steps=12).score
        for saliency in (1 - maps, maps)
    )
    assert right[0] < 0.3 < 0.7 < wrong[0]
    saliency = attribution.rise(corner_fn, images, classes, key=KEY, masks=1000, cells=4)
    row, column = np.unravel_index(np.argmax(saliency[0]), (12, 12))
    assert 1 <= row <= 4 and 7 <= column <= 10


def test_quantus_flips_pixels_alike():
    """Of one channel, as its pixels are numbers; its curve begins after a step.

    Quantus needs an environment of its own: it brings OpenCV, by which TFDS then decodes images.
    """
    torch = pytest.importorskip('torch')
    quantus = pytest.importorskip('quantus')
    images = np.random.default_rng(7).uniform(size=(4, 6, 5, 1)).astype(np.float32)
    saliency = np.random.default_rng(8).normal(size=(4, 6, 5)).astype(np.float32)
    classes, weights = np.array([0, 2, 1, 1]), 3 * WEIGHTS[:30]
    layer = torch.nn.Linear(30, 3, bias=False)
    layer.weight.data = torch.tensor(weights.T)
    metric = quantus.PixelFlipping(
        features_in_step=5,
        abs=False,
        normalise=False,
        perturb_baseline=0.0,
        disable_warnings=True,
    )
    expected = metric(
        torch.nn.Sequential(torch.nn.Flatten(), layer).eval(),
        images.transpose(0, 3, 1, 2),
        classes,
        saliency[:, None],
        softmax=True,
        channel_first=True,
    )
    found = attribution.deletion(
        lambda x: x.reshape(len(x), -1) @ weights, images, classes, saliency, steps=6
    )
    np.testing.assert_allclose(found.curve[:, 1:], expected, atol=1e-6)


# --- What is refused. -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(masks=0), 'Expected masks >= 1, got 0'),
        (dict(keep=0.0), 'Expected 0 < keep <= 1, got 0.0'),
        (dict(keep=1.5), 'Expected 0 < keep <= 1, got 1.5'),
        (dict(cells=(2, 0)), 'Expected cells to be an integer >= 1 or two of them'),
        (dict(fill='black'), "Expected fill to be 'blur', 'mean'"),
        (dict(classes=np.array([0, 1, 3])), 'Expected classes from 0 to 2'),
        (dict(classes=np.array([0])), 'Expected 3 integer classes'),
        (dict(images=IMAGES[0]), r'Expected images \[B, H, W, C\]'),
        (dict(chunk_size=0), 'Expected chunk_size >= 1'),
    ],
)
def test_rise_refuses(settings, message):
    settings = dict(images=IMAGES, classes=CLASSES, key=KEY, masks=2) | settings
    with pytest.raises(ValueError, match=message):
        attribution.rise(logits_fn, settings.pop('images'), settings.pop('classes'), **settings)


@each_score
@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(steps=0), 'Expected steps >= 1, got 0'),
        (
            dict(saliency=SALIENCY[:2]),
            r'saliency \[3, 6, 5\], or a heat map \[3, h, w\]',
        ),
        (dict(saliency=IMAGES), r'got shape \[3, 6, 5, 2\]'),
        (dict(saliency=SALIENCY[:, :0]), r'got shape \[3, 0, 5\]'),
        (
            dict(saliency=np.where(SALIENCY > 1, np.nan, SALIENCY)),
            'Expected saliency to be numbers, got NaN',
        ),
        (dict(fill='black'), "Expected fill to be 'blur', 'mean'"),
        (dict(classes=np.array([0, 1, 3])), 'Expected classes from 0 to 2'),
        (dict(images=255 * IMAGES), 'pixels from 0 to 1'),
    ],
)
def test_scores_refuse(name, settings, message):
    settings = dict(images=IMAGES, classes=CLASSES, saliency=SALIENCY, steps=2) | settings
    arrays = [settings.pop(each) for each in ('images', 'classes', 'saliency')]
    with pytest.raises(ValueError, match=message):
        SCORES[name](logits_fn, *arrays, **settings)


def test_of_a_compiled_classifier():
    batch = jax.ShapeDtypeStruct((4, *SHAPE), np.float32)
    compiled = jax.jit(logits_fn).lower(batch).compile()
    for explain in (
        functools.partial(attribution.rise, key=KEY, masks=3),
        functools.partial(attribution.deletion, saliency=SALIENCY, steps=3),
    ):
        expected, found = (
            explain(fn, IMAGES, CLASSES, chunk_size=4) for fn in (logits_fn, compiled)
        )
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
