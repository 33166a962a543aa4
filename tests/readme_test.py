"""README's code runs as it is printed."""

import re

import numpy as np

from tests.conftest import ROOT


def test_the_code_of_readme_runs():
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) == 7
    found = {}
    for block in blocks:
        exec(block, found)
    assert found['clean_maps'].shape == found['attacked_maps'].shape == (16, 4, 4)
    assert found['sensitivity'].shape == (16, 32, 32, 3)
    assert np.isfinite(found['scores']).all() and found['scores'].shape == (16,)
    assert found['maps'].shape == (2, 4, 4)
    assert {path.name for path in found['folder'].iterdir()} == {'overlay.svg', 'walk.webp'}
    assert found['bars'].shape == (16, 2, 6) and found['lost'].score.shape == (16,)
    assert found['verdict'].is_adversarial.shape == (16,)
    # A guard of a network that is none of ours, from nothing.
    script = ''.join(block for i, block in enumerate(blocks) if i < 2 or 'guard.make' in block)
    assert script.count('guard.') == 2 and len(script.splitlines()) < 30
    assert found['fn'](found['variables'], found['images']).shape == (16, 10)
