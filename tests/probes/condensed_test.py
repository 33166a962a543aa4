"""Laws of runs that keep the logits of a few classes: what they find is what others find."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from occjax import data, guard
from occjax.experiment import judging, stages, storage, store
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.probes import conditions, detection, evasion, sweep
from occjax.types import HeatmapSet
from tests import small_run

pytestmark = pytest.mark.usefixtures('small_plan')


@pytest.fixture(scope='module')
def condensed(finished, tmp_path_factory):
    """The finished run's classifier in a run of its own that keeps three classes."""
    from occjax import vgg

    workdir = tmp_path_factory.mktemp('condensed')
    shutil.copytree(finished[0].workdir / 'classifier', workdir / 'classifier')
    shutil.copy(finished[0].workdir / 'dataset.json', workdir)
    config = small_run.get_config()
    config.occlusion.top_classes = 3
    config.detector.methods = (*config.detector.methods, 'logit_differences')
    run = Run(config=config, workdir=storage.open_workdir(workdir, config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vgg.PLANS, 'vgg11', small_run.SMALL)
        small_run.run_all(run)
    return run


def test_shards_hold_what_condensing_the_others_gives(finished, condensed):
    for split in ('train', 'test'):
        ours, theirs = (store.load_shards(run, split)[0] for run in (condensed, finished[0]))
        expected = theirs.condensed(3)
        assert ours.logits.shape == (len(theirs), *condensed.grid, 4)
        for field in dataclasses.fields(HeatmapSet):
            pair = [getattr(maps, field.name) for maps in (ours, expected)]
            if pair[1] is not None:
                np.testing.assert_allclose(*pair, atol=1e-4)
        np.testing.assert_allclose(ours.maps, theirs.maps, atol=1e-5)
    for kind, maps in store.load_controls(condensed).items():
        np.testing.assert_allclose(
            maps.logits, store.load_controls(finished[0])[kind].condensed(3).logits, atol=1e-4
        )


def test_the_paper_s_detectors_find_the_same(finished, condensed):
    """Its maps are the same to a last bit, and so are fitted detectors and what they say."""
    results = [
        json.loads((run.workdir / 'report' / 'results.json').read_text())
        for run in (condensed, finished[0])
    ]
    for protocol in store.PROTOCOLS:
        ours, theirs = (found['detection'][protocol]['overall'] for found in results)
        for rate in ('auroc', 'balanced_accuracy', 'tpr_at_5_fpr'):
            assert ours[rate] == pytest.approx(theirs[rate], abs=5e-3), (protocol, rate)
        scores = []
        for run in (condensed, finished[0]):
            division = store.divide(run, protocol)
            banks = store.load_banks(run, division, protocol, 'detector')
            scores.append(judging.score_banks(banks, METHODS['detector'], division.maps))
        np.testing.assert_allclose(*scores, rtol=1e-2, atol=1e-2)


def test_verdicts_are_those_of_the_stored_maps(finished, condensed, tmp_path, capsys):
    """On files, by the paper's detectors as without condensing, and by those that see ranks."""
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, pixels in enumerate(condensed.dataset.test.images[:10]):
        Image.fromarray(pixels).save(folder / f'{i}.png')
    said = []
    for run in (condensed, finished[0]):
        asked = dict(detectors=('detector', 'all_logits'), output=str(tmp_path / 'found'))
        detection.detect(run, str(folder), **asked)
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for one, other in zip(*said, strict=True):
        scores = [line['detectors']['detector']['score'] for line in (one, other)]
        assert one['class'] == other['class'] and scores[0] == pytest.approx(scores[1], abs=1e-3)
    maps = store.divide(condensed, 'held_out').maps
    maps = maps.select(~maps.is_adversarial & (maps.image_id < 10))
    expected = guard.judge_maps(stages.load_guard(condensed, 'all_logits'), maps).score
    found = [said[0][i]['detectors']['all_logits']['score'] for i in maps.image_id]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_guard_of_the_run_sees_what_its_detectors_see(condensed):
    """Ranked columns, for whoever loads it."""
    found = guard.load(condensed.workdir / 'detectors' / 'all_logits.guard.npz')
    variables = stages.load_variables(condensed)
    logits_fn = functools.partial(condensed.network.fn, variables)
    maps = store.divide(condensed, 'held_out').maps.select(slice(0, 6))
    maps = maps.select(~maps.is_adversarial)
    images = data.take(condensed.dataset.test, maps.image_id)
    said = guard.judge(found, logits_fn, images)
    np.testing.assert_allclose(said.score, guard.judge_maps(found, maps).score, atol=1e-3)


@pytest.mark.slow
def test_a_sweep_and_an_attack_on_detectors_see_condensed_maps(condensed, tmp_path, one_in_two):
    shutil.copytree(condensed.workdir, tmp_path / 'run')
    run = dataclasses.replace(condensed, workdir=tmp_path / 'run')
    run = dataclasses.replace(run, config=small_run.get_config())
    run.config.occlusion.top_classes = 3
    swept = run.config.sweep
    swept.views, swept.mixture, swept.attacks = ('flip', 'blur'), ('fgsm',), ()
    swept.epsilons, swept.attack_epsilons = (0.3,), (0.3,)
    variables = stages.load_variables(run)
    maps = conditions.mapped(run, variables, conditions.sights(run, variables), 'fgsm', 0.3)
    assert maps.views.shape == (len(maps), 2, 4)
    plain = dataclasses.replace(run, config=small_run.get_config(), workdir=tmp_path / 'plain')
    shutil.copytree(run.workdir / 'classifier', plain.workdir / 'classifier')
    shutil.copy(run.workdir / 'dataset.json', plain.workdir)
    plain.config.sweep = swept
    whole = conditions.mapped(plain, variables, conditions.sights(plain, variables), 'fgsm', 0.3)
    np.testing.assert_allclose(maps.views, whole.condensed(3).views, atol=1e-4)
    settings = run.config.adaptive
    settings.epsilons, settings.steps, settings.images = (0.3,), 2, 8
    settings.attacks, settings.methods = ('joint',), ('all_logits', 'all_views')
    swept.windows, swept.methods = False, ('all_logits', 'all_views')
    sweep.sweep(run)
    found = json.loads((run.workdir / 'sweep.json').read_text())
    assert len(found['search']['order']) == 3
    assert set(found['transfer']) == {'all_logits', 'all_views'}
    evasion.evade(run)
    result = json.loads((run.workdir / 'adaptive.json').read_text())
    assert {row['method'] for row in result['rows']} == {'all_logits', 'all_views'}
