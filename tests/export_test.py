"""Programs lower for GPUs and TPUs on a machine that has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occjax
from occjax import attribution, classifier, engine, names, verdict, vgg
from occjax.methods import METHODS

PLAN = (32, 'M', 32, 'M')
IMAGES, LABELS = np.zeros((2, 16, 16, 3), np.float32), np.zeros(2, np.int32)
WINDOWS = dict(size=5, stride=4, fill=0.5)


def variables():
    return vgg.init(jax.random.key(0), image_size=16, hidden=8, plan=PLAN)


def fgsm(variables, images):
    logits_fn = functools.partial(vgg.logits, variables, plan=PLAN)
    return occjax.fgsm(logits_fn, images, LABELS, epsilon=0.1)


def train_step(variables, images):
    state = classifier.init_state(variables)
    settings = dict(key=jax.random.key(0), learning_rate=1e-3, plan=PLAN)
    return classifier.train_step(state, images, LABELS, **settings)[1]


def logits(variables, images, name):
    knobs = dict(threshold=0.5, every=2) if name == 'approximate' else {}
    settings, logits_fn = WINDOWS | knobs, functools.partial(vgg.logits, variables, plan=PLAN)
    return engine.occluded_logits(logits_fn, images, engine=name, **settings)


def margins(variables, images, name):
    bank = occjax.detector.init_bank(jax.random.key(0), num_classes=10, grid=(3, 3))
    settings = dict(method=METHODS['detector'], engine=name, **WINDOWS)
    logits_fn = functools.partial(vgg.logits, variables, plan=PLAN)
    return verdict.margins(logits_fn, bank, jnp.zeros(10), images, **settings)


def explain(variables, images):
    logits_fn = functools.partial(vgg.logits, variables, plan=PLAN)
    saliency = attribution.rise(logits_fn, images, LABELS, key=jax.random.key(0), masks=5)
    return attribution.insertion(logits_fn, images, LABELS, saliency, steps=4)


PROGRAMS = {'explain': explain, 'fgsm': fgsm, 'train_step': train_step} | {
    f'{fn.__name__}, {name}': functools.partial(fn, name=name)
    for name in names.ENGINES
    for fn in (logits, margins)
    if (fn, name) != (margins, 'approximate')
}


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('program', PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_lowers_for_devices_that_are_not_here(program, platform):
    exported = jax.export.export(jax.jit(program), platforms=[platform])(variables(), IMAGES)
    assert exported.platforms == (platform,)
    assert 'stablehlo.convolution(' in exported.mlir_module()
