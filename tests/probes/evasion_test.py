"""Laws of attacks on the detectors themselves."""

import functools
import json
import shutil

import numpy as np
import pytest

from occjax import config as config_lib
from occjax import verdict
from occjax.experiment import devices, storage
from occjax.experiment import results as results_lib
from occjax.methods import METHODS
from occjax.probes import evasion
from occjax.types import UsageError
from tests.small_run import make_run
from tests.verdict_test import SETTINGS, seed_0

pytestmark = pytest.mark.usefixtures('small_plan')


@pytest.mark.slow
def test_an_attacker_who_knows_the_detector_evades_more(
    finished, tmp_path, one_in_two, monkeypatch
):
    """By images that are again found wrong and silent; what is stored is not attacked anew."""
    attacks, attack_batch = [], evasion.attack_batch

    def noted(*arrays, name, epsilon, **settings):
        found = attack_batch(*arrays, name=name, epsilon=epsilon, **settings)
        if name in evasion.ATTACKS:
            attacks.append((*arrays, epsilon, *found))
        return found

    monkeypatch.setattr(evasion, 'attack_batch', noted)
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
    rates = {
        name: np.mean([rows['detector', name, e]['evasion'] for e in settings.epsilons])
        for name in ('fgsm', *evasion.ATTACKS)
    }
    assert max(rates.values()) >= rates['fgsm'] + 0.1
    assert min(rates.values()) == rates['fgsm']
    how = dict(SETTINGS, method=METHODS['detector'])
    for variables, bank, levels, _, fill, images, labels, epsilon, *found in attacks:
        _, evades, _, attacked = map(np.asarray, found)
        assert np.abs(attacked - images).max() <= epsilon + 1e-6
        logits_fn = functools.partial(run.network.fn, variables)
        margins = verdict.margins(logits_fn, bank, levels, attacked, **how | {'fill': fill})
        assert evades.any() and (margins[evades] < 1e-3).all()  # It may stand as near as it likes.
        logits = np.array(logits_fn(attacked))
        own = np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]
        np.put_along_axis(logits, np.asarray(labels)[:, None], -np.inf, 1)
        assert (own - logits.max(1) < 1e-4)[evades].all()
    assert (run.workdir / 'adaptive.png').read_bytes().startswith(b'\x89PNG')
    assert 'What the detectors do not do' in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, 'in_batches', None)
        assert evasion.evade(run) == printed
    # The report shows it, in the words of the mode itself.
    title = 'What the detectors do not do'
    assert printed.split(title)[1].split('\n\nWritten')[0].strip() in results_lib.make_report(run)
    assert title in (run.workdir / 'report' / 'report.html').read_text()


@pytest.mark.slow
def test_detectors_of_views_are_attacked_through_them(finished, tmp_path, one_in_two):
    """The sweep's, fitted on its mixture; and what is stored is not attacked anew."""
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    swept, settings = run.config.sweep, run.config.adaptive
    settings.epsilons, settings.steps, settings.images = (0.3,), 4, 8
    settings.methods, settings.attacks = ('views_alone',), ('selective',)
    with pytest.raises(UsageError, match='sweep.mixture'):
        evasion.evade(run)
    swept.epsilons, swept.attacks, swept.mixture, swept.noise = (0.3,), (), ('fgsm',), True
    swept.views, swept.images, settings.rounds = ('reconstruction', 'shift', 'bits'), 150, 1
    printed = evasion.evade(run)
    result = json.loads((run.workdir / 'adaptive.json').read_text())
    again = 'views_alone, round 1'
    attacked = [(row['method'], row['attack']) for row in result['rows']]
    expected = [(m, a) for m in ('views_alone', again) for a in ('fgsm', 'selective')]
    assert attacked == expected
    plain, knowing, *_ = result['rows']
    assert knowing['evasion'] >= plain['evasion']
    assert set(result['false_alarms']) == {'views_alone', again}
    costs = result['auroc_of_the_mixture']
    assert list(costs) == ['views_alone, round 0', again]
    assert all(0 <= cost <= 1 for cost in costs.values()) and len(set(costs.values())) == 2
    assert 'other views, round 1' in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, 'in_batches', None)
        assert evasion.evade(run) == printed


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
    (tmp_path / 'run' / 'classifier').mkdir()
    config.seed = 5
    with pytest.raises(config_lib.UsageError, match='seed'):
        storage.open_workdir(tmp_path / 'run', config)


def test_other_settings_are_attacked_anew(finished, tmp_path, monkeypatch):
    """What is stored of one number of steps is none of another's; of the same it is."""
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    settings, attacked = run.config.adaptive, []

    def attack_batch(*arrays, name, steps, weight, **_):
        attacked.append((name, steps, weight))
        count = len(arrays[-1])
        return np.ones(count, bool), np.ones(count, bool), np.full(count, steps), arrays[-2]

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


def test_only_fitted_detectors_can_be_attacked(finished, tmp_path):
    shutil.copytree(finished[0].workdir, tmp_path / 'run')
    run = make_run(tmp_path / 'run')
    run.config.adaptive.methods = ('pooled',)
    with pytest.raises(UsageError, match="has \\['pooled'\\]"):
        evasion.evade(run)


def test_where_a_detector_never_calls_is_said(capsys, tmp_path):
    run = make_run(tmp_path)
    storage.write_record(tmp_path / 'dataset.json', {'class_names': ['one', 'two', 'three']})
    target = evasion._Target('detector', {}, np.array([1.0, np.inf, np.inf]), None, [], '', {})
    evasion._tell_unthresholded(run, target)
    assert 'adaptive, detector: no threshold for two, three, so' in capsys.readouterr().err
    evasion._tell_unthresholded(run, target._replace(thresholds=np.zeros(3)))
    assert not capsys.readouterr().err


def test_all_rows_are_of_the_same_images():
    """Those on which none of the detectors was fitted, and what is kept is known by them."""
    ids = np.array([5, 3, 9, 1]), np.array([1, 2, 3, 9, 8])
    targets = [evasion._Target('detector', {}, None, None, each, 'x', {}) for each in ids]
    for count, expected in ((2, [3, 9]), (9, [3, 9, 1])):
        found = evasion._on_the_same(targets, count)
        assert [target.ids.tolist() for target in found] == [expected] * 2
    names = {evasion._on_the_same(targets, count)[0].name for count in (2, 3, 9)}
    assert len(names) == 2
    with pytest.raises(UsageError, match='No test image is left'):
        evasion._on_the_same([targets[0], targets[1]._replace(ids=np.array([2]))], 9)


def test_an_attacker_says_how_far_it_is(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path)
    run.config.adaptive.attacks, run.config.adaptive.epsilons = ('joint',), (0.1,)
    target = evasion._Target('detector', None, None, None, np.arange(3), 'a', {})
    known = {key: np.zeros(3, int) for key in ('wrong', 'evades', 'steps')}
    monkeypatch.setattr(evasion, '_attack', lambda *_: known)
    evasion._resisted(run, None, target)
    assert 'adaptive, detector: none 0, 3 of 3, 0 minutes left' in capsys.readouterr().err
