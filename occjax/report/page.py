"""The report: results.json, tables.md, figures and one self-contained page; shown, not measured."""

import base64
import html
import json
from collections.abc import Sequence

from occjax import config as config_lib
from occjax import vgg
from occjax.report import figures, paper, tables
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

    They are results.json, tables.md, fig1.png, fig2.png, fig3.png and report.html.

    Args:
        results: the content of results.json. Entries may be None, never NaN.
        rows: Table I.
        class_names: `class_names[k]` is what a person calls class `k`.
        examples: attacked images for Figures 1 and 2, the best one first; may be empty.
        maps: the heatmaps of training images, for Figure 3.
        config: the experiment.

    Raises:
        ValueError: if `results` holds NaN or infinity, for which JSON has no number.
    """
    listed = tables.build(results, rows, class_names)
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
    files = {name: figures.png(figure) for name, figure in drawn.items()}
    pictures = [(captions[name], content) for name, content in files.items()]
    manifest = tables.Table(
        'Manifest', ('Field', 'Value'), _leaves(results['manifest']), text_columns=2
    )
    page = _page(facts, summary, listed, pictures, manifest)
    head = [f'- {label}: {tables.escape(value)}' for label, value in facts]
    head += [f'- {label}: **{value}**, {detail}' for label, value, detail in summary]
    markdown = [f'# {_heading(facts)}', '\n'.join(head), tables.to_markdown(listed)]
    files['tables.md'] = '\n\n'.join(markdown).encode()
    files['report.html'] = page.encode()
    content = json.dumps(results, indent=2, allow_nan=False) + '\n'
    return {'results.json': content.encode()} | files


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
            (f'Protocol {name}', meanings[name])
            for name in results['detection']
            if name in meanings
        ),
    ]


def _summary(results, class_names):
    """Returns (label, value, detail) of what a reader wants to know first."""
    theirs, attack = paper.numbers(class_names), results['attack']
    stated = tables.cell(tables.stated(results['classifier'].get('paper_test_accuracy')))
    implied = tables.cell(theirs and theirs.attack_success)
    test_accuracy = tables.cell(results['classifier']['test_accuracy'])
    success = tables.cell(attack['success_rate'])
    detail = f'FGSM with ε = {attack["epsilon"]:g}; paper {implied}'
    lines = [
        ('Classifier, test accuracy', test_accuracy, f'paper {stated}'),
        ('Attack, success rate', success, detail),
    ]
    for protocol, detection in results['detection'].items():
        baselines = (detection.get('baselines') or {}).items()
        values, rivals = [], []
        for key in tables.RIVAL_RATES:
            values.append(tables.measured(detection.get('overall') or {}, key))
            rated = [(b[key], n) for n, b in baselines if (b or {}).get(key) is not None]
            value, name = max(rated, default=(None, ''))
            rivals.append(
                f'{tables.cell(value)} ({tables.words(name).lower()})'
                if name
                else tables.cell(None)
            )
        detail = f'balanced accuracy / AUROC; best baselines {" / ".join(rivals)}'
        lines.append((f'Detectors, protocol {protocol}', ' / '.join(values), detail))
    return lines


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
