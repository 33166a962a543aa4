"""One's own network through the whole program: a ResNet in Flax Linen, a ConvNeXt in Flax NNX.

`source` names a file and a function in it, which returns what the program needs of a classifier: a
pure function `(variables, images) -> logits` of `[B, H, W, C]` images in [0, 1], its variables, the
names of its classes, and the side of its images; it may take the config. Here that file is this
one; the networks are small and fitted to the digits the first time, in half a minute, for want of
weights to load.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx, serialization

from configs import digits
from occjax import data, sources


def get_config():
    """Returns the digits' experiment on the Linen network."""
    config = digits.get_config()
    config.classifier.source = f'{os.path.relpath(__file__)}:resnet'
    return config


class ResidualBlock(linen.Module):
    """Two 3×3 convolutions beside a shortcut."""

    features: int
    stride: int = 1

    @linen.compact
    def __call__(self, x):
        """Returns features of `[B, h, w, C]`."""
        y = linen.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        y = jax.nn.relu(linen.LayerNorm()(y))
        y = linen.Conv(self.features, (3, 3), use_bias=False)(y)
        if x.shape != y.shape:
            x = linen.Conv(self.features, (1, 1), self.stride)(x)
        return jax.nn.relu(x + y)


class ResNet(linen.Module):
    """A ResNet of seven layers."""

    @linen.compact
    def __call__(self, images):
        """Returns `[B, K]` logits."""
        x = jax.nn.relu(linen.Conv(16, (3, 3))(images - 0.5))
        for features in (16, 32, 64):
            x = ResidualBlock(features, 1 if features == 16 else 2)(x)
        return linen.Dense(len(sources.DIGITS))(x.mean((1, 2)))


def resnet(config):
    """Returns the Linen network: its variables are an argument already."""
    model = ResNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return model.apply, fitted('own_resnet', model.apply, variables, config), sources.DIGITS, 32


class ConvNeXtBlock(nnx.Module):
    """A depthwise convolution, normalisation, and two linear layers, beside a shortcut."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        groups = dict(feature_group_count=features)
        self.depthwise = nnx.Conv(features, features, (7, 7), **groups, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.wide = nnx.Linear(features, 4 * features, rngs=rngs)
        self.narrow = nnx.Linear(4 * features, features, rngs=rngs)

    def __call__(self, x):
        """Returns features of `[B, h, w, C]`."""
        return x + self.narrow(jax.nn.gelu(self.wide(self.norm(self.depthwise(x)))))


class ConvNeXt(nnx.Module):
    """A ConvNeXt of two blocks."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 32, (4, 4), strides=4, padding='VALID', rngs=rngs)
        self.blocks = nnx.List([ConvNeXtBlock(32, rngs) for _ in range(2)])
        self.head = nnx.Linear(32, len(sources.DIGITS), rngs=rngs)

    def __call__(self, images):
        """Returns `[B, K]` logits."""
        x = self.stem(images - 0.5)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def convnext(config):
    """Returns the NNX network, split into a graph, which the function keeps, and its state."""
    graph, state = nnx.split(ConvNeXt(nnx.Rngs(0)))

    def apply(state, images):
        return nnx.merge(graph, state)(images)

    return apply, fitted('own_convnext', apply, state, config), sources.DIGITS, 32


def fitted(name, apply, variables, config, *, epochs=15, batch_size=32):
    """Returns the variables after training on the experiment's own training images.

    It attacks and judges on others, which follow from `config`: so does the file that keeps the
    variables after the first time.
    """
    held_out = dict(resplit_per_class=config.data.resplit_per_class, seed=config.seed)
    file = pathlib.Path('runs', '-'.join([name, *map(str, held_out.values())]) + '.msgpack')
    leaves, tree = jax.tree.flatten(variables)
    if file.exists():
        leaves = serialization.from_bytes(leaves, file.read_bytes())
        return jax.tree.unflatten(tree, map(jnp.asarray, leaves))
    optimizer = optax.adam(2e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, state, images, labels):
        def loss(variables):
            logits = apply(variables, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    split = data.load('digits', image_size=32, **held_out).train
    state = optimizer.init(variables)
    for epoch in range(epochs):
        for batch in data.training_batches(split, batch_size, seed=0, epoch=epoch):
            variables, state = step(variables, state, batch.images, batch.labels)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(serialization.to_bytes(jax.tree.leaves(variables)))
    return variables
