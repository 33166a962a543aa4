"""Laws of the sweep over attacks, epsilons and windows."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from occjax import comparators, data, names
from occjax.config import Attack
from occjax.experiment import devices, shard, stages, storage, store
from occjax.experiment.run import Run
from occjax.probes import conditions, sweep
from occjax.report import canvas, tables
from occjax.report import sweep as sweep_report
from occjax.types import UsageError
from tests import small_run
from tests.small_run import make_run

pytestmark = pytest.mark.usefixtures('small_plan')


def copied(finished, workdir, *folders):
    """Returns a run with the classifier of another."""
    run = make_run(workdir)
    for name in ('classifier', *folders):
        shutil.copytree(finished[0].workdir / name, run.workdir / name)
    shutil.copy(finished[0].workdir / 'dataset.json', run.workdir)
    return run


@pytest.mark.slow
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
    maps, _ = store.load_shards(finished[0], 'test')
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
    judged = 0.4 * attacked['successful']
    assert 0.5 * judged < own_attack['n_adversarial'] < 1.5 * judged
    ends = {'interval': {'auroc': own_attack['interval']}}  # None, if too few judge in some seed.
    assert tables.with_interval(ends | {'auroc': own_attack['auroc']}, 'auroc') in printed
    assert 'FGSM, 0.02' in printed and 'fgsm' not in printed
    assert len({json.dumps(row['auroc']) for row in result['occluders']}) == 3
    fgsm, windows, *_ = sweep_report.summary(
        sweep_report.condense(result)
    )  # What is kept shows both.
    assert 'and noise' not in fgsm.header and len(fgsm.header) == len(fgsm.rows[0]) == 2 + 2
    assert [row[1] for row in windows.rows] == ['10', '5', '14']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, 'in_batches', None)
        assert sweep.sweep(run) == printed


@pytest.mark.slow
def test_a_mixture_is_judged_by_each_attack_seen_or_left_out(finished, tmp_path):
    """With noise among the clean ones, and other views beside the windows."""
    run = copied(finished, tmp_path / 'run', 'magnet')
    wanted = run.config.sweep
    wanted.epsilons, wanted.attack_epsilons = (0.2,), (0.3,)
    wanted.attacks, wanted.mixture, wanted.noise = ('bim', 'square'), ('fgsm', 'bim'), True
    wanted.views = ('reconstruction', 'blur', 'flip')
    wanted.methods = ('all_views', *names.RIVALS, 'pid', 'magnet_divergence')
    twin = make_twin(tmp_path / 'twin')
    wanted.twin = str(twin.workdir)
    wanted.steps, wanted.images, wanted.windows = 3, 150, False
    printed = sweep.sweep(run)
    result = json.loads((run.workdir / 'sweep.json').read_text())
    judged = ['fgsm 0.2', 'fgsm 0.3', 'bim 0.3', 'square 0.3']
    assert list(result['attacks']) == judged
    fitted = ['fgsm 0.2', 'fgsm 0.3', 'mixture', 'mixture without fgsm', 'mixture without bim']
    for rows in result['transfer'].values():
        assert list(rows) == fitted
        assert all(list(row) == judged for row in rows.values())
        assert rows['mixture']['square 0.3']['with_noise']['auroc'] is not None
    assert 'against clean and noise' in printed
    assert [row['passes'] for row in result['search']['order']] == [1, 2, 3, 4]
    assert set(result['search']['without']) == set(wanted.views)
    assert 'the most useful first' in printed
    assert result['passes'] == {
        **{'all_views': 1 + 9 + 3, 'input_mfs': 0, 'multi_lid': 1},
        **{'sid': 2, 'pid': 2, 'magnet_divergence': 2},
    }
    kept = sweep_report.condense(result)
    assert sweep_report.summary(kept) == sweep_report.summary(result)
    assert len(json.dumps(kept['transfer'])) < 0.7 * len(json.dumps(result['transfer']))
    own, mixture, *_ = sweep_report.summary(result)
    row = next(row for row in mixture.rows if row[0] == 'InputMFS, magnitudes of the image')
    rows = result['transfer']['input_mfs']
    seen, unseen = (rows[name]['bim 0.3']['auroc'] for name in ('mixture', 'mixture without bim'))
    assert row[3] == f'{seen:.3f} / {unseen:.3f}'
    assert row[4] == f'– / {rows["mixture"]["square 0.3"]["auroc"]:.3f}'  # It is never in it.
    values = [float(cell.split(' / ')[1]) for cell in row[1:-1]]
    assert row[-1].split(' / ')[1] == f'{min(values):.3f}'
    cell = rows['fgsm 0.2']['fgsm 0.2']['with_noise']
    assert f'{cell["auroc"]:.3f}' in own.rows[1][3]
    rows = result['transfer']['all_views']
    assert rows['mixture']['bim 0.3']['auroc'] != rows['mixture without bim']['bim 0.3']['auroc']
    with np.load(next((run.workdir / 'sweep').glob('*-views-spectra/noise*.npz'))) as part:
        assert part['views'].shape == (len(part['label']), 3, 10)
        assert part['spectrum'].shape == (len(part['label']), 16 * 9 * 3)
        assert not part['is_adversarial'].any()
        np.testing.assert_array_equal(part['unoccluded'].argmax(-1), part['label'])
    (folder,) = (run.workdir / 'sweep').glob('twin-*-20-of-2000-comparators')
    assert len(list(folder.glob('*.npz'))) == len(list(run.workdir.glob('sweep/*-spectra/*.npz')))
    variables, both = stages.load_variables(run), stages.load_variables(twin)
    sets = sweep.mapped(run, variables)
    # Nothing is stored of images but what is seen of them; those of clean ones are known.
    images = data.take(run.dataset.test, sets.clean.image_id)
    np.testing.assert_allclose(sets.clean.twin, twin.network.fn(both, images), atol=1e-3)
    features, reference = (
        run.network.features_fn(variables, each).reshape(len(each), -1)
        for each in (images, stages.comparator_images(run).astype(np.float32) / 255)
    )
    nearest = comparators.multi_lid(features, reference, neighbours=20)
    np.testing.assert_allclose(sets.clean.neighbours, nearest, atol=1e-3)
    compared = shard.comparing(run, variables, stages.load_autoencoder(run))(images)
    np.testing.assert_allclose(sets.clean.comparators, compared, atol=1e-4)
    noisy = sets.noise[0.3]
    kept = sets.clean.select(np.isin(sets.clean.image_id, noisy.image_id))
    assert np.abs(kept.twin - noisy.twin).max() > 1e-2


@pytest.mark.slow
def test_where_no_method_sees_windows_there_are_none(finished, tmp_path):
    """And those that do not look find the same."""
    found = []
    for name, methods in {'with': ('detector', 'views_alone'), 'none': ('views_alone',)}.items():
        run = copied(finished, tmp_path / name, 'magnet')
        wanted = run.config.sweep
        wanted.epsilons, wanted.attacks, wanted.mixture = (0.3,), ('square',), ('fgsm', 'square')
        wanted.views, wanted.methods, wanted.images, wanted.steps = ('flip',), methods, 80, 2
        wanted.windows = False
        sweep.sweep(run)
        result = json.loads((run.workdir / 'sweep.json').read_text())
        found.append((result['transfer']['views_alone'], result['search']))
        shapes = set()
        for path in (run.workdir / 'sweep').glob('*-views/*.npz'):
            with np.load(path) as part:
                shapes.add(part['logits'].shape[1:])
        assert shapes == {(3, 3, 10) if name == 'with' else (0, 0, 10)}
    assert found[0] == found[1]


def make_twin(workdir, **fields):
    """Returns a run of the same images, whose classifier is another."""
    config = small_run.get_config()
    config.classifier.epochs = 1
    config.data = dataclasses.replace(config.data, **fields)
    twin = Run(config=config, workdir=storage.open_workdir(workdir, config))
    stages.train(twin)
    return twin


def test_a_twin_of_other_images_is_refused(finished, tmp_path):
    """One that was trained on images which this run tests by would know them by heart."""
    run = make_run(tmp_path / 'run')
    shutil.copy(finished[0].workdir / 'dataset.json', run.workdir)
    run.config.sweep.methods = ('sid',)
    for twin, line in (
        (make_twin(tmp_path / 'twin', resplit_per_class=79).workdir, 'made from other images'),
        (tmp_path / 'nowhere', 'nowhere.*does not exist: run --mode=train'),
    ):
        run.config.sweep.twin = str(twin)
        with pytest.raises(UsageError, match=line):
            conditions.sights(run, None)
    run.config.sweep.methods = ('detector',)
    assert len(conditions.sights(run, None)) == 1  # Nobody asks it.


@pytest.mark.slow
def test_a_sweep_whose_attacks_fail_ends_with_a_table(finished, tmp_path):
    """With every method, and other windows for those that see no more."""
    run = copied(finished, tmp_path / 'run')
    wanted = run.config.sweep
    wanted.epsilons, wanted.attacks, wanted.mixture = (1e-6,), ('square',), ('fgsm', 'square')
    wanted.attack_epsilons, wanted.noise, wanted.images, wanted.steps = (1e-6,), True, 60, 1
    wanted.views, wanted.methods = ('flip',), ('detector', 'views_alone', 'input_mfs', 'multi_lid')
    wanted.occluders = ((4, 6, 0.0),)
    run = run.changed(config=dataclasses.replace(run.config, attack=Attack(epsilon=1e-6)))
    assert '| Square, 1e-06 | 0 | 0.000 ' in sweep.sweep(run)
    result = json.loads((run.workdir / 'sweep.json').read_text())
    assert result['search'] is None
    assert [set(row['auroc']) for row in result['occluders']] == [{'detector'}] * 3


def test_two_epsilons_are_two_attacks(tmp_path):
    """However near they are; each is there once, and short names stay where they name one."""
    run = make_run(tmp_path / 'run')
    run.config.attack.epsilon, run.config.sweep.attacks = 0.03137, ('pgd',)
    run.config.sweep.epsilons = (8 / 255, 0.1, 0.1)
    run.config.sweep.attack_epsilons = (8 / 255, 0.03137, 8 / 255)
    found = sweep.attacks(run)
    near = (0.03137, 8 / 255)
    assert sorted(found.values()) == [
        *(('fgsm', e) for e in (*near, 0.1)),
        *(('pgd', e) for e in near),
    ]
    assert {'fgsm 0.1', 'fgsm 0.03137', f'pgd {8 / 255!r}'} <= set(found)
    run.config.attack.epsilon, run.config.sweep.attack_epsilons = 0.1, ()
    assert list(sweep.attacks(run)) == ['fgsm 0.03137', 'fgsm 0.1', 'pgd 0.1']


def test_a_spectrum_of_a_large_grey_image_is_finite(tmp_path):
    """Its constant part is the sum of all pixels, beyond half precision from 256 pixels a side."""
    run = make_run(tmp_path / 'run')
    run.config.data.image_size, run.config.sweep.methods = 384, ('input_mfs',)
    (sight,) = conditions.sights(run, None)
    found = sight.see_fn(np.full((1, 384, 384, 3), 0.5, np.float32), np.zeros((1, 10), np.float32))
    spectrum = found['spectrum'].reshape(384, 193, 3)
    np.testing.assert_allclose(spectrum[0, 0], 0.5 * 384**2, rtol=1e-5)
    assert np.isfinite(spectrum).all()


def test_detectors_are_those_of_their_settings(tmp_path):
    """Whatever makes another bank has another name; who else is asked makes none."""
    run = make_run(tmp_path / 'run')
    run.config.sweep.mixture = ('fgsm',)

    def name(**fields):
        changed = dataclasses.replace(run.config.sweep, **fields)
        config = dataclasses.replace(run.config, sweep=changed)
        return sweep._deployed_path(run.changed(config=config), 'views_alone')

    own = name()
    for fields in ({'noise': True}, {'steps': 77}, {'images': 7}, {'views': ('flip',)}):
        assert name(**fields) != own
    run.config.occlusion.test_images = 7  # Of so few a sweep takes no more.
    assert name() == name(images=9) != own
    run.config.occlusion.test_images = 0
    for fields in ({'twin': 'there'}, {'methods': ('views_alone', 'sid')}, {'windows': False}):
        assert name(**fields) == own


def test_windows_to_try_differ_from_the_config_s_in_one_thing_each(tmp_path):
    run = make_run(tmp_path / 'run')
    own = (5, 4, (0.5,))
    assert sweep.occluders(run)[0] == own
    for windows in sweep.occluders(run)[1:]:
        assert sum(a != b for a, b in zip(windows, own, strict=True)) == 1


def test_a_half_is_the_middle_of_the_matrix_s_colours():
    """What lies as far above as below differs as much from white, in another colour."""
    attacks = {f'fgsm {e:.4g}': {'attack': 'fgsm', 'epsilon': e} for e in (8 / 255, 0.1)}
    values = iter((0.05, 0.95, 0.5, 0.7))
    rows = {
        name: {
            other: {'auroc': next(values), 'interval': None, 'over_classes': {'auroc': None}}
            for other in attacks
        }
        for name in attacks
    }
    result = {'attacks': attacks, 'transfer': {'views_alone': rows}}
    figure, axes = canvas.axes(4, 4)
    sweep_report._plot_matrix(axes, result, 'views_alone', rows)
    (image,) = axes.get_images()
    (low, high), (half, _) = image.to_rgba(image.get_array())[..., :3]
    np.testing.assert_allclose(half, 0.97, atol=0.03)
    assert low[0] > low[2] and high[2] > high[0]
    np.testing.assert_allclose(low.mean(), high.mean(), atol=0.1)
    words = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert words == ['FGSM, 8/255', 'FGSM, 0.1'] * 2
    assert axes.get_title().startswith('AUROC over all maps, Confidence and changes')


def test_what_is_stored_takes_no_minutes(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path)
    wanted = run.config.sweep
    wanted.attacks, wanted.epsilons, wanted.steps = ('pgd', 'square'), (0.5,), 10
    wanted.attack_epsilons, run.config.attack.epsilon = (), 0.5
    monkeypatch.setattr(stages, 'mapped_ids', lambda run, split: np.arange(30))
    sight = conditions.Sight(None, 'none', {})
    work = {
        name: conditions.work(run, [sight], name, 0.5, seen=4) for name in ('fgsm', 'pgd', 'square')
    }
    assert work == {'fgsm': 30 * (6 + 3), 'pgd': 30 * (6 + 30), 'square': 30 * (6 + 10)}
    for path, *_ in conditions._places(run, sight, 'pgd', 0.5):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert conditions.work(run, [sight], 'pgd', 0.5, seen=4) == 0
    monkeypatch.setattr(conditions, 'sights', lambda run, variables: [sight])
    monkeypatch.setattr(conditions, 'mapped', lambda *_: None)
    monkeypatch.setattr(sweep, '_of', lambda clean, attacked: attacked)
    sweep.mapped(run, None)
    assert '3 of 3, 0 minutes left' in capsys.readouterr().err
