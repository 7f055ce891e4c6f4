"""Which attention is asked for where the backend has a fused one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from corrector_jax.models import layers


@pytest.mark.parametrize(
    ("length", "window", "bias", "wanted"),
    [
        (8, None, False, "cudnn"),
        (7, None, False, "cudnn"),
        (8, 2, False, "cudnn"),
        (8, None, True, "cudnn"),
        (7, 2, False, "xla"),
        (7, None, True, "xla"),
    ],
)
def test_odd_lengths_with_a_bias_or_a_window_are_not_fused(
    monkeypatch, length, window, bias, wanted
):
    asked = []

    def attention(query, *_, implementation, **__):
        asked.append(implementation)
        return query

    monkeypatch.setattr(layers, "_fused", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    x = jnp.zeros((1, length, 2, 8), jnp.bfloat16)
    table = jnp.zeros((1, 2, length, length)) if bias else None
    layers.attend(x, x, x, jnp.ones((1, length), bool), window=window, bias=table)
    assert asked == [wanted]
