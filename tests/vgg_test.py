"""Laws of VGG: Table I, PyTorch's numbers, and batch normalisation's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from occjax import vgg

# Paper Table I.
TABLE_1 = [
    ('Conv2d-1', (-1, 64, 224, 224), 1_792),
    ('BatchNorm2d-2', (-1, 64, 224, 224), 128),
    ('MaxPool2d-3', (-1, 64, 112, 112), 0),
    ('Conv2d-4', (-1, 128, 112, 112), 73_856),
    ('BatchNorm2d-5', (-1, 128, 112, 112), 256),
    ('MaxPool2d-6', (-1, 128, 56, 56), 0),
    ('Conv2d-7', (-1, 256, 56, 56), 295_168),
    ('BatchNorm2d-8', (-1, 256, 56, 56), 512),
    ('Conv2d-9', (-1, 256, 56, 56), 590_080),
    ('BatchNorm2d-10', (-1, 256, 56, 56), 512),
    ('MaxPool2d-11', (-1, 256, 28, 28), 0),
    ('Conv2d-12', (-1, 512, 28, 28), 1_180_160),
    ('BatchNorm2d-13', (-1, 512, 28, 28), 1_024),
    ('Conv2d-14', (-1, 512, 28, 28), 2_359_808),
    ('BatchNorm2d-15', (-1, 512, 28, 28), 1_024),
    ('MaxPool2d-16', (-1, 512, 14, 14), 0),
    ('Conv2d-17', (-1, 512, 14, 14), 2_359_808),
    ('BatchNorm2d-18', (-1, 512, 14, 14), 1_024),
    ('Conv2d-19', (-1, 512, 14, 14), 2_359_808),
    ('BatchNorm2d-20', (-1, 512, 14, 14), 1_024),
    ('MaxPool2d-21', (-1, 512, 7, 7), 0),
    ('Linear-22', (-1, 4096), 102_764_544),
    ('Dropout-23', (-1, 4096), 0),
    ('Linear-24', (-1, 4096), 16_781_312),
    ('Dropout-25', (-1, 4096), 0),
    ('Linear-26', (-1, 10), 40_970),
]
SMALL = (8, 'M', 12, 12, 'M')


def torch_twin(plan, *, image_size, hidden, num_classes, pooled=None):
    """Returns torchvision's `vgg*_bn` of any plan and size, with random weights and statistics."""
    torch = pytest.importorskip('torch', reason='PyTorch is the oracle')
    torch.manual_seed(0)
    features, channels = [], 3
    for width in plan:
        if width == 'M':
            features.append(torch.nn.MaxPool2d(2, 2))
        else:
            conv = torch.nn.Conv2d(channels, width, 3, padding=1)
            features += [conv, torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            channels = width
    side = pooled or image_size // 2 ** plan.count('M')

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Sequential(*features)
            self.avgpool = torch.nn.AdaptiveAvgPool2d(side)
            self.classifier = torch.nn.Sequential(
                torch.nn.Linear(channels * side**2, hidden),
                torch.nn.ReLU(),
                torch.nn.Dropout(),
                torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(),
                torch.nn.Dropout(),
                torch.nn.Linear(hidden, num_classes),
            )

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

    twin = Twin()
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor.detach(), 0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return torch, twin.eval()


def arrays(twin):
    """Returns the twin's state dict as `from_torchvision` takes it."""
    return {name: tensor.numpy() for name, tensor in twin.state_dict().items()}


class SummaryTest(parameterized.TestCase):
    def test_table_1_row_by_row(self):
        rows = vgg.summary(image_size=224)
        self.assertEqual([tuple(row) for row in rows], TABLE_1)
        self.assertEqual(sum(row.parameters for row in rows), 128_812_810)

    @parameterized.parameters(('VGG11', 32), ('VGG13', 64), ('VGG16', 224), ('VGG19', (32, 64)))
    def test_counts_what_init_makes(self, name, image_size):
        settings = dict(image_size=image_size, num_classes=7, hidden=50, plan=getattr(vgg, name))
        variables = jax.eval_shape(lambda: vgg.init(jax.random.key(0), **settings))
        made = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
        self.assertEqual(sum(row.parameters for row in vgg.summary(**settings)), made)

    def test_plans_are_the_field_s(self):
        convolutions = {
            name: sum(width != 'M' for width in getattr(vgg, name))
            for name in ('VGG11', 'VGG13', 'VGG16', 'VGG19')
        }
        self.assertEqual(convolutions, {'VGG11': 8, 'VGG13': 10, 'VGG16': 13, 'VGG19': 16})


class LogitsTest(parameterized.TestCase):
    @parameterized.parameters(
        ('VGG11', 32, 64, 4), ('VGG11', 64, 64, 2), ('VGG11', 224, 32, 1), ('VGG16', 32, 64, 2)
    )
    def test_equals_pytorch(self, name, image_size, hidden, count):
        plan = getattr(vgg, name)
        torch, twin = torch_twin(plan, image_size=image_size, hidden=hidden, num_classes=10)
        images = np.random.default_rng(0).uniform(size=(count, image_size, image_size, 3))
        images = images.astype(np.float32)
        mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
        variables = vgg.from_torchvision(arrays(twin), mean=mean, std=std)
        actual = jax.jit(vgg.logits, static_argnames='plan')(variables, images, plan=plan)
        with torch.no_grad():
            normalized = ((images - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
            expected = twin(torch.tensor(normalized)).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())

    def test_pools_adaptively_as_torchvision_s_head_does(self):
        torch, twin = torch_twin(SMALL, image_size=20, hidden=16, num_classes=4, pooled=7)
        images = np.random.default_rng(0).uniform(size=(2, 20, 20, 3)).astype(np.float32)
        variables = vgg.from_torchvision(arrays(twin), mean=(0, 0, 0), std=(1, 1, 1))
        with torch.no_grad():
            expected = twin(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        actual = vgg.logits(variables, images, plan=SMALL)
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())

    def test_an_image_does_not_see_its_batch(self):
        variables = vgg.init(jax.random.key(0), image_size=(8, 12), hidden=16, plan=SMALL)
        images = jax.random.uniform(jax.random.key(1), (3, 8, 12, 3))
        together = vgg.logits(variables, images, plan=SMALL)
        alone = vgg.logits(variables, images[1:2], plan=SMALL)
        np.testing.assert_allclose(together[1:2], alone, atol=1e-5)

    def test_normalization_is_part_of_the_model(self):
        settings = dict(image_size=8, hidden=16, plan=SMALL)
        images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
        inside = vgg.init(jax.random.key(0), **settings, mean=0.4, std=0.2)
        outside = vgg.init(jax.random.key(0), **settings)
        np.testing.assert_allclose(
            vgg.logits(inside, images, plan=SMALL),
            vgg.logits(outside, (images - 0.4) / 0.2, plan=SMALL),
            atol=1e-5,
        )

    def test_weights_say_which_type_is_computed_with(self):
        """bfloat16 weights take bfloat16 products, for all that images are float32."""
        variables = vgg.init(jax.random.key(0), image_size=8, hidden=16, plan=SMALL)
        halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        halved = halved._replace(pixel_stats=variables.pixel_stats)
        images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
        self.assertEqual(vgg.features(halved, images, plan=SMALL).dtype, jnp.bfloat16)
        actual, expected = (vgg.logits(v, images, plan=SMALL) for v in (halved, variables))
        self.assertEqual(actual.dtype, jnp.bfloat16)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual.astype(float) / scale, expected / scale, atol=0.05)

    def test_refuses_what_does_not_fit(self):
        variables = vgg.init(jax.random.key(0), image_size=8, hidden=16, plan=SMALL)
        with self.assertRaisesRegex(ValueError, 'The plan has convolutions of'):
            vgg.logits(variables, jnp.zeros((1, 8, 8, 3)), plan=vgg.VGG11)
        with self.assertRaisesRegex(ValueError, 'vanish in 5 pools'):
            vgg.init(jax.random.key(0), image_size=16)
        with self.assertRaisesRegex(ValueError, r"torchvision 'vgg\*_bn'"):
            vgg.from_torchvision({'conv1.weight': np.zeros((4, 3, 7, 7))})

    def test_refuses_a_head_that_is_no_layer(self):
        """As of one that was replaced by a `Sequential`."""
        state = arrays(torch_twin(SMALL, image_size=8, hidden=16, num_classes=5)[1])
        for part in ('weight', 'bias'):
            state[f'classifier.6.0.{part}'] = state.pop(f'classifier.6.{part}')
        with self.assertRaisesRegex(ValueError, 'three classifier layers'):
            vgg.from_torchvision(state)

    @parameterized.parameters(
        (
            (1, 16, 16, 3),
            np.float32,
            r'Features \(4, 4, 12\) do not fit a linear layer of 48 inputs',
        ),
        ((1, 4, 16, 3), np.float32, None),  # the same number of features
        ((1, 12, 16, 3), np.float32, 'do not fit'),
        ((1, 3, 16, 3), np.float32, '3x16 vanish in 2 pools'),
        ((1, 8, 8, 1), np.float32, r'Expected images \[B, H, W, 3\], got \(1, 8, 8, 1\)'),
        ((8, 8, 3), np.float32, r'Expected images \[B, H, W, 3\], got \(8, 8, 3\)'),
        ((1, 8, 8, 3), np.uint8, 'images of uint8.* / 255'),
        ((1, 8, 8, 3), np.int32, 'images of int32.* / 255'),
        ((1, 8, 8, 3), bool, 'images of bool.* / 255'),
    )
    def test_refuses_images_of_another_kind(self, shape, dtype, message):
        variables = vgg.init(jax.random.key(0), image_size=8, hidden=16, plan=SMALL)
        images = np.zeros(shape, dtype)
        functions = (
            lambda: vgg.logits(variables, images, plan=SMALL),
            lambda: vgg.train_logits(variables, images, key=jax.random.key(0), plan=SMALL),
        )
        for function in functions:
            # Training on shrunk images averages features; classifying never does so unasked.
            if message and not ('do not fit' in message and function is functions[1]):
                self.assertRaisesRegex(ValueError, message, function)
            else:
                function()

    @parameterized.parameters(None, 7)
    def test_no_images_have_no_logits(self, pooled):
        size = 28 if pooled else 8
        variables = vgg.init(jax.random.key(0), image_size=size, hidden=16, plan=SMALL)
        images = jnp.zeros((0, 8, 8, 3))
        self.assertEqual(vgg.features(variables, images, plan=SMALL).shape, (0, 2, 2, 12))
        self.assertEqual(vgg.logits(variables, images, plan=SMALL).shape, (0, 10))

    def test_hessian_times_vector_is_the_gradient_s_difference(self):
        """The step is too small for a ReLU to change its side."""
        with jax.enable_x64(True):
            plan = (8, 33)
            key = jax.random.key(0)
            variables = vgg.init(key, image_size=4, hidden=16, plan=plan)
            variables = jax.tree.map(lambda leaf: leaf.astype(float), variables)
            images, vector = jax.random.uniform(jax.random.key(1), (2, 2, 4, 4, 3), float)

            @jax.jit
            def gradient(x):
                return jax.grad(lambda x: jnp.sum(vgg.logits(variables, x, plan=plan) ** 3))(x)

            step = 1e-7
            expected = (gradient(images + step * vector) - gradient(images - step * vector)) / 2
            expected = np.asarray(expected) / step
            actual = jax.jvp(gradient, (images,), (vector,))[1]
            reverse = jax.grad(lambda x: jnp.sum(gradient(x) * vector))(images)
            self.assertGreater(np.abs(expected).max(), 1e-3)
            for product in (actual, reverse):
                np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())


