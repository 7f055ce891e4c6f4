"""The blockwise pass over a sharded cache: exact draws from the corrected softmax.

A row of the cache belongs to one sampling block of R consecutive rows; blocks have global numbers,
so that which noise meets which block does not depend on the mesh. A tile is how many rows one step
of the pass scores at once: it bounds the temporaries ([B, tile] logits) and changes no draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Folded
from corrector_jax.sharding import AXES, EVERYWHERE, ROWS, Placement, local_start
from corrector_jax.types import Array, Draws, PyTree

_NOTHING = jnp.finfo(jnp.float32).min
"""Stands for -inf where a sum over devices must not meet it."""

Lift = Callable[[PyTree, Array], Array]
"""What a corrector does to each row: (parameters, [..., D] stale rows) -> [..., D]."""


def draw_two_level(
    folded: Folded,
    lift: Lift,
    params: PyTree,
    cache: TargetCache,
    known: Array,
    key: Array,
    *,
    draws: int,
    block_rows: int,
    tile_rows: int,
    place: Placement,
) -> Draws:
    """m independent draws a query from P_h^-, with exact log Z^- and log-probabilities.

    Two levels (docs/method.md, 3): a block by Gumbel-max over its masked log-sum-exp, then a row
    within the winning block. No noise per element, no top-k, nothing of size B x N. The draws are
    the same on every mesh.

    Args:
      folded: queries [B, D] and offsets [B], beta and the corrector's linear part included.
      lift: what is left of the corrector per row.
      params: the corrector's parameters (and gate), handed to `lift`.
      cache: the cache, split by row; each device holds whole blocks.
      known: [B, K] int32, rows never drawn for that query; -1 pads.
      key: a PRNG key.
      draws: m.
      block_rows: R. Draws depend on it; log Z does not.
      tile_rows: rows scored at once on a device; no draw depends on it.
      place: the mesh.

    Returns:
      Draws with ids [B, m], log_prob [B, m], valid [B, m], log_z [B].
    """
    batch = folded.queries.shape[0]

    def local(
        folded: Folded, params: PyTree, cache: TargetCache, known: Array, keys: tuple[Array, Array]
    ) -> Draws:
        block_key, row_key = keys
        share = _Share(folded, lift, params, cache, known, block_rows, tile_rows)

        def step(carry: _Best, index: Array) -> tuple[_Best, None]:
            numbers, logits = share.tile(index)
            level = _logsumexp(logits)  # [B, blocks]
            noise = jax.vmap(
                lambda block: jax.random.gumbel(
                    jax.random.fold_in(block_key, block), (batch, draws), mode="high"
                )
            )(numbers)  # [blocks, B, m]
            value = level.T[:, :, None] + noise
            best = jnp.argmax(value, axis=0)  # [B, m]
            found = _Best(
                value=jnp.max(value, axis=0),
                block=numbers[best],
                level=jnp.take_along_axis(level, best, axis=1),
                log_z=_logsumexp(level),
            )
            return _better(carry, found), None

        nothing = _Best(
            value=jnp.full((batch, draws), -jnp.inf),
            block=jnp.zeros((batch, draws), jnp.int32),
            level=jnp.full((batch, draws), -jnp.inf),
            log_z=jnp.full((batch,), -jnp.inf),
        )
        mine, _ = jax.lax.scan(step, _varying(nothing), jnp.arange(share.tiles))

        # Across devices the largest value wins; a tie (both -inf) goes to the lowest block.
        value = jax.lax.pmax(mine.value, AXES)
        ahead = mine.value == value
        block = jax.lax.pmin(jnp.where(ahead, mine.block, jnp.iinfo(jnp.int32).max), AXES)
        owner = ahead & (mine.block == block)
        level = jax.lax.psum(jnp.where(owner, mine.level, 0.0), AXES)
        valid = value > -jnp.inf
        log_z = _total(mine.log_z)

        def draw_row(pair: Array) -> tuple[Array, Array]:
            """A row within the winning block of each (query, draw): [n] -> ids, log p there."""
            ids, logits = share.block(pair // draws, block.reshape(-1)[pair])
            noise = jax.vmap(
                lambda number: jax.random.gumbel(
                    jax.random.fold_in(row_key, number), (block_rows,), mode="high"
                )
            )(pair)
            best = jnp.argmax(logits + noise, axis=1)[:, None]
            log_prob = jnp.take_along_axis(logits, best, axis=1)[:, 0] - _logsumexp(logits)
            return jnp.take_along_axis(ids, best, axis=1)[:, 0], log_prob

        nobody = (jnp.zeros(batch * draws, jnp.int32), jnp.zeros(batch * draws, jnp.float32))
        drawn = share.where_owned(draw_row, owner, nobody, place)
        ids, in_block = (jax.lax.psum(x, AXES).reshape(batch, draws) for x in drawn)
        log_prob = level - log_z[:, None] + in_block
        return Draws(
            ids=jnp.where(valid, ids, 0),
            log_prob=jnp.where(valid, log_prob, 0.0),
            valid=valid,
            log_z=log_z,
        )

    return _swept(local, folded, params, cache, known, tuple(jax.random.split(key)), place)


def draw_top(
    folded: Folded,
    lift: Lift,
    params: PyTree,
    cache: TargetCache,
    known: Array,
    key: Array | None,
    *,
    draws: int,
    block_rows: int,
    tile_rows: int,
    place: Placement,
) -> Draws:
    """m distinct targets a query: a sample without replacement from P_h^-, or the m likeliest.

    Gumbel-top-k without noise per element (docs/method.md, 3): a block's largest perturbed logit is
    distributed as its log-sum-exp plus one Gumbel, so the m + 1 blocks with the largest of those
    hold the m + 1 largest of all. Only they are expanded into rows, their noise conditioned on its
    maximum (Kool et al. 2019). The draws are the same on every mesh.

    Args:
      folded: queries [B, D] and offsets [B], beta and the corrector's linear part included.
      lift: what is left of the corrector per row.
      params: the corrector's parameters (and gate), handed to `lift`.
      cache: the cache, split by row; each device holds whole blocks.
      known: [B, K] int32, rows never drawn for that query; -1 pads.
      key: a PRNG key; None = the m largest logits, without noise.
      draws: m.
      block_rows: R. Draws depend on it where there is a key.
      tile_rows: rows scored at once on a device; no draw depends on it.
      place: the mesh.

    Returns:
      Draws in falling order of the (perturbed) logit, with log_prob under P_h^-; kappa where there
      is a key.
    """
    batch, count = folded.queries.shape[0], draws + 1

    def local(
        folded: Folded,
        params: PyTree,
        cache: TargetCache,
        known: Array,
        keys: tuple[Array, Array] | None,
    ) -> Draws:
        share = _Share(folded, lift, params, cache, known, block_rows, tile_rows)

        def step(
            carry: tuple[Array, Array, Array], index: Array
        ) -> tuple[tuple[Array, Array, Array], None]:
            value, block, log_z = carry
            numbers, logits = share.tile(index)
            level = _logsumexp(logits)  # [B, blocks]
            found = logits.max(axis=-1)
            if keys is not None:
                noise = jax.vmap(
                    lambda number: jax.random.gumbel(
                        jax.random.fold_in(keys[0], number), (batch,), mode="high"
                    )
                )(numbers)
                found = level + noise.T
            named = jnp.broadcast_to(numbers[None, :], found.shape)
            value, block = _top(
                jnp.concatenate([value, found], axis=1),
                jnp.concatenate([block, named], axis=1),
                count,
            )
            return (value, block, jnp.logaddexp(log_z, _logsumexp(level))), None

        nothing = (
            jnp.full((batch, count), -jnp.inf),
            jnp.zeros((batch, count), jnp.int32),
            jnp.full((batch,), -jnp.inf),
        )
        mine, _ = jax.lax.scan(step, _varying(nothing), jnp.arange(share.tiles))
        log_z = _total(mine[2])
        value, block = _top_of_all(mine[0], mine[1], count)  # [B, m + 1], on every device
        owner = share.holds(block) & (value > -jnp.inf)

        most = min(count, block_rows)

        def expand(pair: Array) -> tuple[Array, ...]:
            """The best rows of a winning block: [n] -> perturbed logits, ids, logits [n, most]."""
            query, number = pair // count, block.reshape(-1)[pair]
            ids, logits = share.block(query, number)
            if keys is None:
                return _top(logits, ids, most, logits)
            noise = jax.vmap(
                lambda q, b: jax.random.gumbel(
                    jax.random.fold_in(jax.random.fold_in(keys[1], q), b),
                    (block_rows,),
                    mode="high",
                )
            )(query, number)
            perturbed = _given_max(logits + noise, value.reshape(-1)[pair])
            return _top(perturbed, ids, most, logits)

        rows = (batch * count, most)
        nobody = (jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.int32), jnp.zeros(rows))
        perturbed, ids, logits = (
            x.reshape(batch, -1) for x in share.where_owned(expand, owner, nobody, place)
        )
        perturbed, ids, logits = _top(perturbed, ids, count, logits)
        best, ids, logits = _top_of_all(perturbed, ids, count, logits)
        valid = best[:, :draws] > -jnp.inf
        # What is not a number stays so: such a step must be seen, and skipped.
        safe = jnp.where(log_z == -jnp.inf, 0.0, log_z)[:, None]
        return Draws(
            ids=jnp.where(valid, ids[:, :draws], 0),
            log_prob=jnp.where(valid, logits[:, :draws] - safe, 0.0),
            valid=valid,
            log_z=log_z,
            kappa=None if keys is None else best[:, draws] - safe[:, 0],
        )

    keys = None if key is None else tuple(jax.random.split(key))
    return _swept(local, folded, params, cache, known, keys, place)


def score_rows(
    folded: Folded,
    lift: Lift,
    params: PyTree,
    cache: TargetCache,
    ids: Array,
    *,
    tile_rows: int,
    place: Placement,
) -> Array:
    """The corrected logits of each query's own candidates; each device scores the rows it holds.

    Args:
      folded: queries [B, D] and offsets [B], beta and the corrector's linear part included.
      lift: what is left of the corrector per row.
      params: the corrector's parameters (and gate), handed to `lift`.
      cache: the cache, split by row.
      ids: [B, K] int32 rows; -1 gives 0.
      tile_rows: rows scored at once on a device.
      place: the mesh.

    Returns:
      [B, K] float32.
    """
    pairs, at_once = ids.size, min(ids.size, tile_rows)

    def local(folded: Folded, params: PyTree, cache: TargetCache, ids: Array) -> Array:
        held = cache.embeddings.shape[0]
        here = ids.reshape(-1) - local_start(held)
        mine = (ids.reshape(-1) >= 0) & (here >= 0) & (here < held)
        mine_first, count = jnp.argsort(~mine, stable=True), mine.sum()

        def some(turn: Array, done: Array) -> Array:
            at = turn * at_once + jnp.arange(at_once)
            pair = mine_first[jnp.minimum(at, pairs - 1)]
            query = pair // ids.shape[1]
            own = jnp.clip(here[pair], 0, held - 1)
            rows = lift(params, caches.read_at(cache, own))
            logits = jnp.sum(folded.queries[query] * rows, axis=1) + folded.offset[query]
            if cache.lengths is not None:
                logits = caches.divided(logits, cache.lengths[own])
            return done.at[jnp.where(at < count, pair, pairs)].set(logits, mode="drop")

        done = jax.lax.fori_loop(0, -(-count // at_once), some, _varying(jnp.zeros(pairs)))
        return jax.lax.psum(done, AXES).reshape(ids.shape)

    scored = place.per_device(local, (EVERYWHERE, EVERYWHERE, ROWS, EVERYWHERE), EVERYWHERE)
    with jax.named_scope("sweep"):
        return scored(folded, params, cache, ids)


def measure_lengths(
    length: Lift, params: PyTree, cache: TargetCache, *, tile_rows: int, place: Placement
) -> TargetCache:
    """The cache with every row's length measured anew; donate it.

    Args:
      length: of a corrector: (parameters, [n, D] stale rows) -> [n].
      params: the corrector's parameters (and gate), handed to `length`.
      cache: the cache, split by row, with lengths.
      tile_rows: rows measured at once on a device.
      place: the mesh.

    Returns:
      The cache; nothing but its lengths has changed.
    """

    def local(params: PyTree, cache: TargetCache) -> TargetCache:
        held = cache.embeddings.shape[0]
        at_once = min(held, tile_rows)

        def some(turn: Array, lengths: Array) -> Array:
            # The last tile is moved back to end with the share.
            start = jnp.minimum(turn * at_once, held - at_once)
            found = length(params, caches.read_slice(cache, start, at_once))
            return jax.lax.dynamic_update_slice_in_dim(lengths, found, start, axis=0)

        assert cache.lengths is not None  # only a corrector that has lengths is measured
        turns = -(-held // at_once)
        return dataclasses.replace(cache, lengths=jax.lax.fori_loop(0, turns, some, cache.lengths))

    with jax.named_scope("lengths"):
        return place.per_device(local, (EVERYWHERE, ROWS), ROWS)(params, cache)


class _Share:
    """A device's own rows of the cache while they are swept: the logits of a tile, and of a block.

    Attributes:
      tiles: how many the share is swept in.
    """

    def __init__(
        self,
        folded: Folded,
        lift: Lift,
        params: PyTree,
        cache: TargetCache,
        known: Array,
        block_rows: int,
        tile_rows: int,
    ) -> None:
        """Takes what `draw_two_level` takes, within `Placement.per_device`."""
        self._folded, self._cache, self._known = folded, cache, known
        self._lift, self._block_rows = lambda rows: lift(params, rows), block_rows
        held = cache.embeddings.shape[0]
        self._first_row = local_start(held)
        self._first_block = self._first_row // block_rows
        self._blocks = held // block_rows
        self._per_tile = _blocks_per_tile(self._blocks, tile_rows // block_rows)
        self.tiles = -(-self._blocks // self._per_tile)
        order = jnp.argsort(known.reshape(-1))  # by row, so that a tile finds its own
        self._known_rows, self._known_to = known.reshape(-1)[order], order // known.shape[1]

    def tile(self, index: Array) -> tuple[Array, Array]:
        """Global numbers of a tile's blocks [blocks], and their logits [B, blocks, R]."""
        per_tile, rows = self._per_tile, self._block_rows
        # The last tile is moved back to end with the share; blocks already seen are masked.
        start = jnp.minimum(index * per_tile, self._blocks - per_tile)
        numbers = start + jnp.arange(per_tile)
        stale = caches.read_slice(self._cache, start * rows, per_tile * rows)
        logits = self._folded.queries @ self._lift(stale).T + self._folded.offset[:, None]
        if self._cache.lengths is not None:
            lengths = jax.lax.dynamic_slice_in_dim(
                self._cache.lengths, start * rows, per_tile * rows
            )
            logits = caches.divided(logits, lengths[None, :])
        ids = self._first_row + start * rows + jnp.arange(per_tile * rows)
        out = (ids >= self._cache.size) | jnp.repeat(numbers < index * per_tile, rows)
        logits = jnp.where(out[None, :], -jnp.inf, logits)
        # Masked before the log-sum-exp: subtracting a known positive afterwards cancels.
        logits = _mask(logits, ids[0], self._known_rows, self._known_to)
        return self._first_block + numbers, logits.reshape(-1, per_tile, rows)

    def block(self, query: Array, number: Array) -> tuple[Array, Array]:
        """Rows of block `number` [n] as query [n] sees them, same mask: ids, logits [n, R]."""
        own = jnp.clip(number - self._first_block, 0, self._blocks - 1)
        here = own[:, None] * self._block_rows + jnp.arange(self._block_rows)[None, :]
        rows = self._lift(caches.read_at(self._cache, here))  # [n, R, D]
        logits = jnp.einsum("nd,nrd->nr", self._folded.queries[query], rows)
        logits += self._folded.offset[query][:, None]
        if self._cache.lengths is not None:
            logits = caches.divided(logits, self._cache.lengths[here])
        ids = self._first_row + here
        known = (ids[:, :, None] == self._known[query][:, None, :]).any(-1)
        return ids, jnp.where((ids >= self._cache.size) | known, -jnp.inf, logits)

    def holds(self, number: Array) -> Array:
        """Whether this device holds block `number`."""
        return (number >= self._first_block) & (number < self._first_block + self._blocks)

    def where_owned(
        self, work: Callable[[Array], Any], owner: Array, nobody: PyTree, place: Placement
    ) -> Any:
        """Does `work` for the (query, draw) pairs whose block this device holds, a turn at a time.

        A device that holds none does nothing, and no more rows are alive at once than a tile has.

        Args:
          work: pairs [n] int32 -> arrays [n, ...].
          owner: [B, m] bool.
          nobody: arrays [B m, ...], what stands where this device is not the owner.
          place: the mesh.

        Returns:
          Arrays [B m, ...].
        """
        batch, pairs = owner.shape[0], owner.size
        at_once = min(batch, -(-pairs // place.num_devices))
        together = min(at_once, self._per_tile)
        at_once = -(-at_once // together) * together
        mine_first = jnp.argsort(~owner.reshape(-1), stable=True)
        count = owner.sum()

        def some(turn: Array, done: Any) -> Any:
            at = turn * at_once + jnp.arange(at_once)
            pair = mine_first[jnp.minimum(at, pairs - 1)]
            there = jnp.where(at < count, pair, pairs)  # one past the end: dropped
            found = jax.lax.map(work, pair.reshape(-1, together))
            return jax.tree.map(
                lambda held, new: held.at[there].set(
                    new.reshape(at_once, *held.shape[1:]), mode="drop"
                ),
                done,
                found,
            )

        return jax.lax.fori_loop(0, -(-count // at_once), some, _varying(nobody))


def _swept(
    local: Callable[..., Draws],
    folded: Folded,
    params: PyTree,
    cache: TargetCache,
    known: Array,
    keys: tuple[Array, ...] | None,
    place: Placement,
) -> Draws:
    """`local` on every device's own rows; the name is how its share of a step is found."""
    swept = place.per_device(
        local, (EVERYWHERE, EVERYWHERE, ROWS, EVERYWHERE, EVERYWHERE), EVERYWHERE
    )
    with jax.named_scope("sweep"):
        return swept(folded, params, cache, known, keys)


def tile_rows(
    budget: int, *, batch: int, dim: int, hidden: int, draws: int, block_rows: int
) -> int:
    """How many rows a tile may have for the sweep's temporaries to stay within a budget.

    Args:
      budget: bytes on a device.
      batch: B.
      dim: D.
      hidden: numbers a row passes through in the corrector.
      draws: m.
      block_rows: R.

    Returns:
      Rows: whole blocks, and at least one.
    """
    # Logits before and after the mask and as exponentials; rows as read, as corrected and squared;
    # noise and perturbed levels of every block, with the words they are made of.
    numbers = 3 * batch + 3 * dim + 2 * hidden + 6 * batch * draws / block_rows
    return max(1, int(budget / (4 * numbers * block_rows))) * block_rows


class _Best(NamedTuple):
    """The running winner of every draw, and the running log-sum-exp.

    Attributes:
      value: [B, m] float32, the largest perturbed block level so far.
      block: [B, m] int32, its global block number.
      level: [B, m] float32, that block's log-sum-exp without noise.
      log_z: [B] float32, log-sum-exp of everything seen.
    """

    value: Array
    block: Array
    level: Array
    log_z: Array


def _better(a: _Best, b: _Best) -> _Best:
    """The winner of two; a tie stays with `a`, which is the lower block."""
    won = b.value > a.value
    return _Best(
        value=jnp.where(won, b.value, a.value),
        block=jnp.where(won, b.block, a.block),
        level=jnp.where(won, b.level, a.level),
        log_z=jnp.logaddexp(a.log_z, b.log_z),
    )


def _mask(logits: Array, first: Array, known_rows: Array, known_to: Array) -> Array:
    """-inf where a target is known to a query.

    Every tile looks at its own known positives alone: a scatter of all of them, tile by tile, would
    be most of the work where queries have many.

    Args:
      logits: [B, tile].
      first: scalar, the global row of the tile's first column.
      known_rows: [n] int32 global rows in rising order; negative ones are none.
      known_to: [n] int32, the query of each.

    Returns:
      [B, tile].
    """
    count, tile = len(known_rows), logits.shape[1]
    if not count:
        return logits
    at_once = min(count, 256)
    low, high = jnp.searchsorted(known_rows, jnp.stack([first, first + tile]))

    def some(turn: Array, logits: Array) -> Array:
        at = low + turn * at_once + jnp.arange(at_once)
        own = jnp.minimum(at, count - 1)
        columns = jnp.where(at < high, known_rows[own] - first, tile)  # dropped by the scatter
        return logits.at[known_to[own], columns].set(-jnp.inf, mode="drop")

    return jax.lax.fori_loop(0, -(-(high - low) // at_once), some, logits)


def _given_max(gumbels: Array, largest: Array) -> Array:
    """Perturbed logits [n, R] conditioned on their maximum [n]; -inf where there is no row."""
    top = gumbels.max(axis=1)
    top = jnp.where(top > -jnp.inf, top, 0.0)[:, None]
    largest = largest[:, None]
    there = gumbels > -jnp.inf
    gumbels = jnp.where(there, gumbels, 0.0)
    gap = largest - gumbels + jnp.log1p(-jnp.exp(jnp.where(there, gumbels - top, -1.0)))
    moved = largest - jnp.maximum(gap, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(gap)))
    return jnp.where(there, moved, -jnp.inf)


def _top(values: Array, named: Array, count: int, *more: Array) -> tuple[Array, ...]:
    """The largest `count` of each row of [B, n], and what stands beside them."""
    best, at = jax.lax.top_k(values, count)
    return best, *(jnp.take_along_axis(x, at, axis=1) for x in (named, *more))


def _top_of_all(values: Array, named: Array, count: int, *more: Array) -> tuple[Array, ...]:
    """The same over the devices, on every device: [B, count] each."""

    def all_of(x: Array) -> Array:
        # A sum with zeros, not a gather: the result is then known to be the same everywhere.
        devices = jax.lax.psum(1, AXES)
        held = jnp.zeros((devices, *x.shape), x.dtype).at[jax.lax.axis_index(AXES)].set(x)
        return jnp.moveaxis(jax.lax.psum(held, AXES), 0, 1).reshape(len(x), -1)

    safe = jnp.where(values > -jnp.inf, values, _NOTHING)
    best, *rest = _top(all_of(safe), all_of(named), count, *map(all_of, more))
    return jnp.where(best > _NOTHING, best, -jnp.inf), *rest


def _total(log_z: Array) -> Array:
    """Log-sum-exp over the devices: [B]."""
    top = jax.lax.pmax(log_z, AXES)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    return top + jnp.log(jax.lax.psum(jnp.exp(log_z - top), AXES))


def _varying(tree: Any) -> Any:
    """Constants, marked as something that every device will change for itself."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, AXES, to="varying"), tree)


def _logsumexp(x: Array) -> Array:
    """Log-sum-exp over the last axis; -inf where everything is -inf."""
    return jax.nn.logsumexp(x, axis=-1)


def _blocks_per_tile(blocks: int, most: int) -> int:
    """Blocks of a tile: as few tiles as `most` allows, then as even as they come."""
    tiles = -(-blocks // max(1, most))
    return -(-blocks // tiles)
