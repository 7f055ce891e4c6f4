"""The target cache and the token table beside it: values, split by row over the mesh.

`TargetCache` is what the method calls C: row y is g(y) under the parameters of an earlier step.
`TargetTokens` is what fresh embeddings are made from. Both are padded at the end to a whole number
of sampling blocks per device; padding rows are at and beyond `size` and are never scored.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from corrector_jax.sharding import EVERYWHERE, ROWS, Placement, local_start
from corrector_jax.types import Array, ArrayLike


@struct.dataclass
class TargetCache:
    """Stale target embeddings with an age.

    Attributes:
      embeddings: [rows, D] float32, bfloat16 or int8, split by row.
      scale: [rows] float32 to multiply a row by where it is int8, else None.
      written_at: [rows] int32, the step whose parameters made the row; -1 = never written.
      size: N, the number of targets; rows from N on are padding.
      lengths: [rows] float32, what a row's corrected logits are divided by, as last measured
        (`sweep.measure_lengths`); None where the corrector has none.
    """

    embeddings: Array
    scale: Array | None
    written_at: Array
    size: int = struct.field(pytree_node=False)
    lengths: Array | None = None


@struct.dataclass
class TargetTokens:
    """The static token table: never donated, never saved, known by its fingerprint.

    Attributes:
      ids: [rows, T] uint16 or int32, padded with the tokenizer's pad id, split by row.
      size: N, the number of targets; rows from N on hold nothing but padding.
      fingerprint: hex digest of tokenizer, prefix, length and corpus content.
    """

    ids: Array
    size: int = struct.field(pytree_node=False)
    fingerprint: str = struct.field(pytree_node=False)


def create(
    size: int,
    dim: int,
    *,
    dtype: str,
    block_rows: int,
    place: Placement,
    lengths: bool = False,
) -> TargetCache:
    """An empty cache of N x D zeros, created already split over the mesh.

    Args:
      size: N, the number of targets.
      dim: D.
      dtype: "float32", "bfloat16" or "int8", how rows are stored.
      block_rows: R, rows of a sampling block; a device holds whole blocks.
      place: the mesh.
      lengths: whether the corrector has lengths; they are 1 to begin with.

    Returns:
      The cache; no row is written yet.
    """
    rows = place.pad(size, block_rows)

    def zeros() -> TargetCache:
        return TargetCache(
            embeddings=jnp.zeros((rows, dim), dtype),
            scale=jnp.ones((rows,), jnp.float32) if dtype == "int8" else None,
            written_at=jnp.full((rows,), -1, jnp.int32),
            size=size,
            lengths=jnp.ones((rows,), jnp.float32) if lengths else None,
        )

    return jax.jit(zeros, out_shardings=place.rows)()


def create_tokens(
    table: np.ndarray, *, fingerprint: str, pad_id: int, block_rows: int, place: Placement
) -> TargetTokens:
    """Places a host table [N, T] on the mesh, padded like a cache of the same block size.

    Args:
      table: [N, T] uint16 or int32.
      fingerprint: hex digest that names the table.
      pad_id: fills the padding rows.
      block_rows: R.
      place: the mesh.

    Returns:
      The token table.
    """
    size, length = table.shape
    rows = place.pad(size, block_rows)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        if index is None:
            index = (slice(None),)
        start, stop, _ = index[0].indices(rows)
        part = np.full((stop - start, length), pad_id, table.dtype)
        held = table[start : min(stop, size)]
        part[: len(held)] = held
        return part

    ids = jax.make_array_from_callback((rows, length), place.rows, shard)
    return TargetTokens(ids=ids, size=size, fingerprint=fingerprint)


def read(embeddings: ArrayLike, scale: ArrayLike | None) -> Array:
    """Stored rows -> float32 rows; the only place that knows how rows are stored.

    Args:
      embeddings: [..., D] as stored.
      scale: [...] float32 or None.

    Returns:
      [..., D] float32, cut off from differentiation: a cached row is data, never a function of
      the parameters (docs/method.md, 2, step 5).
    """
    rows = jax.lax.stop_gradient(jnp.asarray(embeddings)).astype(jnp.float32)
    return rows if scale is None else rows * jax.lax.stop_gradient(scale)[..., None]


def stored(rows: ArrayLike, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Rows as they are stored; the other direction of `read`.

    Args:
      rows: [..., D] of any float dtype.
      dtype: float32, bfloat16 or int8.

    Returns:
      [..., D] of that dtype, and for int8 the scale [...] float32: the largest magnitude of a row
      is 127, so that no value is off by more than 1/254 of it.
    """
    rows = jnp.asarray(rows)
    if dtype != jnp.int8:
        return rows.astype(dtype), None
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    # Not `largest > 0`: what is not a number must stay so, and not become a row of zeros.
    scale = jnp.where(largest == 0, 1.0, largest / 127.0)
    return jnp.round(rows / scale[..., None]).astype(jnp.int8), scale


