"""Laws of the work directory: complete or absent, intact or refused, one experiment's alone."""

import errno
import itertools
import os
import pathlib
import re
import shlex
import socket
import time

import jax
import numpy as np
import pytest

from configs import digits
from occjax.experiment import storage
from occjax.types import UsageError

TREE = {'a': [np.arange(6, dtype=np.float32).reshape(2, 3)], 'b': {'step': np.int32(7)}}


def files(directory):
    return [path for path in pathlib.Path(directory).rglob('*') if path.is_file()]


def test_a_workdir_is_one_experiment_s(tmp_path):
    mine, other = digits.get_config(), digits.get_config()
    other.attack.epsilon = 0.25
    workdir = storage.open_workdir(tmp_path / 'run', mine)
    assert storage.open_workdir(workdir, digits.get_config()) == workdir
    storage.open_workdir(workdir, other)  # Nothing is made.
    storage.open_workdir(workdir, mine)
    (workdir / 'classifier').mkdir()
    with pytest.raises(UsageError, match=r'attack\.epsilon: 0\.1 -> 0\.25.*another --workdir'):
        storage.open_workdir(workdir, other)


@pytest.mark.parametrize('name', ['train_images', 'test_images'])
def test_a_workdir_takes_more_images_to_map_but_not_fewer(tmp_path, name):
    def of(images, **others):
        made = digits.get_config()
        setattr(made.occlusion, name, images)
        for field, value in others.items():
            setattr(made.occlusion, field, value)
        return made

    workdir = storage.open_workdir(tmp_path / 'run', of(40))
    (workdir / 'classifier').mkdir()
    assert storage.open_workdir(workdir, of(39)) == workdir  # As long as nothing is mapped.
    with pytest.raises(UsageError, match='another --workdir'):
        storage.open_workdir(workdir, of(39, stride=4))
    storage.write_record(workdir / 'heatmaps' / 'manifest.json', {})
    storage.keep_config(workdir, of(39))
    assert storage.open_workdir(workdir, of(39)) == workdir
    storage.keep_config(workdir, of(40))
    for more in (40, 41, 0):  # 0 is all.
        assert storage.open_workdir(workdir, of(more)) == workdir
    for other in (of(39), of(41, stride=4)):
        with pytest.raises(UsageError, match='another --workdir') as caught:
            storage.open_workdir(workdir, other)
        way = 'repeat --config.occlusion.'
        assert str(caught.value).index(way) < str(caught.value).index('another --workdir')
    storage.open_workdir(workdir, of(40))  # Until they are mapped it is what it was.
    storage.keep_config(workdir, of(0))
    other = of(0)
    other.attack.epsilon = 0.3
    storage.keep_config(workdir, other)
    assert storage.open_workdir(workdir, of(0)) == workdir  # Nothing else may change.
    with pytest.raises(UsageError, match=f'{name}: 0 -> 40'):
        storage.open_workdir(workdir, of(40))


def test_a_refusal_names_the_flags_that_are_to_be_repeated(tmp_path):
    """Each as a shell takes it; read as Python they are the stored fields."""
    made, other = digits.get_config(), digits.get_config()
    made.occlusion.fill, made.attack.clip, made.data.resplit_per_class = (
        (0.0, 1.0, 0.5),
        False,
        None,
    )
    workdir = storage.open_workdir(tmp_path / 'run', made)
    (workdir / 'classifier').mkdir()
    with pytest.raises(UsageError) as caught:
        storage.open_workdir(workdir, other)
    repeated = re.search(r'repeat (.*), or choose another --workdir', str(caught.value))[1]
    assert dict(flag.split('=') for flag in shlex.split(repeated)) == {
        '--config.attack.clip': 'False',
        '--config.data.resplit_per_class': 'None',
        '--config.occlusion.fill': '(0.0,1.0,0.5)',
    }
    other.classifier.epochs, other.classifier.hidden, other.seed = 1, 2, 3
    with pytest.raises(UsageError, match=r'and 1 more fields?\): choose another --workdir'):
        storage.open_workdir(workdir, other)


def test_a_config_of_another_program_is_no_damage(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match='of another program: choose another --workdir'):
        storage.open_workdir(tmp_path, digits.get_config())
    assert (tmp_path / 'config.json').read_text() == '{"model_type": "bert"}'


