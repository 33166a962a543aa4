"""Public functions in code bases that forbid implicit promotion, or compute in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occjax
from occjax import (
    adaptive,
    attack,
    attribution,
    comparators,
    convolution,
    detector,
    incremental,
    vgg,
)

PLAN, SIDE = (4, 'M', 8, 'M'), 8
IMAGES = np.random.default_rng(0).uniform(size=(3, SIDE, SIDE, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2], np.int32)
WINDOWS = dict(size=3, stride=2)
GRIDS = np.random.default_rng(1).uniform(size=(2, 6, 2, 2)).astype(np.float32)
KINDS = np.tile([False, True], (2, 3))


def key():
    return jax.random.key(0)


def variables(**settings):
    return vgg.init(key(), image_size=SIDE, num_classes=3, hidden=8, plan=PLAN, **settings)


def network(**settings):
    return functools.partial(vgg.logits, variables(**settings), plan=PLAN)


def margin_fn(images):
    return images.mean((1, 2, 3)) - 0.5


def bank(grids=GRIDS, **settings):
    made = detector.init_bank(key(), num_classes=2, grid=grids.shape[2:], **settings)
    fitted = detector.fit_bank(key(), made, grids, KINDS, np.ones((2, 6), np.float32), steps=2)
    return detector.score(fitted, grids[0], np.array([0, 1, 0, 1, 0, 1], np.int32))


def magnet():
    autoencoder = comparators.init_autoencoder(key(), channels=3)
    images = (255 * IMAGES).astype(np.uint8)
    autoencoder = comparators.fit_autoencoder(key(), autoencoder, images, steps=2)
    return comparators.magnet(network(), autoencoder, IMAGES, temperature=10.0)


def train():
    arguments = dict(key=key(), plan=PLAN)
    return jax.grad(lambda v: vgg.train_logits(v, IMAGES, **arguments)[0].sum(), allow_int=True)(
        variables()
    )


FUNCTIONS = {
    'logits': lambda: network()(IMAGES),
    'thermometer': lambda: network(levels=4)(IMAGES),
    'train_logits': train,
    **{
        name: lambda name=name: getattr(attack, name)(network(), IMAGES, LABELS, epsilon=0.1)
        for name in ('fgsm', 'targeted_fgsm', 'fgsm_l2')
    },
    **{
        name: lambda name=name: getattr(attack, name)(
            network(), IMAGES, LABELS, epsilon=0.1, steps=2
        )
        for name in ('bim', 'mi_fgsm')
    },
    **{
        name: lambda name=name: getattr(attack, name)(
            network(), IMAGES, LABELS, key=key(), epsilon=0.1, steps=2
        )
        for name in ('pgd', 'square')
    },
    **{
        name: lambda name=name: getattr(adaptive, name)(
            network(), margin_fn, IMAGES, LABELS, epsilon=0.1, steps=2
        )
        for name in ('joint_pgd', 'selective_pgd', 'orthogonal_pgd')
    },
    'sign_noise': lambda: attack.sign_noise(IMAGES, key=key(), epsilon=0.1),
    'heatmaps': lambda: occjax.heatmaps(network(), IMAGES, LABELS, **WINDOWS),
    'windows with sides': lambda: occjax.heatmaps(
        network(), IMAGES, LABELS, size=(2, 3), stride=(3, 2), fill='blur'
    ),
    'rise': lambda: attribution.rise(network(), IMAGES, LABELS, key=key(), masks=5, fill='mean'),
    **{
        name: lambda name=name: getattr(attribution, name)(
            network(), IMAGES, LABELS, GRIDS[0, :3], steps=4
        )
        for name in ('deletion', 'insertion')
    },
    'accelerate': lambda: convolution.accelerate(network())(IMAGES),
    'incremental': lambda: incremental.heatmaps(network(), IMAGES, LABELS, **WINDOWS),
    'approximate': lambda: incremental.heatmaps(
        network(), IMAGES, LABELS, threshold=0.5, every=2, **WINDOWS
    ),
    'bank': bank,
    'bank, standardized': lambda: bank(standardize=True),
    'bank, convolutions': lambda: bank(GRIDS[..., None], convolutions=(3,)),
    'magnet': magnet,
    'feature_squeezing': lambda: comparators.feature_squeezing(network(), IMAGES, bits=4, size=2),
}


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
        yield


SETTINGS = {'strict': strict, 'x64': lambda: jax.enable_x64(True)}


@pytest.mark.slow
@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_public_function_works_under_every_setting(name, setting):
    with SETTINGS[setting]():
        found = FUNCTIONS[name]()
        for leaf in jax.tree.leaves(found):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert np.isfinite(leaf).all()
