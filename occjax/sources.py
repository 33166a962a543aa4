"""Where images come from: scikit-learn's digits, a folder of images, or a TFDS directory.

A `Source` knows its classes and yields images that are not decoded yet; `data` decodes and keeps
them. CIFAR-10 and Imagenette are downloaded and prepared when they are missing, as TFDS does but
without TensorFlow.
"""

import collections
import contextlib
import ctypes
import functools
import io
import logging
import re
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from occjax.progress import counted, say
from occjax.types import UsageError

TRAIN = ('train', 'training')  # What the splits of a folder may be called, the first found first.
TEST = ('test', 'testing', 'val', 'valid', 'validation', 'eval', 'evaluation', 'dev')
DIGITS = ('Zero', 'One', 'Two', 'Three', 'Four', 'Five', 'Six', 'Seven', 'Eight', 'Nine')
CIFAR10 = (
    *('Airplane', 'Automobile', 'Bird', 'Cat', 'Deer'),
    *('Dog', 'Frog', 'Horse', 'Ship', 'Truck'),
)
SYNSETS = {
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


class Source(NamedTuple):
    """Images that are not decoded yet: first those of training, then those of the test."""

    class_names: tuple[str, ...]
    num_train: int
    num_images: int
    files: list[Path]  # What they are read from: when it changes, they are decoded again.
    examples: Callable[[], Iterator[tuple[str, str | bytes, int]]]  # origin, image, label


def read_image(file, image_size: int, *, origin: str = '') -> np.ndarray:
    """Returns an image file, or its bytes, as `u8[S, S, 3]`.

    It is turned as its EXIF says, and what is transparent is laid on white. The shorter side is
    scaled to S (bicubic, antialiased) and the centre cut out. Grey becomes three channels, 16 bits
    become 8, floats are taken from [0, 1], and of an animation the first frame.

    Raises:
        UsageError: it cannot be decoded, or its numbers have no known range; named by `origin`, or
            else by its path.
    """
    Image, ImageOps = _pillow()
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            with contextlib.suppress(Exception):  # A damaged EXIF says nothing.
                ImageOps.exif_transpose(image, in_place=True)
            square = (image_size, image_size)
            return np.asarray(ImageOps.fit(_to_rgb(image), square, Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow's readers fail in any way where a file is damaged.
        named = origin or ('of these bytes' if isinstance(file, bytes) else file)
        raise UsageError(f'{_UNREADABLE}{named}: {_reason(file, error)}') from error


_HEIC = ('.heic', '.heif')
_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')


def _reason(file, error):
    """Returns why an image could not be read; what Pillow says where it is not mere damage."""
    from PIL import Image

    if isinstance(error, Image.UnidentifiedImageError):
        head = file[:12] if isinstance(file, bytes) else Path(file).read_bytes()[:12]
        suffix = '' if isinstance(file, bytes) else Path(file).suffix.lower()
        is_heic = (head[4:8] == b'ftyp' and head[8:] in _BRANDS) or suffix in _HEIC
        if is_heic and '.heic' not in Image.registered_extensions():
            return 'HEIC: pip install pillow-heif'
        return 'it is in no format that Pillow reads'
    is_said = isinstance(error, _RangeError | Image.DecompressionBombError | MemoryError)
    is_of_disk = isinstance(error, OSError) and error.errno is not None
    if is_said or is_of_disk or re.search('support|available', str(error)):
        return one_line(error)
    return 'it is damaged'


class _RangeError(ValueError):
    """Numbers of no known range."""


_UNREADABLE = 'Cannot read the image '


def all_unreadable(errors: Sequence[UsageError], count: int) -> UsageError:
    """Returns what `read_image` said of some of `count` images as one error: ten, and how many."""
    if len(errors) == 1:
        return errors[0]
    told = sorted(str(error).removeprefix(_UNREADABLE) for error in errors)
    rest = f'; and {len(told) - 10} more' if len(told) > 10 else ''
    return UsageError(
        f'Cannot read {len(told)} of {counted(count, "image")}: {"; ".join(told[:10])}{rest}.'
    )


def _pillow():
    """Returns Pillow's modules, after what they think of damaged files is kept off the terminal."""
    from PIL import Image, ImageOps

    # Not `catch_warnings`, whose filters are those of all threads.
    _read_heic()
    if _OF_PILLOW not in warnings.filters:
        warnings.filterwarnings('ignore', module=_OF_PILLOW[3].pattern)
    _silence()
    return Image, ImageOps


_OF_PILLOW = ('ignore', None, Warning, re.compile(r'PIL\b'), 0)


@functools.cache
def _read_heic():
    """Lets Pillow read HEIC where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


@functools.cache
def _silence():
    """Silences Pillow's logger, and libtiff, which it calls and which knows no such thing."""
    from PIL import Image

    logging.getLogger('PIL').setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):  # Where libtiff is part of Pillow itself.
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _to_rgb(image):
    """Returns an image of any mode as RGB; what is transparent becomes white."""
    from PIL import Image

    if image.mode.startswith('I'):  # 16 bits, which Pillow would clip instead of scale.
        pixels, depth = np.asarray(image), 12 if _bits(image) == 12 else 16
        if pixels.min() < 0 or pixels.max() >= 2**depth:
            raise _RangeError(f'it holds {pixels.min()} to {pixels.max()}, not 0 to {2**depth - 1}')
        pixels = np.where(pixels == image.info.get('transparency', -1), 2**depth - 1, pixels)
        return Image.fromarray((pixels >> (depth - 8)).astype(np.uint8)).convert('RGB')
    if image.mode == 'F':
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # So is NaN refused.
            raise _RangeError(
                f'it holds floats from {pixels.min():g} to {pixels.max():g}, not 0 to 1'
            )
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8)).convert('RGB')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


