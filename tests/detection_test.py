import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from occjax import attack, data, detection, shard, stages
from occjax.types import UsageError


@pytest.fixture
def judged(finished, small_plan, tmp_path):
    """A run that judges a folder of ten test images, and that folder."""
    run, _ = finished
    for i, pixels in enumerate(run.dataset.test.images[:10]):
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    return dataclasses.replace(run, images=str(tmp_path)), tmp_path


def test_bad_files_have_lines_of_their_own(judged, capsys):
    run, folder = judged
    expected = detection.detect(run).splitlines()
    (folder / '3.png').write_bytes((folder / '3.png').read_bytes()[:-40])
    (folder / '10.png').write_text('<html>')
    with pytest.raises(UsageError, match='^2 of 11 files could not be read.$'):
        detection.detect(run)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    for i in (3, 10):
        assert lines[i].startswith(f'{folder / f"{i}.png"}  Cannot read the image {folder}')
    assert lines[:3] + lines[4:10] == expected[:3] + expected[4:]


def test_hidden_folders_and_folders_called_like_images_are_left_out(judged, capsys):
    run, folder = judged
    expected = detection.detect(run)
    (folder / 'a.png').mkdir()
    (folder / 'b.png').symlink_to('nowhere')
    (folder / '.thumbnails').mkdir()
    Image.new('RGB', (8, 8)).save(folder / '.thumbnails' / '0.png')
    assert detection.detect(run) == expected
    assert '2 that are no image files' in capsys.readouterr().err


def test_few_images_are_mapped_in_small_batches(judged, monkeypatch):
    """One image on four devices is a batch of four, and says what it says among others."""
    run, folder = judged
    expected, sizes = detection.detect(run).splitlines(), []
    map_batch, logits = shard.map_batch, detection._logits

    def recorded(fn):
        def call(variables, images, *args, **kwargs):
            sizes.append(len(images))
            return fn(variables, images, *args, **kwargs)

        return call

    monkeypatch.setattr(shard, 'map_batch', recorded(map_batch))
    monkeypatch.setattr(detection, '_logits', recorded(logits))
    one = dataclasses.replace(run, images=str(folder / '4.png'))
    assert detection.detect(one) == expected[4]
    assert sizes == [jax.device_count()] * 2


def test_attacked_images_as_files_are_judged_as_in_memory(judged):
    """8 bits round a pixel by half a level, which moves scores by little."""
    run, folder = judged
    variables, split = stages.load_variables(run), run.dataset.test
    images, labels = data.take(split, np.arange(10)), np.asarray(split.labels[:10])
    logits_fn = functools.partial(detection._logits, variables, plan=run.plan)
    attacked = np.asarray(attack.fgsm(logits_fn, images, labels, epsilon=0.3))
    for i, image in enumerate(attacked):
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f'{i}.png')
    expected = detection._judge(run, attacked)
    for line, said in zip(detection.detect(run).splitlines(), expected, strict=True):
        found, wanted = line.split('  ')[1:], said.split('  ')
        assert found[0].split(' (')[0] == wanted[0].split(' (')[0]
        for one, other in zip(found, wanted, strict=True):
            if '(' in other:
                number = [float(text.split('(')[1].rstrip(')')) for text in (one, other)]
                assert number[0] == pytest.approx(number[1], abs=0.1)
