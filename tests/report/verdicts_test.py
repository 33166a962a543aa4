"""The page of verdicts, in a real browser where there is one."""

import json
import re

import numpy as np
import pytest

from occjax.report import verdicts
from tests.report.browser_test import BROWSER, opened

SIZE, ORIGINS = 8, [(row, column) for row in (0, 4) for column in (0, 4)]


def entries(count):
    """Yields images of three classes, whose number is their score; each tenth cannot be read."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name = f'some where/{i} ünï<script>.png'
        if i % 10 == 7:
            yield {'file': name, 'error': 'it is </script> no image'}
            continue
        called = 'no threshold' if i % 3 == 2 else 'flagged' if i % 2 else 'no alarm'
        said = {
            'score': float(i),
            'threshold': None if i % 3 == 2 else 5.0,
            'verdict': called,
            'windows': [
                {'row': 1, 'column': 0, 'effect': -0.5},
                {'row': 0, 'column': 1, 'effect': 2},
            ],
        }
        other = said | {'score': -float(i), 'verdict': 'no alarm'}
        yield {
            'file': name,
            'class': f'Class {i % 3}',
            'probability': 0.5 + i / 1000,
            'detectors': {'one': said, 'other': other},
            'map': rng.uniform(size=(2, 2)),
            'thumbnail': verdicts.thumbnail(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)),
        }


def page(count, script=''):
    """Returns the page of some entries, at whose end a script acts and writes down what it sees."""
    known = dict(title='Verdicts & more', detectors=['one', 'other'], fpr=0.05, origins=ORIGINS)
    known['finds'] = ['It finds <some> & flags others.']
    text = verdicts.head(image_size=SIZE, window_size=4, **known)
    text += ''.join(map(verdicts.row, entries(count))) + verdicts.tail()
    return text.replace('</main>', f'<pre id="seen"></pre><script>{script}</script></main>')


_HELPERS = """
const files = () => [...document.querySelectorAll('#rows tr')].map(row => parseInt(
  row.querySelector('td:nth-last-child(2)').textContent.split('/')[1]));
const seen = [], look = () => seen.push(files());
const set = (id, value) => { at(id).value = value;
  at(id).dispatchEvent(new Event(id === 'search' ? 'input' : 'change', {bubbles: true})); };
const press = key => document.body.dispatchEvent(
  new KeyboardEvent('keydown', {key, bubbles: true}));
const sort = name => [...document.querySelectorAll('#heads button')]
  .find(button => button.textContent === name).click();
"""


@pytest.mark.skipif(BROWSER is None, reason='needs chromium')
@pytest.mark.parametrize('width', [1300, 400])
def test_it_sorts_and_filters_without_a_message_or_a_request(tmp_path, width):
    acts = """
        look();
        sort('Score'); look(); sort('Score'); look();
        set('verdict', 'flagged'); look();
        set('class', 'Class 0'); look();
        set('verdict', ''); set('class', ''); set('low', '20'); set('high', '24'); look();
        set('low', ''); set('high', ''); set('search', '31 Ü'); look();
        set('search', 'some where'); seen.push(files().length);
        set('search', ''); press('ArrowRight'); look();
        set('detector', 'Other'); set('verdict', 'not read'); look();
        set('detector', 'Other'); set('verdict', ''); sort('Score'); look();
        seen.push(at('counts').textContent, at('previous').disabled, at('next').disabled);
        set('low', '30'); seen.push(at('previous').disabled, at('next').disabled);
        sort('Score minus threshold'); set('low', '');
        press('/'); seen.push(document.activeElement.id);
        seen.push(document.querySelectorAll('script').length);
        at('seen').textContent = JSON.stringify(seen);
    """
    (tmp_path / 'detect.html').write_text(page(60, _HELPERS + acts))
    found, messages = opened(tmp_path, 'detect.html', width)
    assert not re.search('CONSOLE', messages), messages
    text = re.search(r'<pre id="seen">(.*?)</pre>', found).group(1)
    all_of, falling, rising, called, of_class, between, named, none, turned, bad, other, *rest = (
        json.loads(text)
    )
    read = [i for i in range(60) if i % 10 != 7]
    unread = [i for i in range(60) if i % 10 == 7]
    assert all_of == list(range(50))
    assert falling == read[::-1][:50]
    assert rising == read[:50]
    assert called == [i for i in read if i % 2 and i % 3 != 2]
    assert of_class == [i for i in called if i % 3 == 0]
    assert between == [20, 21, 22, 23, 24]
    assert named == [31] and none == 50
    assert turned == read[50:] + unread
    assert bad == unread
    assert other == (read + unread)[:50]
    assert rest[0] == 'Other: 54 no alarm, 6 not read', rest[0]
    assert rest[1:5] == [True, False, True, True]
    assert rest[5:] == ['search', 4]  # No file name has become a script.


def test_nothing_ends_the_page_early():
    text = page(60)
    assert text.count('</script>') == 4 and '<script>.png' not in text
    inside = re.search(r'id="entries">(.*?)</script>', text, re.DOTALL).group(1)
    assert len(json.loads(inside)) == 61


def test_a_thumbnail_is_small_and_what_was_shown():
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(Image.open(io.BytesIO(verdicts.thumbnail(small))), small)
    smooth = np.linspace(0, 255, 224).astype(np.uint8)[:, None, None].repeat(224, 1).repeat(3, 2)
    shown = np.asarray(Image.open(io.BytesIO(verdicts.thumbnail(smooth))), int)
    assert shown.shape == (128, 128, 3)
    assert np.abs(shown[:, 64, 0] - np.linspace(0, 255, 128)).max() < 6
