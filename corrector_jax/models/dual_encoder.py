"""The two encoders f and g of the method: queries and targets to vectors (docs/method.md, 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from corrector_jax.models.family import Axes, Family
from corrector_jax.types import Array, ArrayLike, PyTree, UserError

POOLINGS = ("mean", "cls", "last")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"identity": lambda x: x, "tanh": jnp.tanh}

Encode = Callable[[PyTree, Array], Array]
"""(parameters of a tower, tokens [n, T]) -> embeddings [n, D] or states, text by text."""

BETA_SPEED = 100.0
"""A learned log beta moves so many times as fast as the learning rate, which is made for weights:
at 2e-5 it could not double within 10,000 steps."""


@dataclass(frozen=True)
class Projection:
    """A dense layer after pooling.

    Attributes:
      dim: D of what comes out.
      bias: whether it has one.
      activation: one of `ACTIVATIONS`.
    """

    dim: int
    bias: bool = True
    activation: str = "identity"


class Encoder(nn.Module):
    """One tower: an encoder of any family, pooled to one vector per text.

    Its parameters are those of the family's module (and of `pretrained.params_from`), not nested
    any deeper, and `projection` beside them where there is one.

    Attributes:
      config: the family and its sizes.
      pooling: "mean" over the tokens that are not padding, "cls", the first token's state, or
        "last", that of the last token that is not padding.
      normalize: whether vectors are scaled to length 1.
      dtype: what the family's module computes in; what follows is float32 always.
      project: the dense layer between pooling and normalisation; None = none.
    """

    config: Family
    pooling: str = "mean"
    normalize: bool = True
    dtype: DTypeLike = jnp.float32
    project: Projection | None = None

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.project.dim if self.project else self.config.hidden_size

    def setup(self) -> None:
        """Makes the family's parameters this module's own."""
        if self.pooling not in POOLINGS:
            raise UserError(f"There is no pooling {self.pooling!r}; write one of {POOLINGS}.")
        self.body = self.config.module(self.dtype)
        nn.share_scope(self, self.body)
        if self.project:
            self.projection = nn.Dense(self.project.dim, use_bias=self.project.bias)

    def __call__(self, tokens: ArrayLike) -> Array:
        """Embeds texts.

        Args:
          tokens: [B, T] of any integer dtype, padded with `config.pad_id`.

        Returns:
          [B, D] float32; finite, and with finite gradients, for a row of padding alone too (mean
          pooling: the zero vector, before a projection).

        Raises:
          UserError: `pooling` is not one of `POOLINGS`.
        """
        tokens = jnp.asarray(tokens)
        hidden = self.body(tokens).astype(jnp.float32)
        here = tokens != self.config.pad_id
        if self.pooling == "cls":
            x = hidden[:, 0]
        elif self.pooling == "last":
            last = jnp.where(here, jnp.arange(here.shape[1])[None], 0).max(axis=1)
            x = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        else:
            weight = here.astype(jnp.float32)
            count = jnp.maximum(weight.sum(axis=1), 1.0)
            x = (hidden * weight[:, :, None]).sum(axis=1) / count[:, None]
        if self.project:
            x = ACTIVATIONS[self.project.activation](self.projection(x))
        if self.normalize:
            # Bounded before the root, whose gradient at zero is infinite.
            x = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=1, keepdims=True), 1e-24))
        return x


def rematerialised(encode: Encode) -> Encode:
    """The same function, whose backward pass keeps the products with weights and makes the rest.

    Attention's logits, activations and norms are computed again: far less memory for little work.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(encode, policy=policy)


@dataclass(frozen=True)
class DualEncoder:
    """Two towers of one shape. Parameters go in and vectors come out; nothing is held here.

    Attributes:
      encoder: the tower.
      shared: True: both towers are the same leaves, `{"shared": tree}`, and a gradient from
        either side moves both. False: `{"query": tree, "target": tree}`.
      learn_beta: whether the inverse temperature is learned. It then is the configured beta times
        `beta_ratio`, by which queries are scaled: every logit everywhere is <f(x), g(y)> times the
        configured beta, so selection, loss and divergences all see the learned one.
      wrap: what a tower is put through before it is applied, such as `rematerialised`: memory
        and placement, never results.
      frozen: of "query" and "target", the sides that no gradient reaches.
    """

    encoder: Encoder
    shared: bool = True
    learn_beta: bool = False
    wrap: Callable[[Encode], Encode] = lambda encode: encode
    frozen: frozenset[str] = frozenset()

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.encoder.dim

    def init(self, key: Array) -> PyTree:
        """Random parameters, float32; separate towers start equal, as published weights do."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.from_encoder_params(self.encoder.init(key, tokens)["params"])

    def from_encoder_params(self, tree: PyTree) -> PyTree:
        """Parameters that start from one tower's.

        Args:
          tree: the parameters of `Encoder`, such as `pretrained.params_from` gives.

        Returns:
          The parameters of both towers. A separate target tower is a copy in memory of its own,
          so that either can be donated.
        """
        beta = {"beta": jnp.zeros((), jnp.float32)} if self.learn_beta else {}
        if self.shared:
            return {"shared": tree, **beta}
        return {"query": tree, "target": jax.tree.map(lambda leaf: leaf.copy(), tree), **beta}

    def beta_ratio(self, params: PyTree) -> Array:
        """The inverse temperature over the configured one, scalar float32; 1 where it is fixed."""
        if not self.learn_beta:
            return jnp.float32(1.0)
        return jnp.exp(BETA_SPEED * params["beta"])

    def towers(self, params: PyTree) -> dict[str, PyTree]:
        """The parameters of `Encoder`, once for each tower: "shared", or "query" and "target"."""
        return {
            name: params[name] for name in (("shared",) if self.shared else ("query", "target"))
        }

    def encode_queries(self, params: PyTree, tokens: ArrayLike) -> Array:
        """f: [B, T] integer tokens -> [B, D] float32; scaled by the ratio where beta is learned."""
        with jax.named_scope("encode_queries"):
            queries = self._encode(params, "query", tokens)
        return queries * self.beta_ratio(params) if self.learn_beta else queries

    def encode_targets(self, params: PyTree, tokens: ArrayLike) -> Array:
        """g: [B, T] integer tokens -> [B, D] float32."""
        with jax.named_scope("encode_targets"):
            return self._encode(params, "target", tokens)

    def axes(self) -> Axes:
        """What the axes of the large parameters are, for those who split them."""
        projection = {"projection/kernel": ("width", None)} if self.encoder.project else {}
        return {**self.encoder.config.axes(), **projection}

    def _encode(self, params: PyTree, side: str, tokens: ArrayLike) -> Array:
        tree = params["shared" if self.shared else side]
        if side in self.frozen:
            tree = jax.lax.stop_gradient(tree)

        def encode(tree: PyTree, tokens: Array) -> Array:
            return cast(Array, self.encoder.apply({"params": tree}, tokens))

        return self.wrap(encode)(tree, jnp.asarray(tokens))
