"""Laws of the work directory: complete or absent, intact or refused, one experiment's alone."""

import pathlib

import jax
import numpy as np
import pytest

from configs import digits
from occjax import storage
from occjax.types import UsageError

TREE = {'a': [np.arange(6, dtype=np.float32).reshape(2, 3)], 'b': {'step': np.int32(7)}}


def files(directory):
    return [path for path in pathlib.Path(directory).rglob('*') if path.is_file()]


def test_a_workdir_is_one_experiment_s(tmp_path):
    mine, other = digits.get_config(), digits.get_config()
    other.attack.epsilon = 0.25
    workdir = storage.open_workdir(tmp_path / 'run', mine)
    assert storage.open_workdir(workdir, digits.get_config()) == workdir
    with pytest.raises(UsageError, match=r'attack\.epsilon: 0\.1 -> 0\.25.*another --workdir'):
        storage.open_workdir(workdir, other)


def test_a_field_that_came_later_has_its_default(tmp_path):
    """A directory from before the field was there is the experiment that it was."""
    workdir = storage.open_workdir(tmp_path / 'run', digits.get_config())
    stored = storage.read_json(workdir / 'config.json', mode='all')
    del (
        stored['occlusion']['threshold'],
        stored['detector']['seeds'],
        stored['classifier']['resize'],
    )
    storage.write_json(workdir / 'config.json', stored)
    assert storage.open_workdir(workdir, digits.get_config()) == workdir
    other = digits.get_config()
    other.occlusion.threshold = 0.5
    with pytest.raises(UsageError, match=r'occlusion\.threshold: 1\.0 -> 0\.5'):
        storage.open_workdir(workdir, other)
    del stored['occlusion']['size']  # It has no default.
    storage.write_json(workdir / 'config.json', stored)
    with pytest.raises(UsageError, match=r'occlusion\.size: None -> '):
        storage.open_workdir(workdir, digits.get_config())


def test_a_stranger_s_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / 'thesis.tex').write_text('mine')
    with pytest.raises(UsageError, match='is no work directory'):
        storage.open_workdir(tmp_path, digits.get_config())
    assert files(tmp_path) == [tmp_path / 'thesis.tex']
    with pytest.raises(UsageError, match='Cannot use --workdir'):
        storage.open_workdir(tmp_path / 'thesis.tex' / 'run', digits.get_config())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    storage.write_json(tmp_path / 'x.json', {'a': 1})
    with pytest.raises(ValueError, match='JSON compliant'):
        storage.write_json(tmp_path / 'x.json', {'a': float('nan')})
    assert storage.read_json(tmp_path / 'x.json', mode='all') == {'a': 1}
    assert files(tmp_path) == [tmp_path / 'x.json']


def test_what_is_missing_or_damaged_names_the_mode_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match=r'x\.json does not exist: run --mode=train first'):
        storage.read_json(tmp_path / 'x.json', mode='train')
    with pytest.raises(UsageError, match=r'classifier does not exist: run --mode=train first'):
        storage.restore_checkpoint(tmp_path / 'classifier', TREE, mode='train')
    (tmp_path / 'x.json').write_text('{"a": ')
    with pytest.raises(UsageError, match=r'x\.json is damaged: delete it'):
        storage.read_json(tmp_path / 'x.json', mode='train')


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    for step in (1, 2, 3):
        changed = jax.tree.map(lambda leaf, step=step: leaf * step, TREE)
        storage.save_checkpoint(tmp_path, step, changed)
    assert storage.latest_step(tmp_path) == 3
    restored = storage.restore_checkpoint(tmp_path, TREE, mode='train')
    jax.tree.map(np.testing.assert_array_equal, restored, changed)
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    storage.save_checkpoint(tmp_path, 1, TREE)
    for path in files(tmp_path / '1' / 'tree' / 'd'):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r'1 is damaged: delete that folder and run --mode=train'):
        storage.restore_checkpoint(tmp_path, TREE, mode='train')


def test_other_weights_than_were_saved_are_noticed(tmp_path, monkeypatch):
    """Large arrays come back from a flipped bit without any complaint of Orbax's."""
    digest = storage._tree_digest
    other = jax.tree.map(lambda leaf: leaf + 1, TREE)
    with monkeypatch.context() as patch:
        patch.setattr(storage, '_tree_digest', lambda _: digest(storage._named_leaves(other)))
        storage.save_checkpoint(tmp_path, 1, TREE)
    with pytest.raises(UsageError, match=r'1 is damaged'):
        storage.restore_checkpoint(tmp_path, TREE, mode='train')


def test_a_killed_save_is_ignored(tmp_path):
    storage.save_checkpoint(tmp_path, 1, TREE)
    (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
    assert storage.latest_step(tmp_path) == 1


def test_a_flipped_bit_in_an_array_file_is_noticed(tmp_path):
    path = tmp_path / 'shard.npz'
    arrays = {'logits': np.arange(5000.0), 'label': np.arange(3)}
    storage.save_arrays(path, arrays)
    jax.tree.map(np.testing.assert_array_equal, storage.load_arrays(path, mode='all'), arrays)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r'shard\.npz is damaged: delete it and run'):
        storage.load_arrays(path, mode='heatmaps')
