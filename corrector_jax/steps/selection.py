"""Draw, read, encode, and update the corrector: what every step that trains a retriever shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from corrector_jax import cache as caches
from corrector_jax import losses
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.losses import Pool
from corrector_jax.metrics import Mean, mean
from corrector_jax.models.corrector import Corrector
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.negatives import Gated, Proposal, Stale
from corrector_jax.sharding import Placement
from corrector_jax.state import CorrectorState, Pairs
from corrector_jax.types import Array, Batch, Draws, PyTree

DriftLoss = Callable[[PyTree, Pairs], Array]
"""(Psi, pairs [P, D]) -> scalar drift loss, differentiable in Psi alone."""


@struct.dataclass
class Selected:
    """The labelled positive, where there is one, and the draws of every query, stale and fresh.

    Attributes:
      draws: what the proposal drew.
      ids: [B, 1 + m] int32, the positive first; [B, m] where none is labelled, as below.
      fresh: [B, 1 + m, D] float32, with gradient.
      stale: [B, 1 + m, D] float32, or None where there is no cache.
      lengths: [B, 1 + m] float32, by which their corrected logits are divided, or None.
      there: [B, 1 + m] bool, False for a padded query and for a draw that is not valid.
      labelled: columns that stand before the draws: 1, or 0.
    """

    draws: Draws
    ids: Array
    fresh: Array
    stale: Array | None
    lengths: Array | None
    there: Array
    labelled: int = struct.field(pytree_node=False, default=1)


def select(
    params: PyTree,
    queries: Array,
    psi: Gated,
    cache: TargetCache | None,
    tokens: TargetTokens,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    proposal: Proposal,
    place: Placement,
) -> Selected:
    """Draws negatives without gradient and encodes them, with the positives, with gradient.

    Args:
      params: the encoders' parameters.
      queries: [B, D] float32.
      psi: the corrector as selection uses it.
      cache: the cache, or None.
      tokens: the token table.
      batch: the batch.
      key: this step's key for drawing.
      model: the dual encoder.
      proposal: where negatives come from.
      place: the mesh.

    Returns:
      Positives and draws, B x (1 + m) of them.
    """
    draws = proposal.draw(jax.lax.stop_gradient(queries), psi, cache, batch, key)
    ids = jnp.concatenate([batch.positive[:, None], draws.ids], axis=1)
    fresh, stale, lengths = _encode(params, ids, cache, tokens, model=model, place=place)
    there = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), draws.valid], axis=1)
    return Selected(draws, ids, fresh, stale, lengths, there & batch.valid[:, None])


def retrieve(
    params: PyTree,
    queries: Array,
    psi: Gated,
    cache: TargetCache | None,
    tokens: TargetTokens,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    proposal: Proposal,
    count: int,
    place: Placement,
) -> Selected:
    """As `select` where nothing is labelled: what is drawn is all there is.

    Args:
      params: the encoders' parameters.
      queries: [B, D] float32.
      psi: the corrector as selection uses it.
      cache: the cache, or None.
      tokens: the token table.
      batch: the batch; its positives are not read.
      key: this step's key for drawing.
      model: the dual encoder.
      proposal: where targets come from; those it draws are distinct.
      count: K, how many of its draws are kept: the best by fresh score, where it draws more.
      place: the mesh.

    Returns:
      B x K targets, none of them labelled.
    """
    cut = jax.lax.stop_gradient(queries)
    draws = proposal.draw(cut, psi, cache, batch, key)
    if count < proposal.draws:
        draws = rerank(params, cut, draws, tokens, count=count, model=model, place=place)
    fresh, stale, lengths = _encode(params, draws.ids, cache, tokens, model=model, place=place)
    there = draws.valid & jnp.asarray(batch.valid)[:, None]
    return Selected(draws, draws.ids, fresh, stale, lengths, there, labelled=0)


def rerank(
    params: PyTree,
    queries: Array,
    draws: Draws,
    tokens: TargetTokens,
    *,
    count: int,
    model: DualEncoder,
    place: Placement,
) -> Draws:
    """The best of some draws by fresh score: stale scores choose many, fresh ones among them.

    Args:
      params: the encoders' parameters; nothing here has a gradient.
      queries: [B, D] float32.
      draws: L of each query.
      tokens: the token table.
      count: K, how many are kept.
      model: the dual encoder.
      place: the mesh.

    Returns:
      K draws of each query, best first, without kappa.
    """
    rows = encode_rows(params, tokens, draws.ids.reshape(-1), model=model, place=place)
    fresh = rows.reshape(*draws.ids.shape, -1)
    scores = jnp.einsum("bd,bld->bl", queries, fresh, precision=jax.lax.Precision.HIGHEST)
    _, at = jax.lax.top_k(jnp.where(draws.valid, scores, -jnp.inf), count)
    ids, log_prob, valid = (jnp.take_along_axis(x, at, axis=1) for x in draws[:3])
    return Draws(ids, log_prob, valid, draws.log_z, tail=draws.tail)


def _encode(
    params: PyTree,
    ids: Array,
    cache: TargetCache | None,
    tokens: TargetTokens,
    *,
    model: DualEncoder,
    place: Placement,
) -> tuple[Array, Array | None, Array | None]:
    """[B, n] rows -> fresh embeddings [B, n, D] with gradient, stale ones, lengths [B, n]."""
    rows = ids.reshape(-1)  # query by query, so that a device's share is its own queries'
    text = place.split(caches.take_tokens(tokens, rows, place))
    fresh = model.encode_targets(params, text).reshape(*ids.shape, -1)
    stale = lengths = None
    if cache is not None:
        stale = caches.take(cache, rows, place).reshape(fresh.shape)
        lengths = caches.take_lengths(cache, rows, place)
        lengths = None if lengths is None else lengths.reshape(ids.shape)
    return fresh, stale, lengths


def own_pool(queries: Array, chosen: Selected, *, beta: float) -> Pool:
    """Each query's own m draws: scores [B, m] in float32."""
    scores = beta * jnp.einsum(
        "bd,bmd->bm", queries, chosen.fresh[:, 1:], precision=jax.lax.Precision.HIGHEST
    )
    return Pool(chosen.ids[:, 1:], scores, chosen.draws.log_prob, chosen.there[:, 1:])


