"""What stages left in the work directory, by what it is: maps, banks, and what they come from.

Dimensions: M maps, K classes.
"""

import dataclasses

import jax

from occjax import detector, names
from occjax.experiment import judging, storage
from occjax.experiment.run import Run
from occjax.methods import METHODS
from occjax.names import CONTROLS
from occjax.streams import Stream
from occjax.types import HeatmapSet, UsageError

# The split whose maps each protocol divides.
PROTOCOLS = dict(zip(names.PROTOCOLS, names.SPLITS, strict=True))


def load_metrics(run: Run) -> dict:
    """Returns the trained classifier's accuracies, `step`, and `classifier`, its digest."""
    directory = run.workdir / 'classifier'
    found = storage.read_record(directory / 'metrics.json', mode='train')
    made_from = found['made_from'] | {'classifier': found['classifier']}
    wanted = run.origin('train') | ({'classifier': run.trained.digest} if run.trained else {})
    storage.check_origin(directory, made_from, wanted, mode='train')
    return found


def classifier_origin(run: Run) -> storage.Origin:
    """Returns what heatmaps come from; without the classifier if that is there no more."""
    if not (run.workdir / 'classifier' / 'metrics.json').exists():
        return run.origin('heatmaps')
    return run.origin('heatmaps') | {'classifier': load_metrics(run)['classifier']}


def read_manifest(run: Run) -> dict:
    """Returns the names of all shards and their digests, `made_from`, and its own `digest`."""
    directory = run.workdir / 'heatmaps'
    found = storage.read_record(directory / 'manifest.json', mode='heatmaps')
    storage.check_origin(directory, found['made_from'], classifier_origin(run), mode='heatmaps')
    return found


def load_manifest(run: Run) -> dict:
    """Returns the same.

    Raises:
        UsageError: if there are other maps than the config asks for.
    """
    found = read_manifest(run)
    if found['shards'].keys() != {name for each in names.SPLITS for name in shard_names(run, each)}:
        raise UsageError(
            f'{run.workdir / "heatmaps"} has fewer maps, or more, than the config asks for: run '
            '--mode=heatmaps.'
        )
    return found


def mapped(run: Run, split_name: str) -> int:
    """Returns how many images of a split are mapped."""
    count = run.description[f'{split_name}_images']
    return min(getattr(run.config.occlusion, f'{split_name}_images') or count, count)


def shard_names(run: Run, split_name: str) -> dict[str, slice]:
    """Returns which of a split's mapped images are in which file.

    One that a limit cuts short has its length in its name, since with a higher limit it is another.
    """
    count, size, found = mapped(run, split_name), run.shard_size, {}
    for start in range(0, count, size):
        end = min(start + size, count)
        is_whole = end - start == size or end == run.description[f'{split_name}_images']
        cut = '' if is_whole else f'-{end - start}'
        found[f'{split_name}-{start:07d}{cut}.npz'] = slice(start, end)
    return found


def heatmaps_origin(run: Run) -> storage.Origin:
    """Returns what detectors come from."""
    return run.origin('detectors') | {'heatmaps': load_manifest(run)['digest']}


def load_shards(run: Run, split_name: str) -> tuple[HeatmapSet, list[dict]]:
    """Returns all maps of a split, and the shards that they are in."""
    directory, found = run.workdir / 'heatmaps', load_manifest(run)
    known = dict(mode='heatmaps', made_from=found['made_from'])
    shards = [
        storage.load_arrays(directory / name, digest=digest, **known)
        for name, digest in found['shards'].items()
        if name.startswith(split_name)
    ]
    return as_maps(shards), shards


def as_maps(shards, prefix=''):
    """Returns the maps in shards whose arrays begin with a prefix."""
    names = [f.name for f in dataclasses.fields(HeatmapSet) if prefix + f.name in shards[0]]
    sets = [{name: shard[prefix + name] for name in names} for shard in shards]
    return HeatmapSet.concatenate([HeatmapSet(**arrays) for arrays in sets])


def divide(run: Run, protocol: str) -> judging.Division:
    """Returns a protocol's maps, divided for every seed."""
    maps, _ = load_shards(run, PROTOCOLS[protocol])
    return judging.divide(maps, protocol, run.config.detector, run.config.seed)


def load_controls(run: Run) -> dict[str, HeatmapSet]:
    """Returns the maps of test images that neither fit nor judge detectors, by `CONTROLS`."""
    _, shards = load_shards(run, 'test')
    return {kind: as_maps(shards, f'{kind}_') for kind in CONTROLS}


def init_banks(run: Run, division: judging.Division, name: str) -> detector.Bank:
    """Returns a method's unfitted banks of all seeds for a protocol's maps."""
    return judging.init_banks(run.key(Stream.BANK_INIT), division, METHODS[name])


def fit_banks(
    run: Run, division: judging.Division, name: str, noise: HeatmapSet | None = None
) -> detector.Bank:
    """Returns the same, fitted; with noisy images among the clean ones if there are any."""
    return judging.fit_banks(
        run.key(Stream.BANK_FIT),
        init_banks(run, division, name),
        division,
        METHODS[name],
        run.config.detector,
        run.config.seed,
        noise,
    )


def load_banks(run: Run, division: judging.Division, protocol: str, name: str) -> detector.Bank:
    """Returns the same, as the stage `detectors` stored them."""
    like = jax.eval_shape(lambda: init_banks(run, division, name))
    directory = run.workdir / 'detectors' / protocol / name
    known = dict(mode='detectors', made_from=heatmaps_origin(run))
    return storage.restore_checkpoint(directory, like, **known)


def load_adaptive(run: Run) -> dict | None:
    """Returns what `--mode=adaptive` found in this work directory, None if it wasn't run (P8)."""
    path = run.workdir / 'adaptive.json'
    if not path.exists():
        return None
    found = storage.read_record(path, mode='adaptive')
    storage.check_origin(path, found['made_from'], heatmaps_origin(run), mode='adaptive')
    kept = ('images', 'settings', 'false_alarms', 'rows', 'auroc_of_the_mixture')
    return {name: found[name] for name in kept if name in found}
