"""Example order as a function of (seed, step): nothing is carried, so a resumed run sees the same.

Queries run through one permutation per epoch, back to back; a batch may span two epochs. The raw
words of PCG64 are used, whose stream NumPy promises to keep; that of `Generator.permutation` it
does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from corrector_jax.types import Batch

_ORDER, _POSITIVE = 0, 1  # streams that share a seed


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


def make_batch(
    step: int,
    *,
    query_tokens: np.ndarray,
    positives: Sequence[np.ndarray],
    known: np.ndarray,
    batch_size: int,
    seed: int,
) -> Batch:
    """The training batch of a step.

    Args:
      step: t >= 0.
      query_tokens: [n, T], of the training split.
      positives: per query, the rows of its known positives.
      known: [n, K] int32, the same padded with -1.
      batch_size: B.
      seed: >= 0.

    Returns:
      A `Batch` of NumPy arrays, every query valid.
    """
    rows = batch_rows(step, num_queries=len(query_tokens), batch_size=batch_size, seed=seed)
    return Batch(
        query_tokens=query_tokens[rows].astype(np.int32),
        positive=choose_positive(rows, positives, seed=seed, step=step),
        known=known[rows],
        valid=np.ones(batch_size, bool),
    )


@functools.lru_cache(maxsize=4)
def _permutation(epoch: int, num_queries: int, seed: int) -> np.ndarray:
    order = np.argsort(_words(_ORDER, seed, epoch, count=num_queries), kind="stable")
    order.flags.writeable = False  # it is shared by every call
    return order


def _words(stream: int, seed: int, index: int, *, count: int) -> np.ndarray:
    """[count] uint64, a function of the arguments alone."""
    return np.random.PCG64([stream, seed, index]).random_raw(count)
