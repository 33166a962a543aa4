"""Verdicts on images of one's own (`--mode=detect`), by the detectors as one would deploy them.

Images are read, judged and told part by part, in constant memory; what is judged is kept in
`parts/`, named by the files and by what judged them, so that the same command goes on where it was
stopped, and another false positive rate costs nothing.

Dimensions: D detectors, n images of a part, S side of an image, h w heatmap grid.
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import guard, metrics, names, occlusion, sources, verdict
from occjax.experiment import deployment, devices, hosts, shard, stages, storage, store
from occjax.experiment.run import Run, parts
from occjax.probes import conditions
from occjax.progress import counted, printable, say
from occjax.report import tables, verdicts
from occjax.types import HeatmapSet, UsageError, condense

_NAME = 32  # letters of a part's name
_PART = 64  # images that are kept together, at least
_TELLING = 3  # windows of an image that are named


def detect(
    run: Run,
    path: str | None,
    *,
    fpr: float = 0.05,
    output: str | None = None,
    detectors: Sequence[str] | None = None,
):
    """Prints what each image is, how probable, and what each detector says of it.

    On a terminal that is a table, else a line of JSON each. The same is in `verdicts.csv`, and with
    pictures in `detect.html`.

    Args:
        run: a finished one.
        path: a file or a folder of images.
        fpr: the share of fresh clean images, of those that the classifier gets right, that each
            detector may flag.
        output: the folder of these files; None for one in the work directory.
        detectors: whom to ask, see `deployment.candidates`; None for the paper's, the best of them
            and those that a sweep has fitted.

    Raises:
        UsageError: if `--images` names nothing that can be read, or a stage is missing. If it is
            only some of the files that cannot be read, all others are judged first.
    """
    files = _files(path)
    _refuse_others(output)
    asked = _asked(run, detectors)
    guards = {name: guard.at_fpr(stages.load_guard(run, name), fpr) for name in asked}
    finds = [verdicts.finds(name, each) for name, each in guards.items()]
    for sentence in finds:
        say(sentence)
    unread, calls = [], collections.Counter()
    with _folder(run, path, output) as folder:
        told = _judged(run, folder, files, guards)
        known = dict(fpr=fpr, finds=finds)
        with _written(run, folder, Path(path).expanduser(), guards, **known) as write:
            for entry in told:
                write(entry)
                if 'error' in entry:
                    unread.append(entry)
                for name, found in entry.get('detectors', {}).items():
                    calls[name, found['verdict']] += 1
        _tell(folder, len(files) - len(unread), guards, calls, fpr)
    hosts.wait('told')  # Before one of them ends all.
    if len(files) == len(unread) == 1:
        raise UsageError(f'Cannot read the image {files[0]}: {unread[0]["error"]}')
    if unread:
        raise UsageError(f'{len(unread)} of {counted(len(files), "file")} could not be read.')


def _asked(run, detectors):
    """Returns the names of the detectors to ask, and says of the best why it is."""
    swept = [name for name in names.VIEWING if stages.guard_path(run, name).exists()]
    if detectors is not None:
        known = [*deployment.candidates(run), *swept]
        for name in detectors:
            if name not in known:
                raise UsageError(f'--detectors={name}: choose from {", ".join(known)}.')
        return tuple(dict.fromkeys(detectors))
    aurocs, chosen = stages.choice(run), stages.deployed(run)
    if aurocs:
        best = deployment.best(aurocs)
        say(
            f'Asked: {tables.words(deployment.PAPERS)}, and the best of {len(aurocs)} scores of '
            f'this run: {tables.words(best)}. It has the highest AUROC, {aurocs[best]:.3f}, '
            'against clean and noisy images, on those test images that set thresholds.'
        )
    return (*chosen, *swept)


def _tell(folder, count, guards, calls, fpr):
    """Says how many were flagged, how many could not be, and where the page is."""
    flagged = '; '.join(f'{calls[n, verdicts.FLAGGED]} by {tables.words(n)}' for n in guards)
    say(f'{counted(count, "image")} judged; flagged: {flagged}.')
    unknown = [f'{n} by {tables.words(k)}' for k in guards if (n := calls[k, verdicts.UNKNOWN])]
    if unknown and fpr > 0:
        say(
            f'Not judged, for want of a threshold: {"; ".join(unknown)}. At --fpr={fpr:g} it takes '
            f'{metrics.fewest(fpr)} clean maps that no detector was fitted on, and of the class '
            'maps of both kinds that they were: more test images, or a larger --fpr.'
        )
    if folder.parent.name.startswith(_NOWHERE):
        say('Nothing can be written in the work directory: --output=<folder> takes the page.')
    else:
        say(f'Page: {folder / "detect.html"}')


# What each file of this mode has near its start.
_MARKS = {'verdicts.csv': b'file,class,probability,', 'detect.html': b'<title>Verdicts on '}


def _refuse_others(output):
    """Refuses a folder in which somebody else's file has a name of ours."""
    for name, mark in _MARKS.items() if output is not None else ():
        file = Path(output).expanduser() / name
        if file.exists() and mark not in file.read_bytes()[:1000]:
            raise UsageError(f'{file} was not written by --mode=detect: choose another --output.')


