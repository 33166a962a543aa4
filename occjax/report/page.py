"""The report: results.json, tables.md, figures and one self-contained page; shown, not measured."""

import base64
import html
import json
from collections.abc import Sequence

from occjax import config as config_lib
from occjax import vgg
from occjax.report import canvas, figures, paper, summary, tables
from occjax.report.figures import Example
from occjax.types import HeatmapSet


def build(
    results: dict,
    *,
    rows: list[vgg.Row],
    class_names: Sequence[str],
    examples: Sequence[Example],
    maps: HeatmapSet,
    config: config_lib.Config,
) -> dict[str, bytes]:
    """Returns the report's files by name.

    They are results.json, summary.json (the same in short), tables.md, report.html and the page's
    pictures.

    Args:
        results: the content of results.json. Entries may be None, never NaN.
        rows: Table I.
        class_names: `class_names[k]` is what a person calls class `k`.
        examples: attacked images for Figure 1, the first one for Figure 2 too; may be empty.
        maps: the heatmaps of training images, for Figure 3.
        config: the experiment.

    Raises:
        ValueError: if `results` holds NaN or infinity, for which JSON has no number.
    """
    listed = tables.build(results, rows, class_names)
    facts, found = _facts(results, config), _findings(results, class_names)
    drawn = _drawn(results, class_names, examples, maps, config)
    captions = figures.captions(config, results.get('map_mean') or {})
    if len(class_names) > _BARS:
        captions['classes.png'] += f' Of {len(class_names):,} classes the {_BARS} with most maps.'
    files = {name: canvas.encode(figure, 'png') for name, figure in drawn.items()}
    pictures = [(captions[name], content) for name, content in files.items()]
    manifest = tables.Table(
        'Manifest', ('Field', 'Value'), _leaves(results['manifest']), text_columns=2
    )
    page = _page(facts, found, listed, pictures, manifest)
    head = [f'- {label}: {tables.escape(value)}' for label, value in facts]
    said = [f'- **{value}** {tables.escape(rest)}' for value, rest in found]
    markdown = [
        f'# {_heading(facts)}',
        '\n'.join(said),
        '\n'.join(head),
        tables.to_markdown(listed),
    ]
    files['tables.md'] = '\n\n'.join(markdown).encode()
    files['report.html'] = page.encode()
    content = json.dumps(results, indent=2, allow_nan=False) + '\n'
    condensed = json.dumps(summary.condense(results), allow_nan=False) + '\n'
    records = {'results.json': content, 'summary.json': condensed}
    return {name: text.encode() for name, text in records.items()} | files


def _drawn(results, class_names, examples, maps, config):
    """Returns the page's pictures by file name, in their order."""
    shown = results['detection'].get('held_out') or next(iter(results['detection'].values()))
    return {
        'roc.png': figures.roc_figure(shown.get('roc') or {}),
        'scores.png': figures.scores_figure(shown.get('histogram')),
        'classes.png': figures.classes_figure(shown, _with_bars(shown, class_names)),
        'fig1.png': figures.attack_figure(
            examples, class_names=class_names, epsilon=config.attack.epsilon
        ),
        'fig2.png': figures.occlusion_figure(
            examples[0] if examples else None, class_names=class_names, config=config.occlusion
        ),
        'fig3.png': figures.maps_figure(maps, class_names=class_names),
    }


def _with_bars(detection, class_names):
    """Returns the classes of the picture, in their order: all, or of many those with most maps.

    Those that were judged go before others.
    """

    def worth(name):
        entry = detection['per_class'].get(name) or {}
        count = sum(entry.get(kind) or 0 for kind in ('n_correct', 'n_adversarial'))
        return entry.get('balanced_accuracy') is not None, count

    kept = set(sorted(class_names, key=worth, reverse=True)[:_BARS])
    return [name for name in class_names if name in kept]


def _facts(results, config):
    """Returns (label, value) of what names the experiment, and what its protocols mean."""
    data, detector, dataset = config.data, config.detector, results['manifest'].get('dataset')
    sizes = dataset if isinstance(dataset, dict) else {}
    splits = [f'{tables.cell(sizes.get(f"{split}_images"))} {split}' for split in ('train', 'test')]
    attacked = f'{tables.cell(results["attack"]["attempted"])} correctly classified ones attacked'
    meanings = {
        'paper': "maps of the classifier's own training images, "
        f'{detector.paper_fit_fraction:.0%} to fit the detectors and the rest to score them.',
        'held_out': 'maps of test images, which the classifier never saw, '
        f'{detector.held_out_fit_fraction:.0%} to fit the detectors, '
        f'{detector.held_out_threshold_fraction:.0%} more to set thresholds, the rest to score.',
    }
    return [
        ('Dataset', f'{data.name}, {data.image_size}×{data.image_size} pixels'),
        ('Images', ', '.join([*splits, attacked])),
        ('Config', config_lib.digest(config)),
        ('Device', tables.cell(results['manifest'].get('device'))),
        *(
            (f'Protocol {tables.words(name)}', meanings[name])
            for name in results['detection']
            if name in meanings
        ),
    ]


