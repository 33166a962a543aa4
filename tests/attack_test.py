"""Laws of the attacks."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

import occjax
from occjax import adaptive, attack, names

IMAGE_SHAPE = (6, 5, 3)
KEYED = ('pgd', 'pgd_l2', 'apgd', 'square')
ASCENDING = ('bim', 'pgd', 'mi_fgsm')
ITERATED = (*ASCENDING, 'pgd_l2', 'apgd', 'square')
CLIMBING = ('fgsm', 'targeted_fgsm', 'fgsm_l2', *ASCENDING, 'pgd_l2', 'apgd')
L2 = ('fgsm_l2', 'pgd_l2')
ATTACKS = ('fgsm', 'targeted_fgsm', 'fgsm_l2', *ITERATED)


def linear_classifier(seed, classes):
    """Returns weights and the classifier that they make."""
    weights = jax.random.normal(jax.random.key(seed), (np.prod(IMAGE_SHAPE), classes))
    return weights, lambda images: images.reshape(len(images), -1) @ weights


def small_network(seed, classes=4):
    """Returns a classifier of one tanh layer, as a function of its two matrices, and these."""
    keys = jax.random.split(jax.random.key(seed))
    weights = (
        jax.random.normal(keys[0], (np.prod(IMAGE_SHAPE), 8)) / 4,
        jax.random.normal(keys[1], (8, classes)),
    )
    return lambda w, images: jnp.tanh(images.reshape(len(images), -1) @ w[0]) @ w[1], weights


def torch_model(torch, weights):
    """Returns PyTorch's twin of the small network; it too takes NHWC."""

    class Twin(torch.nn.Module):
        def forward(self, images):
            first, second = (torch.tensor(np.asarray(w)) for w in weights)
            return torch.tanh(images.flatten(1) @ first) @ second

    return Twin().eval()


def arguments(name, *, seed=3, steps=5):
    """Returns what an attack takes beside `epsilon` and `bounds`."""
    key = {'key': jax.random.key(seed)} if name in KEYED else {}
    return key | ({'steps': steps} if name in ITERATED else {})


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


class EveryAttackTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        apply, self.weights = small_network(5)
        self.logits_fn = functools.partial(apply, self.weights)
        self.images = jax.random.uniform(jax.random.key(6), (4, *IMAGE_SHAPE))
        self.labels = self.logits_fn(self.images).argmax(-1)

    def attack(self, name, images=None, labels=None, *, epsilon=0.1, bounds=(0.0, 1.0), **more):
        more = arguments(name) | more
        return getattr(attack, name)(
            self.logits_fn,
            self.images if images is None else images,
            self.labels if labels is None else labels,
            epsilon=epsilon,
            bounds=bounds,
            **more,
        )

    @parameterized.parameters(*ATTACKS)
    def test_zero_epsilon_is_bit_identical(self, name):
        images = self.images.at[0, 0, 0, 0].set(0).at[0, 0, 0, 1].set(1)
        more = {'step_size': 0.03} if name in ASCENDING else {}
        for bounds in ((0.0, 1.0), None):
            run = jax.jit(functools.partial(self.attack, name, bounds=bounds, **more))
            actual = run(images, epsilon=0.0)
            np.testing.assert_array_equal(
                np.asarray(actual).view(np.uint32), np.asarray(images).view(np.uint32)
            )

    @parameterized.parameters(*ATTACKS)
    def test_jit_changes_nothing(self, name):
        """And all numbers may be traced, those of steps included."""
        more = arguments(name) | ({'step_size': 0.03} if name in ASCENDING else {})
        traced = jax.jit(lambda images, more: self.attack(name, images, **more))(
            self.images, more | {'epsilon': 0.1}
        )
        actual = self.attack(name, epsilon=0.1, **more)
        self.assertEqual((actual.shape, actual.dtype), (self.images.shape, self.images.dtype))
        self.assertGreater(jnp.abs(actual - self.images).max(), 0.01)
        np.testing.assert_allclose(actual, traced, atol=1e-6)

    @parameterized.parameters(*ATTACKS)
    def test_an_image_does_not_see_its_batch(self, name):
        run = jax.jit(functools.partial(self.attack, name))
        together = run(self.images, self.labels)
        others = self.images.at[2:].set(0.5)
        np.testing.assert_allclose(run(others, self.labels)[:2], together[:2], atol=1e-6)
        alone = run(self.images[:2], self.labels[:2])
        np.testing.assert_allclose(alone, together[:2], atol=1e-6)

    @parameterized.parameters(*ATTACKS)
    def test_numbers_may_be_one_for_each_image(self, name):
        epsilon = jnp.array([0.0, 0.02, 0.1, 0.2])

        @jax.jit
        def run(epsilon):
            more = {'step_size': epsilon / 3} if name in ASCENDING else {}
            return self.attack(name, epsilon=epsilon, **more)

        together = run(epsilon)
        np.testing.assert_array_equal(together, run(epsilon.reshape(4, 1, 1, 1)))
        for b in range(4):
            np.testing.assert_allclose(together[b], run(epsilon[b])[b], atol=1e-6)

    @parameterized.parameters(*ITERATED)
    def test_steps_may_be_one_for_each_image(self, name):
        steps = jnp.array([0, 30, 2, 200])
        epsilon = 0.3 if name in L2 else 0.03
        run = jax.jit(functools.partial(self.attack, name, epsilon=epsilon))
        together = run(steps=steps)
        np.testing.assert_allclose(
            together, self.attack(name, epsilon=epsilon, steps=steps), atol=1e-6
        )
        for b in range(4):
            np.testing.assert_allclose(together[b], run(steps=int(steps[b]))[b], atol=1e-6)
        if name in ('bim', 'mi_fgsm', 'square'):  # The others start elsewhere.
            np.testing.assert_array_equal(together[0], self.images[0])
        self.assertGreater(jnp.abs(together - run(steps=200))[1:3].max(), 0.005)

    @hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
    @hypothesis.given(
        seed=st.integers(0, 2**31 - 1),
        epsilon=st.floats(1e-3, 0.6),
        steps=st.integers(0, 4),
        step=st.floats(0.1, 3.0),
        low=st.sampled_from([0.0, 0.1, 0.4]),
        high=st.sampled_from([0.6, 0.9, 1.0]),
    )
    def test_stays_in_the_ball_and_in_the_bounds(self, seed, epsilon, steps, step, low, high):
        images = low + (high - low) * jax.random.uniform(jax.random.key(seed), self.images.shape)
        images = jnp.clip(images, low, high)
        _, weights = small_network(seed % 1000)
        for name in ATTACKS:
            more = arguments(name, seed=seed, steps=steps)
            more |= {'step_size': step * epsilon} if name in ASCENDING else {}
            for bounds in ((low, high), None):
                actual = np.asarray(
                    jitted(name)(weights, images, more | {'epsilon': epsilon, 'bounds': bounds}),
                    np.float64,
                )
                change = (actual - images).reshape(4, -1)
                order = 2 if name in L2 else np.inf
                size = np.linalg.norm(change, ord=order, axis=-1).max()
                self.assertLessEqual(size, epsilon * (1 + 1e-5) + 2**-22, name)
                if bounds:
                    self.assertGreaterEqual(actual.min(), np.float32(low), name)
                    self.assertLessEqual(actual.max(), np.float32(high), name)

    @parameterized.parameters('targeted_fgsm', 'fgsm_l2', *ASCENDING, 'pgd_l2', 'apgd')
    def test_zero_gradient_leaves_the_image(self, name):
        self.logits_fn = lambda images: jnp.zeros((len(images), 2))
        start = self.attack(name, steps=0) if name in KEYED else self.images
        np.testing.assert_array_equal(self.attack(name), start)

    @parameterized.parameters(*ATTACKS)
    def test_without_labels_the_predicted_classes_are_left(self, name):
        if name == 'targeted_fgsm':
            return
        args = self.logits_fn, self.images
        settings = arguments(name) | {'epsilon': 0.1}
        actual = getattr(attack, name)(*args, **settings)
        np.testing.assert_array_equal(actual, self.attack(name))

    @parameterized.parameters(*CLIMBING)
    def test_climbs_the_loss_that_it_is_given(self, name):
        """Here that of another label; and of two classes' lead, whose gradient is another one."""
        others = (self.labels + 1) % 4
        actual = self.attack(name, loss_fn=lambda z, labels: attack.log_odds(z, others))
        expected = self.attack(name, labels=others)
        if name != 'apgd':  # What is misclassified, which it prefers, depends on the label.
            np.testing.assert_array_equal(actual, expected)
        self.assertGreater(jnp.abs(actual - self.attack(name)).max(), 0.01)

    @parameterized.parameters(*KEYED)
    def test_the_key_alone_decides(self, name):
        more = {'step_size': 0.002} if name == 'pgd' else {}
        more |= {'step_size': 0.02} if name == 'pgd_l2' else {}
        more |= {'steps': 0} if name == 'apgd' else {}  # Later ones meet in a corner.
        epsilon = 0.3 if name == 'pgd_l2' else 0.03
        run = jax.jit(functools.partial(self.attack, name, epsilon=epsilon, **more))
        np.testing.assert_array_equal(run(key=jax.random.key(1)), run(key=jax.random.key(1)))
        difference = jnp.abs(run(key=jax.random.key(1)) - run(key=jax.random.key(2)))
        self.assertGreater(difference.max(axis=(1, 2, 3)).min(), 0.01)
        # Two of the same in one batch draw apart.
        few = {'steps': min(1, more.get('steps', 1))}
        twins = run(self.images[:1].repeat(2, 0), self.labels[:1].repeat(2), **few)
        self.assertGreater(jnp.abs(twins[0] - twins[1]).max(), 0.01)

    @parameterized.parameters(*ATTACKS)
    def test_refuses_what_does_not_fit(self, name):
        with self.assertRaisesRegex(ValueError, 'Expected 4 integer labels'):
            self.attack(name, labels=self.labels[:3])
        with self.assertRaisesRegex(ValueError, 'Expected images of floats, got uint8'):
            self.attack(name, jnp.zeros(self.images.shape, jnp.uint8))
        for given in ('epsilon', 'steps', 'step_size', 'decay'):
            if given in inspect.signature(getattr(attack, name)).parameters:
                for value in (np.full(3, 1), [1], np.full((4, 4), 1)):
                    message = f'{given} to be an? .* or 4 of them, one for each image, got shape'
                    with self.assertRaisesRegex(ValueError, message):
                        self.attack(name, **{given: value})
                    with self.assertRaisesRegex(ValueError, message):
                        jax.jit(lambda x, k=given: self.attack(name, **{k: x}))(np.array(value))

    @pytest.mark.slow
    def test_a_classifier_can_be_trained_on_attacks(self):
        """The loss at attacked images has a gradient in the weights, though the search has none."""
        apply, weights = small_network(5)
        for name in KEYED:

            def loss(w, name=name):
                attacked = getattr(attack, name)(
                    functools.partial(apply, w),
                    self.images,
                    self.labels,
                    epsilon=0.1,
                    **arguments(name),
                )
                return (apply(w, jax.lax.stop_gradient(attacked)) ** 2).sum()

            fixed = self.attack(name)
            expected = jax.grad(lambda w, fixed=fixed: (apply(w, fixed) ** 2).sum())(weights)
            np.testing.assert_allclose(jax.grad(loss)(weights)[1], expected[1], rtol=1e-4)


