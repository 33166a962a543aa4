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
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from occjax import sources, streams
from occjax.progress import Progress, counted
from occjax.streams import Stream
from occjax.types import Batch, Dataset, Split, UsageError

_DECODER = 2  # Another number when images come out differently, so that caches are not used.


class Rows:
    """Chosen rows of an array `[N, ...]`, gathered only when indexed: a split of a memory map.

    `digests`, `u8[N, 32]`, are those of the array's rows where they are known, see `digests_of`.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray, digests: np.ndarray | None = None):
        self.array, self.rows, self.digests = array, rows, digests
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
            They are known by name, size and the source's file names, sizes and times, and
            decoded again unless all are as they were written. Nothing is ever deleted there, but
            all of it may be.
        resplit_per_class: pools both splits and holds out that number of random images of each
            class for the test (the paper's §III-A does so for Imagenette); None keeps the source's.
        seed: of the resplit and of the two subsets.
        train_images: keeps that number of random images of the training split; None keeps all.
        test_images: the same for the test split.

    Raises:
        UsageError: nothing usable has that name, or fewer images than asked for.
    """
    if image_size < 1:
        raise UsageError(f'Expected data.image_size >= 1, got {image_size}.')
    folder = Path(data_dir).expanduser() if data_dir else None
    readable = folder and folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    if folder and folder.exists() and not readable:
        raise UsageError(f'Cannot read data_dir={folder}: no directory, or no permission.')
    if name == 'digits':
        class_names, num_train = sources.DIGITS, 0
        images, labels, digests = _digits(image_size, folder, resplit_per_class)
    else:
        if name == 'folder' or (folder and sources.has_splits(folder)):
            source = sources.folder(folder, resplit=resplit_per_class is not None)
        else:
            source = sources.tfds_directory(name, folder)
        class_names, num_train = source.class_names, source.num_train
        images, labels, digests = _decoded(name, source, image_size, cache_dir)
    if labels.min() < 0:
        raise UsageError(f'{name} has images without a label.')
    train, test = np.split(np.arange(len(labels)), [num_train])
    if resplit_per_class is not None:
        train, test = _resplit(labels, class_names, resplit_per_class, seed)
    train = _subset(
        train, train_images, 'data.train_images', streams.rng(seed, Stream.TRAIN_SUBSET)
    )
    test = _subset(test, test_images, 'data.test_images', streams.rng(seed, Stream.TEST_SUBSET))
    train, test = (Split(Rows(images, rows, digests), labels[rows]) for rows in (train, test))
    return Dataset(name, class_names, train, test)


def _digits(image_size, folder, resplit_per_class):
    """Returns scikit-learn's images, labels and the images' digests."""
    if folder:
        raise UsageError(
            'The digits come with scikit-learn and read no '
            f'--data_dir={folder}: leave it out; for a folder of images '
            'set data.name=folder, for a TFDS directory the name of the dataset.'
        )
    if resplit_per_class is None:
        raise UsageError('The digits have no test split: set data.resplit_per_class.')
    images, labels = sources.digits(image_size)
    return images, labels, digests_of(images)


def fingerprint(dataset: Dataset) -> str:
    """Returns 16 hex digits over the names and all labels and pixels of both splits."""
    digest = hashlib.sha256(repr((dataset.name, dataset.class_names)).encode())
    for split in (dataset.train, dataset.test):
        images, known = split.images, getattr(split.images, 'digests', None)
        digests = digests_of(images) if known is None else known[images.rows]
        digest.update(repr(images.shape).encode())
        digest.update(np.asarray(split.labels, '<i4').tobytes())
        digest.update(digests.tobytes())
    return digest.hexdigest()[:16]


def digests_of(images: np.ndarray) -> np.ndarray:
    """Returns the SHA-256 of each image's bytes, `u8[N, 32]`."""
    found = b''
    for start in range(0, len(images), 1024):
        block = np.ascontiguousarray(images[start : start + 1024])
        found += b''.join(hashlib.sha256(image).digest() for image in block)
    return np.frombuffer(found, np.uint8).reshape(-1, 32)


def take(split: Split, index: np.ndarray) -> np.ndarray:
    """Returns the images at these positions of a split, `f32[len(index), H, W, C]` in [0, 1]."""
    images = np.asarray(split.images[index], np.float32)
    images /= 255
    return images


