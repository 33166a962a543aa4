"""Laws of the whole experiment, on a small VGG and a handful of digits."""

import base64
import dataclasses
import gzip
import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from occjax import attack, classifier, data, detector, metrics, names, occlusion, vgg
from occjax.benchmark import engines, fidelity, peer
from occjax.experiment import devices, judging, shard, stages, storage, store
from occjax.experiment import run as run_lib
from occjax.progress import Progress
from occjax.streams import Stream
from occjax.types import Batch, HeatmapSet, UsageError
from tests import small_run
from tests.small_run import SMALL, make_run, run_all

pytestmark = pytest.mark.usefixtures('small_plan')


def test_every_artifact_of_a_run_is_what_it_is_called(finished):
    run, tables = finished
    report = run.workdir / 'report'
    page, written = ((report / name).read_text() for name in ('report.html', 'tables.md'))
    for name in ('fig1.png', 'fig2.png', 'fig3.png'):
        with Image.open(report / name) as picture:
            pixels = np.asarray(picture.convert('L'))
        assert np.ptp(pixels) > 100 and min(pixels.shape) > 100, name
        assert base64.b64encode((report / name).read_bytes()).decode() in page, name
    titles = re.findall(r'^## (.*)', written, re.MULTILINE)
    assert titles and all(title in tables for title in titles)
    assert 'Table I.' in written and 'Table I.' in page
    results = json.loads((report / 'results.json').read_text())
    stored = json.loads((run.workdir / 'config.json').read_text())
    assert results['manifest']['config'] | {'digest': stored['digest']} == stored
    assert set(results['detection']) == {'paper', 'held_out'}
    assert 'nan' not in (report / 'tables.md').read_text().lower().split()


def test_stored_maps_are_the_classifier_s(finished):
    """Every stored number again, from the weights and the images, one image at a time."""
    run, _ = finished
    variables = jax.device_get(stages.load_variables(run))
    maps, _ = store.load_shards(run, 'test')
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
    accuracies = store.load_metrics(run)
    for name in names.SPLITS:
        maps, shards = store.load_shards(run, name)
        correct = maps.select(~maps.is_adversarial)
        assert len(np.unique(correct.image_id)) == len(correct)
        assert len(correct) == sum(shard['attempted'] for shard in shards)
        split = getattr(run.dataset, name)
        assert accuracies[f'{name}_accuracy'] == pytest.approx(len(correct) / len(split))


def test_results_are_the_stored_maps_counted_by_hand(finished):
    run, _ = finished
    results = json.loads((run.workdir / 'report' / 'results.json').read_text())
    maps, _ = store.load_shards(run, 'train')
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
    for protocol in store.PROTOCOLS:
        division = store.divide(run, protocol)
        detection = results['detection'][protocol]
        rivals = {'linear_probe', 'all_logits', *metrics.BASELINES}
        assert set(detection['baselines']) == rivals
        judged = [division.maps.select(judged) for judged in division.is_judged]
        for k, name in enumerate(run.dataset.class_names):
            counted = [np.sum(maps.is_adversarial & (maps.predicted == k)) for maps in judged]
            assert detection['per_class'][name]['n_adversarial'] == round(np.mean(counted))
        counted = [division.maps.select(row) for row in division.is_counted]
        attacked = round(np.mean([m.is_adversarial.sum() for m in counted]))
        assert detection['overall']['n_adversarial'] == attacked
        for name, curve in detection['roc'].items():
            entry = detection['overall'] if name == 'detector' else detection['baselines'][name]
            assert curve['auroc'] == pytest.approx(entry['auroc'])


