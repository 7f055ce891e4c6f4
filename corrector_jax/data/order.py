"""Batches as a function of (seed, step): nothing is carried, so a resumed run sees the same.

Queries run through one permutation per epoch, back to back; a batch may span two epochs. The raw
words of PCG64 are used, whose stream NumPy promises to keep; that of `Generator.permutation` it
does not.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from corrector_jax.types import Batch

_ORDER, _POSITIVE, _MINED, _ANSWER = 0, 1, 2, 3  # streams that share a seed

T = TypeVar("T")


def batch_rows(step: int, *, num_queries: int, batch_size: int, seed: int) -> np.ndarray:
    """The queries of a step.

    Args:
      step: t >= 0.
      num_queries: n, of the training split.
      batch_size: B, of the global batch; may exceed n.
      seed: >= 0.

    Returns:
      [B] int64 in [0, n).
    """
    position = step * batch_size + np.arange(batch_size)
    epoch, place = np.divmod(position, num_queries)
    rows = [
        _permutation(number, num_queries, seed)[place[epoch == number]]
        for number in range(epoch[0], epoch[-1] + 1)
    ]
    return np.concatenate(rows)


def choose_positive(
    rows: np.ndarray, positives: Sequence[np.ndarray], *, seed: int, step: int
) -> np.ndarray:
    """The labelled positive y_i+ of each example: one of its known positives, all equally likely.

    Args:
      rows: [B] the queries of the step, as from `batch_rows`.
      positives: per query of the split, the rows of its known positives.
      seed: >= 0.
      step: t >= 0.

    Returns:
      [B] int32, rows of targets.
    """
    words = _words(_POSITIVE, seed, step, count=len(rows))
    known = [positives[row] for row in rows]
    return np.array([k[w % len(k)] for k, w in zip(known, words.tolist(), strict=True)], np.int32)


def choose_mined(
    rows: np.ndarray, mined: Sequence[np.ndarray], *, count: int, seed: int, step: int
) -> np.ndarray:
    """Some of each query's mined negatives, all equally likely, none of them twice.

    Args:
      rows: [B] the queries of the step, as from `batch_rows`.
      mined: per query of the split, the rows of its mined negatives, all different.
      count: how many are wanted.
      seed: >= 0.
      step: t >= 0.

    Returns:
      [B, count] int32, -1 where a query has fewer.
    """
    chosen = np.full((len(rows), count), -1, np.int32)
    lists = [mined[row] for row in rows]
    words = _words(_MINED, seed, step, count=sum(map(len, lists)))
    start = 0
    for place, held in zip(chosen, lists, strict=True):
        order = np.argsort(words[start : start + len(held)], kind="stable")[:count]
        place[: len(order)] = held[order]
        start += len(held)
    return chosen


def choose_answer(
    rows: np.ndarray, answers: Sequence[np.ndarray], *, seed: int, step: int
) -> np.ndarray:
    """The answer of each example that is learned at a step: one of its own, all equally likely.

    Args:
      rows: [B] the queries of the step, as from `batch_rows`.
      answers: per query of the split, its answers as tokens, [a, T] int32, a > 0.
      seed: >= 0.
      step: t >= 0.

    Returns:
      [B, T] int32.
    """
    words = _words(_ANSWER, seed, step, count=len(rows))
    held = [answers[row] for row in rows]
    return np.stack([some[w % len(some)] for some, w in zip(held, words.tolist(), strict=True)])


def make_batch(
    step: int,
    *,
    query_tokens: np.ndarray,
    positives: Sequence[np.ndarray],
    known: np.ndarray,
    batch_size: int,
    seed: int,
    lengths: np.ndarray | None = None,
    widths: Sequence[int] = (),
    mined: Sequence[np.ndarray] = (),
    num_mined: int = 0,
    first: int = 0,
) -> Batch:
    """The training batch of a step.

    Args:
      step: t >= 0.
      query_tokens: [n, T], of the training split.
      positives: per query, the rows of its known positives.
      known: [n, K] int32, the same padded with -1.
      batch_size: B.
      seed: >= 0.
      lengths: [n] int, tokens of each query; only read where there are widths.
      widths: of `bucket_widths`, in rising order; the first that holds every query is used.
      mined: per query, the rows of its mined negatives; only read where some are wanted.
      num_mined: how many of them a query gets; 0 = the batch has none.
      first: the step that begins with the first of these queries.

    Returns:
      A `Batch` of NumPy arrays, every query valid.
    """
    size = len(query_tokens)
    rows = batch_rows(step - first, num_queries=size, batch_size=batch_size, seed=seed)
    width = query_tokens.shape[1]
    if lengths is not None:
        longest = lengths[rows].max()
        width = next((one for one in widths if one >= longest), width)
    return Batch(
        query_tokens=query_tokens[rows, :width].astype(np.int32),
        positive=choose_positive(rows, positives, seed=seed, step=step),
        known=known[rows],
        valid=np.ones(batch_size, bool),
        mined=choose_mined(rows, mined, count=num_mined, seed=seed, step=step)
        if num_mined
        else None,
    )


def bucket_widths(lengths: np.ndarray, *, batch_size: int, multiple: int) -> tuple[int, ...]:
    """The few static widths that batches of queries are cut to: each is compiled once.

    They are the width that half of the batches fit in, and the one that all do.

    Args:
      lengths: [n] int, tokens of each query.
      batch_size: B.
      multiple: widths are multiples of it.

    Returns:
      One width or two, rising.
    """
    # A batch is as long as the longest of B queries: its median is a high quantile of one.
    median = np.quantile(lengths, 0.5 ** (1 / batch_size), method="higher")
    return tuple(sorted({-(-int(one) // multiple) * multiple for one in (median, lengths.max())}))


def ahead(make: Callable[[int], T], steps: range, *, depth: int = 2) -> Generator[T]:
    """What `make(step)` gives for one step after the other, made by a thread of its own.

    Args:
      make: a function of the step alone.
      steps: in this order.
      depth: how many results are held before they are asked for.

    Yields:
      The results, in order; an error of `make` is raised where its result would be.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: collections.deque = collections.deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@functools.lru_cache(maxsize=4)
def _permutation(epoch: int, num_queries: int, seed: int) -> np.ndarray:
    order = np.argsort(_words(_ORDER, seed, epoch, count=num_queries), kind="stable")
    order.flags.writeable = False  # it is shared by every call
    return order


def _words(stream: int, seed: int, index: int, *, count: int) -> np.ndarray:
    """[count] uint64, a function of the arguments alone."""
    return np.random.PCG64([stream, seed, index]).random_raw(count)
