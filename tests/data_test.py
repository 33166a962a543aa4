import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from unittest import mock

import hypothesis
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies
from PIL import Image

from occjax import data, sources
from occjax.types import Split, UsageError

DATA_DIR = os.environ.get('OCCJAX_TEST_DATA_DIR')
CIFAR_NAMES = (
    *('Airplane', 'Automobile', 'Bird', 'Cat', 'Deer'),
    *('Dog', 'Frog', 'Horse', 'Ship', 'Truck'),
)


def make_split(num_images, side=2):
    """Image i is of the one colour i, so that a batch says which images it holds."""
    colours = np.arange(num_images, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(colours, (num_images, side, side, 3))
    return Split(images, np.arange(num_images, dtype=np.int32) % 7)


def picture(seed, height=8, width=8, channels=(3,)):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


class BatchesTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(strategies.integers(0, 50), strategies.integers(1, 60))
    def test_every_image_exactly_once_and_in_order(self, num_images, batch_size):
        split, seen = make_split(num_images), []
        for batch in data.batches(split, batch_size):
            self.assertEqual(batch.images.shape, (batch_size, 2, 2, 3))
            self.assertEqual(batch.images.dtype, np.float32)
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0] * 255, batch.index)
            np.testing.assert_array_equal(batch.labels, split.labels[batch.index])
            seen += list(batch.index[batch.is_real])
        np.testing.assert_array_equal(seen, np.arange(num_images))

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(strategies.integers(1, 50), strategies.integers(1, 60))
    def test_training_batches_are_whole_and_without_repetition(self, num_images, batch_size):
        split = make_split(num_images)
        epoch = list(data.training_batches(split, batch_size, seed=0, epoch=0))
        index = np.concatenate([batch.index for batch in epoch])
        size = min(batch_size, num_images)
        self.assertEqual({len(batch.images) for batch in epoch}, {size})
        self.assertLen(set(index), num_images // size * size)
        self.assertLen(index, num_images // size * size)
        for batch in epoch:
            self.assertTrue(batch.is_real.all())
            np.testing.assert_array_equal(batch.images[:, 1, 1, 2] * 255, batch.index)
            np.testing.assert_array_equal(batch.labels, split.labels[batch.index])

    def test_training_order_is_a_function_of_seed_epoch_and_classifier_alone(self):
        def order(**stream):
            np.random.seed(np.random.randint(100))  # Global state must not matter.
            batches = data.training_batches(make_split(40), 8, **stream)
            return tuple(np.concatenate([batch.index for batch in batches]))

        self.assertEqual(order(seed=3, epoch=5), order(seed=3, epoch=5, classifier=0))
        chosen = itertools.product(range(2), repeat=3)
        orders = {order(seed=s, epoch=e, classifier=c) for s, e, c in chosen}
        self.assertLen(orders, 8)

    def test_half_of_the_images_are_mirrored_and_others_in_each_epoch(self):
        images = np.random.default_rng(0).integers(0, 256, (400, 2, 3, 1), np.uint8)
        split = Split(images, np.zeros(400, np.int32))

        def mirrored(**stream):
            result = np.zeros(400, bool)
            for batch in data.training_batches(split, 50, seed=1, **stream):
                plain = data.take(split, batch.index)
                is_plain = (batch.images == plain).all((1, 2, 3))
                is_mirrored = (batch.images == plain[:, :, ::-1]).all((1, 2, 3))
                assert (is_plain | is_mirrored).all()
                result[batch.index] = is_mirrored
            return result

        assert not mirrored(epoch=0).any()
        first, second = mirrored(epoch=0, flip=True), mirrored(epoch=1, flip=True)
        assert 0.4 < first.mean() < 0.6 and 0.4 < (first == second).mean() < 0.6
        np.testing.assert_array_equal(first, mirrored(epoch=0, flip=True))

    def test_pixels_are_a_255th_exactly(self):
        images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        split = Split(images, np.zeros(1, np.int32))
        expected = np.arange(256, dtype=np.float32) / np.float32(255)
        np.testing.assert_array_equal(data.take(split, np.array([0])).ravel(), expected)

    def test_batch_size_is_positive(self):
        with self.assertRaisesRegex(ValueError, 'batch_size >= 1, got 0'):
            next(data.batches(make_split(3), 0))
        with self.assertRaisesRegex(ValueError, 'batch_size >= 1, got 0'):
            next(data.training_batches(make_split(3), 0, seed=0, epoch=0))

    def test_rows_act_like_the_gathered_array(self):
        array, rows = picture(0, 6, 4), np.array([5, 0, 2])
        lazy, gathered = data.Rows(array, rows), array[rows]
        self.assertEqual((lazy.shape, lazy.dtype, len(lazy)), (gathered.shape, np.uint8, 3))
        np.testing.assert_array_equal(np.asarray(lazy), gathered)
        for index in (1, slice(1, 3), np.array([2, 2]), gathered[:, 0, 0] > 0):
            np.testing.assert_array_equal(lazy[index], gathered[index])


def test_pixel_statistics_are_numpy_s_and_a_constant_channel_may_be_divided_by():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    for constant in (0, 77, 255):
        images[..., 1] = constant
        mean, std = data.pixel_statistics(Split(images, np.zeros(50, np.int32)))
        np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
        expected = (images / 255).std((0, 1, 2))
        np.testing.assert_allclose(std, [expected[0], 1, expected[2]], rtol=1e-6)


class DigitsTest(parameterized.TestCase):
    def load(self, **kwargs):
        return data.load('digits', **{'image_size': 16, 'resplit_per_class': 20, **kwargs})

    def test_pixels_are_repeated_and_scaled(self):
        from sklearn.datasets import load_digits

        dataset = self.load()
        images = np.concatenate([dataset.train.images, dataset.test.images])
        self.assertEqual(images.shape, (1797, 16, 16, 3))
        for shift in np.ndindex(2, 2, 3):
            values = images[:, shift[0] :: 2, shift[1] :: 2, shift[2]] * (16 / 255)
            np.testing.assert_allclose(values, np.round(values), atol=0.04)
            self.assertEqual(np.round(values).sum(), load_digits().images.sum())
        self.assertEqual(dataset.class_names[:3], ('Zero', 'One', 'Two'))

    def test_resplit_is_disjoint_and_exact_per_class(self):
        from sklearn.datasets import load_digits

        dataset = self.load()
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [20] * 10)
        rows = np.concatenate([dataset.train.images.rows, dataset.test.images.rows])
        np.testing.assert_array_equal(np.sort(rows), np.arange(1797))
        labels = np.concatenate([dataset.train.labels, dataset.test.labels])
        np.testing.assert_array_equal(labels, load_digits().target[rows])

    def test_seed_chooses_resplit_and_subsets(self):
        def fingerprints(**kwargs):
            return [data.fingerprint(self.load(seed=seed, **kwargs)) for seed in (0, 0, 1)]

        for kwargs in ({}, {'train_images': 50}, {'test_images': 50}):
            first, again, other = fingerprints(**kwargs)
            self.assertEqual(first, again)
            self.assertNotEqual(first, other)

    def test_subsets_have_their_size_and_leave_the_other_split_alone(self):
        whole, part = self.load(), self.load(train_images=100)
        self.assertLen(part.train, 100)
        self.assertLen(set(part.train.images.rows), 100)
        self.assertContainsSubset(part.train.images.rows, whole.train.images.rows)
        np.testing.assert_array_equal(part.test.images, whole.test.images)

    def test_fingerprint_sees_names_labels_and_pixels(self):
        dataset = self.load(resplit_per_class=100)
        labels, images = dataset.test.labels.copy(), np.array(dataset.test.images)
        labels[7] += 1
        images[77, 3, 3, 1] ^= 1  # In the middle of a split of some hundred.
        others = [
            dataset._replace(class_names=dataset.class_names[::-1]),
            dataset._replace(test=Split(dataset.test.images, labels)),
            dataset._replace(test=Split(images, dataset.test.labels)),
        ]
        self.assertLen({data.fingerprint(d) for d in [dataset, dataset, *others]}, 4)

    @parameterized.parameters(
        ({'image_size': 12}, 'no multiple of 8'),
        ({'image_size': 0}, 'image_size >= 1'),
        ({'resplit_per_class': None}, 'data.resplit_per_class'),
        ({'resplit_per_class': 0}, 'data.resplit_per_class >= 1, got 0'),
        ({'resplit_per_class': 174}, 'no training image of Eight, which has 174'),
        ({'train_images': 1598}, 'data.train_images=1598, but it chooses from 1597 images'),
        ({'test_images': 0}, 'data.test_images=0'),
        ({'data_dir': os.curdir}, 'data.name=folder'),
        ({'data_dir': '/nowhere'}, 'data.name=folder'),
        ({'data_dir': sys.executable}, 'no directory'),
    )
    def test_mistakes(self, kwargs, message):
        with self.assertRaisesRegex(UsageError, message):
            self.load(**kwargs)


class TemporaryTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.folder, self.cache = self.root / 'images', self.root / 'cache'
        self.folder.mkdir()

    def load(self, name='folder', image_size=8, **kwargs):
        kwargs = {'data_dir': str(self.folder), 'cache_dir': str(self.cache), **kwargs}
        return data.load(name, image_size=image_size, **kwargs)

    def assert_usage_error(self, *messages, **kwargs):
        with self.assertRaises(UsageError) as context:
            self.load(**kwargs)
        self.assertNotIn('\n', str(context.exception))
        for message in messages:
            self.assertIn(str(message), str(context.exception))


class FolderTest(TemporaryTest):
    def setUp(self):
        super().setUp()
        for s, split in enumerate(('train', 'test')):
            for k, label in enumerate(('golf_ball', 'n01440764')):
                for i in range(3):
                    save(self.folder / split / label / f'{i}.png', picture([s, k, i]))

    def test_classes_labels_and_pixels(self):
        (self.folder / 'train' / 'golf_ball' / 'notes.txt').write_text('no image')
        (self.folder / 'train' / 'golf_ball' / '.hidden.png').write_text('no image')
        (self.folder / 'train' / '.hidden').mkdir()
        for dataset in (self.load(), self.load('any-other-name')):
            self.assertEqual(dataset.class_names, ('golf_ball', 'Tench'))
            for s, split in enumerate((dataset.train, dataset.test)):
                np.testing.assert_array_equal(split.labels, [0, 0, 0, 1, 1, 1])
                expected = [picture([s, k, i]) for k in range(2) for i in range(3)]
                np.testing.assert_array_equal(split.images, expected)

    def test_resplit_pools_both_splits(self):
        dataset = self.load(resplit_per_class=2)
        np.testing.assert_array_equal(np.bincount(dataset.train.labels), [4, 4])
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [2, 2])
        pooled = np.concatenate([dataset.train.images, dataset.test.images])
        expected = [picture([s, k, i]) for s in range(2) for k in range(2) for i in range(3)]
        self.assertCountEqual([i.tobytes() for i in pooled], [i.tobytes() for i in expected])

    def test_subsets_are_seeded(self):
        for field in ('train_images', 'test_images'):
            loads = [self.load(seed=seed, **{field: 3}) for seed in range(10)]
            self.assertGreater(len({data.fingerprint(dataset) for dataset in loads}), 3)

    def test_second_load_decodes_nothing(self):
        first = data.fingerprint(self.load())
        with mock.patch.object(sources, 'read_image', side_effect=AssertionError):
            again = self.load()
        self.assertEqual(data.fingerprint(again), first)
        self.assertIsInstance(again.train.images.array, np.memmap)

    def test_cache_is_by_size(self):
        self.load()
        self.assertEqual(self.load(image_size=4).train.images.shape, (6, 4, 4, 3))

    @parameterized.parameters('changed', 'added', 'touched')
    def test_changed_source_is_decoded_again(self, how):
        self.load()
        path, image = self.folder / 'train' / 'golf_ball' / '0.png', picture(99)
        if how == 'touched':  # As when a file changes but not its length.
            Image.fromarray(image).save(path)
            os.utime(path, ns=(0, 0))
        save(path if how != 'added' else path.with_name('00.png'), image)
        images = np.array(self.load().train.images)
        self.assertLen(images, 7 if how == 'added' else 6)
        self.assertTrue((images == image).all((1, 2, 3)).any())

    @parameterized.parameters('images.npy', 'labels.npy', 'digests.npy', 'digest.json')
    def test_damaged_cache_is_decoded_again(self, which):
        expected = data.fingerprint(self.load())

        def assert_as_before():
            self.assertEqual(data.fingerprint(self.load()), expected)
            if which == 'digest.json':  # It also holds when the images were written.
                self.assertEqual(
                    *(json.loads(text)['sha256'] for text in (path.read_bytes(), whole))
                )
            else:
                self.assertEqual(path.read_bytes(), whole)

        (path,) = self.cache.glob(f'*-{which}')
        whole = path.read_bytes()
        flipped = []
        for at in np.linspace(0, len(whole) - 1, 20).astype(int):
            flipped.append(bytearray(whole))
            flipped[-1][at] ^= 4
        for damaged in (whole[:-1], whole + b'x', whole[:20], b'', b'x' * len(whole), *flipped):
            path.write_bytes(damaged)
            assert_as_before()
        path.unlink()
        assert_as_before()
        self.assertLen(np.load(path) if which != 'digest.json' else range(12), 12)

    def test_pixels_are_hashed_only_where_their_file_changed(self):
        def hashed():
            with mock.patch.object(data, 'digests_of', wraps=data.digests_of) as digests_of:
                data.fingerprint(self.load())
            return sum(call.args[0].nbytes for call in digests_of.call_args_list)

        self.load()
        (path,) = self.cache.glob('*-images.npy')
        self.assertEqual(hashed(), 0)
        path.touch()
        self.assertEqual([hashed(), hashed()], [12 * 8 * 8 * 3, 0])
        pixels = bytearray(path.read_bytes())
        pixels[-1] ^= 4
        path.write_bytes(pixels)
        self.assertEqual([hashed(), hashed()], [12 * 8 * 8 * 3, 0])  # And decoded again.
        self.assertNotEqual(path.read_bytes(), pixels)

    def test_a_cache_without_digests_is_read_and_gets_them(self):
        expected = data.fingerprint(self.load())
        record, digests = (self.cache.glob(f'*-{name}') for name in ('digest.json', 'digests.npy'))
        (record,), (digests,) = record, digests
        record.write_text(json.dumps({'sha256': json.loads(record.read_text())['sha256']}))
        digests.unlink()
        with mock.patch.object(sources, 'read_image', side_effect=AssertionError):
            self.assertEqual(data.fingerprint(self.load()), expected)
        self.assertTrue(digests.exists())

    def test_fingerprint_is_of_what_the_splits_hold(self):
        for dataset in (self.load(), self.load(train_images=3, test_images=5)):
            splits = (Split(np.array(s.images), s.labels) for s in dataset[2:])
            self.assertEqual(
                data.fingerprint(dataset), data.fingerprint(data.Dataset(*dataset[:2], *splits))
            )

    def test_stopped_decoding_leaves_nothing(self):
        with (
            mock.patch.object(sources, 'read_image', side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.load()
        self.assertEmpty(list(self.cache.iterdir()))

    def test_unusable_cache(self):
        self.cache.write_text('a file')
        self.assert_usage_error('cache_dir', self.cache)

    def test_without_a_home_a_place_for_the_cache_is_asked_for(self):
        with (
            mock.patch.dict(os.environ, XDG_CACHE_HOME=''),
            mock.patch.object(os.path, 'expanduser', str),
        ):
            self.assert_usage_error('--cache_dir=<folder>', cache_dir=None)

    def test_names_are_equal_however_their_accents_are_spelt(self):
        names = [unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD')]
        for split, name in zip(('train', 'test'), names, strict=True):
            (self.folder / split / 'golf_ball').rename(self.folder / split / name)
        self.assertIn('café', self.load().class_names)
        (self.folder / 'train' / names[1]).mkdir()
        self.assert_usage_error('differ only in how accents are spelt')

    def test_default_cache(self):
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.root / 'xdg')):
            self.load(cache_dir=None)
        self.assertLen(list((self.root / 'xdg' / 'occjax').iterdir()), 4)

    def test_mistakes(self):
        train, test = self.folder / 'train', self.folder / 'test'
        self.assert_usage_error('--data_dir=<folder>', data_dir=None)
        self.assert_usage_error('/nowhere', data_dir='/nowhere')
        self.assert_usage_error('data.train_images=7', train_images=7)
        self.assert_usage_error('leaves no training image of golf_ball', resplit_per_class=6)
        (train / 'golf_ball' / '3.png').write_text('no image')
        self.assert_usage_error(train / 'golf_ball' / '3.png')
        (train / 'golf_ball' / '3.png').unlink()
        (test / 'only').mkdir()
        self.assert_usage_error('Class only is in only one')
        (train / 'only').mkdir()
        self.assert_usage_error(f'no image in {train / "only"}')
        test.rename(self.folder / 'tset')
        self.assert_usage_error(f'{self.folder} has no split to test with', 'train, tset')
        self.assert_usage_error('data.resplit_per_class')
        train.rename(self.folder / 'tran')
        self.assert_usage_error('no folder called train', 'tran, tset', 'data.resplit_per_class')
        (self.folder / 'tran').rename(self.folder / 'test')
        self.assert_usage_error('has test, which is taken for a split', resplit_per_class=1)
        (self.folder / 'test').rename(train)
        (train / 'only').rmdir()
        self.load(resplit_per_class=1)  # The way out.

    def stderr_of_load(self, **kwargs):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            dataset = self.load(**kwargs)
        return dataset, stderr.getvalue()

    @parameterized.parameters(
        ('Train', 'Test'),
        ('training', 'testing'),
        ('TRAIN', 'valid'),
        ('train', 'Val'),
        ('train', 'validation'),
        ('train', 'eval'),
        ('Training', 'dev'),
    )
    def test_other_names_of_the_splits(self, train, test):
        expected = self.load()
        (self.folder / 'test').rename(self.folder / test)
        (self.folder / 'train').rename(self.folder / train)
        for actual in (self.load(), self.load('any-other-name')):
            np.testing.assert_array_equal(actual.train.images, expected.train.images)
            np.testing.assert_array_equal(actual.test.images, expected.test.images)

    @parameterized.parameters('unlabelled', 'unknown', 'empty', 'empty classes')
    def test_the_labelled_split_is_taken(self, kind):
        expected = np.array(self.load().test.images)
        (self.folder / 'test').rename(self.folder / 'val')
        if kind in ('unlabelled', 'unknown'):
            save(
                self.folder / 'test' / ('unknown' if kind == 'unknown' else '') / '1.png',
                picture(9),
            )
        else:
            (self.folder / 'test').mkdir()
        if kind == 'empty classes':
            for label in ('golf_ball', 'n01440764'):
                (self.folder / 'test' / label).mkdir()
        dataset, said = self.stderr_of_load()
        np.testing.assert_array_equal(dataset.test.images, expected)
        self.assertIn(f'the test split is {self.folder / "val"}', said)

    def test_resplit_needs_no_splits(self):
        whole = self.load(resplit_per_class=1)
        (self.folder / 'test').rename(self.root / 'elsewhere')
        for root in (self.folder, self.folder / 'train'):
            dataset = self.load(data_dir=str(root), resplit_per_class=1)
            self.assertEqual(dataset.class_names, whole.class_names)
            np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1])
            np.testing.assert_array_equal(dataset.test.labels, [0, 1])

    def test_a_class_may_be_called_train(self):
        root = self.root / 'vehicles'
        for k, i in np.ndindex(2, 3):
            save(root / ('bus', 'train')[k] / f'{i}.png', picture([k, i]))
        dataset = self.load(data_dir=str(root), resplit_per_class=1)
        self.assertEqual(dataset.class_names, ('bus', 'train'))

    def test_subfolders_are_read(self):
        expected = self.load()
        for path in (self.folder / 'train' / 'golf_ball', self.folder / 'test' / 'n01440764'):
            path.rename(self.root / 'moved')
            path.mkdir()
            (self.root / 'moved').rename(path / 'images')
        (self.folder / 'train' / 'golf_ball' / '.thumbnails').mkdir()
        save(self.folder / 'train' / 'golf_ball' / '.thumbnails' / '0.png', picture(9))
        save(self.folder / 'train' / '__MACOSX' / '0.png', picture(9))
        actual, said = self.stderr_of_load()
        np.testing.assert_array_equal(actual.train.images, expected.train.images)
        np.testing.assert_array_equal(actual.test.images, expected.test.images)
        self.assertEmpty(said)

    def test_whatever_pillow_reads_counts(self):
        path, image = self.folder / 'train' / 'golf_ball', Image.fromarray(picture(0))
        suffixes = [
            '.jfif',
            '.jpe',
            '.avif',
            '.jp2',
            '.pnm',
            '.tga',
            '.webp',
            '.JPG',
            '.tiff',
            '.ico',
            '.qoi',
            '.mpo',
            '.pcx',
        ]
        for suffix in suffixes:
            image.save(path / f'z{suffix}')
        dataset, said = self.stderr_of_load()
        self.assertLen(dataset.train, 6 + len(suffixes))
        self.assertEmpty(said)

    def test_what_is_skipped_is_said(self):
        expected = self.load()
        path = self.folder / 'train' / 'golf_ball'
        for name in ('a.txt', 'b.TXT', 'c.h5', 'd', '../e.csv'):
            (path / name).write_text('no image')
        (path / 'z.png').mkdir()
        (path / 'link.png').symlink_to('nowhere')
        (path / 'loop').symlink_to(path)
        os.mkfifo(path / 'pipe.png')
        dataset, said = self.stderr_of_load()
        np.testing.assert_array_equal(dataset.train.images, expected.train.images)
        self.assertIn(f'Skipped in {self.folder}: 9 files without an image', said)
        for kind in ('.txt (2)', '.h5 (1)', 'suffix (1)', 'of classes (1)', 'images (1)'):
            self.assertIn(kind, said)
        self.assertIn('dangling links (1)', said)
        self.assertIn('links to folders (1)', said)

    def test_classes_that_look_alike_keep_their_names(self):
        for split in ('train', 'test'):
            for label in ('hot dog', 'hot_dog', 'Tench', 'cat'):
                save(self.folder / split / label / '0.png', picture(0))
        names = ('Tench', 'cat', 'golf_ball', 'hot dog', 'hot_dog', 'n01440764')
        self.assertEqual(self.load().class_names, names)

    def test_classes_are_in_natural_order(self):
        root = self.root / 'numbers'
        for split, label in itertools.product(
            ('train', 'test'), ('10', '2', '1', 'a10', 'a9', '01')
        ):
            save(root / split / label / '0.png', picture(0))
        self.assertEqual(
            self.load(data_dir=str(root)).class_names, ('01', '1', '2', '10', 'a9', 'a10')
        )

    @parameterized.parameters(None, 1)
    def test_a_single_class_is_refused(self, resplit_per_class):
        for split in ('train', 'test'):
            (self.folder / split / 'n01440764').rename(self.root / split)
        self.assert_usage_error('two classes', resplit_per_class=resplit_per_class)

    def test_images_without_a_label(self):
        labels = np.full(12, -1, np.int32)  # TFDS's mark.
        unlabelled = np.zeros((12, 8, 8, 3), np.uint8), labels, None
        with mock.patch.object(data, '_decoded', return_value=unlabelled):
            self.assert_usage_error('without a label')

    def test_all_unreadable_images_are_named_at_once(self):
        broken = []
        for split, k in itertools.product(('train', 'test'), range(7)):
            broken.append(self.folder / split / 'golf_ball' / f'bad{k}.png')
            broken[-1].write_bytes(b'<html>')
            if len(broken) == 3:
                self.assert_usage_error(f'Cannot read 3 of 15 images: {broken[0]}: ', *broken)
        with self.assertRaisesRegex(UsageError, 'Cannot read 14 of 26 images: .*; and 4 more') as e:
            self.load()
        self.assertEqual(str(e.exception).count('bad'), 10)
        self.assertEmpty(list(self.cache.iterdir()))

    def test_truncated_image(self):
        path = self.folder / 'test' / 'golf_ball' / '1.jpg'
        Image.fromarray(picture(0, 64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-300])
        self.assert_usage_error(f'{path}: it is damaged')

    def test_heic_counts_as_an_image_and_says_what_reads_it(self):
        heic = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99)
        for name in ('1.HEIC', 'renamed.jpg'):
            path = self.folder / 'test' / 'golf_ball' / name
            path.write_bytes(heic)
            with mock.patch.dict(sys.modules, pillow_heif=None):
                sources._read_heic.cache_clear()
                self.assert_usage_error(f'{path}: HEIC: pip install pillow-heif')
            path.unlink()
        sources._read_heic.cache_clear()


