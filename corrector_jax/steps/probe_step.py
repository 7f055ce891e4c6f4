"""The probe: how stale the cache is, how much of it the corrector mends, and the warm-up gate."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax import metrics
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.metrics import Divergence, Mean
from corrector_jax.models.corrector import Corrector
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.types import Array, ArrayLike

OVERLAP = 10
"""Top results compared for the overlap."""

SAMPLE = 64
"""Targets of the probe whose embeddings are handed out, to be looked at."""


class Sample(NamedTuple):
    """The same few targets three times.

    Attributes:
      stale: [S, D] float32, C[y].
      corrected: [S, D] float32, h(C[y]), whether or not the gate is open.
      fresh: [S, D] float32, g(y).
    """

    stale: ArrayLike
    corrected: ArrayLike
    fresh: ArrayLike


def sampled(rows: Array) -> Array:
    """[U, ...] of the probe's targets -> [S, ...], spread evenly over them."""
    return rows[:: max(1, rows.shape[0] // SAMPLE)][:SAMPLE]


def probe_step(
    state: TrainState,
    cache: TargetCache,
    tokens: TargetTokens,
    query_tokens: Array,
    ids: Array,
    *,
    beta: float,
    model: DualEncoder,
    corrector: Corrector,
    place: Placement,
) -> tuple[TrainState, dict[str, Mean], Sample]:
    """Measures stale and corrected against fresh on a fixed sample (docs/method.md, 7).

    Args:
      state: the training state; donate it.
      cache: the cache.
      tokens: the token table.
      query_tokens: [Q, T] int32, queries never trained on.
      ids: [U] int32, a uniform sample of targets, the same at every probe.
      beta: inverse temperature.
      model: the dual encoder.
      corrector: h.
      place: the mesh.

    Returns:
      The state with the gate opened once h has beaten the identity; metrics: "drift" and
      "corrected_error" (ratios of sums), "kl_stale" and "kl_corrected" (nats, over the sample),
      "overlap_stale" and "overlap_corrected" (of the top 10), "delta_stale" and
      "delta_corrected" (largest logit error seen, a lower bound of delta), "gate"; and a few of the
      embeddings.
    """
    text = place.split(caches.take_tokens(tokens, ids, place))
    fresh = model.encode_targets(state.params, text)
    queries = model.encode_queries(state.params, place.split(query_tokens))
    stale = caches.take(cache, ids, place)
    corrected = corrector.apply(state.corrector.params, stale, 1.0)
    there = jnp.ones(ids.shape, bool)
    weight = there.astype(jnp.float32)

    def logits(rows: Array) -> Array:
        return beta * jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)

    scores, of_stale, of_corrected = logits(fresh), logits(stale), logits(corrected)
    measured = {
        "drift": metrics.relative_error(stale, fresh, weight),
        "corrected_error": metrics.relative_error(corrected, fresh, weight),
        "kl_stale": metrics.mean(Divergence.of(scores, of_stale, there).kl()),
        "kl_corrected": metrics.mean(Divergence.of(scores, of_corrected, there).kl()),
        "overlap_stale": metrics.mean(_overlap(scores, of_stale)),
        "overlap_corrected": metrics.mean(_overlap(scores, of_corrected)),
        "delta_stale": Mean(jnp.max(jnp.abs(scores - of_stale)), jnp.float32(1.0)),
        "delta_corrected": Mean(jnp.max(jnp.abs(scores - of_corrected)), jnp.float32(1.0)),
    }
    beats = jnp.asarray(measured["corrected_error"].total < measured["drift"].total)
    gate = jnp.maximum(state.corrector.gate, beats.astype(jnp.float32))
    measured["gate"] = Mean(gate, jnp.float32(1.0))
    corrector_state = dataclasses.replace(state.corrector, gate=gate)
    sample = Sample(*map(sampled, (stale, corrected, fresh)))
    return dataclasses.replace(state, corrector=corrector_state), measured, sample


def _overlap(scores: Array, other: Array) -> Array:
    """Share of the top targets of `scores` that are among the top of `other`: [Q, U] -> [Q]."""
    k = min(OVERLAP, scores.shape[1])
    _, top = jax.lax.top_k(scores, k)
    _, others = jax.lax.top_k(other, k)
    return (top[:, :, None] == others[:, None, :]).any(axis=-1).mean(axis=-1)
