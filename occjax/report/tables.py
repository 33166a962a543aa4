"""The paper's tables and ours: numbers to strings, once, for Markdown and the page alike.

What is None (the paper doesn't say, a class without adversarial maps) prints as an en dash.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from occjax import vgg
from occjax.progress import counted, printable
from occjax.report import paper

_COUNTS = {
    'n_correct': 'n correct',
    'n_adversarial': 'n adversarial',
    'n_thresholds': 'n for FPR',
}
_METRICS = {
    'accuracy': 'Accuracy (raw)',
    'majority_baseline': 'Majority baseline',
    'balanced_accuracy': 'Balanced accuracy',
    'auroc': 'AUROC',
    'auroc_with_noise': 'AUROC against clean and noise',
    'tpr_at_5_fpr': 'TPR at 5 % FPR',
    'tpr_at_1_fpr': 'TPR at 1 % FPR',
    'fpr_at_5_fpr': 'FPR met at 5 %',
}
RIVALS = ('max_probability', 'map_mean')  # the baselines in the per-class tables
RIVAL_RATES = ('balanced_accuracy', 'auroc')  # their columns there
_FLAGGED = {'flagged': 'share', 'flagged_at_5_fpr': 'share at 5 % FPR'}
AVERAGES = {'': 'over all maps', 'over_classes': 'over classes'}
_MEANS = (
    'Over all maps the decisions of all classes count alike, and the AUROC is the mean of the '
    "classes', weighted by their adversarial maps; maps of a class without a detector do not "
    'count. Over classes is the unweighted mean, as in the paper, of the classes that have ten '
    'judged maps of each kind in every seed. Intervals of 95 % are those of drawing other images, '
    "or Nadeau and Bengio's of the seeds where that is wider; fewer than ten maps of a kind, or "
    'three seeds, have no interval.'
)
_NEEDED = (
    'n for FPR counts the clean maps that set the thresholds at a false positive rate. A promise '
    'that fresh maps keep takes 19 of them for 5 % and 99 for 1 %: classes with fewer share one '
    'threshold, which keeps it for all of them together. And no network may have been fitted on '
    'them (under protocol paper all were).'
)


class Table(NamedTuple):
    """A table as strings; the first `text_columns` are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: tuple[str, ...] = ()  # a last row that sums up the others
    note: str = ''
    text_columns: int = 1


def build(results: dict, rows: list[vgg.Row], class_names: Sequence[str]) -> list[Table]:
    """Returns the tables in the paper's order, after one of the classifier and the attack."""
    theirs = paper.numbers(class_names)
    return [
        _outcome_table(results, theirs),
        *([_layer_table(rows)] if rows else []),
        _heatmap_table(results['heatmaps'], class_names, theirs),
        *(
            _class_table(protocol, detection, class_names, theirs)
            for protocol, detection in results['detection'].items()
        ),
        _overall_table(results['detection'], theirs),
        *(
            _control_table(protocol, detection)
            for protocol, detection in results['detection'].items()
            if (detection.get('overall') or {}).get('controls')
        ),
        *([_cost_table(results['cost'])] if results.get('cost') else []),
        adaptive_table(results.get('adaptive')),
    ]


def _outcome_table(results, theirs):
    """The classifier and the attack, beside what the paper says or implies."""
    classifier, attack = results['classifier'], results['attack']
    map_mean, low_high = results.get('map_mean') or {}, ('min_pixel', 'max_pixel')
    lines = [
        (
            'Test accuracy',
            classifier['test_accuracy'],
            stated(classifier.get('paper_test_accuracy')),
        ),
        ('Training accuracy', classifier['train_accuracy'], theirs and theirs.train_accuracy),
        (
            'ε of FGSM',
            epsilon(attack['epsilon']),
            theirs and theirs.epsilon and epsilon(theirs.epsilon),
        ),
        ('Images attacked', attack['attempted'], theirs and theirs.correct),
        ('Successful attacks', attack['successful'], theirs and theirs.adversarial),
        ('Attack success rate', attack['success_rate'], theirs and theirs.attack_success),
        ('Largest change of a pixel', attack['max_perturbation'], None),
        ('Range of attacked pixels', ' to '.join(cell(attack.get(k)) for k in low_high), None),
        ('Attacked images that did not move', attack.get('unmoved'), None),
        ('Mean of correct maps', map_mean.get('correct'), None),
        ('Mean of adversarial maps', map_mean.get('adversarial'), None),
    ]
    return Table(
        'Classifier and attack',
        ('Quantity', 'Ours', 'Paper'),
        [tuple(map(cell, line)) for line in lines],
        note='The paper states its test accuracy (§III-B) and one ε (Figure 1); its training '
        'accuracy and attack numbers are computed from Tables II and III.',
    )


