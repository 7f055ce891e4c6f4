"""Losses of retrieval-augmented answering (docs/method.md, 9).

The passage is a latent variable of the answer: P(o given x) = sum_k P(y_k given x) P(o given x,
y_k), where P(y_k given x) is the softmax of fresh scores over the passages that were read. Three
losses train a retriever through it, with one signature; `fused` trains the reader.

    loss       moves the scores (retriever)   moves the likelihoods (reader)
    pdist      yes                            no
    emdr2      yes                            no
    marginal   yes                            yes
    fused      takes none                     yes

A query without a passage, or without an answer, has the loss 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax.losses import log_softmax
from corrector_jax.types import Array


class Reading(NamedTuple):
    """What the reader says of an answer, given each passage alone.

    Attributes:
      log_likelihood: [B, K, T] float32, log P(o_t given o_<t, x, y_k); anything where it does not
        count.
      passages: [B, K] bool, False for a passage that is not there.
      tokens: [B, T] bool, False for padding; the answer's end token counts.
    """

    log_likelihood: Array
    passages: Array
    tokens: Array


RetrieverLoss = Callable[..., Array]


def pdist(
    scores: Array,
    reading: Reading,
    *,
    retriever_temperature: float = 1.0,
    reader_temperature: float = 1.0,
    unit: str = "token",
) -> Array:
    """Makes the retriever like what the reader likes.

    KL(sg softmax_k(a_k / tau_g) || softmax_k(s_k / tau_r)), summed over k; a_k is the mean
    log-likelihood of the answer's tokens.

    Args:
      scores: [B, K] float32, s_k, fresh logits of the passages.
      reading: of the same passages; its gradient is cut.
      retriever_temperature: tau_r.
      reader_temperature: tau_g.
      unit: not used.

    Returns:
      [B] float32 losses in nats.

    Example:
      >>> there = jnp.ones((1, 2), bool)
      >>> reading = Reading(jnp.log(jnp.array([[[0.3], [0.1]]])), there, there[:, :1])
      >>> round(float(pdist(jnp.zeros((1, 2)), reading)[0]), 4)  # KL((3/4, 1/4) || (1/2, 1/2))
      0.1308
    """
    valid = _counting(reading)
    liking = jax.lax.stop_gradient(_known(reading)).sum(axis=2) / _length(reading.tokens)[:, None]
    log_p = log_softmax(liking / reader_temperature, valid)
    log_q = log_softmax(scores / retriever_temperature, valid)
    return jnp.where(valid, jnp.exp(log_p) * (log_p - log_q), 0.0).sum(axis=1)


def emdr2(
    scores: Array,
    reading: Reading,
    *,
    retriever_temperature: float = 1.0,
    reader_temperature: float = 1.0,
    unit: str = "token",
) -> Array:
    """`marginal`, for the retriever alone.

    With P(y_k) = softmax_k(s_k / tau_r), and the reader's likelihoods under stop-gradient:
      "token":     -(1/T) sum_t log sum_k P(y_k) sg P(o_t given o_<t, x, y_k)
      "sequence":  -log sum_k P(y_k) prod_t sg P(o_t given o_<t, x, y_k)

    Args:
      scores: [B, K] float32, s_k, fresh logits of the passages.
      reading: of the same passages; its gradient is cut.
      retriever_temperature: tau_r.
      reader_temperature: not used; it is 1.
      unit: "token", as the code of Atlas, EMDR2 and REALM has it, or "sequence", as the papers do.

    Returns:
      [B] float32 losses in nats.

    Example:
      >>> there = jnp.ones((1, 2), bool)
      >>> reading = Reading(jnp.log(jnp.array([[[0.3], [0.1]]])), there, there[:, :1])
      >>> gradient = jax.grad(lambda s: emdr2(s, reading)[0])(jnp.zeros((1, 2)))
      >>> gradient.round(4).tolist()  # prior - posterior
      [[-0.25, 0.25]]
    """
    cut = reading._replace(log_likelihood=jax.lax.stop_gradient(reading.log_likelihood))
    return marginal(scores, cut, retriever_temperature=retriever_temperature, unit=unit)


def marginal(
    scores: Array,
    reading: Reading,
    *,
    retriever_temperature: float = 1.0,
    reader_temperature: float = 1.0,
    unit: str = "token",
) -> Array:
    """Minus the log-likelihood of the answer, whichever passage it comes from (REALM).

    With P(y_k) = softmax_k(s_k / tau_r):
      "token":     -(1/T) sum_t log sum_k P(y_k) P(o_t given o_<t, x, y_k)
      "sequence":  -log sum_k P(y_k) prod_t P(o_t given o_<t, x, y_k)

    The two can differ in the sign of a passage's gradient.

    Args:
      scores: [B, K] float32, s_k, fresh logits of the passages.
      reading: of the same passages.
      retriever_temperature: tau_r.
      reader_temperature: not used; it is 1.
      unit: what the passage is summed out of, "token" or "sequence".

    Returns:
      [B] float32 losses in nats.

    Example:
      >>> there = jnp.ones((1, 2), bool)
      >>> reading = Reading(jnp.log(jnp.array([[[0.3], [0.1]]])), there, there[:, :1])
      >>> round(float(marginal(jnp.zeros((1, 2)), reading)[0]), 4)  # -log(0.3 / 2 + 0.1 / 2)
      1.6094
    """
    valid = _counting(reading)
    log_prior = log_softmax(scores / retriever_temperature, valid)
    known = _known(reading)
    if unit == "sequence":
        return -_summed_out(log_prior + known.sum(axis=2), valid)
    each = _summed_out(log_prior[:, :, None] + known, valid[:, :, None])
    return fused(each, reading.tokens)


RETRIEVER_LOSSES: dict[str, RetrieverLoss] = {
    "pdist": pdist,
    "emdr2": emdr2,
    "marginal": marginal,
}


def fused(log_likelihood: Array, tokens: Array) -> Array:
    """The reader's cross-entropy: -(1/T) sum_t log P(o_t given o_<t, x, y_1 .. y_K).

    Args:
      log_likelihood: [B, T] float32; anything at padding.
      tokens: [B, T] bool, False for padding; the answer's end token counts.

    Returns:
      [B] float32 losses in nats per token.

    Example:
      >>> tokens = jnp.array([[True, True, False]])
      >>> fused(jnp.array([[-1.0, -2.0, 7.0]]), tokens).tolist()
      [1.5]
    """
    return -jnp.where(tokens, log_likelihood, 0.0).sum(axis=1) / _length(tokens)


def _counting(reading: Reading) -> Array:
    """[B, K] bool: passages that are there, of queries that have an answer."""
    return reading.passages & reading.tokens.any(axis=1, keepdims=True)


def _known(reading: Reading) -> Array:
    """[B, K, T]: the log-likelihoods that count, 0 elsewhere."""
    counts = reading.passages[:, :, None] & reading.tokens[:, None, :]
    return jnp.where(counts, reading.log_likelihood, 0.0)


def _length(tokens: Array) -> Array:
    """[B, T] -> [B] float32: T of each answer, at least 1."""
    return jnp.maximum(tokens.sum(axis=1), 1).astype(jnp.float32)


def _summed_out(terms: Array, valid: Array) -> Array:
    """Log-sum-exp over passages: [B, K, ...] -> [B, ...]; 0 where there is none."""
    found = jax.nn.logsumexp(jnp.where(valid, terms, -jnp.inf), axis=1)
    return jnp.where(valid.any(axis=1), found, 0.0)
