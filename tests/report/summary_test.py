"""Published numbers are those of the runs that are kept beside the configs."""

import copy
import json

import pytest

from occjax.report import summary, sweep, tables
from tests.conftest import ROOT

KEPT = sorted((ROOT / 'configs' / 'results').glob('*.json'))


@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.stem)
def test_a_page_s_tables_are_the_run_s(path):
    assert path.stat().st_size < 200_000
    kept, page = json.loads(path.read_text()), (ROOT / 'configs' / 'README.md').read_text()
    if 'transfer' not in kept:
        assert summary.table(kept) in page
    else:  # Of a sweep.
        for table in sweep.summary(kept):
            assert tables.markdown(table).split('\n\n')[1] in page


def test_readme_s_views_are_the_sweep_s():
    kept = json.loads((ROOT / 'configs' / 'results' / 'cifar10-sweep.json').read_text())
    row = next(
        line
        for line in (ROOT / 'README.md').read_text().splitlines()
        if line.startswith('| **thirteen views**')
    )
    label, passes, *cells, worst, square = row.strip('| ').replace('**', '').split(' | ')
    own = kept['transfer']['views_alone']
    expected = []
    for name in ('fgsm 0.03137', 'fgsm 0.1'):
        for found in (own[name][name], own[name][name]['with_noise']):
            half = (found['interval'][1] - found['interval'][0]) / 2
            expected.append(f'{found["auroc"]:.3f} ± {half:.3f}'.replace('0.', '.'))
    assert (label, int(passes), cells) == (
        'thirteen views',
        kept['passes']['views_alone'],
        expected,
    )
    unseen = {}
    for name, attack in kept['attacks'].items():
        without = f'mixture without {attack["attack"]}'
        unseen[name] = own[without if without in own else 'mixture'][name]['auroc']
    at_8 = {name: value for name, value in unseen.items() if name.endswith('0.03137')}
    assert square == f'{at_8.pop("square 0.03137"):.3f}'.lstrip('0')
    assert worst == f'{min(at_8.values()):.3f} (DeepFool)'.lstrip('0')
    assert min(at_8, key=at_8.get) == 'deepfool 0.03137'


def test_a_summary_is_small_and_says_what_the_results_say(finished):
    run, _ = finished
    report = run.workdir / 'report'
    results = json.loads((report / 'results.json').read_text())
    kept = json.loads((report / 'summary.json').read_text())
    assert (report / 'summary.json').stat().st_size < 100_000
    for protocol, found in kept['detection'].items():
        whole = results['detection'][protocol]
        for key in ('balanced_accuracy', 'auroc'):
            assert found['overall'][key] == whole['overall'][key]
            assert found['baselines']['map_mean'][key] == whole['baselines']['map_mean'][key]
    text = summary.table(kept)
    assert f'{results["classifier"]["test_accuracy"]:.3f}' in text
    assert text.count('\n| ') == 2 + 1 + len(results['detection']['held_out']['baselines'])


def test_runs_are_compared_by_what_their_configs_differ_in():
    kept = json.loads((ROOT / 'configs' / 'results' / 'digits.json').read_text())
    other = copy.deepcopy(kept)
    other['manifest']['config']['occlusion']['fill'] = [0.0]
    other['detection']['held_out']['overall']['balanced_accuracy'] = 0.123
    del other['manifest']['config']['sweep']  # As in a file of before there was any.
    own, changed = summary.comparison([kept, other]).splitlines()[2:]
    assert own.startswith('| the config | ')
    assert changed.startswith('| occlusion.fill: [0.5] -> [0.0] | ')
    assert ' | 0.123 ± ' in changed and '0.123' not in own


def test_classes_are_beside_the_paper_s_where_it_has_them():
    text = summary.table(json.loads((ROOT / 'configs' / 'results' / 'cifar10.json').read_text()))
    dog = next(line for line in text.splitlines() if line.startswith('| Dog'))
    assert '(3,630)' in dog and '(337)' in dog and dog.endswith('| 0.50 |')  # Tables III and IV.
    text = summary.table(json.loads((ROOT / 'configs' / 'results' / 'digits.json').read_text()))
    assert '| Zero' not in text