def test_a_field_that_came_later_has_its_default(tmp_path):
    """A directory from before the field was there is the experiment that it was."""
    workdir = storage.open_workdir(tmp_path / 'run', digits.get_config())
    (workdir / 'classifier').mkdir()
    stored = storage.read_record(workdir / 'config.json', mode='all')
    del (
        stored['digest'],
        stored['occlusion']['threshold'],
        stored['detector']['seeds'],
        stored['classifier']['resize'],
    )
    storage.write_record(workdir / 'config.json', stored)
    assert storage.open_workdir(workdir, digits.get_config()) == workdir
    other = digits.get_config()
    other.occlusion.threshold = 0.5
    with pytest.raises(UsageError, match=r'occlusion\.threshold: 1\.0 -> 0\.5'):
        storage.open_workdir(workdir, other)
    del stored['occlusion']['size']  # It has no default.
    storage.write_record(workdir / 'config.json', stored)
    with pytest.raises(UsageError, match=r'occlusion\.size: None -> '):
        storage.open_workdir(workdir, digits.get_config())


def test_other_files_in_a_workdir_are_left_alone(tmp_path):
    """A user's log, or what a killed start left, is no reason to refuse a directory."""
    (tmp_path / 'thesis.tex').write_text('mine')
    (tmp_path / '.gitkeep').touch()
    workdir = storage.open_workdir(tmp_path, digits.get_config())
    with storage.locked(workdir):
        pass
    assert (tmp_path / 'thesis.tex').read_text() == 'mine'
    assert (tmp_path / '.gitkeep').exists()
    with pytest.raises(UsageError, match='Cannot use --workdir'):
        storage.open_workdir(tmp_path / 'thesis.tex' / 'run', digits.get_config())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    storage.write_record(tmp_path / 'x.json', {'a': 1})
    with pytest.raises(ValueError, match='JSON compliant'):
        storage.write_record(tmp_path / 'x.json', {'a': float('nan')})
    assert storage.read_record(tmp_path / 'x.json', mode='all')['a'] == 1
    assert files(tmp_path) == [tmp_path / 'x.json']


def test_an_error_names_the_file_that_it_is_of(tmp_path):
    for raised, named in (
        (OSError(28, 'No space left on device'), tmp_path / 'out'),
        (PermissionError(13, 'Permission denied', '/other'), '/other'),
        (BrokenPipeError(32, 'Broken pipe'), None),
    ):
        with pytest.raises(type(raised)) as found, storage.writing(tmp_path / 'out'):
            raise raised
        assert found.value.filename == (named and str(named))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_damaged_names_the_mode_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match=r'x\.json does not exist: run --mode=train first'):
        storage.read_record(tmp_path / 'x.json', mode='train')
    with pytest.raises(UsageError, match=r'classifier does not exist: run --mode=train first'):
        storage.restore_checkpoint(tmp_path / 'classifier', TREE, mode='train', made_from={})
    with pytest.raises(UsageError, match=r'x\.npz does not exist: run --mode=train first'):
        storage.load_arrays(tmp_path / 'x.npz', mode='train', made_from={})


@pytest.mark.parametrize('content', [b'', b'{"a": ', b'[]', b'3', b'{"a": 1}', b'\xff\xfe'])
def test_a_record_that_is_not_one_is_damaged(tmp_path, content):
    (tmp_path / 'x.json').write_bytes(content)
    with pytest.raises(UsageError, match=r'x\.json is damaged: delete it and run --mode=train'):
        storage.read_record(tmp_path / 'x.json', mode='train')
    with pytest.raises(UsageError, match='is damaged: delete that folder'):
        storage.read_record(tmp_path, mode='train')


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path):
    """White space and the digest itself among them."""
    path = tmp_path / 'x.json'
    storage.write_record(path, {'accuracy': 0.75, 'names': ['a', 'b'], 'made_from': {}})
    whole = path.read_bytes()
    for position, bit in itertools.product(range(len(whole)), range(8)):
        content = bytearray(whole)
        content[position] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(UsageError, match='is damaged'):
            storage.read_record(path, mode='train')


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    for step in (1, 2, 3):
        changed = jax.tree.map(lambda leaf, step=step: leaf * step, TREE)
        storage.save_checkpoint(tmp_path, step, changed, made_from={'images': 'a'})
    assert storage.latest_step(tmp_path) == 3
    known = dict(mode='train', made_from={'images': 'a'})
    restored = storage.restore_checkpoint(tmp_path, TREE, **known)
    jax.tree.map(np.testing.assert_array_equal, restored, changed)
    before = storage.restore_checkpoint(tmp_path, TREE, step=2, **known)
    np.testing.assert_array_equal(before['b']['step'], 2 * TREE['b']['step'])
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    storage.save_checkpoint(tmp_path, 1, TREE, made_from={})
    for path in files(tmp_path / '1' / 'tree' / 'd'):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r'1 is damaged: delete that folder and run --mode=train'):
        storage.restore_checkpoint(tmp_path, TREE, mode='train', made_from={})


