"""Digests of arrays where they lie: a few integer sums, the same on every mesh.

Orbax restores a flipped byte silently. A hash of bytes on the host would copy every array there
and need it in one piece; a sum of mixed (place, bits) pairs is an ordinary reduction, so each
device goes over its own share, and how an array is split changes nothing. It guards against
accidents: any single changed element changes the digest, but nothing stops a forger.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corrector_jax.types import Array, PyTree

_LANES = (0x9E3779B9, 0x7F4A7C15)  # two sums of 32 bits: 64 in all
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def leaves(tree: PyTree) -> dict[str, tuple[str, list[int], str]]:
    """What every leaf holds, in a form that JSON keeps.

    Args:
      tree: a pytree of arrays of 8, 16 or 32 bit elements, on any mesh.

    Returns:
      path of the leaf -> (dtype, shape, digest as 16 hex digits). Waits for the arrays.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    # A hundred leaves have a dozen shapes: compiling a program for each takes seconds, compiling
    # one of all leaves as long as a train step. One after the other: of several programs in flight
    # two processes may begin another one first, and wait for each other for ever.
    sums = [jax.device_get(_sum(leaf)) for _, leaf in flat]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            str(leaf.dtype),
            list(leaf.shape),
            "".join(f"{lane:08x}" for lane in lanes),
        )
        for (path, leaf), lanes in zip(flat, sums, strict=True)
    }


def of(tree: PyTree) -> str:
    """One digest of a whole tree: names, dtypes, shapes and contents, as 64 hex digits."""
    described = "\n".join(f"{path} {leaf}" for path, leaf in sorted(leaves(tree).items()))
    return hashlib.sha256(described.encode()).hexdigest()


@jax.jit
def _sum(array: Array) -> Array:
    """[2] uint32: the sums over elements of their bits mixed with their place."""
    words: Any = array
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(words, _BITS[words.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    mixed = tuple(_mix(words ^ _mix(place + jnp.uint32(lane))) for lane in _LANES)
    # The lanes together and row by row, which the barrier keeps XLA from undoing: on a CPU six
    # times as fast as two sums over everything, and the same integers.
    rows = jax.lax.reduce(
        mixed,
        (np.uint32(0),) * len(_LANES),
        lambda these, those: tuple(a + b for a, b in zip(these, those, strict=True)),
        tuple(range(words.ndim))[-1:],
    )
    return jnp.stack([jnp.sum(lane) for lane in jax.lax.optimization_barrier(rows)])


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3: a bijection of uint32 in which every bit matters."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