def _bits(image):
    """Returns how many bits a TIFF has a channel, None for others."""
    return getattr(image, 'tag_v2', {}).get(258, (None,))[0]


def digits(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's 8x8 digits, every pixel repeated: `u8[1797, S, S, 3]`, `i32[1797]`."""
    from sklearn.datasets import load_digits

    if image_size % 8:
        raise UsageError(f'Digits are 8x8: data.image_size={image_size} is no multiple of 8.')
    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)  # Their values are 0 to 16.
    images = images.repeat(image_size // 8, axis=1).repeat(image_size // 8, axis=2)
    return np.repeat(images[..., None], 3, axis=-1), loaded.target.astype(np.int32)


def folder(root: Path | None, *, resplit: bool = False) -> Source:
    """Returns the source `<folder>/<split>/<class>/<file>`; what it leaves out is said on stderr.

    Splits are called as in `TRAIN` and `TEST`, in any case. The held-out one is the first that has
    a class of the training split. Files may lie in subfolders of their class.

    Args:
        root: the folder.
        resplit: whether the source is pooled anyway. Then it may lack a test, or have no splits,
            as `<folder>/<class>/<file>`.
    """
    if root is None:
        raise UsageError('A folder of images needs a place: --data_dir=<folder>.')
    train, *tests = _splits(root)
    alone = 'to hold images of each class out, --config.data.resplit_per_class=<how many>'
    if train is None and tests and resplit:
        raise UsageError(
            f'{root} has {tests[0].name}, which is taken for a split, and no folder called train: '
            'call the other split train; or, if it is a class, give it another name.'
        )
    if train is None and not resplit:
        raise UsageError(
            f'A folder of images is <split>/<class>/<file>, but {root} has no folder called train '
            f'with folders of classes in it, only {_names(root)}; if these are classes, {alone}.'
        )
    classes = _classes(train or root)
    held_out = next((path for path in tests if _holds_image(path, classes)), None)
    if held_out is None and not resplit:
        raise UsageError(
            f'{root} has no split to test with, called {", ".join(TEST)}, that has folders of '
            f'the classes of {train} with images in them, only {_names(root)}; {alone}.'
        )
    if held_out and held_out != tests[0]:
        say(f'{tests[0]} has no image of a known class: the test split is {held_out}.')
    for label in sorted(classes.keys() ^ _classes(held_out).keys() if held_out else ()):
        raise UsageError(f'Class {label} is in only one of {train} and {held_out}.')
    splits = [path for path in (train or root, held_out) if path]
    labels = sorted(classes, key=_natural)
    if len(labels) < 2:
        raise UsageError(f'Expected folders of two classes or more in {splits[0]}, got {labels}.')
    found, sizes, skipped = [], [], collections.Counter()
    for split, named in zip(splits, map(_classes, splits), strict=True):
        for path in _listed(split):
            if not path.is_dir() and split != root:
                skipped['files outside of classes'] += 1
        for k, label in enumerate(labels):
            paths = list(images_in(named[label], skipped))
            if not paths:
                raise UsageError(f'There is no image in {named[label]}.')
            found += [(path, k) for path in paths]
            sizes.append(len(paths))
    tell_skipped(root, skipped)
    return Source(
        _class_names(labels),
        num_train=sum(sizes[: len(labels)]),
        num_images=len(found),
        files=[path for path, _ in found],
        examples=lambda: ((str(path), str(path), k) for path, k in found),
    )


def has_splits(root: Path) -> bool:
    """Returns whether this is a folder of images with a training split."""
    return root.is_dir() and _splits(root)[0] is not None


def images_in(root: Path, skipped: collections.Counter) -> Iterator[Path]:
    """Yields the image files in a folder and its subfolders; counts the others by their kind.

    Hidden files and folders are as good as not there.
    """
    for path in _listed(root):
        looks_like_image = path.suffix.lower() in _extensions()
        if path.is_dir() and not looks_like_image:
            if path.is_symlink():  # May lead back here.
                skipped['links to folders'] += 1
            else:
                yield from images_in(path, skipped)
        elif path.is_file() and looks_like_image:
            yield path
        elif path.is_symlink() and not path.exists():
            skipped['dangling links'] += 1
        elif path.is_dir():
            skipped['folders called like images'] += 1
        else:
            skipped[path.suffix.lower() or 'without a suffix'] += 1


def tell_skipped(root: Path, skipped: collections.Counter):
    """Says on stderr what `images_in` has counted."""
    if skipped:
        kinds = ', '.join(f'{kind} ({count})' for kind, count in skipped.most_common(10))
        say(f'Skipped in {root}: {counted(skipped.total(), "file")} without an image: {kinds}.')


@functools.cache
def _extensions():
    """Returns the file name extensions of what Pillow reads by itself."""
    from PIL import Image

    _read_heic()
    known = Image.registered_extensions()
    foreign = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}  # Recognized, but not decoded.
    readable = {*Image.OPEN, 'MPO'} - foreign
    return {extension for extension, kind in known.items() if kind in readable} | {*_HEIC}


