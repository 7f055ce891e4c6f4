"""BERT: tokens in, hidden states of the last layer out (Devlin et al. 2019); RoBERTa and XLM-R too.

Everything but attention runs on [B * T, D]: the numbers are the same, and XLA on CPU takes three
times as long for the weight gradient of a dense layer on [B, T, D].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from corrector_jax.models.family import Axes, Place, check_sizes, number, only
from corrector_jax.models.layers import attend, checked, gelu
from corrector_jax.types import Array, ArrayLike

_init = nn.initializers.normal(0.02)
# our name of a part of a layer -> the published one
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}

AXES = {
    r"embeddings/(word|position|type)": (None, "width"),
    r"(query|key|value)/kernel": ("width", "heads"),
    r"(query|key|value)/bias": ("heads",),
    r"output/kernel": ("heads", "width"),
    r"up/kernel": ("width", "inner"),
    r"up/bias": ("inner",),
    r"down/kernel": ("inner", "width"),
}


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
      position_offset: rows of the position table that are never read: RoBERTa counts from there.

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
    position_offset: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)

    @classmethod
    def read(cls, published: Mapping[str, Any]) -> Self:
        """The sizes in a `config.json` of model_type bert, roberta, xlm-roberta or camembert.

        Raises:
          UserError: another gelu or other positions than BERT's, or a key is no number.
        """
        only(published, "hidden_act", "gelu", default="gelu")
        only(published, "position_embedding_type", "absolute", default="absolute")
        roberta = published.get("model_type") != "bert"
        pad_id = number(published, "pad_token_id", default=1 if roberta else 0)
        offset = pad_id + 1 if roberta else 0
        return cls(
            vocab_size=number(published, "vocab_size"),
            hidden_size=number(published, "hidden_size"),
            num_layers=number(published, "num_hidden_layers"),
            num_heads=number(published, "num_attention_heads"),
            intermediate_size=number(published, "intermediate_size"),
            max_positions=number(published, "max_position_embeddings") - offset,
            type_vocab_size=number(published, "type_vocab_size", default=2),
            layer_norm_eps=number(published, "layer_norm_eps", float, 1e-12),
            pad_id=pad_id,
            position_offset=offset,
        )

    def write(self) -> dict[str, Any]:
        """The keys of `config.json`; its model_type is the caller's."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions + self.position_offset,
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.layer_norm_eps,
            # RoBERTa's positions begin after it.
            "pad_token_id": self.position_offset - 1 if self.position_offset else self.pad_id,
            "hidden_act": "gelu",
        }

    def module(self, dtype: DTypeLike) -> Bert:
        """The encoder, tokens [B, T] -> [B, T, D] in `dtype`."""
        return Bert(self, dtype)

    def axes(self) -> Axes:
        """What the axes of the large parameters are."""
        return AXES

    def places(self) -> Iterator[Place]:
        """Every parameter of `Bert`."""
        width, inner = self.hidden_size, self.intermediate_size
        for ours, theirs, rows in (
            ("word", "word", self.vocab_size),
            ("position", "position", self.max_positions + self.position_offset),
            ("type", "token_type", self.type_vocab_size),
        ):
            name = f"embeddings.{theirs}_embeddings.weight"
            yield Place(("embeddings", ours), name, (rows, width))
        yield from _norm_places(("embeddings", "norm"), "embeddings.LayerNorm", width)
        for i in range(self.num_layers):
            for ours, theirs in _DENSE.items():
                path, name = (f"layer_{i}", ours), f"encoder.layer.{i}.{theirs}"
                shape = (inner if ours == "up" else width, inner if ours == "down" else width)
                yield Place((*path, "kernel"), f"{name}.weight", shape)
                yield Place((*path, "bias"), f"{name}.bias", shape[:1])
            for ours, theirs in _NORMS.items():
                name = f"encoder.layer.{i}.{theirs}"
                yield from _norm_places((f"layer_{i}", ours), name, width)


def _norm_places(path: tuple[str, ...], name: str, width: int) -> Iterator[Place]:
    # The first conversions of BERT called them gamma and beta.
    yield Place((*path, "scale"), f"{name}.weight", (width,), alias=f"{name}.gamma")
    yield Place((*path, "bias"), f"{name}.bias", (width,), alias=f"{name}.beta")


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
        tokens = checked(tokens, c.max_positions)
        batch, length = tokens.shape
        x = _Embeddings(c, name="embeddings")(tokens).reshape(batch * length, c.hidden_size)
        x = x.astype(self.dtype)
        here = tokens != c.pad_id
        for i in range(c.num_layers):
            x = _Layer(c, self.dtype, name=f"layer_{i}")(x, here)
        return x.reshape(batch, length, c.hidden_size)


class _Embeddings(nn.Module):
    """[B, T] tokens -> [B, T, D] float32: token, position and the first segment type."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c = self.config
        word = self.param("word", _init, (c.vocab_size, c.hidden_size))
        first, rows = c.position_offset, c.position_offset + c.max_positions
        position = self.param("position", _init, (rows, c.hidden_size))
        kind = self.param("type", _init, (c.type_vocab_size, c.hidden_size))
        x = (
            jnp.take(word, tokens, axis=0)
            + (position[first : first + tokens.shape[1]] + kind[:1])[None]
        )
        return _layer_norm(c, "norm")(x)


class _Layer(nn.Module):
    """[B * T, D] -> [B * T, D]: attention and two dense layers, each added and then normalised."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, here: Array) -> Array:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_init)

        def heads(name: str) -> Array:
            y = dense(c.hidden_size, name=name)(x)
            return y.reshape(*here.shape, c.num_heads, -1)

        y = attend(heads("query"), heads("key"), heads("value"), here)
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
