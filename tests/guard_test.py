"""Laws of the guard, on a network that is none of ours."""

import dataclasses
import functools
import json
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from occjax import attack, comparators, guard, metrics, names, occlusion
from occjax.types import HeatmapSet

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


def cheap(**more):
    """A guard of a score that learns nothing, on one attack."""
    settings = dict(class_names=CLASSES, method='max_probability', noise=())
    settings |= dict(attacks=(guard.fgsm(8 / 255),)) | more
    key, images = settings.pop('key', jax.random.key(0)), settings.pop('images', IMAGES)
    return guard.make(key, settings.pop('logits_fn', logits_fn), images, **settings)


@pytest.mark.parametrize('name', [*metrics.BASELINES])
def test_a_score_that_learns_nothing_is_deployed_with_its_threshold(name, tmp_path):
    """Threshold and scores are NumPy's, of what the images' maps say; and the file keeps them."""
    more = WINDOWS if name.startswith('map') else {}
    if name in names.COMPARATORS:
        autoencoder = comparators.init_autoencoder(jax.random.key(7), channels=IMAGES.shape[-1])
        more = dict(autoencoder=autoencoder, bits=3)
    found = cheap(method=name, images=IMAGES[:90], class_names=CLASSES, fpr=0.2, **more)
    guard.save(found, tmp_path / 'guard.npz')
    found = guard.load(tmp_path / 'guard.npz')
    said = jax.jit(functools.partial(guard.judge, found, logits_fn))(IMAGES[:7])
    maps = dict(unoccluded=np.asarray(logits_fn(IMAGES[:7])), logits=np.zeros((7, 0, 0, 3)))
    if name in names.COMPARATORS:
        some = dict(autoencoder=autoencoder, bits=3)
        maps['comparators'] = np.asarray(comparators.scores(logits_fn, IMAGES[:7], **some))
    if name.startswith('map'):
        maps['logits'] = np.asarray(occlusion.occluded_logits(logits_fn, IMAGES[:7], **WINDOWS))
    none = dict.fromkeys(('label', 'image_id', 'is_adversarial'), np.zeros(7, int))
    expected = metrics.BASELINES[name].score_fn(HeatmapSet(**maps, **none))
    np.testing.assert_allclose(said.score, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(said.is_adversarial, said.score > said.threshold)
    assert np.isfinite(found.thresholds[:2]).all() and not jax.tree.leaves(found.bank)


def test_nothing_depends_on_the_size_of_batches():
    """Neither noise, nor a random attack, nor the order in which detectors see the maps."""

    def random_sign(logits_fn, images, labels, *, key):
        return attack.sign_noise(images, key=key, epsilon=0.2)

    def thresholds(batch_size):
        attacks = (random_sign, guard.fgsm(8 / 255))
        more = dict(views=('blur',), noise=(2 / 255,), attacks=attacks, steps=30)
        return cheap(method='views_alone', batch_size=batch_size, images=IMAGES[:90], **more)

    one, other = thresholds(32), thresholds(1000)
    assert np.isfinite(one.thresholds[:2]).all()
    np.testing.assert_allclose(one.thresholds, other.thresholds, atol=1e-3)
    np.testing.assert_array_equal(one.calibration.predicted, other.calibration.predicted)


def test_weights_are_arguments_of_what_is_compiled(monkeypatch):
    """However a function closes over them, no program's text holds them."""
    weights, texts, jit = jax.random.normal(jax.random.key(3), (432, 300)), [], jax.jit

    @jit
    def large_fn(images):
        wide = jax.lax.map(lambda x: x.reshape(-1) @ weights, images)
        return logits_fn(images) + 1e-6 * wide[:, :3]

    def recorded(fn, **settings):
        jitted = jit(fn, **settings)

        def call(*args):
            texts.append(len(jitted.lower(*args).as_text()))
            return jitted(*args)

        return call

    monkeypatch.setattr(guard.jax, 'jit', recorded)
    cheap(logits_fn=large_fn, images=IMAGES[:64], attacks=(guard.fgsm(8 / 255),))
    assert texts and max(texts) < weights.size


def test_an_attack_that_leaves_jax_is_called_as_it_is():
    """NumPy's FGSM of this classifier fits the guard that ours does."""
    rows = np.asarray(jax.jacobian(lambda x: logits_fn(x[None])[0])(jnp.full((12, 12, 3), 0.5)))

    def numpy_fgsm(logits_fn, images, labels, *, key):
        images, labels = np.asarray(images), np.asarray(labels)
        z = np.asarray(logits_fn(images))
        p = np.exp(z - z.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True) - np.eye(3)[labels]
        return np.clip(images + 8 / 255 * np.sign(np.einsum('bk,khwc->bhwc', p, rows)), 0, 1)

    ours, theirs = (cheap(attacks=(fn,)) for fn in (guard.fgsm(8 / 255), numpy_fgsm))
    np.testing.assert_allclose(ours.thresholds, theirs.thresholds, rtol=1e-5)
    found = guard.evaluate(
        ours, logits_fn, *smooth(50, 3), attacks=(numpy_fgsm,), key=jax.random.key(0)
    )
    assert found.attacks['numpy_fgsm'].n > 20
    with pytest.raises(ValueError, match=r'attack to return \[64, 12, 12, 3\] images, got \[64\]'):
        cheap(attacks=(lambda fn, images, labels, *, key: labels,))

    def smallest(attack_fn):
        return attack.minimal_epsilon(attack_fn, logits_fn, IMAGES[:5], halvings=5)[0]

    def scaled(images, labels, epsilon):
        moved = numpy_fgsm(logits_fn, images, labels, key=None) - np.asarray(images)
        return np.asarray(images) + np.sign(moved) * np.asarray(epsilon)[:, None, None, None]

    fgsm = functools.partial(attack.fgsm, logits_fn, bounds=None)
    np.testing.assert_allclose(smallest(fgsm), smallest(scaled))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(key=0), 'one JAX random key, as .* got 0'),
        (dict(batch_size=0), 'batch_size >= 1'),
        (dict(steps=0), 'steps >= 1'),
        (dict(batch_size=2.5), 'batch_size to be an integer'),
        (dict(class_names=('a', 'b')), 'names, 2, got logits of 3'),
        (dict(images=IMAGES[0]), r'images \[N, H, W, C\]'),
        (dict(method='magnet_error'), 'magnet_error needs a fitted autoencoder'),
        (dict(bits=3), "'bits'"),
    ],
)
def test_what_does_not_fit_is_said_before_any_attack(settings, message):
    def never(*args, **kwargs):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        cheap(**dict(attacks=(never,)) | settings)


