"""Searches for the likeliest text, a token at a time: greedy, or with beams.

Both are loops of static shapes over any step function, to be called under `jax.jit`, and find what
transformers' `generate` finds with its defaults (length penalty 1, no early stopping).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax.types import Array, PyTree

Step = Callable[[Array, PyTree, Array], tuple[Array, PyTree]]
"""(tokens [B, beams] int32, past, place) -> (logits [B, beams, V] float32, past with the token).

`past` is any tree of leaves [B, beams, ...]; `place` is a scalar int32, the token's place."""


class Symbols(NamedTuple):
    """The tokens a search knows by name.

    Attributes:
      start: what every text is read to begin with; it is no part of what is found.
      end: what ends a text.
      pad: what fills up a row.
    """

    start: int
    end: int
    pad: int


class _Beams(NamedTuple):
    """Where a beam search stands.

    Attributes:
      place: scalar int32, how many tokens the running texts have.
      past: of the step, leaves [B, beams, ...].
      tokens: [B, beams, T] int32, the running texts.
      scores: [B, beams] float32, their log-likelihoods, best first; -inf where there is none.
      ended: [B, beams, T] int32, the best texts that ended.
      ended_scores: [B, beams] float32, their log-likelihoods per token, best first.
      open: [B] bool, False once no running text can get among the best.
    """

    place: Array
    past: PyTree
    tokens: Array
    scores: Array
    ended: Array
    ended_scores: Array
    open: Array


def greedy(step: Step, past: PyTree, *, batch: int, length: int, symbols: Symbols) -> Array:
    """Takes the likeliest token every time.

    Args:
      step: reads one more token of every text.
      past: what it starts from, leaves [B, 1, ...].
      batch: B.
      length: T, how many tokens a text may have, its end included.
      symbols: tokens by name.

    Returns:
      [B, T] int32: a text, its end where it came to one, and padding.
    """
    tokens = jnp.full((batch, length), symbols.pad, jnp.int32)
    last = jnp.full((batch, 1), symbols.start, jnp.int32)
    done = jnp.zeros((batch, 1), bool)

    def going(carry: tuple[Any, ...]) -> Array:
        place, *_, done = carry
        return jnp.asarray((place < length) & ~done.all())

    def take(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        place, past, tokens, last, done = carry
        logits, past = step(last, past, place)
        last = jnp.where(done, symbols.pad, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, last, place, axis=1)
        return place + 1, past, tokens, last, done | (last == symbols.end)

    start: tuple[Any, ...] = (jnp.int32(0), past, tokens, last, done)
    return jax.lax.while_loop(going, take, start)[2]


def beam(
    step: Step, past: PyTree, *, batch: int, beams: int, length: int, symbols: Symbols
) -> Array:
    """Follows the `beams` likeliest texts at once; the one likeliest per token wins.

    A text that ends leaves the beams, and takes part in the choice if it was among the `beams` best
    continuations. A row is over when the best running text, at its likelihood per token so far, is
    behind `beams` texts that ended.

    Args:
      step: reads one more token of every text.
      past: what it starts from, leaves [B, beams, ...].
      batch: B.
      beams: how many texts are followed; twice as many are no more than V.
      length: T, how many tokens a text may have, its end included.
      symbols: tokens by name.

    Returns:
      [B, T] int32: a text, its end where it came to one, and padding.
    """
    empty = jnp.full((batch, beams, length), symbols.pad, jnp.int32)
    nothing = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    # All begin alike: one of them stands for all.
    scores = nothing.at[:, 0].set(0.0)
    every = jnp.ones((batch,), bool)

    def going(s: _Beams) -> Array:
        return (s.place < length) & s.open.any()

    def take(s: _Beams) -> _Beams:
        last = jnp.where(s.place > 0, s.tokens[:, :, s.place - 1], symbols.start)
        logits, past = step(last, s.past, s.place)
        total = s.scores[:, :, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
        words = total.shape[-1]
        # Each text ends in one way only: among twice as many, `beams` go on.
        best, at = jax.lax.top_k(total.reshape(batch, beams * words), 2 * beams)
        parent, token = at // words, (at % words).astype(jnp.int32)
        texts = _pick(s.tokens, parent).at[:, :, s.place].set(token)
        over = (token == symbols.end) | (s.place + 1 == length)

        scores, on = jax.lax.top_k(jnp.where(over, -jnp.inf, best), beams)
        past = jax.tree.map(lambda leaf: _pick(leaf, jnp.take_along_axis(parent, on, 1)), past)

        per_token = best / (s.place + 1).astype(jnp.float32)
        counts = over & (jnp.arange(2 * beams) < beams)[None] & s.open[:, None]
        merged = jnp.concatenate([s.ended_scores, jnp.where(counts, per_token, -jnp.inf)], axis=1)
        ended_scores, chosen = jax.lax.top_k(merged, beams)
        return _Beams(
            place=s.place + 1,
            past=past,
            tokens=_pick(texts, on),
            scores=scores,
            ended=_pick(jnp.concatenate([s.ended, texts], axis=1), chosen),
            ended_scores=ended_scores,
            open=s.open & (scores[:, 0] / (s.place + 1) > ended_scores[:, -1]),
        )

    start = _Beams(jnp.int32(0), past, empty, scores, empty, nothing, every)
    return jax.lax.while_loop(going, take, start).ended[:, 0]


def _pick(leaf: Array, index: Array) -> Array:
    """[B, n, ...] at [B, m] -> [B, m, ...]."""
    index = index.reshape(*index.shape, *[1] * (leaf.ndim - 2))
    return jnp.take_along_axis(leaf, index, axis=1)