def _layer_table(rows):
    """Table I."""
    lines = [(row.layer, str(list(row.output_shape)), cell(row.parameters)) for row in rows]
    total = ('Total', '', cell(sum(row.parameters for row in rows)))
    note = f"The paper's Table I, for images of 224 pixels, sums to {paper.PARAMETERS:,}."
    header = ('Layer', 'Output shape', 'Parameters')
    return Table('Table I. The classifier', header, lines, total, note, text_columns=2)


def _heatmap_table(heatmaps, class_names, theirs):
    """Tables II and III."""
    keys = ('correct', 'adversarial', 'paper_correct', 'paper_adversarial')
    columns = [[(heatmaps.get(name) or {}).get(key) for name in class_names] for key in keys]
    sums = [None if None in column else sum(column) for column in columns]
    return Table(
        f'{theirs.counts_table if theirs else "Tables II/III"}. Heatmaps of training images',
        ('Class', 'Correct', 'Adversarial', "Paper's correct", "Paper's adversarial"),
        [tuple(map(cell, line)) for line in zip(class_names, *columns, strict=True)],
        ('Sum', *map(cell, sums)),
        'Adversarial maps count for the class that is predicted for the attacked image.',
    )


def _class_table(protocol, detection, class_names, theirs):
    """Table IV or V under one protocol, with the baselines beside the detector."""
    baselines = {
        name: entry for name, entry in (detection.get('baselines') or {}).items() if name in RIVALS
    }

    def line(label, entry, rivals):
        entry = entry or {}
        label = f'{label} ({entry["note"]})' if entry.get('note') else label
        ours = [entry.get(key) for key in _COUNTS] + [measured(entry, key) for key in _METRICS]
        others = [measured(rival or {}, key) for rival in rivals for key in RIVAL_RATES]
        return tuple(map(cell, (label, *ours, stated(entry.get('paper_accuracy')), *others)))

    def mean(average):
        entries = [averaged(entry, average) for entry in (overall, *baselines.values())]
        return line(AVERAGES[average].capitalize(), entries[0], entries[1:])

    rivals = [(baseline or {}).get('per_class') or {} for baseline in baselines.values()]
    overall = detection.get('overall') or {}
    note = (
        'The majority baseline always names the larger kind of a class. '
        f'{_NEEDED} {_MEANS} In brackets: how many seeds (of a class), maps (over all) or classes '
        '(over them) have the number, where not all do.'
    )
    if theirs:
        note += (
            " Some of the paper's accuracies lie below the majority baseline of its own counts, so "
            'its sets were probably balanced: they compare with balanced accuracy.'
        )
    others = tuple(f'{words(name)}: {_METRICS[key]}' for name in baselines for key in RIVAL_RATES)
    return Table(
        f'{theirs.accuracy_table if theirs else "Tables IV/V"}. Detection by predicted class, '
        f'protocol {words(protocol)}',
        ('Class', *_COUNTS.values(), *_METRICS.values(), "Paper's accuracy", *others),
        [
            *(
                line(name, detection['per_class'].get(name), [rival.get(name) for rival in rivals])
                for name in class_names
            ),
            mean('over_classes'),
        ],
        mean(''),
        note,
    )


def _overall_table(detections, theirs):
    """Table VI: the detectors and every baseline, under every protocol."""
    lines = []
    for protocol, detection in detections.items():
        overall = detection.get('overall') or {}
        baselines = (detection.get('baselines') or {}).items()
        for method, entry in [('detector', overall), *((n, b or {}) for n, b in baselines)]:
            for average, label in AVERAGES.items():
                each = averaged(entry, average)
                rates = [with_interval(each, key) for key in _METRICS]
                # That there is no mean over classes is said once.
                if average and method != 'detector' and set(rates) == {'–'}:
                    continue
                counts = [each.get(key) for key in _COUNTS]
                printed = stated(each.get('paper_accuracy')) if method == 'detector' else None
                said = words(protocol), words(method), label, *counts, *rates, printed
                lines.append(tuple(map(cell, said)))
    return Table(
        f'Table VI. Overall{", " + theirs.dataset if theirs else ""}',
        ('Protocol', 'Method', 'Mean', *_COUNTS.values(), *_METRICS.values(), "Paper's accuracy"),
        lines,
        note=f'{_MEANS} Means over several seeds, each with its own division, initial weights and '
        f'undersampling, and so is n. {_NEEDED} In brackets: how many maps or classes have the '
        'number, where not all do.',
        text_columns=3,
    )


def averaged(entry, average):
    """Returns an overall entry's rates of one of `AVERAGES`.

    The paper's accuracy is a mean over classes, and stands beside ours.
    """
    entry = entry or {}
    if not average:
        return entry | {'paper_accuracy': None}
    return (entry.get(average) or {}) | {'paper_accuracy': entry.get('paper_accuracy')}


