"""What `--mode=sweep` found, as tables and as a picture."""

import numpy as np

from occjax.report import canvas, tables


def build(result: dict) -> list[tables.Table]:
    """Returns what `sweep.json` holds: success, a transfer matrix for each method, windows."""
    found, cell = result['attacks'], tables.cell
    listed = [
        tables.Table(
            'Attacks',
            ('Attack, ε', 'Successful', 'Rate'),
            [
                (name, cell(row['successful']), cell(row['success_rate']))
                for name, row in found.items()
            ],
            note=f'Of {cell(result["correct"])} correctly classified test images, among '
            f'{cell(result["images"])}.',
        )
    ]
    listed += summary(result)
    for method, rows in result['transfer'].items():
        listed.append(_matrix(method, rows, ''))
        noisy = {name: {k: v['with_noise'] for k, v in row.items()} for name, row in rows.items()}
        if all(all(row.values()) for row in noisy.values()):
            listed.append(_matrix(method, noisy, ' against clean and noise'))
    if result.get('search'):
        listed.append(_search(result['search']))
    return listed


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
    """Returns a row for each method, of FGSM at its own ε and of the mixture, and the windows."""
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
            *(
                _auroc(each, each['interval'])
                for name in own
                for each in _both(rows[name][name])[:kinds]
            ),
        )
        for method, rows in result['transfer'].items()
    ]
    epsilons = [tables.epsilon(attacks[name]['epsilon']) for name in own]
    columns = [c for e in epsilons for c in (f'ε = {e}, against clean', 'and noise')[:kinds]]
    note = 'AUROC of FGSM, fitted and judged at the same ε; ± is a 95 % interval.'
    listed = [tables.Table('FGSM', ('Method', 'Forward passes', *columns), lines, note=note)]
    if all('mixture' in rows for rows in result['transfer'].values()):
        listed.append(_mixture(result))
    if result.get('occluders'):
        listed.append(_windows(result['occluders']))
    return listed


def _windows(rows):
    """Returns what other windows tell, and what they cost."""
    methods = list(rows[0]['auroc'])
    lines = [
        (
            row['windows'],
            tables.cell(row['forward_passes']),
            *(_auroc(row['auroc'][m], row['auroc'][m]['interval']) for m in methods),
        )
        for row in rows
    ]
    header = ('Windows', 'Forward passes', *(f'AUROC, {tables.words(m).lower()}' for m in methods))
    note = 'FGSM, fitted and judged at the same ε; ± is a 95 % interval.'
    return tables.Table('Windows', header, lines, note=note)


def _both(cell):
    """Returns what is judged against clean images, and against clean and noisy ones."""
    return cell, cell['with_noise'] or {'auroc': None, 'interval': None}


def _mixture(result):
    """Returns what methods make of each attack that they saw, and of each that they did not."""
    lines = []
    for method, rows in result['transfer'].items():
        pairs = [_seen_or_not(result, rows, name) for name in result['attacks']]
        sides = (
            [value for value in side if value is not None] for side in zip(*pairs, strict=True)
        )
        pairs.append([min(side, default=None) for side in sides])
        cells = [f'{tables.cell(seen)} / {tables.cell(unseen)}' for seen, unseen in pairs]
        lines.append((tables.words(method), *cells))
    header = ('Method', *map(_words, result['attacks'].values()), 'Worst')
    note = (
        'AUROC against clean images of detectors that are fitted on a mixture with the attack / '
        'without it, at any ε.'
    )
    return tables.Table('A mixture of attacks', header, lines, note=note)


def _seen_or_not(result, rows, name):
    """Returns the AUROC of what saw an attack, and of what did not; None where there is none."""
    found = rows['mixture'][name]['auroc']
    if result['attacks'][name]['attack'] not in result['mixture']:
        return None, found
    left_out = rows.get(_without(result, name))
    return found, left_out and left_out[name]['auroc']


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


def _matrix(method, rows, against):
    """Returns the AUROC of what was fitted on each row, judged by each column."""
    judged = list(next(iter(rows.values())))
    return tables.Table(
        f'AUROC{against}, {tables.words(method).lower()}: fitted on the row, judged by the column',
        ('Fitted on', *judged),
        [(name, *(_auroc(row[k]) for k in judged)) for name, row in rows.items()],
        note='Class means on images that were not fitted on, means over the seeds; in '
        'brackets: how many classes and seeds have maps of both kinds, where not all do.',
    )


def _auroc(found, interval=None):
    """Returns one AUROC as a reader sees it, with half its interval if that is given."""
    named = {'auroc': found['auroc'], 'interval': {'auroc': interval}}
    return tables.with_interval(named | {'over': {'auroc': found.get('over')}}, 'auroc')


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
        _plot_matrix(panel, method, rows, list(result['attacks']))
    return canvas.encode(figure, 'png')


def _number(value):
    """Returns a number that matplotlib leaves out where there is none."""
    return np.nan if value is None else value


def _plot_epsilons(axes, result):
    """Draws success and AUROC against epsilon."""
    fgsm = {name: row for name, row in result['attacks'].items() if row['attack'] == 'fgsm'}
    epsilons = [row['epsilon'] for row in fgsm.values()]
    rates = [row['success_rate'] for row in fgsm.values()]
    axes.plot(epsilons, rates, 'k--o', markersize=4, label='attacks that succeed')
    for method, rows in result['transfer'].items():
        own = [rows[name][name] for name in fgsm]
        values = [_number(row['auroc']) for row in own]
        (line,) = axes.plot(epsilons, values, '-o', markersize=4, label=f'AUROC, {method}')
        ends = [row['interval'] or (np.nan, np.nan) for row in own]
        axes.fill_between(epsilons, *np.transpose(ends), color=line.get_color(), alpha=0.15)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(epsilons, map(tables.epsilon, epsilons), fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel('ε of FGSM, fitted and judged')


def _plot_passes(axes, result):
    """Draws AUROC against forward passes, each kind of window with its interval."""
    for number, method in enumerate(result['transfer']):
        if method not in result['occluders'][0]['auroc']:
            continue
        found = [row['auroc'][method] for row in result['occluders']]
        passes = [row['forward_passes'] for row in result['occluders']]
        values = np.array([_number(row['auroc']) for row in found])
        ends = np.transpose([row['interval'] or (np.nan, np.nan) for row in found])
        axes.errorbar(
            passes,
            values,
            np.abs(ends - values),
            fmt='o',
            color=f'C{number}',
            markersize=4,
            elinewidth=0.8,
            label=f'AUROC, {method}',
        )
    axes.set_xlim(min(passes) / 1.2, 1.2 * max(passes))  # Also where no AUROC could be computed.
    ticks = sorted({*passes})
    axes.set_xticks(ticks, map(str, ticks), fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel('forward passes an image')


def _plot_matrix(axes, method, rows, names):
    """Draws what was fitted on against what judges."""
    values = np.array([[_number(row[name]['auroc']) for name in names] for row in rows.values()])
    axes.imshow(values, vmin=0.5, vmax=1, cmap='viridis', aspect='auto')
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = 'black' if value > 0.8 else 'white'
            text = f'{value:.2f}'.lstrip('0')
            axes.text(j, i, text, ha='center', va='center', fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xlabel('judged by')
    axes.set_ylabel('fitted on')
    axes.set_title(f'AUROC, {method}', fontsize=10)
