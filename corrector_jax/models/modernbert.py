"""ModernBERT (Warner et al. 2024): rotary positions, local and global attention by turns, GeGLU.

Norms come before each sublayer (the first layer's attention reads the embeddings' norm), and
nothing has a bias. The residual sum stays float32 under bfloat16.
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
from corrector_jax.models.layers import attend, checked, gelu, rotate
from corrector_jax.types import Array, ArrayLike, UserError, shown

_init = nn.initializers.normal(0.02)
_KINDS = ("full_attention", "sliding_attention")

AXES = {
    r"word": (None, "width"),
    r"qkv/kernel": ("width", "heads"),
    r"output/kernel": ("heads", "width"),
    r"up/kernel": ("width", "inner"),
    r"down/kernel": ("inner", "width"),
}


@dataclass(frozen=True)
class ModernBertConfig:
    """The sizes of a ModernBERT encoder.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: D, the width of the hidden states.
      num_layers: how many layers.
      num_heads: attention heads; divides `hidden_size`.
      intermediate_size: width between the two dense layers of a block.
      max_positions: the longest text, in tokens.
      local: for each layer, whether a token sees only its neighbours; there may be more of them
        than layers.
      window: how many places away a neighbour may be.
      global_theta: the longest wavelength of the rotary positions, over 2 pi, in global layers.
      local_theta: likewise in local layers.
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
    local: tuple[bool, ...]
    window: int = 64
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    pad_id: int = 50283

    def __post_init__(self) -> None:
        check_sizes(self)

    @classmethod
    def read(cls, published: Mapping[str, Any]) -> Self:
        """The sizes in a `config.json` of model_type modernbert, of either generation.

        Raises:
          UserError: biases, another activation or scaled rotary positions, or a key is no number.
        """
        only(published, "hidden_activation", "gelu", default="gelu")
        for key in ("norm_bias", "attention_bias", "mlp_bias"):
            only(published, key, False, default=False)
        layers = number(published, "num_hidden_layers")
        every = number(published, "global_attn_every_n_layers", default=3)
        if every < 1:
            raise UserError(
                f"The encoder's config.json gives {every} for global_attn_every_n_layers, which "
                "must be positive."
            )
        alternating = [_KINDS[bool(i % every)] for i in range(layers)]
        kinds = published.get("layer_types") or alternating
        whole = isinstance(kinds, list) and len(kinds) == layers
        if not whole or not all(kind in _KINDS for kind in kinds):
            raise UserError(
                f"The encoder's config.json gives layer_types that are not {layers} words of "
                f"{' or '.join(_KINDS)}; fetch it again."
            )
        rope = _object(published, "rope_parameters")
        theta = {}
        for kind, key, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        ):
            one = _object(rope, kind)
            only(one, "rope_type", "default", default="default")
            theta[kind] = number({key: published.get(key), **one}, "rope_theta", float, 0.0)
            theta[kind] = theta[kind] or number(published, key, float, default)
        return cls(
            vocab_size=number(published, "vocab_size"),
            hidden_size=number(published, "hidden_size"),
            num_layers=layers,
            num_heads=number(published, "num_attention_heads"),
            intermediate_size=number(published, "intermediate_size"),
            max_positions=number(published, "max_position_embeddings"),
            local=tuple(kind == "sliding_attention" for kind in kinds),
            window=number(published, "local_attention", default=128) // 2,
            global_theta=theta["full_attention"],
            local_theta=theta["sliding_attention"],
            layer_norm_eps=number(published, "norm_eps", float, 1e-5),
            pad_id=number(published, "pad_token_id", default=50283),
        )

    def write(self) -> dict[str, Any]:
        """The keys of `config.json`, of both its generations; its model_type is the caller's."""
        kinds = [_KINDS[local] for local in self.local[: self.num_layers]]
        theta = dict(zip(_KINDS, (self.global_theta, self.local_theta), strict=True))
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "layer_types": kinds,
            "local_attention": 2 * self.window,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": value} for kind, value in theta.items()
            },
            "global_rope_theta": self.global_theta,
            "local_rope_theta": self.local_theta,
            "norm_eps": self.layer_norm_eps,
            "pad_token_id": self.pad_id,
        }

    def module(self, dtype: DTypeLike) -> ModernBert:
        """The encoder, tokens [B, T] -> [B, T, D] in `dtype`."""
        return ModernBert(self, dtype)

    def axes(self) -> Axes:
        """What the axes of the large parameters are."""
        return AXES

    def places(self) -> Iterator[Place]:
        """Every parameter of `ModernBert`."""
        width, inner = self.hidden_size, self.intermediate_size
        yield Place(("word",), "embeddings.tok_embeddings.weight", (self.vocab_size, width))
        yield Place(("embeddings_norm", "scale"), "embeddings.norm.weight", (width,))
        for i in range(self.num_layers):
            layer, name = f"layer_{i}", f"layers.{i}"
            if i:
                path = (layer, "attention_norm", "scale")
                yield Place(path, f"{name}.attn_norm.weight", (width,))
            yield Place((layer, "qkv", "kernel"), f"{name}.attn.Wqkv.weight", (3 * width, width))
            yield Place((layer, "output", "kernel"), f"{name}.attn.Wo.weight", (width, width))
            yield Place((layer, "norm", "scale"), f"{name}.mlp_norm.weight", (width,))
            yield Place((layer, "up", "kernel"), f"{name}.mlp.Wi.weight", (2 * inner, width))
            yield Place((layer, "down", "kernel"), f"{name}.mlp.Wo.weight", (width, inner))
        yield Place(("norm", "scale"), "final_norm.weight", (width,))


