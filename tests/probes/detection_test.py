"""Laws of verdicts on images of one's own."""

import functools
import re

import jax
import numpy as np
import pytest
from PIL import Image

from occjax import attack, data
from occjax.experiment import judging, shard, stages, store
from occjax.methods import METHODS
from occjax.probes import detection
from occjax.types import UsageError
from tests.detector_test import toy_maps
from tests.verdict_test import seed_0

pytestmark = pytest.mark.usefixtures('small_plan')


@pytest.fixture
def judged(finished, small_plan, tmp_path):
    """A run that judges a folder of ten test images, and that folder."""
    run, _ = finished
    for i, pixels in enumerate(run.dataset.test.images[:10]):
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    return run, tmp_path


def test_bad_files_have_lines_of_their_own(judged, capsys):
    run, folder = judged
    expected = detection.detect(run, str(folder)).splitlines()
    (folder / '3.png').write_bytes((folder / '3.png').read_bytes()[:-40])
    (folder / '10.png').write_text('<html>')
    with pytest.raises(UsageError, match='^2 of 11 files could not be read.$'):
        detection.detect(run, str(folder))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    for i in (3, 10):
        assert lines[i].startswith(f'{folder / f"{i}.png"}  Cannot read the image {folder}')
    assert lines[:3] + lines[4:10] == expected[:3] + expected[4:]


def test_hidden_folders_and_folders_called_like_images_are_left_out(judged, capsys):
    run, folder = judged
    expected = detection.detect(run, str(folder))
    (folder / 'a.png').mkdir()
    (folder / 'b.png').symlink_to('nowhere')
    (folder / '.thumbnails').mkdir()
    Image.new('RGB', (8, 8)).save(folder / '.thumbnails' / '0.png')
    assert detection.detect(run, str(folder)) == expected
    assert '2 that are no image files' in capsys.readouterr().err


def test_few_images_are_mapped_in_small_batches(judged, monkeypatch):
    """One image on four devices is a batch of four, and says what it says among others."""
    run, folder = judged
    expected, sizes = detection.detect(run, str(folder)).splitlines(), []
    map_batch, logits = shard.map_batch, detection._logits

    def recorded(fn):
        def call(variables, images, *args, **kwargs):
            sizes.append(len(images))
            return fn(variables, images, *args, **kwargs)

        return call

    monkeypatch.setattr(shard, 'map_batch', recorded(map_batch))
    monkeypatch.setattr(detection, '_logits', recorded(logits))
    assert detection.detect(run, str(folder / '4.png')) == expected[4]
    assert sizes == [jax.device_count()] * 2


def test_attacked_images_as_files_are_judged_as_in_memory(judged):
    """8 bits round a pixel by half a level, which moves scores by little."""
    run, folder = judged
    variables, split = stages.load_variables(run), run.dataset.test
    images, labels = data.take(split, np.arange(10)), np.asarray(split.labels[:10])
    logits_fn = functools.partial(detection._logits, variables, network=run.network)
    attacked = np.asarray(attack.fgsm(logits_fn, images, labels, epsilon=0.3))
    for i, image in enumerate(attacked):
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f'{i}.png')
    expected = detection._judge(run, attacked)
    for line, said in zip(detection.detect(run, str(folder)).splitlines(), expected, strict=True):
        found, wanted = line.split('  ')[1:], said.split('  ')
        assert found[0].split(' (')[0] == wanted[0].split(' (')[0]
        for one, other in zip(found, wanted, strict=True):
            if '(' in other:
                number = [float(text.split('(')[1].rstrip(')')) for text in (one, other)]
                assert number[0] == pytest.approx(number[1], abs=0.1)


def test_detect_says_what_the_stored_maps_say(finished, tmp_path, one_in_two):
    """Test images as files: the class, its probability and the margins are the table's."""
    run, _ = finished
    _, levels, maps, scores = seed_0(run, 'detector')
    clean = np.flatnonzero(~maps.is_adversarial & np.isfinite(levels[maps.predicted]))[:5]
    for i, m in enumerate(clean):
        pixels = run.dataset.test.images[maps.image_id[m : m + 1]][0]
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    (tmp_path / 'note.txt').write_text('no image')
    lines = detection.detect(run, str(tmp_path)).splitlines()
    assert len(lines) == 5
    names = run.description['class_names']
    for i, (m, line) in enumerate(zip(clean, lines, strict=True)):
        assert line.startswith(str(tmp_path / f'{i}.png'))
        assert f'{names[maps.predicted[m]]} ({maps.max_probability[m]:.3f})' in line
        margin = scores[m] - levels[maps.predicted[m]]
        word, number = re.search(r' detector: (\w+) \((.*?)\)', line).groups()
        assert float(number) == pytest.approx(margin, abs=0.02)
        assert word == ('adversarial' if margin > 0 else 'clean')
    alone = detection.detect(run, str(tmp_path / '3.png'))
    assert alone == lines[3]


@pytest.mark.parametrize('kind', ['nothing', 'missing', 'empty', 'broken'])
def test_detect_names_what_it_cannot_read(finished, tmp_path, kind):
    folder = tmp_path / kind
    if kind in ('empty', 'broken'):
        folder.mkdir()
    if kind == 'broken':
        (folder / 'a.png').write_bytes(b'no image')
    images = None if kind == 'nothing' else str(folder)
    with pytest.raises(UsageError, match='--images' if kind != 'broken' else 'a.png'):
        detection.detect(finished[0], images)


@pytest.mark.parametrize('reserved', [18, 19])
def test_deployed_thresholds_keep_the_promise_of_5_percent(finished, reserved):
    """The largest of 19 clean maps does; classes of 18 share the 9th largest of all 180."""
    run, _ = finished
    maps = toy_maps([(60, 40)] * 10, grid=run.grid)
    part = np.concatenate([np.arange(60), 20 + np.arange(40)] * 10)
    masks = [np.broadcast_to(mask, (3, len(part))) for mask in (part >= 30, part < reserved)]
    division = judging.Division(maps, *masks)
    _, levels = detection.deployed(run, division, 'detector')
    assert len(levels) == 10
    banks = store.load_banks(run, division, 'held_out', 'detector')
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
    _, levels = detection.deployed(run, division, 'detector')
    assert (levels == np.inf).all()
