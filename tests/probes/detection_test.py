"""Laws of verdicts on images of one's own."""

import csv
import dataclasses
import functools
import html
import io
import json
import os
import re
import shutil
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from occjax import attack, data, guard, guarding, metrics, sources
from occjax.config import Sweep
from occjax.experiment import judging, shard, stages, store
from occjax.experiment.run import Speed
from occjax.methods import METHODS
from occjax.probes import conditions, detection, sweep
from occjax.report import tables, verdicts
from occjax.types import HeatmapSet, UsageError
from tests import moves
from tests.detector_test import toy_maps
from tests.verdict_test import seed_0

pytestmark = pytest.mark.usefixtures('small_plan')
ASKED = ('detector', 'all_logits')


@pytest.fixture
def judged(finished, small_plan, tmp_path):
    """A run that judges a folder of ten test images, four at once, and that folder."""
    run, _ = finished
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, pixels in enumerate(run.dataset.test.images[:10]):
        Image.fromarray(pixels).save(folder / f'{i}.png')
    return dataclasses.replace(run, speed=Speed(eval_batch_size=4)), folder


@pytest.fixture
def detect(tmp_path, capsys, monkeypatch):
    """Returns a function that judges, in parts of four, and gives back what is printed."""
    monkeypatch.setattr(detection, '_PART', 4)

    def call(run, path, **settings):
        capsys.readouterr()
        settings = dict(output=str(tmp_path / 'found'), detectors=ASKED) | settings
        try:
            detection.detect(run, str(path), **settings)
        finally:
            call.printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return call.printed

    return call


def counted(monkeypatch):
    """Returns a list to which the sizes of the parts are added that are judged."""
    sizes, judge = [], detection._judge

    def count(run, load_fn, files, guards):
        sizes.append(len(files))
        return judge(run, load_fn, files, guards)

    monkeypatch.setattr(detection, '_judge', count)
    return sizes