def test_a_guard_without_thresholds_warns_when_it_is_made_and_when_it_judges():
    with pytest.warns(UserWarning, match=r'^\d+ clean images: too few .* fpr 0.05 \(19 are needed'):
        few = cheap(images=IMAGES[:40])
    count = len(few.calibration.scores)
    with pytest.warns(UserWarning, match=f'^{count} clean images: .*this guard flags nothing'):
        jax.jit(functools.partial(guard.judge, few, logits_fn))(IMAGES[:2])
    with pytest.warns(UserWarning, match=r'for neither \(no attacks, .*flags nothing there'):
        made('detector', attacks=(guard.fgsm(8 / 255),), noise=())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for fpr in (0, 1):  # Which ask for none, and for that of all scores.
            guard.judge(guard.at_fpr(few, fpr), logits_fn, IMAGES[:2])


def test_another_classifier_or_image_is_refused():
    found = cheap()
    with pytest.raises(ValueError, match=r'images \[12, 12, 3\], got \[12, 13, 3\]'):
        guard.judge(found, logits_fn, jnp.zeros((1, 12, 13, 3)))

    def scaled_fn(scale, images):
        return scale * logits_fn(images)

    with pytest.raises(ValueError, match='made for another classifier'):
        guard.judge(found, functools.partial(scaled_fn, 1.1), IMAGES[:2])
    with pytest.raises(ValueError, match='made for another classifier'):
        jax.jit(lambda x: guard.judge(found, functools.partial(scaled_fn, 1.1), x))(IMAGES[:2])
    with pytest.raises(ValueError, match='made for another classifier'):
        guard.check(found, functools.partial(scaled_fn, 1.1))
    guard.check(found, functools.partial(scaled_fn, 1.0001))  # As rounding may have it.

    @jax.jit
    def judge(found, scale, images):  # Weights as arguments: nothing to compare.
        return guard.judge(found, functools.partial(scaled_fn, scale), images).score

    np.testing.assert_allclose(
        judge(found, 1.0, IMAGES[:3]), guard.judge(found, logits_fn, IMAGES[:3]).score, rtol=1e-5
    )
    assert np.isfinite(judge(found, 1.1, IMAGES[:3])).all()