def shared_pool(
    queries: Array,
    chosen: Selected,
    psi: Gated,
    batch: Batch,
    *,
    beta: float,
    proposal: Proposal,
    positives: bool,
) -> Pool:
    """One pool for the batch: every query is scored against every query's candidates.

    Args:
      queries: [B, D] float32, with gradient.
      chosen: positives and draws.
      psi: the corrector as selection uses it.
      batch: the batch; no query meets one of its own known positives.
      beta: inverse temperature.
      proposal: gives the log-probability of each candidate for each query.
      positives: whether the labelled positives join the draws.

    Returns:
      A pool of P = B (1 + m) or B m candidates.
    """
    first = 0 if positives else 1
    ids = chosen.ids[:, first:].reshape(-1)
    targets = chosen.fresh[:, first:].reshape(len(ids), -1)
    scores = beta * jnp.matmul(queries, targets.T, precision=jax.lax.Precision.HIGHEST)
    takes_part = ~losses.is_known(ids, batch.known) & batch.valid[:, None]
    valid = takes_part & chosen.there[:, first:].reshape(1, -1)
    log_prob = jnp.zeros_like(scores)
    if not positives:
        stale = None
        if chosen.stale is not None:
            rows, lengths = chosen.stale[:, first:], chosen.lengths
            lengths = None if lengths is None else lengths[:, first:].reshape(-1)
            stale = Stale(rows.reshape(len(ids), -1), lengths)
        given = proposal.log_prob(jax.lax.stop_gradient(queries), psi, stale, chosen.draws)
        log_prob = jnp.where(takes_part, given, -jnp.inf)
    return Pool(ids, scores, log_prob, valid)


def with_positives(
    pool: Pool, queries: Array, chosen: Selected, batch: Batch, *, beta: float
) -> Pool:
    """Adds the batch's positives to each query's own draws, its own known ones left out.

    Args:
      pool: each query's own draws.
      queries: [B, D] float32, with gradient.
      chosen: positives and draws.
      batch: the batch.
      beta: inverse temperature.

    Returns:
      Own pools of P = m + B candidates; the positives have no probability (log_prob 0).
    """
    ids = jnp.broadcast_to(chosen.ids[:, 0], (len(queries), len(queries)))
    scores = beta * jnp.matmul(queries, chosen.fresh[:, 0].T, precision=jax.lax.Precision.HIGHEST)
    valid = ~losses.is_known(chosen.ids[:, 0], batch.known) & chosen.there[:, 0][None, :]
    more = Pool(ids, scores, jnp.zeros_like(scores), valid & batch.valid[:, None])
    return Pool(*(jnp.concatenate(pair, axis=1) for pair in zip(pool, more, strict=True)))


