"""Laws of the classifier's defences: smooth labels, attacked batches, thermometer codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from occjax import attack, classifier, incremental, occlusion, vgg
from occjax.experiment import stages, storage
from occjax.types import UsageError
from tests.small_run import SMALL, make_run

pytestmark = pytest.mark.usefixtures('small_plan')
IMAGES = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
LABELS = jnp.arange(8) % 4


def variables(**settings):
    return vgg.init(
        jax.random.key(0), image_size=16, num_classes=4, hidden=12, plan=SMALL, **settings
    )


def loss_of_a_step(label_smoothing):
    state = classifier.init_state(variables())
    settings = dict(learning_rate=0.0, dropout_rate=0.0, plan=SMALL)
    _, values = classifier.train_step(
        state, IMAGES, LABELS, key=jax.random.key(0), label_smoothing=label_smoothing, **settings
    )
    return float(values['loss'])


def test_smooth_labels_are_a_mixture_of_all_classes():
    """Linear in the share: half of the target's loss and half of the mean over all classes."""
    logits, _ = vgg.train_logits(
        variables(), IMAGES, key=jax.random.key(0), dropout_rate=0.0, plan=SMALL
    )
    losses = -jax.nn.log_softmax(logits)
    hard = losses[jnp.arange(8), LABELS].mean()
    np.testing.assert_allclose(loss_of_a_step(0.0), hard, rtol=1e-5)
    np.testing.assert_allclose(loss_of_a_step(0.4), 0.6 * hard + 0.4 * losses.mean(), rtol=1e-5)
    integer = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    np.testing.assert_allclose(loss_of_a_step(0.0), integer, rtol=1e-5)


def test_half_of_a_batch_is_attacked_where_the_source_stands():
    source = variables()
    logits_fn = functools.partial(vgg.logits, source, plan=SMALL)
    mixed = classifier.attack_half(source, IMAGES, epsilon=0.1, plan=SMALL)
    np.testing.assert_array_equal(mixed[4:], IMAGES[4:])
    expected = attack.fgsm(logits_fn, IMAGES[:4], logits_fn(IMAGES[:4]).argmax(-1), epsilon=0.1)
    np.testing.assert_allclose(mixed[:4], expected, atol=1e-6)
    assert (jnp.abs(mixed[:4] - IMAGES[:4]).max(axis=(1, 2, 3)) > 0.09).all()


@pytest.mark.slow
def test_an_ensemble_s_batches_come_from_every_member(tmp_path, monkeypatch):
    """Each static classifier and the one in training are sources, by turns of their own."""
    run = make_run(tmp_path / 'run')
    settings = run.config.classifier
    settings.adversarial_epsilon, settings.ensemble, settings.epochs = 0.1, 2, 2
    sources, attack_half = [], classifier.attack_half

    def seen(source, images, **kwargs):
        sources.append(float(source.params['conv'][0]['kernel'].sum()))
        return attack_half(source, images, **kwargs)

    monkeypatch.setattr(classifier, 'attack_half', seen)
    stages.train(run)
    steps = 300 // settings.batch_size * settings.epochs
    assert len(sources) == steps
    static = [value for value in sources if sources.count(value) > 1]
    assert len(set(static)) == 2
    assert 0 < len(set(sources) - set(static)) < steps
    assert {path.name for path in run.workdir.glob('adversary-*')} == {'adversary-0', 'adversary-1'}
    # Again from the second epoch on: the same turns, the same classifier.
    again = make_run(tmp_path / 'again')
    again.config.classifier = settings
    with monkeypatch.context() as patch:
        patch.setattr(storage, 'save_checkpoint', stop_after(storage.save_checkpoint, 5))
        with pytest.raises(KeyboardInterrupt):
            stages.train(again)
    stages.train(again)
    ours, theirs = (jax.tree.leaves(stages.load_variables(r)) for r in (run, again))
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(left, right)


def stop_after(save, count):
    """Returns a `save_checkpoint` that is interrupted after some."""
    saved = []

    def stopping(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(args)
        if len(saved) == count:
            raise KeyboardInterrupt

    return stopping


def test_an_ensemble_needs_an_attack(tmp_path):
    config = make_run(tmp_path / 'run').config
    config.classifier.ensemble = 1
    with pytest.raises(UsageError, match='classifier.ensemble'):
        config.validate()


def test_a_thermometer_shows_which_levels_a_pixel_exceeds():
    pixels = jnp.array([0.0, 0.2, 0.25, 0.26, 0.8, 1.0]).reshape(1, 2, 3, 1)
    encoded = vgg.thermometer(pixels, 4).reshape(6, 4)
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_allclose(encoded, expected, atol=1e-6)


def test_a_thermometer_s_gradient_is_that_of_the_levels_below():
    """Every threshold below a pixel passes the gradient on, none above does."""
    pixel = jnp.full((1, 1, 1, 1), 0.6)
    weights = jnp.array([1.0, 10.0, 100.0, 1000.0])
    gradient = jax.grad(lambda x: (vgg.thermometer(x, 4) * weights).sum())(pixel)
    np.testing.assert_allclose(gradient, 11.0, rtol=1e-6)


def test_a_thermometer_keeps_channels_apart():
    image = jnp.zeros((1, 1, 1, 3)).at[..., 1].set(0.9)
    encoded = vgg.thermometer(image, 5)[0, 0, 0].reshape(3, 5)
    np.testing.assert_allclose(encoded.sum(-1), [0, 4, 0], atol=1e-6)


def test_both_engines_map_a_classifier_with_a_thermometer():
    encoded = variables(levels=6)
    assert encoded.params['conv'][0]['kernel'].shape == (3, 3, 18, 8)
    classes, where = jnp.zeros(8, int), dict(size=5, stride=4)
    logits_fn = functools.partial(vgg.logits, encoded, plan=SMALL)
    expected = occlusion.heatmaps(logits_fn, IMAGES, classes, **where)
    actual = incremental.heatmaps(logits_fn, IMAGES, classes, **where)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert expected.std() > 1e-4


def test_table_1_counts_a_thermometer_s_inputs():
    rows = vgg.summary(image_size=32, hidden=12, plan=SMALL, levels=6)
    assert rows[0].parameters == (9 * 18 + 1) * 8
    plain = vgg.summary(image_size=32, hidden=12, plan=SMALL)
    assert [r.parameters for r in rows[1:]] == [r.parameters for r in plain[1:]]
    counted = sum(
        leaf.size
        for leaf in jax.tree.leaves(
            vgg.init(jax.random.key(0), image_size=32, hidden=12, plan=SMALL, levels=6).params
        )
    )
    assert sum(row.parameters for row in rows) == counted