def test_controls_are_what_they_are_called(finished):
    """Again from weights and images: the label, the class named, and how far from the image."""
    run, _ = finished
    variables, split = jax.device_get(stages.load_variables(run)), run.dataset.test
    controls = store.load_controls(run)
    maps, _ = store.load_shards(run, 'test')
    correct = set(maps.image_id[~maps.is_adversarial])
    attacked = set(maps.image_id[maps.is_adversarial])
    everything = set(range(len(split)))
    assert set(controls['misclassified'].image_id) == everything - correct
    assert set(controls['failed'].image_id) == correct - attacked
    assert set(controls['noise'].image_id) <= correct
    assert len(controls['noise']) > 1
    for kind, part in controls.items():
        assert np.array_equal(part.label, split.labels[part.image_id])
        assert np.array_equal(part.predicted == part.label, [kind != 'misclassified'] * len(part))
        assert set(part.is_adversarial) <= {kind == 'failed'}
    part = controls['noise']
    epsilon, key = run.config.attack.epsilon, run.key(Stream.NOISE)
    for m in (0, len(part) - 1):
        image = data.take(split, part.image_id[m : m + 1])
        noisy = attack.sign_noise(
            image, key=jax.random.fold_in(key, part.image_id[m]), epsilon=epsilon
        )
        logits = vgg.logits(variables, noisy, plan=SMALL)
        # The key's noise is drawn for one image alone, whatever stands beside it.
        np.testing.assert_allclose(part.unoccluded[m], logits[0], atol=1e-4)


def test_classes_that_lack_maps_are_told_with_a_way_out(finished, monkeypatch, capsys):
    """One line, which names a larger number of maps only where there are more images to map."""
    run, _ = finished
    division, class_names = store.divide(run, 'held_out'), run.description['class_names']
    maps = division.maps
    clean, adversarial = (
        np.sum((maps.predicted == 0) & (maps.is_adversarial == a)) for a in (0, 1)
    )
    more = 'more test images of them help'
    attack = ', or, for adversarial ones in another --workdir, --config.attack.epsilon above 0.3.'
    limit = ', --config.occlusion.test_images above 120 (of 200)'
    assert np.bincount(maps.predicted[maps.is_adversarial], minlength=10).min() == 0
    for mapped, help_ in (
        (0, more + attack),
        (200, more + attack),
        (120, more + limit + attack),
    ):
        config = small_run.get_config()
        config.occlusion.test_images = mapped
        other = dataclasses.replace(run, config=config)
        stages._tell_lacking(other, 'held_out', division)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            'detectors (held_out): 10 of 10 classes have too few maps for detectors and thresholds '
            f'of their own: {class_names[0]} ({clean} clean, {adversarial} adversarial), '
        )
        assert line.endswith(f' adversarial); {help_}')
    some = np.flatnonzero(np.bincount(maps.predicted[maps.is_adversarial], minlength=10) > 0)
    with monkeypatch.context() as patch:
        patch.setattr(judging, 'lacking', lambda _: np.isin(np.arange(10), some))
        stages._tell_lacking(run, 'held_out', division)
        assert capsys.readouterr().err.endswith(f' adversarial); {more}.\n')
    monkeypatch.setattr(stages, '_NAMED', 3)
    stages._tell_lacking(run, 'held_out', division)
    line = capsys.readouterr().err
    assert [name for name in class_names if f'{name} (' in line] == class_names[:3]
    assert ' adversarial) and 7 more; ' in line
    monkeypatch.setattr(judging, 'lacking', lambda division: np.zeros(10, bool))
    stages._tell_lacking(run, 'held_out', division)
    assert capsys.readouterr().err == ''


def test_an_epoch_of_few_images_goes_over_them_again(tmp_path, monkeypatch):
    """300 images are nine steps of 32; each time in another order, no image before the others."""
    seen = []

    def fit_epoch(state, batches, **settings):
        seen.append([batch.index for batch in batches])
        return state, {'loss': 0.0, 'accuracy': 1.0}

    monkeypatch.setattr(classifier, 'fit_epoch', fit_epoch)
    for epoch_steps, rounds in ((0, 1), (9, 1), (10, 2), (36, 4)):
        run = make_run(tmp_path / str(epoch_steps))
        run.config.classifier.epoch_steps, run.config.classifier.epochs = epoch_steps, 2
        seen.clear()
        monkeypatch.setattr(stages, '_tell', lambda *args, **kwargs: None)
        stages._trained(run, run.workdir / 'classifier', run.dataset.train, 0)
        assert [len(epoch) for epoch in seen] == [9 * rounds] * 2
        orders = np.reshape(seen, (2 * rounds, 9 * 32))
        assert len(np.unique(orders, axis=0)) == 2 * rounds
        for order in orders:
            assert len(np.unique(order)) == 9 * 32