def without_probable_positives(
    pool: Pool, positive: Array, share: float
) -> tuple[Pool, dict[str, Mean]]:
    """Drops candidates that score above `share` of the positive: probably positives themselves.

    Of a positive below zero, (1 - share) of its size below it: a share up to 1 never keeps what
    scores above the positive.

    Args:
      pool: the candidates.
      positive: [B] float32 fresh logits s_i+.
      share: of s_i+, in logits (NV-Retriever's percentage of the positive's score).

    Returns:
      The pool, and "dropped_share", the share of its candidates that were dropped.
    """
    positive = jax.lax.stop_gradient(positive)[:, None]
    limit = positive - (1.0 - share) * jnp.abs(positive)
    dropped = pool.valid & (pool.scores > limit)
    counts = (mask.sum().astype(jnp.float32) for mask in (dropped, pool.valid))
    return pool._replace(valid=pool.valid & ~dropped), {"dropped_share": Mean(*counts)}


def pairs_of(chosen: Selected) -> Pairs:
    """Stale and fresh embeddings of all that was chosen, duplicates kept: [B (1 + m), D]."""
    assert chosen.stale is not None  # strategies without a cache have no corrector
    dim = chosen.fresh.shape[-1]
    return Pairs(
        stale=chosen.stale.reshape(-1, dim),
        fresh=jax.lax.stop_gradient(chosen.fresh).reshape(-1, dim),
        weight=chosen.there.reshape(-1).astype(jnp.float32),
    )


def uniform_pairs(
    params: PyTree,
    cache: TargetCache,
    tokens: TargetTokens,
    key: Array,
    *,
    count: int,
    model: DualEncoder,
    place: Placement,
) -> Pairs:
    """Pairs of `count` uniform targets, encoded without gradient; they undo the bias of selection.

    Args:
      params: the encoders' parameters.
      cache: the cache.
      tokens: the token table.
      key: a key of its own.
      count: u.
      model: the dual encoder.
      place: the mesh.

    Returns:
      Pairs [u, D], all of weight 1.
    """
    ids = jax.random.randint(key, (count,), 0, tokens.size)
    fresh = encode_rows(params, tokens, ids, model=model, place=place)
    return Pairs(caches.take(cache, ids, place), fresh, jnp.ones((count,), jnp.float32))


def encode_rows(
    params: PyTree, tokens: TargetTokens, ids: Array, *, model: DualEncoder, place: Placement
) -> Array:
    """Fresh embeddings of any targets without gradient, the work shared whatever their number.

    Args:
      params: the encoders' parameters.
      tokens: the token table.
      ids: [n] int32; -1 for a place that is empty (its embedding means nothing).
      model: the dual encoder.
      place: the mesh.

    Returns:
      [n, D] float32.
    """
    # What the devices do not divide would be encoded by each of them, all of it.
    padded = jnp.pad(ids, (0, place.pad(len(ids)) - len(ids)), constant_values=-1)
    text = place.split(caches.take_tokens(tokens, padded, place))
    return model.encode_targets(jax.lax.stop_gradient(params), text)[: len(ids)]


def drift_loss(
    queries: Array,
    chosen: Selected,
    pool: Pool,
    *,
    corrector: Corrector,
    beta: float,
    mse_weight: float,
    kl_weight: float,
) -> DriftLoss:
    """The drift loss of this step (docs/method.md, 5): MSE, KL over the task loss's pool, or both.

    The KL keeps duplicate candidates, each as often as it was drawn.

    Args:
      queries: [B, D] float32; cut off from differentiation.
      chosen: positives and draws, with their stale rows.
      pool: the task loss's candidates, own or shared.
      corrector: h.
      beta: inverse temperature.
      mse_weight: weight of the mean squared error; 0 leaves it out.
      kl_weight: weight of the KL divergence; 0 leaves it out.

    Returns:
      The loss as a function of Psi and pairs.
    """
    queries = jax.lax.stop_gradient(queries)

    def loss(psi: PyTree, pairs: Pairs) -> Array:
        total = jnp.zeros(())
        if mse_weight:
            estimate = corrector.apply(psi, pairs.stale, 1.0)
            total += mse_weight * losses.drift_mse(estimate, pairs.fresh, pairs.weight)
        if kl_weight:
            assert chosen.stale is not None
            own = pool.ids.ndim == 2
            # A shared pool is the draws, preceded by each query's positive where those join.
            first = 0 if not own and pool.ids.size == chosen.ids.size else chosen.labelled
            rows = corrector.apply(psi, chosen.stale[:, first:], 1.0)
            shape = "bd,bmd->bm" if own else "bd,kmd->bkm"
            logits = beta * jnp.einsum(shape, queries, rows)
            if own and pool.ids.shape[1] > logits.shape[1]:  # the batch's positives stand behind
                others = corrector.apply(psi, chosen.stale[:, 0], 1.0)
                logits = jnp.concatenate([logits, beta * queries @ others.T], axis=1)
            logits = logits.reshape(pool.scores.shape)
            total += kl_weight * losses.drift_kl(logits, pool.scores, pool.valid)
        return total

    return loss


