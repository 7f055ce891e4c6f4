"""What the encoder families share: a check of lengths, attention, rotary positions, exact gelu."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from corrector_jax.types import Array, ArrayLike


def checked(tokens: ArrayLike, max_positions: int) -> Array:
    """Tokens as every family reads them.

    Args:
      tokens: [B, T] of any integer dtype.
      max_positions: the longest text there is a position for.

    Returns:
      [B, T] int32.

    Raises:
      ValueError: T is larger than `max_positions`.
    """
    length = tokens.shape[1]
    if length > max_positions:
        raise ValueError(
            f"Texts of {length} tokens are longer than the {max_positions} positions this "
            f"encoder has; shorten them."
        )
    return jnp.asarray(tokens, jnp.int32)


def attend(
    query: Array,
    key: Array,
    value: Array,
    here: Array,
    *,
    bias: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """Attention of every token to the tokens of its row; its softmax is float32 for any dtype.

    Args:
      query: [B, T, heads, d] of any float dtype.
      key: likewise.
      value: likewise.
      here: [B, T] bool, False for padding, which stands at the end of a row.
      bias: [1, heads, T, T] added to the logits, or None.
      window: a token sees only those at most so many places away; None = all.
      scale: what logits are multiplied by; None = 1 / sqrt(d).

    Returns:
      [B, T, heads, d]; rows of padding alone are finite and mean nothing.
    """
    # With a bias, cuDNN takes only even lengths.
    even = query.shape[1] % 2 == 0 or (bias is None and window is None)
    if even and _fused(query.dtype, query.shape[-1]):
        # It takes lengths and a bias, and no mask that is narrower than its logits.
        lengths = (here * jnp.arange(1, here.shape[1] + 1, dtype=jnp.int32)[None]).max(axis=1)
        if window is not None:
            far = jnp.where(_near(here.shape[1], window), 0.0, -1e9)[None, None]
            bias = far if bias is None else bias + far
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if bias is None else bias.astype(query.dtype),
            key_value_seq_lengths=jnp.maximum(lengths, 1),
            scale=scale,
            implementation="cudnn",
        )
    mask = here[:, None, None, :]
    if window is not None:
        mask = mask & _near(here.shape[1], window)[None, None]
    return attend_where(query, key, value, mask, bias=bias, scale=scale)


def attend_where(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention under any mask, of one text to itself or to another; its softmax is float32.

    Args:
      query: [B, T, heads, d] of any float dtype.
      key: [B, S, heads, d].
      value: likewise.
      mask: bool, [B, 1, T, S] or what broadcasts to it, False for what is not looked at.
      bias: [1, heads, T, S] added to the logits, or None.
      scale: what logits are multiplied by; None = 1 / sqrt(d).

    Returns:
      [B, T, heads, d]; finite, and of no meaning, for a query that may look at nothing.
    """
    # Batched matmuls on [B, heads, T, d], and a backward written by hand, were within the noise of
    # it on CPU (forward and gradient, T 32 and 64).
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale, implementation="xla"
    )


def _near(length: int, window: int) -> np.ndarray:
    place = np.arange(length)
    return np.asarray(np.abs(place[:, None] - place[None]) <= window)


def _fused(dtype: DTypeLike, width: int) -> bool:
    """Whether the backend has attention as one kernel: cuDNN's, for 16-bit floats."""
    if dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128:
        return False
    return _on_ampere()


@functools.cache
def _on_ampere() -> bool:
    """Whether devices are NVIDIA's, of the first generation whose kernels cuDNN has, or later."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "nvidia" not in device.device_kind.lower():
        return False
    return float(device.compute_capability) >= 8.0


def rotate(x: Array, theta: float) -> Array:
    """Rotary positions (Su et al. 2021): pairs of channels turned by an angle of their place.

    Args:
      x: [B, T, heads, d], d even, of any float dtype; channel i is paired with i + d / 2.
      theta: the longest wavelength is 2 pi theta tokens.

    Returns:
      [B, T, heads, d] of the same dtype, computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * frequency[None]
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


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