def _splits(root):
    """Returns the training split of a folder or None, then what may be its test."""
    folders = {path.name.lower(): path for path in reversed(_listed(root)) if path.is_dir()}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    # A class of vehicles is called so, too.
    has_classes = train and any(path.is_dir() for path in _listed(train))
    return (train if has_classes else None, *(folders[name] for name in TEST if name in folders))


def _classes(split):
    """Returns a split's folders by name, whose accents are composed: disks differ in that."""
    found = {}
    for path in _listed(split):
        if path.is_dir():
            name = unicodedata.normalize('NFC', path.name)
            if name in found:
                raise UsageError(f'{path} and {found[name]} differ only in how accents are spelt.')
            found[name] = path
    return found


def _holds_image(split, classes):
    """Returns whether a split has an image of one of these classes."""
    folders = (path for name, path in _classes(split).items() if name in classes)
    return any(path for folder in folders for path in images_in(folder, collections.Counter()))


def _names(root):
    """Returns what a folder shows as a person lists it."""
    names = [path.name for path in _listed(root)]
    rest = [f'and {len(names) - 10} more'] if len(names) > 10 else []
    return ', '.join(names[:10] + rest) or 'nothing'


def _natural(name):
    """Returns a key by which 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name))], name


_OF_SYSTEMS = ('.', '__MACOSX', '@eaDir')  # What systems leave behind in folders begins so.


def _listed(folder):
    """Returns what a folder shows, in order."""
    try:
        shown = [path for path in folder.iterdir() if not path.name.startswith(_OF_SYSTEMS)]
    except OSError as error:
        raise UsageError(f'Cannot read {folder}: {one_line(error)}') from error
    return sorted(shown, key=lambda path: _natural(path.name))


def tfds_directory(name: str, data_dir: Path | None) -> Source:
    """Returns the source that a TFDS directory holds under this name; may prepare it first."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        need = 'pip install tensorflow-datasets importlib_resources pillow'
        raise UsageError(f'Reading {name} needs TFDS ({one_line(error)}): {need}') from error
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder)
        builder = _builder(name, data_dir)
    held_out = 'test' if 'test' in builder.info.splits else 'validation'
    as_stored = {'image': tfds.decode.SkipDecoding()}
    try:
        image, label = (builder.info.features[key] for key in ('image', 'label'))
        if not (isinstance(image, tfds.features.Image) and image.np_dtype in (np.uint8, np.uint16)):
            raise ValueError(f'image is {image}')
        if not isinstance(label, tfds.features.ClassLabel):
            raise ValueError(f'label is {label}')
        splits = builder.as_data_source(['train', held_out], decoders=as_stored)
        names = tuple(map(_human, label.names))
    except (NotImplementedError, AttributeError, KeyError, ValueError) as error:
        raise UsageError(
            f'{name} in {builder.data_dir} cannot be used: it takes an image of whole numbers '
            f'called image and one class label called label, a train split beside a test or '
            f'validation split, and the array_record format '
            f'({one_line(error)}).'
        ) from error

    def examples():
        for split in splits:
            for start in range(0, len(split), 1000):
                stop = min(start + 1000, len(split))
                try:
                    records = split.__getitems__(range(start, stop))
                except RuntimeError as error:
                    raise UsageError(f'{builder.data_dir} is damaged: {one_line(error)}') from error
                for i, record in enumerate(records, start):
                    yield f'{i} of a split of {name}', record['image'], record['label']

    files = sorted(Path(builder.data_dir).iterdir())
    return Source(names, len(splits[0]), sum(map(len, splits)), files, examples)


