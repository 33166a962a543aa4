"""Tables, figures, JSON and one self-contained page; nothing is measured here, only shown.

Every table is made once, as a `Table` of strings, and rendered as Markdown and as HTML. What is
None (the paper doesn't say, a class without adversarial maps) prints as an en dash.
"""

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from occjax import config as config_lib
from occjax import figures, paper, storage, vgg
from occjax.figures import Example
from occjax.types import HeatmapSet

_COUNTS = {'n_correct': 'n correct', 'n_adversarial': 'n adversarial'}
_METRICS = {
    'accuracy': 'Accuracy (raw)',
    'majority_baseline': 'Majority baseline',
    'balanced_accuracy': 'Balanced accuracy',
    'auroc': 'AUROC',
    'tpr_at_5_fpr': 'TPR at 5 % FPR',
    'tpr_at_1_fpr': 'TPR at 1 % FPR',
}
_RIVAL = ('balanced_accuracy', 'auroc')  # what the per-class tables show of a baseline


class Table(NamedTuple):
    """A table as strings; the first `text_columns` are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: tuple[str, ...] = ()  # a last row that sums up the others
    note: str = ''
    text_columns: int = 1


def write(
    directory: str | os.PathLike,
    results: dict,
    *,
    rows: list[vgg.Row],
    class_names: Sequence[str],
    examples: Sequence[Example],
    maps: HeatmapSet,
    config: config_lib.Config,
) -> None:
    """Writes results.json, tables.md, fig1.png, fig2.png, fig3.png and report.html.

    Each file appears whole or not at all, and none if one of them can't be made.

    Args:
        directory: where to; made if missing.
        results: what results.json shall hold. Entries may be None, never NaN.
        rows: Table I.
        class_names: `class_names[k]` is what a person calls class `k`.
        examples: attacked images for Figures 1 and 2, the best one first; may be empty.
        maps: the heatmaps of training images, for Figure 3.
        config: the experiment.

    Raises:
        ValueError: if `results` holds a number that JSON has not (NaN, infinity).
    """
    listed = build_tables(results, rows, class_names)
    facts, summary = _facts(results, config), _summary(results, class_names)
    drawn = {
        'fig1.png': figures.attack_figure(
            examples, class_names=class_names, epsilon=config.attack.epsilon
        ),
        'fig2.png': figures.occlusion_figure(
            examples[0] if examples else None, class_names=class_names, config=config.occlusion
        ),
        'fig3.png': figures.maps_figure(maps, class_names=class_names),
    }
    captions = figures.captions(config, results.get('map_mean') or {})
    files = {name: _png(figure) for name, figure in drawn.items()}
    pictures = [(captions[name], content) for name, content in files.items()]
    manifest = Table('Manifest', ('Field', 'Value'), _leaves(results['manifest']), text_columns=2)
    page = _page(facts, summary, listed, pictures, manifest)
    head = [f'- {label}: {_escape(value)}' for label, value in facts]
    head += [f'- {label}: **{value}**, {detail}' for label, value, detail in summary]
    markdown = [f'# {_heading(facts)}', '\n'.join(head), tables(results, rows, class_names)]
    files['tables.md'] = '\n\n'.join(markdown).encode()
    files['report.html'] = page.encode()
    storage.write_json(Path(directory, 'results.json'), results)
    for name, content in files.items():
        storage.write_bytes(Path(directory, name), content)


def tables(results: dict, rows: list[vgg.Row], class_names: Sequence[str]) -> str:
    """Returns all tables as Markdown."""
    return '\n\n'.join(map(_markdown, build_tables(results, rows, class_names))) + '\n'


def build_tables(results: dict, rows: list[vgg.Row], class_names: Sequence[str]) -> list[Table]:
    """Returns the tables in the paper's order, after one of the classifier and the attack."""
    theirs = paper.numbers(class_names)
    return [
        _outcome_table(results, theirs),
        _layer_table(rows),
        _heatmap_table(results['heatmaps'], class_names, theirs),
        *(
            _class_table(protocol, detection, class_names, theirs)
            for protocol, detection in results['detection'].items()
        ),
        _overall_table(results['detection'], theirs),
    ]


