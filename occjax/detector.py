"""The detectors: one small MLP per class that judges heatmaps (paper §III-D).

All of them are one *bank*: a Flax pytree whose leaves lead with the class axis, made, fitted and
applied by `vmap`. A map is judged by the detector of the class that the classifier predicts for it.

Dimensions: K classes, h w heatmap grid, M maps, N maps a class (padded to the largest).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from occjax import checks, names
from occjax.convolution import conv3x3
from occjax.types import Array, promoting

# Maps whose detectors' weights are copied out of a bank at once.
_GATHERED = 64

Bank = Any  # The variables of `MLP`, each leaf with a leading axis of K.


_ZEROS = nn.initializers.zeros  # of kernels, until `draw_kernels`


class Conv3x3(nn.Module):
    """A 3×3 convolution with bias, `[M, h, w, C]` to `[M, h, w, features]`.

    `nn.Conv` computes the same, but on CPU its gradients take tens of times as long.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns `[M, h, w, features]`."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param('kernel', _ZEROS, shape)
        return conv3x3(x, kernel) + self.param('bias', _ZEROS, (self.features,))


class MLP(nn.Module):
    """Scores heatmaps: `[M, h, w]` to `[M]` logits, above 0 for adversarial.

    Ours: ReLU and one logit (§III-D gives the widths only). 113,409 parameters for 4×4 maps,
    159,489 for 14×14.
    """

    features: tuple[int, ...] = (256, 256, 128, 64, 32)
    convolutions: tuple[int, ...] = ()  # ours: widths of 3×3 layers on `[M, h, w, …]` before
    standardize: bool = False  # ours: every cell to mean 0 and deviation 1 of the maps in `fit`

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        """Returns `[M]` logits."""
        x = maps
        if self.standardize:
            mean = self.variable('cells', 'mean', jnp.zeros, maps.shape[1:])
            deviation = self.variable('cells', 'deviation', jnp.ones, maps.shape[1:])
            x = (x - mean.value) / deviation.value
        for width in self.convolutions:
            x = nn.relu(Conv3x3(width)(x))
        x = x.reshape(len(maps), math.prod(x.shape[1:]))
        for width in self.features:
            x = nn.relu(nn.Dense(width, kernel_init=_ZEROS)(x))
        return nn.Dense(1, kernel_init=_ZEROS)(x)[:, 0]


class Groups(NamedTuple):
    """Maps by their predicted class, padded to one length; `weight` 0 is padding."""

    maps: np.ndarray  # f32[K, N, h, w]; the real ones come first
    is_adversarial: np.ndarray  # bool[K, N]
    weight: np.ndarray  # f32[K, N]


def group_by_class(
    maps: np.ndarray,
    predicted: np.ndarray,
    is_adversarial: np.ndarray,
    *,
    num_classes: int,
    balance: str,
    rng: np.random.Generator,
) -> Groups:
    """Sorts maps into their detectors' training sets (§III-C groups by the predicted class).

    Args:
        maps: `[M, h, w]`, or `[M, ...]` of whatever else the detectors see.
        predicted: `[M]` integer classes that the classifier predicts for the images.
        is_adversarial: `bool[M]`.
        num_classes: K.
        balance: what evens out the two kinds within a class (ours: not stated): `undersample`
            the larger one, `weights` that give both the same sum, or `none`.
        rng: chooses what undersampling keeps.

    Returns:
        Groups for `fit_bank`. A class with maps of one kind only gets no weight at all: there is
        nothing for its detector to learn.

    Raises:
        ValueError: if `balance` is unknown, `predicted` is not one class for each map, or
            `is_adversarial` neither False nor True, or 0 nor 1.
    """
    if balance not in names.BALANCES:
        raise ValueError(f'Expected balance to be one of {names.BALANCES}, got {balance!r}.')
    predicted = np.asarray(checks.classes(predicted, maps, num_classes, name='predicted classes'))
    is_adversarial = _kinds(np.asarray(is_adversarial))
    groups = []
    for k in range(num_classes):
        kinds = [np.flatnonzero((predicted == k) & (is_adversarial == kind)) for kind in (0, 1)]
        fewest = min(map(len, kinds))
        if fewest == 0:
            kinds = [kind[:0] for kind in kinds]
        elif balance == 'undersample':
            kinds = [np.sort(rng.permutation(kind)[:fewest]) for kind in kinds]
        total = sum(map(len, kinds))
        # Weights of one class have mean 1 whatever the rule, so that losses compare.
        weights = [
            np.full(len(kind), total / (2 * len(kind)) if balance == 'weights' else 1.0)
            for kind in kinds
            if len(kind)
        ]
        groups.append((np.concatenate(kinds), np.concatenate([*weights, np.zeros(0)])))

    longest = max(1, *(len(index) for index, _ in groups))
    # Padding points to a row of zeros behind the last map, which is there even if no map is.
    nothing = [(0, longest - len(index)) for index, _ in groups]
    index = np.stack(
        [np.pad(g[0], n, constant_values=len(maps)) for g, n in zip(groups, nothing, strict=True)]
    )
    weight = np.stack([np.pad(g[1], n) for g, n in zip(groups, nothing, strict=True)])
    maps = np.concatenate([maps, np.zeros_like(maps, shape=(1, *maps.shape[1:]))])
    kinds = np.append(is_adversarial, False)
    return Groups(maps[index], kinds[index], weight.astype(np.float32))