_NOWHERE = 'occjax-nowhere-'


@contextlib.contextmanager
def _folder(run, path, output):
    """Yields where files go: the given folder, one in the work directory, or one that vanishes."""
    if output is not None:
        folder = Path(output).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'Cannot use --output={output}: {error.strerror}.') from None
        with hosts.first():
            for stem in ('.verdicts.csv.', '.detect.html.', 'parts/.') if hosts.is_first() else ():
                for leftover in folder.glob(f'{stem}*{storage.PARTIAL}'):
                    leftover.unlink(missing_ok=True)
        yield folder
    elif os.access(run.workdir, os.W_OK):
        root = Path(path).expanduser().resolve()
        digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
        yield run.workdir / 'detect' / f'{root.name}-{digest}'
    else:
        with tempfile.TemporaryDirectory(prefix=_NOWHERE) as root:
            yield Path(root) / 'detect'


def _judged(run, folder, files, guards) -> Iterator[dict]:
    """Yields what is said of each file, in their order."""
    size = max(_PART, run.batch_size)
    # Few images are no reason for a whole batch; maps are made in batches of a quarter.
    speed = dataclasses.replace(run.speed, eval_batch_size=min(run.batch_size, 4 * len(files)))
    few = run.changed(speed=speed)
    judge_fn = functools.partial(_judge, few, functools.cache(lambda: stages.load_variables(few)))
    made_from = store.heatmaps_origin(run)
    for name in guards:
        at_one_rate = guard.at_fpr(guards[name], 0.0)  # Thresholds follow from the scores.
        made_from[name] = storage.digest_of(guard.to_arrays(at_one_rate))
    wanted = []
    for start in range(0, len(files), size):
        here = files[start : start + size]
        content = json.dumps([made_from, *map(_state, here)])
        name = hashlib.sha256(content.encode()).hexdigest()[:_NAME]
        place = folder / 'parts' / f'{name}.npz'
        wanted.append((place, len(here), functools.partial(judge_fn, here, guards)))
    there = dataclasses.replace(run, workdir=folder)
    kept = set()
    found = parts(there, 'images', wanted, mode='detect', made_from=made_from)
    for (place, *_), arrays in zip(wanted, found, strict=True):
        yield from _entries(run, arrays, guards)
        if not any(arrays['error']):  # Which may be mended next time without a trace in the file.
            kept.add(place)
    hosts.wait('judged')  # Others may be reading what this one no longer needs.
    for stale in set((folder / 'parts').glob('?' * _NAME + '.npz')) - kept:
        if hosts.is_first():
            storage.discard(stale)


def _state(file):
    """Returns what is to be known of a file to judge it again only if it changed."""
    try:
        found = os.stat(file)
    except OSError:
        return str(file), 0, 0
    return str(file), found.st_size, found.st_mtime_ns


