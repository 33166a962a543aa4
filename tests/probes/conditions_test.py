"""Laws of the attacks by their names."""

import jax
import jax.numpy as jnp
import pytest

from occjax import names
from occjax.probes import conditions


@pytest.mark.parametrize('name', ['none', 'noise', 'fgsm', *names.ATTACKS])
def test_each_moves_images_within_its_ball(name):
    weights = jax.random.normal(jax.random.key(0), (48, 3))
    images = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3), minval=0.2, maxval=0.8)

    def logits_fn(images):
        return images.reshape(len(images), -1) @ weights

    # Whoever looks for the nearest image takes some steps to find one at all.
    steps = 30 if name in names.NEAREST else 9
    settings = dict(key=jax.random.key(2), epsilon=0.1, steps=steps, bounds=None)
    labels = logits_fn(images).argmax(-1)
    attacked = conditions.ATTACKS[name](logits_fn, images, labels, **settings)
    step = (attacked - images).reshape(2, -1)
    assert (jnp.abs(step).max() > 1e-3) == (name != 'none')
    if name == 'pgd_l2':  # As long as FGSM's step.
        assert jnp.linalg.norm(step, axis=-1).max() <= 0.1 * 48**0.5 * (1 + 1e-5)
        assert jnp.abs(step).max() > 0.1
    elif name not in names.NEAREST:
        assert jnp.abs(step).max() <= 0.1 + 1e-6
    else:
        assert (logits_fn(attacked).argmax(-1) != labels).all()
