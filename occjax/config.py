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
    """The VGG and its training (§III-B).

    `resize` has the side to which images are shrunk in each of the first epochs: an epoch at 64
    pixels costs a twelfth of one at 224 (progressive learning, https://arxiv.org/abs/2104.00298).

    The last four are defences of §II. `label_smoothing` goes from the true class to all
    (https://arxiv.org/abs/1512.00567). `adversarial_epsilon` above 0 attacks half of each batch by
    FGSM (https://arxiv.org/abs/1611.01236); with an `ensemble` its source is drawn among the
    classifier and as many others, trained before (https://arxiv.org/abs/1705.07204).
    `thermometer` is the number of levels of a thermometer encoding, 1 for none
    (https://openreview.net/forum?id=S18Su--CW).
    """

    plan: str = 'vgg11'
    hidden: int = 4096
    epochs: int
    batch_size: int = 128
    learning_rate: float
    dropout_rate: float = 0.5
    normalize: bool = True
    resize: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    adversarial_epsilon: float = 0.0
    ensemble: int = 0
    thermometer: int = 1

    def validate(self, image_size: int):
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
        # Below 32 pixels nothing is left after five pools.
        fits = all(32 <= side <= image_size for side in self.resize)
        expected = f"sides from 32 to the images' {image_size}, one for each epoch at most"
        fits = fits and len(self.resize) <= self.epochs
        _require(fits, 'classifier.resize', self.resize, expected)
        share = self.label_smoothing
        _require(0 <= share < 1, 'classifier.label_smoothing', share, 'a share below 1')
        epsilon = self.adversarial_epsilon
        expected = 'a number from 0 to 1'
        _require(0 <= epsilon <= 1, 'classifier.adversarial_epsilon', epsilon, expected)
        count, expected = self.ensemble, 'a count, above 0 only with adversarial_epsilon'
        fits = count == 0 or count > 0 and epsilon > 0
        _require(fits, 'classifier.ensemble', count, expected)
        levels, expected = self.thermometer, 'a number of levels, 1 for none'
        _require(levels >= 1, 'classifier.thermometer', levels, expected)


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
    """The grey square (§III-C), and how many images of each split are mapped.

    `threshold` and `every` make approximate maps, see `approximate`; at 1 they are exact.
    """

    size: int
    stride: int
    fill: tuple[float, ...] = (0.5,)
    grid: str = 'paper'
    train_images: int = 0
    test_images: int = 0
    threshold: float = 1.0
    every: int = 1

    @property
    def is_approximate(self) -> bool:
        """Whether maps are less than exact."""
        return self.threshold < 1 or self.every > 1

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
        share = self.threshold
        _require(0 < share <= 1, 'occlusion.threshold', share, 'a share above 0, 1 for exact maps')
        _require(self.every >= 1, 'occlusion.every', self.every, 'at least 1, for all windows')


# Of `methods.METHODS`, spelled out: what stands there imports JAX and more.
METHODS = (
    'detector',
    'pooled',
    'linear_probe',
    'relative_map',
    'shuffled_cells',
    'log_map',
    'unoccluded_logits',
    'all_logits',
    'logit_differences',
    'conv_logits',
)


@dataclasses.dataclass(kw_only=True)
class Detector:
    """The MLPs (§III-D), how they are fitted, and how maps are divided into fitting and scoring.

    `held_out_threshold_fraction` of the held out images set thresholds at a false positive rate and
    nothing else; with 0, those do that the detectors were fitted on, which know them by heart.
    """

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    balance: str = 'undersample'
    paper_fit_fraction: float = 0.8
    held_out_fit_fraction: float = 0.5
    held_out_threshold_fraction: float = 0.0
    seeds: int = 5
    methods: tuple[str, ...] = METHODS

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        for field in ('steps', 'batch_size', 'seeds'):
            value = getattr(self, field)
            _require(value >= 1, f'detector.{field}', value, 'at least 1')
        rate = self.learning_rate
        _require(rate > 0, 'detector.learning_rate', rate, 'a positive number')
        balances = ('undersample', 'weights', 'none')
        expected = f'one of {", ".join(balances)}'
        _require(self.balance in balances, 'detector.balance', self.balance, expected)
        known = set(self.methods) <= set(METHODS) and 'detector' in self.methods
        expected = f"'detector' and others of {', '.join(METHODS[1:])}"
        _require(known, 'detector.methods', self.methods, expected)
        for field in ('paper_fit_fraction', 'held_out_fit_fraction'):
            value = getattr(self, field)
            _require(0 < value < 1, f'detector.{field}', value, 'a share between 0 and 1')
        value, fitted = self.held_out_threshold_fraction, self.held_out_fit_fraction
        expected = f'a share from 0 that leaves some beside held_out_fit_fraction={fitted:g}'
        fits = 0 <= value < 1 - fitted
        _require(fits, 'detector.held_out_threshold_fraction', value, expected)


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """What `--mode=sweep` attacks some test images with, and what windows it maps them with.

    FGSM at every epsilon; the other attacks at `attack.epsilon`, those of several `steps` with as
    many. `occluders` are (size, stride, fill), beside the config's own; each maps FGSM at
    `attack.epsilon`.
    """

    epsilons: tuple[float, ...] = tuple(n / 255 for n in (1, 2, 4, 8, 16)) + (0.05, 0.1, 0.2)
    attacks: tuple[str, ...] = ('targeted_fgsm', 'bim', 'pgd', 'mi_fgsm', 'square')
    occluders: tuple[tuple[int, int, float], ...] = ()
    methods: tuple[str, ...] = ('detector', 'all_logits')
    steps: int = 10
    images: int = 1000

    def validate(self, image_size: int):
        """Raises `UsageError` for the first field that makes no sense."""
        in_range = self.epsilons and all(0 < epsilon <= 1 for epsilon in self.epsilons)
        _require(bool(in_range), 'sweep.epsilons', self.epsilons, 'numbers above 0, up to 1')
        known = ('targeted_fgsm', 'bim', 'pgd', 'mi_fgsm', 'square')
        expected = f'some of {", ".join(known)}'
        _require(set(self.attacks) <= set(known), 'sweep.attacks', self.attacks, expected)
        for occluder in self.occluders:
            expected = f'(size below {image_size}, stride, fill from 0 to 1)'
            _require(len(occluder) == 3, 'sweep.occluders', occluder, expected)
            size, stride, fill = occluder
            fits = 1 <= size < image_size and stride >= 1 and 0 <= fill <= 1
            _require(fits, 'sweep.occluders', occluder, expected)
        known = set(self.methods) <= set(METHODS)
        _require(known, 'sweep.methods', self.methods, f'some of {", ".join(METHODS)}')
        for field in ('steps', 'images'):
            value = getattr(self, field)
            _require(value >= 1, f'sweep.{field}', value, 'at least 1')