def test_controls_are_judged_where_nothing_was_fitted(finished):
    run, _ = finished
    results = json.loads((run.workdir / 'report' / 'results.json').read_text())
    division, controls = store.divide(run, 'held_out'), store.load_controls(run)
    entries = results['detection']['held_out']['overall']['controls']
    for kind, part in controls.items():
        counts = []
        for seed, judged in enumerate(division.is_judged):
            known = division.known(seed, np.zeros(len(judged)))
            unfitted = np.isnan(metrics.thresholds(**known, num_classes=10, threshold=0.0)[0])
            seen = np.isin(part.image_id, division.maps.image_id[~judged])
            counts.append(np.sum(~seen & ~unfitted[part.predicted]))
        assert entries[kind]['n'] == round(np.mean(counts))
    # The paper's protocol judges maps of training images: test images are no controls of it.
    assert results['detection']['paper']['overall']['controls'] == {}


def test_every_seed_is_a_fit_of_its_own(finished):
    """The program of all seeds gives what a bank fitted alone on that seed's maps gives."""
    run, _ = finished
    division, settings = store.divide(run, 'held_out'), run.config.detector
    banks = store.load_banks(run, division, 'held_out', 'detector')
    untrained = store.init_banks(run, division, 'detector')
    keys = jax.random.split(run.key(Stream.BANK_FIT), settings.seeds)
    for seed in (0, settings.seeds - 1):
        maps = division.maps.select(division.is_fitted[seed])
        groups = detector.group_by_class(
            maps.maps,
            maps.predicted,
            maps.is_adversarial,
            num_classes=10,
            balance='undersample',
            rng=run.rng(Stream.UNDERSAMPLING, seed),
        )
        alone = detector.fit_bank(
            keys[seed],
            jax.tree.map(lambda leaf, seed=seed: leaf[seed], untrained),
            *groups,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
        )
        jax.tree.map(
            lambda one, all_, seed=seed: np.testing.assert_allclose(one, all_[seed], atol=1e-4),
            alone,
            banks,
        )
    first, last = (division.is_fitted[seed] for seed in (0, -1))
    assert not np.array_equal(first, last)
    leaves = [jax.tree.leaves(untrained)[1][seed] for seed in (0, -1)]
    assert not np.array_equal(*leaves)


def test_the_paper_s_split_is_80_to_20_of_all_maps(finished):
    division = store.divide(finished[0], 'paper')
    count = len(division.maps)
    assert set(division.is_fitted.sum(axis=1)) == {round(0.8 * count)}


def test_detectors_that_are_fitted_anew_are_those_in_use(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    before = stages.load_guard(run, 'detector')
    shutil.rmtree(run.workdir / 'detectors' / 'held_out' / 'detector')
    fit_banks = store.fit_banks  # On another machine they would be other ones.
    monkeypatch.setattr(
        store, 'fit_banks', lambda *args: jax.tree.map(lambda x: x + 1, fit_banks(*args))
    )
    stages.detectors(run)
    after = stages.load_guard(run, 'detector')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a + 1, 1e-6), before.bank, after.bank)


def test_a_finished_run_computes_nothing_again(finished, monkeypatch):
    run, tables = finished
    for module, name in ((shard, 'attack_batch'), (shard, 'map_batch'), (stages, 'predict')):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(judging, 'fit_banks', None)
    assert run_all(make_run(run.workdir)) == tables


