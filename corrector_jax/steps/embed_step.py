"""Fresh embeddings of targets, without gradient."""

from __future__ import annotations

from corrector_jax import cache as caches
from corrector_jax.cache import TargetTokens
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.sharding import Placement
from corrector_jax.types import Array, PyTree


def embed_step(
    params: PyTree,
    tokens: TargetTokens,
    ids: Array,
    *,
    length: int,
    model: DualEncoder,
    place: Placement,
) -> Array:
    """Encodes a block of targets with the current parameters.

    Args:
      params: the encoders' parameters.
      tokens: the token table.
      ids: [b] int32 rows; -1 for a place that is empty (its embedding means nothing).
      length: tokens to read of each row, static: no row of the block is longer.
      model: the dual encoder.
      place: the mesh; the work is split when the devices divide b.

    Returns:
      [b, D] float32.
    """
    text = caches.take_tokens(tokens, ids, place)[:, :length]
    return model.encode_targets(params, place.split(text))
