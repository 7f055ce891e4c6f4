"""The two encoders f and g of the method: queries and targets to vectors (docs/method.md, 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from corrector_jax.models.bert import Bert, BertConfig
from corrector_jax.types import Array, ArrayLike, PyTree, UserError

POOLINGS = ("mean", "cls")


class Encoder(nn.Module):
    """One tower: BERT, pooled to one vector per text.

    It has no weights of its own, so its parameters are those of `Bert` (and of
    `pretrained.bert_params`), not nested any deeper.

    Attributes:
      config: the sizes of BERT.
      pooling: "mean" over the tokens that are not padding, or "cls", the first token's state.
      normalize: whether vectors are scaled to length 1.
      dtype: what BERT computes in; pooling and normalisation are float32 always.
    """

    config: BertConfig
    pooling: str = "mean"
    normalize: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes BERT's parameters this module's own."""
        if self.pooling not in POOLINGS:
            raise UserError(f"There is no pooling {self.pooling!r}; write one of {POOLINGS}.")
        self.bert = Bert(self.config, self.dtype)
        nn.share_scope(self, self.bert)

    def __call__(self, tokens: ArrayLike) -> Array:
        """Embeds texts.

        Args:
          tokens: [B, T] of any integer dtype, padded with `config.pad_id`.

        Returns:
          [B, D] float32; finite, and with finite gradients, for a row of padding alone too (mean
          pooling: the zero vector).

        Raises:
          UserError: `pooling` is not one of `POOLINGS`.
        """
        tokens = jnp.asarray(tokens)
        hidden = self.bert(tokens).astype(jnp.float32)
        if self.pooling == "cls":
            x = hidden[:, 0]
        else:
            here = (tokens != self.config.pad_id).astype(jnp.float32)
            count = jnp.maximum(here.sum(axis=1), 1.0)
            x = (hidden * here[:, :, None]).sum(axis=1) / count[:, None]
        if self.normalize:
            # Bounded before the root, whose gradient at zero is infinite.
            x = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=1, keepdims=True), 1e-24))
        return x


@dataclass(frozen=True)
class DualEncoder:
    """Two towers of one shape. Parameters go in and vectors come out; nothing is held here.

    Attributes:
      encoder: the tower.
      shared: True: both towers are the same leaves, `{"shared": tree}`, and a gradient from
        either side moves both. False: `{"query": tree, "target": tree}`.
    """

    encoder: Encoder
    shared: bool = True

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.encoder.config.hidden_size

    def init(self, key: Array) -> PyTree:
        """Random parameters, float32; separate towers start equal, as published weights do."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.from_encoder_params(self.encoder.init(key, tokens)["params"])

    def from_encoder_params(self, tree: PyTree) -> PyTree:
        """Parameters that start from one tower's.

        Args:
          tree: the parameters of `Encoder`, such as `pretrained.bert_params` gives.

        Returns:
          The parameters of both towers. A separate target tower is a copy in memory of its own,
          so that either can be donated.
        """
        if self.shared:
            return {"shared": tree}
        return {"query": tree, "target": jax.tree.map(lambda leaf: leaf.copy(), tree)}

    def encode_queries(self, params: PyTree, tokens: ArrayLike) -> Array:
        """f: [B, T] integer tokens -> [B, D] float32."""
        return self._encode(params["shared" if self.shared else "query"], tokens)

    def encode_targets(self, params: PyTree, tokens: ArrayLike) -> Array:
        """g: [B, T] integer tokens -> [B, D] float32."""
        return self._encode(params["shared" if self.shared else "target"], tokens)

    def _encode(self, tree: PyTree, tokens: ArrayLike) -> Array:
        return cast(Array, self.encoder.apply({"params": tree}, tokens))
