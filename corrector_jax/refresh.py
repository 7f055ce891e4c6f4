"""How a snapshot of the whole corpus is written into the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from corrector_jax import cache as caches
from corrector_jax.cache import TargetCache
from corrector_jax.sharding import Placement
from corrector_jax.types import Array


class CacheWriter:
    """Writes every block into the cache, in place.

    Attributes:
      cache: the cache so far.
    """

    def __init__(self, cache: TargetCache, *, step: int, place: Placement) -> None:
        """Takes the cache over: the caller must not use it again.

        Args:
          cache: rows to overwrite.
          step: the step whose parameters make the rows.
          place: the mesh.
        """
        self.cache = cache
        self._step = place.put_everywhere(np.int32(step))
        self._write: Callable[..., TargetCache] = _writer(place)

    def add(self, ids: Array, fresh: Array) -> None:
        """Writes one block: ids [b] int32, fresh [b, D] float32."""
        self.cache = self._write(self.cache, ids, fresh, self._step)


@functools.cache
def _writer(place: Placement) -> Callable[..., TargetCache]:
    write = functools.partial(caches.write, place=place)
    return place.jit_step(write, place.rows, donate=(0,))