@functools.cache
def jitted(name):
    """Returns an attack on the small network, compiled once for all numbers."""
    apply, _ = small_network(0)

    def run(weights, images, numbers):
        logits_fn = functools.partial(apply, weights)
        labels = logits_fn(images).argmax(-1)
        return getattr(attack, name)(logits_fn, images, labels, **numbers)

    return jax.jit(run)


class ClosedFormTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images = jax.random.uniform(jax.random.key(0), (4, *IMAGE_SHAPE))
        self.labels = jnp.array([0, 1, 1, 0])
        self.weights, self.logits_fn = linear_classifier(1, 2)
        self.args = (self.logits_fn, self.images, self.labels)

    @parameterized.product(name=ASCENDING, bounds=((0.0, 1.0), None))
    def test_on_a_linear_classifier_steps_end_in_the_corner_of_fgsm(self, name, bounds):
        corner = attack.fgsm(*self.args, epsilon=0.1, bounds=bounds)
        actual = getattr(attack, name)(
            *self.args, epsilon=0.1, bounds=bounds, **arguments(name, steps=7)
        )
        np.testing.assert_allclose(actual, corner, atol=1e-6)
        # From there no step leads on, however long.
        further = {'step_size': 0.09} | arguments(name, steps=12)
        actual = getattr(attack, name)(*self.args, epsilon=0.1, bounds=bounds, **further)
        np.testing.assert_allclose(actual, corner, atol=1e-6)

    @parameterized.parameters('bim', 'mi_fgsm')
    def test_one_step_is_fgsm(self, name):
        actual = getattr(attack, name)(*self.args, epsilon=0.1, steps=1)
        np.testing.assert_array_equal(actual, attack.fgsm(*self.args, epsilon=0.1))

    def test_the_other_of_two_classes_as_target_is_fgsm(self):
        actual = attack.targeted_fgsm(self.logits_fn, self.images, 1 - self.labels, epsilon=0.1)
        np.testing.assert_array_equal(actual, attack.fgsm(*self.args, epsilon=0.1))

    @parameterized.parameters(1.0, 1e-25, 1e18)
    def test_l2_step_goes_along_the_weights_by_epsilon(self, scale):
        """For two classes the loss gradient has the direction of w_other - w_label."""
        difference = (self.weights[:, 1] - self.weights[:, 0]).reshape(1, *IMAGE_SHAPE)
        toward_other = jnp.where(self.labels == 0, 1, -1)[:, None, None, None]
        direction = difference * toward_other / jnp.linalg.norm(difference)

        def logits_fn(images):
            # Both classes about as probable, so that the gradient is as large as the weights.
            return self.logits_fn(images - self.images) * scale

        actual = attack.fgsm_l2(logits_fn, self.images, self.labels, epsilon=0.5, bounds=None)
        np.testing.assert_allclose(actual, self.images + 0.5 * direction, atol=1e-6)
        clipped = attack.fgsm_l2(logits_fn, self.images, self.labels, epsilon=0.5)
        np.testing.assert_allclose(clipped, jnp.clip(actual, 0, 1), atol=1e-6)

    def test_pgd_starts_uniformly(self):
        """By four standard errors of the mean and of the mean square."""
        images = jnp.full((50, *IMAGE_SHAPE), 0.5)
        common = {'key': jax.random.key(0), 'epsilon': 0.2, 'steps': 0}
        start = attack.pgd(self.logits_fn, images, jnp.zeros(50, int), **common)
        unit = (np.asarray(start, np.float64) - 0.5) / 0.2
        self.assertLess(abs(unit.mean()), 4 * np.sqrt(1 / 3 / unit.size))
        self.assertLess(abs((unit**2).mean() - 1 / 3), 4 * np.sqrt(4 / 45 / unit.size))
        self.assertLess(abs(unit).max(), 1 + 1e-5)

    def test_losses(self):
        logits = jnp.array([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 5.0, 1.0]])
        labels = jnp.array([0, 1])
        expected = jnp.log(jnp.exp(logits).sum(-1) - jnp.exp(jnp.array([3.0, 2.0])))
        np.testing.assert_allclose(
            attack.log_odds(logits, labels), expected - jnp.array([3, 2]), 1e-6
        )
        np.testing.assert_allclose(attack.dlr(logits, labels), [-2 / 2.5, 3 / 4], rtol=1e-6)
        np.testing.assert_allclose(
            attack.dlr(logits * 100 + 7, labels), attack.dlr(logits, labels), rtol=1e-5
        )

    def test_pgd_l2_starts_uniformly_in_its_ball(self):
        """Of a ball in n dimensions a share r^n lies within r of the centre."""
        images = jnp.full((400, 1, 2, 1), 0.5)
        common = {'key': jax.random.key(0), 'epsilon': 0.2, 'steps': 0}

        def logits_fn(images):
            return images.reshape(len(images), -1)

        start = attack.pgd_l2(logits_fn, images, jnp.zeros(400, int), **common)
        step = (np.asarray(start, np.float64) - 0.5).reshape(400, 2) / 0.2
        share = (step**2).sum(-1)  # Is uniform from 0 to 1 in the plane.
        self.assertLess(share.max(), 1 + 1e-5)
        self.assertLess(abs(share.mean() - 1 / 2), 4 * np.sqrt(1 / 12 / 400))
        self.assertLess(np.abs(step.mean(0)).max(), 4 * np.sqrt(1 / 4 / 400))

    def test_on_a_linear_classifier_pgd_l2_ends_along_the_weights(self):
        expected = attack.fgsm_l2(*self.args, epsilon=0.5, bounds=None)
        more = {'key': jax.random.key(3), 'steps': 60, 'step_size': 0.2}
        actual = attack.pgd_l2(*self.args, epsilon=0.5, bounds=None, **more)
        np.testing.assert_allclose(actual, expected, atol=1e-3)

    @parameterized.parameters('log_odds', 'dlr')
    def test_on_a_linear_classifier_apgd_ends_in_the_corner_of_fgsm(self, loss):
        far = jnp.array([[0.0, 0.0, -1e4]])  # The logit that `dlr` takes for its unit.

        def logits_fn(images):
            return jnp.pad(self.logits_fn(images), ((0, 0), (0, 1))) + far

        labels = logits_fn(self.images).argmax(-1)
        corner = attack.fgsm(logits_fn, self.images, labels, epsilon=0.001)
        more = {'key': jax.random.key(3), 'steps': 40, 'loss_fn': getattr(attack, loss)}
        actual = attack.apgd(logits_fn, self.images, labels, epsilon=0.001, **more)
        right = logits_fn(actual).argmax(-1) == labels
        self.assertGreater(right.sum(), 1)
        np.testing.assert_allclose(actual[right], corner[right], atol=1e-6)


