"""Random keys as a function of (seed, stream name, step); nothing random is carried."""

from __future__ import annotations

import zlib

import jax


def key(seed: int, stream: str, step: int = 0) -> jax.Array:
    """The key of one stream at one step.

    Args:
      seed: the run's seed.
      stream: what the key is for, such as "draws"; two names give independent streams.
      step: the training step, or 0 for what happens once.

    Returns:
      A scalar typed PRNG key, the same on every host, device count and restart.
    """
    # crc32, not hash(): Python salts hash() per process, and every host must agree.
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    return jax.random.fold_in(named, step)
