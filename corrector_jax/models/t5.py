"""The encoder half of T5 (Raffel et al. 2020), 1.0 and 1.1: GTR and Sentence-T5 are of it.

Norms without a mean come before each sublayer, positions are a learned bias of the attention logits
that all layers share, and logits are not scaled. The residual sum stays float32 under bfloat16: it
grows to where bfloat16 has lost the small changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from corrector_jax.models.family import Axes, Place, check_sizes, number, only
from corrector_jax.models.layers import attend, checked
from corrector_jax.types import Array, ArrayLike

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}

AXES = {
    r"word": (None, "width"),
    r"(query|key|value)/kernel": ("width", "heads"),
    r"output/kernel": ("heads", "width"),
    r"(up|gate)/kernel": ("width", "inner"),
    r"down/kernel": ("inner", "width"),
}


@dataclass(frozen=True)
class T5Config:
    """The sizes of a T5 encoder.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: D, the width of the hidden states.
      num_layers: how many layers.
      num_heads: attention heads.
      head_size: width of a head; heads need not add up to `hidden_size`.
      intermediate_size: width between the two dense layers of a block.
      gated: whether a second dense layer gates the first (1.1), or not (1.0).
      activation: "relu", "gelu" (the tanh form) or "silu".
      num_buckets: rows of the table of position biases.
      max_distance: places further apart than this share a bias.
      layer_norm_eps: added to the mean square.
      pad_id: the token that fills up a row; it is attended to by nothing.
      max_positions: the longest text, in tokens: a choice of memory, the encoder has no limit.

    Raises:
      UserError: a size is not positive.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_size: int
    intermediate_size: int
    gated: bool = False
    activation: str = "relu"
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    pad_id: int = 0
    max_positions: int = 4096

    def __post_init__(self) -> None:
        check_sizes(self, heads=False)

    @classmethod
    def read(cls, published: Mapping[str, Any]) -> Self:
        """The sizes in a `config.json` of model_type t5.

        Raises:
          UserError: another feed-forward layer, or a key is no number.
        """
        supported = ("relu", "gated-gelu", "gated-silu", "gated-relu", "silu")
        kind = only(published, "feed_forward_proj", *supported, default="relu")
        return cls(
            vocab_size=number(published, "vocab_size"),
            hidden_size=number(published, "d_model"),
            num_layers=number(published, "num_layers"),
            num_heads=number(published, "num_heads"),
            head_size=number(published, "d_kv"),
            intermediate_size=number(published, "d_ff"),
            gated=kind.startswith("gated-"),
            activation=kind.removeprefix("gated-"),
            num_buckets=number(published, "relative_attention_num_buckets", default=32),
            max_distance=number(published, "relative_attention_max_distance", default=128),
            layer_norm_eps=number(published, "layer_norm_epsilon", float, 1e-6),
            pad_id=number(published, "pad_token_id", default=0),
        )

    def write(self) -> dict[str, Any]:
        """The keys of `config.json`; its model_type is the caller's."""
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "d_kv": self.head_size,
            "d_ff": self.intermediate_size,
            "feed_forward_proj": "gated-" * self.gated + self.activation,
            "relative_attention_num_buckets": self.num_buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.layer_norm_eps,
            "pad_token_id": self.pad_id,
        }

    def module(self, dtype: DTypeLike) -> T5:
        """The encoder, tokens [B, T] -> [B, T, D] in `dtype`."""
        return T5(self, dtype)

    def axes(self) -> Axes:
        """What the axes of the large parameters are."""
        return AXES

    def places(self) -> Iterator[Place]:
        """Every parameter of `T5`."""
        width, inner = self.hidden_size, self.intermediate_size
        heads = self.num_heads * self.head_size
        yield Place(
            ("word",), "shared.weight", (self.vocab_size, width), "encoder.embed_tokens.weight"
        )
        # Published with the first layer, and read by all.
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Place(("position_bias",), name, (self.num_buckets, self.num_heads))
        for i in range(self.num_layers):
            layer, block = f"layer_{i}", f"encoder.block.{i}.layer"
            yield Place(
                (layer, "attention_norm", "scale"), f"{block}.0.layer_norm.weight", (width,)
            )
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                shape = (width, heads) if ours == "output" else (heads, width)
                name = f"{block}.0.SelfAttention.{theirs}.weight"
                yield Place((layer, ours, "kernel"), name, shape)
            yield Place((layer, "norm", "scale"), f"{block}.1.layer_norm.weight", (width,))
            up = {"gate": "wi_0", "up": "wi_1"} if self.gated else {"up": "wi"}
            for ours, theirs in (up | {"down": "wo"}).items():
                shape = (width, inner) if ours == "down" else (inner, width)
                name = f"{block}.1.DenseReluDense.{theirs}.weight"
                yield Place((layer, ours, "kernel"), name, shape)
        yield Place(("norm", "scale"), "encoder.final_layer_norm.weight", (width,))


