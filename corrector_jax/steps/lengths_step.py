"""The lengths that a linear corrector's logits are divided by, measured over the whole cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from corrector_jax import sweep
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Corrector
from corrector_jax.negatives import Gated
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState


def lengths_step(
    state: TrainState,
    cache: TargetCache,
    *,
    corrector: Corrector,
    tile_rows: int,
    place: Placement,
) -> tuple[TrainState, TargetCache]:
    """Measures lengths with the corrector as it is now.

    Every step in between draws with the lengths of then and the corrector of now: what a logit is
    divided by is a few steps old, the same in log Z and in log p, so that draws stay exact draws of
    the softmax that they say they are from.

    Args:
      state: the training state; donate it.
      cache: the cache, with lengths; donate it.
      corrector: h.
      tile_rows: rows measured at once on a device.
      place: the mesh.

    Returns:
      The state, which remembers what they were measured with, and the cache.
    """
    # Copies: the next step is given both, and no buffer may be given twice.
    psi = jax.tree.map(jnp.copy, state.corrector.gated)
    cache = measure(psi, cache, corrector=corrector, tile_rows=tile_rows, place=place)
    measured = dataclasses.replace(state.corrector, measured=psi)
    return dataclasses.replace(state, corrector=measured), cache


def measure(
    psi: Gated, cache: TargetCache, *, corrector: Corrector, tile_rows: int, place: Placement
) -> TargetCache:
    """Measures lengths with any corrector, as a resumed run does with the one of then.

    Args:
      psi: the corrector's parameters and gate.
      cache: the cache, with lengths; donate it.
      corrector: h.
      tile_rows: rows measured at once on a device.
      place: the mesh.

    Returns:
      The cache; nothing but its lengths has changed.
    """
    return sweep.measure_lengths(
        lambda psi, rows: corrector.length(psi.params, rows, psi.gate),
        psi,
        cache,
        tile_rows=tile_rows,
        place=place,
    )
