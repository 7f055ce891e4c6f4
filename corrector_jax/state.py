"""What a training step carries: parameters, two optimizers, and the corrector's own life."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

from corrector_jax.models.corrector import Corrector
from corrector_jax.negatives import Gated
from corrector_jax.types import Array, PyTree


@struct.dataclass
class Pairs:
    """What the corrector learns from: stale rows and the fresh embeddings of the same targets.

    Attributes:
      stale: [..., P, D] float32, C[y].
      fresh: [..., P, D] float32, g(y).
      weight: [..., P] float32, 0 for a row that is not there.
    """

    stale: Array
    fresh: Array
    weight: Array


@struct.dataclass
class CorrectorState:
    """Everything that is reset when the cache is refreshed (docs/method.md, 2).

    Attributes:
      params: Psi.
      opt_state: its own optimizer's state; its count drives the learning-rate ramp.
      gate: scalar float32, 0 until h has beaten the identity on the probe, then 1.
      ring: pairs of the last steps, [ring, P, D], oldest first; None where one update per step
        makes no use of them.
      measured: the corrector that the lengths beside the cache were last measured with: they are
        not saved but measured again; None where it has none.
    """

    params: PyTree
    opt_state: PyTree
    gate: Array
    ring: Pairs | None
    measured: Gated | None = None

    @property
    def gated(self) -> Gated:
        """The corrector as selection uses it."""
        return Gated(self.params, self.gate)


@struct.dataclass
class TrainState:
    """The training state.

    Attributes:
      step: scalar int32, steps done.
      params: Theta, the encoders' parameters.
      opt_state: the task optimizer's state.
      corrector: the corrector's state.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    corrector: CorrectorState


def init_corrector(
    key: Array,
    *,
    corrector: Corrector,
    tx: optax.GradientTransformation,
    dim: int,
    ring: int = 0,
    rows: int = 0,
) -> CorrectorState:
    """A corrector at the identity, its gate closed: at the start and after every refresh.

    Args:
      key: a PRNG key for the inner layer.
      corrector: h.
      tx: its optimizer.
      dim: D.
      ring: earlier steps whose pairs are kept.
      rows: P, pairs of one step.

    Returns:
      The state; the ring is empty (weight 0).
    """
    params = corrector.init(key, dim)
    gate = jnp.zeros((), jnp.float32)
    measured = None
    if corrector.has_lengths:
        # Copies: the state is donated, and no buffer may be given twice.
        measured = jax.tree.map(jnp.copy, Gated(params, gate))
    pairs = None
    if ring:
        nothing = jnp.zeros((ring, rows, dim), jnp.float32)
        pairs = Pairs(nothing, jnp.copy(nothing), jnp.zeros((ring, rows), jnp.float32))
    return CorrectorState(params, tx.init(params), gate, pairs, measured)


def init_state(
    params: PyTree, corrector: CorrectorState, *, tx: optax.GradientTransformation
) -> TrainState:
    """Step 0.

    Args:
      params: the encoders' parameters.
      corrector: a corrector at the identity.
      tx: the task optimizer.

    Returns:
      The state.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), corrector)
