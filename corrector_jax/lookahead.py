"""Candidates for the next batch, found while the device works on this one.

Candidates may be a step old: they say which targets are worth scoring, and the step scores them
anew. A run that is resumed goes on with those that were found already.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.stages import Wrapped

from corrector_jax import distributed, index
from corrector_jax.cache import TargetCache
from corrector_jax.index import Index
from corrector_jax.job import Job
from corrector_jax.paths import AnyPath
from corrector_jax.snapshot import DamagedError
from corrector_jax.state import TrainState
from corrector_jax.types import Array, Batch
from corrector_jax.writer import say

Found = tuple[np.ndarray, np.ndarray]
"""Ids [B, K] int32 and scores [B, K] float32 of this process's rows."""


class Lookahead(Protocol):
    """What the training loop asks."""

    def renew(self, cache: TargetCache, folder: AnyPath, saved: dict[str, Any]) -> None:
        """The cache was embedded anew: what was found in the old one is dropped.

        Args:
          cache: the cache; it may be donated afterwards.
          folder: of its snapshot.
          saved: the reference to it.
        """
        ...

    def resume(
        self,
        cache: TargetCache,
        folder: AnyPath,
        saved: dict[str, Any],
        candidates: list[list[int]] | None,
    ) -> None:
        """Goes on from a checkpoint.

        Args:
          cache: as of `renew`, likewise.
          folder: of its snapshot.
          saved: the reference to it.
          candidates: of `candidates`, at the checkpoint.
        """
        ...

    def start(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> None:
        """Begins to look for a batch's candidates; state and cache may be donated afterwards."""
        ...

    def join(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Batch:
        """The batch with the candidates that were looked for, or are now if there are none."""
        ...

    def candidates(self) -> list[list[int]] | None:
        """What was found for the next batch, [B][K]: waits for it; None if nothing is."""
        ...

    def close(self) -> None:
        """Lets go of what looks."""
        ...


class Nothing:
    """For strategies whose negatives need no candidates."""

    def renew(self, cache: TargetCache, folder: AnyPath, saved: dict[str, Any]) -> None:
        """Nothing to do."""

    def resume(
        self,
        cache: TargetCache,
        folder: AnyPath,
        saved: dict[str, Any],
        candidates: list[list[int]] | None,
    ) -> None:
        """Nothing to do."""

    def start(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> None:
        """Nothing to do."""

    def join(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Batch:
        """The batch as it is, with queries [B, T]."""
        return batch

    def candidates(self) -> None:
        """None."""

    def close(self) -> None:
        """Nothing to do."""


class Searching:
    """A thread that looks for the candidates of one batch; where it looks, subclasses say."""

    def __init__(self, job: Job) -> None:
        """Looks for nothing yet.

        Args:
          job: says what to look for.
        """
        self.job = job
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="candidates")
        self._future: Future[Any] | None = None
        self._found: np.ndarray | None = None

    def ask(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Array:
        """What is computed on the device, dispatched at once: an array [B, ...]."""
        raise NotImplementedError

    def search(self, asked: np.ndarray) -> Any:
        """What the thread makes of it: [B, ...] on the host."""
        raise NotImplementedError

    def whole(self, found: Any) -> np.ndarray:
        """Ids [B, K] int32, of all processes: all of them call this at the same place."""
        raise NotImplementedError

    def renew(self, cache: TargetCache, folder: AnyPath, saved: dict[str, Any]) -> None:
        """Drops what was found among the old rows [N, D]."""
        self._drop()

    def resume(
        self,
        cache: TargetCache,
        folder: AnyPath,
        saved: dict[str, Any],
        candidates: list[list[int]] | None,
    ) -> None:
        """Takes over the candidates [B][K] of the checkpoint."""
        self._drop()
        if candidates is not None:
            self._found = np.asarray(candidates, np.int32)

    def start(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> None:
        """Encodes the batch's queries [B, T] now, and searches in the thread."""
        asked = self.ask(batch, state, cache)
        self._future = self._pool.submit(lambda: self.search(jax.device_get(asked)))

    def join(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Batch:
        """The batch with its candidates [B, K] on the mesh."""
        if not self._looks:
            self.start(batch, state, cache)
        found = self._result()
        self._drop()
        return batch._replace(candidates=self.job.place.put(found, self.job.place.examples))

    def candidates(self) -> list[list[int]] | None:
        """What was found for the next batch, as JSON holds it: [B][K]."""
        return self._result().tolist() if self._looks else None

    def close(self) -> None:
        """Ends the thread once its search is over."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def _looks(self) -> bool:
        return self._future is not None or self._found is not None

    def _result(self) -> np.ndarray:
        if self._found is None:
            assert self._future is not None  # callers look first
            self._found = self.whole(self._future.result())
        return self._found

    def _drop(self) -> None:
        if self._future is not None:
            self._future.exception()  # an old search must not meet a new index
        self._future = self._found = None


class InIndex(Searching):
    """Looks in an index on the host, of the rows that this process's devices hold."""

    _index: Index

    def renew(self, cache: TargetCache, folder: AnyPath, saved: dict[str, Any]) -> None:
        """Builds the index of rows [N, D], and saves it beside their snapshot."""
        super().renew(cache, folder, saved)
        self._index = self._build(*index.rows_here(cache))
        self._index.save(_folder(folder), cache=saved["sha256"])

    def resume(
        self,
        cache: TargetCache,
        folder: AnyPath,
        saved: dict[str, Any],
        candidates: list[list[int]] | None,
    ) -> None:
        """Reads the index back, or builds it anew: of the same rows [N, D] it is the same one."""
        super().resume(cache, folder, saved, candidates)
        ids, rows = index.rows_here(cache)
        made = self._parameters(len(ids))
        if made.leaves > 1:
            try:
                self._index = index.load(_folder(folder), ids, cache=saved["sha256"], made=made)
                return
            except DamagedError as error:
                say(f"the index over the cache is made anew: {error}")
        self._index = self._build(ids, rows)

    def ask(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Array:
        """Queries [B, D], a linear corrector folded in."""
        asked: Array = self._ask(state, batch)
        return asked

    def search(self, asked: np.ndarray) -> Found:
        """The best [B, K] of this process's rows."""
        return self._index.search(asked, self.job.num_candidates)

    def whole(self, found: Found) -> np.ndarray:
        """The best [B, K] of all processes' rows."""
        ids, scores = distributed.gather(found)
        return index.merge(ids, scores, self.job.num_candidates)

    @functools.cached_property
    def _ask(self) -> Wrapped:
        return self.job.ask_index()

    def _parameters(self, rows: int) -> index.Parameters:
        return index.parameters(rows, self.job.num_candidates, **self.job.config.index)

    def _build(self, ids: np.ndarray, rows: np.ndarray) -> Index:
        made = self._parameters(len(ids))
        if made.leaves > 1:
            say(f"building the index: {len(ids):,} targets in {made.leaves:,} leaves")
        return index.build(ids, rows, k=self.job.num_candidates, made=made)


class InCache(Searching):
    """Without ScaNN: the device goes through the whole cache, before each step."""

    def ask(self, batch: Batch, state: TrainState, cache: TargetCache | None) -> Array:
        """The best [B, K] by corrected score."""
        asked: Array = self._ask(state, cache, batch)
        return asked

    def search(self, asked: np.ndarray) -> np.ndarray:
        """[B, K] as they are."""
        return asked

    def whole(self, found: np.ndarray) -> np.ndarray:
        """[B, K] as they are: every process has them all."""
        return found

    @functools.cached_property
    def _ask(self) -> Wrapped:
        return self.job.ask_cache()


def make_lookahead(job: Job) -> Lookahead:
    """What finds the candidates that the job's proposal reads, if it reads any.

    Args:
      job: the job.

    Raises:
      UserError: ScaNN can be imported by some processes and not by others.
    """
    if not job.num_candidates:
        return Nothing()
    missing = index.why_not()
    distributed.require_same("ScaNN (installed or not)", str(bool(missing)))
    if not missing:
        return InIndex(job)
    say(
        f"ScaNN cannot be imported ({missing}), so every step sweeps the cache on the device for "
        "its candidates, which costs what config.negatives.proposal=topk does: pip install scann "
        "and import no TensorFlow before it, or drop config.negatives.proposal=scann"
    )
    return InCache(job)


def _folder(snapshot: AnyPath) -> AnyPath:
    return snapshot / f"index-{jax.process_index()}-of-{jax.process_count()}"
