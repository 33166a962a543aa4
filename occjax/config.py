"""Every number that changes a result, typed, in one tree that validates itself.

A field's limits are declared beside its default; what one field asks of another is in
`Config.rules`.
Where and how fast a run goes (device, engine, chunk, memory, directories) are flags of `launch.py`
and are not in here, so that `digest` names an experiment and not the machine it ran on.
"""

import dataclasses
import hashlib
import json
import math
import operator
import shlex
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from occjax import names
from occjax.types import UsageError

_MANY = 10**9  # More images than there are.
_NOUNS = {
    str: 'a text',
    bool: 'True or False',
    int: 'a whole number',
    int | None: 'None or a whole number',
    float: 'a number',
    tuple[int, ...]: 'a tuple of whole numbers',
    tuple[float, ...]: 'a tuple of numbers',
    tuple[tuple[int, int, float], ...]: 'a tuple of (size, stride, fill)',
}


def _limited(default, fits, expected):
    """Declares a field of which each value must fit."""
    return dataclasses.field(default=default, metadata={'fits': fits, 'expected': expected})


def number(low: float, high: float, default: Any = dataclasses.MISSING, *, ends='[]') -> Any:
    """Declares a number, or a tuple of numbers, in an interval; an end of `(` or `)` is not in it.

    Both ends are finite: what lies beyond makes no sense, runs for ever, or fills any memory.
    """
    above, from_ = (operator.gt, 'above') if ends[0] == '(' else (operator.ge, 'from')
    below, to = (operator.lt, 'to below') if ends[1] == ')' else (operator.le, 'to')
    expected = f'{from_} {low} {to} {high}'
    return _limited(default, lambda value: above(value, low) and below(value, high), expected)


def one_of(*choices: str) -> Any:
    """Declares one of several names; the first is the default."""
    return _limited(choices[0], choices.__contains__, f'one of {", ".join(choices)}')


def some_of(choices: tuple[str, ...], default: tuple[str, ...]) -> Any:
    """Declares a tuple of some of several names."""
    return _limited(default, choices.__contains__, f'a tuple of some of {", ".join(choices)}')


