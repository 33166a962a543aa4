"""What `--mode=sweep` found, as tables and as a picture."""

import numpy as np

from occjax.report import canvas, tables

_NOTE = '± or the ends in brackets are a 95 % interval.'


def build(result: dict) -> list[tables.Table]:
    """Returns what `sweep.json` holds: success, a transfer matrix for each method, windows."""
    found, cell = result['attacks'], tables.cell
    judged = next(iter(next(iter(result['transfer'].values())).values()))
    listed = [
        tables.Table(
            'Attacks',
            ('Attack, ε', 'Successful', 'Rate', 'n correct', 'n adversarial'),
            [
                (
                    _words(row),
                    cell(row['successful']),
                    cell(row['success_rate']),
                    *(cell(judged[name][kind]) for kind in ('n_correct', 'n_adversarial')),
                )
                for name, row in found.items()
            ],
            note=f'Of {cell(result["correct"])} correctly classified test images, among '
            f'{cell(result["images"])}. n: the maps that judge, as means of the seeds.',
        )
    ]
    listed += summary(result)
    for average in _averages(result):
        for method, rows in result['transfer'].items():
            listed.append(_matrix(result, method, rows, average, ''))
            noisy = {
                name: {k: v['with_noise'] for k, v in row.items()} for name, row in rows.items()
            }
            if all(all(row.values()) for row in noisy.values()):
                listed.append(_matrix(result, method, noisy, average, ' against clean and noise'))
    if result.get('search'):
        listed.append(_search(result['search']))
    return listed


def _averages(result):
    """Returns which of `tables.AVERAGES` some AUROC has, the first if none has any."""
    cells = [
        v for rows in result['transfer'].values() for row in rows.values() for v in row.values()
    ]
    present = [
        average
        for average in tables.AVERAGES
        if any(_mean(cell, average)['auroc'] is not None for cell in cells)
    ]
    return present or list(tables.AVERAGES)[:1]


def _mean(cell, average):
    """Returns an average of a cell of `sweep.json`."""
    return cell[average] if average else cell


def condense(result: dict) -> dict:
    """Returns `sweep.json` without the AUROC that `summary` does not show."""
    transfer = {
        method: {
            fitted: {
                judged: cell
                for judged, cell in row.items()
                if fitted in (judged, 'mixture', _without(result, judged))
            }
            for fitted, row in rows.items()
        }
        for method, rows in result['transfer'].items()
    }
    return result | {'transfer': transfer}


def _without(result, name):
    """Returns what is fitted on all of the mixture but an attack."""
    return f'mixture without {result["attacks"][name]["attack"]}'


def summary(result: dict) -> list[tables.Table]:
    """Returns a row for each method, of FGSM at its own ε and of the mixture, and the windows.

    Once over all maps and once over classes, as far as there are such.
    """
    listed = []
    for average in _averages(result):
        listed.append(_fgsm(result, average))
        if all('mixture' in rows for rows in result['transfer'].values()):
            listed.append(_mixture(result, average))
        if result.get('occluders'):
            listed.append(_windows(result['occluders'], average))
    return listed


def _fgsm(result, average):
    """Returns a row for each method, of FGSM at its own ε."""
    attacks, passes = result['attacks'], result['passes']
    own = [name for name, row in attacks.items() if row['attack'] == 'fgsm']
    noisy = any(
        rows[name][name]['with_noise'] for rows in result['transfer'].values() for name in own
    )
    kinds = 1 + noisy  # Clean images, and noisy ones if there are any.
    lines = [
        (
            tables.words(method),
            tables.cell(passes[method]),
            *(_auroc(each, average) for name in own for each in _both(rows[name][name])[:kinds]),
        )
        for method, rows in result['transfer'].items()
    ]
    epsilons = [tables.epsilon(attacks[name]['epsilon']) for name in own]
    columns = [c for e in epsilons for c in (f'ε = {e}, against clean', 'and noise')[:kinds]]
    note = f'AUROC of FGSM {tables.AVERAGES[average]}, fitted and judged at the same ε. {_NOTE}'
    title = f'FGSM, {tables.AVERAGES[average]}'
    return tables.Table(title, ('Method', 'Forward passes', *columns), lines, note=note)


