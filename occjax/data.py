"""A source of images by name -> `Dataset`, and exact batches of it. NumPy only, on the host.

Sources: scikit-learn's digits, a folder of images, or a TFDS name; none needs TensorFlow.
Whatever their size and mode, images become u8[N, S, S, 3] once, are kept as .npy and from
then on memory-mapped; batches are float32 in [0, 1].

Dimensions: N images, S image side, B batch.
"""

import contextlib
import hashlib
import io
import itertools
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from occjax.types import Batch, Dataset, Split, UsageError

_EXTENSIONS = {'.png', '.jpg', '.jpeg', '.bmp', '.webp', '.ppm', '.pgm', '.gif', '.tif', '.tiff'}
_DIGITS = ('Zero', 'One', 'Two', 'Three', 'Four', 'Five', 'Six', 'Seven', 'Eight', 'Nine')
_SYNSETS = {
    'n01440764': 'Tench',
    'n02102040': 'English Springer',
    'n02979186': 'Cassette Player',
    'n03000684': 'Chain Saw',
    'n03028079': 'Church',
    'n03394916': 'French Horn',
    'n03417042': 'Garbage Truck',
    'n03425413': 'Gas Pump',
    'n03445777': 'Golf Ball',
    'n03888257': 'Parachute',
}
_DECODER = 1  # Another number when images come out differently, so that caches are not used.
_RESPLIT, _TRAIN, _TEST = range(3)  # One random stream for each choice that `load` makes.