def _judge(run, load_fn, files, guards) -> dict[str, np.ndarray]:
    """Returns all that is known of some files, as arrays."""
    images, wrong = [], []
    for file in files:
        try:
            images.append(sources.read_image(file, run.config.data.image_size))
            wrong.append('')
        except UsageError as error:
            wrong.append(str(error).removeprefix(f'Cannot read the image {file}: '))
    thumbnails = [verdicts.thumbnail(image) for image in images]
    found = {
        'file': np.array(list(map(str, files))),
        'error': np.array(wrong),
        'thumbnail': np.frombuffer(b''.join(thumbnails), np.uint8),
        'thumbnail_size': np.array(list(map(len, thumbnails)), np.int64),
    }
    if not images:
        return found
    images = np.array(images, np.float32) / 255
    seen, said, effects = {(): _see(run, load_fn(), images, guards)}, [], []
    for name, each in guards.items():
        if each.views not in seen:
            seen[each.views] = _view(run, load_fn(), each, images, seen[()])
        maps = seen[each.views]
        said.append(guard.judge_maps(each, maps))
        method, none = guard.METHODS[name], np.zeros((len(images), *run.grid))
        effects.append(verdict.effects(each.bank, maps, method=method) if method.windows else none)
    return found | {
        'predicted': np.asarray(maps.predicted),
        'probability': np.asarray(maps.max_probability),
        'map': np.asarray(maps.maps),
        'score': np.stack([each.score for each in said]),
        'effect': np.stack(effects),
    }


