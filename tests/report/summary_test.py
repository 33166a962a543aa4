"""Published numbers are those of the runs that are kept beside the configs."""

import copy
import json

import pytest

from occjax.report import summary, sweep, tables
from tests.conftest import ROOT

DETECTORS = {  # README's words for methods
    "the paper's detector": 'detector',
    'logits of the image alone': 'unoccluded_logits',
    'all logits under all windows': 'all_logits',
    '**thirteen views**': 'views_alone',
    'InputMFS': 'input_mfs',
    'MagNet, divergence': 'magnet_divergence',
    'multiLID': 'multi_lid',
    'SID': 'sid',
    'PID': 'pid',
}
WHOLE = ('cifar10-part-matched', 'imagenette-matched')  # Readings of which the page has all.
KEPT = sorted((ROOT / 'configs' / 'results').glob('*.json'))


@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.stem)
def test_a_page_s_tables_are_the_run_s(path):
    assert path.stat().st_size < 200_000
    assert '"/' not in path.read_text()  # No place of the machine that it was made on.
    kept, page = _kept(path.stem), (ROOT / 'configs' / 'README.md').read_text()
    if 'attempted' in kept.get('attack', {}):  # Of a whole run.
        other = path.stem.rpartition('-')[0]  # `cifar10-quick` is a row beside `cifar10`.
        if other:
            for row in summary.comparison([_kept(other), kept]).splitlines():
                assert row in page
        if not other or path.stem in WHOLE:
            assert summary.table(kept) in page
        return
    # Of a sweep, or of an attacker who knows the detectors.
    listed = sweep.summary(kept) if 'transfer' in kept else [tables.adaptive_table(kept)]
    for table in listed:
        assert tables.markdown(table).split('\n\n')[1] in page


def test_readme_s_detectors_are_the_runs():
    """Passes, AUROC, the worst of the attacks at 8/255 that were left out, and evasion there."""
    swept, rivals, adaptive = (_kept(f'cifar10-{name}') for name in ('sweep', 'rivals', 'adaptive'))
    page, attacks = (ROOT / 'README.md').read_text(), swept['attacks']
    assert list(rivals['attacks']) == list(attacks)
    passes, transfer = (swept[key] | rivals[key] for key in ('passes', 'transfer'))
    assert set(DETECTORS.values()) == transfer.keys() - {'all_views'}
    for label, method in DETECTORS.items():
        rows, cells = transfer[method], [str(passes[method])]
        for name in ('fgsm 0.03137', 'fgsm 0.1'):
            for found in (rows[name][name], rows[name][name]['with_noise']):
                mean = found['over_classes']
                half = (mean['interval'][1] - mean['interval'][0]) / 2 if mean['interval'] else None
                cells.append(_short(mean['auroc']) + (f' ± {_short(half)}' if half else ''))
        unseen = {}
        for name, attack in attacks.items():
            if name.endswith(' 0.03137'):
                without = rows.get(f'mixture without {attack["attack"]}', rows['mixture'])
                unseen[attack['attack']] = without[name]['over_classes']['auroc']
        worst = min(unseen, key=unseen.get)
        cells.append(f'{_short(unseen[worst])} ({tables.words(worst)})')
        evasion = [row['evasion'] for row in adaptive['rows'] if row['method'] == method]
        cells.append(f'{max(evasion):.2f}'.removeprefix('0') if evasion else '–')
        assert f'| {label} | {" | ".join(cells)} |' in page


def _kept(name):
    return json.loads((ROOT / 'configs' / 'results' / f'{name}.json').read_text())


def _short(rate):
    """Returns what README has for a rate."""
    return f'{rate:.3f}'.removeprefix('0')


def test_a_summary_is_small_and_says_what_the_results_say(finished):
    run, _ = finished
    report = run.workdir / 'report'
    results = json.loads((report / 'results.json').read_text())
    kept = json.loads((report / 'summary.json').read_text())
    assert (report / 'summary.json').stat().st_size < 100_000
    for protocol, found in kept['detection'].items():
        whole = results['detection'][protocol]
        means = [each['overall']['over_classes'] for each in (found, whole)]
        assert means[0]['classes'] == means[1]['classes'] and means[0]['auroc'] == means[1]['auroc']
        for key in ('balanced_accuracy', 'auroc'):
            assert found['overall'][key] == whole['overall'][key]
            assert found['baselines']['map_mean'][key] == whole['baselines']['map_mean'][key]
    text = summary.table(kept)
    assert f'{results["classifier"]["test_accuracy"]:.3f}' in text
    assert text.count('\n| ') == 2 + 1 + len(results['detection']['held_out']['baselines'])


def test_runs_are_compared_by_what_their_configs_differ_in():
    kept = _kept('digits')
    other = copy.deepcopy(kept)
    other['manifest']['config']['occlusion']['fill'] = [0.0]
    other['detection']['held_out']['overall'] |= {'balanced_accuracy': 0.123, 'interval': {}}
    del other['manifest']['config']['sweep']  # As in a file of before there was any.
    own, changed = summary.comparison([kept, other]).splitlines()[2:]
    assert own.startswith('| the config | ')
    assert changed.startswith('| occlusion.fill: [0.5] -> [0.0] | ')
    assert ' | 0.123 | ' in changed and '0.123' not in own


def test_classes_are_beside_the_paper_s_where_it_has_them():
    text = summary.table(_kept('cifar10'))
    dog = next(line for line in text.splitlines() if line.startswith('| Dog'))
    assert '(3,630)' in dog and '(337)' in dog and dog.endswith('| 0.50 |')  # Tables III and IV.
    text = summary.table(_kept('digits'))
    assert '| Zero' not in text


def test_a_cell_is_taken_literally():
    for text, expected in (
        ('a_b [0.5]', 'a_b [0.5]'),
        ('_a_ *b* `c`', r'\_a\_ \*b\* \`c\`'),
        ('[x](y)', r'\[x](y)'),
        ('a|b<i>\\', r'a\|b\<i>\\'),
        ('\x1b[2J', r'\\x1b[2J'),
    ):
        assert tables.escape(text) == expected
