"""Every number that changes a result, typed, in one tree that validates itself.

Where and how fast a run goes (device, engine, chunk, memory, directories) are flags of `launch.py`
and stand nowhere in here, so that `digest` names an experiment and not the machine it ran on.
"""

import dataclasses
import hashlib
import json

from occjax.types import UsageError


def _require(holds: bool, field: str, value, expected: str):
    """Raises the one line that names the field, what it is and what it may be."""
    if not holds:
        raise UsageError(f'config.{field} is {value!r}: expected {expected}.')


@dataclasses.dataclass(kw_only=True)
class Data:
    """Which images. `image_size` is their side in pixels after resizing and centre-cropping."""

    name: str
    image_size: int
    resplit_per_class: int | None = None
    train_images: int = 0
    test_images: int = 0

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        _require(
            bool(self.name), 'data.name', self.name, 'digits, folder or the name of a TFDS set'
        )
        _require(self.image_size >= 1, 'data.image_size', self.image_size, 'at least 1 pixel')
        if self.resplit_per_class is not None:
            resplit = self.resplit_per_class
            _require(resplit >= 1, 'data.resplit_per_class', resplit, 'at least 1 image')
        for field in ('train_images', 'test_images'):
            value = getattr(self, field)
            _require(value >= 0, f'data.{field}', value, 'a count, or 0 for all')


@dataclasses.dataclass(kw_only=True)
class Classifier:
    """The VGG and its training (§III-B)."""

    plan: str = 'vgg11'
    hidden: int = 4096
    epochs: int
    batch_size: int = 128
    learning_rate: float
    dropout_rate: float = 0.5
    normalize: bool = True

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        plans = ('vgg11', 'vgg13', 'vgg16', 'vgg19')
        _require(self.plan in plans, 'classifier.plan', self.plan, f'one of {", ".join(plans)}')
        for field in ('hidden', 'epochs', 'batch_size'):
            value = getattr(self, field)
            _require(value >= 1, f'classifier.{field}', value, 'at least 1')
        rate = self.learning_rate
        _require(rate > 0, 'classifier.learning_rate', rate, 'a positive number')
        rate = self.dropout_rate
        _require(0 <= rate < 1, 'classifier.dropout_rate', rate, 'a probability below 1')


@dataclasses.dataclass(kw_only=True)
class Attack:
    """FGSM (§I, equation 1). `epsilon` is in [0, 1] pixels."""

    epsilon: float
    clip: bool = True

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        _require(0 <= self.epsilon <= 1, 'attack.epsilon', self.epsilon, 'a number from 0 to 1')


@dataclasses.dataclass(kw_only=True)
class Occlusion:
    """The grey square (§III-C), and how many images of each split are mapped."""

    size: int
    stride: int
    fill: tuple[float, ...] = (0.5,)
    grid: str = 'paper'
    train_images: int = 0
    test_images: int = 0

    def validate(self, image_size: int):
        """Raises `UsageError` for the first field that makes no sense."""
        size = self.size
        expected = f'a side from 1 to the {image_size} pixels of an image'
        _require(1 <= size <= image_size, 'occlusion.size', size, expected)
        _require(self.stride >= 1, 'occlusion.stride', self.stride, 'at least 1 pixel')
        grids = ('paper', 'floor', 'cover')
        _require(self.grid in grids, 'occlusion.grid', self.grid, f'one of {", ".join(grids)}')
        expected = f'less than the {image_size} pixels of an image under grid=paper'
        _require(self.grid != 'paper' or size < image_size, 'occlusion.size', size, expected)
        expected = 'one value, three (one a channel), or () for the training mean'
        _require(len(self.fill) in (0, 1, 3), 'occlusion.fill', self.fill, expected)
        in_range = all(0 <= value <= 1 for value in self.fill)
        _require(in_range, 'occlusion.fill', self.fill, 'pixels from 0 to 1')
        for field in ('train_images', 'test_images'):
            value = getattr(self, field)
            _require(value >= 0, f'occlusion.{field}', value, 'a count, or 0 for all')


@dataclasses.dataclass(kw_only=True)
class Detector:
    """The MLPs (§III-D), how they are fitted, and how maps are divided into fitting and scoring."""

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    balance: str = 'undersample'
    paper_fit_fraction: float = 0.8
    held_out_fit_fraction: float = 0.5

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        for field in ('steps', 'batch_size'):
            value = getattr(self, field)
            _require(value >= 1, f'detector.{field}', value, 'at least 1')
        rate = self.learning_rate
        _require(rate > 0, 'detector.learning_rate', rate, 'a positive number')
        balances = ('undersample', 'weights', 'none')
        expected = f'one of {", ".join(balances)}'
        _require(self.balance in balances, 'detector.balance', self.balance, expected)
        for field in ('paper_fit_fraction', 'held_out_fit_fraction'):
            value = getattr(self, field)
            _require(0 < value < 1, f'detector.{field}', value, 'a share between 0 and 1')


@dataclasses.dataclass(kw_only=True)
class Config:
    """One experiment, from images to tables."""

    seed: int = 0
    data: Data
    classifier: Classifier
    attack: Attack
    occlusion: Occlusion
    detector: Detector = dataclasses.field(default_factory=Detector)

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        _require(0 <= self.seed < 2**31, 'seed', self.seed, 'a number from 0 to 2147483647')
        self.data.validate()
        self.classifier.validate()
        self.attack.validate()
        self.occlusion.validate(self.data.image_size)
        self.detector.validate()


def to_json(config: Config) -> dict:
    """Returns the config as nested dictionaries that JSON can hold and give back unchanged."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(config: Config) -> str:
    """Returns 16 hex digits that two configs share exactly if all their values are equal."""
    canonical = json.dumps(to_json(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def difference(stored: dict, wanted: dict, prefix: str = '') -> list[str]:
    """Returns `field: stored -> wanted` for every leaf in which two `to_json` trees differ."""
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        left, right = stored.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += difference(left, right, f'{prefix}{key}.')
        elif left != right:
            lines.append(f'{prefix}{key}: {left!r} -> {right!r}')
    return lines