class T5(nn.Module):
    """The encoder without pooling.

    Attributes:
      config: the sizes.
      dtype: what dense layers and attention compute in; parameters, softmax, norms and the
        residual sum are float32 always.
    """

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: ArrayLike) -> Array:
        """Hidden states after the last norm.

        Args:
          tokens: [B, T] of any integer dtype, padded with `config.pad_id`.

        Returns:
          [B, T, D] in `dtype`. A text's states do not depend on how far it is padded; those at
          padding mean nothing, but are finite.

        Raises:
          ValueError: T is larger than `config.max_positions`.
        """
        c = self.config
        tokens = checked(tokens, c.max_positions)
        batch, length = tokens.shape
        word = self.param("word", nn.initializers.normal(1.0), (c.vocab_size, c.hidden_size))
        x = jnp.take(word, tokens, axis=0).reshape(batch * length, c.hidden_size)
        shape, init = (c.num_buckets, c.num_heads), nn.initializers.normal(c.hidden_size**-0.5)
        bias = self.param("position_bias", init, shape)[_buckets(c, length)]  # [T, T, heads]
        bias, here = jnp.transpose(bias, (2, 0, 1))[None], tokens != c.pad_id
        for i in range(c.num_layers):
            x = _Layer(c, self.dtype, name=f"layer_{i}")(x, here, bias)
        x = _norm(c, "norm")(x).astype(self.dtype)
        return x.reshape(batch, length, c.hidden_size)


class _Layer(nn.Module):
    """[B * T, D] float32 -> the same: attention and dense layers, added to what they read."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, here: Array, bias: Array) -> Array:
        c = self.config

        def dense(width: int, name: str, y: Array, fan: int) -> Array:
            init = nn.initializers.normal(fan**-0.5)
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(y)

        y = _norm(c, "attention_norm")(x).astype(self.dtype)

        def heads(name: str) -> Array:
            # Logits are not scaled: the start makes up for it in the queries.
            fan = c.hidden_size * (c.head_size if name == "query" else 1)
            z = dense(c.num_heads * c.head_size, name, y, fan)
            return z.reshape(*here.shape, c.num_heads, c.head_size)

        z = attend(heads("query"), heads("key"), heads("value"), here, bias=bias, scale=1.0)
        z = z.reshape(x.shape[0], -1)
        x = x + dense(c.hidden_size, "output", z, z.shape[-1]).astype(jnp.float32)
        y = _norm(c, "norm")(x).astype(self.dtype)
        act = _ACTIVATIONS[c.activation]
        z = dense(c.intermediate_size, "up", y, c.hidden_size)
        z = act(dense(c.intermediate_size, "gate", y, c.hidden_size)) * z if c.gated else act(z)
        y = dense(c.hidden_size, "down", z, c.intermediate_size)
        return x + y.astype(jnp.float32)


def _norm(config: T5Config, name: str) -> nn.Module:
    return nn.RMSNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, name=name)


def _buckets(config: T5Config, length: int) -> np.ndarray:
    """[T, T] int: the row of the bias table for (query, key).

    Half of the rows are for keys after the query. In each half, small distances have a row each,
    larger ones share rows whose widths grow with the distance, up to `max_distance`.
    """
    place = np.arange(length)
    offset = place[None] - place[:, None]
    half = config.num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(
        config.max_distance / exact
    )
    far = exact + (ratio * (half - exact)).astype(np.int64)
    return np.where(offset > 0, half, 0) + np.where(
        distance < exact, distance, np.minimum(far, half - 1)
    )