class TrainLogitsTest(parameterized.TestCase):
    def test_equals_pytorch_with_its_gradient_and_statistics(self):
        torch, twin = torch_twin(SMALL, image_size=8, hidden=16, num_classes=4)
        twin.train()
        for module in twin.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        images = np.random.default_rng(0).uniform(size=(6, 8, 8, 3)).astype(np.float32)
        variables = vgg.from_torchvision(
            {name: array.copy() for name, array in arrays(twin).items()},
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )

        def total(params):
            logits, batch_stats = vgg.train_logits(
                variables._replace(params=params),
                images,
                key=jax.random.key(0),
                dropout_rate=0.0,
                plan=SMALL,
            )
            return (logits**2).sum(), (logits, batch_stats)

        gradients, (logits, batch_stats) = jax.grad(total, has_aux=True)(variables.params)
        expected = twin(torch.tensor(images.transpose(0, 3, 1, 2)))
        (expected**2).sum().backward()
        largest = float(expected.detach().abs().max())
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4 * largest)
        norm, conv = twin.features[1], twin.features[3]
        np.testing.assert_allclose(batch_stats[0]['mean'], norm.running_mean.numpy(), atol=1e-5)
        np.testing.assert_allclose(batch_stats[0]['var'], norm.running_var.numpy(), atol=1e-5)
        theirs = twin.features[4].weight.grad.numpy().transpose(2, 3, 1, 0)
        ours = gradients['conv'][1]['kernel']
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
        self.assertIsInstance(conv, torch.nn.MaxPool2d)

    def test_running_statistics_reach_the_batch_s(self):
        """After many steps on one batch, `logits` and dropout-free `train_logits` agree."""
        variables = vgg.init(jax.random.key(0), image_size=8, hidden=16, plan=SMALL)
        images = jax.random.uniform(jax.random.key(1), (40, 8, 8, 3))
        step = jax.jit(
            lambda v: vgg.train_logits(
                v, images, key=jax.random.key(0), dropout_rate=0.0, plan=SMALL
            )
        )
        for _ in range(120):
            trained, batch_stats = step(variables)
            variables = variables._replace(batch_stats=batch_stats)
        evaluated = vgg.logits(variables, images, plan=SMALL)
        # What remains is the biased variance that a batch is normalised with.
        np.testing.assert_allclose(evaluated, trained, atol=0.01 * np.abs(trained).max())

    def test_dropout_is_a_function_of_the_key(self):
        variables = vgg.init(jax.random.key(0), image_size=8, hidden=64, plan=SMALL)
        images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))

        def logits(seed, rate):
            return vgg.train_logits(
                variables, images, key=jax.random.key(seed), dropout_rate=rate, plan=SMALL
            )[0]

        np.testing.assert_array_equal(logits(0, 0.5), logits(0, 0.5))
        self.assertGreater(np.abs(logits(0, 0.5) - logits(1, 0.5)).max(), 1e-3)
        mean = np.mean([logits(seed, 0.1) for seed in range(100)], axis=0)
        self.assertLess(np.abs(mean - logits(0, 0.0)).max(), 0.2 * np.abs(mean).max())


class MaxPoolTest(parameterized.TestCase):
    @parameterized.parameters((4, 6), (5, 7), (2, 2))
    def test_equals_a_naive_loop(self, height, width):
        x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
        expected = np.array(
            [
                [
                    [
                        image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1))
                        for j in range(width // 2)
                    ]
                    for i in range(height // 2)
                ]
                for image in x
            ]
        )
        np.testing.assert_array_equal(vgg.max_pool(jnp.asarray(x)), expected)
