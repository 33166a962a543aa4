"""What functions refuse in one sentence, and what they do right instead of silently wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import occjax
from occjax import (
    adaptive,
    attack,
    attribution,
    comparators,
    fills,
    incremental,
    occlusion,
    vgg,
    views,
)

PLAN, SIDE = (4, 'M', 8, 'M'), 8
VARIABLES = vgg.init(jax.random.key(0), image_size=SIDE, num_classes=3, hidden=8, plan=PLAN)
IMAGES = np.random.default_rng(0).uniform(size=(3, SIDE, SIDE, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2])
KEY = jax.random.key(1)
logits_fn = functools.partial(vgg.logits, VARIABLES, plan=PLAN)


def margin_fn(images):
    return images.mean((1, 2, 3)) - 0.5


WINDOWS = dict(size=3, stride=2)
ATTACKS = {
    'fgsm': occjax.fgsm,
    'targeted_fgsm': attack.targeted_fgsm,
    'fgsm_l2': attack.fgsm_l2,
    'bim': functools.partial(attack.bim, steps=2),
    'pgd': functools.partial(attack.pgd, steps=2, key=KEY),
    'mi_fgsm': functools.partial(attack.mi_fgsm, steps=2),
    'square': functools.partial(attack.square, steps=2, key=KEY),
    **{
        name: lambda fn, x, y, name=name, **kw: (
            getattr(adaptive, name)(fn, margin_fn, x, y, steps=2, **kw).images
        )
        for name in ('joint_pgd', 'selective_pgd', 'orthogonal_pgd')
    },
}
GRADIENTS = [name for name in ATTACKS if name != 'square']
SCALELESS = [name for name in GRADIENTS if name != 'joint_pgd']  # It weighs two losses.
MAPS = {
    'heatmaps': functools.partial(occjax.heatmaps, logits_fn, **WINDOWS),
    'occlusion.heatmaps': functools.partial(occlusion.heatmaps, logits_fn, **WINDOWS),
    'occluded_logits': lambda x, y, **kw: occjax.occluded_logits(logits_fn, x, **WINDOWS | kw),
    'incremental.heatmaps': functools.partial(incremental.heatmaps, logits_fn, **WINDOWS),
    'approximate heatmaps': functools.partial(
        incremental.heatmaps, logits_fn, threshold=0.5, **WINDOWS
    ),
}
ALL = {name: functools.partial(fn, logits_fn, epsilon=0.1) for name, fn in ATTACKS.items()} | MAPS

each_attack = pytest.mark.parametrize('attack_fn', ATTACKS.values(), ids=ATTACKS)
each_function = pytest.mark.parametrize('fn', ALL.values(), ids=ALL)
each_map = pytest.mark.parametrize('fn', MAPS.values(), ids=MAPS)
# All take a fill through one function, before any window is covered.
few_maps = pytest.mark.parametrize(
    'fn',
    [
        pytest.param(fn, marks=[pytest.mark.slow] * (name != 'occluded_logits'))
        for name, fn in MAPS.items()
    ],
    ids=MAPS,
)


@each_function
@pytest.mark.parametrize(
    ('images', 'message'),
    [
        ((255 * IMAGES).astype(np.uint8), 'images of floats, got uint8: .* / 255'),
        (255 * IMAGES, r'pixels from 0 to 1, got .* to 25\d.*: divide images of 0 to 255 by 255'),
        ((IMAGES - 0.5) / 0.25, 'pixels from 0 to 1, got .*normalize inside of logits_fn'),
        (np.where(IMAGES[1, 0, 0, 0] == IMAGES, np.nan, IMAGES), 'got NaN'),
        (IMAGES[0], r'images \[B, H, W, C\], at least one'),
        (IMAGES[:0], r'images \[B, H, W, C\], at least one'),
    ],
    ids=['uint8', 'of 255', 'normalized', 'NaN', 'one image', 'none'],
)
def test_images_that_are_none_are_refused(fn, images, message):
    with pytest.raises(ValueError, match=message):
        fn(images, LABELS[: len(images)])


@pytest.mark.slow
@each_function
def test_rounding_is_no_other_range(fn):
    fn(np.clip(IMAGES + 2e-7, 0, 1 + 2e-7), LABELS)


@pytest.mark.parametrize('fn', [ALL[name] for name in ALL if name != 'occluded_logits'])
@pytest.mark.parametrize('labels', [[1, 2, 3], [0, 1, -1]])
def test_labels_that_are_no_class_are_refused(fn, labels):
    """Counted from 1, or below 0."""
    with pytest.raises(ValueError, match='from 0 to 2, as there are 3 classes, got'):
        fn(IMAGES, np.array(labels))


@each_attack
@pytest.mark.parametrize('epsilon', [-0.1, np.nan, np.inf, np.array([0.1, -0.1, 0.1])])
def test_an_epsilon_that_is_no_size_is_refused(attack_fn, epsilon):
    with pytest.raises(ValueError, match='epsilon >= 0 and finite'):
        attack_fn(logits_fn, IMAGES, LABELS, epsilon=epsilon)


@pytest.mark.parametrize('settings', [dict(steps=-1), dict(steps=1.5), dict(step_size=-1.0)])
def test_steps_that_are_none_are_refused(settings):
    with pytest.raises(ValueError, match='Expected step'):
        attack.bim(logits_fn, IMAGES, LABELS, **dict(epsilon=0.1, steps=2) | settings)


@pytest.mark.slow
@each_attack
def test_an_image_out_of_bounds_moves_by_epsilon_at_most_under_jit(attack_fn):
    """There its pixels are not known: the step is clipped, and not the image."""
    images = (IMAGES - 0.5) / 0.25
    moved = jax.jit(lambda x: attack_fn(logits_fn, x, LABELS, epsilon=0.1))(images)
    distance = np.abs(moved - images)
    limit = 0.1 * np.sqrt(images[0].size) if attack_fn is attack.fgsm_l2 else 0.1
    assert distance.max() <= limit + 1e-6
    still = jax.jit(lambda x: attack_fn(logits_fn, x, LABELS, epsilon=0.0))(images)
    np.testing.assert_array_equal(still, images)


def confident(scale):
    """Returns a linear classifier of two classes that names class 0 by `scale` logits' lead."""
    weights = np.random.default_rng(3).normal(size=(SIDE * SIDE * 3, 2)).astype(np.float32)

    def fn(images):
        flat = images.reshape(len(images), -1)
        return scale * (flat @ weights * 0.01 + jnp.array([1.0, 0]))

    return fn