def draw_metrics(
    queries: Array, chosen: Selected, batch: Batch, *, beta: float, independent: int
) -> dict[str, Mean]:
    """What the draws say about the proposal, free at every step.

    Args:
      queries: [B, D] float32.
      chosen: positives and draws.
      batch: the batch.
      beta: inverse temperature.
      independent: how many of the draws, the first ones, are i.i.d. from P_h^-.

    Returns:
      "known_share": share of draws that are known positives, always 0; where log Z^- is an
      estimate "tail_share" and "log_z_spread", what a uniform sample contributes to Z^- and the
      relative standard deviation that it brings; and where two draws or more are i.i.d.
      "kl_estimate": half the sample variance of s_ij - l_ij over a query's draws, an estimate of
      KL(P_h^- || P^-) in nats.
    """
    drawn, there = chosen.draws, chosen.there[:, 1:]
    known = losses.is_known(drawn.ids, batch.known) & there
    share = Mean(known.sum().astype(jnp.float32), there.sum().astype(jnp.float32))
    measured = {"known_share": share}
    if drawn.tail is not None:
        valid = jnp.asarray(batch.valid)
        measured["tail_share"] = mean(drawn.tail.share, valid)
        measured["log_z_spread"] = mean(drawn.tail.spread, valid)
    if independent < 2:
        return measured
    there = there[:, :independent]
    fresh = beta * jnp.einsum("bd,bmd->bm", queries, chosen.fresh[:, 1 : 1 + independent])
    corrected = drawn.log_prob[:, :independent] + drawn.log_z[:, None]
    count = there.sum(axis=1)
    gap = jnp.where(there, fresh - corrected, 0.0)
    center = gap.sum(axis=1) / jnp.maximum(count, 1)
    square = jnp.where(there, jnp.square(gap - center[:, None]), 0.0).sum(axis=1)
    measured["kl_estimate"] = mean(0.5 * square / jnp.maximum(count - 1, 1), count > 1)
    return measured


@jax.named_scope("train_corrector")
def update_corrector(
    state: CorrectorState,
    pairs: Pairs,
    *,
    tx: optax.GradientTransformation,
    loss: DriftLoss,
) -> CorrectorState:
    """One optimizer update on the newest pairs, after one on each of the ring's, oldest first.

    Args:
      state: the corrector's state.
      pairs: this step's pairs [P, D].
      tx: the corrector's optimizer.
      loss: the drift loss.

    Returns:
      The state after the updates, with the newest pairs in the ring.
    """

    def update(carry: tuple[PyTree, PyTree], pairs: Pairs) -> tuple[tuple[PyTree, PyTree], None]:
        params, opt_state = carry
        grads = jax.grad(lambda psi: loss(psi, pairs))(params)
        updates, changed = tx.update(grads, opt_state, params)
        # A ring slot that is still empty must not count as an update of Adam or of the ramp.
        filled = pairs.weight.sum() > 0
        kept = jax.tree.map(
            lambda new, old: jnp.where(filled, new, old),
            (optax.apply_updates(params, updates), changed),
            (params, opt_state),
        )
        return kept, None

    carry = (state.params, state.opt_state)
    ring = state.ring
    if ring is not None:
        carry, _ = jax.lax.scan(update, carry, ring)
        ring = jax.tree.map(lambda r, p: jnp.concatenate([r[1:], p[None]]), ring, pairs)
    (params, opt_state), _ = update(carry, pairs)
    return dataclasses.replace(state, params=params, opt_state=opt_state, ring=ring)
