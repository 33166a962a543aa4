"""Verdicts on images as text: cells of a table, lines on a terminal, and `detect.html`.

The page is written entry by entry, and may have ten thousand: it holds them as JSON, and a script
in it shows fifty at a time, sorted and filtered. Nothing in it is fetched from elsewhere.

An entry is `file` with `error`, or with `class`, `probability`, `detectors` (for each `score`,
`threshold`, `verdict` and `windows`), `map` and `thumbnail`.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from occjax import guarding
from occjax.progress import counted
from occjax.report import page, tables

FLAGGED, NO_ALARM, UNKNOWN = 'flagged', 'no alarm', 'no threshold'
UNREAD = 'not read'
_SHOWN = 128  # pixels a side of a picture in the page; smaller ones are kept as they are


def thumbnail(image: np.ndarray) -> bytes:
    """Returns `u8[S, S, 3]` as the bytes of a small JPEG, or of a PNG where it is small already."""
    from PIL import Image

    picture, content = Image.fromarray(image), io.BytesIO()
    if picture.width <= _SHOWN:
        picture.save(content, 'PNG', optimize=True)
    else:
        picture.resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS).save(content, 'JPEG', quality=80)
    return content.getvalue()


def finds(name: str, guard: guarding.Guard) -> str:
    """Returns what a run's own held-out images say that a detector finds at its thresholds."""
    detector, shares = tables.words(name), guarding.shares(guard)
    if shares is None:
        return f'Nothing says how many attacks {detector} finds.'
    clean, attacked = shares['clean'], shares['attacked']
    count = counted(clean.n + shares['misclassified'].n, 'test image')
    kinds = {'noisy': 'noisy ones', 'misclassified': 'those that are misclassified'}
    others = [f'{_percent(shares[k])} of {text}' for k, text in kinds.items() if shares[k].n]
    *flags, last = [f'{_percent(clean)} of clean ones', *others]
    flags = f'{", ".join(flags)} and {last}' if flags else last
    text = f'On {count} of this run, which neither fitted it nor set its thresholds, {detector} '
    text += f'finds {_percent(attacked)} of successful {guard.attacks} and flags {flags}.'
    if attacked.n and clean.n and attacked.interval[0] <= clean.interval[1]:
        text += ' Warning: it is not shown to find more attacks than it flags clean images.'
    return text


def _percent(share):
    """Returns a share, its interval and of how many images it is."""
    if not share.n:
        return '– (n = 0)'
    low, high = (f'{100 * end:.0f}' for end in share.interval)
    return f'{100 * share.rate:.0f} % ({low} to {high} %, n = {share.n})'


def columns(detectors: Iterable[str]) -> list[str]:
    """Returns the head of the table of `cells`."""
    of_each = [
        f'{tables.words(name)}: {what}'
        for name in detectors
        for what in ('score', 'threshold', 'verdict')
    ]
    return ['file', 'class', 'probability', *of_each, 'error']


def cells(entry: dict[str, Any], detectors: Iterable[str]) -> list[Any]:
    """Returns what a table says of an entry."""
    found = entry.get('detectors', {})
    said = [
        found.get(name, {}).get(what)
        for name in detectors
        for what in ('score', 'threshold', 'verdict')
    ]
    known = [entry.get(name) for name in ('class', 'probability')]
    return [entry['file'], *known, *said, entry.get('error')]


def line(entry: dict[str, Any]) -> str:
    """Returns what a terminal shows of an entry."""
    if 'error' in entry:
        return f'{UNREAD:<12}  {entry["file"]}: {entry["error"]}'
    said = []
    for name, found in entry['detectors'].items():
        by = ''
        if found['threshold'] is not None:
            by = f' ({found["score"] - found["threshold"]:+.3g})'
        said.append(f'{found["verdict"]}{by}'.ljust(max(18, len(tables.words(name)))))
    known = f'{entry["class"]} ({entry["probability"]:.3f})'
    return f'{known:<22}  {"  ".join(said)}  {entry["file"]}'


def heading(detectors: Iterable[str]) -> tuple[str, str]:
    """Returns the two lines that a terminal shows above those of images."""
    named = '  '.join(tables.words(name).ljust(18) for name in detectors)
    each = 'class (probability), verdict (score minus threshold) of each detector, file'
    return f'Of each image: {each}.', f'{"Class":<22}  {named}  File'


