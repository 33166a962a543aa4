"""Laws of attacks on classifier and detector, on toys whose gradients are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occjax import adaptive, attack

SHAPE = (4, 3, 2)
ATTACKS = (adaptive.joint_pgd, adaptive.selective_pgd, adaptive.orthogonal_pgd)
IMAGES = jax.random.uniform(jax.random.key(0), (6, *SHAPE))


def flat(images):
    return images.reshape(len(images), -1)


def network(seed, outputs):
    """Returns a small smooth network, `[B, H, W, C]` to `[B, outputs]`."""
    keys = jax.random.split(jax.random.key(seed))
    first = jax.random.normal(keys[0], (np.prod(SHAPE), 12)) / 3
    last = jax.random.normal(keys[1], (12, outputs))
    return lambda images: jnp.tanh(flat(images) @ first) @ last


LOGITS_FN = network(1, 3)
LABELS = jnp.argmax(LOGITS_FN(IMAGES), -1)


def margin_fn(images):
    return network(2, 1)(images)[:, 0] - 0.2


@pytest.mark.parametrize('attack_fn', ATTACKS)
@pytest.mark.parametrize('bounds', [(0.0, 1.0), None])
def test_images_stay_in_the_ball_and_in_bounds(attack_fn, bounds):
    epsilon = 0.3
    found = attack_fn(
        LOGITS_FN, margin_fn, IMAGES, LABELS, epsilon=epsilon, steps=7, step_size=0.2, bounds=bounds
    ).images
    assert np.abs(found - IMAGES).max() <= epsilon + 1e-6
    assert np.abs(found - IMAGES).max() > 0.1
    outside = (found < 0).any() or (found > 1).any()
    assert outside == (bounds is None)


@pytest.mark.parametrize('attack_fn', ATTACKS)
def test_each_image_has_its_own_ball_and_step(attack_fn):
    epsilon = np.linspace(0, 0.3, len(IMAGES)).astype(np.float32)
    settings = dict(steps=3, bounds=None)
    together = attack_fn(LOGITS_FN, margin_fn, IMAGES, LABELS, epsilon=epsilon, **settings).images
    for i, own in enumerate(epsilon):
        here = slice(i, i + 1)
        alone = attack_fn(
            LOGITS_FN, margin_fn, IMAGES[here], LABELS[here], epsilon=float(own), **settings
        ).images
        np.testing.assert_allclose(together[here], alone, atol=1e-6)


@pytest.mark.parametrize('attack_fn', ATTACKS)
def test_no_ball_no_change(attack_fn):
    found = attack_fn(LOGITS_FN, margin_fn, IMAGES, LABELS, epsilon=0.0, steps=5)
    np.testing.assert_array_equal(found.images, IMAGES)
    assert (found.steps == -1).all()


@pytest.mark.parametrize('attack_fn', ATTACKS)
def test_who_evades_is_wrong_and_silent_and_nobody_else(attack_fn):
    """By an own look at the images; of these some evade and some don't."""
    seen = set()
    for epsilon in (0.02, 0.1, 0.4):
        found = attack_fn(LOGITS_FN, margin_fn, IMAGES, LABELS, epsilon=epsilon, steps=12)
        wrong = jnp.argmax(LOGITS_FN(found.images), -1) != LABELS
        evades = wrong & (margin_fn(found.images) <= 0)
        np.testing.assert_array_equal(found.steps >= 0, evades)
        assert found.steps.max() <= 12
        seen |= set(np.asarray(evades).tolist())
    assert seen == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize('attack_fn', ATTACKS)
def test_an_image_that_evades_stays_as_it_is_and_the_steps_are_counted(attack_fn):
    """With as many steps as it took it arrives at the same image, with one less it doesn't."""
    run = functools.partial(
        attack_fn, LOGITS_FN, margin_fn, IMAGES, LABELS, epsilon=0.4, step_size=0.03
    )
    found = run(steps=20)
    taken = int(found.steps.max())
    assert taken > 1
    last = int(found.steps.argmax())
    again = run(steps=taken)
    np.testing.assert_array_equal(again.images[last], found.images[last])
    assert again.steps[last] == taken
    assert run(steps=taken - 1).steps[last] == -1


@pytest.mark.parametrize('attack_fn', ATTACKS)
def test_no_image_sees_its_batch(attack_fn):
    run = functools.partial(attack_fn, LOGITS_FN, margin_fn, epsilon=0.3, steps=8)
    together, alone = run(IMAGES, LABELS), run(IMAGES[2:3], LABELS[2:3])
    np.testing.assert_allclose(together.images[2:3], alone.images, atol=1e-6)
    np.testing.assert_array_equal(together.steps[2:3], alone.steps)