def test_more_images_are_mapped_later(finished, tmp_path, monkeypatch):
    """What an experiment has mapped stays, and it ends with the numbers of one that mapped all."""
    whole, _ = finished
    stored = {name: store.load_shards(whole, name) for name in names.SPLITS}
    all_maps = {name: maps for name, (maps, _) in stored.items()}
    controls_of_all = store.load_controls(whole)
    monkeypatch.setattr(run_lib.Run, 'shard_size', 48)
    collected, totals = [], []

    def collect(run, variables, autoencoder, split, ids, *, controls):
        """Returns what the whole experiment has stored of some images."""
        collected.append(len(ids))
        maps, (first, *_) = stored['test' if controls else 'train']
        sets = {'': maps}
        if controls:
            sets |= {f'{kind}_': part for kind, part in controls_of_all.items()}
        arrays = dict(first, attempted=np.isin(ids, maps.image_id[~maps.is_adversarial]).sum())
        for prefix, part in sets.items():
            part = part.select(np.isin(part.image_id, ids))
            fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
            arrays |= {f'{prefix}{n}': a for n, a in fields.items() if a is not None}
        return arrays

    monkeypatch.setattr(shard, 'collect', collect)
    monkeypatch.setattr(run_lib, 'Progress', lambda n, what: totals.append(n) or Progress(n, what))

    def run_of(train, test):
        config = small_run.get_config()
        config.occlusion.train_images, config.occlusion.test_images = train, test
        config.detector.methods, config.detector.steps = ('detector', 'linear_probe'), 1
        workdir = storage.open_workdir(tmp_path, config)
        return run_lib.Run(config=config, workdir=workdir)

    for name in ('classifier', 'magnet'):
        shutil.copytree(whole.workdir / name, tmp_path / name)
    shutil.copy(whole.workdir / 'dataset.json', tmp_path)
    part = run_of(100, 96)
    stages.heatmaps(part)
    assert collected == [48, 48, 4, 48, 48]
    stages.detectors(part)
    more = run_of(0, 0)
    with pytest.raises(UsageError, match='fewer maps, or more, than the config.*=heatmaps'):
        stages.detectors(more)
    with pytest.raises(UsageError, match='made from fewer maps.*: delete detectors there'):
        stages.heatmaps(more)
    stages.heatmaps(part)  # The extension was not begun: nothing has changed.
    collected.clear()
    shutil.rmtree(tmp_path / 'detectors')
    stages.heatmaps(more)
    assert collected == [48] * 4 + [12] + [48, 48, 8]  # 300 and 200 in all, without what was there
    assert totals[-1] == sum(collected)
    assert not (tmp_path / 'heatmaps' / 'train-0000096-4.npz').exists()
    with pytest.raises(UsageError, match=r'another config \(occlusion.test_images: 0 -> 96;'):
        run_of(100, 96)
    stages.detectors(more)
    collected.clear()
    stages.heatmaps(more)
    assert not collected
    for name, expected in all_maps.items():
        found, _ = store.load_shards(more, name)
        # A shard has its correct images before its attacked ones.
        (ids, logits), (known, wanted) = (
            (np.stack([maps.is_adversarial, maps.image_id])[:, order], maps.logits[order])
            for maps in (found, expected)
            for order in [np.lexsort((maps.image_id, maps.is_adversarial))]
        )
        np.testing.assert_array_equal(ids, known)
        np.testing.assert_array_equal(logits, wanted)


@pytest.mark.slow
def test_shrunk_images_are_averages_and_train_the_same_network(tmp_path):
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(stages.shrink(images, side=8), images)
    flat = np.full((1, 9, 9, 3), 0.3, np.float32)
    np.testing.assert_allclose(stages.shrink(flat, side=4), 0.3, rtol=1e-6)
    # Antialiased: the mean of the whole stays, up to the edges' part.
    assert abs(stages.shrink(images, side=4).mean() - images.mean()) < 0.02
    run, sides, shrink = make_run(tmp_path / 'run'), [], stages.shrink
    run.config.classifier.resize = (8, 12)

    def watched(images, *, side):
        sides.append(side)
        return shrink(images, side=side)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, 'shrink', watched)
        stages.train(run)
    assert list(dict.fromkeys(sides)) == [8, 12, 16]
    assert len(sides) % 3 == 0


