"""Laws of views."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from occjax import names, views
from occjax.views import VIEWS

IMAGES = np.random.default_rng(0).uniform(size=(3, 9, 7, 3)).astype(np.float32)
WEIGHTS = jax.random.normal(jax.random.key(0), (9 * 7 * 3, 4))


def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def test_every_name_is_a_view_in_its_order():
    assert ('reconstruction', *views.VIEWS) == names.VIEWS


def test_a_view_of_no_change_gives_the_image_s_own_logits():
    found = views.viewed_logits(logits_fn, IMAGES, [lambda x: x, VIEWS['flip']])
    assert found.shape == (3, 2, 4)
    np.testing.assert_allclose(found[:, 0], logits_fn(IMAGES), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], logits_fn(IMAGES[:, :, ::-1]), rtol=1e-6)
    with pytest.raises(ValueError, match='at least one view'):
        views.viewed_logits(logits_fn, IMAGES, [])
    with pytest.raises(ValueError, match='from 0 to 1'):
        views.viewed_logits(logits_fn, 255 * IMAGES, [VIEWS['flip']])


@pytest.mark.parametrize('name', VIEWS)
def test_each_sees_one_image_stays_in_bounds_and_changes_it(name):
    view = jax.jit(VIEWS[name])
    seen = np.asarray(view(IMAGES))
    assert seen.shape == IMAGES.shape
    assert seen.min() >= 0 and seen.max() <= 1
    assert np.abs(seen - IMAGES).max() > 1e-3
    np.testing.assert_allclose(view(IMAGES[1:2])[0], seen[1], atol=1e-6)


@pytest.mark.parametrize('name', [name for name in VIEWS if not name.startswith(('noise', 'bits'))])
def test_where_all_pixels_are_equal_nothing_changes(name):
    flat = np.full((1, 9, 7, 3), 0.3, np.float32)
    np.testing.assert_allclose(VIEWS[name](flat), flat, atol=1e-6)


@pytest.mark.parametrize('sigma', [0.3, 0.5, 1.0, 1.4])
def test_blur_is_scipy_s(sigma):
    reach = max(1, round(3 * sigma))
    expected = ndimage.gaussian_filter(
        IMAGES.astype(np.float64), (0, sigma, sigma, 0), mode='nearest', radius=(0, reach, reach, 0)
    )
    np.testing.assert_allclose(views.blur(IMAGES, sigma=sigma), expected, atol=1e-6)
    sharp = np.clip(2 * IMAGES - expected, 0, 1)
    np.testing.assert_allclose(views.sharpen(IMAGES, sigma=sigma), sharp, atol=1e-6)


def test_shifts_and_flips_are_undone_by_their_opposites():
    there = views.shift(IMAGES, rows=2, columns=-1)
    back = views.shift(there, rows=-2, columns=1)
    np.testing.assert_array_equal(back[:, :-2, 1:], IMAGES[:, :-2, 1:])
    np.testing.assert_array_equal(there[:, 2:, :-1], IMAGES[:, :-2, 1:])
    np.testing.assert_array_equal(there[:, 0], there[:, 1])  # The edge repeats.
    np.testing.assert_array_equal(views.flip(views.flip(IMAGES)), IMAGES)


def test_shrinking_loses_what_is_finer():
    """Stripes of one pixel vanish, a slope of brightness stays but at its ends."""
    stripes = np.broadcast_to((np.arange(16) % 2).astype(np.float32)[:, None, None], (1, 16, 16, 3))
    shrunk = views.shrink(stripes, factor=2)
    np.testing.assert_allclose(shrunk[:, 4:-4], 0.5, atol=1e-6)
    slope = np.broadcast_to((np.arange(16) / 16).astype(np.float32)[:, None, None], (1, 16, 16, 3))
    np.testing.assert_allclose(views.shrink(slope, factor=2)[:, 4:-4], slope[:, 4:-4], atol=1e-6)


def test_noise_has_its_size_and_one_pattern_for_all():
    middle = 0.4 + 0.2 * IMAGES
    step = np.asarray(views.noise(middle, seed=3, epsilon=0.1)) - middle
    np.testing.assert_allclose(np.abs(step), 0.1, atol=1e-6)
    np.testing.assert_allclose(step[0], step[2], atol=1e-6)
    other = np.asarray(views.noise(middle, seed=4, epsilon=0.1)) - middle
    assert np.mean(np.sign(other) != np.sign(step)) > 0.3


def test_rounding_passes_gradients_on():
    np.testing.assert_allclose(jax.grad(lambda x: VIEWS['bits'](x).sum())(IMAGES), 1)
    levels = np.unique(np.round(3 * np.asarray(VIEWS['bits'](IMAGES)), 5))
    np.testing.assert_array_equal(levels, [0, 1, 2, 3])


def test_views_are_differentiated():
    def total(images):
        return views.viewed_logits(logits_fn, images, list(VIEWS.values()))[..., 0].sum()

    gradient = jax.jit(jax.grad(total))(0.3 + 0.3 * IMAGES)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
