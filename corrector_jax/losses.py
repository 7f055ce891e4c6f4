"""Task-loss estimators and drift losses (docs/method.md, 4 and 5).

Every estimator approximates, from a few candidates, the loss over all N targets

    L_i = log(exp s_i+  +  sum over y not in K_i of exp s_iy) - s_i+

and has one signature: `estimator(positive, pool, drawn) -> [B]` losses. A candidate y is in
the sum with weight 1 / c_iy, the inverse of how often it is expected in the pool; nothing but the
fresh scores carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax.types import Array, ArrayLike, Draws


class Pool(NamedTuple):
    """The candidates of each query: its own draws (P = m) or one pool for the batch.

    Attributes:
      ids: [B, P] int32 (own) or [P] int32 (one pool), rows of the candidates.
      scores: [B, P] float32, fresh logits s_iy, with gradient.
      log_prob: [B, P] float32, log p_iy: how likely query i's proposal is to draw y; -inf where it
        never does (y in K_i, a padded query).
      valid: [B, P] bool, y is there and not in K_i.
    """

    ids: Array
    scores: Array
    log_prob: Array
    valid: Array


Estimator = Callable[[Array, Pool, Draws], Array]


def dense(positive: Array, scores: Array, known: Array) -> Array:
    """The loss all estimators approximate, over all N targets: the reference, for small N.

    Args:
      positive: [B] float32 fresh logits of the labelled positives.
      scores: [B, N] float32 fresh logits of every target.
      known: [B, N] bool, y in K_i.

    Returns:
      [B] float32 losses in nats.
    """
    return _partition(positive, scores, ~known)


def truncated(positive: Array, pool: Pool, drawn: Draws) -> Array:
    """The paper's estimator: a softmax over the candidates as if they were all targets (c = 1).

    A duplicate counts once. Biased even where the corrector is exact: it always reads low.

    Args:
      positive: [B] float32 fresh logits s_i+.
      pool: the candidates.
      drawn: not used.

    Returns:
      [B] float32 losses in nats.

    Example:
      >>> s = jnp.zeros((1, 2))
      >>> pool = Pool(jnp.array([[4, 7]]), s, s, jnp.ones((1, 2), bool))
      >>> drawn = Draws(pool.ids, pool.log_prob, pool.valid, jnp.zeros(1))
      >>> round(float(truncated(jnp.zeros(1), pool, drawn)[0]), 4)  # log 3
      1.0986
    """
    if pool.ids.ndim == 1:
        once = first_occurrence(pool.ids, pool.valid.any(axis=0))[None, :] & pool.valid
    else:
        once = first_occurrence(pool.ids, pool.valid)
    return _partition(positive, pool.scores, once)


def single(positive: Array, pool: Pool, drawn: Draws) -> Array:
    """Unbiased gradient where the corrector is exact (Lindgren et al. 2021).

    The gradient is that of sigmoid(log Z^- - s+) * (mean_j s_ij - s+) with the sigmoid held fixed;
    Z^- is the corrected partition function, without any known positive. The value is
    softplus(log Z^- - s+), the loss it estimates.

    Args:
      positive: [B] float32 fresh logits s_i+.
      pool: each query's own draws.
      drawn: gives log Z_i^-.

    Returns:
      [B] float32 losses in nats; 0, with no gradient, where nothing was left to draw.
    """
    count = pool.valid.sum(axis=1)
    mean = jnp.where(pool.valid, pool.scores, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    # Where candidates were dropped, Z^- of those that are left: their share of the draws of it.
    kept = jnp.log(jnp.maximum(count, 1) / drawn.ids.shape[1])
    margin = jnp.where(count > 0, drawn.log_z + kept - positive, -jnp.inf)
    weight = jax.lax.stop_gradient(jax.nn.sigmoid(margin))
    surrogate = jnp.where(count > 0, weight * (mean - positive), 0.0)
    value = jax.nn.softplus(jax.lax.stop_gradient(margin))
    return value + surrogate - jax.lax.stop_gradient(surrogate)


def weighted(positive: Array, pool: Pool, drawn: Draws) -> Array:
    """Importance weights of each query's own draws: c_iy = m p_iy.

    log(exp s+ + Z^- mean_j exp(s_ij - l_ij)) - s+. Equals `single` draw for draw where the
    corrector is exact. With uniform draws, c = m / (N - |K_i|).

    Args:
      positive: [B] float32 fresh logits s_i+.
      pool: each query's own draws.
      drawn: gives m.

    Returns:
      [B] float32 losses in nats.
    """
    return _partition(positive, pool.scores - _count(pool.log_prob, pool.valid, drawn), pool.valid)


def balanced(positive: Array, pool: Pool, drawn: Draws) -> Array:
    """All draws of the batch, each weighted by how often the whole batch draws it.

    log c(y) = log m + logsumexp over queries k of log p_ky: the balance heuristic of multiple
    importance sampling. Draws are kept with their multiplicity; positives are not added.

    Args:
      positive: [B] float32 fresh logits s_i+.
      pool: one pool of all B m draws, with log_prob of every query for every candidate.
      drawn: gives m.

    Returns:
      [B] float32 losses in nats.
    """
    of_batch = jax.nn.logsumexp(jax.lax.stop_gradient(pool.log_prob), axis=0, keepdims=True)
    return _partition(positive, pool.scores - _count(of_batch, pool.valid, drawn), pool.valid)


def kool(positive: Array, pool: Pool, drawn: Draws) -> Array:
    """Importance weights of draws without replacement (Kool et al. 2019, "Stochastic Beams").

    c_iy = P(y is among the draws | kappa) = 1 - exp(-exp(log p_iy - kappa_i)): given the threshold,
    the estimate of the partition function is unbiased.

    Args:
      positive: [B] float32 fresh logits s_i+.
      pool: each query's own draws.
      drawn: gives kappa.

    Returns:
      [B] float32 losses in nats.

    Raises:
      ValueError: the draws are with replacement.
    """
    if drawn.kappa is None:
        raise ValueError("the estimator kool needs draws without replacement (gumbel_topk)")
    above = jnp.where(pool.valid, pool.log_prob - drawn.kappa[:, None], 0.0)
    # -expm1(-exp(a)) underflows where a is very negative; there it equals exp(a).
    inside = jnp.log(-jnp.expm1(-jnp.exp(jnp.maximum(above, -15.0))))
    count = jax.lax.stop_gradient(jnp.where(above > -15.0, inside, above))
    return _partition(positive, pool.scores - count, pool.valid)


ESTIMATORS: dict[str, Estimator] = {
    "truncated": truncated,
    "single": single,
    "weighted": weighted,
    "balanced": balanced,
    "kool": kool,
}


def drift_mse(estimate: Array, fresh: Array, weight: Array) -> Array:
    """Mean over rows of |h(C[y]) - g(y)|^2.

    Args:
      estimate: [P, D] float32, h(C[y]).
      fresh: [P, D] float32, g(y); its gradient is cut.
      weight: [P] float32, 0 for a row that is not there.

    Returns:
      Scalar float32.
    """
    square = jnp.sum(jnp.square(estimate - jax.lax.stop_gradient(fresh)), axis=-1)
    return jnp.sum(square * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def drift_kl(estimate: Array, scores: Array, valid: Array) -> Array:
    """Mean over queries of KL(softmax of fresh scores || softmax of corrected logits), over a pool.

    Blind to a shift common to all of a query's candidates.

    Args:
      estimate: [B, P] float32 corrected logits, with gradient.
      scores: [B, P] float32 fresh logits; their gradient is cut.
      valid: [B, P] bool; a query without candidates counts as 0.

    Returns:
      Scalar float32, nats.
    """
    log_p = log_softmax(jax.lax.stop_gradient(scores), valid)
    log_q = log_softmax(estimate, valid)
    kl = jnp.sum(jnp.where(valid, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
    return jnp.sum(kl) / jnp.maximum(jnp.sum(valid.any(axis=-1)), 1)


def is_known(ids: Array, known: ArrayLike) -> Array:
    """Which candidates are known positives of the query.

    Args:
      ids: [B, P] int32 candidates of each query, or [P] one pool for the whole batch.
      known: [B, K] int32; -1 pads.

    Returns:
      [B, P] bool.
    """
    candidates = ids[None, :] if ids.ndim == 1 else ids
    return (candidates[:, :, None] == jnp.asarray(known)[:, None, :]).any(axis=-1)


def first_occurrence(ids: Array, valid: Array) -> Array:
    """Keeps the first valid copy of each id.

    Args:
      ids: [..., P] int32, all >= 0.
      valid: [..., P] bool, False for a candidate that is not there.

    Returns:
      [..., P] bool, True for the first valid candidate of each id along the last axis.

    Example:
      >>> first_occurrence(jnp.array([3, 5, 3]), jnp.array([True, True, True])).tolist()
      [True, True, False]
    """
    # A sort, not a P x P comparison: a shared pool has B (m + 1) candidates.
    marked = jnp.where(valid, ids, -1)
    order = jnp.argsort(marked, axis=-1, stable=True)
    ranked = jnp.take_along_axis(marked, order, axis=-1)
    first = jnp.concatenate(
        [jnp.ones_like(ranked[..., :1], bool), ranked[..., 1:] != ranked[..., :-1]], axis=-1
    )
    return jnp.take_along_axis(first, jnp.argsort(order, axis=-1), axis=-1) & valid


def log_softmax(scores: Array, valid: Array) -> Array:
    """Over the valid candidates; 0 elsewhere, so that nothing infinite is differentiated.

    Args:
      scores: [B, P] float32.
      valid: [B, P] bool.

    Returns:
      [B, P] float32.
    """
    masked = jnp.where(valid, scores, -jnp.inf)
    log_z = jax.nn.logsumexp(jnp.where(valid.any(-1, keepdims=True), masked, 0.0), axis=-1)
    return jnp.where(valid, scores - log_z[:, None], 0.0)


def _partition(positive: Array, terms: Array, valid: Array) -> Array:
    """log(exp s+ + sum of exp of the valid terms) - s+: [B], [B, P], [B, P] -> [B]."""
    terms = jnp.where(valid, terms, -jnp.inf)
    everything = jnp.concatenate([positive[:, None], terms], axis=1)
    return jax.nn.logsumexp(everything, axis=1) - positive


def _count(log_prob: Array, valid: Array, drawn: Draws) -> Array:
    """log c = log m + log p without gradient; finite where it is not used."""
    log_prob = jnp.where(valid, jax.lax.stop_gradient(log_prob), 0.0)
    return jnp.log(jnp.float32(drawn.ids.shape[1])) + log_prob