def _see(run, variables, images, guards) -> HeatmapSet:
    """Returns the maps of images that nothing else is known of, and other scores if one asks."""
    predict_fn = functools.partial(conditions.logits_batch, variables, network=run.network)
    devices_here = jax.local_device_count()
    batch_size = min(run.batch_size, -(-len(images) // devices_here) * devices_here)
    unknown = jnp.zeros(len(images), int)
    unoccluded = devices.in_batches(predict_fn, images, batch_size=batch_size)
    return HeatmapSet(
        logits=jnp.asarray(shard.map_images(run, variables, images, unoccluded)),
        unoccluded=jnp.asarray(unoccluded),
        label=unknown,
        image_id=unknown,
        is_adversarial=unknown.astype(bool),
        comparators=_compared(run, variables, images, guards),
    )


def _compared(run, variables, images, guards):
    """Returns `names.COMPARATORS` of images, None where no detector is one of them."""
    learnt = [each.autoencoder for name, each in guards.items() if name in names.COMPARATORS]
    if not learnt:
        return None
    compare_fn = shard.comparing(run, variables, learnt[0])
    batch_size = min(run.batch_size, len(images))
    return jnp.asarray(devices.in_batches(compare_fn, images, batch_size=batch_size))


def _view(run, variables, each, images, maps):
    """Returns maps with the logits under a guard's views."""
    view_fn = functools.partial(conditions.view_batch, variables, each.autoencoder)
    view_fn = functools.partial(view_fn, views=each.views, network=run.network)
    views = devices.in_batches(view_fn, images, batch_size=min(run.batch_size, len(images)))
    views = condense(views, np.asarray(maps.unoccluded), run.config.occlusion.top_classes)
    return dataclasses.replace(maps, views=jnp.asarray(views))


def _entries(run, arrays, guards) -> Iterator[dict[str, Any]]:
    """Yields what is said of each file of a part, and what only the page shows beside it."""
    class_names = run.description['class_names']
    ends = np.cumsum(arrays['thumbnail_size'])
    i = 0
    for file, error in zip(arrays['file'].tolist(), arrays['error'].tolist(), strict=True):
        if error:
            yield {'file': file, 'error': error}
            continue
        said = [arrays[name][i] for name in ('probability', 'map')]
        said += [arrays[name][d][i] for name in ('score', 'effect') for d in range(len(guards))]
        if not all(np.isfinite(numbers).all() for numbers in said):
            yield {'file': file, 'error': 'The classifier answers it with NaN or infinity.'}
            i += 1
            continue
        k = int(arrays['predicted'][i])
        yield {
            'file': file,
            'class': class_names[k],
            'probability': round(float(arrays['probability'][i]), 4),
            'detectors': {
                name: _said(name, arrays['score'][d][i], each.thresholds[k], arrays['effect'][d][i])
                for d, (name, each) in enumerate(guards.items())
            },
            'map': arrays['map'][i],
            'thumbnail': arrays['thumbnail'][ends[i] - arrays['thumbnail_size'][i] : ends[i]],
        }
        i += 1


def _said(name, score, threshold, effect):
    """Returns what a detector says of an image, and the windows that moved its score most."""
    order = np.abs(effect).argsort(axis=None)[::-1][: _TELLING * guard.METHODS[name].windows]
    rows, columns = np.unravel_index(order, effect.shape)
    word = verdicts.FLAGGED if score > threshold else verdicts.NO_ALARM
    known = bool(threshold < np.inf)
    return {
        'score': _rounded(score),
        'threshold': _rounded(threshold) if np.isfinite(threshold) else None,
        'verdict': word if known else verdicts.UNKNOWN,
        'windows': [
            {'row': int(r), 'column': int(c), 'effect': _rounded(effect[r, c])}
            for r, c in zip(rows, columns, strict=True)
        ],
    }


def _rounded(value):
    """Returns a number of six digits; some scores are of the order of 1e-5."""
    return float(f'{value:.6g}')


@contextlib.contextmanager
def _written(run, folder, path, guards, *, fpr, finds):
    """Yields a function that adds an entry to what is printed, to the table and to the page.

    Table and page name files from the folder on that was given, so that they can be shared.
    """
    origins = occlusion.window_origins(run.image_shape, **run.geometry)
    root = path.parent if path.is_file() else path
    known = dict(
        title=f'Verdicts on {path.name or path}',
        detectors=list(guards),
        fpr=fpr,
        finds=finds,
        image_size=run.config.data.image_size,
        window_size=run.config.occlusion.size,
        origins=origins.tolist(),
    )
    row_fn = verdicts.line if sys.stdout.isatty() else _json
    with (
        storage.writing(folder / 'verdicts.csv') as table,
        storage.writing(folder / 'detect.html') as page,
    ):
        page.write(verdicts.head(**known).encode(errors='backslashreplace'))
        table.write(_csv(verdicts.columns(guards)))
        if sys.stdout.isatty():
            print(*verdicts.heading(guards), sep='\n', flush=True)

        def write(entry):
            print(printable(row_fn(entry)), flush=True)
            entry = entry | {'file': os.path.relpath(entry['file'], root)}
            table.write(_csv(verdicts.cells(entry, guards)))
            page.write(verdicts.row(entry).encode())

        yield write
        page.write(verdicts.tail().encode())


def _json(entry):
    """Returns an entry as a line of JSON, without what only the page shows."""
    return json.dumps({k: v for k, v in entry.items() if k not in ('map', 'thumbnail')})


_FORMULA = (*'=+-@\t\r',)  # What a cell begins with that a spreadsheet would run.


def _csv(cells: Sequence[Any]) -> bytes:
    """Returns a line of a table; names that are no UTF-8 are spelt out."""
    line = io.StringIO()
    safe = [
        "'" * cell.startswith(_FORMULA) + printable(cell) if isinstance(cell, str) else cell
        for cell in cells
    ]
    csv.writer(line, lineterminator='\n').writerow(safe)
    return line.getvalue().encode(errors='backslashreplace')


def _files(path):
    """Returns the image files that `--images` names, one or all in a folder."""
    if path is None:
        raise UsageError('--mode=detect needs --images=<a file or a folder of images>.')
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f'Cannot read --images={path}: no such file or folder, or no permission.')
    skipped = collections.Counter()
    found = list(sources.images_in(root, skipped))
    sources.tell_skipped(root, skipped)
    if not found:
        raise UsageError(f'There is no image in --images={path}.')
    return found
