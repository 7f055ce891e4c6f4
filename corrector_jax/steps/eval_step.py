"""Exact search, the exact loss and exact divergences over targets that arrive in blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax import metrics
from corrector_jax.cache import TargetCache
from corrector_jax.metrics import Divergence, Mean
from corrector_jax.models.corrector import Corrector
from corrector_jax.negatives import Gated
from corrector_jax.sharding import Placement
from corrector_jax.types import Array


class Best(NamedTuple):
    """A running top-k.

    Attributes:
      scores: [Q, k] float32 inner products, best first; -inf where nothing was found yet.
      ids: [Q, k] int32 rows; -1 where nothing was found yet.
    """

    scores: Array
    ids: Array

    @classmethod
    def empty(cls, queries: int, k: int) -> Best:
        """Nothing found yet, for Q queries."""
        return cls(
            jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), -1, jnp.int32)
        )


def search_step(best: Best, queries: Array, rows: Array, ids: Array) -> Best:
    """Merges one block of targets into the running top-k.

    Args:
      best: the top-k so far; donate it.
      queries: [Q, D] float32.
      rows: [b, D] float32, fresh or corrected embeddings.
      ids: [b] int32; -1 for a place that is empty.

    Returns:
      The top-k of everything seen, exact.
    """
    scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where((ids >= 0)[None, :], scores, -jnp.inf)
    everything = jnp.concatenate([best.scores, scores], axis=1)
    named = jnp.concatenate([best.ids, jnp.broadcast_to(ids[None, :], scores.shape)], axis=1)
    top, where = jax.lax.top_k(everything, best.scores.shape[1])
    return Best(top, jnp.take_along_axis(named, where, axis=1))


class Softmax(NamedTuple):
    """What the loss over all targets is made of (docs/method.md, 1).

    Attributes:
      log_z: [Q] float32, log Z^- of fresh logits: over what was seen, the known positives left out;
        -inf where nothing was.
      positive: [Q, K] float32, fresh logits of the known positives; -inf where not seen, and for
        padding.
    """

    log_z: Array
    positive: Array

    @classmethod
    def empty(cls, queries: int, known: int) -> Softmax:
        """Nothing seen yet, for Q queries with up to K known positives."""
        return cls(
            jnp.full((queries,), -jnp.inf, jnp.float32),
            jnp.full((queries, known), -jnp.inf, jnp.float32),
        )

    def loss(self) -> Array:
        """[Q] float32, nats: the exact loss of each known positive, their mean.

        Once every target was added it is `losses.dense`; 0 for a query without a known positive.
        """
        seen = self.positive > -jnp.inf
        safe = jnp.where(seen, self.positive, 0.0)
        each = jnp.where(seen, jnp.logaddexp(safe, self.log_z[:, None]) - safe, 0.0)
        return each.sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)


def softmax_step(
    seen: Softmax, queries: Array, known: Array, rows: Array, ids: Array, *, beta: float
) -> Softmax:
    """Adds one block of targets to the loss over all of them.

    Args:
      seen: what was seen so far; donate it.
      queries: [Q, D] float32, fresh.
      known: [Q, K] int32, K_i; -1 pads.
      rows: [b, D] float32, fresh embeddings.
      ids: [b] int32; -1 for a place that is empty.
      beta: inverse temperature.

    Returns:
      What was seen with this block.
    """
    scores = beta * jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    there = ids >= 0
    is_it = (known[:, :, None] == ids[None, None, :]) & there[None, None, :]
    found = jnp.max(jnp.where(is_it, scores[:, None, :], -jnp.inf), axis=2)
    others = jnp.where(there[None, :] & ~is_it.any(axis=1), scores, -jnp.inf)
    return Softmax(
        jnp.logaddexp(seen.log_z, jax.nn.logsumexp(others, axis=1)),
        jnp.maximum(seen.positive, found),
    )


class Gap(NamedTuple):
    """How far the stale and the corrected cache are from fresh, summed over blocks.

    Attributes:
      stale: KL(P || P_stale) so far.
      corrected: KL(P || P_h) so far.
      drift: sums of |C - g|^2 and |g|^2.
      corrected_error: sums of |h(C) - g|^2 and |g|^2.
    """

    stale: Divergence
    corrected: Divergence
    drift: Mean
    corrected_error: Mean

    @classmethod
    def empty(cls, queries: int) -> Gap:
        """Nothing seen yet, for Q queries."""

        def nothing() -> Mean:
            return Mean(jnp.zeros(()), jnp.zeros(()))

        return cls(Divergence.empty(queries), Divergence.empty(queries), nothing(), nothing())


def gap_step(
    gap: Gap,
    queries: Array,
    fresh: Array,
    ids: Array,
    cache: TargetCache,
    psi: Gated,
    *,
    beta: float,
    corrector: Corrector,
    place: Placement,
) -> Gap:
    """Adds one block of fresh embeddings to the comparison with the cache.

    Args:
      gap: the sums so far; donate it.
      queries: [Q, D] float32, fresh.
      fresh: [b, D] float32, g(y).
      ids: [b] int32; -1 for a place that is empty.
      cache: the cache.
      psi: the corrector as selection uses it.
      beta: inverse temperature.
      corrector: h.
      place: the mesh.

    Returns:
      The sums with this block; exact over all targets once every block was added.
    """
    there = ids >= 0
    stale = caches.take(cache, ids, place)
    corrected = corrector.apply(psi.params, stale, psi.gate)

    def logits(rows: Array) -> Array:
        return beta * jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)

    scores = logits(fresh)
    weight = there.astype(jnp.float32)
    drift = metrics.relative_error(stale, fresh, weight)
    error = metrics.relative_error(corrected, fresh, weight)
    return Gap(
        stale=gap.stale.merge(Divergence.of(scores, logits(stale), there)),
        corrected=gap.corrected.merge(Divergence.of(scores, logits(corrected), there)),
        drift=_add(gap.drift, drift),
        corrected_error=_add(gap.corrected_error, error),
    )


def _add(a: Mean, b: Mean) -> Mean:
    return Mean(a.total + b.total, a.weight + b.weight)
