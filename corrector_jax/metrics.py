"""Metrics as mergeable sums: what a step or a chunk saw, added up before it is divided."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import logsumexp

from corrector_jax.types import Array, ArrayLike


class Mean(NamedTuple):
    """A sum and what it is to be divided by.

    Attributes:
      total: scalar float32.
      weight: scalar float32.
    """

    total: ArrayLike | float
    weight: ArrayLike | float


def mean(values: Array, weight: Array | None = None) -> Mean:
    """The weighted mean of values [n] with weight [n] (1 where None), as sums."""
    if weight is None:
        return Mean(jnp.sum(values), jnp.float32(values.size))
    weight = weight.astype(jnp.float32)
    return Mean(jnp.sum(jnp.where(weight > 0, values * weight, 0.0)), jnp.sum(weight))


def means(measured: dict[str, Mean]) -> dict[str, float]:
    """Metrics on the host, divided; not-a-number where nothing was counted."""
    return {
        name: float(m.total) / float(m.weight) if m.weight else float("nan")
        for name, m in measured.items()
    }


def relative_error(estimate: Array, fresh: Array, weight: Array) -> Mean:
    """|estimate - fresh|^2 / |fresh|^2 as a ratio of sums (docs/method.md, 7).

    Args:
      estimate: [P, D] float32; C[y] gives the drift, h(C[y]) the corrected error.
      fresh: [P, D] float32.
      weight: [P] float32, 0 for a row that is not there.

    Returns:
      The two sums.
    """
    error = jnp.sum(jnp.square(estimate - fresh), axis=-1)
    norm = jnp.sum(jnp.square(fresh), axis=-1)
    return Mean(jnp.sum(error * weight), jnp.sum(norm * weight))


class Divergence(NamedTuple):
    """KL(P || P') of two softmaxes over targets that arrive in blocks.

    Attributes:
      log_z: [Q] float32, log-sum-exp of the logits s of P so far.
      log_z_other: [Q] float32, log-sum-exp of the logits s' of P' so far.
      gap: [Q] float32, mean of s - s' under P restricted to what was seen.
    """

    log_z: Array
    log_z_other: Array
    gap: Array

    @classmethod
    def empty(cls, queries: int) -> Divergence:
        """Nothing seen yet, for Q queries: arrays [Q]."""
        nothing = jnp.full((queries,), -jnp.inf, jnp.float32)
        return cls(nothing, jnp.copy(nothing), jnp.zeros((queries,), jnp.float32))

    @classmethod
    def of(cls, scores: Array, other: Array, valid: Array) -> Divergence:
        """One block.

        Args:
          scores: [Q, n] float32, s.
          other: [Q, n] float32, s'.
          valid: [n] bool, False for a target that is not there.

        Returns:
          The block's part.
        """
        valid = valid[None, :]
        log_z = logsumexp(jnp.where(valid, scores, -jnp.inf), axis=1)
        log_z_other = logsumexp(jnp.where(valid, other, -jnp.inf), axis=1)
        safe = jnp.where(log_z > -jnp.inf, log_z, 0.0)
        prob = jnp.where(valid, jnp.exp(scores - safe[:, None]), 0.0)
        return cls(log_z, log_z_other, jnp.sum(prob * (scores - other), axis=1))

    def merge(self, more: Divergence) -> Divergence:
        """Both parts together: arrays [Q], exact in any order."""
        log_z = jnp.logaddexp(self.log_z, more.log_z)
        safe = jnp.where(log_z > -jnp.inf, log_z, 0.0)
        gap = jnp.exp(self.log_z - safe) * self.gap + jnp.exp(more.log_z - safe) * more.gap
        return Divergence(log_z, jnp.logaddexp(self.log_z_other, more.log_z_other), gap)

    def kl(self) -> Array:
        """[Q] float32, KL(P || P') in nats over everything seen."""
        return self.gap - self.log_z + self.log_z_other
