"""Laws of the whole experiment, on a small VGG and a handful of digits."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from occjax import (
    attack,
    benchmark,
    classifier,
    data,
    evaluation,
    metrics,
    occlusion,
    stages,
    storage,
    vgg,
)
from occjax import run as run_lib
from occjax.types import Batch, HeatmapSet, UsageError

SMALL = (8, 'M', 16, 'M')


@pytest.fixture(autouse=True)
def small_plan(monkeypatch):
    monkeypatch.setitem(run_lib.PLANS, 'vgg11', SMALL)


def make_run(workdir, **flags):
    """Returns a run that takes seconds; its attack succeeds often and for several classes."""
    config = digits.get_config()
    config.data.image_size, config.data.train_images, config.data.test_images = 16, 300, 90
    config.classifier.hidden, config.classifier.epochs = 32, 3
    config.classifier.learning_rate = 3e-3
    config.attack.epsilon = 0.3
    config.occlusion.size, config.occlusion.stride = 5, 4
    config.detector.steps = 30
    config.validate()
    return run_lib.Run(config=config, workdir=storage.open_workdir(workdir, config), **flags)


def run_all(run):
    return [stage(run) for stage in stages.STAGES.values()][-1]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A whole run, made once; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_lib.PLANS, 'vgg11', SMALL)
        run = make_run(tmp_path_factory.mktemp('finished') / 'run')
        return run, run_all(run)


def test_every_artifact_of_a_run_exists(finished):
    run, tables = finished
    report = run.workdir / 'report'
    for name in ('results.json', 'tables.md', 'report.html', 'fig1.png', 'fig2.png', 'fig3.png'):
        assert (report / name).stat().st_size > 0, name
    assert 'Table I' in tables
    results = json.loads((report / 'results.json').read_text())
    assert results['manifest']['config'] == json.loads((run.workdir / 'config.json').read_text())
    assert set(results['detection']) == {'paper', 'held_out'}
    assert 'nan' not in (report / 'tables.md').read_text().lower().split()


def test_stored_maps_are_the_classifier_s(finished):
    """Every stored number again, from the weights and the images, one image at a time."""
    run, _ = finished
    variables = jax.device_get(stages.load_variables(run))
    maps, _ = evaluation.load_shards(run, 'test')
    assert maps.is_adversarial.any()
    assert not maps.is_adversarial.all()
    split, geometry = run.dataset.test, run.config.occlusion

    def logits_fn(images):
        return vgg.logits(variables, images, plan=SMALL)

    for m in (0, len(maps) // 2, len(maps) - 1):
        image = data.take(split, maps.image_id[m : m + 1])
        label = split.labels[maps.image_id[m : m + 1]]
        assert maps.label[m] == label
        assert logits_fn(image).argmax() == label, 'only correct images have maps'
        if maps.is_adversarial[m]:
            image = attack.fgsm(logits_fn, image, label, epsilon=run.config.attack.epsilon)
            assert logits_fn(image).argmax() != label, 'and only successful attacks'
        np.testing.assert_allclose(maps.unoccluded[m], logits_fn(image)[0], atol=1e-4)
        expected = occlusion.heatmaps(
            logits_fn,
            image,
            np.array([maps.predicted[m]]),
            size=geometry.size,
            stride=geometry.stride,
        )
        np.testing.assert_allclose(maps.maps[m], expected[0], atol=1e-4)


def test_every_image_is_counted_once(finished):
    """Maps of correct images are exactly the accuracy's numerator, and ids don't repeat."""
    run, _ = finished
    accuracies = storage.read_json(run.workdir / 'classifier' / 'metrics.json', mode='train')
    for name in stages.SPLITS:
        maps, shards = evaluation.load_shards(run, name)
        correct = maps.select(~maps.is_adversarial)
        assert len(np.unique(correct.image_id)) == len(correct)
        assert len(correct) == sum(shard['attempted'] for shard in shards)
        split = getattr(run.dataset, name)
        assert accuracies[f'{name}_accuracy'] == pytest.approx(len(correct) / len(split))


def test_results_are_the_stored_maps_counted_by_hand(finished):
    run, _ = finished
    results = json.loads((run.workdir / 'report' / 'results.json').read_text())
    maps, _ = evaluation.load_shards(run, 'train')
    for k, name in enumerate(run.dataset.class_names):
        counted = results['heatmaps'][name]
        for kind, flag in (('correct', False), ('adversarial', True)):
            here = (maps.predicted == k) & (maps.is_adversarial == flag)
            assert counted[kind] == here.sum()
    attacked = results['attack']
    assert attacked['successful'] == maps.is_adversarial.sum()
    assert attacked['success_rate'] == pytest.approx(
        maps.is_adversarial.sum() / (~maps.is_adversarial).sum()
    )
    assert 0 < attacked['max_perturbation'] <= 0.3 + 2**-23
    for protocol in evaluation.PROTOCOLS:
        _, judged = evaluation.divide_maps(run, protocol)
        detection = results['detection'][protocol]
        entries = detection['per_class'].values()
        assert sum(entry['n_adversarial'] for entry in entries) == judged.is_adversarial.sum()
        values = [e['balanced_accuracy'] for e in entries if e['balanced_accuracy'] is not None]
        assert detection['overall']['balanced_accuracy'] == pytest.approx(np.mean(values))
        assert set(detection['baselines']) == set(metrics.BASELINES)


def test_an_image_and_its_twin_stand_on_one_side(finished):
    run, _ = finished
    fitted, judged = evaluation.divide_maps(run, 'held_out')
    assert not set(fitted.image_id) & set(judged.image_id)
    maps, _ = evaluation.load_shards(run, 'test')
    assert len(fitted) + len(judged) == len(maps)


def test_the_paper_s_split_is_80_to_20_of_all_maps(finished):
    run, _ = finished
    fitted, judged = evaluation.divide_maps(run, 'paper')
    maps, _ = evaluation.load_shards(run, 'train')
    assert (len(fitted), len(judged)) == (
        round(0.8 * len(maps)),
        len(maps) - round(0.8 * len(maps)),
    )


def test_a_finished_run_computes_nothing_again(finished, monkeypatch):
    run, tables = finished
    for name in ('attack_batch', 'map_batch', 'fit_bank', 'predict'):
        monkeypatch.setattr(stages, name, None)
    assert run_all(make_run(run.workdir)) == tables


def test_resuming_equals_an_uninterrupted_run(finished, tmp_path, monkeypatch):
    """Killed in the second epoch, then after the first shard, then going on with other flags."""
    run, tables = finished
    interrupted = make_run(tmp_path / 'run')

    class Killed(Exception):
        pass

    def kill_after(count, fn):
        calls = []

        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) > count:
                raise Killed
            return fn(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(classifier, 'train_step', kill_after(6, classifier.train_step))
        run_all(interrupted)
    assert storage.latest_step(interrupted.workdir / 'classifier') == 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages, 'collect', kill_after(1, stages.collect))
        run_all(make_run(interrupted.workdir))
    assert len(list((interrupted.workdir / 'heatmaps').glob('*.npz'))) == 1
    run_all(make_run(interrupted.workdir, eval_batch_size=12, chunk_size=7))
    for name in stages.SPLITS:
        ours, theirs = (evaluation.load_shards(r, name)[0] for r in (interrupted, run))
        for field in dataclasses.fields(HeatmapSet):
            ours_field, theirs_field = getattr(ours, field.name), getattr(theirs, field.name)
            np.testing.assert_allclose(ours_field, theirs_field, atol=1e-4)


@pytest.mark.parametrize(
    'flags',
    [
        dict(chunk_size=5),
        dict(eval_batch_size=12),
        dict(engine='incremental'),
        dict(engine='full', memory_limit=2**30),
    ],
)
def test_how_fast_changes_no_number(finished, tmp_path, flags):
    run, _ = finished
    other = make_run(tmp_path / 'run', **flags)
    variables = stages.load_variables(run)
    ids = np.arange(20)
    ours, theirs = (stages.collect(r, variables, run.dataset.test, ids) for r in (other, run))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


def test_the_memory_limit_and_the_engine_reach_the_maps(finished, tmp_path, monkeypatch):
    run, _ = finished
    seen, map_batch = {}, stages.map_batch
    monkeypatch.setattr(
        stages,
        'map_batch',
        lambda *args, **kwargs: seen.update(kwargs) or map_batch(*args, **kwargs),
    )
    variables, ids = stages.load_variables(run), np.arange(8)
    for name in ('full', 'incremental'):
        limit = int(0.97 * jax.device_count() * run.mapping(10, name).estimated_bytes)
        other = make_run(tmp_path / 'run', engine=name, memory_limit=limit)
        mapping = other.mapping(10)
        assert mapping.estimated_bytes * jax.device_count() <= limit
        assert mapping.chunk_size < run.mapping(10, name).chunk_size
        stages.collect(other, variables, run.dataset.test, ids)
        assert (seen['engine'], seen['chunk_size']) == (name, mapping.chunk_size)
    with pytest.raises(UsageError, match='--memory_limit='):
        too_small = make_run(tmp_path / 'run', memory_limit=2**20)
        stages.collect(too_small, variables, run.dataset.test, ids)


def test_the_benchmark_takes_what_is_trained(finished, tmp_path):
    run, _ = finished
    shutil.copytree(run.workdir, tmp_path / 'run')
    benchmark.benchmark(
        make_run(tmp_path / 'run', engine='full', benchmark_images=2, benchmark_repeats=1)
    )
    result = json.loads((tmp_path / 'run' / 'benchmark.json').read_text())
    assert result['weights'] == 'trained'


def test_four_devices_are_one(finished):
    """Batches divide over the four devices of the tests; one of them gives the same numbers."""
    run, _ = finished
    assert len(run.mesh.devices) == 4
    variables = jax.device_get(stages.load_variables(run))
    images = data.take(run.dataset.test, np.arange(4))
    geometry = dict(size=5, stride=4, grid='paper', chunk_size=None, plan=SMALL)
    fill = np.array([0.5], np.float32)
    four = stages.map_batch(
        run.replicate(variables), run.divide(images), fill, mesh=run.mesh, **geometry
    )
    assert len(four.sharding.device_set) == 4
    alone = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    one = stages.map_batch(variables, images, fill, mesh=alone, **geometry)
    np.testing.assert_allclose(four, one, atol=1e-4)


def test_a_classifier_that_is_never_right_is_reported_too(finished, tmp_path, monkeypatch):
    """No image is correct, so there is no map of either kind: dashes, no NaN, no error."""
    run = make_run(tmp_path / 'run')
    shutil.copytree(finished[0].workdir / 'classifier', run.workdir / 'classifier')

    def never_right(before, after, labels):
        nothing = np.zeros(len(labels), bool)
        return attack.Outcome(nothing, nothing, after.argmax(-1))

    monkeypatch.setattr(attack, 'outcome', never_right)
    tables = run_all(run)
    assert 'no correct or adversarial maps' in tables
    results = json.loads((run.workdir / 'report' / 'results.json').read_text())
    assert results['attack']['success_rate'] is None
    assert results['detection']['paper']['overall']['auroc'] is None


def test_other_images_are_refused(finished):
    run, _ = finished
    other = make_run(run.workdir)
    digits_load = data.load

    def load(*args, **kwargs):
        dataset = digits_load(*args, **kwargs)
        return dataset._replace(class_names=dataset.class_names[::-1])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match='other images'):
        patch.setattr(data, 'load', load)
        _ = other.dataset
    assert run.description['class_names'] == list(run.dataset.class_names)


@pytest.mark.parametrize('mode', ['heatmaps', 'detectors', 'report'])
def test_a_stage_without_its_input_says_which_mode_makes_it(tmp_path, mode):
    with pytest.raises(UsageError, match=r'does not exist: run --mode=\w+ first'):
        stages.STAGES[mode](make_run(tmp_path / 'run'))


def test_in_batches_pads_and_cuts():
    run = run_lib.Run(config=digits.get_config(), workdir=None)
    seen = []

    def fn(x):
        seen.append(len(x))
        return {'twice': 2 * x}

    array = np.arange(11.0, dtype=np.float32)
    for batch_size in (4, 8, 12, 20):
        seen.clear()
        np.testing.assert_array_equal(
            run.in_batches(fn, array, batch_size=batch_size)['twice'], 2 * array
        )
        assert set(seen) == {batch_size}


def test_evaluate_divides_once():
    """Five images in batches of two; batch averages would give 2/3 for one hit in the last."""
    labels = np.zeros(2, np.int32)
    real = [np.array([True, True]), np.array([True, True]), np.array([True, False])]
    guesses = iter([np.array([1, 1]), np.array([1, 0]), np.array([0, 0])])
    batches = [Batch(np.zeros((2, 1, 1, 1)), labels, labels, is_real) for is_real in real]
    assert classifier.evaluate(lambda images: next(guesses), batches) == 2 / 5
