"""Laws of FGSM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import occjax
from occjax import attack

IMAGE_SHAPE = (6, 5, 3)


def linear_classifier(seed, classes):
    """Returns weights and the classifier that they make."""
    weights = jax.random.normal(jax.random.key(seed), (np.prod(IMAGE_SHAPE), classes))
    return weights, lambda images: images.reshape(len(images), -1) @ weights


class FgsmTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images = jax.random.uniform(jax.random.key(0), (4, *IMAGE_SHAPE))
        self.labels = jnp.array([0, 1, 1, 0])
        self.weights, self.logits_fn = linear_classifier(1, 2)

    def test_linear_classifier_closed_form(self):
        """For two classes the loss gradient has the sign of w_other - w_label."""
        difference = (self.weights[:, 1] - self.weights[:, 0]).reshape(1, *IMAGE_SHAPE)
        toward_other = jnp.where(self.labels[:, None, None, None] == 0, 1, -1)
        expected = self.images + 0.1 * jnp.sign(difference) * toward_other
        actual = occjax.fgsm(self.logits_fn, self.images, self.labels, epsilon=0.1, bounds=None)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        clipped = occjax.fgsm(self.logits_fn, self.images, self.labels, epsilon=0.1)
        np.testing.assert_allclose(clipped, np.clip(expected, 0, 1), rtol=1e-6)

    def test_zero_epsilon_is_bit_identical(self):
        images = self.images.at[0, 0, 0, 0].set(0).at[0, 0, 0, 1].set(1)
        actual = jax.jit(functools.partial(occjax.fgsm, self.logits_fn))(
            images, self.labels, epsilon=0.0
        )
        np.testing.assert_array_equal(
            np.asarray(actual).view(np.uint32), np.asarray(images).view(np.uint32)
        )

    @parameterized.parameters(0.01, 8 / 255, 0.3)
    def test_stays_in_the_ball_and_in_the_pixel_range(self, epsilon):
        actual = np.asarray(
            occjax.fgsm(self.logits_fn, self.images, self.labels, epsilon=epsilon), np.float64
        )
        self.assertLessEqual(np.abs(actual - self.images).max(), epsilon + 2**-23)
        self.assertGreater(np.abs(actual - self.images).max(), epsilon * 0.99)
        self.assertGreaterEqual(actual.min(), 0)
        self.assertLessEqual(actual.max(), 1)

    def test_zero_gradient_leaves_the_image(self):
        actual = occjax.fgsm(
            lambda images: jnp.zeros((len(images), 2)), self.images, self.labels, epsilon=0.1
        )
        np.testing.assert_array_equal(actual, self.images)

    def test_an_image_does_not_see_its_batch(self):
        together = occjax.fgsm(self.logits_fn, self.images, self.labels, epsilon=0.1)
        for b in range(4):
            one = slice(b, b + 1)
            alone = occjax.fgsm(self.logits_fn, self.images[one], self.labels[one], epsilon=0.1)
            np.testing.assert_array_equal(together[one], alone)

    def test_equals_pytorch(self):
        torch = pytest.importorskip('torch', reason='PyTorch is the oracle')
        weights, _ = linear_classifier(2, 5)

        def logits_fn(images):
            return jnp.tanh(images.reshape(len(images), -1) @ weights[:, :4]) @ weights[:4]

        labels = np.array([0, 4, 2, 3])
        actual = occjax.fgsm(logits_fn, self.images, jnp.asarray(labels), epsilon=0.05)
        images = torch.tensor(np.asarray(self.images), requires_grad=True)
        torch_weights = torch.tensor(np.asarray(weights))
        hidden = torch.tanh(images.flatten(1) @ torch_weights[:, :4])
        loss = torch.nn.functional.cross_entropy(hidden @ torch_weights[:4], torch.tensor(labels))
        loss.backward()
        expected = (images + 0.05 * images.grad.sign()).clamp(0, 1).detach().numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    @parameterized.parameters(([0, 1],), ([0.0, 1.0, 1.0, 0.0],), ([[0], [1], [1], [0]],))
    def test_refuses_other_labels(self, labels):
        with self.assertRaisesRegex(ValueError, 'Expected 4 integer labels'):
            occjax.fgsm(self.logits_fn, self.images, jnp.array(labels), epsilon=0.1)


class OutcomeTest(parameterized.TestCase):
    def test_every_combination(self):
        """Rows: right then wrong, right then right, wrong then another wrong, wrong then right."""
        before = jnp.array([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0], [0.1, 0.9, 0]])
        after = jnp.array([[0.1, 0.9, 0], [0.8, 0.1, 0], [0, 0.1, 0.9], [0.9, 0.1, 0]])
        outcome = attack.outcome(before, after, jnp.zeros(4, int))
        np.testing.assert_array_equal(outcome.correct_before, [True, True, False, False])
        np.testing.assert_array_equal(outcome.successful, [True, False, False, False])
        np.testing.assert_array_equal(outcome.predicted_after, [1, 0, 2, 0])
