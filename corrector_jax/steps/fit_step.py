"""The landmarks of a kernel corrector encoded anew, and the corrector solved for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from corrector_jax import cache as caches
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.models.corrector import Nystrom
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.steps import selection
from corrector_jax.types import Array


def fit_step(
    state: TrainState,
    cache: TargetCache,
    tokens: TargetTokens,
    key: Array,
    *,
    model: DualEncoder,
    corrector: Nystrom,
    place: Placement,
) -> TrainState:
    """Draws uniform landmarks, encodes them, and fits h to their drift.

    Args:
      state: the training state; donate it.
      cache: the cache.
      tokens: the token table.
      key: this step's key for landmarks.
      model: the dual encoder.
      corrector: h.
      place: the mesh.

    Returns:
      The state with the corrector fitted and in use: its gate needs no probe, as it is the identity
      but where landmarks say otherwise.
    """
    # One in each of m equal stretches: uniform, and no target twice.
    starts = np.arange(corrector.landmarks + 1) * tokens.size // corrector.landmarks
    first, width = (jnp.asarray(x, jnp.int32) for x in (starts[:-1], np.diff(starts)))
    ids = first + jax.random.randint(key, (corrector.landmarks,), 0, width)
    fresh = selection.encode_rows(state.params, tokens, ids, model=model, place=place)
    params = corrector.fit(caches.take(cache, ids, place), fresh)
    fitted = dataclasses.replace(state.corrector, params=params, gate=jnp.ones((), jnp.float32))
    return dataclasses.replace(state, corrector=fitted)