def _findings(results, class_names):
    """Returns (number, the rest of a sentence) of what a reader wants to know, in that order."""
    theirs, attack = paper.numbers(class_names), results['attack']
    printed = _paper(tables.stated(results['classifier'].get('paper_test_accuracy')))
    dataset = results['manifest'].get('dataset')
    images = dataset.get('test_images') if isinstance(dataset, dict) else None
    found = [
        (
            tables.cell(results['classifier']['test_accuracy']),
            f'of {_count(images)}test images are classified correctly{printed}.',
        ),
        (
            tables.cell(attack['success_rate']),
            f'of {_count(attack["attempted"])}correctly classified training images change their '
            f'class by one FGSM step of ε = {tables.epsilon(attack["epsilon"])}'
            f'{_paper(theirs and theirs.attack_success)}.',
        ),
    ]
    detection = results['detection'].get('held_out')
    if detection:
        found += _verdict(detection)
    means = results.get('map_mean') or {}
    if None not in (means.get('adversarial'), means.get('correct')):
        n = [sum(entry[k] or 0 for entry in results['heatmaps'].values()) for k in _KINDS]
        found.append(
            (
                tables.cell(means['adversarial']),
                f'is the mean cell of {tables.cell(n[1])} adversarial maps, '
                f'{tables.cell(means["correct"])} of {tables.cell(n[0])} correct ones: '
                f'{_darker(means)}.',
            )
        )
    return found


def _count(number):
    """Returns a count before what is counted, nothing if it is not at hand."""
    return '' if number is None else f'{tables.cell(number)} '


def _darker(means):
    """Returns in words whether adversarial maps are darker, with the interval of the difference."""
    ends = (means.get('interval') or {}).get('difference')
    if not ends:
        return 'whether they are darker cannot be told'
    by = f'the difference is {tables.with_interval(means, "difference")}'
    if ends[1] < 0:
        return f'they are darker ({by})'
    return f'they are {"brighter" if ends[0] > 0 else "not shown to be darker"} ({by})'


def _verdict(detection):
    """Returns what `_findings` says of the detectors on images that nothing was fitted on.

    Scores are ranked by the AUROC against clean and noisy images, if there are noisy ones.
    """
    overall, rivals = detection.get('overall') or {}, detection.get('baselines') or {}
    key, against = 'auroc', 'clean'
    if overall.get('auroc_with_noise') is not None:
        key, against = 'auroc_with_noise', 'clean and noisy'
    n = ' and '.join(
        f'{tables.cell(overall.get(f"n_{kind}"))} {word}'
        for kind, word in (('adversarial', 'attacked'), ('correct', 'clean'))
    )
    classes = tables.averaged(overall, 'over_classes')
    found = [
        (
            tables.with_interval(overall, 'balanced_accuracy'),
            f"is the balanced accuracy of the paper's detectors over {n} test images that nothing "
            f'was fitted on, at an AUROC of {tables.with_interval(overall, key)} against {against} '
            f'ones. {_over_classes(classes)}.',
        )
    ]
    return found + _beside_rivals(overall, rivals, key, against) + _of_noise(overall)


def _over_classes(entry):
    """Returns in words the mean over classes, beside the paper's."""
    stated = _paper(tables.stated(entry.get('paper_accuracy')))
    if entry.get('balanced_accuracy') is None:
        return f'No two classes have maps enough for a mean over classes{stated}'
    return f'The mean over classes is {tables.with_interval(entry, "balanced_accuracy")}{stated}'


def _beside_rivals(overall, rivals, key, against):
    """Returns what `_findings` says of the detector beside confidence, the paper and the best."""
    found, confidence = [], rivals.get('max_probability') or {}
    if confidence.get(key) is not None:
        found.append(
            (
                tables.with_interval(confidence, key),
                f'is the AUROC against {against} images of the unoccluded probability alone, '
                f'without any window, on the same images: {_beside(overall, key)}.',
            )
        )
    agreement = overall.get('rank_agreement')
    if agreement:
        low, high = map(tables.cell, agreement['interval'])
        found.append(
            (
                tables.cell(agreement['rho']),
                f"is Spearman's correlation of {agreement['n']} classes' balanced accuracies with "
                f"the paper's accuracies (95 %: {low} to {high}).",
            )
        )
    tried = {'detector': overall} | rivals
    rated = [(b[key], name) for name, b in tried.items() if (b or {}).get(key) is not None]
    if rated:
        name = max(rated)[1]
        found.append(
            (
                tables.with_interval(tried[name], key),
                f'is the best AUROC against {against} images of all that was tried, on the same '
                f'images: {tables.words(name)}.',
            )
        )
    return found


def _of_noise(overall):
    """Returns what `_findings` says of images that are noisy and not attacked."""
    noise = (overall.get('controls') or {}).get('noise') or {}
    if noise.get('flagged_at_5_fpr') is None:
        return []
    said = (
        f"of {tables.cell(noise['n'])} noisy images are flagged by the paper's detectors, at "
        'thresholds at which 0.05 of clean images are flagged.'
    )
    return [(tables.with_interval(noise, 'flagged_at_5_fpr'), said)]