@pytest.mark.parametrize('attack_fn', [ATTACKS[name] for name in SCALELESS], ids=SCALELESS)
@pytest.mark.parametrize('scale', [16.0, 128.0, 1024.0, 2.0**17])
def test_a_scale_of_two_class_logits_changes_nothing(attack_fn, scale):
    """Where the label leads by 17 the cross-entropy's gradient is 0 in float32."""
    labels = np.zeros(3, int)
    expected = attack_fn(confident(1.0), IMAGES, labels, epsilon=0.05)
    found = attack_fn(confident(scale), IMAGES, labels, epsilon=0.05)
    assert (np.abs(expected - IMAGES).max(axis=(1, 2, 3)) > 0.001).all()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('attack_fn', [ATTACKS[name] for name in GRADIENTS], ids=GRADIENTS)
def test_a_saturated_network_of_many_classes_is_attacked_as_an_unsaturated_one(attack_fn):
    """The strongest other class takes over as the scale grows; the image must move all the same."""
    for scale in (50.0, 1000.0):
        moved = attack_fn(lambda x, s=scale: s * logits_fn(x), IMAGES, LABELS, epsilon=0.05)
        assert (np.abs(moved - IMAGES).max(axis=(1, 2, 3)) > 0.001).all()


def test_the_direction_is_the_cross_entropy_s():
    """Against its gradient in float64, where that does not underflow."""
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)) * 3)
        labels = jnp.array([0, 1, 2, 3, 0])

        def cross_entropy(z):
            return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).sum()

        ours = jax.grad(lambda z: attack.log_odds(z, labels).sum())(logits)
        theirs = jax.grad(cross_entropy)(logits)
        factor = 1 - jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], 1)
        np.testing.assert_allclose(ours * factor, theirs, rtol=1e-10)