def _outcome_table(results, theirs):
    """The classifier and the attack, beside what the paper says or implies."""
    classifier, attack = results['classifier'], results['attack']
    map_mean, low_high = results.get('map_mean') or {}, ('min_pixel', 'max_pixel')
    lines = [
        (
            'Test accuracy',
            classifier['test_accuracy'],
            _stated(classifier.get('paper_test_accuracy')),
        ),
        ('Training accuracy', classifier['train_accuracy'], theirs and theirs.train_accuracy),
        (
            'ε of FGSM',
            f'{attack["epsilon"]:g}',
            theirs and theirs.epsilon and f'{theirs.epsilon:g}',
        ),
        ('Images attacked', attack['attempted'], theirs and theirs.correct),
        ('Successful attacks', attack['successful'], theirs and theirs.adversarial),
        ('Attack success rate', attack['success_rate'], theirs and theirs.attack_success),
        ('Largest change of a pixel', attack['max_perturbation'], None),
        ('Range of attacked pixels', ' to '.join(_cell(attack.get(k)) for k in low_high), None),
        ('Attacked pixels that are not numbers', attack.get('nan_count'), None),
        ('Mean of correct maps', map_mean.get('correct'), None),
        ('Mean of adversarial maps', map_mean.get('adversarial'), None),
    ]
    return Table(
        'Classifier and attack',
        ('Quantity', 'Ours', 'Paper'),
        [tuple(map(_cell, line)) for line in lines],
        note='The paper states its test accuracy (§III-B) and one ε (Figure 1); its training '
        'accuracy and attack numbers are computed from Tables II and III.',
    )


def _layer_table(rows):
    """Table I."""
    lines = [(row.layer, str(list(row.output_shape)), _cell(row.parameters)) for row in rows]
    total = ('Total', '', _cell(sum(row.parameters for row in rows)))
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
        [tuple(map(_cell, line)) for line in zip(class_names, *columns, strict=True)],
        ('Sum', *map(_cell, sums)),
        'Adversarial maps count for the class that the attacked image is taken for.',
    )


def _class_table(protocol, detection, class_names, theirs):
    """Table IV or V under one protocol, with the baselines beside the detector."""
    baselines = detection.get('baselines') or {}

    def line(label, entry, rivals):
        entry = entry or {}
        label = f'{label} ({entry["note"]})' if entry.get('note') else label
        ours = [entry.get(key) for key in (*_COUNTS, *_METRICS)]
        others = [(rival or {}).get(key) for rival in rivals for key in _RIVAL]
        return tuple(map(_cell, (label, *ours, _stated(entry.get('paper_accuracy')), *others)))

    rivals = [(baseline or {}).get('per_class') or {} for baseline in baselines.values()]
    note = (
        'Raw accuracy is over all maps scored; the majority baseline always names the larger kind. '
        'Overall is the unweighted mean of the classes, and the sum of n.'
    )
    if theirs:
        note += (
            " Some of the paper's accuracies lie below the majority baseline of its own counts, so "
            'its sets were probably balanced: they compare with balanced accuracy.'
        )
    others = tuple(f'{_words(name)}: {_METRICS[key]}' for name in baselines for key in _RIVAL)
    return Table(
        f'{theirs.accuracy_table if theirs else "Tables IV/V"}. Detection by predicted class, '
        f'protocol {protocol}',
        ('Class', *_COUNTS.values(), *_METRICS.values(), "Paper's accuracy", *others),
        [
            line(name, detection['per_class'].get(name), [rival.get(name) for rival in rivals])
            for name in class_names
        ],
        line('Overall', detection.get('overall'), baselines.values()),
        note,
    )