def _windows(rows, average):
    """Returns what other windows tell, and what they cost."""
    methods = list(rows[0]['auroc'])
    lines = [
        (
            row['windows'],
            tables.cell(row['forward_passes']),
            *(_auroc(row['auroc'][m], average) for m in methods),
        )
        for row in rows
    ]
    header = ('Windows', 'Forward passes', *(f'AUROC, {tables.words(m).lower()}' for m in methods))
    note = f'FGSM, fitted and judged at the same ε, {tables.AVERAGES[average]}. {_NOTE}'
    return tables.Table(f'Windows, {tables.AVERAGES[average]}', header, lines, note=note)


def _both(cell):
    """Returns what is judged against clean images, and against clean and noisy ones."""
    none = {'auroc': None}
    return cell, cell['with_noise'] or none | {'over_classes': none}


def _mixture(result, average):
    """Returns what methods make of each attack that they saw, and of each that they did not."""
    lines = []
    for method, rows in result['transfer'].items():
        pairs = [_seen_or_not(result, rows, name, average) for name in result['attacks']]
        sides = (
            [value for value in side if value is not None] for side in zip(*pairs, strict=True)
        )
        pairs.append([min(side, default=None) for side in sides])
        cells = [f'{tables.cell(seen)} / {tables.cell(unseen)}' for seen, unseen in pairs]
        lines.append((tables.words(method), *cells))
    header = ('Method', *map(_words, result['attacks'].values()), 'Worst')
    note = (
        f'AUROC against clean images {tables.AVERAGES[average]}, of detectors that are fitted on a '
        'mixture with the attack / without it, at any ε.'
    )
    title = f'A mixture of attacks, {tables.AVERAGES[average]}'
    return tables.Table(title, header, lines, note=note)


def _seen_or_not(result, rows, name, average):
    """Returns the AUROC of what saw an attack, and of what did not; None where there is none."""
    found = _mean(rows['mixture'][name], average)['auroc']
    if result['attacks'][name]['attack'] not in result['mixture']:
        return None, found
    left_out = rows.get(_without(result, name))
    return found, left_out and _mean(left_out[name], average)['auroc']


def _words(attack):
    """Returns what a reader sees for an attack."""
    return f'{tables.words(attack["attack"])}, {tables.epsilon(attack["epsilon"])}'


def _search(found):
    """Returns the views in the order in which they were chosen."""
    lines = [
        (
            tables.words(row['view'] or 'none'),
            tables.cell(row['passes']),
            tables.cell(row['auroc']),
            tables.cell(found['without'].get(row['view'])),
        )
        for row in found['order']
    ]
    return tables.Table(
        'Views, the most useful first',
        ('View', 'Forward passes up to it', 'AUROC up to it', 'AUROC of all others'),
        lines,
        note='Of FGSM against clean and noisy images, chosen by a third of the fitting images; on '
        'images that nothing was chosen or fitted by, AUROC is in the tables above.',
    )


def _matrix(result, method, rows, average, against):
    """Returns the AUROC of what was fitted on each row, judged by each column."""
    judged = list(next(iter(rows.values())))
    return tables.Table(
        f'AUROC{against} {tables.AVERAGES[average]}, {tables.words(method).lower()}: fitted on the '
        'row, judged by the column',
        ('Fitted on', *(_words(result['attacks'][name]) for name in judged)),
        [
            (_fitted_on(result, name), *(_auroc(row[k], average) for k in judged))
            for name, row in rows.items()
        ],
        note='On images that were not fitted on, means over the seeds; in brackets: how many '
        'adversarial maps or classes have the number, where not all do.',
    )


def _fitted_on(result, name):
    """Returns what a reader sees for what detectors are fitted on."""
    if name in result['attacks']:
        return _words(result['attacks'][name])
    whole, without, attack = name.partition(' without ')
    return whole.capitalize() + without + (tables.words(attack) if attack else '')


def _auroc(cell, average):
    """Returns one AUROC as a reader sees it, with its interval."""
    found = _mean(cell, average)
    entry = {'auroc': found['auroc']}
    entry |= {name: {'auroc': found.get(name)} for name in ('interval', 'over')}
    return tables.with_interval(entry, 'auroc')