@dataclasses.dataclass(kw_only=True)
class Adaptive:
    """What `--mode=adaptive` attacks classifier and detectors with, see `adaptive`.

    `weight` is the joint attack's; each of the `images` takes up to `steps`.
    """

    epsilons: tuple[float, ...] = tuple(n / 255 for n in (1, 2, 4, 8)) + (0.1,)
    attacks: tuple[str, ...] = ('joint', 'selective', 'orthogonal')
    methods: tuple[str, ...] = ('detector', 'all_logits')
    steps: int = 40
    images: int = 100
    weight: float = 1.0

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        in_range = self.epsilons and all(0 < epsilon <= 1 for epsilon in self.epsilons)
        _require(bool(in_range), 'adaptive.epsilons', self.epsilons, 'numbers above 0, up to 1')
        _require(bool(self.methods), 'adaptive.methods', self.methods, 'at least one')
        known = ('joint', 'selective', 'orthogonal')
        expected = f'some of {", ".join(known)}'
        _require(set(self.attacks) <= set(known), 'adaptive.attacks', self.attacks, expected)
        known = [name for name in METHODS if name != 'shuffled_cells']  # It has no gradient.
        expected = f'some of {", ".join(known)}'
        _require(set(self.methods) <= set(known), 'adaptive.methods', self.methods, expected)
        for field in ('steps', 'images'):
            value = getattr(self, field)
            _require(value >= 1, f'adaptive.{field}', value, 'at least 1')
        _require(self.weight >= 0, 'adaptive.weight', self.weight, 'a number from 0')


@dataclasses.dataclass(kw_only=True)
class Comparators:
    """Detectors without heat maps (§II), see `comparators`.

    `bits` and `median` (its side in pixels) squeeze features; `steps` fit MagNet's autoencoder on
    patches of as many `images`, `temperature` divides the logits that it compares.
    """

    bits: int = 5
    median: int = 2
    steps: int = 1000
    images: int = 2000
    temperature: float = 10.0

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        _require(1 <= self.bits <= 8, 'comparators.bits', self.bits, 'a number from 1 to 8')
        for field in ('median', 'steps', 'images'):
            value = getattr(self, field)
            _require(value >= 1, f'comparators.{field}', value, 'at least 1')
        value = self.temperature
        _require(value > 0, 'comparators.temperature', value, 'a positive number')


# Sections that only their own modes read: another value of theirs is no other experiment.
_PROBES = ('sweep', 'adaptive')


@dataclasses.dataclass(kw_only=True)
class Config:
    """One experiment, from images to tables."""

    seed: int = 0
    data: Data
    classifier: Classifier
    attack: Attack
    occlusion: Occlusion
    detector: Detector = dataclasses.field(default_factory=Detector)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    adaptive: Adaptive = dataclasses.field(default_factory=Adaptive)
    comparators: Comparators = dataclasses.field(default_factory=Comparators)

    def validate(self):
        """Raises `UsageError` for the first field that makes no sense."""
        _require(0 <= self.seed < 2**31, 'seed', self.seed, 'a number from 0 to 2147483647')
        self.data.validate()
        self.classifier.validate(self.data.image_size)
        self.attack.validate()
        self.occlusion.validate(self.data.image_size)
        self.detector.validate()
        self.sweep.validate(self.data.image_size)
        self.adaptive.validate()
        self.comparators.validate()


def to_json(config: Config) -> dict:
    """Returns the config as nested dictionaries that JSON can hold and give back unchanged."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def identity(tree: dict) -> dict:
    """Returns a `to_json` tree without what may differ between runs in one work directory.

    That is what probes a finished experiment, and which detectors are fitted, each of which is
    stored on its own.
    """
    tree = {name: value for name, value in tree.items() if name not in _PROBES}
    detector = {name: v for name, v in tree['detector'].items() if name != 'methods'}
    return tree | {'detector': detector}


def digest(config: Config) -> str:
    """Returns 16 hex digits that two configs share exactly if they are one experiment."""
    canonical = json.dumps(identity(to_json(config)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def complete(stored: dict) -> dict:
    """Returns a stored `to_json` tree with the defaults of fields that came after it was stored.

    A new field's default is what was done before there was a choice.
    """

    def filled(cls, tree):
        result = dict(tree)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                result[field.name] = filled(field.type, tree.get(field.name, {}))
            elif field.default is not dataclasses.MISSING:
                result.setdefault(field.name, field.default)
        return result

    return json.loads(json.dumps(filled(Config, stored)))


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
