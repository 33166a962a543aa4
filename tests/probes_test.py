"""Laws of the modes that probe a finished run: sweep and adaptive attack."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from occjax import config as config_lib
from occjax import (
    data,
    detection,
    evaluation,
    evasion,
    judging,
    metrics,
    stages,
    storage,
    sweep,
    verdict,
)
from occjax import run as run_lib
from occjax.methods import METHODS
from occjax.types import UsageError
from tests.detector_test import toy_maps
from tests.small_run import SMALL, make_run

pytestmark = pytest.mark.usefixtures('small_plan')


@pytest.fixture
def one_in_two(monkeypatch):
    """Lets half of clean maps ring: the few of a small run set no threshold of 5 %."""
    at_fpr = metrics.threshold_at_fpr
    monkeypatch.setattr(metrics, 'threshold_at_fpr', lambda scores, fpr: at_fpr(scores, 0.5))


def test_a_sweep_attacks_maps_and_judges(finished, tmp_path):
    """FGSM at the config's epsilon is what is stored already; the rest is counted."""
    run = make_run(tmp_path / 'run')
    shutil.copytree(finished[0].workdir / 'classifier', run.workdir / 'classifier')
    shutil.copy(finished[0].workdir / 'dataset.json', run.workdir)
    run.config.sweep.epsilons, run.config.sweep.attacks = (0.02,), ('bim',)
    run.config.sweep.steps, run.config.sweep.images = 3, 150
    run.config.sweep.occluders = ((4, 6, 0.0),)
    run.config.sweep.methods = ('linear_probe',)
    printed = sweep.sweep(run)
    result = json.loads((run.workdir / 'sweep.json').read_text())
    assert list(result['attacks']) == ['fgsm 0.02', 'fgsm 0.3', 'bim 0.3']
    assert set(result['transfer']['linear_probe']) == {'fgsm 0.02', 'fgsm 0.3'}
    maps, _ = evaluation.load_shards(finished[0], 'test')
    chosen = np.isin(maps.image_id, stages.mapped_ids(run, 'test')[:150])
    assert result['correct'] == np.sum(chosen & ~maps.is_adversarial)
    attacked = result['attacks']['fgsm 0.3']
    assert attacked['successful'] == np.sum(chosen & maps.is_adversarial)
    assert attacked['success_rate'] == attacked['successful'] / result['correct']
    assert result['attacks']['fgsm 0.02']['successful'] < attacked['successful']
    assert f'{attacked["success_rate"]:.3f}' in printed
    assert (run.workdir / 'sweep.png').read_bytes().startswith(b'\x89PNG')
    # Of 16 pixels: 5 every 4 are at 3 x 3 places, 4 every 6 at 2 x 2.
    own, other, every = result['occluders']
    assert [row['forward_passes'] for row in (own, other, every)] == [10, 5, 14]
    own_attack = result['transfer']['linear_probe']['fgsm 0.3']['fgsm 0.3']
    assert own['auroc']['linear_probe'] == own_attack
    have, of = own_attack['over']  # Few classes have maps of both kinds.
    assert 0 < have < of == 10 * run.config.detector.seeds
    assert f'{own_attack["auroc"]:.3f} ({have} of {of})' in printed
    assert len({json.dumps(row['auroc']) for row in result['occluders']}) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lib.Run, 'in_batches', None)
        assert sweep.sweep(run) == printed


def test_windows_to_try_differ_from_the_config_s_in_one_thing_each(tmp_path):
    run = make_run(tmp_path / 'run')
    own = (5, 4, (0.5,))
    assert sweep.occluders(run)[0] == own
    for windows in sweep.occluders(run)[1:]:
        assert sum(a != b for a, b in zip(windows, own, strict=True)) == 1