def stack_groups(groups: Sequence[Groups]) -> Groups:
    """Returns the groups of several seeds as one, `[S, K, N, ...]`.

    They are padded to the longest, and on to a multiple of 64, so that banks of about as many maps
    are fitted by one compiled program.
    """

    def padded(array, count):
        return np.pad(array, [(0, 0), (0, count)] + [(0, 0)] * (array.ndim - 2))

    longest = -(-max(group.weight.shape[1] for group in groups) // 64) * 64
    return Groups(
        *(
            np.stack([padded(array, longest - array.shape[1]) for array in arrays])
            for arrays in zip(*groups, strict=True)
        )
    )


@promoting
def init(key: Array, *, grid: tuple[int, ...], **fields: Any) -> Any:
    """Returns the variables of one detector for maps of shape `grid`; `fields` are `MLP`'s."""
    return draw_kernels(key, MLP(**fields).init(key, jnp.zeros((1, *grid))))


def draw_kernels(key: Array, variables: Any) -> Any:
    """Returns variables with random kernels: uniform, of variance 1 over the inputs (LeCun's).

    One draw serves all: a draw for each, as Flax makes them, takes seconds more to compile.
    """
    shapes = [leaf.shape for path, leaf in _leaves(variables) if path[-1].key == 'kernel']
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    draws = iter(jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1), ends[:-1]))

    def drawn(path, leaf):
        if path[-1].key != 'kernel':
            return leaf
        reach = math.sqrt(3 / math.prod(leaf.shape[:-1]))
        return reach * next(draws).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(drawn, variables)


def _leaves(tree):
    """Returns the leaves of a pytree with their paths."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


@promoting
def apply(variables: Any, maps: Array) -> Array:
    """Returns the `[M]` logits of one detector, whatever its widths."""
    # By number: what jit and vmap return is sorted by name, with Dense_10 before Dense_2.
    params = variables['params']
    *hidden, _ = (params[name] for name in sorted(params, key=_layer_order))
    widths = {2: (), 4: ()}  # by the dimensions of their kernels
    for layer in hidden:
        widths[layer['kernel'].ndim] += (len(layer['bias']),)
    known = dict(features=widths[2], convolutions=widths[4], standardize='cells' in variables)
    return MLP(**known).apply(variables, maps)


def _layer_order(name):
    kind, number = name.rsplit('_', 1)
    return kind, int(number)


@promoting
def fit(
    key: Array,
    variables: Any,
    maps: Array,
    is_adversarial: Array,
    weight: Array,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> Any:
    """Fits one detector by Adam on the weighted sigmoid cross-entropy.

    Every step draws a batch with replacement from the maps that carry weight, so neither padding
    nor what the other classes hold changes the result.

    Args:
        key: JAX random key for the draws.
        variables: of one detector; one that standardizes does so by these maps.
        maps: `[N, h, w]`.
        is_adversarial: `bool[N]`.
        weight: `[N]`, 0 for padding. All zeros leave the detector as it is.
        steps, batch_size, learning_rate: of Adam; the rate falls to zero along a cosine.

    Returns:
        The fitted variables.

    Raises:
        ValueError: where values are known, for labels other than False and True or 0 and 1, weights
            that are negative or NaN, and maps with NaN.
    """
    maps, is_adversarial, weight = _checked(maps, is_adversarial, weight)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    count, order = jnp.sum(weight > 0), jnp.argsort(weight == 0, stable=True)
    params, rest = variables['params'], {}
    if 'cells' in variables:
        keep = functools.partial(jnp.where, count > 0)
        rest = {'cells': jax.tree.map(keep, _cells(maps, weight), variables['cells'])}

    def loss(params, rows):
        logits = apply({'params': params} | rest, maps[rows])
        losses = optax.sigmoid_binary_cross_entropy(logits, is_adversarial[rows])
        return jnp.mean(weight[rows] * losses)

    def step(carry, key):
        params, opt_state = carry
        rows = order[jax.random.randint(key, (batch_size,), 0, jnp.maximum(count, 1))]
        updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return {'params': params} | rest


def _checked(maps, is_adversarial, weight):
    """Returns what detectors are fitted to as arrays, if it is what it should be."""
    maps, is_adversarial, weight = map(jnp.asarray, (maps, is_adversarial, weight))
    known = [np.asarray(a) if checks.is_known(a) else None for a in (maps, is_adversarial, weight)]
    if known[0] is not None and np.isnan(known[0]).any():
        raise ValueError('Expected maps of numbers, got NaN.')
    if known[1] is not None:
        _kinds(known[1])
    if known[2] is not None and not (known[2] >= 0).all():
        raise ValueError('Expected weights of 0 and more, got negative ones or NaN.')
    is_float = jnp.issubdtype(maps.dtype, jnp.floating)
    dtype = maps.dtype if is_float else jnp.result_type(float)
    return maps.astype(dtype), is_adversarial.astype(dtype), weight.astype(dtype)


def _kinds(is_adversarial):
    """Returns what it is given, if that is False or True, or 0 or 1."""
    if not np.isin(is_adversarial, (0, 1)).all():
        raise ValueError(
            'Expected is_adversarial to be False or True, or 0 or 1, got '
            f'{is_adversarial.min()} to {is_adversarial.max()}.'
        )
    return is_adversarial


def _cells(maps, weight):
    """Returns every cell's mean and deviation over `[N, ...]` maps; nan if none carries weight."""
    weight = weight.reshape(-1, *[1] * (maps.ndim - 1))
    mean = jnp.sum(weight * maps, axis=0) / weight.sum()
    variance = jnp.sum(weight * (maps - mean) ** 2, axis=0) / weight.sum()
    # The floor is for cells that are the same in all maps.
    return {'mean': mean, 'deviation': jnp.sqrt(jnp.maximum(variance, 1e-12))}


