"""What a step does to the cache: nothing, or fresh rows in the place of stale ones.

A corrector is one map from one snapshot to now, so a cache of mixed age goes with h = identity
alone (docs/method.md, 2); whole snapshots are made between steps, by `refresh`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax import losses
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.sharding import Placement
from corrector_jax.steps.selection import Selected, encode_rows
from corrector_jax.types import Array, PyTree


class CachePolicy(Protocol):
    """What a strategy does to the cache within a step."""

    @property
    def rows(self) -> int:
        """Targets encoded for it at each step, beside those that are encoded anyway."""
        ...

    @property
    def rewrites(self) -> bool:
        """Whether rows change within steps, so that checkpoints must hold the cache itself."""
        ...

    def update(
        self,
        cache: TargetCache,
        params: PyTree,
        tokens: TargetTokens,
        chosen: Selected,
        step: Array,
        taken: Array,
    ) -> TargetCache:
        """The cache after a step.

        Args:
          cache: the cache, split by row.
          params: the parameters that made the step's fresh embeddings.
          tokens: the token table.
          chosen: positives and draws, B x (1 + m) of them.
          step: scalar int32, steps done before this one.
          taken: scalar bool, False where the step is skipped: then nothing is written.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Keep:
    """The cache stays as it is until it is refreshed."""

    rows = 0
    rewrites = False

    def update(
        self,
        cache: TargetCache,
        params: PyTree,
        tokens: TargetTokens,
        chosen: Selected,
        step: Array,
        taken: Array,
    ) -> TargetCache:
        """The same cache: every row [N, D] stays."""
        return cache


@dataclasses.dataclass(frozen=True)
class WriteBack:
    """Positives and draws, encoded anyway, go to their own rows (Lindgren et al. 2021).

    Attributes:
      place: the mesh.
    """

    place: Placement
    rows = 0
    rewrites = True

    def update(
        self,
        cache: TargetCache,
        params: PyTree,
        tokens: TargetTokens,
        chosen: Selected,
        step: Array,
        taken: Array,
    ) -> TargetCache:
        """The cache with the rows of `chosen` ([B, 1 + m] ids) made new."""
        ids, there = chosen.ids.reshape(-1), chosen.there.reshape(-1)
        # Each row once: of two writers the device would take either, and they may round apart.
        once = losses.first_occurrence(ids, there)
        fresh = jax.lax.stop_gradient(chosen.fresh).reshape(len(ids), -1)
        return _write(cache, ids, fresh, once & taken, step, self.place)


@dataclasses.dataclass(frozen=True)
class Rolling:
    """A slice of the corpus is re-embedded at every step, round robin.

    Attributes:
      rows: targets of a slice, at most N.
      model: the dual encoder.
      place: the mesh.
    """

    rows: int
    model: DualEncoder
    place: Placement
    rewrites = True

    def update(
        self,
        cache: TargetCache,
        params: PyTree,
        tokens: TargetTokens,
        chosen: Selected,
        step: Array,
        taken: Array,
    ) -> TargetCache:
        """The cache with the slice of this step, [rows, D], made new."""
        # The first row in whole passes and rest: step x rows would overflow in a long run.
        per_pass = -(-cache.size // self.rows)
        ids = (step % per_pass) * self.rows + jnp.arange(self.rows)
        ids = jnp.where(ids < cache.size, ids, -1)
        fresh = encode_rows(params, tokens, ids, model=self.model, place=self.place)
        return _write(cache, ids, fresh, taken, step, self.place)


def _write(
    cache: TargetCache, ids: Array, fresh: Array, there: Array, step: Array, place: Placement
) -> TargetCache:
    """The rows that are there, and finite: one that is not would never be drawn and mended."""
    there = there & jnp.isfinite(fresh).all(axis=1)
    return caches.write(cache, jnp.where(there, ids, -1), fresh, step, place)