def head(
    *,
    title: str,
    detectors: Sequence[str],
    fpr: float,
    finds: Sequence[str],
    image_size: int,
    window_size: int,
    origins: Sequence[Sequence[int]],
) -> str:
    """Returns `detect.html` up to its entries.

    Args:
        title: of the page.
        detectors: names, in the order of an entry's.
        fpr: the share of clean, correctly classified images that each may flag.
        finds: a sentence about each, see `finds`.
        image_size, window_size: sides in pixels.
        origins: `[P, 2]`, row and column of each window's first pixel.
    """
    known = {
        'detectors': [tables.words(name) for name in detectors],
        'size': image_size,
        'window': window_size,
        'origins': [list(map(int, origin)) for origin in origins],
        'colours': _colours(),
        'unread': UNREAD,
        'words': [FLAGGED, NO_ALARM, UNKNOWN, UNREAD],
    }
    names = [html.escape(tables.words(name)) for name in detectors]
    options = ''.join(f'<option>{name}</option>' for name in names)
    found = ''.join(f'<p class="lead">{html.escape(sentence)}</p>\n' for sentence in finds)
    verdict_options = ''.join(
        f'<option>{word}</option>' for word in (FLAGGED, NO_ALARM, UNKNOWN, UNREAD)
    )
    return (
        f'{page.opening(title, _STYLE)}<header><h1>{html.escape(title)}</h1></header>\n'
        f'{found}<p id="counts" role="status"></p>\n'
        '<p class="lead">What the classifier predicts, and whether a detector flags the image as '
        f'attacked: its score is above its threshold, as those of at most {100 * fpr:.3g} % of '
        'fresh clean images are that the classifier gets right. “No alarm” does not mean that an '
        'image is clean. A map has the probability of the predicted class '
        'with each window covered, from <canvas id="bar" width="64" height="10"></canvas> 0 to 1; '
        'the framed windows moved the score most, up (solid) or down (dashed).</p>\n'
        '<form id="filters" role="search">'
        f'<label>Detector <select id="detector">{options}</select></label>'
        f'<label>Verdict <select id="verdict"><option value="">all</option>{verdict_options}'
        '</select></label>'
        '<label>Class <select id="class"><option value="">all</option></select></label>'
        '<label>Score from <input id="low" type="number" step="any"></label>'
        '<label>to <input id="high" type="number" step="any"></label>'
        '<label>File <input id="search" type="search" placeholder="press /"></label></form>\n'
        '<p id="count" role="status"></p>\n<div class="scroll" tabindex="0" role="region" '
        'aria-label="Verdicts"><table><thead><tr id="heads"></tr></thead><tbody id="rows"></tbody>'
        '</table></div>\n<nav><button id="previous">Previous</button> <span id="place"></span> '
        '<button id="next">Next</button></nav>\n'
        '<noscript>This page sorts and filters by a script, which is switched off.</noscript>\n'
        f'<script type="application/json" id="known">{_script_json(known)}</script>\n'
        '<script type="application/json" id="entries">[null'
    )


def row(entry: dict[str, Any]) -> str:
    """Returns an entry as the page holds it."""
    short = {'f': entry['file']}
    if 'error' in entry:
        return f',\n{_script_json(short | {"e": entry["error"]})}'
    kind = 'png' if bytes(entry['thumbnail'][:4]) == b'\x89PNG' else 'jpeg'
    picture = base64.b64encode(bytes(entry['thumbnail'])).decode()
    levels = np.round(255 * np.asarray(entry['map'], np.float32)).astype(np.uint8)
    columns = levels.shape[1]
    short |= {
        'c': entry['class'],
        'p': entry['probability'],
        'd': [
            [
                found['score'],
                found['threshold'],
                found['verdict'],
                [[w['row'] * columns + w['column'], w['effect']] for w in found['windows']],
            ]
            for found in entry['detectors'].values()
        ],
        'm': base64.b64encode(levels.tobytes()).decode(),
        'i': f'data:image/{kind};base64,{picture}',
    }
    return f',\n{_script_json(short)}'


def tail() -> str:
    """Returns the rest of the page."""
    return f']</script>\n<script>{_SCRIPT}</script>\n{page.CLOSING}'