class Rows:
    """Chosen rows of an array `[N, ...]`, gathered only when indexed: a split of a memory map."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype, self.ndim = rows.shape + array.shape[1:], array.dtype, array.ndim

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return np.asarray(self.array[self.rows[index]])

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype, copy=False)


def load(
    name: str,
    *,
    image_size: int,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    resplit_per_class: int | None = None,
    seed: int = 0,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Dataset:
    """Reads a source of images; the first time it decodes and caches them.

    Args:
        name: 'digits'; 'folder' for `<data_dir>/{train,test}/<class>/<file>`, which any other
            name means too if `data_dir` looks like that; else a TFDS name, with its config.
        image_size: S. The shorter side is scaled to it, the rest cropped off evenly.
        data_dir: a TFDS directory (by default TFDS's own) or a folder of images.
        cache_dir: for decoded images; by default `$XDG_CACHE_HOME/occjax` or `~/.cache/occjax`.
            They are known by name, size and the source's file names, sizes and times. Nothing
            is ever deleted there, but all of it may be.
        resplit_per_class: pools both splits and holds out so many random images of each class
            for the test (the paper's §III-A does so for Imagenette); None keeps the source's.
        seed: of the resplit and of the two subsets.
        train_images: keeps so many random images of the training split; None keeps all.
        test_images: the same for the test split.

    Raises:
        UsageError: nothing usable stands behind the name, or fewer images than asked for.
    """
    if image_size < 1:
        raise UsageError(f'Expected data.image_size >= 1, got {image_size}.')
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder and not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)):
        raise UsageError(f'Cannot read --data_dir={folder}: no such directory, or no permission.')
    if name == 'digits':
        if folder:
            raise UsageError(
                'The digits come with scikit-learn and read no --data_dir; for a folder of images '
                'add --config.data.name=folder, for a TFDS directory the name of the dataset.'
            )
        if resplit_per_class is None:
            raise UsageError('The digits have no test split: set data.resplit_per_class.')
        class_names, num_train = _DIGITS, 0
        images, labels = _digits(image_size)
    else:
        is_folder = name == 'folder' or (folder and (folder / 'train').is_dir())
        source = _folder(folder) if is_folder else _tfds(name, folder)
        class_names, num_train = source.class_names, source.num_train
        images, labels = _decoded(name, source, image_size, cache_dir)

    if labels.min() < 0:
        raise UsageError(f'{name} has images without a label.')
    train, test = np.split(np.arange(len(labels)), [num_train])
    if resplit_per_class is not None:
        train, test = _resplit(labels, class_names, resplit_per_class, seed)
    train = _subset(train, train_images, 'data.train_images', [seed, _TRAIN])
    test = _subset(test, test_images, 'data.test_images', [seed, _TEST])
    train, test = (Split(Rows(images, rows), labels[rows]) for rows in (train, test))
    return Dataset(name, class_names, train, test)


def fingerprint(dataset: Dataset) -> str:
    """Returns 16 hex digits over names, all labels and the pixels of up to 256 images a split."""
    digest = hashlib.sha256(repr((dataset.name, dataset.class_names)).encode())
    for split in (dataset.train, dataset.test):
        sample = np.linspace(0, len(split) - 1, min(len(split), 256)).astype(int)
        digest.update(repr(split.images.shape).encode())
        digest.update(np.asarray(split.labels, '<i4').tobytes())
        digest.update(np.asarray(split.images[sample]).tobytes())
    return digest.hexdigest()[:16]


def take(split: Split, index: np.ndarray) -> np.ndarray:
    """Returns the images at these positions of a split, `f32[len(index), H, W, C]` in [0, 1]."""
    images = np.asarray(split.images[index], np.float32)
    images /= 255
    return images


def batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yields every image exactly once and in order; the last batch is padded with the first image.

    Padding is where `is_real` is False, so that sums over a split are exact.
    """
    if batch_size < 1:
        raise ValueError(f'Expected batch_size >= 1, got {batch_size}.')
    for start in range(0, len(split), batch_size):
        index = np.arange(start, start + batch_size)
        is_real = index < len(split)
        yield _batch(split, np.where(is_real, index, 0), is_real)


def training_batches(split: Split, batch_size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
    """Yields an epoch's whole batches in an order that is a pure function of `(seed, epoch)`.

    Batch statistics want equal batches, so the remainder, another in each epoch, is left out; a
    split smaller than a batch is one batch.
    """
    if batch_size < 1:
        raise ValueError(f'Expected batch_size >= 1, got {batch_size}.')
    order = np.random.default_rng([seed, epoch]).permutation(len(split))
    count = max(len(split) // batch_size, 1)
    for index in order[: count * batch_size].reshape(count, -1):
        yield _batch(split, index, np.ones(len(index), bool))


def _batch(split, index, is_real):
    """Gathers a batch."""
    labels = np.asarray(split.labels[index], np.int32)
    return Batch(take(split, index), labels, index.astype(np.int32), is_real)


def _resplit(labels, class_names, per_class, seed):
    """Returns the rows of training and test: `per_class` random images of each class in test."""
    if per_class < 1:
        raise UsageError(f'Expected data.resplit_per_class >= 1, got {per_class}.')
    order = np.random.default_rng([seed, _RESPLIT]).permutation(len(labels))
    is_test = np.zeros(len(labels), bool)
    for k, class_name in enumerate(class_names):
        rows = order[labels[order] == k]
        if len(rows) <= per_class:
            raise UsageError(
                f'data.resplit_per_class={per_class} leaves no training image of {class_name}, '
                f'which has {len(rows)} images.'
            )
        is_test[rows[:per_class]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _subset(rows, count, field, seed):
    """Returns `count` random rows in their order, or all."""
    if count is None:
        return rows
    if not 0 < count <= len(rows):
        raise UsageError(f'{field}={count}, but there are {len(rows)} images to choose from.')
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def _decoded(name, source, image_size, cache_dir):
    """Returns a source's images and labels `u8[N, S, S, 3]`, `i32[N]`, memory-mapped."""
    cache = Path(cache_dir or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'occjax')
    cache = cache.expanduser()
    try:
        stats = [(file.absolute(), file.stat()) for file in source.files]
    except OSError as error:
        raise UsageError(f'Cannot read the images of {name}: {_line(error)}') from error
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    state = (_DECODER, source.class_names, stats)
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    stem = f'{name.replace("/", "-").replace(":", "-")}-{image_size}-{key}'
    paths = cache / f'{stem}-images.npy', cache / f'{stem}-labels.npy'
    shape = (source.num_images, image_size, image_size, 3)
    try:
        return _mapped(paths, shape)
    except (OSError, ValueError, EOFError):  # Absent or damaged.
        pass
    try:
        cache.mkdir(parents=True, exist_ok=True)
        labels = []
        with _replacing(paths[0]) as file:
            header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image, label in _decode(name, source, image_size):
                file.write(image.tobytes())
                labels.append(label)
        with _replacing(paths[1]) as file:
            np.save(file, np.array(labels, np.int32))
        return _mapped(paths, shape)
    except OSError as error:
        raise UsageError(
            f'Cannot keep the decoded images in {cache} ({_line(error)}): set XDG_CACHE_HOME to a '
            f'folder with room for {np.prod(shape) / 1e9:.1f} GB.'
        ) from error


def _mapped(paths, shape):
    """Returns the arrays of cached images and labels, or raises where they are not whole."""
    images, labels = np.load(paths[0], mmap_mode='r'), np.load(paths[1])
    if images.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f'Expected images of shape {shape}, got {images.shape}.')
    return images, labels


@contextlib.contextmanager
def _replacing(path):
    """Opens a file that takes the place of `path` when it is complete, or never."""
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _decode(name, source, image_size):
    """Yields every image `u8[S, S, 3]` with its label, and tells on stderr how far it is."""

    def decode(example):
        origin, image, label = example
        return read_image(image, image_size, origin=origin), label

    examples, began = source.examples(), time.monotonic()
    done, told = 0, began
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock.
        while block := list(itertools.islice(examples, 256)):
            yield from pool.map(decode, block)
            done, now = done + len(block), time.monotonic()
            if now - told > 5 or (told > began and done == source.num_images):
                left = (now - began) / done * (source.num_images - done)
                progress = f'{done:,} of {source.num_images:,} images, {left:.0f} s left'
                print(f'Decoding {name}: {progress}', file=sys.stderr, flush=True)
                told = now


class _Source(NamedTuple):
    """Images that are not decoded yet: first those of training, then those of the test."""

    class_names: tuple[str, ...]
    num_train: int
    num_images: int
    files: list[Path]  # What they are read from: when it changes, they are decoded again.
    examples: Callable[[], Iterator[tuple[str, str | bytes, int]]]  # origin, image, label


def read_image(file, image_size: int, *, origin: str = '') -> np.ndarray:
    """Returns an image file, or its bytes, as `u8[S, S, 3]`.

    The shorter side is scaled to S (bicubic, antialiased) and the centre cut out. Grey becomes
    three channels, transparency is dropped, and of an animation the first frame is taken.

    Raises:
        UsageError: it cannot be decoded; named by `origin`, or else by its path.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode.startswith('I'):  # 16 bits, which Pillow would clip instead of scale.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            square = (image_size, image_size)
            return np.asarray(ImageOps.fit(image.convert('RGB'), square, Image.Resampling.BICUBIC))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f'Cannot read the image {origin or file}: {_line(error)}') from error


def _digits(image_size):
    """Returns scikit-learn's 8x8 digits, every pixel repeated: `u8[1797, S, S, 3]`, `i32[1797]`."""
    from sklearn.datasets import load_digits

    if image_size % 8:
        raise UsageError(f'Digits are 8x8: data.image_size={image_size} is no multiple of 8.')
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # Their values are 0 to 16.
    images = images.repeat(image_size // 8, axis=1).repeat(image_size // 8, axis=2)
    return np.repeat(images[..., None], 3, axis=-1), digits.target.astype(np.int32)


def _folder(folder):
    """Returns the source `<folder>/<split>/<class>/<file>`."""
    if folder is None:
        raise UsageError('A folder of images needs --data_dir=<folder with train/ and test/>.')
    tests = [folder / split for split in ('test', 'val', 'validation')]
    splits = [folder / 'train', next((path for path in tests if path.is_dir()), tests[0])]
    for path in splits:
        if not path.is_dir():
            raise UsageError(
                f'A folder of images is <split>/<class>/<file>, but {path} is missing.'
            )
    classes = [{path.name for path in _listed(split) if path.is_dir()} for split in splits]
    for alone in sorted(classes[0] ^ classes[1]):
        raise UsageError(f'Class {alone} stands in only one of {splits[0]} and {splits[1]}.')
    labels = sorted(classes[0])
    names = tuple(map(_human, labels))
    if not names or len(set(names)) < len(names):
        raise UsageError(f'Expected classes of different names in {splits[0]}, got {names}.')
    found, sizes = [], []
    for split, (k, label) in itertools.product(splits, enumerate(labels)):
        paths = [p for p in _listed(split / label) if p.suffix.lower() in _EXTENSIONS]
        if not paths:
            raise UsageError(f'There is no image in {split / label}.')
        found += [(path, k) for path in paths]
        sizes.append(len(paths))
    return _Source(
        names,
        num_train=sum(sizes[: len(labels)]),
        num_images=len(found),
        files=[path for path, _ in found],
        examples=lambda: ((str(path), str(path), k) for path, k in found),
    )


def _listed(folder):
    """Returns what a folder shows, in order."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
    except OSError as error:
        raise UsageError(f'Cannot read {folder}: {_line(error)}') from error


def _tfds(name, data_dir):
    """Returns the source that a TFDS directory holds under this name; may prepare it first."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        need = 'pip install tensorflow-datasets importlib_resources pillow'
        raise UsageError(f'Reading {name} needs TFDS ({_line(error)}): {need}') from error
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder)
        builder = _builder(name, data_dir)
    held_out = 'test' if 'test' in builder.info.splits else 'validation'
    as_stored = {'image': tfds.decode.SkipDecoding()}
    try:
        splits = builder.as_data_source(['train', held_out], decoders=as_stored)
        names = tuple(map(_human, builder.info.features['label'].names))
    except (NotImplementedError, AttributeError, KeyError, ValueError) as error:
        raise UsageError(
            f'{name} in {builder.data_dir} cannot be used: it takes images with class labels, a '
            f'train split beside a test or validation split, and the array_record format '
            f'({_line(error)}).'
        ) from error

    def examples():
        for split in splits:
            for start in range(0, len(split), 1000):
                stop = min(start + 1000, len(split))
                try:
                    records = split.__getitems__(range(start, stop))
                except RuntimeError as error:
                    raise UsageError(f'{builder.data_dir} is damaged: {_line(error)}') from error
                for i, record in enumerate(records, start):
                    yield f'{i} of a split of {name}', record['image'], record['label']

    files = sorted(Path(builder.data_dir).iterdir())
    return _Source(names, len(splits[0]), sum(map(len, splits)), files, examples)


def _builder(name, data_dir):
    """Returns TFDS's builder of this name."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UsageError(f'No source is called {name}: not digits, folder or in TFDS.') from error
    except (AssertionError, ValueError, OSError) as error:
        raise UsageError(f'TFDS cannot read {name}: {_line(error)}') from error


def _prepare(builder):
    """Downloads and prepares CIFAR-10 or Imagenette as TFDS does, but without TensorFlow.

    TFDS unpacks and encodes with TensorFlow. A subclass of the genuine builder replaces these two
    steps alone, so that the genuine builder reads what it has written.
    """
    import requests
    import tensorflow_datasets as tfds

    if builder.name not in ('cifar10', 'imagenette'):
        raise UsageError(
            f'{builder.info.full_name} is not in {builder.data_dir_root}: prepare it with TFDS '
            f"first, with file_format='array_record'."
        )
    config = builder.builder_config
    archive = f'{config.dirname}.tgz' if config else 'cifar-10-binary.tar.gz'
    url, known = next(item for item in builder.url_infos.items() if item[1].filename == archive)
    manual = Path(builder.data_dir_root) / 'downloads' / 'manual' / archive

    with tfds.core.registered.skip_registration():

        class Preparer(type(builder)):
            name = builder.name
            url_infos = builder.url_infos

            def _split_generators(self, dl_manager):
                path = dl_manager.download(url)  # Looks at `manual` first; verifies the checksum.
                if config:
                    return {
                        'train': _imagenette(path, 'train'),
                        'validation': _imagenette(path, 'val'),
                    }
                with tarfile.open(path) as tar:
                    names = tar.extractfile('cifar-10-batches-bin/batches.meta.txt').read()
                self.info.features['label'].names = names.decode().split()
                return {'train': _cifar10(path, 'train'), 'test': _cifar10(path, 'test')}

    print(f'Preparing {builder.info.full_name} in {builder.data_dir_root}', file=sys.stderr)
    try:
        manual.parent.mkdir(parents=True, exist_ok=True)
        if not manual.exists():
            requests.head(url, timeout=20)  # Without a network TFDS would retry for minutes.
        preparer = Preparer(data_dir=builder.data_dir_root, config=config and config.name)
        preparer.download_and_prepare(file_format='array_record')
    except (
        OSError,
        tfds.download.DownloadError,
        tfds.core.download.download_manager.NonMatchingChecksumError,
    ) as error:
        raise UsageError(
            f'Cannot prepare {builder.info.full_name}: put {url} (sha256 {known.checksum}) at '
            f'{manual} and run again. The reason: {_line(error)}'
        ) from error


def _cifar10(archive, split):
    """Yields TFDS's examples of CIFAR-10 from its binary distribution."""
    from PIL import Image

    files = [f'data_batch_{i}.bin' for i in range(1, 6)] if split == 'train' else ['test_batch.bin']
    with tarfile.open(archive) as tar:
        contents = [tar.extractfile(f'cifar-10-batches-bin/{file}').read() for file in files]
    records = np.frombuffer(b''.join(contents), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for i, (label, image) in enumerate(zip(records[:, 0], images, strict=True)):
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(png, 'PNG')
        yield i, {'id': f'{split}_{i:05d}', 'image': png.getvalue(), 'label': int(label)}


def _imagenette(archive, split):
    """Yields TFDS's examples of Imagenette from `<root>/<split>/<class>/<file>.JPEG`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.parts[1:2] == (split,) and path.suffix == '.JPEG':
                image = tar.extractfile(member).read()
                yield path.name, {'image': image, 'label': path.parts[2]}


def _human(class_name):
    """Returns a class name as the paper writes it, 'golf_ball' as 'Golf Ball'."""
    words = class_name.replace('_', ' ').split()
    return _SYNSETS.get(class_name) or ' '.join(word[0].upper() + word[1:] for word in words)


def _line(error):
    """Returns what an exception says on one line."""
    return ' '.join(str(error).split()) or type(error).__name__


def pixel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each channel, `f32[C]` of [0, 1] pixels."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(split), 1024):
        pixels = np.asarray(split.images[start : start + 1024], np.float64) / 255
        count += pixels[..., 0].size
        total, squares = total + pixels.sum((0, 1, 2)), squares + (pixels**2).sum((0, 1, 2))
    mean = total / count
    return mean.astype(np.float32), np.sqrt(squares / count - mean**2).astype(np.float32)
