"""The target corrector network h(.; Psi): a stale embedding in, an estimate of the fresh one out.

Every corrector is a residual map that starts as the identity (docs/method.md, 5). Besides `apply`,
each says how to score queries against many stale rows at the least cost: `fold` moves what it can
from the N rows to the B queries, `lift` is what is left to do per row, `length` a number by which a
row's logits are divided, and

    beta <q, h(c)>  ==  (<fold(q), lift(c)> + offset) / length(c).

Where `has_lengths` the lengths are measured now and then and kept beside the cache
(`sweep.measure_lengths`): they change slowly, and a sweep that divides by them costs no more than
one over stale rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from corrector_jax.types import Array, PyTree


class Folded(NamedTuple):
    """Queries made ready for a sweep.

    Attributes:
      queries: [B, D] float32, beta and the linear part of the corrector included.
      offset: [B] float32, added to every logit of the query. It cancels in the softmax but not
        in log Z.
    """

    queries: Array
    offset: Array


class PerRow:
    """A corrector of which nothing folds: every row is put through it while it is swept."""

    has_lengths = False

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """h(c), or exactly c where the gate is 0: [..., D] float32 -> [..., D]."""
        raise NotImplementedError

    def fold(self, params: PyTree, queries: Array, beta: float, gate: Array | float) -> Folded:
        """[B, D] float32 -> beta q, no offset."""
        return Folded(beta * queries, jnp.zeros(queries.shape[0], jnp.float32))

    def lift(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[..., D] float32 -> h(rows) [..., D]."""
        return self.apply(params, rows, gate)

    def length(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[..., D] -> [...] ones: h(rows) is all there is to it."""
        return jnp.ones(rows.shape[:-1], jnp.float32)


@dataclasses.dataclass(frozen=True)
class Identity(PerRow):
    """h(c) = c: the stale cache as it is. It has no parameters and nothing to learn.

    Example:
      >>> Identity().apply({}, jnp.ones((1, 2)), 1.0)
      Array([[1., 1.]], dtype=float32)
    """

    learns = False
    landmarks = 0

    def width(self, dim: int) -> int:
        """Numbers a row passes through on the way, beside its D: none."""
        return 0

    def init(self, key: Array, dim: int) -> PyTree:
        """No parameters: an empty tree. `key` and `dim` are not used."""
        return {}

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[..., D] float32 -> the same [..., D]."""
        return rows


@dataclasses.dataclass(frozen=True)
class Linear:
    """h(c) = c + W c + b, which folds into the query: sweeping costs no more than stale rows.

    <q, c + W c + b> = <q + W^T q, c> + <q, b>. Where g's embeddings are unit vectors it is divided
    by its length |c + W c + b|: left as they are, rows of unequal length move every logit by their
    own factor, which hardly shows in the squared error and doubles the KL (docs/theory.md). The
    length is a number a row, so that folding goes on.

    Attributes:
      normalize: whether g's embeddings are unit vectors.

    Example:
      >>> Linear().init(jax.random.key(0), 2)["bias"]
      Array([0., 0.], dtype=float32)
    """

    normalize: bool = True

    learns = True
    landmarks = 0

    @property
    def has_lengths(self) -> bool:
        """Whether a row's logits are divided by its length, which is kept beside the cache."""
        return self.normalize

    def width(self, dim: int) -> int:
        """Numbers a row passes through on the way, beside its D: none."""
        return 0

    def init(self, key: Array, dim: int) -> PyTree:
        """W = b = 0: the identity. `key` is not used."""
        return {"kernel": jnp.zeros((dim, dim)), "bias": jnp.zeros((dim,))}

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """h(c), or c itself where the gate is 0.

        Args:
          params: {"kernel": [D, D] (c @ kernel), "bias": [D]}.
          rows: [..., D] float32 stale rows.
          gate: scalar, 1 = corrected, 0 = the identity.

        Returns:
          [..., D] float32.
        """
        return self._moved(params, rows, gate) / self.length(params, rows, gate)[..., None]

    def fold(self, params: PyTree, queries: Array, beta: float, gate: Array | float) -> Folded:
        """[B, D] float32 -> (beta (q + gate W^T q), beta gate <q, b>)."""
        shift = queries @ params["kernel"].T
        return Folded(beta * (queries + gate * shift), beta * gate * (queries @ params["bias"]))

    def lift(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[..., D] float32 -> the same [..., D]: all of h but a length sits in the query."""
        return rows

    def length(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[..., D] -> |c + W c + b| [...] float32; 1 where the gate is 0 or nothing is divided."""
        if not self.normalize:
            return jnp.ones(rows.shape[:-1], jnp.float32)
        square = jnp.sum(jnp.square(self._moved(params, rows, gate)), axis=-1)
        # One of zeros stays one of zeros; its gradient must be a number.
        found = jnp.where(square > 1e-24, jnp.sqrt(jnp.maximum(square, 1e-24)), 1.0)
        return 1.0 + gate * (found - 1.0)

    def _moved(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        return rows + gate * (rows @ params["kernel"] + _like(params["bias"], rows))


@dataclasses.dataclass(frozen=True)
class Mlp(PerRow):
    """h(c) = c + W2 gelu(W1 c + b1) + b2, normalised iff the encoder normalises.

    Attributes:
      hidden: width of the hidden layer; 0 = D.
      normalize: whether g's embeddings are unit vectors.

    Example:
      >>> Mlp(hidden=8).init(jax.random.key(0), 2)["outer"]["kernel"].shape
      (8, 2)
    """

    hidden: int = 0
    normalize: bool = True

    learns = True
    landmarks = 0

    def width(self, dim: int) -> int:
        """Numbers a row passes through on the way, beside its D: the hidden layer."""
        return self.hidden or dim

    def init(self, key: Array, dim: int) -> PyTree:
        """W1 ~ N(0, 1/D), W2 = b2 = 0: the identity, with a gradient that reaches W2 at once."""
        hidden = self.width(dim)
        return {
            "inner": {
                "kernel": jax.random.normal(key, (dim, hidden)) / jnp.sqrt(dim),
                "bias": jnp.zeros((hidden,)),
            },
            "outer": {"kernel": jnp.zeros((hidden, dim)), "bias": jnp.zeros((dim,))},
        }

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """h(c), or exactly c where the gate is 0.

        Args:
          params: the tree of `init`.
          rows: [..., D] float32 stale rows.
          gate: scalar, 1 = corrected, 0 = the identity.

        Returns:
          [..., D] float32.
        """
        inner, outer = params["inner"], params["outer"]
        hidden = jax.nn.gelu(rows @ inner["kernel"] + _like(inner["bias"], rows))
        corrected = rows + hidden @ outer["kernel"] + _like(outer["bias"], rows)
        return _opened(rows, corrected, gate, normalize=self.normalize)


@dataclasses.dataclass(frozen=True)
class Nystrom(PerRow):
    """Drift interpolated between landmarks by kernel ridge regression (after Monath et al. 2023).

    h(c) = c + k(c, C_m) (K_mm + lambda I)^-1 (G_m - C_m), k the rbf kernel with the median distance
    of the landmarks as its width; normalised iff the encoder normalises. Nothing is learned from
    gradients: `fit` solves for it whenever the landmarks were encoded anew.

    Attributes:
      landmarks: m, at least 1.
      ridge: lambda, above 0.
      normalize: whether g's embeddings are unit vectors.
    """

    landmarks: int
    ridge: float = 1e-2
    normalize: bool = True

    learns = False

    def width(self, dim: int) -> int:
        """Numbers a row passes through on the way, beside its D: its kernel with each landmark."""
        return self.landmarks

    def init(self, key: Array, dim: int) -> PyTree:
        """Weights of zero: the identity. `key` is not used."""
        return {
            "landmarks": jnp.zeros((self.landmarks, dim)),
            "weights": jnp.zeros((self.landmarks, dim)),
            "width": jnp.ones(()),
        }

    def fit(self, stale: Array, fresh: Array) -> PyTree:
        """The parameters that map the landmarks' stale rows to their fresh ones, up to the ridge.

        Args:
          stale: [m, D] float32, C_m.
          fresh: [m, D] float32, G_m.

        Returns:
          The tree of `init`.
        """
        square = _square_distances(stale, stale)
        apart = ~jnp.eye(len(stale), dtype=bool)
        # Landmarks may coincide: the width must stay above zero.
        width = jnp.sqrt(jnp.nanmedian(jnp.where(apart, square, jnp.nan)))
        width = jnp.where(width > 0, width, 1.0)
        kernel = jnp.exp(-0.5 * square / width**2)
        regular = kernel + self.ridge * jnp.eye(len(stale))
        weights = jax.scipy.linalg.solve(regular, fresh - stale, assume_a="pos")
        return {"landmarks": stale, "weights": weights, "width": width}

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """h(c), or exactly c where the gate is 0.

        Args:
          params: the tree of `init`.
          rows: [..., D] float32 stale rows.
          gate: scalar, 1 = corrected, 0 = the identity.

        Returns:
          [..., D] float32.
        """
        flat = rows.reshape(-1, rows.shape[-1])
        square = _square_distances(flat, params["landmarks"])
        kernel = jnp.exp(-0.5 * square / jnp.square(params["width"]))
        corrected = rows + (kernel @ params["weights"]).reshape(rows.shape)
        return _opened(rows, corrected, gate, normalize=self.normalize)


Corrector = Identity | Linear | Mlp | Nystrom


def make(
    kind: str,
    *,
    hidden: int = 0,
    landmarks: int = 1024,
    ridge: float = 1e-2,
    normalize: bool = True,
) -> Corrector:
    """A corrector by its config word: "identity", "linear", "mlp" or "nystrom"."""
    kinds: dict[str, Corrector] = {
        "identity": Identity(),
        "linear": Linear(normalize),
        "mlp": Mlp(hidden, normalize),
        "nystrom": Nystrom(landmarks, ridge, normalize),
    }
    return kinds[kind]


def _opened(rows: Array, corrected: Array, gate: Array | float, *, normalize: bool) -> Array:
    """[..., D] stale and corrected rows -> the corrected ones as far as the gate is open."""
    if normalize:
        corrected = _unit(corrected)
    # Interpolated, not applied to scaled parameters: normalising a row that was rounded for storage
    # moves it, and a closed gate must be exactly the identity.
    return rows + gate * (corrected - rows)


def _unit(rows: Array) -> Array:
    """[..., D] divided by its length; a row of zeros stays one."""
    square = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _square_distances(a: Array, b: Array) -> Array:
    """[n, D], [m, D] -> [n, m] float32, never negative."""
    squares = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None, :]
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(squares - 2.0 * product, 0.0)


def _like(vector: Array, rows: Array) -> Array:
    """[D] -> [1, ..., 1, D], so that ranks agree without implicit promotion."""
    return jnp.reshape(vector, (1,) * (rows.ndim - 1) + vector.shape)