def _paper(value):
    """Returns what follows a number of ours: the paper's, where it gives one."""
    return '' if value is None else f' (paper: {tables.cell(value)})'


def _beside(overall, key):
    """Returns in words whether the detector's AUROC exceeds the unoccluded probability's."""
    lead = overall.get('over_confidence') or {}
    ends = (lead.get('interval') or {}).get(key)
    if not ends:
        return 'whether the maps add to it cannot be told'
    by = f'the difference is {tables.with_interval(lead, key)}'
    if ends[0] > 0:
        return f'the maps add to it ({by})'
    if ends[1] < 0:
        return f"the paper's detectors do worse ({by})"
    return f'the maps are not shown to add to it ({by})'


def _heading(facts):
    """Returns the title of the report."""
    return f'FGSM detection from occlusion heatmaps: {facts[0][1].split(",")[0]}'


def _leaves(tree, prefix=''):
    """Returns (dotted name, value) of every leaf of nested dictionaries, as strings."""
    if not isinstance(tree, dict):
        return [(prefix[:-1], tree if isinstance(tree, str) else json.dumps(tree))]
    return [leaf for key, branch in tree.items() for leaf in _leaves(branch, f'{prefix}{key}.')]


def _html(table):
    """Renders a table as HTML, in a box that scrolls where the page is too narrow for it."""

    def line(row):
        first, *others = map(html.escape, row)
        return f'<tr><th scope="row">{first}</th><td>{"</td><td>".join(others)}</td></tr>'

    header = ''.join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    total = f'<tfoot>{line(table.total)}</tfoot>' if table.total else ''
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
    title = html.escape(table.title)
    if not table.rows:
        return f'<section><h3>{title}</h3>{note}</section>\n'
    head, foot = f'<section><h3>{title}</h3>', '</section>'
    if len(table.rows) > _LONG and not table.title.startswith('Table VI'):
        head, foot = f'<details><summary>{title}</summary>', '</details>'
    return (
        f'{head}\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{title}"><table class="words-{table.text_columns}"><thead><tr>{header}</tr>'
        f'</thead><tbody>{"".join(map(line, table.rows))}</tbody>{total}</table></div>'
        f'{note}{foot}\n'
    )


def _page(facts, found, listed, pictures, manifest):
    """Returns report.html: nothing in it is fetched from elsewhere."""
    named = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in facts)
    cards = ''.join(
        f'<li><b>{html.escape(value)}</b> {html.escape(rest)}</li>' for value, rest in found
    )
    shown = ''.join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(content).decode()}"><figcaption>{html.escape(caption)}</figcaption>'
        '</figure>\n'
        for caption, content in pictures
    )
    title = html.escape(_heading(facts))
    return (
        f'{opening(_heading(facts))}<header><h1>{title}</h1></header>\n'
        f'<ul class="found">{cards}</ul>\n'
        f'<div class="pictures">{shown}</div>\n<h2>Tables</h2>\n<div class="tables">'
        f'{"".join(map(_html, listed))}</div>\n<h2>Provenance</h2>\n'
        f'<dl class="facts">{named}</dl>\n{_html(manifest)}{CLOSING}'
    )


def opening(title: str, style: str = '') -> str:
    """Returns the start of a page, in the house's style and more of its own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body><main>\n'
    )


CLOSING = '</main></body></html>\n'


_LONG = 11  # Tables of more rows are folded, but for that of the result.
_KINDS = ('correct', 'adversarial')
_BARS = 40  # Of more classes, only as many have one.
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
.facts, .note, figcaption { color: var(--soft); font-size: 0.87rem; }
.facts dd { color: var(--ink); overflow-wrap: anywhere; }
.found { margin: 20px 0; padding: 0; list-style: none; max-width: 80ch; font-size: 1.02rem; }
.found li { margin: 8px 0; }
.found b { color: var(--accent); font-variant-numeric: tabular-nums; }
.scroll, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.pictures { display: grid; gap: 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.pictures figure { min-width: 0; }
.pictures figure:nth-child(n + 3) { grid-column: 1 / -1; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; column-gap: 40px; }
section, details { max-width: 100%; }
summary { cursor: pointer; font-weight: 700; margin: 24px 0 8px; }
summary:hover { color: var(--accent); }
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
.words-2 tr > :nth-child(2), .words-3 tr > :nth-child(-n + 3) { text-align: left; }
.words-2 tr > :nth-child(2):last-child { white-space: normal; overflow-wrap: anywhere; }
.note { max-width: 75ch; margin: 6px 0 0; }
figure { padding: 16px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: 4px; }
figcaption { max-width: 60ch; margin-top: 10px; }
@media print { body { background: #fff; } .scroll { overflow: visible; border: 0; }
  table { font-size: 0.55rem; } figure, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; display: block; } }
"""