class ModernBert(nn.Module):
    """The encoder without pooling.

    Attributes:
      config: the sizes.
      dtype: what dense layers and attention compute in; parameters, softmax, norms and the
        residual sum are float32 always.
    """

    config: ModernBertConfig
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
        word = self.param("word", _init, (c.vocab_size, c.hidden_size))
        x = jnp.take(word, tokens, axis=0).reshape(batch * length, c.hidden_size)
        x = _norm(c, "embeddings_norm")(x)
        for i in range(c.num_layers):
            x = _Layer(c, self.dtype, first=not i, local=c.local[i], name=f"layer_{i}")(
                x, tokens != c.pad_id
            )
        x = _norm(c, "norm")(x).astype(self.dtype)
        return x.reshape(batch, length, c.hidden_size)


class _Layer(nn.Module):
    """[B * T, D] float32 -> the same: attention and a gated layer, added to what they read."""

    config: ModernBertConfig
    dtype: DTypeLike
    first: bool
    local: bool

    @nn.compact
    def __call__(self, x: Array, here: Array) -> Array:
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_init)
        y = x if self.first else _norm(c, "attention_norm")(x)
        y = dense(3 * c.hidden_size, name="qkv")(y.astype(self.dtype))
        query, key, value = (
            z.reshape(*here.shape, c.num_heads, -1) for z in jnp.split(y, 3, axis=-1)
        )
        theta = c.local_theta if self.local else c.global_theta
        y = attend(
            rotate(query, theta),
            rotate(key, theta),
            value,
            here,
            window=c.window if self.local else None,
        )
        x = x + dense(c.hidden_size, name="output")(y.reshape(x.shape)).astype(jnp.float32)
        y = dense(2 * c.intermediate_size, name="up")(_norm(c, "norm")(x).astype(self.dtype))
        y, gate = jnp.split(y, 2, axis=-1)
        y = dense(c.hidden_size, name="down")(gelu(y) * gate)
        return x + y.astype(jnp.float32)


def _object(published: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = published.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(
            f"The encoder's config.json gives {shown(value)} for {key}, which must be an object; "
            "fetch it again."
        )
    return value


def _norm(config: ModernBertConfig, name: str) -> nn.Module:
    # The fast variance E[x^2] - E[x]^2 would lose digits where a few channels are large.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        use_bias=False,
        use_fast_variance=False,
        name=name,
    )