@pytest.mark.parametrize('attack_fn', [ATTACKS[name] for name in GRADIENTS], ids=GRADIENTS)
def test_a_gradient_that_is_nan_moves_nothing_but_only_there(attack_fn):
    """The root of a black pixel has none; all others move as they would without it."""
    images = IMAGES.copy()
    images[0, 2, 3, 1] = 0.25

    def with_root(fn_of, x):
        root = jnp.sqrt(jnp.abs(fn_of(x[:1, 2, 3, 1])))
        return logits_fn(x).at[0, 1].add(0 * root[0])

    sound = attack_fn(lambda x: with_root(lambda p: p, x), images, LABELS, epsilon=0.1)
    broken = attack_fn(lambda x: with_root(lambda p: 0 * p, x), images, LABELS, epsilon=0.1)
    assert np.isfinite(broken).all()
    if attack_fn is not ATTACKS['pgd']:  # It starts elsewhere.
        assert broken[0, 2, 3, 1] == images[0, 2, 3, 1]
    sound, broken = np.array(sound), np.array(broken)
    sound[0], broken[0] = 0, 0
    np.testing.assert_allclose(broken, sound, atol=1e-6)
    assert np.abs(broken[1:] - images[1:]).max() > 0.001


def test_logits_that_are_nan_are_never_correct_and_never_a_success():
    nan = np.full((1, 3), np.nan)
    sure = np.eye(3)[:1]
    before, after = np.concatenate([nan, sure, sure]), np.concatenate([sure, nan, sure[:, ::-1]])
    found = attack.outcome(before, after, np.zeros(3, int))
    np.testing.assert_array_equal(found.correct_before, [False, True, True])
    np.testing.assert_array_equal(found.successful, [False, False, True])