def test_bad_files_have_lines_of_their_own(judged, detect, monkeypatch):
    run, folder = judged
    expected = detect(run, folder)
    (folder / '3.png').write_bytes((folder / '3.png').read_bytes()[:-40])
    (folder / '10.png').write_text('<html>')
    Image.new('L', (60, 60)).save(folder / '11.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # It refuses twice as many.
    with pytest.raises(UsageError, match='^3 of 12 files could not be read.$'):
        detect(run, folder)
    lines = detect.printed
    assert len(lines) == 12
    for i, reason in ((3, 'damaged'), (10, 'in no format'), (11, 'decompression bomb')):
        assert lines[i].keys() == {'file', 'error'}
        assert lines[i]['file'] == str(folder / f'{i}.png') and reason in lines[i]['error']
    assert [lines[i] for i in (0, 1, 2, 4)] == [expected[i] for i in (0, 1, 2, 4)]


def test_heic_says_what_reads_it_and_others_are_judged(judged, detect, monkeypatch):
    run, folder = judged
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    Image.open(folder / '0.png').save(folder / '1.jpg')
    (folder / '0.png').unlink()
    (folder / '0.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99))
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    sources._read_heic.cache_clear()
    with pytest.raises(UsageError, match='^1 of 2 files could not be read.$'):
        detect(run, folder)
    sources._read_heic.cache_clear()
    heic, jpeg = detect.printed
    assert heic == {
        'file': str(folder / '0.heic'),
        'error': 'HEIC: pip install pillow-heif',
    }
    assert 'class' in jpeg


@pytest.mark.parametrize('name', ['verdicts.csv', 'detect.html'])
def test_a_file_of_somebody_else_is_left_alone(judged, detect, tmp_path, monkeypatch, name):
    run, folder = judged
    sizes = counted(monkeypatch)
    (tmp_path / 'found').mkdir()
    (tmp_path / 'found' / name).write_text('<!doctype html><title>Mine</title>')
    with pytest.raises(UsageError, match=f'{name} was not written by --mode=detect: choose anoth'):
        detect(run, folder)
    assert not sizes and (tmp_path / 'found' / name).read_text().endswith('Mine</title>')
    (tmp_path / 'found' / name).unlink()
    image = folder / '0.png'
    assert detect(run, image) == detect(run, image)  # Our own are written again.


def test_strange_images_and_names_are_judged(judged, detect):
    run, folder = judged
    picture = Image.open(folder / '1.png')
    strange = folder / 'Ünïcode, with "quotes" and spaces'
    strange.mkdir()
    picture.convert('CMYK').save(strange / 'a <b>.tif')
    picture.save(
        strange / 'animated.gif', save_all=True, append_images=[Image.new('RGB', (16, 16))]
    )
    picture.convert('RGBA').save(strange / os.fsdecode(b'no utf-8 \xff.png'))
    exif = Image.Exif()
    exif[0x112] = 3  # Stored upside down.
    picture.transpose(Image.Transpose.ROTATE_180).save(strange / 'turned.png', exif=exif)
    found = {line['file'].rsplit('/', 1)[1]: line for line in detect(run, folder)}
    assert len(found) == 14
    for name in ('a <b>.tif', 'animated.gif', 'no utf-8 \udcff.png', 'turned.png'):
        assert found[name]['class'] == found['1.png']['class']
        assert found[name]['probability'] == pytest.approx(found['1.png']['probability'], abs=0.05)


def test_hidden_folders_and_folders_called_like_images_are_left_out(judged, detect, capsys):
    run, folder = judged
    expected = detect(run, folder)
    (folder / 'a.png').mkdir()
    (folder / 'b.png').symlink_to('nowhere')
    (folder / '.thumbnails').mkdir()
    Image.new('RGB', (8, 8)).save(folder / '.thumbnails' / '0.png')
    assert detect(run, folder) == expected


def test_it_goes_on_where_it_was_stopped(judged, detect, tmp_path, monkeypatch):
    """Files are equal bit by bit; what changed is judged again, another rate judges nothing."""
    run, folder = judged
    expected = detect(run, folder, output=str(tmp_path / 'other'))
    judge = detection._judge

    def stopped(run, load_fn, files, guards):
        if len(list((tmp_path / 'found' / 'parts').glob('*.npz'))) == 1:
            raise KeyboardInterrupt
        return judge(run, load_fn, files, guards)

    monkeypatch.setattr(detection, '_judge', stopped)
    with pytest.raises(KeyboardInterrupt):
        detect(run, folder)
    assert detect.printed == expected[:4]
    assert not list((tmp_path / 'found').glob('*.[ch]*'))
    monkeypatch.setattr(detection, '_judge', judge)
    sizes = counted(monkeypatch)
    assert detect(run, folder) == expected
    assert sizes == [4, 2]
    for name in ('verdicts.csv', 'detect.html'):
        assert (tmp_path / 'found' / name).read_bytes() == (tmp_path / 'other' / name).read_bytes()
    strict, mild = (detect(run, folder, fpr=fpr) for fpr in (0.05, 0.5))
    assert sizes == [4, 2] and strict == expected
    for one, other in zip(strict, mild, strict=True):
        for name in ('detector', 'all_logits'):
            assert one['detectors'][name]['score'] == other['detectors'][name]['score']
            levels = [each['detectors'][name]['threshold'] or np.inf for each in (one, other)]
            assert levels[0] >= levels[1]
    Image.fromarray(run.dataset.test.images[20:21][0]).save(folder / '9.png')
    again = detect(run, folder)
    assert sizes == [4, 2, 2] and again[:9] == expected[:9] and again[9] != expected[9]
    assert len(list((tmp_path / 'found' / 'parts').glob('*.npz'))) == 3
    os.utime(folder / '0.png', (1, 1))
    assert detect(run, folder) == again and sizes == [4, 2, 2, 4]


def test_what_could_not_be_read_is_tried_again(judged, detect, monkeypatch):
    """A disk may come back, and leaves no trace in the file."""
    run, folder = judged
    sizes, read = counted(monkeypatch), detection.sources.read_image

    def gone(file, size):
        if file.name == '6.png':
            raise UsageError(f'Cannot read the image {file}: Stale file handle')
        return read(file, size)

    monkeypatch.setattr(detection.sources, 'read_image', gone)
    with pytest.raises(UsageError, match='1 of 10'):
        detect(run, folder)
    assert detect.printed[6] == {'file': str(folder / '6.png'), 'error': 'Stale file handle'}
    monkeypatch.setattr(detection.sources, 'read_image', read)
    assert all('class' in line for line in detect(run, folder))
    assert sizes == [4, 4, 2, 4]


def test_an_image_that_the_classifier_answers_with_nan_is_said_and_all_others_judged(
    judged, detect, monkeypatch
):
    run, folder = judged
    expected, see = detect(run, folder), detection._see

    def with_nan(*args):
        maps = see(*args)
        return dataclasses.replace(maps, unoccluded=maps.unoccluded.at[1].set(np.nan))

    monkeypatch.setattr(detection, '_see', with_nan)
    shutil.rmtree(folder.parent / 'found')
    for _ in range(2):  # The second time it comes from the store.
        with pytest.raises(UsageError, match='of 10 files'):
            detect(run, folder)
        assert [line for line in detect.printed if 'error' not in line] == [
            line for i, line in enumerate(expected) if i % 4 != 1
        ]
        assert detect.printed[1]['error'] == 'The classifier answers it with NaN or infinity.'


def test_what_others_lay_beside_it_stays_and_what_it_left_half_made_goes(judged, detect, tmp_path):
    run, folder = judged
    parts = tmp_path / 'found' / 'parts'
    parts.mkdir(parents=True)
    (parts / 'mesh.npz').write_text('of another')
    (tmp_path / 'found' / '.detect.html.x.occjax-partial').write_text('half')
    others = tmp_path / 'found' / 'of another run' / '.detect.html.y.occjax-partial'
    others.parent.mkdir()
    others.write_text('half')
    detect(run, folder / '0.png')
    assert others.exists()
    assert (parts / 'mesh.npz').exists() and len(list(parts.iterdir())) == 2
    assert not list((tmp_path / 'found').glob('.*'))


def test_page_and_table_name_files_from_the_given_folder_on(judged, detect, tmp_path, monkeypatch):
    run, folder = judged
    monkeypatch.chdir(folder)
    for given, count in ((str(folder), 10), ('.', 10), (str(folder / '1.png'), 1)):
        assert all(os.path.exists(line['file']) for line in detect(run, given))
        for name in ('detect.html', 'verdicts.csv'):
            text = (tmp_path / 'found' / name).read_text()
            assert len(set(re.findall(r'[^/\w](\d[.]png)', text))) == count
            assert str(folder) not in text and os.fspath(tmp_path) not in text


def test_what_has_no_threshold_is_told_with_the_way_out(judged, detect, capsys):
    run, folder = judged
    some = dict(detectors=ASKED, output=str(folder.parent / 'found'))
    detection.detect(run, str(folder), fpr=0.001, **some)
    printed = capsys.readouterr()
    unjudged = (
        "10 by Paper's detector; 10 by All logits under all windows. At --fpr=0.001 it takes 999"
    )
    assert unjudged in printed.err
    said = [json.loads(line)['detectors']['detector'] for line in printed.out.splitlines()]
    assert all(each['verdict'] == 'no threshold' for each in said)
    for line in detect(run, folder, fpr=1.0):
        assert line['detectors']['all_logits']['verdict'] in ('flagged', 'no threshold')


def test_the_table_says_what_is_printed(judged, detect, tmp_path, monkeypatch, capsys):
    run, folder = judged
    (folder / '5.png').write_text('no image')
    with pytest.raises(UsageError):
        detect(run, folder, fpr=0.3)
    lines = detect.printed
    with open(tmp_path / 'found' / 'verdicts.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) == 10
    for row, line in zip(rows, lines, strict=True):
        assert row['file'] == os.path.basename(line['file']) and row['error'] == line.get(
            'error', ''
        )
        for name, said in line.get('detectors', {}).items():
            shown = tables.words(name)
            assert float(row[f'{shown}: score']) == said['score']
            assert row[f'{shown}: verdict'] == said['verdict']
            assert row[f'{shown}: threshold'] == str(said['threshold'] or '')
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    with pytest.raises(UsageError):
        some = dict(detectors=ASKED, output=str(tmp_path / 'found'))
        detection.detect(run, str(folder), fpr=0.3, **some)
    heading, columns, *shown = capsys.readouterr().out.splitlines()
    assert 'score minus threshold' in heading
    assert all(tables.words(name) in columns for name in ASKED)
    assert len(shown) == 10
    for text, line in zip(shown, lines, strict=True):
        assert line['file'] in text and ('not read' in text) == ('error' in line)
        for said in line.get('detectors', {}).values():
            above = said['threshold'] is not None and said['score'] - said['threshold']
            assert said['verdict'] + (f' ({above:+.3g})' if above else '') in text


def test_a_table_holds_no_formula():
    """See OWASP, CSV injection; numbers stay numbers."""
    names = ['=1+1.png', '+a', '-a', '@a', '\ta', '\ra', 'a=1', -0.5, None]
    (row,) = csv.reader(io.StringIO(detection._csv(names).decode(), newline=''))
    assert row == ["'=1+1.png", "'+a", "'-a", "'@a", "'\\ta", "'\\ra", 'a=1', '-0.5', '']


def test_few_images_are_mapped_in_small_batches(judged, detect, monkeypatch, four_devices):
    """One image on four devices is a batch of four, and says what it says among others."""
    run, folder = judged
    expected, sizes = detect(run, folder), []
    map_batch, logits = shard.map_batch, conditions.logits_batch

    def recorded(fn):
        def call(variables, images, *args, **kwargs):
            sizes.append(len(images))
            return fn(variables, images, *args, **kwargs)

        return call

    monkeypatch.setattr(shard, 'map_batch', recorded(map_batch))
    monkeypatch.setattr(conditions, 'logits_batch', recorded(logits))
    (alone,) = detect(run, folder / '4.png')
    assert [alone[name] for name in ('file', 'class')] == [
        expected[4][n] for n in ('file', 'class')
    ]
    assert alone['detectors'].keys() == expected[4]['detectors'].keys()
    for name, told in expected[4]['detectors'].items():
        assert alone['detectors'][name]['verdict'] == told['verdict']
        assert alone['detectors'][name]['score'] == pytest.approx(told['score'], abs=1e-4)
    assert sizes == [jax.device_count()] * 2


def test_memory_does_not_grow_with_the_number_of_images(judged, detect):
    run, folder = judged
    for i in range(10, 160):
        (folder / f'{i}.png').hardlink_to(folder / f'{i % 10}.png')
    detect(run, folder / '0.png')  # Compiles.
    peaks = []
    for count in (32, 160):
        for path in list(folder.iterdir())[: 160 - count]:
            path.rename(folder.parent / path.name)
        tracemalloc.start()
        detect(run, folder, output=str(folder.parent / str(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        for path in folder.parent.glob('*.png'):
            path.rename(folder / path.name)
    assert peaks[1] < 1.5 * peaks[0]


def test_attacked_images_as_files_are_judged_as_in_memory(judged, detect):
    """8 bits round a pixel by half a level, which moves scores by little."""
    run, folder = judged
    variables, split = stages.load_variables(run), run.dataset.test
    images, labels = data.take(split, np.arange(10)), np.asarray(split.labels[:10])
    logits_fn = functools.partial(conditions.logits_batch, variables, network=run.network)
    attacked = np.asarray(attack.fgsm(logits_fn, images, labels, epsilon=0.3))
    for i, image in enumerate(attacked):
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f'{i}.png')
    found = detect(run, folder)
    for name in ('detector', 'all_logits'):
        loaded = guard.load(run.workdir / 'detectors' / f'{name}.guard.npz')
        said = guard.judge(loaded, logits_fn, attacked)
        scores = [line['detectors'][name]['score'] for line in found]
        names = [run.description['class_names'][k] for k in said.predicted]
        is_clear = moves.decided(logits_fn(attacked), margin=0.05, least=4)
        for m in np.flatnonzero(is_clear):
            assert found[m]['class'] == names[m]
        # A score is that of the class: where rounding decides it, of another one.
        np.testing.assert_allclose(np.array(scores)[is_clear], said.score[is_clear], atol=0.1)


def test_detect_says_what_the_stored_maps_say(finished, tmp_path, detect, one_in_two):
    """Test images as files: the class, its probability and the margins are the table's."""
    run, _ = finished
    _, levels, maps, scores = seed_0(run, 'detector')
    clean = np.flatnonzero(~maps.is_adversarial & np.isfinite(levels[maps.predicted]))[:5]
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, m in enumerate(clean):
        pixels = run.dataset.test.images[maps.image_id[m : m + 1]][0]
        Image.fromarray(pixels).save(folder / f'{i}.png')
    (folder / 'note.txt').write_text('no image')
    lines = detect(run, folder)
    names = run.description['class_names']
    for i, (m, line) in enumerate(zip(clean, lines, strict=True)):
        assert line['file'] == str(folder / f'{i}.png')
        assert line['class'] == names[maps.predicted[m]]
        assert line['probability'] == pytest.approx(maps.max_probability[m], abs=1e-3)
        said, level = line['detectors']['detector'], levels[maps.predicted[m]]
        assert said['score'] == pytest.approx(scores[m], abs=0.02)
        assert said['threshold'] == pytest.approx(level, abs=1e-3)
        assert said['verdict'] == ('flagged' if said['score'] > level else 'no alarm')
        assert len(said['windows']) == 3


@pytest.mark.parametrize('kind', ['nothing', 'missing', 'empty', 'broken'])
def test_detect_names_what_it_cannot_read(finished, tmp_path, detect, kind):
    folder = tmp_path / kind
    if kind in ('empty', 'broken'):
        folder.mkdir()
    if kind == 'broken':
        (folder / 'a.png').write_bytes(b'no image')
    with pytest.raises(UsageError, match='--images' if kind != 'broken' else 'a.png'):
        if kind == 'nothing':
            detection.detect(finished[0], None)
        detect(finished[0], folder)


def test_where_nothing_can_be_written_verdicts_are_printed(judged, detect, monkeypatch, capsys):
    run, folder = judged
    expected = detect(run, folder)
    before = {path: path.stat().st_mtime_ns for path in run.workdir.rglob('*')}
    access = os.access
    denied = lambda path, mode: mode != os.W_OK and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, 'access', denied)
    detection.detect(run, str(folder), detectors=ASKED)
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == expected
    assert '--output=<folder>' in printed.err
    assert before == {path: path.stat().st_mtime_ns for path in run.workdir.rglob('*')}
    blocked = folder / '0.png' / 'below a file'
    with pytest.raises(UsageError, match='Cannot use --output='):
        detect(run, folder, output=str(blocked))


def test_an_unfinished_run_is_said_to_be_so(judged, detect, tmp_path):
    run, folder = judged
    unfinished = dataclasses.replace(run, workdir=tmp_path / 'unfinished')
    unfinished.workdir.mkdir()
    for name in ('config.json', 'dataset.json'):
        (unfinished.workdir / name).write_bytes((run.workdir / name).read_bytes())
    with pytest.raises(UsageError, match='run --mode=heatmaps first'):
        detect(unfinished, folder)


@pytest.mark.parametrize('reserved', [18, 19])
def test_deployed_thresholds_keep_the_promise_of_5_percent(finished, reserved):
    """The largest of 19 clean maps does; classes of 18 share the 9th largest of all 180."""
    run, _ = finished
    maps = toy_maps([(60, 40)] * 10, grid=run.grid)
    part = np.concatenate([np.arange(60), 20 + np.arange(40)] * 10)
    masks = [np.broadcast_to(mask, (3, len(part))) for mask in (part >= 30, part < reserved)]
    division = judging.Division(maps, *masks)
    banks = store.load_banks(run, division, 'held_out', 'detector')
    _, known = judging.first(banks, division, METHODS['detector'])
    levels = known.thresholds(0.05)
    assert len(levels) == 10
    scores = judging.score_banks(banks, METHODS['detector'], maps)[0]
    clean = (part < reserved) & ~maps.is_adversarial
    expected = [scores[clean & (maps.predicted == k)].max() for k in range(10)]
    if reserved == 18:
        expected = np.sort(scores[clean])[-9]
    np.testing.assert_allclose(levels, expected)


def test_a_detector_without_a_threshold_never_calls(finished):
    """Where clean maps of all classes together are too few to promise anything."""
    run, _ = finished
    maps = toy_maps([(10, 10)] * 10, grid=run.grid)
    part = np.tile(np.arange(20), 10)
    masks = [np.broadcast_to(mask, (3, 200)) for mask in (part >= 5, part == 0)]
    division = judging.Division(maps, *masks)
    banks = store.load_banks(run, division, 'held_out', 'detector')
    _, known = judging.first(banks, division, METHODS['detector'])
    assert (known.thresholds(0.05) == np.inf).all()


@pytest.mark.slow
def test_what_a_sweep_fits_on_its_mixture_is_asked_too(judged, detect, tmp_path):
    """It sees views, and needs no heat map."""
    run, folder = judged
    shutil.copytree(run.workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('detect'))
    config = dataclasses.replace(
        run.config,
        sweep=Sweep(
            epsilons=(0.3,),
            attacks=('square',),
            mixture=('fgsm', 'square'),
            steps=3,
            views=('reconstruction', 'shift'),
            methods=('views_alone', 'all_views'),
            windows=False,
        ),
    )
    swept = run.changed(workdir=tmp_path / 'run', config=config)
    assert 'views_alone.guard.npz: --mode=detect asks it' in sweep.sweep(swept)
    printed = detect(run.changed(workdir=swept.workdir), folder, detectors=None)
    logits_fn = run.network.classifier(stages.load_variables(swept))
    images = data.take(run.dataset.test, np.arange(10))
    for name in ('views_alone', 'all_views'):
        known = guard.load(swept.workdir / 'sweep' / 'detectors' / f'{name}.guard.npz')
        said = guard.judge(known, logits_fn, images)
        found = [entry['detectors'][name] for entry in printed]
        np.testing.assert_allclose([f['score'] for f in found], said.score, atol=2e-3)
        assert [f['verdict'] == 'flagged' for f in found] == said.is_adversarial.tolist()
        assert {len(f['windows']) for f in found} == {3 * (name == 'all_views')}
    assert set(printed[0]['detectors']) == {*stages.deployed(run), 'views_alone', 'all_views'}
    shares = guarding.shares(known)
    assert shares['attacked'].n and shares['noisy'].n == 0 == shares['misclassified'].n


def judged_by_hand(run, name):
    """Scores, predicted classes and kinds of test images that seed 0 neither fits nor reserves."""
    division, controls = store.divide(run, 'held_out'), store.load_controls(run)
    judged, used = division.is_judged[0], set(division.maps.image_id[~division.is_judged[0]])
    if name in METHODS:
        banks = store.load_banks(run, division, 'held_out', name)
        score_fn = lambda maps: judging.score_banks(banks, METHODS[name], maps)[0]  # noqa: E731
    else:
        score_fn = metrics.BASELINES[name].score_fn
    maps = division.maps
    rows = [
        (s, k, 'attacked' if adversarial else 'clean')
        for s, k, adversarial, here in zip(
            score_fn(maps), maps.predicted, maps.is_adversarial, judged, strict=True
        )
        if here
    ]
    for kind, word in (('noise', 'noisy'), ('misclassified', 'misclassified')):
        maps = controls[kind]
        for s, k, i in zip(score_fn(maps), maps.predicted, maps.image_id, strict=True):
            rows += [(s, k, word)] * (i not in used)
    return rows


@pytest.mark.parametrize('name', ['detector', 'magnet_error'])
def test_what_a_detector_finds_is_counted_on_images_it_never_saw(judged, detect, capsys, name):
    """At the very threshold that is used, whatever --fpr; and said on page and terminal."""
    run, folder = judged
    for fpr in (0.1, 0.4):
        detection.detect(run, str(folder / '0.png'), fpr=fpr, detectors=[name], output=str(folder))
        err, page = capsys.readouterr().err, (folder / 'detect.html').read_text()
        found = guard.at_fpr(stages.load_guard(run, name), fpr)
        rows = judged_by_hand(run, name)
        for kind, share in guarding.shares(found).items():
            flags = [s > found.thresholds[k] for s, k, word in rows if word == kind]
            assert share == (sum(flags), len(flags))
        sentence = verdicts.finds(name, found)
        assert sentence in err and html.escape(sentence) in page
        shares = guarding.shares(found)
        for kind in ('attacked', 'clean', 'misclassified'):
            rate = f'{100 * shares[kind].rate:.0f} % ('
            assert rate in sentence and f'n = {shares[kind].n})' in sentence
        assert 'FGSM attacks of ε = 0.3' in sentence


@pytest.mark.parametrize(('found', 'warns'), [(18, False), (1, True)])
def test_a_detector_that_finds_no_more_than_its_false_alarms_is_warned_of(finished, found, warns):
    one = stages.load_guard(finished[0], 'detector')
    scores = np.concatenate([np.arange(100) < 4, np.arange(20) < found])
    kinds = np.repeat([guarding.KINDS.index('clean'), guarding.KINDS.index('attacked')], [100, 20])
    held_out = guarding.HeldOut(scores, np.zeros(120, int), kinds)
    one = dataclasses.replace(one, held_out=held_out, thresholds=np.full(10, 0.5))
    text = verdicts.finds('detector', one)
    assert ('Warning' in text) == warns
    assert '4 % (2 to 10 %, n = 100) of clean ones' in text and 'On 100 test images' in text


def test_the_best_is_chosen_on_images_that_set_thresholds(judged, detect, capsys, monkeypatch):
    """And asked beside the paper's; AUROC by pairs. What was judged has no say."""
    run, folder = judged
    division, noise = store.divide(run, 'held_out'), store.load_controls(run)['noise']
    reserved = division.is_reserved[0]
    ids = division.maps.image_id[reserved]
    maps = division.maps.select(reserved), noise.select(np.isin(noise.image_id, ids))
    maps = HeatmapSet.concatenate(maps)
    found = stages.choice(run)
    assert {*found} == {*run.config.detector.methods, *metrics.BASELINES}
    scores, attacked, total, weight = -maps.max_probability, maps.is_adversarial, 0, 0
    for k in range(10):
        bad, good = (scores[(maps.predicted == k) & (attacked == kind)] for kind in (True, False))
        if len(bad) and len(good):
            wins = (bad[:, None] > good) + (bad[:, None] == good) / 2
            total, weight = total + wins.sum() / len(good), weight + len(bad)
    assert found['max_probability'] == pytest.approx(total / weight)
    best = max(found, key=found.get)
    printed = detect(run, folder / '0.png', detectors=None)
    assert [*printed[0]['detectors']] == [*dict.fromkeys(['detector', best])]
    with pytest.raises(UsageError, match='--detectors=nobody: choose from detector, '):
        detect(run, folder, detectors=['nobody'])
    detection.detect(run, str(folder / '0.png'), output=str(folder))
    assert f'{tables.words(best)}. It has the highest AUROC' in capsys.readouterr().err


@pytest.mark.parametrize('name', [*metrics.BASELINES])
def test_every_score_can_be_asked(judged, detect, name):
    """Each scores test images as the stored maps say, at a threshold of clean ones."""
    run, folder = judged
    maps = store.divide(run, 'held_out').maps
    maps = maps.select(~maps.is_adversarial & (maps.image_id < 10))
    lines = detect(run, folder, detectors=[name], fpr=0.2)
    found = [lines[i]['detectors'][name] for i in maps.image_id]
    expected = metrics.BASELINES[name].score_fn(maps)
    np.testing.assert_allclose([f['score'] for f in found], expected, atol=2e-3)
    assert {len(f['windows']) for f in found} == {3 * name.startswith('map')}
    clean = store.divide(run, 'held_out')
    known = clean.known(0, metrics.BASELINES[name].score_fn(clean.maps))
    levels = metrics.calibration(num_classes=10, **known).thresholds(0.2)
    for f, k in zip(found, maps.predicted, strict=True):
        level = np.inf if f['threshold'] is None else f['threshold']
        assert level == pytest.approx(levels[k], rel=1e-3)
        assert f['verdict'] in ('flagged', 'no alarm' if np.isfinite(levels[k]) else 'no threshold')