class ReadImageTest(TemporaryTest):
    def read(self, image, image_size, suffix='.png'):
        path = self.root / f'image{suffix}'
        image.save(path)
        np.testing.assert_array_equal(
            sources.read_image(path.read_bytes(), image_size), sources.read_image(path, image_size)
        )
        return sources.read_image(path, image_size)

    @parameterized.parameters((12, 8, 2, 0), (8, 14, 0, 3), (8, 8, 0, 0))
    def test_centre_is_cropped(self, height, width, top, left):
        image = picture(0, height, width)
        actual = self.read(Image.fromarray(image), 8)
        np.testing.assert_array_equal(actual, image[top : top + 8, left : left + 8])

    @parameterized.parameters((40, 20), (20, 60), (9, 6))
    def test_shorter_side_is_scaled_then_cropped(self, height, width):
        ramp = np.linspace(40, 200, width).round().astype(np.uint8)
        image = Image.fromarray(np.broadcast_to(ramp, (height, width)).copy())
        scale = 10 / min(height, width)
        whole = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
        left, top = (whole.width - 10) // 2, (whole.height - 10) // 2
        expected = np.asarray(whole.crop((left, top, left + 10, top + 10)))
        np.testing.assert_allclose(self.read(image, 10)[..., 0], expected, atol=1)

    def test_scaling_is_antialiased(self):
        checkers = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
        np.testing.assert_allclose(self.read(Image.fromarray(checkers), 8), 127.5, atol=2)

    def test_modes(self):
        colour, grey = picture(0), picture(1, channels=())
        three = np.repeat(grey[..., None], 3, -1)
        deep = Image.fromarray(grey.astype(np.uint16) * 256 + 7)
        palette = Image.fromarray(colour).convert('P')
        for image, expected in (
            (Image.fromarray(colour), colour),
            (Image.fromarray(grey), three),
            (deep, three),
            (Image.fromarray(grey > 99), np.where(three > 99, 255, 0)),
            (palette, np.asarray(palette.convert('RGB'))),
        ):
            with self.subTest(image.mode):
                np.testing.assert_array_equal(self.read(image, 8), expected)
        lab = Image.merge(
            'LAB', [Image.fromarray(c) for c in (grey, grey * 0 + 128, grey * 0 + 128)]
        )
        ycc = Image.fromarray(colour).convert('YCbCr')
        floats, deeper = grey / np.float32(255), grey.astype(np.int32) * 256 + 7
        for image, expected, atol in (
            (Image.fromarray(floats), three, 0),
            (Image.fromarray(deeper), three, 0),
            (Image.fromarray(colour).convert('CMYK'), colour, 0),
            (ycc, np.asarray(ycc.convert('RGB')), 1),
            (lab, np.asarray(lab.convert('RGB')), 0),
        ):
            with self.subTest(image.mode):
                actual = self.read(image, 8, '.tif').astype(int)
                np.testing.assert_allclose(actual, expected, atol=atol)

    def test_transparency_is_laid_on_white(self):
        colour, grey, alpha = picture(0), picture(1, channels=()), picture(2, channels=())
        share = alpha[..., None] / 255
        palette = Image.fromarray(grey)
        palette.putpalette(picture(3, 256, 1).tobytes())
        opaque = np.asarray(palette.convert('RGB'))
        of_palette = picture(4, 256, 1, ())[:, 0]
        shares = of_palette[grey][..., None] / 255
        for pixels, shown, kwargs, image in (
            (colour, share, {}, Image.fromarray(np.dstack([colour, alpha]))),
            (grey[..., None], share, {}, Image.fromarray(np.dstack([grey, alpha]))),
            (opaque, shares, {'transparency': of_palette.tobytes()}, palette),
            (
                grey[..., None],
                grey[..., None] != grey[3, 3],
                {'transparency': int(grey[3, 3])},
                Image.fromarray(grey),
            ),
            (
                grey[..., None],
                grey[..., None] != grey[3, 3],
                {'transparency': 257 * int(grey[3, 3])},
                Image.fromarray(grey.astype(np.uint16) * 257),
            ),
        ):
            with self.subTest(image.mode):
                path = self.root / 'image.png'
                image.save(path, **kwargs)
                expected = np.broadcast_to(shown * pixels + (1 - shown) * 255, (8, 8, 3))
                np.testing.assert_allclose(sources.read_image(path, 8), expected, atol=1)

    @parameterized.product(suffix=('.jpg', '.png', '.tif', '.webp'))
    def test_exif_orientation_is_followed(self, suffix):
        stored = np.zeros((16, 16, 3), np.uint8)
        stored[:8, :8], stored[8:, :8] = 255, 128
        turned = stored.swapaxes(0, 1)
        # Where the standard says that the first row and the first column are shown.
        for orientation, shown in enumerate(
            (
                stored,  # top, left
                stored[:, ::-1],  # top, right
                stored[::-1, ::-1],  # bottom, right
                stored[::-1],  # bottom, left
                turned,  # left, top
                turned[:, ::-1],  # right, top
                turned[::-1, ::-1],  # right, bottom
                turned[::-1],  # left, bottom
            ),
            start=1,
        ):
            with self.subTest(orientation):
                exif, path = Image.Exif(), self.root / f'image{suffix}'
                exif[0x0112] = orientation
                Image.fromarray(stored).save(path, exif=exif, quality=100)
                np.testing.assert_allclose(sources.read_image(path, 16).astype(int), shown, atol=9)

    def test_damaged_exif_says_nothing(self):
        path, image = self.root / 'image.jpg', Image.new('RGB', (8, 8), 'red')
        image.save(path, exif=b'Exif\0\0no such thing')
        self.assertEqual(sources.read_image(path, 8)[0, 0].tolist(), [254, 0, 0])

    @parameterized.parameters(
        (np.full((8, 8), 254.5, np.float32), 'holds floats from 254.5 to 254.5, not 0 to 1'),
        (np.full((8, 8), np.nan, np.float32), 'holds floats from nan to nan'),
        (np.full((8, 8), -1, np.int32), 'holds -1 to -1, not 0 to 65535'),
        (np.full((8, 8), 2**20, np.int32), 'holds 1048576'),
    )
    def test_numbers_of_unknown_range(self, pixels, message):
        with self.assertRaisesRegex(UsageError, f': it {message}'):
            self.read(Image.fromarray(pixels), 8, '.tif')

    def test_decompression_bomb(self):
        with self.assertRaisesRegex(UsageError, 'big.ppm: .*decompression bomb'):
            sources.read_image(b'P6 20000 20000 255\n', 8, origin='big.ppm')

    def test_damaged_files_are_named_and_nothing_else_is_said(self):
        """Among them are such as Pillow warns of, and such as libtiff writes of by itself."""
        saved = []
        for suffix in (
            '.png',
            '.jpg',
            '.gif',
            '.bmp',
            '.webp',
            '.tga',
            '.ppm',
            '.tif',
            'l.tif',
            'z.tif',
        ):
            kinds = {'l.tif': 'tiff_lzw', 'z.tif': 'tiff_adobe_deflate'}
            path = self.root / f'image{suffix}'
            Image.fromarray(picture(0, 32, 32)).save(path, compression=kinds.get(suffix))
            saved.append(path)
        program = """
import pathlib
import sys
import numpy as np
from occjax import sources
rng = np.random.default_rng(0)
for path in sys.argv[1:]:
    whole = pathlib.Path(path).read_bytes()
    for size in rng.integers(0, len(whole), 6):
        flipped = bytearray(whole)
        flipped[size:] = rng.bytes(len(whole) - size)
        for damaged in (whole[:size], bytes(flipped)):
            try:
                sources.read_image(damaged, 8, origin='that one')
            except sources.UsageError as error:
                assert str(error).startswith('Cannot read the image that one: ')
                print(error)
"""
        done = subprocess.run(
            [sys.executable, '-W', 'always', '-c', program, *saved],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.stderr, done.returncode), ('', 0))
        lines = done.stdout.splitlines()
        self.assertGreater(len(lines), 40)
        for line in lines:
            self.assertStartsWith(line, 'Cannot read the image that one: ')

    def test_first_frame_of_an_animation(self):
        frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
        path = self.root / 'two.gif'
        frames[0].save(path, save_all=True, append_images=frames[1:])
        self.assertEqual(sources.read_image(path, 8)[0, 0].tolist(), [255, 0, 0])