def plot(result: dict) -> bytes:
    """Returns a PNG: what epsilon does, what forward passes buy, and what transfers."""
    methods = result['transfer']
    panels = [_plot_epsilons] + ([_plot_passes] if result['occluders'] else [])
    widths = [1] * len(panels) + [1.3] * len(methods)
    figure, axes = canvas.row(4.75 * len(panels) + 5.5 * len(methods), 4.8, widths)
    for panel, draw_fn in zip(axes, panels, strict=False):
        panel.set_xscale('log')
        draw_fn(panel, result)
        panel.axhline(0.5, color='#888', linewidth=0.8)
        panel.legend(fontsize=8, frameon=False)
    for panel, (method, rows) in zip(axes[len(panels) :], methods.items(), strict=True):
        _plot_matrix(panel, result, method, rows)
    return canvas.encode(figure, 'png')


def _numbers(cells, average):
    """Returns the AUROC of cells and their intervals, `[3, N]`, NaN where there is none."""
    means = [_mean(cell, average) for cell in cells]
    rows = [(m['auroc'], *(m.get('interval') or 2 * [m['auroc']])) for m in means]
    return np.array(rows, np.float64).reshape(-1, 3).T


def _plot_epsilons(axes, result):
    """Draws success and AUROC against epsilon."""
    fgsm = {name: row for name, row in result['attacks'].items() if row['attack'] == 'fgsm'}
    epsilons, average = [row['epsilon'] for row in fgsm.values()], _averages(result)[0]
    rates = [row['success_rate'] for row in fgsm.values()]
    axes.plot(epsilons, rates, 'k--o', markersize=4, label='attacks that succeed')
    for method, rows in result['transfer'].items():
        values, *ends = _numbers([rows[name][name] for name in fgsm], average)
        label = canvas.shortened(f'AUROC, {tables.words(method)}')
        (line,) = axes.plot(epsilons, values, '-o', markersize=4, label=label)
        axes.fill_between(epsilons, *ends, color=line.get_color(), alpha=0.15)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(epsilons, map(tables.epsilon, epsilons), fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel('ε of FGSM, fitted and judged')


def _plot_passes(axes, result):
    """Draws AUROC against forward passes, each kind of window with its interval."""
    average = _averages(result)[0]
    for number, method in enumerate(result['transfer']):
        if method not in result['occluders'][0]['auroc']:
            continue
        passes = [row['forward_passes'] for row in result['occluders']]
        values, *ends = _numbers([row['auroc'][method] for row in result['occluders']], average)
        axes.errorbar(
            passes,
            values,
            np.abs(np.subtract(ends, values)),
            fmt='o',
            color=f'C{number}',
            markersize=4,
            elinewidth=0.8,
            label=canvas.shortened(f'AUROC, {tables.words(method)}'),
        )
    axes.set_xlim(min(passes) / 1.2, 1.2 * max(passes))  # Also where no AUROC could be computed.
    ticks = sorted({*passes})
    axes.set_xticks(ticks, map(str, ticks), fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel('forward passes per image')


def _plot_matrix(axes, result, method, rows):
    """Draws what was fitted on against what judges; a coin's toss, 0.5, is white."""
    names, average = list(result['attacks']), _averages(result)[0]
    values = np.stack(
        [_numbers([row[name] for name in names], average)[0] for row in rows.values()]
    )
    axes.imshow(values, vmin=0, vmax=1, cmap='RdBu', aspect='auto')
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = 'black' if 0.2 < value < 0.8 else 'white'
            text = f'{value:.2f}'.lstrip('0')
            axes.text(j, i, text, ha='center', va='center', fontsize=7, color=colour)
    labels = [_words(result['attacks'][name]) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    fitted = [_fitted_on(result, name) for name in rows]
    axes.set_yticks(range(len(rows)), fitted, fontsize=7)
    axes.set_xlabel('judged by')
    axes.set_ylabel('fitted on')
    title = f'AUROC {tables.AVERAGES[average]}, {tables.words(method)}'
    axes.set_title(canvas.shortened(title, 60), fontsize=9)