class NearestTest(parameterized.TestCase):
    """On a linear classifier the nearest boundary is |lead| / |difference of weights| away."""

    def setUp(self):
        super().setUp()
        self.images = jax.random.uniform(jax.random.key(0), (4, *IMAGE_SHAPE))
        self.weights, _ = linear_classifier(1, 3)

        def logits_fn(images):
            return (images - 0.5).reshape(len(images), -1) @ self.weights

        self.logits_fn, self.labels = logits_fn, logits_fn(self.images).argmax(-1)

    def distances(self, order):
        logits = np.asarray(self.logits_fn(self.images))
        found = []
        for z, k in zip(logits, self.labels, strict=True):
            apart = [np.asarray(self.weights[:, k] - self.weights[:, i]) for i in range(3)]
            found.append(
                min((z[k] - z[i]) / np.linalg.norm(apart[i], ord=order) for i in range(3) if i != k)
            )
        return np.array(found)

    def test_deepfool_steps_over_it(self):
        actual = attack.deepfool(self.logits_fn, self.images, steps=5, bounds=None)
        way = np.linalg.norm((actual - self.images).reshape(4, -1), axis=-1)
        np.testing.assert_allclose(way, 1.02 * self.distances(2), atol=3e-4)
        self.assertTrue((self.logits_fn(actual).argmax(-1) != self.labels).all())
        one = attack.deepfool(self.logits_fn, self.images, steps=5, candidates=1, bounds=None)
        way = np.linalg.norm((one - self.images).reshape(4, -1), axis=-1)
        self.assertTrue((way >= 1.02 * self.distances(2) - 3e-4).all())

    def test_carlini_wagner_moves_black_and_white_in_any_float(self):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            images = jnp.asarray(np.arange(48).reshape(1, 4, 4, 3) % 2, dtype)
            weights = jnp.asarray(np.random.default_rng(0).normal(size=(48, 3)), dtype)
            settings = dict(steps=20, binary_search_steps=2, learning_rate=1.0, initial_const=10.0)
            found = attack.carlini_wagner(
                lambda x, w=weights: x.reshape(len(x), -1) @ w, images, **settings
            )
            self.assertEqual(found.dtype, dtype)
            self.assertGreater(np.abs(np.float32(found) - np.float32(images)).max(), 0)

    def test_carlini_wagner_comes_near_it(self):
        images = 0.3 + 0.4 * self.images  # The tanh is nearly straight there.
        self.images, self.labels = images, self.logits_fn(images).argmax(-1)
        actual = attack.carlini_wagner(self.logits_fn, images, steps=400, learning_rate=1e-3)
        way = np.linalg.norm((actual - images).reshape(4, -1), axis=-1)
        self.assertTrue((self.logits_fn(actual).argmax(-1) != self.labels).all())
        self.assertTrue((way >= self.distances(2) * (1 - 1e-4)).all())
        np.testing.assert_allclose(way, self.distances(2), rtol=0.2)

    def test_minimal_epsilon_is_the_distance(self):
        fgsm = functools.partial(attack.fgsm, self.logits_fn, bounds=None)
        two = self.weights[:, :2]  # FGSM goes straight away from the label only of two classes.
        self.weights = jnp.concatenate([two, -9 * jnp.ones_like(two[:, :1])], axis=1)
        self.images = self.images.at[:].set(jnp.clip(self.images, 0.55, 1))

        def attack_fn(images, labels, *, epsilon):
            return fgsm(images, labels, epsilon=epsilon)

        self.labels = self.logits_fn(self.images).argmax(-1)
        epsilon, success = attack.minimal_epsilon(attack_fn, self.logits_fn, self.images)
        self.assertTrue(success.all())
        expected = self.distances(1)
        self.assertTrue((epsilon >= expected - 1e-6).all())
        self.assertTrue((epsilon <= expected + 1 / 2**12 + 1e-6).all())
        short, success = attack.minimal_epsilon(
            attack_fn, self.logits_fn, self.images, most=float(np.median(expected))
        )
        np.testing.assert_array_equal(success, expected <= np.median(expected))
        np.testing.assert_array_equal(np.isinf(short), ~success)

    def test_a_pixel_that_rounding_brought_out_of_bounds_does_no_harm(self):
        labels = self.logits_fn(self.images.at[:, 0, 0, 0].set(1)).argmax(-1)
        for pixel in (1, 1 + 5e-6):
            images = self.images.at[:, 0, 0, 0].set(pixel)
            found = attack.carlini_wagner(self.logits_fn, images, labels, steps=100)
            self.assertTrue((self.logits_fn(found).argmax(-1) != labels).all())

    def test_what_is_wrong_before_by_less_than_wanted_is_attacked(self):
        labels, confidence = self.logits_fn(self.images).argsort(-1)[:, -2], 4.0

        def lead(images):
            logits, rows = self.logits_fn(images), jnp.arange(len(images))
            return (logits.at[rows, labels].set(-jnp.inf).max(-1) - logits[rows, labels]).min()

        self.assertBetween(float(lead(self.images)), 0, confidence)
        found = attack.carlini_wagner(
            self.logits_fn, self.images, labels, steps=100, confidence=confidence
        )
        self.assertGreater(float(lead(found)), confidence)

    def test_a_ball_for_each_image(self):
        images = jnp.full((3, 2, 2, 3), 0.5)  # As many as channels.
        epsilon = jnp.array([0.0, 0.1, 0.4])
        for order, reach in ((jnp.inf, epsilon), (2, epsilon / np.sqrt(12))):
            found = attack.project(
                jnp.ones_like(images), images, epsilon=epsilon, bounds=None, order=order
            )
            expected = jnp.broadcast_to(0.5 + reach[:, None, None, None], images.shape)
            np.testing.assert_allclose(found, expected, atol=1e-6)

    @parameterized.parameters('carlini_wagner', 'deepfool', 'minimal_epsilon')
    def test_what_is_wrong_before_stays(self, name):
        labels = (self.labels + 1) % 3
        if name == 'minimal_epsilon':
            epsilon, success = attack.minimal_epsilon(
                lambda images, labels, *, epsilon: images, self.logits_fn, self.images, labels
            )
            np.testing.assert_array_equal(epsilon, 0)
            self.assertTrue(success.all())
            return
        actual = getattr(attack, name)(self.logits_fn, self.images, labels, steps=3)
        np.testing.assert_array_equal(actual, self.images)

    @parameterized.parameters('carlini_wagner', 'deepfool')
    def test_stays_in_bounds_and_alone(self, name):
        run = jax.jit(functools.partial(getattr(attack, name), self.logits_fn, steps=20))
        together = run(self.images)
        self.assertBetween(float(together.min()), 0, 1)
        self.assertBetween(float(together.max()), 0, 1)
        self.assertGreater(jnp.abs(together - self.images).max(), 0.01)
        others = self.images.at[2:].set(0.5)
        np.testing.assert_allclose(run(others)[:2], together[:2], atol=1e-6)


class PeerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.torch = pytest.importorskip('torch', reason='PyTorch is the oracle')
        apply, weights = small_network(7)
        self.logits_fn = functools.partial(apply, weights)
        self.images = jax.random.uniform(jax.random.key(8), (6, *IMAGE_SHAPE))
        self.labels = jnp.array([0, 3, 2, 1, 2, 0])
        self.twin = torch_model(self.torch, weights)

    def foolbox(self, name, *, epsilon=None, target=False, start=None, **more):
        foolbox = pytest.importorskip('foolbox', reason='foolbox is the peer')
        kind = foolbox.criteria.TargetedMisclassification if target else foolbox.Misclassification
        method = getattr(foolbox.attacks, name)(**more)
        if start is not None:
            # foolbox draws its own start; this one is ours.
            method.get_random_start = lambda *_: pytest.importorskip('eagerpy').astensor(
                self.tensor(start)
            )
        attacked = method.run(
            foolbox.PyTorchModel(self.twin, bounds=(0, 1), device='cpu'),
            self.tensor(self.images),
            kind(self.tensor(self.labels).long()),
            **({} if epsilon is None else {'epsilon': epsilon}),
        )
        return attacked.numpy()

    def tensor(self, array):
        return self.torch.tensor(np.array(array))

    def run_ours(self, name, **more):
        return getattr(attack, name)(self.logits_fn, self.images, self.labels, **more)

    @parameterized.parameters(0.02, 0.3)
    def test_bim_is_foolbox(self, epsilon):
        expected = self.foolbox(
            'LinfBasicIterativeAttack', epsilon=epsilon, steps=6, abs_stepsize=0.07
        )
        actual = self.run_ours('bim', epsilon=epsilon, steps=6, step_size=0.07)
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    def test_pgd_is_foolbox_from_the_same_start(self):
        common = {'epsilon': 0.1, 'key': jax.random.key(4)}
        expected = self.foolbox(
            'LinfPGD',
            epsilon=0.1,
            steps=6,
            abs_stepsize=0.01,
            start=self.run_ours('pgd', steps=0, **common),
        )
        actual = self.run_ours('pgd', steps=6, step_size=0.01, **common)
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        default = self.run_ours('pgd', steps=6, **common)
        by_hand = self.run_ours('pgd', steps=6, step_size=2.5 * 0.1 / 6, **common)
        np.testing.assert_allclose(default, by_hand, atol=1e-6)

    @parameterized.parameters(0.3, 2.0)
    def test_fgsm_l2_is_foolbox(self, epsilon):
        expected = self.foolbox('L2FastGradientAttack', epsilon=epsilon)
        np.testing.assert_allclose(self.run_ours('fgsm_l2', epsilon=epsilon), expected, atol=1e-6)

    def test_targeted_fgsm_is_foolbox(self):
        """Whose FGSM takes no target, but one step of whose iteration does."""
        expected = self.foolbox(
            'LinfBasicIterativeAttack', epsilon=0.05, target=True, steps=1, rel_stepsize=1.0
        )
        actual = self.run_ours('targeted_fgsm', epsilon=0.05)
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    @parameterized.parameters(0.0, 0.7, 1.0)
    def test_mi_fgsm_is_a_loop_in_pytorch(self, decay):
        torch, epsilon, steps, step_size = self.torch, 0.25, 8, 0.08
        clean = self.tensor(self.images)
        expected, momentum = clean.clone(), torch.zeros_like(clean)
        for _ in range(steps):
            expected.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(
                self.twin(expected), self.tensor(self.labels).long()
            )
            (gradient,) = torch.autograd.grad(loss, expected)
            norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
            momentum = decay * momentum + gradient / norm
            moved = expected.detach() + step_size * momentum.sign()
            expected = (clean + (moved - clean).clamp(-epsilon, epsilon)).clamp(0, 1)
        common = {'epsilon': epsilon, 'steps': steps, 'step_size': step_size}
        actual = self.run_ours('mi_fgsm', decay=decay, **common)
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-6)
        iterated = self.run_ours('bim', **common)
        if decay:
            self.assertGreater(jnp.abs(actual - iterated).max(), 0.01)
        else:
            np.testing.assert_allclose(actual, iterated, atol=1e-6)

    def test_pgd_l2_is_foolbox_from_the_same_start(self):
        common = {'epsilon': 1.5, 'key': jax.random.key(4)}
        start = self.run_ours('pgd_l2', steps=0, **common)
        expected = self.foolbox('L2PGD', epsilon=1.5, steps=6, abs_stepsize=0.4, start=start)
        actual = self.run_ours('pgd_l2', steps=6, step_size=0.4, **common)
        np.testing.assert_allclose(actual, expected, atol=1e-5)

    @parameterized.parameters(1, 3, 50)
    def test_deepfool_is_foolbox(self, steps):
        self.labels = self.logits_fn(self.images).argmax(-1)
        expected = self.foolbox('L2DeepFoolAttack', steps=steps, candidates=3)
        actual = self.run_ours('deepfool', steps=steps)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        self.assertGreater(jnp.abs(actual - self.images).max(), 0.01)

    def test_carlini_wagner_is_foolbox(self):
        self.labels = self.logits_fn(self.images).argmax(-1)
        settings = {'steps': 40, 'initial_const': 0.1, 'confidence': 0.2}
        settings['binary_search_steps'] = 4
        more = {'stepsize': 0.02, 'abort_early': False}
        expected = self.foolbox('L2CarliniWagnerAttack', **settings, **more)
        actual = self.run_ours('carlini_wagner', learning_rate=0.02, **settings)
        change = np.linalg.norm((actual - self.images).reshape(6, -1), axis=-1)
        self.assertGreater(change.min(), 0.01)
        np.testing.assert_allclose(actual, expected, atol=2e-4)

    @parameterized.product(loss=('log_odds', 'dlr'), steps=(1, 7, 40, 100))
    def test_apgd_is_a_loop_in_pytorch(self, loss, steps):
        """As §3 of its paper says it, from our start.

        In float64: steps go by signs of gradients, which rounding may turn. Labels are first or
        second, and stay so: at the third place the ratio of `dlr` is 1 whatever the image, and its
        gradient is rounding alone.
        """
        self.enter_context(jax.enable_x64(True))
        apply, weights = small_network(7)
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), weights)
        self.logits_fn, self.twin = (
            functools.partial(apply, weights),
            torch_model(self.torch, weights),
        )
        self.images = jnp.asarray(self.images, jnp.float64)
        torch, epsilon = self.torch, 0.01
        clean = self.tensor(self.images)
        ranked = jnp.argsort(-self.logits_fn(self.images))
        self.labels = ranked[jnp.arange(6), jnp.arange(6) % 2]
        labels = self.tensor(self.labels).long()

        def look(x):
            x = x.clone().requires_grad_(True)
            z = self.twin(x)
            rows = torch.arange(len(z))
            others = z.clone()
            others[rows, labels] = -torch.inf
            self.assertLess((z > z[rows, labels]).sum(), 2)
            if loss == 'dlr':
                sorted_ = z.sort(dim=1, descending=True).values
                value = (others.amax(1) - z[rows, labels]) / (sorted_[:, 0] - sorted_[:, 2])
            else:
                value = others.logsumexp(1) - z[rows, labels]
            (gradient,) = torch.autograd.grad(value.sum(), x)
            return value.detach().numpy(), gradient.numpy(), (z.argmax(1) != labels).numpy()

        def project(x):
            return np.clip(np.clip(x, clean - epsilon, clean + epsilon), 0, 1)

        clean_, expected = clean, []
        common = {'key': jax.random.key(2), 'epsilon': epsilon}
        starts = np.asarray(self.run_ours('apgd', steps=0, **common))
        edge = np.abs(starts - self.images).max(axis=(1, 2, 3))
        self.assertTrue((edge > 0.99 * epsilon - 0.01).all())
        clean, labels_all = np.asarray(clean_), labels
        for b in range(6):
            clean, labels = np.asarray(clean_)[b : b + 1], labels_all[b : b + 1]
            gaps, at, checkpoints = max(steps * 22 // 100, 1), 0, []
            while at < steps:
                at += gaps
                checkpoints.append(at)
                gaps = max(gaps - max(steps * 3 // 100, 1), max(steps * 6 // 100, 1))
            x = previous = starts[b : b + 1]
            f, g, wrong = look(torch.tensor(x))
            best, f_best, g_best, found = x, f, g, x if wrong else None
            size, halved, f_check, rises, last = 2 * epsilon, True, f, 0, 0
            for t in range(steps):
                a = 0.75 if t else 1.0
                ahead = project(x + size * np.sign(g))
                new = project(x + a * (ahead - x) + (1 - a) * (x - previous))
                previous, f_before = x, f
                x = new
                f, g, wrong = look(torch.tensor(x))
                rises += f > f_before
                found = x if wrong else found
                if f > f_best:
                    best, f_best, g_best = x, f, g
                if t + 1 in checkpoints:
                    few = rises <= 0.75 * (t + 1 - last)
                    stalled = not halved and f_check >= f_best
                    halved = bool(few or stalled)
                    if halved:
                        size, x, f, g = size / 2, best, f_best, g_best
                    f_check, rises, last = f_best, 0, t + 1
            expected.append(best if found is None else found)
        loss_fn = getattr(attack, loss)
        actual = self.run_ours('apgd', steps=steps, loss_fn=loss_fn, **common)
        np.testing.assert_allclose(actual, np.concatenate(expected), atol=1e-9)


class SquareTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        apply, self.weights = small_network(5)
        self.logits_fn = functools.partial(apply, self.weights)
        self.images = jax.random.uniform(jax.random.key(6), (6, *IMAGE_SHAPE))
        self.labels = self.logits_fn(self.images).argmax(-1)

    def test_breaks_a_small_network_and_leaves_what_is_broken(self):
        labels = self.labels.at[1].set((self.labels[1] + 1) % 4)
        before = self.logits_fn(self.images)
        attacked = attack.square(
            self.logits_fn, self.images, labels, key=jax.random.key(0), epsilon=0.3, steps=300
        )
        outcome = attack.outcome(before, self.logits_fn(attacked), labels)
        np.testing.assert_array_equal(outcome.successful, np.arange(6) != 1)
        np.testing.assert_array_equal(attacked[1], self.images[1])

    def test_a_tie_that_argmax_decides_for_the_label_is_no_success(self):
        """And a classifier without a gradient is attacked all the same."""

        def logits_fn(images):
            lead = jnp.round(100 * (images.mean(axis=(1, 2, 3)) - 0.5))
            return jnp.stack([lead, jnp.zeros_like(lead)], axis=-1)

        labels = jnp.zeros(6, int)
        attacked = attack.square(
            logits_fn,
            jnp.full_like(self.images, 0.55),
            labels,
            key=jax.random.key(0),
            epsilon=0.3,
            steps=300,
        )
        np.testing.assert_array_equal(logits_fn(attacked).argmax(-1), 1)

    @parameterized.parameters(1, 3)
    def test_follows_the_paper(self, channels):
        """What a classifier in NumPy was asked, replayed: stripes, squares, sides, what stays."""
        shape, steps, epsilon = (8, 8, channels), 300, 0.3
        random = np.random.default_rng(0)
        images = random.uniform(size=(5, *shape)).astype(np.float32)
        weights = random.normal(size=(np.prod(shape), 3)).astype(np.float32)
        labels = np.argmax(images.reshape(5, -1) @ weights, -1)
        # The first is right by far, and so is searched to the end.
        bias = np.zeros((5, 3), np.float32)
        bias[0, labels[0]] = 1e3
        asked = []

        def classify(images):
            asked.append(np.array(images))
            return asked[-1].reshape(5, -1) @ weights + bias

        def logits_fn(images):
            return jax.pure_callback(classify, jax.ShapeDtypeStruct((5, 3), jnp.float32), images)

        actual = jax.block_until_ready(
            attack.square(
                logits_fn,
                images,
                jnp.asarray(labels),
                key=jax.random.key(2),
                epsilon=epsilon,
                steps=steps,
                bounds=None,
            )
        )
        self.assertLen(asked, 1 + steps)

        def margin(images):
            logits = images.reshape(5, -1) @ weights + bias
            others = np.where(np.eye(3, dtype=bool)[labels], -np.inf, logits).max(-1)
            return np.take_along_axis(logits, labels[:, None], -1)[:, 0] - others

        best, lead = images, margin(images)
        boxes, rows, columns, signs = {}, set(), set(), set()
        for t, tried in enumerate(asked[1:]):
            change = (tried - images) / epsilon
            differs = (tried != best).any(-1)
            self.assertTrue(differs.any(axis=(1, 2)).all())
            if t == 0:
                np.testing.assert_allclose(abs(change), 1, rtol=1e-5)
                np.testing.assert_array_equal(change > 0, change[:, :1].repeat(8, 1) > 0)
                self.assertBetween((change > 0).mean(), 0.3, 0.7)
            else:
                progress = (t - 1) * 10_000 / steps
                halvings = sum(
                    progress > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
                )
                side = max(1, round(8 * np.sqrt(0.8 / 2**halvings)))
                for b in range(5):
                    at = np.argwhere(differs[b])
                    box = at.max(0) - at.min(0) + 1
                    self.assertLessEqual(box.max(), side)
                    boxes[side] = max(boxes.get(side, 0), box.min())
                    rows |= set(at[:, 0])
                    columns |= set(at[:, 1])
                    signs.add(tuple(change[b][tuple(at[0])] > 0))
                    for c in range(channels):
                        new = change[b, ..., c][tried[b, ..., c] != best[b, ..., c]]
                        np.testing.assert_allclose(new, new[:1].repeat(len(new)), rtol=1e-4)
            accepted = (lead >= 0) & ((t == 0) | (margin(tried) < lead))
            lead = np.where(accepted, margin(tried), lead)
            best = np.where(accepted[:, None, None, None], tried, best)
        np.testing.assert_array_equal(actual, best)
        np.testing.assert_array_equal(lead < 0, [False, True, True, True, True])
        # The largest is tried once, where it may hide at an edge among stripes of its colour.
        self.assertGreaterEqual(boxes.pop(7), 5)
        self.assertEqual(boxes, {side: side for side in (5, 4, 3, 2, 1)})
        self.assertEqual((rows, columns), (set(range(8)), set(range(8))))
        self.assertLen(signs, 2**channels)


class SignNoiseTest(parameterized.TestCase):
    def test_matched_noise_has_the_norm_of_the_attack(self):
        """Every pixel moves by epsilon, as FGSM moves all that have a gradient; half of them up."""
        images = np.full((2, 16, 16, 3), 0.5, np.float32)
        key = jax.random.key(0)
        noise = np.asarray(attack.sign_noise(images, key=key, epsilon=0.1)) - images
        np.testing.assert_allclose(np.abs(noise), 0.1, rtol=1e-5)
        self.assertAlmostEqual(np.mean(noise > 0), 0.5, delta=0.05)
        weights = np.random.default_rng(0).normal(size=(16 * 16 * 3, 4)).astype(np.float32)
        attacked = attack.fgsm(
            lambda x: x.reshape(len(x), -1) @ weights, images, np.array([0, 1]), epsilon=0.1
        )
        norms = [np.linalg.norm(x.reshape(2, -1), axis=1) for x in (noise, attacked - images)]
        np.testing.assert_allclose(*norms, rtol=1e-5)

    def test_is_clipped_and_nothing_without_epsilon(self):
        images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
        key = jax.random.key(1)
        noisy = np.asarray(attack.sign_noise(images, key=key, epsilon=0.4))
        self.assertBetween(noisy.min(), 0, 1)
        self.assertBetween(noisy.max(), 0, 1)
        np.testing.assert_array_equal(attack.sign_noise(images, key=key, epsilon=0.0), images)


class OutcomeTest(parameterized.TestCase):
    def test_every_combination(self):
        """Rows: right then wrong, right then right, wrong then another wrong, wrong then right."""
        before = jnp.array([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0], [0.1, 0.9, 0]])
        after = jnp.array([[0.1, 0.9, 0], [0.8, 0.1, 0], [0, 0.1, 0.9], [0.9, 0.1, 0]])
        outcome = attack.outcome(before, after, jnp.zeros(4, int))
        np.testing.assert_array_equal(outcome.correct_before, [True, True, False, False])
        np.testing.assert_array_equal(outcome.successful, [True, False, False, False])
        np.testing.assert_array_equal(outcome.predicted_after, [1, 0, 2, 0])


HALVES = {
    **dict.fromkeys(ATTACKS, {'epsilon': 0.1}),
    'carlini_wagner': {'steps': 20, 'binary_search_steps': 3, 'learning_rate': 0.1},
    'deepfool': {'steps': 10},
    **dict.fromkeys(('joint_pgd', 'selective_pgd', 'orthogonal_pgd'), {'epsilon': 0.1, 'steps': 5}),
}


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('name', HALVES)
def test_images_of_half_precision_are_attacked_in_float32(name, dtype):
    """The network sees images of their own type, and so what it sees last is the result."""
    apply, weights = small_network(5)
    images = jax.random.uniform(jax.random.key(6), (4, *IMAGE_SHAPE)).astype(dtype)
    settings = HALVES[name] | (arguments(name) if name in ATTACKS else {})
    seen = []

    def logits_fn(x):
        seen.append(x.dtype)
        return apply(weights, x.astype(jnp.float32))

    labels = logits_fn(images).argmax(-1)
    seen.clear()

    def run(images, logits_fn):
        if hasattr(attack, name):
            return getattr(attack, name)(logits_fn, images, labels, **settings)
        margin_fn = lambda x: x.astype(jnp.float32).mean((1, 2, 3)) - 0.5  # noqa: E731
        fn = getattr(adaptive, name)
        return fn(logits_fn, margin_fn, images, labels, **settings).images

    found = run(images, logits_fn)
    assert found.dtype == dtype
    assert {np.dtype(each) for each in seen} == {np.dtype(dtype)}
    distance = np.abs(np.asarray(found, np.float32) - np.asarray(images, np.float32)).max()
    assert distance > 0.005
    if name not in names.NEAREST:
        assert distance < 0.11
        return
    is_moved = (found != images).any((1, 2, 3))
    assert (is_moved == (logits_fn(found).argmax(-1) != labels)).all()


@pytest.mark.parametrize('steps', [0, 7, 9_999, 300_000, 2_000_000_000])
@pytest.mark.parametrize(('part', 'whole'), [(22, 100), (10, 10_000), (8000, 10_000)])
def test_schedules_hold_for_billions_of_steps(steps, part, whole):
    """Against Python's integers, which have no end."""
    found = attack.share(jnp.int32(steps), part, whole)
    np.testing.assert_array_equal(found, steps * part // whole)