def _builder(name, data_dir):
    """Returns TFDS's builder of this name."""
    import tensorflow_datasets as tfds
    from google.protobuf import json_format  # What TFDS reads its own files with.

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UsageError(f'No source is called {name}: not digits, folder or in TFDS.') from error
    except (AssertionError, ValueError, OSError, json_format.Error) as error:
        raise UsageError(f'TFDS cannot read {name}: {one_line(error)}') from error


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

    say(f'Preparing {builder.info.full_name} in {builder.data_dir_root}')
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
            f'{manual} and run again. The reason: {one_line(error)}'
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


def _class_names(labels):
    """Returns the names of a folder's classes: its own, but for those of the paper's data sets."""
    human = tuple(map(_human, labels))
    if {*human} == {*CIFAR10}:
        return human
    found = [SYNSETS.get(label, label) for label in labels]
    return tuple(name if found.count(name) == 1 else labels[k] for k, name in enumerate(found))


def _human(class_name):
    """Returns a class name as the paper writes it, 'golf_ball' as 'Golf Ball'."""
    words = class_name.replace('_', ' ').split()
    return SYNSETS.get(class_name) or ' '.join(word[0].upper() + word[1:] for word in words)


def one_line(error: Exception) -> str:
    """Returns what an exception says on one line."""
    return ' '.join(str(error).split()) or type(error).__name__