def test_a_checkpoint_of_other_arrays_is_whole_but_does_not_fit(tmp_path):
    """Another number type or shape is no damage, and following advice must not lose it."""
    storage.save_checkpoint(tmp_path, 1, TREE, made_from={})
    wider = jax.tree.map(lambda leaf: leaf.astype(np.float64), TREE)
    other = {**TREE, 'c': np.zeros(3)}
    for like in (wider, other, {'a': TREE['a']}):
        with pytest.raises(UsageError, match='is whole, but holds other arrays'):
            storage.restore_checkpoint(tmp_path, like, mode='train', made_from={})


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    storage.save_checkpoint(tmp_path, 1, TREE, made_from={})

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(storage.np, 'empty', exhausted)
    with pytest.raises(MemoryError):
        storage.restore_checkpoint(tmp_path, TREE, mode='train', made_from={})


def test_what_was_made_from_something_else_is_refused(tmp_path):
    """And names the parent that is another one, and what to delete."""
    old, new = {'classifier': 'a', 'images': 'b'}, {'classifier': 'c', 'images': 'b'}
    match = 'was made from another classifier than the one of today: delete it and run --mode=all'
    storage.save_checkpoint(tmp_path / 'bank', 1, TREE, made_from=old)
    storage.restore_checkpoint(tmp_path / 'bank', TREE, mode='all', made_from=old)
    with pytest.raises(UsageError, match=f'bank {match}'):
        storage.restore_checkpoint(tmp_path / 'bank', TREE, mode='all', made_from=new)
    path = tmp_path / 'maps' / 'shard.npz'
    storage.save_arrays(path, {'logits': np.ones(3)}, made_from=old)
    storage.load_arrays(path, mode='all', made_from=old)
    with pytest.raises(UsageError, match=f'maps {match}'):
        storage.load_arrays(path, mode='all', made_from=new)
    with pytest.raises(UsageError, match=f'maps {match}'):
        storage.cached(path, dict, mode='all', made_from=new)


def test_a_part_is_made_once_and_again_where_it_is_damaged(tmp_path):
    path, calls = tmp_path / 'part.npz', []

    def make():
        calls.append(1)
        return {'x': np.arange(3), 'count': 7}

    for expected in (1, 1):
        found = storage.cached(path, make, mode='all', made_from={})
        np.testing.assert_array_equal(found['x'], np.arange(3))
        assert found['count'] == 7
        assert len(calls) == expected
    path.write_bytes(path.read_bytes()[:-1])
    storage.cached(path, make, mode='all', made_from={})
    assert len(calls) == 2
    storage.load_arrays(path, mode='all', made_from={})


def test_other_weights_than_were_saved_are_noticed(tmp_path, monkeypatch):
    """Large arrays come back from a flipped bit without any complaint of Orbax's."""
    with monkeypatch.context() as patch:
        patch.setattr(storage, 'digest_of', lambda _: 'the digest of others')
        storage.save_checkpoint(tmp_path, 1, TREE, made_from={})
    with pytest.raises(UsageError, match=r'1 is damaged'):
        storage.restore_checkpoint(tmp_path, TREE, mode='train', made_from={})


def test_a_killed_save_is_ignored(tmp_path):
    storage.save_checkpoint(tmp_path, 1, TREE, made_from={})
    (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
    assert storage.latest_step(tmp_path) == 1


def test_every_damaged_byte_of_an_array_file_is_noticed(tmp_path):
    """Those of the archive's own book-keeping among them, and wherever it is cut."""
    path = tmp_path / 'shard.npz'
    arrays = {'logits': np.arange(5.0), 'label': np.arange(3), 'how': 'fast'}
    digest = storage.save_arrays(path, arrays, made_from={})
    found = storage.load_arrays(path, mode='all', made_from={}, digest=digest)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)
    whole = path.read_bytes()
    cut = [whole[:length] for length in range(len(whole))]
    flipped = []
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        flipped.append(content)
    for content in cut + flipped:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r'shard\.npz is damaged: delete it and run'):
            storage.load_arrays(path, mode='heatmaps', made_from={})


def test_two_numbers_never_share_a_name():
    """And those of before keep theirs: n / 255, and what has few digits."""
    levels = [n / 255 for n in range(256)]
    numbers = {*levels, *(float(f'{x:.{d}g}') for x in levels for d in (1, 2, 4, 5, 6, 7, 17))}
    assert len({storage.number_name(x) for x in numbers}) == len(numbers)
    for value in (*levels, 0.1, 0.3, 0.03, 0.05, 1e-6, 1, 0):
        assert storage.number_name(value) == f'{value:.6g}'


