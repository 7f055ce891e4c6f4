"""What candidates of the next batch are found with, while the device works on this one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corrector_jax.cache import TargetCache
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.negatives import Corrected, TopK
from corrector_jax.state import TrainState
from corrector_jax.types import Array, Batch


def ask_index(state: TrainState, batch: Batch, *, model: DualEncoder, proposal: Corrected) -> Array:
    """The queries to search an index of stale rows with.

    A linear corrector is folded into them, so that the index finds the best by corrected score; of
    another kind nothing folds, and it finds the best by stale score.

    Args:
      state: the training state, before the step that these queries' candidates are found during.
      batch: the next batch; its query_tokens [B, T] are read.
      model: the dual encoder.
      proposal: gives beta and h.

    Returns:
      [B, D] float32.
    """
    queries = model.encode_queries(state.params, batch.query_tokens)
    psi = state.corrector.gated
    return proposal.corrector.fold(psi.params, queries, proposal.beta, psi.gate).queries


def ask_cache(
    state: TrainState, cache: TargetCache, batch: Batch, *, model: DualEncoder, proposal: TopK
) -> Array:
    """The same candidates without an index: the best by corrected score of the whole cache.

    Args:
      state: the training state.
      cache: the cache.
      batch: the next batch; its query_tokens [B, T] and known [B, K] are read.
      model: the dual encoder.
      proposal: sweeps for K candidates.

    Returns:
      [B, K] int32; -1 where there are no more.
    """
    queries = model.encode_queries(state.params, batch.query_tokens)
    unused = jax.random.key(0)  # the likeliest are no sample
    drawn = proposal.draw(queries, state.corrector.gated, cache, batch, unused)
    return jnp.where(drawn.valid, drawn.ids, -1)