def _overall_table(detections, theirs):
    """Table VI: the detectors and every baseline, under every protocol."""
    lines = []
    for protocol, detection in detections.items():
        overall = detection.get('overall') or {}
        baselines = (detection.get('baselines') or {}).items()
        for method, entry in [('Detector', overall), *((_words(n), b or {}) for n, b in baselines)]:
            counts = [overall.get(key) for key in _COUNTS]
            numbers = [*counts, *(entry.get(key) for key in _METRICS)]
            stated = _stated(overall.get('paper_accuracy')) if method == 'Detector' else None
            lines.append(tuple(map(_cell, (protocol, method, *numbers, stated))))
    return Table(
        f'Table VI. Overall{", " + theirs.dataset if theirs else ""}',
        ('Protocol', 'Method', *_COUNTS.values(), *_METRICS.values(), "Paper's accuracy"),
        lines,
        note='Unweighted means over the classes; n are sums.',
        text_columns=2,
    )


def _facts(results, config):
    """Returns (label, value) of what names the experiment, and what its protocols mean."""
    data, detector, dataset = config.data, config.detector, results['manifest'].get('dataset')
    sizes = dataset if isinstance(dataset, dict) else {}
    splits = [f'{_cell(sizes.get(f"{split}_images"))} {split}' for split in ('train', 'test')]
    attacked = f'{_cell(results["attack"]["attempted"])} correctly classified ones attacked'
    meanings = {
        'paper': "maps of the classifier's own training images, "
        f'{detector.paper_fit_fraction:.0%} to fit the detectors and the rest to score them.',
        'held_out': 'maps of test images, which the classifier never saw, '
        f'{detector.held_out_fit_fraction:.0%} to fit the detectors and the rest to score them.',
    }
    return [
        ('Dataset', f'{data.name}, {data.image_size}×{data.image_size} pixels'),
        ('Images', ', '.join([*splits, attacked])),
        ('Config', config_lib.digest(config)),
        ('Device', _cell(results['manifest'].get('device'))),
        *(
            (f'Protocol {name}', meanings[name])
            for name in results['detection']
            if name in meanings
        ),
    ]


def _summary(results, class_names):
    """Returns (label, value, detail) of what a reader wants to know first."""
    theirs, attack = paper.numbers(class_names), results['attack']
    stated = _cell(_stated(results['classifier'].get('paper_test_accuracy')))
    implied = _cell(theirs and theirs.attack_success)
    test_accuracy = _cell(results['classifier']['test_accuracy'])
    success = _cell(attack['success_rate'])
    detail = f'FGSM with ε = {attack["epsilon"]:g}; paper {implied}'
    lines = [
        ('Classifier, test accuracy', test_accuracy, f'paper {stated}'),
        ('Attack, success rate', success, detail),
    ]
    for protocol, detection in results['detection'].items():
        baselines = (detection.get('baselines') or {}).items()
        values, rivals = [], []
        for key in _RIVAL:
            values.append(_cell((detection.get('overall') or {}).get(key)))
            rated = [(b[key], n) for n, b in baselines if (b or {}).get(key) is not None]
            value, name = max(rated, default=(None, ''))
            rivals.append(f'{_cell(value)} ({_words(name).lower()})' if name else _cell(None))
        detail = f'balanced accuracy / AUROC; best baselines {" / ".join(rivals)}'
        lines.append((f'Detectors, protocol {protocol}', ' / '.join(values), detail))
    return lines


def _heading(facts):
    """Returns the title of the report."""
    return f'FGSM detection from occlusion heatmaps: {facts[0][1].split(",")[0]}'


def _cell(value):
    """Returns what a reader sees: an en dash for nothing, 12,345 for counts, 0.123 for others."""
    if value is None or value != value or value == '':
        return '–'
    if isinstance(value, str):
        return value
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}'


def _stated(value):
    """Returns a number of the paper's with the two decimals that it has there."""
    return None if value is None else f'{value:.2f}'


def _words(name):
    """Returns a baseline's name as a reader sees it."""
    return name.replace('_', ' ').capitalize()


def _leaves(tree, prefix=''):
    """Returns (dotted name, value) of every leaf of nested dictionaries, as strings."""
    if not isinstance(tree, dict):
        return [(prefix[:-1], tree if isinstance(tree, str) else json.dumps(tree))]
    return [leaf for key, branch in tree.items() for leaf in _leaves(branch, f'{prefix}{key}.')]


