"""Laws of the guard, on a network that is none of ours."""

import dataclasses
import functools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from occjax import attack, comparators, guard

CLASSES = ('left', 'right', 'neither')
WINDOWS = dict(size=4, stride=4)


def logits_fn(images):
    """Tells on which half an image is brighter; steep, so that a few levels of noise fool it."""
    grain = np.random.default_rng(0).normal(size=(12, 12, 3, 2)).astype(np.float32)
    halves = images[:, :, :6].mean((1, 2, 3)), images[:, :, 6:].mean((1, 2, 3))
    lead = (halves[0] - halves[1])[:, None] * jnp.array([1.0, -1.0])
    texture = jnp.einsum('bhwc,hwck->bk', images - 0.5, grain) / 40
    return jnp.pad(20 * lead + texture, ((0, 0), (0, 1)))


def smooth(count, seed):
    """Returns images that are brighter on one side, and hardly textured."""
    rng = np.random.default_rng(seed)
    side = rng.choice([-1, 1], size=count)
    slope = np.linspace(-1, 1, 12)[None, None, :, None] * side[:, None, None, None]
    images = 0.5 - 0.03 * slope + rng.normal(size=(count, 12, 12, 3)) * 0.01
    return images.clip(0, 1).astype(np.float32), (side < 0).astype(np.int32)


IMAGES, LABELS = smooth(360, 0)


@functools.cache
def made(method='views_alone', **more):
    views = ('blur', 'flip', 'shift') if 'views' in method else None
    sees = dict(method=method, views=views) | (WINDOWS if method != 'views_alone' else {})
    more = sees | dict(class_names=CLASSES) | more
    return guard.make(jax.random.key(0), logits_fn, IMAGES, LABELS, steps=200, **more)


@pytest.mark.parametrize('method', ['views_alone', 'detector', 'all_logits', 'all_views'])
def test_attacked_images_are_told_from_clean_ones(method):
    judge = jax.jit(functools.partial(guard.judge, logits_fn=logits_fn))
    images, labels = smooth(200, 1)
    clean = judge(made(method), images=images)
    attacked = attack.fgsm(logits_fn, images, labels, epsilon=8 / 255)
    called = judge(made(method), images=attacked)
    fooled = np.asarray(called.predicted) != labels
    assert fooled.mean() > 0.5
    auroc = stats.mannwhitneyu(called.score[fooled], clean.score).statistic
    assert auroc / fooled.sum() / len(images) > 0.9
    np.testing.assert_array_equal(clean.predicted, labels)
    np.testing.assert_array_equal(clean.is_adversarial, clean.score > clean.threshold)
    assert np.asarray(clean.probability).max() <= 1


def test_as_many_fresh_clean_images_are_called_as_was_promised():
    images, _ = smooth(1000, 2)
    found = jax.jit(functools.partial(guard.judge, logits_fn=logits_fn))(made(), images=images)
    # The threshold itself varies: some 120 clean images set it.
    assert found.is_adversarial.sum() < stats.betabinom(1000, 6, 114).ppf(0.999)


def test_no_image_sees_its_batch():
    together = guard.judge(made(), logits_fn, IMAGES[:5])
    alone = guard.judge(made(), logits_fn, IMAGES[2:3])
    np.testing.assert_allclose(together.score[2], alone.score[0], rtol=1e-4, atol=1e-5)


def test_a_guard_survives_its_file(tmp_path):
    path = tmp_path / 'a guard.npz'
    guard.save(made(), path)
    loaded = guard.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(made())
    jax.tree.map(np.testing.assert_array_equal, loaded, made())
    assert loaded.class_names == CLASSES
    assert [file.name for file in tmp_path.iterdir()] == ['a guard.npz']
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(ValueError, match='holds no guard'):
        guard.load(path)
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('meta.npy', b'no array')
    with pytest.raises(ValueError, match='holds no guard'):
        guard.load(path)
    with pytest.raises(FileNotFoundError):
        guard.load(tmp_path / 'absent')


def test_a_milder_guard_is_the_same_with_lower_thresholds():
    """Those of its own rate are the ones it was made with; a rate of 0 never calls, of 1 always."""
    again = guard.at_fpr(made(), 0.05)
    jax.tree.map(np.testing.assert_array_equal, again, made())
    mild = guard.at_fpr(made(), 0.2)
    assert np.all(mild.thresholds <= made().thresholds) and np.any(
        mild.thresholds < again.thresholds
    )
    one, other = (guard.judge(each, logits_fn, IMAGES[:40]) for each in (made(), mild))
    np.testing.assert_array_equal(one.score, other.score)
    for fpr in (0.0, 1.0):
        said = guard.judge(guard.at_fpr(made(), fpr), logits_fn, IMAGES[:40])
        assert np.all(np.asarray(said.is_adversarial) == (fpr == 1))