@pytest.mark.slow
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
        patch.setattr(classifier, 'train_step', kill_after(12, classifier.train_step))
        run_all(interrupted)
    assert storage.latest_step(interrupted.workdir / 'classifier') == 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shard, 'collect', kill_after(1, shard.collect))
        run_all(make_run(interrupted.workdir))
    assert len(list((interrupted.workdir / 'heatmaps').glob('*.npz'))) == 1
    run_all(make_run(interrupted.workdir, eval_batch_size=12, chunk_size=7))
    swept = ('views', 'spectrum', 'neighbours', 'twin')
    for name in names.SPLITS:
        ours, theirs = (store.load_shards(r, name)[0] for r in (interrupted, run))
        for field in dataclasses.fields(HeatmapSet):
            pair = [getattr(maps, field.name) for maps in (ours, theirs)]
            assert pair[0] is not None or field.name in swept
            if pair[0] is not None:
                np.testing.assert_allclose(*pair, atol=1e-4)


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
    variables, autoencoder = stages.load_variables(run), stages.load_autoencoder(run)
    ids = np.arange(20)
    ours, theirs = (
        shard.collect(r, variables, autoencoder, run.dataset.test, ids) for r in (other, run)
    )
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {'how'}:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


def test_the_memory_limit_and_the_engine_reach_the_maps(finished, tmp_path, monkeypatch):
    run, _ = finished
    seen, map_batch = {}, shard.map_batch
    monkeypatch.setattr(
        shard,
        'map_batch',
        lambda *args, **kwargs: seen.update(kwargs) or map_batch(*args, **kwargs),
    )
    variables, ids = stages.load_variables(run), np.arange(8)
    autoencoder = stages.load_autoencoder(run)
    for name in ('full', 'incremental'):
        # So many windows that they, and not the weights, take the memory.
        flags = dict(engine=name, chunk_size=700)
        free = make_run(tmp_path / 'run', **flags).mapping(variables)
        limit = int(0.97 * jax.device_count() * free.estimated_bytes)
        other = make_run(tmp_path / 'run', memory_limit=limit, **flags)
        mapping = other.mapping(variables)
        assert mapping.estimated_bytes * jax.device_count() <= limit
        assert mapping.chunk_size < free.chunk_size
        shard.collect(other, variables, autoencoder, run.dataset.test, ids)
        assert (seen['engine'], seen['chunk_size']) == (name, mapping.chunk_size)
    with pytest.raises(UsageError, match='--memory_limit='):
        too_small = make_run(tmp_path / 'run', memory_limit=2**20)
        shard.collect(too_small, variables, autoencoder, run.dataset.test, ids)


