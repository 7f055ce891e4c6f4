"""Targets in blocks, each embedded once: the one place that goes over a corpus."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from corrector_jax import cache as caches
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.data.tokenize import lengths
from corrector_jax.models.corrector import Corrector
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.negatives import Gated
from corrector_jax.sharding import Placement
from corrector_jax.steps.embed_step import embed_step
from corrector_jax.types import Array, PyTree

BUCKET = 16
"""Block lengths are multiples of this many tokens: few shapes to compile, little padding."""

Progress = Callable[[int], None]
"""Told how many targets a block held, once the block is done."""


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Embeds targets block by block, in order of length, in a few static shapes.

    Attributes:
      model: the dual encoder.
      tokens: the token table.
      lengths: [N] int, tokens of each target.
      place: the mesh.
      block: targets embedded at once, over all devices.
    """

    model: DualEncoder
    tokens: TargetTokens
    lengths: np.ndarray
    place: Placement
    block: int

    def blocks(
        self, params: PyTree, ids: np.ndarray, progress: Progress | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Embeds `ids` with the current parameters.

        Args:
          params: the encoders' parameters.
          ids: [n] rows to embed, in any order.
          progress: told of each block.

        Yields:
          (ids [b] int32 on every device, -1 where the last block is not full; fresh [b, D]
          float32 on every device). A block is meant to be used and dropped.
        """
        width = self.tokens.ids.shape[1]
        for part in id_blocks(self.in_order(ids), self._block):
            longest = int(self.lengths[part[part >= 0]].max())
            length = min(width, -(-longest // BUCKET) * BUCKET)
            placed = self.place.put_everywhere(part)
            fresh = self._embed(params, self.tokens, placed, length=length)
            yield placed, fresh
            if progress is not None:
                fresh.block_until_ready()  # so that the rate shown is the rate of work
                progress(int((part >= 0).sum()))

    def in_order(self, ids: np.ndarray) -> np.ndarray:
        """[n] rows in the order of `blocks`, short texts first; it settles equal scores."""
        return ids[np.argsort(self.lengths[ids], kind="stable")]

    def queries(self, params: PyTree, tokens: np.ndarray) -> Array:
        """Embeds queries.

        Args:
          params: the encoders' parameters.
          tokens: [Q, T] int.

        Returns:
          [Q', D] float32 split by row, Q' >= Q; the rows from Q on are of empty queries.
        """
        rows = self._block * -(-len(tokens) // self._block)
        padded = np.zeros((rows, tokens.shape[1]), np.int32)
        padded[: len(tokens)] = tokens
        parts = [
            self._embed_queries(params, self.place.put_rows(padded[at : at + self._block]))
            for at in range(0, rows, self._block)
        ]
        return self._join(parts)

    @functools.cached_property
    def _block(self) -> int:
        return self.place.pad(self.block)

    @functools.cached_property
    def _embed(self) -> Callable[..., Array]:
        return jit_embed(self.model, self.place)

    @functools.cached_property
    def _join(self) -> Callable[[list[Array]], Array]:
        return self.place.jit_step(jnp.concatenate, self.place.rows)

    @functools.cached_property
    def _embed_queries(self) -> Callable[..., Array]:
        return self.place.jit_step(self.model.encode_queries, self.place.rows)


def jit_embed(model: DualEncoder, place: Placement) -> Wrapped:
    """`embed_step`, jitted: (params, tokens, ids [b], length=T) -> [b, D] on every device."""
    step = functools.partial(embed_step, model=model, place=place)
    return place.jit_step(step, place.everywhere, static=("length",))


def embed_table(
    model: DualEncoder,
    params: PyTree,
    table: np.ndarray,
    *,
    pad_id: int,
    block: int,
    place: Placement,
) -> np.ndarray:
    """Embeds targets that are in no token table, block by block in order of length.

    Args:
      model: the dual encoder.
      params: the encoders' parameters.
      table: [n, T] integer tokens on the host.
      pad_id: what fills rows up.
      block: targets embedded at once, over all devices.
      place: the mesh.

    Returns:
      [n, D] float32 on the host, in the order of the table.
    """
    encode = _jit_targets(model, place)
    held = lengths(table, pad_id)
    found: list[tuple[np.ndarray, Array]] = []
    for part in id_blocks(np.argsort(held, kind="stable"), place.pad(block)):
        rows = part[part >= 0]
        width = min(table.shape[1], -(-max(1, int(held[rows].max())) // BUCKET) * BUCKET)
        tokens = np.full((len(part), width), pad_id, np.int32)
        tokens[: len(rows)] = table[rows, :width]
        # Not waited for: the next block is made while this one is embedded.
        found.append((rows, encode(params, place.put_rows(tokens))))
    out = np.zeros((len(table), model.dim), np.float32)
    for rows, fresh in found:
        out[rows] = np.asarray(fresh)[: len(rows)]
    return out


class Consumer(Protocol):
    """Something that uses every block of a pass over the corpus."""

    def add(self, ids: Array, fresh: Array) -> None:
        """Takes ids [b] int32 (-1 = empty place) and embeddings [b, D] float32."""
        ...


def go_over(
    embedder: Embedder,
    params: PyTree,
    ids: np.ndarray,
    consumers: list[Consumer],
    progress: Progress | None = None,
) -> int:
    """One pass: every target is embedded once and handed to every consumer.

    Args:
      embedder: makes the blocks.
      params: the encoders' parameters.
      ids: [n] rows to go over.
      consumers: use each block before it is dropped.
      progress: told of each block.

    Returns:
      How many targets were encoded, for the ledger.
    """
    for block, fresh in embedder.blocks(params, ids, progress):
        for consumer in consumers:
            consumer.add(block, fresh)
    return len(ids)


def cached_blocks(
    cache: TargetCache,
    psi: Gated,
    ids: np.ndarray,
    *,
    corrector: Corrector,
    block: int,
    place: Placement,
) -> Iterator[tuple[Array, Array]]:
    """The corrected cache as a source of blocks: h(C[y]), nothing is encoded.

    Args:
      cache: the cache.
      psi: the corrector as selection uses it.
      ids: [n] rows.
      corrector: h.
      block: rows at once.
      place: the mesh.

    Yields:
      As `Embedder.blocks`.
    """
    corrected = _jit_corrected(corrector, place)
    for part in id_blocks(ids, place.pad(block)):
        placed = place.put_everywhere(part)
        yield placed, corrected(cache, psi, placed)


def id_blocks(ids: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """[n] rows -> blocks [block] int32, the last one filled up with -1."""
    for at in range(0, len(ids), block):
        part = np.full(block, -1, np.int32)
        held = ids[at : at + block]
        part[: len(held)] = held
        yield part


@functools.lru_cache(maxsize=4)
def _jit_targets(model: DualEncoder, place: Placement) -> Callable[..., Array]:
    return place.jit_step(model.encode_targets, place.everywhere)


@functools.cache
def _jit_corrected(corrector: Corrector, place: Placement) -> Callable[..., Array]:
    def corrected(cache: TargetCache, psi: Gated, ids: Array) -> Array:
        return corrector.apply(psi.params, caches.take(cache, ids, place), psi.gate)

    return place.jit_step(corrected, place.everywhere)
