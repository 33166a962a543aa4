"""README's code runs as it is printed."""

import re

import jax
import numpy as np

from tests import moves
from tests.conftest import ROOT


def test_the_code_of_readme_runs():
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) > 5
    found = {}
    for block in blocks[:-1]:
        exec(block, found)
    images, attacked, logits_fn = (found[name] for name in ('images', 'attacked', 'logits_fn'))
    assert 0 < np.abs(attacked - images).max() <= 8 / 255 + 1e-6
    assert found['clean_maps'].shape == found['attacked_maps'].shape == (16, 4, 4)
    for image, map_ in (
        (images[3], found['clean_maps'][3]),
        (attacked[3], found['attacked_maps'][3]),
    ):
        covered = np.array(image[None].repeat(16, axis=0))
        for p, (i, j) in enumerate(np.ndindex(4, 4)):
            covered[p, 5 * i : 5 * i + 15, 5 * j : 5 * j + 15] = 0.5
        chances = jax.nn.softmax(logits_fn(covered))[:, logits_fn(image[None])[0].argmax()]
        np.testing.assert_allclose(map_, chances.reshape(4, 4), atol=1e-5)
    assert found['sensitivity'].shape == (16, 32, 32, 3) and np.abs(found['sensitivity']).max() > 0
    assert np.isfinite(found['scores']).all() and found['scores'].shape == (16,)
    assert found['maps'].shape == (2, 4, 4)
    plain, faster = (found[name](images[:2]) for name in ('vgg_fn', 'faster_fn'))
    np.testing.assert_allclose(faster, plain, rtol=0, atol=1e-4 * np.abs(plain).max())
    assert {path.name for path in found['folder'].iterdir()} == {'overlay.svg', 'walk.webp'}
    assert found['bars'].shape == (16, 2, 6) and found['lost'].score.shape == (16,)
    assert found['verdict'].is_adversarial.shape == (16,)
    named = logits_fn(attacked)
    is_clear = moves.decided(named, margin=1e-4, least=12)
    assert (found['verdict'].predicted == named.argmax(-1))[is_clear].all()
    # A guard of a network that is none of ours, from nothing.
    script = ''.join(block for i, block in enumerate(blocks) if i < 2 or 'guard.make' in block)
    assert script.count('guard.') == 3 and len(script.splitlines()) < 32
    exec(blocks[-1], found)  # Of another model.
    assert found['fn'](found['variables'], found['images']).shape == (16, 10)
