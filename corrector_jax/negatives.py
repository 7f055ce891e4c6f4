"""Proposals: where a query's negatives come from; never a known positive.

Every proposal draws `types.Draws`, and can say how likely each query was to draw any candidate,
which is what a pool shared by the batch is weighted with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax import losses, sweep
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Corrector, Folded
from corrector_jax.sharding import Placement
from corrector_jax.types import Array, ArrayLike, Batch, Draws, PyTree, Tail


class Gated(NamedTuple):
    """A corrector's parameters as selection uses them.

    Attributes:
      params: Psi.
      gate: scalar float32, 1 = h, 0 = the identity (warm-up, docs/method.md, 5).
    """

    params: PyTree
    gate: Array


class Stale(NamedTuple):
    """What the cache has of P candidates.

    Attributes:
      rows: [P, D] float32.
      lengths: [P] float32, by which corrected logits are divided; None where there are none.
    """

    rows: Array
    lengths: Array | None


class Proposal(Protocol):
    """What a strategy plugs into the step."""

    @property
    def draws(self) -> int:
        """m, draws per query."""
        ...

    @property
    def independent(self) -> int:
        """How many of the draws, the first ones, are i.i.d. from P_h^-."""
        ...

    @property
    def reads_cache(self) -> bool:
        """Whether draws depend on cached embeddings."""
        ...

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Draws m negatives for each of the queries [B, D], none of them in batch.known [B, K]."""
        ...

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
        """log p_iy of P candidates of which none is known: [B, P], or [B, 1] where all are alike.

        `stale` holds what the cache has of the candidates.
        """
        ...


@dataclasses.dataclass(frozen=True)
class InBatch:
    """Nothing is drawn: with a shared pool the negatives are the batch's other positives."""

    draws: int = 0
    independent = 0
    reads_cache = False

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Draws of width 0 for queries [B, D]; only B is read."""
        return _without_probability(jnp.zeros((len(queries), 0), jnp.int32))

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
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
    independent = 0
    reads_cache = False

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Exact without rejection: one of the N - |K_i| rows left, stepped over the known ones.

        Args:
          queries: [B, D]; only B is read.
          psi: not used.
          cache: not used.
          batch: the batch; its known positives are distinct.
          key: a PRNG key.

        Returns:
          Draws with log_prob = -log(N - |K_i|) and log_z = 0: there is no partition function.
        """
        known = jnp.asarray(batch.known)
        left = self.size - (known >= 0).sum(axis=1)
        ids = jax.random.randint(key, (len(known), self.draws), 0, jnp.maximum(left, 1)[:, None])
        ordered = jnp.sort(jnp.where(known < 0, self.size, known), axis=1)
        ids, _ = jax.lax.scan(lambda i, k: (i + (i >= k[:, None]), None), ids, ordered.T)
        valid = jnp.broadcast_to((left > 0)[:, None], ids.shape)
        log_prob = -jnp.log(jnp.maximum(left, 1).astype(jnp.float32))[:, None]
        return Draws(
            ids=jnp.where(valid, ids, 0),
            log_prob=jnp.where(valid, log_prob, 0.0),
            valid=valid,
            log_z=jnp.zeros((len(known),), jnp.float32),
        )

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
        """[B, 1]: every candidate is equally likely; -inf for a query with nothing left."""
        return jnp.where(drawn.valid, drawn.log_prob, -jnp.inf)[:, :1]