def test_the_benchmark_takes_what_is_trained(finished, tmp_path):
    run, _ = finished
    shutil.copytree(run.workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run', engine='full')
    engines.benchmark(run, peer.Timing(images=2, repeats=1))
    result = json.loads((tmp_path / 'run' / 'benchmark.json').read_text())
    assert result['weights'] == 'trained'


def test_four_devices_are_one(finished, four_devices):
    """Batches divide over the four devices of the tests; one of them gives the same numbers."""
    run, _ = finished
    assert len(devices.mesh().devices) == 4
    variables = jax.device_get(stages.load_variables(run))
    images = data.take(run.dataset.test, np.arange(4))
    geometry = dict(size=5, stride=4, grid='paper', chunk_size=None, network=run.network)
    fill = np.array([0.5], np.float32)
    four = shard.map_batch(
        devices.replicate(variables), devices.divide(images), fill, mesh=devices.mesh(), **geometry
    )
    assert len(four.sharding.device_set) == 4
    alone = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    one = shard.map_batch(variables, images, fill, mesh=alone, **geometry)
    np.testing.assert_allclose(four, one, atol=1e-4)


@pytest.mark.slow
def test_a_classifier_that_is_never_right_is_reported_too(finished, tmp_path, monkeypatch):
    """No image is correct, so there is no map of either kind: dashes, no NaN, no error."""
    run = make_run(tmp_path / 'run')
    shutil.copytree(finished[0].workdir / 'classifier', run.workdir / 'classifier')
    shutil.copy(finished[0].workdir / 'dataset.json', run.workdir)

    def never_right(before, after, labels):
        nothing = np.zeros(len(labels), bool)
        return attack.Outcome(nothing, nothing, after.argmax(-1))

    monkeypatch.setattr(attack, 'outcome', never_right)
    tables = run_all(run)
    assert 'no correct or adversarial maps' in tables
    results = json.loads((run.workdir / 'report' / 'results.json').read_text())
    assert results['attack']['success_rate'] is None
    assert results['detection']['paper']['overall']['auroc'] is None


@pytest.mark.slow
def test_a_classifier_is_taken_along_to_another_attack(finished, tmp_path, monkeypatch):
    run, _ = finished
    shutil.copytree(run.workdir / 'classifier', tmp_path / 'run' / 'classifier')
    other = make_run(tmp_path / 'run')
    other.config.attack.epsilon = 0.2
    monkeypatch.setattr(classifier, 'train_step', None)
    run_all(other)
    found = store.load_metrics(other)
    assert found['classifier'] == store.load_metrics(run)['classifier']
    other.config.classifier.dropout_rate = 0.1
    with pytest.raises(UsageError, match='classifier was made from another config'):
        stages.train(other)


def test_a_run_keeps_a_line_of_every_epoch_and_shard(finished):
    run, _ = finished
    text = (run.workdir / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    epochs = [line for line in lines if line['stage'] == 'train']
    assert [line['epoch'] for line in epochs] == [1, 2, 3]
    assert [line['step'] for line in epochs] == [300 // 32 * epoch for epoch in (1, 2, 3)]
    assert epochs[0]['learning_rate'] > epochs[1]['learning_rate'] > epochs[2]['learning_rate'] > 0
    assert epochs[0]['loss'] > epochs[2]['loss'] and epochs[0]['accuracy'] < epochs[2]['accuracy']
    parts = {line['part'] for line in lines if line['stage'] == 'heatmaps'}
    assert parts == {f'heatmaps/{name}' for name in store.load_manifest(run)['shards']}


@pytest.mark.slow
def test_a_step_and_a_batch_of_maps_are_profiled(tmp_path):
    run = make_run(tmp_path / 'run', profile_dir=str(tmp_path / 'profile'))
    run.config.classifier.epochs = 1
    stages.train(run)
    stages.heatmaps(run)
    for name in ('train', 'heatmaps'):
        (path,) = (tmp_path / 'profile' / name).rglob('perfetto_trace.json.gz')
        with gzip.open(path, 'rt') as file:
            events = json.load(file)['traceEvents']
        assert any(event.get('dur', 0) > 0 for event in events)


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
    seen = []

    def fn(x):
        seen.append(len(x))
        return {'twice': 2 * x}

    array = np.arange(11.0, dtype=np.float32)
    none = devices.in_batches(fn, array[:0], batch_size=4)['twice']
    assert none.shape == (0,) and none.dtype == np.float32
    for batch_size in (4, 8, 12, 20):
        seen.clear()
        np.testing.assert_array_equal(
            devices.in_batches(fn, array, batch_size=batch_size)['twice'], 2 * array
        )
        assert set(seen) == {batch_size}


def test_evaluate_divides_once():
    """Five images in batches of two; batch averages would give 2/3 for one hit in the last."""
    labels = np.zeros(2, np.int32)
    real = [np.array([True, True]), np.array([True, True]), np.array([True, False])]
    guesses = iter([np.array([1, 1]), np.array([1, 0]), np.array([0, 0])])
    batches = [Batch(np.zeros((2, 1, 1, 1)), labels, labels, is_real) for is_real in real]
    assert classifier.evaluate(lambda images: next(guesses), batches) == 2 / 5


def test_an_accuracy_tells_how_far_it_is(finished, monkeypatch):
    (run, _), made = finished, []
    monkeypatch.setattr(stages, 'Progress', lambda *args: made.append(Progress(*args)) or made[-1])
    few = dataclasses.replace(run, speed=dataclasses.replace(run.speed, eval_batch_size=64))
    for name, count in (('train', 300), ('test', 200)):
        found = stages._accuracy(few, stages.load_variables(run), name)
        assert found == store.load_metrics(run)[f'{name}_accuracy']
        assert made[-1].done == made[-1].total == count


@pytest.mark.slow
def test_fidelity_of_exact_maps_is_perfect_and_of_others_counted(finished, tmp_path, monkeypatch):
    """What is stored is mapped again, without a difference where nothing is left out."""
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    printed = fidelity.fidelity(run, peer.Timing(images=1, repeats=1), (0.999, 0.4))
    result = json.loads((run.workdir / 'fidelity.json').read_text())
    rows = {(row['threshold'], row['every']): row for row in result['settings']}
    assert len(rows) == 6
    # Images of 16 pixels have no side of which 0.999 leaves less than the whole patch.
    for key in ((1.0, 1), (0.999, 1)):
        assert rows[key]['ssim'] == pytest.approx(1, abs=1e-3)
        assert rows[key]['spearman'] == pytest.approx(1, abs=1e-2)
    assert set(rows[1.0, 1]['judges']) == {'detector', 'all_logits', 'map_mean'}
    for entry in rows[1.0, 1]['judges'].values():
        assert (entry['difference'], entry['interval']) == (0, [0, 0])
    assert rows[0.4, 1]['ssim'] < 0.999
    assert rows[0.4, 2]['ssim'] < 1
    maps, _ = store.load_shards(run, 'test')
    judged = store.divide(run, 'held_out').is_judged
    expected = [roc_auc_score(maps.is_adversarial[j], -maps.maps[j].mean((1, 2))) for j in judged]
    found = rows[1.0, 1]['judges']['map_mean']['auroc']
    assert found == pytest.approx(np.mean(expected))
    assert f'{found:.3f} (' in printed
    assert (run.workdir / 'fidelity.png').read_bytes().startswith(b'\x89PNG')
    assert result['adversarial_maps'] == maps.is_adversarial.sum()


def test_approximate_maps_are_asked_for_by_the_config(finished, tmp_path):
    run = finished[0]
    approximate = make_run(tmp_path / 'run')
    approximate.config.occlusion.threshold = 0.4
    variables = stages.load_variables(run)
    assert approximate.mapping(variables).engine == 'approximate'
    ids, autoencoder = np.arange(24), stages.load_autoencoder(run)
    ours, exact = (
        shard.collect(r, variables, autoencoder, run.dataset.test, ids)['logits']
        for r in (approximate, run)
    )
    assert np.abs(ours - exact).max() > 1e-3
    for engine, config in (('full', approximate.config), ('approximate', run.config)):
        speed = dataclasses.replace(run.speed, engine=engine)
        wrong = dataclasses.replace(run, config=config, speed=speed)
        with pytest.raises(UsageError, match='config.occlusion'):
            wrong.mapping(variables)


def test_the_learning_rate_falls_over_all_epochs_or_begins_anew_at_each_side():
    settings, sides, steps = small_run.get_config().classifier, [32, 32, 64, 96, 96, 96], 5
    peak = settings.learning_rate
    whole = stages.learning_rates(settings, sides, steps)
    np.testing.assert_allclose(
        [whole(i) for i in range(30)],
        [peak * (1 + np.cos(np.pi * i / 30)) / 2 for i in range(30)],
        rtol=1e-5,
    )
    anew = stages.learning_rates(dataclasses.replace(settings, restarts=True), sides, steps)
    expected = [peak * (1 + np.cos(np.pi * i / n)) / 2 for n in (10, 5, 15) for i in range(n)]
    np.testing.assert_allclose([anew(i) for i in range(30)], expected, rtol=1e-5)