def _control_table(protocol, detection):
    """P4 and P5: what detectors say of maps that neither fit nor judge them."""
    methods = {'detector': detection['overall']} | (detection.get('baselines') or {})
    kinds = list(detection['overall']['controls'])
    lines = []
    for name, entry in methods.items():
        line = [words(name)]
        for kind in kinds:
            rates = (entry.get('controls') or {}).get(kind) or {}
            line += [rates.get('n'), *(with_interval(rates, key) for key in _FLAGGED)]
        lines.append(tuple(map(cell, line)))
    header = [f'{words(kind)}: {what}' for kind in kinds for what in ('n', *_FLAGGED.values())]
    return Table(
        f'Flagged besides, protocol {words(protocol)}',
        ('Method', *header),
        lines,
        note='Shares, means over the seeds. Noise: random signs of the same ε, still classified '
        'correctly; a detector that flags it sees noise, not attacks. Misclassified: '
        'clean images that the classifier gets wrong. Failed: attacked images that it still gets '
        'right. All of test images on which no detector was fitted. In brackets: how many of n are '
        'of classes with a threshold of 5 % FPR, where not all are.',
    )


def _cost_table(cost):
    """P9: what a verdict costs."""
    lines = [
        (words(name), entry['forward_passes'], entry['gflop'], entry['milliseconds'])
        for name, entry in cost.items()
    ]
    return Table(
        'What a verdict costs',
        ('Method', 'Forward passes', 'GFLOP', 'Milliseconds'),
        [tuple(map(cell, line)) for line in lines],
        note='GFLOP are those of the engine that made the maps, from shapes; milliseconds an image '
        'are those of --mode=benchmark in this work directory, on its device, where it was run.',
    )


def adaptive_table(found: dict | None) -> Table:
    """P8: what the detectors do not do; `found` is what adaptive.json holds, if it was made."""
    title = 'What the detectors do not do: stop an attacker who knows them'
    claim = (
        'The claim of these detectors is that they find FGSM images made by someone who does not '
        'know of them, and no more.'
    )
    if not found:
        return Table(title, (), [], note=f'Not measured here: --mode=adaptive does. {claim}')
    rows, epsilons = found['rows'], dict.fromkeys(row['epsilon'] for row in found['rows'])
    evading = {(row['method'], row['attack']): [] for row in rows}
    for row in rows:
        low, high = row['interval']
        text = f'{row["evasion"]:.3f} ({low:.2f} to {high:.2f})'
        evading[row['method'], row['attack']].append(text)
    alarms = ', '.join(f'{rounds(k)} {cell(v)}' for k, v in found['false_alarms'].items())
    kept = found.get('auroc_of_the_mixture') or {}
    cost = ', '.join(f'{rounds(k)} {cell(v)}' for k, v in kept.items())
    if cost:
        cost = (
            'In a round detectors are fitted with attacks on them; AUROC of the mixture, one curve '
            f"of all classes' scores: {cost}. "
        )
    return Table(
        title,
        ('Detector', 'Attack', *(f'ε = {epsilon(value)}' for value in epsilons)),
        [(rounds(method), words(name), *cells) for (method, name), cells in evading.items()],
        note=f'Shares of {cell(found["images"])} correctly classified test images that are '
        'classified wrongly and not flagged, at the thresholds of 5 % false positives, '
        "with Wilson's 95 % intervals. FGSM does not know of the detector, the others follow its "
        f'gradient for up to {counted(found["settings"]["steps"], "step")}. False alarms on the '
        f'same images, unattacked: {alarms}. {cost}{claim}',
        text_columns=2,
    )


def rounds(label):
    """Returns what a reader sees for a method, and after how many rounds of fitting."""
    method, *rest = label.split(', ')
    return ', '.join([words(method), *rest])


def cell(value):
    """Returns what a reader sees: an en dash for nothing, 12,345 for counts, 0.123 for others."""
    if value is None or value != value or value == '':
        return '–'
    if isinstance(value, str):
        return value
    text = f'{value:,}' if isinstance(value, int) else f'{value:.3f}'
    return text.replace('-', '−')


def with_interval(entry, key):
    """Returns a rate, its 95 % interval, and how many of all have it where not all do.

    The interval is half its width where it reaches as far to both sides, else its ends.

    >>> with_interval({'auroc': 0.5, 'interval': {'auroc': [0.4, 0.6]}}, 'auroc')
    '0.500 ± 0.100'
    >>> with_interval({'auroc': 0.95, 'interval': {'auroc': [0.8, 1.0]}}, 'auroc')
    '0.950 (0.80 to 1.00)'
    """
    ends, reach = (entry.get('interval') or {}).get(key), ''
    if ends:
        below, above = entry[key] - ends[0], ends[1] - entry[key]
        reach = f' ± {above:.3f}'
        if abs(above - below) > 1e-9:
            reach = ' ({:.2f} to {:.2f})'.format(*ends).replace('-', '−')
    return measured(entry, key, reach)


