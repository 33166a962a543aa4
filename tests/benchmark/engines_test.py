"""Laws of the engines' choice and of the benchmark; no timing is one of them."""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from occjax import classifier, engine, incremental, occlusion, vgg
from occjax.benchmark import engines, peer, training
from occjax.experiment import run as run_lib
from occjax.experiment import storage
from occjax.types import UsageError
from tests.small_run import SMALL

TIMING = peer.Timing(images=3, repeats=2)

pytestmark = pytest.mark.usefixtures('small_plan')


def make_run(workdir, **flags):
    config = digits.get_config()
    config.data.image_size, config.classifier.hidden = 16, 32
    config.occlusion.size, config.occlusion.stride = 5, 4
    config.occlusion.fill = (0.2, 0.5, 0.9)
    speed = run_lib.Speed(**flags)
    return run_lib.Run(config=config, workdir=storage.open_workdir(workdir, config), speed=speed)


def random_variables(side):
    """Returns variables of which none is 0 or 1, so that none can be left out unnoticed."""
    init = functools.partial(vgg.init, image_size=side, hidden=32, plan=SMALL)
    rng = np.random.default_rng(0)

    def random(leaf):
        offset = 0.4 if len(leaf.shape) == 1 else -0.15  # Kernels have both signs.
        return jnp.asarray(rng.uniform(size=leaf.shape, low=offset, high=offset + 0.3), leaf.dtype)

    return jax.tree.map(random, jax.eval_shape(init, jax.random.key(0)))


def random_images(count, side):
    return np.random.default_rng(count).uniform(size=(count, side, side, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A benchmark, made once: its run, what it printed and what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vgg.PLANS, 'vgg11', SMALL)
        run = make_run(tmp_path_factory.mktemp('benchmark') / 'run')
        printed = engines.benchmark(run, TIMING)
    return run, printed, json.loads((run.workdir / 'benchmark.json').read_text())


def test_every_number_is_finite_and_positive(measured):
    run, printed, result = measured
    assert set(result['engines']) == {'full', 'incremental', 'approximate'}
    assert result['weights'] == 'random'
    assert result['windows_per_map'] == math.prod(run.grid)
    promised = {
        'maps_per_second',
        'windows_per_second',
        'seconds_median',
        'seconds_spread',
        'compile_seconds',
        'flops_per_map',
        'flops_per_map_in_full',
        'flops_per_second',
        'share_of_matrix_product_rate',
        'estimated_bytes',
    }
    for name, row in result['engines'].items():
        assert name in printed
        assert promised <= set(row)
        values = np.concatenate([np.ravel(row[key]) for key in promised])
        assert np.all(np.isfinite(values))
        assert np.all(values > 0)
        assert len(row['seconds']) == 2
    rates = result['matrix_product_flops_per_second']
    assert min(result['peak_memory_bytes'], *rates.values()) > 0
    assert (run.workdir / 'benchmark.png').read_bytes().startswith(b'\x89PNG')


def test_exact_engines_agree_with_the_plain_one(measured):
    for name in ('full', 'incremental'):
        row = measured[2]['engines'][name]
        assert row['largest_difference'] <= 1e-5
        assert row['ssim'] == pytest.approx(1)


def test_the_numbers_follow_from_each_other(measured):
    _, _, result = measured
    for row in result['engines'].values():
        low, high = row['seconds_spread']
        assert low <= row['seconds_median'] <= high
        assert row['maps_per_second'] == pytest.approx(3 / row['seconds_median'])
        rates = row['windows_per_second'] / row['maps_per_second']
        assert rates == pytest.approx(result['windows_per_map'])
        share = row['flops_per_second'] / result['matrix_product_flops_per_second']['float32']
        assert row['share_of_matrix_product_rate'] == pytest.approx(share)


@pytest.mark.slow
def test_another_type_of_weights_is_another_network(tmp_path):
    run = make_run(tmp_path / 'run', engine='full')
    engines.benchmark(run, TIMING._replace(dtype='bfloat16'))
    result = json.loads((run.workdir / 'benchmark.json').read_text())
    assert list(result['engines']) == ['full']
    assert 1e-5 < result['engines']['full']['largest_difference'] < 0.05


def planned(side, plan, **geometry):
    init = functools.partial(vgg.init, image_size=side, hidden=32, plan=plan)
    variables = jax.eval_shape(init, jax.random.key(0))
    fn = functools.partial(vgg.logits, plan=plan)
    return incremental.planned(fn, (side, side, 3), variables, **geometry)


def test_flops_by_hand():
    plan = planned(16, SMALL, size=5, stride=4)
    pixels = 16 * 16 * 9 * 3 * 8 + 8 * 8 * 9 * 8 * 16
    linear = 4 * 4 * 16 * 32 + 32 * 32 + 32 * 10
    full = engine.flops_per_map('full', plan)
    assert full == 9 * 2 * (pixels + linear)
    # Patches, of a window in the middle: 7, then 4 (rows 3 to 10, halved outwards), then 6.
    pixels = 7 * 7 * 9 * 3 * 8 + 6 * 6 * 9 * 8 * 16
    found = engine.flops_per_map('incremental', plan)
    assert found == pytest.approx(9 * 2 * (pixels + linear) + full / 9)


@pytest.mark.parametrize(
    ('side', 'size', 'stride', 'expected'),
    [
        (32, 30, 1, 'full'),
        (32, 15, 5, 'incremental'),
        (224, 32, 14, 'incremental'),
        (224, 16, 4, 'incremental'),
    ],
)
def test_auto_takes_what_pays(side, size, stride, expected):
    plan = planned(side, vgg.VGG11, size=size, stride=stride)
    assert engine.choose('auto', plan, 1) == expected
    for name in ('full', 'incremental'):
        assert engine.choose(name, plan, 1) == name


def test_on_a_tpu_auto_takes_what_its_compiler_calls_faster():
    small = planned(32, vgg.VGG11, size=15, stride=5)
    large = planned(224, vgg.VGG11, size=32, stride=14)
    with occlusion.compiling_for('tpu'):
        assert engine.choose('auto', large, 32) == 'incremental'
        assert engine.choose('auto', large, 2) == engine.choose('auto', small, 256) == 'full'
    assert engine.choose('auto', large, 2) == 'incremental'


@pytest.mark.parametrize('name', ('full', 'incremental'))
def test_the_engines_are_the_definition(name):
    """Also where features are averaged, as torchvision's heads of 7x7 do at another size."""
    variables = random_variables(28)
    for side in (28, 36):
        images = random_images(2, side)
        settings = dict(size=5, stride=4, fill=0.3, grid='cover', chunk_size=4)
        logits_fn = functools.partial(vgg.logits, variables, plan=SMALL)
        actual = engine.occluded_logits(logits_fn, images, engine=name, **settings)
        expected = occlusion.occluded_logits(logits_fn, images, **settings)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


def test_the_twin_is_the_same_classifier():
    torch = pytest.importorskip('torch')
    variables, images = random_variables(20), random_images(4, 20)
    twin = peer.vgg_twin(variables, image_size=20, plan=SMALL)
    actual = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    expected = vgg.logits(variables, images, plan=SMALL)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_captum_s_maps_are_ours():
    """Where windows don't overlap, captum's attribution is the loss of a logit under the window."""
    torch = pytest.importorskip('torch')
    attr = pytest.importorskip('captum.attr')
    variables, images = random_variables(20), random_images(2, 20)
    twin = peer.vgg_twin(variables, image_size=20, plan=SMALL)
    attributed = attr.Occlusion(twin).attribute(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        sliding_window_shapes=(3, 5, 5),
        strides=(3, 5, 5),
        target=torch.tensor([3, 7]),
        baselines=0.3,
    )
    settings = dict(size=5, stride=5, fill=0.3, grid='floor', chunk_size=8)
    logits_fn = functools.partial(vgg.logits, variables, plan=SMALL)
    covered = engine.occluded_logits(logits_fn, images, engine='incremental', **settings)
    lost = vgg.logits(variables, images, plan=SMALL)[:, None, None] - covered
    lost = jnp.take_along_axis(lost, np.array([3, 7])[:, None, None, None], axis=-1)[..., 0]
    scale = np.abs(covered).max()
    np.testing.assert_allclose(attributed[:, 0, 2::5, 2::5] / scale, lost / scale, atol=1e-5)


def test_a_peer_is_timed_beside_ours(tmp_path):
    pytest.importorskip('captum.attr')
    run = make_run(tmp_path / 'run', engine='full')
    printed = engines.benchmark(run, peer.Timing(images=1, repeats=1, peer='captum'))
    result = json.loads((run.workdir / 'benchmark.json').read_text())
    theirs, ours = result['peer'], result['engines']['full']
    assert theirs['windows_per_map'] == 16  # (16 - 5) / 4 is 2.75: a fourth hangs over the edge.
    assert theirs['largest_difference'] < 1e-5
    best = min(theirs['tried'], key=lambda setting: setting['seconds'])
    assert best['perturbations_per_eval'] == theirs['perturbations_per_eval']
    ratio = ours['windows_per_second'] / theirs['windows_per_second']
    assert ours['times_peer'] == pytest.approx(ratio)
    assert 'captum' in printed


def test_a_peer_that_is_not_there_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'captum.attr', None)
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setattr(engines, 'matrix_rate', None)
    with pytest.raises(UsageError, match='pip install torch captum'):
        engines.benchmark(make_run(tmp_path / 'run'), peer.Timing(peer='captum'))


