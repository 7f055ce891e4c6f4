"""A strategy as steps see it, and what each of them does with one beside its own loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from corrector_jax import cache as caches
from corrector_jax import losses, metrics
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.losses import Pool
from corrector_jax.metrics import Mean
from corrector_jax.models.corrector import Corrector
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.negatives import Proposal
from corrector_jax.sharding import Placement
from corrector_jax.state import CorrectorState, Pairs, TrainState
from corrector_jax.steps import selection
from corrector_jax.steps.cache_policy import CachePolicy, Keep
from corrector_jax.steps.selection import Selected
from corrector_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Method:
    """A strategy as the step sees it: values and functions, no names to branch on.

    Attributes:
      beta: inverse temperature.
      proposal: where negatives come from.
      estimator: the task loss, one of `losses.ESTIMATORS`.
      shared: whether the batch shares one pool of candidates.
      positives: whether a shared pool holds the labelled positives too.
      corrector: h.
      uniform_rows: u, uniform targets encoded without gradient for the drift loss.
      mse_weight: weight of the mean squared error in the drift loss.
      kl_weight: weight of the KL divergence over the pool in the drift loss.
      cache_policy: what a step does to the cache.
      in_batch: whether a query's own pool is joined by the batch's other positives.
      max_relative_score: candidates that score above this share of the positive are dropped;
        0 = none.
    """

    beta: float
    proposal: Proposal
    estimator: losses.Estimator
    shared: bool
    positives: bool
    corrector: Corrector
    uniform_rows: int = 0
    mse_weight: float = 1.0
    kl_weight: float = 0.0
    cache_policy: CachePolicy = dataclasses.field(default_factory=Keep)
    in_batch: bool = False
    max_relative_score: float = 0.0


def drift_pairs(
    state: TrainState,
    cache: TargetCache,
    tokens: TargetTokens,
    chosen: Selected,
    key: Array,
    *,
    model: DualEncoder,
    method: Method,
    place: Placement,
) -> tuple[Pairs, dict[str, Mean]]:
    """What the corrector learns from at a step, and how far it is off.

    Args:
      state: before the step: pairs are made with the parameters that made the fresh scores.
      cache: the cache.
      tokens: the token table.
      chosen: what was encoded.
      key: for uniform targets.
      model: the dual encoder.
      method: the strategy.
      place: the mesh.

    Returns:
      Pairs [P, D], and "drift", "corrected_error" and "cache_age".
    """
    pairs = selection.pairs_of(chosen)
    if method.uniform_rows:
        more = selection.uniform_pairs(
            state.params, cache, tokens, key,
            count=method.uniform_rows, model=model, place=place,
        )  # fmt: skip
        pairs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs, more)
    corrected = method.corrector.apply(state.corrector.params, pairs.stale, 1.0)
    return pairs, {
        "drift": metrics.relative_error(pairs.stale, pairs.fresh, pairs.weight),
        "corrected_error": metrics.relative_error(corrected, pairs.fresh, pairs.weight),
        "cache_age": Mean(caches.age(cache, state.step), jnp.float32(1.0)),
    }


def learn_drift(
    corrector: CorrectorState,
    queries: Array,
    chosen: Selected,
    pool: Pool,
    pairs: Pairs,
    *,
    method: Method,
    tx: optax.GradientTransformation,
) -> CorrectorState:
    """The corrector after a step; as it was where it does not learn.

    Args:
      corrector: before the step.
      queries: [B, D] float32.
      chosen: what was encoded.
      pool: the task loss's candidates.
      pairs: of `drift_pairs`.
      method: the strategy.
      tx: the corrector's optimizer.

    Returns:
      Its next state.
    """
    if not method.corrector.learns:
        return corrector
    loss_of = selection.drift_loss(
        queries, chosen, pool,
        corrector=method.corrector, beta=method.beta,
        mse_weight=method.mse_weight, kl_weight=method.kl_weight,
    )  # fmt: skip
    return selection.update_corrector(corrector, pairs, tx=tx, loss=loss_of)


def settle(new: TrainState, state: TrainState, score: Array) -> tuple[TrainState, Array, Mean]:
    """One batch that overflows must not undo days of training: such a step changes nothing.

    Args:
      new: the state that a step made.
      state: the state before it.
      score: scalar, not finite where a loss or gradient is not.

    Returns:
      The next state, which differs from `state` in its step alone where the score or the
      corrector is not finite; whether they are, scalar bool; and the metric "skipped".
    """
    finite = jnp.isfinite(score + optax.tree.norm(new.corrector.params))
    skipped = Mean(1.0 - finite.astype(jnp.float32), jnp.float32(1.0))
    kept = jax.tree.map(lambda now, before: jnp.where(finite, now, before), new, state)
    return dataclasses.replace(kept, step=state.step + 1), finite, skipped