def test_equal_arrays_make_equal_files(tmp_path, monkeypatch):
    """So that a shard that is made again is the one that was deleted."""
    arrays = {'logits': np.arange(5.0)}
    first = storage.save_arrays(tmp_path / 'a.npz', arrays, made_from={'b': '1', 'a': '2'})
    monkeypatch.setattr(time, 'time', lambda: 2e9)
    monkeypatch.setattr(time, 'localtime', lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    second = storage.save_arrays(tmp_path / 'b.npz', arrays, made_from={'a': '2', 'b': '1'})
    assert first == second == storage.file_digest(tmp_path / 'b.npz')
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    other = storage.save_arrays(tmp_path / 'b.npz', arrays, made_from={'a': '2', 'b': '3'})
    assert other != first
    with pytest.raises(UsageError, match=r'b\.npz is damaged'):
        storage.load_arrays(tmp_path / 'b.npz', mode='all', made_from={}, digest=first)


def test_writes_are_on_the_disk_before_they_replace(tmp_path, monkeypatch):
    """Else a power cut could leave a new name with nothing behind it."""
    calls = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: calls.append(n) or f(*a))
    storage.write_bytes(tmp_path / 'x', b'content')
    assert calls == ['fsync', 'replace', 'fsync']


def test_a_second_process_is_refused_by_the_first_one_s_name(tmp_path):
    """A lock that its process left behind is in nobody's way, nor are half-written files."""
    (tmp_path / '.lock').write_text('process 1 on elsewhere')
    half = tmp_path / 'heatmaps' / '.train.npz.x3.occjax-partial'
    half.parent.mkdir()
    half.touch()
    (tmp_path / '.mine.partial').touch()
    owner = f'process {os.getpid()} on {socket.gethostname()}'
    for _ in range(2):
        with storage.locked(tmp_path):
            assert not half.exists()
            assert (tmp_path / '.mine.partial').exists()
            with pytest.raises(UsageError, match=f'in use by {owner}: wait'):
                storage.locked(tmp_path).__enter__()


def test_what_another_run_has_half_written_within_is_its_own(tmp_path):
    inner = tmp_path / 'inner'
    written = storage.writing(inner / 'deeper' / 'x')
    with storage.locked(inner), written as file, storage.locked(tmp_path):
        file.write(b'whole')
    assert (inner / 'deeper' / 'x').read_bytes() == b'whole'


def test_only_files_of_ours_are_discarded(tmp_path):
    """Whatever they are called; a file of ours with a flipped bit may be anybody's."""
    ours, damaged = tmp_path / 'a.npz', tmp_path / 'b.npz'
    for path in (ours, damaged):
        storage.save_arrays(path, {'x': np.ones(3)}, made_from={})
    damaged.write_bytes(damaged.read_bytes()[:-1] + b'x')
    np.savez(tmp_path / 'd41d8cd98f00b204e9800998ecf8427e.npz', x=np.ones(3))
    (tmp_path / 'empty.npz').touch()
    (tmp_path / 'folder.npz').mkdir()
    others = {*tmp_path.iterdir()} - {ours}
    for path in (*others, ours, tmp_path / 'nowhere.npz'):
        storage.discard(path)
    assert {*tmp_path.iterdir()} == others


def test_where_nothing_can_be_written_there_is_no_lock(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(storage.os, 'open', read_only)
    with storage.locked(tmp_path):
        pass


def test_a_full_disk_is_no_damage_and_keeps_what_was_there(tmp_path, monkeypatch):
    """TensorStore says it as a ValueError, files as an OSError without their name."""
    storage.save_checkpoint(tmp_path / 'c', 1, TREE, made_from={})
    storage.write_record(tmp_path / 'x.json', {'a': 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, 'fsync', full)
        with pytest.raises(OSError, match=r'No space left.*x\.json'):
            storage.write_record(tmp_path / 'x.json', {'a': 2})
    assert storage.read_record(tmp_path / 'x.json', mode='all')['a'] == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['x.json']

    def manager(_):
        raise ValueError('RESOURCE_EXHAUSTED: writing: No space left on device [OS error 28]')

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r'No space left.*c'):
        patch.setattr(storage, '_manager', manager)
        storage.save_checkpoint(tmp_path / 'c', 2, TREE, made_from={})
    storage.restore_checkpoint(tmp_path / 'c', TREE, mode='train', made_from={})