def _is_a(value, kind):
    """Whether a value is of an annotated type. A whole number is a number, a bool is none."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple and type(value) is tuple:
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(_is_a, value, kinds))
    return type(value) is kind or kind is float and (type(value) is int or isinstance(value, float))


def _require(holds, path, value, expected):
    """Raises the one line that names the field, what it is and what it may be."""
    if not holds:
        raise UsageError(f'config.{path} is {value!r}: expected {expected}.')


def _check(section, prefix=''):
    """Raises `UsageError` for the first field of another type, or beyond its limits."""
    for field in dataclasses.fields(section):
        path, value, kind = prefix + field.name, getattr(section, field.name), field.type
        if dataclasses.is_dataclass(kind):
            _require(isinstance(value, kind), path, value, f'a {kind.__name__}')
            _check(value, f'{path}.')
        else:
            fits = field.metadata.get('fits', lambda _: True)
            values = value if isinstance(value, tuple) else (value,)
            holds = _is_a(value, kind) and all(each is None or fits(each) for each in values)
            expected = f'{_NOUNS.get(kind, "")} {field.metadata.get("expected", "")}'.strip()
            _require(holds, path, value, expected)
            if kind == tuple[str, ...]:
                _require(len({*value}) == len(value), path, value, 'each of them once')


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    """Which images. `image_size` is their side in pixels after resizing and centre-cropping.

    A number of images of 0 means all of them.
    """

    name: str
    image_size: int = number(1, 4096)
    resplit_per_class: int | None = number(1, _MANY, None)
    train_images: int = number(0, _MANY, 0)
    test_images: int = number(0, _MANY, 0)


@dataclasses.dataclass(kw_only=True, slots=True)
class Classifier:
    """The classifier: a VGG and its training (§III-B), or one that is trained.

    `source` is 'vgg', '<file.py>:<function>' or 'torchvision:<name>:<file>', see `networks.load`;
    but for 'vgg' no other field of these is read.

    An epoch of few images goes over all of them again until it has at least `epoch_steps` steps.
    `flip` mirrors half of the training images, others in each epoch. `resize` has the side to which
    images are shrunk in each of the first epochs: an epoch at 64 pixels costs a twelfth of one at
    224 (progressive learning, https://arxiv.org/abs/2104.00298). The learning rate falls along a
    cosine over all epochs; with `restarts` along one per image side, so it begins anew at each.

    The last four are defences of §II. `label_smoothing` goes from the true class to all
    (https://arxiv.org/abs/1512.00567). `adversarial_epsilon` above 0 attacks half of each batch by
    FGSM (https://arxiv.org/abs/1611.01236); with an `ensemble` its source is drawn among the
    classifier and this number of others, trained before (https://arxiv.org/abs/1705.07204).
    `thermometer` is the number of levels of a thermometer encoding, 1 for none
    (https://openreview.net/forum?id=S18Su--CW).
    """

    source: str = 'vgg'
    plan: str = one_of(*names.PLANS)
    hidden: int = number(1, 2**14, 4096)
    epochs: int = number(1, 10**4)
    epoch_steps: int = number(0, 10**6, 0)
    batch_size: int = number(1, 2**16, 128)
    learning_rate: float = number(0, 1, ends='(]')
    dropout_rate: float = number(0, 1, 0.5, ends='[)')
    normalize: bool = True
    flip: bool = False
    resize: tuple[int, ...] = number(32, 4096, ())  # Less vanishes in five pools.
    restarts: bool = False
    label_smoothing: float = number(0, 1, 0.0, ends='[)')
    adversarial_epsilon: float = number(0, 1, 0.0)
    ensemble: int = number(0, 100, 0)
    thermometer: int = number(1, 256, 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Attack:
    """FGSM (§I, equation 1). `epsilon` is in [0, 1] pixels."""

    epsilon: float = number(0, 1)
    clip: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class Occlusion:
    """The grey square (§III-C), and how many images of each split are mapped.

    `threshold` and `every` make approximate maps, see `engine`; at 1 they are exact. Maps hold
    the logits of all classes, or of the `top_classes` that an image ranks highest and of the others
    together, see `types.condense`: so a thousand classes take the room of a few.
    """

    size: int = number(1, 4096)
    stride: int = number(1, 4096)
    fill: tuple[float, ...] = number(0, 1, (0.5,))
    grid: str = one_of(*names.GRIDS)
    train_images: int = number(0, _MANY, 0)
    test_images: int = number(0, _MANY, 0)
    threshold: float = number(0, 1, 1.0, ends='(]')
    every: int = number(1, 4096, 1)
    top_classes: int = number(0, 10**6, 0)

    @property
    def is_approximate(self) -> bool:
        """Whether maps are less than exact."""
        return self.threshold < 1 or self.every > 1


@dataclasses.dataclass(kw_only=True, slots=True)
class Detector:
    """The MLPs (§III-D), how they are fitted, and how maps are divided into fitting and scoring.

    `held_out_threshold_fraction` of the held out images set thresholds at a false positive rate and
    nothing else; with 0, those do that the detectors were fitted on, which know them by heart, and
    no detector can be put to use.
    With `noise` the held out images under random signs of the attack's size join the clean ones
    when detectors are fitted, which else take noise for an attack.
    """

    steps: int = number(1, 10**6, 1000)
    batch_size: int = number(1, 2**16, 128)
    learning_rate: float = number(0, 1, 1e-3, ends='(]')
    balance: str = one_of(*names.BALANCES)
    paper_fit_fraction: float = number(0, 1, 0.8, ends='()')
    held_out_fit_fraction: float = number(0, 1, 0.5, ends='()')
    held_out_threshold_fraction: float = number(0, 1, 0.0, ends='[)')
    seeds: int = number(1, 1000, 5)
    noise: bool = False
    methods: tuple[str, ...] = some_of(names.METHODS, names.METHODS)


@dataclasses.dataclass(kw_only=True, slots=True)
class Sweep:
    """What `--mode=sweep` attacks some test images with, and what detectors see of them.

    FGSM at every epsilon; the other attacks at every one of `attack_epsilons`, or at
    `attack.epsilon` if it is (), those of several `steps` with as many. `pgd_l2` has a ball of the
    L2 norm of FGSM's step; `carlini_wagner` and `deepfool` have none, and go as far as it takes.

    Detectors of `methods` are fitted on FGSM at each epsilon, on the `mixture` of attacks, and on
    the mixture without each of them; with `noise` every one also on clean images under random
    signs. `views` are stored beside the windows. With `windows` other ones are tried too:
    `occluders` are (size, stride, fill), () a few beside the config's own. multiLID seeks an
    image's `neighbours` among `comparators.images` of training. `twin` is the work directory of
    another classifier of the same images, which SID and PID ask too.
    """

    epsilons: tuple[float, ...] = number(
        0, 1, (*(n / 255 for n in (1, 2, 4, 8, 16)), 0.05, 0.1, 0.2), ends='(]'
    )
    attacks: tuple[str, ...] = some_of(names.ATTACKS, names.ATTACKS[:5])
    attack_epsilons: tuple[float, ...] = number(0, 1, (), ends='(]')
    mixture: tuple[str, ...] = some_of(('fgsm', *names.ATTACKS), ())
    noise: bool = False
    views: tuple[str, ...] = some_of(names.VIEWS, ())
    occluders: tuple[tuple[int, int, float], ...] = ()
    windows: bool = True
    methods: tuple[str, ...] = some_of(
        (*names.METHODS, *names.VIEWING, *names.RIVALS, 'pid', *names.COMPARATORS),
        ('detector', 'all_logits'),
    )
    neighbours: int = number(2, 1000, 20)
    twin: str = ''
    steps: int = number(1, 10**4, 10)
    images: int = number(1, _MANY, 1000)


_DIFFERENTIABLE = tuple(n for n in (*names.METHODS, *names.VIEWING) if n != 'shuffled_cells')


@dataclasses.dataclass(kw_only=True, slots=True)
class Adaptive:
    """What `--mode=adaptive` attacks classifier and detectors with, see `adaptive`.

    `weight` is the joint attack's; each of the `images` takes up to `steps`. Detectors that see
    views are the sweep's, fitted on its mixture; in `rounds` they are fitted again with what the
    attacks on them made of fitting images.
    """

    epsilons: tuple[float, ...] = number(0, 1, (*(n / 255 for n in (1, 2, 4, 8)), 0.1), ends='(]')
    attacks: tuple[str, ...] = some_of(names.JOINT_ATTACKS, names.JOINT_ATTACKS)
    methods: tuple[str, ...] = some_of(_DIFFERENTIABLE, ('detector', 'all_logits'))
    steps: int = number(1, 10**4, 40)
    images: int = number(1, _MANY, 100)
    weight: float = number(0, 10**6, 1.0)
    rounds: int = number(0, 100, 0)


@dataclasses.dataclass(kw_only=True, slots=True)
class Comparators:
    """Detectors without heat maps (§II), see `comparators`.

    `bits` and `median` (its side in pixels) squeeze features; `steps` fit MagNet's autoencoder on
    patches of as many training `images`, `temperature` divides the logits that it compares.
    """

    bits: int = number(1, 8, 5)
    median: int = number(1, 15, 2)
    steps: int = number(1, 10**6, 1000)
    images: int = number(1, _MANY, 2000)
    temperature: float = number(0, 10**6, 10.0, ends='(]')


# Sections that only their own modes read: another value of theirs is no other experiment.
_PROBES = ('sweep', 'adaptive')


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    """One experiment, from images to tables.

    `precision` is that of products of float32 matrices, see `jax.default_matmul_precision`.
    """

    seed: int = number(0, 2**31 - 1, 0)
    precision: str = one_of('float32', 'tensorfloat32', 'bfloat16')  # ours: not stated
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
        _check(self)
        for path, holds, expected in self.rules():
            _require(holds, path, operator.attrgetter(path)(self), expected)

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yields the field, whether it fits the others, and what is expected of it."""
        side, net, windows = self.data.image_size, self.classifier, self.occlusion
        fits = net.source == 'vgg' or ':' in net.source
        yield 'classifier.source', fits, "'vgg', '<file.py>:<function>' or 'torchvision:…'"
        yield 'data.name', self.data.name != '', 'digits, folder or the name of a TFDS set'
        fits = len(net.resize) <= net.epochs and max(net.resize, default=0) <= side
        yield 'classifier.resize', fits, f'sides up to {side}, at most one for each epoch'
        fits = not net.ensemble or net.adversarial_epsilon > 0
        yield 'classifier.ensemble', fits, '0, unless adversarial_epsilon is above 0'
        most = side - (windows.grid == 'paper')
        yield 'occlusion.size', windows.size <= most, f'at most {most} under grid={windows.grid}'
        fits = len(windows.fill) in (0, 1, 3)
        yield 'occlusion.fill', fits, 'one value, three, or () for the mean of training'
        yield 'detector.methods', 'detector' in self.detector.methods, "'detector' and others"
        left = 1 - self.detector.held_out_fit_fraction
        fits = self.detector.held_out_threshold_fraction < left - 1e-9  # 1 - 0.7 is above 0.3.
        expected = f'less than the {left:g} that held_out_fit_fraction leaves'
        yield 'detector.held_out_threshold_fraction', fits, expected
        fits = all(
            0 < s < side and 0 < t <= 4096 and 0 <= f <= 1 for s, t, f in self.sweep.occluders
        )
        yield 'sweep.occluders', fits, f'sizes below {side}, strides from 1, fills from 0 to 1'
        fits = set(self.sweep.mixture) <= {'fgsm', *self.sweep.attacks}
        yield 'sweep.mixture', fits, "'fgsm' and some of sweep.attacks"
        sees = {*self.sweep.methods, *self.adaptive.methods}
        fits = self.sweep.views != () or not {*names.VIEWING} & sees
        yield 'sweep.views', fits, f'at least one, for {" and ".join(names.VIEWING)}'
        fits = 'all_views' not in self.adaptive.methods or 'all_views' in self.sweep.methods
        yield 'adaptive.methods', fits, 'all_views only if sweep.methods has it, which maps windows'
        fits = self.sweep.twin != '' or not set(names.TWINNED) & set(self.sweep.methods)
        expected = f'the work directory of another classifier, for {" and ".join(names.TWINNED)}'
        yield 'sweep.twin', fits, expected
        for path in ('sweep.epsilons', 'sweep.methods', 'adaptive.epsilons', 'adaptive.methods'):
            yield path, operator.attrgetter(path)(self) != (), 'at least one'


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


# How many images are mapped: a map does not depend on it.
EXTENTS = ('train_images', 'test_images')


def extends(stored: dict, wanted: dict) -> bool:
    """Returns whether a `to_json` tree is that of the same experiment with more images mapped."""

    def divided(tree):
        occlusion = dict(tree['occlusion'])
        extents = [occlusion.pop(name) or math.inf for name in EXTENTS]  # 0 is all.
        return identity(tree | {'occlusion': occlusion}), extents

    (before, least), (after, extents) = divided(stored), divided(wanted)
    return before == after and all(map(operator.le, least, extents))


# The fields that each stage reads, beside those of the stages before it.
_READS = {
    'train': ('seed', 'precision', 'data', 'classifier'),
    'heatmaps': ('attack', 'occlusion', 'comparators'),
    'detectors': ('detector',),
}


def digest(config: Config, stage: str | None = None) -> str:
    """Returns 16 hex digits that two configs share exactly if they are one experiment.

    Args:
        config: the experiment.
        stage: what this one reads, and those before it, is all that counts: a classifier does not
            depend on the attack, nor a map on how many there are. None is everything.
    """
    stages = list(_READS)
    meant = stages if stage is None else stages[: stages.index(stage) + 1]
    sections = [name for each in meant for name in _READS[each]]
    tree = _chosen(config)
    tree.get('detector', {}).pop('methods', None)
    if stage is not None:
        for name in EXTENTS:
            tree.get('occlusion', {}).pop(name, None)
    tree = json.dumps({name: tree[name] for name in sections if tree.get(name)})
    canonical = json.dumps(json.loads(tree, parse_int=float), sort_keys=True)  # 0 is 0.0.
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _chosen(section):
    """Returns the fields that are not at their defaults, so that a later one changes no digest."""
    return {
        field.name: _chosen(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(section)
        if (value := getattr(section, field.name)) != field.default
    }


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


def from_json(stored: dict) -> Config:
    """Returns the config of a `to_json` tree, with the defaults of fields that came after it."""

    def made(kind, value):
        if dataclasses.is_dataclass(kind):
            known = {f.name: f.type for f in dataclasses.fields(kind) if f.name in value}
            return kind(**{name: made(each, value[name]) for name, each in known.items()})
        return tuple(made(None, each) for each in value) if isinstance(value, list) else value

    return made(Config, stored)


def adopted(stored: dict, config: Config, overrides: Iterable[str], *, is_chosen: bool) -> Config:
    """Returns the config of a `to_json` tree, with what a command says of its own.

    Args:
        stored: the tree of the run that the command looks at.
        config: the command's.
        overrides: the fields that the command sets, such as `attack.epsilon`.
        is_chosen: whether it also names the config file. That says which images, and how to probe.
    """
    result, own = from_json(stored), (*_PROBES, 'data.name') if is_chosen else ()
    for path in (*own, *overrides):
        section, _, field = path.rpartition('.')
        value = operator.attrgetter(path)(config)
        setattr(operator.attrgetter(section)(result) if section else result, field, value)
    return result


def difference(stored: dict, wanted: dict, prefix: str = '') -> list[str]:
    """Returns `field: stored -> wanted` for every leaf in which two `to_json` trees differ."""
    leaves = _different(stored, wanted, prefix)
    return [f'{path}: {left!r} -> {right!r}' for path, left, right in leaves]


def flags_of(stored: dict, wanted: dict) -> list[str]:
    """Returns the flags that make the first tree of the second one, as a shell takes them."""
    leaves = [(path, left) for path, left, _ in _different(stored, wanted)]
    values = [(path, tuple(v) if isinstance(v, list) else v) for path, v in leaves]
    return [shlex.quote(f'--config.{path}={v}'.replace(' ', '')) for path, v in values]


def _different(stored, wanted, prefix=''):
    """Yields path and both values of every leaf in which two `to_json` trees differ."""
    for key in sorted(stored.keys() | wanted.keys()):
        left, right = stored.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _different(left, right, f'{prefix}{key}.')
        elif left != right:
            yield prefix + key, left, right
