"""Laws of the memory limit."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occjax import engine, incremental, vgg
from occjax.experiment import memory
from occjax.types import UsageError
from tests import any_network
from tests.conftest import ROOT

NARROW, WIDE = (8, 'M', 16, 'M'), (32, 64, 'M', 64, 'M')


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('4GiB', 4 * 2**30),
        ('4Gi', 4 * 2**30),
        ('2G', 2 * 10**9),
        ('500MB', 500 * 10**6),
        ('500 mb', 500 * 10**6),
        ('1.5KiB', 1536),
        ('1TiB', 2**40),
        ('7b', 7),
        ('123456', 123456),
    ],
)
def test_parse(text, expected):
    assert memory.parse(text) == expected


@pytest.mark.parametrize('text', ['', 'much', '-1GiB', '0', '4 GiB of it', 'GiB', '4iB', '1e9'])
def test_what_is_no_size_is_said(text):
    with pytest.raises(UsageError, match='--memory_limit'):
        memory.parse(text)


def network(plan, side):
    """Returns a VGG's function and the shapes of its weights."""
    init = functools.partial(vgg.init, image_size=side, hidden=64, plan=plan)
    return functools.partial(vgg.logits, plan=plan), jax.eval_shape(init, jax.random.key(0))


def needs_of(name, fn, variables, side, **geometry):
    plan = incremental.planned(fn, (side, side, 3), variables, **geometry)
    return memory.needs(name, plan, variables)


def bytes_planned(name, fn, variables, side, images, windows, **geometry):
    """Returns what XLA plans to take for so many images and windows at once."""
    settings = dict(engine=name, chunk_size=windows, fill=0.5, **geometry)

    @jax.jit
    def function(variables, images):
        return engine.occluded_logits(functools.partial(fn, variables), images, **settings)

    batch = jax.ShapeDtypeStruct((images, side, side, 3), jnp.float32)
    planned = function.lower(variables, batch).compile().memory_analysis()
    return sum(getattr(planned, f'{kind}_size_in_bytes') for kind in ('temp', 'argument', 'output'))


@pytest.mark.parametrize('name', ('full', 'incremental'))
@pytest.mark.parametrize(
    ('plan', 'side', 'size', 'stride', 'images', 'windows'),
    [
        (NARROW, 32, 8, 8, 1, 1),
        (NARROW, 32, 8, 8, 3, 20),
        (WIDE, 40, 10, 6, 1, 1),
        (WIDE, 40, 10, 6, 2, 20),
        (vgg.VGG11, 32, 15, 5, 2, 12),
    ],
)
def test_the_estimate_is_above_what_xla_plans(name, plan, side, size, stride, images, windows):
    geometry = dict(size=size, stride=stride, grid='paper')
    needs = needs_of(name, *network(plan, side), side, **geometry)
    process = memory._PROCESS // jax.local_device_count()
    planned = bytes_planned(name, *network(plan, side), side, images, windows, **geometry)
    assert planned < needs.total(images, windows) - process


@pytest.mark.parametrize('name', ('full', 'incremental'))
@pytest.mark.parametrize('kind', any_network.NETWORKS)
def test_the_estimate_holds_for_any_network(name, kind):
    fn, make = any_network.NETWORKS[kind]
    variables, geometry = jax.eval_shape(lambda: make(0)), dict(size=12, stride=6, grid='paper')
    needs = needs_of(name, fn, variables, 48, **geometry)
    process = memory._PROCESS // jax.local_device_count()
    for images, windows in ((1, 1), (2, 30)):
        planned = bytes_planned(name, fn, variables, 48, images, windows, **geometry)
        assert planned < needs.total(images, windows) - process