def test_an_image_that_evades_already_is_left_alone():
    wrong = (LABELS + 1) % 3
    found = adaptive.joint_pgd(
        LOGITS_FN, lambda x: -jnp.ones(len(x)), IMAGES, wrong, epsilon=0.3, steps=5
    )
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.steps, 0)


def test_without_a_weight_joint_is_pgd_on_the_classifier():
    """As the basic iterative method takes them; a detector that always calls lets none stop."""
    settings = dict(epsilon=0.2, steps=6, step_size=0.05)
    found = adaptive.joint_pgd(
        LOGITS_FN, lambda x: margin_fn(x) * 0 + 1, IMAGES, LABELS, weight=0.0, **settings
    )
    expected = attack.bim(LOGITS_FN, IMAGES, LABELS, **settings)
    np.testing.assert_allclose(found.images, expected, atol=1e-6)


def first_step(attack_fn, labels, **settings):
    """Returns the signs of the first step of an attack; a step too small to reach a border."""
    images = 0.25 + IMAGES / 2
    moved = attack_fn(
        LOGITS_FN, margin_fn, images, labels, epsilon=0.01, steps=1, step_size=0.01, **settings
    ).images
    return images, np.sign(np.asarray(moved - images))


def numeric_gradient(fn, image):
    """Returns the gradient of a number by central differences, in double precision's spirit."""
    gradient, step = np.zeros(SHAPE), 1e-2
    for where in np.ndindex(SHAPE):
        moved = np.zeros(SHAPE)
        moved[where] = step
        gradient[where] = (fn(image + moved) - fn(image - moved)) / (2 * step)
    return gradient


def loss_of(label):
    return lambda image: float(-jax.nn.log_softmax(LOGITS_FN(image[None])[0])[label])


def margin_of(image):
    return float(margin_fn(image[None])[0])


def agree(signs, gradient):
    """Whether signs are the gradient's, but where it is too small for differences to tell."""
    clear = np.abs(gradient) > 0.02 * np.abs(gradient).max()
    assert clear.sum() > SHAPE[0] * SHAPE[1]
    np.testing.assert_array_equal(signs[clear], np.sign(gradient)[clear])


@pytest.mark.parametrize('weight', [0.5, 3.0])
def test_joint_follows_the_difference_of_the_losses(weight):
    images, signs = first_step(adaptive.joint_pgd, LABELS, weight=weight)
    for image, label, sign in zip(images, LABELS, signs, strict=True):
        loss = loss_of(label)
        gradient = numeric_gradient(
            lambda x, loss=loss: loss(x) - weight * float(jax.nn.softplus(margin_of(x))), image
        )
        agree(sign, gradient)


@pytest.mark.parametrize('is_wrong', [False, True])
def test_selective_follows_the_one_that_is_not_won(is_wrong):
    labels = jnp.argmax(LOGITS_FN(0.25 + IMAGES / 2), -1)
    labels = (labels + 1) % 3 if is_wrong else labels
    images, signs = first_step(adaptive.selective_pgd, labels)
    followed = 0
    for image, label, sign in zip(images, labels, signs, strict=True):
        if is_wrong and margin_of(image) <= 0:
            assert not sign.any()
            continue
        objective = (lambda x: -margin_of(x)) if is_wrong else loss_of(label)
        agree(sign, numeric_gradient(objective, image))
        followed += 1
    assert followed


@pytest.mark.parametrize('is_wrong', [False, True])
def test_orthogonal_leaves_out_what_lies_along_the_other(is_wrong):
    labels = jnp.argmax(LOGITS_FN(0.25 + IMAGES / 2), -1)
    labels = (labels + 1) % 3 if is_wrong else labels
    images, signs = first_step(adaptive.orthogonal_pgd, labels)
    followed = 0
    for image, label, sign in zip(images, labels, signs, strict=True):
        if is_wrong and margin_of(image) <= 0:
            continue
        loss, silence = (
            numeric_gradient(fn, image) for fn in (loss_of(label), lambda x: -margin_of(x))
        )
        wanted, other = (silence, loss) if is_wrong else (loss, silence)
        agree(sign, wanted - other * (wanted * other).sum() / (other**2).sum())
        followed += 1
    assert followed


def test_a_vanishing_gradient_is_no_direction_to_avoid():
    """A detector that is flat here (a confident one underflows) takes nothing from the step."""
    for scale in (0.0, 1e-38):
        found = adaptive.orthogonal_pgd(
            LOGITS_FN, lambda x, s=scale: 1 + s * margin_fn(x), IMAGES, LABELS, epsilon=0.1, steps=1
        )
        assert np.isfinite(found.images).all()
        assert (jnp.abs(found.images - IMAGES) > 0).any()