class Counting(nn.Module):
    """A Linen classifier that is applied with `mutable`, as in training."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x.reshape(len(x), -1)))


def mutable(images):
    return Counting().init_with_output(KEY, images)


@pytest.mark.parametrize(
    ('fn', 'message'),
    [
        (lambda x: x.mean((1, 2, 3)), r'K >= 2, got shape \[\d+\]: .* jnp.stack'),
        (lambda x: x.mean((1, 2, 3))[:, None], r'K >= 2, got shape \[\d+, 1\]: .* jnp.stack'),
        (lambda x: logits_fn(x)[:1].repeat(7, 0), r'got shape \[7, 3\]'),
        (mutable, 'got a tuple: return the logits alone'),
        (lambda x: {'logits': logits_fn(x)}, 'got a dict'),
        (lambda x: jnp.argsort(logits_fn(x)), 'logits of floats, got int32'),
    ],
    ids=['one', 'sigmoid', 'batch', 'tuple', 'dict', 'integers'],
)
@pytest.mark.parametrize('use', ['heatmaps', 'fgsm', 'joint_pgd', 'square'])
def test_what_is_no_logits_is_refused(fn, message, use):
    with pytest.raises(ValueError, match=message):
        if use == 'heatmaps':
            occjax.heatmaps(fn, IMAGES, LABELS, **WINDOWS)
        else:
            ATTACKS[use](fn, IMAGES, LABELS, epsilon=0.1)


def test_a_model_in_training_mode_is_told_to_leave_it():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x.mean((1, 2)))

    net = Net()
    net.train()
    with pytest.raises(ValueError, match=r'call model\.eval\(\) first'):
        occjax.heatmaps(net, IMAGES, LABELS, **WINDOWS)
    net.eval()
    occjax.heatmaps(net, IMAGES, LABELS, **WINDOWS)


@each_map
@pytest.mark.parametrize(
    ('fill', 'message'),
    [
        (np.zeros(2), r'fill to be a number, \[3\] of them'),
        (np.zeros((SIDE, 3)), 'fill to be a number'),
        (np.zeros((2, SIDE, SIDE, 3)), 'fill to be a number'),
        (np.nan, 'fill to be numbers, got NaN'),
        (128.0, 'fill from 0 to 1, .* got 128 to 128: of 0 to 255 make fill / 255'),
        ('grey', "fill to be 'blur', 'mean', numbers or images, got 'grey'"),
    ],
)
def test_a_fill_that_does_not_fit_is_refused(fn, fill, message):
    """Of [B, C] too, even where B is W."""
    with pytest.raises(ValueError, match=message):
        fn(IMAGES, LABELS, fill=fill)


@few_maps
def test_every_form_of_a_fill_is_the_same_fill(fn):
    whole = np.broadcast_to(np.float32([0.1, 0.2, 0.3]), IMAGES.shape)
    expected = fn(IMAGES, LABELS, fill=whole)
    for fill in (whole[0, 0, 0], whole[0], whole[:1]):
        np.testing.assert_allclose(fn(IMAGES, LABELS, fill=fill), expected, atol=1e-6)
    grey = fn(IMAGES, LABELS, fill=0.25)
    np.testing.assert_allclose(fn(IMAGES, LABELS, fill=np.full(1, 0.25)), grey, atol=1e-6)


@few_maps
def test_a_fill_by_name_is_what_it_makes_of_each_image(fn):
    named = {name: np.asarray(fills.of(name, IMAGES)) for name in ('blur', 'mean')}
    for name, images in named.items():
        expected = fn(IMAGES, LABELS, fill=images)
        np.testing.assert_allclose(fn(IMAGES, LABELS, fill=name), expected, atol=1e-6)
        assert np.abs(expected - fn(IMAGES, LABELS, fill=0.5)).max() > 1e-3


@pytest.mark.parametrize('shape', [(24, 40, 3), (40, 24, 1), (2, 45, 45, 2), (2, 2, 23, 30, 3)])
def test_fills_by_name_are_scipy_s(shape):
    """Of images in any number of axes; the blur's width is the shorter side's share."""
    images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    sigma = min(shape[-3:-1]) * 10 / 224
    reach, axes = max(1, round(3 * sigma)), [0] * (len(shape) - 3)
    expected = ndimage.gaussian_filter(
        images, (*axes, sigma, sigma, 0), mode='nearest', radius=(*axes, reach, reach, 0)
    )
    np.testing.assert_allclose(fills.of('blur', images), expected, atol=1e-6)
    averages = np.mean(images, axis=(-3, -2), keepdims=True)
    np.testing.assert_allclose(fills.of('mean', images), averages + 0 * images, atol=1e-6)
    one = occlusion.occlude(images, np.array([1, 2]), size=(5, 4), fill='mean')
    np.testing.assert_allclose(one[..., 1:6, 2:6, :], averages + np.zeros((5, 4, 1)), atol=1e-6)
    np.testing.assert_array_equal(one[..., 6:, :, :], images[..., 6:, :, :])


def means(images):
    """Returns logits of two classes, of images of any size."""
    mean = images.mean((1, 2, 3))
    return jnp.stack([mean, 0.5 - mean], axis=-1)


def zeros(images):
    return np.zeros(len(images), int)


# All that takes images, as a function of them alone.
TAKING = {
    **{name: lambda x, fn=fn: fn(means, x, zeros(x), epsilon=0.1) for name, fn in ATTACKS.items()},
    **{
        name: lambda x, name=name: getattr(attack, name)(means, x, zeros(x), steps=1)
        for name in ('carlini_wagner', 'deepfool')
    },
    **{
        name: lambda x, name=name: getattr(attack, name)(
            means, x, zeros(x), key=KEY, epsilon=0.1, steps=1
        )
        for name in ('pgd_l2', 'apgd')
    },
    'sign_noise': lambda x: attack.sign_noise(x, key=KEY, epsilon=0.1),
    'minimal_epsilon': lambda x: attack.minimal_epsilon(
        functools.partial(occjax.fgsm, means), means, x, zeros(x)
    ),
    **{
        name: lambda x, fn=fn: fn(means, x, zeros(x), size=4, stride=4)
        for name, fn in (
            ('heatmaps', occjax.heatmaps),
            ('occlusion.heatmaps', occlusion.heatmaps),
            ('incremental.heatmaps', incremental.heatmaps),
        )
    },
    **{
        name: lambda x, fn=fn: fn(means, x, size=4, stride=4)
        for name, fn in (
            ('occluded_logits', occjax.occluded_logits),
            ('occlusion.occluded_logits', occlusion.occluded_logits),
            ('incremental.occluded_logits', incremental.occluded_logits),
        )
    },
    'rise': lambda x: attribution.rise(means, x, zeros(x), key=KEY, masks=1),
    **{
        name: lambda x, name=name: getattr(attribution, name)(
            means, x, zeros(x), np.zeros(x.shape[:3]), steps=1
        )
        for name in ('deletion', 'insertion')
    },
    'occlude': lambda x: occlusion.occlude(x, np.array([0, 0]), size=2),
    'blur': lambda x: fills.blur(x, sigma=1.0),
    **{f'fill {name}': lambda x, name=name: fills.of(name, x) for name in fills.FILLS},
    'viewed_logits': lambda x: views.viewed_logits(means, x, [views.flip]),
    **{f'view {name}': view for name, view in views.VIEWS.items()},
    'squeeze_bits': lambda x: comparators.squeeze_bits(x, bits=4),
    'feature_squeezing': lambda x: comparators.feature_squeezing(means, x, bits=4, size=2),
    'spectrum': comparators.spectrum,
    'magnet': lambda x: comparators.magnet(means, {}, x, temperature=10.0),
}


@pytest.mark.parametrize('name', TAKING)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_refused_in_images_of_every_size(name, value):
    """Reductions on a CPU lose NaN of 4,096 numbers and more, by its place."""
    for shape in ((1, 8, 8, 3), (60, 8, 8, 3), (2, 224, 224, 3)):
        size = np.prod(shape)
        for place in (0, 1, 12_345 % size, size - 1):
            images = np.full(shape, 0.5, np.float32)
            images.flat[place] = value
            for each in (images, jnp.asarray(images)):
                with pytest.raises(ValueError, match='Expected pixels .*got (NaN|infinity)'):
                    TAKING[name](each)


@pytest.mark.parametrize('name', TAKING)
def test_channels_first_are_told_where_channels_go(name):
    if 'blur' in name or name in ('occlude', 'fill mean'):  # Of images in any number of axes.
        return
    with pytest.raises(ValueError, match=r'\[B, H, W, C\], channels last, got shape \(2, 3, 12'):
        TAKING[name](np.full((2, 3, 12, 16), 0.5, np.float32))
    with pytest.raises(ValueError, match=r'\[B, H, W, C\], channels last'):
        TAKING[name](np.full((2, 1, 12, 12), 0.5, np.float32))


def test_rows_of_many_channels_are_images():
    """Such as a second of a heart's twelve leads; where its network fails the words are both."""
    signals = np.full((2, 1, 16, 12), 0.5, np.float32)
    assert occjax.fgsm(means, signals, zeros(signals), epsilon=0.1).shape == signals.shape
    with pytest.raises(ValueError, match='channels last') as caught:
        occjax.fgsm(lambda x: x @ jnp.ones((5, 2)), signals, zeros(signals), epsilon=0.1)
    assert isinstance(caught.value.__cause__, TypeError)


