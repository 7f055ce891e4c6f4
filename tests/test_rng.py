"""Keys are functions of (seed, stream, step), the same on every host and in every process."""

from __future__ import annotations

import itertools

import jax

from corrector_jax import rng


def numbers(key):
    return tuple(jax.random.key_data(key).tolist())


def test_every_seed_stream_and_step_has_a_key_of_its_own():
    keys = [
        numbers(rng.key(seed, stream, step))
        for seed, stream, step in itertools.product(
            (0, 1, 2**31), ("step", "corrector", "draws"), (0, 1, 2, 100_000)
        )
    ]
    assert len(set(keys)) == len(keys)


def test_no_step_is_step_zero():
    assert numbers(rng.key(3, "step")) == numbers(rng.key(3, "step", 0))


def test_the_key_does_not_depend_on_the_process():
    # Python salts hash() anew in each process; a resumed run must find the very same keys, so
    # these numbers may only change with a new version of the checkpoints.
    assert numbers(rng.key(1, "step", 7)) == (128450297, 283968317)