def _escape(text):
    """Returns text that Markdown takes literally, on one line."""
    for special in '\\|<':
        text = text.replace(special, f'\\{special}')
    return ' '.join(text.split())


def _markdown(table):
    """Renders a table as Markdown."""
    words = table.text_columns
    lines = [table.header, (':--',) * words + ('--:',) * (len(table.header) - words)]
    lines += [tuple(map(_escape, row)) for row in table.rows]
    lines += [tuple(cell and f'**{_escape(cell)}**' for cell in table.total)] if table.total else []
    note = f'\n\n{table.note}' if table.note else ''
    return f'## {table.title}\n\n' + '\n'.join(f'| {" | ".join(row)} |' for row in lines) + note


def _html(table):
    """Renders a table as HTML, in a box that scrolls where the page is too narrow for it."""

    def line(row):
        first, *others = map(html.escape, row)
        return f'<tr><th scope="row">{first}</th><td>{"</td><td>".join(others)}</td></tr>'

    header = ''.join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    total = f'<tfoot>{line(table.total)}</tfoot>' if table.total else ''
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
    title = html.escape(table.title)
    return (
        f'<section><h3>{title}</h3>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{title}"><table class="words-{table.text_columns}"><thead><tr>{header}</tr>'
        f'</thead><tbody>{"".join(map(line, table.rows))}</tbody>{total}</table></div>'
        f'{note}</section>\n'
    )


def _page(facts, summary, listed, pictures, manifest):
    """Returns report.html: nothing in it is fetched from elsewhere."""
    named = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in facts)
    cards = ''.join(
        f'<div><dt>{html.escape(label)}</dt><dd><b>{value}</b> {html.escape(detail)}</dd></div>'
        for label, value, detail in summary
    )
    shown = ''.join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(content).decode()}"><figcaption>{html.escape(caption)}</figcaption>'
        '</figure>\n'
        for caption, content in pictures
    )
    title = html.escape(_heading(facts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n'
        f'<header><h1>{title}</h1><dl class="facts">{named}</dl></header>\n'
        f'<dl class="cards">{cards}</dl>\n<h2>Tables</h2>\n<div class="tables">'
        f'{"".join(map(_html, listed))}</div>\n'
        f'<h2>Figures</h2>\n{shown}<h2>Provenance</h2>\n{_html(manifest)}</main></body></html>\n'
    )


def _png(figure):
    """Returns a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5b6675;
  --line: #dde1e7; --band: #f0f2f5; --accent: #0b63b5; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6e9ee;
  --soft: #9aa5b4; --line: #2e3743; --band: #222a35; --accent: #6db3f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 8px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 40px 0 0; padding-top: 12px; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 8px; }
dl, dd, figure { margin: 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
.facts, .note, figcaption, .cards { color: var(--soft); font-size: 0.87rem; }
.facts dd { color: var(--ink); overflow-wrap: anywhere; }
.cards { display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.cards > div, .scroll, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.cards > div { padding: 12px 16px; }
.cards dt, .cards b { color: var(--ink); }
.cards b { display: block; color: var(--accent); font-size: 1.7rem; line-height: 1.3; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; column-gap: 40px; }
section { max-width: 100%; }
.scroll { overflow-x: auto; max-width: 100%; width: fit-content; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 7px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; background: var(--band); font-size: 0.76rem; font-weight: 600;
  line-height: 1.25; white-space: normal; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--card);
  min-width: 9.9em; white-space: normal; }
thead tr > :first-child { background: var(--band); }
tbody th { font-weight: 400; }
tfoot th, tfoot td { font-weight: 700; border-top: 2px solid var(--line); }
tbody:last-child tr:last-child > *, tfoot tr > * { border-bottom: 0; }
.words-2 tr > :nth-child(2) { text-align: left; }
.words-2 tr > :nth-child(2):last-child { white-space: normal; overflow-wrap: anywhere; }
.note { max-width: 75ch; margin: 6px 0 0; }
figure { padding: 16px; margin-top: 20px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: 4px; }
figcaption { max-width: 90ch; margin-top: 10px; }
"""