@each_attack
@pytest.mark.parametrize('epsilon', [8, 1.1, np.array([0.1, 0.1, 8])])
def test_an_epsilon_of_another_scale_is_refused(attack_fn, epsilon):
    epsilon = 30 * epsilon if attack_fn is attack.fgsm_l2 else epsilon
    with pytest.raises(
        ValueError, match=r'epsilon <= .*0 to 255 make epsilon / 255, as in 8 / 255'
    ):
        attack_fn(logits_fn, IMAGES, LABELS, epsilon=epsilon)


def test_an_epsilon_may_be_as_long_as_its_norm_and_bounds_allow():
    occjax.fgsm(logits_fn, IMAGES, LABELS, epsilon=1)
    occjax.fgsm(logits_fn, IMAGES, LABELS, epsilon=8, bounds=None)
    occjax.fgsm(lambda x: logits_fn(x / 255), 255 * IMAGES, LABELS, epsilon=8, bounds=(0, 255))
    attack.fgsm_l2(logits_fn, IMAGES, LABELS, epsilon=3.0)


@pytest.mark.parametrize('name', ['fgsm', 'pgd', 'square', 'joint_pgd', 'heatmaps', 'rise'])
def test_probabilities_are_warned_of_and_logits_are_not(name, recwarn):
    def call(fn):
        if name == 'heatmaps':
            return occjax.heatmaps(fn, IMAGES, LABELS, **WINDOWS)
        if name == 'rise':
            return attribution.rise(fn, IMAGES, LABELS, key=KEY, masks=3)
        return ATTACKS[name](fn, IMAGES, LABELS, epsilon=0.1)

    call(logits_fn)
    assert not recwarn
    with pytest.warns(UserWarning, match='rows sum to 1 .*: logits_fn must return logits, before'):
        call(lambda x: jax.nn.softmax(logits_fn(x)))
    recwarn.clear()
    jax.jit(lambda x: call(lambda x: jax.nn.softmax(logits_fn(x))))(IMAGES)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: attack.bim(logits_fn, IMAGES, LABELS, epsilon=0.1, steps=[2]), 'steps to be an'),
        (lambda: ATTACKS['joint_pgd'](logits_fn, IMAGES, LABELS, epsilon=0.1, weight=-1), 'weight'),
        (lambda: attack.pgd(logits_fn, IMAGES, epsilon=0.1, steps=1, key=0), 'random key, as jax'),
        (lambda: attack.sign_noise(IMAGES, epsilon=0.1, key=np.zeros(3)), 'random key, as jax'),
        (lambda: attribution.rise(logits_fn, IMAGES, LABELS, key=0), 'random key, as jax'),
        (lambda: attribution.rise(logits_fn, IMAGES, LABELS, key=KEY, masks=1.5), 'masks to be'),
        (lambda: comparators.init_autoencoder(0, channels=3), 'random key, as jax'),
        (lambda: comparators.squeeze_bits(IMAGES, bits=0), 'bits >= 1, got 0'),
        (lambda: comparators.squeeze_median(IMAGES, size=0), 'size >= 1, got 0'),
        (lambda: comparators.magnet(logits_fn, {}, IMAGES, temperature=0), 'temperature > 0'),
        (lambda: comparators.multi_lid(np.ones((2, 3)), np.ones((4, 3)), neighbours=5), '<= 4'),
        (lambda: views.noise(IMAGES, seed=0, epsilon=8), 'epsilon <= 1'),
        (lambda: views.shrink(IMAGES, factor=0), 'factor >= 1'),
        (lambda: fills.blur(IMAGES, sigma=0), 'sigma > 0'),
        (lambda: attack.fgsm(logits_fn, IMAGES, epsilon=0.1, bounds=(1, 0)), 'lowest, highest'),
        (lambda: attack.carlini_wagner(logits_fn, IMAGES, steps=1, bounds=None), 'the tanh needs'),
        (lambda: attack.carlini_wagner(logits_fn, IMAGES, steps=1, learning_rate=0), 'rate > 0'),
        (lambda: attack.deepfool(logits_fn, IMAGES, steps=1, candidates=0), 'candidates >= 1'),
        (lambda: occjax.fgsm(means, IMAGES, epsilon=0.1, loss_fn=attack.dlr), 'three classes'),
        (
            lambda: occjax.fgsm(lambda x: logits_fn(x).squeeze(), IMAGES[:1], epsilon=0.1),
            'your function drops the batch axis of one image',
        ),
    ],
)
def test_arguments_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=f'Expected .*{message}') as caught:
        call()
    assert '\n' not in str(caught.value)


