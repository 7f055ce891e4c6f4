"""Proposals: where a query's negatives come from; never a known positive.

Every proposal draws `types.Draws`, and can say how likely each query was to draw any candidate,
which is what a pool shared by the batch is weighted with.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from corrector_jax import sweep
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Corrector
from corrector_jax.sharding import Placement
from corrector_jax.types import Array, ArrayLike, Draws, PyTree


class Gated(NamedTuple):
    """A corrector's parameters as selection uses them.

    Attributes:
      params: Psi.
      gate: scalar float32, 1 = h, 0 = the identity (warm-up, docs/method.md, 5).
    """

    params: PyTree
    gate: Array


class Proposal(Protocol):
    """What a strategy plugs into the step."""

    @property
    def draws(self) -> int:
        """m, draws per query."""
        ...

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, known: ArrayLike, key: Array
    ) -> Draws:
        """Draws m negatives for each of the queries [B, D], none of them in known [B, K]."""
        ...

    def log_prob(self, queries: Array, psi: Gated, stale: Array | None, drawn: Draws) -> Array:
        """log p_iy of P candidates of which none is known: [B, P], or [B, 1] where all are alike.

        `stale` holds the candidates' cached rows [P, D] float32.
        """
        ...


@dataclasses.dataclass(frozen=True)
class InBatch:
    """Nothing is drawn: with a shared pool the negatives are the batch's other positives."""

    draws: int = 0

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, known: ArrayLike, key: Array
    ) -> Draws:
        """Draws of width 0 for queries [B, D]; only B is read."""
        batch = queries.shape[0]
        return Draws(
            ids=jnp.zeros((batch, 0), jnp.int32),
            log_prob=jnp.zeros((batch, 0), jnp.float32),
            valid=jnp.zeros((batch, 0), bool),
            log_z=jnp.zeros((batch,), jnp.float32),
        )

    def log_prob(self, queries: Array, psi: Gated, stale: Array | None, drawn: Draws) -> Array:
        """[B, 1] zeros: the batch is not a sample with a probability."""
        return jnp.zeros((queries.shape[0], 1), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """m independent uniform rows of all targets but the known positives; reads no cache.

    Attributes:
      draws: m.
      size: N.
    """

    draws: int
    size: int

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, known: ArrayLike, key: Array
    ) -> Draws:
        """Exact without rejection: one of the N - |K_i| rows left, stepped over the known ones.

        Args:
          queries: [B, D]; only B is read.
          psi: not used.
          cache: not used.
          known: [B, K] int32, distinct; -1 pads.
          key: a PRNG key.

        Returns:
          Draws with log_prob = -log(N - |K_i|) and log_z = 0: there is no partition function.
        """
        known = jnp.asarray(known)
        batch = known.shape[0]
        left = self.size - (known >= 0).sum(axis=1)
        ids = jax.random.randint(key, (batch, self.draws), 0, jnp.maximum(left, 1)[:, None])
        ordered = jnp.sort(jnp.where(known < 0, self.size, known), axis=1)
        ids, _ = jax.lax.scan(lambda i, k: (i + (i >= k[:, None]), None), ids, ordered.T)
        valid = jnp.broadcast_to((left > 0)[:, None], ids.shape)
        log_prob = -jnp.log(jnp.maximum(left, 1).astype(jnp.float32))[:, None]
        return Draws(
            ids=jnp.where(valid, ids, 0),
            log_prob=jnp.where(valid, log_prob, 0.0),
            valid=valid,
            log_z=jnp.zeros((batch,), jnp.float32),
        )

    def log_prob(self, queries: Array, psi: Gated, stale: Array | None, drawn: Draws) -> Array:
        """[B, 1]: every candidate is equally likely; -inf for a query with nothing left."""
        return jnp.where(drawn.valid, drawn.log_prob, -jnp.inf)[:, :1]


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """m independent draws from the corrected softmax over all targets but the known positives.

    Attributes:
      draws: m.
      beta: inverse temperature.
      corrector: h; the identity gives the stale softmax.
      block_rows: R, rows of a sampling block.
      tile_rows: rows scored at once on a device.
      place: the mesh.
    """

    draws: int
    beta: float
    corrector: Corrector
    block_rows: int
    tile_rows: int
    place: Placement

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, known: ArrayLike, key: Array
    ) -> Draws:
        """`sweep.draw_two_level` with h folded where it folds.

        Args:
          queries: [B, D] float32.
          psi: the corrector's parameters and gate.
          cache: the cache, split by row.
          known: [B, K] int32; -1 pads.
          key: a PRNG key.

        Returns:
          Draws with exact log_prob and log_z.

        Raises:
          ValueError: there is no cache.
        """
        if cache is None:
            raise ValueError("drawing from the corrected softmax needs a cache")
        return sweep.draw_two_level(
            self.corrector.fold(psi.params, queries, self.beta, psi.gate),
            self._lift,
            psi,
            cache,
            jnp.asarray(known),
            key,
            draws=self.draws,
            block_rows=self.block_rows,
            tile_rows=self.tile_rows,
            place=self.place,
        )

    def log_prob(self, queries: Array, psi: Gated, stale: Array | None, drawn: Draws) -> Array:
        """l_iy - log Z_i^- of every candidate for every query: [B, P]."""
        if stale is None:
            raise ValueError("weighting by the corrected softmax needs cached rows")
        folded = self.corrector.fold(psi.params, queries, self.beta, psi.gate)
        logits = folded.queries @ self._lift(psi, stale).T + folded.offset[:, None]
        return jnp.where(drawn.valid[:, :1], logits - drawn.log_z[:, None], -jnp.inf)

    def _lift(self, psi: Gated, rows: Array) -> Array:
        return self.corrector.lift(psi.params, rows, psi.gate)