def test_shares_are_counted_as_a_loop_over_images_counts_them():
    found, (images, labels) = cheap(fpr=0.2), smooth(70, 4)
    labels[:9] = 1 - labels[:9]
    key, attacks = jax.random.key(1), (guard.fgsm(8 / 255), guard.fgsm(1 / 255))
    settings = dict(attacks=attacks, noise=(2 / 255,), key=key, batch_size=32)
    evaluated = guard.evaluate(found, logits_fn, images, labels, **settings)
    predicted = np.asarray(logits_fn(images)).argmax(-1)
    flags = np.asarray(guard.judge(found, logits_fn, images).is_adversarial)
    assert evaluated.clean == (flags[predicted == labels].sum(), (predicted == labels).sum())
    assert evaluated.misclassified == (flags[:9].sum(), 9)
    for name, epsilon in (('FGSM 8/255', 8 / 255), ('FGSM 1/255', 1 / 255)):
        attacked = attack.fgsm(logits_fn, images, labels, epsilon=epsilon)
        said = guard.judge(found, logits_fn, attacked)
        fooled = (predicted == labels) & (np.asarray(said.predicted) != labels)
        counts = np.asarray(said.is_adversarial)[fooled].sum(), fooled.sum()
        assert evaluated.attacks[name] == counts
    assert evaluated.noise['2/255'].n <= evaluated.clean.n
    for share in (evaluated.clean, *evaluated.attacks.values()):
        low, high = share.interval or (0, 1)
        assert 0 <= low <= high <= 1
    lines = str(evaluated).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) < 80 and 'FGSM 8/255, successful' in lines[4]
    empty = guard.evaluate(found, logits_fn, images[:9], labels[:9], **settings)
    assert empty.clean == (0, 0) and '–' in str(empty)


def test_a_file_is_refused_unless_it_is_whole_and_of_this_version(tmp_path):
    arrays = guard.to_arrays(made())
    meta = json.loads(str(arrays['meta']))

    def refused(message, without=(), **changes):
        changed = arrays | {'meta': json.dumps(meta | changes)}
        np.savez(tmp_path / 'a.npz', **{n: a for n, a in changed.items() if n not in without})
        with pytest.raises(ValueError, match=message) as found:
            guard.load(tmp_path / 'a.npz')
        assert "'meta'" not in str(found.value) and '\n' not in str(found.value)

    for name in arrays:
        refused('another kind of file' if name == 'meta' else 'missing|fit together', [name])
    refused('Unknown method', method='no such method')
    refused('Unknown method', method='sid')
    refused("view .'upside_down'", views=['upside_down'])
    refused('no argument', windows=[['learning_rate', 1]])
    refused('another version of occjax; make it anew', format=1)
    refused('fit together', class_names=['a', 'b'])
    refused('fit together', views=['blur'])


def test_a_name_without_a_suffix_gets_the_one_that_numpy_gives(tmp_path):
    guard.save(cheap(), tmp_path / 'guard.v1')
    assert [file.name for file in tmp_path.iterdir()] == ['guard.v1.npz']
    guard.load(tmp_path / 'guard.v1.npz')


def test_a_guard_is_shown_on_a_screen():
    class_names = tuple(f'class {k}' for k in range(1000))
    shown = repr(dataclasses.replace(made('detector'), class_names=class_names))
    assert len(shown) < 600 and shown.count('\n') == 0
    for part in ("'detector'", "'size': 4", '1000 (class 0, ', '(12, 12, 3)', 'of 2 classes'):
        assert part in shown
    jax.jit(lambda found: repr(found) and found.thresholds)(made('detector'))
