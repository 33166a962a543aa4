"""A run in a few kilobytes and one table, to be kept beside its config."""

from collections.abc import Sequence

from occjax import config
from occjax.report import tables

_KEPT = (
    'n_correct',
    'n_adversarial',
    'balanced_accuracy',
    'auroc',
    'auroc_with_noise',
    'paper_accuracy',
)
_KINDS = ('correct', 'adversarial')


def condense(results: dict) -> dict:
    """Returns results.json without what fills it: rivals by class, curves, other rates."""
    detection = {
        protocol: {
            'overall': _rates(found['overall']),
            'per_class': {name: _rates(entry) for name, entry in found['per_class'].items()},
            'baselines': {name: _rates(entry) for name, entry in found['baselines'].items()},
        }
        for protocol, found in results['detection'].items()
    }
    return {name: value for name, value in results.items() if name != 'adaptive'} | {
        'detection': detection
    }


def _rates(entry):
    """Returns the rates that are kept of one scorer, of both averages, with their intervals."""
    kept = {name: entry[name] for name in (*_KEPT, 'classes') if name in entry}
    for beside in ('interval', 'over'):
        kept[beside] = {k: v for k, v in entry.get(beside, {}).items() if k in _KEPT}
    names = ('over_confidence', 'rank_agreement')
    kept |= {name: entry[name] for name in names if name in entry}
    if 'over_classes' in entry:
        kept['over_classes'] = _rates(entry['over_classes'])
    noise = entry.get('controls', {}).get('noise')
    return kept | ({'noise': noise} if noise else {})


def table(summary: dict) -> str:
    """Returns what `condense` kept as Markdown: a line of the run, and a row for each scorer.

    And a row for each class, where there are numbers of the paper's. Columns without any number are
    left out.
    """
    classifier, attack, detection = (summary[k] for k in ('classifier', 'attack', 'detection'))
    means, manifest = summary['map_mean'], summary['manifest']
    accuracy, rate, attempted, correct, adversarial = map(
        tables.cell,
        (
            *(classifier['test_accuracy'], attack['success_rate'], attack['attempted']),
            *(means['correct'], means['adversarial']),
        ),
    )
    judged = ', '.join(
        f'{_n(detection[protocol]["overall"])} under protocol {tables.words(protocol)}'
        for protocol in detection
    )
    line = (
        f'Config {manifest["config_hash"]}; test accuracy {accuracy}; of {attempted} attacks of '
        f'ε = {tables.epsilon(attack["epsilon"])} succeed {rate}; mean cell of correct / '
        f'adversarial maps {correct} / {adversarial}; judged by {judged} (correct + adversarial '
        'maps, means of the seeds).'
    )
    rows = []
    for name in ('detector', *detection['held_out']['baselines']):
        paper, held_out = (_entry(detection[protocol], name) for protocol in ('paper', 'held_out'))
        passes = tables.cell(summary['cost'][name]['forward_passes'])
        row = {'Method': tables.words(name), 'Forward passes': passes}
        row |= _columns('Balanced accuracy, protocol paper', paper, 'balanced_accuracy')
        row |= _columns('Balanced accuracy, held out', held_out, 'balanced_accuracy')
        row |= _columns('AUROC, held out', held_out, 'auroc')
        row |= _columns('AUROC against clean and noise', held_out, 'auroc_with_noise')
        row |= _columns('AUROC over confidence', held_out.get('over_confidence') or {}, 'auroc')
        flagged = (held_out.get('noise') or {}).get('flagged_at_5_fpr')
        rows.append(row | {'Noise flagged at 5 % FPR': tables.cell(flagged)})
    return f'{line}\n\n{_body(rows)}\n{_classes(summary)}'


def comparison(summaries: Sequence[dict]) -> str:
    """Returns what `condense` kept of several runs as Markdown: a row for each.

    The first column is what its config has other than the first run's.
    """
    rows = []
    for found in summaries:
        configs = (each['manifest']['config'] for each in (summaries[0], found))
        changed = config.difference(*(config.identity(config.complete(each)) for each in configs))
        detection = found['detection']
        paper, held_out = (detection[protocol]['overall'] for protocol in ('paper', 'held_out'))
        row = {
            'Reading': '; '.join(changed) or 'the config',
            'Attacks succeed': tables.cell(found['attack']['success_rate']),
            'Mean cell, correct / adversarial': ' / '.join(
                tables.cell(found['map_mean'][kind]) for kind in _KINDS
            ),
            'n, protocol paper': _n(paper),
        }
        row |= _columns('Balanced accuracy, protocol paper', paper, 'balanced_accuracy')
        row['n, held out'] = _n(held_out)
        row |= _columns('Balanced accuracy, held out', held_out, 'balanced_accuracy')
        rows.append(row | _columns('AUROC, held out', held_out, 'auroc'))
    return _body(rows)


def _n(entry):
    """Returns how many correct and adversarial maps judge."""
    return ' + '.join(tables.cell(entry[f'n_{kind}']) for kind in _KINDS)


def _columns(head, entry, key):
    """Returns the cells of both averages by their heads."""
    means = {'': entry, 'over_classes': entry.get('over_classes') or {}}
    return {
        f'{head}, {label}': tables.with_interval(means[average], key)
        for average, label in tables.AVERAGES.items()
    }


def _body(rows):
    """Returns rows by their heads as a table without a title, and without columns of no number."""
    heads = [head for head in rows[0] if {row[head] for row in rows} != {'–'}]
    lines = [tuple(row[head] for head in heads) for row in rows]
    table = tables.Table('', tuple(heads), lines)
    return tables.markdown(table).split('\n\n', 1)[1]


def _classes(summary):
    """Returns Tables II to V in one, ours beside the paper's; nothing where it has no such."""
    detection, rows = summary['detection'], []
    for name, counts in summary['heatmaps'].items():
        row = {'Class': name}
        for kind in _KINDS:
            pair = tables.cell(counts[kind]), tables.cell(counts[f'paper_{kind}'])
            row[f'{kind.capitalize()} maps (paper)'] = '{} ({})'.format(*pair)
        for protocol, found in detection.items():
            entry, label = found['per_class'][name], tables.words(protocol)
            row[f'n, {label}'] = _n(entry)
            head = f'Balanced accuracy, {label}'
            row[head] = tables.with_interval(entry, 'balanced_accuracy')
        stated = detection['paper']['per_class'][name]['paper_accuracy']
        rows.append(row | {"Paper's accuracy": tables.stated(stated) or ''})
    if not all(row["Paper's accuracy"] for row in rows):
        return ''
    return f'\n{_body(rows)}\n'


def _entry(found, name):
    return found['overall'] if name == 'detector' else found['baselines'][name]