@pytest.mark.slow
def test_training_steps_are_timed(tmp_path):
    run = make_run(tmp_path / 'run')
    run.config.classifier.batch_size = 4
    printed = training.benchmark(run, TIMING)
    result = json.loads((run.workdir / 'benchmark_training.json').read_text())
    row = result['steps']['occjax']
    assert len(row['seconds']) == 2
    assert row['images_per_second'] == pytest.approx(4 / np.median(row['seconds']))
    assert 'occjax' in printed
    assert 'PyTorch' not in printed


def test_the_twin_takes_the_same_step(tmp_path):
    """Without dropout, whose random numbers are each library's own, one step of Adam is one."""
    torch = pytest.importorskip('torch')
    pytest.importorskip('captum')
    variables, images = random_variables(16), random_images(4, 16)
    run = make_run(tmp_path / 'run')
    labels = np.array([1, 5, 5, 9])
    hyperparameters = dict(rate=1e-3, dropout_rate=0.0)
    losses = []
    cross_entropy = torch.nn.functional.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            'cross_entropy',
            lambda *args: losses.append(cross_entropy(*args)) or losses[-1],
        )
        step = peer.training_step(run, variables, images, labels, **hyperparameters)
        for _ in range(3):
            step()
    state, ours = classifier.init_state(variables), []
    for _ in range(3):
        state, metrics = classifier.train_step(
            state,
            images,
            labels,
            key=jax.random.key(0),
            learning_rate=1e-3,
            dropout_rate=0.0,
            plan=SMALL,
        )
        ours.append(metrics['loss'])
    np.testing.assert_allclose(ours, [float(loss.detach()) for loss in losses], rtol=1e-3)