def read_slice(cache: TargetCache, start: ArrayLike, count: int) -> Array:
    """`count` rows of a device's own share from local row `start`: [count, D] float32."""
    part = jax.lax.dynamic_slice_in_dim(cache.embeddings, start, count)
    scale = None
    if cache.scale is not None:
        scale = jax.lax.dynamic_slice_in_dim(cache.scale, start, count)
    return read(part, scale)


def read_at(cache: TargetCache, rows: Array) -> Array:
    """Rows of a device's own share by local number: [...] int32 -> [..., D] float32."""
    scale = None if cache.scale is None else cache.scale[rows]
    return read(cache.embeddings[rows], scale)


def divided(logits: Array, lengths: Array) -> Array:
    """Corrected logits [...], divided by the lengths [...] of their rows, which are data."""
    return logits / jax.lax.stop_gradient(lengths)


def take_lengths(cache: TargetCache, ids: Array, place: Placement) -> Array | None:
    """The lengths of rows by global id, as last measured.

    Args:
      cache: the cache, split by row.
      ids: [n] int32 rows in range.
      place: the mesh.

    Returns:
      [n] float32 on every device; None where the cache has none.
    """
    if cache.lengths is None:
        return None

    def local(lengths: Array, ids: Array) -> Array:
        here, inside = _local(ids, lengths.shape[0])
        return jax.lax.psum(jnp.where(inside, lengths[here], 0.0), place.mesh.axis_names)

    return place.per_device(local, (ROWS, EVERYWHERE), EVERYWHERE)(cache.lengths, ids)


def take(cache: TargetCache, ids: Array, place: Placement) -> Array:
    """Stale rows by global id.

    Args:
      cache: the cache, split by row.
      ids: [n] int32 rows; ids out of range give zeros.
      place: the mesh.

    Returns:
      [n, D] float32, on every device. Only n x D numbers cross the network.
    """

    def local(cache: TargetCache, ids: Array) -> Array:
        here, inside = _local(ids, cache.embeddings.shape[0])
        rows = jnp.where(inside[:, None], read_at(cache, here), 0.0)
        return jax.lax.psum(rows, place.mesh.axis_names)

    return place.per_device(local, (ROWS, EVERYWHERE), EVERYWHERE)(cache, ids)


def take_tokens(tokens: TargetTokens, ids: Array, place: Placement) -> Array:
    """Token rows by global id: [n] int32 -> [n, T] int32 on every device; out of range gives 0."""

    def local(table: Array, ids: Array) -> Array:
        here, inside = _local(ids, table.shape[0])
        rows = jnp.where(inside[:, None], table[here].astype(jnp.int32), 0)
        return jax.lax.psum(rows, place.mesh.axis_names)

    return place.per_device(local, (ROWS, EVERYWHERE), EVERYWHERE)(tokens.ids, ids)


def write(
    cache: TargetCache, ids: Array, embeddings: Array, step: ArrayLike, place: Placement
) -> TargetCache:
    """Writes fresh rows; donate the cache where it is jitted, so that no copy is made.

    Args:
      cache: the cache, split by row.
      ids: [n] int32 global rows; -1 writes nothing.
      embeddings: [n, D] float32.
      step: scalar int32, the step whose parameters made them.
      place: the mesh.

    Returns:
      The cache with those rows and their `written_at` replaced.
    """

    def local(cache: TargetCache, ids: Array, rows: Array, step: Array) -> TargetCache:
        held = cache.embeddings.shape[0]
        here, inside = _local(ids, held)
        here = jnp.where(inside, here, held)  # one past the end: dropped by the scatter
        rows, scale = stored(rows, cache.embeddings.dtype)
        if scale is not None:
            assert cache.scale is not None  # int8 rows are created with one
            scale = cache.scale.at[here].set(scale, mode="drop")
        return dataclasses.replace(
            cache,
            embeddings=cache.embeddings.at[here].set(rows, mode="drop"),
            scale=scale,
            written_at=cache.written_at.at[here].set(step, mode="drop"),
        )

    return place.per_device(local, (ROWS, EVERYWHERE, EVERYWHERE, EVERYWHERE), ROWS)(
        cache, ids, embeddings, jnp.asarray(step, jnp.int32)
    )


def age(cache: TargetCache, step: ArrayLike) -> Array:
    """Mean age of the written rows at `step`: scalar float32, in steps."""
    written = cache.written_at >= 0
    ages = jnp.where(written, jnp.asarray(step, jnp.int32) - cache.written_at, 0)
    return ages.sum(dtype=jnp.float32) / jnp.maximum(written.sum(), 1)


def _local(ids: Array, rows: int) -> tuple[Array, Array]:
    """Global ids -> (numbers within this device's share, clipped; whether they are inside it)."""
    here = ids - local_start(rows)
    inside = (here >= 0) & (here < rows) & (ids >= 0)
    return jnp.clip(here, 0, rows - 1), inside
