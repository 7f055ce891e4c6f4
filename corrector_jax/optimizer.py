"""The optimizers: of the encoders, of the corrector, and of a reader beside the encoders."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax


def schedule(kind: str, *, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Learning rate by update.

    Args:
      kind: "linear" or "cosine" (decays to 0 at `steps`) or "constant".
      peak: the largest value.
      warmup: updates of linear rise from 0; the first update already moves.
      steps: updates in all.

    Returns:
      A function of the update count.
    """
    decay = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def delayed(rate: optax.Schedule, updates: int) -> optax.Schedule:
    """The same schedule, begun after so many updates; 0 until then.

    Args:
      rate: learning rate by update.
      updates: how many come before its first.

    Returns:
      A function of the update count.
    """
    if not updates:
        return rate
    return lambda count: jnp.where(count < updates, 0.0, rate(jnp.maximum(count - updates, 0)))


def held(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same state, in which nothing moves: no parameter, no moment, no count of updates.

    A learning rate of 0 is not the same: Adam would count its updates and take moments of nothing,
    and the first true ones would be several times too large.
    """

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(jnp.zeros_like, grads), state

    return optax.GradientTransformation(tx.init, update)


def beside_reader(
    encoders: optax.GradientTransformation,
    reader: optax.GradientTransformation,
    *,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """An optimizer for the encoders and one for the reader, each with a clip of its own.

    Args:
      encoders: the task optimizer.
      reader: of the parameters under "reader".
      frozen: names of parameters at the top that are left as they are.

    Returns:
      The transformation.
    """

    def label(params: optax.Params) -> optax.Params:
        words = {"reader": "reader"} | dict.fromkeys(frozen, "frozen")
        return {name: words.get(name, "encoders") for name in params}

    made = {"encoders": encoders, "reader": reader, "frozen": optax.set_to_zero()}
    return optax.partition(made, label)


def task_optimizer(
    learning_rate: optax.Schedule, *, clip: float, weight_decay: float, accumulate: int
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; weights of rank 2 and more decay.

    Args:
      learning_rate: by update.
      clip: largest global gradient norm, of all but a learned "beta", whose gradient is in units
        of its own (`dual_encoder.BETA_SPEED`) and would drown the weights'; 0 = no clip.
      weight_decay: AdamW's.
      accumulate: steps whose gradients are averaged into one update.

    Returns:
      The transformation; with `accumulate` > 1 it updates on every such step.
    """

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def clipped(params: optax.Params) -> optax.Params:
        return {name: name != "beta" for name in params}

    tx = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays)
    if clip:
        tx = optax.chain(optax.masked(optax.clip_by_global_norm(clip), clipped), tx)
    if accumulate > 1:
        steps = optax.MultiSteps(tx, every_k_schedule=accumulate)
        return optax.GradientTransformation(steps.init, steps.update)
    return tx


def corrector_optimizer(*, peak: float, warmup: int) -> optax.GradientTransformation:
    """Adam with a linear ramp from 0 (docs/method.md, 5).

    Without the ramp the first update alone moves h further than the drift it is to correct.

    Args:
      peak: learning rate after the ramp.
      warmup: updates of the ramp, after the start and after every reset.

    Returns:
      The transformation; a fresh state starts the ramp again.
    """
    return optax.adam(schedule("constant", peak=peak, warmup=warmup, steps=0))
