"""One training step: what the method does, in order (docs/method.md, 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from corrector_jax import losses, metrics
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.metrics import Mean
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.negatives import Gated
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.steps import selection
from corrector_jax.steps.method import Method, drift_pairs, learn_drift, settle
from corrector_jax.types import Array, Batch, PyTree


def task_loss(
    params: PyTree,
    psi: Gated,
    cache: TargetCache | None,
    tokens: TargetTokens,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    method: Method,
    place: Placement,
) -> tuple[Array, tuple[selection.Selected, losses.Pool, Array, Array, dict[str, Mean]]]:
    """The task loss: differentiable in `params`, and exactly constant in `psi` and `cache`.

    Args:
      params: the encoders' parameters.
      psi: the corrector as selection uses it.
      cache: the cache, or None.
      tokens: the token table.
      batch: the batch.
      key: this step's key for drawing.
      model: the dual encoder.
      method: the strategy.
      place: the mesh.

    Returns:
      The mean loss over valid queries (scalar, nats), and what it was made of: the positives and
      draws, the pool, the queries [B, D], the positives' fresh logits [B], and metrics of the pool.
    """
    psi = jax.lax.stop_gradient(psi)
    queries = model.encode_queries(params, batch.query_tokens)
    chosen = selection.select(
        params, queries, psi, cache, tokens, batch, key,
        model=model, proposal=method.proposal, place=place,
    )  # fmt: skip
    if method.shared:
        pool = selection.shared_pool(
            queries, chosen, psi, batch,
            beta=method.beta, proposal=method.proposal, positives=method.positives,
        )  # fmt: skip
    else:
        pool = selection.own_pool(queries, chosen, beta=method.beta)
        if method.in_batch:
            pool = selection.with_positives(pool, queries, chosen, batch, beta=method.beta)
    positive = method.beta * jnp.einsum(
        "bd,bd->b", queries, chosen.fresh[:, 0], precision=jax.lax.Precision.HIGHEST
    )
    best = jnp.max(jnp.where(pool.valid, pool.scores, -jnp.inf), axis=1)
    measured = {"accuracy": metrics.mean(positive > best, jnp.asarray(batch.valid))}
    if method.max_relative_score:
        pool, dropped = selection.without_probable_positives(
            pool, positive, method.max_relative_score
        )
        measured |= dropped
    each = method.estimator(positive, pool, chosen.draws)
    loss = jnp.sum(jnp.where(batch.valid, each, 0.0)) / jnp.maximum(batch.valid.sum(), 1)
    return loss, (chosen, pool, queries, positive, measured)


def train_step(
    state: TrainState,
    cache: TargetCache | None,
    tokens: TargetTokens,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    method: Method,
    tx: optax.GradientTransformation,
    corrector_tx: optax.GradientTransformation,
    place: Placement,
) -> tuple[TrainState, TargetCache | None, dict[str, Mean]]:
    """One step of the method.

    Args:
      state: the training state; donate it.
      cache: the cache, split by row; donate it. None for strategies without one.
      tokens: the token table, static.
      batch: queries [B, T] with their positives [B] and all known positives [B, K].
      key: this step's key.
      model: the dual encoder.
      method: the strategy.
      tx: the task optimizer; its last link holds the learning rate.
      corrector_tx: the corrector's optimizer.
      place: the mesh.

    Returns:
      The next state, the cache, and metrics as sums and counts; beta among them if it is learned.
      Where the loss, a gradient or the corrector is not finite, `skipped` is 1 and the state
      differs in its step alone.
    """
    draw_key, uniform_key = jax.random.split(key)
    psi = state.corrector.gated
    (loss, made_of), grads = jax.value_and_grad(task_loss, has_aux=True)(
        state.params, psi, cache, tokens, batch, draw_key, model=model, method=method, place=place
    )
    chosen, pool, queries, _, of_pool = made_of
    with jax.named_scope("update_encoders"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

    measured = of_pool | {
        "loss": Mean(loss, jnp.float32(1.0)),
        "grad_norm": Mean(optax.tree.norm(grads), jnp.float32(1.0)),
    }
    if model.learn_beta:
        beta = method.beta * model.beta_ratio(state.params)
        measured["beta"] = Mean(beta, jnp.float32(1.0))
    corrector = state.corrector
    if cache is not None:
        pairs, of_drift = drift_pairs(
            state, cache, tokens, chosen, uniform_key, model=model, method=method, place=place
        )
        measured |= of_drift | selection.draw_metrics(
            queries, chosen, batch, beta=method.beta, independent=method.proposal.independent
        )
        corrector = learn_drift(
            corrector, queries, chosen, pool, pairs, method=method, tx=corrector_tx
        )
    new = TrainState(state.step, params, opt_state, corrector)
    score = loss + measured["grad_norm"].total
    kept, finite, measured["skipped"] = settle(new, state, score)
    if cache is not None:
        cache = method.cache_policy.update(cache, state.params, tokens, chosen, state.step, finite)
    return kept, cache, measured
