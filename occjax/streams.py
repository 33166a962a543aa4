"""Every random choice of an experiment: one table of purposes, each with a stream of its own.

A stream is a pure function of (seed, purpose, index…) and shares nothing with any other: NumPy's
come from `SeedSequence` with the purpose as its spawn key, JAX's from `fold_in`. A sum such as
`seed + 1` would give neighbouring seeds the same numbers, and `default_rng([seed, 0])` equals
`default_rng(seed)`.
"""

import enum

import jax
import numpy as np


class Stream(enum.IntEnum):
    """What random numbers are for, with what indexes them. Numbers in use never change."""

    RESPLIT = 0
    TRAIN_SUBSET = 1
    TEST_SUBSET = 2
    CLASSIFIER_INIT = 3  # classifier: 0, or an ensemble's others from 1
    EPOCH_ORDER = 4  # classifier, epoch
    DROPOUT = 5  # classifier
    ATTACK_SOURCE = 6  # step
    EXPLAINED_IMAGES = 7  # split
    NOISE = 8  # image
    AUTOENCODER_IMAGES = 9
    AUTOENCODER_INIT = 10
    AUTOENCODER_FIT = 11
    DIVISION = 12  # protocol, seed
    UNDERSAMPLING = 13  # seed
    BANK_INIT = 14
    BANK_FIT = 15
    SWEEP_ATTACK = 16  # image
    BENCHMARK = 17
    FLIP = 18  # classifier, epoch
    SEARCH = 19


def rng(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """Returns NumPy's generator of one purpose.

    Args:
        seed: the experiment's, from 0.
        stream: the purpose.
        *index: which of its kind, such as an epoch or a split; each from 0.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *index)))


def key(seed: int, stream: Stream, *index: int) -> jax.Array:
    """Returns JAX's random key of one purpose; the arguments are those of `rng`."""
    found = jax.random.key(seed)
    for number in (stream, *index):
        found = jax.random.fold_in(found, int(number))
    return found