def test_a_class_whose_network_saw_no_attack_never_calls():
    """All images are of one class, and attacks lead to the other; the third is never predicted."""
    key, ones = jax.random.key(0), LABELS == 0
    some = dict(class_names=CLASSES, steps=5, attacks=(guard.fgsm(8 / 255),), noise=(), **WINDOWS)
    alone = guard.make(key, logits_fn, IMAGES[ones], LABELS[ones], method='detector', **some)
    np.testing.assert_array_equal(alone.thresholds, [np.inf] * 3)
    both = guard.make(key, logits_fn, IMAGES, LABELS, method='detector', **some)
    np.testing.assert_array_equal(np.isfinite(both.thresholds), [True, True, False])


def test_windows_that_are_not_square_and_named_fills_survive_the_file(tmp_path):
    """And are judged through: a square of grey is another guard."""
    some = dict(
        class_names=CLASSES,
        steps=5,
        method='detector',
        size=[np.int64(4), 6],
        stride=np.array([4, 3]),
    )
    key = jax.random.key(0)
    one = guard.make(key, logits_fn, IMAGES, LABELS, fill='blur', **some)
    guard.save(one, tmp_path / 'guard.npz')
    loaded = guard.load(tmp_path / 'guard.npz')
    judge = jax.jit(functools.partial(guard.judge, logits_fn=logits_fn))
    scores = [judge(each, images=IMAGES[:9]).score for each in (one, loaded)]
    np.testing.assert_array_equal(*scores)
    assert dict(loaded.windows) == dict(size=(4, 6), stride=(4, 3), fill='blur')
    grey = dict(one.windows) | dict(fill=0.5)
    other = judge(dataclasses.replace(one, windows=tuple(grey.items())), images=IMAGES[:9])
    assert np.abs(other.score - scores[0]).max() > 1e-3


def test_the_last_batch_counts_each_image_once_and_progress_is_told():
    told = []
    made(batch_size=250, attacks=(guard.fgsm(8 / 255),), progress=lambda *n: told.append(n))
    assert told == [(250, 360), (360, 360)]


def test_what_cannot_be_guarded_is_said():
    few = dict(class_names=CLASSES, views=('blur',), steps=1)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match='names, 2, got logits of 3'):
        guard.make(key, logits_fn, IMAGES[:64], **few | {'class_names': ('a', 'b')})
    with pytest.raises(ValueError, match='0 successful attacks'):
        guard.make(key, logits_fn, IMAGES[:64], attacks=(guard.fgsm(0.0),), **few)
    with pytest.raises(ValueError, match='reconstruction needs a fitted autoencoder'):
        guard.make(key, logits_fn, IMAGES[:64], **few | {'views': ('reconstruction',)})
    with pytest.raises(ValueError, match="'input_mfs'"):
        guard.make(key, logits_fn, IMAGES[:64], method='input_mfs', **few)
    with pytest.raises(ValueError, match=r"\['learning_rate', 'step'\] is no argument"):
        guard.make(key, logits_fn, IMAGES[:64], step=3, learning_rate=0.1, **few)
    with pytest.raises(ValueError, match='views_alone sees no windows: leave out size, stride'):
        guard.make(key, logits_fn, IMAGES[:64], **few, **WINDOWS)
    with pytest.raises(ValueError, match='detector sees no views of an image: leave them out'):
        guard.make(key, logits_fn, IMAGES[:64], method='detector', **few, **WINDOWS)
    with pytest.raises(ValueError, match='fpr is 5'):
        guard.make(key, None, IMAGES[:64], fpr=5, **few)  # Before anything is computed.
    with pytest.raises(ValueError, match='names, 3, got logits of 2'):
        guard.judge(made(), lambda x: logits_fn(x)[:, :2], IMAGES[:2])


@pytest.mark.parametrize(('method', 'count'), [('detector', 0), ('views_alone', 12)])
def test_views_are_all_or_none_by_what_a_method_sees(method, count):
    windows = WINDOWS if method == 'detector' else {}
    some = dict(class_names=CLASSES, steps=1, attacks=(guard.fgsm(8 / 255),), noise=())
    found = guard.make(jax.random.key(0), logits_fn, IMAGES, method=method, **some, **windows)
    assert len(found.views) == count


def test_bytes_are_pixels():
    as_bytes = np.round(255 * IMAGES[:90]).astype(np.uint8)
    known = dict(class_names=CLASSES, views=('blur',), steps=20)
    one = guard.make(jax.random.key(0), logits_fn, as_bytes, **known)
    other = guard.make(jax.random.key(0), logits_fn, as_bytes.astype(np.float32) / 255, **known)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_guard_that_sees_reconstructions_keeps_what_reconstructs(tmp_path):
    autoencoder = comparators.init_autoencoder(jax.random.key(7), channels=IMAGES.shape[-1])
    found = made.__wrapped__(views=('reconstruction', 'flip'), autoencoder=autoencoder)
    guard.save(found, tmp_path / 'guard.npz')
    again = guard.load(tmp_path / 'guard.npz')
    jax.tree.map(np.testing.assert_array_equal, again, found)
    verdict = jax.jit(functools.partial(guard.judge, again, logits_fn))(IMAGES[:5])
    moved = jax.tree.map(lambda leaf: 2 * leaf, autoencoder)
    other = guard.judge(dataclasses.replace(found, autoencoder=moved), logits_fn, IMAGES[:5])
    assert np.abs(verdict.score - other.score).min() > 1e-4
