"""Laws of configs: what is no experiment is refused by its field's name; equals share a name."""

import dataclasses
import operator
import re

import numpy as np
import pytest

from configs import cifar10, digits, folder, imagenette
from occjax import config
from occjax.types import UsageError

NAN, INF = float('nan'), float('inf')


def changed(field, value):
    """Returns the digits' config with another value of the field `<section>.<name>`."""
    result = digits.get_config()
    *path, name = field.split('.')
    owner = operator.attrgetter('.'.join(path))(result) if path else result
    assert name in {f.name for f in dataclasses.fields(owner)}
    setattr(owner, name, value)
    return result


def leaves(section, prefix=''):
    """Yields the name, the value and the annotation of every field that is no section."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f'{name}.')
        else:
            yield name, value, field.type


LEAVES = list(leaves(digits.get_config()))


@pytest.mark.parametrize(
    'get_config',
    [
        *(m.get_config for m in (digits, cifar10, folder, imagenette)),
        lambda: cifar10.get_config('quick'),
    ],
)
def test_configs_are_valid_and_survive_json(get_config):
    wanted = get_config()
    wanted.validate()
    assert config.difference(config.to_json(wanted), config.to_json(get_config())) == []
    other = get_config()
    other.seed = 1
    assert config.digest(other) != config.digest(wanted)


def refuses(field, value, expected=''):
    line = f'config.{field} is {value!r}: expected '
    with pytest.raises(UsageError, match=f'^{re.escape(line)}.*{re.escape(expected)}.*[.]$'):
        changed(field, value).validate()


@pytest.mark.parametrize(
    ('field', 'value', 'expected'),
    [
        ('seed', -1, 'a whole number from 0 to 2147483647'),
        ('seed', 2**31, 'a whole number from 0 to 2147483647'),
        ('precision', 'highest', 'one of float32, tensorfloat32, bfloat16'),
        ('data', None, 'a Data'),
        ('data.name', '', 'digits, folder or the name'),
        ('data.train_images', -5, 'from 0 to'),
        ('data.resplit_per_class', 0, 'None or a whole number from 1'),
        ('classifier.plan', 'vgg12', 'one of vgg11, vgg13'),
        ('classifier.dropout_rate', 1.0, 'from 0 to below 1'),
        ('classifier.learning_rate', 0.0, 'above 0'),
        ('classifier.epochs', 0, 'from 1'),
        ('classifier.resize', (16,), 'from 32'),
        ('classifier.resize', (64,), 'sides up to 32'),
        ('classifier.resize', (32,) * 99, 'one for each epoch'),
        ('classifier.ensemble', 1, 'unless adversarial_epsilon is above 0'),
        ('attack.epsilon', 8.0, 'a number from 0 to 1'),
        ('occlusion.size', 33, 'at most 31 under grid=paper'),
        ('occlusion.size', 32, 'at most 31 under grid=paper'),
        ('occlusion.stride', 0, 'from 1'),
        ('occlusion.grid', 'full', 'one of paper, floor, cover'),
        ('occlusion.fill', (0.1, 0.2), 'one value, three'),
        ('occlusion.fill', (128.0,), 'a tuple of numbers from 0 to 1'),
        ('occlusion.fill', [0.5], 'a tuple of numbers'),
        ('occlusion.threshold', 0.0, 'above 0'),
        ('occlusion.every', 0, 'from 1'),
        ('detector.seeds', 0, 'from 1'),
        ('detector.balance', 'oversample', 'one of undersample'),
        ('detector.methods', ('pooled',), "'detector' and others"),
        ('detector.methods', ('detector', 'magic'), 'some of detector, pooled'),
        ('detector.methods', 'detector', 'some of detector, pooled'),
        ('detector.held_out_fit_fraction', 1.0, 'above 0 to below 1'),
        ('detector.held_out_threshold_fraction', 0.6, 'held_out_fit_fraction leaves'),
        ('data.name', 5, 'a text'),
        ('sweep.views', ('flip', 'flip'), 'each of them once'),
        ('sweep.epsilons', (0.0,), 'above 0'),
        ('sweep.epsilons', (), 'at least one'),
        ('sweep.attacks', ('fgsm',), 'some of targeted_fgsm'),
        ('sweep.occluders', ((5, 1),), '(size, stride, fill)'),
        ('sweep.neighbours', 1, 'from 2 to 1000'),
        ('sweep.occluders', ((5, 1, NAN),), 'fills from 0 to 1'),
        ('sweep.occluders', ((32, 1, 0.5),), 'sizes below 32'),
        ('sweep.steps', 0, 'from 1'),
        ('adaptive.methods', ('shuffled_cells',), 'some of detector'),
        ('adaptive.methods', (), 'at least one'),
        ('comparators.bits', 9, 'from 1 to 8'),
    ],
)
def test_a_config_names_the_field_that_is_wrong(field, value, expected):
    refuses(field, value, expected)


@pytest.mark.parametrize(('field', 'own', 'kind'), LEAVES, ids=[name for name, *_ in LEAVES])
def test_every_field_is_of_its_type_and_bounded(field, own, kind):
    """Whatever is no number, is not finite, or would fill any memory, in every field there is."""
    wrong = [{}, [], NAN, INF, -INF, 10**12, 10**400, 1e300, -1, (None,), (NAN,), ((),), b'a']
    wrong += [] if field in ('data.name', 'sweep.twin') else ['a']
    wrong += [] if kind is bool else [True]
    wrong += [] if kind == int | None else [None]
    wrong += [1.5, 1.0] if kind in (int, int | None) else [1] if kind in (bool, str) else []
    for value in wrong:
        refuses(field, value)
        if isinstance(own, tuple):
            refuses(field, (value,))
    changed(field, own).validate()


def test_ends_of_an_interval_are_in_it_or_not():
    for field, least, most in [
        ('seed', 0, 2**31 - 1),
        ('attack.epsilon', 0, 1),
        ('attack.epsilon', 0.0, np.float64(1.0)),
        ('data.resplit_per_class', None, 1),
        ('occlusion.fill', (0,), (1, 1, 1)),
        ('occlusion.fill', (), (0.0,)),
        ('comparators.bits', 1, 8),
    ]:
        changed(field, least).validate()
        changed(field, most).validate()


def test_a_misspelt_field_is_no_field():
    with pytest.raises(AttributeError, match='step'):
        digits.get_config().detector.step = 5


def test_a_whole_number_is_the_number_that_it_is():
    """`--config.occlusion.fill=0` is the experiment of `fill=(0.0,)`."""
    whole, real = changed('occlusion.fill', (0,)), changed('occlusion.fill', (0.0,))
    assert config.digest(whole) == config.digest(real)
    assert config.digest(whole) != config.digest(changed('occlusion.fill', (0.1,)))


def test_a_stage_does_not_depend_on_what_it_does_not_read():
    wanted = digits.get_config()
    stages = ('train', 'heatmaps', 'detectors')
    for field, value, first in [
        ('classifier.flip', True, 0),
        ('attack.epsilon', 0.2, 1),
        ('occlusion.stride', 4, 1),
        ('occlusion.train_images', 7, 3),
        ('occlusion.test_images', 7, 3),
        ('detector.steps', 7, 2),
        ('detector.methods', ('detector',), 3),
        ('sweep.images', 7, 3),
    ]:
        other = changed(field, value)
        differ = [config.digest(other, at) != config.digest(wanted, at) for at in stages]
        assert differ == [number >= first for number in range(3)], field
        probes = ('detector.methods', 'sweep.images')
        assert (config.digest(other) == config.digest(wanted)) == (field in probes)


def test_a_field_that_comes_later_changes_no_digest_at_its_default():
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Attack(config.Attack):
        restarts: int = 1

    now, later = digits.get_config(), digits.get_config()
    later.attack = Attack(epsilon=now.attack.epsilon, clip=now.attack.clip)
    assert config.digest(later) == config.digest(now)
    later.attack.restarts = 2
    assert config.digest(later) != config.digest(now)


def test_some_images_are_left_to_judge():
    wanted = changed('detector.held_out_fit_fraction', 0.7)
    wanted.detector.held_out_threshold_fraction = 0.3
    with pytest.raises(UsageError, match='less than the 0.3 that'):
        wanted.validate()


def test_detectors_of_views_that_are_attacked_want_what_they_see():
    wanted = changed('adaptive.methods', ('views_alone',))
    with pytest.raises(UsageError, match='sweep.views is .*: expected at least one'):
        wanted.validate()
    wanted.sweep.views = ('flip',)
    wanted.validate()
    wanted.adaptive.methods = ('all_views',)
    with pytest.raises(UsageError, match='adaptive.methods is .*: expected all_views only if'):
        wanted.validate()
    wanted.sweep.methods = ('all_views',)
    wanted.validate()


def test_methods_that_ask_a_twin_want_one():
    wanted = changed('sweep.methods', ('detector', 'sid'))
    with pytest.raises(UsageError, match='sweep.twin is .*: expected the work directory of'):
        wanted.validate()
    wanted.sweep.twin = 'runs/twin'
    wanted.validate()


def test_a_stored_config_is_read_again_with_what_came_later():
    for module in (digits, imagenette):
        wanted = module.get_config()
        stored = config.to_json(wanted) | {'digest': 'abc'}
        assert config.from_json(stored) == wanted
        stored['sweep'] = {'occluders': [[5, 1, 0.5]]}
        read = config.from_json(stored)
        assert read.sweep == config.Sweep(occluders=((5, 1, 0.5),))
        read.validate()


def test_precision_is_part_of_an_experiment_and_was_float32():
    other = changed('precision', 'bfloat16')
    assert config.digest(other) != config.digest(digits.get_config())
    stored = config.to_json(digits.get_config())
    del stored['precision']
    assert config.difference(config.complete(stored), config.to_json(digits.get_config())) == []
