"""Laws of the detectors that need no heatmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import distance
from sklearn import neighbors

from occjax import comparators

IMAGES = jax.random.uniform(jax.random.key(0), (5, 7, 6, 3))


def logits_fn(images):
    weights = jax.random.normal(jax.random.key(1), (7 * 6 * 3, 4))
    return images.reshape(len(images), len(weights)) @ weights


def unsure_logits_fn(images):
    return logits_fn(images) / 3


@pytest.mark.parametrize('bits', [1, 3, 8])
def test_squeezed_pixels_have_so_many_levels_and_are_the_nearest(bits):
    squeezed = np.asarray(comparators.squeeze_bits(IMAGES, bits=bits))
    levels = np.linspace(0, 1, 2**bits)
    assert np.abs(squeezed[..., None] - levels).min(-1).max() < 1e-6
    assert np.abs(squeezed - IMAGES).max() <= 0.5 / (2**bits - 1) + 1e-6
    assert np.abs(squeezed - IMAGES).max() > 0.4 / (2**bits - 1)


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_the_median_is_scipy_s(size):
    expected = ndimage.median_filter(np.asarray(IMAGES), (1, size, size, 1), mode='reflect')
    np.testing.assert_array_equal(comparators.squeeze_median(IMAGES, size=size), expected)


def test_what_squeezing_leaves_alone_scores_zero():
    flat = jnp.full((2, 7, 6, 3), 1 / 3)  # A level of 2, 4 and 8 bits.
    scores = comparators.feature_squeezing(logits_fn, flat, bits=4, size=3)
    np.testing.assert_allclose(scores, 0, atol=1e-5)


def test_feature_squeezing_takes_the_larger_distance():
    """By each squeezer alone: many bits change nothing, nor does a median of one pixel."""
    images = jax.random.uniform(jax.random.key(0), (12, 7, 6, 3))
    bits = comparators.feature_squeezing(unsure_logits_fn, images, bits=1, size=1)
    median = comparators.feature_squeezing(unsure_logits_fn, images, bits=16, size=3)
    both = comparators.feature_squeezing(unsure_logits_fn, images, bits=1, size=3)
    np.testing.assert_allclose(both, np.maximum(bits, median), atol=1e-3)
    assert (bits - median).max() > 0.05 and (median - bits).max() > 0.05
    p, q = (
        jax.nn.softmax(unsure_logits_fn(x))
        for x in (images, comparators.squeeze_bits(images, bits=1))
    )
    np.testing.assert_allclose(bits, np.abs(p - q).sum(-1), atol=1e-5)


def test_no_images_have_no_scores():
    none, autoencoder = IMAGES[:0], comparators.init_autoencoder(jax.random.key(0), channels=3)
    assert comparators.feature_squeezing(logits_fn, none, bits=4, size=3).shape == (0,)
    for scores in comparators.magnet(logits_fn, autoencoder, none, temperature=10.0):
        assert scores.shape == (0,)


def fitted(steps):
    """Returns an autoencoder of smooth images, and such images."""
    ramp = np.linspace(0, 200, 16).astype(np.uint8)
    images = np.stack([np.broadcast_to(ramp[None, :, None], (16, 16, 3)).copy() for _ in range(8)])
    images[::2] = images[::2].transpose(0, 2, 1, 3)
    fresh = comparators.init_autoencoder(jax.random.key(0), channels=3)
    variables = comparators.fit_autoencoder(
        jax.random.key(1), fresh, images, steps=steps, batch_size=16, side=12
    )
    return variables, images.astype(np.float32) / 255


@pytest.mark.slow
def test_an_autoencoder_learns_its_images_and_not_others():
    (before, images), (after, _) = fitted(1), fitted(300)
    rough = np.random.default_rng(0).uniform(size=images.shape).astype(np.float32)
    classify = lambda x: x.mean(axis=(1, 2))  # noqa: E731
    errors = [
        np.asarray(comparators.magnet(classify, v, x, temperature=1.0)[0]).mean()
        for v, x in ((before, images), (after, images), (after, rough))
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.5 * errors[2]


def test_an_autoencoder_takes_bytes_and_floats():
    images = np.random.default_rng(3).integers(0, 256, (4, 9, 9, 3)).astype(np.uint8)
    fresh = comparators.init_autoencoder(jax.random.key(0), channels=3)
    one, other = (
        comparators.fit_autoencoder(jax.random.key(1), fresh, x, steps=3, batch_size=2, side=5)
        for x in (images, images.astype(np.float32) / 255)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, other)


def test_magnet_s_numbers_are_scipy_s():
    variables, _ = fitted(1)
    again = comparators.Autoencoder().apply(variables, IMAGES)
    for temperature in (1.0, 10.0):
        error, divergence = comparators.magnet(
            logits_fn, variables, IMAGES, temperature=temperature
        )
        np.testing.assert_allclose(error, np.abs(IMAGES - again).mean(axis=(1, 2, 3)), rtol=1e-5)
        p, q = (np.asarray(jax.nn.softmax(logits_fn(x) / temperature)) for x in (IMAGES, again))
        expected = distance.jensenshannon(p, q, axis=-1) ** 2
        np.testing.assert_allclose(divergence, expected, rtol=1e-3, atol=1e-6)

    # Logits so far apart that probabilities are 0, and of another class after reconstruction,
    # which no sigmoid brings to 1: ln 2, and no NaN.
    def sure_of_white(images):
        return jnp.where(images.min() == 1, 1e4, -1e4) * jnp.array([[1.0, -1.0]])

    white = jnp.ones((1, 7, 6, 3))
    sure = comparators.magnet(sure_of_white, variables, white, temperature=1.0)[1]
    np.testing.assert_allclose(sure, np.log(2), rtol=1e-5)


def test_the_spectrum_of_a_wave_is_one_frequency():
    rows = np.arange(8)
    wave = 0.5 + 0.25 * np.cos(2 * np.pi * 2 * rows / 8)[None, :, None, None]
    wave = np.broadcast_to(wave, (1, 8, 8, 3)).astype(np.float32)
    found = np.asarray(comparators.spectrum(wave)).reshape(8, 5, 3)
    expected = np.zeros((8, 5))
    expected[0, 0], expected[2, 0], expected[6, 0] = 64 * 0.5, 64 * 0.125, 64 * 0.125
    np.testing.assert_allclose(found, np.stack([expected] * 3, axis=-1), atol=1e-4)
    images = np.random.default_rng(0).uniform(size=(2, 7, 9, 3)).astype(np.float32)
    whole = np.abs(np.fft.fft2(images, axes=(1, 2)))[:, :, :5].reshape(2, -1)
    np.testing.assert_allclose(comparators.spectrum(images), whole, rtol=1e-3, atol=1e-4)


def test_neighbours_are_scikit_learn_s_and_the_dimension_is_theirs():
    """A ball of three dimensions, put into seven, has a local dimensionality of three."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4020, 3))
    points *= rng.uniform(size=(4020, 1)) ** (1 / 3) / np.linalg.norm(points, axis=1, keepdims=True)
    turned = np.linalg.qr(rng.normal(size=(7, 3)))[0].T
    points[:20] *= 0.5  # Not at the edge.
    features, reference = np.split((points @ turned).astype(np.float32), [20])
    found = np.asarray(comparators.multi_lid(features, reference, neighbours=30))
    distances, _ = neighbors.NearestNeighbors(n_neighbors=30).fit(reference).kneighbors(features)
    np.testing.assert_allclose(found, np.log(distances[:, -1:] / distances[:, :-1]), atol=1e-4)
    assert (np.diff(found, axis=1) <= 0).all() and (found >= 0).all()
    assert abs(30 / found.sum(axis=1).mean() - 3) < 0.3
    same = comparators.multi_lid(reference[:2], reference, neighbours=3)
    assert np.isfinite(same).all()
