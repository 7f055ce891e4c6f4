"""Shared words: array aliases, the values that cross layers, the error a user can mend.

Shape letters, used in every docstring:
  B  queries in a batch        m  draws per query             P  size of a candidate pool
  K  known positives, padded   N  targets                     R  rows of a sampling block
  D  embedding dimension       T  tokens of a text            Q  queries of an evaluation
Where a reader answers, K is how many passages it reads for a question.
"""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
PyTree = Any


class UserError(ValueError):
    """Something the user wrote cannot work; the message is one sentence that says what to write.

    `main` prints it without a traceback and exits with code 2.
    """


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value of somebody's file as a message names it: as Python writes it, long ones cut."""
    return _SHORT.repr(value)


def brief(error: object, most: int = 120) -> str:
    """What a library says of somebody's file, for a message: the first of it, in one line."""
    text = " ".join(str(error).split())[:most]
    return "".join(c if c.isprintable() else "?" for c in text)


class Asked(NamedTuple):
    """The queries of a batch as a reader reads them, and what it is to answer.

    Attributes:
      question: [B, T] int32 tokens of the reader's own, without special ones, padded.
      answer: [B, T'] int32, one of each question's answers, the reader's end token, padding.
    """

    question: ArrayLike
    answer: ArrayLike


class Batch(NamedTuple):
    """One training batch, in global order.

    Attributes:
      query_tokens: [B, T] int32, padded with the tokenizer's pad id.
      positive: [B] int32, the labelled positive's row, y_i+; -1 where none is.
      known: [B, K] int32, rows of all known positives K_i (the labelled one among them), -1 pads.
      valid: [B] bool, False for a padded query: it takes part in nothing.
      mined: [B, m'] int32, rows of negatives found and chosen on the host: the data's own hard
        negatives, or a miner's; -1 pads. None where the strategy reads none.
      candidates: [B, K'] int32, rows that an index on the host found; -1 pads. None where the
        proposal reads none.
      asked: the same queries for a reader; None where there is none.
    """

    query_tokens: ArrayLike
    positive: ArrayLike
    known: ArrayLike
    valid: ArrayLike
    mined: ArrayLike | None = None
    candidates: ArrayLike | None = None
    asked: Asked | None = None


class Tail(NamedTuple):
    """What a uniform sample contributes to an estimated partition function.

    Attributes:
      share: [B] float32, its share of the estimate.
      spread: [B] float32, the estimate's standard deviation, divided by the estimate.
    """

    share: Array
    spread: Array


class Draws(NamedTuple):
    """What every proposal returns (docs/method.md, 3).

    Attributes:
      ids: [B, m] int32, rows of the drawn targets; 0 where not valid.
      log_prob: [B, m] float32, log p_iy under the proposal; 0 where not valid.
      valid: [B, m] bool, False where the query had nothing left to draw.
      log_z: [B] float32, log Z_i^-, the log partition function over y not in K_i
        (-inf where nothing is left; 0 for proposals without one).
      kappa: [B] float32 where draws are without replacement: the (m+1)-th largest perturbed
        log-probability, -inf where no more than m targets were left; else None.
      tail: where log_z is an estimate, what a uniform sample contributes to it; else None.
    """

    ids: Array
    log_prob: Array
    valid: Array
    log_z: Array
    kappa: Array | None = None
    tail: Tail | None = None
