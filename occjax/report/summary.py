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
    """Returns the rates that are kept of one scorer, with their intervals."""
    kept = {name: entry[name] for name in _KEPT if name in entry}
    intervals = {name: ends for name, ends in entry.get('interval', {}).items() if name in _KEPT}
    beside = {name: entry[name] for name in ('over_confidence', 'rank_agreement') if name in entry}
    noise = entry.get('controls', {}).get('noise')
    return kept | {'interval': intervals} | beside | ({'noise': noise} if noise else {})


def table(summary: dict) -> str:
    """Returns what `condense` kept as Markdown: a line of the run, and a row for each scorer.

    And a row for each class, where there are numbers of the paper's.
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
    line = (
        f'Config {manifest["config_hash"]}; test accuracy {accuracy}; of {attempted} attacks of '
        f'ε = {tables.epsilon(attack["epsilon"])} succeed {rate}; mean cell of correct / '
        f'adversarial maps {correct} / {adversarial}.'
    )
    rows = []
    for name in ('detector', *detection['held_out']['baselines']):
        paper, held_out = (_entry(detection[protocol], name) for protocol in ('paper', 'held_out'))
        noise = held_out.get('noise') or {}
        rows.append(
            (
                tables.words(name),
                tables.cell(summary['cost'][name]['forward_passes']),
                tables.with_interval(paper, 'balanced_accuracy'),
                tables.with_interval(held_out, 'balanced_accuracy'),
                tables.with_interval(held_out, 'auroc'),
                tables.with_interval(held_out, 'auroc_with_noise'),
                tables.with_interval(held_out.get('over_confidence') or {}, 'auroc'),
                tables.cell(noise.get('called_at_5_fpr')),
            )
        )
    header = (
        *('Method', 'Forward passes', 'Balanced accuracy, protocol paper', 'held out'),
        *(
            'AUROC, held out',
            'against clean and noise',
            'over confidence',
            'Noise called at 5 % FPR',
        ),
    )
    return f'{line}\n\n{_body(header, rows)}\n{_classes(summary)}'


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
        rows.append(
            (
                '; '.join(changed) or 'the config',
                tables.cell(found['attack']['success_rate']),
                ' / '.join(tables.cell(found['map_mean'][kind]) for kind in _KINDS),
                tables.with_interval(paper, 'balanced_accuracy'),
                tables.with_interval(held_out, 'balanced_accuracy'),
                tables.with_interval(held_out, 'auroc'),
            )
        )
    header = (
        *('Reading', 'Attacks succeed', 'Mean cell, correct / adversarial'),
        *('Balanced accuracy, protocol paper', 'held out', 'AUROC, held out'),
    )
    return _body(header, rows)


def _body(header, rows):
    """Returns a table without a title."""
    return tables.markdown(tables.Table('', header, rows)).split('\n\n', 1)[1]


def _classes(summary):
    """Returns Tables II to V in one, ours beside the paper's; nothing where it has no such."""
    detection, rows = summary['detection'], []
    for name, counts in summary['heatmaps'].items():
        ours = [detection[protocol]['per_class'][name] for protocol in ('paper', 'held_out')]
        cells = (
            *(
                f'{tables.cell(counts[kind])} ({tables.cell(counts[f"paper_{kind}"])})'
                for kind in _KINDS
            ),
            *(tables.with_interval(entry, 'balanced_accuracy') for entry in ours),
            tables.stated(ours[0]['paper_accuracy']) or '',
        )
        rows.append((name, *cells))
    if not all(row[-1] for row in rows):
        return ''
    header = (
        *('Class', 'Correct maps (paper)', 'Adversarial maps (paper)'),
        *('Balanced accuracy, protocol paper', 'held out', "Paper's accuracy"),
    )
    return f'\n{_body(header, rows)}\n'


def _entry(found, name):
    return found['overall'] if name == 'detector' else found['baselines'][name]