def _script_json(value):
    """Returns JSON that ends no script; what is no Unicode is spelt as ASCII."""
    return json.dumps(value, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')


def _colours():
    """Returns the colour scale of all maps, `#rrggbb` from 0 to 1."""
    from matplotlib import colormaps, colors

    return [colors.to_hex(c) for c in colormaps['inferno'](np.linspace(0, 1, 64))]


_STYLE = """
.lead { max-width: 80ch; color: var(--soft); }
#filters { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; }
label { display: grid; gap: 2px; font-size: 0.8rem; color: var(--soft); }
select, input, button { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; max-width: 100%; }
input[type=number] { width: 7em; }
button:not(:disabled) { cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
thead button { border: 0; background: none; padding: 0; font-weight: 600; white-space: nowrap; }
thead button::after { content: " ↕"; color: var(--soft); }
[aria-sort=ascending] button::after { content: " ↑"; }
[aria-sort=descending] button::after { content: " ↓"; }
table { font-size: 0.9rem; }
tr > :first-child { min-width: 0; position: static; white-space: nowrap; }
td, th { vertical-align: middle; text-align: left; }
td.number { text-align: right; }
td.file { white-space: normal; overflow-wrap: anywhere; min-width: 12em; }
td canvas { width: 96px; height: 96px; border-radius: 4px; margin-right: 6px; }
td.said { font-weight: 600; }
td.flagged { color: var(--wrong); }
button:disabled { opacity: 0.4; }
#counts { font-weight: 600; }
td.others { color: var(--soft); font-size: 0.8rem; white-space: normal; }
#count, nav { color: var(--soft); margin: 12px 0; }
:root { --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --wrong: #ff8a80; } }
@media (max-width: 700px) { td canvas { width: 64px; height: 64px; } }
"""

_SCRIPT = r"""
'use strict';
const read = id => JSON.parse(document.getElementById(id).textContent);
const at = id => document.getElementById(id);
const known = read('known'), entries = read('entries').slice(1), perPage = 50;
const heads = [['Image'], ['Verdict', said, 1], ['Class', e => e.c, 1],
  ['Probability', e => e.p, -1], ['Score', e => of(e)?.[0], -1], ['Threshold', e => of(e)?.[1], -1],
  ['Score minus threshold', margin, -1], ['File', e => e.f, 1], ['Others']];
let sorting = null, direction = 1, first = 0;

function of(entry) { return entry.d && entry.d[at('detector').selectedIndex]; }
function said(entry) { return entry.d ? of(entry)[2] : known.unread; }

function short(number) { return String(Number(number.toPrecision(3))); }

function margin(entry) {
  const [score, threshold] = of(entry) ?? [];
  return threshold === undefined || threshold === null ? null : score - threshold;
}

function chosen() {
  const verdict = at('verdict').value, wanted = at('class').value;
  const words = at('search').value.toLowerCase();
  const low = at('low').valueAsNumber, high = at('high').valueAsNumber;
  const found = entries.filter(e => (!verdict || said(e) === verdict) && (!wanted || e.c === wanted)
    && (!words || e.f.toLowerCase().includes(words))
    && (isNaN(low) || of(e)?.[0] >= low) && (isNaN(high) || of(e)?.[0] <= high));
  if (sorting === null) return found;
  const key = heads[sorting][1];
  const absent = e => key(e) === undefined || key(e) === null;
  const compare = (a, b) => typeof a === 'number' ? a - b
    : a.localeCompare(b, 'en', {numeric: true});
  return found.sort((a, b) => absent(a) || absent(b) ? absent(a) - absent(b)
    : direction * compare(key(a), key(b)));
}

function cell(row, text, name) {
  const made = row.insertCell();
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function draw(parent, entry, paint) {
  const canvas = document.createElement('canvas'), side = 192;
  canvas.width = canvas.height = side;
  parent.append(canvas);
  const picture = new Image();
  picture.onload = () => {
    const context = canvas.getContext('2d');
    context.imageSmoothingEnabled = picture.width > 64;
    context.drawImage(picture, 0, 0, side, side);
    paint?.(context, side / known.size);
  };
  picture.src = entry.i;
  return canvas;
}

function overlay(entry) {
  // Each pixel shows the mean of the windows that cover it; one that none covers stays bare.
  const levels = Uint8Array.from(atob(entry.m), c => c.charCodeAt(0)), size = known.size;
  const sums = new Float32Array(size * size), counts = new Float32Array(size * size);
  known.origins.forEach(([row, column], i) => {
    for (let y = row; y < row + known.window; y++)
      for (let x = column; x < column + known.window; x++) {
        sums[y * size + x] += levels[i];
        counts[y * size + x]++;
      }
  });
  const small = new OffscreenCanvas(size, size), context = small.getContext('2d');
  const pixels = context.createImageData(size, size);
  counts.forEach((count, i) => {
    if (!count) return;
    const step = Math.round(sums[i] / count / 255 * (known.colours.length - 1));
    const colour = parseInt(known.colours[step].slice(1), 16);
    pixels.data.set([colour >> 16, colour >> 8 & 255, colour & 255, 190], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return small;
}

function show() {
  const found = chosen();
  first = Math.max(0, Math.min(first, Math.floor((found.length - 1) / perPage) * perPage));
  const body = at('rows');
  body.replaceChildren();
  for (const entry of found.slice(first, first + perPage)) {
    const row = body.insertRow(), pictures = cell(row, '');
    if (!entry.d) {
      cell(row, known.unread, 'said');
      cell(row, entry.e, 'file').colSpan = 5;
      cell(row, entry.f, 'file');
      cell(row, '');
      continue;
    }
    const [score, threshold, verdict, windows] = of(entry);
    const alt = `${entry.c}, ${verdict}`;
    draw(pictures, entry).ariaLabel = `Image of ${alt}`;
    const mapped = draw(pictures, entry, (context, scale) => {
      context.imageSmoothingEnabled = false;
      context.drawImage(overlay(entry), 0, 0, context.canvas.width, context.canvas.height);
      context.strokeStyle = '#00a3ff';
      windows.forEach(([i, effect], rank) => {
        const [y, x] = known.origins[i].map(v => v * scale);
        context.lineWidth = 5 - 1.5 * rank;
        context.setLineDash(effect > 0 ? [] : [10, 6]);
        context.strokeRect(x, y, known.window * scale, known.window * scale);
      });
    });
    mapped.ariaLabel = 'Heatmap';
    mapped.title = windows.map(([i, effect]) =>
      `window at row ${known.origins[i][0]}, column ${known.origins[i][1]}: ${effect}`).join('\n');
    for (const picture of pictures.children) picture.role = 'img';
    cell(row, verdict, `said ${verdict}`);
    cell(row, entry.c);
    cell(row, entry.p.toFixed(3), 'number');
    cell(row, short(score), 'number');
    cell(row, threshold === null ? '–' : short(threshold), 'number');
    const above = margin(entry);
    cell(row, above === null ? '–' : (above > 0 ? '+' : '') + short(above), 'number');
    cell(row, entry.f, 'file');
    cell(row, known.detectors.map((name, i) => `${name}: ${entry.d[i][2]}`)
      .filter((_, i) => i !== at('detector').selectedIndex).join(', '), 'others');
  }
  const last = Math.min(first + perPage, found.length);
  at('counts').textContent = known.detectors[at('detector').selectedIndex] + ': '
    + known.words.map(word => [entries.filter(e => said(e) === word).length, word])
      .filter(([n]) => n).map(([n, word]) => `${n} ${word}`).join(', ');
  const noun = entries.length === 1 ? 'image' : 'images';
  at('count').textContent = `${found.length} of ${entries.length} ${noun}`;
  at('place').textContent = found.length ? `${first + 1} to ${last}` : 'none';
  at('previous').disabled = first === 0;
  at('next').disabled = last === found.length;
  [...at('heads').children].forEach((head, i) => head.ariaSort = i !== sorting ? 'none'
    : direction > 0 ? 'ascending' : 'descending');
}

heads.forEach(([name, key, start], i) => {
  const head = document.createElement('th');
  head.scope = 'col';
  at('heads').append(head);
  if (!key) { head.textContent = name; return; }
  const button = document.createElement('button');
  button.textContent = name;
  button.onclick = () => {
    direction = sorting === i ? -direction : start;
    sorting = i;
    first = 0;
    show();
  };
  head.append(button);
});
const classes = [...new Set(entries.filter(e => e.c).map(e => e.c))];
classes.sort((a, b) => a.localeCompare(b, 'en', {numeric: true}));
for (const name of classes) at('class').add(new Option(name));
at('filters').oninput = at('filters').onchange = () => { first = 0; show(); };
at('filters').onsubmit = event => event.preventDefault();
at('previous').onclick = () => { first -= perPage; show(); };
at('next').onclick = () => { first += perPage; show(); };
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/INPUT|SELECT/.test(event.target.tagName)) return;
  if (event.key === '/') { event.preventDefault(); at('search').focus(); }
  if (event.key === 'ArrowLeft' && !at('previous').disabled) at('previous').click();
  if (event.key === 'ArrowRight' && !at('next').disabled) at('next').click();
});
const bar = at('bar').getContext('2d');
known.colours.forEach((colour, i) => { bar.fillStyle = colour; bar.fillRect(i, 0, 1, 10); });
show();
"""
