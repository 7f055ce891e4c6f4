"""The blockwise pass over a sharded cache: exact draws from the corrected softmax.

A row of the cache belongs to one sampling block of R consecutive rows; blocks have global numbers,
so that which noise meets which block does not depend on the mesh. A tile is how many rows one step
of the pass scores at once: it bounds the temporaries ([B, tile] logits) and changes no draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax import cache as caches
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Folded
from corrector_jax.sharding import AXES, EVERYWHERE, ROWS, Placement, local_start
from corrector_jax.types import Array, Draws, PyTree

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
    block_key, row_key = jax.random.split(key)
    batch = folded.queries.shape[0]

    def local(
        folded: Folded, params: PyTree, cache: TargetCache, known: Array, keys: tuple[Array, Array]
    ) -> Draws:
        block_key, row_key = keys
        held = cache.embeddings.shape[0]
        first_row = local_start(held)
        first_block = first_row // block_rows
        blocks = held // block_rows
        per_tile = _blocks_per_tile(blocks, tile_rows // block_rows)
        tile = per_tile * block_rows

        order = jnp.argsort(known.reshape(-1))  # by row, so that a tile finds its own
        known_rows, known_to = known.reshape(-1)[order], order // known.shape[1]

        def logits_of(rows: Array) -> Array:
            return folded.queries @ rows.T + folded.offset[:, None]

        def step(carry: _Best, index: Array) -> tuple[_Best, None]:
            # The last tile is moved back to end with the share; blocks already seen are masked.
            start = jnp.minimum(index * per_tile, blocks - per_tile)
            numbers = start + jnp.arange(per_tile)
            rows = lift(params, caches.read_slice(cache, start * block_rows, tile))
            logits = logits_of(rows)  # [B, tile]
            ids = first_row + start * block_rows + jnp.arange(tile)
            out = (ids >= cache.size) | jnp.repeat(numbers < index * per_tile, block_rows)
            logits = jnp.where(out[None, :], -jnp.inf, logits)
            # Masked before the log-sum-exp: subtracting a known positive afterwards cancels.
            logits = _mask(logits, ids[0], known_rows, known_to)
            level = _logsumexp(logits.reshape(batch, per_tile, block_rows))  # [B, blocks]
            noise = jax.vmap(
                lambda block: jax.random.gumbel(
                    jax.random.fold_in(block_key, block), (batch, draws), mode="high"
                )
            )(first_block + numbers)  # [blocks, B, m]
            value = level.T[:, :, None] + noise
            best = jnp.argmax(value, axis=0)  # [B, m]
            value = jnp.max(value, axis=0)
            found = _Best(
                value=value,
                block=first_block + start + best,
                level=jnp.take_along_axis(level, best, axis=1),
                log_z=_logsumexp(level),
            )
            return _better(carry, found), None

        tiles = -(-blocks // per_tile)
        nothing = _Best(
            value=jnp.full((batch, draws), -jnp.inf),
            block=jnp.zeros((batch, draws), jnp.int32),
            level=jnp.full((batch, draws), -jnp.inf),
            log_z=jnp.full((batch,), -jnp.inf),
        )
        nothing = jax.tree.map(lambda x: jax.lax.pcast(x, AXES, to="varying"), nothing)
        mine, _ = jax.lax.scan(step, nothing, jnp.arange(tiles))

        # Across devices the largest value wins; a tie (both -inf) goes to the lowest block.
        value = jax.lax.pmax(mine.value, AXES)
        ahead = mine.value == value
        block = jax.lax.pmin(jnp.where(ahead, mine.block, jnp.iinfo(jnp.int32).max), AXES)
        owner = ahead & (mine.block == block)
        level = jax.lax.psum(jnp.where(owner, mine.level, 0.0), AXES)
        valid = value > -jnp.inf
        top = jax.lax.pmax(mine.log_z, AXES)
        finite_top = jnp.where(top > -jnp.inf, top, 0.0)
        log_z = finite_top + jnp.log(jax.lax.psum(jnp.exp(mine.log_z - finite_top), AXES))

        def draw_row(pair: Array) -> tuple[Array, Array]:
            """A row within the winning block of each (query, draw): [n] -> ids, log p there."""
            query = pair // draws
            own = jnp.clip(block.reshape(-1)[pair] - first_block, 0, blocks - 1)
            here = own[:, None] * block_rows + jnp.arange(block_rows)[None, :]
            rows = lift(params, caches.read_at(cache, here))  # [n, R, D]
            logits = jnp.einsum("nd,nrd->nr", folded.queries[query], rows)
            logits += folded.offset[query][:, None]
            ids = first_row + here
            out = (ids >= cache.size) | (ids[:, :, None] == known[query][:, None, :]).any(-1)
            logits = jnp.where(out, -jnp.inf, logits)
            noise = jax.vmap(
                lambda number: jax.random.gumbel(
                    jax.random.fold_in(row_key, number), (block_rows,), mode="high"
                )
            )(pair)
            best = jnp.argmax(logits + noise, axis=1)[:, None]
            log_prob = jnp.take_along_axis(logits, best, axis=1)[:, 0] - _logsumexp(logits)
            return jnp.take_along_axis(ids, best, axis=1)[:, 0], log_prob

        # Each device draws in the blocks it holds, a turn at a time: one that holds none of the
        # winners does nothing. No more rows are alive at once than a tile has.
        pairs = batch * draws
        at_once = min(batch, -(-pairs // place.num_devices))
        together = min(at_once, per_tile)
        at_once = -(-at_once // together) * together
        mine_first = jnp.argsort(~owner.reshape(-1), stable=True)
        count = owner.sum()

        def some(turn: Array, drawn: tuple[Array, Array]) -> tuple[Array, Array]:
            at = turn * at_once + jnp.arange(at_once)
            pair = mine_first[jnp.minimum(at, pairs - 1)]
            there = jnp.where(at < count, pair, pairs)  # one past the end: dropped
            found = jax.lax.map(draw_row, pair.reshape(-1, together))
            return tuple(  # type: ignore[return-value]
                held.at[there].set(new.reshape(-1), mode="drop")
                for held, new in zip(drawn, found, strict=True)
            )

        drawn = (jnp.zeros(pairs, jnp.int32), jnp.zeros(pairs, jnp.float32))
        drawn = jax.tree.map(lambda x: jax.lax.pcast(x, AXES, to="varying"), drawn)
        drawn = jax.lax.fori_loop(0, -(-count // at_once), some, drawn)
        ids, in_block = (jax.lax.psum(x, AXES).reshape(batch, draws) for x in drawn)
        log_prob = level - log_z[:, None] + in_block
        return Draws(
            ids=jnp.where(valid, ids, 0),
            log_prob=jnp.where(valid, log_prob, 0.0),
            valid=valid,
            log_z=log_z,
        )

    swept = place.per_device(
        local, (EVERYWHERE, EVERYWHERE, ROWS, EVERYWHERE, EVERYWHERE), EVERYWHERE
    )
    with jax.named_scope("sweep"):  # by which its share of a step is found
        return swept(folded, params, cache, known, (block_key, row_key))


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


def _logsumexp(x: Array) -> Array:
    """Log-sum-exp over the last axis; -inf where everything is -inf."""
    return jax.nn.logsumexp(x, axis=-1)


def _blocks_per_tile(blocks: int, most: int) -> int:
    """Blocks of a tile: as few tiles as `most` allows, then as even as they come."""
    tiles = -(-blocks // max(1, most))
    return -(-blocks // tiles)
