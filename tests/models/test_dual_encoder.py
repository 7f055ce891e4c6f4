from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from corrector_jax.models.bert import Bert, BertConfig
from corrector_jax.models.dual_encoder import POOLINGS, DualEncoder, Encoder
from corrector_jax.types import UserError

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    intermediate_size=32,
    max_positions=64,
)


def tokens(width: int = 8, seed: int = 0) -> np.ndarray:
    """[8, width] int32 texts of 1 to 8 tokens, the last of them of padding alone."""
    rng = np.random.default_rng(seed)
    out = rng.integers(1, CONFIG.vocab_size, (8, width)).astype(np.int32)
    lengths = rng.integers(1, 9, (8, 1))
    lengths[-1] = 0
    return np.where(np.arange(width) < lengths, out, 0)


DIRECTION = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def tree():
    """Parameters large enough to tell texts apart, which the usual 0.02 hardly does."""
    shapes = jax.eval_shape(Encoder(CONFIG).init, jax.random.key(0), tokens())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


# Compiling takes nearly all of the time, so all tests share these two.
@functools.partial(jax.jit, static_argnums=0)
def embed(encoder, tree, ids):
    return encoder.apply({"params": tree}, ids)


@functools.partial(jax.jit, static_argnums=0)
def query_gradient(dual, params, ids, direction):
    """The gradient of <queries' embeddings, direction>."""
    return jax.grad(lambda p: (dual.encode_queries(p, ids) * direction).sum())(params)


def test_an_encoder_has_the_parameters_of_bert(tree):
    bert = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), tokens())["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda x: x.shape, bert)


def test_pooling_and_length_against_the_hidden_states(tree):
    ids = tokens()
    hidden = np.asarray(embed(Bert(CONFIG), tree, ids))
    count = (ids > 0).sum(axis=1)
    mean = np.stack([h[: max(n, 1)].mean(axis=0) for h, n in zip(hidden, count, strict=True)])
    mean[-1] = 0
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(embed(Encoder(CONFIG, normalize=False), tree, ids), mean)
    close(embed(Encoder(CONFIG, "cls", normalize=False), tree, ids), hidden[:, 0])
    unit = mean[:-1] / np.linalg.norm(mean[:-1], axis=1, keepdims=True)
    close(embed(Encoder(CONFIG), tree, ids)[:-1], unit)


def test_padding_length_does_not_matter(tree):
    ids = tokens()
    wide = np.pad(ids, ((0, 0), (0, 56)))
    np.testing.assert_allclose(
        embed(Encoder(CONFIG), tree, ids), embed(Encoder(CONFIG), tree, wide), atol=1e-5
    )


def test_the_other_rows_do_not_matter(tree):
    ids, other = tokens(), tokens(seed=1)
    other[:3] = ids[:3]
    np.testing.assert_allclose(
        embed(Encoder(CONFIG), tree, ids)[:3], embed(Encoder(CONFIG), tree, other)[:3], atol=1e-5
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_padding_is_finite_and_so_are_its_gradients(tree, pooling):
    dual = DualEncoder(Encoder(CONFIG, pooling))
    params = dual.from_encoder_params(tree)
    ids = tokens()
    assert not ids[-1].any()
    assert np.isfinite(embed(dual.encoder, tree, ids)).all()
    alone = np.where(np.arange(8)[:, None] == 7, DIRECTION, 0)
    for direction in (DIRECTION, alone):
        grads = query_gradient(dual, params, ids, direction)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bfloat16_is_close_and_comes_out_as_float32(tree, pooling):
    full = embed(Encoder(CONFIG, pooling), tree, tokens())[:-1]
    low = embed(Encoder(CONFIG, pooling, dtype=jnp.bfloat16), tree, tokens())[:-1]
    assert low.dtype == jnp.float32
    assert np.abs(full - low).max() > 0
    assert (full * low).sum(axis=1).min() > 0.99
    # Normalised in float32: bfloat16 would miss length 1 by up to a hundredth.
    np.testing.assert_allclose(jnp.square(low).sum(axis=1), 1, atol=1e-5)


def test_an_unknown_pooling_is_refused(tree):
    with pytest.raises(UserError, match="no pooling 'max'"):
        embed(Encoder(CONFIG, "max"), tree, tokens())


def after_a_query_step(dual, params):
    """Parameters after a step on a loss that reads the queries alone, and its gradient."""
    grads = query_gradient(dual, params, tokens(), DIRECTION)
    return jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, grads), grads


@functools.partial(jax.jit, static_argnums=0)
def both(dual, params, ids):
    return dual.encode_queries(params, ids), dual.encode_targets(params, ids)


def test_shared_towers_are_one_set_of_leaves(tree):
    dual = DualEncoder(Encoder(CONFIG))
    params = dual.from_encoder_params(tree)
    assert params.keys() == {"shared"}
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (params, tree)), strict=True))
    moved, _ = after_a_query_step(dual, params)
    before, after = both(dual, params, tokens()), both(dual, moved, tokens())
    np.testing.assert_array_equal(*before)
    np.testing.assert_array_equal(*after)
    assert np.abs(after[1] - before[1])[:-1].max(axis=1).min() > 1e-3


