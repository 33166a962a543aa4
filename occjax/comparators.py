"""Detectors that need no heat map, for comparison (paper §II): feature squeezing and MagNet.

Images are float32 in [0, 1], NHWC. Dimensions: B batch, N images, H W C image, K classes.
"""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from occjax import checks
from occjax.detector import Conv3x3, draw_kernels
from occjax.types import Array, LogitsFn, promoting


@checks.checked(slack=checks.NEAR, least=0)
def squeeze_bits(images: Array, *, bits: int) -> Array:
    """Returns `[B, H, W, C]` pixels rounded to `2 ** bits` levels."""
    levels = 2**bits - 1
    return jnp.round(images * levels) / levels


@checks.checked(slack=checks.NEAR, least=0, size=checks.COUNT)
def squeeze_median(images: Array, *, size: int) -> Array:
    """Returns each pixel's median over a square of `size`, which is reflected at the edges.

    Of an even number the larger of the two in the middle, as `scipy.ndimage.median_filter` does.
    """
    before = size // 2
    margin = (before, size - 1 - before)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)), mode='symmetric')
    height, width = images.shape[1:3]
    shifted = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.sort(jnp.stack(shifted), axis=0)[size**2 // 2]


SETTINGS = ('bits', 'median', 'temperature')  # of `scores`, which a guard keeps


@checks.checked(slack=checks.NEAR, least=0, size=checks.COUNT)
@promoting
def feature_squeezing(logits_fn: LogitsFn, images: Array, *, bits: int, size: int) -> Array:
    """Returns `[B]`, how far squeezing moves the probabilities: the largest L1 distance of two.

    The squeezers are fewer bits a pixel and the median of a square; the third of the paper's,
    non-local means, is left out. Three forward passes.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits.
        images: `[B, H, W, C]` in [0, 1].
        bits: of a squeezed pixel.
        size: side of the square.

    References:
        Xu et al., https://arxiv.org/abs/1704.01155
    """
    squeezed = squeeze_bits(images, bits=bits), squeeze_median(images, size=size)
    plain, *others = (jax.nn.softmax(logits_fn(x)) for x in (images, *squeezed))
    return jnp.max(jnp.stack([jnp.abs(plain - p).sum(-1) for p in others]), axis=0)


@checks.checked(slack=checks.NEAR, least=0)
def spectrum(images: Array) -> Array:
    """Returns `[B, H * (W // 2 + 1) * C]` magnitudes of each channel's Fourier transform.

    A logistic regression on them is InputMFS, which needs no forward pass and knows no classifier.
    Of a real image the other half of the frequencies says the same.

    References:
        Harder et al., https://arxiv.org/abs/2103.03000
    """
    return jnp.abs(jnp.fft.rfft2(images, axes=(1, 2))).reshape(len(images), -1)


@checks.checked
def multi_lid(features: Array, reference: Array, *, neighbours: int) -> Array:
    """Returns the logarithms of how much nearer the nearest references are than the last of them.

    `neighbours` over the sum of an image's is its local intrinsic dimensionality, LID.

    Args:
        features: `[B, F]`, what a layer makes of images.
        reference: `[R, F]`, the same of clean ones.
        neighbours: n, from 2 to R.

    Returns:
        `[B, n - 1]`, of the nearest first, at least 0.

    References:
        Ma et al., https://arxiv.org/abs/1801.02613, §3; Lorenz et al.,
        https://arxiv.org/abs/2212.06776
    """

    features, reference = jnp.asarray(features), jnp.asarray(reference)
    if features.ndim != 2 or reference.shape[1:] != features.shape[1:]:
        raise ValueError(
            f'Expected features [B, F] and reference [R, F], got {list(features.shape)} and '
            f'{list(reference.shape)}.'
        )
    if neighbours > len(reference):
        raise ValueError(f'Expected neighbours <= {len(reference)} references, got {neighbours}.')
    checks.finite('features', features)
    checks.finite('reference', reference)

    def one(row):
        distances = jnp.linalg.norm(reference - row, axis=-1)
        nearest = jnp.maximum(-jax.lax.top_k(-distances, neighbours)[0], 1e-12)
        return jnp.log(nearest[-1] / nearest[:-1])

    return jax.lax.map(one, features)


class Autoencoder(nn.Module):
    """MagNet's for colour images: three 3×3 convolutions under sigmoids, none of them smaller."""

    width: int = 32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns `[B, H, W, C]` images again."""
        x = images
        for features in (self.width, self.width, images.shape[-1]):
            # With `nn.Conv` a step of 64 patches took 4.8 s, with this one 0.14 (2 busy cores).
            x = nn.sigmoid(Conv3x3(features)(x))
        return x


@checks.checked
@promoting
def init_autoencoder(key: Array, *, channels: int) -> Any:
    """Returns fresh variables of an autoencoder for images of `channels`, whatever their size."""
    return draw_kernels(key, Autoencoder().init(key, jnp.zeros((1, 8, 8, channels))))


@promoting
@functools.partial(jax.jit, static_argnames=('steps', 'batch_size', 'side'))
def fit_autoencoder(
    key: Array,
    variables: Any,
    images: Array,
    *,
    steps: int,
    batch_size: int = 32,
    side: int = 32,
    noise: float = 0.025,
    learning_rate: float = 3e-3,
) -> Any:
    """Fits an autoencoder to clean images by Adam on the squared error, from noisy ones.

    It has no pools, so that patches teach it as well as whole images.

    Args:
        key: JAX random key.
        variables: from `init_autoencoder`.
        images: `[N, H, W, C]` in [0, 1], or bytes.
        steps, batch_size, learning_rate: of Adam; the rate falls to zero along a cosine.
        side: of the patches, cut at random, in pixels; at most that of the images.
        noise: deviation of what is added to the inputs.

    References:
        Meng & Chen, https://arxiv.org/abs/1705.09064, §4.2
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    count, height, width, channels = images.shape
    side = min(side, height, width)

    def patch(key):
        which, row, column = (
            jax.random.randint(k, (), 0, n)
            for k, n in zip(
                jax.random.split(key, 3), (count, height - side + 1, width - side + 1), strict=True
            )
        )
        found = jax.lax.dynamic_slice(images, (which, row, column, 0), (1, side, side, channels))
        return found[0] / 255 if images.dtype == jnp.uint8 else found[0]

    def loss(variables, clean, noisy):
        return jnp.mean((Autoencoder().apply(variables, noisy) - clean) ** 2)

    def step(carry, key):
        variables, opt_state = carry
        patch_key, noise_key = jax.random.split(key)
        clean = jax.vmap(patch)(jax.random.split(patch_key, batch_size))
        noisy = jnp.clip(clean + noise * jax.random.normal(noise_key, clean.shape), 0, 1)
        gradients = jax.grad(loss)(variables, clean, noisy)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(variables, updates), opt_state), None

    carry = variables, optimizer.init(variables)
    (variables, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return variables


@checks.checked(slack=checks.NEAR, least=0)
@promoting
def magnet(
    logits_fn: LogitsFn, variables: Any, images: Array, *, temperature: float
) -> tuple[Array, Array]:
    """Returns MagNet's two detectors: the reconstruction's error, and what it does to the classes.

    Its paper uses the second at two temperatures, 10 and 40; here it is one.

    Args:
        logits_fn: maps `[B, H, W, C]` images to `[B, K]` logits.
        variables: of a fitted autoencoder.
        images: `[B, H, W, C]` in [0, 1].
        temperature: T, by which logits are divided.

    Returns:
        `[B]` mean absolute errors, and `[B]` Jensen-Shannon divergences (in nats) of the
        probabilities before and after reconstruction.

    References:
        Meng & Chen, https://arxiv.org/abs/1705.09064, §4.2
    """
    again = Autoencoder().apply(variables, images)
    error = jnp.abs(images - again).mean(axis=(1, 2, 3))
    p, q = (jax.nn.log_softmax(logits_fn(x) / temperature) for x in (images, again))
    middle = jnp.logaddexp(p, q) - jnp.log(2)
    divergence = [optax.losses.kl_divergence_with_log_targets(middle, x) for x in (p, q)]
    return error, sum(divergence) / 2


def scores(
    logits_fn: LogitsFn,
    images: Array,
    *,
    autoencoder: Any = None,
    bits: int = 5,
    median: int = 2,
    temperature: float = 10.0,
) -> Array:
    """Returns `[B, 3]` scores, those of `names.COMPARATORS`; MagNet's are NaN without autoencoder.

    Args:
        logits_fn, images: see `feature_squeezing`.
        autoencoder: fitted, see `fit_autoencoder`.
        bits, median: of squeezed pixels, and the side of the square.
        temperature: see `magnet`.
    """
    found = [feature_squeezing(logits_fn, images, bits=bits, size=median)]
    if autoencoder is None:
        found += 2 * [jnp.full_like(found[0], jnp.nan)]
    else:
        found += magnet(logits_fn, autoencoder, images, temperature=temperature)
    return jnp.stack(found, axis=-1)


def autoencoder_flops(image_shape: tuple[int, int]) -> int:
    """Returns the additions and multiplications of one colour image's reconstruction."""
    widths = (3, Autoencoder.width, Autoencoder.width, 3)
    return 2 * math.prod(image_shape) * sum(9 * a * b for a, b in itertools.pairwise(widths))