def convolutions(k, channels, groups):
    """Returns a network of three k x k convolutions, and the shapes of its weights."""

    def fn(weights, x):
        *kernels, head = weights
        for kernel in kernels:
            x = any_network.conv(x, kernel, groups=x.shape[-1] // kernel.shape[2])
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ head

    middle = (k, k, channels // groups, channels)
    shapes = (k, k, 3, channels), middle, middle, (channels, 5)
    return fn, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize('name', ('full', 'incremental'))
@pytest.mark.parametrize(
    ('k', 'channels', 'groups'),
    [(k, 64, 1) for k in (1, 3, 5, 7, 11)] + [(7, 8, 1), (3, 64, 64), (7, 64, 64)],
)
def test_the_estimate_holds_for_kernels_of_every_size(name, k, channels, groups):
    geometry, windows = dict(size=8, stride=2, grid='cover'), 80
    fn, variables = convolutions(k, channels, groups)
    needs = needs_of(name, fn, variables, 24, **geometry)
    process = memory._PROCESS // memory.sharers()
    planned = bytes_planned(name, fn, variables, 24, 1, windows, **geometry)
    assert planned < needs.total(1, windows) - process


@pytest.mark.parametrize('name', ('full', 'incremental'))
@pytest.mark.parametrize(('plan', 'side', 'size'), [(NARROW, 64, 16), (WIDE, 64, 16)])
def test_a_window_more_takes_no_more_than_is_said(name, plan, side, size):
    """What all windows share has slack; each window's own part has none to hide in."""
    geometry = dict(size=size, stride=4, grid='paper')
    needs = needs_of(name, *network(plan, side), side, **geometry)
    one, many = (bytes_planned(name, *network(plan, side), side, 1, n, **geometry) for n in (1, 48))
    assert many - one <= 47 * needs.window + memory.convolution._TILE_BYTES
    assert many - one >= 47 * needs.window / 12, 'and the bound is of some use'


@pytest.mark.parametrize('name', ('full', 'incremental'))
def test_a_smaller_limit_never_takes_more(name):
    needs = needs_of(name, *network(WIDE, 40), 40, size=10, stride=6)
    least, fitted = needs.total(1, 1), []
    for limit in np.linspace(least, needs.total(12, 60), 40).astype(int).tolist():
        images, windows = needs.fit(limit, images=10, windows=50)
        assert needs.total(images, windows) <= limit
        more = needs.total(images + 1, min(50, (images + 1) * needs.grid))
        assert images == 10 or more > limit
        assert images > 1 or windows == needs.grid or needs.total(1, windows + 1) > limit
        fitted.append((images, windows))
    assert fitted == sorted(fitted)
    assert fitted[-1] == (10, 50)


@pytest.mark.parametrize('devices', [1, 3])
def test_the_least_limit_that_works_is_named_and_works(devices):
    needs = needs_of('full', *network(WIDE, 40), 40, size=10, stride=6)
    with pytest.raises(UsageError, match=r'--memory_limit=\d+MiB') as caught:
        needs.fit(2**20, images=1, windows=1, devices=devices)
    named = memory.parse(str(caught.value).split('--memory_limit=')[1].rstrip('.'))
    assert needs.fit(named, images=9, windows=9, devices=devices) == (1, 1)
    assert needs.fit(2**40, images=2, windows=10**6) == (2, 2 * needs.grid)


MEASURE = """
import json, sys
import jax, numpy as np
from configs import digits
from occjax import engine, vgg
from occjax.benchmark import engines
from occjax.experiment import devices, memory, run, shard
vgg.PLANS['vgg11'] = plan = (32, 64, 'M', 64, 'M')
config = digits.get_config()
config.data.image_size, config.classifier.hidden = 80, 16
config.occlusion.size, config.occlusion.stride = 10, 5
speed = run.Speed(engine='full', eval_batch_size=4, memory_limit=json.loads(sys.argv[1]))
run = run.Run(config=config, workdir=None, speed=speed)
variables = vgg.init(jax.random.key(0), image_size=80, hidden=16, plan=plan)
mapping = run.mapping(variables)
settings = dict(mesh=devices.mesh(), network=run.network, engine="full")
settings |= dict(chunk_size=mapping.chunk_size)
images = np.zeros((mapping.batch_size, 80, 80, 3), np.float32)
fill = np.array([0.5], np.float32)
shard.map_batch(variables, images, fill, **settings, **run.geometry).block_until_ready()
print(json.dumps([mapping.chunk_size, mapping.batch_size, engines.peak_memory()]))
"""


def measure(limit):
    """Returns windows and images at once, and the peak of a process that maps them."""
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, json.dumps(limit)],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_process_stays_below_its_limit():
    """And without one it wouldn't, so that it is the limit that holds it."""
    limit = 700 * 2**20
    windows, _, peak = measure(limit)
    more_windows, _, more = measure(None)
    assert windows < more_windows
    assert peak < limit < more