def pixel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each channel, `f32[C]` of [0, 1] pixels.

    The deviation of a channel that is the same everywhere is given as 1, so that one may divide.
    """
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(split), 1024):
        pixels = np.asarray(split.images[start : start + 1024], np.float64) / 255
        count += pixels[..., 0].size
        total, squares = total + pixels.sum((0, 1, 2)), squares + (pixels**2).sum((0, 1, 2))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-4, 1, std).astype(np.float32)


def batches(
    split: Split, batch_size: int, *, share_fn: Callable[[range], range] = lambda starts: starts
) -> Iterator[Batch]:
    """Yields every image exactly once and in order; the last batch is padded with the first image.

    Padding is where `is_real` is False, so that sums over a split are exact.

    Args:
        split: the images.
        batch_size: B.
        share_fn: chooses among the positions where batches start, for what several hosts divide.
    """
    if batch_size < 1:
        raise ValueError(f'Expected batch_size >= 1, got {batch_size}.')
    for start in share_fn(range(0, len(split), batch_size)):
        index = np.arange(start, start + batch_size)
        is_real = index < len(split)
        yield _batch(split, np.where(is_real, index, 0), is_real)


def training_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    classifier: int = 0,
    flip: bool = False,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields an epoch's whole batches; order and flips are pure functions of the three numbers.

    Batch statistics want equal batches, so the remainder, another in each epoch, is left out; a
    split smaller than a batch is one batch.

    Args:
        split: the training images.
        batch_size: B.
        seed: the experiment's.
        epoch: from 0.
        classifier: 0, or an ensemble's others from 1.
        flip: mirrors each image, left to right, with probability 1/2.
        rows: of each batch, whose images alone are read, for a host that takes a part of it; None
            for all.
    """
    if batch_size < 1:
        raise ValueError(f'Expected batch_size >= 1, got {batch_size}.')
    order = streams.rng(seed, Stream.EPOCH_ORDER, classifier, epoch).permutation(len(split))
    count = max(len(split) // batch_size, 1)
    flipped = streams.rng(seed, Stream.FLIP, classifier, epoch).random(len(split)) < flip / 2
    for index in order[: count * batch_size].reshape(count, -1):
        read = index if rows is None else index[rows]
        batch = _batch(split, index, np.ones(len(index), bool), read)
        mirrored = np.flatnonzero(flipped[read])
        batch.images[mirrored] = batch.images[mirrored, :, ::-1]
        yield batch


def _batch(split, index, is_real, read=None):
    """Gathers a batch, or the images of some of its rows."""
    labels, images = np.asarray(split.labels[index], np.int32), index if read is None else read
    return Batch(take(split, images), labels, index.astype(np.int32), is_real)


def _resplit(labels, class_names, per_class, seed):
    """Returns the rows of training and test: `per_class` random images of each class in test."""
    if per_class < 1:
        raise UsageError(f'Expected data.resplit_per_class >= 1, got {per_class}.')
    order = streams.rng(seed, Stream.RESPLIT).permutation(len(labels))
    is_test = np.zeros(len(labels), bool)
    for k, class_name in enumerate(class_names):
        rows = order[labels[order] == k]
        if len(rows) <= per_class:
            raise UsageError(
                f'data.resplit_per_class={per_class} leaves no training image of {class_name}, '
                f'which has {counted(len(rows), "image")}.'
            )
        is_test[rows[:per_class]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _subset(rows, count, field, rng):
    """Returns `count` random rows in their order, or all."""
    if count is None:
        return rows
    if not 0 < count <= len(rows):
        raise UsageError(f'{field}={count}, but it chooses from {counted(len(rows), "image")}.')
    return np.sort(rng.choice(rows, count, replace=False))


def _decoded(name, source, image_size, cache_dir):
    """Returns a source's images, memory-mapped, labels and digests.

    They are `u8[N, S, S, 3]`, `i32[N]` and `u8[N, 32]`.
    """
    default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'occjax'
    cache = Path(os.path.expanduser(cache_dir or default))
    if str(cache).startswith('~'):
        raise UsageError(f'There is no home directory for {cache}: --cache_dir=<folder>.')
    try:
        stats = [(file.absolute(), file.stat()) for file in source.files]
    except OSError as error:
        raise UsageError(f'Cannot read the images of {name}: {sources.one_line(error)}') from error
    state = [_DECODER, *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)]
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    stem = f'{name.replace("/", "-").replace(":", "-")}-{image_size}-{key}'
    parts = ('images.npy', 'labels.npy', 'digests.npy', 'digest.json')
    paths = [cache / f'{stem}-{part}' for part in parts]
    shape = (source.num_images, image_size, image_size, 3)
    with contextlib.suppress(OSError, ValueError):  # Absent or damaged.
        return _mapped(paths, shape)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        labels, digests = [], []
        with _replacing(paths[0]) as file:
            file.write(_header('|u1', shape))
            for image, label in _decode(name, source, image_size):
                file.write(image.tobytes())
                labels.append(label)
                digests.append(hashlib.sha256(image.tobytes()).digest())
        labels = np.array(labels, '<i4')
        with _replacing(paths[1]) as file:
            file.write(_header('<i4', shape[:1]) + labels.tobytes())
        _write_digests(paths, np.frombuffer(b''.join(digests), np.uint8).reshape(-1, 32), labels)
        return _mapped(paths, shape)
    except OSError as error:
        raise UsageError(
            f'Cannot keep the decoded images in {cache} ({sources.one_line(error)}): use '
            f'--cache_dir=<folder> with room for {np.prod(shape) / 1e9:.1f} GB.'
        ) from error


def _mapped(paths, shape):
    """Returns what `_decoded` does from its cache, or raises where that is not as it was written.

    Pixels are hashed only where the size or the time of their file is not the recorded one.
    """
    images = _array(paths[0], '|u1', shape)
    labels = np.array(_array(paths[1], '<i4', shape[:1]), np.int32)
    record = paths[3].read_bytes()
    with contextlib.suppress(OSError):
        digests = np.array(_array(paths[2], '|u1', (shape[0], 32)))
        if record == _record(paths[0], digests, labels):
            return images, labels, digests
    digests = digests_of(images)
    if _sha256(digests, labels).encode() not in record:
        raise OSError(f'{paths[0]} is damaged')
    with contextlib.suppress(OSError):  # A cache that may only be read is hashed at every start.
        _write_digests(paths, digests, labels)
    return images, labels, digests


def _array(path, descr, shape):
    """Returns a memory-mapped .npy file of just that type and shape.

    NumPy's own reader trusts a file's header, and fails in many ways where that is damaged.
    """
    header = _header(descr, shape)
    with open(path, 'rb') as file:
        is_whole = file.read(len(header)) == header
    if not is_whole or path.stat().st_size != len(header) + np.dtype(descr).itemsize * math.prod(
        shape
    ):
        raise OSError(f'{path} is damaged')
    return np.memmap(path, descr, 'r', len(header), shape)


def _write_digests(paths, digests, labels):
    """Writes the images' digests, and the record by which `_mapped` trusts them."""
    # A second ago, so that a later write changes the time even within one tick of the clock.
    os.utime(paths[0], ns=(time.time_ns() - 10**9,) * 2)
    with _replacing(paths[2]) as file:
        file.write(_header('|u1', digests.shape) + digests.tobytes())
    with _replacing(paths[3]) as file:
        file.write(_record(paths[0], digests, labels))


def _record(path, digests, labels):
    """Returns what is in the cache's digest.json, `path` being that of the images."""
    stat = path.stat()
    state = {'size': stat.st_size, 'time': stat.st_mtime_ns}
    return json.dumps({'sha256': _sha256(digests, labels)} | state).encode()


def _sha256(digests, labels):
    return hashlib.sha256(digests.tobytes() + labels.astype('<i4').tobytes()).hexdigest()


def _header(descr, shape):
    """Returns how a .npy file of such an array begins."""
    file = io.BytesIO()
    header = {'descr': descr, 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


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
    """Yields every image `u8[S, S, 3]` with its label, and tells on stderr how far it is.

    Those that cannot be read are named when all have been tried.
    """
    unreadable = []

    def decode(example):
        origin, image, label = example
        try:
            return sources.read_image(image, image_size, origin=origin), label
        except UsageError as error:
            unreadable.append(error)
            return None

    examples, progress = source.examples(), Progress(source.num_images, f'Decoding {name}, images')
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock.
        while block := list(itertools.islice(examples, 256)):
            yield from filter(None, pool.map(decode, block))
            progress(len(block))
    if unreadable:
        raise sources.all_unreadable(unreadable, source.num_images)