def measured(entry, key, reach=''):
    """Returns a rate, what follows it, and in brackets how many of all have it."""
    over = (entry.get('over') or {}).get(key)
    have = ' ({:,} of {:,})'.format(*over) if over and entry.get(key) is not None else ''
    return cell(entry.get(key)) + reach + have


def stated(value):
    """Returns a number of the paper's with the two decimals that it has there."""
    return None if value is None else f'{value:.2f}'


_WORDS = {
    'detector': "Paper's detector",
    'pooled': "Paper's detector, one for all classes",
    'linear_probe': 'Linear probe of the map',
    'relative_map': 'Map over unoccluded probability',
    'shuffled_cells': "Paper's detector, cells shuffled",
    'log_map': 'Logarithm of the map',
    'unoccluded_logits': 'Logits of the image alone',
    'all_logits': 'All logits under all windows',
    'logit_differences': 'Changes of all logits',
    'conv_logits': 'All logits, convolutional',
    'all_views': 'Confidence and changes of all logits under windows and other views',
    'input_mfs': 'InputMFS, magnitudes of the image',
    'multi_lid': 'multiLID, neighbours of the last features',
    'sid': 'SID, logits of two classifiers',
    'pid': 'PID, confidence of a second classifier',
    'views_alone': 'Confidence and changes of all logits under other views',
    'map_mean': 'Mean of the map',
    'map_minimum': 'Minimum of the map',
    'map_deviation': 'Standard deviation of the map',
    'map_iqr': 'Interquartile range of the map',
    'map_mad': 'Median absolute deviation of the map',
    'max_probability': 'Unoccluded probability',
    'magnet_error': 'MagNet, reconstruction error',
    'magnet_divergence': 'MagNet, divergence',
    'paper': 'paper',
    'held_out': 'held out',
    'fgsm': 'FGSM',
    'targeted_fgsm': 'Targeted FGSM',
    'bim': 'BIM',
    'pgd': 'PGD',
    'mi_fgsm': 'MI-FGSM',
    'pgd_l2': 'PGD in L2',
    'apgd': 'Auto-PGD',
    'carlini_wagner': 'Carlini & Wagner',
    'deepfool': 'DeepFool',
}


def words(name: str) -> str:
    """Returns what a reader sees for a name of `names`."""
    return _WORDS.get(name, name.replace('_', ' ').capitalize())


def epsilon(value: float) -> str:
    """Returns what a reader sees for an epsilon: 8/255 where that is what it is, else 0.1.

    >>> epsilon(8 / 255), epsilon(0.1), epsilon(0.2), epsilon(1e-6)
    ('8/255', '0.1', '0.2', '1e-06')
    """
    steps = round(255 * value)
    is_short = abs(round(value, 3) - value) < 1e-9
    is_steps = steps and abs(steps - 255 * value) < 1e-3
    return f'{steps}/255' if is_steps and not is_short else f'{value:.3g}'


def escape(text):
    """Returns text that Markdown takes literally, on one line.

    An underscore within a word is one, and so are brackets that nothing makes a link of.
    """
    text = printable(' '.join(text.split()))
    for special in '\\|<`*' + '[' * ('](' in text or '][' in text):
        text = text.replace(special, f'\\{special}')
    return re.sub(r'(?<!\w)_|_(?!\w)', r'\\_', text)


def markdown(table):
    """Renders a table as Markdown."""
    if not table.rows:
        return f'## {table.title}\n\n{table.note}'
    left = table.text_columns
    lines = [table.header, (':--',) * left + ('--:',) * (len(table.header) - left)]
    lines += [tuple(map(escape, row)) for row in table.rows]
    lines += [tuple(cell and f'**{escape(cell)}**' for cell in table.total)] if table.total else []
    note = f'\n\n{table.note}' if table.note else ''
    return f'## {table.title}\n\n' + '\n'.join(f'| {" | ".join(row)} |' for row in lines) + note


def shorten(table: Table, *, most: int = 40) -> Table:
    """Returns a table of at most so many rows, and one that says how many more tables.md has."""
    left = len(table.rows) - most
    if left <= 0:
        return table
    rest = (f'… and {left:,} more in tables.md', *[''] * (len(table.header) - 1))
    return table._replace(rows=[*table.rows[:most], rest])


def to_markdown(listed: list[Table]) -> str:
    """Renders all tables as Markdown."""
    return '\n\n'.join(map(markdown, listed)) + '\n'