class TfdsTest(TemporaryTest):
    def archive(self, name, files):
        """Makes the archive that `name` is prepared from, and has TFDS expect its checksum."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import checksums

        path = self.folder / 'downloads' / 'manual' / name
        path.parent.mkdir(parents=True)
        with tarfile.open(path, 'w:gz') as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        builder = tfds.builder_cls('cifar10' if 'cifar' in name else 'imagenette')
        content = path.read_bytes()
        info = checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), name)
        infos = {f'https://localhost/{name}': info}
        self.enter_context(mock.patch.object(builder, 'url_infos', infos))
        return path

    def cifar10(self, per_file=20):
        rng = np.random.default_rng(0)
        files = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
        images = rng.integers(0, 256, (len(files), per_file, 32, 32, 3), np.uint8)
        labels = np.broadcast_to(np.arange(per_file, dtype=np.uint8) % 10, (len(files), per_file))
        planes = images.transpose(0, 1, 4, 2, 3).reshape(len(files), per_file, -1)
        records = np.concatenate([labels[..., None], planes], -1)
        contents = {f'cifar-10-batches-bin/{f}': records[i].tobytes() for i, f in enumerate(files)}
        names = '\n'.join(CIFAR_NAMES).lower() + '\n\n'
        contents['cifar-10-batches-bin/batches.meta.txt'] = names.encode()
        path = self.archive('cifar-10-binary.tar.gz', contents)
        split = {'train': slice(0, 5), 'test': slice(5, 6)}
        return path, {
            name: (images[part].reshape(-1, 32, 32, 3), labels[part].ravel())
            for name, part in split.items()
        }

    def test_cifar10_is_prepared_as_tfds_does(self):
        """The genuine reader returns each image under the id that the genuine writer gives it."""
        import tensorflow_datasets as tfds

        _, expected = self.cifar10()
        dataset = self.load('cifar10', 32)
        self.assertNotIn('tensorflow', sys.modules)
        self.assertEqual(dataset.class_names, CIFAR_NAMES)
        for name, split in (('train', dataset.train), ('test', dataset.test)):
            images, labels = expected[name]
            source = tfds.data_source('cifar10', split=name, data_dir=self.folder, download=False)
            self.assertLen(source, len(images))
            for record, image, label in zip(source, split.images, split.labels, strict=True):
                i = int(record['id'].decode().removeprefix(f'{name}_'))
                np.testing.assert_array_equal(record['image'], images[i])
                self.assertEqual(record['label'], labels[i])
                np.testing.assert_array_equal(image, images[i])
                self.assertEqual(label, labels[i])
            ids = {record['id'] for record in source}
            self.assertLen(ids, len(images))

    def test_imagenette_is_prepared_as_tfds_does(self):
        import tensorflow_datasets as tfds

        contents, expected = {}, {'train': {}, 'val': {}}
        for file in ('noise.csv', 'train/n01440764/noise.csv'):
            contents[f'imagenette2-160/{file}'] = b''
        for split, count in (('train', 3), ('val', 2)):
            for k, synset in enumerate(sources.SYNSETS):
                for i in range(count):
                    jpeg = io.BytesIO()
                    grey = () if i else (3,)
                    Image.fromarray(picture([k, i, count], 12, 16, grey)).save(jpeg, 'JPEG')
                    file = f'imagenette2-160/{split}/{synset}/{synset}_{i}.JPEG'
                    contents[file] = jpeg.getvalue()
                    pixels = sources.read_image(jpeg.getvalue(), 8)
                    expected[split][pixels.tobytes()] = k
        self.archive('imagenette2-160.tgz', contents)
        dataset = self.load('imagenette/160px-v2', 8)
        self.assertNotIn('tensorflow', sys.modules)
        self.assertEqual(dataset.class_names, tuple(sources.SYNSETS.values()))
        for name, split in (('train', dataset.train), ('val', dataset.test)):
            labels = {
                image.tobytes(): k for image, k in zip(split.images, split.labels, strict=True)
            }
            self.assertEqual(labels, expected[name])
        source = tfds.data_source('imagenette/160px-v2', data_dir=self.folder, download=False)
        self.assertEqual({k: len(v) for k, v in source.items()}, {'train': 30, 'validation': 20})
        self.assertLen(self.load('imagenette/160px-v2', 8, resplit_per_class=1).train, 40)

    def test_wrong_checksum_names_both(self):
        path, _ = self.cifar10()
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(path.read_bytes()[:-1])
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        self.assert_usage_error(expected, actual, path, name='cifar10')
        self.assertEmpty(list((self.folder / 'cifar10').glob('3*')))

    def test_archive_is_verified_by_the_checksum_of_tfds(self):
        from tensorflow_datasets.core.download import DownloadManager

        path = self.folder / 'downloads' / 'manual' / 'imagenette2.tgz'
        path.parent.mkdir(parents=True)
        path.write_bytes(b'something else')
        checksum = '6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd'
        actual = hashlib.sha256(b'something else').hexdigest()
        with mock.patch.object(DownloadManager, '_download', side_effect=AssertionError):
            self.assert_usage_error(checksum, actual, path, name='imagenette')

    @parameterized.parameters(
        ('cifar10', 'www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz', 'c4a38c50a1bc5f3a1c5537f2'),
        ('imagenette', 's3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz', '6cbfac238434d89fe99'),
        ('imagenette/320px', 'fast-ai-imageclas/imagenette-320.tgz', '0e3ac85d7f3fd0a63d5e27d85'),
    )
    def test_without_network_says_url_checksum_and_place(self, name, url, checksum):
        import requests

        failure = requests.ConnectionError('no\nnetwork')
        place = self.folder / 'downloads' / 'manual' / url.rsplit('/')[-1]
        with mock.patch.object(requests, 'head', side_effect=failure):
            self.assert_usage_error(url, checksum, place, 'no network', name=name)
        self.assertTrue(place.parent.is_dir())

    @parameterized.parameters(
        ('mnist', 'prepare it with TFDS'),
        ('nosuch', 'No source is called nosuch'),
        ('imagenette/nosuch', 'BuilderConfig nosuch not found'),
        ('cifar10:9.9.9', 'only: 3.0.2'),
        ('no such', 'no such'),
    )
    def test_names_that_are_not_there(self, name, message):
        self.assert_usage_error(message, name=name)

    def test_mistakes(self):
        self.assert_usage_error('/nowhere', name='cifar10', data_dir='/nowhere')
        (self.folder / 'downloads').write_text('where a folder belongs')
        self.assert_usage_error(self.folder / 'downloads', name='cifar10')
        with mock.patch.dict(sys.modules, tensorflow_datasets=None):
            self.assert_usage_error('pip install tensorflow-datasets', name='cifar10')

    def test_damaged_records(self):
        self.cifar10()
        self.load('cifar10', 32)
        (path,) = (self.folder / 'cifar10' / '3.0.2').glob('*-test.array_record*')
        path.write_bytes(path.read_bytes()[:-5000])
        self.assert_usage_error('damaged', name='cifar10', image_size=32)

    def test_other_format(self):
        self.cifar10()
        self.load('cifar10', 32)
        info = self.folder / 'cifar10' / '3.0.2' / 'dataset_info.json'
        info.write_text(info.read_text().replace('array_record', 'tfrecord'))
        self.assert_usage_error('array_record format', name='cifar10')

    @parameterized.parameters(
        ('features.json', '"label": {', '"kind": {', "'label'"),
        ('features.json', '"image": {', '"picture": {', "'image'"),
        ('features.json', 'floats', '', 'image is Image(shape=(32, 32, 1), dtype=float32)'),
        ('features.json', 'several labels', '', 'label is Sequence('),
        ('features.json', 'class_label_feature.ClassLabel', 'text_feature.Text', 'label is Text'),
        ('dataset_info.json', '"name": "test"', '"name": "probe"', 'validation'),
        ('dataset_info.json', '"splits"', '', 'TFDS cannot read mine'),
        ('features.json', '"featuresDict"', '', 'TFDS cannot read mine'),
    )
    def test_datasets_without_labels_or_a_split_or_sense(self, file, old, new, message):
        self.cifar10()
        self.load('cifar10', 32)
        # Under a name that TFDS has no code for it goes by the files alone.
        (self.folder / 'cifar10').rename(self.folder / 'mine')
        for path in list((self.folder / 'mine').glob('*/cifar10-*')):
            path.rename(path.with_name(path.name.replace('cifar10', 'mine')))
        for path in (self.folder / 'mine').glob('*/*.json'):
            text = path.read_text().replace('"cifar10"', '"mine"')
            if path.name == file:
                if old in ('floats', 'several labels'):
                    whole = json.loads(text)
                    features = whole['featuresDict']['features']
                    if old == 'floats':
                        image = features['image']['image']
                        image['dtype'], image['shape']['dimensions'][2] = 'float32', '1'
                    else:
                        kind = 'tensorflow_datasets.core.features.sequence_feature.Sequence'
                        several = {'feature': features['label'], 'length': '-1'}
                        features['label'] = {'pythonClassName': kind, 'sequence': several}
                    text = json.dumps(whole)
                else:
                    self.assertIn(old, text)
                    text = text.replace(old, new)
                if 'Text' in new:
                    text = re.sub(r'"classLabel": {[^}]*}', '"text": {}', text)
            path.write_text(text)
        self.assert_usage_error(message, name='mine')


@pytest.mark.slow
@absltest.skipUnless(DATA_DIR, 'OCCJAX_TEST_DATA_DIR names no prepared TFDS directory.')
class RealDataTest(TemporaryTest):
    def test_cifar10(self):
        dataset = self.load('cifar10', 32, data_dir=DATA_DIR)
        self.assertEqual(dataset.class_names, CIFAR_NAMES)
        np.testing.assert_array_equal(np.bincount(dataset.train.labels), [5000] * 10)
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1000] * 10)
        self.assertEqual(dataset.train.images.shape, (50_000, 32, 32, 3))

    def test_imagenette_resampled_as_in_the_paper(self):
        dataset = self.load('imagenette/full-size-v2', 16, data_dir=DATA_DIR, resplit_per_class=100)
        self.assertEqual(dataset.class_names, tuple(sources.SYNSETS.values()))
        self.assertLen(dataset.train, 12_394)
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [100] * 10)


if __name__ == '__main__':
    absltest.main()
