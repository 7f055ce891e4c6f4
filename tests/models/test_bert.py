from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models.bert import Bert, BertConfig
from corrector_jax.models.layers import gelu
from corrector_jax.types import UserError

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    intermediate_size=32,
    max_positions=64,
)


def tokens(rows: int, length: int, width: int, seed: int = 0) -> np.ndarray:
    """[rows, width] int32: `length` random tokens, then padding."""
    rng = np.random.default_rng(seed)
    out = np.zeros((rows, width), np.int32)
    out[:, :length] = rng.integers(1, CONFIG.vocab_size, (rows, length))
    return out


@pytest.fixture(scope="module")
def variables():
    """Parameters large enough for attention to matter: the usual 0.02 hardly moves a state."""
    shapes = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), tokens(1, 4, 4))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def bert():
    return jax.jit(Bert(CONFIG).apply)


def test_states_have_the_width_of_the_config(variables, bert):
    assert jax.eval_shape(bert, variables, tokens(3, 5, 8)).shape == (3, 8, 16)


def test_padding_length_does_not_matter(variables, bert):
    short, long = bert(variables, tokens(2, 6, 8)), bert(variables, tokens(2, 6, 64))
    np.testing.assert_allclose(short[:, :6], long[:, :6], atol=1e-5)


def test_the_other_rows_do_not_matter(variables, bert):
    ids = tokens(2, 6, 8)
    other = ids.copy()
    other[1] = tokens(1, 8, 8, seed=1)
    np.testing.assert_allclose(bert(variables, ids)[0], bert(variables, other)[0], atol=1e-5)


def test_every_token_reads_every_other_and_its_place(variables, bert):
    ids = tokens(2, 6, 8)
    changed = ids.copy()
    changed[0, 5] = changed[0, 5] % 49 + 1
    assert (
        np.abs(bert(variables, ids)[0, :5] - bert(variables, changed)[0, :5]).max(axis=1).min()
        > 1e-3
    )
    swapped = ids.copy()
    swapped[0, [0, 1]] = ids[0, [1, 0]]
    assert (
        np.abs(bert(variables, ids)[0, 2:6] - bert(variables, swapped)[0, 2:6]).max(axis=1).min()
        > 1e-3
    )


def test_the_pad_token_is_the_one_of_the_config(variables, bert):
    other = jax.jit(Bert(dataclasses.replace(CONFIG, pad_id=7)).apply)
    ids = tokens(2, 9, 9)
    ids[ids == 7] = 8
    padded = np.pad(ids, ((0, 0), (0, 7)), constant_values=7)
    np.testing.assert_allclose(other(variables, padded)[:, :9], other(variables, ids), atol=1e-5)


def test_token_tables_of_uint16_are_read_as_they_are(variables, bert):
    ids = tokens(2, 5, 8)
    np.testing.assert_array_equal(bert(variables, ids.astype(np.uint16)), bert(variables, ids))


def test_bfloat16_is_close_and_parameters_stay_float32(variables, bert):
    low = Bert(CONFIG, dtype=jnp.bfloat16)
    ids = tokens(2, 6, 8)
    states = jax.jit(low.apply)(variables, ids)
    assert states.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), ids))} == {
        jnp.dtype(jnp.float32)
    }
    difference = jnp.abs(states.astype(jnp.float32) - bert(variables, ids))[:, :6]
    assert 0 < difference.mean() < 0.05


def test_softmax_and_norms_are_float32_under_bfloat16(variables):
    program = jax.make_jaxpr(Bert(CONFIG, dtype=jnp.bfloat16).apply)(variables, tokens(2, 5, 8))
    seen = {
        (eqn.primitive.name, str(eqn.outvars[0].aval.dtype))
        for eqn in _equations(program.jaxpr)
        if eqn.primitive.name in ("exp", "rsqrt", "dot_general")
    }
    assert {("exp", "float32"), ("rsqrt", "float32"), ("dot_general", "bfloat16")} <= seen
    assert not {("exp", "bfloat16"), ("rsqrt", "bfloat16")} & seen


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_gelu_is_the_exact_one_and_so_is_its_derivative():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    derivative = jax.grad(lambda x: jax.nn.gelu(x, approximate=False).sum())(x)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(x), derivative, atol=1e-6)
    assert np.abs(gelu(x) - jax.nn.gelu(x)).max() > 1e-4


def test_too_long_a_text_is_refused(variables):
    with pytest.raises(ValueError, match="65 tokens are longer than the 64 positions"):
        Bert(CONFIG).apply(variables, tokens(1, 65, 65))


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"num_layers": 0}, {"vocab_size": -1}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