@each_map
@pytest.mark.parametrize('sides', [0, (0, 2), (2, -1), 1.5, (2, 2, 2), '3', None, (2, 1.0)])
@pytest.mark.parametrize('name', ['size', 'stride'])
def test_sides_that_are_none_are_refused(fn, name, sides):
    with pytest.raises(ValueError, match=rf'{name} to be an integer >= 1 or two of them, \(rows'):
        fn(IMAGES, LABELS, **{name: sides})


def test_integers_are_no_images_to_occlude():
    with pytest.raises(ValueError, match='got uint8'):
        occlusion.occlude(np.zeros((4, 4, 1), np.uint8), np.array([0, 0]), size=2)


@pytest.mark.parametrize('chunk_size', [4, pytest.param(27, marks=pytest.mark.slow)])
def test_a_classifier_sees_batches_of_chunk_size(chunk_size):
    """So that a callback or a compiled function, which nothing can map, works as well."""
    expected = occjax.heatmaps(logits_fn, IMAGES, LABELS, **WINDOWS)
    sizes = []

    def foreign(images):
        sizes.append(len(images))
        return np.asarray(logits_fn(np.asarray(images)), np.float32)

    def callback(images):
        shape = jax.ShapeDtypeStruct((len(images), 3), np.float32)
        return jax.pure_callback(foreign, shape, images)

    settings = dict(**WINDOWS, chunk_size=chunk_size)
    found = occjax.heatmaps(callback, IMAGES, LABELS, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(sizes) == {chunk_size}
    batch = jax.ShapeDtypeStruct((chunk_size, SIDE, SIDE, 3), np.float32)
    compiled = jax.jit(logits_fn).lower(batch).compile()
    found = occjax.heatmaps(compiled, IMAGES, LABELS, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