def test_separate_towers_start_equal_and_move_apart(tree):
    dual = DualEncoder(Encoder(CONFIG), shared=False)
    params = dual.from_encoder_params(tree)
    assert params.keys() == {"query", "target"}
    moved, grads = after_a_query_step(dual, params)
    before, after = both(dual, params, tokens()), both(dual, moved, tokens())
    np.testing.assert_allclose(*before, atol=1e-6)
    np.testing.assert_array_equal(before[1], after[1])
    assert not any(np.any(g) for g in jax.tree.leaves(grads["target"]))
    assert np.abs(after[0] - before[0])[:-1].max(axis=1).min() > 1e-3


@pytest.mark.parametrize("jit", [False, True])
def test_separate_towers_own_their_memory(tree, jit):
    dual = DualEncoder(Encoder(CONFIG), shared=False)
    params = (jax.jit if jit else lambda f: f)(dual.from_encoder_params)(tree)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)]
    assert len(set(pointers)) == len(pointers)
    arrays = dual.from_encoder_params(jax.tree.map(np.asarray, tree))
    for a, b in zip(*map(jax.tree.leaves, (arrays["query"], arrays["target"])), strict=True):
        assert not np.shares_memory(a, b)


def test_random_parameters_are_float32_and_follow_the_key():
    dual = DualEncoder(Encoder(CONFIG, dtype=jnp.bfloat16), shared=False)
    init = jax.jit(dual.init)
    a, b = init(jax.random.key(0)), init(jax.random.key(1))
    assert a.keys() == {"query", "target"}
    assert {x.dtype for x in jax.tree.leaves(a)} == {jnp.dtype(jnp.float32)}
    for x, y in zip(*map(jax.tree.leaves, (a["query"], a["target"])), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()
    word = [params["query"]["embeddings"]["word"] for params in (a, b)]
    assert word[0].std() == pytest.approx(0.02, rel=0.1)
    assert np.abs(word[0] - word[1]).max() > 0.02


def test_a_learned_beta_scales_queries_and_is_learned_from_them(tree):
    dual = DualEncoder(Encoder(CONFIG), learn_beta=True)
    params = dual.from_encoder_params(tree)
    assert params["beta"] == 0
    moved = params | {"beta": jnp.float32(0.01)}
    assert float(dual.beta_ratio(moved)) == pytest.approx(np.e, rel=1e-5)
    plain = embed(Encoder(CONFIG), tree, tokens())
    for given, ratio in ((params, 1.0), (moved, np.e)):
        queries, targets = both(dual, given, tokens())
        np.testing.assert_allclose(queries, ratio * plain, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(targets, plain, rtol=1e-4, atol=1e-6)
    slope = query_gradient(dual, params, tokens(), DIRECTION)["beta"]
    assert slope == pytest.approx(100 * float((plain * DIRECTION).sum()), rel=1e-3)


def test_an_embedding_has_the_dimension_of_the_encoder():
    dual = DualEncoder(Encoder(CONFIG))
    params = jax.eval_shape(dual.init, jax.random.key(0))
    assert params.keys() == {"shared"}
    for encode in (dual.encode_queries, dual.encode_targets):
        assert jax.eval_shape(encode, params, tokens()).shape == (8, dual.dim)


def test_the_same_on_eight_devices(tree):
    dual = DualEncoder(Encoder(CONFIG))
    params, ids = dual.from_encoder_params(tree), tokens()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.P("data")
    split = jax.shard_map(dual.encode_queries, mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grad(encode, params):
        return jax.value_and_grad(lambda p: (encode(p, ids) * DIRECTION).sum())(params)

    value, grads = value_and_grad(split, params)
    expected = (embed(dual.encoder, tree, ids) * DIRECTION).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    one_device = query_gradient(dual, params, ids, DIRECTION)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(one_device), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_it_can_be_a_static_argument():
    def dual():
        return DualEncoder(Encoder(CONFIG, dtype=jnp.bfloat16))

    assert dual() == dual()
    assert hash(dual()) == hash(dual())


@pytest.mark.parametrize("shared", [True, False])
def test_no_gradient_reaches_a_frozen_side(tree, shared):
    dual = DualEncoder(Encoder(CONFIG), shared=shared, frozen=frozenset({"query"}))
    params = dual.from_encoder_params(tree)
    of_queries = query_gradient(dual, params, tokens(), DIRECTION)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_queries))

    def both(params):
        return (dual.encode_targets(params, tokens()) * DIRECTION).sum()

    assert any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(both))(params)))