def seed_0(run, method):
    """Returns the first seed's bank, its thresholds, and the maps that it was not fitted on."""
    division = evaluation.divide(run, 'held_out')
    banks = evaluation.load_banks(run, division, 'held_out', method)
    scores = judging.score_banks(banks, METHODS[method], division.maps)[0]
    judged, known = division.is_judged[0], division.known(0, scores)
    levels = metrics.thresholds(**known, num_classes=10, threshold=0.0, learns=True)
    bank = jax.tree.map(lambda leaf: leaf[0], banks)
    levels = np.where(np.isnan(levels[1]), np.inf, levels[1])
    return bank, levels, division.maps.select(judged), scores[judged]


SETTINGS = dict(plan=SMALL, size=5, stride=4, fill=0.5, engine='full')
LEVELS = np.linspace(-1, 1, 10)  # Any thresholds: those of 5 % are infinite in so small a run.


@pytest.mark.parametrize('method', ['detector', 'linear_probe', 'all_logits'])
def test_a_verdict_is_what_the_stored_maps_say(finished, method):
    run, _ = finished
    variables = stages.load_variables(run)
    bank, _, maps, scores = seed_0(run, method)
    clean = np.flatnonzero(~maps.is_adversarial)[:6]
    images = data.take(run.dataset.test, maps.image_id[clean])
    for engine in ('full', 'incremental'):
        settings = SETTINGS | {'engine': engine, 'method': METHODS[method]}
        margins_fn = jax.jit(functools.partial(verdict.margins, **settings))
        margins = margins_fn(variables, bank, LEVELS, images)
        expected = scores[clean] - LEVELS[maps.predicted[clean]]
        np.testing.assert_allclose(margins, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('engine', ['full', pytest.param('incremental', marks=pytest.mark.slow)])
@pytest.mark.parametrize('method', ['detector', 'all_logits'])
def test_the_gradient_of_a_verdict_is_right(finished, method, engine):
    """Against central differences along random directions, through map and detector."""
    run, _ = finished
    variables = stages.load_variables(run)
    bank, _, maps, _ = seed_0(run, method)
    image = data.take(run.dataset.test, maps.image_id[:1])
    # The empty ground of a digit ties the maxima of pools, which have no gradient there.
    image += np.random.default_rng(1).uniform(0, 0.1, image.shape).astype(np.float32)

    @jax.jit
    def margin_fn(image):
        settings = SETTINGS | {'engine': engine}
        settings |= {'method': METHODS[method]}
        return verdict.margins(variables, bank, LEVELS, image, **settings)[0]

    gradient = jax.grad(margin_fn)(image)
    assert np.abs(gradient).max() > 0
    rng, step, errors, sizes = np.random.default_rng(0), 1e-4, [], []
    for _ in range(12):
        direction = rng.choice([-1.0, 1.0], image.shape).astype(np.float32)
        numeric = (margin_fn(image + step * direction) - margin_fn(image - step * direction)) / (
            2 * step
        )
        errors.append(float(numeric - (gradient * direction).sum()))
        sizes.append(float(numeric))
    # Kinks of ReLU and pools lie between the two points of some differences.
    assert np.median(np.abs(errors)) < 0.05 * np.std(sizes)


def test_both_engines_have_one_gradient(finished):
    run, _ = finished
    variables = stages.load_variables(run)
    bank, _, maps, _ = seed_0(run, 'detector')
    images = data.take(run.dataset.test, maps.image_id[:3])
    # As above: where maxima tie, either is right.
    images += np.random.default_rng(1).uniform(0, 0.1, images.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(images, engine):
        settings = SETTINGS | {'engine': engine, 'method': METHODS['detector']}
        return jax.grad(lambda x: verdict.margins(variables, bank, LEVELS, x, **settings).sum())(
            images
        )

    gradients = [gradient(images, engine) for engine in ('full', 'incremental')]
    np.testing.assert_allclose(*gradients, atol=1e-4 * np.abs(gradients[0]).max())


@pytest.mark.slow
def test_an_attacker_who_knows_the_detector_evades_more(finished, tmp_path, one_in_two):
    """And what is stored is not attacked anew."""
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    settings = run.config.adaptive
    settings.epsilons, settings.steps, settings.images = (0.05, 0.3), 6, 12
    settings.methods = ('detector',)
    printed = evasion.evade(run)
    result = json.loads((run.workdir / 'adaptive.json').read_text())
    assert result['images'] == 12
    rows = {(r['method'], r['attack'], r['epsilon']): r for r in result['rows']}
    assert len(rows) == 4 * 2
    for row in result['rows']:
        low, high = row['interval']
        assert 0 <= low <= row['evasion'] <= high <= 1
        assert row['evasion'] <= row['wrong']
        if row['by_step']:
            assert len(row['by_step']) == 7
            assert row['by_step'] == sorted(row['by_step'])
            assert row['by_step'][-1] == row['evasion']
    knowing = [rows['detector', name, 0.3]['evasion'] for name in evasion.ATTACKS]
    assert max(knowing) > rows['detector', 'fgsm', 0.3]['evasion']
    assert (run.workdir / 'adaptive.png').read_bytes().startswith(b'\x89PNG')
    assert 'What the detectors do not do' in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lib.Run, 'in_batches', None)
        assert evasion.evade(run) == printed
    # The report shows it, in the words of the mode itself.
    title = 'What the detectors do not do'
    assert printed.split(title)[1].split('\n\nWritten')[0].strip() in evaluation.make_report(run)
    assert title in (run.workdir / 'report' / 'report.html').read_text()


def test_a_false_alarm_is_a_clean_image_above_its_threshold(finished, tmp_path, one_in_two):
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    settings = run.config.adaptive
    settings.epsilons, settings.attacks, settings.images = (0.3,), (), 40
    settings.methods = ('detector',)
    evasion.evade(run)
    result = json.loads((run.workdir / 'adaptive.json').read_text())
    _, levels, maps, scores = seed_0(run, 'detector')
    clean = np.flatnonzero(~maps.is_adversarial)[:40]
    expected = np.mean(scores[clean] > levels[maps.predicted[clean]])
    borderline = np.sum(np.abs(scores[clean] - levels[maps.predicted[clean]]) < 1e-3)
    assert expected > 0
    assert result['false_alarms']['detector'] == pytest.approx(
        expected, abs=(borderline + 0.1) / len(clean)
    )


def test_other_probes_are_no_other_experiment(finished, tmp_path):
    """A work directory opens with other sweeps and attackers, and with nothing else changed."""
    config = make_run(tmp_path / 'run').config
    config.sweep.images, config.adaptive.steps = 7, 3
    config.detector.methods = ('detector', 'pooled')
    storage.open_workdir(tmp_path / 'run', config)
    config.seed = 5
    with pytest.raises(config_lib.UsageError, match='seed'):
        storage.open_workdir(tmp_path / 'run', config)


def test_detect_says_what_the_stored_maps_say(finished, tmp_path, one_in_two):
    """Test images as files: the class, its probability and the margins are the table's."""
    run, _ = finished
    _, levels, maps, scores = seed_0(run, 'detector')
    clean = np.flatnonzero(~maps.is_adversarial & np.isfinite(levels[maps.predicted]))[:5]
    for i, m in enumerate(clean):
        pixels = run.dataset.test.images[maps.image_id[m : m + 1]][0]
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    (tmp_path / 'note.txt').write_text('no image')
    lines = detection.detect(dataclasses.replace(run, images=str(tmp_path))).splitlines()
    assert len(lines) == 5
    names = run.description['class_names']
    for i, (m, line) in enumerate(zip(clean, lines, strict=True)):
        assert line.startswith(str(tmp_path / f'{i}.png'))
        assert f'{names[maps.predicted[m]]} ({maps.max_probability[m]:.3f})' in line
        margin = scores[m] - levels[maps.predicted[m]]
        word, number = re.search(r' detector: (\w+) \((.*?)\)', line).groups()
        assert float(number) == pytest.approx(margin, abs=0.02)
        assert word == ('adversarial' if margin > 0 else 'clean')
    alone = detection.detect(dataclasses.replace(run, images=str(tmp_path / '3.png')))
    assert alone == lines[3]


@pytest.mark.parametrize('kind', ['nothing', 'missing', 'empty', 'broken'])
def test_detect_names_what_it_cannot_read(finished, tmp_path, kind):
    folder = tmp_path / kind
    if kind in ('empty', 'broken'):
        folder.mkdir()
    if kind == 'broken':
        (folder / 'a.png').write_bytes(b'no image')
    images = None if kind == 'nothing' else str(folder)
    with pytest.raises(UsageError, match='--images' if kind != 'broken' else 'a.png'):
        detection.detect(dataclasses.replace(finished[0], images=images))


def test_other_settings_are_attacked_anew(finished, tmp_path, monkeypatch):
    """What is stored of one number of steps is none of another's; of the same it is."""
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    settings, attacked = run.config.adaptive, []

    def attack_batch(*arrays, name, steps, weight, **_):
        attacked.append((name, steps, weight))
        count = len(arrays[-1])
        return np.ones(count, bool), np.ones(count, bool), np.full(count, steps)

    monkeypatch.setattr(evasion, 'attack_batch', attack_batch)
    settings.epsilons, settings.attacks, settings.images = (0.1,), ('joint',), 8
    settings.methods, curves = ('detector',), []
    wanted = (1, 1.0), (3, 1.0), (3, 50.0)
    for settings.steps, settings.weight in (*wanted, wanted[1]):
        evasion.evade(run)
        rows = json.loads((run.workdir / 'adaptive.json').read_text())['rows']
        curves += [row['by_step'] for row in rows if row['attack'] == 'joint']
    assert curves == [[0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert [how for name, *how in attacked if name == 'joint'] == [list(how) for how in wanted]


@pytest.mark.parametrize('reserved', [18, 19])
def test_deployed_thresholds_keep_the_promise_of_5_percent(finished, reserved):
    """The largest of 19 clean maps does; classes of 18 share the 9th largest of all 180."""
    run, _ = finished
    maps = toy_maps([(60, 40)] * 10, grid=run.grid)
    part = np.concatenate([np.arange(60), 20 + np.arange(40)] * 10)
    masks = [np.broadcast_to(mask, (3, len(part))) for mask in (part >= 30, part < reserved)]
    division = judging.Division(maps, *masks)
    _, levels = detection.deployed(run, division, 'detector')
    assert len(levels) == 10
    banks = evaluation.load_banks(run, division, 'held_out', 'detector')
    scores = judging.score_banks(banks, METHODS['detector'], maps)[0]
    clean = (part < reserved) & ~maps.is_adversarial
    expected = [scores[clean & (maps.predicted == k)].max() for k in range(10)]
    if reserved == 18:
        expected = np.sort(scores[clean])[-9]
    np.testing.assert_allclose(levels, expected)


def test_a_detector_without_a_threshold_never_calls(finished):
    """Where clean maps of all classes together are too few to promise anything."""
    run, _ = finished
    maps = toy_maps([(10, 10)] * 10, grid=run.grid)
    part = np.tile(np.arange(20), 10)
    masks = [np.broadcast_to(mask, (3, 200)) for mask in (part >= 5, part == 0)]
    division = judging.Division(maps, *masks)
    _, levels = detection.deployed(run, division, 'detector')
    assert (levels == np.inf).all()


def test_only_fitted_detectors_can_be_attacked(finished, tmp_path):
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    run.config.adaptive.methods = ('pooled',)
    with pytest.raises(UsageError, match="has \\['pooled'\\]"):
        evasion.evade(run)