def init_bank(
    key: Array,
    *,
    num_classes: int,
    grid: tuple[int, ...],
    features: tuple[int, ...] = MLP.features,
    convolutions: tuple[int, ...] = (),
    standardize: bool = False,
) -> Bank:
    """Returns K fresh detectors as one bank.

    Args:
        key: JAX random key.
        num_classes: K.
        grid: `(h, w)`, or the shape of whatever else the detectors see.
        features: widths of the hidden layers, the paper's by default; `()` for a linear one.
        convolutions: widths of the 3×3 layers before them.
        standardize: whether `fit_bank` brings every cell to mean 0 and deviation 1.
    """
    fields = dict(features=features, convolutions=convolutions, standardize=standardize)
    init_one = functools.partial(init, grid=grid, **fields)
    return jax.vmap(init_one)(jax.random.split(key, num_classes))


def fit_bank(
    key: Array,
    bank: Bank,
    maps: Array,
    is_adversarial: Array,
    weight: Array,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> Bank:
    """Fits all detectors at once, each on its own maps.

    Args:
        key: JAX random key; detector `k` gets `jax.random.split(key, K)[k]`.
        bank: from `init_bank`.
        maps: `[K, N, h, w]`, as `Groups` has them.
        is_adversarial: `bool[K, N]`.
        weight: `[K, N]`, 0 for padding.
        steps, batch_size, learning_rate: see `fit`.

    Returns:
        The fitted bank, equal to K separate fits.

    Raises:
        ValueError: if the shapes don't belong together, and as `fit`.
    """
    maps, is_adversarial, weight = _checked(maps, is_adversarial, weight)
    num_classes = len(jax.tree.leaves(bank)[0])
    lead = (num_classes, jnp.shape(maps)[1])
    for name, array in (('is_adversarial', is_adversarial), ('weight', weight)):
        if jnp.shape(array) != lead:
            raise ValueError(f'Expected {name} of shape {lead}, got {jnp.shape(array)}.')

    def fit_one(key, variables, maps, is_adversarial, weight):
        hyperparameters = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
        return fit(key, variables, maps, is_adversarial, weight, **hyperparameters)

    keys = jax.random.split(key, num_classes)
    return jax.vmap(fit_one)(keys, bank, maps, is_adversarial, weight)


def score(bank: Bank, maps: Array, predicted: Array) -> Array:
    """Returns `[M]` logits, above 0 for adversarial, each by the detector of that map's class.

    Memory grows with K + M, not with their product.

    Args:
        bank: K detectors.
        maps: `[M, h, w]` heatmaps.
        predicted: `[M]` integer classes that the classifier predicts for the images.

    Raises:
        ValueError: if `predicted` is not one class for each map; where classes are not known, the
            score of one without a detector is NaN.
    """
    bank, maps = jax.tree.map(jnp.asarray, bank), jnp.asarray(maps)
    num_classes = len(jax.tree.leaves(bank)[0])
    predicted = checks.classes(predicted, maps, num_classes, name='predicted classes')
    if len(maps) < num_classes:  # Each map's weights are fewer than the bank's.
        one = jax.checkpoint(lambda pair: apply(detector_for(bank, pair[1]), pair[0][None])[0])
        scores = jax.lax.map(one, (maps, predicted), batch_size=_GATHERED)
        return jnp.where((predicted < 0) | (predicted >= num_classes), jnp.nan, scores)

    @jax.checkpoint
    def add(scores, pair):
        k, variables = pair
        return jnp.where(predicted == k, apply(variables, maps), scores), None

    dtype = jax.eval_shape(apply, detector_for(bank, 0), maps).dtype
    scores = jnp.full(len(maps), jnp.nan, dtype)
    return jax.lax.scan(add, scores, (jnp.arange(num_classes), bank))[0]


def detector_for(bank: Bank, k: int) -> Any:
    """Returns the variables of the detector of class `k`."""
    return jax.tree.map(lambda leaf: leaf[k], bank)