@dataclasses.dataclass(frozen=True)
class Mined:
    """The negatives that came with the batch, found and chosen on the host; reads no cache.

    Attributes:
      draws: m.
    """

    draws: int
    independent = 0
    reads_cache = False

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Those of the batch, as far as they are there and not known positives.

        Args:
          queries: not used.
          psi: not used.
          cache: not used.
          batch: the batch, with mined [B, m].
          key: not used: the choice is a function of the seed and the step already.

        Returns:
          Draws without probabilities: such negatives are no sample of all targets.

        Raises:
          ValueError: the batch has none, or another number of them.
        """
        if batch.mined is None or batch.mined.shape[1] != self.draws:
            raise ValueError(f"drawing mined negatives needs a batch with {self.draws} a query")
        mined = jnp.asarray(batch.mined)
        return _without_probability(jnp.where(losses.is_known(mined, batch.known), -1, mined))

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
        """[B, 1] zeros: mined negatives are not a sample with a probability."""
        return jnp.zeros((queries.shape[0], 1), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Draws of one proposal beside those of another, as in corrected draws + mined negatives.

    A target that both of them draw counts once with `truncated`, the one estimator allowed here.

    Attributes:
      first: gives log_z.
      second: gives no probabilities.
    """

    first: Proposal
    second: Proposal

    @property
    def draws(self) -> int:
        """m, of both together."""
        return self.first.draws + self.second.draws

    @property
    def independent(self) -> int:
        """Those of `first` that are."""
        return self.first.independent

    @property
    def reads_cache(self) -> bool:
        """Whether either of them does."""
        return self.first.reads_cache or self.second.reads_cache

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Those of `first`, with the very key it would have alone, then of `second`: [B, m]."""
        one = self.first.draw(queries, psi, cache, batch, key)
        two = self.second.draw(queries, psi, cache, batch, jax.random.fold_in(key, 1))
        ids, log_prob, valid = (
            jnp.concatenate(pair, axis=1) for pair in zip(one[:3], two[:3], strict=True)
        )
        return Draws(ids, log_prob, valid, one.log_z, tail=one.tail)

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
        """[B, 1] zeros: the union is not a sample with a probability."""
        return jnp.zeros((queries.shape[0], 1), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Corrected:
    """What all proposals that score corrected rows share.

    Attributes:
      draws: m.
      beta: inverse temperature.
      corrector: h; the identity gives the stale softmax.
    """

    draws: int
    beta: float
    corrector: Corrector

    independent = 0
    reads_cache = True

    def log_prob(self, queries: Array, psi: Gated, stale: Stale | None, drawn: Draws) -> Array:
        """l_iy - log Z_i^- of every candidate for every query: [B, P]."""
        if stale is None:
            raise ValueError("weighting by the corrected softmax needs cached rows")
        logits = self._logits(self._fold(psi, queries), psi, stale)
        return jnp.where(drawn.valid[:, :1], logits - drawn.log_z[:, None], -jnp.inf)

    def _logits(self, folded: Folded, psi: Gated, stale: Stale) -> Array:
        """[B, P] float32, the very logits that a sweep would see."""
        logits = folded.queries @ self._lift(psi, stale.rows).T + folded.offset[:, None]
        return logits if stale.lengths is None else caches.divided(logits, stale.lengths[None, :])

    def _fold(self, psi: Gated, queries: Array) -> Folded:
        return self.corrector.fold(psi.params, queries, self.beta, psi.gate)

    def _lift(self, psi: Gated, rows: Array) -> Array:
        return self.corrector.lift(psi.params, rows, psi.gate)


@dataclasses.dataclass(frozen=True)
class Cached(Corrected):
    """What all proposals that sweep the whole cache share.

    Attributes:
      block_rows: R, rows of a sampling block.
      tile_rows: rows scored at once on a device.
      place: the mesh.
    """

    block_rows: int
    tile_rows: int
    place: Placement

    def _sweep(
        self,
        draw: Callable[..., Draws],
        queries: Array,
        psi: Gated,
        cache: TargetCache | None,
        known: ArrayLike,
        key: Array | None,
    ) -> Draws:
        if cache is None:
            raise ValueError("drawing from the corrected softmax needs a cache")
        return draw(
            self._fold(psi, queries),
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


@dataclasses.dataclass(frozen=True)
class TwoLevel(Cached):
    """m independent draws from the corrected softmax over all targets but the known positives."""

    @property
    def independent(self) -> int:  # type: ignore[override]
        """All of them."""
        return self.draws

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """`sweep.draw_two_level` with h folded where it folds.

        Args:
          queries: [B, D] float32.
          psi: the corrector's parameters and gate.
          cache: the cache, split by row.
          batch: the batch, for its known positives.
          key: a PRNG key.

        Returns:
          Draws with exact log_prob and log_z.

        Raises:
          ValueError: there is no cache.
        """
        return self._sweep(sweep.draw_two_level, queries, psi, cache, batch.known, key)


@dataclasses.dataclass(frozen=True)
class GumbelTopK(Cached):
    """m distinct targets drawn without replacement from the corrected softmax."""

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """`sweep.draw_top` with noise for queries [B, D]: draws with kappa; as `TwoLevel.draw`."""
        return self._sweep(sweep.draw_top, queries, psi, cache, batch.known, key)


@dataclasses.dataclass(frozen=True)
class TopK(Cached):
    """The m likeliest targets by corrected score (ANCE's choice): hard, and no sample."""

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """`sweep.draw_top` without noise for queries [B, D]; as `TwoLevel.draw`, `key` not used."""
        return self._sweep(sweep.draw_top, queries, psi, cache, batch.known, None)


@dataclasses.dataclass(frozen=True)
class Candidates(Corrected):
    """m independent draws from candidates found on the host and a uniform sample of all targets.

    Scores are those of now, whenever the candidates were found: Z^- is estimated without bias
    however many of the likely targets they miss (docs/method.md, 3, ScaNN path).

    Attributes:
      tail: M, rows of the uniform sample, one for the whole batch.
      size: N.
      tile_rows: rows scored at once on a device.
      place: the mesh.
    """

    tail: int
    size: int
    tile_rows: int
    place: Placement

    @property
    def independent(self) -> int:  # type: ignore[override]
        """All of them."""
        return self.draws

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Scores the batch's candidates and the sample, and draws among both.

        Args:
          queries: [B, D] float32.
          psi: the corrector's parameters and gate.
          cache: the cache, split by row.
          batch: the batch, with candidates [B, K]; they may hold copies and known positives.
          key: a PRNG key.

        Returns:
          Draws with the estimated log_z; log_prob = l_iy - log_z for candidates and sample alike.

        Raises:
          ValueError: there is no cache, or the batch has no candidates.
        """
        if cache is None or batch.candidates is None:
            raise ValueError("drawing from candidates needs a cache and a batch that has some")
        head, known = jnp.asarray(batch.candidates), jnp.asarray(batch.known)
        tail_key, draw_key = jax.random.split(key)
        tail = jax.random.randint(tail_key, (self.tail,), 0, self.size)
        folded = self._fold(psi, queries)
        head_logits = sweep.score_rows(
            folded, self._lift, psi, cache, head, tile_rows=self.tile_rows, place=self.place
        )
        sampled = Stale(
            caches.take(cache, tail, self.place), caches.take_lengths(cache, tail, self.place)
        )
        tail_logits = self._logits(folded, psi, sampled)
        there = jnp.concatenate(
            [
                losses.first_occurrence(jnp.maximum(head, 0), head >= 0)
                & ~losses.is_known(head, known),
                ~_is_among(tail, head) & ~losses.is_known(tail, known),
            ],
            axis=1,
        )
        ids = jnp.concatenate([head, jnp.broadcast_to(tail[None, :], tail_logits.shape)], axis=1)
        logits = jnp.concatenate([head_logits, tail_logits], axis=1)
        # A row of the sample stands for N / M targets.
        scale = jnp.log(jnp.float32(self.size / self.tail))
        scale = jnp.where(jnp.arange(ids.shape[1]) < head.shape[1], 0.0, scale)
        terms = jnp.where(there, logits + scale[None, :], -jnp.inf)
        log_z = jax.nn.logsumexp(terms, axis=1)

        def draw_one(key: Array) -> Array:
            return jnp.argmax(terms + jax.random.gumbel(key, terms.shape, mode="high"), axis=1)

        at = jax.lax.map(draw_one, jax.random.split(draw_key, self.draws)).T
        valid = jnp.broadcast_to((log_z > -jnp.inf)[:, None], at.shape)
        safe = jnp.where(log_z > -jnp.inf, log_z, 0.0)[:, None]
        share = jnp.exp(terms[:, head.shape[1] :] - safe)
        return Draws(
            ids=jnp.where(valid, jnp.take_along_axis(ids, at, axis=1), 0),
            log_prob=jnp.where(valid, jnp.take_along_axis(logits, at, axis=1) - safe, 0.0),
            valid=valid,
            log_z=log_z,
            tail=Tail(share.sum(axis=1), jnp.sqrt(self.tail * share.var(axis=1))),
        )


@dataclasses.dataclass(frozen=True)
class BestCandidates(Corrected):
    """The m likeliest of the candidates found on the host, by corrected score of now; no sample.

    Attributes:
      tile_rows: rows scored at once on a device.
      place: the mesh.
    """

    tile_rows: int
    place: Placement

    def draw(
        self, queries: Array, psi: Gated, cache: TargetCache | None, batch: Batch, key: Array
    ) -> Draws:
        """Scores the batch's candidates and takes the best.

        Args:
          queries: [B, D] float32.
          psi: the corrector's parameters and gate.
          cache: the cache, split by row.
          batch: the batch, with m candidates or more; they may hold copies and known positives.
          key: not used.

        Returns:
          Distinct draws, best first; log_z is that of the candidates alone.

        Raises:
          ValueError: there is no cache, or the batch has no candidates.
        """
        if cache is None or batch.candidates is None:
            raise ValueError("taking the best candidates needs a cache and a batch that has some")
        ids = jnp.asarray(batch.candidates)
        logits = sweep.score_rows(
            self._fold(psi, queries), self._lift, psi, cache, ids,
            tile_rows=self.tile_rows, place=self.place,
        )  # fmt: skip
        there = losses.first_occurrence(jnp.maximum(ids, 0), ids >= 0)
        terms = jnp.where(there & ~losses.is_known(ids, batch.known), logits, -jnp.inf)
        log_z = jax.nn.logsumexp(terms, axis=1)
        best, at = jax.lax.top_k(terms, self.draws)
        valid = best > -jnp.inf
        return Draws(
            ids=jnp.where(valid, jnp.take_along_axis(ids, at, axis=1), 0),
            log_prob=jnp.where(valid, best - log_z[:, None], 0.0),
            valid=valid,
            log_z=log_z,
        )


def _is_among(ids: Array, sets: Array) -> Array:
    """Which of the ids [M] are in each query's set [B, K]: [B, M] bool."""
    # By bisection, not B x M x K comparisons: there may be thousands of each.
    ordered = jnp.sort(sets, axis=1)
    at = jax.vmap(lambda row: jnp.searchsorted(row, ids))(ordered)
    found = jnp.take_along_axis(ordered, jnp.minimum(at, sets.shape[1] - 1), axis=1)
    return found == ids[None, :]


def _without_probability(ids: Array) -> Draws:
    """Draws that are no sample of all targets: [B, m] int32, -1 for one that is not there."""
    return Draws(
        ids=jnp.maximum(ids, 0),
        log_prob=jnp.zeros(ids.shape, jnp.float32),
        valid=ids >= 0,
        log_z=jnp.zeros((len(ids),), jnp.float32),
    )
