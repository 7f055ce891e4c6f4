"""The BERT encoder: tokens in, hidden states of the last layer out (Devlin et al. 2019).

The weights are those of published checkpoints (`pretrained.py`). Everything but attention runs on
[B * T, D]: the numbers are the same, and XLA on CPU takes three times as long for the weight
gradient of a dense layer on [B, T, D].
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from corrector_jax.types import Array, ArrayLike, UserError

_init = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: D, the width of the hidden states.
      num_layers: how many layers.
      num_heads: attention heads; divides `hidden_size`.
      intermediate_size: width between the two dense layers of a block.
      max_positions: the longest text, in tokens.
      type_vocab_size: rows of the table of segment types; only the first is ever read.
      layer_norm_eps: added to the variance.
      pad_id: the token that fills up a row; it is attended to by nothing.

    Raises:
      UserError: a size is not positive, or `num_heads` does not divide `hidden_size`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "pad_id" and value <= 0:
                raise UserError(f"The encoder's {name} is {value}; it must be positive.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"The encoder's hidden_size {self.hidden_size} cannot be split over "
                f"{self.num_heads} heads; write a num_heads that divides it."
            )


class Bert(nn.Module):
    """The encoder without pooling.

    Attributes:
      config: the sizes.
      dtype: what dense layers and attention compute in; parameters, softmax and layer norms are
        float32 always.
    """

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: ArrayLike) -> Array:
        """Hidden states of the last layer.

        Args:
          tokens: [B, T] of any integer dtype, padded with `config.pad_id`.

        Returns:
          [B, T, D] in `dtype`. A text's states do not depend on how far it is padded; those at
          padding mean nothing, but are finite.

        Raises:
          ValueError: T is larger than `config.max_positions`.
        """
        c = self.config
        batch, length = tokens.shape
        if length > c.max_positions:
            raise ValueError(
                f"Texts of {length} tokens are longer than the {c.max_positions} positions this "
                f"encoder has; shorten them."
            )
        tokens = jnp.asarray(tokens, jnp.int32)
        x = _Embeddings(c, name="embeddings")(tokens).reshape(batch * length, c.hidden_size)
        x = x.astype(self.dtype)
        mask = (tokens != c.pad_id)[:, None, None, :]
        for i in range(c.num_layers):
            x = _Layer(c, self.dtype, name=f"layer_{i}")(x, mask)
        return x.reshape(batch, length, c.hidden_size)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """The exact gelu, x Phi(x), of [...] of any float dtype, with its derivative written out.

    jax 0.12 cannot differentiate erf inside `jax.shard_map` (its polynomials have no rule for
    values that vary over the mesh).
    """
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, (cdf + x * density) * dx


class _Embeddings(nn.Module):
    """[B, T] tokens -> [B, T, D] float32: token, position and the first segment type."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c = self.config
        word = self.param("word", _init, (c.vocab_size, c.hidden_size))
        position = self.param("position", _init, (c.max_positions, c.hidden_size))
        kind = self.param("type", _init, (c.type_vocab_size, c.hidden_size))
        x = jnp.take(word, tokens, axis=0) + (position[: tokens.shape[1]] + kind[:1])[None]
        return _layer_norm(c, "norm")(x)


class _Layer(nn.Module):
    """[B * T, D] -> [B * T, D]: attention and two dense layers, each added and then normalised."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_init)

        def heads(name: str) -> Array:
            y = dense(c.hidden_size, name=name)(x)
            return y.reshape(mask.shape[0], mask.shape[-1], c.num_heads, -1)

        # Its softmax is float32 for any dtype. Batched matmuls on [B, heads, T, d], and a backward
        # written by hand, were within the noise of it on CPU (forward and gradient, T 32 and 64).
        y = jax.nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), mask=mask, implementation="xla"
        )
        y = dense(c.hidden_size, name="output")(y.reshape(x.shape))
        x = _layer_norm(c, "attention_norm")(x + y).astype(self.dtype)
        y = gelu(dense(c.intermediate_size, name="up")(x))
        y = dense(c.hidden_size, name="down")(y)
        return _layer_norm(c, "norm")(x + y).astype(self.dtype)


def _layer_norm(config: BertConfig, name: str) -> nn.Module:
    # The fast variance E[x^2] - E[x]^2 would lose digits where a few channels are large.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )
