"""The halves of T5 (Raffel et al. 2020), 1.0 and 1.1: an encoder and a decoder of the same blocks.

GTR and Sentence-T5 are the encoder alone; `reader.py` puts the two together.

Norms without a mean come before each sublayer, positions are a learned bias of the attention logits
that all layers of a half share, and logits are not scaled. The residual sum stays float32 under
bfloat16: it grows to where bfloat16 has lost the small changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from corrector_jax.models.family import Axes, Place, check_sizes, number, only
from corrector_jax.models.layers import attend, attend_where, checked
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
        yield Place(
            ("word",),
            "shared.weight",
            (self.vocab_size, self.hidden_size),
            "encoder.embed_tokens.weight",
        )
        yield from _half_places(self, "encoder", self.num_layers, cross=False)

    def decoder_places(self, layers: int) -> Iterator[Place]:
        """Every parameter of a `T5Decoder` of so many layers."""
        yield from _half_places(self, "decoder", layers, cross=True)


def _half_places(config: T5Config, half: str, layers: int, *, cross: bool) -> Iterator[Place]:
    """The parameters of all layers, and of the norm after them."""
    width, inner = config.hidden_size, config.intermediate_size
    # Published with the first layer, and read by all.
    name = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Place(("position_bias",), name, (config.num_buckets, config.num_heads))
    for i in range(layers):
        path, block = (f"layer_{i}",), f"{half}.block.{i}.layer"
        yield Place((*path, "attention_norm", "scale"), f"{block}.0.layer_norm.weight", (width,))
        yield from _attention_places(config, path, f"{block}.0.SelfAttention")
        if cross:
            name = f"{block}.1.layer_norm.weight"
            yield Place((*path, "cross_norm", "scale"), name, (width,))
            yield from _attention_places(config, (*path, "cross"), f"{block}.1.EncDecAttention")
        last = f"{block}.{1 + cross}"
        yield Place((*path, "norm", "scale"), f"{last}.layer_norm.weight", (width,))
        up = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
        for ours, theirs in (up | {"down": "wo"}).items():
            shape = (width, inner) if ours == "down" else (inner, width)
            yield Place((*path, ours, "kernel"), f"{last}.DenseReluDense.{theirs}.weight", shape)
    yield Place(("norm", "scale"), f"{half}.final_layer_norm.weight", (width,))


def _attention_places(config: T5Config, path: tuple[str, ...], name: str) -> Iterator[Place]:
    width, heads = config.hidden_size, config.num_heads * config.head_size
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        shape = (width, heads) if ours == "output" else (heads, width)
        yield Place((*path, ours, "kernel"), f"{name}.{theirs}.weight", shape)


class Memory(NamedTuple):
    """What attention looks at.

    Attributes:
      key: [B, S, heads, d].
      value: [B, S, heads, d].
    """

    key: Array
    value: Array


class T5(nn.Module):
    """The encoder without pooling.

    Attributes:
      config: the sizes.
      dtype: what dense layers and attention compute in; parameters, softmax, norms and the
        residual sum are float32 always.
    """

    config: T5Config
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the table of words and what stands above it."""
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        self.word = self.param("word", nn.initializers.normal(1.0), shape)
        self.position_bias = self.param("position_bias", *_bias_table(c))
        self.layer = [_Layer(c, self.dtype) for _ in range(c.num_layers)]
        self.norm = _norm(c)

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
        x = jnp.take(self.word, tokens, axis=0)
        bias = _bias(self.position_bias, _buckets(c, tokens.shape[1]))
        for layer in self.layer:
            x = layer(x, tokens != c.pad_id, bias)
        return self.norm(x).astype(self.dtype)


class T5Decoder(nn.Module):
    """The decoder, from embedded tokens to states; the table of words and the head are not its own.

    Attributes:
      config: the sizes of its layers, which are the encoder's; its number of layers is not read.
      num_layers: how many layers.
      dtype: as for `T5`.
    """

    config: T5Config
    num_layers: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the layers."""
        self.position_bias = self.param("position_bias", *_bias_table(self.config))
        self.layer = [_DecoderLayer(self.config, self.dtype) for _ in range(self.num_layers)]
        self.norm = _norm(self.config)

    def memories(self, states: Array) -> list[Memory]:
        """What each layer keeps of the encoder's states [B, S, D]: a key and a value per token."""
        return [layer.cross.memory(states) for layer in self.layer]

    def __call__(self, x: Array, memories: list[Memory], here: Array) -> Array:
        """Reads whole texts at once, each token seeing itself and those before it.

        Args:
          x: [B, T, D] float32 embedded tokens.
          memories: of `memories`, S tokens each.
          here: [B, S] bool, False for what is not to be looked at.

        Returns:
          [B, T, D] float32 states after the last norm.
        """
        length = x.shape[1]
        bias = _bias(self.position_bias, _buckets(self.config, length, causal=True))
        mask = jnp.asarray(np.tri(length, dtype=bool))[None, None]
        for layer, memory in zip(self.layer, memories, strict=True):
            x = layer(x, memory, here, bias, mask)
        return self.norm(x)

    def start(self, batch: int, beams: int, length: int) -> list[Memory]:
        """Room for the keys and values of `length` tokens a text, [B, beams, T, heads, d]."""
        c = self.config
        empty = jnp.zeros((batch, beams, length, c.num_heads, c.head_size), self.dtype)
        return [Memory(empty, empty) for _ in range(self.num_layers)]

    def step(
        self, x: Array, past: list[Memory], memories: list[Memory], here: Array, place: Array
    ) -> tuple[Array, list[Memory]]:
        """Reads one more token of every text.

        Args:
          x: [B, beams, D] float32, the embedded token of each text; those of a row of the batch
            look at the same memory.
          past: of `start`, or of the step before.
          memories: of `memories`.
          here: [B, S] bool, False for what is not to be looked at.
          place: scalar int32, the token's place in its text.

        Returns:
          [B, beams, D] float32 states after the last norm, and `past` with the token in it.
        """
        length = past[0].key.shape[2]
        bias = _bias(self.position_bias, _buckets(self.config, length, causal=True))
        bias = jax.lax.dynamic_slice_in_dim(bias, place, 1, axis=2)  # [1, heads, 1, T]
        mask = (jnp.arange(length) <= place)[None, None, None]
        now = []
        for layer, kept, memory in zip(self.layer, past, memories, strict=True):
            x, kept = layer.step(x, kept, memory, here, bias, mask, place)
            now.append(kept)
        return self.norm(x), now


class _Attention(nn.Module):
    """The projections of attention; what is looked at, and from where, is the caller's."""

    config: T5Config
    dtype: DTypeLike

    def setup(self) -> None:
        c = self.config
        width = c.num_heads * c.head_size
        # Logits are not scaled: the start makes up for it in the queries.
        self.query = _Dense(width, c.hidden_size * c.head_size, self.dtype)
        self.key = _Dense(width, c.hidden_size, self.dtype)
        self.value = _Dense(width, c.hidden_size, self.dtype)
        self.output = _Dense(c.hidden_size, width, self.dtype)

    def queries(self, x: Array) -> Array:
        return self._heads(self.query(x))

    def memory(self, x: Array) -> Memory:
        return Memory(self._heads(self.key(x)), self._heads(self.value(x)))

    def join(self, heads: Array) -> Array:
        return self.output(heads.reshape(*heads.shape[:-2], -1)).astype(jnp.float32)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_size)


class _FeedForward(nn.Module):
    """[B, T, D] float32 -> the same: a norm and the dense layers, without the residual sum."""

    config: T5Config
    dtype: DTypeLike

    def setup(self) -> None:
        c = self.config
        self.norm = _norm(c)
        self.up = _Dense(c.intermediate_size, c.hidden_size, self.dtype)
        if c.gated:
            self.gate = _Dense(c.intermediate_size, c.hidden_size, self.dtype)
        self.down = _Dense(c.hidden_size, c.intermediate_size, self.dtype)

    def __call__(self, x: Array) -> Array:
        act = _ACTIVATIONS[self.config.activation]
        y = self.norm(x).astype(self.dtype)
        y = act(self.gate(y)) * self.up(y) if self.config.gated else act(self.up(y))
        return self.down(y).astype(jnp.float32)


class _Layer(nn.Module):
    """[B, T, D] float32 -> the same: attention and dense layers, added to what they read."""

    config: T5Config
    dtype: DTypeLike

    def setup(self) -> None:
        self.attention_norm = _norm(self.config)
        self.attention = _Attention(self.config, self.dtype)
        self.feed_forward = _FeedForward(self.config, self.dtype)
        # Their parameters are the layer's own, not nested any deeper.
        nn.share_scope(self, self.attention)
        nn.share_scope(self, self.feed_forward)

    def __call__(self, x: Array, here: Array, bias: Array) -> Array:
        y = self.attention_norm(x).astype(self.dtype)
        z = attend(self.attention.queries(y), *self.attention.memory(y), here, bias=bias, scale=1.0)
        x = x + self.attention.join(z)
        return x + self.feed_forward(x)


class _DecoderLayer(nn.Module):
    """As `_Layer`, with attention to the encoder's states between its two sublayers."""

    config: T5Config
    dtype: DTypeLike

    def setup(self) -> None:
        self.attention_norm = _norm(self.config)
        self.attention = _Attention(self.config, self.dtype)
        self.cross_norm = _norm(self.config)
        self.cross = _Attention(self.config, self.dtype)
        self.feed_forward = _FeedForward(self.config, self.dtype)
        nn.share_scope(self, self.attention)
        nn.share_scope(self, self.feed_forward)

    def __call__(self, x: Array, memory: Memory, here: Array, bias: Array, mask: Array) -> Array:
        y = self.attention_norm(x).astype(self.dtype)
        key, value = self.attention.memory(y)
        z = attend_where(self.attention.queries(y), key, value, mask, bias=bias, scale=1.0)
        return self._look(x + self.attention.join(z), memory, here)

    def step(
        self,
        x: Array,
        past: Memory,
        memory: Memory,
        here: Array,
        bias: Array,
        mask: Array,
        place: Array,
    ) -> tuple[Array, Memory]:
        y = self.attention_norm(x).astype(self.dtype)
        new = self.attention.memory(y)
        put = jax.lax.dynamic_update_slice_in_dim
        past = Memory(
            put(past.key, new.key[:, :, None], place, axis=2),
            put(past.value, new.value[:, :, None], place, axis=2),
        )
        query = self.attention.queries(y)
        # Every beam is a text of one token that looks at a past of its own.
        rows, beam = query.shape[0] * query.shape[1], query.shape[2:]
        key, value = (kept.reshape(rows, -1, *beam) for kept in past)
        z = attend_where(query.reshape(rows, 1, *beam), key, value, mask, bias=bias, scale=1.0)
        x = x + self.attention.join(z.reshape(query.shape))
        return self._look(x, memory, here), past

    def _look(self, x: Array, memory: Memory, here: Array) -> Array:
        y = self.cross_norm(x).astype(self.dtype)
        key, value = memory
        z = attend_where(self.cross.queries(y), key, value, here[:, None, None, :], scale=1.0)
        x = x + self.cross.join(z)
        return x + self.feed_forward(x)


class _Dense(nn.Module):
    """[..., in] -> [..., out] without a bias, computed on a matrix; it starts at sd fan^-1/2."""

    features: int
    fan: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.fan**-0.5)
        dense = nn.Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=init)
        nn.share_scope(self, dense)
        # See bert.py: XLA on CPU is slow at the gradient of a dense layer on [B, T, D].
        return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def _norm(config: T5Config) -> nn.Module:
    return nn.RMSNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32)


def _bias_table(config: T5Config) -> tuple[Callable[..., Array], tuple[int, int]]:
    """Start and shape of the table of position biases."""
    start = nn.initializers.normal(config.hidden_size**-0.5)
    return start, (config.num_buckets, config.num_heads)


def _bias(table: Array, buckets: np.ndarray) -> Array:
    """[1, heads, T, T] of the table [buckets, heads]."""
    return jnp.transpose(table[buckets], (2, 0, 1))[None]


def _buckets(config: T5Config, length: int, *, causal: bool = False) -> np.ndarray:
    """[T, T] int: the row of the bias table for (query, key).

    Half of the rows are for keys after the query; all are for those before it where it is causal.
    In each half, small distances have a row each, larger ones share rows whose widths grow with the
    distance, up to `max_distance`.
    """
    place = np.arange(length)
    offset = place[None] - place[:, None]
    rows = config.num_buckets if causal else config.num_buckets // 2
    exact = rows // 2
    distance = np.maximum(-offset, 0) if causal else np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(
        config.max_distance / exact
    )
    far = exact + (ratio * (rows - exact)).astype(np.int64)
    later = np.where(offset > 0, 0 if causal else rows, 0)
    return later + np.where(distance < exact, distance, np.minimum(far, rows - 1))
